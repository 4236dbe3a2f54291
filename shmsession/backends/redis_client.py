"""Questions to Redis: each is answered or fails in time, and its errors become ours here. Connections to one server."""

import asyncio
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
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

_INFO: Final = ("INFO", "replication")
_HISTORY: Final = re.compile(rb"^(?:role|master_replid):\w+", re.MULTILINE)

Command = tuple[Any, ...]
Address = tuple[str, int]

_HOSTS: Final = re.compile(r"redis(s?)\+\w+://([^/?#]*@)?([^/?#@]*)([^?#]*)(\?[^#]*)?", re.IGNORECASE)


def parsed_hosts(url: str, port: int) -> tuple[dict[str, Any], str]:
    """What a URL with many hosts says, those as `hosts`, and its path. Raises ValueError."""
    match = _HOSTS.fullmatch(url)
    if match is None:
        raise ValueError
    secure, credentials, hosts, path, query = match.groups(default="")
    each = [parse_url(f"redis{secure}://{credentials}{host}{query}") for host in hosts.split(",")]
    addresses = [(one.get("host", "localhost"), int(one.get("port", port))) for one in each]
    return {**each[0], "secure": bool(secure), "hosts": addresses}, path


def named_hosts(addresses: Sequence[Address]) -> str:
    """As they stand in a URL."""
    return ",".join(f"{f'[{host}]' if ':' in host else host}:{port}" for host, port in addresses)


class Client(ABC):
    """What asks, whoever answers: one server, or a cluster of them."""

    def __init__(self, name: str, *, prefix: str, timeout: float) -> None:
        self.name = name
        self._prefix, self._timeout = prefix, timeout
        self.met: set[bytes] = set()
        """The histories of the servers that were told to change something, as these said in the same breath."""

    @abstractmethod
    def open(self) -> None:
        """Make ready to connect, which happens when something is asked. In a forked child, anew."""

    @abstractmethod
    async def close(self) -> None:
        """Close all connections."""

    @abstractmethod
    async def exchange(self, commands: Sequence[Command], *, met: set[bytes] | None = None) -> list[Any]:
        """The replies, in order, errors among them. To `met` the servers' histories are added."""

    @abstractmethod
    async def layout(self) -> "Mapping[Server, str]":
        """The servers that have all the keys between them, each with what it says of its share."""

    @abstractmethod
    async def unmoved(self, layout: "Mapping[Server, str]") -> bool:
        """Whether no key can have gone from one of them to another since the layout was asked for."""

    @abstractmethod
    async def servers(self) -> "Collection[Server]":
        """Those that are asked for all the keys between them, as far as is known."""

    async def histories(self) -> list[bytes]:
        """With which histories the servers go on: one that restarts or is promoted begins another.

        Nothing when one keeps it secret. Raises ReadOnlyError when one has become a replica, and ConnectionError when
        one that answered a `call` since this was last asked is no more among them: over a connection that is older
        than the change, that was told to a server whose place another one has taken.
        """
        servers = await self.servers()
        found: set[bytes] = set()
        await asyncio.gather(*(server.exchange([], met=found) for server in servers))
        if any(_is_replica(history) for history in found):
            raise exceptions.ReadOnlyError("it has become a replica")
        met, self.met = self.met, set()
        if not all(history in found or _is_replica(history) for history in met):
            raise exceptions.ConnectionError("another server has taken the place of the one that was written to")
        return [] if b"" in found else sorted(found)

    @abstractmethod
    async def doubt(self) -> None:
        """Something did not answer: what is known of who is where may be wrong."""

    @asynccontextmanager
    async def question(self) -> AsyncIterator[None]:
        """What is asked within it ends in time, and fails with errors of ours."""
        try:
            async with asyncio.timeout(self._timeout):
                yield
        except (exceptions.RedisError, OSError) as error:
            failure = explain(error, self.name, self._prefix)
            if isinstance(failure, BackendUnavailable):
                await self.doubt()
            raise failure from error

    async def ask(self, *commands: Command, missing: bool = False, met: set[bytes] | None = None) -> list[Any]:
        """The replies, in order. The first error among them is raised; NOSCRIPT may be let through as `missing`."""
        if not commands:
            return []
        replies = await self.exchange(commands, met=met)
        for reply in replies:
            if isinstance(reply, Exception) and not (missing and isinstance(reply, exceptions.NoScriptError)):
                raise reply
        return replies

    async def call(self, script: Script, calls: Sequence[Command]) -> list[Any]:
        """Run a script for each (key, *arguments); whole, where the server has forgotten it, which then knows it."""
        replies = await self.ask(*(("EVALSHA", script.sha, 1, *call) for call in calls), missing=True, met=self.met)
        forgotten = [index for index, reply in enumerate(replies) if isinstance(reply, exceptions.NoScriptError)]
        whole = await self.ask(*(("EVAL", script.text, 1, *calls[index]) for index in forgotten), met=self.met)
        for index, reply in zip(forgotten, whole, strict=True):
            replies[index] = reply
        return replies


class Server(Client):
    """One server: at most `max_connections` exchanges at once, further ones wait for their turn."""

    def __init__(self, options: dict[str, Any], *, prefix: str, timeout: float, max_connections: int) -> None:
        super().__init__(self._named(options), prefix=prefix, timeout=timeout)
        self._max = max_connections
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

    @staticmethod
    def parsed(url: str, options: dict[str, Any]) -> dict[str, Any]:
        """What a URL says, and further options where it says nothing. Raises ConfigError, quoting nothing."""
        try:
            return {**options, **parse_url(url), "secure": url.lower().startswith("rediss")}
        except ValueError:
            raise ConfigError(
                "this is no Redis URL: write redis://user:password@host:6379/0, rediss://… or unix:///path?db=0, "
                "with special characters of the password percent-encoded"
            ) from None

    @staticmethod
    def _named(options: dict[str, Any]) -> str:
        secure = options.pop("secure")
        if "path" in options:
            return f"unix://{options['path']}?db={options.get('db', 0)}"
        where = named_hosts([(str(options.get("host", "localhost")), options.get("port", 6379))])
        return f"redis{'s' * secure}://{where}/{options.get('db', 0)}"

    def _pool(self) -> ConnectionPool:
        """Not redis-py's blocking one: of that, a cancelled question takes a place with it."""
        return ConnectionPool(max_connections=sys.maxsize, **self._options)

    def open(self) -> None:
        """Make the pool."""
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

    async def exchange(self, commands: Sequence[Command], *, met: set[bytes] | None = None) -> list[Any]:
        """Over one connection, once more where that turns out to be broken."""
        if met is not None:
            commands = [*commands, _INFO]
        pool = self._open.connection_pool
        async with self._turns:
            connection = await pool.get_connection()
            try:
                replies: list[Any] = await connection.retry.call_with_retry(
                    partial(_exchange, connection, commands), lambda _: connection.disconnect()
                )
            finally:
                await pool.release(connection)
        if met is not None:
            met.add(_history(replies.pop()))
        return replies

    async def allowed(self, *command: str) -> dict[str, Any]:
        """The answer to a question that not everybody may ask; empty for those who may not."""
        async with self.question(), self._turns:
            try:
                answer: dict[str, Any] = await self._open.execute_command(*command)
            except exceptions.ResponseError:
                return {}
        return answer

    async def layout(self) -> "Mapping[Server, str]":
        """It alone."""
        return {self: ""}

    async def unmoved(self, layout: "Mapping[Server, str]") -> bool:
        """There is nowhere to go."""
        return True

    async def servers(self) -> "Collection[Server]":
        """It alone."""
        return (self,)

    async def doubt(self) -> None:
        """Another server may answer to the same name now: no idle connection is kept."""
        if self._redis is not None:
            with suppress(exceptions.RedisError, OSError):
                await self._redis.connection_pool.disconnect(inuse_connections=False)


def _history(info: Any) -> bytes:
    """What INFO says of it; b"" for one that keeps it secret. Raises what else was answered."""
    if isinstance(info, Exception):
        if isinstance(info, exceptions.NoPermissionError) or "unknown command" in str(info):
            return b""
        raise info
    return b" ".join(_HISTORY.findall(info))


def _is_replica(history: bytes) -> bool:
    """Whether it is that of a server that changes nothing when it is told to."""
    return history.startswith(b"role:slave")


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
    "NOPERM": "its ACL must allow this user the keys {prefix}:*, and @read, @write, @scripting, INFO and TIME; "
    "in a cluster also ASKING, CLUSTER SLOTS and CLUSTER NODES",
    "WRONGTYPE": "a key that begins with {prefix}: is not ours: choose another prefix=",
    "MOVED": "it is a node of a cluster: write redis+cluster://… to use that",
    "CROSSSLOT": "it is a node of a cluster: write redis+cluster://… to use that",
    "cluster support disabled": "it is no node of a cluster: write redis://… to use it alone",
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
