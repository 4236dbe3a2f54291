"""The session store: joins memory, cookies and settings, and commits what a request did. It knows no protocol."""

import contextlib
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
from .config import SessionConfig, backend_url, default_name, milliseconds, warn_of_unknown_variables
from .cookies import Cookies, Ticket
from .errors import (
    ConfigError,
    ReadOnlySession,
    ResponseStarted,
    SessionGone,
    ShmSessionError,
    StoreError,
    StoreFull,
)
from .hooks import CommitDropped, CookieRefused, Hook, Hooks
from .ids import handle_of, new_id, text_of
from .keyring import Keyring
from .memory.place import default_directory, open_directory
from .memory.store import Conflict, MemoryStore, Missing
from .record import NEVER, USER_KEY, Changes, Record
from .session import NOTHING, Resolved, Session

logger = logging.getLogger("shmsession")

SWEEP_INTERVAL_MS: Final = 5_000
SWEEP_BATCH: Final = 100

Credential = Callable[[], bytes]
"""Gives a request's Cookie header, joined with "; " when there were several; called when the application looks."""


class Outcome(NamedTuple):
    """What a commit asks of the response. `vary`: the application looked at its session."""

    vary: bool = False
    set_cookie: str | None = None

    def __repr__(self) -> str:
        return f"<Outcome, {'a' if self.set_cookie else 'no'} cookie>"


UNTOUCHED: Final = Outcome()
LOOKED: Final = Outcome(vary=True)


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


class SessionStore:
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
        self._touch_interval = max(1, milliseconds(self.config.touch_interval))
        self._next_sweep = 0
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

    def save(self, session: Session) -> None:
        """Commit a session's changes now (`Session.save`)."""
        self._commit(session, self.clock.now())
        if session.gone:
            raise SessionGone("the session was renewed, destroyed or expired while this request held it")

    # ── commit ────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, session: Session, *, failed: bool = False) -> Outcome:
        """Write what a request did to its session when its response begins; `failed` drops it.

        Returns what the response must carry. After the headers have left (`session.headers_sent`) it writes what came
        since. Raises StoreError, ResponseStarted, SessionTooLarge, UnsupportedValue.
        """
        if not session.loaded or (session.headers_sent and session.is_settled):
            return UNTOUCHED
        now = self.clock.now()
        if failed and not self.config.save_on_error:
            session.discard()
        else:
            self._commit(session, now)
        session.settle()
        if not (session.owes_cookie or session.drops_cookie):
            return LOOKED if session.accessed else UNTOUCHED
        return Outcome(session.accessed, self._cookie(session, now))

    def commit_failed(self, session: Session) -> None:
        """After an exception that leaves no response to carry a cookie: with `save_on_error` keep what needs none."""
        if not session.loaded:
            return
        session.headers_sent = True
        try:
            if self.config.save_on_error:
                self._commit(session, self.clock.now())
        except ShmSessionError as error:  # the application's own exception is on its way, and must arrive
            logger.warning("an exception ended a request, and what it changed cannot be kept: %s", error)
        session.discard()

    def _cookie(self, session: Session, now: int) -> str | None:
        """The Set-Cookie that the response must carry."""
        if session.headers_sent or session.gone:
            return None
        if session.owes_cookie and session.secret is not None:
            return self.cookies.issue(session.secret, now)
        return self.cookies.expire() if session.drops_cookie else None

    def _commit(self, session: Session, now: int) -> None:
        touch = self._touch_due(session, now)
        if session.is_unchanged and not touch:
            return
        if session.is_emptied and session.raw_handle is not None:
            session.destroy()
            return
        changes = session.pending(touch=touch)
        if changes is None:
            return
        if session.readonly:
            raise ReadOnlySession(
                "a value of a read-only session was changed in place: see readonly= of the middleware"
            )
        if session.gone:
            self._drop(session, changes, now)
        elif session.record is None:
            self._create(session, changes, now)
        elif session.wants_renewal:
            self._renew(session, session.record, changes, now)
        else:
            self._update(session, session.record, changes, now)
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_INTERVAL_MS
            with contextlib.suppress(StoreError):  # the commit is done; the next one will sweep
                self.memory.sweep(now, SWEEP_BATCH)

    def _touch_due(self, session: Session, now: int) -> bool:
        record = session.record
        if record is None or session.gone or session.readonly or not session.accessed:
            return False
        return now - record.header.last_seen >= self._touch_interval

    def _create(self, session: Session, changes: Changes, now: int) -> None:
        user = session.encoded_user
        if not (changes.set or user is not None or session.wants_creation):
            return
        self._need_headers(session)
        secret = new_id()
        handle = handle_of(secret)
        stored = changes.set if user is None else {**changes.set, USER_KEY: user}
        record = self.memory.create(handle, changes._replace(set=stored), now)
        if record is None:  # pragma: no cover  # 256 random bits met twice
            raise StoreError("the operating system's random source repeats itself")
        session.committed(secret, handle, record, changes)

    def _renew(self, session: Session, record: Record, changes: Changes, now: int) -> None:
        self._need_headers(session)
        assert session.raw_handle is not None
        secret, user = new_id(), session.encoded_user
        old, new = session.raw_handle, handle_of(secret)
        found = self.memory.renew(old, new, record, changes, now, user, login=session.logs_in)
        if isinstance(found, Missing):
            self._drop(session, changes, now)
        else:
            session.committed(secret, new, found, changes)

    def _update(self, session: Session, record: Record, changes: Changes, now: int) -> None:
        secret, handle = session.secret, session.raw_handle
        assert secret is not None
        assert handle is not None
        sealed_by_newest = record.header.key_id == self.keyring.newest_id
        if sealed_by_newest and changes.changes_nothing_in(record) and self._is_current(handle, record, now):
            session.committed(secret, handle, record, changes)
            return
        try:
            found = self.memory.update(handle, record, changes, now)
        except StoreFull:
            if not changes.is_touch:
                raise
            return
        if isinstance(found, Record):
            session.committed(secret, handle, found, changes)
        else:
            self._drop(session, changes, now)

    def _is_current(self, handle: bytes, record: Record, now: int) -> bool:
        found = self.memory.load(handle, now)
        return isinstance(found, Record) and found.raw == record.raw

    def _drop(self, session: Session, changes: Changes, now: int) -> None:
        """The session ended elsewhere: nothing is written, no cookie sent; but a login begins a session of its own."""
        if session.logs_in and not session.headers_sent:
            session.begin_anew()
            anew = session.pending()
            assert anew is not None
            self._create(session, anew, now)
            return
        session.gone = True
        session.discard()
        if not changes.is_touch:
            self.hooks.emit(CommitDropped(session.handle or ""))

    def _need_headers(self, session: Session) -> None:
        if session.headers_sent:
            raise ResponseStarted(
                "the session needs a new cookie, but the response has begun: store something in it, call create(), or "
                "renew() it before the first byte (before accept() on a websocket)"
            )

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
