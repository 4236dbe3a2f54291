"""What a server's errors mean: the number that MySQL and MariaDB give each is all that can be relied on.

Their texts may quote what was sent. So a text is passed on whole where it names users, hosts, databases and tables
only, and otherwise as far as nothing is quoted.
"""

import re
from typing import Any, Final

from asyncmy import errors

from shmsession.errors import BackendError, BackendUnavailable

BUSY: Final = (1213, 1020)
"""A deadlock, or a row that changed meanwhile: the transaction is to be undone, and may be repeated."""

CONNECT_FAILED: Final = 2003
NO_PLUGIN: Final = 2059
MALFORMED: Final = 2027
NO_SUCH_TABLE: Final = 1146
READ_ONLY: Final = 1290

_UNAVAILABLE: Final = {
    *BUSY,
    1040, 1203, 1226,  # too many connections, at all, of this user, or in this hour
    1047,  # a node of a Galera cluster that is not part of it
    1053, 1077, 1079,  # shutting down
    1205, 1317, 1969, 3024,  # a lock, or the statement, took too long, or was ended
    1158, 1159, 1160, 1161, 1927, 4031,  # the connection broke, or was ended
}  # fmt: skip
_DRIVERS: Final = range(2000, 3000)
"""Numbers of errors that are no server's: the connection could not be made, or broke."""

_CREDENTIALS: Final = (
    "See to the user and password in the URL, and whether this user must use TLS: ssl_ca=, or ssl_verify=."
)
_GRANTS: Final = (
    "Grant this user SELECT, INSERT, UPDATE and DELETE on {table} and SELECT on {table}_meta, and while they are made "
    "CREATE and INSERT on their database."
)
_READ_ONLY: Final = "This server only answers questions: name the primary in the URL."
_FULL: Final = "The server's disk is full, or its quota: make room there."
_ANOTHER: Final = "The table {table} is not one of ours: choose another name by `table=`."
_ADVICE: Final = {
    1021: _FULL,
    1041: "The server is out of memory.",
    1044: _GRANTS,
    1045: _CREDENTIALS,
    1049: "Make that database first: CREATE DATABASE.",
    1054: _ANOTHER,
    1114: _FULL,
    1129: "Have its administrator run FLUSH HOSTS.",
    1130: "Let that server's user log in from this host.",
    1142: _GRANTS,
    1143: _GRANTS,
    NO_SUCH_TABLE: "Make the tables: `shmsession initdb`, or `initialize()`.",
    1153: "A session is too large for it: raise max_allowed_packet there.",
    READ_ONLY: _READ_ONLY,
    1347: _ANOTHER,
    1665: "Set binlog_format=ROW, or MIXED, there.",
    1698: _CREDENTIALS,
    1792: _READ_ONLY,
    1836: _READ_ONLY,
    NO_PLUGIN: "Give the user another authentication plugin, or what this one needs.",
    3159: "Use TLS: ssl_ca=, or ssl_verify=, in the URL.",
}
_OTHERWISE: Final = "The server's log may say more."
_QUOTED: Final = re.compile("['\"].*", re.DOTALL)


def number_of(error: Exception) -> int:
    """The number of a server's error, or of the driver's; 0 for one that has none."""
    number: Any = error.args[0] if error.args and isinstance(error, errors.MySQLError) else 0
    return number if isinstance(number, int) else 0


def explain(error: Exception, name: str, table: str, *, seconds: float, late: bool) -> BackendError:
    """Our error for one of the driver's."""
    number, text = number_of(error), _text(error)
    if number in _ADVICE:
        return BackendError(f"{name} answered: {text} (error {number}). {_ADVICE[number].format(table=table)}")
    if late:
        return BackendUnavailable(f"{name} did not answer within {seconds:g} s.")
    if number == CONNECT_FAILED:
        return BackendUnavailable(f"{name} cannot be reached: {text}")
    if number in _UNAVAILABLE:
        return BackendUnavailable(f"{name} answered: {text} (error {number}).")
    if number in _DRIVERS or not number:
        return BackendUnavailable(f"{name} broke off: {text}")
    return BackendError(f"{name} answered: {_QUOTED.sub('…', text)} (error {number}). {_OTHERWISE}")


def _text(error: Exception) -> str:
    """What the driver or the server said, in one line."""
    return " ".join(str(error.args[-1] if error.args else type(error).__name__).split())
