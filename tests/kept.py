"""What a backend keeps, seen from outside: rows compared with memory, and watched for steps back."""

import contextlib
import sqlite3
import threading
from asyncio import run
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Self

from shmsession import SessionStore
from shmsession.backends import SENTINEL, Backend, Row, State, connect
from shmsession.lease import Lease
from shmsession.record import STORABLE, TOMBSTONE, Record
from shmsession.rows import Rows
from tests.databases import MariaDBServer, PostgresServer, RedisServer
from tests.proxy import Address
from tests.redis_clusters import RedisCluster, free_ports
from tests.servers import wait_for
from tests.surreal_servers import SurrealServer

BACKENDS = ["sqlite", "postgres", "mysql", "redis", "redis-cluster", "surrealdb"]

_TABLES: Final = ["DROP TABLE shmsession, shmsession_meta", "TRUNCATE TABLE shmsession", "DROP TABLE shmsession"]
_WAYS_TO_FORGET: Final = {
    "sqlite": ["", "DELETE FROM shmsession", "DROP TABLE shmsession"],
    "postgres": _TABLES,
    "mysql": _TABLES,
    "surrealdb": ["", "DELETE shmsession", "REMOVE TABLE shmsession; REMOVE TABLE shmsession_meta"],
}
"""Statements; an empty one stands for all that the server, or the file, has."""


class Kept:
    """A backend with its server, if it has one."""

    def __init__(self, name: str, place: Path) -> None:
        self.name = name
        self.server: Any = None
        self.file = place / "sessions.db"
        if name == "sqlite":
            self.url = f"sqlite:///{self.file}"
        elif name == "redis":
            self.server = RedisServer(*RedisServer.DURABLE)
            self.url = self.server.url
        elif name == "redis-cluster":
            # No replicas: one that takes over lacks what had not reached it.
            self.server = RedisCluster(*RedisServer.DURABLE, replicas=0)
            self.url = self.server.url
        else:
            self.server = {"postgres": PostgresServer, "mysql": MariaDBServer, "surrealdb": SurrealServer}[name]()
            self.url = ""

    def __enter__(self) -> Self:
        if self.server is not None:
            self.server.__enter__()
        if not self.url:
            self.url = self.server.url(self.server.create_database())
        return self

    def __exit__(self, *_: object) -> None:
        if self.server is not None:
            self.server.close()

    @property
    def database(self) -> str:
        """Its name, on a server that has several."""
        return self.url.partition("?")[0].rpartition("/")[2]

    def detour(self, place: Path) -> tuple[str, dict[Address, Address]]:
        """A URL that leads to the server by other addresses, in `place` or on this host, and where each is to lead."""
        if self.name == "redis-cluster":
            ports = free_ports(len(self.server.nodes))
            self.server.announce(ports)  # which is where clients go whose URL names the nodes themselves, too
            hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
            return f"redis+cluster://{hosts}/", dict(zip(ports, (node.port for node in self.server.nodes), strict=True))
        if self.name == "surrealdb":
            (port,) = free_ports(1)
            return self.url.replace(f":{self.server.port}/", f":{port}/"), {port: self.server.port}
        name = ".s.PGSQL.5432" if self.name == "postgres" else self.name
        return self.url.replace(str(self.server.place), str(place)), {place / name: self.server.place / name}

    def forget(self, way: int = 0) -> None:
        """All that it keeps is gone, in one way or another; with its tables, its file or its data, or the rows only."""
        ways = _WAYS_TO_FORGET.get(self.name, [""])
        statement = ways[way % len(ways)]
        if self.name == "sqlite" and not statement:
            for suffix in ("", "-wal", "-shm"):
                self.file.with_name(self.file.name + suffix).unlink(missing_ok=True)
            self.ask(lambda backend: backend.initialize())  # nobody else makes a file anew that was there
        elif self.name == "sqlite":
            with contextlib.closing(sqlite3.connect(self.file, isolation_level=None)) as file:
                file.execute(statement)
        elif statement:
            self.server.run(statement, self.database)
        else:
            self.server.forget()

    def ask(self, question: Callable[[Backend], Any]) -> Any:
        """What an object of our own, on a loop of its own, answers."""

        async def asking() -> Any:
            backend = connect(self.url)
            await backend.open()
            try:
                return await question(backend)
            finally:
                await backend.close()

        return run(asking())

    def rows(self) -> dict[bytes, Row]:
        """All LIVE rows."""

        async def all_rows(backend: Backend) -> dict[bytes, Row]:
            found = {}
            await backend.initialize()  # the server's own may not have come to it
            async for handle in backend.handles():
                row = await backend.load(handle)
                if row is not None and row.state is State.LIVE:
                    found[handle] = row
            return found

        rows: dict[bytes, Row] = self.ask(all_rows)
        return rows


def records(store: SessionStore) -> dict[bytes, Record]:
    """Everything readable in memory."""
    memory = store.memory
    handles = memory.environment.read(lambda txn, tables: [bytes(key) for key, _ in txn.cursor(tables.records)])
    found = {}
    for handle in handles:
        raw = memory.environment.get(handle)
        record = None if raw is None else memory._seal.open(handle, raw)
        if record is not None:
            found[handle] = record
    return found


def wait_for_empty_outbox(store: SessionStore) -> None:
    wait_for(lambda: store.stats().outbox == 0, "the outbox is empty")


def check_equal(store: SessionStore, kept: Kept) -> int:
    """The backend has exactly what memory has; returns how many sessions that is."""
    wait_for_empty_outbox(store)
    there, here = kept.rows(), records(store)
    live = {
        handle: record
        for handle, record in here.items()
        if record.header.flags & STORABLE and not record.header.flags & TOMBSTONE
    }
    rows = Rows()
    assert set(live) - set(there) == set(), "what memory has and sent is not behind it"
    for handle, record in live.items():
        header, data = rows.session_in(there[handle])
        assert header == record.header._replace(key_id=header.key_id)
        assert data == record.data
    assert set(there) - set(live) == set(), "what memory knows nothing of, or knows to be dead, is alive behind it"
    return len(live)


class Watch:
    """Looks at rows again and again: none may ever go back."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._stop = threading.Event()
        self.seen: dict[bytes, tuple[bool, int, int]] = {}
        self.looks = 0
        self.backwards: list[str] = []
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        async def look(backend: Backend) -> None:
            handles = [handle async for handle in backend.handles()]
            for handle in {*handles, *list(self.seen)[-200:]}:
                row = await backend.load(handle)
                if row is not None and handle != SENTINEL:
                    self._note(row)

        while not self._stop.is_set():
            with contextlib.suppress(Exception):  # the database is down: that is what the test is about
                self._kept.ask(look)
                self.looks += 1
            self._stop.wait(0.2)

    def _note(self, row: Row) -> None:
        now, before = (row.state is State.DEAD, row.epoch, row.version), self.seen.get(row.handle)
        if before is not None and (before[0], *(before[1:] if not now[0] else now[1:])) > now:
            self.backwards.append(f"{row.handle.hex()}: {before} → {now}")
        self.seen[row.handle] = now

    def __enter__(self) -> Self:
        self._kept.ask(lambda backend: backend.initialize())  # the server's own may not have come to it
        if self._kept.name == "sqlite":
            watch_sqlite(self._kept.file)
        elif self._kept.name == "mysql":
            watch_mysql(self._kept.server, self._kept.database)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def watch_sqlite(file: Path) -> None:
    """A trigger that refuses every step back."""
    with contextlib.closing(sqlite3.connect(file, isolation_level=None)) as connection:
        connection.execute(
            "CREATE TRIGGER no_step_back BEFORE UPDATE OF state, epoch, version ON shmsession "
            "WHEN (OLD.state = 3 AND NEW.state != 3) OR (NEW.state != 3 AND (NEW.epoch, NEW.version) < "
            "(OLD.epoch, OLD.version)) BEGIN SELECT raise(ABORT, 'a row went back'); END"
        )


def watch_mysql(server: MariaDBServer, database: str) -> None:
    """The same."""
    server.run(
        "CREATE TRIGGER no_step_back BEFORE UPDATE ON shmsession FOR EACH ROW "
        "IF (OLD.state = 3 AND NEW.state <> 3) OR NEW.horizon < OLD.horizon OR (NEW.state <> 3 AND "
        "(NEW.epoch, NEW.version) < (OLD.epoch, OLD.version)) "
        "THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'a row went back'; END IF",
        database,
    )


def lease_holder(store: SessionStore) -> int:
    """The pid of the flusher, 0 for none."""
    found = Lease(store.memory.environment, store.clock).holder()
    return found[1] if found else 0
