"""Making the store so that a wrong setting is one line on the terminal, not a traceback from every worker."""

import sys
from typing import Any

from shmsession import SessionConfig, SessionStore
from shmsession.errors import ConfigError

BOOT_ERROR = 3  # gunicorn and uvicorn stop at this exit status; after any other they start the next worker


def store_or_exit(**settings: Any) -> SessionStore:
    """A store whose every other setting is a SHMSESSION_* variable, the database behind it too."""
    try:
        return SessionStore(config=SessionConfig(**settings))
    except ConfigError as error:
        print(f"shmsession: {error}", file=sys.stderr, flush=True)
        sys.exit(BOOT_ERROR)
