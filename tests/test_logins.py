"""What a session knows of its login, and what is known of all sessions of a user."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shmsession import Session, SessionStore
from shmsession.codec import encode
from shmsession.ids import tag_of
from shmsession.testing import ManualClock, make_store

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
