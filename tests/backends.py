"""What the tests of write-behind share: a backend in a dict that fails on command, and coroutines driven by hand."""

import itertools
import types
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Generator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar

from shmsession.backends.base import SENTINEL, Answer, Mark, Row, State, wins
from shmsession.clock import Clock
from shmsession.codec import decode, encode
from shmsession.errors import BackendUnavailable
from shmsession.flusher import HEARTBEAT_MS, Flusher
from shmsession.hooks import Event, Hooks
from shmsession.keyring import Keyring
from shmsession.memory.outbox import Dirty
from shmsession.memory.seal import RecordSeal
from shmsession.memory.store import MemoryStore, Missing
from shmsession.record import STORABLE, USER_KEY, WATERMARK, Changes, Record
from shmsession.rows import Rows
from shmsession.testing import ManualClock
from tests.memory import HOUR, KEYRING, contents, header_of, memory_store

T = TypeVar("T")

BEFORE: Final = "before"
"""The call raises, and nothing happened."""
AFTER: Final = "after"
"""The call raises, and all of it happened."""
HALF: Final = "half"
"""A write raises when half of its rows are stored."""
REST: Final = "rest"
"""The same with all rows but the first: the order in a batch promises nothing."""
FEWER: Final = "fewer"
"""A write stores all and answers for half of it: a broken backend."""

ADA: Final = encode("ada", "user_id")


# ── driven by hand ────────────────────────────────────────────────────────────────────────────────────────────


@types.coroutine
def pause(label: object = None) -> Generator[object, None, None]:
    """A point at which others may run. Without a label it suits any event loop."""
    yield label


class Running(Generic[T]):
    """A coroutine that goes from one pause to the next when told, with no event loop."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._work = work
        self.at: object = None
        self.done = False
        self._result: list[T] = []

    def step(self) -> None:
        """On to the next pause, or to the end; what it raises is raised here."""
        try:
            self.at = self._work.send(None)
        except StopIteration as stop:
            self.done = True
            self._result.append(stop.value)
        except BaseException:
            self.done = True
            raise

    def until(self, label: object) -> Self:
        """On to the pause with this label."""
        while not self.done:
            self.step()
            if self.at == label and not self.done:
                return self
        raise AssertionError(f"it ended, and never came to {label!r}")

    def finish(self) -> T:
        """On to the end."""
        while not self.done:
            self.step()
        return self._result[0]

    def abandon(self) -> None:
        """Its process is dead."""
        self.done = True
        self._work.close()


class Eager(Generic[T]):
    """What stands for a task beside another: it runs to its end before that goes on, so that what it has is stale."""

    def __init__(self, work: Coroutine[Any, Any, T]) -> None:
        self._result = Running(work).finish()

    def __await__(self) -> Generator[object, None, T]:
        yield None
        return self._result

    def cancel(self) -> None:
        """It has ended."""


def run(work: Coroutine[Any, Any, T]) -> T:
    """From begin to end, with nobody else running."""
    return Running(work).finish()


# ── the backend ───────────────────────────────────────────────────────────────────────────────────────────────


class MemoryBackend:
    """Rows in a dict, under the contract's rule. `labelled`: it pauses at "<call>" and "<call>!", before and after."""

    name = "fake"
    remote = True
    expires = False

    def __init__(self, *, labelled: bool = True) -> None:
        self.rows: MutableMapping[bytes, Row] = {}
        self.calls: list[str] = []
        self.asked: Sequence[Row] = ()
        """The rows of the latest write, whether or not they were stored."""
        self.sent: list[list[Row]] = []
        self._faults: dict[str, deque[str]] = {}
        self._labelled = labelled
        self._lives = 0
        self.error: Callable[[str], Exception] = lambda call: BackendUnavailable(f"{call} fails by order")
        self.watch: Callable[[Row | None, Row], object] | None = None

    # Commands.

    def fail(self, call: str, how: str = BEFORE, times: int = 1) -> None:
        """The next calls of this name fail."""
        self._faults.setdefault(call, deque()).extend([how] * times)

    def heal(self) -> None:
        """No call fails any more."""
        self._faults.clear()

    def forget(self, *, restart: bool = False) -> None:
        """Lose every row. `restart`: and every connection, so that no call under way is done or answered any more."""
        self.rows.clear()
        self._lives += restart

    def snapshot(self) -> dict[bytes, Row]:
        return dict(self.rows)

    def restore(self, snapshot: Mapping[bytes, Row], *, restart: bool = False) -> None:
        """Be as it was then."""
        self.rows = dict(snapshot)
        self._lives += restart

    def sessions(self) -> dict[bytes, Row]:
        """All rows but the sentinel."""
        return {handle: row for handle, row in self.rows.items() if handle != SENTINEL}

    def state(self, handle: bytes) -> State | None:
        row = self.rows.get(handle)
        return None if row is None else row.state

    # The protocol.

    async def _called(self, name: str, work: Callable[[str], T]) -> T:
        self.calls.append(name)
        lives = self._lives
        await pause(name if self._labelled else None)
        if self._lives != lives:
            raise self.error(name)
        faults = self._faults.get(name)
        how = faults.popleft() if faults else ""
        if how == BEFORE:
            raise self.error(name)
        result = work(how)
        await pause(f"{name}!" if self._labelled else None)
        if how in (AFTER, HALF, REST) or self._lives != lives:
            raise self.error(name)
        return result

    async def open(self) -> None:
        await self._called("open", lambda _: None)

    async def close(self) -> None:
        await self._called("close", lambda _: None)

    async def initialize(self) -> None:
        await self._called("initialize", lambda _: None)

    async def load(self, handle: bytes) -> Row | None:
        def work(_: str) -> Row | None:
            row = self.rows.get(handle)
            return None if row is None or row.state is State.ERASED else row

        return await self._called("load", work)

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        assert len({row.handle for row in rows}) == len(rows), "a handle occurs twice"
        self.asked = tuple(rows)

        def work(how: str) -> list[Answer]:
            self.sent.append([row for row in rows if row.handle != SENTINEL])
            stored = rows[: (len(rows) + 1) // 2] if how == HALF else rows[how == REST :]
            answers = self._put_all(stored)
            return answers[: len(answers) // 2] if how == FEWER else answers

        return await self._called("write", work)

    def _put_all(self, rows: Sequence[Row]) -> list[Answer]:
        return [self._put(row) for row in rows]

    def _put(self, row: Row) -> Answer:
        old = self.rows.get(row.handle)
        before = None if old is None else old.mark
        applied = wins(row, before)
        horizon = row.horizon if old is None else max(row.horizon, old.horizon)
        kept = row if applied or old is None else old
        self.rows[row.handle] = kept._replace(horizon=horizon)
        if self.watch is not None:
            self.watch(old, self.rows[row.handle])
        return Answer(applied, before)

    async def sweep(self, now: int, limit: int) -> int:
        def work(_: str) -> int:
            past = (handle for handle, row in self.rows.items() if row.horizon < now)
            old = list(itertools.islice(past, limit))
            for handle in old:
                del self.rows[handle]
            return len(old)

        return await self._called("sweep", work)

    def _live(self) -> list[Row]:
        return [row for handle, row in self.rows.items() if row.state is State.LIVE and handle != SENTINEL]

    async def count(self) -> int:
        return await self._called("count", lambda _: len(self._live()))

    async def handles(self) -> AsyncIterator[bytes]:
        for row in self._live():
            yield row.handle

    async def sessions_of(self, user: bytes) -> list[Row]:
        return await self._called("sessions_of", lambda _: [row for row in self._live() if user and row.user == user])

    async def clear(self) -> int:
        def work(_: str) -> int:
            count = len(self._live())
            for handle, row in self.sessions().items():
                self.rows[handle] = row._replace(state=State.DEAD, user=b"", body=b"")
            return count

        return await self._called("clear", work)


# ── a host ────────────────────────────────────────────────────────────────────────────────────────────────────


def sets(**values: Any) -> Changes:
    """What a request does that assigns these."""
    return Changes(set={key: encode(value, key) for key, value in values.items()})


def values_in(record: object) -> dict[str, Any]:
    """The application's values of a record."""
    assert isinstance(record, Record), record
    return {key: decode(raw) for key, raw in record.split().items() if isinstance(key, str)}


class Host:
    """A memory store, the backend behind it and a clock that obeys: everything on one host, driven by hand."""

    def __init__(
        self, directory: Path, backend: MemoryBackend | None = None, clock: ManualClock | None = None, *,
        keyring: Keyring = KEYRING, rows: Rows | None = None, name: str = "test", map_size: int = 4 << 20,
    ) -> None:  # fmt: skip
        self.directory = directory
        self.backend = backend or MemoryBackend()
        self.clock = clock or ManualClock()
        self.rows = rows or Rows()
        self.events: list[Event] = []
        self.keyring = keyring
        self.memory: MemoryStore = memory_store(
            directory, self.clock, name=name, keyring=keyring, map_size=map_size, backend=True, events=self.events
        )
        self.memory.open()

    def close(self) -> None:
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What flushes.

    def flusher(self, clock: Clock | None = None, **settings: Any) -> Flusher:
        """A candidate, as another process would run it too."""
        options: dict[str, Any] = {"interval": 1.0, "memory_lifespan": HOUR, **settings}
        flusher = Flusher(
            self.memory, self.backend, self.rows, clock or self.clock, Hooks([self.events.append]), **options
        )
        flusher._beside = Eager  # type: ignore[assignment]
        return flusher

    def flush(self, flusher: Flusher | None = None) -> None:
        """Rounds, until nothing waits and the sentinel has been looked at."""
        flusher = flusher or self.flusher()
        self._send_all(flusher)
        self.clock.advance(HEARTBEAT_MS / 1000)
        for _ in range(3):
            run(flusher.round())
            self._send_all(flusher)

    def _send_all(self, flusher: Flusher) -> None:
        for _ in range(100):
            if not len(self.memory.outbox):
                return
            run(flusher.round())
        raise AssertionError(f"{len(self.memory.outbox)} rows wait for ever")

    def sending(self, handle: bytes, flusher: Flusher | None = None) -> Running[bool]:
        """A round that is about to store the row of this handle."""
        running = Running((flusher or self.flusher()).round())
        while True:
            running.until("write")
            if any(row.handle == handle for row in self.backend.asked):
                return running

    # What requests do.

    def create(self, handle: bytes, **values: Any) -> Record:
        record = self.memory.create(handle, sets(**values), self.clock.now())
        assert isinstance(record, Record)
        return record

    def login(self, handle: bytes, **values: Any) -> Record:
        changes = Changes(set={**sets(**values).set, USER_KEY: ADA})
        record = self.memory.create(handle, changes, self.clock.now())
        assert isinstance(record, Record)
        return record

    def load(self, handle: bytes) -> Record | Missing:
        return self.memory.load(handle, self.clock.now())

    def update(self, handle: bytes, **values: Any) -> Record:
        return self.change(handle, sets(**values))

    def change(self, handle: bytes, changes: Changes) -> Record:
        base = self.load(handle)
        assert isinstance(base, Record), base
        found = self.memory.update(handle, base, changes, self.clock.now())
        assert isinstance(found, Record), found
        return found

    def renew(self, old: bytes, new: bytes, *, login: bool = True) -> Record:
        base = self.load(old)
        assert isinstance(base, Record), base
        user = ADA if login else None
        found = self.memory.renew(old, new, base, Changes(), self.clock.now(), user, login=login)
        assert isinstance(found, Record), found
        return found

    def destroy(self, handle: bytes) -> bool:
        return self.memory.destroy(handle, self.clock.now()) is not None

    def miss(self, handle: bytes) -> "Answered":
        """Ask the backend, and keep the answer for later: it is on its way."""
        return Answered(self, handle, self.clock.boot(), run(self.backend.load(handle)))

    def read_through(self, handle: bytes) -> Record | Missing | None:
        """What a request finds that comes with this cookie."""
        found = self.load(handle)
        return self.miss(handle).arrives() if found is Missing.UNKNOWN else found

    def mark(self, handle: bytes) -> Mark | None:
        """What is in memory, as a row's mark."""
        header = header_of(self.memory, handle, self.keyring)
        return None if header is None else Mark(State.LIVE, header.epoch, header.version)

    def agrees(self) -> None:
        """The backend equals memory, row for row, and nothing waits."""
        assert self.memory.outbox.rows() == []
        differences = differing(self.memory, self.backend, self.rows, self.keyring)
        assert not differences, differences


class Answered:
    """A backend's answer to a miss, on its way."""

    def __init__(self, host: Host, handle: bytes, missed: int, row: Row | None) -> None:
        self._host, self._handle, self._missed, self.row = host, handle, missed, row
        self._losses = host.memory.outbox.losses()

    def arrives(self) -> Record | Missing | None:
        """What the request that waited for it gets, as `Behind` does it."""
        if self.row is None or self.row.state is not State.LIVE:
            return Missing.UNKNOWN
        header, data = self._host.rows.session_in(self.row)
        if self._host.clock.now() >= header.expires:
            return Missing.UNKNOWN
        memory = self._host.memory
        found = memory.fill(self._handle, header, data, self._missed)
        if memory.outbox.losses() != self._losses:
            memory.outbox.send_again(self._handle)
        return found


def differing(
    memory: MemoryStore, backend: MemoryBackend, rows: Rows, keyring: Keyring, but: Collection[bytes] = ()
) -> list[str]:
    """Every record in memory that does not wait, of which the backend has something else than it should, but these."""
    found, seal, stored = [], RecordSeal(keyring), contents(memory)
    for handle in stored.records.keys() - set(stored.outbox.values()) - set(but):
        record = seal.open(handle, stored.records[handle])
        assert record is not None
        if record.header.flags & WATERMARK:
            continue  # what it ends is looked at by itself
        row, there = rows.row_of(Dirty(handle, record)), backend.rows.get(handle)
        if row.state is State.LIVE:
            agrees = there is not None and _says_the_same(rows, row, there)
        elif row.state is State.DEAD and record.header.flags & STORABLE:
            agrees = there is not None and there.state is State.DEAD and there.horizon >= row.horizon
        else:
            agrees = there is None or there.state is not State.LIVE
        if not agrees:
            found.append(f"memory has {row}, the backend {there}")
    return found


def _says_the_same(rows: Rows, row: Row, there: Row) -> bool:
    if there.mark != row.mark or there.user != row.user or there.horizon < row.horizon:
        return False
    ours, theirs = rows.session_in(row), rows.session_in(there)
    return ours.data == theirs.data and ours.header._replace(changed=0) == theirs.header._replace(changed=0)
