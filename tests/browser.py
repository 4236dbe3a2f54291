"""Fixtures that visit sites with a real browser.

A test module takes them with ``pytest_plugins = ["tests.browser"]``, and imports from tests.chromium only.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chromium import Browse, Chromium, Host, Site
from tests.tls import self_signed


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """The browser of this process."""
    with Chromium() as browser:
        yield browser


@pytest.fixture
def browse(chromium: Chromium) -> Browse:
    """`browse(script)` plays `await script(context)` in a browser that knows nothing yet."""
    return chromium.play


@pytest.fixture
def host(chromium: Chromium, place: Path) -> Iterator[Host]:
    """`host(app, tls=…)`: an ASGI application of this test's own on a port of its own, until its end."""
    with contextlib.ExitStack() as stack:

        def serve(app: Any, *, tls: bool = False) -> Site:
            return stack.enter_context(chromium.serving(app, self_signed(place) if tls else None))

        yield serve
