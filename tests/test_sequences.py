"""Each way in which a dead session could come back across the database, by name, over each real database.

The sequences are those of test_write_behind, which holds them against a dict; here a database answers.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from shmsession.testing import ManualClock
from tests.backends import Host
from tests.figures import SOAKING
from tests.kept import BACKENDS
from tests.real_backends import RealBackend
from tests.test_write_behind import (  # noqa: F401  # collected here too
    pairs,
    test_a_flusher_that_was_stopped_and_goes_on_does_no_harm,
    test_a_generation_sends_what_it_has_the_key_for,
    test_a_generation_that_lacks_a_key_forgets_nothing_for_the_other,
    test_a_renewed_session_is_never_alive_twice,
    test_a_renewed_session_is_never_alive_twice_when_the_backend_falls_back,
    test_a_session_is_dead_at_once_while_the_backend_is_down,
    test_an_acknowledgement_that_comes_late_crosses_off_no_newer_commit,
    test_an_answer_from_before_a_rebuild_is_not_believed,
    test_an_answer_that_comes_late_does_not_revive,
    test_an_answer_that_comes_late_does_not_undo_a_commit,
    test_an_upsert_that_arrives_after_the_death_is_refused,
    test_an_upsert_that_arrives_before_the_death_is_followed_by_it,
    test_dead_in_the_backend_is_dead_here,
    test_dead_stays_dead_when_memory_is_lost_and_numbers_begin_again,
    test_shortening_a_life_never_shortens_the_horizon,
    test_what_expires_while_it_waits_dies_in_the_backend_too,
    test_what_was_read_before_the_backend_fell_back_is_not_sent_after,
    test_what_was_withdrawn_stays_so_when_the_backend_falls_back,
)

pytest_plugins = ["tests.database_hosts"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, place: Path) -> Iterator[RealBackend]:
    def given(name: str) -> Any:
        return request.getfixturevalue(name)

    match request.param:
        case "sqlite":
            url = f"sqlite:///{place}/sessions.db?table="
        case "postgres":
            url = given("postgres").url(given("postgres_database")) + "&table="
        case "mysql":
            url = given("mariadb").url(given("mariadb_database")) + "&table="
        case "redis":
            url = given("redis_server").url + "&prefix="
        case "redis-cluster":
            url = given("redis_cluster").url + "?prefix="
        case "surrealdb":
            url = given("surreal").url(given("surreal_database")) + "?table="
    backend = RealBackend(lambda name: url + name)
    yield backend
    backend.end()


@pytest.fixture
def clock() -> ManualClock:
    """It is ahead of the databases', which remove what is past its horizon by their own."""
    clock = ManualClock()
    clock.advance(days=7300)
    return clock


@pytest.fixture
def moments() -> Sequence[int]:
    """All of them under `./dev soak`: making tables takes long, and the dict has died at each."""
    return range(0, 14, 1 if SOAKING else 3)


@pytest.fixture
def host(place: Path, backend: RealBackend, clock: ManualClock) -> Iterator[Host]:
    with Host(place, backend, clock) as host:
        yield host
