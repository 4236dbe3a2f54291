"""The examples on real servers, and a small client for them."""

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import shmsession
from shmsession import Key, SessionConfig, SessionStore

ROOT: Final = Path(__file__).absolute().parent.parent
"""The directory that holds `examples/`; not resolved, for the suite may run in a directory of links."""

GUNICORN: Final = str(Path(sys.executable).with_name("gunicorn"))
"""Not `-m gunicorn`: at USR2 it starts itself anew by path, and a package's directory would then come first on it."""

PACKAGE: Final = Path(shmsession.__file__).parent.parent
PATIENCE: Final = 60.0
"""Seconds after which something that ought to happen counts as not happening; nothing ever takes that long."""

KEEP_ALIVE: Final = 75
"""Seconds for which servers hold an idle connection: no test is so slow that one is closed under it."""

WORKERS: Final = 4
_DIE_WITH_PARENT: Final = 1


@dataclass(frozen=True)
class Kind:
    """A way to serve one of the examples. `reusable`: connections serve more than one request."""

    name: str
    protocol: str
    flags: tuple[str, ...]
    gunicorn: bool = True
    reusable: bool = True

    @property
    def app(self) -> str:
        return f"examples.{self.protocol}_app:app"

    def __str__(self) -> str:
        return self.name


SYNC: Final = Kind("sync", "wsgi", ("-k", "sync"), reusable=False)
GTHREAD: Final = Kind("gthread", "wsgi", ("-k", "gthread", "--threads", "4"))
ASGI: Final = Kind("asgi", "asgi", ("-k", "asgi"))
UVICORN_WORKER: Final = Kind("uvicorn_worker", "asgi", ("-k", "uvicorn_worker.UvicornWorker"))
UVICORN: Final = Kind("uvicorn", "asgi", (), gunicorn=False)

ON_GUNICORN: Final = (SYNC, GTHREAD, ASGI, UVICORN_WORKER)
KINDS: Final = (*ON_GUNICORN, UVICORN)


# ── the client ─────────────────────────────────────────────────────────────────────────────────────────────────


class Unanswered(Exception):
    """The connection ended before a whole answer had come."""


class Answer(NamedTuple):
    """A response; header names are in lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def header(self, name: str) -> str | None:
        found = self.all(name)
        return ", ".join(found) if found else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def pid(self) -> int:
        """Which worker it was."""
        return int(dict(self.headers)["x-worker-pid"])


Desk = Callable[[str, str], "Answer"]
Address = str | tuple[str, int]
"""A unix socket's path, or host and port."""


def dial(address: Address) -> socket.socket:
    """A connected socket. Raises Unanswered."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    connection = socket.socket(family, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE)
    try:
        connection.connect(address)
    except OSError as error:
        connection.close()
        raise Unanswered(str(error)) from error
    return connection


class Browser:
    """One visitor with a cookie jar. `keep_alive`: all requests over one connection, to one worker.

    `own`: headers of a client that is none of cookies; each is sent back as an answer gave it last.
    """

    def __init__(
        self, address: Address, cookies: Mapping[str, str] | None = None, *, keep_alive: bool = False,
        own: Iterable[str] = (),
    ) -> None:  # fmt: skip
        self.address = address
        self.cookies = dict(cookies or {})
        self.own = dict.fromkeys(own, "")
        self._keep_alive = keep_alive
        self._socket: socket.socket | None = None

    def get(self, path: str, **headers: str) -> Answer:
        return self.request("GET", path, headers)

    def post(self, path: str, **headers: str) -> Answer:
        return self.request("POST", path, headers)

    def request(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """Send it with the jar's cookies and keep what the answer sets. Raises Unanswered."""
        answer = self.send(self.raw(method, path, headers), empty=method == "HEAD")
        for cookie in answer.all("set-cookie"):
            self._keep(cookie)
        self.own |= {name: value for name in self.own if (value := answer.header(name.lower())) is not None}
        return answer

    def begin(self, method: str, path: str) -> "Pending":
        """Send a request with the jar's cookies over a connection of its own; its answer leaves the jar alone."""
        connection = dial(self.address)
        connection.sendall(self.raw(method, path, {"Connection": "close"}))
        return Pending(connection)

    def raw(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
        """The request as it is sent."""
        headers = {**self.own, **(headers or {})}
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *(f"{k}: {v}" for k, v in headers.items())]
        if method == "POST":
            lines.append("Content-Length: 0")
        if self.cookies and "Cookie" not in headers:
            lines.append("Cookie: " + "; ".join(f"{name}={value}" for name, value in self.cookies.items()))
        if not self._keep_alive and "Connection" not in headers:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def _keep(self, cookie: str) -> None:
        pair, *attributes = cookie.split("; ")
        name, _, value = pair.partition("=")
        if "Max-Age=0" in attributes:
            self.cookies.pop(name, None)
        else:
            self.cookies[name] = value

    def send(self, raw: bytes, *, empty: bool = False) -> Answer:
        """Send bytes as they are and read one response; `empty` when it has no body whatever its headers say."""
        connection = self._socket or dial(self.address)
        self._socket = None
        try:
            connection.sendall(raw)
            answer, reusable = _read_response(connection, empty=empty)
        except OSError as error:
            connection.close()
            raise Unanswered(str(error)) from error
        except Unanswered:
            connection.close()
            raise
        if self._keep_alive and reusable:
            self._socket = connection
        else:
            connection.close()
        return answer

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pending:
    """A request that was sent and whose answer nobody has read yet."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @property
    def is_answered(self) -> bool:
        """Whether the answer has begun to arrive."""
        return bool(select.select([self._connection], [], [], 0)[0])

    def answer(self) -> Answer:
        with self._connection as connection:
            return _read_response(connection, empty=False)[0]


class Lane:
    """A connection over which requests go before the answers to those in front of them have come."""

    def __init__(self, address: Address) -> None:
        self._connection = dial(address)
        self._file = self._connection.makefile("rb")

    def send(self, requests: Iterable[bytes]) -> None:
        """So many at once that neither side's buffers overflow."""
        self._connection.sendall(b"".join(requests))

    def answer(self) -> Answer:
        """The next one, be it interim; without a length it has no body. Raises Unanswered."""
        status = self._line().split(" ", 2)[1]
        headers = []
        while line := self._line():
            name, _, value = line.partition(":")
            headers.append((name.lower(), value.strip()))
        return Answer(int(status), headers, self._file.read(int(dict(headers).get("content-length", "0"))))

    def _line(self) -> str:
        line = self._file.readline()
        if not line:
            raise Unanswered("closed before the end of the headers")
        return line.decode("latin-1").rstrip()

    def close(self) -> None:
        self._file.close()
        self._connection.close()


def _read_response(connection: socket.socket, *, empty: bool) -> tuple[Answer, bool]:
    """The answer, and whether the connection may serve another request."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65536)
        if not chunk:
            raise Unanswered("closed before the headers")
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = [(name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in rest)]
    status, fields = int(first.split(" ", 2)[1]), dict(headers)
    if empty or status in (204, 304):
        return Answer(status, headers, body), fields.get("connection", "").lower() != "close"
    wanted = int(fields["content-length"]) if "content-length" in fields else None
    while wanted is None or len(body) < wanted:
        chunk = connection.recv(65536)
        if not chunk:
            if wanted is not None:
                raise Unanswered("closed before the end of the body")
            break
        body += chunk
    return Answer(status, headers, body), wanted is not None and fields.get("connection", "").lower() != "close"


# ── the servers ────────────────────────────────────────────────────────────────────────────────────────────────


def _prepare_dying() -> Callable[[], object] | None:
    if sys.platform != "linux":  # pragma: no cover
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_DIE_WITH_PARENT, signal.SIGTERM)


_die_with_parent = _prepare_dying()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stop(pid: int) -> None:
    """SIGSTOP, and wait until it has stopped: on its way there it may still accept a connection."""
    os.kill(pid, signal.SIGSTOP)
    deadline, state = time.monotonic() + PATIENCE, Path(f"/proc/{pid}/stat")
    while state.read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < deadline, f"{pid} does not stop"
        os.sched_yield()


def children(pid: int) -> list[int]:
    """The running children of a process, of all its threads."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return [child for child in found if alive(child)]


def wait_for(condition: Callable[[], object], what: str) -> None:
    """Return as soon as `condition` holds; fail when it does not."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.01)


@dataclass
class Server:
    """One of the examples on one kind of server, with a session store of its own in `place`.

    As a context manager it starts and stops; then the log must show no traceback, unless `may_fail`.
    """

    kind: Kind
    place: Path
    preload: bool = False
    workers: int = WORKERS
    flags: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    config: Path | None = None
    app: str | None = None
    cwd: Path = ROOT
    tcp: bool = False
    may_fail: bool = False

    def __post_init__(self) -> None:
        self.key = Key.generate()
        self.log = self.place / "log"
        self.address: Address = str(self.place / "http")
        self.process: subprocess.Popen[bytes] | None = None
        self._groups: list[int] = []
        self._stores: list[SessionStore] = []

    # What it is told.

    @property
    def settings(self) -> dict[str, str]:
        """The variables of the server: none of ours are handed on, and nothing is written to the home directory."""
        ours = {
            "SHMSESSION_DIR": str(self.place / "sessions"), "SHMSESSION_KEY": str(self.key), "SHMSESSION_SECURE": "0",
            "SHMSESSION_MAP_SIZE": "16MiB", "SHMSESSION_NAME": "suite", "HOME": str(self.place),
            "XDG_STATE_HOME": str(self.place / "state"), "PYTHONPATH": str(PACKAGE), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHMSESSION_")}
        merged = {**inherited, **ours, **self.env}
        return {name: value for name, value in merged.items() if value != ""}

    @property
    def command(self) -> list[str]:
        """The command line."""
        app, keep_alive = self.app or self.kind.app, str(KEEP_ALIVE)
        if not self.kind.gunicorn:
            where = ["--port", "0"] if self.tcp else ["--uds", str(self.address)]
            program = [
                "-m",
                "uvicorn",
                "--workers",
                str(self.workers),
                "--no-access-log",
                "--timeout-keep-alive",
                keep_alive,
            ]
        else:
            where = ["-b", "127.0.0.1:0" if self.tcp else f"unix:{self.address}"]
            config = self.config or self.cwd / "gunicorn.conf.py"
            program = [GUNICORN, "-c", str(config), "-w", str(self.workers), "--keep-alive", keep_alive]
        preload = ["--preload"] if self.preload else []
        return [sys.executable, *program, *where, *self.kind.flags, *preload, *self.flags, app]

    # Its life.

    def launch(self) -> "subprocess.Popen[bytes]":
        """Start it without waiting until it serves."""
        if not self.kind.gunicorn and isinstance(self.address, str):
            Path(self.address).unlink(missing_ok=True)  # uvicorn does not clear away what a killed one left
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command, cwd=self.cwd, env=self.settings, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True, preexec_fn=_die_with_parent,
            )  # fmt: skip
        self.process = process
        self._groups.append(process.pid)
        return process

    def start(self) -> Self:
        """Start it and wait until it answers and has all its workers, and each can be told to end."""
        process = self.launch()

        def ready() -> bool:
            if not self._answers():
                return False
            workers = self.worker_pids()
            return len(workers) == self.workers and (not self.kind.gunicorn or all(map(_hears, workers)))

        try:
            wait_for(lambda: process.poll() is not None or ready(), "the server answers")
            assert process.returncode is None, f"the server ended at its start with {process.returncode}"
        except BaseException:
            print(self.text)
            self.reap()
            raise
        return self

    def _answers(self) -> bool:
        if self.tcp:
            port = re.search(
                r"(?:Listening at|running on): ?http://127.0.0.1:(\d+)|on http://127.0.0.1:(\d+)", self.text
            )
            if port is None:
                return False
            self.address = ("127.0.0.1", int(port[1] or port[2]))
        try:
            return self.browser().get("/ping").status == 200
        except Unanswered:
            return False

    @property
    def pid(self) -> int:
        """The arbiter, or uvicorn's parent process."""
        assert self.process is not None
        return self.process.pid

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tell(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ask it to end, wait, and return its exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def kill_master(self) -> None:
        """kill -9 of the arbiter alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE)

    def reap(self) -> None:
        """Kill whatever is left of every start of it."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        if self.process is not None:
            self.process.wait(PATIENCE)
        for store in self._stores:
            store.close()
        wait_for(lambda: not any(map(_group_lives, self._groups)), "its processes end")
        self._groups.clear()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None and self.process is not None and self.process.poll() is None:
                self.stop()
        finally:
            self.reap()
            if kind is not None:
                print(self.text)
        if kind is None:
            self.check_log()

    def check_log(self) -> None:
        """No traceback so far."""
        assert self.may_fail or "Traceback" not in self.text, self.text

    # What is in it.

    def worker_pids(self) -> list[int]:
        """The workers that run now."""
        return sorted(pid for pid in children(self.pid) if self.kind.gunicorn or _is_uvicorn_worker(pid))

    def browser(self, cookies: Mapping[str, str] | None = None, *, keep_alive: bool = False) -> Browser:
        return Browser(self.address, cookies, keep_alive=keep_alive)

    def store(self, **settings: Any) -> SessionStore:
        """The server's own session store, opened in this process."""
        config = {"directory": self.place / "sessions", "keys": (self.key,), "secure": False, "name": "suite"}
        store = SessionStore(config=SessionConfig(**{**config, **settings}))
        self._stores.append(store)
        return store

    @contextlib.contextmanager
    def desks(self, cookies: Mapping[str, str]) -> "Iterator[dict[int, Desk]]":
        """For every worker a function (method, path) that has it, and nobody else, answer a request."""
        self.wait_for_all()
        with contextlib.ExitStack() as stack:
            desks: dict[int, Desk] = {}
            for pid in self.worker_pids():
                browser = self.browser(cookies, keep_alive=self.kind.reusable)
                stack.callback(browser.close)
                with self.only(pid):
                    assert browser.get("/ping").pid == pid
                desks[pid] = browser.request if self.kind.reusable else self._through(pid, browser)
            yield desks

    def wait_for_all(self) -> None:
        """Return when every worker has answered. Those that have are stopped meanwhile, so that the others must."""
        answered: set[int] = set()
        try:
            while len(answered) < self.workers:
                pid = self.browser().get("/ping").pid
                answered.add(pid)
                stop(pid)
        finally:
            for pid in answered:
                os.kill(pid, signal.SIGCONT)

    def _through(self, pid: int, browser: Browser) -> "Desk":
        def ask(method: str, path: str) -> Answer:
            with self.only(pid):
                return browser.request(method, path)

        return ask

    @contextlib.contextmanager
    def only(self, pid: int) -> "Iterator[None]":
        """Stop all other workers: which one takes a connection is the kernel's choice. They must be idle."""
        others = [other for other in self.worker_pids() if other != pid]
        for other in others:
            stop(other)
        try:
            yield
        finally:
            for other in others:
                os.kill(other, signal.SIGCONT)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    members = (path for path in Path("/proc").iterdir() if path.name.isdecimal())
    return any(alive(int(path.name)) and _group_of(int(path.name)) == group for path in members)


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def _hears(pid: int) -> bool:
    """Whether a worker of gunicorn hears signals. At first it has the handlers of the arbiter, who alone notes SIGHUP,
    and what is sent to it is lost; the arbiter then waits for it as long as it may."""
    try:
        caught = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return caught is not None and not int(caught[1], 16) >> (signal.SIGHUP - 1) & 1


def _is_uvicorn_worker(pid: int) -> bool:
    try:
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def last_commit(store: SessionStore) -> int:
    """LMDB's number of the last write transaction: it moves when anybody writes anything."""
    number: int = store.memory.environment.open().env.info()["last_txnid"]
    return number


def new_place() -> Path:
    """A short-named directory on shared memory where there is one."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="shms-", dir=shared if shared.is_dir() else None))


Running = Callable[..., Server]
"""The fixture `running(kind, preload=…)`: a server that all tests of a process share; none of them may hurt it."""

Serve = Callable[..., Server]
"""The fixture `serve(kind, …)`: a server of the test's own, stopped at its end."""
