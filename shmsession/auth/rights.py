"""Rights: what a user must be allowed to do, as a tree of permissions."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from .calling import Way


class Rights(ABC):
    """What somebody must be allowed to do. Users say so themselves, by `has(permission)`, sync or async.

    A visitor without a user has no permission. What decides nothing any more is not asked.
    """

    @staticmethod
    def permission(name: str) -> "Rights":
        """The user has this permission."""
        return _Permission(name)

    @staticmethod
    def all(*rights: "Rights") -> "Rights":
        """All of them hold; so do none at all."""
        return _All(rights)

    @staticmethod
    def any(*rights: "Rights") -> "Rights":
        """At least one of them holds; of none at all, none does."""
        return _Any(rights)

    @staticmethod
    def none(*rights: "Rights") -> "Rights":
        """None of them holds; none at all do not."""
        return _None(rights)

    @abstractmethod
    async def held_by(self, user: Any, way: Way) -> bool:
        """Whether a user has them. Raises TypeError for one that cannot say."""
        ...


@dataclass(frozen=True, slots=True)
class _Permission(Rights):
    name: str

    async def held_by(self, user: Any, way: Way) -> bool:
        if user is None:
            return False
        has = getattr(user, "has", None)
        if has is None:
            raise TypeError(
                f"a {type(user).__name__} cannot say what it may do: give it a method has(permission), sync or async, "
                "that returns a bool"
            )
        held = has(self.name)
        if held is True or held is False:
            return held
        held = await way.settle(held)
        if isinstance(held, int):  # bool, and what databases have in its place
            return bool(held)
        raise TypeError(f"has() of a {type(user).__name__} returned a {type(held).__name__}: let it return a bool")


@dataclass(frozen=True, slots=True)
class _All(Rights):
    rights: tuple[Rights, ...]

    async def held_by(self, user: Any, way: Way) -> bool:
        for right in self.rights:
            if not await right.held_by(user, way):
                return False
        return True


@dataclass(frozen=True, slots=True)
class _Any(Rights):
    rights: tuple[Rights, ...]

    async def held_by(self, user: Any, way: Way) -> bool:
        for right in self.rights:
            if await right.held_by(user, way):
                return True
        return False


@dataclass(frozen=True, slots=True)
class _None(Rights):
    rights: tuple[Rights, ...]

    async def held_by(self, user: Any, way: Way) -> bool:
        return not await _Any(self.rights).held_by(user, way)
