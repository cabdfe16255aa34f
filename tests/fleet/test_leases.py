"""Who delivers which lane: shares as arithmetic, and leases with their epochs in a real database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.delivery import lane_database, leases
from sidecar.delivery.lane_database import Deposed, LaneDatabase, LaneReading, lanes_read
from sidecar.delivery.leases import LEASE_S, MEMBER_S, Lease, Leases, plan, share_of
from sidecar.delivery.rows import StateBusy, StateError
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
        await one.release(one.held[lane])
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
                await one.release(one.held[lane])
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


def test_a_lane_is_taken_over_only_between_two_steps_and_nobody_waits_for_one(
    shared: Postgres, postgres_database: str
) -> None:
    """A step that is being made is whole before the change of the holder. The others are not held up by it."""
    held = call(Leases(shared, "one").round())
    lane = LaneDatabase(shared, held[5])
    call(run_out(shared, "one"))
    other = Postgres(postgres_database, name="other")
    two = Leases(other, "two")
    with lane.writing() as connection:
        assert set(call(two.round())) == {*range(LANES)} - {5}
        connection.execute("INSERT INTO backend(name, since_s) VALUES(?, ?)", ("first", 1.0))
    assert call(two.round())[5].epoch == held[5].epoch + 1
    call(other.close())
    with pytest.raises(Deposed):
        note(lane, "second")
    assert count(shared, 5) == 1


def test_a_step_that_hangs_keeps_no_lease_from_being_renewed(shared: Postgres, postgres_database: str) -> None:
    other = Postgres(postgres_database, name="other")
    one = Leases(other, "one")
    held = call(one.round())
    with LaneDatabase(shared, held[5]).writing() as connection:
        connection.execute("SELECT 1").fetchone()
        assert call(one.round()) == held
    call(other.close())


def test_a_step_whose_sidecar_falls_silent_is_ended_by_the_server(
    shared: Postgres, postgres_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The power of its host is cut, or the network: nothing tells the server, and nobody else could take the lane."""
    silent = "SET LOCAL idle_in_transaction_session_timeout = '200ms'"
    monkeypatch.setattr(lane_database, "SILENT", silent)
    held = call(Leases(shared, "one").round())
    lane = LaneDatabase(shared, held[5])
    other = Postgres(postgres_database, name="other")
    two = Leases(other, "two")
    with pytest.raises(StateBusy, match=r"connection .* lost"), lane.writing() as connection:
        connection.execute("INSERT INTO backend(name, since_s) VALUES(?, ?)", ("first", 1.0))
        call(run_out(other, "one"))
        for _ in range(600):
            if 5 in call(two.round()):
                break
            time.sleep(0.05)
        assert two.held[5].epoch == held[5].epoch + 1
        connection.execute("SELECT 1").fetchone()
    call(other.close())
    assert count(shared, 5) == 0


def test_what_was_given_back_late_is_not_what_was_taken_anew(shared: Postgres) -> None:
    one = Leases(shared, "one")
    before = call(one.round())[5]
    call(run_out(shared, "one"))
    after = call(one.round())
    assert after[5].epoch == before.epoch + 1
    call(one.release(before))
    assert call(one.round()) == after


@pytest.mark.parametrize("off_s", [-600.0, 600.0])
def test_leases_go_by_the_clock_of_the_database_alone(
    shared: Postgres, off_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar whose clocks are off by minutes takes nothing from others, and loses nothing."""
    real_s, real_mono_s = time.time(), time.monotonic()
    one, two = Leases(shared, "one"), Leases(shared, "two")
    held = call(one.round())
    monkeypatch.setattr(time, "time", lambda: real_s + off_s)
    monkeypatch.setattr(time, "monotonic", lambda: real_mono_s + off_s)
    assert call(two.round()) == {}
    assert call(one.round()) == held
    [(least, most)] = call(left_s(shared))
    assert 0 < least <= most <= LEASE_S


async def left_s(database: Postgres) -> list[tuple[float, float]]:
    """The shortest and the longest time that a lease has still to go."""
    async with database.transaction() as db:
        rows = await db.fetch(
            "SELECT min(left_s)::float8, max(left_s)::float8 FROM"
            " (SELECT extract(epoch FROM expires - clock_timestamp()) AS left_s FROM metering.lane_leases) AS leases"
        )
    return [tuple(row) for row in rows]


async def test_one_that_came_and_died_keeps_its_share_for_a_few_rounds_and_not_for_a_lease(database: Postgres) -> None:
    """It came when another had just died, so it had no lane of its own yet: its share would lie still."""
    one, newcomer = Leases(database, "one"), Leases(database, "newcomer")
    await Leases(database, "dead").round()
    await one.round()
    await newcomer.round()
    await run_out(database, "dead")
    assert len(await one.round()) == LANES // 2
    async with database.transaction() as db:
        left_s = await db.fetchval(
            "SELECT extract(epoch FROM expires - clock_timestamp())::float8 FROM metering.lane_members"
            " WHERE holder = 'newcomer'"
        )
    assert left_s <= MEMBER_S < LEASE_S
    await run_out(database, "newcomer")
    assert len(await one.round()) == LANES


async def test_who_is_late_and_counts_no_more_keeps_what_it_has(
    database: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = Leases(database, "one"), Leases(database, "two")
    await one.round()
    await two.round()
    for lane in await one.surplus():
        await one.release(one.held[lane])
    assert len(await two.round()) == len(one.held) == LANES // 2
    monkeypatch.setattr(leases, "_MEMBER", timedelta(0))
    await two.round()  # and is forgotten at once
    assert len(await one.round()) == len(one.held) == LANES // 2
    assert len(await two.round()) == LANES // 2


def test_who_only_reads_is_told_where_nobody_ever_delivered(postgres_database: str) -> None:
    with pytest.raises(StateError, match="start a sidecar of it first"), lanes_read(postgres_database):
        pass
