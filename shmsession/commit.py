"""The commit: from what a request did to its session, to the memory store and the response. It knows no protocol."""

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Final, NamedTuple

from .clock import Clock
from .codec import encode
from .config import SessionConfig, SessionMode
from .errors import (
    ReadOnlySession,
    ResponseStarted,
    SessionGone,
    ShmSessionError,
    StoreError,
    StoreFull,
    TooManySessions,
)
from .headers import RawHeaders
from .hooks import CommitDropped, Created, Destroyed, Hooks, LoggedIn, LoginRefused, Renewed
from .ids import handle_of, tag_of
from .keyring import Keyring
from .memory.store import ID_IN_USE, MemoryStore, Missing
from .memory.users import Entry
from .record import DEVICE_KEY, LONGTERM, USER_KEY, Changes, DataKey, Record
from .session import Session
from .transport import NOTHING_PRESENTED, Presented, Transport

logger = logging.getLogger("shmsession")

SWEEP_INTERVAL_MS: Final = 5_000
SWEEP_BATCH: Final = 100
LOGIN_BYTES: Final = 32
"""What a login takes in a record at most, beside the user and the device."""


class Outcome(NamedTuple):
    """What a commit asks of the response. `vary`: the application looked at its session.

    `through`: sessions that the backend should have heard of before the response leaves. `headers`: to be added.
    """

    vary: bool = False
    headers: Sequence[tuple[bytes, bytes]] = ()
    through: tuple[bytes, ...] = ()

    @property
    def set_cookie(self) -> str | None:
        """The first cookie among the headers."""
        return next((value.decode("latin-1") for name, value in self.headers if name == b"set-cookie"), None)

    def __repr__(self) -> str:
        return f"<Outcome, {len(self.headers)} headers>"


UNTOUCHED: Final = Outcome()
LOOKED: Final = Outcome(vary=True)


class Committer(ABC):
    """Writes what requests did to their sessions. A session store is one that has these parts."""

    config: SessionConfig
    clock: Clock
    hooks: Hooks
    max_size: int
    _touch_interval: int
    is_persistent: bool
    writes_through: bool
    mode: SessionMode
    _next_sweep = 0
    _told_of_logins = False

    @property
    @abstractmethod
    def transport(self) -> Transport:
        """Writes what the client is to know."""
        ...

    @property
    @abstractmethod
    def keyring(self) -> Keyring:
        """Its newest Key seals records."""
        ...

    @property
    @abstractmethod
    def memory(self) -> MemoryStore:
        """Where records are."""
        ...

    @abstractmethod
    def new_id(self) -> str:
        """An id that nobody has."""
        ...

    @abstractmethod
    def wrote(self) -> None:
        """See to it that what was just committed is flushed, by this process if need be."""
        ...

    @abstractmethod
    def issued(self, handle: bytes) -> None:
        """A session is about to get a token, or to be known by its id."""
        ...

    @abstractmethod
    def refill(self, handle: bytes) -> bool:
        """Whether the backend had a session that left memory while a request held it; then it is there again.

        Blocks while the backend is asked, which is rare: nothing leaves within a minute of its last change. Raises
        BackendError.
        """
        ...

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
        if not (session.owes_cookie or session.drops_cookie or session.through or session.choice is not None):
            return LOOKED if session.accessed else UNTOUCHED
        through, session.through = session.through, ()
        return Outcome(session.accessed, self._headers(session, now), through if self.is_persistent else ())

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

    def withdrawn(self, session: Session) -> Outcome:
        """What a page must carry although its request failed: that the visitor does not agree to be remembered."""
        if session.kept_choice is not False:
            return UNTOUCHED
        session.choice = False
        through, session.through = session.through, ()
        return Outcome(True, self._headers(session, self.clock.now()), through if self.is_persistent else ())

    def save(self, session: Session) -> None:
        """Commit a session's changes now (`Session.save`)."""
        self._commit(session, self.clock.now())
        if session.gone:
            raise SessionGone("the session was renewed, destroyed or expired while this request held it")

    def kill(self, handle: bytes) -> bytes | None:
        """See `Port.kill`."""
        killed = self.memory.destroy(handle, self.clock.now())
        if killed is not None:
            self.wrote()
            self.hooks.emit(Destroyed(killed.hex()))
        return killed

    def _headers(self, session: Session, now: int) -> RawHeaders:
        """What the response must carry."""
        if session.headers_sent:
            return []
        origin: Presented = session.origin or NOTHING_PRESENTED
        headers: RawHeaders = []
        if not session.gone and session.owes_cookie and session.secret is not None:
            assert session.raw_handle is not None
            self.issued(session.raw_handle)
            headers = self.transport.issue(session.secret, now, origin, longterm=session.longterm)
        elif not session.gone and session.drops_cookie:
            headers = self.transport.expire(origin)
        if session.tells_choice:
            assert session.choice is not None
            headers = [*headers, *self.transport.choose(session.choice, origin)]
            session.told()
        return headers

    def _commit(self, session: Session, now: int) -> None:
        if session.is_emptied and session.raw_handle is not None:
            session.destroy()
            return
        changes = session.pending(touch=self._touch_due(session, now))
        if changes is None:
            return
        if session.readonly:
            raise ReadOnlySession(
                "a read-only session was changed in place, or before it was opened read-only: see readonly= of the "
                "middleware and of Session.of"
            )
        try:
            self._write(session, changes, now)
        except TooManySessions:
            self.hooks.emit(LoginRefused(session.handle or "", (session.user_tag or b"").hex()))
            session.discard()  # whoever catches it can answer with a page that says so
            raise
        if self.is_persistent:
            self.wrote()
        if self.writes_through and session.raw_handle is not None and not changes.is_touch:
            session.wait_for(session.raw_handle)
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_INTERVAL_MS
            with contextlib.suppress(StoreError):  # the commit is done; the next one will sweep
                self.memory.sweep(now, SWEEP_BATCH)

    def _write(self, session: Session, changes: Changes, now: int) -> None:
        if session.gone:
            self._drop(session, changes, now)
        elif session.record is None:
            self._create(session, changes, now)
        elif session.edits.renew:
            self._renew(session, session.record, changes, now)
        else:
            self._update(session, session.record, changes, now)

    def _touch_due(self, session: Session, now: int) -> bool:
        record = session.record
        if record is None or session.gone or session.readonly or not session.accessed:
            return False
        return now - record.header.last_seen >= self._touch_interval

    def _create(self, session: Session, changes: Changes, now: int) -> None:
        user = session.encoded_user
        if not (changes.set or user is not None or session.edits.create):
            return
        if not (session.storable or self.mode is SessionMode.PERSISTENT):
            self._keep_nothing(session)
            return
        self._need_headers(session)
        if session.edits.logs_in and session.raw_handle is not None and not session.gone:
            self.kill(session.raw_handle)  # the backend could not say whose it is: nobody's any more
        secret = self.new_id()
        handle = handle_of(secret)
        stored = changes if user is None else self._with_device(session, _with(changes, USER_KEY, user))
        entry = Entry(session.edits.asked)
        record = self.memory.create(handle, stored, now, entry)
        if record is None:
            raise StoreError(ID_IN_USE)
        if isinstance(record, Missing):
            self._lose(session, changes)
            return
        self.issued(handle)
        session.committed(secret, handle, record, changes)
        self.hooks.emit(Created(handle.hex(), logged_in=user is not None))
        if user is not None:
            self.hooks.emit(LoggedIn(handle.hex(), tag_of(user).hex()))
        self._made_way(session, entry)

    def _keep_nothing(self, session: Session) -> None:
        """The visitor has not agreed to be remembered: what the request stored ends with it."""
        if session.edits.logs_in and not self._told_of_logins:
            self._told_of_logins = True
            logger.warning(
                "a login was not kept, for the visitor has not agreed to be remembered: call set_store(True) with it, "
                "if your login page says so"
            )

    def _renew(self, session: Session, record: Record, changes: Changes, now: int) -> None:
        self._need_headers(session)
        assert session.raw_handle is not None
        secret, user = self.new_id(), session.encoded_user
        old, new = session.raw_handle, handle_of(secret)
        login, entry = session.edits.logs_in, Entry(session.edits.asked)
        stored = self._with_device(session, changes) if login else changes
        found = self.memory.renew(old, new, record, stored, now, user, login=login, entry=entry)
        if found is Missing.UNKNOWN and self.refill(old):
            found = self.memory.renew(old, new, record, stored, now, user, login=login, entry=entry)
        if isinstance(found, Missing):
            self._drop(session, changes, now)
        else:
            session.wait_for(old)
            if self.writes_through:  # also when nothing was stored but the user
                session.wait_for(new)
            self.issued(new)
            session.committed(secret, new, found, changes)
            self.hooks.emit(Renewed(new.hex(), old.hex(), logged_in=login))
            if login and user is not None:
                self.hooks.emit(LoggedIn(new.hex(), tag_of(user).hex()))
            self._made_way(session, entry)

    def _with_device(self, session: Session, changes: Changes) -> Changes:
        """The same with what is known of the client of a login, if the session has room for it."""
        if session.carried is None or not self.config.record_device:
            return changes
        device = encode(self.transport.device(session.carried(self.transport)))
        if session.edits.size + len(session.encoded_user or b"") + len(device) + LOGIN_BYTES > self.max_size:
            return changes
        return _with(changes, DEVICE_KEY, device)

    def _made_way(self, session: Session, entry: Entry) -> None:
        """The sessions that ended for this login are ended like others."""
        for handle in entry.ended:
            session.wait_for(handle)
            self.hooks.emit(Destroyed(handle.hex()))

    def _update(self, session: Session, record: Record, changes: Changes, now: int) -> None:
        secret, handle = session.secret, session.raw_handle
        assert secret is not None
        assert handle is not None
        sealed_by_newest = record.header.key_id == self.keyring.newest_id
        if sealed_by_newest and changes.changes_nothing_in(record) and self._is_current(handle, record, now):
            session.committed(secret, handle, record, changes)
            return
        if self.config.browser_session and changes.longterm is not None:
            if changes.longterm != bool(record.header.flags & LONGTERM):
                self._need_headers(session)
            session.owes_cookie = True
        try:
            found = self.memory.update(handle, record, changes, now)
            if found is Missing.UNKNOWN and self.refill(handle):
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
        if session.edits.logs_in and not session.headers_sent:
            session.begin_anew()
            anew = session.pending()
            assert anew is not None
            self._create(session, anew, now)
        else:
            self._lose(session, changes)

    def _lose(self, session: Session, changes: Changes) -> None:
        """What was changed is dropped."""
        matters = session.edits.logs_in or not changes.is_touch
        session.gone = True
        session.discard()
        if matters:
            self.memory.environment.counters.add("dropped")
            self.hooks.emit(CommitDropped(session.handle or ""))

    def _need_headers(self, session: Session) -> None:
        if session.headers_sent:
            raise ResponseStarted(
                "the session needs a new cookie, but the response has begun: store something in it, or call create(), "
                "renew() or set_longterm() before the first byte (before accept() on a websocket)"
            )


def _with(changes: Changes, key: DataKey, value: bytes) -> Changes:
    """The same with a value more."""
    return changes._replace(set={**changes.set, key: value})
