"""Connections to PostgreSQL: handed out for one question each, which is answered or fails in time.

Errors become ours here. What is passed on of a server's message is its first part only: the rest may quote rows.
"""

import asyncio
import contextlib
import math
import os
import random
import select
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any, Final, Self, TypeVar

import psycopg
from psycopg import AsyncConnection, errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from shmsession import _native
from shmsession.errors import BackendError, BackendUnavailable, ConfigError

from .postgres_array import Array, ArrayDumper

T = TypeVar("T")

CANCEL_SECONDS: Final = 0.5
FRESH_SECONDS: Final = 1.0
"""So long after it was given back a connection is believed to work, unless there is something to be read from it."""
BUSY: Final = (errors.DeadlockDetected, errors.SerializationFailure)
"""The transaction lost against others, at its commit perhaps, and changed nothing: it may be repeated."""
FIRST_PAUSE: Final = 0.01
LAST_PAUSE: Final = 0.25
"""Seconds before what lost is repeated, at most; each pause may be twice as long as the one before."""

_UNAVAILABLE: Final = (errors.QueryCanceled, errors.LockNotAvailable, errors.TooManyConnections)
_UNAVAILABLE_CLASSES: Final = ("08", "40", "57P")
"""SQLSTATEs of broken connections, of transactions that were rolled back, and of servers that start or shut down."""

_SETTINGS: Final = """
SELECT set_config('statement_timeout', %s, false), set_config('default_transaction_isolation', 'read committed', false)
WHERE pg_backend_pid() = %s
"""

_ANOTHER: Final = "The table {table} is not one of ours: choose another name by `table=`."
_ADVICE: Final = {
    "25006": "This server only answers questions: name the primary, or add target_session_attrs=read-write to the URL.",
    "3F000": "Make that schema first, or choose another table.",
    "42501": "Grant this user SELECT, INSERT, UPDATE and DELETE on {table} and SELECT on {table}_meta, and while they "
    "are made CREATE on their schema.",
    "42703": _ANOTHER,
    "42710": _ANOTHER,
    "42P01": "Make the tables: `shmsession initdb`, or `initialize()`.",
    "42P07": _ANOTHER,
    "42809": _ANOTHER,
    "42P10": _ANOTHER,
    "53100": "The server's disk is full: make room there.",
}
_DEFAULTS: Final[dict[str, Any]] = {"connect_timeout": 5, "application_name": "shmsession"}
_OTHERWISE: Final = "The server's log says more."


class Connection(AsyncConnection[tuple[Any, ...]]):
    """One that says why it could not be made; the pool keeps that to its log."""

    returned = -math.inf
    """When it was given back, on the loop's clock."""
    pooled = False
    """Whether a pooler such as PgBouncer is between. Any transaction may then be another server connection's, which
    knows no statements and settings of ours, and must be left without any."""

    @classmethod
    async def connect(  # type: ignore[override]  # called by the pool only, with these
        cls, conninfo: str, *, on_failure: Callable[[psycopg.Error], None], **kwargs: Any
    ) -> Self:
        """One that is ready; `on_failure` is told why there is none."""
        try:
            return await super().connect(conninfo, **kwargs)
        except psycopg.Error as error:
            on_failure(error)
            raise

    async def set_up(self, limit: int) -> None:
        """Make the settings; none where a pooler is between, whose process id is not that of the server's process."""
        self.adapters.register_dumper(Array, ArrayDumper)
        cursor = await self.execute(_SETTINGS, [str(limit), self.info.backend_pid])
        self.pooled = await cursor.fetchone() is None

    async def ask(self, statement: bytes, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        """All rows that a statement answers; it is one transaction."""
        cursor = self.cursor(binary=True)
        await cursor.execute(statement, parameters, prepare=not self.pooled)
        return await cursor.fetchall()

    async def cancel_safe(self, *, timeout: float = 30.0) -> None:  # noqa: ASYNC109  # psycopg's
        """Ask the server to stop; one that does not answer at once is cut off: somebody's time is over."""
        try:
            await super().cancel_safe(timeout=min(timeout, CANCEL_SECONDS))
        except BaseException:  # whatever it is; it goes on
            _cut(self)
            raise


class Pool:
    """At most `max_size` connections, `min_size` of them kept when idle. `timeout`: seconds for a whole question."""

    def __init__(self, conninfo: str, *, name: str, table: str, min_size: int, max_size: int, timeout: float) -> None:
        self._name, self._table, self._timeout = name, table, timeout
        self._failure: psycopg.Error | None = None
        self._waiting: set[asyncio.Timeout] = set()
        # Its own way to try again, at ever longer intervals, would keep a database away that is back: so at once
        # (reconnect_timeout=0), and from then on when somebody asks.
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            conninfo, connection_class=Connection, kwargs={"autocommit": True, "on_failure": self._note},
            min_size=min_size, max_size=max_size, configure=self._configure, check=self._check, timeout=timeout,
            reconnect_timeout=0, reconnect_failed=self._give_up, open=False,
        )  # fmt: skip

    async def open(self) -> None:
        """Begin to connect; do not wait for it."""
        await self._pool.open()

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close(timeout=min(self._timeout, 0.5))

    async def ask(self, work: Callable[[Connection], Awaitable[T]], again: tuple[type[Exception], ...]) -> T:
        """What `work` answers, given a connection, until `timeout` is over; errors of psycopg's become ours.

        As long as it raises one of `again` it is called again, after a pause.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        try:
            async with self._connection(deadline) as connection:
                limit = FIRST_PAUSE
                while True:
                    try:
                        return await work(connection)
                    except again:
                        pause = random.uniform(0, limit)  # noqa: S311  # so that they do not meet again
                        if loop.time() + pause >= deadline:
                            raise
                    await asyncio.sleep(pause)
                    limit = min(2 * limit, LAST_PAUSE)
        except (psycopg.Error, TimeoutError) as error:
            raise self._translated(error, late=loop.time() >= deadline) from None

    @contextlib.asynccontextmanager
    async def _connection(self, deadline: float) -> AsyncIterator[Connection]:
        """One that works. It is cut off at that time of the loop's clock.

        A server behind a pooler knows no limit, so that it is told before to give up.
        """
        connection = await self._take()
        last = deadline - min(CANCEL_SECONDS, self._timeout / 2) if connection.pooled else None
        try:
            with _cut_at(connection, deadline):
                async with asyncio.timeout_at(last):
                    yield connection
        except errors.ReadOnlySqlTransaction:
            await self._pool.drain()  # new ones may lead to the server that is the primary now
            raise
        finally:
            connection.returned = asyncio.get_running_loop().time()
            await self._pool.putconn(connection)

    async def _take(self) -> Connection:
        """Raises TimeoutError at once when there is no connection and none can be made."""
        async with asyncio.timeout(None) as patience:
            self._waiting.add(patience)
            try:
                return await self._pool.getconn()
            finally:
                self._waiting.discard(patience)

    # What the pool calls.

    def _note(self, failure: psycopg.Error) -> None:
        self._failure = failure

    async def _give_up(self, pool: AsyncConnectionPool[Connection]) -> None:
        if pool.get_stats()["pool_size"] == 0:  # else one of the others will be free in time
            given_up, self._waiting = self._waiting, set()
            for patience in given_up:
                patience.reschedule(0)

    async def _configure(self, connection: Connection) -> None:
        try:
            with _cut_at(connection, asyncio.get_running_loop().time() + self._timeout):
                await connection.set_up(max(1, round(self._timeout * 1000)))
        except psycopg.Error as error:  # a pooler lets in though it has no server
            self._note(error)
            raise
        self._failure = None

    async def _check(self, connection: Connection) -> None:
        """When one connection is broken, all idle ones are, most likely: finding out one by one would take seconds."""
        now = asyncio.get_running_loop().time()
        if now - connection.returned < FRESH_SECONDS and _is_silent(connection):
            return
        try:
            with _cut_at(connection, now + self._timeout / 2):
                await self._pool.check_connection(connection)
        except psycopg.Error:
            await self._pool.drain()
            raise

    # Errors.

    def _translated(self, error: psycopg.Error | TimeoutError, *, late: bool) -> BackendError:
        state = getattr(error, "sqlstate", None) or ""
        if isinstance(error, psycopg.Error) and state and not _means_unavailable(error, state):
            advice = _ADVICE.get(state, _OTHERWISE).format(table=self._table)
            return BackendError(f"{self._name} answered: {error.diag.message_primary} (SQLSTATE {state}). {advice}")
        if isinstance(error, BUSY):
            return BackendUnavailable(f"{self._name}: others kept writing the same rows for {self._timeout:g} s.")
        if isinstance(error, TimeoutError | PoolTimeout) and self._failure:
            return BackendUnavailable(f"{self._name} cannot be reached: {_line(self._failure)}")
        if late or isinstance(error, TimeoutError):
            return BackendUnavailable(f"{self._name} did not answer within {self._timeout:g} s.")
        if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return BackendUnavailable(f"{self._name} broke off: {_line(error)}")
        return BackendError(f"{self._name}: {type(error).__name__}. {_OTHERWISE}")  # its text may quote what was sent


def _means_unavailable(error: psycopg.Error, state: str) -> bool:
    return isinstance(error, _UNAVAILABLE) or state.startswith(_UNAVAILABLE_CLASSES)


def _line(error: psycopg.Error) -> str:
    """What the driver or the server said, in one line; neither names passwords."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def _cut_at(connection: Connection, deadline: float) -> Iterator[None]:
    """Break the connection at that time of the loop's clock: what waits for its answer then fails at once.

    To cancel the waiting instead would have psycopg ask the server, which is the one that does not answer, for 10 s.
    """
    timer = asyncio.get_running_loop().call_at(deadline, _cut, connection)
    try:
        yield
    finally:
        timer.cancel()


def _is_silent(connection: Connection) -> bool:
    """Whether the server has said nothing since its answer, not even that it hangs up."""
    poll = _native.original(select, "poll")()  # gevent's would make a hub of its own in this thread
    poll.register(connection.fileno(), select.POLLIN)
    return not poll.poll(0)


def _cut(connection: Connection) -> None:
    with (
        contextlib.suppress(OSError, psycopg.OperationalError),
        socket.socket(fileno=os.dup(connection.fileno())) as line,
    ):
        line.shutdown(socket.SHUT_RDWR)


def checked(url: str, options: dict[str, Any]) -> str:
    """libpq's connection string of a URL, and further options where it says nothing.

    Raises ConfigError, which quotes nothing of them.
    """
    try:
        parts = {**conninfo_to_dict("", **options), **conninfo_to_dict(url)}
        if any("@" in str(parts.get(part, "")) for part in ("host", "port", "dbname")):
            raise psycopg.ProgrammingError  # the tail of a password with an @ or / in it
        return make_conninfo("", **{**_DEFAULTS, **parts})
    except psycopg.Error:
        raise ConfigError(
            "this is no PostgreSQL URL: write postgresql://user:password@host:5432/database?sslmode=verify-full, with "
            "options that libpq knows and special characters of the password percent-encoded"
        ) from None


def name_of(conninfo: str) -> str:
    """Where it leads, without user and password."""
    parts = conninfo_to_dict(conninfo)
    return f"postgresql://{parts.get('host') or 'localhost'}/{parts.get('dbname') or ''}"
