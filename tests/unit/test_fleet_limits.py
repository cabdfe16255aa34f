"""A limit that a simulated fleet shares: it is never granted twice, whoever dies or is cut off, and used to its end."""

from __future__ import annotations

import pytest
from support.fleet import Fleet, Work
from support.fleet_limits import SharedLimit, Size

from sidecar.gate.counters import LEASE_CALLS_MAX, LEASE_PARTS

LEASE_S, TELL_S = 5.0, 1.0
CALL_MAX = 5


def size(left: int, need: int, holders: int) -> int:
    """As between processes: a fiftieth of what is left, and none where that is not even a call."""
    lease = min(left // LEASE_PARTS, need * LEASE_CALLS_MAX)
    return lease if lease >= need else 0


def shared(left: int, need: int, holders: int) -> int:
    """As sidecars that share a limit are granted it, at a rate that wants all that may be leased ahead."""
    shares = pytest.importorskip("sidecar.gate.shares", reason="limits are not shared in this tree")
    ahead = shares.ahead_of(1e9, left + need)
    return int(shares.granted(keep=0, demand=need, ahead=ahead, room=left + need)) - need


SIZES = {"processes": size, "sidecars": shared}
both = pytest.mark.parametrize("named", SIZES)


def simulated(
    seed: int,
    *,
    sidecars: int,
    amount: int,
    of: Size = size,
    trouble: bool = True,
    seconds: float = 60.0,
    counts_held: bool = True,
) -> SharedLimit:
    """Calls for four times what is allowed, in so many seconds; with trouble for two thirds of it."""
    fleet = Fleet(seed)
    limit = SharedLimit(fleet, amount, of, lease_s=LEASE_S, tell_s=TELL_S, counts_held=counts_held)
    rate = 4 * amount / (seconds * sidecars * (CALL_MAX + 1) / 2)
    for number in range(sidecars):
        one = fleet.add(f"sidecar-{number:03}")
        fleet.start(one, limit.serves(one, rate, CALL_MAX))
    if trouble:
        fleet.spawn(None, troubles(fleet, limit, rate, seconds * 2 / 3))
    fleet.run(seconds)
    return limit


def troubles(fleet: Fleet, limit: SharedLimit, rate: float, until_s: float) -> Work:
    chance = fleet.chance
    while fleet.now_s < until_s:
        yield chance.expovariate(len(fleet.sidecars) / 6)
        one = chance.choice(list(fleet.sidecars.values()))
        for_s = chance.choice((0.3, LEASE_S, 3 * LEASE_S)) * chance.uniform(0.5, 1.5)
        match chance.randrange(4):
            case 0 if one.alive:
                fleet.kill(one)
                fleet.spawn(None, again(fleet, limit, one.name, rate), for_s)
            case 1:
                one.paused_until_s = fleet.now_s + for_s
            case 2:
                one.parted_until_s = fleet.now_s + for_s
            case _:
                fleet.database_away_until_s = fleet.now_s + for_s / 3


def again(fleet: Fleet, limit: SharedLimit, name: str, rate: float) -> Work:
    yield 0.0
    one = fleet.sidecars[name]
    if not one.alive:
        fleet.start(one, limit.serves(one, rate, CALL_MAX))


@pytest.mark.parametrize(("sidecars", "amount"), [(3, 100), (3, 2_000), (10, 2_000), (100, 100), (100, 2_000)])
@both
def test_without_trouble_a_limit_is_used_to_its_last_call_and_never_beyond(
    sidecars: int, amount: int, named: str
) -> None:
    limit = simulated(amount + sidecars, sidecars=sidecars, amount=amount, of=SIZES[named], trouble=False)
    assert amount - CALL_MAX < limit.through <= amount
    assert limit.denied
    assert not any(limit.dropped)


@pytest.mark.parametrize("sidecars", [3, 10, 100])
@pytest.mark.parametrize("seed", range(3))
@both
def test_with_trouble_it_is_over_by_no_more_than_what_was_held_when_a_lease_was_over(
    seed: int, sidecars: int, named: str
) -> None:
    assert holds(seed, sidecars, SIZES[named]), "no lease was lost: the run says little"


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sidecars", [3, 30])
def test_many_more_runs(sidecars: int) -> None:
    lost = [holds(seed, sidecars) for seed in range(1000, 1050)]
    assert any(lost)


def holds(seed: int, sidecars: int, of: Size = size) -> list[int]:
    amount = 2_000
    limit = simulated(seed, sidecars=sidecars, amount=amount, of=of)
    lost = [one for one in limit.dropped if one]
    assert limit.through <= amount + sum(lost)
    assert limit.largest <= amount // LEASE_PARTS
    # What is lost is a lease and what calls were open; those are at most as many as came in the time that one takes.
    assert max(lost, default=0) <= limit.largest + limit.open_most
    assert limit.through > amount // 2
    return lost


# What the simulation would not let pass.


def test_what_is_held_and_not_counted_is_let_through_twice() -> None:
    limit = simulated(0, sidecars=3, amount=2_000, counts_held=False, trouble=False)
    assert limit.through > 2_000 + sum(limit.dropped)


def test_a_large_lease_is_a_large_loss() -> None:
    limit = simulated(0, sidecars=3, amount=2_000, of=half)
    assert limit.largest > 2_000 // LEASE_PARTS


def half(left: int, need: int, holders: int) -> int:
    return left // 2
