"""What a real browser, headless Chromium, makes of the cookies and headers."""

import importlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import product, zip_longest
from pathlib import Path
from typing import Any, Final, Self

import pytest
from playwright.async_api import BrowserContext, Page
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from shmsession import Key, Session, SessionConfig, SessionStore
from shmsession.asgi import Receive, Scope, Send, SessionMiddleware
from shmsession.cookie_rules import Attributes
from shmsession.cookies import Writer
from shmsession.errors import ConfigError
from shmsession.testing import make_store
from tests.chromium import Browse, Host, Site
from tests.servers import ASGI, GTHREAD, Kind, Serve

pytest_plugins = ["tests.browser", "tests.hosts"]

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
    name = settings["cookie_name"] or ("__Host-session" if settings["secure"] else "session")
    attributes = Attributes(**{field: settings[field] for field in Attributes._fields})
    return Writer(name, attributes, http_only=settings["http_only"]).issue(value, None).encode()


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for store in self.stores:
            store.close()


VISIT: Final = """async paths => {
    const all = method => Promise.all(paths.map(async path => (await fetch(path, {method})).text()));
    return [await all('GET'), await all('GET')];
}"""
LEAVE: Final = "async paths => Promise.all(paths.map(path => fetch(path, {method: 'POST'})))"


def groups(choices: Iterable[Settings]) -> list[dict[int, Settings]]:
    """All of them by number, in groups of different names: one jar can hold the cookies of a group."""
    by_name: dict[str | None, list[tuple[int, Settings]]] = {}
    for number, settings in enumerate(choices):
        by_name.setdefault(settings["cookie_name"], []).append((number, settings))
    return [dict(filter(None, group)) for group in zip_longest(*by_name.values())]


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
        for group in groups(accepted):
            paths = [f"{settings['path'].rstrip('/')}/{number}" for number, settings in group.items()]
            counts = await page.evaluate(VISIT, paths)
            assert counts == [["1"] * len(group), ["2"] * len(group)], group
            jar = {cookie["name"]: cookie for cookie in await context.cookies()}
            assert jar == dict(expected(settings, jar, site.at()) for settings in group.values())
            await page.evaluate(LEAVE, paths)
            assert await context.cookies() == [], group

    with counters:
        browse(visit)


def expected(settings: Settings, jar: Mapping[str, Any], origin: str) -> tuple[str, Any]:
    """The jar's entry for these settings."""
    name = SessionConfig(**settings).effective_cookie_name
    wanted = {
        "name": name, "value": jar[name]["value"], "domain": "localhost", "path": settings["path"],
        "secure": settings["secure"], "httpOnly": settings["http_only"], "sameSite": settings["same_site"],
        "expires": -1 if settings["browser_session"] else pytest.approx(time.time() + 400 * DAY, abs=120),
    }  # fmt: skip
    if settings["partitioned"]:
        wanted |= {"partitionKey": origin.rpartition(":")[0], "_crHasCrossSiteAncestor": False}
    return name, wanted


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

    with counters:
        assert browse(visit) == (["1", "1", "2"] if domain is None else ["1", "2", "3"])


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


# ── SameSite=Strict and a login at another site ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("same_site", "counts"), [("None", "123"), ("Lax", "123"), ("Strict", "112")])
def test_a_strict_cookie_alone_does_not_come_with_a_redirect_from_another_site(
    browse: Browse, host: Host, place: Path, same_site: str, counts: str
) -> None:
    """And what is stored there then begins a session that takes the other one's place."""
    counters = Counters(place, [{"secure": True, "same_site": same_site}])
    site = host(counters)

    async def provider(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "GET":
            await answer(send, '<form method="post"><button>Back</button></form>')
        else:
            location = (b"location", f"{site.at()}/0".encode())
            await send({"type": "http.response.start", "status": 302, "headers": [location]})
            await send({"type": "http.response.body", "body": b""})

    another = host(provider)

    async def visit(context: BrowserContext) -> str:
        page = await context.new_page()
        await page.goto(f"{site.at()}/0")
        seen = await page.inner_text("body")
        await page.goto(another.at("127.0.0.1"))
        await page.get_by_role("button").click()
        await page.wait_for_url(f"{site.at()}/0")
        seen += await page.inner_text("body")
        await page.goto(f"{site.at()}/0")
        return seen + await page.inner_text("body")

    with counters:
        assert browse(visit) == counts


Seen = list[tuple[str, bool]]
"""Paths that were asked for, and whether the session's cookie came along."""


@pytest.fixture
def oauth(monkeypatch: pytest.MonkeyPatch, place: Path, host: Host) -> Iterator[tuple[Site, Seen]]:
    """The example, and what it was asked."""
    settings = {"DIR": place / "sessions", "KEY": Key.generate(), "SECURE": "0", "MAP_SIZE": "4MiB", "NAME": "oauth"}
    for name, value in settings.items():
        monkeypatch.setenv(f"SHMSESSION_{name}", str(value))
    sys.modules.pop("examples.oauth_strict", None)
    example = importlib.import_module("examples.oauth_strict")
    seen: Seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        cookie = dict(scope["headers"]).get(b"cookie", b"")
        seen.append((scope["path"], b"session=" in cookie))
        await example.app(scope, receive, send)

    with example.store:
        yield host(app), seen


async def go_to_provider(page: Page, site: Site) -> None:
    await page.goto(site.at())
    await page.get_by_role("button", name="Log in").click()
    await page.wait_for_url("http://127.0.0.1:*/provider/authorize?*")


async def log_in(page: Page, site: Site) -> None:
    await go_to_provider(page, site)
    await page.get_by_role("button", name="Go on as Ada").click()
    await page.wait_for_url(site.at() + "/")


def test_a_strict_cookie_is_back_after_a_landing_page_and_the_login_goes_through(
    browse: Browse, oauth: tuple[Site, Seen]
) -> None:
    """It does not come with the provider's redirect itself."""
    site, seen = oauth

    async def visit(context: BrowserContext) -> None:
        page = await context.new_page()
        await log_in(page, site)
        assert await page.inner_text("p") == "Welcome, ada."
        (cookie,) = await context.cookies()
        assert (cookie["sameSite"], cookie["httpOnly"]) == ("Strict", True)

    browse(visit)
    assert seen[-3:] == [("/callback", False), ("/finish", True), ("/", True)]


@pytest.mark.parametrize("state", ["", "&state=", "&state=guessed"])
def test_a_login_that_somebody_else_began_is_refused(browse: Browse, oauth: tuple[Site, Seen], state: str) -> None:
    """The landing page makes a visit from anywhere one of the site's own: what is left against it is the state."""
    site, seen = oauth

    async def visit(context: BrowserContext) -> None:
        page = await context.new_page()
        await go_to_provider(page, site)
        link = f"{site.at()}/callback?code=mallory{state}"
        await page.set_content(f'<a href="{link}">Win a prize</a>')
        await page.get_by_role("link").click()
        await page.wait_for_url("**/finish?*")
        assert "Begin again" in await page.inner_text("body")
        await page.goto(site.at())
        assert await page.get_by_role("button", name="Log in").count() == 1

    browse(visit)
    assert seen[-3:] == [("/callback", False), ("/finish", True), ("/", True)]


def test_the_answer_of_a_provider_is_taken_once(browse: Browse, oauth: tuple[Site, Seen]) -> None:
    site, _ = oauth

    async def visit(context: BrowserContext) -> int | None:
        page = await context.new_page()
        async with page.expect_request("**/finish?*") as request:
            await log_in(page, site)
        again = await page.goto((await request.value).url)
        return None if again is None else again.status

    assert browse(visit) == 400


# ── the example's page ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [ASGI, GTHREAD], ids=str)
def test_nothing_is_kept_before_accept_nor_after_decline(browse: Browse, serve: Serve, kind: Kind) -> None:
    """The banner asks until there is an answer; the cart then survives a reload, and the flash message does not."""
    server = serve(kind, workers=2, tcp=True, env={"SHMSESSION_MODE": "opt_in"})
    store, url = server.store(), f"http://{server.address[0]}:{server.address[1]}/"

    async def visit(context: BrowserContext) -> None:
        page = await context.new_page()
        banner = page.get_by_role("region", name="Your consent")

        async def press(name: str) -> None:
            async with page.expect_navigation():
                await page.get_by_role("button", name=name, exact=True).last.click()

        async def is_kept() -> tuple[dict[str, str], int]:
            return {cookie["name"]: cookie["value"] for cookie in await context.cookies()}, store.count()

        await page.goto(url)
        await press("+ tea")
        await press("Log in as Ada")
        assert await banner.is_visible()
        assert await page.get_by_text("nothing yet").is_visible()
        assert await is_kept() == ({}, 0)

        await press("Accept")
        assert await is_kept() == ({"session-storable": "true"}, 0)
        await press("+ tea")
        await press("Log in as Ada")
        assert await page.get_by_role("status").inner_text() == "Welcome, ada."
        await page.reload()
        assert await page.get_by_role("status").inner_text() == ""
        assert await page.get_by_role("listitem").all_inner_texts() == ["tea"]
        assert await banner.count() == 0
        assert store.count() == 1

        await press("Decline")
        await press("+ tea")
        assert await page.get_by_text("nothing yet").is_visible()
        assert await banner.count() == 0
        assert await is_kept() == ({"session-storable": "false"}, 0)

    browse(visit)


def test_who_declines_in_the_banner_is_not_asked_again(browse: Browse, serve: Serve) -> None:
    server = serve(ASGI, workers=1, tcp=True, env={"SHMSESSION_MODE": "manual"})
    url = f"http://{server.address[0]}:{server.address[1]}/"

    async def visit(context: BrowserContext) -> list[tuple[str, str, bool]]:
        page = await context.new_page()
        await page.goto(url)
        banner = page.get_by_role("region", name="Your consent")
        async with page.expect_navigation():
            await banner.get_by_role("button", name="Decline").click()
        assert await banner.count() == 0
        return [(cookie["name"], cookie["value"], cookie["httpOnly"]) for cookie in await context.cookies()]

    assert browse(visit) == [("session-storable", "false", False)]


# ── the header, from scripts ──────────────────────────────────────────────────────────────────────────────────

CLIENT: Final = """async url => {
    let token = '';
    const ask = async path => {
        const answer = await fetch(url + path, {headers: {'X-Session': token}});
        token = answer.headers.get('X-Session') ?? token;
        return answer.text();
    };
    return [await ask('/'), await ask('/'), await ask('/logout'), await ask('/'), await ask('/'), document.cookie];
}"""


def api(store: SessionStore, **cors: Any) -> Starlette:
    """A counter for scripts of other origins."""

    async def count(request: Request) -> Response:
        return PlainTextResponse(str(Session.of(request).increment("visits")))

    async def logout(request: Request) -> Response:
        Session.of(request).destroy()
        return PlainTextResponse("gone")

    return Starlette(
        routes=[Route("/", count), Route("/logout", logout)],
        middleware=[Middleware(CORSMiddleware, **cors), Middleware(SessionMiddleware, store=store)],
    )


@pytest.mark.parametrize("transport", ["header", "both"])
@pytest.mark.parametrize("exposed", [True, False])
def test_a_script_of_another_origin_keeps_a_session_by_its_header_if_it_may_read_it(
    browse: Browse, host: Host, place: Path, transport: str, exposed: bool
) -> None:
    """No cookie is set, also where others get one. Without expose_headers the script never learns its session."""

    async def blank(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(send, "")

    store = make_store(place, transport=transport)
    page_of_another = host(blank).at("127.0.0.1")
    headers = {"expose_headers": ["X-Session"]} if exposed else {}
    site = host(api(store, allow_origins=[page_of_another], allow_headers=["X-Session"], **headers))

    async def visit(context: BrowserContext) -> Any:
        page = await context.new_page()
        await page.goto(page_of_another)
        result = await page.evaluate(CLIENT, site.at())
        assert await context.cookies() == []
        return result

    with store:
        counts = ["1", "2", "gone", "1", "2"] if exposed else ["1", "1", "gone", "1", "1"]
        assert browse(visit) == [*counts, ""]
