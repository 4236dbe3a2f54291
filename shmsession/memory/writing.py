"""Putting records in their place: with the rows that lead to them, and again once room was made for them."""

import time
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeVar

import lmdb

from shmsession.clock import Clock
from shmsession.errors import StoreFull
from shmsession.record import (
    HEADER_BYTES,
    NO_PLACE,
    PLACE_BYTES,
    STORABLE,
    TOMBSTONE,
    WITHDRAWN,
    Header,
    Record,
    unpack_header,
)
from shmsession.watermark import Watermark

from . import room
from .drafting import Drafts
from .environment import Environment
from .tables import Tables, Txn, index, number, put, reindex, sequence_key, unindex, waits

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

MAP_FULL_ATTEMPTS: Final = 4
SNAPSHOT_PAUSE_SECONDS: Final = 0.001
"""How long a write waits for readers to let go of old pages, when the map is not full but LMDB finds none."""
FULL_PAUSE_MS: Final = 1_000
"""After a search for room that found none, nobody searches again for this long: a flood must not pay for one each."""


class Work(Protocol[T_co]):
    """What one transaction does. `made_room`: whether others had to go for it, so that it may take reserved pages."""

    def __call__(self, txn: Txn, tables: Tables, made_room: bool = False) -> T_co:
        """Do it; StoreFull undoes it."""
        ...


class Writer:
    """Transactions that make room when there is none. `backend`: whether commits are noted in the outbox for one.

    `make_room` removes records that may go and says whether any went; `tell` is called after every write.
    """

    def __init__(
        self, environment: Environment, drafts: Drafts, clock: Clock, make_room: Callable[[], bool],
        tell: Callable[[], None], *, backend: bool,
    ) -> None:  # fmt: skip
        self._environment = environment
        self._drafts = drafts
        self._clock = clock
        self._search = make_room
        self._tell = tell
        self._backend = backend
        self._full_since = -FULL_PAUSE_MS

    # ── transactions ──────────────────────────────────────────────────────────────────────────────────────────

    def write(self, work: Work[T]) -> T:
        """Run `work`; when there is no room, make some and try again before giving up. Raises StoreFull."""
        attempt: Callable[[Txn, Tables], T] = work
        tried = 0
        while True:
            try:
                result = self._environment.write(attempt)
            except StoreFull as error:
                tried += 1
                last = tried == MAP_FULL_ATTEMPTS
                if not last and isinstance(error.__cause__, lmdb.Error) and not self._is_crowded():
                    time.sleep(SNAPSHOT_PAUSE_SECONDS)
                elif last or not self._make_room():
                    if tried > 1:
                        self._full_since = self._clock.boot()
                    raise
                else:
                    attempt = partial(work, made_room=True)
            else:
                self._tell()
                return result

    def clean(self, work: Callable[[int, Txn, Tables], int], limit: int) -> int:
        """Deal with up to `limit` records, fewer where the map has no pages left to remove so many at once."""
        while limit:
            try:
                return self._environment.write(partial(work, limit))
            except StoreFull:
                limit //= 8
        return 0

    def _is_crowded(self) -> bool:
        """Whether pages are short; otherwise readers hold old ones, for as long as their snapshots take."""
        usage = self._environment.read(self._environment.usage)
        return usage.used * 100 > usage.total * room.NEW_ANONYMOUS

    def _make_room(self) -> bool:
        boot = self._clock.boot()
        if self._full_since <= boot < self._full_since + FULL_PAUSE_MS:
            return False
        found = self._search()
        if not found:
            self._full_since = boot
        return found

    # ── inside a transaction ──────────────────────────────────────────────────────────────────────────────────

    def admit(self, txn: Txn, tables: Tables, limit: int, grows_by: int) -> room.Crowd | None:
        """Nothing where there is room; otherwise what `settle` must be given when the write is done."""
        return room.admit(self._environment.usage(txn, tables), limit, grows_by)

    def settle(self, txn: Txn, tables: Tables, crowd: room.Crowd | None, made_room: bool) -> None:
        """Raise StoreFull, which undoes the write, when it took pages that it may not have."""
        if crowd is not None:
            room.settle(crowd, self._environment.usage(txn, tables), made_room=made_room)

    def insert(self, txn: Txn, tables: Tables, handle: bytes, record: Record) -> Record:
        """Put a record where none is; returns it as stored."""
        record = self._dirtied(txn, tables, handle, record)
        txn.put(handle, record.raw, db=tables.records, overwrite=False)
        index(txn, tables, handle, record.header)
        return record

    def replace(
        self, txn: Txn, tables: Tables, handle: bytes, stored: Record, record: Record, made_room: bool
    ) -> Record:
        """Put a record in the place of `stored`, if it may grow that much; returns it as stored."""
        growth = len(record.raw) - len(stored.raw)
        crowd = self.admit(txn, tables, room.UPDATE, growth) if growth > 0 else None
        if self._backend:  # spares a call
            record = self._dirtied(txn, tables, handle, record, stored.header.flags)
        txn.put(handle, record.raw, db=tables.records)
        new, old = record.header, stored.header
        if new.idle_expiry != old.idle_expiry or new.absolute != old.absolute:
            reindex(txn, tables, handle, old, new)
        if crowd is not None:
            self.settle(txn, tables, crowd, made_room)
        return record

    def overwrite(self, txn: Txn, tables: Tables, handle: bytes, stored: Record, record: Record) -> None:
        """`replace`, whether there is room or not: for what must not fail, and takes but a few bytes more."""
        record = self._dirtied(txn, tables, handle, record, stored.header.flags)
        txn.put(handle, record.raw, db=tables.records)
        reindex(txn, tables, handle, stored.header, record.header)

    def mark(self, txn: Txn, tables: Tables, mark: Watermark, now: int) -> None:
        """Put a user's watermark where it belongs, in place of any other."""
        handle = mark.handle
        raw: bytes | None = txn.get(handle, db=tables.records)  # type: ignore[assignment]
        if raw is not None and len(raw) >= HEADER_BYTES:
            unindex(txn, tables, handle, unpack_header(raw))
        place = NO_PLACE if raw is None else raw[-PLACE_BYTES:]
        draft = self._drafts.watermark(mark, place, now, self._environment.epoch)
        put(txn, tables, handle, self._dirtied(txn, tables, handle, draft).raw, draft.header)

    def bury(
        self, txn: Txn, tables: Tables, handle: bytes, header: Header, place: bytes, now: int, boot: int, *,
        renewed: bool = False, successor: bytes = b"",
    ) -> None:  # fmt: skip
        """Put a tombstone where the record with this header and this place in the outbox is.

        `successor` is the handle under which the same login goes on: a logout that comes late must end that too.
        """
        epoch = self._environment.epoch
        dead = self._drafts.tombstone(handle, header, place, now, boot, epoch, renewed=renewed, successor=successor)
        record = self._dirtied(txn, tables, handle, dead)
        unindex(txn, tables, handle, header)
        txn.put(handle, record.raw, db=tables.records)
        index(txn, tables, handle, record.header)

    def dirty_in(self, txn: Txn, tables: Tables, handle: bytes, record: Record, *, front: bool) -> None:
        """Put a record into the outbox, at its end or in front."""
        if front and (cursor := txn.cursor(tables.outbox)).first() and (first := number(bytes(cursor.key()))) > 1:
            place = sequence_key(first - 1)
            txn.put(place, handle, db=tables.outbox)
        else:
            place = self._environment.take_place(txn, tables, handle, self._clock.now())
        txn.put(handle, self._drafts.placed(handle, record, place).raw, db=tables.records)

    def renumber(self, txn: Txn, tables: Tables, handle: bytes, record: Record, header: Header) -> None:
        """Put the same data under another header in a record's place."""
        renumbered = self._drafts.reheaded(handle, record, header)
        txn.put(handle, renumbered.raw, db=tables.records)
        reindex(txn, tables, handle, record.header, renumbered.header)

    def _dirtied(self, txn: Txn, tables: Tables, handle: bytes, record: Record, was: int = 0) -> Record:
        """The draft with a place in the outbox, when there is a backend that must hear of it and it has none yet.

        `was`: the flags before. One that is no longer storable must be heard of as well, and its death.
        """
        flags = record.header.flags
        told_of = STORABLE | WITHDRAWN if flags & TOMBSTONE else STORABLE
        if not self._backend or not (flags | was) & told_of or waits(txn, tables, handle, record.raw):
            return record
        record.move_to(self._environment.take_place(txn, tables, handle, self._clock.now()))
        return record
