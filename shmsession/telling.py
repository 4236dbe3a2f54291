"""What goes wrong again and again is logged once."""

import logging
from traceback import format_tb

logger = logging.getLogger("shmsession")


class Telling:
    """Logs warnings, none twice in a row."""

    def __init__(self) -> None:
        self._last = ""

    def tell(self, message: str, error: Exception | None = None) -> bool:
        """Log it, unless it was the last; whether it was logged.

        `error`: one that is not ours. Where it was raised is logged too, but not what it says: a password may be in it.
        """
        if message == self._last:
            return False
        self._last = message
        where = "" if error is None else "\n" + "".join(format_tb(error.__traceback__)).rstrip()
        logger.warning("%s%s", message, where)
        return True

    def forget(self) -> None:
        """It is well again: what comes next is news."""
        self._last = ""
