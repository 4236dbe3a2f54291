"""G5 over HTTP: every commit reaches the backend, whoever dies on the way, and comes back when memory is lost."""

import contextlib
import os
import shutil
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.figures import SOAKING, report, rng, size
from tests.kept import BACKENDS, Kept, Watch, check_equal, lease_holder, wait_for_empty_outbox
from tests.proxy import Proxy
from tests.servers import (
    ASGI,
    GTHREAD,
    KINDS,
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
from tests.visitors import answers, load

pytest_plugins = ["tests.hosts"]


@pytest.fixture(params=BACKENDS)
def kept(request: pytest.FixtureRequest, place: Path) -> Iterator[Kept]:
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
def test_every_commit_reaches_the_backend_though_flushers_and_the_database_are_killed(serve: Serve, kept: Kept) -> None:
    commits, kills, crashes = size(100_000, 5_000), size(200, 10), size(50, 3)
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


@pytest.mark.soak
@pytest.mark.parametrize("kept", ["redis"], indirect=True)
def test_a_redis_that_forgets_everything_is_recognised_and_filled_again(serve: Serve, kept: Kept) -> None:
    times = size(20, 2)
    server = serving(serve, ASGI, kept)
    store = server.store()
    for number in range(30):
        server.browser().post(f"/login/u{number}")
    wait_for_empty_outbox(store)
    with load(server) as clients:
        for _ in range(times):
            kept.server.forget()
            goal = answers(clients) + 300
            wait_for(lambda goal=goal: answers(clients) >= goal, "the server answers")  # type: ignore[misc]
            wait_for(lambda: len(kept.rows()) >= 30, "the sessions that nobody visits are there again")
    sessions = check_equal(store, kept)
    assert sessions >= 30
    report("a Redis that forgets", times=times, commits=answers(clients), sessions=sessions, lost=0)


@pytest.mark.soak
@pytest.mark.parametrize("kept", ["postgres", "redis"], indirect=True)
def test_requests_and_replies_that_are_lost_on_the_way_lose_double_and_revive_nothing(
    serve: Serve, kept: Kept, place: Path
) -> None:
    """Commit-unknown: the flusher cannot tell what of a batch was stored; nor is it to matter."""
    commits = size(20_000, 2_000)
    (place / "proxy").mkdir()
    if kept.name == "redis":
        socket, target, url = place / "proxy" / "redis", kept.server.socket, f"unix://{place}/proxy/redis?db=0"
    else:
        socket, target = place / "proxy" / ".s.PGSQL.5432", f"{kept.server.place}/.s.PGSQL.5432"
        url = kept.url.replace(str(kept.server.place), str(place / "proxy"))
    with Proxy(socket, target, rng(f"proxy {kept.name}")) as proxy:
        server = serve(ASGI, env={"SHMSESSION_BACKEND": url})
        store = server.store()
        wait_for(lambda: store.stats().counters["rows"] or server.browser().post("/create"), "a worker flushes")
        with Watch(kept) as watch, load(server) as clients:
            proxy.harm = 0.2
            wait_for(
                lambda: answers(clients) >= commits and sum(proxy.done.values()) >= size(200, 20), "it was bad enough"
            )
            proxy.harm = 0.0
        sessions = check_equal(store, kept)
    assert watch.backwards == []
    report(
        f"commit-unknown {kept.name}", commits=answers(clients), sessions=sessions,
        errors=store.stats().counters["flush_errors"], **proxy.done, lost=0, backwards=0,
    )  # fmt: skip


@pytest.mark.soak
@pytest.mark.parametrize("kept", ["postgres", "redis"], indirect=True)
def test_an_outage_of_the_database_is_not_noticed_by_those_whose_sessions_are_in_memory(
    serve: Serve, kept: Kept, closing: Closing
) -> None:
    seconds = size(60, 5)
    server = serving(serve, ASGI, kept)
    store = server.store()
    browser = closing(server.browser(keep_alive=True))
    browser.post("/create")
    wait_for(lambda: lease_holder(store) in server.worker_pids(), "a worker flushes")
    wait_for_empty_outbox(store)
    took: dict[str, list[float]] = {"before": [], "during": [], "after": []}

    def visit(when: str) -> None:
        begin = time.perf_counter()
        assert browser.get("/hit").status == 200
        took[when].append(time.perf_counter() - begin)

    for _ in range(200):
        visit("before")
    guests: list[Browser] = []
    with load(server) as clients:
        kept.server.kill()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            visit("during")
            if len(guests) < 20:
                guest = server.browser()
                assert guest.post("/login/ada").status == 200
                assert guest.get("/whoami").json["user"] == "ada"
                guests.append(guest)
        before = answers(clients)
        waiting = store.stats()
        assert waiting.outbox > 0
        kept.server.start()
        begin = time.monotonic()
        for _ in range(200):
            visit("after")
    assert before > 0
    wait_for_empty_outbox(store)
    drained = time.monotonic() - begin
    sessions = check_equal(store, kept)
    assert waiting.flush_lag >= seconds / 2
    report(
        f"outage {kept.name}", seconds=seconds, failed=0, requests=sum(map(len, took.values())), sessions=sessions,
        waiting=waiting.outbox, lag_s=round(waiting.flush_lag, 1), drained_s=round(drained, 2),
        **{f"{when}_ms": round(statistics.median(times) * 1e3, 2) for when, times in took.items()},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "kind"),
    [(name, kind) for name in BACKENDS for kind in KINDS if SOAKING or name == "sqlite" or kind in (SYNC, ASGI)],
    indirect=["kept"],
    ids=str,
)
def test_when_memory_is_lost_every_session_comes_back_from_the_backend(serve: Serve, kept: Kept, kind: Kind) -> None:
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


@pytest.mark.parametrize("kept", ["postgres", "redis"], indirect=True)
def test_while_the_database_is_down_a_session_that_only_it_has_is_a_503_and_never_an_empty_one(
    serve: Serve, kept: Kept
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
