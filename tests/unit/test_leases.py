"""Who delivers which lane: shares as arithmetic, and leases with their epochs in a real database."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.delivery.lane_database import Deposed, Held, LaneDatabase, LaneReading, lanes_read
from sidecar.delivery.leases import Lease, Leases, plan, share_of
from sidecar.delivery.rows import StateError
from sidecar.ledger.lanes import LANES
from sidecar.storage.postgres import Postgres, call

names = st.sampled_from([f"sidecar-{n}" for n in range(6)])
rows = st.lists(
    st.builds(lambda holder, runs: (holder, runs), st.none() | names, st.booleans()), min_size=1, max_size=20
).map(lambda all_: [Lease(lane, holder, 1, runs) for lane, (holder, runs) in enumerate(all_)])


@given(st.sets(names, min_size=1), st.integers(1, 40))
def test_the_shares_of_all_are_all_lanes_and_differ_by_one(alive: set[str], lanes: int) -> None:
    shares = [share_of(me, alive, lanes) for me in alive]
    assert sum(shares) == lanes
    assert max(shares) - min(shares) <= 1


@given(names, rows, st.sets(names))
def test_a_plan_keeps_within_its_share_and_takes_only_what_is_free(
    me: str, leases: Sequence[Lease], alive: set[str]
) -> None:
    found = plan(me, leases, alive)
    mine = {one.lane for one in leases if one.holder == me and one.runs}
    anothers = {one.lane for one in leases if one.holder not in (None, me) and one.runs}
    assert {*found.keep, *found.give} == mine
    assert len(found.keep) + len(found.give) == len(mine)
    assert not {*found.take} & (mine | anothers)
    share = share_of(me, alive, len(leases))
    assert len(found.keep) + len(found.take) <= share
    free = len(leases) - len(mine) - len(anothers)
    assert len(found.take) == min(free, share - len(found.keep))  # no lane lies still that is due to somebody who looks


@given(rows, st.sets(names, min_size=1), st.randoms(use_true_random=False))
def test_whoever_looks_when_all_end_with_their_shares(leases: list[Lease], alive: set[str], chance: object) -> None:
    leases = [one if one.holder in alive else replace(one, runs=False) for one in leases]
    order = sorted(alive)
    for _ in range(3):
        chance.shuffle(order)  # type: ignore[attr-defined]
        for me in order:
            found = plan(me, leases, alive)
            for lane in found.give:
                leases[lane] = Lease(lane, None, leases[lane].epoch, runs=False)
            for lane in found.take:
                leases[lane] = Lease(lane, me, leases[lane].epoch + 1, runs=True)
    for me in alive:
        assert sum(one.holder == me and one.runs for one in leases) == share_of(me, alive, len(leases))


# --- in the database ----------------------------------------------------------------------------------


@pytest.fixture
async def database(postgres_database: str) -> AsyncIterator[Postgres]:
    found = Postgres(postgres_database, name="test")
    await Leases(found, "anybody").prepare()
    yield found
    await found.close()


async def run_out(database: Postgres, name: str) -> None:
    """As if it had been silent for as long as leases last."""
    async with database.transaction() as db:
        for table in ("lane_leases", "lane_members"):
            await db.execute(
                f"UPDATE metering.{table} SET expires = clock_timestamp() - interval '1 ms' WHERE holder = $1", name
            )


async def test_a_newcomer_gets_its_share_and_nobody_loses_what_is_not_given(database: Postgres) -> None:
    one, two = Leases(database, "one"), Leases(database, "two")
    assert len(await one.round()) == LANES
    assert await one.surplus() == ()
    assert await two.round() == {}
    surplus = await one.surplus()
    assert len(surplus) == LANES // 2
    assert one.unheld == 0
    assert len(await one.round()) == LANES  # held until it is released
    for lane in surplus:
        await one.release(lane)
    await one.surplus()
    assert one.unheld == LANES // 2
    held = await two.round()
    await one.surplus()
    assert one.unheld == 0
    assert set(held) == set(surplus)
    assert set(await one.round()) == set(range(LANES)) - set(surplus)
    assert {found.epoch for found in held.values()} == {2}


async def test_the_lanes_of_who_is_silent_are_taken_and_it_finds_out(database: Postgres) -> None:
    one, two = Leases(database, "one"), Leases(database, "two")
    before = await one.round()
    await two.round()
    await run_out(database, "one")
    await two.surplus()
    assert two.unheld == LANES
    after = await two.round()
    assert set(after) == set(range(LANES))
    assert all(after[lane].epoch > before[lane].epoch for lane in before)
    assert await one.round() == {}


async def test_a_run_before_under_the_same_name_is_not_believed(database: Postgres) -> None:
    before = await Leases(database, "one").round()
    after = await Leases(database, "one").round()
    assert set(after) == set(before)
    assert all(after[lane].epoch == before[lane].epoch + 1 for lane in before)


async def test_who_leaves_gives_all_back_at_once(database: Postgres) -> None:
    one, two = Leases(database, "one"), Leases(database, "two")
    await one.round()
    await two.round()
    await one.leave()
    assert len(await two.round()) == LANES


async def test_two_that_look_at_once_share_without_a_lane_that_both_hold(database: Postgres) -> None:
    all_ = [Leases(database, f"sidecar-{n}") for n in range(4)]
    for _ in range(2):
        await asyncio.gather(*(one.round() for one in all_))
        for one in all_:
            for lane in await one.surplus():
                await one.release(lane)
    await asyncio.gather(*(one.round() for one in all_))
    assert sorted(lane for one in all_ for lane in one.held) == list(range(LANES))
    assert [len(one.held) for one in all_] == [LANES // 4] * 4


# --- who was deposed ----------------------------------------------------------------------------------


@pytest.fixture
def shared(postgres_database: str) -> Iterator[Postgres]:
    """For `call`'s event loop."""
    found = Postgres(postgres_database, name="test")
    call(Leases(found, "anybody").prepare())
    yield found
    call(found.close())


def count(shared: Postgres, lane: int) -> int:
    with closing(LaneReading(shared, lane)) as reading, reading.reading() as connection:
        return int(connection.execute("SELECT count(*) FROM backend").fetchone()[0])


def note(lane: LaneDatabase, name: str) -> None:
    with lane.writing() as connection:
        connection.execute("INSERT INTO backend(name, since_s) VALUES(?, ?)", (name, 1.0))


def test_a_deposed_holder_commits_nothing(shared: Postgres) -> None:
    held = call(Leases(shared, "one").round())
    old = LaneDatabase(shared, held[3])
    note(old, "first")
    call(run_out(shared, "one"))
    new = LaneDatabase(shared, call(Leases(shared, "two").round())[3])
    with pytest.raises(Deposed, match=r"lane 3 .* another sidecar's by now"):
        note(old, "second")
    note(new, "third")
    assert count(shared, 3) == 2


def test_the_same_name_of_another_epoch_is_deposed_as_well(shared: Postgres) -> None:
    held = call(Leases(shared, "one").round())[0]
    lane = LaneDatabase(shared, held)
    call(Leases(shared, "one").round())
    with pytest.raises(Deposed):
        note(lane, "first")
    assert count(shared, 0) == 0


def test_a_lane_is_taken_over_only_between_two_steps(shared: Postgres, postgres_database: str) -> None:
    """A step that is being made is either whole before the change of the holder, or fails."""
    held = call(Leases(shared, "one").round())
    lane = LaneDatabase(shared, held[5])
    call(run_out(shared, "one"))
    taken: dict[int, Held] = {}
    other = Postgres(postgres_database, name="other")
    taking = threading.Thread(target=lambda: taken.update(call(Leases(other, "two").round())))
    with lane.writing() as connection:
        taking.start()
        for _ in range(600):
            if call(waiting(shared)):
                break
            taking.join(0.05)
        assert call(waiting(shared)), "whoever takes the lane does not wait for the step"
        connection.execute("INSERT INTO backend(name, since_s) VALUES(?, ?)", ("first", 1.0))
    taking.join(30.0)
    call(other.close())
    assert taken[5].epoch == held[5].epoch + 1
    with pytest.raises(Deposed):
        note(lane, "second")
    assert count(shared, 5) == 1


async def waiting(database: Postgres) -> bool:
    async with database.transaction() as db:
        return bool(await db.fetchval("SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"))


def test_who_only_reads_is_told_where_nobody_ever_delivered(postgres_database: str) -> None:
    with pytest.raises(StateError, match="start a sidecar of it first"), lanes_read(postgres_database):
        pass
