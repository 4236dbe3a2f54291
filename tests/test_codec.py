"""Values to bytes and back: exactly, the same in every process, within limits, and never anything else."""

import datetime as dt
import enum
import itertools
import json
import subprocess
import sys
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmsession import codec, register_type
from shmsession.codec import MAX_DEPTH, MAX_ITEMS, decode, encode
from shmsession.errors import CodecError, ConfigError, UndecodableValue, UnsupportedValue
from shmsession.keyring import Key, Keyring
from shmsession.memory.seal import RecordSeal
from shmsession.record import AUTHENTICATED, FORMAT, LONGTERM, NEVER, STORABLE, USER_KEY, Data, Header, join
from tests.figures import report, rng, size
from tests.properties import child_environment, examples, image, values

GOLDEN = Path(__file__).parent / "golden" / "format-1.json"


# ── exact round trip ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.soak
def test_what_comes_back_is_exactly_what_was_stored() -> None:
    """Value, type, nesting, order, time zone, fold, NaN by its bits; and encoding it again gives the same bytes."""

    @examples(20_000, 500)
    @given(values)
    def round_trip(value: Any) -> None:
        raw = encode(value, "k")
        back = decode(raw)
        assert image(back) == image(value)
        assert encode(back, "k") == raw

    round_trip()
    report("record and codec: exact round trips", values=size(20_000, 500))


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        float("inf"),
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        -(2**63),
        -(2**63) - 1,
        10**400,
        -(10**400),
        True,
        False,
        "",
        b"",
        (),
        [],
        {},
        set(),
        frozenset(),
        (None,),
        ((),),
        {(): ()},
        {None: 0},
        {1: "a", True + 1: "b"},
        {frozenset({1}): 2},
        Decimal("sNaN123"),
        Decimal("-0E-7"),
        Decimal("1E+999999"),
        Decimal("0.10"),
        dt.datetime.min,  # noqa: DTZ901
        dt.datetime.max,  # noqa: DTZ901
        dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        dt.time(2, 30, fold=1, tzinfo=dt.UTC),
        dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(microseconds=1), "Ä")),
        dt.timedelta.min,
        dt.timedelta.max,
        dt.timedelta(microseconds=-1),
        dt.date.min,
        dt.date.max,
        UUID(int=0),
        "\x00",
        "\U0010ffff",
        [[[[]]]],
    ],
    ids=repr,
)
def test_edges_come_back_exactly(value: Any) -> None:
    """The ends of every range, and what other formats blur."""
    assert image(decode(encode(value))) == image(value)


def test_text_of_bytes_and_of_str_stay_apart() -> None:
    """Neither becomes the other, nor does a tuple become a list."""
    assert decode(encode([b"a", "a", ("a",), ["a"]])) == [b"a", "a", ("a",), ["a"]]


_SETS = """
import sys
from shmsession.codec import encode
words = [f"word{i}" for i in range(200)]
print(encode({"set": set(words), "frozen": frozenset({frozenset(words[:50]), frozenset(words[50:])}),
              "mixed": {1, "a", b"a", None, (1, "x")}}, "k").hex())
"""


def test_a_set_has_the_same_bytes_in_every_process() -> None:
    """Iteration order differs from process to process; the bytes must not, or reading would look like a change."""
    command = [sys.executable, "-c", _SETS]
    outputs = {
        subprocess.run(
            command, check=True, capture_output=True, text=True, env=child_environment(PYTHONHASHSEED=str(number))
        ).stdout
        for number in range(1, 5)
    }
    assert len(outputs) == 1
    assert b"word199".hex() in outputs.pop()


def test_decimals_do_not_depend_on_the_context() -> None:
    """Whatever precision and traps the application set, the same digits come back, in the same bytes."""
    value = [Decimal("1.23456789012345678901234567890E+50")]
    raw = encode(value)
    with localcontext(prec=3, Emax=10, Emin=-10, capitals=0):
        assert image(decode(raw)) == image(value)
        assert encode(value) == raw


# ── refusals ───────────────────────────────────────────────────────────────────────────────────────────────────


class _Color(enum.IntEnum):
    RED = 1


class _Text(str):
    __slots__ = ()


class _Sub(dict[str, int]):
    pass


class _Moment(dt.datetime):
    pass


class _Zone(dt.tzinfo):
    def utcoffset(self, _: dt.datetime | None) -> dt.timedelta:
        return dt.timedelta(0)

    dst = utcoffset

    def tzname(self, _: dt.datetime | None) -> str:
        return "mine"


_Point = namedtuple("_Point", "x y")  # noqa: PYI024 - the untyped one is what is refused
_cycle: list[Any] = []
_cycle.append(_cycle)
_cyclic_dict: dict[str, Any] = {}
_cyclic_dict["self"] = [_cyclic_dict]

REFUSED: dict[str, Any] = {
    "object": object(),
    "function": print,
    "class": int,
    "str subclass": _Text("x"),
    "dict subclass": _Sub(a=1),
    "datetime subclass": _Moment(2026, 1, 1),
    "IntEnum": _Color.RED,
    "namedtuple": _Point(1, 2),
    "OrderedDict": OrderedDict(a=1),
    "defaultdict": defaultdict(int),
    "bytearray": bytearray(b"x"),
    "memoryview": memoryview(b"x"),
    "ExtType": msgpack.ExtType(5, b"x"),
    "Timestamp": msgpack.Timestamp(1),
    "complex": 1j,
    "range": range(3),
    "generator": iter([]),
    "surrogate": "\ud800",
    "zone of its own": dt.datetime(2026, 1, 1, tzinfo=_Zone()),
    "cycle": _cycle,
    "cycle in dicts": _cyclic_dict,
}


@pytest.mark.parametrize(
    "wrap", [lambda value: value, lambda value: ["deep", {"er": (value,)}]], ids=["alone", "nested"]
)
@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_by_a_type_error_that_names_the_key(name: str, wrap: Callable[[Any], Any]) -> None:
    """At once, alone or nested, as TypeError and as the library's own error."""
    with pytest.raises(UnsupportedValue, match=r"session\['cart'\]") as caught:
        encode(wrap(REFUSED[name]), "cart")
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, CodecError)


@pytest.mark.parametrize(
    "value", [{"\udfff": 1}, {("\ud800",)}, dt.time(tzinfo=dt.timezone(dt.timedelta(0), "\ud800"))]
)
def test_lone_surrogates_are_refused_wherever_they_hide(value: Any) -> None:
    """UTF-8 cannot carry them: in a key, a set, a zone's name."""
    with pytest.raises(UnsupportedValue, match="cart"):
        encode(value, "cart")


def test_an_error_names_the_type_and_never_shows_the_value() -> None:
    """Sessions hold secrets: an error message ends in a log."""
    with pytest.raises(UnsupportedValue, match=r"bytearray is not a stored type") as caught:
        encode({"password": bytearray(b"hunter2")}, "form")
    assert "hunter2" not in str(caught.value)


def _nested(levels: int, wrap: Callable[[Any], Any]) -> Any:
    value: Any = dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), "X"))
    for _ in range(levels):
        value = wrap(value)
    return value


WRAPS: dict[str, Callable[[Any], Any]] = {
    "list": lambda inner: [inner],
    "tuple": lambda inner: (inner,),
    "dict": lambda inner: {"a": inner},
    "frozenset": lambda inner: frozenset({inner}),
}


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "frozenset"])
def test_depth_is_limited_alike_when_storing_and_when_reading(kind: str) -> None:
    """MAX_DEPTH levels go, also in a large value, which is scanned before it is decoded; one more does not."""
    deepest = _nested(MAX_DEPTH, WRAPS[kind])
    assert decode(encode(deepest)) == deepest
    large = [_nested(MAX_DEPTH - 1, WRAPS[kind]), "x" * (MAX_ITEMS + 1)]
    assert decode(encode(large)) == large
    with pytest.raises(UnsupportedValue, match="nested deeper than 32"):
        encode(_nested(MAX_DEPTH + 1, WRAPS[kind]))


@pytest.mark.parametrize(
    "make", [list, tuple, set, frozenset, dict.fromkeys], ids=["list", "tuple", "set", "frozenset", "dict"]
)
def test_items_are_limited_alike_when_storing_and_when_reading(make: Callable[[Any], Any]) -> None:
    """MAX_ITEMS go, at any level together; one more does not."""
    full = make(range(MAX_ITEMS))
    assert decode(encode(full)) == full
    with pytest.raises(UnsupportedValue, match="more than 65536 items"):
        encode(make(range(MAX_ITEMS + 1)))
    with pytest.raises(UnsupportedValue, match="more than 65536 items"):
        encode([make(range(MAX_ITEMS - 10)), list(range(20))])


def test_many_datetimes_are_as_many_items_and_no_more() -> None:
    """What a value needs inside does not count against the limit."""
    moment = dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1), "X"))
    many = [moment] * (MAX_ITEMS - 1)
    assert decode(encode(many)) == many


# ── registered types ───────────────────────────────────────────────────────────────────────────────────────────


class Money:
    def __init__(self, cents: int, currency: str = "EUR") -> None:
        self.cents, self.currency = cents, currency

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Money) and (self.cents, self.currency) == (other.cents, other.currency)

    def __hash__(self) -> int:
        return hash((self.cents, self.currency))


class Box:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Box) and self.inner == other.inner


def _register_money() -> None:
    register_type(Money, name="money", encode=lambda it: (it.cents, it.currency), decode=lambda raw: Money(*raw))


def _register_box() -> None:
    register_type(Box, name="box", encode=lambda it: it.inner, decode=Box)


def test_a_registered_type_is_stored_alone_nested_in_sets_and_as_a_key() -> None:
    """It behaves like a built-in one."""
    _register_money()
    value = {"price": Money(995), "all": {Money(1), Money(2)}, Money(3): [Money(4)]}
    assert decode(encode(value)) == value
    assert decode(encode(Money(5))) == Money(5)


def test_registered_types_may_hold_each_other() -> None:
    """What `encode` returns may hold registered types again."""
    _register_money()
    _register_box()
    value = Box([Box(Money(1)), {"a": Box(None)}])
    assert decode(encode(value)) == value


def test_a_subclass_of_a_registered_type_is_refused() -> None:
    """Exactly the class: a subclass would come back as its parent."""
    _register_money()

    class Dollars(Money):
        pass

    with pytest.raises(UnsupportedValue, match="Dollars"):
        encode(Dollars(1), "k")


def test_registering_again_replaces_and_a_reloaded_class_may_come_back() -> None:
    """Code that runs twice (reload, tests) is no conflict; the latest wins."""
    _register_money()
    register_type(Money, name="money", encode=lambda it: it.cents, decode=lambda raw: Money(raw))
    assert decode(encode(Money(7))) == Money(7)
    reloaded = type("Money", (Money,), {"__module__": Money.__module__, "__qualname__": Money.__qualname__})
    register_type(reloaded, name="money", encode=lambda it: it.cents, decode=reloaded)
    assert type(decode(encode(reloaded(7)))) is reloaded
    with pytest.raises(UnsupportedValue, match="Money"):
        encode(Money(7))


def test_conflicting_registrations_are_errors_that_say_what_to_do() -> None:
    """One name for two classes, two names for one class, a class that is stored anyway."""
    _register_money()
    with pytest.raises(ConfigError, match="'money' is taken by Money: choose another name="):
        register_type(Box, name="money", encode=lambda it: it.inner, decode=Box)
    with pytest.raises(ConfigError, match="Money is registered as 'money' already"):
        register_type(Money, name="cash", encode=lambda it: it.cents, decode=Money)
    for stored in (int, dict, dt.datetime, UUID):
        with pytest.raises(ConfigError, match="stored as it is"):
            register_type(cast("type[Any]", stored), name="mine", encode=str, decode=lambda raw: raw)
    assert decode(encode(Money(1))) == Money(1)


def test_reading_a_type_that_is_not_registered_says_so() -> None:
    """A process that lacks a registration gets an error with the name, and no half value."""
    _register_money()
    raw = encode([Money(1)])
    codec._by_class.clear()
    codec._by_name.clear()
    with pytest.raises(UndecodableValue, match="no type is registered as 'money'"):
        decode(raw)


def test_a_decoder_that_fails_is_an_undecodable_value() -> None:
    """Whatever it raises, the caller meets one error, with the cause kept."""

    def fail(_: Any) -> Box:
        raise AttributeError("no such thing")

    register_type(Box, name="box", encode=lambda it: it.inner, decode=fail)
    with pytest.raises(UndecodableValue, match="'box'") as caught:
        decode(encode(Box(1)))
    assert isinstance(caught.value.__cause__, AttributeError)


@pytest.mark.parametrize(
    "encoder", [lambda it: object(), lambda it: [bytearray()], lambda it: it], ids=["object", "nested", "itself"]
)
def test_what_a_registered_encoder_returns_is_checked(encoder: Callable[[Any], Any]) -> None:
    """It must return stored types, and itself for ever is no answer."""
    register_type(Box, name="box", encode=encoder, decode=Box)
    with pytest.raises(UnsupportedValue, match=r"session\['k'\]"):
        encode([Box(1)], "k")


def test_registered_types_hold_the_same_limits() -> None:
    """They cannot smuggle depth or items past them, and what goes in comes out."""
    _register_box()
    deepest = _nested(MAX_DEPTH - 1, Box)
    assert decode(encode([deepest, "x" * MAX_ITEMS]))[0] == deepest
    with pytest.raises(UnsupportedValue, match="nested deeper"):
        encode(_nested(MAX_DEPTH + 1, Box))
    many = Box([Box(0)] * (MAX_ITEMS // 2))
    assert decode(encode(many)) == many
    with pytest.raises(UnsupportedValue, match="items"):
        encode([Box([0] * (MAX_ITEMS // 2)), Box([0] * (MAX_ITEMS // 2))])


# ── hostile bytes ──────────────────────────────────────────────────────────────────────────────────────────────


def _attempt(raw: bytes) -> bool:
    """Whether it decoded; anything but UndecodableValue fails the test."""
    try:
        decode(raw)
    except UndecodableValue:
        return False
    return True


@examples(20_000, 1_000)
@given(
    st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda code, inner: msgpack.packb(msgpack.ExtType(code, inner)), st.integers(0, 12), st.binary(max_size=40)
        ),
    )
)
def test_random_bytes_decode_or_are_undecodable_and_nothing_else(raw: bytes) -> None:
    """Also inside each of the extension types."""
    _attempt(raw)


@pytest.mark.soak
def test_flipped_bits_decode_or_are_undecodable_and_nothing_else() -> None:
    """One to four flipped bits in the encoded form of every type."""
    total, generator = size(1_000_000, 5_000), rng("flipped bits")
    samples = [bytes.fromhex(raw) for raw in json.loads(GOLDEN.read_text())["values"].values()]
    decoded = 0
    for _ in range(total):
        raw = bytearray(generator.choice(samples))
        for _ in range(generator.randint(1, 4)):
            raw[generator.randrange(len(raw))] ^= 1 << generator.randrange(8)
        decoded += _attempt(bytes(raw))
    assert decoded < total
    report("record and codec: flipped bits", tried=total, undecodable=total - decoded, other_errors=0)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_truncated_and_padded_bytes_are_undecodable(cut: int) -> None:
    """Nothing is made up for what is missing, nothing is ignored."""
    for raw in map(bytes.fromhex, json.loads(GOLDEN.read_text())["values"].values()):
        assert not _attempt(raw[: max(0, len(raw) - cut)])
        assert not _attempt(raw + bytes(cut))


def _array(count: int, body: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + body


def _extension(code: int, payload: bytes) -> bytes:
    return b"\xc9" + len(payload).to_bytes(4, "big") + bytes([code]) + payload


BOMBS: dict[str, bytes] = {
    "empty maps": _array(100_000, b"\x80" * 100_000),
    "empty arrays as a map": b"\xdf" + (70_000).to_bytes(4, "big") + b"\x01\x90" * 70_000,
    "in a tuple": _extension(codec._TUPLE, _array(100_000, b"\x80" * 100_000)),
    "in a set": _extension(codec._SET, _array(100_000, b"\x01" * 100_000)),
    "in a datetime": _extension(codec._DATETIME, _array(100_000, b"\x80" * 100_000)),
    "in a registered type": _extension(codec._REGISTERED, b"\x92\xa1x" + _array(100_000, b"\x80" * 100_000)),
    "shared among two tuples": b"\x92" + _extension(codec._TUPLE, _array(40_000, b"\x80" * 40_000)) * 2,
    "deep": b"\x91" * 100_000 + b"\xc0",
    "deep tuples": bytes.fromhex("c0"),
    "said to be long": _array(2**32 - 1, b"\x80" * 70_000),
    "no MessagePack": b"\xc1" * 70_000,
    "cut": _array(70_000, b"\x80" * 69_999),
}
for _ in range(40):
    BOMBS["deep tuples"] = _extension(codec._TUPLE, b"\x91" + BOMBS["deep tuples"])
BOMBS["deep tuples"] = b"\x92" + BOMBS["deep tuples"] + b"\xda\xff\xff" + b"x" * 65_535


@pytest.mark.parametrize("name", BOMBS)
def test_bytes_over_the_limits_are_refused_before_anything_is_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 KB of empty maps would become 7 MB: what passes the limits is refused before a value is made of it."""

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("decoded before it was checked")

    with monkeypatch.context() as patched:
        patched.setattr(msgpack, "unpackb", never)
        with pytest.raises(UndecodableValue):
            decode(BOMBS[name])


def test_small_bytes_cannot_nest_without_end_either() -> None:
    """Below the size that is scanned, the decoder's own bounds hold, or the C stack would run over."""
    deep = b"\xc0"
    for _ in range(3_000):
        deep = _extension(codec._TUPLE, b"\x91" + deep) if len(deep) < 60_000 else deep
    assert not _attempt(deep)
    assert not _attempt(b"\x91" * 60_000 + b"\xc0")


@examples(5_000, 200)
@given(values)
def test_the_scan_lets_pass_whatever_can_be_stored(value: Any) -> None:
    """The limits before decoding are those of encoding, so nothing is stored that cannot be read."""
    raw = encode(value)
    items = codec.MAX_ITEMS - codec._inspect(value) if type(value) not in codec.IMMUTABLE else 0
    assert MAX_ITEMS - codec._scan(raw, MAX_ITEMS) == items
    if items:
        with pytest.raises(ValueError, match="limits"):
            codec._scan(raw, items - 1)


@pytest.mark.parametrize("zone", ["America", "../../etc/passwd", "zone.tab", "", "No/Where", "/etc/localtime"])
def test_a_stored_zone_name_that_is_none_is_undecodable(zone: str) -> None:
    """Also one that names a directory or leaves the database."""
    assert _attempt(_extension(codec._TIME, msgpack.packb([1, 0, 0, 0, "UTC", 0])))
    assert not _attempt(_extension(codec._TIME, msgpack.packb([1, 0, 0, 0, zone, 0])))


def test_a_zone_whose_file_cannot_be_read_is_undecodable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the operating system says of it."""
    raw = encode(dt.time(1, tzinfo=ZoneInfo("UTC")))

    def unreadable(_: str) -> None:
        raise IsADirectoryError

    monkeypatch.setattr(codec, "ZoneInfo", unreadable)
    assert not _attempt(raw)


# ── golden bytes ───────────────────────────────────────────────────────────────────────────────────────────────


GOLDEN_VALUES: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "int 0": 0,
    "int -1": -1,
    "int 2**64-1": 2**64 - 1,
    "int 2**64": 2**64,
    "int -2**63-1": -(2**63) - 1,
    "float 1.5": 1.5,
    "float -0.0": -0.0,
    "float nan": float("nan"),
    "str": "Grüße",
    "str long": "x" * 300,
    "bytes": b"\x00\xff",
    "list": [1, [2]],
    "dict": {"a": 1, (2, 3): [4]},
    "tuple": (1, "a"),
    "set": {3, 1, 2, "b", "a"},
    "frozenset": frozenset({(1, 2), None}),
    "datetime": dt.datetime(2026, 1, 2, 3, 4, 5, 6),  # noqa: DTZ001
    "datetime utc": dt.datetime(2026, 1, 2, tzinfo=dt.UTC),
    "datetime fold": dt.datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
    "datetime offset": dt.datetime(2026, 1, 2, tzinfo=dt.timezone(dt.timedelta(hours=-3.5), "NST")),
    "date": dt.date(2026, 1, 2),
    "time": dt.time(23, 59, 59, 999_999),
    "timedelta": dt.timedelta(days=-1, microseconds=1),
    "Decimal": Decimal("-12.30"),
    "Decimal sNaN": Decimal("sNaN1"),
    "Decimal exponent": Decimal("1E+400"),
    "UUID": UUID("12345678-1234-5678-1234-567812345678"),
    "registered": Money(995, "CHF"),
    "nested": {"cart": [{"item": "tea", "tags": {"x"}, "at": (dt.date(2026, 1, 2), Decimal("0.1"))}]},
}
GOLDEN_KEY = Key(bytes(range(32)))
GOLDEN_HANDLE = bytes(range(20))
GOLDEN_HEADER = Header(
    FORMAT,
    STORABLE | LONGTERM | AUTHENTICATED,
    GOLDEN_KEY.id,
    1_767_225_600_000,
    3,
    1_767_225_600_000,
    1_767_225_660_000,
    1_772_409_660_000,
    NEVER,
    1_772_409_660_000,
    3_660_000,
    b"user tag",
)


def golden_record() -> bytes:
    data: Data = {"cart": encode(["tea"]), "hits": encode(7), USER_KEY: encode("ada")}
    return RecordSeal(Keyring([GOLDEN_KEY])).close(GOLDEN_HANDLE, GOLDEN_HEADER, join(data)).raw


def test_golden_values_are_read_and_written_as_ever() -> None:
    """Sessions outlive an upgrade: every type's bytes are those of the first release of this format."""
    _register_money()
    stored = json.loads(GOLDEN.read_text())["values"]
    assert stored.keys() == GOLDEN_VALUES.keys()
    for name, value in GOLDEN_VALUES.items():
        assert image_of(decode(bytes.fromhex(stored[name]))) == image_of(value), name
        assert encode(value).hex() == stored[name], name


def image_of(value: Any) -> Any:
    return value.cents if isinstance(value, Money) else image(value)


def test_a_golden_record_is_read_and_written_as_ever() -> None:
    """Header, data and MAC of a whole record under a fixed Key."""
    raw = bytes.fromhex(json.loads(GOLDEN.read_text())["record"])
    record = RecordSeal(Keyring([Key.generate(), GOLDEN_KEY])).open(GOLDEN_HANDLE, raw)
    assert record is not None
    assert record.header == GOLDEN_HEADER
    decoded = {key: decode(value) for key, value in record.split().items()}
    assert decoded == {"cart": ["tea"], "hits": 7, USER_KEY: "ada"}
    assert golden_record() == raw


def test_every_golden_type_is_one_that_is_stored_and_none_is_missing() -> None:
    """The golden file covers each extension type."""
    raws = [bytes.fromhex(raw) for raw in json.loads(GOLDEN.read_text())["values"].values()]
    codes: set[int] = set()

    def note(code: int, payload: bytes) -> int:
        codes.add(code)
        return 0

    for raw in raws:
        msgpack.unpackb(raw, ext_hook=note, strict_map_key=False)
    assert codes == set(codec._decoders)
    assert set(map(type, itertools.chain(GOLDEN_VALUES.values()))) >= codec.IMMUTABLE | codec._CONTAINERS
