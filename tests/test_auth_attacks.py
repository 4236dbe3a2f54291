"""What is tried against logins, over HTTP on four workers of a real server."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.auth_site import VARIABLE, User, Users
from tests.figures import report, size
from tests.servers import ASGI, GTHREAD, Answer, Browser, Kind, Server, new_place

SITES = {"asgi": (ASGI, "asgi_app"), "wsgi": (GTHREAD, "wsgi_app")}
RACERS = 8
AT_ONCE = 4
"""So many logins race for one session."""


@pytest.fixture(scope="module", params=list(SITES))
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    kind: Kind
    kind, app = SITES[request.param]
    place = new_place()
    try:
        users = Users(place / "users.json", [])
        users.write(User("ada", ("admin",)), User("bob"), User("mallory"))
        with Server(kind, place, env={VARIABLE: str(users.path)}, app=f"tests.auth_site:{app}") as server:
            yield server
    finally:
        shutil.rmtree(place)


def token_of(browser: Browser) -> str:
    """What the site's own page has in its form."""
    token = browser.get("/form").json["token"]
    assert isinstance(token, str)
    return token


def log_in(server: Server, name: str) -> Browser:
    browser = server.browser()
    token = token_of(browser)
    assert browser.request("POST", f"/login/{name}", {"X-CSRF-Token": token}).status == 200
    return browser


def is_worth_nothing(server: Server, cookies: dict[str, str]) -> bool:
    """Whether every worker takes this cookie for nobody's."""
    with server.desks(cookies) as desks:
        assert len(desks) == server.workers
        told = [ask("GET", "/me").json for ask in desks.values()]
    return all((found["user"], found["data"]) == (None, {}) for found in told)


def test_an_id_that_was_planted_before_a_login_is_worth_nothing_after_it(server: Server) -> None:
    mallory = server.browser()
    assert mallory.post("/put/planted").status == 200
    victim = server.browser(mallory.cookies)
    assert victim.post("/enter/ada").status == 200
    assert victim.get("/me").json["user"] == "ada"
    assert is_worth_nothing(server, mallory.cookies)


def test_an_id_that_somebody_made_up_is_no_session_before_nor_after_a_login(server: Server) -> None:
    made_up = {"session": "A" * 95}
    victim = server.browser(made_up)
    assert victim.post("/enter/ada").status == 200
    assert victim.cookies != made_up
    assert is_worth_nothing(server, made_up)


def test_nobody_is_logged_in_by_a_form_of_another_site(server: Server) -> None:
    """With the attacker's own token: the victim has no session, one of its own, or is logged in."""
    mallory = server.browser()
    token = token_of(mallory)
    visitor = server.browser()
    token_of(visitor)
    for victim in (server.browser(), visitor, log_in(server, "ada")):
        before = victim.get("/me").json["user"]
        for headers in ({"X-CSRF-Token": token}, {}):
            assert victim.request("POST", "/login/mallory", headers).status == 403
        own = token_of(victim)
        crossing = {"X-CSRF-Token": own, "Sec-Fetch-Site": "cross-site"}
        assert victim.request("POST", "/login/mallory", crossing).status == 403
        assert victim.get("/me").json["user"] == before


def test_nobody_is_logged_out_by_a_form_of_another_site(server: Server) -> None:
    ada = log_in(server, "ada")
    for headers in ({}, {"X-CSRF-Token": token_of(server.browser())}):
        assert ada.request("POST", "/logout", headers).status == 403
    assert ada.get("/me").json["user"] == "ada"


def test_a_token_from_before_the_login_is_worth_nothing_after_it(server: Server) -> None:
    browser = server.browser()
    token = token_of(browser)
    assert browser.request("POST", "/login/ada", {"X-CSRF-Token": token}).status == 200
    assert browser.request("POST", "/logout", {"X-CSRF-Token": token}).status == 403


def test_who_logs_in_on_somebodys_session_gets_nothing_of_it_nor_gives_them_anything(server: Server) -> None:
    """Whoever of the two had the cookie before, or has it still."""
    ada = log_in(server, "ada")
    assert ada.post("/put/secret").status == 200
    swapped = dict(ada.cookies)
    bob = server.browser(swapped)
    assert bob.post("/enter/bob").json["data"] == {}
    assert bob.get("/me").json.items() >= {"user": "bob", "data": {}}.items()
    assert bob.get("/admin").status == 403
    assert is_worth_nothing(server, swapped)


def test_what_was_recorded_before_a_logout_can_be_replayed_on_no_worker(server: Server) -> None:
    ada = log_in(server, "ada")
    recorded, token = dict(ada.cookies), token_of(ada)
    assert ada.request("POST", "/logout", {"X-CSRF-Token": token}).status == 200
    assert ada.cookies == {}
    assert is_worth_nothing(server, recorded)
    replayed = server.browser(recorded)
    assert replayed.request("POST", "/logout", {"X-CSRF-Token": token}).status == 403
    assert replayed.post("/put/revived").status == 200
    assert is_worth_nothing(server, recorded)


def test_after_a_change_of_privileges_the_former_id_is_worth_nothing(server: Server) -> None:
    ada = log_in(server, "ada")
    assert ada.post("/put/kept").status == 200
    former = dict(ada.cookies)
    assert ada.post("/renew").status == 200
    assert ada.get("/me").json.items() >= {"user": "ada", "data": {"value": "kept"}}.items()
    assert is_worth_nothing(server, former)


def test_what_needs_a_right_needs_it_in_every_worker(server: Server) -> None:
    for name, status in (("ada", 200), ("bob", 403)):
        with server.desks(log_in(server, name).cookies) as desks:
            assert [ask("GET", "/admin").status for ask in desks.values()] == [status] * len(desks)
            assert [ask("POST", "/admin").status for ask in desks.values()] == [403] * len(desks)
    assert server.browser().get("/admin").status == 401


@pytest.mark.soak
def test_of_racing_logins_none_leaves_an_id_that_is_still_served(server: Server) -> None:
    """Several at once begin with the id of one visitor; when an answer is there, that id is nobody's, and each has its
    own."""
    wanted, logins, old, trouble = size(2_000, 200), [0], [0], list[str]()
    counting = threading.Lock()

    def race() -> None:
        while logins[0] < wanted and not trouble:
            visitor = server.browser()
            visitor.post("/put/tea")
            runners = [threading.Thread(target=run, args=(dict(visitor.cookies),)) for _ in range(AT_ONCE)]
            for runner in runners:
                runner.start()
            for runner in runners:
                runner.join()

    def run(cookies: dict[str, str]) -> None:
        own, former = server.browser(cookies), server.browser(cookies)
        entered = own.post("/enter/ada")
        found: list[Answer] = [former.get("/me"), own.get("/me")]
        with counting:
            logins[0] += 1
            old[0] += found[0].json["user"] is not None or found[0].json["data"] != {}
            if entered.status != 200 or found[1].json["user"] != "ada" or own.cookies == cookies:
                trouble.append(json.dumps([entered.status, found[1].json]))

    racers = [threading.Thread(target=race) for _ in range(RACERS // AT_ONCE)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    report("racing logins", protocol=server.kind.protocol, logins=logins[0], served_under_an_old_id=old[0])
    assert (trouble, old[0]) == ([], 0)


def test_the_log_holds_no_cookie_and_no_token(server: Server) -> None:
    browser = log_in(server, "ada")
    token = token_of(browser)
    browser.request("POST", "/login/bob", {"X-CSRF-Token": token[:-4]})
    log = Path(server.log).read_text()
    assert not any(secret in log for secret in (token, *browser.cookies.values()))
