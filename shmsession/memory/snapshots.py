"""What is stored under many handles at one moment, for those who look again and again."""

from collections.abc import Collection
from typing import NamedTuple

from .environment import Environment
from .tables import Tables, Txn


class Stamp(NamedTuple):
    """A state of the memory store: which incarnation of it, and the last transaction."""

    uuid: bytes
    transaction: int


def raws_of(
    environment: Environment, handles: Collection[bytes], since: Stamp | None = None
) -> tuple[Stamp, list[bytes | None] | None]:
    """What is stored under each of these handles, unverified, and a stamp that changes with every commit.

    While the stamp is `since`, nothing has changed: then None, for a microsecond or two. Raises StoreError.
    """

    def work(txn: Txn, tables: Tables) -> tuple[Stamp, list[bytes | None] | None]:
        stamp = Stamp(txn.get(b"uuid", b"", db=tables.meta), txn.id())  # type: ignore[arg-type]
        if stamp == since:
            return stamp, None
        return stamp, [txn.get(handle, db=tables.records) for handle in handles]  # type: ignore[misc]

    return environment.read(work)
