"""Two ways to call what the application wrote, sync or async: from async code, and from code that blocks.

What is written with them is written once: a coroutine that goes the blocking way never waits, so that `run` ends it.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from inspect import isawaitable, iscoroutinefunction
from typing import Any, Final, Protocol, TypeVar

from shmsession._portal import Portal

T = TypeVar("T")


class Way(Protocol):
    """How to call something, and how to wait for it."""

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns that may block, or in the end gives when it is async."""
        ...

    async def settle(self, value: Any) -> Any:
        """The value, or what it gives when it is to be awaited."""
        ...


class Waiting:
    """From async code: what may block runs in a thread."""

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Way."""
        if _is_async(function):
            return await function(*arguments)
        return await self.settle(await asyncio.to_thread(function, *arguments))

    async def settle(self, value: Any) -> Any:
        """See Way."""
        return await value if isawaitable(value) else value


class Blocking:
    """From code that blocks: what is async runs on one event loop of the process, on a thread of its own."""

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """See Way."""
        return await self.settle(function(*arguments))

    async def settle(self, value: Any) -> Any:
        """See Way."""
        return _portal().wait(_awaited(value)) if isawaitable(value) else value


WAITING: Final[Way] = Waiting()
BLOCKING: Final[Way] = Blocking()


def run(work: Coroutine[Any, Any, T]) -> T:
    """What a coroutine returns that goes the blocking way."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("a coroutine waited that was to block")


def _is_async(function: object) -> bool:
    while isinstance(function, partial):
        function = function.func
    return iscoroutinefunction(function) or iscoroutinefunction(type(function).__call__)


async def _awaited(value: Awaitable[T]) -> T:
    return await value


_portals: dict[int, Portal] = {}
"""This process's, by its id: one of a parent has no thread here."""


def _portal() -> Portal:
    found = _portals.get(os.getpid())
    if found is None:
        made = Portal()
        found = _portals.setdefault(os.getpid(), made)
        if found is not made:  # another thread was faster
            made.close()
    return found
