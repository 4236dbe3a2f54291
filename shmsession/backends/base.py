"""What a database behind the memory store must do: `Backend`, and the one rule by which rows replace each other.

A backend keeps rows and knows nothing of sessions: bodies are opaque, times are milliseconds since 1970, and all
numbers are less than 2**53.
"""

from collections.abc import AsyncIterator, Sequence
from enum import IntEnum
from typing import Final, NamedTuple, Protocol

from shmsession.errors import BackendError

SENTINEL: Final = bytes(20)
"""The handle of the one row that is no session: whose tables these are. Counts and listings leave it out."""
FOREVER: Final = 1 << 52
"""A row with this horizon, or a later one, is never swept. None is later than 2**53 - 1, Lua's greatest integer."""


class State(IntEnum):
    """LIVE: a session. ERASED: its owner wants it kept nowhere but in memory. DEAD: destroyed, until the horizon."""

    LIVE = 1
    ERASED = 2
    DEAD = 3


_DEAD: Final = State.DEAD  # a member that is looked up at its class takes as long as all the rest of `wins`

STATES: Final = {int(state): state for state in State}
"""By number. A stored row with another one is damaged; it counts as ERASED, so that it stops no batch."""


class Mark(NamedTuple):
    """What the order of rows is made of. A later (epoch, version) is newer; see `wins`."""

    state: State
    epoch: int
    version: int


class Row(NamedTuple):
    """One row. `user`: 8 bytes that stand for the user whose session it is, or none. Only LIVE rows have a body."""

    handle: bytes
    state: State
    epoch: int
    version: int
    horizon: int
    user: bytes = b""
    body: bytes = b""

    @property
    def mark(self) -> Mark:
        """Its place in the order."""
        return Mark(self.state, self.epoch, self.version)

    def __repr__(self) -> str:
        return f"<Row {self.handle.hex()}, {self.state.name}, {self.epoch}.{self.version}>"


class Answer(NamedTuple):
    """What became of a row that was sent: whether it stands there now, and what stood there before."""

    applied: bool
    before: Mark | None


def wins(row: Row, before: Mark | None) -> bool:
    """Whether `row` replaces what is stored.

    Death beats everything and is never undone; otherwise the newer one wins. Equal ones do not: nothing would change.
    """
    if before is None or row.state is _DEAD:
        return True
    return before.state is not _DEAD and row[2:4] > before[1:]  # (epoch, version)


def check_schema(tables: str, version: int, known: int, option: str) -> None:
    """Raises BackendError when the version of these tables is not the known one; by `option` others are chosen."""
    if version != known:
        todo = "upgrade shmsession" if version > known else f"remove them, or choose others by {option}="
        raise BackendError(f"{tables} have schema {version}, this version of shmsession knows {known}: {todo}")


class Backend(Protocol):
    """A database of rows by handle. All methods of one object are called on one event loop.

    A database that cannot be reached, or does not answer in time, raises BackendUnavailable; one that answers with an
    error raises BackendError with a message that says what to do. No answer is ever made up: an error is no absence.

    One that keeps its rows in a file may say in which by an attribute `path`: a generated Key is kept beside it. One
    whose servers may be replaced by others, which lack what was acknowledged last, may have a method
    `async def history(self) -> bytes`: what it returns is another when such a one answers from now on, never the same
    as before again; b"" when that cannot be told. It is asked after each batch.
    """

    name: str
    """For logs and numbers: no credentials in it."""
    remote: bool
    """Whether it is a server, which others than this host's processes may reach: then the Keys must be configured, not
    generated."""
    expires: bool
    """Whether rows vanish by themselves after their horizon, so that nobody need sweep."""

    async def open(self) -> None:
        """Make ready to be asked. It may succeed though the database is down; then the first question fails.

        Raises ConfigError for settings that cannot work, which stops the server's start; after any other error it is
        called again. In a child that was forked with it open, it makes new connections and leaves the parent's alone.
        """
        ...

    async def close(self) -> None:
        """Let go of connections. Closing what is closed, or was never opened, does nothing."""
        ...

    async def initialize(self) -> None:
        """Make or migrate the schema. Again, or by several at once, it changes nothing. Needs `open`.

        Raises BackendError for a schema that it does not know, such as one that a newer version of this program made.
        """
        ...

    async def load(self, handle: bytes) -> Row | None:
        """The LIVE or DEAD row; None when there is none, or an ERASED one."""
        ...

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        """Store each row that `wins` over what is there, whoever else writes meanwhile. One answer for each, in order.

        No handle occurs twice. The horizon kept is the later of both, whichever row wins. What is answered is as
        durable as the database is configured to be; after an error any of the rows may have been stored. Where users
        are listed, a LIVE row is never there without its user's entry.
        """
        ...

    async def sweep(self, now: int, limit: int) -> int:
        """Delete up to `limit` rows, of any state, whose horizon is before `now`; returns how many went."""
        ...

    async def count(self) -> int:
        """How many LIVE rows there are."""
        ...

    def handles(self) -> AsyncIterator[bytes]:
        """The handles of all LIVE rows, each once, in no order. Rows that come or go meanwhile may be missing."""
        ...

    async def sessions_of(self, user: bytes) -> list[Row]:
        """The LIVE rows of a user; none for b"", for nobody is the user of anonymous sessions."""
        ...

    async def clear(self) -> int:
        """Turn every LIVE and ERASED row into a DEAD one without body and user; returns how many were LIVE.

        The sentinel stays.
        """
        ...
