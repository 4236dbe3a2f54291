"""PostgreSQL over TLS, by URL and keyword: who it is is checked, and no error names a password."""

import asyncio
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsession import Key, SessionConfig, SessionStore
from shmsession.backends import Answer, connect
from shmsession.errors import BackendError, BackendUnavailable
from shmsession.testing.rows import live, user_of
from tests.databases import PostgresServer
from tests.questions import LATER, SECRET
from tests.servers import PATIENCE, new_place
from tests.test_backend_redis import free_port
from tests.tls import self_signed


class TLSServer(PostgresServer):
    """A PostgreSQL on a port of this host, which serves nobody there who does not speak TLS."""

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
        self.certificate = self_signed(self.place)
        key = self.place / "key"
        key.chmod(0o600)
        account = self._account()
        if account:
            os.chown(key, account.pw_uid, account.pw_gid)
        settings = {
            "listen_addresses": "127.0.0.1", "port": str(self.port), "ssl": "on",
            "ssl_cert_file": str(self.certificate), "ssl_key_file": str(key),
        }  # fmt: skip
        self.options = tuple(flag for name, value in settings.items() for flag in ("-c", f"{name}={value}"))

    def _initialize(self) -> None:
        super()._initialize()
        (self.data / "pg_hba.conf").write_text("local all postgres trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n")

    def url(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        """By the socket: for the tests themselves."""
        return f"{super().url(database, user, password)}&port={self.port}"

    def tcp(self, **options: Any) -> str:
        """What an application is given."""
        parameters = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://ada:{SECRET}@localhost:{self.port}/app?hostaddr=127.0.0.1&{parameters}"


@pytest.fixture(scope="module")
def server() -> Iterator[TLSServer]:
    with TLSServer() as server:
        server.run(f"CREATE ROLE ada LOGIN PASSWORD '{SECRET}'")
        server.run("CREATE DATABASE app OWNER ada")
        yield server


@pytest.fixture
def stranger() -> Iterator[Path]:
    """The certificate of somebody else who calls himself the same."""
    place = new_place()
    yield self_signed(place)
    for file in place.iterdir():
        file.unlink()
    place.rmdir()


async def play(url: str, number: int, **options: Any) -> None:
    """The contract's row goes in, stands, and comes out."""
    backend = connect(url, **options)
    await backend.open()
    try:
        await backend.initialize()
        row = live(number, LATER, epoch=7, version=9, user=user_of(number), body=bytes(range(256)) * 8)
        assert await backend.write([row]) == [Answer(True, None)]
        assert await backend.write([row]) == [Answer(False, row.mark)]
        assert await backend.load(row.handle) == row
        assert await backend.sessions_of(row.user) == [row]
        assert SECRET not in backend.name + repr(backend)
    finally:
        await backend.close()


async def refusal(url: str, **options: Any) -> BackendError:
    """The error of the first question."""
    backend = connect(url, **options)
    await backend.open()
    try:
        async with asyncio.timeout(PATIENCE):
            with pytest.raises(BackendError) as caught:
                await backend.load(bytes(20))
    finally:
        await backend.close()
    told = "".join(traceback.format_exception(caught.value))
    assert SECRET not in told
    assert SECRET not in repr(caught.value.args)
    return caught.value


def test_a_row_goes_in_and_out_over_a_connection_whose_server_was_verified(server: TLSServer) -> None:
    url = server.tcp(sslmode="verify-full", sslrootcert=server.certificate)
    asyncio.run(play(url, 1))
    asyncio.run(play(server.tcp(), 2, sslmode="verify-full", sslrootcert=str(server.certificate)))


def test_every_connection_of_the_pool_is_encrypted(server: TLSServer) -> None:
    """By the server's own account."""

    async def look() -> list[tuple[Any, ...]]:
        backend = connect(server.tcp(sslmode="verify-full", sslrootcert=server.certificate))
        await backend.open()
        try:
            await backend.initialize()
            await asyncio.gather(*(backend.load(bytes(20)) for _ in range(20)))
            return server.run(
                "SELECT DISTINCT ssl, version LIKE 'TLSv1.%' FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                "WHERE application_name = 'shmsession'"
            )
        finally:
            await backend.close()

    assert asyncio.run(look()) == [(True, True)]


def test_a_server_that_another_authority_vouches_for_is_refused_clearly(server: TLSServer, stranger: Path) -> None:
    error = asyncio.run(refusal(server.tcp(sslmode="verify-full", sslrootcert=stranger)))
    assert type(error) is BackendUnavailable
    assert "postgresql://localhost/app cannot be reached" in str(error)
    assert "certificate verify failed" in str(error)


def test_a_certificate_for_another_name_is_refused_clearly(server: TLSServer) -> None:
    url = server.tcp(sslmode="verify-full", sslrootcert=server.certificate).replace("@localhost:", "@127.0.0.1:")
    error = asyncio.run(refusal(url))
    assert type(error) is BackendUnavailable
    assert "127.0.0.1" in str(error)
    assert "localhost" in str(error)


@pytest.mark.parametrize("file", ["missing", "empty"])
def test_an_authority_that_cannot_be_read_is_named(server: TLSServer, tmp_path: Path, file: str) -> None:
    if file == "empty":
        (tmp_path / file).touch()
    error = asyncio.run(refusal(server.tcp(sslmode="verify-full", sslrootcert=tmp_path / file)))
    assert str(tmp_path / file) in str(error)


def test_without_tls_the_server_answers_that_it_wants_it(server: TLSServer) -> None:
    error = asyncio.run(refusal(server.tcp(sslmode="disable")))
    assert "no encryption" in str(error)


def test_a_wrong_password_over_tls_is_an_error_that_does_not_tell_it(server: TLSServer) -> None:
    wrong = server.tcp(sslmode="verify-full", sslrootcert=server.certificate).replace(SECRET, SECRET[::-1])
    error = asyncio.run(refusal(wrong))
    assert SECRET[::-1] not in "".join(traceback.format_exception(error))
    assert "password" in str(error)


def test_a_session_comes_back_over_tls_when_memory_is_lost(server: TLSServer, place: Path) -> None:
    keys, url = (Key.generate(),), server.tcp(sslmode="verify-full", sslrootcert=server.certificate)

    def store(directory: str) -> SessionStore:
        config = SessionConfig(directory=place / directory, keys=keys, name="test", map_size=4 << 20, secure=False)
        return SessionStore(url, config=config)

    with store("one") as first:
        session = first.session()
        session["cart"] = ["tea"]
        session.renew(user_id="ada")
        session.save()
        assert session.id is not None
        assert first.sync.flush(PATIENCE)
    with store("two") as second:
        found = second.session(session.id)
        assert (found.user_id, dict(found)) == ("ada", {"cart": ["tea"]})
