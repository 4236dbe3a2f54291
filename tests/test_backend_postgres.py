"""PostgreSQL as a backend: the contract, and what only a real server can do to it."""

import asyncio
import contextlib
import logging
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from shmsession.backends import Answer, Backend, Mark, Row, State, connect, postgres_pool
from shmsession.backends.postgres import SCHEMA, PostgresBackend
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing.contract import BackendContract
from shmsession.testing.races import tell_one_story
from tests.databases import PostgresServer
from tests.figures import SEED, report, rng, size
from tests.questions import LATER, SECRET, asynchronous, fails, holds, kept_through_kills, live
from tests.servers import PATIENCE, wait_for

pytest_plugins = ["tests.database_hosts"]


SLACK = 6.0
"""Seconds by which a slow machine may exceed a timeout; psycopg's own way to cancel takes more than these."""


@contextlib.asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[PostgresBackend]:
    """A backend that is open, with its tables made."""
    backend = PostgresBackend(url, **options)
    await backend.open()
    try:
        await backend.initialize()
        yield backend
    finally:
        await backend.close()


@pytest.fixture
def url(postgres: PostgresServer, postgres_database: str) -> str:
    """An empty database's."""
    return postgres.url(postgres_database)


class TestContract(BackendContract):
    """The contract that all backends keep."""

    @pytest.fixture(autouse=True)
    def _empty_database(self, url: str) -> None:
        self.url = url

    def backend(self) -> Backend:
        return PostgresBackend(self.url)


class TestContractInASchema(BackendContract):
    """The same, chosen by URL, in a table of another schema and name."""

    @pytest.fixture(autouse=True)
    def _empty_database(self, postgres: PostgresServer, postgres_database: str) -> None:
        postgres.run('CREATE SCHEMA "Shop"', postgres_database)
        self.url = postgres.url(postgres_database)

    def backend(self) -> Backend:
        return connect(self.url, table="Shop.user", max_size=2)


# ── killed, stopped, cut off ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.soak
@asynchronous
async def test_what_was_answered_survives_kill_9_in_the_middle_of_batches(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    async with opened(url) as backend:
        done = await kept_through_kills(
            backend, size(50, 3), rng("postgres kills"), postgres.restart,
            lambda: dict(postgres.run("SELECT handle, version FROM shmsession", postgres_database)),
        )  # fmt: skip
    report("postgres kill -9", **done._asdict(), lost=0)


@asynchronous
async def test_the_first_question_after_a_restart_is_answered(postgres: PostgresServer, url: str) -> None:
    """Not the fourth: a pool that met its dead connections one by one, with pauses, would need longer."""
    async with opened(url, timeout=2.5) as backend:
        for _ in range(3):
            await asyncio.gather(*(backend.write([live(number)]) for number in range(20)))
            postgres.restart()
            assert await backend.count() == 20, "all connections of the pool are dead, and one new one is enough"


@asynchronous
async def test_a_server_that_is_down_is_unavailable_at_once_and_back_as_soon_as_it_is_up(
    postgres: PostgresServer, url: str
) -> None:
    async with opened(url, timeout=PATIENCE / 2) as backend:
        await backend.write([live(1)])
        postgres.kill()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for _ in range(20):
            error = await fails(backend.load(live(1).handle))
            assert "cannot be reached" in str(error)
        assert loop.time() - begun < PATIENCE / 2, "none of them waited for its timeout"
        assert all(isinstance(e, BackendUnavailable) for e in await asyncio.gather(
            *(backend.count() for _ in range(20)), return_exceptions=True
        ))  # fmt: skip
        postgres.start()
        assert await backend.load(live(1).handle) == live(1)


@asynchronous
async def test_it_opens_while_the_server_is_down(postgres: PostgresServer, url: str) -> None:
    backend = PostgresBackend(url)
    postgres.kill()
    await backend.open()
    try:
        await fails(backend.initialize())
        postgres.start()
        await backend.initialize()
        assert await backend.count() == 0
    finally:
        await backend.close()


@asynchronous
async def test_a_stopped_server_is_unavailable_within_the_timeout(postgres: PostgresServer, url: str) -> None:
    async with opened(url, timeout=1.0) as idle, opened(url, timeout=1.0) as busy:
        await idle.write([live(1)])
        with blocked(postgres, url):
            writing = asyncio.create_task(busy.write([live(1, 2)]))
            await waits_for_a_lock(postgres)
            postgres.freeze()
            begun = asyncio.get_running_loop().time()
            unopened = PostgresBackend(url, timeout=1.0)
            await unopened.open()
            for question in (writing, idle.load(live(1).handle), unopened.count()):
                assert "did not answer within 1 s" in str(await fails(question))
            await unopened.close()
            taken = asyncio.get_running_loop().time() - begun
            assert taken < 4 + SLACK
            postgres.thaw()
        assert await idle.load(live(1).handle) is not None
        assert await busy.count() == 1


@asynchronous
async def test_a_connection_cut_by_the_administrator_costs_one_question_at_most(
    postgres: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it was cut is heard, however fresh it is."""
    monkeypatch.setattr(postgres_pool, "FRESH_SECONDS", PATIENCE)
    async with opened(url, timeout=PATIENCE) as backend:
        await asyncio.gather(*(backend.write([live(number)]) for number in range(20)))
        terminate(postgres)
        assert await backend.count() == 20
        with blocked(postgres, url):
            writing = asyncio.create_task(backend.write([live(1, 2)]))
            await waits_for_a_lock(postgres)
            terminate(postgres)
            assert "broke off" in str(await fails(writing))
        assert [answer.applied for answer in await backend.write([live(1, 3)])] == [True]


@asynchronous
async def test_a_connection_that_has_just_answered_is_not_asked_whether_it_works(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was idle for a while is."""
    checked: list[object] = []
    check = AsyncConnectionPool.check_connection

    async def checking(connection: Any) -> None:
        checked.append(connection)
        await check(connection)

    monkeypatch.setattr(AsyncConnectionPool, "check_connection", staticmethod(checking))
    monkeypatch.setattr(postgres_pool, "FRESH_SECONDS", PATIENCE)
    async with opened(url, max_size=1) as backend:
        for number in range(5):
            await backend.write([live(number)])
        before = len(checked)
        assert before <= 2, "the new connection, at most"
        assert await backend.count() == 5
        assert len(checked) == before
        monkeypatch.setattr(postgres_pool, "FRESH_SECONDS", 0.0)
        assert await backend.count() == 5
        assert len(checked) == before + 1


@asynchronous
async def test_what_waits_too_long_for_a_lock_is_unavailable_and_not_left_running(
    postgres: PostgresServer, url: str
) -> None:
    async with opened(url, timeout=1.0, max_size=1) as backend:
        await backend.write([live(1)])
        with blocked(postgres, url):
            first, second = asyncio.create_task(backend.write([live(1, 2)])), asyncio.create_task(backend.count())
            await fails(first)
            await fails(second)
            await holds(lambda: not waiting(postgres), "the server gave up, too")
        assert await backend.count() == 1


@asynchronous
async def test_a_cancelled_question_leaves_the_pool_usable(postgres: PostgresServer, url: str) -> None:
    async with opened(url, max_size=1, timeout=PATIENCE) as backend:
        await backend.write([live(1)])
        with blocked(postgres, url):
            writing = asyncio.create_task(backend.write([live(1, 2)]))
            await waits_for_a_lock(postgres)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
        assert await backend.load(live(1).handle) == live(1)


@contextlib.contextmanager
def blocked(postgres: PostgresServer, url: str) -> Iterator[None]:
    """Meanwhile somebody else holds a lock on every row."""
    with psycopg.connect(url, application_name="holder") as connection:
        connection.execute("SELECT 1 FROM shmsession FOR UPDATE")
        yield
        connection.rollback()


def waiting(postgres: PostgresServer) -> bool:
    return postgres.run("SELECT true FROM pg_stat_activity WHERE wait_event_type = 'Lock'") != []


async def waits_for_a_lock(postgres: PostgresServer) -> None:
    await holds(lambda: waiting(postgres), "a question waits for a lock")


def terminate(postgres: PostgresServer) -> None:
    """End the connections of all backends; they have ended."""
    pids = [pid for (pid,) in postgres.run("SELECT pid FROM pg_stat_activity WHERE application_name = 'shmsession'")]
    postgres.run(f"SELECT pg_terminate_backend(pid) FROM unnest(ARRAY{pids}::int[]) AS pid")
    left = f"SELECT 1 FROM pg_stat_activity WHERE pid = ANY (ARRAY{pids}::int[])"
    wait_for(lambda: not postgres.run(left), "all connections have ended")


# ── races ──────────────────────────────────────────────────────────────────────────────────────────────────────


NEVER_BACKWARDS = """
CREATE FUNCTION forbid() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF old.state = 3 AND new.state <> 3 OR new.horizon < old.horizon
        OR new.state <> 3 AND (new.epoch, new.version) < (old.epoch, old.version) THEN
        RAISE EXCEPTION 'backwards: % to %', old.version, new.version;
    END IF;
    RETURN new;
END $$;
CREATE TRIGGER forbid BEFORE UPDATE ON shmsession FOR EACH ROW EXECUTE FUNCTION forbid();
"""


@pytest.mark.soak
@asynchronous
async def test_writers_in_opposite_orders_neither_deadlock_nor_go_backwards(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    rounds, random = size(300, 15), rng("postgres races")
    sent: dict[bytes, list[tuple[Row, Answer]]] = {live(number).handle: [] for number in range(500)}
    async with opened(url) as one, opened(url) as two:
        postgres.run(NEVER_BACKWARDS, postgres_database)

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
    assert "deadlock detected" not in postgres.text, "they sort their rows; repeating is for others' deadlocks"
    report("postgres races", writes=rounds * 4 * 500, deadlocks=0, backwards=0)


@asynchronous
async def test_a_row_is_answered_only_after_its_commit(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """What fails at the end of the transaction, after the statement gave its result, is no answer."""
    async with opened(url) as backend:
        postgres.run(
            """
            CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
            CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON shmsession DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION refuse();
            """,
            postgres_database,
        )
        await fails(backend.write([live(1)]), BackendError)
        assert await backend.load(live(1).handle) is None


@asynchronous
async def test_a_row_of_no_known_state_stops_no_batch(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """It counts as ERASED, and whatever is newer replaces it."""
    async with opened(url) as backend:
        await backend.write([live(1), live(2)])
        postgres.run(
            "UPDATE shmsession SET state = 7 WHERE handle <= ALL (SELECT handle FROM shmsession)", postgres_database
        )
        expected = [Answer(True, Mark(state, 1, 1)) for state in (State.ERASED, State.LIVE)]
        assert await backend.write([live(1, 2), live(2, 2)]) == expected
        assert [await backend.load(live(n).handle) for n in (1, 2)] == [live(1, 2), live(2, 2)]


@asynchronous
async def test_sweeping_waits_for_nobody(postgres: PostgresServer, url: str) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        await backend.write([live(1, horizon=1000), live(2, horizon=2000)])
        with psycopg.connect(url) as connection:
            connection.execute("SELECT 1 FROM shmsession WHERE horizon = 1000 FOR UPDATE")
            assert await backend.sweep(LATER, 10) == 1
            connection.rollback()
        assert await backend.sweep(LATER, 10) == 1


@asynchronous
async def test_a_database_of_stricter_isolation_changes_nothing(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """The rule needs no more than READ COMMITTED; anything else would have batches fail and be repeated."""
    postgres.run(f"ALTER DATABASE {postgres_database} SET default_transaction_isolation = 'serializable'")
    begun = len(postgres.text)
    async with opened(url) as one, opened(url) as two:
        for version in range(1, 10):
            rows = [live(number, version) for number in range(100)]
            answers = await asyncio.gather(*(backend.write(rows) for backend in (one, two) * 8))
            for same in zip(*answers, strict=True):
                assert sorted(answer.applied for answer in same) == [False] * 15 + [True]
    assert "could not serialize" not in postgres.text[begun:]


# ── the schema ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("version", "says"), [(SCHEMA + 1, "upgrade shmsession"), (SCHEMA - 1, "choose others by table=")]
)
@asynchronous
async def test_tables_of_another_version_are_refused(
    postgres: PostgresServer, postgres_database: str, url: str, version: int, says: str
) -> None:
    async with opened(url) as backend:
        postgres.run(f"UPDATE shmsession_meta SET version = {version}", postgres_database)
        error = await fails(backend.initialize(), BackendError)
        assert "shmsession of postgresql://" in str(error)
        assert f"have schema {version}, this version of shmsession knows {SCHEMA}: " in str(error)
        assert str(error).endswith(says)


@pytest.mark.parametrize("theirs", ["TABLE shmsession (id int)", "VIEW shmsession AS SELECT 1 AS id"])
@asynchronous
async def test_another_programs_table_is_left_alone(
    postgres: PostgresServer, postgres_database: str, url: str, theirs: str
) -> None:
    postgres.run(f"CREATE {theirs}", postgres_database)
    backend = PostgresBackend(url)
    await backend.open()
    try:
        for question in (backend.initialize(), backend.load(bytes(20))):
            assert "choose another name by `table=`" in str(await fails(question, BackendError))
    finally:
        await backend.close()
    assert postgres.run("SELECT to_regclass('shmsession_meta')", postgres_database) == [(None,)]


@asynchronous
async def test_tables_that_were_removed_are_made_again(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """Also when what says their version is still there."""
    async with opened(url) as backend:
        postgres.run("DROP TABLE shmsession", postgres_database)
        await fails(backend.load(live(1).handle), BackendError)
        await backend.initialize()
        assert await backend.load(live(1).handle) is None


@asynchronous
async def test_missing_tables_are_named(url: str) -> None:
    backend = PostgresBackend(url)
    await backend.open()
    try:
        assert "initialize()" in str(await fails(backend.count(), BackendError))
    finally:
        await backend.close()


@asynchronous
async def test_missing_privileges_are_named(
    postgres: PostgresServer, postgres_database: str, url: str, role: str
) -> None:
    theirs = PostgresBackend(postgres.url(postgres_database, role, SECRET))
    await theirs.open()
    try:
        assert "CREATE on their schema" in str(await fails(theirs.initialize(), BackendError))
        async with opened(url):
            pass
        assert "Grant this user SELECT, INSERT" in str(await fails(theirs.write([live(1)]), BackendError))
        for grant in ("SELECT, INSERT, UPDATE, DELETE ON shmsession", "SELECT ON shmsession_meta"):
            postgres.run(f"GRANT {grant} TO {role}", postgres_database)
        await theirs.initialize()
        assert await theirs.write([live(1)]) == [Answer(True, None)]
        assert (await theirs.clear(), await theirs.sweep(LATER + 1, 9)) == (1, 1)
    finally:
        await theirs.close()


@asynchronous
async def test_a_read_only_server_is_said_to_be_one_and_left_for_another(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    async with opened(url) as backend:
        postgres.run(f"ALTER DATABASE {postgres_database} SET default_transaction_read_only = on")
        terminate(postgres)
        assert "target_session_attrs=read-write" in str(await fails(backend.write([live(1)]), BackendError))
        postgres.run(f"ALTER DATABASE {postgres_database} RESET default_transaction_read_only")
        answers: list[Answer] = []
        for _ in range(10):  # connections that were being made while it was read-only may still turn up
            with contextlib.suppress(BackendError):
                answers = answers or await backend.write([live(1)])
        assert answers == [Answer(True, None)]


@asynchronous
async def test_a_commit_seldom_touches_an_index(postgres: PostgresServer, postgres_database: str, url: str) -> None:
    """A session that is used all the time moves its horizon all the time."""
    count = 200
    async with opened(url, max_size=1) as backend:
        await backend.write([live(number, body=bytes(1000)) for number in range(100)])
        for version in range(2, count + 2):
            await backend.write([live(50, version, bytes(1000), LATER + 1000 * version)])
    (figures,) = postgres.run(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'shmsession'", postgres_database
    )
    updates, within_the_page = figures
    assert updates == count
    assert within_the_page >= count * 0.9


@asynchronous
async def test_the_planners_statistics_show_nothing_of_what_sessions_hold(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """They are samples of what the columns held, which outlive the rows until the table is analysed again."""
    async with opened(url) as backend:
        await backend.write([live(number, body=b"said by %d" % number) for number in range(100)])
        postgres.run("ANALYZE shmsession", postgres_database)
        statement = "SELECT attname, histogram_bounds::text FROM pg_stats WHERE tablename = 'shmsession'"
        shown = dict(postgres.run(statement, postgres_database))
        assert "handle" in shown, "it was analysed"
        assert b"said by".hex() not in str(shown)
        assert "body" not in shown


# ── what nobody may see ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def role(postgres: PostgresServer, postgres_database: str) -> Iterator[str]:
    """A user whose password is SECRET."""
    name = f"role_{postgres_database}"
    postgres.run(f"CREATE ROLE {name} LOGIN PASSWORD '{SECRET}'")
    yield name
    postgres.revive().run(f"DROP OWNED BY {name}", postgres_database)
    postgres.run(f"DROP ROLE {name}")


@asynchronous
async def test_a_wrong_password_is_an_error_that_does_not_tell_it(
    postgres: PostgresServer, postgres_database: str, role: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = "wrong-" + SECRET
    backend = PostgresBackend(postgres.url(postgres_database, role, wrong))
    await backend.open()
    try:
        error = await fails(backend.load(bytes(20)))
        assert "password authentication failed" in str(error)
        for text in (*traceback.format_exception(error), repr(error), repr(backend), backend.name, caplog.text):
            assert SECRET not in text
    finally:
        await backend.close()


@asynchronous
async def test_an_error_quotes_no_session(postgres: PostgresServer, postgres_database: str, url: str) -> None:
    """The server's own text holds the whole row that it refused."""
    async with opened(url) as backend:
        postgres.run("ALTER TABLE shmsession ADD CHECK (version < 5)", postgres_database)
        error = await fails(backend.write([live(1, 5, SECRET.encode())]), BackendError)
        shown = "".join(traceback.format_exception(error))
        assert "check constraint" in shown
        assert SECRET.encode().hex() not in shown
        assert SECRET not in shown


@pytest.mark.parametrize("url", [
    f"postgresql://ada:{SECRET}%zz@localhost/app", f"postgresql://ada:{SECRET}@localhost/app?colour=blue",
    f"host=localhost password={SECRET} colour=blue", f"mysql://ada:{SECRET}@localhost/app",
    f"postgresql://ada:{SECRET}@[localhost/app",
])  # fmt: skip
def test_a_url_that_makes_no_sense_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError, match="write postgresql://") as caught:
        PostgresBackend(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_names_and_reprs_hold_no_credentials() -> None:
    backend = PostgresBackend(f"postgresql://ada:{SECRET}@db.example:5433/app?sslmode=require")
    assert backend.name == "postgresql://db.example/app"
    assert repr(backend) == "<PostgresBackend postgresql://db.example/app, shmsession>"
    assert PostgresBackend("postgresql:///app", password=SECRET).name == "postgresql://localhost/app"


@asynchronous
async def test_tls_is_asked_for_before_anything_else_is_said() -> None:
    """A server that has none hears nothing more where the URL, or an option, demands it."""
    heard: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readexactly(8))
        writer.write(b"N")
        heard.append(await reader.read())
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        base = f"postgresql://ada:{SECRET}@127.0.0.1:{port}/app"
        for backend in (PostgresBackend(f"{base}?sslmode=require"), PostgresBackend(base, sslmode="require")):
            await backend.open()
            try:
                assert "SSL was required" in str(await fails(backend.count()))
            finally:
                await backend.close()
    assert set(heard) == {(8).to_bytes(4, "big") + (80877103).to_bytes(4, "big"), b""}


@pytest.mark.parametrize("table", ["", "a b", 'a"b', "a;b", "a.b.c", ".a", "1a", "ä", "x" * 49, "a\n"])
def test_a_table_is_an_identifier(table: str) -> None:
    with pytest.raises(ConfigError, match="table="):
        PostgresBackend("postgresql:///app", table=table)


@pytest.mark.parametrize("options", [{"timeout": 0}, {"min_size": 5}, {"max_size": 0}, {"min_size": -1}], ids=str)
def test_numbers_that_cannot_work_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="timeout= must be"):
        PostgresBackend("postgresql:///app", **options)


@asynchronous
async def test_a_question_before_open_says_what_to_do() -> None:
    assert "call `open` first" in str(await fails(PostgresBackend("postgresql:///app").count(), BackendError))
