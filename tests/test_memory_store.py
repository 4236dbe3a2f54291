"""The memory store: every operation and answer, one transaction each, and tables that always agree."""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shmsession.codec import encode
from shmsession.errors import SessionTooLarge, Unreadable
from shmsession.hooks import Event, RecordCorrupt
from shmsession.keyring import MAC_BYTES, Key, Keyring
from shmsession.memory.seal import TAIL_BYTES, RecordSeal
from shmsession.memory.snapshots import raws_of
from shmsession.memory.store import Conflict, MemoryStore, Missing
from shmsession.memory.tables import sequence_moment
from shmsession.record import (
    AUTH_TIME_KEY,
    AUTHENTICATED,
    LOGIN_KEYS,
    LONGTERM,
    NO_PLACE,
    STORABLE,
    TOMBSTONE,
    USER_KEY,
    WITHDRAWN,
    Changes,
    DataKey,
    Header,
    Lifetimes,
    Record,
)
from shmsession.testing import ManualClock
from tests.memory import (
    HOUR,
    KEYRING,
    LIFETIMES,
    SECOND,
    TOUCH,
    check_tables,
    closing,
    contents,
    handle,
    header_of,
    memory_store,
    put_raw,
    spoilt,
    transactions,
    waiting,
)

A, B, C = handle(1), handle(2), handle(3)
ADA = encode("ada", "user_id")


def sets(**values: Any) -> Changes:
    return Changes(set={key: encode(value, key) for key, value in values.items()})


def data_of(record: object) -> dict[DataKey, bytes]:
    assert isinstance(record, Record), record
    return dict(record.split())


def login_of(at: int, user: bytes = ADA) -> dict[DataKey, bytes]:
    """What a record knows of a login."""
    return {USER_KEY: user, AUTH_TIME_KEY: encode(at)}


def created(store: MemoryStore, clock: ManualClock, key: bytes = A, **values: Any) -> Record:
    record = store.create(key, sets(**values), clock.now())
    assert isinstance(record, Record)
    return record


def logged_in(store: MemoryStore, clock: ManualClock, key: bytes = A) -> Record:
    record = store.create(key, Changes(set={USER_KEY: ADA}), clock.now())
    assert isinstance(record, Record)
    return record


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def events() -> list[Event]:
    return []


@pytest.fixture
def store(place: Path, clock: ManualClock, events: list[Event]) -> Iterator[MemoryStore]:
    with closing(memory_store(place / "base", clock, events=events)) as opened:
        yield opened


@pytest.fixture
def backed(place: Path, clock: ManualClock) -> Iterator[MemoryStore]:
    """A store that notes its commits for a backend."""
    with closing(memory_store(place / "base", clock, backend=True)) as opened:
        yield opened


# ── the operations ────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_created_is_loaded_as_it_is(store: MemoryStore, clock: ManualClock) -> None:
    record = created(store, clock, n=1)
    assert store.load(A, clock.now()) == record
    assert data_of(record) == {"n": encode(1, "n")}
    assert record.header.version == 1
    assert record.header.idle_expiry == clock.now() + HOUR
    assert record.header.flags == STORABLE


def test_an_unknown_handle_is_unknown_and_nothing_is_written(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, B)
    before = contents(store)
    assert store.load(A, clock.now()) is Missing.UNKNOWN
    assert store.update(A, base, sets(n=1), clock.now()) is Missing.UNKNOWN
    assert store.update(A, base, TOUCH, clock.now()) is Missing.UNKNOWN
    assert store.renew(A, C, base, sets(n=1), clock.now(), None, login=False) is Missing.UNKNOWN
    assert contents(store) == before


def test_a_session_that_was_evicted_can_be_destroyed_and_no_fill_brings_it_back(
    store: MemoryStore, clock: ManualClock
) -> None:
    base = created(store, clock, n=1)
    clock.advance(61)
    assert store.evict() == 1
    missed = clock.boot()
    assert store.destroy(A, clock.now()) is None
    assert store.load(A, clock.now()) is Missing.DEAD
    assert store.fill(A, base.header, base.data, missed) is Missing.DEAD
    header = header_of(store, A)
    assert header is not None
    assert header.horizon >= clock.now() + LIFETIMES.longterm, "of all that it may have been, the longest"
    check_tables(store)


def test_raws_are_of_one_snapshot_and_only_looked_for_after_a_commit(
    store: MemoryStore, place: Path, clock: ManualClock
) -> None:
    record = created(store, clock, v=1)
    stamp, raws = raws_of(store.environment, [A, B])
    assert raws == [record.raw, None]
    assert raws_of(store.environment, [A, B], stamp) == (stamp, None)
    with closing(memory_store(place / "base", clock)) as same:
        other = same.create(B, sets(v=2), clock.now())
        assert isinstance(other, Record)
    later, raws = raws_of(store.environment, [A, B], stamp)
    assert (later == stamp, raws) == (False, [record.raw, other.raw])


def test_a_rebuilt_store_has_another_stamp_whatever_it_counts(store: MemoryStore, clock: ManualClock) -> None:
    created(store, clock, v=1)
    stamp, _ = raws_of(store.environment, [A])
    shutil.rmtree(store.environment.path)
    store.environment.close()
    created(store, clock, v=1)
    assert raws_of(store.environment, [A])[0].uuid != stamp.uuid


@pytest.mark.parametrize("end", ["lives", "is destroyed", "is renewed", "expires", "is damaged", "was never there"])
def test_stored_bytes_are_judged_as_load_does(store: MemoryStore, clock: ManualClock, end: str) -> None:
    record = created(store, clock, v=1)
    if end == "is destroyed":
        store.destroy(A, clock.now())
    elif end == "is renewed":
        store.renew(A, B, record, Changes(), clock.now(), None, login=False)
    elif end == "expires":
        clock.advance(hours=1)
    elif end == "is damaged":
        put_raw(store, A, spoilt(record.raw))
    handle = C if end == "was never there" else A
    assert store.judge(handle, store.environment.get(handle), clock.now()) == store.load(handle, clock.now())


def test_create_never_replaces(store: MemoryStore, clock: ManualClock) -> None:
    record = created(store, clock, n=1)
    assert store.create(A, sets(n=2), clock.now()) is None
    assert store.load(A, clock.now()) == record
    store.destroy(A, clock.now())
    assert store.create(A, sets(n=3), clock.now()) is None, "a tombstone holds its place"
    assert store.load(A, clock.now()) is Missing.DEAD


def test_updates_of_different_keys_merge_on_the_record_as_it_is_now(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, a=1, b=1)
    store.update(A, base, sets(a=2), clock.now())
    second = store.update(A, base, Changes(set=sets(c=3).set, deleted=("b",)), clock.now())
    assert data_of(second) == {"a": encode(2, "a"), "c": encode(3, "c")}
    assert isinstance(second, Record)
    assert second.header.version == 3
    cleared = store.update(A, base, Changes(set=sets(d=4).set, cleared=True), clock.now())
    assert data_of(cleared) == {"d": encode(4, "d")}
    assert store.load(A, clock.now()) == cleared


def test_an_expected_value_that_changed_is_a_conflict_and_writes_nothing(
    store: MemoryStore, clock: ManualClock
) -> None:
    base = created(store, clock, n=1)
    expected = Changes(set=sets(n=2).set, expect={"n": encode(1, "n")})
    done = store.update(A, base, expected, clock.now())
    assert data_of(done) == {"n": encode(2, "n")}
    before = contents(store)
    answer = store.update(A, base, expected, clock.now())
    assert isinstance(answer, Conflict)
    assert answer.record == done
    absent = store.update(A, base, Changes(set=sets(n=5).set, expect={"n": None}), clock.now())
    assert isinstance(absent, Conflict)
    assert contents(store) == before


def test_a_touch_moves_the_idle_expiry_and_counts_as_a_commit(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    clock.advance(120)
    touched = store.update(A, base, TOUCH, clock.now())
    assert isinstance(touched, Record)
    assert touched.header.idle_expiry == clock.now() + HOUR
    assert touched.header.last_seen == clock.now()
    assert touched.header.version == 2
    assert data_of(touched) == data_of(base)
    check_tables(store)


def test_an_update_without_a_touch_leaves_the_expiry_alone(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    clock.advance(120)
    changed = store.update(A, base, sets(n=2), clock.now())
    assert isinstance(changed, Record)
    assert changed.header.expires == base.header.expires


def test_a_wall_clock_that_went_back_extends_nothing(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    clock.step(-7200)
    touched = store.update(A, base, TOUCH, clock.now())
    assert isinstance(touched, Record)
    assert touched.header.expires == base.header.expires
    assert touched.header.last_seen == base.header.last_seen


def test_the_horizon_never_shrinks(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    long = store.update(A, base, Changes(longterm=True), clock.now())
    assert isinstance(long, Record)
    assert long.header.flags & LONGTERM
    assert long.header.horizon == clock.now() + 24 * HOUR
    short = store.update(A, long, Changes(longterm=False), clock.now())
    assert isinstance(short, Record)
    assert short.header.expires == clock.now() + HOUR
    assert short.header.horizon == clock.now() + 24 * HOUR
    store.destroy(A, clock.now())
    dead = header_of(store, A)
    assert dead is not None
    assert dead.horizon == short.header.horizon


def test_destroy_is_final_and_says_so(store: MemoryStore, clock: ManualClock) -> None:
    base = logged_in(store, clock)
    assert store.destroy(A, clock.now()) == A
    assert store.destroy(A, clock.now()) is None
    assert store.load(A, clock.now()) is Missing.DEAD
    assert store.update(A, base, sets(n=2), clock.now()) is Missing.DEAD
    assert store.update(A, base, TOUCH, clock.now()) is Missing.DEAD
    assert store.renew(A, B, base, sets(n=2), clock.now(), None, login=False) is Missing.DEAD
    assert store.load(B, clock.now()) is Missing.UNKNOWN
    found = check_tables(store)
    assert found.users == set(), "a tombstone belongs to nobody"
    header = header_of(store, A)
    assert header is not None
    assert header.flags & TOMBSTONE
    assert header.version == 2
    assert len(found.records[A]) < len(base.raw), "a tombstone holds no data"


def test_renew_moves_the_record_as_it_is_now_and_leaves_a_tombstone_that_says_so(
    store: MemoryStore, clock: ManualClock
) -> None:
    base = created(store, clock, a=1, b=1)
    store.update(A, base, sets(a=2), clock.now())
    clock.advance(10)
    moved = store.renew(A, B, base, sets(c=3), clock.now(), ADA, login=True)
    assert isinstance(moved, Record)
    assert data_of(moved) == {"a": encode(2, "a"), "b": encode(1, "b"), "c": encode(3, "c"), **login_of(clock.now())}
    assert moved.header.flags & AUTHENTICATED
    assert store.load(B, clock.now()) == moved
    assert store.load(A, clock.now()) is Missing.RENEWED
    assert store.update(A, base, sets(a=9), clock.now()) is Missing.RENEWED
    assert store.renew(A, C, base, sets(a=9), clock.now(), None, login=False) is Missing.RENEWED
    assert len(check_tables(store).users) == 1
    anonymous = store.renew(B, C, moved, Changes(), clock.now(), None, login=False)
    assert isinstance(anonymous, Record)
    assert not anonymous.header.flags & AUTHENTICATED
    assert USER_KEY not in data_of(anonymous)
    assert check_tables(store).users == set()


def test_the_absolute_deadline_begins_anew_at_login_only(place: Path, clock: ManualClock) -> None:
    lifetimes = Lifetimes(HOUR, 24 * HOUR, absolute=2 * HOUR)
    with closing(memory_store(place / "base", clock, lifetimes=lifetimes)) as store:
        base = created(store, clock)
        deadline = base.header.absolute
        assert deadline == clock.now() + 2 * HOUR
        clock.advance(minutes=50)
        touched = store.update(A, base, TOUCH, clock.now())
        assert isinstance(touched, Record)
        assert touched.header.absolute == deadline
        moved = store.renew(A, B, touched, Changes(), clock.now(), None, login=False)
        assert isinstance(moved, Record)
        assert moved.header.absolute == deadline
        login = store.renew(B, C, moved, Changes(), clock.now(), ADA, login=True)
        assert isinstance(login, Record)
        assert login.header.absolute == clock.now() + 2 * HOUR


@pytest.mark.parametrize("swept", [False, True])
def test_a_session_ends_at_its_expiry_whether_somebody_sweeps_or_not(
    store: MemoryStore, clock: ManualClock, swept: bool
) -> None:
    base = created(store, clock, n=1)
    clock.advance(seconds=3599.999)
    assert store.load(A, clock.now()) == base
    if swept:
        assert store.sweep(clock.now()) == 0
    clock.advance(seconds=0.001)
    if swept:
        assert store.sweep(clock.now()) == 1
        assert contents(store).records == {}
    gone = Missing.UNKNOWN if swept else Missing.EXPIRED
    assert store.load(A, clock.now()) is gone
    assert store.update(A, base, sets(n=2), clock.now()) is gone
    assert store.renew(A, B, base, sets(n=2), clock.now(), None, login=False) is gone
    check_tables(store)


def test_data_beyond_max_size_is_refused_before_anything_is_written(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    before = contents(store)
    with pytest.raises(SessionTooLarge, match="max_size"):
        store.update(A, base, sets(big=bytes(70_000)), clock.now())
    with pytest.raises(SessionTooLarge, match="max_size"):
        store.create(B, sets(big=bytes(70_000)), clock.now())
    assert contents(store) == before


def test_clear_kills_all_and_count_counts_sessions_not_tombstones(store: MemoryStore, clock: ManualClock) -> None:
    for number in range(5):
        created(store, clock, handle(number), n=number)
    store.destroy(handle(0), clock.now())
    assert store.count() == 4
    assert store.clear() == 4
    assert store.count() == 0
    assert store.clear() == 0
    assert all(store.load(handle(number), clock.now()) is Missing.DEAD for number in range(5))
    check_tables(store)


def test_every_operation_is_one_transaction_and_reading_is_none(store: MemoryStore, clock: ManualClock) -> None:
    now = clock.now()
    store.environment.open()
    began = transactions(store)
    base = created(store, clock, n=1)
    assert transactions(store) == began + 1
    base = store.update(A, base, sets(n=2), now)  # type: ignore[assignment]
    assert transactions(store) == began + 2
    assert isinstance(store.update(A, created(store, clock, B), sets(m=1), now), Record), "the merging path"
    assert transactions(store) == began + 4
    store.update(A, base, TOUCH, now)
    assert transactions(store) == began + 5
    store.renew(A, C, base, sets(n=3), now, ADA, login=True)
    assert transactions(store) == began + 6
    store.destroy(C, now)
    assert transactions(store) == began + 7
    store.fill(handle(9), base.header, base.data, clock.boot())
    assert transactions(store) == began + 8
    store.load(B, now)
    store.count()
    store.usage()
    assert store.sweep(now) == 0
    assert transactions(store) == began + 8
    clock.advance(hours=2)
    store.sweep(clock.now())
    assert transactions(store) == began + 9


# ── what cannot be read ───────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_mac_is_counted_never_served_and_says_unknown(
    store: MemoryStore, clock: ManualClock, events: list[Event]
) -> None:
    base = created(store, clock, n=1)
    mac = len(base.raw) - TAIL_BYTES
    for position in (1, 20, mac // 2, mac - 1, mac, mac + MAC_BYTES - 1):  # 0 is the format's: unreadable, not corrupt
        events.clear()
        raw = bytearray(base.raw)
        raw[position] ^= 1
        put_raw(store, A, bytes(raw))
        assert store.load(A, clock.now()) is Missing.UNKNOWN
        assert events == [RecordCorrupt(A.hex())]
        assert store.update(A, base, sets(n=2), clock.now()) is Missing.UNKNOWN
        assert store.renew(A, B, base, sets(n=2), clock.now(), None, login=False) is Missing.UNKNOWN
    put_raw(store, A, b"short")
    assert store.load(A, clock.now()) is Missing.UNKNOWN
    assert store.destroy(A, clock.now()) == A
    assert store.load(A, clock.now()) is Missing.DEAD


def test_a_record_is_bound_to_its_handle(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    put_raw(store, B, base.raw)
    assert store.load(B, clock.now()) is Missing.UNKNOWN
    assert store.load(A, clock.now()) == base


def test_corrupt_records_neither_stop_the_sweeper_nor_eviction_nor_a_fill(
    store: MemoryStore, clock: ManualClock
) -> None:
    base = created(store, clock, n=1)
    for number in range(4, 7):
        created(store, clock, handle(number), n=1)
    put_raw(store, A, b"short")
    put_raw(store, handle(4), base.raw)
    assert isinstance(store.fill(A, base.header, base.data, clock.boot()), Record)
    put_raw(store, A, b"short")
    clock.advance(120)
    assert store.evict(10) >= 2
    clock.advance(hours=2)
    store.sweep(clock.now())
    assert contents(store).records == {}
    assert contents(store).expiry == set()


def test_a_record_under_an_unknown_key_is_unreadable_and_stays_as_it_is(
    store: MemoryStore, clock: ManualClock, place: Path
) -> None:
    base = created(store, clock, n=1)
    other = Keyring([Key(bytes(32))])
    with closing(memory_store(place / "base", clock, keyring=other)) as foreign:
        for attempt in (
            lambda: foreign.load(A, clock.now()),
            lambda: foreign.update(A, Record(b"", base.header, b""), sets(n=2), clock.now()),
            lambda: foreign.renew(A, B, Record(b"", base.header, b""), Changes(), clock.now(), None, login=False),
            lambda: foreign.destroy(A, clock.now()),
            lambda: foreign.fill(A, base.header, base.data, clock.boot()),
        ):
            with pytest.raises(Unreadable, match="SHMSESSION_KEY"):
                attempt()
        assert foreign.create(A, sets(n=2), clock.now()) is None
    assert store.load(A, clock.now()) == base


def test_a_newer_format_is_unreadable_and_stays_as_it_is(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    newer = bytes([base.raw[0] + 1]) + base.raw[1:]
    put_raw(store, A, newer)
    with pytest.raises(Unreadable, match="format"):
        store.load(A, clock.now())
    with pytest.raises(Unreadable):
        store.destroy(A, clock.now())
    assert contents(store).records[A] == newer


def test_a_rotated_key_reads_old_records_and_reseals_them_at_the_next_write(place: Path, clock: ManualClock) -> None:
    old, new = Key(bytes(range(32))), Key(bytes(32))
    with closing(memory_store(place / "base", clock)) as store:
        base = created(store, clock, n=1)
    with closing(memory_store(place / "base", clock, keyring=Keyring([old, new]))) as rotated:
        found = rotated.load(A, clock.now())
        assert isinstance(found, Record)
        assert found.raw == base.raw
        rotated.update(A, found, sets(n=2), clock.now())
        check_tables(rotated, Keyring([new]))


# ── with a backend ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_dirty_record_keeps_its_first_place_in_the_outbox(backed: MemoryStore, clock: ManualClock) -> None:
    base = created(backed, clock, n=0)
    created(backed, clock, B, n=0)
    for n in range(5):
        updated = backed.update(A, base, sets(n=n), clock.now())
        assert isinstance(updated, Record)
        base = updated
    assert waiting(backed) == [A, B]
    assert int.from_bytes(base.place) == backed.outbox.rows()[0][0]
    backed.destroy(A, clock.now())
    assert waiting(backed) == [A, B]
    backed.renew(B, C, created(backed, clock, handle(8)), Changes(), clock.now(), None, login=False)
    assert waiting(backed) == [A, B, handle(8), C]
    check_tables(backed)


def test_a_touch_is_in_the_outbox_too(backed: MemoryStore, clock: ManualClock) -> None:
    record = _filled(backed, clock)
    clock.advance(120)
    backed.update(A, record, TOUCH, clock.now())
    assert waiting(backed) == [A]


def test_a_place_in_the_outbox_tells_since_when_it_is_held(backed: MemoryStore, clock: ManualClock) -> None:
    """In an order that neither a busy millisecond nor a wall clock that goes back upsets."""
    begun, keys = clock.now(), [handle(number) for number in range(1, 7)]
    for key, step in zip(keys, [0, 0, 0, 10, -3600, 7200], strict=True):
        clock.step(step)
        created(backed, clock, key)
    sequences = [sequence for sequence, _ in backed.outbox.rows()]
    assert waiting(backed) == keys
    assert sequences == sorted(set(sequences))
    begun_at = [sequence_moment(sequence) - begun for sequence in sequences]
    assert begun_at == [0, 0, 0, 10_000, 10_000, 3_610_000]
    clock.advance(5)
    assert backed.outbox.age() == clock.now() - begun
    backed.outbox.acknowledge(backed.outbox.oldest(5), backed.outbox.losses())
    assert waiting(backed) == keys[5:]
    assert backed.outbox.age() == 5_000


def test_without_a_backend_nothing_is_dirty(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    store.renew(A, B, base, sets(n=2), clock.now(), ADA, login=True)
    store.destroy(B, clock.now())
    assert waiting(store) == []


def test_a_session_that_was_never_storable_is_never_in_the_outbox(backed: MemoryStore, clock: ManualClock) -> None:
    base = backed.create(A, Changes(set=sets(n=1).set, storable=False), clock.now())
    assert isinstance(base, Record)
    changed = backed.update(A, base, sets(n=2), clock.now())
    assert isinstance(changed, Record)
    backed.update(A, changed, TOUCH, clock.now())
    moved = backed.renew(A, B, changed, Changes(), clock.now(), ADA, login=True)
    assert isinstance(moved, Record)
    assert waiting(backed) == []
    backed.destroy(B, clock.now())
    assert waiting(backed) == []
    check_tables(backed)


def test_a_session_that_stops_being_storable_is_in_the_outbox_once_more(
    backed: MemoryStore, clock: ManualClock
) -> None:
    """So that the backend erases it; from then on what it does is nobody's business."""
    known = _filled(backed, clock)
    declined = backed.update(A, known, Changes(storable=False), clock.now())
    assert isinstance(declined, Record)
    assert not declined.header.flags & STORABLE
    assert waiting(backed) == [A]
    backed.outbox.acknowledge(backed.outbox.oldest(10), backed.outbox.losses())
    changed = backed.update(A, declined, sets(n=2), clock.now())
    assert isinstance(changed, Record)
    assert data_of(changed) == sets(n=2).set
    assert waiting(backed) == []
    accepted = backed.update(A, changed, Changes(storable=True), clock.now())
    assert isinstance(accepted, Record)
    assert waiting(backed) == [A]
    check_tables(backed)


def test_deaths_that_the_backend_has_not_heard_of_stand_in_nobody_s_way(
    backed: MemoryStore, clock: ManualClock
) -> None:
    """However many there are: sweeping goes on behind them, and they are looked at again later."""
    for number in range(10, 30):
        created(backed, clock, handle(number))
        backed.destroy(handle(number), clock.now())
    clean = handle(30)
    created(backed, clock, clean)
    backed.outbox.acknowledge([row for row in backed.outbox.oldest(99) if row.handle == clean], backed.outbox.losses())
    backed.destroy(clean, clock.now())
    backed.outbox.acknowledge([row for row in backed.outbox.oldest(99) if row.handle == clean], backed.outbox.losses())
    clock.advance(61)
    for _ in range(3):
        backed.sweep(clock.now(), 10)
    assert contents(backed).records.keys() == {handle(number) for number in range(10, 30)}
    assert len(waiting(backed)) == 20
    before = transactions(backed)
    assert backed.sweep(clock.now()) == 0
    assert transactions(backed) == before, "nothing is due now"
    backed.outbox.acknowledge(backed.outbox.oldest(99), backed.outbox.losses())
    clock.advance(61)
    assert backed.sweep(clock.now()) == 20
    assert contents(backed).records == {}
    check_tables(backed)


def test_a_tombstone_says_what_it_said_as_long_as_the_backend_has_not_heard_of_it(
    backed: MemoryStore, clock: ManualClock
) -> None:
    """Sweeping changes no answer, and a logout that comes late still finds the session under its new id."""
    base = created(backed, clock, n=1)
    backed.renew(A, B, base, Changes(), clock.now(), None, login=False)
    clock.advance(61)
    backed.sweep(clock.now())
    assert backed.load(A, clock.now()) is Missing.RENEWED
    assert backed.destroy(A, clock.now())
    assert backed.load(B, clock.now()) is Missing.DEAD


def test_a_dirty_record_that_expires_becomes_a_tombstone_and_a_clean_one_vanishes(
    backed: MemoryStore, clock: ManualClock
) -> None:
    dirty = created(backed, clock, n=1)
    _filled(backed, clock, B)
    clock.advance(hours=2)
    assert backed.sweep(clock.now()) == 2
    assert backed.load(A, clock.now()) is Missing.DEAD
    assert backed.load(B, clock.now()) is Missing.UNKNOWN
    header = header_of(backed, A)
    assert header is not None
    assert header.horizon == dirty.header.horizon
    assert waiting(backed) == [A]
    clock.advance(hours=2)
    assert backed.sweep(clock.now()) == 0, "a backend has not heard of this death yet"
    assert backed.load(A, clock.now()) is Missing.DEAD
    check_tables(backed)


def test_with_a_backend_nothing_that_changed_within_60_s_is_forgotten(place: Path, clock: ManualClock) -> None:
    """A fill that is still on its way must meet it, even when it lived for a second only."""
    with closing(memory_store(place / "base", clock, lifetimes=Lifetimes(SECOND, HOUR), backend=True)) as store:
        record = _filled(store, clock, idle_expiry=clock.now() + SECOND)
        clock.advance(59)
        assert store.sweep(clock.now()) == 0
        older = record.header._replace(version=0, idle_expiry=clock.now() + HOUR)
        assert store.fill(A, older, record.data, clock.boot()) is Missing.EXPIRED
        clock.advance(2)
        assert store.sweep(clock.now()) == 1


def _filled(store: MemoryStore, clock: ManualClock, key: bytes = A, **changes: Any) -> Record:
    """A clean record, as a backend gave it."""
    header = Header(
        1, STORABLE, KEYRING.newest_id, store.environment.epoch, 1, clock.now(), clock.now(), clock.now() + HOUR,
        2**63 - 1, clock.now() + HOUR, 0, bytes(8),
    )._replace(**changes)  # fmt: skip
    record = store.fill(key, header, b"", clock.boot())
    assert isinstance(record, Record)
    return record


# ── fill ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_fill_is_clean_and_indexed(backed: MemoryStore, clock: ManualClock) -> None:
    record = _filled(backed, clock, user_tag=b"12345678", flags=STORABLE | AUTHENTICATED)
    assert waiting(backed) == []
    assert len(check_tables(backed).users) == 1
    assert backed.load(A, clock.now()) == record


def test_a_fill_never_covers_a_tombstone(backed: MemoryStore, clock: ManualClock) -> None:
    record = _filled(backed, clock)
    backed.destroy(A, clock.now())
    newest = record.header._replace(version=1000, epoch=record.header.epoch + 1)
    assert backed.fill(A, newest, b"", clock.boot()) is Missing.DEAD
    assert backed.load(A, clock.now()) is Missing.DEAD


def test_a_fill_never_covers_a_newer_an_equal_or_a_dirty_record(backed: MemoryStore, clock: ManualClock) -> None:
    dirty = created(backed, clock, n=1)
    newest = dirty.header._replace(version=1000)
    assert backed.fill(A, newest, b"", clock.boot()) == dirty
    clean = _filled(backed, clock, B, version=5)
    for version in (4, 5):
        assert backed.fill(B, clean.header._replace(version=version), b"", clock.boot()) == clean
    older_epoch = clean.header._replace(epoch=clean.header.epoch - 1, version=9)
    assert backed.fill(B, older_epoch, b"", clock.boot()) == clean
    newer = backed.fill(B, clean.header._replace(version=6), b"", clock.boot())
    assert isinstance(newer, Record)
    assert newer.header.version == 6
    check_tables(backed)


def test_an_answer_older_than_30_s_by_the_boot_clock_is_not_believed(backed: MemoryStore, clock: ManualClock) -> None:
    record = _filled(backed, clock, B)
    missed = clock.boot()
    clock.advance(30)
    clock.step(-100)
    assert isinstance(backed.fill(A, record.header, b"", missed), Record)
    clock.advance(0.001)
    clock.step(+3600)
    assert backed.fill(C, record.header, b"", missed) is None
    assert contents(backed).records.keys() == {A, B}


def test_the_age_of_a_fill_is_judged_inside_the_transaction(
    backed: MemoryStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = _filled(backed, clock, B)
    missed, write = clock.boot(), backed.environment.write

    def wait_first(work: Any) -> Any:
        clock.advance(31)
        return write(work)

    monkeypatch.setattr(backed.environment, "write", wait_first)
    assert backed.fill(A, record.header, b"", missed) is None
    assert contents(backed).records.keys() == {B}


def test_what_a_fill_replaces_leaves_no_rows_behind(backed: MemoryStore, clock: ManualClock) -> None:
    _filled(backed, clock, user_tag=b"12345678", flags=STORABLE | AUTHENTICATED)
    _filled(backed, clock, version=2, idle_expiry=clock.now() + 2 * HOUR)
    assert check_tables(backed).users == set()


# ── keeping house ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_tombstone_stays_for_60_s_and_is_then_forgotten(store: MemoryStore, clock: ManualClock) -> None:
    created(store, clock, n=1)
    store.destroy(A, clock.now())
    clock.advance(59.999)
    assert store.sweep(clock.now()) == 0
    assert store.load(A, clock.now()) is Missing.DEAD
    clock.advance(0.001)
    assert store.load(A, clock.now()) is Missing.UNKNOWN, "whether somebody sweeps or not"
    assert store.sweep(clock.now()) == 1
    assert contents(store)[:4] == ({}, set(), {}, set())


def test_a_tombstone_stays_for_60_s_of_boot_time_whatever_the_wall_clock_says(
    store: MemoryStore, clock: ManualClock
) -> None:
    created(store, clock, n=1)
    store.destroy(A, clock.now())
    clock.step(4.5)
    clock.advance(58)
    assert store.sweep(clock.now()) == 0
    clock.advance(2)
    assert store.sweep(clock.now()) == 1


def test_nothing_that_changed_within_60_s_is_evicted(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    clock.advance(59)
    store.update(A, base, sets(n=2), clock.now())
    clock.advance(59)
    assert store.evict() == 0
    clock.advance(1)
    assert store.evict() == 1
    assert store.load(A, clock.now()) is Missing.UNKNOWN
    check_tables(store)


def test_without_a_backend_only_anonymous_sessions_are_evicted_soonest_to_end_first(
    store: MemoryStore, clock: ManualClock
) -> None:
    for number in range(4):
        clock.advance(1)
        created(store, clock, handle(number), n=number)
    login = logged_in(store, clock, handle(10))
    store.destroy(handle(3), clock.now())
    clock.advance(100)
    assert store.evict(2) == 2
    assert contents(store).records.keys() == {handle(2), handle(3), handle(10)}
    assert store.evict() == 1
    assert store.evict() == 0
    assert store.load(handle(10), clock.now()) == login
    check_tables(store)


def test_with_a_backend_what_it_has_goes_first_and_nothing_dirty_or_memory_only_that_is_logged_in(
    backed: MemoryStore, clock: ManualClock
) -> None:
    clean = _filled(backed, clock, handle(1))
    _filled(backed, clock, handle(2), user_tag=b"12345678", flags=STORABLE | AUTHENTICATED)
    created(backed, clock, handle(3))
    backed.create(handle(4), Changes(storable=False), clock.now())
    backed.create(handle(5), Changes(set={USER_KEY: ADA}, storable=False), clock.now())
    assert clean.place == NO_PLACE
    clock.advance(100)
    gone: list[bytes] = []
    before = contents(backed).records.keys()
    while backed.evict(1):
        after = contents(backed).records.keys()
        gone += before - after
        before = after
        check_tables(backed)
    assert gone == [handle(1), handle(2), handle(4)]
    assert before == {handle(3), handle(5)}


@pytest.mark.parametrize("step", [-3600, +3600])
def test_the_sweeper_pauses_for_five_minutes_after_a_step_of_the_wall_clock(
    store: MemoryStore, clock: ManualClock, step: float
) -> None:
    """Also when it is the first sweep of this store that meets the step: what looks expired may not be."""
    created(store, clock, n=1)
    logged_in(store, clock, B)
    clock.step(step)
    clock.advance(hours=0 if step > 0 else 2)
    assert store.sweep(clock.now()) == 0
    clock.advance(299)
    assert store.sweep(clock.now()) == 0
    assert contents(store).records.keys() == {A, B}
    clock.advance(2)
    assert store.sweep(clock.now()) == 2


def test_a_step_that_is_taken_back_costs_no_session(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    clock.step(+86400)
    store.sweep(clock.now())
    assert store.load(A, clock.now()) is Missing.EXPIRED
    clock.step(-86400)
    store.sweep(clock.now())
    assert store.load(A, clock.now()) == base


def test_drift_of_a_few_seconds_is_no_step(store: MemoryStore, clock: ManualClock) -> None:
    created(store, clock, n=1)
    clock.advance(hours=2)
    clock.step(4)
    assert store.sweep(clock.now()) == 1


def test_sweeping_goes_by_limit_until_nothing_is_due(store: MemoryStore, clock: ManualClock) -> None:
    for number in range(25):
        (created if number % 2 else logged_in)(store, clock, handle(number))
    clock.advance(hours=1)
    created(store, clock, handle(99))
    assert [store.sweep(clock.now(), 10) for _ in range(4)] == [10, 10, 5, 0]
    assert contents(store).records.keys() == {handle(99)}


# ── all of it, in any order ───────────────────────────────────────────────────────────────────────────────────

HANDLES = st.sampled_from([handle(number) for number in range(5)])
VALUES = st.dictionaries(st.sampled_from("abc"), st.binary(max_size=300), max_size=2)
CHANGES = st.builds(
    Changes,
    set=VALUES.map(lambda values: {key: encode(value, key) for key, value in values.items()}),
    deleted=st.lists(st.sampled_from("abc"), max_size=1).map(tuple),
    cleared=st.sampled_from([False, False, False, True]),
    touch=st.booleans(),
    storable=st.sampled_from([None, None, True, False]),
    longterm=st.sampled_from([None, None, True, False]),
    expect=st.none(),
)


class AnyOrder(RuleBasedStateMachine):
    """Random operations on few handles against a dict of what must be there; after each, all tables agree."""

    backend = False

    def __init__(self) -> None:
        super().__init__()
        self.directory = TemporaryDirectory()
        self.clock = ManualClock()
        self.store = memory_store(Path(self.directory.name) / "base", self.clock, backend=self.backend)
        self.live: dict[bytes, Record] = {}
        self.dead: dict[bytes, tuple[Missing, int]] = {}
        self.successors: dict[bytes, bytes] = {}
        self.waiting: set[bytes] = set()
        self.places: dict[bytes, int] = {}
        self.loaded: list[tuple[bytes, Record]] = []
        self.store.environment.open()
        self.built = self.clock.boot()
        self.txn = transactions(self.store)
        self.fresh = 100

    def teardown(self) -> None:
        self.store.environment.close()
        assert self.store.environment.building.problem() is None, "a healthy file is taken for a damaged one"
        self.store.close()
        self.directory.cleanup()

    @initialize()
    def begin(self) -> None:
        self.create(handle(0), Changes())

    def _expired(self, key: bytes) -> bool:
        return key in self.live and self.clock.now() >= self.live[key].header.expires

    def _is_forgotten(self, key: bytes) -> bool:
        """Whether a tombstone has said long enough what it says; one that a backend has not heard of never has."""
        if key not in self.dead or self.clock.boot() - self.dead[key][1] < 60_000:
            return False
        return key not in self.waiting

    def _expected(self, key: bytes) -> Record | Missing:
        if key in self.dead:
            return Missing.UNKNOWN if self._is_forgotten(key) else self.dead[key][0]
        return Missing.EXPIRED if self._expired(key) else self.live.get(key, Missing.UNKNOWN)

    def _took(self, most: int) -> None:
        now = transactions(self.store)
        assert now - self.txn <= most, "one operation, one transaction"
        self.txn = now

    def _keep(self, key: bytes, record: Record) -> None:
        self.live[key] = record
        self.loaded.append((key, record))

    def _told(self, key: bytes, flags: int) -> None:
        """What the backend must hear of waits from now on, if it did not."""
        if self.backend and flags:
            self.waiting.add(key)

    @rule(key=HANDLES, changes=CHANGES)
    def create(self, key: bytes, changes: Changes) -> None:
        record = self.store.create(key, changes, self.clock.now())
        assert (record is None) == (key in self.live or key in self.dead)
        if isinstance(record, Record):
            assert record.split() == changes.set
            self._keep(key, record)
            self._told(key, record.header.flags & STORABLE)
        self._took(1)

    @rule(key=HANDLES)
    def load(self, key: bytes) -> None:
        found = self.store.load(key, self.clock.now())
        assert found == self._expected(key)
        if isinstance(found, Record):
            self.loaded.append((key, found))
        self._took(0)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data(), changes=CHANGES, expect=st.sampled_from([None, None, "right", "wrong"]))
    def update(self, data: st.DataObject, changes: Changes, expect: str | None) -> None:
        key, base = data.draw(st.sampled_from(self.loaded[-6:]))
        expected = self._expected(key)
        if expect and isinstance(expected, Record):
            wanted = expected.split().get("a")
            changes = _expecting(changes, wanted if expect == "right" else b"\xc1")
            if expect == "wrong":
                base = Record(b"", base.header, base.data)  # what was expected never comes from the record itself
        answer = self.store.update(key, base, changes, self.clock.now())
        if isinstance(expected, Missing):
            assert answer == expected
        elif expect == "wrong":
            assert answer == Conflict(expected)
        else:
            assert isinstance(answer, Record)
            assert answer.split() == changes.merged(expected.split())
            assert answer.header.version == expected.header.version + 1
            assert answer.header.horizon >= max(expected.header.horizon, answer.header.expires)
            self._keep(key, answer)
            self._told(key, (answer.header.flags | expected.header.flags) & STORABLE)
        self._took(1)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data(), changes=CHANGES, user=st.sampled_from([None, ADA, encode(7, "u")]), login=st.booleans())
    def renew(self, data: st.DataObject, changes: Changes, user: bytes | None, login: bool) -> None:
        key, base = data.draw(st.sampled_from(self.loaded[-6:]))
        expected = self._expected(key)
        self.fresh += 1
        new = handle(self.fresh)
        answer = self.store.renew(key, new, base, changes, self.clock.now(), user, login=login)
        if isinstance(expected, Missing):
            assert answer == expected
        else:
            assert isinstance(answer, Record)
            known: dict[DataKey, bytes] = {} if login or user is None else data_of(expected)
            kept = {key: value for key, value in known.items() if key in LOGIN_KEYS}
            merged = {key: value for key, value in data_of(expected).items() if key not in LOGIN_KEYS}
            named: dict[DataKey, bytes] = {}
            if user is not None:
                named = login_of(self.clock.now(), user) if login else {USER_KEY: user}
            wanted_data = changes.merged(merged) | ({} if changes.cleared else kept) | named
            assert answer.split() == wanted_data
            assert bool(answer.header.flags & AUTHENTICATED) == (user is not None)
            self._bury(key, Missing.RENEWED)
            if not login:
                self.successors[key] = new
            self._keep(new, answer)
            self._told(new, answer.header.flags & STORABLE)
        self._took(1)

    def _bury(self, key: bytes, why: Missing) -> None:
        self.successors.pop(key, None)
        horizon = self.live.pop(key).header.horizon
        self.dead[key] = (why, self.clock.boot())
        header = header_of(self.store, key)
        assert header is not None
        assert header.horizon == horizon
        self._told(key, header.flags & (STORABLE | WITHDRAWN))

    @rule(key=HANDLES)
    def destroy(self, key: bytes) -> None:
        target = key
        while target in self.dead and target in self.successors:
            target = self.successors[target]
        known = target in self.live or (self.backend and target not in self.dead)
        assert self.store.destroy(key, self.clock.now()) == (target if known else None)
        if target in self.live:
            self._bury(target, Missing.DEAD)
        elif target not in self.dead:
            self.dead[target] = (Missing.DEAD, self.clock.boot())
            self._told(target, STORABLE if known else 0)
        self._took(1)

    @precondition(lambda self: self.loaded)
    @rule(data=st.data(), age=st.sampled_from([0, 30_000, 30_001]), newer=st.integers(-1, 2))
    def fill(self, data: st.DataObject, age: int, newer: int) -> None:
        key, base = data.draw(st.sampled_from(self.loaded[-6:]))
        header = base.header._replace(version=max(0, base.header.version + newer))
        expected, known = self._expected(key), self.live.get(key)
        missed = self.clock.boot() - age
        is_too_old = age > 30_000 or missed < self.built < missed + 30_000
        forgotten = not is_too_old and self._is_forgotten(key)
        answer = self.store.fill(key, header, base.data, missed)
        if forgotten:
            self.dead.pop(key)
            self.successors.pop(key, None)
        if is_too_old:
            assert answer is None
        elif key in self.dead or self._expired(key):
            assert answer is expected
        elif known is not None and (
            key in self.waiting or (known.header.epoch, known.header.version) >= (header.epoch, header.version)
        ):
            assert answer == known
        else:
            assert isinstance(answer, Record)
            assert answer.split() == base.split()
            self._keep(key, answer)
        self._took(1)

    @rule(limit=st.integers(1, 10))
    def sweep(self, limit: int) -> None:
        before = self._all()
        gone = self.store.sweep(self.clock.now(), limit)
        assert gone <= limit
        for key in before - self._all():
            if key in self.live:
                assert self._expired(key)
                assert key not in self.waiting
                self.live.pop(key)
            else:
                assert self.clock.boot() - self.dead.pop(key)[1] >= 60_000
                self.successors.pop(key, None)
        for key in [key for key in self.live if key in self.waiting and self._expired(key)]:
            header = header_of(self.store, key)
            assert header is not None
            if header.flags & TOMBSTONE:
                self._bury(key, Missing.DEAD)
        for key in self.dead.keys() & self.waiting:  # one that is due goes on saying it, for as long again
            why, since = self.dead[key]
            header = header_of(self.store, key)
            assert header is not None
            assert header.changed == since or (header.changed == self.clock.boot() >= since + 60_000)
            self.dead[key] = (why, header.changed)
        self._took(1)

    @rule(count=st.integers(1, 5))
    def evict(self, count: int) -> None:
        before = self._all()
        gone = self.store.evict(count)
        went = before - self._all()
        assert len(went) == gone <= count
        for key in went:
            header = self.live.pop(key).header
            assert self.clock.boot() - header.changed >= 60_000
            assert key not in self.waiting
            assert not header.flags & AUTHENTICATED or (self.backend and header.flags & STORABLE)
        self._took(1)

    @rule(count=st.integers(1, 5))
    def acknowledge(self, count: int) -> None:
        sent = self.store.outbox.oldest(count)
        assert [dirty.handle for dirty in sent] == sorted(self.waiting, key=lambda key: self.places[key])[:count]
        before = contents(self.store).records
        self.store.outbox.acknowledge(sent, self.store.outbox.losses())
        assert contents(self.store).records == before, "what was acknowledged is still the same record"
        self.waiting -= {dirty.handle for dirty in sent}
        self._took(1)

    @rule(seconds=st.sampled_from([1, 29, 61, 600, 3600, 90_000]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds)

    def _all(self) -> set[bytes]:
        return set(contents(self.store).records)

    @invariant()
    def tables_agree(self) -> None:
        found = check_tables(self.store)
        assert found.records.keys() == self.live.keys() | self.dead.keys()
        for key, record in self.live.items():
            assert found.records[key] == record.raw
        assert self.store.count() == len(self.live)
        places = {key: place for place, key in found.outbox.items()}
        assert places.keys() == self.waiting
        for key, place in self.places.items():
            if key in self.waiting:
                assert places[key] == place, "whoever waits keeps its place, or a hot session would be starved"
        self.places = places


def _expecting(changes: Changes, raw: bytes | None) -> Changes:
    return Changes(
        set=changes.set,
        deleted=changes.deleted,
        cleared=changes.cleared,
        touch=changes.touch,
        storable=changes.storable,
        longterm=changes.longterm,
        expect={"a": raw},
    )


class AnyOrderWithBackend(AnyOrder):
    backend = True


_SETTINGS = settings(
    max_examples=30,
    stateful_step_count=40,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # shrinking takes minutes; a failing sequence prints itself
    suppress_health_check=[HealthCheck.too_slow],
)
TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = _SETTINGS
TestAnyOrderWithBackend = AnyOrderWithBackend.TestCase
TestAnyOrderWithBackend.settings = _SETTINGS


def test_the_check_of_the_tables_can_fail(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock, n=1)
    check_tables(store)
    record = RecordSeal(KEYRING).close(B, base.header, b"")
    put_raw(store, B, record.raw)
    with pytest.raises(AssertionError):
        check_tables(store)


def test_a_header_is_smaller_than_a_page_needs_for_four_records(store: MemoryStore, clock: ManualClock) -> None:
    base = created(store, clock)
    assert len(base.raw) - len(base.data) <= struct.calcsize(">BB4sQQQQQQQQ8s") + 16 + 8
