"""Counters of all processes: nothing lost, nothing twice, whoever is killed."""

import gc
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from shmsession.memory.counters import NAMES
from tests.backends import Host
from tests.memory import Channel, Child, closing, memory_store, wait_until


def test_every_name_counts_from_nothing(place: Path) -> None:
    with Host(place) as host:
        counters = host.memory.environment.counters
        assert counters.totals() == dict.fromkeys(NAMES, 0)
        for number, name in enumerate(NAMES):
            counters.add(name, number)
        assert counters.totals() == {name: number for number, name in enumerate(NAMES)}


def test_what_was_counted_survives_closing(place: Path) -> None:
    for opened in range(1, 4):
        with Host(place) as host:
            host.memory.environment.counters.add("hits")
            host.memory.environment.close()
            host.memory.environment.counters.add("hits")
            assert host.memory.environment.counters.totals()["hits"] == 2 * opened


def count(place: Path, channel: Channel) -> None:
    with closing(memory_store(place, backend=True)) as store:
        while True:
            times = channel.receive()
            for _ in range(times):
                store.environment.counters.add("hits")
            channel.send(store.environment.counters.totals()["hits"])


def test_several_processes_count_at_once_and_are_killed(place: Path) -> None:
    """Each addition counts once, at whatever instant the others add, and however those end that did."""
    rounds, times = 4, 3_000
    with Host(place) as host:
        counters = host.memory.environment.counters
        for done in range(rounds):
            children = [Child(lambda channel: count(place, channel)) for _ in range(4)]
            for child in children:
                child.channel.send(times)
            for _ in range(times):
                host.memory.environment.counters.add("misses")
            for child in children:
                child.channel.receive()
            for child in children:
                child.kill()
            totals = host.memory.environment.counters.totals()
            assert totals["hits"] == (done + 1) * 4 * times
            assert totals["misses"] == (done + 1) * times
        assert counters is not None


def test_killed_in_the_middle_of_counting(place: Path) -> None:
    """What it had counted stands, and its place goes to the next that comes."""

    def forever(channel: Channel) -> None:
        with closing(memory_store(place, backend=True)) as store:
            while True:
                store.environment.counters.add("rows")

    with Host(place) as host:
        seen = 0
        for _ in range(5):
            with Child(forever):
                before = seen
                wait_until(lambda: host.memory.environment.counters.totals()["rows"] > before + 100)  # noqa: B023
            now = host.memory.environment.counters.totals()["rows"]
            assert now >= seen
            seen = now


@pytest.mark.parametrize("how", ["reopened", "raised"])
def test_a_place_stays_ones_own_when_the_environment_is_opened_anew(place: Path, how: str) -> None:
    """Another process must not be given the same one, also after what was open before is collected as garbage."""
    with Host(place) as host:
        environment = host.memory.environment
        before = environment.open()
        if how == "reopened":
            environment.close()
        else:
            environment.raise_epoch(environment.epoch + 1)
        begin = environment.counters._begin
        del before
        gc.collect()
        assert not _is_free(environment.path / "counters", begin * 8), "its place is free, though it counts there"


def _is_free(path: Path, offset: int) -> bool:
    code = (
        "import fcntl, os, sys; descriptor = os.open(sys.argv[1], os.O_RDWR); "
        "fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 128, int(sys.argv[2]))"
    )
    done = subprocess.run([sys.executable, "-c", code, path, str(offset)], capture_output=True, check=False)
    return done.returncode == 0


def test_threads_count_each_addition(place: Path) -> None:
    with Host(place) as host:
        counters = host.memory.environment.counters

        def add() -> None:
            for _ in range(5_000):
                counters.add("late")

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert counters.totals()["late"] == 20_000
