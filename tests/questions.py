"""What the tests of one database after another share: questions to a backend, and what is expected of the answers."""

import asyncio
import functools
import os
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from random import Random
from typing import Any, Final, NamedTuple, ParamSpec

import pytest

from shmsession.backends import Backend, Row, State
from shmsession.errors import BackendError, BackendUnavailable
from tests.servers import PATIENCE

P = ParamSpec("P")

SECRET: Final = "correct-horse-battery"
"""The password that tests give to servers and URLs."""
LATER: Final = 4_000_000_000_000


def asynchronous(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run it in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def live(number: int, version: int = 1, body: bytes = b"body", horizon: int = LATER) -> Row:
    return Row((number + 1).to_bytes(20, "big"), State.LIVE, 1, version, horizon, b"somebody", body)


async def fails(question: Awaitable[object], error: type[BackendError] = BackendUnavailable) -> BackendError:
    """The error, of exactly that type, with which a question ends. It holds no secret."""
    with pytest.raises(error) as caught:
        await question
    assert type(caught.value) is error
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return caught.value


async def said(question: Awaitable[object], error: type[BackendError] = BackendUnavailable) -> str:
    """What that error says."""
    return str(await fails(question, error))


async def holds(condition: Callable[[], bool], what: str) -> None:
    """Let others run until it does."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"waited in vain: {what}"
        await asyncio.sleep(0.01)


class Killed(NamedTuple):
    """How often a server was killed, and how many batches were answered, and were not."""

    kills: int
    batches: int
    failed: int


async def kept_through_kills(
    backend: Backend,
    kills: int,
    random: Random,
    kill: Callable[[], object],
    versions: Callable[[], Mapping[bytes, int]],
) -> Killed:  # fmt: skip
    """Two write batches, again and again, while `kill` ends the server with -9 and starts it again.

    What was answered must be among the `versions` stored by then.
    """
    answered: dict[int, int] = {}
    batches = failed = 0
    done = False

    async def write(numbers: range) -> None:
        nonlocal batches, failed
        version = 0
        while not done:
            version += 1
            try:
                rows = [live(number, version, os.urandom(1000)) for number in numbers]
                answers = await backend.write(rows)
            except BackendUnavailable:
                failed += 1
                await asyncio.sleep(0)
            else:
                batches += 1
                for number, row, answer in zip(numbers, rows, answers, strict=True):
                    # What was stored and not answered may have been sent again, and has met itself.
                    assert answer.applied or answer.before == row.mark
                    answered[number] = version

    writers = [asyncio.create_task(write(range(start, start + 250))) for start in (0, 250)]
    try:
        for _ in range(kills):
            goal = batches + random.randint(1, 8)
            await holds(lambda goal=goal: batches >= goal, "batches are answered")  # type: ignore[misc]
            for _ in range(random.randint(0, 300)):
                await asyncio.sleep(0)
            kill()
            stored = versions()
            for number, version in answered.items():
                assert stored.get(live(number).handle, 0) >= version, "a row that was answered is lost, or went back"
    finally:
        done = True
        await asyncio.gather(*writers)
    return Killed(kills, batches, failed)
