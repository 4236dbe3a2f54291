"""A proxy between a flusher and its database that does to connections what networks do to them."""

import contextlib
import socket
import threading
import time
from pathlib import Path
from random import Random
from typing import Final, Self

HARMS: Final = ("drops the reply", "cuts the request", "half-closes", "delays", "cuts the reply")
CHUNK: Final = 1 << 16


class Proxy:
    """Listens on the unix socket `path` and passes on to `target`; with probability `harm` a chunk meets a mishap."""

    def __init__(self, path: Path, target: str, random: Random) -> None:
        self.harm = 0.0
        self.done = dict.fromkeys(HARMS, 0)
        self._target = target
        self._random = random
        self._deciding = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o777)
        self._listener.listen(64)
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for open_socket in list(self._sockets):
            self._end(open_socket)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            try:
                server.connect(self._target)
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
