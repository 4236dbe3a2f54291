"""Flash messages: kept in the session until somebody shows them, once. Each has a key of its own, so that two requests
that leave one at the same time lose none."""

import logging
import os
from typing import Any, Final, NamedTuple

from .codec import decode, encode
from .errors import UndecodableValue
from .working import WorkingCopy

logger = logging.getLogger("shmsession")

_RANDOM_BITS: Final = 32
_FIRST: Final = 1 << _RANDOM_BITS
"""Keys from here on are flash messages: a number that counts up, then random bits."""


class Flash(NamedTuple):
    """One message, and what kind of message it is."""

    message: Any
    category: str


class Flashes(WorkingCopy):
    """A working copy with messages in it."""

    def flash(self, message: Any, category: str = "info") -> None:
        """Leave a message for the next page that shows them: a str, or any other value that a session stores.

        As long as nobody shows it, it stays. Raises what an assignment raises.
        """
        raw = encode((message, str(category)), "a flash message")
        self.edit()
        last = max(self._keys(), default=0) >> _RANDOM_BITS
        self.put((last + 1) << _RANDOM_BITS | int.from_bytes(os.urandom(_RANDOM_BITS // 8), "big"), raw)

    def flashes(self, category: str | None = None, *, keep: bool = False) -> list[Flash]:
        """The messages, oldest first, all or those of a category; they are gone then, unless they are to be kept.

        One of a type that is no longer registered is left out, and logged.
        """
        self._look()
        found = []
        for key in sorted(self._keys()):
            try:
                flash = Flash(*decode(self._data[key]))
            except UndecodableValue as error:
                logger.warning("a flash message is left out: %s", error)
                if category is None and not keep:
                    self.take(key)
                continue
            if category in (None, flash.category):
                found.append(flash)
                if not keep:
                    self.take(key)
        return found

    def _keys(self) -> list[int]:
        return [key for key in self._data if isinstance(key, int) and key >= _FIRST]
