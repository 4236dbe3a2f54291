"""Forks: no environment is shared, no commit lost, and a fork that Python does not see is refused in clear words."""

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lmdb
import pytest

from shmsession.clock import SystemClock
from shmsession.errors import UnsafeStore
from shmsession.memory import environment as environments
from shmsession.memory.building import Building
from shmsession.memory.store import MemoryStore, Missing
from shmsession.memory.tables import index
from shmsession.testing import make_store
from tests.figures import report, size
from tests.memory import (
    Channel,
    Child,
    check_tables,
    closing,
    contents,
    create,
    destroy,
    handle,
    hold_a_snapshot,
    in_child,
    memory_store,
    refusal,
    value_of,
    wait_until,
)

if TYPE_CHECKING:
    from multiprocessing.queues import SimpleQueue

PAUSE = 0.0002
"""Between two operations of a busy thread: threads that never pause starve each other of the interpreter's lock."""


@pytest.fixture
def base(place: Path) -> Path:
    return place / "base"


@pytest.fixture
def store(base: Path) -> Iterator[MemoryStore]:
    with closing(memory_store(base, SystemClock())) as opened:
        yield opened


def fork_past_python() -> int:
    """What uWSGI, or a C extension, does: none of Python's fork hooks runs."""
    return int(ctypes.PyDLL(None).fork())


def test_a_child_opens_an_environment_of_its_own_and_both_go_on(store: MemoryStore) -> None:
    create(store, handle(1), "parent")
    before = store.environment.open()

    def child() -> tuple[Any, bool, bool]:
        inherited = store.environment._opened
        found = value_of(store, handle(1))
        create(store, handle(2), "child")
        return found, inherited is None, store.environment.open().pid == os.getpid()

    assert in_child(child) == ("parent", True, True)
    assert value_of(store, handle(2)) == "child"
    assert store.environment.open() is not before
    check_tables(store)


def test_a_store_that_was_never_opened_may_be_forked_too(store: MemoryStore) -> None:
    assert in_child(lambda: create(store, handle(1), "child"))
    assert value_of(store, handle(1)) == "child"


def test_children_of_children_work(store: MemoryStore) -> None:
    create(store, handle(0), 0)

    def descend(depth: int) -> int:
        create(store, handle(depth), depth)
        return 1 + in_child(lambda: descend(depth + 1)) if depth < 4 else 1

    assert descend(1) == 4
    assert [value_of(store, handle(depth)) for depth in range(5)] == [0, 1, 2, 3, 4]


def test_the_end_of_a_child_disturbs_no_reader_of_the_parent(store: MemoryStore) -> None:
    """Not even one that ends through the interpreter's own end."""
    create(store, handle(1), "a")

    def leave(channel: Channel) -> None:
        value_of(store, handle(1))
        store.close()
        channel.send("closed")

    with Child(leave) as child:
        assert child.channel.receive() == "closed"
        hold_a_snapshot(store)
        child.wait()
    assert store.environment.readers() == 1


def test_a_session_store_survives_forks_of_its_user(place: Path) -> None:
    """Sessions, cookies and counters: what an application sees."""
    store = make_store(place / "base", None, map_size=1 << 20)
    session = store.session()
    session["n"] = 0
    session.save()
    assert session.id is not None

    def child() -> int:
        return sum(bool(store.session(session.id).increment("n")) for _ in range(50))

    children = [Child(lambda channel: channel.send(child())) for _ in range(4)]
    for _ in range(50):
        store.session(session.id).increment("n")
    assert [one.channel.receive() for one in children] == [50] * 4
    for one in children:
        one.wait()
    assert store.session(session.id)["n"] == 250
    store.close()


@pytest.mark.soak
def test_forks_in_the_midst_of_busy_readers_and_writers_lose_no_commit(base: Path) -> None:
    """In a map with room for the tombstones of as many writes as the threads find time for."""
    with closing(memory_store(base, SystemClock(), map_size=256 << 20)) as store:
        _fork_among_threads(store)


def _fork_among_threads(store: MemoryStore) -> None:
    forks = size(1000, 60)
    stop = threading.Event()
    written: list[list[int]] = [[], []]
    failures: list[BaseException] = []

    def write(thread: int) -> None:
        number = 0
        while not stop.wait(PAUSE):
            number += 1
            key = handle((thread + 1) * 10**6 + number)
            if not create(store, key, number) or value_of(store, key) != number:
                failures.append(AssertionError(f"{thread}/{number}"))
            written[thread].append(number)
            if number > 40:
                destroy(store, handle((thread + 1) * 10**6 + number - 40))

    def read() -> None:
        while not stop.wait(PAUSE):
            if value_of(store, handle(7)) != "seven":
                failures.append(AssertionError("a read that found nothing"))

    def guarded(work: Any, *arguments: object) -> None:
        try:
            work(*arguments)
        except BaseException as error:  # noqa: BLE001  # told by the test
            failures.append(error)

    create(store, handle(7), "seven")
    threads = [threading.Thread(target=guarded, args=(write, thread)) for thread in range(2)]
    threads += [threading.Thread(target=guarded, args=(read,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(forks):
            key = handle(5 * 10**6 + number)
            assert in_child(lambda key=key, number=number: create(store, key, number))  # type: ignore[misc]
            assert value_of(store, key) == number
            destroy(store, key)
            if number % 10 == 0:
                _make_room(store)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    for writer, numbers in enumerate(written):
        for number in numbers[-30:]:
            assert value_of(store, handle((writer + 1) * 10**6 + number)) == number
    check_tables(store)
    report("Forks with busy threads", forks=forks, commits=sum(map(len, written)))


def _make_room(store: MemoryStore) -> None:
    """Tombstones need a minute; these need none, and the map is small."""

    def work(txn: lmdb.Transaction, tables: Any) -> None:
        txn.drop(tables.expiry, delete=False)
        for key in list(txn.cursor(tables.records).iternext(values=False)):
            raw = txn.get(key, db=tables.records)
            record = store._seal.open(bytes(key), bytes(raw or b""))
            assert record is not None
            if record.data:
                index(txn, tables, bytes(key), record.header)
            else:
                txn.delete(key, db=tables.records)

    store.environment.write(work)


def test_a_fork_waits_for_a_write_of_another_thread_and_the_child_finds_its_commit(store: MemoryStore) -> None:
    """The child is born with no transaction open, and no lock held by a thread that it does not have."""
    inside, go_on = threading.Event(), threading.Event()

    def work(txn: lmdb.Transaction, tables: Any) -> None:
        txn.put(b"mark", b"here", db=tables.meta)
        inside.set()
        go_on.wait()

    writer = threading.Thread(target=lambda: store.environment.write(work))
    writer.start()
    inside.wait()
    threading.Timer(0.05, go_on.set).start()
    assert in_child(lambda: (contents(store).meta[b"mark"], create(store, handle(1), "child"))) == (b"here", True)
    assert go_on.is_set()
    writer.join()
    assert value_of(store, handle(1)) == "child"


def test_a_fork_in_the_midst_of_opening_waits_for_it(store: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, go_on = threading.Event(), threading.Event()
    make_ready = Building.make_ready

    def slowly(*args: Any) -> None:
        inside.set()
        go_on.wait()
        make_ready(*args)

    monkeypatch.setattr(Building, "make_ready", slowly)
    opener = threading.Thread(target=store.environment.open)
    opener.start()
    inside.wait()
    threading.Timer(0.05, go_on.set).start()
    assert in_child(lambda: create(store, handle(1), "child"))
    opener.join()
    assert value_of(store, handle(1)) == "child"


# ── the library's own ways ────────────────────────────────────────────────────────────────────────────────────


def _worker(base: str, answers: "SimpleQueue[object]") -> None:
    with closing(memory_store(Path(base), SystemClock())) as store:
        found = value_of(store, handle(1))
        create(store, handle(os.getpid()), "worker")
        answers.put((found, os.getpid()))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_multiprocessing_shares_the_sessions_and_nothing_else(base: Path, store: MemoryStore, method: Any) -> None:
    create(store, handle(1), "parent")
    context = multiprocessing.get_context(method)
    answers: SimpleQueue[Any] = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(str(base), answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
        worker.close()
    answers.close()
    for value, pid in found:
        assert value == "parent"
        assert value_of(store, handle(pid)) == "worker"


PROGRAM = """
import sys
from pathlib import Path
from shmsession.clock import SystemClock
from tests.memory import create, handle, memory_store, value_of
store = memory_store(Path(sys.argv[1]), SystemClock())
print(value_of(store, handle(1)), create(store, handle(2), "program"))
store.close()
"""


def test_a_subprocess_shares_the_sessions_and_closes_nothing_of_ours(base: Path, store: MemoryStore) -> None:
    create(store, handle(1), "parent")
    opened = store.environment.open()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(base)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "parent True\n"
    assert value_of(store, handle(2)) == "program"
    assert store.environment.open() is opened


def test_a_program_started_by_fork_and_exec_inherits_no_lock(base: Path, store: MemoryStore) -> None:
    """Even where descriptors are passed on: it would hold the claim on the directory beyond our death."""
    create(store, handle(1), "a")
    program = (
        "import os\n"
        "for name in os.listdir('/proc/self/fd'):\n"
        "    if os.path.exists('/proc/self/fd/' + name): print(os.readlink('/proc/self/fd/' + name))"
    )
    listing = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, close_fds=False
    ).stdout
    assert "attached" not in listing
    assert "lock.mdb" not in listing


# ── past Python's hooks ───────────────────────────────────────────────────────────────────────────────────────


def test_a_fork_past_python_s_hooks_is_refused_whenever_the_store_is_used(base: Path, store: MemoryStore) -> None:
    create(store, handle(1), "parent")

    def child() -> list[str]:
        attempts = (
            lambda: value_of(store, handle(1)),
            lambda: create(store, handle(2), "child"),
            lambda: store.count(),
            lambda: store.environment.open(),
            lambda: memory_store(base).environment.open(),
            lambda: value_of(store, handle(1)),
        )
        return [refusal(attempt, UnsafeStore) for attempt in attempts]

    messages = in_child(child, fork_past_python)
    assert len(messages) == 6
    for message in messages:
        assert "forked past Python" in message
        assert "lazy-apps" in message
    assert value_of(store, handle(2)) is Missing.UNKNOWN
    check_tables(store)


def test_what_such_a_child_does_to_it_disturbs_the_parent_in_nothing(base: Path, store: MemoryStore) -> None:
    """Closing what was inherited would free the parent's reader slots and drop its claim on the directory."""
    create(store, handle(1), "parent")
    hold_a_snapshot(store)

    def child() -> str:
        store.environment.close()
        store.close()
        return "closed"

    assert in_child(child, fork_past_python) == "closed"
    assert store.environment.readers() == 1
    assert not in_child(lambda: _is_alone(base), fork_past_python), "the parent is known to be attached"


def _is_alone(base: Path) -> bool:
    """Whether somebody who comes now believes that nobody is there."""
    descriptor = os.open(base / "test/attached", os.O_RDWR)
    try:
        return environments._try_exclusive(descriptor)
    finally:
        os.close(descriptor)


LEAVING_PROGRAM = """
import ctypes, os, sys
from pathlib import Path
from shmsession.clock import SystemClock
from tests.memory import create, handle, hold_a_snapshot, memory_store
store = memory_store(Path(sys.argv[1]), SystemClock())
create(store, handle(1), "parent")
hold_a_snapshot(store)
pid = ctypes.PyDLL(None).fork()
if pid == 0:
    sys.exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), store.environment.readers(), flush=True)
"""


def test_the_interpreter_s_end_in_such_a_child_disturbs_the_parent_in_nothing(base: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVING_PROGRAM, str(base)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "0 1\n", done.stderr


def test_such_a_fork_before_the_first_use_is_none_of_our_business(store: MemoryStore) -> None:
    assert in_child(lambda: create(store, handle(1), "child"), fork_past_python)
    assert value_of(store, handle(1)) == "child"


def test_such_a_child_is_refused_even_while_a_thread_of_the_parent_held_the_lock(store: MemoryStore) -> None:
    """That thread is not in the child: waiting for it would be for ever."""
    inside, go_on = threading.Event(), threading.Event()

    def work(_txn: lmdb.Transaction, _tables: Any) -> None:
        inside.set()
        go_on.wait()

    store.environment.open()
    writer = threading.Thread(target=lambda: store.environment.write(work))
    writer.start()
    inside.wait()

    def child(channel: Channel) -> None:
        signal.alarm(30)
        channel.send(
            [
                refusal(lambda: create(store, handle(2), "child"), UnsafeStore),
                refusal(lambda: value_of(store, handle(1)), UnsafeStore),
            ]
        )

    with Child(child, fork_past_python) as refused:
        messages = refused.channel.receive()
        assert all("forked past" in message for message in messages)
    go_on.set()
    writer.join()
    wait_until(lambda: create(store, handle(3), "parent"))


def test_a_session_store_says_it_too(place: Path) -> None:
    store = make_store(place / "base", None, map_size=1 << 20)
    session = store.session()
    session["n"] = 1
    session.save()
    assert session.id is not None
    wanted = session.id
    message = in_child(lambda: refusal(lambda: store.session(wanted), UnsafeStore), fork_past_python)
    assert "forked past" in message
    assert wanted not in message
    store.close()
