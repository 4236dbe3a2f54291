"""G1: a commit is seen by every worker before the client sees the response, on every kind of server."""

import pytest

from tests.figures import report, rng, size
from tests.servers import KINDS, ON_GUNICORN, Kind, Running

pytest_plugins = ["tests.hosts"]

CASES = [*((kind, False) for kind in KINDS), *((kind, True) for kind in ON_GUNICORN)]


@pytest.mark.soak
@pytest.mark.parametrize(("kind", "preload"), CASES, ids=[f"{kind}{'-preload' * preload}" for kind, preload in CASES])
def test_each_request_sees_the_commit_of_the_one_before_it_in_another_worker(
    running: Running, kind: Kind, preload: bool
) -> None:
    total, random = size(10_000, 400), rng(f"visible {kind} {preload}")
    server = running(kind, preload=preload)
    owner = server.browser()
    owner.post("/create")
    with server.desks(owner.cookies) as desks:
        last = 0
        for number in range(1, total + 1):
            last = random.choice([pid for pid in desks if pid != last])
            answer = desks[last]("GET", "/visit")
            assert answer.pid == last
            assert answer.json["visits"] == number, f"a commit was not seen, after {number} requests"
    report(f"G1 {kind}{' preload' * preload}", alternating_requests=total, workers=server.workers, missed=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_one_worker_wrote_is_what_all_others_read(running: Running, kind: Kind) -> None:
    server, random = running(kind), rng(f"written {kind}")
    owner = server.browser()
    owner.post("/create")
    with server.desks(owner.cookies) as desks:
        for writer in desks:
            value = str(random.getrandbits(64))
            desks[writer]("POST", f"/set/key/{value}")
            for reader in desks:
                answer = desks[reader]("GET", "/session")
                assert (answer.pid, answer.json) == (reader, {"key": value})
