"""What once broke, or was tried to break it. Each test says what must hold."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import pytest
from flask import Flask, request
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from shmsession import Key, Session, SessionStore
from shmsession.asgi import SessionMiddleware
from shmsession.errors import ReadOnlySession, StoreError, StoreFull
from shmsession.hooks import Created, Event, Hooks, Quarantined
from shmsession.testing import ManualClock, make_store
from shmsession.wsgi import SessionMiddleware as WsgiSessionMiddleware
from tests.asking import PROTOCOLS, Visitor


@pytest.fixture
def store(place: Path) -> Iterator[SessionStore]:
    store = make_store(place / "sessions")
    yield store
    store.close()


def visit(store: SessionStore, cookie: str | None = None, *, readonly: bool = False) -> Session:
    """A request with this cookie."""
    header = b"" if cookie is None else f"{store.transport.name}={cookie}".encode()
    return store.request_session(lambda: header, readonly=readonly)


def stored(store: SessionStore, user: str | None = None, **data: Any) -> str:
    """A stored session's cookie."""
    session = store.session()
    session.update(data)
    if user is not None:
        session.renew(user_id=user)
    session.save()
    return cookie_of(store, session)


def cookie_of(store: SessionStore, session: Session) -> str:
    assert session.secret is not None
    return store.transport.value(session.secret, store.clock.now())


def test_two_logins_at_once_do_not_log_in_anybody_else(store: SessionStore) -> None:
    cookie = stored(store, cart=["tea"])
    first, second = visit(store, cookie), visit(store, cookie)
    for session in (first, second):
        assert session["cart"] == ["tea"]
        session.renew(user_id="ada")
    assert store.commit(first).set_cookie
    assert store.commit(second).set_cookie
    assert visit(store).user_id is None
    other = visit(store, stored(store, a=1))
    assert other.user_id is None


def test_a_login_that_met_a_logout_takes_nothing_of_the_old_session_along(store: SessionStore) -> None:
    cookie = stored(store, "ada", secrets=["ada's"])
    slow = visit(store, cookie)
    slow["secrets"].append("more of ada's")
    visit(store, cookie).destroy()
    slow.renew(user_id="bob")
    assert store.commit(slow).set_cookie
    assert visit(store, cookie_of(store, slow)).to_dict() == {}


@pytest.mark.parametrize("how", ["destroy", "clear"])
def test_a_logout_ends_the_session_also_when_it_got_a_new_id_meanwhile(store: SessionStore, how: str) -> None:
    cookie = stored(store, "ada", a=1)
    slow = visit(store, cookie)
    assert slow["a"] == 1
    for _ in range(2):
        rotating = visit(store, cookie)
        rotating.renew()
        store.commit(rotating)
        cookie = cookie_of(store, rotating)
    getattr(slow, how)()
    store.commit(slow)
    assert not visit(store, cookie).exists


def test_a_late_logout_of_an_old_id_leaves_a_fresh_login_and_its_cookie_alone(store: SessionStore) -> None:
    cookie = stored(store, a=1)
    slow = visit(store, cookie)
    assert slow["a"] == 1
    login = visit(store, cookie)
    login.renew(user_id="ada")
    store.commit(login)
    slow.destroy()
    assert store.commit(slow).set_cookie is None
    assert visit(store, cookie_of(store, login)).user_id == "ada"


def test_a_read_only_session_cannot_be_changed_in_place(store: SessionStore) -> None:
    cookie = stored(store, cart=["tea"])
    reading = visit(store, cookie, readonly=True)
    reading["cart"].append("milk")
    with pytest.raises(ReadOnlySession):
        store.commit(reading)
    assert visit(store, cookie)["cart"] == ["tea"]


def test_hooks_may_use_the_store_whatever_they_are_told(place: Path) -> None:
    """Also of a rebuild, which happens behind the gate that opens the store."""
    store, told, counts = make_store(place / "sessions"), [], []

    def hook(event: Event) -> None:
        told.append(type(event))
        counts.append(store.count())

    store.hooks = Hooks([hook])
    stored(store, a=1)
    data = store.memory.environment.data / "data.mdb"
    store.close()
    with data.open("r+b") as file:
        file.write(bytes(8192))
    opening = threading.Thread(target=store.open, daemon=True)
    opening.start()
    opening.join(60)
    assert told == [Created, Quarantined]
    assert counts == [1, 0]
    store.close()


def test_an_exception_after_renew_logs_nobody_out_even_with_save_on_error(place: Path) -> None:
    """No response can carry the new cookie, so the old one must stay good, and nothing is stored that nobody has."""
    store = make_store(place / "sessions", save_on_error=True)
    cookie = stored(store, "ada", a=1)

    async def rotate(request: Request) -> PlainTextResponse:
        Session.of(request).renew()
        raise RuntimeError("boom")

    async def begin(request: Request) -> PlainTextResponse:
        Session.of(request)["n"] = 1
        raise RuntimeError("boom")

    app = Starlette(routes=[Route("/rotate", rotate), Route("/begin", begin)])
    app.add_middleware(SessionMiddleware, store=store)
    client = TestClient(app, raise_server_exceptions=False)
    assert client.get("/begin").status_code == 500
    assert store.count() == 1
    client.cookies.set(store.transport.name, cookie)
    assert client.get("/rotate").status_code == 500
    assert visit(store, cookie).user_id == "ada"
    client.get("/begin")
    assert visit(store, cookie)["n"] == 1
    store.close()


def test_a_store_that_cannot_serve_is_a_503_also_where_the_framework_makes_it_a_500(place: Path) -> None:
    store = make_store(place / "sessions")
    flask = Flask("application")

    @flask.get("/")
    def index() -> str:
        return str(Session.of(request).get("a"))

    flask.wsgi_app = WsgiSessionMiddleware(flask.wsgi_app, store)  # type: ignore[method-assign]
    cookie = stored(store, a=1)
    store.close()
    (place / "sessions").chmod(0o755)
    client = flask.test_client()
    client.set_cookie(store.transport.name, cookie)
    answer = client.get("/")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    (place / "sessions").chmod(0o700)
    assert client.get("/").text == "1"
    store.close()


def test_a_store_error_after_the_first_byte_reaches_the_server_as_it_is(store: SessionStore) -> None:
    started = []

    def app(environ: dict[str, Any], start: Callable[..., Callable[[bytes], object]]) -> list[bytes]:
        start("200 OK", [])(b"first")
        raise StoreFull("full")

    def start_response(status: str, headers: object) -> Callable[[bytes], object]:
        started.append(status)
        return lambda _: None

    with pytest.raises(StoreFull, match="full"):
        WsgiSessionMiddleware(app, store)({"PATH_INFO": "/"}, start_response)
    assert started == ["200 OK"]


def test_a_closed_memory_store_says_so_and_disturbs_no_other(store: SessionStore) -> None:
    cookie, memory = stored(store, a=1), store.memory
    store.close()
    with pytest.raises(StoreError, match="closed"):
        memory.count()
    assert visit(store, cookie)["a"] == 1


def test_a_key_may_retire_when_the_sessions_of_its_time_have_been_seen_under_the_new_one(place: Path) -> None:
    """A cookie is sealed under the new Key only together with its record."""
    old, new, clock = Key.generate(), Key.generate(), ManualClock()
    before = make_store(place / "s", clock, keys=(old,))
    cookie = stored(before, "ada", lang="en")
    before.close()
    both = make_store(place / "s", clock, keys=(old, new))
    session = visit(both, cookie)
    session["lang"] = "en"
    outcome = both.commit(session)
    assert outcome.set_cookie is not None
    cookie = outcome.set_cookie.partition("=")[2].partition(";")[0]
    both.close()
    after = make_store(place / "s", clock, keys=(new,))
    assert visit(after, cookie).user_id == "ada"
    after.close()


def test_clear_ends_all_sessions_that_it_can_read(place: Path) -> None:
    old, new, clock = Key.generate(), Key.generate(), ManualClock()
    before = make_store(place / "s", clock, keys=(old,))
    for _ in range(5):
        stored(before, a=1)
    before.close()
    after = make_store(place / "s", clock, keys=(new,))
    for _ in range(5):
        stored(after, a=1)
    assert after.clear() == 5
    assert after.count() == 5
    after.close()


def test_housekeeping_that_fails_costs_no_request_its_answer(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = visit(store, stored(store, a=1))
    session.renew(user_id="ada")
    store._next_sweep = 0

    def failing(*_: object) -> int:
        raise StoreError("no")

    monkeypatch.setattr(store.memory, "sweep", failing)
    assert store.commit(session).set_cookie


def test_an_epoch_never_goes_back_with_the_clock(place: Path) -> None:
    clock = ManualClock()
    store = make_store(place / "s", clock)
    cookie = stored(store, a=1)
    before = visit(store, cookie)
    assert before["a"] == 1
    clock.step(-86_400)
    environment = store.memory.environment
    environment._quarantine(environment.open(), "said by a test")
    after = visit(store, cookie)
    after["a"] = 2
    store.commit(after)
    assert before.record is not None
    assert after.record is not None
    assert after.record.header.epoch > before.record.header.epoch
    store.close()


@pytest.mark.parametrize("what", ["increment", "create", "renew"])
def test_what_was_committed_while_the_store_was_being_rebuilt_is_applied_once(place: Path, what: str) -> None:
    """A writer that finds the generation changed after its commit does it again on the rebuilt store, which may have
    kept the first one already."""
    store = make_store(place / "s")
    session = visit(store, stored(store, "ada", n=0))
    assert session["n"] == 0
    environment = store.memory.environment
    rebuilt: list[bool] = []
    run = environment._run

    def rebuilt_after_commit(work: Any, write: bool) -> Any:
        result = run(work, write)
        if write and not rebuilt:
            rebuilt.append(True)
            environment._quarantine(environment.open(), "said by a test")
            environment.redoing = True  # what a writer finds that was between its commit and the look at the number
            return run(work, write)
        return result

    environment._run = rebuilt_after_commit  # type: ignore[method-assign]
    if what == "increment":
        assert session.increment("n") == 1
        assert visit(store, cookie_of(store, session))["n"] == 1
    elif what == "renew":
        session.renew()
        assert store.commit(session).set_cookie
        assert visit(store, cookie_of(store, session)).user_id == "ada"
    else:
        fresh = store.session()
        fresh["x"] = 1
        fresh.save()
        assert store.session(fresh.id)["x"] == 1
    assert rebuilt
    store.close()


def test_nothing_that_is_shown_holds_an_id_or_a_cookie(store: SessionStore) -> None:
    cookie = stored(store, a="private")
    header = f"{store.transport.name}={cookie}".encode()
    session = visit(store, cookie)
    assert session["a"] == "private"
    session.renew()
    outcome = store.commit(session)
    ticket = store.transport.read(header)
    shown = " ".join(
        map(repr, (ticket, store.resolve(lambda: header), outcome, session, store, store.keyring, session.record))
    )
    assert outcome.set_cookie is not None
    for secret in (cookie, outcome.set_cookie[20:80], repr(session.secret)[2:20], str(session.id), "private"):
        assert secret not in shown


def test_a_cancelled_request_drops_its_changes_and_nothing_else(store: SessionStore) -> None:
    cookie = stored(store, a=1)
    reached = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        session = Session.of(scope)
        session["a"] = 2
        session.increment("n")
        reached.set()
        await asyncio.Event().wait()

    async def run() -> None:
        headers = [(b"cookie", f"{store.transport.name}={cookie}".encode())]
        scope = {"type": "http", "path": "/", "headers": headers}
        task = asyncio.ensure_future(SessionMiddleware(app, store)(scope, None, None))  # type: ignore[arg-type]
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert visit(store, cookie).to_dict() == {"a": 1, "n": 1}


def test_a_middleware_within_a_middleware_of_the_same_store_leaves_the_session_to_the_outer_one(
    store: SessionStore,
) -> None:
    """A mounted application with a middleware of its own: one session, one cookie."""

    async def login(request: Request) -> PlainTextResponse:
        session = Session.of(request)
        session.renew(user_id="ada")
        return PlainTextResponse("in")

    inner = Starlette(routes=[Route("/login", login)])
    inner.add_middleware(SessionMiddleware, store=store)

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        Session.of(scope)["csrf"] = "token"
        await inner(scope, receive, send)

    client = TestClient(SessionMiddleware(outer, store))
    answer = client.get("/login")
    assert len(answer.headers.get_list("set-cookie")) == 1
    assert store.count() == 1
    assert visit(store, client.cookies[store.transport.name]).to_dict() == {"csrf": "token"}


@pytest.mark.parametrize("end", ["destroy", "renew"])
def test_a_request_with_an_id_that_just_ended_reads_nothing_stores_nothing_and_sets_no_cookie(
    place: Path, end: str
) -> None:
    """It may be answered after a login whose cookie it must not overwrite; a minute later the id is just unknown."""
    clock = ManualClock()
    store = make_store(place / "s", clock)
    cookie = stored(store, "ada", hits=41)
    ending = visit(store, cookie)
    getattr(ending, end)()
    store.commit(ending)
    late = visit(store, cookie)
    assert late.increment("hits") == 1
    late["x"] = 1
    assert store.commit(late).set_cookie is None
    assert store.count() == (end == "renew")
    clock.advance(61)
    later = visit(store, cookie)
    assert later.increment("hits") == 1
    assert store.commit(later).set_cookie is not None
    store.close()


def test_a_session_that_everybody_ended_gets_no_cookie_any_more(store: SessionStore) -> None:
    session = visit(store)
    session["a"] = 1
    session.save()
    store.clear()
    session["b"] = 2
    assert store.commit(session).set_cookie is None


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_comma_parts_no_cookies(store: SessionStore, protocol: str) -> None:
    """Else who can set any cookie, from a sibling's domain, could set this one in spite of its `__Host-`."""
    visitor = Visitor(store, protocol)
    visitor.ask(lambda session: session.update(a=1))
    (cookie,) = visitor.cookies.values()
    name = store.transport.name
    for value in (f"dark,{name}={cookie}", f"dark, {name}={cookie}, lang=en"):
        visitor.cookies = {"theme": value}
        assert visitor.data() == {}
    visitor.cookies = {"theme": "dark", name: cookie, "list": "a,b"}
    assert visitor.data() == {"a": 1}


def test_a_path_beyond_ascii_is_skipped_under_wsgi_too(store: SessionStore) -> None:
    def app(environ: dict[str, Any], start: Callable[..., object]) -> list[bytes]:
        seen.append("shmsession.session" in environ)
        return []

    seen: list[bool] = []
    middleware = WsgiSessionMiddleware(app, store, skip="/über")
    middleware({"PATH_INFO": "/über/uns".encode().decode("latin-1")}, lambda *_: lambda _: None)
    assert seen == [False]


def test_an_object_that_the_application_still_holds_after_save_goes_on_being_noticed(store: SessionStore) -> None:
    cookie = stored(store, cart=["tea"])
    socket, other = visit(store, cookie), visit(store, cookie)
    cart = socket["cart"]
    socket["n"] = 1
    other["cart"].append("milk")
    store.commit(other)
    socket.save()
    cart.append("cake")
    socket.save()
    assert visit(store, cookie)["cart"] == ["tea", "cake"]


def test_threads_that_use_a_store_for_the_first_time_together_make_one_memory_store(place: Path) -> None:
    for number in range(20):
        store = make_store(place / f"s{number}")
        barrier = threading.Barrier(6)
        found: list[Any] = []

        def use(store: SessionStore = store, barrier: threading.Barrier = barrier, found: list[Any] = found) -> None:
            barrier.wait()
            found.append(store.memory)

        threads = [threading.Thread(target=use) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, found))) == 1
        assert store.memory.environment.users == 1
        store.close()


def test_dead_readers_are_freed_without_waiting_for_a_writer(store: SessionStore) -> None:
    """gunicorn's arbiter does it: a worker that was stopped inside a transaction must not stop the arbiter too."""
    stored(store, a=1)
    done, environment = threading.Event(), store.memory.environment
    opened = environment.open()
    with opened.env.begin(write=True):

        def free() -> None:
            store.free_dead_readers()
            done.set()

        other = threading.Thread(target=free)
        other.start()
        assert done.wait(30)
    other.join()


def test_a_retry_does_not_take_another_process_s_commit_for_its_own(store: SessionStore) -> None:
    """Equal bytes are one's own only when the store was rebuilt between; not after a map that was full at commit."""
    cookie = stored(store, n=0)
    first, other = visit(store, cookie), visit(store, cookie)
    assert first["n"] == other["n"] == 0
    environment, run = store.memory.environment, store.memory.environment._run
    failed: list[bool] = []

    def undone_once(work: Any, write: bool) -> Any:
        if write and not failed:
            failed.append(True)
            with pytest.raises(ZeroDivisionError):
                run(lambda txn, tables: (work(txn, tables), 1 // 0), True)
            assert other.increment("n") == 1
            raise StoreFull("said by a test") from lmdb.MapFullError("said by a test")
        return run(work, write)

    environment._run = undone_once  # type: ignore[method-assign]
    assert first.increment("n") == 2
    assert visit(store, cookie)["n"] == 2


def test_a_clear_that_comes_with_an_old_id_ends_the_renewed_session_too(store: SessionStore) -> None:
    cookie = stored(store, "ada", a=1)
    rotating = visit(store, cookie)
    rotating.renew()
    store.commit(rotating)
    late = visit(store, cookie)
    late.clear()
    store.commit(late)
    assert not visit(store, cookie_of(store, rotating)).exists


def test_the_size_of_a_session_follows_what_apply_did(store: SessionStore) -> None:
    session = visit(store, stored(store, cart="x" * 60_000))
    session.apply("cart", lambda _: "")
    session["other"] = "y" * 50_000
    store.commit(session)
    assert visit(store, cookie_of(store, session))["other"] == "y" * 50_000


def test_an_id_with_junk_in_it_is_no_session(store: SessionStore) -> None:
    session = store.session()
    session["a"] = 1
    session.save()
    assert session.id is not None
    assert store.session(session.id).exists
    assert not store.session(session.id[:10] + "!!!!" + session.id[10:]).exists


def test_both_stores_of_one_directory_can_hear_of_a_rebuild(place: Path) -> None:
    """Whichever is used next tells its hooks; none takes the news along when it closes."""
    told: list[Event] = []
    first = make_store(place / "s", keys=(Key.generate(),))
    first.hooks = Hooks([told.append])
    stored(first, a=1)
    second = make_store(place / "s", keys=first.config.keys)
    second.open()
    second.close()
    environment = first.memory.environment
    environment._quarantine(environment.open(), "said by a test")
    stored(first, a=2)
    assert [type(event) for event in told] == [Created, Quarantined, Created]
    first.close()


def test_what_cannot_be_kept_does_not_hide_the_application_s_own_exception(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(place / "s", save_on_error=True)
    cookie = stored(store, a=1)

    def app(environ: dict[str, Any], start: Callable[..., object]) -> list[bytes]:
        Session.of(environ)["a"] = 2
        monkeypatch.setattr(store.memory, "update", full)
        raise RuntimeError("the application's own")

    def full(*_: object) -> None:
        raise StoreFull("full")

    environ = {"PATH_INFO": "/", "HTTP_COOKIE": f"{store.transport.name}={cookie}"}
    with pytest.raises(RuntimeError, match="own"):
        WsgiSessionMiddleware(app, store)(environ, lambda *_: lambda _: None)
    store.close()
