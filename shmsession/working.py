"""The working copy of a record: a mapping that knows what was read and changed in it. No store, no HTTP, no I/O."""

from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from typing import Any, Final, Self
from weakref import WeakSet

from .codec import IMMUTABLE, decode, encode
from .errors import ReadOnlySession, SessionTooLarge
from .ids import tag_of
from .record import AUTH_TIME_KEY, NOTES, USER_KEY, Changes, Data, DataKey, Record, join, pack_plain

KEEP: Final = object()
"""In place of a user id: the one that is stored."""
_TOUCHED: Final = Changes(touch=True)
_MAP_HEADER: Final = 4
"""The header of the record's map grows by so much at most."""


class Edits:
    """What was done to a working copy and is not committed. `size`: the bytes its map would take."""

    cleared = create = renew = touch = False
    storable: bool | None = None
    longterm: bool | None = None
    user: Any = KEEP
    asked = 0
    """When the user was named, by CLOCK_BOOTTIME."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.assigned: set[DataKey] = set()
        self.deleted: set[DataKey] = set()

    @property
    def logs_in(self) -> bool:
        """Whether a user was named."""
        return self.user is not KEEP and self.user is not None


class _Unedited(Edits):
    """Nothing done. One object stands for that in every working copy, so it must never change."""

    def __init__(self) -> None:
        self.__dict__.update(size=0, assigned=frozenset(), deleted=frozenset())

    def __setattr__(self, name: str, value: object) -> None:
        raise AssertionError("a working copy was changed without edit()")


UNEDITED: Final[Edits] = _Unedited()


class Follower:
    """Somebody who is told what others change. `known`: the data as they were told, with what was committed here."""

    __slots__ = ("__weakref__", "known")

    def __init__(self, known: Data) -> None:
        self.known = known


class WorkingCopy(MutableMapping[str, Any]):
    """A record's data with what a request does to it. Values are decoded when they are read, once.

    Before `_load` has run nothing is known: every look at it goes through there.
    """

    loaded = False
    accessed = False
    readonly = False
    record: Record | None = None
    edits: Edits = UNEDITED
    _settled = False
    _followers: Collection[Follower] = ()

    @property
    @abstractmethod
    def max_size(self) -> int:
        """How many bytes the data may take."""
        ...

    @abstractmethod
    def _load(self) -> None:
        """Stand at what there is (`_reset`), once. May raise what a store raises."""
        ...

    def _reset(self, record: Record | None) -> None:
        """Stand at `record` with nothing pending and nothing read."""
        self.record = record
        self._data: Data = {} if record is None else record.split()
        self._base = self._data
        self._seen: dict[str, Any] = {}
        self._mutable: dict[str, bytes | None] = {}
        self.edits = UNEDITED

    def discard(self) -> None:
        """Forget what was changed and not committed."""
        self._reset(self.record)

    def _look(self) -> None:
        """The application looks."""
        if not self.loaded:
            self._load()
        self.accessed = True

    def edit(self) -> Edits:
        """The application changes something: what it has changed so far. Raises ReadOnlySession."""
        if not (self.accessed and self.loaded):
            self._look()
        if self.readonly:
            raise ReadOnlySession("this session was opened read-only: see readonly= of the SessionMiddleware")
        self._settled = False
        if self.edits is UNEDITED:
            self.edits = Edits(1 if self.record is None else len(self.record.data))
            self._data = dict(self._base)
        return self.edits

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
        self.put(key, raw)
        self._seen[key] = value
        if type(value) not in IMMUTABLE:
            self._mutable[key] = None

    def put(self, key: DataKey, raw: bytes) -> None:
        """Assign an encoded value. Raises SessionTooLarge."""
        edits = self.edit()
        old = self._data.get(key)
        if old is None:
            grows_by = _name_size(key) + _framed(raw)
        elif len(old) == len(raw):
            grows_by = 0
        else:
            grows_by = _framed(raw) - _framed(old)
        size = edits.size + grows_by
        if grows_by > 0 and size + _MAP_HEADER > self.max_size:
            what = f"session[{key!r}]" if isinstance(key, str) else "this"
            raise SessionTooLarge(
                f"{what} would make the session {size} bytes, max_size is {self.max_size}: "
                "store less in it, or raise SessionConfig(max_size=)"
            )
        edits.size = size
        self._data[key] = raw
        edits.assigned.add(key)
        edits.deleted.discard(key)

    def __delitem__(self, key: str) -> None:
        if type(key) is not str:
            self._look()
            raise KeyError(key)
        self.take(key)

    def take(self, key: DataKey) -> bytes:
        """Delete an encoded value, and return it. Raises KeyError."""
        edits = self.edit()
        raw = self._data.pop(key)
        edits.size -= _framed(raw) + _name_size(key)
        self._forget(key)
        edits.deleted.add(key)
        return raw

    def _forget(self, key: DataKey) -> None:
        if isinstance(key, str):
            self._seen.pop(key, None)
            self._mutable.pop(key, None)
        self.edits.assigned.discard(key)

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
        edits = self.edit()
        if self.user_id is not None:
            edits.user, edits.renew = None, True
        self._data, edits.size, edits.cleared = {}, 1, True
        for state in (self._seen, self._mutable, edits.assigned, edits.deleted):
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

    __hash__ = None  # type: ignore[assignment]

    # ── the user ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def user_id(self) -> Any:
        """Whom `renew(user_id=…)` logged in; None for nobody."""
        self._look()
        if self.edits.user is not KEEP:
            return self.edits.user
        raw = self._data.get(USER_KEY)
        return None if raw is None else decode(raw)

    @property
    def encoded_user(self) -> bytes | None:
        """The user id that a commit stores, encoded; None for nobody."""
        if not self.accessed:
            self._look()
        if self.edits.user is KEEP:
            return self._data.get(USER_KEY)
        return None if self.edits.user is None else encode(self.edits.user, "user_id")

    @property
    def user_tag(self) -> bytes | None:
        """8 bytes that stand for the user; None for nobody."""
        user = self.encoded_user
        return None if user is None else tag_of(user)

    @property
    def stored_auth_time(self) -> int | None:
        """When the user that the record has was logged in, in milliseconds; None for nobody, and when unknown."""
        self._look()
        raw = self._base.get(AUTH_TIME_KEY)
        return None if raw is None else decode(raw)

    # ── what a commit asks ────────────────────────────────────────────────────────────────────────────────────

    def pending(self, *, touch: bool = False) -> Changes | None:
        """What a commit has to write; None for nothing. Raises UnsupportedValue for nested edits that cannot be."""
        edits = self.edits
        if edits is UNEDITED and not self._mutable:
            return _TOUCHED if touch else None
        changed: dict[DataKey, bytes] = {}
        for key, seen in self._mutable.items():
            raw = encode(self._seen[key], key)
            if raw != seen:
                changed[key] = raw
        for assigned in edits.assigned:
            if assigned not in changed:
                changed[assigned] = self._data[assigned]
        touch = touch or edits.touch
        changes = Changes(changed, edits.deleted, edits.cleared, touch, edits.storable, edits.longterm)
        return changes if changed or touch or edits.renew or edits.create or not changes.is_touch else None

    @property
    def is_emptied(self) -> bool:
        """Whether `clear()` was called and nothing was stored since."""
        return self.edits.cleared and not self.edits.logs_in and not self._data

    @property
    def is_settled(self) -> bool:
        """Whether nothing can have changed since `settle`."""
        return self._settled and not self._mutable

    def settle(self) -> None:
        """Everything so far has been committed or dropped."""
        self._settled = True

    def is_pending(self, key: str) -> bool:
        """Whether a commit would write this key."""
        if key in self.edits.assigned or key in self.edits.deleted:
            return True
        seen = self._mutable.get(key)
        return seen is not None and encode(self._seen[key], key) != seen

    def assigned(self) -> dict[DataKey, Any]:
        """What was assigned and not committed; what the library keeps there stays encoded."""
        return {key: self._seen[key] if isinstance(key, str) else self._data[key] for key in self.edits.assigned}

    def assign(self, values: Mapping[DataKey, Any]) -> None:
        """Assign what `assigned` returned."""
        for key, value in values.items():
            if isinstance(key, str):
                self[key] = value
            else:
                self.put(key, value)

    # ── moving on ─────────────────────────────────────────────────────────────────────────────────────────────

    def stored(self, key: str) -> bytes | None:
        """The encoded value that the record has under a key."""
        return self._base.get(key)

    def rebase(self, record: Record) -> None:
        """Stand at the record as it is now; what was read or changed stays as it was."""
        pending: Data = {key: self._data[key] for key in self.edits.assigned}
        read: Data = {key: self._data[key] for key in self._seen if key in self._data}
        self.record, self._base = record, record.split()
        stored = {} if self.edits.cleared else self._base
        self._data = {key: raw for key, raw in stored.items() if key not in self.edits.deleted} | read | pending

    def replaced(self, key: str, value: Any, raw: bytes) -> None:
        """The record has this value now."""
        self._data[key] = raw
        self.edits.size = len(join(self._data))
        self._forget(key)
        self._seen[key] = value
        if type(value) not in IMMUTABLE:
            self._mutable[key] = raw
        for follower in self._followers:
            follower.known = {**follower.known, key: raw}

    def moved_to(self, record: Record, changes: Changes) -> None:
        """Stand at what was committed; what was read stays readable, and nested edits of it are still noticed."""
        values, data, mutable = self._seen, self._data, self._mutable
        self._reset(record)
        for key, value in values.items():
            if key not in self._base:
                continue
            if type(value) not in IMMUTABLE:
                self._seen[key], self._mutable[key] = value, changes.set.get(key, mutable[key])
            elif changes.set.get(key, data.get(key)) == self._base.get(key):
                self._seen[key] = value
        for follower in self._followers:
            follower.known = changes.merged(follower.known)

    # ── following what others do ──────────────────────────────────────────────────────────────────────────────

    def follow(self) -> Follower:
        """Somebody who is told from now on what others change, as long as they exist."""
        follower = Follower(self._base)
        self._followers = WeakSet((*self._followers, follower))
        return follower

    def catch_up(self, record: Record, follower: Follower) -> frozenset[str] | None:
        """Stand at the record as it is now; what is pending stays as it was, what others changed is read anew.

        Returns the keys that they changed since the follower was told, or since they were read; none of them when it
        was messages only, and None when there is nothing to tell.
        """
        was, now = follower.known, record.split()
        differing = {key for key in was.keys() | now.keys() if was.get(key) != now.get(key) and key not in NOTES}
        outdated = {key for key in self._seen if self._as_read(key) != now.get(key) and not self.is_pending(key)}
        for key in outdated:
            self._seen.pop(key)
            self._mutable.pop(key, None)
        self.rebase(record)
        if self.edits is not UNEDITED:
            self.edits.size = len(join(self._data))
        follower.known = now
        told = outdated.union(key for key in differing if isinstance(key, str))
        return frozenset(told) if differing or outdated else None

    def _as_read(self, key: str) -> bytes | None:
        """The encoded value that was read, whatever was done to it since."""
        raw = self._mutable.get(key)
        return self._data.get(key) if raw is None else raw


def _name_size(key: DataKey) -> int:
    """How many bytes a key takes in the record's map. Raises UnsupportedValue for one that UTF-8 cannot carry."""
    if isinstance(key, int):
        return len(pack_plain(key))
    if not key.isascii():
        return len(encode(key, key))
    size = len(key)
    return size + (1 if size < 32 else 2 if size < 1 << 8 else 3 if size < 1 << 16 else 5)


def _framed(raw: bytes) -> int:
    """How many bytes an encoded value takes in the record's map."""
    size = len(raw)
    return size + (2 if size < 1 << 8 else 3 if size < 1 << 16 else 5)
