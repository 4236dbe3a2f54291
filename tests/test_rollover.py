"""USR2 with new Keys and a database behind: two generations of servers side by side, and then the new one alone."""

import contextlib
import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from shmsession import Key
from shmsession.testing import ManualClock, login_cookie, make_store
from tests.kept import Kept, check_equal, wait_for_empty_outbox
from tests.servers import ASGI, GTHREAD, Answer, Browser, Kind, Serve, Server, alive, children, stop, wait_for

pytest_plugins = ["tests.hosts"]

A, B = Key.generate(), Key.generate()
READY = "session store 'suite' in "
"""What each worker logs when it has read its Keys."""


@dataclass
class Generation:
    """One arbiter and its workers, and a connection of each worker's own for every visitor."""

    server: Server
    master: int
    workers: list[int]

    def ask(self, cookies: dict[str, str], method: str, path: str) -> Answer:
        """What this generation answers to somebody with these cookies, which it may change."""
        with self._desk() as desk:
            desk.cookies = cookies
            return desk.request(method, path)

    @contextlib.contextmanager
    def _desk(self) -> Iterator[Browser]:
        """A connection to it. The others are stopped only while it is made: no write of ours could wait for theirs."""
        others = [pid for pid in everybody(self.server) if pid not in self.workers]
        with self.server.browser(keep_alive=True) as browser:
            for pid in others:
                stop(pid)
            try:
                assert browser.get("/ping").pid in self.workers
            finally:
                for pid in others:
                    os.kill(pid, signal.SIGCONT)
            yield browser


def everybody(server: Server) -> list[int]:
    """The workers of both generations."""
    old = server.worker_pids()
    return [pid for pid in old if not children(pid)] + [pid for master in old for pid in children(master)]


def generations(server: Server, place: Path) -> tuple[Generation, Generation]:
    """The old one, and after USR2 the new one, which has the Keys A and B."""
    write_keys(place / "keys", [A, B])
    workers = server.worker_pids()
    server.tell(signal.SIGUSR2)
    wait_for(lambda: any(len(children(pid)) == server.workers for pid in children(server.pid)), "a second generation")
    wait_for(lambda: server.text.count(READY) == 2 * server.workers, "all of its workers serve")
    (master,) = (pid for pid in children(server.pid) if pid not in workers)
    return Generation(server, server.pid, workers), Generation(server, master, children(master))


def write_keys(file: Path, keys: Sequence[Key]) -> None:
    """The file that the next generation reads."""
    file.write_text("\n".join(map(str, keys)) + "\n")
    file.chmod(0o600)


@pytest.fixture
def kept(place: Path) -> Iterator[Kept]:
    with Kept("sqlite", place) as kept:
        yield kept


def started(serve: Serve, place: Path, kind: Kind, kept: Kept, keys: Sequence[Key]) -> Server:
    write_keys(place / "keys", keys)
    env = {"SHMSESSION_BACKEND": kept.url, "SHMSESSION_KEY": "", "SHMSESSION_KEY_FILE": str(place / "keys")}
    server = serve(kind, workers=2, env=env)
    wait_for(lambda: server.text.count(READY) == server.workers, "all workers have read their Keys")
    return server


def log_in(generation: Generation, user: str) -> dict[str, str]:
    """The cookies of somebody who has logged in there."""
    cookies: dict[str, str] = {}
    assert generation.ask(cookies, "POST", f"/login/{user}").status == 200
    return cookies


def who(generation: Generation, cookies: Mapping[str, str]) -> tuple[int, str | None]:
    """Status, and who somebody is to this generation; the cookies stay as they are."""
    answer = generation.ask(dict(cookies), "GET", "/whoami")
    assert answer.status != 200 or set(answer.json) == {"user", "pid"}
    return answer.status, answer.json["user"] if answer.status == 200 else None


def end(server: Server, old: Generation) -> None:
    assert server.stop(signal.SIGTERM) == 0
    wait_for(lambda: not any(map(alive, old.workers)), "the old generation ends")


def end_of_the_new(new: Generation) -> None:
    os.kill(new.master, signal.SIGTERM)
    wait_for(lambda: not any(map(alive, [new.master, *new.workers])), "the new generation ends")


@pytest.mark.parametrize("kind", [ASGI, GTHREAD], ids=str)
def test_with_the_documented_steps_every_session_is_served_by_both_generations_and_survives_the_old_one(
    kept: Kept, serve: Serve, place: Path, kind: Kind
) -> None:
    """The old generation has been told of the new Key already: B opens, A seals. The new one seals by B."""
    server = started(serve, place, kind, kept, [B, A])
    early = server.browser()
    early.post("/login/early")
    old, new = generations(server, place)
    of_old, of_new = log_in(old, "old"), log_in(new, "new")
    visitors = {"early": early.cookies, "old": of_old, "new": of_new}
    hits = dict.fromkeys(visitors, 0)
    for generation in (old, new, old, new):
        for name, cookies in visitors.items():
            hits[name] += 1
            assert generation.ask(cookies, "GET", "/hit").json["hits"] == hits[name]
            assert who(generation, cookies) == (200, name)
    store = server.store(keys=(A, B))
    assert check_equal(store, kept) == len(visitors)
    end(server, old)
    for name, cookies in visitors.items():
        assert new.ask(cookies, "GET", "/session").json == {"user": name, "hits": hits[name]}
    end_of_the_new(new)
    check_after_a_loss_of_memory(server, kept, visitors)


@pytest.mark.parametrize("kind", [ASGI, GTHREAD], ids=str)
def test_a_new_key_that_the_old_generation_was_not_told_of_costs_nobody_a_session(
    kept: Kept, serve: Serve, place: Path, kind: Kind
) -> None:
    """Step 1 of the documentation was left out. To the old generation a cookie under the new Key is no session, and a
    session that the new one has written a 503; neither is a loss, and all is well when the old generation has ended."""
    server = started(serve, place, kind, kept, [A])
    early = server.browser()
    early.post("/login/early")
    old, new = generations(server, place)
    of_old, of_new = log_in(old, "old"), log_in(new, "new")
    shared = log_in(old, "shared")
    for generation in (old, new):
        for name, cookies in (("early", early.cookies), ("old", of_old)):
            assert who(generation, cookies) == (200, name), "what the old one has written, both read"
    assert who(new, of_new) == (200, "new")
    assert who(old, of_new) == (200, None), "its cookie is not known there"
    assert who(new, of_new) == (200, "new"), "and looking at it there has harmed nothing"

    before = dict(shared)
    assert new.ask(shared, "POST", "/set/k/v").status == 200
    assert shared != before, "its cookie is sealed by the new Key from now on"
    assert who(old, before) == (503, None), "the record is under the new Key"
    assert who(old, shared) == (200, None)
    assert who(new, before) == who(new, shared) == (200, "shared")

    visitors = {"early": early.cookies, "old": of_old, "new": of_new, "shared": shared}
    end(server, old)
    store = server.store(keys=(A, B))
    assert check_equal(store, kept) == len(visitors)
    for name, cookies in visitors.items():
        assert who(new, cookies) == (200, name)
    end_of_the_new(new)
    check_after_a_loss_of_memory(server, kept, visitors)


def test_what_the_new_generation_commits_reaches_the_database_while_the_old_one_lives(
    kept: Kept, serve: Serve, place: Path
) -> None:
    """The flusher may well be a worker of the old generation, which cannot read what is under the new Key."""
    server = started(serve, place, ASGI, kept, [A])
    old, new = generations(server, place)
    log_in(new, "new")
    log_in(old, "old")
    store = server.store(keys=(A, B))
    wait_for_empty_outbox(store)
    assert check_equal(store, kept) == 2
    end(server, old)
    end_of_the_new(new)


def check_after_a_loss_of_memory(server: Server, kept: Kept, visitors: Mapping[str, Mapping[str, str]]) -> None:
    """All of it is in the database, whichever generation committed it: the third generation reads it there."""
    store = server.store(keys=(A, B))
    wait_for_empty_outbox(store)
    assert len(kept.rows()) == len(visitors)
    store.close()
    shutil.rmtree(server.place / "sessions")
    server.start()
    for name, cookies in visitors.items():
        assert server.browser(cookies).get("/whoami").json["user"] == name


@pytest.mark.parametrize("how", ["assigns", "increments", "applies", "looks"])
def test_a_cookie_under_the_old_key_is_sealed_anew_by_a_request_that(place: Path, how: str) -> None:
    """Else the old Key could never be removed: a page that only counts its visits would be visited with it for ever."""
    clock = ManualClock()
    before = make_store(place / "sessions", clock, keys=(A,))
    cookie = login_cookie(before, {"n": 0}, user_id="ada")
    after = make_store(place / "sessions", clock, keys=(A, B))
    header = "; ".join(f"{name}={value}" for name, value in cookie.items()).encode()
    for _ in range(3):
        clock.advance(minutes=2)  # a touch is due
        session = after.request_session(lambda: header)
        match how:
            case "assigns":
                session["n"] = session["n"] + 1
            case "increments":
                session.increment("n")
            case "applies":
                session.apply("n", lambda n: n + 1)
            case _:
                assert session["n"] == 0
        outcome = after.commit(session)
        assert outcome.set_cookie is not None
    before.close()
    after.close()
