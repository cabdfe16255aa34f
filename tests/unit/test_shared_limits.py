"""Limits that sidecars share over a real PostgreSQL: money, tokens, clocks that differ, and whatever is lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial

import pytest
from support.shared_gates import PICO_A_TOKEN, Call, Gate, ask, gates, settled, until

pytestmark = pytest.mark.timeout(120)
WHO = "acme"
EXPIRES = "SELECT max(expires) FROM metering.limit_leases"


async def served(
    made: Sequence[Gate], chance: random.Random, *, calls: int, most: int, at_once: int = 12, unknown: float = 0.1,
    takes: tuple[float, float] | None = None,
) -> tuple[int, list[Call]]:  # fmt: skip
    """Calls to any of them, some open at the same time. `most`: tokens of the largest; `takes`: between which parts of
    what it may need a call takes; None: all of it. How many were let in, and those that are open still."""
    open_calls: list[Call] = []
    through = 0
    for number in range(calls):
        asked = [chance.choice(made).call(chance.randint(1, most)) for _ in range(chance.randint(1, at_once))]
        for call in await asyncio.gather(*asked):
            if call.let_in:
                through += 1
                open_calls.append(call)
        chance.shuffle(open_calls)
        for call in open_calls[chance.randint(0, at_once) :]:
            open_calls.remove(call)
            used = call.needs if takes is None else round(call.needs * chance.uniform(*takes))
            call.end(None if chance.random() < unknown else used)
        if number % 5 == 0:
            chance.choice(made).tell()
    return through, open_calls


@pytest.mark.parametrize("takes", [None, (0.0, 1.0)])
@pytest.mark.parametrize("unit", ["total_tokens", "cost_usd"])
async def test_money_and_tokens_are_never_granted_twice_and_all_that_was_used_is_counted(
    postgres_database: str, unit: str, takes: tuple[float, float] | None
) -> None:
    amount, most = 12_000, 400
    text = f"total_tokens={amount}/month" if unit == "total_tokens" else f"cost_usd={amount / 10**6}/month"
    scale = 1 if unit == "total_tokens" else PICO_A_TOKEN
    made = [Gate(f"edge-{n}", postgres_database, text) for n in range(3)]
    async with gates(*made):
        through, left = await served(made, random.Random(3), calls=40, most=most, takes=takes)
        assert through > amount // most
        for call in left:
            call.end(None)
        for gate in made:
            gate.tell()
        limit = made[0].limits[0]
        said = settled(*made).settled(limit.key(WHO, made[0].now_ns()), made[0].now_ns())
        assert said >= (amount - most) * scale, "it was used to its end"
        # A call that takes the rest may use more than that; nothing else is beyond the limit.
        assert said <= (amount + sum(gate.beyond for gate in made)) * scale
        await until(partial(adds_up, made, said), lambda: [gate.owner.counters.all() for gate in made])
        denied = [await gate.call(1) for gate in made]
        assert not any(call.let_in for call in denied)


async def adds_up(made: Sequence[Gate], said: int) -> bool:
    """Whoever is asked has what the records say, and nothing is held any more."""
    rows = [next(iter((await gate.rows()).values()), None) for gate in made]
    return {None if row is None else (row.used, row.reserved) for row in rows} == {(said, 0)}


async def test_a_lease_near_the_limit_is_renewed_while_a_call_holds_it(postgres_database: str) -> None:
    one, two = (Gate(f"edge-{n}", postgres_database, "total_tokens=300/day") for n in range(2))
    async with gates(one, two):
        call = await one.call(280)
        assert call.let_in
        for _ in range(3):
            expired = await ask(postgres_database, EXPIRES)
            # As if nobody had heard of it for most of its time, by both clocks.
            await ask(postgres_database, "UPDATE metering.limit_leases SET expires = expires - interval '7 s'")
            one.leap_s += 2.5

            async def renewed(before: object = expired) -> bool:
                return bool(await ask(postgres_database, EXPIRES) > before)

            await until(renewed)
        small = await two.call(50)
        assert small.let_in, "what is left is less than it may need, and it takes that"
        assert not (await two.call(1)).let_in
        call.end(100)
        small.end(50)
        await until(partial(adds_up, [one, two], 150), lambda: one.owner.counters.all())
        assert (await two.call(100)).let_in
