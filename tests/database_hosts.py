"""Fixtures that start databases, when the first test needs one.

A test module takes them with ``pytest_plugins = ["tests.database_hosts"]``, and imports from tests.databases only.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.databases import MariaDBServer, PostgresServer, RedisServer
from tests.redis_clusters import RedisCluster


@pytest.fixture(scope="session")
def _redis_servers() -> Iterator[Callable[..., RedisServer]]:
    servers: dict[tuple[str, ...], RedisServer] = {}

    def get(*options: str) -> RedisServer:
        if options not in servers:
            servers[options] = RedisServer(*options)
        return servers[options].revive()

    yield get
    for server in servers.values():
        server.close()


@pytest.fixture
def redis_server(_redis_servers: Callable[..., RedisServer]) -> RedisServer:
    """An empty Redis that forgets everything when it ends. Tests may kill, freeze and restart it."""
    server = _redis_servers()
    server.empty()
    return server


@pytest.fixture
def durable_redis(_redis_servers: Callable[..., RedisServer]) -> RedisServer:
    """An empty Redis that has on disk what it acknowledged."""
    server = _redis_servers(*RedisServer.DURABLE)
    server.empty()
    return server


@pytest.fixture(scope="session")
def _redis_cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as cluster:
        yield cluster


@pytest.fixture
def redis_cluster(_redis_cluster: RedisCluster) -> RedisCluster:
    """An empty cluster of three masters and their replicas. Tests may kill, freeze, promote and restart its nodes."""
    cluster = _redis_cluster.revive()
    cluster.empty()
    return cluster


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[PostgresServer]:
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def postgres(_postgres_server: PostgresServer) -> PostgresServer:
    """A PostgreSQL. Tests may kill, freeze and restart it."""
    return _postgres_server.revive()


@pytest.fixture
def postgres_database(postgres: PostgresServer) -> Iterator[str]:
    """The name of an empty database of its own."""
    name = postgres.create_database()
    yield name
    postgres.revive().drop_database(name)


@pytest.fixture(scope="session")
def _mariadb_server() -> Iterator[MariaDBServer]:
    server = MariaDBServer()
    yield server
    server.close()


@pytest.fixture
def mariadb(_mariadb_server: MariaDBServer) -> MariaDBServer:
    """A MariaDB. Tests may kill, freeze and restart it."""
    return _mariadb_server.revive()


@pytest.fixture
def mariadb_database(mariadb: MariaDBServer) -> Iterator[str]:
    """The name of an empty database of its own."""
    name = mariadb.create_database()
    yield name
    mariadb.revive().drop_database(name)
