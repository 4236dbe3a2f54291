"""Who asks: a client's address, behind a declared number of proxies, and its user agent, as bytes to bind tokens to."""

import ipaddress
import re
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Final

from .config import SessionConfig

REMEMBERED: Final = 1024
AGENT_CHARS: Final = 200
IPV6_PREFIX: Final = 64
"""Bits of an IPv6 address that count: the rest is the machine's own, which changes it every few hours (RFC 8981)."""

_PAIR: Final = re.compile(r'(?:^|;)\s*([^=;"\s]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;"\s]*)')
_QUOTE: Final = re.compile(r'\\.|(")')
_WITH_PORT: Final = re.compile(r"\[([^\]]*)\](?::[\w.-]*)?|([\d.]+)(?::\d+)?")


class Binding:
    """Binds to the given of "ip" and "user_agent"; to nothing: every client is the same."""

    def __init__(self, config: SessionConfig, bind_to: Sequence[str]) -> None:
        self._proxies = config.trusted_proxies
        self._header = config.proxy_header
        self._ip, self._agent = "ip" in bind_to, "user_agent" in bind_to
        self._digest = lru_cache(REMEMBERED)(self._digest_of)

    def client(self, peer: str, forwarded: str, agent: bytes) -> bytes:
        """17 bytes that stand for a client, or b"" when nothing is bound.

        `peer` is the address of the connection, `forwarded` what the proxies' header says, with lists joined by commas.
        """
        if not (self._ip or self._agent):
            return b""
        return self._digest(self.address(peer, forwarded) if self._ip else "", agent if self._agent else b"")

    def address(self, peer: str, forwarded: str) -> str:
        """The client's address, as far as it is known; maybe with a port, and maybe none at all.

        Each proxy notes who asked it, at the end: what stands further in front anybody may have written.
        """
        if not self._proxies or not forwarded:
            return peer
        if self._header == "Forwarded":
            return _noted_for(_last_elements(forwarded, self._proxies)[0]) or peer
        return forwarded.rsplit(",", self._proxies)[-self._proxies :][0].strip()

    @staticmethod
    def _digest_of(address: str, agent: bytes) -> bytes:
        network = network_of(address).encode()
        parts = len(network).to_bytes(4, "big") + network + agent
        return b"\0" + blake2b(parts, digest_size=16, person=b"shmsession who").digest()


def _last_elements(forwarded: str, count: int) -> list[str]:
    """The last elements, so many or all, of a list of RFC 7239. Read from its end: quotes that a client left open stand
    in front of what proxies have noted."""
    elements: list[str] = []
    pieces: list[str] = []
    quotes = 0
    for piece in reversed(forwarded.split(",")):
        pieces.append(piece)
        quotes += _QUOTE.findall(piece).count('"')
        if quotes % 2 == 0:
            elements.append(",".join(reversed(pieces)))
            pieces = []
            if len(elements) == count:
                return elements[::-1]
    return [",".join(reversed(pieces)), *reversed(elements)] if pieces else elements[::-1]


def _noted_for(element: str) -> str:
    """Whom a proxy noted; "" when it noted nobody."""
    noted: dict[str, str] = {name.lower(): value.strip('"') for name, value in _PAIR.findall(element)}
    return noted.get("for", "")


def network_of(address: str) -> str:
    """An IPv4 address, an IPv6 address's network of 64 bits, or whatever else it was; ports and zones are left out."""
    parsed = _parsed(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False))
    return address if parsed is None else str(parsed)


def neighbourhood_of(address: str) -> str:
    """A network in which the address is, too large to tell a person: 24 bits of IPv4, 48 of IPv6; "" for no address."""
    parsed = _parsed(address)
    if parsed is None:
        return ""
    return str(ipaddress.ip_network((parsed, 24 if parsed.version == 4 else 48), strict=False))


def agent_in(header: bytes) -> str:
    """A user agent's name of itself, cut to 200 characters that can be shown."""
    text = header[: 8 * AGENT_CHARS].decode("utf-8", "replace")
    return "".join(filter(str.isprintable, text))[:AGENT_CHARS]


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    found = _WITH_PORT.fullmatch(address)
    text = (found[1] or found[2]) if found else address
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return parsed if mapped is None else mapped
