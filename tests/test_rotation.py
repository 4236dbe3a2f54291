"""The Keys of a live server are changed again and again, as the documentation says, and nobody is logged out."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from shmsession import Key
from tests.figures import BREATH, report, size
from tests.servers import SYNC, Browser, Lane, Serve, Server, Unanswered, wait_for

pytest_plugins = ["tests.hosts"]

KEPT: Final = 4
"""So many Keys a server has at most."""
VISITORS: Final = 3

CONFIGURATION: Final = """
from shmsession.contrib.gunicorn import *
import shmsession.wsgi  # here, so that no worker has to load it

control_socket_disable = True
graceful_timeout = 0  # how long gunicorn looks on, every 0.1 s, while its old workers end: they end without it
worker_tmp_dir = {place!r}
"""


class KeyFile:
    """What a server reads at every reload: the next Key, those that sealed before, and last the one that seals."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = [Key.generate(), Key.generate()]
        self._write()

    def turn(self) -> None:
        """Both steps of the documentation, each for a Key of its own: the one in front, which by now all workers have,
        is put last, and a new one in front. The oldest retires."""
        following, *older = self.keys
        self.keys = [Key.generate(), *older[2 - KEPT :], following]
        self._write()

    def _write(self) -> None:
        """All of it or nothing: a worker may start at any moment."""
        scratch = self.path.with_suffix(".new")
        scratch.touch(0o600)
        scratch.write_text("".join(f"{key}\n" for key in self.keys))
        scratch.replace(self.path)


@dataclass
class Visitor:
    """Asks all the time, and notes what is wrong with an answer. `pid`: who answered the latest request that writes."""

    browser: Browser
    name: str
    hits: int = 0
    answers: int = 0
    cookies: int = 0
    pid: int = 0
    trouble: list[str] = field(default_factory=list)

    def log_in(self) -> dict[str, str]:
        """Returns the first cookies."""
        assert self.browser.get(f"/login/{self.name}").status == 200
        return dict(self.browser.cookies)

    def run(self, stop: threading.Event) -> None:
        while not (stop.wait(BREATH) or self.trouble):
            self.hits += 1
            self.pid = self._ask("/hit")
            self._ask("/whoami")

    def _ask(self, path: str) -> int:
        try:
            answer = self.browser.get(path)
        except Unanswered as error:
            self.trouble.append(f"{path}: {error}")
            return 0
        self.answers += 1
        self.cookies += len(answer.all("set-cookie"))
        if answer.status != 200 or answer.json != {"user": self.name, "hits": self.hits, "late": 0}:
            self.trouble.append(f"{path}, {self.hits} times: {answer.status} {answer.body[:80]!r}")
            return 0
        return answer.pid


@contextlib.contextmanager
def asking(visitors: list[Visitor]) -> Iterator[None]:
    """All of them at once, to the end."""
    stop = threading.Event()
    threads = [threading.Thread(target=visitor.run, args=(stop,)) for visitor in visitors]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert [said for visitor in visitors for said in visitor.trouble] == []


@dataclass
class Straddler:
    """Somebody with two tabs: one waits for the old worker while the new one serves the other. `rounds`: so often."""

    browser: Browser
    rounds: int = 0

    def rotate(self, server: Server, file: KeyFile) -> int:
        """Change the Keys and reload while the old worker has a request in hand; returns the new worker's pid.

        The body of that request is the cookie that the new worker gives out meanwhile: the old one must know its Key,
        and that of the record, to which it adds.
        """
        (old,), cookie = server.worker_pids(), self._cookie
        with contextlib.closing(Lane(server.address)) as lane:
            begun = {"Expect": "100-continue", "Content-Length": str(len(cookie)), "Connection": "close"}
            lane.send([self.browser.raw("PUT", "/late", begun)])
            assert lane.answer().status == 100
            file.turn()
            server.tell(signal.SIGHUP)
            told = self.browser.get("/hit")
            assert (told.status, told.pid != old) == (200, True)
            assert self._cookie != cookie
            lane.send([self._cookie.encode()])
            answer = lane.answer()
        assert answer.status == 200, answer
        assert (answer.pid, answer.json) == (old, told.json)
        self.rounds += 1
        assert told.json == {"user": "straddler", "hits": self.rounds, "late": self.rounds - 1}
        return told.pid

    @property
    def _cookie(self) -> str:
        return f"session={self.browser.cookies['session']}"


@pytest.mark.soak
def test_keys_are_changed_under_load_and_nobody_is_logged_out(serve: Serve, place: Path) -> None:
    """One HUP a rotation. Every answer is a 200 that knows its visitor, and every hit is counted."""
    rotate(serve, place, size(10_000, 500))


def test_a_preloaded_application_reads_the_key_file_at_every_reload_too(serve: Serve, place: Path) -> None:
    """The arbiter keeps the application, not its Keys."""
    rotate(serve, place, 2 * KEPT, preload=True)


def rotate(serve: Serve, place: Path, rotations: int, *, preload: bool = False) -> None:
    """In the end the newest Key alone opens all, for each session has been sealed anew, and the first nothing more."""
    file = KeyFile(place / "keys")
    (place / "conf.py").write_text(CONFIGURATION.format(place=str(place)))
    env = {"SHMSESSION_KEY": "", "SHMSESSION_KEY_FILE": str(file.path)}
    server = serve(
        SYNC, workers=1, env=env, config=place / "conf.py", app="tests.rotating_app:app", preload=preload
    )  # fmt: skip
    visitors = [Visitor(server.browser(), f"u{number}") for number in range(VISITORS)]
    first = [visitor.log_in() for visitor in visitors]
    straddler = Straddler(server.browser())
    straddler.browser.get("/login/straddler")
    begun = time.monotonic()
    with asking(visitors):
        for _ in range(rotations):
            new = straddler.rotate(server, file)
            wait_for(lambda new=new: is_served_by(new, server, visitors), "the reload")  # type: ignore[misc]
    seconds = time.monotonic() - begun
    check_newest(server, file, [*visitors, straddler])
    for visitor, cookies in zip(visitors, first, strict=True):
        assert server.browser(cookies).get("/whoami").json == {}
        assert visitor.cookies >= rotations, "each Key has sealed it"
    report(
        "rotations of the keyring over HUP", rotations=rotations, preload=preload, logouts=0, unanswered=0,
        answers=sum(visitor.answers for visitor in visitors), seconds_each=round(seconds / rotations, 3),
    )  # fmt: skip


def is_served_by(new: int, server: Server, visitors: list[Visitor]) -> bool:
    """Whether the old worker is gone, and everybody has had an answer of the new one."""
    assert not any(visitor.trouble for visitor in visitors), [visitor.trouble for visitor in visitors]
    return server.worker_pids() == [new] and all(visitor.pid == new for visitor in visitors)


def check_newest(server: Server, file: KeyFile, visitors: Sequence[Visitor | Straddler]) -> None:
    """The Key that seals now is the only one that anybody needs."""
    newest = server.store(keys=file.keys[-1:])
    for visitor in visitors:
        told = visitor.browser.get("/hit").json
        header = f"session={visitor.browser.cookies['session']}".encode()
        assert newest.request_session(lambda header=header: header).to_dict() == told  # type: ignore[misc]
