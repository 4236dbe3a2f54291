"""Rows in Redis, or Valkey: one string a row that vanishes at its horizon, one sorted set a user.

Whether a row replaces another is decided by a script on the server, for one key at a time. No row is LIVE unless its
user's set lists it at least until the row's horizon; the row's script insists on that. Of a set only those entries
are ever removed that can stand for no LIVE row any more: past ones, and those of DEAD rows.
"""

import logging
import math
import re
import struct
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from redis.exceptions import RedisError

from shmsession.errors import BackendError, BackendUnavailable, ConfigError

from .base import SENTINEL, STATES, Answer, Mark, Row, State, check_schema
from .redis_client import Command, Server
from .redis_cluster import Cluster
from .redis_scripts import APPLIED, HEAD, KILL, LIST, UNLIST, UNLISTED, WRITE, packed, unpacked
from .redis_sentinel import Primary

logger = logging.getLogger("shmsession")

SCHEMA: Final = 1
CONNECTIONS: Final = 10
CHUNK: Final = 500
CHUNK_BYTES: Final = 1 << 20
"""How much is sent before answers are read: so many commands, of about so many bytes."""
ATTEMPTS: Final = 20
"""How often a row's user is listed anew because somebody else changed the row meanwhile."""
ROUNDS: Final = 2
"""How often all rows are listed at most while a cluster moves some."""

_KINDS: Final[dict[str, type[Cluster] | type[Server]]] = {"cluster": Cluster, "sentinel": Primary}


class RedisBackend:
    """A Backend on `redis://`, `rediss://` or `unix://`; Redis 5 or later, or Valkey.

    `redis+cluster://` is a cluster, `redis+sentinel://` what Sentinels watch; with `rediss+…` over TLS.

    `prefix` begins every key. `timeout`: seconds in which load, write and sessions_of end, and every step of the
    others. Both may also stand in the URL (`?prefix=shop&timeout=2`). Further options are those of redis-py's
    connections, such as `ssl_ca_certs`, and `max_connections`.
    """

    remote = True
    expires = True

    def __init__(self, url: str, *, prefix: str = "shmsession", timeout: float = 5.0, **options: Any) -> None:
        kind = _KINDS.get(url.partition("://")[0].partition("+")[2].lower(), Server)
        given = kind.parsed(url, options)
        self.prefix, self.timeout = str(given.pop("prefix", prefix)), float(given.pop("timeout", timeout))
        connections = int(given.pop("max_connections", CONNECTIONS))
        if not re.fullmatch(r"[!-~]{1,100}", self.prefix):
            raise ConfigError("prefix= must be 1 to 100 printable ASCII characters without spaces")
        if not 0 < self.timeout < math.inf or connections <= 0:
            raise ConfigError("timeout= must be a number of seconds above 0, and max_connections= a number above 0")
        self._client = kind(given, prefix=self.prefix, timeout=self.timeout, max_connections=connections)
        self.name = self._client.name
        self._cursors: dict[str, int] = {}
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<RedisBackend {self.name}, prefix {self.prefix!r}>"

    # ── its life ──────────────────────────────────────────────────────────────────────────────────────────────

    async def open(self) -> None:
        """Make ready; it connects when something is asked."""
        self._client.open()

    async def close(self) -> None:
        """Close all connections."""
        await self._client.close()

    async def initialize(self) -> None:
        """Note the schema's version, and warn of settings under which Redis forgets."""
        key = f"{self.prefix}:schema"
        async with self._client.question():
            _, found = await self._client.ask(("SET", key, SCHEMA, "NX"), ("GET", key))
            servers = await self._client.layout()
        if not (found or b"").isdigit():
            raise BackendError(f"{self.name}: {key} is not ours: choose another prefix=")
        check_schema(f"the keys {self.prefix}:… of {self.name}", int(found), SCHEMA, "prefix")
        for server in servers:
            for warning in await self._worries(server):
                if warning not in self._warned:
                    self._warned.add(warning)
                    logger.warning("%s: %s", server.name, warning)

    async def _worries(self, server: Server) -> list[str]:
        """What its settings may cost, as far as it lets us know them."""
        info, config = await server.allowed("INFO"), await server.allowed("CONFIG GET", "save")
        found = []
        policy = str(info.get("maxmemory_policy", ""))
        if policy.startswith(("volatile", "allkeys")):
            found.append(f"maxmemory-policy is {policy}, which may evict sessions: set it to noeviction")
        if info.get("aof_enabled") == 0 and config.get("save") == "":
            found.append("it keeps nothing on disk, and forgets all sessions when it restarts: set appendonly to yes")
        return found

    # ── the contract ──────────────────────────────────────────────────────────────────────────────────────────

    async def load(self, handle: bytes) -> Row | None:
        """The LIVE or DEAD row."""
        async with self._client.question():
            (value,) = await self._client.ask(("GET", self._row_key(handle)))
        row = self._row(handle, value)
        return None if row is None or row.state is State.ERASED else row

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        """List users first, then store the rows, then forget the entries of dead ones."""
        answers: list[Answer] = []
        async with self._client.question():
            for chunk in _chunks(rows):
                answers += await self._write(chunk)
        return answers

    async def _write(self, rows: Sequence[Row]) -> list[Answer]:
        answers: dict[bytes, Answer] = {}
        dead: list[tuple[bytes, bytes, int]] = []
        listed = {row.handle: (row.user, row.horizon) for row in rows if row.state is State.LIVE and row.user}
        pending, unlisted = rows, listed
        for _ in range(ATTEMPTS):
            await self._client.call(LIST, [(self._user_key(user), handle, h) for handle, (user, h) in unlisted.items()])
            calls = [(self._row_key(row.handle), packed(row), *listed.get(row.handle, ())) for row in pending]
            again, unlisted = [], {}
            for row, reply in zip(pending, await self._client.call(WRITE, calls), strict=True):
                before = None
                if len(reply) > 1:
                    state, epoch, version, horizon, _ = HEAD.unpack_from(reply, 1)
                    if reply[0] == UNLISTED:
                        again.append(row)
                        listed[row.handle] = unlisted[row.handle] = (reply[1 + HEAD.size :], horizon)
                        continue
                    before = Mark(STATES.get(state, State.ERASED), epoch, version)
                    if State.DEAD in (row.state, state):
                        until = max(horizon, row.horizon)
                        dead += [(user, row.handle, until) for user in {reply[1 + HEAD.size :], row.user}]
                answers[row.handle] = Answer(reply[0] == APPLIED, before)
            pending = again
            if not pending:
                break
        else:
            raise BackendUnavailable(f"{self.name}: others changed the same rows {ATTEMPTS} times meanwhile: try again")
        await self._unlist(dead)
        return [answers[row.handle] for row in rows]

    async def sweep(self, now: int, limit: int) -> int:
        """Rows vanish by themselves: this only drops past entries from a few users' sets, and answers 0."""
        async with self._client.question():
            servers = await self._client.layout()
        for server in servers:
            async with self._client.question():
                cursor = self._cursors.get(server.name, 0)
                (cursor, keys), past = await server.ask(self._scan(cursor, "user", 16, limit), ("TIME",))
                seconds, micros = map(int, past)
                bound = min(now, seconds * 1000 + micros // 1000)
                await self._client.ask(*(("ZREMRANGEBYSCORE", key, "-inf", f"({bound}") for key in keys))
            self._cursors[server.name] = int(cursor)
        return 0

    async def count(self) -> int:
        """Looks at every row."""
        return sum([1 async for _ in self.handles()])

    async def handles(self) -> AsyncIterator[bytes]:
        """Looks at every row."""
        async for handles in self._all_handles():
            async with self._client.question():
                states = await self._client.ask(*(("GETRANGE", self._row_key(handle), 0, 0) for handle in handles))
            for handle, state in zip(handles, states, strict=True):
                if state == bytes([State.LIVE]):
                    yield handle

    async def sessions_of(self, user: bytes) -> list[Row]:
        """Each row that is listed for the user, if it is there, LIVE and the user's."""
        if not user:
            return []
        key = self._user_key(user)
        rows: list[Row] = []
        dead: list[tuple[bytes, bytes, int]] = []
        async with self._client.question():
            (listed,) = await self._client.ask(("ZRANGE", key, 0, -1))
            handles = [handle for handle in listed if handle != SENTINEL]
            for start in range(0, len(handles), CHUNK):
                part = handles[start : start + CHUNK]
                values = await self._client.ask(*(("GET", self._row_key(handle)) for handle in part))
                found = [row for row in map(self._row, part, values) if row is not None]
                rows += [row for row in found if row.state is State.LIVE and row.user == user]
                dead += [(user, row.handle, row.horizon) for row in found if row.state is State.DEAD]
            await self._unlist(dead)
        return rows

    async def clear(self) -> int:
        """One row at a time, in the midst of what others write."""
        live = 0
        async for handles in self._all_handles():
            async with self._client.question():
                killed = await self._client.call(KILL, [(self._row_key(handle),) for handle in handles])
                live += sum(1 for was in killed if was and was[0] == State.LIVE)
                await self._unlist([(was[1], h, was[2]) for h, was in zip(handles, killed, strict=True) if was])
        return live

    async def history(self) -> bytes:
        """See Backend. Of a cluster, that of all masters."""
        async with self._client.question():
            found = await self._client.histories()
        return b" ".join(found)

    # ── keys and values ───────────────────────────────────────────────────────────────────────────────────────

    def _row_key(self, handle: bytes) -> str:
        return f"{self.prefix}:row:{handle.hex()}"

    def _user_key(self, user: bytes) -> str:
        return f"{self.prefix}:user:{user.hex()}"

    def _row(self, handle: bytes, value: bytes | None) -> Row | None:
        if value is None:
            return None
        try:
            return unpacked(handle, value)
        except (struct.error, ValueError) as error:
            raise BackendError(f"{self.name}: {self._row_key(handle)} is not ours: choose another prefix=") from error

    async def _all_handles(self) -> AsyncIterator[list[bytes]]:
        """The handles of all rows but the sentinel, each once.

        A row that goes from one server to another may be looked for where it is no more and where it is not yet. So
        after a round in which rows can have gone another follows, which misses those only that have gone in both.
        """
        seen = {SENTINEL}
        for _ in range(ROUNDS):
            async with self._client.question():
                layout = await self._client.layout()
            for server in layout:
                async for handles in self._handles_of(server):
                    yield list(handles - seen)
                    seen |= handles
            async with self._client.question():
                if await self._client.unmoved(layout):
                    return

    async def _handles_of(self, server: Server) -> AsyncIterator[set[bytes]]:
        cursor, start = 0, len(self._row_key(b""))
        while True:
            async with self._client.question():
                ((cursor, keys),) = await server.ask(self._scan(cursor, "row", 40, CHUNK))
            yield {bytes.fromhex(key[start:].decode()) for key in keys}
            if int(cursor) == 0:
                return

    def _scan(self, cursor: int, kind: str, digits: int, count: int) -> Command:
        """SCAN for our keys of one kind, among `count` keys of whatever kind."""
        prefix = re.sub(r"([*?\[\]\\])", r"\\\1", self.prefix)
        return ("SCAN", cursor, "MATCH", f"{prefix}:{kind}:" + "[0-9a-f]" * digits, "COUNT", count)

    async def _unlist(self, dead: Iterable[tuple[bytes, bytes, int]]) -> None:
        """Forget (user, handle) of rows that are DEAD until a horizon. Entries left behind do no harm."""
        with suppress(RedisError, OSError):
            await self._client.call(UNLIST, [(self._user_key(user), handle, h) for user, handle, h in dead if user])


def _chunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    chunk: list[Row] = []
    size = 0
    for row in rows:
        if chunk and (len(chunk) == CHUNK or size + len(row.body) > CHUNK_BYTES):
            yield chunk
            chunk, size = [], 0
        chunk.append(row)
        size += len(row.body)
    if chunk:
        yield chunk
