"""MySQL, 8.0 or newer, and MariaDB, 10.6 or newer, by asyncmy: one table of rows, one statement for a batch.

asyncmy, because a question on an event loop ends in time, and at once when it is cancelled: PyMySQL is as fast, but
blocks a thread, for which a fork would have to wait; aiomysql fails on bytes.

All values are written into the statements, as numbers and hexadecimal literals, which mean the same in every SQL mode
and character set. Nothing in them needs to be escaped.
"""

import os
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from math import inf
from typing import Any, Final

from asyncmy import errors

from shmsession.errors import BackendError, ConfigError

from .base import SENTINEL, STATES, Answer, Mark, Row, State, check_schema, wins
from .mysql_address import TLS, flag, parsed
from .mysql_errors import NO_SUCH_TABLE, number_of
from .mysql_pool import Connection, Pool

SCHEMA: Final = 1
"""The version of the tables that this module makes and understands."""

_PAGE: Final = 1000
_COLUMNS: Final = "handle, state, epoch, version, horizon, `user`, body"
_TABLE: Final = re.compile(r"[A-Za-z_]\w{0,47}", re.ASCII)

# `horizon_hour`: an index on the horizon itself would have to be written at every touch; its hour seldom changes.
# `was_…` is the row that the last write met: nothing tells it otherwise that both servers know.
_MAKE: Final = """
CREATE TABLE IF NOT EXISTS `{table}` (
    handle BINARY(20) NOT NULL PRIMARY KEY,
    state TINYINT NOT NULL,
    epoch BIGINT NOT NULL,
    version BIGINT NOT NULL,
    horizon BIGINT NOT NULL,
    horizon_hour BIGINT GENERATED ALWAYS AS (horizon DIV 3600000) STORED,
    `user` VARBINARY(255) NOT NULL,
    body LONGBLOB NOT NULL,
    was_state TINYINT,
    was_epoch BIGINT,
    was_version BIGINT,
    INDEX `{table}_user` (`user`, state),
    INDEX `{table}_horizon` (horizon_hour)
) ENGINE = InnoDB
"""
_IS_OURS: Final = f"SELECT {_COLUMNS}, horizon_hour, was_state, was_epoch, was_version FROM `{{table}}` LIMIT 0"
_MAKE_META: Final = """
CREATE TABLE IF NOT EXISTS `{table}_meta` (id TINYINT NOT NULL PRIMARY KEY, version INT NOT NULL) ENGINE = InnoDB
"""
_SET_VERSION: Final = f"INSERT INTO `{{table}}_meta` VALUES (1, {SCHEMA}) ON DUPLICATE KEY UPDATE version = version"
_VERSION: Final = "SELECT version FROM `{table}_meta`"

# base.wins, in SQL. Assignments are made from left to right, and each sees those before it: so `was_…` comes first, and
# is what all others compare with.
_WINS: Final = """(VALUES(state) = 3
    OR was_state <> 3 AND (VALUES(epoch), VALUES(version)) > (was_epoch, was_version))"""

_REPLACED: Final = ", ".join(
    f"{column} = IF({_WINS}, VALUES({column}), {column})" for column in ("state", "epoch", "version", "`user`", "body")
)

# VALUES() is what both servers understand; MySQL, since 8.0.20, recommends an alias that MariaDB does not know.
_WRITE: Final = f"INSERT INTO `{{table}}` ({_COLUMNS}) VALUES "
_UPDATE: Final = f"""
ON DUPLICATE KEY UPDATE was_state = state, was_epoch = epoch, was_version = version,
    {_REPLACED}, horizon = GREATEST(horizon, VALUES(horizon))
"""  # nothing but constants
_VALUES: Final = "(x'%s',%d,%d,%d,%d,x'%s',x'%s')"
_MET: Final = "SELECT handle, was_state, was_epoch, was_version FROM `{table}` WHERE handle IN ({handles})"

_ROW: Final = f"SELECT {_COLUMNS} FROM `{{table}}` "
_LOAD: Final = _ROW + "WHERE handle = x'{handle}' AND state <> 2"
_SESSIONS_OF: Final = _ROW + f"WHERE `user` = x'{{user}}' AND state = 1 AND handle <> x'{SENTINEL.hex()}'"
_HANDLES: Final = "SELECT handle FROM `{table}` WHERE handle > x'{last}' AND state = 1 ORDER BY handle LIMIT {page}"
_COUNT: Final = f"SELECT COUNT(*) FROM `{{table}}` WHERE state = 1 AND handle <> x'{SENTINEL.hex()}'"
_PAST: Final = """
SELECT handle FROM `{table}` WHERE horizon_hour <= {now} DIV 3600000 AND horizon < {now}
ORDER BY horizon_hour LIMIT {limit} FOR UPDATE SKIP LOCKED
"""
_DELETE: Final = "DELETE FROM `{table}` WHERE handle IN ({handles})"
_LIVING: Final = """
SELECT handle, state FROM `{table}` WHERE handle > x'{last}' AND state <> 3 ORDER BY handle LIMIT {page} FOR UPDATE
"""
_KILL: Final = "UPDATE `{table}` SET state = 3, `user` = '', body = '' WHERE handle IN ({handles})"


class MySQLBackend:
    """Rows in a table of a MySQL or MariaDB database.

    A process asks at most `max_size` questions at once. `timeout`: seconds after which a question, with all that it
    waited for, counts as not answered. `unix_socket`: the path of the server's, instead of host and port. `ssl_ca`,
    `ssl_cert`, `ssl_key`: PEM files; with any of them, or `ssl_verify`, it is TLS or nothing, and the server's
    certificate and name are checked unless `ssl_verify` is False. All of these may also stand in the URL
    (`?table=shop&timeout=2`). Raises ConfigError.
    """

    remote = True
    expires = False

    def __init__(
        self, url: str, *, table: str = "shmsession", max_size: int = 4, timeout: float = 5.0, unix_socket: str = "",
        ssl_ca: str = "", ssl_cert: str = "", ssl_key: str = "", ssl_verify: bool | None = None,
    ) -> None:  # fmt: skip
        address, said = parsed(url)
        self._address = address._replace(unix_socket=address.unix_socket or str(unix_socket))
        table = said.get("table", table)
        if not _TABLE.fullmatch(table):
            raise ConfigError("table= must be a name of up to 48 letters, digits and _")
        try:
            max_size, timeout = int(said.get("max_size", max_size)), float(said.get("timeout", timeout))
        except ValueError:
            timeout = 0
        if not 0 < timeout < inf or max_size < 1:
            raise ConfigError("timeout= must be more than 0, and max_size= at least 1")
        self._tls = TLS(
            str(said.get("ssl_ca", ssl_ca)), str(said.get("ssl_cert", ssl_cert)), str(said.get("ssl_key", ssl_key)),
            flag(said.get("ssl_verify", ssl_verify)),
        )  # fmt: skip
        if self._tls.key and not self._tls.certificate:
            raise ConfigError("ssl_key= is of no use without its certificate, ssl_cert=")
        self.name = self._address.name
        self._table = table
        self._make_pool = partial(Pool, self._address, table=table, max_size=max_size, timeout=timeout)
        self._pool: Pool | None = None
        self._pid = 0
        self._inherited: list[Pool] = []
        """What a parent had open before a fork is kept: its end here would disturb the parent."""

    def __repr__(self) -> str:
        return f"<MySQLBackend {self.name}, {self._table}>"

    async def open(self) -> None:
        """Read certificates; it connects when something is asked."""
        if self._pool is not None and self._pid != os.getpid():
            self._inherited.append(self._pool)
            self._pool = None
        if self._pool is None:
            self._pool, self._pid = self._make_pool(self._tls.context()), os.getpid()

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None and self._pid == os.getpid():
            pool, self._pool = self._pool, None
            await pool.close()

    async def initialize(self) -> None:
        """Make the tables, unless they are there.

        Nothing of it is a transaction, for DDL is none here. So each step is one that may be done again, by others at
        the same time too, and the version comes last.
        """
        async with self._connection() as connection:
            if await self._version(connection) is not None and await self._is_there(connection):
                return
            for step in (_MAKE, _IS_OURS, _MAKE_META, _SET_VERSION):
                await connection.ask(self._sql(step))
            await self._version(connection)

    async def _is_there(self, connection: Connection) -> bool:
        """Whether there is the table of rows."""
        try:
            await connection.ask(self._sql(_IS_OURS))
        except errors.MySQLError as error:
            if number_of(error) == NO_SUCH_TABLE:
                return False
            raise
        return True

    async def _version(self, connection: Connection) -> int | None:
        """That of the tables, if there are any. Raises BackendError when it is not ours."""
        try:
            rows = await connection.ask(self._sql(_VERSION))
        except errors.MySQLError as error:
            if number_of(error) == NO_SUCH_TABLE:
                return None
            raise
        if not rows:
            return None
        version = int(rows[0][0])
        check_schema(f"the tables {self._table} of {self.name}", version, SCHEMA, "table")
        return version

    # Rows.

    async def load(self, handle: bytes) -> Row | None:
        """The LIVE or DEAD row."""
        rows = await self._ask(self._sql(_LOAD, handle=handle.hex()))
        return _row(rows[0]) if rows else None

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        """All of them in one statement, or in as few as the server's max_allowed_packet admits."""
        met: dict[bytes, Mark | None] = {}
        if rows:
            async with self._connection() as connection:
                for batch in self._batches(sorted(rows, key=_order), connection.max_packet):
                    met |= await connection.transact(partial(self._write, batch))
        return [Answer(wins(row, before := met[row.handle]), before) for row in rows]

    def _batches(self, rows: Sequence[Row], max_packet: int) -> Iterator[list[str]]:
        """The values of rows, in their order: so two batches hardly ever wait for each other's rows."""
        room = max_packet - len(self._sql(_WRITE)) - len(_UPDATE) - 1
        batch: list[str] = []
        left = room
        for row in rows:
            handle, state, epoch, version, horizon, user, body = row
            values = _VALUES % (handle.hex(), state, epoch, version, horizon, user.hex(), body.hex())
            if len(values) > room:
                raise BackendError(
                    f"the session {handle.hex()} is too large for {self.name}: raise max_allowed_packet there to "
                    f"{len(values) + max_packet - room} bytes or more"
                )
            left -= len(values) + 1
            if left < 0 and batch:
                yield batch
                batch, left = [], room - len(values) - 1
            batch.append(values)
        yield batch

    async def _write(self, batch: Sequence[str], connection: Connection) -> dict[bytes, Mark | None]:
        """What each of these rows met. They are locked until the transaction ends: it is what this write met."""
        await connection.ask(self._sql(_WRITE) + ",".join(batch) + _UPDATE)
        handles = ",".join(values[1 : values.index(",")] for values in batch)
        return {
            handle: None if state is None else Mark(STATES.get(state, State.ERASED), epoch, version)
            for handle, state, epoch, version in await connection.ask(self._sql(_MET, handles=handles))
        }

    async def sweep(self, now: int, limit: int) -> int:
        """Delete rows whose horizon has passed; those that somebody writes just now are left for the next time."""

        async def sweep(connection: Connection) -> int:
            past = await connection.ask(self._sql(_PAST, now=now, limit=limit))
            if past:
                await connection.ask(self._sql(_DELETE, handles=_literals(past)))
            return len(past)

        async with self._connection() as connection:
            return await connection.transact(sweep)

    async def count(self) -> int:
        """How many LIVE rows there are."""
        return int((await self._ask(self._sql(_COUNT)))[0][0])

    async def handles(self) -> AsyncIterator[bytes]:
        """The handles of all LIVE rows, in their order; no connection is held meanwhile."""
        last = SENTINEL
        while page := await self._ask(self._sql(_HANDLES, last=last.hex(), page=_PAGE)):
            for (last,) in page:
                yield last

    async def sessions_of(self, user: bytes) -> list[Row]:
        """The LIVE rows of a user."""
        if not user:
            return []
        return [_row(row) for row in await self._ask(self._sql(_SESSIONS_OF, user=user.hex()))]

    async def clear(self) -> int:
        """All rows DEAD, a page at a time; what is new meanwhile may be left."""
        last, live = SENTINEL, 0

        async def kill(connection: Connection) -> list[tuple[Any, ...]]:
            page = await connection.ask(self._sql(_LIVING, last=last.hex(), page=_PAGE))
            if page:
                await connection.ask(self._sql(_KILL, handles=_literals(page)))
            return page

        while True:
            async with self._connection() as connection:
                page = await connection.transact(kill)
            if not page:
                return live
            last = page[-1][0]
            live += sum(state == State.LIVE for _, state in page)

    # Asking.

    def _sql(self, text: str, **values: object) -> str:
        return text.format(table=self._table, **values)

    def _connection(self) -> AbstractAsyncContextManager[Connection]:
        if self._pool is None:
            raise BackendError(f"{self.name} is not open: call `open` first.")
        return self._pool.connection()

    async def _ask(self, statement: str) -> list[tuple[Any, ...]]:
        async with self._connection() as connection:
            return await connection.ask(statement)


def _order(row: Row) -> tuple[bool, bytes]:
    """The same for all who write. The sentinel comes last: a server that loses a batch loses that too, and it shows."""
    return row.handle == SENTINEL, row.handle


def _literals(rows: Iterable[tuple[Any, ...]]) -> str:
    """The handles that rows begin with, as SQL."""
    return ",".join(f"x'{row[0].hex()}'" for row in rows)


def _row(values: tuple[Any, ...]) -> Row:
    handle, state, *rest = values
    try:
        return Row(handle, State(state), *rest)
    except ValueError:
        raise BackendError(f"the row of session {handle.hex()} is damaged: destroy it, or restore it") from None
