"""Starlette: one session, shared by every worker process.

    SHMSESSION_SECURE=0 gunicorn -c gunicorn.conf.py -k asgi examples.asgi_app:app
    SHMSESSION_SECURE=0 uvicorn --workers 4 examples.asgi_app:app

``wsgi_app.py`` is the same application for Flask: the same names in the same order.
"""

import asyncio
import json
import math
import os
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.convertors import StringConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from examples._page import page
from examples._paths import encoded_path_asgi
from examples._start import store_or_exit
from shmsession import Session, SessionMode
from shmsession.asgi import SessionMiddleware
from shmsession.errors import NotCreated, SessionGone, SessionTooLarge

T = TypeVar("T")


class Text(StringConvertor):
    def convert(self, value: str) -> str:
        return unquote(value)


register_url_convertor("text", Text())
store = store_or_exit()


# --- answers: JSON that says which worker it was ---


def answer(request: Request, *, say: str = "", **body: Any) -> Response:
    """``body`` and the worker's pid; a form on the page is sent back to the page, which then shows what to ``say``."""
    body["pid"] = os.getpid()
    if request.method == "POST" and "text/html" in request.headers.get("Accept", ""):
        if say:
            Session.of(request).flash(say)
        return reply(body, 303, {"Location": "/"})
    return reply(body)


def reply(body: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    own = {"Content-Type": "application/json", "X-Worker-Pid": str(os.getpid())}
    return Response(json.dumps(body, default=str), status, {**(headers or {}), **own})


def failed(request: Request, error: Exception) -> Response:
    """No such route, wrong method, bad value."""
    assert isinstance(error, HTTPException)
    return reply({"error": error.detail}, error.status_code, error.headers)


def gone(request: Request, error: Exception) -> Response:
    """Another request destroyed the session while this one was changing it."""
    return reply({"error": "the session has ended; load the page again"}, 409)


def not_created(request: Request, error: Exception) -> Response:
    """In manual mode nothing is stored before POST /create."""
    return reply({"error": str(error)}, 409)


def too_large(request: Request, error: Exception) -> Response:
    """One session may hold so much and no more."""
    return reply({"error": str(error)}, 413)


def seconds(request: Request) -> float:
    try:
        value = float(request.query_params.get("seconds", "1"))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 30:
        raise HTTPException(400, "seconds must be a number from 0 to 30")
    return value


def of_kind(kind: type[T], value: object, key: str) -> T:
    """``value``, or 409: /set can put text where another route keeps something else."""
    if not isinstance(value, kind):
        raise HTTPException(409, f"session[{key!r}] is a {type(value).__name__}, not a {kind.__name__}")
    return value


# --- the page ---


async def index(request: Request) -> Response:
    session, pid = Session.of(request), os.getpid()
    ask = session.consent is None and store.mode is not SessionMode.PERSISTENT
    html = page(session.to_dict(), pid=pid, app="Starlette", ask=ask, messages=session.flashes())
    return HTMLResponse(html, headers={"X-Worker-Pid": str(pid)})


# --- counting: atomic over all workers, and the plain way ---


async def hit(request: Request) -> Response:
    try:
        return answer(request, hits=Session.of(request).increment("hits"))
    except TypeError as error:
        raise HTTPException(409, str(error)) from error


async def visit(request: Request) -> Response:
    session = Session.of(request)
    session["visits"] = of_kind(int, session.get("visits", 0), "visits") + 1
    return answer(request, visits=session["visits"])


# --- keys and values ---


async def set_value(request: Request) -> Response:
    key, value = request.path_params["key"], request.path_params["value"]
    Session.of(request)[key] = value
    return answer(request, key=key, value=value)


async def slow(request: Request) -> Response:
    """Read, wait, write: a logout in between wins, and nothing comes back."""
    key, value = request.path_params.get("key", "late"), request.path_params.get("value", "1")
    pause, session = seconds(request), Session.of(request)
    session.get(key)
    await asyncio.sleep(pause)
    session[key] = value
    return answer(request, key=key, value=value)


async def cart(request: Request) -> Response:
    session, item = Session.of(request), request.path_params["item"]
    of_kind(list, session.setdefault("cart", []), "cart").append(item)
    return answer(request, cart=session["cart"])


async def append(request: Request) -> Response:
    session, item = Session.of(request), request.path_params["item"]
    return answer(request, cart=session.apply("cart", lambda cart: [*of_kind(list, cart, "cart"), item], default=[]))


async def show(request: Request) -> Response:
    return reply(Session.of(request).to_dict())


# --- who is logged in ---


async def login(request: Request) -> Response:
    session, user = Session.of(request), request.path_params["user"]
    session.renew(user_id=user)
    session["user"] = user
    return answer(request, say=f"Welcome, {user}.", user=user)


async def whoami(request: Request) -> Response:
    return answer(request, user=Session.of(request).get("user"))


async def logout(request: Request) -> Response:
    Session.of(request).destroy()
    return answer(request, user=None)


# --- the session itself ---


async def create(request: Request) -> Response:
    Session.of(request).create()
    return answer(request, ok=True)


async def renew(request: Request) -> Response:
    Session.of(request).renew()
    return answer(request, ok=True)


async def clear(request: Request) -> Response:
    Session.of(request).clear()
    return answer(request, ok=True)


async def accept(request: Request) -> Response:
    Session.of(request).set_store(True)
    return answer(request, ok=True)


async def decline(request: Request) -> Response:
    Session.of(request).set_store(False)
    return answer(request, ok=True)


async def remember(request: Request) -> Response:
    Session.of(request).set_longterm(True)
    return answer(request, ok=True)


async def ping(request: Request) -> Response:
    return answer(request)


# --- websocket ---


async def ws(websocket: WebSocket) -> None:
    session = Session.of(websocket)
    session.create()  # before accept(): a new session's cookie can only go with the handshake
    await websocket.accept()
    try:
        while (message := await websocket.receive())["type"] == "websocket.receive":
            text = message.get("text")
            if text is None:
                await websocket.close(1003, "text frames only")
                break
            n = session.increment("messages")
            await websocket.send_text(json.dumps({"echo": text, "messages": n, "pid": os.getpid()}))
    except SessionGone:
        await websocket.close(1008, "the session has ended")
    except TypeError as error:
        await websocket.close(1008, str(error))
    except WebSocketDisconnect:
        pass  # the client went away while it was being answered


app = Starlette(
    routes=[
        Route("/", index),
        Route("/hit", hit),
        Route("/visit", visit),
        Route("/set/{key:text}/{value:text}", set_value, methods=["POST"]),
        Route("/slow/{key:text}/{value:text}", slow, methods=["POST"]),
        Route("/slow-logout-race", slow, methods=["POST"]),
        Route("/cart/{item:text}", cart, methods=["POST"]),
        Route("/append/{item:text}", append, methods=["POST"]),
        Route("/session", show),
        Route("/login/{user:text}", login, methods=["POST"]),
        Route("/whoami", whoami),
        Route("/logout", logout, methods=["POST"]),
        Route("/create", create, methods=["POST"]),
        Route("/renew", renew, methods=["POST"]),
        Route("/clear", clear, methods=["POST"]),
        Route("/accept", accept, methods=["POST"]),
        Route("/decline", decline, methods=["POST"]),
        Route("/remember", remember, methods=["POST"]),
        Route("/ping", ping),
        WebSocketRoute("/ws", ws),
    ],
    middleware=[Middleware(SessionMiddleware, store=store), Middleware(encoded_path_asgi)],
    exception_handlers={
        HTTPException: failed,
        SessionGone: gone,
        NotCreated: not_created,
        SessionTooLarge: too_large,
    },
)
app.router.redirect_slashes = False
