"""The command line: `shmsession flusher`, `initdb`, `copy` and `stats`."""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from .configured import configured_store
from .errors import ConfigError, ShmSessionError
from .memory.place import default_directory
from .store import SessionStore


def flusher(store: SessionStore, _: argparse.Namespace) -> int:
    """Flush to the backend until SIGTERM or SIGINT, then send what is left. Beside workers it is one more candidate."""
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before any thread begins: none of them is to be interrupted
    store.open()
    signal.sigwait(signals)
    drained = store.sync.flush()
    left = store.stats().outbox
    store.close()
    if not drained:
        print(f"shmsession: {left} sessions wait for the next start", file=sys.stderr)  # noqa: T201
    return 0 if drained else 1


def initdb(store: SessionStore, _: argparse.Namespace) -> int:
    """Make the backend's tables, or migrate them."""
    store.sync.initialize()
    store.close()
    return 0


def copy(store: SessionStore, options: argparse.Namespace) -> int:
    """Copy all sessions of another database to the backend, while no server uses either."""
    copied = store.sync.copy_from(options.source)
    store.close()
    print(f"{copied} sessions were copied")  # noqa: T201
    return 0


def stats(store: SessionStore, _: argparse.Namespace) -> int:
    """Print the store's numbers as JSON."""
    path = (store.config.directory or default_directory()) / store.name
    if not os.path.exists(path / "lmdb"):  # noqa: PTH110  # as it is for this user; to open it would make it
        raise ConfigError(
            f"there is no store {path} for this user: give the server's SHMSESSION_NAME and SHMSESSION_DIR, or call it "
            "in the server's working directory"
        )
    store.memory.open()
    print(json.dumps(store.stats()._asdict()))  # noqa: T201
    store.close()
    return 0


_COMMANDS: dict[str, Callable[[SessionStore, argparse.Namespace], int]] = {
    "flusher": flusher, "initdb": initdb, "copy": copy, "stats": stats,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="shmsession", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(name, help=command.__doc__, description=command.__doc__)
        if command is copy:
            sub.add_argument("source", help="URL of the database to copy from, such as sqlite:///sessions.db")
        sub.add_argument(
            "store", nargs="?", help="module:attribute of the SessionStore; else SHMSESSION_STORE, else the variables"
        )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    sys.path.insert(0, os.getcwd())  # noqa: PTH109  # as gunicorn and uvicorn do
    try:
        store = configured_store(options.store) or SessionStore()
        if options.command != "stats" and not store.is_persistent:
            raise ConfigError("this store has no backend: set SHMSESSION_BACKEND, or name a store that has one")
        return _COMMANDS[options.command](store, options)
    except ShmSessionError as error:
        print(f"shmsession: {error}", file=sys.stderr)  # noqa: T201
        return 1
