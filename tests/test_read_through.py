"""Read-through: one question a session, answers that are no guesses, and a broken database that logs nobody out."""

import asyncio
import gc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession.asgi import Message, Scope, SessionMiddleware
from shmsession.backends.base import SENTINEL, Row, State
from shmsession.behind import MISSING_MS, Behind
from shmsession.config import SessionConfig
from shmsession.errors import BackendError, BackendUnavailable, SessionGone, StoreError, Unreadable
from shmsession.flusher import SWEEP_MS
from shmsession.hooks import Created, Destroyed, Event
from shmsession.keyring import Key, Keyring
from shmsession.memory.doorbell import Doorbell
from shmsession.memory.room import QUIET_MS
from shmsession.memory.store import STALE_FILL_MS, Missing
from shmsession.record import Record
from shmsession.rows import Rows
from shmsession.session import Session
from shmsession.signalling import BACKOFF_MS
from shmsession.store import SessionStore
from shmsession.testing import ManualClock
from tests.backends import AFTER, BEFORE, HALF, Host, MemoryBackend, values_in
from tests.memory import HOUR, handle, waiting
from tests.servers import wait_for

A, B = handle(1), handle(2)


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    with Host(place, MemoryBackend(labelled=False)) as host:
        yield host


def behind(host: Host, rows: Rows | None = None) -> Behind:
    """Its loads are called by hand, on the test's own loop: nothing is started."""
    return Behind(host.memory, host.backend, rows or host.rows, host.clock, host.flusher, load_seconds=60)


def send_and_forget(host: Host, key: bytes = A, **values: Any) -> None:
    """A session that only the backend has."""
    host.create(key, **values)
    host.flush()
    host.clock.advance(2 * QUIET_MS / 1000)
    host.memory.outbox.retire(host.clock.now(), 1, b"")
    assert host.load(key) is Missing.UNKNOWN


class SlowBackend(MemoryBackend):
    """Its loads answer when told."""

    def __init__(self) -> None:
        super().__init__(labelled=False)
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def load(self, handle: bytes) -> Row | None:
        row = await super().load(handle)
        await self.may_answer.wait()
        return row


# ── one question ──────────────────────────────────────────────────────────────────────────────────────────────


def test_many_requests_for_one_session_ask_once(place: Path) -> None:
    """Fifty at once get the same answer to one question, and it stays in memory."""
    with Host(place, backend := SlowBackend()) as host:
        send_and_forget(host, v=1)

        async def ask() -> list[Record | Missing]:
            part, asked = behind(host), backend.calls.count("load")
            backend.may_answer.clear()
            tasks = [asyncio.create_task(part._load_once(A)) for _ in range(50)]
            for _ in range(10):
                await asyncio.sleep(0)
            backend.may_answer.set()
            answers = await asyncio.gather(*tasks)
            assert backend.calls.count("load") == asked + 1
            return list(answers)

        answers = asyncio.run(ask())
        assert {id(answer) for answer in answers} == {id(answers[0])}
        assert values_in(answers[0]) == {"v": 1}
        assert host.load(A) == answers[0]


@pytest.mark.parametrize("who", ["the first", "all but one", "all"])
def test_who_gives_up_fails_nobody_else(place: Path, who: str) -> None:
    """Cancelled requests: the others get their answer; when nobody is left it is kept in memory all the same."""
    with Host(place, backend := SlowBackend()) as host:
        send_and_forget(host, v=1)

        async def ask() -> None:
            part = behind(host)
            backend.may_answer.clear()
            tasks = [asyncio.create_task(part._load_once(A)) for _ in range(10)]
            for _ in range(5):
                await asyncio.sleep(0)
            quitters = {"the first": tasks[:1], "all but one": tasks[:-1], "all": tasks}[who]
            for task in quitters:
                task.cancel()
            await asyncio.gather(*quitters, return_exceptions=True)
            assert all(task.cancelled() for task in quitters)
            backend.may_answer.set()
            for task in tasks:
                if task not in quitters:
                    assert values_in(await task) == {"v": 1}
            for _ in range(5):
                await asyncio.sleep(0)

        asyncio.run(ask())
        assert values_in(host.load(A)) == {"v": 1}


def test_an_error_reaches_all_who_wait_and_the_next_one_asks_anew(place: Path) -> None:
    with Host(place, backend := SlowBackend()) as host:
        send_and_forget(host, v=1)

        async def ask() -> None:
            part = behind(host)
            backend.fail("load")
            results = await asyncio.gather(*(part._load_once(A) for _ in range(20)), return_exceptions=True)
            assert {type(result) for result in results} == {BackendUnavailable}
            assert values_in(await part._load_once(A)) == {"v": 1}

        asyncio.run(ask())
        gc.collect()


def test_an_error_that_nobody_waits_for_is_no_noise(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All requests were cancelled before it came."""
    with Host(place, backend := SlowBackend()) as host:

        async def ask() -> None:
            part = behind(host)
            backend.fail("load")
            task = asyncio.create_task(part._load_once(A))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for _ in range(10):
                await asyncio.sleep(0)

        asyncio.run(ask())
        gc.collect()
        assert "never retrieved" not in caplog.text


def test_a_session_that_is_nowhere_is_not_asked_for_again_and_again(host: Host) -> None:
    """For five seconds the answer holds, by the boot clock; then it is asked again. Another handle is asked at once."""

    async def ask() -> None:
        part = behind(host)
        assert await part._load_once(A) is Missing.UNKNOWN
        host.clock.advance((MISSING_MS - 1) / 1000)
        host.clock.step(3600)
        assert await part._load_once(A) is Missing.UNKNOWN
        assert host.backend.calls == ["load"]
        assert await part._load_once(B) is Missing.UNKNOWN
        host.clock.advance(0.001)
        assert await part._load_once(A) is Missing.UNKNOWN
        assert host.backend.calls == ["load"] * 3

    asyncio.run(ask())


def test_so_many_of_these_answers_are_kept_and_the_oldest_goes_first(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A flood of strangers costs no more memory than that."""
    monkeypatch.setattr("shmsession.behind.MISSING_HANDLES", 3)

    async def ask() -> None:
        part = behind(host)
        for number in range(1, 6):
            await part._load_once(handle(number))
        assert list(part._missing) == [handle(3), handle(4), handle(5)]
        host.backend.calls.clear()
        for number in (3, 4, 5, 1):
            await part._load_once(handle(number))
        assert host.backend.calls == ["load"]

    asyncio.run(ask())


@pytest.mark.parametrize("state", [State.DEAD, State.ERASED])
def test_what_is_dead_or_erased_there_is_no_session(host: Host, state: State) -> None:
    host.backend.rows[A] = Row(A, state, 1, 1, host.clock.now() + HOUR)
    assert asyncio.run(behind(host)._load_once(A)) is Missing.UNKNOWN
    assert host.memory.environment.get(A) is None


def test_what_has_ended_there_is_no_session(host: Host) -> None:
    send_and_forget(host, v=1)
    host.clock.advance(hours=1)
    assert asyncio.run(behind(host)._load_once(A)) is Missing.UNKNOWN
    assert host.memory.environment.get(A) is None


def test_an_answer_too_old_to_be_believed_is_an_error(place: Path) -> None:
    """More than thirty seconds: by then memory may have forgotten that the session was destroyed."""
    with Host(place, backend := SlowBackend()) as host:
        send_and_forget(host, v=1)

        async def ask() -> None:
            backend.may_answer.clear()
            task = asyncio.create_task(behind(host)._load_once(A))
            for _ in range(5):
                await asyncio.sleep(0)
            host.clock.advance((STALE_FILL_MS + 1) / 1000)
            backend.may_answer.set()
            with pytest.raises(BackendUnavailable, match="too late"):
                await task

        asyncio.run(ask())
        assert host.memory.environment.get(A) is None


def test_a_session_that_was_asked_for_before_the_backend_forgot_it_is_sent_again(host: Host) -> None:
    """All that was in memory had been sent again by the time the answer came, and brought one more."""
    send_and_forget(host, v=1)
    host.create(B)
    host.flush()
    answer = host.backend.load

    async def load(handle: bytes) -> Row | None:
        row = await answer(handle)
        if handle == A:
            host.backend.forget()
            host.flush()
        return row

    host.backend.load = load  # type: ignore[method-assign]
    assert values_in(asyncio.run(behind(host)._load_once(A))) == {"v": 1}
    assert list(host.backend.sessions()) == [B]
    assert waiting(host.memory) == [A]
    host.flush()
    host.agrees()


def test_an_answer_from_before_a_rebuild_is_no_answer_in_time(host: Host) -> None:
    """Nor is the store said to be full."""
    send_and_forget(host, v=1)
    answer = host.backend.load

    async def load(handle: bytes) -> Row | None:
        row = await answer(handle)
        host.clock.advance(1)
        host.memory.environment._quarantine(host.memory.environment.open(), "a test says so")
        return row

    host.backend.load = load  # type: ignore[method-assign]
    with pytest.raises(BackendUnavailable, match="too late"):
        asyncio.run(behind(host)._load_once(A))
    host.backend.load = answer  # type: ignore[method-assign]
    assert values_in(asyncio.run(behind(host)._load_once(A))) == {"v": 1}


def test_no_answer_in_time_is_an_error(place: Path) -> None:
    with Host(place, backend := SlowBackend()) as host:

        async def ask() -> None:
            backend.may_answer.clear()
            part = Behind(host.memory, backend, host.rows, host.clock, host.flusher, load_seconds=0.001)
            with pytest.raises(BackendUnavailable, match="did not answer"):
                await part._load_once(A)

        asyncio.run(ask())


# ── a broken database ─────────────────────────────────────────────────────────────────────────────────────────


def test_where_a_load_that_failed_with_an_error_of_its_own_comes_from_is_logged_once(
    host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """The 503 names its type; what it says is nobody's business, for a password may be in it."""
    host.backend.error = lambda _: ValueError("hunter2")
    host.backend.fail("load", times=3)
    part = behind(host)
    for _ in range(3):
        with pytest.raises(BackendError, match="ValueError"):
            asyncio.run(part._load_once(A))
    (record,) = caplog.records
    assert "in load" in record.message
    assert "hunter2" not in caplog.text


def test_after_an_error_nobody_asks_for_a_moment(host: Host) -> None:
    """The word that it is down is shared by all processes, flushers included; then somebody tries again."""
    part = behind(host)
    host.backend.fail("load")
    with pytest.raises(BackendUnavailable):
        asyncio.run(part._load_once(A))
    with pytest.raises(BackendUnavailable):
        part._refuse_if_down()
    assert host.memory.environment.counters.totals()["load_errors"] == 2
    host.clock.advance(BACKOFF_MS[0] / 1000)
    part._refuse_if_down()


def test_a_pause_of_an_earlier_boot_is_over(host: Host) -> None:
    """The directory is on a disk, and the machine started anew while the backend was down: its boot clock is far below
    the moment that is stored."""
    host.clock.advance(days=30)
    host.memory.environment.backend_down_until = host.clock.boot() + 100
    host.clock.advance(days=-30)
    behind(host)._refuse_if_down()
    host.create(A)
    flusher = host.flusher()
    flusher.holds_lease = True
    asyncio.run(flusher._attempt())
    host.agrees()


def test_one_damaged_row_is_not_an_outage(host: Host) -> None:
    """Its owner gets an error, not a logout; everybody else is served."""
    send_and_forget(host, v=1)
    send_and_forget(host, B, v=2)
    row = host.backend.rows[A]
    part = behind(host)
    for body in (b"", row.body[:5], row.body[:40], b"\x07" + row.body[1:], b"\x00" + bytes(200)):
        host.backend.rows[A] = row._replace(body=body)
        with pytest.raises(StoreError):
            asyncio.run(part._load_once(A))
        part._refuse_if_down()
        assert host.memory.environment.get(A) is None
    assert values_in(asyncio.run(part._load_once(B))) == {"v": 2}


def test_a_row_under_an_unknown_database_key_is_unreadable(place: Path) -> None:
    """It is no session that this process may judge: 503, whatever on_backend_error says, and nobody else is refused."""
    sealed = Rows(Keyring([Key(bytes(range(32)))], "database"))
    other = Rows(Keyring([Key(bytes(range(1, 33)))], "database"))
    with Host(place, MemoryBackend(labelled=False), rows=sealed) as host:
        send_and_forget(host, v=1)
        for rows in (other, Rows()):
            part = behind(host, rows)
            with pytest.raises(Unreadable):
                asyncio.run(part._load_once(A))
            part._refuse_if_down()
        assert values_in(asyncio.run(behind(host, sealed)._load_once(A))) == {"v": 1}


# ── through an application ────────────────────────────────────────────────────────────────────────────────────


class Site:
    """A session store, its backend, and an ASGI application in front that keeps a visitor's name."""

    def __init__(self, place: Path, **settings: Any) -> None:
        self.backend = MemoryBackend(labelled=False)
        self.clock = ManualClock()
        options: dict[str, Any] = {
            "directory": place, "name": "site", "secure": False, "keys": (Key(bytes(range(32))),), "map_size": 4 << 20,
            "flush_interval": timedelta(days=1), "through_timeout": timedelta(milliseconds=1),
        }  # fmt: skip
        self.store = SessionStore(self.backend, config=SessionConfig(**{**options, **settings}), clock=self.clock)
        self.store.memory.open()
        self.middleware = SessionMiddleware(self._app, self.store)
        self.cookie = b""
        self.found: list[dict[str, Any]] = []

    async def _app(self, scope: Scope, receive: Any, send: Any) -> None:
        session = Session.of(scope)
        match scope["path"]:
            case "/destroy":
                self.found.append(dict(session))
                session.destroy()
            case "/nothing":
                pass
            case path:
                self.found.append(dict(session))
                session["name"] = path
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    def get(self, path: str = "/ada") -> tuple[int, dict[bytes, bytes]]:
        """Status and headers."""
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        headers = [(b"cookie", self.cookie)] if self.cookie else []
        scope: Scope = {"type": "http", "path": path, "headers": headers, "scheme": "http"}
        asyncio.run(self.middleware(scope, receive, send))
        found = dict(sent[0]["headers"])
        if b"set-cookie" in found:
            self.cookie = found[b"set-cookie"].split(b";")[0]
        return sent[0]["status"], found

    def flush(self) -> None:
        assert self.store.sync.flush(30)

    def memory_is_lost(self) -> None:
        """All of it that the backend has."""
        self.clock.advance(2 * QUIET_MS / 1000)
        self.store.memory.outbox.retire(self.clock.now(), 1, b"")
        assert self.store.count() == 0

    def recover(self) -> None:
        self.backend.heal()
        self.clock.advance(BACKOFF_MS[1] / 1000)


@pytest.fixture
def site(place: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(**settings: Any) -> Site:
        made.append(Site(place, **settings))
        return made[-1]

    yield make
    for site in made:
        site.store.close()


def test_a_load_that_fails_is_a_503_and_no_logout(site: Callable[..., Site]) -> None:
    """With Retry-After, without Set-Cookie, and the session is there when the backend is."""
    visitor = site()
    assert visitor.get("/ada")[0] == 200
    visitor.flush()
    visitor.memory_is_lost()
    before, cookie = visitor.backend.snapshot(), visitor.cookie
    visitor.backend.fail("load")
    for _ in range(3):
        status, headers = visitor.get("/eve")
        assert status == 503
        assert b"retry-after" in headers
        assert b"set-cookie" not in headers
    assert visitor.get("/nothing")[0] == 200
    assert visitor.backend.snapshot() == before
    assert visitor.found == [{}]
    visitor.recover()
    assert visitor.get("/bob")[0] == 200
    assert visitor.cookie == cookie
    assert visitor.found[-1] == {"name": "/ada"}


def test_anonymous_by_choice_overwrites_nothing(site: Callable[..., Site]) -> None:
    """The request goes on without a session; what it stores is a new one, and the old one is there afterwards."""
    visitor = site(on_backend_error="anonymous")
    visitor.get("/ada")
    visitor.flush()
    visitor.memory_is_lost()
    old = visitor.cookie
    visitor.backend.fail("load")
    assert visitor.get("/eve")[0] == 200
    assert visitor.cookie != old
    assert visitor.found[-1] == {}
    visitor.recover()
    visitor.flush()
    assert len([row for row in visitor.backend.sessions().values() if row.state is State.LIVE]) == 2
    visitor.memory_is_lost()
    visitor.cookie = old
    assert visitor.get("/bob")[0] == 200
    assert visitor.found[-1] == {"name": "/ada"}


def test_hooks_hear_of_the_session_that_a_login_ended_unseen(site: Callable[..., Site]) -> None:
    """It was in memory again by then, fetched by another request."""
    visitor = site(on_backend_error="anonymous")
    visitor.get("/ada")
    visitor.flush()
    visitor.memory_is_lost()
    cookie = visitor.cookie
    visitor.backend.fail("load")
    session = visitor.store.request_session(lambda: cookie)
    assert session.to_dict() == {}
    visitor.recover()
    fetched = visitor.store.request_session(lambda: cookie)
    assert fetched.to_dict() == {"name": "/ada"}
    events: list[Event] = []
    visitor.store.hooks._hooks = (events.append,)
    session.renew(user_id="ada")
    visitor.store.commit(session)
    assert events[0] == Destroyed(fetched.handle or "")
    assert type(events[1]) is Created


@pytest.mark.parametrize("how", [BEFORE, AFTER, HALF])
@pytest.mark.parametrize("call", ["open", "initialize", "load", "write"])
def test_a_session_in_memory_goes_on_whatever_fails(site: Callable[..., Site], call: str, how: str) -> None:
    """Each call of the backend fails in turn: requests of sessions in memory are served, what they commit waits, and
    arrives."""
    visitor = site()
    visitor.backend.fail(call, how, times=3)
    for number in range(4):
        assert visitor.get(f"/{number}")[0] == 200
        try:
            visitor.store.sync.flush(0.05)
        except StoreError:
            assert call == "open"
    assert visitor.found == [{}, {"name": "/0"}, {"name": "/1"}, {"name": "/2"}]
    visitor.recover()
    visitor.flush()
    (row,) = visitor.backend.sessions().values()
    assert row.state is State.LIVE
    visitor.memory_is_lost()
    assert visitor.get("/last")[0] == 200
    assert visitor.found[-1] == {"name": "/3"}


@pytest.mark.parametrize("call", ["clear", "initialize"])
def test_what_a_script_asks_for_fails_loudly(site: Callable[..., Site], call: str) -> None:
    visitor = site()
    visitor.get("/ada")
    visitor.flush()
    visitor.backend.fail(call)
    with pytest.raises(BackendUnavailable):
        visitor.store.sync.clear_backend() if call == "clear" else visitor.store.sync.initialize()
    if call == "initialize":
        assert visitor.get("/bob")[0] == 200
        assert visitor.found[-1] == {"name": "/ada"}


def test_a_sweep_that_fails_costs_nothing(host: Host) -> None:
    host.create(A)
    flusher = host.flusher()
    flusher.holds_lease = True
    host.backend.fail("sweep")
    asyncio.run(flusher._attempt())
    host.agrees()
    host.clock.advance(SWEEP_MS / 1000)
    host.backend.rows[B] = Row(B, State.DEAD, 1, 1, 5)
    asyncio.run(flusher._attempt())
    assert B not in host.backend.rows
    assert SENTINEL in host.backend.rows


def test_destroyed_while_the_backend_is_down_is_answered_counted_and_dead(site: Callable[..., Site]) -> None:
    """The response waits for the backend at most `through_timeout`, then leaves; the cookie is gone, and so is the
    session, now and afterwards."""
    visitor = site()
    visitor.get("/ada")
    visitor.flush()
    cookie = visitor.cookie
    visitor.backend.fail("write", times=100)
    late = visitor.store.stats().counters["late"]
    status, headers = visitor.get("/destroy")
    assert status == 200
    assert b"Max-Age=0" in headers[b"set-cookie"]
    assert visitor.store.stats().counters["late"] == late + 1
    visitor.cookie = cookie
    visitor.get("/eve")
    assert visitor.found[-1] == {}
    visitor.recover()
    visitor.flush()
    assert State.DEAD in {row.state for row in visitor.backend.sessions().values()}


def test_hits_and_misses_are_counted(site: Callable[..., Site]) -> None:
    visitor = site()
    visitor.get("/ada")
    visitor.get("/bob")
    visitor.flush()
    visitor.memory_is_lost()
    visitor.get("/eve")
    visitor.get("/joe")
    counters = visitor.store.stats().counters
    assert (counters["hits"], counters["misses"]) == (2, 1)


# ── a session that leaves memory while a request has it ───────────────────────────────────────────────────────


def retired_in_the_middle(visitor: Site) -> Session:
    """A request, or a websocket of an hour's silence, holds a session that memory has given up for lack of use."""
    visitor.get("/ada")
    visitor.flush()
    cookie = visitor.cookie
    session = visitor.store.request_session(lambda: cookie)
    assert session["name"] == "/ada"
    visitor.clock.advance(hours=1, minutes=1)
    visitor.store.memory.outbox.retire(visitor.clock.now(), HOUR, b"")
    assert visitor.store.count() == 0
    return session


@pytest.mark.parametrize("verb", ["save", "increment", "commit", "renew"])
def test_what_it_commits_is_not_lost(site: Callable[..., Site], verb: str) -> None:
    """The session did not end: the backend has it."""
    visitor = site()
    session = retired_in_the_middle(visitor)
    try:
        if verb == "increment":
            assert session.increment("n") == 1
        else:
            session["n"] = 1
            if verb == "renew":
                session.renew(user_id="ada")
            session.save() if verb == "save" else visitor.store.commit(session)
    except SessionGone:
        pytest.fail("the session is said to have ended")
    again = visitor.store.session(session.id)
    assert dict(again) == {"name": "/ada", "n": 1}


def test_it_is_not_revived_when_it_was_destroyed_there(site: Callable[..., Site]) -> None:
    """It left memory, and then it was destroyed, and that too was forgotten in memory: the commit is dropped."""
    visitor = site()
    session = retired_in_the_middle(visitor)
    raw = session.raw_handle
    assert raw is not None
    visitor.store.memory.destroy(raw, visitor.clock.now())
    visitor.flush()
    visitor.clock.advance(2 * QUIET_MS / 1000)
    visitor.store.memory.sweep(visitor.clock.now())
    assert visitor.store.memory.environment.get(raw) is None
    session["n"] = 1
    with pytest.raises(SessionGone):
        session.save()
    visitor.flush()
    assert {row.state for row in visitor.backend.sessions().values()} == {State.DEAD}


def test_destroying_it_takes_the_cookie_back_and_waits(site: Callable[..., Site]) -> None:
    visitor = site()
    session = retired_in_the_middle(visitor)
    raw = session.raw_handle
    assert raw is not None
    session.destroy()
    outcome = visitor.store.commit(session)
    assert outcome.set_cookie is not None
    assert "Max-Age=0" in outcome.set_cookie
    assert outcome.through == (raw,)
    assert waiting(visitor.store.memory) == [raw]


# ── the part of a process that runs ───────────────────────────────────────────────────────────────────────────


def test_a_process_that_ends_silences_nobodys_bell(host: Host) -> None:
    """Workers come and go: those that stay go on hearing those that come."""
    path = host.memory.environment.path
    staying = Doorbell(path)
    assert staying.works, "this Python has no posix_ipc"
    part = behind(host)
    part.start()
    part.close()
    try:
        Doorbell(path).ring()
        assert staying.wait(5)
    finally:
        staying.remove()


def test_a_flusher_ends_at_once_and_before_its_backend_is_closed(host: Host) -> None:
    """Also when it has only just begun. A question to a closed backend would fail, and tell all processes that it is
    down."""
    running: list[str] = []
    close = host.backend.close

    async def closing() -> None:
        running.extend(str(task.get_coro()) for task in asyncio.all_tasks() if "Flusher" in str(task.get_coro()))
        await close()

    host.backend.close = closing  # type: ignore[method-assign]
    for _ in range(10):
        part = behind(host)
        part.start()
        part.close()
        assert host.backend.calls[-1] == "close", "it did not end, and the backend was never closed"
        assert not running


def test_a_backend_that_cannot_be_opened_is_an_error_each_time(host: Host) -> None:
    """One attempt is for all who wait for it, and for a moment after it nobody makes another. No thread is left."""
    part, before = behind(host), set(Path("/proc/self/task").iterdir())
    host.backend.fail("open", times=3)
    for number in range(3):
        for _ in range(2):
            with pytest.raises(BackendError):
                part.load(A)
        assert host.backend.calls.count("open") == number + 1
        host.clock.advance(BACKOFF_MS[0] / 1000)
    assert part.load(A) is Missing.UNKNOWN
    part.close()
    wait_for(lambda: set(Path("/proc/self/task").iterdir()) <= before, "the threads have ended")
