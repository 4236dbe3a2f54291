"""All sessions of a user in memory: listed, ended by a watermark, and counted where there may be only so many.

The table of users is keyed by tags of 8 bytes, which are hints: what is found is compared with the user it names.
"""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol

from shmsession.clock import Clock
from shmsession.errors import StoreFull, TooManySessions, Unreadable
from shmsession.ids import tag_of, watermark_of
from shmsession.record import (
    NO_TAG,
    PLACE_BYTES,
    RENEWED,
    TOMBSTONE,
    USER_KEY,
    WATERMARK,
    Header,
    Record,
    unpack_header,
)
from shmsession.watermark import Watermark, auth_time

from . import room
from .drafting import Drafts
from .environment import Environment
from .seal import RecordSeal
from .tables import Tables, Txn
from .writing import Writer

CHUNK: Final = 100
"""So many sessions are ended in one transaction: others wait for it."""

Begin = Callable[[Txn, Tables], list[bytes]]
"""What a first transaction does before any session ends; returns the handles to look at."""
Condemns = Callable[[Record | None], bool]
"""Whether a session is to end; None: one that others have sealed, which has the user's tag."""


class Redraft(Protocol):
    """Makes the same record for another moment of the login."""

    def __call__(self, *, auth_time: int) -> Record:
        """See Drafts."""
        ...


class Held(NamedTuple):
    """A session in memory."""

    handle: bytes
    record: Record


class Entry:
    """A login on its way into memory. `asked`: the boot time at which it was asked for.

    `ended`: afterwards, the sessions that had to end for it.
    """

    def __init__(self, asked: int) -> None:
        self.asked = asked
        self.ended: list[bytes] = []


class Users:
    """`limit`: how many sessions a user may have, if so many only. `refuse`: a login beyond it, instead of ending the
    session that was logged in first."""

    def __init__(
        self, environment: Environment, seal: RecordSeal, drafts: Drafts, writer: Writer, clock: Clock, *,
        limit: int | None = None, refuse: bool = False,
    ) -> None:  # fmt: skip
        self._environment = environment
        self._seal = seal
        self._drafts = drafts
        self._writer = writer
        self._clock = clock
        self._limit = limit
        self._refuse = refuse

    def sessions(self, user: bytes, now: int) -> list[Held]:
        """The live sessions of an encoded user id. Raises Unreadable when one is for others to read."""
        return self._environment.read(lambda txn, tables: self._held(txn, tables, user, now))

    # ── ending all of them ────────────────────────────────────────────────────────────────────────────────────

    def revoke(self, user: bytes, keep: bytes | None = None) -> list[bytes]:
        """End all sessions of an encoded user id but `keep`, for good; returns the handles of those that were here.

        Works when full, unless none are here: then it may raise StoreFull. Who dies before the last of many leaves the
        rest to whoever meets the watermark.
        """
        now, boot = self._clock.now(), self._clock.boot()

        def begin(txn: Txn, tables: Tables) -> list[bytes]:
            known = None
            with contextlib.suppress(Unreadable):
                known = self.watermark(txn, tables, user)
            mark = Watermark(user, max(now, known.moment + 1 if known else 0), boot)  # above the logins since that one
            kept = None if keep is None else self._spare(txn, tables, keep, mark, now)
            handles = _handles(txn, tables, tag_of(user))
            if not handles and known is None:  # it is one more record, and the last pages are for removing some
                self._writer.admit(txn, tables, room.UNKNOWN, 0)
            self._writer.mark(txn, tables, mark, now)
            return [handle for handle in handles if handle != kept]

        def is_theirs(record: Record | None) -> bool:
            return record is None or record.split().get(USER_KEY) == user

        return self._end(begin, is_theirs, now, boot)

    def enforce(self, mark: Watermark) -> list[bytes]:
        """End what is left of the sessions that a watermark ends; returns their handles."""

        def begin(txn: Txn, tables: Tables) -> list[bytes]:
            return _handles(txn, tables, tag_of(mark.user))

        def is_ended(record: Record | None) -> bool:
            return record is not None and mark.ends(record.split())

        if not self._environment.read(begin):
            return []
        return self._end(begin, is_ended, self._clock.now(), self._clock.boot())

    def _end(self, begin: Begin, condemns: Condemns, now: int, boot: int) -> list[bytes]:
        """Bury what is condemned of the handles with which the first transaction begins, a chunk at a time."""
        ended: dict[bytes, None] = {}

        def work(left: list[bytes] | None, size: int, txn: Txn, tables: Tables, made_room: bool = False) -> list[bytes]:
            left = begin(txn, tables) if left is None else left
            for handle in left[:size]:
                header = self._condemned(txn, tables, handle, condemns)
                if header is not None:
                    raw: bytes = txn.get(handle, db=tables.records)  # type: ignore[assignment]
                    self._writer.bury(txn, tables, handle, header, raw[-PLACE_BYTES:], now, boot)
                    ended[handle] = None
            return left[size:]

        left, size = None, CHUNK
        while left is None or left:
            try:
                left = self._writer.write(partial(work, left, size))
            except StoreFull:  # fewer at once need fewer pages
                if size == 1:
                    raise
                size = max(1, size // 8)
        return list(ended)

    def _condemned(self, txn: Txn, tables: Tables, handle: bytes, condemns: Condemns) -> Header | None:
        """The header of a session that is there and condemned."""
        raw: bytes = txn.get(handle, b"", db=tables.records)  # type: ignore[assignment]
        try:
            record = self._seal.open(handle, raw)
        except Unreadable:
            header = unpack_header(raw)
            return None if header.flags & TOMBSTONE or not condemns(None) else header
        if record is None or record.header.flags & TOMBSTONE or not condemns(record):
            return None
        return record.header

    def _spare(self, txn: Txn, tables: Tables, handle: bytes, mark: Watermark, now: int) -> bytes:
        """Let a session of the user go on, by the handle that it has by now, which is returned."""
        while True:
            raw: bytes = txn.get(handle, b"", db=tables.records)  # type: ignore[assignment]
            record = self._seal.readable(handle, raw)
            if record is None or not (record.header.flags & RENEWED and record.data):
                break
            handle = record.data
        if record is not None and _is_live(record, mark.user, now):
            spared = self._drafts.spared(handle, record, mark, now, self._environment.epoch)
            self._writer.overwrite(txn, tables, handle, record, spared)
        return handle

    def remembered(self, user: bytes) -> Watermark | None:
        """The watermark of an encoded user id, while it is remembered."""
        return self._environment.read(lambda txn, tables: self.watermark(txn, tables, user))

    def watermark(self, txn: Txn, tables: Tables, user: bytes) -> Watermark | None:
        """That of an encoded user id, if it is remembered. Raises Unreadable."""
        handle = watermark_of(user)
        raw: bytes = txn.get(handle, b"", db=tables.records)  # type: ignore[assignment]
        record = self._seal.open(handle, raw) if raw else None
        if record is None or not record.header.flags & WATERMARK:  # it was revoked as if it were a session
            return None
        return Watermark.of(record)

    def has_revoked(self, record: Record) -> bool:
        """Whether a watermark says that this session, which may not be here any more, has ended."""
        return self._environment.read(lambda txn, tables: self.has_ended(txn, tables, record))

    # ── coming in ─────────────────────────────────────────────────────────────────────────────────────────────

    def has_ended(self, txn: Txn, tables: Tables, record: Record) -> bool:
        """Whether its user's watermark says that a session has ended, which comes from elsewhere or goes on."""
        user = None if record.header.user_tag == NO_TAG else record.split().get(USER_KEY)
        mark = None if user is None else self.watermark(txn, tables, user)
        return mark is not None and mark.ends(record.split())

    def admit(
        self, txn: Txn, tables: Tables, record: Record, entry: Entry | None, now: int, redraft: Redraft, *,
        leaves: bytes = b"",
    ) -> Record | None:  # fmt: skip
        """The record of a login that is made now: this one, or where the user's watermark is not below it, another.

        None when the login was asked for before that was written. `leaves`: the handle that ends with it. Where there
        may be no session more, one ends for it. Raises TooManySessions.
        """
        user = record.split()[USER_KEY]
        mark = self.watermark(txn, tables, user)
        if mark is not None and entry is not None and entry.asked < mark.boot <= self._clock.boot():
            return None
        if self._limit is not None:
            self._make_way(txn, tables, user, self._limit, entry or Entry(0), leaves, now)
        return record if mark is None or mark.moment < now else redraft(auth_time=mark.moment + 1)

    def _make_way(
        self, txn: Txn, tables: Tables, user: bytes, limit: int, entry: Entry, leaves: bytes, now: int
    ) -> None:
        held = [one for one in self._held(txn, tables, user, now, sealed=True) if one.handle != leaves]
        excess = len(held) + 1 - limit
        entry.ended = []
        if excess <= 0:
            return
        if self._refuse:
            raise TooManySessions(
                f"the user has {len(held)} sessions, and may have {limit} (max_sessions_per_user): end one that "
                "store.sessions(user_id) lists with store.revoke(handle), or all with store.revoke_user(user_id), and "
                'log in again; or let the oldest end by itself: SessionConfig(too_many_sessions="end_oldest")'
            )
        boot = self._clock.boot()
        for handle, record in sorted(held, key=_login_order)[:excess]:
            self._writer.bury(txn, tables, handle, record.header, record.place, now, boot)
            entry.ended.append(handle)

    def _held(self, txn: Txn, tables: Tables, user: bytes, now: int, *, sealed: bool = False) -> list[Held]:
        """`sealed`: with those that others have sealed, as if they held nothing; else they raise Unreadable."""
        found = []
        for handle in _handles(txn, tables, tag_of(user)):
            raw: bytes = txn.get(handle, b"", db=tables.records)  # type: ignore[assignment]
            try:
                record = self._seal.open(handle, raw)
            except Unreadable:
                if not sealed:
                    raise
                record = Record(raw, unpack_header(raw), b"", {USER_KEY: user})  # as the tag says
            if record is not None and _is_live(record, user, now):
                found.append(Held(handle, record))
        return found


def _handles(txn: Txn, tables: Tables, tag: bytes) -> list[bytes]:
    """The handles of all that may be sessions of a user with this tag."""
    found = []
    cursor = txn.cursor(tables.users)
    more = cursor.set_range(tag)
    while more and (row := bytes(cursor.key())).startswith(tag):
        found.append(row[len(tag) :])
        more = cursor.next()
    return found


def _is_live(record: Record, user: bytes, now: int) -> bool:
    header = record.header
    return not header.flags & TOMBSTONE and now < header.expires and record.split().get(USER_KEY) == user


def _login_order(one: Held) -> tuple[int, int, bytes]:
    created = one.record.header.created
    return auth_time(one.record.split()) or created, created, one.handle
