"""How large a test is, with which seed, and what it reached: the suite and `./dev soak` run the same tests."""

import json
import os
import random
from pathlib import Path
from typing import Any

SOAKING = os.environ.get("SOAK") == "1"
BREATH = 0.0 if SOAKING else 0.005
"""Seconds between the requests of a visitor who asks all the time: in the suite other tests run beside."""
SEED = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(2**32))


def size(full: int, suite: int) -> int:
    """The full figure under `./dev soak`, the small one in the suite. SOAK_SCALE multiplies the full one."""
    return max(suite, int(full * float(os.environ.get("SOAK_SCALE", "1")))) if SOAKING else suite


def rng(name: str) -> random.Random:
    """A generator of this run's seed, apart from those of other tests; print SEED when a test fails."""
    return random.Random(f"{SEED}:{name}")


def report(line: str, **figures: Any) -> None:
    """Say what was reached: printed, and added to the soak's table."""
    print(f"{line}: " + ", ".join(f"{name}={value}" for name, value in figures.items()) + f" (seed {SEED})")
    target = os.environ.get("SOAK_REPORT")
    if target:
        with Path(target).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"line": line, "seed": SEED, **figures}) + "\n")
