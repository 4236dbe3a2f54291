"""What the processes of one store tell each other in passing: that the backend is down, and that somebody waits."""

import asyncio
import contextlib
import random
from collections.abc import Callable
from functools import partial
from typing import Final

from . import _native
from .clock import Clock
from .memory.doorbell import Doorbell
from .memory.environment import Environment

BACKOFF_MS: Final = (100, 5_000)
"""How long nobody asks a backend that has just failed: the first time, and at most."""
PAUSE_SECONDS: Final = 0.02
"""How often it is asked whether somebody rang, where no bell can be heard, and while somebody waits for the outbox."""
LISTEN_SECONDS: Final = 0.5
"""How often a listener looks for a new bell in the old one's place."""


def is_down(environment: Environment, clock: Clock) -> bool:
    """Whether the backend has just failed, so that nobody asks it. A word from before a restart of the machine ends."""
    boot = clock.boot()
    return boot < environment.backend_down_until <= boot + BACKOFF_MS[1]


def take_down(environment: Environment, clock: Clock, failures: int = 0) -> None:
    """Keep everybody from asking the backend, for longer the more often it has failed before."""
    first, most = BACKOFF_MS
    delay = min(most, first << min(failures, 16))
    environment.backend_down_until = clock.boot() + int(delay * random.uniform(0.5, 1))  # noqa: S311


def ring(bell: Doorbell, environment: Environment) -> None:
    """Wake whoever holds the lease."""
    environment.ring()
    bell.ring()


class Listener:
    """A thread that turns rings of the doorbell into wake-ups of the event loop."""

    def __init__(self, bell: Doorbell, woken: asyncio.Event, is_wanted: Callable[[], bool]) -> None:
        self._bell = bell
        self._is_wanted = is_wanted
        self._woken = woken
        self._stopped = False
        self._ended: asyncio.Event | None = None
        self._loop = asyncio.get_running_loop()

    def listen(self) -> None:
        """Begin, once, if there is a bell."""
        if self._ended is None and self._bell.works:
            ended = asyncio.Event()
            with contextlib.suppress(RuntimeError):  # no thread to be had now: tried again at the next look
                _native.start_thread(partial(self._listen, ended))
                self._ended = ended

    def _listen(self, ended: asyncio.Event) -> None:
        while not self._stopped:
            if not self._is_wanted():  # rings are for whoever holds the lease now
                _native.sleep(PAUSE_SECONDS)
            elif self._bell.wait(LISTEN_SECONDS):
                self._tell(self._woken)
        self._tell(ended)

    def _tell(self, event: asyncio.Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(event.set)

    async def stop(self) -> None:
        """Let the thread end."""
        self._stopped = True
        if self._ended is not None:
            self._bell.ring()
            await self._ended.wait()
