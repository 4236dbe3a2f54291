"""From what a request carries to its session: by the transport, in memory, behind it. It knows no protocol."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Final, NamedTuple

from .behind import Behind
from .commit import Committer
from .errors import BackendError, StoreError
from .hooks import CookieRefused
from .memory.store import Missing
from .record import Record
from .session import NOTHING, Resolved
from .tokens import Ticket
from .transport import Presented

Credential = Callable[[], bytes | Presented]
"""Gives what a request carries of a session; called when the application looks. bytes: its Cookie header, joined with
"; " when there were several."""


Origin = tuple[Presented | None, bool | None]
"""What a request carried, and what its visitor chose before."""
NO_ORIGIN: Final[Origin] = (None, None)
PLAIN_FRESH_MS: Final = 200 * 86_400_000
"""A plain token does not say when it was issued; from this age of its session on it is issued anew at every touch."""


class Wanted(NamedTuple):
    """A session that memory lacks, and what its request carried."""

    ticket: Ticket
    origin: Origin


class Finder(Committer):
    """Finds requests' sessions. A session store is one that has what is behind its memory too."""

    @property
    @abstractmethod
    def behind(self) -> Behind:
        """What stands behind the memory store, if anything does."""
        ...

    @abstractmethod
    async def persisted(self, handles: tuple[bytes, ...], timeout: float | None = None) -> bool:  # noqa: ASYNC109
        """See `Port.persisted`."""
        ...

    def resolve(self, credential: Credential | Resolved | StoreError) -> Resolved:
        """What a request's cookie leads to. A cookie that is no session is told to the hooks, never adopted."""
        if isinstance(credential, Resolved):  # fetched ahead
            return credential
        if isinstance(credential, StoreError):
            raise credential
        ticket, origin = self._ticket(credential)
        if isinstance(ticket, Ticket):
            return self._find(ticket, self.clock.now(), origin)
        return self._without(ticket, origin)

    def look_ahead(self, credential: Credential) -> Resolved | StoreError | Wanted:
        """With a backend: what `resolve` is to be given later, by an application that cannot wait for it then.

        What only the backend can tell is `fetch`'s to find out.
        """
        try:
            ticket, origin = self._ticket(credential)
            if not isinstance(ticket, Ticket):
                return self._without(ticket, origin)
            now = self.clock.now()
            found = self._in_memory(ticket, now)
            if found is Missing.UNKNOWN and not self._is_unknown(ticket):
                return Wanted(ticket, origin)
            return _resolved(ticket, found, now, origin)
        except StoreError as error:
            return error

    async def fetch(self, wanted: Wanted) -> Resolved | StoreError:
        """The same for a session that memory lacks."""
        ticket, origin = wanted
        try:
            try:
                found = await self.behind.load_async(ticket.handle)
            except BackendError as error:
                return self._unread(ticket, error, origin)
            return _resolved(ticket, found, self.clock.now(), origin)
        except StoreError as error:
            return error

    def _ticket(self, credential: Credential) -> tuple[Ticket | str | None, Origin]:
        presented = credential()
        transport = self.transport
        if transport.is_simple:
            return transport.read(presented), NO_ORIGIN
        if isinstance(presented, bytes):
            presented = Presented(presented)
        return transport.read(presented), (presented, transport.consent(presented))

    def _without(self, refused: str | None, origin: Origin) -> Resolved:
        """A request that carries no token, or one that is refused for a reason."""
        if refused is None:
            return NOTHING if origin is NO_ORIGIN else Resolved(origin=origin[0], consent=origin[1])
        self.hooks.emit(CookieRefused(refused))
        return _REFUSED if origin is NO_ORIGIN else _REFUSED._replace(origin=origin[0], consent=origin[1])

    def _find(self, ticket: Ticket, now: int, origin: Origin) -> Resolved:
        if not self.is_persistent:
            memory = self.memory
            return _resolved(ticket, memory.load(ticket.handle, now), now, origin)
        found = self._in_memory(ticket, now)
        if found is Missing.UNKNOWN and not self._is_unknown(ticket):
            try:
                found = self.behind.load(ticket.handle)
            except BackendError as error:
                return self._unread(ticket, error, origin)
        return _resolved(ticket, found, now, origin)

    def _in_memory(self, ticket: Ticket, now: int) -> Record | Missing:
        memory = self.memory
        found = memory.load(ticket.handle, now)
        memory.environment.counters.add("misses" if found is Missing.UNKNOWN else "hits")
        return found

    def _is_unknown(self, ticket: Ticket) -> bool:
        """Whether nobody can have been given this id, which memory does not know."""
        if ticket.sealed or not self.behind.id_filter.lacks(ticket.handle):
            return False
        self.memory.environment.counters.add("spared")
        return True

    def _unread(self, ticket: Ticket, error: BackendError, origin: Origin) -> Resolved:
        """What a request gets whose session the backend may have, and cannot say."""
        if self.config.on_backend_error == "unavailable":
            raise error
        return Resolved(handle=ticket.handle, presented=True, origin=origin[0], consent=origin[1])


def _resolved(ticket: Ticket, found: Record | Missing, now: int, origin: Origin) -> Resolved:
    if isinstance(found, Missing):
        gone = found in (Missing.DEAD, Missing.RENEWED)
        handle = ticket.handle if gone else None
        return Resolved(handle=handle, gone=gone, presented=True, origin=origin[0], consent=origin[1])
    stale_after = ticket.stale_after
    if stale_after is None:
        stale_after = found.header.created + PLAIN_FRESH_MS
    return Resolved(ticket.session_id, ticket.handle, found, now > stale_after, False, True, *origin)


_REFUSED: Final = Resolved(presented=True)
