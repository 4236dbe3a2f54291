"""What a commit does, and does not: over a real store, with the clock in hand."""

import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from shmsession.commit import Outcome
from shmsession.errors import (
    ContentionError,
    ReadOnlySession,
    ResponseStarted,
    SessionGone,
    SessionTooLarge,
    StoreFull,
    UnsupportedValue,
)
from shmsession.hooks import CommitDropped, CookieRefused, Created, Destroyed, Event, Expired, LoggedIn
from shmsession.hooks import Renewed as RenewedEvent
from shmsession.session import Session
from shmsession.store import SessionStore
from shmsession.testing import ManualClock, make_store
from tests.commit_worker import GONE, Slots
from tests.figures import report, size
from tests.properties import child_environment, machine_settings

HOUR = 3600


class Browser:
    """One cookie jar in front of one store."""

    def __init__(self, store: SessionStore) -> None:
        self.store = store
        self.cookie = b""
        self.sent: list[str] = []

    def request(self, **options: Any) -> Session:
        cookie = self.cookie
        return self.store.request_session(lambda: cookie, **options)

    def answer(self, session: Session, *, failed: bool = False) -> Outcome:
        """The response's headers leave."""
        outcome = self.store.commit(session, failed=failed)
        session.headers_sent = True
        if outcome.set_cookie is not None:
            self.sent.append(outcome.set_cookie)
            value = outcome.set_cookie.split(";")[0]
            self.cookie = b"" if "Max-Age=0;" in outcome.set_cookie else value.encode()
        return outcome

    def stored(self, **data: Any) -> Session:
        """A session with data, committed."""
        session = self.request()
        session.update(data)
        self.answer(session)
        return session

    def login(self, user: str, **data: Any) -> Session:
        session = self.request()
        session.update(data)
        session.renew(user_id=user)
        self.answer(session)
        return session

    def data(self) -> dict[str, Any]:
        return self.request().to_dict()


ORDINARY = (Created, RenewedEvent, Destroyed, Expired, LoggedIn)
"""Events that are no news here."""


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def store(place: Path, events: list[Event]) -> Iterator[SessionStore]:
    with make_store(place) as made:
        made.hooks._hooks = (lambda event: None if isinstance(event, ORDINARY) else events.append(event),)
        yield made


@pytest.fixture
def browser(store: SessionStore) -> Browser:
    return Browser(store)


@pytest.fixture
def clock(store: SessionStore) -> ManualClock:
    assert isinstance(store.clock, ManualClock)
    return store.clock


def last_transaction(store: SessionStore) -> int:
    return int(store.memory.environment.open().env.info()["last_txnid"])


def bytes_of(session: Session) -> bytes | None:
    """The stored record, raw."""
    assert session.raw_handle is not None
    store = session.port
    assert isinstance(store, SessionStore)
    return store.memory.environment.get(session.raw_handle)


# ── reading never writes ───────────────────────────────────────────────────────────────────────────────────────


def test_a_reader_never_writes(browser: Browser) -> None:
    """Whatever is looked at, mutable or not: no transaction, no changed byte, no cookie; only Vary."""
    first = browser.stored(cart=["tea"], tags={"a", "b", "c"}, n=1, deep={"x": [{"y": (1, 2)}]})
    before, raw = last_transaction(browser.store), bytes_of(first)
    for _ in range(3):
        session = browser.request()
        assert session["cart"] == ["tea"]
        assert session.to_dict() == first.to_dict()
        assert (session.id, session.user_id, session.is_new) == (first.id, None, False)
        assert session.expires_at is not None
        assert not session.modified
        assert browser.answer(session) == Outcome(vary=True)
    assert last_transaction(browser.store) == before
    assert bytes_of(first) == raw


def test_a_request_that_never_looks_asks_nothing_of_the_response(browser: Browser) -> None:
    """No Vary, and the cookie is not even read."""
    browser.stored(n=1)

    def never() -> bytes:
        raise AssertionError("the cookie was read")

    session = browser.store.request_session(never)
    assert browser.answer(session) == Outcome()


def test_nothing_is_created_for_a_visitor_who_stores_nothing(browser: Browser) -> None:
    """Reading, failing look-ups, defaults, pops, clearing, settings without data: no record, no cookie."""
    before = last_transaction(browser.store)
    for use in (
        lambda it: it.get("a"),
        lambda it: dict(it),
        lambda it: it.pop("a", None),
        lambda it: it.clear(),
        lambda it: it.set_longterm(True),
        lambda it: it.set_store(False),
        lambda it: it.touch(),
        lambda it: it.renew(),
        lambda it: it.renew(user_id=None),
        lambda it: it.destroy(),
        lambda it: (it.update(a=1), it.pop("a")),
        lambda it: it.save(),
    ):
        session = browser.request()
        use(session)
        assert browser.answer(session) == Outcome(vary=True)
        assert session.is_new
    assert (last_transaction(browser.store), browser.store.count()) == (before, 0)


@pytest.mark.parametrize("value", [["tea"], {"a": {1, 2, 3}}, 5, "text", None, (1, [2])])
def test_assigning_what_is_stored_already_writes_nothing(browser: Browser, value: Any) -> None:
    """`session["x"] = session["x"]` is a reader too."""
    first = browser.stored(x=value)
    before, raw = last_transaction(browser.store), bytes_of(first)
    session = browser.request()
    session["x"] = session["x"]
    assert browser.answer(session) == Outcome(vary=True)
    assert (last_transaction(browser.store), bytes_of(first)) == (before, raw)


def test_assigning_what_was_stored_wins_when_another_request_changed_it_meanwhile(browser: Browser) -> None:
    """An assignment is an assignment: the last commit of a key wins."""
    browser.stored(x=1, y=1)
    slow, quick = browser.request(), browser.request()
    slow["x"] = 1
    quick["x"] = 2
    quick["y"] = 2
    browser.answer(quick)
    browser.answer(slow)
    assert browser.data() == {"x": 1, "y": 2}


def test_values_that_went_and_came_back_write_nothing(browser: Browser) -> None:
    """What counts is how the value is at the commit."""
    first = browser.stored(cart=["tea"])
    raw = bytes_of(first)
    session = browser.request()
    session["cart"].append("milk")
    modified = [session.modified]
    session["cart"].pop()
    assert [*modified, session.modified] == [True, False]
    browser.answer(session)
    assert bytes_of(first) == raw


# ── nested edits ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("value", "edit", "expected"),
    [
        (["tea"], lambda it: it.append("milk"), ["tea", "milk"]),
        ({"a": {"b": [1]}}, lambda it: it["a"]["b"].append(2), {"a": {"b": [1, 2]}}),
        ({1, 2}, lambda it: it.discard(1), {2}),
        (([1], 2), lambda it: it[0].append(3), ([1, 3], 2)),
        ({"a": 1}, lambda it: it.clear(), {}),
        ([1, 2], lambda it: it.reverse(), [2, 1]),
        ([1], lambda it: it.__setitem__(0, True), [True]),
        ([0.0], lambda it: it.__setitem__(0, -0.0), [-0.0]),
    ],
)
def test_nested_edits_are_noticed(browser: Browser, value: Any, edit: Callable[[Any], None], expected: Any) -> None:
    """However deep, also between values that compare equal; nobody marks a session modified."""
    browser.stored(x=value)
    session = browser.request()
    edit(session["x"])
    assert session.modified
    browser.answer(session)
    assert repr(browser.data()["x"]) == repr(expected)


def test_nested_edits_after_an_assignment_or_setdefault_are_noticed(browser: Browser) -> None:
    """The object that was assigned is the session's own."""
    session = browser.request()
    session.setdefault("cart", []).append("tea")
    mine: dict[str, list[int]] = {"x": []}
    session["mine"] = mine
    mine["x"].append(1)
    browser.answer(session)
    assert browser.data() == {"cart": ["tea"], "mine": {"x": [1]}}


def test_nested_edits_after_a_commit_are_noticed_on_the_objects_from_before(browser: Browser) -> None:
    """A stream or websocket that goes on with the list it has; also when the commit itself had nothing to write."""
    browser.stored(cart=["tea"], same=1)
    session = browser.request()
    cart = session["cart"]
    session["same"] = 1
    browser.answer(session)
    cart.append("milk")
    browser.store.commit(session)
    assert browser.data()["cart"] == ["tea", "milk"]
    cart.append("salt")
    session.save()
    assert browser.data()["cart"] == ["tea", "milk", "salt"]
    assert session["cart"] is cart


def test_a_nested_edit_that_cannot_be_stored_names_its_key_and_writes_nothing(browser: Browser) -> None:
    """At the commit, which is the first to see it."""
    first = browser.stored(cart=["tea"], n=1)
    raw = bytes_of(first)
    session = browser.request()
    session["cart"].append(object())
    session["n"] = 2
    with pytest.raises(UnsupportedValue, match=r"session\['cart'\]"):
        browser.answer(session)
    assert bytes_of(first) == raw


# ── merging ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_two_requests_that_change_different_keys_both_survive(browser: Browser) -> None:
    """Assignments, nested edits and deletions, in either order of commit."""
    for order in (0, 1):
        browser.cookie = b""
        browser.stored(a=1, b=1, cart=["tea"], gone=1)
        one, two = browser.request(), browser.request()
        one["a"] = 2
        one["cart"].append("milk")
        two["b"] = 2
        del two["gone"]
        for session in (one, two) if order else (two, one):
            browser.answer(session)
        assert browser.data() == {"a": 2, "b": 2, "cart": ["tea", "milk"]}


def test_on_the_same_key_the_last_commit_wins(browser: Browser) -> None:
    """The last commit, not the last assignment."""
    browser.stored(a=0)
    one, two = browser.request(), browser.request()
    two["a"] = 2
    one["a"] = 1
    browser.answer(one)
    browser.answer(two)
    assert browser.data() == {"a": 2}


def test_a_deleted_key_is_not_brought_back_by_anothers_commit(browser: Browser) -> None:
    """Not by one that had read it, mutable or not."""
    browser.stored(a=1, cart=["tea"], n=1)
    slow, quick = browser.request(), browser.request()
    assert slow.to_dict() == {"a": 1, "cart": ["tea"], "n": 1}
    del quick["a"]
    del quick["cart"]
    browser.answer(quick)
    slow["n"] = 2
    browser.answer(slow)
    assert browser.data() == {"n": 2}


def test_a_key_deleted_by_one_and_set_by_a_later_commit_is_there(browser: Browser) -> None:
    """The last commit of a key wins, deletions included."""
    browser.stored(a=1, n=1)
    one, two = browser.request(), browser.request()
    del one["a"]
    two["a"] = 2
    browser.answer(one)
    browser.answer(two)
    assert browser.data() == {"a": 2, "n": 1}
    three, four = browser.request(), browser.request()
    three["a"] = 3
    del four["a"]
    browser.answer(three)
    browser.answer(four)
    assert browser.data() == {"n": 1}


def test_a_request_sees_its_session_as_it_was_loaded_until_it_commits(browser: Browser) -> None:
    """Repeatable reads; after its own commit it stands at what is stored."""
    browser.stored(a=1, b=1)
    slow, quick = browser.request(), browser.request()
    assert slow["a"] == 1
    quick.update(a=2, b=2)
    browser.answer(quick)
    assert (slow["a"], slow["b"]) == (1, 1)
    slow["c"] = 1
    slow.save()
    assert slow.to_dict() == {"a": 2, "b": 2, "c": 1}


def test_what_was_read_stays_as_it_was_read_though_an_increment_meets_newer_data(browser: Browser) -> None:
    """The increment stands at the record as it is now; keys that were read, deleted ones too, do not jump."""
    browser.stored(read=1, unread=1, gone=1, hits=0)
    slow, quick = browser.request(), browser.request()
    assert (slow["read"], slow["gone"]) == (1, 1)
    quick.update(read=2, unread=2)
    del quick["gone"]
    browser.answer(quick)
    assert slow.increment("hits") == 1
    assert slow.to_dict() == {"read": 1, "unread": 2, "gone": 1, "hits": 1}
    browser.answer(slow)
    assert browser.data() == {"read": 2, "unread": 2, "hits": 1}


# ── increment and apply ────────────────────────────────────────────────────────────────────────────────────────


def test_increment_is_stored_at_once_and_counts_from_nothing(browser: Browser) -> None:
    """Before the response; another request sees it; by any number."""
    browser.stored(a=1)
    session = browser.request()
    assert session.increment("hits") == 1
    assert browser.data() == {"a": 1, "hits": 1}
    assert session.increment("hits", 5) == 6
    assert session.increment("hits", -0.5) == 5.5
    assert session["hits"] == 5.5
    assert browser.data()["hits"] == 5.5
    assert not session.modified


def test_increments_of_interleaved_requests_all_count(browser: Browser) -> None:
    """Also of those that had read the old number, before and after."""
    browser.stored(hits=0)
    sessions = [browser.request() for _ in range(5)]
    assert [session["hits"] for session in sessions] == [0] * 5
    sums = [session.increment("hits") for _ in range(4) for session in sessions]
    assert sums == list(range(1, 21))
    for session in sessions:
        session["other"] = 1
        browser.answer(session)
    assert browser.data() == {"hits": 20, "other": 1}


def test_a_later_commit_does_not_undo_anothers_increments(browser: Browser) -> None:
    """Value and baseline were replaced both: the commit writes only what it changed."""
    browser.stored(hits=0, cart=[])
    slow = browser.request()
    assert slow.increment("hits") == 1
    slow["cart"].append("tea")
    browser.request().increment("hits")
    browser.answer(slow)
    assert browser.data() == {"hits": 2, "cart": ["tea"]}


def test_a_failing_response_keeps_increments_and_drops_the_rest(browser: Browser) -> None:
    """They have happened already."""
    browser.stored(hits=0, a=1)
    session = browser.request()
    session["a"] = 2
    session.increment("hits")
    session["b"] = 1
    session.apply("list", lambda items: [*items, 1], [])
    assert browser.answer(session, failed=True).set_cookie is None
    assert browser.data() == {"hits": 1, "a": 1, "list": [1]}


def test_on_a_session_not_stored_yet_increment_and_apply_are_assignments(browser: Browser) -> None:
    """Nothing is stored before the commit, and a failing response stores nothing."""
    session = browser.request()
    assert session.increment("hits") == 1
    assert session.apply("cart", lambda items: [*items, "tea"], []) == ["tea"]
    session["cart"].append("milk")
    assert browser.store.count() == 0
    browser.answer(session)
    assert browser.data() == {"hits": 1, "cart": ["tea", "milk"]}
    browser.cookie = b""
    failing = browser.request()
    failing.increment("hits")
    browser.answer(failing, failed=True)
    assert browser.store.count() == 1


@pytest.mark.parametrize("pending", ["assigned", "deleted", "cleared", "nested"])
def test_on_a_key_with_a_pending_change_they_act_on_the_requests_own_data(browser: Browser, pending: str) -> None:
    """What the request did first comes first; all of it is stored by its commit."""
    browser.stored(a=1, cart=[1])
    session = browser.request()
    key, expected = "a", 1
    if pending == "assigned":
        session["a"], expected = 10, 11
    elif pending == "deleted":
        del session["a"]
    elif pending == "cleared":
        session.clear()
    else:
        session["cart"].append(2)
        key = "cart"
    if key == "a":
        assert session.increment("a") == expected
    else:
        assert session.apply("cart", lambda items: [*items, 3]) == [1, 2, 3]
    assert browser.data() == {"a": 1, "cart": [1]}
    browser.answer(session)
    assert browser.data()[key] == (expected if key == "a" else [1, 2, 3])


def test_pending_changes_of_other_keys_wait_for_the_commit(browser: Browser) -> None:
    """An increment commits itself and nothing else."""
    browser.stored(hits=0, a=1, b=1, cart=[1])
    session = browser.request()
    session["a"] = 2
    del session["b"]
    session["cart"].append(2)
    assert session.increment("hits") == 1
    assert browser.data() == {"hits": 1, "a": 1, "b": 1, "cart": [1]}
    assert session.to_dict() == {"hits": 1, "a": 2, "cart": [1, 2]}
    browser.answer(session)
    assert browser.data() == {"hits": 1, "a": 2, "cart": [1, 2]}


def test_a_nested_edit_of_what_apply_returned_is_noticed(browser: Browser) -> None:
    """It is the session's own object from then on."""
    browser.stored(n=1)
    session = browser.request()
    session.apply("cart", lambda items: [*items, 1], []).append(2)
    assert browser.data()["cart"] == [1]
    browser.answer(session)
    assert browser.data()["cart"] == [1, 2]


def test_apply_runs_again_when_the_value_changed_and_gives_up_in_the_end(browser: Browser) -> None:
    """Its function sees the newest value each time; an opponent who always wins is a ContentionError."""
    browser.stored(n=0)
    session, seen = browser.request(), []

    def once(value: int) -> int:
        seen.append(value)
        if len(seen) < 3:
            browser.request().increment("n", 10)
        return value + 1

    assert session.apply("n", once) == 21
    assert seen == [0, 10, 20]

    def always(value: int) -> int:
        browser.request().increment("n")
        return value

    with pytest.raises(ContentionError, match="changed under each of 100 attempts"):
        session.apply("n", always)
    assert browser.data()["n"] == 121


@pytest.mark.parametrize("value", ["1", None, [1], True])
def test_only_numbers_are_incremented(browser: Browser, value: Any) -> None:
    """A TypeError that names the key, and nothing is stored; True is no number."""
    browser.stored(n=value)
    with pytest.raises(TypeError, match=r"session\['n'\] is a \w+, not a number"):
        browser.request().increment("n")
    assert browser.data() == {"n": value}


# ── destroy, clear, renew ──────────────────────────────────────────────────────────────────────────────────────


def gone_at(browser: Browser, cookie: bytes) -> bool:
    session = browser.store.request_session(lambda: cookie)
    return session.is_new and not session


@pytest.mark.parametrize("failed", [False, True])
def test_destroy_acts_at_once_and_survives_a_failing_response(browser: Browser, failed: bool) -> None:
    """In all processes, before the response; which takes the cookie away."""
    browser.stored(a=1)
    cookie, session = browser.cookie, browser.request()
    session.destroy()
    assert gone_at(browser, cookie)
    assert session == {}
    assert session.is_new
    outcome = browser.answer(session, failed=failed)
    assert outcome.set_cookie == "session=; Max-Age=0; Path=/; SameSite=Lax; HttpOnly"
    assert gone_at(browser, cookie)


def test_logging_out_with_a_cookie_that_is_no_session_takes_it_away_too(browser: Browser) -> None:
    """A browser must not go on sending junk; without a cookie there is nothing to take."""
    for cookie in (b"session=junk", b"session=" + b"A" * 92, b"a=1; session=x"):
        browser.cookie = cookie
        session = browser.request()
        session.destroy()
        assert "Max-Age=0;" in str(browser.answer(session).set_cookie)
    browser.cookie = b"a=1"
    session = browser.request()
    session.destroy()
    assert browser.answer(session).set_cookie is None


def test_what_is_stored_after_destroy_begins_a_new_session(browser: Browser) -> None:
    """With a new id and its cookie; nothing of the old one is in it."""
    old = browser.login("ada", a=1)
    old_id, cookie = old.id, browser.cookie
    session = browser.request()
    session.destroy()
    session["b"] = 2
    assert "Max-Age=34560000" in str(browser.answer(session).set_cookie)
    assert browser.data() == {"b": 2}
    assert session.id != old_id
    assert session.user_id is None
    assert gone_at(browser, cookie)


def test_clear_and_nothing_more_logs_out(browser: Browser) -> None:
    """As users of Flask and Starlette do it."""
    browser.login("ada", a=1)
    cookie, session = browser.cookie, browser.request()
    session.clear()
    assert not gone_at(browser, cookie)
    assert "Max-Age=0;" in str(browser.answer(session).set_cookie)
    assert gone_at(browser, cookie)


def test_emptying_by_pop_or_del_keeps_the_session(browser: Browser) -> None:
    """An empty cart is no logout."""
    session = browser.login("ada", a=1)
    again = browser.request()
    del again["a"]
    assert browser.answer(again).set_cookie is None
    following = browser.request()
    assert (following.id, following.user_id, following.to_dict()) == (session.id, "ada", {})


def test_clear_and_something_stored_is_another_session_if_somebody_was_logged_in(browser: Browser) -> None:
    """The user goes with the data, and a cookie that was logged in is not one that is not. Anonymous: the id stays."""
    browser.login("ada", a=1)
    cookie, session = browser.cookie, browser.request()
    old_id = session.id
    session.clear()
    session["b"] = 2
    assert session.user_id is None
    assert browser.answer(session).set_cookie is not None
    following = browser.request()
    assert (following.to_dict(), following.user_id) == ({"b": 2}, None)
    assert following.id != old_id
    assert gone_at(browser, cookie)
    browser.cookie = b""
    anonymous = browser.stored(a=1)
    session = browser.request()
    session.clear()
    session["b"] = 2
    assert browser.answer(session).set_cookie is None
    assert browser.data() == {"b": 2}
    assert browser.request().id == anonymous.id


def test_clear_and_login_is_a_login(browser: Browser) -> None:
    """The usual way to log in over an old session; that no data was stored does not make it a logout."""
    browser.login("ada", a=1)
    session = browser.request()
    session.clear()
    session.renew(user_id="bob")
    assert "Max-Age=34560000" in str(browser.answer(session).set_cookie)
    following = browser.request()
    assert (following.user_id, following.to_dict()) == ("bob", {})


def test_renew_gives_a_new_id_keeps_the_data_and_kills_the_old_one_at_once(browser: Browser) -> None:
    """At every login: the id from before is worth nothing afterwards, to nobody."""
    first = browser.stored(a=1, cart=["tea"])
    old_id, cookie = first.id, browser.cookie
    session = browser.request()
    session["cart"].append("milk")
    session.renew(user_id="ada")
    assert session.user_id == "ada"
    assert browser.request().user_id is None
    assert "Max-Age=34560000" in str(browser.answer(session).set_cookie)
    following = browser.request()
    assert following.id == session.id != old_id
    assert (following.to_dict(), following.user_id) == ({"a": 1, "cart": ["tea", "milk"]}, "ada")
    assert gone_at(browser, cookie)
    assert browser.store.count() == 1


def test_renew_merges_into_what_the_session_is_then(browser: Browser) -> None:
    """What another request committed meanwhile comes along."""
    browser.stored(a=1)
    login, other = browser.request(), browser.request()
    login.renew(user_id="ada")
    login["b"] = 1
    other["c"] = 1
    browser.answer(other)
    browser.answer(login)
    assert browser.data() == {"a": 1, "b": 1, "c": 1}


def test_who_is_logged_in_stays_until_it_is_said_otherwise(browser: Browser) -> None:
    """`renew()` keeps the user, `renew(user_id=None)` does not; any stored value may be one."""
    browser.login("ada")
    session = browser.request()
    session.renew()
    browser.answer(session)
    assert browser.request().user_id == "ada"
    session = browser.request()
    session.renew(user_id=(1, "b"))
    browser.answer(session)
    assert browser.request().user_id == (1, "b")
    session = browser.request()
    session["a"] = 1
    session.renew(user_id=None)
    browser.answer(session)
    assert (browser.request().user_id, browser.data()) == (None, {"a": 1})


@pytest.mark.parametrize("failed", [True, False])
def test_a_login_whose_response_fails_did_not_happen(browser: Browser, failed: bool) -> None:
    """The old id lives on, nobody is logged in, and no cookie is sent."""
    browser.stored(a=1)
    session = browser.request()
    session.renew(user_id="ada")
    outcome = browser.answer(session, failed=failed)
    assert (outcome.set_cookie is None) is failed
    assert browser.request().user_id == (None if failed else "ada")


# ── somebody else ended it ─────────────────────────────────────────────────────────────────────────────────────


def _later(browser: Browser) -> None:
    clock = browser.store.clock
    assert isinstance(clock, ManualClock)
    clock.advance(hours=7)


def _later_swept(browser: Browser) -> None:
    _later(browser)
    browser.store.cleanup()


ENDINGS: dict[str, Callable[[Browser], object]] = {
    "destroyed": lambda browser: browser.request().destroy(),
    "renewed": lambda browser: browser.login("eve"),
    "expired": _later,
    "swept": _later_swept,
    "cleared": lambda browser: browser.store.clear(),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_changes_of_a_request_whose_session_ended_are_dropped(
    browser: Browser, events: list[Event], ending: str
) -> None:
    """The response goes out without a cookie, nothing comes back, and the hooks are told once, of the handle."""
    browser.stored(a=1, cart=["tea"])
    slow, cookie = browser.request(), browser.cookie
    handle = slow.handle
    slow["a"] = 2
    slow["cart"].append("milk")
    ENDINGS[ending](browser)
    count = browser.store.count()
    assert browser.answer(slow) == Outcome(vary=True)
    browser.store.commit(slow)
    assert gone_at(browser, cookie)
    assert browser.store.count() <= count
    assert [event for event in events if isinstance(event, CommitDropped)] == [CommitDropped(str(handle))]


@pytest.mark.parametrize("ending", ENDINGS)
def test_save_increment_and_apply_say_that_the_session_is_gone(browser: Browser, ending: str) -> None:
    """Each time, and never store anything."""
    browser.stored(n=1)
    for act in (
        lambda it: it.increment("n"),
        lambda it: it.apply("n", lambda value: value),
        lambda it: (it.update(n=2), it.save()),
    ):
        browser.cookie = b""
        browser.stored(n=1)
        session = browser.request()
        assert session["n"] == 1
        ENDINGS[ending](browser)
        for _ in range(2):
            with pytest.raises(SessionGone):
                act(session)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_reader_of_a_session_that_ended_goes_on_reading(browser: Browser, events: list[Event], ending: str) -> None:
    """What it loaded is what it sees; there is nothing to drop and nothing to tell."""
    browser.stored(a=1)
    session = browser.request()
    assert session["a"] == 1
    ENDINGS[ending](browser)
    assert session["a"] == 1
    assert browser.answer(session).set_cookie is None
    assert events == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_login_on_an_ended_session_begins_one_of_its_own(browser: Browser, ending: str) -> None:
    """With the user and what was assigned, nested edits of it included; nothing that was loaded, whoever's it was."""
    browser.login("mallory", mine=1, cart=["hers"], read=[1])
    login = browser.request()
    cookie = browser.cookie
    assert login["read"] == [1]
    login["read"].append(2)
    login["new"] = ["x"]
    login["new"].append("y")
    login["mine"] = 2
    ENDINGS[ending](browser)
    login.renew(user_id="ada")
    assert browser.answer(login).set_cookie is not None
    following = browser.request()
    assert following.user_id == "ada"
    assert following.to_dict() == {"new": ["x", "y"], "mine": 2}
    assert gone_at(browser, cookie)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_login_alone_on_an_ended_session_has_no_data(browser: Browser, ending: str) -> None:
    """Nested edits of what had been loaded are not assignments. And nobody else is logged in by it."""
    browser.stored(cart=["theirs"], a=1)
    login = browser.request()
    login["cart"].append("mine")
    del login["a"]
    ENDINGS[ending](browser)
    login.renew(user_id="ada")
    browser.answer(login)
    following = browser.request()
    assert (following.user_id, following.to_dict()) == ("ada", {})
    browser.cookie = b""
    assert browser.request().user_id is None
    assert not browser.request().modified


def test_a_cookie_that_was_renewed_meets_no_session_and_sets_none(browser: Browser, events: list[Event]) -> None:
    """A slow request that arrives with the old cookie cannot overwrite the fresh one; a login of its own it may."""
    browser.stored(a=1)
    old = browser.cookie
    browser.login("ada")
    fresh, browser.cookie = browser.cookie, old
    late = browser.request()
    assert late.is_new
    assert late == {}
    late["x"] = 1
    assert browser.answer(late) == Outcome(vary=True)
    assert [type(event) for event in events] == [CommitDropped]
    for verb in ("destroy", "clear", "create"):
        late = browser.request()
        getattr(late, verb)()
        assert browser.answer(late).set_cookie is None
    login = browser.request()
    login.renew(user_id="bob")
    assert browser.answer(login).set_cookie is not None
    assert browser.request().user_id == "bob"
    browser.cookie = fresh
    assert browser.request().user_id == "ada"


@pytest.mark.parametrize("verb", ["destroy", "clear"])
def test_a_slow_logout_of_the_old_id_does_not_take_the_fresh_cookie_away(browser: Browser, verb: str) -> None:
    """It met the session before the login, and ends after it: the browser's login cookie stays."""
    browser.stored(a=1)
    slow = browser.request()
    assert slow["a"] == 1
    browser.login("ada")
    getattr(slow, verb)()
    assert browser.answer(slow).set_cookie is None
    assert browser.request().user_id == "ada"


def test_a_slow_logout_of_an_id_that_was_only_renewed_logs_out(browser: Browser) -> None:
    """The same login under a new id, however often renewed: the one who logs out must not stay logged in."""
    browser.login("ada")
    slow = browser.request()
    assert slow.user_id == "ada"
    for _ in range(3):
        session = browser.request()
        session.renew()
        browser.answer(session)
    slow.destroy()
    assert "Max-Age=0;" in str(browser.store.commit(slow).set_cookie)
    assert gone_at(browser, browser.cookie)


def test_who_came_with_an_ended_session_takes_nobody_s_cookie_away(browser: Browser) -> None:
    """It logged in, and out again: whoever ended the other one may have set another cookie by now."""
    browser.stored(a=1)
    late = browser.request()
    browser.login("ada")
    late.renew(user_id="bob")
    late.save()
    late.clear()
    assert browser.store.commit(late).set_cookie is None
    assert browser.request().user_id == "ada"


def test_destroying_twice_takes_the_cookie_away_as_once(browser: Browser) -> None:
    browser.stored(a=1)
    session = browser.request()
    session.destroy()
    session.destroy()
    assert "Max-Age=0" in str(browser.answer(session).set_cookie)


def test_for_a_minute_a_destroyed_id_writes_nothing_and_sets_no_cookie(
    browser: Browser, clock: ManualClock, events: list[Event]
) -> None:
    """A request that was under way at the logout must not begin a session after it; a later visitor may."""
    first = browser.stored(a=1)
    browser.request().destroy()
    late = browser.request()
    assert late.is_new
    late["b"] = 1
    assert browser.answer(late) == Outcome(vary=True)
    assert [type(event) for event in events] == [CommitDropped]
    clock.advance(61)
    visitor = browser.request()
    visitor["b"] = 2
    assert browser.answer(visitor).set_cookie is not None
    assert browser.data() == {"b": 2}
    assert visitor.id != first.id


@pytest.mark.parametrize("sweep", [True, False], ids=["swept", "unswept"])
def test_an_expired_id_is_a_visitor_without_a_session_at_once(
    browser: Browser, clock: ManualClock, sweep: bool
) -> None:
    """Who comes back after the weekend stores a new session, with another id, whether anybody swept or not."""
    first = browser.login("ada", a=1)
    clock.advance(hours=7)
    if sweep:
        browser.store.cleanup()
    visitor = browser.request()
    assert (visitor.to_dict(), visitor.user_id, visitor.is_new) == ({}, None, True)
    visitor["b"] = 1
    assert browser.answer(visitor).set_cookie is not None
    assert browser.data() == {"b": 1}
    assert visitor.id != first.id


def test_a_nested_edit_on_a_read_only_session_is_an_error_and_not_stored(browser: Browser) -> None:
    """It cannot be noticed before the commit; silence would hide the loss."""
    first = browser.stored(cart=["tea"])
    raw = bytes_of(first)
    session = browser.request(readonly=True)
    session["cart"].append("milk")
    with pytest.raises(ReadOnlySession, match="changed in place"):
        browser.answer(session)
    assert bytes_of(first) == raw


# ── failing responses ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_failing_response_drops_the_requests_changes(browser: Browser) -> None:
    """Assignments, nested edits, deletions, clearing, settings; and a new session is not made."""
    first = browser.stored(a=1, cart=["tea"])
    raw = bytes_of(first)
    session = browser.request()
    session["a"] = 2
    session["cart"].append("milk")
    session.set_longterm(True)
    assert browser.answer(session, failed=True) == Outcome(vary=True)
    assert bytes_of(first) == raw
    assert session.to_dict() == {"a": 1, "cart": ["tea"]}
    cleared = browser.request()
    cleared.clear()
    browser.answer(cleared, failed=True)
    assert browser.data() == {"a": 1, "cart": ["tea"]}


def test_what_was_saved_stays_though_the_response_fails(browser: Browser) -> None:
    """And its cookie is sent, or the session would be lost."""
    session = browser.request()
    session["a"] = 1
    session.save()
    session["a"] = 2
    assert browser.answer(session, failed=True).set_cookie is not None
    assert browser.data() == {"a": 1}


def test_save_on_error_keeps_the_changes(place: Path) -> None:
    """For those who want it so."""
    with make_store(place, save_on_error=True) as store:
        browser = Browser(store)
        session = browser.request()
        session["a"] = 1
        assert browser.answer(session, failed=True).set_cookie is not None
        assert browser.data() == {"a": 1}


# ── save() and what comes after the headers ────────────────────────────────────────────────────────────────────


def test_however_often_it_is_saved_what_was_only_read_is_left_alone(browser: Browser) -> None:
    """A websocket saves again and again; what others stored meanwhile under a key that it has read stays."""
    page = browser.stored(cart=["tea"])
    assert page["cart"] == ["tea"]
    other = browser.request()
    other["cart"] = ["milk"]
    browser.answer(other)
    for number in range(3):
        page["n"] = number
        page.save()
        assert browser.data() == {"cart": ["milk"], "n": number}


def test_save_commits_now_and_the_response_still_sends_the_cookie(browser: Browser) -> None:
    """Once, however often it was saved."""
    session = browser.request()
    session["a"] = 1
    session.save()
    assert session.exists
    assert browser.store.session(session.id) == {"a": 1}
    session["b"] = 2
    session.save()
    assert browser.answer(session).set_cookie is not None
    assert browser.data() == {"a": 1, "b": 2}
    assert len(browser.sent) == 1
    browser.store.commit(session)
    assert browser.answer(browser.request()).set_cookie is None


def test_saving_a_renewal_sends_its_cookie_with_the_response(browser: Browser) -> None:
    """The old id is dead from the save on."""
    browser.stored(a=1)
    old, session = browser.cookie, browser.request()
    session.renew(user_id="ada")
    session.save()
    assert gone_at(browser, old)
    assert browser.answer(session).set_cookie is not None
    assert browser.request().user_id == "ada"


def test_a_session_saved_and_destroyed_in_one_request_needs_no_cookie(browser: Browser) -> None:
    """The browser never had one."""
    session = browser.request()
    session["a"] = 1
    session.save()
    session.destroy()
    assert browser.answer(session).set_cookie is None
    assert browser.store.count() == 0


def test_changes_after_the_headers_are_committed_at_the_end(browser: Browser) -> None:
    """Streams and background tasks: no cookie is needed for a session that has one."""
    browser.stored(a=1)
    session = browser.request()
    browser.answer(session)
    session["a"] = 2
    assert browser.store.commit(session).set_cookie is None
    assert browser.data() == {"a": 2}


@pytest.mark.parametrize("need", ["new", "renew", "login", "clear"])
def test_a_new_cookie_after_the_headers_is_a_loud_error(browser: Browser, need: str) -> None:
    """It could not be sent: the change is refused, not lost in silence, and nothing is stored."""
    if need != "new":
        browser.login("ada", a=1)
    cookie, session = browser.cookie, browser.request()
    len(session)
    browser.answer(session)
    count = browser.store.count()
    if need in ("renew", "login"):
        session.renew(**({"user_id": "bob"} if need == "login" else {}))
    if need == "clear":
        session.clear()
    session["b"] = 1
    for commit in (session.save, lambda: browser.store.commit(session)):
        with pytest.raises(ResponseStarted, match="before the first byte"):
            commit()
    assert browser.store.count() == count
    assert gone_at(browser, cookie) is (need == "new")


def test_destroying_after_the_headers_ends_the_session_all_the_same(browser: Browser) -> None:
    """The cookie that stays behind opens nothing."""
    browser.stored(a=1)
    session = browser.request()
    browser.answer(session)
    session.destroy()
    assert browser.store.commit(session).set_cookie is None
    assert gone_at(browser, browser.cookie)


# ── scripts and jobs ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_script_changes_a_session_by_its_id(browser: Browser, store: SessionStore) -> None:
    """`store.session(id)`, and `save()`; the browser sees it."""
    first = browser.stored(a=1)
    job = store.session(first.id)
    assert (job.exists, job.id, job["a"]) == (True, first.id, 1)
    job["b"] = 2
    job.increment("n")
    job.save()
    assert browser.data() == {"a": 1, "b": 2, "n": 1}
    made = store.session()
    made["x"] = 1
    made.save()
    assert store.session(made.id) == {"x": 1}


@pytest.mark.parametrize("session_id", ["", "x", "A" * 43, "Ä" * 43, "A" * 44, "=" * 10, "../..", "A" * 10_000])
def test_an_unknown_id_gives_an_empty_session_and_is_never_adopted(store: SessionStore, session_id: str) -> None:
    """Saved, it has an id of its own."""
    session = store.session(session_id)
    assert session.is_new
    assert session == {}
    session["a"] = 1
    session.save()
    assert session.id != session_id
    assert store.session(session_id) == {}


def test_the_sessions_of_a_renewed_and_a_destroyed_id_are_not_those(browser: Browser, store: SessionStore) -> None:
    """The one is gone, the other empty."""
    renewed = browser.stored(a=1).id
    destroyed = browser.login("ada").id
    browser.request().destroy()
    gone = store.session(renewed)
    gone["a"] = 1
    with pytest.raises(SessionGone):
        gone.save()
    assert store.session(destroyed).is_new


# ── the size limit ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_that_would_grow_too_large_is_refused_wherever_it_shows(place: Path) -> None:
    """At assignment, at the commit of a nested edit, at a merge that only together is too large, in apply and renew."""
    with make_store(place, max_size=1_000) as store:
        browser = Browser(store)
        first = browser.stored(a="x" * 300, cart=["y"])
        with pytest.raises(SessionTooLarge, match=r"session\['b'\].*max_size is 1000"):
            browser.request()["b"] = "x" * 800
        nested, one, two, login = (browser.request() for _ in range(4))
        nested["cart"].append("x" * 800)
        one["b"] = "x" * 500
        two["c"] = "x" * 500
        login["d"] = "x" * 400
        login.renew(user_id="u" * 400)
        with pytest.raises(SessionTooLarge):
            browser.answer(nested)
        browser.answer(one)
        raw = bytes_of(first)
        for refused in (two, login):
            with pytest.raises(SessionTooLarge, match="max_size is 1000"):
                browser.answer(refused)
        with pytest.raises(SessionTooLarge):
            browser.request().apply("a", lambda text: text * 10)
        assert bytes_of(first) == raw
        assert browser.data() == {"a": "x" * 300, "b": "x" * 500, "cart": ["y"]}
        smaller = browser.request()
        smaller["a"] = ""
        browser.answer(smaller)
        assert browser.data()["a"] == ""


def test_a_session_too_large_for_a_new_limit_can_still_be_made_smaller(place: Path) -> None:
    """Lowering max_size locks nobody out: reading works, deleting works."""
    clock = ManualClock()
    with make_store(place, clock, max_size=2_000) as store:
        keys = store.config.keys
        browser = Browser(store)
        browser.stored(a="x" * 900, b="x" * 900)
    with make_store(place, clock, max_size=1_000, keys=keys) as store:
        browser.store = store
        session = browser.request()
        assert len(session["a"]) == 900
        del session["b"]
        session["a"] = "x" * 800
        browser.answer(session)
        assert browser.data() == {"a": "x" * 800}


# ── clocks ─────────────────────────────────────────────────────────────────────────────────────────────────────


def alive(browser: Browser, sweep: bool) -> bool:
    """Whether the session is there, without touching it."""
    if sweep:
        browser.store.cleanup()
    return browser.request(readonly=True).exists


@pytest.mark.parametrize("sweep", [True, False], ids=["swept", "unswept"])
@pytest.mark.parametrize("longterm", [False, True], ids=["idle", "longterm"])
def test_an_idle_session_ends_to_the_second(place: Path, sweep: bool, longterm: bool) -> None:
    """A second before its end it is there, a second after it is not, whether anybody sweeps or not."""
    span = timedelta(days=60) if longterm else timedelta(hours=6)
    with make_store(place, touch_interval=timedelta(0)) as store:
        browser, clock = Browser(store), store.clock
        assert isinstance(clock, ManualClock)
        session = browser.request()
        session["a"] = 1
        session.set_longterm(longterm)
        browser.answer(session)
        assert session.longterm is longterm
        assert session.expires_at == datetime.fromtimestamp(clock.now() / 1000, UTC) + span
        clock.advance(span.total_seconds() - 1)
        assert alive(browser, sweep)
        looked = browser.request()
        assert looked["a"] == 1
        browser.answer(looked)
        clock.advance(span.total_seconds() - 1)
        assert alive(browser, sweep)
        clock.advance(0.999)
        assert alive(browser, sweep)
        clock.advance(0.001)
        assert not alive(browser, sweep)
        clock.advance(1)
        assert not alive(browser, sweep)
        assert browser.request() == {}


@pytest.mark.parametrize("sweep", [True, False], ids=["swept", "unswept"])
def test_the_absolute_lifespan_ends_a_session_however_busy(place: Path, sweep: bool) -> None:
    """Touches, commits and set_longterm move it by nothing; a login begins it anew."""
    with make_store(place, touch_interval=timedelta(0), absolute_lifespan=timedelta(hours=10)) as store:
        browser, clock = Browser(store), store.clock
        assert isinstance(clock, ManualClock)
        browser.stored(n=0)
        for _ in range(9):
            clock.advance(hours=1)
            session = browser.request()
            session["n"] += 1
            session.set_longterm(True)
            browser.answer(session)
        clock.advance(HOUR - 1)
        assert alive(browser, sweep)
        login = browser.request()
        login.renew()
        browser.answer(login)
        clock.advance(0.999)
        assert alive(browser, sweep)
        clock.advance(0.001)
        assert not alive(browser, sweep)
        browser.login("ada")
        clock.advance(hours=9)
        browser.login("ada")
        clock.advance(hours=9, seconds=HOUR - 1)
        assert not browser.request().is_new or browser.store.config.lifespan < timedelta(hours=9)


def test_a_login_begins_the_absolute_lifespan_anew_and_a_mere_renewal_does_not(place: Path) -> None:
    """Counted from its start or its login."""
    with make_store(place, absolute_lifespan=timedelta(hours=5)) as store:
        browser, clock = Browser(store), store.clock
        assert isinstance(clock, ManualClock)
        start = clock.now()
        for verb, ends in (({}, start), ({"user_id": "ada"}, start + 3 * HOUR * 1000)):
            browser.cookie = b""
            clock._wall = start
            browser.stored(a=1)
            clock._wall = start + 3 * HOUR * 1000
            session = browser.request()
            session.renew(**verb)
            browser.answer(session)
            assert session.record is not None
            assert session.record.header.absolute == ends + 5 * HOUR * 1000


def test_looking_moves_the_end_at_most_once_a_touch_interval(browser: Browser, clock: ManualClock) -> None:
    """One write a minute for a busy reader, and none before; the end is early by a minute at most."""
    browser.stored(a=1)
    writes = []
    for _ in range(180):
        before = last_transaction(browser.store)
        session = browser.request()
        assert session["a"] == 1
        browser.answer(session)
        writes.append(last_transaction(browser.store) != before)
        assert session.expires_at is not None
        early = datetime.fromtimestamp(clock.now() / 1000, UTC) + timedelta(hours=6) - session.expires_at
        assert timedelta(0) <= early < timedelta(seconds=60)
        clock.advance(1)
    assert [second for second, wrote in enumerate(writes) if wrote] == [60, 120]


def test_a_commit_within_the_touch_interval_moves_no_end(browser: Browser, clock: ManualClock) -> None:
    """Changes are written at once; the clock is throttled."""
    first = browser.stored(a=1)
    clock.advance(59)
    session = browser.request()
    session["a"] = 2
    browser.answer(session)
    assert session.expires_at == first.expires_at
    clock.advance(1)
    session = browser.request()
    session["a"] = 3
    browser.answer(session)
    assert first.expires_at is not None
    assert session.expires_at == first.expires_at + timedelta(seconds=60)
    assert session.last_seen == datetime.fromtimestamp(clock.now() / 1000, UTC)
    assert session.created_at == first.created_at


def test_with_touch_interval_zero_every_look_moves_the_end(place: Path) -> None:
    """To the millisecond; two looks within one write once."""
    with make_store(place, touch_interval=timedelta(0)) as store:
        browser, clock = Browser(store), store.clock
        assert isinstance(clock, ManualClock)
        browser.stored(a=1)
        for step in (0.001, 0, 0.5):
            clock.advance(step)
            before, session = last_transaction(store), browser.request()
            assert session["a"] == 1
            browser.answer(session)
            assert (last_transaction(store) != before) is (step > 0)
            assert session.last_seen == datetime.fromtimestamp(clock.now() / 1000, UTC)


def test_touch_moves_the_end_whatever_the_interval(browser: Browser, clock: ManualClock) -> None:
    """For those who want it exactly."""
    first = browser.stored(a=1)
    clock.advance(1)
    session = browser.request()
    session.touch()
    browser.answer(session)
    assert first.expires_at is not None
    assert session.expires_at == first.expires_at + timedelta(seconds=1)


def test_not_looking_and_looking_read_only_move_nothing(browser: Browser, clock: ManualClock) -> None:
    """A poller on a read-only path does not keep a session alive; nor does a request that ignores it."""
    first = browser.stored(a=1)
    raw = bytes_of(first)
    clock.advance(hours=1)
    session = browser.request(readonly=True)
    assert session["a"] == 1
    browser.answer(session)
    browser.answer(browser.request())
    assert bytes_of(first) == raw


def test_looking_without_reading_a_key_is_looking(browser: Browser, clock: ManualClock) -> None:
    """`"user" in session`, `session.user_id`, `len(session)`."""
    first = browser.stored(a=1)
    for look in (lambda it: "a" in it, lambda it: it.user_id, len, lambda it: it.id):
        clock.advance(61)
        session = browser.request()
        look(session)
        assert browser.answer(session).vary
        assert session.last_seen == datetime.fromtimestamp(clock.now() / 1000, UTC) != first.last_seen


@pytest.mark.parametrize("sweep", [True, False], ids=["swept", "unswept"])
@pytest.mark.parametrize("back", [1, 3600, 10 * 86_400])
def test_a_wall_clock_that_steps_back_extends_nothing(
    browser: Browser, clock: ManualClock, back: int, sweep: bool
) -> None:
    """Nor ends anything: the end stays where it was until the clock is past where it had been."""
    first = browser.stored(a=1)
    clock.step(-back)
    for _ in range(3):
        clock.advance(min(back / 10, 100))
        session = browser.request()
        session["a"] += 1
        session.touch()
        browser.answer(session)
        assert (session.expires_at, session.last_seen) == (first.expires_at, first.last_seen)
        if sweep:
            browser.store.cleanup()
    clock._wall = clock._wall - clock._wall % 1000
    remaining = first.expires_at.timestamp() - clock.now() / 1000 if first.expires_at else 0
    clock.advance(remaining - 0.001)
    assert alive(browser, sweep)
    clock.advance(0.001)
    assert not alive(browser, sweep)


@pytest.mark.parametrize("sweep", [True, False], ids=["swept", "unswept"])
def test_a_wall_clock_that_steps_forth_and_back_ends_nobody(browser: Browser, clock: ManualClock, sweep: bool) -> None:
    """NTP on a bad day: the sweeper pauses, and when the hour is right again the session is there."""
    browser.stored(a=1)
    browser.store.cleanup()
    clock.step(7 * HOUR)
    assert not alive(browser, sweep)
    clock.advance(1)
    assert not alive(browser, sweep)
    clock.step(-7 * HOUR)
    assert alive(browser, sweep)
    assert browser.data() == {"a": 1}


def test_a_touch_made_while_the_clock_was_ahead_ends_with_that_clock(browser: Browser, clock: ManualClock) -> None:
    """A session seen in a false future keeps that end: nothing shortens it, and a look does not move it further."""
    browser.stored(a=1)
    clock.step(5 * HOUR)
    session = browser.request()
    assert session["a"] == 1
    browser.answer(session)
    end = session.expires_at
    clock.step(-5 * HOUR)
    clock.advance(hours=1)
    session = browser.request()
    assert session["a"] == 1
    browser.answer(session)
    assert session.expires_at == end


def test_set_longterm_and_back(browser: Browser, clock: ManualClock) -> None:
    """ "Remember me" lengthens at once, and can be taken back."""
    browser.login("ada")
    for longterm, span in ((True, timedelta(days=60)), (False, timedelta(hours=6))):
        session = browser.request()
        session.set_longterm(longterm)
        assert session.longterm is longterm
        browser.answer(session)
        following = browser.request()
        assert following.longterm is longterm
        assert following.expires_at == datetime.fromtimestamp(clock.now() / 1000, UTC) + span


def test_set_store_is_kept(browser: Browser) -> None:
    """Memory only, and storable again."""
    browser.stored(a=1)
    assert browser.request().storable
    for storable in (False, True):
        session = browser.request()
        session.set_store(storable)
        browser.answer(session)
        assert browser.request().storable is storable


# ── the rest ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_create_stores_an_empty_session(browser: Browser) -> None:
    """Only when it is asked for; on a stored one it does nothing."""
    session = browser.request()
    session.create()
    assert browser.answer(session).set_cookie is not None
    following = browser.request()
    assert following.exists
    assert following == {}
    before = last_transaction(browser.store)
    following.create()
    assert browser.answer(following).set_cookie is None
    assert last_transaction(browser.store) == before


def test_a_bad_cookie_is_told_to_the_hooks_and_the_visitor_gets_a_session_of_our_making(
    browser: Browser, events: list[Event]
) -> None:
    """Never the id that was asked for."""
    browser.cookie = b"session=junk"
    session = browser.stored(a=1)
    assert events == [CookieRefused("malformed")]
    assert session.exists
    assert browser.data() == {"a": 1}


def test_a_store_without_room_refuses_changes_and_lets_readers_be(
    browser: Browser, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A touch that finds no room is left out; a change is StoreFull, and what was stored stays."""
    browser.stored(a=1)
    clock.advance(61)

    def full(*_: Any, **__: Any) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(browser.store.memory.environment, "write", full)
    reader = browser.request()
    assert reader["a"] == 1
    assert browser.answer(reader) == Outcome(vary=True)
    writer = browser.request()
    writer["a"] = 2
    with pytest.raises(StoreFull):
        browser.answer(writer)
    monkeypatch.undo()
    assert browser.data() == {"a": 1}


def test_sweeping_happens_along_with_commits(browser: Browser, store: SessionStore, clock: ManualClock) -> None:
    """Without a sweeper of its own a store that is written to keeps itself clean."""
    for _ in range(20):
        browser.cookie = b""
        browser.stored(a=1)
    clock.advance(hours=7)
    assert store.count() == 20
    browser.cookie = b""
    browser.stored(a=1)
    assert store.count() == 1


# ── several requests against a model ───────────────────────────────────────────────────────────────────────────

DEAD = "dead"


class Renewed(NamedTuple):
    """The session got another id: the same visit under a new one, or None, a login."""

    successor: str | None


SLOTS = st.integers(0, 2)
KEYS = st.sampled_from("ab")


class View:
    """What one request must see, and what its commit must do."""

    def __init__(self, handle: str | None, data: dict[str, Any], presented: bool, gone: bool = False) -> None:
        self.handle, self.presented, self.gone = handle, presented, gone
        self.drops = self.owes = False
        self.loaded = handle is not None and not gone
        self.reset(data)

    def reset(self, data: dict[str, Any], seen: "set[str] | frozenset[str]" = frozenset()) -> None:
        self.base, self.data = dict(data), dict(data)
        self.seen = set(seen)
        self.assigned: set[str] = set()
        self.deleted: set[str] = set()
        self.nested: set[str] = set()
        self.cleared = self.renews = False
        self.login: str | None = None

    @property
    def sets(self) -> dict[str, Any]:
        return {key: self.data[key] for key in self.assigned | self.nested}

    @property
    def pending(self) -> bool:
        return bool(self.assigned or self.nested or self.deleted or self.cleared or self.renews)

    def merged(self, stored: dict[str, Any]) -> dict[str, Any]:
        kept = {} if self.cleared else {key: value for key, value in stored.items() if key not in self.deleted}
        return {**kept, **self.sets}


class Requests(RuleBasedStateMachine):
    """Three requests of one browser, interleaved, against the rules in prose as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.mkdtemp(prefix="shms-")
        self.workers = self.make_workers()
        for worker in self.workers:
            worker.start(self.directory)
        self.world: dict[str, Any] = {}
        self.users: dict[str, str | None] = {}
        self.jar = b""
        self.jar_handle: str | None = None
        self.views: dict[int, View] = {}

    def make_workers(self) -> "list[Slots] | list[Worker]":
        return [Slots()]

    def teardown(self) -> None:
        for worker in self.workers:
            worker.stop()
        shutil.rmtree(self.directory)

    def of(self, slot: int) -> Any:
        return self.workers[slot % len(self.workers)]

    def view(self, slot: int) -> View:
        """The request in this slot; a new one with the browser's cookie if there is none."""
        if slot not in self.views:
            self.of(slot).open(slot, self.jar)
            stored = self.world.get(self.jar_handle or "")
            if isinstance(stored, dict):
                self.views[slot] = View(self.jar_handle, stored, presented=True)
            else:
                gone = stored is not None
                self.views[slot] = View(self.jar_handle if gone else None, {}, bool(self.jar), gone)
        return self.views[slot]

    @rule(slot=SLOTS, key=st.sampled_from(["a", "b", "cart", "n"]))
    def get(self, slot: int, key: str) -> None:
        view = self.view(slot)
        assert self.of(slot).get(slot, key) == view.data.get(key)
        if key in view.data:
            view.seen.add(key)

    @rule(slot=SLOTS)
    def look_at_all(self, slot: int) -> None:
        view = self.view(slot)
        assert self.of(slot).view(slot) == view.data
        view.seen |= set(view.data)

    @rule(slot=SLOTS, key=KEYS, value=st.integers(0, 3))
    def assign(self, slot: int, key: str, value: int) -> None:
        view = self.view(slot)
        self.of(slot).assign(slot, key, value)
        view.data[key] = value
        view.assigned.add(key)
        view.deleted.discard(key)
        view.seen.add(key)

    @rule(slot=SLOTS)
    def new_cart(self, slot: int) -> None:
        view = self.view(slot)
        self.of(slot).assign(slot, "cart", [])
        view.data["cart"] = []
        view.assigned.add("cart")
        view.deleted.discard("cart")
        view.seen.add("cart")

    @rule(slot=SLOTS, item=st.integers(0, 9))
    def append(self, slot: int, item: int) -> None:
        view = self.view(slot)
        if "cart" in view.data:
            self.of(slot).append(slot, "cart", item)
            view.data["cart"] = [*view.data["cart"], item]
            view.nested.add("cart")
            view.seen.add("cart")

    @rule(slot=SLOTS, key=st.sampled_from(["a", "b", "cart", "n"]))
    def delete(self, slot: int, key: str) -> None:
        view = self.view(slot)
        if key in view.data:
            self.of(slot).delete(slot, key)
            del view.data[key]
            for keys in (view.assigned, view.nested, view.seen):
                keys.discard(key)
            view.deleted.add(key)

    @rule(slot=SLOTS)
    def increment(self, slot: int) -> None:
        view = self.view(slot)
        answer = self.of(slot).increment(slot, "n")
        if view.gone and view.loaded:
            assert answer == GONE
        elif not view.loaded or view.cleared or "n" in view.assigned | view.deleted:
            view.data["n"] = view.data.get("n", 0) + 1
            assert answer == view.data["n"]
            view.assigned.add("n")
            view.deleted.discard("n")
            view.seen.add("n")
        elif not isinstance(self.world[str(view.handle)], dict):
            assert answer == GONE
            view.gone = True
        else:
            stored = self.world[str(view.handle)]
            stored["n"] = stored.get("n", 0) + 1
            assert answer == stored["n"]
            mine = view.seen | view.assigned | view.nested
            kept = {key: value for key, value in view.data.items() if key in mine}
            view.base = dict(stored)
            view.data = {key: value for key, value in stored.items() if key not in view.deleted} | kept
            view.data["n"] = stored["n"]
            view.seen.add("n")

    @rule(slot=SLOTS)
    def clear(self, slot: int) -> None:
        view = self.view(slot)
        user = self.users.get(view.handle or "") if view.login is None else view.login
        self.of(slot).clear(slot)
        renews, base = view.renews, view.base
        view.reset({})
        view.base, view.cleared = base, True
        view.renews = renews or user is not None

    @rule(slot=SLOTS, user=st.sampled_from(["ada", "bob", None]))
    def renew(self, slot: int, user: str | None) -> None:
        view = self.view(slot)
        self.of(slot).renew(slot, user)
        view.renews = True
        view.login = user or view.login

    @rule(slot=SLOTS)
    def destroy(self, slot: int) -> None:
        view = self.view(slot)
        self.of(slot).destroy(slot)
        self.end(view)

    def end(self, view: View) -> None:
        """Destroyed, also under its new id if it only got one; but where another was first, the cookie is theirs."""
        target = view.handle
        while target is not None and isinstance(self.world[target], Renewed):
            target = self.world[target].successor
        if target is not None and isinstance(self.world[target], dict):
            self.world[target] = DEAD
        elif view.handle is not None:
            view.gone = True
            view.reset(view.base)
            return
        view.handle, view.gone, view.loaded, view.drops = None, False, False, view.presented
        view.reset({})

    def settle(self, view: View, handle: str | None) -> bool:
        """What a commit does to the model, after which the session has this handle; whether it is gone."""
        emptied = view.cleared and not view.data and view.login is None
        if emptied and view.loaded and view.handle is not None:
            self.end(view)
        if not view.pending:
            return view.gone
        ended = view.handle is not None and not isinstance(self.world[view.handle], dict)
        if view.gone or ended:
            if view.login is None:
                view.gone = True
                view.reset(view.base)
                return True
            view.presented = False
            self.begin(view, handle, {key: view.data[key] for key in view.assigned}, view.login)
        elif view.handle is None:
            if view.sets or view.login is not None:
                self.begin(view, handle, view.sets, view.login)
        elif view.renews:
            old, data = view.handle, view.merged(self.world[view.handle])
            user = view.login or (None if view.cleared else self.users.get(old))
            self.world[old] = Renewed(handle if view.login is None else None)
            self.begin(view, handle, data, user)
        else:
            data = self.world[view.handle] = view.merged(self.world[view.handle])
            self.stand(view, data)
        return False

    def begin(self, view: View, handle: str | None, data: dict[str, Any], user: str | None) -> None:
        """A new id, which nobody had before; its cookie is to be sent."""
        assert handle is not None
        assert handle not in self.world
        self.world[handle] = dict(data)
        self.users[handle] = user
        view.handle, view.gone, view.loaded, view.drops, view.owes = handle, False, True, False, True
        self.stand(view, data)

    def stand(self, view: View, data: dict[str, Any]) -> None:
        """At what is stored; a list that was read stays the application's, for edits of it must be noticed."""
        mine = {
            key: view.data[key]
            for key in view.seen & data.keys() & view.data.keys()
            if key == "cart" or data[key] == view.data[key]
        }
        view.reset(data, set(mine))
        view.data.update(mine)

    @rule(slot=SLOTS)
    def save(self, slot: int) -> None:
        view = self.view(slot)
        answer = self.of(slot).save(slot)
        gone = self.settle(view, self.of(slot).known(slot)[0])
        assert answer == (GONE if gone else None)

    @rule(slot=SLOTS, failed=st.sampled_from([False, False, False, True]))
    def respond(self, slot: int, failed: bool) -> None:
        """The response leaves; the browser keeps what cookie it carries."""
        view = self.view(slot)
        set_cookie, handle = self.of(slot).commit(slot, failed)
        if not failed:
            self.settle(view, handle)
        del self.views[slot]
        if view.owes and view.handle is not None:
            assert "Max-Age=34560000" in str(set_cookie)
            self.jar, self.jar_handle = str(set_cookie).split(";")[0].encode(), view.handle
        elif view.drops:
            assert "Max-Age=0;" in str(set_cookie)
            self.jar, self.jar_handle = b"", None
        else:
            assert set_cookie is None

    @rule()
    def sweep(self) -> None:
        self.of(0).sweep()

    @invariant()
    def what_is_stored_is_what_the_model_says(self) -> None:
        self.of(0).open(99, self.jar)
        stored = self.world.get(self.jar_handle or "")
        live = isinstance(stored, dict)
        assert self.of(0).view(99) == (stored if live else {})
        assert self.of(0).known(99) == (
            self.jar_handle if live else None,
            self.users[self.jar_handle] if live and self.jar_handle else None,
            stored is not None and not live,
        )


def test_who_destroys_a_session_that_another_request_ended_first_is_told_that_it_is_gone(store: SessionStore) -> None:
    first = store.session()
    first["n"] = 1
    first.save()
    second = store.session(first.id)
    assert second["n"] == 1
    first.destroy()
    second.destroy()
    with pytest.raises(SessionGone):
        second.increment("n")


@pytest.mark.soak
def test_interleaved_requests_against_a_model() -> None:
    """Three requests of one browser under way at once, whatever they do in whatever order."""
    total = size(5_000, 150)
    run_state_machine_as_test(Requests, settings=machine_settings(total, 40))
    report("G2 interleaved requests against a model", histories=total, steps_each="up to 40", processes=1)


class Worker:
    """Slots in a process of its own, driven over a pipe."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("commit_worker.py"))]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=child_environment())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            pickle.dump((name, arguments), self.process.stdin)
            self.process.stdin.flush()
            good, answer = pickle.load(self.process.stdout)
            assert good, answer
            return answer

        return call

    def finish(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0
        self.process.stdout.close()


_workers: "list[Worker]" = []


class RequestsInTwoProcesses(Requests):
    """The same, with the requests in two worker processes."""

    def make_workers(self) -> "list[Worker]":
        return _workers


@pytest.fixture
def two_workers() -> Iterator[None]:
    _workers[:] = [Worker(), Worker()]
    yield
    for worker in _workers:
        worker.finish()
    _workers.clear()


@pytest.mark.soak
@pytest.mark.usefixtures("two_workers")
def test_interleaved_requests_of_two_processes() -> None:
    """Requests in two worker processes on one store, against the same model."""
    total = size(1_000, 25)
    run_state_machine_as_test(RequestsInTwoProcesses, settings=machine_settings(total, 40))
    report("G2 interleaved requests of two processes against a model", histories=total, steps_each="up to 40")
