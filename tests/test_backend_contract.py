"""The contract of backends can be kept, and no backend that breaks it passes."""

from pathlib import Path
from typing import Any, Final

import pytest

from shmsession.backends import Backend, Mark, Row, State, wins
from shmsession.testing import BackendContract
from tests.dict_backends import BROKEN, DictBackend, ExpiringBackend, Rows
from tests.documents import ROOT, blocks
from tests.figures import SEED

NAMES: Final = {name for name in dir(BackendContract) if name.startswith("test_")}


class TestDictBackend(BackendContract):
    seed = SEED

    def setup_method(self) -> None:
        self.rows = Rows()

    def backend(self) -> Backend:
        return DictBackend(self.rows)


class TestExpiringBackend(TestDictBackend):
    def backend(self) -> Backend:
        return ExpiringBackend(self.rows)


class TestDocumentedBackend(BackendContract):
    """The one that the documentation shows."""

    seed, steps = SEED, 100

    @pytest.fixture(autouse=True)
    def _database(self, place: Path) -> None:
        (block,) = [
            block for block in blocks(ROOT / "docs" / "backends.md", "python") if block.file == "filebackend.py"
        ]
        self.module: dict[str, Any] = {}
        exec(compile(block.text, str(block), "exec"), self.module)
        self.path = place / "sessions.json"

    def backend(self) -> Backend:
        made: Backend = self.module["FileBackend"](self.path)
        return made


# ── what breaks it is found ───────────────────────────────────────────────────────────────────────────────────


def case(kind: type[DictBackend]) -> BackendContract:
    rows = Rows()

    class Case(BackendContract):
        seed, steps = SEED, 2000

        def backend(self) -> Backend:
            return kind(rows)

    return Case()


@pytest.mark.parametrize(("broken", "test"), BROKEN, ids=[f"{broken.__name__}-{test}" for broken, test in BROKEN])
def test_a_backend_that_breaks_the_contract_fails(broken: type[DictBackend], test: str) -> None:
    """Each of them differs from a good backend in one place only, and the test of that place fails."""
    getattr(case(DictBackend), f"test_{test}")()
    with pytest.raises(Exception) as raised:
        getattr(case(broken), f"test_{test}")()
    assert isinstance(raised.value, AssertionError | RuntimeError | KeyError)


def test_every_test_of_the_contract_is_failed_by_some_backend() -> None:
    """One that nothing fails would promise nothing."""
    assert {f"test_{test}" for _, test in BROKEN} == NAMES


def test_every_test_of_the_contract_says_what_it_promises() -> None:
    assert len(NAMES) > 30
    for name in NAMES:
        assert getattr(BackendContract, name).__doc__, name


# ── the rule itself ───────────────────────────────────────────────────────────────────────────────────────────


def row(state: State, epoch: int, version: int) -> Row:
    return Row(bytes(20), state, epoch, version, 0)


@pytest.mark.parametrize("state", State)
def test_any_row_wins_over_nothing(state: State) -> None:
    assert wins(row(state, 0, 0), None)


@pytest.mark.parametrize("before", [Mark(state, 5, 5) for state in State], ids=str)
def test_death_wins_over_everything(before: Mark) -> None:
    assert wins(row(State.DEAD, 0, 0), before)


@pytest.mark.parametrize("state", [State.LIVE, State.ERASED])
def test_nothing_but_death_wins_over_death(state: State) -> None:
    assert not wins(row(state, 9, 9), Mark(State.DEAD, 0, 0))


@pytest.mark.parametrize("state", [State.LIVE, State.ERASED])
@pytest.mark.parametrize("before", [State.LIVE, State.ERASED])
def test_otherwise_the_later_epoch_wins_then_the_later_version(state: State, before: State) -> None:
    stored = Mark(before, 5, 5)
    assert [wins(row(state, *at), stored) for at in ((4, 9), (5, 4), (5, 5), (5, 6), (6, 0))] == [
        False, False, False, True, True
    ]  # fmt: skip
