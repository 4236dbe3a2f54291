"""Records as rows of a backend, and back. A body is opaque there: the record's header and data, sealed on request."""

import struct
from typing import Final, NamedTuple

import msgpack
from cryptography.exceptions import InvalidTag

from .backends.base import FOREVER, Mark, Row, State
from .errors import BackendError, Unreadable
from .keyring import KEY_ID_BYTES, Keyring
from .memory.outbox import Dirty
from .memory.seal import TAIL_BYTES
from .record import FORMAT, HEADER_BYTES, KEY_ID_AT, NO_TAG, STORABLE, TOMBSTONE, Data, Header, split, unpack_header

_LIVE: Final = State.LIVE
_PLAIN: Final = b"\x00"
_SEALED: Final = b"\x01"
_YEAR_9999: Final = 253_370_764_800_000
_NO_KEY: Final = bytes(KEY_ID_BYTES)


class Loaded(NamedTuple):
    """A row's session."""

    header: Header
    data: bytes

    def values(self) -> Data:
        """The data's encoded values by key."""
        return split(self.data) if self.data else {}


class Rows:
    """Translates. `keyring`: seals bodies with AES-256-GCM for their handle; None: the database can read them."""

    def __init__(self, keyring: Keyring | None = None) -> None:
        self._keyring = keyring

    def row_of(self, dirty: Dirty) -> Row:
        """What a backend is sent."""
        handle, record = dirty
        header = record.header
        flags = header.flags
        horizon = header.horizon if header.horizon < FOREVER else FOREVER  # noqa: FURB136  # a fifth of min()'s time
        if flags & TOMBSTONE or not flags & STORABLE:
            state = State.DEAD if flags & TOMBSTONE else State.ERASED
            return Row(handle, state, header.epoch, header.version, horizon)
        user = b"" if header.user_tag == NO_TAG else header.user_tag
        raw = record.raw
        plain = raw[:KEY_ID_AT] + _NO_KEY + raw[KEY_ID_AT + KEY_ID_BYTES : -TAIL_BYTES]
        return Row(handle, _LIVE, header.epoch, header.version, horizon, user, self._close(handle, plain))

    def session_in(self, row: Row) -> Loaded:
        """What a LIVE row holds. Raises Unreadable for an unknown Key or a newer format, BackendError for junk."""
        plain = self._open(row.handle, row.body)
        try:
            header = unpack_header(plain)
        except struct.error:
            header = None
        if header is not None and header.format != FORMAT:
            raise Unreadable(f"a session was stored in format {header.format}: upgrade shmsession here too")
        if header is None or Mark(State.LIVE, header.epoch, header.version) != row.mark:
            raise BackendError(f"the row of session {row.handle.hex()} is damaged: destroy it, or restore it")
        data = plain[HEADER_BYTES:]
        if not _is_whole(header, data):
            raise BackendError(f"the row of session {row.handle.hex()} is damaged: destroy it, or restore it")
        return Loaded(header, data)

    def _close(self, handle: bytes, plain: bytes) -> bytes:
        if self._keyring is None:
            return _PLAIN + plain
        return _SEALED + self._keyring.newest_id + self._keyring.seal(plain, handle)

    def _open(self, handle: bytes, body: bytes) -> bytes:
        if body[:1] == _PLAIN:
            return body[1:]
        if body[:1] != _SEALED:
            raise BackendError(f"the row of session {handle.hex()} is damaged: destroy it, or restore it")
        key_id = body[1 : 1 + KEY_ID_BYTES]
        if self._keyring is None or key_id not in self._keyring:
            raise Unreadable(
                "a session was stored under a database Key that this process does not have: add it to database_keys"
            )
        try:
            return self._keyring.unseal(key_id, body[1 + KEY_ID_BYTES :], handle)
        except InvalidTag:
            raise BackendError(f"the row of session {handle.hex()} is not what was stored there: restore it") from None


def _is_whole(header: Header, data: bytes) -> bool:
    """Whether there are values by key, and times that a clock can show."""
    try:
        values: object = split(data) if data else {}
    except (ValueError, TypeError, msgpack.UnpackException):
        return False
    times = (header.created, header.last_seen, header.idle_expiry)
    return isinstance(values, dict) and max(times) < _YEAR_9999 and all(type(v) is bytes for v in values.values())
