"""The store that SHMSESSION_STORE names: for the gunicorn hooks and the command line, which have no application."""

import importlib
import os
from typing import Final

from .errors import ConfigError
from .store import SessionStore

VARIABLE: Final = "SHMSESSION_STORE"


def configured_store(target: str | None = None) -> SessionStore | None:
    """The store that `target`, or else SHMSESSION_STORE, names as module:attribute; None when neither is given.

    Raises ConfigError.
    """
    where = "" if target else f"{VARIABLE}="
    target = target or os.environ.get(VARIABLE)
    if not target:
        return None
    module, _, attribute = target.partition(":")
    try:
        found: object = importlib.import_module(module)
        for name in (attribute or "store").split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}{target}: {error}. Write module:attribute, such as app:store") from error
    if not isinstance(found, SessionStore):
        raise ConfigError(f"{where}{target} is a {type(found).__name__}, not a SessionStore")
    return found
