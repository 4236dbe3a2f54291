"""Sessions for ASGI applications: Starlette, FastAPI, Litestar, Quart, Django's ASGI handler, or none of them."""

import logging
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

from .commit import Outcome
from .errors import ShmSessionError, StoreError
from .finding import Wanted
from .headers import (
    FAILED,
    FAILED_BODY,
    RETRY_AFTER,
    UNAVAILABLE,
    UNAVAILABLE_BODY,
    RawHeaders,
    with_session_headers,
)
from .paths import Rule, matcher
from .session import ENVIRON_KEY, Session
from .store import SessionStore
from .transport import Presented, Transport

logger = logging.getLogger("shmsession")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class SessionMiddleware:
    """Gives http and websocket scopes a session, as `scope["session"]` (Starlette: `request.session`).

    `store` None makes one from the SHMSESSION_* variables. `skip` and `readonly` take path prefixes or a predicate of
    the path: skipped paths have no session, read-only ones cannot change it. It is opened when the application starts,
    so that a wrong setting stops the server there. A store that cannot serve answers 503 with Retry-After.
    """

    def __init__(self, app: App, store: SessionStore | None = None, *, skip: Rule = (), readonly: Rule = ()) -> None:
        self.app = app
        self.store = store or SessionStore()
        self._skip = matcher(skip)
        self._readonly = matcher(readonly)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection (ASGI 3)."""
        kind = scope["type"]
        if kind == "lifespan":
            await self._lifespan(scope, receive, send)
            return
        if kind not in ("http", "websocket") or (self._skip is not None and self._skip(scope["path"])):
            await self.app(scope, receive, send)
            return
        held = scope.get(ENVIRON_KEY)
        readonly = self._readonly is not None and self._readonly(scope["path"])
        if held is not None and held.port is self.store:  # a middleware further out has it in hand
            held.readonly = held.readonly or readonly
            await self.app(scope, receive, send)
            return
        carried = partial(_carried, scope["headers"], scope.get("client"))
        credential: Any = carried
        if not self.store.transport.is_simple:
            credential = partial(carried, self.store.transport)
        if self.store.is_persistent:
            credential = self.store.look_ahead(credential)
            if type(credential) is Wanted:
                credential = await self.store.fetch(credential)
        session = self.store.request_session(credential, readonly=readonly)
        session.carried = carried
        scope["session"] = scope[ENVIRON_KEY] = session
        if kind == "websocket":
            await self._websocket(session, scope, receive, send)
            return
        store, refused = self.store, False

        async def send_after_commit(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and not session.headers_sent:
                try:
                    outcome = store.commit(session, failed=message["status"] >= 500)
                except StoreError as error:  # not raised into the application, whose own handlers would make it a 500
                    refused = True
                    session.discard()
                    await self._unavailable(session, send, error)
                    return
                session.headers_sent = True
                if outcome.through:
                    await store.persisted(outcome.through)
                if outcome.vary:
                    message = _with_headers(message, outcome, scope, store)
                if session.unavailable and message["status"] == 500:
                    headers = [*message.get("headers", ()), RETRY_AFTER]
                    message = {**message, "status": 503, "headers": headers}
            if not refused:
                await send(message)

        try:
            await self.app(scope, receive, send_after_commit)
        except StoreError as error:
            if session.headers_sent:
                raise
            await self._unavailable(session, send, error)
        except Exception:  # whatever the application raised goes on to the server
            await self._failed(session, send)
            raise
        else:
            if not (refused or (session.headers_sent and session.is_settled)):  # as commit() asks, a call earlier
                await self._commit_rest(session)

    async def _unavailable(self, session: Session, send: Send, error: StoreError) -> None:
        logger.error("answered 503: %s", error)
        withdrawn = self.store.withdrawn(session)
        session.headers_sent = True
        await self._page(send, withdrawn, 503, UNAVAILABLE, UNAVAILABLE_BODY)

    async def _failed(self, session: Session, send: Send) -> None:
        """An exception on its way to the server drops the changes, unless they are to be kept.

        That the visitor withdrew their consent must arrive: then the error page is ours.
        """
        withdrawn = self.store.withdrawn(session)
        self.store.commit_failed(session)
        if withdrawn.headers:
            try:
                await self._page(send, withdrawn, 500, FAILED, FAILED_BODY)
            except Exception as error:  # noqa: BLE001  # the application's own must arrive
                logger.warning("a visitor's choice could not be sent: %s", error)

    async def _page(self, send: Send, outcome: Outcome, status: int, headers: RawHeaders, body: bytes) -> None:
        """Send a page of our own, with what its session asks of it."""
        if outcome.through:
            await self.store.persisted(outcome.through)
        if outcome.headers:
            headers = with_session_headers(headers, outcome.headers, self.store.transport.vary)
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    async def _websocket(self, session: Session, scope: Scope, receive: Receive, send: Send) -> None:
        store = self.store

        async def receive_and_commit() -> Message:
            message = await receive()
            if message["type"] == "websocket.disconnect" and session.headers_sent:
                await self._commit_rest(session)
            return message

        async def send_after_commit(message: Message) -> None:
            kind = message["type"]
            if kind in ("websocket.accept", "websocket.http.response.start"):
                outcome = store.commit(session, failed=message.get("status", 101) >= 500)
                session.headers_sent = True
                if outcome.through:
                    await store.persisted(outcome.through)
                if outcome.vary:
                    message = _with_headers(message, outcome, scope, store)
            elif kind == "websocket.close":
                await self._commit_rest(session)
            await send(message)

        try:
            await self.app(scope, receive_and_commit, send_after_commit)
        except StoreError:
            if session.headers_sent:
                raise
            await send({"type": "websocket.close", "code": 1013, "reason": "sessions are unavailable"})
        except Exception:  # whatever the application raised goes on to the server
            store.commit_failed(session)
            raise
        else:
            await self._commit_rest(session)

    async def _commit_rest(self, session: Session) -> None:
        """Commit what came after the headers, if any left; where the backend is to be waited for, the end waits."""
        outcome = self.store.commit(session, failed=not session.headers_sent)
        if outcome.through:
            await self.store.persisted(outcome.through)

    async def _lifespan(self, scope: Scope, receive: Receive, send: Send) -> None:
        first: list[Message] = [await receive()]
        try:
            self.store.open()
        except ShmSessionError as error:
            await send({"type": "lifespan.startup.failed", "message": f"shmsession: {error}"})
            return

        async def receive_again() -> Message:
            return first.pop() if first else await receive()

        async def send_after_flush(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown."):  # after it the server need not wait any more
                try:
                    await self.store.flush()
                except StoreError as error:
                    logger.warning("sessions wait for the next start: %s", error)
            await send(message)

        try:
            await self.app(scope, receive_again, send_after_flush)
        finally:
            self.store.close()


def _cookie_header(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """The Cookie header; HTTP/2 may split it into several (RFC 9113)."""
    found = b""
    for name, value in headers:
        if name == b"cookie":
            found = found + b"; " + value if found else value
    return found


def _header(headers: Iterable[tuple[bytes, bytes]], wanted: bytes) -> bytes | None:
    """One header by its lower-case name; several as a list."""
    if wanted == b"cookie":
        return _cookie_header(headers)
    found = [value for name, value in headers if name == wanted]
    return b",".join(found) if found else None


def _carried(
    headers: Iterable[tuple[bytes, bytes]], client: Any, transport: Transport | None = None
) -> bytes | Presented:
    """A request's Cookie header, or all that a transport may look at. `client`: where the connection came from; None
    for one by a unix socket."""
    if transport is None:
        return _cookie_header(headers)
    return transport.presented(partial(_header, headers), str(client[0]) if client else "")


def _with_headers(message: Message, outcome: Outcome, scope: Scope, store: SessionStore) -> Message:
    if outcome.set_cookie is not None:
        store.note_scheme(scope.get("scheme", "http"))
    headers = message.get("headers", ())
    if type(headers) is not list:
        headers = list(headers)
    return {**message, "headers": with_session_headers(headers, outcome.headers, store.transport.vary)}
