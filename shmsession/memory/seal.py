"""Records sealed for their handle: bytes that no other process wrote are noticed before they are believed."""

import struct
from hmac import compare_digest
from typing import Final

from shmsession.errors import Unreadable
from shmsession.keyring import MAC_BYTES, Keyring
from shmsession.record import (
    FORMAT,
    HEADER_BYTES,
    NO_PLACE,
    PLACE_BYTES,
    Data,
    Header,
    Record,
    pack_header,
    unpack_header,
)

TAIL_BYTES: Final = MAC_BYTES + PLACE_BYTES
SHORTEST: Final = HEADER_BYTES + TAIL_BYTES

VERIFIED_RECORDS: Final = 1024
VERIFIED_BYTES: Final = 4096
"""So many records, none larger, are remembered as verified: bytes that equal verified ones need no second look."""


class RecordSeal:
    """header + data + MAC + place in the outbox. The MAC, keyed BLAKE2b-128, is over handle, header and data only."""

    def __init__(self, keyring: Keyring) -> None:
        self._keyring = keyring
        self._mac = keyring.mac
        self.key_id = keyring.newest_id
        self._verified: dict[bytes, Record] = {}

    def close(
        self, handle: bytes, header: Header, data: bytes, values: Data | None = None, place: bytes = NO_PLACE
    ) -> Record:
        """The record to store. `header.key_id` must be the newest Key's; `values` what `data` splits into, if known."""
        body = pack_header(header) + data
        raw = body + self._mac(header.key_id, handle + body) + place
        return self._remember(handle, Record(raw, header, data, values))

    def placed(self, handle: bytes, record: Record, place: bytes) -> Record:
        """The record at another place, remembered as verified."""
        return self._remember(handle, record.placed(place))

    def open(self, handle: bytes, raw: bytes) -> Record | None:
        """The record in stored bytes; None when they are corrupt.

        Raises Unreadable for an unknown Key or a newer format: another generation of this program wrote it.
        """
        known = self._verified.get(handle)
        if known is not None and known.raw == raw:
            return known
        record = self._verify(handle, raw)
        return None if record is None else self._remember(handle, record)

    def open_in_passing(self, handle: bytes, raw: bytes) -> Record | None:
        """The same, for whoever goes through them all: what is often asked for stays remembered instead."""
        known = self._verified.get(handle)
        return known if known is not None and known.raw == raw else self._verify(handle, raw)

    def _verify(self, handle: bytes, raw: bytes) -> Record | None:
        try:
            header = unpack_header(raw)
        except struct.error:
            return None
        if len(raw) < SHORTEST:
            return None
        if header.format != FORMAT or header.key_id not in self._keyring:
            raise Unreadable(
                f"a session was stored in format {header.format} under Key {header.key_id.hex()}, which this process "
                "does not have: keep the older Key in SHMSESSION_KEY until its sessions have ended"
            )
        if not compare_digest(self._mac(header.key_id, handle + raw[:-TAIL_BYTES]), raw[-TAIL_BYTES:-PLACE_BYTES]):
            return None
        return Record(raw, header, raw[HEADER_BYTES:-TAIL_BYTES])

    def readable(self, handle: bytes, raw: bytes) -> Record | None:
        """The record in stored bytes; None when they are corrupt, or for others to read."""
        try:
            return self.open(handle, raw)
        except Unreadable:
            return None

    def header(self, handle: bytes, raw: bytes) -> Header | None:
        """The header of whole or unreadable bytes, None for corrupt ones."""
        try:
            record = self.open(handle, raw)
        except Unreadable:
            return unpack_header(raw)
        return None if record is None else record.header

    def forget(self) -> None:
        """Remember no record as verified."""
        self._verified.clear()

    def _remember(self, handle: bytes, record: Record) -> Record:
        if len(record.raw) <= VERIFIED_BYTES:
            if len(self._verified) >= VERIFIED_RECORDS:
                self._verified.clear()
            self._verified[handle] = record
        return record
