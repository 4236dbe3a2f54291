"""The memory store: what may happen to a record, each in one transaction.

Missing is an answer, not an error. Nothing here decodes a value or calls the application's code, or waits but for the
write lock and for pages.
"""

from collections import deque
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from shmsession.clock import Clock
from shmsession.errors import StoreError, StoreFull, Unreadable
from shmsession.hooks import Event, Evicted, Expired, Hooks, Quarantined, RecordCorrupt
from shmsession.keyring import Keyring
from shmsession.record import (
    HEADER_BYTES,
    NO_TAG,
    PLACE_BYTES,
    RENEWED,
    STORABLE,
    TOMBSTONE,
    WATERMARK,
    Changes,
    Header,
    Lifetimes,
    Record,
    unpack_header,
)

from . import registry, room
from .drafting import Drafts
from .environment import Usage
from .outbox import Outbox
from .place import default_directory
from .seal import RecordSeal
from .sweeping import Sweeper, any_due, clock_stepped
from .tables import (
    BUILT,
    TOMBSTONE_CLASS,
    Tables,
    Txn,
    expiry_bound,
    index,
    number,
    remove,
    sequence_key,
    unindex,
    waits,
)
from .users import Entry, Users
from .writing import Writer

STALE_FILL_MS: Final = 30_000
EVICTION_BATCH: Final = 64


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


ID_IN_USE: Final = "a session got a new id that is in use: see that id_generator never gives one twice"


class MemoryStore:
    """Records by handle. `backend`: whether commits are to be noted in the outbox for one."""

    closed = False

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
        max_sessions_per_user: int | None = None,
        refuse_more: bool = False,
    ) -> None:
        self._seal = RecordSeal(keyring)
        self._clock = clock
        self._drafts = Drafts(self._seal, lifetimes, max_size)
        self._backend = backend
        self._hooks = hooks or Hooks()
        self._noticed: deque[Event] = deque()
        base = directory or default_directory()
        self.environment = registry.acquire(base, name, map_size, clock, self._judge)
        self._writer = Writer(self.environment, self._drafts, clock, self._make_room, self._tell, backend=backend)
        self.outbox = Outbox(self.environment, self._seal, self._writer, clock)
        self.users = Users(
            self.environment, self._seal, self._drafts, self._writer, clock,
            limit=max_sessions_per_user, refuse=refuse_more,
        )  # fmt: skip
        self._evictor = room.Evictor(backend=backend)
        self._sweeper = Sweeper(self._seal, self._writer.bury, backend=backend)

    def open(self) -> None:
        """Open the environment in this process now. Raises StoreError."""
        self.environment.open()
        self._tell()

    def close(self) -> None:
        """Give the environment back. The store must not be used afterwards."""
        self.closed = True
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

    def judge(self, handle: bytes, raw: bytes | None, now: int) -> Record | Missing:
        """What `load` says of what somebody else has read there."""
        found = Missing.UNKNOWN if raw is None else self._live(handle, raw, now)
        self._tell()
        return found

    def _live(self, handle: bytes, raw: bytes, now: int, within: tuple[Txn, Tables] | None = None) -> Record | Missing:
        record = self._seal.open(handle, raw)
        if record is None:
            self._noticed.append(RecordCorrupt(handle.hex()))
            return Missing.UNKNOWN
        header = record.header
        if header.flags & TOMBSTONE:
            if now >= header.idle_expiry and self._is_forgettable(handle, record, within):
                return Missing.UNKNOWN
            return Missing.RENEWED if header.flags & RENEWED else Missing.DEAD
        return record if now < header.expires else Missing.EXPIRED

    def _is_forgettable(self, handle: bytes, tombstone: Record, within: tuple[Txn, Tables] | None) -> bool:
        if room.is_recent(tombstone.header, self._clock.boot()):
            return False
        return not (waits(*within, handle, tombstone.raw) if within else self.outbox.holds(handle))

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────

    def create(self, handle: bytes, changes: Changes, now: int, entry: Entry | None = None) -> Record | Missing | None:
        """Insert a new record; None when the handle is taken. One that carries a user is a login, made by `entry`: DEAD
        when their sessions were revoked since it was asked for. Raises StoreFull, TooManySessions, Unreadable."""
        boot, epoch = self._clock.boot(), self.environment.epoch
        data = changes.merged({})
        prepared = self._drafts.first(handle, data, changes, now, boot, epoch)
        done: Record | None = None

        def work(txn: Txn, tables: Tables, made_room: bool = False) -> Record | Missing | None:
            nonlocal done
            raw = txn.get(handle, db=tables.records)
            if raw is not None:
                return done if self.environment.redoing and done and _is_same(raw, done) else None
            record: Record | None = prepared
            if prepared.header.user_tag != NO_TAG:
                redraft = partial(self._drafts.first, handle, data, changes, now, boot, epoch)
                record = self.users.admit(txn, tables, prepared, entry, now, redraft)
            if record is None:
                return Missing.DEAD
            crowd = self._writer.admit(txn, tables, room.limit_for(record.header), len(record.raw))
            done = self._writer.insert(txn, tables, handle, record)
            self._writer.settle(txn, tables, crowd, made_room)
            return done

        return self._writer.write(work)

    def update(self, handle: bytes, base: Record, changes: Changes, now: int) -> Record | Conflict | Missing:
        """Merge `changes` into the record as it is now; never creates. `base` is what the caller loaded.

        Raises StoreFull and Unreadable.
        """
        boot = self._clock.boot()
        prepared = None
        if now < base.header.expires:
            prepared = self._drafts.next(handle, base, changes, now, boot, self.environment.epoch)
        done: Record | None = None

        def work(txn: Txn, tables: Tables, made_room: bool = False) -> Record | Conflict | Missing:
            nonlocal done
            raw = txn.get(handle, db=tables.records)
            if raw is None:
                return Missing.UNKNOWN
            if self.environment.redoing and done and _is_same(raw, done):
                return done  # the store was rebuilt after the first run had committed, and has kept that
            if raw == base.raw and prepared is not None:
                stored, record = base, prepared
            else:
                found = self._live(handle, raw, now, (txn, tables))  # type: ignore[arg-type]
                if isinstance(found, Missing):
                    return found
                if not changes.fits(found.split()):
                    return Conflict(found)
                stored = found
                record = self._drafts.next(handle, found, changes, now, boot, self.environment.epoch)
            done = self._writer.replace(txn, tables, handle, stored, record, made_room)
            return done

        return self._writer.write(work)

    def fill(self, handle: bytes, header: Header, data: bytes, missed: int) -> Record | Missing | None:
        """Keep what a backend answered to a miss at boot time `missed`; not dirty.

        Never over a tombstone or a newer record, which is returned instead; None when the answer is too old to be
        believed, or from before this environment was made, or there is no room.
        """
        boot = self._clock.boot()
        kept = header._replace(key_id=self._seal.key_id, changed=boot)
        record = self._seal.close(handle, kept, data)

        def work(txn: Txn, tables: Tables, made_room: bool = False) -> Record | Missing | None:
            if self._clock.boot() - missed > STALE_FILL_MS:
                return None
            if missed <= number(txn.get(b"cleared", db=tables.meta)) < missed + STALE_FILL_MS:  # type: ignore[arg-type]
                return Missing.DEAD
            if missed < number(txn.get(BUILT, db=tables.meta)) < missed + STALE_FILL_MS:  # type: ignore[arg-type]
                return None  # a rebuild kept only what the backend lacked: a newer one may have been here
            raw = txn.get(handle, db=tables.records)
            if raw is not None:
                found = self._live(handle, raw, self._clock.now(), (txn, tables))  # type: ignore[arg-type]
                if isinstance(found, Missing):
                    if found is not Missing.UNKNOWN:
                        return found
                elif _order(found.header) >= _order(header) or waits(txn, tables, handle, found.raw):
                    return found
            if self.users.has_ended(txn, tables, record):
                return Missing.DEAD
            if raw is not None:
                if len(raw) >= HEADER_BYTES:
                    unindex(txn, tables, handle, unpack_header(raw))  # type: ignore[arg-type]
                txn.delete(handle, db=tables.records)
            crowd = self._writer.admit(txn, tables, room.limit_for(kept), len(record.raw))
            txn.put(handle, record.raw, db=tables.records)
            index(txn, tables, handle, kept)
            self._writer.settle(txn, tables, crowd, made_room)
            return record

        try:
            return self._writer.write(work)
        except StoreFull:
            return None

    def renew(
        self, old: bytes, new: bytes, base: Record, changes: Changes, now: int, user: bytes | None, *, login: bool,
        entry: Entry | None = None,
    ) -> Record | Missing:  # fmt: skip
        """Move the session to a new handle, merged as it is now; the old one becomes a tombstone that says so.

        `user` is the encoded user id the session has from now on, None for none. With `login` the absolute deadline
        begins anew, and it is made by `entry`. DEAD also for a user whose sessions were revoked since the login, or
        since that was asked for. Raises StoreFull, Unreadable, TooManySessions, and StoreError when `new` is in use.
        """
        boot = self._clock.boot()
        prepared = None
        if now < base.header.expires:
            prepared = self._drafts.moved(new, base, changes, now, boot, self.environment.epoch, user, login=login)
        done: Record | None = None

        def work(txn: Txn, tables: Tables, made_room: bool = False) -> Record | Missing:
            nonlocal done
            raw = txn.get(old, db=tables.records)
            if self.environment.redoing and done and _is_same(txn.get(new, db=tables.records), done):
                return done
            if raw is None:
                return Missing.UNKNOWN
            if raw == base.raw and prepared is not None:
                found, record = base, prepared
            else:
                now_stored = self._live(old, raw, now, (txn, tables))  # type: ignore[arg-type]
                if isinstance(now_stored, Missing):
                    return now_stored
                found, epoch = now_stored, self.environment.epoch
                record = self._drafts.moved(new, found, changes, now, boot, epoch, user, login=login)
            if login and user is not None:
                epoch = self.environment.epoch
                redraft = partial(self._drafts.moved, new, found, changes, now, boot, epoch, user, login=True)
                admitted = self.users.admit(txn, tables, record, entry, now, redraft, leaves=old)
            else:
                admitted = None if self.users.has_ended(txn, tables, record) else record
            if admitted is None:
                return Missing.DEAD
            record = admitted
            if txn.get(new, db=tables.records) is not None:
                raise StoreError(ID_IN_USE)
            crowd = self._writer.admit(txn, tables, room.UPDATE, max(0, len(record.raw) - len(found.raw)))
            successor = b"" if login else new
            self._writer.bury(txn, tables, old, found.header, found.place, now, boot, renewed=True, successor=successor)
            done = self._writer.insert(txn, tables, new, record)
            self._writer.settle(txn, tables, crowd, made_room)
            return done

        return self._writer.write(work)

    def destroy(self, handle: bytes, now: int) -> bytes | None:
        """Replace the record by a tombstone and return its handle; None when there was none, nor can a backend have it.

        Works when full. A session that only got a new id meanwhile is destroyed under that; one that was logged in is
        another's. One that was evicted gets a tombstone too, for a fill may be on its way; that may raise StoreFull.
        """
        boot = self._clock.boot()
        done: bytes | None = None

        def work(txn: Txn, tables: Tables, made_room: bool = False) -> bytes | None:
            nonlocal done
            target = handle
            while True:
                raw = txn.get(target, db=tables.records)
                found = None if raw is None else self._seal.open(target, raw)  # type: ignore[arg-type]
                if self.environment.redoing and done == target and found is not None and found.header.flags & TOMBSTONE:
                    return done
                if found is None or not found.header.flags & TOMBSTONE:
                    if raw is None:  # anybody may make up handles while the backend is down
                        self._writer.admit(txn, tables, room.UNKNOWN, 0)
                    last = found or self._unseen(target, now, boot)
                    self._writer.bury(txn, tables, target, last.header, last.place, now, boot)
                    done = target if raw is not None or self._backend else None
                    return done
                if not found.data or found.header.flags & WATERMARK:
                    return None
                target = found.data

        return self._writer.write(work)

    def _unseen(self, handle: bytes, now: int, boot: int) -> Record:
        """What stands for a session that may be known elsewhere, of which nothing is known here."""
        return self._drafts.first(handle, {}, Changes(longterm=True), now, boot, self.environment.epoch)

    # ── keeping house ─────────────────────────────────────────────────────────────────────────────────────────

    def sweep(self, now: int, limit: int = 100) -> int:
        """Remove up to `limit` records that have ended and tombstones that may be forgotten; returns how many went.

        Pauses for five minutes after the wall clock stepped: what looks expired then may not be.
        """
        boot, expired = self._clock.boot(), 0

        def work(limit: int, txn: Txn, tables: Tables) -> int:
            nonlocal expired
            gone, expired = self._sweeper.sweep(txn, tables, now, boot, limit)
            return gone

        if not self.environment.read(lambda txn, tables: any_due(txn, tables, now)):
            return 0
        gone = self._writer.clean(work, limit)
        if gone and expired:
            self._hooks.emit(Expired(expired))
        return gone

    def trusts_clocks(self, now: int) -> bool:
        """Whether what looks expired is: not within five minutes after the wall clock stepped."""
        boot = self._clock.boot()
        return not self.environment.write(lambda txn, tables: clock_stepped(txn, tables, now, boot))

    def evict(self, count: int = EVICTION_BATCH) -> int:
        """Remove up to `count` records that may go (see Evictor); returns how many went."""
        boot = self._clock.boot()
        victims = self.environment.read(lambda txn, tables: self._evictor.find(txn, tables, boot, count))

        def work(limit: int, txn: Txn, tables: Tables) -> int:
            gone = 0
            for handle, recoverable in victims[:limit]:
                if room.may_go(txn, tables, handle, boot, recoverable=recoverable):
                    remove(txn, tables, handle, unpack_header(txn.get(handle, db=tables.records)))  # type: ignore[arg-type]
                    gone += 1
            return gone

        gone = self._writer.clean(work, len(victims))
        if gone:
            self.environment.counters.add("evicted", gone)
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

    def cleared(self) -> None:
        """The backend has just lost all its sessions by order: what it was asked for before is not to be kept."""
        boot = sequence_key(self._clock.boot())
        self.environment.write(lambda txn, tables: txn.put(b"cleared", boot, db=tables.meta))

    def _destroy_readable(self, handle: bytes, now: int) -> bool:
        try:
            return self.destroy(handle, now) is not None
        except Unreadable:
            return False

    def forget_verified(self) -> None:
        """Verify every record anew when it is next read."""
        self._seal.forget()

    def usage(self) -> Usage:
        """Pages in use, touched and in all."""
        return self.environment.read(self.environment.usage)

    # ── what the floors below call ────────────────────────────────────────────────────────────────────────────

    def _make_room(self) -> bool:
        return bool(self.sweep(self._clock.now(), EVICTION_BATCH) or self.evict())

    def _tell(self) -> None:
        """Tell the hooks what was noticed, with no transaction open and no gate held: they may use the store."""
        while self._noticed:
            self._hooks.emit(self._noticed.popleft())
        while self.environment.quarantines:
            path, imported = self.environment.quarantines.popleft()
            self._hooks.emit(Quarantined(str(path), imported))

    def _judge(self, handle: bytes, raw: bytes) -> tuple[Header, bool, bool] | None:
        """See Judge. A backend has what is storable and alive."""
        try:
            record = self._seal.open(handle, raw)
        except Unreadable:
            return unpack_header(raw), False, False
        if record is None:
            return None
        recoverable = self._backend and record.header.flags & (STORABLE | TOMBSTONE) == STORABLE
        return record.header, True, recoverable


def _is_same(raw: object, done: Record) -> bool:
    """Whether this was stored by the run before, though a rebuild may have given it another place in the outbox."""
    return isinstance(raw, bytes) and raw[:-PLACE_BYTES] == done.raw[:-PLACE_BYTES]


def _order(header: Header) -> tuple[int, int]:
    return header.epoch, header.version
