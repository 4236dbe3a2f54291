"""The sessions of one database put into another."""

import asyncio
from typing import Final

from .base import Backend, Row

BATCH: Final = 500
BATCH_BYTES: Final = 1 << 20
"""So many rows are written at once, or fewer of about so many bytes: a slow connection must carry them in time."""
AT_ONCE: Final = 32
"""How many rows are asked for at a time; a backend that takes fewer questions lets the others wait."""


async def copy(source: Backend, target: Backend) -> int:
    """Write every session of `source` to `target`, where a newer one, or a dead one, stays; how many were written.

    Both are open, and `target` is initialized. Rows are passed on as they are, sealed bodies too. What changes in
    `source` meanwhile may be missing, or be copied as it was. Raises BackendError; it may be called again then.
    """
    written, handles = 0, [handle async for handle in source.handles()]
    batch: list[Row] = []
    size = 0
    for begin in range(0, len(handles), AT_ONCE):
        for row in await asyncio.gather(*map(source.load, handles[begin : begin + AT_ONCE])):
            if row is None:
                continue
            if batch and (len(batch) == BATCH or size + len(row.body) > BATCH_BYTES):
                written += await _write(target, batch)
                batch, size = [], 0
            batch.append(row)
            size += len(row.body)
    return written + await _write(target, batch)


async def _write(target: Backend, rows: list[Row]) -> int:
    return sum(answer.applied for answer in await target.write(rows))
