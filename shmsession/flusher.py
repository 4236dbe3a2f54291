"""The flusher: carries commits from the memory store to the backend, behind the requests' backs.

Every worker runs a candidate; the one that holds the lease works. Two at once do no harm: the backend's order of rows
decides, and a commit is crossed off only if it is still the one that was sent.
"""

import asyncio
import contextlib
import logging
import os
import random
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

from . import _native
from .backends.base import FOREVER, SENTINEL, Answer, Backend, Mark, Row, State
from .clock import Clock
from .errors import BackendError, ShmSessionError, StoreFull
from .hooks import BackendForgot, Flushed, FlushFailed, Hooks
from .lease import BEAT_MS, Lease
from .memory.doorbell import Doorbell
from .memory.environment import Environment
from .memory.outbox import LOSSES, Dirty
from .memory.store import MemoryStore
from .record import TOMBSTONE
from .rows import Rows

logger = logging.getLogger("shmsession")

BATCH: Final = 500
BACKOFF_MS: Final = (100, 5_000)
"""How long nobody asks a backend that has just failed: the first time, and at most."""
HEARTBEAT_MS: Final = 4_000
"""How often the sentinel is written when there is nothing else to send."""
NEIGHBOUR_MS: Final = 12_000
"""A sentinel of another store that does not change for so long is that of a dead one."""
LONG_AGO_MS: Final = 60_000
SWEEP_MS: Final = 60_000
SWEEP_LIMIT: Final = 1_000
SWEEPS: Final = 10
"""So often at most the memory is swept in one go."""
RETIRE_CHUNKS: Final = 4
PAUSE_SECONDS: Final = 0.05
"""How often the outbox is looked at where nobody can ring, and while somebody waits for it."""

_BEAT: Final = b"beat"
_RECALLED: Final = b"recalled"
"""Up to which of these times all was put back."""
_DEAD, _LIVE, _DONE = range(3)
_SENTINEL = struct.Struct(">16s16sQ")


class _Neighbour(BackendError):
    """Somebody else writes there. Reading does no harm, so the backend is not taken to be down."""


class _Overtaken(_Neighbour):
    """Somebody else was faster, most likely another flusher of this store."""


@dataclass
class _Recall:
    """How far putting back has come after one loss. `passed_over`: there were records that only others can read."""

    loss: int = -1
    step: int = _DONE
    after: bytes = b""
    put: int = 0
    passed_over: bool = False


class Flusher:
    """One candidate. All of it runs on one event loop, the one that the backend is used on.

    `interval` is how long a commit may wait before it is sent, in seconds. `shared`: whether other stores may use the
    same tables.
    """

    def __init__(
        self, memory: MemoryStore, backend: Backend, rows: Rows, clock: Clock, hooks: Hooks, *, interval: float,
        memory_lifespan: int, shared: bool = False,
    ) -> None:  # fmt: skip
        self._memory = memory
        self._environment = memory.environment
        self._outbox = memory.outbox
        self._backend = backend
        self._rows = rows
        self._clock = clock
        self._hooks = hooks
        self._interval = interval
        self._memory_lifespan = memory_lifespan
        self._shared = shared
        self._lease = Lease(memory.environment, clock)
        self._place = place_of(memory.environment.path)
        self.holds_lease = False
        self._initialized = False
        self._greeted: bytes | None = None
        self._recall = _Recall()
        self._stranger: tuple[tuple[bytes, int], int] | None = None
        self._last_contact = 0
        self._failures = 0
        self._next_sweep = 0
        self._next_retire = 0
        self._retired_to = b""
        self._bell = Doorbell(memory.environment.path)
        self._woken = asyncio.Event()
        self._told = ""

    # ── one candidate's life ──────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Be a candidate until cancelled."""
        beating = asyncio.create_task(self._beat())
        listening = _Listener(self._bell, self._woken, lambda: self.holds_lease)
        try:
            while True:
                if self.holds_lease:
                    listening.listen()
                    await self._attempt()
                await self._rest()
        finally:
            await listening.stop()
            beating.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await beating
            with contextlib.suppress(ShmSessionError):
                self._lease.release()
            self.holds_lease = False

    async def _beat(self) -> None:
        """Take the lease, or keep it, also while an answer is awaited."""
        while True:
            held = self.holds_lease
            try:
                self.holds_lease = self._lease.take()
                if self.holds_lease and not held:
                    self._woken.set()
            except ShmSessionError as error:
                self.holds_lease = False
                self._tell(f"the lease cannot be taken: {error}")
            await asyncio.sleep(BEAT_MS / 1000)

    async def _rest(self) -> None:
        """Until the doorbell rings, or it is time to look."""
        wait = self._interval if self.holds_lease else BEAT_MS / 1000
        if not self._bell.works:
            wait = min(wait, PAUSE_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(wait, HEARTBEAT_MS / 1000)):  # not wait_for: it may swallow a cancellation
                await self._woken.wait()
        self._woken.clear()

    async def _attempt(self) -> None:
        """Send what waits, and keep house; a failure is told, and leaves it for later."""
        if is_down(self._environment, self._clock):
            return
        try:
            while self.holds_lease and await self.round() == BATCH:
                pass
            await self._keep_house()
        except _Overtaken:
            return
        except _Neighbour as error:
            self._environment.counters.add("flush_errors")
            self._tell(str(error))
        except Exception as error:  # noqa: BLE001  # a backend may be somebody's own code: this goes on
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._greeted = None
        if not isinstance(error, ShmSessionError) or isinstance(error, BackendError):
            first, most = BACKOFF_MS
            delay = min(most, first << min(self._failures, 16))
            self._failures += 1
            self._environment.backend_down_until = self._clock.boot() + int(delay * random.uniform(0.5, 1))  # noqa: S311
        self._environment.counters.add("flush_errors")
        reason = str(error) if isinstance(error, ShmSessionError) else type(error).__name__
        self._hooks.emit(FlushFailed(reason))
        self._tell(f"sessions wait to be flushed: {reason}")

    def _tell(self, message: str) -> None:
        """Log it once, not at every attempt."""
        if message != self._told:
            self._told = message
            logger.warning("%s", message)

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────────

    async def drain(self, seconds: float) -> bool:
        """See to it that all that waits is sent, for so long at most; whether nothing is left.

        Whoever holds the lease sends it; without one, this does.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        try:
            while len(self._outbox):
                left = end - loop.time()
                if left <= 0:
                    return False
                sent = 0
                if self._lease.take():
                    sent = await self._drain_round(left)
                else:
                    self._bell.ring()
                if not sent:  # what is left is for others, in their hands, or has to wait
                    await asyncio.sleep(min(left, PAUSE_SECONDS))
            return True
        finally:
            with contextlib.suppress(ShmSessionError):
                self._lease.release()

    async def _drain_round(self, seconds: float) -> int:
        try:
            async with asyncio.timeout(seconds):
                return await self.round()
        except TimeoutError:
            return 0
        except _Neighbour as error:
            if not isinstance(error, _Overtaken):
                self._tell(str(error))
        except Exception as error:  # noqa: BLE001  # a backend may be somebody's own code: this goes on
            self._failed(error)
        return 0

    async def round(self) -> int:
        """Send the oldest commits, a batch at most; returns how many. Raises BackendError, StoreError."""
        await self._greet()
        await self._put_back()
        waiting = self._outbox.oldest(BATCH)
        dead = [dirty for dirty in waiting if dirty.record.header.flags & TOMBSTONE]
        rest = [dirty for dirty in waiting if not dirty.record.header.flags & TOMBSTONE]
        # A renewed session's new row only when its old one is dead: else a loss of memory could leave both alive.
        for batch in (dead, rest):
            if batch:
                await self._send(batch)
        if not (waiting or self._shared) and self._clock.boot() - self._last_contact >= HEARTBEAT_MS:
            await self._send([])
        return len(waiting) if self._recall.step == _DONE else BATCH

    async def _send(self, batch: Sequence[Dirty]) -> None:
        beat, losses = self._outbox.note(_BEAT) + 1, self._outbox.losses()
        rows = [self._rows.row_of(dirty) for dirty in batch]
        sentinel = [] if self._shared else [self._sentinel(beat, FOREVER - 1)]
        answers = await self._backend.write([*rows, *sentinel])
        if len(answers) != len(rows) + len(sentinel):
            raise BackendError(f"{self._backend.name} answered for {len(answers)} rows of {len(rows) + len(sentinel)}")
        self._last_contact = self._clock.boot()
        self._failures = 0
        self._told = ""
        self._environment.backend_down_until = 0
        if not self._shared:
            self._look_at(answers[-1], beat)
        self._take(batch, rows, answers, losses)
        if batch:
            self._environment.counters.add("batches")
            self._environment.counters.add("rows", len(batch))
            self._hooks.emit(Flushed(len(batch)))

    def _sentinel(self, beat: int, horizon: int) -> Row:
        """`horizon`: FOREVER when we know what stood there, one less when we do not: the later one is kept, so that
        what was written where nothing stood shows it also to somebody who never saw the answer."""
        body = _SENTINEL.pack(self._environment.uuid, self._place, self._clock.now())
        return Row(SENTINEL, State.LIVE, self._environment.epoch, beat, horizon, b"", body)

    def _look_at(self, answer: Answer, beat: int) -> None:
        """Note it when the backend lost what it had acknowledged, by what its sentinel was before a batch."""
        before = answer.before
        if not answer.applied:  # another flusher of this store was faster, or another store has taken over
            self._greeted = None
            return
        if before is None or (before.epoch, before.version) < (self._environment.epoch, beat - 1):
            self._note_loss()
        self._outbox.raise_note(_BEAT, beat)

    def _note_loss(self) -> None:
        self._outbox.raise_note(LOSSES, self._outbox.losses() + 1)

    def _take(self, batch: Sequence[Dirty], rows: Sequence[Row], answers: Sequence[Answer], losses: int) -> None:
        """Act on the answer for each row. `losses`: how many were known before they were sent."""
        done, unexplained = [], False
        for dirty, row, answer in zip(batch, rows, answers, strict=False):
            if answer.applied or answer.before == row.mark:
                done.append(dirty)
            elif answer.before is None:
                unexplained = True
            elif answer.before.state is State.DEAD:
                self._outbox.obey(dirty.handle)
            else:
                self._outbox.outnumber(dirty.handle, answer.before.epoch, answer.before.version)
        self._outbox.acknowledge(done, losses)
        if unexplained:
            raise BackendError(f"{self._backend.name} refused a row and named nothing that stands in its way")

    # ── whose backend is it, and does it remember? ────────────────────────────────────────────────────────────

    async def _greet(self) -> None:
        """Once after every failure: look at the sentinel before anything is sent, and put our own in its place."""
        if self._greeted == self._environment.uuid:
            return
        if not self._initialized:
            await self._backend.initialize()
            self._initialized = True
        if self._shared:
            self._greeted = self._environment.uuid
            return
        found = await self._backend.load(SENTINEL)
        ours = found is not None and self._is_ours(found)
        if found is not None and not ours and found.epoch >= self._environment.epoch:
            self._environment.raise_epoch(found.epoch + 1)
        lost = found is None or not ours or self._is_older(found.mark) or found.horizon < FOREVER
        if lost:
            self._note_loss()
        beat = max(self._outbox.note(_BEAT), 0 if found is None or not ours else found.version) + 1
        (answer,) = await self._backend.write([self._sentinel(beat, FOREVER if lost else FOREVER - 1)])
        if not answer.applied or answer.before != (found.mark if found else None):
            if answer.applied:
                self._look_at(answer, beat)
            raise _Overtaken(f"somebody else has just written to {self._backend.name}: looking again")
        self._outbox.raise_note(_BEAT, beat)
        self._last_contact = self._clock.boot()
        self._greeted = self._environment.uuid

    def _is_older(self, sentinel: Mark) -> bool:
        return (sentinel.epoch, sentinel.version) < (self._environment.epoch, self._outbox.note(_BEAT))

    def _is_ours(self, sentinel: Row) -> bool:
        """Whether this incarnation wrote it. Raises _Neighbour when another store, that is alive, did."""
        if len(sentinel.body) != _SENTINEL.size:
            return False
        uuid, place, seen = _SENTINEL.unpack(sentinel.body)
        if uuid == self._environment.uuid:
            return True
        if place != self._place and self._may_live((uuid, sentinel.version), seen):
            raise _Neighbour(
                f"another store that is alive keeps its sessions in {self._backend.name}: give each store tables of "
                "its own (table=, prefix=), or set allow_shared=True"
            )
        return False

    def _may_live(self, stranger: tuple[bytes, int], seen: int) -> bool:
        """Whether whoever wrote a sentinel may do it again. What its clock says is believed when it was long ago;
        otherwise it lives as long as the sentinel changes."""
        if self._clock.now() - seen >= LONG_AGO_MS:
            return False
        boot = self._clock.boot()
        if self._stranger is None or self._stranger[0] != stranger:
            self._stranger = (stranger, boot)
        return boot - self._stranger[1] < NEIGHBOUR_MS

    async def _put_back(self) -> None:
        """Some of what the backend should have waits again, the dead first: about a batch a round, since it is sent
        before more fits into a store that is nearly full."""
        lost = self._outbox.losses()
        if self._recall.loss != lost:
            self._recall = _Recall(lost, step=_DONE if lost <= self._outbox.note(_RECALLED) else _DEAD)
        recall, begin = self._recall, self._recall.put
        while recall.step != _DONE and recall.put - begin < BATCH:
            try:
                count, recall.after, passed_over = self._outbox.put_back(recall.after, dead=recall.step == _DEAD)
            except StoreFull:
                return  # sending makes room
            recall.put += count
            recall.passed_over = recall.passed_over or passed_over
            if not recall.after:
                recall.step += 1
                if recall.step == _DONE:
                    self._recalled(recall)
            await asyncio.sleep(0)

    def _recalled(self, recall: "_Recall") -> None:
        if not recall.passed_over:  # else somebody who has the Key of what was passed over must do it too
            self._outbox.raise_note(_RECALLED, recall.loss)
        if recall.put:
            logger.warning("%s lacks %s sessions that it had: they are sent again", self._backend.name, recall.put)
            self._hooks.emit(BackendForgot(recall.put))

    # ── keeping house ─────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_house(self) -> None:
        boot, now = self._clock.boot(), self._clock.now()
        for _ in range(SWEEPS):
            if not self._memory.sweep(now):
                break
            await asyncio.sleep(0)
        if boot >= self._next_sweep:
            self._next_sweep = boot + SWEEP_MS
            if self._memory.trusts_clocks(now):
                while await self._backend.sweep(now, SWEEP_LIMIT) >= SWEEP_LIMIT and self.holds_lease:
                    pass
        if boot >= self._next_retire:
            self._retire(boot, now)

    def _retire(self, boot: int, now: int) -> None:
        for _ in range(RETIRE_CHUNKS):
            gone, self._retired_to = self._outbox.retire(now, self._memory_lifespan, self._retired_to)
            if gone:
                self._environment.counters.add("evicted", gone)
            if not self._retired_to:
                self._next_retire = boot + max(1_000, self._memory_lifespan // 10)
                return


def is_down(environment: Environment, clock: Clock) -> bool:
    """Whether the backend has just failed, so that nobody asks it. A word from before a restart of the machine ends."""
    boot = clock.boot()
    return boot < environment.backend_down_until <= boot + BACKOFF_MS[1]


def place_of(path: Path) -> bytes:
    """Where a store is, as 16 bytes: the one that comes after it at the same place need not wait for its silence."""
    digest = blake2b(digest_size=16, person=b"shmsession place")
    for part in (socket.gethostname().encode(), _machine(), os.fsencode(path.resolve())):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def _machine() -> bytes:
    try:
        return Path("/etc/machine-id").read_bytes()
    except OSError:
        return b""


_sleep: Callable[[float], None] = _native.original(time, "sleep")


class _Listener:
    """A thread that turns rings of the doorbell into wake-ups of the event loop."""

    def __init__(self, bell: Doorbell, woken: asyncio.Event, is_wanted: Callable[[], bool]) -> None:
        self._bell = bell
        self._is_wanted = is_wanted
        self._woken = woken
        self._stopped = False
        self._ended: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()

    def listen(self) -> None:
        """Begin, once, if there is a bell."""
        if self._ended is None and self._bell.works:
            self._ended = asyncio.Event()
            _native.start_thread(self._listen)

    def _listen(self) -> None:
        while not self._stopped:
            if not self._is_wanted():  # rings are for whoever holds the lease now
                _sleep(PAUSE_SECONDS)
            elif self._bell.wait(BEAT_MS / 1000):
                self._tell(self._woken)
        assert self._ended is not None
        self._tell(self._ended)

    def _tell(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(event.set)

    async def stop(self) -> None:
        """Let the thread end."""
        self._stopped = True
        if self._ended is not None:
            self._bell.ring()
            await self._ended.wait()
