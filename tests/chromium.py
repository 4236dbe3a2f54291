"""One headless Chromium for the tests of a process, and the sites that it visits.

Both live on an event loop in a thread of their own: Playwright's would keep every other test from `asyncio.run`.
"""

import asyncio
import contextlib
import os
import shutil
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, Self, TypeVar

import pytest
import uvicorn
from playwright.async_api import Browser, BrowserContext, Playwright, async_playwright

from tests.servers import PATIENCE, alive, children, new_place, wait_for

T = TypeVar("T")
Script = Callable[[BrowserContext], Awaitable[T]]
"""What a test does in a browser that has no cookie yet."""
Browse = Callable[[Script[Any]], Any]
"""The fixture `browse`: plays a script and returns what it returns."""
Host = Callable[..., "Site"]
"""The fixture `host(app, tls=…)`: serves an ASGI application until the end of the test."""

PROGRAMS: Final = ("chromium-headless-shell", "chrome-headless-shell", "chromium", "google-chrome")
DEBIAN: Final = Path("/usr/lib/chromium/chromium-headless-shell")
"""The program itself: the one on PATH is a shell that waits for it."""
FLAGS: Final = (
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP *.example.test 127.0.0.1",
)  # fmt: skip


def program() -> str:
    """The path of a Chromium."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    assert found, "found no Chromium: ./dev test installs it; Debian has it in chromium-headless-shell"
    return str(DEBIAN) if found == f"/usr/bin/{DEBIAN.name}" and DEBIAN.exists() else found


class Chromium:
    """A browser, started when it is first used. At the end of its `with` nothing is left of it."""

    def __init__(self) -> None:
        self._home = new_place()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="browser", daemon=True)
        self._driver: Playwright | None = None
        self._browser: Browser | None = None
        self._processes: set[int] = set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        pids = self._processes.union(*map(_descendants, self._processes))
        try:
            if self._browser is not None:
                self.run(self._browser.close())
            if self._driver is not None:
                self.run(self._driver.stop())
                wait_for(lambda: not any(map(alive, pids)), "the browser is gone")
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE)
            self._loop.close()
            shutil.rmtree(self._home)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the browser's loop, and return what it returns. Not for what runs there."""
        assert threading.current_thread() is not self._thread
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(2 * PATIENCE)

    def play(self, script: Script[T]) -> T:
        """Play a script in a context of its own; an error in a page's own script is one of the test."""

        async def played() -> T:
            errors: list[str] = []
            context = await (await self._started()).new_context(ignore_https_errors=True)
            context.set_default_timeout(PATIENCE * 1000)
            context.on("weberror", lambda error: errors.append(str(error.error)))
            try:
                result = await script(context)
            finally:
                await context.close()
            assert errors == []
            return result

        return self.run(played())

    @contextlib.contextmanager
    def serving(self, app: Any, certificate: Path | None = None) -> Iterator["Site"]:
        """Serve an ASGI application, over https with a certificate whose key lies beside it."""
        server, listener, served = self.run(_serve(app, certificate))
        try:
            yield Site("https" if certificate else "http", listener.getsockname()[1])
        finally:
            server.should_exit = True
            self.run(asyncio.wait_for(served, PATIENCE))
            listener.close()

    async def _started(self) -> Browser:
        if self._browser is None:
            before = set(children(os.getpid()))
            self._driver = await _start_driver()
            self._processes = set(children(os.getpid())) - before
            environ: dict[str, str | float | bool] = {**os.environ, "HOME": str(self._home)}
            self._browser = await self._driver.chromium.launch(
                executable_path=program(), args=[*FLAGS], chromium_sandbox=False, env=environ
            )
        return self._browser


async def _start_driver() -> Playwright:
    """Playwright's own program, with the libraries that ./dev has unpacked for it where the system lacks them."""
    node = shutil.which("playwright-node")
    with pytest.MonkeyPatch.context() as patch:
        if node:
            patch.setenv("PLAYWRIGHT_NODEJS_PATH", node)
        return await async_playwright().start()


class Site(NamedTuple):
    """Where an application is served. Chromium takes all names under localhost and example.test for this machine."""

    scheme: str
    port: int

    def at(self, host: str = "localhost") -> str:
        """The origin under one of its names."""
        return f"{self.scheme}://{host}:{self.port}"


async def _serve(app: Any, certificate: Path | None) -> "tuple[uvicorn.Server, socket.socket, asyncio.Task[None]]":
    """A server on a port of its own, which answers."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio asks: TCP has no delay
    listener.bind(("127.0.0.1", 0))
    key = certificate.with_name("key") if certificate else None
    server = uvicorn.Server(
        uvicorn.Config(
            app, lifespan="off", log_config=None, timeout_graceful_shutdown=1, ssl_certfile=certificate, ssl_keyfile=key
        )
    )
    task = asyncio.create_task(server.serve([listener]))
    while not (server.started or task.done()):  # noqa: ASYNC110  (uvicorn tells nobody)
        await asyncio.sleep(0.001)
    assert server.started, "the site cannot be served"
    return server, listener, task


def _descendants(pid: int) -> set[int]:
    return {found for child in children(pid) for found in (child, *_descendants(child))}
