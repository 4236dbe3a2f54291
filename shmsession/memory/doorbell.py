"""A hint across processes that somebody waits for a flush: a POSIX semaphore. Without it the flusher looks later."""

import os
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

from shmsession import _native

try:
    import posix_ipc
except ImportError:  # no wheel for this platform: polling
    posix_ipc = None


_MANY: Final = 64
"""No ringer leaves so many rings: such a bell would ring for ever, and is replaced."""


class Doorbell:
    """The bell of the store in `path`, for any process of this user. Nothing ever fails; at worst it is not heard.

    Whoever rings or waits opens it anew, so that a bell that was removed, or left by the dead, is soon replaced.
    """

    def __init__(self, path: Path) -> None:
        digest = blake2b(os.fsencode(path), digest_size=8, person=b"shmsession bell").hexdigest()
        self._name = f"/shmsession-{os.geteuid()}-{digest}"

    @property
    def works(self) -> bool:
        """Whether this system has bells that can be waited for with an end."""
        return posix_ipc is not None and bool(posix_ipc.SEMAPHORE_TIMEOUT_SUPPORTED)

    def _open(self) -> Any:
        return posix_ipc.Semaphore(self._name, posix_ipc.O_CREAT, mode=0o600)

    def ring(self) -> None:
        """Wake whoever waits, or the next that does."""
        if not self.works:
            return
        try:
            semaphore = self._open()
            if semaphore.value == 0:
                semaphore.release()
            semaphore.close()
        except (posix_ipc.Error, OSError):
            return

    def wait(self, seconds: float) -> bool:
        """Whether it rang within `seconds`. Blocks the thread."""
        try:
            semaphore = self._open()
        except (posix_ipc.Error, OSError):
            _native.sleep(seconds)
            return False
        try:
            semaphore.acquire(seconds)
            if semaphore.value > _MANY:
                self.remove()
        except (posix_ipc.Error, OSError):
            return False
        else:
            return True
        finally:
            semaphore.close()

    def remove(self) -> None:
        """Remove it from the system; whoever needs it, or waits for it now, makes a new one."""
        if posix_ipc is not None:
            try:
                semaphore = posix_ipc.Semaphore(self._name)
                semaphore.unlink()
                semaphore.release()  # after it lost its name: who wakes finds the next one
                semaphore.close()
            except (posix_ipc.Error, OSError):
                return
