"""The memory store: what may happen to a record, each in one transaction.

Missing is an answer, not an error. Nothing here decodes a value or calls the application's code, or waits but for the
write lock and for pages.
"""

import time
from collections import deque
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import lmdb

from shmsession.clock import Clock
from shmsession.errors import SessionTooLarge, StoreFull, Unreadable
from shmsession.hooks import Event, Evicted, Hooks, Quarantined, RecordCorrupt
from shmsession.ids import tag_of
from shmsession.keyring import Keyring
from shmsession.record import (
    AUTHENTICATED,
    HEADER_BYTES,
    NO_TAG,
    RENEWED,
    STORABLE,
    TOMBSTONE,
    USER_KEY,
    Changes,
    Data,
    Header,
    Lifetimes,
    Record,
    first_header,
    join,
    next_header,
    tombstone,
    unpack_header,
)

from . import registry, room
from .environment import Usage
from .place import default_directory
from .seal import RecordSeal
from .tables import (
    ANONYMOUS_CLASS,
    EXPIRY_ROW_BYTES,
    LOGGED_IN_CLASS,
    TOMBSTONE_CLASS,
    Tables,
    Txn,
    clock_in,
    clock_row,
    expiry_bound,
    expiry_key,
    handle_in,
    index,
    number,
    sequence_key,
    unindex,
)

T = TypeVar("T")

STALE_FILL_MS: Final = 30_000
STEP_TOLERANCE_MS: Final = 5_000
STEP_PAUSE_MS: Final = 300_000
EVICTION_BATCH: Final = 64
MAP_FULL_ATTEMPTS: Final = 4
SNAPSHOT_PAUSE_SECONDS: Final = 0.001
"""How long a write waits for readers to let go of old pages, when the map is not full but LMDB finds none."""
FULL_PAUSE_MS: Final = 1_000
"""After a search for room that found none, nobody searches again for this long: a flood must not pay for one each."""


class Missing(Enum):
    """Why there is no record.

    UNKNOWN: a backend may have it. EXPIRED: nobody looked at it for too long. DEAD, RENEWED: it was destroyed, or got
    a new id, so lately that requests of that time may still be under way.
    """

    UNKNOWN = "unknown"
    EXPIRED = "expired"
    DEAD = "dead"
    RENEWED = "renewed"


class Conflict(NamedTuple):
    """An expected value was another one; here is the record as it is. Nothing was written."""

    record: Record


class MemoryStore:
    """Records by handle. `backend`: whether commits are to be noted in the outbox for one."""

    def __init__(
        self,
        directory: Path | None,
        name: str,
        keyring: Keyring,
        lifetimes: Lifetimes,
        clock: Clock,
        *,
        map_size: int | None = None,
        max_size: int = 64 * 1024,
        backend: bool = False,
        hooks: Hooks | None = None,
    ) -> None:
        self._seal = RecordSeal(keyring)
        self._lifetimes = lifetimes
        self._clock = clock
        self._max_size = max_size
        self._backend = backend
        self._hooks = hooks or Hooks()
        self._noticed: deque[Event] = deque()
        self._full_since = -FULL_PAUSE_MS
        self._made_room = False
        base = directory or default_directory()
        self.environment = registry.acquire(base, name, map_size, clock, self._judge)

    def open(self) -> None:
        """Open the environment in this process now. Raises StoreError."""
        self.environment.open()
        self._tell()

    def close(self) -> None:
        """Give the environment back. The store must not be used afterwards."""
        registry.release(self.environment)

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, handle: bytes, now: int) -> Record | Missing:
        """The live record. Raises Unreadable for one sealed under an unknown Key or in a newer format."""
        raw = self.environment.get(handle)
        if raw is None:
            return Missing.UNKNOWN
        found = self._live(handle, raw, now)
        if self._noticed or self.environment.quarantines:
            self._tell()
        return found

    def _live(self, handle: bytes, raw: bytes, now: int) -> Record | Missing:
        record = self._seal.open(handle, raw)
        if record is None:
            self._noticed.append(RecordCorrupt(handle.hex()))
            return Missing.UNKNOWN
        header = record.header
        if header.flags & TOMBSTONE:
            if now >= header.idle_expiry and self._is_forgettable(header, self._clock.boot()):
                return Missing.UNKNOWN
            return Missing.RENEWED if header.flags & RENEWED else Missing.DEAD
        return record if now < header.expires else Missing.EXPIRED

    def _is_forgettable(self, tombstone: Header, boot: int) -> bool:
        return not tombstone.dirty_seq and not room.is_recent(tombstone, boot)

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, handle: bytes, changes: Changes, now: int) -> Record | None:
        """Insert a new record; None when the handle is taken. Raises StoreFull."""
        record = self._first(handle, changes.merged({}), changes, now)
        done: Record | None = None

        def work(txn: Txn, tables: Tables) -> Record | None:
            nonlocal done
            raw = txn.get(handle, db=tables.records)
            if raw is not None:
                return done if self.environment.redoing and done is not None and raw == done.raw else None
            crowd = self._admit(txn, tables, room.limit_for(record.header), len(record.raw))
            done = self._insert(txn, tables, handle, record)
            self._settle(txn, tables, crowd)
            return done

        return self._write(work)

    def update(self, handle: bytes, base: Record, changes: Changes, now: int) -> Record | Conflict | Missing:
        """Merge `changes` into the record as it is now; never creates. `base` is what the caller loaded.

        Raises StoreFull and Unreadable.
        """
        boot = self._clock.boot()
        prepared = self._next(handle, base, changes, now, boot) if now < base.header.expires else None
        done: Record | None = None

        def work(txn: Txn, tables: Tables) -> Record | Conflict | Missing:
            nonlocal done
            raw = txn.get(handle, db=tables.records)
            if raw is None:
                return Missing.UNKNOWN
            if self.environment.redoing and done is not None and raw == done.raw:
                return done  # the store was rebuilt after the first run had committed, and has kept that
            if raw == base.raw and prepared is not None:
                stored, record = base, prepared
            else:
                found = self._live(handle, raw, now)  # type: ignore[arg-type]
                if isinstance(found, Missing):
                    return found
                if not changes.fits(found.split()):
                    return Conflict(found)
                stored, record = found, self._next(handle, found, changes, now, boot)
            done = self._replace(txn, tables, handle, stored, record)
            return done

        return self._write(work)

    def touch(self, handle: bytes, base: Record, now: int) -> Record | Missing:
        """Move the idle expiry. A store without room for it leaves the session as it is."""
        try:
            result = self.update(handle, base, Changes(touch=True), now)
        except StoreFull:
            return base
        return result.record if isinstance(result, Conflict) else result

    def fill(self, handle: bytes, header: Header, data: bytes, missed: int) -> Record | Missing | None:
        """Keep what a backend answered to a miss at boot time `missed`; not dirty.

        Never over a tombstone or a newer record, which is returned instead; None when the answer is too old to be
        believed, or there is no room.
        """
        boot = self._clock.boot()
        kept = header._replace(key_id=self._seal.key_id, dirty_seq=0, changed=boot)
        record = self._seal.close(handle, kept, data)

        def work(txn: Txn, tables: Tables) -> Record | Missing | None:
            if self._clock.boot() - missed > STALE_FILL_MS:
                return None
            raw = txn.get(handle, db=tables.records)
            if raw is not None:
                found = self._live(handle, raw, self._clock.now())  # type: ignore[arg-type]
                if isinstance(found, Missing):
                    if found is not Missing.UNKNOWN:
                        return found
                elif found.header.dirty_seq or _order(found.header) >= _order(header):
                    return found
                if len(raw) >= HEADER_BYTES:
                    unindex(txn, tables, handle, unpack_header(raw))  # type: ignore[arg-type]
                txn.delete(handle, db=tables.records)
            crowd = self._admit(txn, tables, room.limit_for(kept), len(record.raw))
            txn.put(handle, record.raw, db=tables.records)
            index(txn, tables, handle, kept)
            self._settle(txn, tables, crowd)
            return record

        try:
            return self._write(work)
        except StoreFull:
            return None

    def renew(
        self, old: bytes, new: bytes, base: Record, changes: Changes, now: int, user: bytes | None, *, login: bool
    ) -> Record | Missing:
        """Move the session to a new handle, merged as it is now; the old one becomes a tombstone that says so.

        `user` is the encoded user id the session has from now on, None for none. With `login` the absolute deadline
        begins anew. Raises StoreFull, Unreadable.
        """
        boot = self._clock.boot()
        prepared = self._moved(new, base, changes, now, boot, user, login=login) if now < base.header.expires else None

        done: Record | None = None

        def work(txn: Txn, tables: Tables) -> Record | Missing:
            nonlocal done
            raw = txn.get(old, db=tables.records)
            if self.environment.redoing and done is not None and txn.get(new, db=tables.records) == done.raw:
                return done
            if raw is None:
                return Missing.UNKNOWN
            if raw == base.raw and prepared is not None:
                found, record = base, prepared
            else:
                now_stored = self._live(old, raw, now)  # type: ignore[arg-type]
                if isinstance(now_stored, Missing):
                    return now_stored
                found, record = now_stored, self._moved(new, now_stored, changes, now, boot, user, login=login)
            crowd = self._admit(txn, tables, room.UPDATE, max(0, len(record.raw) - len(found.raw)))
            self._bury(txn, tables, old, found.header, now, boot, renewed=True, successor=b"" if login else new)
            done = self._insert(txn, tables, new, record)
            self._settle(txn, tables, crowd)
            return done

        return self._write(work)

    def destroy(self, handle: bytes, now: int) -> bool:
        """Replace the record by a tombstone; False when there was none. Works in a full store.

        A session that only got a new id meanwhile is destroyed under that; one that was logged in is another's. One
        that was evicted gets a tombstone too: a fill may be on its way.
        """
        boot = self._clock.boot()

        def work(txn: Txn, tables: Tables) -> bool:
            target = handle
            while True:
                raw = txn.get(target, db=tables.records)
                found = None if raw is None else self._seal.open(target, raw)  # type: ignore[arg-type]
                if found is None or not found.header.flags & TOMBSTONE:
                    header = found.header if found else self._first(target, {}, Changes(longterm=True), now).header
                    self._bury(txn, tables, target, header, now, boot)
                    return raw is not None
                if not found.data:
                    return False
                target = found.data

        return self._write(work)

    # ── keeping house ─────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self, now: int, limit: int = 100) -> int:
        """Remove up to `limit` records that have ended and tombstones that may be forgotten; returns how many went.

        Pauses for five minutes after the wall clock stepped: what looks expired then may not be.
        """
        boot = self._clock.boot()

        def work(limit: int, txn: Txn, tables: Tables) -> int:
            return self._sweep(txn, tables, now, boot, limit)

        if not self.environment.read(lambda txn, tables: _any_due(txn, tables, now)):
            return 0
        return self._clean(work, limit)

    def evict(self, count: int = EVICTION_BATCH) -> int:
        """Remove up to `count` records that may go (`room.evict`); returns how many went."""
        boot = self._clock.boot()

        def work(limit: int, txn: Txn, tables: Tables) -> int:
            return room.evict(txn, tables, boot, limit, backend=self._backend)

        gone = self._clean(work, count)
        if gone:
            self._hooks.emit(Evicted(gone))
        return gone

    def count(self) -> int:
        """How many sessions there are, ended ones that nobody has swept yet included."""

        def work(txn: Txn, tables: Tables) -> int:
            dead = 0
            cursor = txn.cursor(tables.expiry)
            found = cursor.set_range(expiry_bound(TOMBSTONE_CLASS, 0))
            while found:
                dead += 1
                found = cursor.next()
            return int(txn.stat(tables.records)["entries"]) - dead

        return self.environment.read(work)

    def clear(self) -> int:
        """Destroy every session, with a tombstone each; returns how many there were. Unreadable ones stay."""
        handles = self.environment.read(lambda txn, tables: [bytes(key) for key, _ in txn.cursor(tables.records)])
        now = self._clock.now()
        return sum(self._destroy_readable(handle, now) for handle in handles)

    def _destroy_readable(self, handle: bytes, now: int) -> bool:
        try:
            return self.destroy(handle, now)
        except Unreadable:
            return False

    def forget_verified(self) -> None:
        """Verify every record anew when it is next read."""
        self._seal.forget()

    def usage(self) -> Usage:
        """Pages in use, touched and in all."""
        return self.environment.read(self.environment.usage)

    def outbox(self) -> list[tuple[int, bytes]]:
        """(sequence, handle) of every commit that no backend has acknowledged, oldest first."""
        return self.environment.read(
            lambda txn, tables: [(number(bytes(key)), bytes(handle)) for key, handle in txn.cursor(tables.outbox)]
        )

    # ── inside a transaction ──────────────────────────────────────────────────────────────────────────────────

    def _write(self, work: Callable[[Txn, Tables], T]) -> T:
        """Run `work`; when there is no room, make some and try again before giving up."""
        for attempt in range(MAP_FULL_ATTEMPTS):
            try:
                result = self.environment.write(work)
                if self._noticed or self.environment.quarantines:
                    self._tell()
                return result
            except StoreFull as error:
                last = attempt == MAP_FULL_ATTEMPTS - 1
                if not last and isinstance(error.__cause__, lmdb.Error) and not self._is_crowded():
                    time.sleep(SNAPSHOT_PAUSE_SECONDS)
                elif last or not self._make_room():
                    if attempt:
                        self._full_since = self._clock.boot()
                    raise
        raise AssertionError("unreachable")  # pragma: no cover

    def _is_crowded(self) -> bool:
        """Whether pages are short; otherwise readers hold old ones, for as long as their snapshots take."""
        usage = self.usage()
        return usage.used * 100 > usage.total * room.NEW_ANONYMOUS

    def _tell(self) -> None:
        """Tell the hooks what was noticed, with no transaction open and no gate held: they may use the store."""
        while self._noticed:
            self._hooks.emit(self._noticed.popleft())
        while self.environment.quarantines:
            path, imported = self.environment.quarantines.popleft()
            self._hooks.emit(Quarantined(str(path), imported))

    def _make_room(self) -> bool:
        boot, now = self._clock.boot(), self._clock.now()
        if self._full_since <= boot < self._full_since + FULL_PAUSE_MS:
            return False

        self._made_room = bool(self.sweep(now, EVICTION_BATCH) or self.evict())
        if not self._made_room:
            self._full_since = boot
        return self._made_room

    def _clean(self, work: Callable[[int, Txn, Tables], int], limit: int) -> int:
        """Deal with up to `limit` records, fewer where the map has no pages left to remove so many at once."""
        while limit:
            try:
                return self.environment.write(partial(work, limit))
            except StoreFull:
                limit //= 8
        return 0

    def _admit(self, txn: Txn, tables: Tables, limit: int, grows_by: int) -> room.Crowd | None:
        """Nothing where there is room; otherwise what `_settle` must be given when the write is done."""
        return room.admit(self.environment.usage(txn, tables), limit, grows_by)

    def _settle(self, txn: Txn, tables: Tables, crowd: room.Crowd | None) -> None:
        """Raise StoreFull, which undoes the write, when it took pages that it may not have."""
        if crowd is not None and room.settle(crowd, self.environment.usage(txn, tables), made_room=self._made_room):
            self._made_room = False

    def _first(self, handle: bytes, data: Data, changes: Changes, now: int) -> Record:
        user = data.get(USER_KEY)
        tag = NO_TAG if user is None else tag_of(user)
        epoch, key_id = self.environment.epoch, self._seal.key_id
        header = first_header(now, self._clock.boot(), changes, self._lifetimes, epoch, key_id, tag)
        return self._seal.close(handle, header, self._joined(data), data)

    def _next(self, handle: bytes, base: Record, changes: Changes, now: int, boot: int) -> Record:
        epoch, key_id = self.environment.epoch, self._seal.key_id
        header = next_header(base.header, now, boot, changes, self._lifetimes, epoch, key_id)
        if changes.set or changes.deleted or changes.cleared:
            values = changes.merged(base.split())
            return self._seal.close(handle, header, self._joined(values), values)
        return self._seal.close(handle, header, base.data, base.split())

    def _moved(
        self, new: bytes, found: Record, changes: Changes, now: int, boot: int, user: bytes | None, *, login: bool
    ) -> Record:
        data = changes.merged(found.split())
        data.pop(USER_KEY, None)
        if user is not None:
            data[USER_KEY] = user
        touched = Changes(touch=True, storable=changes.storable, longterm=changes.longterm)
        header = next_header(
            found.header, now, boot, touched, self._lifetimes, self.environment.epoch, self._seal.key_id
        )
        flags = header.flags & ~AUTHENTICATED | (AUTHENTICATED if user is not None else 0)
        absolute = self._lifetimes.deadline(now) if login else header.absolute
        header = header._replace(
            flags=flags,
            version=1,
            dirty_seq=0,
            absolute=absolute,
            horizon=max(header.horizon, min(header.idle_expiry, absolute)),
            user_tag=NO_TAG if user is None else tag_of(user),
        )
        return self._seal.close(new, header, self._joined(data), data)

    def _joined(self, data: Data) -> bytes:
        joined = join(data) if data else b""
        if len(joined) > self._max_size:
            raise SessionTooLarge(
                f"the session's data takes {len(joined)} bytes, max_size is {self._max_size}: "
                "store less in it, or raise SessionConfig(max_size=)"
            )
        return joined

    def _insert(self, txn: Txn, tables: Tables, handle: bytes, record: Record) -> Record:
        record = self._dirtied(txn, tables, handle, record)
        txn.put(handle, record.raw, db=tables.records, overwrite=False)
        index(txn, tables, handle, record.header)
        return record

    def _replace(self, txn: Txn, tables: Tables, handle: bytes, stored: Record, record: Record) -> Record:
        growth = len(record.raw) - len(stored.raw)
        crowd = self._admit(txn, tables, room.UPDATE, growth) if growth > 0 else None
        record = self._dirtied(txn, tables, handle, record)
        txn.put(handle, record.raw, db=tables.records)
        new, old = record.header, stored.header
        if new.idle_expiry != old.idle_expiry or new.dirty_seq != old.dirty_seq or new.absolute != old.absolute:
            unindex(txn, tables, handle, stored.header)
            index(txn, tables, handle, record.header)
        self._settle(txn, tables, crowd)
        return record

    def _dirtied(self, txn: Txn, tables: Tables, handle: bytes, record: Record) -> Record:
        """The record with a place in the outbox, when there is a backend that must hear of it and it has none yet."""
        header = record.header
        if not self._backend or header.dirty_seq or not header.flags & STORABLE:
            return record
        sequence = number(txn.get(b"sequence", db=tables.meta)) + 1  # type: ignore[arg-type]
        txn.put(b"sequence", sequence_key(sequence), db=tables.meta)
        return self._seal.close(handle, header._replace(dirty_seq=sequence), record.data)

    def _bury(
        self, txn: Txn, tables: Tables, handle: bytes, header: Header, now: int, boot: int, *,
        renewed: bool = False, successor: bytes = b"",
    ) -> None:  # fmt: skip
        """Put a tombstone in the record's place. It remembers the horizon, until which a backend must know it.

        `successor` is the handle under which the same login goes on: a logout that comes late must end that too.
        """
        epoch, key_id = self.environment.epoch, self._seal.key_id
        dead = tombstone(header, now, boot, room.QUIET_MS, epoch, key_id, renewed=renewed)
        record = self._dirtied(txn, tables, handle, self._seal.close(handle, dead, successor))
        unindex(txn, tables, handle, header)
        txn.put(handle, record.raw, db=tables.records)
        index(txn, tables, handle, record.header)

    def _sweep(self, txn: Txn, tables: Tables, now: int, boot: int, limit: int) -> int:
        """Deal with up to `limit` due rows, unless a clock stepped; returns how many records went with them."""
        if self._clock_stepped(txn, tables, now, boot):
            return 0
        gone = 0
        for kind in (ANONYMOUS_CLASS, LOGGED_IN_CLASS, TOMBSTONE_CLASS):
            rows = _due(txn, tables, kind, now, limit - gone)
            gone += sum(self._sweep_row(txn, tables, row, now, boot) for row in rows)
        return gone

    def _sweep_row(self, txn: Txn, tables: Tables, row: bytes, now: int, boot: int) -> int:
        """Deal with one due row of the expiry table; 1 when a record went with it."""
        if len(row) != EXPIRY_ROW_BYTES:
            txn.delete(row, db=tables.expiry)
            return 0
        handle = handle_in(row)
        raw = txn.get(handle, db=tables.records)
        header = None if raw is None else self._judge_header(handle, raw)  # type: ignore[arg-type]
        if header is None or expiry_key(header, handle) != row:
            txn.delete(row, db=tables.expiry)
            return int(header is None and txn.delete(handle, db=tables.records))
        if header.flags & TOMBSTONE:
            if header.dirty_seq or room.is_recent(header, boot):
                return 0
        elif header.dirty_seq:
            self._bury(txn, tables, handle, header, now, boot)
            return 1
        elif self._backend and room.is_recent(header, boot):
            return 0
        unindex(txn, tables, handle, header)
        txn.delete(handle, db=tables.records)
        return 1

    def _clock_stepped(self, txn: Txn, tables: Tables, now: int, boot: int) -> bool:
        """Whether wall clock and boot clock have disagreed within the pause: one of them stepped."""
        offset = now - boot
        before, until = clock_in(txn.get(b"clock", db=tables.meta)) or (offset, 0)  # type: ignore[arg-type]
        if abs(before - offset) > STEP_TOLERANCE_MS:
            until = boot + STEP_PAUSE_MS
            txn.put(b"clock", clock_row(offset, until), db=tables.meta)
        return boot < until <= boot + STEP_PAUSE_MS

    def _judge(self, handle: bytes, raw: bytes) -> Header | None:
        """A salvaged record's header when it is whole and to be kept: all, or with a backend what that lacks."""
        header = self._judge_header(handle, raw)
        if header is None or (self._backend and not (header.dirty_seq or header.flags & TOMBSTONE)):
            return None
        return header

    def _judge_header(self, handle: bytes, raw: bytes) -> Header | None:
        """The header of whole or unreadable bytes, None for corrupt ones."""
        try:
            record = self._seal.open(handle, raw)
        except Unreadable:
            return unpack_header(raw)
        return None if record is None else record.header


def _order(header: Header) -> tuple[int, int]:
    return header.epoch, header.version


def _due(txn: Txn, tables: Tables, kind: int, now: int, limit: int) -> list[bytes]:
    """Up to `limit` rows of a class whose time has come."""
    rows: list[bytes] = []
    cursor = txn.cursor(tables.expiry)
    found = cursor.set_range(expiry_bound(kind, 0))
    end = expiry_bound(kind, now + 1)
    while found and len(rows) < limit and bytes(cursor.key()) < end:
        rows.append(bytes(cursor.key()))
        found = cursor.next()
    return rows


def _any_due(txn: Txn, tables: Tables, now: int) -> bool:
    return any(_due(txn, tables, kind, now, 1) for kind in (ANONYMOUS_CLASS, LOGGED_IN_CLASS, TOMBSTONE_CLASS))
