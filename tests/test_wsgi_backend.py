"""A database that fails, hangs or is slow behind the middleware, in every shape that an application may have.

What is promised to all is a table over WSGI and ASGI; what only WSGI has comes after it.
"""

import asyncio
import json
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple
from wsgiref.headers import Headers

import flask
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from werkzeug.debug import DebuggedApplication

from shmsession import Key, Session, SessionConfig, SessionStore
from shmsession.asgi import Receive, Scope, Send
from shmsession.backends.base import SENTINEL, Row, State
from shmsession.errors import BackendError, BackendUnavailable, StoreError
from shmsession.memory.room import QUIET_MS
from shmsession.signalling import BACKOFF_MS
from shmsession.testing import ManualClock, login_cookie
from shmsession.wsgi import App, Environ, SessionMiddleware, StartResponse
from tests.backends import AFTER, BEFORE, MemoryBackend
from tests.kept import Kept, wait_for_empty_outbox
from tests.servers import GTHREAD, SYNC, Kind, Serve, wait_for
from tests.servers import Answer as Response
from tests.test_middleware_asgi import exchange as asgi_exchange
from tests.test_middleware_wsgi import PLAIN, exchange

pytest_plugins = ["tests.hosts"]

THREADS: Final = 16
Act = Callable[[Session], bytes]
"""What an application does with its session, whatever its shape; the body it answers with."""


# ── the shapes of applications ────────────────────────────────────────────────────────────────────────────────


def whole(act: Act) -> App:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        body = act(Session.of(environ))
        start_response("200 OK", PLAIN)
        return [body]

    return app


def generator(act: Act) -> App:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        body = act(Session.of(environ))
        start_response("200 OK", PLAIN)
        yield body

    return app


def looking_late(act: Act) -> App:
    """start_response has been called, and the error comes out of the body."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        return (act(session) for session in [Session.of(environ)])

    return app


def writing(act: Act) -> App:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", PLAIN)
        write(act(Session.of(environ)))
        return []

    return app


def own_page(act: Act) -> App:
    """The framework makes an error page of every exception, also of those that write() raises (PEP 3333)."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        write = start_response("200 OK", PLAIN)
        try:
            write(act(Session.of(environ)))
        except Exception:  # noqa: BLE001  # that is what such frameworks do
            start_response("500 Broken", PLAIN, sys.exc_info())
            return [b"error page"]
        return []

    return app


def in_flask(act: Act, **config: Any) -> flask.Flask:
    app = flask.Flask("shop")
    app.config.update(config)
    app.add_url_rule("/", "shop", lambda: flask.Response(act(Session.of(flask.request))))
    return app


def flask_with_handler(act: Act) -> App:
    app = in_flask(act)
    app.register_error_handler(Exception, lambda error: ("sorry", 500))
    return app.wsgi_app


def flask_looking_again(act: Act) -> App:
    """Its error page, and what it does after every response, look at the session too."""
    app = in_flask(act)
    app.register_error_handler(500, lambda error: (str(Session.of(flask.request).get("name")), 500))

    @app.after_request
    def note(response: flask.Response) -> flask.Response:
        response.headers["X-Known"] = str(len(Session.of(flask.request)))
        return response

    return app.wsgi_app


def flask_streaming(act: Act) -> App:
    app = flask.Flask("shop")

    @app.get("/")
    def shop() -> flask.Response:
        return flask.Response(flask.stream_with_context(act(session) for session in [Session.of(flask.request)]))

    return app.wsgi_app


WSGI: Final[dict[str, Callable[[Act], App]]] = {
    "whole": whole,
    "generator": generator,
    "looking late": looking_late,
    "write()": writing,
    "own error page": own_page,
    "flask": lambda act: in_flask(act).wsgi_app,
    "flask, propagating": lambda act: in_flask(act, PROPAGATE_EXCEPTIONS=True).wsgi_app,
    "flask, debug": lambda act: in_flask(act, DEBUG=True).wsgi_app,
    "flask, debugger": lambda act: DebuggedApplication(in_flask(act, PROPAGATE_EXCEPTIONS=True)),
    "flask, error handler": flask_with_handler,
    "flask, looking again": flask_looking_again,
    "flask, streaming": flask_streaming,
}


def whole_asgi(act: Act) -> Any:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        body = act(Session.of(scope))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    return app


def in_starlette(act: Act) -> Any:
    async def shop(request: Request) -> PlainTextResponse:
        return PlainTextResponse(act(Session.of(request)))

    return Starlette(routes=[Route("/", shop)])


ASGI: Final[dict[str, Callable[[Act], Any]]] = {"ASGI": whole_asgi, "Starlette": in_starlette}
SHAPES: Final = [*WSGI, *ASGI]


# ── what applications do ──────────────────────────────────────────────────────────────────────────────────────


def look(session: Session) -> bytes:
    return json.dumps(dict(session)).encode()


def store_something(session: Session) -> bytes:
    found = look(session)
    session["name"] = "eve"
    return found


def log_in(session: Session) -> bytes:
    found = look(session)
    session.renew(user_id="eve")
    return found


def destroy(session: Session) -> bytes:
    session.destroy()
    return b"bye"


def clear(session: Session) -> bytes:
    session.clear()
    return b"bye"


def ping(session: Session) -> bytes:
    return b"pong"


# ── a site ────────────────────────────────────────────────────────────────────────────────────────────────────


class Reply(NamedTuple):
    """A response, of either protocol."""

    status: int
    headers: Headers
    body: bytes

    @property
    def found(self) -> Any:
        """The data that the application found."""
        return json.loads(self.body)


class SlowBackend(MemoryBackend):
    """Its answers about sessions wait until they may come. What the flusher asks of the sentinel fails nobody."""

    def __init__(self) -> None:
        super().__init__(labelled=False)
        self.asked_for: list[bytes] = []
        self.opens_in = 0.0
        self.may_answer = threading.Event()
        self.may_answer.set()

    async def open(self) -> None:
        await super().open()
        await asyncio.sleep(self.opens_in)

    async def load(self, handle: bytes) -> Row | None:
        if handle == SENTINEL:
            return self.rows.get(handle)
        self.asked_for.append(handle)
        while not self.may_answer.is_set():  # noqa: ASYNC110  # another thread sets it
            await asyncio.sleep(0.001)
        return await super().load(handle)


class Site:
    """A session store, its backend and a visitor; the application's shape is chosen request by request."""

    def __init__(self, place: Path, shape: str = "whole", **settings: Any) -> None:
        self.shape = shape
        self.backend = SlowBackend()
        self.clock = ManualClock()
        options: dict[str, Any] = {
            "directory": place, "name": "site", "secure": False, "keys": (Key(bytes(range(32))),), "map_size": 4 << 20,
            "flush_interval": timedelta(days=1), "through_timeout": timedelta(milliseconds=1),
            "load_timeout": timedelta(minutes=1),
        }  # fmt: skip
        self.store = SessionStore(self.backend, config=SessionConfig(**{**options, **settings}), clock=self.clock)
        self.cookie = ""

    def visit(self, act: Act = look, *, cookie: str | None = None, shape: str | None = None) -> Reply:
        """One request; the visitor keeps the cookie that it sets, unless the cookie was another's."""
        sent, shape = self.cookie if cookie is None else cookie, shape or self.shape
        if shape in ASGI:
            served = asgi_exchange(self.store, ASGI[shape](act), *([sent.encode()] if sent else []))
            headers = Headers([(key.decode(), value.decode()) for key, value in served.start["headers"]])
            reply = Reply(served.status, headers, served.body)
        else:
            result = exchange(self.store, WSGI[shape](act), sent, validate=shape not in ("write()", "own error page"))
            assert result.error is None
            assert result.starts == 1
            reply = Reply(int(result.status[:3]), result.headers, result.body)
        new = reply.headers["set-cookie"]
        if new is not None and cookie is None:
            self.cookie = "" if "Max-Age=0" in new else new.partition(";")[0]
        return reply

    def known(self, **data: Any) -> str:
        """The cookie of a session that only the backend has. What this process has open is as in a new one."""
        ((name, value),) = login_cookie(self.store, data).items()
        self.lose_memory()
        return f"{name}={value}"

    def lose_memory(self) -> None:
        """All of it that the backend has; and no question has been asked by this process."""
        self.flush()
        self.clock.advance(2 * QUIET_MS / 1000)
        self.store.memory.outbox.retire(self.clock.now(), 1, b"")
        assert self.store.count() == 0
        self.store.close()
        self.backend.calls.clear()
        self.backend.asked_for.clear()

    def flush(self) -> None:
        assert self.store.sync.flush(30)

    def recover(self) -> None:
        self.backend.heal()
        self.backend.may_answer.set()
        self.clock.advance(BACKOFF_MS[1] / 1000)

    def live(self) -> int:
        """How many sessions the backend has."""
        return sum(row.state is State.LIVE for row in self.backend.sessions().values())

    def waiting(self) -> int:
        return self.store.stats().outbox


MakeSite = Callable[..., Site]


@pytest.fixture
def site(place: Path) -> Iterator[MakeSite]:
    made: list[Site] = []

    def make(shape: str = "whole", **settings: Any) -> Site:
        made.append(Site(place, shape, **settings))
        return made[-1]

    yield make
    for one in made:
        one.backend.may_answer.set()
        one.store.close()


def refused(reply: Reply) -> None:
    """A 503 that asks to come again and leaves the browser's cookie alone."""
    assert reply.status == 503
    assert int(reply.headers["retry-after"] or 0) > 0
    assert "set-cookie" not in reply.headers


# ── what is promised in every shape ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", SHAPES)
def test_a_session_that_memory_lacks_comes_from_the_backend(site: MakeSite, shape: str) -> None:
    """With one question, and the cookie stays."""
    shop = site(shape)
    shop.cookie = shop.known(name="ada")
    for _ in range(3):
        reply = shop.visit()
        assert (reply.status, reply.found) == (200, {"name": "ada"})
        assert "set-cookie" not in reply.headers
    assert len(shop.backend.asked_for) == 1


FAILURES: Final[dict[str, Callable[[str], Exception]]] = {
    "unavailable": lambda call: BackendUnavailable("the database is down"),
    "error": lambda call: BackendError("the database is broken"),
    "somebody's own": lambda call: ConnectionResetError("cut off"),
    "a bug": lambda call: KeyError("oops"),
    "timeout": lambda call: TimeoutError(),
}


@pytest.mark.parametrize("act", [look, store_something, log_in, destroy, clear])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_load_that_fails_is_a_503_and_never_no_session(site: MakeSite, shape: str, act: Act) -> None:
    """G7: nothing is stored, sent or set, whatever the application would have done; afterwards all is as it was."""
    shop = site(shape)
    shop.cookie = cookie = shop.known(name="ada")
    before = shop.backend.sessions()
    shop.backend.fail("load")
    refused(shop.visit(act))
    refused(shop.visit(act))
    assert len(shop.backend.asked_for) == 1, "a backend that has just failed was asked at once"
    if shape != "flask, looking again":
        assert shop.visit(ping).body == b"pong", "who does not look at the session need not be refused"
    assert (shop.backend.sessions(), shop.waiting(), shop.cookie) == (before, 0, cookie)
    shop.recover()
    assert shop.visit().found == {"name": "ada"}
    assert shop.cookie == cookie


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("how", [BEFORE, AFTER])
@pytest.mark.parametrize("shape", ["whole", "flask", "ASGI"])
def test_however_a_load_fails_it_is_a_503(site: MakeSite, shape: str, how: str, failure: str) -> None:
    shop = site(shape)
    shop.cookie = shop.known(name="ada")
    shop.backend.error = FAILURES[failure]
    shop.backend.fail("load", how)
    refused(shop.visit(store_something))
    shop.recover()
    assert shop.visit().found == {"name": "ada"}


@pytest.mark.parametrize("failure", ["unavailable", "somebody's own"])
@pytest.mark.parametrize("call", ["open", "initialize", "write", "sweep", "close"])
@pytest.mark.parametrize("shape", ["whole", "flask", "ASGI"])
def test_each_other_call_fails_and_nobody_loses_a_session(site: MakeSite, shape: str, call: str, failure: str) -> None:
    """Who is in memory, and who comes new, is served; who is not gets the session or a 503, and in the end has it."""
    shop = site(shape)
    shop.cookie = shop.known(name="ada")
    shop.backend.error = FAILURES[failure]
    shop.backend.fail(call, times=2)
    new = shop.visit(store_something, cookie="")
    assert (new.status, new.found) == (200, {})
    for _ in range(3):
        reply = shop.visit()
        if reply.status == 200:
            assert reply.found == {"name": "ada"}
        else:
            refused(reply)
            shop.clock.advance(1)
        newcomer = (new.headers["set-cookie"] or "").partition(";")[0]
        assert shop.visit(cookie=newcomer).found == {"name": "eve"}
    if call == "close":  # the worker ends, and the next one begins
        shop.store.close()
    wait_for(lambda: call in shop.backend.calls, f"the backend is asked to {call}")
    shop.recover()
    assert shop.visit().found == {"name": "ada"}
    shop.flush()
    assert shop.live() == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_anonymous_by_choice_leaves_cookie_and_session_alone(site: MakeSite, shape: str) -> None:
    """The request has no session; looking writes nothing and sets nothing."""
    shop = site(shape, on_backend_error="anonymous")
    shop.cookie = cookie = shop.known(name="ada")
    before = shop.backend.sessions()
    shop.backend.fail("load")
    for _ in range(2):
        reply = shop.visit()
        assert (reply.status, reply.found) == (200, {})
        assert "set-cookie" not in reply.headers
    assert (shop.backend.sessions(), shop.waiting()) == (before, 0)
    shop.recover()
    assert shop.visit().found == {"name": "ada"}
    assert shop.cookie == cookie


@pytest.mark.parametrize("shape", SHAPES)
def test_what_an_anonymous_request_stores_is_a_session_of_its_own(site: MakeSite, shape: str) -> None:
    """Never data over a session that was not loaded: the old cookie still leads to what it led to."""
    shop = site(shape, on_backend_error="anonymous")
    shop.cookie = old = shop.known(name="ada")
    shop.backend.fail("load")
    assert shop.visit(store_something).found == {}
    assert shop.cookie not in ("", old)
    shop.recover()
    shop.flush()
    assert shop.visit().found == {"name": "eve"}
    assert shop.visit(cookie=old).found == {"name": "ada"}
    assert shop.live() == 2


@pytest.mark.parametrize("shape", SHAPES)
def test_an_anonymous_login_makes_a_new_id_and_ends_the_session_it_could_not_see(site: MakeSite, shape: str) -> None:
    shop = site(shape, on_backend_error="anonymous")
    shop.cookie = old = shop.known(name="ada")
    shop.backend.fail("load")
    assert shop.visit(log_in).found == {}
    assert shop.cookie not in ("", old)
    shop.recover()
    shop.flush()
    assert shop.live() == 1
    assert shop.visit(cookie=old).found == {}
    assert shop.store.session(shop.visit(lambda session: (session.id or "").encode()).body.decode()).user_id == "eve"


@pytest.mark.parametrize("act", [destroy, clear])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_anonymous_logout_takes_the_cookie_back_and_ends_the_session(site: MakeSite, shape: str, act: Act) -> None:
    shop = site(shape, on_backend_error="anonymous")
    shop.cookie = old = shop.known(name="ada")
    shop.backend.fail("load")
    assert shop.visit(act).status == 200
    assert shop.cookie == ""
    shop.recover()
    assert shop.visit(cookie=old).found == {}
    shop.flush()
    assert {row.state for row in shop.backend.sessions().values()} == {State.DEAD}


@pytest.mark.parametrize("act", [destroy, clear])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_logout_while_the_backend_is_down_is_answered_counted_and_final(site: MakeSite, shape: str, act: Act) -> None:
    """At once in memory, for the browser too; and in the backend when that is back."""
    shop = site(shape, through_timeout=timedelta(milliseconds=50))
    shop.visit(store_something)
    shop.flush()
    cookie = shop.cookie
    shop.backend.fail("write", times=1000)
    late = shop.store.stats().counters["late"]
    assert shop.visit(act).status == 200
    assert shop.cookie == ""
    assert shop.store.stats().counters["late"] == late + 1
    assert shop.visit(cookie=cookie).found == {}
    shop.recover()
    shop.flush()
    assert {row.state for row in shop.backend.sessions().values()} == {State.DEAD}
    assert shop.visit(cookie=cookie).found == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_backend_that_hangs_is_a_503_after_load_timeout(site: MakeSite, shape: str) -> None:
    """And the worker goes on: for who is in memory, who is new, and in the end for who was refused."""
    shop = site(shape, load_timeout=timedelta(milliseconds=30))
    shop.cookie = cookie = shop.known(name="ada")
    new = shop.visit(store_something, cookie="").headers["set-cookie"] or ""
    shop.backend.may_answer.clear()
    refused(shop.visit(store_something))
    assert shop.visit(cookie=new.partition(";")[0]).found == {"name": "eve"}
    assert shop.visit(store_something, cookie="").status == 200
    refused(shop.visit(store_something))
    assert len(shop.backend.asked_for) == 1, "a backend that hangs was asked again at once"
    shop.recover()
    assert shop.visit().found == {"name": "ada"}
    assert shop.cookie == cookie


@pytest.mark.parametrize("shape", SHAPES)
def test_with_write_through_the_backend_has_it_when_the_response_ends(site: MakeSite, shape: str) -> None:
    """A new session, a change and a login: nothing waits any more when the server has the whole response."""
    shop = site(shape, write="through", through_timeout=timedelta(minutes=1))
    shop.store.open()
    for act in (store_something, lambda session: store_nested(session), log_in):
        assert shop.visit(act).status == 200
        assert shop.waiting() == 0
    assert shop.store.stats().counters["late"] == 0


def store_nested(session: Session) -> bytes:
    found = look(session)
    session.setdefault("cart", []).append("tea")
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_with_write_through_a_backend_that_is_down_delays_and_refuses_nobody(site: MakeSite, shape: str) -> None:
    """It is counted, and stored later."""
    shop = site(shape, write="through", through_timeout=timedelta(milliseconds=50))
    shop.store.open()
    shop.backend.fail("write", times=1000)
    assert shop.visit(store_something).found == {}
    assert shop.visit(store_something).found == {"name": "eve"}
    counters = shop.store.stats().counters
    assert counters["late"] >= 2
    shop.recover()
    shop.flush()
    assert shop.live() == 1


def evict(shop: Site) -> None:
    """Memory gives the session up in the middle of a request, and the backend fails when it is asked for it."""
    shop.clock.advance(hours=1, minutes=1)
    shop.store.memory.outbox.retire(shop.clock.now(), 1, b"")
    assert shop.store.count() == 0
    shop.backend.fail("load")


@pytest.mark.parametrize("shape", SHAPES)
def test_an_error_in_the_middle_drops_what_was_changed_before_it(site: MakeSite, shape: str) -> None:
    """The session was loaded and changed, and left memory; the backend failed once when it was asked for it again."""
    shop = site(shape)
    shop.cookie = cookie = shop.known(name="ada")

    def change(session: Session) -> bytes:
        session["name"] = "eve"
        evict(shop)
        try:
            return b"%d" % session.increment("n")
        finally:
            shop.recover()

    refused(shop.visit(change))
    assert shop.visit().found == {"name": "ada"}
    assert shop.cookie == cookie


# ── threads ───────────────────────────────────────────────────────────────────────────────────────────────────


def at_once(shop: Site, visits: Sequence[Callable[[], Reply]], loads: int) -> list[Reply]:
    """What all of them are answered who wait at the same time, each in a thread; the backend answers when all wait."""
    entered: list[bytes] = []
    part = shop.store.behind
    original = part._load_once

    async def counted(handle: bytes) -> Any:
        entered.append(handle)
        return await original(handle)

    part._load_once = counted  # type: ignore[method-assign]
    shop.backend.may_answer.clear()
    with ThreadPoolExecutor(len(visits)) as pool:
        replies: list[Future[Reply]] = [pool.submit(visit) for visit in visits]
        try:
            wait_for(lambda: len(entered) == len(visits), "all wait")
            wait_for(lambda: len(shop.backend.asked_for) >= loads, "the backend is asked")
            assert not any(reply.done() for reply in replies)
        finally:
            shop.backend.may_answer.set()
        return [reply.result() for reply in replies]


@pytest.mark.parametrize("shape", ["whole", "looking late", "flask"])
def test_many_threads_that_look_for_one_session_ask_once(site: MakeSite, shape: str) -> None:
    """In a worker that has asked nothing before: the backend is opened once too."""
    shop = site(shape)
    cookie = shop.known(name="ada")
    shop.backend.opens_in = 0.05  # so that all come while it is being opened
    replies = at_once(shop, [lambda: shop.visit(cookie=cookie)] * THREADS, 1)
    assert [(reply.status, reply.found) for reply in replies] == [(200, {"name": "ada"})] * THREADS
    assert len(shop.backend.asked_for) == 1
    assert shop.backend.calls.count("open") == 1


def test_an_error_reaches_all_threads_that_wait_for_it(site: MakeSite) -> None:
    """And one question was asked; the next one is asked anew."""
    shop = site("flask")
    cookie = shop.known(name="ada")
    shop.backend.fail("load")
    for reply in at_once(shop, [lambda: shop.visit(cookie=cookie)] * THREADS, 1):
        refused(reply)
    assert len(shop.backend.asked_for) == 1
    shop.recover()
    assert shop.visit(cookie=cookie).found == {"name": "ada"}


def test_threads_get_each_their_own_visitors_session(site: MakeSite) -> None:
    """Sixteen visitors whom memory does not know: sixteen questions at once, and nobody's data is another's."""
    shop = site("flask")
    cookies = [shop_cookie(shop, number) for number in range(THREADS)]
    shop.lose_memory()
    replies = at_once(shop, [lambda cookie=cookie: shop.visit(cookie=cookie) for cookie in cookies], THREADS)  # type: ignore[misc]
    assert [reply.found for reply in replies] == [{"n": number} for number in range(THREADS)]


def shop_cookie(shop: Site, number: int) -> str:
    ((name, value),) = login_cookie(shop.store, {"n": number}).items()
    return f"{name}={value}"


def test_a_thread_that_waits_for_the_backend_holds_up_no_other(site: MakeSite) -> None:
    """The backend hangs: meanwhile other threads serve whoever is in memory, comes new or does not look."""
    shop = site("flask")
    cookie = shop.known(name="ada")
    new = (shop.visit(store_something, cookie="").headers["set-cookie"] or "").partition(";")[0]
    shop.backend.may_answer.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(shop.visit, cookie=cookie)
        try:
            wait_for(lambda: shop.backend.asked_for, "it waits")
            for _ in range(20):
                assert shop.visit(cookie=new).found == {"name": "eve"}
                assert shop.visit(store_something, cookie="").status == 200
                assert shop.visit(ping, cookie=cookie).body == b"pong"
            assert not waiting.done()
        finally:
            shop.backend.may_answer.set()
        assert waiting.result().found == {"name": "ada"}


# ── what only WSGI has ────────────────────────────────────────────────────────────────────────────────────────


def test_a_server_without_hooks_flushes_too(site: MakeSite) -> None:
    """Nobody has opened the store but the requests, and every session is in memory: no guarantee depends on hooks."""
    shop = site(flush_interval=timedelta(milliseconds=10))
    shop.visit(store_something)
    wait_for(lambda: shop.live() == 1, "the session is in the backend")


@pytest.mark.parametrize("failure", FAILURES)
def test_a_backend_that_cannot_be_opened_refuses_nobody_who_does_not_need_it(
    site: MakeSite, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """And is not tried again at every request, but by itself, later."""
    monkeypatch.setattr("shmsession.behind.REOPEN_SECONDS", 3600)
    shop = site()
    shop.backend.error = FAILURES[failure]
    shop.backend.fail("open", times=1000)
    served = SessionMiddleware(whole(store_something), shop.store)
    cookie = exchange(shop.store, served, skip="/").cookie
    for _ in range(3):
        result = exchange(shop.store, served, cookie, skip="/")
        assert (result.error, json.loads(result.body)) == (None, {"name": "eve"})
    wait_for(lambda: shop.backend.calls, "it was tried")
    assert shop.backend.calls == ["open"]


@pytest.mark.parametrize("save_on_error", [False, True])
def test_an_error_page_for_a_commit_that_failed_is_a_503(site: MakeSite, save_on_error: bool) -> None:
    """write() commits, and raises into the framework, which calls start_response again for its page: the session was
    evicted while the request held it, and the backend cannot be asked."""
    shop = site(save_on_error=save_on_error)
    shop.cookie = shop.known(name="ada")

    def held(session: Session) -> bytes:
        found = store_something(session)
        evict(shop)
        return found

    refused(shop.visit(held, shape="own error page"))
    shop.recover()
    assert shop.visit().found == {"name": "ada"}


def test_a_store_error_after_the_first_byte_cuts_the_response_and_drops_what_it_did(site: MakeSite) -> None:
    """A whole 503 cannot be sent any more: the server learns of the error, once, and nothing of it is kept."""
    shop = site()
    cookie = shop.known(name="ada")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        session = Session.of(environ)
        session["early"] = 1
        start_response("200 OK", PLAIN)
        yield b"first"
        shop.flush()
        session["late"] = 1
        evict(shop)
        try:
            session.save()
        finally:
            shop.recover()

    result = exchange(shop.store, app, cookie)
    assert isinstance(result.error, BackendError)
    assert (result.status, result.body, result.starts) == ("200 OK", b"first", 1)
    assert shop.visit(cookie=cookie).found == {"name": "ada", "early": 1}


def test_a_stream_with_write_through_waits_before_its_first_byte_and_before_its_end(site: MakeSite) -> None:
    """What it stored until then is in the backend, also what came after the headers."""
    shop = site(write="through", through_timeout=timedelta(minutes=1))
    shop.store.open()
    cookie = shop_cookie(shop, 1)
    waiting: list[int] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        session = Session.of(environ)
        session["early"] = 1
        start_response("200 OK", PLAIN)
        yield b"first"
        session["late"] = 1
        yield b"second"

    result = exchange(shop.store, app, cookie, watch=lambda: waiting.append(shop.waiting()))
    assert result.error is None
    assert (waiting, shop.waiting()) == ([0, 0], 0)
    assert shop.visit(cookie=cookie).found == {"n": 1, "early": 1, "late": 1}


@pytest.mark.parametrize("where", ["body", "close"])
def test_a_logout_in_the_middle_of_a_stream_waits_for_the_backend_too(site: MakeSite, where: str) -> None:
    """Without write="through": destroying always waits."""
    shop = site(through_timeout=timedelta(minutes=1))
    shop.store.open()
    cookie = shop_cookie(shop, 1)
    shop.flush()

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        try:
            yield b"first"
            if where == "body":
                Session.of(environ).destroy()
            yield b"second"
        finally:
            if where == "close":
                Session.of(environ).destroy()

    result = exchange(shop.store, app, cookie, hang_up=where == "close")
    assert result.error is None
    assert shop.waiting() == 0
    assert {row.state for row in shop.backend.sessions().values()} == {State.DEAD}


def test_an_application_that_catches_the_error_may_answer_without_a_session(site: MakeSite) -> None:
    """Its answer goes out as it is, and the cookie stays."""
    shop = site()
    shop.cookie = cookie = shop.known(name="ada")
    shop.backend.fail("load")

    def forgiving(session: Session) -> bytes:
        try:
            return look(session)
        except StoreError:
            return b"come again"

    reply = shop.visit(forgiving)
    assert (reply.status, reply.body) == (200, b"come again")
    assert "set-cookie" not in reply.headers
    shop.recover()
    assert shop.visit().found == {"name": "ada"}
    assert shop.cookie == cookie


# ── a real server and a file ──────────────────────────────────────────────────────────────────────────────────


def refused_by_server(answer: Response) -> bool:
    if answer.status == 200:
        return False
    assert (answer.status, answer.header("retry-after")) == (503, "5"), answer
    assert answer.all("set-cookie") == []
    return True


@pytest.mark.parametrize("kind", [SYNC, GTHREAD], ids=str)
def test_a_file_of_sqlite_that_is_removed_replaced_and_locked_logs_nobody_out(
    serve: Serve, place: Path, kind: Kind
) -> None:
    """Whoever memory does not know gets a 503 while the file is not there, or is something else, and has the session
    again with the file. While others hold its lock, a session is read, and a logout is answered and final."""
    with Kept("sqlite", place) as kept:
        server = serve(kind, env={"SHMSESSION_BACKEND": kept.url}, workers=1, may_fail=True)
        visitors = {name: server.browser() for name in ("ada", "bea", "cyd")}
        for name, browser in visitors.items():
            browser.post(f"/login/{name}")
        store = server.store()
        wait_for_empty_outbox(store)
        store.close()
        server.stop()
        backup = place / "backup.db"
        shutil.copyfile(kept.file, backup)
        shutil.rmtree(server.place / "sessions")
        server.start()
        newcomer = server.browser()
        assert newcomer.get("/hit").status == 200
        wait_for(lambda: len(kept.rows()) == len(visitors) + 1, "the new server flushes")
        for name, content in (("ada", None), ("bea", b"this is no database\n" * 300)):
            cookies = dict(visitors[name].cookies)
            for file in (f"{kept.file}-wal", f"{kept.file}-shm", kept.file):
                Path(file).unlink(missing_ok=True)
            if content:
                kept.file.write_bytes(content)
            for path in ("/whoami", "/session", "/hit"):
                assert refused_by_server(visitors[name].get(path))
            assert refused_by_server(visitors[name].post("/logout"))
            assert newcomer.get("/hit").status == 200
            shutil.copyfile(backup, place / "again.db")
            (place / "again.db").replace(kept.file)
            wait_for(lambda name=name: not refused_by_server(visitors[name].get("/whoami")), "it is there")  # type: ignore[misc]
            assert visitors[name].get("/whoami").json["user"] == name
            assert visitors[name].cookies == cookies
        assert newcomer.get("/hit").json["hits"] == 4
        cookies = dict(visitors["cyd"].cookies)
        with closing(sqlite3.connect(kept.file, isolation_level=None, timeout=60)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert visitors["cyd"].get("/whoami").json["user"] == "cyd"
            assert visitors["cyd"].post("/logout").status == 200
            assert visitors["cyd"].cookies == {}
            assert server.browser(cookies).get("/session").json == {}
        assert server.browser(cookies).get("/session").json == {}
        wait_for(lambda: kept_users(kept) == 2, "the backend has heard of the logout")


def kept_users(kept: Kept) -> int:
    return sum(bool(row.user) for row in kept.rows().values())
