"""How a session's token and its visitor's consent come with a request and go with a response. No I/O, no clock."""

from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Final, NamedTuple

from . import cookies
from .client import Binding, agent_in, neighbourhood_of
from .config import CookieMode, OldCookie, SessionConfig, SessionMode
from .headers import RawHeaders
from .keyring import Keyring
from .tokens import LONGEST, Form, Ticket, form_of

OPENED: Final = 4096
"""So many opened tokens a process remembers, refused ones included."""
CONSENT_MAX_AGE: Final = timedelta(days=180)
"""How long a visitor's choice is remembered: six months, as data protection authorities advise."""


class Presented(NamedTuple):
    """What a request carries of a session.

    `cookie`: its Cookie header, joined with "; " when there were several. `header`, `consent`: the session's own
    headers, None without them. `peer`, `forwarded`, `agent`: see `Binding.client`.
    """

    cookie: bytes = b""
    header: bytes | None = None
    consent: bytes | None = None
    peer: str = ""
    forwarded: str = ""
    agent: bytes = b""

    def __repr__(self) -> str:
        return f"<Presented by {'header' if self.header is not None else 'cookie'}>"


NOTHING_PRESENTED: Final = Presented()


class _Accepted(NamedTuple):
    """A form of token that is read. `needle`: a cookie's name and the equals sign; `opened` remembers."""

    needle: bytes
    opened: Callable[[bytes, bytes], Ticket | str]
    binding: Binding


class Transport:
    """Reads and writes what belongs to a session in the headers of one configuration."""

    def __init__(self, config: SessionConfig, keyring: Keyring) -> None:
        self.name = config.effective_cookie_name
        self._keyring = keyring
        self._fresh_for = config.max_age // timedelta(milliseconds=1) // 2
        self._by_cookie = config.transport != "header"
        self._header = config.header_name.lower().encode() if config.transport != "cookie" else b""
        self._consent_header = self._header + b"-storable"
        self._proxy_header = config.proxy_header.lower().encode()
        self._binding = Binding(config, config.bind_to)
        self._form = self._form_of(config.cookie_mode, self.name)
        self._header_form = self._form_of(config.cookie_mode, config.header_name.lower(), "header ")
        attributes = config.attributes
        self._cookie = cookies.Writer(self.name, attributes, http_only=config.http_only)
        self._consent_needle = config.effective_storable_cookie_name.encode() + b"="
        self._consent = cookies.Writer(config.effective_storable_cookie_name, attributes, http_only=False)
        self._max_age, self._ends_with_browser = config.max_age, config.browser_session
        self._by_header = _Accepted(b"", lru_cache(OPENED)(self._header_form.open), self._binding)
        self._now = _Accepted(self.name.encode() + b"=", lru_cache(OPENED)(self._form.open), self._binding)
        modes = [config.cookie_mode, *(old.mode for old in config.old_cookies)]
        accepted = [self._now, *(self._accepts(config, old) for old in config.old_cookies)]
        self._accepted = [one for _, one in sorted(zip(modes, accepted, strict=True), key=self._rank)]
        self._old = {
            name.encode() + b"=": _removers(name, config)
            for name in {old.name for old in config.old_cookies}
            if name not in (None, self.name)
        }
        self.is_plain = CookieMode.PLAIN in modes
        """Whether anybody can make up a token that is well formed."""
        self.is_simple = (
            config.transport == "cookie"
            and config.mode is SessionMode.PERSISTENT
            and not (config.bind_to or config.old_cookies)
        )
        """Whether a Cookie header is all that a request can carry."""
        vary = ["Cookie"] if self._by_cookie else []
        if self._header:
            asked = config.mode is not SessionMode.PERSISTENT
            vary += [config.header_name, *([f"{config.header_name}-Storable"] if asked else [])]
        self.vary = ", ".join(vary).encode()

    def _form_of(self, mode: CookieMode, name: str, kind: str = "cookie ") -> Form:
        return form_of(mode, self._keyring, kind + name, self._fresh_for)

    def _accepts(self, config: SessionConfig, old: OldCookie) -> _Accepted:
        name = old.name or self.name
        form = self._form_of(old.mode, name)

        def opened(value: bytes, client: bytes) -> Ticket | str:
            found = form.open(value, client)
            return found if isinstance(found, str) else found._replace(stale_after=0)

        return _Accepted(name.encode() + b"=", lru_cache(OPENED)(opened), Binding(config, old.bind_to))

    def _rank(self, one: tuple[CookieMode, _Accepted]) -> tuple[bool, bool]:
        """Today's name goes before all others, for a browser may keep an old cookie that we cannot take away; plain
        goes last, for it looks like any: what can be told from it is tried before."""
        mode, accepted = one
        return accepted.needle != self._now.needle, mode is CookieMode.PLAIN

    # ── reading ───────────────────────────────────────────────────────────────────────────────────────────────

    def presented(self, header: Callable[[bytes], bytes | None], peer: str) -> Presented:
        """What a request carries. `header` gives one by its lower-case name, joined when there were several."""
        own = header(self._header) if self._header else None
        return Presented(
            (header(b"cookie") or b"") if self._by_cookie else b"",
            own,
            header(self._consent_header) if self._header else None,
            peer,
            (header(self._proxy_header) or b"").decode("latin-1"),
            header(b"user-agent") or b"",
        )

    def device(self, presented: Presented) -> tuple[str, str]:
        """What is kept of whoever logs in: the user agent, and roughly the address; "" for what is unknown."""
        address = self._binding.address(presented.peer, presented.forwarded)
        return agent_in(presented.agent), neighbourhood_of(address)

    def read(self, presented: bytes | Presented) -> Ticket | str | None:
        """The ticket that a request carries, None for none, or a reason code. bytes: a Cookie header."""
        if isinstance(presented, bytes):
            if self.is_simple:
                return self._read_cookie(presented, self._now, b"")
            presented = Presented(presented)
        if presented.header is not None:
            return self._opened(presented.header, self._by_header, presented) if presented.header else None
        first: str | None = None
        for accepted in self._accepted:
            if first is not None and accepted.needle != self._now.needle:
                break  # who has a cookie of today's name is not looked for under another, which anybody may have set
            found = self._read_cookie(presented.cookie, accepted, self._client(accepted, presented))
            if isinstance(found, Ticket):
                return found
            first = first or found
        return first

    def _client(self, accepted: _Accepted, presented: Presented) -> bytes:
        return accepted.binding.client(presented.peer, presented.forwarded, presented.agent)

    def _read_cookie(self, header: bytes, accepted: _Accepted, client: bytes) -> Ticket | str | None:
        value = cookies.find(header, accepted.needle)
        if not isinstance(value, bytes):
            return value
        return accepted.opened(value, client) if len(value) <= LONGEST else "malformed"

    def _opened(self, value: bytes, accepted: _Accepted, presented: Presented) -> Ticket | str:
        return accepted.opened(value, self._client(accepted, presented)) if len(value) <= LONGEST else "malformed"

    def consent(self, presented: Presented) -> bool | None:
        """What the visitor chose before; None for nothing."""
        by_header = self._answers_by_header(presented)
        value = presented.consent if by_header else cookies.find(presented.cookie, self._consent_needle)
        return {b"true": True, b"false": False}.get(value) if isinstance(value, bytes) else None

    # ── writing ───────────────────────────────────────────────────────────────────────────────────────────────

    def value(self, session_id: str, now: int, presented: Presented | None = None) -> str:
        """The token of a session as a cookie's value, issued at `now` milliseconds to whoever presented this."""
        client = self._client(self._now, presented or NOTHING_PRESENTED)
        return self._form.write(session_id, now, client)

    def issue(self, session_id: str, now: int, presented: Presented, *, longterm: bool) -> RawHeaders:
        """The response headers that give the client this session, in the way it asked for it."""
        if self._answers_by_header(presented):
            token = self._header_form.write(session_id, now, self._client(self._by_header, presented))
            return [(self._header, token.encode())]
        max_age = None if self._ends_with_browser and not longterm else self._max_age
        return [_set(self._cookie.issue(self.value(session_id, now, presented), max_age)), *self._expire_old(presented)]

    def expire(self, presented: Presented) -> RawHeaders:
        """The response headers that take the session away."""
        if self._answers_by_header(presented):
            return [(self._header, b"")]
        return [_set(self._cookie.expire()), *self._expire_old(presented)]

    def choose(self, consent: bool, presented: Presented) -> RawHeaders:
        """The response headers that tell the client what it chose."""
        chosen = "true" if consent else "false"
        if self._answers_by_header(presented):
            return [(self._consent_header, chosen.encode())]
        return [_set(self._consent.issue(chosen, CONSENT_MAX_AGE))]

    def _answers_by_header(self, presented: Presented) -> bool:
        return bool(self._header) and (presented.header is not None or not self._by_cookie)

    def _expire_old(self, presented: Presented) -> RawHeaders:
        """Cookies of old names are taken away."""
        return [
            _set(remover)
            for needle, removers in self._old.items()
            if cookies.find(presented.cookie, needle) is not None
            for remover in removers
        ]


def _removers(name: str, config: SessionConfig) -> list[str]:
    """Set-Cookie values that take a cookie of an old name away, wherever it may have been set."""
    today = config.attributes
    before = [today._replace(domain=old.domain, path=old.path) for old in config.old_cookies if old.name == name]
    fitting = dict.fromkeys(one.fitting(name) for one in (today, *before))
    return [cookies.Writer(name, one, http_only=True).expire() for one in fitting]


def _set(cookie: str) -> tuple[bytes, bytes]:
    return b"set-cookie", cookie.encode("latin-1")
