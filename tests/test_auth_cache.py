"""Users are remembered: as long and as many as configured, and until any process clears them."""

import asyncio
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from shmsession import SessionStore
from shmsession.auth import Auth, AuthConfig
from shmsession.memory import generations
from shmsession.testing import ManualClock, make_store
from tests.auth_site import VARIABLE, User, Users
from tests.servers import ASGI, SYNC, Kind, Serve

pytest_plugins = ["tests.hosts"]


@pytest.fixture
def store(place: Path) -> Iterator[SessionStore]:
    store = make_store(place / "sessions")
    yield store
    store.close()


class Site:
    """Users in a dict, and what was loaded of them."""

    def __init__(self, store: SessionStore, **settings: Any) -> None:
        self.store, self.loads = store, list[str]()
        self.names: dict[str, str] = {}
        self.auth = Auth(store, self.load, config=AuthConfig(**settings))

    def load(self, user_id: str) -> str:
        self.loads.append(user_id)
        return self.names.get(user_id, user_id)

    def name(self, user_id: str) -> str | None:
        """Whom the next request of this user finds."""
        session = self.store.session()
        session.renew(user_id=user_id)
        return self.auth.sync.load({"type": "http", "headers": [], "session": session}).current_user


def test_a_user_is_loaded_again_when_max_age_is_over_and_never_remembered_for_longer(store: SessionStore) -> None:
    assert isinstance(store.clock, ManualClock)
    site = Site(store, max_age=timedelta(minutes=1))
    for _ in range(2):
        for _ in range(3):
            site.name("ada")
            store.clock.advance(19.9)
        store.clock.advance(0.3)
    assert site.loads == ["ada", "ada"]


def test_without_a_max_age_every_request_loads_its_user(store: SessionStore) -> None:
    site = Site(store, max_age=timedelta(0))
    assert [site.name("ada") for _ in range(3)] == ["ada"] * 3
    assert site.loads == ["ada"] * 3


def test_so_many_users_are_remembered_those_that_were_asked_for_last(store: SessionStore) -> None:
    site = Site(store, cache_size=2)
    for name in ("ada", "bob", "ada", "eve", "ada", "bob"):
        site.name(name)
    assert site.loads == ["ada", "bob", "eve", "bob"]


def test_ids_of_other_types_are_other_users(store: SessionStore) -> None:
    loads: list[Any] = []

    def load(user_id: Any) -> object:
        loads.append(user_id)
        return user_id

    auth = Auth(store, load)
    for user_id in (1, True, "1", 1):
        session = store.session()
        session.renew(user_id=user_id)
        assert auth.sync.load({"type": "http", "headers": [], "session": session}).current_user is not None
    assert [(type(one), one) for one in loads] == [(int, 1), (bool, True), (str, "1")]


def test_clearing_a_user_clears_that_one_and_clearing_all_all(store: SessionStore) -> None:
    site = Site(store)
    names = ("ada", "bob")
    for name in names:
        site.name(name)
    site.names = {name: f"{name} the second" for name in names}
    site.auth.cache_clear_user("ada")
    assert [site.name(name) for name in names] == ["ada the second", "bob"]
    site.auth.cache_clear_all()
    assert [site.name(name) for name in names] == ["ada the second", "bob the second"]


def test_what_is_cleared_while_it_is_loaded_is_loaded_again(store: SessionStore) -> None:
    """The load had begun before, so it may have missed what was changed."""
    begun, go_on = threading.Event(), threading.Event()
    name = "ada"

    def load(user_id: str) -> str:
        found = name
        begun.set()
        go_on.wait(60)
        return found

    auth = Auth(store, load)
    session = store.session()
    session.renew(user_id="ada")
    session.save()

    def request() -> str | None:
        return auth.sync.load({"type": "http", "headers": [], "session": store.session(session.id)}).current_user

    slow = threading.Thread(target=request)
    slow.start()
    assert begun.wait(60)
    name = "ada the second"
    auth.cache_clear_user("ada")
    go_on.set()
    slow.join()
    assert request() == "ada the second"


def test_who_is_found_to_be_gone_is_remembered_no_more(store: SessionStore) -> None:
    users = {"ada": "Ada"}
    auth = Auth(store, users.get)
    session = store.session()
    me = auth.sync.load({"type": "http", "headers": [], "session": session})
    assert me.login("ada")
    users.clear()
    me.reload_user()
    later = auth.sync.load({"type": "http", "headers": [], "session": session})
    assert (me.is_authenticated, later.is_authenticated) == (False, False)


def test_what_is_cleared_in_a_store_that_was_removed_stays_cleared(place: Path) -> None:
    """The next one has words of its own: none of its users is taken for one of the former."""
    store = make_store(place / "sessions")
    site = Site(store)
    site.name("ada")
    site.names = {"ada": "ada the second"}
    (store.path / "generations").unlink()
    store.memory.environment.close()
    assert site.name("ada") == "ada the second"
    store.close()


def test_what_is_remembered_survives_closing_and_a_rebuilt_environment(place: Path) -> None:
    store = make_store(place / "sessions")
    site = Site(store)
    site.name("ada")
    data = store.memory.environment.data / "data.mdb"
    store.close()
    with data.open("r+b") as file:
        file.write(bytes(8192))
    assert site.name("ada") == "ada"
    assert site.loads == ["ada"]
    site.auth.cache_clear_all()
    site.name("ada")
    assert site.loads == ["ada", "ada"]
    store.close()


def test_each_user_has_a_word_that_is_not_that_of_all() -> None:
    indexes = {generations.index_of(number.to_bytes(8, "big")) for number in range(generations.WORDS * 2)}
    assert indexes == set(range(1, generations.WORDS))


def test_threads_that_load_at_once_disturb_nobody(store: SessionStore) -> None:
    site = Site(store, cache_size=3)
    trouble: list[BaseException] = []

    def ask(first: int) -> None:
        try:
            for number in range(300):
                name = str((first + number) % 7)
                assert site.name(name) == name
                if number % 20 == 0:
                    site.auth.cache_clear_user(name)
        except BaseException as error:  # noqa: BLE001  # it is raised below
            trouble.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trouble == []


def test_a_sync_loader_does_not_hold_up_the_event_loop(store: SessionStore) -> None:
    """It waits for something that only the loop can do."""
    done = threading.Event()

    def load(user_id: str) -> str:
        assert done.wait(60)
        return user_id

    auth = Auth(store, load)
    session = store.session()
    session.renew(user_id="ada")

    async def ask() -> str | None:
        asyncio.get_running_loop().call_later(0, done.set)
        return (await auth.load({"type": "http", "headers": [], "session": session})).current_user

    assert asyncio.run(ask()) == "ada"


@pytest.mark.parametrize(("kind", "app"), [(ASGI, "asgi_app"), (SYNC, "wsgi_app")], ids=["asgi", "wsgi"])
def test_what_one_worker_clears_every_worker_loads_anew_for_its_next_request(
    serve: Serve, place: Path, kind: Kind, app: str
) -> None:
    users = Users(place / "users.json", [])
    users.write(User("ada", ("admin",)), User("bob"))
    env = {VARIABLE: str(users.path)}
    server = serve(kind, env=env, app=f"tests.auth_site:{app}")
    browser = server.browser()
    assert browser.post("/enter/ada").status == 200
    with server.desks(browser.cookies) as desks:
        assert [ask("GET", "/admin").status for ask in desks.values()] == [200] * len(desks)
        users.write(User("ada"), User("bob"))
        assert [ask("GET", "/admin").status for ask in desks.values()] == [200] * len(desks), "remembered"
        clearer, *_ = desks.values()
        clearer("POST", "/clear/ada")
        assert [ask("GET", "/admin").status for ask in desks.values()] == [403] * len(desks)
        users.write(User("bob"))
        clearer("POST", "/clear/ada")
        assert [ask("GET", "/me").json["user"] for ask in desks.values()] == [None] * len(desks)
