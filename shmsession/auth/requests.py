"""What is asked of a request, whatever framework it is of, and how each of them is told that it is refused.

No framework is imported that the application has not imported.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final, NoReturn
from urllib.parse import parse_qs

from shmsession.errors import Forbidden, NoSessionError, NotLoggedIn
from shmsession.session import find_session

HEADER: Final = "x-csrf-token"
FIELD: Final = "csrf_token"
SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
"""Methods that change nothing (RFC 9110, 9.2.1), and need no token."""

_URLENCODED: Final = "application/x-www-form-urlencoded"
_POLICY_VIOLATION: Final = 1008
_MANY: Final = 1000


def find(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The request that a view was called with, or Flask's. Raises NoSessionError.

    One of a framework before whatever else knows the session, such as an endpoint of Starlette's with its scope.
    """
    found = [candidate for candidate in (*arguments, *named.values()) if _has_session(candidate)]
    if found:
        return next((request for request in found if _is_starlettes(request) or _is_werkzeugs(request)), found[0])
    flask = sys.modules.get("flask")
    if flask is not None and flask.has_request_context():
        return flask.request
    raise NoSessionError(
        "auth.requires() found no request with a session among the view's arguments: let the view take one, such as "
        "request: Request, and check that the SessionMiddleware does not skip its path"
    )


def _has_session(candidate: Any) -> bool:
    try:
        find_session(candidate)
    except NoSessionError:
        return False
    return True


def _is_starlettes(request: Any) -> bool:
    starlette: Any = sys.modules.get("starlette.requests")
    return starlette is not None and isinstance(request, starlette.HTTPConnection)


def _is_werkzeugs(request: Any) -> bool:
    werkzeug: Any = sys.modules.get("werkzeug.wrappers")
    return werkzeug is not None and isinstance(request, werkzeug.Request)


def _carrier(request: Any) -> Mapping[str, Any]:
    """The ASGI scope or WSGI environ."""
    return find_session(request)[0]


def is_websocket(request: Any) -> bool:
    """Whether it is the handshake of one."""
    return _carrier(request).get("type") == "websocket"


def method_of(request: Any) -> str:
    """GET, POST, …; of a websocket GET."""
    carrier = _carrier(request)
    return str(carrier.get("REQUEST_METHOD") or carrier.get("method") or "GET").upper()


def header_of(request: Any, name: str) -> str | None:
    """A header by its lower-case name; None without it."""
    carrier = _carrier(request)
    if "REQUEST_METHOD" in carrier:
        key = name.upper().replace("-", "_")
        found = carrier.get(key if key == "CONTENT_TYPE" else f"HTTP_{key}")
        return None if found is None else str(found)
    raw = name.encode()
    return next((value.decode("latin-1") for key, value in carrier.get("headers", ()) if key == raw), None)


def is_cross_site(request: Any) -> bool:
    """Whether the browser says that another site sent it. One that says nothing, or is no browser, is not accused."""
    site = header_of(request, "sec-fetch-site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin, host = header_of(request, "origin"), header_of(request, "host")
    return origin is not None and (not host or origin.partition("://")[2].lower() != host.lower())


def token_in(request: Any) -> str | None:
    """The CSRF token in its header, or in the form of a WSGI framework."""
    token = header_of(request, HEADER)
    for name in ("form", "POST"):
        fields = None if token is not None else getattr(request, name, None)
        if isinstance(fields, Mapping):
            token = fields.get(FIELD)
    return token


async def token_awaited(request: Any) -> str | None:
    """The same, and in a urlencoded form of Starlette's, whose body the view can read once more."""
    token = token_in(request)
    read: Callable[[], Any] | None = getattr(request, "body", None)
    if token is None and callable(read) and (header_of(request, "content-type") or "").startswith(_URLENCODED):
        try:
            body: bytes = await read()
        except RuntimeError:  # FastAPI has read the form, for the view's own parameters
            found: Any = (await request.form()).get(FIELD)
            return found  # type: ignore[no-any-return]
        with suppress(ValueError):  # so many fields no form has
            token = parse_qs(body.decode("latin-1"), max_num_fields=_MANY).get(FIELD, [None])[-1]
    return token


def refuse(request: Any, error: NotLoggedIn | Forbidden) -> NoReturn:
    """Answer 401 or 403 by the framework's own means; without one raise the error."""
    status, reason = 401 if isinstance(error, NotLoggedIn) else 403, str(error)
    if _is_starlettes(request):
        from starlette.exceptions import HTTPException, WebSocketException

        if is_websocket(request):
            raise WebSocketException(_POLICY_VIOLATION, reason)
        raise HTTPException(status, reason)
    if _is_werkzeugs(request):
        from werkzeug.exceptions import abort

        abort(status, reason)
    raise error
