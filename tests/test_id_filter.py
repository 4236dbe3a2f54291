"""With plain tokens anybody makes up ids: the backend is spared the look-ups, and no session is taken for unknown."""

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from shmsession import CookieMode, Key, OldCookie, SessionConfig, SessionMode, SessionStore
from shmsession.backends import SENTINEL
from shmsession.memory import bloom as filters
from shmsession.memory import place as place_module
from shmsession.memory.bloom import BloomFilter
from shmsession.memory.place import open_directory
from shmsession.testing import ManualClock
from tests.asking import PROTOCOLS, Visitor
from tests.backends import MemoryBackend
from tests.figures import report, rng
from tests.memory import forget, in_child, wait_until

KEY = Key(b"k" * 32)


@pytest.fixture
def bloom(place: Path) -> BloomFilter:
    os.close(open_directory(place))
    return BloomFilter(place)


def handles(count: int, name: str = "handles") -> list[bytes]:
    random = rng(name)
    return [random.randbytes(20) for _ in range(count)]


# ── the filter ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_was_added_is_known_and_hardly_anything_else(bloom: BloomFilter) -> None:
    slots = bloom.begin(0)
    ours, others = handles(60_000), handles(60_000, "others")
    for handle in ours:
        slots.add(handle)
    assert all(map(slots.has, ours))
    false = sum(map(slots.has, others))
    report("filter of plain ids", added=len(ours), unknown=len(others), taken_for_known=false)
    assert false < len(others) // 100
    assert not slots.is_crowded


def test_it_is_ready_for_one_state_of_things_only(bloom: BloomFilter) -> None:
    one, other = b"1" * 16, b"2" * 16
    assert bloom.current() is None
    slots = bloom.begin(10)
    assert not slots.is_ready(one)
    slots.make_ready(one)
    assert slots.is_ready(one)
    assert not slots.is_ready(other)
    assert not bloom.begin(10).is_ready(one)


def test_those_who_have_it_mapped_go_over_to_the_next_filling(place: Path, bloom: BloomFilter) -> None:
    """Of whatever size; and who was overtaken while filling one spoils nothing."""
    overtaken = bloom.begin(0)
    other = BloomFilter(place)
    for handle in handles(100):
        overtaken.add(handle)
    for size in (100_000, 10):
        slots = other.begin(size)
        slots.make_ready(b"ready")
        seen = bloom.current()
        assert seen is not None
        assert seen.capacity == slots.capacity >= size
        assert not any(map(seen.has, handles(100)))
        slots.add(handles(1)[0])
        assert seen.has(handles(1)[0])
        overtaken.make_ready(b"mine")
        assert seen.is_ready(b"ready")
        assert not seen.is_ready(b"mine")
    assert sorted(file.name for file in place.iterdir()) == ["bloom"]


def test_it_says_when_it_is_too_small(bloom: BloomFilter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is added again, as it is every hour, does not crowd it."""
    monkeypatch.setattr(filters, "SMALLEST", 64)
    slots = bloom.begin(0)
    for _ in range(3):
        for handle in handles(60):
            slots.add(handle)
    assert not slots.is_crowded
    for handle in handles(80):
        slots.add(handle)
    assert slots.is_crowded


@pytest.mark.parametrize("size", [0, 100, 4096, 5000])
def test_a_filter_that_was_cut_is_not_believed(site: "Open", size: int) -> None:
    """It is made anew."""
    store = site()
    session_id = stored(store)
    wait_until(lambda: is_ready(store))
    os.truncate(store.path / "bloom", size)
    forget(store.memory)
    assert store.session(session_id)["v"] == 1
    wait_until(lambda: is_ready(store))
    another = stored(store)
    forget(store.memory)
    assert store.session(another)["v"] == 1


@pytest.mark.parametrize("what", ["removed", "not to be opened", "somebody else's"])
def test_a_filter_that_cannot_be_written_is_not_believed(
    site: "Open", monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """By anybody: whoever finds that out takes it away."""
    store = site()
    wait_until(lambda: is_ready(store))
    other = BloomFilter(store.path)
    monkeypatch.setattr(store.memory.environment, "bloom", BloomFilter(store.path))
    if what == "removed":
        store_file(store).unlink()
    elif what == "somebody else's":
        store_file(store).chmod(0o644)
    else:
        monkeypatch.setattr("shmsession.memory.bloom.place.open_file", raises(OSError(24, "too many open files")))
    store.behind.id_filter.note(bytes(range(20)))
    assert other.current() is None


def store_file(store: SessionStore) -> Path:
    return store.path / "bloom"


def raises(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_without_room_for_a_filter_every_unknown_id_is_looked_for(
    site: "Open", rows: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else suffers."""

    store = site("s", cookie_mode=CookieMode.PRIVATE)
    store.close()
    give = place_module.give

    def full(descriptor: int, size: int) -> None:
        if size > 1 << 20:
            raise OSError(28, "no room, by order")
        give(descriptor, size)

    monkeypatch.setattr("shmsession.memory.place.give", full)
    store = site()
    session_id = stored(store)
    assert not is_ready(store)
    forget(store.memory)
    assert store.session(session_id)["v"] == 1
    assert store.session(str(uuid4())) == {}
    assert store.memory.environment.backend_down_until == 0


# ── behind a store ────────────────────────────────────────────────────────────────────────────────────────────

Open = Callable[..., SessionStore]


@pytest.fixture
def rows() -> MemoryBackend:
    """The backend: the same rows for all stores of a test."""
    return MemoryBackend(labelled=False)


@pytest.fixture
def site(place: Path, rows: MemoryBackend) -> Iterator[Open]:
    """A store on these rows, flushing, in a directory of its own."""
    stores: list[SessionStore] = []

    def make(where: str = "s", **settings: Any) -> SessionStore:
        given: dict[str, Any] = {
            "cookie_mode": CookieMode.PLAIN,
            "keys": (KEY,),
            "secure": False,
            "map_size": 4 << 20,
            **settings,
        }
        clock = given.pop("clock", None)
        config = SessionConfig(directory=place / where, name="test", **given)
        stores.append(SessionStore(rows, config=config, clock=clock))
        return stores[-1].open()

    yield make
    for store in stores:
        store.close()


def is_ready(store: SessionStore) -> bool:
    """Whether an id that nobody has is not looked for any more."""
    return store.behind.id_filter.lacks(os.urandom(20)) or store.behind.id_filter.lacks(os.urandom(20))


def look_ups(rows: MemoryBackend) -> int:
    """Questions for one row, the flusher's look at its sentinel included."""
    return rows.calls.count("load")


def stored(store: SessionStore) -> str:
    """A session that the backend has; its id."""
    session = store.session()
    session["v"] = 1
    session.save()
    assert session.id is not None
    assert store.sync.flush()
    return session.id


def slow_listing(rows: MemoryBackend) -> tuple[threading.Event, threading.Event]:
    """The backend's handles are told when the second event is set; the first says that they are asked for."""
    listing, ends, listed = threading.Event(), threading.Event(), rows.handles

    async def slow() -> Any:
        listing.set()
        assert await asyncio.to_thread(ends.wait, 60)
        async for handle in listed():
            yield handle

    rows.handles = slow  # type: ignore[method-assign]
    return listing, ends


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_unknown_ids_hardly_reach_the_backend(site: Open, rows: MemoryBackend, protocol: str) -> None:
    """And every session is still found, in memory or behind it. test_flood.py has the flood."""
    store = site()
    ids = [stored(store) for _ in range(20)]
    wait_until(lambda: is_ready(store))
    forget(store.memory)
    before, total = look_ups(rows), 1_000
    visitor = Visitor(store, protocol)
    for _ in range(total):
        visitor.cookies = {"session": str(uuid4())}
        assert visitor.data() == {}
    asked = look_ups(rows) - before
    for session_id in ids:
        visitor.cookies = {"session": session_id}
        assert visitor.data() == {"v": 1}
    assert asked < total // 100
    assert store.stats().counters["spared"] > total * 98 // 100


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_old_cookies_that_are_plain_are_asked_for_as_rarely(site: Open, rows: MemoryBackend, protocol: str) -> None:
    """While a site goes over to sealed ones, and after whichever of the two a session was made with."""
    plain = site("first")
    old = stored(plain)
    plain.close()
    del rows.rows[SENTINEL]  # its sign of life, for which the next store of these tables would wait until it is old
    store = site("second", cookie_mode=CookieMode.PRIVATE, old_cookies=(OldCookie(mode=CookieMode.PLAIN),))
    wait_until(lambda: is_ready(store))
    visitor = Visitor(store, protocol)
    visitor.ask(lambda session: session.update(v=2))
    new = visitor.ask(lambda session: session.id).result
    assert store.sync.flush()
    forget(store.memory)
    before, total = look_ups(rows), 500
    for _ in range(total):
        visitor.cookies = {"session": str(uuid4())}
        assert visitor.data() == {}
    assert look_ups(rows) - before < total // 50
    for session_id, value in ((old, 1), (new, 2)):
        visitor.cookies = {"session": session_id}
        assert visitor.data() == {"v": value}


def test_until_the_filter_is_ready_every_unknown_id_is_looked_for(site: Open, rows: MemoryBackend) -> None:
    """A backend that cannot be listed takes no session away."""
    first = site("first")
    session_id = stored(first)
    first.close()

    async def broken() -> Any:
        for reason in ("it cannot be listed",):
            raise OSError(reason)
        yield b""

    rows.handles = broken  # type: ignore[method-assign]
    store = site("second")
    assert store.session(session_id)["v"] == 1
    assert not is_ready(store)


def test_a_backend_that_cannot_be_listed_is_not_taken_for_down(
    site: Open, rows: MemoryBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """Sessions go on being flushed and looked for; it is told once, and tried again a minute later."""
    asked: list[None] = []

    async def broken() -> Any:
        asked.append(None)
        for reason in ("it cannot be listed",):
            raise OSError(reason)
        yield b""

    rows.handles = broken  # type: ignore[method-assign]
    store = site()
    ids = [stored(store) for _ in range(3)]
    wait_until(lambda: "it cannot be listed (OSError)" in caplog.text)
    ids += [stored(store) for _ in range(3)]
    forget(store.memory)
    assert all(store.session(session_id)["v"] == 1 for session_id in ids)
    assert (store.stats().counters["flush_errors"], len(asked)) == (0, 1)


def test_sessions_are_flushed_while_the_backend_is_listed(site: Open, rows: MemoryBackend) -> None:
    """It may have millions, and name them slowly."""
    listing, ends = slow_listing(rows)
    store = site()
    wait_until(listing.is_set)
    session = store.session()
    session["v"] = 1
    session.save()
    wait_until(lambda: not store.stats().outbox)
    assert not is_ready(store)
    ends.set()
    wait_until(lambda: is_ready(store))


def test_who_was_overtaken_while_filling_it_cannot_say_that_it_is_ready(site: Open, rows: MemoryBackend) -> None:
    """A process that stood still for a while; another has begun anew since, and is not done."""
    listing, ends = slow_listing(rows)
    store = site()
    wait_until(listing.is_set)
    id_filter = store.behind.id_filter
    before = id_filter._next
    store.memory.environment.bloom.begin(10)
    ends.set()
    wait_until(lambda: id_filter._next > before)
    assert not is_ready(store)
    wait_until(lambda: is_ready(store))


def test_what_another_store_made_meanwhile_is_not_taken_for_unknown(site: Open, rows: MemoryBackend) -> None:
    """This one was stopped, another took its tables over, and the first is started again, with its memory."""
    first = site("first")
    wait_until(lambda: is_ready(first))
    first.close()
    del rows.rows[SENTINEL]  # its sign of life, for which the next store of these tables would wait until it is old
    second = site("second")
    ids = [stored(second) for _ in range(20)]
    for alive in (True, False):
        if not alive:
            second.close()
        again = site("first")
        assert all(again.session(session_id)["v"] == 1 for session_id in ids)
        again.close()
        forget(again.memory)


def test_who_has_not_heard_of_the_backend_for_a_while_knows_nothing(site: Open, rows: MemoryBackend) -> None:
    """A host that stood still: another may have taken its tables over by then."""
    clock = ManualClock()
    store = site(clock=clock)
    wait_until(lambda: is_ready(store))
    rows.fail("load", times=10_000)
    clock.advance(11)
    assert not is_ready(store)
    rows.heal()
    clock.advance(60)
    wait_until(lambda: is_ready(store))


def test_what_the_backend_had_before_is_known(site: Open, rows: MemoryBackend) -> None:
    """After memory was lost, or a site went over from another kind of cookie."""
    private = site("first", cookie_mode=CookieMode.PRIVATE)
    ids = [stored(private) for _ in range(50)]
    private.close()
    del rows.rows[SENTINEL]  # its sign of life, for which the next store of these tables would wait until it is old
    store = site("second", old_cookies=(OldCookie(mode=CookieMode.PRIVATE),))
    wait_until(lambda: is_ready(store))
    assert all(store.session(session_id)["v"] == 1 for session_id in ids)


def test_what_other_processes_make_is_known_at_once(site: Open, place: Path, rows: MemoryBackend) -> None:
    """Also by a process that has mapped the filter before, and whose memory does not have the session any more."""
    store = site()
    wait_until(lambda: is_ready(store))

    def make() -> str:
        session = store.session()
        session["v"] = 2
        session.save()
        assert session.id is not None
        return session.id

    ids = [in_child(make) for _ in range(3)]
    assert store.sync.flush()
    forget(store.memory)
    assert all(store.session(session_id)["v"] == 2 for session_id in ids)


def test_a_backend_that_lost_something_is_asked_until_it_is_known_anew(site: Open, rows: MemoryBackend) -> None:
    """It may have been restored to a state of which nothing is known."""
    store = site()
    stored(store)
    wait_until(lambda: is_ready(store))
    note = store.memory.outbox.losses()
    store.memory.outbox.raise_note(b"forgot", note + 1)
    assert not is_ready(store)
    wait_until(lambda: is_ready(store))


def test_with_other_stores_on_the_same_tables_nobody_is_taken_for_unknown(site: Open, rows: MemoryBackend) -> None:
    """They make sessions that this one never hears of."""
    store = site(allow_shared=True)
    session_id = stored(store)
    other = site("other", allow_shared=True)
    assert other.session(session_id)["v"] == 1
    assert not other.behind.id_filter.wanted


def test_sealed_tokens_need_no_filter(site: Open, rows: MemoryBackend) -> None:
    """What is forged does not pass the seal."""
    store = site(cookie_mode=CookieMode.SIGNED, mode=SessionMode.PERSISTENT)
    stored(store)
    assert not store.behind.id_filter.wanted
    assert not (store.path / "bloom").exists()


def test_a_filter_that_is_crowded_is_made_larger(
    site: Open, rows: MemoryBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filters, "SMALLEST", 16)
    store = site()
    wait_until(lambda: is_ready(store))
    for _ in range(40):
        session = store.session()
        session["v"] = 1
        session.save()
    assert store.sync.flush()

    def is_large() -> bool:
        slots = store.memory.environment.bloom.current()
        return is_ready(store) and slots is not None and slots.capacity >= 64 and not slots.is_crowded

    wait_until(is_large)
