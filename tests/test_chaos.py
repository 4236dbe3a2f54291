"""`./dev chaos`, briefly over each backend: whatever befalls workers and databases, the promises hold.

And what it holds an account against: each promise that was broken is noticed, and nothing else is.
"""

from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests import chaos
from tests.chaos import Account, Event
from tests.figures import SEED, SOAKING, report, size
from tests.kept import BACKENDS
from tests.servers import ASGI, GTHREAD


@pytest.mark.soak
@pytest.mark.parametrize(
    "backend", [*BACKENDS, None] if SOAKING else ["sqlite", "postgres", "redis", "redis-cluster", None], ids=str
)
def test_whatever_befalls_workers_and_databases_the_promises_hold(place: Path, backend: str | None) -> None:
    """Killed and stopped workers and flushers, crashed and frozen databases, under load: see `tests.chaos`."""
    kind = GTHREAD if backend == "sqlite" else ASGI
    figures = chaos.run(kind, backend, SEED, size(600, 4), place)
    assert figures["acknowledged"] > 0
    assert figures["faults"] > 0
    report(f"chaos {backend}", **figures)


# ── a run can be read, and repeated ────────────────────────────────────────────────────────────────────────────


def test_the_seed_alone_says_what_befalls_whom() -> None:
    """Whatever is there to be hurt: another number of workers, or none, changes nothing of what comes after."""
    names = ["crash", "flusher", "freeze", "kill", "stop"]
    faults = [chaos.Fault.of(7, number, names) for number in range(200)]
    assert faults == [chaos.Fault.of(7, number, reversed(names)) for number in range(200)]
    assert {fault.name for fault in faults} == set(names)
    assert len(set(faults)) == 200
    assert faults != [chaos.Fault.of(8, number, names) for number in range(200)]


class Struck(chaos.Nemesis):
    """One that hurts nobody."""

    def __init__(self, account: Account, seed: int) -> None:
        self._account, self._seed = account, seed
        self.suffered: list[chaos.Fault] = []
        self.actions = dict.fromkeys(["kill", "stop"], self.suffered.append)


def test_faults_come_in_the_order_of_the_seed() -> None:
    account = Account()
    nemesis = Struck(account, 7)
    struck = [nemesis.strike() for _ in range(20)]
    assert struck == nemesis.suffered == [chaos.Fault.of(7, number, nemesis.actions) for number in range(20)]
    assert [name for _, name in account.faults] == [fault.name for fault in struck]


@pytest.mark.parametrize("why", ["a visitor dies", "rows differ"])
def test_whatever_ends_a_run_leaves_an_account(place: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A visitor who meets what nobody thought of is a violation, and not a silence."""

    def broken(*_: object) -> NoReturn:
        raise RuntimeError("by order")

    if why == "a visitor dies":
        monkeypatch.setattr(chaos.Visitor, "count", broken)
        says: tuple[type[Exception], str] = AssertionError, "died of RuntimeError"
    else:
        monkeypatch.setattr(chaos, "check_equal", broken)
        says = RuntimeError, "by order"
    with pytest.raises(says[0], match=says[1]):
        chaos.run(GTHREAD, "sqlite", SEED, 0.1, place)
    account = (place / "account").read_text()
    assert '"visitor": ' in account
    assert '"fault": ' in account or why == "a visitor dies"
    assert ("died of RuntimeError" in account) == (why == "a visitor dies")


# ── what is checked can fail ───────────────────────────────────────────────────────────────────────────────────


def event(path: str, argument: int = 0, *, status: int | None = 200, cookie: str = chaos.OWN, **fields: Any) -> Event:
    """What visitor 0 asked; `answer` and `sets_cookie` are what was answered."""
    return Event(0, 0.0, path, argument, cookie, status=status, end=0.0, **fields)


def look(*, cookie: str = chaos.OWN, sets_cookie: bool = False, **answer: Any) -> Event:
    return event("/session", cookie=cookie, answer=answer, sets_cookie=sets_cookie)


def hit(hits: int, *, sets_cookie: bool = False) -> Event:
    return event("/hit", answer={"hits": hits}, sets_cookie=sets_cookie)


BEGUN = hit(1, sets_cookie=True)
LOGIN = event("/login/ada", sets_cookie=True)
LOGOUT = event("/logout", sets_cookie=True)
LOST = event("/logout", status=None)
SET = event("/set/k1", 7)
UNANSWERED = event("/set/k1", 8, status=None)
UNAVAILABLE = event("/set/k1", 9, status=503)


@pytest.mark.parametrize(
    ("events", "sessions"),
    [
        ([], 0),
        ([look()], 0),
        ([BEGUN, hit(2), look(hits=2)], 1),
        ([BEGUN, event("/hit", status=None), hit(3), look(hits=3)], 1),
        ([BEGUN, LOGIN, hit(2), look(hits=2, user="ada"), LOGOUT, look()], 0),
        ([BEGUN, LOGIN, LOGOUT, hit(1, sets_cookie=True)], 1),
        ([BEGUN, SET, look(hits=1, k1="7"), UNANSWERED, look(hits=1, k1="8")], 1),
        ([BEGUN, SET, UNANSWERED, UNAVAILABLE, look(hits=1, k1="7")], 1),
        ([BEGUN, UNANSWERED, look(hits=1)], 1),
        ([BEGUN, event("/session", status=503), hit(2)], 1),
        ([BEGUN, LOST, look()], 0),
        ([BEGUN, LOST, look()], 1),
        ([event("/hit", status=None), look()], 1),
        ([event("/session", status=503, cookie="ended"), event("/session", status=None, cookie="none")], 0),
        ([BEGUN, *(look(cookie=kind) for kind in ("none", "junk", "forged", "foreign", "unknown", "ended"))], 1),
    ],
)  # fmt: skip
def test_an_account_of_kept_promises_is_right(events: list[Event], sessions: int) -> None:
    assert chaos.check(Account(events), sessions) == []


@pytest.mark.parametrize(
    ("events", "sessions", "wrong"),
    [
        ([BEGUN, hit(1)], 1, "told 1 after 1"),
        ([BEGUN, hit(3)], 1, "told 3 after 1, and had asked 2"),
        ([BEGUN, hit(2), look(hits=1)], 1, "told 1 after 2"),
        ([BEGUN, hit(2), look()], 1, "told 0 after 2"),
        ([BEGUN, LOGIN, hit(1)], 1, "told 1 after 1"),
        ([BEGUN, LOGOUT, look(hits=1)], 0, "told 1 after 0"),
        ([BEGUN, LOGIN, look(hits=1)], 1, "finds user=None, not one of {'ada'}"),
        ([BEGUN, look(hits=1, user="grace")], 1, "finds user=grace"),
        ([BEGUN, LOGIN, LOGOUT, look(user="ada")], 0, "finds user=ada"),
        ([BEGUN, SET, look(hits=1)], 1, "finds k1=None, not one of {'7'}"),
        ([BEGUN, SET, event("/set/k1", 8), look(hits=1, k1="7")], 1, "finds k1=7, not one of {'8'}"),
        ([BEGUN, UNANSWERED, SET, look(hits=1, k1="8")], 1, "finds k1=8, not one of {'7'}"),
        ([BEGUN, SET, UNAVAILABLE, look(hits=1, k1="9")], 1, "finds k1=9, not one of {'7'}"),
        ([BEGUN, SET, UNANSWERED, look(hits=1, k1="7"), look(hits=1, k1="8")], 1, "finds k1=8, not one of {'7'}"),
        ([BEGUN, look(hits=1, sets_cookie=True)], 1, "with the own cookie of visitor 0 was answered with a cookie"),
        ([look(cookie="none", sets_cookie=True)], 0, "with the none cookie of visitor 0 was answered with a cookie"),
        ([event("/session", status=503, cookie="ended", sets_cookie=True)], 0, "was answered with a cookie"),
        ([look(cookie="ended", user="ada")], 0, "the ended cookie of visitor 0 was believed: ['user']"),
        ([look(cookie="twice", hits=1)], 0, "the twice cookie of visitor 0 was believed: ['hits']"),
        ([event("/session", status=503, cookie="forged")], 0, "for which nobody is asked, was answered with 503"),
        ([look(cookie="junk")], 1, "there are 1 sessions, where visitors hold 0, and may have left 0 behind"),
        ([BEGUN], 0, "there are 0 sessions, where visitors hold 1"),
        ([BEGUN, LOGIN], 2, "there are 2 sessions, where visitors hold 1"),
        ([BEGUN, LOST], 2, "there are 2 sessions, where visitors hold 0, and may have left 1 behind"),
    ],
)  # fmt: skip
def test_an_account_of_a_broken_promise_is_not(events: list[Event], sessions: int, wrong: str) -> None:
    found = chaos.check(Account(events), sessions)
    assert len(found) == 1, found
    assert wrong in found[0]
