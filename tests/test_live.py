"""Live sessions: a page that stays open sees what others change, and ends when its session does."""

import asyncio
import gc
import shutil
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextvars import Context, ContextVar
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any, Final, TypeVar

import pytest

from shmsession import Key, Session, SessionConfig, SessionStore, live
from shmsession.errors import SessionGone, StoreError
from shmsession.memory.room import QUIET_MS
from shmsession.memory.store import Missing
from shmsession.session import Resolved
from shmsession.testing import ManualClock, make_store
from tests.backends import MemoryBackend
from tests.figures import report, rng, size
from tests.memory import forget, put_raw, spoilt
from tests.servers import PATIENCE

T = TypeVar("T")
Changes = AsyncIterator[frozenset[str]]


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LOOK_SECONDS", 0.001)


@pytest.fixture
def store(shm_store: SessionStore) -> SessionStore:
    return shm_store


@pytest.fixture
def clock(store: SessionStore) -> ManualClock:
    assert isinstance(store.clock, ManualClock)
    return store.clock


@pytest.fixture
def kept(place: Path) -> Iterator[SessionStore]:
    """A store with a backend, whose clock stands still."""
    config = SessionConfig(
        directory=place / "sessions", name="test", secure=False, keys=(Key.generate(),), map_size=4 << 20
    )
    with SessionStore(MemoryBackend(labelled=False), config=config, clock=ManualClock()) as store:
        yield store


def stored(store: SessionStore, **data: Any) -> Session:
    session = store.session()
    session.update(data)
    session.create()
    session.save()
    return session


def other(store: SessionStore, session: Session) -> Session:
    """The same session, in another request."""
    return store.session(session.id)


def change(store: SessionStore, session: Session, **data: Any) -> None:
    request = other(store, session)
    request.update(data)
    request.save()


def patiently(work: Awaitable[T]) -> T:
    async def wait() -> T:
        return await asyncio.wait_for(work, PATIENCE)

    return asyncio.run(wait())


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110  # what is waited for is no event of this loop
        await asyncio.sleep(0.001)


async def waits(store: SessionStore) -> None:
    """Return when somebody waits for a look on this loop, and one has been taken."""
    watchers, loop = store.live._watchers, asyncio.get_running_loop()
    await until(lambda: loop in watchers)
    watcher = watchers[loop]
    watcher._stamp = None
    await until(lambda: watcher._waiting and watcher._stamp is not None)


async def end_of(changes: Changes) -> list[frozenset[str]]:
    """All that comes until it ends."""
    return [keys async for keys in changes]


async def meanwhile(store: SessionStore, changes: Changes, event: Callable[[], object]) -> list[frozenset[str]]:
    """What a page that waits is told, which `event` brings to its end."""
    page = asyncio.create_task(end_of(changes))
    await waits(store)
    event()
    return await page


# ── what is yielded ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_of_another_request_is_yielded_and_can_be_read(store: SessionStore) -> None:
    page = stored(store, cart=["tea"], colour="red", gone=1)
    assert (page["cart"], page["colour"], page["gone"]) == (["tea"], "red", 1)

    async def follow() -> None:
        changes = page.changes()
        waiting = asyncio.ensure_future(anext(changes))
        await waits(store)
        change(store, page, cart=["milk"], size=3)
        assert await waiting == {"cart", "size"}
        assert (page["cart"], page["size"], page["colour"]) == (["milk"], 3, "red")
        request = other(store, page)
        del request["gone"]
        request.save()
        assert await anext(changes) == {"gone"}
        assert "gone" not in page
        assert page.get("gone") is None

    patiently(follow())


def test_what_happened_before_the_loop_began_is_not_missed(store: SessionStore) -> None:
    page = stored(store, a=1)
    change(store, page, a=2)
    assert patiently(anext(page.changes())) == {"a"}
    assert page["a"] == 2


def test_several_changes_between_two_looks_are_one(store: SessionStore) -> None:
    page = stored(store)

    async def follow() -> None:
        changes = page.changes()
        for number in range(3):
            change(store, page, a=number, **{f"k{number}": 1})
        assert await anext(changes) == {"a", "k0", "k1", "k2"}
        change(store, page, b=1)
        assert await anext(changes) == {"b"}

    patiently(follow())


@pytest.mark.parametrize("verb", ["save", "apply", "increment"])
def test_own_commits_are_no_changes_of_others(store: SessionStore, verb: str) -> None:
    page = stored(store, n=1)

    async def follow() -> None:
        changes = page.changes()
        waiting = asyncio.ensure_future(anext(changes))
        await waits(store)
        if verb == "save":
            page["n"] = 2
            page.save()
        elif verb == "apply":
            page.apply("n", lambda n: n + 1)
        else:
            page.increment("n")
        await waits(store)
        change(store, page, b=1)
        assert await waiting == {"b"}
        assert page.to_dict() == {"n": 2, "b": 1}

    patiently(follow())


@pytest.mark.parametrize("verb", ["save", "increment"])
def test_a_change_that_an_own_commit_met_first_is_yielded_all_the_same(store: SessionStore, verb: str) -> None:
    page = stored(store, cart=["tea"], n=1)
    assert page["cart"] == ["tea"]

    async def follow() -> None:
        changes = page.changes()
        change(store, page, a=0)
        assert await anext(changes) == {"a"}
        change(store, page, cart=["milk"])
        if verb == "save":
            page["n"] = 2
            page.save()
        else:
            page.increment("n")
        assert await anext(changes) == {"cart"}
        assert page.to_dict() == {"cart": ["milk"], "n": 2, "a": 0}

    patiently(follow())


def test_pending_edits_survive_a_change_of_others(store: SessionStore) -> None:
    page = stored(store, mine=1, nested=[1], dropped=1, theirs=1)
    page["mine"] = 2
    page["nested"].append(2)
    del page["dropped"]
    change(store, page, mine=7, nested=[7], dropped=7, theirs=2, new="x" * 100)
    assert patiently(anext(page.changes())) == {"mine", "nested", "dropped", "theirs", "new"}
    wanted = {"mine": 2, "nested": [1, 2], "theirs": 2, "new": "x" * 100}
    assert page.to_dict() == wanted
    assert page.modified
    page.save()
    assert other(store, page).to_dict() == wanted


def test_a_nested_edit_alone_survives_too(store: SessionStore) -> None:
    page = stored(store, nested=[1])
    page["nested"].append(2)
    change(store, page, a=1)
    assert patiently(anext(page.changes())) == {"a"}
    page.save()
    assert other(store, page).to_dict() == {"nested": [1, 2], "a": 1}


def test_what_was_cleared_here_stays_cleared(store: SessionStore) -> None:
    page = stored(store, a=1)
    page.clear()
    page["b"] = 1
    change(store, page, c=1)
    assert patiently(anext(page.changes())) == {"c"}
    assert page.to_dict() == {"b": 1}
    page.save()
    assert other(store, page).to_dict() == {"b": 1}


def test_the_size_of_what_is_pending_counts_what_others_stored(place: Path) -> None:
    store = make_store(place, max_size=1000)
    page = stored(store)
    page["a"] = 1
    change(store, page, b="x" * 900)
    assert patiently(anext(page.changes())) == {"b"}
    with pytest.raises(ValueError, match="max_size is 1000"):
        page["c"] = "x" * 90
    store.close()


def test_a_message_is_a_change_without_keys(store: SessionStore) -> None:
    page = stored(store)
    request = other(store, page)
    request.flash("hello")
    request.save()
    assert patiently(anext(page.changes())) == frozenset()
    assert [flash.message for flash in page.flashes(keep=True)] == ["hello"]


def test_a_touch_is_no_change_but_moves_the_end(store: SessionStore, clock: ManualClock) -> None:
    page = stored(store)

    async def follow() -> None:
        changes, before = page.changes(), page.expires_at
        waiting = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0)
        clock.advance(hours=5)
        request = other(store, page)
        request.touch()
        request.save()
        await waits(store)
        clock.advance(hours=5)
        await waits(store)
        change(store, page, a=1)
        assert await waiting == {"a"}
        assert before is not None
        assert page.expires_at == before + timedelta(hours=10)

    patiently(follow())


def test_every_follower_of_one_object_is_told(store: SessionStore) -> None:
    page = stored(store)

    async def follow() -> None:
        loops = [page.changes() for _ in range(3)]
        waiting = [asyncio.ensure_future(anext(changes)) for changes in loops]
        await waits(store)
        change(store, page, a=1)
        assert await asyncio.gather(*waiting) == [{"a"}] * 3

    patiently(follow())


def test_a_hundred_pages_of_one_session_are_told(store: SessionStore) -> None:
    first = stored(store)

    async def follow() -> None:
        pages = [other(store, first) for _ in range(100)]
        waiting = [asyncio.ensure_future(anext(page.changes())) for page in pages]
        await waits(store)
        change(store, first, a=1)
        assert await asyncio.gather(*waiting) == [{"a"}] * 100
        assert {page["a"] for page in pages} == {1}

    patiently(follow())


def test_who_gives_up_waiting_may_wait_again(store: SessionStore) -> None:
    """As a stream does that tells its client now and then that it is still there."""
    page = stored(store)

    async def follow() -> None:
        changes = page.changes()
        for number in range(3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(changes), 0.005)
            change(store, page, a=number)
            assert await anext(changes) == {"a"}
        waiting = asyncio.create_task(end_of(changes))
        await waits(store)
        page.destroy()
        assert await waiting == []

    patiently(follow())


def test_a_read_only_session_can_be_followed(store: SessionStore) -> None:
    page = stored(store, a=[1])
    page.readonly = True
    assert page["a"] == [1]
    change(store, page, a=[2])
    assert patiently(anext(page.changes())) == {"a"}
    assert page["a"] == [2]
    page.save()


def test_what_was_read_between_two_looks_is_read_anew_also_when_it_is_as_it_was_before(store: SessionStore) -> None:
    page = stored(store, n=1)

    async def follow() -> None:
        changes = page.changes()
        change(store, page, cart=["tea"])
        page.increment("n")
        assert page["cart"] == ["tea"]
        request = other(store, page)
        del request["cart"]
        request.save()
        assert await anext(changes) == {"cart"}
        assert "cart" not in page
        assert page.get("cart") is None

    patiently(follow())


class Visitor:
    """Two requests that hold one session, of which one follows it, and a model of what they store."""

    def __init__(self, store: SessionStore, random: Random) -> None:
        self.store, self.random = store, random
        self.page = stored(store, mine=0, nested=[], both=0)
        self.changes = self.page.changes()
        self.heard: dict[str, Any] = {}

    def others(self) -> None:
        request, key = other(self.store, self.page), self.random.choice(["a", "b", "c", "both", "nested"])
        if key in request and self.random.random() < 0.3:
            del request[key]
        else:
            request[key] = [self.random.random()]
        if self.random.random() < 0.3:
            request.touch()
        request.save()

    def mine(self) -> None:
        step = self.random.randrange(6)
        if step == 0:
            self.page["mine"] = self.random.random()
        elif step == 1:
            self.page["both"] = self.random.random()
        elif step == 2 and isinstance(self.page.get("nested"), list):
            self.page["nested"].append(self.random.random())
        elif step == 3:
            self.page.increment("hits")
        elif step == 4:
            self.page.get(self.random.choice("abc"))
        else:
            self.page.save()

    async def hear(self) -> None:
        request = other(self.store, self.page)
        request["tick"] = self.random.random()
        request.save()
        keys = await anext(self.changes)
        now = {key: request.get(key) for key in "abc"}
        assert keys >= {"tick"} | {key for key in "abc" if now[key] != self.heard.get(key)}
        assert keys <= {"tick", "both", "nested", *"abc"}
        assert {key: self.page.get(key) for key in "abc"} == now
        self.heard = now


@pytest.mark.soak
def test_whatever_both_sides_do_the_page_hears_of_all_that_is_not_its_own(store: SessionStore) -> None:
    steps, random = size(20_000, 400), rng("live")
    visitor = Visitor(store, random)

    async def follow() -> None:
        for _ in range(steps):
            if random.random() < 0.2:
                await visitor.hear()
            elif random.random() < 0.5:
                visitor.others()
            else:
                visitor.mine()
        visitor.page.save()
        await visitor.hear()
        assert visitor.page.to_dict() == other(store, visitor.page).to_dict()

    asyncio.run(follow())
    report("live against a model", steps=steps, unheard=0)


# ── how it ends ───────────────────────────────────────────────────────────────────────────────────────────────


def destroyed(store: SessionStore, session: Session) -> None:
    other(store, session).destroy()


def cleared(store: SessionStore, session: Session) -> None:
    store.clear()


def renewed(store: SessionStore, session: Session) -> None:
    request = other(store, session)
    request.renew()
    request.save()


def logged_in(store: SessionStore, session: Session) -> None:
    request = other(store, session)
    request.renew(user_id="ada")
    request.save()


def expired(store: SessionStore, session: Session) -> None:
    assert isinstance(store.clock, ManualClock)
    store.clock.advance(hours=6)


def swept(store: SessionStore, session: Session) -> None:
    expired(store, session)
    store.cleanup()


def evicted(store: SessionStore, session: Session) -> None:
    forget(store.memory)


def damaged(store: SessionStore, session: Session) -> None:
    assert session.raw_handle is not None
    raw = store.memory.environment.get(session.raw_handle)
    assert raw is not None
    put_raw(store.memory, session.raw_handle, spoilt(raw))


End = Callable[[SessionStore, Session], None]
ENDINGS: Final[dict[End, str]] = {
    destroyed: "destroyed", cleared: "destroyed", renewed: "renewed", logged_in: "renewed", expired: "expired",
    swept: "expired", evicted: "lost", damaged: "lost",
}  # fmt: skip


@pytest.mark.parametrize("end", ENDINGS, ids=lambda end: end.__name__)
def test_the_loop_ends_with_the_session_and_says_why(store: SessionStore, end: End) -> None:
    page = stored(store, a=1)
    assert (page.gone, page.ended) == (False, None)
    assert patiently(meanwhile(store, page.changes(), lambda: end(store, page))) == []
    assert (page.gone, page.ended, page["a"]) == (True, ENDINGS[end], 1)
    assert patiently(end_of(page.changes())) == [], "and so does every loop after it"
    page["a"] = 2
    with pytest.raises(SessionGone):
        page.save()


def test_the_loop_ends_when_the_time_is_over_though_nobody_commits(store: SessionStore, clock: ManualClock) -> None:
    """And though this process has looked all the time: not because it was blind."""
    page = stored(store)
    clock.advance(-10, hours=6)
    assert patiently(meanwhile(store, page.changes(), lambda: clock.advance(10))) == []
    assert page.ended == "expired"


@pytest.mark.parametrize("end", [destroyed, logged_in], ids=lambda end: end.__name__)
def test_a_session_that_was_gone_when_the_request_came_ends_at_once(store: SessionStore, end: End) -> None:
    first = stored(store, a=1)
    end(store, first)
    late = store.session(first.id)
    assert (late.gone, late.ended) == (True, None)
    assert patiently(end_of(late.changes())) == []
    assert (late.gone, late.ended, dict(late)) == (True, ENDINGS[end], {})


def test_what_this_object_destroys_itself_is_not_gone(store: SessionStore) -> None:
    page = stored(store)
    assert patiently(meanwhile(store, page.changes(), page.destroy)) == []
    assert (page.gone, page.ended, page.exists) == (False, None, False)


def test_a_session_that_is_not_stored_has_no_changes(store: SessionStore) -> None:
    page = store.session()
    page["a"] = 1
    assert patiently(end_of(page.changes())) == []
    assert (page.gone, page["a"]) == (False, 1)


def test_a_session_of_which_nobody_could_say_has_no_changes(store: SessionStore) -> None:
    """The backend was down when the request came, which went on without a session (on_backend_error="anonymous")."""
    page = store.request_session(lambda: b"")
    page.start(Resolved(handle=stored(store, a=1).raw_handle, presented=True))
    assert patiently(end_of(page.changes())) == []
    assert (page.gone, dict(page)) == (False, {})


def test_an_own_new_id_is_followed(store: SessionStore) -> None:
    page = stored(store)

    async def follow() -> None:
        changes = page.changes()
        waiting = asyncio.ensure_future(anext(changes))
        await waits(store)
        page.renew(user_id="ada")
        page.save()
        await waits(store)
        change(store, page, a=1)
        assert await waiting == {"a"}
        assert page.user_id == "ada"

    patiently(follow())


def test_following_does_not_keep_a_session_alive_but_a_touch_does(store: SessionStore, clock: ManualClock) -> None:
    page = stored(store)

    async def follow() -> list[frozenset[str]]:
        changes = asyncio.create_task(end_of(page.changes()))
        await asyncio.sleep(0)
        for _ in range(3):
            clock.advance(hours=5)
            page.touch()
            page.save()
            await waits(store)
        clock.advance(hours=6)
        return await changes

    assert patiently(follow()) == []
    assert page.ended == "expired"


def test_the_loop_ends_when_the_store_is_closed(store: SessionStore) -> None:
    page = stored(store)
    assert patiently(meanwhile(store, page.changes(), store.close)) == []
    assert (page.gone, page.ended) == (False, None)
    page["a"] = 1
    page.save()
    assert patiently(meanwhile(store, page.changes(), lambda: destroyed(store, page))) == []
    assert page.ended == "destroyed", "opened again, it can be followed again"


def test_a_store_that_cannot_be_read_raises_in_every_loop(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [stored(store), stored(store)]

    def fail(*_: object) -> None:
        raise StoreError("broken")

    async def follow() -> list[Any]:
        tasks = [asyncio.create_task(end_of(page.changes())) for page in pages]
        await waits(store)
        monkeypatch.setattr(live, "raws_of", fail)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(error) for error in patiently(follow())] == ["broken"] * 2
    monkeypatch.undo()


# ── with a backend ────────────────────────────────────────────────────────────────────────────────────────────


async def retire(store: SessionStore) -> None:
    """What the backend has and nobody looked at leaves memory, while others look on."""
    assert isinstance(store.clock, ManualClock)
    assert await store.flush(PATIENCE)
    for _ in range(2 * QUIET_MS // live.BLIND_MS):
        store.clock.advance(live.BLIND_MS / 1000)
        await waits(store)
    store.memory.outbox.retire(store.clock.now(), 1, b"")


def is_in_memory(store: SessionStore, session: Session) -> bool:
    assert session.raw_handle is not None
    return store.memory.load(session.raw_handle, store.clock.now()) is not Missing.UNKNOWN


@pytest.mark.parametrize("end", [destroyed, renewed, expired], ids=lambda end: end.__name__)
def test_a_session_that_left_memory_goes_on_until_it_ends(kept: SessionStore, end: End) -> None:
    page = stored(kept, a=1)
    backend: Any = kept._backend

    async def follow() -> list[frozenset[str]]:
        changes = page.changes()
        waiting = asyncio.ensure_future(anext(changes))
        await waits(kept)
        await retire(kept)
        await waits(kept)
        assert not is_in_memory(kept, page)
        asked = backend.calls.count("load")
        await waits(kept)
        await waits(kept)
        assert backend.calls.count("load") == asked, "nobody asks the database"
        assert not waiting.done()
        change(kept, page, a=2)
        assert await waiting == {"a"}
        assert page["a"] == 2
        to_end = asyncio.create_task(end_of(changes))
        await retire(kept)
        await waits(kept)
        end(kept, page)
        return await to_end

    assert patiently(follow()) == []
    assert page.ended == ENDINGS[end]


def test_a_session_that_left_memory_ends_with_all_of_its_user(kept: SessionStore) -> None:
    """A revocation buries what is in memory; what is not ends by the user's watermark."""
    ada, bob, spared = stored(kept), stored(kept), stored(kept)
    for session, user in ((ada, "ada"), (bob, "bob"), (spared, "ada")):
        session.renew(user_id=user)
        session.save()

    async def follow() -> None:
        pages = [asyncio.create_task(end_of(session.changes())) for session in (ada, bob)]
        await waits(kept)
        await retire(kept)
        await waits(kept)
        assert not is_in_memory(kept, ada)
        assert not is_in_memory(kept, bob)
        await kept.revoke_user("ada", keep=spared)
        assert await pages[0] == []
        assert not pages[1].done()
        destroyed(kept, bob)
        assert await pages[1] == []

    patiently(follow())
    assert (ada.ended, bob.ended) == ("destroyed", "destroyed")
    assert patiently(end_of(other(kept, ada).changes())) == []


def test_a_session_that_no_backend_keeps_is_lost_when_it_leaves_memory(kept: SessionStore) -> None:
    page = stored(kept)
    page.set_store(False)
    page.save()
    assert patiently(meanwhile(kept, page.changes(), lambda: forget(kept.memory))) == []
    assert page.ended == "lost"


def test_who_could_not_look_for_long_does_not_take_an_absent_session_for_alive(kept: SessionStore) -> None:
    """Stopped, suspended, or busy with a client that takes nothing: a tombstone may have come and gone."""
    page = stored(kept)
    assert isinstance(kept.clock, ManualClock)
    kept_clock = kept.clock

    async def follow() -> None:
        waiting = asyncio.create_task(end_of(page.changes()))
        await asyncio.sleep(0)
        busy = other(kept, page)
        changes = busy.changes()
        change(kept, page, a=1)
        assert await anext(changes) == {"a"}
        await retire(kept)
        await waits(kept)
        assert not waiting.done()
        kept_clock.advance(live.BLIND_MS / 1000 + 1)
        assert [await waiting, await end_of(changes)] == [[frozenset({"a"})], []]
        assert (page.ended, busy.ended) == ("lost", "lost")

    patiently(follow())


# ── what is left behind ───────────────────────────────────────────────────────────────────────────────────────


def test_who_leaves_leaves_nothing(store: SessionStore) -> None:
    """Cancelled, broken out of, closed or forgotten: nobody looks any more, and nothing of the session is held."""

    async def follow() -> None:
        pages = [stored(store) for _ in range(4)]
        tasks = [asyncio.create_task(end_of(page.changes())) for page in pages[:2]]
        await waits(store)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        del tasks, task
        for page in pages[2:]:
            change(store, page, a=1)
        for page in pages[2:]:
            async for _ in page.changes():
                break
        gc.collect()
        (watcher,) = store.live._watchers.values()
        await until(lambda: not watcher._looks)
        assert watcher._waiting == {}
        assert [len(page._followers) for page in pages] == [0] * 4

    patiently(follow())
    gc.collect()
    assert len(store.live._watchers) == 0


def test_who_waited_first_is_not_held_by_who_waits_on(store: SessionStore) -> None:
    """What looks for all of them runs in nobody's context."""

    class Held:
        pass

    variable: ContextVar[Held] = ContextVar("variable")
    pages = [stored(store), stored(store)]

    def hold() -> weakref.ref[Held]:
        variable.set(Held())
        return weakref.ref(variable.get())

    async def follow() -> None:
        context = Context()
        held = context.run(hold)
        first = asyncio.create_task(end_of(pages[0].changes()), context=context)
        await waits(store)
        second = asyncio.create_task(end_of(pages[1].changes()), context=Context())
        destroyed(store, pages[0])
        await first
        del context, first
        await waits(store)
        gc.collect()
        assert held() is None
        destroyed(store, pages[1])
        await second

    patiently(follow())


def test_every_event_loop_has_its_own(store: SessionStore) -> None:
    page, told = stored(store), []
    barrier = threading.Barrier(4)

    def serve() -> None:
        mine = other(store, page)

        async def follow() -> None:
            waiting = asyncio.ensure_future(anext(mine.changes()))
            await asyncio.sleep(0)
            await waits(store)
            await asyncio.to_thread(barrier.wait)
            told.append(await waiting)

        patiently(follow())

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    barrier.wait(PATIENCE)
    change(store, page, a=1)
    for thread in threads:
        thread.join(PATIENCE)
    assert told == [{"a"}] * 3


def test_a_store_that_was_rebuilt_meanwhile_is_looked_at_anew(store: SessionStore) -> None:
    page = stored(store)
    assert patiently(meanwhile(store, page.changes(), lambda: shutil.rmtree(store.path))) == []
    assert page.ended == "lost"
