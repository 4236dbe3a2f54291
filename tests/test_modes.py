"""When a session is kept: always, when the visitor agrees, or when the application says so; and how it is erased."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession import Key, Session, SessionConfig, SessionMode, SessionStore, asgi, wsgi
from shmsession.backends.base import SENTINEL, State
from shmsession.codec import encode
from shmsession.errors import NotCreated, ResponseStarted, StoreError
from shmsession.hooks import Created, Destroyed, Event, Expired, LoggedIn, Renewed
from shmsession.ids import tag_of
from shmsession.testing import ManualClock, make_store
from tests.asking import PROTOCOLS, Broken, Visitor
from tests.backends import MemoryBackend
from tests.servers import PATIENCE

MARK = "the visitor's own words"


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["cookie", "header"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Come = Callable[..., Visitor]


@pytest.fixture
def come(place: Path, protocol: str, transport: str) -> Iterator[Come]:
    """A visitor of a store in a mode."""
    stores: list[SessionStore] = []

    def visitor(mode: SessionMode, **settings: Any) -> Visitor:
        stores.append(make_store(place / f"s{len(stores)}", mode=mode, transport=transport, **settings))
        return Visitor(stores[-1], protocol, header="X-Session" if transport == "header" else None)

    yield visitor
    for store in stores:
        store.close()


def put(session: Session) -> None:
    session["v"] = MARK


def accept(session: Session) -> None:
    session.set_store(True)


def decline(session: Session) -> None:
    session.set_store(False)


def has_nothing(visitor: Visitor) -> bool:
    """Whether the client was given no session."""
    return "session" not in visitor.cookies and not visitor.token


def consent_of(visitor: Visitor) -> str | None:
    return visitor.consent if visitor.name else visitor.cookies.get("session-storable")


# ── opt-in ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_before_the_visitor_agrees_nothing_outlives_the_request(come: Come) -> None:
    """The application need not ask: what it stores is there until its response, and then nowhere."""
    visitor = come(SessionMode.OPT_IN)

    def use(session: Session) -> dict[str, Any]:
        session["v"] = MARK
        session.setdefault("cart", []).append("tea")
        session.increment("n")
        session.create()
        return session.to_dict()

    answer = visitor.ask(use)
    assert answer.result == {"v": MARK, "cart": ["tea"], "n": 1}
    assert has_nothing(visitor)
    assert consent_of(visitor) is None
    assert answer.header("vary")
    assert visitor.data() == {}
    assert visitor.store.count() == 0


def test_with_consent_the_session_is_kept_and_the_choice_remembered(come: Come) -> None:
    """Also by sessions to come: who agreed once need not be asked again."""
    visitor = come(SessionMode.OPT_IN)

    def agree(session: Session) -> tuple[bool, bool]:
        before = session.storable
        session.set_store(True)
        session["v"] = MARK
        return before, session.storable

    assert visitor.ask(lambda session: session.consent).result is None
    assert visitor.ask(agree).result == (False, True)
    assert visitor.ask(lambda session: session.consent).result is True
    assert consent_of(visitor) == "true"
    assert visitor.data() == {"v": MARK}
    visitor.ask(lambda session: session.destroy())
    assert has_nothing(visitor)
    assert consent_of(visitor) == "true"
    visitor.ask(put)
    assert visitor.data() == {"v": MARK}
    assert visitor.ask(accept).all("set-cookie") == [], "it is known"


def test_a_session_that_is_there_was_agreed_to_though_the_choice_is_lost(come: Come) -> None:
    """Somebody cleared that cookie alone."""
    visitor = come(SessionMode.OPT_IN)

    def agree(session: Session) -> None:
        session.set_store(True)
        session["v"] = MARK

    visitor.ask(agree)
    visitor.cookies.pop("session-storable", None)
    visitor.consent = None
    assert visitor.ask(lambda session: (session.consent, session.to_dict())).result == (True, {"v": MARK})


def test_agreeing_alone_stores_no_session(come: Come) -> None:
    """Only the choice: sessions are never created empty."""
    visitor = come(SessionMode.OPT_IN)
    visitor.ask(accept)
    assert has_nothing(visitor)
    assert consent_of(visitor) == "true"
    assert visitor.store.count() == 0


@pytest.mark.parametrize("mode", [SessionMode.OPT_IN, SessionMode.MANUAL])
def test_withdrawn_consent_erases_the_session_at_once_and_for_good(come: Come, mode: SessionMode) -> None:
    """Even when the response fails; what is stored afterwards does not outlive the request, nor do later ones store."""
    visitor = come(mode)

    def agree(session: Session) -> None:
        session.create()
        session.set_store(True)
        session["v"] = MARK

    visitor.ask(agree)
    cookies, token = dict(visitor.cookies), visitor.token

    def withdraw(session: Session) -> tuple[int, dict[str, Any]]:
        session.set_store(False)
        session.create()
        session["late"] = MARK
        return visitor.store.count(), session.to_dict()

    assert visitor.ask(withdraw, status=500).result == (0, {"late": MARK})
    assert has_nothing(visitor)
    assert consent_of(visitor) == "false"

    def use(session: Session) -> bool:
        session.create()
        session["v"] = MARK
        return session.storable

    assert visitor.ask(use).result is False
    assert has_nothing(visitor)
    visitor.cookies, visitor.token = cookies, token
    assert visitor.data() == {}
    assert visitor.store.count() == 0


def test_consent_that_a_failed_request_gave_is_not_given(come: Come) -> None:
    """As with every other change; to withdraw it is never undone."""
    visitor = come(SessionMode.OPT_IN)

    def agree(session: Session) -> None:
        session.set_store(True)
        session["v"] = MARK

    visitor.ask(agree, status=500)
    assert has_nothing(visitor)
    assert consent_of(visitor) is None


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("mode", [SessionMode.OPT_IN, SessionMode.MANUAL])
def test_consent_that_was_saved_is_kept_with_its_session_whatever_the_answer(
    come: Come, mode: SessionMode, status: int
) -> None:
    """The next request finds both or neither."""
    visitor = come(mode)

    def agree(session: Session) -> None:
        session.create()
        session.set_store(True)
        session["v"] = MARK
        session.save()

    visitor.ask(agree, status)
    assert (consent_of(visitor), visitor.data()) == ("true", {"v": MARK})


def test_consent_that_is_withdrawn_stays_so_though_the_application_breaks_afterwards(come: Come) -> None:
    """The error page, which servers make of an exception, is then one that says so to the browser."""
    visitor = come(SessionMode.OPT_IN)

    def agree(session: Session) -> None:
        session.set_store(True)
        session["v"] = MARK

    def withdraw(session: Session) -> None:
        session.set_store(False)
        raise Broken

    def breaks(session: Session) -> None:
        session["more"] = 1
        raise Broken

    visitor.ask(agree)
    assert visitor.ask(breaks).headers == [], "whatever else it did, the page is the server's own"
    assert visitor.data() == {"v": MARK}
    answer = visitor.ask(withdraw)
    assert (answer.status, answer.header("cache-control"), answer.header("content-length")) == (500, "no-store", "22")
    assert has_nothing(visitor)
    assert consent_of(visitor) == "false"
    visitor.ask(put)
    assert visitor.store.count() == 0


def test_what_a_withdrawal_missed_ends_at_the_visitors_next_request(come: Come) -> None:
    """A login in another tab gives the session a new id between a request's look and its "no"."""
    visitor = come(SessionMode.OPT_IN)

    def agree(session: Session) -> None:
        session.set_store(True)
        session["v"] = MARK

    visitor.ask(agree)
    other = Visitor(visitor.store, visitor.protocol, header=visitor.name)
    other.cookies, other.token, other.consent = dict(visitor.cookies), visitor.token, visitor.consent
    origin = visitor.store.request_session(visitor.presented)
    assert origin["v"] == MARK
    other.ask(lambda session: session.renew(user_id="ada"))
    origin.set_store(False)
    visitor.store.commit(origin)
    assert visitor.store.count() == 1
    visitor.token = other.token
    visitor.cookies = {**other.cookies, **({} if visitor.name else {"session-storable": "false"})}
    visitor.consent = "false"
    assert visitor.data() == {}
    assert visitor.store.count() == 0
    assert has_nothing(visitor)


YES: dict[str, Callable[[Session], object]] = {
    "yes": accept,
    "no": decline,
    "put": put,
    "save": lambda session: session.save(),
}


@pytest.mark.parametrize("agreed", [None, True])
@pytest.mark.parametrize(
    ("words", "choice", "is_kept"),
    [
        ("yes put", None, False),
        ("yes put save", "true", True),
        ("yes put save no", "false", False),
        ("yes put save no yes", "false", False),
        ("no yes", "false", False),
        ("no yes put save", "true", True),
        ("no yes put save no yes put", "false", False),
    ],
)
@pytest.mark.parametrize("end", ["500", "an exception"])
def test_what_a_failed_request_said_of_consent(
    come: Come, agreed: bool | None, words: str, choice: str | None, is_kept: bool, end: str
) -> None:
    """A "no" stays, and a "yes" with what was saved; a "yes" by itself is forgotten. An exception takes a cookie along
    only for a "no"."""
    visitor = come(SessionMode.OPT_IN)
    if agreed:
        visitor.ask(accept)

    def say(session: Session) -> None:
        for word in words.split(" "):
            YES[word](session)
        if end != "500":
            raise Broken

    visitor.ask(say, 500)
    if end != "500" and choice == "true":
        choice, is_kept = None, False  # nobody can tell the browser of its session
    assert consent_of(visitor) == (choice or ("true" if agreed else None))
    assert (visitor.data() == {"v": MARK}) is is_kept
    assert has_nothing(visitor) is not is_kept


def test_the_backend_hears_of_a_no_before_the_page_that_says_so(place: Path, protocol: str) -> None:
    """Also when an exception or a full store makes it."""
    rows = MemoryBackend(labelled=False)
    settings: dict[str, Any] = {"directory": place, "name": "n", "keys": (Key(b"k" * 32),), "secure": False}
    config = SessionConfig(mode=SessionMode.OPT_IN, through_timeout=timedelta(seconds=PATIENCE), **settings)
    with SessionStore(rows, config=config) as store:
        visitor = Visitor(store, protocol)
        for error in (Broken(), StoreError("full")):

            def agree(session: Session) -> None:
                session.set_store(True)
                session["v"] = MARK

            def withdraw(session: Session, error: Exception = error) -> None:
                session.set_store(False)
                raise error

            visitor.ask(agree)
            assert store.sync.flush()
            answer = visitor.ask(withdraw)
            assert answer.status == (500 if isinstance(error, Broken) else 503)
            assert answer.header("cache-control") == "no-store"
            assert answer.header("vary") == "Cookie"
            assert visitor.cookies == {"session-storable": "false"}
            assert {row.state for handle, row in rows.rows.items() if handle != SENTINEL} == {State.DEAD}
        assert len(rows.rows) == 3


def test_a_no_is_sent_though_the_commit_itself_fails(come: Come) -> None:
    """As when what was stored afterwards cannot be."""
    visitor = come(SessionMode.OPT_IN)
    visitor.ask(accept)
    visitor.ask(put)

    def fill(session: Session) -> None:
        session.set_store(False)
        session["l"] = kept = []
        kept.append(object())

    answer = visitor.ask(fill)
    assert has_nothing(visitor)
    assert (consent_of(visitor), visitor.data()) == ("false", {}), answer


def test_an_error_page_that_cannot_be_sent_hides_no_exception(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The application's own goes on to the server, whatever became of the connection, or of its start_response."""
    with make_store(place, mode=SessionMode.OPT_IN) as store:

        async def app(scope: asgi.Scope, receive: asgi.Receive, send: asgi.Send) -> None:
            decline(Session.of(scope))
            raise Broken

        async def gone(*_: Any) -> Any:
            raise OSError("the connection is gone")

        with pytest.raises(Broken):
            asyncio.run(asgi.SessionMiddleware(app, store)({"type": "http", "path": "/", "headers": []}, gone, gone))

        def wsgi_app(environ: wsgi.Environ, start_response: wsgi.StartResponse) -> list[bytes]:
            decline(Session.of(environ))
            raise Broken

        def closed(*_: Any) -> Any:
            raise OSError("the connection is gone")

        def nothing(*_: Any) -> Any:
            return None

        for start_response in (closed, nothing):
            with pytest.raises(Broken):
                wsgi.SessionMiddleware(wsgi_app, store)({"PATH_INFO": "/"}, start_response)
        assert [text for text in caplog.messages if "could not be sent" in text] == [caplog.messages[0]] * 2


def test_who_declines_is_not_asked_again(come: Come) -> None:
    """The choice is kept without a session."""
    visitor = come(SessionMode.OPT_IN)
    visitor.ask(decline)
    assert consent_of(visitor) == "false"
    assert visitor.ask(lambda session: (session.storable, session.consent)).result == (False, False)
    visitor.ask(put)
    assert has_nothing(visitor)

    def change_of_mind(session: Session) -> None:
        session.set_store(True)
        session["v"] = MARK

    visitor.ask(change_of_mind)
    assert (consent_of(visitor), visitor.data()) == ("true", {"v": MARK})


@pytest.mark.parametrize("mode", [SessionMode.OPT_IN, SessionMode.MANUAL])
@pytest.mark.parametrize("readonly", [False, True], ids=["", "read-only"])
def test_a_session_that_a_slower_request_began_ends_when_its_visitor_has_declined(
    come: Come, mode: SessionMode, readonly: bool
) -> None:
    """It came while they still agreed, and its cookie after the answer to their "no"."""
    visitor = come(mode)

    def begin(session: Session) -> None:
        session.create()
        session["v"] = MARK

    visitor.ask(accept)
    slow = Visitor(visitor.store, visitor.protocol, header=visitor.name)
    slow.cookies, slow.consent = dict(visitor.cookies), visitor.consent
    visitor.ask(decline)
    slow.ask(begin)
    assert visitor.store.count() == 1
    visitor.cookies = {**slow.cookies, **visitor.cookies}
    visitor.token = slow.token

    def look(session: Session) -> tuple[dict[str, Any], bool]:
        Session.of({"session": session}, readonly=readonly)
        return session.to_dict(), session.exists

    assert visitor.ask(look).result == ({}, False)
    assert visitor.store.count() == 0
    assert has_nothing(visitor)
    assert consent_of(visitor) == "false"
    assert visitor.store.stats().events["Destroyed"] == 1


def test_the_last_word_of_a_request_counts(come: Come) -> None:
    visitor = come(SessionMode.OPT_IN)

    def to_and_fro(session: Session) -> None:
        for choice in (True, False, True, False):
            session.set_store(choice)
            session["v"] = MARK

    visitor.ask(to_and_fro)
    assert has_nothing(visitor)
    assert consent_of(visitor) == "false"

    def back(session: Session) -> None:
        to_and_fro(session)
        session.set_store(True)
        session["v"] = MARK

    visitor.ask(back)
    assert (consent_of(visitor), visitor.data()) == ("true", {"v": MARK})


def test_a_login_without_consent_is_not_kept_and_told_once(come: Come, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever writes the login page should say there that logging in means to be remembered."""
    visitor = come(SessionMode.OPT_IN)
    for _ in range(3):
        visitor.ask(lambda session: session.renew(user_id="ada"))
    assert has_nothing(visitor)
    assert [record.message for record in caplog.records if "set_store(True)" in record.message] != []
    assert len([record for record in caplog.records if "login" in record.message]) == 1

    def log_in(session: Session) -> None:
        session.set_store(True)
        session.renew(user_id="ada")

    visitor.ask(log_in)
    assert visitor.ask(lambda session: session.user_id).result == "ada"


def test_a_choice_that_is_none_is_no_choice(come: Come) -> None:
    """Whatever a script, or somebody else, wrote there."""
    visitor = come(SessionMode.OPT_IN)
    for junk in ("TRUE", "1", "", "true x", "yes"):
        visitor.cookies["session-storable"] = visitor.consent = junk
        visitor.ask(put)
        assert has_nothing(visitor)


# ── manual ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_in_manual_mode_storing_before_create_is_an_error_that_names_it(come: Come) -> None:
    """Reading is none: an empty session is what there is."""
    visitor = come(SessionMode.MANUAL)

    def try_all(session: Session) -> list[str]:
        assert session.get("v") is None
        assert not session.exists
        refused = []
        for verb in (
            lambda: session.update(v=1), lambda: session.increment("n"), lambda: session.setdefault("a", []),
            lambda: session.renew(user_id="ada"), lambda: session.touch(), lambda: session.set_longterm(True),
            lambda: session.clear(), lambda: session.flash("hello"),
        ):  # fmt: skip
            with pytest.raises(NotCreated, match=r"create\(\)") as error:
                verb()
            refused.append(str(error.value))
        return refused

    assert len(visitor.ask(try_all).result) == 8
    assert has_nothing(visitor)

    def create(session: Session) -> None:
        session.create()
        session["v"] = MARK

    visitor.ask(create)
    assert consent_of(visitor) is None
    assert visitor.data() == {"v": MARK}
    visitor.ask(lambda session: session.update(w=1))
    assert visitor.ask(lambda session: (session.exists, session.to_dict())).result == (True, {"v": MARK, "w": 1})


def test_a_manual_session_can_be_created_empty_and_is_gone_after_destroy(come: Come) -> None:
    visitor = come(SessionMode.MANUAL)
    visitor.ask(lambda session: session.create())
    assert visitor.ask(lambda session: session.exists).result

    def destroy(session: Session) -> None:
        session.destroy()
        with pytest.raises(NotCreated):
            session["v"] = 1

    visitor.ask(destroy)
    assert has_nothing(visitor)


# ── persistent ────────────────────────────────────────────────────────────────────────────────────────────────


def test_in_persistent_mode_no_choice_is_read_or_written(come: Come) -> None:
    """set_store(False) keeps a session in memory; nobody was asked for consent."""
    visitor = come(SessionMode.PERSISTENT)
    visitor.cookies["session-storable"] = visitor.consent = "false"
    visitor.ask(put)

    def memory_only(session: Session) -> None:
        session.set_store(False)

    answer = visitor.ask(memory_only)
    assert answer.all("set-cookie") == []
    assert visitor.data() == {"v": MARK}
    assert visitor.ask(lambda session: (session.storable, session.consent)).result == (False, None)


# ── scripts, sockets, hooks ───────────────────────────────────────────────────────────────────────────────────


def test_a_script_needs_no_consent_of_anybody(place: Path) -> None:
    """Whoever makes a session by hand knows what for."""
    with make_store(place, mode=SessionMode.OPT_IN) as store:
        session = store.session()
        session["v"] = 1
        session.save()
        assert store.session(session.id)["v"] == 1
        other = store.session("x" * 43)
        other["v"] = 2
        other.save()
        assert store.session(other.id)["v"] == 2


def test_a_choice_that_comes_too_late_to_be_remembered_is_an_error_and_erases_all_the_same(place: Path) -> None:
    """After the headers of a stream, or on an open websocket."""
    with make_store(place, mode=SessionMode.OPT_IN) as store:
        visitor = Visitor(store)

        def agree(session: Session) -> None:
            session.set_store(True)
            session["v"] = MARK

        visitor.ask(agree)
        header = "; ".join(f"{name}={value}" for name, value in visitor.cookies.items()).encode()
        session = store.request_session(lambda: header)
        assert session["v"] == MARK
        session.headers_sent = True
        with pytest.raises(ResponseStarted, match="erased"):
            session.set_store(False)
        assert store.count() == 0
        late = store.request_session(lambda: b"")
        assert late.to_dict() == {}
        late.headers_sent = True
        with pytest.raises(ResponseStarted, match="before the first byte"):
            late.set_store(True)
        known = store.request_session(lambda: b"session-storable=true")
        assert known.to_dict() == {}
        known.headers_sent = True
        known.set_store(True)


def test_hooks_hear_of_sessions_that_begin_and_end(place: Path) -> None:
    events: list[Event] = []
    with make_store(place, mode=SessionMode.OPT_IN) as store:
        store.hooks._hooks = (events.append,)
        visitor = Visitor(store)
        visitor.ask(put)
        assert events == []

        def agree(session: Session) -> None:
            session.set_store(True)
            session["v"] = MARK

        visitor.ask(agree)
        first = visitor.ask(lambda session: session.handle).result
        visitor.ask(lambda session: session.renew())
        second = visitor.ask(lambda session: session.handle).result
        visitor.ask(lambda session: session.renew(user_id="ada"))
        third = visitor.ask(lambda session: session.handle).result
        visitor.ask(decline)
        assert events == [
            Created(first, logged_in=False),
            Renewed(second, first, logged_in=False),
            Renewed(third, second, logged_in=True),
            LoggedIn(third, tag_of(encode("ada")).hex()),
            Destroyed(third),
        ]
        events.clear()
        for _ in range(3):
            Visitor(store).ask(log_in)
        assert [type(event) for event in events] == [Created, LoggedIn] * 3
        assert isinstance(store.clock, ManualClock)
        store.clock.advance(days=1)
        events.clear()
        store.cleanup()
        assert events == [Expired(3)]


def log_in(session: Session) -> None:
    session.set_store(True)
    session.renew(user_id="ada")
