"""Questions to SurrealDB, over whatever connection: answered in time, or failed with an error of ours."""

import asyncio
import random
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from surrealdb.errors import SurrealError
from websockets.exceptions import WebSocketException

from shmsession.errors import BackendError, BackendUnavailable

from .base import check_schema
from .surrealdb_statements import REFUSED, SCHEMA, WRONG_SCHEMA

T = TypeVar("T")

TRANSPORT: Final = (OSError, EOFError, WebSocketException)
"""What the driver lets through of a connection that cannot be made, or breaks."""

_PAUSE: Final = 0.002
_LONGEST_PAUSE: Final = 0.1
"""Seconds, at most, before a transaction that lost against another is repeated; doubled each time from the first."""

_NOT_RUN: Final = re.compile(r"The query was not executed due to a (?:failed|cancelled) transaction\.?$")
_TABLE_EXISTS: Final = re.compile(r"[Tt]he table '\w+' already exists")


class Failed(Exception):
    """What the database said instead of a result."""

    @property
    def lost(self) -> bool:
        """Whether it lost against another transaction, and so changed nothing: it may be repeated."""
        return "can be retried" in str(self)

    @property
    def is_login(self) -> bool:
        """Whether it says that there is no such user, or another password."""
        return bool(re.search(r"problem with authentication|InvalidAuth|[Ii]nvalid (?:credentials|auth)", str(self)))

    @property
    def has_expired(self) -> bool:
        """Whether it wants a new login."""
        return bool(re.search(r"(?:token|session) has expired", str(self)))

    @property
    def is_made(self) -> bool:
        """Whether there is a table of that name already."""
        return bool(_TABLE_EXISTS.search(str(self)))

    @property
    def is_missing(self) -> bool:
        """Whether there is no such table."""
        return bool(re.search(r"The table '\w+' does not exist", str(self)))


class Broken(Exception):
    """The connection ended, or there is none."""


async def outcome(work: Coroutine[Any, Any, T]) -> T:
    """What the driver returns, in a task of its own. Raises Failed, Broken.

    Whoever is cancelled, or late, leaves it waiting: cancelled at a wrong moment, the driver would stop reading, for
    all questions. When a connection ends, the driver cancels what it waits for, and finds a key missing.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(_look_at)
    await asyncio.wait({task})
    if task.cancelled():
        raise Broken("it broke off")
    error = task.exception()
    if error is None:
        return task.result()
    if isinstance(error, KeyError):
        raise Broken("it broke off") from None
    if isinstance(error, TRANSPORT):
        raise Broken(line(error)) from None
    if isinstance(error, SurrealError | RuntimeError):  # the embedded engine's are no more than RuntimeErrors
        raise Failed(str(error)) from None
    raise error


def _look_at(task: "asyncio.Task[Any]") -> None:
    """So that nothing is logged of an error that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def result(response: Mapping[str, Any]) -> Any:
    """What the last statement returned. Raises Failed."""
    if "error" in response:
        raise Failed(str(response["error"].get("message", "")))
    failures = [str(part["result"]) for part in response["result"] if part["status"] != "OK"]
    if failures:
        raise Failed(next((text for text in failures if not _NOT_RUN.match(text)), failures[0]))
    return response["result"][-1]["result"]


def line(error: BaseException) -> str:
    """What went wrong with a connection, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class Client(ABC):
    """What all connections have in common. `timeout`: seconds for a question, all that it waits for included."""

    def __init__(self, name: str, table: str, timeout: float) -> None:
        self.name, self.table, self.timeout = name, table, timeout

    @abstractmethod
    async def open(self) -> None:
        """Make ready."""

    @abstractmethod
    async def close(self) -> None:
        """Let go."""

    @abstractmethod
    async def _exchange(self, text: str, variables: dict[str, Any]) -> Mapping[str, Any]:
        """The response to a query, as it comes. Raises Failed, Broken."""

    def _late(self) -> None:  # noqa: B027  # most need do nothing
        """A question was not answered in time."""

    @asynccontextmanager
    async def question(self) -> AsyncIterator[None]:
        """What is asked within it ends in time, and fails with errors of ours. Not to be nested."""
        try:
            async with asyncio.timeout(self.timeout):
                yield
        except TimeoutError:
            self._late()
            raise BackendUnavailable(f"{self.name} did not answer within {self.timeout:g} s") from None
        except Broken as broken:
            raise BackendUnavailable(f"{self.name} cannot be reached: {broken}") from None
        except Failed as failed:
            raise self._explained(failed) from None

    async def ask(self, text: str, **variables: Any) -> Any:
        """The result of a block. Transactions that lose against others are repeated until the time is over."""
        pause = _PAUSE
        while True:
            try:
                return result(await self._exchange(text, variables))
            except Failed as failed:
                if not failed.lost:
                    raise
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311  # only to come at different times
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _explained(self, failed: Failed) -> BackendError:
        text = str(failed)
        if found := re.search(rf"{WRONG_SCHEMA}(-?\d+)", text):
            return self._of_schema(int(found[1]))
        if failed.is_missing:
            return self._of_schema(0)
        if failed.is_made:
            return BackendError(f"{self.name}: the table {self.table} is not one of ours: choose another by table=")
        if failed.is_login or "Anonymous access" in text:
            return BackendError(
                f"{self.name} refuses the credentials: write user:password@ before the host, percent-encoded"
            )
        if REFUSED in text or "Not enough permissions" in text:
            return BackendError(f"{self.name}: this user needs the role EDITOR, or OWNER, in the database")
        if re.search(r"The (?:namespace|database) '.*' does not exist", text):
            return BackendError(f"{self.name} has no such namespace or database: DEFINE them first")
        if "exceeded the timeout" in text:
            return BackendUnavailable(f"{self.name} gave up: {_safe(text)}")
        return BackendError(f"{self.name} answered with an error: {_safe(text)}. The server's log may say more")

    def _of_schema(self, version: int) -> BackendError:
        if version == 0:
            return BackendError(f"{self.name} has no table {self.table}: run `shmsession initdb`, or `initialize()`")
        try:
            self.check_schema(version)
        except BackendError as error:
            return error
        raise AssertionError(version)

    def check_schema(self, version: int) -> None:
        """Raises BackendError for tables that are not of this version."""
        check_schema(f"the tables {self.table} of {self.name}", version, SCHEMA, "table")


def _safe(text: str) -> str:
    """The beginning of a message, up to where it quotes a value: bytes in ", strings in '."""
    return " ".join(re.split(r"""b?"|(?<!\w)'""", text, maxsplit=1)[0].split())[:200] or "one that quotes values"
