"""What stands behind the memory store in one process: the backend, a flusher, and loads of what memory lacks."""

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Final, TypeVar

from ._portal import Portal
from .backends.base import Backend, Row, State
from .backends.copying import copy
from .clock import Clock
from .errors import BackendError, BackendUnavailable, ShmSessionError, StoreError, StoreFull
from .flusher import Flusher
from .id_filter import IdFilter
from .ids import tag_of
from .memory.doorbell import Doorbell
from .memory.store import STALE_FILL_MS, MemoryStore, Missing
from .record import USER_KEY, Record
from .rows import Loaded, Rows
from .signalling import is_down, ring, take_down
from .telling import Telling

logger = logging.getLogger("shmsession")

T = TypeVar("T")

MISSING_MS: Final = 5_000
"""So long a handle that the backend does not have is not asked for again. Less than memory keeps what it learns."""
MISSING_HANDLES: Final = 4_096
OPEN_SECONDS: Final = 10.0
STOP_SECONDS: Final = 1.0
"""How often what is to end is told so."""
REOPEN_SECONDS: Final = 1.0
"""How often a backend that cannot be opened is tried again."""
POLL_SECONDS: Final = (0.0005, 0.01)


class Behind:
    """One process's part. Nothing runs before `start` or the first load; after `close` it is gone for good."""

    def __init__(
        self, memory: MemoryStore, backend: Backend, rows: Rows, clock: Clock, make_flusher: Callable[[], Flusher],
        *, load_seconds: float, id_filter: IdFilter | None = None,
    ) -> None:  # fmt: skip
        self._memory = memory
        self._environment = memory.environment
        self._backend = backend
        self._rows = rows
        self._clock = clock
        self._make_flusher = make_flusher
        self._load_seconds = load_seconds
        self.id_filter = id_filter or IdFilter(memory, backend, clock, wanted=False)
        self._bell = Doorbell(memory.environment.path)
        self._starting = threading.Lock()
        self._portal: Portal | None = None
        self._opening: asyncio.Task[None] | None = None
        self._flushing: asyncio.Task[None] | None = None
        self.flushes = False
        """Whether a candidate for the lease runs here."""
        self._loads: dict[bytes, asyncio.Task[Record | Missing]] = {}
        self._missing: dict[bytes, int] = {}
        self._telling = Telling()
        self.pid = os.getpid()
        self._closed = False

    # ── life ──────────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> None:
        """Run a candidate for the lease here from now on, with the backend open, unless that is down.

        Then it is tried again by itself, for as long as it takes. Raises ConfigError, StoreError.
        """
        with contextlib.suppress(BackendError):  # the candidate meets it too, and says so
            self._there().wait(self._ready())
        self.start()

    def start(self) -> None:
        """The same, without waiting for the backend. Raises StoreError."""
        portal = self._there()
        with self._starting:
            if not (self.flushes or self._closed):
                portal.wait(self._begin())
                self.flushes = True

    async def _begin(self) -> None:
        self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        telling = Telling()
        while True:
            try:
                await self._ready()
                break
            except ShmSessionError as error:
                telling.tell(f"this process does not flush its sessions yet: {error}")
            await asyncio.sleep(REOPEN_SECONDS)
        await self._make_flusher().run()

    def see_to_it(self) -> None:
        """`start`, where something was committed, if nothing has; what keeps it from that is logged."""
        if self.flushes:
            return
        try:
            self.start()
        except ShmSessionError as error:
            logger.warning("this process does not flush its sessions: %s", error)

    def _there(self) -> Portal:
        """Where the backend is used."""
        portal = self._portal
        if portal is not None and portal.is_here:  # before the lock: whoever has it may wait for this very thread
            raise StoreError("a hook of the flusher cannot wait for the backend: do it in another thread")
        with self._starting:
            if self._closed:
                raise StoreError("this store has been closed")
            if self._portal is None:
                self._portal = Portal()
            return self._portal

    async def _ready(self) -> None:
        """Until the backend is open; an attempt is everybody's who waits for it. Raises BackendError, ConfigError."""
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(self._tried)
        await asyncio.shield(self._opening)

    def _tried(self, opening: "asyncio.Task[None]") -> None:
        if not opening.cancelled() and opening.exception() is not None:
            self._opening = None
            self._failed()

    async def _open(self) -> None:
        limit = asyncio.timeout(OPEN_SECONDS)
        try:
            async with limit:
                await self._backend.open()
        except ShmSessionError:
            raise
        except Exception as error:  # a backend may be somebody else's code
            if limit.expired():
                raise BackendUnavailable(f"{self._backend.name} could not be opened in {OPEN_SECONDS} s") from None
            raise self._strange("could not be opened:", error) from error

    async def _when_ready(self, work: Callable[..., Awaitable[T]], *arguments: object) -> T:
        await self._ready()
        return await work(*arguments)

    def close(self) -> None:
        """Stop here; other processes go on, and what waits is sent by them, or at the next start."""
        with self._starting:
            self._closed = True
            portal = self._portal
            if portal is not None and portal.pid == os.getpid():
                with contextlib.suppress(ShmSessionError, TimeoutError):
                    portal.wait(self._stop(), OPEN_SECONDS)
                portal.close()
        self._bell.remove()

    async def _stop(self) -> None:
        running = {task for task in (self._flushing, self._opening) if task is not None}
        while running:  # a driver may swallow a cancellation
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=STOP_SECONDS)
        with contextlib.suppress(Exception):  # a backend may be somebody else's code; it ends here anyway
            await self._backend.close()

    # ── loading ───────────────────────────────────────────────────────────────────────────────────────────────

    def load(self, handle: bytes) -> Record | Missing:
        """What the backend has, kept in memory from now on. Blocks this thread. Raises BackendError, StoreError."""
        return self._wait(self._load_once, handle)

    async def load_async(self, handle: bytes) -> Record | Missing:
        """The same, for code on any event loop."""
        return await self._ask(self._load_once, handle)

    def _wait(self, question: Callable[[bytes], Awaitable[T]], about: bytes) -> T:
        self._refuse_if_down()
        return self._there().wait(self._when_ready(question, about))

    async def _ask(self, question: Callable[[bytes], Awaitable[T]], about: bytes) -> T:
        self._refuse_if_down()
        return await self._there().ask(self._when_ready(question, about))

    def _refuse_if_down(self) -> None:
        if is_down(self._environment, self._clock):
            self._environment.counters.add("load_errors")
            raise BackendUnavailable(f"{self._backend.name} has just failed, and is not asked again for a moment")

    async def _load_once(self, handle: bytes) -> Record | Missing:
        """One question a handle, however many requests wait for it; a cancelled one fails nobody else."""
        running = self._loads.get(handle)
        if running is None:
            if self._clock.boot() - self._missing.get(handle, -MISSING_MS) < MISSING_MS:
                return Missing.UNKNOWN
            running = self._loads[handle] = asyncio.create_task(self._load(handle))
            running.add_done_callback(partial(self._loaded, handle))
        return await asyncio.shield(running)

    def _loaded(self, handle: bytes, task: "asyncio.Task[Record | Missing]") -> None:
        self._loads.pop(handle, None)
        if not task.cancelled():
            task.exception()  # whoever waited has it; if nobody waits any more, it is no news

    async def _load(self, handle: bytes) -> Record | Missing:
        missed, losses, store = self._clock.boot(), self._memory.outbox.losses(), self._environment.uuid
        session = self._session_in(await self._answer(self._backend.load(handle)))
        if session is None:
            return self._note_missing(handle, missed)
        return self._keep(handle, session, missed, losses, store)

    async def _answer(self, question: Awaitable[T]) -> T:
        """What the backend answers to a request that waits. Raises BackendError."""
        try:
            async with asyncio.timeout(self._load_seconds):
                return await question
        except TimeoutError:
            self._failed()
            raise BackendUnavailable(f"{self._backend.name} did not answer in {self._load_seconds} s") from None
        except BackendUnavailable:
            self._failed()
            raise
        except BackendError:  # it answers; what it says of one row is no reason to refuse all others
            self._environment.counters.add("load_errors")
            raise
        except Exception as error:  # a backend may be somebody else's code
            self._failed()
            raise self._strange("failed with", error) from error

    def _session_in(self, row: Row | None) -> Loaded | None:
        """The session in a row that was answered, if it is one that lives."""
        try:
            if row is None or row.state is not State.LIVE:
                return None
            session = self._rows.session_in(row)
        except StoreError:
            raise
        except Exception as error:  # the same
            raise BackendError(f"{self._backend.name} answered what is no row: {type(error).__name__}") from error
        return session if self._clock.now() < session.header.expires else None

    def _keep(self, handle: bytes, session: Loaded, missed: int, losses: int, store: bytes) -> Record | Missing:
        """Keep in memory what was answered; what is there then. Raises StoreError when it cannot be kept."""
        found = self._memory.fill(handle, *session, missed)
        if self._memory.outbox.losses() != losses:  # it came from before a loss: the backend is to have it again
            self._memory.outbox.send_again(handle)
        if found is None:
            if self._clock.boot() - missed > STALE_FILL_MS or self._environment.uuid != store:
                raise BackendUnavailable(f"{self._backend.name} answered too late to be believed")
            raise StoreFull("the memory store has no room for a session of the backend: raise SHMSESSION_MAP_SIZE")
        return found

    def sessions_of(self, user: bytes) -> dict[bytes, Loaded]:
        """The sessions that the backend has of an encoded user id, by handle. Blocks this thread.

        Raises BackendError, StoreError: there is no part of an answer.
        """
        return self._wait(self._sessions_of, user)

    async def sessions_of_async(self, user: bytes) -> dict[bytes, Loaded]:
        """The same, for code on any event loop."""
        return await self._ask(self._sessions_of, user)

    async def _sessions_of(self, user: bytes) -> dict[bytes, Loaded]:
        found: dict[bytes, Loaded] = {}
        for row in await self._answer(self._backend.sessions_of(tag_of(user))):
            session = self._session_in(row)
            if session is not None and session.values().get(USER_KEY) == user:
                found[row.handle] = session
        return found

    def recall(self, user: bytes) -> None:
        """See to it that memory has all that the backend has of an encoded user id. Blocks this thread.

        Raises BackendError, StoreError.
        """
        self._wait(self._recall, user)

    async def recall_async(self, user: bytes) -> None:
        """The same, for code on any event loop."""
        await self._ask(self._recall, user)

    async def _recall(self, user: bytes) -> None:
        missed, losses, store = self._clock.boot(), self._memory.outbox.losses(), self._environment.uuid
        for handle, session in (await self._sessions_of(user)).items():
            self._keep(handle, session, missed, losses, store)

    def _note_missing(self, handle: bytes, boot: int) -> Missing:
        self._missing.pop(handle, None)
        if len(self._missing) >= MISSING_HANDLES:
            del self._missing[next(iter(self._missing))]
        self._missing[handle] = boot
        return Missing.UNKNOWN

    def _failed(self) -> None:
        self._environment.counters.add("load_errors")
        if not is_down(self._environment, self._clock):
            take_down(self._environment, self._clock)

    def _strange(self, what: str, error: Exception) -> BackendError:
        """An error of somebody else's code; where it comes from is logged, for nobody else will say it."""
        message = f"{self._backend.name} {what} {type(error).__name__}"
        self._telling.tell(message, error)
        return BackendError(message)

    # ── waiting until the backend has it ──────────────────────────────────────────────────────────────────────

    def is_clean(self, handles: Iterable[bytes]) -> bool:
        """Whether none of these waits for the backend."""
        return not any(self._memory.outbox.holds(handle) for handle in handles)

    def wait(self, handles: tuple[bytes, ...], seconds: float) -> bool:
        """Until the backend has them, for so long at most; whether it has. Blocks this thread."""
        for pause in self._pauses(handles, seconds):
            time.sleep(pause)
        return self.is_clean(handles)

    async def wait_async(self, handles: tuple[bytes, ...], seconds: float) -> bool:
        """The same, for code on any event loop."""
        for pause in self._pauses(handles, seconds):
            await asyncio.sleep(pause)
        return self.is_clean(handles)

    def _pauses(self, handles: tuple[bytes, ...], seconds: float) -> Iterator[float]:
        """How long to sleep, again and again, until the backend has them or waiting has no point any more."""
        if self.is_clean(handles):
            return
        self.see_to_it()
        ring(self._bell, self._environment)
        end, pause = time.monotonic() + seconds, POLL_SECONDS[0]
        while not self.is_clean(handles):
            if is_down(self._environment, self._clock) or time.monotonic() >= end:
                self._environment.counters.add("late")
                return
            yield pause
            pause = min(pause * 2, POLL_SECONDS[1])

    # ── all of it ─────────────────────────────────────────────────────────────────────────────────────────────

    def drain(self, seconds: float) -> bool:
        """Send all that waits, from this process, for so long at most; whether nothing is left. Blocks this thread."""
        return self._there().wait(self._when_ready(self._drain, seconds))

    async def drain_async(self, seconds: float) -> bool:
        """The same, for code on any event loop."""
        return await self._there().ask(self._when_ready(self._drain, seconds))

    async def _drain(self, seconds: float) -> bool:
        return await self._make_flusher().drain(seconds)

    async def clear(self) -> int:
        """`Backend.clear`, for code on any event loop."""
        return await self._there().ask(self._when_ready(self._backend.clear))

    async def initialize(self) -> None:
        """`Backend.initialize`, for code on any event loop."""
        await self._there().ask(self._when_ready(self._backend.initialize))

    async def copy_from(self, source: Backend) -> int:
        """See `SessionStore.copy_from`."""
        return await self._there().ask(self._when_ready(self._copy_from, source))

    async def _copy_from(self, source: Backend) -> int:
        await self._backend.initialize()
        try:
            await source.open()
            return await copy(source, self._backend)
        finally:
            await source.close()
