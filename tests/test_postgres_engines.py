"""What servers do that are like PostgreSQL but not quite: made by PostgreSQL itself, with triggers and settings."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest

from shmsession.backends import Answer, Row
from shmsession.backends.postgres import PostgresBackend
from shmsession.errors import BackendError, BackendUnavailable
from shmsession.testing.races import tell_one_story
from tests.databases import PostgresServer
from tests.figures import SEED, report, rng, size
from tests.postgres_servers import PgBouncer
from tests.questions import asynchronous, fails, live
from tests.test_backend_postgres import NEVER_BACKWARDS, opened

pytest_plugins = ["tests.database_hosts"]


@pytest.fixture
def url(postgres: PostgresServer, postgres_database: str) -> str:
    """An empty database's."""
    return postgres.url(postgres_database)


@pytest.fixture
def isolation(request: pytest.FixtureRequest, postgres: PostgresServer, postgres_database: str) -> Iterator[str]:
    """A database of this isolation, for who sets none: by a pooler."""
    postgres.run(f"ALTER DATABASE {postgres_database} SET default_transaction_isolation = '{request.param}'")
    with PgBouncer(postgres, default_pool_size=8) as pooler:
        yield pooler.url(postgres_database)


@pytest.mark.soak
@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"], indirect=True)
@asynchronous
async def test_writers_that_lose_against_each_other_try_again_and_are_answered(
    postgres: PostgresServer, postgres_database: str, isolation: str
) -> None:
    """Each answer is the one that some order of all of them gives, and no row goes back."""
    rounds, dice, begun = size(100, 5), rng("serialization"), len(postgres.text)
    stories: dict[bytes, list[tuple[Row, Answer]]] = {live(number).handle: [] for number in range(20)}
    async with opened(isolation) as one, opened(isolation) as two:
        postgres.run(NEVER_BACKWARDS, postgres_database)

        async def write(backend: PostgresBackend, version: int) -> None:
            rows = [live(number, version, b"%d" % version) for number in range(20)]
            dice.shuffle(rows)
            for row, answer in zip(rows, await backend.write(rows), strict=True):
                stories[row.handle].append((row, answer))

        for turn in range(rounds):
            versions = [dice.randint(8 * turn, 8 * turn + 12) for _ in range(8)]
            await asyncio.gather(*(write((one, two)[n % 2], version) for n, version in enumerate(versions)))
        for story in stories.values():
            await tell_one_story(one, story, f"seed {SEED}")
    lost = postgres.text[begun:].count("could not serialize access")
    assert lost, "nobody lost, so that nothing was shown"
    report("postgres serialization", writes=rounds * 8, repeated=lost)


COUNTED = """
CREATE SEQUENCE failures;
CREATE FUNCTION failing() RETURNS {returns} LANGUAGE plpgsql AS $$ BEGIN
    IF nextval('failures') <= {times} THEN RAISE EXCEPTION 'restart transaction' USING ERRCODE = '{state}'; END IF;
    {end}
END $$;
"""
AT_COMMIT = """
CREATE CONSTRAINT TRIGGER failing AFTER INSERT OR UPDATE ON shmsession DEFERRABLE INITIALLY DEFERRED
FOR EACH ROW EXECUTE FUNCTION failing();
"""
AT_DDL = "CREATE EVENT TRIGGER failing ON ddl_command_start {when} EXECUTE FUNCTION failing();"


@pytest.mark.parametrize("state", ["40001", "40P01"])
@asynchronous
async def test_what_loses_at_its_commit_is_repeated(
    postgres: PostgresServer, postgres_database: str, url: str, state: str
) -> None:
    async with opened(url) as backend:
        counted = COUNTED.format(returns="trigger", times=4, state=state, end="RETURN new;")
        postgres.run(counted + AT_COMMIT, postgres_database)
        assert await backend.write([live(1)]) == [Answer(True, None)]
        assert postgres.run("SELECT last_value FROM failures", postgres_database) == [(5,)]


@asynchronous
async def test_who_loses_until_the_end_is_told_so(postgres: PostgresServer, postgres_database: str, url: str) -> None:
    """Within the timeout, and after pauses: not as often as the server could say no."""
    async with opened(url, timeout=2.0) as backend:
        counted = COUNTED.format(returns="trigger", times=10**9, state="40001", end="RETURN new;")
        postgres.run(counted + AT_COMMIT, postgres_database)
        error = await fails(backend.write([live(1)]), BackendUnavailable)
        assert str(error).endswith(("others kept writing the same rows for 2 s.", "did not answer within 2 s."))
        ((times,),) = postgres.run("SELECT last_value FROM failures", postgres_database)
        assert 5 < times < 200
        assert await backend.load(live(1).handle) is None


@asynchronous
async def test_a_commit_whose_outcome_the_server_does_not_know_is_unavailable(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """It is not repeated here: who sends rows sends them again."""
    async with opened(url) as backend:
        counted = COUNTED.format(returns="trigger", times=1, state="40003", end="RETURN new;")
        postgres.run(counted + AT_COMMIT, postgres_database)
        await fails(backend.write([live(1)]), BackendUnavailable)
        assert await backend.write([live(1)]) == [Answer(True, None)]


@asynchronous
async def test_tables_are_made_though_the_first_attempts_lose(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    counted = COUNTED.format(returns="event_trigger", times=3, state="40001", end="")
    postgres.run(counted + AT_DDL.format(when=""), postgres_database)
    async with opened(url) as backend:
        assert await backend.write([live(1)]) == [Answer(True, None)]


@pytest.mark.parametrize("state", ["0A000", "42601", "22023"])
@asynchronous
async def test_an_engine_that_stores_rows_in_another_way_gets_tables_without_tuning(
    postgres: PostgresServer, postgres_database: str, url: str, state: str
) -> None:
    counted = COUNTED.format(returns="event_trigger", times=10**9, state=state, end="")
    postgres.run(counted + AT_DDL.format(when="WHEN tag IN ('ALTER TABLE')"), postgres_database)
    async with opened(url) as backend:
        assert await backend.write([live(1)]) == [Answer(True, None)]
        await backend.initialize()
        assert await backend.count() == 1
    where = "WHERE relname = 'shmsession'"
    assert postgres.run(f"SELECT reloptions FROM pg_class {where}", postgres_database) == [(None,)]


@asynchronous
async def test_processes_that_make_the_tables_at_once_do_not_stand_in_each_others_way(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    begun = len(postgres.text)
    async with contextlib.AsyncExitStack() as stack:
        backends = [await stack.enter_async_context(opened(url)) for _ in range(8)]
        for _ in range(20):
            postgres.run("DROP TABLE shmsession, shmsession_meta", postgres_database)
            await asyncio.gather(*(backend.initialize() for backend in backends))
            assert await backends[0].count() == 0
            assert postgres.run("SELECT count(*) FROM shmsession_meta", postgres_database) == [(1,)]
    assert "deadlock detected" not in postgres.text[begun:]


@asynchronous
async def test_tables_that_were_made_in_part_are_completed(
    postgres: PostgresServer, postgres_database: str, url: str
) -> None:
    """Where each statement of a schema is a transaction, a crash leaves a part of it."""
    async with opened(url):
        postgres.run("DROP TABLE shmsession_meta", postgres_database)
        postgres.run("DROP INDEX shmsession_horizon", postgres_database)
    async with opened(url) as backend:
        assert await backend.write([live(1)]) == [Answer(True, None)]
        assert postgres.run("SELECT to_regclass('shmsession_horizon') IS NULL", postgres_database) == [(False,)]


@pytest.mark.parametrize("state", ["23505", "42P07", "42710"])
@asynchronous
async def test_tables_that_others_make_at_this_moment_are_waited_for(
    postgres: PostgresServer, postgres_database: str, url: str, state: str
) -> None:
    """That somebody has made them is known before they can be seen."""
    counted = COUNTED.format(returns="event_trigger", times=3, state=state, end="")
    postgres.run(counted + AT_DDL.format(when=""), postgres_database)
    async with opened(url) as backend:
        assert await backend.count() == 0


@asynchronous
async def test_what_is_in_the_way_for_good_is_named(postgres: PostgresServer, postgres_database: str, url: str) -> None:
    postgres.run("CREATE TYPE shmsession AS ENUM ('theirs')", postgres_database)
    backend = PostgresBackend(url, timeout=1.0)
    await backend.open()
    try:
        assert "choose another name by `table=`" in str(await fails(backend.initialize(), BackendError))
    finally:
        await backend.close()
