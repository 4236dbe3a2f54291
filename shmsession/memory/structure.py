"""What `lmdb.verify` leaves open and its writers rely on: nodes of a page lie side by side, and metas take turns.

Deleting a node moves the others by the size that it claims; one that claims a wrong size makes LMDB overwrite its own
memory. Only for files that `verify` has passed: pages, offsets and the tree itself are taken for sound here.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_MAGIC: Final = 0xBEEFC0DE
_PAGE_HEADER: Final = 16
"""In files of LMDB 0.9, which py-lmdb makes by default. Files of 1.0 have 24, and are not looked at."""

_BRANCH: Final = 0x01
_LEAF2: Final = 0x20
_BIG: Final = 0x01
_SUBTREE: Final = 0x02
_NO_PAGE: Final = 2**64 - 1
_FREE_LIST_FLAGS: Final = 0x08
"""Its keys are integers. No table has a flag: another kind of tree makes LMDB's writers abort the process."""

_META = struct.Struct("=II16x")
_DB = struct.Struct("=IHHQQQQQ")
_METAS: Final = _PAGE_HEADER + _META.size
"""Where in a meta page the free list, the tree of tables, the last page and the transaction begin."""
_TRANSACTION = struct.Struct("=Q")
_NODE = struct.Struct("=HHHH")


class _Node(NamedTuple):
    begin: int
    end: int
    leads_to: int | None
    flags: int = 0
    """Those of the table that it leads to."""


def problem_in(data: Path) -> str | None:
    """Which page has nodes that overlap or leave gaps; None when all is well."""
    descriptor = os.open(data, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = os.pread(descriptor, 4096, 0)
        if _META.unpack_from(head, _PAGE_HEADER)[0] != _MAGIC:
            return None
        page_size: int = _DB.unpack_from(head, _METAS)[0]
        metas = [head, os.pread(descriptor, 4096, page_size)]
        first, second = (_TRANSACTION.unpack_from(meta, _METAS + 2 * _DB.size + 8)[0] for meta in metas)
        # They take turns. One out of turn makes LMDB's writers begin with the other one's tree.
        if first % 2 or (second and not second % 2) or abs(first - second) > 1:
            return "its two metas are not those of the last two transactions"
        newest = metas[second > first]
        databases = [_DB.unpack_from(newest, _METAS + offset) for offset in (0, _DB.size)]
        if [database[1] for database in databases] != [_FREE_LIST_FLAGS, 0]:
            return "the trees are not of the kind that they are"
        return _walk(descriptor, page_size, [database[-1] for database in databases])
    finally:
        os.close(descriptor)


def _walk(descriptor: int, page_size: int, roots: list[int]) -> str | None:
    waiting = [root for root in roots if root != _NO_PAGE]
    while waiting:
        number = waiting.pop()
        page = os.pread(descriptor, page_size, number * page_size)
        flags, lower, upper = struct.unpack_from("=HHH", page, 10)
        if flags & _LEAF2 or lower % 2:
            return f"page {number} is of a kind that no table here has"
        position = upper
        for node in sorted(_nodes(page, lower, branch=bool(flags & _BRANCH))):
            if node.begin != position:
                return f"the nodes of page {number} do not lie side by side"
            position = node.end
            if node.flags:
                return f"a table in page {number} is not of the kind that it is"
            if node.leads_to is not None and node.leads_to != _NO_PAGE:
                waiting.append(node.leads_to)
        if position != page_size:
            return f"the nodes of page {number} do not fill it"
    return None


def _nodes(page: bytes, lower: int, *, branch: bool) -> Iterator[_Node]:
    for (begin,) in struct.iter_unpack("=H", page[_PAGE_HEADER:lower]):
        low, high, flags, key_size = _NODE.unpack_from(page, begin)
        size, leads_to, table_flags = _NODE.size + key_size, None, 0
        if branch:
            leads_to = low | high << 16 | flags << 32
        elif flags & _BIG:
            size += 8
        else:
            if flags & _SUBTREE:
                table = _DB.unpack_from(page, begin + size)
                table_flags, leads_to = table[1], table[-1]
            size += low | high << 16
        yield _Node(begin, begin + size + size % 2, leads_to, table_flags)
