"""The sessions of one database put into another: all of them, exactly, and nothing that is newer or dead undone."""

import asyncio
from asyncio import run
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import pytest

from shmsession import Key, SessionConfig, SessionStore
from shmsession.backends import Backend, Row, State, connect, copy
from shmsession.errors import BackendUnavailable
from shmsession.testing.rows import dead, erased, handle_of, handles_in, live, user_of
from tests.backends import BEFORE, MemoryBackend
from tests.figures import report, rng, size
from tests.kept import BACKENDS, Kept

LATER = 1 << 45


@pytest.fixture(scope="module")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Kept]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(Kept(name, tmp_path_factory.mktemp(name))) for name in BACKENDS}


def apart(kept: Kept, name: str) -> Backend:
    """Tables of its own in a database."""
    option = "prefix" if kept.name.startswith("redis") else "table"
    return connect(f"{kept.url}{'&' if '?' in kept.url else '?'}{option}={name}")


async def all_of(backend: Backend) -> dict[bytes, Row]:
    found, handles = {}, await handles_in(backend)
    for begin in range(0, len(handles), 32):
        for row in await asyncio.gather(*map(backend.load, handles[begin : begin + 32])):
            assert row is not None
            found[row.handle] = row
    return found


@pytest.mark.soak
def test_sessions_copied_between_each_pair_of_databases_are_the_same(databases: dict[str, Kept]) -> None:
    random, count = rng("copies"), size(100_000, 2_000)
    sent = {}
    for n in range(count):
        user, body = user_of(n % 50) if n % 3 else b"", random.randbytes(random.randint(1, 1_500))
        sent[handle_of(n)] = live(n, LATER + n, epoch=LATER, version=n + 1, user=user, body=body)

    async def fill(name: str) -> None:
        backend, rows = apart(databases[name], "original"), list(sent.values())
        await backend.open()
        try:
            await backend.initialize()
            for begin in range(0, count, 500):
                await backend.write(rows[begin : begin + 500])
        finally:
            await backend.close()

    async def copied(one: str, other: str) -> None:
        source, target = apart(databases[one], "original"), apart(databases[other], f"copy_of_{one.replace('-', '_')}")
        await source.open()
        await target.open()
        try:
            await target.initialize()
            assert await copy(source, target) == count
            assert await all_of(target) == sent, f"{one} → {other}"
            assert len(await target.sessions_of(user_of(1))) == sum(row.user == user_of(1) for row in sent.values())
        finally:
            await source.close()
            await target.close()

    for name in databases:
        run(fill(name))
    pairs = list(permutations(databases, 2))
    for one, other in pairs:
        run(copied(one, other))
    report("sessions copied between each pair of databases", sessions=count, pairs=len(pairs), different=0)


def test_what_is_newer_or_dead_where_it_is_copied_to_stays() -> None:
    source, target = MemoryBackend(labelled=False), MemoryBackend(labelled=False)

    async def work() -> int:
        await source.write(
            [live(1, LATER), live(2, LATER), live(3, LATER), live(4, LATER), dead(5, LATER), erased(6, LATER)]
        )
        await target.write([live(1, LATER, version=2), dead(2, LATER), erased(3, LATER)])
        return await copy(source, target)

    assert run(work()) == 1
    assert run(copy(source, target)) == 0, "again, it changes nothing"
    assert [target.rows[handle_of(n)].mark for n in (1, 2, 3, 4)] == [
        (State.LIVE, 1, 2), (State.DEAD, 1, 1), (State.ERASED, 1, 1), (State.LIVE, 1, 1)
    ]  # fmt: skip
    assert target.state(handle_of(5)) is target.state(handle_of(6)) is None


def test_a_session_that_ends_while_it_is_copied_is_copied_as_dead_or_not_at_all() -> None:
    """Who destroyed it may know the other database only."""
    source, target = MemoryBackend(labelled=False), MemoryBackend(labelled=False)

    async def work() -> None:
        await source.write([live(1, LATER), live(2, LATER)])
        load = source.load

        async def loading(handle: bytes) -> Row | None:
            if handle == handle_of(1):
                await source.write([dead(1, LATER, version=2), erased(2, LATER, version=2)])
            return await load(handle)

        source.load = loading  # type: ignore[method-assign]
        await copy(source, target)

    run(work())
    assert target.state(handle_of(1)) is State.DEAD
    assert target.state(handle_of(2)) is None


def test_no_more_is_written_at_once_than_a_slow_connection_carries_in_time() -> None:
    source, target = MemoryBackend(labelled=False), MemoryBackend(labelled=False)
    run(source.write([live(n, LATER, body=bytes(100_000)) for n in range(50)] + [live(50, LATER, body=bytes(3 << 20))]))
    assert run(copy(source, target)) == 51
    assert target.sessions() == source.rows
    assert all(sum(len(row.body) for row in batch) <= 1 << 20 or len(batch) == 1 for batch in target.sent)


def test_a_copy_that_fails_can_be_repeated(place: Path) -> None:
    source, target = MemoryBackend(labelled=False), MemoryBackend(labelled=False)
    run(source.write([live(n, LATER) for n in range(1_200)]))
    config = SessionConfig(directory=place, name="copy", keys=(Key.generate(),), map_size=4 << 20)
    with SessionStore(target, config=config) as store:
        source.fail("load", BEFORE)
        with pytest.raises(BackendUnavailable):
            store.sync.copy_from(source)
        assert store.sync.copy_from(source) == 1_200
    assert target.sessions() == source.rows


def test_visitors_go_on_with_their_sessions_at_the_database_that_they_were_copied_to(place: Path) -> None:
    """Also when memory was lost on the way, and nobody sees the database that is left behind any more."""
    urls, key = [f"sqlite:///{place}/{name}.db" for name in ("old", "new")], Key.generate()

    def opened(url: str, name: str) -> SessionStore:
        return SessionStore(url, config=SessionConfig(directory=place, name=name, keys=(key,), map_size=4 << 20))

    with opened(urls[0], "before") as store:
        session = store.session()
        session.update(cart=["tea"])
        session.save()
        known = session.id
        assert store.sync.flush()
    with opened(urls[1], "after") as store:
        assert store.sync.copy_from(urls[0]) == 1
        assert dict(store.session(known)) == {"cart": ["tea"]}
