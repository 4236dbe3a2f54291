"""SQLite keeps the contract of backends, and bears what happens to files, locks and processes."""

import _thread
import asyncio
import os
import random
import resource
import signal
import sqlite3
import stat
import sys
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import quote

import pytest

from shmsession.backends import SENTINEL, Answer, Backend, Mark, Row, State, native
from shmsession.backends.sqlite import SQLiteBackend
from shmsession.backends.sqlite_file import SCHEMA, Statements
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing import BackendContract
from shmsession.testing.races import tell_one_story
from shmsession.testing.rows import dead, erased, handle_of, live, row_of, user_of
from tests.figures import SEED, report, rng, size
from tests.memory import Channel, Child, Died, in_child, wait_until

T = TypeVar("T")

LATER = 2**45
NOBODY = 65534


class TestSQLite(BackendContract):
    seed = SEED

    @pytest.fixture(autouse=True)
    def _database(self, place: Path) -> None:
        self.path = place / "sessions.db"

    def backend(self) -> Backend:
        return SQLiteBackend(self.path)


@pytest.fixture
def path(place: Path) -> Path:
    return place / "sessions.db"


def using(path: Path, work: Callable[[SQLiteBackend], Awaitable[T]], *, make: bool = True, **options: Any) -> T:
    """What `work` returns, with an open backend on an event loop of its own."""

    async def run() -> T:
        backend = SQLiteBackend(path, **options)
        await backend.open()
        try:
            if make:
                await backend.initialize()
            return await work(backend)
        finally:
            await backend.close()

    return asyncio.run(run())


def store(path: Path, *rows: Row) -> None:
    using(path, lambda backend: backend.write(rows))


def raw(path: Path, sql: str) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(sql).fetchall()


def check_integrity(path: Path) -> None:
    assert raw(path, "PRAGMA integrity_check") == [("ok",)]


@contextmanager
def locked(path: Path) -> Iterator[Callable[[], object]]:
    """Another process's transaction, as far as SQLite can tell; the function ends it."""
    with closing(sqlite3.connect(path, isolation_level=None, check_same_thread=False)) as db:
        db.execute("BEGIN IMMEDIATE")
        yield lambda: db.execute("COMMIT")


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = 20


def write_until_killed(channel: Channel, path: Path, first: int) -> None:
    """Batches of which each replaces all rows; each number is sent when its batch has been answered."""

    async def work(backend: SQLiteBackend) -> None:
        for number in range(first, first + 1_000_000):
            batch = [
                live(n, LATER, version=number, user=user_of(number % 3), body=b"%d." % number * (50 * n))
                for n in range(ROWS)
            ]
            answers = await backend.write(batch)
            assert all(answer.applied for answer in answers)
            channel.send(number)

    using(path, work)


@pytest.mark.soak
def test_a_writer_killed_at_any_instant_loses_no_answered_row_and_tears_no_batch(path: Path) -> None:
    kills, chance = size(200, 20), rng("sqlite kills")
    store(path, *(live(n, LATER, version=0) for n in range(ROWS)))
    answered, unanswered = 0, 0
    for _ in range(kills):
        goal = answered + chance.randrange(1, 40)
        with Child(lambda channel, first=answered + 1: write_until_killed(channel, path, first)) as child:  # type: ignore[misc]
            while answered < goal:
                answered = child.channel.receive()
            deadline = time.monotonic() + chance.random() * 0.002
            while time.monotonic() < deadline:
                pass
            os.kill(child.pid, 9)
            with suppress(Died):
                while True:
                    answered = child.channel.receive()

        async def look(backend: SQLiteBackend) -> int:
            found = [await backend.load(handle_of(n)) for n in range(ROWS)]
            versions = {row.version for row in found if row}
            assert len(versions) == 1, f"a batch was torn: {versions} (seed {SEED})"
            (version,) = versions
            assert [len(await backend.sessions_of(user_of(n))) for n in range(3)] == [
                ROWS * (n == version % 3 and version > 0) for n in range(3)
            ]
            for n, row in enumerate(found):
                assert row is not None
                assert row.body == b"%d." % version * (50 * n)
            return version

        stored = using(path, look, make=False)
        assert answered <= stored <= answered + 1, f"answered {answered}, stored {stored} (seed {SEED})"
        unanswered += stored > answered
        answered = stored
        check_integrity(path)
    report("G5 sqlite kill -9 of a writer", kills=kills, batches=answered, stored_unanswered=unanswered, lost=0, torn=0)


def test_processes_that_write_the_same_rows_agree_on_the_winner(path: Path) -> None:
    using(path, lambda backend: backend.count())

    def work(channel: Channel, process: int) -> None:
        chance = random.Random(f"{SEED}:{process}")

        async def write(backend: SQLiteBackend) -> list[Any]:
            sent: list[Any] = []
            for step in range(60):
                version = (step + chance.randrange(-3, 4)) * 1000 + step * 10 + process + 10_000
                batch = [
                    row_of(State.DEAD if chance.random() < 0.01 else State.LIVE, n, LATER, epoch=1, version=version)
                    for n in chance.sample(range(12), 6)
                ]
                sent += zip(batch, await backend.write(batch), strict=True)
            return sent

        channel.receive()
        channel.send(using(path, write))

    children = [Child(lambda channel, number=number: work(channel, number)) for number in range(3)]  # type: ignore[misc]
    sent: list[Any] = []
    for child in children:
        child.channel.send(None)
    for child in children:
        with child:
            sent += child.channel.receive()
    assert len(sent) == 3 * 60 * 6
    using(path, lambda backend: tell_one_story(backend, sent, f"seed {SEED}"))
    check_integrity(path)


def descriptors(path: Path) -> int:
    """How many of this process's descriptors are of the file."""
    held = 0
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            held += entry.readlink() == path
    return held


def test_a_forked_child_inherits_no_connection_and_opens_one_of_its_own(path: Path) -> None:
    async def work(backend: SQLiteBackend) -> None:
        await backend.write([live(1, LATER)])

        def child() -> tuple[Any, list[int]]:
            held = [descriptors(path)]

            async def ask() -> Any:
                found = await backend.load(handle_of(1))
                held.append(descriptors(path))
                await backend.write([live(2, LATER)])
                await backend.close()
                return found

            return asyncio.run(ask()), [*held, descriptors(path)]

        found, held = await asyncio.get_running_loop().run_in_executor(None, in_child, child)
        assert (found, held) == (live(1, LATER), [0, 1, 0])
        await backend.write([live(3, LATER)])
        assert await backend.count() == 3

    using(path, work)
    check_integrity(path)


def test_a_forked_child_goes_on_when_its_parent_closes(path: Path) -> None:
    """Its connection has locks of its own: the parent's is not the last one and takes no log away."""

    backend = SQLiteBackend(path)

    async def begin() -> None:
        await backend.open()
        await backend.initialize()
        await backend.write([live(1, LATER)])

    def child(channel: Channel) -> None:
        async def write() -> None:
            for number in range(10, 15):
                channel.receive()
                await backend.write([live(number, LATER)])
                channel.send(None)

        asyncio.run(write())

    asyncio.run(begin())
    with Child(child) as writer:
        writer.ask()
        asyncio.run(backend.write([live(2, LATER)]))
        asyncio.run(backend.close())
        for expected in (4, 5):
            writer.ask()
            assert in_child(lambda: using(path, lambda backend: backend.count())) == expected
        writer.ask()
    assert using(path, lambda backend: backend.count()) == 6
    check_integrity(path)


def test_a_fork_waits_until_the_thread_is_out_of_sqlite(path: Path) -> None:
    """A lock of the library that was taken at that moment would stay taken in the child for ever."""
    begun, end = threading.Event(), threading.Event()

    def slow(db: sqlite3.Connection) -> float:
        begun.set()
        assert end.wait(60)
        return time.monotonic()

    async def work(backend: SQLiteBackend) -> tuple[float, float]:
        job = asyncio.ensure_future(backend._ask(slow))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, begun.wait)
        fork = loop.run_in_executor(None, in_child, time.monotonic)
        await asyncio.sleep(0.05)
        end.set()
        return await job, await fork

    left, forked = using(path, work)
    assert left <= forked


# ── locks ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_lock_that_is_held_too_long_is_unavailable_and_nothing_was_written(path: Path) -> None:
    store(path, live(1, LATER))

    async def work(backend: SQLiteBackend) -> None:
        with locked(path) as unlock:
            with pytest.raises(BackendUnavailable, match=r"locked for 0\.1 s: see which process"):
                await backend.write([live(2, LATER)])
            for ask in (backend.initialize(), backend.sweep(LATER + 1, 1), backend.clear()):
                with pytest.raises(BackendUnavailable):
                    await ask
            assert await backend.load(handle_of(1)) == live(1, LATER)
            assert await backend.load(handle_of(2)) is None
            unlock()
        assert (await backend.write([live(2, LATER)]))[0].applied

    using(path, work, make=False, timeout=0.1)


def test_readers_go_on_while_a_writer_waits_for_a_lock(path: Path) -> None:
    store(path, live(1, LATER))

    async def work(backend: SQLiteBackend) -> None:
        with locked(path) as unlock:
            writing = asyncio.ensure_future(backend.write([live(2, LATER)]))
            for _ in range(20):
                assert await backend.load(handle_of(1)) == live(1, LATER)
            assert not writing.done()
            unlock()
            assert (await writing)[0].applied

    using(path, work, timeout=60)


def test_who_is_cancelled_while_waiting_for_a_lock_writes_nothing_later(path: Path) -> None:
    store(path, live(1, LATER))

    async def work(backend: SQLiteBackend) -> None:
        with locked(path) as unlock:
            writing = asyncio.ensure_future(backend.write([live(2, LATER)]))
            await backend.load(handle_of(1))
            writing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await writing
            await backend.load(handle_of(1))
            unlock()
        await backend.write([live(3, LATER)])
        assert await backend.load(handle_of(2)) is None
        assert raw(path, "SELECT count(*) FROM shmsession") == [(2,)]

    using(path, work)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────


def refusal(path: Path, kind: type[BackendError] = BackendError, *, make: bool = False, **options: Any) -> str:
    """The message of the error that every question meets."""

    async def work(backend: SQLiteBackend) -> str:
        for ask in (backend.load, backend.sessions_of):
            with pytest.raises(kind):
                await ask(handle_of(1))
        with pytest.raises(kind):
            await backend.count()
        with pytest.raises(kind):
            await backend.write([live(1, LATER)])
        with pytest.raises(kind) as raised:
            await (backend.initialize() if make else backend.load(handle_of(1)))
        assert type(raised.value) is kind
        assert str(path) in str(raised.value)
        return str(raised.value)

    return using(path, work, make=False, **options)


def test_the_file_and_its_logs_are_private_whatever_the_umask(path: Path) -> None:
    before = os.umask(0)
    try:

        async def work(backend: SQLiteBackend) -> None:
            await backend.write([live(1, LATER)])
            assert {file.name for file in path.parent.iterdir()} == {path.name, f"{path.name}-wal", f"{path.name}-shm"}
            for file in path.parent.iterdir():
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name

        using(path, work)
    finally:
        os.umask(before)


def test_what_is_answered_is_on_disk_and_readers_wait_for_nobody(path: Path) -> None:
    """`synchronous` FULL is 2: with 1, a power loss could revive what was destroyed."""

    async def ask(backend: SQLiteBackend) -> list[Any]:
        names = ("journal_mode", "synchronous", "secure_delete")
        return [(await backend._ask(backend._fetch, f"PRAGMA {name}"))[0][0] for name in names]

    assert using(path, ask) == [b"wal", 2, 1]


def test_nothing_of_a_destroyed_session_is_left_in_the_file(path: Path) -> None:
    secret = b"the secret of a session" * 300
    rows = [live(n, LATER, body=secret) for n in range(1, 20)]
    store(path, *rows)
    assert secret[:100] in path.read_bytes()
    store(path, *(dead(n, LATER) for n in range(1, 20)))
    assert {file.name for file in path.parent.iterdir()} == {path.name}
    assert b"the secret" not in path.read_bytes()


def test_a_missing_file_is_an_error_and_only_initialize_makes_it(path: Path) -> None:
    """Otherwise a file that was lost would look like sessions that never were."""
    assert "run `shmsession initdb`" in refusal(path, BackendUnavailable)
    assert not path.exists()
    store(path)
    assert path.exists()


def test_what_no_one_foresaw_is_an_error_with_what_sqlite_says(path: Path) -> None:
    store(path)
    raw(path, "ALTER TABLE shmsession RENAME COLUMN horizon TO end")
    said = refusal(path)
    assert "no such column: horizon: look at it with the sqlite3 program" in said


def test_a_row_that_nobody_can_have_written_is_an_error_and_not_an_absence_until_a_newer_one_comes(path: Path) -> None:
    store(path, live(1, LATER))
    raw(path, "UPDATE shmsession SET state = 9")
    newer = live(1, LATER, version=2)

    async def work(backend: SQLiteBackend) -> None:
        with pytest.raises(BackendError, match="is damaged: destroy it"):
            await backend.load(handle_of(1))
        assert [answer.applied for answer in await backend.write([newer])] == [True]
        assert await backend.load(handle_of(1)) == newer

    using(path, work)


def test_a_file_without_the_tables_is_an_error(path: Path) -> None:
    raw(path, "CREATE TABLE other (x)")
    assert "has no table shmsession: run `shmsession initdb`" in refusal(path)


@pytest.mark.parametrize("make", [False, True])
def test_a_missing_directory_is_unavailable_until_it_is_there(place: Path, make: bool) -> None:
    path = place / "missing" / "sessions.db"
    said = refusal(path, BackendUnavailable, make=make)
    assert "directory" in said
    path.parent.mkdir()
    store(path, live(1, LATER))


def test_a_directory_in_the_files_place_is_unavailable(path: Path) -> None:
    path.mkdir()
    assert "is a directory: name a file in it" in refusal(path, BackendUnavailable, make=True)


@pytest.mark.parametrize("make", [False, True])
def test_a_file_that_is_no_database_is_an_error_and_left_alone(path: Path, make: bool) -> None:
    path.write_bytes(b"a letter to Ada\n" * 500)
    assert "is no SQLite database: correct the path, or move that file away" in refusal(path, make=make)
    assert path.read_bytes() == b"a letter to Ada\n" * 500


def test_a_damaged_file_is_an_error_and_not_an_absence(path: Path) -> None:
    store(path, *(live(n, LATER, body=bytes(3000)) for n in range(400)))
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    with pytest.raises(BackendError, match="is damaged: stop all that use it, then restore it"):
        using(path, lambda backend: backend.load(handle_of(1)), make=False)
    path.write_bytes(whole)
    assert using(path, lambda backend: backend.count(), make=False) == 400


def test_a_row_of_no_known_state_stops_no_batch_and_is_made_whole(path: Path) -> None:
    """It counts as ERASED, and whatever is newer replaces it, also another ERASED row of the same horizon."""
    store(path, *(live(n, LATER) for n in range(1, 4)))
    raw(path, "UPDATE shmsession SET state = 7, body = x''")
    news = [live(1, LATER, version=9), erased(2, LATER, version=9), dead(3, LATER)]
    answers = using(path, lambda backend: backend.write(news))
    assert answers == [Answer(True, Mark(State.ERASED, 1, live(n, LATER).version)) for n in range(1, 4)]
    assert dict(raw(path, "SELECT handle, state FROM shmsession")) == {new.handle: new.state for new in news}


def test_a_full_disk_is_an_error_that_writes_nothing_and_passes(path: Path) -> None:
    async def work(backend: SQLiteBackend) -> None:
        await backend.write([live(1, LATER)])
        await backend._ask(backend._fetch, "PRAGMA max_page_count = 30")
        rows = [live(n, LATER, body=bytes(60_000)) for n in range(2, 10)]
        with pytest.raises(BackendError, match="is full, or its disk is: make room") as raised:
            await backend.write(rows)
        assert type(raised.value) is BackendError
        assert [await backend.load(handle_of(n)) for n in range(1, 4)] == [live(1, LATER), None, None]
        assert all(answer.applied for answer in await backend.write(rows))

    using(path, work)
    check_integrity(path)


def test_a_file_that_may_not_grow_is_unavailable_and_stays_whole(path: Path) -> None:
    """A limit on the size of files stands for a disk that fails in the middle of a write."""
    store(path, live(1, LATER))

    def child() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

        async def work(backend: SQLiteBackend) -> str:
            with pytest.raises(BackendUnavailable) as raised:
                await backend.write([live(n, LATER, body=bytes(60_000)) for n in range(2, 10)])
            assert await backend.load(handle_of(1)) == live(1, LATER)
            return str(raised.value)

        try:
            return using(path, work, make=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert "cannot be read or written: see what the system's log says" in in_child(child)
    assert using(path, lambda backend: backend.count(), make=False) == 1
    check_integrity(path)


@contextmanager
def others_file(path: Path, mode: int, directory: int) -> Iterator[None]:
    """Modes under which a user who is not root meets the file; put back afterwards."""
    path.chmod(mode)
    path.parent.chmod(directory)
    try:
        yield
    finally:
        path.parent.chmod(0o700)
        for file in path.parent.glob(f"{path.name}*"):  # SQLite gives its log the file's mode
            file.chmod(0o600)


def as_somebody(work: Callable[[], T]) -> T:
    """In a child that is not root: root may do everything."""

    def child() -> T:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        return work()

    return in_child(child)


def message(path: Path, ask: Callable[[SQLiteBackend], Awaitable[object]]) -> tuple[str, str]:
    async def work(backend: SQLiteBackend) -> tuple[str, str]:
        try:
            await ask(backend)
        except BackendError as error:
            return type(error).__name__, str(error)
        raise AssertionError("nothing was refused")

    return using(path, work, make=False)


def test_a_read_only_file_is_an_error_that_says_so(path: Path) -> None:
    store(path, live(1, LATER))
    with others_file(path, 0o444, 0o777):
        kind, said = as_somebody(lambda: message(path, lambda backend: backend.write([live(2, LATER)])))
    assert (kind, said) == (
        "BackendError", f"{path} is read-only: let this user write to it and to its directory"
    )  # fmt: skip
    assert using(path, lambda backend: backend.count()) == 1


def test_a_file_of_another_user_is_unavailable(path: Path) -> None:
    store(path, live(1, LATER))
    with others_file(path, 0o000, 0o755):
        kind, said = as_somebody(lambda: message(path, lambda backend: backend.load(handle_of(1))))
    assert kind == "BackendUnavailable"
    assert "cannot be opened: let this user read and write it, and make files in its directory" in said


def test_a_directory_that_is_closed_to_this_user_is_unavailable(path: Path) -> None:
    path.parent.chmod(0o555)
    try:
        kind, said = as_somebody(lambda: message(path, lambda backend: backend.initialize()))
    finally:
        path.parent.chmod(0o700)
    assert kind == "BackendUnavailable"
    assert "cannot be made (Permission denied): see that its directory is there, that this user may write" in said


def test_a_file_system_without_shared_memory_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system cannot have a write-ahead log; SQLite's VFS with lock files stands for it."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **options: connect(f"{name}&vfs=unix-dotfile", **options))
    kind, said = message(path, lambda backend: backend.initialize())
    assert (kind, said) == ("BackendError", f"{path} cannot have a write-ahead log: put it on a disk of this host")


def test_no_message_shows_a_body_that_is_damaged(path: Path) -> None:
    """The driver quotes text that it cannot decode."""
    store(path, live(1, LATER))
    raw(path, "UPDATE shmsession SET body = CAST(x'736563726574ff' AS TEXT)")

    async def work(backend: SQLiteBackend) -> str:
        try:
            return repr(await backend.load(handle_of(1)))
        except BackendError as error:
            return "".join(traceback.format_exception(error))

    assert "secret" not in using(path, work)


@pytest.mark.parametrize("column", ["epoch", "version", "horizon"])
def test_a_row_whose_numbers_are_none_is_damaged(path: Path, column: str) -> None:
    store(path, live(1, LATER))
    raw(path, f"UPDATE shmsession SET {column} = 'text'")
    kind, said = message(path, lambda backend: backend.load(handle_of(1)))
    assert kind == "BackendError"
    assert "is damaged" in said


def test_a_batch_is_a_handful_of_statements(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of a statement gives up Python's lock, and getting it back takes long where a worker is busy."""
    traced: list[str] = []
    connect: Callable[..., sqlite3.Connection] = sqlite3.connect

    def tracing(name: str, **options: Any) -> sqlite3.Connection:
        db = connect(name, **options)
        db.set_trace_callback(traced.append)
        return db

    monkeypatch.setattr(sqlite3, "connect", tracing)

    async def work(backend: SQLiteBackend) -> None:
        for version in (1, 2):
            traced.clear()
            batch = [live(n, LATER)._replace(version=version) for n in range(1, 502)]
            assert all(answer.applied for answer in await backend.write(batch))
            assert [statement.split()[0] for statement in traced] == ["BEGIN", "SELECT", "INSERT", "COMMIT"]

    using(path, work)


def test_a_batch_that_has_more_values_than_a_statement_may_is_written_in_several(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect: Callable[..., sqlite3.Connection] = sqlite3.connect

    def limited(name: str, **options: Any) -> sqlite3.Connection:
        db = connect(name, **options)
        db.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 999)
        return db

    monkeypatch.setattr(sqlite3, "connect", limited)
    rows = [live(n, LATER) for n in range(1, 1201)]

    async def work(backend: SQLiteBackend) -> None:
        assert all(answer.applied for answer in await backend.write(rows))
        assert not any(answer.applied for answer in await backend.write(rows))
        assert [await backend.load(row.handle) for row in rows] == rows

    using(path, work)


def test_a_file_that_is_removed_while_it_is_open_is_an_error_and_a_new_one_is_noticed(path: Path) -> None:
    """Whoever held on to the removed file would write into the void."""

    async def work(backend: SQLiteBackend) -> None:
        await backend.write([live(1, LATER)])
        for file in path.parent.iterdir():
            file.unlink()
        with pytest.raises(BackendUnavailable, match="is not there"):
            await backend.load(handle_of(1))
        with pytest.raises(BackendUnavailable, match="is not there"):
            await backend.write([live(2, LATER)])
        await asyncio.get_running_loop().run_in_executor(None, store, path, live(3, LATER))
        assert [await backend.load(handle_of(n)) for n in (1, 2, 3)] == [None, None, live(3, LATER)]

    using(path, work)


# ── the schema ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("version", "says"), [(SCHEMA + 1, "upgrade shmsession"), (SCHEMA - 1, "remove them, or choose others by table=")]
)
def test_another_versions_schema_is_refused_by_everything_and_left_alone(path: Path, version: int, says: str) -> None:
    store(path, live(1, LATER))
    raw(path, f"UPDATE shmsession_schema SET version = {version}")
    for make in (False, True):
        said = refusal(path, make=make)
        assert f"have schema {version}, this version of shmsession knows {SCHEMA}: {says}" in said
    assert raw(path, "SELECT version FROM shmsession_schema") == [(version,)]
    raw(path, f"UPDATE shmsession_schema SET version = {SCHEMA}")
    assert using(path, lambda backend: backend.count()) == 1


def test_tables_of_different_names_in_one_file_know_nothing_of_each_other(path: Path) -> None:
    store(path, live(1, LATER))
    for table in ("order", "Shop2"):
        assert using(path, lambda backend: backend.load(handle_of(1)), table=table) is None
        assert using(path, lambda backend: backend.write([live(2, LATER)]), table=table)[0].applied
        assert using(path, lambda backend: backend.count(), table=table.upper(), make=False) == 1
    assert using(path, lambda backend: backend.load(handle_of(2))) is None


@pytest.mark.parametrize("table", ["", "1st", "a-b", 'a"b', "a b", "a;b", "sqlite_x", "SQLITE_X", "é", "x" * 42, "a\n"])
def test_a_table_name_that_is_no_identifier_is_refused(table: str) -> None:
    with pytest.raises(ConfigError, match="write letters, digits and _"):
        SQLiteBackend("x.db", table=table)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_must_be_positive(timeout: float) -> None:
    with pytest.raises(ConfigError, match="timeout: write seconds, more than 0"):
        SQLiteBackend("x.db", timeout=timeout)
    with pytest.raises(ConfigError, match="timeout: write seconds, more than 0"):
        SQLiteBackend(f"sqlite:///x.db?timeout={timeout}")


@pytest.mark.parametrize("query", ["table=", "table=a-b", "timeout=", "timeout=soon"])
def test_options_in_a_url_are_checked_too(query: str) -> None:
    with pytest.raises(ConfigError, match=query.partition("=")[0]):
        SQLiteBackend(f"sqlite:///x.db?{query}")


def test_every_question_has_an_index(path: Path) -> None:
    """None reads all rows, and none sorts."""
    store(path, *(row_of(State(n % 3 + 1), n, LATER + n, epoch=1, version=1) for n in range(300)))
    sql = Statements("shmsession")
    plans = {
        sql.load: "shmsession (handle=?)", sql.stored(3): "shmsession (handle=?)",
        sql.of_user: "shmsession_live (user=?",
        sql.live: "USING COVERING INDEX shmsession_live", sql.handles: "(handle>?)", sql.page: "(handle>?)",
        sql.sweep: "shmsession_horizon (horizon<?)", sql.kill: "(handle>? AND handle<?)",
    }  # fmt: skip
    with closing(sqlite3.connect(path)) as db:
        for statement, index in plans.items():
            values = [SENTINEL] * statement.count("?")
            plan = "\n".join(row[-1] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}", values))
            assert index.replace("shmsession (", "sqlite_autoindex_shmsession_1 (") in plan, plan
            assert "TEMP B-TREE" not in plan, plan
            assert "SCAN shmsession\n" not in f"{plan}\n", plan


# ── the object ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_path_is_relative_with_three_slashes_and_absolute_with_four(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    for written in ("sub/s.db", "sqlite:///sub/s.db", "SQLite:///sub/s.db", f"sqlite:///{place}/sub/s.db"):
        assert SQLiteBackend(written).path == place / "sub" / "s.db"
    assert SQLiteBackend(place / "a?b#c.db").path == place / "a?b#c.db"
    assert SQLiteBackend("sqlite:///a%3Fb%23c%25.db").path == place / "a?b#c%.db"
    backend = SQLiteBackend("sqlite:///s.db?table=shop&timeout=2")
    monkeypatch.chdir("/")
    assert backend.path == place / "s.db"
    assert repr(backend) == f"<SQLiteBackend {place / 's.db'}, table shop>"
    assert SQLiteBackend("s.db?timeout=x").path == Path("/s.db?timeout=x"), "a path is no URL"


@pytest.mark.parametrize("name", ["a?b#c%41.db", "ä ö.db", "mode=memory.db"])
def test_any_name_of_a_file_is_that_name(place: Path, name: str) -> None:
    store(place / name, live(1, LATER))
    assert [file.name for file in place.iterdir()] == [name]
    url = f"sqlite:///{quote(str(place / name))}"
    assert SQLiteBackend(url).path == place / name


@pytest.mark.parametrize(
    "url",
    ["sqlite:", "sqlite://", "sqlite:///", "sqlite://s.db", "sqlite://host/s.db", ":memory:", "", "sqlite:///:memory:",
     "sqlite:///s.db?mode=ro", "sqlite:///s.db?timeout=1&x=", "sqlite:///s.db#x", "sqlite:///s.db?table=a#x", "sqlite:///a%00b"],
)  # fmt: skip
def test_a_url_without_a_file_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"write sqlite:///file\.db"):
        SQLiteBackend(url)


def test_nothing_is_opened_before_the_first_question(path: Path) -> None:
    async def work(backend: SQLiteBackend) -> None:
        assert list(path.parent.iterdir()) == []

    using(path, work, make=False)


def test_a_backend_that_is_not_open_is_unavailable(path: Path) -> None:
    async def work(backend: SQLiteBackend) -> SQLiteBackend:
        return backend

    for backend in (using(path, work), SQLiteBackend(path)):
        with pytest.raises(BackendUnavailable, match="is closed: open the backend first"):
            asyncio.run(backend.load(handle_of(1)))


def test_an_event_loop_that_ends_early_leaves_the_thread_at_work(path: Path) -> None:
    backend = SQLiteBackend(path)
    begun, done = threading.Event(), threading.Event()
    waiting: list[asyncio.Future[None]] = []

    async def leave() -> None:
        await backend.open()
        await backend.initialize()
        loop = asyncio.get_running_loop()

        def outlive(_: object) -> None:
            begun.set()
            wait_until(loop.is_closed)
            done.set()

        waiting.append(asyncio.ensure_future(backend._ask(outlive)))
        await loop.run_in_executor(None, begun.wait)

    async def come_again() -> int:
        count = await backend.count()
        await backend.close()
        return count

    asyncio.run(leave())
    assert asyncio.run(come_again()) == 0
    assert done.is_set()


def test_the_thread_ends_with_close(path: Path) -> None:
    before = len(list(Path("/proc/self/task").iterdir()))
    for _ in range(5):
        store(path, live(1, LATER))
    wait_until(lambda: len(list(Path("/proc/self/task").iterdir())) <= before)
    assert not native._threads


def test_the_thread_is_native_when_gevent_has_replaced_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greenlets would stop the event loop whenever SQLite waits."""
    originals = {name: getattr(_thread, name) for name in ("start_new_thread", "allocate_lock")}

    def replaced(*_: object) -> None:
        raise AssertionError("a greenlet")

    for name in originals:
        monkeypatch.setattr(_thread, name, replaced)
    stub = SimpleNamespace(get_original=lambda module, name: originals[name] if module == "_thread" else None)
    monkeypatch.setitem(sys.modules, "gevent.monkey", stub)
    thread = native.NativeThread()

    async def work() -> int:
        number = await thread.run(_thread.get_ident)
        await thread.end(lambda: None)
        return number

    assert asyncio.run(work()) != _thread.get_ident()


def test_what_a_job_raises_is_raised_where_it_is_waited_for() -> None:
    thread = native.NativeThread()

    def fail() -> None:
        raise KeyboardInterrupt("pressed")

    async def work() -> None:
        with pytest.raises(KeyboardInterrupt, match="pressed"):
            await thread.run(fail)
        assert await thread.run(lambda: 7) == 7
        await thread.end(lambda: None)

    asyncio.run(work())


def test_a_job_that_nobody_waits_for_any_more_is_not_begun_and_one_that_has_begun_is_ended() -> None:
    thread = native.NativeThread()
    begun, end = threading.Event(), threading.Event()
    done: list[str] = []
    complaints: list[Any] = []

    def slow() -> None:
        begun.set()
        assert end.wait(60)
        done.append("slow")

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        first = asyncio.ensure_future(thread.run(slow))
        second = asyncio.ensure_future(thread.run(lambda: done.append("second")))
        await loop.run_in_executor(None, begun.wait)
        for task in (first, second):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        end.set()
        ending = asyncio.ensure_future(thread.end(lambda: done.append("last")))
        await asyncio.sleep(0)
        ending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await ending
        await loop.run_in_executor(None, wait_until, lambda: "last" in done)
        await asyncio.sleep(0)

    asyncio.run(work())
    assert done == ["slow", "last"]
    assert complaints == []


def test_a_batch_of_any_size_is_one_transaction(path: Path) -> None:
    """More rows than a statement takes values."""

    async def work(backend: SQLiteBackend) -> None:
        rows = [live(n, LATER, version=2) for n in range(2345)]
        assert not any(answer.before for answer in await backend.write(rows))
        seen = raw(path, "SELECT count(*) FROM shmsession")
        assert seen == [(2345,)]
        assert [answer.before for answer in await backend.write(rows)] == [row.mark for row in rows]
        broken = Row._make([*live(9999, LATER)[:6], None])
        with pytest.raises(BackendError, match="NOT NULL constraint failed"):
            await backend.write([*(row._replace(version=3) for row in rows), broken])
        assert await backend.load(handle_of(1)) == rows[1]

    using(path, work)
