"""A proxy between a flusher and its database that does to connections what networks do to them."""

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from random import Random
from typing import Final, Self

HARMS: Final = ("drops the reply", "cuts the request", "half-closes", "delays", "cuts the reply")
CHUNK: Final = 1 << 16

Address = Path | int
"""A unix socket, or a TCP port of this host."""


class Proxy:
    """Passes on what comes to each address to its target; with probability `harm` a chunk meets a mishap."""

    def __init__(self, targets: Mapping[Address, Address], random: Random) -> None:
        self.harm = 0.0
        self.done = dict.fromkeys(HARMS, 0)
        self._random = random
        self._deciding = threading.Lock()
        self._listeners: list[socket.socket] = []
        self._accepting: list[threading.Thread] = []
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        for address, target in targets.items():
            listener, name = _socket(address)
            listener.bind(name)
            if isinstance(address, Path):
                address.chmod(0o777)
            listener.listen(64)
            self._listeners.append(listener)
            self._accepting.append(threading.Thread(target=self._accept, args=(listener, target)))

    def __enter__(self) -> Self:
        for thread in self._accepting:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for listener, thread in zip(self._listeners, self._accepting, strict=True):
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            listener.close()
        for open_socket in list(self._sockets):
            self._end(open_socket)
        for thread in self._threads:
            thread.join()

    def _accept(self, listener: socket.socket, target: Address) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            server, name = _socket(target)
            try:
                server.connect(name)
            except OSError:
                client.close()
                server.close()
                continue
            self._sockets |= {client, server}
            for source, sink, harms in ((client, server, HARMS[:3]), (server, client, HARMS[3:])):
                thread = threading.Thread(target=self._pass_on, args=(source, sink, harms))
                self._threads.append(thread)
                thread.start()

    def _choose(self, harms: tuple[str, ...]) -> str:
        with self._deciding:
            if self._random.random() >= self.harm:
                return ""
            chosen = self._random.choice(harms)
            self.done[chosen] += 1
            return chosen

    def _pass_on(self, source: socket.socket, sink: socket.socket, harms: tuple[str, ...]) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK):
                harm = self._choose(harms)
                if harm in ("cuts the request", "cuts the reply"):
                    sink.sendall(chunk[: len(chunk) // 2])
                    break
                if harm == "delays":
                    time.sleep(0.2)  # that is the harm
                sink.sendall(chunk)
                if harm == "drops the reply":  # the server has it, and nobody will hear of it
                    self._end(source)
                    time.sleep(0.05)
                    break
                if harm == "half-closes":
                    sink.shutdown(socket.SHUT_WR)
                    break
        for end in (source, sink):
            self._end(end)
            end.close()

    def _end(self, open_socket: socket.socket) -> None:
        with contextlib.suppress(OSError):
            open_socket.shutdown(socket.SHUT_RDWR)


def _socket(address: Address) -> tuple[socket.socket, str | tuple[str, int]]:
    """A new one of its family, and what the family calls it."""
    if isinstance(address, Path):
        return socket.socket(socket.AF_UNIX), str(address)
    return socket.socket(socket.AF_INET), ("127.0.0.1", address)
