"""The hooks for gunicorn, called as gunicorn calls them."""

import gc
import inspect
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gunicorn import config as gunicorn_config  # type: ignore[import-untyped]
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]

from shmsession import SessionStore
from shmsession.configured import configured_store
from shmsession.contrib import gunicorn as hooks
from shmsession.errors import ConfigError
from shmsession.store import stores
from shmsession.testing import login_cookie, make_store
from tests.servers import PACKAGE, ROOT, wait_for

SERVER = SimpleNamespace(log=logging.getLogger("arbiter"), cfg=SimpleNamespace(uid=os.geteuid()))
FOREIGN = SimpleNamespace(log=logging.getLogger("arbiter"), cfg=SimpleNamespace(uid=os.geteuid() + 1))
WORKER = SimpleNamespace(log=logging.getLogger("worker"), pid=0)


def is_open(store: SessionStore) -> bool:
    return store._memory is not None and store._memory.environment._opened is not None


@pytest.fixture(autouse=True)
def only_this_store(shm_store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of a server has its own stores only; this one has those of other tests too."""
    monkeypatch.setattr(hooks, "stores", lambda: [shm_store])
    for name in list(os.environ):
        if name.startswith("SHMSESSION_"):
            monkeypatch.delenv(name)


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_configuration_file_that_imports_all_gets_hooks_and_nothing_else() -> None:
    namespace: dict[str, Any] = {}
    exec("from shmsession.contrib.gunicorn import *", namespace)
    imported = {name for name in namespace if not name.startswith("__")}
    known = gunicorn_config.Config().settings
    assert imported == set(hooks.__all__)
    assert sorted(hooks.__all__) == hooks.__all__
    for name in imported:
        assert known[name].section == "Server Hooks"
        known[name].set(namespace[name])  # gunicorn compares the number of arguments


def test_the_example_configuration_sets_the_hooks_and_what_it_says() -> None:
    code = (
        "from gunicorn.app.wsgiapp import WSGIApplication\n"
        "import sys; sys.argv = ['gunicorn', '-c', 'gunicorn.conf.py', '-w', '3', 'examples.asgi_app:app']\n"
        "settings = WSGIApplication().cfg\n"
        "from shmsession.contrib import gunicorn as hooks\n"
        "assert all(getattr(settings, name) is getattr(hooks, name) for name in hooks.__all__)\n"
        "assert settings.workers == 3, 'flags win'\n"
        "print(settings.worker_class_str, *settings.bind)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(PACKAGE)}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["asgi", "127.0.0.1:8000"]


def test_the_exit_status_of_a_worker_that_cannot_start_is_gunicorns() -> None:
    assert hooks.BOOT_ERROR == Arbiter.WORKER_BOOT_ERROR


# ── chain() ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_chain_calls_hooks_in_turn_with_what_gunicorn_gives() -> None:
    calls: list[tuple[Any, ...]] = []

    def mine(server: Any, worker: Any) -> None:
        calls.append(("mine", server, worker))

    def begin(server: Any) -> None:
        calls.append(("begin", server))

    both, alone = hooks.chain(mine, mine), hooks.chain(begin)
    both("server", "worker")
    alone("server")
    assert calls == [("mine", "server", "worker"), ("mine", "server", "worker"), ("begin", "server")]
    assert [len(inspect.signature(hook).parameters) for hook in (both, alone)] == [2, 1]


def test_what_chain_makes_is_a_hook_to_gunicorn() -> None:
    settings = gunicorn_config.Config().settings
    for name in hooks.__all__:
        hook: Callable[..., None] = getattr(hooks, name)
        settings[name].set(hooks.chain(hook, hook))


@pytest.mark.parametrize(
    "wrong", [(), (hooks.post_fork, hooks.on_exit), (lambda: None,), (lambda a, b, c: None,)],
    ids=["none", "mixed", "no argument", "three arguments"],
)  # fmt: skip
def test_chain_refuses_hooks_of_different_kinds(wrong: tuple[Callable[..., object], ...]) -> None:
    with pytest.raises(ConfigError, match="same kind"):
        hooks.chain(*wrong)


# ── SHMSESSION_STORE ───────────────────────────────────────────────────────────────────────────────────────────


def test_without_the_variable_no_store_is_configured() -> None:
    assert configured_store() is None


@pytest.mark.parametrize("target", ["application:store", "application", "application:nested.store"])
def test_the_variable_names_a_store(
    target: str, shm_store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    module = SimpleNamespace(store=shm_store, nested=SimpleNamespace(store=shm_store))
    monkeypatch.setitem(sys.modules, "application", module)
    monkeypatch.setenv("SHMSESSION_STORE", target)
    assert configured_store() is shm_store


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere_at_all:store", "nowhere_at_all"),
        ("json:nothing", "nothing"),
        ("json:dumps", "not a SessionStore"),
        (":store", "module:attribute"),
        ("json:", "store"),
    ],
)
def test_a_variable_that_names_none_says_what_to_write(
    target: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("SHMSESSION_STORE", target)
    with pytest.raises(ConfigError, match="SHMSESSION_STORE") as raised:
        configured_store()
    assert says in str(raised.value)


# ── the life of a server ───────────────────────────────────────────────────────────────────────────────────────


def test_the_arbiter_makes_the_store_and_leaves_it_closed(shm_store: SessionStore) -> None:
    hooks.on_starting(SERVER)
    assert shm_store.memory.environment.data.is_dir()
    assert not is_open(shm_store)


def test_a_store_that_cannot_be_opened_ends_the_arbiter_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(tmp_path / "missing" / "sessions")
    monkeypatch.setattr(hooks, "stores", lambda: [store])
    with pytest.raises(SystemExit) as ended:
        hooks.on_starting(SERVER)
    assert ended.value.code == 1
    (line,) = caplog.messages
    assert "SHMSESSION_DIR" in line
    with pytest.raises(SystemExit) as ended:
        hooks.post_worker_init(WORKER)
    assert ended.value.code == hooks.BOOT_ERROR


def test_without_a_store_of_its_own_the_arbiter_checks_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "stores", list)
    hooks.on_starting(SERVER)
    monkeypatch.setenv("SHMSESSION_DIR", str(tmp_path / "sessions"))
    hooks.on_starting(SERVER)
    assert list((tmp_path / "sessions").iterdir()) == [], "nothing is made that the application may not want"
    monkeypatch.setenv("SHMSESSION_LIFESPAN", "soon")
    with pytest.raises(SystemExit):
        hooks.on_starting(SERVER)
    assert "SHMSESSION_LIFESPAN" in caplog.messages[-1]


def test_a_worker_opens_the_store_before_its_first_request_and_closes_it_at_its_end(shm_store: SessionStore) -> None:
    hooks.post_fork(SERVER, WORKER)
    hooks.post_worker_init(WORKER)
    assert is_open(shm_store)
    hooks.worker_exit(SERVER, WORKER)
    assert not is_open(shm_store)


def test_what_the_arbiter_had_open_stays_with_it(shm_store: SessionStore) -> None:
    shm_store.open()
    hooks.post_fork(SERVER, WORKER)
    assert not is_open(shm_store)
    cookie = login_cookie(shm_store, {"a": 1})
    hooks.on_exit(SERVER)
    assert not is_open(shm_store)
    ((name, value),) = cookie.items()
    assert shm_store.request_session(f"{name}={value}".encode).to_dict() == {"a": 1}


READER = """
import sys, time
from pathlib import Path
from shmsession import Key, SessionConfig, SessionStore
store = SessionStore(config=SessionConfig(directory=Path(sys.argv[1]), name="test", keys=(Key.parse(sys.argv[2]),)))
def linger(txn, tables):
    print("reading", flush=True)
    time.sleep(600)
store.memory.environment.read(linger)
"""


def test_the_slot_of_a_reader_that_was_killed_is_free_as_soon_as_the_arbiter_hears_of_it(
    shm_store: SessionStore,
) -> None:
    shm_store.open()
    base, key = shm_store.memory.environment.base, shm_store.keyring.keys[0]
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, str(base), str(key)], stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
    )  # fmt: skip
    with reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == b"reading\n"
        wait_for(lambda: shm_store.stats().readers == 1, "the reader holds its slot")
        reader.send_signal(signal.SIGKILL)
        reader.wait()
        assert shm_store.stats().readers == 1
        hooks.child_exit(SERVER, WORKER)
        assert shm_store.stats().readers == 0


def test_an_arbiter_whose_store_is_gone_reaps_its_workers_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "missing" / "sessions")
    monkeypatch.setattr(hooks, "stores", lambda: [store])
    hooks.child_exit(SERVER, WORKER)


def test_an_arbiter_leaves_the_store_of_workers_that_run_as_another_user_alone(
    shm_store: SessionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks.on_starting(FOREIGN)
    hooks.child_exit(FOREIGN, WORKER)
    assert not is_open(shm_store)
    assert not shm_store.config.directory.exists()  # type: ignore[union-attr]
    monkeypatch.setattr(hooks, "stores", list)
    monkeypatch.setenv("SHMSESSION_DIR", str(tmp_path / "sessions"))
    hooks.on_starting(FOREIGN)
    assert not (tmp_path / "sessions").exists()


def test_the_hooks_find_every_store_that_is_in_use(shm_store: SessionStore) -> None:
    assert shm_store in stores()


def test_checking_the_variables_leaves_no_store_behind(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers would inherit it, and open it beside the application's own."""
    monkeypatch.setenv("SHMSESSION_DIR", str(place / "sessions"))
    before = set(stores())
    gc.disable()
    try:
        hooks._check_variables()
        assert set(stores()) == before
    finally:
        gc.enable()
