"""Backends are chosen by URL."""

import asyncio
import inspect
import subprocess
import sys
from typing import Any

import pytest
from psycopg.conninfo import conninfo_to_dict

from shmsession import SessionStore, backends
from shmsession.backends import Row, State, connect, mysql_address
from shmsession.backends import postgres as postgres_module
from shmsession.backends.mysql import MySQLBackend
from shmsession.backends.postgres import PostgresBackend
from shmsession.backends.sqlite import SQLiteBackend
from shmsession.errors import BackendError, ConfigError
from tests.databases import MariaDBServer, PostgresServer
from tests.documents import ROOT, blocks, code, marked, rows
from tests.properties import child_environment

pytest_plugins = ["tests.database_hosts"]

PAGE = ROOT / "docs" / "backends.md"
ROW = Row(bytes(19) + b"\1", State.LIVE, 1, 1, 1, b"somebody", b"body")
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "write": ([ROW],), "load": (ROW.handle,), "sessions_of": (ROW.user,), "sweep": (2, 9)
}  # fmt: skip
SECRET = "hunter2"
KNOWN = (
    "sqlite:///", "postgresql://", "postgres://", "mysql://", "mariadb://", "redis://", "rediss://", "unix:///",
    "redis+cluster://", "rediss+cluster://", "redis+sentinel://", "rediss+sentinel://",
)  # fmt: skip


def test_a_url_gives_the_backend_of_its_scheme_with_the_options_of_its_class() -> None:
    for url in ("sqlite:////tmp/s.db", "SQLITE:////tmp/s.db"):
        backend = connect(url, table="shop")
        assert isinstance(backend, SQLiteBackend)
        assert repr(backend) == "<SQLiteBackend /tmp/s.db, table shop>"
    with pytest.raises(TypeError, match="tabel"):
        connect("sqlite:///s.db", tabel="shop")


@pytest.mark.parametrize(
    ("scheme", "name"),
    [("postgresql", "PostgresBackend"), ("postgres", "PostgresBackend"), ("mysql", "MySQLBackend"),
     ("mariadb", "MySQLBackend"), ("redis", "RedisBackend"), ("rediss", "RedisBackend")],
)  # fmt: skip
def test_every_network_backend_is_reached_by_its_schemes(scheme: str, name: str) -> None:
    assert type(connect(f"{scheme}://ada:{SECRET}@localhost/1")).__name__ == name
    assert SECRET not in repr(connect(f"{scheme}://ada:{SECRET}@localhost/1"))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("sqlite:///s.db?table=shop&timeout=2", ", table shop>"),
        ("postgresql://localhost/app?table=shop&sslmode=require&timeout=2", " postgresql://localhost/app, shop>"),
        ("mariadb://a@localhost/app?table=shop&timeout=2", "<MySQLBackend mysql://localhost:3306/app, shop>"),
        ("redis://localhost?prefix=shop&timeout=2", "<RedisBackend redis://localhost:6379/0, prefix 'shop'>"),
        ("unix:///run/redis.sock?db=1&prefix=shop", ", prefix 'shop'>"),
        ("redis+cluster://localhost?prefix=shop", "<RedisBackend redis+cluster://localhost:6379/, prefix 'shop'>"),
        ("rediss+cluster://a,b?prefix=shop", "<RedisBackend rediss+cluster://a:6379,b:6379/, prefix 'shop'>"),
    ],
    ids=lambda text: text.partition(":")[0],
)  # fmt: skip
def test_the_url_alone_can_give_each_application_tables_of_its_own(url: str, shown: str) -> None:
    """So that applications which are configured by variables may share a database."""
    assert repr(connect(url)).endswith(shown)


@pytest.mark.parametrize(
    ("url", "libpq"),
    [
        ("postgresql:///app?table=shop", "dbname=app"),
        ("postgresql://h/app?sslmode=require&table=a.b&t%61ble=shop&max_size=7", "host=h dbname=app sslmode=require"),
        ("postgresql://a,b:5/app?min_size=0&target_session_attrs=read-write",
         "host=a,b port=,5 dbname=app target_session_attrs=read-write"),
        ("postgresql://ada:x?table=y@h/app?table=shop", "user=ada password=x?table=y host=h dbname=app"),
        ("postgresql://ada@h?options=-c%20a%3Db%26table%3Dx&table=shop", "user=ada host=h options='-c a=b&table=x'"),
    ],
)  # fmt: skip
def test_libpq_hears_of_a_url_what_is_libpqs(url: str, libpq: str) -> None:
    """Everything as it was written, but for what is ours; that is taken, and comes before the keyword."""
    backend: Any = connect(url, table="other")
    defaults = {"connect_timeout": "5", "application_name": "shmsession"}
    assert conninfo_to_dict(backend._conninfo) == conninfo_to_dict(libpq) | defaults
    assert repr(backend).endswith(", other>" if "min_size" in url else ", shop>")


def test_what_the_url_says_to_libpq_is_not_changed_by_an_option() -> None:
    """Whoever runs the application can say by variable what its code says otherwise."""
    backend: Any = connect("postgresql://h/app?sslmode=verify-full", sslmode="disable", host="other", user="ada")
    found = conninfo_to_dict(backend._conninfo)
    assert (found["sslmode"], found["host"], found["user"]) == ("verify-full", "h", "ada")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:///s.db?table=a-b", "write letters, digits and _"), ("sqlite:///s.db?timeout=0", "timeout: write"),
        ("postgresql:///app?table=a-b", "table= must be"), ("postgresql:///app?table=", "table= must be"),
        ("postgresql:///app?table", "table= must be"), ("postgresql:///app?table=a%22b", "table= must be"),
        ("postgresql:///app?timeout=soon", "timeout= must be"), ("postgresql:///app?timeout=nan", "timeout= must be"),
        ("postgresql:///app?timeout=inf", "timeout= must be"), ("postgresql:///app?max_size=0", "timeout= must be"),
        ("postgresql:///app?max_size=2.5", "timeout= must be"), ("postgresql:///app?tabel=shop", "no PostgreSQL URL"),
        ("mysql://a@h/app?table=a-b", "table= must be"), ("mysql://a@h/app?table=a%60b", "table= must be"),
        ("mysql://a@h/app?timeout=0", "timeout= must be"), ("mysql://a@h/app?max_size=2.5", "timeout= must be"),
        ("mysql://a@h/app?ssl_verify=maybe", "ssl_verify= must be"), ("mysql://a@h/app?ssl_key=k", "ssl_key= is of no"),
        ("mysql://a@h/app?tabel=shop", "no MySQL URL"),
        ("redis://h?prefix=a%20b", "prefix= must be"), ("redis://h?timeout=0", "timeout= must be"),
    ],
)  # fmt: skip
def test_what_a_url_says_is_checked_as_the_keyword_is(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        connect(url)


def test_the_documented_options_of_postgresql_are_those_there_are() -> None:
    parameters = inspect.signature(PostgresBackend).parameters
    expected = {name: str(parameters[name].default) for name in postgres_module._OURS}
    assert {code(row[0])[0]: code(row[1])[0] for row in rows(marked(PAGE, "postgres options"))} == expected


def test_the_documented_options_of_mysql_are_those_there_are() -> None:
    _, *parameters = inspect.signature(MySQLBackend).parameters.values()
    expected = {parameter.name: str(parameter.default) for parameter in parameters}
    found = {code(row[0])[0]: code(row[1])[0] if code(row[1]) else "" for row in rows(marked(PAGE, "mysql options"))}
    assert found == expected
    assert set(found) == set(mysql_address._OPTIONS)


def test_the_documented_grants_are_enough_for_a_user_who_did_not_make_the_tables(
    postgres: PostgresServer, postgres_database: str
) -> None:
    (grants,) = [block.text for block in blocks(PAGE, "text") if "GRANT USAGE ON SCHEMA" in block.text]

    async def play(url: str, *questions: str) -> None:
        backend = connect(url)
        await backend.open()
        try:
            await backend.initialize()
            for question in questions:
                await getattr(backend, question)(*ARGUMENTS.get(question, ()))
            assert [handle async for handle in backend.handles()] == []
        finally:
            await backend.close()

    def relations(kind: str) -> set[str]:
        found = postgres.run(f"SELECT relname FROM pg_class WHERE relname ~ '^shm' AND relkind = '{kind}'", database)
        return {name for (name,) in found}

    database = postgres_database
    asyncio.run(play(postgres.url(database)))
    assert (relations("r"), relations("i") - {"shmsession_pkey"}) == (
        {"shmsession", "shmsession_meta"},
        {"shmsession_user", "shmsession_horizon"},
    )
    postgres.run(f"REVOKE ALL ON SCHEMA public FROM PUBLIC; CREATE ROLE shop LOGIN PASSWORD '{SECRET}'", database)
    try:
        with pytest.raises(BackendError, match="SQLSTATE"):
            asyncio.run(play(postgres.url(database, "shop", SECRET)))
        postgres.run(grants, database)
        asyncio.run(
            play(postgres.url(database, "shop", SECRET), "write", "load", "sessions_of", "count", "clear", "sweep")
        )
    finally:
        postgres.revive().run("DROP OWNED BY shop; DROP ROLE shop", database)


def test_the_documented_grants_are_enough_on_mysql_too(mariadb: MariaDBServer, mariadb_database: str) -> None:
    (grants,) = [block.text for block in blocks(PAGE, "text") if "GRANT SELECT ON app." in block.text]
    user = f"shop_{mariadb_database}"

    async def play(url: str) -> None:
        backend = connect(url)
        await backend.open()
        try:
            await backend.initialize()
            for question in ("write", "load", "sessions_of", "count", "clear", "sweep"):
                await getattr(backend, question)(*ARGUMENTS.get(question, ()))
            assert [handle async for handle in backend.handles()] == []
        finally:
            await backend.close()

    asyncio.run(play(mariadb.url(mariadb_database)))
    found = mariadb.run("SHOW TABLES", mariadb_database)
    assert {name for (name,) in found} == {"shmsession", "shmsession_meta"}
    mariadb.run(f"CREATE USER {user}@localhost IDENTIFIED BY '{SECRET}'")
    try:
        with pytest.raises(BackendError, match="error 1044"):
            asyncio.run(play(mariadb.url(mariadb_database, user, SECRET)))
        granted = grants.strip().removesuffix(";")
        mariadb.run(granted.replace("app.", f"{mariadb_database}.").replace("TO shop", f"TO {user}@localhost"))
        asyncio.run(play(mariadb.url(mariadb_database, user, SECRET)))
    finally:
        mariadb.revive().run(f"DROP USER {user}@localhost")


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


def test_an_empty_variable_is_told_how_to_say_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHMSESSION_BACKEND", "")
    with pytest.raises(ConfigError, match=r"SHMSESSION_BACKEND: .* or none for memory only"):
        SessionStore()
    monkeypatch.setenv("SHMSESSION_BACKEND", "none")
    assert not SessionStore().is_persistent


@pytest.mark.parametrize(
    ("driver", "scheme", "extra"),
    [("psycopg", "postgresql", "postgres"), ("psycopg", "postgres", "postgres"),
     ("psycopg_pool", "postgres", "postgres"), ("asyncmy", "mysql", "mysql"), ("asyncmy", "mariadb", "mysql"),
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
    imported = set(done.stdout.strip("[]\n").split(", "))
    assert not {"'psycopg'", "'psycopg_pool'", "'asyncmy'", "'redis'", "'asyncpg'"} & imported


def test_an_import_that_fails_inside_the_package_is_no_missing_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError("a bug", name="shmsession.backends.nowhere")

    monkeypatch.setattr(backends, "import_module", fail)
    with pytest.raises(ImportError, match="a bug"):
        connect("redis://localhost")
