"""Making the next record: sealed bytes that say what a session is after a commit. No transaction, no clock."""

from shmsession.codec import encode
from shmsession.errors import SessionTooLarge
from shmsession.ids import tag_of
from shmsession.record import (
    AUTH_TIME_KEY,
    AUTHENTICATED,
    LOGIN_KEYS,
    NO_TAG,
    SPARED_KEY,
    USER_KEY,
    WITHDRAWN,
    Changes,
    Data,
    Header,
    Lifetimes,
    Record,
    first_header,
    join,
    next_header,
    tombstone,
    watermark_header,
)
from shmsession.watermark import Watermark

from . import room
from .seal import RecordSeal


class Drafts:
    """Records to be stored under `handle` at wall-clock time `now` and boot time `boot`, in incarnation `epoch`."""

    def __init__(self, seal: RecordSeal, lifetimes: Lifetimes, max_size: int) -> None:
        self._seal = seal
        self._lifetimes = lifetimes
        self._max_size = max_size

    def first(
        self, handle: bytes, data: Data, changes: Changes, now: int, boot: int, epoch: int, auth_time: int | None = None
    ) -> Record:
        """A session that begins with `data`; with a user in it, by a login at `auth_time`, or now.

        Raises SessionTooLarge.
        """
        user = data.get(USER_KEY)
        if user is not None:
            data = {**data, AUTH_TIME_KEY: encode(now if auth_time is None else auth_time)}
        tag = NO_TAG if user is None else tag_of(user)
        header = first_header(now, boot, changes, self._lifetimes, epoch, self._seal.key_id, tag)
        return self._seal.close(handle, header, self._joined(data), data)

    def next(self, handle: bytes, base: Record, changes: Changes, now: int, boot: int, epoch: int) -> Record:
        """`base` with `changes`. Raises SessionTooLarge."""
        header = next_header(base.header, now, boot, changes, self._lifetimes, epoch, self._seal.key_id)
        if changes.set or changes.deleted or changes.cleared:
            values = changes.merged(base.split())
            return self._seal.close(handle, header, self._joined(values), values, base.place)
        return self._seal.close(handle, header, base.data, base.split(), base.place)

    def moved(
        self, handle: bytes, base: Record, changes: Changes, now: int, boot: int, epoch: int, user: bytes | None, *,
        login: bool, auth_time: int | None = None,
    ) -> Record:  # fmt: skip
        """`base` with `changes`, as `user`'s, under its new handle; of the last login stays what is known unless there
        is another, or nobody logged in any more. Raises SessionTooLarge."""
        stored = base.split()
        if login or user is None:
            stored = {key: value for key, value in stored.items() if key not in LOGIN_KEYS}
        data = changes.merged(stored)
        if user is not None:
            data[USER_KEY] = user
            if login:
                data[AUTH_TIME_KEY] = encode(now if auth_time is None else auth_time)
        touched = Changes(touch=True, storable=changes.storable, longterm=changes.longterm)
        header = next_header(base.header, now, boot, touched, self._lifetimes, epoch, self._seal.key_id)
        flags = header.flags & ~(AUTHENTICATED | WITHDRAWN) | (AUTHENTICATED if user is not None else 0)
        absolute = self._lifetimes.deadline(now) if login else header.absolute
        header = header._replace(
            flags=flags,
            version=1,
            absolute=absolute,
            horizon=max(header.horizon, min(header.idle_expiry, absolute)),
            user_tag=NO_TAG if user is None else tag_of(user),
        )
        return self._seal.close(handle, header, self._joined(data), data)

    def tombstone(
        self, handle: bytes, header: Header, place: bytes, now: int, boot: int, epoch: int, *, renewed: bool,
        successor: bytes,
    ) -> Record:  # fmt: skip
        """What is left of a record. It remembers the horizon, until which a backend must know it."""
        dead = tombstone(header, now, boot, room.QUIET_MS, epoch, self._seal.key_id, renewed=renewed)
        return self._seal.close(handle, dead, successor, place=place)

    def watermark(self, mark: Watermark, place: bytes, now: int, epoch: int) -> Record:
        """A user's watermark."""
        header = watermark_header(now, mark.boot, room.QUIET_MS, epoch, self._seal.key_id)
        return self._seal.close(mark.handle, header, mark.packed(), place=place)

    def spared(self, handle: bytes, base: Record, mark: Watermark, now: int, epoch: int) -> Record:
        """`base`, of which the watermark does not say that it has ended. However full it is: that cannot wait."""
        header = next_header(base.header, now, mark.boot, Changes(), self._lifetimes, epoch, self._seal.key_id)
        data = {**base.split(), SPARED_KEY: encode(mark.moment + 1)}
        return self._seal.close(handle, header, join(data), data, base.place)

    def reheaded(self, handle: bytes, record: Record, header: Header) -> Record:
        """The same data under another header, sealed with the Key that it says."""
        return self._seal.close(handle, header, record.data, place=record.place)

    def placed(self, handle: bytes, record: Record, place: bytes) -> Record:
        """The same at another place in the outbox."""
        return self._seal.placed(handle, record, place)

    def _joined(self, data: Data) -> bytes:
        joined = join(data) if data else b""
        if len(joined) > self._max_size:
            raise SessionTooLarge(
                f"the session's data takes {len(joined)} bytes, max_size is {self._max_size}: "
                "store less in it, or raise SessionConfig(max_size=)"
            )
        return joined
