"""SurrealDB, 2 or 3: one table of records, on a server or within this very process."""

import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from surrealdb import RecordID

from shmsession.errors import BackendError, ConfigError

from .base import SENTINEL, STATES, Answer, Mark, Row, State, wins
from .surrealdb_client import Client, Failed
from .surrealdb_engine import Embedded
from .surrealdb_socket import Socket
from .surrealdb_statements import FIRST, Statements

_PAGE: Final = 1000
_CHUNK_BYTES: Final = 1 << 20
"""Of about so many bytes is what is sent at once; servers refuse what is much more."""

_TABLE: Final = re.compile(r"[A-Za-z_]\w{0,47}", re.ASCII)
_PORTS: Final = {"ws": 8000, "wss": 443}
_EXAMPLES: Final = (
    "write surrealdb+ws://user:password@host:8000/namespace/database or surrealdb+wss://…, with special characters "
    "percent-encoded, surrealdb+surrealkv:///path, or surrealdb+mem://; ?table=, &timeout= and, with wss, &ca_file= "
    "may follow"
)


class SurrealDBBackend:
    """Rows in a table of a SurrealDB database.

    `surrealdb+ws://user:password@host:8000/namespace/database`, or `+wss` with TLS, is a server;
    `surrealdb+surrealkv:///path` a directory, and `surrealdb+mem://` memory, of a single process. `table`: a name for
    the tables and indexes. `timeout`: seconds after which a question, with all that it waited for, counts as not
    answered. `ca_file`: the certificates that are believed instead of the system's. These may also stand in the URL
    (`?table=shop&timeout=2`). Raises ConfigError.
    """

    expires = False

    def __init__(
        self, url: str, *, table: str = "shmsession", timeout: float = 5.0, ca_file: str | None = None
    ) -> None:
        parts = _split(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        table, ca_file = query.pop("table", table), query.pop("ca_file", ca_file)
        try:
            timeout = float(query.pop("timeout", timeout))
        except ValueError:
            timeout = 0
        if query or parts.fragment:
            raise ConfigError(f"of this SurrealDB URL not everything is known: {_EXAMPLES}")
        if not _TABLE.fullmatch(table):
            raise ConfigError("table= must be a name of up to 48 letters, digits and _, no digit first")
        if not 0 < timeout < math.inf:
            raise ConfigError("timeout= must be a number of seconds, more than 0")
        self._table = table
        self._statements = Statements(table)
        self._client = self._connected(parts, ca_file, timeout)
        self.remote = isinstance(self._client, Socket)
        self.name = self._client.name

    def _connected(self, parts: SplitResult, ca_file: str | None, timeout: float) -> Client:
        engine = parts.scheme.removeprefix("surrealdb+")
        if ca_file is not None and engine != "wss":
            raise ConfigError("ca_file= is for surrealdb+wss:// only: the others have no TLS")
        if engine == "mem":
            if parts.netloc or parts.path:
                raise ConfigError("surrealdb+mem:// has no name: several tables in one process need ?table=")
            return Embedded(None, table=self._table, timeout=timeout)
        if engine == "surrealkv":
            self.path = _path(parts)
            return Embedded(self.path, table=self._table, timeout=timeout)
        names = [unquote(name) for name in parts.path.split("/")[1:]]
        if engine not in _PORTS or len(names) != 2 or not all(names) or not parts.hostname:
            raise ConfigError(f"this is no SurrealDB URL: {_EXAMPLES}")
        if (parts.username is None) != (parts.password is None):
            raise ConfigError(f"a user needs a password, and the other way round: {_EXAMPLES}")
        login = None
        if parts.username is not None and parts.password is not None:
            login = unquote(parts.username), unquote(parts.password)
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return Socket(
            f"{engine}://{host}:{parts.port or _PORTS[engine]}", namespace=names[0], database=names[1], login=login,
            ca_file=ca_file, table=self._table, timeout=timeout,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"<SurrealDBBackend {self.name}, table {self._table}>"

    async def open(self) -> None:
        """See Backend. An engine within the process is started."""
        await self._client.open()

    async def close(self) -> None:
        """See Backend."""
        await self._client.close()

    async def initialize(self) -> None:
        """See Backend. Makes the tables, unless they are there."""
        async with self._client.question():
            version = await self._version()
            if version is None:
                try:
                    version = await self._client.ask(self._statements.create)
                except Failed as failed:
                    if not failed.is_made:
                        raise
                    version = await self._version()  # others made it meanwhile
                    if version is None:
                        raise
        self._client.check_schema(version)

    async def load(self, handle: bytes) -> Row | None:
        """See Backend."""
        async with self._client.question():
            found = await self._client.ask(self._statements.load, id=self._id(handle))
        row = None if found is None else self._row(handle, found)
        return None if row is None or row.state is State.ERASED else row

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        """See Backend. All rows are one transaction, unless they are more than a megabyte."""
        answers = []
        async with self._client.question():
            for chunk in _chunks(rows):
                records = [self._record(row) for row in chunk]
                ids = [record["id"] for record in records]
                stood = await self._client.ask(self._statements.write, rows=records, ids=ids)
                before = {
                    found.id: Mark(STATES.get(state, State.ERASED), epoch, version)
                    for found, state, epoch, version in stood
                    if found is not None
                }
                for row in chunk:
                    mark = before.get(row.handle.hex())
                    answers.append(Answer(wins(row, mark), mark))
        return answers

    async def sweep(self, now: int, limit: int) -> int:
        """See Backend. In transactions of at most 1000 rows."""
        total = 0
        while total < limit:
            batch = min(_PAGE, limit - total)
            async with self._client.question():
                gone: int = await self._client.ask(self._statements.sweep, now=now, limit=batch)
            total += gone
            if gone < batch:
                break
        return total

    async def count(self) -> int:
        """See Backend. Looks at every row."""
        return await self._through_all(self._statements.count)

    async def handles(self) -> AsyncIterator[bytes]:
        """See Backend. In the order of handles, 1000 at a time."""
        last = FIRST
        while True:
            async with self._client.question():
                page: list[str] = await self._client.ask(self._statements.handles(last, _PAGE))
            for last in page:
                yield bytes.fromhex(last)
            if len(page) < _PAGE:
                return

    async def sessions_of(self, user: bytes) -> list[Row]:
        """See Backend."""
        if not user:
            return []
        async with self._client.question():
            found = await self._client.ask(self._statements.sessions_of, user=user.hex())
        rows = [self._row(bytes.fromhex(id_.id), values) for id_, *values in found]
        return [row for row in rows if row.handle != SENTINEL]

    async def clear(self) -> int:
        """See Backend. In transactions of at most 1000 rows."""
        return await self._through_all(self._statements.clear)

    async def _through_all(self, statement: Callable[[str, int], str]) -> int:
        """The sum of what it answers for each page of rows."""
        total, last = 0, FIRST
        while True:
            async with self._client.question():
                live, end = await self._client.ask(statement(last, _PAGE))
            if end is None:
                return total
            total, last = total + live, end.id

    async def _version(self) -> int | None:
        """The version of the tables; None where there are none."""
        try:
            version: int | None = await self._client.ask(self._statements.version)
        except Failed as failed:
            if not failed.is_missing:
                raise
            return None
        return version

    def _id(self, handle: bytes) -> RecordID:
        return RecordID(self._table, handle.hex())

    def _record(self, row: Row) -> dict[str, Any]:
        return {
            "id": self._id(row.handle), "state": int(row.state), "epoch": row.epoch, "version": row.version,
            "horizon": row.horizon, "user": row.user.hex(), "body": row.body,
        }  # fmt: skip

    def _row(self, handle: bytes, values: list[Any]) -> Row:
        state, epoch, version, horizon, user, body = values
        try:
            return Row(handle, State(state), epoch, version, horizon, bytes.fromhex(user), body)
        except ValueError:
            raise BackendError(f"the row of session {handle.hex()} is damaged: destroy it, or restore it") from None


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # which is where a password that is not encoded shows
    except ValueError:
        raise ConfigError(f"this is no SurrealDB URL: {_EXAMPLES}") from None
    return parts


def _path(parts: SplitResult) -> Path:
    path = unquote(parts.netloc + parts.path).rstrip("/")
    if not path or "\0" in path or "?" in path or "@" in parts.netloc:
        raise ConfigError(f"surrealdb+surrealkv:// needs a directory: {_EXAMPLES}")
    return Path(path).absolute()


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        if chunk and size + len(row.body) > _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += len(row.body)
    if chunk:
        yield chunk
