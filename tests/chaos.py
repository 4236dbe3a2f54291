"""`./dev chaos`: real workers under load, with processes and databases killed and stopped; what must hold is checked.

Every request and its answer is written down; afterwards the account is compared with G1-G5 and G7. The seed chooses
what visitors do and what befalls them; run it again with the same seed to see the same faults in the same order.
"""

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

from tests.kept import BACKENDS, Kept, Watch, check_equal, lease_holder
from tests.servers import KINDS, Browser, Kind, Server, Unanswered, new_place, wait_for

VISITORS: Final = 6


@dataclass
class Event:
    """One request: when it was sent, and when and how it was answered (None: never)."""

    visitor: int
    begin: float
    path: str
    argument: int = 0
    end: float | None = None
    status: int | None = None
    answer: Any = None

    @property
    def acknowledged(self) -> bool:
        return self.status == 200


@dataclass
class Account:
    """All events, in the order in which they began, and what befell the servers."""

    events: list[Event] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def of(self, visitor: int, path: str) -> list[Event]:
        return [event for event in self.events if event.visitor == visitor and event.path == path]

    def write(self, file: Path) -> None:
        """One line of JSON each."""
        with file.open("w") as out:
            for event in self.events:
                out.write(json.dumps(asdict(event)) + "\n")
            for moment, fault in self.faults:
                out.write(json.dumps({"at": moment, "fault": fault}) + "\n")


class Visitor:
    """Somebody with one session who logs in and out, counts, assigns and looks, one request at a time."""

    def __init__(self, number: int, server: Server, account: Account, random: Random) -> None:
        self.number = number
        self.browser = server.browser()
        self.account = account
        self.random = random
        self.user: str | None = None
        self.sure = True
        """Whether `user` is known: after a login or logout that nobody answered it is not."""
        self.ended: list[dict[str, str]] = []
        self.assigned = 0

    def ask(self, browser: Browser, method: str, path: str, argument: int = 0) -> Event:
        event = Event(self.number, time.monotonic(), path, argument)
        self.account.events.append(event)
        with contextlib.suppress(Unanswered):
            answer = browser.request(method, path if not argument else f"{path}/{argument}")
            event.status, event.end = answer.status, time.monotonic()
            if answer.status == 200:
                event.answer = answer.json
            elif answer.status != 503:
                self.account.wrong.append(f"{path}: {answer.status}")
        return event

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.random.choice((self.count, self.count, self.assign, self.look, self.log_in_or_out, self.haunt))()

    def count(self) -> None:
        self.ask(self.browser, "GET", "/hit")

    def assign(self) -> None:
        self.assigned += 1
        self.ask(self.browser, "POST", f"/set/k{self.assigned % 4}", self.assigned)

    def look(self) -> None:
        event = self.ask(self.browser, "GET", "/whoami")
        if event.acknowledged and self.sure and event.answer["user"] != self.user:
            self.account.wrong.append(f"visitor {self.number} is {event.answer['user']}, not {self.user}")

    def log_in_or_out(self) -> None:
        before = dict(self.browser.cookies)
        if self.user is None:
            name = f"u{self.number}-{len(self.account.events)}"
            done = self.ask(self.browser, "POST", f"/login/{name}").acknowledged
            self.user, self.sure = name, done
        else:
            done = self.ask(self.browser, "POST", "/logout").acknowledged
            if done and before:
                self.ended.append(before)
            self.user, self.sure = None, done
        if not done:  # nobody knows what became of it: begin anew
            self.browser.cookies.clear()
            self.user, self.sure = None, True

    def haunt(self) -> None:
        """Come with the cookie of a session that was acknowledged to be over."""
        if self.ended:
            ghost = Browser(self.browser.address, self.random.choice(self.ended))
            event = self.ask(ghost, "GET", "/session")
            if event.acknowledged and event.answer != {}:
                self.account.wrong.append(f"a session of visitor {self.number} is back: {sorted(event.answer)}")


class Nemesis:
    """What befalls servers and databases."""

    def __init__(self, server: Server, kept: Kept | None, account: Account, random: Random) -> None:
        self._server = server
        self._kept = kept
        self._account = account
        self._random = random
        self._store = server.store()
        self.actions: dict[str, Callable[[], None]] = {"kill": self.kill_worker, "stop": self.stop_worker}
        if kept is not None:
            self.actions["flusher"] = self.kill_flusher
            self.actions["freeze-flusher"] = self.stop_flusher
            if kept.server is not None:
                self.actions |= {"crash": self.crash_database, "freeze": self.freeze_database}

    def strike(self) -> None:
        """Do the next thing."""
        name = self._random.choice(sorted(self.actions))
        self._account.faults.append((time.monotonic(), name))
        self.actions[name]()

    def _pause(self) -> None:
        time.sleep(self._random.uniform(0.05, 2.0))  # how long a fault lasts, not a wait for anything

    def _tell(self, pid: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def _worker(self) -> int:
        wait_for(self._server.worker_pids, "there is a worker")
        return self._random.choice(self._server.worker_pids() or [0])

    def kill_worker(self) -> None:
        pid = self._worker()
        if pid:
            self._tell(pid, signal.SIGKILL)

    def stop_worker(self) -> None:
        self._stop(self._worker())

    def _stop(self, pid: int) -> None:
        if pid:
            self._tell(pid, signal.SIGSTOP)
            self._pause()
            self._tell(pid, signal.SIGCONT)

    def _flusher(self) -> int:
        pid = lease_holder(self._store)
        return pid if pid in self._server.worker_pids() else 0

    def kill_flusher(self) -> None:
        pid = self._flusher()
        if pid:
            self._tell(pid, signal.SIGKILL)

    def stop_flusher(self) -> None:
        self._stop(self._flusher())

    def crash_database(self) -> None:
        assert self._kept is not None
        self._kept.server.kill()
        self._pause()
        self._kept.server.start()

    def freeze_database(self) -> None:
        assert self._kept is not None
        self._kept.server.freeze()
        self._pause()
        self._kept.server.thaw()


@contextlib.contextmanager
def visitors(server: Server, account: Account, random: Random) -> Iterator[list[Visitor]]:
    """Visitors at work."""
    people = [Visitor(number, server, account, Random(random.random())) for number in range(VISITORS)]
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


def check_counts(account: Account) -> list[str]:
    """G1, G2: every count is higher than all that were acknowledged in that session before it was asked for."""
    wrong = []
    for number in range(VISITORS):
        highest = 0
        for event in account.events:
            if event.visitor != number:
                continue
            if event.path.startswith(("/login", "/logout")):
                highest = 0  # a new session counts anew, and one that went on goes on: both are higher than 0
            elif event.path == "/hit" and event.acknowledged:
                if event.answer["hits"] <= highest:
                    wrong.append(f"visitor {number} was told {event.answer['hits']} after {highest}")
                highest = event.answer["hits"]
    return wrong


def run(kind: Kind, backend: str | None, seed: int, seconds: float, place: Path) -> dict[str, Any]:
    """One run; returns its figures. Raises AssertionError with what was broken; the account is then in `place`."""
    random, account = Random(seed), Account()
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(Kept(backend, place)) if backend else None
        env = {"SHMSESSION_BACKEND": kept.url} if kept else {}
        server = stack.enter_context(Server(kind, place, env=env, may_fail=True))
        nemesis = Nemesis(server, kept, account, random)
        watch = stack.enter_context(Watch(kept)) if kept else None
        with visitors(server, account, random) as people:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                nemesis.strike()
                done = len(account.events) + random.randrange(10, 200)
                wait_for(lambda done=done: len(account.events) > done, "visitors go on")  # type: ignore[misc]
        wrong = [*account.wrong, *check_counts(account)]
        for person in people:
            final = person.ask(person.browser, "GET", "/whoami")
            if not final.acknowledged or (person.sure and final.answer["user"] != person.user):
                wrong.append(f"at the end visitor {person.number} is not {person.user}")
        store = server.store()
        if kept is not None:
            check_equal(store, kept)
        if watch is not None:
            wrong += watch.backwards
        if wrong:
            account.write(place / "account")
        assert wrong == [], wrong[:10]
        totals = store.stats().counters
        answered = sum(event.acknowledged for event in account.events)
        unavailable = sum(event.status == 503 for event in account.events)
        return {
            "requests": len(account.events), "acknowledged": answered, "unavailable": unavailable,
            "unanswered": len(account.events) - answered - unavailable, "faults": len(account.faults),
            "ended": sum(len(person.ended) for person in people), "rows": totals["rows"],
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
        except AssertionError as error:
            failed = True
            print(f"BROKEN: {error}\nThe account is in {place}/account.", flush=True)
        else:
            print("  " + ", ".join(f"{name}={value}" for name, value in figures.items()), flush=True)
            shutil.rmtree(place)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
