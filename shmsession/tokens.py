"""What carries an id to the client and back: sealed, signed, or the id itself. No I/O, no clock.

A token is bound to what it is for (the name of its cookie or header), and on request to the client that it was given
to. A token has one spelling: base64 with other slack bits, or padding, is refused.

private: version (1 byte), Key id (4), nonce (12), AES-256-GCM of the id and the time of issue (4), with its tag (16);
all of it as URL-safe base64, 92 characters for an id of our own. signed: the id, a dot (a tilde when bound), then Key
id (4), time of issue (4) and BLAKE2b-128 (16) as 32 characters of base64. plain: the id.
"""

from base64 import urlsafe_b64encode
from binascii import a2b_base64
from hmac import compare_digest
from typing import Final, NamedTuple, Protocol

from cryptography.exceptions import InvalidTag

from .config import CookieMode
from .ids import ID_BYTES, ID_CHARS, handle_of, is_id, text_of
from .keyring import KEY_ID_BYTES, MAC_BYTES, NONCE_BYTES, Keyring

LONGEST: Final = 256
"""No token has more characters."""

_PACKED: Final = 0x01
_TEXT: Final = 0x02
_BOUND: Final = 0x10
"""Versions of private tokens: the id is 32 bytes, packed, or somebody's own text; and it is bound to a client."""
_HEAD: Final = 1 + KEY_ID_BYTES
_TIME_BYTES: Final = 4
_AROUND: Final = _HEAD + NONCE_BYTES + _TIME_BYTES + MAC_BYTES
_TAIL_CHARS: Final = (KEY_ID_BYTES + _TIME_BYTES + MAC_BYTES) * 4 // 3
_TO_STANDARD: Final = bytes.maketrans(b"-_+/", b"+/!!")


class Ticket(NamedTuple):
    """A token that passed its seal.

    `stale_after`: from then on, in wall-clock milliseconds, it is to be issued anew, for its Key or age; None: it does
    not say when it was issued. `sealed`: nobody else can have made it up.
    """

    session_id: str
    handle: bytes
    stale_after: int | None
    sealed: bool = True

    def __repr__(self) -> str:
        return f"<Ticket {self.handle.hex()}>"


class Form(Protocol):
    """One way to write a token. `client`: whom it is bound to, b"" for nobody."""

    def write(self, session_id: str, now: int, client: bytes) -> str:
        """The token of a session, issued at `now` milliseconds."""
        ...

    def open(self, value: bytes, client: bytes) -> Ticket | str:
        """Who it leads to, or the reason code of its refusal.

        malformed, unknown_key, forged; binding: it is bound to a client and must not be, or the reverse; moved: it is
        bound, and came from another client, unless it is forged.
        """
        ...


class Private:
    """Nobody but us sees the id. `fresh_for`: milliseconds after which it is to be issued anew."""

    def __init__(self, keyring: Keyring, purpose: str, fresh_for: int) -> None:
        self._keyring = keyring
        self._context = purpose.encode()
        self._fresh_for = fresh_for

    def write(self, session_id: str, now: int, client: bytes) -> str:
        """See Form."""
        packed = _packed(session_id)
        version, plain = (_TEXT, session_id.encode()) if packed is None else (_PACKED, packed)
        head = bytes([version | (_BOUND if client else 0)]) + self._keyring.newest_id
        sealed = self._keyring.seal(plain + _seconds(now), head + self._context + client)
        return urlsafe_b64encode(head + sealed).rstrip(b"=").decode()

    def open(self, value: bytes, client: bytes) -> Ticket | str:
        """See Form."""
        token = _decoded(value)
        if not token or not _has_shape(token[0] & ~_BOUND, len(token) - _AROUND):
            return "malformed"
        bound = bool(token[0] & _BOUND)
        if bound is not bool(client):
            return "binding"
        key_id = token[1:_HEAD]
        try:
            plain = self._keyring.unseal(key_id, token[_HEAD:], token[:_HEAD] + self._context + client)
        except KeyError:
            return "unknown_key"
        except InvalidTag:
            return "moved" if bound else "forged"
        body, issued = plain[:-_TIME_BYTES], int.from_bytes(plain[-_TIME_BYTES:], "big")
        session_id = text_of(body) if token[0] & _PACKED else body.decode()
        return _ticket(self._keyring, key_id, session_id, issued, self._fresh_for)


class Signed:
    """Everybody can read the id, and only we can make one. `fresh_for`: as above."""

    def __init__(self, keyring: Keyring, purpose: str, fresh_for: int) -> None:
        self._keyring = keyring
        self._sign = keyring.macs("signature")
        self._context = purpose.encode()
        self._fresh_for = fresh_for

    def write(self, session_id: str, now: int, client: bytes) -> str:
        """See Form."""
        key_id, issued = self._keyring.newest_id, _seconds(now)
        tail = key_id + issued + self._signature(key_id, issued, session_id.encode(), client)
        return f"{session_id}{'~' if client else '.'}{urlsafe_b64encode(tail).decode()}"

    def _signature(self, key_id: bytes, issued: bytes, session_id: bytes, client: bytes) -> bytes:
        """Of all of it, with lengths where two fields could change sizes."""
        lengths = len(self._context).to_bytes(2, "big") + len(session_id).to_bytes(2, "big")
        return self._sign(key_id, lengths + issued + self._context + session_id + client)

    def open(self, value: bytes, client: bytes) -> Ticket | str:
        """See Form."""
        session_id, mark = value[: -_TAIL_CHARS - 1], value[-_TAIL_CHARS - 1 : -_TAIL_CHARS]
        tail = _decoded(value[-_TAIL_CHARS:])
        if mark not in (b".", b"~") or tail is None or not is_id(_text(session_id)):
            return "malformed"
        bound = mark == b"~"
        if bound is not bool(client):
            return "binding"
        key_id, issued = tail[:KEY_ID_BYTES], tail[KEY_ID_BYTES : KEY_ID_BYTES + _TIME_BYTES]
        if key_id not in self._keyring:
            return "unknown_key"
        if not compare_digest(self._signature(key_id, issued, session_id, client), tail[-MAC_BYTES:]):
            return "moved" if bound else "forged"
        return _ticket(self._keyring, key_id, session_id.decode(), int.from_bytes(issued, "big"), self._fresh_for)


class Plain:
    """The id itself: whether there is such a session only the store can say."""

    def write(self, session_id: str, now: int, client: bytes) -> str:
        """See Form."""
        return session_id

    def open(self, value: bytes, client: bytes) -> Ticket | str:
        """See Form."""
        session_id = _text(value)
        if not is_id(session_id):
            return "malformed"
        return Ticket(session_id, handle_of(session_id), stale_after=None, sealed=False)


def form_of(mode: CookieMode, keyring: Keyring, purpose: str, fresh_for: int) -> Form:
    """The form of a mode. `purpose` parts tokens that are not to be taken for each other's."""
    match mode:
        case CookieMode.PRIVATE:
            return Private(keyring, purpose, fresh_for)
        case CookieMode.SIGNED:
            return Signed(keyring, purpose, fresh_for)
        case CookieMode.PLAIN:
            return Plain()


def _ticket(keyring: Keyring, key_id: bytes, session_id: str, issued: int, fresh_for: int) -> Ticket:
    stale_after = issued * 1000 + fresh_for if key_id == keyring.newest_id else 0
    return Ticket(session_id, handle_of(session_id), stale_after)


def _seconds(now: int) -> bytes:
    return min(now // 1000, 2**32 - 1).to_bytes(_TIME_BYTES, "big")


def _has_shape(version: int, size: int) -> bool:
    """Whether an id of so many bytes can stand in a private token of this version."""
    return (version == _PACKED and size == ID_BYTES) or (version == _TEXT and size > 0)


def _packed(session_id: str) -> bytes | None:
    """The 32 bytes of an id of our own making."""
    if len(session_id) != ID_CHARS:
        return None
    packed = _decoded(session_id.encode())
    return packed if packed is not None and len(packed) == ID_BYTES else None


def _decoded(value: bytes) -> bytes | None:
    """URL-safe base64 without padding; None for anything else, slack bits included."""
    try:
        decoded = a2b_base64(value.translate(_TO_STANDARD) + b"=" * (-len(value) % 4), strict_mode=True)
    except ValueError:
        return None
    return decoded if b"=" not in value and urlsafe_b64encode(decoded).rstrip(b"=") == value else None


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace")
