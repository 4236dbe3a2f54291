"""Hooks for a gunicorn configuration file: `from shmsession.contrib.gunicorn import *`.

They make things prompt and certain things visible; no guarantee depends on them. `uvicorn --workers` has no such hooks
and needs none. To have hooks of your own beside them: `post_fork = chain(post_fork, mine)`.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any

from shmsession.configured import configured_store
from shmsession.errors import ConfigError, ShmSessionError
from shmsession.store import SessionStore, stores

__all__ = ["child_exit", "on_exit", "on_starting", "post_fork", "post_worker_init", "worker_exit"]

logger = logging.getLogger("shmsession")

BOOT_ERROR = 3
"""gunicorn's WORKER_BOOT_ERROR: the arbiter stops instead of starting the next worker."""


def chain(*hooks: Callable[..., object]) -> Callable[..., None]:
    """One hook that calls several in turn, with as many arguments as gunicorn gives that hook."""

    def one(server: Any) -> None:
        for hook in hooks:
            hook(server)

    def two(server: Any, worker: Any) -> None:
        for hook in hooks:
            hook(server, worker)

    arities = {hook.__code__.co_argcount if hasattr(hook, "__code__") else 2 for hook in hooks}
    if len(arities) != 1 or arities - {1, 2}:
        raise ConfigError("chain() takes hooks of the same kind: all with (server), or all with (server, worker)")
    return one if arities == {1} else two


def on_starting(server: Any) -> None:
    """In the arbiter, before any worker: a setting that cannot work stops the start here, with one line."""
    try:
        configured_store()
        for store in _own_stores(server):
            store.memory.open()  # not the store: what runs beside it would not survive the fork
            store.close()
        if not stores() and server.cfg.uid == os.geteuid():
            _check_variables()
    except ShmSessionError as error:
        server.log.error("shmsession: %s", error)
        raise SystemExit(1) from error


def post_fork(server: Any, worker: Any) -> None:
    """In each worker, first thing: what the arbiter had open stays with it."""
    for store in stores():
        store.close()


def post_worker_init(worker: Any) -> None:
    """In each worker with the application loaded: open now what the first request would have to, or stop the start."""
    for store in stores():
        try:
            store.open()
            worker.log.info("session store %r in %s", store.name, store.path)
        except ShmSessionError as error:
            worker.log.error("shmsession: %s", error)
            raise SystemExit(BOOT_ERROR) from error


def worker_exit(server: Any, worker: Any) -> None:
    """In a worker that ends in good order: close."""
    for store in stores():
        store.close()


def child_exit(server: Any, worker: Any) -> None:
    """In the arbiter, after any end of a worker, kill -9 included: free the reader slots it held."""
    for store in _own_stores(server):
        with contextlib.suppress(ShmSessionError):
            store.free_dead_readers()


def on_exit(server: Any) -> None:
    """In the arbiter, after the last worker: send what waits to the backend, and close. Sessions stay."""
    own = _own_stores(server)
    for store in own:
        with contextlib.suppress(ShmSessionError):
            if store.is_persistent and not store.sync.flush():
                server.log.warning("shmsession: %s sessions wait for the next start", store.stats().outbox)
    if not own and "SHMSESSION_BACKEND" in os.environ:
        server.log.info(
            "shmsession: what waits is flushed at the next start, or now with SHMSESSION_STORE=module:store"
        )
    for store in stores():
        store.close()


def _own_stores(server: Any) -> list[SessionStore]:
    """The stores of this process; none in an arbiter whose workers run as another user: the store is theirs alone."""
    return stores() if server.cfg.uid == os.geteuid() else []


def _check_variables() -> None:
    """The settings of an application that only the workers will load, as far as the variables say them."""
    SessionStore().check()
