"""G3 over HTTP: what was destroyed or renewed stays dead, however slow the requests that still hold it."""

import time

import pytest

from tests.figures import report, size
from tests.servers import ASGI, GTHREAD, PATIENCE, UVICORN, UVICORN_WORKER, Browser, Kind, Running

pytest_plugins = ["tests.hosts"]

CONCURRENT = [GTHREAD, ASGI, UVICORN_WORKER, UVICORN]  # a sync worker serves nobody beside a slow request
BATCH = 10


@pytest.mark.soak
@pytest.mark.parametrize("kind", CONCURRENT, ids=str)
def test_a_logout_is_not_undone_by_a_slow_request_that_read_the_session_before(running: Running, kind: Kind) -> None:
    wanted, races = size(200, 20), 0
    deadline = time.monotonic() + PATIENCE * max(1, wanted // 20)
    while races < wanted:
        assert time.monotonic() < deadline, f"only {races} slow requests were overtaken by a logout"
        races += batch([running(kind).browser() for _ in range(3 if kind is GTHREAD else BATCH)])  # 4 threads a worker
    report(f"G3 /slow-logout-race {kind}", races=races, came_back=0)


def batch(browsers: list[Browser]) -> int:
    """Let each browser log out while a slow request of its own is on its way; returns how many were overtaken."""
    for number, browser in enumerate(browsers):
        browser.post(f"/login/u{number}")
    old = [Browser(browser.address, browser.cookies) for browser in browsers]
    slow = [browser.begin("POST", "/slow-logout-race?seconds=0.2") for browser in browsers]
    overtaken = []
    for browser, pending in zip(browsers, slow, strict=True):
        assert browser.post("/logout").status == 200
        overtaken.append(not pending.is_answered)
    for index, pending in enumerate(slow):
        answer = pending.answer()
        assert (answer.status, answer.json["key"], answer.json["value"]) == (200, "late", "1")
        assert answer.all("set-cookie") == []
        assert old[index].get("/session").json == {}
        assert old[index].get("/whoami").json["user"] is None
    return sum(overtaken)


@pytest.mark.parametrize("kind", CONCURRENT, ids=str)
def test_a_login_cookie_is_never_overwritten_by_a_slow_request_of_the_old_id(running: Running, kind: Kind) -> None:
    for number in range(BATCH):
        browser = running(kind).browser()
        browser.post("/set/cart/tea")
        old = browser.cookies["session"]
        slow = browser.begin("POST", "/slow-logout-race?seconds=0.1")
        browser.post(f"/login/u{number}")
        assert browser.cookies["session"] != old
        answer = slow.answer()
        assert answer.status == 200
        assert answer.all("set-cookie") == []
        assert browser.get("/session").json in (
            {"cart": "tea", "user": f"u{number}"},
            {"cart": "tea", "user": f"u{number}", "late": "1"},  # it was done before the login
        )
        assert Browser(browser.address, {"session": old}).get("/session").json == {}


@pytest.mark.parametrize("kind", CONCURRENT, ids=str)
def test_counting_with_the_id_of_a_session_that_just_ended_counts_nothing(running: Running, kind: Kind) -> None:
    """It is answered, stored nowhere, and sets no cookie: a login may have set one meanwhile."""
    browser = running(kind).browser()
    browser.get("/hit")
    other = running(kind).browser(browser.cookies)
    browser.post("/logout")
    for _ in range(2):
        answer = other.get("/hit")
        assert (answer.status, answer.json["hits"]) == (200, 1)
        assert answer.all("set-cookie") == []
