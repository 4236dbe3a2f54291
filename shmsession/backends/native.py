"""A native thread for a library that blocks: native also under gevent, and at rest while the process forks."""

import asyncio
import os
from _queue import SimpleQueue  # not queue.SimpleQueue: gevent replaces that by one of its own
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar

from shmsession import _native

T = TypeVar("T")


class _Job(NamedTuple):
    work: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"
    last: bool


class NativeThread:
    """Does one thing after another, for event loops of any thread. It belongs to the process that made it.

    A fork waits until the job at hand is done, so that the child finds no lock of the library taken for ever, and
    then calls `before_fork` in whatever thread forks. The child has no such thread: it makes its own.
    """

    def __init__(self, before_fork: Callable[[], None] = lambda: None) -> None:
        self.pid = os.getpid()
        self.before_fork = before_fork
        self.resting = _native.allocate_lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        _threads[id(self)] = self
        _native.start_thread(partial(_serve, self._jobs, self.resting))

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises in the thread. Whoever is cancelled stops waiting; what has begun is ended."""
        return await self._put(work, last=False)

    async def end(self, work: Callable[[], None]) -> None:
        """Do this last, cancelled or not, and end."""
        _threads.pop(id(self), None)
        await asyncio.shield(self._put(work, last=True))

    def _put(self, work: Callable[[], T], *, last: bool) -> "asyncio.Future[T]":
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._jobs.put(_Job(work, loop, future, last))
        return future


def _serve(jobs: "SimpleQueue[_Job]", resting: Any) -> None:
    while not _serve_one(jobs.get(), resting):
        pass


def _serve_one(job: _Job, resting: Any) -> bool:
    """Whether that was the last. In a function of its own: nothing of a job is kept while the next is waited for."""
    result, error = None, None
    with resting:
        if not job.future.cancelled():
            try:
                result = job.work()
            except BaseException as raised:  # noqa: BLE001  # raised where it is waited for
                error = raised
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        job.loop.call_soon_threadsafe(_deliver, job.future, result, error)
    return job.last


def _deliver(future: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
    if future.cancelled():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


_threads: Final[dict[int, NativeThread]] = {}
_held: Final[list[Any]] = []


def _before_fork() -> None:
    for thread in list(_threads.values()):
        thread.resting.acquire()
        _held.append(thread.resting)
        thread.before_fork()


def _after_fork_in_parent() -> None:
    while _held:
        _held.pop().release()


def _after_fork_in_child() -> None:
    _held.clear()
    _threads.clear()


os.register_at_fork(
    before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child
)  # fmt: skip
