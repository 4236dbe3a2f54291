"""For the tests of applications: a store of their own, a clock that obeys, and a cookie that is logged in.

Add `pytest_plugins = ["shmsession.testing"]` to conftest.py and take the fixture `shm_store`. `BackendContract` tests a
backend of your own.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest

from shmsession.clock import Clock
from shmsession.config import SessionConfig
from shmsession.keyring import Key
from shmsession.store import SessionStore
from shmsession.transport import Presented

from .contract import BackendContract as BackendContract

SMALL_MAP: Final = 4 << 20


class ManualClock:
    """A clock that moves when told to. It starts at 2026-01-01 00:00 UTC, an hour after boot."""

    def __init__(self) -> None:
        self._wall = 1_767_225_600_000
        self._boot = 3_600_000

    def now(self) -> int:
        """Milliseconds since 1970."""
        return self._wall

    def boot(self) -> int:
        """Milliseconds since boot."""
        return self._boot

    def advance(self, seconds: float = 0, **spans: float) -> None:
        """Let time pass on both clocks: `advance(61)`, `advance(hours=6)`."""
        passed = (timedelta(seconds=seconds) + timedelta(**spans)) // timedelta(milliseconds=1)
        self._wall += passed
        self._boot += passed

    def step(self, seconds: float) -> None:
        """Set the wall clock by this much, back or forth, as an administrator or NTP does."""
        self._wall += round(seconds * 1000)


def make_store(directory: Path, clock: Clock | None = None, **settings: Any) -> SessionStore:
    """A store in `directory` with a small map, a Key of its own, cookies that plain http carries, and a ManualClock.

    `settings` are those of SessionConfig; SHMSESSION_* variables do not reach it.
    """
    defaults: dict[str, Any] = {
        "name": "test", "map_size": SMALL_MAP, "secure": False, "keys": (Key.generate(),), "directory": directory,
        "lifespan": timedelta(hours=6), "max_lifespan": timedelta(days=60), "absolute_lifespan": None,
        "memory_lifespan": timedelta(hours=1),
    }  # fmt: skip
    return SessionStore("none", config=SessionConfig(**{**defaults, **settings}), clock=clock or ManualClock())


@pytest.fixture
def shm_store() -> Iterator[SessionStore]:
    """A SessionStore in a temporary directory of its own, removed afterwards. Its `clock` is a ManualClock."""
    directory = Path(tempfile.mkdtemp(prefix="shmsession-test-"))
    store = make_store(directory / "sessions")
    try:
        yield store
    finally:
        store.close()
        shutil.rmtree(directory)


def login_cookie(
    store: SessionStore, data: Mapping[str, Any] | None = None, *, user_id: Any = None, address: str = "",
    user_agent: str = "",
) -> dict[str, str]:  # fmt: skip
    """A stored session with `data`, logged in as `user_id` when given, as {cookie name: cookie value}.

    `client.cookies.update(login_cookie(store, {"user": "ada"}, user_id="ada"))` does it for Starlette's TestClient;
    for Flask's client: `client.set_cookie(name, value)`. Where cookies are bound to clients, say which: both are
    "testclient" for Starlette's.
    """
    session = store.session()
    session.create()
    session.update(data or {})
    if user_id is not None:
        session.renew(user_id=user_id)
    session.save()
    assert session.secret is not None
    client = Presented(peer=address, agent=user_agent.encode())
    return {store.transport.name: store.transport.value(session.secret, store.clock.now(), client)}
