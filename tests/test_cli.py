"""The command line, run as a process."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsession import Key, SessionConfig, SessionStore
from tests.kept import Kept
from tests.servers import PACKAGE, PATIENCE, wait_for

Run = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def kept(place: Path) -> Iterator[Kept]:
    with Kept("sqlite", place) as kept:
        yield kept


@pytest.fixture
def variables(place: Path, kept: Kept) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHMSESSION_")}
    return inherited | {
        "SHMSESSION_BACKEND": kept.url, "SHMSESSION_DIR": str(place / "sessions"), "SHMSESSION_NAME": "cli",
        "SHMSESSION_KEY": str(Key(bytes(range(32)))), "SHMSESSION_MAP_SIZE": "4MiB", "PYTHONPATH": str(PACKAGE),
        "HOME": str(place),
    }  # fmt: skip


@pytest.fixture
def command(place: Path, variables: dict[str, str]) -> Iterator[Run]:
    """`shmsession …` in `place`."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **changed: str) -> "subprocess.Popen[str]":
        environment = {name: value for name, value in (variables | changed).items() if value}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, "-m", "shmsession", *arguments], cwd=place, env=environment, stdout=pipe, stderr=pipe,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def store(place: Path, kept: Kept) -> Iterator[SessionStore]:
    """The same store; nobody flushes it here."""
    config = SessionConfig(name="cli", directory=place / "sessions", keys=(Key(bytes(range(32))),), map_size=4 << 20)
    store = SessionStore(kept.url, config=config)
    store.memory.open()
    store.behind.flushes = True
    yield store
    store.close()


def commit(store: SessionStore, **data: Any) -> None:
    session = store.session()
    session.update(data)
    session.save()


def test_the_flusher_sends_what_workers_commit_until_it_is_told_to_stop_and_then_what_is_left(
    command: Run, store: SessionStore, kept: Kept
) -> None:
    commit(store, a=1)
    process = command("flusher")
    wait_for(lambda: kept.file.exists() and store.stats().outbox == 0, "the first session is flushed")
    assert len(kept.rows()) == 1
    for number in range(50):
        commit(store, number=number)
    process.send_signal(signal.SIGTERM)
    _, text = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, text
    assert len(kept.rows()) == 51
    assert store.stats().outbox == 0


def test_initdb_makes_the_tables_and_may_run_again(command: Run, kept: Kept) -> None:
    for _ in range(2):
        process = command("initdb")
        _, text = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, text
        assert kept.rows() == {}


def test_copy_brings_the_sessions_of_another_database(
    command: Run, place: Path, store: SessionStore, kept: Kept
) -> None:
    for number in range(3):
        commit(store, number=number)
    assert store.sync.flush()
    process = command("copy", kept.url, SHMSESSION_BACKEND=f"sqlite:///{place}/new.db")
    output, text = process.communicate(timeout=PATIENCE)
    assert (process.returncode, output) == (0, "3 sessions were copied\n"), text
    before, kept.url = kept.rows(), f"sqlite:///{place}/new.db"
    assert kept.rows() == before


def test_stats_are_json(command: Run, store: SessionStore) -> None:
    commit(store, a=1)
    output, text = command("stats").communicate(timeout=PATIENCE)
    numbers = json.loads(output)
    assert (numbers["sessions"], numbers["outbox"]) == (1, 1), text


@pytest.mark.parametrize("backend", ["none", "sqlite"])
def test_stats_of_a_store_that_is_not_there_say_so_and_make_nothing(
    command: Run, place: Path, kept: Kept, store: SessionStore, backend: str
) -> None:
    """Neither a store nor a directory, a Key file or a database: most likely the name was mistyped."""
    commit(store, a=1)
    before = sorted(place.rglob("*"))
    for changed in ({"SHMSESSION_NAME": "cil"}, {"SHMSESSION_DIR": str(place / "elsewhere")}):
        process = command(
            "stats", SHMSESSION_KEY="", SHMSESSION_BACKEND=kept.url if backend == "sqlite" else "none", **changed
        )
        output, text = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert output == ""
        assert f"there is no store {place}/" in text
        assert len(text.splitlines()) == 1
        assert sorted(place.rglob("*")) == before


def test_a_store_is_named_by_module_and_attribute_in_the_working_directory(
    command: Run, place: Path, store: SessionStore
) -> None:
    (place / "app.py").write_text("from shmsession import SessionStore\nsessions = SessionStore()\n")
    commit(store, a=1)
    for arguments, changed in ((("stats", "app:sessions"), {}), (("stats",), {"SHMSESSION_STORE": "app:sessions"})):
        output, text = command(*arguments, **changed).communicate(timeout=PATIENCE)
        assert json.loads(output)["sessions"] == 1, text


@pytest.mark.parametrize(
    ("arguments", "changed", "says"),
    [
        (("flusher",), {"SHMSESSION_BACKEND": ""}, "this store has no backend: set SHMSESSION_BACKEND"),
        (("initdb",), {"SHMSESSION_BACKEND": "mongodb://x"}, "no backend is known for mongodb://"),
        (("copy", "mongodb://ada:hunter2@x"), {}, "no backend is known for mongodb://"),
        (("copy", "sqlite:///nowhere.db"), {}, "nowhere.db is not there"),
        (("stats", "nothing:here"), {}, "Write module:attribute, such as app:store"),
        (("initdb",), {"SHMSESSION_BACKEND": "sqlite:///nowhere/x.db"}, "nowhere"),
        (
            ("initdb",),
            {"SHMSESSION_BACKEND": "postgresql://ada:hunter2@127.0.0.1:1/x", "SHMSESSION_KEY": ""},
            "Key.gen",
        ),
    ],
)
def test_what_cannot_work_is_one_line_that_says_what_to_do(
    command: Run, arguments: tuple[str, ...], changed: dict[str, str], says: str
) -> None:
    process = command(*arguments, **changed)
    output, text = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert output == ""
    assert says in text
    assert "Traceback" not in text
    assert "hunter2" not in text
