"""The numbers for operators: each says what the documentation says it does, over all processes."""

import asyncio
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession import Key, Session, SessionConfig, SessionStore
from shmsession.errors import BackendUnavailable, SessionGone
from shmsession.memory.counters import NAMES
from shmsession.testing import ManualClock
from tests.backends import MemoryBackend
from tests.memory import Channel, Child

KEYS = (Key.generate(),)
ELSEWHERE = "A" * 43
"""The id of a session that memory does not know."""


def make(place: Path, backend: MemoryBackend | str, clock: ManualClock | None = None, **settings: Any) -> SessionStore:
    config = SessionConfig(
        directory=place / "base", name="test", map_size=4 << 20, secure=False, keys=KEYS,
        memory_lifespan=timedelta(hours=1), lifespan=timedelta(hours=6), **settings,
    )  # fmt: skip
    return SessionStore(backend, config=config, clock=clock or ManualClock())


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend(labelled=False)


@pytest.fixture
def store(place: Path, backend: MemoryBackend) -> Iterator[SessionStore]:
    store = make(place, backend)
    store.memory.open()
    store.behind.flushes = True  # but nobody does, unless a test says so
    yield store
    store.close()


def saved(store: SessionStore, **values: Any) -> Session:
    session = store.session()
    session.update(values)
    session.save()
    return session


def counted(store: SessionStore) -> dict[str, int]:
    """The counters that are not 0."""
    return {name: count for name, count in store.stats().counters.items() if count}


def advance(store: SessionStore, seconds: float) -> None:
    assert isinstance(store.clock, ManualClock)
    store.clock.advance(seconds)


def test_the_outbox_counts_sessions_and_its_lag_is_the_age_of_the_oldest(store: SessionStore) -> None:
    """However often they were committed since; both are 0 when all was sent."""
    assert (store.stats().outbox, store.stats().flush_lag) == (0, 0.0)
    busy = saved(store, n=1)
    advance(store, 2.5)
    saved(store, n=2)
    for n in range(5):
        busy["n"] = n
        busy.save()
    assert (store.stats().outbox, store.stats().flush_lag) == (2, 2.5)
    assert store.sync.flush()
    assert (store.stats().outbox, store.stats().flush_lag) == (0, 0.0)
    assert {name: counted(store)[name] for name in ("batches", "rows")} == {"batches": 1, "rows": 2}


def test_without_a_backend_nothing_waits_and_nothing_of_it_is_counted(place: Path) -> None:
    with make(place, "none") as store:
        session = saved(store, n=1)
        assert store.session(session.id)["n"] == 1
        assert not store.session(ELSEWHERE).exists
        assert store.stats()[4:6] == (0, 0.0)
        assert tuple(store.stats().counters) == NAMES
        assert counted(store) == {}


def test_a_look_is_a_hit_or_a_miss(place: Path, store: SessionStore) -> None:
    """An ended session is a hit: memory can tell."""
    kept, ended = saved(store, n=1), saved(store, n=2)
    kept_id, ended_id = kept.id, ended.id
    ended.destroy()
    assert store.session(kept_id).exists
    assert not store.session(ended_id).exists
    assert {name: counted(store).get(name, 0) for name in ("hits", "misses")} == {"hits": 2, "misses": 0}
    assert store.sync.flush()
    store.close()
    shutil.rmtree(place / "base")
    assert store.session(kept_id)["n"] == 1
    assert store.session(kept_id)["n"] == 1
    assert not store.session(ended_id).exists
    assert {name: counted(store).get(name, 0) for name in ("hits", "misses")} == {"hits": 1, "misses": 2}


def test_errors_of_the_backend_are_counted_by_what_was_asked(store: SessionStore, backend: MemoryBackend) -> None:
    """A question that is not asked, for the backend has just failed, counts too."""
    backend.fail("load", times=2)  # once for the flusher, which asks too
    for _ in range(2):
        with pytest.raises(BackendUnavailable):
            assert store.session(ELSEWHERE).exists
    assert counted(store)["load_errors"] == 2
    backend.heal()
    advance(store, 60)
    saved(store, n=1)
    backend.fail("write", times=10_000)
    assert not store.sync.flush(0.05)
    assert counted(store)["flush_errors"] >= 1


def test_what_leaves_memory_because_the_backend_has_it_is_counted(store: SessionStore) -> None:
    for n in range(3):
        saved(store, n=n)
    assert store.sync.flush()
    advance(store, 3601)
    flusher = store.behind._make_flusher()
    asyncio.run(flusher.round())
    asyncio.run(flusher._keep_house())
    assert (store.count(), counted(store)["retired"]) == (0, 3)


def test_a_commit_that_is_dropped_is_counted(store: SessionStore) -> None:
    session = saved(store, n=1)
    late = store.session(session.id)
    late["n"] = 2
    session.destroy()
    with pytest.raises(SessionGone):
        late.save()
    assert counted(store)["dropped"] == 1


def test_a_wait_that_is_given_up_is_counted(store: SessionStore, backend: MemoryBackend) -> None:
    session = saved(store, n=1)
    backend.fail("write", times=10_000)
    assert not store.sync.persisted(session, timeout=0.01)
    assert counted(store)["late"] == 1


def test_who_waits_for_a_session_that_nobody_looked_at_waits_for_it(
    store: SessionStore, backend: MemoryBackend
) -> None:
    """It is the same one."""
    session = saved(store, n=1)
    token = store.transport.value(session.id or "", store.clock.now())
    header = f"{store.transport.name}={token}".encode()
    backend.fail("write", times=10_000)
    assert not store.sync.persisted(store.request_session(lambda: header), timeout=0.01)
    assert not asyncio.run(store.request_session(lambda: header).persisted(timeout=0.01))
    assert asyncio.run(store.request_session(lambda: b"").persisted(timeout=0.01))


def test_all_processes_count_together_and_their_deaths_take_nothing_back(store: SessionStore) -> None:
    """Exactly, also at once: those that come later begin where the dead have left off."""
    each, together = 20_000, 4

    def work(channel: Channel) -> None:
        counters = store.memory.environment.counters
        channel.receive()
        for _ in range(each):
            counters.add("dropped")
        channel.send(None)
        channel.receive()

    for generation in range(1, 4):
        children = [Child(work) for _ in range(together)]
        for child in children:
            child.channel.send(None)
        for child in children:
            child.channel.receive()
            child.kill()
        assert counted(store) == {"dropped": generation * together * each}
    store.close()
    assert counted(store) == {"dropped": 3 * together * each}
