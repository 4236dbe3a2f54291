"""SurrealDB's engine within the process: one process has it, and all others are refused with the reason."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from shmsession.backends import Backend, connect
from shmsession.backends.surrealdb import SurrealDBBackend
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing import BackendContract
from tests.figures import SEED
from tests.questions import asynchronous, live, said
from tests.servers import ASGI, PATIENCE, SYNC, Kind, Server, alive, wait_for
from tests.test_backend_surrealdb import opened

_tables: Final = count(1)


@pytest.fixture(autouse=True)
def locks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of tables in memory are made here."""
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr("tempfile.tempdir", None)


@pytest.fixture
def url(place: Path) -> str:
    return f"surrealdb+surrealkv://{place}/sessions"


class TestDirectory(BackendContract):
    """The contract, in files."""

    seed = SEED

    @pytest.fixture(autouse=True)
    def _database(self, url: str) -> None:
        self.url = url

    def backend(self) -> Backend:
        return connect(self.url)


class TestMemory(BackendContract):
    """The contract, in memory."""

    seed = SEED

    @pytest.fixture(autouse=True)
    def _database(self, place: Path) -> None:
        self.table = f"test{next(_tables)}"

    def backend(self) -> Backend:
        return connect("surrealdb+mem://", table=self.table)


HOLD = """
import asyncio, sys
from shmsession.backends import connect
from tests.questions import live

async def hold():
    backend = connect(sys.argv[1])
    await backend.open()
    await backend.initialize()
    await backend.write([live(number) for number in range(50)])
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await backend.close()

asyncio.run(hold())
"""


@contextmanager
def held(url: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process has it open, with 50 rows in it, until it reads a line."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("kind", ["directory", "memory"])
def test_another_process_is_refused_until_this_one_lets_go(url: str, kind: str) -> None:
    """And is told what to do instead."""
    url = url if kind == "directory" else "surrealdb+mem://?table=shared"

    async def refused() -> None:
        with pytest.raises(ConfigError, match=r"another process has .* surrealdb\+ws://"):
            await SurrealDBBackend(url, timeout=0.2).open()

    async def open_when_it_has_gone(process: "subprocess.Popen[bytes]") -> None:
        opening = asyncio.create_task(find(SurrealDBBackend(url, timeout=PATIENCE)))
        await asyncio.sleep(0)
        process.kill()
        assert await opening == (50 if kind == "directory" else 0)

    async def find(backend: SurrealDBBackend) -> int:
        await backend.open()
        try:
            await backend.initialize()
            return await backend.count()
        finally:
            await backend.close()

    with held(url) as process:
        asyncio.run(refused())
        asyncio.run(open_when_it_has_gone(process))


def test_what_was_answered_survives_kill_9(url: str) -> None:
    for _ in range(3):
        with held(url) as process:
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE)
    asyncio.run(all_there(url))


async def all_there(url: str) -> None:
    async with opened(url) as backend:
        for number in range(50):
            assert await backend.load(live(number).handle) == live(number)


def test_another_table_in_memory_may_be_another_processes() -> None:
    async def play() -> None:
        async with opened(f"surrealdb+mem://?table=mine{next(_tables)}") as backend:
            assert await backend.count() == 0

    with held("surrealdb+mem://?table=theirs"):
        asyncio.run(play())


def test_a_forked_child_is_refused_and_disturbs_its_parent_in_nothing(url: str) -> None:
    """What runs the engine does not survive a fork, also when it was closed before."""
    with asyncio.Runner() as runner:
        backend = SurrealDBBackend(url)
        runner.run(backend.open())
        runner.run(backend.initialize())
        runner.run(backend.write([live(1)]))
        in_a_child(backend)
        assert runner.run(backend.load(live(1).handle)) == live(1)
        runner.run(backend.close())
        in_a_child(backend)
        runner.run(backend.open())
        assert runner.run(backend.load(live(1).handle)) == live(1)
        runner.run(backend.close())


def in_a_child(backend: SurrealDBBackend) -> None:
    async def ask() -> None:
        assert "not open" in await said(backend.load(live(1).handle))
        await backend.close()  # which is the parent's
        with pytest.raises(ConfigError, match="fork"):
            await backend.open()

    child = os.fork()
    if child == 0:
        status = 1
        try:
            asyncio.run(ask())
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_directory_is_private_and_named_for_the_key_beside_it(place: Path, url: str) -> None:
    async def make() -> None:
        async with opened(url):
            pass

    backend = connect(url)
    assert isinstance(backend, SurrealDBBackend)
    assert backend.path == place / "sessions"
    assert not backend.remote
    asyncio.run(make())
    assert backend.path.stat().st_mode & 0o777 == 0o700
    assert Path(f"{backend.path}.lock").stat().st_mode & 0o777 == 0o600
    assert SurrealDBBackend("surrealdb+surrealkv://sessions").path == Path("sessions").absolute()


@asynchronous
async def test_a_directory_that_cannot_be_used_is_an_error_that_says_why(place: Path) -> None:
    backend = SurrealDBBackend(f"surrealdb+surrealkv://{place}/missing/sessions")
    assert "No such file" in await said(backend.open(), BackendError)
    (place / "file").touch()
    for _ in range(2):
        assert "File exists" in await said(SurrealDBBackend(f"surrealdb+surrealkv://{place}/file").open(), BackendError)


@asynchronous
async def test_closing_waits_for_the_question_at_hand_and_makes_up_no_answer(url: str) -> None:
    async with opened(url) as backend:
        writing = asyncio.create_task(backend.write([live(number) for number in range(300)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting = asyncio.create_task(backend.load(live(1).handle))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await backend.close()
        assert len(await writing) == 300
        (found,) = await asyncio.gather(waiting, return_exceptions=True)
        assert found == live(1) or isinstance(found, BackendUnavailable)
        await backend.open()
        assert await backend.count() == 300


@asynchronous
async def test_a_question_that_is_late_is_unavailable_and_the_next_is_answered(url: str) -> None:
    async with opened(url) as backend:
        rows = [live(number) for number in range(300)]
        await backend.write(rows)
        hasty = SurrealDBBackend(url, timeout=0.001)
        await hasty.open()
        assert "0.001 s" in await said(hasty.write([live(number, 2) for number in range(300)]))
        await hasty.close()
        assert await backend.load(live(1).handle) in (live(1), live(1, 2))


def test_threads_with_loops_of_their_own_share_one_engine(url: str) -> None:
    """They open, write and close as they come; nothing is lost."""
    failures: list[BaseException] = []

    async def use(worker: int) -> None:
        for turn in range(5):
            async with opened(url, timeout=PATIENCE) as backend:
                rows = [live(number, 1 + 4 * turn + worker) for number in range(20)]
                for row, answer in zip(rows, await backend.write(rows), strict=True):
                    found = await backend.load(row.handle)
                    assert found is not None
                    assert found.version >= row.version
                    assert answer.applied or answer.before is not None

    def work(worker: int) -> None:
        try:
            asyncio.run(use(worker))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def gone(pid: int) -> bool:
    return not alive(pid)


@pytest.mark.parametrize("preload", [False, True])
def test_one_worker_has_it_through_reloads(place: Path, url: str, preload: bool) -> None:
    """The new one waits for the old one to go; preloaded, the arbiter sends the rest when the last one has gone."""
    with Server(SYNC, place, workers=1, preload=preload, env={"SHMSESSION_BACKEND": url}) as server:
        browser = server.browser()
        browser.post("/login/ada")
        for _ in range(2):
            (old,) = server.worker_pids()
            server.tell(signal.SIGHUP)
            wait_for(partial(gone, old), "the old worker has gone")
            assert browser.get("/session").json["user"] == "ada"
        browser.get("/hit")
        assert server.stop() == 0
        assert "another process" not in server.text
    if preload:
        asyncio.run(one_there(url))


async def one_there(url: str) -> None:
    async with opened(url, bare=True) as backend:
        (handle,) = [handle async for handle in backend.handles()]
        assert await backend.load(handle) is not None


@pytest.mark.parametrize("kind", [SYNC, ASGI], ids=str)
@pytest.mark.parametrize("engine", ["directory", "memory"])
def test_several_workers_stop_the_start_with_the_reason(place: Path, url: str, kind: Kind, engine: str) -> None:
    url = f"{url if engine == 'directory' else 'surrealdb+mem://'}?timeout=0.5"
    server = Server(kind, place, workers=2, env={"SHMSESSION_BACKEND": url})
    process = server.launch()
    try:
        assert process.wait(PATIENCE) == 3
        assert "cannot share it" in server.text
        assert "surrealdb+ws://" in server.text
        assert "Traceback" not in server.text
    finally:
        server.reap()
