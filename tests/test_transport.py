"""How a session travels: by cookie or header, bound to its client, and from yesterday's settings to today's."""

import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession import CookieMode, Key, OldCookie, Session, SessionMode, SessionStore
from shmsession.errors import ConfigError, ResponseStarted, StoreError
from shmsession.hooks import CookieRefused
from shmsession.testing import ManualClock, make_store
from tests.asking import PROTOCOLS, Visitor

Make = Callable[..., SessionStore]
KEY = Key(b"k" * 32)


@pytest.fixture
def make(place: Path) -> Iterator[Make]:
    """Stores that share one directory, name and Key: the same site under other settings."""
    made: list[SessionStore] = []

    def store(**settings: Any) -> SessionStore:
        made.append(make_store(place / "s", made[0].clock if made else None, **{"keys": (KEY,), **settings}))
        return made[-1]

    yield store
    for one in made:
        one.close()


@pytest.fixture(params=PROTOCOLS)
def protocol(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def put(**values: Any) -> Callable[[Session], None]:
    def action(session: Session) -> None:
        session.update(values)

    return action


def refusals(store: SessionStore) -> list[str]:
    """The reasons from now on."""
    reasons: list[str] = []
    store.hooks._hooks = (lambda event: reasons.append(event.reason) if isinstance(event, CookieRefused) else None,)
    return reasons


# ── modes of cookies ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("generator", [None, uuid.uuid4], ids=["our ids", "uuids"])
@pytest.mark.parametrize("mode", CookieMode)
def test_a_session_lives_in_every_mode_and_under_every_id(
    make: Make, protocol: str, mode: CookieMode, generator: Callable[[], object] | None
) -> None:
    """The id that the application sees is the one that a plain cookie shows, and a signed one begins with."""
    store = make(cookie_mode=mode, id_generator=generator)
    visitor = Visitor(store, protocol)
    visitor.ask(put(a=1))
    session_id = visitor.ask(lambda session: session.id).result
    if generator:
        assert str(uuid.UUID(session_id)) == session_id
    value = visitor.cookies["session"]
    assert (session_id in value) is (mode is not CookieMode.PRIVATE)
    assert (session_id == value) is (mode is CookieMode.PLAIN)
    assert store.session(session_id)["a"] == 1
    visitor.ask(lambda session: session.renew(user_id="ada"))
    assert visitor.cookies["session"] != value
    assert visitor.data() == {"a": 1}
    assert visitor.ask(lambda session: session.id).result != session_id
    visitor.ask(lambda session: session.destroy())
    assert visitor.cookies == {}


def test_a_plain_id_that_nobody_was_given_is_never_adopted(make: Make, protocol: str) -> None:
    """However well it is formed: what is stored begins a session of our own making."""
    visitor = Visitor(make(cookie_mode=CookieMode.PLAIN), protocol)
    visitor.cookies["session"] = fixed = str(uuid.uuid4())
    assert visitor.data() == {}
    visitor.ask(put(a=1))
    assert visitor.cookies["session"] != fixed
    visitor.cookies["session"] = fixed
    assert visitor.data() == {}


def test_an_id_generator_that_repeats_itself_or_gives_no_ids_is_an_error(make: Make) -> None:
    """At construction, and later a 503: never somebody else's session."""
    for wrong in (lambda: "x" * 20, lambda: 7, lambda: "", lambda: f"{uuid.uuid4()}\r\n", lambda: f"é{uuid.uuid4()}"):
        with pytest.raises(ConfigError, match=r"id_generator.*uuid\.uuid4"):
            make(id_generator=wrong)
    with pytest.raises(ConfigError, match=r"id_generator: write a function"):
        make(id_generator="uuid")
    ids = iter(["a" * 20, "b" * 20, "c" * 20, "c" * 20, "short"])
    store = make(id_generator=lambda: next(ids))
    first = store.session()
    first["v"] = 1
    first.save()
    for _ in range(2):
        again = store.session()
        again["v"] = 2
        with pytest.raises(StoreError, match="id_generator"):
            again.save()
    assert store.session("c" * 20)["v"] == 1

    def exhausted() -> str:
        raise OSError("no more numbers")

    with pytest.raises(ConfigError, match="id_generator fails with OSError: no more numbers"):
        make(id_generator=exhausted)


def test_nobody_is_moved_into_the_session_of_another(make: Make, protocol: str) -> None:
    """When an id_generator gives an id twice, and the second is asked for at a login."""
    ids = iter(["1" * 20, "2" * 20, "a" * 20, "b" * 20, "a" * 20, "c" * 20])
    store = make(id_generator=lambda: next(ids))
    ada, bob = Visitor(store, protocol), Visitor(store, protocol)
    ada.ask(put(words="ada's"))
    bob.ask(put(words="bob's"))
    assert bob.ask(lambda session: session.renew(user_id="bob")).status == 503
    assert (ada.data(), bob.data()) == ({"words": "ada's"}, {"words": "bob's"})
    bob.ask(lambda session: session.renew(user_id="bob"))
    assert bob.ask(lambda session: (session.user_id, session["words"])).result == ("bob", "bob's")


# ── the header ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", CookieMode)
def test_a_session_travels_by_header_alone(make: Make, protocol: str, mode: CookieMode) -> None:
    """The response carries it when it changes, and Vary says what was looked at; no cookie is set, none is read."""
    client = Visitor(make(transport="header", cookie_mode=mode), protocol, header="X-Session")
    client.token = None
    answer = client.ask(put(a=1))
    assert answer.all("set-cookie") == []
    assert (answer.header("vary"), answer.header("cache-control")) == ("X-Session", "no-store")
    token = client.headers()["X-Session"]
    answer = client.ask(lambda session: session.to_dict())
    assert answer.result == {"a": 1}
    assert (answer.header("x-session"), answer.header("vary")) == (None, "X-Session")
    as_cookie = Visitor(client.store, protocol)
    as_cookie.cookies["session"] = token
    assert as_cookie.data() == {}
    answer = client.ask(lambda session: session.destroy())
    assert answer.header("x-session") == ""
    assert client.data() == {}


def test_a_header_that_is_no_token_is_refused_and_never_falls_back_to_the_cookie(make: Make, protocol: str) -> None:
    store = make(transport="both")
    browser = Visitor(store, protocol)
    browser.ask(put(a=1))
    client = Visitor(store, protocol, header="X-Session")
    client.cookies, client.token = dict(browser.cookies), "junk"
    reasons = refusals(store)
    assert client.data() == {}
    assert reasons == ["malformed"]
    client.token = browser.cookies["session"]
    assert client.data() == {}, "a cookie's value is no header's"
    assert reasons == ["malformed", "forged"]


def test_with_both_transports_each_request_is_answered_as_it_came(make: Make, protocol: str) -> None:
    """A browser gets no header that its scripts could read; a client that sends the header, be it empty, no cookie."""
    store = make(transport="both", header_name="X-Api-Session")
    browser, client = Visitor(store, protocol), Visitor(store, protocol, header="X-Api-Session")
    answer = browser.ask(put(a=1))
    assert (len(answer.all("set-cookie")), answer.header("x-api-session")) == (1, None)
    assert answer.header("vary") == "Cookie, X-Api-Session"
    answer = client.ask(put(b=2))
    assert (answer.all("set-cookie"), bool(answer.header("x-api-session"))) == ([], True)
    assert (browser.data(), client.data()) == ({"a": 1}, {"b": 2})
    client.cookies = dict(browser.cookies)
    assert client.data() == {"b": 2}, "who names a session in the header means that one"


@pytest.mark.parametrize("name", ["", "X Session", "X-Session:", "X_Session", "-", "é", "x" * 65])
def test_a_header_name_is_a_token(name: str, make: Make) -> None:
    """Without underscores: many proxies drop such a header, and CGI's names do not tell them from dashes."""
    with pytest.raises(ConfigError, match="letters, digits and dashes"):
        make(transport="header", header_name=name)


@pytest.mark.parametrize(
    "name",
    [
        "Cookie",
        "set-cookie",
        "Content-Type",
        "X-Forwarded-For",
        "VARY",
        "If-Match",
        "Proxy",
        "Retry-After",
        "Sec-Fetch-Site",
    ],
)
def test_a_header_that_means_something_else_carries_no_session(name: str, make: Make) -> None:
    with pytest.raises(ConfigError, match="another meaning"):
        make(transport="header", header_name=name)
    make(transport="cookie", header_name=name)


def test_vary_names_every_header_that_the_answer_depends_on(make: Make, protocol: str) -> None:
    """Also the one that says what the visitor chose, where one is asked."""
    expected = {
        (SessionMode.PERSISTENT, "header"): "X-Session",
        (SessionMode.OPT_IN, "cookie"): "Cookie",
        (SessionMode.OPT_IN, "header"): "X-Session, X-Session-Storable",
        (SessionMode.MANUAL, "both"): "Cookie, X-Session, X-Session-Storable",
    }
    for (mode, transport), vary in expected.items():
        header = None if transport == "cookie" else "X-Session"
        visitor = Visitor(make(mode=mode, transport=transport), protocol, header=header)
        assert visitor.ask(lambda session: session.consent).header("vary") == vary


# ── binding ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("header", [None, "X-Session"])
@pytest.mark.parametrize("mode", [CookieMode.PRIVATE, CookieMode.SIGNED])
def test_a_bound_session_is_none_to_another_client(
    make: Make, protocol: str, mode: CookieMode, header: str | None
) -> None:
    """The reason is told to the hooks; for the right client it goes on, and a renewed one is bound as well."""
    store = make(bind_to=("ip", "user_agent"), cookie_mode=mode, transport="header" if header else "cookie")
    visitor = Visitor(store, protocol, header=header)
    visitor.ask(put(a=1))
    visitor.ask(lambda session: session.renew(user_id="ada"))
    assert visitor.data() == {"a": 1}
    reasons = refusals(store)
    for what, other in (("peer", "192.0.2.2"), ("agent", "Chrome"), ("agent", "")):
        mine = getattr(visitor, what)
        setattr(visitor, what, other)
        assert visitor.data() == {}
        setattr(visitor, what, mine)
    assert reasons == ["moved"] * 3
    assert visitor.data() == {"a": 1}


def test_an_address_behind_proxies_is_that_of_the_client(make: Make, protocol: str) -> None:
    """With the number of proxies declared; what the client adds in front changes nothing."""
    visitor = Visitor(make(bind_to=("ip",), trusted_proxies=1), protocol)
    visitor.peer = "10.0.0.1"
    visitor.more = {"X-Forwarded-For": "203.0.113.9"}
    visitor.ask(put(a=1))
    visitor.peer, visitor.more = "10.0.0.2", {"X-Forwarded-For": "1.2.3.4, 203.0.113.9"}
    assert visitor.data() == {"a": 1}
    visitor.more = {"X-Forwarded-For": "203.0.113.9, 203.0.113.10"}
    assert visitor.data() == {}


def test_an_ipv6_client_may_change_the_half_that_is_its_own(make: Make, protocol: str) -> None:
    visitor = Visitor(make(bind_to=("ip",)), protocol)
    visitor.peer = "2001:db8:1:2::1"
    visitor.ask(put(a=1))
    visitor.peer = "2001:db8:1:2:ffff::9"
    assert visitor.data() == {"a": 1}
    visitor.peer = "2001:db8:1:3::1"
    assert visitor.data() == {}


def test_a_plain_id_can_be_bound_to_nothing(make: Make) -> None:
    with pytest.raises(ConfigError, match="use private or signed"):
        make(bind_to=("ip",), cookie_mode=CookieMode.PLAIN)
    with pytest.raises(ConfigError, match="use private or signed"):
        make(old_cookies=(OldCookie(mode=CookieMode.PLAIN, bind_to=("ip",)),))


# ── yesterday's cookies ───────────────────────────────────────────────────────────────────────────────────────

FORMS: list[dict[str, Any]] = [
    {"cookie_mode": CookieMode.PRIVATE},
    {"cookie_mode": CookieMode.SIGNED},
    {"cookie_mode": CookieMode.PLAIN},
    {"cookie_mode": CookieMode.PRIVATE, "bind_to": ("user_agent",)},
    {"cookie_mode": CookieMode.SIGNED, "bind_to": ("ip",)},
]


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("after", range(len(FORMS)))
@pytest.mark.parametrize("before", range(len(FORMS)))
def test_changing_the_cookie_of_a_live_site_logs_nobody_out(
    make: Make, protocol: str, before: int, after: int, renamed: bool
) -> None:
    """The old form is accepted while it is named in old_cookies, and replaced at the next commit; then it may go."""
    if before == after and not renamed:
        return
    old, new = FORMS[before], dict(FORMS[after])
    visitor = Visitor(make(**old), protocol)
    visitor.ask(lambda session: session.renew(user_id="ada"))
    session_id = visitor.ask(lambda session: session.id).result
    form = OldCookie(name="session" if renamed else None, mode=old["cookie_mode"], bind_to=old.get("bind_to", ()))
    new |= {"cookie_name": "sid"} if renamed else {}
    visitor.store = make(**new, old_cookies=(form,))
    assert visitor.ask(lambda session: (session.user_id, session.id)).result == ("ada", session_id)
    visitor.ask(put(a=1))
    assert set(visitor.cookies) == ({"sid"} if renamed else {"session"})
    visitor.store = make(**new)
    assert visitor.ask(lambda session: (session.user_id, session.id)).result == ("ada", session_id)
    assert visitor.ask(put(b=2)).all("set-cookie") == []


def test_a_form_that_is_not_named_any_more_is_refused(make: Make, protocol: str) -> None:
    visitor = Visitor(make(cookie_mode=CookieMode.SIGNED), protocol)
    visitor.ask(put(a=1))
    visitor.store = make()
    assert visitor.data() == {}
    assert visitor.ask(put(a=2)).all("set-cookie")


def test_logging_out_takes_the_old_cookie_away_as_well(make: Make, protocol: str) -> None:
    visitor = Visitor(make(cookie_name="sid"), protocol)
    visitor.ask(put(a=1))
    visitor.store = make(old_cookies=(OldCookie(name="sid"),))
    visitor.ask(lambda session: session.destroy())
    assert visitor.cookies == {}


@pytest.mark.parametrize(
    ("name", "old", "now", "removals"),
    [
        ("sid", {"domain": "example.com"}, {}, ["Path=/", "Path=/; Domain=example.com"]),
        ("sid", {"path": "/shop"}, {"domain": "example.com"}, ["Path=/; Domain=example.com", "Path=/shop"]),
        ("sid", {}, {}, ["Path=/"]),
        ("__Host-session", {}, {"domain": "example.com", "path": "/shop"}, ["Path=/"]),
        ("__Secure-sid", {"domain": "example.com"}, {}, ["Path=/", "Path=/; Domain=example.com"]),
        ("__Http-sid", {}, {"domain": "example.com"}, ["Path=/; Domain=example.com", "Path=/"]),
    ],
)
def test_a_cookie_of_an_old_name_is_taken_away_as_it_was_set(
    make: Make, name: str, old: dict[str, Any], now: dict[str, Any], removals: list[str]
) -> None:
    """Browsers keep a cookie of another domain or path apart, and drop what a prefix of its name forbids."""
    visitor = Visitor(make(cookie_name=name, secure=name.startswith("__")))
    visitor.ask(put(a=1))
    visitor.store = make(cookie_name="shop", old_cookies=(OldCookie(name=name, **old),), **now)
    lines = [line for line in visitor.ask(put(b=2)).all("set-cookie") if line.startswith(f"{name}=")]
    end = "; SameSite=Lax; HttpOnly" + ("; Secure" if name.startswith("__") else "")
    assert lines == [f"{name}=; Max-Age=0; {one}{end}" for one in removals]


def test_whoever_meets_the_end_of_a_session_takes_no_cookie_of_an_old_name_away(make: Make, protocol: str) -> None:
    """Another request may have set it meanwhile: during a reload workers with the old name still serve."""
    before = make(cookie_name="sid", old_cookies=(OldCookie(name="session"),))
    visitor = Visitor(before, protocol)
    visitor.ask(put(a=1))
    slow = Visitor(make(old_cookies=(OldCookie(name="sid"),)), protocol)
    slow.cookies = dict(visitor.cookies)
    visitor.ask(lambda session: session.renew(user_id="ada"))
    for action in (put(late=1), lambda session: session.get("a")):
        assert slow.ask(action).all("set-cookie") == []


def test_old_names_are_taken_away_wherever_any_of_them_was_set(make: Make) -> None:
    visitor = Visitor(make(cookie_name="sid"))
    visitor.ask(put(a=1))
    old = (OldCookie(name="sid", domain="example.com"), OldCookie(name="sid", mode=CookieMode.PLAIN, path="/shop"))
    visitor.store = make(cookie_name="shop", old_cookies=old)
    lines = [line for line in visitor.ask(put(b=2)).all("set-cookie") if line.startswith("sid=")]
    assert [line.removeprefix("sid=; Max-Age=0; ").removesuffix("; SameSite=Lax; HttpOnly") for line in lines] == [
        "Path=/",
        "Path=/; Domain=example.com",
        "Path=/shop",
    ]


def test_old_cookies_need_cookies_and_names_of_their_own(make: Make) -> None:
    with pytest.raises(ConfigError, match="set transport='both'"):
        make(transport="header", old_cookies=(OldCookie(name="sid"),))
    with pytest.raises(ConfigError, match="another name"):
        make(storable_cookie_name="sid", old_cookies=(OldCookie(name="sid"),))
    for moved in (OldCookie(domain="example.com"), OldCookie(name="session", path="/shop")):
        with pytest.raises(ConfigError, match="change the name"):
            make(old_cookies=(moved,))
    for wrong in ({"domain": 1}, {"path": None}, {"path": "shop"}, {"domain": "a b"}):
        with pytest.raises(ConfigError):
            OldCookie(name="sid", **wrong)


@pytest.mark.parametrize("after", CookieMode)
@pytest.mark.parametrize("before", CookieMode)
def test_an_old_cookie_that_cannot_be_taken_away_is_never_preferred_to_the_new_one(
    make: Make, protocol: str, before: CookieMode, after: CookieMode
) -> None:
    """As when it was set for another domain: the browser goes on sending both."""
    visitor = Visitor(make(cookie_name="sid", cookie_mode=before), protocol)
    visitor.ask(put(a=1))
    kept = dict(visitor.cookies)
    visitor.store = make(cookie_mode=after, old_cookies=(OldCookie(name="sid", mode=before),))
    visitor.ask(lambda session: session.renew(user_id="ada"))
    visitor.cookies.update(kept)
    assert visitor.ask(lambda session: (session.user_id, session.to_dict())).result == ("ada", {"a": 1})


def test_who_has_a_cookie_of_todays_name_is_not_looked_for_under_an_old_one(make: Make, protocol: str) -> None:
    """Anybody who can set cookies for this host may have set that; one of today's name may be better protected."""
    theirs = Visitor(make(cookie_name="sid"), protocol)
    theirs.ask(put(a=1))
    store = make(old_cookies=(OldCookie(name="sid"), OldCookie(mode=CookieMode.SIGNED)))
    visitor = Visitor(store, protocol)
    reasons = refusals(store)
    for junk in ("of a Key that has retired", "x" * 92):
        visitor.cookies = {**theirs.cookies, "session": junk}
        assert visitor.data() == {}
    assert reasons == ["malformed", "malformed"]
    visitor.cookies = dict(theirs.cookies)
    assert visitor.data() == {"a": 1}


# ── how long it stays ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_cookie_can_end_with_the_browser_unless_the_session_is_long_term(make: Make, protocol: str) -> None:
    """`browser_session`: remember-me gives it an age, and forgetting takes that away again."""
    visitor = Visitor(make(browser_session=True), protocol)
    (first,) = visitor.ask(put(a=1)).all("set-cookie")
    assert "Max-Age" not in first
    (remembered,) = visitor.ask(lambda session: session.set_longterm(True)).all("set-cookie")
    assert "; Max-Age=34560000;" in remembered
    (forgotten,) = visitor.ask(lambda session: session.set_longterm(False)).all("set-cookie")
    assert "Max-Age" not in forgotten
    assert visitor.ask(put(b=1)).all("set-cookie") == []
    (renewed,) = visitor.ask(lambda session: session.renew(user_id="ada")).all("set-cookie")
    assert "Max-Age" not in renewed

    def remember(session: Session) -> None:
        session.set_longterm(True)
        session.renew()

    (both,) = visitor.ask(remember).all("set-cookie")
    assert "; Max-Age=34560000;" in both


def test_a_session_becomes_long_term_only_where_its_cookie_can(make: Make) -> None:
    """After the headers of a stream, or on an open websocket, the browser would drop it with its window."""
    store = make(browser_session=True)
    visitor = Visitor(store)
    visitor.ask(put(a=1))
    session = store.request_session(visitor.presented)
    assert session["a"] == 1
    session.headers_sent = True
    session.set_longterm(True)
    with pytest.raises(ResponseStarted):
        store.commit(session)
    assert visitor.ask(lambda session: session.longterm).result is False
    one, other = (store.request_session(visitor.presented) for _ in range(2))
    assert (one.longterm, other.longterm) == (False, False)
    one.set_longterm(True)
    other.set_longterm(False)
    assert "Max-Age" in (store.commit(one).set_cookie or "")
    assert "Max-Age" not in (store.commit(other).set_cookie or "Max-Age"), "the last word is in the cookie too"
    aging = make(browser_session=False)
    session = aging.request_session(visitor.presented)
    assert session["a"] == 1
    session.headers_sent = True
    session.set_longterm(True)
    aging.commit(session)
    assert visitor.ask(lambda session: session.longterm).result is True, "its cookie has an age anyway"


def test_a_plain_cookie_is_issued_again_before_browsers_drop_it(make: Make, protocol: str) -> None:
    """It does not say when it was issued; after 200 days of its session it comes with every touch."""
    store = make(cookie_mode=CookieMode.PLAIN, lifespan=timedelta(days=300))
    assert isinstance(store.clock, ManualClock)
    visitor = Visitor(store, protocol)
    visitor.ask(put(a=1))
    store.clock.advance(days=199)
    assert visitor.ask(put(b=1)).all("set-cookie") == []
    store.clock.advance(days=2)
    assert len(visitor.ask(put(c=1)).all("set-cookie")) == 1


def test_consent_and_token_never_share_a_name(make: Make) -> None:
    for name in ("session", "__Host-x", "a b"):
        with pytest.raises(ConfigError):
            make(mode=SessionMode.OPT_IN, storable_cookie_name=name)
