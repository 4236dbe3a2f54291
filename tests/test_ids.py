"""Ids are secret and random; handles are their hash; clocks are those of the operating system."""

import time
from base64 import urlsafe_b64decode

from shmsession.clock import Clock, SystemClock
from shmsession.ids import HANDLE_BYTES, ID_BYTES, ID_CHARS, handle_of, is_id, new_id, tag_of, text_of
from shmsession.testing import ManualClock


def test_ids_are_32_random_bytes_and_never_repeat() -> None:
    """From the operating system's random source."""
    ids = {new_id() for _ in range(10_000)}
    assert len(ids) == 10_000
    packed = [urlsafe_b64decode(one + "=") for one in ids]
    assert {len(one) for one in packed} == {ID_BYTES}
    assert all(len({one[position] for one in packed}) > 200 for position in range(ID_BYTES))


def test_a_handle_is_the_ids_personalised_hash_and_never_changes() -> None:
    """Stored records and logs name sessions by it, across versions."""
    assert handle_of(text_of(bytes(range(32)))).hex() == "b88bb8fadcfa6f2b7fca4019684df9293140df5e"
    assert len(handle_of(new_id())) == HANDLE_BYTES
    assert tag_of(b"ada").hex() == "79cf6bc562edccdb"
    assert len({handle_of("x"), handle_of("y"), handle_of("")}) == 3


def test_an_id_as_text_is_url_safe_and_unpadded() -> None:
    """It can stand in a URL or a cookie as it is."""
    assert text_of(b"\xff" * 32) == "_" * 42 + "8"
    assert len(new_id()) == ID_CHARS
    assert is_id(new_id())


def test_other_ids_are_at_least_16_characters_that_need_no_quotes() -> None:
    """What a generator of the application's own may give."""
    for good in ("550e8400-e29b-41d4-a716-446655440000", "01ARZ3NDEKTSV4RRFFQ69G5FAV", "a" * 16, "~._-" * 4, "a" * 128):
        assert is_id(good)
    for bad in (
        "",
        "a" * 15,
        "a" * 129,
        "a" * 20 + " ",
        "a" * 20 + ";",
        "ä" * 20,
        "a" * 20 + "\n",
        "a=" * 10,
        "a/" * 10,
    ):
        assert not is_id(bad)


def test_the_system_clocks_are_milliseconds_and_boot_never_goes_back() -> None:
    """Wall clock since 1970; CLOCK_BOOTTIME where there is one."""
    clock: Clock = SystemClock()
    assert abs(clock.now() - time.time() * 1000) < 60_000
    first = clock.boot()
    assert 0 <= first <= clock.boot()


def test_the_manual_clock_moves_only_when_told_to() -> None:
    """Both clocks advance; a step is the wall clock's alone."""
    clock: Clock = ManualClock()
    assert isinstance(clock, ManualClock)
    wall, boot = clock.now(), clock.boot()
    assert (clock.now(), clock.boot()) == (wall, boot)
    clock.advance(1, minutes=1)
    assert (clock.now(), clock.boot()) == (wall + 61_000, boot + 61_000)
    clock.step(-3600)
    assert (clock.now(), clock.boot()) == (wall + 61_000 - 3_600_000, boot + 61_000)
