"""Session ids and their handles."""

import os
import re
from base64 import urlsafe_b64encode
from hashlib import blake2b
from typing import Final

ID_BYTES: Final = 32
ID_CHARS: Final = 43
HANDLE_BYTES: Final = 20

_ID = re.compile(r"[A-Za-z0-9._~-]{16,128}")


def new_id() -> str:
    """A fresh secret id: 32 bytes from the operating system's random source, as URL-safe text without padding."""
    return text_of(os.urandom(ID_BYTES))


def text_of(random: bytes) -> str:
    """32 bytes as an id."""
    return urlsafe_b64encode(random).rstrip(b"=").decode()


def is_id(text: str) -> bool:
    """Whether this can be an id: 16 to 128 letters, digits and any of . _ ~ - which need no quotes in a cookie."""
    return _ID.fullmatch(text) is not None


def handle_of(session_id: str) -> bytes:
    """The id's handle: BLAKE2b-160, personalised (RFC 7693). The only form of an id that is ever stored or shown."""
    return blake2b(session_id.encode(), digest_size=HANDLE_BYTES, person=b"shmsession id").digest()


def watermark_of(user: bytes) -> bytes:
    """Where the watermark of an encoded user id is kept: no id has this handle."""
    return blake2b(user, digest_size=HANDLE_BYTES, person=b"shmsession mark").digest()


def tag_of(user: bytes) -> bytes:
    """8 bytes that stand for an encoded user id in the users' index: a hint, to be verified against the record."""
    return blake2b(user, digest_size=8, person=b"shmsession user").digest()
