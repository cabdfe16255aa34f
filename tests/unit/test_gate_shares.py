"""How much one of many sidecars leases, whatever they ask for and settle, in any order."""

from __future__ import annotations

import random

import pytest

from sidecar.gate.shares import PARTS, USED_S, Share, ahead_of, granted, shift_of


@pytest.mark.parametrize("seed", range(200))
def test_what_is_granted_and_settled_is_never_more_than_the_limit_and_all_of_it_can_be_used(seed: int) -> None:
    chance = random.Random(seed)
    amount = chance.choice([1, 7, 100, 5_000, 10**15])
    size = max(amount // chance.choice([10, 100, 1000]), 1)
    shares = [Share(True, lambda: 0.0) for _ in range(3)]
    published, leased, out = [0] * 3, [0] * 3, [0] * 3

    def ask(at: int, demand: int) -> None:
        share = shares[at]
        keep, moved = share.cut(out[at], 0.0, places=False), share.unpublished
        published[at] += moved
        room = amount - sum(published) - sum(leased) + leased[at]
        lease = granted(keep=keep, demand=demand, ahead=ahead_of(share.rate, amount), room=room)
        leased[at] = lease
        share.room = room
        share.answered(moved, lease, USED_S, out[at])

    for _ in range(300):
        at = chance.randrange(3)
        share = shares[at]
        share.rate = chance.choice([0.0, size * 10.0])
        if share.left - out[at] < size:
            ask(at, size)
        take = min(size, share.left - out[at])
        if take > 0:
            out[at] += take
        if out[at] and chance.random() < 0.7:
            done = chance.randint(0, out[at])
            out[at] -= done
            share.unpublished += chance.randint(0, done)
        if chance.random() < 0.3:
            ask(at, 0)
        assert all(one >= 0 for one in leased)
        assert sum(published) + sum(leased) <= amount
        assert sum(published) + sum(s.unpublished for s in shares) + sum(out) <= amount


def test_near_the_limit_nothing_is_leased_ahead_of_calls() -> None:
    assert granted(keep=0, demand=1, ahead=1000, room=PARTS) == 1
    assert granted(keep=0, demand=1, ahead=1000, room=101) == 1 + 2
    assert granted(keep=5, demand=3, ahead=9, room=-4) == 5
    assert ahead_of(1e9, PARTS - 1) == 0


def test_a_clock_that_is_behind_counts_in_the_parts_of_the_databases() -> None:
    assert [shift_of(offset, 100) for offset in (0, 50, 51, 100, 101, -51, -250)] == [0, 0, 1, 1, 2, 0, -2]
