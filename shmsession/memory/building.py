"""What stands on disk: made, verified and rebuilt behind the gate, by a process that is alone with it.

An environment is complete before it gets its name, so that death at any line leaves one, or a place to make one.
"""

import logging
import os
import shutil
import struct
from collections import deque
from collections.abc import Callable, Collection
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4

import lmdb
from lmdb.verify import VerifyError, verify

from shmsession.clock import Clock
from shmsession.config import MAX_MAP_SIZE
from shmsession.errors import StoreFull, UnsafeStore
from shmsession.ids import HANDLE_BYTES
from shmsession.record import NO_PLACE, PLACE_BYTES, Header

from . import place, salvage, structure
from .tables import (
    BUILT,
    LOSSES,
    NAMES,
    PUT_BACK,
    RECALLED,
    Tables,
    Txn,
    clock_row,
    number,
    plausible_places,
    put,
    sequence_key,
)

logger = logging.getLogger("shmsession")

MAX_READERS: Final = 2048
STORE_FORMAT: Final = 1

GENERATION: Final = 0
NAMESPACE: Final = 1
DOWN_UNTIL: Final = 2
RINGS: Final = 3
LAST_PLACE: Final = 4
VOUCHED: Final = 5
"""The words of the mapped file `attached`."""
WORDS: Final = 6

Judge = Callable[[bytes, bytes], tuple[Header, bool, bool] | None]
"""The header of a salvaged record, whether it is verified, and whether the record can be had again unless it waits;
None when it is not whole. What other Keys have sealed cannot be verified here, and is kept."""


class Salvaged(NamedTuple):
    """A record that is whole, from a damaged environment."""

    handle: bytes
    raw: bytes
    header: Header
    verified: bool
    recoverable: bool
    waits: bool = False

    @property
    def place(self) -> bytes:
        """The place in the outbox that it says it has."""
        return self.raw[-PLACE_BYTES:]


class Building:
    """The environment in `path`/lmdb, as files."""

    def __init__(self, path: Path, map_size: int | None, clock: Clock, judge: Judge) -> None:
        self.path = path
        self.data = path / "lmdb"
        self._ready = path / "lmdb.ready"
        self._map_size = map_size
        self._clock = clock
        self._judge = judge
        self.verified: tuple[int, int] | None = None
        """The identity of the data file that needs no second verification in this process."""
        self.quarantines: deque[tuple[Path, int]] = deque()
        """Where damaged environments were put, and how many records were saved: for whoever tells the hooks."""

    def is_there(self) -> bool:
        """Whether there is a data file; it and the lock file must be our own."""
        if not self.data.exists():
            return False
        directory = place.open_directory(self.data)
        try:
            place.check_entry(self.data / "lock.mdb", directory)
            return place.check_entry(self.data / "data.mdb", directory) is not None
        finally:
            os.close(directory)

    def make_ready(self, directory: int, words: memoryview) -> None:
        """Nobody else is attached: verify what is there, before LMDB trusts it, or make what is missing."""
        if self.data.is_symlink():
            raise UnsafeStore(f"{self.data} is a symbolic link: remove it, or set SHMSESSION_DIR to another directory")
        if not self.data.exists() and self._ready.exists():
            self._ready.rename(self.data)
        if not self.is_there():
            self._create(directory)
        elif identity(self.data) != self.verified:
            problem = self.problem()
            if problem is not None:
                self.rebuild(directory, words, problem)

    def problem(self) -> str | None:
        """What is wrong with the file, found by reading it without LMDB."""
        try:
            found: list[str] = verify(str(self.data))  # type: ignore[no-untyped-call]
            problem = found[0] if found else structure.problem_in(self.data / "data.mdb")
        except (VerifyError, OSError, struct.error) as error:
            return str(error)
        if problem is not None:
            return problem
        env = open_lmdb(self.data)
        try:
            tables = Tables(*(env.open_db(name, create=False) for name in NAMES))
            with env.begin() as txn:
                if txn.get(b"check", db=tables.meta) != _check(txn, tables):
                    return "what it says of itself does not add up"
                if not all(_leads_to_all(txn, table) for table in tables):
                    return "a branch page leads astray"
                if not all(_has(txn, tables, handle, place) for place, handle in txn.cursor(tables.outbox)):
                    return "the outbox leads astray"
                size = number(txn.get(b"size", db=tables.meta))
        except lmdb.Error as error:
            return str(error)
        finally:
            env.close()
        found_size = (self.data / "data.mdb").stat().st_size
        return None if size == found_size else f"it has {found_size} bytes instead of {size}"

    def rebuild(self, directory: int, words: memoryview, problem: str) -> None:
        """Put the damaged environment aside, keep the newest such, and import every record that is whole."""
        words[GENERATION] += 1
        aside = self.path / f"quarantine-{words[GENERATION]}"
        logger.error("the memory store %s is damaged (%s): kept as %s and rebuilt", self.path, problem, aside.name)
        kept = self._placed(self._salvaged())
        for old in self.path.glob("quarantine-*"):
            shutil.rmtree(old, ignore_errors=True)
        try:
            self._create(directory, kept, aside)
        except StoreFull:  # there is no room for both
            shutil.rmtree(self.data)
            self._create(directory, kept)
        self.quarantines.append((aside, len(kept)))

    def _salvaged(self) -> list[Salvaged]:
        """Every whole record, in its newest version, that cannot be had again.

        The outbox is believed when all of it is there, and each row leads to a record that says so. Otherwise whoever
        was ever given a place waits: rather once too often.
        """
        whole: dict[bytes, Salvaged] = {}
        for handle, raw in salvage.records_in(self.data):
            judged = self._judge(handle, raw) if len(handle) == HANDLE_BYTES else None
            if judged is not None:
                one, known = Salvaged(handle, raw, *judged), whole.get(handle)
                if known is None or (known.header.epoch, known.header.version) < (one.header.epoch, one.header.version):
                    whole[handle] = one
        outbox = salvage.outbox_in(self.data)
        waiting = {handle for _, handle in outbox or ()}
        if outbox is None or any(handle not in whole or whole[handle].place != place for place, handle in outbox):
            waiting.update(one.handle for one in whole.values() if one.place != NO_PLACE)
        found = (one._replace(waits=one.handle in waiting) for one in whole.values())
        return [one for one in found if one.waits or not one.recoverable]

    def _placed(self, records: list[Salvaged]) -> list[Salvaged]:
        """What waits keeps its place, unless damage gave it one that is another's, or out of the question."""
        oldest, newest = plausible_places(self._clock.now())
        last, placed = oldest, []
        for one in sorted(records, key=lambda one: one.place):
            if one.waits:
                last = max(last + 1, min(number(one.place), newest))
                one = one._replace(raw=one.raw[:-PLACE_BYTES] + sequence_key(last))
            placed.append(one)
        return placed

    def _old_size(self) -> int:
        """How large the map is that is to be replaced, in bytes; damage may have cut it, or made it longer."""
        try:
            size = (self.data / "data.mdb").stat().st_size
        except FileNotFoundError:
            return 0
        return min(size, MAX_MAP_SIZE) & -4096

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
            # What fitted into the old one must fit, though a smaller one is configured by now.
            size = max(place.size_for(directory, self._map_size), self._old_size() if records else 0)
            lmdb.open(str(new), map_size=size, mode=0o700, sync=False).close()
            place.allocate(new / "data.mdb", descriptor, size)
        except BaseException:  # also when it is interrupted; it goes on
            shutil.rmtree(new, ignore_errors=True)
            raise
        finally:
            os.close(descriptor)
        env = open_lmdb(new)
        try:
            tables = Tables(*(env.open_db(name) for name in NAMES))
            with env.begin(write=True) as txn:
                self._found(txn, tables, size, max((one.header.epoch for one in records if one.verified), default=0))
                for one in records:
                    put(txn, tables, one.handle, one.raw, one.header)
                    if one.waits:
                        txn.put(one.place, one.handle, db=tables.outbox)
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
        txn.put(b"uuid", uuid4().bytes, db=tables.meta)
        txn.put(b"size", sequence_key(size), db=tables.meta)
        set_epoch(txn, tables, max(now, newest_epoch + 1))
        txn.put(BUILT, sequence_key(self._clock.boot()), db=tables.meta)
        losses = number(os.urandom(6))  # a flusher that knew the store before is to know none of its losses again
        for name in (LOSSES, PUT_BACK, RECALLED):
            txn.put(name, sequence_key(losses), db=tables.meta)
        txn.put(b"clock", clock_row(now - self._clock.boot(), 0), db=tables.meta)


def set_epoch(txn: Txn, tables: Tables, epoch: int) -> None:
    """Say which incarnation this is."""
    txn.put(b"epoch", sequence_key(epoch), db=tables.meta)
    txn.put(b"check", _check(txn, tables), db=tables.meta)


def open_lmdb(data: Path) -> lmdb.Environment:
    """LMDB's environment of a whole file, as every process must open it."""
    size = (data / "data.mdb").stat().st_size
    return lmdb.open(
        str(data), map_size=size, max_dbs=len(NAMES) + 1, max_readers=MAX_READERS, mode=0o700, sync=False,
        metasync=False, writemap=True, readahead=False, max_spare_txns=0,
    )  # fmt: skip


def identity(data: Path) -> tuple[int, int]:
    """Device and inode of the data file; (0, 0) when it is not there."""
    try:
        info = (data / "data.mdb").stat()
    except OSError:
        return (0, 0)
    return (info.st_dev, info.st_ino)


def _leads_to_all(txn: Txn, table: lmdb._Database) -> bool:
    """Whether every key is found from the root, which `verify` does not look at and LMDB's writers rely on."""
    return all(txn.get(key, db=table) is not None for key in txn.cursor(table).iternext(values=False))


def _has(txn: Txn, tables: Tables, handle: bytes, place: bytes) -> bool:
    """Whether a session's record says that it has this place in the outbox."""
    return txn.get(handle, NO_PLACE, db=tables.records)[-PLACE_BYTES:] == place


def _check(txn: Txn, tables: Tables) -> bytes:
    """A digest of what the environment says of itself and no commit changes; in every format the same four rows."""
    digest = blake2b(digest_size=16)
    for name in (b"format", b"epoch", b"uuid", b"size"):
        digest.update(txn.get(name, b"", db=tables.meta))
    return digest.digest()
