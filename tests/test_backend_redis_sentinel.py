"""RedisBackend follows the primary that Sentinels name."""

import asyncio
import contextlib
import traceback
from collections.abc import Iterator
from typing import Self

import pytest

from shmsession.backends import Answer
from shmsession.backends.redis import RedisBackend
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing import BackendContract
from shmsession.testing.rows import handle_of, live, user_of
from tests.databases import RedisServer
from tests.redis_clusters import free_ports
from tests.servers import PATIENCE, wait_for
from tests.test_backend_redis import HOUR, SECRET, now, opened
from tests.test_backend_redis_cluster import until_answered

pytest_plugins = ["tests.database_hosts"]


class Sentinel(RedisServer):
    """Watches a primary on a port, as `main`, alone, and replaces it when it has been silent for half a second."""

    def __init__(self, primary: int, *settings: str) -> None:
        super().__init__()
        (self.port,) = free_ports(1)
        lines = [
            f"sentinel monitor main 127.0.0.1 {primary} 1", "sentinel down-after-milliseconds main 500",
            "sentinel failover-timeout main 2000", *settings, f"port {self.port}", "bind 127.0.0.1",
            f"unixsocket {self.socket}", "protected-mode no",
        ]  # fmt: skip
        self.settings = self.place / "settings"
        self.settings.write_text("\n".join(lines) + "\n")

    def _command(self) -> list[str]:
        return ["redis-sentinel", str(self.settings)]


class Service:
    """A primary, its replica, and a Sentinel that knows both."""

    def __init__(self, *options: str, settings: tuple[str, ...] = ()) -> None:
        first, second = free_ports(2)
        self.primary = RedisServer("--port", str(first), *options)
        self.replica = RedisServer("--port", str(second), "--replicaof", "127.0.0.1", str(first), *options)
        self.sentinel = Sentinel(first, *settings)

    def url(self, service: str = "main", credentials: str = "") -> str:
        """The first of the Sentinels is down."""
        return f"redis+sentinel://{credentials}127.0.0.1:1,127.0.0.1:{self.sentinel.port}/{service}"

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for server in (self.primary, self.replica, self.sentinel):
                stack.enter_context(server)
            wait_for(
                lambda: b"num-slaves\r\n$1\r\n1" in self.sentinel.ask("SENTINEL", "MASTER", "main"), "it knows both"
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def _service() -> Iterator[Service]:
    with Service() as service:
        yield service


@pytest.fixture
def service(_service: Service) -> Service:
    _service.primary.empty()
    return _service


class TestRedisWithSentinelContract(BackendContract):
    @pytest.fixture(autouse=True)
    def _on(self, service: Service) -> None:
        self.url = service.url()

    def backend(self) -> RedisBackend:
        return RedisBackend(self.url)


def test_writes_go_on_at_the_replica_that_was_promoted_for_a_primary_that_was_killed() -> None:
    async def play(service: Service) -> None:
        async with opened(service.url()) as backend:
            row = live(1, now() + HOUR, user=user_of(1))
            assert await backend.write([row]) == [Answer(True, None)]
            assert service.primary.ask("WAIT", "1", f"{PATIENCE * 1000:.0f}") == b":1\r\n"
            service.primary.kill()
            with pytest.raises(BackendUnavailable, match="did not answer"):
                await backend.load(row.handle)
            newer = row._replace(version=2)
            await until_answered(lambda: backend.write([newer]), backend.timeout)
            assert role(service.replica) == "master"
            assert await backend.load(row.handle) == newer
            assert await backend.sessions_of(row.user) == [newer]
            assert await backend.count() == 1

    with Service() as service:
        asyncio.run(play(service))


def role(server: RedisServer) -> str:
    """What it is, "master" or "slave"; nothing in the moment when that changes, for then it leaves its clients."""
    with contextlib.suppress(ConnectionError):
        return next((name for name in ("master", "slave") if name.encode() in server.ask("ROLE")), "")
    return ""


def test_a_primary_that_was_demoted_by_hand_is_left_as_soon_as_the_sentinel_names_another() -> None:
    """It says that it is read-only: the Sentinel is asked again."""

    async def play(service: Service) -> None:
        async with opened(service.url()) as backend:
            rows = [live(n, now() + HOUR, user=user_of(1)) for n in range(50)]
            await backend.write(rows)
            wait_for(lambda: service.sentinel.ask("SENTINEL", "FAILOVER", "main").startswith(b"+OK"), "it is begun")
            wait_for(lambda: role(service.primary) == "slave", "it is demoted")
            newer = [row._replace(version=2) for row in rows]
            answers = await until_answered(lambda: backend.write(newer), backend.timeout)
            assert {answer.applied for answer in answers} == {True}
            assert [await backend.load(row.handle) for row in newer] == newer

    with Service() as service:
        asyncio.run(play(service))


def test_no_answer_is_believed_of_an_old_primary_that_wakes_up_while_it_was_not_asked() -> None:
    """A process that asked nothing meanwhile still has its connection, and a session's absence there is none."""

    async def play(service: Service) -> None:
        async with opened(service.url()) as idle, opened(service.url()) as busy:
            await idle.initialize()
            service.primary.freeze()
            await until_answered(lambda: busy.write([live(1, now() + HOUR)]), 5)
            service.primary.thaw()
            assert all([await idle.load(handle_of(1)) for _ in range(3)])

    with Service() as service:
        asyncio.run(play(service))


def test_no_write_is_believed_that_only_an_old_primary_has_applied() -> None:
    """Over a connection that was in use when the new one became known; what is asked over another shows nothing."""

    async def play(service: Service) -> None:
        async with opened(service.url(), timeout=20) as backend:
            await backend.write([live(1, now() + HOUR)])
            service.primary.freeze()
            slow = asyncio.create_task(backend.load(handle_of(1)))  # over the connection that there is
            await asyncio.to_thread(wait_for, lambda: role(service.replica) == "master", "the promotion")
            known = await until_answered(backend.history, 20)  # of the new primary, over a new connection
            service.primary.thaw()
            await slow
            (answer,) = await backend.write([live(2, now() + HOUR)])
            load, history = asyncio.create_task(backend.load(handle_of(2))), asyncio.create_task(backend.history())
            await asyncio.wait((load, history))
            is_there = service.replica.ask("EXISTS", f"shmsession:row:{handle_of(2).hex()}") == b":1\r\n"
            assert is_there or history.exception() or history.result() != known or not answer.applied
            load.exception()

    with Service() as service:
        asyncio.run(play(service))


def test_a_sentinel_that_answers_nothing_leaves_time_for_the_next(service: Service) -> None:
    async def play() -> None:
        with Sentinel(1) as silent:
            silent.freeze()
            url = service.url().replace("127.0.0.1:1,", f"127.0.0.1:{silent.port},")
            async with opened(url, timeout=1) as backend:
                assert await backend.load(handle_of(1)) is None

    asyncio.run(play())


def test_a_service_that_no_sentinel_knows_and_no_sentinels_are_unavailable(service: Service) -> None:
    async def play() -> None:
        for url in (service.url("another"), "redis+sentinel://127.0.0.1:1/main"):
            async with opened(url) as backend:
                with pytest.raises(BackendUnavailable, match="No master found for"):
                    await backend.load(handle_of(1))

    asyncio.run(play())


def test_credentials_are_for_the_server_and_others_for_the_sentinels() -> None:
    async def play(service: Service) -> None:
        sentinel = "?sentinel_password=guard"
        async with opened(service.url(credentials=":secret@") + sentinel) as backend:
            assert await backend.write([live(1, now() + HOUR)]) == [Answer(True, None)]
        for credentials, query in ((f":{SECRET}@", sentinel), (":secret@", f"?sentinel_password={SECRET}")):
            async with opened(service.url(credentials=credentials) + query) as backend:
                with pytest.raises(BackendError, match=r"credentials|No master found") as caught:
                    await backend.load(handle_of(1))
                assert SECRET not in "".join(traceback.format_exception(caught.value))
                assert SECRET not in repr(backend)

    options = ("--requirepass", "secret", "--masterauth", "secret")
    with Service(*options, settings=("sentinel auth-pass main secret",)) as service:
        assert service.sentinel.ask("ACL", "SETUSER", "default", ">guard").startswith(b"+OK")
        asyncio.run(play(service))


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis+sentinel://host/main", "redis+sentinel://host:26379/main/0"),
        ("redis+sentinel:///main", "redis+sentinel://localhost:26379/main/0"),
        ("rediss+sentinel://ada:hunter2@a:7000,[::1]/main/3", "rediss+sentinel://a:7000,[::1]:26379/main/3"),
        ("redis+sentinel://host/main/?sentinel_password=hunter2", "redis+sentinel://host:26379/main/0"),
    ],
)
def test_the_name_says_where_and_no_secret(url: str, name: str) -> None:
    backend = RedisBackend(url)
    assert backend.name == name
    assert SECRET not in repr(backend)


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://:hunter2@host", "redis+sentinel://:hunter2@host/", "redis+sentinel://:hunter2@host/main/hunter2",
        "redis+sentinel://:hunter2@host/main/0/1", "redis+sentinel://:hunter2/x@host/main",
        "redis+sentinel://:hunter2@host:hunter2/main", "redis+sentinel://:hunter2@host/main?colour=blue",
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once_and_quotes_no_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisBackend(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
