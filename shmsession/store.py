"""The session store: joins memory, cookies and settings under the commit. It knows no protocol."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, Self
from weakref import WeakSet

from .backends import Backend, connect
from .behind import Behind
from .clock import Clock, SystemClock
from .commit import SWEEP_BATCH
from .config import (
    SessionConfig,
    backend_url,
    default_name,
    milliseconds,
    warn_of_unknown_variables,
)
from .errors import ConfigError, StoreError
from .finding import Credential
from .flusher import Flusher
from .hooks import Hook, Hooks
from .id_filter import IdFilter
from .ids import handle_of, is_id, new_id
from .keyring import Keyring
from .live import Following, Live
from .memory.place import default_directory, open_directory
from .memory.store import Conflict, MemoryStore, Missing
from .record import NEVER, Changes, Record
from .rows import Rows
from .session import Resolved, Session
from .tokens import Ticket
from .transport import Transport
from .users import SyncUserSessions, UserSessions
from .variables import PREFIX

logger = logging.getLogger("shmsession")

NOBODY: Final = Resolved(consent=True)
"""Scripts and jobs that make a session know what they do."""


class Stats(NamedTuple):
    """Numbers for operators. `counters` are those of all processes since the store was made, `events` of this one.

    sessions: in memory. pages: of 4 KiB. readers: slots in use. outbox: commits that wait for the backend; flush_lag:
    how long the oldest of them has waited, in seconds.
    """

    sessions: int
    pages_used: int
    pages: int
    readers: int
    outbox: int
    flush_lag: float
    counters: dict[str, int]
    events: dict[str, int]


_making = threading.Lock()


def _after_fork_in_child() -> None:
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


class SessionStore(UserSessions):
    """The sessions of one application on this host.

    `backend` keeps them beyond this host's memory: a URL such as sqlite:///sessions.db, or an object of your own
    (`shmsession.backends.Backend`). "none": memory only, across restarts of the server but not of the machine. None:
    what SHMSESSION_BACKEND says, or memory only. Settings come from `config`, and what it leaves open from SHMSESSION_*
    variables. `name` and `clock` override the configured name and the system's clocks; `hooks` are called with the
    events of `shmsession.hooks`. Nothing is opened before the first use, or `open()`. Raises ConfigError.
    """

    def __init__(
        self,
        backend: str | Backend | None = None,
        *,
        config: SessionConfig | None = None,
        name: str | None = None,
        hooks: Sequence[Hook] = (),
        clock: Clock | None = None,
    ) -> None:
        chosen = backend_url() if backend is None else backend
        warn_of_unknown_variables()
        config = config or SessionConfig()
        self.config = config if name is None else replace(config, name=name)
        self.name = self.config.name or default_name(Path.cwd())
        self.hooks = Hooks(hooks)
        self.clock: Clock = clock or SystemClock()
        self.max_size = self.config.max_size
        self.writes_through = self.config.write == "through"
        self.mode = self.config.mode
        self._touch_interval = max(1, milliseconds(self.config.effective_touch_interval))
        self._told_of_scheme = False
        if chosen == "none":
            chosen = None
        try:
            self._backend = connect(chosen) if isinstance(chosen, str) else chosen
        except ConfigError as error:
            if backend is not None:
                raise
            raise ConfigError(f"{PREFIX}BACKEND: {error}") from error
        self.is_persistent = self._backend is not None
        """Whether a backend keeps sessions beyond this machine's memory."""
        self._memory: MemoryStore | None = None
        self._behind: Behind | None = None
        self._check_keys()
        _stores.add(self)

    # ── lifetime ──────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> Self:
        """Open the memory store in this process now instead of at first use, and begin to flush to the backend.

        Raises ConfigError, StoreError. A backend that is down is no error.
        """
        self.memory.open()
        if self._backend is not None:
            try:
                self.behind.open()
            except ConfigError:
                self.close()
                raise
        return self

    def close(self) -> None:
        """Close the memory store in this process; sessions stay. A later use opens it again, and reads the key file.

        What waits for the backend goes on waiting; `flush` sends it first.
        """
        behind, self._behind = self._behind, None
        if behind is not None:
            if behind.pid == os.getpid():
                behind.close()
            else:
                _inherited.append(behind)
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()
        for cached in ("transport", "keyring", "live"):  # else a server that preloads would never hear of new Keys
            self.__dict__.pop(cached, None)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SessionStore {self.name!r}>"

    @cached_property
    def keyring(self) -> Keyring:
        """The configured Keys, or those of the key file. Raises ConfigError."""
        path = getattr(self._backend, "path", None)
        return self.config.keyring(self.name, None if path is None else Path(f"{path}.key"))

    def _check_keys(self) -> None:
        if self._backend is not None and self._backend.remote and not (self.config.keys or self.config.key_file):
            raise ConfigError(
                f"sessions in {self._backend.name} outlive this machine, so the Keys that seal their cookies must too: "
                "set SHMSESSION_KEY (keys) to what Key.generate() prints, or SHMSESSION_KEY_FILE"
            )

    @cached_property
    def transport(self) -> Transport:
        """Reads and writes what belongs to this store's sessions in requests and responses."""
        return Transport(self.config, self.keyring)

    def new_id(self) -> str:
        """See Committer. Raises StoreError when `id_generator` gives what is no id."""
        if self.config.id_generator is None:
            return new_id()
        made = str(self.config.id_generator())
        if not is_id(made):
            raise StoreError(
                "id_generator gave what is no id: 16 to 128 letters, digits, dots, dashes, underscores, tildes"
            )
        return made

    @property
    def memory(self) -> MemoryStore:
        """The memory store under it, for tools; made at first use."""
        if self._memory is None:
            with _making:
                if self._memory is None:
                    self._memory = self._make_memory()
        return self._memory

    def _make_memory(self) -> MemoryStore:
        memory = MemoryStore(
            self.config.directory, self.name, self.keyring, self.config.lifetimes, self.clock,
            map_size=self.config.map_size, max_size=self.max_size, hooks=self.hooks, backend=self.is_persistent,
            max_sessions_per_user=self.config.max_sessions_per_user,
            refuse_more=self.config.too_many_sessions == "refuse",
        )  # fmt: skip
        logger.info("session store %r in %s", self.name, memory.environment.path)
        return memory

    @property
    def path(self) -> Path:
        """The directory of this store."""
        return self.memory.environment.path

    def check(self) -> None:
        """Raise what would stop the start, as far as it can be told without opening the store: UnsafeStore."""
        os.close(open_directory(self.config.directory or default_directory()))

    @property
    def behind(self) -> Behind:
        """What stands behind the memory store in this process. Raises ConfigError without a backend."""
        behind = self._behind
        if behind is None or behind.pid != os.getpid():
            memory = self.memory
            with _making:
                behind = self._behind
                if behind is None or behind.pid != os.getpid():
                    behind = self._behind = self._make_behind(memory)
        return behind

    def _make_behind(self, memory: MemoryStore) -> Behind:
        if self._backend is None:
            raise ConfigError("this store has no backend: give it one, such as SessionStore('sqlite:///sessions.db')")
        if self._behind is not None:
            _inherited.append(self._behind)
        backend = self._backend
        rows = Rows(Keyring(self.config.database_keys, "database") if self.config.database_keys else None)

        wanted = self.transport.is_plain and not self.config.allow_shared
        id_filter = IdFilter(memory, backend, self.clock, wanted=wanted)

        def make_flusher() -> Flusher:
            return Flusher(
                memory, backend, rows, self.clock, self.hooks, shared=self.config.allow_shared,
                interval=self.config.flush_interval.total_seconds(),
                memory_lifespan=milliseconds(self.config.memory_lifespan), id_filter=id_filter,
            )  # fmt: skip

        load_seconds = self.config.load_timeout.total_seconds()
        return Behind(memory, backend, rows, self.clock, make_flusher, load_seconds=load_seconds, id_filter=id_filter)

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────

    def request_session(self, credential: Credential, *, readonly: bool = False) -> Session:
        """The session of a request: nothing is read before the application looks."""
        return Session(self, credential, readonly=readonly)

    def session(self, session_id: str | None = None) -> Session:
        """The session with this id (`Session.id`), or a new one: for scripts and jobs. `save()` it when done.

        An id that is unknown, ended or malformed gives an empty session that is not stored. Raises StoreError.
        """
        session = Session(self, NOBODY)
        if session_id is not None and is_id(session_id):
            session.start(self._find(Ticket(session_id, handle_of(session_id), NEVER), self.clock.now(), (None, True)))
        return session

    @cached_property
    def live(self) -> Live:
        """What follows sessions for `Session.changes` in this process, until the store is closed."""
        return Live(self.memory, self.clock, backend=self.is_persistent)

    def changes(self, session: Session) -> AsyncIterator[frozenset[str]]:
        """See `Port.changes`."""
        return Following(self.live, session)

    def swap(self, handle: bytes, base: Record, changes: Changes) -> tuple[Record, bool] | None:
        """See `Port.swap`."""
        found = self.memory.update(handle, base, changes, self.clock.now())
        if found is Missing.UNKNOWN and self.refill(handle):
            found = self.memory.update(handle, base, changes, self.clock.now())
        if isinstance(found, Missing):
            return None
        if isinstance(found, Conflict):
            return found.record, False
        self.wrote()
        return found, True

    def wrote(self) -> None:
        """See `Committer.wrote`."""
        behind = self._behind
        if behind is not None and behind.flushes and behind.pid == os.getpid():  # as nearly always; spares three calls
            return
        if self.is_persistent:
            self.behind.see_to_it()

    def issued(self, handle: bytes) -> None:
        """See Committer."""
        if self.is_persistent and self.transport.is_plain:
            self.behind.id_filter.note(handle)

    def refill(self, handle: bytes) -> bool:
        """See `Committer.refill`."""
        return self._backend is not None and isinstance(self.behind.load(handle), Record)

    def note_scheme(self, scheme: str) -> None:
        """A cookie was set in answer to a request of this scheme: say once when the browser will not send it back."""
        if self.config.secure and scheme not in ("https", "wss") and not self._told_of_scheme:
            self._told_of_scheme = True
            logger.warning(
                "a Secure session cookie was set over plain http, where browsers do not send it back: for development "
                "set SHMSESSION_SECURE=0 (test clients: base_url='https://testserver'); behind a TLS proxy let the "
                "server trust its X-Forwarded-Proto"
            )

    # ── the backend ───────────────────────────────────────────────────────────────────────────────────────────

    async def persisted(self, handles: tuple[bytes, ...], timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """See `Session.persisted`."""
        with contextlib.suppress(StoreError):  # what was committed is committed
            return self._backend is None or await self.behind.wait_async(handles, self._patience(timeout))
        return False

    async def flush(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Send all that waits to the backend; whether all went within `timeout` seconds (None: `drain_timeout`)."""
        return self._backend is None or await self.behind.drain_async(self._drain_seconds(timeout))

    async def initialize(self) -> None:
        """Make the backend's tables, or migrate them. The first flush does it too. Raises BackendError, ConfigError."""
        await self.behind.initialize()

    async def copy_from(self, source: str | Backend) -> int:
        """Copy every session of another database, by URL or as an object, to the backend; how many were written.

        No server may use either meanwhile: what it changes could be missing, or what it destroys live again. What is in
        the backend and newer stays. `database_keys` must be those under which the sessions are sealed there, for they
        are copied as they are. Raises BackendError, ConfigError; after an error call it again.
        """
        return await self.behind.copy_from(connect(source) if isinstance(source, str) else source)

    async def clear_backend(self) -> int:
        """Destroy every session that the backend has, on this host and elsewhere; returns how many it had.

        Raises BackendError, ConfigError.
        """
        known = await self.behind.clear()
        self.memory.cleared()
        self.clear()
        return known

    @cached_property
    def sync(self) -> "Sync":
        """The methods that may wait for the backend, for code without an event loop."""
        return Sync(self)

    def _patience(self, timeout: float | None) -> float:
        return self.config.through_timeout.total_seconds() if timeout is None else timeout

    def _drain_seconds(self, timeout: float | None) -> float:
        return self.config.drain_timeout.total_seconds() if timeout is None else timeout

    # ── keeping house ─────────────────────────────────────────────────────────────────────────────────────────

    def count(self) -> int:
        """How many sessions are in memory."""
        return self.memory.count()

    def cleanup(self) -> int:
        """Remove every session that has ended; returns how many. Requests do this by themselves, bit by bit."""
        removed = 0
        while swept := self.memory.sweep(self.clock.now(), SWEEP_BATCH):
            removed += swept
        return removed

    def clear(self) -> int:
        """Destroy every session on this host, in all processes; returns how many."""
        return self.memory.clear()

    def free_dead_readers(self) -> None:
        """Free the reader slots that killed processes held; each process does so too, every few seconds.

        It does not open the store here, and waits for nobody. Raises StoreError.
        """
        self.memory.environment.free_dead_readers()

    def stats(self) -> Stats:
        """Numbers for operators. Raises StoreError."""
        usage = self.memory.usage()
        memory = self.memory
        return Stats(
            self.count(), usage.used, usage.total, memory.environment.readers(), len(memory.outbox),
            memory.outbox.age() / 1000, memory.environment.counters.totals(), dict(self.hooks.counts),
        )  # fmt: skip


_stores: "WeakSet[SessionStore]" = WeakSet()
_inherited: list[Behind] = []
"""What a parent had open before a fork is kept: its end in the child would disturb the parent."""


class Sync(SyncUserSessions):
    """What of a store may wait for its backend, each blocking the calling thread."""

    def __init__(self, store: SessionStore) -> None:
        self._store: SessionStore = store

    def persisted(self, session: Session, timeout: float | None = None) -> bool:
        """See `Session.persisted`."""
        handle = session.handle
        return handle is None or self.wait((bytes.fromhex(handle),), timeout)

    def wait(self, handles: tuple[bytes, ...], timeout: float | None = None) -> bool:
        """See `SessionStore.persisted`."""
        store = self._store
        with contextlib.suppress(StoreError):  # what was committed is committed
            return not store.is_persistent or store.behind.wait(handles, store._patience(timeout))
        return False

    def flush(self, timeout: float | None = None) -> bool:
        """See `SessionStore.flush`."""
        store = self._store
        return not store.is_persistent or store.behind.drain(store._drain_seconds(timeout))

    def initialize(self) -> None:
        """See `SessionStore.initialize`."""
        asyncio.run(self._store.initialize())

    def copy_from(self, source: str | Backend) -> int:
        """See `SessionStore.copy_from`."""
        return asyncio.run(self._store.copy_from(source))

    def clear_backend(self) -> int:
        """See `SessionStore.clear_backend`."""
        return asyncio.run(self._store.clear_backend())


def stores() -> list[SessionStore]:
    """The session stores that this process has made and still uses."""
    return list(_stores)
