"""Numbers that all processes of a store count together, in a mapped file beside the environment.

Each process adds in a slot of its own, which it holds by a lock that dies with it; whoever comes next goes on from the
numbers that stand there. So nothing is ever lost, reset or counted twice, and nobody waits.
"""

import fcntl
import mmap
import os
import threading
from pathlib import Path
from typing import Final

from . import place

NAMES: Final = (
    "hits", "misses", "batches", "rows", "flush_errors", "load_errors", "evicted", "retired", "dropped", "late",
    "spared",
)  # fmt: skip
"""hits, misses: sessions that a request asked for, found in memory or looked for in the backend. batches, rows: sent to
the backend. flush_errors, load_errors: what it answered with an error, or not. evicted: sessions removed from memory to
make room. retired: those that were idle there, and that the backend has. dropped: commits of sessions that had ended.
late: waits for the backend that were given up. spared: look-ups of ids that somebody made up, with plain tokens."""

_SLOTS: Final = 512
_WORDS: Final = 16
_SLOT_BYTES: Final = _WORDS * 8


class Counters:
    """The counters of one store in this process. Raises UnsafeStore when the file is not our own."""

    def __init__(self, path: Path, directory: int) -> None:
        self._descriptor = place.open_file(path / "counters", directory, create=True)
        place.give(self._descriptor, _SLOTS * _SLOT_BYTES)
        self._map = mmap.mmap(self._descriptor, _SLOTS * _SLOT_BYTES)
        self._words = memoryview(self._map).cast("Q")
        self._adding = threading.Lock()
        self._begin = self._claim() * _WORDS

    def _claim(self) -> int:
        for slot in range(_SLOTS - 1):
            try:
                fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, _SLOT_BYTES, slot * _SLOT_BYTES)
            except OSError:
                continue
            return slot
        return _SLOTS - 1  # hundreds of processes share the last one, and may miscount there

    def add(self, name: str, count: int = 1) -> None:
        """Count `count` more."""
        index = self._begin + _INDEX[name]
        with self._adding:
            try:  # noqa: SIM105  # a third of the time of contextlib.suppress
                self._words[index] += count
            except ValueError:  # closed by another thread meanwhile
                pass

    def totals(self) -> dict[str, int]:
        """What all processes have counted, those that ended included."""
        return {
            name: sum(self._words[slot * _WORDS + index] for slot in range(_SLOTS)) for name, index in _INDEX.items()
        }

    def close(self) -> None:
        """Leave the slot to others; what was counted stays.

        All of it goes now: a lock of this kind ends with any descriptor of the file, the one inside the map included.
        """
        with self._adding:
            self._words.release()
            self._map.close()
            os.close(self._descriptor)


_INDEX: Final = {name: index for index, name in enumerate(NAMES)}
