"""README.md shows what really happens."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import pytest

import shmsession
from shmsession import Key
from shmsession.backends import connect
from tests.databases import MariaDBServer, PostgresServer, RedisServer
from tests.documents import README, ROOT, blocks, code, rows
from tests.servers import Browser, Unanswered, alive, children, wait_for

PACKAGE: Final = Path(shmsession.__file__).parent.parent


class Transcript(NamedTuple):
    """What README.md shows of its program: the answers before a worker is killed, its pid, the answers after."""

    before: list[dict[str, int]]
    killed: int
    after: list[dict[str, int]]


def transcript() -> Transcript:
    (block,) = blocks(README, "console")
    first, kill, second = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    for loop in (first, second):
        command, _, answers = loop.partition("\n")
        turns = re.fullmatch(
            r"for i in ([\d ]+); do curl -s -b jar -c jar http://127.0.0.1:8000/hit; echo; done", command
        )
        assert turns is not None, command
        assert len(turns[1].split()) == len(answers.splitlines())
    killed = re.fullmatch(r"kill -9 (\d+)\n", kill)
    assert killed is not None
    before, after = ([json.loads(line) for line in loop.splitlines()[1:]] for loop in (first, second))
    return Transcript(before, int(killed[1]), after)


def pids(answers: list[dict[str, int]]) -> set[int]:
    return {answer["pid"] for answer in answers}


def commands() -> list[list[str]]:
    """README.md's commands that start its program, each a list of words, variables first."""
    lines = [line for block in blocks(README, "bash") for line in block.text.splitlines() if "hello:app" in line]
    return [shlex.split(line) for line in lines]


@contextmanager
def running(words: list[str], place: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """README.md's program, started by one of its commands, but on a unix socket, and stopped in good order."""
    (program,) = [block for block in blocks(README, "python") if block.file == "hello.py"]
    work = place / "work"
    work.mkdir(exist_ok=True)
    (work / "hello.py").write_text(program.text)
    words = words[words.index("gunicorn") :]
    assert words[words.index("-b") + 1] == "127.0.0.1:8000"
    words[words.index("-b") + 1] = f"unix:{place / 'http'}"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SHMSESSION_")}
    ours = {
        "SHMSESSION_SECURE": "0", "SHMSESSION_DIR": str(place / "sessions"), "SHMSESSION_MAP_SIZE": "4MiB",
        "XDG_STATE_HOME": str(place / "state"), "HOME": str(place), "PYTHONPATH": str(PACKAGE), **variables,
    }  # fmt: skip
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", "--no-control-socket", *words[1:]],
            cwd=work, env={**inherited, **ours}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or serves(str(place / "http")), "the program serves")
        assert process.returncode is None, (place / "log").read_text()
        yield process
        process.terminate()
        process.wait(60)
        assert "Traceback" not in (place / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


@pytest.fixture
def gunicorn(place: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """README.md's program, started by README.md's first command."""
    words = commands()[0]
    assert words[:2] == ["SHMSESSION_SECURE=0", "gunicorn"]
    with running(words, place) as process:
        yield process


def serves(address: str) -> bool:
    try:
        return Browser(address).get("/").status == 404
    except Unanswered:
        return False


def test_the_transcript_is_what_happens(gunicorn: subprocess.Popen[bytes], place: Path) -> None:
    """Each answer has the shape and the count that README.md shows, from four processes, over the death of one."""
    wait_for(lambda: len(children(gunicorn.pid)) == 4, "four workers run")
    workers = children(gunicorn.pid)
    browser = Browser(str(place / "http"))

    def hit() -> dict[str, Any]:
        answer = browser.get("/hit")
        assert answer.status == 200
        return dict(answer.json)

    written = transcript()
    before = [hit() for _ in written.before]
    assert [(list(got), got["hits"]) for got in before] == [(list(said), said["hits"]) for said in written.before]
    assert pids(before) <= set(workers)

    os.kill(before[-1]["pid"], signal.SIGKILL)
    wait_for(lambda: not alive(before[-1]["pid"]), "the worker is dead")
    after = [hit() for _ in written.after]
    assert [(list(got), got["hits"]) for got in after] == [(list(said), said["hits"]) for said in written.after]
    assert before[-1]["pid"] not in pids(after)

    seen, hits = pids(before) | pids(after), after[-1]["hits"]
    while len(seen) < 4:  # which worker answers is the kernel's choice
        answer = hit()
        hits += 1
        assert answer["hits"] == hits
        seen.add(answer["pid"])


def backends() -> dict[str, list[str]]:
    """README.md's commands with a database behind the program, by the database's URL."""
    return {words[0].partition("=")[2]: words for words in commands() if words[0].startswith("SHMSESSION_BACKEND=")}


def test_every_database_line_is_of_the_server_that_the_line_above_starts() -> None:
    """Its port, which is the usual one, and its password."""
    found = []
    for block in blocks(README, "bash"):
        if block.text.startswith("docker run"):
            container, command = map(shlex.split, block.text.splitlines())
            url = command[0].removeprefix("SHMSESSION_BACKEND=")
            assert connect(url).remote
            parts = urlsplit(url)
            port = {"postgresql": 5432, "mysql": 3306, "redis": 6379}[parts.scheme]
            assert (parts.hostname, parts.port) == ("127.0.0.1", None)
            assert f"127.0.0.1:{port}:{port}" in container, "nobody else is to reach it"
            words = {f"POSTGRES_PASSWORD={parts.password}", f"MARIADB_ROOT_PASSWORD={parts.password}"}
            assert parts.password is None or words & set(container)
            found.append(url)
    assert found == list(backends())
    assert len(found) == 3


@pytest.mark.parametrize("scheme", ["postgresql", "mysql", "redis", "sqlite"])
def test_on_each_database_a_visitor_goes_on_when_the_memory_is_lost(scheme: str, place: Path) -> None:
    """The lines of README.md, on servers of our own."""
    (words,) = [words for url, words in backends().items() if url.startswith(scheme)] or commands()[:1]
    with ExitStack() as stack:
        if scheme == "postgresql":
            postgres = stack.enter_context(PostgresServer())
            url = postgres.url(postgres.create_database())
        elif scheme == "mysql":
            mariadb = stack.enter_context(MariaDBServer())
            url = mariadb.url(mariadb.create_database())
        elif scheme == "redis":
            url = stack.enter_context(RedisServer(*RedisServer.DURABLE)).url
        else:
            (url,) = set(re.findall("`SHMSESSION_BACKEND=(sqlite:[^`]+)`", README.read_text(encoding="utf-8")))
        variables = {"SHMSESSION_BACKEND": url}
        if scheme != "sqlite":
            variables["SHMSESSION_KEY"] = str(Key.generate())
        browser = Browser(str(place / "http"))
        with running(words, place, **variables):
            assert [browser.get("/hit").json["hits"] for _ in range(3)] == [1, 2, 3]
        shutil.rmtree(place / "sessions")
        shutil.rmtree(place / "state", ignore_errors=True)
        with running(words, place, **variables):
            assert browser.get("/hit").json["hits"] == 4


def test_the_transcript_is_of_four_workers_and_one_that_was_killed() -> None:
    written = transcript()
    assert len(pids(written.before)) == 4
    assert written.killed in pids(written.before)
    assert pids(written.after) <= pids(written.before) - {written.killed}
    assert [answer["hits"] for answer in written.before + written.after] == list(range(1, 13))


def test_the_program_is_no_longer_than_a_screen() -> None:
    (program,) = [block for block in blocks(README, "python") if block.file == "hello.py"]
    assert len([line for line in program.text.splitlines()[1:] if line]) <= 15


def test_every_promise_names_the_tests_that_show_it() -> None:
    """Each promise's row names files and functions of this suite."""
    table = README.read_text(encoding="utf-8").partition("## What it promises")[2].partition("\n## ")[0]
    promises = rows(table)
    assert [row[0].split()[0] for row in promises] == [f"G{number}" for number in range(1, 9)]
    for row in promises:
        proofs = code(row[2])
        assert proofs, row[0]
        for proof in proofs:
            file, _, function = proof.partition("::")
            source = (ROOT / file).read_text(encoding="utf-8")
            assert not function or re.search(rf"^(async )?def {function}\(", source, re.MULTILINE), proof


def test_it_gives_no_figures_of_speed() -> None:
    """Figures are of one machine and one day; the benchmark gives those of the reader's."""
    section = README.read_text(encoding="utf-8").partition("## Speed")[2].partition("\n## ")[0]
    assert "./dev bench" in section
    assert not re.search(r"\d", section)
