"""Flash messages: shown once, in order, and lost to no race."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shmsession import Session, SessionStore, codec, register_type
from shmsession.errors import ReadOnlySession, SessionTooLarge, UnsupportedValue
from shmsession.flashes import Flash
from shmsession.testing import make_store
from tests.asking import PROTOCOLS, Visitor


class Notice:
    """A type of an application."""


@pytest.fixture
def store(place: Path) -> Iterator[SessionStore]:
    with make_store(place, max_size=4096) as store:
        yield store


@pytest.fixture(params=PROTOCOLS)
def visitor(request: pytest.FixtureRequest, store: SessionStore) -> Visitor:
    return Visitor(store, request.param)


def test_messages_are_shown_once_oldest_first(visitor: Visitor) -> None:
    """They wait for the page that shows them, however many requests come before it."""
    visitor.ask(lambda session: session.flash("saved"))

    def two(session: Session) -> None:
        session.flash("careful", "warning")
        session.flash({"undo": 7})

    visitor.ask(two)
    assert visitor.data() == {}
    found = visitor.ask(lambda session: session.flashes()).result
    assert found == [("saved", "info"), ("careful", "warning"), ({"undo": 7}, "info")]
    assert isinstance(found[0], Flash)
    assert visitor.ask(lambda session: session.flashes()).result == []


def test_a_category_can_be_shown_by_itself_and_all_be_looked_at(visitor: Visitor) -> None:
    def leave(session: Session) -> None:
        for number in range(3):
            session.flash(number, "a" if number % 2 else "b")

    visitor.ask(leave)
    assert visitor.ask(lambda session: session.flashes("b", keep=True)).result == [(0, "b"), (2, "b")]
    assert visitor.ask(lambda session: session.flashes("a")).result == [(1, "a")]
    assert visitor.ask(lambda session: session.flashes(keep=True)).result == [(0, "b"), (2, "b")]
    assert visitor.ask(lambda session: len(session.flashes())).result == 2


def test_a_message_of_a_type_that_is_gone_hides_no_other(
    visitor: Visitor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A release has renamed it: the page must not fail until the session ends."""
    with monkeypatch.context() as before:
        before.setattr("shmsession.codec._by_class", dict(codec._by_class))
        before.setattr("shmsession.codec._by_name", dict(codec._by_name))
        register_type(Notice, name="notice", encode=vars, decode=lambda _: Notice())

        def leave(session: Session) -> None:
            session.flash(Notice())
            session.flash("welcome")

        visitor.ask(leave)
    assert visitor.ask(lambda session: session.flashes(keep=True)).result == [("welcome", "info")]
    assert visitor.ask(lambda session: session.flashes("info")).result == [("welcome", "info")]
    assert len([text for text in caplog.messages if "'notice'" in text]) == 2
    assert visitor.ask(lambda session: session.flashes()).result == []
    assert visitor.ask(lambda session: session.flashes()).result == []
    assert len([text for text in caplog.messages if "'notice'" in text]) == 3, "it goes when all are shown"


def test_they_are_no_keys_of_the_application(visitor: Visitor) -> None:
    """The mapping shows what the application put there."""

    def use(session: Session) -> None:
        session.flash("x")
        assert (len(session), list(session), session.to_dict()) == (0, [], {})
        session["a"] = 1
        assert session == {"a": 1}

    visitor.ask(use)
    assert visitor.ask(lambda session: (session.to_dict(), len(session.flashes()))).result == ({"a": 1}, 1)


def test_requests_that_leave_one_at_the_same_time_lose_none(store: SessionStore) -> None:
    """And one that shows them meanwhile takes those that it saw."""
    visitor = Visitor(store)
    visitor.ask(lambda session: session.flash("first"))
    header = f"session={visitor.cookies['session']}".encode()
    requests = [store.request_session(lambda: header) for _ in range(20)]
    reader = store.request_session(lambda: header)
    assert [flash.message for flash in reader.flashes()] == ["first"]
    for number, session in enumerate(requests):
        session.flash(number)
    for session in (*requests, reader):
        store.commit(session)
    assert sorted(flash.message for flash in visitor.ask(lambda session: session.flashes()).result) == list(range(20))


def test_looking_for_messages_writes_nothing(store: SessionStore) -> None:
    visitor = Visitor(store)
    visitor.ask(lambda session: session.update(a=1))

    def transactions() -> int:
        return int(store.memory.environment.open().env.info()["last_txnid"])

    before = transactions()
    assert visitor.ask(lambda session: session.flashes()).result == []
    assert transactions() == before


def test_a_message_left_in_a_request_is_there_in_it_and_goes_with_what_fails(visitor: Visitor) -> None:
    def leave_and_show(session: Session) -> list[Flash]:
        session.flash("a")
        session.flash("b")
        return session.flashes()

    assert [flash.message for flash in visitor.ask(leave_and_show).result] == ["a", "b"]
    assert visitor.cookies == {}
    visitor.ask(lambda session: session.flash("lost"), status=500)
    assert visitor.ask(lambda session: session.flashes()).result == []


def test_a_message_outlives_a_login_and_a_logout_by_clear(visitor: Visitor) -> None:
    """`clear()` with a goodbye is a session with a goodbye, and nobody's."""

    def login(session: Session) -> None:
        session.flash("welcome")
        session.renew(user_id="ada")

    visitor.ask(login)
    assert visitor.ask(lambda session: session.flashes()).result == [("welcome", "info")]

    def logout(session: Session) -> None:
        session["cart"] = ["tea"]
        session.clear()
        session.flash("goodbye")

    visitor.ask(logout)
    assert visitor.ask(lambda session: (session.user_id, session.to_dict())).result == (None, {})
    assert visitor.ask(lambda session: session.flashes()).result == [("goodbye", "info")]


def test_what_cannot_be_stored_is_refused_when_it_is_left(visitor: Visitor) -> None:
    """With the same bounds as everything in the session."""

    def leave(session: Session) -> None:
        with pytest.raises(UnsupportedValue, match="flash message"):
            session.flash(object())
        with pytest.raises(SessionTooLarge, match=r"^this would make the session"):
            session.flash("x" * 5000)
        assert session.flashes() == []

    visitor.ask(leave)


def test_a_read_only_session_can_look_and_not_take(store: SessionStore) -> None:
    """`Session.of(request, readonly=True)`: from then on, in this request."""
    visitor = Visitor(store)
    visitor.ask(lambda session: session.flash("a"))

    def look(session: Session) -> None:
        readonly = Session.of({"session": session}, readonly=True)
        assert readonly is session
        assert [flash.message for flash in session.flashes(keep=True)] == ["a"]
        for verb in (session.flashes, session.clear, session.destroy, session.create, lambda: session.set_store(True)):
            with pytest.raises(ReadOnlySession):
                verb()

    visitor.ask(look)
    assert len(visitor.ask(lambda session: session.flashes()).result) == 1


def test_what_a_request_changed_before_it_became_read_only_is_an_error(store: SessionStore) -> None:
    """Not dropped in silence; and nothing is written."""
    visitor = Visitor(store)
    visitor.ask(lambda session: session.update(a=1))

    def change_first(session: Session) -> None:
        session["a"] = 2
        Session.of({"session": session}, readonly=True)

    with pytest.raises(ReadOnlySession, match="before it was opened read-only"):
        visitor.ask(change_first)
    assert visitor.data() == {"a": 1}
