"""SHMSESSION_* variables: how each kind of setting is written in them. A ValueError says what to write instead."""

import os
import re
from collections.abc import Callable
from dataclasses import field
from datetime import timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Final, TypeVar

from .errors import ConfigError
from .keyring import Key, parse_keys

T = TypeVar("T")

PREFIX: Final = "SHMSESSION_"

_SIZE = re.compile(r"([0-9]{1,15})\s*(|KiB|MiB|GiB)")
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def setting(variable: str, parse: Callable[[str], T], default: T) -> T:
    """A field that SHMSESSION_<variable> fills when the code does not."""

    def read() -> T:
        text = os.environ.get(PREFIX + variable)
        if text is None:
            return default
        try:
            return parse(text.strip())
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"{PREFIX}{variable}: {error}") from None

    return field(default_factory=read, metadata={"variable": PREFIX + variable})


def seconds_in(text: str) -> timedelta:
    """A number of seconds."""
    if not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text):
        raise ValueError("write a number of seconds, such as 21600")
    return timedelta(seconds=float(text))


def size_in(text: str) -> int:
    """A number of bytes, or of larger units."""
    match = _SIZE.fullmatch(text)
    if not match:
        raise ValueError("write a number of bytes, or one with KiB, MiB or GiB, such as 64MiB")
    return int(match[1]) * _UNITS[match[2]]


def count_in(text: str) -> int:
    """A whole number."""
    if not re.fullmatch("[0-9]{1,6}", text):
        raise ValueError("write a number, such as 1")
    return int(text)


def switch_in(text: str) -> bool:
    """0 or 1."""
    if text not in ("0", "1"):
        raise ValueError("write 0 or 1")
    return text == "1"


def word_in(text: str) -> str:
    """Anything but nothing."""
    if not text:
        raise ValueError("is empty: unset it, or give it a value")
    return text


def path_in(text: str) -> Path:
    """A path."""
    return Path(word_in(text))


def keys_in(text: str) -> tuple[Key, ...]:
    """Keys, oldest first, separated by commas or lines."""
    keys = parse_keys(word_in(text))
    if not keys:
        raise ValueError("holds no Key: write what Key.generate() prints, or unset it")
    return keys


def one_of(*words: str) -> Callable[[str], Any]:
    """One of these words."""

    def parse(text: str) -> str:
        if text not in words:
            raise ValueError("write " + " or ".join(words))
        return text

    return parse


def member_of(kind: type[Enum]) -> Callable[[str], Any]:
    """The value of a member of an Enum."""

    def parse(text: str) -> Enum:
        try:
            return kind(text)
        except ValueError:
            raise ValueError("write " + " or ".join(member.value for member in kind)) from None

    return parse
