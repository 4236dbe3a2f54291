"""SurrealDB's engine within this process, by its driver: one for all backends of the process, and of no other.

The engine lets several processes open one directory, where each then loses what the others write. So there is a lock,
of the kind that a child does not inherit and that ends with its process. Within one process too it loses what two
transactions write that commit at the same moment: so they take turns.
"""

import asyncio
import fcntl
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from surrealdb import AsyncEmbeddedSurrealConnection

from shmsession import _native
from shmsession.errors import BackendError, BackendUnavailable, ConfigError

from .surrealdb_client import Broken, Client, Failed, outcome

_PAUSE: Final = 0.01
_TURN: Final = 0.001
"""Seconds between two looks whether the lock, or the engine, is free."""

_SPACE: Final = "shmsession"
"""The namespace, and the database, in an engine that nobody else uses."""


class _Engine:
    """An engine that runs here, and how many backends use it."""

    def __init__(self, url: str) -> None:
        self.connection = AsyncEmbeddedSurrealConnection(url)
        self.users = 1
        self._turn = _native.allocate_lock()
        self._has_ended = False

    async def query(self, text: str, variables: dict[str, Any]) -> Mapping[str, Any]:
        """The response."""
        async with self._alone():
            if self._has_ended:
                raise Broken("it was closed")
            return await self.connection.query_raw(text, variables)

    async def end(self) -> None:
        """Close it, when the question at hand is answered; further ones are not."""
        async with self._alone():
            self._has_ended = True
            await self.connection.close()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """When all others are done, those of other event loops too."""
        while not self._turn.acquire(blocking=False):  # noqa: ASYNC110  # an event is of one loop
            await asyncio.sleep(_TURN)
        try:
            yield
        finally:
            self._turn.release()


class _Process:
    """What this process has: engines by their URL, None while one starts or ends, and locks by their files."""

    def __init__(self, *, is_barren: bool = False) -> None:
        self.engines: dict[str, _Engine | None] = {}
        self.locks: dict[Path, int] = {}
        self.guard = _native.allocate_lock()
        self.has_started = False
        self.is_barren = is_barren
        """Whether no engine can run here: what runs them is started once, in a parent, and not inherited."""


_process = _Process()
_inherited: Final[list[_Process]] = []
"""What a parent process had is kept: its end here would disturb the parent."""


def _after_fork_in_child() -> None:
    global _process
    _inherited.append(_process)
    _process = _Process(is_barren=_process.has_started or _process.is_barren)


os.register_at_fork(after_in_child=_after_fork_in_child)


class Embedded(Client):
    """See Client. `path`: the directory; None keeps the rows in memory, until the process ends.

    Rows in memory are of one process for each user and table, so that no other takes its own for the same.
    """

    def __init__(self, path: Path | None, *, table: str, timeout: float) -> None:
        super().__init__(f"surrealdb+{'surrealkv' if path else 'mem'}://", table, timeout)
        self._path = path
        if path is None:
            self._url = "mem://"
            self._lock = Path(tempfile.gettempdir(), f"shmsession-{os.geteuid()}-{table}.lock")
        else:
            self._url = f"surrealkv://{path}"
            self._lock = path.with_name(f"{path.name}.lock")
        self._engine: _Engine | None = None
        self._pid = 0

    async def open(self) -> None:
        """Start the engine, or join in. Raises ConfigError when another process has it until `timeout` is over."""
        if self._engine is not None and self._pid == os.getpid():
            return
        self._engine = None
        if _process.is_barren:
            raise ConfigError(
                f"{self.name} was open in the process from which this one was forked, and does not survive a fork: "
                "open it after the fork only"
            )
        deadline = asyncio.get_running_loop().time() + self.timeout
        while not await self._join():
            if asyncio.get_running_loop().time() >= deadline:
                raise ConfigError(self._refusal())
            await asyncio.sleep(_PAUSE)  # a server that is reloaded has its old worker for a while yet
        self._pid = os.getpid()

    async def close(self) -> None:
        """End the engine, if nobody else here uses it. What is in memory stays, as long as the process."""
        engine, self._engine = self._engine, None
        if engine is None or self._pid != os.getpid():
            return
        with _process.guard:
            engine.users -= 1
            if engine.users or self._path is None:
                return
            _process.engines[self._url] = None
        await asyncio.shield(self._end(engine))

    async def _exchange(self, text: str, variables: dict[str, Any]) -> Mapping[str, Any]:
        if self._engine is None or self._pid != os.getpid():
            raise BackendUnavailable(f"{self.name} is not open in this process: `await backend.open()` first")
        return await outcome(self._engine.query(text, variables))

    async def _join(self) -> bool:
        """Have an engine, unless another process has it, or it is just being started, or ended."""
        with _process.guard:
            if not self._take_lock():
                return False
            if self._url in _process.engines:
                self._engine = _process.engines[self._url]
                if self._engine is not None:
                    self._engine.users += 1
                return self._engine is not None
            _process.engines[self._url] = None
        self._engine = await self._start()
        return True

    async def _start(self) -> _Engine:
        try:
            if self._path is not None:
                self._path.mkdir(mode=0o700, exist_ok=True)
            _process.has_started = True
            engine = _Engine(self._url)
            await outcome(engine.connection.connect())
            await outcome(engine.connection.use(_SPACE, _SPACE))
        except BaseException as error:
            self._forget()
            if isinstance(error, Failed | OSError | ValueError):
                raise BackendError(f"{self._path} cannot be opened: {error}: see that it is ours to write") from error
            raise
        _process.engines[self._url] = engine
        return engine

    async def _end(self, engine: _Engine) -> None:
        try:
            await outcome(engine.end())
        finally:
            self._forget()

    def _forget(self) -> None:
        with _process.guard:
            del _process.engines[self._url]
            if self._path is not None:
                os.close(_process.locks.pop(self._lock))

    def _take_lock(self) -> bool:
        """Whether this process has the lock. With the guard taken."""
        if self._lock in _process.locks:
            return True
        try:
            lock = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise BackendError(
                f"{self._lock} cannot be made ({error.strerror}): see that its directory is there, and that this user "
                "may write in it"
            ) from error
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            return False
        _process.locks[self._lock] = lock
        return True

    def _refusal(self) -> str:
        if self._path is None:
            return (
                f"another process has surrealdb+mem:// with the table {self.table}, and cannot share it: for several "
                "processes use surrealdb+ws://; for another application of one process write ?table="
            )
        return (
            f"another process has {self._path} open, and cannot share it: start one worker only, or a SurrealDB "
            "server, and use surrealdb+ws://"
        )
