"""Forms that no other site can send: tokens, where they come from, and what browsers say of a request."""

import asyncio
import hmac
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import flask
import pytest
from fastapi import Depends, FastAPI, Form
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from shmsession import Session, SessionMode, SessionStore, asgi, wsgi
from shmsession.auth import Auth, AuthSession, SyncAuthSession, csrf
from shmsession.errors import Forbidden, NotCreated, ReadOnlySession, ResponseStarted
from shmsession.testing import make_store


@pytest.fixture
def store(place: Path) -> Iterator[SessionStore]:
    store = make_store(place / "sessions")
    yield store
    store.close()


@pytest.fixture
def auth(store: SessionStore) -> Auth[str]:
    return Auth(store, str)


def me_of(auth: Auth[str], session: Session) -> SyncAuthSession[str]:
    return auth.sync.load({"type": "http", "method": "GET", "headers": [], "session": session})


def logged_in(store: SessionStore) -> Session:
    session = store.session()
    session.renew(user_id="ada")
    session.save()
    return session


def test_tokens_differ_each_time_and_all_of_them_are_the_sessions(auth: Auth[str], store: SessionStore) -> None:
    me, other = me_of(auth, store.session()), me_of(auth, store.session())
    tokens = {me.csrf_token for _ in range(10)}
    assert len(tokens) == 10
    assert all(me.check_csrf(token) for token in tokens)
    assert not any(other.check_csrf(token) for token in tokens)
    assert not me.check_csrf(other.csrf_token)
    assert not any(me.check_csrf(wrong) for wrong in (None, "", "x", "x" * 86, "ü" * 86))


@pytest.mark.parametrize("sent", [7, True, ["x" * 86], {}, b"x" * 86], ids=repr)
def test_what_a_client_sends_as_json_is_no_token_unless_it_is_a_text(
    auth: Auth[str], store: SessionStore, sent: Any
) -> None:
    assert not me_of(auth, logged_in(store)).check_csrf(sent)


@given(token=st.text(), changed=st.integers(0, 85))
def test_what_is_no_token_is_refused_and_so_is_one_that_was_changed(token: str, changed: int) -> None:
    assert not csrf.belongs(token, "id")
    good = csrf.token_for("id")
    assert csrf.belongs(good, "id")
    spoilt = good[:changed] + ("A" if good[changed] != "A" else "B") + good[changed + 1 :]
    assert not csrf.belongs(spoilt, "id") or changed == 85  # the last character carries two bits that count for nothing


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    good, compared = csrf.token_for("id"), list[bool]()

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(hmac.compare_digest(one, other))
        return compared[-1]

    monkeypatch.setattr(csrf, "compare_digest", compare)
    assert [csrf.belongs(good, "id"), csrf.belongs(good, "other")] == compared == [True, False]


def test_a_form_begins_a_session_for_a_visitor_and_changes_none_that_is_there(
    auth: Auth[str], store: SessionStore
) -> None:
    session = store.request_session(lambda: b"")
    token = me_of(auth, session).csrf_token
    assert store.commit(session).set_cookie is not None
    assert session.id is not None
    again = store.session(session.id)
    assert me_of(auth, again).check_csrf(token)
    assert again.modified is False
    assert me_of(auth, again).csrf_token
    assert store.commit(again).set_cookie is None


def test_login_logout_and_a_new_id_make_older_tokens_worthless(auth: Auth[str], store: SessionStore) -> None:
    session = store.session()
    me = me_of(auth, session)
    tokens = [me.csrf_token]
    me.login("ada")
    tokens.append(me.csrf_token)
    session.renew()
    session.save()
    tokens.append(me.csrf_token)
    me.logout()
    tokens.append(me.csrf_token)
    assert [me.check_csrf(token) for token in tokens] == [False, False, False, True]


def test_a_page_that_logs_in_and_shows_a_form_has_a_token_for_the_new_id(auth: Auth[str], store: SessionStore) -> None:
    session = store.request_session(lambda: b"")
    me = me_of(auth, session)
    me.login("ada")
    token = me.csrf_token
    assert store.commit(session).set_cookie is not None
    assert session.id is not None
    assert me_of(auth, store.session(session.id)).check_csrf(token)


def cookie_of(store: SessionStore, session: Session) -> bytes:
    assert session.id is not None
    return f"session={store.transport.value(session.id, store.clock.now())}".encode()


def test_who_was_logged_out_elsewhere_gets_a_form_that_works(auth: Auth[str], store: SessionStore) -> None:
    session = store.session()
    me_of(auth, session).login("ada")
    session.save()
    cookie = cookie_of(store, session)
    session.destroy()
    visit = store.request_session(lambda: cookie)
    token = me_of(auth, visit).csrf_token
    assert store.commit(visit).set_cookie is not None
    assert visit.id is not None
    assert me_of(auth, store.session(visit.id)).check_csrf(token)


def test_a_slow_page_of_a_session_with_a_new_id_takes_nobodys_cookie(auth: Auth[str], store: SessionStore) -> None:
    session = store.session()
    session["cart"] = ["tea"]
    session.save()
    cookie = cookie_of(store, session)
    me_of(auth, session).login("ada")
    session.save()
    visit = store.request_session(lambda: cookie)
    me = me_of(auth, visit)
    assert not me.check_csrf(me.csrf_token)
    assert store.commit(visit).set_cookie is None


@pytest.mark.parametrize("does", ["login", "renew"])
def test_a_page_whose_session_ends_meanwhile_is_a_page_with_a_token_that_is_good_for_nothing(
    auth: Auth[str], store: SessionStore, does: str
) -> None:
    session = store.session() if does == "login" else store.session(logged_in(store).id)
    me = me_of(auth, session)
    if does == "login":
        me.login("ada")
    else:
        session.renew()
    store.clock.advance(1)  # type: ignore[attr-defined]
    store.sync.revoke_user("ada")
    assert not me.check_csrf(me.csrf_token)
    assert store.commit(session).set_cookie is None
    assert store.sync.sessions("ada") == []


@pytest.mark.parametrize("user", [None, "ada"])
def test_a_page_after_a_logout_by_clear_has_a_token_of_the_session_that_follows(
    auth: Auth[str], store: SessionStore, user: str | None
) -> None:
    session = store.request_session(lambda: b"")
    me = me_of(auth, session)
    session["cart"] = ["tea"]
    if user:
        me.login(user)
    session.save()
    former = session.id
    session.clear()
    token = me.csrf_token
    assert store.commit(session).set_cookie is not None
    assert session.id not in (None, former)
    assert me_of(auth, store.session(session.id)).check_csrf(token)


def test_before_there_may_be_a_session_there_is_no_token(place: Path) -> None:
    for mode in (SessionMode.OPT_IN, SessionMode.MANUAL):
        store = make_store(place / mode.value, mode=mode)
        auth = Auth(store, str)
        session = store.request_session(lambda: b"")
        with pytest.raises(NotCreated):
            _ = me_of(auth, session).csrf_token
        session.set_store(True)
        session.create()
        me = me_of(auth, session)
        assert me.check_csrf(me.csrf_token)
        assert store.commit(session).set_cookie is not None
        store.close()


def test_where_no_session_can_begin_a_token_is_an_error(auth: Auth[str], store: SessionStore) -> None:
    readonly, late = store.session(), store.request_session(lambda: b"")
    readonly.readonly = True
    with pytest.raises(ReadOnlySession):
        _ = me_of(auth, readonly).csrf_token
    late.headers_sent = True
    with pytest.raises(ResponseStarted):
        _ = me_of(auth, late).csrf_token


# ── what a request must bring ─────────────────────────────────────────────────────────────────────────────────


def starlette_client(auth: Auth[str]) -> TestClient:
    @auth.requires(login=False, csrf=True)
    async def view(request: Request) -> PlainTextResponse:
        me = await auth.load(request)
        body = (await request.body()).decode()
        return PlainTextResponse(me.csrf_token if request.method == "GET" else body)

    @auth.requires(login=False, csrf=True)
    def sync_view(request: Request) -> PlainTextResponse:
        return PlainTextResponse("ok")

    methods = ["GET", "POST", "PUT", "DELETE"]
    app = Starlette(routes=[Route("/", view, methods=methods), Route("/sync", sync_view, methods=methods)])
    app.add_middleware(asgi.SessionMiddleware, store=auth.store)
    return TestClient(app)


def flask_client(auth: Auth[str]) -> Any:
    app = flask.Flask("application")

    @app.route("/", methods=["GET", "POST", "PUT", "DELETE"])
    @auth.requires(login=False, csrf=True)
    def view() -> str:
        if flask.request.method == "GET":
            return auth.sync.load(flask.request).csrf_token
        return "&".join(f"{name}={value}" for name, value in flask.request.form.items())

    app.wsgi_app = wsgi.SessionMiddleware(app.wsgi_app, auth.store)  # type: ignore[method-assign]
    return app.test_client()


CLIENTS = {"starlette": starlette_client, "flask": flask_client}


@pytest.fixture(params=list(CLIENTS))
def client(request: pytest.FixtureRequest, auth: Auth[str]) -> Any:
    return CLIENTS[request.param](auth)


def test_what_changes_something_needs_the_token_in_a_header_or_a_field(client: Any) -> None:
    token = client.get("/").text
    for method in ("post", "put", "delete"):
        ask = getattr(client, method)
        assert ask("/").status_code == 403, "none"
        assert ask("/", headers={"X-CSRF-Token": token[:-4]}).status_code == 403
        assert ask("/", headers={"X-CSRF-Token": token}).status_code == 200
    assert client.post("/", data={"csrf_token": token[:-4]}).status_code == 403
    answer = client.post("/", data={"csrf_token": token, "name": "ada"})
    assert (answer.status_code, answer.text) == (200, f"csrf_token={token}&name=ada"), "the view reads it once more"
    assert client.post("/", data={"csrf_token": token}, headers={"X-CSRF-Token": "x"}).status_code == 403
    many = {str(number): "x" for number in range(2_000)}
    assert client.post("/", data={**many, "csrf_token": token[:-4]}).status_code == 403


def test_sync_views_of_starlette_take_the_token_from_the_header(auth: Auth[str]) -> None:
    client = starlette_client(auth)
    token = client.get("/").text
    assert client.post("/sync", data={"csrf_token": token}).status_code == 403
    assert client.post("/sync", headers={"X-CSRF-Token": token}).status_code == 200


def test_a_form_that_the_framework_has_read_already_is_asked_for_the_token(auth: Auth[str]) -> None:
    """FastAPI reads the form before the dependencies, for the view's Form() parameters; then the body is gone."""
    app = FastAPI()
    app.add_middleware(asgi.SessionMiddleware, store=auth.store)
    anybody = Depends(auth.requires(login=False, csrf=True).dependency)

    @app.get("/")
    async def form(me: Annotated[AuthSession[str], anybody]) -> PlainTextResponse:
        return PlainTextResponse(me.csrf_token)

    @app.post("/")
    async def view(me: Annotated[AuthSession[str], anybody], name: Annotated[str, Form()]) -> PlainTextResponse:
        return PlainTextResponse(name)

    client = TestClient(app)
    token = client.get("/").text
    assert client.post("/", data={"csrf_token": token, "name": "ada"}).text == "ada"
    assert client.post("/", data={"csrf_token": token[:-4], "name": "ada"}).status_code == 403
    assert client.post("/", data={"name": "ada"}).status_code == 403


def test_a_form_that_can_have_no_token_is_refused_before_its_body_is_read(auth: Auth[str], store: SessionStore) -> None:
    async def receive() -> Any:
        raise AssertionError("somebody reads the body")

    headers = [(b"content-type", b"application/x-www-form-urlencoded")]
    stored = store.session()
    stored.create()
    stored.save()
    for session, crossing in ((store.session(), []), (stored, [(b"sec-fetch-site", b"cross-site")])):
        scope = {"type": "http", "method": "POST", "headers": [*headers, *crossing], "session": session}
        with pytest.raises(HTTPException) as refused:
            asyncio.run(auth.requires(login=False, csrf=True).check(Request(scope, receive)))
        assert refused.value.status_code == 403


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Origin": "https://shop.example"}, True),
        ({"Origin": "https://SHOP.example"}, True),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "https://shop.example:8443"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "https://["}, False),
        ({"Origin": ""}, False),
        ({"Origin": "https://evil.example", "Sec-Fetch-Site": "same-origin"}, True),
    ],
    ids=str,
)
def test_what_a_browser_says_another_site_sent_is_refused_with_the_token_too(
    client: Any, headers: dict[str, str], passes: bool
) -> None:
    host = {"Host": "shop.example"}
    token = client.get("/", headers=host).text
    answer = client.post("/", headers={**host, "X-CSRF-Token": token, **headers})
    assert answer.status_code == (200 if passes else 403)


def test_a_page_of_another_site_may_be_linked_to(client: Any) -> None:
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "passes"),
    [
        ("shop.example", "https://shop.example", True), ("shop.example", "https://evil.example", False),
        ("", "null", False),
    ],
)  # fmt: skip
def test_a_websocket_must_come_from_a_page_of_its_own_site(
    auth: Auth[str], store: SessionStore, host: str, origin: str, passes: bool
) -> None:
    headers = [(b"host", host.encode()), (b"origin", origin.encode())]
    scope = {"type": "websocket", "headers": headers, "session": store.session()}
    view = auth.requires(login=False, csrf=True)(lambda request: "ok")
    if passes:
        assert view(scope) == "ok"
    else:
        with pytest.raises(Forbidden):
            view(scope)
