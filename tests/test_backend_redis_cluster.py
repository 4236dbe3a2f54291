"""RedisBackend keeps the contract of `Backend` on a Redis Cluster, whatever becomes of its nodes and slots."""

import asyncio
import contextlib
import logging
import os
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import RedisCluster as Looking

from shmsession.backends import FOREVER, SENTINEL, Answer, Row, State
from shmsession.backends import redis_cluster as module
from shmsession.backends.redis import RedisBackend
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing import BackendContract
from shmsession.testing.rows import dead, erased, handle_of, handles_in, live, user_of
from tests.databases import RedisServer
from tests.documents import blocks
from tests.figures import rng
from tests.redis_clusters import ClusterNode, RedisCluster, free_ports, slot_of
from tests.servers import PATIENCE, wait_for
from tests.test_backend_redis import HOUR, PAGE, SECRET, SHORT, now, opened, row_key, user_key
from tests.tls import self_signed

pytest_plugins = ["tests.database_hosts"]

TAG = "{x}"
"""A prefix that puts all keys into one slot, for tests that move it."""
SLOT = slot_of(TAG)


class TestRedisClusterContract(BackendContract):
    @pytest.fixture(autouse=True)
    def _on(self, redis_cluster: RedisCluster) -> None:
        self.url = redis_cluster.url

    def backend(self) -> RedisBackend:
        return RedisBackend(self.url)


def test_its_history_is_another_whenever_a_master_is_and_never_an_old_one_again(redis_cluster: RedisCluster) -> None:
    """Slots that move between them are no such matter."""

    async def told(backend: RedisBackend) -> bytes:
        deadline = asyncio.get_running_loop().time() + PATIENCE
        while True:
            try:
                return await backend.history()
            except BackendUnavailable:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0)

    async def play() -> None:
        async with opened(redis_cluster.url) as backend:
            seen = [await told(backend)]
            await backend.write([live(n, now() + HOUR) for n in range(30)])
            one, other, *_ = redis_cluster.masters
            moved = min(one.slots)
            for target in (other, one):
                redis_cluster.move(moved, target)
                assert await told(backend) == seen[0]
            master, replica = one, redis_cluster.replica(one)
            for promoted in (replica, master):
                redis_cluster.promote(promoted)
                seen.append(await told(backend))
            redis_cluster.masters[0].restart()
            redis_cluster.revive()
            seen.append(await told(backend))
            assert len(set(seen)) == 4
            async with opened(redis_cluster.url) as second:
                assert await told(second) == seen[-1], "whoever asks"

    asyncio.run(play())


@contextlib.contextmanager
def looking(cluster: RedisCluster) -> Iterator["Looking"]:
    """redis-py's own client, which looks at the keys."""
    client = Looking(host="127.0.0.1", port=cluster.masters[0].port)
    try:
        yield client
    finally:
        client.close()


async def unlisted(backend: RedisBackend, cluster: RedisCluster) -> list[Row]:
    """The LIVE rows that a user's set does not list until their horizon: there must be none, ever."""
    found = []
    with looking(cluster) as client:
        async for handle in backend.handles():
            row = await backend.load(handle)
            if row is None or row.state is not State.LIVE or not row.user:
                continue
            key = user_key(user=row.user).replace("shmsession", backend.prefix, 1)
            score: Any = client.zscore(key, handle)
            lives: Any = client.pexpiretime(key)
            if score is None or score < row.horizon or 0 <= lives < row.horizon:
                found.append(row)
    return found


def tagged(handle: bytes) -> str:
    """The key of a row whose prefix is TAG."""
    return row_key(handle).replace("shmsession", TAG, 1)


def handle_at(node: ClusterNode) -> bytes:
    """A handle whose row is this master's."""
    slots = node.slots
    return next(h for h in map(handle_of, range(10_000)) if slot_of(row_key(h)) in slots)


def other_than(node: ClusterNode, cluster: RedisCluster) -> ClusterNode:
    return next(master for master in cluster.masters if master is not node)


async def until_answered(ask: Callable[[], Awaitable[Any]], seconds: float) -> Any:
    """Again and again, for as long as it is unavailable; each time it says so in time."""
    async with asyncio.timeout(PATIENCE):
        while True:
            started = time.monotonic()
            try:
                return await ask()
            except BackendUnavailable:
                assert time.monotonic() - started < seconds + 5
                await asyncio.sleep(0.01)


# ── slots that move ───────────────────────────────────────────────────────────────────────────────────────────


def test_rows_are_read_and_written_in_each_stage_of_a_move(redis_cluster: RedisCluster) -> None:
    """While the slot has begun to move, when half of it has gone, when all has, and when that is known to all."""
    horizon, user = now() + HOUR, user_of(1)
    source = redis_cluster.owner(TAG)
    target = other_than(source, redis_cluster)
    old = [live(n, horizon, user=user) for n in range(20)]

    async def play() -> None:
        async with opened(redis_cluster.url, prefix=TAG) as backend:
            await backend.write(old)
            stages: list[Callable[[], None]] = [
                lambda: None,
                lambda: redis_cluster.begin_move(SLOT, source, target),
                lambda: move(tagged(row.handle) for row in old[::2]),
                lambda: move(redis_cluster.keys()),
                lambda: redis_cluster.end_move(SLOT, target),
                lambda: redis_cluster.move(SLOT, source),
            ]
            rows = old
            for stage, step in enumerate(stages):
                step()
                new = [row._replace(version=2 + stage) for row in rows]
                news = [live(100 + stage, horizon, version=2 + stage, user=user), dead(200 + stage, horizon)]
                assert (
                    await backend.write([*new, *news])
                    == [*(Answer(True, row.mark) for row in rows)] + [Answer(True, None)] * 2
                )
                rows = [*new, news[0]]
                assert [await backend.load(row.handle) for row in rows] == rows
                assert sorted(await backend.sessions_of(user)) == sorted(rows)
                assert await handles_in(backend) == sorted(row.handle for row in rows)
                assert await backend.count() == len(rows)
                assert await backend.sweep(now(), 100) == 0
                assert await unlisted(backend, redis_cluster) == []

    def move(keys: Iterable[str]) -> None:
        for key in keys:
            source.tell("MIGRATE", "127.0.0.1", target.port, key, 0, 60_000)  # NOKEY, where it is no more

    asyncio.run(play())


def test_nothing_fails_and_nothing_is_lost_while_a_slot_goes_to_and_fro_under_load(redis_cluster: RedisCluster) -> None:
    random = rng("redis cluster moves")
    moves = 0

    async def play() -> None:
        nonlocal moves
        over = asyncio.Event()

        async def move() -> None:
            nonlocal moves
            while not over.is_set():
                masters = [node for node in redis_cluster.masters if node is not redis_cluster.owner(TAG)]
                await asyncio.to_thread(redis_cluster.move, SLOT, random.choice(masters))
                moves += 1

        async with opened(redis_cluster.url, prefix=TAG) as backend, opened(redis_cluster.url, prefix=TAG) as other:
            mover = asyncio.create_task(move())
            rows = {n: live(n, now() + HOUR, version=1, user=user_of(n % 5)) for n in range(40)}
            await backend.write(list(rows.values()))
            while moves < 15:
                for n in random.sample(range(40), 20):
                    rows[n] = rows[n]._replace(version=rows[n].version + 1, user=user_of(random.randrange(5)))
                asked = random.choice([backend, other])
                await asked.write(list(rows.values()))
                assert [await backend.load(row.handle) for row in rows.values()] == list(rows.values())
                assert await asked.count() == len(rows)
            over.set()
            await mover
            for n in range(5):
                mine = sorted(row for row in rows.values() if row.user == user_of(n))
                assert sorted(await backend.sessions_of(user_of(n))) == mine
            assert await unlisted(backend, redis_cluster) == []

    asyncio.run(play())


@pytest.mark.parametrize("all_of_it", [True, False], ids=["clear", "handles"])
def test_rows_that_go_behind_the_back_of_a_listing_are_in_it_once(redis_cluster: RedisCluster, all_of_it: bool) -> None:
    """From a master that has not been looked at to one that has."""
    rows = [live(n, now() + HOUR) for n in range(60)]

    async def play() -> None:
        async with opened(redis_cluster.url) as backend:
            await backend.write(rows)
            listing = backend._all_handles() if all_of_it else backend.handles()
            first: Any = await anext(listing)
            looked = redis_cluster.owner(row_key(first[0] if all_of_it else first))
            moving = {slot_of(row_key(row.handle)) for row in rows} - looked.slots
            for slot in moving:
                redis_cluster.move(slot, looked)
            seen = [*first] if all_of_it else [first]
            async for more in listing:
                seen += more if all_of_it else [more]
            assert sorted(seen) == sorted(row.handle for row in rows)
            assert await backend.clear() == len(rows)

    asyncio.run(play())


def test_a_newcomer_without_slots_is_looked_at_when_a_slot_is_on_its_way_to_it() -> None:
    """And is asked like any other once it has some; when it has gone, nobody misses it."""

    async def play(cluster: RedisCluster) -> None:
        rows = [live(n, now() + HOUR, user=user_of(1)) for n in range(10)]
        source, target = cluster.owner(TAG), cluster.add()
        async with opened(cluster.url_of(source), prefix=TAG) as backend:
            await backend.write(rows)
            cluster.begin_move(SLOT, source, target)
            for row in rows[::2]:
                cluster.move_key(tagged(row.handle), source, target)
            assert await handles_in(backend) == sorted(row.handle for row in rows)
            assert await backend.clear() == len(rows)
            assert await backend.count() == 0
            for row in rows[1::2]:
                cluster.move_key(tagged(row.handle), source, target)
            cluster.end_move(SLOT, target)
            assert [row.state for row in await loaded(backend, rows)] == [State.DEAD] * 10
            await backend.write([live(50, FOREVER)])
            cluster.move(SLOT, source)
            cluster.remove(target)
            assert await handles_in(backend) == [handle_of(50)]
            assert [row.state for row in await loaded(backend, rows)] == [State.DEAD] * 10

    with RedisCluster(masters=2, replicas=0) as cluster:
        asyncio.run(play(cluster))


async def loaded(backend: RedisBackend, rows: list[Row]) -> list[Row]:
    found = [await backend.load(row.handle) for row in rows]
    return [row for row in found if row is not None]


# ── masters that are replaced ─────────────────────────────────────────────────────────────────────────────────


def test_a_replica_that_is_promoted_by_hand_takes_over_without_an_error(redis_cluster: RedisCluster) -> None:
    async def play() -> None:
        async with opened(redis_cluster.url, timeout=PATIENCE) as backend:  # that of the promotion is not known
            rows = [live(n, now() + HOUR, user=user_of(n % 5)) for n in range(60)]
            await backend.write(rows)
            for version in range(2, 5):
                master = redis_cluster.masters[version % 3]
                replica = redis_cluster.replica(master)
                promoting = asyncio.create_task(asyncio.to_thread(redis_cluster.promote, replica))
                while not promoting.done():
                    await backend.write(rows)
                    assert await backend.count() == len(rows)
                await promoting
                rows = [row._replace(version=version) for row in rows]
                assert {answer.applied for answer in await backend.write(rows)} == {True}
                assert [await backend.load(row.handle) for row in rows] == rows
                assert await backend.count() == len(rows)
            assert await unlisted(backend, redis_cluster) == []

    asyncio.run(play())


@pytest.mark.parametrize("how", ["killed", "frozen"])
def test_a_master_that_is_lost_is_replaced_by_its_replica_and_writes_go_on(
    redis_cluster: RedisCluster, how: str
) -> None:
    """Until then its rows are unavailable, each time in time; those of others are not as long as the cluster serves."""
    master = redis_cluster.masters[0]
    replica = redis_cluster.replica(master)
    handle = handle_at(master)
    patience = 0.3 if how == "frozen" else 5.0

    async def play() -> None:
        async with opened(redis_cluster.url, timeout=patience) as backend:
            row = Row(handle, State.LIVE, 1, 1, now() + HOUR, user_of(1), b"x")
            rows = [row, *(live(n, now() + HOUR, user=user_of(n % 5)) for n in range(20_000, 20_060))]
            await until_answered(lambda: backend.write(rows), patience)
            master.tell("WAIT", 1, int(PATIENCE * 1000))
            (master.kill if how == "killed" else master.freeze)()
            with pytest.raises(BackendUnavailable, match="did not answer"):
                await backend.load(handle)
            new = [row._replace(version=2) for row in rows]
            await until_answered(lambda: backend.write(new), patience)
            redis_cluster.wait_for_promotion(replica, lost=master)
            assert [await backend.load(row.handle) for row in new] == new
            assert await backend.count() == len(new)
            redis_cluster.revive()
            assert not master.is_master
            newer = [row._replace(version=3) for row in new]
            assert {answer.applied for answer in await backend.write(newer)} == {True}
            assert await backend.clear() == len(new)

    asyncio.run(play())


def test_a_frozen_master_costs_a_question_its_time_and_others_nothing(redis_cluster: RedisCluster) -> None:
    """More questions than it has turns wait for it."""
    master = redis_cluster.masters[0]
    here, elsewhere = handle_at(master), handle_at(other_than(master, redis_cluster))

    async def play() -> None:
        async with opened(redis_cluster.url, timeout=SHORT, max_connections=2) as backend:
            await backend.count()
            master.freeze()
            try:
                started = time.monotonic()
                hung = [asyncio.create_task(backend.load(here)) for _ in range(8)]
                await asyncio.sleep(0)
                assert await backend.load(elsewhere) is None
                assert not any(task.done() for task in hung)
                answers = await asyncio.gather(*hung, return_exceptions=True)
                assert {type(answer) for answer in answers} == {BackendUnavailable}
                assert time.monotonic() - started < 20 * SHORT
            finally:
                master.thaw()

    asyncio.run(play())


def test_when_all_nodes_are_down_it_is_unavailable_and_when_they_are_back_it_is_not() -> None:
    async def play(cluster: RedisCluster) -> None:
        async with opened(cluster.url) as backend, opened(cluster.url) as idle:
            row = live(1, now() + HOUR, user=user_of(1))
            await backend.write([row])
            cluster.kill()
            for asked in (backend, idle):
                with pytest.raises(BackendUnavailable, match="did not answer"):
                    await asked.load(row.handle)
                with pytest.raises(BackendUnavailable):
                    await asked.count()
            cluster.start()
            for asked in (backend, idle):
                assert await asked.load(row.handle) == row
            for node in cluster.nodes:
                node.ask("SCRIPT", "FLUSH")
            assert await backend.write([row]) == [Answer(False, row.mark)]

    with RedisCluster(*RedisServer.DURABLE, masters=2, replicas=0) as cluster:
        asyncio.run(play(cluster))


def test_one_node_of_the_url_that_lives_is_enough(redis_cluster: RedisCluster) -> None:
    """Also a replica, and also when others take connections and answer nothing."""
    node = redis_cluster.replica(redis_cluster.masters[0])
    gone, silent = free_ports(2)

    async def play() -> None:
        async def ignore(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await over.wait()
            writer.close()

        over = asyncio.Event()
        server = await asyncio.start_server(ignore, "127.0.0.1", silent)
        url = f"redis+cluster://127.0.0.1:{gone},127.0.0.1:{silent},{node.address}/"
        for _ in range(5):
            async with opened(url) as backend:
                assert await backend.count() == 0
                assert len(await backend._client.layout()) == 3
        over.set()
        server.close()
        await server.wait_closed()

    asyncio.run(play())


# ── what nodes say ────────────────────────────────────────────────────────────────────────────────────────────


def test_scripts_that_one_node_has_forgotten_are_sent_again_to_it(redis_cluster: RedisCluster) -> None:
    """Also to one that has a slot only half."""
    source = redis_cluster.owner(TAG)
    target = other_than(source, redis_cluster)

    async def play() -> None:
        async with opened(redis_cluster.url) as backend, opened(redis_cluster.url, prefix=TAG) as moving:
            rows = [live(n, now() + HOUR, user=user_of(n)) for n in range(60)]
            await backend.write(rows)
            source.ask("SCRIPT", "FLUSH")
            assert await backend.write(rows) == [Answer(False, row.mark) for row in rows]
            redis_cluster.begin_move(SLOT, source, target)
            target.ask("SCRIPT", "FLUSH")
            assert await moving.write(rows) == [Answer(True, None)] * len(rows)
            target.ask("SCRIPT", "FLUSH")
            assert await moving.clear() == len(rows)
            redis_cluster.end_move(SLOT, target)
            redis_cluster.move(SLOT, source)

    asyncio.run(play())


def test_a_server_that_is_in_no_cluster_is_an_error_that_says_how_to_name_it(redis_server: RedisServer) -> None:
    (port,) = free_ports(1)

    async def play() -> None:
        async with opened(f"redis+cluster://127.0.0.1:{port},127.0.0.1:1/") as backend:
            with pytest.raises(BackendError, match=r"no node of a cluster: write redis://") as caught:
                await backend.load(handle_of(1))
            assert not isinstance(caught.value, BackendUnavailable)

    with RedisServer("--port", str(port)):
        asyncio.run(play())


def test_a_node_that_is_named_as_a_server_is_an_error_that_says_how_to_name_it(redis_cluster: RedisCluster) -> None:
    elsewhere = handle_at(redis_cluster.masters[1])

    async def play() -> None:
        async with opened(f"redis://{redis_cluster.masters[0].address}") as backend:
            with pytest.raises(BackendError, match=r"node of a cluster: write redis\+cluster://"):
                await backend.load(elsewhere)

    asyncio.run(play())


def test_a_node_that_has_not_joined_and_a_slot_that_nobody_has_are_unavailable() -> None:
    async def play(node: ClusterNode) -> None:
        row = live(1, now() + HOUR)
        async with opened(RedisCluster.url_of(node)) as backend:
            with pytest.raises(BackendUnavailable, match="knows no master"):
                await backend.load(row.handle)
            node.tell("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_for(lambda: node.knows()["cluster_state"] == "ok", "it serves")
            assert await backend.write([row]) == [Answer(True, None)]  # it does not know its own address
            assert await backend.count() == 1
            slot = slot_of(row_key(row.handle))
            node.tell("CLUSTER", "DELSLOTS", slot)
            with pytest.raises(BackendUnavailable, match="cluster is down"):
                await backend.load(row.handle)
            with pytest.raises(BackendUnavailable, match=f"nobody has slot {slot}"):
                await backend.load(row.handle)
            node.tell("CLUSTER", "ADDSLOTS", slot)
            assert await backend.load(row.handle) == row

    with ClusterNode("--cluster-require-full-coverage", "no") as node:
        asyncio.run(play(node))


@contextlib.asynccontextmanager
async def claiming(answer: str) -> Any:
    """The URL of a node that says it has all slots, and answers everything else with one error."""
    (port,) = free_ports(1)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                word = b""
                for _ in range(int(line[1:])):
                    word = await reader.readexactly(int((await reader.readline())[1:]) + 2)
                slots = f"*1\r\n*3\r\n:0\r\n:16383\r\n*3\r\n$0\r\n\r\n:{port}\r\n$1\r\nx\r\n"
                writer.write((slots if word == b"SLOTS\r\n" else f"-{answer.format(port=port)}\r\n").encode())
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield f"redis+cluster://127.0.0.1:{port}/"
    finally:
        server.close()


@pytest.mark.parametrize("answer", ["MOVED 1 127.0.0.1:{port}", "MOVED 1 :{port}", "ASK 1 127.0.0.1:{port}"])
def test_nodes_that_send_a_question_round_in_circles_are_unavailable(
    monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    async def play() -> None:
        async with claiming(answer) as url, opened(url) as backend:
            with pytest.raises(BackendUnavailable, match="nodes do not agree"):
                await backend.load(handle_of(1))

    monkeypatch.setattr(module, "REDIRECTIONS", 3)
    asyncio.run(play())


def test_a_slot_that_is_on_its_way_to_a_node_that_does_not_answer_is_unavailable_for_what_is_not_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def play() -> None:
        async with claiming("ASK 1 127.0.0.1:1") as url, opened(url) as backend:
            with pytest.raises(BackendUnavailable, match="nodes do not agree"):
                await backend.load(handle_of(1))

    monkeypatch.setattr(module, "REDIRECTIONS", 3)
    asyncio.run(play())


def test_a_master_that_has_just_become_a_replica_is_not_looked_at_but_its_master_is(
    redis_cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is asked who has which keys may not have heard of it yet. A replica would answer, with what it has."""

    async def play() -> None:
        async with opened(redis_cluster.url) as backend:
            rows = [live(n, now() + HOUR) for n in range(40)]
            await backend.write(rows)
            old = redis_cluster.masters[0]
            redis_cluster.promote(redis_cluster.replica(old))
            redis_cluster.revive()
            monkeypatch.setattr(backend._client, "_know", knows_already)
            assert {server.name for server in await backend._client.layout()} == {
                f"redis://{node.address}/0" for node in redis_cluster.masters
            }
            assert await handles_in(backend) == sorted(row.handle for row in rows)

    async def knows_already() -> None:
        pass

    asyncio.run(play())


# ── connections ───────────────────────────────────────────────────────────────────────────────────────────────


def test_cancelled_questions_leave_no_answers_to_others_and_no_turn_taken(redis_cluster: RedisCluster) -> None:
    random = rng("redis cluster cancel")

    async def play() -> None:
        async with opened(redis_cluster.url, max_connections=2) as backend:
            rows = [live(n, now() + HOUR, body=bytes([n]) * 5000) for n in range(50)]
            await backend.write(rows)
            for _ in range(60):
                await backend._client.doubt()
                tasks: list[asyncio.Task[Any]] = [asyncio.create_task(backend.load(row.handle)) for row in rows[:8]]
                tasks.append(asyncio.create_task(backend.write(rows)))
                for _ in range(random.randint(0, 12)):
                    await asyncio.sleep(0)
                for task in random.sample(tasks, 4):
                    task.cancel()
                answers = await asyncio.gather(*tasks, return_exceptions=True)
                for row, answer in zip(rows, answers[:8], strict=False):
                    assert isinstance(answer, asyncio.CancelledError) or answer == row
            assert [await backend.load(row.handle) for row in rows] == rows

    asyncio.run(play())


def test_each_node_has_a_few_connections_however_much_is_asked(redis_cluster: RedisCluster) -> None:
    async def play() -> None:
        async with opened(redis_cluster.url_of(redis_cluster.masters[0]), max_connections=3) as backend:
            before = {node: connections(node) for node in redis_cluster.masters}
            rows = [live(n, now() + HOUR) for n in range(60)]
            await backend.write(rows)
            assert await asyncio.gather(*(backend.load(row.handle) for row in rows * 5)) == rows * 5
            for node, number in before.items():
                assert connections(node) - number <= 3

    def connections(node: ClusterNode) -> int:
        return node.ask("CLIENT", "LIST", "TYPE", "normal").count(b" id=") + 1

    asyncio.run(play())


def test_a_child_makes_connections_of_its_own_and_leaves_its_parents_alone(redis_cluster: RedisCluster) -> None:
    rows = [live(n, now() + HOUR, user=user_of(n % 3)) for n in range(30)]

    async def child(backend: RedisBackend) -> bool:
        await backend.close()  # does nothing: it is the parent's
        await backend.open()
        found = [await backend.load(row.handle) for row in rows]
        await backend.write([row._replace(version=2) for row in rows])
        await backend.close()
        return found == rows

    async def play() -> None:
        async with opened(redis_cluster.url) as backend:
            await backend.write(rows)
            pid = os.fork()
            if pid == 0:  # pragma: no cover
                status = 1
                try:
                    asyncio.set_event_loop_policy(None)
                    asyncio._set_running_loop(None)
                    status = 0 if asyncio.run(child(backend)) else 2
                finally:
                    os._exit(status)
            _, status = await asyncio.to_thread(os.waitpid, pid, 0)
            assert status == 0
            assert [(await backend.load(row.handle)) for row in rows] == [row._replace(version=2) for row in rows]

    asyncio.run(play())


def test_closed_and_opened_again_it_serves_another_event_loop(redis_cluster: RedisCluster) -> None:
    backend = RedisBackend(redis_cluster.url)

    async def play(version: int) -> None:
        with pytest.raises(BackendUnavailable, match="not open"):
            await backend.load(handle_of(1))
        await backend.open()
        await backend.open()
        assert (await backend.write([live(1, now() + HOUR, version=version)]))[0].applied
        await backend.close()
        await backend.close()

    for version in range(1, 4):
        asyncio.run(play(version))


def test_past_entries_of_users_on_all_masters_go_by_and_by(redis_cluster: RedisCluster) -> None:
    async def play() -> None:
        past, coming = now() - 10, now() + HOUR
        with looking(redis_cluster) as client:
            for user in map(user_of, range(30)):
                client.zadd(user_key(user), {b"past": past, b"coming": coming})
            async with opened(redis_cluster.url) as backend:
                for _ in range(30):
                    assert await backend.sweep(coming + HOUR, 2) == 0
            for user in map(user_of, range(30)):
                assert client.zrange(user_key(user), 0, -1) == [b"coming"]

    asyncio.run(play())


# ── credentials, TLS, settings ────────────────────────────────────────────────────────────────────────────────


def test_credentials_reach_every_node_and_the_rights_that_are_documented_are_enough(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def play(cluster: RedisCluster) -> None:
        acl = next(block.text for block in blocks(PAGE, "text") if "cluster|slots" in block.text)
        for node in cluster.nodes:
            assert node.ask(*acl.split()).startswith(b"+OK")
        right = cluster.url.replace("://", "://shop:secret@")
        async with opened(right) as backend:
            await backend.initialize()
            rows = [live(n, now() + HOUR, user=user_of(1)) for n in range(20)]
            assert await backend.write(rows) == [Answer(True, None)] * 20
            assert sorted(await backend.sessions_of(user_of(1))) == sorted(rows)
            assert await backend.history() != b""
            source = cluster.owner(row_key(handle_of(1)))
            slot, target = slot_of(row_key(handle_of(1))), other_than(source, cluster)
            cluster.begin_move(slot, source, target)
            cluster.move_key(row_key(handle_of(1)), source, target)
            assert await backend.load(handle_of(1)) == rows[1]
            assert (await backend.count(), await backend.sweep(now(), 10), await backend.clear()) == (20, 0, 20)
        async with opened(right, prefix="else") as backend:
            with pytest.raises(BackendError, match="in a cluster also ASKING, CLUSTER SLOTS and CLUSTER NODES"):
                await backend.load(handle_of(1))
        for node in cluster.nodes:
            assert node.ask("ACL", "SETUSER", "default", "off").startswith(b"+OK")
        for wrong in (f"ada:{SECRET}@", f":{SECRET}@", ""):
            async with opened(cluster.url.replace("://", f"://{wrong}")) as backend:
                for ask in (lambda: backend.load(handle_of(1)), backend.initialize, backend.count):
                    with pytest.raises(BackendError, match="refuses the credentials") as caught:
                        await ask()
                    assert not isinstance(caught.value, BackendUnavailable)
                    assert SECRET not in "".join(traceback.format_exception(caught.value))
                assert SECRET not in f"{backend!r} {backend.name}"

    with RedisCluster(masters=2, replicas=0) as cluster:
        asyncio.run(play(cluster))
    assert not caplog.messages


@pytest.mark.parametrize("endpoint", ["hostname", "ip"])
def test_over_tls_every_node_must_be_who_the_cluster_says_it_is(tmp_path: Path, endpoint: str) -> None:
    """By the name, or the number, under which the nodes announce themselves; here the certificate has only a name."""
    certificate = self_signed(tmp_path)

    ports = free_ports(2)
    common = (
        "--tls-cert-file", f"{certificate}", "--tls-key-file", f"{tmp_path}/key", "--tls-ca-cert-file",
        f"{certificate}", "--tls-auth-clients", "no", "--tls-cluster", "yes", "--tls-replication", "yes",
        "--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", endpoint,
    )  # fmt: skip

    async def play(cluster: RedisCluster) -> None:
        url = f"rediss+cluster://localhost:{ports[0]}/?ssl_ca_certs={certificate}"
        rows = [live(n, now() + HOUR) for n in range(20)]
        async with opened(url) as backend:
            if endpoint == "ip":
                with pytest.raises(BackendUnavailable, match="certificate"):
                    await backend.write(rows)
                return
            assert await backend.write(rows) == [Answer(True, None)] * 20
            assert [await backend.load(row.handle) for row in rows] == rows
            assert await backend.count() == 20
            assert backend.name == f"rediss+cluster://localhost:{ports[0]}/"
        async with opened(url.partition("?")[0]) as backend:
            with pytest.raises(BackendUnavailable, match="certificate"):
                await backend.load(handle_of(1))

    cluster = RedisCluster(*common, masters=2, replicas=0)
    for node, port in zip(cluster.nodes, ports, strict=True):
        node.options = (*node.options, "--port", "0", "--tls-port", str(port))
        node.port = port
    with cluster:
        asyncio.run(play(cluster))


def test_settings_under_which_it_forgets_are_warned_of_once_for_all_nodes(
    redis_cluster: RedisCluster, caplog: pytest.LogCaptureFixture
) -> None:
    async def play() -> None:
        async with opened(redis_cluster.url) as backend:
            await backend.initialize()
            await backend.initialize()

    with caplog.at_level(logging.WARNING, "shmsession"):
        asyncio.run(play())
    assert len(caplog.messages) == 1
    assert "keeps nothing on disk" in caplog.messages[0]


@pytest.mark.parametrize("protocol", [2, 3])
def test_both_protocols_will_do(redis_cluster: RedisCluster, protocol: int) -> None:
    async def play() -> None:
        async with opened(redis_cluster.url, protocol=protocol) as backend:
            await backend.initialize()
            sentinel = Row(SENTINEL, State.LIVE, 7, 1, FOREVER, body=b"whose")
            rows = [live(n, now() + HOUR, user=user_of(1)) for n in range(10)]
            written = [sentinel, *rows, dead(20, FOREVER), erased(21, FOREVER)]
            assert await backend.write(written) == [Answer(True, None)] * 13
            assert sorted(await backend.sessions_of(user_of(1))) == sorted(rows)
            assert await handles_in(backend) == sorted(row.handle for row in rows)
            assert (await backend.sweep(now(), 10), await backend.clear(), await backend.count()) == (0, 10, 0)

    asyncio.run(play())


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("redis+cluster://host", "redis+cluster://host:6379/"),
        ("redis+cluster://", "redis+cluster://localhost:6379/"),
        ("redis+cluster://ada:hunter2@a:7000,b,[::1]:7001/?prefix=x", "redis+cluster://a:7000,b:6379,[::1]:7001/"),
        ("REDISS+Cluster://:hunter2@host/0?ssl_cert_reqs=none", "rediss+cluster://host:6379/"),
        ("redis+cluster://host?password=hunter2", "redis+cluster://host:6379/"),
    ],
)
def test_the_name_says_where_and_no_secret(url: str, name: str) -> None:
    backend = RedisBackend(url)
    assert backend.name == name
    assert SECRET not in repr(backend)


@pytest.mark.parametrize(
    "url",
    [
        "redis+cluster://:hunter2/x@host", "redis+cluster://:hunter2#x@host", "redis+cluster://:hunter2@host:hunter2",
        "redis+cluster://:hunter2@host/3", "redis+cluster://:hunter2@host?db=3", "redis+cluster://:hunter2@host/hunter2",
        "redis+cluster://:123/x@host", "redis+cluster://:hunter2@a,b:hunter2",
        "redis+cluster://:hunter2@host?colour=blue", "redis+cluster://:hunter2@host?max_connections=0",
        "redis+cluster://:hunter2@host?db=hunter2", "redis+cluster:/:hunter2@host",
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_once_and_quotes_no_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RedisBackend(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_database_other_than_the_first_is_refused_however_it_is_given() -> None:
    with pytest.raises(ConfigError, match="database 0 only"):
        RedisBackend("redis+cluster://host/3")
    with pytest.raises(ConfigError, match="database 0 only"):
        RedisBackend("redis+cluster://host", db=3)
    assert RedisBackend("redis+cluster://host/0", db=0).name == "redis+cluster://host:6379/"
