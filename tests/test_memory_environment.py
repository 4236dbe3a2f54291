"""The environment: opened late, one a directory and process, kept across restarts, and never left half made."""

import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree
from types import FrameType
from typing import Any

import lmdb
import pytest

from shmsession.clock import SystemClock
from shmsession.errors import StoreError, UnsafeStore
from shmsession.memory import building, registry, salvage
from shmsession.memory import environment as environments
from shmsession.memory.store import MemoryStore, Missing
from shmsession.memory.tables import BUILT, LOSSES, PUT_BACK, RECALLED, sequence_key
from shmsession.testing import ManualClock
from tests.figures import report, rng, size
from tests.memory import (
    Channel,
    Child,
    Neighbour,
    check_tables,
    closing,
    contents,
    create,
    destroy,
    handle,
    hold_a_snapshot,
    hold_all_slots,
    in_child,
    memory_store,
    put_meta,
    uuid_of,
    value_of,
    wait_until,
)


@pytest.fixture
def base(place: Path) -> Path:
    return place / "base"


@pytest.fixture
def store(base: Path) -> Iterator[MemoryStore]:
    with closing(memory_store(base, SystemClock())) as opened:
        yield opened


@pytest.fixture
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at every use, in children that are forked later too, as processes do once a second."""
    monkeypatch.setattr(environments, "LOOK_SECONDS", 0.0)


# ── opening ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_is_opened_or_made_before_the_first_use(base: Path, store: MemoryStore) -> None:
    assert not base.exists()
    assert store.load(handle(1), 0) is Missing.UNKNOWN
    assert (base / "test/lmdb/data.mdb").exists()


def test_two_stores_on_one_directory_share_one_environment(base: Path, store: MemoryStore) -> None:
    (base.parent / "link").symlink_to(base.parent)
    other = memory_store(base.parent / "link" / "base")
    elsewhere = memory_store(base, name="other")
    assert other.environment is store.environment
    assert elsewhere.environment is not store.environment
    create(store, handle(1), "a")
    assert value_of(other, handle(1)) == "a"
    assert value_of(elsewhere, handle(1)) is Missing.UNKNOWN
    other.close()
    assert value_of(store, handle(1)) == "a"
    elsewhere.close()
    assert store.environment.path.resolve() in registry._environments


def test_the_last_to_close_closes(base: Path) -> None:
    first, second = memory_store(base), memory_store(base)
    env = first.environment.open().env
    first.close()
    env.info()
    second.close()
    with pytest.raises(lmdb.Error):
        env.info()
    assert base.resolve() / "test" not in registry._environments


def test_only_its_user_may_enter_and_all_bytes_are_there_from_the_start(base: Path, store: MemoryStore) -> None:
    create(store, handle(1), "a")
    for path in (base, base / "test", base / "test/lmdb"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for name in ("attached", "counters", "generations", "lmdb/data.mdb", "lmdb/lock.mdb"):
        assert stat.S_IMODE((base / "test" / name).stat().st_mode) == 0o600
    data = (base / "test/lmdb/data.mdb").stat()
    assert data.st_size == 1 << 20
    assert data.st_blocks * 512 >= data.st_size
    assert sorted(path.name for path in (base / "test").iterdir()) == ["attached", "counters", "generations", "lmdb"]
    for name, length in (("attached", 48), ("counters", 1 << 16), ("generations", 1 << 12)):
        mapped = (base / "test" / name).stat()
        assert mapped.st_size == length
        assert mapped.st_blocks * 512 >= length, "a write to a mapped file that lacks bytes ends the process"


def test_later_openers_take_the_size_from_the_file(base: Path, store: MemoryStore) -> None:
    create(store, handle(1), "a")

    def later() -> tuple[int, Any]:
        with closing(memory_store(base, map_size=8 << 20)) as other:
            return other.usage().total, value_of(other, handle(1))

    assert in_child(later) == (256, "a")
    store.environment.close()
    assert in_child(later) == (256, "a")


def test_a_closed_environment_opens_again_by_itself(store: MemoryStore) -> None:
    create(store, handle(1), "a")
    store.environment.close()
    assert value_of(store, handle(1)) == "a"
    store.environment.close()
    assert create(store, handle(2), "b")
    store.environment.close()
    assert store.environment.epoch > 0


def test_sessions_survive_the_death_of_all_processes(base: Path) -> None:
    def first() -> tuple[bytes, int]:
        store = memory_store(base)
        create(store, handle(1), "a")
        create(store, handle(2), "b")
        destroy(store, handle(2))
        uuid = uuid_of(store), store.environment.epoch
        os.write(ready, repr(uuid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
        return uuid

    listening, ready = os.pipe()
    with pytest.raises(Exception, match="without an answer"):
        in_child(first)
    said = os.read(listening, 1000).decode()
    os.close(listening)
    os.close(ready)
    with closing(memory_store(base)) as store:
        assert value_of(store, handle(1)) == "a"
        assert value_of(store, handle(2)) is Missing.DEAD
        assert repr((uuid_of(store), store.environment.epoch)) == said
        check_tables(store)


def test_a_store_made_by_a_newer_version_is_refused_and_left_as_it_is(store: MemoryStore, base: Path) -> None:
    create(store, handle(1), "a")
    put_meta(store, b"format", building.STORE_FORMAT + 1)
    store.environment.write(lambda txn, tables: txn.put(b"check", building._check(txn, tables), db=tables.meta))
    before = (base / "test/lmdb/data.mdb").read_bytes()
    store.close()
    again = memory_store(base)
    with closing(again), pytest.raises(UnsafeStore, match="newer version"):
        again.environment.open()
    assert (base / "test/lmdb/data.mdb").read_bytes()[8192:] == before[8192:]
    assert not list((base / "test").glob("quarantine*"))
    memory_store(base)  # the fixture closes one


def test_many_threads_that_come_first_open_one_environment(store: MemoryStore) -> None:
    barrier = threading.Barrier(8)
    opened: list[environments.Opened] = []

    def come() -> None:
        barrier.wait()
        opened.append(store.environment.open())

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 8
    assert len(set(map(id, opened))) == 1


def test_eight_processes_that_come_first_make_one_store(place: Path) -> None:
    """Each of them writes at once, and everybody finds all of it."""
    for attempt in range(10):
        base = place / str(attempt)

        def come(channel: Channel, base: Path = base) -> None:
            store = memory_store(base)
            number = channel.receive()
            assert create(store, handle(number), number)
            channel.send((uuid_of(store), store.environment.epoch))
            channel.receive()
            channel.send([value_of(store, handle(other)) for other in range(8)])
            channel.receive()

        with ExitStack() as stack:
            children = [stack.enter_context(Child(come)) for _ in range(8)]
            for number, child in enumerate(children):
                child.channel.send(number)
            assert len({child.channel.receive() for child in children}) == 1
            for child in children:
                assert child.ask() == list(range(8))


# ── dying while opening ───────────────────────────────────────────────────────────────────────────────────────


def _dying_at_line(number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that is killed at its `number`th line of the memory store; whether it came that far."""

    def run(_: Channel) -> None:
        left = number

        def trace(frame: FrameType, event: str, _arg: object) -> Any:
            nonlocal left
            if "shmsession/memory" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        work()
        sys.settrace(None)

    child = Child(run)
    status = child.wait()
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.soak
def test_whoever_dies_at_any_line_of_making_a_store_leaves_one_that_opens(place: Path) -> None:
    step = 1 if size(2, 1) == 2 else 3
    number, deaths = rng("lines").randrange(step), 0
    while True:
        base = place / str(number)
        maker = memory_store(base)
        died = _dying_at_line(number, lambda maker=maker: create(maker, handle(1), "a"))  # type: ignore[misc]
        with closing(maker):
            assert value_of(maker, handle(1)) in ("a", Missing.UNKNOWN)
            assert create(maker, handle(2), "b")
            check_tables(maker)
            assert not (base / "test/lmdb.new").exists()
        rmtree(base)
        if not died:
            break
        deaths += 1
        number += step
    assert deaths > 20
    report("G4 deaths while a store is made", lines=number, deaths=deaths)


@pytest.mark.soak
def test_whoever_dies_at_any_line_of_a_rebuild_loses_no_session(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(memory_store(place / "model")) as store:
        create(store, handle(1), "a")
        create(store, handle(2), "b")
        destroy(store, handle(2))
        found = contents(store).records
    monkeypatch.setattr(salvage, "records_in", lambda _: iter(found.items()))
    image = bytearray((place / "model/test/lmdb/data.mdb").read_bytes())
    image[:16] = bytes(16)
    step = 1 if size(2, 1) == 2 else 7
    number, deaths = rng("rebuild").randrange(step), 0
    while True:
        base = place / str(number)
        with closing(memory_store(base)) as store:
            store.environment.open()
        (base / "test/lmdb/data.mdb").write_bytes(image)
        maker = memory_store(base)
        died = _dying_at_line(number, maker.environment.open)
        with closing(maker):
            assert value_of(maker, handle(1)) == "a"
            assert value_of(maker, handle(2)) is Missing.DEAD
            assert create(maker, handle(3), "c")
            check_tables(maker)
        rmtree(base)
        if not died:
            break
        deaths += 1
        number += step
    assert deaths > 40 * (3 / step)
    report("G4 deaths while a store is rebuilt", lines=number, deaths=deaths)


@pytest.mark.soak
def test_whoever_is_killed_at_any_instant_while_others_open_leaves_a_store_that_opens(place: Path) -> None:
    """Some die while they make it, some while they attach or leave; one that lives reads and writes on."""
    rounds = size(1000, 60)
    random = rng("killed openers")
    base, killed = place / "base", 0
    live: Neighbour | None = None

    def come_and_go(_: object) -> None:
        while True:
            with closing(memory_store(base)) as store:
                create(store, handle(7), "x")

    try:
        for number in range(rounds):
            if number % 20 == 0:
                if live is not None:
                    live.kill()
                rmtree(base, ignore_errors=True)
                live = None
            children = [Child(come_and_go) for _ in range(2)]
            time.sleep(random.random() * 0.008)  # the instant of the kill, not a wait for anything
            for child in children:
                child.kill()
                killed += os.WIFSIGNALED(child.wait())
            if number % 20 == 10:
                live = Neighbour(base)
            if live is not None:
                assert live(create, handle(1000 + number), number)
            with closing(memory_store(base)) as store:
                assert value_of(store, handle(7)) in ("x", Missing.UNKNOWN)
                create(store, handle(number + 5000), "mine")
                check_tables(store)
    finally:
        if live is not None:
            live.kill()
    assert killed == 2 * rounds
    report("G4 kills while opening", rounds=rounds, killed=killed)


# ── replaced while attached ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", [".", "test", "test/lmdb", "test/lmdb/data.mdb"])
def test_after_the_files_were_removed_all_processes_agree_again(
    base: Path, store: MemoryStore, always_look: None, what: str
) -> None:
    create(store, handle(1), "old")
    with Neighbour(base) as neighbour:
        assert neighbour(value_of, handle(1)) == "old"
        before = uuid_of(store)
        target = base / what
        target.unlink() if target.is_file() else rmtree(target)
        assert create(store, handle(2), "mine")
        assert neighbour(value_of, handle(2)) == "mine"
        assert neighbour(create, handle(3), "theirs")
        assert value_of(store, handle(3)) == "theirs"
        assert value_of(store, handle(1)) is Missing.UNKNOWN
        assert neighbour(uuid_of) == uuid_of(store) != before
        check_tables(store)


def test_processes_look_once_a_second(store: MemoryStore) -> None:
    assert environments.LOOK_SECONDS <= 1.0
    opened = store.environment.open()
    assert opened.next_look <= time.monotonic() + environments.LOOK_SECONDS
    opened.next_look = 0.0
    store.load(handle(1), 0)
    assert 0 < opened.next_look <= time.monotonic() + environments.LOOK_SECONDS


def test_directories_that_come_and_go_while_processes_use_them_leave_all_in_one_store(
    base: Path, always_look: None
) -> None:
    """No use is refused, between which files of it the removal may ever have got."""
    with Neighbour(base) as first, Neighbour(base) as second:
        for number in range(100):
            for neighbour in (first, second):
                neighbour.channel.send((create, handle(number), number))
            rmtree(base / "test", ignore_errors=True)
            for neighbour in (first, second):
                assert neighbour.channel.receive() in (True, False)
        assert first(uuid_of) == second(uuid_of)


def test_a_process_that_attached_earlier_moves_to_a_rebuilt_store_at_its_next_use(
    base: Path, store: MemoryStore
) -> None:
    create(store, handle(1), "a")
    with Neighbour(base) as neighbour:
        assert neighbour(value_of, handle(1)) == "a"
        opened = store.environment.open()
        store.environment._quarantine(opened, "a test says so")
        assert create(store, handle(2), "b")
        assert neighbour(value_of, handle(2)) == "b"
        assert neighbour(value_of, handle(1)) == "a"
        assert neighbour(create, handle(3), "c")
        assert value_of(store, handle(3)) == "c"


def test_damage_met_in_a_file_that_is_not_in_place_any_more_harms_its_successor_not(
    base: Path, store: MemoryStore
) -> None:
    create(store, handle(1), "a")
    with Neighbour(base) as neighbour:
        opened = store.environment.open()
        rmtree(base / "test")
        assert neighbour(create, handle(2), "b")
        store.environment._quarantine(opened, "a test says so")
        assert value_of(store, handle(2)) == "b"
        assert not list((base / "test").glob("quarantine*"))


def test_a_commit_that_meets_a_rebuild_is_done_again_in_the_new_store(store: MemoryStore) -> None:
    opened = store.environment.open()
    runs = []

    def work(txn: lmdb.Transaction, tables: Any) -> int:
        runs.append(1)
        if len(runs) == 1:
            opened.words[building.GENERATION] += 1
        txn.put(b"mark", sequence_key(7), db=tables.meta)
        return len(runs)

    assert store.environment.write(work) == 2
    assert contents(store).meta[b"mark"] == sequence_key(7)


# ── readers ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_slots_of_killed_readers_are_freed_by_those_who_live(
    base: Path, store: MemoryStore, always_look: None
) -> None:
    create(store, handle(1), "a")
    with ExitStack() as stack:
        neighbours = [stack.enter_context(Neighbour(base)) for _ in range(5)]
        store.environment.open()
        for neighbour in neighbours:
            neighbour(hold_a_snapshot)
    assert store.environment.readers() == 5
    for _ in range(environments.READER_CHECK_LOOKS):
        value_of(store, handle(1))
    assert store.environment.readers() == 0


def test_a_full_table_of_dead_readers_is_cleared_by_whoever_meets_it(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "MAX_READERS", 3)
    with closing(memory_store(base, SystemClock())) as store:
        create(store, handle(1), "a")
        with Neighbour(base) as neighbour:
            assert neighbour(hold_all_slots) >= 3
        assert value_of(store, handle(1)) == "a"
        assert store.environment.readers() == 0


def test_live_readers_without_end_make_the_store_unusable_with_a_typed_error(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "MAX_READERS", 3)
    with closing(memory_store(base, SystemClock())) as store:
        create(store, handle(1), "a")
        with Neighbour(base) as neighbour:
            store.environment.open()
            neighbour(hold_all_slots)
            with pytest.raises(StoreError, match="attempts"):
                value_of(store, handle(1))
        assert value_of(store, handle(1)) == "a"


def test_a_writer_that_is_killed_inside_a_transaction_stops_nobody_and_leaves_nothing(
    base: Path, store: MemoryStore
) -> None:
    create(store, handle(1), "a")

    def die(channel: Channel) -> None:
        other = memory_store(base)
        channel.receive()

        def work(txn: lmdb.Transaction, tables: Any) -> None:
            txn.put(handle(2), b"half", db=tables.records)
            channel.send("inside")
            signal.pause()

        other.environment.write(work)

    with Child(die) as child:
        store.environment.open()
        child.ask("go")
        done: list[bool] = []
        writer = threading.Thread(target=lambda: done.append(create(store, handle(3), "c")))
        writer.start()
        assert value_of(store, handle(1)) == "a", "readers do not wait"
        assert done == []
        child.kill()
        wait_until(lambda: done)
        writer.join()
    assert value_of(store, handle(2)) is Missing.UNKNOWN
    assert value_of(store, handle(3)) == "c"
    check_tables(store)


def test_every_clock_of_a_new_store_is_noted(base: Path) -> None:
    clock = ManualClock()
    with closing(memory_store(base, clock)) as store:
        assert store.environment.epoch == clock.now()
        meta = contents(store).meta
        notes = {BUILT, LOSSES, PUT_BACK, RECALLED}
        assert meta.keys() == {b"format", b"epoch", b"uuid", b"size", b"check", b"clock", *notes}
        store.environment._quarantine(store.environment.open(), "a test says so")
        assert contents(store).meta[LOSSES] != meta[LOSSES], "a flusher may know losses of the store before"
    assert meta[BUILT] == sequence_key(clock.boot())
    assert meta[LOSSES] == meta[PUT_BACK] == meta[RECALLED]
