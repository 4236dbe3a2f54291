"""The session cookie: one spelling each, nothing opened that we did not seal, written by RFC 6265bis."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmsession.config import SessionConfig
from shmsession.hooks import CookieRefused, Event
from shmsession.ids import handle_of, new_id, text_of
from shmsession.keyring import Key, Keyring
from shmsession.store import SessionStore
from shmsession.testing import ManualClock, login_cookie, make_store
from shmsession.tokens import Ticket
from shmsession.transport import NOTHING_PRESENTED, Transport
from tests.figures import report, rng, size
from tests.properties import examples

NOW = 1_767_225_600_000
DAY = 86_400_000
KEY = Key(b"k" * 32)
VALUE_CHARS = 92
ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def cookies(*keys: Key, **settings: Any) -> Transport:
    config = SessionConfig(**{"secure": False, **settings})
    return Transport(config, Keyring(keys or (KEY,)))


JAR = cookies()
SECRET = new_id()
VALUE = JAR.value(SECRET, NOW).encode()


def opened(header: bytes, jar: Transport = JAR) -> Ticket | str | None:
    return jar.read(header)


def secret_of(found: Ticket | str | None) -> str:
    assert isinstance(found, Ticket)
    return found.session_id


# ── reading ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "header",
    [
        b"session=%s",
        b"a=1; session=%s",
        b"session=%s; a=1",
        b"a=1;session=%s;b=2",
        b" \tsession=%s \t; a=1",
        b"; ;session=%s;;",
        b"xsession=1; session=%s; session_id=2; __Host-session=3",
        b"a=session=; session=%s",
        b"novalue; session=%s",
        b'a="x; y"; session=%s',
        b"\xff\xfe=\x00; session=%s",
        b"Session=other; session=%s",
    ],
)
def test_the_cookie_is_found_among_others(header: bytes) -> None:
    """By its whole name, case-sensitively, with the spaces that parsers allow."""
    assert secret_of(opened(header % VALUE)) == SECRET


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"a=1",
        b"xsession=%s",
        b"session-x=%s",
        b"SESSION=%s",
        b"session",
        b"a=session=%s",
        b"session%s",
        b"__Host-session=%s",
    ],
)
def test_another_cookie_is_no_cookie_of_ours(header: bytes) -> None:
    """None: nothing to tell the hooks."""
    assert opened(header.replace(b"%s", VALUE)) is None


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"session=%s; session=%s", "duplicate"),
        (b"session=; session=%s", "duplicate"),
        (b"session=%s; a=1; session=junk", "duplicate"),
        (b"session=", "malformed"),
        (b"session=junk", "malformed"),
        (b'session="%s"', "malformed"),
        (b"session=%s=", "malformed"),
        (b"session=%s, a=1", "malformed"),
        (b"session==%s", "malformed"),
        (b"session= %s", "malformed"),
        (b"session=%s%s", "malformed"),
        (b"session=" + b"A" * VALUE_CHARS, "malformed"),
        (b"session=" + b"=" * VALUE_CHARS, "malformed"),
        (b"session=" + b"\xff" * VALUE_CHARS, "malformed"),
        (b"session=" + b"A" * 100_000, "malformed"),
    ],
)
def test_a_bad_cookie_has_a_reason_and_is_no_session(header: bytes, reason: str) -> None:
    """Two of them are refused even when one is good: a subdomain may have planted the other."""
    assert opened(header.replace(b"%s", VALUE)) == reason


def test_a_cookie_has_92_characters_and_each_issue_is_another() -> None:
    """URL-safe, without padding; a fresh nonce each time."""
    values = {JAR.value(SECRET, NOW) for _ in range(100)}
    assert len(values) == 100
    assert {len(value) for value in values} == {VALUE_CHARS}
    assert all(set(value.encode()) <= set(ALPHABET) for value in values)
    assert {secret_of(opened(b"session=" + value.encode())) for value in values} == {SECRET}


def test_no_cookie_that_differs_in_one_character_is_accepted() -> None:
    """Every position, every byte: one session, one spelling of a cookie."""
    accepted = 0
    for position in range(VALUE_CHARS):
        for byte in range(256):
            mutant = VALUE[:position] + bytes([byte]) + VALUE[position + 1 :]
            if mutant != VALUE:
                accepted += isinstance(opened(b"session=" + mutant), Ticket)
    assert accepted == 0


def test_the_standard_alphabet_and_padding_are_refused() -> None:
    """`+` and `/` are not second spellings of `-` and `_`."""
    value = next(value for value in (JAR.value(new_id(), NOW) for _ in range(1000)) if "-" in value and "_" in value)
    assert isinstance(opened(f"session={value}".encode()), Ticket)
    assert opened(f"session={value.replace('-', '+')}".encode()) == "malformed"
    assert opened(f"session={value.replace('_', '/')}".encode()) == "malformed"


def hostile(total: int) -> "list[bytes]":
    """Cookies that nobody sealed: junk, mutants, splices of good ones, other names, other Keys."""
    random = rng("hostile cookies")
    foreign = cookies(Key(b"f" * 32))
    other = cookies(cookie_name="other")
    made: list[bytes] = []
    while len(made) < total:
        kind = len(made) % 8
        good = JAR.value(text_of(random.randbytes(32)), NOW).encode()
        if kind == 0:
            value = random.randbytes(random.randrange(200)).replace(b";", b"")
        elif kind == 1:
            value = bytes(random.choices(ALPHABET, k=VALUE_CHARS))
        elif kind == 2:
            at = random.randrange(VALUE_CHARS)
            value = good[:at] + bytes([random.choice([one for one in ALPHABET if one != good[at]])]) + good[at + 1 :]
        elif kind == 3:
            at = random.randrange(20, VALUE_CHARS - 8)
            value = good[:at] + VALUE[at:]
        elif kind == 4:
            value = foreign.value(text_of(random.randbytes(32)), NOW).encode()
        elif kind == 5:
            value = other.value(text_of(random.randbytes(32)), NOW).encode()
        elif kind == 6:
            value = good[: random.randrange(VALUE_CHARS)]
        else:
            value = good + b"; session=" + random.choice([good, VALUE, b""])
        made.append(b"session=" + value)
    return made


@pytest.mark.soak
def test_no_hostile_cookie_opens_a_session_or_writes(place: Path) -> None:
    """Of thousands none is adopted, none raises, none changes a page of the store; each has a reason code."""
    events: list[Event] = []
    clock = ManualClock()
    store = SessionStore(
        config=SessionConfig(directory=place / "s", name="test", map_size=4 << 20, secure=False, keys=(KEY,)),
        hooks=[events.append],
        clock=clock,
    )
    with store:
        login_cookie(store, {"user": "ada"}, user_id="ada")
        before = last_transaction(store)
        total = size(100_000, 5_000)
        for header in hostile(total):
            session = store.request_session(lambda header=header: header)  # type: ignore[misc]
            assert session.is_new
            assert not session
            assert store.commit(session).set_cookie is None
        assert last_transaction(store) == before
        assert store.count() == 1
    refused = [event for event in events if isinstance(event, CookieRefused)]
    assert {event.reason for event in refused} - {"binding"} == {"malformed", "forged", "unknown_key", "duplicate"}
    assert len(refused) == total
    assert len(events) == total + 2, "the session, and its login"
    report("G6 hostile cookies", tried=total, adopted=0, writes=0, errors=0)


def last_transaction(store: SessionStore) -> int:
    return int(store.memory.environment.open().env.info()["last_txnid"])


@examples(20_000, 500)
@given(st.binary(max_size=300))
def test_any_header_is_read_without_an_error(header: bytes) -> None:
    """As it is, and with our name in front."""
    assert not isinstance(opened(header), Ticket)
    assert not isinstance(opened(b"session=" + header), Ticket)


def test_a_cookie_of_another_name_is_forged() -> None:
    """The name is sealed in: a cookie moved from one application's name to another's opens nothing."""
    moved = cookies(cookie_name="other").value(SECRET, NOW).encode()
    assert opened(b"session=" + moved) == "forged"
    assert secret_of(opened(b"other=" + moved, cookies(cookie_name="other"))) == SECRET


# ── age and rotation ───────────────────────────────────────────────────────────────────────────────────────────


def stale(found: Ticket | str | None, now: int) -> bool:
    assert isinstance(found, Ticket)
    assert found.stale_after is not None
    return now > found.stale_after


def test_a_cookie_is_to_be_issued_anew_at_half_its_life() -> None:
    """200 of 400 days; not a millisecond earlier. Issued in the future, by a clock that went back: not stale."""
    assert not stale(opened(b"session=" + VALUE), NOW)
    assert not stale(opened(b"session=" + VALUE), NOW + 200 * DAY)
    assert stale(opened(b"session=" + VALUE), NOW + 200 * DAY + 1)
    assert not stale(opened(b"session=" + VALUE), NOW - 1000 * DAY)
    short = cookies(absolute_lifespan=timedelta(days=10))
    value = b"session=" + short.value(SECRET, NOW).encode()
    assert not stale(opened(value, short), NOW + 5 * DAY)
    assert stale(opened(value, short), NOW + 5 * DAY + 1)


def test_a_cookie_under_an_older_key_opens_and_is_stale_at_once() -> None:
    """Rotation reaches every visitor; a retired Key opens nothing."""
    new = Key(b"n" * 32)
    rotated, retired = cookies(KEY, new), cookies(new)
    assert secret_of(opened(b"session=" + VALUE, rotated)) == SECRET
    assert stale(opened(b"session=" + VALUE, rotated), NOW)
    assert not stale(opened(b"session=" + rotated.value(SECRET, NOW).encode(), rotated), NOW)
    assert opened(b"session=" + VALUE, retired) == "unknown_key"


@pytest.mark.parametrize("wait", [timedelta(0), timedelta(days=201)])
def test_a_stale_cookie_is_issued_anew_with_the_next_commit(place: Path, wait: timedelta) -> None:
    """For its Key or its age; the session stays, and nobody is logged out."""
    clock, old, new = ManualClock(), Key(b"o" * 32), Key(b"n" * 32)
    first = make_store(place, clock, keys=(old,), lifespan=timedelta(days=300))
    with first:
        cookie = login_cookie(first, {"user": "ada"})["session"]
    clock.advance(wait.total_seconds())
    keys = (old,) if wait else (old, new)
    with make_store(place, clock, keys=keys, lifespan=timedelta(days=300)) as store:
        session = store.request_session(lambda: f"session={cookie}".encode())
        session["n"] = 1
        sent = store.commit(session).set_cookie
        assert sent is not None
        again = sent.split(";")[0]
        assert again != f"session={cookie}"
        following = store.request_session(again.encode)
        assert following.to_dict() == {"user": "ada", "n": 1}
        assert following.id == session.id
        following["n"] = 2
        assert store.commit(following).set_cookie is None


def test_the_golden_cookie_is_read_as_ever() -> None:
    """Browsers keep a cookie for 400 days: what the first release sealed must open."""
    stored = json.loads((Path(__file__).parent / "golden" / "format-1.json").read_text())["cookie"]
    ticket = cookies(Key(bytes(range(32)))).read(b"session=" + stored.encode())
    secret = text_of(bytes(range(100, 132)))
    assert ticket == Ticket(secret, handle_of(secret), NOW + 200 * DAY)


# ── writing ────────────────────────────────────────────────────────────────────────────────────────────────────

EMITTED: list[tuple[dict[str, Any], str, str]] = [
    ({"secure": True}, "__Host-session", "; Path=/; SameSite=Lax; HttpOnly; Secure"),
    ({}, "session", "; Path=/; SameSite=Lax; HttpOnly"),
    ({"http_only": False, "same_site": "Strict", "path": "/app"}, "session", "; Path=/app; SameSite=Strict"),
    (
        {
            "secure": True,
            "cookie_name": "__Secure-s",
            "domain": "example.com",
            "same_site": "None",
            "partitioned": True,
        },
        "__Secure-s",
        "; Path=/; Domain=example.com; SameSite=None; HttpOnly; Secure; Partitioned",
    ),
]


def issue(jar: Transport) -> str:
    """The Set-Cookie value."""
    ((name, value),) = jar.issue(SECRET, NOW, NOTHING_PRESENTED, longterm=False)
    assert name == b"set-cookie"
    return value.decode()


@pytest.mark.parametrize(("settings", "name", "attributes"), EMITTED)
def test_attributes_are_those_of_the_settings(settings: dict[str, Any], name: str, attributes: str) -> None:
    """Also on the cookie that takes it away: browsers match name, domain and path."""
    jar = cookies(**settings)
    issued = issue(jar)
    value, _, rest = issued.partition(";")
    assert value.startswith(name + "=")
    assert rest == f" Max-Age=34560000{attributes}"
    ((_, expired),) = jar.expire(NOTHING_PRESENTED)
    assert expired.decode() == f"{name}=; Max-Age=0{attributes}"
    assert secret_of(jar.read(value.encode())) == SECRET
    assert len(value) <= 4096


def test_max_age_follows_the_absolute_lifespan() -> None:
    """A cookie that outlives every session is of no use; it lives for a second at least."""
    assert "; Max-Age=3600;" in issue(cookies(absolute_lifespan=timedelta(hours=1)))
    short = cookies(absolute_lifespan=timedelta(milliseconds=1))
    assert "; Max-Age=1;" in issue(short)
