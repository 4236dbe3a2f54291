"""What a user's watermark asks of a backend: that it ends their sessions too, also those that memory lacks."""

from collections.abc import Sequence

from .backends.base import Backend, Row, State
from .clock import Clock
from .errors import BackendError, Unreadable
from .ids import tag_of
from .memory.outbox import Dirty
from .memory.store import MemoryStore
from .record import WATERMARK, Record
from .rows import Rows
from .watermark import Watermark


def is_watermark(dirty: Dirty) -> bool:
    """Whether this is no session to be sent, but what ends sessions."""
    return bool(dirty.record.header.flags & WATERMARK)


class Revocations:
    """Finds what is to end."""

    def __init__(self, memory: MemoryStore, backend: Backend, rows: Rows, clock: Clock) -> None:
        self._memory = memory
        self._backend = backend
        self._rows = rows
        self._clock = clock

    async def rows(self, marks: Sequence[Dirty]) -> list[Row]:
        """The rows that end what these watermarks say has ended, each handle once. Raises BackendError, StoreError."""
        found: dict[bytes, Row] = {}
        for dirty in marks:
            mark = Watermark.of(dirty.record)
            self._memory.users.enforce(mark)  # who wrote it may have died before it was done
            for row in await self._backend.sessions_of(tag_of(mark.user)):
                if self._has_ended(mark, row):
                    found[row.handle] = row._replace(state=State.DEAD, version=row.version + 1, user=b"", body=b"")
        return list(found.values())

    def _has_ended(self, mark: Watermark, row: Row) -> bool:
        """Memory knows best. What nobody can read ends too: it has the user's tag, and nobody could use it."""
        try:
            known = self._memory.load(row.handle, self._clock.now())
        except Unreadable:
            return False
        if isinstance(known, Record):
            return mark.ends(known.split())
        try:
            return mark.ends(self._rows.session_in(row).values())
        except (BackendError, Unreadable):
            return True
