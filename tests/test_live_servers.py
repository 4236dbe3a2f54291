"""Live sessions on real servers: what one worker changes or ends, pages on another show; and what waiting costs."""

import asyncio
import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, unix_connect

from shmsession import Session, SessionStore
from shmsession.clock import SystemClock
from shmsession.live import LOOK_SECONDS
from shmsession.testing import login_cookie
from tests.figures import report, size
from tests.memory import Channel, Child
from tests.servers import ASGI, PATIENCE, UVICORN, UVICORN_WORKER, Answer, Browser, Kind, Server, new_place, wait_for

KINDS = [ASGI, UVICORN_WORKER, UVICORN]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    kind: Kind = request.param
    place = new_place()
    try:
        with Server(kind, place, workers=2, app="tests.live_app:app") as server:
            server.wait_for_all()
            yield server
    finally:
        shutil.rmtree(place)


class Page:
    """A page that stays open in one worker, by a websocket; requests of its visitor go to the other."""

    def __init__(self, server: Server, socket: ClientConnection, cookies: Mapping[str, str]) -> None:
        self._server = server
        self._socket = socket
        self._browser = Browser(server.address, cookies)
        self.pid = int(self.receive())
        (self._other,) = set(server.worker_pids()) - {self.pid}

    def receive(self) -> str:
        return str(self._socket.recv(timeout=PATIENCE))

    def count(self, key: str) -> int:
        """Let it change the session itself; then it is idle again, and may be stopped."""
        self._socket.send(key)
        return int(self.receive())

    def post(self, path: str) -> Answer:
        with self._server.only(self._other):
            answer = self._browser.post(path)
        assert answer.pid == self._other != self.pid
        return answer

    def closes(self) -> tuple[int, str]:
        with pytest.raises(ConnectionClosed) as closed:
            self.receive()
        assert closed.value.rcvd is not None
        return closed.value.rcvd.code, closed.value.rcvd.reason


@contextmanager
def page(server: Server, cookies: Mapping[str, str]) -> Iterator[Page]:
    header = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())}
    with unix_connect(
        str(server.address), "ws://localhost/live", additional_headers=header, open_timeout=PATIENCE, compression=None
    ) as socket:
        yield Page(server, socket, cookies)


def visitor(server: Server, path: str = "/create") -> dict[str, str]:
    browser = server.browser()
    browser.post(path)
    return browser.cookies


def test_a_page_shows_what_another_worker_changes(server: Server) -> None:
    with page(server, visitor(server)) as live:
        live.post("/set/colour/green")
        assert json.loads(live.receive()) == {"colour": "green"}
        assert live.count("mine") == 1
        live.post("/cart/tea")
        assert json.loads(live.receive()) == {"cart": ["tea"]}, "what the page itself stores is no news to it"
        live.post("/logout")
        live.closes()


@pytest.mark.parametrize(("verb", "ended"), [("logout", "destroyed"), ("login/bob", "renewed")])
def test_a_page_closes_when_its_session_ends_in_another_worker(server: Server, verb: str, ended: str) -> None:
    with page(server, visitor(server, "/login/ada")) as live:
        live.post(f"/{verb}")
        assert live.closes() == (1008, ended)


def test_a_page_closes_when_its_session_expires(server: Server) -> None:
    store = server.store(lifespan=timedelta(seconds=1))
    with page(server, login_cookie(store, {"a": 1})) as live:
        assert live.closes() == (1008, "expired")


def test_every_page_of_a_session_closes(server: Server) -> None:
    cookies = visitor(server, "/login/ada")
    with page(server, cookies) as one, page(server, cookies) as two, page(server, cookies) as three:
        one.post("/logout")
        assert [live.closes() for live in (one, two, three)] == [(1008, "destroyed")] * 3


def test_a_client_that_leaves_disturbs_nobody(server: Server) -> None:
    cookies = visitor(server)
    with page(server, cookies) as stays:
        for _ in range(5):
            with page(server, cookies):
                pass
        stays.post("/set/a/1")
        assert json.loads(stays.receive()) == {"a": "1"}


def test_a_stream_of_events_ends_with_its_session(server: Server) -> None:
    cookies = visitor(server, "/login/ada")
    stream = server.browser(cookies).begin("GET", "/events")
    wait_for(lambda: stream.is_answered, "the stream begins")
    browser = server.browser(cookies)
    browser.post("/set/colour/green")
    browser.post("/logout")
    body = stream.answer().body
    assert b"event: end\ndata: destroyed\n\n" in body
    assert b'data: {"colour": "green"}\n\n' in body or b"colour" not in body, "or it ended before the next look"
    assert "Traceback" not in server.text, "the end of the stream commits to a session that is gone"
    assert "ERROR" not in server.text


# ── what it costs ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.soak
def test_a_page_reacts_in_another_worker(server: Server) -> None:
    """From the answer to the request that changed the session until its page has been told."""
    took = []
    with page(server, visitor(server)) as live:
        for number in range(size(100, 3)):
            live.post(f"/set/n/{number}")
            begun = time.monotonic()
            assert json.loads(live.receive()) == {"n": str(number)}
            took.append(time.monotonic() - begun)
    report(
        f"live {server.kind}", changes=len(took), median_ms=round(statistics.median(took) * 1000),
        longest_ms=round(max(took) * 1000),
    )  # fmt: skip


def commit_all_the_time(store: SessionStore, channel: Channel) -> None:
    """Another process's requests: 1,000 commits a second, until it is killed."""
    session = store.session()
    session["n"] = 0
    session.save()
    channel.send(os.getpid())
    while True:
        session.increment("n")
        time.sleep(0.001)


@pytest.mark.soak
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_what_a_thousand_pages_that_wait_cost(shm_store: SessionStore, busy: bool) -> None:
    """The share of a core that a process takes which does nothing else; with others that commit all the time, too."""
    shm_store.clock = SystemClock()
    count, seconds = 1000, size(20, 1)
    sessions: list[Session] = []
    for number in range(count):
        session = shm_store.session()
        session.update(user="ada@example.org", number=number, cart=[f"article {number}" for number in range(20)])
        session.save()
        sessions.append(session)

    async def listen(session: Session) -> list[frozenset[str]]:
        return [keys async for keys in session.changes()]

    async def measure() -> float:
        tasks = [asyncio.create_task(listen(session)) for session in sessions]
        await asyncio.sleep(2 * LOOK_SECONDS)
        cpu, wall = time.process_time(), time.monotonic()
        await asyncio.sleep(seconds)
        share = (time.process_time() - cpu) / (time.monotonic() - wall)
        shm_store.clear()
        assert await asyncio.gather(*tasks) == [[]] * count
        return share

    if busy:
        with Child(lambda channel: commit_all_the_time(shm_store, channel)) as child:
            child.channel.receive()
            share = asyncio.run(measure())
    else:
        share = asyncio.run(measure())
    report(f"live, {'busy' if busy else 'idle'}", sessions=count, percent_of_a_core=round(share * 100, 2))
