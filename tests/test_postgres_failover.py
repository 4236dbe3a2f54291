"""PostgreSQL whose standby takes over, found by a URL that names both hosts."""

import asyncio
import time

import pytest

from shmsession.backends import Answer
from shmsession.backends.postgres import PostgresBackend
from shmsession.errors import BackendUnavailable
from tests.figures import report, rng, size
from tests.postgres_servers import PostgresPair
from tests.questions import asynchronous, fails, live
from tests.servers import PATIENCE
from tests.test_backend_postgres import SLACK, opened

pytest_plugins = ["tests.database_hosts"]

TIMELINE = "SELECT left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"


@pytest.fixture
def url(postgres_pair: PostgresPair) -> str:
    """An empty database's."""
    return postgres_pair.url(postgres_pair.primary.create_database())


async def writes(backend: PostgresBackend, number: int, version: int) -> Answer:
    """The answer of the first question that is answered, in time; those before are unavailable, in time too."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PATIENCE
    while True:
        begun = loop.time()
        try:
            (answer,) = await backend.write([live(number, version)])
        except BackendUnavailable:
            assert loop.time() < deadline
        else:
            return answer
        finally:
            assert loop.time() - begun < 2.0 + SLACK


@pytest.mark.soak
@asynchronous
async def test_the_same_object_goes_on_with_the_standby_that_was_promoted(
    postgres_pair: PostgresPair, url: str
) -> None:
    """What the standby had is there; what it had not got yet is lost, and says so by its mark."""
    promotions, dice, lost = size(50, 3), rng("promotions"), 0
    taken = 0.0
    async with opened(url, timeout=2.0) as backend:
        await backend.write([live(1)])
        postgres_pair.catch_up()
        stored = 1
        for version in range(2, 2 + promotions):
            lags = version == 2 or dice.random() < 0.5
            if lags:
                postgres_pair.lag()
            assert (await writes(backend, 1, version)).before == live(1, stored).mark
            if not lags:
                postgres_pair.catch_up()
                stored = version
            postgres_pair.promote()
            begun = time.monotonic()
            found = await writes(backend, 1, 0)
            taken = max(taken, time.monotonic() - begun)
            assert found == Answer(False, live(1, stored).mark)
            lost += lags
            postgres_pair.seed()
    report("postgres promotions", promotions=promotions, lost=lost, slowest=round(taken, 2))


@asynchronous
async def test_a_primary_that_is_frozen_is_left_for_the_one_that_was_promoted(
    postgres_pair: PostgresPair, url: str
) -> None:
    """Whichever of them the URL names first."""
    async with opened(url + "&connect_timeout=2", timeout=2.0) as backend:
        for version in range(1, 3):
            await backend.write([live(1, version)])
            postgres_pair.catch_up()
            postgres_pair.promote(frozen=True)
            assert await writes(backend, 2, version) == Answer(True, None if version == 1 else live(2).mark)
            assert await backend.load(live(1).handle) == live(1, version)
            postgres_pair.seed()


@asynchronous
async def test_while_there_is_no_primary_that_is_said_and_nothing_is_written(
    postgres_pair: PostgresPair, url: str
) -> None:
    async with opened(url, timeout=2.0) as backend:
        await backend.write([live(1)])
        postgres_pair.catch_up()
        postgres_pair.primary.kill()
        for _ in range(5):
            error = await fails(backend.write([live(1, 2)]))
            assert "cannot be reached" in str(error)
        postgres_pair.promote()
        assert await writes(backend, 1, 3) == Answer(True, live(1).mark)


def test_the_timeline_in_the_name_of_the_wal_file_tells_promotions_from_crashes(postgres_pair: PostgresPair) -> None:
    """Any role may ask for it. What pg_control_checkpoint() has changes only with the next checkpoint."""
    (before,) = postgres_pair.primary.run(TIMELINE)
    postgres_pair.primary.restart()
    assert postgres_pair.primary.run(TIMELINE) == [before], "after a crash"
    postgres_pair.revive()
    postgres_pair.promote()
    (after,) = postgres_pair.primary.run(TIMELINE)
    assert int(after[0], 16) == int(before[0], 16) + 1, "at once after a promotion"
