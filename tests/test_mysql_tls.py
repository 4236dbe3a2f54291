"""MySQL over TLS, by URL and keyword: who the server is is checked, and no error names a password."""

import asyncio
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsession.backends import Answer, connect
from shmsession.errors import BackendError, BackendUnavailable, ConfigError
from shmsession.testing.rows import live, user_of
from tests.databases import MariaDBServer
from tests.questions import LATER, SECRET
from tests.servers import PATIENCE, new_place
from tests.test_backend_redis import free_port
from tests.tls import self_signed


class TLSServer(MariaDBServer):
    """A MariaDB on a port of this host, which serves nobody there who does not speak TLS."""

    def __init__(self) -> None:
        super().__init__()
        self.port = free_port()
        self.certificate = self_signed(self.place)
        self.key = self.place / "key"
        self.options = (
            "--skip-skip-networking", "--bind-address=127.0.0.1", f"--port={self.port}", "--require-secure-transport",
            f"--ssl-cert={self.certificate}", f"--ssl-key={self.key}", f"--ssl-ca={self.certificate}",
        )  # fmt: skip

    def tcp(self, host: str = "localhost", /, **options: Any) -> str:
        """What an application is given."""
        parameters = "&".join(f"{name}={value}" for name, value in options.items())
        return f"mysql://ada:{SECRET}@{host}:{self.port}/app?{parameters}".rstrip("?")


@pytest.fixture(scope="module")
def server() -> Iterator[TLSServer]:
    with TLSServer() as server:
        server.run("CREATE DATABASE app")
        server.run(f"GRANT ALL ON app.* TO ada@'%' IDENTIFIED BY '{SECRET}'")
        server.run(f"GRANT ALL ON app.* TO known@'%' IDENTIFIED BY '{SECRET}' REQUIRE X509")
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
        row = live(number, LATER, epoch=7, version=9, user=user_of(number), body=bytes(range(256)) * 800)
        assert await backend.write([row]) == [Answer(True, None)]
        assert await backend.write([row]) == [Answer(False, row.mark)]
        assert await backend.load(row.handle) == row
        assert await backend.sessions_of(row.user) == [row]
        assert SECRET not in backend.name + repr(backend)
    finally:
        await backend.close()


async def refusal(url: str) -> BackendError:
    """The error of the first question."""
    backend = connect(url)
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
    asyncio.run(play(server.tcp(ssl_ca=server.certificate), 1))
    asyncio.run(play(server.tcp(), 2, ssl_ca=server.certificate))


def test_every_connection_of_the_pool_is_encrypted(server: TLSServer) -> None:
    """By the server's own account: it serves nobody else there."""

    async def look() -> list[str]:
        backend = connect(server.tcp(ssl_ca=server.certificate))
        await backend.open()
        try:
            await backend.initialize()
            await asyncio.gather(*(backend.load(bytes(20)) for _ in range(20)))
            return [command for (command,) in server.run("SELECT command FROM information_schema.processlist "
                                                         "WHERE user = 'ada'")]  # fmt: skip
        finally:
            await backend.close()

    before = int(server.run("SHOW GLOBAL STATUS LIKE 'Ssl_finished_accepts'")[0][1])
    assert len(asyncio.run(look())) == 4
    assert int(server.run("SHOW GLOBAL STATUS LIKE 'Ssl_finished_accepts'")[0][1]) == before + 4


def test_a_server_that_another_authority_vouches_for_is_refused_clearly(server: TLSServer, stranger: Path) -> None:
    error = asyncio.run(refusal(server.tcp(ssl_ca=stranger)))
    assert type(error) is BackendUnavailable
    assert f"mysql://localhost:{server.port}/app cannot be reached" in str(error)
    assert "certificate verify failed" in str(error)


def test_without_an_authority_of_ones_own_the_systems_are_asked(server: TLSServer) -> None:
    error = asyncio.run(refusal(server.tcp(ssl_verify="true")))
    assert "certificate verify failed" in str(error)


def test_a_certificate_for_another_name_is_refused_clearly(server: TLSServer) -> None:
    error = asyncio.run(refusal(server.tcp("127.0.0.1", ssl_ca=server.certificate)))
    assert type(error) is BackendUnavailable
    assert "IP address mismatch" in str(error)


def test_who_asks_for_no_verification_gets_none(server: TLSServer, stranger: Path) -> None:
    asyncio.run(play(server.tcp("127.0.0.1", ssl_ca=stranger, ssl_verify="false"), 3))
    asyncio.run(play(server.tcp("127.0.0.1"), 4, ssl_verify=False))


def test_a_certificate_of_ones_own_is_shown(server: TLSServer) -> None:
    """To a server that demands one."""
    url = server.tcp(ssl_ca=server.certificate).replace("//ada:", "//known:")
    assert "Access denied" in str(asyncio.run(refusal(url)))
    asyncio.run(play(f"{url}&ssl_cert={server.certificate}&ssl_key={server.key}", 5))


@pytest.mark.parametrize("file", ["missing", "empty"])
@pytest.mark.parametrize("option", ["ssl_ca", "ssl_cert", "ssl_key"])
def test_a_file_that_cannot_be_used_stops_the_start_and_is_named(
    server: TLSServer, tmp_path: Path, option: str, file: str
) -> None:
    if file == "empty":
        (tmp_path / file).touch()
    options = {"ssl_ca": server.certificate, "ssl_cert": server.certificate, "ssl_key": server.key}
    backend = connect(server.tcp(**options | {option: tmp_path / file}))
    with pytest.raises(ConfigError, match=option) as caught:
        asyncio.run(backend.open())
    assert str(tmp_path / file) in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_key_that_is_encrypted_is_an_error_and_no_question_on_the_terminal(server: TLSServer, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(server.key.read_bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"word")
    )
    (tmp_path / "key").write_bytes(encrypted)
    backend = connect(server.tcp(ssl_cert=server.certificate, ssl_key=tmp_path / "key"))
    with pytest.raises(ConfigError, match="the key is encrypted"):
        asyncio.run(backend.open())


def test_who_is_refused_without_tls_is_told_of_it(server: TLSServer) -> None:
    error = asyncio.run(refusal(server.tcp()))
    assert "must use TLS: ssl_ca=" in str(error)


def test_a_server_without_tls_is_refused_when_it_is_wanted(server: TLSServer) -> None:
    """Nothing is said to it but that."""
    with MariaDBServer("--skip-skip-networking", f"--port={(port := free_port())}", "--bind-address=127.0.0.1") as bare:
        assert bare.is_running
        error = asyncio.run(refusal(f"mysql://ada:{SECRET}@127.0.0.1:{port}/app?ssl_ca={server.certificate}"))
    assert type(error) is BackendUnavailable


def test_a_wrong_password_over_tls_is_an_error_that_does_not_tell_it(server: TLSServer) -> None:
    wrong = server.tcp(ssl_ca=server.certificate).replace(SECRET, SECRET[::-1])
    error = asyncio.run(refusal(wrong))
    assert SECRET[::-1] not in "".join(traceback.format_exception(error))
    assert "Access denied" in str(error)


def test_a_stopped_server_is_unavailable_in_time_over_tls_too(server: TLSServer) -> None:
    async def ask() -> None:
        backend = connect(server.tcp(ssl_ca=server.certificate, timeout=1))
        await backend.open()
        try:
            await backend.initialize()
            server.freeze()
            begun = asyncio.get_running_loop().time()
            for body in (b"", bytes(4 << 20)):
                with pytest.raises(BackendUnavailable, match="did not answer within 1 s"):
                    await backend.write([live(6, LATER, body=body)])
            assert asyncio.get_running_loop().time() - begun < 8
            server.thaw()
            assert (await backend.write([live(7, LATER)]))[0].applied
        finally:
            server.thaw()
            await backend.close()

    asyncio.run(ask())
