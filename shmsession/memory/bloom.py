"""Which handles a backend may have: a Bloom filter in a mapped file beside the environment, for all processes of a
store.

A slot is a whole byte, so that whoever adds needs no lock. A handle is added after its commit and before its token
leaves, and whoever fills the filter anew reads all of memory after it was emptied: so none is missing once it is ready.
"""

import mmap
import os
from hashlib import blake2b
from pathlib import Path
from typing import Final

from shmsession.errors import StoreFull

from . import place

SLOTS_PER_HANDLE: Final = 16
"""With five slots set for each, one in 700 unknown handles passes for known when the filter is full."""
SMALLEST: Final = 1 << 16

_HEADER_BYTES: Final = 4096
_SLOTS, _ADDED, _FILLING = 0, 1, 4
_READY_AT, _READY_BYTES = 16, 16
_PIECES: Final = 5


class BloomFilter:
    """The filter of one store in this process. Raises UnsafeStore when the file is not our own."""

    def __init__(self, path: Path, directory: int) -> None:
        self._path = path
        self._descriptor = place.open_file(path / "bloom", directory, create=True)
        size = os.fstat(self._descriptor).st_size
        if size < _HEADER_BYTES:
            place.give(self._descriptor, _HEADER_BYTES)
        self._map = mmap.mmap(self._descriptor, 0)

    def _word(self, number: int) -> int:
        return int.from_bytes(self._map[number * 8 : number * 8 + 8], "little")

    def _set_word(self, number: int, value: int) -> None:
        self._map[number * 8 : number * 8 + 8] = value.to_bytes(8, "little")

    def _reach(self) -> int:
        """How many slots there are, all mapped here; 0 before it was made, and when what is said of them cannot be."""
        slots = self._word(_SLOTS)
        if slots & (slots - 1) or os.fstat(self._descriptor).st_size < _HEADER_BYTES + slots:
            return 0
        if len(self._map) < _HEADER_BYTES + slots:
            # The small one is left to whoever reads it just now.
            self._map = mmap.mmap(self._descriptor, _HEADER_BYTES + slots)
        return slots

    @property
    def capacity(self) -> int:
        """How many handles it was made for; 0 before it was made."""
        return self._reach() // SLOTS_PER_HANDLE

    @property
    def is_crowded(self) -> bool:
        """Whether more were added than it was made for."""
        return self._word(_ADDED) > self.capacity

    def is_ready(self, token: bytes) -> bool:
        """Whether it holds all that a backend may have; `token` says in which state of things."""
        return self._map[_READY_AT : _READY_AT + _READY_BYTES] == self._sealed(token)

    def _sealed(self, token: bytes) -> bytes:
        """For this size only: with another one the slots of a handle are others."""
        return blake2b(token + self._map[:8], digest_size=_READY_BYTES, person=b"shmsession bloom").digest()

    def make_ready(self, token: bytes) -> None:
        """Say that it holds all."""
        self._map[_READY_AT : _READY_AT + _READY_BYTES] = self._sealed(token)

    def take_back(self) -> None:
        """Say that it does not."""
        self._map[_READY_AT : _READY_AT + _READY_BYTES] = bytes(_READY_BYTES)

    @property
    def filling(self) -> int:
        """Which filling this is: a token that does not depend on it would let somebody who was overtaken while they
        filled it say that it is ready, when another has emptied it since."""
        return self._word(_FILLING)

    def empty(self, handles: int) -> None:
        """Begin another filling, with room for so many at least; it is not ready then. Raises StoreFull."""
        self.take_back()
        self._set_word(_FILLING, int.from_bytes(os.urandom(8), "little"))
        slots = SLOTS_PER_HANDLE * SMALLEST
        while slots < SLOTS_PER_HANDLE * handles:
            slots *= 2
        slots = max(slots, self._reach())  # it never shrinks: others have it mapped
        try:
            place.give(self._descriptor, _HEADER_BYTES + slots)
        except OSError as error:
            raise StoreFull(f"no room for {slots >> 20} MiB in {self._path}: all unknown ids are looked for") from error
        self._set_word(_SLOTS, slots)
        self._set_word(_ADDED, 0)
        self._reach()
        for begin in range(_HEADER_BYTES, _HEADER_BYTES + slots, 1 << 20):
            end = min(begin + (1 << 20), _HEADER_BYTES + slots)
            self._map[begin:end] = bytes(end - begin)

    def _places(self, handle: bytes) -> list[int]:
        """Where a handle's slots are: it is a hash, so its parts are as good as hashes of their own."""
        slots = self._reach()
        mask = slots - 1
        parts = (int.from_bytes(handle[at : at + 4], "little") for at in range(0, 4 * _PIECES, 4))
        return [_HEADER_BYTES + (part & mask) for part in parts] if slots else []

    def add(self, handle: bytes) -> None:
        """The backend may have it from now on."""
        places = self._places(handle)
        if all(self._map[at] for at in places):
            return
        for at in places:
            self._map[at] = 1
        self._set_word(_ADDED, self._word(_ADDED) + 1)

    def has(self, handle: bytes) -> bool:
        """Whether it may have been added. Ask `is_ready` before and after."""
        return all(self._map[at] for at in self._places(handle))

    def close(self) -> None:
        """Let go of the file."""
        self._map.close()
        os.close(self._descriptor)
