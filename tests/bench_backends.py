"""What a database behind the sessions costs a request, and how fast the flusher is beside the bare driver.

Part of `./dev bench`; alone: python -m tests.bench_backends [sqlite postgresql redis] [--rounds N] [--sessions N]. As
there, variants take turns, figures are medians, and a request counts with what it takes over the bare application.
The databases are thrown away. SQLite's file is on disk and safe, as always; PostgreSQL has fsync off and Redis keeps
nothing on disk, so the drivers that ours is compared with are at their fastest.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import psycopg
from redis.asyncio import Redis

from shmsession import Key, SessionConfig, SessionStore
from shmsession.asgi import App, SessionMiddleware
from shmsession.backends.base import Backend, Row
from shmsession.backends.postgres import PostgresBackend
from shmsession.backends.redis_scripts import packed
from shmsession.backends.sqlite import SQLiteBackend
from shmsession.flusher import BATCH
from shmsession.lease import Lease
from shmsession.rows import Rows
from shmsession.signalling import BACKOFF_MS
from tests.bench import application, calls, cookie_of, untouched, write
from tests.databases import PostgresServer, RedisServer
from tests.servers import new_place, wait_for

VISITORS: Final = 500
COMMITS: Final = 10
"""Of each visitor, within one flush interval."""
FIRSTS: Final = 5
"""So often in a round everybody's first commit is looked at."""
PATIENCE: Final = 120.0

_COLUMNS: Final = ("handle", "state", "epoch", "version", "horizon", '"user"', "body")
_NAMES: Final = ", ".join(_COLUMNS)
_REPLACE: Final = "ON CONFLICT (handle) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in _COLUMNS[1:]
)

Line = tuple[str, float, str]
"""A ratio: its name, its value, what is allowed and where it comes from."""


# ── the drivers alone ─────────────────────────────────────────────────────────────────────────────────────────────


class Database(NamedTuple):
    """`url(n)` leads to the n-th empty one. `prepare` makes of a batch of rows what `write` sends; only that is timed.

    The driver writes each batch in the fastest form that it has, and compares nothing, into a table as ours.
    """

    url: Callable[[int], str]
    prepare: Callable[[list[tuple[Any, ...]]], Any]
    write: Callable[[list[Any]], None]


async def make_tables(backend: Backend) -> None:
    await backend.open()
    await backend.initialize()
    await backend.close()


@contextlib.contextmanager
def sqlite() -> Iterator[Database]:
    place = Path(tempfile.mkdtemp(prefix="shms-"))
    try:
        asyncio.run(make_tables(SQLiteBackend(place / "raw.db", table="raw")))
        with contextlib.closing(sqlite3.connect(place / "raw.db", isolation_level=None)) as db:
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")

            def upsert(batches: list[Any]) -> None:
                for batch in batches:
                    db.execute("BEGIN IMMEDIATE")
                    db.executemany(f"INSERT INTO raw ({_NAMES}) VALUES (?, ?, ?, ?, ?, ?, ?) {_REPLACE}", batch)
                    db.execute("COMMIT")

            yield Database(lambda number: f"sqlite:///{place}/{number}.db", lambda rows: rows, upsert)
    finally:
        shutil.rmtree(place)


@contextlib.contextmanager
def postgresql() -> Iterator[Database]:
    statement = (
        f"INSERT INTO raw ({_NAMES}) SELECT * FROM unnest(%b::bytea[], %b::int2[], %b::int8[], %b::int8[], %b::int8[], "
        f"%b::bytea[], %b::bytea[]) {_REPLACE}"
    ).encode()
    with PostgresServer() as server, asyncio.Runner() as runner:
        runner.run(make_tables(PostgresBackend(server.url(), table="raw")))
        connection = runner.run(psycopg.AsyncConnection.connect(server.url(), autocommit=True))

        async def upsert(batches: list[Any]) -> None:
            for columns in batches:
                await connection.execute(statement, columns, prepare=True, binary=True)

        yield Database(
            lambda _: server.url(server.create_database()),
            lambda rows: [list(column) for column in zip(*rows, strict=True)],
            lambda batches: runner.run(upsert(batches)),
        )
        runner.run(connection.close())


@contextlib.contextmanager
def redis() -> Iterator[Database]:
    with RedisServer() as server, asyncio.Runner() as runner:
        client: Any = Redis(unix_socket_path=server.socket, protocol=2)

        async def put(batches: list[Any]) -> None:
            for batch in batches:
                pipeline = client.pipeline(transaction=False)
                for handle, value, horizon in batch:
                    pipeline.execute_command("SET", handle, value, "PXAT", horizon)
                await pipeline.execute()

        yield Database(
            lambda number: f"unix://{server.socket}?db={number}",
            lambda rows: [(f"raw:row:{row[0].hex()}", packed(Row(*row)), row[4]) for row in rows],
            lambda batches: runner.run(put(batches)),
        )
        runner.run(client.aclose())


DATABASES: Final = {"sqlite": sqlite, "postgresql": postgresql, "redis": redis}


# ── stores and their visitors ─────────────────────────────────────────────────────────────────────────────────────


class Site:
    """A store, an application that writes, and `count` visitors of it."""

    def __init__(self, store: SessionStore, count: int) -> None:
        self.store = store
        self.app: App = SessionMiddleware(application(write), store)
        self.cookies = [cookie_of(store) for _ in range(count)]

    def hold_off(self) -> None:
        """See to it that what is committed stays here for some seconds: as when the database is down."""
        self.store.memory.environment.backend_down_until = self.store.clock.boot() + BACKOFF_MS[1]

    def flush(self) -> float:
        """Seconds until the database has all that waits."""
        self.store.memory.environment.backend_down_until = 0
        begin = time.perf_counter()
        if not self.store.sync.flush(PATIENCE):
            raise SystemExit(f"bench: the database did not take all in {PATIENCE} s")
        return time.perf_counter() - begin

    async def visits(self) -> float:
        """Seconds that a request takes: one of each visitor."""
        return sum([await calls(self.app, cookie, 1) for cookie in self.cookies]) / len(self.cookies)

    async def visits_for(self, seconds: float) -> float:
        """The same, again and again for so long."""
        taken: list[float] = []
        begin = time.perf_counter()
        while not taken or time.perf_counter() - begin < seconds:
            taken.append(await self.visits())
        return statistics.mean(taken)

    @property
    def rows(self) -> int:
        """How many rows were sent so far, by whatever process."""
        return self.store.stats().counters["rows"]


@contextlib.contextmanager
def opened(
    place: Path, name: str, url: str, sessions: int, *, elsewhere: bool, interval: float = 1.0
) -> Iterator[Site]:
    """A store with visitors; its flusher is in this process, or `elsewhere`: then this one's is a mere candidate."""
    key = Key.generate()
    config = SessionConfig(
        directory=place, name=name, keys=(key,), secure=False, map_size=max(64 << 20, sessions * 8192),
        flush_interval=timedelta(seconds=interval),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        holder, store = os.getpid(), SessionStore(url, config=config)
        if elsewhere:
            holder = stack.enter_context(other_flusher(config, str(key), url))
            wait_for(lambda: flushed_by(store) == holder, "the other process has the lease")
        site = Site(stack.enter_context(store), sessions)
        if store.is_persistent:
            wait_for(lambda: flushed_by(store) == holder, "the lease is taken")
        yield site
        if store.is_persistent and flushed_by(store) != holder:
            raise SystemExit("bench: the lease changed hands, this machine is too busy: try again")


def flushed_by(store: SessionStore) -> int:
    """The process that has the lease; 0: none."""
    return (Lease(store.memory.environment, store.clock).holder() or (0, 0))[1]


@contextlib.contextmanager
def other_flusher(config: SessionConfig, key: str, url: str) -> Iterator[int]:
    """The process id of a `shmsession flusher`."""
    variables = {
        "DIR": config.directory, "NAME": config.name, "KEY": key, "BACKEND": url, "MAP_SIZE": config.map_size,
    }  # fmt: skip
    environ = os.environ | {f"SHMSESSION_{name}": str(value) for name, value in variables.items()}
    process = subprocess.Popen([sys.executable, "-m", "shmsession", "flusher"], env=environ, stderr=subprocess.DEVNULL)
    try:
        yield process.pid
    finally:
        process.terminate()
        process.wait()


# ── the figures ───────────────────────────────────────────────────────────────────────────────────────────────────


def commits(label: str, database: Database, place: Path, rounds: int, seconds: float) -> list[Line]:
    """A request that writes, with the database behind it and without.

    "First": each is its visitor's first since the last flush, and puts the session into the outbox. "Busy": of some
    hundred visitors as fast as they can, for a whole flush interval, the work of the flusher included.
    """
    cost: dict[tuple[str, str], list[float]] = {}

    async def turn(sites: dict[str, Site]) -> None:
        for name, site in sites.items():
            base = 0.0
            for _ in range(FIRSTS):
                site.flush()
                # Also for the one without, which has nothing to wait for, the processor turns to something else.
                base = await calls(application(untouched), None, 1_000)
                cost.setdefault(("first", name), []).append((await site.visits() - base) * 1e6)
            cost.setdefault(("busy", name), []).append((await site.visits_for(seconds) - base) * 1e6)

    with contextlib.ExitStack() as stack:

        def site(name: str, url: str, *, elsewhere: bool = False) -> Site:
            return stack.enter_context(opened(place, name, url, VISITORS, elsewhere=elsewhere))

        sites = {
            "without": site("without", "none"),
            "another process": site("elsewhere", database.url(1), elsewhere=True),
            "this process": site("here", database.url(2)),
        }
        for number in range(rounds + 1):
            order = list(sites.items())
            asyncio.run(turn(dict(order[:: 1 if number % 2 else -1])))
            if number == 0:  # to warm up
                cost.clear()
    return [
        against(f"{label}: {kind} commit, {who} flushes, ÷ without", cost[kind, who], cost[kind, "without"], "≤ 1.15")
        for kind in ("first", "busy")
        for who in ("another process", "this process")
    ]


def drain(label: str, database: Database, place: Path, rounds: int, sessions: int) -> Line:
    """All that waits after an outage, and the same rows written by the driver alone."""
    ours, raw = [], []
    with opened(place, "drain", database.url(3), sessions, elsewhere=False) as site:
        for number in range(rounds + 1):
            site.flush()
            site.hold_off()
            asyncio.run(site.visits())
            site.hold_off()
            rows = [plain(Rows().row_of(dirty)) for dirty in site.store.memory.outbox.oldest(sessions)]
            if len(rows) < sessions:
                raise SystemExit("bench: some were sent too early, this machine is too busy: try --sessions with less")
            batches = [database.prepare(rows[begin : begin + BATCH]) for begin in range(0, sessions, BATCH)]
            for turn in ("raw", "ours") if number % 2 else ("ours", "raw"):
                if turn == "ours":
                    ours.append(site.flush())
                else:
                    begin = time.perf_counter()
                    database.write(batches)
                    raw.append(time.perf_counter() - begin)
    return against(f"{label}: drain of {sessions:,} rows, driver ÷ ours", raw[1:], ours[1:], "≥ 0.7", 1e3, "ms")


def plain(row: Row) -> tuple[Any, ...]:
    """As drivers like it best: they stumble over numbers that are not exactly ints."""
    return (row.handle, int(row.state), *row[2:])


def coalescing(label: str, database: Database, place: Path) -> Line:
    """How many rows are sent for a session that is committed again and again within a flush interval."""
    with opened(place, "coalescing", database.url(4), VISITORS, elsewhere=False, interval=3.0) as site:
        asyncio.run(site.visits())
        site.flush()  # the next one is an interval away
        before = site.rows
        for _ in range(COMMITS):
            asyncio.run(site.visits())
        wait_for(lambda: len(site.store.memory.outbox) == 0, "all was sent in its own time")
        sent = site.rows - before
    return f"{label}: rows ÷ sessions", sent / VISITORS, f"1   ({sent} rows for {COMMITS * VISITORS} commits)"


def against(
    name: str, values: Sequence[float], others: Sequence[float], allowed: str, factor: float = 1, unit: str = "µs"
) -> Line:
    """The ratio of two medians."""
    one, other = statistics.median(values) * factor, statistics.median(others) * factor
    return name, one / other, f"{allowed}   ({one:.1f} ÷ {other:.1f} {unit})"


def ratios(name: str, rounds: int = 7, sessions: int = 20_000, seconds: float = 1.0) -> list[Line]:
    """All figures of one database."""
    logging.getLogger("shmsession").setLevel(logging.ERROR)  # that this Redis forgets is what it is here for
    place = new_place()
    try:
        with DATABASES[name]() as database:
            return [
                *commits(name, database, place, rounds, seconds),
                drain(name, database, place, rounds, sessions),
                coalescing(name, database, place),
            ]
    finally:
        shutil.rmtree(place)


def show(lines: Sequence[Line]) -> None:
    for name, value, allowed in lines:
        print(f"  {name:<62}{value:8.2f}   {allowed}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_backends", description=__doc__)
    parser.add_argument("databases", nargs="*", choices=[*DATABASES, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sessions", type=int, default=20_000, help="that wait when they are drained")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long one of the variants of requests is run")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started
    for name in DATABASES if "all" in options.databases else options.databases:
        show(ratios(name, options.rounds, options.sessions, options.seconds))


if __name__ == "__main__":
    main()
