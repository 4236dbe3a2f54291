"""RedisBackend keeps the contract of `Backend`, and its promises when the server, or the way to it, fails."""

import asyncio
import contextlib
import inspect
import logging
import os
import shutil
import signal
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import pytest
from redis import Redis

from shmsession.backends import FOREVER, SENTINEL, Answer, Mark, Row, State, wins
from shmsession.backends import redis as module
from shmsession.backends.redis import RedisBackend
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing import BackendContract
from shmsession.testing.rows import dead, erased, handle_of, handles_in, live, user_of
from tests.databases import RedisServer
from tests.documents import ROOT, blocks, code, marked, rows
from tests.figures import report, rng, size
from tests.servers import PATIENCE, new_place
from tests.tls import self_signed

pytest_plugins = ["tests.database_hosts"]


class TestRedis(BackendContract):
    @pytest.fixture(autouse=True)
    def _on(self, redis_server: RedisServer) -> None:
        self.url = redis_server.url

    def backend(self) -> RedisBackend:
        return RedisBackend(self.url)


class TestRedisWithRESP3(TestRedis):
    def backend(self) -> RedisBackend:
        return RedisBackend(self.url, protocol=3)


PAGE = ROOT / "docs" / "redis.md"
HOUR = 3_600_000
NUMBER = 2**53 - 1
SHORT = 0.3
"""A timeout, in seconds, for questions that are never answered."""
SECRET = "hunter2"


def now() -> int:
    """Rows vanish by the server's clock, which is this host's."""
    return time.time_ns() // 1_000_000


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[RedisBackend]:
    backend = RedisBackend(url, **options)
    await backend.open()
    try:
        yield backend
    finally:
        await backend.close()


@contextlib.contextmanager
def looking(server: RedisServer) -> Iterator["Redis"]:
    """A plain client that looks at the keys."""
    client = Redis(unix_socket_path=server.socket)
    try:
        yield client
    finally:
        client.close()


def row_key(handle: bytes) -> str:
    return f"shmsession:row:{handle.hex()}"


def subscribed(client: Any) -> Any:
    """redis-py's pubsub has no types."""
    return client.pubsub()


def user_key(user: bytes) -> str:
    return f"shmsession:user:{user.hex()}"


async def unlisted(backend: RedisBackend, server: RedisServer) -> list[Row]:
    """The LIVE rows that a user's set does not list until their horizon: there must be none, ever."""
    found = []
    with looking(server) as client:
        async for handle in backend.handles():
            row = await backend.load(handle)
            if row is None or row.state is not State.LIVE or not row.user:
                continue
            score: Any = client.zscore(user_key(row.user), handle)
            lives: Any = client.pexpiretime(user_key(row.user))
            if score is None or score < row.horizon or 0 <= lives < row.horizon:
                found.append(row)
    return found


# ── a proxy, and a server that only fails ─────────────────────────────────────────────────────────────────────


class Proxy:
    """Between a backend and its server. `harm`, by name, comes to each request from number `from_request` on."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.place = new_place()
        self.url = f"unix://{self.place}/proxy"
        self.harm = ""
        self.from_request = 0
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._accept, str(self.place / "proxy"))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks)
        shutil.rmtree(self.place)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await self._serve(reader, writer)
        writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request is what arrives at once; one answer is what the server says until it is silent."""
        server_reader, server_writer = await asyncio.open_unix_connection(self.target)
        try:
            while request := await reader.read(1 << 20):
                harm = self.harm if not self.from_request else ""
                self.from_request = max(0, self.from_request - (not _is_greeting(request)))
                if harm == "cuts the request" and not _is_greeting(request):
                    server_writer.write(request[: len(request) // 2])
                    await server_writer.drain()
                    return
                server_writer.write(request)
                await server_writer.drain()
                answer = await server_reader.read(1 << 20)
                if _is_greeting(request):
                    writer.write(answer)
                elif harm == "drops the answer":
                    return
                elif harm == "never answers":
                    await asyncio.Event().wait()
                elif harm == "cuts the answer":
                    writer.write(answer[: len(answer) // 2])
                    return
                elif harm == "half-closes":
                    writer.write_eof()
                    await reader.read()
                    return
                else:
                    writer.write(answer)
                await writer.drain()
        finally:
            server_writer.close()


def _is_greeting(request: bytes) -> bool:
    return b"SETINFO" in request


HARMS = ["cuts the request", "drops the answer", "never answers", "cuts the answer", "half-closes"]


@asynccontextmanager
async def failing_with(text: str) -> AsyncIterator[str]:
    """The URL of a server that answers every command with one error."""
    place = new_place()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                for _ in range(int(line[1:])):
                    await reader.readexactly(int((await reader.readline())[1:]) + 2)
                writer.write(f"-{text}\r\n".encode())
                await writer.drain()
        writer.close()

    server = await asyncio.start_unix_server(serve, str(place / "failing"))
    try:
        yield f"unix://{place}/failing"
    finally:
        server.close()
        shutil.rmtree(place)


# ── rows and the server's keys ────────────────────────────────────────────────────────────────────────────────


def test_numbers_up_to_the_largest_are_kept_exactly(redis_server: RedisServer) -> None:
    """Lua counts in doubles, and prints few of their digits: nothing may be lost on the way."""

    async def play() -> None:
        async with opened(redis_server.url) as backend:
            top = live(1, NUMBER, epoch=NUMBER, version=NUMBER, user=user_of(1))
            assert await backend.write([top]) == [Answer(True, None)]
            assert await backend.load(top.handle) == top
            assert await backend.write([top._replace(version=NUMBER - 1)]) == [Answer(False, top.mark)]
            assert await backend.write([top._replace(epoch=NUMBER - 1)]) == [Answer(False, top.mark)]
            low = live(2, now() + HOUR, epoch=NUMBER - 1, version=NUMBER - 1)
            assert await backend.write([low]) == [Answer(True, None)]
            assert await backend.write([low._replace(version=NUMBER, horizon=FOREVER - 1)]) == [Answer(True, low.mark)]
            with looking(redis_server) as client:
                assert client.pexpiretime(row_key(low.handle)) == FOREVER - 1
                assert client.pexpiretime(row_key(top.handle)) == -1
                assert client.zscore(user_key(top.user), top.handle) == NUMBER

    asyncio.run(play())


def test_bytes_of_every_kind_come_back_as_they_were(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as backend:
            handles = [bytes([byte]) * 20 for byte in range(1, 256)]
            rows = [
                Row(h, State.LIVE, 1, 1, now() + HOUR, h[:8], bytes(range(256)) + b"\r\n$-1\r\n" + h) for h in handles
            ]
            rows.append(live(1, now() + HOUR, body=os.urandom(3 << 20)))
            rows.append(live(2, now() + HOUR, body=b""))
            assert await backend.write(rows) == [Answer(True, None)] * len(rows)
            assert [await backend.load(row.handle) for row in rows] == rows
            assert await handles_in(backend) == sorted(row.handle for row in rows)
            assert [await backend.sessions_of(row.user) for row in rows[:255]] == [[row] for row in rows[:255]]

    asyncio.run(play())


def test_answers_of_many_chunks_come_in_the_order_of_the_rows(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as backend:
            rows = [live(i, now() + HOUR, version=1 + i, body=b"x" * (i % 5000)) for i in range(3 * module.CHUNK)]
            await backend.write(rows[::2])
            answers = await backend.write(rows)
            assert answers == [Answer(bool(i % 2), None if i % 2 else row.mark) for i, row in enumerate(rows)]

    asyncio.run(play())


def test_chunks_are_bounded_in_rows_and_bytes() -> None:
    rows = [live(i, FOREVER, body=b"x" * length) for i, length in enumerate([10, 2 << 20, 2 << 20, 5, 5] + [1] * 1200)]
    chunks = list(module._chunks(rows))
    assert [row for chunk in chunks for row in chunk] == rows
    assert [len(chunk) for chunk in chunks] == [1, 1, 1, 500, 500, 202]


def test_a_row_lives_in_the_server_until_the_later_horizon_and_not_longer(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as backend:
            start = now() + HOUR
            row = live(1, start, version=2)
            with looking(redis_server) as client:
                steps = [
                    (row, start),
                    (row._replace(version=3, horizon=start - 1000), start),
                    (row._replace(version=4, horizon=start + 1), start + 1),
                    (row._replace(version=1, horizon=start + 2), start + 2),
                    (row._replace(version=1, horizon=start), start + 2),
                    (erased(1, start, version=5), start + 2),
                    (dead(1, start + 3), start + 3),
                    (live(1, start + 4, version=9), start + 4),
                ]
                for sent, horizon in steps:
                    await backend.write([sent])
                    assert client.pexpiretime(row_key(row.handle)) == horizon
                    kept = await backend.load(row.handle)
                    assert kept is None or kept.horizon == horizon
                await backend.write([row._replace(horizon=FOREVER)])
                assert client.pexpiretime(row_key(row.handle)) == -1
                await backend.write([row._replace(horizon=start)])
                assert client.pexpiretime(row_key(row.handle)) == -1

    asyncio.run(play())


def test_a_row_that_is_past_is_answered_and_gone(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as backend:
            row = live(1, now() - 1, user=user_of(1))
            assert await backend.write([row]) == [Answer(True, None)]
            assert await backend.load(row.handle) is None
            assert await backend.sessions_of(row.user) == []
            with looking(redis_server) as client:
                assert client.keys() == []

    asyncio.run(play())


def test_a_row_takes_400_bytes_less_than_a_hash_of_its_parts(redis_server: RedisServer) -> None:
    """Why rows are strings. A dead one is all header."""

    async def play() -> None:
        async with opened(redis_server.url) as backend:
            row = live(1, now() + HOUR, epoch=now(), user=user_of(1), body=os.urandom(600))
            await backend.write([row, dead(2, now() + HOUR)])
            with looking(redis_server) as client:
                parts: Any = {**row._asdict(), "state": int(row.state)}
                client.hset("parts", mapping=parts)
                whole, split, gone = (
                    client.memory_usage(key, samples=0) for key in (row_key(row.handle), "parts", row_key(handle_of(2)))
                )
                assert isinstance(whole, int)
                assert isinstance(split, int)
                assert isinstance(gone, int)
                assert split - whole >= 400
                assert gone < 200

    asyncio.run(play())


# ── users ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_users_set_lists_every_row_for_as_long_as_it_lives(redis_server: RedisServer) -> None:
    """Also when the later horizon comes from an erased row, or with a row that is refused."""

    async def play() -> None:
        user, start = user_of(1), now() + HOUR
        async with opened(redis_server.url) as backend:
            with looking(redis_server) as client:
                await backend.write([erased(1, start + 5000)])
                await backend.write([live(1, start, version=2, user=user)])
                assert client.zscore(user_key(user), handle_of(1)) == start + 5000
                await backend.write([live(2, start, version=2, user=user)])
                for refused in (live(2, start + 6000, user=user_of(9)), erased(2, start + 7000), live(2, start + 8000)):
                    assert not (await backend.write([refused]))[0].applied
                    assert client.zscore(user_key(user), handle_of(2)) == refused.horizon
                assert client.pexpiretime(user_key(user)) == start + 8000
                await backend.write([live(3, FOREVER, user=user)])
                assert client.pexpiretime(user_key(user)) == -1
            assert await unlisted(backend, redis_server) == []
            assert {row.handle for row in await backend.sessions_of(user)} == {handle_of(i) for i in (1, 2, 3)}

    asyncio.run(play())


def test_a_listed_row_that_is_gone_erased_dead_or_anothers_is_not_among_the_users(redis_server: RedisServer) -> None:
    async def play() -> None:
        user, horizon = user_of(1), now() + HOUR
        async with opened(redis_server.url) as backend:
            await backend.write([live(i, horizon, user=user) for i in range(5)])
            with looking(redis_server) as client:
                client.delete(row_key(handle_of(0)))
                client.zadd(user_key(user), {b"no handle at all": horizon})
                await backend.write([erased(1, horizon, version=2), live(2, horizon, version=2, user=user_of(2))])
                await backend.write([dead(3, horizon)])
                assert [row.handle for row in await backend.sessions_of(user)] == [handle_of(4)]
                assert client.zscore(user_key(user), handle_of(3)) is None

    asyncio.run(play())


def test_the_entry_of_a_row_goes_when_the_row_dies_and_when_a_late_row_is_refused_by_its_death(
    redis_server: RedisServer,
) -> None:
    async def play() -> None:
        horizon = now() + HOUR
        async with opened(redis_server.url) as backend:
            with looking(redis_server) as client:
                await backend.write([live(i, horizon, user=user_of(1)) for i in range(3)])
                await backend.write([dead(1, horizon)])
                assert set(client.zrange(user_key(user_of(1)), 0, -1)) == {handle_of(0), handle_of(2)}
                await backend.write([live(1, horizon + 9, version=5, user=user_of(2))])
                assert client.zcard(user_key(user_of(2))) == 0

    asyncio.run(play())


def test_reading_a_users_rows_forgets_dead_ones_but_none_that_may_come_back(redis_server: RedisServer) -> None:
    """A writer lists a row before it stores it: an entry without a row may be one whose row is on its way."""

    async def play() -> None:
        user, horizon = user_of(1), now() + HOUR
        async with opened(redis_server.url) as backend:
            with looking(redis_server) as client:
                await backend.write([dead(1, horizon), dead(2, horizon), erased(3, horizon)])
                on_its_way = {handle_of(2): horizon + 1, handle_of(3): horizon, handle_of(4): horizon}
                client.zadd(user_key(user), {handle_of(1): horizon, **on_its_way})
                assert await backend.sessions_of(user) == []
                assert set(client.zrange(user_key(user), 0, -1)) == set(on_its_way)

    asyncio.run(play())


def test_past_entries_go_when_another_comes_or_a_sweep_passes_and_no_others(redis_server: RedisServer) -> None:
    async def play() -> None:
        start = now()
        past, coming = start - 10, start + HOUR
        async with opened(redis_server.url) as backend:
            with looking(redis_server) as client:
                for user in map(user_of, range(3)):
                    client.zadd(user_key(user), {b"past": past, b"coming": coming})
                client.zadd("shmsession:user:not-ours", {b"past": past})
                await backend.write([live(1, coming, user=user_of(0))])
                assert set(client.zrange(user_key(user_of(0)), 0, -1)) == {b"coming", handle_of(1)}
                assert client.zcard(user_key(user_of(1))) == 2
                assert await backend.sweep(past - 1, 100) == 0
                assert client.zcard(user_key(user_of(1))) == 2
                for _ in range(20):
                    assert await backend.sweep(coming + HOUR, 2) == 0  # this host's clock may be ahead: not believed
                assert [client.zrange(user_key(user_of(i)), 0, -1) for i in (1, 2)] == [[b"coming"]] * 2
                assert client.zcard("shmsession:user:not-ours") == 1
            assert await backend.count() == 1

    asyncio.run(play())


def test_no_row_is_live_and_unlisted_wherever_a_write_is_cut_off(redis_server: RedisServer) -> None:
    """Cut off at every exchange with the server in turn, and once in the midst of each."""

    async def play() -> None:
        start = now() + HOUR
        async with opened(redis_server.url) as direct, Proxy(redis_server.socket) as proxy:
            for harm in ("drops the answer", "cuts the request"):
                for cut in range(8):
                    redis_server.empty()
                    await direct.write([erased(i, start + 99) for i in range(0, 40, 3)])
                    await direct.write([live(i, start, user=user_of(3)) for i in range(1, 40, 3)])
                    rows = [live(i, start, version=2, user=user_of(i % 4)) for i in range(40)]
                    rows[1::3] = [dead(i, start) for i in range(1, 40, 3)]
                    proxy.harm, proxy.from_request = harm, cut
                    async with opened(proxy.url) as backend:
                        try:
                            answered = await backend.write(rows)
                        except BackendUnavailable:
                            answered = []
                    assert await unlisted(direct, redis_server) == []
                    again = await direct.write(rows)
                    assert [
                        row for row in rows if row.state is State.LIVE and await direct.load(row.handle) is None
                    ] == []
                    assert await unlisted(direct, redis_server) == []
                    if answered:
                        assert not any(answer.applied for answer, row in zip(again, rows, strict=True) if row.body)
                        return
        raise AssertionError("the write never came through")

    asyncio.run(play())


# ── several at once ───────────────────────────────────────────────────────────────────────────────────────────


def test_clients_that_race_for_the_same_handles_end_by_the_rule(redis_server: RedisServer) -> None:
    """The answers of each handle form one chain, each of its links a row that `wins`."""
    random = rng("redis race")
    base = now() + HOUR

    def some_row(number: int) -> Row:
        state = random.choices([State.LIVE, State.ERASED, State.DEAD], [8, 3, 1])[0]
        epoch, version, horizon = random.randint(1, 3), random.randint(1, 9), base + random.randint(0, 5000)
        user = user_of(random.randint(0, 3)) if state is State.LIVE else b""
        return Row(handle_of(number), state, epoch, version, horizon, user, b"x" if state is State.LIVE else b"")

    async def play() -> None:
        sent: dict[bytes, list[tuple[Row, Answer]]] = {}

        async def client(backend: RedisBackend) -> None:
            for _ in range(25):
                rows = [some_row(number) for number in random.sample(range(30), 20)]
                for row, answer in zip(rows, await backend.write(rows), strict=True):
                    sent.setdefault(row.handle, []).append((row, answer))
                await backend.sessions_of(user_of(random.randint(0, 3)))

        async with opened(redis_server.url) as one, opened(redis_server.url) as two:
            await asyncio.gather(client(one), client(two), client(one), client(two))
            for handle, history in sent.items():
                for row, answer in history:
                    assert answer.applied == wins(row, answer.before)
                final = await stored(one, handle)
                links = [(answer.before, row.mark) for row, answer in history if answer.applied]
                assert follows(links, final.mark)
                assert final.horizon == max(row.horizon for row, _ in history)
            assert await unlisted(one, redis_server) == []

    async def stored(backend: RedisBackend, handle: bytes) -> Row:
        async with backend._client.question():
            (value,) = await backend._client.ask(("GET", row_key(handle)))
        row = backend._row(handle, value)
        assert row is not None
        return row

    asyncio.run(play())


def follows(links: list[tuple[Mark | None, Mark]], final: Mark) -> bool:
    """Whether these changes, each once, lead from nothing to the final mark: every mark is left as often as reached."""
    balance: dict[Mark | None, int] = {}
    for before, after in links:
        balance[before] = balance.get(before, 0) - 1
        balance[after] = balance.get(after, 0) + 1
    balance[None] = balance.get(None, 0) + 1
    balance[final] = balance.get(final, 0) - 1
    return not any(balance.values())


def test_a_row_of_no_known_state_stops_no_batch(redis_server: RedisServer) -> None:
    """It counts as ERASED, and whatever is newer replaces it."""

    async def play() -> None:
        async with opened(redis_server.url) as backend:
            await backend.write([live(n, now() + HOUR) for n in (1, 2)])
            with looking(redis_server) as client:
                client.setrange(row_key(handle_of(1)), 0, b"\x07")
            news = [live(n, now() + HOUR, version=9) for n in (1, 2)]
            marks = [live(n, 0).mark._replace(state=state) for n, state in ((1, State.ERASED), (2, State.LIVE))]
            assert await backend.write(news) == [Answer(True, mark) for mark in marks]
            assert [(await backend.load(new.handle)) is not None for new in news] == [True, True]

    asyncio.run(play())


def test_cancelled_questions_leave_no_answers_to_others(redis_server: RedisServer) -> None:
    """A connection whose question was given up in the midst is not used again."""
    random = rng("redis cancel")

    async def play() -> None:
        async with opened(redis_server.url, max_connections=2) as backend:
            rows = [live(i, now() + HOUR, body=bytes([i]) * 5000) for i in range(50)]
            await backend.write(rows)
            for _ in range(60):
                tasks = [asyncio.ensure_future(backend.load(row.handle)) for row in rows[:8]]
                for _ in range(random.randint(0, 12)):
                    await asyncio.sleep(0)
                for task in random.sample(tasks, 4):
                    task.cancel()
                answers = await asyncio.gather(*tasks, return_exceptions=True)
                for row, answer in zip(rows, answers, strict=False):
                    assert isinstance(answer, asyncio.CancelledError) or answer == row
            assert [await backend.load(row.handle) for row in rows] == rows

    asyncio.run(play())


def test_many_questions_wait_for_a_few_connections(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url, max_connections=3) as backend:
            row = live(1, now() + HOUR)
            await backend.write([row])
            assert await asyncio.gather(*(backend.load(row.handle) for _ in range(200))) == [row] * 200
            with looking(redis_server) as client:
                assert len(list(client.client_list())) <= 4

    asyncio.run(play())


# ── other keys in the same database ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("prefix", ["shop", "a*", "[ab]", "a?", "a\\", "a[^b]-{x}", "*"])
def test_a_prefix_is_no_pattern_and_nobody_elses_keys_are_touched(redis_server: RedisServer, prefix: str) -> None:
    neighbours = ["ab", "a", "b", "shop2", "shop:row", "axx", "a\\\\", "a*b"]

    async def play() -> None:
        async with opened(redis_server.url, prefix=prefix) as backend:
            with looking(redis_server) as client:
                for other in [*neighbours, ""]:
                    for key in (f"{other}:row:{handle_of(9).hex()}", f"{other}:user:{user_of(9).hex()}"):
                        client.set(key, "theirs")
                for key in (f"{prefix}:row:short", f"{prefix}:row:{'x' * 40}", f"{prefix}:other", "free"):
                    client.set(key, "theirs")
                channel: Any = subscribed(client)
                channel.subscribe(f"{prefix}:row:{handle_of(1).hex()}")
                theirs: Any = client.keys()
                await backend.initialize()
                await backend.write([live(i, now() + HOUR, user=user_of(1)) for i in range(5)])
                assert await handles_in(backend) == sorted(map(handle_of, range(5)))
                assert (await backend.count(), await backend.clear(), await backend.count()) == (5, 5, 0)
                await backend.sweep(now() + 2 * HOUR, 1000)
                assert all(client.get(key) == b"theirs" for key in theirs)
                assert [message["type"] for message in (channel.get_message(timeout=1),)] == ["subscribe"]
                assert channel.get_message() is None
                channel.close()

    asyncio.run(play())


def test_two_prefixes_in_one_database_know_nothing_of_each_other(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as one, opened(f"{redis_server.url}&prefix=two") as two:
            assert two.prefix == "two"
            row = live(1, now() + HOUR, user=user_of(1))
            await one.write([row])
            assert (await two.load(row.handle), await two.count(), await two.sessions_of(row.user)) == (None, 0, [])
            assert await two.clear() == 0
            assert await one.load(row.handle) == row

    asyncio.run(play())


def test_clear_spares_the_sentinel_and_makes_all_others_dead_until_their_horizon(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as backend:
            sentinel = Row(SENTINEL, State.LIVE, 7, 1, FOREVER, body=b"whose")
            horizon = now() + HOUR
            rows = [live(i, horizon + i, user=user_of(i % 3)) for i in range(1200)]
            await backend.write([sentinel, *rows, erased(2000, horizon), dead(2001, horizon)])
            assert await backend.clear() == 1200
            assert await backend.clear() == 0
            assert await backend.load(SENTINEL) == sentinel
            with looking(redis_server) as client:
                for row in rows[:5]:
                    found = await backend.load(row.handle)
                    assert found is not None
                    assert (found.mark, found.horizon, found.body) == (
                        row.mark._replace(state=State.DEAD),
                        row.horizon,
                        b"",
                    )
                    assert client.pexpiretime(row_key(row.handle)) == row.horizon
                assert client.keys("shmsession:user:*") == []
            (answer,) = await backend.write([live(2000, horizon, version=99)])
            assert answer == Answer(False, Mark(State.DEAD, 1, 1))

    asyncio.run(play())


# ── a server that dies, stops or forgets ──────────────────────────────────────────────────────────────────────


@pytest.mark.soak
def test_every_answered_row_survives_a_kill_in_the_midst_of_batches(durable_redis: RedisServer) -> None:
    """With `appendfsync always`, and whatever was on its way. No row is LIVE and unlisted afterwards."""
    kills, random = size(full=50, suite=3), rng("redis kill")
    sent, answered = 0, 0

    async def write_until_it_dies(backend: RedisBackend, known: dict[bytes, Row], enough: int) -> int:
        """Returns how many rows were sent; those answered are known."""
        batches = 0
        while True:
            numbers = random.sample(range(1000), 100)
            rows = []
            for number in numbers:
                before = known.get(handle_of(number))
                version = before.version + random.randint(0, 2) if before else 1
                rows.append(live(number, now() + HOUR, version=version, user=user_of(number % 7), body=os.urandom(200)))
            batches += 1
            if batches == enough:
                asyncio.get_running_loop().call_later(random.random() / 200, os.kill, durable_redis.pid, signal.SIGKILL)
            try:
                answers = await backend.write(rows)
            except BackendUnavailable:
                return batches * 100
            for row, answer in zip(rows, answers, strict=True):
                if answer.applied:
                    known[row.handle] = row

    async def play() -> None:
        nonlocal sent, answered
        known: dict[bytes, Row] = {}
        async with opened(durable_redis.url) as backend:
            for _ in range(kills):
                sent += await write_until_it_dies(backend, known, random.randint(2, 6))
                durable_redis.restart()
                for handle, row in known.items():
                    found = await backend.load(handle)
                    assert found is not None
                    assert (found.mark, found.body) == (row.mark, row.body) or found.version > row.version
                answered = len(known)
                assert await unlisted(backend, durable_redis) == []
                known.update({h: r for h in known if (r := await backend.load(h)) is not None})

    asyncio.run(play())
    report("G5 redis kill -9", kills=kills, rows_sent=sent, handles_answered=answered, lost=0)


def test_a_server_that_was_restarted_is_asked_again_at_once(durable_redis: RedisServer) -> None:
    """A connection that died while idle is noticed before it is used, and scripts that are forgotten are sent again."""

    async def play() -> None:
        async with opened(durable_redis.url) as backend:
            row = live(1, now() + HOUR, user=user_of(1))
            await backend.write([row])
            for _ in range(3):
                durable_redis.restart()
                assert await backend.load(row.handle) == row
            durable_redis.restart()
            assert (await backend.write([row]))[0].before == row.mark
            durable_redis.forget()
            assert await backend.load(row.handle) is None
            assert await backend.write([row]) == [Answer(True, None)]

    asyncio.run(play())


def test_scripts_that_the_server_forgets_at_any_time_are_sent_again(redis_server: RedisServer) -> None:
    async def play() -> None:
        flushes, flushed = 0, asyncio.Event()

        async def flush() -> None:
            nonlocal flushes
            while True:
                await asyncio.to_thread(redis_server.ask, "SCRIPT", "FLUSH")
                flushes += 1
                flushed.set()

        async with opened(redis_server.url) as backend:
            flusher = asyncio.ensure_future(flush())
            for version in range(1, 41):
                rows = [live(i, now() + HOUR, version=version, user=user_of(i)) for i in range(60)]
                await flushed.wait()
                flushed.clear()
                answers = await backend.write(rows)
                assert [answer.before and answer.before.version for answer in answers] == [version - 1 or None] * 60
            flusher.cancel()
            await asyncio.gather(flusher, return_exceptions=True)
            assert flushes > 20
            redis_server.ask("SCRIPT", "FLUSH")
            assert await backend.clear() == 60

    asyncio.run(play())


def test_a_stopped_server_is_unavailable_in_time_and_used_again_when_it_goes_on(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url, timeout=SHORT) as backend:
            row = live(1, now() + HOUR, user=user_of(1))
            await backend.write([row])
            redis_server.freeze()
            questions: list[Callable[[], Awaitable[Any]]] = [
                lambda: backend.load(row.handle), lambda: backend.write([row]), lambda: backend.sessions_of(row.user),
                backend.count, backend.clear, backend.initialize, lambda: backend.sweep(now(), 10),
            ]  # fmt: skip
            for ask in questions:
                started = time.monotonic()
                with pytest.raises(BackendUnavailable, match="did not answer"):
                    await ask()
                assert time.monotonic() - started < SHORT + 5  # redis-py's own patience is ten times five seconds
            redis_server.thaw()
            assert await backend.load(row.handle) == row
            assert (await backend.write([row]))[0] == Answer(False, row.mark)

    asyncio.run(play())


def test_waiting_for_a_connection_is_part_of_the_time(redis_server: RedisServer) -> None:
    """Forty that come at once to a stopped server over one connection do not wait for each other to give up."""

    async def play() -> None:
        async with opened(redis_server.url, timeout=SHORT, max_connections=1) as backend:
            await backend.load(handle_of(1))
            redis_server.freeze()
            started = time.monotonic()
            answers = await asyncio.gather(*(backend.load(handle_of(1)) for _ in range(40)), return_exceptions=True)
            assert time.monotonic() - started < 20 * SHORT
            assert {type(answer) for answer in answers} == {BackendUnavailable}
            redis_server.thaw()
            assert await backend.load(handle_of(1)) is None

    asyncio.run(play())


def test_a_question_is_asked_twice_at_most(redis_server: RedisServer) -> None:
    """Once more, for the connection may have died unnoticed; redis-py would try for four seconds."""

    async def play() -> None:
        async with Proxy(redis_server.socket) as proxy, opened(proxy.url) as backend:
            proxy.harm = "drops the answer"
            for asked in range(1, 4):
                with pytest.raises(BackendUnavailable):
                    await backend.load(handle_of(1))
                assert proxy.connections == 2 * asked

    asyncio.run(play())


def test_nobody_there_is_unavailable_and_says_where(redis_server: RedisServer) -> None:
    async def play() -> None:
        for url in ("redis://127.0.0.1:1/0", "rediss://127.0.0.1:1/0", f"unix://{redis_server.place}/nothing?db=0"):
            async with opened(url) as backend:
                with pytest.raises(BackendUnavailable, match="did not answer") as caught:
                    await backend.load(handle_of(1))
                assert backend.name == url
                assert url in str(caught.value)

    asyncio.run(play())


@pytest.mark.parametrize("harm", HARMS)
def test_a_lost_connection_is_unavailable_and_what_is_sent_again_obeys_the_rule(
    redis_server: RedisServer, harm: str
) -> None:
    """Whatever of it arrived the first time: nothing is lost, doubled or revived."""

    async def play() -> None:
        horizon = now() + HOUR
        async with (
            opened(redis_server.url) as direct,
            Proxy(redis_server.socket) as proxy,
            opened(proxy.url, timeout=SHORT) as backend,
        ):
            await backend.initialize()
            for step in range(3):
                first = [live(i, horizon, version=2, user=user_of(i % 3), body=b"first") for i in range(30)]
                await direct.write([*first, dead(100, horizon)])
                rows = [row._replace(version=3, body=b"second") for row in first]
                rows[5:10] = [dead(i, horizon) for i in range(5, 10)]
                rows[10:15] = [row._replace(version=1) for row in rows[10:15]]
                rows.append(live(100, horizon, version=99))
                proxy.harm, proxy.from_request = harm, step
                await until_it_fails(backend, rows)
                with pytest.raises(BackendUnavailable):
                    await backend.load(first[0].handle)
                proxy.harm = ""
                await backend.write(rows)
                expected = [row if wins(row, old.mark) else old for row, old in zip(rows, first, strict=False)]
                assert [await direct.load(row.handle) for row in first] == expected
                revived = await direct.load(handle_of(100))
                assert revived is not None
                assert revived.state is State.DEAD
                assert await unlisted(direct, redis_server) == []
                redis_server.empty()

    asyncio.run(play())


async def until_it_fails(backend: RedisBackend, rows: list[Row]) -> None:
    with contextlib.suppress(BackendUnavailable):
        while True:
            await backend.write(rows)


def test_after_a_failover_the_next_question_goes_to_the_new_primary() -> None:
    async def play(old: RedisServer, new: RedisServer) -> None:
        async with Proxy(old.socket) as proxy, opened(proxy.url) as backend:
            row = live(1, now() + HOUR)
            await backend.write([row])
            old.ask("REPLICAOF", "127.0.0.1", "1")
            proxy.target = new.socket
            newer = row._replace(version=2)
            with pytest.raises(BackendUnavailable, match="read-only replica: the URL must name the primary"):
                await backend.write([newer])
            assert await backend.write([newer]) == [Answer(True, None)]

    with RedisServer() as old, RedisServer() as new:
        asyncio.run(play(old, new))


# ── a server that says no ─────────────────────────────────────────────────────────────────────────────────────


def test_a_replica_is_unavailable_for_writes_and_answers_reads_while_it_may() -> None:
    async def play(server: RedisServer) -> None:
        async with opened(server.url) as backend:
            row = live(1, now() + HOUR, user=user_of(1))
            await backend.write([row])
            server.ask("REPLICAOF", "127.0.0.1", "1")
            newer, end = row._replace(version=2), dead(1, FOREVER)
            for ask in (lambda: backend.write([newer]), lambda: backend.write([end]), backend.clear):
                with pytest.raises(BackendUnavailable, match="read-only replica"):
                    await ask()
            assert await backend.load(row.handle) == row
            server.ask("CONFIG", "SET", "replica-serve-stale-data", "no")
            with pytest.raises(BackendUnavailable, match="lost its primary"):
                await backend.load(row.handle)
            server.ask("REPLICAOF", "NO", "ONE")
            assert await backend.load(row.handle) == row

    with RedisServer() as server:
        asyncio.run(play(server))


def test_a_full_server_is_an_error_with_advice_and_loses_nothing() -> None:
    async def play(server: RedisServer) -> None:
        async with opened(server.url) as backend:
            row = live(1, now() + HOUR, user=user_of(1))
            await backend.write([row])
            server.ask("CONFIG", "SET", "maxmemory", "1")
            for rows in ([row._replace(version=2)], [live(2, now() + HOUR, user=user_of(2))], [dead(1, FOREVER)]):
                with pytest.raises(BackendError, match=r"reached maxmemory.*noeviction") as caught:
                    await backend.write(rows)
                assert not isinstance(caught.value, BackendUnavailable)
            assert await backend.load(row.handle) == row
            assert await backend.sessions_of(row.user) == [row]
            server.ask("CONFIG", "SET", "maxmemory", "0")
            assert (await backend.write([dead(1, FOREVER)]))[0].applied

    with RedisServer() as server:
        asyncio.run(play(server))


def test_a_busy_server_is_unavailable() -> None:
    async def play(server: RedisServer) -> None:
        async with opened(server.url) as backend:
            await backend.load(handle_of(1))
            server.ask("CONFIG", "SET", "lua-time-limit", "10")
            endless = await asyncio.create_subprocess_exec(
                shutil.which("redis-cli") or "redis-cli", "-s", server.socket, "EVAL", "while true do end", "0",
                stdout=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
            try:
                async with asyncio.timeout(PATIENCE):
                    while True:
                        try:
                            await backend.load(handle_of(1))
                        except BackendUnavailable as error:
                            assert "busy with a slow script: SCRIPT KILL" in str(error)  # noqa: PT017
                            break
            finally:
                server.ask("SCRIPT", "KILL")
                await endless.wait()
            assert await backend.load(handle_of(1)) is None

    with RedisServer() as server:
        asyncio.run(play(server))


@pytest.mark.parametrize(
    ("text", "unavailable", "advice"),
    [
        ("LOADING Redis is loading the dataset in memory", True, "still reading its data"),
        ("BUSY Redis is busy running a script.", True, "SCRIPT KILL"),
        ("MASTERDOWN Link with MASTER is down", True, "lost its primary"),
        ("CLUSTERDOWN Hash slot not served", True, "cluster is down"),
        ("TRYAGAIN Multiple keys request during rehashing of slot", True, "moving keys"),
        ("NOREPLICAS Not enough good replicas to write.", True, "min-replicas-to-write"),
        ("ERR max number of clients reached", True, "did not answer: max number of clients reached"),
        ("MISCONF Redis is configured to save RDB snapshots, but it cannot", False, "cannot write to its disk"),
        ("NOAUTH Authentication required.", False, "refuses the credentials"),
        ("WRONGPASS invalid username-password pair or user is disabled.", False, "refuses the credentials"),
        ("NOPERM this user has no permissions to run the 'get' command", False, "shmsession:\\*, and @read"),
        ("MOVED 3999 127.0.0.1:6381", False, "node of a cluster"),
        ("CROSSSLOT Keys in request don't hash to the same slot", False, "node of a cluster"),
        ("WRONGTYPE Operation against a key holding the wrong kind of value", False, "choose another prefix="),
        (
            "ERR Error running script (call to f_1): @user_script:3: -OOM command not",
            False,
            "reached maxmemory",
        ),
        (
            "ERR Error running script (call to f_1): @user_script:3: -READONLY You",
            True,
            "read-only replica",
        ),
        ("ERR something new", False, "answered with an error: .*something new"),
    ],
)
def test_what_the_server_refuses_is_explained(text: str, unavailable: bool, advice: str) -> None:
    """And is unavailability only where it passes by itself."""

    async def play() -> None:
        async with failing_with(text) as url, opened(url) as backend:
            for ask in (lambda: backend.load(handle_of(1)), lambda: backend.write([live(1, FOREVER)])):
                with pytest.raises(BackendError, match=advice) as caught:
                    await ask()
                assert isinstance(caught.value, BackendUnavailable) == unavailable

    asyncio.run(play())


def test_what_is_not_ours_under_our_keys_is_an_error_and_stays(redis_server: RedisServer) -> None:
    async def play() -> None:
        horizon = now() + HOUR
        async with opened(redis_server.url) as backend:
            with looking(redis_server) as client:
                client.lpush(row_key(handle_of(50)), "a list")
                client.set(row_key(handle_of(51)), "short")
                client.set(row_key(handle_of(52)), b"\x09" * 40)
                client.set(user_key(user_of(1)), "no set")
                for number in (50, 51, 52):
                    with pytest.raises(BackendError, match="another prefix=") as caught:
                        await backend.load(handle_of(number))
                    assert not isinstance(caught.value, BackendUnavailable)
                with pytest.raises(BackendError, match="another prefix="):
                    await backend.write([live(2, horizon, user=user_of(1))])
                assert await backend.load(handle_of(2)) is None
                with pytest.raises(BackendError, match="another prefix="):
                    await backend.sessions_of(user_of(1))
                rows = [live(i, horizon) for i in range(100)]
                with pytest.raises(BackendError):
                    await backend.write(rows)
                assert client.lrange(row_key(handle_of(50)), 0, -1) == [b"a list"]
                assert client.get(row_key(handle_of(51))) == b"short"
                client.delete(*(row_key(handle_of(number)) for number in (50, 51, 52)))
                answers = await backend.write(rows)
                stored = {row.handle for row, answer in zip(rows, answers, strict=True) if not answer.applied}
                assert {handle_of(i) for i in (0, 49, 53, 99)} <= stored
                assert [await backend.load(row.handle) for row in rows] == rows

    asyncio.run(play())


def test_rows_that_others_change_all_the_while_are_given_up(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as backend:
            await backend.write([erased(1, now() + 2 * HOUR)])
            row = live(1, now() + HOUR, version=2, user=user_of(1))
            monkeypatch.setattr(module, "ATTEMPTS", 1)
            with pytest.raises(BackendUnavailable, match="others changed the same rows"):
                await backend.write([row])
            monkeypatch.setattr(module, "ATTEMPTS", 2)
            assert (await backend.write([row]))[0].applied

    asyncio.run(play())


# ── schema, settings and their documentation ──────────────────────────────────────────────────────────────────


def test_the_schema_is_noted_once_and_another_one_is_refused(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as one, opened(redis_server.url) as two:
            await asyncio.gather(one.initialize(), two.initialize())
            with looking(redis_server) as client:
                assert client.get("shmsession:schema") == b"%d" % module.SCHEMA
                assert client.ttl("shmsession:schema") == -1
                for version, says in ((module.SCHEMA + 1, "upgrade shmsession"), (module.SCHEMA - 1, "by prefix=")):
                    client.set("shmsession:schema", version)
                    with pytest.raises(BackendError, match=f"have schema {version}, .*{says}"):
                        await one.initialize()
                    assert client.get("shmsession:schema") == b"%d" % version
                client.set("shmsession:schema", "another program's")
                with pytest.raises(BackendError, match="not ours: choose another prefix="):
                    await one.initialize()

    asyncio.run(play())


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ((), ["keeps nothing on disk"]),
        (("--save", "60 1"), []),
        (RedisServer.DURABLE, []),
        ((*RedisServer.DURABLE, "--maxmemory-policy", "allkeys-lru"), ["maxmemory-policy is allkeys-lru"]),
        (("--maxmemory-policy", "volatile-ttl"), ["maxmemory-policy is volatile-ttl", "keeps nothing on disk"]),
        (("--rename-command", "CONFIG", ""), []),
        (("--rename-command", "CONFIG", "", "--maxmemory-policy", "allkeys-random"), ["is allkeys-random"]),
        (("--rename-command", "CONFIG", "", "--rename-command", "INFO", ""), []),
    ],
)
def test_settings_under_which_the_server_forgets_are_warned_of(
    options: tuple[str, ...], warned: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def play(server: RedisServer) -> None:
        async with opened(server.url) as backend:
            await backend.initialize()

    with RedisServer(*options) as server, caplog.at_level(logging.WARNING, "shmsession"):
        asyncio.run(play(server))
    assert len(caplog.messages) == len(warned)
    assert all(part in message for part, message in zip(warned, caplog.messages, strict=True))


def test_a_server_has_one_history_whatever_it_is_called() -> None:
    """Workers with different URLs would each take the other's for a failover."""

    async def play(url: str) -> bytes:
        async with opened(url) as backend:
            return await backend.history()

    port = free_port()
    with RedisServer("--port", str(port)) as server:
        urls = (server.url, f"redis://127.0.0.1:{port}/0", f"redis://localhost:{port}/0")
        assert len({asyncio.run(play(url)) for url in urls}) == 1


def test_its_history_is_another_after_a_restart_and_a_replica_has_none(durable_redis: RedisServer) -> None:
    async def play() -> None:
        async with opened(durable_redis.url) as backend:
            first = await backend.history()
            await backend.write([live(1, now() + HOUR)])
            assert await backend.history() == first != b""
            durable_redis.restart()
            assert await backend.history() not in (first, b"")
            assert durable_redis.ask("REPLICAOF", "127.0.0.1", "1").startswith(b"+OK")
            with pytest.raises(BackendUnavailable, match="the URL must name the primary"):
                await backend.history()
            assert durable_redis.ask("REPLICAOF", "NO", "ONE").startswith(b"+OK")

    asyncio.run(play())


def test_the_permissions_that_the_documentation_and_the_advice_name_are_enough(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def play(server: RedisServer) -> None:
        block, _ = blocks(PAGE, "text")  # the other one is for clusters
        assert server.ask(*block.text.split()).startswith(b"+OK")
        async with opened(f"unix://shop:secret@{server.socket}") as backend:
            await backend.initialize()
            row = live(1, now() + HOUR, user=user_of(1))
            assert await backend.write([row]) == [Answer(True, None)]
            assert await backend.sessions_of(row.user) == [row]
            assert (await backend.count(), await backend.sweep(now(), 10), await backend.clear()) == (1, 0, 1)
            assert await backend.history() != b""
            assert server.ask("ACL", "SETUSER", "shop", "-info").startswith(b"+OK")
            assert await backend.history() == b"", "it cannot be told"
        async with opened(f"unix://shop:secret@{server.socket}", prefix="else") as backend:
            with pytest.raises(BackendError, match=r"else:\*, and @read, @write, @scripting, INFO and TIME"):
                await backend.load(handle_of(1))

    with RedisServer() as server:
        asyncio.run(play(server))
    assert not caplog.messages


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols_will_do(redis_server: RedisServer, protocol: int) -> None:
    async def play() -> None:
        async with opened(redis_server.url, protocol=protocol) as backend:
            await backend.initialize()
            row = live(1, now() + HOUR, user=user_of(1))
            assert await backend.write([row, dead(2, row.horizon)]) == [Answer(True, None)] * 2
            assert await backend.load(row.handle) == row
            assert await backend.sessions_of(row.user) == [row]
            assert await handles_in(backend) == [row.handle]
            assert (await backend.sweep(now(), 10), await backend.clear(), await backend.count()) == (0, 1, 0)

    asyncio.run(play())


def test_a_server_that_knows_only_the_old_protocol_will_do() -> None:
    """Servers before version 6 have no HELLO: unless asked to, nobody says it."""

    async def play(server: RedisServer) -> None:
        async with opened(server.url) as backend:
            assert await backend.write([live(1, now() + HOUR)]) == [Answer(True, None)]

    with RedisServer("--rename-command", "HELLO", "") as server:
        asyncio.run(play(server))


def test_tls_is_spoken_and_a_stranger_is_refused(tmp_path: Path) -> None:
    """One whom nobody trusts, and one who is trusted under another name."""
    certificate = self_signed(tmp_path)
    options = ["--tls-cert-file", f"{certificate}", "--tls-key-file", f"{tmp_path}/key", "--tls-auth-clients", "no"]

    async def play(port: int) -> None:
        url = f"rediss://:pass@localhost:{port}/0"
        async with opened(url, ssl_ca_certs=str(certificate)) as backend:
            row = live(1, now() + HOUR)
            assert await backend.write([row]) == [Answer(True, None)]
            assert backend.name == f"rediss://localhost:{port}/0"
        async with opened(f"{url}?ssl_ca_certs={certificate}") as backend:
            assert await backend.load(row.handle) == row
        for stranger in (url, f"{url}?ssl_ca_certs={certificate}".replace("localhost", "127.0.0.1")):
            async with opened(stranger) as backend:
                with pytest.raises(BackendUnavailable, match="certificate"):
                    await backend.load(row.handle)

    port = free_port()
    ca = ["--tls-ca-cert-file", str(certificate), "--requirepass", "pass"]
    with RedisServer("--tls-port", str(port), *options, *ca):
        asyncio.run(play(port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# ── the URL, and its secrets ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis://host", "redis://host:6379/0"),
        ("redis://", "redis://localhost:6379/0"),
        ("redis://ada:hunter2@host:7000/3", "redis://host:7000/3"),
        ("REDISS://:hunter2@[::1]/2?ssl_cert_reqs=none", "rediss://[::1]:6379/2"),
        ("unix://ada:hunter2@/run/redis.sock?db=4", "unix:///run/redis.sock?db=4"),
        ("unix:///run/redis.sock?password=hunter2", "unix:///run/redis.sock?db=0"),
    ],
)
def test_the_name_says_where_and_no_secret(url: str, name: str) -> None:
    backend = RedisBackend(url)
    assert backend.name == name
    assert SECRET not in repr(backend)
    assert backend.remote
    assert backend.expires


def test_prefix_and_timeout_may_stand_in_the_url() -> None:
    backend = RedisBackend("redis://host?prefix=shop&timeout=2.5", timeout=9)
    assert (backend.prefix, backend.timeout) == ("shop", 2.5)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2/x@host", "redis://:hunter2#x@host", "redis://:hunter2@host:hunter2", "http://:hunter2@host", "redis://:hunter2@host?max_connections=0",
        "redis://:hunter2@host?prefix=a%20b", "redis://:hunter2@host?timeout=0", "redis://:hunter2@host?timeout=soon",
        "redis://:hunter2@host?colour=blue", "redis://:hunter2@host?protocol=4",
        "redis://:hunter2@host?prefix=" + "x" * 101,
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once_and_quotes_no_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisBackend(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_documented_options_are_those_there_are() -> None:
    parameters = inspect.signature(RedisBackend).parameters
    expected = {name: str(parameters[name].default) for name in ("prefix", "timeout")}
    table = {code(row[0])[0]: code(row[1])[0] for row in rows(marked(PAGE, "redis options"))}
    assert table == {**expected, "max_connections": str(module.CONNECTIONS)}
    backend = RedisBackend("rediss://host?prefix=shop&timeout=2.5&max_connections=3", ssl_ca_certs=None)
    client: Any = backend._client
    assert client._max == 3


def test_the_documented_commands_are_those_that_are_used(redis_server: RedisServer) -> None:
    """As the server itself counts them, inside of scripts too."""

    async def play() -> None:
        redis_server.ask("CONFIG", "RESETSTAT")
        async with opened(redis_server.url) as backend:
            await backend.initialize()
            row = live(1, now() + HOUR, user=user_of(1))
            await backend.write([row, live(2, FOREVER)])
            await backend.write([row._replace(version=0, horizon=FOREVER)])
            await backend.sessions_of(row.user)
            await backend.write([dead(1, row.horizon)])
            await backend.write([live(3, row.horizon, user=row.user)])
            await backend.sweep(now(), 1000)
            await backend.load(row.handle)
            await backend.clear()
            await backend.count()

    asyncio.run(play())
    with looking(redis_server) as client:
        stats: Any = client.info("commandstats")
    used = {name.removeprefix("cmdstat_").replace("|", " ").upper() for name in stats}
    (line,) = [part for part in PAGE.read_text().split("\n\n") if part.startswith("The commands used are")]
    connecting = {"CLIENT SETINFO", "CONFIG RESETSTAT", "CONFIG GET", "SELECT", "HELLO"}
    assert used - connecting == {name for name in code(line) if name.isupper() or " " in name}


def test_what_the_url_says_is_not_changed_by_an_option() -> None:
    """Whoever runs the application can say by variable what its code says otherwise."""
    backend = RedisBackend(
        "redis://host:7000/3?max_connections=3&client_name=shop&prefix=shop", max_connections=5, client_name="code",
        prefix="code", db=9, port=1, health_check_interval=7,
    )  # fmt: skip
    client: Any = backend._client
    options = client._options
    assert (client._max, options["client_name"], backend.prefix) == (3, "shop", "shop")
    assert (options["db"], options["port"], options["health_check_interval"]) == (3, 7000, 7)


def test_an_option_that_nobody_knows_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="colour"):
        RedisBackend("redis://host", colour="blue")
    with pytest.raises(ConfigError, match="prefix="):
        RedisBackend("redis://host", prefix="")


def test_a_refused_password_is_in_no_message() -> None:
    async def play(server: RedisServer) -> None:
        for url in (f"unix://ada:{SECRET}@{server.socket}", f"unix://:{SECRET}@{server.socket}"):
            for protocol in (2, 3):
                async with opened(url, protocol=protocol) as backend:
                    with pytest.raises(BackendError, match="refuses the credentials") as caught:
                        await backend.load(handle_of(1))
                    assert not isinstance(caught.value, BackendUnavailable)
                    assert SECRET not in "".join(traceback.format_exception(caught.value))

    with RedisServer("--requirepass", "another") as server:
        asyncio.run(play(server))


def test_a_server_that_quotes_what_it_was_sent_is_not_quoted() -> None:
    """As those before version 6 do with HELLO, whose arguments hold the password."""
    text = f"ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `ada`, `{SECRET}`, "

    async def play() -> None:
        async with (
            failing_with(text) as url,
            opened(url.replace("unix://", f"unix://ada:{SECRET}@"), protocol=3) as backend,
        ):
            with pytest.raises(BackendError, match="unknown command `HELLO`") as caught:
                await backend.load(handle_of(1))
            assert SECRET not in "".join(traceback.format_exception(caught.value))

    asyncio.run(play())


def test_errors_do_not_show_what_sessions_hold(redis_server: RedisServer) -> None:
    async def play() -> None:
        async with opened(redis_server.url) as backend:
            with looking(redis_server) as client:
                client.lpush(row_key(handle_of(1)), "a list")
            with pytest.raises(BackendError) as caught:
                await backend.write([live(1, FOREVER, body=SECRET.encode())])
            assert SECRET not in "".join(traceback.format_exception(caught.value))

    asyncio.run(play())


def test_what_is_not_open_is_unavailable_and_closing_it_does_nothing(redis_server: RedisServer) -> None:
    async def play() -> None:
        backend = RedisBackend(redis_server.url)
        await backend.close()
        with pytest.raises(BackendUnavailable, match="open"):
            await backend.load(handle_of(1))
        await backend.open()
        await backend.open()
        assert await backend.load(handle_of(1)) is None
        await backend.close()
        await backend.close()
        for ask in (lambda: backend.write([live(1, FOREVER)]), backend.initialize, backend.count):
            with pytest.raises(BackendUnavailable, match="open"):
                await ask()
        with looking(redis_server) as client:
            assert len(list(client.client_list())) == 1

    asyncio.run(play())
