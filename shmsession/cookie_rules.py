"""Cookies that browsers refuse, by RFC 6265bis and by what they really do: each an error before one is ever set."""

import re
from typing import Final, NamedTuple

from .errors import ConfigError
from .variables import PREFIX

TOKEN: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,64}")
"""A name."""
_ATTRIBUTE = re.compile(r"[\x21-\x3A\x3C-\x7E]{1,1024}")
_DOMAIN = re.compile(r"\.?(?=.{1,253}\Z)[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*")
_PATH = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~!$&'()*+,=:@%\[\]-]*)+")

_HEADER = re.compile(r"(?=.*[A-Za-z])[A-Za-z0-9-]{1,64}")
_TAKEN: Final = frozenset((
    "age", "allow", "alt-svc", "authorization", "cache-control", "clear-site-data", "connection", "cookie", "date",
    "etag", "expect", "expires", "forwarded", "from", "host", "keep-alive", "last-modified", "link", "location",
    "max-forwards", "origin", "pragma", "range", "referer", "referrer-policy", "refresh", "retry-after", "server",
    "set-cookie", "status", "strict-transport-security", "te", "trailer", "transfer-encoding", "upgrade",
    "user-agent", "vary", "via", "warning", "www-authenticate", "x-real-ip", "x-sendfile",
))  # fmt: skip
_TAKEN_KINDS: Final = ("accept", "access-control-", "content-", "if-", "proxy", "sec-", "x-accel-", "x-forwarded-")


class Attributes(NamedTuple):
    """What is said of a cookie besides its name and value; fields as in SessionConfig."""

    secure: bool
    domain: str | None
    path: str
    same_site: str = "Lax"
    partitioned: bool = False

    def fitting(self, name: str) -> "Attributes":
        """The nearest with which browsers accept a cookie of this name."""
        prefix = name.lower()
        if prefix.startswith("__host-"):
            return self._replace(secure=True, domain=None, path="/")
        return self._replace(secure=True) if prefix.startswith(("__secure-", "__http-")) else self

    def check(self) -> None:
        """Raises ConfigError for what no cookie may say."""
        if self.same_site not in ("Lax", "Strict", "None"):
            raise ConfigError(f"same_site {self.same_site!r}: write Lax, Strict or None")
        for what, value in (("domain", self.domain), ("path", self.path)):
            if value is not None and not _ATTRIBUTE.fullmatch(value):
                raise ConfigError(
                    f"{what} {value!r}: no spaces, semicolons or control characters, 1 to 1024 characters"
                )
        if not self.path.startswith("/"):
            raise ConfigError(f"path {self.path!r}: begin it with /")
        if not _PATH.fullmatch(self.path):
            raise ConfigError(
                f"path {self.path!r}: browsers never send its cookie back: write it as it stands in their requests, "
                "with %22 for a quotation mark and so on, without a query, . or .."
            )
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise ConfigError(
                f"browsers refuse the domain {self.domain!r}: write a host's name, such as example.com, without a "
                "scheme, a port or a final dot"
            )
        for what, wanted in (("same_site='None'", self.same_site == "None"), ("partitioned=True", self.partitioned)):
            if wanted and not self.secure:
                raise ConfigError(f"browsers refuse {what} without Secure: set secure=True ({PREFIX}SECURE=1)")

    def check_name(self, name: str, setting: str, *, http_only: bool) -> None:
        """Raises ConfigError when the name promises what is not so. `setting`: where another one is to be written."""
        prefix = name.lower()
        if prefix.startswith(("__host-", "__secure-", "__http-")) and not self.secure:
            raise ConfigError(
                f"browsers refuse the cookie name {name!r} without Secure: set secure=True ({PREFIX}SECURE=1), or "
                f"another {setting}"
            )
        if prefix.startswith(("__http-", "__host-http-")) and not http_only:
            todo = "set http_only=True" if setting == "cookie_name" else f"choose another {setting}: scripts read it"
            raise ConfigError(f"browsers refuse the cookie {name!r} without HttpOnly: {todo}")
        if prefix.startswith("__host-") and (self.domain is not None or self.path != "/"):
            raise ConfigError(
                f"browsers refuse the cookie {name!r} with a domain or a path: "
                f"leave both out, or set {setting}={'__Secure-' + name[7:]!r}"
            )


def check_header(name: str) -> None:
    """Raises ConfigError for a header that cannot carry a session."""
    if not _HEADER.fullmatch(name):
        raise ConfigError(f"header_name {name!r}: write up to 64 letters, digits and dashes")
    if name.lower() in _TAKEN or name.lower().startswith(_TAKEN_KINDS):
        raise ConfigError(f"header_name {name!r} has another meaning: write one of your own, such as X-Session")
