"""Numbers by which a process tells that what it remembers was cleared, by whatever process: a mapped file beside the
environment.

Each is a random word that is replaced by another; nobody reads it to write it, so nobody waits, and none is lost.
"""

import mmap
import os
from pathlib import Path
from typing import Final

from . import place

WORDS: Final = 512
ALL: Final = 0
"""The word of everything; the others are for a share each."""

_WORD_BYTES: Final = 8


class Generations:
    """The words of one store. Raises UnsafeStore when the file is not our own. To be made behind the gate."""

    def __init__(self, path: Path, directory: int) -> None:
        descriptor = place.open_file(path / "generations", directory, create=True)
        try:
            place.give(descriptor, WORDS * _WORD_BYTES)
            words = memoryview(mmap.mmap(descriptor, WORDS * _WORD_BYTES))
        finally:
            os.close(descriptor)
        self.words = words.cast("Q")
        if not self.words[ALL]:  # a new file: what was remembered under another is not to be taken for its own
            self.clear(ALL)

    def clear(self, index: int) -> None:
        """What was remembered under this word is worth nothing from now on, in all processes."""
        self.words[index] = int.from_bytes(os.urandom(_WORD_BYTES), "little") | 1


def index_of(tag: bytes) -> int:
    """Which word belongs to a tag of 8 bytes: never that of everything. Several tags share one."""
    return 1 + int.from_bytes(tag, "big") % (WORDS - 1)
