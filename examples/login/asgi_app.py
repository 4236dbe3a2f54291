"""Starlette: a small site with logins, on every worker process.

    SHMSESSION_SECURE=0 gunicorn -c gunicorn.conf.py -k asgi examples.login.asgi_app:app
    SHMSESSION_SECURE=0 uvicorn --workers 4 examples.login.asgi_app:app

``wsgi_app.py`` is the same site for Flask: the same names in the same order, but for the live page.
"""

import asyncio
from contextlib import suppress
from datetime import timedelta
from functools import partial
from urllib.parse import parse_qsl, urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from examples._start import store_or_exit
from examples.login import _pages, _people
from shmsession import SessionMode
from shmsession.asgi import SessionMiddleware
from shmsession.auth import Auth, AuthSession, Rights
from shmsession.errors import BackendError

Me = AuthSession[_people.Person]

FRESH = timedelta(minutes=10)
LOGGED_OUT, CONNECT_AGAIN = 4001, 4000  # why a websocket closes; from 4000 the codes are an application's own

store = store_or_exit(
    mode=SessionMode.PERSISTENT, browser_session=True, max_sessions_per_user=10, too_many_sessions="end_oldest"
)
auth = Auth(store, _people.load)
render = partial(_pages.page, framework="Starlette", has_live_page=True)


# --- what was sent, and answers ---


async def fields(request: Request) -> dict[str, str]:
    """Those of a plain form."""
    return dict(parse_qsl((await request.body()).decode(errors="replace"), keep_blank_values=True))


async def show(request: Request, template: str, status: int = 200, **values: object) -> Response:
    return HTMLResponse(render(template, await auth.load(request), **values), status, _pages.NOT_KEPT)


def go(to: str) -> Response:
    return RedirectResponse(to, 303)


async def failed(request: Request, error: Exception) -> Response:
    """Not logged in, not allowed, no such page."""
    assert isinstance(error, HTTPException)
    if error.status_code == 401:
        return go("/login?" + urlencode({"next": request.url.path}))
    return await show(request, "error.html", error.status_code, reason=_pages.reason(error.status_code))


async def unavailable(request: Request, error: Exception) -> Response:
    """The database is down, and only it knows the rest of a list."""
    return await show(request, "error.html", 503, reason=_pages.reason(503))


# --- logging in and out ---


async def index(request: Request) -> Response:
    return await show(request, "index.html")


async def sign_up_form(request: Request) -> Response:
    return await show(request, "sign_up.html")


@auth.requires(login=False, csrf=True)
async def sign_up(request: Request) -> Response:
    me, sent = await auth.load(request), await fields(request)
    name, password = sent.get("name", ""), sent.get("password", "")
    person = await asyncio.to_thread(_people.sign_up, name, password)
    if isinstance(person, str):
        return await show(request, "sign_up.html", 422, name=name, wrong=person)
    await me.login(person.id)
    return go("/")


async def login_form(request: Request) -> Response:
    return await show(request, "login.html", next=_pages.place(request.query_params.get("next", "")))


@auth.requires(login=False, csrf=True)
async def login(request: Request) -> Response:
    me, sent = await auth.load(request), await fields(request)
    name, password, to = (sent.get(field, "") for field in ("name", "password", "next"))
    person = await asyncio.to_thread(_people.check, name, password)
    if person is None:
        me.login_failed(_people.spelled(name))
    elif await enter(me, person, remember="remember" in sent):
        return go(_pages.place(to))
    return await show(request, "login.html", 401, name=name, next=_pages.place(to), wrong=_pages.WRONG)


async def enter(me: Me, person: _people.Person, *, remember: bool) -> bool:
    """Log somebody in whose password was right, unless it was changed while it was checked.

    A change after this look ends the login with all others; one before it would not have known of it.
    """
    entered = await me.login(person.id, remember=remember)
    if entered and await asyncio.to_thread(_people.load, person.id) != person:
        await me.logout()
        return False
    return entered


@auth.requires(csrf=True)
async def logout(request: Request) -> Response:
    await (await auth.load(request)).logout()
    return go("/")


# --- the password ---


@auth.requires()
async def password_form(request: Request) -> Response:
    me = await auth.load(request)
    return await show(request, "password.html") if me.fresh(FRESH) else ask_again(me)


@auth.requires(csrf=True)
async def password(request: Request) -> Response:
    """Changed only by who has just given the old one; all other sessions end, for one may be a thief's."""
    me, new = await auth.load(request), (await fields(request)).get("password", "")
    if not me.fresh(FRESH):
        return ask_again(me)
    wrong = _people.wrong_with(new)
    if wrong:
        return await show(request, "password.html", 422, wrong=wrong)
    await asyncio.to_thread(_people.set_password, me.user_id, new)
    auth.cache_clear_user(me.user_id)
    me.session.renew()
    await store.revoke_user(me.user_id, keep=me.session)
    me.session.flash("Your password is changed, and you are logged out everywhere else.")
    return go("/sessions")


def ask_again(me: Me) -> Response:
    me.session.flash("You logged in a while ago: enter your password once more.")
    return go("/login?next=/password")


# --- where one is logged in ---


@auth.requires()
async def sessions(request: Request) -> Response:
    me = await auth.load(request)
    return await show(request, "sessions.html", sessions=await store.sessions(me.user_id))


@auth.requires(csrf=True)
async def end_session(request: Request) -> Response:
    """End one of one's own: anybody can send any handle."""
    me, handle = await auth.load(request), (await fields(request)).get("handle", "")
    if handle in {session.handle for session in await store.sessions(me.user_id)}:
        await store.revoke(handle)
    return go("/sessions")


@auth.requires(csrf=True)
async def end_others(request: Request) -> Response:
    me = await auth.load(request)
    await store.revoke_user(me.user_id, keep=me.session)
    return go("/sessions")


# --- what the session holds, and a page for some ---


@auth.requires(csrf=True)
async def note(request: Request) -> Response:
    me = await auth.load(request)
    me.session["note"] = (await fields(request)).get("note", "")[:1000]
    return go("/")


@auth.requires(Rights.permission("people"))
async def people(request: Request) -> Response:
    return await show(request, "people.html", people=await asyncio.to_thread(_people.everybody))


async def ping(request: Request) -> Response:
    return PlainTextResponse("pong")


# --- the live page ---


@auth.requires()
async def live(request: Request) -> Response:
    return await show(request, "live.html")


@auth.requires(login=False, csrf=True)
async def changes(websocket: WebSocket) -> None:
    """Tells the note, whoever changes it, until the visitor leaves or is logged out."""
    me = await auth.load(websocket)
    session = me.session
    await websocket.accept()

    async def tell() -> None:
        with suppress(WebSocketDisconnect):  # the visitor left while being told
            if me.is_authenticated:
                await websocket.send_json({"note": session.get("note", "")})
                async for _ in session.changes():
                    await websocket.send_json({"note": session.get("note", "")})
            is_over = not me.is_authenticated or session.ended in ("destroyed", "expired")
            await websocket.close(LOGGED_OUT if is_over else CONNECT_AGAIN)

    async with asyncio.TaskGroup() as tasks:
        telling = tasks.create_task(tell())
        while (await websocket.receive())["type"] != "websocket.disconnect":
            pass  # until the visitor leaves, or tell() has closed
        telling.cancel()


class Headers:
    """Sends our headers with every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.lower().encode(), value.encode()) for name, value in _pages.HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *ours]
            await send(message)

        await self.app(scope, receive, send_with_headers)


app = Starlette(
    routes=[
        Route("/", index),
        Route("/sign-up", sign_up_form),
        Route("/sign-up", sign_up, methods=["POST"]),
        Route("/login", login_form),
        Route("/login", login, methods=["POST"]),
        Route("/logout", logout, methods=["POST"]),
        Route("/password", password_form),
        Route("/password", password, methods=["POST"]),
        Route("/sessions", sessions),
        Route("/sessions/end", end_session, methods=["POST"]),
        Route("/sessions/end-others", end_others, methods=["POST"]),
        Route("/note", note, methods=["POST"]),
        Route("/people", people),
        Route("/ping", ping),
        Route("/live", live),
        WebSocketRoute("/live/changes", changes),
        Mount("/static", StaticFiles(directory=_pages.STATIC)),
    ],
    middleware=[Middleware(Headers), Middleware(SessionMiddleware, store=store)],
    exception_handlers={HTTPException: failed, BackendError: unavailable},
)
