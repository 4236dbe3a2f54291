"""Who may still come in when the map fills, and who goes first."""

from typing import Final, NamedTuple

from shmsession.errors import StoreFull
from shmsession.record import AUTHENTICATED, STORABLE, TOMBSTONE, Header, unpack_header

from .environment import Usage
from .seal import SHORTEST
from .tables import ANONYMOUS_CLASS, LOGGED_IN_CLASS, LOSSES, PUT_BACK, Tables, Txn, expiry_bound, handle_in, waits

QUIET_MS: Final = 60_000
"""Nothing that changed within this time is evicted or forgotten: a slow fill must still meet it."""

NEW_ANONYMOUS: Final = 60
NEW_LOGGED_IN: Final = 80
UNKNOWN: Final = 85
UPDATE: Final = 90
"""Per cent of the map's pages up to which each kind of write is let in. UNKNOWN: what ends a session, or all of a user,
of which nothing is here. Tombstones of those that are here are always let in."""

RESERVED: Final = 5
"""The last points below each limit are for those for whom others had to go. Records have random handles: removing
some leaves holes in many pages and frees none, and the next record seldom fits into one of these very holes."""

LOOKED_AT: Final = 1 << 16
"""So many records of a kind are looked at in one search: some ten milliseconds, in which nobody waits for it but this
process."""


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


class Evictor:
    """Finds who goes: soonest to end first. `backend`: whether there is one that may have it all.

    With a backend: what it has too, anonymous before logged-in. Then anonymous records that exist in memory only.
    Never dirty ones, never a logged-in one that cannot be loaded again, never one that changed within QUIET_MS.
    """

    def __init__(self, *, backend: bool) -> None:
        self._backend = backend
        self._after: dict[tuple[int, bool], bytes] = {}
        """Where a search goes on that came to its limit."""

    def find(self, txn: Txn, tables: Tables, boot: int, count: int) -> list[tuple[bytes, bool]]:
        """(handle, whether the backend has it) of up to `count` that may go, by one snapshot.

        Nobody whom it would lose is named before all have been looked at whom it would not.
        """
        found: list[tuple[bytes, bool]] = []
        recoverable = [(ANONYMOUS_CLASS, True), (LOGGED_IN_CLASS, True)] if self._backend else []
        if recoverable and is_recalling(txn, tables):  # the backend does not have it all
            return found
        for kind in (*recoverable, (ANONYMOUS_CLASS, False)):
            found += [(handle, kind[1]) for handle in self._search(txn, tables, kind, boot, count - len(found))]
            if len(found) >= count or kind in self._after:
                break
        return found

    def _search(self, txn: Txn, tables: Tables, kind: tuple[int, bool], boot: int, count: int) -> list[bytes]:
        victims: list[bytes] = []
        cursor = txn.cursor(tables.expiry)
        begun = self._after.pop(kind, b"")
        more = cursor.set_range(begun or expiry_bound(kind[0], 0))
        for _ in range(LOOKED_AT):
            if not more or len(victims) >= count or cursor.key()[0] != kind[0]:
                if begun and not victims:  # what stands in front was not looked at this time
                    self._after[kind] = expiry_bound(kind[0], 0)
                return victims
            handle = handle_in(bytes(cursor.key()))
            if may_go(txn, tables, handle, boot, recoverable=kind[1]):
                victims.append(handle)
            more = cursor.next()
        if more:
            self._after[kind] = bytes(cursor.key())
        return victims


def is_recalling(txn: Txn, tables: Tables) -> bool:
    """Whether the backend has lost something that does not yet wait to be sent again."""
    return txn.get(LOSSES, db=tables.meta) != txn.get(PUT_BACK, db=tables.meta)


def may_go(txn: Txn, tables: Tables, handle: bytes, boot: int, *, recoverable: bool) -> bool:
    """Whether a record may be evicted, as one that the backend has, or as one that nobody else has."""
    raw = txn.get(handle, db=tables.records) if handle else None
    if raw is None or len(raw) < SHORTEST:
        return False
    header = unpack_header(raw)  # type: ignore[arg-type]
    return _may_go(header, boot, recoverable=recoverable) and not waits(txn, tables, handle, raw)  # type: ignore[arg-type]


def _may_go(header: Header, boot: int, *, recoverable: bool) -> bool:
    if header.flags & TOMBSTONE or is_recent(header, boot):
        return False
    return not recoverable or bool(header.flags & STORABLE)


def is_recent(header: Header, boot: int) -> bool:
    """Whether it changed within QUIET_MS of this boot; a change of an earlier boot is not recent."""
    return 0 <= boot - header.changed < QUIET_MS
