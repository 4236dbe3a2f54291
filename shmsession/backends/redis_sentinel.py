"""A Redis whose primary Sentinels know: each connection is made to the one that they name."""

import asyncio
import math
import sys
from typing import Any, Final

from redis.asyncio.connection import ConnectionPool
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

from shmsession.errors import ConfigError

from .redis_client import Address, Server, named_hosts, parsed_hosts

PORT: Final = 26379
FRESH_SECONDS: Final = 1.0
"""So long after Sentinels named the primary it is believed to be that. One that was cut off from them, or asleep, goes
on answering to whoever has a connection, until they have told it."""


class _Pool(SentinelConnectionPool):
    """Which closes its connections to Sentinels too, and asks these anew who is the primary."""

    _named = -math.inf

    async def get_master_address(self) -> Address:
        address: Address = await super().get_master_address()  # type: ignore[no-untyped-call]
        self._named = asyncio.get_running_loop().time()
        return address

    async def get_connection(self, *arguments: Any, **options: Any) -> Any:
        if asyncio.get_running_loop().time() - self._named >= FRESH_SECONDS:
            await self.get_master_address()
        return await super().get_connection(*arguments, **options)  # type: ignore[no-untyped-call]

    async def release(self, connection: Any) -> None:
        if self.master_address != (connection.host, connection.port):
            await connection.disconnect(nowait=True)
        await super().release(connection)

    async def disconnect(self, inuse_connections: bool = True) -> None:
        await super().disconnect(inuse_connections)
        for sentinel in self.sentinel_manager.sentinels:
            await sentinel.connection_pool.disconnect(inuse_connections)


class Primary(Server):
    """The primary of a service. Replicas are asked nothing."""

    def __init__(self, options: dict[str, Any], *, prefix: str, timeout: float, max_connections: int) -> None:
        self._sentinels: list[Address] = options["hosts"]
        self._service: str = options["service"]
        super().__init__(options, prefix=prefix, timeout=timeout, max_connections=max_connections)

    @staticmethod
    def parsed(url: str, options: dict[str, Any]) -> dict[str, Any]:
        """What a URL says, and further options where it says nothing. Raises ConfigError, quoting nothing."""
        try:
            given, path = parsed_hosts(url, PORT)
            _, service, *database = path.split("/")
            given |= {"service": service, **({"db": int(database[0] or 0)} if database else {})}
            if not service or len(database) > 1:
                raise ValueError
        except ValueError:
            raise ConfigError(
                "this is no URL of a Redis with Sentinels: write redis+sentinel://user:password@host:26379,host2:26379"
                "/service/0 or rediss+sentinel://…, with special characters of the password percent-encoded"
            ) from None
        return {**options, **given}

    @staticmethod
    def _named(options: dict[str, Any]) -> str:
        hosts, service = named_hosts(options.pop("hosts")), options.pop("service")
        options.pop("connection_class", None)
        options["ssl"] = options.pop("secure")
        return f"redis{'s' * options['ssl']}+sentinel://{hosts}/{service}/{options.get('db', 0)}"

    def _pool(self) -> ConnectionPool:
        options = dict(self._options)
        # One Sentinel that does not answer leaves time for the others.
        patience = self._timeout / (1 + len(self._sentinels))
        own = {"socket_timeout": patience, "socket_connect_timeout": patience, "retry": Retry(NoBackoff(), 0)}
        own |= {name: value for name, value in options.items() if name.startswith("ssl")}
        for name in ("username", "password"):
            own[name] = options.pop(f"sentinel_{name}", None)
        manager = Sentinel(self._sentinels, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
        return _Pool(self._service, manager, max_connections=sys.maxsize, **options)  # type: ignore[no-untyped-call]
