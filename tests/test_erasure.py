"""Consent that is withdrawn leaves nothing behind: not in memory, not in the outbox, not in any backend.

What stands where it can be asked for must be gone after one flush. What a database keeps of the past beside that goes
by its own housekeeping, which these tests bring about instead of waiting for it. LMDB has none: freed pages, and the
room between what a page holds, keep old bytes until they are used again. That is told in docs/consent.md, not tested.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import pytest
from redis import Redis

from shmsession import Key, Session, SessionConfig, SessionMode, SessionStore
from shmsession.memory.tables import Tables, Txn
from tests.asking import PROTOCOLS, Visitor
from tests.databases import MariaDBServer, PostgresServer, RedisServer
from tests.kept import wait_for_empty_outbox
from tests.servers import GTHREAD, Serve, wait_for

pytest_plugins = ["tests.hosts", "tests.database_hosts"]

LARGE: Final = 9_000
"""So many bytes do not fit into one page of anything."""


class Behind(Protocol):
    """A backend, as somebody with every right sees it."""

    url: str

    def told(self) -> bytes:
        """All that it answers to whoever asks for everything."""
        ...

    def keep_house(self) -> None:
        """Let it do now what it does by itself in time."""
        ...

    def files(self) -> bytes:
        """What is on its disk."""
        ...


class InSQLite:
    """A file, and its log beside it; the log's part of keeping house is a checkpoint."""

    def __init__(self, file: Path) -> None:
        self.url, self._file = f"sqlite:///{file}", file

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self._file)) as db:
            yield db

    def told(self) -> bytes:
        with self._open() as db:
            tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return _bytes(row for table in tables for row in db.execute(f"SELECT * FROM {table}"))

    def keep_house(self) -> None:
        with self._open() as db:
            (answer,) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            assert answer[0] == 0

    def files(self) -> bytes:
        return _read(self._file.parent.glob(f"{self._file.name}*"))


class InPostgres:
    """All files of a database: tables, indexes, what is kept of large values, and the planner's statistics.

    A plain VACUUM gives room free without writing over it, which later rows do; FULL writes the table anew. pg_wal is
    left out: the write-ahead log is the server's history, of all databases, from which it recovers. It is written over
    in time, and never by one's asking; who archives it has the past for as long as that is kept.
    """

    def __init__(self, server: PostgresServer, name: str) -> None:
        self.url, self._server, self._name = server.url(name), server, name

    def told(self) -> bytes:
        tables = self._run("SELECT format('%I.%I', schemaname, tablename) FROM pg_tables WHERE schemaname = 'public'")
        statistics = self._run("SELECT * FROM pg_stats WHERE schemaname = 'public'")
        return _bytes([*statistics, *(row for (table,) in tables for row in self._run(f"SELECT * FROM {table}"))])

    def keep_house(self) -> None:
        self._run("VACUUM (FULL, ANALYZE) shmsession")
        self._run("CHECKPOINT")

    def files(self) -> bytes:
        ((number,),) = self._run(f"SELECT oid FROM pg_database WHERE datname = '{self._name}'")
        return _read((self._server.data / "base" / str(number)).iterdir())

    def _run(self, statement: str) -> list[tuple[Any, ...]]:
        return self._server.run(statement, self._name)


class InMySQL:
    """All files of a database. A rebuilt table is a new file.

    What InnoDB keeps for all databases together is left out: the redo log, the undo log and the doublewrite buffer are
    its history, from which it recovers, and are written over in time.
    """

    def __init__(self, server: MariaDBServer, name: str) -> None:
        self.url, self._server, self._name = server.url(name), server, name

    def told(self) -> bytes:
        tables = self._run("SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()")
        statistics = self._run("SELECT * FROM mysql.column_stats WHERE db_name = DATABASE()")
        return _bytes([*statistics, *(row for (table,) in tables for row in self._run(f"SELECT * FROM {table}"))])

    def keep_house(self) -> None:
        self._run("OPTIMIZE TABLE shmsession")
        self._run("ANALYZE TABLE shmsession PERSISTENT FOR ALL")

    def files(self) -> bytes:
        self._run("FLUSH TABLES shmsession FOR EXPORT;\nUNLOCK TABLES")  # what was written is in memory first
        return _read((self._server.data / self._name).iterdir())

    def _run(self, statement: str) -> list[tuple[Any, ...]]:
        return self._server.run(statement, self._name)


class InRedis:
    """Every key of every database, and the append-only file; the part of keeping house is to write that anew."""

    def __init__(self, server: RedisServer) -> None:
        self.url, self._server = server.url, server
        with self._open() as redis:
            redis.config_set("rdbcompression", "no")  # so that what is there can be seen

    @contextlib.contextmanager
    def _open(self) -> Iterator["Redis"]:
        with contextlib.closing(Redis(unix_socket_path=self._server.socket)) as redis:
            yield redis

    def told(self) -> bytes:
        with self._open() as redis:
            return _bytes([key, redis.dump(key), *self._values(redis, key)] for key in redis.scan_iter())

    def _values(self, redis: "Redis", key: bytes) -> list[Any]:
        match redis.type(key):
            case b"string":
                return [redis.get(key)]
            case b"zset":
                return list(redis.zrange(key, 0, -1))
        raise AssertionError(f"{key!r} is of a type that no test knows")

    def keep_house(self) -> None:
        with self._open() as redis:
            redis.bgrewriteaof()
            wait_for(lambda: self._is_written_anew(redis.info("persistence")), "the append-only file is written anew")

    def _is_written_anew(self, info: dict[str, Any]) -> bool:
        """And the file before it is away."""
        manifest = next(self._server.data.glob("*/*.manifest")).read_text()
        named = {line.split()[1] for line in manifest.splitlines()}
        files = {path.name for path in self._server.data.glob("*/*") if path.suffix != ".manifest"}
        return not (info["aof_rewrite_in_progress"] or info["aof_rewrite_scheduled"]) and files == named

    def files(self) -> bytes:
        return _read(self._server.data.rglob("*"))


def _bytes(rows: Iterable[Sequence[Any]]) -> bytes:
    """All values of all rows."""
    values = (value for row in rows for value in row)
    return b"\n".join(value if isinstance(value, bytes) else str(value).encode() for value in values)


def _read(paths: Iterable[Path]) -> bytes:
    return b"".join(path.read_bytes() for path in paths if path.is_file())


@pytest.fixture(params=["sqlite", "postgres", "mysql", "redis"])
def behind(request: pytest.FixtureRequest, place: Path) -> Behind:
    if request.param == "sqlite":
        return InSQLite(place / "sessions.db")
    if request.param == "redis":
        return InRedis(request.getfixturevalue("durable_redis"))
    if request.param == "mysql":
        return InMySQL(request.getfixturevalue("mariadb"), request.getfixturevalue("mariadb_database"))
    return InPostgres(request.getfixturevalue("postgres"), request.getfixturevalue("postgres_database"))


def in_memory(store: SessionStore) -> bytes:
    """Everything in every table of the memory store, as LMDB serves it."""

    def work(txn: Txn, tables: Tables) -> bytes:
        return b"".join(bytes(key) + bytes(value) for table in tables for key, value in txn.cursor(table))

    return store.memory.environment.read(work)


def shows(place: bytes, mark: str) -> bool:
    """Whether the mark stands there, be it in hexadecimal digits, as PostgreSQL prints its statistics."""
    return mark.encode() in place or mark.encode().hex().encode() in place


def check_trace(behind: Behind, mark: str) -> None:
    """It is to be found: else that it is not found would say nothing."""
    assert shows(behind.told(), mark)
    behind.keep_house()
    assert shows(behind.files(), mark)


def check_no_trace(store: SessionStore, behind: Behind, mark: str) -> None:
    assert not shows(in_memory(store), mark)
    assert len(store.memory.outbox) == 0
    check_nothing_behind(behind, mark)


def check_nothing_behind(behind: Behind, mark: str) -> None:
    assert not shows(behind.told(), mark)
    behind.keep_house()
    assert not shows(behind.told(), mark)
    assert not shows(behind.files(), mark)


@pytest.fixture
def mark() -> str:
    """What nobody else has ever written."""
    return os.urandom(12).hex()


# ── in one process ────────────────────────────────────────────────────────────────────────────────────────────

Open = Callable[[SessionMode], SessionStore]


def config_of(mode: SessionMode, place: Path) -> SessionConfig:
    return SessionConfig(
        directory=place / "s", name="test", map_size=4 << 20, secure=False, keys=(Key.generate(),), mode=mode,
        flush_interval=timedelta(seconds=60),
    )  # fmt: skip


@pytest.fixture
def opened(place: Path, behind: Behind) -> Iterator[Open]:
    """A store in a mode; it is flushed when somebody asks for it."""
    with contextlib.ExitStack() as stack:

        def make(mode: SessionMode) -> SessionStore:
            return stack.enter_context(SessionStore(behind.url, config=config_of(mode, place)))

        yield make


def agree(session: Session) -> None:
    session.create()
    session.set_store(True)


def leave(visitor: Visitor, mark: str, more: str = "") -> None:
    """Somebody agrees, logs in, and leaves a mark wherever one can be left, before the login and after it."""

    def come(session: Session) -> None:
        agree(session)
        session[mark] = 1

    def log_in(session: Session) -> None:
        session.renew(user_id=f"user {mark}")
        session["nested"] = {"value": [mark], "more": more}
        session.flash(mark)

    for action in (come, log_in):
        visitor.ask(action)
        assert visitor.store.sync.flush()


def be_many(store: SessionStore, protocol: str) -> None:
    """So many that PostgreSQL makes a histogram of whatever it may."""

    def come(session: Session) -> None:
        agree(session)
        session["n"] = os.urandom(8)

    for _ in range(20):
        Visitor(store, protocol).ask(come)


@pytest.mark.parametrize("mode", [SessionMode.OPT_IN, SessionMode.MANUAL])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_consent_withdrawn_and_one_flush_leave_no_trace_anywhere(
    opened: Open, behind: Behind, mark: str, mode: SessionMode, protocol: str
) -> None:
    """Live pages, outbox, rows and the files under them; whether the session's last commit was flushed or not, and
    whether it fits into a page or not."""
    store = opened(mode)
    be_many(store, protocol)
    for flushed, more in ((True, ""), (False, ""), (True, os.urandom(LARGE // 2).hex())):
        visitor = Visitor(store, protocol)
        leave(visitor, mark, more)
        assert shows(in_memory(store), mark)
        check_trace(behind, mark)
        if not flushed:
            visitor.ask(lambda session: session.update(late=mark))
        visitor.ask(lambda session: session.set_store(False))
        assert store.sync.flush()
        check_no_trace(store, behind, mark)


def test_what_is_withdrawn_before_any_flush_never_reaches_the_backend(opened: Open, behind: Behind, mark: str) -> None:
    """The flusher sends that it is dead, at most."""
    store = opened(SessionMode.OPT_IN)
    visitor = Visitor(store)

    def to_and_fro(session: Session) -> None:
        session.set_store(True)
        session["v"] = mark
        session.save()

    def withdraw(session: Session) -> None:
        session.set_store(False)

    visitor.ask(to_and_fro)
    visitor.ask(withdraw)
    assert store.sync.flush()
    check_no_trace(store, behind, mark)


def test_without_a_backend_nothing_is_left_in_memory(place: Path, mark: str) -> None:
    """At once."""
    with SessionStore("none", config=config_of(SessionMode.OPT_IN, place)) as store:
        visitor = Visitor(store)
        leave(visitor, mark)
        assert shows(in_memory(store), mark)
        visitor.ask(lambda session: session.set_store(False))
        assert not shows(in_memory(store), mark)


def test_a_session_that_is_to_stay_in_memory_leaves_no_trace_behind_it(opened: Open, behind: Behind, mark: str) -> None:
    """In persistent mode, where set_store(False) is no word about consent."""
    store = opened(SessionMode.PERSISTENT)
    visitor = Visitor(store)
    leave(visitor, mark)
    assert store.sync.flush()
    check_trace(behind, mark)
    visitor.ask(lambda session: session.set_store(False))
    assert store.sync.flush()
    assert visitor.data()[mark] == 1
    check_nothing_behind(behind, mark)


# ── on a server ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [SessionMode.OPT_IN, SessionMode.MANUAL])
def test_whoever_declines_on_a_server_leaves_no_trace_there_after_one_flush(
    serve: Serve, behind: Behind, mark: str, mode: SessionMode
) -> None:
    server = serve(GTHREAD, workers=2, env={"SHMSESSION_BACKEND": behind.url, "SHMSESSION_MODE": mode.value})
    store, browser = server.store(), server.browser()
    for path in ("accept", "create", f"set/{mark}/1", f"cart/{mark}", f"login/{mark}", f"set/mark/{mark}"):
        assert browser.post(f"/{path}").status == 200
    wait_for_empty_outbox(store)
    assert shows(in_memory(store), mark)
    check_trace(behind, mark)
    assert browser.post("/decline").status == 200
    assert browser.cookies == {"session-storable": "false"}
    wait_for_empty_outbox(store)
    check_no_trace(store, behind, mark)
    assert mark not in server.text
