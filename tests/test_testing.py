"""What `shmsession.testing` gives to the tests of applications."""

from pathlib import Path

import flask
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from shmsession import Session, SessionStore
from shmsession.asgi import SessionMiddleware
from shmsession.testing import SMALL_MAP, ManualClock, login_cookie, make_store
from shmsession.wsgi import SessionMiddleware as WSGISessionMiddleware
from tests.servers import PACKAGE

pytest_plugins = ["pytester"]


async def show(request: Request) -> Response:
    session = Session.of(request)
    return JSONResponse({**session, "who": session.user_id})


def starlette_client(store: SessionStore) -> TestClient:
    return TestClient(Starlette(routes=[Route("/", show)], middleware=[Middleware(SessionMiddleware, store=store)]))


def flask_app(store: SessionStore) -> flask.Flask:
    app = flask.Flask(__name__)
    app.wsgi_app = WSGISessionMiddleware(app.wsgi_app, store)  # type: ignore[method-assign]

    @app.get("/")
    def index() -> dict[str, object]:
        session = Session.of(flask.request)
        return {**session, "who": session.user_id}

    return app


def test_a_starlette_client_is_logged_in_by_one_line(shm_store: SessionStore) -> None:
    client = starlette_client(shm_store)
    assert client.get("/").json() == {"who": None}
    client.cookies.update(login_cookie(shm_store, {"user": "ada"}, user_id=7))
    assert client.get("/").json() == {"user": "ada", "who": 7}


def test_a_flask_client_is_logged_in_by_one_line(shm_store: SessionStore) -> None:
    client = flask_app(shm_store).test_client()
    assert client.get("/").json == {"who": None}
    for name, value in login_cookie(shm_store, {"user": "ada"}, user_id="ada").items():
        client.set_cookie(name, value)
    assert client.get("/").json == {"user": "ada", "who": "ada"}


@pytest.mark.parametrize("bind_to", [("ip",), ("user_agent",), ("ip", "user_agent")])
def test_a_login_cookie_is_bound_to_the_client_that_is_named(place: Path, bind_to: tuple[str, ...]) -> None:
    with make_store(place, bind_to=bind_to) as store:
        client = starlette_client(store)
        client.cookies.update(login_cookie(store, user_id=7))
        assert client.get("/").json() == {"who": None}
        client.cookies.clear()
        client.cookies.update(login_cookie(store, user_id=7, address="testclient", user_agent="testclient"))
        assert client.get("/").json() == {"who": 7}


def test_a_login_cookie_without_data_or_user_is_an_empty_session(shm_store: SessionStore) -> None:
    (cookie,) = login_cookie(shm_store).items()
    session = shm_store.request_session("=".join(cookie).encode)
    assert (session.to_dict(), session.user_id, session.exists) == ({}, None, True)


def test_two_login_cookies_are_two_sessions(shm_store: SessionStore) -> None:
    one, two = login_cookie(shm_store, {"n": 1}), login_cookie(shm_store, {"n": 2})
    assert one != two
    assert shm_store.count() == 2


def test_time_passes_when_the_clock_is_told(shm_store: SessionStore) -> None:
    clock = shm_store.clock
    assert isinstance(clock, ManualClock)
    client = starlette_client(shm_store)
    client.cookies.update(login_cookie(shm_store, {"user": "ada"}))
    clock.advance(hours=5, minutes=59)
    assert client.get("/").json()["user"] == "ada"
    clock.advance(hours=6)
    assert client.get("/").json() == {"who": None}


def test_the_clock_advances_both_times_and_steps_only_the_wall() -> None:
    clock = ManualClock()
    wall, boot = clock.now(), clock.boot()
    assert (wall, boot) == (clock.now(), clock.boot())
    clock.advance(1.5, minutes=1)
    assert (clock.now() - wall, clock.boot() - boot) == (61_500, 61_500)
    clock.step(-10)
    assert (clock.now() - wall, clock.boot() - boot) == (51_500, 61_500)


def test_the_environment_does_not_reach_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "SECURE": "1", "NAME": "other", "LIFESPAN": "1", "DIR": "/nowhere", "KEY": "none",
        "BACKEND": f"sqlite:///{tmp_path}/sessions.db",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(f"SHMSESSION_{name}", value)
    with make_store(tmp_path / "s") as store:
        assert (store.name, store.config.secure, store.config.map_size) == ("test", False, SMALL_MAP)
        assert store.memory.environment.base == tmp_path / "s"
        assert not store.is_persistent, "the tests of an application must not reach its database"


TESTS = """
import os
import pytest
from pathlib import Path

@pytest.mark.parametrize("number", range(8))
def test_each_test_has_a_store_of_its_own(shm_store, number):
    assert shm_store.count() == 0
    from shmsession.testing import login_cookie
    login_cookie(shm_store, {"n": number})
    assert shm_store.count() == 1
    base = shm_store.memory.environment.base
    assert base.is_dir()
    with Path(os.environ["SEEN"]).open("a") as file:
        file.write(f"{base}\\n")
"""


@pytest.mark.parametrize("workers", [["-p", "no:xdist"], ["-n", "2"]], ids=["alone", "xdist"])
def test_the_fixture_works_in_a_project_of_its_own_alone_and_under_xdist(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, workers: list[str]
) -> None:
    pytester.makeconftest('pytest_plugins = ["shmsession.testing"]')
    pytester.makepyfile(TESTS)
    seen = pytester.path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.runpytest_subprocess("-p", "no:cacheprovider", *workers).assert_outcomes(passed=8)
    bases = seen.read_text().split()
    assert len(set(bases)) == 8
    assert not any(Path(base).parent.exists() for base in bases)
