"""Cookies by RFC 6265bis: found in a Cookie header, written as Set-Cookie. What their values mean is not known here."""

from datetime import timedelta

from .cookie_rules import Attributes


def find(header: bytes, needle: bytes) -> bytes | str | None:
    """The value of one cookie in a Cookie header; None without it, a reason code when it is there more than once.

    `needle`: its name and the equals sign.
    """
    if needle not in header:
        return None
    if b";" not in header and header.startswith(needle):
        return header[len(needle) :]
    found: bytes | None = None
    for pair in header.split(b";"):
        pair = pair.strip(b" \t")
        if pair.startswith(needle):
            if found is not None:
                return "duplicate"
            found = pair[len(needle) :]
    return found


class Writer:
    """Writes one cookie."""

    def __init__(self, name: str, attributes: Attributes, *, http_only: bool) -> None:
        self._prefix = name + "="
        self._attributes = _written(attributes, http_only=http_only)

    def issue(self, value: str, max_age: timedelta | None) -> str:
        """The Set-Cookie value that gives the browser this; with None it ends with the browser."""
        kept = "" if max_age is None else f"; Max-Age={max(1, max_age // timedelta(seconds=1))}"
        return f"{self._prefix}{value}{kept}{self._attributes}"

    def expire(self) -> str:
        """The Set-Cookie value that takes the cookie away."""
        return f"{self._prefix}; Max-Age=0{self._attributes}"


def _written(attributes: Attributes, *, http_only: bool) -> str:
    return "".join(
        f"; {text}"
        for text, wanted in (
            (f"Path={attributes.path}", True),
            (f"Domain={attributes.domain}", attributes.domain is not None),
            (f"SameSite={attributes.same_site}", True),
            ("HttpOnly", http_only),
            ("Secure", attributes.secure),
            ("Partitioned", attributes.partitioned),
        )
        if wanted
    )
