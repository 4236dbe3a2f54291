"""What the contract's tests are made of: rows, a question to a backend, and a way to run it."""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final

from shmsession.backends import Backend, Mark, Row, State

PATIENCE: Final = 120.0
"""Seconds after which a scenario counts as hanging."""

_DAY: Final = 86_400_000


class Case:
    """A test case that knows its backend."""

    def backend(self) -> Backend:
        """A new, unopened object on the same database each time; the database is empty when a test begins."""
        # For subclasses to write. Not an abstract method: that error says what is missing, and not what to do.
        raise NotImplementedError(f"{type(self).__name__}.backend: return a new object of your backend")

    @cached_property
    def later(self) -> int:
        """A moment that is a day ahead: a row that ends then does not vanish by itself meanwhile."""
        return time.time_ns() // 1_000_000 + _DAY


def scenario(test: Callable[..., Awaitable[None]]) -> Callable[[Any], None]:
    """An ordinary test method of an async one that takes backends: as many as it has parameters, ready to be asked.

    Not functools.wraps: pytest would take the parameters for fixtures.
    """
    wanted = len(inspect.signature(test).parameters) - 1

    async def play(subject: Case) -> None:
        async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
            backends = [subject.backend() for _ in range(wanted)]
            for backend in backends:
                await backend.open()
                stack.push_async_callback(backend.close)
            if backends:
                await backends[0].initialize()
            await test(subject, *backends)

    def run(subject: Case) -> None:
        asyncio.run(play(subject))

    run.__name__, run.__qualname__, run.__doc__ = test.__name__, test.__qualname__, test.__doc__
    run.__module__ = test.__module__
    return run


def handle_of(number: int) -> bytes:
    """Handles look random; the same number gives the same."""
    return blake2b(number.to_bytes(8), digest_size=20).digest()


def user_of(number: int) -> bytes:
    """The 8 bytes that stand for a user."""
    return blake2b(number.to_bytes(8), digest_size=8, person=b"user").digest()


def live(number: int, horizon: int, *, epoch: int = 1, version: int = 1, user: bytes = b"", body: bytes = b"x") -> Row:
    """A session."""
    return Row(handle_of(number), State.LIVE, epoch, version, horizon, user, body)


def erased(number: int, horizon: int, *, epoch: int = 1, version: int = 1) -> Row:
    """A session that is kept nowhere but in memory."""
    return Row(handle_of(number), State.ERASED, epoch, version, horizon)


def dead(number: int, horizon: int, *, epoch: int = 1, version: int = 1) -> Row:
    """A session that was destroyed."""
    return Row(handle_of(number), State.DEAD, epoch, version, horizon)


def row_of(state: State, number: int, horizon: int, *, epoch: int, version: int) -> Row:
    """A row in this state, with user and body if it is LIVE."""
    if state is State.LIVE:
        return live(number, horizon, epoch=epoch, version=version, user=user_of(number), body=b"%d" % version)
    return Row(handle_of(number), state, epoch, version, horizon)


async def stands(backend: Backend, handle: bytes) -> Mark | None:
    """What is stored there, ERASED rows too, asked by a row that is older than everything.

    Where nothing is, that row stays: ask no more then.
    """
    (answer,) = await backend.write([Row(handle, State.ERASED, 0, 0, 0)])
    return answer.before


async def handles_in(backend: Backend) -> list[bytes]:
    """All of `handles`, in order."""
    return sorted([handle async for handle in backend.handles()])
