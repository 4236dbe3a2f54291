"""Tokens: sealed, signed or plain, each with one spelling; nothing opens that we did not write for this client."""

from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmsession.config import CookieMode
from shmsession.ids import handle_of, new_id
from shmsession.keyring import Key, Keyring
from shmsession.tokens import LONGEST, Form, Ticket, form_of
from tests.figures import rng
from tests.properties import examples

NOW = 1_767_225_600_000
KEY, NEW = Key(b"k" * 32), Key(b"n" * 32)
ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~"
SEALED = [CookieMode.PRIVATE, CookieMode.SIGNED]
ADA, BOB = b"\0" + b"a" * 16, b"\0" + b"b" * 16
UUID = str(uuid4())
IDS = {"ours": new_id(), "uuid": UUID, "hex": uuid4().hex, "shortest": "a" * 16, "longest": "~._-" * 32}


def form(mode: CookieMode, *keys: Key, purpose: str = "cookie session", fresh_for: int = 1000) -> Form:
    return form_of(mode, Keyring(keys or (KEY,)), purpose, fresh_for)


def ticket(found: Ticket | str) -> Ticket:
    assert isinstance(found, Ticket), found
    return found


@pytest.mark.parametrize("client", [b"", ADA])
@pytest.mark.parametrize("session_id", IDS.values(), ids=IDS)
@pytest.mark.parametrize("mode", CookieMode)
def test_every_id_comes_back_as_it_was(mode: CookieMode, session_id: str, client: bytes) -> None:
    """32 bytes of our own, UUIDs with and without dashes, the shortest and the longest."""
    value = form(mode).write(session_id, NOW, client).encode()
    assert len(value) <= LONGEST
    assert set(value) <= set(ALPHABET)
    found = ticket(form(mode).open(value, client))
    assert (found.session_id, found.handle) == (session_id, handle_of(session_id))
    assert session_id not in repr(found)


@pytest.mark.parametrize("session_id", [IDS["ours"], UUID], ids=["ours", "uuid"])
@pytest.mark.parametrize("mode", SEALED)
def test_no_token_that_differs_in_one_character_is_accepted(mode: CookieMode, session_id: str) -> None:
    """Every position, every character: one spelling, and no second session within reach."""
    one = form(mode)
    value = one.write(session_id, NOW, b"").encode()
    for position in range(len(value)):
        for byte in {*ALPHABET, *b'+/=;" \0\x80\xff'} - {value[position]}:
            mutant = value[:position] + bytes([byte]) + value[position + 1 :]
            assert isinstance(one.open(mutant, b""), str)
    for mutant in (value + b"=", value + b"A", value[:-1], b"A" + value, value + value, b""):
        assert isinstance(one.open(mutant, b""), str)


@pytest.mark.parametrize("mode", CookieMode)
@examples(20_000, 300)
@given(value=st.binary(max_size=300))
def test_whatever_comes_is_a_ticket_or_a_reason(mode: CookieMode, value: bytes) -> None:
    """Never an error."""
    assert isinstance(form(mode).open(value, b""), Ticket | str)


@pytest.mark.parametrize("mode", SEALED)
def test_a_token_is_good_for_one_purpose_only(mode: CookieMode) -> None:
    """A cookie's value moved to another name, or to the header, opens nothing; nor does it under another mode."""
    value = form(mode).write(UUID, NOW, b"").encode()
    for purpose in ("cookie other", "header session", "cookie sessio", "cookie session1"):
        assert form(mode, purpose=purpose).open(value, b"") == "forged"
    other = SEALED[1 - SEALED.index(mode)]
    assert isinstance(form(other).open(value, b""), str)


@pytest.mark.parametrize("mode", SEALED)
def test_a_bound_token_opens_for_its_client_only(mode: CookieMode) -> None:
    """moved: it came from elsewhere. binding: whether it is bound is not what the settings say."""
    one = form(mode)
    bound, unbound = one.write(UUID, NOW, ADA).encode(), one.write(UUID, NOW, b"").encode()
    assert ticket(one.open(bound, ADA)).session_id == UUID
    assert one.open(bound, BOB) == "moved"
    assert one.open(bound, b"") == one.open(unbound, ADA) == "binding"
    if mode is CookieMode.SIGNED:
        assert one.open(bound.replace(b"~", b"."), b"") == "forged"
        assert one.open(unbound.replace(b".", b"~"), ADA) == "moved"


@pytest.mark.parametrize("mode", SEALED)
def test_an_older_key_opens_and_its_token_is_stale_at_once(mode: CookieMode) -> None:
    """A retired Key opens nothing."""
    value = form(mode).write(UUID, NOW, b"").encode()
    assert ticket(form(mode).open(value, b"")).stale_after == NOW + 1000
    assert ticket(form(mode, KEY, NEW).open(value, b"")).stale_after == 0
    assert form(mode, NEW).open(value, b"") == "unknown_key"


def test_a_plain_token_does_not_say_when_it_was_issued() -> None:
    """And is bound to nobody."""
    plain = form(CookieMode.PLAIN)
    assert plain.write(UUID, NOW, ADA) == UUID
    assert plain.open(UUID.encode(), ADA) == Ticket(UUID, handle_of(UUID), None, sealed=False)
    assert plain.open(b"short", b"") == plain.open(b"a" * 129, b"") == plain.open("ü".encode() * 20, b"") == "malformed"


def test_a_private_token_hides_the_id_and_a_signed_one_shows_it() -> None:
    """Each private one is another."""
    private, signed = form(CookieMode.PRIVATE), form(CookieMode.SIGNED)
    values = {private.write(UUID, NOW, b"") for _ in range(50)}
    assert len(values) == 50
    assert not any(UUID in value for value in values)
    assert signed.write(UUID, NOW, b"") == signed.write(UUID, NOW, b"")
    assert signed.write(UUID, NOW, b"").startswith(UUID + ".")
    random = rng("tokens")
    for _ in range(2_000):
        other = str(uuid4())
        tail = signed.write(UUID, random.randrange(NOW), b"")[len(UUID) :]
        assert signed.open((other + tail).encode(), b"") == "forged"
