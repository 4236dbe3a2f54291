"""A replica takes over, and lacks what its primary acknowledged last: memory, which has it, sends it again."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from random import Random
from typing import Any, Self

import pytest

from tests.figures import report, rng, size
from tests.kept import Kept, check_equal, lease_holder
from tests.postgres_servers import PostgresPair
from tests.redis_clusters import ClusterNode, RedisCluster
from tests.servers import ASGI, Serve, wait_for
from tests.visitors import answers, load

pytest_plugins = ["tests.hosts"]


class Failing(Kept, ABC):
    """A backend with replicas. The next to fail is one whose replica lacks what comes after `lag`."""

    server: Any

    def __init__(self, name: str, random: Random) -> None:
        self.name = name
        self.random = random

    @abstractmethod
    def lag(self) -> None:
        """From now on the replica gets nothing."""

    @abstractmethod
    def fail_over(self) -> None:
        """kill -9 of the primary, and its replica takes over."""

    @abstractmethod
    def repair(self) -> None:
        """The dead one is the replica from now on, and has all."""


class FailingPostgres(Failing):
    def __enter__(self) -> Self:
        self.server = PostgresPair().__enter__()
        self.url = self.server.url(self.server.primary.create_database())
        self.server.catch_up()
        return self

    def lag(self) -> None:
        self.server.lag()

    def fail_over(self) -> None:
        self.server.promote()

    def repair(self) -> None:
        self.server.seed()


class FailingCluster(Failing):
    master: ClusterNode
    replica: ClusterNode

    def __enter__(self) -> Self:
        self.server = RedisCluster().__enter__()
        self.url = self.server.url
        self._choose()
        return self

    def _choose(self) -> None:
        self.master = self.random.choice(self.server.masters)
        self.replica = self.server.replica(self.master)

    def lag(self) -> None:
        """A replica that cannot log in at its master is left behind."""
        self.replica.tell("CONFIG", "SET", "masterauth", "wrong")
        self.replica.tell("CLIENT", "KILL", "TYPE", "master")

    def fail_over(self) -> None:
        self.master.kill()
        self.replica.tell("CLUSTER", "FAILOVER", "TAKEOVER")
        self.server.wait_for_promotion(self.replica, lost=self.master)

    def repair(self) -> None:
        self.replica.tell("CONFIG", "SET", "masterauth", "")
        self.server.revive()
        self._choose()


KINDS = {"postgres": FailingPostgres, "redis-cluster": FailingCluster}


@pytest.fixture(params=KINDS)
def failing(request: pytest.FixtureRequest) -> Iterator[Failing]:
    with KINDS[request.param](request.param, rng(f"failover {request.param}")) as failing:
        yield failing


@pytest.mark.soak
def test_what_a_promoted_replica_lacks_is_sent_again_and_nobody_who_left_comes_back(
    serve: Serve, failing: Failing
) -> None:
    promotions, lossy = size(50, 3), 0
    server = serve(ASGI, env={"SHMSESSION_BACKEND": failing.url})
    store = server.store()
    losses = store.memory.outbox.losses

    def sent() -> int:
        return store.stats().counters["rows"]

    with load(server) as clients:
        wait_for(lambda: lease_holder(store) in server.worker_pids() and sent() > 0, "a worker flushes")
        for number in range(promotions):
            lags, known = number % 3 != 1, losses()
            if lags:
                failing.lag()
                lossy += 1
                before = sent()
                wait_for(lambda before=before: sent() > before + 100, "more is acknowledged")  # type: ignore[misc]
            failing.fail_over()
            before = sent()
            wait_for(lambda before=before: sent() > before + 100, "it goes on with the replica")  # type: ignore[misc]
            if lags:
                wait_for(lambda known=known: losses() > known, "the loss is noticed")  # type: ignore[misc]
            failing.repair()
    sessions = check_equal(store, failing)
    report(
        f"failover {failing.name}", promotions=promotions, lossy=lossy, commits=answers(clients), sessions=sessions,
        lost=0, revived=0,
    )  # fmt: skip
