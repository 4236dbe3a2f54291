"""A throw-away SurrealDB: its real engine, behind a websocket on a loopback port."""

import asyncio
import shutil
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, Self

import surrealdb

from tests.databases import DatabaseServer
from tests.servers import PATIENCE


class SurrealServer(DatabaseServer):
    """SurrealDB's engine behind a websocket (tests/surreal_front.py). What it has acknowledged survives its death."""

    _numbers = count(1)

    def __init__(self, *certificate: Path) -> None:
        super().__init__()
        self.data = self.place / "data"
        self.certificate = certificate
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]

    def url(self, database: str, user: str = "root", password: str = "secret") -> str:
        """A database of the namespace `test`."""
        return f"surrealdb+{self._scheme}://{user}:{password}@localhost:{self.port}/test/{database}"

    @property
    def _scheme(self) -> str:
        return "wss" if self.certificate else "ws"

    def _command(self) -> list[str]:
        options = [str(self.port), str(self.data), *map(str, self.certificate)]
        return [sys.executable, str(Path(__file__).with_name("surreal_front.py")), *options]

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), PATIENCE).close()
        except OSError:
            return False
        return True

    def forget(self) -> Self:
        """kill -9, and start again without any data."""
        self.kill()
        shutil.rmtree(self.data)
        return self.start()

    def create_database(self) -> str:
        """The name of a new, empty database. The server makes it when it is used."""
        return f"test{next(self._numbers)}"

    def run(self, statements: str, database: str) -> list[Any]:
        """What root is answered there, statement by statement."""

        async def ask() -> list[Any]:
            async with surrealdb.AsyncWsSurrealConnection(f"ws://127.0.0.1:{self.port}") as connection:
                await connection.signin({"username": "root", "password": "secret"})
                await connection.use("test", database)
                answers: list[dict[str, Any]] = (await connection.query_raw(statements))["result"]
            assert all(answer["status"] == "OK" for answer in answers), answers
            return [answer["result"] for answer in answers]

        with ThreadPoolExecutor(1) as pool:  # for in this thread an event loop may run
            return pool.submit(asyncio.run, ask()).result()
