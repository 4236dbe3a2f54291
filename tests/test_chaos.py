"""A short run of `./dev chaos` over each backend: whatever befalls workers and databases, the promises hold."""

from pathlib import Path

import pytest

from tests import chaos
from tests.figures import SEED, report, size
from tests.kept import BACKENDS
from tests.servers import ASGI, GTHREAD


@pytest.mark.soak
@pytest.mark.parametrize("backend", [*BACKENDS, None], ids=str)
def test_whatever_befalls_workers_and_databases_the_promises_hold(place: Path, backend: str | None) -> None:
    """Killed and stopped workers and flushers, crashed and frozen databases, under load: see `tests.chaos`."""
    kind = GTHREAD if backend == "sqlite" else ASGI
    figures = chaos.run(kind, backend, SEED, size(600, 6), place)
    assert figures["acknowledged"] > 0
    assert figures["faults"] > 0
    report(f"chaos {backend}", **figures)
