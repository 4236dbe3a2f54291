"""Fixtures for all tests. Everything a test makes is in a directory of its own and is gone afterwards."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.figures import SEED

pytest_plugins = ["shmsession.testing"]


@pytest.fixture
def place() -> Iterator[Path]:
    """A short-named directory on shared memory where there is one: unix socket paths stop at 107 bytes."""
    shared = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="shms-", dir=shared if shared.is_dir() else None))
    yield directory
    shutil.rmtree(directory)


def pytest_report_header() -> str:
    return f"seed of the sized tests: {SEED}"
