"""G4 over HTTP: whichever processes die, at whatever instant, no acknowledged write is lost or torn."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from shmsession.record import Record
from tests.figures import SOAKING, report, rng, size
from tests.servers import ASGI, GTHREAD, KINDS, SYNC, UVICORN, Browser, Kind, Serve, Server, Unanswered, wait_for

pytest_plugins = ["tests.hosts"]

CLIENTS = 8
KEYS = 8

VICTIMS = [(kind, False) for kind in KINDS] if SOAKING else [(ASGI, True)]


@dataclass
class Client:
    """One visitor who keeps account of what was acknowledged and of what was only sent.

    An order tells it to kill the worker that gave the next answer as soon as that has come: what it said must be done.
    """

    browser: Browser
    shared: Browser
    answers: int = 0
    sent: dict[str, int] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    items: list[str] = field(default_factory=list)
    unsure: set[str] = field(default_factory=set)
    ended: list[dict[str, str]] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    orders: list[object] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            self.count(self.browser, "own")
            self.count(self.shared, "shared")
            self.assign(number)
            if number <= 400:
                self.append(number)
            if number % 5 == 0:
                self.log_out()

    def request(self, browser: Browser, method: str, path: str) -> bool:
        """Whether it was acknowledged."""
        with contextlib.suppress(Unanswered):
            answer = browser.request(method, path)
            if answer.status == 200:
                self.answers += 1
                with contextlib.suppress(IndexError, ProcessLookupError):
                    self.orders.pop()
                    os.kill(answer.pid, signal.SIGKILL)
                return True
            self.trouble.append(f"{path}: {answer.status} {answer.body[:80]!r}")
        return False

    def count(self, browser: Browser, what: str) -> None:
        self.sent[what] = self.sent.get(what, 0) + 1
        self.acknowledged[what] = self.acknowledged.get(what, 0) + self.request(browser, "GET", "/hit")

    def assign(self, number: int) -> None:
        key = f"k{number % KEYS}"
        self.sent[key] = number
        if self.request(self.browser, "POST", f"/set/{key}/{number}"):
            self.acknowledged[key] = number

    def append(self, number: int) -> None:
        item = f"i{number}"
        if self.request(self.browser, "POST", f"/append/{item}"):
            self.items.append(item)
        else:
            self.unsure.add(item)

    def log_out(self) -> None:
        """Log somebody in and out; an acknowledged logout is for ever."""
        guest = Browser(self.browser.address)
        if self.request(guest, "POST", "/login/guest"):
            cookies = dict(guest.cookies)
            if self.request(guest, "POST", "/logout"):
                self.ended.append(cookies)

    def check(self) -> None:
        """Compare what is stored with the account."""
        assert self.trouble == []
        stored = self.browser.get("/session").json
        assert self.acknowledged["own"] <= stored["hits"] <= self.sent["own"]
        for number in range(KEYS):
            key = f"k{number}"
            if key in self.acknowledged:
                assert self.acknowledged[key] <= int(stored[key]) <= self.sent[key]
        cart = stored.get("cart", [])
        assert [item for item in cart if item not in self.unsure] == self.items
        assert len(set(cart)) == len(cart)
        for cookies in self.ended:
            assert Browser(self.browser.address, cookies).get("/whoami").json["user"] is None


@contextlib.contextmanager
def load(server: Server) -> Iterator[list[Client]]:
    """Eight clients at work, each on a session of its own and on one of all; checked at the end."""
    shared = server.browser()
    shared.post("/create")
    orders: list[object] = []
    clients = [Client(server.browser(), server.browser(shared.cookies), orders=orders) for _ in range(CLIENTS)]
    for client in clients:
        client.browser.post("/create")
    stop = threading.Event()
    threads = [threading.Thread(target=client.run, args=(stop,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield clients
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for client in clients:
        client.check()
    hits = shared.get("/session").json["hits"]
    acknowledged, sent = (sum(account[what] for account in accounts) for what, accounts in (
        ("shared", [client.acknowledged for client in clients]), ("shared", [client.sent for client in clients])
    ))  # fmt: skip
    assert acknowledged <= hits <= sent


def answers(clients: list[Client]) -> int:
    return sum(client.answers for client in clients)


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
    assert store.memory.environment.check_readers() == 0
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
