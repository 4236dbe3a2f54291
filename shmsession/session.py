"""The session as the application sees it: a mapping that knows what was done to it, and nothing of stores or HTTP."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple, NoReturn, Protocol, Self, TypeVar

from .codec import IMMUTABLE, decode, encode
from .errors import ContentionError, NoSessionError, ReadOnlySession, SessionGone, SessionTooLarge, StoreError
from .ids import text_of
from .record import LONGTERM, NEVER, STORABLE, USER_KEY, Changes, Data, DataKey, Record, join

T = TypeVar("T")

APPLY_ATTEMPTS: Final = 100
ENVIRON_KEY: Final = "shmsession.session"
_KEEP: Final = object()
_TOUCHED: Final = Changes(touch=True)
_MAP_HEADER: Final = 4
"""The header of the record's map grows by so much at most."""


class Resolved(NamedTuple):
    """What a request's credential leads to: a stored session, none (`record` None), or one that is `gone`.

    `presented`: the request carried a session cookie, good or bad.
    """

    session_id: bytes | None = None
    handle: bytes | None = None
    record: Record | None = None
    stale_cookie: bool = False
    gone: bool = False
    presented: bool = False

    def __repr__(self) -> str:
        return f"<Resolved {'to nothing' if self.handle is None else self.handle.hex()}>"


NOTHING: Final = Resolved()


class Port(Protocol):
    """What a session needs of its store. All of it is synchronous and takes microseconds."""

    max_size: int

    def resolve(self, credential: Any) -> Resolved:
        """The session that a request's credential names. Raises StoreError."""
        ...

    def swap(self, handle: bytes, base: Record, changes: Changes) -> tuple[Record, bool] | None:
        """Commit `changes` if what they expect holds: (record now, done); None when the session is gone."""
        ...

    def kill(self, handle: bytes) -> bool:
        """Destroy the session in all processes, now; False when another request was first, or gave it to a login."""
        ...

    def save(self, session: "Session") -> None:
        """Commit the session's changes now. Raises SessionGone, ResponseStarted, StoreError."""
        ...


class _Edits:
    """What a request did to its session and has not committed."""

    cleared = create = renew = touch = False
    storable: bool | None = None
    longterm: bool | None = None
    user: Any = _KEEP

    def __init__(self, size: int) -> None:
        self.size = size
        self.assigned: set[str] = set()
        self.deleted: set[str] = set()


class _Unedited(_Edits):
    """Nothing done. One object stands for that in every session, so it must never change."""

    def __init__(self) -> None:
        self.__dict__.update(size=0, assigned=frozenset(), deleted=frozenset())

    def __setattr__(self, name: str, value: object) -> None:
        raise AssertionError("a session was changed without _edit()")


_UNEDITED: Final[_Edits] = _Unedited()


class Session(MutableMapping[str, Any]):
    """One visitor's data. Nothing is loaded before it is looked at; nothing is written that did not change."""

    # What is so until something happens: making and reading a session must cost next to nothing.
    accessed = False
    headers_sent = False
    owes_cookie = False
    gone = False
    loaded = False
    drops_cookie = False
    unavailable = False
    """The store could not serve this session: a status 500 that the framework made of it is a 503."""
    record: Record | None = None
    secret: bytes | None = None
    raw_handle: bytes | None = None
    _presented = _stale_cookie = _settled = False

    def __init__(self, port: Port, credential: Any = None, *, readonly: bool = False) -> None:
        self._port = port
        self._credential = credential
        self.readonly = readonly

    @classmethod
    def of(cls, request: Any) -> "Session":
        """The session of a Starlette, FastAPI or Flask request, a Django request, an ASGI scope or a WSGI environ.

        Raises NoSessionError when no SessionMiddleware has seen the request, or it was told to skip its path.
        """
        for holder in (request, *(getattr(request, name, None) for name in ("scope", "environ", "META"))):
            if isinstance(holder, Mapping):
                for key in (ENVIRON_KEY, "session"):
                    found = holder.get(key)
                    if isinstance(found, cls):
                        return found
        raise NoSessionError(
            "no session here: add shmsession.asgi.SessionMiddleware or shmsession.wsgi.SessionMiddleware to the "
            "application, and check that its skip= does not cover this path"
        )

    # ── loading ───────────────────────────────────────────────────────────────────────────────────────────────

    def _look(self) -> None:
        """The application looks: load, once."""
        if not self.loaded:
            self.start(NOTHING if self._credential is None else self._asked(self._port.resolve, self._credential))
        self.accessed = True

    def _asked(self, question: Callable[..., T], *arguments: Any) -> T:
        """The store's answer; that it had none is remembered for the response."""
        try:
            return question(*arguments)
        except StoreError:
            self.unavailable = True
            raise

    def start(self, found: Resolved) -> None:
        """Stand at what a credential led to."""
        self.secret, self.raw_handle, record, self._stale_cookie, self.gone, self._presented = found
        self.loaded = True
        self.drops_cookie = False
        self._reset(record)

    def _reset(self, record: Record | None) -> None:
        """Stand at `record` with nothing pending and nothing read."""
        self.record = record
        self._data: Data = {} if record is None else record.split()
        self._base = self._data
        self._seen: dict[str, Any] = {}
        self._mutable: dict[str, bytes | None] = {}
        self._edits = _UNEDITED

    def _edit(self) -> None:
        """The application changes something."""
        self._look()
        if self.readonly:
            raise ReadOnlySession("this session was opened read-only: see readonly= of the SessionMiddleware")
        self._settled = False
        if self._edits is _UNEDITED:
            self._edits = _Edits(1 if self.record is None else len(self.record.data))
            self._data = dict(self._base)

    # ── mapping ───────────────────────────────────────────────────────────────────────────────────────────────

    def __getitem__(self, key: str) -> Any:
        if not self.accessed:
            self._look()
        if key in self._seen:
            return self._seen[key]
        if type(key) is not str or key not in self._data:
            raise KeyError(key)
        raw = self._data[key]
        value = self._seen[key] = decode(raw)
        if type(value) not in IMMUTABLE:
            self._mutable[key] = raw
        return value

    def __setitem__(self, key: str, value: Any) -> None:
        if type(key) is not str:
            raise TypeError(f"session keys are str, not {type(key).__name__}")
        raw = encode(value, key)
        name_size = _name_size(key)
        self._edit()
        old = self._data.get(key)
        grows_by = _framed(raw) + (name_size if old is None else -_framed(old))
        size = self._edits.size + grows_by
        if size + _MAP_HEADER > self._port.max_size and grows_by > 0:
            raise SessionTooLarge(
                f"session[{key!r}] would make the session {size} bytes, max_size is {self._port.max_size}: "
                "store less in it, or raise SessionConfig(max_size=)"
            )
        self._edits.size = size
        self._data[key] = raw
        self._seen[key] = value
        self._edits.assigned.add(key)
        self._edits.deleted.discard(key)
        if type(value) not in IMMUTABLE:
            self._mutable[key] = None

    def __delitem__(self, key: str) -> None:
        self._edit()
        if type(key) is not str:
            raise KeyError(key)
        self._edits.size -= _framed(self._data.pop(key)) + _name_size(key)
        self._forget(key)
        self._edits.deleted.add(key)

    def _forget(self, key: str) -> None:
        self._seen.pop(key, None)
        self._mutable.pop(key, None)
        self._edits.assigned.discard(key)

    def __iter__(self) -> Iterator[str]:
        self._look()
        return iter([key for key in self._data if type(key) is str])

    def __len__(self) -> int:
        self._look()
        return sum(type(key) is str for key in self._data)

    def __contains__(self, key: object) -> bool:
        self._look()
        return type(key) is str and key in self._data

    def clear(self) -> None:
        """Remove everything, the user too. A request that does this and stores nothing else destroys the session;
        one that stores something gets a new id if somebody was logged in."""
        self._edit()
        if self.user_id is not None:
            self._edits.user, self._edits.renew = None, True
        self._data, self._edits.size, self._edits.cleared = {}, 1, True
        for state in (self._seen, self._mutable, self._edits.assigned, self._edits.deleted):
            state.clear()

    def popitem(self) -> tuple[str, Any]:
        """Remove the last key and return it with its value, as dict does."""
        for key in reversed(list(self)):
            return key, self.pop(key)
        raise KeyError("the session is empty")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of the application's data."""
        return {key: self[key] for key in self}

    def copy(self) -> dict[str, Any]:
        """The same as `to_dict`, by dict's name for it."""
        return self.to_dict()

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self.to_dict(), **other}

    def __ror__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**other, **self.to_dict()}

    def __ior__(self, other: Mapping[str, Any]) -> Self:
        self.update(other)
        return self

    def __repr__(self) -> str:
        if not self.loaded:
            return "<Session, not looked at>"
        keys = sum(type(key) is str for key in self._data)
        return f"<Session {self.handle or 'new'}, {keys} keys>"

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Session belongs to its request and holds secrets: pass dict(session) on instead")

    # ── what is known of it ───────────────────────────────────────────────────────────────────────────────────

    @property
    def id(self) -> str | None:
        """The secret id as text; None until the session is stored. Never log it: `handle` is for that."""
        self._look()
        return None if self.secret is None else text_of(self.secret)

    @property
    def handle(self) -> str | None:
        """The id's hash in hex, by which stores, logs and tools know the session; None until it is stored."""
        self._look()
        return None if self.raw_handle is None else self.raw_handle.hex()

    @property
    def user_id(self) -> Any:
        """Whom `renew(user_id=…)` logged in; None for nobody."""
        self._look()
        if self._edits.user is not _KEEP:
            return self._edits.user
        raw = self._data.get(USER_KEY)
        return None if raw is None else decode(raw)

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
    def storable(self) -> bool:
        """Whether a backend may have it (`set_store`)."""
        self._look()
        stored = self.record is None or bool(self.record.header.flags & STORABLE)
        return stored if self._edits.storable is None else self._edits.storable

    @property
    def longterm(self) -> bool:
        """Whether it lives for `max_lifespan` instead of `lifespan` (`set_longterm`)."""
        self._look()
        stored = self.record is not None and bool(self.record.header.flags & LONGTERM)
        return stored if self._edits.longterm is None else self._edits.longterm

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
        self._edit()
        if self.gone and self.record is not None:
            raise SessionGone("the session was renewed or destroyed by another request")
        if self.record is None or self._edits.cleared or self._is_pending(key):
            result = fn(self.get(key, default))
            self[key] = result
            return result
        return self._apply_stored(key, fn, default)

    def _apply_stored(self, key: str, fn: Callable[[Any], T], default: Any) -> T:
        fallback = encode(default, key)
        for _ in range(APPLY_ATTEMPTS):
            assert self.record is not None
            expected = self._base.get(key)
            result = fn(decode(fallback if expected is None else expected))
            raw = encode(result, key)
            swapped = self._swap(Changes(set={key: raw}, expect={key: expected}))
            if swapped:
                self._data[key] = raw
                self._edits.size = len(join(self._data))
                self._forget(key)
                self._seen[key] = result
                if type(result) not in IMMUTABLE:
                    self._mutable[key] = raw
                return result
        raise ContentionError(f"session[{key!r}] changed under each of {APPLY_ATTEMPTS} attempts: try again later")

    def _swap(self, changes: Changes) -> bool:
        """One attempt; the base moves to the record as it is now, what was read or changed stays as it was."""
        assert self.record is not None
        assert self.raw_handle is not None
        answer = self._asked(self._port.swap, self.raw_handle, self.record, changes)
        if answer is None:
            self.gone = True
            raise SessionGone("the session was renewed, destroyed or expired while this request held it")
        record, done = answer
        self._rebase(record)
        return done

    def _rebase(self, record: Record) -> None:
        pending: Data = {key: self._data[key] for key in self._edits.assigned}
        read: Data = {key: self._data[key] for key in self._seen if key in self._data}
        self.record, self._base = record, record.split()
        self._data = {key: raw for key, raw in self._base.items() if key not in self._edits.deleted} | read | pending

    def _is_pending(self, key: str) -> bool:
        if key in self._edits.assigned or key in self._edits.deleted:
            return True
        seen = self._mutable.get(key)
        return seen is not None and encode(self._seen[key], key) != seen

    def renew(self, *, user_id: Any = _KEEP) -> None:
        """Give the session a new id when this request commits: call it at every login and change of rights.

        `user_id` says who is logged in from now on (a str, int, UUID or other stored value; None: nobody); without it
        that stays. The old id is dead at once, in all processes.
        """
        self._edit()
        if user_id is not _KEEP:
            encode(user_id, "user_id")
            self._edits.user = user_id
        self._edits.renew = True

    def destroy(self) -> None:
        """End the session, in all processes, now; it stays dead when the response fails. What is stored in this
        object afterwards begins a new session, unless another request ended this one first: then it is dropped."""
        self._edit()
        if self.raw_handle is not None and not self._asked(self._port.kill, self.raw_handle):
            self.discard()
            self.gone = True
            return
        self.gone = False
        presented = self._presented
        self.start(NOTHING)
        self.drops_cookie = presented

    def create(self) -> None:
        """Store the session when this request commits, even if it is empty."""
        self._edit()
        self._edits.create = self.record is None

    def touch(self) -> None:
        """Move the session's end when this request commits, whatever `touch_interval` says."""
        self._edit()
        self._edits.touch = True

    def set_longterm(self, longterm: bool) -> None:
        """Let it live for `max_lifespan` (True: "remember me") or `lifespan` (False) after it was last seen."""
        self._edit()
        self._edits.longterm = bool(longterm)

    def set_store(self, storable: bool) -> None:
        """Whether a backend may keep it (True) or it stays in memory only (False)."""
        self._edit()
        self._edits.storable = bool(storable)

    def save(self) -> None:
        """Commit to memory now, for websockets, streams and jobs.

        Raises SessionGone when another request ended the session, ResponseStarted when it needs a cookie that can no
        longer be sent, StoreError.
        """
        self._look()
        self._asked(self._port.save, self)

    # ── for the store ─────────────────────────────────────────────────────────────────────────────────────────

    def pending(self, *, touch: bool = False) -> Changes | None:
        """What a commit has to write; None for nothing. Raises UnsupportedValue for nested edits that cannot be."""
        if self._edits is _UNEDITED and not self._mutable:
            return _TOUCHED if touch else None
        edits = self._edits
        changed: dict[DataKey, bytes] = {}
        for key, seen in self._mutable.items():
            raw = encode(self._seen[key], key)
            if raw != seen:
                changed[key] = raw
        for key in edits.assigned:
            if key not in changed:
                changed[key] = self._data[key]
        touch = touch or edits.touch
        changes = Changes(changed, tuple(edits.deleted), edits.cleared, touch, edits.storable, edits.longterm)
        return changes if touch or edits.renew or edits.create or not changes.is_touch else None

    @property
    def is_emptied(self) -> bool:
        """Whether `clear()` was called and nothing was stored since."""
        return self._edits.cleared and not self.logs_in and not len(self)

    @property
    def wants_renewal(self) -> bool:
        """Whether `renew()` was called."""
        return self._edits.renew

    @property
    def wants_creation(self) -> bool:
        """Whether `create()` was called on a session that is not stored."""
        return self._edits.create

    @property
    def logs_in(self) -> bool:
        """Whether `renew(user_id=…)` named a user."""
        return self._edits.user is not _KEEP and self._edits.user is not None

    @property
    def encoded_user(self) -> bytes | None:
        """The user id that a commit stores, encoded."""
        if self._edits.user is _KEEP:
            return self._data.get(USER_KEY)
        return None if self._edits.user is None else encode(self._edits.user, "user_id")

    def committed(self, session_id: bytes, handle: bytes, record: Record, changes: Changes) -> None:
        """Stand at what was just committed; what was read stays readable, and nested edits of it are still noticed."""
        values, data = self._seen, self._data
        self.owes_cookie = self.owes_cookie or self._stale_cookie or session_id != self.secret
        self._reset(record)
        self.secret, self.raw_handle = session_id, handle
        self._stale_cookie = self.drops_cookie = False
        for key, value in values.items():
            raw = changes.set.get(key, data.get(key))
            if key not in self._base:
                continue
            if type(value) not in IMMUTABLE:
                self._seen[key], self._mutable[key] = value, raw
            elif raw == self._base.get(key):
                self._seen[key] = value

    @property
    def port(self) -> Port:
        """The store it belongs to."""
        return self._port

    @property
    def is_unchanged(self) -> bool:
        """Whether nothing was edited, and nothing read that could have been edited in place."""
        return self._edits is _UNEDITED and not self._mutable

    @property
    def is_settled(self) -> bool:
        """Whether nothing can have changed since `settle`."""
        return self._settled and not self._mutable

    def settle(self) -> None:
        """Everything so far has been committed or dropped."""
        self._settled = True

    def discard(self) -> None:
        """Forget what was changed and not committed."""
        self._reset(self.record)

    def begin_anew(self) -> None:
        """A login outlives the session it met: keep the user and what this request assigned, nothing it had loaded."""
        assigned = {key: self._seen[key] for key in self._edits.assigned}
        user, storable, longterm = self._edits.user, self._edits.storable, self._edits.longterm
        self.start(NOTHING)
        self._edit()
        self.update(assigned)
        self._edits.user, self._edits.storable, self._edits.longterm = user, storable, longterm
        self._edits.renew = True


def _name_size(key: str) -> int:
    """How many bytes a key takes in the record's map. Raises UnsupportedValue for one that UTF-8 cannot carry."""
    if not key.isascii():
        return len(encode(key, key))
    size = len(key)
    return size + (1 if size < 32 else 2 if size < 1 << 8 else 3 if size < 1 << 16 else 5)


def _framed(raw: bytes) -> int:
    """How many bytes an encoded value takes in the record's map."""
    size = len(raw)
    return size + (2 if size < 1 << 8 else 3 if size < 1 << 16 else 5)


def _moment(milliseconds: int) -> datetime | None:
    return None if milliseconds >= NEVER else datetime.fromtimestamp(milliseconds / 1000, UTC)
