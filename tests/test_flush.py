"""G5 over HTTP: every commit reaches the backend, whoever dies on the way, and comes back when memory is lost."""

import contextlib
import itertools
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import asyncmy
import pytest

from shmsession import SessionStore
from shmsession.backends import Row, State
from shmsession.errors import BackendError
from tests.figures import SOAKING, report, rng, size
from tests.kept import BACKENDS, Kept, Watch, check_equal, lease_holder, wait_for_empty_outbox
from tests.proxy import Proxy
from tests.servers import (
    ASGI,
    GTHREAD,
    KINDS,
    PATIENCE,
    SYNC,
    UVICORN,
    UVICORN_WORKER,
    Browser,
    Kind,
    Serve,
    Server,
    Unanswered,
    wait_for,
)
from tests.visitors import Visit, answers, count, load, visit

pytest_plugins = ["tests.hosts"]

OUTAGES = ["postgres", "redis", *(["mysql", "redis-cluster", "surrealdb"] if SOAKING else [])]
"""They take long, and to the store it is the same which database is silent."""


@pytest.fixture(params=BACKENDS)
def kept(request: pytest.FixtureRequest, place: Path) -> Iterator[Kept]:
    """Name it before `serve`, so that it is there until the server has sent all: stopped later, that waits in vain."""
    with Kept(request.param, place) as kept:
        yield kept


Closing = Callable[[Browser], Browser]


@pytest.fixture
def closing() -> Iterator[Closing]:
    """Browsers given to it are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield stack.enter_context


def serving(serve: Serve, kind: Kind, kept: Kept, **options: Any) -> Server:
    env = {"SHMSESSION_BACKEND": kept.url, **options.pop("env", {})}
    return serve(kind, env=env, **options)


@pytest.mark.soak
def test_every_commit_reaches_the_backend_though_flushers_and_the_database_are_killed(kept: Kept, serve: Serve) -> None:
    brief = kept.name not in ("sqlite", "postgres", "redis")  # under `./dev soak` all are the same
    commits, kills, crashes = size(100_000, 2_000 if brief else 5_000), size(200, 4 if brief else 10), size(50, 3)
    random = rng(f"flush {kept.name}")
    server = serving(serve, ASGI, kept, may_fail=True)
    store = server.store()
    wait_for(lambda: lease_holder(store) in server.worker_pids(), "a worker flushes")
    done = {"flushers": 0, "crashes": 0}
    with Watch(kept) as watch, load(server) as clients:
        while answers(clients) < commits or done["flushers"] < kills or (kept.server and done["crashes"] < crashes):
            goal = answers(clients) + random.randrange(1, max(2, 2 * commits // (kills + crashes)))
            wait_for(lambda goal=goal: answers(clients) >= goal, "the server answers")  # type: ignore[misc]
            if kept.server is not None and done["crashes"] * kills < done["flushers"] * crashes:
                kept.server.restart()
                done["crashes"] += 1
            elif done["flushers"] < kills:
                wait_for(lambda: lease_holder(store) in server.worker_pids(), "somebody takes over the lease")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(lease_holder(store), signal.SIGKILL)
                done["flushers"] += 1
        committed = answers(clients)
    sessions = check_equal(store, kept)
    assert watch.backwards == []
    assert watch.looks > 0
    totals = store.stats().counters
    report(
        f"G5 {kept.name}", commits=committed, **done, sessions=sessions, rows=totals["rows"],
        errors=totals["flush_errors"], watched=len(watch.seen), lost=0, backwards=0,
    )  # fmt: skip


def test_a_step_back_is_seen_by_whoever_watches(kept: Kept) -> None:
    """Also from the first row on: the tables need not be there yet."""
    with Watch(kept) as watch:
        watch._note(Row(bytes(19) + b"1", State.LIVE, 1, 2, 0))
        watch._note(Row(bytes(19) + b"1", State.LIVE, 1, 1, 0))
        wait_for(lambda: watch.looks > 0, "it looks")
        if kept.name == "sqlite":
            row = Row(bytes(19) + b"2", State.LIVE, 1, 2, 2**40)
            kept.ask(lambda backend: backend.write([row]))
            with contextlib.closing(sqlite3.connect(kept.file)) as file:
                file.execute("UPDATE shmsession SET version = 3")
                with pytest.raises(sqlite3.IntegrityError, match="went back"):
                    file.execute("UPDATE shmsession SET version = 1")
        elif kept.name == "mysql":
            row = Row(bytes(19) + b"2", State.LIVE, 1, 2, 2**40)
            kept.ask(lambda backend: backend.write([row]))
            kept.server.run("UPDATE shmsession SET version = 3", kept.database)
            with pytest.raises(asyncmy.errors.OperationalError, match="went back"):
                kept.server.run("UPDATE shmsession SET version = 1", kept.database)
    assert len(watch.backwards) == 1


@pytest.mark.soak
def test_a_database_that_forgets_everything_is_recognised_and_filled_again(kept: Kept, serve: Serve) -> None:
    """Its rows, or its tables too, all of them or one: they are made anew."""
    times = size(20, 3)
    server = serving(serve, ASGI, kept)
    store = server.store()
    for number in range(30):
        server.browser().post(f"/login/u{number}")
    wait_for_empty_outbox(store)

    def is_filled() -> bool:
        with contextlib.suppress(BackendError):  # it has no tables yet
            count: int = kept.ask(lambda backend: backend.count())
            return count >= 30
        return False

    with load(server) as clients:
        for number in range(times):
            kept.forget(number)
            goal = answers(clients) + 300
            wait_for(lambda goal=goal: answers(clients) >= goal, "the server answers")  # type: ignore[misc]
            wait_for(is_filled, "the sessions that nobody visits are there again")
    sessions = check_equal(store, kept)
    assert sessions >= 30
    report(f"amnesia {kept.name}", times=times, commits=answers(clients), sessions=sessions, lost=0)


@pytest.mark.soak
@pytest.mark.parametrize("kept", [name for name in BACKENDS if name != "sqlite"], indirect=True)
def test_requests_and_replies_that_are_lost_on_the_way_lose_double_and_revive_nothing(
    kept: Kept, serve: Serve, place: Path
) -> None:
    """Commit-unknown: the flusher cannot tell what of a batch was stored; nor is it to matter. A file is never far."""
    commits = size(20_000, 2_000)
    (place / "proxy").mkdir()
    url, targets = kept.detour(place / "proxy")
    with Proxy(targets, rng(f"proxy {kept.name}")) as proxy:
        server = serve(ASGI, env={"SHMSESSION_BACKEND": url, "SHMSESSION_FLUSH_INTERVAL": "0.1"})
        store = server.store()
        wait_for(lambda: store.stats().counters["rows"] or server.browser().post("/create"), "a worker flushes")
        with Watch(kept) as watch, load(server) as clients:
            # What always fails is tried ever more seldom; and MySQL is asked several things for one batch.
            proxy.harm = 0.03 if kept.name == "mysql" else 0.1
            while (
                answers(clients) < commits
                or sum(proxy.done.values()) < size(200, 20)
                or 0 in proxy.done.values()
                or not store.stats().counters["flush_errors"]  # a cluster's proxies hear those who watch, too
            ):
                seen = answers(clients), sum(proxy.done.values())
                wait_for(
                    lambda seen=seen: answers(clients) > seen[0] and sum(proxy.done.values()) > seen[1],  # type: ignore[misc]
                    "it gets worse",
                )
            proxy.harm = 0.0
        sessions = check_equal(store, kept)
    assert watch.backwards == []
    assert watch.looks > 0
    assert all(proxy.done.values()), "a kind of harm that never came shows nothing"
    report(
        f"commit-unknown {kept.name}", commits=answers(clients), sessions=sessions,
        errors=store.stats().counters["flush_errors"], **proxy.done, lost=0, backwards=0,
    )  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("kept", OUTAGES, indirect=True)
def test_an_outage_of_the_database_is_not_noticed_by_those_whose_sessions_are_in_memory(
    kept: Kept, serve: Serve, closing: Closing
) -> None:
    """Every request of every visitor is counted, whichever way it went; the slowest are those that wait for a death."""
    seconds = size(60, 5)
    server = serving(serve, ASGI, kept)
    store = server.store()
    browser = closing(server.browser(keep_alive=True))
    visits: list[Visit] = []
    visit(visits, browser, "POST", "/create")
    wait_for(lambda: lease_holder(store) in server.worker_pids(), "a worker flushes")
    wait_for_empty_outbox(store)
    with load(server) as clients:
        for _ in range(200):
            visit(visits, browser, "GET", "/hit")
        wait_for(lambda: answers(clients) >= 1_000, "the server answers all of them")
        down = time.monotonic()
        kept.server.kill()
        guests = 0
        while time.monotonic() < down + seconds:
            visit(visits, browser, "GET", "/hit")
            if guests < 20:
                guest = server.browser()
                visit(visits, guest, "POST", "/login/ada")
                assert visit(visits, guest, "GET", "/whoami").json["user"] == "ada"
                guests += 1
        waiting = store.stats()
        kept.server.start()
        up = time.monotonic()
        drain = Drain(store)
        for number in itertools.count():
            visit(visits, browser, "GET", "/hit")
            if drain.is_over() and number >= 200:
                break
            assert time.monotonic() < up + PATIENCE, "what had waited is not sent"
    sessions = check_equal(store, kept)
    assert waiting.outbox > guests
    assert waiting.flush_lag >= seconds / 2
    visits += [seen for client in clients for seen in client.visits]
    counts = {
        "before": count(seen for seen in visits if seen.begin < down),
        "during": count(seen for seen in visits if down <= seen.begin < up),
        "after": count(seen for seen in visits if up <= seen.begin),
    }
    for when, counted in counts.items():
        assert counted.ok >= 200, f"nobody came {when} the outage"
        assert (counted.failed, counted.unanswered) == (0, 0), f"{when} the outage"
    report(
        f"outage {kept.name}", seconds=seconds, sessions=sessions, waiting=waiting.outbox,
        lag_s=round(waiting.flush_lag, 1), **drain.figures(),
        **{f"{when}_{name}": value for when, counted in counts.items() for name, value in counted._asdict().items()},
    )  # fmt: skip


class Drain:
    """How fast what waits is sent, from the moment at which the first of it is."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._back = self._begin = time.monotonic()
        self._sent = store.stats().counters["rows"]
        self._rows = 0
        self._over = 0.0

    def is_over(self) -> bool:
        """Whether nothing waits any more that waited at the beginning; others may wait since. Ask again and again."""
        if self._over:
            return True
        now, stats = time.monotonic(), self._store.stats()
        self._rows = stats.counters["rows"] - self._sent
        if not self._rows:
            self._back = now
        if self._rows and stats.flush_lag < now - self._begin:
            self._over = now
        return bool(self._over)

    def figures(self) -> dict[str, float]:
        """Seconds until the first rows, and rows a second from then on."""
        return {
            "back_s": round(self._back - self._begin, 2),
            "drained_rows": self._rows,
            "drain_rows_per_s": round(self._rows / max(self._over - self._back, 0.001)),
        }


@pytest.mark.parametrize(
    ("kept", "kind"),
    [
        (name, kind)
        for name in BACKENDS
        for kind in KINDS
        if SOAKING or name == "sqlite" or kind is ASGI or (kind is SYNC and name in ("postgres", "redis"))
    ],
    indirect=["kept"],
    ids=str,
)
def test_when_memory_is_lost_every_session_comes_back_from_the_backend(kept: Kept, serve: Serve, kind: Kind) -> None:
    server = serving(serve, kind, kept)
    users = {name: server.browser() for name in ("ada", "grace", "edsger", "barbara")}
    for name, browser in users.items():
        browser.post(f"/login/{name}")
        for _ in range(3):
            browser.get("/hit")
        browser.post(f"/cart/{name}s-item")
    gone = server.browser()
    gone.post("/login/gone")
    ended = dict(gone.cookies)
    gone.post("/logout")
    store = server.store()
    wait_for_empty_outbox(store)
    store.close()
    server.stop()
    shutil.rmtree(server.place / "sessions")
    server.start()
    for name, browser in users.items():
        assert browser.get("/whoami").json["user"] == name
        assert browser.get("/session").json == {"user": name, "hits": 3, "cart": [f"{name}s-item"]}
        assert browser.get("/hit").json["hits"] == 4
    assert server.browser(ended).get("/session").json == {}
    assert server.store().stats().counters["misses"] >= len(users)


def test_with_a_file_of_sqlite_the_generated_key_stays_beside_it(serve: Serve, place: Path) -> None:
    """Memory and the server's home directory may go: cookies are opened again, and nobody is logged out."""
    with Kept("sqlite", place) as kept:
        server = serving(serve, ASGI, kept, env={"SHMSESSION_KEY": ""})
        browser = server.browser()
        browser.post("/login/ada")
        wait_for(lambda: any(row.user for row in kept.rows().values()), "the login is in the file")
        server.stop()
        shutil.rmtree(server.place / "sessions")
        shutil.rmtree(server.place / "state", ignore_errors=True)
        server.start()
        assert browser.get("/whoami").json["user"] == "ada"


@pytest.mark.parametrize("kept", OUTAGES, indirect=True)
def test_while_the_database_is_down_a_session_that_only_it_has_is_a_503_and_never_an_empty_one(
    kept: Kept, serve: Serve
) -> None:
    server = serving(serve, ASGI, kept)
    browser = server.browser()
    browser.post("/login/ada")
    store = server.store()
    wait_for_empty_outbox(store)
    store.close()
    server.stop()
    shutil.rmtree(server.place / "sessions")
    kept.server.kill()
    server.start()
    for path in ("/whoami", "/session", "/hit"):
        answer = browser.get(path)
        assert (answer.status, answer.header("retry-after")) == (503, "5")
        assert answer.all("set-cookie") == []
    assert browser.get("/ping").status == 200
    newcomer = server.browser()
    assert newcomer.get("/hit").json["hits"] == 1
    kept.server.start()

    def back() -> bool:
        with contextlib.suppress(Unanswered):
            return browser.get("/whoami").status == 200
        return False

    wait_for(back, "the session is back")
    assert browser.get("/whoami").json["user"] == "ada"
    assert newcomer.get("/hit").json["hits"] == 2


@pytest.mark.parametrize("kind", [SYNC, GTHREAD, UVICORN_WORKER, UVICORN], ids=str)
def test_a_server_that_ends_in_good_order_leaves_nothing_waiting(serve: Serve, place: Path, kind: Kind) -> None:
    """WSGI on gunicorn: the arbiter does it, where SHMSESSION_STORE tells it the store."""
    with Kept("sqlite", place) as kept:
        server = serving(serve, kind, kept, env={"SHMSESSION_STORE": f"examples.{kind.protocol}_app:store"})
        browsers = [server.browser() for _ in range(20)]
        for browser in browsers:
            browser.get("/hit")
        server.stop()
        assert len(kept.rows()) == len(browsers)
        assert server.store().stats().outbox == 0
