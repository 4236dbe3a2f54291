"""Sparing the backend: with plain tokens anybody can make up ids, and most of them need not be looked for.

A filter in shared memory knows every session that the backend may have. It holds as long as nobody else writes there,
the backend loses nothing, and memory lives: otherwise it is filled anew, and until then every unknown id is looked for.
"""

import asyncio
import contextlib
from typing import Final

from .backends.base import Backend
from .clock import Clock
from .memory.store import MemoryStore

ATTEMPTS: Final = 3
CHUNK: Final = 1_000
REFRESH_MS: Final = 3_600_000
"""How often what the backend has is added again, for rows that somebody else has put there."""
RETRY_MS: Final = 60_000
"""How long it is left as it is when it could not be filled."""


class IdFilter:
    """One process's view of the filter. `wanted`: whether plain tokens are accepted, and nobody else writes there."""

    def __init__(self, memory: MemoryStore, backend: Backend, clock: Clock, *, wanted: bool) -> None:
        self._memory = memory
        self._environment = memory.environment
        self._backend = backend
        self._clock = clock
        self.wanted = wanted
        self._next = 0
        self._not_before = 0

    def note(self, handle: bytes) -> None:
        """This session, which is committed, may become known to somebody."""
        if not self.wanted:
            return
        for _ in range(ATTEMPTS):
            with contextlib.suppress(ValueError):  # another thread closed the store: it is opened again
                self._environment.bloom.add(handle)
                return
        self._environment.bloom.take_back()

    def lacks(self, handle: bytes) -> bool:
        """Whether the backend cannot have it."""
        if not self.wanted:
            return False
        try:
            bloom, token = self._environment.bloom, self._token()
            return bloom.is_ready(token) and not bloom.has(handle) and bloom.is_ready(token)
        except ValueError:  # another thread closed the store
            return False

    def _token(self) -> bytes:
        """What it holds for: this filling of it, this incarnation of memory, and so many losses of the backend."""
        numbers = self._environment.bloom.filling, self._memory.outbox.losses()
        return self._environment.uuid + b"".join(number.to_bytes(8, "big") for number in numbers)

    async def refresh(self) -> None:
        """Fill the filter when it is not ready, crowded or an hour old. For whoever holds the lease.

        Raises what the backend raises; then it is not tried again for a minute.
        """
        boot = self._clock.boot()
        if not self.wanted or boot < self._not_before:
            return
        bloom = self._environment.bloom
        ready = bloom.is_ready(self._token()) and not bloom.is_crowded
        if ready and boot < self._next:
            return
        self._not_before = boot + RETRY_MS
        if not ready:
            bloom.empty(2 * (await self._backend.count() + self._memory.count()))
        token = self._token()
        await self._add_memory()
        async for handle in self._backend.handles():
            self.note(handle)
        self._environment.bloom.make_ready(token)
        self._next, self._not_before = self._clock.boot() + REFRESH_MS, 0

    async def _add_memory(self) -> None:
        after = b""
        while handles := self._memory.outbox.handles(after, CHUNK):
            for handle in handles:
                self.note(handle)
            after = handles[-1]
            await asyncio.sleep(0)
