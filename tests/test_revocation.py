"""`revoke_user` is final: in any order of things, over every backend, while what carries it there is killed."""

import random
from pathlib import Path
from typing import Final

import pytest

from shmsession.flusher import Flusher
from shmsession.memory.store import MemoryStore, Missing
from shmsession.memory.users import Entry, Users
from shmsession.record import USER_KEY, Changes, Record
from shmsession.revoking import Revocations
from tests import test_write_behind
from tests.backends import ADA, sets
from tests.figures import SEED, report, size
from tests.test_write_behind import Expected, Mutant, Schedule, Violation, World, play


class Revoking(Schedule):
    """A schedule in which users' sessions are revoked."""

    def __init__(self, world: World, chance: random.Random) -> None:
        super().__init__(world, chance)
        self.ahead: set[bytes] = set()
        """Logged in before the wall clock went back, with all that was in memory: who can tell that it was before?"""

    def revoke_user(self) -> None:
        """With a session that is kept, or without."""
        ours = [key for key in self.alive if self._is_adas(key)]
        here = [key for key in ours if isinstance(self.host.load(key), Record)]
        kept = self.chance.choice(here) if here and self.chance.random() < 0.3 else None
        lacking = {key for key in ours if self.host.load(key) is Missing.UNKNOWN}
        self.host.memory.users.revoke(ADA, kept)
        for key in ours:
            if key == kept:
                record = self.host.load(key)
                assert isinstance(record, Record)
                self.held[key] = record
            elif key in self.ahead & lacking:
                self.alive.pop(key)
                self.held.pop(key, None)
            else:
                self._kill(key, "revoked")

    def login(self) -> None:
        """Asked for now, or before what came last."""
        key, value = self._handle(), self.world.fresh()
        changes = Changes(set={**sets(v=value).set, USER_KEY: ADA})
        entry = Entry(self.host.clock.boot() - self.chance.choice([0, 0, 1, 100]))
        record = self.host.memory.create(key, changes, self.host.clock.now(), entry)
        if isinstance(record, Record):
            self.held[key] = record
            self.alive[key] = Expected(value, storable=True)
            self._saw(key, record)

    def renew(self) -> None:
        """The same login goes on, or a visitor logs in; or gets a new id, and is nobody still."""
        current = self._current()
        if current is None:
            return
        old, expected, base = current
        was_ours, new = self._is_adas(old), self._handle()
        login = not was_ours and self.chance.random() < 0.5
        user = ADA if was_ours or login else None
        found = self.host.memory.renew(old, new, base, Changes(), self.host.clock.now(), user, login=login)
        if not isinstance(found, Record):
            raise Violation(f"{old.hex()} is alive, and cannot be renewed")
        self._kill(old, "renewed")
        self.before[new], self.held[new] = old, found
        self.alive[new] = Expected(expected.value, storable=expected.storable)
        self.alive[new].unsure = expected.unsure
        if old in self.ahead:
            self.ahead.add(new)
        self._saw(new, found)

    def answer(self) -> None:
        """Of whom nothing is promised any more may come what will."""
        self.answers = [one for one in self.answers if one[0] in self.alive or one[0] in self.killed]
        super().answer()

    def lose(self) -> None:
        before = self.host.clock.now()
        ours = {key for key in self.alive if self._is_adas(key)}
        super().lose()
        if self.host.clock.now() < before:
            self.ahead |= ours

    def _is_adas(self, key: bytes) -> bool:
        record, row = self.held.get(key), self.host.backend.rows.get(key)
        if record is None and row is not None and row.body:
            return self.host.rows.session_in(row).values().get(USER_KEY) == ADA
        return record is not None and record.split().get(USER_KEY) == ADA


def revoking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_write_behind, "Schedule", Revoking)
    monkeypatch.setattr(test_write_behind, "_STEPS", [*test_write_behind._STEPS, ("revoke_user", 8), ("login", 12)])
    meanwhile = [*test_write_behind._MEANWHILE, ("revoke_user", 5), ("login", 4)]
    monkeypatch.setattr(test_write_behind, "_MEANWHILE", meanwhile)
    phrases = [
        ("login", "vacate", "request", "revoke_user", "answer"),
        ("login", "login", "vacate", "revoke_user", "go", "lose", "request", "answer"),
        ("login", "vacate", "save", "revoke_user", "vacate", "forget", "go", "request", "answer"),
        ("login", "revoke_user", "login", "rebuild", "vacate", "request", "answer"),
    ]
    monkeypatch.setattr(test_write_behind, "_PHRASES", [*phrases, *test_write_behind._PHRASES])


@pytest.mark.soak
def test_in_any_order_no_revoked_session_comes_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests, logins, renewals, two flushers, a failing and forgetting backend, loss of memory."""
    revoking(monkeypatch)
    schedules = size(full=200_000, suite=500)
    world = play(place, monkeypatch, SEED, schedules)
    report("revoke_user in random schedules", schedules=schedules, steps=world.steps, losses=world.losses, revived=0)


MUTANTS: Final[dict[str, Mutant]] = {
    "an answer that comes late is not compared with the watermark": Mutant(
        MemoryStore, "fill", "self.users.has_ended(txn, tables, record)", "False"
    ),
    "the backend is not asked what it has of the user": Mutant(
        Revocations, "rows", "await self._backend.sessions_of(tag_of(mark.user))", "()"
    ),
    "a watermark is acknowledged though what it ends was not written": Mutant(
        Flusher, "_revoke", "await self._write(rows[begin : begin + BATCH])", "pass"
    ),
    "a kept session is not spared": Mutant(
        Users, "_spare", "self._writer.overwrite(txn, tables, handle, record, spared)", "pass"
    ),
    "the backend is not told what memory knows": Mutant(
        Revocations, "_has_ended", "if isinstance(known, Record):", "if False:"
    ),
}


@pytest.mark.unmeasured
@pytest.mark.parametrize("what", MUTANTS)
def test_what_is_broken_is_found_out(place: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    revoking(monkeypatch)
    MUTANTS[what].take_its_place(monkeypatch)
    with pytest.raises(AssertionError, match="schedule"):
        play(place, monkeypatch, 1, 3_000)
