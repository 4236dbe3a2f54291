"""What time it is: wall clock for expiry, CLOCK_BOOTTIME for intervals. Both are injectable."""

import time
from typing import Protocol

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Two clocks, in milliseconds."""

    def now(self) -> int:
        """Wall clock, milliseconds since 1970. It may step in either direction."""
        ...

    def boot(self) -> int:
        """Milliseconds since the machine started, suspension included. It never steps."""
        ...


class SystemClock:
    """The operating system's clocks. Where CLOCK_BOOTTIME is missing (macOS), CLOCK_MONOTONIC stands in."""

    def now(self) -> int:
        """See `Clock.now`."""
        return int(time.time() * 1000)

    def boot(self) -> int:
        """See `Clock.boot`."""
        return int(time.clock_gettime(_BOOTTIME) * 1000)
