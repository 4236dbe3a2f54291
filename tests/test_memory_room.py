"""Room: who is let in as the map fills, who goes first, and that a full store is an error and never an end."""

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lmdb
import pytest

from shmsession.codec import encode
from shmsession.errors import StoreFull
from shmsession.hooks import Event, Evicted
from shmsession.memory import place as places
from shmsession.memory import room
from shmsession.memory.environment import Usage
from shmsession.memory.store import EVICTION_BATCH, MemoryStore, Missing
from shmsession.memory.writing import MAP_FULL_ATTEMPTS
from shmsession.record import USER_KEY, Changes, Data, Record
from shmsession.testing import ManualClock
from tests.backends import Host
from tests.figures import report, rng, size
from tests.memory import (
    TOUCH,
    check_tables,
    closing,
    contents,
    handle,
    in_child,
    memory_store,
    mount_tmpfs,
    refusal,
    transactions,
)

ADA = encode("ada", "user_id")
MIB = 1 << 20
PAGE = 3000
"""A value of this size has a page of its own: nobody slips into a hole that others left."""


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


class Visitors:
    """Creates sessions under one fresh handle after another."""

    def __init__(self, store: MemoryStore, clock: ManualClock) -> None:
        self.store = store
        self.clock = clock
        self.random = rng("room")

    def come(self, *, user: bytes | None = None, size: int = 100) -> tuple[bytes, Record]:
        key = self.random.randbytes(20)
        values: Data = {"n": encode(bytes(size), "n")}
        if user is not None:
            values[USER_KEY] = user
        record = self.store.create(key, Changes(set=values), self.clock.now())
        assert isinstance(record, Record)
        return key, record

    def come_until_full(self, **how: Any) -> list[tuple[bytes, Record]]:
        here: list[tuple[bytes, Record]] = []
        while True:
            try:
                here.append(self.come(**how))
            except StoreFull:
                return here


@pytest.fixture
def visitors(store: MemoryStore, clock: ManualClock) -> Visitors:
    return Visitors(store, clock)


def percent(store: MemoryStore) -> float:
    usage = store.usage()
    return usage.used * 100 / usage.total


def test_anonymous_sessions_get_60_percent_logged_in_ones_80_updates_90_and_tombstones_always_fit(
    store: MemoryStore, clock: ManualClock, visitors: Visitors
) -> None:
    anonymous = visitors.come_until_full()
    assert 54 < percent(store) <= 61
    logged_in = visitors.come_until_full(user=ADA)
    assert 74 < percent(store) <= 81
    with pytest.raises(StoreFull):
        visitors.come()
    grown = 0
    more = Changes(set={"more": encode(bytes(600), "more")})
    with contextlib.suppress(StoreFull):
        for key, record in logged_in:
            assert isinstance(store.update(key, record, more, clock.now()), Record)
            grown += 1
    assert 84 < percent(store) <= 92
    assert 0 < grown < len(logged_in)
    key, record = anonymous[0]
    same = store.update(key, record, Changes(set={"n": encode(bytes(100), "n")}), clock.now())
    assert isinstance(same, Record), "an update that does not grow is never refused"
    same = store.update(key, same, TOUCH, clock.now())
    assert isinstance(same, Record)
    big = Changes(set={"n": encode(bytes(60_000), "n")})
    with pytest.raises(StoreFull, match="90 %"):
        store.renew(key, handle(1), same, big, clock.now(), ADA, login=True)
    assert store.load(key, clock.now()) == same, "a refused renewal leaves the session alone"
    for key, _ in anonymous + logged_in:
        assert store.destroy(key, clock.now()) == key
    assert store.count() == 0
    check_tables(store)


def test_a_fill_without_room_is_no_error_and_keeps_nothing(
    place: Path, clock: ManualClock, store: MemoryStore, visitors: Visitors
) -> None:
    _, record = visitors.come_until_full(size=PAGE)[0]
    before = contents(store)
    assert store.fill(handle(1), record.header, record.data, clock.boot()) is None
    assert contents(store).records == before.records


@pytest.mark.soak
def test_a_flood_of_anonymous_sessions_costs_no_login_and_no_logout(
    place: Path, clock: ManualClock, events: list[Event]
) -> None:
    """A 16 MiB map: logged-in sessions stay and work, the flood meets StoreFull, destroying works, and it recovers."""
    attempts = size(1_000_000, 40_000)
    with closing(memory_store(place / "big", clock, map_size=16 * MIB, events=events)) as store:
        visitors = Visitors(store, clock)
        ours = [visitors.come(user=ADA, size=1000) for _ in range(500)]
        came, refused, kept, last = 0, 0, [], b""
        for attempt in range(attempts):
            if attempt % 200 == 0:
                clock.advance(0.5)
            try:
                last, _ = visitors.come()
                came += 1
            except StoreFull:
                refused += 1
            if attempt % 1000 == 0:
                key, record = ours[attempt // 1000 % len(ours)]
                changed = Changes(set={"n": encode(bytes(1000), "n"), "at": encode(attempt, "at")}, touch=True)
                updated = store.update(key, record, changed, clock.now())
                assert isinstance(updated, Record), "a logged-in session works on in the flood"
                ours[attempt // 1000 % len(ours)] = (key, updated)
                kept.append(key)
        assert refused > 0
        assert came + refused == attempts
        for key, record in ours:
            assert store.load(key, clock.now()) == record
        assert isinstance(store.load(last, clock.now()), Record)
        assert store.destroy(last, clock.now()) == last
        for key, _ in ours:
            assert store.destroy(key, clock.now()) == key
            assert store.load(key, clock.now()) is Missing.DEAD
        clock.advance(hours=2)
        visitors.come()
        while store.sweep(clock.now(), 1000):
            pass
        assert store.count() == 1
        check_tables(store)
        evicted = sum(event.count for event in events if isinstance(event, Evicted))
    report("G8 flood", attempts=attempts, came=came, refused=refused, evicted=evicted, logged_in_kept=len(ours))


def test_a_full_store_is_searched_once_a_second_not_once_a_visitor(
    store: MemoryStore, clock: ManualClock, visitors: Visitors, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[int] = []
    find = room.Evictor.find

    def counted(*args: Any) -> Any:
        searches.append(1)
        return find(*args)

    visitors.come_until_full(size=PAGE)
    clock.advance(1)
    monkeypatch.setattr(room.Evictor, "find", counted)
    before, began = contents(store), transactions(store)
    for _ in range(500):
        with pytest.raises(StoreFull):
            visitors.come(size=PAGE)
    assert len(searches) == 1
    assert contents(store) == before
    assert transactions(store) - began <= 1
    clock.advance(1)
    with pytest.raises(StoreFull):
        visitors.come(size=PAGE)
    assert len(searches) == 2


def test_a_full_store_lets_visitors_in_again_after_a_minute_by_evicting_the_idle(
    store: MemoryStore, clock: ManualClock, visitors: Visitors, events: list[Event]
) -> None:
    here = visitors.come_until_full(size=PAGE)
    login, record = visitors.come(user=ADA)
    clock.advance(61)
    visitors.come(size=PAGE)
    gone = [key for key, _ in here if store.load(key, clock.now()) is Missing.UNKNOWN]
    assert gone
    assert events == [Evicted(len(gone))]
    assert store.load(login, clock.now()) == record
    check_tables(store)


def test_visitors_who_cannot_be_let_in_evict_at_most_one_search_s_worth_a_second(
    store: MemoryStore, clock: ManualClock, visitors: Visitors
) -> None:
    """Logged-in sessions hold more than the share of anonymous ones: whoever went would go for nothing."""
    anonymous = visitors.come_until_full()
    visitors.come_until_full(user=ADA)
    assert percent(store) > room.NEW_ANONYMOUS + 10
    clock.advance(61)
    for _ in range(200):
        with pytest.raises(StoreFull):
            visitors.come()
    left = sum(isinstance(store.load(key, clock.now()), Record) for key, _ in anonymous)
    assert len(anonymous) - left <= EVICTION_BATCH * MAP_FULL_ATTEMPTS


def test_room_is_made_of_what_has_ended_before_anything_alive_is_evicted(
    store: MemoryStore, clock: ManualClock, visitors: Visitors, events: list[Event]
) -> None:
    """Not one session is evicted as long as one is there that has ended."""
    old = visitors.come_until_full()
    clock.advance(minutes=59)
    for key, _ in old[:10]:
        store.destroy(key, clock.now())
    clock.advance(minutes=2)
    came = 0
    with contextlib.suppress(StoreFull):
        while not any(isinstance(event, Evicted) for event in events):
            visitors.come()
            came += 1
    assert came > EVICTION_BATCH, "many found room"
    assert all(store.load(key, clock.now()) is Missing.UNKNOWN for key, _ in old), "nobody else had to go for them"


def test_logins_find_room_in_a_store_full_of_ended_logins(
    store: MemoryStore, clock: ManualClock, visitors: Visitors
) -> None:
    """No commit but these creations happens, so nobody else sweeps."""
    ended = visitors.come_until_full(user=ADA)
    clock.advance(hours=2)
    for _ in range(len(ended) // 2):
        visitors.come(user=ADA)
    assert store.count() < len(ended)
    check_tables(store)


def test_room_is_made_of_old_tombstones(store: MemoryStore, clock: ManualClock, visitors: Visitors) -> None:
    while percent(store) < 80:
        try:
            key, _ = visitors.come(user=ADA)
        except StoreFull:
            break
        store.destroy(key, clock.now())
    with pytest.raises(StoreFull):
        visitors.come(user=ADA, size=PAGE)
    clock.advance(61)
    visitors.come(user=ADA, size=PAGE)
    check_tables(store)


def test_a_map_without_pages_is_a_typed_error_that_writes_nothing_and_ends_nothing(
    place: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LMDB's own MapFullError, which admission keeps away: here it is switched off."""
    monkeypatch.setattr(room, "admit", lambda *_: None)
    with closing(memory_store(place / "tiny", clock)) as store:
        visitors = Visitors(store, clock)
        here: list[tuple[bytes, Record]] = []
        with pytest.raises(StoreFull, match="SHMSESSION_MAP_SIZE") as raised:
            here.extend(visitors.come(user=ADA, size=PAGE) for _ in range(1000))
        assert isinstance(raised.value.__cause__, lmdb.MapFullError)
        found = check_tables(store)
        assert found.records.keys() == {key for key, _ in here}
        for key, record in here:
            assert store.load(key, clock.now()) == record
        clock.advance(hours=2)
        assert store.sweep(clock.now(), 5) == 5
        monkeypatch.undo()
        visitors.come(user=ADA)
        check_tables(store)


def test_a_transient_map_full_is_tried_again_after_room_was_made(
    store: MemoryStore, clock: ManualClock, visitors: Visitors, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitors.come_until_full()
    clock.advance(61)
    write, attempts = store.environment.write, []

    def full_once(work: Callable[..., Any]) -> Any:
        attempts.append(1)
        if len(attempts) == 1:
            raise StoreFull("full")
        return write(work)

    monkeypatch.setattr(store.environment, "write", full_once)
    visitors.come(user=ADA)
    assert len(attempts) == 3, "the failure, the search for room, the second attempt"


def test_only_the_write_for_which_others_had_to_go_may_take_reserved_pages(
    store: MemoryStore, clock: ManualClock, visitors: Visitors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write asks without, and with what was made for it; the next one begins without again."""
    visitors.come_until_full()
    clock.advance(61)
    told: list[bool] = []

    def settle(_crowd: room.Crowd, _usage: Usage, *, made_room: bool) -> None:
        told.append(made_room)
        if not made_room:
            raise StoreFull("full")

    monkeypatch.setattr(room, "admit", lambda *_: room.Crowd(0, 60))
    monkeypatch.setattr(room, "settle", settle)
    key, record = visitors.come()
    found = store.update(key, record, Changes(set={"more": b"of it"}), clock.now())
    assert isinstance(found, Record)
    assert isinstance(store.renew(key, handle(1), found, Changes(), clock.now(), None, login=False), Record)
    assert isinstance(store.fill(handle(2), record.header, record.data, clock.boot()), Record)
    assert told == [False, True] * 4


# ── the file system ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wanted", [1 << 44, 1 << 50])
def test_a_map_that_the_machine_cannot_hold_is_an_error_at_the_start(
    place: Path, clock: ManualClock, wanted: int
) -> None:
    """And it leaves nothing behind: a smaller one opens in the same place."""
    with closing(memory_store(place / "base", clock, map_size=wanted)) as store, pytest.raises(StoreFull) as raised:
        store.environment.open()
    assert "SHMSESSION_MAP_SIZE" in str(raised.value)
    assert not (place / "base/test/lmdb.new").exists()
    with closing(memory_store(place / "base", clock)) as store:
        Visitors(store, clock).come()


def _on_a_file_system_of(place: Path, size: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], Any]) -> Any:
    """What `work` returns in a process that sees a file system of this size at `place`, or believes so."""
    target = place / "small"
    target.mkdir(mode=0o700)

    def pretend() -> None:
        statvfs, fallocate, used = os.fstatvfs, os.posix_fallocate, [0]

        def fstatvfs(descriptor: int) -> Any:
            return SimpleNamespace(f_bavail=(size - used[0]) // 4096, f_frsize=statvfs(descriptor).f_frsize)

        def posix_fallocate(descriptor: int, offset: int, length: int) -> None:
            if used[0] + length > size:
                raise OSError(errno.ENOSPC, "No space left on device")
            used[0] += length
            fallocate(descriptor, offset, length)

        monkeypatch.setattr(os, "fstatvfs", fstatvfs)
        monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)

    def child() -> Any:
        if not mount_tmpfs(target, size):
            pretend()
        return work()

    return in_child(child)


def test_a_full_file_system_is_an_error_and_no_signal(
    place: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> str:
        base = place / "small/base"
        ballast = place / "small/ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                for _ in range(1024):
                    file.write(bytes(4096))
            except OSError:
                pass
        with closing(memory_store(base, clock)) as store:
            return refusal(store.environment.open, StoreFull)

    assert "base/test" in _on_a_file_system_of(place, 256 * 1024, monkeypatch, work)


def test_a_small_dev_shm_gets_a_smaller_map_and_a_warning(
    place: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Docker gives 64 MiB."""

    def work() -> tuple[int, list[str]]:
        messages: list[str] = []

        class Listener(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                messages.append(record.getMessage())

        logging.getLogger("shmsession").addHandler(Listener())
        with closing(memory_store(place / "small/base", clock, map_size=None)) as store:
            Visitors(store, clock).come()
            return store.usage().total * 4096, messages

    total, messages = _on_a_file_system_of(place, 64 * MIB, monkeypatch, work)
    assert 30 * MIB <= total <= 32 * MIB
    assert len(messages) == 1
    assert "--shm-size" in messages[0]
    assert "SHMSESSION_MAP_SIZE" in messages[0]


def test_the_default_map_has_256_mib_where_there_is_room_and_the_wanted_size_is_taken_as_it_is(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=1 << 30, f_frsize=4096))
    assert places.size_for(0, None) == 256 * MIB
    assert places.size_for(0, 5 * MIB + 17) == 5 * MIB
    assert caplog.records == []
    monkeypatch.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=10, f_frsize=4096))
    assert places.size_for(0, None) == MIB


# ── who is looked at ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("user", [None, ADA], ids=["anonymous", "logged in"])
def test_those_that_cannot_go_hide_none_that_can(
    place: Path, monkeypatch: pytest.MonkeyPatch, user: bytes | None
) -> None:
    """However many of them end soonest, and though a search comes to its limit: nobody is lost whom nobody else has."""
    monkeypatch.setattr(room, "LOOKED_AT", 100)
    with Host(place, map_size=4 << 20) as host:
        flusher = host.flusher()

        def come(number: int, *, storable: bool) -> None:
            changes = Changes(set={"v": encode("x" * 400, "v")} | ({USER_KEY: user} if user else {}), storable=storable)
            assert host.memory.create(handle(number), changes, host.clock.now())

        only_here = range(1, 500)
        for number in only_here:
            come(number, storable=False)
        host.clock.advance(10)
        for number in range(1_000, 3_000):
            come(number, storable=True)
            if number % 200 == 0:
                host.flush(flusher)
        host.flush(flusher)
        host.clock.advance(120)
        host.flush(flusher)
        before, gone = host.memory.count(), 0
        for _ in range(200):
            gone += host.memory.evict(64) if gone < 1_500 else 0
        assert gone >= 1_500
        assert host.memory.count() == before - gone
        assert all(isinstance(host.load(handle(number)), Record) for number in only_here)
