"""Which handles a backend may have: a Bloom filter (Bloom, 1970) in a mapped file beside the environment, for all
processes of a store.

Each filling has a file of its own, which takes the place of the one before when it is empty: nobody who was overtaken
can spoil it. A slot is a whole byte, so that whoever adds needs no lock. A handle is added after its commit and before
its token leaves, and whoever fills a file reads all of memory after it got its place: so none is missing once that is
ready.
"""

import mmap
import os
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Final

from shmsession.errors import StoreFull

from . import place

SLOTS_PER_HANDLE: Final = 16
"""With five slots set for each, one in 700 unknown handles passes for known when the filter is full."""
SMALLEST: Final = 1 << 16

_HEADER_BYTES: Final = 4096
_READY_BYTES: Final = 16
_ADDED: Final = slice(16, 24)
_PIECES: Final = 5


class Slots:
    """One file, mapped. It is as large as it was made; of one that is not, nothing is believed."""

    def __init__(self, descriptor: int) -> None:
        info = os.fstat(descriptor)
        self.identity = identity_of(info)
        count = info.st_size - _HEADER_BYTES
        self._count = count if count > 0 and not count & (count - 1) else 0
        self._map = mmap.mmap(descriptor, info.st_size) if self._count else mmap.mmap(-1, _HEADER_BYTES)

    @property
    def capacity(self) -> int:
        """How many handles it was made for."""
        return self._count // SLOTS_PER_HANDLE

    @property
    def is_crowded(self) -> bool:
        """Whether more were added than it was made for."""
        return int.from_bytes(self._map[_ADDED], "little") > self.capacity

    def is_ready(self, token: bytes) -> bool:
        """Whether it holds all that a backend may have; `token` says in which state of things."""
        return self._count > 0 and self._map[:_READY_BYTES] == self._sealed(token)

    def make_ready(self, token: bytes) -> None:
        """Say that it holds all."""
        self._map[:_READY_BYTES] = self._sealed(token)

    def _sealed(self, token: bytes) -> bytes:
        """For this size only: with another one the slots of a handle are others."""
        size = self._count.to_bytes(8, "little")
        return blake2b(token + size, digest_size=_READY_BYTES, person=b"shmsession bloom").digest()

    def _places(self, handle: bytes) -> list[int]:
        """Where a handle's slots are: it is a hash, so its parts are as good as hashes of their own."""
        mask = self._count - 1
        parts = (int.from_bytes(handle[at : at + 4], "little") for at in range(0, 4 * _PIECES, 4))
        return [_HEADER_BYTES + (part & mask) for part in parts] if self._count else []

    def add(self, handle: bytes) -> None:
        """The backend may have it from now on."""
        places = self._places(handle)
        if all(self._map[at] for at in places):
            return
        for at in places:
            self._map[at] = 1
        self._map[_ADDED] = (int.from_bytes(self._map[_ADDED], "little") + 1).to_bytes(8, "little")

    def has(self, handle: bytes) -> bool:
        """Whether it may have been added. Ask `is_ready` before."""
        return all(self._map[at] for at in self._places(handle))


class BloomFilter:
    """The filter of the store in this directory, as this process sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path / "bloom"
        self._slots: Slots | None = None

    def current(self) -> Slots | None:
        """The filling that is there now; None without one. Raises OSError, UnsafeStore when it cannot be read."""
        try:
            info = self._path.lstat()
        except FileNotFoundError:
            return None
        slots = self._slots
        if slots is None or slots.identity != identity_of(info):
            with suppress(FileNotFoundError):  # it has just been removed
                self._slots = slots = self._open()
        return slots

    def _open(self) -> Slots:
        directory = place.open_directory(self._path.parent)
        try:
            descriptor = place.open_file(self._path, directory)
            try:
                return Slots(descriptor)
            finally:
                os.close(descriptor)
        finally:
            os.close(directory)

    def begin(self, handles: int) -> Slots:
        """Put an empty filling in place, with room for so many at least; it is not ready. Raises StoreFull."""
        slots = SLOTS_PER_HANDLE * SMALLEST
        while slots < SLOTS_PER_HANDLE * handles:
            slots *= 2
        new = self._path.with_suffix(".new")
        directory = place.open_directory(self._path.parent)
        try:
            with place.gate(directory):
                new.unlink(missing_ok=True)
                descriptor = place.open_file(new, directory, create=True)
                try:
                    place.give(descriptor, _HEADER_BYTES + slots)
                    begun = Slots(descriptor)
                    new.rename(self._path)
                finally:
                    os.close(descriptor)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise StoreFull(f"no room for {slots >> 20} MiB in {self._path}: all unknown ids are looked for") from error
        finally:
            os.close(directory)
        return begun

    def remove(self) -> None:
        """Without it everything may be known to the backend. Raises OSError."""
        self._path.unlink(missing_ok=True)


def identity_of(info: os.stat_result) -> tuple[int, int, int]:
    """What tells one file from another, and from itself when somebody has cut it."""
    return info.st_dev, info.st_ino, info.st_size
