"""Sessions in websockets, over real servers and in the middleware alone."""

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, unix_connect

from shmsession import Key, Session, SessionConfig, SessionStore
from shmsession.asgi import App, Message, Receive, Scope, Send, SessionMiddleware
from shmsession.errors import ResponseStarted, SessionGone
from shmsession.testing import login_cookie
from tests.backends import MemoryBackend
from tests.servers import ASGI, PATIENCE, UVICORN, UVICORN_WORKER, Browser, Kind, Running, Server

pytest_plugins = ["tests.hosts"]

KINDS = [ASGI, UVICORN_WORKER, UVICORN]


@contextlib.contextmanager
def socket(server: Server, cookies: Mapping[str, str]) -> Iterator[ClientConnection]:
    headers = {"Cookie": "; ".join(f"{name}={value}" for name, value in cookies.items())} if cookies else {}
    with unix_connect(
        str(server.address), "ws://localhost/ws", additional_headers=headers, open_timeout=PATIENCE, compression=None
    ) as connection:
        yield connection


def echo(connection: ClientConnection, text: str) -> dict[str, Any]:
    connection.send(text)
    answer: dict[str, Any] = json.loads(connection.recv(timeout=PATIENCE))
    assert answer["echo"] == text
    return answer


def handshake(connection: ClientConnection) -> Mapping[str, str]:
    assert connection.response is not None
    return dict(connection.response.headers.raw_items())


def cookies_of(connection: ClientConnection) -> dict[str, str]:
    """The cookie that came with the 101."""
    lowered = {name.lower(): value for name, value in handshake(connection).items()}
    assert lowered["cache-control"] == "no-store"
    assert lowered["vary"] == "Cookie"
    name, _, value = lowered["set-cookie"].partition(";")[0].partition("=")
    return {name: value}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_new_sessions_cookie_comes_with_the_101(running: Running, kind: Kind) -> None:
    server = running(kind)
    with socket(server, {}) as connection:
        cookies = cookies_of(connection)
        assert echo(connection, "é☃")["messages"] == 1
        assert echo(connection, "two")["messages"] == 2
        assert server.browser(cookies).get("/session").json == {"messages": 2}, "visible while the socket is open"
    assert server.browser(cookies).get("/session").json == {"messages": 2}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_known_session_needs_no_cookie_and_counts_on(running: Running, kind: Kind) -> None:
    server = running(kind)
    browser = server.browser()
    browser.get("/hit")
    with socket(server, browser.cookies) as connection:
        assert "set-cookie" not in {name.lower() for name in handshake(connection)}
        assert echo(connection, "a")["messages"] == 1
        assert browser.get("/hit").json["hits"] == 2
        assert echo(connection, "b")["messages"] == 2
    assert browser.get("/session").json == {"hits": 2, "messages": 2}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_sockets_of_two_workers_share_one_count(running: Running, kind: Kind) -> None:
    server = running(kind)
    browser = server.browser()
    browser.post("/create")
    server.wait_for_all()
    with contextlib.ExitStack() as stack:
        sockets = []
        for pid in server.worker_pids():
            with server.only(pid):
                connection = stack.enter_context(socket(server, browser.cookies))
                assert echo(connection, "hello")["pid"] == pid
            sockets.append(connection)
        for number in range(20):
            answer = echo(sockets[number % len(sockets)], str(number))
            assert answer["messages"] == len(sockets) + number + 1
        assert browser.get("/session").json == {"messages": len(sockets) + 20}


@pytest.mark.parametrize("verb", ["logout", "renew"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_session_ended_elsewhere_closes_the_socket_with_1008(running: Running, kind: Kind, verb: str) -> None:
    server = running(kind)
    browser = server.browser()
    browser.post("/login/ada")
    with socket(server, browser.cookies) as connection:
        assert echo(connection, "a")["messages"] == 1
        Browser(server.address, browser.cookies).post(f"/{verb}")
        connection.send("b")
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=PATIENCE)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1008
    assert browser.get("/session").json == {}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_socket_takes_text_only_and_counts_only_numbers(running: Running, kind: Kind) -> None:
    server = running(kind)
    browser = server.browser()
    with socket(server, {}) as connection:
        connection.send(b"bytes")
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1003
    browser.post("/set/messages/x")
    with socket(server, browser.cookies) as connection:
        connection.send("a")
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(timeout=PATIENCE)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_there_is_no_other_socket(running: Running, kind: Kind) -> None:
    with pytest.raises(InvalidStatus), unix_connect(str(running(kind).address), "ws://localhost/nowhere"):
        pass


# ── the middleware alone ───────────────────────────────────────────────────────────────────────────────────────


class Conversation:
    """One websocket through the middleware: what the server hears, and what the client is told."""

    def __init__(self, store: SessionStore, app: App, cookie: str = "", **options: Any) -> None:
        self.sent: list[Message] = []
        self.error: BaseException | None = None
        self.incoming: list[Message] = [{"type": "websocket.connect"}, {"type": "websocket.disconnect", "code": 1001}]
        headers = [(b"cookie", cookie.encode())] if cookie else []
        scope: Scope = {"type": "websocket", "path": "/ws", "headers": headers}
        asyncio.run(self._run(SessionMiddleware(app, store, **options), scope))

    async def _run(self, app: App, scope: Scope) -> None:
        async def receive() -> Message:
            return self.incoming.pop(0)

        async def send(message: Message) -> None:
            self.sent.append(message)

        try:
            await app(scope, receive, send)
        except Exception as error:  # noqa: BLE001  # whatever reaches the server
            self.error = error

    @property
    def types(self) -> list[str]:
        return [message["type"] for message in self.sent]


def cookie_of(store: SessionStore, **data: Any) -> str:
    ((name, value),) = login_cookie(store, data).items()
    return f"{name}={value}"


def stored(store: SessionStore, cookie: str) -> dict[str, Any]:
    return store.request_session(cookie.encode).to_dict()


def socket_app(*steps: Any) -> App:
    """An application of steps: a function of the session, a message to send, or None to receive one."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session = Session.of(scope)
        await receive()
        for step in steps:
            if step is None:
                await receive()
            elif isinstance(step, dict):
                await send(step)
            else:
                step(session)

    return app


ACCEPT = {"type": "websocket.accept", "headers": [(b"x-own", b"1")]}
CLOSE = {"type": "websocket.close", "code": 1000}


def put(**data: Any) -> Any:
    return lambda session: session.update(data)


def test_what_was_done_before_accept_goes_with_it(shm_store: SessionStore) -> None:
    talk = Conversation(shm_store, socket_app(put(a=1), ACCEPT, CLOSE))
    headers = dict(talk.sent[0]["headers"])
    assert headers[b"x-own"] == b"1"
    assert stored(shm_store, headers[b"set-cookie"].partition(b";")[0].decode()) == {"a": 1}


@pytest.mark.parametrize("end", [CLOSE, None, lambda session: None], ids=["close", "disconnect", "return"])
def test_changes_in_a_socket_are_committed_when_it_ends(shm_store: SessionStore, end: Any) -> None:
    cookie = cookie_of(shm_store, a=1)
    assert Conversation(shm_store, socket_app(ACCEPT, put(b=2), end), cookie).error is None
    assert stored(shm_store, cookie) == {"a": 1, "b": 2}


@pytest.fixture
def kept_store(place: Path) -> Iterator[SessionStore]:
    """A store whose backend hears of a commit only when somebody waits for that."""
    config = SessionConfig(
        directory=place / "sessions", name="test", secure=False, keys=(Key.generate(),), map_size=4 << 20,
        flush_interval=timedelta(days=1), through_timeout=timedelta(seconds=PATIENCE), write="through",
    )  # fmt: skip
    with SessionStore(MemoryBackend(labelled=False), config=config) as store:
        yield store


@pytest.mark.parametrize("verb", ["set", "save", "destroy"])
@pytest.mark.parametrize("end", [CLOSE, None, lambda session: None], ids=["close", "disconnect", "return"])
def test_the_end_of_a_socket_waits_for_the_backend(kept_store: SessionStore, end: Any, verb: str) -> None:
    """With `write="through"`, as a response does; and for a session that ended whatever the setting."""
    kept_store.writes_through = verb != "destroy"
    cookie = cookie_of(kept_store, a=1)
    assert kept_store.sync.flush(PATIENCE)

    def change(session: Session) -> None:
        session["b"] = 2
        if verb == "save":
            session.save()
        elif verb == "destroy":
            session.destroy()

    assert Conversation(kept_store, socket_app(ACCEPT, change, end), cookie).error is None
    assert stored(kept_store, cookie) == ({} if verb == "destroy" else {"a": 1, "b": 2})
    assert len(kept_store.memory.outbox) == 0


def test_save_commits_now_and_the_cookie_is_not_needed(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)

    def save(session: Session) -> None:
        session["b"] = 2
        session.save()
        assert stored(shm_store, cookie) == {"a": 1, "b": 2}

    assert Conversation(shm_store, socket_app(ACCEPT, save, save, CLOSE), cookie).error is None


def test_save_says_that_the_session_is_gone(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)

    def save(session: Session) -> None:
        session["b"] = 2
        shm_store.request_session(cookie.encode).destroy()
        session.save()

    assert isinstance(Conversation(shm_store, socket_app(ACCEPT, save), cookie).error, SessionGone)
    assert stored(shm_store, cookie) == {}


def test_a_socket_refused_before_accept_drops_the_changes(shm_store: SessionStore) -> None:
    cookie = cookie_of(shm_store, a=1)
    assert Conversation(shm_store, socket_app(put(a=2), CLOSE), cookie).error is None
    assert stored(shm_store, cookie) == {"a": 1}


def test_a_new_session_after_accept_is_a_loud_error(shm_store: SessionStore) -> None:
    talk = Conversation(shm_store, socket_app(ACCEPT, put(a=1), CLOSE))
    assert isinstance(talk.error, ResponseStarted)
    assert shm_store.count() == 0


def test_an_http_answer_instead_of_a_socket_carries_the_cookie(shm_store: SessionStore) -> None:
    start = {"type": "websocket.http.response.start", "status": 403, "headers": []}
    body = {"type": "websocket.http.response.body", "body": b""}
    talk = Conversation(shm_store, socket_app(put(a=1), start, body))
    assert (talk.error, b"set-cookie" in dict(talk.sent[0]["headers"]), shm_store.count()) == (None, True, 1)


def test_a_full_store_refuses_the_socket(shm_store: SessionStore) -> None:
    talk = Conversation(shm_store, socket_app(put(a="x" * 60_000), ACCEPT))
    assert talk.types == ["websocket.accept"]
    while talk.types == ["websocket.accept"]:
        talk = Conversation(shm_store, socket_app(put(a="x" * 60_000), ACCEPT))
    assert talk.error is None
    assert (talk.types, talk.sent[0]["code"]) == (["websocket.close"], 1013)


def test_skip_covers_sockets(shm_store: SessionStore) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert "session" not in scope
        await send({"type": "websocket.close", "code": 1000})

    assert Conversation(shm_store, app, skip="/ws").error is None
