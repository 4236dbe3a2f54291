"""The part of the contract that needs several at once, or many steps: races, cancelling, and a comparison."""

import asyncio
import random
import threading
from collections.abc import Iterable, Sequence
from typing import Final

from shmsession.backends import Answer, Backend, Mark, Row, State, wins

from .rows import Case, handle_of, handles_in, live, row_of, scenario, user_of

_WRITERS: Final = 4
_HANDLES: Final = 12

Sent = list[tuple[Row, Answer]]


class Races(Case):
    """Several writers on the same rows, and one that gives up."""

    steps = 300
    """How many steps the comparison with a model takes."""

    seed: int | str | None = None
    """Of all that is random; a failure names it. None: another one each time."""

    def _random(self) -> tuple[random.Random, str]:
        seed = random.SystemRandom().randrange(2**32) if self.seed is None else self.seed
        return random.Random(seed), f"seed = {seed!r}"  # noqa: S311  # for tests

    def _batches(self, writer: int, chance: random.Random) -> Iterable[list[Row]]:
        """What one of several writers sends; no other one sends the same numbers."""
        for step in range(15):
            chosen = chance.sample(range(_HANDLES), chance.randrange(1, _HANDLES + 1))
            states = chance.choices([*State], [40, 10, 1], k=len(chosen))
            version = (step + chance.randrange(-3, 4)) * _WRITERS * 100 + step * _WRITERS + writer + 10_000
            yield [row_of(s, n, self.later, epoch=1, version=version) for s, n in zip(states, chosen, strict=True)]

    @scenario
    async def test_of_several_that_write_the_same_rows_the_winner_stays(self, one: Backend, two: Backend) -> None:
        """Interleaved on one event loop: all answers tell one story, and it ends with what is stored."""
        chance, seed = self._random()
        sent: Sent = []

        async def work(writer: int, backend: Backend) -> None:
            for batch in self._batches(writer, random.Random(chance.random())):  # noqa: S311  # for tests
                sent.extend(zip(batch, await backend.write(batch), strict=True))

        await asyncio.gather(*(work(writer, (one, two)[writer % 2]) for writer in range(_WRITERS)))
        await tell_one_story(one, sent, seed)

    @scenario
    async def test_the_winner_stays_also_among_threads(self, one: Backend) -> None:
        """Each writer on an object and an event loop of its own, in a thread of its own, as in several processes."""
        chance, seed = self._random()
        sent: Sent = []
        failures: list[BaseException] = []
        together = threading.Barrier(_WRITERS)

        async def write(batches: Iterable[list[Row]]) -> None:
            backend = self.backend()
            await backend.open()
            try:
                together.wait(60)
                for batch in batches:
                    sent.extend(zip(batch, await backend.write(batch), strict=True))
            finally:
                await backend.close()

        def work(batches: Iterable[list[Row]]) -> None:
            try:
                asyncio.run(write(batches))
            except BaseException as error:  # noqa: BLE001  # raised in the test's own thread
                failures.append(error)
                together.abort()

        seeds = [chance.random() for _ in range(_WRITERS)]
        threads = [
            threading.Thread(target=work, args=(self._batches(writer, random.Random(value)),), daemon=True)  # noqa: S311
            for writer, value in enumerate(seeds)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        for failure in failures:
            raise failure
        await tell_one_story(one, sent, seed)

    @scenario
    async def test_a_session_is_never_there_without_its_users_entry(self, one: Backend, two: Backend) -> None:
        """Who revokes a user's sessions while one is being stored either finds it or comes before it."""
        busy = True

        async def store() -> None:
            nonlocal busy
            for number in range(0, 120, 3):
                await one.write([live(n, self.later, user=user_of(1)) for n in range(number, number + 3)])
            busy = False

        async def watch() -> int:
            seen = 0
            while busy:
                present = [n for n in range(120) if await two.load(handle_of(n))]
                listed = {row.handle for row in await two.sessions_of(user_of(1))}
                missing = [n for n in present if handle_of(n) not in listed]
                assert not missing, f"loaded, but not listed: {missing}"
                seen = len(present)
            return seen

        await asyncio.gather(store(), watch())
        assert len(await two.sessions_of(user_of(1))) == 120

    @scenario
    async def test_many_may_ask_at_once(self, one: Backend) -> None:
        """More questions than a backend has connections, on one object: each gets its own answer."""
        rows = [live(n, self.later, user=user_of(n), body=b"%d" % n) for n in range(60)]
        await one.write(rows)
        assert await asyncio.gather(*(one.load(row.handle) for row in rows)) == rows
        assert await asyncio.gather(*(one.sessions_of(row.user) for row in rows)) == [[row] for row in rows]
        assert set(await asyncio.gather(*(one.count() for _ in range(20)))) == {60}

    @scenario
    async def test_who_gives_up_waiting_leaves_nothing_half_done(self, one: Backend, two: Backend) -> None:
        """A cancelled write or load, at whatever point: what it had to store is there whole or not at all."""
        await one.write([live(0, self.later)])
        for version in range(2, 50, 2):
            row = live(1, self.later, version=version, user=user_of(version), body=b"%d" % version * 1000)
            tasks = [asyncio.ensure_future(one.write([row])), asyncio.ensure_future(one.load(handle_of(0)))]
            for _ in range(version // 2 % 8):
                await asyncio.sleep(0)
            if version > 24:
                await asyncio.sleep((version - 24) / 20_000)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            found = await one.load(row.handle)
            assert found is None or found.body == b"%d" % found.version * 1000
            sure = row._replace(version=version + 1, body=b"%d" % (version + 1) * 1000)
            (answer,) = await one.write([sure])
            assert answer.applied
            assert await two.load(row.handle) == sure
            assert await two.sessions_of(row.user) == [sure]
        assert await one.load(handle_of(0)) == live(0, self.later)

    @scenario
    async def test_a_long_sequence_of_steps_does_what_a_dict_does(self, one: Backend, two: Backend) -> None:
        """Random writes, sweeps, clears and questions, compared with a model at every step."""
        chance, seed = self._random()
        model, start = Model(expires=one.expires), self.later
        for step in range(self.steps):
            backend, where = chance.choice((one, two)), f"{seed}, step {step}"
            match chance.choices(("write", "look", "sweep", "clear"), (74, 20, 5, 1))[0]:
                case "write":
                    batch = random_batch(chance, step // 2, start)
                    assert await backend.write(batch) == model.write(batch), where
                    for row in batch:
                        assert await backend.load(row.handle) == model.load(row.handle), where
                case "look":
                    await self._compare(backend, model, where)
                case "sweep":
                    now, limit = start + chance.randrange(3000), chance.randrange(1, 40)
                    if not one.expires:  # which of the swept rows go first is the backend's choice: so all must
                        went = [await backend.sweep(now, limit)]
                        while went[-1] == limit:
                            went.append(await backend.sweep(now, limit))
                        assert sum(went) == model.sweep(now), where
                case _:
                    assert await backend.clear() == model.clear(), where
        await self._compare(two, model, f"{seed}, at the end")

    async def _compare(self, backend: Backend, model: "Model", where: str) -> None:
        expected = model.live()
        assert await backend.count() == len(expected), where
        assert await handles_in(backend) == sorted(row.handle for row in expected), where
        for number in range(4):
            listed = sorted(row for row in expected if row.user == user_of(number))
            assert sorted(await backend.sessions_of(user_of(number))) == listed, where


class Model:
    """What a backend does, in a dict."""

    def __init__(self, *, expires: bool) -> None:
        self.rows: dict[bytes, Row] = {}
        self.expires = expires

    def load(self, handle: bytes) -> Row | None:
        """See Backend.load."""
        row = self.rows.get(handle)
        return row if row and row.state is not State.ERASED else None

    def write(self, batch: Sequence[Row]) -> list[Answer]:
        """See Backend.write."""
        answers = []
        for row in batch:
            old = self.rows.get(row.handle)
            before = old.mark if old else None
            won = wins(row, before)
            horizon = max(row.horizon, old.horizon) if old else row.horizon
            self.rows[row.handle] = (row if won or not old else old)._replace(horizon=horizon)
            answers.append(Answer(won, before))
        return answers

    def live(self) -> list[Row]:
        """All LIVE rows."""
        return [row for row in self.rows.values() if row.state is State.LIVE]

    def sweep(self, now: int) -> int:
        """How many rows are past their horizon; they go."""
        old = [row.handle for row in self.rows.values() if row.horizon < now]
        for handle in old:
            del self.rows[handle]
        return len(old)

    def clear(self) -> int:
        """See Backend.clear."""
        count = len(self.live())
        for row in self.rows.values():
            self.rows[row.handle] = row._replace(state=State.DEAD, user=b"", body=b"")
        return count


def random_batch(chance: random.Random, first: int, start: int) -> list[Row]:
    """Rows of few handles and small numbers, so that they meet; horizons within three seconds of `start`.

    The handles move on with `first`: those that have died are left behind.
    """
    batch = []
    for number in chance.sample(range(first, first + 24), chance.randrange(1, 12)):
        state = chance.choices([*State], [80, 15, 5])[0]
        row = row_of(
            state, number, start + chance.randrange(3000), epoch=chance.randrange(1, 3), version=chance.randrange(1, 9)
        )
        if state is State.LIVE:
            user = chance.choice([b"", *map(user_of, range(4))])
            row = row._replace(user=user, body=chance.randbytes(chance.randrange(60)))
        batch.append(row)
    return batch


async def tell_one_story(backend: Backend, sent: Sent, seed: str) -> None:
    """Whether some order of the writes explains all answers, row by row, and ends with what is stored.

    Each applied row says after which one it came, so that the applied rows of a handle form a chain; every refused row
    was refused by a link of it.
    """
    applied = [answer.applied for _, answer in sent]
    assert True in applied
    assert False in applied, f"{seed}: nobody met anybody"
    for handle in {row.handle for row, _ in sent}:
        here = [(row, answer) for row, answer in sent if row.handle == handle]
        after: dict[Mark | None, Row] = {}
        for row, answer in here:
            assert answer.applied == wins(row, answer.before), f"{seed}: {row}, {answer}"
            if answer.applied:
                assert answer.before not in after, f"{seed}: two rows replaced {answer.before}"
                after[answer.before] = row
        chain: list[Mark] = []
        last: Row | None = None
        while (following := after.pop(chain[-1] if chain else None, None)) is not None:
            last = following
            chain.append(following.mark)
        assert not after, f"{seed}: {[*after]} was replaced, but never stood there"
        for row, answer in here:
            assert answer.applied or answer.before in chain, f"{seed}: {row}, {answer}"
        found = await backend.load(handle)
        assert last is not None
        assert found == (None if last.state is State.ERASED else last), seed
        best = max((row for row, _ in here), key=lambda row: (row.state is State.DEAD, row.epoch, row.version))
        assert (last.state is State.DEAD) == (best.state is State.DEAD), seed
        assert last.state is State.DEAD or last == best, seed
