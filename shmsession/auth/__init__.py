"""Logins: the user of a request, what they may do, and forms that nobody else can send."""

from .config import AuthConfig
from .main import Auth
from .requiring import Requirement
from .rights import Rights
from .standing import AuthSession, LoginStatus, SyncAuthSession

__all__ = ["Auth", "AuthConfig", "AuthSession", "LoginStatus", "Requirement", "Rights", "SyncAuthSession"]
