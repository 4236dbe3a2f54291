"""A record: the fixed header in front of a session's data, and the rules by which a commit makes the next one.

Everything here is pure: bytes and numbers in, bytes and numbers out. Times are milliseconds.
"""

import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Final, NamedTuple

import msgpack

FORMAT: Final = 1
NEVER: Final = 2**63 - 1

STORABLE: Final = 1
LONGTERM: Final = 2
AUTHENTICATED: Final = 4
TOMBSTONE: Final = 8
RENEWED: Final = 16
WITHDRAWN: Final = 32
"""It is storable no more: a backend that forgets that must be told again."""
WATERMARK: Final = 64
"""No session: a tombstone for all sessions that a user had."""

USER_KEY: Final = 0
AUTH_TIME_KEY: Final = 1
DEVICE_KEY: Final = 2
SPARED_KEY: Final = 3
LOGIN_KEYS: Final = (USER_KEY, AUTH_TIME_KEY, DEVICE_KEY, SPARED_KEY)
"""What is known of a login: whose, when, from where, and the revocation of that user's sessions which spared it."""
NOTES: Final = range(16)
"""int keys of what the library notes on a session. Those above are the application's messages."""
NO_TAG: Final = bytes(8)

DataKey = str | int
Data = dict[DataKey, bytes]
"""Already encoded values by key. The application's keys are str; int keys are the library's own (LOGIN_KEYS)."""


def _plain_packer() -> Callable[[object], bytes]:
    if msgpack.Packer.__module__ == "msgpack.fallback":  # pure Python: threads would write into each other's buffers
        return partial(msgpack.packb, use_bin_type=True)
    pack: Callable[[object], bytes] = msgpack.Packer(use_bin_type=True).pack
    return pack


pack_plain: Final = _plain_packer()
"""MessagePack of what needs no extension and not much memory, which a packer keeps. One packer serves all threads:
packing such values runs no Python code, so that the GIL is held throughout."""

_LAYOUT = struct.Struct(">BB4sQQQQQQQQ8s")
HEADER_BYTES: Final = _LAYOUT.size
KEY_ID_AT: Final = 2
"""Where the id of the Key stands: behind format and flags."""
PLACE_BYTES: Final = 8
NO_PLACE: Final = bytes(PLACE_BYTES)


class Header(NamedTuple):
    """What is known of a session without decoding its data."""

    format: int
    flags: int
    key_id: bytes
    epoch: int
    version: int
    created: int
    last_seen: int
    idle_expiry: int
    absolute: int
    horizon: int
    changed: int
    user_tag: bytes

    @property
    def expires(self) -> int:
        """When the session ends, in wall-clock milliseconds; for a tombstone, when it may be forgotten."""
        return self.idle_expiry if self.idle_expiry < self.absolute else self.absolute  # noqa: FURB136  # a fifth of min()'s time


class Record:
    """A record as stored: `raw` is all of it: header, data, MAC, place. Equal bytes, equal records."""

    __slots__ = ("_values", "data", "header", "raw")

    def __init__(self, raw: bytes, header: Header, data: bytes, values: Data | None = None) -> None:
        self.raw = raw
        self.header = header
        self.data = data
        self._values = values

    @property
    def place(self) -> bytes:
        """Its place in the outbox when it was last put there; whether it still waits there is the outbox's to say."""
        return self.raw[-PLACE_BYTES:]

    def move_to(self, place: bytes) -> None:
        """Stand at another place. Only for a draft, which nobody has put into a set or compared with another."""
        self.raw = self.raw[:-PLACE_BYTES] + place

    def placed(self, place: bytes) -> "Record":
        """The same at another place. That is not sealed: whoever changes only that need not seal the rest anew."""
        return Record(self.raw[:-PLACE_BYTES] + place, self.header, self.data, self._values)

    def split(self) -> Data:
        """The data's encoded values by key; none of them is decoded. Not to be changed: copy it first."""
        if self._values is None:
            self._values = split(self.data) if self.data else {}
        return self._values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and self.raw == other.raw

    def __hash__(self) -> int:
        return hash(self.raw)

    def __repr__(self) -> str:
        return f"<Record, version {self.header.version}>"


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long sessions live, in milliseconds. `absolute` None: no deadline that activity cannot move."""

    idle: int
    longterm: int
    absolute: int | None = None

    def idle_expiry(self, now: int, flags: int) -> int:
        """When a session last seen at `now` falls idle."""
        return now + (self.longterm if flags & LONGTERM else self.idle)

    def deadline(self, now: int) -> int:
        """The absolute deadline of a session that begins, or is logged in, at `now`."""
        return NEVER if self.absolute is None else now + self.absolute


class Changes(NamedTuple):
    """What a request did to a session, as bytes: merged into the record as it is when the commit happens.

    `expect` holds keys whose stored bytes must still be these (None: absent), or nothing is written.
    """

    set: Mapping[DataKey, bytes] = MappingProxyType({})
    deleted: Collection[DataKey] = ()
    cleared: bool = False
    touch: bool = False
    storable: bool | None = None
    longterm: bool | None = None
    expect: Mapping[DataKey, bytes | None] | None = None

    def __repr__(self) -> str:
        return f"<Changes of {len(self.set)} keys, {len(self.deleted)} deleted>"

    def merged(self, data: Data) -> Data:
        """`data` with these changes; `data` itself is left alone."""
        result = {} if self.cleared else dict(data)
        for key in self.deleted:
            result.pop(key, None)
        result.update(self.set)
        return result

    @property
    def is_touch(self) -> bool:
        """Whether all that happened is that somebody looked."""
        return not (self.set or self.deleted or self.cleared or self.storable is not None or self.longterm is not None)

    def changes_nothing_in(self, record: "Record") -> bool:
        """Whether every assigned value is the one that `record` has, and nothing else happened."""
        if self.touch or self.deleted or self.cleared or self.storable is not None or self.longterm is not None:
            return False
        data = record.split()
        for key, value in self.set.items():  # noqa: SIM110  # half the time of all()
            if data.get(key) != value:
                return False
        return True

    def fits(self, data: Data) -> bool:
        """Whether every expected value is still what it was."""
        return self.expect is None or all(data.get(key) == value for key, value in self.expect.items())


def pack_header(header: Header) -> bytes:
    """The header as it is stored."""
    return _LAYOUT.pack(*header)


def unpack_header(raw: bytes) -> Header:
    """The header of `raw`, unverified. Raises struct.error when `raw` is too short."""
    return Header._make(_LAYOUT.unpack_from(raw))


def join(data: Data) -> bytes:
    """A MessagePack map of key to encoded value."""
    return pack_plain(data)


def split(data: bytes) -> Data:
    """The map that `join` was given; the values stay encoded."""
    return msgpack.unpackb(data, raw=False, strict_map_key=False)  # type: ignore[no-any-return]


def _with(flags: int, flag: int, value: bool | None) -> int:
    if value is None:
        return flags
    return flags | flag if value else flags & ~flag


def first_header(
    now: int, boot: int, changes: Changes, lifetimes: Lifetimes, epoch: int, key_id: bytes, user_tag: bytes = NO_TAG
) -> Header:
    """The header of a session that begins now."""
    flags = AUTHENTICATED if user_tag != NO_TAG else 0
    flags = _with(flags, STORABLE, changes.storable is not False)
    flags = _with(flags, LONGTERM, changes.longterm)
    idle, absolute = lifetimes.idle_expiry(now, flags), lifetimes.deadline(now)
    return Header(FORMAT, flags, key_id, epoch, 1, now, now, idle, absolute, min(idle, absolute), boot, user_tag)


def watermark_header(now: int, boot: int, keep: int, epoch: int, key_id: bytes) -> Header:
    """The header of a watermark that is written now, and kept for at least `keep` milliseconds."""
    flags = TOMBSTONE | STORABLE | WATERMARK
    return Header(FORMAT, flags, key_id, epoch, 1, now, now, now + keep, NEVER, now, boot, NO_TAG)


def next_header(
    header: Header, now: int, boot: int, changes: Changes, lifetimes: Lifetimes, epoch: int, key_id: bytes
) -> Header:
    """The header after one more commit. A wall clock that went back moves no expiry forward, and no epoch back."""
    flags = header.flags
    if changes.storable is not None or changes.longterm is not None:
        flags = _with(_with(flags, STORABLE, changes.storable), LONGTERM, changes.longterm)
        withdrawn = not flags & STORABLE and bool(header.flags & (STORABLE | WITHDRAWN))
        flags = _with(flags, WITHDRAWN, withdrawn)
    last_seen, idle, horizon = header.last_seen, header.idle_expiry, header.horizon
    if changes.touch and now > last_seen:
        last_seen = now
    if last_seen != header.last_seen or flags != header.flags:
        idle = lifetimes.idle_expiry(last_seen, flags)
        horizon = max(horizon, min(idle, header.absolute))
    newest = epoch if epoch > header.epoch else header.epoch  # noqa: FURB136  # a fifth of max()'s time
    return Header(
        FORMAT, flags, key_id, newest, header.version + 1, header.created, last_seen, idle, header.absolute, horizon,
        boot, header.user_tag,
    )  # fmt: skip


def tombstone(header: Header, now: int, boot: int, keep: int, epoch: int, key_id: bytes, *, renewed: bool) -> Header:
    """The header that says "destroyed" and keeps saying it for at least `keep` milliseconds."""
    flags = header.flags & (STORABLE | WITHDRAWN | WATERMARK) | TOMBSTONE | (RENEWED if renewed else 0)
    return header._replace(
        format=FORMAT, flags=flags, key_id=key_id, epoch=epoch, version=header.version + 1, last_seen=now,
        idle_expiry=now + keep, absolute=NEVER, changed=boot, user_tag=NO_TAG,
    )  # fmt: skip
