"""Sparing the backend: with plain tokens anybody can make up ids, and most of them need not be looked for.

A filter in shared memory knows every session that the backend may have. It holds as long as nobody else writes there,
the backend loses nothing, and memory lives: otherwise it is filled anew, and until then every unknown id is looked for.
"""

import asyncio
import contextlib
from typing import Final

from .backends.base import Backend
from .clock import Clock
from .errors import StoreError
from .memory.bloom import Slots
from .memory.store import MemoryStore
from .sentinel import NEIGHBOUR_MS

CHUNK: Final = 1_000
REFRESH_MS: Final = 3_600_000
"""How often what the backend has is added again, for rows that somebody else has put there."""
RETRY_MS: Final = 60_000
"""How long it is left as it is when it could not be filled."""
VOUCHED_MS: Final = NEIGHBOUR_MS - 2_000
"""So long after the last look at the backend no other store can have taken it over."""


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
        bloom = self._environment.bloom
        try:
            slots = bloom.current()
            if slots is not None:
                slots.add(handle)
        except (OSError, StoreError):  # what cannot hold it must not be asked
            with contextlib.suppress(OSError):
                bloom.remove()

    def lacks(self, handle: bytes) -> bool:
        """Whether the backend cannot have it."""
        if not self.wanted:
            return False
        try:
            boot, vouched = self._clock.boot(), self._environment.vouched
            token, slots = self._token(), self._environment.bloom.current()
        except (OSError, StoreError):
            return False
        vouched_for = vouched <= boot < vouched + VOUCHED_MS
        return vouched_for and slots is not None and slots.is_ready(token) and not slots.has(handle)

    def _token(self) -> bytes:
        """What a filling holds for: this incarnation of memory, and so many losses of the backend."""
        return self._environment.uuid + self._memory.outbox.losses().to_bytes(8, "big")

    async def refresh(self) -> None:
        """Fill the filter when it is not ready, crowded or an hour old. For whoever holds the lease.

        Raises what the backend raises; then it is not tried again for a minute.
        """
        boot = self._clock.boot()
        if not self.wanted or boot < self._not_before:
            return
        slots = self._environment.bloom.current()
        if slots is None or slots.is_crowded or not slots.is_ready(self._token()):
            self._not_before = boot + RETRY_MS
            slots = self._environment.bloom.begin(2 * (await self._backend.count() + self._memory.count()))
        elif boot < self._next:
            return
        self._not_before = boot + RETRY_MS
        token = self._token()
        await self._add_memory(slots)
        async for handle in self._backend.handles():
            slots.add(handle)
        slots.make_ready(token)
        self._next, self._not_before = self._clock.boot() + REFRESH_MS, 0

    async def _add_memory(self, slots: Slots) -> None:
        after = b""
        while handles := self._memory.outbox.handles(after, CHUNK):
            for handle in handles:
                slots.add(handle)
            after = handles[-1]
            await asyncio.sleep(0)
