"""Fixtures that start servers.

A test module takes them with ``pytest_plugins = ["tests.hosts"]`` and imports nothing of it: pytest rewrites the
asserts of a plugin, which therefore must not be imported before.
"""

import contextlib
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers import Kind, Running, Serve, Server, new_place


@pytest.fixture(scope="session")
def running() -> Iterator[Running]:
    """`running(kind, preload=…)`: a server that all tests of this process share; none of them may hurt it."""
    servers: dict[tuple[Kind, bool], Server] = {}

    def get(kind: Kind, *, preload: bool = False) -> Server:
        if (kind, preload) not in servers:
            server = Server(kind, new_place(), preload=preload)
            try:
                servers[kind, preload] = server.start()
            except BaseException:
                shutil.rmtree(server.place)
                raise
        return servers[kind, preload]

    yield get
    logs = []
    for server in servers.values():
        server.tell(signal.SIGTERM)
    for server in servers.values():
        server.stop()
        server.reap()
        logs.append(server.text)
        shutil.rmtree(server.place)
    assert not any("Traceback" in log for log in logs), "\n".join(logs)


@pytest.fixture
def serve(place: Path) -> Iterator[Serve]:
    """`serve(kind, …)`: a server of this test's own, started, stopped at its end."""
    with contextlib.ExitStack() as stack:

        def start(kind: Kind, **options: Any) -> Server:
            return stack.enter_context(Server(kind, options.pop("place", place), **options))

        yield start
