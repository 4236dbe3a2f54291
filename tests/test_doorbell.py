"""The doorbell is a hint: with it a flush begins at once, without it, or with one that nobody hears, only later."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from shmsession import Key, SessionConfig, SessionStore
from shmsession.memory import doorbell
from shmsession.memory.doorbell import Doorbell
from tests.backends import MemoryBackend
from tests.kept import Kept, check_equal
from tests.memory import Channel, Child
from tests.servers import GTHREAD, PATIENCE, SYNC, Kind, Serve, Server, wait_for

pytest_plugins = ["tests.hosts"]

GEVENT = Kind("gevent", "wsgi", ("-k", "gevent"))


@pytest.fixture
def bell(tmp_path: Path) -> "Doorbell":
    return Doorbell(tmp_path)


def test_a_ring_of_another_process_is_heard_once(bell: Doorbell, tmp_path: Path) -> None:
    code = (
        f"from shmsession.memory.doorbell import Doorbell; from pathlib import Path; Doorbell(Path({str(tmp_path)!r}))"
    )
    for _ in range(3):
        subprocess.run([sys.executable, "-c", f"{code}.ring()"], check=True)
    assert bell.wait(30)
    assert not bell.wait(0.01), "rings that nobody waited for are one ring"
    bell.remove()


def test_a_bell_that_was_removed_is_replaced_by_whoever_comes_next(bell: Doorbell) -> None:
    bell.ring()
    bell.remove()
    assert not bell.wait(0.01)
    bell.ring()
    assert bell.wait(30)
    bell.remove()
    bell.remove()


def test_who_waits_for_a_bell_that_another_process_removes_hears_the_next_one(bell: Doorbell) -> None:
    """Processes come and go, and each takes the bell along: the one that flushes must not listen to a dead one."""

    def wait_twice(channel: Channel) -> None:
        whole = bell._open

        def opened() -> object:
            semaphore = whole()
            channel.send("listens")
            return semaphore

        bell._open = opened  # type: ignore[method-assign]
        channel.send(bell.wait(PATIENCE))
        channel.send(bell.wait(PATIENCE))

    with Child(wait_twice) as waiting:
        assert waiting.channel.receive() == "listens"
        bell.remove()
        assert waiting.channel.receive() is True
        assert waiting.channel.receive() == "listens"
        bell.ring()
        assert waiting.channel.receive() is True
    bell.remove()


def test_a_system_without_semaphores_has_no_bell_and_nothing_fails(
    bell: Doorbell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doorbell, "posix_ipc", None)
    assert not bell.works
    bell.ring()
    bell.remove()


def test_a_bell_that_cannot_be_opened_is_not_heard_and_nothing_fails(
    bell: Doorbell, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: object, **__: object) -> None:
        raise PermissionError

    monkeypatch.setattr("posix_ipc.Semaphore", closed)
    bell.ring()
    assert not bell.wait(0.01)


# ── a bell that the dead have left ────────────────────────────────────────────────────────────────────────────

MOST = 2**31 - 1
LEAVE = """
import os, signal, sys
import posix_ipc
semaphore = posix_ipc.Semaphore(sys.argv[1], posix_ipc.O_CREX, mode=0o600, initial_value=int(sys.argv[2]))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def slow_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SessionStore]:
    """A store that is not open yet, whose flusher sends nothing for an hour unless somebody rings."""
    monkeypatch.setattr("shmsession.flusher.HEARTBEAT_MS", 3_600_000)
    config = SessionConfig(
        directory=place / "sessions", name="test", secure=False, keys=(Key.generate(),), map_size=4 << 20,
        flush_interval=timedelta(days=1),
    )  # fmt: skip
    store = SessionStore(MemoryBackend(labelled=False), config=config)
    store.memory.open()
    yield store
    store.close()
    Doorbell(store.path).remove()


@pytest.mark.parametrize("rings", [0, 1, 1_000, MOST])
def test_a_bell_that_a_killed_process_left_is_heard_like_a_new_one_and_falls_silent(
    slow_store: SessionStore, rings: int
) -> None:
    """Whatever it was left at: each commit that somebody waits for is sent at once, and nobody rings for ever."""
    store, bell = slow_store, Doorbell(slow_store.path)
    assert bell.works, "this Python has no posix_ipc"
    died = subprocess.run([sys.executable, "-c", LEAVE, bell._name, str(rings)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert value(bell) == rings
    store.open()
    backend = store._backend
    assert isinstance(backend, MemoryBackend)
    for number in range(1, 4):
        session = store.session()
        session["n"] = number
        session.save()
        assert store.sync.persisted(session, PATIENCE)
        assert len(backend.sessions()) == number
    wait_for(lambda: value(bell) == 0, "it is silent")


def value(bell: Doorbell) -> int:
    """How many rings nobody has heard."""
    semaphore = bell._open()
    try:
        return int(semaphore.value)
    finally:
        semaphore.close()


# ── every kind of worker ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["postgres", "redis"])
def test_a_gevent_worker_reaches_a_database_server(serve: Serve, place: Path, name: str) -> None:
    with Kept(name, place) as kept:
        _logins_reach(kept, serve(GEVENT, env={"SHMSESSION_BACKEND": kept.url}))


@pytest.mark.parametrize("kind", [SYNC, GTHREAD, GEVENT], ids=str)
@pytest.mark.parametrize("has_bell", [True, False], ids=["bell", "no_bell"])
def test_sessions_reach_the_backend_under_every_worker_with_a_bell_or_without(
    serve: Serve, place: Path, kind: Kind, has_bell: bool
) -> None:
    env = {}
    if not has_bell:
        (place / "without").mkdir()
        (place / "without" / "posix_ipc.py").write_text("raise ImportError('not for this platform')\n")
        env["PYTHONPATH"] = str(place / "without")
    with Kept("sqlite", place) as kept:
        _logins_reach(kept, serve(kind, env={"SHMSESSION_BACKEND": kept.url, **env}))


def _logins_reach(kept: Kept, server: Server) -> None:
    server.wait_for_all()  # a gevent worker that is told to end while it boots may miss it
    browsers = [server.browser() for _ in range(5)]
    for number, browser in enumerate(browsers):
        assert browser.post(f"/login/u{number}").status == 200
        assert browser.get("/hit").json["hits"] == 1
    assert browsers[0].post("/logout").status == 200
    store = server.store()
    wait_for(lambda: store.stats().outbox == 0, "all is flushed")
    assert check_equal(store, kept) == 4
