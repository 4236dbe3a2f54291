"""Values that sessions store, for property tests, and what it means that two of them are exactly the same."""

import datetime as dt
import os
import struct
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo, available_timezones

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

from tests.figures import SEED, size

F = TypeVar("F", bound=Callable[..., Any])


def examples(full: int, suite: int) -> Callable[[F], F]:
    """So many examples of this run's seed; nothing is kept on disk and nothing fails for being slow."""
    limits = settings(
        max_examples=size(full, suite), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )

    def decorate(test: F) -> F:
        return seed(SEED)(limits(test))

    return decorate


def machine_settings(total: int, steps: int) -> settings:
    """The same for a state machine."""
    return settings(
        max_examples=total,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )


def child_environment(**variables: str) -> dict[str, str]:
    """The environment of a process that must import what this one does."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}


ZONES = sorted(available_timezones() & {"UTC", "Europe/Berlin", "America/St_Johns", "Pacific/Apia", "Asia/Kathmandu"})

offsets = st.timedeltas(dt.timedelta(hours=-23, minutes=-59), dt.timedelta(hours=23, minutes=59))
zones: st.SearchStrategy[dt.tzinfo | None] = st.one_of(
    st.none(),
    st.just(dt.UTC),
    st.builds(dt.timezone, offsets),
    st.builds(dt.timezone, offsets, st.text(max_size=8)),
    *([st.sampled_from(ZONES).map(ZoneInfo)] if ZONES else []),
)
floats = st.one_of(
    st.floats(), st.integers(0, 2**64 - 1).map(lambda bits: float(struct.unpack(">d", bits.to_bytes(8, "big"))[0]))
)
integers = st.one_of(
    st.integers(),
    st.builds(
        lambda power, off, sign: sign * (2**power + off),
        st.integers(0, 300),
        st.integers(-2, 2),
        st.sampled_from((1, -1)),
    ),
)
moments = st.builds(
    lambda moment, zone, fold: moment.replace(tzinfo=zone, fold=fold), st.datetimes(), zones, st.integers(0, 1)
)
times = st.builds(lambda time, zone, fold: time.replace(tzinfo=zone, fold=fold), st.times(), zones, st.integers(0, 1))
quiet_decimals = st.one_of(
    st.decimals(allow_nan=False),
    st.sampled_from(
        [Decimal(text) for text in ("NaN", "-NaN7", "1E+999999", "1E-999999", "-0E-7", "0E+5", "-Infinity")]
    ),
)
hashable_scalars = st.one_of(
    st.none(),
    st.booleans(),
    integers,
    floats,
    st.text(max_size=12),
    st.binary(max_size=12),
    moments,
    st.dates(),
    times,
    st.timedeltas(),
    quiet_decimals,
    st.uuids(),
)
scalars = st.one_of(hashable_scalars, st.sampled_from([Decimal("sNaN"), Decimal("-sNaN123")]))
hashables: st.SearchStrategy[Any] = st.recursive(
    hashable_scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4).map(tuple), st.frozensets(inner, max_size=4)),
    max_leaves=6,
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.lists(inner, max_size=5).map(tuple),
        st.dictionaries(hashables, inner, max_size=5),
        st.sets(hashables, max_size=5),
        st.frozensets(hashables, max_size=5),
    ),
    max_leaves=20,
)
keys = st.text(max_size=8)


def image(value: Any) -> tuple[Any, ...]:
    """What makes a value exactly itself: type, bits, nesting, order where there is one."""
    kind = type(value).__name__
    if isinstance(value, float):
        return kind, struct.pack(">d", value)
    if isinstance(value, Decimal):
        return kind, value.as_tuple()
    if isinstance(value, dt.datetime):
        moment = value.replace(tzinfo=None, fold=0).isoformat()
        return kind, moment, value.fold, zone_image(value.tzinfo)
    if isinstance(value, dt.time):
        return kind, value.replace(tzinfo=None, fold=0).isoformat(), value.fold, zone_image(value.tzinfo)
    if isinstance(value, list | tuple):
        return kind, *map(image, value)
    if isinstance(value, set | frozenset):
        return kind, *sorted((image(member) for member in value), key=repr)
    if isinstance(value, dict):
        return kind, *((image(key), image(member)) for key, member in value.items())
    assert isinstance(value, str | bytes | int | dt.date | dt.timedelta | UUID | None)
    return kind, value


def zone_image(zone: dt.tzinfo | None) -> tuple[str, object]:
    if isinstance(zone, dt.timezone):
        return "timezone", zone.__reduce__()
    return type(zone).__name__, getattr(zone, "key", None)
