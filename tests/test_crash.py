"""G4 over HTTP: whichever processes die, at whatever instant, no acknowledged write is lost or torn."""

import contextlib
import os
import signal

import pytest

from shmsession.record import Record
from tests.figures import SOAKING, report, rng, size
from tests.servers import ASGI, GTHREAD, KINDS, SYNC, UVICORN, Kind, Serve, Server, wait_for
from tests.visitors import CLIENTS, answers, load

pytest_plugins = ["tests.hosts"]

VICTIMS = [(kind, False) for kind in KINDS] if SOAKING else [(ASGI, True)]


def check_store(server: Server) -> int:
    """Every record is whole and no reader slot is held by the dead; returns how many records there are."""
    store = server.store()
    handles = store.memory.environment.read(lambda txn, tables: [bytes(key) for key, _ in txn.cursor(tables.records)])
    now = store.clock.now()
    found = [store.memory.load(handle, now) for handle in handles]
    assert store.hooks.counts == {}
    assert sum(isinstance(record, Record) for record in found) > CLIENTS
    browser = server.browser()
    browser.post("/create")
    wait_for(
        lambda: browser.get("/visit").status == 200 and store.stats().readers == 0, "dead readers' slots are freed"
    )
    return len(handles)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "preload"), VICTIMS, ids=[f"{kind}{'-preload' * preload}" for kind, preload in VICTIMS]
)
def test_a_worker_killed_at_any_instant_takes_no_acknowledged_write_with_it(
    serve: Serve, kind: Kind, preload: bool
) -> None:
    kills, random = size(1_000, 100), rng(f"kills {kind}")
    server = serve(kind, preload=preload)
    with load(server) as clients:
        for number in range(kills):
            goal = answers(clients) + random.randrange(1, 25)
            wait_for(lambda goal=goal: answers(clients) >= goal, "the server answers between two kills")  # type: ignore[misc]
            if number % 2:
                clients[0].orders.append(number)
                wait_for(lambda: not clients[0].orders, "a client kills the worker that answered it")
            else:
                wait_for(server.worker_pids, "there is a worker to kill")
                with contextlib.suppress(ProcessLookupError, IndexError):
                    os.kill(random.choice(server.worker_pids()), signal.SIGKILL)
        done = answers(clients)
    records = check_store(server)
    unanswered = sum(sum(c.sent.get(k, 0) - c.acknowledged.get(k, 0) for k in ("own", "shared")) for c in clients)
    report(
        f"G4 {kind}{' preload' * preload}", kills=kills, acknowledged=done, unanswered=unanswered, records=records,
        lost=0, leaked_readers=0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [SYNC, GTHREAD, ASGI, UVICORN], ids=str)
def test_sessions_survive_kill_9_of_all_processes_and_a_new_start(serve: Serve, kind: Kind) -> None:
    server = serve(kind)
    with load(server) as clients:
        wait_for(lambda: answers(clients) > 100, "some answers")
        os.killpg(server.pid, signal.SIGKILL)
        server.reap()
        server.start()
        before = answers(clients)
        wait_for(lambda: answers(clients) > before + 100, "some answers of the second start")
    check_store(server)


@pytest.mark.parametrize("kind", [SYNC, ASGI], ids=str)
def test_an_arbiter_killed_and_started_again_finds_the_sessions_its_orphans_still_serve(
    serve: Serve, kind: Kind
) -> None:
    server = serve(kind, flags=("--timeout", "2"))
    browser = server.browser()
    browser.post("/login/ada")
    orphans = server.worker_pids()
    with load(server) as clients:
        server.kill_master()
        server.start()
        before = answers(clients)
        wait_for(lambda: answers(clients) > before + 50, "answers of the second generation")
        assert browser.get("/whoami").json["user"] == "ada"
    assert not set(orphans) & set(server.worker_pids())
    assert browser.get("/whoami").json["user"] == "ada"
    check_store(server)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_after_a_full_stop_and_start_users_are_still_logged_in_and_logouts_still_hold(serve: Serve, kind: Kind) -> None:
    server = serve(kind)
    here, gone = server.browser(), server.browser()
    here.post("/login/ada")
    here.get("/hit")
    gone.post("/login/grace")
    ended = dict(gone.cookies)
    gone.post("/logout")
    server.stop()
    server.start()
    assert here.get("/session").json == {"user": "ada", "hits": 1}
    assert here.get("/hit").json["hits"] == 2
    assert server.browser(ended).get("/session").json == {}
