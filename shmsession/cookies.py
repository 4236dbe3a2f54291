"""The session cookie: read, sealed and written by RFC 6265bis. No I/O, no clock.

A private cookie is 92 characters of URL-safe base64 with no slack bits, so that each session has one spelling:
version (1 byte), Key id (4), nonce (12), AES-256-GCM of id and time of issue (32 + 4), tag (16).
"""

from base64 import urlsafe_b64encode
from binascii import a2b_base64
from datetime import timedelta
from functools import lru_cache
from typing import Final, NamedTuple

from cryptography.exceptions import InvalidTag

from .config import SessionConfig
from .ids import ID_BYTES, handle_of
from .keyring import KEY_ID_BYTES, Keyring

VERSION: Final = b"\x01"
VALUE_CHARS: Final = 92
OPENED_COOKIES: Final = 4096
"""So many opened cookies a process remembers, refused ones included."""

_HEAD = 1 + KEY_ID_BYTES
_TO_STANDARD = bytes.maketrans(b"-_+/", b"+/!!")


class Ticket(NamedTuple):
    """A cookie that passed its seal. After `stale_after` milliseconds it is to be issued anew, for its Key or age."""

    session_id: bytes
    handle: bytes
    stale_after: int

    def __repr__(self) -> str:
        return f"<Ticket {self.handle.hex()}>"


class Cookies:
    """Reads and writes the session cookie of one configuration."""

    def __init__(self, config: SessionConfig, keyring: Keyring) -> None:
        self._keyring = keyring
        self.name = config.effective_cookie_name
        self._context = b"cookie " + self.name.encode()
        self._needle = self.name.encode() + b"="
        self._max_age_seconds = max(1, config.max_age // timedelta(seconds=1))
        self._attributes = _attributes(config)
        self._prefix = self.name + "="
        self._alone = len(self._needle) + VALUE_CHARS
        self.open = lru_cache(OPENED_COOKIES)(self._open)
        """The ticket in a cookie's value, or the reason code of its refusal; remembered, for browsers repeat it."""

    def find(self, header: bytes) -> bytes | str | None:
        """The value of this cookie in a Cookie header; None without one, a reason code with more than one."""
        if self._needle not in header:
            return None
        found: bytes | None = None
        needle, skip = self._needle, len(self._needle)
        if len(header) == self._alone and header.startswith(needle) and b";" not in header:
            return header[skip:]
        for pair in header.split(b";"):
            pair = pair.strip(b" \t")
            if pair.startswith(needle):
                if found is not None:
                    return "duplicate"
                found = pair[skip:]
        if found is None and b"," in header:  # some WSGI servers join several Cookie headers with commas
            return self.find(header.replace(b",", b";"))
        return found

    def _open(self, value: bytes) -> Ticket | str:
        try:
            token = a2b_base64(value.translate(_TO_STANDARD), strict_mode=True)
        except ValueError:
            return "malformed"
        if token[:1] != VERSION:
            return "malformed"
        key_id = token[1:_HEAD]
        try:
            plain = self._keyring.unseal(key_id, token[_HEAD:], self._context)
        except KeyError:
            return "unknown_key"
        except InvalidTag:
            return "forged"
        issued, session_id = int.from_bytes(plain[ID_BYTES:], "big"), plain[:ID_BYTES]
        fresh = key_id == self._keyring.newest_id
        return Ticket(session_id, handle_of(session_id), (issued * 1000 + self._max_age_seconds * 500) if fresh else 0)

    def read(self, header: bytes) -> Ticket | str | None:
        """`find` and `open` in one: a ticket, None without a cookie, or a reason code."""
        value = self.find(header)
        if isinstance(value, bytes):
            return self.open(value) if len(value) == VALUE_CHARS else "malformed"
        return value

    def value(self, session_id: bytes, now: int) -> str:
        """The sealed value for a session, issued at `now` milliseconds."""
        issued = min(now // 1000, 2**32 - 1).to_bytes(4, "big")
        sealed = self._keyring.seal(session_id + issued, self._context)
        return urlsafe_b64encode(VERSION + self._keyring.newest_id + sealed).decode()

    def issue(self, session_id: bytes, now: int) -> str:
        """The Set-Cookie value that gives the browser this session."""
        return f"{self._prefix}{self.value(session_id, now)}; Max-Age={self._max_age_seconds}{self._attributes}"

    def expire(self) -> str:
        """The Set-Cookie value that takes the cookie away."""
        return f"{self._prefix}; Max-Age=0{self._attributes}"


def _attributes(config: SessionConfig) -> str:
    return "".join(
        f"; {text}"
        for text, wanted in (
            (f"Path={config.path}", True),
            (f"Domain={config.domain}", config.domain is not None),
            (f"SameSite={config.same_site}", True),
            ("HttpOnly", config.http_only),
            ("Secure", config.secure),
            ("Partitioned", config.partitioned),
        )
        if wanted
    )
