"""Connections to MySQL or MariaDB, by asyncmy: handed out for one question each, which is answered or fails in time.

A connection that a question failed on, or that was cancelled in the middle of, is cut off and not used again: whatever
it left open is undone by the server.
"""

import asyncio
import contextlib
import math
import select
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final, TypeVar

import asyncmy
from asyncmy import errors

from shmsession import _native

from .mysql_address import Address
from .mysql_errors import BUSY, MALFORMED, NO_PLUGIN, READ_ONLY, explain, number_of

T = TypeVar("T")

FRESH_SECONDS: Final = 1.0
"""So long after its last use a connection is believed to work, unless there is something to be read from it."""

_ATTEMPTS: Final = 5
_CLOSE_SECONDS: Final = 0.5

# Whatever the server's settings are: a value that does not fit is an error and not cut off, each statement is its own
# transaction, and nothing goes on for longer than anybody waits for it. What stands in /*M! */ is MariaDB's; in /*! */,
# MySQL's from that version on, which MariaDB skips.
_SETTINGS: Final = (
    "SET SESSION sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION', autocommit = 1,"
    " innodb_lock_wait_timeout = {seconds}, lock_wait_timeout = {seconds}"
    " /*M! , max_statement_time = {seconds} */ /*!80000 , max_execution_time = {seconds}000 */"
)
# Rows that are not there are not locked, so that writers of new rows do not wait for each other.
_ISOLATION: Final = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"


class Connection:
    """A connection that works, for one question after another."""

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self._transport: asyncio.Transport = driver._transport  # cut off, the driver forgets it
        self.max_packet = 0
        """The size in bytes that no statement may exceed."""

    async def prepare(self, seconds: int) -> None:
        """Set what our statements rely on; none is to take longer than `seconds`."""
        await self.ask(_SETTINGS.format(seconds=seconds))
        await self.ask(_ISOLATION)
        ((self.max_packet,),) = await self.ask("SELECT @@max_allowed_packet")
        await self.ping()

    async def ask(self, statement: str) -> list[tuple[Any, ...]]:
        """All rows that a statement answers."""
        cursor = self._driver.cursor()
        await cursor.execute(statement)
        return list(await cursor.fetchall())

    async def transact(self, work: Callable[["Connection"], Awaitable[T]]) -> T:
        """What `work` returns, in a transaction, which is repeated when it lost against others'."""
        attempt = 1
        while True:
            try:
                await self.ask("START TRANSACTION")
                result = await work(self)
                await self.ask("COMMIT")
            except errors.MySQLError as error:
                if number_of(error) not in BUSY or attempt == _ATTEMPTS:
                    raise
                attempt += 1
                await self.ask("ROLLBACK")
            else:
                return result

    def seems_to_work(self) -> bool:
        """Whether it answered just now, and the server has said nothing since, not even that it hangs up."""
        now = asyncio.get_running_loop().time()
        if self._transport.is_closing() or now - self._driver.last_usage > FRESH_SECONDS:
            return False
        poll = _native.original(select, "poll")()  # gevent's would make a hub of its own in this thread
        poll.register(self._transport.get_extra_info("socket").fileno(), select.POLLIN)
        return not poll.poll(0)

    async def ping(self) -> None:
        """Raises an error of the driver's unless the server answers, and may be written to.

        One that became a replica keeps its connections, and what it lacks is not absent.
        """
        ((read_only,),) = await self.ask("SELECT @@global.read_only")
        if read_only not in (0, "OFF"):
            raise errors.OperationalError(READ_ONLY, "The server has become read-only")

    def cut(self) -> None:
        """Break it, at once: the driver's own way waits until the server has read what was sent."""
        self._driver.close()
        self._transport.abort()

    async def end(self) -> None:
        """Tell the server, and close."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._driver.ensure_closed()
        except (errors.MySQLError, OSError):
            pass
        finally:
            self.cut()


class Pool:
    """At most `max_size` connections. `timeout`: seconds for a whole question, waiting for its turn included."""

    def __init__(
        self, address: Address, tls: ssl.SSLContext | None, *, table: str, max_size: int, timeout: float
    ) -> None:
        self._address, self._tls = address, tls
        self._table, self._timeout = table, timeout
        self._turns = asyncio.Semaphore(max_size)
        self._idle: list[Connection] = []
        self._is_closed = False

    async def close(self) -> None:
        """Close all connections; one that is in use, as soon as it is not."""
        self._is_closed = True
        idle, self._idle = self._idle, []
        for connection in idle:
            await connection.end()

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """A connection that works, until `timeout` is over; errors of the driver's become ours."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        try:
            async with asyncio.timeout_at(deadline), self._turns:
                connection = await self._take()
                try:
                    yield connection
                except BaseException:  # cancelled, too: it may be in the middle of anything
                    connection.cut()
                    raise
                if self._is_closed:
                    connection.cut()
                else:
                    self._idle.append(connection)
        except (errors.MySQLError, OSError) as error:  # TimeoutError too
            self._drop()  # another server may answer to the same name now
            late = loop.time() >= deadline
            raise explain(error, self._address.name, self._table, seconds=self._timeout, late=late) from None

    async def _take(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.seems_to_work() or await self._answers(connection):
                return connection
        return await self._connect()

    async def _answers(self, connection: Connection) -> bool:
        """When one connection is broken, all idle ones are, most likely: finding out one by one would take seconds."""
        try:
            async with asyncio.timeout(self._timeout / 2):
                await connection.ping()
        except BaseException as error:  # cancelled, too
            connection.cut()
            self._drop()
            if isinstance(error, errors.MySQLError | OSError):
                return False
            raise
        return True

    def _drop(self) -> None:
        idle, self._idle = self._idle, []
        for connection in idle:
            connection.cut()

    async def _connect(self) -> Connection:
        address = self._address
        is_private = self._tls is not None or address.unix_socket
        try:
            driver = await asyncmy.connect(
                user=address.user, password=address.password, host=address.host, port=address.port,
                database=address.database, unix_socket=address.unix_socket or None, ssl=self._tls,
                charset="utf8mb4", autocommit=None, connect_timeout=self._timeout, program_name="shmsession",
                auth_plugin_map={} if is_private else dict.fromkeys(("mysql_clear_password", "dialog"), _Refused),
            )  # fmt: skip
        except RuntimeError as error:  # a package is missing
            raise errors.OperationalError(NO_PLUGIN, str(error)) from None
        except (AssertionError, LookupError, ValueError, struct.error) as error:
            raise errors.OperationalError(MALFORMED, f"this is no MySQL server ({type(error).__name__})") from None
        connection = Connection(driver)
        try:
            await connection.prepare(math.ceil(self._timeout))
        except BaseException:  # cancelled, too
            connection.cut()
            raise
        return connection


class _Refused:
    """For a server that wants to be told the password as it is, where others may listen, or be that server."""

    def __init__(self, connection: object) -> None: ...

    def authenticate(self, packet: object) -> None:
        raise errors.OperationalError(NO_PLUGIN, "the server wants the password in the clear, which needs TLS")
