"""Removing what has ended: due rows of the expiry table, and the records that they lead to."""

from typing import Final, Protocol

from shmsession.record import HEADER_BYTES, PLACE_BYTES, RENEWED, TOMBSTONE, WATERMARK, Header

from . import room
from .seal import TAIL_BYTES, RecordSeal
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
    unindex,
    waits,
)

STEP_TOLERANCE_MS: Final = 5_000
STEP_PAUSE_MS: Final = 300_000


class Bury(Protocol):
    """See `Writer.bury`."""

    def __call__(
        self, txn: Txn, tables: Tables, handle: bytes, header: Header, place: bytes, now: int, boot: int, *,
        renewed: bool = False, successor: bytes = b"",
    ) -> None:  # fmt: skip
        """Put a tombstone where a record is."""
        ...


class Sweeper:
    """`bury`: for what a backend has yet to hear of. `backend`: whether there is one that may have it all."""

    def __init__(self, seal: RecordSeal, bury: Bury, *, backend: bool) -> None:
        self._seal = seal
        self._bury = bury
        self._backend = backend

    def sweep(self, txn: Txn, tables: Tables, now: int, boot: int, limit: int) -> tuple[int, int]:
        """Deal with up to `limit` due rows, unless a clock stepped.

        Returns how many records went with them, and how many of these were sessions.
        """
        if clock_stepped(txn, tables, now, boot):
            return 0, 0
        gone = expired = 0
        for kind in (ANONYMOUS_CLASS, LOGGED_IN_CLASS, TOMBSTONE_CLASS):
            rows = _due(txn, tables, kind, now, limit - gone)
            swept = sum(self._sweep_row(txn, tables, row, now, boot) for row in rows)
            gone += swept
            expired += swept if kind != TOMBSTONE_CLASS else 0
        return gone, expired

    def _sweep_row(self, txn: Txn, tables: Tables, row: bytes, now: int, boot: int) -> int:
        """Deal with one due row of the expiry table; 1 when a record went with it."""
        if len(row) != EXPIRY_ROW_BYTES:
            txn.delete(row, db=tables.expiry)
            return 0
        handle = handle_in(row)
        raw: bytes = txn.get(handle, b"", db=tables.records)  # type: ignore[assignment]
        header = self._seal.header(handle, raw)
        if header is None or expiry_key(header, handle) != row:
            txn.delete(row, db=tables.expiry)
            return int(header is None and txn.delete(handle, db=tables.records))
        if waits(txn, tables, handle, raw):  # a backend has yet to hear of it: as a tombstone, due again later
            renewed = bool(header.flags & RENEWED)
            successor = raw[HEADER_BYTES:-TAIL_BYTES] if header.flags & (RENEWED | WATERMARK) else b""
            place = raw[-PLACE_BYTES:]
            self._bury(txn, tables, handle, header, place, now, boot, renewed=renewed, successor=successor)
            return int(not header.flags & TOMBSTONE)
        if header.flags & TOMBSTONE:
            if room.is_recent(header, boot):
                return 0
        elif self._backend and room.is_recent(header, boot):
            return 0
        unindex(txn, tables, handle, header)
        txn.delete(handle, db=tables.records)
        return 1


def any_due(txn: Txn, tables: Tables, now: int) -> bool:
    """Whether there is a row whose time has come."""
    return any(_due(txn, tables, kind, now, 1) for kind in (ANONYMOUS_CLASS, LOGGED_IN_CLASS, TOMBSTONE_CLASS))


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


def clock_stepped(txn: Txn, tables: Tables, now: int, boot: int) -> bool:
    """Whether wall clock and boot clock have disagreed within the pause: one of them stepped."""
    offset = now - boot
    before, until = clock_in(txn.get(b"clock", db=tables.meta)) or (offset, 0)  # type: ignore[arg-type]
    if abs(before - offset) > STEP_TOLERANCE_MS:
        until = boot + STEP_PAUSE_MS
        txn.put(b"clock", clock_row(offset, until), db=tables.meta)
    return boot < until <= boot + STEP_PAUSE_MS
