"""Throw-away Redis Clusters, whose nodes tests may kill, freeze, promote and give other slots."""

import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final, Self

from redis import Redis, crc

from tests.databases import RedisServer
from tests.servers import PATIENCE, wait_for

SLOTS: Final = crc.REDIS_CLUSTER_HASH_SLOTS


def free_ports(number: int) -> list[int]:
    """Ports that nobody has, below those that systems give to connections: a node is started again on its own."""
    found: list[int] = []
    while len(found) < number:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(10_000, 32_000)))
            except OSError:
                continue
            port: int = probe.getsockname()[1]
            if port not in found:
                found.append(port)
    return found


class ClusterNode(RedisServer):
    """A Redis in cluster mode. Nodes find each other by TCP; tests ask each by its unix socket."""

    def __init__(self, *options: str) -> None:
        super().__init__(*options)
        self.port, self.bus = free_ports(2)

    def _command(self) -> list[str]:
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--cluster-port", str(self.bus)]
        return [*super()._command(), "--cluster-enabled", "yes", *where, *self.options]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def tell(self, *words: str | int) -> str:
        """What it answers to a command that must succeed."""
        with Redis(unix_socket_path=self.socket, decode_responses=True) as client:
            return str(client.execute_command(*words))

    def knows(self) -> dict[str, str]:
        """CLUSTER INFO."""
        lines = (line.partition(":") for line in self.tell("CLUSTER", "INFO").splitlines())
        return {name: value for name, _, value in lines}

    def _words(self) -> list[str]:
        return next(line.split() for line in self.tell("CLUSTER", "NODES").splitlines() if "myself" in line)

    @property
    def id(self) -> str:
        """Its name among the nodes, which it keeps over a restart with its data."""
        return self._words()[0]

    @property
    def is_master(self) -> bool:
        return "master" in self._words()[2]

    @property
    def master(self) -> str:
        """The id of the one whose replica it is."""
        return self._words()[3]

    @property
    def slots(self) -> set[int]:
        ranges = [word.split("-") for word in self._words()[8:] if "[" not in word]
        return {slot for ends in ranges for slot in range(int(ends[0]), int(ends[-1]) + 1)} if self.is_master else set()

    @property
    def is_linked(self) -> bool:
        """Whether it has what its master has, or is one."""
        return self.is_master or "master_link_status:up" in self.ask("INFO", "replication").decode()


class RedisCluster:
    """Masters that share the slots, and replicas of each. As a context manager it starts, and leaves nothing behind."""

    NODE_TIMEOUT: ClassVar = 1000
    """Milliseconds until a silent master is replaced."""

    def __init__(self, *options: str, masters: int = 3, replicas: int = 1) -> None:
        mode = {"node-timeout": str(self.NODE_TIMEOUT), "allow-replica-migration": "no"}  # who is whose, tests say
        self.options = (*(word for name, value in mode.items() for word in (f"--cluster-{name}", value)), *options)
        self._masters = masters
        self.nodes = [ClusterNode(*self.options) for _ in range(masters * (1 + replicas))]

    @property
    def url(self) -> str:
        """With all nodes."""
        return self.url_of(*self.nodes)

    @staticmethod
    def url_of(*nodes: ClusterNode) -> str:
        return f"redis+cluster://{','.join(node.address for node in nodes)}/"

    # ── its life ──────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> Self:
        """Start the nodes that are down, with the data they had, and wait until all serve all slots."""
        for node in self.nodes:
            if not node.is_running:
                node.start()
        if all(node.knows()["cluster_known_nodes"] == "1" for node in self.nodes):
            self._create()
        wait_for(self._answers, f"{self} serves")
        return self

    def _create(self) -> None:
        masters, replicas = self.nodes[: self._masters], self.nodes[self._masters :]
        bounds = [SLOTS * number // self._masters for number in range(self._masters + 1)]
        for number, node in enumerate(masters):
            node.tell("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            node.tell("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        first, *others = self.nodes
        for node in others:
            first.tell("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)
        wait_for(lambda: all(self._all_met(node) for node in self.nodes), "the nodes have met")
        for number, node in enumerate(replicas):
            node.tell("CLUSTER", "REPLICATE", masters[number % self._masters].id)

    def _all_met(self, node: ClusterNode) -> bool:
        return node.knows()["cluster_known_nodes"] == str(len(self.nodes))

    def _answers(self) -> bool:
        """Whether every node says that all is well."""
        try:
            known = [node.knows() for node in self.nodes]
            linked = [node.is_linked for node in self.nodes]
        except OSError:
            return False
        whole = {"cluster_state": "ok", "cluster_slots_ok": str(SLOTS), "cluster_known_nodes": str(len(self.nodes))}
        return all(linked) and all(whole.items() <= info.items() for info in known)

    @property
    def is_running(self) -> bool:
        return all(node.is_running for node in self.nodes)

    def kill(self) -> None:
        """kill -9 of all nodes."""
        self._all(lambda node: node._tell(signal.SIGSTOP))
        self._all(lambda node: node.kill())

    def stop(self) -> None:
        self._all(lambda node: node.stop())

    def freeze(self) -> None:
        self._all(lambda node: node.freeze())

    def thaw(self) -> None:
        self._all(lambda node: node.thaw())

    def restart(self) -> Self:
        self.kill()
        return self.start()

    def revive(self) -> Self:
        """After a test that killed, froze or promoted nodes: all are there and serve."""
        self.thaw()
        return self.start()

    def forget(self) -> Self:
        """kill -9, and start again as a new cluster without any data."""
        self.kill()
        for node in self.nodes:
            shutil.rmtree(node.data)
            node.data.mkdir()
        return self.start()

    def empty(self) -> None:
        """Remove all keys and scripts."""
        for node in self.nodes:
            if node.is_master:
                assert node.ask("FLUSHALL").startswith(b"+OK")
            assert node.ask("SCRIPT", "FLUSH").startswith(b"+OK")

    def close(self) -> None:
        self._all(lambda node: node.close())

    def _all(self, what: Callable[[ClusterNode], object]) -> None:
        for node in self.nodes:
            what(node)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def __str__(self) -> str:
        return type(self).__name__

    # ── who has what ──────────────────────────────────────────────────────────────────────────────────────────

    @property
    def masters(self) -> list[ClusterNode]:
        return [node for node in self.nodes if node.is_running and node.slots]

    def owner(self, key: str) -> ClusterNode:
        """The master that has the slot of a key."""
        return next(node for node in self.masters if slot_of(key) in node.slots)

    def replica(self, master: ClusterNode) -> ClusterNode:
        return next(node for node in self.nodes if node.is_running and node.master == master.id)

    def ask(self, *words: str) -> bytes:
        """Send one command of plain words to the master of its key."""
        return self.owner(words[1]).ask(*words)

    def keys(self) -> set[str]:
        """All keys of all masters."""
        found: set[str] = set()
        for node in self.masters:
            with Redis(unix_socket_path=node.socket, decode_responses=True) as client:
                keys: Any = client.keys()
                found |= set(keys)
        return found

    def announce(self, ports: Sequence[int]) -> None:
        """Each node says from now on that its port is another, where somebody passes on to it."""
        for node, port in zip(self.nodes, ports, strict=True):
            assert node.tell("CONFIG", "SET", "cluster-announce-port", port) == "OK"
        addresses = [f"127.0.0.1:{port}@" for port in ports]
        wait_for(
            lambda: all(address in node.tell("CLUSTER", "NODES") for node in self.nodes for address in addresses),
            "all nodes have heard of it",
        )

    # ── what happens to clusters ──────────────────────────────────────────────────────────────────────────────

    def promote(self, replica: ClusterNode) -> None:
        """CLUSTER FAILOVER by hand: nothing is lost. Refused soon after an earlier one, it is tried again."""
        master = next(node for node in self.masters if node.id == replica.master)
        expires = 0.0

        def promoted() -> bool:
            nonlocal expires
            if time.monotonic() > expires:
                replica.tell("CLUSTER", "FAILOVER")
                expires = time.monotonic() + 6  # a second more than it lasts
            return bool(replica.slots) and not master.is_master

        wait_for(promoted, "the replica has taken over")

    def wait_for_promotion(self, replica: ClusterNode, *, lost: ClusterNode) -> None:
        """After its master was lost: all that are left serve."""
        wait_for(lambda: replica.slots, "the replica has taken over")
        left = [node for node in self.nodes if node is not lost]
        wait_for(lambda: all(node.knows()["cluster_state"] == "ok" for node in left), "the others serve again")

    def add(self) -> ClusterNode:
        """A master without slots."""
        node = ClusterNode(*self.options)
        self.nodes.append(node)
        node.start()
        self.nodes[0].tell("CLUSTER", "MEET", "127.0.0.1", node.port, node.bus)
        wait_for(self._answers, "the newcomer is known to all")
        return node

    def remove(self, node: ClusterNode) -> None:
        """One without slots goes, and all forget it."""
        self.nodes.remove(node)
        for other in self.nodes:
            other.tell("CLUSTER", "FORGET", node.id)
        node.close()

    def begin_move(self, slot: int, source: ClusterNode, target: ClusterNode) -> None:
        """From now on, the source sends whoever asks for a key that it does not have to the target."""
        target.tell("CLUSTER", "SETSLOT", slot, "IMPORTING", source.id)
        source.tell("CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)

    def move_key(self, key: str, source: ClusterNode, target: ClusterNode) -> None:
        assert source.tell("MIGRATE", "127.0.0.1", target.port, key, 0, int(PATIENCE * 1000)) == "OK"

    def end_move(self, slot: int, target: ClusterNode) -> None:
        """The slot is the target's; the others hear of it. Until they do, they send whoever asks to the source."""
        for node in [target, *(node for node in self.masters if node is not target)]:
            node.tell("CLUSTER", "SETSLOT", slot, "NODE", target.id)

    def move(self, slot: int, target: ClusterNode) -> None:
        """A whole slot, as redis-cli does it."""
        source = next(node for node in self.masters if slot in node.slots)
        self.begin_move(slot, source, target)
        with Redis(unix_socket_path=source.socket, decode_responses=True) as client:
            keys: Any = client.execute_command("CLUSTER", "GETKEYSINSLOT", slot, 10**6)
        for key in keys:
            self.move_key(key, source, target)
        self.end_move(slot, target)


def slot_of(key: str) -> int:
    return crc.key_slot(key.encode())
