"""What can still be read from a damaged environment, by a process that may die of it.

This file is also that process's program: it imports nothing of the package.
"""

import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import lmdb

TIMEOUT_SECONDS = 120


def records_in(environment: Path) -> Iterator[tuple[bytes, bytes]]:
    """(handle, stored bytes) of every record that a walk over `environment` meets before it ends or crashes.

    When it does not meet all that are said to be there, another one comes from the end: some then come twice.
    """
    for direction in ("forward", "backward"):
        output, ended = _walked(environment, "records", direction)
        yield from _parse(output)
        if ended:
            return


def outbox_in(environment: Path) -> list[tuple[bytes, bytes]] | None:
    """(place, handle) of every row of the outbox, in order; None when not all of it can be read."""
    output, ended = _walked(environment, "outbox", "forward")
    return list(_parse(output)) if ended else None


def _walked(environment: Path, table: str, direction: str) -> tuple[bytes, bool]:
    """What a walk in a process of its own met, and whether it met all."""
    python = _interpreter()
    if python is None:
        return b"", True
    command = [python, "-P", __file__, str(environment), table, direction]
    try:
        done = subprocess.run(  # noqa: S603  # our own file, by this Python
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as expired:
        return expired.stdout or b"", False
    return done.stdout, done.returncode == 0


def _interpreter() -> str | None:
    """The Python that runs this; under an embedding server sys.executable is that server."""
    candidates = [
        sys.executable,
        f"{sysconfig.get_path('scripts')}/python",
        f"{sysconfig.get_config_var('BINDIR')}/python3",
    ]
    return next((path for path in candidates if path and "python" in Path(path).name and Path(path).exists()), None)


def _parse(output: bytes) -> Iterator[tuple[bytes, bytes]]:
    position = 0
    while position + 8 <= len(output):
        key_size = int.from_bytes(output[position : position + 4], "big")
        value_size = int.from_bytes(output[position + 4 : position + 8], "big")
        begin = position + 8
        position = begin + key_size + value_size
        if position <= len(output):
            yield output[begin : begin + key_size], output[begin + key_size : position]


def _walk(environment: str, table: str, direction: str) -> None:  # pragma: no cover  # in the child, it may die of it
    env = lmdb.open(environment, readonly=True, lock=False, max_dbs=8, create=False)
    rows = env.open_db(table.encode(), create=False)
    with env.begin() as txn:
        cursor, left = txn.cursor(rows), txn.stat(rows)["entries"]
        for key, value in cursor if direction == "forward" else cursor.iterprev():
            sys.stdout.buffer.write(len(key).to_bytes(4, "big") + len(value).to_bytes(4, "big") + key + value)
            sys.stdout.buffer.flush()
            left -= 1
    if left:
        raise EOFError("not all rows are where they should be")


if __name__ == "__main__":  # pragma: no cover  # as above
    _walk(*sys.argv[1:])
