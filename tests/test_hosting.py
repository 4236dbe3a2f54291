"""What servers do to their workers, and what operators do to servers: sessions stay, and mistakes are said at once."""

import contextlib
import os
import re
import signal
from pathlib import Path

import pytest

from shmsession import Key
from tests.servers import (
    ASGI,
    GTHREAD,
    KINDS,
    ON_GUNICORN,
    PATIENCE,
    ROOT,
    SYNC,
    UVICORN,
    UVICORN_WORKER,
    Kind,
    Serve,
    Server,
    Unanswered,
    alive,
    children,
    wait_for,
)

pytest_plugins = ["tests.hosts"]

WITHOUT_HOOKS = "control_socket_disable = True\ntimeout = 60\n"


def gone(pids: list[int]) -> bool:
    return not any(map(alive, pids))


# ── replacing workers ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "preload"), [(SYNC, True), (GTHREAD, False), (ASGI, True), (UVICORN_WORKER, False), (UVICORN, False)]
)
def test_a_reload_replaces_the_workers_and_keeps_the_sessions(serve: Serve, kind: Kind, preload: bool) -> None:
    server = serve(kind, preload=preload, workers=2)
    browser = server.browser()
    browser.post("/login/ada")
    old = server.worker_pids()
    server.tell(signal.SIGHUP)
    acknowledged = sent = 0
    while not gone(old):
        sent += 1
        try:
            hits = browser.get("/hit").json["hits"]
        except Unanswered:  # a worker that ends may reset what it has accepted and not begun
            continue
        acknowledged += 1
        assert acknowledged <= hits <= sent
    wait_for(lambda: len(server.worker_pids()) == 2, "the new workers run")
    assert not set(old) & set(server.worker_pids())
    session = browser.get("/session").json
    assert session["user"] == "ada"
    assert acknowledged <= session.get("hits", 0) <= sent
    assert browser.post("/logout").pid in server.worker_pids()


@pytest.mark.parametrize("preload", [False, True])
@pytest.mark.parametrize("kind", [SYNC, ASGI], ids=str)
def test_two_generations_after_usr2_share_every_session_and_the_old_one_may_end(
    serve: Serve, kind: Kind, preload: bool
) -> None:
    server = serve(kind, preload=preload, workers=2)
    browser, old_master, old_workers = server.browser(), server.pid, server.worker_pids()
    browser.post("/login/ada")
    server.tell(signal.SIGUSR2)
    wait_for(lambda: any(len(children(pid)) == 2 for pid in children(old_master)), "a second generation of workers")
    (new_master,) = (pid for pid in children(old_master) if pid not in old_workers)
    seen: set[int] = set()
    hits = 0
    while not (seen & set(old_workers) and seen & set(children(new_master))):
        answer = browser.get("/hit")
        hits += 1
        assert answer.json["hits"] == hits
        seen.add(answer.pid)
        quiet = set(old_workers) if seen & set(old_workers) else set(children(new_master))
        if len(seen & quiet) == len(quiet):
            for pid in quiet:  # both have answered and are idle: let the others have the next connection
                os.kill(pid, signal.SIGSTOP)
            try:
                hits += 1
                answer = browser.get("/hit")
                assert answer.json["hits"] == hits
                seen.add(answer.pid)
            finally:
                for pid in quiet:
                    os.kill(pid, signal.SIGCONT)
    assert server.stop(signal.SIGTERM) == 0
    wait_for(lambda: gone(old_workers), "the old generation ends")
    assert browser.get("/session").json == {"user": "ada", "hits": hits}
    assert browser.get("/hit").pid in children(new_master)
    assert browser.post("/logout").status == 200
    os.kill(new_master, signal.SIGTERM)
    wait_for(lambda: not alive(new_master), "the new generation ends")


def test_a_worker_that_times_out_is_replaced_and_takes_no_session_with_it(serve: Serve) -> None:
    server = serve(SYNC, workers=2, flags=("--timeout", "1"), may_fail=True)  # gunicorn logs the abort with a traceback
    browser = server.browser()
    browser.post("/login/ada")
    browser.get("/hit")
    old = server.worker_pids()
    stuck = browser.begin("POST", "/slow/a/b?seconds=30")
    wait_for(lambda: set(old) - set(server.worker_pids()), "the stuck worker is killed")
    with contextlib.suppress(Unanswered, OSError):
        assert stuck.answer().status == 500
    wait_for(lambda: len(server.worker_pids()) == 2, "another worker takes its place")
    assert browser.get("/session").json == {"user": "ada", "hits": 1}
    assert browser.get("/hit").json["hits"] == 2
    assert "WORKER TIMEOUT" in server.text


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_ctrl_c_ends_everything_in_good_order_and_sessions_wait_for_the_next_start(serve: Serve, kind: Kind) -> None:
    flags = ("--graceful-timeout", "2") if kind.gunicorn else ()  # its gthread may hang on two signals at once
    server = serve(kind, workers=2, flags=flags, may_fail=kind is SYNC)  # sync ends anywhere, with a traceback
    server.wait_for_all()
    browser = server.browser()
    browser.post("/login/ada")
    everybody = [server.pid, *children(server.pid)]
    os.killpg(server.pid, signal.SIGINT)  # as a terminal does
    assert server.stop(0) in (0, -signal.SIGINT)
    wait_for(lambda: gone(everybody), "all processes end")
    server.start()
    assert browser.get("/whoami").json["user"] == "ada"


# ── with and without hooks ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "preload"), [(SYNC, False), (GTHREAD, True), (ASGI, False), (ASGI, True), (UVICORN_WORKER, True)]
)
def test_losing_the_hooks_loses_no_guarantee(serve: Serve, place: Path, kind: Kind, preload: bool) -> None:
    config = place / "plain.conf.py"
    config.write_text(WITHOUT_HOOKS)
    server = serve(kind, preload=preload, config=config)
    browser = server.browser()
    browser.post("/create")
    with server.desks(browser.cookies) as desks:
        for number, ask in enumerate([*desks.values()] * 5, 1):
            assert ask("GET", "/hit").json["hits"] == number
    victims = server.worker_pids()
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(server.worker_pids()) == 4 and not set(victims) & set(server.worker_pids()), "new workers")
    assert browser.get("/hit").json["hits"] == 21


@pytest.mark.parametrize("kind", [SYNC, ASGI], ids=str)
def test_preloading_leaves_no_environment_open_for_the_workers_to_inherit(serve: Serve, kind: Kind) -> None:
    server = serve(kind, preload=True)
    server.wait_for_all()

    def maps(pid: int) -> bool:
        return "data.mdb" in Path(f"/proc/{pid}/maps").read_text()

    assert not maps(server.pid)
    assert all(map(maps, server.worker_pids()))
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    wait_for(lambda: len(server.worker_pids()) == 4, "another worker takes its place")
    server.wait_for_all()
    assert not maps(server.pid)


@pytest.mark.parametrize(("kind", "preload"), [(SYNC, False), (ASGI, True)])
def test_the_arbiter_may_be_told_which_store_it_is(serve: Serve, kind: Kind, preload: bool) -> None:
    target = kind.app.replace(":app", ":store")
    server = serve(kind, preload=preload, workers=2, env={"SHMSESSION_STORE": target})
    browser = server.browser()
    browser.post("/login/ada")
    victim = server.worker_pids()[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(set(server.worker_pids()) - {victim}) == 2, "another worker takes its place")
    assert browser.get("/whoami").json["user"] == "ada"


def test_hooks_of_the_users_own_run_beside_ours(serve: Serve, place: Path) -> None:
    config = place / "chained.conf.py"
    config.write_text(
        WITHOUT_HOOKS + "from shmsession.contrib.gunicorn import *\n"
        "from shmsession.contrib.gunicorn import chain\n"
        "def mine(server, worker):\n    server.log.info('mine in %s', worker.pid)\n"
        "def begin(server):\n    server.log.info('my arbiter starts')\n"
        "post_fork = chain(post_fork, mine)\n"
        "on_starting = chain(begin, on_starting)\n"
    )
    server = serve(ASGI, config=config, workers=2)
    server.wait_for_all()
    assert "my arbiter starts" in server.text
    assert {int(pid) for pid in re.findall(r"mine in (\d+)", server.text)} == set(server.worker_pids())


@pytest.mark.parametrize("kind", [GTHREAD, ASGI, UVICORN], ids=str)
def test_the_examples_serve_tcp_too(serve: Serve, kind: Kind) -> None:
    browser = serve(kind, workers=2, tcp=True).browser()
    assert [browser.get("/hit").json["hits"] for _ in range(5)] == [1, 2, 3, 4, 5]


# ── what cannot work stops the start ───────────────────────────────────────────────────────────────────────────

EVERY_WAY = [*((kind, False) for kind in KINDS), *((kind, True) for kind in ON_GUNICORN)]
WRONG = {
    "SHMSESSION_MODE": "sometimes",
    "SHMSESSION_COOKIE_MODE": "chocolate",
    "SHMSESSION_SECURE": "yes",
    "SHMSESSION_LIFESPAN": "6h",
    "SHMSESSION_MAX_LIFESPAN": "-1",
    "SHMSESSION_ABSOLUTE_LIFESPAN": "0",
    "SHMSESSION_MEMORY_LIFESPAN": "",
    "SHMSESSION_MAP_SIZE": "64 bananas",
    "SHMSESSION_NAME": "a/b",
    "SHMSESSION_BACKEND": "oracle://localhost",
}


def fails_at_start(place: Path, kind: Kind, variable: str, value: str, **options: object) -> str:
    """Start it with a wrong setting, wait until it has stopped by itself, and return what it said of the setting."""
    env = {variable: value or " "}
    server = Server(kind, place, workers=1, env=env, **options)  # type: ignore[arg-type]
    process = server.launch()
    try:
        status = process.wait(PATIENCE)
        assert status != 0 or not kind.gunicorn
        assert not Path(str(server.address)).is_socket() or not kind.gunicorn
        assert "Traceback" not in server.text
        (line,) = {line.partition("shmsession: ")[2] for line in server.text.splitlines() if "shmsession: " in line}
        assert variable in line, server.text
        return line
    except BaseException:
        print(server.text)
        raise
    finally:
        server.reap()


@pytest.mark.parametrize(("kind", "preload"), EVERY_WAY)
def test_a_key_that_is_none_stops_the_start_with_one_line_that_does_not_quote_it(
    place: Path, kind: Kind, preload: bool
) -> None:
    line = fails_at_start(place, kind, "SHMSESSION_KEY", "hunter2", preload=preload)
    assert "Key.generate()" in line
    assert "hunter2" not in line


@pytest.mark.parametrize(("kind", "preload"), EVERY_WAY)
def test_a_directory_that_cannot_be_made_stops_the_start(place: Path, kind: Kind, preload: bool) -> None:
    line = fails_at_start(place, kind, "SHMSESSION_DIR", str(place / "missing" / "sessions"), preload=preload)
    assert str(place / "missing" / "sessions") in line


@pytest.mark.parametrize(("kind", "preload"), [(SYNC, False), (ASGI, True), (UVICORN, False)])
def test_a_map_larger_than_the_memory_stops_the_start(place: Path, kind: Kind, preload: bool) -> None:
    fails_at_start(place, kind, "SHMSESSION_MAP_SIZE", "900000GiB", preload=preload)


@pytest.mark.parametrize("variable", WRONG)
def test_every_wrong_setting_is_named_at_the_start(place: Path, variable: str) -> None:
    fails_at_start(place, SYNC, variable, WRONG[variable])


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("examples.nowhere:store", "No module named"),
        ("examples.asgi_app:nothing", "no attribute"),
        ("examples.asgi_app:app", "not a SessionStore"),
        (":store", "module:attribute"),
    ],
)
def test_a_store_that_is_not_there_stops_the_start(place: Path, target: str, says: str) -> None:
    assert says in fails_at_start(place, ASGI, "SHMSESSION_STORE", target)


def test_a_key_file_that_others_may_read_stops_the_start(place: Path) -> None:
    file = place / "key"
    file.write_text(f"{Key.generate()}\n")
    file.chmod(0o644)
    for kind in (SYNC, UVICORN):
        server = Server(
            kind, place, workers=1, env={"SHMSESSION_KEY": "", "SHMSESSION_KEY_FILE": str(file)}, cwd=ROOT
        )  # fmt: skip
        process = server.launch()
        try:
            process.wait(PATIENCE)
            assert f"shmsession: the key file {file} (SHMSESSION_KEY_FILE) must be" in server.text
            assert "Traceback" not in server.text
        finally:
            server.reap()
