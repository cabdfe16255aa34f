"""Limits that sidecars share over a real PostgreSQL: money, tokens, clocks that differ, and whatever is lost."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from support.postgres_server import PostgresServer
from support.shared_gates import PICO_A_TOKEN, Call, Gate, ask, gates, settled, until

from sidecar.gate.admission import ANSWER_S
from sidecar.gate.fleet import BEGIN_S
from sidecar.gate.shares import USED_S

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
    postgres_database: str, tmp_path: Path, unit: str, takes: tuple[float, float] | None
) -> None:
    amount, most = 12_000, 400
    text = f"total_tokens={amount}/month" if unit == "total_tokens" else f"cost_usd={amount / 10**6}/month"
    scale = 1 if unit == "total_tokens" else PICO_A_TOKEN
    made = [Gate(tmp_path / f"edge-{n}", postgres_database, text) for n in range(3)]
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


async def test_a_lease_near_the_limit_is_renewed_while_a_call_holds_it(postgres_database: str, tmp_path: Path) -> None:
    one, two = (Gate(tmp_path / f"edge-{n}", postgres_database, "total_tokens=300/day") for n in range(2))
    async with gates(one, two):
        call = await one.call(280)
        assert call.let_in
        for _ in range(3):
            expired = await ask(postgres_database, EXPIRES)
            # As if nobody had heard of it for most of its time, by both clocks.
            await ask(postgres_database, "UPDATE metering.limit_leases SET expires = expires - interval '7 s'")
            one.leap(2.5)

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


# Clocks


async def used_up(made: Sequence[Gate], calls: int) -> int:
    """How many of these calls, by turns, were let in; they end at once."""
    through = 0
    for number in range(calls):
        call = await made[number % len(made)].call()
        if call.let_in:
            through += 1
            call.end()
    return through


@pytest.mark.parametrize("window", ["day", "week", "600s"])
async def test_whatever_the_clocks_of_sidecars_say_a_limit_is_one_and_the_databases_clock_decides(
    postgres_database: str, tmp_path: Path, window: str
) -> None:
    # Over the border of the window, in both directions; of a sliding one far beyond its end.
    far_s = 6.5 * 86_400 if window == "week" else 20 * 3600
    limit = f"calls=60/{window}"
    made = [
        Gate(tmp_path / f"edge-{n}", postgres_database, limit, off_s=off * far_s) for n, off in enumerate((0, 1, -1))
    ]
    async with gates(*made):
        through = await used_up(made, 60)
        for gate in made:  # what may still be leased ahead to one that does not need it
            gate.tell()
            gate.owner.counters.sweep(gate.now_ns())

        async def the_rest() -> bool:
            nonlocal through
            through += await used_up(made, 3)
            return through == 60

        await until(the_rest, lambda: through)
        assert await used_up(made, 30) == 0
        names = await ask(postgres_database, "SELECT array_agg(DISTINCT name) FROM metering.limit_counters")
        assert names == [made[0].limits[0].key(WHO, made[0].now_ns())]
        notes = [gate.shared.notes for gate in made]
        assert notes[0] == []
        assert ["ahead of" in notes[1][0], "behind" in notes[2][0]] == [True, True]
        # A start anew gets the same out of its records, whatever its clock says by then.
        made[1].off_s = 0.0
        before = (await made[0].rows())[made[0].limits[0].name]
        await made[1].kill()
        await made[1].start()
        if window != "600s":  # the times of records are those of the clock that was off
            await until(partial(adds_up, made, 60))
            assert before.used == 60
        assert not (await made[1].call()).let_in


async def test_out_of_a_lease_a_process_decides_by_itself_whatever_its_clock_says(
    postgres_database: str, tmp_path: Path
) -> None:
    gate = Gate(tmp_path / "edge", postgres_database, "calls=1000000/minute", off_s=90.0)
    async with gates(gate):
        calls = [await gate.call() for _ in range(200)]
        assert all(call.let_in for call in calls)
        assert sum(call.asked for call in calls) < 100


# The database is away


async def test_while_the_database_is_away_leases_are_used_to_their_end_and_then_the_setting_decides(
    killable_postgres: PostgresServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = killable_postgres.database()
    made = {
        policy: Gate(tmp_path / policy, url, "calls=1000/day", "concurrent=6", on_failure=policy)
        for policy in ("open", "closed", "last")
    }
    async with gates(*made.values()):
        for gate in made.values():
            for _ in range(30):
                (await gate.call()).end()
        full = [await gate.call(who="full") for gate in made.values() for _ in range(2)]
        denied = [await gate.call(who="full") for gate in made.values()]
        assert not any(call.let_in for call in denied)
        killable_postgres.kill()
        for gate in made.values():
            await until(partial(has_trouble, gate))
            gate.leap(USED_S + 1.0)
            gate.tell()
        began_s = time.monotonic()
        for who, expected in (("full", [True, False, False]), ("new", [True, False, True])):
            calls = [await gate.call(who=who) for gate in made.values()]
            assert [call.let_in for call in calls] == expected, who
            assert {None if (g := call.exchange.gate) is None else g.source for call in calls} == {"on_failure"}
            for call in calls:
                if call.let_in:
                    call.end()
        assert time.monotonic() - began_s < 0.9 * ANSWER_S, "nobody waits for what is known to be away"
        one = made["open"]
        failures = one.shared.failures
        await until(lambda: one.shared.failures >= failures + 2)
        said = [record.getMessage() for record in caplog.records if "cannot be counted" in record.getMessage()]
        assert all(said.count(text) <= len(made) for text in said), "each reason once"
        for call in full:
            call.end()
        killable_postgres.start()
        for gate in made.values():
            await gate.ready()
        again = [vars(record)["facts"] for record in caplog.records if "counted again" in record.getMessage()]
        assert len(again) == len(made)
        assert all(facts["undecided"] >= 2 for facts in again)
        assert (await one.call(who="new")).let_in

        async def counted() -> bool:
            rows = {(row.limit.name, row.scope): row for row in await one.shared.rows()}
            full, new = (rows.get(("calls-per-day", who)) for who in ("full", "new"))
            return full is not None and new is not None and (full.used, new.used) == (7, 2)

        await until(counted)  # what was let in meanwhile is counted all the same


def has_trouble(gate: Gate) -> bool:
    return bool(gate.shared.trouble)


async def test_a_start_without_the_database_delays_no_call_for_long(
    killable_postgres: PostgresServer, tmp_path: Path
) -> None:
    url = killable_postgres.database()
    os.killpg(killable_postgres.pid, signal.SIGSTOP)  # it takes connections and says nothing
    os.kill(killable_postgres.pid, signal.SIGSTOP)
    gate = Gate(tmp_path / "edge", url, "calls=100/day", on_failure="open")
    try:
        await gate.start(counted=False)
        first = await gate.call()
        assert first.let_in
        gate.leap(BEGIN_S)
        began_s = time.monotonic()
        for _ in range(20):
            call = await gate.call()
            assert call.let_in
            call.end()
        assert time.monotonic() - began_s < ANSWER_S, "twenty of them took less than one that waits"
    finally:
        os.killpg(killable_postgres.pid, signal.SIGCONT)
    await gate.ready()
    first.end()
    await until(partial(adds_up, [gate], 21))
    await gate.kill()
