"""The contract that every backend keeps, as tests: subclass `BackendContract` and say how a backend is made."""

import asyncio
import random
from typing import Final

from shmsession.backends import FOREVER, SENTINEL, Answer, Backend, Mark, Row, State, wins

from .races import Races
from .rows import Case, dead, erased, handle_of, handles_in, live, row_of, scenario, stands, user_of

MAX: Final = 2**53 - 1


class _Rows(Case):
    """What a row is, and which of two stays."""

    @scenario
    async def test_what_was_never_written_is_missing(self, one: Backend) -> None:
        """An empty database holds nothing, and says so without an error."""
        assert await one.load(handle_of(1)) is None
        assert await one.sessions_of(user_of(1)) == []
        assert (await one.count(), await handles_in(one), await one.clear()) == (0, [], 0)
        assert await one.sweep(self.later, 10) == 0
        assert await one.write([]) == []

    @scenario
    async def test_a_live_row_comes_back_as_it_was_written(self, one: Backend) -> None:
        """Every field, of its own type, also to another object; what stood there before was nothing."""
        row = live(1, self.later, epoch=7, version=9, user=user_of(1), body=b"body")
        bare = Row(handle_of(2), State.LIVE, 7, 9, self.later)
        assert await one.write([row, bare]) == [Answer(True, None)] * 2
        found = await one.load(row.handle)
        assert found == row
        assert found is not None
        assert [type(value) for value in found] == [bytes, State, int, int, int, bytes, bytes]
        assert await one.load(bare.handle) == bare

    @scenario
    async def test_bodies_are_kept_byte_for_byte(self, one: Backend) -> None:
        """Empty or 64 KiB, every byte value, in every place where text would be changed."""
        noise = random.Random("bodies")  # noqa: S311  # for tests
        bodies = [b"", b"\0", b"\0\0a", b"a\0", b"\n", b"\r\n", b" a ", b"\\x00", b"'\"%s{}$1", b"\xff\xfe", b"\xc3("]
        bodies += [bytes([value]) for value in range(256)]
        bodies += [bytes(range(256)) * 4, noise.randbytes(1000), noise.randbytes(65_536), bytes(65_536)]
        rows = [live(number, self.later, body=body) for number, body in enumerate(bodies)]
        assert await one.write(rows) == [Answer(True, None)] * len(rows)
        for row in rows:
            assert await one.load(row.handle) == row, f"the body {row.body[:20]!r}… came back otherwise"

    @scenario
    async def test_handles_and_users_are_kept_byte_for_byte(self, one: Backend) -> None:
        """They are bytes, not text: zeros, newlines and what is no UTF-8 are part of them."""
        ends = (b"\x01", b"\n", b" ", b"\\", b"'", b":", b"{", b"}", b"*", b"\x7f", b"\xc3", b"\xff")
        rows = [Row(bytes(19) + end, State.LIVE, 1, 1, self.later, bytes(7) + end, end) for end in ends]
        rows += [Row(end * 20, State.LIVE, 1, 1, self.later, end * 8, end) for end in ends]
        await one.write(rows)
        for row in rows:
            assert await one.load(row.handle) == row
            assert await one.sessions_of(row.user) == [row]
        assert await handles_in(one) == sorted(row.handle for row in rows)

    @scenario
    async def test_numbers_are_exact_up_to_two_to_the_53rd(self, one: Backend) -> None:
        """Epoch, version and horizon up to 2**53 - 1, and the order of those that differ by one."""
        top = live(1, MAX, epoch=MAX, version=MAX)
        below = live(2, MAX - 1, epoch=MAX - 1, version=MAX - 1)
        zero = live(3, self.later, epoch=0, version=0)
        assert await one.write([top, below, zero]) == [Answer(True, None)] * 3
        for row in (top, below, zero):
            assert await one.load(row.handle) == row
        assert await one.write([
            top._replace(version=MAX - 1, body=b"older"), below._replace(version=MAX), zero._replace(version=1)
        ]) == [Answer(False, top.mark), Answer(True, below.mark), Answer(True, zero.mark)]  # fmt: skip
        assert await one.load(top.handle) == top
        assert await one.load(below.handle) == below._replace(version=MAX)

    @scenario
    async def test_rows_are_ordered_as_numbers_the_epoch_first(self, one: Backend) -> None:
        """9 is before 10 and 99 before 100, in both numbers; a greater version of an older epoch is older."""
        steps = [
            (9, 9),
            (9, 10),
            (9, 100),
            (10, 1),
            (10, 2**31),
            (10, 2**32),
            (99, 7),
            (100, 0),
            (2**32, 5),
            (2**41, 1),
        ]
        before = None
        for number, (epoch, version) in enumerate(steps):
            row = live(1, self.later, epoch=epoch, version=version, body=b"%d" % number)
            assert await one.write([row]) == [Answer(True, before)], (epoch, version)
            before = row.mark
            for older in steps[:number]:
                stale = live(1, self.later, epoch=older[0], version=older[1], body=b"stale")
                assert await one.write([stale]) == [Answer(False, before)], (older, (epoch, version))
            assert await one.load(row.handle) == row

    @scenario
    async def test_what_replaces_what_is_decided_by_wins(self, one: Backend) -> None:
        """Every state over every state, older, equal and newer in both numbers; refused rows leave all as it was."""
        numbers = [(1, 9), (2, 4), (2, 5), (2, 6), (3, 1)]
        cases = [(old, new, at) for old in State for new in State for at in numbers]
        olds = [row_of(old, n, self.later, epoch=2, version=5) for n, (old, _, _) in enumerate(cases)]
        news = [row_of(new, n, self.later, epoch=at[0], version=at[1]) for n, (_, new, at) in enumerate(cases)]
        assert await one.write(olds) == [Answer(True, None)] * len(olds)
        expected = [wins(new, old.mark) for old, new in zip(olds, news, strict=True)]
        assert await one.write(news) == [
            Answer(won, old.mark) for won, old in zip(expected, olds, strict=True)
        ]  # fmt: skip
        for won, old, new in zip(expected, olds, news, strict=True):
            stored = new if won else old
            assert await one.load(stored.handle) == (None if stored.state is State.ERASED else stored), (old, new)
            assert await stands(one, stored.handle) == stored.mark, (old, new)

    @scenario
    async def test_an_equal_row_changes_nothing(self, one: Backend) -> None:
        """The same epoch and version again is refused: a batch may be sent twice."""
        row = live(1, self.later, epoch=3, version=3, user=user_of(1), body=b"first")
        gone = erased(2, self.later, epoch=3, version=3)
        await one.write([row, gone])
        again = [row._replace(body=b"second", user=user_of(2)), live(2, self.later, epoch=3, version=3)]
        assert await one.write(again) == [Answer(False, row.mark), Answer(False, gone.mark)]
        assert await one.load(row.handle) == row
        assert await one.load(gone.handle) is None
        assert await one.sessions_of(user_of(2)) == []

    @scenario
    async def test_death_beats_everything_and_leaves_neither_body_nor_user(self, one: Backend) -> None:
        """A DEAD row replaces newer ones too, and is loaded as DEAD: who asks must learn that it was destroyed."""
        rows = [live(n, self.later, epoch=5, version=n, user=user_of(1), body=b"secret") for n in range(1, 4)]
        await one.write(rows)
        ends = [dead(n, self.later, epoch=1, version=1) for n in range(1, 5)]
        assert await one.write(ends) == [*(Answer(True, row.mark) for row in rows), Answer(True, None)]
        for end in ends:
            assert await one.load(end.handle) == end
        assert (await one.count(), await handles_in(one), await one.sessions_of(user_of(1))) == (0, [], [])

    @scenario
    async def test_nothing_revives_the_dead(self, one: Backend) -> None:
        """However new it is, and whoever sends it in whatever batch, what comes after death is refused."""
        await one.write([live(1, self.later, version=3), live(2, self.later, version=3)])
        ends = [dead(1, self.later, version=2), dead(2, self.later, version=4)]
        await one.write(ends)
        for state in (State.LIVE, State.ERASED):
            late = [row_of(state, n, self.later, epoch=MAX, version=MAX) for n in (1, 2)]
            assert await one.write(late) == [Answer(False, end.mark) for end in ends]
        for end in ends:
            assert await one.load(end.handle) == end
            assert await one.sessions_of(user_of(1)) == []

    @scenario
    async def test_an_erased_row_is_missing_and_only_a_newer_one_replaces_it(self, one: Backend) -> None:
        """It keeps its place in the order, and neither the body nor the user that were there."""
        await one.write([live(1, self.later, version=4, user=user_of(1), body=b"secret")])
        assert await one.write([erased(1, self.later, version=5)]) == [Answer(True, Mark(State.LIVE, 1, 4))]
        assert await one.load(handle_of(1)) is None
        assert (await one.count(), await handles_in(one), await one.sessions_of(user_of(1))) == (0, [], [])
        place = Mark(State.ERASED, 1, 5)
        assert await one.write([live(1, self.later, version=4)]) == [Answer(False, place)]
        assert await one.load(handle_of(1)) is None
        again = live(1, self.later, version=6, user=user_of(1), body=b"again")
        assert await one.write([again]) == [Answer(True, place)]
        assert await one.load(handle_of(1)) == again

    @scenario
    async def test_the_horizon_is_the_later_of_both_whichever_row_wins(self, one: Backend) -> None:
        """It never shrinks, and a refused row may move it. What stood in between shows when death comes last."""
        cases = [(o, n, v, h) for o in State for n in State for v in (4, 5, 6) for h in (-1000, 0, 1000)]
        olds = [row_of(old, n, self.later, epoch=1, version=5) for n, (old, _, _, _) in enumerate(cases)]
        news = [
            row_of(new, n, self.later + shift, epoch=1, version=version)
            for n, (_, new, version, shift) in enumerate(cases)
        ]
        await one.write(olds)
        await one.write(news)
        kept = [max(self.later, new.horizon) for new in news]
        for old, new, horizon in zip(olds, news, kept, strict=True):
            found = await one.load(new.handle)
            assert found is None or found.horizon == horizon, (old, new)
        await one.write([dead(number, 0) for number in range(len(cases))])
        for old, new, horizon in zip(olds, news, kept, strict=True):
            found = await one.load(new.handle)
            assert found is not None, (old, new)
            assert found.horizon == horizon, (old, new)

    @scenario
    async def test_a_batch_of_500_is_answered_row_by_row_in_its_order(self, one: Backend) -> None:
        """New, newer, older, equal and refused by death, shuffled: each answer belongs to its row."""
        await one.write([row_of(State(n % 3 + 1), n, self.later, epoch=1, version=5 + n % 7) for n in range(400)])
        batch = [row_of(State((n // 3) % 3 + 1), n, self.later, epoch=1, version=8) for n in range(500)]
        random.Random("batch").shuffle(batch)  # noqa: S311  # for tests
        before = {
            handle_of(n): Mark(State(n % 3 + 1), 1, 5 + n % 7) if n < 400 else None for n in range(500)
        }  # fmt: skip
        expected = [Answer(wins(row, before[row.handle]), before[row.handle]) for row in batch]
        assert {answer.applied for answer in expected} == {True, False}
        assert await one.write(batch) == expected
        for row, answer in zip(batch, expected, strict=True):
            if answer.applied:
                assert await one.load(row.handle) == (None if row.state is State.ERASED else row)

    @scenario
    async def test_what_is_answered_is_seen_by_all(self, one: Backend, two: Backend) -> None:
        """Another object, of another process for all it knows, sees a row as soon as its write is answered."""
        for version in range(1, 21):
            row = live(1, self.later, version=version, user=user_of(version), body=b"%d" % version)
            await (one, two)[version % 2].write([row])
            for reader in (one, two):
                assert await reader.load(row.handle) == row
                assert await reader.sessions_of(row.user) == [row]
                assert await reader.sessions_of(user_of(version - 1)) == []


class _Listings(Case):
    """Counts, listings, and what takes many rows away."""

    @scenario
    async def test_the_users_listing_follows_the_row(self, one: Backend) -> None:
        """Login, change of user, logout, erasing and death: a user's LIVE rows as they are now, and no others."""
        ada, ben = user_of(1), user_of(2)

        async def after(row: Row) -> tuple[list[Row], list[Row]]:
            await one.write([row])
            return await one.sessions_of(ada), await one.sessions_of(ben)

        guest = live(1, self.later, version=1)
        assert await after(guest) == ([], [])
        login = guest._replace(version=2, user=ada)
        assert await after(login) == ([login], [])
        late = live(1, self.later, version=1, user=ben)
        assert await after(late) == ([login], []), "a refused row changed the listing"
        more = login._replace(version=3, body=b"more")
        assert await after(more) == ([more], [])
        change = more._replace(version=4, user=ben)
        assert await after(change) == ([], [change])
        logout = change._replace(version=5, user=b"")
        assert await after(logout) == ([], [])
        back = logout._replace(version=6, user=ada)
        assert await after(back) == ([back], [])
        assert await after(erased(1, self.later, version=7)) == ([], [])
        again = back._replace(version=8)
        assert await after(again) == ([again], [])
        assert await after(dead(1, self.later, version=9)) == ([], [])

    @scenario
    async def test_a_user_may_have_many_sessions(self, one: Backend) -> None:
        """All of them are listed, with their bodies, and none of anybody else."""
        mine = [live(n, self.later, user=user_of(1), body=b"%d" % n) for n in range(120)]
        others = [live(n, self.later, user=user_of(2)) for n in range(200, 230)]
        guests = [live(n, self.later) for n in range(300, 330)]
        await one.write([*others, *mine, *guests])
        await one.write([dead(n, self.later) for n in range(0, 120, 3)])
        assert sorted(await one.sessions_of(user_of(1))) == sorted(row for n, row in enumerate(mine) if n % 3)
        assert sorted(await one.sessions_of(user_of(2))) == sorted(others)

    @scenario
    async def test_nobody_is_the_user_of_anonymous_sessions(self, one: Backend) -> None:
        """Asked for the sessions of no user it lists none: whoever revokes them must not end everybody's."""
        await one.write([live(1, self.later), live(2, self.later, user=user_of(1))])
        assert await one.sessions_of(b"") == []

    @scenario
    async def test_count_and_handles_are_of_the_live_rows_each_once(self, one: Backend) -> None:
        """Over more rows than a backend is likely to read at once."""
        states = {n: State(n % 7 % 3 + 1) for n in range(2500)}
        for start in range(0, 2500, 500):
            await one.write([row_of(states[n], n, self.later, epoch=1, version=1) for n in range(start, start + 500)])
        expected = sorted(handle_of(n) for n, state in states.items() if state is State.LIVE)
        assert await handles_in(one) == expected
        assert await one.count() == len(expected)

    @scenario
    async def test_handles_may_be_listed_while_rows_come_and_go(self, one: Backend, two: Backend) -> None:
        """What stays is listed, nothing is listed twice, and who stops in the middle may ask again."""
        await one.write([live(n, self.later) for n in range(1500)])
        seen: list[bytes] = []
        number = 0
        async for handle in one.handles():
            seen.append(handle)
            if len(seen) % 100 == 0:
                await two.write([live(5000 + number, self.later), dead(number, self.later)])
                number += 1
        assert number >= 10
        assert len(seen) == len(set(seen)), "a handle was listed twice"
        assert {handle_of(n) for n in range(number, 1500)} <= set(seen)
        async for _ in one.handles():
            break
        assert await handles_in(one) == await handles_in(two)

    @scenario
    async def test_sweep_takes_only_what_is_past_its_horizon_of_any_state(self, one: Backend) -> None:
        """What ends at `now` itself stays; what went is neither loaded nor listed nor in the way of a new row."""
        now = self.later
        old = [row_of(State(n % 3 + 1), n, now - 1 - n, epoch=2, version=2) for n in range(1, 10)]
        kept = [row_of(State(n % 3 + 1), n, now + n - 20, epoch=2, version=2) for n in range(20, 29)]
        await one.write([*old, *kept])
        swept = await one.sweep(now, 100)
        assert swept <= len(old)
        for row in kept:
            assert await one.load(row.handle) == (None if row.state is State.ERASED else row)
            assert await stands(one, row.handle) == row.mark
            assert not row.user or await one.sessions_of(row.user) == [row]
        if one.expires:
            return
        assert swept == len(old)
        assert await one.sweep(now, 100) == 0
        assert await one.count() == sum(row.state is State.LIVE for row in kept)
        for row in old:
            assert await one.load(row.handle) is None
            assert not row.user or await one.sessions_of(row.user) == []
        again = [live(n, now, epoch=1, version=1) for n in range(1, 10)]
        assert await one.write(again) == [Answer(True, None)] * len(again)

    @scenario
    async def test_sweep_takes_at_most_as_many_rows_as_it_is_told(self, one: Backend) -> None:
        """So that it holds nobody up; it says how many went, and the rest goes the next times."""
        now = self.later
        await one.write([row_of(State(n % 3 + 1), n, now - 1, epoch=1, version=1) for n in range(10)])
        went = [await one.sweep(now, limit) for limit in (4, 4, 4, 4)]
        assert went == [4, 4, 2, 0] or (one.expires and sum(went) <= 10 and max(went) <= 4)

    @scenario
    async def test_a_row_that_was_prolonged_is_not_swept_at_its_first_horizon(self, one: Backend) -> None:
        """Also when only a refused row prolonged it."""
        first, now = self.later, self.later + 10_000
        await one.write([live(1, first, version=5), live(2, first, version=5), dead(3, first)])
        newer = live(1, now, version=6)
        await one.write([newer, live(2, now, version=4), live(3, now, version=9)])
        await one.sweep(now, 100)
        assert await one.load(handle_of(1)) == newer
        assert await one.load(handle_of(2)) == live(2, now, version=5)
        assert await one.load(handle_of(3)) == dead(3, now)

    @scenario
    async def test_a_row_past_its_horizon_is_there_or_gone(self, one: Backend) -> None:
        """Written too late, it is applied all the same, and a longer one replaces it."""
        stale = live(1, 1000, version=1)
        assert await one.write([stale]) == [Answer(True, None)]
        assert await one.load(stale.handle) in (stale, None)
        row = live(1, self.later, version=2, body=b"new")
        (answer,) = await one.write([row])
        assert answer.applied
        assert answer.before in (stale.mark, None)
        assert await one.load(row.handle) == row

    @scenario
    async def test_clear_destroys_what_lives_and_what_was_erased(self, one: Backend) -> None:
        """Each becomes a DEAD row without body and user; what was dead stays so; only the LIVE are counted."""
        rows = [row_of(State(n % 3 + 1), n, self.later + n, epoch=2, version=3) for n in range(1, 1300)]
        for start in range(0, len(rows), 500):
            await one.write(rows[start : start + 500])
        assert await one.clear() == sum(row.state is State.LIVE for row in rows)
        for row in rows[::41]:
            found = await one.load(row.handle)
            assert found is not None, f"{row} did not become a dead one"
            assert (found.state, found.horizon, found.user, found.body) == (State.DEAD, row.horizon, b"", b"")
            assert await one.sessions_of(row.user or user_of(0)) == []
        assert (await one.count(), await handles_in(one), await one.clear()) == (0, [], 0)
        late = [live(n, self.later, epoch=MAX, version=MAX) for n in range(1, 40)]
        assert not any(answer.applied for answer in await one.write(late))

    @scenario
    async def test_the_sentinel_is_stored_like_a_row_and_counted_nowhere(self, one: Backend) -> None:
        """It is loaded, and replaced by newer ones only; no listing shows it and neither sweep nor clear takes it."""
        sentinel = Row(SENTINEL, State.LIVE, 3, 1, FOREVER, user_of(1), b"whose tables these are")
        assert await one.write([sentinel]) == [Answer(True, None)]
        other = live(1, self.later, user=user_of(1))
        await one.write([other])
        assert (await one.count(), await handles_in(one)) == (1, [other.handle])
        assert await one.sessions_of(user_of(1)) == [other]
        assert await one.sweep(FOREVER, 100) <= 1
        await one.write([live(2, self.later)])
        assert await one.clear() <= 2
        assert await one.load(SENTINEL) == sentinel
        assert await one.write([sentinel._replace(epoch=2, body=b"older")]) == [Answer(False, sentinel.mark)]
        newer = sentinel._replace(epoch=4, body=b"newer")
        assert await one.write([newer]) == [Answer(True, sentinel.mark)]
        assert await one.load(SENTINEL) == newer
        assert (await one.count(), await handles_in(one)) == (0, [])


class _Life(Case):
    """Opening, closing, and the schema."""

    @scenario
    async def test_it_says_what_it_is(self) -> None:
        """A name without credentials in it, and two flags."""
        backend = self.backend()
        assert backend.name
        assert "@" not in backend.name
        assert isinstance(backend.remote, bool)
        assert isinstance(backend.expires, bool)

    @scenario
    async def test_initialize_again_changes_nothing(self, one: Backend, two: Backend) -> None:
        """Nor does another object's, while rows are written."""
        row = live(1, self.later, user=user_of(1))
        await one.write([row])
        await one.initialize()
        await two.initialize()
        assert (await one.load(row.handle), await two.load(row.handle)) == (row, row)
        await asyncio.gather(one.write([live(2, self.later)]), two.initialize(), one.initialize())
        assert await one.count() == 2

    @scenario
    async def test_initialize_may_be_called_by_several_at_once(self) -> None:
        """All workers of a new application start at the same moment, on a database that has no schema yet."""
        backends = [self.backend() for _ in range(5)]
        await asyncio.gather(*(backend.open() for backend in backends))
        try:
            await asyncio.gather(*(backend.initialize() for backend in backends))
            rows = [live(number, self.later) for number in range(5)]
            await asyncio.gather(*(backend.write([row]) for backend, row in zip(backends, rows, strict=True)))
            assert [await backend.count() for backend in backends] == [5] * 5
        finally:
            for backend in backends:
                await backend.close()

    @scenario
    async def test_closing_twice_or_without_opening_does_nothing(self) -> None:
        """So that whoever ends need not know how far it came."""
        unopened, opened = self.backend(), self.backend()
        await unopened.close()
        await opened.open()
        await opened.initialize()
        await opened.close()
        await opened.close()

    @scenario
    async def test_rows_survive_a_close_and_the_object_may_be_opened_again(self) -> None:
        """By itself and by another one."""
        row, backend, other = live(1, self.later, user=user_of(1)), self.backend(), self.backend()
        for turn in range(3):
            await backend.open()
            try:
                await backend.initialize()
                assert await backend.load(row.handle) == (row if turn else None)
                assert [answer.applied for answer in await backend.write([row])] == [not turn]
            finally:
                await backend.close()
        await other.open()
        try:
            assert await other.load(row.handle) == row
        finally:
            await other.close()


class BackendContract(_Rows, _Listings, _Life, Races):
    """Subclass it, give it `backend`, and pytest (or unittest, beside TestCase) runs the contract over your backend.

    `backend()` returns a new, unopened object each time. All that one test asks for are on the same database, which
    is empty when the test begins: make it in `setup_method` or in an autouse fixture. No plugin is needed: every test
    runs an event loop of its own.
    """
