"""Ids are secret and random; handles are their hash; clocks are those of the operating system."""

import time

from shmsession.clock import Clock, SystemClock
from shmsession.ids import HANDLE_BYTES, ID_BYTES, handle_of, new_id, tag_of, text_of
from shmsession.testing import ManualClock


def test_ids_are_32_random_bytes_and_never_repeat() -> None:
    """From the operating system's random source."""
    ids = {new_id() for _ in range(10_000)}
    assert len(ids) == 10_000
    assert {len(one) for one in ids} == {ID_BYTES}
    assert all(len({one[position] for one in ids}) > 200 for position in range(ID_BYTES))


def test_a_handle_is_the_ids_personalised_hash_and_never_changes() -> None:
    """Stored records and logs name sessions by it, across versions."""
    assert handle_of(bytes(range(32))).hex() == "91beed50d1987c9283e5007f44720d315cbdd0c9"
    assert len(handle_of(new_id())) == HANDLE_BYTES
    assert tag_of(b"ada").hex() == "79cf6bc562edccdb"
    assert len({handle_of(b"x"), handle_of(b"y"), handle_of(b"")}) == 3


def test_an_id_as_text_is_url_safe_and_unpadded() -> None:
    """It can stand in a URL or a cookie as it is."""
    assert text_of(b"\xff" * 32) == "_" * 42 + "8"
    assert len(text_of(new_id())) == 43


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
