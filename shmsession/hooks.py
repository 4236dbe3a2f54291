"""What happened, for those who want to know: one frozen dataclass an event, and any callable that takes one."""

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from inspect import isasyncgenfunction, iscoroutinefunction
from typing import Protocol

from .errors import ConfigError

logger = logging.getLogger("shmsession")


@dataclass(frozen=True, slots=True)
class CookieRefused:
    """A cookie, or a session's header, was no session.

    `reason`: duplicate, malformed, unknown_key or forged. binding: it is bound to a client, and `bind_to` does not say
    so, or the reverse. moved: it came from another client than it was given to, or is forged.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Created:
    """A session began. `handle` in hex; `logged_in`: with a user."""

    handle: str
    logged_in: bool


@dataclass(frozen=True, slots=True)
class Renewed:
    """A session got a new id: `handle` in place of `former`, both in hex. `logged_in`: by a login."""

    handle: str
    former: str
    logged_in: bool


@dataclass(frozen=True, slots=True)
class Destroyed:
    """A session was ended by the application, or by a visitor who does not agree to be remembered. `handle` in hex."""

    handle: str


@dataclass(frozen=True, slots=True)
class LoggedIn:
    """A login was committed to the session `handle`. `user`: a hash of the user id. Both in hex."""

    handle: str
    user: str


@dataclass(frozen=True, slots=True)
class LoginRefused:
    """Somebody was not let in: `shmsession.auth` found no such active user, the application said so (`login_failed`),
    or the user has too many sessions. `handle`: the session, or ""; `user`: a hash of what was tried. Both in hex."""

    handle: str
    user: str


@dataclass(frozen=True, slots=True)
class LoggedOut:
    """A user ended their session by `shmsession.auth`'s `logout`. `user`: a hash of the user id. Both in hex."""

    handle: str
    user: str


@dataclass(frozen=True, slots=True)
class Expired:
    """`count` sessions whose time was over were removed from memory. It may be noticed some time after they ended."""

    count: int


@dataclass(frozen=True, slots=True)
class CommitDropped:
    """A request's changes were dropped: its session had been destroyed, renewed or had expired. `handle` in hex."""

    handle: str


@dataclass(frozen=True, slots=True)
class Evicted:
    """`count` sessions were removed from memory to make room: ones that the backend has, or else anonymous ones."""

    count: int


@dataclass(frozen=True, slots=True)
class RecordCorrupt:
    """A record's MAC was wrong: it is not served. `handle` in hex."""

    handle: str


@dataclass(frozen=True, slots=True)
class Quarantined:
    """The memory store was damaged, put aside as `path` and rebuilt with the `imported` records that were whole."""

    path: str
    imported: int


@dataclass(frozen=True, slots=True)
class Flushed:
    """The backend has `count` more commits."""

    count: int


@dataclass(frozen=True, slots=True)
class FlushFailed:
    """The backend could not be given what waits for it; `reason` says why. It is tried again by itself."""

    reason: str


@dataclass(frozen=True, slots=True)
class BackendForgot:
    """The backend did not have what it had acknowledged: `count` sessions are sent again."""

    count: int


Event = (
    BackendForgot | CookieRefused | CommitDropped | Created | Destroyed | Evicted | Expired | Flushed | FlushFailed
    | LoggedIn | LoggedOut | LoginRefused | RecordCorrupt | Renewed | Quarantined
)  # fmt: skip


class Hook(Protocol):
    """Called in the process and thread where it happened, after the fact; what it raises is logged and ignored."""

    def __call__(self, event: Event, /) -> None:
        """Take note of an event."""
        ...


_counting = threading.Lock()


def _after_fork_in_child() -> None:
    global _counting
    _counting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _is_async(hook: object) -> bool:
    """Whether calling this only makes something to be awaited."""
    while isinstance(hook, partial):
        hook = hook.func
    return any(asks(one) for one in (hook, type(hook).__call__) for asks in (iscoroutinefunction, isasyncgenfunction))


class Hooks:
    """Counts every event by its kind and calls the application's hooks. Raises ConfigError for what cannot be called,
    or would have to be awaited."""

    def __init__(self, hooks: Sequence[Hook] = ()) -> None:
        self._hooks = tuple(hooks)
        given: Sequence[object] = self._hooks
        for hook in given:
            if not callable(hook) or _is_async(hook):
                raise ConfigError(f"hooks: {hook!r} must be an ordinary function, which is called with each event")
        self.counts: dict[str, int] = {}

    def emit(self, event: Event) -> None:
        """Count the event and tell the hooks of it."""
        kind = type(event).__name__
        with _counting:
            self.counts[kind] = self.counts.get(kind, 0) + 1
        for hook in self._hooks:
            try:
                hook(event)
            except Exception:  # a hook is somebody else's code: whatever it raises must not break a request
                logger.exception("a hook failed on %s", kind)
