"""The sessions of one database put into another."""

import asyncio
from typing import Final

from .base import Backend, Row

BATCH: Final = 500
AT_ONCE: Final = 32
"""How many rows are asked for at a time; a backend that takes fewer questions lets the others wait."""


async def copy(source: Backend, target: Backend) -> int:
    """Write every session of `source` to `target`, where a newer one, or a dead one, stays; how many were written.

    Both are open, and `target` is initialized. Rows are passed on as they are, sealed bodies too. What changes in
    `source` meanwhile may be missing, or be copied as it was. Raises BackendError; it may be called again then.
    """
    written, handles = 0, [handle async for handle in source.handles()]
    for begin in range(0, len(handles), BATCH):
        rows = await _loaded(source, handles[begin : begin + BATCH])
        written += sum(answer.applied for answer in await target.write(rows))
    return written


async def _loaded(source: Backend, handles: list[bytes]) -> list[Row]:
    """The rows that are still there; a dead one, too."""
    rows: list[Row] = []
    for begin in range(0, len(handles), AT_ONCE):
        found = await asyncio.gather(*map(source.load, handles[begin : begin + AT_ONCE]))
        rows += (row for row in found if row is not None)
    return rows
