"""`./dev chaos`: real workers under load, with processes and databases killed and stopped; what must hold is checked.

Every request and its answer is written down. Afterwards the account is held against what was promised: G1-G8 as one
visitor can see them, who makes one request at a time. The seed chooses what visitors do and what befalls them; run it
again with the same seed to see the same faults in the same order.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import string
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple, Self

from shmsession import Key, SessionConfig, SessionStore
from shmsession.ids import new_id
from tests.kept import BACKENDS, Kept, Watch, check_equal, lease_holder
from tests.servers import KINDS, Browser, Kind, Server, Unanswered, new_place, wait_for

VISITORS: Final = 6
OWN: Final = "own"
ALPHABET: Final = string.ascii_letters + string.digits + "-_"

UNDER_SEAL: Final = {"unknown", "ended"}
"""Strangers' cookies of which only memory or the database can say that they are no session's: a 503 is an answer."""


@dataclass
class Event:
    """One request: when it was sent, and when and how it was answered (None: never).

    `cookie`: the visitor's own, or which kind of another it came with. `sets_cookie`: whether its answer set one.
    """

    visitor: int
    begin: float
    path: str
    argument: int = 0
    cookie: str = OWN
    end: float | None = None
    status: int | None = None
    answer: Any = None
    sets_cookie: bool = False

    @property
    def acknowledged(self) -> bool:
        return self.status == 200


@dataclass
class Account:
    """All events, in the order in which they began, what befell the servers, and what was found broken meanwhile."""

    events: list[Event] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def of(self, visitor: int) -> list[Event]:
        """What a visitor did with its own cookie, or none yet."""
        return [event for event in self.events if event.visitor == visitor and event.cookie == OWN]

    def write(self, file: Path) -> None:
        """One line of JSON each."""
        with file.open("w") as out:
            for event in self.events:
                out.write(json.dumps(asdict(event)) + "\n")
            for moment, fault in self.faults:
                out.write(json.dumps({"at": moment, "fault": fault}) + "\n")
            for wrong in self.wrong:
                out.write(json.dumps({"wrong": wrong}) + "\n")


class Visitor:
    """Somebody with one session who logs in and out, counts, assigns and looks, one request at a time.

    And who comes as a stranger in between: without a cookie, or with one that is no session's.
    """

    def __init__(self, number: int, server: Server, account: Account, random: Random) -> None:
        self.number = number
        self.browser = server.browser()
        self.account = account
        self.random = random
        self.user: str | None = None
        self.ended: list[str] = []
        self.assigned = 0
        self.forger = Forger(server.store(), random)

    def ask(
        self, method: str, path: str, argument: int = 0, browser: Browser | None = None, cookie: str = OWN
    ) -> Event:  # fmt: skip
        event = Event(self.number, time.monotonic(), path, argument, cookie)
        self.account.events.append(event)
        with contextlib.suppress(Unanswered):
            answer = (browser or self.browser).request(method, path if not argument else f"{path}/{argument}")
            event.status, event.end = answer.status, time.monotonic()
            event.sets_cookie = bool(answer.all("set-cookie"))
            if answer.status == 200:
                event.answer = answer.json
            elif answer.status != 503:
                self.account.wrong.append(f"{path}: {answer.status}")
        return event

    def run(self, stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                self.random.choice((self.count, self.count, self.assign, self.look, self.log_in_or_out, self.intrude))()
        except Exception as error:  # noqa: BLE001  # whatever was answered, a visitor who cannot go on was wronged
            self.account.wrong.append(f"visitor {self.number} died of {error!r}")

    def count(self) -> None:
        self.ask("GET", "/hit")

    def assign(self) -> None:
        self.assigned += 1
        self.ask("POST", f"/set/k{self.assigned % 4}", self.assigned)

    def look(self) -> Event:
        return self.ask("GET", "/session")

    def log_in_or_out(self) -> None:
        before = self.browser.cookies.get(COOKIE)
        if self.user is None:
            self.user = f"u{self.number}-{len(self.account.events)}"
            done = self.ask("POST", f"/login/{self.user}").acknowledged
        else:
            self.user = None
            done = self.ask("POST", "/logout").acknowledged
        if before and done:  # the id before a login is as dead as that of a session which was left
            self.ended.append(before)
        if not done:  # nobody knows what became of it: begin anew
            self.browser.cookies.clear()
            self.user = None

    def intrude(self) -> None:
        """Come as somebody who has no session."""
        cookies = self.forger.cookies(self.browser.cookies.get(COOKIE), self.ended)
        kind = self.random.choice(sorted(cookies))
        self.ask("GET", "/session", browser=Browser(self.browser.address, cookies[kind]), cookie=kind)


COOKIE: Final = "session"


class Forger:
    """Cookies that lead to no session."""

    def __init__(self, store: SessionStore, random: Random) -> None:
        self._seals = store.transport
        self._others = SessionStore(config=SessionConfig(keys=(Key.generate(),), secure=False, name="other")).transport
        self._random = random

    def cookies(self, own: str | None, ended: Sequence[str]) -> dict[str, Mapping[str, str]]:
        """One of each kind that can be made now."""
        now = int(time.time() * 1000)
        values = {
            "junk": "".join(self._random.choices(ALPHABET, k=92)),
            "unknown": self._seals.value(new_id(), now),
            "foreign": self._others.value(new_id(), now),
        }
        if ended:
            values["ended"] = self._random.choice(ended)
        if own:
            place = self._random.randrange(len(own))
            letter = self._random.choice([letter for letter in ALPHABET if letter != own[place]])
            values |= {"forged": own[:place] + letter + own[place + 1 :], "twice": f"{own}; {COOKIE}={own}"}
        return {"none": {}} | {kind: {COOKIE: value} for kind, value in values.items()}


class Fault(NamedTuple):
    """What befalls whom next: a worker, of those there are then, at `place` from 0 to 1; for so many seconds, where it
    lasts; then visitors make so many requests. `of` draws all of it from the seed, whatever is there to be hurt."""

    name: str
    place: float
    seconds: float
    requests: int

    @classmethod
    def of(cls, seed: int, number: int, names: Iterable[str]) -> Self:
        random = Random(f"{seed}:{number}")
        return cls(random.choice(sorted(names)), random.random(), random.uniform(0.05, 2.0), random.randrange(10, 200))


class Nemesis:
    """What befalls servers and databases."""

    def __init__(self, server: Server, kept: Kept | None, account: Account, seed: int) -> None:
        self._server = server
        self._kept = kept
        self._account = account
        self._seed = seed
        self._store = server.store()
        self.actions: dict[str, Callable[[Fault], None]] = {"kill": self.kill_worker, "stop": self.stop_worker}
        if kept is not None:
            self.actions["flusher"] = self.kill_flusher
            self.actions["freeze-flusher"] = self.stop_flusher
            if kept.server is not None:
                self.actions |= {"crash": self.crash_database, "freeze": self.freeze_database}

    def strike(self) -> Fault:
        """Do the next thing."""
        fault = Fault.of(self._seed, len(self._account.faults), self.actions)
        self._account.faults.append((time.monotonic(), fault.name))
        self.actions[fault.name](fault)
        return fault

    def _pause(self, fault: Fault) -> None:
        time.sleep(fault.seconds)  # how long a fault lasts, not a wait for anything

    def _tell(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def _worker(self, fault: Fault) -> int:
        wait_for(self._server.worker_pids, "there is a worker")
        pids = sorted(self._server.worker_pids()) or [0]
        return pids[int(fault.place * len(pids))]

    def kill_worker(self, fault: Fault) -> None:
        pid = self._worker(fault)
        if pid:
            self._tell(pid, signal.SIGKILL)

    def stop_worker(self, fault: Fault) -> None:
        self._stop(self._worker(fault), fault)

    def _stop(self, pid: int, fault: Fault) -> None:
        if pid:
            self._tell(pid, signal.SIGSTOP)
            self._pause(fault)
            self._tell(pid, signal.SIGCONT)

    def _flusher(self) -> int:
        pid = lease_holder(self._store)
        return pid if pid in self._server.worker_pids() else 0

    def kill_flusher(self, _: Fault) -> None:
        pid = self._flusher()
        if pid:
            self._tell(pid, signal.SIGKILL)

    def stop_flusher(self, fault: Fault) -> None:
        self._stop(self._flusher(), fault)

    def crash_database(self, fault: Fault) -> None:
        assert self._kept is not None
        self._kept.server.kill()
        self._pause(fault)
        self._kept.server.start()

    def freeze_database(self, fault: Fault) -> None:
        assert self._kept is not None
        self._kept.server.freeze()
        self._pause(fault)
        self._kept.server.thaw()


@contextlib.contextmanager
def visitors(server: Server, account: Account, seed: int) -> Iterator[list[Visitor]]:
    """Visitors at work."""
    people = [Visitor(number, server, account, Random(f"{seed}:visitor {number}")) for number in range(VISITORS)]
    stop = threading.Event()
    threads = [threading.Thread(target=person.run, args=(stop,)) for person in people]
    for thread in threads:
        thread.start()
    try:
        yield people
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# ── what must hold ─────────────────────────────────────────────────────────────────────────────────────────────


def check(account: Account, sessions: int) -> list[str]:
    """What was broken. `sessions`: how many there are in memory at the end."""
    held, left = explained(account)
    wrong = [*account.wrong, *check_counts(account), *check_values(account), *check_strangers(account)]
    if not held <= sessions <= held + left:
        wrong.append(f"there are {sessions} sessions, where visitors hold {held}, and may have left {left} behind")
    return wrong


def begins_anew(event: Event) -> bool:
    """Whether the visitor has another session after it, or none: a logout, or what became of a login is not known."""
    return event.path == "/logout" or (event.path.startswith("/login/") and not event.acknowledged)


def check_counts(account: Account) -> list[str]:
    """G1, G2, G4, G7: a count is higher than all that were told in that session, and no higher than was asked for."""
    wrong = []
    for number in range(VISITORS):
        told = asked = 0
        for event in account.of(number):
            if begins_anew(event):
                told = asked = 0
            asked += event.path == "/hit"
            if event.acknowledged and event.path in ("/hit", "/session"):
                hits = event.answer.get("hits", 0)
                if not told + (event.path == "/hit") <= hits <= asked:
                    wrong.append(f"visitor {number} was told {hits} after {told}, and had asked {asked} times")
                told = hits
    return wrong


def check_values(account: Account) -> list[str]:
    """G1, G2, G4, G7: a session holds what was last acknowledged, or what was sent after that and never answered."""
    wrong = []
    for number in range(VISITORS):
        may: dict[str, set[str | None]] = {}
        for event in account.of(number):
            _, verb, *rest = event.path.split("/")
            if begins_anew(event):
                may = {}
            elif verb == "login":
                may["user"] = {rest[0]}
            elif verb == "set" and event.acknowledged:
                may[rest[0]] = {str(event.argument)}
            elif verb == "set" and event.status is None:  # a 503 has stored nothing
                may[rest[0]] = {*may.get(rest[0], {None}), str(event.argument)}
            elif verb == "session" and event.acknowledged:
                for key in sorted({*may, *event.answer} - {"hits"}):
                    if event.answer.get(key) not in may.get(key, {None}):
                        wrong.append(f"visitor {number} finds {key}={event.answer.get(key)}, not one of {may.get(key)}")
                    may[key] = {event.answer.get(key)}
    return wrong


def check_strangers(account: Account) -> list[str]:
    """G3, G6: who has no session is told nothing, and given no cookie; nor does a look give one to who has."""
    wrong = []
    for event in account.events:
        if event.path == "/session" and event.sets_cookie:
            wrong.append(f"a look with the {event.cookie} cookie of visitor {event.visitor} was answered with a cookie")
        if event.cookie != OWN and event.acknowledged and event.answer != {}:
            wrong.append(f"the {event.cookie} cookie of visitor {event.visitor} was believed: {sorted(event.answer)}")
        if event.cookie not in {OWN, *UNDER_SEAL} and event.status not in (200, None):
            wrong.append(f"the {event.cookie} cookie, for which nobody is asked, was answered with {event.status}")
    return wrong


def explained(account: Account) -> tuple[int, int]:
    """G6, G8: how many sessions visitors hold at the end, and how many more they may have left behind.

    Left behind are those of which the answer with the cookie never came, and those whose login or logout was not
    acknowledged. Whatever strangers do leaves none.
    """
    held = left = 0
    for number in range(VISITORS):
        holds = False
        for event in account.of(number):
            if event.acknowledged:
                holds = event.path != "/logout" and (holds or event.sets_cookie)
            elif event.path != "/session" and (begins_anew(event) or not holds):
                left, holds = left + 1, False
        held += holds
    return held, left


def run(kind: Kind, backend: str | None, seed: int, seconds: float, place: Path) -> dict[str, Any]:
    """One run; returns its figures. Raises AssertionError with what was broken; the account is then in `place`."""
    account = Account()
    try:
        return _run(kind, backend, seed, seconds, place, account)
    except BaseException:  # whatever ended it, and be it whoever watches; it goes on
        account.write(place / "account")
        raise


def _run(kind: Kind, backend: str | None, seed: int, seconds: float, place: Path, account: Account) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(Kept(backend, place)) if backend else None
        env = {"SHMSESSION_BACKEND": kept.url} if kept else {}
        server = stack.enter_context(Server(kind, place, env=env, may_fail=True))
        nemesis = Nemesis(server, kept, account, seed)
        watch = stack.enter_context(Watch(kept)) if kept else None
        with visitors(server, account, seed) as people:
            end = time.monotonic() + seconds
            while time.monotonic() < end and not account.wrong:
                done = nemesis.strike().requests + len(account.events)
                wait_for(lambda done=done: account.wrong or len(account.events) > done, "visitors go on")  # type: ignore[misc]
        for person in people:
            if not person.look().acknowledged:
                account.wrong.append(f"at the end visitor {person.number} is not answered")
        store = server.store()
        account.wrong = check(account, store.count())
        assert account.wrong == [], account.wrong[:10]
        if kept is not None:
            check_equal(store, kept)
        if watch is not None:
            assert watch.backwards == [], watch.backwards[:10]
        totals = store.stats().counters
        answered = sum(event.acknowledged for event in account.events)
        unavailable = sum(event.status == 503 for event in account.events)
        return {
            "requests": len(account.events), "acknowledged": answered, "unavailable": unavailable,
            "unanswered": len(account.events) - answered - unavailable, "faults": len(account.faults),
            "ended": sum(len(person.ended) for person in people),
            "strangers": sum(event.cookie != OWN for event in account.events),
            "sessions": store.count(), "rows": totals["rows"],
            "flush_errors": totals["flush_errors"], "violations": 0,
        }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="dev chaos", description=__doc__)
    parser.add_argument("--backend", choices=[*BACKENDS, "none"], action="append", help="default: each in turn")
    parser.add_argument("--kind", choices=[kind.name for kind in KINDS], default="asgi")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    options = parser.parse_args(arguments)
    (kind,) = [kind for kind in KINDS if kind.name == options.kind]
    failed = False
    logging.getLogger("psycopg").setLevel(logging.ERROR)  # which says that the database is down each time it is
    for backend in options.backend or [*BACKENDS, "none"]:
        place = new_place()
        print(f"chaos: {backend} under {kind}, seed {options.seed}, {options.seconds:g} s", flush=True)
        try:
            figures = run(kind, None if backend == "none" else backend, options.seed, options.seconds, place)
        except Exception as error:  # noqa: BLE001  # whatever it is: the next backend is tried all the same
            failed = True
            print(f"BROKEN: {error!r}\nThe account is in {place}/account.", flush=True)
        else:
            print("  " + ", ".join(f"{name}={value}" for name, value in figures.items()), flush=True)
            shutil.rmtree(place)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
