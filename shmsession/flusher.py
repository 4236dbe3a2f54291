"""The flusher: carries commits from the memory store to the backend, behind the requests' backs.

Every worker runs a candidate; the one that holds the lease works. Two at once do no harm: the backend's order of rows
decides, and a commit is crossed off only if it is still the one that was sent.
"""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple

from .backends.base import Answer, Backend, Row, State
from .clock import Clock
from .errors import BackendError, BackendUnavailable, ShmSessionError
from .hooks import Flushed, FlushFailed, Hooks
from .id_filter import IdFilter
from .lease import BEAT_MS, Lease
from .memory.doorbell import Doorbell
from .memory.outbox import Dirty
from .memory.store import MemoryStore
from .record import NO_PLACE
from .revoking import Revocations, is_watermark
from .rows import Rows
from .sentinel import Neighbour, Overtaken, Recall, Sentinel
from .signalling import PAUSE_SECONDS, Listener, is_down, ring, take_down
from .telling import Telling

BATCH: Final = 500
BATCH_BYTES: Final = 1 << 20
"""So many rows are sent at once, or fewer of about so many bytes: a slow connection must carry them in time."""
PIECE: Final = 100
"""So many are read and made rows in one go."""
TURNS: Final = 20
"""So often the loop goes round before more is read: by then most drivers have sent the batch, and the backend writes.
One that needs longer is sent for while others have their turn."""
HEARTBEAT_MS: Final = 4_000
"""How often the sentinel is looked at and written anew, whatever else is sent."""
SWEEP_MS: Final = 60_000
SWEEP_LIMIT: Final = 1_000
SWEEPS: Final = 10
"""So often at most the memory is swept in one go."""
RETIRE_CHUNKS: Final = 40
RETRY_SECONDS: Final = 1.0
"""How often somebody who waits for the outbox rings, or tries again what failed."""


class _Ahead(NamedTuple):
    """What was read to be sent: of places up to `until`, when so many losses were known. `full`: there may be more."""

    rows: list[tuple[Dirty, Row]]
    full: bool
    until: bytes
    losses: int


class Flusher:
    """One candidate. All of it runs on one event loop, the one that the backend is used on.

    `interval` is how long a commit may wait before it is sent, in seconds. `shared`: whether other stores may use the
    same tables.
    """

    def __init__(
        self, memory: MemoryStore, backend: Backend, rows: Rows, clock: Clock, hooks: Hooks, *, interval: float,
        memory_lifespan: int, shared: bool = False, id_filter: IdFilter | None = None,
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
        self._lease = Lease(memory.environment, clock)
        self.holds_lease = False
        self._sentinel = Sentinel(memory, backend, clock, shared=shared)
        self._id_filter = id_filter
        self._filling: asyncio.Task[None] | None = None
        self._revocations = Revocations(memory, backend, rows, clock)
        self._recall = Recall(memory.outbox, backend.name, hooks)
        self._last_look = 0
        self._failures = 0
        self._batch = BATCH
        self._ahead: _Ahead | None = None
        self._heard: list[tuple[list[Dirty], int]] = []
        """What the backend has and is yet to be crossed off, and how many losses were known when it was sent."""
        self._beside: Callable[[Coroutine[Any, Any, _Ahead | None]], asyncio.Task[_Ahead | None]] = asyncio.create_task
        """Lets something run while something else is waited for."""
        self._next_sweep = 0
        self._next_retire = 0
        self._retired_to = b""
        self._bell = Doorbell(memory.environment.path)
        self._woken = asyncio.Event()
        self._telling = Telling()
        self._yields_until = 0

    # ── one candidate's life ──────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Be a candidate until cancelled."""
        beating = asyncio.create_task(self._beat())
        listening = Listener(self._bell, self._woken, lambda: self.holds_lease)
        try:
            while True:
                try:
                    heard, begun = self._environment.rings, self._clock.boot()
                    if self.holds_lease:
                        listening.listen()
                        await self._attempt()
                    await self._rest(heard, begun)
                except ShmSessionError as error:  # the memory store itself; it may be better later
                    self._telling.tell(f"sessions wait to be flushed: {error}")
                    await asyncio.sleep(BEAT_MS / 1000)
        finally:
            self.holds_lease = False
            for task in (beating, self._filling):
                if task is not None:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            with contextlib.suppress(ShmSessionError):
                self._lease.release()
            self.holds_lease = False
            await listening.stop()

    async def _beat(self) -> None:
        """Take the lease, or keep it, also while an answer is awaited."""
        while True:
            held = self.holds_lease
            try:
                self.holds_lease = self._clock.boot() >= self._yields_until and self._lease.take()
                if self.holds_lease and not held:
                    self._woken.set()
            except Exception as error:  # noqa: BLE001  # a candidate goes on, whatever fails
                self.holds_lease = False
                self._telling.tell(f"the lease cannot be taken: {error}")
            await asyncio.sleep(BEAT_MS / 1000)

    async def _rest(self, heard: int, begun: int) -> None:
        """Until the doorbell rings, or it is time to look. `heard`: the rings before the last look; `begun`: when."""
        wait = min(self._interval if self.holds_lease else BEAT_MS / 1000, HEARTBEAT_MS / 1000)
        wait -= max(0, self._clock.boot() - begun) / 1000
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):  # not wait_for: it may swallow a cancellation
                if self._bell.works:
                    await self._woken.wait()
                while not self._woken.is_set() and self._environment.rings == heard:  # noqa: ASYNC110  # others ring
                    await asyncio.sleep(PAUSE_SECONDS)
        self._woken.clear()

    async def _attempt(self) -> None:
        """Send what waits, and keep house; a backend's failure is told, and leaves it for later. Raises StoreError."""
        if is_down(self._environment, self._clock):
            return
        self._ahead = None
        try:
            try:
                while self.holds_lease and await self.round():
                    pass
            finally:
                with contextlib.suppress(ShmSessionError):  # it must hide neither an error nor a cancellation
                    self._cross_off()
            if self.holds_lease:
                await self._keep_house()
            if self.holds_lease and self._outbox.ends() and not self._outbox.oldest(1):
                self._yields_until = self._clock.boot() + 2 * BEAT_MS  # who has the Key is to have a chance
                self.holds_lease = False
                self._lease.release()
        except Overtaken:
            return
        except Neighbour as error:
            self._refused(error)
        except Exception as error:  # noqa: BLE001  # a backend may be somebody's own code: this goes on
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self._sentinel.greeted = None
        if not isinstance(error, ShmSessionError) or isinstance(error, BackendError):
            take_down(self._environment, self._clock, self._failures)
            self._failures += 1
            self._batch = max(1, self._batch // 2)  # what is too much to be answered in time may be little enough then
            # One that answers may have lost its tables. One that does not comes back with them, and whatever stands at
            # its place meanwhile, or nothing, must not be made into an empty one: that would log everybody out.
            self._sentinel.initialized = self._sentinel.initialized and isinstance(error, BackendUnavailable)
        self._environment.counters.add("flush_errors")
        ours = isinstance(error, ShmSessionError)
        reason = str(error) if ours else type(error).__name__
        self._hooks.emit(FlushFailed(reason))
        self._telling.tell(f"sessions wait to be flushed: {reason}", None if ours else error)

    def _refused(self, error: Neighbour) -> None:
        self._environment.counters.add("flush_errors")
        if self._telling.tell(str(error)):  # not at every look: it may be there for ever
            self._hooks.emit(FlushFailed(str(error)))

    # ── sending ───────────────────────────────────────────────────────────────────────────────────────────────

    async def drain(self, seconds: float) -> bool:
        """See to it that all that waits now is sent, for so long at most; whether it was.

        Whoever holds the lease sends it; without one, this does. What the backend turns out to have lost counts too.
        """
        loop = asyncio.get_running_loop()
        end, next_ring, next_round = loop.time() + seconds, 0.0, 0.0
        last, recalled, more = self._newest(), self._recall.count, True
        try:
            while self._waits(last) or not self._recall.is_done:
                if not more:  # what is left is for others, in their hands, or has to wait
                    await asyncio.sleep(PAUSE_SECONDS)
                now, more = loop.time(), False
                if now >= end:
                    return False
                if not self._outbox.oldest(1) and self._recall.is_done:  # what is left is for who has the Key
                    self._lease.release()
                elif now < next_round or is_down(self._environment, self._clock):
                    pass  # it has just failed
                elif self._lease.take():
                    found = await self._drain_round(end - now)
                    next_round = loop.time() + RETRY_SECONDS if found is None else 0.0
                    more = bool(found)
                elif now >= next_ring:
                    next_ring = now + RETRY_SECONDS
                    ring(self._bell, self._environment)
                if self._recall.count != recalled:
                    last, recalled = self._newest(), self._recall.count
            return True
        finally:
            with contextlib.suppress(ShmSessionError):
                self._cross_off()
            with contextlib.suppress(ShmSessionError):
                self._lease.release()

    def _newest(self) -> bytes:
        """The place of the newest commit that waits."""
        ends = self._outbox.ends()
        return ends[1] if ends else NO_PLACE

    def _waits(self, last: bytes) -> bool:
        """Whether a commit waits whose place is `last` or older."""
        ends = self._outbox.ends()
        return ends is not None and ends[0] <= last

    async def _drain_round(self, seconds: float) -> bool | None:
        """`round`, but None when it failed, or took too long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                try:
                    return await self.round()
                except Overtaken:
                    return False
                except Neighbour as error:
                    self._refused(error)
                except Exception as error:  # noqa: BLE001  # a backend may be somebody's own code: this goes on
                    self._failed(error)
        return None

    async def round(self) -> bool:
        """Send the oldest commits, a batch at most; whether there are more of those that waited when this began.

        While the backend writes, what it wrote in the last round is crossed off, and the next batch is read. What is
        committed meanwhile, also to a session that was sent, is not looked at: where all sessions are written all the
        time there would be no end, and each would be sent more than once within the flush interval.
        Raises BackendError, StoreError.
        """
        if self._clock.boot() - self._last_look >= HEARTBEAT_MS:
            self._sentinel.greeted = None
            self._cross_off()  # to look may take long
        if await self._sentinel.greet():
            self._last_look = self._clock.boot()
        losses, limit, put_back = self._outbox.losses(), self._batch, self._recall.count
        await self._recall.put_back(BATCH)
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead.losses != self._outbox.losses() or not self._recall.is_done:
            self._cross_off()
            ahead = await self._read(losses, limit, NO_PLACE, self._newest())
        waiting, full = ahead.rows, ahead.full
        reading = None
        if full and self._recall.is_done:
            last = waiting[-1][0].record.place
            reading = self._beside(self._read_ahead(losses, min(BATCH, limit * 2), last, ahead.until))
        try:
            # A renewed session's new row only when its old one is dead: else a loss of memory could leave both alive.
            dead = [pair for pair in waiting if pair[1].state is State.DEAD]
            rest = [pair for pair in waiting if pair[1].state is not State.DEAD] if dead else waiting
            marks = [dirty for dirty, _ in dead if is_watermark(dirty)]
            dead = [pair for pair in dead if not is_watermark(pair[0])] if marks else dead
            if dead:
                await self._send(dead)
                self._cross_off()  # somebody may be logging out, and waits
            if rest:
                await self._send(rest)
            if marks:
                await self._revoke(marks)
            if reading is not None:
                self._ahead = await reading
            else:
                self._cross_off()
        finally:
            if reading is not None:
                reading.cancel()
        self._batch = min(BATCH, limit * 2)
        # Without room to put more back, and with nothing else to send, the house must be kept first.
        recalls = not self._recall.is_done and (full or self._recall.count != put_back)
        return self._ahead is not None or (bool(waiting) and recalls)

    async def _read(self, losses: int, limit: int, after: bytes, until: bytes) -> _Ahead:
        """What is to be sent next, of places behind `after`, a piece at a time: others have their turn in between.

        Not beyond `until`, the newest when the reading began: of a session that is renewed meanwhile, the end may
        have a place that was passed, and its new row, which waits behind `until`, must not be sent before that.
        """
        # By handle: one that another flusher crossed off and put back between two pieces is met twice.
        found: dict[bytes, tuple[Dirty, Row]] = {}
        row_of, left, size = self._rows.row_of, limit, BATCH_BYTES
        while left > 0 and size > 0:
            piece = self._outbox.oldest(min(PIECE, left), size, after, until)
            if not piece:
                break
            for dirty in piece:
                found.pop(dirty.handle, None)
                found[dirty.handle] = (dirty, row_of(dirty))
            left -= len(piece)
            size -= sum(len(dirty.record.raw) for dirty in piece)
            after = piece[-1].record.place
            await asyncio.sleep(0)
        return _Ahead(list(found.values()), (left <= 0 or size <= 0) and after < until, until, losses)

    async def _read_ahead(self, losses: int, limit: int, after: bytes, until: bytes) -> _Ahead | None:
        """Cross off what was sent before, then the same; None when nothing is left there.

        When the store fails the next round is to meet it: this is of no use to it, for no losses are as many.
        """
        for _ in range(TURNS):
            await asyncio.sleep(0)
        try:
            self._cross_off()
            ahead = await self._read(losses, limit, after, until)
        except ShmSessionError:
            return _Ahead([], full=False, until=until, losses=-1)
        return ahead if ahead.rows else None

    async def _send(self, batch: Sequence[tuple[Dirty, Row]]) -> None:
        losses = self._outbox.losses()
        answers = await self._write([row for _, row in batch])
        self._take(batch, answers, losses)
        self._environment.counters.add("batches")
        self._environment.counters.add("rows", len(batch))
        self._hooks.emit(Flushed(len(batch)))

    async def _revoke(self, marks: Sequence[Dirty]) -> None:
        """End what users' watermarks end, all that the backend has of it."""
        losses = self._outbox.losses()
        rows = await self._revocations.rows(marks)
        for begin in range(0, max(1, len(rows)), BATCH):
            await self._write(rows[begin : begin + BATCH])
        self._heard.append(([*marks], losses))
        self._cross_off()  # somebody waits

    async def _write(self, rows: list[Row]) -> Sequence[Answer]:
        """The answers to these rows, which are sent with the sentinel."""
        sentinel = self._sentinel.next()
        sent = [*rows, *sentinel]
        answers = await self._backend.write(sent) if sent else []
        if len(answers) != len(sent):
            raise BackendError(f"{self._backend.name} answered for {len(answers)} rows of {len(sent)}")
        await self._sentinel.ask_history()  # before any answer is believed
        self._failures = 0
        self._telling.forget()
        self._environment.backend_down_until = 0
        if sentinel:
            self._sentinel.look_at(answers[-1], *sentinel)
        return answers

    def _take(self, batch: Sequence[tuple[Dirty, Row]], answers: Sequence[Answer], losses: int) -> None:
        """Act on the answer for each row. `losses`: how many were known before they were sent."""
        done, unexplained = [], False
        for (dirty, row), answer in zip(batch, answers, strict=False):
            if answer.applied or answer.before == row.mark:
                done.append(dirty)
            elif answer.before is None:
                unexplained = True
            elif answer.before.state is State.DEAD:
                self._outbox.obey(dirty.handle, losses)
            else:
                self._outbox.outnumber(dirty.handle, answer.before.epoch, answer.before.version)
        self._heard.append((done, losses))
        if unexplained:
            raise BackendError(f"{self._backend.name} refused a row and named nothing that stands in its way")

    def _cross_off(self) -> None:
        """What was sent and has not changed since waits no more. What cannot be crossed off now is at the next call."""
        while self._heard:
            done, losses = self._heard[0]
            self._outbox.acknowledge(done, losses)
            del self._heard[0]

    # ── keeping house ─────────────────────────────────────────────────────────────────────────────────────────

    async def _keep_house(self) -> None:
        boot, now = self._clock.boot(), self._clock.now()
        for _ in range(SWEEPS):
            if not self._memory.sweep(now):
                break
            await asyncio.sleep(0)
        self._get_acquainted()
        if boot >= self._next_sweep and not (
            self._memory.trusts_clocks(now) and await self._backend.sweep(now, SWEEP_LIMIT) >= SWEEP_LIMIT
        ):
            self._next_sweep = boot + SWEEP_MS
        # What the last answer has shown the backend to have lost is noted at the next look at it.
        if boot >= self._next_retire and self._sentinel.greeted is not None:
            await self._retire(boot, now)

    def _get_acquainted(self) -> None:
        """Fill the filter of plain ids, beside all else: a backend may take long to name all that it has."""
        id_filter, running = self._id_filter, self._filling
        if id_filter is not None and id_filter.wanted and (running is None or running.done()):
            self._filling = asyncio.create_task(self._fill(id_filter))

    async def _fill(self, id_filter: IdFilter) -> None:
        try:
            await id_filter.refresh()
        except Exception as error:  # noqa: BLE001  # without it more is looked for, and nothing else goes wrong
            reason = str(error) if isinstance(error, ShmSessionError) else type(error).__name__
            self._telling.tell(
                f"the backend is asked for every plain id that nobody knows: it cannot be listed ({reason})"
            )

    async def _retire(self, boot: int, now: int) -> None:
        for _ in range(RETIRE_CHUNKS):
            await asyncio.sleep(0)
            gone, self._retired_to = self._outbox.retire(now, self._memory_lifespan, self._retired_to)
            if gone:
                self._environment.counters.add("retired", gone)
            if not self._retired_to:
                self._next_retire = boot + max(1_000, self._memory_lifespan // 10)
                return
