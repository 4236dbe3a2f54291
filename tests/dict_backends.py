"""A backend in a dict that keeps the contract, and many that each break it in one place."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final, TypeVar

from shmsession.backends import SENTINEL, Answer, Mark, Row, State, wins

# ── backends that keep the contract ───────────────────────────────────────────────────────────────────────────


class Rows(dict[bytes, Row]):
    """The database of DictBackends: those of one test share it."""

    ready = False
    unlisted: frozenset[bytes] = frozenset()

    def __init__(self, *rows: dict[bytes, Row]) -> None:
        super().__init__(*rows)
        self.lock = threading.Lock()


class DictBackend:
    """The contract in a dict, cut into pieces of which each can be broken."""

    name = "dict"
    remote = False
    expires = False

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def initialize(self) -> None:
        self.rows.ready = True

    def replaces(self, row: Row, before: Mark | None) -> bool:
        return wins(row, before)

    def horizon(self, row: Row, old: Row | None) -> int:
        return max(row.horizon, old.horizon) if old else row.horizon

    def kept(self, row: Row, old: Row | None) -> Row:
        """The row that is stored when `row` replaces `old`."""
        return row

    def is_visible(self, row: Row) -> bool:
        return row.state is not State.ERASED

    async def load(self, handle: bytes) -> Row | None:
        await asyncio.sleep(0)
        row = self.rows.get(handle)
        return row if row and self.is_visible(row) else None

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        await asyncio.sleep(0)
        with self.rows.lock:
            return [self.put(row) for row in rows]

    def put(self, row: Row) -> Answer:
        old = self.rows.get(row.handle)
        before = old.mark if old else None
        applied = self.replaces(row, before)
        stored = self.kept(row, old) if applied or not old else old
        self.rows[row.handle] = stored._replace(horizon=self.horizon(row, old))
        return Answer(applied, before)

    def is_past(self, row: Row, now: int) -> bool:
        return row.horizon < now

    async def sweep(self, now: int, limit: int) -> int:
        old = list(itertools.islice((h for h, row in list(self.rows.items()) if self.is_past(row, now)), limit))
        for handle in old:
            self.rows.pop(handle, None)
        return len(old)

    def is_listed(self, row: Row) -> bool:
        return row.state is State.LIVE and row.handle != SENTINEL

    async def count(self) -> int:
        return sum(map(self.is_listed, list(self.rows.values())))

    async def handles(self) -> AsyncIterator[bytes]:
        for handle, row in list(self.rows.items()):
            if self.is_listed(row):
                yield handle

    async def sessions_of(self, user: bytes) -> list[Row]:
        await asyncio.sleep(0)
        return [row for row in list(self.rows.values()) if self.is_listed(row) and user and row.user == user]

    def cleared(self, row: Row) -> Row:
        return row._replace(state=State.DEAD, user=b"", body=b"")

    async def clear(self) -> int:
        count = await self.count()
        for handle, row in list(self.rows.items()):
            if handle != SENTINEL:
                self.rows[handle] = self.cleared(row)
        return count


class ExpiringBackend(DictBackend):
    """Rows vanish by themselves, so that there is nothing to sweep."""

    expires = True

    def drop(self) -> None:
        now = time.time_ns() // 1_000_000
        for handle, row in list(self.rows.items()):
            if row.horizon < now:
                self.rows.pop(handle, None)

    async def load(self, handle: bytes) -> Row | None:
        self.drop()
        return await super().load(handle)

    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        self.drop()
        return await super().write(rows)

    async def sweep(self, now: int, limit: int) -> int:
        return 0


# ── backends that break it ────────────────────────────────────────────────────────────────────────────────────

Broken = TypeVar("Broken", bound=type[DictBackend])

BROKEN: Final[list[tuple[type[DictBackend], str]]] = []
"""Each with the name of a test that must notice, without its `test_`."""


def fails(*tests: str) -> Callable[[Broken], Broken]:
    def decorate(broken: Broken) -> Broken:
        BROKEN.extend((broken, test) for test in tests)
        return broken

    return decorate


def place(mark: Mark | Row) -> tuple[int, int]:
    return mark.epoch, mark.version


@fails("what_was_never_written_is_missing")
class RaisesForMissing(DictBackend):
    async def load(self, handle: bytes) -> Row | None:
        return self.rows[handle]


@fails("what_was_never_written_is_missing")
class AnswersAnEmptyBatch(DictBackend):
    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        return await super().write(rows) or [Answer(False, None)]


@fails("a_live_row_comes_back_as_it_was_written")
class ForgetsTheTypeOfStates(DictBackend):
    async def load(self, handle: bytes) -> Row | None:
        row = await super().load(handle)
        return row and row._replace(state=int(row.state))  # type: ignore[arg-type]


@fails("bodies_are_kept_byte_for_byte")
class TakesBodiesForText(DictBackend):
    def kept(self, row: Row, old: Row | None) -> Row:
        return row._replace(body=row.body.decode(errors="replace").encode())


@fails("bodies_are_kept_byte_for_byte")
class CutsBodies(DictBackend):
    def kept(self, row: Row, old: Row | None) -> Row:
        return row._replace(body=row.body[:65_535])


@fails("bodies_are_kept_byte_for_byte")
class StripsBodies(DictBackend):
    def kept(self, row: Row, old: Row | None) -> Row:
        return row._replace(body=row.body.strip())


@fails("handles_and_users_are_kept_byte_for_byte", "numbers_are_exact_up_to_two_to_the_53rd")
class StripsZerosOfUsersAndCutsNumbers(DictBackend):
    def kept(self, row: Row, old: Row | None) -> Row:
        return row._replace(user=row.user.strip(b"\0"), version=min(row.version, 2**53 - 2))


@fails("handles_and_users_are_kept_byte_for_byte")
class TakesHandlesForText(DictBackend):
    async def handles(self) -> AsyncIterator[bytes]:
        async for handle in super().handles():
            yield handle.strip()


@fails("numbers_are_exact_up_to_two_to_the_53rd")
class TakesZeroForNothing(DictBackend):
    def put(self, row: Row) -> Answer:
        applied, before = super().put(row)
        return Answer(applied, before if before and before.epoch else None)


@fails("rows_are_ordered_as_numbers_the_epoch_first", "what_replaces_what_is_decided_by_wins")
class OrdersByVersionAlone(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        return wins(row, before and before._replace(epoch=row.epoch))


@fails("rows_are_ordered_as_numbers_the_epoch_first")
class OrdersNumbersAsText(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        if before is None or State.DEAD in (row.state, before.state):
            return wins(row, before)
        return (str(row.epoch), str(row.version)) > (str(before.epoch), str(before.version))


@fails("rows_are_ordered_as_numbers_the_epoch_first")
class CutsVersionsTo31Bits(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        return wins(
            row._replace(version=row.version % 2**31), before and before._replace(version=before.version % 2**31)
        )


@fails("an_equal_row_changes_nothing", "what_replaces_what_is_decided_by_wins")
class LetsEqualsOverwrite(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        return wins(row, before) or (
            before is not None and before.state is not State.DEAD and place(row) == place(before)
        )


@fails("an_equal_row_changes_nothing", "what_is_answered_is_seen_by_all")
class ListsWhatWasRefused(DictBackend):
    async def sessions_of(self, user: bytes) -> list[Row]:
        return [row for row in self.rows.values() if self.users.get(row.handle, b"") == user and self.is_listed(row)]

    def put(self, row: Row) -> Answer:
        self.users[row.handle] = row.user
        return super().put(row)

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.users: dict[bytes, bytes] = {}


@fails("death_beats_everything_and_leaves_neither_body_nor_user", "what_replaces_what_is_decided_by_wins")
class LetsTheDeadBeNewerOnly(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        return wins(row, before) and (before is None or place(row) > place(before))


@fails("death_beats_everything_and_leaves_neither_body_nor_user", "the_users_listing_follows_the_row")
class ListsTheDeadUnderTheirUsers(DictBackend):
    def kept(self, row: Row, old: Row | None) -> Row:
        return row._replace(user=old.user) if old and row.state is State.DEAD else row

    async def sessions_of(self, user: bytes) -> list[Row]:
        return [row for row in self.rows.values() if row.state is not State.ERASED and row.user == user]


@fails("death_beats_everything_and_leaves_neither_body_nor_user")
class KeepsTheBodiesOfTheDead(DictBackend):
    def kept(self, row: Row, old: Row | None) -> Row:
        return row._replace(body=old.body) if old and row.state is State.DEAD else row


@fails("death_beats_everything_and_leaves_neither_body_nor_user")
class TakesTheDeadForMissing(DictBackend):
    def is_visible(self, row: Row) -> bool:
        return row.state is State.LIVE


@fails("nothing_revives_the_dead", "of_several_that_write_the_same_rows_the_winner_stays")
class RevivesTheDead(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        return before is None or row.state is State.DEAD or place(row) > place(before)


@fails("an_erased_row_is_missing_and_only_a_newer_one_replaces_it", "what_replaces_what_is_decided_by_wins")
class DeletesTheErased(DictBackend):
    def put(self, row: Row) -> Answer:
        answer = super().put(row)
        if answer.applied and row.state is State.ERASED:
            del self.rows[row.handle]
        return answer


@fails("an_erased_row_is_missing_and_only_a_newer_one_replaces_it")
class LoadsTheErased(DictBackend):
    def is_visible(self, row: Row) -> bool:
        return True


@fails("the_horizon_is_the_later_of_both_whichever_row_wins")
class ShrinksHorizons(DictBackend):
    def horizon(self, row: Row, old: Row | None) -> int:
        return row.horizon if self.replaces(row, old and old.mark) or old is None else max(row.horizon, old.horizon)


@fails(
    "the_horizon_is_the_later_of_both_whichever_row_wins", "a_row_that_was_prolonged_is_not_swept_at_its_first_horizon"
)
class KeepsTheHorizonWhenItRefuses(DictBackend):
    def horizon(self, row: Row, old: Row | None) -> int:
        return old.horizon if old and not self.replaces(row, old.mark) else super().horizon(row, old)


@fails("a_batch_of_500_is_answered_row_by_row_in_its_order")
class AnswersInTheOrderOfHandles(DictBackend):
    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        return await super().write(sorted(rows))


@fails("a_batch_of_500_is_answered_row_by_row_in_its_order")
class AnswersOnlyWhatItApplied(DictBackend):
    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        return [answer for answer in await super().write(rows) if answer.applied]


@fails("a_batch_of_500_is_answered_row_by_row_in_its_order", "the_winner_stays_also_among_threads")
class AnswersWhatStandsThereNow(DictBackend):
    def put(self, row: Row) -> Answer:
        applied, _ = super().put(row)
        return Answer(applied, self.rows[row.handle].mark)


@fails("what_is_answered_is_seen_by_all", "initialize_again_changes_nothing")
class RemembersWhatItLoaded(DictBackend):
    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.known: dict[bytes, Row | None] = {}

    async def load(self, handle: bytes) -> Row | None:
        if handle not in self.known:
            self.known[handle] = await super().load(handle)
        return self.known[handle]

    async def initialize(self) -> None:
        self.rows.clear()


@fails("nobody_is_the_user_of_anonymous_sessions")
class ListsTheAnonymous(DictBackend):
    async def sessions_of(self, user: bytes) -> list[Row]:
        return [row for row in self.rows.values() if self.is_listed(row) and row.user == user]


@fails("a_user_may_have_many_sessions")
class ListsTheFirstHundred(DictBackend):
    async def sessions_of(self, user: bytes) -> list[Row]:
        return (await super().sessions_of(user))[:64]


@fails("count_and_handles_are_of_the_live_rows_each_once", "handles_may_be_listed_while_rows_come_and_go")
class ListsOnePageOfHandles(DictBackend):
    async def handles(self) -> AsyncIterator[bytes]:
        for handle in [handle async for handle in super().handles()][:1000]:
            yield handle


@fails("count_and_handles_are_of_the_live_rows_each_once")
class CountsEveryRow(DictBackend):
    async def count(self) -> int:
        return len(self.rows)


@fails("handles_may_be_listed_while_rows_come_and_go")
class CannotListWhileRowsCome(DictBackend):
    async def handles(self) -> AsyncIterator[bytes]:
        for handle, row in self.rows.items():
            if self.is_listed(row):
                yield handle


@fails("handles_may_be_listed_while_rows_come_and_go")
class ListsByOffset(DictBackend):
    """What is written in front of an offset moves the rest, and one is listed twice."""

    async def handles(self) -> AsyncIterator[bytes]:
        for offset in itertools.count():
            handles = sorted(handle for handle, row in self.rows.items() if self.is_listed(row))
            if offset >= len(handles):
                return
            yield handles[offset]


@fails("sweep_takes_only_what_is_past_its_horizon_of_any_state")
class SweepsEarly(DictBackend):
    def is_past(self, row: Row, now: int) -> bool:
        return row.horizon <= now


@fails("sweep_takes_only_what_is_past_its_horizon_of_any_state")
class SweepsTheDeadOnly(DictBackend):
    def is_past(self, row: Row, now: int) -> bool:
        return row.horizon < now and row.state is State.DEAD


@fails("sweep_takes_at_most_as_many_rows_as_it_is_told")
class SweepsWithoutLimit(DictBackend):
    async def sweep(self, now: int, limit: int) -> int:
        return await super().sweep(now, len(self.rows))


@fails("sweep_takes_at_most_as_many_rows_as_it_is_told", "a_long_sequence_of_steps_does_what_a_dict_does")
class SaysNotHowManyItSwept(DictBackend):
    async def sweep(self, now: int, limit: int) -> int:
        return min(1, await super().sweep(now, limit))


@fails("a_row_past_its_horizon_is_there_or_gone")
class RefusesWhatIsPastItsHorizon(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        return row.horizon > time.time_ns() // 1_000_000 and super().replaces(row, before)


@fails("clear_destroys_what_lives_and_what_was_erased", "a_long_sequence_of_steps_does_what_a_dict_does")
class ClearsByDeleting(DictBackend):
    async def clear(self) -> int:
        count = await self.count()
        sentinel = self.rows.get(SENTINEL)
        self.rows.clear()
        if sentinel:
            self.rows[SENTINEL] = sentinel
        return count


@fails("clear_destroys_what_lives_and_what_was_erased")
class LeavesTheErasedWhenItClears(DictBackend):
    def cleared(self, row: Row) -> Row:
        return row if row.state is State.ERASED else super().cleared(row)


@fails("clear_destroys_what_lives_and_what_was_erased")
class ClearsWithoutErasing(DictBackend):
    def cleared(self, row: Row) -> Row:
        return row._replace(state=State.DEAD)


@fails("clear_destroys_what_lives_and_what_was_erased")
class CountsTheErasedItClears(DictBackend):
    async def clear(self) -> int:
        await super().clear()
        return len(self.rows)


@fails("the_sentinel_is_stored_like_a_row_and_counted_nowhere")
class CountsTheSentinel(DictBackend):
    async def count(self) -> int:
        return await super().count() + (SENTINEL in self.rows)


@fails("the_sentinel_is_stored_like_a_row_and_counted_nowhere")
class ListsTheSentinel(DictBackend):
    def is_listed(self, row: Row) -> bool:
        return row.state is State.LIVE


@fails("the_sentinel_is_stored_like_a_row_and_counted_nowhere")
class ListsTheSentinelUnderAUser(DictBackend):
    async def sessions_of(self, user: bytes) -> list[Row]:
        return [row for row in self.rows.values() if row.state is State.LIVE and row.user == user]


@fails("the_sentinel_is_stored_like_a_row_and_counted_nowhere")
class ClearsTheSentinel(DictBackend):
    async def clear(self) -> int:
        count = await super().clear()
        self.rows.pop(SENTINEL, None)
        return count


@fails("the_sentinel_is_stored_like_a_row_and_counted_nowhere")
class SweepsTheSentinel(DictBackend):
    def is_past(self, row: Row, now: int) -> bool:
        return row.horizon < now + 1


@fails("the_sentinel_is_stored_like_a_row_and_counted_nowhere")
class OverwritesTheSentinel(DictBackend):
    def replaces(self, row: Row, before: Mark | None) -> bool:
        return row.handle == SENTINEL or super().replaces(row, before)


@fails("it_says_what_it_is")
class TellsItsPassword(DictBackend):
    name = "dict://ada:secret@localhost"


@fails("it_says_what_it_is")
class HasNoFlag(DictBackend):
    remote = None  # type: ignore[assignment]


@fails("initialize_may_be_called_by_several_at_once", "initialize_again_changes_nothing")
class InitializesOnce(DictBackend):
    async def initialize(self) -> None:
        if self.rows.ready:
            raise RuntimeError("table exists")
        self.rows.ready = True


@fails("initialize_may_be_called_by_several_at_once")
class RacesForTheSchema(DictBackend):
    async def initialize(self) -> None:
        if not self.rows.ready:
            await asyncio.sleep(0)
            if self.rows.ready:
                raise RuntimeError("table exists")
            self.rows.ready = True


class WithState(DictBackend):
    """Knows whether it is open."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows)
        self.state = "new"

    async def open(self) -> None:
        self.state = "open"


@fails("closing_twice_or_without_opening_does_nothing")
class CannotCloseTwice(WithState):
    async def close(self) -> None:
        if self.state == "closed":
            raise RuntimeError("closed")
        self.state = "closed"


@fails("closing_twice_or_without_opening_does_nothing")
class CannotCloseUnopened(WithState):
    async def close(self) -> None:
        if self.state == "new":
            raise RuntimeError("not open")


@fails("rows_survive_a_close_and_the_object_may_be_opened_again")
class CannotOpenAgain(WithState):
    async def open(self) -> None:
        if self.state == "closed":
            raise RuntimeError("closed for good")

    async def close(self) -> None:
        self.state = "closed"


@fails("rows_survive_a_close_and_the_object_may_be_opened_again")
class LosesRowsWhenItCloses(DictBackend):
    async def close(self) -> None:
        self.rows.clear()


@fails("of_several_that_write_the_same_rows_the_winner_stays")
class LooksFirstAndWritesLater(DictBackend):
    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        seen = Rows(self.rows)
        await asyncio.sleep(0)
        answers = [DictBackend(seen).put(row) for row in rows]
        self.rows.update({row.handle: seen[row.handle] for row in rows})
        return answers


@fails("the_winner_stays_also_among_threads")
class IsOnlySafeOnOneEventLoop(DictBackend):
    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        return [self.put(row) for row in rows]

    def kept(self, row: Row, old: Row | None) -> Row:
        time.sleep(0.0002)
        return row


@fails("a_session_is_never_there_without_its_users_entry")
class ListsLater(DictBackend):
    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        self.rows.unlisted = frozenset(row.handle for row in rows)
        answers = await super().write(rows)
        for _ in range(len(self.rows)):
            await asyncio.sleep(0)
        self.rows.unlisted = frozenset()
        return answers

    async def sessions_of(self, user: bytes) -> list[Row]:
        return [row for row in await super().sessions_of(user) if row.handle not in self.rows.unlisted]


class Counting(DictBackend):
    """Knows how many ask."""

    asking = 0

    async def load(self, handle: bytes) -> Row | None:
        self.check()
        self.asking += 1
        found = await super().load(handle)
        self.asking -= 1
        return found

    def check(self) -> None:
        pass


@fails("many_may_ask_at_once")
class HasTenConnections(Counting):
    def check(self) -> None:
        if self.asking >= 10:
            raise RuntimeError("no connection left")


@fails("who_gives_up_waiting_leaves_nothing_half_done")
class LosesAConnectionToTheCancelled(Counting):
    def check(self) -> None:
        if self.asking >= 2:
            raise RuntimeError("no connection left")


@fails("who_gives_up_waiting_leaves_nothing_half_done")
class WritesInTwoSteps(DictBackend):
    async def write(self, rows: Sequence[Row]) -> list[Answer]:
        answers = await super().write(rows)
        whole = [(row.handle, row.body) for row, answer in zip(rows, answers, strict=True) if answer.applied]
        self.rows.update({handle: self.rows[handle]._replace(body=b"") for handle, _ in whole})
        await asyncio.sleep(0)
        self.rows.update({handle: self.rows[handle]._replace(body=body) for handle, body in whole})
        return answers


@fails("a_long_sequence_of_steps_does_what_a_dict_does")
class ForgetsAUserAtTheFourthChange(DictBackend):
    def kept(self, row: Row, old: Row | None) -> Row:
        return row._replace(user=b"") if row.version == 7 and old and old.version == 4 else row
