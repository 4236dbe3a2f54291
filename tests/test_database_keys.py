"""`database_keys`: what a file of SQLite holds of a session is ciphertext, and its Keys change without a loss."""

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession import Key, Session, SessionConfig, SessionStore
from shmsession.asgi import Message, Scope, SessionMiddleware
from shmsession.backends import SENTINEL
from shmsession.errors import StoreError, Unreadable
from shmsession.memory.doorbell import Doorbell
from shmsession.testing import login_cookie
from tests.servers import PATIENCE

COOKIE_KEY = Key.generate()
OLD, NEW, OTHER = (Key.generate() for _ in range(3))
WORDS = ("a-user-whom-nobody-knows", "a-key-of-the-session", "a-value-in-the-session", "another-value")
"""What a session holds: its user, a key, a value, and a value deep inside."""


class Shop:
    """Stores over one file of SQLite. Each has a memory of its own: what it finds, it has read in the file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.file = place / "sessions.db"
        self.made: list[SessionStore] = []

    def store(self, *database_keys: Key, **settings: Any) -> SessionStore:
        """A new store; the earlier ones end, and their memory is lost."""
        self.end()
        config = SessionConfig(
            directory=self.place / "memory", name="shop", secure=False, keys=(COOKIE_KEY,),
            map_size=4 << 20, database_keys=database_keys, flush_interval=timedelta(milliseconds=10), **settings,
        )  # fmt: skip
        self.made.append(SessionStore(f"sqlite:///{self.file}", config=config))
        return self.made[-1]

    def end(self) -> None:
        for store in self.made:
            store.close()
        for mark in self.place.rglob("attached"):
            Doorbell(mark.parent).remove()
        shutil.rmtree(self.place / "memory", ignore_errors=True)

    def everything(self) -> bytes:
        """All that is in the file, and in those beside it."""
        files = sorted(self.place.glob("sessions.db*"))
        assert {file.name for file in files} >= {"sessions.db", "sessions.db-wal"}
        return b"".join(file.read_bytes() for file in files)

    def body(self, session_id: str, store: SessionStore) -> bytes:
        """What the file has of a session."""
        handle = store.session(session_id).handle
        assert handle is not None
        return self.bodies()[bytes.fromhex(handle)]

    def bodies(self) -> dict[bytes, bytes]:
        with contextlib.closing(sqlite3.connect(self.file)) as connection:
            rows = dict(connection.execute("SELECT handle, body FROM shmsession WHERE state = 1"))
        rows.pop(SENTINEL, None)
        return rows


@pytest.fixture
def shop(place: Path) -> Iterator[Shop]:
    shop = Shop(place)
    yield shop
    shop.end()


def stored(store: SessionStore, number: int = 0) -> str:
    """The id of a session that the file has."""
    user, key, value, deep = WORDS
    session = store.session()
    session[key] = value
    session["cart"] = [{"item": deep}, number]
    session.renew(user_id=user)
    session.save()
    flush(store)
    assert session.id is not None
    return session.id


def flush(store: SessionStore) -> None:
    assert store.sync.flush(PATIENCE)


def check(store: SessionStore, session_id: str, number: int = 0) -> Session:
    user, key, value, deep = WORDS
    session = store.session(session_id)
    assert session.user_id == user
    assert session[key] == value
    assert session["cart"] == [{"item": deep}, number]
    return session


def is_under(key: Key, body: bytes) -> bool:
    return body[1:5] == key.id


# ── what is in the file ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("sealed", [True, False])
def test_the_file_holds_words_of_a_session_only_where_no_database_key_is_set(shop: Shop, sealed: bool) -> None:
    """Neither as text nor as it would be encoded, in the file, its journal and its index; nor an id, sealed or not."""
    store = shop.store(*([NEW] if sealed else []))
    ids = [stored(store, number) for number in range(20)]
    session = check(store, ids[0])
    session["cart"] = [{"item": WORDS[3]}, 0, "more"]
    session.save()
    flush(store)
    found = shop.everything()
    assert len(shop.bodies()) == len(ids)
    for word in WORDS:
        assert (word.encode() in found) != sealed
    for session_id in ids:
        assert session_id.encode() not in found


def test_equal_sessions_are_different_bytes(shop: Shop) -> None:
    """The database cannot tell who holds the same, nor that nothing has changed."""
    store = shop.store(NEW)
    ids = [stored(store) for _ in range(5)]
    before = shop.bodies()
    assert len({body[5:] for body in before.values()}) == len(ids)
    for session_id in ids:
        session = check(store, session_id)
        session["cart"] = [{"item": WORDS[3]}, 1]
        session.save()
        session["cart"] = [{"item": WORDS[3]}, 0]
        session.save()
    flush(store)
    after = shop.bodies()
    assert all(before[handle][5:37] != body[5:37] for handle, body in after.items())


def test_a_sealed_body_is_of_no_use_under_another_handle(shop: Shop) -> None:
    """Somebody who may write the file cannot give himself another's session: that is an error, and no session."""
    store = shop.store(NEW)
    mine, theirs = stored(store, 1), stored(store, 2)
    mine_raw, theirs_raw = (bytes.fromhex(store.session(one).handle or "") for one in (mine, theirs))
    store = shop.store(NEW)
    with contextlib.closing(sqlite3.connect(shop.file, isolation_level=None)) as connection:
        connection.execute(
            "UPDATE shmsession SET body = (SELECT body FROM shmsession WHERE handle = ?) WHERE handle = ?",
            (theirs_raw, mine_raw),
        )
    with pytest.raises(StoreError, match="not what was stored there"):
        dict(store.session(mine))
    check(store, theirs, 2)


# ── other Keys ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_replaced_by_way_of_both_and_no_session_is_lost(shop: Shop) -> None:
    """old → [old, new] → [new]: what is written meanwhile is sealed by the new one, what is only read keeps the old."""
    written = stored(shop.store(OLD), 1)
    read = stored(shop.store(OLD), 2)
    both = shop.store(OLD, NEW)
    check(both, read, 2)
    check(both, written, 1)
    fresh = stored(both, 3)
    assert is_under(OLD, shop.body(written, both))
    session = both.session(written)
    session["late"] = True
    session.save()
    flush(both)
    assert [is_under(NEW, shop.body(one, both)) for one in (written, read, fresh)] == [True, False, True]
    assert is_under(OLD, shop.body(read, both))
    new = shop.store(NEW)
    assert check(new, written, 1)["late"] is True
    check(new, fresh, 3)
    with pytest.raises(Unreadable):
        dict(new.session(read))
    again = shop.store(OLD, NEW)
    check(again, read, 2)
    check(again, written, 1)


@pytest.mark.parametrize("keys", [(OTHER,), (OTHER, NEW), ()], ids=["another", "others", "none"])
def test_a_row_under_a_key_that_is_not_there_is_unreadable_and_left_alone(shop: Shop, keys: tuple[Key, ...]) -> None:
    """A script is told so; the row stays as it is, and who has the Key reads it. The words are about the setting."""
    session_id = stored(shop.store(OLD))
    before = shop.bodies()
    for _ in range(2):
        store = shop.store(*keys)
        with pytest.raises(Unreadable, match="add it to database_keys") as caught:
            dict(store.session(session_id))
        for key in (*keys, OLD):
            assert str(key) not in str(caught.value)
        stored(store, 1)  # others are served
        flush(store)
        assert before.items() <= shop.bodies().items()
    check(shop.store(OLD, NEW), session_id)


def test_rows_from_before_there_was_a_key_are_read_and_sealed_when_they_are_next_written(shop: Shop) -> None:
    session_id = stored(shop.store())
    store = shop.store(NEW)
    session = check(store, session_id)
    session["late"] = True
    session.save()
    flush(store)
    assert is_under(NEW, shop.body(session_id, store))
    assert check(shop.store(NEW), session_id)["late"] is True


# ── over HTTP ──────────────────────────────────────────────────────────────────────────────────────────────────


def ask(store: SessionStore, cookie: dict[str, str]) -> tuple[int, list[tuple[bytes, bytes]], list[Any]]:
    """Status, headers, and what an application finds that looks at the session and writes into it."""
    found: list[Any] = []
    sent: list[Message] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        session = Session.of(scope)
        found.append((session.user_id, dict(session)))
        session["seen"] = True
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    pairs = "; ".join(f"{name}={value}" for name, value in cookie.items())
    scope: Scope = {"type": "http", "path": "/", "scheme": "http", "headers": [(b"cookie", pairs.encode())]}
    asyncio.run(SessionMiddleware(app, store)(scope, receive, send))
    return sent[0]["status"], list(sent[0]["headers"]), found


@pytest.mark.parametrize("on_error", ["unavailable", "anonymous"])
def test_a_visitor_whose_row_is_under_an_unknown_key_gets_a_503_and_keeps_the_cookie(shop: Shop, on_error: Any) -> None:
    """Whatever on_backend_error says: it is no session that this process may judge, and nobody is logged out."""
    first = shop.store(OLD)
    cookie = login_cookie(first, {"cart": ["tea"]}, user_id="ada")
    flush(first)
    before = shop.bodies()
    store = shop.store(NEW, on_backend_error=on_error)
    status, headers, found = ask(store, cookie)
    names = {name for name, _ in headers}
    assert (status, found) == (503, [])
    assert b"retry-after" in names
    assert b"set-cookie" not in names
    assert before == shop.bodies()
    status, _, found = ask(shop.store(OLD, NEW), cookie)
    assert (status, found) == (200, [("ada", {"cart": ["tea"]})])
