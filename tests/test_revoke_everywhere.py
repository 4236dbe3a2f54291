"""Logging a user out everywhere, over HTTP: in four workers under load, and in every database, whatever dies."""

import contextlib
import os
import select
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import pytest

from shmsession import Key, SessionConfig, SessionStore
from shmsession.clock import SystemClock
from shmsession.codec import decode, encode
from shmsession.errors import SessionGone, TooManySessions
from shmsession.memory.tables import Tables, Txn, remove
from shmsession.record import unpack_header
from shmsession.testing import make_store
from tests.figures import report, size
from tests.kept import BACKENDS, Kept, lease_holder, wait_for_empty_outbox
from tests.memory import Channel, Child, check_tables, in_child
from tests.servers import ASGI, GTHREAD, Browser, Kind, Running, Serve, Server, Unanswered, wait_for

pytest_plugins = ["tests.hosts"]


@pytest.fixture(params=BACKENDS)
def kept(request: pytest.FixtureRequest, place: Path) -> Iterator[Kept]:
    """Name it before `serve`, so that it is there until the server has sent all."""
    with Kept(request.param, place) as kept:
        yield kept


def opened(server: Server, url: str = "none") -> SessionStore:
    """The server's store, for this process."""
    config = SessionConfig(directory=server.place / "sessions", keys=(server.key,), secure=False, name="suite")
    return SessionStore(url, config=config)


# ── in four workers ───────────────────────────────────────────────────────────────────────────────────────────


class Clients:
    """Browsers of one user that ask without pause: who they are, to store something, for a new id."""

    def __init__(self, browsers: list[Browser]) -> None:
        self._stop, self.revoked = threading.Event(), threading.Event()
        self.answers = 0
        self.late: list[str] = []
        """What was answered to requests that began after the revocation, as somebody."""
        self._after = [0] * len(browsers)
        self._threads = [threading.Thread(target=self._run, args=one) for one in enumerate(browsers)]

    def _run(self, number: int, browser: Browser) -> None:
        kinds = [("GET", "/whoami"), ("POST", "/set/a/1"), ("POST", "/renew"), ("GET", "/whoami")]
        while not self._stop.is_set():
            for method, path in kinds:
                after = self.revoked.is_set()
                answer = browser.request(method, path)
                self.answers += 1
                if after and path == "/whoami" and answer.json["user"] is not None:
                    self.late.append(f"{path}: {answer.json}")
                self._after[number] += after

    def all_came_back(self) -> bool:
        return min(self._after) >= 8

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.soak
@pytest.mark.parametrize("kind", [ASGI, GTHREAD], ids=str)
def test_whoever_comes_after_a_revocation_is_nobody(running: Running, kind: Kind) -> None:
    """While all clients hammer, with renewals on their way; none is revived, and nobody else is disturbed."""
    number, rounds = size(64, 12), size(20, 3)
    server = running(kind)
    bob = server.browser()
    bob.post("/login/bob")
    answers = ended = 0
    with contextlib.closing(opened(server)) as store:
        for at in range(rounds):
            user = f"ada{at}"
            browsers = [server.browser() for _ in range(number)]
            for browser in browsers:
                browser.post(f"/login/{user}")
            with Clients(browsers) as clients:
                wait_for(lambda clients=clients: clients.answers > 2 * number, "they ask")  # type: ignore[misc]
                ended += store.sync.revoke_user(user)
                clients.revoked.set()
                wait_for(clients.all_came_back, "they ask again")
            assert clients.late == []
            assert store.sync.sessions(user) == []
            answers += clients.answers
    assert ended == rounds * number
    assert bob.get("/whoami").json["user"] == "bob"
    report(f"revoke_user under load {kind}", clients=number, rounds=rounds, answers=answers, revived=0)


@pytest.mark.soak
def test_of_racing_logins_and_renewals_only_those_outlive_a_revocation_that_came_after_it(place: Path) -> None:
    """Three processes log in and take new ids without pause; each session says when its login was asked for."""
    key, rounds = Key.generate(), size(2_000, 150)

    def store() -> SessionStore:
        return make_store(place, SystemClock(), keys=(key,))

    def log_in(channel: Channel) -> None:
        with store() as ours:
            channel.receive()
            made = 0
            while not select.select([channel._in], [], [], 0)[0]:
                session = ours.session()
                with contextlib.suppress(SessionGone):
                    session["asked"] = ours.clock.boot()
                    session.renew(user_id="ada")
                    session.save()
                    made += 1
                    for _ in range(3):
                        session.renew()
                        session.save()
            channel.send(made)

    ended = survived = 0
    with store() as revoking, contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(log_in)) for _ in range(3)]
        for child in children:
            child.channel.send("go")
        while ended < rounds:
            ended += revoking.sync.revoke_user("ada")
            mark = revoking.memory.users.remembered(encode("ada"))
            assert mark is not None
            for _, record in revoking.memory.users.sessions(encode("ada"), revoking.clock.now()):
                assert decode(record.split()["asked"]) >= mark.boot
                survived += 1
        made = sum(child.ask("enough") for child in children)
        check_tables(revoking.memory, revoking.keyring)
    report("revoke_user racing with logins and renewals", logins=made, ended=ended, later=survived, revived=0)


# ── in every database ─────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def down(kept: Kept) -> Iterator[None]:
    """It cannot be reached; a file is locked."""
    if kept.server is None:
        with contextlib.closing(sqlite3.connect(kept.file, isolation_level=None)) as file:
            file.execute("BEGIN EXCLUSIVE")
            yield
            file.execute("ROLLBACK")
    else:
        kept.server.kill()
        try:
            yield
        finally:
            kept.server.start()


def forget(store: SessionStore, handles: list[bytes]) -> None:
    """They leave memory, as if nobody had come for an hour."""

    def work(txn: Txn, tables: Tables) -> None:
        for handle in handles:
            remove(txn, tables, handle, unpack_header(txn.get(handle, db=tables.records)))  # type: ignore[arg-type]

    store.memory.environment.write(work)


def revoke(server: Server, kept: Kept, user: str) -> int:
    """By a process that dies at once when it is done."""
    return in_child(lambda: opened(server, kept.url).sync.revoke_user(user))


def handles_of(store: SessionStore, user: str) -> list[bytes]:
    return [bytes.fromhex(one.handle) for one in store.sync.sessions(user)]


def who(browser: Browser) -> str | None:
    """Whom the server takes it for; None also when it cannot say."""
    answer = browser.get("/whoami")
    assert answer.status in (200, 503)
    user: str | None = answer.json["user"] if answer.status == 200 else None
    return user


@pytest.mark.soak
def test_a_revocation_reaches_the_database_whenever_that_is_up_again(kept: Kept, serve: Serve) -> None:
    """Whoever flushes is killed, whoever revoked is dead, half of the sessions are in the database only."""
    number = size(100, 8)
    server = serve(ASGI, env={"SHMSESSION_BACKEND": kept.url}, may_fail=True)
    with contextlib.closing(opened(server)) as store:
        browsers = [server.browser() for _ in range(number)]
        for browser in browsers:
            browser.post("/login/ada")
        bob = server.browser()
        bob.post("/login/bob")
        wait_for_empty_outbox(store)
        forget(store, handles_of(store, "ada")[::2])
        with down(kept):
            assert revoke(server, kept, "ada") == number // 2
            assert [who(browser) for browser in browsers] == [None] * number
            with contextlib.suppress(ProcessLookupError):
                os.kill(lease_holder(store), signal.SIGKILL)
        wait_for_empty_outbox(store)
        assert {row.user for row in kept.rows().values()} == {bob_tag(store)}
        assert bob.get("/whoami").json["user"] == "bob"
        wait_for(lambda: all(browser.get("/whoami").status == 200 for browser in browsers), "the server answers")
        assert [who(browser) for browser in browsers] == [None] * number
    report(f"revoke_user {kept.name}, down", sessions=number, revived=0)


def bob_tag(store: SessionStore) -> bytes:
    session = store.session()
    session.renew(user_id="bob")
    assert session.user_tag is not None
    return session.user_tag


@pytest.mark.soak
def test_revocations_end_all_while_flushers_are_killed(kept: Kept, serve: Serve) -> None:
    """Some are in memory, some in the database only, some on their way there."""
    rounds = size(50, 3)
    server = serve(ASGI, env={"SHMSESSION_BACKEND": kept.url}, may_fail=True)
    with contextlib.closing(opened(server)) as store:
        for at in range(rounds):
            browsers = [server.browser() for _ in range(6)]
            for browser in browsers[:4]:
                browser.post(f"/login/ada{at}")
            wait_for_empty_outbox(store)
            forget(store, handles_of(store, f"ada{at}")[::2])
            for browser in browsers[4:]:
                browser.post(f"/login/ada{at}")
            holder = lease_holder(store)
            assert revoke(server, kept, f"ada{at}") == 4
            if holder in server.worker_pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(holder, signal.SIGKILL)
            answers = []
            for browser in browsers:
                with contextlib.suppress(Unanswered):  # the worker has just been killed
                    answers.append(who(browser))
            assert set(answers) <= {None}
        wait_for_empty_outbox(store)
        assert kept.rows() == {}
    report(f"revoke_user {kept.name}, flushers killed", rounds=rounds, revived=0)


# ── only so many ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["end_oldest", "refuse"])
def test_racing_logins_never_make_more_sessions_than_a_user_may_have(place: Path, how: str) -> None:
    """200 logins in 4 processes, while another one looks without pause."""
    key = Key.generate()

    def store() -> SessionStore:
        return make_store(place, SystemClock(), keys=(key,), max_sessions_per_user=5, too_many_sessions=how)

    def log_in(channel: Channel) -> None:
        with store() as ours:
            channel.receive()
            done = 0
            for _ in range(50):
                session = ours.session()
                session.renew(user_id="ada")
                with contextlib.suppress(TooManySessions):
                    session.save()
                    done += 1
            channel.send(done)

    with store() as watching, contextlib.ExitStack() as stack:
        children = [stack.enter_context(Child(log_in)) for _ in range(4)]
        for child in children:
            child.channel.send("go")
        seen, looks, done = 0, 0, 0
        for child in children:
            while not select.select([child.channel._in], [], [], 0)[0]:
                seen, looks = max(seen, len(watching.sync.sessions("ada"))), looks + 1
            done += child.channel.receive()
        assert len(watching.sync.sessions("ada")) == 5
        check_tables(watching.memory, watching.keyring)
    assert seen <= 5
    assert done == (200 if how == "end_oldest" else 5)
    report(f"max_sessions_per_user=5, {how}", logins=200, processes=4, made=done, looks=looks, most=seen)


@pytest.mark.parametrize("how", ["end_oldest", "refuse"])
def test_over_http_a_login_too_many_ends_the_oldest_or_is_refused(serve: Serve, how: str) -> None:
    server = serve(
        ASGI, env={"SHMSESSION_MAX_SESSIONS_PER_USER": "2", "SHMSESSION_TOO_MANY_SESSIONS": how}, may_fail=True
    )
    browsers = [server.browser() for _ in range(3)]
    answers = [browser.post("/login/ada").status for browser in browsers]
    users = [browser.get("/whoami").json["user"] for browser in browsers]
    if how == "refuse":
        assert (answers, users) == ([200, 200, 500], ["ada", "ada", None])
    else:
        assert (answers, users) == ([200] * 3, [None, "ada", "ada"])
