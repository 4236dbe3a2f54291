"""What the tests of the memory store share: a store of raw records, a check of all its tables, children by fork."""

import ctypes
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, Self, TypeVar

import lmdb

from shmsession.clock import Clock, SystemClock
from shmsession.codec import decode, encode
from shmsession.hooks import Event, Hooks
from shmsession.keyring import Key, Keyring
from shmsession.memory.seal import TAIL_BYTES, RecordSeal
from shmsession.memory.store import MemoryStore, Missing
from shmsession.memory.tables import Tables, Txn, expiry_key, number, sequence_key
from shmsession.record import NO_TAG, PLACE_BYTES, Changes, Header, Lifetimes
from shmsession.testing import ManualClock

T = TypeVar("T")

KEYRING = Keyring([Key(bytes(range(32)))])
SECOND = 1000
HOUR = 3600 * SECOND
_LIBC = ctypes.CDLL(None, use_errno=True)
LIFETIMES = Lifetimes(idle=HOUR, longterm=24 * HOUR)
TOUCH = Changes(touch=True)
DEADLINE = 60.0


def memory_store(
    directory: Path,
    clock: Clock | None = None,
    *,
    name: str = "test",
    keyring: Keyring = KEYRING,
    lifetimes: Lifetimes = LIFETIMES,
    map_size: int | None = 1 << 20,
    backend: bool = False,
    events: list[Event] | None = None,
) -> MemoryStore:
    """A memory store with a Key that every process of the tests knows."""
    hooks = Hooks([] if events is None else [events.append])
    return MemoryStore(
        directory, name, keyring, lifetimes, clock or ManualClock(), map_size=map_size, backend=backend, hooks=hooks
    )


def handle(number: int) -> bytes:
    return number.to_bytes(20, "big")


def waiting(store: MemoryStore) -> list[bytes]:
    """What is in the outbox, oldest first."""
    return [found for _, found in store.outbox.rows()]


class Contents(NamedTuple):
    """Everything in every table."""

    records: dict[bytes, bytes]
    expiry: set[bytes]
    outbox: dict[int, bytes]
    users: set[bytes]
    meta: dict[bytes, bytes]


def contents(store: MemoryStore) -> Contents:
    def work(txn: Txn, tables: Tables) -> Contents:
        rows = [{bytes(key): bytes(value) for key, value in txn.cursor(table)} for table in tables]
        records, expiry, outbox, users, meta = rows
        return Contents(records, set(expiry), {number(key): row for key, row in outbox.items()}, set(users), meta)

    return store.environment.read(work)


def header_of(store: MemoryStore, key: bytes, keyring: Keyring = KEYRING) -> Header | None:
    """The verified header of whatever is stored, tombstones too."""
    raw = store.environment.get(key)
    if raw is None:
        return None
    record = RecordSeal(keyring).open(key, raw)
    assert record is not None, "a stored record fails its MAC"
    return record.header


def spoilt(raw: bytes) -> bytes:
    """A record whose MAC does not fit."""
    return raw[:-TAIL_BYTES] + bytes([raw[-TAIL_BYTES] ^ 1]) + raw[1 - TAIL_BYTES :]


def check_tables(store: MemoryStore, keyring: Keyring = KEYRING) -> Contents:
    """Every record has exactly its rows in the other tables, and no row is there without its record."""
    found, seal = contents(store), RecordSeal(keyring)
    expiry, users = set(), set()
    for key, raw in found.records.items():
        record = seal.open(key, raw)
        assert record is not None, f"{key.hex()} fails its MAC"
        header = record.header
        expiry.add(expiry_key(header, key))
        if header.user_tag != NO_TAG:
            users.add(header.user_tag + key)
    assert found.expiry == expiry
    assert found.users == users
    assert len(set(found.outbox.values())) == len(found.outbox), "a record waits at two places"
    for place, key in found.outbox.items():
        assert number(found.records[key][-PLACE_BYTES:]) == place, "a place leads to a record that has another"
    return found


def transactions(store: MemoryStore) -> int:
    """How many write transactions the environment has seen."""
    opened = store.environment.open()
    return int(opened.env.info()["last_txnid"])


def put_raw(store: MemoryStore, key: bytes, raw: bytes) -> None:
    """Write bytes past the store, as damage does."""

    def work(txn: Txn, tables: Tables) -> None:
        txn.put(key, raw, db=tables.records)

    store.environment.write(work)


def put_meta(store: MemoryStore, name: bytes, value: int) -> None:
    def work(txn: Txn, tables: Tables) -> None:
        txn.put(name, sequence_key(value), db=tables.meta)

    store.environment.write(work)


# ── children ──────────────────────────────────────────────────────────────────────────────────────────────────


class Died(Exception):
    """A child ended without an answer."""


class Child:
    """A forked process that runs `work(channel)`; both ends exchange pickled values."""

    def __init__(self, work: Callable[["Channel"], object], fork: Callable[[], int] = os.fork) -> None:
        down, up = os.pipe(), os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = fork()
        if self.pid == 0:
            _be_child(work, Channel(down[0], up[1]), [down[1], up[0]])
        os.close(down[0])
        os.close(up[1])
        self.channel = Channel(up[0], down[1])
        self.status: int | None = None

    def ask(self, value: object = None) -> Any:
        """Send a value, return the answer."""
        self.channel.send(value)
        return self.channel.receive()

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """The wait status."""
        if self.status is None:
            self.channel.close()
            self.status = os.waitpid(self.pid, 0)[1]
        return self.status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Channel:
    """Pickled values over a pair of pipes."""

    def __init__(self, receiving: int, sending: int) -> None:
        self._in = os.fdopen(receiving, "rb")
        self._out = os.fdopen(sending, "wb", buffering=0)

    def send(self, value: object) -> None:
        self._out.write(pickle.dumps(value))

    def receive(self) -> Any:
        try:
            value = pickle.load(self._in)
        except (EOFError, pickle.UnpicklingError) as error:
            raise Died("the child ended without an answer") from error
        if isinstance(value, Raised):
            raise ChildError(value)
        return value

    def close(self) -> None:
        self._in.close()
        self._out.close()


class Raised(NamedTuple):
    """An exception of a child, by the name of its type."""

    kind: str
    text: str


class ChildError(AssertionError):
    """What a child raised, in its parent."""

    def __init__(self, raised: Raised) -> None:
        super().__init__(f"in the child: {raised.kind}: {raised.text}")
        self.kind = raised.kind


def _be_child(work: Callable[[Channel], object], channel: Channel, others: list[int]) -> NoReturn:
    status = 1
    try:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no child outlives the tests
        for descriptor in others:
            os.close(descriptor)
        work(channel)
        status = 0
    except Died:
        status = 0
    except BaseException as error:  # noqa: BLE001  # told to the parent, which fails the test
        channel.send(Raised(type(error).__name__, str(error)))
    finally:
        os._exit(status)


def in_child(work: Callable[[], T], fork: Callable[[], int] = os.fork) -> T:
    """What `work` returns in a forked process."""
    with Child(lambda channel: channel.send(work()), fork) as child:
        answer: T = child.channel.receive()
        child.wait()
        return answer


def refusal(work: Callable[[], object], *kinds: type[BaseException]) -> str:
    """The message of the error, of one of `kinds`, that `work` raises."""
    try:
        work()
    except kinds as error:
        return str(error)
    raise AssertionError(f"nothing was refused; expected one of {kinds}")


def wait_until(condition: Callable[[], object]) -> None:
    """Return when the condition holds; fail when it never does."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.001)


@contextmanager
def closing(store: MemoryStore) -> Iterator[MemoryStore]:
    """Close the store afterwards."""
    try:
        yield store
    finally:
        store.close()


# ── a store in another process ────────────────────────────────────────────────────────────────────────────────


def create(store: MemoryStore, key: bytes, value: Any) -> bool:
    """Store {"v": value} under a handle; False when it is taken."""
    return store.create(key, Changes(set={"v": encode(value, "v")}), SystemClock().now()) is not None


def value_of(store: MemoryStore, key: bytes) -> Any:
    """The value that `create` stored, or why there is none."""
    found = store.load(key, SystemClock().now())
    return found if isinstance(found, Missing) else decode(found.split()["v"])


def destroy(store: MemoryStore, key: bytes) -> bool:
    return store.destroy(key, SystemClock().now()) is not None


def uuid_of(store: MemoryStore) -> bytes:
    return contents(store).meta[b"uuid"]


def forget(store: MemoryStore) -> None:
    """All records leave memory, as after an hour in which nobody came."""

    def work(txn: Txn, tables: Tables) -> None:
        for table in (tables.records, tables.expiry, tables.outbox, tables.users):
            txn.drop(table, delete=False)

    store.environment.write(work)


def hold_a_snapshot(store: MemoryStore) -> int:
    """Begin to read and never end; returns how many do."""
    _held.append(store.environment.open().env.begin())
    return len(_held)


def hold_all_slots(store: MemoryStore) -> int:
    """Begin to read as often as the table of readers allows."""
    while True:
        try:
            hold_a_snapshot(store)
        except lmdb.ReadersFullError:
            return len(_held)


_held: Final[list[Txn]] = []


class Neighbour(Child):
    """A process with the same store open: `neighbour(value_of, key)` calls a function of its store there."""

    def __init__(self, directory: Path, fork: Callable[[], int] = os.fork, **settings: Any) -> None:
        def work(channel: Channel) -> None:
            store = memory_store(directory, SystemClock(), **settings)
            while True:
                function, *arguments = channel.receive()
                try:
                    answer = function(store, *arguments)
                except Exception as error:  # noqa: BLE001  # told to the parent; the process lives on
                    answer = Raised(type(error).__name__, str(error))
                channel.send(answer)

        super().__init__(work, fork)

    def __call__(self, function: Callable[..., T], *arguments: object) -> T:
        answer: T = self.ask((function, *arguments))
        return answer


# ── namespaces ────────────────────────────────────────────────────────────────────────────────────────────────

NEW_MOUNTS = 0x00020000
NEW_USER = 0x10000000
NEW_PIDS = 0x20000000


def unshare(kinds: int) -> bool:
    """Put this process, which must have one thread, into new namespaces, under a user namespace if it must be.

    Its uid stays what it is. False where the kernel or a container refuses both; then nothing has changed.
    """
    if _LIBC.unshare(kinds) == 0:
        return True
    uid, gid = os.geteuid(), os.getegid()
    if _LIBC.unshare(kinds | NEW_USER) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    return True


def mount_tmpfs(at: Path, size: int) -> bool:
    """Mount a small file system there, seen by this process alone; False where that is refused."""
    if not unshare(NEW_MOUNTS):
        return False
    _LIBC.mount(b"none", b"/", None, 0x44000, None)  # private, all of it
    options = f"size={size},mode=0700,uid={os.geteuid()}".encode()
    return bool(_LIBC.mount(b"none", bytes(at), b"tmpfs", 0, options) == 0)
