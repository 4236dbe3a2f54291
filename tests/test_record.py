"""The record: its layout, the clocks in its header, and how changes merge."""

import struct
from datetime import UTC, datetime
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmsession import record as rec
from shmsession.codec import encode
from shmsession.keyring import Key, Keyring
from shmsession.memory.seal import TAIL_BYTES, RecordSeal
from shmsession.record import (
    AUTHENTICATED,
    HEADER_BYTES,
    LONGTERM,
    NEVER,
    NO_TAG,
    RENEWED,
    STORABLE,
    TOMBSTONE,
    USER_KEY,
    Changes,
    Data,
    Header,
    Lifetimes,
    Record,
    first_header,
    join,
    next_header,
    pack_header,
    split,
    tombstone,
    unpack_header,
)
from tests.properties import examples

NOW, BOOT, EPOCH, KEY_ID = 1_767_225_600_000, 3_600_000, 1_767_000_000_000, b"key1"
HOUR = 3_600_000
LIFETIMES = Lifetimes(idle=6 * HOUR, longterm=60 * 24 * HOUR)
BOUNDED = Lifetimes(idle=6 * HOUR, longterm=60 * 24 * HOUR, absolute=10 * HOUR)
TOUCH = Changes(touch=True)


def first(changes: Changes | None = None, lifetimes: Lifetimes = LIFETIMES, **more: Any) -> Header:
    return first_header(NOW, BOOT, changes or Changes(), lifetimes, EPOCH, KEY_ID, **more)


def after(header: Header, now: int, changes: Changes = TOUCH, lifetimes: Lifetimes = LIFETIMES) -> Header:
    return next_header(header, now, BOOT + 1, changes, lifetimes, EPOCH, KEY_ID)


# ── layout ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_of_850_bytes_fits_four_to_a_page() -> None:
    """A 4 KiB page holds four values of up to 960 bytes: header, 850 bytes of data and the tail must stay below."""
    assert HEADER_BYTES + 850 + TAIL_BYTES <= 960
    key = Key.generate()
    data = join({"user": encode("a" * 100), "cart": encode(["x" * 725])})
    assert 840 <= len(data) <= 850
    assert len(RecordSeal(Keyring([key])).close(bytes(20), first()._replace(key_id=key.id), data).raw) <= 960


headers = st.builds(
    Header,
    st.integers(0, 255),
    st.integers(0, 255),
    st.binary(min_size=4, max_size=4),
    *[st.integers(0, 2**64 - 1)] * 8,
    st.binary(min_size=8, max_size=8),
)


@examples(10_000, 200)
@given(headers, st.binary(max_size=20))
def test_a_header_comes_back_and_needs_no_data_decoded(header: Header, data: bytes) -> None:
    """Fixed layout: whatever follows it does not matter."""
    packed = pack_header(header)
    assert len(packed) == HEADER_BYTES
    assert unpack_header(packed + data) == header


def test_a_header_cut_short_is_an_error_of_struct() -> None:
    """The seal turns it into "corrupt"."""
    with pytest.raises(struct.error):
        unpack_header(pack_header(first())[:-1])


DATA = st.dictionaries(st.text(max_size=5), st.binary(max_size=8), max_size=6)


@examples(10_000, 200)
@given(DATA, st.booleans())
def test_data_is_a_messagepack_map_of_encoded_values(data: Data, user: bool) -> None:
    """It splits into what was joined, in its order, without decoding a value."""
    stored: Data = {**data, **({USER_KEY: b"u"} if user else {})}
    joined = join(stored)
    assert list(split(joined).items()) == list(stored.items())
    assert msgpack.unpackb(joined, strict_map_key=False) == stored
    assert Record(b"", first(), joined).split() == stored
    assert Record(b"", first(), b"").split() == {}


def test_the_repr_of_a_record_and_of_changes_shows_no_data() -> None:
    """They end in logs."""
    assert "hunter2" not in repr(Changes({"pw": b"hunter2"}, deleted={"hunter2"}, expect={"pw": b"hunter2"}))
    assert "hunter2" not in repr(Record(b"hunter2", first(), join({"pw": b"hunter2"})))


# ── the first header ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_session_begins_now_storable_and_anonymous() -> None:
    """Version 1; it ends when idle; the horizon is that end."""
    header = first()
    assert header == Header(
        rec.FORMAT, STORABLE, KEY_ID, EPOCH, 1, NOW, NOW, NOW + 6 * HOUR, NEVER, NOW + 6 * HOUR, BOOT, NO_TAG
    )
    assert header.expires == NOW + 6 * HOUR


def test_what_a_new_session_was_asked_to_be_is_in_its_flags() -> None:
    """Memory only, long-term, logged in, with a deadline."""
    header = first(Changes(storable=False, longterm=True), BOUNDED, user_tag=b"user tag")
    assert header.flags == LONGTERM | AUTHENTICATED
    assert header.idle_expiry == NOW + 60 * 24 * HOUR
    assert header.absolute == header.expires == header.horizon == NOW + 10 * HOUR
    assert header.user_tag == b"user tag"


# ── the next header ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_touch_moves_the_end_and_counts_as_a_version() -> None:
    """Also at one millisecond."""
    header = after(first(), NOW + 1)
    assert (header.version, header.last_seen, header.idle_expiry) == (2, NOW + 1, NOW + 1 + 6 * HOUR)
    assert header.horizon == header.idle_expiry
    assert header.changed == BOOT + 1
    assert header.created == NOW


def test_a_commit_without_a_touch_moves_no_clock() -> None:
    """Changes are versioned, but only looking moves the end."""
    header = after(first(), NOW + HOUR, Changes(set={"a": b"x"}))
    assert header == first()._replace(version=2, changed=BOOT + 1)


@pytest.mark.parametrize("back", [0, 1, HOUR, 10_000 * HOUR])
def test_a_wall_clock_that_went_back_moves_nothing(back: int) -> None:
    """Neither forward nor back: last seen, both ends and the horizon stay."""
    header = after(first(), NOW - back)
    assert header == first()._replace(version=2, changed=BOOT + 1)


@pytest.mark.parametrize("back", [1, HOUR, 100 * HOUR])
def test_a_change_of_flags_while_the_clock_is_back_counts_from_when_it_was_last_seen(back: int) -> None:
    """`set_longterm` on a machine whose clock went back gives what it would have given before."""
    header = after(first(), NOW - back, Changes(touch=True, longterm=True))
    assert header.last_seen == NOW
    assert header.idle_expiry == NOW + 60 * 24 * HOUR


def test_the_absolute_deadline_is_never_moved_by_a_commit() -> None:
    """However often it is touched; the end stays at the deadline."""
    header = first(lifetimes=BOUNDED)
    for hour in range(1, 10):
        header = after(header, NOW + hour * HOUR, Changes(touch=True, longterm=hour % 2 == 0), BOUNDED)
        assert header.absolute == NOW + 10 * HOUR
        assert header.expires <= NOW + 10 * HOUR
        assert header.horizon <= NOW + 10 * HOUR


def test_longterm_lengthens_and_its_end_shortens_but_never_the_horizon() -> None:
    """The horizon is the latest end ever issued: a backend must know the session until then."""
    long = after(first(), NOW + HOUR, Changes(touch=True, longterm=True))
    assert long.flags == STORABLE | LONGTERM
    assert long.expires == long.horizon == NOW + HOUR + 60 * 24 * HOUR
    short = after(long, NOW + 2 * HOUR, Changes(touch=True, longterm=False))
    assert short.flags == STORABLE
    assert short.expires == NOW + 8 * HOUR
    assert short.horizon == long.horizon


def test_flags_that_are_not_mentioned_stay() -> None:
    """None means: as it was."""
    header = first(Changes(storable=False, longterm=True), user_tag=b"user tag")
    assert after(header, NOW + 1).flags == header.flags
    assert after(header, NOW + 1).user_tag == b"user tag"
    assert after(header, NOW + 1, Changes(storable=True)).flags == header.flags | STORABLE


def test_the_first_commit_after_a_rebuild_takes_the_current_epoch_and_key() -> None:
    """Order is (epoch, version); a record is sealed anew under the newest Key."""
    header = next_header(first(), NOW, BOOT, Changes(set={"a": b""}), LIFETIMES, EPOCH + 5, b"key2")
    assert (header.epoch, header.version, header.key_id) == (EPOCH + 5, 2, b"key2")


@examples(20_000, 300)
@given(
    st.lists(
        st.tuples(st.integers(-50 * HOUR, 50 * HOUR), st.booleans(), st.sampled_from((None, True, False))), max_size=8
    )
)
def test_over_any_history_ends_are_bounded_and_the_horizon_never_falls(
    history: list[tuple[int, bool, bool | None]],
) -> None:
    """Whatever the wall clock does: no end later than the latest look allows, no deadline moved."""
    header, latest = first(lifetimes=BOUNDED), NOW
    for offset, touch, longterm in history:
        latest = max(latest, NOW + offset if touch else NOW)
        following = after(header, NOW + offset, Changes(touch=touch, longterm=longterm), BOUNDED)
        assert following.version == header.version + 1
        assert header.last_seen <= following.last_seen <= latest
        assert following.idle_expiry == BOUNDED.idle_expiry(following.last_seen, following.flags)
        assert following.horizon >= max(header.horizon, following.expires)
        assert following.absolute == header.absolute == NOW + 10 * HOUR
        header = following


# ── tombstones ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("renewed", [True, False])
def test_a_tombstone_says_so_names_no_user_and_remembers_the_horizon(renewed: bool) -> None:
    """It is above what it buries, and lives for as long as it was told to, whatever the session's deadline was."""
    header = first(Changes(longterm=True), BOUNDED, user_tag=b"user tag")
    dead = tombstone(header, NOW + 1, BOOT + 1, 60_000, EPOCH + 1, b"key2", renewed=renewed)
    assert dead.flags == STORABLE | TOMBSTONE | (RENEWED if renewed else 0)
    assert (dead.epoch, dead.version, dead.key_id) == (EPOCH + 1, 2, b"key2")
    assert dead.expires == NOW + 1 + 60_000
    assert dead.horizon == header.horizon
    assert dead.user_tag == NO_TAG
    assert (dead.created, dead.changed) == (NOW, BOOT + 1)


# ── merging ────────────────────────────────────────────────────────────────────────────────────────────────────

NAMES = st.sampled_from("abcdefgh")
CHANGES = st.builds(
    lambda assigned, deleted, cleared: Changes(set=assigned, deleted=tuple(deleted - assigned.keys()), cleared=cleared),
    st.dictionaries(NAMES, st.binary(max_size=3), max_size=4),
    st.frozensets(NAMES, max_size=3),
    st.booleans(),
)


def _touched(changes: Changes) -> set[Any]:
    return set(changes.set) | set(changes.deleted)


@examples(10_000, 500)
@given(st.dictionaries(NAMES, st.binary(max_size=3)), CHANGES, CHANGES)
def test_changes_of_different_keys_commute_and_both_survive(base: Data, one: Changes, other: Changes) -> None:
    """Two requests that change different keys: whichever commits first, the result is the same."""
    one = one._replace(cleared=False)
    other = Changes(
        set={key: value for key, value in other.set.items() if key not in _touched(one)},
        deleted=tuple(key for key in other.deleted if key not in _touched(one)),
    )
    stored: Data = {**base}
    ab, ba = other.merged(one.merged(stored)), one.merged(other.merged(stored))
    assert ab == ba
    assert ab.items() >= {**one.set, **other.set}.items()
    assert not ab.keys() & {*one.deleted, *other.deleted}
    assert stored == base


@examples(10_000, 500)
@given(st.dictionaries(NAMES, st.binary(max_size=3)), CHANGES)
def test_merging_is_what_a_dict_would_do_and_leaves_the_old_one_alone(base: Data, changes: Changes) -> None:
    """Cleared, then deleted, then set; merging twice is merging once."""
    expected: Data = {} if changes.cleared else dict(base)
    for key in changes.deleted:
        expected.pop(key, None)
    expected.update(changes.set)
    stored: Data = {**base}
    assert changes.merged(stored) == expected
    assert changes.merged(changes.merged(stored)) == expected
    assert stored == base


@examples(20_000, 300)
@given(st.dictionaries(NAMES, st.binary(max_size=3)), CHANGES)
def test_changes_nothing_is_said_only_when_nothing_would_change(base: Data, changes: Changes) -> None:
    """It is what lets a commit go unwritten."""
    record = Record(b"", first(), join({**base}) if base else b"")
    if changes.changes_nothing_in(record):
        assert changes.merged({**base}) == base
    if not changes.deleted and not changes.cleared and {**base, **changes.set} == base:
        assert changes.changes_nothing_in(record)


@pytest.mark.parametrize(
    "more",
    [
        Changes(touch=True),
        Changes(storable=True),
        Changes(longterm=False),
        Changes(deleted=("b",)),
        Changes(cleared=True),
    ],
)
def test_any_other_change_is_something(more: Changes) -> None:
    """Also deleting what is not there: another request may have put it there meanwhile."""
    assert not more.changes_nothing_in(Record(b"", first(), join({"a": b"1"})))


def test_a_touch_is_all_or_it_is_none() -> None:
    """`is_touch` lets a full store go without; a change must not."""
    assert Changes(touch=True).is_touch
    assert Changes().is_touch
    for more in (
        Changes(set={"a": b""}),
        Changes(deleted=("a",)),
        Changes(cleared=True),
        Changes(longterm=True),
        Changes(storable=False),
    ):
        assert not more._replace(touch=True).is_touch


def test_expected_bytes_are_compared_as_they_are_and_absence_too() -> None:
    """What `apply` relies on."""
    assert Changes().fits({"a": b"1"})
    assert Changes(expect={"a": b"1", "b": None}).fits({"a": b"1"})
    assert not Changes(expect={"a": b"1"}).fits({"a": b"2"})
    assert not Changes(expect={"a": b"1"}).fits({})
    assert not Changes(expect={"a": None}).fits({"a": b"1"})


def test_times_are_those_of_the_wall_clock() -> None:
    """Milliseconds since 1970."""
    assert datetime.fromtimestamp(first().created / 1000, UTC) == datetime(2026, 1, 1, tzinfo=UTC)
