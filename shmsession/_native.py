"""The operating system's threads and waits, also where gevent has put its own in their place."""

import _thread
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


def original(module: Any, name: str) -> Any:
    """What a standard module had under a name before gevent, if that is in use."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey.get_original(module.__name__, name) if monkey else getattr(module, name)


def start_thread(target: Callable[[], object]) -> None:
    """Run `target` in a thread of the operating system, which ends with the process."""
    original(_thread, "start_new_thread")(_run, (target,))


def _run(target: Callable[[], object]) -> None:
    if trace := threading.gettrace():  # debuggers and coverage see it as they see any thread
        sys.settrace(trace)
    target()


def allocate_lock() -> Any:
    """A lock that blocks the thread, and not a greenlet."""
    return original(_thread, "allocate_lock")()


def get_ident() -> int:
    """Which thread of the operating system this is."""
    ident: int = original(_thread, "get_ident")()
    return ident


def sleep(seconds: float) -> None:
    """Block the thread, and not a greenlet."""
    original(time, "sleep")(seconds)
