"""The lease: one flusher a host, whoever dies, stops or is born."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmsession.clock import SystemClock
from shmsession.lease import BEAT_MS, SILENCE_MS, Lease
from shmsession.memory.store import MemoryStore
from shmsession.testing import ManualClock
from tests.memory import Channel, Child, closing, memory_store, put_raw, transactions

BEAT, SILENCE = BEAT_MS / 1000, SILENCE_MS / 1000


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(place: Path, clock: ManualClock) -> Iterator[MemoryStore]:
    with closing(memory_store(place, clock, backend=True)) as store:
        yield store


def candidates(store: MemoryStore, clock: ManualClock, count: int = 3) -> list[Lease]:
    return [Lease(store.environment, clock) for _ in range(count)]


def test_the_first_takes_it_and_keeps_it(store: MemoryStore, clock: ManualClock) -> None:
    first, second, third = candidates(store, clock)
    assert first.holder() is None
    for _ in range(20):
        assert first.take()
        assert not second.take()
        assert not third.take()
        clock.advance(BEAT)
    assert second.holder() == (1, os.getpid())


@pytest.mark.parametrize("late", [0, 1])
def test_silence_loses_it_and_raises_the_term(store: MemoryStore, clock: ManualClock, late: int) -> None:
    """Not a millisecond before the silence is complete; and then the first that looks has it, the old one not."""
    first, second, _ = candidates(store, clock)
    assert first.take()
    clock.advance(SILENCE - 0.001)
    assert not second.take()
    clock.advance(0.001 + late)
    assert second.take()
    assert not first.take()
    assert second.holder() == (2, os.getpid())


def test_who_was_only_slow_goes_on(store: MemoryStore, clock: ManualClock) -> None:
    """Nobody took it during its silence: the same term."""
    first, *_ = candidates(store, clock)
    assert first.take()
    clock.advance(10 * SILENCE)
    assert first.take()
    assert first.holder() == (1, os.getpid())


def test_released_it_is_free_at_once(store: MemoryStore, clock: ManualClock) -> None:
    first, second, _ = candidates(store, clock)
    assert first.take()
    second.release()
    assert not second.take()
    first.release()
    assert first.holder() is None
    assert second.take()
    assert second.holder() == (2, os.getpid())
    first.release()
    assert not first.take()


def test_looking_writes_nothing(store: MemoryStore, clock: ManualClock) -> None:
    """A candidate that does not get it costs the others no write, and the holder writes once a beat."""
    first, second, _ = candidates(store, clock)
    assert first.take()
    before = transactions(store)
    for _ in range(10):
        assert not second.take()
        assert first.take()
    assert transactions(store) == before
    clock.advance(BEAT)
    assert first.take()
    assert transactions(store) == before + 1


def test_two_that_look_at_once_do_not_both_get_it(store: MemoryStore, clock: ManualClock) -> None:
    """Both see the silence; the transaction decides."""
    first, second, third = candidates(store, clock)
    assert first.take()
    clock.advance(SILENCE)
    environment, write = store.environment, store.environment.write
    outcomes: list[bool] = []

    def interrupted(work: object) -> object:
        environment.write = write  # type: ignore[method-assign]
        outcomes.append(third.take())
        return write(work)  # type: ignore[arg-type]

    environment.write = interrupted  # type: ignore[assignment, method-assign]
    assert [second.take(), *outcomes] == [False, True]


def test_a_beat_of_an_earlier_boot_keeps_nobody_out(store: MemoryStore, clock: ManualClock) -> None:
    """The directory survived a restart of the machine: the boot clock began anew, below what is stored."""
    first, second, _ = candidates(store, clock)
    clock.advance(days=30)
    assert first.take()
    clock.advance(days=-30)
    assert second.take()


def test_a_damaged_row_is_taken_over(store: MemoryStore, clock: ManualClock) -> None:
    first, *_ = candidates(store, clock)
    store.environment.write(lambda txn, tables: txn.put(b"lease", b"?", db=tables.meta))
    assert first.take()
    put_raw(store, bytes(20), b"")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_killed_and_stopped_alike_lose_it(place: Path, end: signal.Signals) -> None:
    """A process that holds it is killed, or stopped; this one has it after the silence, and keeps it when that goes
    on."""
    clock = ManualClock()

    def hold(channel: Channel) -> None:
        theirs = ManualClock()
        with closing(memory_store(place, theirs, backend=True)) as store:
            lease = Lease(store.environment, theirs)
            channel.send(lease.take())
            theirs.advance(channel.receive())
            channel.send(lease.take())

    with Child(hold) as child, closing(memory_store(place, clock, backend=True)) as store:
        assert child.channel.receive()
        lease = Lease(store.environment, clock)
        assert not lease.take()
        assert lease.holder() == (1, child.pid)
        os.kill(child.pid, end)
        clock.advance(SILENCE)
        assert lease.take()
        assert lease.holder() == (2, os.getpid())
        if end is signal.SIGSTOP:
            os.kill(child.pid, signal.SIGCONT)
            assert not child.ask(SILENCE)
        assert lease.holder() == (2, os.getpid())


def test_one_of_many_processes_has_it(place: Path) -> None:
    """Started together, with the system's clock: one takes it, and only one."""

    def compete(channel: Channel) -> None:
        clock = SystemClock()
        with closing(memory_store(place, clock, backend=True)) as store:
            lease = Lease(store.environment, clock)
            channel.receive()
            channel.send(lease.take())
            channel.receive()

    children = [Child(compete) for _ in range(4)]
    try:
        for child in children:
            child.channel.send(None)
        assert sum(child.channel.receive() for child in children) == 1
    finally:
        for child in children:
            child.kill()
