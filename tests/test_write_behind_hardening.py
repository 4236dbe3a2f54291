"""Write-behind under attack: crowded memory, garbage, hooks that ask back, forks, slow and frozen databases."""

import asyncio
import contextlib
import gc
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import pytest

from shmsession import Key, SessionConfig, SessionStore, _native
from shmsession._portal import Portal
from shmsession.asgi import Message, Scope
from shmsession.asgi import SessionMiddleware as ASGIMiddleware
from shmsession.backends import connect
from shmsession.backends.base import SENTINEL, Answer, Row, State
from shmsession.backends.sqlite import SQLiteBackend
from shmsession.behind import OPEN_SECONDS, Behind
from shmsession.errors import (
    BackendError,
    BackendUnavailable,
    ConfigError,
    ShmSessionError,
    StoreError,
    StoreFull,
    Unreadable,
    UnsafeStore,
)
from shmsession.flusher import BATCH, BATCH_BYTES, HEARTBEAT_MS, Flusher
from shmsession.hooks import Event, Flushed, Hook, Hooks
from shmsession.keyring import load_or_create
from shmsession.lease import Lease
from shmsession.memory.outbox import CHUNK
from shmsession.memory.room import QUIET_MS
from shmsession.memory.store import Missing
from shmsession.record import HEADER_BYTES, Changes, Record, pack_header, unpack_header
from shmsession.session import Session
from shmsession.signalling import BACKOFF_MS, is_down
from shmsession.wsgi import SessionMiddleware as WSGIMiddleware
from tests.backends import Host, MemoryBackend, run, values_in
from tests.kept import BACKENDS, Kept
from tests.memory import HOUR, Child, check_tables, handle, waiting
from tests.servers import PATIENCE, wait_for

pytest_plugins = ["tests.database_hosts"]

T = TypeVar("T")
NewStore = Callable[..., SessionStore]

A, B, C = handle(1), handle(2), handle(3)
KEY = Key(bytes(range(32)))
SOON = timedelta(milliseconds=20)
NEVER = timedelta(days=1)


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    with Host(place, MemoryBackend(labelled=False)) as host:
        yield host


@pytest.fixture
def new_store(place: Path) -> Iterator[NewStore]:
    """Stores in one place, that flush when somebody asks for it."""
    made: list[SessionStore] = []

    def make(backend: Any, *, name: str = "test", hooks: tuple[Hook, ...] = (), **settings: Any) -> SessionStore:
        options: dict[str, Any] = {
            "directory": place / "sessions", "secure": False, "keys": (KEY,), "map_size": 4 << 20,
            "flush_interval": NEVER, **settings,
        }  # fmt: skip
        made.append(SessionStore(backend, config=SessionConfig(name=name, **options), hooks=hooks))
        return made[-1]

    yield make
    for store in made:
        store.close()


def ending(work: Callable[[], T]) -> T:
    """What it returns or raises; it must end."""
    results: list[T] = []
    errors: list[BaseException] = []

    def working() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)

    thread = threading.Thread(target=working, daemon=True)
    thread.start()
    thread.join(PATIENCE / 2)
    assert not thread.is_alive(), "it waits for ever"
    if errors:
        raise errors[0]
    return results[0]


def saved(store: SessionStore, **values: Any) -> Session:
    session = store.session()
    session.update(values)
    session.save()
    return session


def behind(host: Host) -> Behind:
    """Its loads are called by hand: nothing is started."""
    return Behind(host.memory, host.backend, host.rows, host.clock, host.flusher, load_seconds=PATIENCE)


def attempt(host: Host, flusher: Flusher) -> None:
    """What the holder of the lease does when it wakes, once nobody is kept from asking any more."""
    host.clock.advance(BACKOFF_MS[1] / 1000)
    flusher.holds_lease = True
    asyncio.run(flusher._attempt())


def send_and_forget(host: Host, *keys: bytes) -> None:
    """Sessions that only the backend has."""
    for key in keys:
        host.create(key, v="mine")
    host.flush()
    host.clock.advance(2 * QUIET_MS / 1000)
    host.memory.outbox.retire(host.clock.now(), 1, b"")
    assert all(host.load(key) is Missing.UNKNOWN for key in keys)


# ── memory with little room ───────────────────────────────────────────────────────────────────────────────────


def fill(host: Host, size: int, *, send_every: int | None = None) -> int:
    """Sessions of `size` bytes until none fits; how many they are."""
    flusher = host.flusher()
    for number in range(1, 10_000):
        try:
            host.login(handle(number), v="x" * size)
        except StoreFull:
            return number - 1
        if send_every and number % send_every == 0:
            run(flusher.round())
            assert not waiting(host.memory)
    raise AssertionError("it is never full")


def test_a_store_without_room_for_a_chunk_is_acknowledged_in_smaller_steps(host: Host) -> None:
    """Each acknowledgement writes its record anew: a whole chunk of large ones does not fit, and need not."""
    count = fill(host, 30_000)
    usage = host.memory.usage()
    assert (usage.total - usage.used) * 4096 < min(CHUNK, count) * 30_000, "there was room for a chunk"
    flusher = host.flusher()
    rounds = 0
    while waiting(host.memory):
        run(flusher.round())
        rounds += 1
        assert rounds < 10, "nothing is crossed off"
    assert len(host.backend.sessions()) == count
    host.agrees()
    check_tables(host.memory)


def test_a_backend_that_forgot_is_refilled_from_a_crowded_store_and_nobody_starves(host: Host) -> None:
    """In a few rounds, and between any two of some small steps whoever else uses the event loop has a turn."""
    count = fill(host, 30_000, send_every=5)
    host.flush()
    host.agrees()
    host.backend.forget()
    host.clock.advance(HEARTBEAT_MS / 1000)
    flusher, outbox = host.flusher(), host.memory.outbox
    flusher.holds_lease = True
    rounds = steps = most = 0
    whole_round, whole_step = flusher.round, outbox.put_back

    async def round_() -> bool:
        nonlocal rounds
        rounds += 1
        return rounds <= MANY and await whole_round()

    def put_back(after: bytes, *, dead: bool) -> tuple[int, bytes, bool]:
        nonlocal steps, most
        steps += 1
        most = max(most, steps)
        return whole_step(after, dead=dead)

    async def others() -> None:
        nonlocal steps
        while True:
            steps = 0
            await asyncio.sleep(0)

    async def recovering() -> None:
        ticking = asyncio.create_task(others())
        await flusher._attempt()
        ticking.cancel()

    flusher.round = round_  # type: ignore[method-assign]
    outbox.put_back = put_back  # type: ignore[method-assign]
    for _ in range(3):
        asyncio.run(recovering())
        host.clock.advance(HEARTBEAT_MS / 1000)
    assert len(host.backend.sessions()) == count
    assert rounds < MANY, "it spins"
    assert most == 1, "nobody else had a turn"
    host.agrees()


MANY = 60


def test_a_store_without_room_for_a_single_step_is_asked_again_later(host: Host) -> None:
    """What the backend has lost waits for the next look, when there may be room: nobody spins until then."""
    send_and_forget(host, A)
    host.create(B)
    host.flush()
    host.backend.forget()
    host.clock.advance(HEARTBEAT_MS / 1000)
    flusher, whole, rounds = host.flusher(), host.memory.outbox.put_back, 0
    flusher.holds_lease = True
    whole_round = flusher.round

    def full(after: bytes, *, dead: bool) -> NoReturn:
        raise StoreFull(f"no room after {after!r} ({dead}), by order")

    async def round_() -> bool:
        nonlocal rounds
        rounds += 1
        return rounds <= MANY and await whole_round()

    flusher.round = round_  # type: ignore[method-assign]
    host.memory.outbox.put_back = full  # type: ignore[method-assign]
    asyncio.run(flusher._attempt())
    assert rounds <= 2, "it spins"
    host.memory.outbox.put_back = whole  # type: ignore[method-assign]
    asyncio.run(flusher._attempt())
    assert list(host.backend.sessions()) == [B]
    host.agrees()


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────


class SlowLink(MemoryBackend):
    """Carries no more than so many rows in time."""

    def __init__(self) -> None:
        super().__init__(labelled=False)
        self.most = BATCH
        self.sizes: list[int] = []

    async def write(self, rows: Any) -> list[Answer]:
        size = sum(row.handle != SENTINEL for row in rows)
        if size:
            self.sizes.append(size)
        if size > self.most:
            raise BackendUnavailable("no answer in time, by order")
        return await super().write(rows)


def test_a_batch_that_is_not_answered_in_time_is_halved_and_grows_again(place: Path) -> None:
    """Else what waits for a slow link would wait for ever, and what waits after an outage would go one by one."""
    with Host(place, link := SlowLink()) as host:
        for number in range(200):
            host.create(handle(number + 1))
        flusher = host.flusher()
        run(host.flusher().round())
        link.sizes.clear()
        for number in range(BATCH):
            host.create(handle(number + 1000))
        link.most = 60
        for _ in range(30):
            attempt(host, flusher)
            if not waiting(host.memory):
                break
        assert waiting(host.memory) == []
        assert link.sizes[:4] == [500, 250, 125, 62]
        assert max(size for size in link.sizes if size <= link.most) >= 30
        link.most, link.sizes = BATCH, []
        for number in range(2 * BATCH):
            host.create(handle(number + 2000))
        attempt(host, flusher)
        assert link.sizes[:2] < [BATCH, BATCH]
        assert max(link.sizes) > 200, "it did not grow again"
        host.agrees()


def test_a_batch_ends_at_so_many_bytes(place: Path) -> None:
    """Few large sessions or many small ones; one that is larger than all that goes alone."""
    with Host(place, MemoryBackend(labelled=False), map_size=16 << 20) as host:
        for number in range(100):
            host.create(handle(number + 1), v="x" * 50_000)
        for number in range(300):
            host.create(handle(number + 1000), v="x")
        first = host.memory.outbox.oldest(BATCH, BATCH_BYTES)
        sizes = [len(dirty.record.raw) for dirty in first]
        assert sum(sizes[:-1]) < BATCH_BYTES <= sum(sizes)
        assert [dirty.handle for dirty in first] == [handle(number + 1) for number in range(len(first))]
        assert len(host.memory.outbox.oldest(BATCH, 1)) == 1
        assert len(host.memory.outbox.oldest(BATCH)) == 400
        flusher = host.flusher()
        attempt(host, flusher)
        assert waiting(host.memory) == []
        assert max(sum(len(row.body) for row in batch) for batch in host.backend.sent) < BATCH_BYTES + 51_000
        assert max(len(batch) for batch in host.backend.sent) >= 300
        host.agrees()


# ── the part of a process that runs ───────────────────────────────────────────────────────────────────────────


def test_the_portal_keeps_what_waits_for_something_that_nobody_else_knows() -> None:
    """A task and the future that it waits for are garbage together, if the loop is all that knows of them."""
    portal = Portal()
    waiting, outcomes = threading.Event(), list[object]()

    async def forever() -> None:
        future = asyncio.get_running_loop().create_future()
        waiting.set()
        await future

    portal._begin(forever(), outcomes.append)
    assert waiting.wait(PATIENCE)
    portal.wait(asyncio.sleep(0))
    gc.collect()
    assert outcomes == []
    ending(portal.close)
    (task,) = outcomes
    assert isinstance(task, asyncio.Task)
    assert task.cancelled()


@pytest.mark.parametrize("moment", ["running", "stopping", "cancelling", "closing"])
def test_whoever_asks_the_portal_while_it_closes_is_answered_or_refused(moment: str) -> None:
    """Whatever the event loop does at that moment: nobody waits for an answer that cannot come."""
    portal = Portal()
    outcomes: list[object] = []

    async def forever() -> None:
        await asyncio.get_running_loop().create_future()

    def ask() -> None:
        try:
            portal._begin(forever(), outcomes.append)
        except StoreError as error:
            outcomes.append(error)

    def asking_at(step: Callable[[], None]) -> Callable[[], None]:
        """`step`, and a question before and after it, the first time."""

        def asked() -> None:
            if not outcomes:
                ask()
                step()
                ask()
            else:
                step()

        return asked

    async def clinging() -> None:
        try:
            await forever()
        finally:
            ask()

    loop: Any = portal._loop
    asked = 2
    if moment == "running":
        ask()
        asked = 1
    elif moment == "cancelling":
        began = threading.Event()

        async def begin() -> None:
            asyncio.get_running_loop().call_soon(began.set)
            await clinging()

        portal._begin(begin(), outcomes.append)
        assert began.wait(PATIENCE)
    else:
        name = {"stopping": "stop", "closing": "close"}[moment]
        setattr(loop, name, asking_at(getattr(loop, name)))
    ending(portal.close)
    assert len(outcomes) == asked
    with pytest.raises(StoreError):
        ending(lambda: portal.wait(forever()))
    ending(portal.close)


def test_who_waits_for_the_portal_when_it_closes_gets_a_store_error() -> None:
    portal = Portal()
    begun = threading.Event()

    async def forever() -> None:
        begun.set()
        await asyncio.get_running_loop().create_future()

    def close() -> None:
        assert begun.wait(PATIENCE)
        portal.close()

    closing = threading.Thread(target=close)
    closing.start()
    with pytest.raises(StoreError):
        ending(lambda: portal.wait(forever()))
    closing.join()


def threads() -> set[Path]:
    return set(Path("/proc/self/task").iterdir())


def test_a_load_that_comes_after_close_is_refused_and_starts_nothing(new_store: NewStore) -> None:
    """A request that held on to what its store had open: an error, no thread, no connection."""
    backend, before = MemoryBackend(labelled=False), threads()
    store = new_store(backend).open()
    other = new_store(MemoryBackend(labelled=False), name="test").memory  # keeps the memory open in this process
    other.open()
    part = store.behind
    store.close()
    wait_for(lambda: threads() <= before, "the threads have ended")
    calls = list(backend.calls)
    for work in (lambda: part.load(A), lambda: asyncio.run(part.load_async(A)), lambda: part.drain(1), part.start):
        with pytest.raises(StoreError, match="closed"):
            ending(work)
    part.see_to_it()
    wait_for(lambda: threads() <= before, "no thread was started")
    assert backend.calls == calls
    assert saved(store, v=1).exists, "the store itself opens again"


def test_a_backend_that_cannot_be_opened_keeps_no_store_closed(
    new_store: NewStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises: the server starts, a request that needs it is a 503, and a commit is kept. It is tried again
    without a word from anybody."""
    monkeypatch.setattr("shmsession.behind.REOPEN_SECONDS", 0.01)
    backend = MemoryBackend(labelled=False)
    backend.error = lambda call: OSError(f"{call}: no route, says the driver")
    backend.fail("open", times=1_000_000)
    store = new_store(backend, flush_interval=SOON).open()
    wait_for(lambda: "does not flush its sessions yet: fake could not be opened: OSError" in caplog.text, "it says so")
    assert "in open" in caplog.text, "it does not say where it comes from"
    with pytest.raises(BackendError):
        store.session(NOBODY)
    saved(store, v=1)
    assert store.stats().outbox == 1
    backend.heal()
    wait_for(lambda: store.stats().outbox == 0, "it is sent")
    assert len(backend.sessions()) == 1
    assert caplog.text.count("does not flush") == 1


def test_a_backend_whose_settings_cannot_work_stops_the_start(new_store: NewStore) -> None:
    """Each time, as long as they are what they are; nothing is left running."""
    before = threads()
    backend = MemoryBackend(labelled=False)
    backend.error = lambda call: ConfigError(f"{call}: the certificate is not there")
    backend.fail("open", times=2)
    store = new_store(backend)
    for _ in range(2):
        with pytest.raises(ConfigError, match="certificate"):
            store.open()
    wait_for(lambda: threads() <= before, "the threads have ended")
    store.open()
    saved(store, v=1)
    assert store.sync.flush(PATIENCE)


def test_a_backend_that_is_never_done_with_opening_is_unavailable_and_keeps_no_commit_waiting(
    new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = time.monotonic()

    class Stuck(MemoryBackend):
        async def open(self) -> None:
            await asyncio.Event().wait()

    store = new_store(Stuck(labelled=False))
    saved(store, v=1)
    assert time.monotonic() - begin < OPEN_SECONDS / 2
    store.close()
    monkeypatch.setattr("shmsession.behind.OPEN_SECONDS", 0.05)
    with pytest.raises(BackendUnavailable, match=r"in 0\.05 s"):
        ending(lambda: store.session(NOBODY))
    ending(store.close)


class Refusing:
    """Starts threads, except so many of the next whose target's name holds `name`."""

    def __init__(self, name: str, times: int) -> None:
        self.name, self.times = name, times
        self._start = _native.start_thread

    def __call__(self, target: Callable[[], object]) -> None:
        if self.name in repr(target) and self.times:
            self.times -= 1
            raise RuntimeError("can't start new thread")
        self._start(target)


def test_a_candidate_that_ends_for_whatever_reason_keeps_no_lease(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another need not wait for its silence."""
    monkeypatch.setattr(_native, "start_thread", Refusing("_listen", times=1_000_000))
    flusher, lease = host.flusher(), Lease(host.memory.environment, host.clock)
    was_held: list[bool] = []

    async def rest(heard: int, begun: int) -> NoReturn:
        while not flusher.holds_lease:  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0)
        was_held.append(lease.holder() is not None)
        raise RuntimeError(f"by order, after ring {heard}, at {begun}")

    flusher._rest = rest  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="by order"):
        asyncio.run(flusher.run())
    assert was_held == [True]
    assert lease.holder() is None
    assert lease.take()


def test_a_process_whose_listener_got_no_thread_flushes_all_the_same(
    new_store: NewStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the only one there is."""
    monkeypatch.setattr(_native, "start_thread", Refusing("_listen", times=1))
    store = new_store(MemoryBackend(labelled=False), flush_interval=SOON).open()
    saved(store, v=1)
    wait_for(lambda: store.stats().outbox == 0, "it flushes")


def test_an_unexpected_error_when_the_lease_is_taken_ends_no_candidate(
    host: Host, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors may run out for a moment. Said once, not at every beat."""
    whole, failing = Lease.take, iter([OSError(24, "Too many open files")] * 3)

    def take(lease: Lease) -> bool:
        for error in failing:
            raise error
        return whole(lease)

    monkeypatch.setattr(Lease, "take", take)
    monkeypatch.setattr("shmsession.flusher.BEAT_MS", 10)
    host.create(A, v=1)

    async def living() -> None:
        candidate = asyncio.create_task(host.flusher().run())
        async with asyncio.timeout(PATIENCE):
            while waiting(host.memory) and not candidate.done():  # noqa: ASYNC110  # the memory store tells nobody
                await asyncio.sleep(0.005)
        assert not candidate.done()
        candidate.cancel()
        await asyncio.wait([candidate])

    asyncio.run(living())
    host.agrees()
    assert caplog.text.count("the lease cannot be taken") == 1


# ── hooks that ask back ───────────────────────────────────────────────────────────────────────────────────────

NOBODY = "A" * 43
"""The id of a session that is nowhere: the backend is asked for it."""


@pytest.mark.parametrize("question", ["load", "flush"])
def test_a_hook_that_asks_the_backend_from_the_flushers_thread_is_refused(
    new_store: NewStore, caplog: pytest.LogCaptureFixture, question: str
) -> None:
    """It would wait for itself. What it raises is logged and ignored, and everything goes on."""
    raised: list[type[Exception]] = []

    def hook(event: Event) -> None:
        if isinstance(event, Flushed) and not raised:
            try:
                store.session(NOBODY) if question == "load" else store.sync.flush(1)
            except Exception as error:
                raised.append(type(error))
                raise

    store = new_store(MemoryBackend(labelled=False), hooks=(hook,))
    saved(store, v=1)
    assert ending(lambda: store.sync.flush(PATIENCE))
    assert raised == [StoreError]
    assert "a hook failed on Flushed" in caplog.text
    assert not ending(lambda: store.session(NOBODY).exists), "another request's load"


@pytest.mark.parametrize("when", ["the store is closed", "a first commit starts the flusher"])
def test_a_hook_that_asks_the_backend_holds_nobody_up(new_store: NewStore, when: str) -> None:
    """Also at the very moment at which another thread has the process's part in hand."""
    may_ask, asking = threading.Event(), threading.Event()
    raised: list[StoreError] = []

    def hook(event: Event) -> None:
        if isinstance(event, Flushed) and not asking.is_set():
            asking.set()
            assert may_ask.wait(PATIENCE)
            try:
                part.load(B)
            except StoreError as error:
                raised.append(error)
                raise

    store = new_store(MemoryBackend(labelled=False), hooks=(hook,))
    store.memory.create(A, Changes(), store.clock.now())
    part = store.behind
    draining = threading.Thread(target=_quietly, args=(store.sync.flush,), daemon=True)
    draining.start()
    assert asking.wait(PATIENCE)
    other = threading.Thread(target=store.close if when == "the store is closed" else part.start, daemon=True)
    other.start()
    wait_for(part._starting.locked, "it has it in hand")
    may_ask.set()
    other.join(PATIENCE / 2)
    draining.join(PATIENCE / 2)
    stuck = [thread for thread in (other, draining) if thread.is_alive()]
    assert not stuck, "a hook and another thread wait for each other"
    assert len(raised) == 1


def _quietly(work: Callable[[], object]) -> None:
    with contextlib.suppress(ShmSessionError):
        work()


# ── what a backend answers ────────────────────────────────────────────────────────────────────────────────────

YEAR_10000 = 253_402_300_800_000


def _headed(row: Row, **changes: Any) -> Row:
    """The row with another header in its body."""
    header = unpack_header(row.body[1:])._replace(**changes)
    return row._replace(body=row.body[:1] + pack_header(header) + row.body[1 + HEADER_BYTES :])


GARBAGE: dict[str, Callable[[Row], Any]] = {
    "a tuple": lambda row: tuple(row)[:3],
    "a dict": lambda row: {"state": 1},
    "a number": lambda row: 7,
    "no body": lambda row: row._replace(body=cast("Any", None)),
    "a body of text": lambda row: row._replace(body=cast("Any", "text")),
    "an empty body": lambda row: row._replace(body=b""),
    "half a header": lambda row: row._replace(body=row.body[:20]),
    "a truncated body": lambda row: row._replace(body=row.body[:-3]),
    "a longer body": lambda row: row._replace(body=row.body + b"x"),
    "a list": lambda row: row._replace(body=row.body[: 1 + HEADER_BYTES] + b"\x93\x01\x02\x03"),
    "a map of numbers": lambda row: row._replace(body=row.body[: 1 + HEADER_BYTES] + b"\x81\xa1v\x01"),
    "another version": lambda row: row._replace(version=row.version + 1),
    "a time after the year 9999": lambda row: _headed(row, idle_expiry=YEAR_10000),
    "made after the year 9999": lambda row: _headed(row, created=YEAR_10000),
    "seen after the year 9999": lambda row: _headed(row, last_seen=YEAR_10000),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_from_a_backend_is_a_backend_error_and_never_kept(host: Host, what: str) -> None:
    """And it says nothing of other sessions: the backend is not taken to be down."""
    send_and_forget(host, A, B)
    row = host.backend.rows[A]
    part = behind(host)
    host.backend.rows[A] = GARBAGE[what](row)
    answer = host.backend.load

    async def load(handle: bytes) -> Row | None:
        return host.backend.rows.get(handle) if handle == A else await answer(handle)

    host.backend.load = load  # type: ignore[method-assign]
    for _ in range(2):
        with pytest.raises((BackendError, Unreadable)):
            asyncio.run(part._load_once(A))
        assert host.memory.environment.get(A) is None
    assert not is_down(host.memory.environment, host.clock)
    assert values_in(asyncio.run(part._load_once(B))) == {"v": "mine"}
    host.backend.rows[A] = row
    assert values_in(asyncio.run(part._load_once(A))) == {"v": "mine"}


def test_a_row_with_any_one_bit_wrong_is_a_session_or_an_error_of_ours(host: Host) -> None:
    """What the application is given can be looked at from all sides; nothing else is raised."""
    send_and_forget(host, A)
    row, part = host.backend.rows[A], behind(host)
    outcomes: set[type] = set()
    for bit in range(8 * len(row.body)):
        body = bytearray(row.body)
        body[bit // 8] ^= 1 << bit % 8
        host.backend.rows[A] = row._replace(body=bytes(body))
        part._missing.clear()
        try:
            found = asyncio.run(part._load_once(A))
        except StoreError as error:
            outcomes.add(type(error))
            assert host.memory.environment.get(A) is None
            continue
        outcomes.add(type(found))
        if isinstance(found, Record):
            session = Session(None)  # type: ignore[arg-type]
            session._reset(found)
            session.loaded = True
            with contextlib.suppress(ShmSessionError):
                assert session.get("v", None) is not session
            assert (session.created_at, session.last_seen, session.storable) is not None
            assert session.expires_at is None or session.expires_at.year < 10_000
            host.memory.destroy(A, host.clock.now())
            _erase(host, A)
    assert {Record, BackendError} <= outcomes


def _erase(host: Host, key: bytes) -> None:
    """As if memory had never heard of it."""

    def work(txn: Any, tables: Any) -> None:
        for table in tables[:-1]:
            txn.drop(table, delete=False)

    assert key
    host.memory.environment.write(work)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_damaged_row_refuses_only_its_own_session(place: Path, new_store: NewStore, name: str) -> None:
    """Its client may ask again and again: others are served, and what they commit is sent."""
    with Kept(name, place) as kept:
        store = new_store(kept.url).open()
        damaged, *others = [saved(store, v=number) for number in range(5)]
        assert store.sync.flush(PATIENCE)
        _damage(kept, damaged.raw_handle)
        store.close()
        store = new_store(kept.url, name="other", allow_shared=True).open()
        assert damaged.id is not None
        for number, other in enumerate(others):
            with pytest.raises(BackendError):
                store.session(damaged.id)
            assert other.id is not None
            assert store.session(other.id)["v"] == number + 1
        saved(store, v="new")
        with pytest.raises(BackendError):
            store.session(damaged.id)
        assert store.sync.flush(PATIENCE)
        store.close()


@pytest.mark.parametrize("name", BACKENDS)
def test_the_death_of_a_damaged_row_keeps_nothing_else_from_being_sent(
    place: Path, new_store: NewStore, name: str
) -> None:
    """Its client logs out, where anonymous service is chosen: what was committed after it arrives all the same."""
    with Kept(name, place) as kept:
        store = new_store(kept.url).open()
        damaged = saved(store, v=1)
        assert store.sync.flush(PATIENCE)
        _damage(kept, damaged.raw_handle)
        assert damaged.raw_handle is not None
        store.memory.destroy(damaged.raw_handle, store.clock.now())
        other = saved(store, v=2)
        wait_for(lambda: store.sync.flush(0.2) or other.raw_handle in kept.rows(), "the other one is sent")
        store.close()


def _damage(kept: Kept, key: bytes | None) -> None:
    """A state that no version writes."""
    assert key is not None
    if kept.name == "sqlite":
        import sqlite3

        with contextlib.closing(sqlite3.connect(kept.file)) as db, db:
            db.execute("UPDATE shmsession SET state = 7 WHERE handle = ?", (key,))
    elif kept.name == "postgres":
        kept.server.run(f"UPDATE shmsession SET state = 7 WHERE handle = '\\x{key.hex()}'", kept.database)
    elif kept.name == "mysql":
        kept.server.run(f"UPDATE shmsession SET state = 7 WHERE handle = x'{key.hex()}'", kept.database)
    elif kept.name == "surrealdb":
        kept.server.run(f"UPDATE shmsession:⟨{key.hex()}⟩ SET state = 7", kept.database)
    else:
        assert kept.server.ask("SETRANGE", f"shmsession:row:{key.hex()}", "0", "7").startswith(b":")


# ── everything is destroyed ───────────────────────────────────────────────────────────────────────────────────


class Gated(MemoryBackend):
    """Its loads read at once and answer when told."""

    def __init__(self) -> None:
        super().__init__(labelled=False)
        self.reached, self.may_answer = threading.Event(), threading.Event()
        self.may_answer.set()

    async def load(self, handle: bytes) -> Row | None:
        row = await super().load(handle)
        if handle != SENTINEL:
            self.reached.set()
            while not self.may_answer.is_set():  # noqa: ASYNC110  # it is set by another thread
                await asyncio.sleep(0.001)
        return row


@pytest.mark.parametrize("all_of_it", [True, False], ids=["clear_backend", "clear"])
def test_a_load_under_way_while_all_is_destroyed(place: Path, new_store: NewStore, all_of_it: bool) -> None:
    """`clear_backend()`: it does not bring the session back. `clear()` destroys what is in memory, and no load of what
    is not."""
    backend = Gated()
    store = new_store(backend)
    session = saved(store, v="mine")
    assert store.sync.flush(PATIENCE)
    store.close()
    store = new_store(backend, name="other", allow_shared=True)
    session_id = session.id
    assert session_id is not None
    backend.may_answer.clear()
    backend.reached.clear()
    found: list[Session] = []
    asking = threading.Thread(target=lambda: found.append(store.session(session_id)))
    asking.start()
    assert backend.reached.wait(PATIENCE)
    if all_of_it:
        assert ending(store.sync.clear_backend) == 1
    else:
        assert store.clear() == 0
    backend.may_answer.set()
    asking.join()
    assert [one.exists for one in found] == [not all_of_it]
    assert store.session(session_id).exists == (not all_of_it)
    assert store.sync.flush(PATIENCE)
    assert store.session(session_id).exists == (not all_of_it)


def test_what_is_asked_for_after_all_was_destroyed_is_found(host: Host) -> None:
    """A visitor who comes back to another host, and then to this one, has the new session."""
    send_and_forget(host, A, B)
    slow = host.miss(A)
    host.clock.advance(1)
    host.memory.cleared()
    host.clock.advance(1)
    assert slow.arrives() is Missing.DEAD
    assert values_in(host.read_through(B)) == {"v": "mine"}


# ── forks ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["an object", "a URL", "a URL, closed first in the child"])
@pytest.mark.parametrize("name", ["postgres", "mariadb", "redis", "redis-cluster"])
def test_parent_and_children_go_on_with_connections_of_their_own(
    request: pytest.FixtureRequest, new_store: NewStore, name: str, how: str
) -> None:
    """The parent has loaded by the time it forks, as an application does that is preloaded."""
    if name == "redis":
        url = request.getfixturevalue("redis_server").url
    elif name == "redis-cluster":
        url = request.getfixturevalue("redis_cluster").url
    else:
        url = request.getfixturevalue(name).url(request.getfixturevalue(f"{name}_database"))
    first = new_store(url)
    ids = [saved(first, v=number).id for number in range(31)]
    assert first.sync.flush(PATIENCE)
    first.close()
    store = new_store(connect(url) if how == "an object" else url, name="other", allow_shared=True).open()
    assert _values(store, ids[:1]) == [0]

    def child(part: int) -> tuple[list[Any], bool]:
        if how.endswith("child"):
            store.close()
        found = _values(store, ids[part : part + 10])
        saved(store, v="child")
        return found, store.sync.flush(PATIENCE)

    children = [Child(lambda channel, part=part: channel.send(child(part))) for part in (1, 11)]  # type: ignore[misc]
    assert _values(store, ids[21:]) == list(range(21, 31))
    for begin, one in zip((1, 11), children, strict=True):
        assert one.channel.receive() == (list(range(begin, begin + 10)), True)
        one.wait()
    store.memory.outbox.retire(store.clock.now(), -1, b"")
    saved(store, v="parent")
    assert store.sync.flush(PATIENCE)


def _values(store: SessionStore, ids: list[str | None]) -> list[Any]:
    return [store.session(session_id)["v"] for session_id in ids]


# ── a database that stands still, and one that vanishes ───────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["postgres", "mariadb"])
def test_a_frozen_database_keeps_a_load_and_a_close_no_longer_than_they_may_take(
    request: pytest.FixtureRequest, name: str, new_store: NewStore
) -> None:
    """psycopg would ask the server to cancel, which is the one that does not answer, for 10 s."""
    server: Any = request.getfixturevalue(name)
    url = f"{server.url(request.getfixturevalue(f'{name}_database'))}&timeout=1"
    first = new_store(url).open()
    one, other = saved(first, v=1), saved(first, v=2)
    assert first.sync.flush(PATIENCE)
    first.close()
    store = new_store(url, name="other", allow_shared=True, load_timeout=timedelta(seconds=0.3)).open()
    assert one.id is not None
    assert other.id is not None
    assert store.session(one.id)["v"] == 1
    server.freeze()
    try:
        begin = time.monotonic()
        with pytest.raises(BackendUnavailable):
            ending(lambda: store.session(other.id))
        took = time.monotonic() - begin
        begin = time.monotonic()
        ending(store.close)
        closed = time.monotonic() - begin
    finally:
        server.thaw()
    print(f"load {took:.2f} s, close {closed:.2f} s, {server}")
    assert took < 4
    assert closed < 9


def test_a_candidate_outlives_a_store_that_cannot_be_opened_for_a_while(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has made its directory readable for others, and emptied it; it goes on when that is mended."""
    config = SessionConfig(
        directory=place / "s", name="test", keys=(Key.generate(),), map_size=4 << 20, secure=False,
        flush_interval=timedelta(milliseconds=50),
    )  # fmt: skip
    with SessionStore(f"sqlite:///{place / 'sessions.db'}", config=config) as store:
        saved(store, n=1)
        wait_for(lambda: len(store.memory.outbox) == 0, "it flushes")
        store.path.chmod(0o755)
        shutil.rmtree(store.path / "lmdb")
        flushing = store.behind._flushing
        assert flushing is not None
        environment, refused = store.memory.environment, 0
        open_now = environment._open_now

        def counted() -> object:
            nonlocal refused
            try:
                return open_now()
            except UnsafeStore:
                refused += 1
                raise

        monkeypatch.setattr(environment, "_open_now", counted)
        wait_for(lambda: refused >= 4, "the candidate has met it, in its beat and in its rest")
        store.path.chmod(0o700)
        assert not flushing.done()
        session = saved(store, n=2)
        assert store.sync.persisted(session, PATIENCE)


def test_a_file_of_sqlite_that_is_removed_is_filled_once_somebody_makes_it_again(place: Path) -> None:
    """With all that memory has. Until then it is an error: an empty file would log out whom only the old one knew."""
    backend: Any = SQLiteBackend(place / "sessions.db")
    with Host(place, backend) as host:
        flusher = host.flusher()

        def files() -> list[Path]:
            return list(place.glob("sessions.db*"))

        def remove() -> None:
            for file in files():
                file.unlink()

        async def living() -> None:
            await backend.open()
            flusher.holds_lease = True
            host.create(A, v=1)
            await flusher._attempt()
            assert await backend.count() == 1
            remove()
            host.create(B, v=2)
            for _ in range(4):
                await flusher._attempt()
                host.clock.advance(HEARTBEAT_MS / 1000)
            assert not files()
            assert waiting(host.memory) == [B]
            await backend.initialize()  # as `shmsession initdb` does
            for _ in range(4):
                await flusher._attempt()
                host.clock.advance(HEARTBEAT_MS / 1000)
            assert sorted([key async for key in backend.handles()]) == [A, B]
            assert waiting(host.memory) == []
            await backend.close()

        asyncio.run(living())


# ── settings ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mark", ["@", "/", "@@", "/@", "@/"])
@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "mysql", "mariadb"])
def test_a_password_that_is_not_encoded_is_a_config_error_that_shows_nothing_of_it(scheme: str, mark: str) -> None:
    """Its tail would be taken for a host, whose name stands in logs."""
    for url in (
        f"{scheme}://shop:top{mark}hunter2@db.example/shop", f"{scheme}://shop:top{mark}hunter2@db.example:5432/shop",
        f"{scheme}://shop:{mark}hunter2@db.example/shop?sslmode=require",
    ):  # fmt: skip
        with pytest.raises(ConfigError) as raised:
            connect(url)
        shown = f"{raised.value!r} {raised.value} {raised.value.__cause__} {raised.value.__context__!r}"
        assert "hunter2" not in str(raised.value)
        assert "hunter2" not in f"{raised.value!r} {raised.value.__cause__}", shown
    with pytest.raises(ConfigError):
        SessionStore(f"{scheme}://shop:top{mark}hunter2@db.example/shop")
    assert "hunter2" not in repr(connect(f"{scheme}://shop:top%40hunter2@db.example/shop"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "soon"])
@pytest.mark.parametrize("url", ["redis://localhost", "unix:///run/redis", "postgresql:///app", "mysql://a@h/app"])
def test_a_timeout_that_is_no_time_is_refused(url: str, value: str) -> None:
    """With nan every question would end at once, or never."""
    with pytest.raises(ConfigError):
        connect(f"{url}?timeout={value}")


class OnFile(MemoryBackend):
    """One of an application's own that keeps its rows in a file."""

    remote = False

    def __init__(self, path: Path) -> None:
        super().__init__(labelled=False)
        self.path = path


def test_a_generated_key_is_kept_beside_the_file_of_any_backend_that_has_one(place: Path, new_store: NewStore) -> None:
    """What outlives the memory can be opened again."""
    store = new_store(OnFile(place / "rows.json"), keys=())
    saved(store, v=1)
    assert store.keyring.keys == tuple(load_or_create(place / "rows.json.key"))


# ── when it is sent ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_drain_ends_though_commits_go_on(host: Host) -> None:
    """Only what waited when it was called counts; whoever stops a busy server waits for no more than that."""
    numbers = iter(range(100, 200))

    def hook(event: Event) -> None:
        if isinstance(event, Flushed):
            host.create(handle(next(numbers)))

    for number in range(1, 2 * BATCH):
        host.create(handle(number + 1000))
    flusher = Flusher(host.memory, host.backend, host.rows, host.clock, Hooks([hook]), interval=1, memory_lifespan=HOUR)
    asked = waiting(host.memory)
    assert asyncio.run(flusher.drain(PATIENCE))
    assert set(asked) <= set(host.backend.sessions())
    assert 1 <= len(waiting(host.memory)) <= 2
    assert next(numbers) < 106, "it went on with what came meanwhile"


@pytest.fixture
def no_bell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without posix_ipc."""
    monkeypatch.setattr("shmsession.memory.doorbell.posix_ipc", None)


@pytest.mark.usefixtures("no_bell")
def test_without_a_bell_a_steady_load_is_sent_once_an_interval(new_store: NewStore) -> None:
    """Not as often as it is asked whether somebody rang."""
    interval = 0.3
    backend = MemoryBackend(labelled=False)
    store = new_store(backend, flush_interval=timedelta(seconds=interval)).open()
    session = saved(store, n=0)
    wait_for(lambda: backend.sessions(), "the first is sent")
    sent, begin = len(backend.sent), time.monotonic()
    while len([batch for batch in backend.sent[sent:] if batch]) < 3:
        session["n"] += 1
        session.save()
        time.sleep(0.005)
        assert time.monotonic() - begin < PATIENCE
    took = time.monotonic() - begin
    assert took > 1.5 * interval, "three batches in less than two intervals"


@pytest.mark.usefixtures("no_bell")
@pytest.mark.parametrize("rung", [True, False])
def test_without_a_bell_a_ring_is_heard_and_a_commit_is_none(
    host: Host, monkeypatch: pytest.MonkeyPatch, rung: bool
) -> None:
    """`Environment.ring` reaches a flusher of any process that shares the memory."""
    monkeypatch.setattr("shmsession.flusher.HEARTBEAT_MS", PATIENCE * 1000)
    flusher = host.flusher(interval=PATIENCE if rung else 0.3)
    flusher.holds_lease = True
    environment = host.memory.environment

    async def resting() -> float:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        rest = asyncio.create_task(flusher._rest(environment.rings, host.clock.boot()))
        await asyncio.sleep(0)
        number = 0
        while not rest.done():
            number += 1
            environment.ring() if rung else host.create(handle(number))
            await asyncio.sleep(0.01)
        return loop.time() - begin

    took = asyncio.run(resting())
    assert took < PATIENCE / 2 if rung else took >= 0.3


def test_a_boot_clock_that_went_back_keeps_nobody_resting(host: Host) -> None:
    """As after a virtual machine was put back."""
    flusher = host.flusher(interval=0.01)
    flusher.holds_lease = True
    begin = time.monotonic()
    asyncio.run(flusher._rest(host.memory.environment.rings, host.clock.boot() + 3_600_000))
    assert time.monotonic() - begin < PATIENCE / 2


@pytest.mark.usefixtures("no_bell")
def test_a_ring_between_a_look_and_the_rest_after_it_is_heard(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever rings while a batch is on its way need not wait for the next interval."""
    monkeypatch.setattr("shmsession.flusher.HEARTBEAT_MS", PATIENCE * 1000)
    flusher = host.flusher(interval=PATIENCE)
    flusher.holds_lease = True
    heard = host.memory.environment.rings
    host.memory.environment.ring()
    begin = time.monotonic()
    asyncio.run(flusher._rest(heard, host.clock.boot()))
    assert time.monotonic() - begin < PATIENCE / 2


@pytest.mark.parametrize("bell", [True, False])
def test_a_script_that_opens_nothing_is_flushed_when_it_waits(
    new_store: NewStore, monkeypatch: pytest.MonkeyPatch, bell: bool
) -> None:
    """`store.session()`, `save()`, `persisted()`: its process flushes if no other does."""
    if not bell:
        monkeypatch.setattr("shmsession.memory.doorbell.posix_ipc", None)
    monkeypatch.setattr("shmsession.flusher.HEARTBEAT_MS", 2 * PATIENCE * 1000)  # nothing but a ring wakes it
    backend = MemoryBackend(labelled=False)
    store = new_store(backend)
    one = saved(store, v=1)
    assert store.sync.persisted(one, PATIENCE)
    two = saved(store, v=2)
    assert asyncio.run(two.persisted(PATIENCE))
    one["v"] = 3
    one.save()
    assert store.sync.persisted(one, PATIENCE)
    assert len(backend.sessions()) == 2


def test_who_waits_for_what_others_left_behind_flushes_it(new_store: NewStore) -> None:
    """The process that committed it is gone; this one has committed nothing."""
    store = new_store(MemoryBackend(labelled=False))
    store.memory.create(A, Changes(), store.clock.now())
    assert store.sync.wait((A,), PATIENCE)


@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
def test_an_application_without_lifespan_or_hooks_flushes_after_its_first_commit(
    new_store: NewStore, protocol: str
) -> None:
    """Nothing told the store to open: a test client, a server without lifespan, any WSGI server."""
    backend = MemoryBackend(labelled=False)
    store = new_store(backend, flush_interval=SOON)
    visit = _asgi_visit if protocol == "asgi" else _wsgi_visit
    visit(store)
    wait_for(lambda: len(backend.sessions()) == 1, "it flushes")
    visit(store)
    wait_for(lambda: len(backend.sessions()) == 2 and store.stats().outbox == 0, "it goes on")


def _asgi_visit(store: SessionStore) -> None:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        Session.of(scope)["v"] = 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        assert message.get("status", 200) == 200

    scope: Scope = {"type": "http", "path": "/", "headers": [], "scheme": "http"}
    asyncio.run(ASGIMiddleware(app, store)(scope, receive, send))


def _wsgi_visit(store: SessionStore) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        Session.of(environ)["v"] = 1
        start_response("200 OK", [])
        return [b""]

    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "wsgi.url_scheme": "http"}
    response: Any = WSGIMiddleware(app, store)(environ, lambda *_: lambda _: None)
    assert list(response) == [b""]
    if hasattr(response, "close"):
        response.close()


# ── waiting for it ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_response_waits_for_each_session_once(new_store: NewStore) -> None:
    """However often a websocket or a job saves with `write="through"`."""
    store = new_store(MemoryBackend(labelled=False), write="through")
    session = saved(store, n=0)
    first = session.raw_handle
    for _ in range(5):
        session["n"] += 1
        session.save()
        session.increment("n")
    assert session.through == (first,)
    session.renew()
    session.save()
    session.destroy()
    assert session.through[0] == first
    assert len(session.through) == len(set(session.through)) == 2


@pytest.mark.parametrize("verb", ["increment", "apply"])
def test_with_write_through_what_happened_at_once_is_waited_for_too(new_store: NewStore, verb: str) -> None:
    """`increment()` and `apply()` commit before the response begins; so it waits for the backend."""
    for write in ("through", "behind"):
        backend = MemoryBackend(labelled=False)
        store = new_store(backend, name=write, write=write)
        session = saved(store, n=1)
        assert store.sync.flush(PATIENCE)
        assert session.id is not None
        session = store.session(session.id)
        session.increment("n") if verb == "increment" else session.apply("n", lambda n: n + 1)
        outcome = store.commit(session)
        assert outcome.through == ((session.raw_handle,) if write == "through" else ())
        assert store.sync.wait(outcome.through, PATIENCE)
        assert session.raw_handle is not None
        if write == "through":
            assert waiting(store.memory) == []
            assert backend.rows[session.raw_handle].version == 2


def test_an_apply_that_raises_waits_for_nothing(new_store: NewStore) -> None:
    store = new_store(MemoryBackend(labelled=False), write="through")
    session_id = saved(store, n=1).id
    assert session_id is not None
    session = store.session(session_id)

    def fail(value: int) -> NoReturn:
        raise ValueError(value)

    with pytest.raises(ValueError, match="1"):
        session.apply("n", fail)
    assert store.commit(session).through == ()


def test_a_late_logout_waits_for_the_row_that_it_killed(new_store: NewStore) -> None:
    """Its cookie is that of before a renewal: the session is killed, and waited for, under its new handle."""
    backend = MemoryBackend(labelled=False)
    store = new_store(backend)
    old = saved(store, v=1)
    assert old.id is not None
    late, renewing = store.session(old.id), store.session(old.id)
    assert late.exists
    renewing.renew()
    renewing.save()
    new = renewing.raw_handle
    assert new is not None
    assert new != old.raw_handle
    assert store.sync.flush(PATIENCE)
    assert backend.state(new) is State.LIVE
    late.destroy()
    through = store.commit(late).through
    assert through == (new,)
    assert store.sync.wait(through, PATIENCE)
    assert backend.state(new) is State.DEAD


# ── what says nothing ─────────────────────────────────────────────────────────────────────────────────────────


def test_making_the_tables_takes_no_lease_and_writes_no_sentinel(new_store: NewStore) -> None:
    """It may be done from anywhere, beside a store that is alive, and before there is one."""
    backend = MemoryBackend(labelled=False)
    store = new_store(backend)
    store.sync.initialize()
    assert backend.rows == {}
    assert Lease(store.memory.environment, store.clock).holder() is None
    store.close()
    assert backend.calls == ["open", "initialize", "close"]


def test_initdb_makes_the_tables_and_nothing_in_them(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shmsession.cli import main

    for name in [name for name in os.environ if name.startswith("SHMSESSION_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SHMSESSION_BACKEND", f"sqlite:///{place / 'sessions.db'}")
    monkeypatch.setenv("SHMSESSION_DIR", str(place / "sessions"))
    monkeypatch.setenv("SHMSESSION_NAME", "initdb")
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    assert main(["initdb"]) == 0
    store = SessionStore()
    assert Lease(store.memory.environment, store.clock).holder() is None
    store.close()

    async def look() -> None:
        backend = SQLiteBackend(place / "sessions.db")
        await backend.open()
        assert await backend.load(SENTINEL) is None
        assert await backend.count() == 0
        await backend.close()

    asyncio.run(look())


# ── counting ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_who_left_memory_for_room_and_who_for_idleness_are_counted_apart(host: Host) -> None:
    """`evicted` is a reason for more memory, `retired` is none."""
    counters = host.memory.environment.counters
    for number in range(1, 6):
        host.create(handle(number))
    host.flush()
    host.clock.advance(2 * QUIET_MS / 1000)
    assert host.memory.evict(2) == 2
    assert (counters.totals()["evicted"], counters.totals()["retired"]) == (2, 0)
    flusher = host.flusher(memory_lifespan=1)
    attempt(host, flusher)
    assert (counters.totals()["evicted"], counters.totals()["retired"]) == (2, 3)
    assert host.memory.count() == 0


def test_a_flood_that_makes_room_for_itself_is_counted_as_evicted(host: Host) -> None:
    """Not only what a tool evicts: what a commit does too."""
    fill(host, 10_000, send_every=5)
    host.flush()
    host.clock.advance(2 * QUIET_MS / 1000)
    for number in range(10):
        host.create(handle(20_000 + number), v="x" * 10_000)
    totals = host.memory.environment.counters.totals()
    assert totals["evicted"] > 0
    assert totals["retired"] == 0
