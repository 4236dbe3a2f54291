"""One LMDB environment a directory and process: opened late, closed before a fork, reopened when it was replaced.

In the store's directory stand `attached`, mapped by every process that has the environment open (a generation number,
and the PID namespace of those processes; a shared flock says that somebody is there), and `lmdb/`, the environment.
"""

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import shutil
import struct
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from time import monotonic
from typing import Final, NamedTuple, NoReturn, TypeVar
from uuid import uuid4

import lmdb
from lmdb.verify import VerifyError, verify

from shmsession.clock import Clock
from shmsession.errors import StoreError, StoreFull, UnsafeStore
from shmsession.record import Header

from . import place, salvage, structure
from .tables import NAMES, Tables, Txn, clock_row, index, number, sequence_key

T = TypeVar("T")

logger = logging.getLogger("shmsession")

LOOK_SECONDS: Final = 1.0
READER_CHECK_LOOKS: Final = 3
ATTEMPTS: Final = 20
MAX_READERS: Final = 2048
STORE_FORMAT: Final = 1

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

Judge = Callable[[bytes, bytes], Header | None]
"""The header of a salvaged record that is to be kept, or None."""


class Opened:
    """An open environment and what must be compared to know that it is still the right one."""

    __slots__ = ("attached", "env", "epoch", "generation", "identity", "looks", "next_look", "pid", "tables", "words")

    def __init__(self, env: lmdb.Environment, attached: int, words: memoryview, data: Path) -> None:
        self.env = env
        self.attached = attached
        self.words = words
        self.generation: int = words[0]
        self.identity = _identity(data)
        self.pid = os.getpid()
        self.next_look = monotonic() + LOOK_SECONDS
        self.looks = 0
        # In a transaction of ours: the one that open_db would begin waits for other writers with the GIL held.
        with env.begin(write=True) as txn:
            self.tables = Tables(*(env.open_db(name, txn=txn, create=False) for name in NAMES))
            self.epoch = number(txn.get(b"epoch", db=self.tables.meta))
            if number(txn.get(b"format", db=self.tables.meta)) > STORE_FORMAT:
                raise UnsafeStore(
                    f"{data.parent} was made by a newer version of shmsession: upgrade, or set SHMSESSION_NAME"
                )

    def close(self) -> None:
        """Leave: others may find themselves alone after this."""
        self.env.close()
        fcntl.flock(self.attached, fcntl.LOCK_UN)
        os.close(self.attached)


class Salvaged(NamedTuple):
    """A record that is whole, from a damaged environment."""

    handle: bytes
    raw: bytes
    header: Header


class Usage(NamedTuple):
    """Pages of 4 KiB: in use by the tables, highest ever used, and all."""

    used: int
    touched: int
    total: int


class Environment:
    """The environment of one directory in this process. Thread-safe; nothing is opened before it is needed."""

    def __init__(self, base: Path, name: str, map_size: int | None, clock: Clock, judge: Judge) -> None:
        self.base = base
        self.path = base / name
        self.data = self.path / "lmdb"
        self._ready = self.path / "lmdb.ready"
        self.users = 0
        self.redoing = False
        """Whether the running write has committed once already, to an environment that was rebuilt meanwhile."""
        self._map_size = map_size
        self._clock = clock
        self._judge = judge
        self._opened: Opened | None = None
        self._verified: tuple[int, int] | None = None
        self.lock = threading.RLock()
        self.quarantines: deque[tuple[Path, int]] = deque()
        """Where damaged environments were put, and how many records were saved: for whoever tells the hooks."""

    # ── transactions ──────────────────────────────────────────────────────────────────────────────────────────

    def get(self, handle: bytes) -> bytes | None:
        """The stored bytes of one record, as of the last commit of any process."""
        for _ in range(ATTEMPTS):
            opened = self._opened or self.open()
            try:
                if opened.pid != os.getpid():
                    _refuse_inherited()
                if monotonic() >= opened.next_look:
                    self._look(opened)
                with opened.env.begin() as txn:
                    raw = txn.get(handle, db=opened.tables.records)
                if opened.words[0] == opened.generation:
                    return raw
                self._leave(opened)
            except lmdb.Error as error:
                self._recover(opened, error)
        raise StoreError(f"{self.data} could not be read in {ATTEMPTS} attempts")

    def read(self, work: Callable[[Txn, Tables], T]) -> T:
        """Run `work` on one snapshot. It must copy out what it needs and return at once."""
        if self.is_inherited:
            _refuse_inherited()
        return self._run(work, write=False)

    def write(self, work: Callable[[Txn, Tables], T]) -> T:
        """Run `work` in the one write transaction of the host, and commit. It may run again after a reopening.

        Raises StoreFull when the map has no pages left for it; then nothing was written.
        """
        if self.is_inherited:
            _refuse_inherited()
        with self.lock:
            self.redoing = False
            return self._run(work, write=True)

    def _run(self, work: Callable[[Txn, Tables], T], *, write: bool) -> T:
        for _ in range(ATTEMPTS):
            opened = self._opened or self.open()
            try:
                if monotonic() >= opened.next_look:
                    self._look(opened)
                if opened.words[0] == opened.generation:
                    with opened.env.begin(write=write) as txn:
                        result = work(txn, opened.tables)
                    if opened.words[0] == opened.generation:
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

    def usage(self, txn: Txn, tables: Tables) -> Usage:
        """How full the map is. Counting the pages in use costs microseconds, so it is done only past half."""
        opened = self._opened or self.open()
        info = opened.env.info()
        total, touched = info["map_size"] // 4096, info["last_pgno"] + 1
        used = touched
        if touched * 2 > total:
            stats = [txn.stat(table) for table in tables]
            used = sum(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"] for stat in stats)
        return Usage(used, touched, total)

    def readers(self) -> int:
        """Reader slots in use now, those of dead processes included."""
        listing = (self._opened or self.open()).env.readers()
        return max(0, len(listing.splitlines()) - 1) if "no active" not in listing else 0

    def free_dead_readers(self) -> None:
        """`check_readers` without opening the store, which would wait for a writer, alive or stopped."""
        opened = self._opened
        if opened is not None:
            opened.env.reader_check()
        elif self.path.is_dir() and self._check_files():
            try:
                env = lmdb.open(str(self.data), readonly=True, create=False)
            except lmdb.Error as error:
                raise StoreError(f"{self.data} cannot be opened: {error}") from error
            env.reader_check()
            env.close()

    def check_readers(self) -> int:
        """Free the reader slots of dead processes; returns how many there were."""
        return (self._opened or self.open()).env.reader_check()

    # ── still the right one? ──────────────────────────────────────────────────────────────────────────────────

    def _look(self, opened: Opened) -> None:
        """Once a second: is the file still at its place? Every few seconds: have readers died?"""
        opened.next_look = monotonic() + LOOK_SECONDS
        opened.looks += 1
        if opened.looks % READER_CHECK_LOOKS == 0:
            opened.env.reader_check()
        if _identity(self.data) != opened.identity:
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

    # ── opening and closing ───────────────────────────────────────────────────────────────────────────────────

    def open(self) -> Opened:
        """Open the environment in this process if it is not. Raises UnsafeStore, StoreFull."""
        if self.is_inherited:
            _refuse_inherited()
        if self.users == 0:
            raise StoreError(f"this user of {self.path} has closed it: make a new one")
        with self.lock:
            for _ in range(ATTEMPTS):
                if self._opened is not None:
                    return self._opened
                # Somebody may remove the directory while this process enters it: then it is made again.
                with contextlib.suppress(FileNotFoundError), self._entered() as directory:
                    self._opened = self._open(directory)
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
        except (OSError, lmdb.Error) as error:
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
            place.give(attached, 16)
            words = memoryview(mmap.mmap(attached, 16)).cast("Q")
            if _try_exclusive(attached):
                words[1] = _pid_namespace()
                self._make_ready(directory, words)
            elif words[1] == _pid_namespace():
                if not self._check_files():
                    words[0] += 1
                    self._make_ready(directory, words)
            else:
                raise UnsafeStore(
                    f"{self.path} is in use by processes of another PID namespace, such as another container: "
                    "give each container a directory of its own (SHMSESSION_DIR), or one PID namespace to all"
                )
            fcntl.flock(attached, fcntl.LOCK_SH)
            return self._attach(attached, words)
        except BaseException:
            fcntl.flock(attached, fcntl.LOCK_UN)
            os.close(attached)
            raise

    def _attach(self, attached: int, words: memoryview) -> Opened:
        self._check_files()
        env = None
        try:
            env = self._lmdb(self.data)
            opened = Opened(env, attached, words, self.data)
        except (lmdb.Error, OSError, UnsafeStore) as error:
            if env is not None:
                env.close()
            if isinstance(error, UnsafeStore):
                raise
            raise StoreError(f"{self.data} cannot be opened: {error}") from error
        self._verified = opened.identity
        return opened

    def _lmdb(self, path: Path) -> lmdb.Environment:
        size = (path / "data.mdb").stat().st_size
        return lmdb.open(
            str(path), map_size=size, max_dbs=len(NAMES) + 1, max_readers=MAX_READERS, mode=0o700, sync=False,
            metasync=False, readahead=False, max_spare_txns=0,
        )  # fmt: skip

    def _check_files(self) -> bool:
        """Whether there is a data file; it and the lock file must be our own."""
        if not self.data.exists():
            return False
        directory = place.open_directory(self.data)
        try:
            place.check_entry(self.data / "lock.mdb", directory)
            return place.check_entry(self.data / "data.mdb", directory) is not None
        finally:
            os.close(directory)

    # ── making and rebuilding: behind the gate ────────────────────────────────────────────────────────────────

    def _make_ready(self, directory: int, words: memoryview) -> None:
        """Nobody else is attached: verify what is there, before LMDB trusts it, or make what is missing."""
        if self.data.is_symlink():
            raise UnsafeStore(f"{self.data} is a symbolic link: remove it, or set SHMSESSION_DIR to another directory")
        if not self.data.exists() and self._ready.exists():
            self._ready.rename(self.data)
        if not self._check_files():
            self._create(directory)
        elif _identity(self.data) != self._verified:
            problem = self._problem()
            if problem is not None:
                self._rebuild(directory, words, problem)

    def _problem(self) -> str | None:
        """What is wrong with the file, found by reading it without LMDB."""
        try:
            found: list[str] = verify(str(self.data))  # type: ignore[no-untyped-call]
            problem = found[0] if found else structure.problem_in(self.data / "data.mdb")
        except (VerifyError, OSError, struct.error) as error:
            return str(error)
        if problem is not None:
            return problem
        env = self._lmdb(self.data)
        try:
            tables = Tables(*(env.open_db(name, create=False) for name in NAMES))
            with env.begin() as txn:
                if txn.get(b"check", db=tables.meta) != _check(txn, tables):
                    return "what it says of itself does not add up"
                if not all(_leads_to_all(txn, table) for table in tables):
                    return "a branch page leads astray"
                size = number(txn.get(b"size", db=tables.meta))
        except lmdb.Error as error:
            return str(error)
        finally:
            env.close()
        found_size = (self.data / "data.mdb").stat().st_size
        return None if size == found_size else f"it has {found_size} bytes instead of {size}"

    def _quarantine(self, opened: Opened, problem: str) -> None:
        """LMDB met damage: rebuild, unless another process has done so meanwhile. The others notice the new number."""
        with self.lock:
            if self._opened is not opened:
                return
            with self._entered() as directory:
                self._opened = None
                words, generation = opened.words, opened.generation
                opened.close()
                if words[0] == generation and _identity(self.data) == opened.identity:
                    self._rebuild(directory, words, problem)

    def _rebuild(self, directory: int, words: memoryview, problem: str) -> None:
        """Put the damaged environment aside, keep the newest such, and import every record that is whole."""
        words[0] += 1
        aside = self.path / f"quarantine-{words[0]}"
        logger.error("the memory store %s is damaged (%s): kept as %s and rebuilt", self.path, problem, aside.name)
        whole: dict[bytes, Salvaged] = {}
        for handle, raw in salvage.records_in(self.data):
            header = self._judge(handle, raw) if len(handle) == 20 else None
            if header is None:
                continue
            known = whole.get(handle)
            if known is None or (known.header.epoch, known.header.version) < (header.epoch, header.version):
                whole[handle] = Salvaged(handle, raw, header)
        for old in self.path.glob("quarantine-*"):
            shutil.rmtree(old, ignore_errors=True)
        try:
            self._create(directory, whole.values(), aside)
        except (StoreFull, lmdb.MapFullError):
            shutil.rmtree(self.data)
            self._create(directory, whole.values())
        self.quarantines.append((aside, len(whole)))

    def _create(self, directory: int, records: Collection[Salvaged] = (), aside: Path | None = None) -> None:
        """Make the environment under another name and move it to its place when it is complete.

        What stands there goes `aside`. Whoever finds the place empty after a crash in between takes what is ready.
        """
        new = self.path / "lmdb.new"
        for leftover in (new, self._ready):
            shutil.rmtree(leftover, ignore_errors=True)
        new.mkdir(mode=0o700)
        descriptor = place.open_directory(new)
        try:
            size = place.size_for(directory, self._map_size)
            lmdb.open(str(new), map_size=size, mode=0o700, sync=False).close()
            place.allocate(new / "data.mdb", descriptor, size)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)
        env = self._lmdb(new)
        try:
            tables = Tables(*(env.open_db(name) for name in NAMES))
            with env.begin(write=True) as txn:
                self._found(txn, tables, size, max((salvaged.header.epoch for salvaged in records), default=0))
                for handle, raw, header in records:
                    txn.put(handle, raw, db=tables.records)
                    index(txn, tables, handle, header)
                last = max((salvaged.header.dirty_seq for salvaged in records), default=0)
                txn.put(b"sequence", sequence_key(last), db=tables.meta)
        finally:
            env.close()
        new.rename(self._ready)
        if aside is not None:
            self.data.rename(aside)
        elif self.data.exists():
            shutil.rmtree(self.data)
        self._ready.rename(self.data)

    def _found(self, txn: Txn, tables: Tables, size: int, newest_epoch: int) -> None:
        now = self._clock.now()
        txn.put(b"format", sequence_key(STORE_FORMAT), db=tables.meta)
        txn.put(b"epoch", sequence_key(max(now, newest_epoch + 1)), db=tables.meta)
        txn.put(b"uuid", uuid4().bytes, db=tables.meta)
        txn.put(b"size", sequence_key(size), db=tables.meta)
        txn.put(b"check", _check(txn, tables), db=tables.meta)
        txn.put(b"clock", clock_row(now - self._clock.boot(), 0), db=tables.meta)


def _leads_to_all(txn: Txn, table: lmdb._Database) -> bool:
    """Whether every key is found from the root, which `verify` does not look at and LMDB's writers rely on."""
    return all(txn.get(key, db=table) is not None for key in txn.cursor(table).iternext(values=False))


def _check(txn: Txn, tables: Tables) -> bytes:
    """A digest of what the environment says of itself and no commit changes; in every format the same four rows."""
    digest = blake2b(digest_size=16)
    for name in (b"format", b"epoch", b"uuid", b"size"):
        digest.update(txn.get(name, b"", db=tables.meta))
    return digest.digest()


def _identity(data: Path) -> tuple[int, int]:
    """Device and inode of the data file; (0, 0) when it is not there."""
    try:
        info = (data / "data.mdb").stat()
    except OSError:
        return (0, 0)
    return (info.st_dev, info.st_ino)


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


# ── one environment a directory and process, none across a fork ───────────────────────────────────────────────

_environments: dict[Path, Environment] = {}
_registry_lock = threading.RLock()


def acquire(base: Path, name: str, map_size: int | None, clock: Clock, judge: Judge) -> Environment:
    """This process's environment for a directory; give it back with `release`."""
    path = base.resolve() / name
    with _registry_lock:
        environment = _environments.get(path)
        if environment is None:
            environment = _environments[path] = Environment(base.absolute(), name, map_size, clock, judge)
        environment.users += 1
        return environment


def release(environment: Environment) -> None:
    """The last user's release closes it."""
    with _registry_lock:
        environment.users -= 1
        if environment.users == 0 and not environment.is_inherited:
            environment.close()
            for path in [path for path, known in _environments.items() if known is environment]:
                del _environments[path]


def _before_fork() -> None:
    _registry_lock.acquire()
    for environment in _environments.values():
        environment.lock.acquire()
        environment.close()


def _after_fork_in_parent() -> None:
    for environment in _environments.values():
        environment.lock.release()
    _registry_lock.release()


def _after_fork_in_child() -> None:
    global _registry_lock
    _registry_lock = threading.RLock()
    for environment in _environments.values():
        environment.lock = threading.RLock()


def _refuse_inherited() -> NoReturn:
    raise UnsafeStore(
        "this process was forked past Python's fork hooks with the memory store open: "
        "load the application after the fork (uWSGI: lazy-apps = true)"
    )


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
