"""Who delivers a lane, in a simulated fleet with clocks that differ, deaths, pauses, partitions and a database that is
away: never two that commit, never long without one, and each its fair share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pytest
from support.fleet import TIMEOUT_S, TRIP_S, Fleet, Work
from support.fleet_lanes import TICK_S, Broken, Decide, Lanes, Row, Step, decide, name_of

from sidecar.delivery import leases
from sidecar.ledger.lanes import LANES

EXPIRY_S, ROUND_S = leases.LEASE_S, leases.RENEW_S
TROUBLE_S = (0.5, 4, EXPIRY_S, 3 * EXPIRY_S)  # how long one lasts, give or take a half
CALM_S = 1.5 * 3 * EXPIRY_S + EXPIRY_S + 4 * ROUND_S + TIMEOUT_S
# A sidecar that was cut off sits out a request before it looks again, and its takes are one after the other.
SLACK_S = 0.1 * ROUND_S + TIMEOUT_S + 2 * TICK_S + 2 * LANES * TRIP_S[1]
POLICY = partial(decide, round_s=ROUND_S)


def plan(me: str, rows: Sequence[Row], seen_s: Mapping[str, float]) -> Step:
    """The one that sidecars have."""
    alive = [name for name, age_s in seen_s.items() if age_s < leases.MEMBER_S]
    found = leases.plan(me, [leases.Lease(row.lane, row.holder, row.epoch, row.left_s > 0) for row in rows], alive)
    return Step(renew=found.keep, release=found.give, take=found.take)


POLICIES: Mapping[str, Decide] = {"simple": POLICY, "plan": plan}
# What a lane may be without a holder: a sidecar that looked once and died keeps its share for a while.
GAP_S = EXPIRY_S + leases.MEMBER_S + ROUND_S
both = pytest.mark.parametrize("named", POLICIES)


def simulated(
    seed: int,
    *,
    sidecars: int,
    minutes: float = 5.0,
    policy: Decide = POLICY,
    fenced: bool = True,
    trouble: bool = True,
) -> tuple[Fleet, Lanes]:
    """A run; with trouble, and quiet enough at its end for the last of it to be over."""
    fleet = Fleet(seed)
    lanes = Lanes(fleet, policy, expiry_s=EXPIRY_S, round_s=ROUND_S, fenced=fenced)
    for number in range(sidecars):
        one = fleet.add(f"sidecar-{number:03}")
        fleet.start(one, lanes.rounds(one))
    if trouble:
        fleet.spawn(None, troubles(fleet, lanes, minutes * 60 - CALM_S))
    fleet.run(minutes * 60)
    return fleet, lanes


def troubles(fleet: Fleet, lanes: Lanes, until_s: float) -> Work:
    chance = fleet.chance
    while True:
        yield chance.expovariate(1 / 8)
        if fleet.now_s >= until_s:
            return
        one = chance.choice(list(fleet.sidecars.values()))
        for_s = chance.choice(TROUBLE_S) * chance.uniform(0.5, 1.5)
        lanes.watch()
        match chance.randrange(6):
            case 0 if one.alive:
                fleet.kill(one)
                fleet.spawn(None, again(fleet, lanes, one.name), for_s)
            case 1 if one.alive:  # in good order
                if fleet.reaches(one):
                    lanes.leave(one)
                fleet.kill(one)
                fleet.spawn(None, again(fleet, lanes, one.name), for_s)
            case 2:
                one.paused_until_s = max(fleet.now_s + for_s, one.paused_until_s)  # it is not woken sooner
            case 3:
                one.parted_until_s = fleet.now_s + for_s
            case 4:
                fleet.database_away_until_s = fleet.now_s + for_s
            case _ if len(fleet.sidecars) < 60:
                new = fleet.add(f"sidecar-{len(fleet.sidecars):03}")
                fleet.start(new, lanes.rounds(new))
            case _:
                pass


def again(fleet: Fleet, lanes: Lanes, name: str) -> Work:
    yield 0.0
    one = fleet.sidecars[name]
    if not one.alive:
        fleet.start(one, lanes.rounds(one))


@both
@pytest.mark.parametrize("sidecars", [1, 2, 3, 7, 16, 40])
def test_a_lane_has_one_that_commits_and_is_never_long_without(sidecars: int, named: str) -> None:
    """`Broken` is raised under way where two commit, or a request is sent twice by one or under two numbers."""
    assert holds(sidecars, sidecars, named)


@pytest.mark.long
@pytest.mark.timeout(600)
@both
@pytest.mark.parametrize("sidecars", [2, 3, 20])
def test_many_more_runs(sidecars: int, named: str) -> None:
    told = [holds(seed, sidecars, named) for seed in range(1000, 1100)]
    assert sum(told) > len(told) // 2


def holds(seed: int, sidecars: int, named: str) -> bool:
    """Whether the run says much: somebody was deposed in the middle of its work."""
    fleet, lanes = simulated(seed, sidecars=sidecars, policy=POLICIES[named])
    assert lanes.longest_gap_s <= GAP_S + SLACK_S
    assert lanes.longest_unfair_s <= EXPIRY_S + 3 * ROUND_S + SLACK_S
    for queue in lanes.queues:
        assert queue.settled >= queue.cursor - 1 > 0
    shares = [
        len([1 for lease in lanes.rows if lease.holder == name_of(one)]) for one in fleet.sidecars.values() if one.alive
    ]
    assert sum(shares) == LANES
    assert max(shares) - min(shares) <= 1
    return bool(lanes.refused) and any(len(epochs) > 1 for epochs in lanes.sent.values())


@both
def test_the_lanes_of_one_that_dies_are_held_again_within_the_expiry_and_a_round(named: str) -> None:
    for sidecars in (2, 3, 7, 16, 40):
        fleet = Fleet(sidecars)
        lanes = Lanes(fleet, POLICIES[named], expiry_s=EXPIRY_S, round_s=ROUND_S)
        for number in range(sidecars):
            one = fleet.add(f"sidecar-{number:03}")
            fleet.start(one, lanes.rounds(one))
        fleet.run(60)
        lanes.longest_gap_s = 0.0
        before = [lease.epoch for lease in lanes.rows]
        (first, *_) = fleet.sidecars.values()
        his = [number for number, lease in enumerate(lanes.rows) if lease.holder == name_of(first)]
        fleet.kill(first)
        fleet.run(120)
        assert lanes.longest_gap_s <= EXPIRY_S + ROUND_S + SLACK_S
        moved = [number for number, lease in enumerate(lanes.rows) if lease.epoch != before[number]]
        assert set(his) <= set(moved)
        assert len(moved) <= len(his) + 1, "lanes that nobody lost have changed their holder"


@both
def test_an_end_in_good_order_is_a_gap_of_a_round(named: str) -> None:
    fleet, lanes = simulated(1, sidecars=3, policy=POLICIES[named], trouble=False, minutes=1)
    lanes.longest_gap_s = 0.0
    first = fleet.sidecars["sidecar-000"]
    lanes.leave(first)
    fleet.kill(first)
    fleet.run(120)
    assert 0 < lanes.longest_gap_s <= 2 * ROUND_S + SLACK_S


@both
def test_quiet_is_quiet(named: str) -> None:
    """Without trouble nothing moves once it is shared out."""
    fleet, lanes = simulated(5, sidecars=5, policy=POLICIES[named], trouble=False, minutes=1)
    before = [(lease.holder, lease.epoch) for lease in lanes.rows]
    lanes.refused = 0
    lanes.sent.clear()
    fleet.run(600)
    assert [(lease.holder, lease.epoch) for lease in lanes.rows] == before
    assert lanes.refused == 0
    assert all(len(epochs) == 1 for epochs in lanes.sent.values())


def test_a_run_is_the_same_each_time() -> None:
    runs = [simulated(7, sidecars=3, minutes=2)[1] for _ in range(2)]
    assert runs[0].sent == runs[1].sent
    assert runs[0].owners == runs[1].owners


# What the simulation would not let pass.


def test_without_the_check_of_the_epoch_two_would_commit() -> None:
    with pytest.raises(Broken):
        for seed in range(20):
            simulated(seed, sidecars=3, fenced=False)


def test_who_takes_all_that_is_free_is_seen_to_be_unfair() -> None:
    def greedy(me: str, rows: Sequence[Row], seen_s: Mapping[str, float]) -> Step:
        mine = [row.lane for row in rows if row.holder == me and row.left_s > 0]
        return Step(renew=mine, take=[row.lane for row in rows if row.left_s <= 0])

    _, lanes = simulated(1, sidecars=3, policy=greedy, minutes=2, trouble=False)
    assert lanes.longest_unfair_s > EXPIRY_S + 3 * ROUND_S + SLACK_S


def test_who_counts_the_dead_for_ever_leaves_lanes_without_a_holder() -> None:
    def timid(me: str, rows: Sequence[Row], seen_s: Mapping[str, float]) -> Step:
        return decide(me, rows, dict.fromkeys(seen_s, 0.0), round_s=1e9)

    _, lanes = simulated(1, sidecars=3, policy=timid, minutes=3)
    assert lanes.longest_gap_s > EXPIRY_S + 2 * ROUND_S + SLACK_S
