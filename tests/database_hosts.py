"""Fixtures that start databases, when the first test needs one.

A test module takes them with ``pytest_plugins = ["tests.database_hosts"]``, and imports from tests.databases only.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.databases import MariaDBServer, PostgresServer, RedisServer
from tests.postgres_servers import PgBouncer, PostgresPair
from tests.redis_clusters import RedisCluster
from tests.surreal_servers import SurrealServer


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


@pytest.fixture(scope="session")
def _poolers(_postgres_server: PostgresServer) -> Iterator[Callable[[str], PgBouncer]]:
    poolers: dict[str, PgBouncer] = {}

    def get(mode: str) -> PgBouncer:
        if mode not in poolers:
            poolers[mode] = PgBouncer(_postgres_server, pool_mode=mode)
        return poolers[mode].revive()

    yield get
    for pooler in poolers.values():
        pooler.close()


@pytest.fixture
def pgbouncer(_poolers: Callable[[str], PgBouncer], postgres: PostgresServer) -> PgBouncer:
    """A PgBouncer in front of `postgres`, with two connections to each database, lent for one transaction.

    Tests may kill, freeze and restart it.
    """
    return _poolers("transaction")


@pytest.fixture
def statement_pgbouncer(_poolers: Callable[[str], PgBouncer], postgres: PostgresServer) -> PgBouncer:
    """The same, which refuses transactions of more than one statement."""
    return _poolers("statement")


@pytest.fixture(scope="session")
def _postgres_pair() -> Iterator[PostgresPair]:
    with PostgresPair() as pair:
        yield pair


@pytest.fixture
def postgres_pair(_postgres_pair: PostgresPair) -> PostgresPair:
    """A primary and its standby, which has caught up. Tests may promote it, and kill and freeze both."""
    return _postgres_pair.revive()


@pytest.fixture(scope="session")
def _surreal_server() -> Iterator[SurrealServer]:
    server = SurrealServer()
    yield server
    server.close()


@pytest.fixture
def surreal(_surreal_server: SurrealServer) -> SurrealServer:
    """A SurrealDB. Tests may kill, freeze and restart it."""
    return _surreal_server.revive()


@pytest.fixture
def surreal_database(surreal: SurrealServer) -> str:
    """The name of an empty database of its own."""
    return surreal.create_database()
