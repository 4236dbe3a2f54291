"""Who may still come in when the map fills, and who goes first."""

from typing import Final, NamedTuple

from shmsession.errors import StoreFull
from shmsession.record import AUTHENTICATED, STORABLE, TOMBSTONE, Header, unpack_header

from .environment import Usage
from .seal import SHORTEST
from .tables import ANONYMOUS_CLASS, LOGGED_IN_CLASS, Tables, Txn, expiry_bound, handle_in, remove, waits

QUIET_MS: Final = 60_000
"""Nothing that changed within this time is evicted or forgotten: a slow fill must still meet it."""

NEW_ANONYMOUS: Final = 60
NEW_LOGGED_IN: Final = 80
UPDATE: Final = 90
"""Per cent of the map's pages up to which each kind of write is let in; tombstones always are."""

RESERVED: Final = 5
"""The last points below each limit are for those for whom others had to go. Records have random handles: removing
some leaves holes in many pages and frees none, and the next record seldom fits into one of these very holes."""

_SCAN_PER_EVICTION: Final = 8


class Crowd(NamedTuple):
    """A write at its limit: pages in use before it, and the limit in per cent."""

    used: int
    limit: int


def admit(usage: Usage, limit: int, grows_by: int) -> Crowd | None:
    """None when `grows_by` more bytes are welcome; at the limit, what `settle` judges when they are written.

    Raises StoreFull beyond the limit.
    """
    if (usage.used + 1 + grows_by // 4096) * 100 <= usage.total * (limit - RESERVED):
        return None
    if usage.used * 100 > usage.total * limit:
        raise _full(usage, limit)
    return Crowd(usage.used, limit)


def settle(crowd: Crowd, usage: Usage, *, made_room: bool) -> None:
    """Raise StoreFull when a write at its limit took reserved pages and may not.

    What fits into the pages in use is let in, what takes more only up to the limit and when room was made for it.
    """
    if usage.used > crowd.used and (not made_room or usage.used * 100 > usage.total * crowd.limit):
        raise _full(usage, crowd.limit)


def _full(usage: Usage, limit: int) -> StoreFull:
    return StoreFull(
        f"the memory store is full: {usage.used} of {usage.total} pages are in use, {limit} % may be for this. "
        "Raise SHMSESSION_MAP_SIZE, or shorten SHMSESSION_LIFESPAN"
    )


def limit_for(header: Header) -> int:
    """Up to how full a map a new record of this kind is let in, in per cent."""
    return NEW_LOGGED_IN if header.flags & AUTHENTICATED else NEW_ANONYMOUS


def evict(txn: Txn, tables: Tables, boot: int, count: int, *, backend: bool) -> int:
    """Remove up to `count` records that may go, soonest to end first; returns how many went.

    With a backend: what it has too, anonymous before logged-in. Then anonymous records that exist in memory only.
    Never dirty ones, never a logged-in one that cannot be loaded again, never one that changed within QUIET_MS.
    """
    gone = 0
    rounds = [(ANONYMOUS_CLASS, True), (LOGGED_IN_CLASS, True)] if backend else []
    for kind, recoverable in [*rounds, (ANONYMOUS_CLASS, False)]:
        gone += _evict_class(txn, tables, kind, boot, count - gone, recoverable=recoverable)
        if gone >= count:
            break
    return gone


def _evict_class(txn: Txn, tables: Tables, kind: int, boot: int, count: int, *, recoverable: bool) -> int:
    victims: list[tuple[bytes, Header]] = []
    cursor = txn.cursor(tables.expiry)
    found = cursor.set_range(expiry_bound(kind, 0))
    for _ in range(count * _SCAN_PER_EVICTION):
        if not found or len(victims) >= count or cursor.key()[0] != kind:
            break
        handle = handle_in(bytes(cursor.key()))
        raw = txn.get(handle, db=tables.records) if handle else None
        if raw is not None and len(raw) >= SHORTEST:
            header = unpack_header(raw)  # type: ignore[arg-type]
            if _may_go(header, boot, recoverable=recoverable) and not waits(txn, tables, handle, raw):  # type: ignore[arg-type]
                victims.append((handle, header))
        found = cursor.next()
    for handle, header in victims:
        remove(txn, tables, handle, header)
    return len(victims)


def _may_go(header: Header, boot: int, *, recoverable: bool) -> bool:
    if header.flags & TOMBSTONE or is_recent(header, boot):
        return False
    return not recoverable or bool(header.flags & STORABLE)


def is_recent(header: Header, boot: int) -> bool:
    """Whether it changed within QUIET_MS of this boot; a change of an earlier boot is not recent."""
    return 0 <= boot - header.changed < QUIET_MS
