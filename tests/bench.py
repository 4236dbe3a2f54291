"""`./dev bench`: what a session costs a request, as ratios of times taken in turn in one process. No assertion here.

Each variant is called through the same bare ASGI application, some thousand requests at a time, the variants
taking turns; a figure is the median over the rounds of the time a request takes over the bare application.
"""

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import pstats
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import lmdb
import msgpack
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from shmsession import SessionConfig, SessionStore
from shmsession.asgi import App, Scope, SessionMiddleware
from shmsession.auth import Auth, Rights
from shmsession.keyring import Key
from shmsession.testing import login_cookie

DATA: dict[str, Any] = {
    "user": "ada@example.org", "name": "Ada Lovelace", "locale": "en_GB", "hits": 41, "theme": "dark",
    "cart": [{"sku": f"A-{n:05}", "quantity": n, "price": "12.50", "title": f"Article number {n}"} for n in range(8)],
    "seen": [f"/articles/{n}" for n in range(12)], "flags": {"beta": True, "consent": False, "tour": 3},
    "csrf": "n1Yq0tY2rS8b5F3sXo9gkD4wZ7uVhJmC",
}  # fmt: skip

BODY = {"type": "http.response.body", "body": b"ok"}
OTHER_HEADERS = [
    (b"host", b"localhost"), (b"user-agent", b"bench"), (b"accept", b"*/*"), (b"accept-language", b"en"),
    (b"accept-encoding", b"gzip"), (b"connection", b"keep-alive"), (b"referer", b"http://localhost/"),
]  # fmt: skip


def start() -> dict[str, Any]:
    """A response's first message; a new one each time, for middleware may add to its headers."""
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}


def application(touch: Callable[[Any], None]) -> App:
    async def app(scope: Scope, receive: Any, send: Any) -> None:
        touch(scope)
        await send(start())
        await send(BODY)

    return app


def untouched(scope: Scope) -> None:
    return None


def read(scope: Scope) -> None:
    session = scope["session"]
    session["user"]
    session["hits"]


def write(scope: Scope) -> None:
    session = scope["session"]
    session["hits"] = session["hits"] + 1


def read_one(scope: Scope) -> None:
    scope["session"]["hits"]


class Member:
    """A user as applications have them."""

    is_active = True
    permissions = frozenset({"read", "comment"})

    def has(self, permission: str) -> bool:
        return permission in self.permissions


def authenticated(auth: Auth[Member]) -> App:
    """One value of the session, for a user who is logged in, remembered by this process, and has a right."""
    may_read = Rights.permission("read")

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        me = await auth.load(scope)
        if not (me.is_authenticated and await me.has(may_read)):
            raise PermissionError
        me.session["hits"]
        await send(start())
        await send(BODY)

    return app


class Floor:
    """The least straight-line code: same cookie, same tables, same total bytes, MAC; no classes, no options."""

    def __init__(self, directory: Path, bytes_total: int) -> None:
        directory.mkdir(mode=0o700)
        self.env = lmdb.open(str(directory), map_size=64 << 20, max_dbs=6, sync=False, mode=0o700, max_spare_txns=0)
        self.records = self.env.open_db(b"records")
        self.key = os.urandom(32)
        self.cipher = AESGCM(os.urandom(32))
        secret, nonce = os.urandom(36), os.urandom(12)
        self.cookie = urlsafe_b64encode(b"\x01abcd" + nonce + self.cipher.encrypt(nonce, secret, b"cookie session"))
        handle = blake2b(secret[:32], digest_size=20, person=b"shmsession id").digest()
        data = msgpack.packb({key: msgpack.packb(value) for key, value in DATA.items()})
        self.header = bytes(bytes_total - len(data) - 16)
        with self.env.begin(write=True) as txn:
            raw = self.header + data
            txn.put(handle, raw + self.mac(handle, raw), db=self.records)

    def mac(self, handle: bytes, raw: bytes) -> bytes:
        return blake2b(handle + raw, key=self.key, digest_size=16).digest()

    def app(self, *, writes: bool) -> App:
        size, env, records, cipher = len(self.header), self.env, self.records, self.cipher

        async def app(scope: Scope, receive: Any, send: Any) -> None:
            cookie = b""
            for name, value in scope["headers"]:
                if name == b"cookie":
                    cookie = value.partition(b"session=")[2]
            token = urlsafe_b64decode(cookie)
            secret = cipher.decrypt(token[5:17], token[17:], b"cookie session")
            handle = blake2b(secret[:32], digest_size=20, person=b"shmsession id").digest()
            with env.begin() as txn:
                raw = txn.get(handle, db=records)
            assert raw is not None
            if self.mac(handle, raw[:-16]) != raw[-16:]:
                raise ValueError
            data = msgpack.unpackb(raw[size:-16])
            msgpack.unpackb(data["user"])
            hits = msgpack.unpackb(data["hits"])
            if writes:
                data["hits"] = msgpack.packb(hits + 1)
                new = self.header + msgpack.packb(data)
                new += self.mac(handle, new)
                with env.begin(write=True) as txn:
                    if txn.get(handle, db=records) != raw:
                        raise ValueError
                    txn.put(handle, new, db=records)
            await send(start())
            await send(BODY)

        return app


def starlette_signed(touch: Callable[[Any], None]) -> tuple[App, bytes]:
    """Starlette's signed cookie, which does no I/O at all, with the same data."""
    from itsdangerous import TimestampSigner
    from starlette.middleware.sessions import SessionMiddleware as SignedCookie

    signed = TimestampSigner("secret").sign(urlsafe_b64encode(json.dumps(DATA).encode()))
    return SignedCookie(application(touch), secret_key="secret"), b"session=" + signed


def starsessions_on_redis(touch: Callable[[Any], None], socket: str) -> App:
    """The session loaded from Redis before the application looks, as starsessions has it."""
    from redis.asyncio import Redis
    from starlette.requests import HTTPConnection
    from starsessions import SessionMiddleware as RedisSessionMiddleware
    from starsessions import load_session
    from starsessions.stores.redis import RedisStore

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        await load_session(HTTPConnection(scope))
        touch(scope)
        await send(start())
        await send(BODY)

    store = RedisStore(connection=Redis(unix_socket_path=socket))
    middleware: App = RedisSessionMiddleware(app, store=store, lifetime=3600, rolling=True)
    return middleware


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    """A throw-away server; Debian's redis-tools carries it under the name of redis-check-rdb."""
    program = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    if program is None:
        raise SystemExit("bench: --redis needs a Redis server: apt-get install redis-tools, or redis-server")
    socket = str(directory / "redis")
    command = ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(command, executable=program, stdout=subprocess.DEVNULL, cwd=directory)
    try:
        while not Path(socket).exists() and server.poll() is None:
            time.sleep(0.01)
        yield socket
    finally:
        server.terminate()
        server.wait()


async def log_in(app: App) -> bytes:
    """The cookie of a new session with the data, made through the middleware itself."""
    sent: list[Any] = []

    async def collect(message: Any) -> None:
        sent.append(message)

    await app({"type": "http", "path": "/", "method": "GET", "headers": [], "scheme": "http"}, receive, collect)
    headers = dict(sent[0]["headers"])
    value: bytes = headers[b"set-cookie"].partition(b";")[0]
    return value


def against_redis(directory: Path, rounds: int, count: int) -> list[tuple[str, float, str]]:
    """The same requests with starsessions on a Redis server on a unix socket, the two taking turns."""
    store = make_store(directory / "r", "r")
    cookie = cookie_of(store)
    cost: dict[str, list[float]] = {}

    async def run(socket: str) -> None:
        fill = starsessions_on_redis(lambda scope: scope["session"].update(DATA), socket)
        theirs = await log_in(fill)
        bare = application(untouched)
        for _ in range(rounds):
            base = await calls(bare, None, count)
            for kind, touch in (("read", read), ("write", write)):
                ours = await calls(SessionMiddleware(application(touch), store), cookie, count)
                redis = await calls(starsessions_on_redis(touch, socket), theirs, count)
                cost.setdefault(f"our {kind}", []).append((ours - base) * 1e6)
                cost.setdefault(f"redis {kind}", []).append((redis - base) * 1e6)

    with redis_server(directory) as socket:
        asyncio.run(run(socket))
    median = {name: statistics.median(row) for name, row in cost.items()}
    return [
        (
            f"{kind} ÷ starsessions on Redis",
            median[f"our {kind}"] / median[f"redis {kind}"],
            f"≤ 1/10   ({median[f'our {kind}']:.1f} ÷ {median[f'redis {kind}']:.1f} µs)",
        )
        for kind in ("read", "write")
    ]


async def receive() -> Any:
    raise AssertionError("nobody sends a body here")


async def send(message: Any) -> None:
    return None


async def calls(app: App, cookie: bytes | None, count: int) -> float:
    """Seconds that one request takes."""
    headers = OTHER_HEADERS if cookie is None else [*OTHER_HEADERS, (b"cookie", cookie)]
    begin = time.perf_counter()
    for _ in range(count):
        await app({"type": "http", "path": "/", "method": "GET", "headers": headers, "scheme": "http"}, receive, send)
    return (time.perf_counter() - begin) / count


def make_store(directory: Path, name: str, map_size: int = 64 << 20) -> SessionStore:
    config = SessionConfig(name=name, directory=directory, keys=(Key.generate(),), secure=False, map_size=map_size)
    return SessionStore(config=config)


def cookie_of(store: SessionStore, user_id: str | None = None) -> bytes:
    ((name, value),) = login_cookie(store, DATA, user_id=user_id).items()
    return f"{name}={value}".encode()


def variants(directory: Path) -> dict[str, tuple[App, bytes | None]]:
    store = make_store(directory / "sessions", "bench")
    cookie, logged_in = cookie_of(store), cookie_of(store, "ada")
    auth = Auth(store, lambda user_id: Member())
    record = store.resolve(lambda: cookie).record
    assert record is not None
    floor = Floor(directory / "floor", len(record.raw))
    floor_cookie = b"session=" + floor.cookie
    found: dict[str, tuple[App, bytes | None]] = {
        "bare application": (application(untouched), None),
        "no cookie, not looked at": (SessionMiddleware(application(untouched), store), None),
        "cookie, not looked at": (SessionMiddleware(application(untouched), store), cookie),
        "skipped path": (SessionMiddleware(application(untouched), store, skip="/"), cookie),
        "read": (SessionMiddleware(application(read), store), cookie),
        "write": (SessionMiddleware(application(write), store), cookie),
        "read of one value, logged in": (SessionMiddleware(application(read_one), store), logged_in),
        "the same with its user and a right": (SessionMiddleware(authenticated(auth), store), logged_in),
        "floor read": (floor.app(writes=False), floor_cookie),
        "floor write": (floor.app(writes=True), floor_cookie),
    }
    for name, touch in (("untouched", untouched), ("read", read), ("write", write)):
        found[f"Starlette signed cookie, {name}"] = starlette_signed(touch)
    return found


def measure(found: dict[str, tuple[App, bytes | None]], rounds: int, count: int) -> dict[str, float]:
    """Median microseconds over the bare application, the variants taking turns."""
    times: dict[str, list[float]] = {name: [] for name in found}

    async def run() -> None:
        for app, cookie in found.values():
            await calls(app, cookie, count // 4)
        for _ in range(rounds):
            for name, (app, cookie) in found.items():
                times[name].append(await calls(app, cookie, count) * 1e6)

    asyncio.run(run())
    bare = times["bare application"]
    return {name: statistics.median(a - b for a, b in zip(row, bare, strict=True)) for name, row in times.items()}


def ratios(cost: dict[str, float]) -> list[tuple[str, float, str]]:
    signed = "Starlette signed cookie, "
    with_user = cost["the same with its user and a right"] / cost["read of one value, logged in"]
    return [
        ("read ÷ floor read", cost["read"] / cost["floor read"], "≤ 2"),
        ("write ÷ floor write", cost["write"] / cost["floor write"], "≤ 2"),
        ("authenticated read ÷ the same without", with_user, "≤ 1.3"),
        ("untouched ÷ Starlette signed", cost["cookie, not looked at"] / cost[signed + "untouched"], "≤ 1/3"),
        ("read ÷ Starlette signed", cost["read"] / cost[signed + "read"], "≤ 1/3"),
        ("write ÷ Starlette signed", cost["write"] / cost[signed + "write"], "≤ 1/3"),
    ]


def at_scale(directory: Path, sessions: int, rounds: int) -> list[tuple[str, float, str]]:
    """Requests spread over the sessions of a large store against the same over a store of a thousand.

    Twice: with each visitor's second request (the worker remembers the cookie and the record), and with a first one
    in this worker (it does not).
    """
    small = make_store(directory / "k", "k")
    large = make_store(directory / "m", "m", map_size=max(64 << 20, sessions * 4096))
    pools = {"small": (small, [cookie_of(small) for _ in range(1_000)]), "large": (large, [])}
    every = max(1, sessions // 20_000)
    for number in range(sessions):
        cookie = cookie_of(large)
        if number % every == 0:
            pools["large"][1].append(cookie)
    cost: dict[str, list[float]] = {}

    async def run() -> None:
        bare = application(untouched)
        for turn in range(rounds):
            base = await calls(bare, None, 1_000)
            for kind, touch in (("read", read), ("write", write)):
                for label, (store, pool) in pools.items():
                    app = SessionMiddleware(application(touch), store)
                    begin = turn * 500 % len(pool)
                    for state in ("first", "second"):
                        if state == "first":
                            forget(store)
                        took = [await calls(app, cookie, 1) for cookie in pool[begin : begin + 500]]
                        cost.setdefault(f"{kind} {state} {label}", []).append((statistics.median(took) - base) * 1e6)

    asyncio.run(run())
    median = {name: statistics.median(row) for name, row in cost.items()}
    return [
        (
            f"{state} {kind} at {sessions:,} ÷ at 1,000",
            median[f"{kind} {state} large"] / median[f"{kind} {state} small"],
            f"≤ {allowed}   ({median[f'{kind} {state} large']:.1f} ÷ {median[f'{kind} {state} small']:.1f} µs)",
        )
        for kind, allowed in (("read", 1.2), ("write", 1.5))
        for state in ("second", "first")
    ]


def forget(store: SessionStore) -> None:
    """Make every visitor's next request the first one in this worker."""
    del store.transport  # with the tokens that it remembers; it is made again at once
    store.memory.forget_verified()


def profile(app: App, cookie: bytes | None, count: int) -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    asyncio.run(calls(app, cookie, count))
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(18)


def main() -> None:
    from tests import bench_backends  # which imports this module

    parser = argparse.ArgumentParser(prog="dev bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--count", type=int, default=2_000, help="requests in a round")
    parser.add_argument("--sessions", type=int, default=0, help="also compare a store of so many with one of 1,000")
    parser.add_argument("--redis", action="store_true", help="also compare with starsessions on a Redis server")
    parser.add_argument("--backends", action="store_true", help="also PostgreSQL and Redis behind it, not only SQLite")
    parser.add_argument("--profile", choices=("read", "write"), help="print where the time of such a request goes")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and so end what was started
    shared = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="shms-", dir=shared if shared.is_dir() else None))
    try:
        found = variants(directory)
        if options.profile:
            profile(*found[options.profile], options.count * 10)
            return
        cost = measure(found, options.rounds, options.count)
        print("µs a request over the bare application (median; compare ratios, not machines)")
        for name, value in cost.items():
            print(f"  {name:<36}{value:8.2f}")
        rows = ratios(cost)
        if options.sessions:
            rows += at_scale(directory, options.sessions, options.rounds)
        if options.redis:
            rows += against_redis(directory, options.rounds, min(options.count, 500))
        for backend in bench_backends.DATABASES if options.backends else ("sqlite",):
            rows += bench_backends.ratios(backend, (options.rounds + 3) // 4)
        print("ratios, and the budget")
        for name, value, allowed in rows:
            print(f"  {name:<62}{value:8.2f}   {allowed}")
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
