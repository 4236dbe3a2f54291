"""A backend of several servers: one is replaced, lacks what it had acknowledged, and the sentinel is on another one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from shmsession.backends import SENTINEL, State
from shmsession.errors import BackendUnavailable
from shmsession.flusher import HEARTBEAT_MS
from tests.backends import Host, MemoryBackend, pause, run
from tests.memory import handle, waiting

A, B, C = map(handle, (1, 2, 3))


class Replicated(MemoryBackend):
    """It says with which history it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = b"one"
        self.down = False

    async def history(self) -> bytes:
        await pause("history")
        if self.down:
            raise BackendUnavailable("it cannot be asked")
        return self.now

    def fail_over(self, *lost: bytes, to: bytes = b"two") -> None:
        """The server with these rows is replaced by one that lacks them. The sentinel is on another one."""
        for key in lost:
            del self.rows[key]
        self.now = to


@pytest.fixture
def backend() -> Replicated:
    return Replicated()


@pytest.fixture
def host(place: Path, backend: Replicated) -> Iterator[Host]:
    with Host(place, backend) as host:
        yield host


@pytest.mark.parametrize("contact", ["batch", "heartbeat", "another flusher"])
def test_what_a_server_took_with_it_is_sent_again(host: Host, backend: Replicated, contact: str) -> None:
    flusher = host.flusher()
    for n in range(1, 120):
        host.create(handle(n), n=n)
    host.destroy(B)
    host.flush(flusher)
    known = host.memory.outbox.losses()
    backend.fail_over(A, B)
    if contact == "batch":
        host.update(C, n="later")
    elif contact == "heartbeat":
        host.clock.advance(HEARTBEAT_MS / 1000)
    else:
        flusher = host.flusher()
    run(flusher.round())
    assert host.memory.outbox.losses() > known
    host.flush(flusher)
    host.agrees()
    assert backend.state(A) is State.LIVE
    assert backend.state(B) is State.DEAD


def test_a_batch_during_which_a_server_was_replaced_is_sent_again(host: Host, backend: Replicated) -> None:
    """What it acknowledged may be what its successor lacks."""
    host.create(A)
    flusher = host.flusher()
    host.flush(flusher)
    host.create(B)
    sending = host.sending(B, flusher).until("history")
    backend.fail_over(B)
    sending.finish()
    assert waiting(host.memory) == [B]
    host.flush(flusher)
    host.agrees()


def test_a_batch_whose_history_cannot_be_asked_for_waits_on(host: Host, backend: Replicated) -> None:
    host.create(A)
    flusher = host.flusher()
    sending = host.sending(A, flusher)
    backend.down = True
    with pytest.raises(BackendUnavailable):
        sending.finish()
    assert waiting(host.memory) == [A]
    backend.down = False
    backend.fail_over(A)
    host.flush(flusher)
    host.agrees()


def test_the_same_history_loses_nothing_and_one_that_cannot_be_told_says_nothing(
    host: Host, backend: Replicated
) -> None:
    flusher = host.flusher()
    host.create(A)
    host.flush(flusher)
    known, sent = host.memory.outbox.losses(), len(backend.sent)
    for told in (b"one", b"", b"one"):
        backend.now = told
        host.flush(host.flusher())
    assert host.memory.outbox.losses() == known
    assert all(row.handle == SENTINEL for batch in backend.sent[sent:] for row in batch)


def test_stores_that_share_a_backend_do_not_ask(host: Host, backend: Replicated) -> None:
    """They are told nothing of what it lost, in whatever way."""
    flusher = host.flusher(shared=True)
    host.create(A)
    backend.down = True
    host.flush(flusher)
    assert backend.state(A) is State.LIVE
