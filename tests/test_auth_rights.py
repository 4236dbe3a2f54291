"""Rights, and what asks for them: decorators, dependencies, calls."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

import flask
import pytest
from fastapi import Depends, FastAPI
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect

from shmsession import Session, SessionStore, asgi, wsgi
from shmsession.auth import Auth, AuthConfig, AuthSession, Rights
from shmsession.errors import Forbidden, NoSessionError, NotLoggedIn
from shmsession.testing import login_cookie, make_store

READ, WRITE, NEVER = Rights.permission("read"), Rights.permission("write"), Rights.permission("never")


class Asked:
    """A user that notes what it was asked."""

    def __init__(self, *permissions: str) -> None:
        self.permissions = permissions
        self.asked: list[str] = []

    def has(self, permission: str) -> bool:
        self.asked.append(permission)
        return permission in self.permissions


class AskedAsync(Asked):
    async def has(self, permission: str) -> bool:  # type: ignore[override]
        await asyncio.sleep(0)
        return Asked.has(self, permission)


USERS = {"reader": Asked("read"), "writer": AskedAsync("read", "write")}


@pytest.fixture
def store(place: Path) -> Iterator[SessionStore]:
    store = make_store(place / "sessions")
    yield store
    store.close()


@pytest.fixture
def auth(store: SessionStore) -> Auth[Asked]:
    return Auth(store, USERS.get)


def request_of(session: Session, **scope: Any) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "headers": [], "session": session, **scope}


def logged_in(store: SessionStore, user_id: str) -> Session:
    session = store.session()
    session.renew(user_id=user_id)
    return session


@pytest.mark.parametrize(
    ("rights", "held", "asked"),
    [
        (READ, True, ["read"]),
        (WRITE, False, ["write"]),
        (Rights.all(READ, WRITE, NEVER), False, ["read", "write"]),
        (Rights.all(READ, READ), True, ["read", "read"]),
        (Rights.any(WRITE, READ, NEVER), True, ["write", "read"]),
        (Rights.any(WRITE, NEVER), False, ["write", "never"]),
        (Rights.none(WRITE, READ, NEVER), False, ["write", "read"]),
        (Rights.none(WRITE, NEVER), True, ["write", "never"]),
        (Rights.all(Rights.any(WRITE, READ), Rights.none(NEVER)), True, ["write", "read", "never"]),
        (Rights.none(Rights.all(READ, WRITE)), True, ["read", "write"]),
        (Rights.all(), True, []),
        (Rights.any(), False, []),
        (Rights.none(), True, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", [Asked, AskedAsync])
def test_rights_are_asked_for_in_their_order_until_they_are_decided(
    store: SessionStore, kind: type[Asked], rights: Rights, held: bool, asked: list[str]
) -> None:
    user = kind("read")
    auth = Auth(store, lambda _: user)
    request = request_of(logged_in(store, "ada"))
    assert auth.sync.load(request).has(rights) is held

    async def ask() -> bool:
        me = await auth.load(request)
        return await me.has(rights)

    assert asyncio.run(ask()) is held
    assert user.asked == [*asked, *asked]


def test_a_visitor_without_a_user_has_no_permission_and_the_anonymous_user_its_own(store: SessionStore) -> None:
    rights = [READ, WRITE, Rights.none(READ), Rights.none(WRITE)]
    nobody = Auth(store, USERS.get).sync.load(request_of(store.session()))
    assert [nobody.has(right) for right in rights] == [False, False, True, True]
    config = AuthConfig(anonymous_user_id="reader")
    guest = Auth(store, USERS.get, config=config).sync.load(request_of(store.session()))
    assert [guest.has(right) for right in rights] == [True, False, False, True]


def test_a_user_that_cannot_say_is_an_error_that_says_what_to_write(store: SessionStore) -> None:
    me = Auth(store, lambda _: "ada").sync.load(request_of(logged_in(store, "ada")))
    with pytest.raises(TypeError, match=r"a str cannot say .* has\(permission\)"):
        me.has(READ)


class Unclear:
    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def has(self, permission: str) -> Any:
        return self.answer


async def never_asked() -> AsyncIterator[bool]:
    yield False


@pytest.mark.parametrize("answer", [never_asked(), "no", None, [], lambda: False], ids=lambda one: type(one).__name__)
def test_a_user_that_does_not_answer_yes_or_no_may_do_nothing(store: SessionStore, answer: Any) -> None:
    """Whatever was meant: much of what is not False counts as true."""
    me = Auth(store, lambda _: Unclear(answer)).sync.load(request_of(logged_in(store, "ada")))
    for rights in (READ, Rights.none(READ)):
        with pytest.raises(TypeError, match=r"has\(\) of a Unclear returned a .*: let it return a bool"):
            me.has(rights)


@pytest.mark.parametrize("answer", [0, 1])
def test_what_databases_have_in_place_of_a_bool_is_an_answer(store: SessionStore, answer: int) -> None:
    me = Auth(store, lambda _: Unclear(answer)).sync.load(request_of(logged_in(store, "ada")))
    assert me.has(READ) is bool(answer)


def test_validate_says_whether_a_user_may_by_a_method(store: SessionStore, auth: Auth[Asked]) -> None:
    anybody, members = auth.requires(methods=["get", "HEAD"], login=False), auth.requires(READ)
    nobody, reader = (auth.sync.load(request_of(one)) for one in (store.session(), logged_in(store, "reader")))
    assert (anybody.validate(nobody), anybody.validate(nobody, "head"), anybody.validate(nobody, "POST")) == (
        True, True, False
    )  # fmt: skip
    assert (members.validate(nobody), members.validate(reader, "POST")) == (False, True)

    async def ask() -> bool:
        return await members.validate(await auth.load(request_of(logged_in(store, "writer"))))

    assert asyncio.run(ask())


# ── by the means of frameworks ────────────────────────────────────────────────────────────────────────────────


def statuses(client: Any, store: SessionStore, set_cookie: Any, path: str) -> list[int]:
    """Of nobody, of one without the right, of one who has it."""
    found = [client.get(path).status_code]
    for user in USERS:
        for name, value in login_cookie(store, user_id=user).items():
            set_cookie(name, value)
        found.append(client.get(path).status_code)
    return found


def test_starlettes_views_are_refused_with_401_and_403(store: SessionStore, auth: Auth[Asked]) -> None:
    @auth.requires(WRITE)
    async def view(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    @auth.requires(WRITE)
    def sync_view(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    class Endpoint(HTTPEndpoint):
        @auth.requires(WRITE)
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("ok")

    routes = [Route("/async", view), Route("/sync", sync_view), Route("/method", Endpoint)]
    app = Starlette(routes=routes)
    app.add_middleware(asgi.SessionMiddleware, store=store)
    for path in ("/async", "/sync", "/method"):
        client = TestClient(app)
        assert statuses(client, store, client.cookies.set, path) == [401, 403, 200], path
    assert (view.__name__, sync_view.__name__) == ("view", "sync_view")


def test_fastapis_dependencies_give_the_user_or_401_and_403(store: SessionStore, auth: Auth[Asked]) -> None:
    app = FastAPI()
    app.add_middleware(asgi.SessionMiddleware, store=store)
    Writer = Annotated[AuthSession[Asked], Depends(auth.requires(WRITE).dependency)]  # noqa: N806
    Anybody = Annotated[AuthSession[Asked], Depends(auth.requires(login=False).dependency)]  # noqa: N806

    async def write(me: Writer) -> str:
        return str(me.user_id)

    async def show(me: Anybody) -> str:
        return str(me.user_id)

    async def live(websocket: WebSocket, me: Writer) -> None:
        await websocket.accept()
        await websocket.send_text(str(me.user_id))
        await websocket.close()

    app.add_api_route("/write", write)
    app.add_api_route("/show", show)
    app.add_api_websocket_route("/live", live)
    client = TestClient(app)
    assert client.get("/write").json() == {"detail": "log in first"}
    assert client.get("/show").json() == "None"
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/live"):
        pass
    assert (refused.value.code, refused.value.reason) == (1008, "log in first")
    assert statuses(client, store, client.cookies.set, "/write") == [401, 403, 200]
    assert client.get("/write").json() == "writer"
    with client.websocket_connect("/live") as connection:
        assert connection.receive_text() == "writer"


def test_starlettes_websockets_are_closed_before_they_are_accepted(store: SessionStore, auth: Auth[Asked]) -> None:
    @auth.requires()
    async def live(websocket: WebSocket) -> None:
        raise AssertionError

    app = Starlette(routes=[WebSocketRoute("/", live)])
    app.add_middleware(asgi.SessionMiddleware, store=store)
    with pytest.raises(WebSocketDisconnect) as refused, TestClient(app).websocket_connect("/"):
        pass
    assert refused.value.code == 1008


def test_flasks_views_are_refused_with_401_and_403(store: SessionStore, auth: Auth[Asked]) -> None:
    app = flask.Flask("application")

    @app.get("/")
    @auth.requires(WRITE)
    def view() -> str:
        return "ok"

    app.wsgi_app = wsgi.SessionMiddleware(app.wsgi_app, store)  # type: ignore[method-assign]
    client = app.test_client()
    assert statuses(client, store, client.set_cookie, "/") == [401, 403, 200]


def test_without_a_framework_our_own_errors_are_raised(store: SessionStore, auth: Auth[Asked]) -> None:
    view = auth.requires(WRITE)(lambda request: "ok")
    with pytest.raises(NotLoggedIn):
        view(request_of(store.session()))
    with pytest.raises(NotLoggedIn):
        auth.requires(WRITE, login=False)(lambda request: "ok")(request_of(store.session()))
    with pytest.raises(Forbidden):
        view(request_of(logged_in(store, "reader")))
    assert view(request_of(logged_in(store, "writer"))) == "ok"
    environ = {"REQUEST_METHOD": "POST", "shmsession.session": logged_in(store, "writer")}
    assert view(environ) == "ok"
    websocket = request_of(store.session(), type="websocket", method=None)
    assert auth.requires(methods=["GET"], login=False)(lambda request: "ok")(websocket) == "ok", (
        "its handshake is a GET"
    )
    for refused in (environ, {"REQUEST_METHOD": "POST", "shmsession.session": store.session()}):
        with pytest.raises(Forbidden):
            auth.requires(methods=["GET"], login=False)(lambda request: "ok")(refused)


def test_what_looks_like_a_request_and_has_no_session_is_not_taken_for_one(
    store: SessionStore, auth: Auth[Asked]
) -> None:
    """Such as a body that a client has made up."""
    view = auth.requires(WRITE)(lambda body, request: "ok")
    for forged in ({"REQUEST_METHOD": "GET"}, {"type": "http", "headers": [], "session": {}}):
        assert view(forged, request_of(logged_in(store, "writer"))) == "ok"
        with pytest.raises(NotLoggedIn):
            view(forged, request_of(store.session()))


def test_a_view_without_a_request_is_an_error_that_says_so(auth: Auth[Asked]) -> None:
    with pytest.raises(NoSessionError, match="request: Request"):
        auth.requires()(lambda: "ok")()
