"""A real database where tests expect one in a dict: its calls pause and fail on command, but what they do is real."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping, MutableMapping, Sequence
from itertools import count
from typing import Any, Final, NoReturn, TypeVar

from shmsession.backends import Answer, Backend, Row, connect
from tests.backends import MemoryBackend

T = TypeVar("T")

PATIENCE: Final = 60.0


class Loop:
    """An event loop in a thread of its own, for code that has none and is driven by hand."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def ask(self, question: Coroutine[Any, Any, T]) -> T:
        """Its answer."""
        return asyncio.run_coroutine_threadsafe(question, self._loop).result(PATIENCE)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Rows(MutableMapping[bytes, Row]):
    """The rows that a database shows of all that were ever written there: not what is erased."""

    def __init__(self, loop: Loop, backend: Backend) -> None:
        self._loop, self.backend = loop, backend
        self._handles: set[bytes] = set()

    def put(self, rows: Sequence[Row]) -> list[Answer]:
        """Write them."""
        self._handles.update(row.handle for row in rows)
        return self._loop.ask(self.backend.write(rows))

    def __getitem__(self, handle: bytes) -> Row:
        row = self._loop.ask(self.backend.load(handle))
        if row is None:
            raise KeyError(handle)
        return row

    def __iter__(self) -> Iterator[bytes]:
        return (handle for handle in self._handles if self._loop.ask(self.backend.load(handle)) is not None)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __setitem__(self, handle: bytes, row: Row) -> NoReturn:
        raise NotImplementedError("a database decides itself what it keeps: write it")

    def __delitem__(self, handle: bytes) -> NoReturn:
        raise NotImplementedError("a database deletes what is past its horizon, and nothing else")


class RealBackend(MemoryBackend):
    """`url(name)` leads to tables of this name in an empty database; what is lost is lost by going on with others."""

    rows: _Rows

    def __init__(self, url: Callable[[str], str]) -> None:
        super().__init__()
        self._url, self._names, self._loop = url, count(), Loop()
        self.rows = self._empty()

    def _empty(self) -> _Rows:
        async def opened() -> Backend:
            backend = connect(self._url(f"t{next(self._names)}"))
            await backend.open()
            await backend.initialize()
            return backend

        return _Rows(self._loop, self._loop.ask(opened()))

    @property
    def _real(self) -> Backend:
        return self.rows.backend

    def end(self) -> None:
        """Close the connections. (`close` is a call that tests can make fail.)"""
        self._loop.ask(self._real.close())
        self._loop.close()

    def forget(self, *, restart: bool = False) -> None:
        """See MemoryBackend."""
        self.restore({}, restart=restart)

    def restore(self, snapshot: Mapping[bytes, Row], *, restart: bool = False) -> None:
        """See MemoryBackend."""
        self._loop.ask(self._real.close())
        self.rows = self._empty()
        if snapshot:
            self.rows.put(list(snapshot.values()))
        self._lives += restart

    def _put_all(self, rows: Sequence[Row]) -> list[Answer]:
        before = [self.rows.get(row.handle) for row in rows] if self.watch else []
        answers = self.rows.put(rows)
        if self.watch:
            for row, old in zip(rows, before, strict=True):
                self.watch(old, self.rows.get(row.handle, row))
        return answers

    def _live(self) -> list[Row]:
        async def live() -> list[Row]:
            found = [await self._real.load(handle) async for handle in self._real.handles()]
            return [row for row in found if row is not None]

        return self._loop.ask(live())

    async def sweep(self, now: int, limit: int) -> int:
        """See Backend."""
        return await self._called("sweep", lambda _: self._loop.ask(self._real.sweep(now, limit)))

    async def sessions_of(self, user: bytes) -> list[Row]:
        """See Backend."""
        return await self._called("sessions_of", lambda _: self._loop.ask(self._real.sessions_of(user)))

    async def clear(self) -> int:
        """See Backend."""
        return await self._called("clear", lambda _: self._loop.ask(self._real.clear()))
