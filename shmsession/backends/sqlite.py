"""SQLite: a file on this host, for all its processes at once. Nothing but Python's standard library is needed.

Write-ahead log, so that readers and the writer do not wait for each other, and `synchronous=FULL`: what is answered
survives a power loss. With NORMAL, the last transactions would not, and a session that was destroyed, and forgotten
here because the database had said so, would live again. A batch is one transaction: 500 rows cost one fsync.
"""

import asyncio
import json
import math
import os
import re
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar
from urllib.parse import parse_qsl, unquote

from shmsession.errors import BackendError, BackendUnavailable, ConfigError

from .base import SENTINEL, STATES, Answer, Mark, Row, State, wins
from .sqlite_file import File, Statements, schema_of

P = ParamSpec("P")
T = TypeVar("T")

PAGE: Final = 1000
"""How many rows are listed, swept or cleared in one go: no longer than a large batch takes to write."""

_TYPES: Final = [int, int, int, bytes, bytes]
"""Of a row's epoch, version, horizon, user and body: SQLite keeps any value in any column."""
_NOTHING: Final = (None, -1, b"")
_BUSY: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_UNAVAILABLE: Final = {
    sqlite3.SQLITE_IOERR: "cannot be read or written: see what the system's log says of the disk",
    sqlite3.SQLITE_PROTOCOL: "cannot be locked: it must be on a disk of this host, not on a network file system",
}
_ERRORS: Final = {
    sqlite3.SQLITE_FULL: "is full, or its disk is: make room",
    sqlite3.SQLITE_READONLY: "is read-only: let this user write to it and to its directory",
    sqlite3.SQLITE_PERM: "is closed to this user: let it read and write the file",
    sqlite3.SQLITE_CORRUPT: "is damaged: stop all that use it, then restore it, or move it away for a new one",
    sqlite3.SQLITE_NOTADB: "is no SQLite database: correct the path, or move that file away",
}

_IDENTIFIER: Final = re.compile(r"(?!sqlite_)[a-z_][a-z0-9_]{0,40}", re.ASCII | re.IGNORECASE)


class SQLiteBackend:
    """A table in an SQLite file that all processes of this host may use at once.

    `path`: of the file, or `sqlite:///path` (relative to the working directory) or `sqlite:////path`. Its directory
    must be there; the file is made by `initialize`, with mode 0600. `table`: a name for the tables and indexes.
    `timeout`: seconds for which a lock of another process is waited for. Both may also stand in the URL
    (`?table=shop&timeout=2`). Raises ConfigError.
    """

    name = "sqlite"
    remote = False
    expires = False

    def __init__(self, path: str | os.PathLike[str], *, table: str = "shmsession", timeout: float = 5.0) -> None:
        file, query = _parsed(os.fspath(path))
        table, timeout = query.get("table", table), _number(query.get("timeout", timeout))
        if not _IDENTIFIER.fullmatch(table):
            raise ConfigError(f"table {table!r}: write letters, digits and _, at most 41, no digit first")
        if not 0 < timeout < math.inf:
            raise ConfigError("timeout: write seconds, more than 0")
        self.path = Path(file).absolute()
        self._sql = Statements(table)
        self._timeout = timeout
        self._file: File | None = None

    def __repr__(self) -> str:
        return f"<SQLiteBackend {self.path}, table {self._sql.table}>"

    async def open(self) -> None:
        """See Backend. Nothing is opened before the first question."""
        if self._file is None:
            self._file = File(self.path, self._sql)

    async def close(self) -> None:
        """See Backend."""
        file, self._file = self._file, None
        if file is not None and file.thread.pid == os.getpid():
            await file.thread.end(file.close)

    async def initialize(self) -> None:
        """See Backend. Makes the file."""
        await self._patiently(self._initialize, make=True)

    async def load(self, handle: bytes) -> Row | None:
        """See Backend."""
        return await self._ask(self._load, handle)

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        """See Backend. All rows are one transaction."""
        return await self._ask(self._write, rows) if rows else []

    async def sweep(self, now: int, limit: int) -> int:
        """See Backend. In transactions of at most 1000 rows."""
        total = 0
        while total < limit:
            batch = min(PAGE, limit - total)
            gone = await self._ask(self._sweep, now, batch)
            total += gone
            if gone < batch:
                break
        return total

    async def count(self) -> int:
        """See Backend."""
        return await self._ask(self._count)

    async def handles(self) -> AsyncIterator[bytes]:
        """See Backend. In the order of handles, 1000 at a time."""
        last = SENTINEL
        while page := await self._ask(self._fetch, self._sql.handles, last, PAGE):
            for (last,) in page:
                yield last

    async def sessions_of(self, user: bytes) -> list[Row]:
        """See Backend."""
        if not user:
            return []
        return [_row(found) for found in await self._ask(self._fetch, self._sql.of_user, user)]

    async def clear(self) -> int:
        """See Backend. In transactions of at most 1000 rows."""
        total, last = 0, SENTINEL
        while (page := await self._ask(self._clear, last)) is not None:
            last, killed = page
            total += killed
        return total

    async def _ask(
        self, work: Callable[Concatenate[sqlite3.Connection, P], T], *arguments: P.args, **options: P.kwargs
    ) -> T:
        return await self._patiently(lambda db: work(db, *arguments, **options))

    async def _patiently(self, work: Callable[[sqlite3.Connection], T], *, make: bool = False) -> T:
        """What `work` returns on the thread; while the file is locked, again. Raises BackendError."""
        if self._file is None:
            raise BackendUnavailable(f"{self.path} is closed: open the backend first")
        if self._file.thread.pid != os.getpid():
            self._file = File(self.path, self._sql)
        file, deadline = self._file, time.monotonic() + self._timeout
        while True:
            try:
                return await file.thread.run(partial(file.ask, work, make=make))
            except sqlite3.Error as error:
                if _code(error) not in _BUSY or time.monotonic() >= deadline:
                    raise self._explained(error) from error
            except OSError as error:
                raise BackendUnavailable(
                    f"{self.path} cannot be made ({error.strerror}): see that its directory is there, that this user "
                    "may write in it, and that its disk has room"
                ) from error
            await asyncio.sleep(0.001)

    def _explained(self, error: sqlite3.Error) -> BackendError:
        code = _code(error)
        if code in _BUSY:
            return BackendUnavailable(
                f"{self.path} was locked for {self._timeout:g} s: see which process holds a transaction open"
            )
        if code == sqlite3.SQLITE_CANTOPEN:
            return BackendUnavailable(f"{self.path} {self._why_not_opened()}")
        if code in _UNAVAILABLE:
            return BackendUnavailable(f"{self.path} {_UNAVAILABLE[code]}")
        if code in _ERRORS:
            return BackendError(f"{self.path} {_ERRORS[code]}")
        return BackendError(
            f"{self.path}: {error}: look at it with the sqlite3 program; `shmsession initdb` makes tables"
        )

    def _why_not_opened(self) -> str:
        if self.path.is_dir():
            return "is a directory: name a file in it"
        if not self.path.parent.is_dir():
            return "is in a directory that is not there: make it; in a URL an absolute path takes four slashes"
        if not self.path.exists():
            return "is not there: run `shmsession initdb`, which makes it"
        return "cannot be opened: let this user read and write it, and make files in its directory"

    # ── on the thread ──

    def _initialize(self, db: sqlite3.Connection) -> None:
        with _transaction(db):
            schema_of(db, self._sql, self.path)
            for statement in self._sql.create:
                db.execute(statement)

    def _fetch(self, db: sqlite3.Connection, sql: str, *values: bytes | int) -> list[tuple[Any, ...]]:
        return db.execute(sql, values).fetchall()

    def _load(self, db: sqlite3.Connection, handle: bytes) -> Row | None:
        found = db.execute(self._sql.load, (handle,)).fetchone()
        row = None if found is None else _row(found)
        return None if row is None or row.state is State.ERASED else row

    def _write(self, db: sqlite3.Connection, rows: Sequence[Row]) -> list[Answer]:
        with _transaction(db):
            stored = self._stored(db, rows)
            answers, put, rewrite, prolong = [], [], [], []
            for row in rows:
                handle, state, epoch, version, horizon, user, body = row
                before, until, owner = stored.get(handle, _NOTHING)
                applied = wins(row, before)
                answers.append(Answer(applied, before))
                # int(): the driver looks for an adapter for every value that is not exactly of a type it knows.
                values = (handle, int(state), epoch, version, max(until, horizon), user, body)
                if not applied:
                    if horizon > until:
                        prolong.append(values)
                elif before is not None and state is before.state is State.LIVE and horizon <= until and user == owner:
                    # LIVE over LIVE of the same user, until no later: no index need be touched.
                    rewrite.append(values)
                else:
                    put.append(values)
            self._insert(db, put, self._sql.put)
            self._insert(db, rewrite, self._sql.rewrite)
            self._insert(db, prolong, self._sql.prolong)
            return answers

    def _insert(self, db: sqlite3.Connection, rows: Sequence[tuple[bytes | int, ...]], conflict: str) -> None:
        """Many rows by one statement, or as few as may be.

        The driver gives up Python's lock at each step, and a thread that wants it back waits until others let go.
        """
        most = _values(db) // 7
        for begin in range(0, len(rows), most):
            some = rows[begin : begin + most]
            db.execute(self._sql.insert(len(some), conflict), list(chain.from_iterable(some)))

    def _stored(self, db: sqlite3.Connection, rows: Sequence[Row]) -> dict[bytes, tuple[Mark, int, bytes]]:
        """Mark, horizon and user of what is there under the rows' handles."""
        found, most = {}, _values(db)
        for begin in range(0, len(rows), most):
            handles = [row.handle for row in rows[begin : begin + most]]
            ((text,),) = self._fetch(db, self._sql.stored(len(handles)), *handles)
            for handle, state, epoch, version, horizon, user in json.loads(text):
                mark = Mark(STATES.get(state, State.ERASED), epoch, version)
                found[bytes.fromhex(handle)] = mark, horizon, bytes.fromhex(user)
        return found

    def _sweep(self, db: sqlite3.Connection, now: int, limit: int) -> int:
        with _transaction(db):
            return db.execute(self._sql.sweep, (now, limit)).rowcount

    def _count(self, db: sqlite3.Connection) -> int:
        with _transaction(db, "BEGIN"):
            sentinel = self._load(db, SENTINEL)
            (count,) = db.execute(self._sql.live).fetchone()
        return int(count) - (sentinel is not None and sentinel.state is State.LIVE)

    def _clear(self, db: sqlite3.Connection, after: bytes) -> tuple[bytes, int] | None:
        """The last handle of the next page of rows, and how many of them were LIVE; None when there is no more."""
        with _transaction(db):
            page = self._fetch(db, self._sql.page, after, PAGE)
            if not page:
                return None
            last: bytes = page[-1][0]
            db.execute(self._sql.kill, (after, last))
            return last, sum(state == State.LIVE for _, state in page)


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    """The path and the options of a URL or a plain path."""
    query: dict[str, str] = {}
    if url := re.match("sqlite:", text, re.IGNORECASE):
        path, _, rest = text[url.end() :].partition("?")
        query = dict(parse_qsl(rest, keep_blank_values=True))
        if not path.startswith("///") or "#" in text or not query.keys() <= {"table", "timeout"}:
            raise ConfigError(
                "write sqlite:///file.db, or sqlite:////var/lib/file.db, with %3F for ? and %23 for #; "
                "?table= and &timeout= may follow"
            )
        text = unquote(path[3:])
    if not text or text == ":memory:" or "\0" in text:
        raise ConfigError("SQLite needs a file, for all processes share the sessions: write sqlite:///file.db")
    return text, query


def _number(value: str | float) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0


@contextmanager
def _transaction(db: sqlite3.Connection, begin: str = "BEGIN IMMEDIATE") -> Iterator[None]:
    """Whoever fails in it drops the connection, which undoes it."""
    db.execute(begin)
    yield
    db.execute("COMMIT")


def _values(db: sqlite3.Connection) -> int:
    """How many values a statement may be given: 999 in some builds of SQLite, and 250,000 in others."""
    return db.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)


def _code(error: sqlite3.Error) -> int:
    """SQLite's primary error code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _row(found: tuple[Any, ...]) -> Row:
    handle, state, *rest = found
    if state in STATES and [type(value) for value in rest] == _TYPES:
        return Row(handle, STATES[state], *rest)
    raise BackendError(f"the row of session {handle.hex()} is damaged: destroy it, or restore it")
