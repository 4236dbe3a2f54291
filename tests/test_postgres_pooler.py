"""PostgreSQL behind PgBouncer, which lends its few connections to one transaction at a time."""

import asyncio
import contextlib
import random
import traceback

import psycopg
import pytest

from shmsession.backends import Answer, Backend, State
from shmsession.backends.postgres import PostgresBackend
from shmsession.errors import BackendError, BackendUnavailable
from shmsession.testing.contract import BackendContract
from tests.databases import PostgresServer
from tests.postgres_servers import PgBouncer
from tests.questions import LATER, SECRET, asynchronous, fails, holds, live
from tests.servers import PATIENCE
from tests.test_backend_postgres import SLACK, blocked, opened, waiting, waits_for_a_lock

pytest_plugins = ["tests.database_hosts"]


@pytest.fixture
def url(pgbouncer: PgBouncer, postgres_database: str) -> str:
    """An empty database's, by the pooler."""
    return pgbouncer.url(postgres_database)


class TestContract(BackendContract):
    """The contract that all backends keep, over connections that belong to nobody."""

    @pytest.fixture(autouse=True)
    def _empty_database(self, url: str) -> None:
        self.url = url

    def backend(self) -> Backend:
        return PostgresBackend(self.url)


class TestContractByStatement(BackendContract):
    """The same, where not even a transaction keeps one."""

    @pytest.fixture(autouse=True)
    def _empty_database(self, statement_pgbouncer: PgBouncer, postgres_database: str) -> None:
        self.url = statement_pgbouncer.url(postgres_database)

    def backend(self) -> Backend:
        return PostgresBackend(self.url)


@asynchronous
async def test_many_clients_share_few_connections_and_leave_nothing_in_them(url: str) -> None:
    """No statement, no setting: the next to get the connection is another application perhaps."""
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(opened(url, timeout=PATIENCE)) for _ in range(6)]
        for version in range(1, 6):
            batches = [[live(number, version) for number in range(n, n + 50)] for n in range(0, 400, 10)]
            await asyncio.gather(*(backends[n % 6].write(batch) for n, batch in enumerate(batches)))
            assert await asyncio.gather(*(backend.count() for backend in backends)) == [440] * 6
    async with (
        await psycopg.AsyncConnection.connect(url, prepare_threshold=None) as one,
        await psycopg.AsyncConnection.connect(url, prepare_threshold=None) as two,
    ):
        found = set()
        for connection in (one, two):
            settings = "current_setting('statement_timeout'), current_setting('default_transaction_isolation')"
            statements = "(SELECT count(*) FROM pg_prepared_statements)"
            cursor = await connection.execute(f"SELECT pg_backend_pid(), {settings}, {statements}".encode())
            row = await cursor.fetchone()
            assert row is not None
            found.add(row[0])
            assert row[1:] == ("0", "read committed", 0)
        assert len(found) == 2, "both of the pooler's connections were looked at"


@asynchronous
async def test_the_first_question_after_the_pooler_was_restarted_is_answered(pgbouncer: PgBouncer, url: str) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        for _ in range(3):
            await asyncio.gather(*(backend.write([live(number)]) for number in range(20)))
            pgbouncer.restart()
            assert await backend.count() == 20


@asynchronous
async def test_a_pooler_that_is_down_is_unavailable_at_once(pgbouncer: PgBouncer, url: str) -> None:
    async with opened(url, timeout=PATIENCE / 2) as backend:
        await backend.write([live(1)])
        pgbouncer.kill()
        begun = asyncio.get_running_loop().time()
        for _ in range(10):
            assert "cannot be reached" in str(await fails(backend.load(live(1).handle)))
        assert asyncio.get_running_loop().time() - begun < PATIENCE / 2
        pgbouncer.start()
        assert await backend.load(live(1).handle) == live(1)


@asynchronous
async def test_a_pooler_killed_in_the_middle_of_a_question_costs_that_question(
    postgres: PostgresServer, postgres_database: str, pgbouncer: PgBouncer, url: str
) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        await backend.write([live(1)])
        with blocked(postgres, postgres.url(postgres_database)):
            writing = asyncio.create_task(backend.write([live(1, 2)]))
            await waits_for_a_lock(postgres)
            pgbouncer.restart()
            assert "broke off" in str(await fails(writing))
        assert [answer.applied for answer in await backend.write([live(1, 3)])] == [True]


@asynchronous
async def test_a_frozen_pooler_is_unavailable_within_the_timeout(pgbouncer: PgBouncer, url: str) -> None:
    async with opened(url, timeout=1.0) as backend:
        await backend.write([live(1)])
        pgbouncer.freeze()
        begun = asyncio.get_running_loop().time()
        for _ in range(2):
            assert "did not answer within 1 s" in str(await fails(backend.count()))
        assert asyncio.get_running_loop().time() - begun < 2 + SLACK
        pgbouncer.thaw()
        assert await backend.count() == 1


@asynchronous
async def test_what_was_answered_survives_the_death_of_the_server_behind(postgres: PostgresServer, url: str) -> None:
    """While it is down that is said, and as soon as it and the pooler are connected again, there is an answer."""
    async with opened(url, timeout=1.0) as backend:
        for number in range(3):
            await backend.write([live(number)])
            postgres.kill()
            for _ in range(2):  # the pooler waits for the server, or says that it has waited before
                assert not str(await fails(backend.count())).endswith(": ")
            postgres.start()
            assert await answered(backend) == number + 1


async def answered(backend: Backend) -> int:
    """What it counts, once it does: a pooler passes on the failures that it met before."""
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        try:
            return await backend.count()
        except BackendUnavailable:
            assert asyncio.get_running_loop().time() < deadline


@asynchronous
async def test_what_waits_too_long_for_a_lock_is_not_left_running(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """It has no limit of its own, so it is told."""
    async with opened(url, timeout=1.0, max_size=1) as backend:
        await backend.write([live(1)])
        with blocked(postgres, postgres.url(postgres_database)):
            await fails(backend.write([live(1, 2)]))
            await holds(lambda: not waiting(postgres), "the server gave up, too")
        assert await backend.count() == 1


@asynchronous
async def test_who_gets_no_connection_of_the_poolers_waits_no_longer_than_its_timeout(url: str) -> None:
    async with opened(url, timeout=1.0) as backend:
        await backend.write([live(1)])
        async with (
            await psycopg.AsyncConnection.connect(url) as one,
            await psycopg.AsyncConnection.connect(url) as two,
        ):
            await one.execute("SELECT 1")
            await two.execute("SELECT 1")
            assert "did not answer within 1 s" in str(await fails(backend.count()))
            await one.commit()
            assert await backend.count() == 1


@asynchronous
async def test_a_cancelled_question_harms_no_other_client(url: str) -> None:
    """The connection that it was lent goes to the other, clean; and the other's questions are not cancelled for it."""
    rounds, dice = 60, random.Random("cancelled")
    async with opened(url, timeout=PATIENCE, max_size=2) as one, opened(url, timeout=PATIENCE, max_size=2) as other:
        for version in range(1, rounds + 1):
            writing = [asyncio.create_task(one.write([live(n, version, bytes(9000)) for n in range(20)])) for _ in "ab"]
            counting = [asyncio.create_task(other.write([live(99 + n, version)])) for n in range(4)]
            for _ in range(dice.randint(0, 40)):
                await asyncio.sleep(0)
            for task in writing:
                task.cancel()
            await asyncio.gather(*writing, return_exceptions=True)
            assert await asyncio.gather(*counting) == [[Answer(True, None if version == 1 else before)] for before in [
                live(99, version - 1).mark
            ]] * 4  # fmt: skip
        assert await one.write([live(0, rounds + 1)]) != []


@asynchronous
async def test_a_question_cancelled_while_the_server_works_on_it_is_given_up_there_too(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    async with opened(url, max_size=1, timeout=PATIENCE) as backend:
        await backend.write([live(1)])
        with blocked(postgres, postgres.url(postgres_database)):
            writing = asyncio.create_task(backend.write([live(1, 2)]))
            await waits_for_a_lock(postgres)
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            await holds(lambda: not waiting(postgres), "the server gave up, too")
            assert await backend.load(live(1).handle) == live(1)
        assert [answer.applied for answer in await backend.write([live(1, 2)])] == [True]


@pytest.mark.parametrize("mode", ["session", "transaction"])
@asynchronous
async def test_passwords_tables_and_hosts_are_the_urls_through_a_pooler_too(
    postgres: PostgresServer, postgres_database: str, mode: str
) -> None:
    role = f"pooled_{postgres_database}"
    postgres.run(f"CREATE ROLE {role} LOGIN PASSWORD '{SECRET}'")
    postgres.run(f"CREATE SCHEMA shop AUTHORIZATION {role}", postgres_database)
    try:
        with PgBouncer(postgres, users={role: SECRET}, pool_mode=mode) as pooler:
            good = pooler.url(postgres_database, role, SECRET) + "&table=shop.visits&target_session_attrs=read-write"
            async with opened(good) as backend:
                assert await backend.write([live(1)]) == [Answer(True, None)]
                assert (await backend.sweep(LATER + 1, 9), await backend.count()) == (1, 0)
            wrong = PostgresBackend(pooler.url(postgres_database, role, "wrong-" + SECRET))
            await wrong.open()
            try:
                error = await fails(wrong.count())
                assert "SASL authentication failed" in str(error)
                assert SECRET not in "".join(traceback.format_exception(error))
            finally:
                await wrong.close()
    finally:
        postgres.run(f"DROP OWNED BY {role}", postgres_database)
        postgres.run(f"DROP ROLE {role}")


@asynchronous
async def test_what_the_pooler_refuses_is_told(url: str) -> None:
    backend = PostgresBackend(url, options="-c search_path=shop")
    await backend.open()
    try:
        assert "unsupported startup parameter: options" in str(await fails(backend.count()))
    finally:
        await backend.close()


@asynchronous
async def test_an_error_of_the_servers_leaves_the_connection_usable(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    async with opened(url, max_size=1) as backend:
        postgres.run("ALTER TABLE shmsession ADD CHECK (version < 5)", postgres_database)
        error = await fails(backend.write([live(1, 5, SECRET.encode())]), BackendError)
        assert "check constraint" in str(error)
        assert SECRET.encode().hex() not in "".join(traceback.format_exception(error))
        assert await backend.write([live(1, 4)]) == [Answer(True, None)]
        found = await backend.load(live(1).handle)
        assert found is not None
        assert found.state is State.LIVE
