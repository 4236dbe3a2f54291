"""Routing on the path as the client spelled it, so that a value in it may hold a slash.

A server hands over a path that is already decoded, and ``/set/a%2Fb/c`` can then no longer be told from ``/set/a/b/c``.
The wrappers here give the application a path that is still encoded, every segment in one spelling; the examples' own
``text`` convertors decode a value once it has been matched. Nothing in this file has to do with sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote, unquote_to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from starlette.types import ASGIApp, Receive, Scope, Send


def encoded(path: bytes) -> str:
    """``path`` with each segment encoded in one spelling; bytes that are not UTF-8 become U+FFFD."""
    segments = (unquote_to_bytes(segment).decode(errors="replace") for segment in path.split(b"/"))
    return "/".join(quote(segment, safe="") for segment in segments)


def encoded_path_asgi(app: ASGIApp) -> ASGIApp:
    """Give ``app`` a ``scope["path"]`` that is still encoded."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            sent = scope.get("raw_path") or b""
            path = sent if sent.startswith(b"/") else quote(scope["path"]).encode()
            scope = {**scope, "path": encoded(path)}
        await app(scope, receive, send)

    return wrapped


def encoded_path_wsgi(app: WSGIApplication) -> WSGIApplication:
    """Give ``app`` a ``PATH_INFO`` that is still encoded."""

    def wrapped(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        sent = environ.get("RAW_URI", "").partition("?")[0].removeprefix(environ.get("SCRIPT_NAME", ""))
        path = sent if sent.startswith("/") else quote(environ.get("PATH_INFO", ""), encoding="latin-1")
        return app({**environ, "PATH_INFO": encoded(path.encode("latin-1"))}, start_response)

    return wrapped
