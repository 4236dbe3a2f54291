"""Values to bytes and back, exactly: MessagePack with extension types for what it lacks.

Stored types: None, bool, int (any size), float, str, bytes, list, dict, tuple, set, frozenset, datetime, date, time,
timedelta, Decimal, UUID, and what `register_type` adds. Subclasses and everything else are refused. No pickle.
"""

import datetime as dt
from collections.abc import Callable, Collection
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from itertools import chain
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
from msgpack import ExtType, UnpackException

from .errors import ConfigError, UndecodableValue, UnsupportedValue
from .record import pack_plain

T = TypeVar("T")

MAX_DEPTH: Final = 32
MAX_ITEMS: Final = 65_536

IMMUTABLE: Final[frozenset[type]] = frozenset(
    {type(None), bool, int, float, str, bytes, dt.datetime, dt.date, dt.time, dt.timedelta, Decimal, UUID}
)
_CONTAINERS: Final[frozenset[type]] = frozenset({list, dict, tuple, set, frozenset})
_BIG_INT, _TUPLE, _SET, _FROZENSET, _DATETIME, _DATE, _TIME, _TIMEDELTA, _DECIMAL, _UUID, _REGISTERED = range(1, 12)
_NESTED: Final = frozenset({_TUPLE, _SET, _FROZENSET, _REGISTERED})
_SMALL: Final = frozenset({_DATETIME, _TIME, _TIMEDELTA})


@dataclass(frozen=True, slots=True)
class _Registered:
    name: str
    cls: type
    encode: Callable[[Any], object]
    decode: Callable[[Any], Any]


_by_class: dict[type, _Registered] = {}
_by_name: dict[str, _Registered] = {}


def register_type(cls: type[T], *, name: str, encode: Callable[[T], object], decode: Callable[[Any], T]) -> None:
    """Let sessions store instances of exactly `cls`, under a `name` that every process must register alike.

    `encode` turns an instance into a value of the stored types, `decode` turns that back. Registering the same class
    under the same name again replaces it; a name or class that is taken otherwise raises ConfigError.
    """
    if cls in IMMUTABLE or cls in _CONTAINERS:
        raise ConfigError(f"{cls.__name__} is stored as it is: register classes of your own")
    taken = _by_name.get(name)
    if taken is not None and (taken.cls.__module__, taken.cls.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ConfigError(f"the name {name!r} is taken by {taken.cls.__qualname__}: choose another name=")
    if cls in _by_class and _by_class[cls].name != name:
        raise ConfigError(f"{cls.__qualname__} is registered as {_by_class[cls].name!r} already")
    if taken is not None:
        del _by_class[taken.cls]
    _by_class[cls] = _by_name[name] = _Registered(name, cls, encode, decode)


def encode(value: object, key: object = None) -> bytes:
    """`value` as bytes; equal values of one type give equal bytes in every process.

    Raises UnsupportedValue (a TypeError), naming `key`, for a type that is not stored, for more than MAX_DEPTH levels
    or MAX_ITEMS items, and for text that UTF-8 cannot carry.
    """
    kind = type(value)
    try:
        if kind in _FIXED_SIZE or (kind is str and len(value) <= _SHORT):  # type: ignore[arg-type]
            try:
                return pack_plain(value)
            except OverflowError:
                pass  # an int of more than 64 bits
        elif kind not in IMMUTABLE:
            _inspect(value)
        return _pack(value)
    except UnsupportedValue as error:
        raise UnsupportedValue(f"session[{key!r}] cannot be stored: {error}") from None
    except UnicodeEncodeError:
        raise UnsupportedValue(f"session[{key!r}] cannot be stored: it holds text with lone surrogates") from None
    except (RecursionError, ValueError, OverflowError) as error:
        raise UnsupportedValue(f"session[{key!r}] cannot be stored: {type(error).__name__}") from error


def decode(raw: bytes) -> Any:
    """The value that `encode` was given. Raises UndecodableValue, and holds the same limits before decoding."""
    try:
        if len(raw) > MAX_ITEMS:
            _scan(raw, MAX_ITEMS)
        return msgpack.unpackb(raw, raw=False, strict_map_key=False, ext_hook=_from_extension)
    except UndecodableValue:
        raise
    except (ValueError, TypeError, LookupError, RecursionError, ArithmeticError, OSError, UnpackException) as error:
        raise UndecodableValue(f"stored bytes that are no value: {type(error).__name__}") from error


_FIXED_SIZE: Final[frozenset[type]] = frozenset({type(None), bool, int, float})
_SHORT: Final = 1024


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value, default=_to_extension, strict_types=True, use_bin_type=True)
    return packed


def _inspect(value: object, depth: int = 1, budget: int = MAX_ITEMS) -> int:
    """Refuse what cannot be stored; returns how many items of the budget are left."""
    kind = type(value)
    if depth > MAX_DEPTH:
        raise UnsupportedValue(f"it is nested deeper than {MAX_DEPTH} levels")
    if kind not in _CONTAINERS:
        if kind not in _by_class:
            raise UnsupportedValue(f"{kind.__module__}.{kind.__qualname__} is not a stored type")
        stored = _by_class[kind].encode(value)
        return budget if type(stored) in IMMUTABLE else _inspect(stored, depth + 1, budget)
    members: Collection[object] = value  # type: ignore[assignment]
    budget -= len(members)
    if budget < 0:
        raise UnsupportedValue(f"it holds more than {MAX_ITEMS} items")
    if kind is dict:
        members = tuple(chain(members, value.values()))  # type: ignore[attr-defined]
    if not IMMUTABLE.issuperset(map(type, members)):
        for member in members:
            if type(member) not in IMMUTABLE:
                budget = _inspect(member, depth + 1, budget)
    return budget


# ── extension types ────────────────────────────────────────────────────────────────────────────────────────────


def _zone(zone: dt.tzinfo | None) -> object:
    if zone is None:
        return None
    if type(zone) is ZoneInfo and zone.key is not None:
        return zone.key
    if type(zone) is dt.timezone:
        offset, *name = zone.__getinitargs__()  # type: ignore[attr-defined]
        return [_span(offset), *name]
    raise UnsupportedValue(
        f"the time zone {type(zone).__qualname__} is neither zoneinfo.ZoneInfo nor datetime.timezone"
    )


def _unzone(stored: Any) -> dt.tzinfo | None:
    if stored is None:
        return None
    if isinstance(stored, str):
        return ZoneInfo(stored)
    offset, *name = stored
    return dt.timezone(dt.timedelta(*offset), *name)


def _span(value: dt.timedelta) -> list[int]:
    return [value.days, value.seconds, value.microseconds]


def _datetime(value: dt.datetime) -> list[object]:
    return [value.year, value.month, value.day, *_time(value)]


def _time(value: dt.datetime | dt.time) -> list[object]:
    return [value.hour, value.minute, value.second, value.microsecond, _zone(value.tzinfo), value.fold]


def _array(values: Collection[object]) -> bytes:
    return _pack(list(values))


def _sorted_array(values: Collection[object]) -> bytes:
    """A set's members, ordered by their bytes: iteration order differs between processes."""
    header: bytes = msgpack.Packer().pack_array_header(len(values))
    return header + b"".join(sorted(map(_pack, values)))


_encoders: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    int: (_BIG_INT, lambda value: value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True)),
    tuple: (_TUPLE, _array),
    set: (_SET, _sorted_array),
    frozenset: (_FROZENSET, _sorted_array),
    dt.datetime: (_DATETIME, lambda value: _pack(_datetime(value))),
    dt.date: (_DATE, lambda value: value.isoformat().encode()),
    dt.time: (_TIME, lambda value: _pack(_time(value))),
    dt.timedelta: (_TIMEDELTA, lambda value: _pack(_span(value))),
    Decimal: (_DECIMAL, lambda value: str(value).replace("e", "E").encode()),
    UUID: (_UUID, lambda value: value.bytes),
}


def _to_extension(value: object) -> ExtType:
    known = _encoders.get(type(value))
    if known is not None:
        code, encoder = known
        return ExtType(code, encoder(value))
    registered = _by_class.get(type(value))
    if registered is None:
        raise UnsupportedValue(f"{type(value).__module__}.{type(value).__qualname__} is not a stored type")
    stored = registered.encode(value)
    if type(stored) not in IMMUTABLE:
        _inspect(stored, 2)
    return ExtType(_REGISTERED, _pack([registered.name, stored]))


def _unpack(payload: bytes, depth: int) -> Any:
    hook = partial(_from_extension, depth=depth + 1)
    return msgpack.unpackb(payload, raw=False, strict_map_key=False, ext_hook=hook)


def _from_registered(payload: bytes, depth: int) -> Any:
    name, stored = _unpack(payload, depth)
    if name not in _by_name:
        raise UndecodableValue(f"no type is registered as {name!r} in this process: call register_type before reading")
    try:
        return _by_name[name].decode(stored)
    except Exception as error:  # somebody else's code: whatever it raises, the value cannot be decoded
        raise UndecodableValue(f"what {name!r} was registered with cannot decode it: {type(error).__name__}") from error


def _from_datetime(payload: bytes, depth: int) -> dt.datetime:
    year, month, day, hour, minute, second, microsecond, zone, fold = _unpack(payload, depth)
    return dt.datetime(year, month, day, hour, minute, second, microsecond, _unzone(zone), fold=fold)


def _from_time(payload: bytes, depth: int) -> dt.time:
    hour, minute, second, microsecond, zone, fold = _unpack(payload, depth)
    return dt.time(hour, minute, second, microsecond, _unzone(zone), fold=fold)


_decoders: dict[int, Callable[[bytes, int], Any]] = {
    _BIG_INT: lambda payload, _: int.from_bytes(payload, "big", signed=True),
    _TUPLE: lambda payload, depth: tuple(_unpack(payload, depth)),
    _SET: lambda payload, depth: set(_unpack(payload, depth)),
    _FROZENSET: lambda payload, depth: frozenset(_unpack(payload, depth)),
    _DATETIME: _from_datetime,
    _DATE: lambda payload, _: dt.date.fromisoformat(payload.decode()),
    _TIME: _from_time,
    _TIMEDELTA: lambda payload, depth: dt.timedelta(*_unpack(payload, depth)),
    _DECIMAL: lambda payload, _: Decimal(payload.decode()),
    _UUID: lambda payload, _: UUID(bytes=payload),
    _REGISTERED: _from_registered,
}


def _from_extension(code: int, payload: bytes, depth: int = 1) -> Any:
    """One extension value. Each level takes some 50 KB of the C stack, so bytes must not choose how many there are."""
    decoder = _decoders.get(code)
    if decoder is None:
        raise UndecodableValue(f"extension type {code} is unknown here: written by a newer version")
    if depth > MAX_DEPTH + 1:
        raise UndecodableValue(f"stored bytes that are nested deeper than {MAX_DEPTH} levels")
    return decoder(payload, depth)


# ── limits before decoding ─────────────────────────────────────────────────────────────────────────────────────

_FIXED: Final = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
_SIZED: Final = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_EXTENSION: Final = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_SMALL_ITEMS: Final = 16
"""A datetime is at most nine fields, and two and three more for its time zone."""
_COUNTED: Final = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _scan(raw: bytes, budget: int, depth: int = 0) -> int:
    """Walk the MessagePack structure without building it; returns how many items of the budget are left.

    Raises ValueError past the limits that `encode` holds, IndexError where bytes are missing.
    """
    position = 0
    open_counts = [1]
    while open_counts:
        if not open_counts[-1]:
            open_counts.pop()
            continue
        open_counts[-1] -= 1
        step = _step(raw, position)
        position = step.end
        level = depth + len(open_counts)
        budget -= step.items
        if budget < 0 or level > MAX_DEPTH + 1:
            raise ValueError("over the limits")
        if step.code in _SMALL:
            _scan(step.payload, _SMALL_ITEMS)
        elif step.code in _NESTED:
            budget = _scan(step.payload, budget + (2 if step.code == _REGISTERED else 0), level - 1)
        if step.members:
            open_counts.append(step.members)
    return budget


def _number(raw: bytes, position: int, width: int) -> int:
    return int.from_bytes(raw[position : position + width], "big")


class _Step(NamedTuple):
    """One value: where the next begins, how many follow as members of this one, as how many items they count."""

    end: int
    members: int = 0
    items: int = 0
    code: int = 0
    payload: bytes = b""


def _step(raw: bytes, position: int) -> _Step:
    head = raw[position]
    position += 1
    if head <= 0x7F or head >= 0xE0 or head in (0xC0, 0xC2, 0xC3):
        return _Step(position)
    if head <= 0x8F:
        return _Step(position, (head & 0x0F) * 2, head & 0x0F)
    if head <= 0x9F:
        return _Step(position, head & 0x0F, head & 0x0F)
    if head <= 0xBF:
        return _Step(position + (head & 0x1F))
    if head in _FIXED:
        return _Step(position + _FIXED[head])
    if head in _SIZED:
        return _Step(position + _SIZED[head] + _number(raw, position, _SIZED[head]))
    if head in _COUNTED:
        width, each = _COUNTED[head]
        count = _number(raw, position, width)
        return _Step(position + width, count * each, count)
    if head in _EXTENSION:
        width = _EXTENSION[head]
        size, position = _number(raw, position, width), position + width
    elif 0xD4 <= head <= 0xD8:
        size = 1 << (head - 0xD4)
    else:
        raise ValueError("no MessagePack")
    code, position = raw[position], position + 1
    return _Step(position + size, 0, 0, code, raw[position : position + size])
