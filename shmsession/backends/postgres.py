"""PostgreSQL, 12 or newer, by psycopg 3: one table of rows, one statement for a batch."""

import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from math import inf
from typing import Any, Final, TypeVar
from urllib.parse import unquote

from psycopg import errors

from shmsession.errors import BackendError, ConfigError

from .base import SENTINEL, STATES, Answer, Mark, Row, State, check_schema, wins
from .postgres_array import of_bytes, of_int2, of_int8
from .postgres_pool import BUSY, Connection, Pool, checked, name_of

T = TypeVar("T")

SCHEMA: Final = 1
"""The version of the tables that this module makes and understands."""

_PAGE: Final = 1000
_MADE_BY_OTHERS: Final = (*BUSY, errors.UniqueViolation, errors.DuplicateTable, errors.DuplicateObject)
"""What IF NOT EXISTS answers when others make the same: what they made may be seen a moment later only."""
_UNKNOWN: Final = (errors.FeatureNotSupported, errors.SyntaxError, errors.InvalidParameterValue)
"""What engines answer that are like PostgreSQL and store rows in another way."""

_TABLE: Final = re.compile(r"(?:[A-Za-z_]\w{0,62}\.)?[A-Za-z_]\w{0,47}", re.ASCII)
_OURS: Final = ("table", "min_size", "max_size", "timeout")
_UP_TO_QUERY: Final = re.compile(r"\w+://(?:[^@/]*@)?[^?]*")
"""As libpq reads a URL: a question mark in the password need not be encoded."""

# An index on the horizon itself would make every touch write to all indexes; its hour seldom changes, so that most
# updates stay within their page (HOT), in the room that fillfactor leaves there. `was_…` is the row that the last write
# met: an upsert can return nothing else of it. Elsewhere than in PostgreSQL the quotient of integers may be none.
_CREATE: Final = """
CREATE TABLE IF NOT EXISTS {table} (
    handle bytea PRIMARY KEY,
    state int2 NOT NULL,
    epoch int8 NOT NULL,
    version int8 NOT NULL,
    horizon int8 NOT NULL,
    horizon_hour int8 GENERATED ALWAYS AS ((horizon / 3600000)::int8) STORED,
    "user" bytea NOT NULL,
    body bytea NOT NULL,
    was_state int2,
    was_epoch int8,
    was_version int8
);
"""
_TUNING: Final = """
ALTER TABLE {table}
    SET (fillfactor = 80), ALTER COLUMN body SET STORAGE EXTERNAL, ALTER COLUMN body SET STATISTICS 0;
"""
_REST: Final = """
CREATE INDEX IF NOT EXISTS {user_index} ON {table} ("user") WHERE state = 1;
CREATE INDEX IF NOT EXISTS {horizon_index} ON {table} (horizon_hour);
CREATE TABLE IF NOT EXISTS {meta} (version int4 NOT NULL);
INSERT INTO {meta} SELECT {schema} WHERE NOT EXISTS (SELECT 1 FROM {meta});
"""

# base.wins, in SQL.
_WINS: Final = """(excluded.state = 3
    OR old.state <> 3 AND (excluded.epoch, excluded.version) > (old.epoch, old.version))"""

_REPLACED: Final = ", ".join(
    f"{column} = CASE WHEN {_WINS} THEN excluded.{column} ELSE old.{column} END"
    for column in ("state", "epoch", "version", '"user"', "body")
)

# Ordered, so that two batches never wait for each other's rows.
_WRITE: Final = f"""
INSERT INTO {{table}} AS old (handle, state, epoch, version, horizon, "user", body)
SELECT * FROM unnest(%b::bytea[], %b::int2[], %b::int8[], %b::int8[], %b::int8[], %b::bytea[], %b::bytea[]) ORDER BY 1
ON CONFLICT (handle) DO UPDATE SET {_REPLACED}, horizon = greatest(old.horizon, excluded.horizon),
    was_state = old.state, was_epoch = old.epoch, was_version = old.version
RETURNING handle, was_state, was_epoch, was_version
"""  # nothing but constants

_ROW: Final = 'SELECT handle, state, epoch, version, horizon, "user", body FROM {table} '
_LOAD: Final = _ROW + "WHERE handle = %b AND state <> 2"
_SESSIONS_OF: Final = _ROW + 'WHERE "user" = %b AND state = 1 AND handle <> %b ORDER BY handle'
_HANDLES: Final = "SELECT handle FROM {table} WHERE handle > %b AND state = 1 ORDER BY handle LIMIT %b"
_COUNT: Final = """
SELECT (SELECT count(*) FROM {table} WHERE state = 1) - (SELECT count(*) FROM {table} WHERE handle = %b AND state = 1)
"""
_SWEEP: Final = """
WITH gone AS MATERIALIZED (
    SELECT handle FROM {table} WHERE horizon_hour <= (%b::int8 / 3600000)::int8 AND horizon < %b
    ORDER BY horizon_hour LIMIT %b FOR UPDATE SKIP LOCKED
)
DELETE FROM {table} AS old USING gone WHERE old.handle = gone.handle RETURNING old.handle
"""
_CLEAR: Final = """
WITH cleared AS MATERIALIZED (
    SELECT handle, state FROM {table} WHERE handle > %b AND state <> 3 ORDER BY handle LIMIT %b FOR UPDATE
), dead AS (
    UPDATE {table} AS old SET state = 3, "user" = '', body = '' FROM cleared WHERE old.handle = cleared.handle
)
SELECT handle, state FROM cleared ORDER BY handle
"""


class PostgresBackend:
    """Rows in a table of a PostgreSQL database.

    `url` and `options`: what libpq knows, such as `sslmode="verify-full"`, or `connect_timeout`, of 5 seconds unless
    given. `table` may name a schema. A process asks at most `max_size` questions at once, and keeps `min_size`
    connections when it asks none. `timeout`: seconds after which a question, with all that it waited for, counts as
    not answered. These four may also stand in the URL (`?table=shop&timeout=2`). Raises ConfigError.
    """

    remote = True
    expires = False

    def __init__(
        self, url: str, *, table: str = "shmsession", min_size: int = 1, max_size: int = 4, timeout: float = 5.0,
        **options: Any,
    ) -> None:  # fmt: skip
        url, ours = _parted(url)
        table = ours.get("table", table)
        if not _TABLE.fullmatch(table):
            raise ConfigError("table= must be a name of up to 48 letters, digits and _, or schema.name")
        try:
            min_size, max_size = int(ours.get("min_size", min_size)), int(ours.get("max_size", max_size))
            timeout = float(ours.get("timeout", timeout))
        except ValueError:
            timeout = 0
        if not 0 < timeout < inf or not 0 <= min_size <= max_size or not max_size:
            raise ConfigError("timeout= must be more than 0, and 0 ≤ min_size ≤ max_size, which is at least 1")
        self._conninfo = checked(url, options)
        self.name = name_of(self._conninfo)
        self._table = table
        self._names = _names(table)
        self._make_pool = partial(
            Pool, self._conninfo, name=self.name, table=table, min_size=min_size, max_size=max_size, timeout=timeout
        )
        self._pool: Pool | None = None
        self._pid = 0
        self._inherited: list[Pool] = []
        """What a parent had open before a fork is kept: its end here would disturb the parent."""

    def __repr__(self) -> str:
        return f"<PostgresBackend {self.name}, {self._table}>"

    async def open(self) -> None:
        """Begin to connect, without waiting for it."""
        if self._pool is not None and self._pid != os.getpid():
            self._inherited.append(self._pool)
            self._pool = None
        if self._pool is None:
            self._pool, self._pid = self._make_pool(), os.getpid()
            await self._pool.open()

    async def close(self) -> None:
        """Close the connections."""
        if self._pool is not None and self._pid == os.getpid():
            pool, self._pool = self._pool, None
            await pool.close()

    async def initialize(self) -> None:
        """Make the tables, unless they are there."""
        await self._with_connection(self._make, again=_MADE_BY_OTHERS)

    async def _make(self, connection: Connection) -> None:
        if await self._version(connection) is not None and await self._is_there(connection, "table"):
            return
        try:
            # One transaction, also without BEGIN. It takes the strongest lock first: so it cannot deadlock.
            await connection.execute(self._sql(_CREATE + _TUNING + _REST))
        except _UNKNOWN:
            await connection.execute(self._sql(_CREATE + _REST))

    async def _is_there(self, connection: Connection, name: str) -> bool:
        exists = b"SELECT 1 FROM pg_catalog.pg_class WHERE oid = to_regclass(%s)"
        return bool(await connection.ask(exists, [self._names[name]]))

    async def _version(self, connection: Connection) -> int | None:
        """That of the tables, if there are any. Raises BackendError when it is not ours."""
        if not await self._is_there(connection, "meta"):
            return None
        rows = await connection.ask(self._sql("SELECT version FROM {meta}"), [])
        version = int(rows[0][0]) if rows else 0
        check_schema(f"the tables {self._table} of {self.name}", version, SCHEMA, "table")
        return version

    # Rows.

    async def load(self, handle: bytes) -> Row | None:
        """The LIVE or DEAD row."""
        rows = await self._ask(_LOAD, [handle])
        return _row(rows[0]) if rows else None

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        """All of them in one statement."""
        if not rows:
            return []
        handles, states, epochs, versions, horizons, users, bodies = zip(*rows, strict=True)
        columns = [
            of_bytes(handles), of_int2(states), of_int8(epochs), of_int8(versions), of_int8(horizons), of_bytes(users),
            of_bytes(bodies),
        ]  # fmt: skip
        met = {
            handle: None if state is None else Mark(STATES.get(state, State.ERASED), epoch, version)
            for handle, state, epoch, version in await self._ask(_WRITE, columns)
        }
        return [Answer(wins(row, before := met[row.handle]), before) for row in rows]

    async def sweep(self, now: int, limit: int) -> int:
        """Delete rows whose horizon has passed; those that somebody writes just now are left for the next time."""
        return len(await self._ask(_SWEEP, [now, now, limit]))

    async def count(self) -> int:
        """How many LIVE rows there are."""
        return int((await self._ask(_COUNT, [SENTINEL]))[0][0])

    async def handles(self) -> AsyncIterator[bytes]:
        """The handles of all LIVE rows, in their order; no connection is held meanwhile."""
        last = SENTINEL
        while page := await self._ask(_HANDLES, [last, _PAGE]):
            for (last,) in page:
                yield last

    async def sessions_of(self, user: bytes) -> list[Row]:
        """The LIVE rows of a user."""
        if not user:
            return []
        return [_row(row) for row in await self._ask(_SESSIONS_OF, [user, SENTINEL])]

    async def clear(self) -> int:
        """All rows DEAD, a page at a time; what is new meanwhile may be left."""
        last, live = SENTINEL, 0
        while page := await self._ask(_CLEAR, [last, _PAGE]):
            last = page[-1][0]
            live += sum(state == State.LIVE for _, state in page)
        return live

    # Asking.

    def _sql(self, text: str) -> bytes:
        return text.format_map(self._names).encode()

    async def _ask(self, text: str, parameters: Sequence[object]) -> list[tuple[Any, ...]]:
        """All rows that a statement answers."""
        return await self._with_connection(lambda connection: connection.ask(self._sql(text), parameters))

    async def _with_connection(
        self, work: Callable[[Connection], Awaitable[T]], *, again: tuple[type[Exception], ...] = BUSY
    ) -> T:
        if self._pool is None:
            raise BackendError(f"{self.name} is not open: call `open` first.")
        return await self._pool.ask(work, again)


def _parted(url: str) -> tuple[str, dict[str, str]]:
    """A URL without what libpq does not know of, and that."""
    found = _UP_TO_QUERY.match(url)
    if not found or found.end() == len(url):
        return url, {}
    theirs, ours = [], {}
    for part in url[found.end() + 1 :].split("&"):
        name, _, value = part.partition("=")
        if unquote(name) in _OURS:
            ours[unquote(name)] = unquote(value)
        else:
            theirs.append(part)
    return "?".join((found[0], "&".join(theirs))) if theirs else found[0], ours


def _names(table: str) -> dict[str, str]:
    """The quoted identifiers that statements are filled in with."""
    schema, _, name = table.rpartition(".")
    within = f'"{schema}".' if schema else ""
    return {
        "table": f'{within}"{name}"', "meta": f'{within}"{name}_meta"', "user_index": f'"{name}_user"',
        "horizon_index": f'"{name}_horizon"', "schema": str(SCHEMA),
    }  # fmt: skip


def _row(values: tuple[Any, ...]) -> Row:
    handle, state, *rest = values
    try:
        return Row(handle, State(state), *rest)
    except ValueError:
        raise BackendError(f"the row of session {handle.hex()} is damaged: destroy it, or restore it") from None
