"""The WSGI middleware under wsgiref's validator, a server written by hand, and Flask."""

import io
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from wsgiref.headers import Headers
from wsgiref.util import FileWrapper, setup_testing_defaults
from wsgiref.validate import validator

import flask
import pytest

from shmsession import Session, SessionMode, SessionStore
from shmsession.errors import NoSessionError, ReadOnlySession, ResponseStarted, SessionTooLarge, StoreFull
from shmsession.testing import login_cookie, make_store
from shmsession.wsgi import App, Environ, SessionMiddleware, StartResponse

PLAIN = [("Content-Type", "text/plain")]


class Exchange:
    """What a server saw of one request."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.status = ""
        self.headers = Headers([])
        self.chunks: list[bytes] = []
        self.starts = 0
        self.error: BaseException | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def cookie(self) -> str:
        """The session's cookie, as the next request sends it back."""
        (found,) = (text for text in self.headers.get_all("set-cookie") if text.startswith(self.store.transport.name))
        return found.partition(";")[0]


def cookie_of(store: SessionStore, **data: Any) -> str:
    ((name, value),) = login_cookie(store, data).items()
    return f"{name}={value}"


def stored(store: SessionStore, cookie: str) -> dict[str, Any]:
    """What another request would see."""
    return store.request_session(cookie.encode).to_dict()


def exchange(
    store: SessionStore,
    app: App,
    cookie: str = "",
    *,
    environ: Environ | None = None,
    watch: Callable[[], None] = lambda: None,
    validate: bool = True,
    hang_up: bool = False,
    **options: Any,
) -> Exchange:
    """Send one request through the middleware, as PEP 3333 says a server does; `hang_up`: after the first chunk."""
    result = Exchange(store)
    request: Environ = {"HTTP_COOKIE": cookie, **(environ or {})}
    setup_testing_defaults(request)
    request["QUERY_STRING"] = ""
    sent = False

    def write(data: bytes) -> None:
        nonlocal sent
        assert result.starts, "a byte before start_response"
        if data:
            sent = True
            result.chunks.append(data)
            watch()

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Callable[[bytes], None]:
        if exc_info and sent:
            raise exc_info[1].with_traceback(exc_info[2])
        assert exc_info or not result.starts
        result.starts += 1
        result.status, result.headers = status, Headers(headers)
        return write

    served: Any = SessionMiddleware(app, store, **options)
    if validate:
        served = validator(served)
    try:
        body = served(request, start_response)
        try:
            for chunk in body:
                write(chunk)
                if hang_up:
                    break
        finally:
            if hasattr(body, "close"):
                body.close()
    except Exception as error:  # noqa: BLE001  # whatever reaches the server
        result.error = error
    return result


def application(
    before: Callable[[Session], object] = lambda session: None,
    *,
    status: str = "200 OK",
    headers: Iterable[tuple[str, str]] = PLAIN,
    body: Callable[[Session], Iterable[bytes]] = lambda session: [b"one ", b"two"],
) -> App:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        session = Session.of(environ)
        before(session)
        start_response(status, list(headers))
        return body(session)

    return app


def put(**data: Any) -> Callable[[Session], None]:
    return lambda session: session.update(data)


def failing(session: Session) -> Iterator[bytes]:
    fail(session)
    yield b"never"


class Body:
    """An iterable that counts how often it is closed."""

    def __init__(self, chunks: Iterable[bytes], at_close: Callable[[], object] = lambda: None) -> None:
        self._chunks = iter(chunks)
        self._at_close = at_close
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._chunks)

    def close(self) -> None:
        self.closed += 1
        self._at_close()


# ── the commit and the headers ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", [list, tuple, iter, Body])
def test_the_commit_is_done_when_the_first_byte_leaves(shm_store: SessionStore, kind: Callable[[Any], Any]) -> None:
    counts: list[int] = []
    app = application(put(a=1), body=lambda session: kind([b"one ", b"two"]))
    result = exchange(shm_store, app, watch=lambda: counts.append(shm_store.count()), validate=kind is not tuple)
    assert result.error is None
    assert counts == [1, 1]
    assert (result.body, result.starts) == (b"one two", 1)
    assert stored(shm_store, result.cookie) == {"a": 1}


def test_a_generator_may_change_the_session_until_its_first_chunk(shm_store: SessionStore) -> None:
    def body(session: Session) -> Iterator[bytes]:
        session["b"] = 2
        yield b"x"

    result = exchange(shm_store, application(put(a=1), body=body))
    assert stored(shm_store, result.cookie) == {"a": 1, "b": 2}


def test_an_application_that_is_a_generator_itself_works(shm_store: SessionStore) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterator[bytes]:
        Session.of(environ)["a"] = 1
        start_response("200 OK", PLAIN)
        yield b"x"

    result = exchange(shm_store, app)
    assert (result.body, stored(shm_store, result.cookie)) == (b"x", {"a": 1})


def test_an_application_that_never_looks_gets_its_response_untouched(shm_store: SessionStore) -> None:
    result = exchange(shm_store, application(), cookie_of(shm_store, a=1))
    assert result.headers.items() == PLAIN


def test_reading_adds_vary_and_nothing_else(shm_store: SessionStore) -> None:
    result = exchange(shm_store, application(lambda session: session["a"]), cookie_of(shm_store, a=1))
    assert [(name.lower(), value) for name, value in result.headers.items()] == [
        ("content-type", "text/plain"), ("vary", "Cookie"),
    ]  # fmt: skip


def test_the_applications_own_headers_stay(shm_store: SessionStore) -> None:
    own = [*PLAIN, ("Set-Cookie", "theme=dark"), ("Vary", "Accept"), ("Vary", "X-A"), ("Cache-Control", "max-age=60")]
    result = exchange(shm_store, application(put(a=1), headers=own))
    assert result.headers.get_all("set-cookie")[0] == "theme=dark"
    assert len(result.headers.get_all("set-cookie")) == 2
    assert [set(text.split(", ")) for text in result.headers.get_all("vary")] == [{"Accept", "X-A", "Cookie"}]
    assert result.headers.get_all("cache-control") == ["no-store"]


@pytest.mark.parametrize("body", [[], [b""], [b"", b""]])
def test_an_empty_body_has_headers_and_a_commit_too(shm_store: SessionStore, body: list[bytes]) -> None:
    for kind in (list, iter):
        result = exchange(shm_store, application(put(a=1), body=lambda session, kind=kind: kind(body)))  # type: ignore[misc]
        assert result.error is None
        assert (result.starts, result.body) == (1, b"")
        assert stored(shm_store, result.cookie) == {"a": 1}


def test_an_empty_first_chunk_does_not_reach_the_server_before_the_headers(shm_store: SessionStore) -> None:
    result = exchange(shm_store, application(put(a=1), body=lambda session: iter([b"", b"x"])))
    assert (result.error, result.body) == (None, b"x")
    assert stored(shm_store, result.cookie) == {"a": 1}


@pytest.mark.parametrize(
    ("status", "headers"), [("204 No Content", []), ("304 Not Modified", []), ("302 Found", PLAIN)]
)
def test_any_status_below_500_commits(shm_store: SessionStore, status: str, headers: list[tuple[str, str]]) -> None:
    result = exchange(shm_store, application(put(a=1), status=status, headers=headers, body=lambda session: []))
    assert result.error is None
    assert stored(shm_store, result.cookie) == {"a": 1}


def test_a_head_request_commits(shm_store: SessionStore) -> None:
    app = application(put(a=1), body=lambda session: [])
    result = exchange(shm_store, app, environ={"REQUEST_METHOD": "HEAD"})
    assert result.error is None
    assert stored(shm_store, result.cookie) == {"a": 1}


def test_a_status_of_500_drops_the_changes_unless_they_are_to_be_kept(shm_store: SessionStore, tmp_path: Any) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, application(put(a=2), status="500 Oh"), cookie)
    assert "set-cookie" not in result.headers
    assert stored(shm_store, cookie) == {"a": 1}
    with make_store(tmp_path / "s", save_on_error=True) as keeping:
        cookie = cookie_of(keeping, a=1)
        exchange(keeping, application(put(a=2), status="500 Oh"), cookie)
        assert stored(keeping, cookie) == {"a": 2}


# ── start_response and write() ─────────────────────────────────────────────────────────────────────────────────


def test_write_sends_the_headers_and_commits_before_its_data(shm_store: SessionStore) -> None:
    counts: list[int] = []

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        Session.of(environ)["a"] = 1
        write = start_response("200 OK", PLAIN)
        write(b"by write, ")
        Session.of(environ)["b"] = 2
        return [b"by return"]

    result = exchange(shm_store, app, watch=lambda: counts.append(shm_store.count()), validate=False)
    assert (result.body, result.starts, counts) == (b"by write, by return", 1, [1, 1])
    assert stored(shm_store, result.cookie) == {"a": 1, "b": 2}


def broken_after(send_first: bytes) -> App:
    """Fails after start_response, and replaces its answer by an error page, as PEP 3333 shows."""

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        session = Session.of(environ)
        session["a"] = 2
        write = start_response("200 OK", PLAIN)
        try:
            if send_first:
                write(send_first)
            raise LookupError("the application broke")
        except LookupError:
            import sys

            start_response("500 Broken", PLAIN, sys.exc_info())
            return [b"error page"]

    return app


def test_start_response_may_replace_the_answer_until_the_first_byte(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, broken_after(b""), cookie)
    assert (result.error, result.status, result.body, result.starts) == (None, "500 Broken", b"error page", 1)
    assert stored(shm_store, cookie) == {"a": 1}, "what a 500 changed is dropped"


def test_after_the_first_byte_start_response_raises_what_happened(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    result = exchange(shm_store, broken_after(b"first"), cookie, validate=False)
    assert isinstance(result.error, LookupError)
    assert (result.status, result.body) == ("200 OK", b"first")
    assert stored(shm_store, cookie) == {"a": 2}


def test_a_second_start_response_without_exc_info_is_the_applications_error(shm_store: SessionStore) -> None:
    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        start_response("200 OK", PLAIN)
        start_response("200 OK", PLAIN)
        return []

    assert isinstance(exchange(shm_store, app).error, AssertionError)


def test_a_body_without_start_response_is_the_applications_error(shm_store: SessionStore) -> None:
    for body in ([b"x"], iter([b"x"])):
        result = exchange(shm_store, lambda environ, start_response, body=body: body, validate=False)  # type: ignore[misc]
        assert isinstance(result.error, AssertionError)


# ── exceptions, close(), what comes late ───────────────────────────────────────────────────────────────────────


def fail(_: Session) -> None:
    raise LookupError("the application broke")


def test_an_exception_before_the_headers_drops_the_changes_and_goes_on(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)

    def broken(session: Session) -> None:
        session["a"] = 2
        session.increment("n")
        fail(session)

    result = exchange(shm_store, application(broken), cookie)
    assert isinstance(result.error, LookupError)
    assert result.starts == 0
    assert stored(shm_store, cookie) == {"a": 1, "n": 1}, "increment has happened already"


@pytest.mark.parametrize("chunks", [0, 1])
def test_an_exception_in_the_body_drops_what_the_headers_did_not_commit(shm_store: SessionStore, chunks: int) -> None:
    cookie = cookie_of(shm_store, a=1)

    def body(session: Session) -> Iterator[bytes]:
        yield from [b"x"] * chunks
        session["late"] = 1
        fail(session)

    result = exchange(shm_store, application(put(a=2), body=body), cookie)
    assert isinstance(result.error, LookupError)
    assert result.starts == chunks
    assert stored(shm_store, cookie) == {"a": 2 if chunks else 1}


def test_save_on_error_keeps_what_a_failing_body_did(tmp_path: Any) -> None:
    with make_store(tmp_path / "s", save_on_error=True) as store:
        cookie = cookie_of(store, a=1)

        def body(session: Session) -> Iterator[bytes]:
            yield b"x"
            session["late"] = 1
            fail(session)

        assert isinstance(exchange(store, application(body=body), cookie).error, LookupError)
        assert stored(store, cookie) == {"a": 1, "late": 1}


def test_changes_after_the_headers_are_committed_at_the_end(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)

    def body(session: Session) -> Iterator[bytes]:
        yield b"x"
        session["late"] = 1
        yield b"y"
        session["later"] = 2

    assert exchange(shm_store, application(put(b=2), body=body), cookie).error is None
    assert stored(shm_store, cookie) == {"a": 1, "b": 2, "late": 1, "later": 2}


def test_a_client_that_hangs_up_leaves_what_was_done_so_far(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    bodies: list[Body] = []

    def chunks(session: Session) -> Iterator[bytes]:
        yield b"x"
        raise AssertionError("nobody asked for more")

    def body(session: Session) -> Body:
        bodies.append(Body(chunks(session), at_close=lambda: session.update(closed=True)))
        return bodies[0]

    assert exchange(shm_store, application(put(a=2), body=body), cookie, hang_up=True).error is None
    assert bodies[0].closed == 1
    assert stored(shm_store, cookie) == {"a": 2, "closed": True}


def test_a_new_session_after_the_headers_is_a_loud_error(shm_store: SessionStore) -> None:
    def body(session: Session) -> Iterator[bytes]:
        yield b"x"
        session["a"] = 1

    result = exchange(shm_store, application(body=body))
    assert isinstance(result.error, ResponseStarted)
    assert shm_store.count() == 0


@pytest.mark.parametrize("trouble", ["none", "raises", "full", "too large", "hangs up"])
def test_close_is_called_exactly_once_whatever_happens(shm_store: SessionStore, trouble: str) -> None:
    cookie = cookie_of(shm_store, items=["x"])
    bodies: list[Body] = []

    def body(session: Session) -> Body:
        if trouble == "too large":
            session["items"].extend(["y" * 1000] * 100)
        chunks: Iterable[bytes] = [b"x", b"y"]
        if trouble == "raises":
            chunks = failing(session)
        bodies.append(Body(chunks))
        return bodies[0]

    if trouble == "full":
        full(shm_store)
    app = application(put(big="z" * 20_000) if trouble == "full" else lambda session: None, body=body)
    exchange(shm_store, app, "" if trouble == "full" else cookie, hang_up=trouble == "hangs up")
    assert [found.closed for found in bodies] == [1]


@pytest.mark.parametrize("trouble", ["none", "full", "too large"])
def test_a_file_for_the_servers_own_wrapper_stays_one_and_is_closed_once(shm_store: SessionStore, trouble: str) -> None:
    cookie = cookie_of(shm_store, items=["x"])
    file = Closing(b"content")

    def app(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        session = Session.of(environ)
        if trouble == "none":
            session["a"] = 1
        elif trouble == "full":
            session["big"] = "z" * 20_000
        else:
            session["items"].extend(["y" * 1000] * 100)
        start_response("200 OK", PLAIN)
        body: Iterable[bytes] = environ["wsgi.file_wrapper"](file, 4)
        return body

    if trouble == "full":
        full(shm_store)
        cookie = ""
    seen: list[object] = []
    original = SessionMiddleware.__call__

    class Watched(SessionMiddleware):
        def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
            body = original(self, environ, start_response)
            seen.append(type(body))
            return body

    environ = {"wsgi.file_wrapper": FileWrapper}
    result = exchange(shm_store, Watched(app, shm_store), cookie, environ=environ, validate=False, skip="/")
    assert file.closings == 1
    if trouble == "none":
        assert (seen, result.body) == ([FileWrapper], b"content")
        assert stored(shm_store, cookie)["a"] == 1
    elif trouble == "full":
        unavailable(result)
    else:
        assert isinstance(result.error, SessionTooLarge)


class Closing(io.BytesIO):
    """A file that counts its closings."""

    closings = 0

    def close(self) -> None:
        self.closings += 1
        super().close()


# ── a store that cannot serve ──────────────────────────────────────────────────────────────────────────────────


def unavailable(result: Exchange) -> None:
    assert result.error is None
    assert (result.status[:3], result.starts) == ("503", 1)
    assert int(result.headers["retry-after"] or 0) > 0
    assert result.headers["cache-control"] == "no-store"
    assert "set-cookie" not in result.headers
    assert int(result.headers["content-length"] or 0) == len(result.body)


def full(store: SessionStore) -> None:
    """Fill the store with new sessions until it refuses one."""
    try:
        while True:
            session = store.session()
            session["ballast"] = "x" * 20_000
            session.save()
    except StoreFull:
        pass


@pytest.mark.parametrize("kind", [list, iter, Body])
def test_a_full_store_answers_503_before_any_header_of_the_application(
    shm_store: SessionStore, kind: Callable[[Any], Any]
) -> None:
    full(shm_store)
    app = application(put(a="x" * 20_000), body=lambda session: kind([b"one"]))
    unavailable(exchange(shm_store, app))


def test_a_page_of_our_own_has_no_body_for_head(place: Path) -> None:
    """A server that sends one all the same would put it before the answer to the connection's next request."""
    with make_store(place, mode=SessionMode.OPT_IN) as store:

        def withdraw(session: Session) -> None:
            session.set_store(False)
            raise ValueError

        full(store)
        for app, status in ((application(put(a="x" * 20_000)), "503"), (application(withdraw), "500")):
            for method in ("GET", "HEAD"):
                consent = "session-storable=true" if status == "503" else ""
                result = exchange(store, app, consent, environ={"REQUEST_METHOD": method}, validate=False)
                assert (result.status[:3], bool(result.body)) == (status, method == "GET")
                assert int(result.headers["content-length"] or 0) > 0


def test_a_store_error_in_the_application_or_its_generator_answers_503(shm_store: SessionStore) -> None:
    full(shm_store)

    def save(session: Session) -> None:
        session["a"] = "x" * 20_000
        session.save()

    def body(session: Session) -> Iterator[bytes]:
        save(session)
        yield b"x"

    unavailable(exchange(shm_store, application(save)))
    unavailable(exchange(shm_store, application(body=body)))


# ── skip, readonly ─────────────────────────────────────────────────────────────────────────────────────────────


def whole_environ(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
    try:
        Session.of(environ)["a"] = 1
        body = b"session"
    except NoSessionError:
        body = b"none"
    except ReadOnlySession:
        body = b"readonly"
    start_response("200 OK", PLAIN)
    return [body]


@pytest.mark.parametrize(
    ("options", "script", "path", "says"),
    [
        ({"skip": "/static"}, "", "/static/a.css", b"none"),
        ({"skip": "/static"}, "/static", "/a.css", b"none"),
        ({"skip": "/static"}, "", "/statics", b"session"),
        ({"skip": lambda path: path.endswith(".css")}, "", "/a.css", b"none"),
        ({"readonly": "/api"}, "", "/api", b"readonly"),
        ({"readonly": "/api"}, "", "/", b"session"),
        ({"readonly": "/", "skip": ["/a", "/api"]}, "", "/api", b"none"),
    ],
)
def test_paths_can_be_skipped_or_read_only(
    shm_store: SessionStore, options: Any, script: str, path: str, says: bytes
) -> None:
    result = exchange(shm_store, whole_environ, environ={"SCRIPT_NAME": script, "PATH_INFO": path}, **options)
    assert result.body == says
    assert shm_store.count() == (says == b"session")
    assert ("vary" in result.headers) is (says != b"none")


def test_an_inner_middleware_makes_its_own_paths_read_only(shm_store: SessionStore) -> None:
    """One around a part of the application, with the store of the one around the whole."""
    inner = SessionMiddleware(whole_environ, shm_store, readonly="/api")
    for path, says in (("/api", b"readonly"), ("/", b"session"), ("/files", b"readonly")):
        result = exchange(shm_store, inner, environ={"SCRIPT_NAME": "", "PATH_INFO": path}, readonly="/files")
        assert (result.body, result.error) == (says, None)


# ── Flask ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_flask_finds_it_and_a_late_generator_keeps_it(shm_store: SessionStore) -> None:
    app = flask.Flask(__name__)
    app.wsgi_app = SessionMiddleware(app.wsgi_app, shm_store)  # type: ignore[method-assign]

    @app.get("/")
    def count() -> flask.Response:
        session = Session.of(flask.request)
        session["n"] = session.get("n", 0) + 1

        def chunks() -> Iterator[bytes]:
            yield b"%d" % session["n"]
            session["streamed"] = True

        return flask.Response(chunks())

    client = app.test_client()
    assert [client.get("/").data for _ in range(3)] == [b"1", b"2", b"3"]
    cookie = client.get_cookie("session")
    assert cookie is not None
    assert stored(shm_store, f"session={cookie.value}") == {"n": 3, "streamed": True}
