"""The table of the examples' routes in every mode, with every cookie and transport, over every backend: pairwise.

The rows are servers: any two of the values of any two settings stand together in one of them. What the table says is
adapted by rule: in opt-in mode the visitor has agreed before, in manual mode there is a session before each step, and
by header a token takes the cookie's place.
"""

import contextlib
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from shmsession import CookieMode, SessionMode
from tests.kept import BACKENDS, Kept, check_equal
from tests.servers import ASGI, GTHREAD, Answer, Browser, Kind, Serve, Server
from tests.test_scenarios import ATTRIBUTES, SCENARIOS, Step, check_body

pytest_plugins = ["tests.hosts"]


class Row(NamedTuple):
    """How one server is set."""

    kind: Kind
    backend: str
    mode: SessionMode
    cookie: CookieMode
    transport: str

    def __str__(self) -> str:
        return "-".join((str(self.kind), self.backend, self.mode.value, self.cookie.value, self.transport))


FACTORS: Final = ((ASGI, GTHREAD), ("none", *BACKENDS), tuple(SessionMode), tuple(CookieMode), ("cookie", "header"))


def pairs(row: Iterable[Hashable]) -> set[Any]:
    """The values of each two factors that stand together in a row."""
    return set(combinations(enumerate(row), 2))


def covering(factors: Sequence[Sequence[Hashable]]) -> list[Any]:
    """Rows in which all pairs stand: of all there are always the next one that has most of those still missing."""
    rows = list(product(*factors))
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        chosen.append(max(rows, key=lambda row: len(missing & pairs(row))))
        missing -= pairs(chosen[-1])
    return chosen


ROWS: Final = [Row(*row) for row in covering(FACTORS)]


def test_any_two_values_of_any_two_settings_stand_together_in_a_row() -> None:
    wanted = {
        ((first, one), (second, other))
        for (first, ones), (second, others) in combinations(enumerate(FACTORS), 2)
        for one in ones
        for other in others
    }
    assert len(wanted) == 107
    assert set().union(*map(pairs, ROWS)) == wanted
    assert 21 <= len(ROWS) <= 23, "seven backends, or none, in each of three modes are twenty-one"


# ── what the table says in a row ──────────────────────────────────────────────────────────────────────────────

OK: Final = {"ok": True}
ACCEPT: Final = Step("POST /accept", OK, choice="true")
CREATE: Final = Step("POST /create", OK, cookie="new")
OF_CHOICE: Final = "accept, decline and remember need a session to act on"
"""The one scenario that depends on the mode: in the two others the visitor is asked, and what is declined is erased."""

CHOICES: Final = {
    SessionMode.OPT_IN: [
        Step("POST /accept", OK),
        Step("POST /remember", OK),
        Step("GET /hit", {"hits": 1}, cookie="new"),
        Step("POST /decline", OK, cookie="removed", choice="false"),
        Step("GET /hit", {"hits": 1}),
        Step("POST /login/ada", {"user": "ada"}),
        Step("POST /create", OK),
        Step("GET /session", {}),
        Step("POST /decline", OK),
        ACCEPT,
        Step("GET /hit", {"hits": 1}, cookie="new"),
        Step("POST /remember", OK),
        Step("GET /hit", {"hits": 2}),
    ],
    SessionMode.MANUAL: [
        Step("POST /accept", {"ok": True}, choice="true"),
        Step("POST /remember", {"error": str}, 409),
        CREATE,
        Step("POST /remember", OK),
        Step("GET /hit", {"hits": 1}),
        Step("POST /decline", OK, cookie="removed", choice="false"),
        Step("GET /hit", {"error": str}, 409),
        Step("POST /create", OK),
        Step("GET /session", {}),
        ACCEPT,
        CREATE,
        Step("GET /hit", {"hits": 1}),
    ],
}  # fmt: skip

UNCREATED: Final = [
    *(Step(f"GET /{path}", {"error": str}, 409) for path in ("hit", "visit")),
    *(
        Step(f"POST /{path}", {"error": str}, 409)
        for path in (
            "set/a/b", "slow/a/b?seconds=0", "cart/tea", "append/jam", "login/ada", "renew", "clear", "remember",
        )
    ),
    Step("POST /logout", {"user": None}),
    Step("GET /session", {}),
    Step("GET /whoami", {"user": None}),
]  # fmt: skip
"""What a visitor without a session gets in manual mode."""


def with_a_session(step: Step) -> Step:
    """What the table says of a visitor who has one."""
    if "Cookie" in step.sends:
        return replace(step, body={"error": str}, status=409, cookie=None) if step.cookie == "new" else step
    method, path = step.request.split(" ")
    if step.status >= 400 or method != "POST":
        return replace(step, cookie=None)
    renews, ends = path.startswith(("/login/", "/renew")), path in ("/logout", "/clear")
    return replace(step, cookie="new" if renews else "removed" if ends else None)


# ── who takes its steps ───────────────────────────────────────────────────────────────────────────────────────

OWN: Final = {"session": "X-Session", "session-storable": "X-Session-Storable"}
"""What a client keeps, as cookies or by header."""

ID: Final = "[A-Za-z0-9_-]{43}"
TOKENS: Final = {
    CookieMode.PRIVATE: "[A-Za-z0-9_-]{92}",
    CookieMode.SIGNED: ID + r"\.[A-Za-z0-9_-]{32}",
    CookieMode.PLAIN: ID,
}
SET_COOKIE: Final = re.compile(
    f"(?P<n1>session)=(?P<v1>[^;]+){ATTRIBUTES}|(?P<n2>session)=(?P<v2>); Max-Age=0; Path=/; SameSite=Lax; HttpOnly|"
    "(?P<n3>session-storable)=(?P<v3>true|false); Max-Age=15552000; Path=/; SameSite=Lax"
)


class Visitor:
    """Takes steps on the server of a row, and keeps what a client of its transport keeps."""

    def __init__(self, server: Server, row: Row) -> None:
        self.row = row
        self.by_header = row.transport == "header"
        self._browser = Browser(server.address, own=OWN.values() if self.by_header else ())

    @property
    def kept(self) -> dict[str, str]:
        """What it has, by the cookies' names."""
        if self.by_header:
            return {name: self._browser.own[header] for name, header in OWN.items()}
        return self._browser.cookies

    @kept.setter
    def kept(self, kept: dict[str, str]) -> None:
        if self.by_header:
            self._browser.own = {OWN[name]: value for name, value in kept.items()}
        else:
            self._browser.cookies = dict(kept)

    def play(self, steps: Iterable[Step]) -> None:
        """Take the steps of the table, as this row's mode has them."""
        if self.row.mode is SessionMode.OPT_IN:
            self.take(ACCEPT)
        for step in steps:
            if self.row.mode is SessionMode.MANUAL:
                if not self.kept.get("session"):
                    self.take(CREATE)
                step = with_a_session(step)
            self.take(step)

    def take(self, step: Step) -> None:
        """Send the request and compare all that the step says."""
        before = dict(self.kept)
        method, path = step.request.split(" ")
        answer = self._browser.request(method, path, self._headers(step))
        assert answer.status == step.status, (step, answer)
        check_body(step, answer, path)
        given = self._given(answer)
        assert given.get("session-storable") == step.choice, (step, answer)
        token = given.get("session")
        if step.cookie == "new":
            assert re.fullmatch(TOKENS[self.row.cookie], token or ""), (step, answer)
            assert token != before.get("session")
        else:
            assert token == (None if step.cookie is None else ""), (step, answer)
        of_header = OWN.values() if self.row.mode is not SessionMode.PERSISTENT else [OWN["session"]]
        looked_at = ", ".join(of_header) if self.by_header else "Cookie"
        assert answer.header("vary") == (looked_at if step.looks else None), (step, answer)
        assert answer.header("cache-control") == ("no-store" if given else None), (step, answer)
        assert (answer.header("location") == "/") is (step.status == 303)

    def _headers(self, step: Step) -> dict[str, str]:
        """What it sends beside what it keeps; a token that is none comes in its place."""
        junk = step.sends.get("Cookie")
        if junk is None:
            return step.sends
        if self.by_header:
            return {OWN["session"]: "junk"}
        choice = self.kept.get("session-storable")
        return {"Cookie": f"{junk}; session-storable={choice}" if choice else junk}

    def _given(self, answer: Answer) -> dict[str, str]:
        """What the answer gives it to keep, "" for what is taken away."""
        cookies = answer.all("set-cookie")
        by_header = [(name, value) for name, header in OWN.items() for value in answer.all(header.lower())]
        assert (cookies if self.by_header else by_header) == [], "it came by another way than it is to go"
        found = by_header if self.by_header else list(map(_parsed, cookies))
        assert len(dict(found)) == len(found), (self.row, answer)
        return dict(found)


def _parsed(cookie: str) -> tuple[str, str]:
    match = SET_COOKIE.fullmatch(cookie)
    assert match, cookie
    return next((match[f"n{n}"], match[f"v{n}"]) for n in (1, 2, 3) if match[f"n{n}"] is not None)


# ── the rows ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_whole_table_holds_in_every_row(serve: Serve, place: Path, row: Row) -> None:
    """On one server for a row; in the end the backend has exactly the sessions that memory has."""
    with contextlib.ExitStack() as stack:
        kept = None if row.backend == "none" else stack.enter_context(Kept(row.backend, place))
        server = serve(row.kind, workers=2, env=variables(row, kept))
        for scenario, steps in SCENARIOS.items():
            if scenario == OF_CHOICE and row.mode in CHOICES:
                check_choice(Visitor(server, row))
            else:
                Visitor(server, row).play(steps)
        check_logout(server, row)
        server.check_log()
        store = server.store()
        assert store.count() > 10
        assert kept is None or check_equal(store, kept) == store.count()


def variables(row: Row, kept: Kept | None) -> dict[str, str]:
    return {
        "SHMSESSION_MODE": row.mode.value, "SHMSESSION_COOKIE_MODE": row.cookie.value,
        "SHMSESSION_TRANSPORT": row.transport, "SHMSESSION_BACKEND": "none" if kept is None else kept.url,
    }  # fmt: skip


def check_choice(visitor: Visitor) -> None:
    if visitor.row.mode is SessionMode.OPT_IN:
        visitor.play(CHOICES[SessionMode.OPT_IN])
        return
    for step in (*UNCREATED, *CHOICES[SessionMode.MANUAL]):
        visitor.take(step)


def check_logout(server: Server, row: Row) -> None:
    """Who still has the token of a session that has ended is nobody."""
    visitor, thief = Visitor(server, row), Visitor(server, row)
    visitor.play([Step("POST /login/ada", {"user": "ada"}, cookie="new")])
    thief.kept = dict(visitor.kept)
    thief.take(Step("GET /whoami", {"user": "ada"}))
    visitor.take(Step("POST /logout", {"user": None}, cookie="removed"))
    thief.take(Step("GET /whoami", {"user": None}))
    thief.take(Step("GET /session", {}))
