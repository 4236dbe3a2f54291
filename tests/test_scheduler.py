"""G3: whatever two requests and the housekeeping do to one session, in whatever order, nothing dead comes back.

Two requests hold the same cookie. A schedule says which of them does what next; `Run` carries it out, one step at a
time, and keeps its own account of what must be dead, who may hold the data, and which ids a response may carry. A
failing schedule is printed as the arguments of `replay`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

import pytest

from shmsession.codec import decode, encode
from shmsession.errors import SessionGone
from shmsession.memory.seal import RecordSeal
from shmsession.memory.store import MemoryStore, Missing
from shmsession.memory.tables import Tables, Txn
from shmsession.record import TOMBSTONE, Header, Record
from shmsession.session import Session
from shmsession.testing import ManualClock, make_store
from tests.figures import report, rng, size
from tests.memory import check_tables


class Op(Enum):
    """What a request does next; END is its response."""

    READ = "read"
    SET = "set"
    SLOW = "slow"
    RENEW = "renew"
    DESTROY = "destroy"
    SWEEP = "sweep"
    EVICT = "evict"
    FILL = "fill"
    END = "end"

    def __repr__(self) -> str:
        return f"Op.{self.name}"


OPS: Final = tuple(op for op in Op if op is not Op.END)
Step = tuple[int, Op]
MINUTE = 61


class Variant(NamedTuple):
    """`fresh`: a fill answers a miss of just now, not of the start. `passes`: a minute passes before housekeeping.

    `login`: a renewal logs in. `backend`: every commit is noted for a backend, which acknowledges at once.
    """

    fresh: bool
    passes: bool
    login: bool
    backend: bool


class World:
    """One store for many schedules."""

    def __init__(self, directory: Path, *, backend: bool) -> None:
        self.clock = ManualClock()
        self.store = make_store(directory, self.clock)
        if backend:
            config = self.store.config
            self.store._memory = MemoryStore(
                config.directory, "backed", self.store.keyring, config.lifetimes, self.clock, map_size=config.map_size,
                backend=True,
            )  # fmt: skip
        self.memory = self.store.memory
        self.backend = backend
        self.seal = RecordSeal(self.store.keyring)
        self.prefix = f"{self.store.transport.name}="

    def wipe(self) -> None:
        def work(txn: Txn, tables: Tables) -> None:
            for table in (tables.records, tables.expiry, tables.outbox, tables.users):
                txn.drop(table, delete=False)

        self.memory.environment.write(work)

    def acknowledge(self) -> None:
        """The backend has it all: nothing is dirty any more."""

        def work(txn: Txn, tables: Tables) -> None:
            txn.drop(tables.outbox, delete=False)

        if self.memory.environment.read(lambda txn, tables: txn.stat(tables.outbox)["entries"]):
            self.memory.environment.write(work)

    def records(self) -> dict[bytes, bytes]:
        return self.memory.environment.read(
            lambda txn, tables: {bytes(key): bytes(raw) for key, raw in txn.cursor(tables.records)}
        )


class Request:
    """One of the two: its session, the ids it was given, and what it does at its end."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.given: set[bytes] = set()
        self.destroyed = False
        self.slow = 0
        self.ended = False


class Run:
    """One schedule, and what must hold after each of its steps."""

    def __init__(self, world: World, variant: Variant) -> None:
        self.world, self.variant = world, variant
        self.memory, self.clock, self.store = world.memory, world.clock, world.store
        world.wipe()
        first = self.store.session()
        first["base"] = "token"
        first.save()
        assert first.raw_handle is not None
        assert first.record is not None
        assert first.secret is not None
        if variant.backend:
            world.acknowledge()
        self.handle, self.start = first.raw_handle, first.record
        cookie = (world.prefix + self.store.transport.value(first.secret, self.clock.now())).encode()
        self.requests = [Request(self.store.request_session(lambda: cookie)) for _ in range(2)]
        self.cookie = cookie
        self.began = self.clock.boot()
        self.dead: dict[bytes, int] = {}
        self.successors: dict[bytes, bytes] = {}
        self.holders = {self.handle}
        self.evicted = False
        self.stored: dict[str, int] = {}

    # ── steps ─────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, steps: Sequence[Step]) -> None:
        for number, (who, op) in enumerate(steps):
            self.do(number, self.requests[who], f"{op.value}{who}", op)
            if op is Op.READ:
                continue
            if self.variant.backend:
                self.world.acknowledge()
            for handle in self.dead:
                assert isinstance(self.memory.load(handle, self.clock.now()), Missing), "a dead session is served"
        self.finish()

    def do(self, number: int, request: Request, key: str, op: Op) -> None:
        if op is Op.READ:
            self.read(request)
        elif op is Op.SET:
            self.set(request, key, number)
        elif op is Op.SLOW:
            request.session.get("base")
            request.slow += 1
        elif op is Op.RENEW:
            self.renew(request)
        elif op is Op.DESTROY:
            self.destroy(request)
        elif op is Op.FILL:
            self.fill()
        elif op is Op.END:
            self.end(request, key)
        else:
            if self.variant.passes:
                self.clock.advance(MINUTE)
            self.evicted |= op is Op.EVICT and self.memory.evict() > 0
            if op is Op.SWEEP:
                self.memory.sweep(self.clock.now())

    def look(self, request: Request) -> bytes | None:
        """Where the request stands before it acts; its first look must tell it the truth."""
        session = request.session
        if not session.loaded:
            there = self.memory.load(self.handle, self.clock.now())
            value = session.get("base")
            assert value == ("token" if isinstance(there, Record) else None)
            assert value is None or self.handle not in self.dead
        return session.raw_handle if session.record is not None and not session.gone else None

    def read(self, request: Request) -> None:
        self.look(request)
        value = request.session.get("base")
        fresh = self.store.request_session(lambda: self.cookie)
        assert self.handle not in self.dead or "base" not in fresh
        assert value in (None, "token")

    def save(self, request: Request) -> bool:
        before = request.session.secret
        try:
            request.session.save()
        except SessionGone:
            return False
        after = request.session.raw_handle
        if after is not None and request.session.secret != before:
            assert after not in self.dead, "an id is given that was taken away"
            assert after != self.handle
            request.given.add(after)
        return True

    def set(self, request: Request, key: str, value: int) -> None:
        self.look(request)
        request.session[key] = value
        if self.save(request):
            assert request.session.raw_handle not in self.dead
            if request.session.raw_handle in self.holders:
                self.stored[key] = value

    def renew(self, request: Request) -> None:
        before = self.look(request)
        there = None if before is None else self.memory.load(before, self.clock.now())
        if self.variant.login:
            request.session.renew(user_id="ada")
        else:
            request.session.renew()
        saved = self.save(request)
        after = request.session.raw_handle
        if before is not None and isinstance(there, Record):
            assert saved
            assert after is not None
            assert after != before
            self.dead[before] = self.clock.boot()
            if not self.variant.login:
                self.successors[before] = after
            if before in self.holders:
                self.holders.add(after)
        elif self.variant.login:
            assert saved
            assert after in request.given
        else:
            assert not saved or before is None

    def destroy(self, request: Request) -> None:
        before = self.look(request)
        session = request.session
        target = session.raw_handle
        session.destroy()
        request.destroyed |= not session.gone
        if target is None:
            return
        # A tombstone that was forgotten names no successor any more; what it named may be destroyed, or not.
        reached = target
        while reached in self.dead and reached in self.successors:
            reached = self.successors[reached]
        now = self.clock.now()
        if reached not in self.dead and not isinstance(self.memory.load(reached, now), Record):
            self.dead[reached] = self.clock.boot()
        if before is not None and before == reached:
            assert reached in self.dead, "destroy() did not destroy"

    def fill(self) -> None:
        """A late answer of a backend: the record as it was at the start.

        A backend that was asked after the death would say so: a fresh miss is at the latest of the moment before.
        """
        missed = (
            min(self.clock.boot(), self.dead.get(self.handle, self.clock.boot())) if self.variant.fresh else self.began
        )
        self.memory.fill(self.handle, self.start.header, self.start.data, missed)

    def end(self, request: Request, key: str) -> None:
        session = request.session
        if request.slow:
            self.look(request)
            session[key] = request.slow
        stood = session.raw_handle
        known = set(self.world.records())
        outcome = self.store.commit(session)
        request.ended = True
        after = session.raw_handle
        fresh = after is not None and after != stood
        if fresh:
            assert after is not None
            assert after not in known
            request.given.add(after)
        if session.gone:
            assert outcome.set_cookie is None, "a dropped commit sent a cookie"
        elif request.slow and after in self.holders:
            self.stored[key] = request.slow
        if stood is not None and stood in self.dead and not fresh and (request.slow or stood not in request.given):
            assert outcome.set_cookie is None, "a session that ended elsewhere sent a cookie"
        if outcome.set_cookie is None:
            assert not fresh, "a new id was not sent"
        elif "Max-Age=0" in outcome.set_cookie:
            assert request.destroyed, "a cookie was removed by a request that destroyed nothing"
        else:
            ticket = self.store.transport.read(outcome.set_cookie.partition(";")[0].encode())
            assert ticket is not None
            assert not isinstance(ticket, str)
            assert ticket.handle in request.given, "a response carries an id that the request was not given"

    # ── at the end ────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self) -> None:
        given = self.requests[0].given | self.requests[1].given
        alive = []
        for handle, raw in self.world.records().items():
            record = self.world.seal.open(handle, raw)
            assert record is not None
            if record.header.flags & TOMBSTONE:
                continue
            assert handle not in self.dead
            assert handle == self.handle or handle in given, "a session under an id that nobody was given"
            data = record.split()
            if "base" in data:
                assert handle in self.holders, "the data of a dead session reappeared elsewhere"
                alive.append(handle)
                self.kept(record.header, {key: decode(value) for key, value in data.items() if isinstance(key, str)})
        assert len(alive) <= 1, "one session became two"
        if self.handle in self.dead:
            again = self.store.request_session(lambda: self.cookie)
            assert "base" not in again
            assert not again.exists

    def kept(self, header: Header, data: dict[str, object]) -> None:
        """G2: who was not told that its session is gone finds its change in it."""
        assert header.created == self.start.header.created
        if not self.evicted:
            assert self.stored.items() <= data.items(), "a change was lost"


def replay(world: World, variant: Variant, steps: Sequence[Step]) -> None:
    """Carry out one schedule."""
    try:
        Run(world, variant).run(steps)
    except (AssertionError, SessionGone) as error:
        raise AssertionError(f"replay(world, {variant}, {steps}): {error}") from error


@pytest.fixture
def worlds(place: Path) -> Iterator[Callable[[bool], World]]:
    """The world with and the one without a backend, made when asked for."""
    made: dict[bool, World] = {}

    def world(backend: bool) -> World:
        if backend not in made:
            made[backend] = World(place / f"base{backend}", backend=backend)
        return made[backend]

    yield world
    for one in made.values():
        one.memory.close()


VARIANTS: Final = [Variant(*bits) for bits in itertools.product((False, True), repeat=4)]


@pytest.mark.soak
def test_no_sequence_of_three_operations_of_two_requests_brings_a_dead_session_back(
    worlds: Callable[[bool], World],
) -> None:
    """All 8³ x 2³ of them; in the suite each in one of 16 variants, under soak in all."""
    each = size(16, 1)
    done = 0
    for number, (ops, whose) in enumerate(
        itertools.product(itertools.product(OPS, repeat=3), itertools.product((0, 1), repeat=3))
    ):
        for turn in range(each):
            variant = VARIANTS[(number * 7 + number // 16 + turn) % 16]
            last = [(0, Op.END), (1, Op.END)] if (number + turn) % 2 else [(1, Op.END), (0, Op.END)]
            replay(worlds(variant.backend), variant, [*zip(whose, ops, strict=True), *last])
            done += 1
    assert done == 4096 * each
    report("G3 sequences of three", sequences=4096, schedules=done)


def _interleaved(random: Random) -> list[Step]:
    """Two requests of three random steps each and an end, in a random order."""
    left = [[*random.choices(OPS, k=3), Op.END] for _ in range(2)]
    steps = []
    while left[0] or left[1]:
        who = random.randrange(2)
        if left[who]:
            steps.append((who, left[who].pop(0)))
    return steps


@pytest.mark.soak
def test_no_pair_of_three_step_requests_brings_a_dead_session_back(worlds: Callable[[bool], World]) -> None:
    pairs = size(1_000_000, 5_000)
    random = rng("G3 pairs")
    deaths = evictions = dropped = 0
    for number in range(pairs):
        variant, steps = VARIANTS[random.randrange(16)], _interleaved(random)
        world = worlds(variant.backend)
        run = Run(world, variant)
        try:
            run.run(steps)
        except (AssertionError, SessionGone) as error:
            raise AssertionError(f"replay(world, {variant}, {steps}): {error}") from error
        deaths += bool(run.dead)
        evictions += run.evicted
        dropped += any(request.session.gone for request in run.requests)
        if number % 500 == 0:
            check_tables(world.memory, world.store.keyring)
    assert deaths > pairs // 4
    assert dropped > pairs // 20
    assert evictions > pairs // 100
    report("G3 pairs", pairs=pairs, with_a_death=deaths, with_a_dropped_request=dropped, with_an_eviction=evictions)


# ── the account can tell ──────────────────────────────────────────────────────────────────────────────────────


def _fails(worlds: Callable[[bool], World], steps: Sequence[Step], variant: Variant) -> bool:
    try:
        replay(worlds(variant.backend), variant, steps)
    except AssertionError:
        return True
    return False


ENDS: Final = [(0, Op.END), (1, Op.END)]
DESTROYED_THEN_FILLED: Final = [(0, Op.DESTROY), (1, Op.FILL), *ENDS]


def test_a_store_that_leaves_no_tombstone_is_found_out(
    worlds: Callable[[bool], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(fresh=False, passes=False, login=False, backend=False)
    assert not _fails(worlds, DESTROYED_THEN_FILLED, variant)

    def destroy(self: MemoryStore, handle: bytes, now: int) -> bytes:
        self.environment.write(lambda txn, tables: txn.delete(handle, db=tables.records))
        return handle

    monkeypatch.setattr(MemoryStore, "destroy", destroy)
    assert _fails(worlds, DESTROYED_THEN_FILLED, variant)


def test_a_store_that_believes_late_answers_is_found_out(
    worlds: Callable[[bool], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(fresh=False, passes=True, login=False, backend=True)
    steps = [(0, Op.DESTROY), (0, Op.SWEEP), (1, Op.FILL), *ENDS]
    assert not _fails(worlds, steps, variant)
    monkeypatch.setattr("shmsession.memory.store.STALE_FILL_MS", 10**9)
    assert _fails(worlds, steps, variant)


def test_a_store_that_creates_by_updating_is_found_out(
    worlds: Callable[[bool], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(fresh=False, passes=False, login=True, backend=False)
    steps = [(0, Op.SLOW), (1, Op.RENEW), *ENDS]
    assert not _fails(worlds, steps, variant)

    def update(self: MemoryStore, handle: bytes, base: Record, changes: object, now: int) -> Record:
        raw = self._seal.close(handle, base.header, base.data)
        self.environment.write(lambda txn, tables: txn.put(handle, raw.raw, db=tables.records))
        return raw

    monkeypatch.setattr(MemoryStore, "update", update)
    assert _fails(worlds, steps, variant)


def test_a_login_that_carries_dead_data_over_is_found_out(
    worlds: Callable[[bool], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    variant = Variant(fresh=False, passes=False, login=True, backend=False)
    steps = [(0, Op.READ), (1, Op.DESTROY), (0, Op.RENEW), *ENDS]
    assert not _fails(worlds, steps, variant)
    begin_anew = Session.begin_anew

    def careless(self: Session) -> None:
        begin_anew(self)
        self["base"] = "token"

    monkeypatch.setattr(Session, "begin_anew", careless)
    assert _fails(worlds, steps, variant)


def test_a_value_that_a_test_stores_is_what_the_account_compares(worlds: Callable[[bool], World]) -> None:
    run = Run(worlds(False), VARIANTS[0])
    run.set(run.requests[0], "set0", 7)
    run.stored["set0"] = 8
    with pytest.raises(AssertionError, match="lost"):
        run.finish()
    assert encode(7, "set0") == b"\x07"
