"""Hooks: told of every event, counted by kind, and never able to break a request."""

import dataclasses
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, get_args

import pytest

from shmsession.errors import ConfigError
from shmsession.hooks import (
    BackendForgot,
    CommitDropped,
    CookieRefused,
    Created,
    Destroyed,
    Event,
    Evicted,
    Expired,
    Flushed,
    FlushFailed,
    Hooks,
    LoggedIn,
    LoggedOut,
    LoginRefused,
    Quarantined,
    RecordCorrupt,
    Renewed,
)

EVENTS: list[Event] = [
    Created("aa" * 20, logged_in=True),
    Renewed("aa" * 20, "bb" * 20, logged_in=False),
    Destroyed("aa" * 20),
    Expired(2),
    CookieRefused("forged"),
    CommitDropped("aa" * 20),
    Evicted(3),
    RecordCorrupt("bb" * 20),
    Quarantined("quarantine-2", 7),
    Flushed(500),
    FlushFailed("it could not be reached"),
    BackendForgot(12),
    LoggedIn("aa" * 20, "cc" * 8),
    LoggedOut("aa" * 20, "cc" * 8),
    LoginRefused("", "cc" * 8),
]


def test_every_hook_is_told_of_every_event_in_order() -> None:
    """And each is counted by its kind."""
    one: list[Event] = []
    two: list[Event] = []
    hooks = Hooks([one.append, two.append])
    for event in [*EVENTS, EVENTS[4]]:
        hooks.emit(event)
    assert one == two == [*EVENTS, EVENTS[4]]
    assert hooks.counts == {type(event).__name__: 1 for event in EVENTS} | {"CookieRefused": 2}


def test_a_hook_that_fails_is_logged_and_the_others_are_still_told(caplog: pytest.LogCaptureFixture) -> None:
    """A hook is somebody else's code."""

    def broken(_: Event) -> None:
        raise RuntimeError("no metrics server")

    told: list[Event] = []
    hooks = Hooks([broken, told.append])
    with caplog.at_level(logging.ERROR, "shmsession"):
        hooks.emit(Evicted(1))
    assert told == [Evicted(1)]
    assert hooks.counts == {"Evicted": 1}
    assert "a hook failed on Evicted" in caplog.text
    assert "no metrics server" in caplog.text


def test_a_hook_that_asks_to_stop_the_process_is_heard() -> None:
    """KeyboardInterrupt and SystemExit are no failures of a hook."""

    def stop(_: Event) -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        Hooks([stop]).emit(Evicted(1))


async def coroutine(event: Event) -> None:
    """A hook that somebody would have to await."""


class Awaitable:
    """Another."""

    async def __call__(self, event: Event) -> None:
        await coroutine(event)


async def generator(event: Event) -> AsyncIterator[Event]:
    """A third."""
    yield event


@pytest.mark.parametrize(
    "hook",
    [coroutine, generator, Awaitable(), partial(coroutine), partial(partial(Awaitable())), "print", None],
    ids=["async", "generator", "object", "partial", "partial object", "str", "None"],
)
def test_a_hook_that_would_never_run_is_an_error_at_construction(hook: Any) -> None:
    with pytest.raises(ConfigError, match="an ordinary function"):
        Hooks([hook])


def test_without_hooks_events_are_counted_all_the_same() -> None:
    """`stats()` shows them."""
    hooks = Hooks()
    hooks.emit(Evicted(1))
    assert hooks.counts == {"Evicted": 1}


def test_events_are_frozen_values_and_this_file_knows_them_all() -> None:
    """One frozen dataclass an event."""
    assert {type(event) for event in EVENTS} == set(get_args(Event))
    for event in EVENTS:
        assert dataclasses.replace(event) == event
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, dataclasses.fields(event)[0].name, None)
