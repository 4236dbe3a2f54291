"""G2 over HTTP: no update is lost among 64 clients that share one cookie and four workers."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest

from tests.figures import report, size
from tests.servers import KINDS, Answer, Browser, Kind, Running

pytest_plugins = ["tests.hosts"]

CLIENTS = 64


def at_once(browser: Browser, total: int, send: Callable[[Browser, int], Answer]) -> list[Answer]:
    """The answers of `total` requests that 64 clients with the same cookie send as fast as they can."""
    numbers = count()  # next() of it is atomic

    def client(_: int) -> list[Answer]:
        own, answers = Browser(browser.address, browser.cookies), []
        while (number := next(numbers)) < total:
            answers.append(send(own, number))
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [answer for found in pool.map(client, range(CLIENTS)) for answer in found]
    assert {answer.status for answer in answers} == {200}
    assert not any(answer.all("set-cookie") for answer in answers)
    return answers


def pids(answers: Iterable[Answer]) -> int:
    return len({answer.pid for answer in answers})


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_increments_are_exact_and_each_number_is_handed_out_once(running: Running, kind: Kind) -> None:
    total = size(10_000, 2_000)
    browser = running(kind).browser()
    browser.post("/create")
    answers = at_once(browser, total, lambda client, _: client.get("/hit"))
    assert browser.get("/session").json == {"hits": total}
    assert sorted(answer.json["hits"] for answer in answers) == list(range(1, total + 1))
    assert pids(answers) > 1
    report(f"G2 /hit {kind}", hits=total, clients=CLIENTS, lost=0)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_requests_that_set_different_keys_all_survive(running: Running, kind: Kind) -> None:
    total = size(1_000, 200)
    browser = running(kind).browser()
    browser.post("/create")
    answers = at_once(browser, total, lambda client, number: client.post(f"/set/k{number}/{number}"))
    assert browser.get("/session").json == {f"k{number}": str(number) for number in range(total)}
    assert pids(answers) > 1
    report(f"G2 /set {kind}", keys=total, clients=CLIENTS, lost=0)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_apply_loses_no_item_of_a_list_and_doubles_none(running: Running, kind: Kind) -> None:
    total = size(1_000, 200)
    browser = running(kind).browser()
    browser.post("/create")
    answers = at_once(browser, total, lambda client, number: client.post(f"/append/i{number}"))
    cart = browser.get("/session").json["cart"]
    assert sorted(cart) == sorted(f"i{number}" for number in range(total))
    assert pids(answers) > 1
    report(f"G2 /append {kind}", items=total, clients=CLIENTS, lost=0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_slow_request_overwrites_no_key_but_its_own(running: Running, kind: Kind) -> None:
    browser = running(kind).browser()
    browser.post("/set/kept/before")
    slow = browser.begin("POST", "/slow/own/1?seconds=0.2")
    browser.post("/set/kept/after")
    browser.get("/hit")
    assert slow.answer().json["value"] == "1"
    assert browser.get("/session").json == {"kept": "after", "hits": 1, "own": "1"}
