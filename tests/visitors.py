"""Visitors of the examples who keep account of what they were told, and check it in the end."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.figures import BREATH
from tests.servers import Answer, Browser, Server, Unanswered, wait_for

CLIENTS = 8
KEYS = 8


class Visit(NamedTuple):
    """One request: when it was sent, how long it took, and the status of its answer; None: there was no answer."""

    begin: float
    seconds: float
    status: int | None


def visit(visits: list[Visit], browser: Browser, method: str, path: str) -> Answer:
    """Ask, and write down how it went. Raises Unanswered."""
    begin, status = time.monotonic(), None
    try:
        answer = browser.request(method, path)
        status = answer.status
        return answer
    finally:
        visits.append(Visit(begin, time.monotonic() - begin, status))


class Count(NamedTuple):
    """How many requests were answered 200, otherwise, and not at all; and how long they took, in milliseconds."""

    ok: int
    failed: int
    unanswered: int
    p50: float
    p99: float


def count(visits: Iterable[Visit]) -> Count:
    """Of at least one."""
    visits = list(visits)
    statuses = [seen.status for seen in visits]
    ok, unanswered = statuses.count(200), statuses.count(None)
    took = sorted(seen.seconds * 1e3 for seen in visits)
    at = [took[min(len(took) - 1, len(took) * percent // 100)] for percent in (50, 99)]
    return Count(ok, len(visits) - ok - unanswered, unanswered, round(at[0], 2), round(at[1], 2))


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
    visits: list[Visit] = field(default_factory=list)

    def run(self, stop: threading.Event) -> None:
        number = 0
        while not stop.wait(BREATH):
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
            answer = visit(self.visits, browser, method, path)
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
            assert user_of(Browser(self.browser.address, cookies)) is None


def user_of(browser: Browser) -> object:
    """Who the server says it is; asked again while it cannot tell, as memory has forgotten and the backend is away."""
    answers: list[Answer] = []

    def is_told() -> bool:
        answers.append(browser.get("/whoami"))
        return answers[-1].status != 503

    wait_for(is_told, "the server can tell who somebody is")
    return answers[-1].json["user"]


@contextlib.contextmanager
def load(server: Server) -> Iterator[list[Client]]:
    """Eight clients at work, each on a session of its own and on one of all; checked at the end."""
    shared = server.browser()
    shared.post("/create")
    orders: list[object] = []
    clients = [Client(server.browser(), server.browser(shared.cookies), orders=orders) for _ in range(CLIENTS)]
    for client in clients:
        assert client.request(client.browser, "POST", "/create")
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
