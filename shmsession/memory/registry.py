"""One environment a directory and process, and none that is open across a fork."""

import os
import threading
from pathlib import Path

from shmsession.clock import Clock

from .building import Building, Judge
from .environment import Environment

_environments: dict[Path, Environment] = {}
_lock = threading.RLock()


def acquire(base: Path, name: str, map_size: int | None, clock: Clock, judge: Judge) -> Environment:
    """This process's environment for a directory; give it back with `release`."""
    key = base.resolve() / name
    with _lock:
        environment = _environments.get(key)
        if environment is None:
            building = Building(base.absolute() / name, map_size, clock, judge)
            environment = _environments[key] = Environment(key, building)
        environment.users += 1
        return environment


def release(environment: Environment) -> None:
    """The last user's release closes it."""
    with _lock:
        environment.users -= 1
        if environment.users == 0 and not environment.is_inherited:
            environment.close()
            del _environments[environment.key]


def _before_fork() -> None:
    _lock.acquire()
    for environment in _environments.values():
        environment.lock.acquire()
        environment.close()


def _after_fork_in_parent() -> None:
    for environment in _environments.values():
        environment.lock.release()
    _lock.release()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    for environment in _environments.values():
        environment.lock = threading.RLock()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
