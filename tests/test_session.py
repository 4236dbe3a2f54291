"""The session as a mapping: dict's habits, nothing of its values in a repr, found on whatever request there is."""

import copy
import json
import pickle
import shutil
import tempfile
from collections.abc import MutableMapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flask import Flask
from flask import request as flask_request
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from starlette.requests import HTTPConnection, Request

from shmsession import working
from shmsession.errors import (
    NoSessionError,
    ReadOnlySession,
    SessionTooLarge,
    StoreError,
    UndecodableValue,
    UnsupportedValue,
)
from shmsession.session import ENVIRON_KEY, Session
from shmsession.store import SessionStore
from shmsession.testing import login_cookie, make_store
from tests.figures import report, size
from tests.properties import image, machine_settings, values


@pytest.fixture
def session(shm_store: SessionStore) -> Session:
    return shm_store.session()


# ── against dict ───────────────────────────────────────────────────────────────────────────────────────────────

NAMES = st.sampled_from(["a", "b", "ä", "", "hits", "cart"])
TREES: st.SearchStrategy[Any] = st.one_of(values, st.builds(list), st.builds(dict))


def by_key(mapping: Any) -> dict[str, Any]:
    return {key: image(value) for key, value in mapping.items()}


class SessionAgainstDict(RuleBasedStateMachine):
    """Whatever is done to a session gives what it gives on a dict, also after it was stored and loaded again."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="shms-"))
        self.store = make_store(self.directory, map_size=1 << 20)
        self.cookie = b""
        self.model: dict[str, Any] = {}
        self.session = self.store.request_session(lambda: b"")

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.directory)

    @rule(key=NAMES, value=TREES)
    def assign(self, key: str, value: Any) -> None:
        self.session[key] = value
        self.model[key] = copy.deepcopy(value)

    @rule(key=NAMES)
    def delete(self, key: str) -> None:
        if key in self.model:
            del self.session[key]
            del self.model[key]
        else:
            with pytest.raises(KeyError):
                del self.session[key]

    @rule(key=NAMES, default=st.one_of(st.none(), st.integers()))
    def pop(self, key: str, default: Any) -> None:
        assert image(self.session.pop(key, default)) == image(self.model.pop(key, default))
        with pytest.raises(KeyError):
            self.session.pop(key)

    @rule()
    def popitem(self) -> None:
        if not self.model:
            with pytest.raises(KeyError):
                self.session.popitem()
            return
        last = list(self.session)[-1]
        key, value = self.session.popitem()
        assert key == last
        assert image(value) == image(self.model.pop(key))

    @rule(key=NAMES, default=TREES)
    def setdefault(self, key: str, default: Any) -> None:
        mine = copy.deepcopy(default)
        assert image(self.session.setdefault(key, default)) == image(self.model.setdefault(key, mine))

    @rule(more=st.dictionaries(NAMES, TREES, max_size=3), way=st.sampled_from(["update", "pairs", "|=", "keywords"]))
    def update(self, more: dict[str, Any], way: str) -> None:
        self.model.update(copy.deepcopy(more))
        if way == "update":
            self.session.update(more)
        elif way == "pairs":
            self.session.update(list(more.items()))
        elif way == "keywords":
            self.session.update(**more)
        else:
            same = self.session
            self.session |= more
            assert self.session is same

    @rule()
    def clear(self) -> None:
        self.session.clear()
        self.model.clear()

    @rule(key=NAMES, value=values)
    def edit_inside(self, key: str, value: Any) -> None:
        for holder in (self.session, self.model):
            inner = holder.get(key)
            if isinstance(inner, list):
                inner.append(copy.deepcopy(value))
            elif isinstance(inner, dict):
                inner["more"] = copy.deepcopy(value)
            elif isinstance(inner, set):
                inner.add("more")

    @rule(key=NAMES)
    def edit_deeper(self, key: str) -> None:
        for holder in (self.session, self.model):
            inner = holder.get(key)
            while isinstance(inner, list | tuple | dict) and inner:
                if isinstance(inner, list) and inner:
                    inner[0] = "edited"
                    break
                inner = next(iter(inner.values())) if isinstance(inner, dict) else inner[0]

    @rule(key=NAMES, by=st.integers(-5, 5))
    def increment(self, key: str, by: int) -> None:
        value = self.model.get(key, 0)
        if type(value) is int:
            self.model[key] = value + by
            assert self.session.increment(key, by) == value + by
        elif type(value) is not float:
            with pytest.raises(TypeError):
                self.session.increment(key, by)

    @rule(key=NAMES, value=values)
    def apply(self, key: str, value: Any) -> None:
        result = self.session.apply(key, lambda old: [old, value], default="none")
        self.model[key] = [self.model.get(key, "none"), copy.deepcopy(value)]
        assert image(result) == image(self.model[key])

    @rule()
    def save(self) -> None:
        self.session.save()

    @rule()
    def load_again(self) -> None:
        """The response is sent, and the same browser's next request comes."""
        outcome = self.store.commit(self.session)
        if outcome.set_cookie is not None:
            self.cookie = outcome.set_cookie.split(";")[0].encode()
        cookie = self.cookie
        self.session = self.store.request_session(lambda: cookie)

    @rule(key=NAMES)
    def look(self, key: str) -> None:
        assert (key in self.session) == (key in self.model)
        assert image(self.session.get(key)) == image(self.model.get(key))

    @rule(other=st.dictionaries(NAMES, st.integers(), max_size=2))
    def combine(self, other: dict[str, int]) -> None:
        assert by_key(self.session | other) == by_key(self.model | other)
        assert by_key(other | self.session) == by_key(other | self.model)
        assert type(self.session | other) is dict

    @invariant()
    def is_the_same(self) -> None:
        assert len(self.session) == len(self.model)
        assert set(self.session) == set(self.model)
        assert bool(self.session) is bool(self.model)

    @rule()
    def has_the_same_values(self) -> None:
        assert by_key(self.session) == by_key(self.model) == by_key(dict(self.session)) == by_key(self.session.copy())


@pytest.mark.soak
def test_a_session_behaves_as_a_dict_does() -> None:
    """Through commits, too."""
    total = size(2_000, 60)
    run_state_machine_as_test(SessionAgainstDict, settings=machine_settings(total, 30))
    report("Session against dict", histories=total, steps_each="up to 30")


def test_order_is_the_order_of_insertion(session: Session) -> None:
    """As in a dict; popitem takes the last."""
    session.update({"b": 1, "a": 2})
    session["c"] = 3
    session["b"] = 4
    assert list(session) == ["b", "a", "c"]
    assert list(session.items()) == [("b", 4), ("a", 2), ("c", 3)]
    assert session.popitem() == ("c", 3)


def test_it_equals_mappings_with_the_same_items_and_is_not_hashable(session: Session) -> None:
    """As dict does; it is not a dict."""
    session.update({"a": 1, "b": [2]})
    assert session == {"b": [2], "a": 1}
    assert session != {"a": 1}
    assert session.__eq__([("a", 1)]) is NotImplemented
    assert issubclass(Session, MutableMapping)
    assert not issubclass(Session, dict)
    with pytest.raises(TypeError):
        hash(session)


@pytest.mark.parametrize("key", [1, None, b"a", ("a",), True])
def test_keys_are_str(session: Session, key: Any) -> None:
    """Writing another is a TypeError that says so; reading it, it is not there."""
    with pytest.raises(TypeError, match="session keys are str, not "):
        session[key] = 1
    assert key not in session
    assert session.get(key) is None
    with pytest.raises(KeyError):
        session[key]
    with pytest.raises(KeyError):
        del session[key]


def test_the_users_place_in_the_record_is_no_key(shm_store: SessionStore) -> None:
    """The library's own keys are not the application's: neither seen, counted nor removed by it."""
    session = shm_store.session()
    session.renew(user_id="ada")
    session.save()
    again = shm_store.session(session.id)
    assert again.user_id == "ada"
    assert len(again) == 0
    assert list(again) == []
    assert not again
    assert again.to_dict() == {}
    with pytest.raises(KeyError):
        again[0]  # type: ignore[index]
    reserved: list[Any] = [0, "0", b"0"]
    assert not any(key in again for key in reserved)


def test_what_cannot_be_stored_is_refused_at_assignment_and_leaves_all_as_it_was(session: Session) -> None:
    """A TypeError that names the key, also for keys that UTF-8 cannot carry."""
    session["a"] = 1
    with pytest.raises(UnsupportedValue, match=r"session\['a'\]"):
        session["a"] = object()
    with pytest.raises(UnsupportedValue):
        session["\ud800"] = 1
    with pytest.raises(UnsupportedValue):
        session.setdefault("b", bytearray())
    with pytest.raises(UnsupportedValue, match="user_id"):
        session.renew(user_id=object())
    assert session == {"a": 1}


def test_json_dumps_takes_a_dict_of_it_and_not_the_session(session: Session) -> None:
    """A subclass of dict would silently give {}; this is a TypeError, and dict(session) works."""
    session["cart"] = ["tea"]
    with pytest.raises(TypeError):
        json.dumps(session)
    assert json.dumps(dict(session)) == '{"cart": ["tea"]}'
    assert {**session} == {"cart": ["tea"]}


def test_a_repr_shows_no_value_no_id_and_loads_nothing(shm_store: SessionStore) -> None:
    """It ends in logs: the handle and a count are all of it."""
    cookie = login_cookie(shm_store, {"password": "hunter2"}, user_id="ada")
    session = shm_store.request_session(lambda: f"session={cookie['session']}".encode())
    assert repr(session) == "<Session, not looked at>"
    assert not session.loaded
    assert session["password"] == "hunter2"
    assert repr(session) == f"<Session {session.handle}, 1 keys>"
    for secret in ("hunter2", "ada", str(session.id), cookie["session"]):
        assert secret not in repr(session)
    assert repr(shm_store.session()) == "<Session, not looked at>"


def test_a_session_is_not_pickled(session: Session) -> None:
    """It belongs to its request: what goes elsewhere is dict(session)."""
    session["a"] = 1
    for pickled in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"pass dict\(session\)"):
            pickled(session)


def test_a_value_that_cannot_be_decoded_is_an_error_for_its_key_alone(
    shm_store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other keys go on working, and the broken one can be replaced or deleted."""
    stored = shm_store.session()
    stored.update({"good": 1, "bad": "x", "worse": "y"})
    with monkeypatch.context() as patched:
        patched.setattr(working, "encode", lambda value, key=None: b"\xc7\x00\x63" if value in ("x", "y") else b"\x01")
        stored["bad"], stored["worse"] = "x", "y"
    stored.save()
    session = shm_store.session(stored.id)
    with pytest.raises(UndecodableValue, match="extension type 99"):
        session["bad"]
    with pytest.raises(UndecodableValue):
        session.get("bad", "default")
    assert session["good"] == 1
    assert set(session) == {"good", "bad", "worse"}
    session["bad"] = 2
    del session["worse"]
    session.save()
    assert shm_store.session(stored.id) == {"good": 1, "bad": 2}


def test_two_reads_give_the_same_object(shm_store: SessionStore) -> None:
    """`cart = session["cart"]` and `session["cart"]` are one list, as with a dict; another session's is its own."""
    stored = shm_store.session()
    stored["cart"] = ["tea"]
    stored.save()
    one, two = shm_store.session(stored.id), shm_store.session(stored.id)
    assert one["cart"] is one["cart"]
    one["cart"].append("milk")
    assert two["cart"] == ["tea"]
    assert shm_store.session(stored.id)["cart"] == ["tea"]


def test_a_copy_is_a_plain_dict_of_its_own(session: Session) -> None:
    """Changing it changes nothing here; its values are the same objects, as with dict.copy."""
    session["cart"] = ["tea"]
    for copied in (session.copy(), session.to_dict(), session | {}, {} | session):
        assert type(copied) is dict
        assert copied["cart"] is session["cart"]
        copied["new"] = 1
    assert session == {"cart": ["tea"]}


# ── limits ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_assignment_lets_in_can_be_committed(tmp_path: Path) -> None:
    """The size limit speaks at the assignment that goes over it, to the byte or a few before, never at the commit."""
    with make_store(tmp_path, max_size=2_000) as store:
        for step in (1, 7, 100, 240, 300, 1_999):
            session = store.session()

            def fill(session: Session = session, step: int = step) -> None:
                for number in range(2_000):
                    session[f"key{number}"] = "x" * step

            with pytest.raises(SessionTooLarge, match="max_size is 2000"):
                fill()
            number = len(session)
            assert f"key{number}" not in session
            session.create()
            session.save()
            assert session.record is not None
            assert len(session.record.data) <= 2_000
            missing = 2_000 - len(session.record.data)
            assert missing <= step + 20


def test_adding_and_deleting_does_not_use_the_limit_up(tmp_path: Path) -> None:
    """What was deleted counts no more, however often; shrinking a value is always let in."""
    with make_store(tmp_path, max_size=1_000) as store:
        session = store.session()
        for number in range(1_000):
            session[f"a rather long key, number {number}"] = "x" * 400
            del session[f"a rather long key, number {number}"]
        session["a"] = "x" * 900
        with pytest.raises(SessionTooLarge):
            session["b"] = "x" * 100
        with pytest.raises(SessionTooLarge):
            session["a"] = "x" * 1_100
        session["a"] = "x" * 100
        session["b"] = "x" * 700
        session.save()
        session.clear()
        session["c"] = "x" * 900
        session.save()
        assert session == {"c": "x" * 900}


# ── read-only ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_read_only_session_reads_and_refuses_every_change(shm_store: SessionStore) -> None:
    """A TypeError that names the option; nothing is written."""
    cookie = login_cookie(shm_store, {"a": 1, "cart": ["tea"]}, user_id="ada")["session"]
    session = shm_store.request_session(lambda: f"session={cookie}".encode(), readonly=True)
    assert (session["a"], session.user_id, session.readonly) == (1, "ada", True)

    def assign() -> None:
        session["a"] = 2

    def delete() -> None:
        del session["a"]

    for change in (
        assign,
        delete,
        session.clear,
        session.popitem,
        lambda: session.pop("a"),
        lambda: session.update(a=1),
        lambda: session.setdefault("b", 1),
        lambda: session.increment("a"),
        lambda: session.apply("a", str),
        session.renew,
        session.destroy,
        session.create,
        session.touch,
        lambda: session.set_longterm(True),
        lambda: session.set_store(False),
    ):
        with pytest.raises(ReadOnlySession, match="readonly="):
            change()
    assert session == {"a": 1, "cart": ["tea"]}
    assert not session.modified


# ── where it is found ──────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_found_on_scopes_environs_and_the_requests_of_frameworks(session: Session) -> None:
    """The same object, whatever the application has in hand."""
    scope: dict[str, Any] = {"type": "http", "headers": [], "session": session, ENVIRON_KEY: session}
    assert Session.of(scope) is session
    assert Session.of(Request(scope)) is session
    assert Session.of(HTTPConnection(scope)) is session
    assert Session.of({ENVIRON_KEY: session}) is session
    assert Session.of(SimpleNamespace(environ={ENVIRON_KEY: session})) is session
    assert Session.of(SimpleNamespace(META={ENVIRON_KEY: session})) is session
    with Flask(__name__).test_request_context(environ_overrides={ENVIRON_KEY: session}):
        assert Session.of(flask_request) is session


@pytest.mark.parametrize(
    "request_like",
    [
        {},
        {"session": {"a": 1}},
        {ENVIRON_KEY: "x"},
        None,
        object(),
        Request({"type": "http", "headers": []}),
        SimpleNamespace(environ=None),
    ],
    ids=["empty", "another session", "text", "None", "object", "starlette", "no environ"],
)
def test_where_there_is_none_the_error_says_what_to_add(request_like: Any) -> None:
    """No middleware, a skipped path, or somebody else's session."""
    with pytest.raises(NoSessionError, match=r"SessionMiddleware.*skip="):
        Session.of(request_like)


def test_our_session_is_found_though_another_took_its_usual_name(session: Session) -> None:
    """Flask and Starlette have a `session` of their own."""
    assert Session.of({"session": {"theirs": 1}, ENVIRON_KEY: session}) is session


def test_a_store_that_cannot_serve_is_an_error_at_every_look(
    shm_store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never an empty session, and never another error the second time; when it can again, the session is there."""
    cookie = login_cookie(shm_store, {"a": 1})["session"]
    session = shm_store.request_session(lambda: f"session={cookie}".encode())
    with monkeypatch.context() as patched:

        def down(*_: Any) -> None:
            raise StoreError("down")

        patched.setattr(shm_store.memory, "load", down)
        for _ in range(2):
            for look in (lambda: session["a"], lambda: session.get("a"), lambda: len(session), lambda: session.user_id):
                with pytest.raises(StoreError, match="down"):
                    look()
    assert session["a"] == 1
