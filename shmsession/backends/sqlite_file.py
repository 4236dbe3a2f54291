"""A connection to an SQLite file: made private, opened anew when the file was replaced, dropped after every error."""

import os
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from shmsession.errors import BackendError

from .base import SENTINEL, State, check_schema
from .native import NativeThread

T = TypeVar("T")

SCHEMA: Final = 1
WAIT: Final = 0.05
"""Seconds that SQLite itself waits for a lock. Then others of this process have their turn, and it is tried again."""

_COLUMNS: Final = "handle, state, epoch, version, horizon, user, body"


class Statements:
    """The SQL for one table. An anonymous row has the user x'', and the index of LIVE rows serves the count too."""

    def __init__(self, table: str) -> None:
        live, no_sentinel = f"state = {State.LIVE:d}", f"handle != x'{SENTINEL.hex()}'"
        name, table = table, f'"{table}"'  # which may be a word of SQL's
        self.table = name
        columns = (
            "handle BLOB NOT NULL PRIMARY KEY, state INTEGER NOT NULL, epoch INTEGER NOT NULL, "
            "version INTEGER NOT NULL, horizon INTEGER NOT NULL, user BLOB NOT NULL, body BLOB NOT NULL"
        )
        self.create = (
            f"CREATE TABLE IF NOT EXISTS {table} ({columns})",
            f"CREATE INDEX IF NOT EXISTS {name}_live ON {table} (user, state) WHERE {live}",
            f"CREATE INDEX IF NOT EXISTS {name}_horizon ON {table} (horizon)",
            f"CREATE TABLE IF NOT EXISTS {name}_schema (id INTEGER PRIMARY KEY CHECK (id = 1), version INTEGER)",
            f"INSERT OR IGNORE INTO {name}_schema VALUES (1, {SCHEMA})",
        )
        self.is_made = f"SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = '{name}_schema' COLLATE NOCASE"
        self.schema = f"SELECT version FROM {name}_schema"
        self.load = f"SELECT {_COLUMNS} FROM {table} WHERE handle = ?"
        numbers = (f"CAST({column} AS INTEGER)" for column in ("state", "epoch", "version", "horizon"))
        self._stored = (
            f"SELECT json_group_array(json_array(hex(handle), {', '.join(numbers)}, hex(user))) FROM {table} "
            "WHERE handle IN"
        )
        self._insert = f"INSERT INTO {table} ({_COLUMNS}) VALUES"
        self.put = _taking("state", "epoch", "version", "horizon", "user", "body")
        self.rewrite = _taking("epoch", "version", "body")
        self.prolong = _taking("horizon")
        self.sweep = f"DELETE FROM {table} WHERE handle IN (SELECT handle FROM {table} WHERE horizon < ? LIMIT ?)"
        self.live = f"SELECT count(*) FROM {table} WHERE {live}"
        self.handles = f"SELECT handle FROM {table} WHERE {live} AND handle > ? ORDER BY handle LIMIT ?"
        self.of_user = f"SELECT {_COLUMNS} FROM {table} WHERE {live} AND user = ? AND {no_sentinel}"
        self.page = f"SELECT handle, state FROM {table} WHERE handle > ? ORDER BY handle LIMIT ?"
        self.kill = (
            f"UPDATE {table} SET state = {State.DEAD:d}, user = x'', body = x'' "
            f"WHERE handle > ? AND handle <= ? AND state != {State.DEAD:d}"
        )

    def stored(self, count: int) -> str:
        """What is there under so many handles, all of it as one JSON text."""
        return f"{self._stored} ({', '.join('?' * count)})"

    def insert(self, count: int, conflict: str) -> str:
        """Insert so many rows; where one is there, `put`, `rewrite` or `prolong` says what becomes of it."""
        return f"{self._insert} {', '.join(['(?, ?, ?, ?, ?, ?, ?)'] * count)} {conflict}"


def _taking(*columns: str) -> str:
    return f"ON CONFLICT (handle) DO UPDATE SET {', '.join(f'{column} = excluded.{column}' for column in columns)}"


class File:
    """A connection on a thread of its own, opened when it is needed and dropped after every error.

    It is closed before a fork too. What SQLite knows of a process's locks is inherited, the locks are not: in a child
    of a process that has the file open, a new connection would go without, and lose what it writes.
    """

    def __init__(self, path: Path, sql: Statements) -> None:
        self._path = path
        self._sql = sql
        self._db: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self.thread = NativeThread(self.close)

    def ask(self, work: Callable[[sqlite3.Connection], T], *, make: bool) -> T:
        """On the thread: what `work` returns. A transaction that it left open is undone."""
        try:
            return work(self._connection(make=make))
        except BaseException:  # also when it is interrupted; it goes on
            self.close()
            raise

    def close(self) -> None:
        """On the thread, or while it rests: drop the connection."""
        db, self._db = self._db, None
        if db is not None:
            _close(db)

    def _connection(self, *, make: bool) -> sqlite3.Connection:
        """The connection to the file that now has this name; one that was removed is let go."""
        if make:
            _make_private(self._path)
        identity = _identity(self._path)
        if self._db is None or identity != self._identity:
            self.close()
            self._identity, self._db = identity, self._connect(make=make)
        return self._db

    def _connect(self, *, make: bool) -> sqlite3.Connection:
        db = sqlite3.connect(
            f"file:{quote(str(self._path))}?mode=rw",
            uri=True,
            timeout=WAIT,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=16,  # those of whole batches are large
        )
        db.text_factory = bytes  # there is text in damaged rows only, and the driver quotes what it cannot decode
        try:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")
            if make:
                self._write_ahead(db)
            else:
                self._check(db)
        except BaseException:  # also when it is interrupted; it goes on
            _close(db)
            raise
        return db

    def _write_ahead(self, db: sqlite3.Connection) -> None:
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != b"wal":
            raise BackendError(f"{self._path} cannot have a write-ahead log: put it on a disk of this host")

    def _check(self, db: sqlite3.Connection) -> None:
        if schema_of(db, self._sql, self._path) is None:
            raise BackendError(f"{self._path} has no table {self._sql.table}: run `shmsession initdb`")


def schema_of(db: sqlite3.Connection, sql: Statements, path: Path) -> int | None:
    """The version of the tables, None when there are none. Raises BackendError for one that is not ours."""
    if db.execute(sql.is_made).fetchone() is None:
        return None
    (version,) = db.execute(sql.schema).fetchone()
    check_schema(f"the tables {sql.table} in {path}", version, SCHEMA, "table")
    return int(version)


def _make_private(path: Path) -> None:
    """An empty file with mode 0600, unless there is one.

    It gets its name when it is complete and closed: to close a descriptor of a file that SQLite has open, in another
    thread, would drop SQLite's locks on it.
    """
    if path.exists():
        return
    descriptor, new = tempfile.mkstemp(prefix=".shmsession-", dir=path.parent)
    os.close(descriptor)
    try:
        with suppress(FileExistsError):
            os.link(new, path)
    finally:
        Path(new).unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except OSError:
        return None
    return info.st_dev, info.st_ino


def _close(db: sqlite3.Connection) -> None:
    with suppress(sqlite3.Error):
        db.close()
