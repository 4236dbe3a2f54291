"""The databases behind the memory store, chosen by URL. A driver is imported when its backend is asked for."""

import re
from importlib import import_module
from typing import Any, Final, NamedTuple, cast

from shmsession.errors import ConfigError

from .base import FOREVER, SENTINEL, Answer, Backend, Mark, Row, State, wins
from .copying import copy

__all__ = ["FOREVER", "SENTINEL", "Answer", "Backend", "Mark", "Row", "State", "connect", "copy", "wins"]


class _Kind(NamedTuple):
    module: str
    name: str
    extra: str = ""


_POSTGRES: Final = _Kind("postgres", "PostgresBackend", "postgres")
_MYSQL: Final = _Kind("mysql", "MySQLBackend", "mysql")
_REDIS: Final = _Kind("redis", "RedisBackend", "redis")
_SURREALDB: Final = _Kind("surrealdb", "SurrealDBBackend", "surrealdb")
_KINDS: Final = {
    "sqlite": _Kind("sqlite", "SQLiteBackend"),
    "postgresql": _POSTGRES,
    "postgres": _POSTGRES,
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "redis": _REDIS,
    "rediss": _REDIS,
    "unix": _REDIS,
    "redis+cluster": _REDIS,
    "rediss+cluster": _REDIS,
    "redis+sentinel": _REDIS,
    "rediss+sentinel": _REDIS,
    "surrealdb+ws": _SURREALDB,
    "surrealdb+wss": _SURREALDB,
    "surrealdb+surrealkv": _SURREALDB,
    "surrealdb+mem": _SURREALDB,
}
_EXAMPLES: Final = (
    "sqlite:///file, postgresql://host/database (or postgres://), mysql://user@host/database (or mariadb://), "
    "redis://host (or rediss://, with TLS), unix:///socket (Redis on a socket), "
    "redis+cluster://host,host2 (or rediss+cluster://), redis+sentinel://host,host2/service (or rediss+sentinel://) "
    "or surrealdb+ws://host/namespace/database (or surrealdb+wss://)"
)


def connect(url: str, **options: Any) -> Backend:
    """The backend that a URL names, with its class's options. Nothing is opened.

    Raises ConfigError for an unknown scheme, a driver that is not installed, and what the class does not accept.
    """
    scheme, separator, _ = url.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]{0,31}", scheme):
        # Not what was written: a password may be in it.
        raise ConfigError(f"the backend is no URL: write {_EXAMPLES}, or none for memory only")
    kind = _KINDS.get(scheme.lower())
    if kind is None:
        raise ConfigError(f"no backend is known for {scheme}://: write {_EXAMPLES}")
    try:
        module = import_module(f"{__name__}.{kind.module}")
    except ImportError as error:
        if not kind.extra or (error.name or "").startswith(__name__):
            raise
        raise ConfigError(
            f"the driver for {scheme}:// cannot be imported ({error}): pip install 'shmsession[{kind.extra}]'"
        ) from error
    return cast("Backend", getattr(module, kind.name)(url, **options))
