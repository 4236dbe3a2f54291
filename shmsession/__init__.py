"""Sessions shared by all worker processes of a host, in memory that they map."""

from .codec import register_type
from .config import CookieMode, SessionConfig, SessionMode
from .errors import ShmSessionError
from .keyring import Key
from .session import Session
from .store import SessionStore

__version__ = "0.1.0"
__all__ = [
    "CookieMode",
    "Key",
    "Session",
    "SessionConfig",
    "SessionMode",
    "SessionStore",
    "ShmSessionError",
    "register_type",
]
