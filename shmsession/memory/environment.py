"""An LMDB environment in use: opened late, reopened when it was replaced, rebuilt when it turns out damaged.

In the store's directory stand `attached`, mapped by every process that has the environment open (a generation number,
the PID namespace of those processes, until when the backend is not to be asked, rings for the flusher, the last place
of the outbox that was given out; a shared flock says that somebody is there), `counters`, `generations`, perhaps
`bloom`, and `lmdb/`, the environment.
"""

import contextlib
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple, TypeVar

import lmdb

from shmsession.errors import StoreError, StoreFull, UnsafeStore

from . import place
from .bloom import BloomFilter
from .building import (
    DOWN_UNTIL,
    GENERATION,
    LAST_PLACE,
    NAMESPACE,
    RINGS,
    STORE_FORMAT,
    VOUCHED,
    WORDS,
    Building,
    identity,
    open_lmdb,
    set_epoch,
)
from .counters import Counters
from .generations import Generations
from .tables import NAMES, SEQUENCE_BITS, Tables, Txn, last_place, number, sequence_after, sequence_key

T = TypeVar("T")

LOOK_SECONDS: Final = 1.0
READER_CHECK_LOOKS: Final = 3
ATTEMPTS: Final = 20
LEAP_MS: Final = 60_000
"""A place of the outbox so far in the future says that the wall clock had leapt."""

_STRUCTURAL: Final = (
    lmdb.CorruptedError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
    lmdb.InvalidError,
    lmdb.VersionMismatchError,
    lmdb.IncompatibleError,
    lmdb.BadChecksumError,
    lmdb.ProblemError,
    lmdb.CursorFullError,
    lmdb.PageFullError,
    lmdb.NotFoundError,
    lmdb.BadTxnError,
)
"""What LMDB says of a damaged file, and of nothing else: our own look-ups never raise NotFoundError, and no
transaction goes on after an error but one that LMDB did not tell."""

_NO_ROOM: Final = (lmdb.DiskError, lmdb.MapFullError, lmdb.MemoryError)


class Opened:
    """An open environment and what must be compared to know that it is still the right one."""

    __slots__ = (
        "attached", "counters", "env", "epoch", "generation", "generations", "identity", "looks", "next_look", "pid",
        "tables", "uuid", "words",
    )  # fmt: skip

    def __init__(
        self, env: lmdb.Environment, attached: int, words: memoryview, data: Path, counters: Counters,
        generations: Generations,
    ) -> None:  # fmt: skip
        self.env = env
        self.attached = attached
        self.words = words
        self.counters = counters
        self.generations = generations
        self.generation: int = words[GENERATION]
        self.identity = identity(data)
        self.pid = os.getpid()
        self.next_look = monotonic() + LOOK_SECONDS
        self.looks = 0
        # In a transaction of ours: the one that open_db would begin waits for other writers with the GIL held.
        with env.begin(write=True) as txn:
            self.tables = Tables(*(env.open_db(name, txn=txn, create=False) for name in NAMES))
            self.epoch = number(txn.get(b"epoch", db=self.tables.meta))
            self.uuid: bytes = txn.get(b"uuid", b"", db=self.tables.meta)
            if number(txn.get(b"format", db=self.tables.meta)) > STORE_FORMAT:
                raise UnsafeStore(
                    f"{data.parent} was made by a newer version of shmsession: upgrade, or set SHMSESSION_NAME"
                )

    def close(self) -> None:
        """Leave: others may find themselves alone after this."""
        self.env.close()
        self.counters.close()
        fcntl.flock(self.attached, fcntl.LOCK_UN)
        os.close(self.attached)


class Usage(NamedTuple):
    """Pages of 4 KiB: in use by the tables, highest ever used, and all."""

    used: int
    touched: int
    total: int


class Environment:
    """The environment of one directory in this process. Thread-safe; nothing is opened before it is needed."""

    def __init__(self, key: Path, building: Building) -> None:
        self.key = key
        self.path = building.path
        self.base = self.path.parent
        self.data = building.data
        self.building = building
        self.quarantines = building.quarantines
        self.bloom = BloomFilter(self.path)
        """Which handles a backend may have."""
        self.users = 0
        self.redoing = False
        """Whether the running write has committed once already, to an environment that was rebuilt meanwhile."""
        self.lock = threading.RLock()
        self._opened: Opened | None = None

    # ── transactions ──────────────────────────────────────────────────────────────────────────────────────────

    def get(self, handle: bytes) -> bytes | None:
        """The stored bytes of one record, as of the last commit of any process."""
        for _ in range(ATTEMPTS):
            opened = self.open()
            try:
                if monotonic() >= opened.next_look:
                    self._look(opened)
                with opened.env.begin() as txn:
                    raw = txn.get(handle, db=opened.tables.records)
                if opened.words[GENERATION] == opened.generation:
                    return raw
                self._leave(opened)
            except lmdb.Error as error:
                self._recover(opened, error)
        raise StoreError(f"{self.data} could not be read in {ATTEMPTS} attempts")

    def read(self, work: Callable[[Txn, Tables], T]) -> T:
        """Run `work` on one snapshot. It must copy out what it needs and return at once."""
        self.open()
        return self._run(work, False)

    def write(self, work: Callable[[Txn, Tables], T]) -> T:
        """Run `work` in the one write transaction of the host, and commit. It may run again after a reopening.

        Raises StoreFull when the map has no pages left for it; then nothing was written.
        """
        self.open()  # before the lock, which a process that was forked past the hooks may have inherited locked
        with self.lock:
            self.redoing = False
            return self._run(work, True)

    def _run(self, work: Callable[[Txn, Tables], T], write: bool) -> T:
        for _ in range(ATTEMPTS):
            opened = self._opened or self.open()
            try:
                if monotonic() >= opened.next_look:
                    self._look(opened)
                if opened.words[GENERATION] == opened.generation:
                    with opened.env.begin(write=write) as txn:
                        result = work(txn, opened.tables)
                    if opened.words[GENERATION] == opened.generation:
                        return result
                    self.redoing = write
                self._leave(opened)
            except (lmdb.MapFullError, lmdb.DiskError) as error:
                opened.env.reader_check()
                raise StoreFull(f"the memory store {self.path} is full: raise SHMSESSION_MAP_SIZE") from error
            except lmdb.Error as error:
                self._recover(opened, error)
        raise StoreError(f"{self.data} could not be used in {ATTEMPTS} attempts")

    @property
    def epoch(self) -> int:
        """The incarnation of this store."""
        return (self._opened or self.open()).epoch

    @property
    def uuid(self) -> bytes:
        """The name of this incarnation, 16 bytes."""
        return (self._opened or self.open()).uuid

    @property
    def counters(self) -> Counters:
        """What all processes count together."""
        return (self._opened or self.open()).counters

    @property
    def generations(self) -> Generations:
        """By which all processes tell what was cleared."""
        return (self._opened or self.open()).generations

    @property
    def backend_down_until(self) -> int:
        """The boot time, in milliseconds, until which nobody asks the backend: it has just failed."""
        return int((self._opened or self.open()).words[DOWN_UNTIL])

    @backend_down_until.setter
    def backend_down_until(self, boot: int) -> None:
        (self._opened or self.open()).words[DOWN_UNTIL] = boot

    @property
    def rings(self) -> int:
        """How often somebody rang for the flusher, for one that cannot hear the doorbell. Not every ring counts."""
        return int((self._opened or self.open()).words[RINGS])

    @property
    def vouched(self) -> int:
        """The boot time of the last look at the backend that found nobody else there, in milliseconds; 0: none yet."""
        return int((self._opened or self.open()).words[VOUCHED])

    @vouched.setter
    def vouched(self, boot: int) -> None:
        (self._opened or self.open()).words[VOUCHED] = boot

    def ring(self) -> None:
        """Count one."""
        words = (self._opened or self.open()).words
        words[RINGS] = (words[RINGS] + 1) % (1 << 64)

    def take_place(self, txn: Txn, tables: Tables, handle: bytes, now: int) -> bytes:
        """Give a session a place in the outbox behind all that wait, and nearly always behind all that ever did.

        When the wall clock had leapt ahead, numbers begin again behind the last that waits: else the age of what waits
        could not be told for as long as the leap was. Within a write transaction.
        """
        words = (self._opened or self.open()).words
        last: int = words[LAST_PLACE]
        if not 0 < last < (now + LEAP_MS) << SEQUENCE_BITS:  # or it was lost, or damaged
            last = last_place(txn, tables, now)
        sequence = sequence_after(last, now)
        while not txn.put(place := sequence_key(sequence), handle, db=tables.outbox, overwrite=False):
            sequence = max(sequence + 1, last_place(txn, tables, now) + 1)
        words[LAST_PLACE] = sequence
        return place

    def raise_epoch(self, epoch: int) -> None:
        """Go on as a later incarnation, at least `epoch`: every process opens the environment anew for that."""

        def work(txn: Txn, tables: Tables) -> None:
            if number(txn.get(b"epoch", db=tables.meta)) < epoch:  # type: ignore[arg-type]
                set_epoch(txn, tables, epoch)

        self.write(work)
        with self.lock:
            opened = self.open()
            opened.words[GENERATION] += 1
            self._leave(opened)

    def usage(self, txn: Txn, tables: Tables) -> Usage:
        """How full the map is. Counting the pages in use costs microseconds, so it is done only past half."""
        opened = self.open()
        info = opened.env.info()
        total, touched = info["map_size"] // 4096, info["last_pgno"] + 1
        used = touched
        if touched * 2 > total:
            stats = [txn.stat(table) for table in tables]
            used = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return Usage(used, touched, total)

    def readers(self) -> int:
        """Reader slots in use now, those of dead processes included."""
        listing = self.open().env.readers()
        return max(0, len(listing.splitlines()) - 1) if "no active" not in listing else 0

    def free_dead_readers(self) -> None:
        """Free those of dead processes, without opening the store, which would wait for a writer, alive or stopped."""
        opened = self._opened
        if opened is not None:
            opened.env.reader_check()
        elif self.path.is_dir() and self.building.is_there():
            try:
                env = lmdb.open(str(self.data), readonly=True, create=False)
            except lmdb.Error as error:
                raise StoreError(f"{self.data} cannot be opened: {error}") from error
            env.reader_check()
            env.close()

    # ── still the right one? ──────────────────────────────────────────────────────────────────────────────────

    def _look(self, opened: Opened) -> None:
        """Once a second: is the file still at its place? Every few seconds: have readers died?"""
        opened.next_look = monotonic() + LOOK_SECONDS
        opened.looks += 1
        if opened.looks % READER_CHECK_LOOKS == 0:
            opened.env.reader_check()
        if identity(self.data) != opened.identity:
            self._leave(opened)

    def _leave(self, opened: Opened) -> None:
        """Close what somebody replaced; the next use opens its successor."""
        with self.lock:
            if self._opened is not opened:
                return
            self._opened = None
            opened.close()

    def _recover(self, opened: Opened, error: lmdb.Error) -> None:
        """Make another attempt worthwhile, or raise."""
        if isinstance(error, _STRUCTURAL):
            self._quarantine(opened, str(error))
        elif isinstance(error, lmdb.ReadersFullError):
            opened.env.reader_check()
        elif isinstance(error, lmdb.MapResizedError):
            self._leave(opened)
        elif self._opened is opened:
            raise StoreError(f"{self.data}: {error}") from error

    def _quarantine(self, opened: Opened, problem: str) -> None:
        """LMDB met damage: rebuild, unless another process has done so meanwhile. The others notice the new number."""
        with self.lock:
            if self._opened is not opened:
                return
            with self._entered() as directory:
                self._opened = None
                words, generation = opened.words, opened.generation
                opened.close()
                if words[GENERATION] == generation and identity(self.data) == opened.identity:
                    self.building.rebuild(directory, words, problem)

    # ── opening and closing ───────────────────────────────────────────────────────────────────────────────────

    def open(self) -> Opened:
        """What is open in this process; opens it if it is not. Raises UnsafeStore, StoreFull."""
        opened = self._opened
        if opened is None:
            return self._open_now()
        if opened.pid != os.getpid():
            raise UnsafeStore(
                "this process was forked past Python's fork hooks with the memory store open: "
                "load the application after the fork (uWSGI: lazy-apps = true)"
            )
        return opened

    def _open_now(self) -> Opened:
        if self.users == 0:
            raise StoreError(f"this user of {self.path} has closed it: make a new one")
        with self.lock:
            if self._opened is not None:
                return self._opened
            for _ in range(ATTEMPTS):
                # Somebody may remove the directory while this process enters it: then it is made again.
                with contextlib.suppress(FileNotFoundError), self._entered() as directory:
                    self._opened = opened = self._open(directory)
                    return opened
        raise StoreError(f"{self.path} was removed {ATTEMPTS} times while it was being opened")

    @property
    def is_inherited(self) -> bool:
        """Whether it was opened by the parent, before a fork that did not run Python's fork hooks."""
        opened = self._opened
        return opened is not None and opened.pid != os.getpid()

    def close(self) -> None:
        """Close it; any later use opens it again. What the parent opened stays: closing it would disturb the parent."""
        if self.is_inherited:
            return
        with self.lock:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.close()

    @contextmanager
    def _entered(self) -> Iterator[int]:
        os.close(place.open_directory(self.base))
        directory = place.open_directory(self.path)
        try:
            with place.gate(directory):
                yield directory
        except FileNotFoundError:
            raise
        except UnsafeStore as error:
            if not os.fstat(directory).st_nlink:
                raise FileNotFoundError(f"{self.path} was removed") from error
            raise
        except (OSError, lmdb.Error) as error:
            if getattr(error, "code", 0) == errno.ENOENT:  # LMDB's way to say that the directory was removed
                raise FileNotFoundError(str(error)) from error
            if isinstance(error, _NO_ROOM) or getattr(error, "errno", 0) == errno.ENOSPC:
                raise StoreFull(
                    f"no room for the memory store {self.path} ({error}): "
                    "set SHMSESSION_MAP_SIZE to less, or SHMSESSION_DIR to another place"
                ) from error
            raise StoreError(f"{self.path} cannot be opened: {error}") from error
        finally:
            os.close(directory)

    def _open(self, directory: int) -> Opened:
        attached = place.open_file(self.path / "attached", directory, create=True)
        try:
            place.give(attached, 8 * WORDS)
            words = memoryview(mmap.mmap(attached, 8 * WORDS)).cast("Q")
            if _try_exclusive(attached):
                words[NAMESPACE] = _pid_namespace()
                words[VOUCHED] = 0
                self.bloom.remove()  # whatever has happened since there was somebody here
                self.building.make_ready(directory, words)
            elif words[NAMESPACE] == _pid_namespace():
                if not self.building.is_there():
                    words[GENERATION] += 1
                    self.building.make_ready(directory, words)
            else:
                raise UnsafeStore(
                    f"{self.path} is in use by processes of another PID namespace, such as another container: "
                    "give each container a directory of its own (SHMSESSION_DIR), or one PID namespace to all"
                )
            fcntl.flock(attached, fcntl.LOCK_SH)
            return self._attach(attached, words, directory)
        except BaseException:  # also when it is interrupted; it goes on
            fcntl.flock(attached, fcntl.LOCK_UN)
            os.close(attached)
            raise

    def _attach(self, attached: int, words: memoryview, directory: int) -> Opened:
        env = open_lmdb(self.data)
        try:
            counters = Counters(self.path, directory)
            try:
                generations = Generations(self.path, directory)
                opened = Opened(env, attached, words, self.data, counters, generations)
            except BaseException:  # also when it is interrupted; it goes on
                counters.close()
                raise
        except BaseException:  # also when it is interrupted; it goes on
            env.close()
            raise
        self.building.verified = opened.identity
        return opened


def _try_exclusive(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid_namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 1
