"""A process ends in time whatever its backend does, and what could not be sent waits for the next start."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession import Key, SessionConfig, SessionStore
from shmsession.behind import OPEN_SECONDS
from shmsession.errors import BackendError, BackendUnavailable
from tests.backends import MemoryBackend
from tests.figures import SOAKING, report
from tests.kept import Kept, check_equal, wait_for_empty_outbox
from tests.servers import ASGI, GTHREAD, PACKAGE, PATIENCE, Kind, Serve, wait_for

pytest_plugins = ["tests.hosts"]

# ── a server whose database is down ────────────────────────────────────────────────────────────────────────────

DRAIN_SECONDS = 1
GRACE_SECONDS = 8
"""What else it takes to end, with room for a slow machine; less than a drain of the default length would add."""

APP = """
from datetime import timedelta
from examples import _start
from shmsession import SessionConfig, SessionStore
_start.store_or_exit = lambda: SessionStore(config=SessionConfig(drain_timeout=timedelta(seconds={seconds})))
from examples.{protocol}_app import app, store
"""

WAYS = [
    ("redis", "killed", ASGI), ("postgres", "killed", GTHREAD), ("redis", "stopped", GTHREAD),
    ("postgres", "stopped", ASGI),
]  # fmt: skip
MORE = [
    (name, how, kind) for name in ("redis", "postgres") for how in ("killed", "stopped") for kind in (ASGI, GTHREAD)
]


@pytest.mark.parametrize(("name", "how", "kind"), MORE if SOAKING else WAYS, ids=str)
def test_a_server_ends_in_time_though_its_database_is_down_and_what_waits_arrives_after_the_next_start(
    serve: Serve, place: Path, name: str, how: str, kind: Kind
) -> None:
    """`drain_timeout` in the workers, and again in the arbiter. A database that says nothing is as good as none."""
    (place / "short_drain.py").write_text(APP.format(seconds=DRAIN_SECONDS, protocol=kind.protocol))
    with Kept(name, place) as kept:
        server = serve(
            kind, workers=2, app="short_drain:app", flags=("--graceful-timeout", str(int(PATIENCE))),
            env={"SHMSESSION_BACKEND": kept.url, "SHMSESSION_STORE": "short_drain:store",
                 "PYTHONPATH": f"{PACKAGE}{os.pathsep}{place}"},
        )  # fmt: skip
        early, late = server.browser(), server.browser()
        early.post("/login/ada")
        store = server.store()
        wait_for_empty_outbox(store)
        sent = len(kept.rows())
        if how == "killed":
            kept.server.kill()
        else:
            kept.server.freeze()
        late.post("/login/grace")
        for browser in (early, late):
            assert browser.get("/hit").json["hits"] == 1
        waiting = store.stats().outbox
        assert waiting >= 2
        store.close()
        begin = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        took = time.monotonic() - begin
        assert took < 2 * DRAIN_SECONDS + GRACE_SECONDS
        assert f"{waiting} sessions wait for the next start" in server.text
        assert server.store().stats().outbox == waiting
        kept.server.revive()
        if how == "killed":  # one that was stopped may still read, and do, what it was sent
            assert len(kept.rows()) == sent, "nothing arrived while it was down"
        server.start()
        store = server.store()
        assert check_equal(store, kept) == 2
        for browser, user in ((early, "ada"), (late, "grace")):
            assert browser.get("/session").json == {"user": user, "hits": 1}
    report(f"SIGTERM, {name} {how}, {kind}", drain_timeout=DRAIN_SECONDS, took_s=round(took, 2), lost=0)


# ── a backend that does not close ──────────────────────────────────────────────────────────────────────────────

KEY = Key.generate()


class Clinging(MemoryBackend):
    """One whose `close` does something else first."""

    def __init__(self, closing: Callable[[], Any]) -> None:
        super().__init__(labelled=False)
        self.closing = closing
        self.asked_to_close = 0

    async def close(self) -> None:
        self.asked_to_close += 1
        await self.closing()


def raising(error: Exception) -> Callable[[], Any]:
    async def close() -> None:
        raise error

    return close


async def hang() -> None:
    await asyncio.get_running_loop().create_future()


async def hang_twice() -> None:
    """Also when it is cancelled."""
    with contextlib.suppress(asyncio.CancelledError):
        await hang()
    await hang()


CLOSINGS = {
    "an error of ours": raising(BackendError("cannot")),
    "a lost connection": raising(BackendUnavailable("gone")),
    "an error of its own": raising(RuntimeError("its own")),
    "no end": hang,
    "no end, twice": hang_twice,
}


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend is not waited for as long as in earnest."""
    monkeypatch.setattr("shmsession.behind.OPEN_SECONDS", 0.3, raising=False)


@pytest.fixture
def new_store(place: Path) -> Iterator[Callable[[MemoryBackend], SessionStore]]:
    """Stores in one place, which flush when told to."""
    settings: dict[str, Any] = {
        "directory": place / "sessions", "name": "test", "secure": False, "keys": (KEY,), "map_size": 4 << 20,
        "flush_interval": timedelta(days=1),
    }  # fmt: skip
    made: list[SessionStore] = []

    def make(backend: MemoryBackend) -> SessionStore:
        made.append(SessionStore(backend, config=SessionConfig(**settings)))
        return made[-1]

    yield make
    for store in made:
        store.close()


def close(store: SessionStore) -> None:
    """Close it; it ends, and raises what it raises."""
    errors: list[BaseException] = []

    def closing() -> None:
        try:
            store.close()
        except BaseException as error:  # noqa: BLE001  # whatever it is: raised below
            errors.append(error)

    thread = threading.Thread(target=closing, daemon=True)
    thread.start()
    thread.join(PATIENCE / 2)
    assert not thread.is_alive(), "close() does not end"
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", CLOSINGS)
def test_a_backend_that_does_not_close_keeps_no_store_open_and_costs_no_session(
    new_store: Callable[[MemoryBackend], SessionStore], how: str
) -> None:
    """The process ends, its threads too; the lease is free, and the next store has all that waited."""
    before = set(Path("/proc/self/task").iterdir())
    backend = Clinging(CLOSINGS[how])
    backend.fail("write", times=1_000_000)
    store = new_store(backend).open()
    session = store.session()
    session["cart"] = ["tea"]
    session.save()
    wait_for(lambda: "write" in backend.calls, "it flushes")
    close(store)
    assert backend.asked_to_close == 1
    assert not backend.sessions()
    wait_for(lambda: set(Path("/proc/self/task").iterdir()) <= before, "the threads have ended")
    successor = new_store(MemoryBackend(labelled=False))
    assert successor.stats().outbox == 1
    assert successor.sync.flush(PATIENCE)
    assert session.handle is not None
    assert [handle.hex() for handle in successor_rows(successor)] == [session.handle]
    assert session.id is not None
    assert dict(successor.session(session.id)) == {"cart": ["tea"]}


def successor_rows(store: SessionStore) -> list[bytes]:
    backend = store._backend
    assert isinstance(backend, MemoryBackend)
    return list(backend.sessions())


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("how", CLOSINGS)
def test_a_store_whose_backend_did_not_close_can_be_closed_again_and_used_again(
    new_store: Callable[[MemoryBackend], SessionStore], how: str
) -> None:
    backend = Clinging(CLOSINGS[how])
    store = new_store(backend).open()
    close(store)
    close(store)
    session = store.session()
    session["cart"] = ["tea"]
    session.save()
    assert store.sync.flush(PATIENCE)
    assert len(backend.sessions()) == 1
    close(store)


class Deaf(MemoryBackend):
    """One whose driver swallows the first cancellation, and then has never anything to say."""

    deaf = False

    async def initialize(self) -> None:
        self.deaf = True
        await hang_twice()


def test_a_driver_that_swallows_a_cancellation_does_not_keep_the_process_from_ending(
    new_store: Callable[[MemoryBackend], SessionStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncio.wait_for does it, up to Python 3.11, when its answer comes at that moment: asyncmy connects by it."""
    monkeypatch.setattr("shmsession.behind.STOP_SECONDS", 0.05)
    backend = Deaf(labelled=False)
    store = new_store(backend).open()
    store.session().save()
    wait_for(lambda: backend.deaf, "it flushes")
    begin = time.monotonic()
    store.close()
    assert time.monotonic() - begin < OPEN_SECONDS / 2
