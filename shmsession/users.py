"""All sessions of a user: listed, and ended, here and in the backend."""

import contextlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from .codec import decode, encode
from .errors import StoreError
from .finding import Finder
from .hooks import Destroyed
from .ids import watermark_of
from .memory.store import Missing
from .record import DEVICE_KEY, LONGTERM, Data, Header
from .rows import Loaded
from .session import Session
from .watermark import auth_time

_HANDLE: Final = re.compile("[0-9a-fA-F]{40}")


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What a user may know of one of their sessions. Times are UTC; `last_seen` is true to within `touch_interval`.

    `handle`: for `revoke`, in hex. `authenticated_at` None: not known. `user_agent`, `address`: of the client that
    logged in, the first cut to 200 characters, the second to a network; "" for what is not known, or not recorded.
    """

    handle: str
    created_at: datetime
    authenticated_at: datetime | None
    last_seen: datetime
    expires_at: datetime
    longterm: bool
    user_agent: str
    address: str


class UserSessions(Finder):
    """What a session store does with all sessions of a user."""

    async def sessions(self, user_id: Any) -> list[SessionInfo]:
        """The live sessions of a user, the one that was seen last first; with a backend also those that only it has.

        Raises BackendError when that cannot be asked, for a list that lacks some would be taken for all of them;
        Unreadable, ValueError for no user.
        """
        user = _encoded(user_id)
        behind = await self.behind.sessions_of_async(user) if self.is_persistent else {}
        return self._listed(user, behind)

    async def revoke(self, handle: str) -> bool:
        """End a session by its handle, in all processes, now; whether there was one, or nobody could say.

        Waits up to `through_timeout` for the backend. Raises ValueError for what is no handle, StoreError.
        """
        raw = _raw(handle)
        if self._lacks(raw):
            with contextlib.suppress(StoreError):  # it ends whatever the backend says
                if await self.behind.load_async(raw) is Missing.UNKNOWN:
                    return False
        killed = self.kill(raw)
        if killed is not None:
            await self.persisted((killed,))
        return killed is not None

    async def revoke_user(self, user_id: Any, *, keep: Session | str | None = None) -> int:
        """End all sessions of a user, in all processes and for good; how many of them memory had.

        `keep`: one that goes on, as a Session or by its handle; what neither memory has nor the backend can give ends
        with the others. What only the backend has ends there as soon as it can
        be reached, and is not let in until then. Logins that were asked for before this are dropped. Waits up to
        `through_timeout` for the backend. Raises ValueError for no user and no handle, StoreError.
        """
        user, kept = _encoded(user_id), _kept(keep)
        with contextlib.suppress(StoreError):  # the others end in any case
            if kept is not None and self._lacks(kept):
                await self.behind.load_async(kept)
        ended = self._end_all(user, keep)
        await self.persisted((watermark_of(user), *ended))
        return len(ended)

    async def recall_user(self, user_id: Any) -> None:
        """See to it that memory has all sessions of a user that the backend has, so that `max_sessions_per_user` counts
        them all. Raises BackendError, StoreError, ValueError for no user."""
        user = _encoded(user_id)
        if self.is_persistent:
            await self.behind.recall_async(user)

    # ── in memory ─────────────────────────────────────────────────────────────────────────────────────────────

    def _listed(self, user: bytes, behind: Mapping[bytes, Loaded]) -> list[SessionInfo]:
        """The list for an encoded user id. `behind`: what the backend has; memory is asked after it, and knows best."""
        now, users = self.clock.now(), self.memory.users
        found = [_info(handle, record.header, record.split()) for handle, record in users.sessions(user, now)]
        mark = users.remembered(user)
        for handle, session in behind.items():
            values = session.values()
            if not (mark is not None and mark.ends(values)) and self.memory.load(handle, now) is Missing.UNKNOWN:
                found.append(_info(handle, session.header, values))
        return sorted(found, key=lambda one: (one.last_seen, one.created_at, one.handle), reverse=True)

    def _lacks(self, handle: bytes) -> bool:
        """Whether only the backend can know of this session."""
        return self.is_persistent and self.memory.load(handle, self.clock.now()) is Missing.UNKNOWN

    def _end_all(self, user: bytes, keep: Session | str | None) -> list[bytes]:
        """End all sessions of an encoded user id in memory but one; returns their handles."""
        ended = self.memory.users.revoke(user, _kept(keep))
        if isinstance(keep, Session) and keep.edits.logs_in:
            keep.edits.asked = self.clock.boot()  # it is kept although it is not committed yet
        self.wrote()
        for handle in ended:
            self.hooks.emit(Destroyed(handle.hex()))
        return ended


class SyncUserSessions(ABC):
    """The same for code without an event loop: each blocks the calling thread."""

    _store: UserSessions

    @abstractmethod
    def wait(self, handles: tuple[bytes, ...], timeout: float | None = None) -> bool:
        """See `SessionStore.persisted`."""
        ...

    def sessions(self, user_id: Any) -> list[SessionInfo]:
        """See `SessionStore.sessions`."""
        store, user = self._store, _encoded(user_id)
        return store._listed(user, store.behind.sessions_of(user) if store.is_persistent else {})

    def revoke(self, handle: str) -> bool:
        """See `SessionStore.revoke`."""
        store, raw = self._store, _raw(handle)
        if store._lacks(raw):
            with contextlib.suppress(StoreError):
                if store.behind.load(raw) is Missing.UNKNOWN:
                    return False
        killed = store.kill(raw)
        if killed is not None:
            self.wait((killed,))
        return killed is not None

    def revoke_user(self, user_id: Any, *, keep: Session | str | None = None) -> int:
        """See `SessionStore.revoke_user`."""
        store, user, kept = self._store, _encoded(user_id), _kept(keep)
        with contextlib.suppress(StoreError):
            if kept is not None and store._lacks(kept):
                store.behind.load(kept)
        ended = store._end_all(user, keep)
        self.wait((watermark_of(user), *ended))
        return len(ended)

    def recall_user(self, user_id: Any) -> None:
        """See `SessionStore.recall_user`."""
        store, user = self._store, _encoded(user_id)
        if store.is_persistent:
            store.behind.recall(user)


def _encoded(user_id: Any) -> bytes:
    if user_id is None:
        raise ValueError("user_id is None, which is nobody: name a user as renew(user_id=…) was given them")
    return encode(user_id, "user_id")


def _raw(handle: object) -> bytes:
    """A handle as bytes. Raises ValueError."""
    if not (isinstance(handle, str) and _HANDLE.fullmatch(handle)):
        raise ValueError(
            "this is no handle: write the 40 hexadecimal digits of Session.handle, or of SessionInfo.handle"
        )
    return bytes.fromhex(handle)


def _kept(keep: Session | str | None) -> bytes | None:
    if isinstance(keep, Session):
        keep = keep.handle
    return None if keep is None else _raw(keep)


def _info(handle: bytes, header: Header, values: Data) -> SessionInfo:
    device = values.get(DEVICE_KEY)
    agent, address = ("", "") if device is None else decode(device)
    logged_in = auth_time(values)
    return SessionInfo(
        handle.hex(), _utc(header.created), _utc(logged_in) if logged_in else None, _utc(header.last_seen),
        _utc(header.expires), bool(header.flags & LONGTERM), agent, address,
    )  # fmt: skip


def _utc(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)
