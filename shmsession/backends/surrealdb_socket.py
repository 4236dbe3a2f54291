"""A websocket to a SurrealDB server, by its driver: one for all questions of a process, made anew when it broke."""

import asyncio
import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

import websockets
from surrealdb import AsyncWsSurrealConnection

from shmsession.errors import BackendUnavailable, ConfigError

from .surrealdb_client import TRANSPORT, Broken, Client, Failed, line, outcome

_CLOSE_SECONDS: Final = 0.5


class _Connection(AsyncWsSurrealConnection):
    """The driver's, with our certificates, and without the proxies that variables name."""

    def __init__(self, url: str, tls: ssl.SSLContext | None) -> None:
        super().__init__(url)
        self._tls = tls

    @property
    def is_alive(self) -> bool:
        """Whether somebody reads what the server says."""
        return self.recv_task is not None and not self.recv_task.done()

    async def connect(self, url: str | None = None) -> None:
        """Connect, unless it is connected."""
        if self.socket is None:
            self.socket = await websockets.connect(
                self.raw_url, ssl=self._tls, proxy=None, max_size=None, compression=None, open_timeout=None,
                close_timeout=_CLOSE_SECONDS, subprotocols=[websockets.Subprotocol("cbor")],
            )  # fmt: skip
            self.loop = asyncio.get_running_loop()
            self.recv_task = asyncio.create_task(self._recv_task())


Login = tuple[str, str]


class Socket(Client):
    """See Client. `address`: ws://host:port or wss://host:port. `ca_file`: whose certificates are believed."""

    def __init__(
        self, address: str, *, namespace: str, database: str, login: Login | None, ca_file: str | None, table: str,
        timeout: float,
    ) -> None:  # fmt: skip
        super().__init__(f"surrealdb+{address}/{namespace}/{database}", table, timeout)
        self._address, self._namespace, self._database = address, namespace, database
        self._login, self._ca_file = login, ca_file
        self._levels = [{"namespace": namespace, "database": database}, {"namespace": namespace}, {}]
        """What a user may be one of: the database, the namespace, the server. The one that worked comes first."""
        self._tls: ssl.SSLContext | None = None
        self._link: asyncio.Task[_Connection] | None = None
        self._since = 0.0
        """When it was begun, on the loop's clock."""
        self._closing = asyncio.Event()
        self._ending: set[asyncio.Task[None]] = set()
        self._pid = 0
        self._inherited: list[object] = []
        """What a parent had open before a fork is kept: its end here would disturb the parent."""

    async def open(self) -> None:
        """Make ready; it connects when something is asked. Raises ConfigError when `ca_file` cannot be used."""
        if self._pid and self._pid != os.getpid():
            self._inherited += [self._link, self._ending]
            self._link, self._ending = None, set()
        if self._address.startswith("wss:") and self._tls is None:
            try:
                self._tls = ssl.create_default_context(cafile=self._ca_file)
            except OSError as error:
                raise ConfigError(f"ca_file {self._ca_file}: {error}: name a file of certificates in PEM") from None
        if self._pid != os.getpid():
            self._pid, self._closing = os.getpid(), asyncio.Event()

    async def close(self) -> None:
        """Close the connection."""
        if self._pid == os.getpid():
            self._pid = 0
            self._retire(self._link)
            self._closing.set()
            await asyncio.gather(*self._ending)

    async def _exchange(self, text: str, variables: dict[str, Any]) -> Mapping[str, Any]:
        """Once more, on a new connection, when the one that there was is broken, or its login over."""
        for again in (False, True):
            link = self._linked()
            await asyncio.wait({link})
            if link.cancelled():
                break
            connection = link.result()  # raises what kept it from being made
            try:
                return await outcome(connection.query_raw(text, variables))
            except Broken:
                self._retire(link)
                if again:
                    raise
            except Failed as failed:
                if again or not failed.has_expired:
                    raise
                self._retire(link)
        raise Broken("it was closed")

    def _linked(self) -> "asyncio.Task[_Connection]":
        """The connection, or one that is being made."""
        if self._pid != os.getpid():
            raise BackendUnavailable(f"{self.name} is not open: `await backend.open()` first")
        if self._link is None or (self._link.done() and not _is_alive(self._link)):
            self._retire(self._link)
            self._link, self._since = asyncio.create_task(self._connect()), asyncio.get_running_loop().time()
        return self._link

    def _late(self) -> None:
        """Whatever is wrong with the connection: it is not used again, if it is the one that was waited on."""
        if asyncio.get_running_loop().time() - self._since >= self.timeout:
            self._retire(self._link)

    async def _connect(self) -> _Connection:
        """One that may be asked."""
        connection = _Connection(self._address, self._tls)
        try:
            async with asyncio.timeout(self.timeout):
                await connection.connect()
                if self._login is not None:
                    await self._sign_in(connection, *self._login)
                await outcome(connection.use(self._namespace, self._database))
        except BaseException as error:
            await connection.close()
            if isinstance(error, TimeoutError):
                raise Broken(f"it let nobody in within {self.timeout:g} s") from None
            if isinstance(error, TRANSPORT):
                raise Broken(line(error)) from None
            raise
        return connection

    async def _sign_in(self, connection: _Connection, user: str, password: str) -> None:
        for level in list(self._levels):
            try:
                await outcome(connection.signin({**level, "username": user, "password": password}))
            except Failed as failed:
                if not failed.is_login or level == self._levels[-1]:
                    raise
            else:
                self._levels.sort(key=level.__ne__)
                return

    def _retire(self, link: "asyncio.Task[_Connection] | None") -> None:
        """Ask nothing more on it, and end it when those that wait for an answer have waited for long enough."""
        if link is not None and self._link is link:
            self._link = None
            task = asyncio.create_task(self._end(link))
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)

    async def _end(self, link: "asyncio.Task[_Connection]") -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), self.timeout)
        link.cancel()
        await asyncio.wait({link})
        if not link.cancelled() and link.exception() is None:
            await link.result().close()


def _is_alive(link: "asyncio.Task[_Connection]") -> bool:
    return not link.cancelled() and link.exception() is None and link.result().is_alive
