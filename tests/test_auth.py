"""Logins over both protocols: who is logged in, who may be, and what a login does to its session."""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, assert_type

import pytest
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket
from werkzeug.test import Client

from shmsession import SessionMode, SessionStore, asgi
from shmsession.auth import Auth, AuthConfig, AuthSession, LoginStatus, Rights, SyncAuthSession
from shmsession.codec import encode
from shmsession.errors import (
    BackendUnavailable,
    ConfigError,
    NoSessionError,
    NotCreated,
    ReadOnlySession,
    ResponseStarted,
    TooManySessions,
)
from shmsession.hooks import Event, Hooks, LoggedIn, LoggedOut, LoginRefused
from shmsession.ids import tag_of
from shmsession.memory.tables import Tables, Txn
from shmsession.session import Session
from shmsession.testing import ManualClock, login_cookie, make_store
from tests.auth_site import SITES, User, Users
from tests.memory import in_child

ADA, BOB = User("ada", ("read", "admin")), User("bob", ("read",))


class Site:
    """The site over one protocol, with visitors that keep cookies."""

    def __init__(self, place: Path, protocol: str, *, loads_async: bool = False, **settings: Any) -> None:
        self.clock = ManualClock()
        self.store = make_store(place / "sessions", self.clock, **settings)
        self.events: list[Event] = []
        self.store.hooks = Hooks([self.events.append])
        self.users = Users(place / "users.json", [])
        self.users.write(ADA, BOB)
        self.protocol = protocol
        self.loads_async = loads_async
        self.configure()

    def configure(self, **settings: Any) -> None:
        load: Callable[[str], Any] = self.users.load_async if self.loads_async else self.users.load
        self.auth: Auth[User] = Auth(self.store, load, config=AuthConfig(**settings))
        self.app = SITES[self.protocol](self.auth)

    def visitor(self) -> "Visitor":
        return Visitor(self)


def logged_in(store: SessionStore, user_id: str) -> Session:
    session = store.session()
    session.renew(user_id=user_id)
    session.save()
    return session


class Visitor:
    def __init__(self, site: Site) -> None:
        self.site = site
        self.client: Any = TestClient(site.app) if site.protocol == "asgi" else Client(site.app)  # type: ignore[arg-type]

    def ask(self, method: str, path: str, headers: dict[str, str] | None = None) -> Any:
        if self.site.protocol == "asgi":
            return self.client.request(method, path, headers=headers)
        return self.client.open(path, method=method, headers=headers)

    def get(self, path: str) -> dict[str, Any]:
        return self.body(self.ask("GET", path))

    def post(self, path: str, **headers: str) -> dict[str, Any]:
        return self.body(self.ask("POST", path, {name.replace("_", "-"): value for name, value in headers.items()}))

    def body(self, answer: Any) -> dict[str, Any]:
        assert answer.status_code == 200, answer.text
        found = answer.json() if self.site.protocol == "asgi" else answer.json
        assert isinstance(found, dict)
        return found

    @property
    def cookie(self) -> str | None:
        if self.site.protocol == "asgi":
            found: str | None = self.client.cookies.get("session")
            return found
        cookie = self.client.get_cookie("session")
        return None if cookie is None else cookie.value

    @cookie.setter
    def cookie(self, value: str) -> None:
        if self.site.protocol == "asgi":
            self.client.cookies.set("session", value, domain="testserver.local", path="/")
        else:
            self.client.set_cookie("session", value)

    def copy(self) -> "Visitor":
        """Another browser with the same cookie."""
        other = Visitor(self.site)
        assert self.cookie is not None
        other.cookie = self.cookie
        return other


@pytest.fixture(params=list(SITES))
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def site(place: Path, protocol: str) -> Iterator[Site]:
    site = Site(place, protocol)
    yield site
    site.store.close()


@pytest.fixture
def store(place: Path) -> Iterator[SessionStore]:
    store = make_store(place / "sessions")
    yield store
    store.close()


def at(session: Session) -> dict[str, Any]:
    """A request that has this session."""
    return {"type": "http", "method": "GET", "headers": [], "session": session}


def hashed(user_id: str) -> str:
    return tag_of(encode(user_id)).hex()


# ── who is logged in ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_visitor_is_nobody_until_a_login_and_after_the_logout(site: Site) -> None:
    visitor = site.visitor()
    nobody = {"user": None, "name": None, "authenticated": False}
    assert visitor.get("/me").items() >= nobody.items()
    assert visitor.cookie is None, "asking who it is begins no session"
    assert visitor.post("/enter/ada").items() >= {"user": "ada", "name": "ada", "authenticated": True}.items()
    assert visitor.get("/me").items() >= {"user": "ada", "name": "ada", "authenticated": True}.items()
    token = visitor.get("/form")["token"]
    assert visitor.post("/logout", X_CSRF_Token=token).items() >= nobody.items()
    assert visitor.get("/me").items() >= nobody.items()
    assert visitor.cookie is None


def test_a_user_that_is_not_there_or_not_active_cannot_log_in(site: Site) -> None:
    site.users.write(ADA, replace(BOB, is_active=False))
    for name in ("bob", "eve"):
        visitor = site.visitor()
        assert visitor.ask("POST", f"/enter/{name}").status_code == 401
        assert visitor.get("/me")["user"] is None
        assert visitor.cookie is None
    assert site.events == [LoginRefused("", hashed("bob")), LoginRefused("", hashed("eve"))]


@pytest.fixture(params=["end_oldest", "refuse"])
def limited(request: pytest.FixtureRequest, place: Path) -> Iterator[SessionStore]:
    """A store that lets a user have two sessions, and that has lost its memory of them: only its database has them."""
    settings = {"max_sessions_per_user": 2, "too_many_sessions": request.param}
    config = make_store(place / "sessions", **settings).config
    with SessionStore(f"sqlite:///{place}/sessions.db", config=config) as store:
        for _ in range(2):
            login_cookie(store, user_id="ada")
        assert store.sync.flush()
        store.close()
        shutil.rmtree(store.path)
        yield store


def enter(store: SessionStore, protocol: str, load_user: Callable[[str], Any] = str) -> bool:
    """Whether ada could log in, in a request that is committed."""
    auth, request = Auth(store, load_user), at(store.session())

    async def enter_async() -> bool:
        return await (await auth.load(request)).login("ada")

    entered = asyncio.run(enter_async()) if protocol == "asgi" else auth.sync.load(request).login("ada")
    try:
        request["session"].save()
    except TooManySessions:
        assert not auth.sync.load(request).is_authenticated, "and the rest of the request knows"
        return False
    return entered


def test_a_limit_counts_sessions_that_only_the_database_has(limited: SessionStore, protocol: str) -> None:
    refuses = limited.config.too_many_sessions == "refuse"
    assert enter(limited, protocol) is not refuses
    assert len(limited.sync.sessions("ada")) == 2


def test_while_the_database_is_down_a_limit_counts_what_memory_has(
    limited: SessionStore, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> None:
        raise BackendUnavailable("down")

    for question in ("sessions_of", "write"):
        monkeypatch.setattr(limited._backend, question, fail)
    errors = limited.memory.environment.counters.totals()["load_errors"]
    assert [enter(limited, protocol), enter(limited, protocol)] == [True, True]
    assert limited.memory.environment.counters.totals()["load_errors"] == errors + 2
    assert enter(limited, protocol) is (limited.config.too_many_sessions == "end_oldest")


def test_a_login_asks_no_database_where_there_is_no_limit(
    place: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_store(place / "sessions").config
    with SessionStore(f"sqlite:///{place}/sessions.db", config=config) as store:
        asked: list[object] = []
        monkeypatch.setattr(type(store.sync), "recall_user", lambda _, user_id: asked.append(user_id))
        assert enter(store, protocol)
        assert asked == []


@pytest.mark.parametrize("users", [(), (replace(ADA, is_active=False),)], ids=["deleted", "inactive"])
def test_who_is_deleted_or_made_inactive_is_logged_in_no_more(site: Site, users: tuple[User, ...]) -> None:
    visitor = site.visitor()
    visitor.post("/enter/ada")
    site.users.write(*users)
    assert visitor.get("/me")["user"] == "ada", "remembered"
    site.auth.cache_clear_user("ada")
    assert visitor.get("/me").items() >= {"user": None, "name": None, "authenticated": False}.items()
    assert visitor.ask("GET", "/admin").status_code == 401
    site.users.write(ADA)
    site.auth.cache_clear_user("ada")
    assert visitor.get("/me")["user"] == "ada"


def test_an_error_of_the_loader_is_an_error_and_never_nobody(site: Site) -> None:
    visitor = site.visitor()
    visitor.post("/enter/ada")
    site.auth.cache_clear_all()
    site.users.path.unlink()
    if site.protocol == "asgi":
        with pytest.raises(FileNotFoundError):
            visitor.get("/me")
    else:
        assert visitor.ask("GET", "/me").status_code == 500
    site.users.write(ADA)
    assert visitor.get("/me")["user"] == "ada"


@pytest.mark.parametrize("loads_async", [False, True])
def test_loaders_may_be_sync_or_async_for_both_protocols(place: Path, protocol: str, loads_async: bool) -> None:
    site = Site(place, protocol, loads_async=loads_async)
    visitor = site.visitor()
    visitor.post("/enter/ada")
    site.auth.cache_clear_all()
    assert visitor.get("/admin")["name"] == "ada"
    assert site.users.loads == ["ada", "ada"]
    site.store.close()


def test_the_anonymous_user_stands_for_visitors_and_is_never_logged_in(site: Site) -> None:
    site.users.write(ADA, User("guest", ("read",)))
    site.configure(anonymous_user_id="guest")
    visitor = site.visitor()
    guest = {"user": None, "name": "guest", "authenticated": False}
    assert visitor.get("/me").items() >= guest.items()
    assert visitor.ask("POST", "/enter/guest").status_code == 401
    visitor.post("/enter/ada")
    assert visitor.get("/me")["name"] == "ada"
    site.users.write(User("guest", ("read",)))
    site.auth.cache_clear_all()
    assert visitor.get("/me").items() >= guest.items()
    site.users.write(ADA, User("guest"))
    token = visitor.get("/form")["token"]
    assert visitor.post("/logout", X_CSRF_Token=token).items() >= guest.items()


def test_a_session_that_was_given_the_anonymous_user_is_nobodys(store: SessionStore) -> None:
    """By renew(), or before that user was the anonymous one."""
    session = logged_in(store, "guest")
    me = Auth(store, str, config=AuthConfig(anonymous_user_id="guest")).sync.load({"session": session})
    assert (me.current_user, me.user_id, me.is_authenticated, me.is_anonymous) == ("guest", None, False, True)


def test_a_user_of_another_store_is_not_taken_for_one_of_the_same_id(store: SessionStore, place: Path) -> None:
    """But two objects may be the same sessions."""
    other = make_store(place / "other")
    with pytest.raises(NoSessionError, match="none of <SessionStore 'test'>"):
        Auth(store, str).sync.load({"session": logged_in(other, "ada")})
    with pytest.raises(NoSessionError):
        asyncio.run(Auth(store, str).load({"session": other.session()}))
    other.close()
    twin = SessionStore("none", config=store.config, clock=store.clock)
    assert Auth(store, str).sync.load({"session": logged_in(twin, "ada")}).user_id == "ada"
    twin.close()


def test_whoever_logs_out_is_nobody_for_the_rest_of_the_request_also_when_another_was_faster(
    store: SessionStore,
) -> None:
    auth, session = Auth(store, str), logged_in(store, "ada")
    request = {"session": store.session(session.id)}
    me = auth.sync.load(request)
    session.destroy()
    me.logout()
    assert auth.sync.load(request).user_id is None


class AsyncLoader:
    async def __call__(self, prefix: str, user_id: str) -> User:
        await asyncio.sleep(0)
        return User(prefix + user_id)


def by_a_coroutine_that_a_function_makes(user_id: str) -> Awaitable[User]:
    return AsyncLoader()("", user_id)


@pytest.mark.parametrize("load", [partial(AsyncLoader(), ""), by_a_coroutine_that_a_function_makes])
def test_whatever_gives_something_to_await_is_awaited(store: SessionStore, load: Callable[[str], Any]) -> None:
    session = store.session()
    session.renew(user_id="ada")
    auth: Auth[User] = Auth(store, load, config=AuthConfig(max_age=timedelta(0)))

    async def ask() -> User | None:
        return (await auth.load(at(session))).current_user

    assert auth.sync.load(at(session)).current_user == asyncio.run(ask()) == User("ada")


def test_an_async_loader_runs_on_one_event_loop_for_all_code_that_blocks(store: SessionStore) -> None:
    """So that what it keeps there, such as a pool of connections, stays good."""
    loops: list[asyncio.AbstractEventLoop] = []

    async def load(user_id: str) -> User:
        loops.append(asyncio.get_running_loop())
        return User(user_id)

    auth = Auth(store, load, config=AuthConfig(max_age=timedelta(0)))
    session = store.session()
    session.renew(user_id="ada")
    begin = threading.Barrier(4)

    def ask() -> None:
        begin.wait()
        assert auth.sync.load(at(session)).current_user == User("ada")

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(loops), len(set(loops))) == (4, 1)
    assert in_child(lambda: auth.sync.load(at(session)).user_id) == "ada", "a forked process has one of its own"


class Telling:
    """A user that answers by methods."""

    def __init__(self, *, active: bool = True, authenticated: bool = True, anonymous: bool = False) -> None:
        self.answers = (active, authenticated, anonymous)

    def is_active(self) -> bool:
        return self.answers[0]

    def is_authenticated(self) -> bool:
        return self.answers[1]

    def is_anonymous(self) -> bool:
        return self.answers[2]


@pytest.mark.parametrize(
    ("user", "may"),
    [
        (Telling(), True), (Telling(active=False), False), (Telling(authenticated=False), False),
        (Telling(anonymous=True), False), (object(), True), (SimpleNamespace(is_active=1), True),
        (SimpleNamespace(is_active=0), False),
    ],
)  # fmt: skip
def test_a_user_says_by_attributes_or_methods_whether_it_may_be_logged_in(
    store: SessionStore, user: object, may: bool
) -> None:
    me = Auth(store, lambda _: user).sync.load(at(store.session()))
    assert me.login("ada") is may
    assert (me.is_authenticated, me.is_active, me.is_anonymous) == (may, may, not may)
    assert (me.user_id, me.current_user) == (("ada", user) if may else (None, None))


class Vague:
    async def is_active(self) -> bool:
        raise AssertionError


@pytest.mark.filterwarnings("ignore:coroutine 'Vague.is_active' was never awaited:RuntimeWarning")
@pytest.mark.parametrize("user", [Vague(), SimpleNamespace(is_active="no")], ids=["async", "str"])
def test_a_user_that_does_not_say_yes_or_no_is_an_error_and_not_logged_in(store: SessionStore, user: object) -> None:
    me = Auth(store, lambda _: user).sync.load(at(store.session()))
    with pytest.raises(TypeError, match=r"is_active of a .*bool"):
        me.login("ada")
    assert (me.is_authenticated, me.session.user_id) == (False, None)


def test_within_a_request_a_user_is_loaded_once_and_is_the_same_object(store: SessionStore) -> None:
    loads: list[str] = []

    async def load(user_id: str) -> User:
        loads.append(user_id)
        return ADA

    auth = Auth(store, load, config=AuthConfig(max_age=timedelta(0)))
    session = store.session()
    session.renew(user_id="ada")
    session.save()

    async def ask() -> None:
        request = at(store.session(session.id))
        me = await auth.load(request)
        assert await auth.load(request) is me
        assert loads == ["ada"]
        me.session.renew(user_id="bob")
        assert (await auth.load(request)).user_id == "bob"
        assert loads == ["ada", "bob"]

    asyncio.run(ask())


# ── what a login does to its session ──────────────────────────────────────────────────────────────────────────


def test_two_sets_of_logins_in_one_request_know_their_own_users(store: SessionStore) -> None:
    people, staff = Auth(store, lambda name: f"{name} of the people"), Auth(store, lambda name: f"{name} of the staff")
    request = at(store.session())
    people.sync.load(request).login("ada")
    assert staff.sync.load(request).current_user == "ada of the staff"
    assert people.sync.load(request).current_user == "ada of the people"


def test_a_request_that_is_asked_for_in_both_ways_gives_each_its_own(store: SessionStore) -> None:
    """Such as a sync dependency before an async view."""
    auth, request = Auth(store, lambda _: ADA), at(store.session())
    auth.sync.load(request).login("ada")

    async def log_in_again() -> bool:
        return await (await auth.load(request)).login("ada")

    assert asyncio.run(log_in_again()) is True
    assert auth.sync.load(request).login("ada") is True


def test_a_login_and_a_second_one_give_the_session_a_new_id_and_the_old_one_is_dead(site: Site) -> None:
    visitor = site.visitor()
    visitor.post("/put/tea")
    before = visitor.copy()
    visitor.post("/enter/ada")
    between = visitor.copy()
    assert visitor.get("/me")["data"] == {"value": "tea"}, "a visitor's cart stays theirs"
    visitor.post("/enter/ada")
    assert visitor.get("/me").items() >= {"user": "ada", "data": {"value": "tea"}}.items()
    for old in (before, between):
        assert old.get("/me").items() >= {"user": None, "data": {}}.items()


def test_a_login_over_another_users_session_takes_nothing_of_it_along(site: Site) -> None:
    visitor = site.visitor()
    visitor.post("/enter/ada?remember")
    visitor.post("/put/secret")
    old = visitor.copy()
    assert visitor.post("/enter/bob").items() >= {"user": "bob", "data": {}}.items()
    assert visitor.get("/me").items() >= {"user": "bob", "data": {}}.items()
    assert old.get("/me").items() >= {"user": None, "data": {}}.items()
    assert not site.store.request_session(lambda: f"session={visitor.cookie}".encode()).longterm


def test_remembered_logins_last_for_max_lifespan_and_others_for_lifespan(site: Site) -> None:
    forgotten, remembered = site.visitor(), site.visitor()
    forgotten.post("/enter/ada")
    remembered.post("/enter/ada?remember")
    site.clock.advance(hours=7)
    assert (forgotten.get("/me")["user"], remembered.get("/me")["user"]) == (None, "ada")


def test_the_hooks_hear_of_logins_when_they_are_committed_of_refusals_and_of_logouts(site: Site) -> None:
    visitor = site.visitor()
    visitor.post("/enter/ada")
    visitor.post("/enter/bob")
    token = visitor.get("/form")["token"]
    visitor.post("/logout", X_CSRF_Token=token)
    told = [event for event in site.events if isinstance(event, LoggedIn | LoggedOut | LoginRefused)]
    assert [(type(event), event.user) for event in told] == [
        (LoggedIn, hashed("ada")), (LoggedIn, hashed("bob")), (LoggedOut, hashed("bob"))
    ]  # fmt: skip
    first, second, last = (event.handle for event in told)
    assert first != second == last
    site.auth.sync.load(at(site.store.session())).login_failed("eve")
    assert site.events[-1] == LoginRefused("", hashed("eve"))
    visitor.post("/put/tea")
    assert visitor.ask("POST", "/enter/nobody").status_code == 401
    session = site.store.request_session(lambda: f"session={visitor.cookie}".encode())
    assert session.handle is not None
    assert site.events[-1] == LoginRefused(session.handle, hashed("nobody"))


def test_a_login_whose_response_fails_is_none_and_nobody_hears_of_it(store: SessionStore) -> None:
    events: list[Event] = []
    store.hooks = Hooks([events.append])
    session = store.request_session(lambda: b"")
    assert Auth(store, lambda _: ADA).sync.load(at(session)).login("ada")
    assert store.commit(session, failed=True).set_cookie is None
    assert (store.count(), events) == (0, [])


def test_a_login_of_a_session_that_was_destroyed_meanwhile_begins_another(site: Site) -> None:
    visitor = site.visitor()
    visitor.post("/put/tea")
    session = site.store.request_session(lambda: f"session={visitor.cookie}".encode())
    assert session["value"] == "tea"
    me = site.auth.sync.load(at(session))
    site.store.request_session(lambda: f"session={visitor.cookie}".encode()).destroy()
    assert me.login("ada")
    assert site.store.commit(session).set_cookie is not None
    assert (session.user_id, dict(session)) == ("ada", {})


def test_a_login_after_the_headers_or_on_a_read_only_session_is_refused_at_once(store: SessionStore) -> None:
    auth = Auth(store, lambda _: ADA)
    session = store.session()
    session.headers_sent = True
    with pytest.raises(ResponseStarted, match=r"before accept\(\)"):
        auth.sync.load(at(session)).login("ada")
    assert session.user_id is None
    readonly = store.session()
    readonly.readonly = True
    for act in ("login", "logout"):
        with pytest.raises(ReadOnlySession):
            getattr(auth.sync.load(at(readonly)), act)(*(["ada"] if act == "login" else []))


def test_a_websocket_can_be_logged_in_before_it_is_accepted_and_logged_out_at_any_time(store: SessionStore) -> None:
    auth = Auth(store, lambda name: User(name))

    async def live(websocket: WebSocket) -> None:
        me = await auth.load(websocket)
        await me.login("ada")
        await websocket.accept()
        with pytest.raises(ResponseStarted):
            await me.login("bob")
        await websocket.send_text(f"{me.user_id} {(await me.status()).name}")
        await me.logout()
        await websocket.send_text(f"{me.user_id} {(await me.status()).name}")
        await websocket.close()

    app = Starlette(routes=[WebSocketRoute("/", live)])
    app.add_middleware(asgi.SessionMiddleware, store=store)
    with TestClient(app).websocket_connect("/") as connection:
        extra: Any = connection.extra_headers
        assert b"set-cookie" in dict(extra)
        assert connection.receive_text() == "ada LOGGED_IN"
        assert connection.receive_text() == "None LOGGED_OUT"
    assert store.count() == 0


def test_nobody_cannot_be_logged_in(store: SessionStore) -> None:
    with pytest.raises(TypeError, match="logout"):
        Auth(store, lambda _: ADA).sync.load(at(store.session())).login(None)


@pytest.mark.parametrize("agreed", [False, True])
def test_in_opt_in_mode_a_login_is_kept_when_the_visitor_has_agreed(place: Path, agreed: bool) -> None:
    store = make_store(place / "sessions", mode=SessionMode.OPT_IN)
    session = store.request_session(lambda: b"")
    me = Auth(store, lambda _: ADA).sync.load(at(session))
    if agreed:
        session.set_store(True)
    assert me.login("ada")
    assert me.user_id == "ada"
    assert (store.commit(session).set_cookie is not None, store.count()) == (agreed, int(agreed))
    store.close()


def test_in_manual_mode_a_login_needs_a_session_that_was_created(place: Path) -> None:
    store = make_store(place / "sessions", mode=SessionMode.MANUAL)
    session = store.request_session(lambda: b"")
    me = Auth(store, lambda _: ADA).sync.load(at(session))
    with pytest.raises(NotCreated):
        me.login("ada")
    session.create()
    assert me.login("ada")
    assert store.commit(session).set_cookie is not None
    store.close()


def test_a_login_that_would_be_one_too_many_is_refused_and_told_to_the_hooks(place: Path) -> None:
    site = Site(place, "wsgi", max_sessions_per_user=1, too_many_sessions="refuse")
    for wanted in ([LoggedIn], [LoginRefused]):
        session = site.store.session()
        site.events.clear()
        assert site.auth.sync.load(at(session)).login("ada")
        with contextlib.nullcontext() if wanted == [LoggedIn] else pytest.raises(TooManySessions):
            session.save()
        told = [event for event in site.events if isinstance(event, LoggedIn | LoginRefused)]
        assert [(type(event), event.user) for event in told] == [(one, hashed("ada")) for one in wanted]
    site.store.close()


def test_whose_sessions_are_revoked_is_nobody_with_the_next_request(site: Site) -> None:
    first, second = site.visitor(), site.visitor()
    for visitor in (first, second):
        visitor.post("/enter/ada")
    assert site.store.sync.revoke_user("ada") == 2
    assert [visitor.get("/me")["user"] for visitor in (first, second)] == [None, None]
    token = first.get("/form")["token"]
    assert first.post("/login/ada", X_CSRF_Token=token)["user"] == "ada"


def test_a_login_during_which_all_sessions_of_its_user_were_revoked_is_dropped(store: SessionStore) -> None:
    """The password may have been changed after it was checked."""
    clock = store.clock
    assert isinstance(clock, ManualClock)

    def load(user_id: str) -> User:
        clock.advance(0.001)
        store.sync.revoke_user(user_id)
        clock.advance(0.001)
        return User(user_id)

    session = store.request_session(lambda: b"")
    assert Auth(store, load).sync.load(at(session)).login("ada")
    assert store.commit(session).set_cookie is None
    assert (store.count(), session.gone) == (0, True)


def test_a_login_is_fresh_until_its_age_is_reached_and_after_the_next(site: Site) -> None:
    hour = timedelta(hours=1)
    session = site.store.session()
    me = site.auth.sync.load(at(session))
    assert not me.fresh(hour)
    me.login("ada")
    assert me.fresh(hour)
    session.save()
    site.clock.advance(minutes=59)
    session.renew()
    session.save()
    assert me.fresh(hour)
    site.clock.advance(minutes=1)
    assert not me.fresh(hour)
    me.login("ada")
    assert me.fresh(hour)
    session.save()
    site.clock.step(-60)
    assert not me.fresh(hour), "a login of the future is none that can be dated"


def test_remember_user_changes_how_long_the_login_lasts(store: SessionStore) -> None:
    session = store.session()
    me = Auth(store, lambda _: ADA).sync.load(at(session))
    me.login("ada")
    me.remember_user(True)
    session.save()
    assert session.longterm
    me.remember_user(False)
    session.save()
    assert not session.longterm


# ── how it stands ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_status_of_what_lasts_tells_what_others_have_done_meanwhile(store: SessionStore) -> None:
    auth = Auth(store, lambda name: User(name))
    session = store.session()
    me = auth.sync.load(at(session))
    assert me.status() is LoginStatus.LOGGED_OUT
    me.login("ada")
    assert me.status() is LoginStatus.LOGGED_IN
    session.save()
    assert me.status() is LoginStatus.LOGGED_IN
    auth.cache_clear_user("ada")
    assert me.status() is LoginStatus.STALE
    me.reload_user()
    assert me.status() is LoginStatus.LOGGED_IN
    session.renew(user_id="bob")
    assert me.status() is LoginStatus.DIFFERENT_ID
    session.discard()
    assert session.id is not None
    store.session(session.id).destroy()
    assert me.status() is LoginStatus.LOGGED_OUT


def test_the_status_of_a_user_that_is_gone_is_stale_and_without_a_memory_it_is_not(store: SessionStore) -> None:
    users = {"ada": ADA}
    auth = Auth(store, users.get, config=AuthConfig(max_age=timedelta(0)))
    session = store.session()
    me = auth.sync.load(at(session))
    me.login("ada")
    session.save()
    assert me.status() is LoginStatus.LOGGED_IN
    users.clear()
    me.reload_user()
    assert (me.status(), me.current_user) == (LoginStatus.STALE, None)
    assert not me.fresh(timedelta(hours=1)), "nobody is logged in, whenever it was"


def test_the_status_asks_the_backend_for_a_session_that_has_left_memory(place: Path) -> None:
    config = make_store(place / "sessions").config
    with SessionStore(f"sqlite:///{place}/db", config=config, clock=ManualClock()) as store:
        auth = Auth(store, lambda name: User(name))
        session = store.session()
        me = auth.sync.load(at(session))
        me.login("ada")
        session.save()
        assert store.sync.flush(10)

        async def ask() -> LoginStatus:
            again = await auth.load(at(session))
            return await again.status()

        forget(store)
        assert me.status() is LoginStatus.LOGGED_IN
        forget(store)
        assert asyncio.run(ask()) is LoginStatus.LOGGED_IN
        store.sync.clear_backend()
        assert me.status() is LoginStatus.LOGGED_OUT


def forget(store: SessionStore) -> None:
    """What the backend has leaves memory."""

    def empty(txn: Txn, tables: Tables) -> None:
        for table in (tables.records, tables.expiry, tables.users):
            txn.drop(table, delete=False)

    store.memory.environment.write(empty)


# ── settings, and what is not there ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_age": timedelta(seconds=-1)}, {"max_age": 60}, {"cache_size": 0}, {"cache_size": None},
        {"anonymous_user_id": SimpleNamespace()},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_with_what_to_write_instead(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AuthConfig(**wrong)


def test_a_request_without_a_session_says_what_is_missing(store: SessionStore) -> None:
    with pytest.raises(NoSessionError, match="SessionMiddleware"):
        Auth(store, lambda _: ADA).sync.load({"type": "http", "headers": []})


def test_nothing_that_is_shown_of_a_login_holds_a_secret(store: SessionStore) -> None:
    session = store.session()
    auth = Auth(store, lambda _: ADA)
    me = auth.sync.load(at(session))
    me.login("ada")
    token = me.csrf_token
    shown = repr(me) + repr(auth) + repr(auth.requires())
    assert token not in shown
    assert str(session.id) not in shown
    assert repr(me) == "<SyncAuthSession, logged in>"
    assert repr(asyncio.run(auth.load(at(store.session())))) == "<AuthSession, anonymous>"


def test_the_types_of_users_are_known(store: SessionStore) -> None:
    """mypy checks this file."""

    def load(user_id: str) -> User | None:
        return ADA

    async def load_async(user_id: int) -> User | None:
        return ADA

    one, other = Auth(store, load), Auth(store, load_async)
    assert_type(one, Auth[User])
    assert_type(other, Auth[User])
    me = one.sync.load(at(store.session()))
    assert_type(me, SyncAuthSession[User])
    assert_type(me.current_user, User | None)
    assert_type(one.requires(Rights.all()).validate(me), bool)

    @other.requires(login=False)
    async def view(request: dict[str, Any], number: int) -> AuthSession[User]:
        return assert_type(await other.load(request), AuthSession[User])

    assert asyncio.run(view(at(store.session()), number=1)).current_user is None
