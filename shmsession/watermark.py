"""The watermark of a user: all their sessions have ended whose login is not above it. Pure, like records."""

from typing import Final, NamedTuple

import msgpack

from .ids import watermark_of
from .record import AUTH_TIME_KEY, SPARED_KEY, USER_KEY, Data, Record, join, pack_plain

_BOOT_KEY: Final = SPARED_KEY


class Watermark(NamedTuple):
    """`user`: encoded. `moment`: of the wall clock, in milliseconds; `boot`: when it was written, by CLOCK_BOOTTIME."""

    user: bytes
    moment: int
    boot: int

    @classmethod
    def of(cls, record: Record) -> "Watermark":
        """What a record with the flag WATERMARK says."""
        data = record.split()
        return cls(data[USER_KEY], _number(data, AUTH_TIME_KEY), _number(data, _BOOT_KEY))

    @property
    def handle(self) -> bytes:
        """Under which it is kept."""
        return watermark_of(self.user)

    def packed(self) -> bytes:
        """As a record's data."""
        return join({USER_KEY: self.user, AUTH_TIME_KEY: pack_plain(self.moment), _BOOT_KEY: pack_plain(self.boot)})

    def ends(self, data: Data) -> bool:
        """Whether a session with this data has ended."""
        return data.get(USER_KEY) == self.user and max(auth_time(data), _number(data, SPARED_KEY)) <= self.moment


def auth_time(data: Data) -> int:
    """When a session's user was logged in, in milliseconds; 0 when that is unknown."""
    return _number(data, AUTH_TIME_KEY)


def _number(data: Data, key: int) -> int:
    """A number that the library keeps; 0 for none, and for what is none."""
    try:
        found = msgpack.unpackb(data.get(key, b""))
    except (ValueError, TypeError, msgpack.UnpackException):
        return 0
    return found if isinstance(found, int) else 0
