"""A Redis Cluster: who has which keys is learnt from its nodes, and what is asked goes to the master that has the key.

Replicas are asked nothing but who the masters are. Of redis-py this takes connections, errors and the hash of keys; its
RedisCluster tries for longer than a question may last, and sends batches again as a whole.
"""

import asyncio
import os
import random
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

from redis import exceptions
from redis.crc import key_slot

from shmsession.errors import BackendUnavailable, ConfigError

from .redis_client import Address, Client, Command, Server, named_hosts, parsed_hosts

REDIRECTIONS: Final = 8
"""How often one command is sent on; between the nodes that take part in a failover it may go to and fro."""
STAGGER: Final = 0.1
"""Seconds after which another node is asked who has which keys, while the first has not answered."""
_FAILURES: Final = (exceptions.RedisError, OSError)
_ANSWERS: Final = (exceptions.ResponseError, exceptions.AuthenticationError)
_TARGET: Final = re.compile(r"\[\d+->-(\w+)\]")


class Cluster(Client):
    """The masters of a cluster. `max_connections` are for each of them."""

    def __init__(self, options: dict[str, Any], *, prefix: str, timeout: float, max_connections: int) -> None:
        self._seeds: list[Address] = options.pop("hosts")
        self._options = options
        self._settings: dict[str, Any] = {"prefix": prefix, "timeout": timeout, "max_connections": max_connections}
        name = f"redis{'s' * options['secure']}+cluster://{named_hosts(self._seeds)}/"
        super().__init__(name, prefix=prefix, timeout=timeout)
        for seed in self._seeds:
            self._made(seed)
        self._servers: dict[Address, Server] | None = None
        self._owners: dict[int, Address] = {}
        """By slot."""
        self._doubtful = True
        self._failed: set[Address] = set()
        """Who did not answer of late, or that the cluster is down: the last ones to be asked for the owners."""
        self._learning = asyncio.Lock()
        self._pid = 0
        self._inherited: list[Any] = []

    @staticmethod
    def parsed(url: str, options: dict[str, Any]) -> dict[str, Any]:
        """What a URL says, and further options where it says nothing. Raises ConfigError, quoting nothing."""
        try:
            given, path = parsed_hosts(url, 6379)
            if not re.fullmatch(r"/?\d*", path):
                raise ValueError
        except ValueError:
            raise ConfigError(
                "this is no URL of a Redis Cluster: write redis+cluster://user:password@host:6379,host2:6379/ or "
                "rediss+cluster://…, with special characters of the password percent-encoded"
            ) from None
        given = {**options, **given}
        if given.get("db") or path.strip("/0"):
            raise ConfigError("a cluster has database 0 only: end its URL with /")
        return given

    def open(self) -> None:
        """Forget who has which keys; it is learnt when something is asked."""
        if self._servers is not None and self._pid != os.getpid():
            self._inherited.append(self._servers)
            self._servers = None
        if self._servers is None:
            self._pid = os.getpid()
            self._servers = {}
            self._owners, self._doubtful, self._learning = {}, True, asyncio.Lock()

    async def close(self) -> None:
        """Close the connections to all nodes."""
        if self._servers is not None and self._pid == os.getpid():
            servers, self._servers = self._servers, None
            for server in servers.values():
                await server.close()

    def _made(self, address: Address) -> Server:
        host, port = address
        return Server({**self._options, "host": host, "port": port}, **self._settings)

    def _server(self, address: Address) -> Server:
        if self._servers is None:
            raise BackendUnavailable(f"{self.name} is not open: `await backend.open()` first")
        if address not in self._servers:
            self._servers[address] = self._made(address)
            self._servers[address].open()
        return self._servers[address]

    # ── what is asked ─────────────────────────────────────────────────────────────────────────────────────────

    async def exchange(self, commands: Sequence[Command], *, met: set[bytes] | None = None) -> list[Any]:
        """Each command goes to the master of its key, and on to where that one sends it."""
        slots = [_slot(command) for command in commands]
        replies: list[Any] = [None] * len(commands)
        pending: dict[int, Address | None] = dict.fromkeys(range(len(commands)))  # and where ASK sent them
        await self._know()
        for redirection in range(REDIRECTIONS):
            groups: dict[tuple[Address, bool], list[int]] = {}
            for index, asked in pending.items():
                groups.setdefault((asked or self._owner(slots[index]), asked is not None), []).append(index)
            answers = await asyncio.gather(
                *(self._sent(address, [commands[i] for i in indexes], asking=asking, met=met)
                  for (address, asking), indexes in groups.items())
            )  # fmt: skip
            pending = {}
            for ((address, _), indexes), answer in zip(groups.items(), answers, strict=True):
                if isinstance(answer, Exception):
                    await self._know()
                    if any(self._owner(slots[index]) == address for index in indexes):
                        raise answer
                    pending |= dict.fromkeys(indexes)
                    continue
                for index, reply in zip(indexes, answer, strict=True):
                    replies[index] = reply
                    if isinstance(reply, exceptions.AskError):
                        pending[index] = self._redirected(address, reply)
                    elif isinstance(reply, exceptions.ClusterDownError):
                        self._distrust(address)
            if not pending:
                return replies
            if redirection:
                await asyncio.sleep(0.01 * 2**redirection)
        raise exceptions.ClusterDownError("its nodes do not agree who has which keys")

    async def _sent(
        self, address: Address, commands: list[Command], *, asking: bool, met: set[bytes] | None
    ) -> list[Any] | Exception:
        """The replies of one node, or why there are none."""
        try:
            if not asking:
                return await self._server(address).exchange(commands, met=met)
            asked: list[Command] = [c for command in commands for c in (("ASKING",), command)]
            replies = await self._server(address).exchange(asked, met=met)
            return replies[1::2]
        except _FAILURES as error:
            self._distrust(address)
            return error

    def _redirected(self, address: Address, reply: exceptions.AskError) -> Address | None:
        """Where ASK sends a command, this time only. What MOVED says is noted."""
        target = (reply.host or address[0], reply.port)
        if not isinstance(reply, exceptions.MovedError):
            return target
        self._owners[reply.slot_id] = target
        self._doubtful = True  # for the next question: it is seldom that one slot only moves
        return None

    # ── who has which keys ────────────────────────────────────────────────────────────────────────────────────

    async def _know(self) -> None:
        """Learn who has which keys, unless that is known. Whoever asks meanwhile waits."""
        async with self._learning:
            if not self._doubtful:
                return
            self._owners = await self._learnt()
            self._doubtful = False
            for address in (self._servers or {}).keys() - self._owners.values():
                await self._server(address).doubt()

    async def _learnt(self) -> dict[int, Address]:
        """What the first of them says that knows anything. None is waited for while others are left to be asked."""
        addresses = list({*self._owners.values(), *self._seeds})
        random.shuffle(addresses)
        addresses.sort(key=lambda address: address not in self._failed)  # they are taken from the end
        asked: list[asyncio.Task[dict[int, Address]]] = []
        failures: list[Exception] = []
        try:
            while addresses or len(failures) < len(asked):
                if addresses:
                    asked.append(asyncio.create_task(self._told(addresses.pop())))
                waiting = [task for task in asked if not task.done()]
                patience = STAGGER if addresses else None
                done, _ = await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        return await task
                    except _FAILURES as error:
                        failures.append(error)
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        raise max(failures, key=lambda error: isinstance(error, _ANSWERS))

    async def _told(self, address: Address) -> dict[int, Address]:
        """Whom this node holds for the masters of which slots."""
        owners: dict[int, Address] = {}
        self._failed.add(address)  # until it has answered
        (ranges,) = await self._server(address).ask(("CLUSTER", "SLOTS"))
        self._failed.discard(address)
        for first, last, (host, port, *_), *_ in ranges:
            name = (host or b"").decode()
            owners |= dict.fromkeys(range(first, last + 1), (name if name not in ("", "?") else address[0], port))
        if not owners:
            raise exceptions.ClusterDownError(f"{address[0]}:{address[1]} knows no master")
        return owners

    def _owner(self, slot: int) -> Address:
        if slot not in self._owners:
            self._doubtful = True
            raise exceptions.ClusterDownError(f"nobody has slot {slot}")
        return self._owners[slot]

    async def servers(self) -> Collection[Server]:
        """The masters."""
        await self._know()
        return [self._server(address) for address in dict.fromkeys(self._owners.values())]

    def _distrust(self, address: Address) -> None:
        self._failed.add(address)
        self._doubtful = True

    async def doubt(self) -> None:
        """Who has which keys is learnt anew."""
        self._doubtful = True

    # ── all keys ──────────────────────────────────────────────────────────────────────────────────────────────

    async def layout(self) -> Mapping[Server, str]:
        """All masters, each with its epoch, its slots, and which of them are on their way to or from another.

        One that has no slot yet, but keys of one that is on its way to it, is among them; one that has just become a
        replica is not, but its master is.
        """
        self._doubtful = True
        await self._know()
        addresses = list(dict.fromkeys(self._owners.values()))
        layout: dict[Server, str] = {}
        for address in addresses:  # which grows
            server = self._server(address)
            (text,) = await server.ask(("CLUSTER", "NODES"))
            nodes = {words[0]: words for words in map(str.split, text.decode().splitlines())}
            own = next(words for words in nodes.values() if "myself" in words[2])
            others = [own[3]]
            if "master" in own[2]:
                layout[server] = " ".join(own[6:7] + own[8:])
                others = _TARGET.findall(layout[server])
            by_name = _addresses(own[1])[1] == address
            further = [_addresses(nodes[other][1])[by_name] for other in others if other in nodes]
            addresses += dict.fromkeys(found for found in further if found not in addresses)
        return layout

    async def unmoved(self, layout: Mapping[Server, str]) -> bool:
        """A slot that went to another master, or to and fro, gave that one a higher epoch."""
        return await self.layout() == layout and not any("[" in share for share in layout.values())


def _slot(command: Command) -> int:
    key: str | bytes = command[3 if command[0].startswith("EVAL") else 1]
    slot: int = key_slot(key.encode() if isinstance(key, str) else key)
    return slot


def _addresses(text: str) -> tuple[Address, Address]:
    """By number and by name, of `number:port@bus,name`; not every node has a name."""
    where, _, rest = text.partition("@")
    host, _, port = where.rpartition(":")
    return (host, int(port)), ((*rest.split(","), "")[1], int(port))
