"""Tokens that a form carries back, so that no other site can send it in a visitor's name.

A token is a hash of the session's id under a one-time pad: a new id makes all of them worthless, and no two pages have
the same bytes to be guessed through their compression (BREACH).
"""

import binascii
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from hashlib import blake2b
from hmac import compare_digest
from typing import Final

_BYTES: Final = 32


def token_for(session_id: str) -> str:
    """A token of the session with this id; another one each time."""
    pad = os.urandom(_BYTES)
    return urlsafe_b64encode(pad + _xor(pad, _secret(session_id))).rstrip(b"=").decode()


def belongs(token: str, session_id: str) -> bool:
    """Whether this is a token of the session with this id; the time that it takes tells nothing."""
    try:
        raw = urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4))
    except (binascii.Error, ValueError):
        return False
    if len(raw) != 2 * _BYTES:
        return False
    return compare_digest(_xor(raw[:_BYTES], raw[_BYTES:]), _secret(session_id))


def _secret(session_id: str) -> bytes:
    return blake2b(session_id.encode(), digest_size=_BYTES, person=b"shmsession csrf").digest()


def _xor(one: bytes, other: bytes) -> bytes:
    return bytes(a ^ b for a, b in zip(one, other, strict=True))
