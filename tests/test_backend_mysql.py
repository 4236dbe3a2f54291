"""MySQL as a backend, by a MariaDB: the contract, and what only a real server can do to it."""

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import asyncmy
import pytest

from shmsession.backends import FOREVER, SENTINEL, Answer, Backend, Mark, Row, State, connect, mysql_pool
from shmsession.backends.mysql import SCHEMA, MySQLBackend
from shmsession.backends.mysql_address import Address, parsed
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing.contract import BackendContract
from shmsession.testing.races import tell_one_story
from tests.databases import MariaDBServer
from tests.figures import SEED, report, rng, size
from tests.memory import Child
from tests.questions import LATER, SECRET, asynchronous, fails, holds, kept_through_kills, live
from tests.servers import PATIENCE

pytest_plugins = ["tests.database_hosts"]


SLACK = 6.0
"""Seconds by which a slow machine may exceed a timeout."""


@contextlib.asynccontextmanager
async def unmade(url: str, **options: Any) -> AsyncIterator[MySQLBackend]:
    """A backend that is open."""
    backend = MySQLBackend(url, **options)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[MySQLBackend]:
    """With its tables made."""
    async with unmade(url, **options) as backend:
        await backend.initialize()
        yield backend


@pytest.fixture
def url(mariadb: MariaDBServer, mariadb_database: str) -> str:
    """An empty database's."""
    return mariadb.url(mariadb_database)


@pytest.fixture
def settings(mariadb: MariaDBServer) -> Iterator[Callable[..., None]]:
    """Global settings of the server, for connections made from then on; put back at the end."""
    before: dict[str, object] = {}

    def change(**values: object) -> None:
        for name, value in values.items():
            before.setdefault(name, mariadb.run(f"SELECT @@GLOBAL.{name}")[0][0])
            mariadb.run(f"SET GLOBAL {name} = {value!r}")

    yield change
    mariadb.revive()
    change(**before)


class TestContract(BackendContract):
    """The contract that all backends keep."""

    @pytest.fixture(autouse=True)
    def _empty_database(self, url: str) -> None:
        self.url = url

    def backend(self) -> Backend:
        return MySQLBackend(self.url)


class TestContractInATableOfAnotherName(BackendContract):
    """The same, chosen by URL, in a table whose name is a word of SQL's."""

    @pytest.fixture(autouse=True)
    def _empty_database(self, url: str) -> None:
        self.url = url.replace("mysql://", "MariaDB://") + "&table=Order"

    def backend(self) -> Backend:
        return connect(self.url, max_size=2)


class TestContractWhateverTheServersSettings(BackendContract):
    """The same on a server where quotes, escapes, transactions and texts mean something else, and packets are small."""

    @pytest.fixture(autouse=True)
    def _empty_database(self, url: str, settings: Callable[..., None]) -> None:
        settings(
            sql_mode="ANSI_QUOTES,NO_BACKSLASH_ESCAPES,PIPES_AS_CONCAT,PAD_CHAR_TO_FULL_LENGTH", autocommit=0,
            tx_isolation="SERIALIZABLE", max_allowed_packet=160 << 10, character_set_server="latin1",
            time_zone="+05:30", div_precision_increment=0,
        )  # fmt: skip
        self.url = url

    def backend(self) -> Backend:
        return MySQLBackend(self.url)


# ── killed, stopped, cut off ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.soak
@asynchronous
async def test_what_was_answered_survives_kill_9_in_the_middle_of_batches(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    async with opened(url) as backend:
        done = await kept_through_kills(
            backend, size(50, 3), rng("mysql kills"), mariadb.restart,
            lambda: dict(mariadb.run("SELECT handle, version FROM shmsession", mariadb_database)),
        )  # fmt: skip
    report("mysql kill -9", **done._asdict(), lost=0)


@asynchronous
async def test_the_first_question_after_a_restart_is_answered(mariadb: MariaDBServer, url: str) -> None:
    """All connections of the pool are dead, and one new one is enough."""
    async with opened(url, timeout=2.5) as backend:
        for _ in range(3):
            await asyncio.gather(*(backend.write([live(number)]) for number in range(20)))
            mariadb.restart()
            assert await backend.count() == 20


@asynchronous
async def test_a_server_that_is_down_is_unavailable_at_once_and_back_as_soon_as_it_is_up(
    mariadb: MariaDBServer, url: str
) -> None:
    async with opened(url, timeout=PATIENCE / 2) as backend:
        await backend.write([live(1)])
        mariadb.kill()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for _ in range(20):
            assert "cannot be reached" in str(await fails(backend.load(live(1).handle)))
        assert loop.time() - begun < PATIENCE / 2, "none of them waited for its timeout"
        mariadb.start()
        assert await backend.load(live(1).handle) == live(1)


@asynchronous
async def test_it_opens_while_the_server_is_down(mariadb: MariaDBServer, url: str) -> None:
    mariadb.kill()
    async with unmade(url) as backend:
        await fails(backend.initialize())
        mariadb.start()
        await backend.initialize()
        assert await backend.count() == 0


@asynchronous
async def test_a_stopped_server_is_unavailable_within_the_timeout(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    async with opened(url, timeout=1.0) as idle, opened(url, timeout=1.0) as busy, unmade(url, timeout=1.0) as new:
        await idle.write([live(1)])
        async with blocked(mariadb, mariadb_database):
            writing = asyncio.create_task(busy.write([live(1, 2), live(2, 2, bytes(4 << 20))]))
            await waits_for_a_lock(mariadb)
            mariadb.freeze()
            begun = asyncio.get_running_loop().time()
            for question in (writing, idle.load(live(1).handle), idle.write([live(3, 1, bytes(4 << 20))]), new.count()):
                assert "did not answer within 1 s" in str(await fails(question))
            assert asyncio.get_running_loop().time() - begun < 4 + SLACK
            mariadb.thaw()
        assert await idle.load(live(1).handle) is not None
        assert await busy.count() >= 1


@asynchronous
async def test_closing_waits_for_no_stopped_server(mariadb: MariaDBServer, url: str) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        mariadb.freeze()
        begun = asyncio.get_running_loop().time()
        await backend.close()
        assert asyncio.get_running_loop().time() - begun < SLACK
        mariadb.thaw()


@asynchronous
async def test_a_connection_that_is_in_use_is_closed_after_its_question(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        await backend.write([live(1)])
        async with blocked(mariadb, mariadb_database):
            writing = asyncio.create_task(backend.write([live(1, 2)]))
            await waits_for_a_lock(mariadb)
            await backend.close()
        assert (await writing)[0].applied
    await holds(lambda: connections(mariadb, mariadb_database) == [], "nothing stays open")


@asynchronous
async def test_a_connection_cut_by_the_administrator_costs_one_question_at_most(
    mariadb: MariaDBServer, mariadb_database: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it was cut is heard, however fresh it is."""
    monkeypatch.setattr(mysql_pool, "FRESH_SECONDS", PATIENCE)
    async with opened(url, timeout=PATIENCE) as backend:
        await asyncio.gather(*(backend.write([live(number)]) for number in range(20)))
        kill_connections(mariadb, mariadb_database)
        assert await backend.count() == 20
        async with blocked(mariadb, mariadb_database):
            writing = asyncio.create_task(backend.write([live(1, 2)]))
            await waits_for_a_lock(mariadb)
            kill_connections(mariadb, mariadb_database)
            await fails(writing)
        assert [answer.applied for answer in await backend.write([live(1, 3)])] == [True]


@asynchronous
async def test_a_connection_that_has_just_answered_is_not_asked_whether_it_works(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was idle for a while is; when it does not, the next question goes over a new one."""
    pinged: list[object] = []
    ping = mysql_pool.Connection.ping

    async def pinging(connection: mysql_pool.Connection) -> None:
        pinged.append(connection)
        await ping(connection)

    monkeypatch.setattr(mysql_pool.Connection, "ping", pinging)
    monkeypatch.setattr(mysql_pool, "FRESH_SECONDS", PATIENCE)
    async with opened(url, max_size=1) as backend:
        for number in range(5):
            await backend.write([live(number)])
        assert len(pinged) == 1, "when it was new"
        monkeypatch.setattr(mysql_pool, "FRESH_SECONDS", 0.0)
        assert await backend.count() == 5
        assert len(pinged) == 2


@asynchronous
async def test_a_server_that_has_become_read_only_is_asked_nothing_more(
    url: str, settings: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica may lack what its primary has, and cuts nobody off: what it does not have is not absent."""
    monkeypatch.setattr(mysql_pool, "FRESH_SECONDS", 0.0)
    async with opened(url) as backend, opened(url) as later:
        await backend.write([live(1)])
        settings(read_only=1)
        for one in (backend, later):
            assert "name the primary" in str(await fails(one.load(live(2).handle), BackendError))
        settings(read_only=0)
        for one in (backend, later):
            assert await one.load(live(1).handle) == live(1)


@asynchronous
async def test_tables_that_were_removed_are_made_again(mariadb: MariaDBServer, mariadb_database: str, url: str) -> None:
    """Also when what says their version is still there."""
    async with opened(url) as backend:
        mariadb.run("DROP TABLE shmsession", mariadb_database)
        assert "initdb" in str(await fails(backend.load(live(1).handle), BackendError))
        await backend.initialize()
        assert await backend.load(live(1).handle) is None


@asynchronous
async def test_what_is_cancelled_while_it_asks_whether_a_connection_works_disturbs_nobody(
    mariadb: MariaDBServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql_pool, "FRESH_SECONDS", 0.0)
    async with opened(url, max_size=1, timeout=PATIENCE) as backend:
        mariadb.freeze()
        loading = asyncio.create_task(backend.load(live(1).handle))
        for _ in range(10):
            await asyncio.sleep(0)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        mariadb.thaw()
        assert await backend.count() == 0


@asynchronous
async def test_what_waits_too_long_for_a_lock_is_unavailable_and_not_left_running(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    async with opened(url, timeout=1.0, max_size=1) as backend:
        await backend.write([live(1)])
        async with blocked(mariadb, mariadb_database):
            first, second = asyncio.create_task(backend.write([live(1, 2)])), asyncio.create_task(backend.count())
            await fails(first)
            await fails(second)
            await holds(lambda: not waiting(mariadb), "the server gave up, too")
        assert await backend.count() == 1


@asynchronous
async def test_cancelled_questions_leave_the_pool_usable(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    """One that was asked, and one that waited for its turn."""
    async with opened(url, max_size=1, timeout=PATIENCE) as backend:
        await backend.write([live(1)])
        async with blocked(mariadb, mariadb_database):
            writing, queueing = asyncio.create_task(backend.write([live(1, 2)])), asyncio.create_task(backend.count())
            await waits_for_a_lock(mariadb)
            for question in (queueing, writing):
                question.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await question
            assert await backend.load(live(1).handle) == live(1)


@asynchronous
async def test_a_process_asks_no_more_than_max_size_questions_at_once(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    async with opened(url, max_size=3) as backend:
        await asyncio.gather(*(backend.write([live(number)]) for number in range(50)))
        assert len(connections(mariadb, mariadb_database)) == 3


@contextlib.asynccontextmanager
async def blocked(mariadb: MariaDBServer, database: str) -> AsyncIterator[None]:
    """Meanwhile somebody else holds a lock on every row."""
    connection = await mariadb.connect()
    await connection.begin()
    try:
        await connection.query(f"SELECT 1 FROM {database}.shmsession FOR UPDATE")
        yield
        await connection.rollback()
    finally:
        connection.close()


def status(mariadb: MariaDBServer, name: str) -> int:
    """A figure of the server's; what it tells of its transactions is too old when it is asked often."""
    text = "SELECT variable_value FROM information_schema.global_status WHERE variable_name"
    return int(mariadb.run(f"{text} = '{name}'")[0][0])


def waiting(mariadb: MariaDBServer) -> bool:
    return status(mariadb, "innodb_row_lock_current_waits") > 0


async def waits_for_a_lock(mariadb: MariaDBServer) -> None:
    await holds(lambda: waiting(mariadb), "a question waits for a lock")


def connections(mariadb: MariaDBServer, database: str) -> list[int]:
    """Those of all backends."""
    found = mariadb.run(f"SELECT id FROM information_schema.processlist WHERE db = '{database}'")
    return [number for (number,) in found]


def kill_connections(mariadb: MariaDBServer, database: str) -> None:
    for number in connections(mariadb, database):
        mariadb.run(f"KILL {number}")


# ── races ──────────────────────────────────────────────────────────────────────────────────────────────────────


NEVER_BACKWARDS = """
CREATE TRIGGER forbid BEFORE UPDATE ON shmsession FOR EACH ROW
IF old.state = 3 AND new.state <> 3 OR new.horizon < old.horizon
    OR new.state <> 3 AND (new.epoch, new.version) < (old.epoch, old.version)
THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'backwards'; END IF
"""


@pytest.mark.soak
@asynchronous
async def test_writers_in_opposite_orders_never_go_backwards(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    rounds, random = size(300, 15), rng("mysql races")
    sent: dict[bytes, list[tuple[Row, Answer]]] = {live(number).handle: [] for number in range(500)}
    async with opened(url, timeout=PATIENCE) as one, opened(url, timeout=PATIENCE) as two:
        mariadb.run(NEVER_BACKWARDS, mariadb_database)

        async def write(backend: Backend, rows: list[Row]) -> None:
            for row, answer in zip(rows, await backend.write(rows), strict=True):
                sent[row.handle].append((row, answer))

        for turn in range(1, rounds + 1):
            versions = [[random.randint(turn, turn + 9) for _ in range(500)] for _ in range(4)]
            batches = [[live(n, version, b"%d" % version) for n, version in enumerate(each)] for each in versions]
            batches[1].reverse()
            batches[3].reverse()
            await asyncio.gather(*(write((one, two)[n % 2], batch) for n, batch in enumerate(batches)))
        for each in sent.values():
            await tell_one_story(one, each, f"seed {SEED}")
    report("mysql races", writes=rounds * 4 * 500, deadlocks=status(mariadb, "innodb_deadlocks"), backwards=0)


@asynchronous
async def test_a_batch_that_loses_against_others_is_repeated(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    async with opened(url) as backend:
        mariadb.run(fail_times(3, 1213), mariadb_database)
        assert await backend.write([live(1), live(2)]) == [Answer(True, None)] * 2
        mariadb.run("DELETE FROM failures;\nDROP TRIGGER failing", mariadb_database)
        mariadb.run(fail_times(1000, 1020).partition(";\n")[2], mariadb_database)
        await fails(backend.write([live(3)]))
        assert await backend.load(live(3).handle) is None
        assert mariadb.run("SELECT COUNT(*) FROM failures", mariadb_database) == [(5,)]


def fail_times(times: int, number: int) -> str:
    """What is not transactional remembers."""
    return (
        "CREATE TABLE failures (at TIMESTAMP) ENGINE = Aria TRANSACTIONAL = 0;\n"
        "CREATE TRIGGER failing BEFORE INSERT ON shmsession FOR EACH ROW BEGIN "
        f"IF (SELECT COUNT(*) FROM failures) < {times} THEN INSERT INTO failures VALUES (NOW()); "
        f"SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {number}, MESSAGE_TEXT = 'lost'; END IF; END"
    )


@asynchronous
async def test_a_real_deadlock_is_no_error(mariadb: MariaDBServer, mariadb_database: str, url: str) -> None:
    """Somebody who takes rows in another order waits for what the batch has, and the batch for him."""
    async with opened(url, timeout=PATIENCE) as backend:
        await backend.write([live(1), live(2)])
        other = await mariadb.connect(mariadb_database)
        await other.begin()
        await other.query(f"UPDATE shmsession SET was_epoch = 7 WHERE handle = x'{live(2).handle.hex()}'")
        writing = asyncio.create_task(backend.write([live(1, 2), live(2, 2)]))
        await waits_for_a_lock(mariadb)
        with contextlib.suppress(asyncmy.errors.OperationalError):  # one of both is the victim
            await other.query(f"UPDATE shmsession SET was_epoch = 7 WHERE handle = x'{live(1).handle.hex()}'")
        await other.rollback()
        await other.ensure_closed()
        mark = Mark(State.LIVE, 1, 1)
        assert await writing == [Answer(True, mark)] * 2


@asynchronous
async def test_sweeping_waits_for_nobody(mariadb: MariaDBServer, mariadb_database: str, url: str) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        await backend.write([live(1, horizon=1000), live(2, horizon=2000)])
        other = await mariadb.connect(mariadb_database)
        await other.begin()
        await other.query(f"SELECT 1 FROM shmsession WHERE handle = x'{live(1).handle.hex()}' FOR UPDATE")
        assert await backend.sweep(LATER, 10) == 1
        await other.rollback()
        await other.ensure_closed()
        assert await backend.sweep(LATER, 10) == 1


# ── rows ───────────────────────────────────────────────────────────────────────────────────────────────────────


@asynchronous
async def test_a_damaged_row_is_an_error_and_no_absence(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    """Written to, it counts as ERASED: so it stops no batch, and a newer row mends it."""
    async with opened(url) as backend:
        await backend.write([live(1), live(2)])
        mariadb.run(f"UPDATE shmsession SET state = 9 WHERE handle = x'{live(1).handle.hex()}'", mariadb_database)
        assert "is damaged" in str(await fails(backend.load(live(1).handle), BackendError))
        assert await backend.load(live(2).handle) == live(2)
        expected = [Answer(True, Mark(state, 1, 1)) for state in (State.ERASED, State.LIVE)]
        assert await backend.write([live(1, 2), live(2, 2)]) == expected
        assert [await backend.load(live(n).handle) for n in (1, 2)] == [live(1, 2), live(2, 2)]


@asynchronous
async def test_a_batch_is_parted_as_the_servers_packets_demand(url: str, settings: Callable[..., None]) -> None:
    settings(max_allowed_packet=16 << 10)
    async with opened(url) as backend:
        rows = [live(number, body=bytes([number]) * (number * 75)) for number in range(100)]
        assert await backend.write(rows) == [Answer(True, None)] * 100
        assert [await backend.load(row.handle) for row in rows] == rows


@asynchronous
async def test_the_sentinel_comes_after_all_else_of_a_batch(url: str, settings: Callable[..., None]) -> None:
    """What a server that is replaced loses of a batch cannot be hidden by it."""
    settings(max_allowed_packet=16 << 10)
    sentinel, *rows = Row(SENTINEL, State.LIVE, 1, 1, FOREVER), *(live(n, body=bytes(1 << 10)) for n in range(30))
    large = Row(b"\xff" * 20, State.LIVE, 1, 1, LATER, b"", bytes(8 << 10))
    async with opened(url) as backend:
        await fails(backend.write([sentinel, *rows, large]), BackendError)
        assert await backend.load(min(row.handle for row in rows)) is not None
        assert await backend.load(SENTINEL) is None


@asynchronous
async def test_a_session_that_no_packet_holds_is_an_error_that_says_how_large_one_must_be(
    url: str, settings: Callable[..., None]
) -> None:
    settings(max_allowed_packet=16 << 10)
    large = live(1, body=bytes(8 << 10))
    async with opened(url) as backend:
        error = str(await fails(backend.write([live(0), large]), BackendError))
        assert "raise max_allowed_packet there to" in error
        settings(max_allowed_packet=-(-int(error.split()[-4]) // 1024) * 1024)
    async with opened(url) as backend:
        assert (await backend.write([large]))[0].applied


@asynchronous
async def test_what_does_not_fit_a_column_is_refused_and_not_cut_off(url: str, settings: Callable[..., None]) -> None:
    settings(sql_mode="")
    async with opened(url) as backend:
        await fails(backend.write([live(1)._replace(user=bytes(256))]), BackendError)
        assert await backend.count() == 0


@asynchronous
async def test_every_question_is_answered_by_an_index(
    mariadb: MariaDBServer, mariadb_database: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the name of the index that the server says it would use."""
    asked: list[str] = []
    ask = mysql_pool.Connection.ask

    async def asking(connection: mysql_pool.Connection, statement: str) -> list[tuple[Any, ...]]:
        asked.append(statement)
        return await ask(connection, statement)

    async with opened(url) as backend:
        rows = [live(n, horizon=n * 3_600_000, body=bytes(1000))._replace(user=b"%8d" % n) for n in range(2000)]
        await backend.write(rows)
        mariadb.run("ANALYZE TABLE shmsession", mariadb_database)
        monkeypatch.setattr(mysql_pool.Connection, "ask", asking)
        await backend.load(live(1).handle)
        await backend.sessions_of(b"%8d" % 7)
        await backend.count()
        await backend.sweep(3_600_000, 10)
        found = [mariadb.run(f"EXPLAIN {text}", mariadb_database)[0] for text in asked if "SELECT" in text]
        keys = [row[5] for row in found]
    assert keys == ["PRIMARY", "shmsession_user", "shmsession_user", "shmsession_horizon"]


# ── the schema ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("version", "says"), [(SCHEMA + 1, "upgrade shmsession"), (SCHEMA - 1, "choose others by table=")]
)
@asynchronous
async def test_tables_of_another_version_are_refused(
    mariadb: MariaDBServer, mariadb_database: str, url: str, version: int, says: str
) -> None:
    async with opened(url) as backend:
        mariadb.run(f"UPDATE shmsession_meta SET version = {version}", mariadb_database)
        error = await fails(backend.initialize(), BackendError)
        assert "shmsession of mysql://" in str(error)
        assert f"have schema {version}, this version of shmsession knows {SCHEMA}: " in str(error)
        assert str(error).endswith(says)


@asynchronous
async def test_another_programs_table_is_left_alone(mariadb: MariaDBServer, mariadb_database: str, url: str) -> None:
    mariadb.run("CREATE TABLE shmsession (id INT)", mariadb_database)
    async with unmade(url) as backend:
        for question in (backend.initialize(), backend.load(bytes(20))):
            assert "choose another name by `table=`" in str(await fails(question, BackendError))
    assert mariadb.run("SHOW TABLES", mariadb_database) == [("shmsession",)]


@pytest.mark.parametrize("left", ["DROP TABLE shmsession_meta", "DELETE FROM shmsession_meta"])
@asynchronous
async def test_tables_that_were_half_made_are_made_to_the_end(
    mariadb: MariaDBServer, mariadb_database: str, url: str, left: str
) -> None:
    """Whoever made them was killed meanwhile: here that is no transaction. The rows in them stay."""
    async with opened(url) as backend:
        await backend.write([live(1)])
        mariadb.run(left, mariadb_database)
        await backend.initialize()
        assert await backend.load(live(1).handle) == live(1)
    assert mariadb.run("SELECT * FROM shmsession_meta", mariadb_database) == [(1, SCHEMA)]


@asynchronous
async def test_missing_tables_are_named(url: str) -> None:
    async with unmade(url) as backend:
        assert "initialize()" in str(await fails(backend.count(), BackendError))


@asynchronous
async def test_a_missing_database_is_named(mariadb: MariaDBServer) -> None:
    async with unmade(mariadb.url("nowhere")) as backend:
        assert "CREATE DATABASE" in str(await fails(backend.count(), BackendError))


@asynchronous
async def test_missing_privileges_are_named(mariadb: MariaDBServer, mariadb_database: str, url: str, user: str) -> None:
    async with unmade(mariadb.url(mariadb_database, user, SECRET)) as stranger:
        assert "Grant this user SELECT" in str(await fails(stranger.load(bytes(20)), BackendError))
    mariadb.run(f"GRANT SELECT ON {mariadb_database}.* TO {user}@localhost")
    async with unmade(mariadb.url(mariadb_database, user, SECRET)) as theirs:
        assert "CREATE and INSERT" in str(await fails(theirs.initialize(), BackendError))
        async with opened(url):
            pass
        assert "Grant this user SELECT, INSERT" in str(await fails(theirs.write([live(1)]), BackendError))
        mariadb.run(f"REVOKE SELECT ON {mariadb_database}.* FROM {user}@localhost")
        for grant in ("SELECT, INSERT, UPDATE, DELETE ON {}.shmsession", "SELECT ON {}.shmsession_meta"):
            mariadb.run(f"GRANT {grant.format(mariadb_database)} TO {user}@localhost")
        await theirs.initialize()
        assert await theirs.write([live(1)]) == [Answer(True, None)]
        assert (await theirs.clear(), await theirs.sweep(LATER + 1, 9)) == (1, 1)


@asynchronous
async def test_a_read_only_server_is_said_to_be_one_and_left_for_another(
    mariadb: MariaDBServer, mariadb_database: str, url: str, user: str, settings: Callable[..., None]
) -> None:
    mariadb.run(f"GRANT ALL ON {mariadb_database}.* TO {user}@localhost")
    async with opened(mariadb.url(mariadb_database, user, SECRET)) as backend:
        settings(read_only=1)
        assert "name the primary" in str(await fails(backend.write([live(1)]), BackendError))
        await holds(lambda: connections(mariadb, mariadb_database) == [], "it lets go of its connections")
        settings(read_only=0)
        assert await backend.write([live(1)]) == [Answer(True, None)]


@asynchronous
async def test_a_server_with_too_many_connections_is_unavailable(
    mariadb: MariaDBServer, mariadb_database: str, user: str, url: str
) -> None:
    async with opened(url):
        pass
    mariadb.run(f"GRANT ALL ON {mariadb_database}.* TO {user}@localhost WITH MAX_USER_CONNECTIONS 1")
    theirs = mariadb.url(mariadb_database, user, SECRET)
    async with unmade(theirs) as one, unmade(theirs) as two:
        assert await one.count() == 0
        assert "max_user_connections" in str(await fails(two.count()))
        await one.close()
        assert await two.count() == 0


@pytest.mark.parametrize(
    ("number", "says", "error"),
    [
        (1114, "make room there", BackendError),
        (1665, "binlog_format", BackendError),
        (1969, "lost", BackendUnavailable),
    ],
)
@asynchronous
async def test_a_servers_refusal_says_what_to_do(
    mariadb: MariaDBServer, mariadb_database: str, url: str, number: int, says: str, error: type[BackendError]
) -> None:
    async with opened(url) as backend:
        mariadb.run(fail_times(1, number), mariadb_database)
        refusal = str(await fails(backend.write([live(1)]), error))
        assert says in refusal
        assert f"error {number}" in refusal


# ── what nobody may see ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def user(mariadb: MariaDBServer, mariadb_database: str) -> Iterator[str]:
    """A user whose password is SECRET."""
    name = f"user_{mariadb_database}"
    mariadb.run(f"CREATE USER {name}@localhost IDENTIFIED BY '{SECRET}'")
    yield name
    mariadb.revive().run(f"DROP USER {name}@localhost")


@asynchronous
async def test_a_wrong_password_is_an_error_that_does_not_tell_it(
    mariadb: MariaDBServer, mariadb_database: str, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with unmade(mariadb.url(mariadb_database, user, "wrong-" + SECRET)) as backend:
        error = await fails(backend.load(bytes(20)), BackendError)
        assert "Access denied for user" in str(error)
        assert "password in the URL" in str(error)
        for text in (*traceback.format_exception(error), repr(error), repr(backend), backend.name, caplog.text):
            assert SECRET not in text


@pytest.mark.parametrize("password", ["p@ss:w/o?r#d%", "päßwörd", "🔑", ""])
@asynchronous
async def test_any_password_can_be_written_percent_encoded(
    mariadb: MariaDBServer, mariadb_database: str, user: str, password: str
) -> None:
    quoted = "".join(f"%{byte:02x}" for byte in password.encode())
    mariadb.run(f"ALTER USER {user}@localhost IDENTIFIED BY '{password}'")
    mariadb.run(f"GRANT ALL ON {mariadb_database}.* TO {user}@localhost")
    async with opened(mariadb.url(mariadb_database, user, quoted)) as backend:
        assert await backend.count() == 0


@asynchronous
async def test_an_error_quotes_no_session(mariadb: MariaDBServer, mariadb_database: str, url: str) -> None:
    """The server's own text may hold what was sent, in quotes."""
    async with opened(url) as backend:
        mariadb.run(
            "CREATE TRIGGER quoting BEFORE INSERT ON shmsession FOR EACH ROW BEGIN "
            "DECLARE told TEXT DEFAULT CONCAT('a bad value: \\'', new.body, '\\' it''s'); "
            "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = told; END",
            mariadb_database,
        )
        error = await fails(backend.write([live(1, 5, SECRET.encode())]), BackendError)
        shown = "".join(traceback.format_exception(error))
        assert "a bad value" in shown
        assert SECRET.encode().hex() not in shown
        assert SECRET not in shown


@asynchronous
async def test_statements_that_the_server_cannot_parse_are_not_quoted(
    mariadb: MariaDBServer, mariadb_database: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shmsession.backends.mysql._UPDATE", "ON DUPLICATE KEY")
    async with opened(url) as backend:
        error = await fails(backend.write([live(1, 5, SECRET.encode())]), BackendError)
        shown = "".join(traceback.format_exception(error))
        assert "error 1064" in shown
        assert SECRET.encode().hex() not in shown


@pytest.mark.parametrize("url", [
    "", "mysql:", "mysql://", "mysql://ada@h", "mysql://ada@h/", "mysql://h/app", "mysql://@h/app", "mysql://:x@h/app",
    f"mysql://ada:{SECRET}@h:port/app", f"mysql://ada:{SECRET}@h:0/app", f"mysql://ada:{SECRET}@h:65536/app",
    f"mysql://ada:{SECRET}@[h/app", f"mysql://ada:{SECRET}@h,i/app/x", f"mysql://ada:{SECRET}#@h/app",
    f"mysql://ada:{SECRET}?@h/app", f"mysql://ada:/{SECRET}@h/app", f"mysql://ada:@{SECRET}@h/app",
    f"mysql://ada:{SECRET}@h/app?colour=blue", f"mysql://ada:{SECRET}@h/app#table=x",
    f"postgresql://ada:{SECRET}@h/app", f"mysql+pymysql://ada:{SECRET}@h/app", f" mysql://ada:{SECRET}@h/app",
])  # fmt: skip
def test_a_url_that_makes_no_sense_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError, match="write mysql://") as caught:
        MySQLBackend(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("mysql://ada@/app", Address("ada", b"", "localhost", 3306, "app", "")),
        ("MARIADB://a%64a:p%40%ff:%2B+@h:3307/a%2Fb", Address("ada", b"p@\xff:++", "h", 3307, "a/b", "")),
        ("mysql://ada:@[::1]/app?timeout=2", Address("ada", b"", "::1", 3306, "app", "")),
        ("mysql://ada@/app?unix_socket=/run/a+b%20c", Address("ada", b"", "localhost", 3306, "app", "/run/a+b c")),
        ("mysql://ada@/app?unix_socket=x&unix%5Fsocket=y", Address("ada", b"", "localhost", 3306, "app", "y")),
    ],
)  # fmt: skip
def test_a_url_says_who_goes_where(url: str, address: Address) -> None:
    assert parsed(url)[0] == address


def test_what_the_url_says_comes_before_the_keyword() -> None:
    backend = MySQLBackend("mysql://ada@h/app?table=shop&unix_socket=/a", table="other", unix_socket="/b")
    assert repr(backend) == "<MySQLBackend mysql:///a/app, shop>"
    assert repr(MySQLBackend("mysql://ada@h/app", unix_socket="/b")) == "<MySQLBackend mysql:///b/app, shmsession>"


def test_names_and_reprs_hold_no_credentials() -> None:
    backend = MySQLBackend(f"mysql://ada:{SECRET}@[::1]:5433/app?ssl_verify=true")
    assert backend.name == "mysql://[::1]:5433/app"
    assert repr(backend) == "<MySQLBackend mysql://[::1]:5433/app, shmsession>"
    for text in (repr(backend._address), str(backend._address), repr(backend._make_pool)):
        assert SECRET not in text
        assert "ada" not in text


@pytest.mark.parametrize("table", ["", "a b", "a`b", "a;b", "a.b", "1a", "ä", "x" * 49, "a\n", "{table}"])
def test_a_table_is_an_identifier(table: str) -> None:
    with pytest.raises(ConfigError, match="table="):
        MySQLBackend("mysql://ada@h/app", table=table)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"max_size": 0}, {"timeout": float("nan")}], ids=str)
def test_numbers_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="timeout= must be"):
        MySQLBackend("mysql://ada@h/app", **options)


# ── forks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_child_makes_connections_of_its_own_and_leaves_the_parents_alone(
    mariadb: MariaDBServer, mariadb_database: str, url: str
) -> None:
    """Whether it opens what it has inherited, or closes it."""
    backend = MySQLBackend(url, max_size=1)

    async def begin() -> None:
        await backend.open()
        await backend.initialize()
        await backend.write([live(1)])

    async def go_on(channel: Any) -> None:
        await backend.close()
        await backend.open()
        row = await backend.load(live(1).handle)
        channel.send((row, connections(mariadb, mariadb_database)))
        await backend.close()

    async def end() -> None:
        assert await backend.load(live(1).handle) == live(1)
        assert connections(mariadb, mariadb_database) == before
        await backend.close()

    with asyncio.Runner() as runner:
        runner.run(begin())
        before = connections(mariadb, mariadb_database)
        child = Child(lambda channel: asyncio.run(go_on(channel)))
        row, meanwhile = child.channel.receive()
        child.wait()
        assert row == live(1)
        assert len(before) == 1
        assert len(set(meanwhile) - set(before)) == 1
        runner.run(end())


# ── servers that are none, or not ours ─────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def pretending(*packets: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """The URL of a server that says this, one after each thing it hears, and what it has heard."""
    heard: list[bytes] = []
    serving: list[asyncio.Task[Any] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        with contextlib.suppress(ConnectionError):
            for packet in packets:
                writer.write(packet)
                await writer.drain()
                heard.append(await reader.read(4096))
            writer.close()
            await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"mysql://ada:{SECRET}@127.0.0.1:{port}/app", heard
        await asyncio.gather(*(task for task in serving if task))


def packet(number: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "little") + bytes([number]) + payload


GREETING = packet(0, (
    b"\n8.0.40\0" + bytes(4) + b"saltsalt\0" + b"\xff\xf7" + b"\x2d" + b"\x02\0" + b"\xff\x81" + b"\x15" + bytes(10)
    + b"moresaltmore\0" + b"mysql_native_password\0"
))  # fmt: skip


@pytest.mark.parametrize("plugin", [b"mysql_clear_password", b"dialog"])
@asynchronous
async def test_no_password_is_told_in_the_clear(plugin: bytes) -> None:
    asks = packet(2, b"\xfe" + plugin + b"\0\3Password: ")
    async with pretending(GREETING, asks) as (url, heard), unmade(url) as backend:
        assert "needs TLS" in str(await fails(backend.count(), BackendError))
    assert SECRET.encode() not in b"".join(heard)


@pytest.mark.parametrize(
    "says", [b"SSH-2.0-OpenSSH_9.2\r\n", packet(0, b""), packet(0, b"\n"), packet(0, b"\nfive.0\0"), b""], ids=repr
)
@asynchronous
async def test_what_is_no_mysql_server_is_unavailable(says: bytes) -> None:
    async with pretending(says) as (url, _), unmade(url, timeout=1.0) as backend:
        error = await fails(backend.count())
        assert SECRET not in "".join(traceback.format_exception(error))


@asynchronous
async def test_a_package_that_a_plugin_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "nacl", None)
    asks = packet(2, b"\xfeclient_ed25519\0" + bytes(32))
    async with pretending(GREETING, asks) as (url, _), unmade(url) as backend:
        assert "'pynacl' package is required" in str(await fails(backend.count(), BackendError))


@asynchronous
async def test_a_question_before_open_says_what_to_do() -> None:
    assert "call `open` first" in str(await fails(MySQLBackend("mysql://ada@h/app").count(), BackendError))
