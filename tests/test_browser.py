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
