"""Users as the application loads them, remembered in this process until any process clears them."""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar

from shmsession.codec import decode, encode
from shmsession.ids import tag_of
from shmsession.memory.generations import ALL, index_of
from shmsession.store import SessionStore

from .calling import Way
from .config import AuthConfig

UserT = TypeVar("UserT")


class Users(Generic[UserT]):
    """The users of one application, by their encoded ids."""

    def __init__(self, store: SessionStore, load: Callable[[Any], Any], config: AuthConfig) -> None:
        self.store = store
        self._load = load
        self._max_age: Final = config.max_age // timedelta(milliseconds=1)
        self._size: Final = config.cache_size
        nobody = config.anonymous_user_id
        self.anonymous: Final = None if nobody is None else encode(nobody, "anonymous_user_id")
        self._known: OrderedDict[bytes, tuple[int, int, int, int, UserT]] = OrderedDict()

    @property
    def remembers(self) -> bool:
        """Whether a user outlives the request that loaded it."""
        return self._max_age > 0

    def known(self, encoded: bytes | None) -> UserT | None:
        """The remembered user; None for one that is not, is too old, or was cleared. Raises StoreError."""
        found = None if encoded is None else self._known.get(encoded)
        if found is None or encoded is None:
            return None
        index, own, everything, until, user = found
        store = self.store
        words = store.memory.environment.generations.words
        if words[ALL] != everything or words[index] != own or store.clock.boot() >= until:
            self._known.pop(encoded, None)
            return None
        try:
            self._known.move_to_end(encoded)
        except KeyError:  # another thread has just taken it out
            return None
        return user

    async def find(self, encoded: bytes, way: Way) -> UserT | None:
        """The user, remembered or loaded; None when there is no such user."""
        user = self.known(encoded)
        return await self.load(encoded, way) if user is None else user

    async def load(self, encoded: bytes, way: Way) -> UserT | None:
        """The user as the application has it now; None when there is no such user."""
        if not self.remembers:
            found: UserT | None = await way.call(self._load, decode(encoded))
            return found
        index = index_of(tag_of(encoded))
        words = self.store.memory.environment.generations.words
        everything, own = words[ALL], words[index]  # before: what is cleared meanwhile, the load may have missed
        user: UserT | None = await way.call(self._load, decode(encoded))
        if user is None:
            self._known.pop(encoded, None)
            return None
        self._known.pop(encoded, None)  # so that it comes last
        self._known[encoded] = index, own, everything, self.store.clock.boot() + self._max_age, user
        with suppress(KeyError):  # other threads take out as well
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return user

    def clear(self, encoded: bytes | None = None) -> None:
        """Forget a user, or all of them, in all processes. Raises StoreError."""
        index = ALL if encoded is None else index_of(tag_of(encoded))
        self.store.memory.environment.generations.clear(index)


def stands(user: object) -> bool:
    """Whether a user may be logged in, by its own word; one that says nothing may."""
    return (
        _says(user, "is_active") and _says(user, "is_authenticated") and not _says(user, "is_anonymous", default=False)
    )


def is_active(user: object) -> bool:
    """Whether a user says so, or says nothing."""
    return _says(user, "is_active")


def _says(user: object, name: str, *, default: bool = True) -> bool:
    """An attribute, or what a method of that name returns: taken for an attribute, it would always be true."""
    said = getattr(user, name, default)
    if said is True or said is False:
        return said
    if callable(said):
        said = said()
    if isinstance(said, int):  # bool, and what databases have in its place
        return bool(said)
    raise TypeError(f"{name} of a {type(user).__name__} is a {type(said).__name__}: let it be, or return, a bool")
