"""The session as the application sees it: a working copy of its record, and verbs. It knows no store and no HTTP."""

from collections.abc import AsyncIterator, Callable, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple, NoReturn, Protocol, TypeVar

from .clock import Clock
from .codec import decode, encode
from .config import SessionMode
from .errors import ContentionError, NoSessionError, NotCreated, ResponseStarted, SessionGone, StoreError
from .flashes import Flashes
from .record import LONGTERM, NEVER, STORABLE, Changes, Record
from .working import KEEP, Edits

T = TypeVar("T")

APPLY_ATTEMPTS: Final = 100
ENVIRON_KEY: Final = "shmsession.session"
Ending = Literal["destroyed", "renewed", "expired", "lost"]


class Resolved(NamedTuple):
    """What a request's credential leads to: a stored session, none (`record` None), or one that is `gone`.

    A handle without a record that is not gone: nobody could say, and the request goes on without one.
    `presented`: the request carried a session token, good or bad. `origin`: what the transport is to be told when it
    answers. `consent`: what the visitor chose before; None for nothing.
    """

    session_id: str | None = None
    handle: bytes | None = None
    record: Record | None = None
    stale_cookie: bool = False
    gone: bool = False
    presented: bool = False
    origin: Any = None
    consent: bool | None = None

    def __repr__(self) -> str:
        return f"<Resolved {'to nothing' if self.handle is None else self.handle.hex()}>"


NOTHING: Final = Resolved()


class Port(Protocol):
    """What a session needs of its store. All of it is synchronous and takes microseconds."""

    clock: Clock
    max_size: int
    writes_through: bool
    mode: SessionMode

    def resolve(self, credential: Any) -> Resolved:
        """The session that a request's credential names. Raises StoreError."""
        ...

    def swap(self, handle: bytes, base: Record, changes: Changes) -> tuple[Record, bool] | None:
        """Commit `changes` if what they expect holds: (record now, done); None when the session is gone."""
        ...

    def kill(self, handle: bytes) -> bytes | None:
        """Destroy the session in all processes, now, under the handle that it has by now, which is returned; None
        when another request was first, or gave it to a login."""
        ...

    def save(self, session: "Session") -> None:
        """Commit the session's changes now. Raises SessionGone, ResponseStarted, StoreError."""
        ...

    async def persisted(self, handles: tuple[bytes, ...], timeout: float | None) -> bool:  # noqa: ASYNC109
        """Wait until the backend has these sessions; whether it has."""
        ...

    def changes(self, session: "Session") -> AsyncIterator[frozenset[str]]:
        """See `Session.changes`."""
        ...


class Session(Flashes):
    """One visitor's data. Nothing is loaded before it is looked at; nothing is written that did not change."""

    # What is so until something happens: making and reading a session must cost next to nothing.
    headers_sent = False
    owes_cookie = False
    gone = False
    drops_cookie = False
    unavailable = False
    """The store could not serve this session: a status 500 that the framework made of it is a 503."""
    secret: str | None = None
    """The id."""
    raw_handle: bytes | None = None
    through: tuple[bytes, ...] = ()
    """Sessions for which the response waits until the backend has heard of them."""
    origin: Any = None
    """What the transport is to be told when it answers this request."""
    choice: bool | None = None
    """What the visitor chose in this request; None: nothing, or it is known to be so."""
    _chosen: bool | None = None
    kept_choice: bool | None = None
    """What of that stays though the request fails: a "no", and a "yes" that was committed with a session."""
    carried: Callable[[Any], Any] | None = None
    """Gives the store's transport what it may look at of the request; asked when somebody logs in."""
    _presented = _stale_cookie = False
    _ending: Ending | None = None

    def __init__(self, port: Port, credential: Any = None, *, readonly: bool = False) -> None:
        self.port = port
        self._credential = credential
        self.readonly = readonly

    @classmethod
    def of(cls, request: Any, *, readonly: bool = False) -> "Session":
        """The session of a Starlette, FastAPI or Flask request, a Django request, an ASGI scope or a WSGI environ.

        `readonly`: nobody can change it in this request from now on; whoever tries meets ReadOnlySession. Raises
        NoSessionError when no SessionMiddleware has seen the request, or it was told to skip its path.
        """
        _, found = find_session(request)
        if readonly:
            found.readonly = True
        return found

    # ── loading ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def max_size(self) -> int:
        """See SessionConfig."""
        return self.port.max_size

    def _load(self) -> None:
        """Resolve the request's credential. A session whose visitor has declined ends here: a request that was slower
        than their answer has made it."""
        self.start(NOTHING if self._credential is None else self._asked(self.port.resolve, self._credential))
        if self._chosen is False and self.record is not None and self.port.mode is not SessionMode.PERSISTENT:
            self._end()

    def _asked(self, question: Callable[..., T], *arguments: Any) -> T:
        """The store's answer; that it had none is remembered for the response."""
        try:
            return question(*arguments)
        except StoreError:
            self.unavailable = True
            raise

    def start(self, found: Resolved) -> None:
        """Stand at what a credential led to."""
        self.secret, self.raw_handle, record, self._stale_cookie, self.gone = found[:5]
        self._presented, self.origin, self._chosen = found[5:]
        self.loaded = True
        self.drops_cookie = False
        self._reset(record)

    def __repr__(self) -> str:
        if not self.loaded:
            return "<Session, not looked at>"
        keys = sum(type(key) is str for key in self._data)
        return f"<Session {self.handle or 'new'}, {keys} keys>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session belongs to its request and holds secrets: pass dict(session) on instead")

    # ── what is known of it ───────────────────────────────────────────────────────────────────────────────────

    @property
    def id(self) -> str | None:
        """The secret id as text; None until the session is stored. Never log it: `handle` is for that."""
        self._look()
        return self.secret

    @property
    def handle(self) -> str | None:
        """The id's hash in hex, by which stores, logs and tools know the session; None until it is stored."""
        self._look()
        return None if self.raw_handle is None else self.raw_handle.hex()

    @property
    def exists(self) -> bool:
        """Whether the session is stored."""
        self._look()
        return self.record is not None

    @property
    def is_new(self) -> bool:
        """Whether the request came without a session."""
        return not self.exists

    @property
    def modified(self) -> bool:
        """Whether a commit would write something now. Nested edits count."""
        return self.loaded and self.pending() is not None

    @property
    def created_at(self) -> datetime | None:
        """When the session began, UTC; None until it is stored."""
        self._look()
        return None if self.record is None else _moment(self.record.header.created)

    @property
    def last_seen(self) -> datetime | None:
        """When it was last seen, UTC, to within `touch_interval`; None until it is stored."""
        self._look()
        return None if self.record is None else _moment(self.record.header.last_seen)

    @property
    def expires_at(self) -> datetime | None:
        """When it ends if nobody looks at it again, UTC; None until it is stored."""
        self._look()
        return None if self.record is None else _moment(self.record.header.expires)

    @property
    def authenticated_at(self) -> datetime | None:
        """When its user was logged in, UTC: by `renew(user_id=…)`, whatever got a new id since. None for nobody."""
        self._look()
        if self.edits.logs_in:
            return _moment(self.port.clock.now())
        moment = None if self.user_id is None else self.stored_auth_time
        return None if moment is None else _moment(moment)

    @property
    def storable(self) -> bool:
        """Whether it may be kept (`set_store`): by a backend in persistent mode, beyond the request in the others."""
        self._look()
        if self.edits.storable is not None:
            return self.edits.storable
        if self.record is not None:
            return bool(self.record.header.flags & STORABLE)
        if self.port.mode is SessionMode.PERSISTENT:
            return True
        chosen = self.consent
        return chosen is True or (chosen is None and self.port.mode is SessionMode.MANUAL)

    @property
    def consent(self) -> bool | None:
        """Whether the visitor agreed to be remembered, in this request or before (`set_store`); None: not asked yet.

        Always None in persistent mode, where nobody is asked.
        """
        self._look()
        if self.port.mode is SessionMode.PERSISTENT:
            return None
        chosen = self._chosen if self.choice is None else self.choice
        if chosen is None and self.record is not None and self.port.mode is SessionMode.OPT_IN:
            return True  # the cookie that says so is gone, but not the session
        return chosen

    @property
    def longterm(self) -> bool:
        """Whether it lives for `max_lifespan` instead of `lifespan` (`set_longterm`)."""
        self._look()
        stored = self.record is not None and bool(self.record.header.flags & LONGTERM)
        return stored if self.edits.longterm is None else self.edits.longterm

    @property
    def ended(self) -> Ending | None:
        """Why `changes` came to its end: how others ended the session; None while nobody has.

        destroyed: also by `SessionStore.clear`. renewed: it has another id, by a login or not. expired: nobody looked
        at it for too long. lost: it is in memory no more, and what became of it cannot be told.
        """
        return self._ending if self.gone else None

    # ── verbs ─────────────────────────────────────────────────────────────────────────────────────────────────

    def increment(self, key: str, by: float = 1) -> Any:
        """Add to a number, atomically over all processes; a missing one counts from 0. Returns the sum.

        It happens now, and stays when the response fails; where `apply` is a plain assignment, so is this. Raises
        TypeError for what is no number, and what `apply` raises.
        """

        def add(value: Any) -> Any:
            if type(value) not in (int, float):
                raise TypeError(f"session[{key!r}] is a {type(value).__name__}, not a number")
            return value + by

        return self.apply(key, add, 0)

    def apply(self, key: str, fn: Callable[[Any], T], default: Any = None) -> T:
        """Replace a value by `fn(value)`, atomically over all processes; a missing one is `default`.

        `fn` must be pure: it runs again when another process was faster, up to 100 times, then ContentionError is
        raised. It happens now, and stays when the response fails. On a session that is not stored yet or was cleared,
        on a key that this request has changed already, and with the id of a session that has just ended, it is a plain
        assignment. Raises SessionGone, SessionTooLarge, UnsupportedValue, ContentionError, StoreError.
        """
        self.edit()
        if self.gone and self.record is not None:
            raise SessionGone("the session was renewed or destroyed by another request")
        if self.record is None or self.edits.cleared or self.is_pending(key):
            result = fn(self.get(key, default))
            self[key] = result
            return result
        return self._apply_stored(key, fn, default)

    def _apply_stored(self, key: str, fn: Callable[[Any], T], default: Any) -> T:
        fallback = encode(default, key)
        for _ in range(APPLY_ATTEMPTS):
            expected = self.stored(key)
            result = fn(decode(fallback if expected is None else expected))
            raw = encode(result, key)
            if self._swap(Changes(set={key: raw}, expect={key: expected})):
                self.replaced(key, result, raw)
                return result
        raise ContentionError(f"session[{key!r}] changed under each of {APPLY_ATTEMPTS} attempts: try again later")

    def _swap(self, changes: Changes) -> bool:
        """One attempt; afterwards the session stands at the record as it is now."""
        assert self.record is not None
        assert self.raw_handle is not None
        answer = self._asked(self.port.swap, self.raw_handle, self.record, changes)
        if answer is None:
            self.gone = True
            raise SessionGone("the session was renewed, destroyed or expired while this request held it")
        record, done = answer
        self.rebase(record)
        if done and self.port.writes_through:
            self.wait_for(self.raw_handle)
        return done

    def renew(self, *, user_id: Any = KEEP) -> None:
        """Give the session a new id when this request commits: call it at every login and change of rights.

        `user_id` says who is logged in from now on (a str, int, UUID or other stored value; None: nobody); without it
        that stays. The old id is dead at once, in all processes.
        """
        self.edit()
        if user_id is not KEEP:
            encode(user_id, "user_id")
            self.edits.user, self.edits.asked = user_id, self.port.clock.boot()
        self.edits.renew = True

    def destroy(self) -> None:
        """End the session, in all processes, now; it stays dead when the response fails. What is stored in this
        object afterwards begins a new session, unless another request ended this one first: then it is dropped."""
        super().edit()
        self._end()

    def _end(self) -> None:
        known = self.record is not None or self.gone
        if self.raw_handle is not None:
            killed = self._asked(self.port.kill, self.raw_handle)
            if killed is not None:
                self.wait_for(killed)
            elif known:
                self.discard()
                self.gone = True
                return
        self._stand_at_nothing(presented=self._presented)
        self.drops_cookie = self._presented

    def _stand_at_nothing(self, *, presented: bool) -> None:
        """Without a session; how the request came stays known. `presented`: whether the cookie is its to remove."""
        self.start(Resolved(presented=presented, origin=self.origin, consent=self._chosen))

    def edit(self) -> Edits:
        """See WorkingCopy. Raises NotCreated in manual mode, before `create`."""
        edits = super().edit()
        if self.port.mode is SessionMode.MANUAL and self.record is None and not edits.create:
            raise NotCreated("in manual mode a session is made by create(): call it before storing anything")
        return edits

    def create(self) -> None:
        """Store the session when this request commits, even if it is empty. In opt-in mode the visitor must agree."""
        edits = super().edit()
        edits.create = self.record is None

    def touch(self) -> None:
        """Move the session's end when this request commits, whatever `touch_interval` says."""
        self.edit().touch = True

    def set_longterm(self, longterm: bool) -> None:
        """Let it live for `max_lifespan` (True: "remember me") or `lifespan` (False) after it was last seen."""
        self.edit().longterm = bool(longterm)

    def set_store(self, storable: bool) -> None:
        """In persistent mode: whether a backend may keep it (True) or it stays in memory only (False).

        In the others: whether the visitor agrees to be remembered. False erases the session everywhere, at once, as
        `destroy` does; what is stored in this object afterwards does not outlive the request. A cookie that scripts can
        read remembers the choice for six months.
        """
        edits = super().edit()
        if self.port.mode is SessionMode.PERSISTENT:
            edits.storable = bool(storable)
        elif storable:
            if self.headers_sent and not self.consent:
                raise ResponseStarted(
                    "the response has begun, so that the choice cannot be remembered: call set_store(True) before the "
                    "first byte"
                )
            edits.storable = self.choice = True
        else:
            self.destroy()
            self.choice = self.kept_choice = False
            if self.headers_sent:
                raise ResponseStarted(
                    "the session is erased, but the response has begun, so that the choice cannot be remembered: call "
                    "set_store(False) before the first byte"
                )

    def save(self) -> None:
        """Commit to memory now, for websockets, streams and jobs.

        Raises SessionGone when another request ended the session, ResponseStarted when it needs a cookie that can no
        longer be sent, StoreError.
        """
        self._look()
        self._asked(self.port.save, self)

    async def persisted(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """Wait until the backend has what was committed of this session; whether it has.

        `timeout` in seconds; None: `through_timeout`. False when it passed, or the backend is down: what was committed
        is sent later. True at once without a backend.
        """
        self._look()
        return self.raw_handle is None or await self.port.persisted((self.raw_handle,), timeout)

    def changes(self) -> AsyncIterator[frozenset[str]]:
        """Follow what others do to the session: `async for keys in session.changes()`.

        Yields the keys that other requests, of any process of this host, have changed since this one first looked, or
        since it last yielded; none when they left or showed messages (`flash`) only. The session then has their values,
        but keeps what was changed here and is not committed. Ends when the session does: then `gone` is True, and
        `ended` says why. It also ends, with `gone` False, when the session is not stored, is destroyed here, or the
        store is closed. Following a session does not keep it alive; `touch()` does. Raises StoreError.
        """
        self._look()
        return self.port.changes(self)

    # ── for the store ─────────────────────────────────────────────────────────────────────────────────────────

    def discard(self) -> None:
        """See WorkingCopy. Of what the visitor chose remains what is kept."""
        super().discard()
        if self.choice:
            self.choice = self.kept_choice

    def committed(self, session_id: str, handle: bytes, record: Record, changes: Changes) -> None:
        """Stand at what was just committed."""
        self.owes_cookie = self.owes_cookie or self._stale_cookie or session_id != self.secret
        self.secret, self.raw_handle = session_id, handle
        self._stale_cookie = self.drops_cookie = False
        if self.choice:
            self.kept_choice = True
        self.moved_to(record, changes)

    def end(self, ending: Ending) -> None:
        """Others have ended the session."""
        self.gone, self._ending = True, ending

    def told(self) -> None:
        """The response carries what the visitor chose."""
        self._chosen, self.choice = self.choice, None

    @property
    def tells_choice(self) -> bool:
        """Whether the response must carry what the visitor chose, which the client does not know yet."""
        return self.choice is not None and self.choice is not self._chosen

    def wait_for(self, handle: bytes) -> None:
        """Hold the response back until the backend has heard of this session."""
        if handle not in self.through:
            self.through += (handle,)

    def begin_anew(self) -> None:
        """A login outlives the session it met: keep the user and what this request assigned, nothing it had loaded."""
        assigned, was = self.assigned(), self.edits
        self._stand_at_nothing(presented=False)  # who ended the other one may have set another cookie by now
        self.create()
        self.assign(assigned)
        edits = self.edits
        edits.user, edits.storable, edits.longterm, edits.renew = was.user, was.storable, was.longterm, True
        edits.asked = was.asked


def find_session(request: Any) -> tuple[MutableMapping[str, Any], Session]:
    """The session of a request as `Session.of` takes it, and the scope or environ that holds it."""
    if type(request) is dict and isinstance(found := request.get(ENVIRON_KEY), Session):
        return request, found
    for holder in (*(getattr(request, name, None) for name in ("scope", "environ", "META")), request):
        if isinstance(holder, MutableMapping):
            for key in (ENVIRON_KEY, "session"):
                found = holder.get(key)
                if isinstance(found, Session):
                    return holder, found
    raise NoSessionError(
        "no session here: add shmsession.asgi.SessionMiddleware or shmsession.wsgi.SessionMiddleware to the "
        "application, and check that its skip= does not cover this path"
    )


def _moment(milliseconds: int) -> datetime | None:
    return None if milliseconds >= NEVER else datetime.fromtimestamp(milliseconds / 1000, UTC)
