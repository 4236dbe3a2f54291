"""G6: a cookie that we did not issue, or that has ended, is no session: never adopted, nothing written."""

import random as randomness
import string
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmsession import Key, SessionConfig, SessionStore
from shmsession.ids import new_id
from tests.figures import report, rng, size
from tests.servers import ASGI, GTHREAD, ROOT, SYNC, UVICORN, UVICORN_WORKER, Browser, Kind, Running, Serve, last_commit

pytest_plugins = ["tests.hosts"]

ALPHABET = string.ascii_letters + string.digits + "-_"
LATIN = "".join(map(chr, range(0x20, 0x100)))


def forgeries(server_store: SessionStore, valid: str, ended: str, random: randomness.Random) -> Iterator[str]:
    """Cookie headers for ever, each of which must lead nowhere."""
    other_key = SessionStore(config=SessionConfig(keys=(Key.generate(),), secure=False, name="suite"))
    other_name = SessionStore(
        config=SessionConfig(keys=server_store.config.keys, secure=False, name="suite", cookie_name="other")
    )
    now = server_store.clock.now()

    def junk(letters: str, most: int) -> str:
        return "".join(random.choices(letters, k=random.randrange(most)))

    def mutated() -> str:
        place = random.randrange(len(valid))
        return valid[:place] + random.choice([c for c in ALPHABET if c != valid[place]]) + valid[place + 1 :]

    def swapped() -> str:
        first, second = sorted(random.sample(range(len(valid)), 2))
        changed = valid[:first] + valid[second] + valid[first + 1 : second] + valid[first] + valid[second + 1 :]
        return changed if changed != valid else mutated()

    kinds: list[Callable[[], str]] = [
        lambda: f"session={junk(ALPHABET, 200)}",
        lambda: f"session={''.join(random.choices(ALPHABET, k=92))}",
        lambda: f"session={junk(LATIN.replace(';', '').replace(',', ''), 120)}",
        lambda: f"session={mutated()}",
        lambda: f"session={mutated()}",
        lambda: f"session={swapped()}",
        lambda: f"session={valid[: random.randrange(len(valid))]}",
        lambda: f"session={valid}{junk(ALPHABET, 8)}x",
        lambda: f'session="{valid}"',
        lambda: f"session={valid}=",
        lambda: f"session={valid.swapcase()}",
        lambda: f"session={other_key.transport.value(new_id(), now)}",
        lambda: f"session={other_name.transport.value(new_id(), now)}",
        lambda: f"session={server_store.transport.value(new_id(), now)}",  # our seal, and no such session
        lambda: f"session={ended}",
        lambda: f"other={valid}; Session={valid}; xsession={valid}",
        lambda: f"session={valid}; session={valid}",
        lambda: f"session={junk(ALPHABET, 100)}; a=b; session={valid}",
        lambda: f"session={valid}; session=",
        lambda: f"session={'A' * random.randrange(100, 6000)}",
        lambda: "session=" + "%" * random.randrange(100),
        lambda: f"session={junk(LATIN, 40)}\x7f",
        lambda: f"session={valid[:40]}\t{valid[40:]}",
        lambda: f"session={valid[:40]}{chr(random.randrange(1, 32)).replace(chr(10), '').replace(chr(13), '')}",
        lambda: f"session={valid[:40]}\0{valid[41:]}",
        lambda: ";" * random.randrange(1, 400),
        lambda: "session",
        lambda: "=",
    ]  # fmt: skip
    while True:
        yield random.choice(kinds)()


@pytest.mark.soak
@pytest.mark.parametrize("kind", [SYNC, GTHREAD, ASGI, UVICORN_WORKER, UVICORN], ids=str)
def test_no_hostile_cookie_is_adopted_and_none_writes(running: Running, kind: Kind) -> None:
    total = size(100_000, 5_000) // 5
    server = running(kind)
    victim, leaver = server.browser(), server.browser()
    victim.post("/login/ada")
    leaver.post("/login/grace")
    ended = leaver.cookies["session"]
    leaver.post("/logout")
    store = server.store()
    before, statuses = last_commit(store), dict[int, int]()
    headers = forgeries(store, victim.cookies["session"], ended, rng(f"hostile {kind}"))
    with server.browser(keep_alive=kind.reusable) as attacker:
        for number in range(total):
            header, path = next(headers), ("/session", "/whoami")[number % 2]
            answer = attacker.request("GET", path, {"Cookie": header})
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            if answer.status == 200:
                assert answer.json in ({}, {"user": None, "pid": answer.pid}), (
                    f"a hostile cookie was believed: {header!r}"
                )
            assert answer.all("set-cookie") == []
    assert last_commit(store) == before, "a hostile cookie led to a write"
    assert set(statuses) <= {200, 400, 431}, statuses  # 400: the server itself refuses control bytes in a header
    assert statuses[200] > total // 2
    assert victim.get("/whoami").json["user"] == "ada"
    assert "Traceback" not in server.text
    report(f"G6 hostile cookies, {kind}", cookies=total, adopted=0, writes=0, tracebacks=0, statuses=statuses)


@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_writing_with_a_hostile_cookie_begins_a_session_with_an_id_of_our_own(running: Running, kind: Kind) -> None:
    server = running(kind)
    victim = server.browser()
    victim.post("/login/ada")
    headers = forgeries(server.store(), victim.cookies["session"], victim.cookies["session"][::-1], rng(f"w {kind}"))
    seen = set()
    for header in (next(headers) for _ in range(100)):
        attacker = server.browser()
        answer = attacker.request("POST", "/set/a/b", {"Cookie": header})
        if answer.status == 200:
            assert len(answer.all("set-cookie")) == 1
            assert attacker.cookies["session"] not in header
            assert attacker.get("/session").json == {"a": "b"}
            seen.add(attacker.cookies["session"])
    assert len(seen) > 50
    assert victim.get("/session").json == {"user": "ada"}


@pytest.mark.parametrize("kind", [GTHREAD, ASGI], ids=str)
def test_login_always_gives_a_new_id_and_the_attackers_is_nobody(running: Running, kind: Kind) -> None:
    server = running(kind)
    for number in range(20):
        attacker = server.browser()
        attacker.get("/hit")
        victim = server.browser(attacker.cookies)  # fixed: the victim was made to use the attacker's session
        victim.post(f"/login/u{number}")
        assert victim.cookies["session"] != attacker.cookies["session"]
        assert attacker.get("/whoami").json["user"] is None
        assert attacker.get("/session").json == {}
        again = dict(victim.cookies)
        victim.post(f"/login/v{number}")
        assert victim.cookies["session"] != again["session"]
        assert server.browser(again).get("/whoami").json["user"] is None
        assert victim.get("/whoami").json["user"] == f"v{number}"


def working_directory(place: Path, name: str) -> Path:
    """A directory that holds the examples, as another clone would."""
    directory = place / name
    directory.mkdir()
    for entry in ("examples", "gunicorn.conf.py"):
        (directory / entry).symlink_to(ROOT / entry)
    return directory


@pytest.mark.parametrize("one_key", [False, True], ids=["own-keys", "one-key"])
def test_two_applications_with_default_settings_share_no_session(serve: Serve, place: Path, one_key: bool) -> None:
    """Neither by a Key, which each makes for itself, nor, should both have the same, by their stores."""
    key = str(Key.generate()) if one_key else ""
    servers = []
    for name, kind in (("one", ASGI), ("two", GTHREAD)):
        here = place / name
        here.mkdir()
        shared = {"SHMSESSION_DIR": str(place / "sessions"), "XDG_STATE_HOME": str(place / "state")}
        env = {**shared, "SHMSESSION_KEY": key, "SHMSESSION_NAME": ""}
        servers.append(serve(kind, place=here, cwd=working_directory(here, "clone"), env=env, workers=2))
    for own, foreign in (servers, reversed(servers)):
        browser = own.browser()
        browser.post("/login/ada")
        thief = Browser(foreign.address, browser.cookies)
        assert thief.get("/session").json == {}
        assert thief.get("/whoami").json["user"] is None
        assert thief.get("/hit").json["hits"] == 1
        assert thief.cookies["session"] != browser.cookies["session"]
        assert browser.get("/session").json == {"user": "ada"}
    assert len([path for path in (place / "sessions").iterdir() if path.is_dir()]) == 2
    if not one_key:
        keys = {path.read_text() for path in (place / "state" / "shmsession").glob("*.key")}
        assert len(keys) == 2
