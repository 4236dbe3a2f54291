"""Connections to a Redis server: a question is answered or fails in time, and its errors become ours here."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, Final

from hiredis import pack_command
from redis import exceptions
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from shmsession.errors import BackendError, BackendUnavailable, ConfigError

from .redis_scripts import Script

Command = tuple[Any, ...]


def parsed(url: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a URL says, and further options where it says nothing. Raises ConfigError, which quotes nothing of them."""
    try:
        return {**options, **parse_url(url), "secure": url.lower().startswith("rediss")}
    except ValueError:
        raise ConfigError(
            "this is no Redis URL: write redis://user:password@host:6379/0, rediss://… or unix:///path?db=0, "
            "with special characters of the password percent-encoded"
        ) from None


class Client:
    """At most `max_connections` questions at once, each of at most `timeout` seconds, waiting for its turn included."""

    def __init__(self, options: dict[str, Any], *, prefix: str, timeout: float, max_connections: int) -> None:
        self.name = _name(options, secure=options.pop("secure"))
        self._prefix, self._timeout, self._max = prefix, timeout, max_connections
        self._options = {
            # RESP2: every server speaks it, some nothing else. Once more, for connections that died unnoticed.
            "protocol": 2, **options, "decode_responses": False, "socket_timeout": None,
            "socket_connect_timeout": timeout, "retry": Retry(NoBackoff(), 1, (exceptions.ConnectionError,)),
        }  # fmt: skip
        self._turns = asyncio.Semaphore(max_connections)
        self._redis: Any = None
        self._pid = 0
        self._inherited: list[Any] = []
        """What a parent had open before a fork is kept: its end here would disturb the parent."""
        try:
            pool: Any = self._pool()
            pool.make_connection()  # which connects nothing
        except (TypeError, ValueError, exceptions.RedisError) as error:
            raise ConfigError(f"{self.name}: {error}: give options of redis-py's connections only") from error

    def _pool(self) -> ConnectionPool:
        """Not redis-py's blocking one: of that, a cancelled question takes a place with it."""
        return ConnectionPool(max_connections=sys.maxsize, **self._options)

    def open(self) -> None:
        """Make the pool; it connects when something is asked."""
        if self._redis is not None and self._pid != os.getpid():
            self._inherited.append(self._redis)
            self._redis = None
        if self._redis is None:
            self._pid = os.getpid()
            self._turns = asyncio.Semaphore(self._max)
            self._redis = Redis(connection_pool=self._pool())

    async def close(self) -> None:
        """Close all connections."""
        if self._redis is not None and self._pid == os.getpid():
            redis, self._redis = self._redis, None
            with suppress(exceptions.RedisError, OSError):
                await redis.connection_pool.disconnect()

    @property
    def _open(self) -> Any:
        if self._redis is None:
            raise BackendUnavailable(f"{self.name} is not open: `await backend.open()` first")
        return self._redis

    @asynccontextmanager
    async def question(self) -> AsyncIterator[None]:
        """What is asked within it ends in time, and fails with errors of ours. Not to be nested."""
        try:
            async with asyncio.timeout(self._timeout), self._turns:
                yield
        except (exceptions.RedisError, OSError) as error:
            failure = explain(error, self.name, self._prefix)
            if isinstance(failure, BackendUnavailable) and self._redis is not None:
                with suppress(exceptions.RedisError, OSError):  # another server may answer to the same name now
                    await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise failure from error

    async def allowed(self, *command: str) -> dict[str, Any]:
        """The answer to a question that not everybody may ask; empty for those who may not."""
        async with self.question():
            try:
                answer: dict[str, Any] = await self._open.execute_command(*command)
            except exceptions.ResponseError:
                return {}
        return answer

    async def ask(self, *commands: Command, missing: bool = False) -> list[Any]:
        """The replies, in order. The first error among them is raised; NOSCRIPT may be let through as `missing`."""
        if not commands:
            return []
        pool = self._open.connection_pool
        connection = await pool.get_connection()
        try:
            replies: list[Any] = await connection.retry.call_with_retry(
                partial(_exchange, connection, commands), lambda _: connection.disconnect()
            )
        finally:
            await pool.release(connection)
        for reply in replies:
            if isinstance(reply, Exception) and not (missing and isinstance(reply, exceptions.NoScriptError)):
                raise reply
        return replies

    async def call(self, script: Script, calls: Sequence[Command]) -> list[Any]:
        """Run a script for each (key, *arguments); whole, where the server has forgotten it."""
        if not calls:
            return []
        replies = await self.ask(*(("EVALSHA", script.sha, 1, *call) for call in calls), missing=True)
        forgotten = [index for index, reply in enumerate(replies) if isinstance(reply, exceptions.NoScriptError)]
        if forgotten:
            again = [("EVAL", script.text, 1, *calls[index]) for index in forgotten]
            _, *whole = await self.ask(("SCRIPT", "LOAD", script.text), *again)
            for index, reply in zip(forgotten, whole, strict=True):
                replies[index] = reply
        return replies


async def _exchange(connection: Any, commands: Sequence[Command]) -> list[Any]:
    """The replies, errors among them. A pipeline of redis-py's packs commands in Python, and takes twice as long."""
    await connection.send_packed_command(b"".join(map(pack_command, commands)))
    replies: list[Any] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response())
        except exceptions.ResponseError as error:
            replies.append(error)
    return replies


def _name(options: dict[str, Any], *, secure: bool) -> str:
    if "path" in options:
        return f"unix://{options['path']}?db={options.get('db', 0)}"
    host = str(options.get("host", "localhost"))
    host = f"[{host}]" if ":" in host else host
    return f"redis{'s' * secure}://{host}:{options.get('port', 6379)}/{options.get('db', 0)}"


_CODES: Final = {
    exceptions.OutOfMemoryError: "OOM", exceptions.ReadOnlyError: "READONLY", exceptions.BusyLoadingError: "LOADING",
    exceptions.MasterDownError: "MASTERDOWN", exceptions.ClusterDownError: "CLUSTERDOWN",
    exceptions.TryAgainError: "TRYAGAIN", exceptions.ClusterCrossSlotError: "CROSSSLOT",
    exceptions.NoPermissionError: "NOPERM", exceptions.AskError: "MOVED",
    exceptions.AuthenticationError: "NOAUTH", exceptions.AuthenticationWrongNumberOfArgsError: "NOAUTH",
}  # fmt: skip
"""redis-py takes the code off the errors that it has classes for. Other errors begin with it, or, from a script on a
server before version 7, hold it."""

_PASSING: Final = {
    "LOADING": "it is still reading its data from disk",
    "BUSY": "it is busy with a slow script: SCRIPT KILL ends one",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "READONLY": "it is a read-only replica: the URL must name the primary",
    "CLUSTERDOWN": "its cluster is down",
    "TRYAGAIN": "its cluster is moving keys",
    "NOREPLICAS": "it has fewer replicas than min-replicas-to-write asks for",
}
_LASTING: Final = {
    "OOM": "it has reached maxmemory: give it more; leave maxmemory-policy at noeviction, or it drops sessions",
    "MISCONF": "it cannot write to its disk and refuses changes: see its log",
    "NOAUTH": "it refuses the credentials: write redis://user:password@host, percent-encoded",
    "NOPERM": "its ACL must allow this user the keys {prefix}:* and the commands @read, @write, @scripting and TIME",
    "WRONGTYPE": "a key that begins with {prefix}: is not ours: choose another prefix=",
    "MOVED": "it is a node of a cluster, and those cannot be used: name a server that is not",
    "CROSSSLOT": "it is a node of a cluster, and those cannot be used: name a server that is not",
}
_KNOWN = re.compile(rf"\b({'|'.join([*_PASSING, *_LASTING])})\b")
_ARGUMENTS = re.compile(r",? with args beginning with.*", re.DOTALL)


def explain(error: Exception, name: str, prefix: str) -> BackendError:
    """Our error for one of redis-py's, which loses what it may quote of a command: that may be a password."""
    while isinstance(error.__cause__, exceptions.RedisError):
        error = error.__cause__
    text = _ARGUMENTS.sub("", str(error))
    if text != str(error):
        error.args = (text,)
    found = _KNOWN.search(text)
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), found[1] if found else "")
    if code in _PASSING:
        return BackendUnavailable(f"{name}: {_PASSING[code]} ({text})")
    if code in _LASTING:
        return BackendError(f"{name}: {_LASTING[code].format(prefix=prefix)} ({text})")
    if isinstance(error, exceptions.ConnectionError | exceptions.TimeoutError | OSError):
        return BackendUnavailable(f"{name} did not answer: {text or 'no answer in time'}; see that it runs")
    return BackendError(f"{name} answered with an error: {text}")
