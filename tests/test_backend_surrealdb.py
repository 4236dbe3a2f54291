"""SurrealDB as a backend: the contract, and what a server can do to it.

The server is SurrealDB's own engine behind a websocket of ours (tests/surreal_front.py).
"""

import asyncio
import contextlib
import inspect
import os
import socket
import traceback
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve

from shmsession.backends import FOREVER, SENTINEL, Answer, Backend, Mark, Row, State, connect
from shmsession.backends.surrealdb import SurrealDBBackend, _chunks
from shmsession.backends.surrealdb_client import Client
from shmsession.backends.surrealdb_socket import Socket
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing import BackendContract
from tests.documents import ROOT, code, marked, rows
from tests.figures import SEED, report, rng, size
from tests.questions import LATER, SECRET, asynchronous, kept_through_kills, live, said
from tests.servers import PATIENCE, new_place
from tests.surreal_servers import SurrealServer
from tests.tls import self_signed

pytest_plugins = ["tests.database_hosts"]


PAGE = ROOT / "docs" / "surrealdb.md"

SLACK = 3.0
"""Seconds by which a slow machine may exceed a timeout."""


@contextlib.asynccontextmanager
async def opened(url: str, *, bare: bool = False, **options: Any) -> AsyncIterator[SurrealDBBackend]:
    """A backend that is open, with its tables made unless `bare`."""
    backend = SurrealDBBackend(url, **options)
    await backend.open()
    try:
        if not bare:
            await backend.initialize()
        yield backend
    finally:
        await backend.close()


async def timed(question: Awaitable[object]) -> float:
    """For how long it was asked."""
    start = asyncio.get_running_loop().time()
    await question
    return asyncio.get_running_loop().time() - start


@pytest.fixture
def url(surreal: SurrealServer, surreal_database: str) -> str:
    """An empty database's."""
    return surreal.url(surreal_database)


class TestContract(BackendContract):
    """The contract that all backends keep."""

    seed = SEED

    @pytest.fixture(autouse=True)
    def _empty_database(self, url: str) -> None:
        self.url = url

    def backend(self) -> Backend:
        return connect(self.url)


@pytest.mark.parametrize("table", ["select", "user", "Table", "_", "a" * 48])
@asynchronous
async def test_a_table_may_have_any_name_also_one_that_is_a_word_of_the_language(url: str, table: str) -> None:
    async with opened(f"{url}?table={table}") as one, opened(url) as other:
        assert await one.write([live(1)]) == [Answer(True, None)]
        assert [handle async for handle in one.handles()] == [live(1).handle]
        assert await one.sessions_of(b"somebody") == [live(1)]
        assert await other.load(live(1).handle) is None
        assert (await one.sweep(LATER + 1, 5), await one.count(), await one.clear()) == (1, 0, 0)


@asynchronous
async def test_more_than_a_megabyte_is_sent_in_parts_and_answered_in_order(url: str) -> None:
    rows = [live(number, body=bytes(300_000)) for number in range(9)]
    async with opened(url) as backend:
        await backend.write([rows[4]])
        expected = [Answer(row != rows[4], rows[4].mark if row == rows[4] else None) for row in rows]
        assert await backend.write(rows) == expected
    assert [len(chunk) for chunk in _chunks(rows)] == [3, 3, 3]
    assert list(_chunks([])) == []


# ── killed, stopped, cut off ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.soak
@asynchronous
async def test_what_was_answered_survives_kill_9_in_the_middle_of_batches(
    surreal: SurrealServer, surreal_database: str, url: str
) -> None:
    def versions() -> dict[bytes, int]:
        (rows,) = surreal.run("SELECT record::id(id) AS handle, version FROM shmsession", surreal_database)
        return {bytes.fromhex(row["handle"]): row["version"] for row in rows}

    async with opened(url) as backend:
        done = await kept_through_kills(backend, size(50, 3), rng("surrealdb kills"), surreal.restart, versions)
    report("surrealdb kill -9", **done._asdict(), lost=0)


@asynchronous
async def test_the_first_question_after_a_restart_is_answered(surreal: SurrealServer, url: str) -> None:
    async with opened(url) as backend:
        await backend.write([live(1)])
        for _ in range(3):
            surreal.restart()
            assert await backend.load(live(1).handle) == live(1)


@asynchronous
async def test_a_server_that_is_down_is_unavailable_at_once_and_back_as_soon_as_it_is_up(
    surreal: SurrealServer, url: str
) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        await backend.write([live(1)])
        surreal.kill()
        for _ in range(3):
            told = await said(backend.load(live(1).handle))
            assert str(surreal.port) in told
        surreal.start()
        assert await backend.load(live(1).handle) == live(1)


@asynchronous
async def test_it_opens_while_the_server_is_down(surreal: SurrealServer, url: str) -> None:
    surreal.kill()
    async with opened(url, bare=True) as backend:
        await said(backend.initialize())
        surreal.start()
        await backend.initialize()
        assert await backend.count() == 0


@asynchronous
async def test_a_stopped_server_is_unavailable_within_the_timeout_and_asked_anew_when_it_goes_on(
    surreal: SurrealServer, url: str
) -> None:
    async with opened(url, timeout=0.8) as backend:
        await backend.write([live(1)])
        surreal.freeze()
        loop = asyncio.get_running_loop()
        for _ in range(3):  # the last ones find no connection, and nobody to make one with
            start = loop.time()
            told = await asyncio.gather(*(said(backend.load(live(1).handle)) for _ in range(5)))
            assert loop.time() - start < 0.8 + SLACK
            assert all("0.8 s" in each for each in told)
        surreal.thaw()
        while True:
            with contextlib.suppress(BackendUnavailable):
                assert await backend.load(live(1).handle) == live(1)
                break


@asynchronous
async def test_a_server_that_accepts_and_says_nothing_is_unavailable_in_time() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        async with opened(f"surrealdb+ws://127.0.0.1:{silent.getsockname()[1]}/n/d", bare=True, timeout=0.2) as backend:
            start = asyncio.get_running_loop().time()
            await said(backend.load(bytes(20)))
            assert asyncio.get_running_loop().time() - start < 0.2 + SLACK


@asynchronous
async def test_who_hangs_up_during_the_login_is_unavailable_and_not_asked_twice() -> None:
    hung_up = 0

    async def hang_up(connection: ServerConnection) -> None:
        nonlocal hung_up
        await connection.recv()  # `use`
        hung_up += 1

    protocols: Any = ["cbor"]
    async with serve(hang_up, "127.0.0.1", 0, subprotocols=protocols) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        async with opened(f"surrealdb+ws://127.0.0.1:{port}/n/d", bare=True, timeout=PATIENCE) as backend:
            assert "broke off" in await said(backend.load(bytes(20)))
    assert hung_up == 1


@asynchronous
async def test_cut_off_between_two_questions_it_asks_on_a_new_connection(url: str) -> None:
    async with opened(url) as backend:
        await backend.write([live(1)])
        for _ in range(5):
            transport_of(backend).abort()  # nobody has noticed yet when the next one asks
            assert await backend.load(live(1).handle) == live(1)


def transport_of(backend: SurrealDBBackend) -> asyncio.WriteTransport:
    client = backend._client
    assert isinstance(client, Socket)
    assert client._link is not None
    transport: asyncio.WriteTransport = client._link.result().socket.transport
    return transport


@asynchronous
async def test_many_questions_at_once_use_one_connection(url: str) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        transport, rows = transport_of(backend), [live(number) for number in range(60)]
        await asyncio.gather(*(backend.write([row]) for row in rows))
        assert await asyncio.gather(*(backend.load(row.handle) for row in rows)) == rows
        assert transport_of(backend) is transport


@asynchronous
async def test_who_is_cancelled_disturbs_no_other_question(url: str) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        rows = [live(number) for number in range(40)]
        await backend.write(rows)
        transport = transport_of(backend)
        for turn in range(20):
            tasks = [asyncio.create_task(backend.load(row.handle)) for row in rows]
            for _ in range(turn % 7):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            assert found[1::2] == rows[1::2]
        assert transport_of(backend) is transport, "it was the same connection all the time"


@asynchronous
async def test_closing_ends_what_is_still_asked(surreal: SurrealServer, url: str) -> None:
    async with opened(url, timeout=PATIENCE) as backend:
        surreal.freeze()
        try:
            asked = [asyncio.create_task(said(backend.load(bytes(20)))) for _ in range(3)]
            await asyncio.sleep(0)
            assert await timed(backend.close()) < SLACK
            await asyncio.gather(*asked)
        finally:
            surreal.thaw()
    async with opened(url, bare=True, timeout=PATIENCE) as backend:  # while it connects
        surreal.freeze()
        try:
            asked = [asyncio.create_task(said(backend.load(bytes(20)))) for _ in range(3)]
            await asyncio.sleep(0)
            assert await timed(backend.close()) < SLACK
            await asyncio.gather(*asked)
        finally:
            surreal.thaw()


def test_a_forked_child_makes_a_connection_of_its_own_and_leaves_the_parents(url: str) -> None:
    with asyncio.Runner() as runner:
        backend = SurrealDBBackend(url)
        runner.run(backend.open())
        runner.run(backend.initialize())
        runner.run(backend.write([live(1)]))
        transport = transport_of(backend)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = asyncio.run(in_a_child(backend))
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert runner.run(backend.load(live(2).handle)) == live(2)
        assert transport_of(backend) is transport
        runner.run(backend.close())


async def in_a_child(backend: SurrealDBBackend) -> int:
    assert "not open" in await said(backend.load(live(1).handle))
    await backend.close()  # which is the parent's
    await backend.open()
    assert await backend.load(live(1).handle) == live(1)
    assert await backend.write([live(2)]) == [Answer(True, None)]
    await backend.close()
    return 0


# ── others that write ──────────────────────────────────────────────────────────────────────────────────────────


class Scripted(Client):
    """A database that says what it was told to."""

    def __init__(self, *answers: str) -> None:
        super().__init__("scripted", "shmsession", 0.5)
        self.answers = list(answers)
        self.asked = 0

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def _exchange(self, text: str, variables: dict[str, Any]) -> Mapping[str, Any]:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if not answer:
            return {"result": [{"status": "OK", "result": 7}]}
        return {"result": [{"status": "ERR", "result": NOT_RUN}, {"status": "ERR", "result": answer}]}


NOT_RUN = "The query was not executed due to a failed transaction"
LOST = {
    2: f"{NOT_RUN}. Failed to commit transaction due to a read or write conflict. This transaction can be retried",
    3: "Transaction conflict: Write conflict. This transaction can be retried",
}
"""As version 2.3.10 says it, and version 3.0.2."""


@pytest.mark.parametrize("lost", LOST.values(), ids=map(str, LOST))
@asynchronous
async def test_a_transaction_that_loses_against_others_is_repeated_until_the_time_is_over(lost: str) -> None:
    client = Scripted(lost, lost, lost, "")
    async with client.question():
        assert await client.ask("") == 7
    assert client.asked == 4
    client = Scripted(lost)

    async def question() -> None:
        async with client.question():
            await client.ask("")

    assert "0.5 s" in await said(question())
    assert client.asked > 4


@pytest.mark.parametrize(
    ("text", "unavailable", "advice"),
    [
        ("There was a problem with the database: There was a problem with authentication", False, "credentials"),
        ("Anonymous access not allowed: Not enough permissions to perform this action", False, "credentials"),
        ("IAM error: Not enough permissions to perform this action", False, "EDITOR"),
        ("The namespace 'shop' does not exist", False, "DEFINE"),
        ("The database 'shop' does not exist", False, "DEFINE"),
        ("The table 'shmsession_meta' does not exist", False, "initdb"),
        ("An error occurred: shmsession schema 0", False, "initdb"),
        ("An error occurred: shmsession schema 9", False, "upgrade"),
        ("The table 'shmsession' already exists", False, "table="),
        ("The query was not executed because it exceeded the timeout: 1ns", True, "gave up"),
        (f'Found b"{SECRET}" for field `body`', False, "log"),
        (f"Found '{SECRET}' for field `user`", False, "log"),
        (f"Couldn't coerce value: Expected `int` but found '{SECRET}'", False, "Couldn't coerce value"),
        (f"'{SECRET}'", False, "quotes"),
    ],
)
@asynchronous
async def test_what_the_server_refuses_is_explained_and_no_value_is_quoted(
    text: str, unavailable: bool, advice: str
) -> None:
    client = Scripted(text)

    async def question() -> None:
        async with client.question():
            await client.ask("")

    assert advice in await said(question(), BackendUnavailable if unavailable else BackendError)


# ── tables, rows and rights ────────────────────────────────────────────────────────────────────────────────────


@asynchronous
async def test_a_row_of_no_known_state_stops_no_batch_and_is_no_answer(
    surreal: SurrealServer, surreal_database: str, url: str
) -> None:
    """It counts as ERASED, and whatever is newer replaces it."""
    async with opened(url) as backend:
        await backend.write([live(1), live(2)])
        surreal.run(f"UPDATE shmsession:⟨{live(1).handle.hex()}⟩ SET state = 7", surreal_database)
        assert live(1).handle.hex() in await said(backend.load(live(1).handle), BackendError)
        expected = [Answer(True, Mark(state, 1, 1)) for state in (State.ERASED, State.LIVE)]
        assert await backend.write([live(1, 2), live(2, 2)]) == expected
        assert [await backend.load(live(n).handle) for n in (1, 2)] == [live(1, 2), live(2, 2)]


@asynchronous
async def test_an_error_quotes_no_session(surreal: SurrealServer, surreal_database: str, url: str) -> None:
    async with opened(url) as backend:
        surreal.run("DEFINE FIELD OVERWRITE body ON shmsession TYPE int", surreal_database)
        told = await said(backend.write([live(1, body=SECRET.encode())]), BackendError)
        assert SECRET.encode().hex().upper() not in told.upper()
        surreal.run("DEFINE FIELD OVERWRITE user ON shmsession TYPE int", surreal_database)
        assert b"somebody".hex() not in await said(backend.write([live(1)]), BackendError)


@asynchronous
async def test_missing_tables_are_an_error_never_an_empty_database(
    surreal: SurrealServer, surreal_database: str, url: str
) -> None:
    """Also when they are removed while it works."""
    async with opened(url, bare=True) as backend:
        for turn in range(2):
            questions = [
                backend.load(SENTINEL), backend.write([live(1)]), backend.sweep(LATER, 5), backend.count(),
                backend.sessions_of(b"somebody"), backend.clear(), anext(backend.handles()),
            ]  # fmt: skip
            for question in questions:
                assert "initdb" in await said(question, BackendError)
            if turn == 0:
                await backend.initialize()
                await backend.write([live(1)])
                surreal.run("REMOVE TABLE shmsession_meta", surreal_database)


@asynchronous
async def test_tables_of_another_version_are_refused(surreal: SurrealServer, surreal_database: str, url: str) -> None:
    async with opened(url) as backend:
        surreal.run("UPDATE shmsession_meta:schema SET version = 2", surreal_database)
        assert "upgrade shmsession" in await said(backend.initialize(), BackendError)
        assert "upgrade shmsession" in await said(backend.load(bytes(20)), BackendError)


@asynchronous
async def test_another_programs_table_is_left_alone(surreal: SurrealServer, surreal_database: str, url: str) -> None:
    surreal.run("DEFINE TABLE shmsession; CREATE shmsession:1 SET mine = true", surreal_database)
    async with opened(url, bare=True) as backend:
        assert "not one of ours" in await said(backend.initialize(), BackendError)
        assert "initdb" in await said(backend.write([live(1)]), BackendError)
    (tables,) = surreal.run("INFO FOR DB", surreal_database)
    assert set(tables["tables"]) == {"shmsession"}
    (rows,) = surreal.run("SELECT VALUE mine FROM shmsession", surreal_database)
    assert rows == [True]


@asynchronous
async def test_users_and_horizons_are_looked_up_by_an_index(
    surreal: SurrealServer, surreal_database: str, url: str
) -> None:
    async with opened(url):
        for where, index in (("user = 'a' AND state = 1", "user"), ("horizon < 5", "horizon")):
            ((plan, *_),) = surreal.run(f"SELECT VALUE id FROM shmsession WHERE {where} EXPLAIN", surreal_database)
            assert plan["operation"] == "Iterate Index"
            assert plan["detail"]["plan"]["index"] == f"shmsession_{index}"


@pytest.mark.parametrize("level", ["DATABASE", "NAMESPACE", "ROOT"])
@asynchronous
async def test_an_editor_of_any_level_may_do_all(surreal: SurrealServer, surreal_database: str, level: str) -> None:
    name = f"editor_{surreal_database}"
    surreal.run(f"DEFINE USER {name} ON {level} PASSWORD 'a/b@c:d?e' ROLES EDITOR", surreal_database)
    async with opened(surreal.url(surreal_database, name, "a%2Fb%40c%3Ad%3Fe")) as backend:
        sentinel = Row(SENTINEL, State.LIVE, 1, 1, FOREVER)
        assert await backend.write([live(1), sentinel]) == [Answer(True, None)] * 2
        assert await backend.load(live(1).handle) == live(1)
        surreal.restart()
        assert await backend.clear() == 1
        assert await backend.sweep(LATER + 1, 5) == 1


@asynchronous
async def test_who_may_only_look_is_told_that_nothing_was_changed(
    surreal: SurrealServer, surreal_database: str
) -> None:
    """The server itself says nothing of it: what a viewer changes just stays as it was."""
    name = f"viewer_{surreal_database}"
    surreal.run(f"DEFINE USER {name} ON DATABASE PASSWORD '{SECRET}' ROLES VIEWER", surreal_database)
    async with opened(surreal.url(surreal_database, name, SECRET), bare=True) as viewer:
        assert "EDITOR" in await said(viewer.initialize(), BackendError)
        async with opened(surreal.url(surreal_database)) as backend:
            await backend.write([live(1)])
        await viewer.initialize()  # they are there
        questions = [
            viewer.write([live(2)]), viewer.write([live(1, 2)]), viewer.write([live(1, horizon=LATER + 1)]),
            viewer.sweep(LATER + 1, 5), viewer.clear(),
        ]  # fmt: skip
        for question in questions:
            assert "EDITOR" in await said(question, BackendError)
        assert await viewer.load(live(1).handle) == live(1)
        assert await viewer.count() == 1


@pytest.mark.parametrize(("user", "password"), [("root", SECRET), (SECRET, "secret")])
@asynchronous
async def test_wrong_credentials_are_an_error_that_does_not_tell_them(
    surreal: SurrealServer, surreal_database: str, user: str, password: str
) -> None:
    async with opened(surreal.url(surreal_database, user, password), bare=True) as backend:
        for question in (backend.initialize(), backend.load(bytes(20))):
            assert "credentials" in await said(question, BackendError)
        assert SECRET not in backend.name + repr(backend)


@asynchronous
async def test_without_credentials_it_asks_as_nobody(surreal: SurrealServer) -> None:
    async with opened(f"surrealdb+ws://localhost:{surreal.port}/test/nobody", bare=True) as backend:
        assert "role" in await said(backend.initialize(), BackendError)


@asynchronous
async def test_a_login_that_has_expired_is_made_anew(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    async with opened(url) as backend:
        await backend.write([live(1)])
        client = backend._client
        assert isinstance(client, Socket)
        assert client._link is not None
        connection = client._link.result()

        async def expired(*_: object) -> dict[str, Any]:
            raise RuntimeError("The session has expired")

        monkeypatch.setattr(connection, "query_raw", expired)
        assert await backend.load(live(1).handle) == live(1)
        assert transport_of(backend) is not connection.socket.transport


# ── TLS ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def certificate() -> Iterator[Path]:
    """One for localhost, beside its key."""
    place = new_place()
    yield self_signed(place)
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


@pytest.fixture
def tls_server(certificate: Path) -> Iterator[SurrealServer]:
    with SurrealServer(certificate, certificate.with_name("key")) as server:
        yield server


def test_over_tls_it_is_checked_who_the_server_is(tls_server: SurrealServer, certificate: Path) -> None:
    async def play() -> None:
        url = tls_server.url("app")
        async with opened(url, ca_file=str(certificate)) as backend:
            assert backend.name == f"surrealdb+wss://localhost:{tls_server.port}/test/app"
            await backend.write([live(1)])
            assert await backend.load(live(1).handle) == live(1)
        async with opened(f"{url}?ca_file={certificate}", bare=True) as backend:
            assert await backend.count() == 1
        async with opened(url.replace("localhost", "127.0.0.1"), bare=True, ca_file=str(certificate)) as backend:
            assert "certificate" in await said(backend.load(bytes(20)))
        async with opened(url, bare=True) as backend:
            assert "certificate" in await said(backend.load(bytes(20)))

    asyncio.run(play())


@asynchronous
async def test_a_file_of_certificates_that_is_none_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("none")
    for name in ("missing", "text"):
        with pytest.raises(ConfigError, match="ca_file"):
            await SurrealDBBackend("surrealdb+wss://localhost/n/d", ca_file=str(tmp_path / name)).open()


# ── the URL ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (f"surrealdb+ws://ada:{SECRET}@db.example/shop/app", "surrealdb+ws://db.example:8000/shop/app"),
        (f"SURREALDB+WSS://ada:{SECRET}@db.example/shop/app", "surrealdb+wss://db.example:443/shop/app"),
        ("surrealdb+ws://[::1]:8001/shop/a%2Fpp?timeout=2", "surrealdb+ws://[::1]:8001/shop/a/pp"),
    ],
)
def test_the_name_says_where_and_no_secret(url: str, name: str) -> None:
    backend = connect(url)
    assert isinstance(backend, SurrealDBBackend)
    assert backend.name == name
    assert backend.remote
    assert not backend.expires
    assert not hasattr(backend, "path")
    assert SECRET not in repr(backend)


@pytest.mark.parametrize(
    "url",
    [
        f"surrealdb+ws://ada:{SECRET}@host",
        f"surrealdb+ws://ada:{SECRET}@host/shop",
        f"surrealdb+ws://ada:{SECRET}@host/shop/",
        f"surrealdb+ws://ada:{SECRET}@host/shop/app/more",
        f"surrealdb+ws://ada:{SECRET}@host:port/shop/app",
        f"surrealdb+ws://ada:{SECRET}/x@host/shop/app",
        f"surrealdb+ws://ada:{SECRET}#x@host/shop/app",
        f"surrealdb+ws://ada:{SECRET}?x@host/shop/app",
        f"surrealdb+ws://ada:{SECRET}@host/shop/app?unknown=1",
        f"surrealdb+ws://ada:{SECRET}@host/shop/app?table=shop;{SECRET}",
        f"surrealdb+ws://ada:{SECRET}@host/shop/app?table=1st",
        f"surrealdb+ws://ada:{SECRET}@host/shop/app?timeout=0",
        f"surrealdb+ws://ada:{SECRET}@host/shop/app?timeout=soon",
        f"surrealdb+ws://ada:{SECRET}@host/shop/app?ca_file=/ca.pem",
        f"surrealdb+ws://{SECRET}@host/shop/app",
        f"surrealdb+ws:///{SECRET}/app",
        f"surrealdb+mem://{SECRET}",
        f"surrealdb+mem:///{SECRET}",
        "surrealdb+surrealkv://",
        "surrealdb+surrealkv:///",
        f"surrealdb+surrealkv://ada:{SECRET}@path",
        "surrealdb+surrealkv:///a%00b",
        f"surrealdb+ws://[{SECRET}/shop/app",
    ],
)
def test_what_cannot_work_is_refused_at_once_and_quotes_no_secret(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        connect(url)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_the_options_of_the_url_are_those_of_the_class() -> None:
    backend = SurrealDBBackend("surrealdb+ws://host/n/d?table=shop&timeout=2.5", table="other", timeout=9)
    assert (backend._client.table, backend._client.timeout) == ("shop", 2.5)


def test_the_documented_options_are_those_there_are() -> None:
    parameters = inspect.signature(SurrealDBBackend).parameters
    expected = {name: str(parameter.default) for name, parameter in parameters.items() if name != "url"}
    table = {code(row[0])[0]: code(row[1])[0] for row in rows(marked(PAGE, "surrealdb options"))}
    assert table == expected


@asynchronous
async def test_a_question_before_open_says_what_to_do() -> None:
    for url in ("surrealdb+ws://localhost/n/d", "surrealdb+mem://"):
        assert "open" in await said(SurrealDBBackend(url).load(bytes(20)))
