"""Settings of logins, checked when they are made."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from shmsession.codec import encode
from shmsession.errors import CodecError, ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """How users are remembered, and who a visitor is whom nobody has logged in. Raises ConfigError.

    max_age: how long a loaded user serves this process before it is loaded again; zero: each request loads it.
    cache_size: so many users a process remembers, those that were asked for last.
    anonymous_user_id: the user that stands for visitors who are not logged in; None: there is none.
    """

    max_age: timedelta = timedelta(minutes=1)
    cache_size: int = 1000
    anonymous_user_id: Any = None

    def __post_init__(self) -> None:
        max_age: object = self.max_age
        if not isinstance(max_age, timedelta) or max_age < timedelta(0):
            raise ConfigError(f"max_age={max_age!r}: write a timedelta; timedelta(0) remembers no user")
        cache_size: object = self.cache_size
        if not isinstance(cache_size, int) or cache_size < 1:
            raise ConfigError(f"cache_size={cache_size!r}: write 1 or more; max_age=timedelta(0) remembers no user")
        try:
            encode(self.anonymous_user_id, "anonymous_user_id")
        except CodecError as error:
            raise ConfigError(f"anonymous_user_id: {error}") from error
