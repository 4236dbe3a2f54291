"""The routes of the examples, word for word, by one table over both protocols and every kind of server."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from tests.servers import ASGI, GTHREAD, KINDS, Answer, Browser, Kind, Running, Server

pytest_plugins = ["tests.hosts"]

HTML: Final = {"Accept": "text/html,application/xhtml+xml"}
ATTRIBUTES: Final = "; Max-Age=34560000; Path=/; SameSite=Lax; HttpOnly"


@dataclass(frozen=True)
class Step:
    """One request and what must come back. `cookie`: whether it is "new", "removed" or not mentioned; `looks`: Vary;
    `choice`: what the client is told of the visitor's consent."""

    request: str
    body: Any = None
    status: int = 200
    cookie: str | None = None
    looks: bool = True
    sends: dict[str, str] = field(default_factory=dict)
    choice: str | None = None


def error(request: str, status: int, **options: Any) -> Step:
    return Step(request, {"error": str}, status, looks=False, **options)


SCENARIOS: Final[dict[str, list[Step]]] = {
    "a count begins at one and goes on": [
        Step("GET /hit", {"hits": 1}, cookie="new"),
        Step("GET /hit", {"hits": 2}),
        Step("GET /visit", {"visits": 1}),
        Step("GET /visit", {"visits": 2}),
        Step("GET /session", {"hits": 2, "visits": 2}),
    ],
    "reading never creates": [
        Step("GET /session", {}),
        Step("GET /whoami", {"user": None}),
        Step("GET /"),
        Step("GET /session", {}),
    ],
    "ping never looks, with a session or without": [
        Step("GET /ping", {}, looks=False),
        Step("POST /create", {"ok": True}, cookie="new"),
        Step("GET /ping", {}, looks=False),
    ],
    "values are set, replaced and shown": [
        Step("POST /set/colour/teal", {"key": "colour", "value": "teal"}, cookie="new"),
        Step("POST /set/colour/amber", {"key": "colour", "value": "amber"}),
        Step("POST /set/size/10", {"key": "size", "value": "10"}),
        Step("GET /session", {"colour": "amber", "size": "10"}),
    ],
    "an assignment of the same value says the same and needs no cookie": [
        Step("POST /set/a/1", {"key": "a", "value": "1"}, cookie="new"),
        Step("POST /set/a/1", {"key": "a", "value": "1"}),
    ],
    "path values are percent-decoded strings": [
        Step("POST /set/a%2Fb/c%20d", {"key": "a/b", "value": "c d"}, cookie="new"),
        Step("POST /set/%C3%A9t%C3%A9/%E2%98%83", {"key": "été", "value": "☃"}),
        Step("POST /set/plus/1+1%3D2%3F%26", {"key": "plus", "value": "1+1=2?&"}),
        Step("POST /set/per/100%2525", {"key": "per", "value": "100%25"}),
        Step("POST /set/dots/..%2F..", {"key": "dots", "value": "../.."}),
        Step("GET /session", {"a/b": "c d", "été": "☃", "plus": "1+1=2?&", "per": "100%25", "dots": "../.."}),
    ],
    "slow answers like set": [
        Step("POST /slow/a/b?seconds=0", {"key": "a", "value": "b"}, cookie="new"),
        Step("POST /slow-logout-race?seconds=0.01", {"key": "late", "value": "1"}),
        Step("GET /session", {"a": "b", "late": "1"}),
    ],
    "seconds is a number from 0 to 30": [
        error("POST /slow/a/b?seconds=x", 400),
        error("POST /slow/a/b?seconds=-1", 400),
        error("POST /slow/a/b?seconds=30.01", 400),
        error("POST /slow/a/b?seconds=nan", 400),
        error("POST /slow/a/b?seconds=inf", 400),
        error("POST /slow/a/b?seconds=", 400),
        error("POST /slow-logout-race?seconds=1h", 400),
    ],
    "a nested edit is noticed, and append keeps the same list": [
        Step("POST /cart/tea", {"cart": ["tea"]}, cookie="new"),
        Step("POST /cart/scones", {"cart": ["tea", "scones"]}),
        Step("POST /append/jam", {"cart": ["tea", "scones", "jam"]}),
        Step("POST /cart/a%2Fb", {"cart": ["tea", "scones", "jam", "a/b"]}),
        Step("GET /session", {"cart": ["tea", "scones", "jam", "a/b"]}),
    ],
    "append begins a list": [Step("POST /append/jam", {"cart": ["jam"]}, cookie="new")],
    "login gives a new id and keeps the data, logout ends it": [
        Step("POST /cart/tea", {"cart": ["tea"]}, cookie="new"),
        Step("POST /login/ada%20l", {"user": "ada l"}, cookie="new"),
        Step("GET /whoami", {"user": "ada l"}),
        Step("GET /session", {"cart": ["tea"], "user": "ada l"}),
        Step("POST /logout", {"user": None}, cookie="removed"),
        Step("GET /whoami", {"user": None}),
        Step("GET /session", {}),
    ],
    "login without a session makes one": [
        Step("POST /login/ada", {"user": "ada"}, cookie="new"),
        Step("POST /login/grace", {"user": "grace"}, cookie="new"),
        Step("GET /whoami", {"user": "grace"}),
    ],
    "logout of nobody is no error": [
        Step("POST /logout", {"user": None}),
        Step("POST /logout", {"user": None}, cookie="removed", sends={"Cookie": "session=junk"}),
    ],
    "create stores an empty session, once": [
        Step("POST /create", {"ok": True}, cookie="new"),
        Step("POST /create", {"ok": True}),
        Step("GET /session", {}),
    ],
    "renew changes the cookie and nothing else": [
        Step("POST /renew", {"ok": True}),
        Step("GET /hit", {"hits": 1}, cookie="new"),
        Step("POST /renew", {"ok": True}, cookie="new"),
        Step("GET /hit", {"hits": 2}),
    ],
    "clear ends the session": [
        Step("POST /clear", {"ok": True}),
        Step("GET /hit", {"hits": 1}, cookie="new"),
        Step("POST /clear", {"ok": True}, cookie="removed"),
        Step("GET /hit", {"hits": 1}, cookie="new"),
    ],
    "accept, decline and remember need a session to act on": [
        Step("POST /accept", {"ok": True}),
        Step("POST /decline", {"ok": True}),
        Step("POST /remember", {"ok": True}),
        Step("GET /hit", {"hits": 1}, cookie="new"),
        Step("POST /decline", {"ok": True}),
        Step("POST /accept", {"ok": True}),
        Step("POST /remember", {"ok": True}),
        Step("GET /hit", {"hits": 2}),
    ],
    "a form is sent back to the page": [
        Step("POST /cart/tea", {"cart": ["tea"]}, 303, cookie="new", sends=HTML),
        Step("POST /login/ada", {"user": "ada"}, 303, cookie="new", sends=HTML),
        Step("POST /set/a/b", {"key": "a", "value": "b"}, 303, sends=HTML),
        Step("GET /hit", {"hits": 1}, sends=HTML),
        Step("POST /logout", {"user": None}, 303, cookie="removed", sends=HTML),
    ],
    "unknown routes and wrong methods are JSON": [
        error("GET /nowhere", 404),
        error("POST /set/a", 404),
        error("POST /set/a/b/c", 404),
        error("POST /set//b", 404),
        error("GET /hit/", 404),
        error("POST /hit", 405),
        error("POST /session", 405),
        error("POST /", 405),
        error("GET /login/ada", 405),
        error("GET /set/a/b", 405),
        error("GET /logout", 405),
        error("DELETE /set/a/b", 405),
        error("OPTIONS /hit", 405),
        error("PUT /cart/tea", 405),
        error("GET /nowhere", 404, sends=HTML),
    ],
    "what cannot be counted or appended to is a conflict": [
        Step("POST /set/hits/x", {"key": "hits", "value": "x"}, cookie="new"),
        Step("POST /set/visits/x", {"key": "visits", "value": "x"}),
        Step("POST /set/cart/x", {"key": "cart", "value": "x"}),
        Step("GET /hit", {"error": str}, 409),
        Step("GET /visit", {"error": str}, 409),
        Step("POST /cart/tea", {"error": str}, 409),
        Step("POST /append/tea", {"error": str}, 409),
        Step("GET /session", {"hits": "x", "visits": "x", "cart": "x"}),
    ],
    "HEAD answers like GET, without a body": [
        Step("HEAD /hit", b"", cookie="new"),
        Step("HEAD /session", b""),
        Step("HEAD /ping", b"", looks=False),
        Step("HEAD /", b""),
        Step("GET /hit", {"hits": 2}),
    ],
    "a cookie that is no session is neither adopted nor removed by reading": [
        Step("GET /session", {}, sends={"Cookie": "session=junk"}),
        Step("GET /hit", {"hits": 1}, cookie="new", sends={"Cookie": "session=junk; other=1"}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_routes_answer_as_the_table_says(running: Running, kind: Kind, scenario: str) -> None:
    with running(kind).browser() as browser:
        for step in SCENARIOS[scenario]:
            take(browser, step)


def take(browser: Browser, step: Step) -> None:
    """Send the request and compare all that the table says."""
    before = dict(browser.cookies)
    method, path = step.request.split(" ")
    answer = browser.request(method, path, step.sends)
    assert answer.status == step.status, (step, answer)
    assert answer.pid > 0
    check_body(step, answer, path)
    check_cookie(step, answer, before, browser.cookies)
    vary = answer.header("vary")
    assert (vary == "Cookie") is step.looks, (step, answer)
    assert vary is None or step.looks
    assert (answer.header("location") == "/") is (step.status == 303)


def check_body(step: Step, answer: Answer, path: str) -> None:
    if step.body == b"":
        assert answer.body == b""
    elif path == "/" and step.status == 200:
        assert (answer.header("content-type") or "").startswith("text/html")
        assert str(answer.pid) in answer.body.decode()
    else:
        assert answer.header("content-type") == "application/json"
        check_json(step, answer, path)


def check_json(step: Step, answer: Answer, path: str) -> None:
    if "error" in step.body:
        assert list(answer.json) == ["error"]
        assert isinstance(answer.json["error"], str)
        assert answer.json["error"]
    else:
        pid = {} if path == "/session" else {"pid": answer.pid}
        assert answer.json == {**step.body, **pid}, (step, answer)


def check_cookie(step: Step, answer: Answer, before: dict[str, str], after: dict[str, str]) -> None:
    found = answer.all("set-cookie")
    if step.cookie is None:
        assert found == [], (step, answer)
        assert answer.header("cache-control") is None
        return
    assert len(found) == 1, (step, answer)
    assert answer.header("cache-control") == "no-store"
    if step.cookie == "new":
        assert re.fullmatch(r"session=[A-Za-z0-9_-]{92}" + ATTRIBUTES, found[0])
        assert after["session"] != before.get("session")
    else:
        assert found[0] == "session=; Max-Age=0; Path=/; SameSite=Lax; HttpOnly"


@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_a_destroyed_session_is_no_session_for_those_who_still_have_its_cookie(running: Running, kind: Kind) -> None:
    server = running(kind)
    browser = server.browser()
    browser.post("/login/ada")
    stolen = server.browser(browser.cookies)
    assert stolen.get("/whoami").json["user"] == "ada"
    browser.post("/logout")
    assert stolen.get("/whoami").json["user"] is None
    assert stolen.get("/session").json == {}


@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_without_shmsession_secure_the_cookie_has_the_host_prefix_and_secure(place: Path, kind: Kind) -> None:
    with Server(kind, place, workers=1, env={"SHMSESSION_SECURE": ""}) as server:
        browser = server.browser()
        (cookie,) = browser.get("/hit").all("set-cookie")
        assert re.fullmatch(r"__Host-session=[A-Za-z0-9_-]{92}" + ATTRIBUTES + "; Secure", cookie)
        assert browser.get("/hit").json["hits"] == 2
        assert browser.post("/logout").all("set-cookie") == [
            "__Host-session=; Max-Age=0; Path=/; SameSite=Lax; HttpOnly; Secure"
        ]


@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_in_manual_mode_storing_before_create_is_a_conflict_that_names_it(place: Path, kind: Kind) -> None:
    """Reading is none, and after create() all is as ever."""
    with Server(kind, place, workers=1, env={"SHMSESSION_MODE": "manual"}) as server:
        browser = server.browser()
        asked = ["GET /hit", "GET /visit", "POST /set/a/1", "POST /cart/tea", "POST /append/tea", "POST /login/ada"]
        for request in [*asked, "POST /renew", "POST /clear", "POST /remember", "POST /slow/a/1?seconds=0"]:
            method, path = request.split(" ")
            answer = browser.request(method, path)
            assert (answer.status, list(answer.json)) == (409, ["error"]), request
            assert "create()" in answer.json["error"]
            assert answer.all("set-cookie") == []
        assert browser.get("/session").json == {}
        assert browser.get("/").status == 200
        browser.post("/create")
        assert browser.get("/hit").json["hits"] == 1
