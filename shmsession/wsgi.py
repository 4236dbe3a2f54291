"""Sessions for WSGI applications: Flask, Django, Pyramid, Bottle, or none of them."""

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from .commit import Outcome
from .errors import StoreError
from .headers import (
    FAILED,
    FAILED_BODY,
    RETRY_AFTER,
    UNAVAILABLE,
    UNAVAILABLE_BODY,
    RawHeaders,
    as_text,
    with_session_headers,
)
from .paths import Rule, matcher
from .session import ENVIRON_KEY, Session
from .store import SessionStore
from .transport import Presented, Transport

logger = logging.getLogger("shmsession")

Environ = dict[str, Any]
Headers = list[tuple[str, str]]
Write = Callable[[bytes], object]
StartResponse = Callable[..., Write]
App = Callable[[Environ, StartResponse], Iterable[bytes]]


class SessionMiddleware:
    """Gives every request a session, as `environ["shmsession.session"]`; `Session.of(request)` finds it.

    `store` None makes one from the SHMSESSION_* variables. `skip` and `readonly` take path prefixes or a predicate of
    the path: skipped paths have no session, read-only ones cannot change it. The commit happens when the first byte of
    the body is there. A store that cannot serve answers 503 with Retry-After.
    """

    def __init__(self, app: App, store: SessionStore | None = None, *, skip: Rule = (), readonly: Rule = ()) -> None:
        self.app = app
        self.store = store or SessionStore()
        self._skip = matcher(skip)
        self._readonly = matcher(readonly)
        self._proxies = "HTTP_" + self.store.config.proxy_header.upper().replace("-", "_")

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Serve one request (PEP 3333)."""
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        if not path.isascii():
            path = path.encode("latin-1", "replace").decode("utf-8", "replace")
        if self._skip is not None and self._skip(path):
            return self.app(environ, start_response)
        readonly = self._readonly is not None and self._readonly(path)
        held = environ.get(ENVIRON_KEY)
        if held is not None and held.port is self.store:  # a middleware further out has it in hand
            held.readonly = held.readonly or readonly
            return self.app(environ, start_response)
        get = environ.get  # not the environ itself, of which the session is a part: that would be a circle
        peer, agent = get("REMOTE_ADDR", ""), get("HTTP_USER_AGENT", "")
        carried = partial(_carried, get("HTTP_COOKIE", ""), peer, get(self._proxies, ""), agent)
        credential: Any = carried
        if not self.store.transport.is_simple:
            credential = partial(self.store.transport.presented, partial(_header, environ), peer)
        session = self.store.request_session(credential, readonly=readonly)
        session.carried = carried
        environ[ENVIRON_KEY] = session
        response = _Response(self.store, session, start_response, environ)
        try:
            body = self.app(environ, response.start)
        except StoreError as error:
            if session.headers_sent:
                raise
            return response.unavailable(error)
        except Exception:  # whatever the application raised goes on to the server
            response.fail()
            raise
        wrapper = environ.get("wsgi.file_wrapper")
        whole = type(body) in (list, tuple) or (isinstance(wrapper, type) and isinstance(body, wrapper))
        return response.passed(body) if whole and not session.headers_sent else response.over(body)


class _Response:
    """One response: holds the status and headers back until the first byte, then commits and lets them go."""

    def __init__(self, store: SessionStore, session: Session, start_response: StartResponse, environ: Environ) -> None:
        self._store = store
        self._session = session
        self._start_response = start_response
        self._environ = environ
        self._started: tuple[str, Headers, Any] | None = None
        self._server_write: Write | None = None
        self._body: Iterable[bytes] = ()

    def start(self, status: str, headers: Headers, exc_info: Any = None) -> Write:
        """The application's start_response (PEP 3333): a second call needs `exc_info`."""
        if self._server_write is not None:
            return self._start_response(status, headers, exc_info)
        if self._started is not None and exc_info is None:
            raise AssertionError("start_response called a second time without exc_info (PEP 3333)")
        self._started = (status, headers, exc_info)
        return self._write

    def _write(self, data: bytes) -> object:
        return self._send_head()(data)

    def _send_head(self) -> Write:
        """Commit and call the server's start_response, once."""
        if self._server_write is not None:
            return self._server_write
        if self._started is None:
            raise AssertionError("the application sent its body before start_response (PEP 3333)")
        status, headers, exc_info = self._started
        try:
            outcome = self._store.commit(self._session, failed=status[:1] >= "5")
        except StoreError:  # write() raises it into the framework, which may make its own error page of it
            self._session.unavailable = True
            raise
        if outcome.vary:
            raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
            headers = as_text(with_session_headers(raw, outcome.headers, self._store.transport.vary))
        if outcome.through:
            self._store.sync.wait(outcome.through)
        if outcome.set_cookie is not None:
            self._store.note_scheme(self._environ.get("wsgi.url_scheme", "http"))
        if self._session.unavailable and status[:3] == "500":
            status, headers = "503 Service Unavailable", [*headers, *as_text([RETRY_AFTER])]
        self._session.headers_sent = True
        more = () if exc_info is None else (exc_info,)
        self._server_write = self._start_response(status, headers, *more)
        return self._server_write

    def passed(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """A complete list, or a file that the server may send by itself, stays what it is."""
        try:
            self._send_head()
        except StoreError as error:
            _close(body)
            return self.unavailable(error)
        except Exception:  # whatever the application raised goes on to the server
            _close(body)
            self.fail()
            raise
        return body

    def over(self, body: Iterable[bytes]) -> Iterable[bytes]:
        """The body with the commit before its first byte, and another after its last."""
        self._body = body
        return self

    def __iter__(self) -> Iterator[bytes]:
        try:
            for chunk in self._body:
                if self._server_write is None:
                    self._send_head()
                yield chunk
            self._send_head()
            self._commit_rest()
        except StoreError as error:
            if self._server_write is not None:
                self.fail()
                raise
            yield from self.unavailable(error)
        except Exception:  # whatever the application raised goes on to the server
            self.fail()
            raise

    def close(self) -> None:
        """Close the application's body, then commit what came after the headers."""
        try:
            _close(self._body)
        finally:
            if self._session.headers_sent:
                self._commit_rest()

    def _commit_rest(self) -> None:
        """Commit what came after the headers; where the backend is to be waited for, the end of the response waits."""
        outcome = self._store.commit(self._session)
        if outcome.through:
            self._store.sync.wait(outcome.through)

    def fail(self) -> None:
        """An exception on its way to the server drops the changes, unless they are to be kept.

        That the visitor withdrew their consent must arrive: then the error page is ours.
        """
        withdrawn = self._store.withdrawn(self._session)
        self._store.commit_failed(self._session)
        if withdrawn.headers:
            try:
                body = self._page(withdrawn, "500 Internal Server Error", FAILED, FAILED_BODY)
                if self._server_write is not None:
                    self._server_write(body)
            except Exception as error:  # noqa: BLE001  # the application's own must arrive
                logger.warning("a visitor's choice could not be sent: %s", error)

    def unavailable(self, error: StoreError) -> Iterable[bytes]:
        """503, before any header has left."""
        logger.error("answered 503: %s", error)
        session = self._session
        if session.loaded:
            session.discard()
            session.settle()
        withdrawn = self._store.withdrawn(session)
        session.headers_sent = True
        return [self._page(withdrawn, "503 Service Unavailable", UNAVAILABLE, UNAVAILABLE_BODY)]

    def _page(self, outcome: Outcome, status: str, headers: RawHeaders, body: bytes) -> bytes:
        """Begin a page of our own, with what its session asks of it. None has a body for HEAD: not every server sees to
        it, and the connection's next answer would begin with it."""
        if outcome.through:
            self._store.sync.wait(outcome.through)
        if outcome.headers:
            headers = with_session_headers(headers, outcome.headers, self._store.transport.vary)
        self._server_write = self._start_response(status, as_text(headers))
        return b"" if self._environ.get("REQUEST_METHOD") == "HEAD" else body


def _header(environ: Environ, wanted: bytes) -> bytes | None:
    """One header by its lower-case name, as CGI has it."""
    found = environ.get("HTTP_" + wanted.decode().upper().replace("-", "_"))
    return None if found is None else found.encode("latin-1", "replace")


def _carried(
    cookie: str, peer: str, forwarded: str, agent: str, transport: Transport | None = None
) -> bytes | Presented:
    """A request's Cookie header, or for a transport also what tells of the client."""
    raw = cookie.encode("latin-1", "replace")
    if transport is None:
        return raw
    return Presented(raw, peer=peer, forwarded=forwarded, agent=agent.encode("latin-1", "replace"))


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()
