"""Live sessions: whoever follows one is told what others change in it, and that it ended.

Nobody sends anything. Each event loop on which somebody waits looks a few times a second whether there was a commit at
all, and only then at the sessions that are waited for, in one snapshot of memory. No database is asked.
"""

import asyncio
from collections.abc import Mapping
from contextvars import Context
from typing import Final, Self
from weakref import WeakKeyDictionary

from .clock import Clock
from .errors import StoreError
from .ids import watermark_of
from .memory.snapshots import Stamp, raws_of
from .memory.store import MemoryStore, Missing
from .record import NEVER, STORABLE, USER_KEY, Record
from .session import Ending, Session

LOOK_SECONDS: Final = 0.25
BLIND_MS: Final = 30_000
"""Tombstones stay for a minute: who has not looked for longer than this may have missed one."""

_ENDINGS: Final[dict[Missing, Ending]] = {
    Missing.DEAD: "destroyed", Missing.RENEWED: "renewed", Missing.EXPIRED: "expired", Missing.UNKNOWN: "lost",
}  # fmt: skip


class Live:
    """Follows the sessions of one memory store. `backend`: whether there is one that has what leaves memory."""

    def __init__(self, memory: MemoryStore, clock: Clock, *, backend: bool) -> None:
        self.memory = memory
        self.clock = clock
        self.backend = backend
        self._watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, Watcher] = WeakKeyDictionary()

    @property
    def watcher(self) -> "Watcher":
        """That of the event loop that runs."""
        return self._watchers.setdefault(asyncio.get_running_loop(), Watcher(self.memory, self.clock))


class Following:
    """See `Session.changes`. Whoever gives up waiting for the next may wait for it again: nothing is lost."""

    def __init__(self, live: Live, session: Session) -> None:
        self._live = live
        self._session = session
        self._follower = session.follow()
        self._looked = live.clock.boot()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> frozenset[str]:
        live, session = self._live, self._session
        while (handle := session.raw_handle) is not None and not live.memory.closed:
            known = self._stored(handle)
            found = self._find(handle, known[handle])
            if not isinstance(found, Record):
                session.end(found)
                break
            if session.record is None or session.gone:
                break
            keys = session.catch_up(found, self._follower)
            if keys is not None:
                return keys
            self._looked = await live.watcher.changed(known, found.header.expires)
        raise StopAsyncIteration

    def _stored(self, handle: bytes) -> dict[bytes, bytes | None]:
        """What is stored under the handle; when nothing is, also the user's watermark, which ends what is not there."""
        get, last = self._live.memory.environment.get, self._session.record
        raw, user = get(handle), None if last is None else last.split().get(USER_KEY)
        if raw is not None or user is None:
            return {handle: raw}
        return {handle: raw, watermark_of(user): get(watermark_of(user))}

    def _find(self, handle: bytes, raw: bytes | None) -> Record | Ending:
        """The record as it is now, or how the session ended."""
        live, last, now, boot = self._live, self._session.record, self._live.clock.now(), self._live.clock.boot()
        is_blind, self._looked = boot - self._looked > BLIND_MS, boot
        found = live.memory.judge(handle, raw, now)
        if isinstance(found, Record):
            return found
        if found is Missing.UNKNOWN and last is not None:
            if now >= last.header.expires:
                return "expired"
            if raw is None and live.backend and last.header.flags & STORABLE and not is_blind:
                # It was idle, and left memory: whoever changes or ends it alone brings it back.
                return "destroyed" if live.memory.users.has_revoked(last) else last
        return _ENDINGS[found]


class Watcher:
    """Looks at the sessions that are waited for on one event loop, and at nothing while nobody waits."""

    def __init__(self, memory: MemoryStore, clock: Clock) -> None:
        self._memory = memory
        self._clock = clock
        self._waiting: dict[bytes, dict[asyncio.Future[int], tuple[bytes | None, int]]] = {}
        self._stamp: Stamp | None = None
        self._soonest = NEVER
        """When the first of them expires."""
        self._looks = False
        self._looked = 0
        self._context = Context()
        """Not that of the request which happened to be the first."""

    async def changed(self, known: Mapping[bytes, bytes | None], until: int) -> int:
        """Wait until another thing is stored under one of these handles than is known, or it is `until`, by wall clock.

        It may return before. Returns at which boot time somebody last looked in vain. Raises StoreError.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        for handle, raw in known.items():
            self._waiting.setdefault(handle, {})[future] = raw, until
        self._soonest = min(self._soonest, until)
        if not self._looks:
            self._looks, self._looked = True, self._clock.boot()
            self._look_later()
        try:
            return await future
        finally:
            for handle in known:
                self._waiting[handle].pop(future)
                if not self._waiting[handle]:
                    del self._waiting[handle]

    def _look_later(self) -> None:
        asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look, context=self._context)

    def _look(self) -> None:
        if not self._waiting:
            self._looks = False
            return
        self._look_later()
        before, self._looked = self._looked, self._clock.boot()
        if self._memory.closed or self._looked - before > BLIND_MS:
            self._wake_all(before)
            return
        try:
            self._compare(before)
        except StoreError as error:
            self._wake_all(error)

    def _compare(self, before: int) -> None:
        """Wake those whose wait is over."""
        now = self._clock.now()
        since = self._stamp if now < self._soonest else None
        self._stamp, raws = raws_of(self._memory.environment, self._waiting, since)
        if raws is None:
            return
        self._soonest = NEVER
        for waiting, raw in zip(self._waiting.values(), raws, strict=True):
            for future, (known, until) in waiting.items():
                if raw != known or now >= until:
                    _wake(future, before)
                else:
                    self._soonest = min(self._soonest, until)

    def _wake_all(self, result: int | StoreError) -> None:
        for waiting in self._waiting.values():
            for future in waiting:
                _wake(future, result)


def _wake(future: "asyncio.Future[int]", result: int | StoreError) -> None:
    if future.done():
        return
    if isinstance(result, StoreError):
        future.set_exception(result)
    else:
        future.set_result(result)
