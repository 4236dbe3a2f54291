"""The flusher: what it sends and when it crosses it off, and how it knows whose backend it is and what that forgot."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from shmsession.backends.base import FOREVER, SENTINEL, Answer, Row, State
from shmsession.errors import BackendError, BackendUnavailable, ShmSessionError, StoreFull
from shmsession.flusher import BATCH, HEARTBEAT_MS, SWEEP_LIMIT, SWEEP_MS, Flusher
from shmsession.hooks import BackendForgot, Flushed, FlushFailed, Hooks
from shmsession.record import Changes
from shmsession.sentinel import LONG_AGO_MS, NEIGHBOUR_MS
from shmsession.signalling import BACKOFF_MS, is_down
from shmsession.testing import ManualClock
from tests.backends import AFTER, BEFORE, FEWER, HALF, Host, MemoryBackend, Running, run, sets, values_in
from tests.memory import handle, waiting

A, B, C = handle(1), handle(2), handle(3)
STEPS = 16
"""More pauses than a round makes: tests that cut one go through all of them."""


@pytest.fixture
def host(place: Path) -> Iterator[Host]:
    with Host(place) as host:
        yield host


@pytest.fixture
def new_host(place: Path) -> Iterator[Callable[[], Host]]:
    """Makes hosts without end, each with a memory and a backend of its own."""
    made: list[Host] = []

    def make() -> Host:
        while made:
            made.pop().close()
        made.append(Host(place / str(make_count())))
        return made[-1]

    numbers = iter(range(1_000_000))

    def make_count() -> int:
        return next(numbers)

    yield make
    for host in made:
        host.close()


def attempt(flusher: Flusher) -> None:
    """What a candidate that holds the lease does when it wakes; the backend must not be `labelled`."""
    flusher.holds_lease = True
    asyncio.run(flusher._attempt())


def forgotten(host: Host) -> int:
    return sum(event.count for event in host.events if isinstance(event, BackendForgot))


# ── sending ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_session_is_written_once_however_often_it_was_committed(host: Host) -> None:
    host.create(A, n=0)
    for n in range(1, 20):
        host.update(A, n=n)
    run(host.flusher().round())
    assert [[row.version for row in batch] for batch in host.backend.sent if batch] == [[20]]
    host.agrees()


def test_the_oldest_go_first_and_a_hot_session_keeps_its_place(host: Host) -> None:
    for n in range(BATCH + 5):
        host.create(handle(n + 1), n=n)
    host.update(A, n=-1)
    flusher = host.flusher()
    assert run(flusher.round())
    first = next(batch for batch in host.backend.sent if batch)
    assert [row.handle for row in first] == [handle(n + 1) for n in range(BATCH)]
    assert not run(flusher.round())
    assert [row.handle for row in host.backend.sent[-1]] == [handle(n + 1) for n in range(BATCH, BATCH + 5)]
    host.agrees()


def test_what_is_written_all_the_time_is_sent_once_at_a_look(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches it takes, and the next time not before the next look."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        handles = [handle(n + 1) for n in range(2 * BATCH)]
        for one in handles:
            host.create(one, n=0)
        write, left = host.backend.write, iter(range(5))

        async def busy(rows: Sequence[Row]) -> Sequence[Answer]:
            """Meanwhile all are written again."""
            answers = await write(rows)
            if rows[0].handle != SENTINEL:
                n = next(left)
                for one in handles:
                    host.update(one, n=n)
            return answers

        monkeypatch.setattr(host.backend, "write", busy)
        attempt(host.flusher())
        assert sorted(row.handle for batch in host.backend.sent for row in batch) == handles
        assert sorted(waiting(host.memory)) == handles


def test_a_look_ends_though_there_is_no_room_to_put_back_what_the_backend_forgot(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keeping house makes room, and somebody who writes all the time must not keep the flusher from it."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        host.create(A, n=0)
        host.flush()
        host.backend.forget()
        host.update(A, n=1)
        monkeypatch.setattr(host.memory.outbox, "put_back", _full)
        write, left = host.backend.write, iter(range(9))

        async def busy(rows: Sequence[Row]) -> Sequence[Answer]:
            answers = await write(rows)
            if rows[0].handle != SENTINEL:
                host.update(A, n=next(left))
            return answers

        monkeypatch.setattr(host.backend, "write", busy)
        sent = len([batch for batch in host.backend.sent if batch])
        attempt(host.flusher())
        assert len([batch for batch in host.backend.sent if batch]) == sent + 1


def test_what_the_backend_has_is_crossed_off_while_it_writes_the_next(host: Host) -> None:
    """And a round that fails leaves no batch before it to be sent again."""
    for n in range(3 * BATCH + 1):
        host.create(handle(n + 1), n=n)
    flusher = host.flusher()
    assert run(flusher.round())
    assert len(host.memory.outbox) == 3 * BATCH + 1
    sending = host.sending(handle(BATCH + 1), flusher).until("write!")
    assert len(host.memory.outbox) == 2 * BATCH + 1
    sending.finish()
    host.backend.fail("write", BEFORE)
    with pytest.raises(BackendUnavailable):
        run(flusher.round())
    assert waiting(host.memory) == [handle(n + 1) for n in range(2 * BATCH, 3 * BATCH + 1)]


def test_a_death_is_crossed_off_before_the_rest_is_written(host: Host) -> None:
    """Whoever logs out waits for it."""
    host.create(A)
    host.flush()
    host.destroy(A)
    host.create(B)
    sending = host.sending(B)
    assert host.backend.state(A) is State.DEAD
    assert waiting(host.memory) == [B]
    sending.finish()


def test_what_was_sent_is_crossed_off_before_the_backend_is_looked_at_again(host: Host) -> None:
    for n in range(BATCH + 1):
        host.create(handle(n + 1), n=n)
    flusher = host.flusher()
    assert run(flusher.round())
    host.clock.advance(HEARTBEAT_MS / 1000)
    greeting = Running(flusher.round()).until("load")
    assert len(host.memory.outbox) == 1
    greeting.finish()


def test_what_cannot_be_crossed_off_now_is_so_later_and_not_sent_again(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store may be too full for a moment; the attempt that meets it there says so."""
    for n in range(3 * BATCH):
        host.create(handle(n + 1), n=n)
    flusher = host.flusher()
    assert run(flusher.round())
    with monkeypatch.context() as patch:
        patch.setattr(host.memory.outbox, "acknowledge", _full)
        assert run(flusher.round())
        with pytest.raises(StoreFull):
            run(flusher.round())
    assert len(host.memory.outbox) == 3 * BATCH
    host.flush(flusher)
    assert [row.handle for batch in host.backend.sent for row in batch] == [handle(n + 1) for n in range(3 * BATCH)]
    host.agrees()


def test_a_backend_that_fails_beside_a_full_store_is_left_alone_for_a_while(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes wrong in crossing off hides no error of the backend's."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        for n in range(3 * BATCH):
            host.create(handle(n + 1), n=n)

        def full(*_: object) -> None:
            host.backend.fail("write", BEFORE)
            raise StoreFull("as a full store does")

        monkeypatch.setattr(host.memory.outbox, "acknowledge", full)
        attempt(host.flusher())
        assert len(host.backend.rows) == BATCH + 1
        assert is_down(host.memory.environment, host.clock)


def test_a_flusher_ends_when_it_is_cancelled_beside_a_full_store(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(2 * BATCH):
        host.create(handle(n + 1), n=n)
    flusher = host.flusher()
    assert run(flusher.round())
    monkeypatch.setattr(host.memory.outbox, "acknowledge", _full)

    async def cancelled() -> None:
        flusher.holds_lease = True
        monkeypatch.setattr(flusher, "round", asyncio.Event().wait)
        attempting = asyncio.create_task(flusher._attempt())
        await asyncio.sleep(0)
        attempting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempting

    asyncio.run(cancelled())


def _full(*_: object, **__: object) -> None:
    raise StoreFull("as a full store does")


def test_a_commit_while_the_answer_is_awaited_waits_for_the_next_round(host: Host) -> None:
    host.create(A, n=1)
    flusher = host.flusher()
    sending = host.sending(A, flusher).until("write!")
    host.update(A, n=2)
    sending.finish()
    assert waiting(host.memory) == [A]
    assert host.backend.rows[A].version == 1
    run(flusher.round())
    assert host.backend.rows[A].version == 2
    host.agrees()


@pytest.mark.parametrize("how", [BEFORE, AFTER, HALF])
@pytest.mark.parametrize("call", ["initialize", "load", "write"])
def test_a_call_that_fails_loses_nothing(host: Host, call: str, how: str) -> None:
    """Whether or not the backend did what it was asked, the commits wait, and arrive at the next attempt."""
    flusher = host.flusher()
    for n in range(1, 7):
        host.create(handle(n), n=n)
        host.backend.fail(call, how)
        if n % 2:
            flusher = host.flusher()
        with pytest.raises(BackendUnavailable):
            _until_it_fails(host, flusher, renewed=call != "write")
        assert handle(n) in waiting(host.memory) or handle(n) in host.backend.rows
        flusher._failed(BackendUnavailable("as its caller does"))
    host.backend.heal()
    host.flush(flusher)
    host.agrees()


def _until_it_fails(host: Host, flusher: Flusher, *, renewed: bool) -> None:
    for _ in range(3):
        run((host.flusher() if renewed else flusher).round())
        host.clock.advance(HEARTBEAT_MS / 1000)


def test_a_backend_that_answers_for_half_a_batch_is_an_error(host: Host) -> None:
    """Nothing is crossed off for an answer that is not there, nothing is taken for forgotten, no row is lost."""
    flusher = host.flusher()
    host.create(handle(99))
    host.flush(flusher)
    for rows in range(1, 6):
        for n in range(rows):
            host.create(handle(10 * rows + n), n=n)
        host.backend.fail("write", FEWER)
        with pytest.raises(BackendError):
            run(flusher.round())
        host.backend.heal()
        flusher._failed(BackendError("as its caller does"))
        host.flush(flusher)
        host.agrees()
    assert forgotten(host) == 0


def test_an_error_that_is_not_ours_ends_no_candidate(place: Path) -> None:
    """A backend of somebody's own raises whatever its driver raises: the flusher counts it, waits, and goes on."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        flusher = host.flusher()
        for number, call in enumerate(("initialize", "load", "write", "sweep")):
            host.create(handle(number + 1), v=1)
            host.backend.error = lambda name: OSError(f"{name}: the driver's own error")
            host.backend.fail(call)
            attempt(flusher)
            host.clock.advance(SWEEP_MS / 1000)
            flusher = host.flusher()
        assert host.memory.environment.counters.totals()["flush_errors"] == 4
        host.backend.heal()
        attempt(flusher)
        host.agrees()


def test_where_an_error_that_is_not_ours_comes_from_is_logged_once_and_not_what_it_says(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever wrote the backend must find the line; a driver's message may hold a password."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        host.create(A)
        host.backend.error = lambda _: ValueError("hunter2")
        host.backend.fail("initialize", times=3)
        flusher = host.flusher()
        for _ in range(3):
            attempt(flusher)
            host.clock.advance(BACKOFF_MS[1] / 1000)
        (record,) = caplog.records
        assert "ValueError" in record.message
        assert "in initialize" in record.message
        assert "hunter2" not in caplog.text


def _told(error: type[Exception], call: str) -> Exception:
    return error(f"{call} fails by order")


def test_a_backend_that_is_away_is_not_made_anew_and_one_that_lost_its_tables_is(place: Path) -> None:
    """What does not answer comes back with what it had: nobody is logged out by an empty one in its place."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        host.create(A)
        flusher = host.flusher()
        attempt(flusher)
        for number, (error, again) in enumerate(((BackendUnavailable, False), (BackendError, True), (OSError, True))):
            host.create(handle(10 + number))
            host.backend.error = partial(_told, error)
            host.backend.fail("write")
            before = host.backend.calls.count("initialize")
            attempt(flusher)
            host.clock.advance(BACKOFF_MS[1] / 1000)
            attempt(flusher)
            assert host.backend.calls.count("initialize") == before + again
            assert waiting(host.memory) == []


def test_after_failures_nobody_asks_for_longer_and_longer(place: Path) -> None:
    """The pause doubles from 100 ms to 5 s, is cut by up to half by chance, and ends with the first success."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        host.create(A)
        flusher, environment, clock = host.flusher(), host.memory.environment, host.clock
        host.backend.fail("initialize", times=10)
        for failure in range(10):
            most = min(BACKOFF_MS[1], BACKOFF_MS[0] << failure)
            attempt(flusher)
            pause = environment.backend_down_until - clock.boot()
            assert most // 2 - 1 <= pause <= most
            asked = len(host.backend.calls)
            attempt(flusher)
            assert len(host.backend.calls) == asked, "it asked during the pause"
            clock.advance(pause / 1000)
        attempt(flusher)
        assert environment.backend_down_until <= clock.boot()
        host.agrees()
        host.create(B)
        host.backend.fail("write")
        attempt(flusher)
        assert environment.backend_down_until - clock.boot() <= BACKOFF_MS[0]
        assert [type(event) for event in host.events].count(FlushFailed) == 11
        assert environment.counters.totals()["flush_errors"] == 11


def test_trouble_with_the_memory_is_not_taken_for_trouble_with_the_backend(place: Path) -> None:
    """A full memory store stops nobody from asking the backend for a session."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        host.create(A)
        flusher = host.flusher()

        def full(limit: int, size: int, *_: object) -> NoReturn:
            raise StoreFull(f"{limit} of them, {size} bytes, do not fit, by order")

        flusher._outbox.oldest = full  # type: ignore[method-assign, assignment]
        attempt(flusher)
        assert host.memory.environment.counters.totals()["flush_errors"] == 1
        assert host.memory.environment.backend_down_until <= host.clock.boot()


def test_what_happens_is_counted_and_told(host: Host) -> None:
    host.create(A)
    host.create(B)
    host.flush()
    totals = host.memory.environment.counters.totals()
    assert (totals["batches"], totals["rows"], totals["flush_errors"]) == (1, 2, 0)
    assert Flushed(2) in host.events


def test_a_drain_ends_when_nothing_waits_that_it_may_send(place: Path) -> None:
    """With the backend down it goes on trying; what only another process can read it leaves at once."""
    from shmsession.keyring import Key, Keyring

    old, new = Key(bytes(range(32))), Key(bytes(range(1, 33)))
    backend = MemoryBackend(labelled=False)
    with (
        Host(place, backend, keyring=Keyring([old])) as host,
        Host(place, backend, host.clock, keyring=Keyring([old, new])) as newer,
    ):
        host.create(A)
        assert asyncio.run(host.flusher().drain(60))
        newer.create(B)
        rounds, flusher = 0, host.flusher()
        whole = flusher.round

        async def counted() -> bool:
            nonlocal rounds
            rounds += 1
            return await whole()

        flusher.round = counted  # type: ignore[method-assign]
        assert not asyncio.run(flusher.drain(0.25))
        assert rounds < 30, "it span"
        assert asyncio.run(newer.flusher().drain(60))
        newer.agrees()


@pytest.mark.parametrize("trouble", ["a dead backend", "its own time-outs", "a full store", "a neighbour"])
def test_a_drain_asks_no_more_than_once_a_second_what_has_just_failed(place: Path, trouble: str) -> None:
    """Each attempt is counted, told to the hooks, and one more question to whoever is in trouble already."""
    backend, clock = MemoryBackend(labelled=False), ManualClock()
    with Host(place / "one", backend, clock) as one, Host(place / "two", backend, clock, name="other") as two:
        one.create(A)
        if trouble == "a neighbour":
            one.flush()
        two.create(B)
        flusher = two.flusher()
        if trouble == "a full store":
            flusher._outbox.note_loss = _full  # type: ignore[method-assign]
        elif trouble != "a neighbour":
            backend.fail("initialize", times=100)
            backend.error = TimeoutError if trouble == "its own time-outs" else backend.error
        before = len(backend.calls)
        assert not asyncio.run(flusher.drain(0.3))
        assert len(backend.calls) <= before + 2, "more than one look"
        assert [type(event) for event in two.events].count(FlushFailed) == 1


def test_a_drain_goes_on_when_the_backend_may_be_asked_again(place: Path) -> None:
    """It waits as long as the flusher does after each failure, and no longer."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        pauses: list[int] = []

        def time_passes(event: object) -> None:
            if isinstance(event, FlushFailed):
                pauses.append(host.memory.environment.backend_down_until - host.clock.boot())
                host.clock.advance(pauses[-1] / 1000)

        host.create(A)
        host.backend.fail("initialize", times=4)
        flusher = host.flusher()
        flusher._hooks = Hooks([time_passes])
        assert asyncio.run(flusher.drain(60))
        assert [BACKOFF_MS[0] << n >= pause >= BACKOFF_MS[0] << n >> 1 for n, pause in enumerate(pauses)] == [True] * 4
        host.agrees()


def test_the_backend_is_swept_once_a_minute_until_nothing_is_due(place: Path) -> None:
    with Host(place, MemoryBackend(labelled=False)) as host:
        for n in range(2 * SWEEP_LIMIT + 10):
            row = Row(handle(n + 1), State.DEAD, 1, 1, host.clock.now() - 1)
            host.backend.rows[row.handle] = row
        kept = Row(C, State.LIVE, 1, 1, host.clock.now(), b"", b"x")
        host.backend.rows[C] = kept
        flusher = host.flusher()
        attempt(flusher)
        assert len(host.backend.sessions()) > SWEEP_LIMIT, "what waits is sent in between"
        attempt(flusher)
        attempt(flusher)
        assert host.backend.sessions() == {C: kept}
        swept = host.backend.calls.count("sweep")
        attempt(flusher)
        assert host.backend.calls.count("sweep") == swept == 3
        host.clock.advance(SWEEP_MS / 1000)
        attempt(flusher)
        assert host.backend.calls.count("sweep") == swept + 1
        assert SENTINEL not in host.backend.rows or host.backend.rows[SENTINEL].horizon > FOREVER


def test_who_has_lost_the_lease_meanwhile_does_not_sweep(place: Path) -> None:
    """Whoever has it now does."""
    with Host(place, MemoryBackend(labelled=False)) as host:
        flusher = host.flusher()
        whole = flusher.round

        async def round_() -> bool:
            flusher.holds_lease = False
            return await whole()

        flusher.round = round_  # type: ignore[method-assign]
        attempt(flusher)
        assert "load" in host.backend.calls
        assert "sweep" not in host.backend.calls


# ── the answers ───────────────────────────────────────────────────────────────────────────────────────────────


def test_refused_by_an_equal_one_is_done(host: Host) -> None:
    """The reply to a write was lost: the same row again is refused, and crossed off."""
    host.create(A)
    flusher = host.flusher()
    run(flusher.round())
    host.create(B)
    host.backend.fail("write", AFTER)
    with pytest.raises(BackendUnavailable):
        run(flusher.round())
    assert waiting(host.memory) == [B]
    flusher._failed(BackendUnavailable("as its caller does"))
    run(flusher.round())
    host.agrees()
    assert host.mark(B) == host.backend.rows[B].mark


def test_refused_by_a_newer_one_is_sent_again_above_it(host: Host) -> None:
    """A store that is gone had numbered higher: what was committed here wins, in one more round, and there it ends."""
    host.create(A, v="here")
    flusher = host.flusher()
    run(flusher.round())
    epoch, version = host.backend.rows[A].epoch, 40
    host.backend.rows[A] = host.backend.rows[A]._replace(epoch=epoch + 5, version=version)
    host.update(A, v="newer")
    sent = len(host.backend.sent)
    run(flusher.round())
    assert waiting(host.memory) == [A]
    run(flusher.round())
    host.agrees()
    assert (host.backend.rows[A].epoch, host.backend.rows[A].version) == (epoch + 5, version + 1)
    assert len(host.backend.sent) == sent + 2
    assert values_in(host.load(A)) == {"v": "newer"}
    run(flusher.round())
    assert len(host.backend.sent) == sent + 2


def test_refused_by_our_own_newer_one_changes_nothing(host: Host) -> None:
    """A flusher that was slow is refused by what a faster one of the same store has sent: that is no news."""
    host.create(A, n=1)
    host.flush()
    host.update(A, n=2)
    slow = host.sending(A)
    host.update(A, n=3)
    host.flush()
    before = host.mark(A)
    slow.finish()
    assert host.mark(A) == before
    host.agrees()


def test_refused_by_nothing_is_an_error_and_costs_the_others_nothing(host: Host) -> None:
    host.create(A)
    host.flush()
    host.create(B)
    host.create(C)
    whole = host.backend._put

    def broken(row: Row) -> object:
        answer = whole(row)
        return answer._replace(applied=False, before=None) if row.handle == B else answer

    host.backend._put = broken  # type: ignore[assignment, method-assign]
    flusher = host.flusher()
    with pytest.raises(BackendError, match="fake"):
        run(flusher.round())
    assert B in waiting(host.memory)


# ── whose backend is it? ──────────────────────────────────────────────────────────────────────────────────────


def sentinel(host: Host) -> Row:
    return host.backend.rows[SENTINEL]


def test_at_first_contact_all_that_memory_has_is_sent(place: Path) -> None:
    """A store that had no backend until now: what was committed before is sent as well."""
    from tests.memory import memory_store

    clock = ManualClock()
    alone = memory_store(place, clock, map_size=4 << 20)
    for n in range(1, 150):
        assert alone.create(handle(n), sets(n=n), clock.now())
    alone.close()
    with Host(place, clock=clock) as host:
        assert waiting(host.memory) == []
        host.flush()
        assert len(host.backend.sessions()) == 149
        host.agrees()
        assert sentinel(host).epoch == host.memory.environment.epoch


def test_our_own_sentinel_sends_nothing_again(host: Host) -> None:
    """A restart of every process, an error, a change of the flusher: what the backend has it is not sent."""
    for n in range(1, 100):
        host.create(handle(n), n=n)
    host.flush()
    host.events.clear()
    sent = sum(map(len, host.backend.sent))
    for _ in range(3):
        host.flush(host.flusher())
    assert sum(map(len, host.backend.sent)) == sent
    assert forgotten(host) == 0


@pytest.mark.parametrize("contact", ["greeting", "batch", "heartbeat"])
@pytest.mark.parametrize("loss", ["everything", "the latest"])
def test_a_backend_that_forgot_is_sent_all_again(host: Host, contact: str, loss: str) -> None:
    """It lost everything, or what came after a snapshot: noticed at the first contact, whichever that is."""
    flusher = host.flusher()
    for n in range(1, 120):
        host.create(handle(n), n=n)
    host.flush(flusher)
    snapshot = host.backend.snapshot()
    host.update(A, n="later")
    host.destroy(B)
    host.create(handle(500), n="new")
    host.flush(flusher)
    host.agrees()
    host.backend.restore(snapshot if loss == "the latest" else {})
    if contact == "greeting":
        flusher = host.flusher()
    elif contact == "batch":
        host.create(C if host.load(C) is None else handle(600), n=1)
    else:
        host.clock.advance(HEARTBEAT_MS / 1000)
    host.events.clear()
    run(flusher.round())
    host.flush(flusher)
    host.agrees()
    assert forgotten(host) in (120, 121), "all that it had, and perhaps the row that told"
    assert host.backend.state(B) is State.DEAD


def test_loss_is_noticed_wherever_a_flusher_is_killed(new_host: Callable[[], Host]) -> None:
    """The backend forgets; the next flusher dies at each of its pauses in turn; the one after it sends all again."""
    for killed_at in range(1, 2 * STEPS):
        for greeted in (False, True):
            host = new_host()
            veteran, victim = host.flusher(), host.flusher()
            for n in range(1, 60):
                host.create(handle(n), n=n)
            host.flush(veteran)
            host.flush(victim)
            host.backend.forget()
            host.create(handle(100), n="since")
            dying = Running(victim.round())
            for _ in range(killed_at):
                if not dying.done:
                    dying.step()
            dying.abandon()
            host.flush(veteran if greeted else host.flusher())
            host.agrees()


def test_loss_is_noticed_whenever_it_happens_and_whichever_reply_is_lost(new_host: Callable[[], Host]) -> None:
    """The backend forgets at each pause of a round in turn, and one of the calls that follow raises after it was done:
    that the row stands there now must not hide that nothing stood there before."""
    for moment in range(STEPS):
        for lost in range(4):
            host = new_host()
            flusher = host.flusher()
            host.create(A, n=1)
            host.flush(flusher)
            host.create(B, n=2)
            going = Running((host.flusher() if lost % 2 else flusher).round())
            for _ in range(moment):
                if not going.done:
                    going.step()
            host.backend.forget()
            if lost:
                host.backend.fail("write", AFTER)
            for attempts in range(6):
                try:
                    going.finish()
                except ShmSessionError as error:
                    flusher._failed(error)
                going = Running((host.flusher() if attempts == 2 else flusher).round())
                host.clock.advance(HEARTBEAT_MS / 1000)
            going.abandon()
            host.flush(flusher)
            host.agrees()


def test_a_zombie_crosses_off_nothing_that_was_forgotten_since(new_host: Callable[[], Host]) -> None:
    """A flusher is stopped before it hears that its row was stored; the backend forgets; another sends all again, and
    at each of its pauses in turn the first one goes on: no row may be crossed off that is not there."""
    for moment in range(2 * STEPS):
        host = new_host()
        flusher, zombie = host.flusher(), host.flusher()
        host.create(B)
        host.flush(zombie)
        host.flush(flusher)
        host.create(A)
        stopped = host.sending(A, zombie).until("write!")
        host.backend.forget()
        going = Running(host.flusher().round())
        for step in range(2 * STEPS):
            for running in (stopped, going) if step == moment else (going,):
                try:
                    while not running.done:
                        running.step()
                        if running is going:
                            break
                except BackendError:
                    pass
        host.flush(flusher)
        host.agrees()


def test_a_zombie_that_was_about_to_greet_does_not_hide_that_the_backend_forgot(host: Host) -> None:
    """It knew what stood there, nothing, and says so by a horizon that is kept though its row is refused."""
    zombie = Running(host.flusher().round()).until("write")
    flusher = host.flusher()
    host.create(A)
    host.flush(flusher)
    host.backend.forget()
    host.create(B)
    sending = host.sending(B, flusher).until("write!")
    with contextlib.suppress(BackendError):
        zombie.finish()
    sending.finish()
    host.flush(flusher)
    host.agrees()


def test_a_zombie_does_not_make_older_what_was_acknowledged_since(host: Host) -> None:
    """It was stopped before it took note of its answer, and goes on much later: a backend that then falls back to a
    snapshot in between is still found to be older."""
    host.create(A, n=0)
    flusher, zombie = host.flusher(), host.flusher()
    host.flush(flusher)
    host.flush(zombie)
    host.create(B)
    stopped = host.sending(B, zombie).until("write!")
    host.flush(host.flusher())
    for n in range(3):
        host.update(A, n=n)
        host.flush(host.flusher())
    snapshot = host.backend.snapshot()
    host.update(A, n="last")
    host.flush(host.flusher())
    stopped.finish()
    host.backend.restore(snapshot)
    host.flush(host.flusher())
    host.agrees()


def test_putting_back_is_finished_by_whoever_takes_over(new_host: Callable[[], Host]) -> None:
    """Also by a candidate that held the lease before, and has long since made the backend's acquaintance."""
    for killed_after in range(1, 2 * STEPS):
        host = new_host()
        first, second = host.flusher(), host.flusher()
        for n in range(1, 160):
            host.create(handle(n), n=n)
        for flusher in (second, first, second):
            host.flush(flusher)
        host.backend.forget()
        host.clock.advance(HEARTBEAT_MS / 1000)
        dying: Running[bool] | None = None
        for _ in range(killed_after):
            dying = Running(first.round()) if dying is None or dying.done else dying
            dying.step()
        assert dying is not None
        dying.abandon()
        host.flush(second)
        host.agrees()


def test_a_crowded_store_is_put_back_too(place: Path) -> None:
    """As full as updates may make it: a place in the outbox for every record may not fit at once, and must not stop
    what waits from being sent."""
    with Host(place, map_size=1 << 20) as host:
        flusher = host.flusher()
        stored = _until_full(host, flusher, lambda n: host.login(handle(n), v="x" * 30))
        _until_full(host, flusher, lambda n: host.update(handle(n), v="y" * 120))
        host.agrees()
        host.backend.forget()
        host.clock.advance(HEARTBEAT_MS / 1000)
        for _ in range(100):
            try:
                run(flusher.round())
            except ShmSessionError as error:
                flusher._failed(error)
            host.clock.advance(HEARTBEAT_MS / 1000)
            if len(host.backend.sessions()) == stored and not len(host.memory.outbox):
                break
        host.agrees()


def _until_full(host: Host, flusher: Flusher, work: Callable[[int], object]) -> int:
    """Work on session after session, until there is no room; on how many."""
    for number in range(1, 100_000):
        try:
            work(number)
        except StoreFull:
            _send_all(host, flusher)
            return number - 1
        if number % 200 == 0:
            _send_all(host, flusher)
    raise AssertionError("it is never full")


def _send_all(host: Host, flusher: Flusher) -> None:
    while len(host.memory.outbox):
        run(flusher.round())


@pytest.fixture
def neighbours(place: Path) -> Iterator[tuple[Host, Host]]:
    """Two stores that were given one backend."""
    backend, clock = MemoryBackend(), ManualClock()
    with Host(place / "one", backend, clock) as one, Host(place / "two", backend, clock, name="other") as two:
        yield one, two


@pytest.fixture(autouse=True)
def directories(place: Path) -> None:
    for name in ("one", "two"):
        (place / name).mkdir(mode=0o700)


def test_a_store_that_is_alive_keeps_its_backend(neighbours: tuple[Host, Host]) -> None:
    """Another one is refused with the reason; it writes nothing, its outbox waits, and it may still read."""
    one, two = neighbours
    one.create(A, v=1)
    one.flush()
    two.create(B, v=2)
    before = one.backend.snapshot()
    for _ in range(3):
        with pytest.raises(BackendError, match="allow_shared"):
            run(two.flusher().round())
    assert one.backend.snapshot() == before
    assert waiting(two.memory) == [B]
    assert values_in(two.read_through(A)) == {"v": 1}
    one.clock.advance(HEARTBEAT_MS / 1000)
    one.flush()
    one.agrees()


def test_reads_go_on_beside_a_live_neighbour(place: Path) -> None:
    """Being refused is no outage: nobody is kept from asking. Each attempt is counted, and the hooks are told once."""
    backend, clock = MemoryBackend(labelled=False), ManualClock()
    with Host(place / "one", backend, clock) as one, Host(place / "two", backend, clock, name="other") as two:
        one.create(A)
        one.flush()
        two.create(B)
        flusher = two.flusher()
        for _ in range(3):
            attempt(flusher)
        assert two.memory.environment.counters.totals()["flush_errors"] == 3
        assert two.memory.environment.backend_down_until == 0
        (event,) = (event for event in two.events if isinstance(event, FlushFailed))
        assert "allow_shared" in event.reason


@pytest.mark.parametrize("ahead", [-7, -1, 1, 5, 7])
def test_a_neighbours_clock_that_is_wrong_by_seconds_does_not_hide_it(place: Path, ahead: int) -> None:
    """Two hosts' clocks agree to some seconds at best: a live store is a live store."""
    backend, clock = MemoryBackend(), ManualClock()
    clock.step(ahead)
    with Host(place / "one", backend, clock) as one, Host(place / "two", backend, name="other") as two:
        one.create(A)
        one.flush()
        two.create(B)
        with pytest.raises(BackendError, match="allow_shared"):
            run(two.flusher().round())


def _succeed(one: Host, two: Host) -> None:
    """`two` looks, and looks again when `one` has been silent for long enough."""
    flusher = two.flusher()
    with pytest.raises(BackendError, match="allow_shared"):
        run(flusher.round())
    one.clock.advance((NEIGHBOUR_MS + 1) / 1000)
    run(flusher.round())


@pytest.mark.parametrize("ahead", [-30, 3600])
def test_a_live_store_is_not_succeeded_though_its_clock_is_wrong(neighbours: tuple[Host, Host], ahead: int) -> None:
    """As long as its sentinel changes, it lives."""
    one, two = neighbours
    flusher, watching = one.flusher(), two.flusher()
    one.create(A, v=1)
    one.flush(flusher)
    two.create(B, v=2)
    for _ in range(5):
        one.clock.step(ahead)
        one.clock.advance(HEARTBEAT_MS / 1000)
        run(flusher.round())
        one.clock.step(-ahead)
        with pytest.raises(BackendError, match="allow_shared"):
            run(watching.round())
    assert waiting(two.memory) == [B]


def test_a_store_that_was_silent_for_long_is_succeeded_at_once(neighbours: tuple[Host, Host]) -> None:
    one, two = neighbours
    one.create(A, v=1)
    one.flush()
    one.clock.advance(LONG_AGO_MS / 1000)
    two.create(B, v=2)
    two.flush()
    two.agrees()


def test_a_silent_store_is_succeeded_and_stays_out(neighbours: tuple[Host, Host]) -> None:
    """After its silence the other takes over, with a higher epoch; when the first goes on it is the one refused."""
    one, two = neighbours
    one.create(A, v=1)
    one.flush()
    two.create(B, v=2)
    _succeed(one, two)
    assert two.memory.environment.epoch > one.memory.environment.epoch
    assert sentinel(two).epoch == two.memory.environment.epoch
    two.flush()
    two.agrees()
    one.update(A, v=3)
    late = one.flusher()
    with pytest.raises(BackendError, match="allow_shared"):
        run(late.round())
    assert waiting(one.memory) == [A]


def test_a_store_that_was_succeeded_in_the_middle_stays_out(neighbours: tuple[Host, Host]) -> None:
    """Its batch was on the way when it fell silent: no harm, and its next one is refused."""
    one, two = neighbours
    flusher = one.flusher()
    one.create(A, v=1)
    one.flush(flusher)
    one.update(A, v=2)
    late = one.sending(A, flusher)
    two.create(B)
    _succeed(one, two)
    ours = sentinel(two)
    late.finish()
    assert sentinel(two) == ours
    one.update(A, v=3)
    with pytest.raises(BackendError, match="allow_shared"):
        run(flusher.round())
    two.flush()
    two.agrees()


def test_shared_stores_write_side_by_side(place: Path) -> None:
    """With allow_shared nobody writes the sentinel, and nobody is refused."""
    backend, clock = MemoryBackend(), ManualClock()
    with Host(place / "one", backend, clock) as one, Host(place / "two", backend, clock, name="other") as two:
        for host, key in ((one, A), (two, B), (one, C)):
            host.create(key)
            run(host.flusher(shared=True).round())
            host.agrees()
        assert SENTINEL not in backend.rows
        assert set(backend.rows) == {A, B, C}


def test_the_same_place_is_taken_over_at_once(place: Path) -> None:
    """Memory was lost, and the store begins anew in the same directory: nobody waits for its own silence."""
    import shutil

    with Host(place) as host:
        host.create(A, v=1)
        host.flush()
    shutil.rmtree(place / "test")
    with Host(place, host.backend, host.clock) as again:
        again.create(B, v=2)
        run(again.flusher().round())
        assert again.memory.environment.epoch > sentinel(host).epoch - 1
        assert values_in(again.read_through(A)) == {"v": 1}
        again.flush()
        again.agrees()


def test_memory_that_was_lost_numbers_above_what_it_had(place: Path) -> None:
    """Also when the wall clock went back meanwhile: the epoch is raised above the backend's, in every process."""
    import shutil

    with Host(place) as host:
        host.create(A, v=1)
        for n in range(9):
            host.update(A, v=n)
        host.flush()
    shutil.rmtree(place / "test")
    host.clock.step(-86_400)
    with Host(place, host.backend, host.clock) as again:
        assert again.memory.environment.epoch < sentinel(host).epoch
        assert values_in(again.read_through(A)) == {"v": 8}
        again.update(A, v="here")
        before = sentinel(host).epoch
        again.flush()
        assert again.memory.environment.epoch == before + 1 == sentinel(host).epoch
        again.agrees()
        again.update(A, v="and now")
        again.flush()
        assert host.backend.rows[A].epoch == before + 1


def test_a_sentinel_that_is_no_longer_one_is_replaced(host: Host) -> None:
    """Somebody wrote something else there: it says nothing, so all is sent again under a sentinel of our own."""
    host.create(A)
    host.flush()
    host.backend.rows[SENTINEL] = sentinel(host)._replace(body=b"?", epoch=sentinel(host).epoch + 3)
    host.backend.rows.pop(A)
    host.flush(host.flusher())
    host.agrees()


def test_two_flushers_of_one_store_do_no_harm(new_host: Callable[[], Host]) -> None:
    """Two hold the lease for a moment: in whichever way their rounds meet, all arrives, and nothing seems forgotten."""
    for lead in range(STEPS):
        for seed in range(4):
            host = new_host()
            one, two = host.flusher(), host.flusher()
            host.create(A)
            host.flush(one)
            if seed % 2:
                host.flush(two)
            host.events.clear()
            for n in range(2, 6):
                host.create(handle(n), n=n)
            first, second = Running(one.round()), Running(two.round())
            for _ in range(lead):
                _step(first)
            host.update(A, n=1)
            host.change(handle(2), Changes(touch=True))
            for turn in range(3 * STEPS):
                _step(second if (turn + seed) % 3 else first)
            host.flush(one)
            host.agrees()
            assert forgotten(host) == 0


def _step(running: Running[bool]) -> None:
    if not running.done:
        with contextlib.suppress(BackendError):
            running.step()
