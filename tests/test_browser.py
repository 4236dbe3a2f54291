"""What a real browser, headless Chromium, makes of the cookies and headers."""

import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import pytest
from playwright.async_api import BrowserContext

from shmsession import Key, Session, SessionConfig
from shmsession.asgi import Receive, Scope, Send, SessionMiddleware
from shmsession.cookies import Writer
from shmsession.errors import ConfigError
from shmsession.testing import make_store
from tests.chromium import Browse, Host

pytest_plugins = ["tests.browser"]

Settings = dict[str, Any]
DAY: Final = 86_400
CHOICES: Final = {
    "secure": (True, False),
    "cookie_name": (None, "sid", "__Host-sid", "__Secure-sid"),
    "domain": (None, "localhost"),
    "path": ("/", "/app"),
    "same_site": ("Lax", "Strict", "None"),
    "http_only": (True, False),
    "partitioned": (False, True),
    "browser_session": (False, True),
}
COMBINATIONS: Final[list[Settings]] = [dict(zip(CHOICES, values, strict=True)) for values in product(*CHOICES.values())]


async def answer(send: Send, body: str, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    html = (b"content-type", b"text/html; charset=utf-8")
    await send({"type": "http.response.start", "status": 200, "headers": [html, *headers]})
    await send({"type": "http.response.body", "body": body.encode()})


# ── the cookies of all settings ───────────────────────────────────────────────────────────────────────────────


def is_refused(settings: Settings) -> bool:
    try:
        SessionConfig(**settings)
    except ConfigError:
        return True
    return False


def line_of(settings: Settings, value: str) -> bytes:
    """The Set-Cookie that these settings would give if they were not refused."""
    config = cast("SessionConfig", SimpleNamespace(**settings))
    name = settings["cookie_name"] or ("__Host-session" if settings["secure"] else "session")
    return Writer(config, name).issue(value, None).encode()


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_every_combination_of_settings_that_is_refused_is_a_cookie_that_chromium_drops(
    browse: Browse, host: Host, tls: bool
) -> None:
    refused = [settings for settings in COMBINATIONS if is_refused(settings)]
    assert len(refused) > 400

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        lines = [line_of(settings, str(at)) for at, settings in enumerate(refused)]
        await answer(send, "", [(b"set-cookie", line) for line in [*lines, b"control=kept; Path=/app"]])

    site = host(app, tls=tls)

    async def visit(context: BrowserContext) -> list[Any]:
        page = await context.new_page()
        await page.goto(f"{site.at()}/app/")
        return list(await context.cookies())

    kept = browse(visit)
    assert [cookie["name"] for cookie in kept] == ["control"], [refused[int(cookie["value"])] for cookie in kept]


class Counters:
    """A counter under each of these settings: at /0 or /app/0, and so on; POST ends its session."""

    def __init__(self, place: Path, choices: Iterable[Settings]) -> None:
        key = Key.generate()
        self.stores = [make_store(place, keys=(key,), **settings) for settings in choices]
        self._apps = [SessionMiddleware(self._count, store) for store in self.stores]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        number = scope["path"].rpartition("/")[2]
        if number:
            await self._apps[int(number)](scope, receive, send)
        else:
            await answer(send, "")

    @staticmethod
    async def _count(scope: Scope, receive: Receive, send: Send) -> None:
        session = Session.of(scope)
        if scope["method"] == "POST":
            session.destroy()
        else:
            session["visits"] = session.get("visits", 0) + 1
        await answer(send, str(session.get("visits")))

    def close(self) -> None:
        for store in self.stores:
            store.close()


VISITS: Final = """async path => {
    const ask = async method => (await fetch(path, {method})).text();
    return [await ask('GET'), await ask('GET')];
}"""
LEAVE: Final = "async path => (await fetch(path, {method: 'POST'})).text()"


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_every_combination_of_settings_that_is_accepted_keeps_a_session_in_chromium(
    browse: Browse, host: Host, place: Path, tls: bool
) -> None:
    """The cookie is in its jar as configured, a second visit is known, and after the logout the cookie is gone."""
    accepted = [settings for settings in COMBINATIONS if not is_refused(settings)]
    assert len(accepted) > 300
    counters = Counters(place, accepted)
    site = host(counters, tls=tls)

    async def visit(context: BrowserContext) -> None:
        page = await context.new_page()
        await page.goto(site.at() + "/")
        for number, settings in enumerate(accepted):
            path = f"{settings['path'].rstrip('/')}/{number}"
            assert await page.evaluate(VISITS, path) == ["1", "2"], settings
            (cookie,) = await context.cookies()
            assert cookie == expected(settings, cookie, site.at())
            await page.evaluate(LEAVE, path)
            assert await context.cookies() == [], settings

    try:
        browse(visit)
    finally:
        counters.close()


def expected(settings: Settings, cookie: Any, origin: str) -> Any:
    """The jar's entry for these settings."""
    name = SessionConfig(**settings).effective_cookie_name
    wanted = {
        "name": name, "value": cookie["value"], "domain": "localhost", "path": settings["path"],
        "secure": settings["secure"], "httpOnly": settings["http_only"], "sameSite": settings["same_site"],
        "expires": -1 if settings["browser_session"] else pytest.approx(time.time() + 400 * DAY, abs=120),
    }  # fmt: skip
    if settings["partitioned"]:
        wanted |= {"partitionKey": origin.rpartition(":")[0], "_crHasCrossSiteAncestor": False}
    return wanted


def test_a_path_is_refused_when_chromium_does_not_send_its_cookie_back(browse: Browse, host: Host) -> None:
    """It writes some characters in another way than they stand in Set-Cookie, and then does not recognise the path."""
    paths = [f"/a{chr(code)}b" for code in range(0x21, 0x7F) if chr(code) != ";"]
    paths += ["/", "/a/", "//", "/a//b", "/%41", "/.a", "/..a/b", "/.", "/..", "/./a", "/a/.", "/a/../b", "/a/.."]

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        """Its answer is the cookie that came."""
        headers = dict(scope["headers"])
        path = headers.get(b"x-path", b"/")
        await answer(send, headers.get(b"cookie", b"").decode(), [(b"set-cookie", b"x=1; Path=" + path)])

    site = host(app)

    async def visit(context: BrowserContext) -> list[str]:
        page = await context.new_page()
        await page.goto(site.at())
        lost = []
        for path in paths:
            await context.clear_cookies()
            await page.evaluate(PATH, path)
            if await page.evaluate(PATH, path) != "x=1":
                lost.append(path)
        return lost

    assert browse(visit) == [path for path in paths if is_refused({"cookie_name": "x", "path": path})]


PATH: Final = "async path => (await fetch(location.origin + path, {headers: {'X-Path': path}})).text()"


def test_a_domain_is_refused_when_chromium_drops_its_cookie_everywhere(browse: Browse, host: Host) -> None:
    domains = (
        "example.test", ".example.test", "EXAMPLE.Test", "app.example.test", "example.test.", "example.test:80", ".",
        "http://example.test", "example.test/", "*.example.test", "..example.test", "example..test",
    )  # fmt: skip

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        lines = [f"x{at}=1; Domain={domain}".encode() for at, domain in enumerate(domains)]
        await answer(send, "", [(b"set-cookie", line) for line in lines])

    site = host(app)

    async def visit(context: BrowserContext) -> list[str]:
        page = await context.new_page()
        await page.goto(site.at("app.example.test"))
        return [cookie["name"] for cookie in await context.cookies()]

    kept = [domain for domain in domains if not is_refused({"cookie_name": "x", "domain": domain})]
    assert sorted(browse(visit)) == sorted(f"x{domains.index(domain)}" for domain in kept)


@pytest.mark.parametrize("domain", [None, "example.test"])
def test_a_domain_lets_other_hosts_of_it_see_the_session(
    browse: Browse, host: Host, place: Path, domain: str | None
) -> None:
    """Without one, and whatever the application, a session is one host's."""
    counters = Counters(place, [{"secure": True, "cookie_name": "__Secure-sid", "domain": domain}])
    site = host(counters, tls=True)

    async def visit(context: BrowserContext) -> list[str]:
        page = await context.new_page()
        seen = []
        for name in ("a.example.test", "b.example.test", "a.example.test"):
            await page.goto(f"{site.at(name)}/0")
            seen.append(await page.inner_text("body"))
        return seen

    try:
        assert browse(visit) == (["1", "1", "2"] if domain is None else ["1", "2", "3"])
    finally:
        counters.close()


def test_a_long_term_session_outlives_the_browser_and_others_do_not(browse: Browse, host: Host, place: Path) -> None:
    """With browser_session=True: "remember me" gives its cookie a Max-Age, and taking it back takes that away."""
    store = make_store(place, browser_session=True)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = Session.of(scope)
        session["seen"] = True
        if scope["path"] != "/":
            session.set_longterm(scope["path"] == "/remember")
        await answer(send, "")

    site = host(SessionMiddleware(app, store))

    async def visit(context: BrowserContext) -> list[float]:
        page = await context.new_page()
        ends = []
        for path in ("/", "/remember", "/", "/forget"):
            await page.goto(site.at() + path)
            ends += [cookie["expires"] for cookie in await context.cookies()]
        return ends

    kept = pytest.approx(time.time() + 400 * DAY, abs=120)
    with store:
        assert browse(visit) == [-1, kept, kept, -1]
