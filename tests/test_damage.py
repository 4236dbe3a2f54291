"""Damaged data files: nothing is served that was never committed under its handle, and the store serves again."""

import faulthandler
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, Final

import lmdb
import pytest
from lmdb.verify import verify

from shmsession.clock import SystemClock
from shmsession.codec import encode
from shmsession.errors import StoreError
from shmsession.hooks import Event, Quarantined
from shmsession.memory import salvage
from shmsession.memory.store import MemoryStore, Missing
from shmsession.memory.tables import Tables, index, sequence_key
from shmsession.record import Changes, Record
from shmsession.testing import ManualClock
from tests.figures import SEED, report, rng, size
from tests.memory import (
    Channel,
    Child,
    Died,
    Neighbour,
    check_tables,
    closing,
    contents,
    create,
    destroy,
    handle,
    header_of,
    memory_store,
    put_meta,
    put_raw,
    spoilt,
    value_of,
    waiting,
)

PAGE: Final = 4096
LEAF: Final = 2
DATA: Final = "test/lmdb/data.mdb"
History = dict[bytes, set[bytes]]


# ── mutated files ─────────────────────────────────────────────────────────────────────────────────────────────


def _flip_bits(image: bytearray, used: int, random: Random) -> None:
    for _ in range(random.choice((1, 1, 2, 8))):
        image[random.randrange(used)] ^= 1 << random.randrange(8)


def _flip_bits_of_the_metas(image: bytearray, _used: int, random: Random) -> None:
    for _ in range(random.choice((1, 1, 4))):
        image[random.randrange(2) * PAGE + random.randrange(160)] ^= 1 << random.randrange(8)


def _flip_bits_of_headers(image: bytearray, used: int, random: Random) -> None:
    """Where pages say what they are and where their nodes begin."""
    page = random.randrange(2, used // PAGE) * PAGE
    for _ in range(random.choice((1, 2))):
        image[page + random.randrange(64)] ^= 1 << random.randrange(8)


def _overwrite(image: bytearray, used: int, random: Random) -> None:
    begin, length = random.randrange(used), random.choice((1, 8, 64, 512))
    image[begin : begin + length] = random.randbytes(len(image[begin : begin + length]))


def _zero_a_page(image: bytearray, used: int, random: Random) -> None:
    page = random.randrange(used // PAGE) * PAGE
    image[page : page + PAGE] = bytes(PAGE)


def _swap_pages(image: bytearray, used: int, random: Random) -> None:
    one, other = (random.randrange(2, used // PAGE) * PAGE for _ in range(2))
    image[one : one + PAGE], image[other : other + PAGE] = image[other : other + PAGE], image[one : one + PAGE]


def _copy_a_page(image: bytearray, used: int, random: Random) -> None:
    """With its number made right, as somebody would who means it."""
    one, other = (random.randrange(2, used // PAGE) * PAGE for _ in range(2))
    image[other : other + PAGE] = image[one : one + PAGE]
    if random.randrange(2):
        image[other : other + 8] = (other // PAGE).to_bytes(8, sys.byteorder)


def _truncate(image: bytearray, used: int, random: Random) -> None:
    del image[random.choice((0, 100, PAGE, 2 * PAGE, used, random.randrange(len(image)))) :]


def _append_junk(image: bytearray, _used: int, random: Random) -> None:
    image += random.randbytes(random.choice((1, 100, PAGE, 3 * PAGE)))


def _zero_a_meta_s_transaction(image: bytearray, _used: int, random: Random) -> None:
    begin = random.randrange(2) * PAGE + 144
    image[begin : begin + 8] = bytes(8)


def _inflate_a_meta_s_transaction(image: bytearray, _used: int, random: Random) -> None:
    begin = random.randrange(2) * PAGE + 144
    image[begin : begin + 8] = random.choice((2**64 - 2, 2**63, 1000, 1001)).to_bytes(8, sys.byteorder)


def _all_junk(image: bytearray, _used: int, random: Random) -> None:
    image[:] = random.randbytes(len(image))


MUTATIONS: Final[tuple[Callable[[bytearray, int, Random], None], ...]] = (
    _flip_bits, _flip_bits, _flip_bits_of_the_metas, _flip_bits_of_headers, _flip_bits_of_headers, _overwrite,
    _zero_a_page, _swap_pages, _copy_a_page, _truncate, _append_junk, _zero_a_meta_s_transaction,
    _inflate_a_meta_s_transaction, _all_junk,
)  # fmt: skip


def _store_with_a_history(base: Path) -> tuple[bytes, History]:
    """A file of a store after many commits, and for each handle everything that was ever committed under it."""
    random = rng("history")
    history: History = {}
    with closing(memory_store(base)) as store:
        now = SystemClock().now()
        for number in range(120):
            create(store, handle(number), random.randbytes(random.choice((10, 300, 900, 3000))))
        for _ in range(600):
            key = handle(random.randrange(120))
            found = store.load(key, now)
            if isinstance(found, Record):
                history.setdefault(key, set()).add(found.data)
                action = random.randrange(10)
                if action == 0:
                    store.destroy(key, now)
                elif action == 1:
                    new = handle(random.randrange(1000, 10**6))
                    store.renew(key, new, found, _value(random), now, b"\xa3ada", login=True)
                else:
                    store.update(key, found, _value(random), now)
        for key, raw in check_tables(store).records.items():
            record = store._seal.open(key, raw)
            assert record is not None
            history.setdefault(key, set()).add(record.data)
        store.environment.close()
        image = (base / DATA).read_bytes()
    return image, history


def _value(random: Random) -> Any:
    return Changes(set={"v": encode(random.randbytes(random.choice((10, 300, 900, 3000))), "v")})


def _walked_in_a_fork(environment: Path, table: str, direction: str) -> tuple[bytes, bool]:
    """What `salvage._walked` does, in a process that is forked and not started anew."""
    listening, saying = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            faulthandler.disable()
            signal.alarm(20)
            os.dup2(saying, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.stdout = os.fdopen(1, "w", closefd=False)
            salvage._walk(str(environment), table, direction)
            status = 0
        finally:
            os._exit(status)
    os.close(saying)
    with os.fdopen(listening, "rb") as file:
        output = file.read()
    return output, os.waitpid(pid, 0)[1] == 0


def _serve(base: Path, keys: list[bytes]) -> Callable[[Channel], None]:
    """A process that opens a mutated file again and again and tells what it finds in it."""

    def work(channel: Channel) -> None:
        really = salvage._walked
        number = 0
        while True:
            channel.receive()
            number += 1
            salvage._walked = really if number % 10 == 0 else _walked_in_a_fork
            events: list[Event] = []
            store = memory_store(base, SystemClock(), events=events)
            found = {key: answer.data for key in keys if isinstance(answer := _ask(store, key), Record)}
            fresh = handle(2 * 10**6 + number)
            again = create(store, fresh, number) and value_of(store, fresh) == number
            store.sweep(SystemClock().now())
            store.evict()
            again = again and value_of(store, fresh) == number
            store.close()
            channel.send((found, again, [type(event).__name__ for event in events]))

    return work


def _ask(store: MemoryStore, key: bytes) -> Record | Missing | None:
    try:
        return store.load(key, SystemClock().now())
    except StoreError:
        return None


@pytest.mark.soak
def test_mutated_files_yield_nothing_that_was_never_committed_and_serve_again(place: Path) -> None:
    files = size(10_000, 500)
    random = rng("damage")
    base = place / "base"
    image, history = _store_with_a_history(base)
    used = _used_bytes(base)
    keys = list(history)
    lied = mute = died = quarantined = lost = 0
    child = Child(_serve(base, keys))
    failure = None
    for number in range(files):
        mutated = bytearray(image)
        mutation = MUTATIONS[number % len(MUTATIONS)]
        mutation(mutated, used, random)
        (base / DATA).write_bytes(mutated)
        try:
            found, again, events = child.ask("next")
        except (Died, BrokenPipeError, AssertionError) as error:
            died += 1
            failure = failure or f"file {number}, {mutation.__name__}: status {child.wait()}, {error}"
            child.wait()
            child = Child(_serve(base, keys))
            continue
        wrong = [key.hex() for key, data in found.items() if data not in history[key]]
        lied += len(wrong)
        mute += not again
        quarantined += "Quarantined" in events
        lost += len(keys) - len(found)
        if wrong or not again:
            failure = failure or f"file {number}, {mutation.__name__}: {wrong}, serves again: {again}"
    child.kill()
    report("Damaged files", files=files, wrong_values=lied, not_serving=mute, died=died, quarantined=quarantined)
    assert failure is None, f"seed {SEED}: {failure}"
    assert quarantined > files // 4
    assert lost < files * len(keys), "an undamaged record is found again"


def _used_bytes(base: Path) -> int:
    with closing(memory_store(base)) as store:
        return store.usage().touched * PAGE


# ── a damaged outbox ──────────────────────────────────────────────────────────────────────────────────────────

WAITING: Final = range(100, 300)
DESTROYED: Final = range(300, 360)
KNOWN: Final = range(400, 500)
"""Sessions by number: that a backend has yet to hear of, that it thinks alive, and that it has."""


def _store_with_a_backend(base: Path) -> bytes:
    """The file of a store of which a backend has heard a part."""
    with closing(memory_store(base, SystemClock(), backend=True)) as store:
        for number in (*KNOWN, *DESTROYED):
            create(store, handle(number), number)
        store.outbox.acknowledge(store.outbox.oldest(500), store.outbox.losses())
        for number in WAITING:
            create(store, handle(number), number)
        for number in DESTROYED:
            destroy(store, handle(number))
        check_tables(store)
        store.environment.close()
        return (base / DATA).read_bytes()


def _leaves(base: Path, image: bytes) -> list[int]:
    """Where the leaves of the outbox begin in a file."""
    (base / DATA).write_bytes(image)
    with closing(memory_store(base, SystemClock(), backend=True)) as store:
        rows = [sequence_key(place) + key for place, key in store.outbox.rows()]
    found = {position // PAGE * PAGE for row in rows for position in _positions(image, row)}
    return sorted(page for page in found if {image[node : node + 8] for node in _nodes(image, page)} == {_OUTBOX_NODE})


_OUTBOX_NODE: Final = struct.pack("=HHHH", 20, 0, 0, 8)
_RECORD_KEY: Final = struct.pack("=HH", 0, 20)


def _nodes(image: bytes | bytearray, page: int) -> list[int]:
    """Where the nodes of a leaf begin: the sizes of value and key, then these."""
    (lower,) = struct.unpack_from("=H", image, page + 12)
    return [page + offset for (offset,) in struct.iter_unpack("=H", image[page + 16 : page + lower])]


def _positions(image: bytes, part: bytes) -> list[int]:
    positions = [image.find(part)]
    while positions[-1] >= 0:
        positions.append(image.find(part, positions[-1] + 1))
    return positions[:-1]


def _half_a_leaf(image: bytearray, leaves: list[int], random: Random) -> None:
    page = random.choice(leaves) + random.choice((0, PAGE // 2))
    image[page : page + PAGE // 2] = bytes(PAGE // 2)


def _bits_of_a_leaf(image: bytearray, leaves: list[int], random: Random) -> None:
    page = random.choice(leaves)
    for _ in range(random.choice((1, 1, 2, 8))):
        image[page + random.randrange(PAGE)] ^= 1 << random.randrange(8)


def _a_row(image: bytearray, leaves: list[int], random: Random) -> None:
    """A bit of a place, or of the handle that stands there."""
    node = random.choice(_nodes(image, random.choice(leaves)))
    image[node + 8 + random.randrange(28)] ^= 1 << random.randrange(8)


def _places_of_records(image: bytearray, _leaves: list[int], random: Random) -> None:
    """What no MAC covers: to another bit, to none, or to anything."""
    key = handle(random.choice((*WAITING, *DESTROYED)))
    wrong = random.choice((bytes(8), b"\xff" * 8, random.randbytes(8), b""))
    for position in _positions(bytes(image), _RECORD_KEY + key):
        (value_size,) = struct.unpack_from("=H", image, position - 4)
        end = position + len(_RECORD_KEY + key) + value_size
        page = position // PAGE * PAGE
        if image[page + 10] == LEAF and position - 4 in _nodes(image, page):
            image[end - 8 : end] = wrong or image[end - 8 : end - 1] + bytes([image[end - 1] ^ 1])


@pytest.mark.soak
@pytest.mark.parametrize("mutation", [_half_a_leaf, _bits_of_a_leaf, _a_row, _places_of_records])
def test_whatever_happens_to_the_outbox_what_waits_goes_on_waiting_and_the_dead_stay_dead(
    place: Path, monkeypatch: pytest.MonkeyPatch, mutation: Callable[[bytearray, list[int], Random], None]
) -> None:
    base, random = place / "base", rng(f"outbox {mutation.__name__}")
    image = _store_with_a_backend(base)
    leaves = _leaves(base, image)
    assert len(leaves) > 2
    monkeypatch.setattr(salvage, "_walked", _walked_in_a_fork)
    rebuilt = 0
    for number in range(size(2_000, 30)):
        mutated = bytearray(image)
        mutation(mutated, leaves, random)
        (base / DATA).write_bytes(mutated)
        events: list[Event] = []
        with closing(memory_store(base, SystemClock(), backend=True, events=events)) as store:
            store.outbox.oldest(1)
            found = set(waiting(store))
            alive = [key for key in DESTROYED if value_of(store, handle(key)) is not Missing.DEAD]
            lost = [key for key in WAITING if value_of(store, handle(key)) != key]
            create(store, handle(10_000 + number), number)
            check_tables(store)
        expected = {handle(key) for key in (*WAITING, *DESTROYED)}
        assert (expected - found, alive, lost) == (set(), [], []), f"seed {SEED}, file {number}"
        rebuilt += bool(events)
    report("Damaged outboxes", how=mutation.__name__, files=number + 1, rebuilt=rebuilt, lost=0, revived=0)
    assert rebuilt > number // 10


def _build_anew(store: MemoryStore) -> None:
    store.environment._quarantine(store.environment.open(), "a test says so")


def test_a_place_that_was_zeroed_leaves_room_in_front_of_it(place: Path) -> None:
    """The dead are put in front of all that waits."""
    with closing(memory_store(place / "base", backend=True)) as store:
        for number in range(1, 4):
            create(store, handle(number), number)
            destroy(store, handle(number))
        store.outbox.acknowledge(store.outbox.oldest(9), store.outbox.losses())
        create(store, handle(9), "waits")
        raw = contents(store).records[handle(9)]
        put_raw(store, handle(9), raw[:-8] + bytes(8))
        _build_anew(store)
        dead = [one for one in store.outbox.oldest(9) if one.handle != handle(9)]
        store.outbox.acknowledge(dead, store.outbox.losses())
        assert waiting(store) == [handle(9)]
        assert store.outbox.put_back(b"", dead=True)[0] == 3
        assert waiting(store)[-1] == handle(9)
        assert len(store.outbox.oldest(9)) == 4
        check_tables(store)


@pytest.mark.parametrize("epoch", [2**53, 2**60, 2**63 + 5, 2**64 - 1])
def test_junk_that_looks_like_another_key_s_record_sets_no_epoch(place: Path, epoch: int) -> None:
    """It cannot be verified, is kept, and may say what it likes."""
    with closing(memory_store(place / "base", backend=True)) as store:
        create(store, handle(1), "a")
        raw = contents(store).records[handle(1)]
        put_raw(store, handle(2), b"\x77\x00\x11\x22\x33\x44" + epoch.to_bytes(8, "big") + raw[14:])
        _build_anew(store)
        assert value_of(store, handle(1)) == "a"
        assert handle(2) in contents(store).records
        assert store.environment.epoch < 2**53


def test_a_damaged_number_of_the_last_place_stops_no_commit(place: Path) -> None:
    """It stands in a mapped file beside the environment, which knows better."""
    base = place / "base"
    with closing(memory_store(base, SystemClock(), backend=True)) as store:
        create(store, handle(1), "a")
        for number, damage in ((2, b"\xff" * 8), (3, bytes(8)), (4, bytes(7) + b"\x01")):
            with (base / "test/attached").open("r+b") as file:
                file.seek(32)
                file.write(damage)
            assert create(store, handle(number), number)
        assert waiting(store) == [handle(number) for number in range(1, 5)]
        check_tables(store)


def test_no_place_is_given_that_somebody_has(place: Path) -> None:
    """Whatever the number says of the last one."""
    with closing(memory_store(place / "base", backend=True)) as store:
        words = store.environment.open().words
        for number in range(1, 20):
            create(store, handle(number), number)
            words[4] -= 1 if number % 3 else 2
        assert waiting(store) == [handle(number) for number in range(1, 20)]
        check_tables(store)


def test_a_rebuild_takes_no_smaller_map_than_the_one_that_held_it_all(place: Path) -> None:
    """SHMSESSION_MAP_SIZE may have been lowered since."""
    base = place / "base"
    with closing(memory_store(base, SystemClock(), backend=True, map_size=4 << 20)) as store:
        for number in range(1000):
            create(store, handle(number), "x" * 900)
    with closing(memory_store(base, SystemClock(), backend=True, map_size=1 << 20)) as store:
        store.environment._quarantine(store.environment.open(), "a test says so")
        assert len(waiting(store)) == 1000
        assert store.usage().total == 1024


# ── a rebuild while others write ──────────────────────────────────────────────────────────────────────────────


def _rebuilt_after_commit(store: MemoryStore) -> None:
    """The next write commits, and before its process looks, another one has built the store anew."""
    environment = store.environment
    done: list[int] = []
    run = environment._run

    def patched(work: Any, write: bool) -> Any:
        result = run(work, write)
        if write and not done:
            done.append(1)
            environment._quarantine(environment.open(), "a test says so")
            environment.redoing = True
            return run(work, write)
        return result

    environment._run = patched  # type: ignore[method-assign]


@pytest.mark.parametrize("days", [0, -800])
@pytest.mark.parametrize("verb", ["create", "update", "renew", "destroy"])
def test_what_is_done_again_after_a_rebuild_is_done_once(place: Path, verb: str, days: int) -> None:
    """Also when the rebuild gave it another place in the outbox, as the wall clock went back."""
    clock = ManualClock()
    with closing(memory_store(place / "base", clock, backend=True)) as store:
        one, two = handle(1), handle(2)
        create(store, one, "a")
        base = store.load(one, clock.now())
        assert isinstance(base, Record)
        clock.step(days * 86_400)
        _rebuilt_after_commit(store)
        changes = Changes(set={"v": encode("b", "v")}, expect={"v": encode("a", "v")})
        if verb == "create":
            assert store.create(two, changes, clock.now())
        elif verb == "update":
            assert isinstance(store.update(one, base, changes, clock.now()), Record)
        elif verb == "renew":
            assert isinstance(store.renew(one, two, base, Changes(), clock.now(), None, login=False), Record)
        else:
            assert store.destroy(one, clock.now()) == one
            assert store.load(one, clock.now()) is Missing.DEAD
        check_tables(store)


def test_a_death_that_a_rebuild_missed_is_died_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was committed to the old file after that had been read."""
    clock = ManualClock()
    with closing(memory_store(place / "base", clock)) as store:
        create(store, handle(1), "a")
        image = contents(store).records
        monkeypatch.setattr(salvage, "records_in", lambda _: iter(image.items()))
        _rebuilt_after_commit(store)
        assert store.destroy(handle(1), clock.now()) == handle(1)
        assert store.load(handle(1), clock.now()) is Missing.DEAD


@pytest.mark.parametrize("verb", ["destroy", "renew", "create"])
def test_what_is_committed_between_the_two_walks_of_a_rebuild_goes_on_waiting(
    place: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """By a process that had looked before the rebuild began, and is late."""
    base, clock = place / "base", ManualClock()
    with closing(memory_store(base, clock, backend=True)) as store:
        for number in (1, 2):
            create(store, handle(number), number)
        store.outbox.acknowledge(store.outbox.oldest(9), store.outbox.losses())
        create(store, handle(3), 3)
        before = contents(store).records
        found = store.load(handle(1), clock.now())
        assert isinstance(found, Record)
        if verb == "destroy":
            store.destroy(handle(1), clock.now())
        elif verb == "renew":
            store.renew(handle(1), handle(9), found, Changes(), clock.now(), None, login=True)
        else:
            create(store, handle(9), 9)
        after = contents(store).records
        # The records are walked while it commits: each as it was, or as it is.
        for seen in ({**before}, {**after}, {**after, **before}):
            monkeypatch.setattr(salvage, "records_in", lambda _, seen=seen: iter(seen.items()))
            rebuilt = store.environment.building._salvaged()
            waits = {one.handle for one in rebuilt if one.waits}
            assert handle(3) in waits
            assert handle(1) in waits or verb == "create", "its end, or else all of it, is sent again"


# ── damage met while running ──────────────────────────────────────────────────────────────────────────────────

LEAF_OF: Final = 2
"""The record whose page is damaged in these tests, out of a hundred in some ten pages."""


def _fill(store: MemoryStore) -> None:
    for number in range(100):
        create(store, handle(number), bytes(300))
    destroy(store, handle(50))


def _spoil(store: MemoryStore, base: Path) -> None:
    """Make LMDB meet a page that is none: the flags of the leaf that holds one record are cleared, in every version."""
    raw = contents(store).records[handle(LEAF_OF)]
    with (base / DATA).open("r+b") as file:
        image = file.read()
        position = -1
        while (position := image.find(raw, position + 1)) >= 0:
            file.seek(position // PAGE * PAGE + 10)
            file.write(bytes(2))


def _survivors(store: MemoryStore) -> list[int]:
    return [number for number in range(100) if value_of(store, handle(number)) == bytes(300)]


def test_damage_met_while_running_is_put_aside_and_what_is_whole_kept_by_one_for_all(place: Path) -> None:
    base = place / "base"
    events: list[Event] = []
    with closing(memory_store(base, SystemClock(), events=events)) as store, Neighbour(base) as neighbour:
        _fill(store)
        assert neighbour(value_of, handle(7)) == bytes(300)
        generation = store.environment.open().generation
        _spoil(store, base)
        assert value_of(store, handle(LEAF_OF)) is Missing.UNKNOWN
        assert store.environment.open().generation == generation + 1
        kept = _survivors(store)
        assert LEAF_OF not in kept
        assert 80 < len(kept) < 99
        assert value_of(store, handle(50)) is Missing.DEAD, "a tombstone is kept"
        assert neighbour(_survivors) == kept
        assert neighbour(create, handle(LEAF_OF), "again")
        assert value_of(store, handle(LEAF_OF)) == "again"
        assert [event for event in events if isinstance(event, Quarantined)] == [
            Quarantined(str(base / f"test/quarantine-{generation + 1}"), len(kept) + 1)
        ]
        check_tables(store)


def test_damage_met_by_a_writer_loses_not_its_commit(place: Path) -> None:
    base = place / "base"
    with closing(memory_store(base, SystemClock())) as store, Neighbour(base) as neighbour:
        _fill(store)
        _spoil(store, base)
        assert neighbour(create, handle(LEAF_OF), "new")
        assert value_of(store, handle(LEAF_OF)) == "new"
        check_tables(store)


def test_processes_that_meet_one_damage_together_rebuild_once(place: Path) -> None:
    base = place / "base"
    with closing(memory_store(base, SystemClock())) as store, Neighbour(base) as one, Neighbour(base) as other:
        _fill(store)
        generation = store.environment.open().generation
        one(value_of, handle(7))
        other(value_of, handle(7))
        _spoil(store, base)
        for neighbour in (one, other):
            neighbour.channel.send((value_of, handle(LEAF_OF)))
        for neighbour in (one, other):
            assert neighbour.channel.receive() is Missing.UNKNOWN
        assert one(_survivors) == other(_survivors) == _survivors(store)
        assert store.environment.open().generation == generation + 1


def test_only_the_newest_damaged_store_is_kept(place: Path) -> None:
    base = place / "base"
    with closing(memory_store(base, SystemClock())) as store:
        for _ in range(3):
            store.clear()
            create(store, handle(LEAF_OF), bytes(300))
            _fill(store)
            _spoil(store, base)
            value_of(store, handle(LEAF_OF))
            assert len(list((base / "test").glob("quarantine-*"))) == 1
        names = sorted(path.name for path in (base / "test").iterdir())
        assert names == ["attached", "counters", "generations", "lmdb", "quarantine-3"]
        assert (base / "test/quarantine-3/data.mdb").exists()


def test_a_store_that_was_put_aside_holds_the_damaged_file_as_it_was(place: Path) -> None:
    base = place / "base"
    with closing(memory_store(base)) as store:
        _fill(store)
    damaged = bytearray((base / DATA).read_bytes())
    damaged[:100] = bytes(100)
    (base / DATA).write_bytes(damaged)
    events: list[Event] = []
    with closing(memory_store(base, events=events)) as store:
        store.open()
        assert len(events) == 1
        assert isinstance(events[0], Quarantined)
        assert (Path(events[0].path) / "data.mdb").read_bytes() == damaged
        assert "damaged" not in repr(events[0])


def test_with_a_backend_a_rebuild_keeps_what_the_backend_lacks_and_numbers_go_on(place: Path) -> None:
    """Clean records can be loaded again; dirty ones and tombstones cannot, and no two share a place in the outbox."""
    base = place / "base"
    with closing(memory_store(base, SystemClock(), backend=True)) as store:
        _fill(store)
        clean = store.load(handle(7), SystemClock().now())
        assert isinstance(clean, Record)
        store.fill(handle(500), clean.header, clean.data, SystemClock().boot())
        memory_only = Changes(set={"v": encode("memory only", "v")}, storable=False)
        assert store.create(handle(501), memory_only, SystemClock().now())
        before = store.outbox.rows()
        store.environment._quarantine(store.environment.open(), "a test says so")
        assert store.outbox.rows() == before
        assert value_of(store, handle(500)) is Missing.UNKNOWN
        assert value_of(store, handle(501)) == "memory only"
        assert value_of(store, handle(50)) is Missing.DEAD
        for number in range(200, 320):
            create(store, handle(number), number)
        assert len(store.outbox.rows()) == 220
        check_tables(store)


def test_the_newest_of_two_whole_versions_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged tree may show a page twice, once as it was before a session was destroyed."""
    with closing(memory_store(place / "base")) as store:
        create(store, handle(1), "a")
        old = contents(store).records[handle(1)]
        destroy(store, handle(1))
        dead = contents(store).records[handle(1)]
        for order in ([old, dead], [dead, old]):
            monkeypatch.setattr(salvage, "records_in", lambda _, order=order: iter((handle(1), raw) for raw in order))
            store.environment._quarantine(store.environment.open(), "a test says so")
            assert value_of(store, handle(1)) is Missing.DEAD
            check_tables(store)


def test_records_of_a_key_that_this_process_lacks_survive_a_rebuild(place: Path) -> None:
    base = place / "base"
    with closing(memory_store(base)) as store:
        create(store, handle(1), "a")
        raw = bytearray(contents(store).records[handle(1)])
        raw[2] ^= 1
        put_raw(store, handle(1), bytes(raw))
        store.environment._quarantine(store.environment.open(), "a test says so")
        assert contents(store).records == {handle(1): bytes(raw)}
        assert header_of(store, handle(2)) is None


def test_a_store_whose_own_rows_were_changed_is_rebuilt_not_believed(place: Path) -> None:
    base = place / "base"
    for name in (b"format", b"epoch", b"uuid", b"size", b"check"):
        with closing(memory_store(base)) as store:
            create(store, handle(1), "a")
            epoch = store.environment.epoch
            put_meta(store, name, 77)
        events: list[Event] = []
        with closing(memory_store(base, events=events)) as store:
            assert value_of(store, handle(1)) == "a"
            assert [type(event) for event in events] == [Quarantined]
            assert store.environment.epoch >= epoch


def test_a_truncated_file_is_rebuilt_at_its_full_size(place: Path) -> None:
    """Also when every page in use is still there: the map would stay small for ever."""
    base = place / "base"
    with closing(memory_store(base)) as store:
        create(store, handle(1), "a")
        used = store.usage().touched
    os.truncate(base / DATA, used * PAGE)
    with closing(memory_store(base)) as store:
        assert value_of(store, handle(1)) == "a"
        assert store.usage().total == 256


def _changed(base: Path, key: bytes, offset: int, change: bytes) -> None:
    """Change the file near each copy of a key: its node's size stands 8 bytes before it."""
    image = bytearray((base / DATA).read_bytes())
    position = -1
    while (position := image.find(key, position + 1)) >= 0:
        image[position + offset : position + offset + len(change)] = change
    (base / DATA).write_bytes(image)


def test_a_node_that_claims_its_neighbours_bytes_is_found_before_lmdb_writes_into_them(place: Path) -> None:
    """`verify` passes it, and the first deletion on its page would crash the process."""
    base = place / "base"
    with closing(memory_store(base, SystemClock())) as store:
        _fill(store)
        row = sorted(contents(store).expiry)[40]
    _changed(base, row, -8, bytes([128]))
    events: list[Event] = []
    with closing(memory_store(base, SystemClock(), events=events)) as store:
        assert verify(str(base / "test/lmdb")) == []  # type: ignore[no-untyped-call]
        assert "side by side" in (store.environment.building.problem() or "")
        assert _survivors(store) == [number for number in range(100) if number != 50]
        assert [type(event) for event in events] == [Quarantined]
        check_tables(store)


@pytest.mark.parametrize("flag", [0x02, 0x04, 0x08, 0x10, 0x20, 0x40])
@pytest.mark.parametrize("tree", ["free list", "tables", "records"])
def test_a_tree_that_claims_to_be_of_another_kind_is_found_before_lmdb_believes_it(
    place: Path, tree: str, flag: int
) -> None:
    """`verify` passes it; LMDB would take its keys for numbers, or abort the process."""
    base = place / "base"
    with closing(memory_store(base, SystemClock())) as store:
        _fill(store)
    if tree == "records":
        _changed(base, b"records", len(b"records") + 4, bytes([flag]))
    else:
        image = bytearray((base / DATA).read_bytes())
        for meta in (0, PAGE):
            image[meta + (44 if tree == "free list" else 92)] ^= flag
        (base / DATA).write_bytes(image)
    events: list[Event] = []
    with closing(memory_store(base, SystemClock(), events=events)) as store:
        assert create(store, handle(1000), "new")
        assert [type(event) for event in events] == [Quarantined]
        check_tables(store)


def test_a_key_that_its_own_tree_does_not_lead_to_is_found(place: Path) -> None:
    """The keys of the leaves are in order, but by the branch page the first of a leaf belongs before it."""
    base = place / "base"
    with closing(memory_store(base, SystemClock())) as store:
        for number in range(0, 250, 2):
            create(store, b"k" * 19 + bytes([number]), bytes(300))
        store.environment.close()
        image = (base / DATA).read_bytes()
        problems = []
        for number in range(2, 250, 2):
            changed, position = bytearray(image), -1
            while (position := image.find(b"k" * 19 + bytes([number]), position + 1)) >= 0:
                if image[position // PAGE * PAGE + 10] == LEAF:
                    changed[position + 19] -= 1
            (base / DATA).write_bytes(changed)
            assert verify(str(base / "test/lmdb")) == []  # type: ignore[no-untyped-call]
            problems.append(store.environment.building.problem())
    assert {problem for problem in problems if problem} == {"a branch page leads astray"}
    assert problems.count(None) > 100, "a first of its leaf has not every number"


def test_rows_of_an_index_that_lead_nowhere_harm_nothing(place: Path) -> None:
    base = place / "base"
    with closing(memory_store(base, SystemClock(), backend=True)) as store:
        create(store, handle(1), "a")
        create(store, handle(2), "b")
        header = header_of(store, handle(1))
        assert header is not None
        lost = header._replace(idle_expiry=1)
        outbox = contents(store).outbox

        def work(txn: lmdb.Transaction, tables: Tables) -> None:
            index(txn, tables, handle(9), lost)
            txn.put(b"\0" * 40, b"", db=tables.expiry)
            txn.put(b"\0" * 60, b"", db=tables.expiry)

        store.environment.write(work)
        assert len(contents(store).expiry) == 5
        store.evict()
        store.sweep(SystemClock().now())
        assert contents(store).outbox == outbox
        assert waiting(store) == [handle(1), handle(2)]
        check_tables(store)


def test_a_corrupt_record_takes_nobody_s_place_in_the_outbox(place: Path) -> None:
    """Its header is not to be believed, its number in the outbox least of all."""
    with closing(memory_store(place / "base", SystemClock(), backend=True)) as store:
        create(store, handle(1), "a")
        create(store, handle(2), "b")
        header, (_, (place_of_2, _)) = header_of(store, handle(1)), store.outbox.rows()
        assert header is not None
        lying = store._seal.close(handle(1), header, b"", place=sequence_key(place_of_2))
        put_raw(store, handle(1), spoilt(lying.raw))
        found = header_of(store, handle(2))
        assert found is not None
        store.fill(handle(1), found, b"", SystemClock().boot())
        assert waiting(store) == [handle(1), handle(2)]


def test_a_walk_that_crashes_gives_what_it_met_from_both_ends(place: Path) -> None:
    base = place / "base"
    with closing(memory_store(base, SystemClock())) as store:
        _fill(store)
        _spoil(store, base)
        keys = [key for key, _ in salvage.records_in(base / "test/lmdb")]
    assert handle(0) not in keys or handle(LEAF_OF) not in keys
    assert handle(99) in keys
    assert len(keys) > 80
    assert all(one != other for one, other in pairwise(keys))


def test_without_a_python_to_run_a_rebuild_goes_on_without_the_records(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An embedding server may have none."""
    monkeypatch.setattr(salvage, "_interpreter", lambda: None)
    with closing(memory_store(place / "base")) as store:
        create(store, handle(1), "a")
        store.environment._quarantine(store.environment.open(), "a test says so")
        assert value_of(store, handle(1)) is Missing.UNKNOWN
        assert create(store, handle(1), "b")


def test_a_walk_that_takes_too_long_is_ended_and_what_it_met_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = len(b"k").to_bytes(4, "big") + len(b"v").to_bytes(4, "big") + b"kv"

    def run(*_args: object, **_kwargs: object) -> None:
        raise subprocess.TimeoutExpired("python", 1, output=record + record[:5])

    monkeypatch.setattr(subprocess, "run", run)
    assert list(salvage.records_in(place)) == [(b"k", b"v")] * 2


def test_an_embedding_server_is_not_taken_for_a_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/sbin/uwsgi")
    found = salvage._interpreter()
    assert found is not None
    assert Path(found).exists()
    monkeypatch.setattr(Path, "exists", lambda _: False)
    assert salvage._interpreter() is None


def test_an_error_of_lmdb_that_means_no_damage_rebuilds_nothing(place: Path) -> None:
    with closing(memory_store(place / "base")) as store:
        create(store, handle(1), "a")
        generation = store.environment.open().generation

        def work(_txn: lmdb.Transaction, _tables: Any) -> None:
            raise lmdb.BadValsizeError("a value of no size")

        with pytest.raises(StoreError, match="no size"):
            store.environment.write(work)
        assert store.environment.open().generation == generation
        assert value_of(store, handle(1)) == "a"
