"""Sessions shared by all worker processes of a host, in memory that they map."""

import sys

if sys.platform == "win32":  # pragma: no cover
    raise ImportError("shmsession needs Linux or macOS: shared memory and file locks work differently on Windows")

from .codec import register_type
from .config import CookieMode, OldCookie, SessionConfig, SessionMode
from .errors import ShmSessionError
from .keyring import Key
from .session import Session
from .store import SessionStore
from .users import SessionInfo

__version__ = "0.1.0"
__all__ = [
    "CookieMode",
    "Key",
    "OldCookie",
    "Session",
    "SessionConfig",
    "SessionInfo",
    "SessionMode",
    "SessionStore",
    "ShmSessionError",
    "register_type",
]
