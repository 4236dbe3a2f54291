"""Defaults for the examples; every command-line flag wins over this file.

The WSGI example needs a worker class of its own: ``-k sync`` or ``-k gthread``.
"""

import os
from pathlib import Path

from shmsession.contrib.gunicorn import *

bind = "127.0.0.1:8000"
workers = int(os.environ.get("WEB_CONCURRENCY", "4"))
worker_class = "asgi"
timeout = 60  # a sync worker sleeps through /slow, for up to 30 seconds
control_socket_disable = True  # it would leave a file in the home directory

_memory = Path("/dev/shm")  # noqa: S108 - gunicorn makes and unlinks an anonymous file there
worker_tmp_dir = str(_memory) if _memory.is_dir() else None  # heartbeats must not wait for a disk
