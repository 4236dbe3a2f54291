"""Session ids and their handles."""

import os
from base64 import urlsafe_b64encode
from hashlib import blake2b

ID_BYTES = 32
HANDLE_BYTES = 20


def new_id() -> bytes:
    """A fresh secret id: 32 bytes from the operating system's random source."""
    return os.urandom(ID_BYTES)


def handle_of(session_id: bytes) -> bytes:
    """The id's handle: BLAKE2b-160, personalised (RFC 7693). The only form of an id that is ever stored or shown."""
    return blake2b(session_id, digest_size=HANDLE_BYTES, person=b"shmsession id").digest()


def text_of(session_id: bytes) -> str:
    """The id as URL-safe text without padding."""
    return urlsafe_b64encode(session_id).rstrip(b"=").decode()


def tag_of(user: bytes) -> bytes:
    """8 bytes that stand for an encoded user id in the users' index: a hint, to be verified against the record."""
    return blake2b(user, digest_size=8, person=b"shmsession user").digest()
