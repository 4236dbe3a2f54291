"""Fixtures for all tests. Everything a test makes is in a directory of its own and is gone afterwards."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import coverage
import pytest

from shmsession import codec, working
from shmsession.memory.doorbell import Doorbell
from tests.figures import SEED

pytest_plugins = ["shmsession.testing"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short-named directory on shared memory where there is one: unix socket paths stop at 107 bytes."""
    shared = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="shms-", dir=shared if shared.is_dir() else None))
    yield directory
    for mark in directory.rglob("attached"):  # processes that were killed leave their bell
        Doorbell(mark.parent).remove()
    shutil.rmtree(directory)


@pytest.fixture(autouse=True)
def registered_types() -> Iterator[None]:
    """What a test, or an example of the documentation, registers is unknown to the next."""
    by_class, by_name = dict(codec._by_class), dict(codec._by_name)
    yield
    codec._by_class.clear()
    codec._by_name.clear()
    codec._by_class.update(by_class)
    codec._by_name.update(by_name)


@pytest.fixture(autouse=True)
def nothing_leaks_between_sessions() -> Iterator[None]:
    """All sessions that nobody has edited share one object: no edit may reach it."""
    before = {**vars(working.UNEDITED), "assigned": set(), "deleted": set()}
    yield
    assert vars(working.UNEDITED) == before


def pytest_report_header() -> str:
    return f"seed of the sized tests: {SEED}"


@contextlib.contextmanager
def unmeasured() -> Iterator[None]:
    """Meanwhile no coverage is measured, neither here nor in processes that are started."""
    measuring = coverage.Coverage.current()
    if measuring is None:
        yield
        return
    config = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
    measuring.stop()
    try:
        with patch.object(measuring, "save"):  # forks call it when they end
            yield
    finally:
        measuring.start()
        if config is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = config


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Measuring makes long tests up to five times as long. What they reach, short ones must reach too."""
    is_long = item.get_closest_marker("soak") or item.get_closest_marker("unmeasured")
    with unmeasured() if is_long else contextlib.nullcontext():
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each worker begins with its share of the long tests: one that begins last is waited for by all others."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    long = [item for item in items if item.get_closest_marker("soak")]
    short = [item for item in items if not item.get_closest_marker("soak")]
    share = -(-len(short) // workers)
    shares = [(*long[n::workers], *short[n * share : (n + 1) * share]) for n in range(workers)]
    items[:] = [item for share_of_one in shares for item in share_of_one]
