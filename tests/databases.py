"""Throw-away PostgreSQL, MariaDB and Redis servers on unix sockets, which tests may kill, stop and start again.

What a server keeps is in a directory of its own, short-named, for socket paths stop at 107 bytes. Start servers in the
main thread only: they die with the thread that started them, so that none outlives the tests.
"""

import asyncio
import contextlib
import ctypes
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import asyncmy
import psycopg
from psycopg import sql

from tests.servers import PATIENCE, alive, children, new_place, wait_for

_PR_SET_PDEATHSIG: Final = 1
_DEBIAN: Final = ("/usr/lib/postgresql", "*/bin")
"""Where Debian keeps PostgreSQL's programs, which are not on PATH."""
_SBIN: Final = "/usr/sbin"
"""Where it keeps MariaDB's and PgBouncer's; only root has it on PATH."""


def program(*names: str) -> str:
    """The path of the first of these programs that there is."""
    debian = sorted(Path(_DEBIAN[0]).glob(_DEBIAN[1]), key=lambda path: float(path.parent.name), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, debian), _SBIN])
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    raise AssertionError(
        f"found no {names[0]}: ./dev test installs it; Debian has it in postgresql, pgbouncer, mariadb-server-core or "
        "redis-tools"
    )


def _dying(number: int) -> Callable[[], object] | None:
    if sys.platform != "linux":  # pragma: no cover
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(_PR_SET_PDEATHSIG, number)


def unprivileged() -> pwd.struct_passwd | None:
    """The account for what refuses to run as root, where we are root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return known.get("postgres") or known["nobody"]


class DatabaseServer(ABC):
    """One server in a place of its own. As a context manager it starts, and at the end nothing is left of it."""

    _gentle: ClassVar[int] = signal.SIGTERM
    """The signal at which it ends at once, but tidily."""

    def __init__(self) -> None:
        self.place = new_place()
        self.log = self.place / "log"
        self.process: subprocess.Popen[bytes] | None = None

    # What each of them says of itself.

    @abstractmethod
    def _command(self) -> list[str]: ...

    def _executable(self) -> str | None:
        return None

    @abstractmethod
    def _answers(self) -> bool: ...

    def _account(self) -> pwd.struct_passwd | None:
        """Whose process it is, where that is not ours."""
        return None

    def _give_up_place(self) -> None:
        account = self._account()
        if account:
            os.chown(self.place, account.pw_uid, account.pw_gid)

    # Its life.

    def _run(self, command: Sequence[str], executable: str | None = None) -> "subprocess.Popen[bytes]":
        account = self._account()
        other: dict[str, Any] = {}
        if account:
            other = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, executable=executable, cwd=self.place, env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                preexec_fn=_dying(self._gentle), **other,
            )  # fmt: skip

    def start(self) -> Self:
        """Start it, with the data it had, and wait until it answers."""
        assert not self.is_running
        process = self.process = self._run(self._command(), self._executable())
        wait_for(lambda: process.poll() is not None or self._answers(), f"{self} answers")
        assert process.returncode is None, f"{self} ended at its start:\n{self.text}"
        return self

    @property
    def is_running(self) -> bool:
        """Whether it runs, be it stopped by `freeze`."""
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def pids(self) -> list[int]:
        """Its processes: the parent first."""
        return [self.pid, *children(self.pid)] if self.is_running else []

    def kill(self) -> None:
        """kill -9 of all its processes: what a crash leaves is what there is."""
        self._tell(signal.SIGSTOP)  # so that none is born meanwhile
        pids = self._tell(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(PATIENCE)
        wait_for(lambda: not any(map(alive, pids)), f"{self} is dead")

    def stop(self) -> None:
        """Let it end tidily; its clients are cut off."""
        self.thaw()
        if self.process is not None:
            if self.is_running:
                self.process.send_signal(self._gentle)
            self.process.wait(PATIENCE)

    def freeze(self) -> None:
        """SIGSTOP: it keeps its connections and answers nobody, until `thaw`."""
        self._tell(signal.SIGSTOP)

    def thaw(self) -> None:
        self._tell(signal.SIGCONT)

    def _tell(self, number: int) -> list[int]:
        pids = self.pids()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    def restart(self) -> Self:
        """kill -9, and start again with the data that survived it."""
        self.kill()
        return self.start()

    def revive(self) -> Self:
        """After a test that killed or froze it: it answers again."""
        if not self.is_running:
            return self.start()
        self.thaw()
        wait_for(self._answers, f"{self} answers")
        return self

    def close(self) -> None:
        """End it and remove its data."""
        try:
            self.stop()
        finally:
            self.kill()
            shutil.rmtree(self.place)

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


class RedisServer(DatabaseServer):
    """A Redis, or a Valkey. It keeps data over a restart only with options such as `DURABLE`."""

    DURABLE: ClassVar = ("--appendonly", "yes", "--appendfsync", "always")

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options
        self.socket = str(self.place / "redis")
        self.data = self.place / "data"
        self.data.mkdir()

    @property
    def url(self) -> str:
        """Database 0."""
        return f"unix://{self.socket}?db=0"

    def _executable(self) -> str:
        return program("redis-server", "valkey-server", "redis-check-rdb")

    def _command(self) -> list[str]:
        """Debian's redis-tools carries the server under another name; which one it is, it tells by its name."""
        where = ["--port", "0", "--unixsocket", self.socket, "--dir", str(self.data)]
        return ["redis-server", *where, "--save", "", "--appendonly", "no", *self.options]

    def _answers(self) -> bool:
        """Whether it serves commands; one that still reads its data says -LOADING."""
        try:
            answer = self.ask("PING")
        except OSError:
            return False
        return answer.startswith((b"+PONG", b"-NOAUTH"))

    def ask(self, *words: str) -> bytes:
        """Send one command of plain words; returns the first bytes of the answer as they came."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(PATIENCE)
            connection.connect(self.socket)
            connection.sendall(" ".join(words).encode() + b"\r\n")
            return connection.recv(4096)

    def forget(self) -> Self:
        """kill -9, and start again without any data."""
        self.kill()
        shutil.rmtree(self.data)
        self.data.mkdir()
        return self.start()

    def empty(self) -> None:
        """Remove all keys, scripts and settings of databases; connections stay."""
        for words in (("FLUSHALL",), ("SCRIPT", "FLUSH")):
            answer = self.ask(*words)
            assert answer.startswith(b"+OK"), answer


class PostgresServer(DatabaseServer):
    """A PostgreSQL cluster. Its superuser needs no password; everybody else does."""

    _gentle = signal.SIGQUIT
    _numbers = count(1)

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options
        self.data = self.place / "data"
        self._give_up_place()

    def _account(self) -> pwd.struct_passwd | None:
        return unprivileged()

    def url(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        secret = f":{password}" if password is not None else ""
        return f"postgresql://{user}{secret}@/{database}?host={self.place}"

    def _command(self) -> list[str]:
        """Durable against all that can happen here, which is less than the loss of power."""
        settings = {
            "listen_addresses": "", "unix_socket_directories": str(self.place), "fsync": "off",
            "shared_buffers": "32MB", "max_connections": "60", "dynamic_shared_memory_type": "mmap",
        }  # fmt: skip
        flags = [flag for name, value in settings.items() for flag in ("-c", f"{name}={value}")]
        return [program("postgres"), "-D", str(self.data), *flags, *self.options]

    def _initialize(self) -> None:
        command = [program("initdb"), "-D", str(self.data), "-U", "postgres", "-E", "UTF8", "--locale=C", "--no-sync"]
        status = self._run([*command, "--auth=trust"]).wait(PATIENCE)
        assert status == 0, f"initdb failed:\n{self.text}"
        trusted = "local all postgres trust\nlocal replication postgres trust\n"
        (self.data / "pg_hba.conf").write_text(f"{trusted}local all all scram-sha-256\n")

    def copy_from(self, primary: "PostgresServer") -> None:
        """Whatever it had: have what that one has, and follow it as a standby once it is started."""
        self.kill()
        shutil.rmtree(self.data, ignore_errors=True)
        command = [program("pg_basebackup"), "-D", str(self.data), "-d", primary.url(), "--checkpoint=fast"]
        status = self._run([*command, "--write-recovery-conf", "--no-sync", "--no-manifest"]).wait(PATIENCE)
        assert status == 0, f"pg_basebackup failed:\n{self.text}"

    def start(self) -> Self:
        if not self.data.exists():
            self._initialize()
        return super().start()

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def connect(self, database: str = "postgres") -> "psycopg.Connection[tuple[Any, ...]]":
        """A connection of the superuser, one transaction for each statement."""
        return psycopg.connect(self.url(database), autocommit=True, connect_timeout=int(PATIENCE))

    def run(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """What a statement of the superuser returns."""
        with self.connect(database) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def create_database(self) -> str:
        """The name of a new, empty database."""
        name = f"test{next(self._numbers)}"
        with self.connect() as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        return name

    def drop_database(self, name: str) -> None:
        """Remove it, whoever is connected to it."""
        with self.connect() as connection:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))

    def close(self) -> None:
        """One that was killed left its shared memory behind: the next start finds it, and a tidy end removes it."""
        if self.data.exists() and not self.is_running:
            with contextlib.suppress(AssertionError):
                self.start()
        super().close()


class MariaDBServer(DatabaseServer):
    """A MariaDB. Its superuser, root, needs no password; everybody else does."""

    _numbers = count(1)
    _TABLES: ClassVar = ("mysql_system_tables.sql", "mysql_performance_tables.sql", "mysql_system_tables_data.sql")

    def __init__(self, *options: str) -> None:
        super().__init__()
        self.options = options
        self.socket = str(self.place / "mysql")
        self.data = self.place / "data"

    def url(self, database: str = "mysql", user: str = "root", password: str | None = None) -> str:
        secret = f":{password}" if password is not None else ""
        return f"mysql://{user}{secret}@localhost/{database}?unix_socket={self.socket}"

    def _base(self) -> Path:
        """Where its share/mysql is: beside the program, be that installed, or started where it was unpacked."""
        found = program("mariadbd")
        starter = re.search(r"exec '(.*?)'", Path(found).read_bytes()[:4096].decode(errors="replace"))
        return Path(starter[1] if starter else found).parents[1]

    def _common(self) -> list[str]:
        """The program, and what it needs to work on the same data."""
        settings = {
            "basedir": self._base(), "datadir": self.data, "innodb-data-file-path": "ibdata1:1M:autoextend",
            "innodb-log-file-size": "16M", "innodb-buffer-pool-size": "32M",
        }  # fmt: skip
        root = ["--user=root"] if os.geteuid() == 0 else []
        return [program("mariadbd"), "--no-defaults", *root, *(f"--{name}={value}" for name, value in settings.items())]

    def _command(self) -> list[str]:
        """Durable against all that can happen here, which is less than the loss of power."""
        flags = [f"--socket={self.socket}", "--skip-networking", "--innodb-flush-log-at-trx-commit=2"]
        return [*self._common(), *flags, "--max-connections=60", *self.options]

    def _initialize(self) -> None:
        """As mysql_install_db does it."""
        self.data.mkdir()
        tables = "".join((self._base() / "share" / "mysql" / name).read_text() for name in self._TABLES)
        done = subprocess.run(
            [*self._common(), "--bootstrap"], input=f"CREATE DATABASE mysql;\nUSE mysql;\n{tables}",
            capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"MariaDB was not set up:\n{done.stderr}"

    def start(self) -> Self:
        if not self.data.exists():
            self._initialize()
        return super().start()

    def _answers(self) -> bool:
        try:
            self.run("SELECT 1")
        except asyncmy.errors.OperationalError:
            return False
        return True

    def run(self, statements: str, database: str = "mysql") -> list[tuple[Any, ...]]:
        """What the last of these statements of the superuser's returns; a line that ends with ; ends one."""

        async def run() -> list[tuple[Any, ...]]:
            async with asyncio.timeout(PATIENCE), await self.connect(database) as connection:
                cursor = connection.cursor()
                for statement in statements.split(";\n"):
                    await cursor.execute(statement)
                return list(await cursor.fetchall())

        with ThreadPoolExecutor(1) as thread:  # a test may have an event loop here
            return thread.submit(asyncio.run, run()).result()

    async def connect(self, database: str = "mysql") -> Any:
        """A connection of the superuser, one transaction for each statement."""
        return await asyncmy.connect(unix_socket=self.socket, user="root", database=database, autocommit=True)

    def create_database(self) -> str:
        """The name of a new, empty database."""
        name = f"test{next(self._numbers)}"
        self.run(f"CREATE DATABASE {name}")
        return name

    def drop_database(self, name: str) -> None:
        """Remove it, whoever is connected to it."""
        for (number,) in self.run(f"SELECT id FROM information_schema.processlist WHERE db = '{name}'"):
            with contextlib.suppress(asyncmy.errors.OperationalError):  # it has just ended
                self.run(f"KILL {number}")
        self.run(f"DROP DATABASE IF EXISTS {name}")
