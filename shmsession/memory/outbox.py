"""What a backend has yet to hear of: read in order, crossed off when it has heard, put back when it forgot."""

import sys
from hashlib import blake2b
from typing import Final, NamedTuple

from shmsession.clock import Clock
from shmsession.errors import StoreFull, Unreadable
from shmsession.ids import HANDLE_BYTES
from shmsession.record import (
    HEADER_BYTES,
    NO_PLACE,
    PLACE_BYTES,
    STORABLE,
    TOMBSTONE,
    WITHDRAWN,
    Record,
    unpack_header,
)

from . import room
from .environment import Environment
from .seal import RecordSeal
from .tables import (
    HISTORY,
    LOSSES,
    PUT_BACK,
    RECALLED,
    Tables,
    Txn,
    number,
    remove,
    sequence_key,
    sequence_moment,
    waits,
)
from .writing import Writer

CHUNK: Final = 100
"""So many records are looked through in one transaction: others wait for it."""

WINDOW: Final = 10
"""So many are read in one transaction. In a busy process each takes as long as a commit or two, for Python's lock
changes hands; what these free can be used again only when the snapshot is let go, and the more pages there are in turn,
the fewer of them a processor keeps at hand: every commit is slower from then on."""

LAST_PLACE: Final = b"\xff" * PLACE_BYTES


class Dirty(NamedTuple):
    """A commit to be sent: the session's handle and its record as it is now."""

    handle: bytes
    record: Record


class Outbox:
    """The outbox of one memory store. Each method is a few short transactions."""

    def __init__(self, environment: Environment, seal: RecordSeal, writer: Writer, clock: Clock) -> None:
        self._environment = environment
        self._seal = seal
        self._writer = writer
        self._clock = clock

    def rows(self) -> list[tuple[int, bytes]]:
        """(place as a number, handle) of every commit that no backend has acknowledged, oldest first."""
        return self._environment.read(
            lambda txn, tables: [(number(bytes(key)), bytes(handle)) for key, handle in txn.cursor(tables.outbox)]
        )

    def holds(self, handle: bytes) -> bool:
        """Whether no backend has acknowledged this session's last commit."""

        def work(txn: Txn, tables: Tables) -> bool:
            return waits(txn, tables, handle, txn.get(handle, NO_PLACE, db=tables.records))  # type: ignore[arg-type]

        return self._environment.read(work)

    def __len__(self) -> int:
        return self._environment.read(lambda txn, tables: int(txn.stat(tables.outbox)["entries"]))

    def age(self) -> int:
        """How long the oldest row has waited, in milliseconds; 0 when there is none."""

        def work(txn: Txn, tables: Tables) -> int:
            cursor = txn.cursor(tables.outbox)
            return sequence_moment(number(bytes(cursor.key()))) if cursor.first() else -1

        since = self._environment.read(work)
        return 0 if since < 0 else max(0, self._clock.now() - since)

    def ends(self) -> tuple[bytes, bytes] | None:
        """The places of the oldest and the newest commit; None when there is none."""

        def work(txn: Txn, tables: Tables) -> tuple[bytes, bytes] | None:
            cursor = txn.cursor(tables.outbox)
            if not cursor.first():
                return None
            first = bytes(cursor.key())
            cursor.last()
            return first, bytes(cursor.key())

        return self._environment.read(work)

    def oldest(
        self, limit: int, size: int = sys.maxsize, after: bytes = NO_PLACE, until: bytes = LAST_PLACE
    ) -> list[Dirty]:
        """Up to `limit` commits that wait, oldest first, until they make `size` bytes.

        Of places behind `after`, up to `until`. A record of an unknown Key is left for who has that.
        """
        batch: list[Dirty] = []
        stray: list[tuple[bytes, bytes]] = []
        while len(batch) < limit and size > 0:
            window = self._window(min(WINDOW, limit - len(batch)), size, after, until)
            for place, handle, raw in window:
                try:
                    record = self._seal.open_in_passing(handle, raw)
                except Unreadable:
                    continue
                if record is None or raw[-PLACE_BYTES:] != place:
                    stray.append((place, handle))
                else:
                    batch.append(Dirty(handle, record))
                    size -= len(raw)
            if not window:
                break
            after = window[-1][0]
        if stray:
            self._drop(stray)
        return batch

    def _window(self, limit: int, size: int, after: bytes, until: bytes) -> list[tuple[bytes, bytes, bytes]]:
        """The next places, the handles there, and what they lead to: b"" for nothing."""

        def work(txn: Txn, tables: Tables) -> list[tuple[bytes, bytes, bytes]]:
            found: list[tuple[bytes, bytes, bytes]] = []
            left = size
            cursor, records = txn.cursor(tables.outbox), txn.cursor(tables.records)
            more = cursor.set_range(after + b"\0")
            while more and len(found) < limit and left > 0:
                place, handle = cursor.item()
                if place > until:  # type: ignore[operator]
                    break
                # Not txn.get: that gives up Python's lock each time, and in a busy process is long in getting it back.
                raw = records.value() if records.set_key(handle) else b""
                left -= len(raw)
                found.append((place, handle, raw))  # type: ignore[arg-type]
                more = cursor.next()
            return found

        return self._environment.read(work)

    def _drop(self, stray: list[tuple[bytes, bytes]]) -> None:
        """Places that no record says it has, which only damage leaves behind; whose place is damaged gets another."""
        claimants = self._claimants({place for place, _ in stray})

        def work(txn: Txn, tables: Tables) -> None:
            for place, handle in stray:
                record = self._found(txn, tables, handle)
                if record is None or record.place != place:
                    txn.delete(place, db=tables.outbox)
            for handle in (*claimants, *(handle for _, handle in stray)):
                record = self._found(txn, tables, handle)
                if record is not None and not waits(txn, tables, handle, record.raw):
                    self._writer.dirty_in(txn, tables, handle, record, front=False)

        self._environment.write(work)

    def _claimants(self, places: set[bytes]) -> list[bytes]:
        """Whoever says that it has one of these: what stands there may have been its handle."""

        def work(txn: Txn, tables: Tables) -> list[bytes]:
            return [bytes(key) for key, raw in txn.cursor(tables.records) if raw[-PLACE_BYTES:] in places]

        return self._environment.read(work)

    # ── answers ───────────────────────────────────────────────────────────────────────────────────────────────

    def acknowledge(self, sent: list[Dirty], losses: int) -> None:
        """The backend has these, or later ones: cross off what has not changed since.

        What has, and lives, goes behind all others: it waits for no longer than since it was sent. The dead keep their
        places, for what they were renewed to must not be sent before them.
        Nothing, when it has lost something meanwhile: `losses` is what `losses()` was when they were sent.
        """
        begin, size, now = 0, CHUNK, self._clock.now()
        while begin < len(sent):
            chunk = sent[begin : begin + size]

            def work(txn: Txn, tables: Tables, chunk: list[Dirty] = chunk, moves: bool = size == CHUNK) -> None:
                if number(txn.get(LOSSES, db=tables.meta)) != losses:  # type: ignore[arg-type]
                    return
                records, same, newer = txn.cursor(tables.records), [], []
                for one in chunk:
                    if records.set_key(one.handle):
                        raw: bytes = records.value()  # type: ignore[assignment]
                        if raw == one.record.raw:
                            same.append(one)
                        elif moves and raw[-PLACE_BYTES:] == one.record.place and not _is_dead(raw):
                            newer.append((one, raw))
                _cross_off(txn, tables, same)
                for one, raw in newer:
                    if waits(txn, tables, one.handle, raw):
                        txn.delete(one.record.place, db=tables.outbox)
                        place = self._environment.take_place(txn, tables, one.handle, now)
                        txn.put(one.handle, raw[:-PLACE_BYTES] + place, db=tables.records)

            try:
                self._environment.write(work)
            except StoreFull:  # fewer at once need fewer pages
                if size == 1:
                    raise
                size = max(1, size // 8)
            else:
                begin += size

    def obey(self, handle: bytes, losses: int) -> None:
        """The backend says that the session is dead: so it is here.

        It waits no more, unless the backend has lost something since `losses()` was this.
        """
        now, boot = self._clock.now(), self._clock.boot()

        def work(txn: Txn, tables: Tables) -> None:
            record = self._found(txn, tables, handle)
            if record is None:
                return
            if not record.header.flags & TOMBSTONE:
                self._writer.bury(txn, tables, handle, record.header, record.place, now, boot)
                record = self._found(txn, tables, handle)
            if record is not None and number(txn.get(LOSSES, db=tables.meta)) == losses:  # type: ignore[arg-type]
                _cross_off(txn, tables, [Dirty(handle, record)])

        self._environment.write(work)

    def outnumber(self, handle: bytes, epoch: int, version: int) -> None:
        """The backend has a newer one, from a store that is gone: what was committed here is to be sent above it."""

        def work(txn: Txn, tables: Tables) -> None:
            record = self._found(txn, tables, handle)
            if record is None or not waits(txn, tables, handle, record.raw):
                return
            if (record.header.epoch, record.header.version) < (epoch, version):
                header = record.header._replace(epoch=max(epoch, record.header.epoch), version=version + 1)
                self._writer.renumber(txn, tables, handle, record, header)

        self._environment.write(work)

    def _found(self, txn: Txn, tables: Tables, handle: bytes) -> Record | None:
        raw = txn.get(handle, db=tables.records)
        return None if raw is None else self._seal.readable(handle, raw)  # type: ignore[arg-type]

    # ── all records, a chunk at a time ────────────────────────────────────────────────────────────────────────

    def put_back(self, after: bytes, *, dead: bool) -> tuple[int, bytes, bool]:
        """The backend has lost what it had: the dead, or the others, wait again. The next chunk.

        The dead go in front of all that waits. Returns how many, where the next call goes on (b"" at the end), and
        whether there were some that only others can read.
        """
        handles = self.handles(after)

        def work(txn: Txn, tables: Tables) -> tuple[int, bool]:
            put, passed_over = 0, False
            for handle in handles:
                raw = txn.get(handle, db=tables.records)
                record = None if raw is None else self._seal.readable(handle, raw)  # type: ignore[arg-type]
                if record is None:
                    passed_over = passed_over or raw is not None
                    continue
                header = record.header
                known = header.flags & (STORABLE | WITHDRAWN)
                if bool(header.flags & TOMBSTONE) == dead and known and not waits(txn, tables, handle, record.raw):
                    self._writer.dirty_in(txn, tables, handle, record, front=dead)
                    put += 1
            return put, passed_over

        while handles:
            try:
                put, passed_over = self._environment.write(work)
            except StoreFull:
                if len(handles) == 1:
                    raise
                handles = handles[: max(1, len(handles) // 8)]
            else:
                return put, handles[-1], passed_over
        return 0, b"", False

    def retire(self, now: int, idle: int, after: bytes) -> tuple[int, bytes]:
        """Remove from memory what the backend has and nobody looked at for `idle` milliseconds: the next chunk.

        Returns how many went, and where the next call goes on; b"" at the end.
        """
        handles = self.handles(after)
        boot = self._clock.boot()

        def idles(txn: Txn, tables: Tables, handle: bytes) -> Record | None:
            record = self._found(txn, tables, handle)
            if record is None or record.header.flags & TOMBSTONE or not record.header.flags & STORABLE:
                return None
            if now - record.header.last_seen < idle or room.is_recent(record.header, boot):
                return None
            return None if waits(txn, tables, handle, record.raw) else record

        def look(txn: Txn, tables: Tables) -> list[bytes]:
            return [handle for handle in handles if idles(txn, tables, handle) is not None]

        due = self._environment.read(look)

        def work(txn: Txn, tables: Tables) -> int:
            gone = 0
            if room.is_recalling(txn, tables):
                return gone
            for handle in due:
                record = idles(txn, tables, handle)
                if record is not None:
                    remove(txn, tables, handle, record.header)
                    gone += 1
            return gone

        return (self._environment.write(work) if due else 0), (handles[-1] if handles else b"")

    def handles(self, after: bytes, limit: int = CHUNK) -> list[bytes]:
        """The next handles in the order of their bytes, of all records."""

        def work(txn: Txn, tables: Tables) -> list[bytes]:
            cursor = txn.cursor(tables.records)
            found: list[bytes] = []
            more = cursor.set_range(after + b"\0") if after else cursor.first()
            while more and len(found) < limit:
                found.append(bytes(cursor.key()))
                more = cursor.next()
            return [handle for handle in found if len(handle) == HANDLE_BYTES] or found

        return self._environment.read(work)

    def send_again(self, handle: bytes) -> None:
        """One session is to wait again."""

        def work(txn: Txn, tables: Tables) -> None:
            record = self._found(txn, tables, handle)
            if record is None or not record.header.flags & STORABLE or waits(txn, tables, handle, record.raw):
                return
            self._writer.dirty_in(txn, tables, handle, record, front=False)

        self._environment.write(work)

    # ── notes of the flusher ──────────────────────────────────────────────────────────────────────────────────

    def note(self, name: bytes) -> int:
        """A number that was kept with the store; 0 when there is none."""
        return self._environment.read(lambda txn, tables: number(txn.get(name, db=tables.meta)))  # type: ignore[arg-type]

    def losses(self) -> int:
        """A number that grows when the backend is found to have lost what it had acknowledged."""
        return self.note(LOSSES)

    def note_loss(self) -> None:
        """The backend has lost something."""

        def work(txn: Txn, tables: Tables) -> None:
            losses = number(txn.get(LOSSES, db=tables.meta))  # type: ignore[arg-type]
            txn.put(LOSSES, sequence_key(losses + 1), db=tables.meta)

        self._environment.write(work)

    def note_history(self, history: bytes) -> bool:
        """With what the backend goes on. When that was another one it may have lost something; whether it was."""
        digest = blake2b(history, digest_size=8).digest()
        known = self._environment.read(lambda txn, tables: txn.get(HISTORY, db=tables.meta))
        if known == digest:
            return False

        def work(txn: Txn, tables: Tables) -> bool:
            known = txn.get(HISTORY, db=tables.meta)
            txn.put(HISTORY, digest, db=tables.meta)
            if known in (None, digest):
                return False
            losses = number(txn.get(LOSSES, db=tables.meta))  # type: ignore[arg-type]
            txn.put(LOSSES, sequence_key(losses + 1), db=tables.meta)
            return True

        return self._environment.write(work)

    def note_put_back(self, losses: int, *, by_all: bool) -> None:
        """All that this process can read waits again since `losses()` was this; `by_all`: and nothing else is left.

        Of no account when there was another loss meanwhile, or the store was built anew, which counts anew.
        """

        def work(txn: Txn, tables: Tables) -> None:
            if number(txn.get(LOSSES, db=tables.meta)) != losses:  # type: ignore[arg-type]
                return
            for name in (PUT_BACK, RECALLED) if by_all else (PUT_BACK,):
                txn.put(name, sequence_key(losses), db=tables.meta)

        self._environment.write(work)

    def raise_note(self, name: bytes, value: int) -> None:
        """Keep a number with the store, unless a higher one is there."""

        def work(txn: Txn, tables: Tables) -> None:
            if number(txn.get(name, db=tables.meta)) < value:  # type: ignore[arg-type]
                txn.put(name, sequence_key(value), db=tables.meta)

        self._environment.write(work)


def _is_dead(raw: bytes) -> bool:
    """Whether this is the record of a tombstone, or of something that cannot be told."""
    return len(raw) < HEADER_BYTES or bool(unpack_header(raw).flags & TOMBSTONE)


def _cross_off(txn: Txn, tables: Tables, heard_of: list[Dirty]) -> None:
    """Free the places that these still have: the records stay as they are."""
    outbox = txn.cursor(tables.outbox)
    for handle, record in heard_of:
        if outbox.set_key(record.place) and outbox.value() == handle:  # as `waits` asks
            outbox.delete()
