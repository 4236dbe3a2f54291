"""The tables of the environment and the shapes of their keys. Big-endian numbers sort as they count."""

import struct
from typing import Final, NamedTuple

import lmdb

from shmsession.record import AUTHENTICATED, NO_PLACE, NO_TAG, PLACE_BYTES, TOMBSTONE, Header

ANONYMOUS_CLASS: Final = 0
LOGGED_IN_CLASS: Final = 1
TOMBSTONE_CLASS: Final = 2

_EXPIRY = struct.Struct(">BQ20s")
EXPIRY_ROW_BYTES: Final = _EXPIRY.size
_SEQUENCE = struct.Struct(">Q")
SEQUENCE_BITS: Final = 20
YEAR_MS: Final = 366 * 86_400_000
_CLOCK = struct.Struct(">qQ")

LOSSES: Final = b"forgot"
"""The note that says how often the backend was found to have lost what it had acknowledged, on top of a random number
with which a store begins: no other store of this place has had it."""
PUT_BACK: Final = b"put back"
"""The note up to which of these losses all was put back that this host's processes can read."""
HISTORY: Final = b"history"
"""The note of the history with which the backend went on when it was last asked (`Backend`), as a digest."""
BUILT: Final = b"built"
"""The note of the boot time at which the environment was made."""
RECALLED: Final = b"recalled"
"""The note up to which of these losses all was put back."""

Txn = lmdb.Transaction


class Tables(NamedTuple):
    """Handles of one opened environment.

    records: handle → record. expiry: class, time, handle → nothing; it names exactly when each record ends.
    outbox: place → handle, what a backend has not acknowledged. users: user tag, handle → nothing. meta: by name.
    """

    records: lmdb._Database
    expiry: lmdb._Database
    outbox: lmdb._Database
    users: lmdb._Database
    meta: lmdb._Database


NAMES: Final = tuple(name.encode() for name in Tables._fields)


def class_of(header: Header) -> int:
    """Which class of the expiry table a record is in."""
    if header.flags & TOMBSTONE:
        return TOMBSTONE_CLASS
    return LOGGED_IN_CLASS if header.flags & AUTHENTICATED else ANONYMOUS_CLASS


def expiry_key(header: Header, handle: bytes) -> bytes:
    """The row of the expiry table that leads to a record."""
    return _EXPIRY.pack(class_of(header), header.expires, handle)


def expiry_bound(kind: int, time: int) -> bytes:
    """Every row of this class that is due before `time` sorts below it."""
    return _EXPIRY.pack(kind, max(0, time), bytes(20))


def handle_in(expiry_row: bytes) -> bytes:
    """The handle in a row of the expiry table."""
    return expiry_row[9:]


def sequence_key(sequence: int) -> bytes:
    """A number as 8 bytes that sort as it counts."""
    return _SEQUENCE.pack(sequence)


def number(stored: bytes | None) -> int:
    """What `sequence_key` was given; 0 for nothing."""
    return 0 if stored is None else int.from_bytes(stored[:8], "big")


def sequence_after(last: int, now: int) -> int:
    """The next number of the outbox. It tells when it was given, as far as the wall clock went forward."""
    first = now << SEQUENCE_BITS
    return first if first > last else last + 1


def plausible_places(now: int) -> tuple[int, int]:
    """The first and last place that can have been given out by now, if the wall clock never stepped by a year."""
    return sequence_after(0, max(0, now - YEAR_MS)), sequence_after(0, now + YEAR_MS)


def last_place(txn: Txn, tables: Tables, now: int) -> int:
    """The last place in the outbox that can have been given out by now; 0 for none."""
    cursor = txn.cursor(tables.outbox)
    beyond = cursor.set_range(sequence_key(plausible_places(now)[1] + 1))
    return number(bytes(cursor.key())) if (cursor.prev() if beyond else cursor.last()) else 0


def sequence_moment(sequence: int) -> int:
    """When a number of the outbox was given, in wall-clock milliseconds."""
    return sequence >> SEQUENCE_BITS


def clock_row(offset: int, until: int) -> bytes:
    """What is kept of the clocks: wall clock minus boot clock, and the boot time until which sweepers pause."""
    return _CLOCK.pack(offset, until)


def clock_in(row: bytes | None) -> tuple[int, int] | None:
    """What `clock_row` was given; None for nothing, or for something else."""
    return _CLOCK.unpack(row) if row is not None and len(row) == _CLOCK.size else None


def waits(txn: Txn, tables: Tables, handle: bytes, raw: bytes) -> bool:
    """Whether this record, as it is stored now, is one that a backend has yet to hear of.

    A place in front of the others may be given out again, so that it counts only with the handle that stands there.
    """
    place = raw[-PLACE_BYTES:]
    return place != NO_PLACE and txn.get(place, db=tables.outbox) == handle


def put(txn: Txn, tables: Tables, handle: bytes, raw: bytes, header: Header) -> None:
    """Write a record that is not there, or whose rows are removed, and the rows that lead to it."""
    txn.put(handle, raw, db=tables.records)
    index(txn, tables, handle, header)


def remove(txn: Txn, tables: Tables, handle: bytes, header: Header) -> None:
    """Remove a record and the rows that lead to it."""
    unindex(txn, tables, handle, header)
    txn.delete(handle, db=tables.records)


def index(txn: Txn, tables: Tables, handle: bytes, header: Header) -> None:
    """Write the rows that lead to this record."""
    txn.put(expiry_key(header, handle), b"", db=tables.expiry)
    if header.user_tag != NO_TAG:
        txn.put(header.user_tag + handle, b"", db=tables.users)


def unindex(txn: Txn, tables: Tables, handle: bytes, header: Header) -> None:
    """Remove them."""
    txn.delete(expiry_key(header, handle), db=tables.expiry)
    if header.user_tag != NO_TAG:
        txn.delete(header.user_tag + handle, db=tables.users)


def reindex(txn: Txn, tables: Tables, handle: bytes, old: Header, new: Header) -> None:
    """The rows that lead to a record whose header has changed: only those that differ are written."""
    was, now = expiry_key(old, handle), expiry_key(new, handle)
    if was != now:
        txn.delete(was, db=tables.expiry)
        txn.put(now, b"", db=tables.expiry)
    if old.user_tag != new.user_tag:
        if old.user_tag != NO_TAG:
            txn.delete(old.user_tag + handle, db=tables.users)
        if new.user_tag != NO_TAG:
            txn.put(new.user_tag + handle, b"", db=tables.users)
