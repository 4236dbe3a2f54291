"""A visitor of a store behind either middleware, in this process: it keeps cookies and its header as a client does."""

import asyncio
from collections.abc import Callable, Iterable
from http.cookies import SimpleCookie
from typing import Any, Final, NamedTuple

from shmsession import Session, SessionStore, asgi, wsgi
from shmsession.errors import CodecError
from shmsession.transport import Presented

PROTOCOLS: Final = ("asgi", "wsgi")
Action = Callable[[Session], Any]


class Broken(Exception):
    """What a broken application raises: the server answers then with 500, unless headers have left."""


RAISED: Final = (Broken, CodecError)


class Answer(NamedTuple):
    """What came back: status, headers in lower case, and what the application's function returned."""

    status: int
    headers: list[tuple[str, str]]
    result: Any

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def header(self, name: str) -> str | None:
        found = self.all(name)
        assert len(found) <= 1, found
        return found[0] if found else None


class Visitor:
    """Asks with `cookies`, or with `token` in the header `header`; `peer` is its address."""

    def __init__(self, store: SessionStore, protocol: str = "asgi", *, header: str | None = None) -> None:
        self.store, self.protocol, self.name = store, protocol, header
        self.cookies: dict[str, str] = {}
        self.token: str | None = "" if header else None
        self.consent: str | None = None
        self.peer, self.agent = "192.0.2.1", "Firefox"
        self.more: dict[str, str] = {}

    def ask(self, action: Action, status: int = 200) -> Answer:
        """One request whose application does `action`, and answers `status`; nothing is served out of turn."""
        answer = (_over_asgi if self.protocol == "asgi" else _over_wsgi)(self, action, status)
        for line in answer.all("set-cookie"):
            self._keep(line)
        if self.name:
            given = answer.header(self.name.lower())
            self.token = self.token if given is None else given
            self.consent = answer.header(f"{self.name.lower()}-storable") or self.consent
        return answer

    def _keep(self, line: str) -> None:
        ((name, morsel),) = SimpleCookie(line).items()
        if morsel["max-age"] == "0":
            self.cookies.pop(name, None)
        else:
            self.cookies[name] = morsel.value

    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(lambda session: session.to_dict()).result
        return found

    def presented(self) -> Presented:
        """What its request presents, for a session without a request."""
        headers = {name.lower().encode(): value.encode() for name, value in self.headers().items()}
        return self.store.transport.presented(lambda name: headers.get(name), self.peer)

    def headers(self) -> dict[str, str]:
        """What its request carries."""
        headers = {"User-Agent": self.agent, **self.more}
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if self.name and self.token is not None:
            headers[self.name] = self.token
        if self.name and self.consent is not None:
            headers[f"{self.name}-Storable"] = self.consent
        return headers


def _over_asgi(visitor: Visitor, action: Action, status: int) -> Answer:
    results: list[Any] = []
    sent: list[asgi.Message] = []

    async def app(scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
        results.append(action(Session.of(scope)))
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> asgi.Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: asgi.Message) -> None:
        sent.append(message)

    headers = [(name.lower().encode(), value.encode()) for name, value in visitor.headers().items()]
    scope = {"type": "http", "path": "/", "headers": headers, "client": (visitor.peer, 4711)}
    try:
        asyncio.run(asgi.SessionMiddleware(app, visitor.store)(scope, receive, send))
    except RAISED:
        if not sent:
            return Answer(500, [], None)
    raw = [(name.decode().lower(), value.decode()) for name, value in sent[0]["headers"]]
    return Answer(sent[0]["status"], raw, results[0] if results else None)


def _over_wsgi(visitor: Visitor, action: Action, status: int) -> Answer:
    results: list[Any] = []
    started: list[tuple[str, wsgi.Headers]] = []

    def app(environ: wsgi.Environ, start_response: wsgi.StartResponse) -> Iterable[bytes]:
        results.append(action(Session.of(environ)))
        start_response(f"{status} As told", [])
        return [b""]

    def start_response(line: str, headers: wsgi.Headers, _: Any = None) -> Callable[[bytes], object]:
        started.append((line, headers))
        return lambda _: None

    environ: wsgi.Environ = {"PATH_INFO": "/", "REMOTE_ADDR": visitor.peer}
    environ |= {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in visitor.headers().items()}
    try:
        body = wsgi.SessionMiddleware(app, visitor.store)(environ, start_response)
        list(body)
        close = getattr(body, "close", None)
        if close is not None:
            close()
    except RAISED:
        if not started:
            return Answer(500, [], None)
    line, headers = started[0]
    raw = [(name.lower(), value) for name, value in headers]
    return Answer(int(line.split(" ")[0]), raw, results[0] if results else None)
