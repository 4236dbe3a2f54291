"""What a session knows of its login, and what is known of all sessions of a user."""

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from shmsession import Key, Session, SessionStore, behind, ids, revoking
from shmsession.asgi import SessionMiddleware as AsgiMiddleware
from shmsession.codec import encode
from shmsession.errors import BackendError, SessionGone, StoreFull, TooManySessions, Unreadable
from shmsession.hooks import CommitDropped, Destroyed, Event
from shmsession.ids import tag_of, watermark_of
from shmsession.memory import drafting
from shmsession.memory import users as memory_users
from shmsession.memory.tables import Tables, Txn, remove
from shmsession.memory.users import CHUNK
from shmsession.memory.writing import Work
from shmsession.record import USER_KEY, Changes, Record, unpack_header
from shmsession.session import Resolved
from shmsession.testing import ManualClock, make_store
from shmsession.wsgi import SessionMiddleware as WsgiMiddleware
from tests.memory import check_tables, closing, contents, handle, memory_store, waiting

HOUR = 3600


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(place: Path, clock: ManualClock) -> Iterator[SessionStore]:
    with make_store(place, clock=clock) as store:
        yield store


def moment(clock: ManualClock) -> datetime:
    return datetime.fromtimestamp(clock.now() / 1000, UTC)


@contextlib.contextmanager
def store_events(store: SessionStore) -> Iterator[list[Event]]:
    """What the hooks of this store are told meanwhile."""
    events: list[Event] = []
    hooks, store.hooks._hooks = store.hooks._hooks, (events.append,)
    try:
        yield events
    finally:
        store.hooks._hooks = hooks


def login(store: SessionStore, user: object = "ada", session: Session | None = None) -> Session:
    """A committed login."""
    session = store.session() if session is None else session
    session.renew(user_id=user)
    session.save()
    return session


def again(store: SessionStore, session: Session) -> Session:
    """The same session in another request."""
    return store.session(session.id)


# ── when ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", [True, False], ids=["a first session", "a session that was there"])
def test_a_session_knows_when_its_user_was_logged_in(store: SessionStore, clock: ManualClock, first: bool) -> None:
    session = store.session()
    if not first:
        session["cart"] = ["tea"]
        session.save()
        assert session.authenticated_at is None
        clock.advance(HOUR)
    session.renew(user_id="ada")
    assert session.authenticated_at == moment(clock), "also before it is committed"
    session.save()
    assert again(store, session).authenticated_at == session.authenticated_at == moment(clock)


def test_a_new_id_keeps_the_moment_of_the_login_and_another_login_does_not(
    store: SessionStore, clock: ManualClock
) -> None:
    session = login(store)
    then = moment(clock)
    clock.advance(HOUR)
    session["a"] = 1
    session.save()
    session.renew()
    session.save()
    assert again(store, session).authenticated_at == then
    login(store, "ada", session)
    assert again(store, session).authenticated_at == moment(clock)
    assert then < moment(clock)


@pytest.mark.parametrize("logout", [lambda it: it.renew(user_id=None), lambda it: it.clear()], ids=["renew", "clear"])
def test_who_logs_out_leaves_no_trace_of_the_login(store: SessionStore, logout: Callable[[Session], None]) -> None:
    session = login(store)
    logout(session)
    session["kept"] = 1
    assert session.user_tag is None
    session.save()
    found = again(store, session)
    assert (found.authenticated_at, found.user_tag, found.user_id) == (None, None, None)
    assert found.record is not None
    assert set(found.record.split()) == {"kept"}


def test_a_login_that_met_an_ended_session_is_a_login_all_the_same(store: SessionStore, clock: ManualClock) -> None:
    session = login(store, "bob")
    slow = again(store, session)
    session.destroy()
    login(store, "ada", slow)
    assert (again(store, slow).user_id, again(store, slow).authenticated_at) == ("ada", moment(clock))


def test_a_users_tag_stands_for_the_user(store: SessionStore) -> None:
    session = store.session()
    assert not session.user_tag
    session.renew(user_id=7)
    assert session.user_tag == tag_of(encode(7))
    session.save()
    assert again(store, session).user_tag == tag_of(encode(7)) != login(store, "7").user_tag


# ── who is logged in where ────────────────────────────────────────────────────────────────────────────────────


def test_a_users_sessions_are_listed_and_nobody_elses(store: SessionStore, clock: ManualClock) -> None:
    """The one that was seen last comes first; what has ended is left out."""
    first, second = login(store), login(store)
    login(store, "bob")
    store.session()["anonymous"] = 1
    clock.advance(HOUR)
    second.set_longterm(True)
    second.touch()
    second.save()
    ended = login(store)
    ended.destroy()
    listed = store.sync.sessions("ada")
    assert [one.handle for one in listed] == [second.handle, first.handle]
    assert [one.longterm for one in listed] == [True, False]
    assert [one.last_seen for one in listed] == [moment(clock), first.created_at]
    assert {one.authenticated_at for one in listed} == {first.created_at}
    assert [one.expires_at for one in listed] == [second.expires_at, first.expires_at]
    assert asyncio.run(store.sessions("ada")) == listed
    clock.advance(hours=6)
    assert [one.handle for one in store.sync.sessions("ada")] == [second.handle]


def test_nobody_has_no_sessions(store: SessionStore) -> None:
    for ask in (store.sync.sessions, store.sync.revoke_user, store.sync.recall_user):
        with pytest.raises(ValueError, match="name a user"):
            ask(None)
    assert store.sync.sessions("nobody") == []
    assert store.sync.revoke_user("nobody") == 0
    store.sync.recall_user("nobody")


# ── ending one ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_ends_by_its_handle(store: SessionStore) -> None:
    one, other = login(store), login(store)
    assert one.handle is not None
    assert store.sync.revoke(one.handle) is True
    assert store.sync.revoke(one.handle) is False
    assert asyncio.run(store.revoke("ab" * 20)) is False
    assert not again(store, one).exists
    assert again(store, other).exists
    with pytest.raises(SessionGone):
        one.increment("n")


def test_a_session_that_got_a_new_id_since_it_was_listed_ends(store: SessionStore) -> None:
    session = login(store)
    (listed,) = store.sync.sessions("ada")
    session.renew()
    session.save()
    assert store.sync.revoke(listed.handle) is True
    assert store.sync.sessions("ada") == []


@pytest.mark.parametrize("handle", ["", "ab", "zz" * 20, "ab" * 21, " " + "ab" * 20, None, 7, b"ab" * 20])
def test_what_is_no_handle_is_said_to_be_none(store: SessionStore, handle: Any) -> None:
    with pytest.raises(ValueError, match=r"write the 40 hexadecimal digits of Session\.handle"):
        store.sync.revoke(handle)
    if handle is not None:
        with pytest.raises(ValueError, match="this is no handle"):
            store.sync.revoke_user("ada", keep=handle)


# ── ending all of them ────────────────────────────────────────────────────────────────────────────────────────


def test_all_sessions_of_a_user_end_and_nobody_elses(store: SessionStore) -> None:
    sessions = [login(store) for _ in range(3)]
    bob = login(store, "bob")
    with store_events(store) as events:
        assert store.sync.revoke_user("ada") == 3
    assert {event.handle for event in events if isinstance(event, Destroyed)} == {one.handle for one in sessions}
    assert not any(again(store, one).exists for one in sessions)
    assert again(store, bob).user_id == "bob"
    assert store.sync.sessions("ada") == []
    assert asyncio.run(store.revoke_user("ada")) == 0


def test_more_sessions_than_end_in_one_transaction_all_end(store: SessionStore) -> None:
    sessions = [login(store) for _ in range(2 * CHUNK + 1)]
    assert store.sync.revoke_user("ada", keep=sessions[7]) == 2 * CHUNK
    assert [one.handle for one in store.sync.sessions("ada")] == [sessions[7].handle]


def test_between_two_of_these_transactions_nobody_slips_through(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a new id it would not be on the list of those that are yet to end."""
    sessions = [login(store) for _ in range(CHUNK + 1)]
    write, slipping = store.memory._writer.write, []

    def write_and_let_others(work: Work[Any]) -> Any:
        result = write(work)
        monkeypatch.undo()
        for session in filter(lambda one: again(store, one).exists, sessions):
            slipping.append(session)
            session.renew()
            with pytest.raises(SessionGone):
                session.save()
        return result

    monkeypatch.setattr(store.memory._writer, "write", write_and_let_others)
    assert store.sync.revoke_user("ada") == CHUNK + 1
    assert len(slipping) == 1
    assert store.sync.sessions("ada") == []


@pytest.mark.parametrize("by", ["session", "handle"])
def test_the_kept_session_goes_on(store: SessionStore, clock: ManualClock, by: str) -> None:
    """With what its request changes, under its next ids too, and not for ever: the next revocation may end it."""
    kept, other = login(store), login(store)
    kept["a"] = 1
    assert store.sync.revoke_user("ada", keep=kept if by == "session" else kept.handle) == 1
    kept.save()
    assert again(store, kept).to_dict() == {"a": 1}
    kept.renew()
    kept.save()
    assert again(store, kept).user_id == "ada"
    assert again(store, kept).authenticated_at == moment(clock)
    assert not again(store, other).exists
    clock.advance(1)
    assert store.sync.revoke_user("ada") == 1
    assert not again(store, kept).exists


def test_the_kept_session_goes_on_also_when_another_request_has_just_given_it_a_new_id(store: SessionStore) -> None:
    kept = login(store)
    other = again(store, kept)
    other.renew()
    other.save()
    assert store.sync.revoke_user("ada", keep=kept) == 0
    assert again(store, other).user_id == "ada"


def test_to_keep_somebody_elses_session_keeps_nothing(store: SessionStore) -> None:
    login(store)
    bob = login(store, "bob")
    assert store.sync.revoke_user("ada", keep=bob) == 1
    assert again(store, bob).user_id == "bob"


def test_a_login_that_was_asked_for_before_is_dropped(store: SessionStore, clock: ManualClock) -> None:
    """It may have been made with the password that was just changed."""
    for session in (store.session(), login(store, "bob")):
        session.renew(user_id="ada")
        clock.advance(0.001)
        store.sync.revoke_user("ada")
        with store_events(store) as events, pytest.raises(SessionGone):
            session.save()
        assert [type(event) for event in events] == [CommitDropped]
        assert store.sync.sessions("ada") == []


@pytest.mark.parametrize("passes", [0, 0.001, -HOUR])
def test_a_login_afterwards_is_a_login(store: SessionStore, clock: ManualClock, passes: float) -> None:
    """Also within the same millisecond, and when the wall clock goes back."""
    login(store)
    store.sync.revoke_user("ada")
    clock.step(passes)
    session = login(store)
    assert again(store, session).user_id == "ada"
    session.renew()
    session.save()
    assert again(store, session).user_id == "ada"
    login(store, "ada", session)
    assert again(store, session).user_id == "ada"


def test_who_changes_the_password_and_logs_in_anew_in_one_request_is_logged_in(
    store: SessionStore, clock: ManualClock
) -> None:
    """In any order: the login that this request makes is what is to be kept."""
    for first in (True, False):
        session = login(store)
        clock.advance(1)
        if first:
            session.renew(user_id="ada")
        clock.advance(1)
        store.sync.revoke_user("ada", keep=session)
        if not first:
            session.renew(user_id="ada")
        session.save()
        assert [one.handle for one in store.sync.sessions("ada")] == [session.handle]


def test_a_renewal_that_comes_late_revives_nothing(store: SessionStore) -> None:
    session = login(store)
    slow = again(store, session)
    store.sync.revoke_user("ada")
    slow.renew()
    with pytest.raises(SessionGone):
        slow.save()
    assert store.sync.sessions("ada") == []


def test_logins_of_an_earlier_boot_do_not_stand_in_the_way(place: Path) -> None:
    """The clock since boot begins anew; a watermark from before says nothing about when it was asked for."""
    old = ManualClock()
    with make_store(place, clock=old) as store:
        old.advance(1)
        store.sync.revoke_user("ada")
    new = ManualClock()
    new.advance(-HOUR)
    new.step(HOUR + 2)
    with make_store(place, clock=new, keys=store.config.keys) as store:
        assert again(store, login(store)).user_id == "ada"


def test_users_with_the_same_tag_are_told_apart(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight bytes are a hint."""
    for module in (drafting, memory_users, ids):
        monkeypatch.setattr(module, "tag_of", lambda _: b"the same")
    ada, bob = login(store), login(store, "bob")
    assert [one.handle for one in store.sync.sessions("ada")] == [ada.handle]
    assert store.sync.revoke_user("ada") == 1
    assert [one.handle for one in store.sync.sessions("bob")] == [bob.handle]
    bob.renew()
    bob.save()
    assert again(store, bob).user_id == "bob"


def test_a_watermark_is_no_session_and_is_forgotten(store: SessionStore, clock: ManualClock) -> None:
    login(store)
    store.sync.revoke_user("ada")
    mark = watermark_of(encode("ada"))
    assert store.count() == 0
    assert store.sync.revoke(mark.hex()) is False
    assert store.clear() == 0
    check_tables(store.memory, store.keyring)
    clock.advance(61)
    store.cleanup()
    assert contents(store.memory).records == {}
    check_tables(store.memory, store.keyring)


def test_they_end_in_a_store_that_is_full(place: Path) -> None:
    store, clock = memory_store(place), ManualClock()
    changes = Changes(set={USER_KEY: encode("ada"), "v": encode(bytes(500))})
    with closing(store):
        made = 0
        with contextlib.suppress(StoreFull):
            while store.create(handle(made), changes, clock.now()):
                made += 1
        assert made > CHUNK
        assert len(store.users.revoke(encode("ada"), handle(7))) == made - 1
        check_tables(store)
        assert isinstance(store.load(handle(7), clock.now()), Record)


@pytest.mark.parametrize("whose", ["users who have none here", "sessions that nobody knows"])
def test_no_number_of_revocations_keeps_others_from_being_removed(place: Path, whose: str) -> None:
    """A store with no page left for it could never remove anything again, nor log anybody out."""
    clock = ManualClock()
    changes = Changes(set={USER_KEY: encode("ada"), "v": encode(bytes(500))})
    with closing(memory_store(place, clock, backend=whose.startswith("sessions"))) as store:
        made = revoked = 0
        with contextlib.suppress(StoreFull):
            while store.create(handle(made), changes, clock.now()):
                made += 1
        with contextlib.suppress(StoreFull):
            while revoked < 5_000:
                if whose.startswith("users"):
                    store.users.revoke(encode(revoked))
                else:
                    store.destroy(handle(100_000 + revoked), clock.now())
                revoked += 1
        assert 100 < revoked < 5_000
        assert store.destroy(handle(3), clock.now()) == handle(3)
        assert len(store.users.revoke(encode("ada"))) == made - 1
        check_tables(store)


def test_what_another_generation_has_sealed_ends_by_its_tag(place: Path, clock: ManualClock) -> None:
    """It is the user's, or of somebody among 2**64; but not when it came after the revocation."""
    old, new = Key.generate(), Key.generate()
    with make_store(place, clock, keys=(old,)) as store, make_store(place, clock, keys=(old, new)) as other:
        session = login(other)
        with pytest.raises(Unreadable):
            store.sync.sessions("ada")
        assert store.sync.revoke_user("ada") == 1
        session = login(other)
        mark = store.memory.users.remembered(encode("ada"))
        assert mark is not None
        assert store.memory.users.enforce(mark) == []
        assert again(other, session).user_id == "ada"
        assert other.sync.revoke_user("ada") == 1, "also over a watermark that it cannot read"
        with pytest.raises(Unreadable):
            login(store)


def test_a_watermark_that_waits_for_the_backend_is_kept_for_as_long_as_that_takes(
    place: Path, clock: ManualClock
) -> None:
    with closing(memory_store(place, clock, backend=True)) as store:
        store.users.revoke(encode("ada"))
        mark = store.users.remembered(encode("ada"))
        assert mark is not None
        for _ in range(3):
            clock.advance(100)
            store.sweep(clock.now())
            assert store.users.remembered(encode("ada")) == mark
            assert waiting(store) == [mark.handle]
        store.outbox.acknowledge(store.outbox.oldest(1), store.outbox.losses())
        clock.advance(100)
        store.sweep(clock.now())
        assert store.users.remembered(encode("ada")) is None


def test_what_somebody_left_undone_who_died_is_done_by_whoever_meets_the_watermark(store: SessionStore) -> None:
    session = login(store)
    store.sync.revoke_user("ada")
    mark = store.memory.users.remembered(encode("ada"))
    assert mark is not None
    late = store.memory.create(handle(1), Changes(set={USER_KEY: encode("ada")}), store.clock.now())
    assert isinstance(late, Record)
    assert store.memory.users.enforce(mark._replace(moment=mark.moment + 1)) == [handle(1)]
    assert store.memory.users.enforce(mark) == []
    assert not again(store, session).exists


# ── only so many ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_login_too_many_ends_the_oldest(place: Path, clock: ManualClock) -> None:
    """The one that was logged in first, however lately it was seen, and no other user's; renewals count for nothing."""
    with make_store(place, clock=clock, max_sessions_per_user=2) as store:
        bob = login(store, "bob")
        first = login(store)
        clock.advance(1)
        second = login(store)
        first.renew()
        first.save()
        clock.advance(1)
        with store_events(store) as events:
            third = login(store)
        assert [event.handle for event in events if isinstance(event, Destroyed)] == [first.handle]
        assert {one.handle for one in store.sync.sessions("ada")} == {second.handle, third.handle}
        assert first.raw_handle in third.through, "its response waits until the backend knows"
        login(store, "ada", third)
        assert {one.handle for one in store.sync.sessions("ada")} == {second.handle, third.handle}, "it was its own"
        assert again(store, bob).user_id == "bob"
        clock.advance(hours=7)
        fourth = login(store)
        with pytest.raises(SessionGone):
            second.save()
        assert [one.handle for one in store.sync.sessions("ada")] == [fourth.handle], "what has expired is not counted"


def test_sessions_under_a_key_that_is_gone_are_counted_and_shut_nobody_out(place: Path, clock: ManualClock) -> None:
    """Their user could not log in any more until the last of them has expired."""
    with make_store(place, clock=clock) as before:
        for _ in range(2):
            login(before)
            clock.advance(1)
    refusing = make_store(place, clock=clock, max_sessions_per_user=2, too_many_sessions="refuse")
    with refusing, pytest.raises(TooManySessions):
        login(refusing)
    with make_store(place, clock=clock, max_sessions_per_user=2) as store:
        first, second = login(store), login(store)
        assert {one.handle for one in store.sync.sessions("ada")} == {first.handle, second.handle}
        assert store.count() == 2


def test_the_oldest_is_who_logged_in_first_not_whose_session_began_first(place: Path, clock: ManualClock) -> None:
    with make_store(place, clock=clock, max_sessions_per_user=2) as store:
        visitor = store.session()
        visitor["cart"] = ["tea"]
        visitor.save()
        elsewhere, last = store.session(), store.session()
        for session in (elsewhere, visitor, last):
            clock.advance(1)
            login(store, "ada", session)
        assert {one.handle for one in store.sync.sessions("ada")} == {visitor.handle, last.handle}


def test_a_limit_that_was_lowered_ends_all_that_are_too_many(place: Path, clock: ManualClock) -> None:
    key = Key.generate()
    with make_store(place, clock=clock, keys=(key,)) as store:
        for _ in range(3):
            login(store)
            clock.advance(1)
    with make_store(place, clock=clock, keys=(key,), max_sessions_per_user=2) as store:
        last = login(store)
        found = store.sync.sessions("ada")
        assert (len(found), found[0].handle) == (2, last.handle)


def test_a_login_too_many_may_be_refused(place: Path, clock: ManualClock) -> None:
    """Its request can say so, with a page that uses the session; and log in once another has ended."""
    with make_store(place, clock=clock, max_sessions_per_user=1, too_many_sessions="refuse") as store:
        first, session = login(store), store.session()
        session["cart"] = ["tea"]
        session.save()
        session.renew(user_id="ada")
        with pytest.raises(TooManySessions, match=r"the user has 1 sessions, and may have 1 .*store\.revoke\(handle\)"):
            session.save()
        session.flash("log out elsewhere first")
        session.save()
        assert (again(store, session).user_id, session["cart"]) == (None, ["tea"])
        assert again(store, first).user_id == "ada"
        assert first.handle is not None
        store.sync.revoke(first.handle)
        login(store, "ada", session)
        assert again(store, session).user_id == "ada"


@pytest.mark.parametrize("times", [2, 3])
def test_of_several_revocations_in_one_millisecond_each_ends_what_came_before(kept: SessionStore, times: int) -> None:
    """In the backend too, where the moment of the login alone can tell."""
    for _ in range(times):
        session = login(kept)
        leave_memory(kept, session)
        kept.sync.revoke_user("ada")
        assert kept.sync.flush()
        assert kept.sync.sessions("ada") == []


# ── from where ────────────────────────────────────────────────────────────────────────────────────────────────


Ask = Callable[[SessionStore, dict[str, str], str], None]
"""Log in over HTTP, with these headers, from this address."""


def ask_asgi(store: SessionStore, headers: dict[str, str], peer: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        Session.of(scope).renew(user_id="ada")
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def send(message: Any) -> None:
        pass

    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"type": "http", "path": "/", "headers": raw, "client": (peer, 1) if peer else None, "scheme": "http"}
    asyncio.run(AsgiMiddleware(app, store)(scope, send, send))  # type: ignore[arg-type]


def ask_wsgi(store: SessionStore, headers: dict[str, str], peer: str) -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        Session.of(environ).renew(user_id="ada")
        start_response("204 No Content", [])
        return []

    environ = {"HTTP_" + name.upper().replace("-", "_"): value for name, value in headers.items()}
    WsgiMiddleware(app, store)({"PATH_INFO": "/", "REMOTE_ADDR": peer, **environ}, lambda *_: print)


@pytest.mark.parametrize("ask", [ask_asgi, ask_wsgi])
@pytest.mark.parametrize("settings", [{}, {"bind_to": ("ip",)}], ids=["simple", "bound"])
def test_a_login_notes_who_asked_and_roughly_from_where(place: Path, ask: Ask, settings: dict[str, Any]) -> None:
    agent = "Mozilla/5.0 (X11; Linux) \x1b[31mFirefox/1\r\n" + "x" * 300
    with make_store(place, **settings) as store:
        ask(store, {"User-Agent": agent, "X-Forwarded-For": "203.0.113.9"}, "192.0.2.77")
        (info,) = store.sync.sessions("ada")
    assert info.user_agent.startswith("Mozilla/5.0 (X11; Linux) [31mFirefox/1xxx")
    assert (len(info.user_agent), info.address) == (200, "192.0.2.0/24"), "nobody trusts what it says of others"


@pytest.mark.parametrize("ask", [ask_asgi, ask_wsgi])
@pytest.mark.parametrize(
    ("peer", "header", "value", "address"),
    [
        ("10.0.0.1", "X-Forwarded-For", "6.6.6.6, 203.0.113.9", "203.0.113.0/24"),
        ("10.0.0.1", "Forwarded", 'for="[2001:db8:1:2:3::4]:99"', "2001:db8:1::/48"),
        ("10.0.0.1", "X-Real-IP", "::ffff:203.0.113.9", "203.0.113.0/24"),
        ("10.0.0.1", "Forwarded", "for=_hidden", ""),
        ("10.0.0.1", "X-Forwarded-For", "", "10.0.0.0/24"),
        ("", "X-Forwarded-For", "", ""),
    ],
)
def test_behind_proxies_it_is_the_clients_address_that_is_noted(
    place: Path, ask: Ask, peer: str, header: Any, value: str, address: str
) -> None:
    with make_store(place, trusted_proxies=1, proxy_header=header) as store:
        ask(store, {header: value} if value else {}, peer)
        (info,) = store.sync.sessions("ada")
    assert (info.user_agent, info.address) == ("", address)


def test_what_is_not_to_be_recorded_is_not(place: Path) -> None:
    with make_store(place, record_device=False) as store:
        ask_asgi(store, {"User-Agent": "Firefox"}, "192.0.2.77")
        (info,) = store.sync.sessions("ada")
        assert (info.user_agent, info.address) == ("", "")
        assert b"Firefox" not in b"".join(contents(store.memory).records.values())


def test_a_session_without_room_for_it_logs_in_all_the_same(place: Path) -> None:
    with make_store(place, max_size=256) as store:
        ask_asgi(store, {"User-Agent": "é" * 200}, "192.0.2.77")
        (info,) = store.sync.sessions("ada")
    assert (info.user_agent, info.address) == ("", "")


def test_another_login_replaces_what_is_known_of_the_client_and_a_new_id_keeps_it(store: SessionStore) -> None:
    ask_asgi(store, {"User-Agent": "Firefox"}, "192.0.2.77")
    (info,) = store.sync.sessions("ada")
    held = store.memory.load(bytes.fromhex(info.handle), store.clock.now())
    assert isinstance(held, Record)
    session = store.session()
    session.start(Resolved("x" * 43, bytes.fromhex(info.handle), held))
    session.renew()
    session.save()
    assert [one.user_agent for one in store.sync.sessions("ada")] == ["Firefox"]
    login(store, "ada", session)
    assert [one.user_agent for one in store.sync.sessions("ada")] == [""]


# ── with a backend ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def kept(place: Path, clock: ManualClock) -> Iterator[SessionStore]:
    """A store with a database behind it."""
    config = make_store(place, clock=clock, max_sessions_per_user=3).config
    with SessionStore(f"sqlite:///{place}/sessions.db", config=config, clock=clock) as store:
        yield store


def leave_memory(store: SessionStore, *sessions: Session) -> None:
    """They are in the backend only."""
    assert store.sync.flush()

    def work(txn: Txn, tables: Tables) -> None:
        for session in sessions:
            assert session.raw_handle is not None
            raw = txn.get(session.raw_handle, db=tables.records)
            remove(txn, tables, session.raw_handle, unpack_header(raw))  # type: ignore[arg-type]

    store.memory.environment.write(work)


def lose_memory(store: SessionStore) -> None:
    """As by a reboot."""
    assert store.sync.flush()
    store.close()
    shutil.rmtree(store.path)
    store.close()


def broken(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend answers no question about sessions."""

    async def fail(*_: object) -> None:
        raise BackendError("out of order")

    for question in ("load", "sessions_of"):
        monkeypatch.setattr(store._backend, question, fail)


def test_the_list_has_what_only_the_backend_has(kept: SessionStore, clock: ManualClock) -> None:
    """Memory knows best: of what both have, and of what has ended there a moment ago."""
    sessions = [login(kept) for _ in range(3)]
    before = kept.sync.sessions("ada")
    assert len(before) == 3
    leave_memory(kept, sessions[0])
    assert kept.sync.sessions("ada") == asyncio.run(kept.sessions("ada")) == before
    assert kept.count() == 2, "a look brings nothing into memory"
    sessions[1].destroy()
    assert {one.handle for one in kept.sync.sessions("ada")} == {sessions[0].handle, sessions[2].handle}
    clock.advance(hours=7)
    assert kept.sync.sessions("ada") == []


def test_a_list_is_whole_or_an_error(kept: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    session = login(kept)
    broken(kept, monkeypatch)
    asks: list[Callable[[], object]] = [
        lambda: kept.sync.sessions("ada"), lambda: asyncio.run(kept.sessions("ada")),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(BackendError, match=r"out of order|has just failed"):
            ask()
    assert again(kept, session).user_id == "ada"


def test_what_only_the_backend_has_ends_by_its_handle(kept: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it cannot say what it has, too: a tombstone waits for it, and for who comes meanwhile."""
    sessions = [login(kept) for _ in range(3)]
    leave_memory(kept, *sessions)
    handles = [session.handle or "" for session in sessions]
    assert kept.sync.revoke(handles[0]) is asyncio.run(kept.revoke(handles[1])) is True
    assert kept.sync.revoke("ab" * 20) is asyncio.run(kept.revoke("ab" * 20)) is False
    with monkeypatch.context() as patch:
        broken(kept, patch)
        assert kept.sync.revoke(handles[2]) is True
        assert not again(kept, sessions[2]).exists
    lose_memory(kept)
    assert not any(again(kept, session).exists for session in sessions)


def test_who_revokes_the_handle_of_a_watermark_keeps_nobody_from_logging_in(
    kept: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody can compute it; while the backend cannot say that it is no session, a tombstone is put there."""
    session = login(kept)
    with monkeypatch.context() as patch:
        broken(kept, patch)
        kept.sync.revoke(watermark_of(encode("ada")).hex())
    assert login(kept).user_id == "ada"
    assert kept.sync.revoke_user("ada") == 2
    assert not again(kept, session).exists


@pytest.mark.parametrize("works", [True, False], ids=["up", "in trouble"])
def test_what_only_the_backend_has_of_a_user_is_never_let_in_again(
    kept: SessionStore, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    kept.behind.close()  # nobody flushes in between
    kept._behind = None
    monkeypatch.setattr(kept, "wrote", lambda: None)
    sessions = [login(kept) for _ in range(3)]
    leave_memory(kept, *sessions[:2])
    with monkeypatch.context() as patch:
        if not works:
            broken(kept, patch)
        assert kept.sync.revoke_user("ada") == 1
    kept.memory.environment.backend_down_until = 0  # it is asked again at once
    assert kept.sync.sessions("ada") == []
    assert not any(again(kept, session).exists for session in sessions)
    lose_memory(kept)
    assert not any(again(kept, session).exists for session in sessions)


def test_who_flushes_ends_what_somebody_left_who_died_while_revoking(
    kept: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [login(kept) for _ in range(3)]
    write = kept.memory._writer.write

    def write_and_die(work: Work[Any]) -> Any:
        monkeypatch.undo()
        write(work)
        raise KeyboardInterrupt

    monkeypatch.setattr(memory_users, "CHUNK", 1)
    monkeypatch.setattr(kept.memory._writer, "write", write_and_die)
    with pytest.raises(KeyboardInterrupt):
        kept.memory.users.revoke(encode("ada"))
    assert kept.sync.flush()
    assert not any(again(kept, session).exists for session in sessions)


def test_the_kept_session_survives_the_loss_of_memory(kept: SessionStore, clock: ManualClock) -> None:
    """Also one that only the backend had, and one that got a new id since."""
    for by_handle in (False, True):
        kept_one, other = login(kept), login(kept)
        leave_memory(kept, kept_one, other)
        kept.sync.revoke_user("ada", keep=kept_one.handle if by_handle else kept_one)
        lose_memory(kept)
        assert again(kept, kept_one).user_id == "ada"
        assert not again(kept, other).exists
        kept_one = again(kept, kept_one)
        kept_one.renew()
        kept_one.save()
        lose_memory(kept)
        assert [one.handle for one in kept.sync.sessions("ada")] == [kept_one.handle]
        clock.advance(1)
        asyncio.run(kept.revoke_user("ada"))


def test_a_limit_counts_what_was_recalled(kept: SessionStore) -> None:
    sessions = [login(kept) for _ in range(3)]
    leave_memory(kept, *sessions)
    kept.sync.recall_user("ada")
    assert kept.count() == 3
    leave_memory(kept, *sessions)
    asyncio.run(kept.recall_user("ada"))
    fourth = login(kept)
    listed = {one.handle for one in kept.sync.sessions("ada")}
    assert len(listed) == 3
    assert fourth.handle in listed


def test_no_answer_of_a_backend_is_taken_for_another_users(kept: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of users with the same tag, each is shown and revoked alone, in the backend too."""
    for module in (drafting, memory_users, behind, revoking):
        monkeypatch.setattr(module, "tag_of", lambda _: b"the same")
    ada, bob = login(kept), login(kept, "bob")
    leave_memory(kept, ada, bob)
    assert [one.handle for one in kept.sync.sessions("bob")] == [bob.handle]
    kept.sync.revoke_user("ada")
    lose_memory(kept)
    assert again(kept, bob).user_id == "bob"
    assert not again(kept, ada).exists


def test_what_memory_has_for_others_to_read_is_for_them_to_end(
    kept: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a login that came after the revocation; what was there before has ended with it."""
    session = login(kept)
    leave_memory(kept, session)

    def unreadable(*_: object) -> None:
        raise Unreadable("sealed by others")

    with monkeypatch.context() as patch:
        patch.setattr(kept.memory, "load", unreadable)
        kept.sync.revoke_user("ada")
        assert kept.sync.flush()
    assert set(kept.behind.sessions_of(encode("ada"))) == {session.raw_handle}


def test_rows_that_nobody_can_read_end_with_their_user(kept: SessionStore, place: Path) -> None:
    """The tag is theirs, and to keep them would be to let somebody in who should not be."""
    session = login(kept)
    leave_memory(kept, session)
    with contextlib.closing(sqlite3.connect(place / "sessions.db", isolation_level=None)) as file:
        file.execute("UPDATE shmsession SET body = x'00' WHERE handle = ?", [session.raw_handle])
    with pytest.raises(BackendError, match="is damaged"):
        kept.sync.sessions("ada")
    kept.sync.revoke_user("ada")
    assert kept.sync.flush()
    assert kept.sync.sessions("ada") == []
