"""Requests by command: in the test's own process, or run as a script and driven over a pipe."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shmsession.errors import SessionGone
from shmsession.keyring import Key
from shmsession.testing import make_store

if TYPE_CHECKING:
    from shmsession.session import Session
    from shmsession.store import SessionStore

KEY = Key(b"w" * 32)
GONE = "gone"


class Slots:
    """Several requests that are under way in one process, by number."""

    def __init__(self) -> None:
        self.store: SessionStore | None = None
        self.sessions: dict[int, Session] = {}

    def start(self, directory: str) -> None:
        self.stop()
        self.store = make_store(Path(directory), map_size=1 << 20, keys=(KEY,))

    def stop(self) -> None:
        self.sessions.clear()
        if self.store is not None:
            self.store.close()
            self.store = None

    def open(self, slot: int, cookie: bytes) -> None:
        assert self.store is not None
        session = self.sessions[slot] = self.store.request_session(lambda: cookie)
        len(session)

    def get(self, slot: int, key: str) -> Any:
        return self.sessions[slot].get(key)

    def view(self, slot: int) -> dict[str, Any]:
        return dict(self.sessions[slot])

    def keys(self, slot: int) -> set[str]:
        return set(self.sessions[slot])

    def known(self, slot: int) -> tuple[str | None, Any, bool]:
        session = self.sessions[slot]
        return session.handle if session.exists else None, session.user_id, session.gone

    def assign(self, slot: int, key: str, value: Any) -> None:
        self.sessions[slot][key] = value

    def delete(self, slot: int, key: str) -> None:
        del self.sessions[slot][key]

    def append(self, slot: int, key: str, item: Any) -> None:
        self.sessions[slot][key].append(item)

    def clear(self, slot: int) -> None:
        self.sessions[slot].clear()

    def renew(self, slot: int, user: str | None) -> None:
        if user is None:
            self.sessions[slot].renew()
        else:
            self.sessions[slot].renew(user_id=user)

    def destroy(self, slot: int) -> None:
        self.sessions[slot].destroy()

    def increment(self, slot: int, key: str) -> Any:
        try:
            return self.sessions[slot].increment(key)
        except SessionGone:
            return GONE

    def save(self, slot: int) -> str | None:
        try:
            self.sessions[slot].save()
        except SessionGone:
            return GONE
        return None

    def commit(self, slot: int, failed: bool) -> tuple[str | None, str | None]:
        """The Set-Cookie of the response, and the handle of the session as it is then."""
        assert self.store is not None
        session = self.sessions[slot]
        outcome = self.store.commit(session, failed=failed)
        session.headers_sent = True
        assert self.store.commit(session).set_cookie is None
        handle = self.known(slot)[0]
        del self.sessions[slot]
        return outcome.set_cookie, handle

    def sweep(self) -> None:
        assert self.store is not None
        self.store.cleanup()


def main() -> None:
    """Obey commands (name, arguments) from stdin; answer each on stdout."""
    slots, source, target = Slots(), sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            name, arguments = pickle.load(source)
        except EOFError:
            slots.stop()
            return
        try:
            answer: tuple[bool, Any] = (True, getattr(slots, name)(*arguments))
        except Exception as error:  # noqa: BLE001 - told to the test, which fails with it
            answer = (False, repr(error))
        pickle.dump(answer, target)
        target.flush()


if __name__ == "__main__":
    main()
