"""The ASGI middleware over applications written by hand and over Starlette: one commit, before the first byte."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from shmsession import Key, Session, SessionStore
from shmsession.asgi import App, Message, Receive, Scope, Send, SessionMiddleware
from shmsession.errors import NoSessionError, ReadOnlySession, ResponseStarted, SessionTooLarge, StoreFull
from shmsession.testing import login_cookie, make_store


class Exchange:
    """What a server saw of one request, and the store's sessions by the cookie it handed out."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.sent: list[Message] = []
        self.error: BaseException | None = None

    @property
    def start(self) -> Message:
        (found,) = (message for message in self.sent if message["type"] == "http.response.start")
        return found

    @property
    def status(self) -> int:
        return int(self.start["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent if message["type"] == "http.response.body")

    def all(self, name: str) -> list[str]:
        return [value.decode() for key, value in self.start["headers"] if key.lower() == name.encode()]

    @property
    def cookie(self) -> bytes:
        """The session's cookie, as the next request sends it back."""
        (found,) = (text for text in self.all("set-cookie") if text.startswith(self.store.transport.name + "="))
        return found.partition(";")[0].encode()


def cookie_of(store: SessionStore, **data: Any) -> bytes:
    ((name, value),) = login_cookie(store, data).items()
    return f"{name}={value}".encode()


def stored(store: SessionStore, cookie: bytes) -> dict[str, Any]:
    """What another request would see."""
    return store.request_session(lambda: cookie).to_dict()


def exchange(
    store: SessionStore,
    app: App,
    *cookies: bytes,
    path: str = "/",
    method: str = "GET",
    watch: Callable[[Message], None] | None = None,
    **options: Any,
) -> Exchange:
    """Send one request through the middleware, as a server does."""
    result = Exchange(store)
    headers = [(b"host", b"localhost"), *((b"cookie", cookie) for cookie in cookies)]
    scope: Scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        if watch is not None:
            watch(message)
        result.sent.append(message)

    async def run() -> None:
        try:
            await SessionMiddleware(app, store, **options)(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # whatever reaches the server
            result.error = error

    asyncio.run(run())
    return result


def application(
    before: Callable[[Session], object] = lambda session: None,
    *,
    status: int = 200,
    headers: Iterable[tuple[bytes, bytes]] = (),
    between: Callable[[Session], object] = lambda session: None,
    after: Callable[[Session], object] = lambda session: None,
) -> App:
    """An application that does things to its session before the headers, between them and the body, and at the end."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = Session.of(scope)
        before(session)
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        between(session)
        await send({"type": "http.response.body", "body": b"one ", "more_body": True})
        await send({"type": "http.response.body", "body": b"two"})
        after(session)

    return app


def put(**data: Any) -> Callable[[Session], None]:
    return lambda session: session.update(data)


def fail(_: Session) -> None:
    raise LookupError("the application broke")


# ── the commit and the headers ─────────────────────────────────────────────────────────────────────────────────


def test_the_commit_is_done_when_the_first_byte_leaves(shm_store: SessionStore) -> None:
    counts: list[int] = []
    result = exchange(shm_store, application(put(a=1)), watch=lambda message: counts.append(shm_store.count()))
    assert counts == [1, 1, 1]
    assert result.body == b"one two"
    assert stored(shm_store, result.cookie) == {"a": 1}


def test_an_application_that_never_looks_gets_its_response_untouched(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, application(), cookie)
    assert result.start["headers"] == []


def test_reading_adds_vary_and_nothing_else(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, application(lambda session: session["a"]), cookie)
    assert result.start["headers"] == [(b"vary", b"Cookie")]


def test_a_change_to_a_known_session_needs_no_cookie(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, application(put(b=2)), cookie)
    assert result.start["headers"] == [(b"vary", b"Cookie")]
    assert stored(shm_store, cookie) == {"a": 1, "b": 2}


def test_a_cookie_header_split_by_http_2_is_one(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    seen: list[Any] = []
    exchange(shm_store, application(lambda session: seen.append(dict(session))), b"x=1", cookie, b"y=2")
    assert seen == [{"a": 1}]


def test_the_applications_own_headers_stay(shm_store: SessionStore) -> None:
    own = [(b"Set-Cookie", b"theme=dark"), (b"set-cookie", b"lang=en"), (b"Vary", b"Accept, Origin"), (b"vary", b"X-A")]
    result = exchange(shm_store, application(put(a=1), headers=[*own, (b"Cache-Control", b"max-age=60")]))
    assert result.all("set-cookie")[:2] == ["theme=dark", "lang=en"]
    assert len(result.all("set-cookie")) == 3
    assert [set(text.split(", ")) for text in result.all("vary")] == [{"Accept", "Origin", "X-A", "Cookie"}]
    assert result.all("cache-control") == ["no-store"]


def test_a_response_without_a_new_cookie_keeps_its_cache_control(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    app = application(lambda session: session["a"], headers=[(b"cache-control", b"max-age=60"), (b"vary", b"cookie")])
    result = exchange(shm_store, app, cookie)
    assert result.all("cache-control") == ["max-age=60"]
    assert [text.lower() for text in result.all("vary")] == ["cookie"]


@pytest.mark.parametrize("status", [200, 204, 301, 304, 404])
def test_any_status_below_500_commits(shm_store: SessionStore, status: int) -> None:
    result = exchange(shm_store, application(put(a=1), status=status))
    assert stored(shm_store, result.cookie) == {"a": 1}


@pytest.mark.parametrize("status", [500, 503, 599])
def test_a_status_of_500_and_above_drops_the_changes(shm_store: SessionStore, status: int) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, application(put(a=2), status=status), cookie)
    assert result.all("set-cookie") == []
    assert stored(shm_store, cookie) == {"a": 1}
    exchange(shm_store, application(put(b=1), status=status))
    assert shm_store.count() == 1


def test_save_on_error_keeps_them(tmp_path: Any) -> None:
    with make_store(tmp_path / "s", save_on_error=True) as store:
        cookie = cookie_of(store, a=1)
        exchange(store, application(put(a=2), status=500), cookie)
        assert stored(store, cookie) == {"a": 2}
        assert isinstance(exchange(store, application(between=put(a=3), after=fail), cookie).error, LookupError)
        assert stored(store, cookie) == {"a": 3}


# ── exceptions, streams, what comes late ───────────────────────────────────────────────────────────────────────


def test_an_exception_before_the_headers_drops_the_changes_and_goes_on(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)

    def broken(session: Session) -> None:
        session["a"] = 2
        session.increment("n")
        fail(session)

    result = exchange(shm_store, application(broken), cookie)
    assert isinstance(result.error, LookupError)
    assert result.sent == []
    assert stored(shm_store, cookie) == {"a": 1, "n": 1}, "increment has happened already"


def test_an_exception_after_the_headers_keeps_what_they_committed_and_drops_the_rest(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, application(put(a=2), between=put(late=1), after=fail), cookie)
    assert isinstance(result.error, LookupError)
    assert stored(shm_store, cookie) == {"a": 2}


def test_changes_after_the_headers_are_committed_at_the_end(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    exchange(shm_store, application(put(a=2), between=put(b=1), after=put(c=1)), cookie)
    assert stored(shm_store, cookie) == {"a": 2, "b": 1, "c": 1}
    result = exchange(shm_store, application(put(a=1), after=put(late=2)))
    assert stored(shm_store, result.cookie) == {"a": 1, "late": 2}


def test_save_commits_now_in_the_middle_of_a_stream(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)

    def save(session: Session) -> None:
        session["a"] = 2
        session.save()
        assert stored(shm_store, cookie) == {"a": 2}

    assert exchange(shm_store, application(lambda session: session["a"], between=save), cookie).error is None


def test_a_new_session_after_the_headers_is_a_loud_error(shm_store: SessionStore) -> None:
    result = exchange(shm_store, application(after=put(a=1)))
    assert isinstance(result.error, ResponseStarted)
    assert result.body == b"one two"
    assert shm_store.count() == 0


def test_renewing_after_the_headers_is_a_loud_error_and_the_old_session_stays(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, application(after=lambda session: session.renew(user_id="ada")), cookie)
    assert isinstance(result.error, ResponseStarted)
    assert stored(shm_store, cookie) == {"a": 1}


def test_destroying_works_at_any_time_and_survives_a_failing_response(shm_store: SessionStore) -> None:
    for options in ({"before": Session.destroy, "status": 500}, {"after": Session.destroy}):
        cookie = cookie_of(shm_store, a=1)
        exchange(shm_store, application(**options), cookie)
        assert stored(shm_store, cookie) == {}


def test_a_cancelled_request_keeps_what_its_headers_committed(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = Session.of(scope)
        session["a"] = 2
        await send({"type": "http.response.start", "status": 200, "headers": []})
        session["late"] = True
        await asyncio.Event().wait()

    async def run() -> None:
        begun = asyncio.Event()

        async def send(message: Message) -> None:
            begun.set()

        async def receive() -> Message:
            return {"type": "http.disconnect"}

        scope: Scope = {"type": "http", "path": "/", "headers": [(b"cookie", cookie)]}
        task = asyncio.ensure_future(SessionMiddleware(app, shm_store)(scope, receive, send))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert stored(shm_store, cookie) == {"a": 2}


def test_an_unstorable_nested_edit_is_the_applications_error_and_writes_nothing(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, items=[1])
    result = exchange(shm_store, application(lambda session: session["items"].append(object())), cookie)
    assert isinstance(result.error, TypeError)
    assert result.sent == []
    assert stored(shm_store, cookie) == {"items": [1]}


def test_a_session_that_grew_too_large_by_nested_edits_is_an_error_before_the_headers(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, items=["x"])
    result = exchange(shm_store, application(lambda session: session["items"].extend(["y" * 1000] * 100)), cookie)
    assert isinstance(result.error, SessionTooLarge)
    assert result.sent == []
    assert stored(shm_store, cookie) == {"items": ["x"]}


# ── a store that cannot serve ──────────────────────────────────────────────────────────────────────────────────


def unavailable(result: Exchange) -> None:
    assert result.error is None
    assert result.status == 503
    assert int(result.all("retry-after")[0]) > 0
    assert result.all("cache-control") == ["no-store"]
    assert result.all("set-cookie") == []
    assert int(result.all("content-length")[0]) == len(result.body)
    assert not any(message.get("more_body") for message in result.sent)


def full(store: SessionStore) -> None:
    """Fill the store with new sessions until it refuses one."""
    with contextlib.suppress(StoreFull):
        while True:
            session = store.session()
            session["ballast"] = "x" * 20_000
            session.save()


def test_a_full_store_answers_503_before_any_header_of_the_application(shm_store: SessionStore) -> None:
    full(shm_store)
    result = exchange(shm_store, application(put(a="x" * 20_000), between=put(b=1), after=put(c=1)))
    unavailable(result)
    assert b"one" not in result.body


def test_a_record_under_an_unknown_key_answers_503_and_is_left_alone(tmp_path: Any) -> None:
    old, new = Key.generate(), Key.generate()
    with make_store(tmp_path / "s", keys=(old,)) as before, make_store(tmp_path / "s", keys=(old, new)) as both:
        cookie = cookie_of(both, a=1)
        exchange(both, application(put(a=2)), cookie)
        ticket = cookie_of_id(before, both, cookie)
        unavailable(exchange(before, application(lambda session: session.get("a")), ticket))
        assert stored(both, cookie) == {"a": 2}


def cookie_of_id(store: SessionStore, other: SessionStore, cookie: bytes) -> bytes:
    """The cookie that `store` would have issued for the session of `cookie`."""
    session = other.request_session(lambda: cookie)
    assert session.id is not None
    secret = session.secret
    assert secret is not None
    return f"{store.transport.name}={store.transport.value(secret, store.clock.now())}".encode()


def test_wrapped_around_a_whole_starlette_a_full_store_is_503_as_well(shm_store: SessionStore) -> None:
    """Starlette's own handler for exceptions, inside, must not make a 500 of it."""

    async def endpoint(request: Request) -> Response:
        request.session["a"] = "x" * 20_000
        return PlainTextResponse("done")

    full(shm_store)
    app = SessionMiddleware(Starlette(routes=[Route("/", endpoint)]), shm_store)
    answer = TestClient(app).get("/")
    assert answer.status_code == 503
    assert "retry-after" in answer.headers


# ── skip, readonly, other scopes ───────────────────────────────────────────────────────────────────────────────


async def whole_scope(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        Session.of(scope)["a"] = 1
        body = b"session"
    except NoSessionError:
        body = b"none"
    except ReadOnlySession:
        body = b"readonly"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.mark.parametrize(
    ("options", "path", "says"),
    [
        ({"skip": "/static"}, "/static", b"none"),
        ({"skip": "/static"}, "/static/a.css", b"none"),
        ({"skip": "/static"}, "/statics", b"session"),
        ({"skip": ["/a", "/b/"]}, "/b/c", b"none"),
        ({"skip": lambda path: path.endswith(".css")}, "/a.css", b"none"),
        ({"skip": lambda path: path.endswith(".css")}, "/a.js", b"session"),
        ({"readonly": "/api"}, "/api/x", b"readonly"),
        ({"readonly": "/api"}, "/", b"session"),
        ({"readonly": ["/"], "skip": "/api"}, "/api", b"none"),
    ],
)
def test_paths_can_be_skipped_or_read_only(shm_store: SessionStore, options: Any, path: str, says: bytes) -> None:
    result = exchange(shm_store, whole_scope, path=path, **options)
    assert result.body == says
    assert shm_store.count() == (says == b"session")
    assert bool(result.all("vary")) is (says != b"none")


def test_an_inner_middleware_makes_its_own_paths_read_only(shm_store: SessionStore) -> None:
    """One around a part of the application, with the store of the one around the whole."""
    inner = SessionMiddleware(whole_scope, shm_store, readonly="/api")
    for path, says in (("/api", b"readonly"), ("/", b"session"), ("/files", b"readonly")):
        assert exchange(shm_store, inner, path=path, readonly="/files").body == says


def test_scopes_of_other_kinds_pass_untouched(shm_store: SessionStore) -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(dict(scope))

    async def nothing(*_: Any) -> Any:
        raise AssertionError("nobody calls this")

    asyncio.run(SessionMiddleware(app, shm_store)({"type": "other"}, nothing, nothing))
    assert seen == [{"type": "other"}]


def lifespan(store: SessionStore, app: App) -> list[Message]:
    """Start and stop an application; returns what it told the server."""
    incoming = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(SessionMiddleware(app, store)({"type": "lifespan"}, receive, send))
    return sent


def test_the_store_is_open_from_startup_to_shutdown(shm_store: SessionStore) -> None:
    states: list[bool] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for step in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{step}"
            states.append(shm_store._memory is not None and shm_store._memory.environment._opened is not None)
            await send({"type": f"lifespan.{step}.complete"})

    assert [message["type"] for message in lifespan(shm_store, app)] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]
    assert states == [True, True]
    assert shm_store._memory is None


def test_a_store_that_cannot_be_opened_fails_the_startup_and_says_why(tmp_path: Any) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError("it must not start")

    store = make_store(tmp_path / "missing" / "sessions")
    (message,) = lifespan(store, app)
    assert message["type"] == "lifespan.startup.failed"
    assert "SHMSESSION_DIR" in message["message"]


# ── Starlette ──────────────────────────────────────────────────────────────────────────────────────────────────


def starlette(store: SessionStore, endpoint: Callable[[Request], Awaitable[Response]]) -> TestClient:
    app = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(SessionMiddleware, store=store)])
    return TestClient(app)


def test_request_session_is_the_session(shm_store: SessionStore) -> None:
    async def endpoint(request: Request) -> Response:
        session: object = request.session
        assert session is Session.of(request)
        request.session["n"] = request.session.get("n", 0) + 1
        return JSONResponse(dict(request.session))

    with starlette(shm_store, endpoint) as client:
        assert [client.get("/").json()["n"] for _ in range(3)] == [1, 2, 3]


def test_a_stream_and_a_background_task_may_still_change_a_stored_session(shm_store: SessionStore) -> None:
    async def endpoint(request: Request) -> Response:
        session = Session.of(request)
        session.create()

        async def chunks() -> AsyncIterator[str]:
            for number in range(3):
                session[f"chunk{number}"] = number
                yield str(number)

        def later() -> None:
            session["later"] = True

        return StreamingResponse(chunks(), background=BackgroundTask(later))

    client = starlette(shm_store, endpoint)
    assert client.get("/").text == "012"
    cookie = f"session={client.cookies['session']}".encode()
    assert stored(shm_store, cookie) == {"chunk0": 0, "chunk1": 1, "chunk2": 2, "later": True}


def test_a_handled_exception_is_a_response_like_any_other(shm_store: SessionStore) -> None:
    async def endpoint(request: Request) -> Response:
        request.session["a"] = 1
        raise KeyError("handled")

    async def handle(request: Request, error: Exception) -> Response:
        return PlainTextResponse("sorry", 400)

    app = Starlette(
        routes=[Route("/", endpoint)], middleware=[Middleware(SessionMiddleware, store=shm_store)],
        exception_handlers={KeyError: handle},
    )  # fmt: skip
    answer = TestClient(app).get("/")
    assert (answer.status_code, shm_store.count()) == (400, 1)


def test_an_unhandled_exception_is_a_500_without_a_session(shm_store: SessionStore) -> None:
    async def endpoint(request: Request) -> Response:
        request.session["a"] = 1
        raise KeyError("unhandled")

    app = Starlette(routes=[Route("/", endpoint)], middleware=[Middleware(SessionMiddleware, store=shm_store)])
    answer = TestClient(app, raise_server_exceptions=False).get("/")
    assert (answer.status_code, shm_store.count()) == (500, 0)
    assert "set-cookie" not in answer.headers
