"""G8: visitors without a session cost no memory, and those who flood it push out nobody who is logged in."""

import asyncio
import contextlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from shmsession import Session, SessionStore, asgi, wsgi
from shmsession.asgi import Message, Receive, Scope, Send
from shmsession.ids import new_id, text_of
from shmsession.wsgi import Environ, StartResponse
from tests.databases import RedisServer
from tests.figures import report, size
from tests.kept import wait_for_empty_outbox
from tests.memory import forget
from tests.servers import (
    ASGI,
    GTHREAD,
    UVICORN,
    Answer,
    Browser,
    Kind,
    Lane,
    Running,
    Serve,
    Server,
    last_commit,
    wait_for,
)

pytest_plugins = ["tests.hosts", "tests.database_hosts"]


async def asgi_reader(scope: Scope, receive: Receive, send: Send) -> None:
    session = Session.of(scope)
    assert session.get("user") is None
    assert dict(session) == {}
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def wsgi_reader(environ: Environ, start_response: StartResponse) -> list[bytes]:
    session = Session.of(environ)
    assert session.get("user") is None
    assert "cart" not in session
    start_response("200 OK", [])
    return [b"ok"]


def call_asgi(app: asgi.SessionMiddleware, count: int) -> None:
    headers: list[tuple[bytes, bytes]] = [(b"host", b"localhost")]
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        return {"type": "http.request"}

    async def run() -> None:
        for _ in range(count):
            sent.clear()
            await app({"type": "http", "path": "/", "headers": headers}, receive, send)
            assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
            assert not any(name == b"set-cookie" for name, _ in sent[0]["headers"])

    asyncio.run(run())


def call_wsgi(app: wsgi.SessionMiddleware, count: int, cookie: str | None = None) -> None:
    started: list[Any] = []

    def start_response(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        started.append((status, headers))
        return started.append

    for _ in range(count):
        started.clear()
        environ: Environ = {"PATH_INFO": "/", "SCRIPT_NAME": ""}
        if cookie is not None:
            environ["HTTP_COOKIE"] = cookie
        assert list(app(environ, start_response)) == [b"ok"]
        (answer,) = started
        assert answer == ("200 OK", [("vary", "Cookie")])


@pytest.mark.soak
def test_requests_without_a_cookie_leave_no_record(shm_store: SessionStore) -> None:
    total = size(1_000_000, 10_000)
    before = last_commit(shm_store)
    call_asgi(asgi.SessionMiddleware(asgi_reader, shm_store), total // 2)
    call_wsgi(wsgi.SessionMiddleware(wsgi_reader, shm_store), total // 2)
    assert shm_store.count() == 0
    assert last_commit(shm_store) == before
    report("G8 cookieless", requests=total, records=shm_store.count())


@pytest.mark.soak
def test_requests_that_read_with_a_cookie_of_no_session_leave_no_record(shm_store: SessionStore) -> None:
    total = size(100_000, 5_000)
    before = last_commit(shm_store)
    cookies = shm_store.transport
    unknown = f"{cookies.name}={cookies.value(text_of(bytes(32)), shm_store.clock.now())}"
    call_wsgi(wsgi.SessionMiddleware(wsgi_reader, shm_store), total // 2, unknown)
    call_wsgi(wsgi.SessionMiddleware(wsgi_reader, shm_store), total - total // 2, f"{cookies.name}=junk")
    assert shm_store.count() == 0
    assert last_commit(shm_store) == before
    report("G8 reading", requests=total, records=shm_store.count())


@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_visitors_who_only_look_leave_no_record_on_a_server(running: Running, kind: Kind) -> None:
    server = running(kind)
    store = server.store()
    before = last_commit(store)
    for number in range(300):
        answer = server.browser().get(("/", "/session", "/whoami", "/ping")[number % 4])
        assert answer.status == 200
        assert answer.all("set-cookie") == []
    assert last_commit(store) == before


@pytest.mark.parametrize("kind", [GTHREAD, ASGI, UVICORN], ids=str)
def test_a_flood_of_anonymous_sessions_is_refused_before_it_hurts_who_is_logged_in(serve: Serve, kind: Kind) -> None:
    server = serve(kind, env={"SHMSESSION_MAP_SIZE": "16MiB"})
    users = [server.browser() for _ in range(100)]
    for number, user in enumerate(users):
        user.post(f"/login/u{number}")
        user.post(f"/set/kept/{number}")
    created, refused = flood(server.browser(keep_alive=True))
    assert 500 < created < 4096 * 0.6, "anonymous sessions may take 60 % of the 4096 pages, and each takes one"
    check_unavailable(refused)
    for number, user in enumerate(users):
        assert user.get("/session").json == {"user": f"u{number}", "kept": str(number)}
        assert user.get("/hit").json["hits"] == 1
    late = server.browser()
    assert late.post("/login/late").status == 200, "who logs in still finds room"
    assert late.get("/whoami").json["user"] == "late"
    fill_up(users)
    for user in (*users, late):
        cookies = dict(user.cookies)
        answer = user.post("/logout")
        assert (answer.status, "session" in user.cookies) == (200, False), "who logs out needs no room"
        assert server.browser(cookies).get("/whoami").json["user"] is None
    report(f"G8 flood of 16 MiB, {kind}", anonymous=created, logged_in=len(users) + 1, logged_in_lost=0, error=503)


@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_one_session_cannot_grow_for_ever(running: Running, kind: Kind) -> None:
    browser = running(kind).browser()
    statuses = [browser.post(f"/set/k{number}/{'x' * 3000}").status for number in range(25)]
    assert statuses == [200] * 21 + [413] * 4
    assert len(browser.get("/session").json) == 21
    assert browser.get("/hit").json["hits"] == 1


def flood(browser: Browser) -> tuple[int, Answer]:
    """Make anonymous sessions until one is refused; returns how many there were, and the refusal."""
    with browser:
        for created in range(100_000):
            browser.cookies.clear()
            answer = browser.post(f"/set/k/{'x' * 3000}")
            if answer.status != 200:
                return created, answer
    raise AssertionError("the map never filled")


def fill_up(users: list[Browser]) -> None:
    """Let the sessions of those who are logged in grow until there is no room for that either."""
    for number in range(100_000):
        answer = users[number % len(users)].post(f"/set/more{number // len(users)}/{'y' * 3000}")
        if answer.status != 200:
            check_unavailable(answer)
            return
    raise AssertionError("the map never filled")


def check_unavailable(answer: Answer) -> None:
    assert answer.status == 503
    assert int(answer.header("retry-after") or 0) > 0
    assert answer.header("cache-control") == "no-store"
    assert answer.all("set-cookie") == []


# ── ids that somebody made up ─────────────────────────────────────────────────────────────────────────────────

LANES = 8
DEPTH = 20


def over(lanes: Sequence[Lane], requests: Iterable[bytes]) -> Iterator[tuple[bytes, Answer]]:
    """Requests with their answers, in their order; twenty at a time go over each connection."""
    waiting = iter(requests)
    while (turn := [(lane, list(itertools.islice(waiting, DEPTH))) for lane in lanes])[0][1]:
        for lane, batch in turn:
            lane.send(batch)
        for lane, batch in turn:
            for request in batch:
                yield request, lane.answer()


def asks(method: str, path: str, session_id: str = "") -> bytes:
    cookie = f"Cookie: session={session_id}\r\n" if session_id else ""
    length = "Content-Length: 0\r\n" if method == "POST" else ""
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{length}{cookie}\r\n".encode()


def begin_sessions(lanes: Sequence[Lane], count: int) -> dict[bytes, str]:
    """Sessions with a number each: the request that asks for one, and which number it is."""
    begun = {}
    for _, answer in over(lanes, (asks("POST", f"/set/n/{number}") for number in range(count))):
        (cookie,) = answer.all("set-cookie")
        begun[asks("GET", "/session", cookie.partition("=")[2].partition(";")[0])] = answer.json["value"]
    assert len(begun) == count
    return begun


def is_spared(server: Server, store: SessionStore) -> bool:
    """Whether the backend is not asked for an id that nobody was given."""
    before = store.stats().counters["spared"]
    assert server.browser({"session": new_id()}).get("/session").json == {}
    return store.stats().counters["spared"] > before


def gets(redis: RedisServer) -> int:
    """How many values Redis was asked for since its statistics were emptied."""
    found = re.search(rb"cmdstat_get:calls=(\d+)", redis.ask("INFO", "commandstats"))
    return int(found[1]) if found else 0


@pytest.mark.soak
@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_made_up_plain_ids_hardly_reach_the_backend_and_hide_no_session(
    serve: Serve, redis_server: RedisServer, kind: Kind
) -> None:
    """Amid the flood come those whose sessions only the backend has: each is found, by one look-up."""
    total, sessions = size(1_000_000, 20_000) // 2, size(20_000, 250)
    env = {"SHMSESSION_BACKEND": redis_server.url, "SHMSESSION_COOKIE_MODE": "plain", "SHMSESSION_MAP_SIZE": "64MiB"}
    server = serve(kind, workers=2, env=env)
    store = server.store()
    with contextlib.ExitStack() as stack:
        lanes = [stack.enter_context(contextlib.closing(Lane(server.address))) for _ in range(LANES)]
        ours = begin_sessions(lanes, sessions)
        wait_for_empty_outbox(store)
        wait_for(lambda: is_spared(server, store), "it is known what the backend has")
        forget(store.memory)
        before = store.stats().counters
        redis_server.ask("CONFIG", "RESETSTAT")
        check_flood(lanes, ours, total)
    counted = store.stats().counters
    misses, spared = (counted[name] - before[name] for name in ("misses", "spared"))
    asked = gets(redis_server)
    report(
        f"flood of plain ids, {kind}", ids=total, sessions=sessions, looked_up=misses - spared - sessions,
        asked_of_redis=asked - sessions,
    )  # fmt: skip
    assert misses == total + sessions
    assert 0 <= misses - spared - sessions < total // 100
    assert 0 <= asked - sessions < total // 100, "the flusher's own questions included"


def check_flood(lanes: Sequence[Lane], ours: Mapping[bytes, str], total: int) -> None:
    """Between any two of ours come some that nobody was given."""

    def requests() -> Iterator[bytes]:
        for number, request in enumerate(ours):
            for _ in range(total * number // len(ours), total * (number + 1) // len(ours)):
                yield asks("GET", "/session", new_id())
            yield request

    found = 0
    for request, answer in over(lanes, requests()):
        assert answer.status == 200
        assert answer.all("set-cookie") == []
        assert answer.json == ({"n": ours[request]} if request in ours else {})
        found += request in ours
    assert found == len(ours)
