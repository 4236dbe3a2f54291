"""The example with logins: in a browser, by what a visitor sees there, on four workers; and past that, in process."""

import importlib
import re
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import argon2
import pytest
from playwright.async_api import BrowserContext, Page, expect
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from werkzeug.test import Client

from examples.login import _pages, _people
from shmsession import Key
from shmsession.codec import encode
from shmsession.errors import BackendError
from shmsession.hooks import Event, Hooks, LoginRefused
from shmsession.ids import tag_of
from tests.chromium import Browse
from tests.servers import GTHREAD, UVICORN, Kind, Server, new_place

pytest_plugins = ["tests.browser"]

PASSWORD: Final = "correct horse"
DAY: Final = 86_400


# ── in a browser ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=[UVICORN, GTHREAD], ids=str)
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A site that somebody has signed up at before; Flask's has a database behind its sessions."""
    kind: Kind = request.param
    place = new_place()
    app, people = f"examples.login.{kind.protocol}_app:app", place / "people.db"
    env = {"LOGIN_USERS": str(people), "SHMSESSION_BACKEND": f"sqlite:///{place}/sessions.db" if kind.gunicorn else ""}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_people, "FILE", people)
            _people.sign_up("first", PASSWORD)
        with Server(kind, place, app=app, tcp=True, env=env) as server:
            yield "http://{}:{}".format(*server.address)
    finally:
        shutil.rmtree(place)


class Visitor:
    """A page of the site in one browser, and what a visitor does there."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.url = page, url
        self.blocked: list[str] = []
        page.on("console", lambda line: self.blocked.append(line.text) if "Security Policy" in line.text else None)

    async def go(self, path: str) -> int:
        answer = await self.page.goto(self.url + path)
        assert answer is not None
        return answer.status

    async def press(self, name: str) -> int:
        async with self.page.expect_navigation() as navigation:
            await self.page.get_by_role("button", name=name, exact=True).click()
        answer = await navigation.value
        assert answer is not None
        return answer.status

    async def fill(self, name: str, password: str = PASSWORD) -> None:
        await self.page.get_by_label("Name").fill(name)
        await self.page.get_by_label("Password").fill(password)

    async def sign_up(self, name: str) -> None:
        await self.go("/sign-up")
        await self.fill(name)
        await self.press("Sign up")
        assert await self.heading() == f"Hello, {name}"

    async def log_in(self, name: str, password: str = PASSWORD) -> int:
        await self.go("/login")
        await self.fill(name, password)
        return await self.press("Log in")

    async def heading(self) -> str:
        return await self.page.inner_text("h1")

    async def logins(self) -> list[str]:
        """What the page "where you are logged in" says of each, in one line."""
        await self.go("/sessions")
        return [re.sub(r"\s+", " ", text) for text in await self.page.locator("main li").all_inner_texts()]

    async def is_logged_in(self) -> bool:
        await self.go("/")
        return (await self.heading()).startswith("Hello")

    async def age(self) -> float:
        """The session's cookie's; -1 when it ends with the browser."""
        (cookie,) = await self.page.context.cookies()
        return cookie["expires"]


@asynccontextmanager
async def browser(context: BrowserContext, url: str, **options: Any) -> AsyncIterator[Visitor]:
    """Another browser, with a cookie jar of its own; it heeds no script unless it is told to."""
    assert context.browser is not None
    other = await context.browser.new_context(**{"java_script_enabled": False, **options})
    try:
        visitor = Visitor(await other.new_page(), url)
        yield visitor
        assert visitor.blocked == []
    finally:
        await other.close()


def test_a_visitor_signs_up_logs_out_and_logs_in(browse: Browse, url: str) -> None:
    async def visit(context: BrowserContext) -> None:
        async with browser(context, url) as ada:
            await ada.go("/sign-up")
            await ada.fill("First")
            assert await ada.press("Sign up") == 422
            assert await ada.page.get_by_role("alert").inner_text() == "Somebody has this name already."
            await ada.sign_up("ada")
            await ada.page.get_by_label("A note").fill("<b>tea</b>")
            await ada.press("Keep it")
            assert await ada.page.get_by_label("A note").input_value() == "<b>tea</b>"
            await ada.press("Log out")
            assert not await ada.is_logged_in()
            for name in ("ada", "nobody"):
                assert await ada.log_in(name, "wrong") == 401
                assert await ada.page.get_by_role("alert").inner_text() == "The name or the password is wrong."
            await ada.log_in(" Ada ")
            assert await ada.page.get_by_label("A note").input_value() == "", "the session of before has ended"

    browse(visit)


def test_a_page_for_some_asks_for_a_login_and_is_refused_to_others(browse: Browse, url: str) -> None:
    """After the login comes the page that was wanted."""

    async def visit(context: BrowserContext) -> None:
        async with browser(context, url) as bob, browser(context, url) as first:
            await bob.sign_up("bob")
            assert await bob.go("/people") == 403
            assert await bob.heading() == "That did not work"
            await first.go("/people")
            assert await first.heading() == "Log in"
            await first.fill("first")
            assert await first.press("Log in") == 200
            assert await first.heading() == "People"
            assert "bob" in await first.page.locator("main li").all_inner_texts()
            assert await first.go("/nowhere") == 404

    browse(visit)


def test_one_other_session_is_ended_and_then_all_others(browse: Browse, url: str) -> None:
    firefox = "Mozilla/5.0 (Windows NT 10.0; rv:140.0) Gecko/20100101 Firefox/140.0"

    async def visit(context: BrowserContext) -> None:
        async with browser(context, url) as here, browser(context, url, user_agent=firefox) as there:
            await here.sign_up("carol")
            assert [line.startswith("Chrome on Linux this one 127.0.0.0/24") for line in await here.logins()] == [True]
            assert await here.page.get_by_role("button", name="End all others").count() == 0
            await there.log_in("carol")
            there_line, here_line = await here.logins()
            assert there_line.startswith("Firefox on Windows 127.0.0.0/24 · seen just now · logged in just now")
            assert "this one" in here_line
            await here.press("End it")
            assert len(await here.logins()) == 1
            assert not await there.is_logged_in()
            async with browser(context, url) as third:
                await there.log_in("carol")
                await third.log_in("carol")
                assert len(await here.logins()) == 3
                await here.press("End all others")
                assert len(await here.logins()) == 1
                assert not await there.is_logged_in()
                assert not await third.is_logged_in()

    browse(visit)


def test_only_who_wants_to_be_remembered_has_a_cookie_that_outlives_the_browser(browse: Browse, url: str) -> None:
    async def visit(context: BrowserContext) -> None:
        async with browser(context, url) as dave:
            await dave.sign_up("dave")
            assert await dave.age() == -1
            await dave.press("Log out")
            await dave.go("/login")
            await dave.page.get_by_label("Remember me").check()
            await dave.fill("dave")
            async with dave.page.expect_response(url + "/login") as response:
                await dave.press("Log in")
            cookie = await (await response.value).header_value("set-cookie")
            assert int(re.findall("Max-Age=([0-9]+)", cookie or "")[0]) > 30 * DAY
            assert await dave.age() > 0
            assert "remembered" in (await dave.logins())[0]

    browse(visit)


def test_a_new_password_ends_all_other_sessions_and_the_old_one_is_worth_nothing(browse: Browse, url: str) -> None:
    async def visit(context: BrowserContext) -> None:
        async with browser(context, url) as erin, browser(context, url) as thief:
            await erin.sign_up("erin")
            await thief.log_in("erin")
            (old,) = await erin.page.context.cookies()
            await erin.go("/password")
            await erin.page.get_by_label("New password").fill("battery staple")
            await erin.press("Change it")
            assert "Your password is changed" in await erin.page.get_by_role("status").inner_text()
            assert len(await erin.logins()) == 1
            assert not await thief.is_logged_in()
            await thief.page.context.add_cookies([{"name": old["name"], "value": old["value"], "url": url}])
            assert not await thief.is_logged_in(), "the session that stays has a new id"
            await thief.page.context.clear_cookies()
            assert await thief.log_in("erin") == 401
            assert await thief.log_in("erin", "battery staple") == 200

    browse(visit)


def test_no_form_is_taken_without_its_token(browse: Browse, url: str) -> None:
    async def visit(context: BrowserContext) -> None:
        async with browser(context, url, java_script_enabled=True) as frank:
            await frank.sign_up("frank")

            async def stripped(path: str, button: str) -> int:
                await frank.go(path)
                tokens = frank.page.locator("[name=csrf_token]")
                await tokens.evaluate_all("all => all.forEach(token => token.remove())")
                return await frank.press(button)

            assert await stripped("/", "Keep it") == 403
            assert await frank.heading() == "That did not work"
            assert await stripped("/", "Log out") == 403
            await frank.go("/password")
            await frank.page.get_by_label("New password").fill("battery staple")
            await frank.page.locator("main [name=csrf_token]").evaluate("token => token.value = 'guessed'")
            assert await frank.press("Change it") == 403
            assert await frank.is_logged_in()
            await frank.press("Log out")
            await frank.go("/login")
            await frank.fill("frank")
            await frank.page.locator("[name=csrf_token]").evaluate("token => token.remove()")
            assert await frank.press("Log in") == 403
            assert not await frank.is_logged_in()

    browse(visit)


@pytest.mark.parametrize("url", [UVICORN], ids=str, indirect=True)
def test_a_live_page_follows_its_session_and_logs_itself_out(browse: Browse, url: str) -> None:
    """Its own scripts do it: the page is not loaded again."""

    async def visit(context: BrowserContext) -> None:
        live, tab = Visitor(await context.new_page(), url), Visitor(await context.new_page(), url)

        async def keep(note: str) -> None:
            await tab.go("/")
            await tab.page.get_by_label("A note").fill(note)
            await tab.press("Keep it")

        await live.sign_up("gina")
        await live.go("/live")
        await live.page.evaluate("window.loadedOnce = true")
        await expect(live.page.get_by_text("There is none yet.")).to_be_visible()
        await keep("tea")
        await expect(live.page.locator("#note")).to_have_text("tea")
        await tab.go("/password")
        await tab.page.get_by_label("New password").fill(PASSWORD)
        await tab.press("Change it")
        await keep("milk")
        await expect(live.page.locator("#note")).to_have_text("milk")  # it has come back by the new id
        async with browser(context, url) as elsewhere:
            await elsewhere.log_in("gina")
            await elsewhere.logins()
            await elsewhere.press("End it")
            await expect(live.page.get_by_role("heading")).to_have_text("You were logged out")
        assert await live.page.evaluate("window.loadedOnce") is True
        assert await live.page.get_by_text("milk").count() == 0
        await live.page.get_by_role("link", name="Log in again").click()
        await live.fill("gina")
        await live.press("Log in")
        await expect(live.page.get_by_text("There is none yet.")).to_be_visible()
        await tab.go("/")
        await tab.press("Log out")
        await expect(live.page.get_by_role("heading")).to_have_text("You were logged out")
        assert live.blocked == tab.blocked == []

    browse(visit)


# ── past the pages ────────────────────────────────────────────────────────────────────────────────────────────


class Site:
    """One of the applications in this process, and a client of it that sends the token of the page it was at last."""

    def __init__(self, protocol: str) -> None:
        self.example: Any = importlib.reload(importlib.import_module(f"examples.login.{protocol}_app"))
        self.events: list[Event] = []
        self.example.store.hooks = Hooks([self.events.append])
        self.is_asgi = protocol == "asgi"
        self.client = self.new_client()

    def new_client(self) -> Any:
        return TestClient(self.example.app, follow_redirects=False) if self.is_asgi else Client(self.example.app)

    def get(self, path: str) -> Any:
        return self.client.get(path) if self.is_asgi else self.client.get(path, buffered=True)

    def post(self, path: str, page: str = "/login", **fields: str) -> Any:
        token = re.findall('name="csrf_token" value="(.*?)"', self.get(page).text)[0]
        return self.client.post(path, data={"csrf_token": token, **fields})

    def log_in(self, name: str = "ada", password: str = PASSWORD, **fields: str) -> Any:
        return self.post("/login", name=name, password=password, **fields)

    def user(self) -> str | None:
        found = re.findall("<h1>Hello, (.*)</h1>", self.get("/").text)
        return found[0] if found else None

    def handles(self, name: str) -> list[str]:
        person = _people.check(name, PASSWORD)
        assert person is not None
        return [one.handle for one in self.example.store.sync.sessions(person.id)]


@pytest.fixture(params=["asgi", "wsgi"])
def site(request: pytest.FixtureRequest, place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    settings = {"DIR": place / "sessions", "KEY": Key.generate(), "SECURE": "0", "MAP_SIZE": "4MiB", "NAME": "login"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SHMSESSION_{name}", str(value))
    monkeypatch.setattr(_people, "FILE", place / "people.db")
    for name in ("ada", "bob"):
        _people.sign_up(name, PASSWORD)
    site = Site(request.param)
    with site.example.store:
        yield site


def test_a_name_that_nobody_has_costs_as_much_as_a_wrong_password(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[str] = []
    verify = argon2.PasswordHasher.verify

    def counted(hasher: argon2.PasswordHasher, hashed: str, password: str) -> bool:
        checked.append(hashed)
        return verify(hasher, hashed, password)

    monkeypatch.setattr(argon2.PasswordHasher, "verify", counted)
    answers = [site.log_in(name, "wrong password") for name in ("ada", "nobody")]
    assert [answer.status_code for answer in answers] == [401, 401]
    known, unknown = map(argon2.extract_parameters, checked)
    assert known == unknown
    assert site.log_in("nobody", "").status_code == 401, "the hash for nobody lets nobody in"
    refused = [event.user for event in site.events if isinstance(event, LoginRefused)]
    assert refused == [tag_of(encode(name)).hex() for name in ("ada", "nobody", "nobody")]


def test_a_password_that_is_changed_while_it_is_checked_lets_nobody_in(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the new one is stored, and all sessions are ended, just after the old one was found right."""
    check = _people.check

    def check_slowly(name: str, password: str) -> _people.Person | None:
        person = check(name, password)
        assert person is not None
        _people.set_password(person.id, "battery staple")
        site.example.store.sync.revoke_user(person.id)
        return person

    monkeypatch.setattr(_people, "check", check_slowly)
    assert site.log_in().status_code == 401
    assert site.user() is None


def test_a_password_is_changed_only_after_a_fresh_login(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.log_in()
    monkeypatch.setattr(site.example, "FRESH", timedelta(0))
    for answer in (site.get("/password"), site.post("/password", "/", password="battery staple")):
        assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=/password")
    assert "once more" in site.get("/login").text
    assert _people.check("ada", PASSWORD) is not None


def test_nobody_ends_the_sessions_of_others(site: Site) -> None:
    site.log_in("bob")
    (bobs,) = site.handles("bob")
    site.client = site.new_client()
    site.log_in("ada")
    for handle in (bobs, "", "no handle"):
        assert site.post("/sessions/end", "/", handle=handle).status_code == 303
    site.post("/sessions/end-others", "/")
    assert site.handles("bob") == [bobs]
    (own,) = site.handles("ada")
    site.post("/sessions/end", "/", handle=own)
    assert site.user() is None


def test_a_login_leads_to_no_other_site(site: Site) -> None:
    for wanted in ("https://example.org/", "//example.org", "/\\example.org", "javascript:alert(1)"):
        assert 'name="next" value="/"' in site.get(f"/login?next={wanted}").text
        assert site.log_in(next=wanted).headers["location"] == "/"


def test_names_that_could_be_mistaken_and_short_passwords_are_refused(site: Site) -> None:
    names = ["a", "", "a b", "ada\n.", "-a", "ä" * 3, "x" * 31]
    for name, password in [*((name, PASSWORD) for name in names), ("fine", "short"), ("fine", "x" * 201)]:
        assert site.post("/sign-up", "/sign-up", name=name, password=password).status_code == 422
    assert [person.name for person in _people.everybody()] == ["ada", "bob"]


def test_every_answer_has_the_headers_and_no_page_is_kept(site: Site) -> None:
    for path in ("/", "/login", "/nowhere", "/static/style.css", "/people"):
        headers = site.get(path).headers
        assert {name: headers[name] for name in _pages.HEADERS} == _pages.HEADERS, path
        assert path in ("/static/style.css", "/people") or headers["cache-control"] == "no-store"


def test_looking_around_begins_no_session(site: Site) -> None:
    for path in ("/", "/static/style.css", "/ping", "/nowhere", "/people"):
        assert "set-cookie" not in site.get(path).headers
    assert site.example.store.count() == 0


def test_a_list_that_cannot_be_told_is_no_short_list(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.log_in()

    def fail(self: object, user_id: object) -> None:
        raise BackendError("down")

    monkeypatch.setattr(type(site.example.store), "sessions", fail)
    monkeypatch.setattr(type(site.example.store.sync), "sessions", fail)
    answer = site.get("/sessions")
    assert (answer.status_code, "Try again in a minute" in answer.text) == (503, True)


def test_devices_and_times_are_told_as_people_say_them() -> None:
    chrome = "Mozilla/5.0 ({}) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/140.0.0.0 Safari/537.36"
    told = {
        chrome.format("Linux; Android 10; K"): "Chrome on Android",
        chrome.format("X11; Linux x86_64"): "Chrome on Linux",
        chrome.format("Windows NT 10.0") + " Edg/140.0.0.0": "Edge on Windows",
        "curl/8.5.0": "curl/8.5.0", "": "unknown device",
    }  # fmt: skip
    assert {agent: _pages.device(agent) for agent in told} == told
    now = datetime.now(UTC)
    times = {0: "just now", 61: "1 minute ago", 7300: "2 hours ago", 90_000: "1 day ago", -100: "just now"}
    assert {seconds: _pages.ago(now - timedelta(seconds=seconds)) for seconds in times} == times


@pytest.mark.parametrize("site", ["asgi"], indirect=True)
def test_a_live_page_is_for_this_site_and_for_who_is_logged_in(site: Site) -> None:
    with site.client.websocket_connect("/live/changes") as live, pytest.raises(WebSocketDisconnect) as closed:
        live.receive_json()
    assert closed.value.code == site.example.LOGGED_OUT
    site.log_in()
    with site.client.websocket_connect("/live/changes") as live:
        assert live.receive_json() == {"note": ""}
    elsewhere = {"Origin": "https://example.org"}
    connect: Callable[..., Any] = site.client.websocket_connect
    with pytest.raises(WebSocketDisconnect), connect("/live/changes", headers=elsewhere):
        pass
