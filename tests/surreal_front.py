"""A websocket in front of the engine that surrealdb's wheel carries: what SurrealDB's server is to its clients.

    python tests/surreal_front.py PORT DIRECTORY [CERTIFICATE KEY]

It speaks the driver's protocol, CBOR, and passes requests on as they come, so that the engine's own answers, errors
and rights are met; one at a time, for two reasons. The engine has one session, of one user in one database. And this
engine loses what transactions write that commit at the same moment, which RocksDB, behind real servers, does not.

Its root is `root`, with the password `secret`.
"""

import asyncio
import contextlib
import ssl
import sys
from typing import Any

from surrealdb import AsyncEmbeddedSurrealConnection
from surrealdb.data.cbor import decode, encode
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

Login = tuple[tuple[str, str], ...]
Who = tuple[Login, tuple[str, str]]
"""Whose a session is, as given to signin, and its namespace and database."""


class Front:
    """The engine, and whose session it is just now."""

    def __init__(self, engine: AsyncEmbeddedSurrealConnection) -> None:
        self._engine = engine
        self._who: Who | None = None
        self._turn = asyncio.Lock()

    async def serve(self, connection: ServerConnection) -> None:
        """One client, whose requests are answered as they end."""
        client = Client(self, connection)
        async with asyncio.TaskGroup() as tasks:
            with contextlib.suppress(ConnectionClosed):
                async for message in connection:
                    assert isinstance(message, bytes)
                    tasks.create_task(client.answer(message))

    async def execute(self, who: Who, message: bytes) -> bytes:
        """What the engine answers to that user, there."""
        async with self._turn:
            if self._who != who:
                self._who = None
                login, place = who
                await self._engine.signin(dict(login))
                await self._engine.use(*place)
                self._who = who
            return await self._engine._db.execute(message)

    async def sign_in(self, login: dict[str, str]) -> None:
        """Raises RuntimeError when the engine does not know them."""
        async with self._turn:
            self._who = None
            await self._engine.signin(dict(login))


class Client:
    """What the server knows of one connection."""

    def __init__(self, front: Front, connection: ServerConnection) -> None:
        self._front = front
        self._connection = connection
        self._login: Login = ()
        self._place = "", ""

    async def answer(self, message: bytes) -> None:
        request = decode(message)
        try:
            answer = await self._answer(request, message)
        except RuntimeError as error:
            answer = encode({"id": request["id"], "error": {"code": -32000, "message": str(error)}})
        with contextlib.suppress(ConnectionClosed):
            await self._connection.send(answer)

    async def _answer(self, request: dict[str, Any], message: bytes) -> bytes:
        if request["method"] == "signin":
            (login,) = request["params"]
            names = {"ns": "namespace", "db": "database", "user": "username", "pass": "password"}
            login = {names.get(name, name): value for name, value in login.items()}
            await self._front.sign_in(login)
            self._login = tuple(login.items())
            return encode({"id": request["id"], "result": "a.b.c"})
        if request["method"] == "use":
            namespace, database = request["params"]
            self._place = namespace, database
            return encode({"id": request["id"], "result": None})
        if not self._login:
            raise RuntimeError("IAM error: Not enough permissions to perform this action")
        return await self._front.execute((self._login, self._place), message)


async def main(port: int, directory: str, *certificate: str) -> None:
    engine = AsyncEmbeddedSurrealConnection(f"surrealkv://{directory}")
    await engine.connect()
    await engine.query("DEFINE USER IF NOT EXISTS root ON ROOT PASSWORD 'secret' ROLES OWNER")
    tls = None
    if certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(*certificate)
    front = Front(engine)
    subprotocols: Any = ["cbor"]
    async with serve(
        front.serve, "127.0.0.1", port, ssl=tls, subprotocols=subprotocols, max_size=None, compression=None,
        close_timeout=0.1,
    ) as server:  # fmt: skip
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), *sys.argv[2:]))
