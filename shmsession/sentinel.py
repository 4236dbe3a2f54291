"""Whose backend is it, and does it remember? One row of it tells: the sentinel.

It says which incarnation of which store writes there, and counts the batches that it was sent. What is found there
before anything is sent, and what each batch replaces, shows a backend that is new, fell back to an older state, or has
another master.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
from hashlib import blake2b
from pathlib import Path
from typing import Final

from .backends.base import FOREVER, SENTINEL, Answer, Backend, Row, State
from .clock import Clock
from .errors import BackendError, StoreFull
from .hooks import BackendForgot, Hooks
from .memory.outbox import Outbox
from .memory.store import MemoryStore
from .memory.tables import RECALLED

logger = logging.getLogger("shmsession")

NEIGHBOUR_MS: Final = 12_000
"""A sentinel of another store that does not change for so long is that of a dead one."""
LONG_AGO_MS: Final = 60_000

_BODY = struct.Struct(">16s16sQ")
_BEAT: Final = b"beat"
"""The note of the last batch that was acknowledged."""
_DEAD, _LIVE, _DONE = range(3)


class Neighbour(BackendError):
    """Somebody else writes there. Reading does no harm, so the backend is not taken to be down."""


class Overtaken(Neighbour):
    """Somebody else was faster, most likely another flusher of this store: it is looked at again."""


class Sentinel:
    """The sentinel of one flusher. `shared`: other stores may write there too, so it says nothing, and is not sent."""

    def __init__(self, memory: MemoryStore, backend: Backend, clock: Clock, *, shared: bool) -> None:
        self._environment = memory.environment
        self._outbox = memory.outbox
        self._backend = backend
        self._clock = clock
        self.shared = shared
        self.greeted: bytes | None = None
        """The incarnation that has looked; None after a failure, and every few seconds: a batch that was on its way
        when the backend lost everything may have put a sentinel there that is as new as the last."""
        self._looked = b""
        """The last incarnation that has."""
        self.initialized = False
        self._place = place_of(memory.environment.path)
        self._stranger: tuple[tuple[bytes, int], int] | None = None

    def next(self) -> list[Row]:
        """What goes with the next batch. Raises Overtaken when the memory store was built anew since the last look."""
        if self.shared:
            return []
        if self._looked != self._environment.uuid:
            raise Overtaken("the memory store was built anew: looking again")
        return [self._row(self._outbox.note(_BEAT) + 1, self._horizon - 1)]

    def _row(self, beat: int, horizon: int) -> Row:
        body = _BODY.pack(self._environment.uuid, self._place, self._clock.now())
        return Row(SENTINEL, State.LIVE, self._environment.epoch, beat, horizon, b"", body)

    @property
    def _horizon(self) -> int:
        """That of a row of ours when we know what stood there, and one less when we do not: the later one is kept, so
        that what was written where nothing stood shows it also to somebody who never saw the answer. It is later than
        all that stores which are gone have written, or will have."""
        return min(2 * FOREVER - 1, FOREVER + 2 * self._environment.epoch)

    async def greet(self) -> bool:
        """Look at what is there before anything is sent, and put our own in its place; whether it had to.

        Once, and again when `greeted` was taken back. Raises Neighbour, BackendError, StoreError.
        """
        looking, boot = self._environment.uuid, self._clock.boot()
        if self.greeted == looking:
            return False
        if not self.initialized:
            await self._backend.initialize()
            self.initialized = True
        if not self.shared:
            await self.ask_history()
            await self._take_over()
        self.greeted = self._looked = looking
        self._environment.vouched = boot
        return True

    async def ask_history(self) -> None:
        """Note it when another server answers than before: it may lack what that one had acknowledged, and what was
        sent since counts as lost. The sentinel does not show all of it: of several servers each goes on by itself."""
        history = getattr(self._backend, "history", None)
        if history is None or self.shared:
            return
        found: bytes = await history()
        if found and self._outbox.note_history(found):
            self.greeted = None

    async def _take_over(self) -> None:
        known = self._environment.epoch, self._outbox.note(_BEAT)  # before: another flusher may go on meanwhile
        found = await self._backend.load(SENTINEL)
        ours = found is not None and self._is_ours(found)
        if found is not None and not ours and found.epoch >= self._environment.epoch:
            self._environment.raise_epoch(found.epoch + 1)
        lost = found is None or not ours or (found.epoch, found.version) < known or found.horizon < self._horizon
        if lost:
            self._outbox.note_loss()
        beat = max(self._outbox.note(_BEAT), 0 if found is None or not ours else found.version) + 1
        row = self._row(beat, self._horizon if lost else self._horizon - 1)
        (answer,) = await self._backend.write([row])
        if not answer.applied or answer.before != (found.mark if found else None):
            if answer.applied:
                self.look_at(answer, row)
            raise Overtaken(f"somebody else has just written to {self._backend.name}: looking again")
        self._outbox.raise_note(_BEAT, beat)

    def look_at(self, answer: Answer, row: Row) -> None:
        """Note it when the backend lost what it had acknowledged, by what our row replaced there."""
        before = answer.before
        if before is None or not answer.applied:
            # All was lost; or another flusher was faster, or another store took over.
            self.greeted = None
        if before is None or (before.epoch, before.version) < (row.epoch, row.version - 1):
            # Of several servers another may have refused it.
            self._outbox.note_loss()
        if answer.applied:
            self._outbox.raise_note(_BEAT, row.version)

    def _is_ours(self, sentinel: Row) -> bool:
        """Whether this incarnation wrote it. Raises Neighbour when another store, that is alive, did."""
        if len(sentinel.body) != _BODY.size:
            return False
        uuid, place, seen = _BODY.unpack(sentinel.body)
        if uuid == self._environment.uuid:
            return True
        if place != self._place and self._may_live((uuid, sentinel.version), seen):
            raise Neighbour(
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


class Recall:
    """Putting back what the backend has lost, so that it waits to be sent again; the dead before all others."""

    def __init__(self, outbox: Outbox, name: str, hooks: Hooks) -> None:
        self._outbox = outbox
        self._name = name
        self._hooks = hooks
        self._begin(-1, _DONE)

    @property
    def count(self) -> int:
        """How many were put back for the last loss."""
        return self._put

    def _begin(self, loss: int, step: int) -> None:
        self._loss, self._step, self._after, self._put, self._passed_over = loss, step, b"", 0, False

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to put back."""
        return self._step == _DONE

    async def put_back(self, count: int) -> None:
        """Put back some `count` sessions: they are sent before more fits into a store that is nearly full."""
        loss = self._outbox.losses()
        if self._loss != loss:
            self._begin(loss, _DONE if loss == self._outbox.note(RECALLED) else _DEAD)
        begin = self._put
        while self._step != _DONE and self._put - begin < count:
            try:
                put, self._after, passed_over = self._outbox.put_back(self._after, dead=self._step == _DEAD)
            except StoreFull:
                return  # sending makes room
            self._put += put
            self._passed_over = self._passed_over or passed_over
            if not self._after:
                self._step += 1
                if self._step == _DONE:
                    self._end()
            await asyncio.sleep(0)

    def _end(self) -> None:
        # Somebody who has the Key of what was passed over must do it too.
        self._outbox.note_put_back(self._loss, by_all=not self._passed_over)
        if self._put:
            logger.warning("%s may lack %s sessions: they are sent again", self._name, self._put)
            self._hooks.emit(BackendForgot(self._put))


def place_of(path: Path) -> bytes:
    """Where a store is, as 16 bytes: the one that comes after it at the same place need not wait for its silence."""
    digest = blake2b(digest_size=16, person=b"shmsession place")
    for part in (socket.gethostname().encode(), _machine(), os.fsencode(path.resolve())):
        digest.update(len(part).to_bytes(4, "big") + part)
    return digest.digest()


def _machine() -> bytes:
    """What tells this machine from others: containers seldom have an id of their own, but the kernel has one."""
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        with contextlib.suppress(OSError):
            if found := Path(path).read_bytes():
                return found
    return b""
