"""What stands around a PostgreSQL: a PgBouncer in front of it, and a standby behind it."""

import os
import pwd
import signal
import socket
from typing import ClassVar, Self

from tests.databases import DatabaseServer, PostgresServer, program, unprivileged
from tests.servers import stop, wait_for


class PgBouncer(DatabaseServer):
    """A PgBouncer in front of a server, with all of its databases. It lets everybody in, as the superuser.

    `settings`: those of pgbouncer.ini, such as `pool_mode`; `users`: with passwords, and then only these are let in.
    """

    _gentle: ClassVar[int] = signal.SIGKILL  # it keeps nothing, and later versions wait for their clients

    def __init__(self, server: PostgresServer, *, users: dict[str, str] | None = None, **settings: object) -> None:
        super().__init__()
        self.server = server
        self.socket = str(self.place / ".s.PGSQL.6432")
        (self.place / "users").write_text("".join(f'"{user}" "{word}"\n' for user, word in (users or {}).items()))
        all_settings: dict[str, object] = {
            "unix_socket_dir": self.place, "pool_mode": "transaction", "default_pool_size": 2, "max_client_conn": 200,
            "auth_type": "scram-sha-256" if users else "any", "auth_file": self.place / "users",
            # It would wait for 15 s before it tries again what failed once.
            "server_login_retry": 0.05, "ignore_startup_parameters": "", **settings,
        }  # fmt: skip
        lines = [f"{name} = {value}" for name, value in all_settings.items()]
        database = f"* = host={server.place}" + ("" if users else " user=postgres")
        (self.place / "ini").write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines, ""]))
        self._give_up_place()

    def _account(self) -> pwd.struct_passwd | None:
        return unprivileged()

    def _command(self) -> list[str]:
        return [program("pgbouncer"), "--quiet", str(self.place / "ini")]

    def url(self, database: str, user: str = "postgres", password: str | None = None) -> str:
        secret = f":{password}" if password is not None else ""
        return f"postgresql://{user}{secret}@/{database}?host={self.place}&port=6432"

    def _answers(self) -> bool:
        """Whether it listens; what is behind it may be down."""
        with socket.socket(socket.AF_UNIX) as connection:
            return connection.connect_ex(self.socket) == 0


class PostgresPair:
    """A primary and a standby that streams from it. As a context manager it starts them, and ends them.

    What the primary acknowledges is its own only, until the standby has caught up.
    """

    def __init__(self) -> None:
        at_once = ("-c", "wal_retrieve_retry_interval=100ms")
        self.primary, self.standby = PostgresServer(*at_once), PostgresServer(*at_once)

    def __enter__(self) -> Self:
        try:
            self.primary.start()
            self.seed()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for server in (self.standby, self.primary):
            server.close()

    def url(self, database: str) -> str:
        """Of both, in an order that stays, and of the one that may be written to."""
        hosts = ",".join(sorted(str(server.place) for server in (self.primary, self.standby)))
        return f"postgresql://postgres@/{database}?host={hosts}&target_session_attrs=read-write"

    def seed(self) -> None:
        """Make the standby, or make it anew, of what the primary has now."""
        self.standby.copy_from(self.primary)
        self.standby.start()
        self.catch_up()

    def revive(self) -> Self:
        """After a test: the primary answers, and the standby follows it."""
        self.primary.revive()
        if self.standby.is_running and self._senders():
            self.standby.thaw()
            self.catch_up()
        else:
            self.seed()
        return self

    def catch_up(self) -> None:
        """Return when the standby has all that the primary has now, and has replayed it."""
        for pid in self._senders():
            os.kill(pid, signal.SIGCONT)
        ((goal,),) = self.primary.run("SELECT pg_current_wal_flush_lsn()")
        there = f"SELECT pg_last_wal_replay_lsn() >= '{goal}'"
        wait_for(lambda: self.standby.run(there) == [(True,)], "the standby has caught up")

    def lag(self) -> None:
        """From now on the standby gets nothing: what is acknowledged is lost at a promotion."""
        for pid in self._senders():
            stop(pid)

    def _senders(self) -> list[int]:
        return [pid for (pid,) in self.primary.run("SELECT pid FROM pg_stat_replication")]

    def promote(self, *, frozen: bool = False) -> None:
        """kill -9 of the primary, or SIGSTOP; the standby is the primary from now on, and there is no standby.

        `seed` makes the old primary the standby.
        """
        if frozen:
            self.primary.freeze()
        else:
            self.primary.kill()
        self.primary, self.standby = self.standby, self.primary
        assert self.primary.run("SELECT pg_promote()") == [(True,)]
