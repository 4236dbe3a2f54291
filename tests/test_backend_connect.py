"""Backends are chosen by URL."""

import subprocess
import sys
from typing import Any

import pytest

from shmsession import backends
from shmsession.backends import connect
from shmsession.backends.sqlite import SQLiteBackend
from shmsession.errors import ConfigError
from tests.properties import child_environment

SECRET = "hunter2"
KNOWN = ("sqlite:///", "postgresql://", "postgres://", "redis://", "rediss://", "unix:///")


def test_a_url_gives_the_backend_of_its_scheme_with_the_options_of_its_class() -> None:
    for url in ("sqlite:////tmp/s.db", "SQLITE:////tmp/s.db"):
        backend = connect(url, table="shop")
        assert isinstance(backend, SQLiteBackend)
        assert repr(backend) == "<SQLiteBackend /tmp/s.db, table shop>"
    with pytest.raises(TypeError, match="tabel"):
        connect("sqlite:///s.db", tabel="shop")


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("postgresql", "PostgresBackend"), ("postgres", "PostgresBackend"), ("redis", "RedisBackend"),
     ("rediss", "RedisBackend")],
)  # fmt: skip
def test_every_network_backend_is_reached_by_its_schemes(scheme: str, name: str) -> None:
    assert type(connect(f"{scheme}://ada:{SECRET}@localhost/1")).__name__ == name
    assert SECRET not in repr(connect(f"{scheme}://ada:{SECRET}@localhost/1"))


def test_a_socket_is_a_redis() -> None:
    assert type(connect("unix:///run/redis.sock")).__name__ == "RedisBackend"


@pytest.mark.parametrize(
    "url",
    [f"mongodb://ada:{SECRET}@localhost", f"mysql+asyncmy://ada:{SECRET}@localhost", "none://", "http://localhost"],
)
def test_an_unknown_scheme_names_itself_and_the_known_ones_but_no_credentials(url: str) -> None:
    with pytest.raises(ConfigError) as raised:
        connect(url)
    assert url.partition("//")[0] in str(raised.value)
    assert SECRET not in str(raised.value)
    assert all(known in str(raised.value) for known in KNOWN)


@pytest.mark.parametrize(
    "text", ["", "sessions.db", f"ada:{SECRET}@localhost", f"{SECRET}@x://y", f"://{SECRET}", "a b://"]
)
def test_what_is_no_url_is_not_repeated(text: str) -> None:
    """It may be a password that was written into the wrong variable."""
    with pytest.raises(ConfigError, match="the backend is no URL: write sqlite:///file") as raised:
        connect(text)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    ("driver", "scheme", "extra"),
    [("psycopg", "postgresql", "postgres"), ("psycopg", "postgres", "postgres"),
     ("psycopg_pool", "postgres", "postgres"),
     ("redis", "redis", "redis"), ("redis", "rediss", "redis"), ("redis", "unix", "redis")],
)  # fmt: skip
def test_a_missing_driver_is_an_error_that_says_what_to_install(driver: str, scheme: str, extra: str) -> None:
    """In a process of its own, in which the driver cannot be imported; the package itself can."""
    script = f"""
import sys
sys.modules[{driver!r}] = None
import shmsession, shmsession.backends
from shmsession.errors import ConfigError
try:
    shmsession.backends.connect("{scheme}://ada:{SECRET}@localhost/1")
except ConfigError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert f"the driver for {scheme}:// cannot be imported" in done.stdout
    assert f"pip install 'shmsession[{extra}]'" in done.stdout
    assert SECRET not in done.stdout


def test_no_driver_is_imported_before_it_is_asked_for() -> None:
    script = "import sys, shmsession, shmsession.backends as b; b.connect('sqlite:///x'); print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert "'sqlite3'" in done.stdout
    assert not {"'psycopg'", "'psycopg_pool'", "'redis'", "'asyncpg'"} & set(done.stdout.strip("[]\n").split(", "))


def test_an_import_that_fails_inside_the_package_is_no_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("a bug", name="shmsession.backends.nowhere")

    monkeypatch.setattr(backends, "import_module", fail)
    with pytest.raises(ImportError, match="a bug"):
        connect("redis://localhost")
