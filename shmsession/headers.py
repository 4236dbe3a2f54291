"""What a session does to a response: its headers, and the answer when sessions are unavailable."""

from collections.abc import Sequence
from typing import Final

RawHeaders = list[tuple[bytes, bytes]]

RETRY_AFTER: Final = (b"retry-after", b"5")
UNAVAILABLE_BODY: Final = b"Sessions are unavailable. Try again shortly.\n"
UNAVAILABLE: Final[RawHeaders] = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"%d" % len(UNAVAILABLE_BODY)),
    RETRY_AFTER,
    (b"cache-control", b"no-store"),
]
FAILED_BODY: Final = b"Internal Server Error\n"
FAILED: Final[RawHeaders] = [
    (b"content-type", b"text/plain; charset=utf-8"),
    (b"content-length", b"%d" % len(FAILED_BODY)),
]


def with_session_headers(headers: RawHeaders, added: Sequence[tuple[bytes, bytes]], looked_at: bytes) -> RawHeaders:
    """A response's headers when the application looked at its session: what its request was `looked_at` for is in Vary.

    With something `added` also that, and `Cache-Control: no-store` in place of any other: nobody may keep it.
    """
    if not added:
        for name, _ in headers:
            if len(name) == 4 and name.lower() == b"vary":
                break
        else:
            return [*headers, (b"vary", looked_at)]
    result, vary = [], looked_at
    for name, value in headers:
        lowered = name.lower()
        if lowered == b"vary":
            vary = _joined(vary, value)
        elif not added or lowered not in (b"cache-control", b"expires", b"pragma"):
            result.append((name, value))
    result.append((b"vary", vary))
    if added:
        result.append((b"cache-control", b"no-store"))
        result += added
    return result


def _joined(vary: bytes, more: bytes) -> bytes:
    """Two Vary lists as one; * swallows all."""
    known = [field.strip() for field in vary.split(b",")]
    fields = [field.strip() for field in more.split(b",") if field.strip()]
    if b"*" in known or b"*" in fields:
        return b"*"
    lowered = {field.lower() for field in known}
    return b", ".join([field for field in fields if field.lower() not in lowered] + known)


def as_text(headers: RawHeaders) -> list[tuple[str, str]]:
    """Headers as WSGI has them (PEP 3333)."""
    return [(name.decode("latin-1"), value.decode("latin-1")) for name, value in headers]
