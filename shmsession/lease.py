"""The right to be this host's flusher: a row in the memory store, kept by a heartbeat.

Whoever holds it and falls silent (killed, stopped or starved alike) loses it to the first that looks. For a moment two
may think that they hold it; that costs a backend work, and nothing else.
"""

import os
import struct
from typing import Final

from .clock import Clock
from .memory.environment import Environment
from .memory.tables import Tables, Txn

BEAT_MS: Final = 500
SILENCE_MS: Final = 1_500

_ROW = struct.Struct(">Q16sQQ")


class Lease:
    """One candidate for the lease of a memory store."""

    def __init__(self, environment: Environment, clock: Clock) -> None:
        self._environment = environment
        self._clock = clock
        self._me = os.urandom(16)

    def take(self) -> bool:
        """Whether this candidate holds the lease, from now or still. Call it every BEAT_MS. Raises StoreError."""
        row = self._environment.read(_row)
        boot = self._clock.boot()
        if row is not None:
            _, holder, _, beat = row
            if holder == self._me and beat <= boot < beat + BEAT_MS // 2:
                return True
            if holder != self._me and beat <= boot < beat + SILENCE_MS:
                return False

        def work(txn: Txn, tables: Tables) -> bool:
            if _row(txn, tables) != row:
                return False
            term, holder, _, _ = row or (0, b"", 0, 0)
            new = _ROW.pack(term + (holder != self._me), self._me, os.getpid(), boot)
            txn.put(b"lease", new, db=tables.meta)
            return True

        return self._environment.write(work)

    def release(self) -> None:
        """Let go of it, if this candidate holds it: another need not wait for the silence."""

        def work(txn: Txn, tables: Tables) -> None:
            row = _row(txn, tables)
            if row is not None and row[1] == self._me:
                txn.put(b"lease", _ROW.pack(row[0], bytes(16), 0, 0), db=tables.meta)

        self._environment.write(work)

    def holder(self) -> tuple[int, int] | None:
        """(term, pid) of whoever took it last; None when nobody ever did, or it was released."""
        row = self._environment.read(_row)
        return (row[0], row[2]) if row is not None and row[2] else None


def _row(txn: Txn, tables: Tables) -> tuple[int, bytes, int, int] | None:
    raw = txn.get(b"lease", db=tables.meta)
    return _ROW.unpack(raw) if raw is not None and len(raw) == _ROW.size else None
