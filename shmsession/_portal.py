"""One event loop on a native thread: all of a process that waits for a backend runs there, whoever waits for it.

Native also where gevent has put greenlets in the place of threads: a greenlet that waits for a database would stop all
others, and an event loop that waits for gevent's hub would wait for itself.
"""

import asyncio
import contextlib
import os
import selectors
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

from . import _native
from .errors import StoreError

T = TypeVar("T")

_POLL_SECONDS: Final = 0.001


class Portal:
    """An event loop that lives until `close`. It belongs to the process that made it."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._loop = asyncio.SelectorEventLoop(_native.original(selectors, "DefaultSelector")())
        self._running = _native.allocate_lock()
        self._running.acquire()
        self._gate = _native.allocate_lock()
        self._closed = False
        self._thread = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        """What was begun and has not ended: the loop alone would leave a task that waits to the garbage collector."""
        _native.start_thread(self._run)

    def _run(self) -> None:
        self._thread = _native.get_ident()
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(_cancel_all())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()
            self._thread = 0  # its number may be another's from now on
            self._running.release()

    async def ask(self, work: Coroutine[Any, Any, T]) -> T:
        """What it returns or raises there, awaited on any event loop. Whoever is cancelled disturbs nobody else."""
        caller = asyncio.get_running_loop()
        future: asyncio.Future[T] = caller.create_future()

        def deliver(task: "asyncio.Task[T]") -> None:
            with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits any more
                caller.call_soon_threadsafe(_copy, task, future)

        self._begin(work, deliver)
        return await future

    @property
    def is_here(self) -> bool:
        """Whether this is its own thread, on which nobody can wait for it."""
        return bool(_native.get_ident() == self._thread)

    def wait(self, work: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """The same, blocking this thread, or this greenlet. Raises TimeoutError after `seconds`; the work goes on."""
        if self.is_here:
            work.close()
            raise StoreError("a hook of the flusher cannot wait for the backend: do it in another thread")
        done: list[asyncio.Task[T]] = []
        waiting = _native.allocate_lock()
        waiting.acquire()

        def deliver(task: "asyncio.Task[T]") -> None:
            done.append(task)
            waiting.release()

        self._begin(work, deliver)
        if "gevent.monkey" in sys.modules:
            end = None if seconds is None else time.monotonic() + seconds
            while not done and (end is None or time.monotonic() < end):
                time.sleep(_POLL_SECONDS)  # lets other greenlets run
        else:
            waiting.acquire(timeout=-1 if seconds is None else seconds)
        if not done:
            raise TimeoutError
        return _result(done[0])

    def _begin(self, work: Coroutine[Any, Any, T], deliver: "Callable[[asyncio.Task[T]], None]") -> None:
        def begin() -> None:
            task = self._loop.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            task.add_done_callback(deliver)

        with self._gate:  # what begins before `close` is cancelled by it, and nothing begins after it
            if not self._closed:
                self._loop.call_soon_threadsafe(begin)
                return
        work.close()
        raise StoreError("this store has been closed")

    def close(self) -> None:
        """End what still runs, and the thread."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        with self._running:
            return


def _result(task: "asyncio.Task[T]") -> T:
    if task.cancelled():
        raise StoreError("this store has been closed")
    return task.result()


def _copy(task: "asyncio.Task[T]", future: "asyncio.Future[T]") -> None:
    if future.done():
        if not task.cancelled():
            task.exception()  # nobody waits any more: it is no news
        return
    try:
        future.set_result(_result(task))
    except BaseException as error:  # noqa: BLE001  # raised where it is awaited
        future.set_exception(error)


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=1.0)  # what cannot be cancelled is left behind
