"""The session store: joins memory, cookies and settings under the commit. It knows no protocol."""

import logging
import os
import threading
from base64 import urlsafe_b64decode
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Final, NamedTuple, Self
from weakref import WeakSet

from .clock import Clock, SystemClock
from .commit import SWEEP_BATCH, Committer
from .config import SessionConfig, backend_url, default_name, milliseconds, warn_of_unknown_variables
from .cookies import Cookies, Ticket
from .errors import ConfigError
from .hooks import CookieRefused, Hook, Hooks
from .ids import handle_of, text_of
from .keyring import Keyring
from .memory.place import default_directory, open_directory
from .memory.store import Conflict, MemoryStore, Missing
from .record import NEVER, Changes, Record
from .session import NOTHING, Resolved, Session

logger = logging.getLogger("shmsession")

Credential = Callable[[], bytes]
"""Gives a request's Cookie header, joined with "; " when there were several; called when the application looks."""


class Stats(NamedTuple):
    """Sessions in memory, pages of 4 KiB in use and in all, reader slots in use; events of this process by kind."""

    sessions: int
    pages_used: int
    pages: int
    readers: int
    events: dict[str, int]


_making = threading.Lock()


def _after_fork_in_child() -> None:
    global _making
    _making = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


class SessionStore(Committer):
    """The sessions of one application on this host.

    `backend` None keeps them in memory only, across restarts of the server but not of the machine. Settings come from
    `config`, and what it leaves open from SHMSESSION_* variables. `name` and `clock` override the configured name and
    the system's clocks; `hooks` are called with the events of `shmsession.hooks`. Nothing is opened before the first
    use, or `open()`. Raises ConfigError.
    """

    def __init__(
        self,
        backend: str | None = None,
        *,
        config: SessionConfig | None = None,
        name: str | None = None,
        hooks: Sequence[Hook] = (),
        clock: Clock | None = None,
    ) -> None:
        url = backend_url() if backend is None else backend
        if url is not None:
            raise ConfigError(
                "SHMSESSION_BACKEND (backend): this version keeps sessions in memory only: leave it out, or write none"
            )
        warn_of_unknown_variables()
        config = config or SessionConfig()
        self.config = config if name is None else replace(config, name=name)
        self.name = self.config.name or default_name(Path.cwd())
        self.hooks = Hooks(hooks)
        self.clock: Clock = clock or SystemClock()
        self.max_size = self.config.max_size
        self._touch_interval = max(1, milliseconds(self.config.effective_touch_interval))
        self._told_of_scheme = False
        self._memory: MemoryStore | None = None
        _stores.add(self)

    # ── lifetime ──────────────────────────────────────────────────────────────────────────────────────────────

    def open(self) -> Self:
        """Open the memory store in this process now instead of at first use. Raises ConfigError, StoreError."""
        self.memory.open()
        return self

    def close(self) -> None:
        """Close the memory store in this process; sessions stay. A later use opens it again."""
        memory, self._memory = self._memory, None
        if memory is not None:
            memory.close()

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SessionStore {self.name!r}>"

    @cached_property
    def keyring(self) -> Keyring:
        """The configured Keys, or those of the key file. Raises ConfigError."""
        return self.config.keyring(self.name)

    @cached_property
    def cookies(self) -> Cookies:
        """Reads and writes this store's cookie."""
        return Cookies(self.config, self.keyring)

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
            map_size=self.config.map_size, max_size=self.max_size, hooks=self.hooks,
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
    def is_persistent(self) -> bool:
        """Whether a backend keeps sessions beyond this machine's memory."""
        return False

    # ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────

    def request_session(self, credential: Credential, *, readonly: bool = False) -> Session:
        """The session of a request: nothing is read before the application looks."""
        return Session(self, credential, readonly=readonly)

    def session(self, session_id: str | None = None) -> Session:
        """The session with this id (`Session.id`), or a new one: for scripts and jobs. `save()` it when done.

        An id that is unknown, ended or malformed gives an empty session that is not stored. Raises StoreError.
        """
        session = Session(self)
        if session_id is not None:
            try:
                secret = urlsafe_b64decode(session_id + "=" * (-len(session_id) % 4))
            except ValueError:
                secret = b""
            if text_of(secret) != session_id:
                secret = b""  # the decoder passes over what is no base64
            session.start(self._find(Ticket(secret, handle_of(secret), NEVER), self.clock.now()))
        return session

    def resolve(self, credential: Credential) -> Resolved:
        """What a request's cookie leads to. A cookie that is no session is told to the hooks, never adopted."""
        ticket = self.cookies.read(credential())
        if ticket is None:
            return NOTHING
        if isinstance(ticket, str):
            self.hooks.emit(CookieRefused(ticket))
            return _NO_SESSION
        return self._find(ticket, self.clock.now())

    def _find(self, ticket: Ticket, now: int) -> Resolved:
        found = self.memory.load(ticket.handle, now)
        if isinstance(found, Missing):
            gone = found in (Missing.DEAD, Missing.RENEWED)
            return Resolved(None, ticket.handle if gone else None, gone=gone, presented=True)
        return Resolved(ticket.session_id, ticket.handle, found, now > ticket.stale_after, False, True)

    def swap(self, handle: bytes, base: Record, changes: Changes) -> tuple[Record, bool] | None:
        """See `Port.swap`."""
        found = self.memory.update(handle, base, changes, self.clock.now())
        if isinstance(found, Missing):
            return None
        return (found.record, False) if isinstance(found, Conflict) else (found, True)

    def kill(self, handle: bytes) -> bool:
        """See `Port.kill`."""
        return self.memory.destroy(handle, self.clock.now())

    def note_scheme(self, scheme: str) -> None:
        """A cookie was set in answer to a request of this scheme: say once when the browser will not send it back."""
        if self.config.secure and scheme not in ("https", "wss") and not self._told_of_scheme:
            self._told_of_scheme = True
            logger.warning(
                "a Secure session cookie was set over plain http, where browsers do not send it back: for development "
                "set SHMSESSION_SECURE=0 (test clients: base_url='https://testserver'); behind a TLS proxy let the "
                "server trust its X-Forwarded-Proto"
            )

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
        return Stats(self.count(), usage.used, usage.total, self.memory.environment.readers(), dict(self.hooks.counts))


_NO_SESSION: Final = Resolved(presented=True)
_stores: "WeakSet[SessionStore]" = WeakSet()


def stores() -> list[SessionStore]:
    """The session stores that this process has made and still uses."""
    return list(_stores)
