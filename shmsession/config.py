"""Settings: in code, or by one SHMSESSION_* variable each. Checked when they are made."""

import difflib
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import Enum
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal

from .cookie_rules import TOKEN, Attributes, check_header
from .errors import ConfigError
from .ids import is_id
from .keyring import Key, Keyring, load_or_create
from .record import Lifetimes
from .variables import (
    PREFIX,
    count_in,
    keys_in,
    member_of,
    one_of,
    path_in,
    seconds_in,
    setting,
    size_in,
    switch_in,
    word_in,
)  # fmt: skip

logger = logging.getLogger("shmsession")

MIN_MAP_SIZE: Final = 1 << 20
MAX_MAP_SIZE: Final = 1 << 40
TOUCH_INTERVAL: Final = timedelta(seconds=60)
MAX_PROXIES: Final = 16
TRANSPORTS: Final = ("cookie", "header", "both")
MAX_AGE: Final = timedelta(days=400)
"""RFC 6265bis: browsers cut a cookie's life at 400 days."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class SessionMode(Enum):
    """When a session is kept.

    PERSISTENT: as soon as something is stored in it. OPT_IN: not beyond the request, until the visitor agrees
    (`set_store(True)`). MANUAL: when the application calls `create()`, before which nothing can be stored in it.
    """

    PERSISTENT = "persistent"
    OPT_IN = "opt_in"
    MANUAL = "manual"


class CookieMode(Enum):
    """What protects the id on its way. PRIVATE: AES-256-GCM. SIGNED: everybody can read it, nobody can make one up.
    PLAIN: nothing but its length; whoever makes one up costs a look-up."""

    PRIVATE = "private"
    SIGNED = "signed"
    PLAIN = "plain"


@dataclass(frozen=True, kw_only=True, slots=True)
class OldCookie:
    """What this site's cookie was before: it is still accepted, and replaced at the next commit.

    `name` None: the same as now. `domain` and `path`, which it was set with, are needed to take it away, should they
    have changed as well. What is accepted is as safe as the least of these: leave one out when its time is over.
    """

    name: str | None = None
    mode: CookieMode = CookieMode.PRIVATE
    bind_to: tuple[str, ...] = ()
    domain: str | None = None
    path: str = "/"

    def __post_init__(self) -> None:
        if type(self.mode) is not CookieMode:
            raise ConfigError(f"OldCookie mode is {self.mode!r}: write a CookieMode, such as CookieMode.PRIVATE")
        if self.name is not None and not (type(self.name) is str and TOKEN.fullmatch(self.name)):
            raise ConfigError(f"OldCookie name is {self.name!r}: write the name that the cookie had, or None")
        if not (type(self.domain) in (str, type(None)) and type(self.path) is str):
            raise ConfigError("OldCookie domain and path: write what the cookie was set with")
        Attributes(secure=True, domain=self.domain, path=self.path).check()
        object.__setattr__(self, "bind_to", _bindings("OldCookie bind_to", self.bind_to, self.mode))


def _bindings(what: str, bind_to: object, mode: CookieMode) -> tuple[str, ...]:
    """What a cookie of this mode is bound to. Raises ConfigError."""
    if not isinstance(bind_to, (list, tuple)) or any(word not in ("ip", "user_agent") for word in bind_to):
        raise ConfigError(f'{what} {bind_to!r}: write a sequence of words, ("ip",), ("user_agent",) or both')
    if bind_to and mode is CookieMode.PLAIN:
        raise ConfigError(f"{what} {bind_to!r}: a plain id can be bound to nothing: use private or signed")
    return tuple(bind_to)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionConfig:
    """All settings. A field given here wins over its variable; a field given nowhere has the default below.

    Raises ConfigError, naming the setting and what to write instead, for values and combinations that cannot work:
    among them every cookie that browsers refuse.
    """

    mode: SessionMode = setting("MODE", member_of(SessionMode), SessionMode.PERSISTENT)
    cookie_mode: CookieMode = setting("COOKIE_MODE", member_of(CookieMode), CookieMode.PRIVATE)
    secure: bool = setting("SECURE", switch_in, True)
    cookie_name: str | None = None
    """None: `__Host-session`, or `session` with secure=False."""
    domain: str | None = None
    path: str = "/"
    same_site: Literal["Lax", "Strict", "None"] = "Lax"
    http_only: bool = True
    partitioned: bool = False
    browser_session: bool = False
    """The cookie ends with the browser, unless the session is long-term."""
    old_cookies: tuple[OldCookie, ...] = ()
    """Cookies of an earlier name, mode or binding that are still accepted, so that a change logs nobody out."""
    storable_cookie_name: str | None = None
    """The readable cookie that says what a visitor chose. None: the session cookie's name and `-storable`."""
    transport: Literal["cookie", "header", "both"] = setting("TRANSPORT", one_of("cookie", "header", "both"), "cookie")
    """How the id travels. both: a request that has the header, be it empty, is answered by it; others by cookie."""
    header_name: str = "X-Session"
    """The header of requests and responses, with transport="header" or "both"."""
    bind_to: tuple[str, ...] = ()
    """A session is no session to a client with another "ip", or another "user_agent", than it was given to."""
    trusted_proxies: int = setting("TRUSTED_PROXIES", count_in, 0)
    """How many proxies stand in front of this server, each of which notes the address that asked it."""
    proxy_header: Literal["X-Forwarded-For", "Forwarded", "X-Real-IP"] = "X-Forwarded-For"
    """Where they note it."""
    id_generator: Callable[[], object] | None = None
    """Makes the ids of new sessions, such as uuid.uuid4. None: 32 random bytes."""

    lifespan: timedelta = setting("LIFESPAN", seconds_in, timedelta(hours=6))
    """A session ends when nobody looked at it for this long."""
    max_lifespan: timedelta = setting("MAX_LIFESPAN", seconds_in, timedelta(days=60))
    """The same for long-term sessions (`set_longterm(True)`)."""
    absolute_lifespan: timedelta | None = setting("ABSOLUTE_LIFESPAN", seconds_in, None)
    """The end of every session, however busy, counted from its start or its login. None: no such end."""
    memory_lifespan: timedelta = setting("MEMORY_LIFESPAN", seconds_in, timedelta(hours=1))
    """How long a record that a backend has too stays in memory unused. Without a backend it has no effect."""
    touch_interval: timedelta | None = None
    """Looking at a session moves its end at most this often; it may therefore end early by as much. None: every 60 s,
    or a tenth of `lifespan` or `max_lifespan` if that is less."""

    map_size: int | None = setting("MAP_SIZE", size_in, None)
    """Bytes of shared memory. None: 256 MiB, or half of what the file system has free if that is less."""
    max_size: int = 64 * 1024
    """Most bytes that one session's encoded data may have."""
    directory: Path | None = setting("DIR", path_in, None)
    """Where stores live. None: /dev/shm/shmsession-<uid>, or the temporary directory where there is no /dev/shm."""
    name: str | None = setting("NAME", word_in, None)
    """Applications with one name, directory and Key share their sessions. None: made from the working directory."""
    keys: tuple[Key, ...] = setting("KEY", keys_in, ())
    """Oldest first; the newest seals, all open. Empty: one is made and kept in `key_file`."""
    key_file: Path | None = setting("KEY_FILE", path_in, None)
    """None: $XDG_STATE_HOME/shmsession/<name>.key."""
    save_on_error: bool = False
    """Keep a request's changes also when it ends with status 500 or above, or with an exception."""

    max_sessions_per_user: int | None = setting("MAX_SESSIONS_PER_USER", count_in, None)
    """How many sessions a user may have on this host. None: any number."""
    too_many_sessions: Literal["end_oldest", "refuse"] = setting(
        "TOO_MANY_SESSIONS", one_of("end_oldest", "refuse"), "end_oldest"
    )
    """What a login beyond that does: it ends the session that was logged in first, or raises TooManySessions."""
    record_device: bool = setting("RECORD_DEVICE", switch_in, True)
    """Keep with a login the client's user agent and the network of its address, for `store.sessions`."""

    write: Literal["behind", "through"] = "behind"
    """With a backend: whether a response waits until the backend has what it committed (through). Destroying, renewing
    and revoking always wait."""
    through_timeout: timedelta = timedelta(milliseconds=250)
    """How long a response waits for the backend at most; then it goes on, and what waits is flushed later."""
    flush_interval: timedelta = timedelta(seconds=1)
    """How long a commit waits before it is sent to the backend, at most, while that is up."""
    load_timeout: timedelta = timedelta(seconds=5)
    """How long a request waits for a session that only the backend has."""
    drain_timeout: timedelta = timedelta(seconds=10)
    """How long a server that stops goes on sending what waits for the backend."""
    on_backend_error: Literal["unavailable", "anonymous"] = "unavailable"
    """What a request gets whose session only the backend has, when that cannot be asked: a 503, or no session."""
    database_keys: tuple[Key, ...] = ()
    """Keys that seal sessions in the backend, oldest first; none: whoever reads the database can read them."""
    allow_shared: bool = False
    """Whether other stores, on other hosts, may keep their sessions in the same tables."""

    def __post_init__(self) -> None:
        self._check_types()
        self._check_cookies()
        self._check_transport()
        self._check_times()
        if self.map_size is not None and not MIN_MAP_SIZE <= self.map_size <= MAX_MAP_SIZE:
            raise ConfigError(
                f"{PREFIX}MAP_SIZE (map_size) is {self.map_size}: write at least 1MiB and at most 1024GiB"
            )
        if self.max_sessions_per_user is not None and self.max_sessions_per_user < 1:
            raise ConfigError(
                f"{PREFIX}MAX_SESSIONS_PER_USER (max_sessions_per_user) is {self.max_sessions_per_user}: write "
                "1 or more, or None"
            )
        if not 256 <= self.max_size <= 16 << 20:
            raise ConfigError(f"max_size is {self.max_size}: write 256 bytes to 16 MiB")
        if self.name is not None and not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"{PREFIX}NAME (name) is {self.name!r}: write up to 64 letters, digits, dots, dashes or underscores"
            )

    def _check_types(self) -> None:
        """A str where a Path belongs is taken for one; any other wrong type is an error now, not in a request."""
        for name in ("directory", "key_file"):
            value = getattr(self, name)
            if isinstance(value, str) and value:
                object.__setattr__(self, name, Path(value))
        for name, (kind, advice) in _SEQUENCES.items():
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(isinstance(one, kind) for one in value):
                raise ConfigError(f"{name}: write a sequence of {advice}")
            object.__setattr__(self, name, tuple(value))
        if not (self.id_generator is None or callable(self.id_generator)):
            raise ConfigError("id_generator: write a function, such as uuid.uuid4, or None")
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: write {' or '.join(words)}")
        for name, (kinds, advice) in _TYPES.items():
            value = getattr(self, name)
            if type(value) not in kinds and not (isinstance(value, Path) and type(None) in kinds):
                raise ConfigError(f"{name} is {value!r}: write {advice}")

    def _check_cookies(self) -> None:
        for what in ("cookie_name", "storable_cookie_name"):
            name = getattr(self, what)
            if not (name is None or TOKEN.fullmatch(name)):
                raise ConfigError(f"{what} {name!r}: write up to 64 letters, digits, dashes or underscores")
        given = self.attributes
        given.check()
        given.check_name(self.effective_cookie_name, "cookie_name", http_only=self.http_only)
        given.check_name(self.effective_storable_cookie_name, "storable_cookie_name", http_only=False)

    def _check_transport(self) -> None:
        if self.effective_storable_cookie_name in (self.effective_cookie_name, *(old.name for old in self.old_cookies)):
            raise ConfigError(
                f"the cookie {self.effective_storable_cookie_name!r} says what a visitor chose: give it another name "
                "(storable_cookie_name) than the session's cookie has or had"
            )
        if self.old_cookies and self.transport == "header":
            raise ConfigError("transport='header' reads no old_cookies: set transport='both', or leave them out")
        for old in self.old_cookies:
            if old.name in (None, self.effective_cookie_name) and (old.domain, old.path) != (None, "/"):
                raise ConfigError(
                    "OldCookie domain and path: a cookie of today's name cannot be taken away elsewhere, so change the "
                    "name (cookie_name) at the same time"
                )
        if self.transport != "cookie":
            check_header(self.header_name)
        object.__setattr__(self, "bind_to", _bindings("bind_to", self.bind_to, self.cookie_mode))
        if not 0 <= self.trusted_proxies <= MAX_PROXIES:
            raise ConfigError(
                f"{PREFIX}TRUSTED_PROXIES (trusted_proxies) is {self.trusted_proxies}: write 0 to {MAX_PROXIES}"
            )
        if self.id_generator is not None:
            try:
                one, other = str(self.id_generator()), str(self.id_generator())
            except Exception as error:  # somebody else's code
                raise ConfigError(f"id_generator fails with {type(error).__name__}: {error}") from error
            if not (is_id(one) and is_id(other)) or one == other:
                raise ConfigError(
                    "id_generator must give another id at each call, of 16 to 128 letters, digits, dots, dashes, "
                    "underscores or tildes that nobody can guess, such as uuid.uuid4"
                )

    def _check_times(self) -> None:
        for what in ("lifespan", "max_lifespan", "absolute_lifespan", "memory_lifespan", *_WAITS):
            value = getattr(self, what)
            if value is not None and not timedelta(0) < value <= timedelta(days=36_500):
                setting = what if what in _WAITS else f"{PREFIX}{what.upper()} ({what})"
                raise ConfigError(f"{setting} is {value}: write more than 0 seconds, at most 100 years")
        interval = self.effective_touch_interval
        if not timedelta(0) <= interval < self.lifespan:
            raise ConfigError(
                f"touch_interval is {interval}, lifespan {self.lifespan}: "
                f"write a shorter touch_interval, from 0 on, or a longer lifespan ({PREFIX}LIFESPAN)"
            )

    @property
    def effective_cookie_name(self) -> str:
        """The cookie's name: the configured one, or the default that fits `secure`."""
        if self.cookie_name is not None:
            return self.cookie_name
        return "__Host-session" if self.secure else "session"

    @property
    def effective_storable_cookie_name(self) -> str:
        """The name of the cookie that says what a visitor chose. Scripts read it, so it cannot promise HttpOnly."""
        readable = re.sub("^__(?:Host-)?Http-", "__Secure-", self.effective_cookie_name, flags=re.IGNORECASE)
        return self.storable_cookie_name or f"{readable}-storable"

    @property
    def attributes(self) -> Attributes:
        """What is said of each cookie."""
        return Attributes(self.secure, self.domain, self.path, self.same_site, self.partitioned)

    @property
    def effective_touch_interval(self) -> timedelta:
        """How often a look moves a session's end at most: the configured time, or one that fits the lifespans."""
        if self.touch_interval is not None:
            return self.touch_interval
        return min(TOUCH_INTERVAL, self.lifespan / 10, self.max_lifespan / 10)

    @property
    def max_age(self) -> timedelta:
        """The cookie's Max-Age. The server's clocks end a session, so the cookie need not follow every touch."""
        return min(self.absolute_lifespan or MAX_AGE, MAX_AGE)

    @property
    def lifetimes(self) -> Lifetimes:
        """The clocks in milliseconds."""
        absolute = self.absolute_lifespan
        return Lifetimes(
            milliseconds(self.lifespan),
            milliseconds(self.max_lifespan),
            None if absolute is None else milliseconds(absolute),
        )

    def keyring(self, name: str, beside: Path | None = None) -> Keyring:
        """The configured Keys, or those of the key file, which is made on first use; `beside` says where else."""
        return Keyring(self.keys or load_or_create(self.key_file or beside or _state_directory() / f"{name}.key"))


_WAITS: Final = ("through_timeout", "flush_interval", "load_timeout", "drain_timeout")
"""Times that have no variable."""
_WORDS: Final = {
    "too_many_sessions": ("end_oldest", "refuse"),
    "write": ("behind", "through"), "on_backend_error": ("unavailable", "anonymous"),
    "transport": TRANSPORTS, "proxy_header": ("X-Forwarded-For", "Forwarded", "X-Real-IP"),
}  # fmt: skip

_SEQUENCES: Final[dict[str, tuple[type, str]]] = {
    **dict.fromkeys(("keys", "database_keys"), (Key, "Keys, such as (Key.parse(text),)")),
    "old_cookies": (OldCookie, 'OldCookies, such as (OldCookie(name="sid"),)'),
}
_TYPES: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    **dict.fromkeys(
        ("secure", "http_only", "partitioned", "save_on_error", "allow_shared", "browser_session", "record_device"),
        ((bool,), "True or False"),
    ),
    **dict.fromkeys(("path", "header_name"), ((str,), "a str")),
    **dict.fromkeys(("cookie_name", "domain", "name", "storable_cookie_name"), ((str, type(None)), "a str or None")),
    **dict.fromkeys(
        ("lifespan", "max_lifespan", "memory_lifespan", *_WAITS),
        ((timedelta,), "a timedelta, such as timedelta(hours=6)"),
    ),
    **dict.fromkeys(("absolute_lifespan", "touch_interval"), ((timedelta, type(None)), "a timedelta or None")),
    "mode": ((SessionMode,), "a SessionMode, such as SessionMode.PERSISTENT"),
    "cookie_mode": ((CookieMode,), "a CookieMode, such as CookieMode.PRIVATE"),
    "map_size": ((int, type(None)), "a number of bytes or None"),
    "max_size": ((int,), "a number of bytes"),
    "max_sessions_per_user": ((int, type(None)), "a number or None"),
    "trusted_proxies": ((int,), "how many proxies stand in front of this server"),
    "directory": ((type(None),), "a Path or None"),
    "key_file": ((type(None),), "a Path or None"),
}


def milliseconds(span: timedelta) -> int:
    """Whole milliseconds, at least 0."""
    return max(0, span // timedelta(milliseconds=1))


def default_name(directory: Path) -> str:
    """A name that is this working directory's own: two applications of one user do not share by accident.

    Raises ConfigError for the root directory, which service managers give to everybody.
    """
    resolved = directory.resolve()
    if resolved == Path(resolved.anchor):
        raise ConfigError(
            f"the store's name is made from the working directory, and {resolved} is everybody's: "
            f"set {PREFIX}NAME (name=) to a name for this application"
        )
    readable = re.sub(r"[^A-Za-z0-9]+", "-", resolved.name).strip("-")[:40] or "app"
    return f"{readable}-{blake2b(os.fsencode(resolved), digest_size=4).hexdigest()}"


def warn_of_unknown_variables() -> None:
    """Log each SHMSESSION_* variable that nothing reads, with the nearest one that something does."""
    known = {item.metadata["variable"] for item in fields(SessionConfig) if item.metadata} | {
        PREFIX + "BACKEND",
        PREFIX + "STORE",
    }
    for variable in sorted(set(os.environ) - known):
        if variable.startswith(PREFIX):
            near = difflib.get_close_matches(variable, known, 1, cutoff=0.85)
            logger.warning("%s is not a setting%s", variable, f": did you mean {near[0]}?" if near else "")


def backend_url() -> str | None:
    """SHMSESSION_BACKEND; None when it is not set."""
    return os.environ.get(PREFIX + "BACKEND")


def _state_directory() -> Path:
    home = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(home) if home.startswith("/") else Path("~/.local/state").expanduser()
    except RuntimeError:
        raise ConfigError(
            f"no Key is configured, and this user has no home directory to keep one in: set {PREFIX}KEY to what "
            f"Key.generate() prints, or {PREFIX}KEY_FILE to a path that only this user can read"
        ) from None
    return base / "shmsession"
