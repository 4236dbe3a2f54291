"""Memory, flusher, backend and clock together: what ended stays dead, what was committed is lost nowhere, no row goes
backwards. Each way it could go wrong by name, and then a great many at random."""

import asyncio
import contextlib
import inspect
import itertools
import random
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import lmdb
import pytest

from shmsession.backends.base import SENTINEL, Row, State
from shmsession.errors import BackendError, ShmSessionError, StoreFull
from shmsession.flusher import BATCH, HEARTBEAT_MS, PIECE, Flusher
from shmsession.keyring import Key, Keyring
from shmsession.memory.outbox import Outbox
from shmsession.memory.room import QUIET_MS
from shmsession.memory.store import STALE_FILL_MS, MemoryStore, Missing
from shmsession.memory.sweeping import Sweeper
from shmsession.memory.tables import LOSSES, PUT_BACK, RECALLED, Tables, Txn, sequence_key
from shmsession.memory.writing import Writer
from shmsession.record import STORABLE, TOMBSTONE, Changes, Record
from shmsession.sentinel import Overtaken, Recall, Sentinel
from shmsession.testing import ManualClock
from tests.backends import (
    ADA,
    AFTER,
    BEFORE,
    HALF,
    REST,
    Answered,
    Host,
    MemoryBackend,
    Running,
    differing,
    run,
    sets,
    values_in,
)
from tests.figures import SEED, report, size
from tests.memory import HOUR, handle, header_of, waiting

A, B, C = handle(1), handle(2), handle(3)


@pytest.fixture
def backend() -> MemoryBackend:
    return MemoryBackend()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def moments() -> Sequence[int]:
    """Steps of a round after which the machine dies."""
    return range(14)


@pytest.fixture
def host(place: Path, backend: MemoryBackend, clock: ManualClock) -> Iterator[Host]:
    with Host(place, backend, clock) as host:
        yield host


def lose_memory(host: Host) -> Host:
    """The machine starts anew: memory is empty, its numbers begin again; the backend has what it has."""
    host.close()
    shutil.rmtree(host.directory / "test")
    return Host(host.directory, host.backend, host.clock)


def forget_in_memory(host: Host) -> None:
    """All that may be forgotten or evicted is: tombstones that the backend knows, sessions that it has."""
    host.clock.advance(2 * QUIET_MS / 1000)
    while host.memory.sweep(host.clock.now(), 100):
        pass
    host.memory.sweep(host.clock.now(), 100)
    after, ended = b"", False
    while not ended:
        _, after = host.memory.outbox.retire(host.clock.now(), 1, after)
        ended = not after


def build_anew(host: Host) -> None:
    """The memory store turns out damaged, and what is whole moves into a new one. All processes go on."""
    host.memory.environment._quarantine(host.memory.environment.open(), "a test says so")


def is_gone(host: Host, key: bytes) -> bool:
    """Whether a request with this cookie finds no session, in memory or behind it."""
    return isinstance(host.read_through(key), Missing)


# ── dead stays dead, across the database ──────────────────────────────────────────────────────────────────────


def test_an_upsert_that_arrives_after_the_death_is_refused(host: Host) -> None:
    """A batch was captured, the session destroyed, and the death stored before the batch arrives."""
    host.create(A, v=1)
    host.flush()
    host.update(A, v=2)
    late = host.sending(A)
    host.destroy(A)
    host.flush()
    forget_in_memory(host)
    assert host.load(A) is Missing.UNKNOWN
    late.finish()
    assert host.backend.state(A) is State.DEAD
    assert is_gone(host, A)
    host.flush()
    assert is_gone(host, A)
    again = lose_memory(host)
    assert is_gone(again, A)
    again.close()


def test_an_upsert_that_arrives_before_the_death_is_followed_by_it(host: Host) -> None:
    """The other order: the upsert is stored and acknowledged late, and must not cross the death off."""
    host.create(A, v=1)
    late = host.sending(A)
    host.destroy(A)
    late.finish()
    assert host.backend.state(A) is State.LIVE
    assert waiting(host.memory) == [A]
    assert is_gone(host, A)
    host.flush()
    assert host.backend.state(A) is State.DEAD


@pytest.mark.parametrize("seconds", [0, 29, 31, 70])
def test_an_answer_that_comes_late_does_not_revive(host: Host, seconds: float) -> None:
    """A request asked for a session that memory lacks; before the answer comes it is read, destroyed, and perhaps
    forgotten: it stays dead."""
    host.create(A, v=1)
    host.flush()
    forget_in_memory(host)
    assert host.load(A) is Missing.UNKNOWN
    slow = host.miss(A)
    assert values_in(host.miss(A).arrives()) == {"v": 1}
    host.destroy(A)
    host.flush()
    host.clock.advance(seconds)
    forget_at_once(host)
    assert not isinstance(slow.arrives(), Record)
    assert is_gone(host, A)


def forget_at_once(host: Host) -> None:
    host.memory.sweep(host.clock.now(), 100)
    host.memory.outbox.retire(host.clock.now(), 1, b"")


def test_an_answer_that_comes_late_does_not_undo_a_commit(host: Host) -> None:
    """The same with a newer version in the place of the death: also when that was flushed and evicted meanwhile."""
    host.create(A, v=1)
    host.flush()
    forget_in_memory(host)
    slow, slower = host.miss(A), host.miss(A)
    host.miss(A).arrives()
    host.update(A, v=2)
    host.flush()
    assert values_in(slow.arrives()) == {"v": 2}
    host.clock.advance((STALE_FILL_MS + QUIET_MS) / 1000)
    forget_at_once(host)
    assert host.load(A) is Missing.UNKNOWN
    assert slower.arrives() is None
    assert values_in(host.read_through(A)) == {"v": 2}


def test_an_answer_from_before_a_rebuild_is_not_believed(host: Host) -> None:
    """What the backend has is not kept by a rebuild, however lately it changed: an older answer would undo it."""
    host.create(A, v=1)
    host.flush()
    forget_in_memory(host)
    slow = host.miss(A)
    host.miss(A).arrives()
    host.update(A, v=2)
    host.flush()
    build_anew(host)
    assert host.load(A) is Missing.UNKNOWN
    assert slow.arrives() is None
    assert values_in(host.read_through(A)) == {"v": 2}


def test_what_expires_while_it_waits_dies_in_the_backend_too(host: Host) -> None:
    """Its last commit was never sent; the backend has an older one, whose end may be later."""
    host.create(A, v=1)
    host.change(A, Changes(longterm=True))
    host.flush()
    host.change(A, Changes(longterm=False))
    host.clock.advance(hours=1, seconds=1)
    assert host.load(A) is Missing.EXPIRED
    while host.memory.sweep(host.clock.now(), 100):
        pass
    assert is_gone(host, A)
    assert waiting(host.memory) == [A]
    again = host.flusher()
    host.flush(again)
    assert host.backend.state(A) is State.DEAD
    forget_in_memory(host)
    assert is_gone(host, A)


def test_shortening_a_life_never_shortens_the_horizon(host: Host) -> None:
    """Sixty days were promised once: for sixty days the backend must be able to refuse that promise's late upsert."""
    host.create(A, v=1)
    host.change(A, Changes(longterm=True))
    longest = host.load(A)
    assert isinstance(longest, Record)
    late = host.sending(A)
    host.change(A, Changes(longterm=False))
    host.flush()
    assert host.backend.rows[A].horizon == longest.header.horizon
    host.destroy(A)
    host.flush()
    assert host.backend.rows[A].horizon == longest.header.horizon
    forget_in_memory(host)
    host.clock.advance(hours=20)
    run(host.backend.sweep(host.clock.now(), 100))
    late.finish()
    assert host.backend.state(A) is State.DEAD
    assert is_gone(host, A)


def test_dead_stays_dead_when_memory_is_lost_and_numbers_begin_again(host: Host) -> None:
    """The new incarnation's numbers may be lower than the old one's late upsert: that is refused all the same."""
    host.create(A, v=1)
    for n in range(20):
        host.update(A, v=n)
    late = host.sending(A)
    host.destroy(A)
    host.flush()
    host.clock.step(-3600)
    again = lose_memory(host)
    assert is_gone(again, A)
    run(again.backend.write(late_rows(late, host)))
    assert is_gone(again, A)
    again.flush()
    assert is_gone(again, A)
    again.close()


def late_rows(stopped: Running[bool], host: Host) -> list[Row]:
    """What a process that has died had already given to the network."""
    stopped.abandon()
    return list(host.backend.asked)


def test_a_renewed_session_is_never_alive_twice(
    place: Path, backend: MemoryBackend, clock: ManualClock, moments: Sequence[int]
) -> None:
    """At each pause of the round that carries a renewal to the backend the machine dies with its memory: then the old
    id is dead, or the new one unknown. The same with an error in the place of death, before and after the fact."""
    for moment in moments:
        for how in ("", BEFORE, AFTER, HALF):
            directory = place / f"{moment}{how}"
            directory.mkdir(mode=0o700)
            backend.watch = None
            backend.restore({})
            host = Host(directory, backend, clock)
            old, new = handle(9), handle(1)
            host.create(old, v=1)
            host.flush()
            host.update(old, v=2)
            host.renew(old, new)
            host.backend.watch = lambda *_: never_both(host, old, new)  # noqa: B023
            going = Running(host.flusher().round())
            if how:
                host.backend.fail("write", how, times=2)
            try:
                for _ in range(moment):
                    if not going.done:
                        going.step()
            except BackendError:
                pass
            going.abandon()
            host.backend.heal()
            dead = host.backend.state(old) is State.DEAD
            again = lose_memory(host)
            assert not dead or is_gone(again, old)
            assert is_gone(again, old) or is_gone(again, new)
            again.flush()
            assert is_gone(again, old) or is_gone(again, new)
            again.close()


def never_both(host: Host, old: bytes, new: bytes) -> None:
    assert not (host.backend.state(old) is State.LIVE and host.backend.state(new) is State.LIVE), "both are alive"


def test_a_renewed_session_is_never_alive_twice_when_the_backend_falls_back(host: Host) -> None:
    """It goes back to a snapshot in which the old id lives, and all is sent again, in more than one batch."""
    for old, new, first in ((handle(4000), handle(1), 10), (handle(2), handle(4001), 2000)):
        host.create(old, v=1)
        host.flush()
        snapshot = host.backend.snapshot()
        host.renew(old, new)
        for n in range(first, first + 600):
            host.memory.create(handle(n), sets(v=1), host.clock.now())
        host.flush()
        host.backend.restore(snapshot)
        host.backend.watch = lambda *_: never_both(host, old, new)  # noqa: B023
        host.flush(host.flusher())
        host.agrees()
        host.backend.watch = None
        host.destroy(new)
        host.flush()
        forget_in_memory(host)


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows a batch, read one by one, the next batch before this one is sent."""
    monkeypatch.setattr("shmsession.flusher.BATCH", 2)
    monkeypatch.setattr("shmsession.flusher.PIECE", 1)


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("steps", range(14))
def test_a_session_renewed_while_batches_are_read_is_never_alive_twice(host: Host, steps: int) -> None:
    """Its end takes a place that the reading may have passed; its new row is not sent before that."""
    host.create(A)
    host.flush()
    host.update(A, v=1)
    for n in range(20, 23):
        host.create(handle(n))
    host.backend.watch = lambda *_: never_both(host, A, B)
    flusher = host.flusher()
    running = Running(flusher.round())
    for _ in range(steps):
        if not running.done:
            running.step()
    host.renew(A, B)
    running.finish()
    host.flush(flusher)
    host.agrees()


@pytest.mark.usefixtures("pairs")
@pytest.mark.parametrize("steps", range(8))
def test_what_was_read_before_the_backend_fell_back_is_not_sent_after(host: Host, steps: int) -> None:
    """A session's end, which it forgot, goes before the new row that was about to be sent."""
    host.create(A)
    host.flush()
    snapshot = host.backend.snapshot()
    flusher = host.flusher()
    host.renew(A, B)
    host.flush(flusher)
    for n in range(20, 22):
        host.create(handle(n))
    host.update(B, v=1)
    host.backend.watch = lambda *_: never_both(host, A, B)
    running = Running(flusher.round())
    for _ in range(steps):
        if running.at != "write":  # what is on its way when it falls back cannot be held up
            running.step()
    host.backend.restore(snapshot)
    with contextlib.suppress(BackendError):
        running.finish()
    host.flush(flusher)
    host.agrees()


@pytest.mark.usefixtures("pairs")
def test_the_dead_that_a_backend_forgot_go_in_front_of_all_that_waits(host: Host) -> None:
    """The new row of a renewed session has waited since before the backend fell back to a state in which the old one
    lives, and more than a batch waits behind it: the end of the old one goes first all the same."""
    host.create(A)
    host.flush()
    snapshot = host.backend.snapshot()
    host.renew(A, B)
    host.flush()
    host.update(B, v=1)
    for n in range(20, 23):
        host.create(handle(n))
    host.backend.restore(snapshot)
    host.backend.watch = lambda *_: never_both(host, A, B)
    host.flush()
    host.agrees()


@pytest.mark.parametrize("step", [0, -100], ids=["", "the clock steps back"])
@pytest.mark.parametrize("losses", [1, 2], ids=["one loss before", "two losses before"])
@pytest.mark.parametrize("new", [False, True], ids=["it goes on", "a new one"])
@pytest.mark.parametrize("how", ["forgot", "fell back"])
def test_a_store_built_anew_sends_again_what_the_backend_lost(
    host: Host, how: str, new: bool, losses: int, step: int
) -> None:
    """Memory and backend come to harm together, and the flusher that goes on knows of losses of the old store."""
    flusher = host.flusher()
    host.create(C)
    host.flush(flusher)
    if losses == 2:
        host.backend.forget()
    host.create(A, v=1)
    host.create(B, v=1)
    host.flush(flusher)
    snapshot = host.backend.snapshot() if how == "fell back" else {}
    host.destroy(A)
    host.flush(flusher)
    host.update(B, v=2)
    host.backend.restore(snapshot)
    host.clock.step(step)
    build_anew(host)
    host.flush(host.flusher() if new else flusher)
    assert host.backend.state(A) is State.DEAD
    assert values_in(host.load(B)) == {"v": 2}
    host.agrees()
    forget_in_memory(host)
    assert is_gone(host, A)


def test_what_the_backend_has_lost_is_not_evicted_before_it_waits_again(place: Path) -> None:
    """While it is put back, bit by bit, visitors come to a crowded store."""
    with Host(place, map_size=4 << 20) as host:
        flusher = host.flusher()
        count = 0
        with contextlib.suppress(StoreFull):
            while True:
                host.login(handle(count + 1), v="x" * 900)
                count += 1
                if count % 200 == 0:
                    host.flush(flusher)
        host.flush(flusher)
        host.clock.advance(2 * QUIET_MS / 1000)
        host.backend.forget(restart=True)
        host.clock.advance(HEARTBEAT_MS / 1000)
        going = Running(flusher.round()).until("write").until("write")
        for number in range(50):
            with contextlib.suppress(StoreFull):
                host.login(handle(100_000 + number), v="y" * 900)
        going.finish()
        host.flush(flusher)
        assert count > 1000
        assert all(isinstance(host.read_through(handle(number + 1)), Record) for number in range(count))


@pytest.mark.parametrize("loss", ["everything", "the latest"])
def test_what_a_batch_shows_to_be_lost_is_not_retired_in_the_same_attempt(place: Path, loss: str) -> None:
    """The answer says that the backend has fallen back; those that were idle are in memory only now."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        flusher = host.flusher(memory_lifespan=60_000)
        host.create(A)
        host.flush(flusher)
        snapshot = host.backend.snapshot()
        for number in range(10, 60):
            host.create(handle(number))
        host.flush(flusher)
        host.clock.advance(58)
        run(flusher.round())
        host.clock.advance(3)
        host.backend.restore(snapshot if loss == "the latest" else {})
        host.create(B)
        flusher._next_retire = 0
        flusher.holds_lease = True
        asyncio.run(flusher._attempt())
        host.flush(flusher)
        assert all(isinstance(host.read_through(handle(number)), Record) for number in range(10, 60))


def test_a_batch_that_was_read_before_a_rebuild_is_not_sent_in_the_name_of_the_new_store(host: Host) -> None:
    """It would hide that the backend fell back, which a store built anew must find out for itself."""
    flusher = host.flusher()
    host.create(A)
    host.flush(flusher)
    snapshot = host.backend.snapshot()
    host.destroy(A)
    host.flush(flusher)
    host.create(B)
    dying = Running(flusher.round())
    dying.step()
    assert dying.at is None, "it has read"
    host.backend.restore(snapshot)
    build_anew(host)
    with contextlib.suppress(Overtaken):
        dying.until("write!")
    dying.abandon()
    host.flush(host.flusher())
    assert host.backend.state(A) is State.DEAD
    host.agrees()


def test_a_look_that_began_before_a_rebuild_is_none_of_the_new_store(host: Host) -> None:
    """What it found out, that the backend fell back, the new store does not know."""
    host.create(A)
    host.flush()
    snapshot = host.backend.snapshot()
    host.renew(A, B)
    host.flush()
    host.update(B, v=1)
    host.backend.restore(snapshot)
    looking = Running(host.flusher().round()).until("write!")
    build_anew(host)
    host.backend.watch = lambda *_: never_both(host, A, B)
    with contextlib.suppress(Overtaken):
        looking.finish()
    host.flush(host.flusher())
    host.agrees()


def test_what_a_store_that_is_gone_still_writes_hides_no_loss(host: Host) -> None:
    """Its look at the backend arrives when that has forgotten all, and a batch was stored whose sender died."""
    host.create(A)
    host.flush()
    late = host.backend.rows[SENTINEL]
    host.clock.advance(1)
    build_anew(host)
    host.create(B)
    flusher = host.flusher()
    host.flush(flusher)
    host.create(C)
    host.backend.forget()
    host.sending(C, flusher).until("write!").abandon()
    assert [answer.applied for answer in run(host.backend.write([late]))] == [False]
    host.flush(host.flusher())
    assert host.backend.state(B) is State.LIVE
    host.agrees()


@pytest.mark.parametrize("first", [b"\0", b"\xff"], ids=["lower", "higher"])
def test_what_is_put_back_into_a_store_that_is_built_anew_meanwhile_is_no_loss_of_the_new_one(
    host: Host, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    """Or else it would be done already, wherever the new one's losses begin to be counted, when that has its first."""
    host.create(A, v=1)
    host.flush()
    host.backend.forget()
    recalling = Running(host.flusher().round())
    while not waiting(host.memory):
        recalling.step()
    monkeypatch.setattr("os.urandom", lambda size: first * size)
    build_anew(host)
    monkeypatch.undo()
    with contextlib.suppress(Overtaken):
        recalling.finish()
    host.flush()
    host.backend.forget()
    host.flush(host.flusher())
    assert host.backend.state(A) is State.LIVE
    host.agrees()


def test_a_zombie_crosses_off_nothing_in_a_store_built_anew(host: Host) -> None:
    """It was stopped before it heard that its row was stored; the backend has forgotten that since."""
    flusher, stopped = host.flusher(), host.flusher()
    host.create(A, v=1)
    host.flush(flusher)
    host.flush(stopped)
    host.update(A, v=2)
    zombie = host.sending(A, stopped).until("write!")
    host.backend.forget()
    build_anew(host)
    going = Running(flusher.round()).until("write")
    zombie.finish()
    assert waiting(host.memory) == [A]
    going.finish()
    host.flush(flusher)
    host.agrees()


def test_a_death_that_a_zombie_heard_of_before_the_backend_forgot_it_is_sent_again(host: Host) -> None:
    """It was refused by the dead, and stopped before it heard that: what it learns says nothing of what is there."""
    host.create(A, v=1)
    zombie = host.sending(A)
    host.destroy(A)
    host.flush()
    zombie.until("write!")
    host.backend.forget()
    going = Running(host.flusher().round())
    while not waiting(host.memory):
        going.step()
    zombie.finish()
    assert waiting(host.memory) == [A]
    going.finish()
    host.flush()
    host.agrees()


def test_what_waits_anew_while_a_batch_is_read_is_in_it_once(host: Host) -> None:
    """A reader is stopped between two pieces; another sends the dead; the backend forgets them, and they are put in
    front of all that waits: behind what the first one has read."""
    for n in range(1, 3 * PIECE // 2):
        host.create(handle(n))
    last = handle(500)
    reader, other = host.flusher(), host.flusher()
    host.flush(reader)
    for flusher in (other, reader):
        run(flusher.round())
    for n in range(1, 3 * PIECE // 2):
        host.destroy(handle(n))
    host.create(last)
    reading = Running(reader.round())
    reading.step()
    assert reading.at is None, "it is about to ask the backend, and has not read"
    sending = host.sending(last, other)
    assert waiting(host.memory) == [last]
    host.backend.forget()
    putting = Running(host.flusher().round())
    while len(waiting(host.memory)) < 3 * PIECE // 2:
        putting.step()
    reading.finish()
    sending.finish()
    putting.finish()
    host.flush()
    host.agrees()


@pytest.mark.parametrize("since", ["updated", "destroyed", "renewed", "erased"])
def test_a_flusher_that_was_stopped_and_goes_on_does_no_harm(host: Host, since: str) -> None:
    """A zombie: its batch is captured, another flusher takes over, the session goes on, and then the old batch is sent,
    answered, and what its answers say is done."""
    host.create(A, v=1)
    host.flush()
    host.update(A, v=2)
    zombie = host.sending(A)
    match since:
        case "updated":
            host.update(A, v=3)
        case "destroyed":
            host.destroy(A)
        case "renewed":
            host.renew(A, B)
        case "erased":
            host.change(A, Changes(storable=False))
    host.flush()
    before = host.backend.sessions()
    zombie.finish()
    assert host.backend.sessions() == before
    host.flush()
    host.agrees()
    assert host.backend.sessions() == before


@pytest.mark.parametrize("since", ["updated", "destroyed", "renewed", "erased"])
def test_an_acknowledgement_that_comes_late_crosses_off_no_newer_commit(host: Host, since: str) -> None:
    """The zombie's batch was stored, and its answer read only after the session went on."""
    host.create(A, v=1)
    zombie = host.sending(A).until("write!")
    match since:
        case "updated":
            host.update(A, v=3)
        case "destroyed":
            host.destroy(A)
        case "renewed":
            host.renew(A, B)
        case "erased":
            host.change(A, Changes(storable=False))
    zombie.finish()
    assert A in waiting(host.memory)
    host.flush()
    host.agrees()


@pytest.mark.parametrize("how", [BEFORE, AFTER, HALF])
def test_a_session_is_dead_at_once_while_the_backend_is_down(host: Host, how: str) -> None:
    """Destroyed during an outage: nobody finds it, not after any time of waiting, and in the end the backend hears."""
    host.create(A, v=1)
    host.flush()
    host.destroy(A)
    for _ in range(6):
        host.backend.fail("write", how)
        with pytest.raises(BackendError):
            run(host.flusher().round())
        host.clock.advance(QUIET_MS / 1000)
        forget_at_once(host)
        assert host.load(A) in (Missing.DEAD, Missing.RENEWED)
    host.flush()
    assert host.backend.state(A) is State.DEAD


def test_dead_in_the_backend_is_dead_here(host: Host) -> None:
    """Somebody cleared the backend, or another host destroyed it: the next flush brings the news, and the cookie's
    holder is logged out."""
    host.login(A, v=1)
    host.flush()
    run(host.backend.clear())
    host.update(A, v=2)
    host.flush()
    assert host.load(A) is Missing.DEAD
    header = header_of(host.memory, A)
    assert header is not None
    assert header.flags & TOMBSTONE
    assert not host.memory.outbox.holds(A)
    base = host.memory.load(A, host.clock.now())
    assert base is Missing.DEAD
    forget_in_memory(host)
    assert is_gone(host, A)


def test_a_generation_sends_what_it_has_the_key_for(place: Path, backend: MemoryBackend, clock: ManualClock) -> None:
    """USR2: the old generation lacks the new Key. What that sealed it leaves alone, however much of it waits in front
    of its own, and the new generation sends it."""
    old, new = Key(bytes(range(32))), Key(bytes(range(1, 33)))
    with (
        Host(place, backend, clock, keyring=Keyring([old])) as before,
        Host(place, backend, clock, keyring=Keyring([old, new])) as after,
    ):
        before.create(A, v="old")
        for n in range(10, 700):
            after.create(handle(n), v="new")
        before.create(B, v="old")
        flusher = before.flusher()
        for _ in range(3):
            run(flusher.round())
        assert set(backend.sessions()) == {A, B}
        assert len(waiting(after.memory)) == 690
        after.flush()
        assert len(backend.sessions()) == 692
        after.update(handle(10), v="newer")
        run(before.flusher().round())
        assert waiting(after.memory) == [handle(10)]
        after.flush()
        after.agrees()


def test_an_acknowledgement_leaves_a_record_under_its_key(place: Path) -> None:
    """The new generation flushes what the old one commits: the old one goes on reading its sessions."""
    old, new = Key(bytes(range(32))), Key(bytes(range(1, 33)))
    backend = MemoryBackend()
    with (
        Host(place, backend, keyring=Keyring([old])) as before,
        Host(place, backend, before.clock, keyring=Keyring([old, new])) as after,
    ):
        before.create(A, v=1)
        after.flush()
        assert values_in(before.load(A)) == {"v": 1}
        backend.forget()
        after.flush(after.flusher())
        assert values_in(before.load(A)) == {"v": 1}
        before.update(A, v=2)
        after.flush()
        after.agrees()


def test_a_generation_that_lacks_a_key_forgets_nothing_for_the_other(
    place: Path, backend: MemoryBackend, clock: ManualClock
) -> None:
    """The backend forgot, and the flusher that notices cannot read half of the records: they are sent again all the
    same, by one that can."""
    old, new = Key(bytes(range(32))), Key(bytes(range(1, 33)))
    with (
        Host(place, backend, clock, keyring=Keyring([old])) as before,
        Host(place, backend, clock, keyring=Keyring([old, new])) as after,
    ):
        after.create(A, v="new")
        before.create(B, v="old")
        run(before.flusher().round())
        after.flush()
        backend.forget()
        for _ in range(3):
            run(before.flusher().round())
        for _ in range(3):
            after.clock.advance(HEARTBEAT_MS / 1000)
            run(after.flusher().round())
        after.flush(after.flusher())
        after.agrees()


def test_set_store_false_erases_and_true_brings_back(host: Host) -> None:
    """Back and forth, each arrives; while it is off the backend has nothing of it and hears of no commit."""
    host.create(A, v=1)
    host.flush()
    for n in range(3):
        late = _captured(host, n)
        host.change(A, Changes(storable=False))
        host.flush()
        assert host.backend.state(A) is State.ERASED
        assert host.backend.rows[A].body == b""
        host.update(A, v=f"secret {n}")
        assert waiting(host.memory) == []
        late.finish()
        assert host.backend.state(A) is State.ERASED
        assert run(host.backend.load(A)) is None
        host.change(A, Changes(storable=True))
        host.flush()
        host.agrees()
        assert host.backend.state(A) is State.LIVE


def _captured(host: Host, n: int) -> Running[bool]:
    host.update(A, v=n)
    return host.sending(A)


@pytest.mark.parametrize("since", ["kept", "updated", "renewed", "destroyed", "expired"])
def test_what_was_withdrawn_stays_so_when_the_backend_falls_back(host: Host, since: str) -> None:
    """The visitor took back the consent; then an older state of the database is restored, in which the session is."""
    host.create(A, v="secret")
    host.flush()
    snapshot = host.backend.snapshot()
    host.change(A, Changes(storable=False))
    host.flush()
    match since:
        case "updated":
            host.update(A, v="still")
        case "renewed":
            host.renew(A, B)
        case "destroyed":
            host.destroy(A)
        case "expired":
            host.clock.advance(hours=1, seconds=1)
    host.flush()
    host.backend.restore(snapshot)
    assert host.backend.state(A) is State.LIVE
    host.flush(host.flusher())
    assert host.backend.state(A) is not State.LIVE or since == "expired"
    assert B not in host.backend.rows
    again = lose_memory(host)
    assert is_gone(again, A)
    again.close()


def test_consent_given_again_is_what_the_backend_hears_when_it_falls_back(host: Host) -> None:
    host.create(A, v=1)
    host.flush()
    host.change(A, Changes(storable=False))
    host.flush()
    snapshot = host.backend.snapshot()
    host.change(A, Changes(storable=True))
    host.flush()
    host.backend.restore(snapshot)
    host.flush(host.flusher())
    host.agrees()
    assert host.backend.state(A) is State.LIVE


def test_a_session_that_was_never_storable_is_never_sent(host: Host) -> None:
    changes = sets(v="secret")._replace(storable=False)
    assert host.memory.create(A, changes, host.clock.now())
    host.update(A, v="still")
    base = host.load(A)
    assert isinstance(base, Record)
    host.memory.renew(A, B, base, Changes(), host.clock.now(), ADA, login=True)
    host.destroy(B)
    host.flush()
    assert host.backend.sessions() == {}


# ── a great many at random ────────────────────────────────────────────────────────────────────────────────────


class Violation(AssertionError):
    """A promise was broken."""


class World:
    """One host over and over: each schedule has sessions of its own, and begins with an empty memory and backend."""

    def __init__(self, directory: Path) -> None:
        self.host = Host(directory, map_size=1 << 20)
        self.environment = self.host.memory.environment
        self.steps = self.lost_replies = self.amnesias = self.losses = self.fills = 0
        self.interruptions = self.rebuilds = 0
        self._numbers = 1
        self._outbox_is_whole = True
        self.interrupt: Callable[[], None] | None = None
        """What others do between two transactions of a flusher."""
        self.environment.write = self._interrupted(self.environment.write)  # type: ignore[method-assign]
        self.environment.read = self._interrupted(self.environment.read)  # type: ignore[method-assign]

    def _interrupted(self, call: Any) -> Any:
        def called(work: Callable[[Txn, Tables], object]) -> object:
            interrupt, self.interrupt = self.interrupt, None
            if interrupt is not None:
                interrupt()
                self.interrupt = interrupt
            return call(work)

        return called

    def close(self) -> None:
        self.host.close()

    def begin(self) -> None:
        host = self.host
        host.clock.advance(1)
        host.backend.heal()
        host.backend.rows = {}
        host.backend.calls.clear()
        host.backend.sent.clear()
        host.events.clear()
        self.empty_memory()

    def empty_memory(self) -> None:
        """Everything is gone but what makes it a store; it is another incarnation."""
        epoch = max(self.host.clock.now(), 1)
        opened = self.environment.open()
        uuid = self.host.clock.now().to_bytes(8, "big") + self.fresh().to_bytes(8, "big")

        def work(txn: Txn, tables: Tables) -> None:
            for table in (tables.records, tables.expiry, tables.outbox, tables.users):
                txn.drop(table, delete=False)
            for key in [bytes(key) for key in txn.cursor(tables.meta).iternext(values=False)]:
                if key not in (b"format", b"uuid", b"size", b"epoch", b"clock", b"check"):
                    txn.delete(key, db=tables.meta)
            txn.put(b"epoch", sequence_key(epoch), db=tables.meta)
            losses = sequence_key((1 << 47) + (self.fresh() << 20))  # one that is built anew begins below or above
            for name in (LOSSES, PUT_BACK, RECALLED):
                txn.put(name, losses, db=tables.meta)
            txn.put(b"uuid", uuid, db=tables.meta)

        self.environment.write(work)
        opened.epoch, opened.uuid = epoch, uuid
        self.environment.backend_down_until = 0

    def rebuild(self, *, knows_who_waits: bool) -> None:
        """The file turns out damaged: what is whole moves into a new one. All processes go on."""
        self.rebuilds += 1
        self._outbox_is_whole = knows_who_waits
        self.environment._quarantine(self.environment.open(), "a test says so")

    def walk(self, environment: Path, table: str, _direction: str) -> tuple[bytes, bool]:
        """`salvage._walked`, in this process."""
        if table == "outbox" and not self._outbox_is_whole:
            return b"", False
        env = lmdb.open(str(environment), readonly=True, lock=False, max_dbs=8, create=False)
        try:
            with env.begin() as txn:
                rows = list(txn.cursor(env.open_db(table.encode(), txn=txn, create=False)))
        finally:
            env.close()
        sized = ((len(key).to_bytes(4, "big") + len(value).to_bytes(4, "big") + key + value) for key, value in rows)
        return b"".join(sized), True

    def fresh(self) -> int:
        self._numbers += 1
        return self._numbers


class Expected:
    """What a session holds, by all that was answered."""

    def __init__(self, value: int, *, storable: bool) -> None:
        self.value = value
        self.storable = storable
        self.unsure = False
        """Memory was lost, or the backend, before the other had it: any answer but a revival will do."""
        self.best = (0, 0)
        self.expires = 0


class Schedule:
    """A dozen random steps, told by `story`, and then the end: everything works again, and everything must agree."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world, self.chance, self.host = world, chance, world.host
        self.story: list[str] = []
        self.alive: dict[bytes, Expected] = {}
        self.killed: dict[bytes, str] = {}
        self.held: dict[bytes, Record] = {}
        self.flushers: list[Flusher] = [self.host.flusher(), self.host.flusher()]
        self.rounds: dict[int, Running[bool]] = {}
        self._stepping: int | None = None
        """The flusher whose code runs."""
        self.answers: list[tuple[bytes, Answered]] = []
        self.before: dict[bytes, bytes] = {}
        """The id that a renewed session had before."""
        self.amnesia = False
        """The backend forgot something since memory last began."""
        self.late: list[Running[bool]] = []
        """Rounds of a store that is gone, whose batches are still on their way."""
        self.overtaken: set[bytes] = set()
        """The backend got a row of such a one after memory had read an older one."""
        self.snapshot: dict[bytes, Row] = {}
        """What the backend may fall back to."""
        self._begun: dict[int, int] = {}
        """How many losses were known when each round began."""
        self._known = 0
        """And when the backend forgot last."""

    # Steps.

    def run(self, steps: int) -> None:
        self.world.begin()
        self.host.backend.watch = self._watch
        kinds, weights = zip(*_STEPS, strict=True)
        phrase: list[str] = []
        while steps > 0 or phrase:
            steps -= 1
            if not phrase and self.chance.random() < 0.2:
                phrase = list(self.chance.choice(_PHRASES))
            goes_on = phrase and self.chance.random() < 0.9
            kind = phrase.pop(0) if goes_on else self.chance.choices(kinds, weights)[0]
            self.story.append(kind)
            self.world.steps += 1
            getattr(self, kind)()
            self._excuse()
            self._check_memory()
        self._end()

    def _watch(self, old: Row | None, new: Row) -> None:
        if new.handle == SENTINEL:
            return
        if new.state is State.LIVE:
            self._not_both(new.handle)
        if old is not None:
            self._not_backwards(old, new)

    def _not_both(self, key: bytes) -> None:
        """A renewed session is alive under one of its ids: if memory were lost now, it would stay so.

        When the backend has fallen back to a state in which the old one lives, whoever does not know it yet may send
        the new one all the same.
        """
        if self.amnesia and self._begun.get(self._stepping or 0, 0) <= self._known:
            return
        for new, old in self.before.items():
            if key in (new, old) and self.host.backend.state(old) is self.host.backend.state(new) is State.LIVE:
                raise Violation(f"{old.hex()} was renewed, and is alive beside {new.hex()}")

    def _not_backwards(self, old: Row, new: Row) -> None:
        if old.state is State.DEAD and new.state is not State.DEAD:
            raise Violation(f"revived in the backend: {old} became {new}")
        if new.state is not State.DEAD and (new.epoch, new.version) < (old.epoch, old.version):
            raise Violation(f"backwards: {old} became {new}")
        if new.horizon < old.horizon:
            raise Violation(f"a horizon was shortened: {old} became {new}")

    def _any(self) -> bytes | None:
        return self.chance.choice(list(self.alive)) if self.alive else None

    def _handle(self) -> bytes:
        return self.chance.getrandbits(159).to_bytes(20, "big")

    def _current(self) -> tuple[bytes, Expected, Record] | None:
        """A session that memory has."""
        key = self._any()
        if key is None:
            return None
        record = self.host.load(key)
        if not isinstance(record, Record):
            return None
        self.held[key] = record
        return key, self.alive[key], record

    def create(self) -> None:
        key, storable, value = self._handle(), self.chance.random() < 0.9, self.world.fresh()
        changes = sets(v=value)._replace(storable=storable, longterm=self.chance.random() < 0.2 or None)
        if self.chance.random() < 0.3:
            changes = changes._replace(set={**changes.set, 0: ADA})
        record = self.host.memory.create(key, changes, self.host.clock.now())
        assert isinstance(record, Record)
        self.held[key] = record
        self.alive[key] = Expected(value, storable=storable)
        self._saw(key, record)

    def update(self) -> None:
        """By a request that loaded the session now, or long ago."""
        value = self.world.fresh()
        self._change(sets(v=value), value)

    def touch(self) -> None:
        self._change(Changes(touch=True), None)

    def store(self) -> None:
        self._change(Changes(storable=self.chance.random() < 0.5), None)

    def longterm(self) -> None:
        """The backend may have heard of the long life, and not of the short one."""
        if self.chance.random() < 0.7:
            self._change(Changes(longterm=True), None)
            self._send_all()
        if self.chance.random() < 0.7:
            self._change(Changes(longterm=False), None)

    def _change(self, changes: Changes, value: int | None) -> None:
        if self.chance.random() < 0.3 and self.held:
            held = [key for key in self.held if key in self.before] or [*self.held]
            key = self.chance.choice(held if self.chance.random() < 0.5 else [*self.held])
            record = self.held[key]
        elif (current := self._current()) is None:
            return
        else:
            key, _, record = current
        found = self.host.memory.update(key, record, changes, self.host.clock.now())
        if not isinstance(found, Record):
            return
        self._not_dead(key, "was updated")
        expected = self.alive[key]
        if value is not None:
            expected.value = value
            expected.unsure = False
        expected.storable = bool(found.header.flags & STORABLE)
        self._saw(key, found)

    def destroy(self) -> None:
        asked_for = [key for key, _ in self.answers if key in self.alive]
        key = self.chance.choice(asked_for) if asked_for and self.chance.random() < 0.5 else self._any()
        if key is not None:
            self.host.destroy(key)
            self._kill(key, "destroyed")

    def renew(self) -> None:
        current = self._current()
        if current is None:
            return
        old, expected, base = current
        new, user = self._handle(), self.chance.choice([None, ADA])
        found = self.host.memory.renew(
            old,
            new,
            base,
            Changes(),
            self.host.clock.now(),
            user,
            login=user is not None and self.chance.random() < 0.5,
        )
        assert isinstance(found, Record)
        self._kill(old, "renewed")
        self.before[new] = old
        self.alive[new] = Expected(expected.value, storable=expected.storable)
        self.alive[new].unsure = expected.unsure
        self.held[new] = found
        self._saw(new, found)

    def _kill(self, key: bytes, how: str) -> None:
        self.alive.pop(key, None)
        self.killed[key] = how

    def sweep(self) -> None:
        self.host.memory.sweep(self.host.clock.now(), 100)

    def evict(self) -> None:
        """Room is needed: what the backend has goes; what exists in memory only may go when nobody is logged in."""
        self.host.memory.evict(64)
        for key, expected in self.alive.items():
            if not expected.storable and self.host.load(key) is Missing.UNKNOWN:
                expected.unsure = True
        self._evicted()

    def retire(self) -> None:
        self.host.memory.outbox.retire(self.host.clock.now(), self.chance.choice([1, HOUR // 2]), b"")
        self._evicted()

    def _evicted(self) -> None:
        if self.amnesia:
            for key, expected in self.alive.items():
                expected.unsure = expected.unsure or self.host.load(key) is Missing.UNKNOWN

    def _send_all(self) -> None:
        self._harm()
        for number in (0, 1):
            if number in self.rounds:
                self._advance(number, 200)
        number = self._stepping = self.chance.randrange(2)
        try:
            for _ in range(3):
                self._begin(number).finish()
        except ShmSessionError as error:
            self.flushers[number]._failed(error)
        finally:
            self._stepping = None

    def vacate(self) -> None:
        """All is sent, and nobody looks for a while: memory keeps only what it must."""
        self._send_all()
        self.host.clock.advance(self.chance.choice([2, 12, 29, 61, 61]))
        self.sweep()
        self.host.memory.outbox.retire(self.host.clock.now(), 1, b"")
        self._evicted()

    def advance(self) -> None:
        self.host.clock.advance(self.chance.choice([0.1, 1, 5, 12, 29, 31, 61, 61, 130, 1900, 3601]))

    def request(self) -> None:
        """A cookie comes back: what memory lacks is asked for, and the answer may take its time."""
        known = [*self.alive, *self.killed]
        if not known:
            return
        lacking = [key for key in known if self.host.load(key) is Missing.UNKNOWN]
        key = self.chance.choice(lacking if lacking and self.chance.random() < 0.7 else known)
        found = self.host.load(key)
        if found is Missing.UNKNOWN:
            self.answers.append((key, self.host.miss(key)))
            if self.chance.random() < 0.5:
                self.answer()
        elif isinstance(found, Record):
            self.held[key] = found
            self._not_dead(key, "was found in memory")

    def answer(self) -> None:
        if not self.answers:
            return
        key, answered = self.answers.pop(self.chance.randrange(len(self.answers)))
        found = answered.arrives()
        self.world.fills += 1
        if isinstance(found, Record):
            self._not_dead(key, "was loaded")
            self._not_ended(key)
            self.held[key] = found
            self._saw(key, found)

    def go(self) -> None:
        """A flusher takes some steps of a round."""
        self._harm()
        goes_on = self.rounds and self.chance.random() < 0.5
        number = self.chance.choice(list(self.rounds) if goes_on else [0, 1])
        if number not in self.rounds:
            self.rounds[number] = self._begin(number)
        self._advance(number, self.chance.choice([1, 2, 3, 5, 8, 50]), until=self.chance.choice(["write!", None]))

    def _harm(self) -> None:
        if self.chance.random() < 0.2:
            self.host.backend.fail("write", self.chance.choice([BEFORE, AFTER, HALF, REST]))
            self.world.lost_replies += 1

    def read(self) -> None:
        """A flusher stops when it has read, and has not sent."""
        number = self.chance.randrange(2)
        if number not in self.rounds:
            self.rounds[number] = self._begin(number)
        for _ in range(8):
            if number in self.rounds:
                self._advance(number, 1)
            if number in self.rounds and self.rounds[number].at is None:
                return

    def hang(self) -> None:
        """A flusher stops when what it sent is stored, and has not heard of it."""
        number = self.chance.randrange(2)
        for _ in range(3):
            if number not in self.rounds:
                self.rounds[number] = self._begin(number)
            self._advance(number, 50, until="write!")
            if number in self.rounds and self.host.backend.sent[-1]:
                return

    def _other(self) -> int:
        """One that is not in the midst of a round, nor has read ahead, if there is one."""
        idle = [number for number in (0, 1) if number not in self.rounds and not self.flushers[number]._ahead]
        return self.chance.choice(idle or [0, 1])

    def take_over(self) -> None:
        """One flusher stops where it is; the other is one that has just begun, and looks, and sends."""
        number = self._other()
        self.rounds[number] = self._replace(number)
        self._advance(number, 200)
        self.rounds[number] = self._begin(number)
        self._advance(number, 200)

    def _replace(self, number: int) -> Running[bool]:
        if number in self.rounds:
            self.rounds.pop(number).abandon()
        self.flushers[number] = self.host.flusher()
        return self._begin(number)

    def _begin(self, number: int) -> Running[bool]:
        self._begun[number] = self.host.memory.outbox.losses()
        return Running(self.flushers[number].round())

    def _advance(self, number: int, steps: int, until: object = None) -> None:
        running, world = self.rounds[number], self.world
        nested, self._stepping = self._stepping is not None, number
        world.interrupt = None if nested else self._meanwhile
        try:
            while steps and not running.done:
                running.step()
                steps = 0 if running.at == until is not None else steps - 1
        except ShmSessionError as error:
            if not isinstance(error, Overtaken):
                self.flushers[number]._failed(error)
            self.flushers[number]._sentinel.greeted = None
        finally:
            world.interrupt = None
            self._stepping = 1 - number if nested else None
        if running.done:
            self.rounds.pop(number, None)

    def _meanwhile(self) -> None:
        """Others do something between two transactions of a flusher."""
        if self.chance.random() >= _MEANWHILE_CHANCE:
            return
        kinds, weights = zip(*_MEANWHILE, strict=True)
        kind = self.chance.choices(kinds, weights)[0]
        self.story.append(f"({kind})")
        self.world.interruptions += 1
        if kind != "other":
            getattr(self, kind)()
        elif self._stepping is not None and 1 - self._stepping in self.rounds:
            self._advance(1 - self._stepping, self.chance.choice([1, 2, 3]))

    def kill(self) -> None:
        """A flusher's process is killed, and another takes its place."""
        self._replace(self.chance.randrange(2)).abandon()

    def save(self) -> None:
        """Somebody makes a backup of the backend."""
        self.snapshot = self.host.backend.snapshot()

    def forget(self) -> None:
        """The backend is empty, or falls back to a backup, while memory lives; perhaps its connections break."""
        known = self.world.environment.epoch, self.host.memory.outbox.note(b"beat")
        backup = self.snapshot.get(SENTINEL)
        # Of a backup that has all that was acknowledged by number nobody can tell that it is one.
        falls_back = backup is not None and backup[2:4] < known and self.chance.random() < 0.7
        restart = falls_back or self._greets() or self.chance.random() < 0.5
        self.host.backend.restore(self.snapshot if falls_back else {}, restart=restart)
        if restart:
            self.answers.clear()
        self.amnesia = True
        self._known = self.host.memory.outbox.losses()
        self.world.amnesias += 1
        self._evicted()
        if falls_back:
            self._look()
        elif self.chance.random() < 0.5:
            self.take_over()

    def _greets(self) -> bool:
        """Whether a flusher is about to say that all is known, which nobody can hold up."""
        greeting = [number for number in self.rounds if self.flushers[number]._sentinel.greeted is None]
        return any(self.rounds[number].at == "write" for number in greeting)

    def _look(self) -> None:
        """That the backend fell back shows at the first contact only, whose answer must therefore be seen."""
        self.host.backend.heal()
        looking = self._replace(self._other())
        while not looking.done and self.host.memory.outbox.losses() == self._known:
            looking.step()
        looking.finish() if self.chance.random() < 0.5 else looking.abandon()

    def _excuse(self) -> None:
        """Who was destroyed and is alive in a backup, of which nobody knew any more before it was noticed."""
        for key in list(self.killed) if self.amnesia else []:
            if self.host.backend.state(key) is State.LIVE and self.host.load(key) is Missing.UNKNOWN:
                del self.killed[key]
                self.before = {new: old for new, old in self.before.items() if old != key}

    def rebuild(self) -> None:
        """The memory store is damaged and built anew while everybody goes on."""
        self.host.clock.advance(0.1)  # it takes its time: no two stores begin at once
        self.world.rebuild(knows_who_waits=self.chance.random() < 0.7)
        for key, expected in self.alive.items():
            if (
                not (expected.storable or expected.unsure or self._ended(key))
                and self.host.load(key) is Missing.UNKNOWN
            ):
                raise Violation(f"{key.hex()} was in memory only, and a rebuild lost it")
        self._evicted()

    def lose(self) -> None:
        """Memory is lost, with every process of the host; what was on its way to the backend may arrive."""
        world, host = self.world, self.host
        saved = self._saved()
        goes_back = self.chance.random() < 0.3
        if goes_back:
            for key, expected in self.alive.items():
                expected.unsure = expected.unsure or self._ended(key)  # it may not have, by the clock that it has now
            host.clock.step(-3600)
        for running in self.rounds.values():
            self.late.append(running) if running.at == "write" else running.abandon()
        self.rounds.clear()
        if goes_back or self.chance.random() < 0.5:  # what comes later may have the very numbers of what is new
            self.arrive()
        self.answers.clear()
        self.held.clear()
        self.before.clear()
        host.clock.advance(1)
        world.empty_memory()
        world.losses += 1
        for key in [key for key in self.killed if host.backend.state(key) is not State.DEAD]:
            del self.killed[key]  # it was not final yet
        for key, expected in list(self.alive.items()):
            expected.best = (0, 0)
            expected.unsure = expected.unsure or key not in saved
        self.flushers = [host.flusher(), host.flusher()]
        self.overtaken.clear()
        self.amnesia = False

    def arrive(self) -> None:
        """What a store that is gone had given to the network is stored, or never will be."""
        sent = self.host.backend.sent
        before = len(sent)
        for running in self.late:
            if self.chance.random() < 0.7:
                with contextlib.suppress(ShmSessionError):
                    running.step()
            running.abandon()
        self.late.clear()
        for row in itertools.chain(*sent[before:]):
            if row.handle in self.alive and not self.host.memory.outbox.holds(row.handle):
                self.alive[row.handle].unsure = True
                self.overtaken.add(row.handle)

    def _saved(self) -> set[bytes]:
        """The sessions that loss of memory must not touch: the backend has acknowledged them."""
        if not self.amnesia:
            self._check_acknowledged()
        saved = set()
        for key, expected in self.alive.items():
            if not expected.storable or self.host.memory.outbox.holds(key):
                continue
            row = self.host.backend.rows.get(key)
            if not (self.amnesia or expected.unsure or self._ended(key)):
                self._check_row(key, expected, row)
            # One that fell back to a backup may have an older one, and memory goes before it has sent the newer again.
            if row is not None and not (self.amnesia and row[2:4] < expected.best):
                saved.add(key)
        return saved

    def _check_acknowledged(self) -> None:
        """What does not wait, the dead too, is in the backend as it is in memory."""
        host = self.host
        differences = differing(host.memory, host.backend, host.rows, host.keyring, self.overtaken)
        if differences:
            raise Violation(f"acknowledged, but {'; '.join(differences)}")

    def _check_row(self, key: bytes, expected: Expected, row: Row | None) -> None:
        if row is None or row.state is not State.LIVE or (row.epoch, row.version) < expected.best:
            raise Violation(f"acknowledged, but the backend has {row} instead of version {expected.best}")

    # Promises.

    def _not_dead(self, key: bytes, what: str) -> None:
        if key in self.killed:
            raise Violation(f"{key.hex()} was {self.killed[key]}, and {what}")

    def _not_ended(self, key: bytes) -> None:
        if self._ended(key) and not (self.amnesia or self.alive[key].unsure):
            raise Violation(f"{key.hex()} has ended, and was found")

    def _saw(self, key: bytes, record: Record) -> None:
        expected = self.alive[key]
        mark = (record.header.epoch, record.header.version)
        if mark < expected.best and not expected.unsure:
            raise Violation(f"{key.hex()} went back from {expected.best} to {mark}")
        expected.best, expected.expires = max(expected.best, mark), record.header.expires

    def _check_memory(self) -> None:
        for key in self.killed:
            if isinstance(self.host.load(key), Record):
                self._not_dead(key, "is alive in memory")
        for key, expected in self.alive.items():
            record = self.host.load(key)
            if isinstance(record, Record):
                self._saw(key, record)
                if not expected.unsure and values_in(record) != {"v": expected.value}:
                    raise Violation(f"{key.hex()} holds {values_in(record)}, not {expected.value}")

    def _end(self) -> None:
        host = self.host
        while self.answers:
            self.answer()
        self.arrive()
        for number in (0, 1):
            if number in self.rounds and self.chance.random() < 0.8:
                self._advance(number, 200)
        for running in self.rounds.values():
            running.abandon()
        host.backend.heal()
        survivor = self.chance.choice([*self.flushers, host.flusher()])
        self._settle(survivor)
        self._excuse()
        self._check_memory()
        self._check_acknowledged()
        host.clock.advance(1)
        for key, how in self.killed.items():
            if isinstance(host.read_through(key), Record):
                raise Violation(f"{key.hex()} was {how}, and is alive")
        for key, expected in self.alive.items():
            found = host.read_through(key)
            if not isinstance(found, Record):
                if not expected.unsure and not self._ended(key):
                    raise Violation(f"{key.hex()} is lost: {found}")
            elif not expected.unsure and values_in(found) != {"v": expected.value}:
                raise Violation(f"{key.hex()} holds {values_in(found)}, not {expected.value}")
            else:
                self._not_ended(key)

    def _settle(self, flusher: Flusher) -> None:
        host, calm = self.host, 0
        for _ in range(40):
            self._begun[0] = host.memory.outbox.losses()
            try:
                run(flusher.round())
            except ShmSessionError:
                flusher._sentinel.greeted = None
                continue
            if not len(host.memory.outbox):
                host.clock.advance(HEARTBEAT_MS / 1000)
                calm += 1
                if calm == 4:
                    return
        raise Violation(f"{len(host.memory.outbox)} rows wait for ever")

    def _ended(self, key: bytes) -> bool:
        return self.host.clock.now() >= self.alive[key].expires


_STEPS: list[tuple[str, int]] = [
    ("create", 6), ("update", 9), ("touch", 2), ("store", 3), ("longterm", 2), ("destroy", 4), ("renew", 4),
    ("sweep", 4), ("evict", 2), ("retire", 3), ("vacate", 5), ("advance", 8), ("request", 10), ("answer", 4),
    ("go", 24), ("read", 2), ("hang", 2), ("kill", 2), ("take_over", 2), ("save", 2), ("forget", 2), ("lose", 1),
    ("arrive", 1), ("rebuild", 1),
]  # fmt: skip
_PHRASES: list[tuple[str, ...]] = [
    ("create", "vacate", "request", "request", "answer", "destroy", "vacate", "answer"),
    ("create", "vacate", "request", "request", "answer", "update", "vacate", "answer"),
    ("create", "longterm", "advance", "sweep", "request", "answer"),
    ("create", "hang", "forget", "go", "go"),
    ("create", "vacate", "save", "renew", "vacate", "update", "create", "create", "forget", "go", "vacate"),
    ("create", "vacate", "save", "renew", "vacate", "create", "create", "update", "read", "forget", "vacate"),
    ("create", "update", "go", "lose", "request", "answer", "update", "arrive", "go"),
]
"""Some things must come together to do harm: they are drawn together, with others in between."""
_MEANWHILE: list[tuple[str, int]] = [
    ("update", 4), ("touch", 1), ("store", 2), ("destroy", 2), ("renew", 3), ("evict", 1), ("other", 6),
]  # fmt: skip
_MEANWHILE_CHANCE = 0.06


def play(place: Path, monkeypatch: pytest.MonkeyPatch, seed: object, schedules: int) -> World:
    """So many schedules; a promise that is broken is an AssertionError that says in which."""
    world = World(place)
    monkeypatch.setattr("shmsession.memory.salvage._walked", world.walk)
    monkeypatch.setattr("shmsession.memory.building.logger.disabled", True)
    try:
        for number in range(schedules):
            chance = random.Random(f"{seed}:write-behind {number}")
            monkeypatch.setattr("os.urandom", random.Random(f"{seed}:stores {number}").randbytes)
            # Few rows a batch, and a piece, so that what was read ahead is sent when it is stale.
            monkeypatch.setattr("shmsession.flusher.BATCH", chance.choice((1, 2, BATCH)))
            monkeypatch.setattr("shmsession.flusher.PIECE", chance.choice((1, PIECE)))
            schedule = Schedule(world, chance)
            try:
                schedule.run(steps=schedule.chance.randrange(8, 17))
            except Violation as violation:
                raise AssertionError(
                    f"SOAK_SEED={seed}, schedule {number}: {violation}\n{schedule.story}"
                ) from violation
    finally:
        world.close()
    return world


@pytest.mark.soak
def test_random_schedules_lose_and_revive_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests, two flushers, a failing and forgetting backend, loss of memory and leaps of time in any order: nothing
    comes back from the dead, nothing is lost, no row goes backwards, and in the end the backend equals memory."""
    schedules, begin = size(full=1_000_000, suite=6_000), time.monotonic()
    world = play(place, monkeypatch, SEED, schedules)
    report(
        "G3/G5 random schedules", schedules=schedules, steps=world.steps, faults=world.lost_replies,
        interruptions=world.interruptions, amnesias=world.amnesias, losses=world.losses, fills=world.fills,
        rebuilds=world.rebuilds, revived=0, lost=0, backwards=0,
        per_second=round(schedules / (time.monotonic() - begin)),
    )  # fmt: skip


# ── the account can tell ──────────────────────────────────────────────────────────────────────────────────────

KNOWN_SEED: Final = 8
ENOUGH: Final = 2_000


class Mutant(NamedTuple):
    """A function in which `old` is `new`."""

    owner: Any
    name: str
    old: str
    new: str

    def take_its_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        function = getattr(self.owner, self.name)
        text = textwrap.dedent(inspect.getsource(function))
        assert text.count(self.old) == 1, "the code has changed: say anew what is to be broken"
        made: dict[str, Any] = {}
        exec(text.replace(self.old, self.new), function.__globals__, made)
        monkeypatch.setattr(self.owner, self.name, made[self.name])


MUTANTS: Final = {
    "the living are sent before the dead": Mutant(
        Flusher, "round", "    if dead:\n",
        "    dead, rest = (rest, dead) if dead else (dead, rest)\n        if dead:\n",
    ),
    "the dead and the living are sent together": Mutant(
        Flusher, "round", "    if dead:\n", "    dead, rest = [], waiting\n        if dead:\n"
    ),
    "what was read ahead is sent though the backend has forgotten": Mutant(
        Flusher, "round", "ahead.losses != self._outbox.losses() or ", ""
    ),
    "what came since the reading began is read too": Mutant(Flusher, "_read", "after, until)\n", "after)\n"),
    "what was acknowledged before a loss is crossed off": Mutant(
        Outbox, "acknowledge", "number(txn.get(LOSSES, db=tables.meta)) != losses", "False"
    ),
    "a newer commit is crossed off": Mutant(Outbox, "acknowledge", "raw == one.record.raw", "raw"),
    "the dead give up their places": Mutant(Outbox, "acknowledge", " and not _is_dead(raw)", ""),
    "the dead are not put in front": Mutant(Outbox, "put_back", "front=dead", "front=False"),
    "the living are put back before the dead": Mutant(
        Recall, "put_back", "dead=self._step == _DEAD", "dead=self._step != _DEAD"
    ),
    "a backend that fell back is taken for what it was": Mutant(
        Sentinel, "_take_over", " or (found.epoch, found.version) < known or found.horizon < self._horizon", ""
    ),
    "what was sent unseen to an empty backend is taken for an old sentinel": Mutant(
        Sentinel, "_take_over", " or found.horizon < self._horizon", ""
    ),
    "an answer that comes late undoes a commit": Mutant(
        MemoryStore, "fill", "_order(found.header) >= _order(header) or waits(txn, tables, handle, found.raw)", "False"
    ),
    "what has expired vanishes before the backend has heard of it": Mutant(
        Sweeper, "_sweep_row", "if waits(txn, tables, handle, raw):",
        "if waits(txn, tables, handle, raw) and header.flags & TOMBSTONE:",
    ),
    "what the backend lacks leaves memory": Mutant(
        Outbox, "retire", "None if waits(txn, tables, handle, record.raw) else record", "record"
    ),
    "a withdrawal is not sent": Mutant(Writer, "_dirtied", "(flags | was) & told_of", "flags & told_of"),
}  # fmt: skip
"""What named tests find too. Two things that they find are not among them, for no schedule shows them: that a row is
sent again above a newer one, which only a store that is gone can have left, and here it has left all that it had before
another begins; and that a batch meets an older sentinel, for here somebody looks first. See `lose` and `_look`."""


@pytest.mark.unmeasured
@pytest.mark.parametrize("what", MUTANTS)
def test_what_is_broken_is_found_out(place: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    MUTANTS[what].take_its_place(monkeypatch)
    with pytest.raises(AssertionError, match="schedule"):
        play(place, monkeypatch, KNOWN_SEED, ENOUGH)


@pytest.mark.unmeasured
@pytest.mark.parametrize(
    ("limit", "value"), [("room.QUIET_MS", 10_000), ("store.STALE_FILL_MS", 1_000_000_000)], ids=["quiet", "stale"]
)
def test_a_limit_that_is_wrong_is_found_out(
    place: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    """The dead are remembered for longer than an answer is believed."""
    monkeypatch.setattr(f"shmsession.memory.{limit}", value)
    with pytest.raises(AssertionError, match="schedule"):
        play(place, monkeypatch, KNOWN_SEED, ENOUGH)


@pytest.mark.unmeasured
def test_nothing_is_found_out_where_nothing_is_broken(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(place, monkeypatch, KNOWN_SEED, ENOUGH)
