"""Flask: one session, shared by every worker process.

    SHMSESSION_SECURE=0 gunicorn -c gunicorn.conf.py -k sync examples.wsgi_app:app
    SHMSESSION_SECURE=0 gunicorn -c gunicorn.conf.py -k gthread --threads 8 examples.wsgi_app:app

``asgi_app.py`` is the same application for Starlette: the same names in the same order.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

from flask import Flask, Response, abort, request
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter

from examples._page import page
from examples._paths import encoded_path_wsgi
from examples._start import store_or_exit
from shmsession import Session, SessionMode
from shmsession.errors import NotCreated, SessionGone, SessionTooLarge
from shmsession.wsgi import SessionMiddleware

T = TypeVar("T")


class Text(BaseConverter):
    def to_python(self, value: str) -> str:
        return unquote(value)


store = store_or_exit()
app = Flask(__name__, static_folder=None)
app.url_map.converters["text"] = Text
app.url_map.merge_slashes = False
app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
app.config["PROPAGATE_EXCEPTIONS"] = True  # so that a full store reaches the middleware, which answers 503
app.wsgi_app = SessionMiddleware(encoded_path_wsgi(app.wsgi_app), store=store)  # type: ignore[method-assign]


# --- answers: JSON that says which worker it was ---


def answer(*, say: str = "", **body: Any) -> Response:
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


@app.errorhandler(HTTPException)
def failed(error: HTTPException) -> Response:
    """No such route, wrong method, bad value."""
    return reply({"error": error.description}, error.code or 500, dict(error.get_headers()))


@app.errorhandler(SessionGone)
def gone(error: SessionGone) -> Response:
    """Another request destroyed the session while this one was changing it."""
    return reply({"error": "the session has ended; load the page again"}, 409)


@app.errorhandler(NotCreated)
def not_created(error: NotCreated) -> Response:
    """In manual mode nothing is stored before POST /create."""
    return reply({"error": str(error)}, 409)


@app.errorhandler(SessionTooLarge)
def too_large(error: SessionTooLarge) -> Response:
    """One session may hold so much and no more."""
    return reply({"error": str(error)}, 413)


def seconds() -> float:
    try:
        value = float(request.args.get("seconds", "1"))
    except ValueError:
        value = math.nan
    if not 0 <= value <= 30:
        abort(400, "seconds must be a number from 0 to 30")
    return value


def of_kind(kind: type[T], value: object, key: str) -> T:
    """``value``, or 409: /set can put text where another route keeps something else."""
    if not isinstance(value, kind):
        abort(409, f"session[{key!r}] is a {type(value).__name__}, not a {kind.__name__}")
    return value


# --- the page ---


@app.get("/")
def index() -> Response:
    session, pid = Session.of(request), os.getpid()
    ask = session.consent is None and store.mode is not SessionMode.PERSISTENT
    html = page(session.to_dict(), pid=pid, app="Flask", ask=ask, messages=session.flashes())
    return Response(html, headers={"X-Worker-Pid": str(pid)})


# --- counting: atomic over all workers, and the plain way ---


@app.get("/hit")
def hit() -> Response:
    try:
        return answer(hits=Session.of(request).increment("hits"))
    except TypeError as error:
        abort(409, str(error))


@app.get("/visit")
def visit() -> Response:
    session = Session.of(request)
    session["visits"] = of_kind(int, session.get("visits", 0), "visits") + 1
    return answer(visits=session["visits"])


# --- keys and values ---


@app.post("/set/<text:key>/<text:value>")
def set_value(key: str, value: str) -> Response:
    Session.of(request)[key] = value
    return answer(key=key, value=value)


@app.post("/slow/<text:key>/<text:value>")
@app.post("/slow-logout-race")
def slow(key: str = "late", value: str = "1") -> Response:
    """Read, wait, write: a logout in between wins, and nothing comes back."""
    pause, session = seconds(), Session.of(request)
    session.get(key)
    time.sleep(pause)
    session[key] = value
    return answer(key=key, value=value)


@app.post("/cart/<text:item>")
def cart(item: str) -> Response:
    session = Session.of(request)
    of_kind(list, session.setdefault("cart", []), "cart").append(item)
    return answer(cart=session["cart"])


@app.post("/append/<text:item>")
def append(item: str) -> Response:
    session = Session.of(request)
    return answer(cart=session.apply("cart", lambda cart: [*of_kind(list, cart, "cart"), item], default=[]))


@app.get("/session")
def show() -> Response:
    return reply(Session.of(request).to_dict())


# --- who is logged in ---


@app.post("/login/<text:user>")
def login(user: str) -> Response:
    session = Session.of(request)
    session.renew(user_id=user)
    session["user"] = user
    return answer(say=f"Welcome, {user}.", user=user)


@app.get("/whoami")
def whoami() -> Response:
    return answer(user=Session.of(request).get("user"))


@app.post("/logout")
def logout() -> Response:
    Session.of(request).destroy()
    return answer(user=None)


# --- the session itself ---


@app.post("/create")
def create() -> Response:
    Session.of(request).create()
    return answer(ok=True)


@app.post("/renew")
def renew() -> Response:
    Session.of(request).renew()
    return answer(ok=True)


@app.post("/clear")
def clear() -> Response:
    Session.of(request).clear()
    return answer(ok=True)


@app.post("/accept")
def accept() -> Response:
    Session.of(request).set_store(True)
    return answer(ok=True)


@app.post("/decline")
def decline() -> Response:
    Session.of(request).set_store(False)
    return answer(ok=True)


@app.post("/remember")
def remember() -> Response:
    Session.of(request).set_longterm(True)
    return answer(ok=True)


@app.get("/ping")
def ping() -> Response:
    return answer()
