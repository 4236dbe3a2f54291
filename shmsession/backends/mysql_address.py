"""Where a MySQL or MariaDB server is, and as whom it is spoken to: what a URL says."""

import re
import ssl
from typing import Any, Final, NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from shmsession.errors import ConfigError

_URL: Final = re.compile(
    r"(?:mysql|mariadb)://"
    r"(?P<user>[^:@/?#]+)(?::(?P<password>[^@/?#]*))?@"
    r"(?P<host>[^:@/?#\[\]]*|\[[0-9A-Fa-f:.]+\])(?::(?P<port>[0-9]{1,5}))?"
    r"/(?P<database>[^@/?#]+)(?:\?(?P<query>[^#]*))?",
    re.IGNORECASE,
)
_OPTIONS: Final = ("table", "max_size", "timeout", "unix_socket", "ssl_ca", "ssl_cert", "ssl_key", "ssl_verify")
_FLAGS: Final = {"true": True, "1": True, "false": False, "0": False}


class Address(NamedTuple):
    """A server, by TCP or by its socket, a database of it, and credentials, which no text of it shows."""

    user: str
    password: bytes
    host: str
    port: int
    database: str
    unix_socket: str

    def __repr__(self) -> str:
        return f"<Address {self.name}>"

    @property
    def name(self) -> str:
        """For logs: no credentials in it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mysql://{self.unix_socket or f'{host}:{self.port}'}/{self.database}"


class TLS(NamedTuple):
    """The files of a certificate authority, and of a certificate of one's own with its key; "" where there is none."""

    authorities: str
    certificate: str
    key: str
    verify: bool | None

    @property
    def is_wanted(self) -> bool:
        """Whether anything is said of it."""
        return self.verify is not None or bool(self.authorities or self.certificate)

    def context(self) -> ssl.SSLContext | None:
        """What the driver is given; None for none. Raises ConfigError for a file that cannot be used."""
        if not self.is_wanted:
            return None
        try:
            context = ssl.create_default_context(cafile=self.authorities or None)
        except OSError as error:  # SSLError too
            raise ConfigError(f"ssl_ca={self.authorities} cannot be read: {_reason(error)}") from None
        if self.verify is False:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if self.certificate:
            try:
                context.load_cert_chain(self.certificate, self.key or None, password=_no_password)
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"ssl_cert={self.certificate} with ssl_key={self.key} cannot be used: {_reason(error)}"
                ) from None
        return context


def _no_password() -> str:
    """Instead of asking for one on the terminal."""
    raise ValueError("the key is encrypted, and no password can be given")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def parsed(url: str) -> tuple[Address, dict[str, str]]:
    """What a URL says, and the options in it, unchecked. Raises ConfigError, which quotes nothing of it."""
    found = _URL.fullmatch(url)
    if found:
        port = int(found["port"] or 3306)
        options = dict(map(_option, found["query"].split("&"))) if found["query"] else {}
        if 0 < port < 65536 and options.keys() <= set(_OPTIONS):
            address = Address(
                user=unquote(found["user"]), password=unquote_to_bytes(found["password"] or ""),
                host=found["host"].strip("[]") or "localhost", port=port, database=unquote(found["database"]),
                unix_socket=options.pop("unix_socket", ""),
            )  # fmt: skip
            return address, options
    raise ConfigError(
        "this is no MySQL URL: write mysql://user:password@host:3306/database, with special characters "
        f"percent-encoded, and after a ? no other options than {', '.join(_OPTIONS)}"
    )


def _option(part: str) -> tuple[str, str]:
    name, _, value = part.partition("=")
    return unquote(name), unquote(value)


def flag(value: Any) -> bool | None:
    """Yes, no, or nothing said, as a keyword or in a URL. Raises ConfigError."""
    if value is None or isinstance(value, bool):
        return value
    try:
        return _FLAGS[str(value).lower()]
    except KeyError:
        raise ConfigError("ssl_verify= must be true or false") from None
