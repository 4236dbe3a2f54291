"""The outbox: what waits for the backend, in which order, and what takes it out or puts it back."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shmsession.backends.base import State
from shmsession.errors import StoreFull
from shmsession.memory.outbox import CHUNK, Dirty
from shmsession.memory.room import QUIET_MS
from shmsession.memory.store import Missing
from shmsession.memory.tables import Tables, Txn, sequence_key
from shmsession.record import NO_PLACE, PLACE_BYTES, STORABLE, TOMBSTONE, Changes, Record
from shmsession.sentinel import Overtaken
from tests.backends import Host, Running, run, sets
from tests.memory import HOUR, check_tables, handle, header_of, put_raw, spoilt, waiting

A, B, C = handle(1), handle(2), handle(3)


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    with Host(place) as host:
        yield host
        check_tables(host.memory)


def test_its_length_and_age(host: Host) -> None:
    """The age is that of the oldest commit that waits, also of a session that is committed again and again."""
    outbox = host.memory.outbox
    assert (len(outbox), outbox.age()) == (0, 0)
    host.create(A)
    host.clock.advance(3)
    host.update(A, v=1)
    host.create(B)
    assert (len(outbox), outbox.age()) == (2, 3000)
    host.clock.step(-10)
    assert outbox.age() == 0
    host.clock.step(10)
    run(host.flusher().round())
    assert (len(outbox), outbox.age()) == (0, 0)


def test_the_oldest_come_first(host: Host) -> None:
    for key in (C, A, B):
        host.create(key)
    host.update(C, v=1)
    assert [dirty.handle for dirty in host.memory.outbox.oldest(2)] == [C, A]
    assert [dirty.record for dirty in host.memory.outbox.oldest(9)] == [host.load(key) for key in (C, A, B)]


def test_reading_keeps_few_pages_from_being_used_again(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though others commit as often as something is read: what they free waits for the end of the snapshot."""
    for n in range(CHUNK):
        host.create(handle(n + 1))
    environment, before = host.memory.environment, host.memory.usage().touched
    read = environment.read

    def slowly(work: Callable[[Txn, Tables], Any]) -> Any:
        def among_others(txn: Txn, tables: Tables) -> Any:
            found = work(txn, tables)
            for _ in found:
                environment.write(lambda txn, tables: txn.put(b"busy", b"1", db=tables.meta))
            return found

        return read(among_others)

    monkeypatch.setattr(environment, "read", slowly)
    assert len(host.memory.outbox.oldest(CHUNK)) == CHUNK
    assert host.memory.usage().touched - before < CHUNK / 2


def test_no_place_is_given_out_twice(host: Host) -> None:
    """Though older ones still wait, and no time passes: whoever hears late of one must not take it for another's."""
    seen: set[bytes] = set()
    host.create(handle(100))
    for n in range(1, 20):
        host.create(handle(n))
        *_, newest = host.memory.outbox.oldest(9)
        assert newest.record.place not in seen
        seen.add(newest.record.place)
        host.memory.outbox.acknowledge([newest], host.memory.outbox.losses())


def test_its_age_is_known_again_when_the_clock_has_leapt_and_come_back(host: Host) -> None:
    """A month ahead and back: from the first commit after all was sent, not a month later."""
    outbox = host.memory.outbox
    host.create(A)
    host.clock.step(30 * 86_400)
    host.create(B)
    host.clock.step(-30 * 86_400)
    host.create(C)
    assert waiting(host.memory) == [A, B, C], "what waits keeps its order"
    host.flush()
    host.clock.advance(1)
    host.create(handle(4))
    host.clock.advance(3)
    host.create(handle(5))
    assert (waiting(host.memory), outbox.age()) == ([handle(4), handle(5)], 3000)


def test_a_place_that_is_given_out_again_after_a_leap_is_not_taken_for_what_it_was(host: Host) -> None:
    """Who was sent from there waits no more; and whoever hears late that the backend has it crosses nobody off."""
    outbox, losses = host.memory.outbox, host.memory.outbox.losses()
    host.create(A, v=1)
    host.create(B, v=1)
    sent = outbox.oldest(9)
    places = [dirty.record.place for dirty in sent]
    host.clock.step(30 * 86_400)
    host.create(C)
    outbox.acknowledge(outbox.oldest(9), losses)
    host.clock.step(-30 * 86_400)
    host.create(handle(4))
    host.update(A, v=2)
    assert [dirty.record.place for dirty in outbox.oldest(9)] == places
    assert not outbox.holds(B)
    outbox.acknowledge(sent, losses)
    assert waiting(host.memory) == [handle(4), A]
    host.update(B, v=2)
    assert waiting(host.memory) == [handle(4), A, B]


@pytest.mark.usefixtures("one_by_one")
@pytest.mark.parametrize("steps", range(10))
def test_a_session_renewed_after_a_leap_while_batches_are_read_is_never_alive_twice(host: Host, steps: int) -> None:
    """Its end and its new row are both in front of what the flusher reads, or both behind it."""
    host.create(A)
    host.flush()
    host.clock.step(30 * 86_400)
    for n in range(20, 25):
        host.create(handle(n))
    host.clock.step(-30 * 86_400)
    running = Running(host.flusher().round())
    for _ in range(steps):
        if not running.done:
            running.step()
    host.flush()
    host.renew(A, B)
    host.backend.watch = lambda *_: never_both(host)
    with contextlib.suppress(Overtaken):
        running.finish()
    host.flush()
    host.agrees()


def never_both(host: Host) -> None:
    assert {host.backend.state(A), host.backend.state(B)} != {State.LIVE}, "both are alive"


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of one row, the next one read before this one is sent."""
    monkeypatch.setattr("shmsession.flusher.BATCH", 1)


def test_a_row_that_leads_nowhere_is_dropped(host: Host) -> None:
    """Only damage leaves one: nobody waits for it for ever."""
    host.create(A)

    def work(txn: Txn, tables: Tables) -> None:
        for number, key in ((5, B), (6, A)):
            txn.put(sequence_key(number), key, db=tables.outbox)

    host.memory.environment.write(work)
    assert len(host.memory.outbox) == 3
    assert [dirty.handle for dirty in host.memory.outbox.oldest(10)] == [A]
    assert waiting(host.memory) == [A]


@pytest.mark.parametrize("wrong", [B, C, bytes(21)], ids=["another's", "nobody's", "too long"])
def test_whose_handle_is_damaged_in_the_outbox_waits_again(host: Host, wrong: bytes) -> None:
    """What was committed reaches the backend all the same, and so does the other one."""
    host.create(A, v=1)
    host.create(B)
    ((place, _), _) = host.memory.outbox.rows()
    host.memory.environment.write(lambda txn, tables: txn.put(sequence_key(place), wrong, db=tables.outbox))
    host.memory.outbox.oldest(10)
    assert sorted(waiting(host.memory)) == [A, B]
    check_tables(host.memory)
    host.flush()
    assert host.backend.rows.keys() >= {A, B}


def test_a_record_whose_place_is_damaged_gets_another(host: Host) -> None:
    """The place is not sealed; what was committed reaches the backend all the same."""
    host.create(A, v=1)
    host.create(B)
    raw = host.memory.environment.get(A)
    assert raw is not None
    for damaged in (raw[:-1] + bytes([raw[-1] ^ 1]), raw[:-PLACE_BYTES] + NO_PLACE, raw[:-PLACE_BYTES] + b"\xff" * 8):
        put_raw(host.memory, A, damaged)
        host.memory.outbox.oldest(10)
        assert sorted(waiting(host.memory)) == [A, B]
        check_tables(host.memory)
    host.flush()
    assert host.backend.rows.keys() >= {A, B}


def test_a_corrupt_record_is_not_sent_and_stops_nobody(host: Host) -> None:
    host.create(A)
    host.create(B)
    raw = host.memory.environment.get(A)
    assert raw is not None
    put_raw(host.memory, A, spoilt(raw))
    run(host.flusher().round())
    assert set(host.backend.sessions()) == {B}
    assert waiting(host.memory) == []
    assert host.load(A) is Missing.UNKNOWN
    host.memory.environment.write(lambda txn, tables: txn.delete(A, db=tables.records))
    host.memory.environment.write(lambda txn, tables: _drop_rows_of(txn, tables, A))


def _drop_rows_of(txn: Txn, tables: Tables, key: bytes) -> None:
    for row in [bytes(row) for row in txn.cursor(tables.expiry).iternext(values=False)]:
        if row.endswith(key):
            txn.delete(row, db=tables.expiry)


def test_only_what_must_be_heard_of_waits(host: Host) -> None:
    """What no backend has or may have is none of its business: a memory-only session, and its death."""
    assert host.memory.create(A, sets(v=1)._replace(storable=False), host.clock.now())
    host.update(A, v=2)
    host.destroy(A)
    assert waiting(host.memory) == []
    host.create(B)
    host.change(B, Changes(storable=False))
    assert waiting(host.memory) == [B]
    host.destroy(B)
    assert waiting(host.memory) == [B]


def test_dead_wins_over_whatever_was_committed(host: Host) -> None:
    """`obey`: the record becomes a tombstone that does not wait; what is dead or unknown already stays what it is."""
    host.create(A)
    host.update(A, v=1)
    host.memory.outbox.obey(A, host.memory.outbox.losses())
    assert host.load(A) is Missing.DEAD
    assert waiting(host.memory) == []
    tombstone = header_of(host.memory, A)
    host.memory.outbox.obey(A, host.memory.outbox.losses())
    host.memory.outbox.obey(B, host.memory.outbox.losses())
    assert header_of(host.memory, A) == tombstone
    assert host.memory.environment.get(B) is None
    host.create(C)
    host.destroy(C)
    host.memory.outbox.obey(C, host.memory.outbox.losses())
    assert waiting(host.memory) == []
    assert host.load(C) is Missing.DEAD


@pytest.mark.parametrize(("by", "expected"), [((0, 5), (0, 6)), ((7, 1), (7, 2)), ((0, 1), (0, 1)), ((-1, 9), (0, 1))])
def test_a_newer_row_is_outnumbered_and_only_a_newer_one(
    host: Host, by: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Nothing of the data or the place in the outbox changes."""
    record = host.create(A, v=1)
    epoch = record.header.epoch
    host.memory.outbox.outnumber(A, epoch + by[0], by[1])
    found = host.load(A)
    assert isinstance(found, Record)
    assert (found.header.epoch - epoch, found.header.version) == expected
    assert found.data == record.data
    assert found.place == record.place


def test_what_does_not_wait_is_not_outnumbered(host: Host) -> None:
    """It was acknowledged meanwhile: there is nothing to send above anything."""
    host.create(A, v=1)
    host.flush()
    before = host.load(A)
    assert isinstance(before, Record)
    host.memory.outbox.outnumber(A, before.header.epoch, before.header.version)
    assert host.load(A) == before


def test_more_than_a_chunk_is_put_back_whole(host: Host) -> None:
    """Every record that a backend should have, tombstones too, and no other."""
    numbers = range(1, 3 * CHUNK + 2)
    for n in numbers:
        host.create(handle(n))
    host.memory.create(handle(900), sets(v=1)._replace(storable=False), host.clock.now())
    host.destroy(B)
    host.flush()
    host.backend.forget()
    host.flush(host.flusher())
    assert set(host.backend.sessions()) == {handle(n) for n in numbers}
    host.agrees()


def test_idle_ones_leave_memory_when_the_backend_has_them(host: Host) -> None:
    """Not what waits, not what is memory only, not what was used lately, no tombstone."""
    for n in range(1, 2 * CHUNK):
        host.create(handle(n))
    memory_only, dirty, recent, dead, looked = (handle(500 + n) for n in range(5))
    host.memory.create(memory_only, sets(v=1)._replace(storable=False), host.clock.now())
    for key in (dirty, dead, looked):
        host.create(key)
    host.destroy(dead)
    host.flush()
    host.clock.advance(hours=0.9)
    host.change(looked, Changes(touch=True))
    host.flush()
    host.clock.advance(hours=0.05)
    host.create(recent)
    host.flush()
    host.clock.advance(QUIET_MS / 1000)
    host.update(dirty, v=2)
    kept = {memory_only, dirty, recent, dead, looked}
    gone, after = 0, b""
    while True:
        more, after = host.memory.outbox.retire(host.clock.now(), int(HOUR * 0.9), after)
        gone += more
        if not after:
            break
    assert gone == 2 * CHUNK - 1
    assert {bytes(key) for key in check_tables(host.memory).records} == kept
    assert isinstance(host.read_through(A), Record)


def test_what_changed_within_a_minute_stays(host: Host) -> None:
    """An answer that is on its way must still meet it."""
    host.create(A)
    host.flush()
    changed = host.load(A)
    assert isinstance(changed, Record)
    host.clock.advance((changed.header.changed + QUIET_MS - 1 - host.clock.boot()) / 1000)
    assert host.memory.outbox.retire(host.clock.now(), 0, b"")[0] == 0
    host.clock.advance(0.001)
    assert host.memory.outbox.retire(host.clock.now(), 0, b"")[0] == 1


def test_a_crowd_is_evicted_only_from_what_the_backend_has(host: Host) -> None:
    host.create(A)
    host.create(B)
    host.flush()
    host.clock.advance(2 * QUIET_MS / 1000)
    host.update(B, v=1)
    host.clock.advance(2 * QUIET_MS / 1000)
    host.memory.evict(10)
    assert host.load(A) is Missing.UNKNOWN
    assert waiting(host.memory) == [B]
    assert isinstance(host.load(B), Record)


def test_what_expires_while_it_waits_becomes_a_tombstone_that_waits(host: Host) -> None:
    """It keeps its place; swept again and again, it is there until the backend has acknowledged it."""
    host.create(A)
    host.clock.advance(hours=2)
    for _ in range(4):
        host.memory.sweep(host.clock.now())
        header = header_of(host.memory, A)
        assert header is not None
        assert header.flags & TOMBSTONE
        assert header.flags & STORABLE
        assert waiting(host.memory) == [A]
        host.clock.advance(2 * QUIET_MS / 1000)
    host.flush()
    host.clock.advance(2 * QUIET_MS / 1000)
    host.memory.sweep(host.clock.now())
    assert host.memory.environment.get(A) is None


def test_what_is_committed_while_it_is_sent_waits_only_since_then(host: Host) -> None:
    """A session that is written all the time is sent all the time, and no sign of a database that is down."""
    outbox = host.memory.outbox
    host.create(A)
    host.create(B)
    host.clock.advance(3)
    sending = host.sending(A).until("write!")
    host.update(A, v=1)
    sending.finish()
    assert (waiting(host.memory), outbox.age()) == ([A], 0)
    host.create(C)
    sending = host.sending(A).until("write!")
    host.update(A, v=2)
    host.clock.advance(1)
    host.update(A, v=3)
    sending.finish()
    assert (waiting(host.memory), outbox.age()) == ([A], 0)
    host.flush()
    host.agrees()


def test_what_dies_while_it_is_sent_goes_before_what_it_was_renewed_to(host: Host) -> None:
    host.create(A)
    sending = host.sending(A).until("write!")
    host.renew(A, B)
    sending.finish()
    assert waiting(host.memory) == [A, B]


def test_where_room_is_short_what_was_committed_meanwhile_keeps_its_place(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To cross off what was sent is what makes room."""
    for key in (A, B):
        host.create(key)
    sent, outbox = host.memory.outbox.oldest(9), host.memory.outbox
    host.update(A, v=1)
    write, full = host.memory.environment.write, [StoreFull("by order")]

    def once_full(work: Callable[[Txn, Tables], Any]) -> Any:
        if full:
            raise full.pop()
        return write(work)

    monkeypatch.setattr(host.memory.environment, "write", once_full)
    place = sent[0].record.place
    outbox.acknowledge(sent, outbox.losses())
    assert [(dirty.handle, dirty.record.place) for dirty in outbox.oldest(9)] == [(A, place)]


def test_an_acknowledgement_names_the_very_bytes_that_were_sent(host: Host) -> None:
    """Another version, or the same one put back since, is not crossed off by it."""
    outbox = host.memory.outbox
    host.create(A)
    (sent,) = outbox.oldest(1)
    assert sent == Dirty(A, host.load(A))  # type: ignore[arg-type]
    host.update(A, v=1)
    outbox.acknowledge([sent], outbox.losses())
    assert waiting(host.memory) == [A]
    (sent,) = outbox.oldest(1)
    outbox.acknowledge([sent], outbox.losses())
    assert waiting(host.memory) == []
    outbox.send_again(A)
    outbox.acknowledge([sent], outbox.losses())
    assert waiting(host.memory) == [A]


def test_notes_are_kept_with_the_store(host: Host, place: Path) -> None:
    assert host.memory.outbox.note(b"beat") == 0
    host.flush()
    beat = host.memory.outbox.note(b"beat")
    assert beat > 0
    host.memory.environment.close()
    assert host.memory.outbox.note(b"beat") == beat
