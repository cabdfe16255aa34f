"""Limits that sidecars share over a real PostgreSQL: money, tokens, clocks that differ, and whatever is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.postgres_server import PostgresServer
from support.shared_gates import PICO_A_TOKEN, Call, Gate, ask, gates, settled, until

from sidecar.cli.shared import known_backend_settings
from sidecar.gate.admission import ANSWER_S
from sidecar.gate.fleet import BEGIN_S, KEEP_S
from sidecar.gate.limits import oldest_start_ns
from sidecar.gate.shares import USED_S
from sidecar.ledger.identity import Identity
from sidecar.runtime import gate_factory
from sidecar.runtime.gate_factory import LedgersPast
from sidecar.settings import load

pytestmark = pytest.mark.timeout(120)
WHO = "acme"
EXPIRES = "SELECT max(expires) FROM metering.limit_leases"


async def served(
    made: Sequence[Gate],
    chance: random.Random,
    *,
    calls: int,
    most: int,
    at_once: int = 12,
    unknown: float = 0.1,
    takes: tuple[float, float] | None = None,
) -> tuple[int, list[Call]]:
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


@pytest.mark.parametrize(
    ("window", "far_s"), [("day", 20 * 3600), ("week", 6.5 * 86_400), ("600s", 20 * 3600), ("day", 40 * 86_400)]
)
async def test_whatever_the_clocks_of_sidecars_say_a_limit_is_one_and_the_databases_clock_decides(
    postgres_database: str, tmp_path: Path, window: str, far_s: float
) -> None:
    # Over the border of the window, in both directions, and over many; of a sliding one far beyond its end.
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

        async def decides() -> bool:
            calls = [await gate.call() for _ in range(100)]
            assert all(call.let_in for call in calls)
            return sum(call.asked for call in calls) < 50

        await until(decides)  # a lease is taken ahead once it is known how fast it is used


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

    async def all_told() -> bool:
        gate.tell()  # what was leased to it late, and no call has used, ends
        return await adds_up([gate], 21)

    await until(all_told)
    await gate.kill()


# Whatever is lost

CLEARED = "TRUNCATE metering.limit_counters, metering.limit_leases, metering.limit_instances"
DROPPED = "DROP TABLE metering.limit_counters, metering.limit_leases, metering.limit_instances"


def ledgers_past(url: str, directory: Path, gate: Gate, tables: Sequence[dict[str, Any]]) -> LedgersPast:
    """`gate`: of which the spool is."""
    directory.mkdir(exist_ok=True)
    config = directory / "config.toml"
    rows = [{json.dumps(name): json.dumps(value) for name, value in table.items()} for table in tables]
    config.write_text("".join("[[limits]]\n" + "".join(f"{n} = {v}\n" for n, v in row.items()) for row in rows))
    settings = load(
        {
            "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:9",
            "SIDECAR_DATA_DIR": str(directory),
            "SIDECAR_CONFIG": str(config),
            "SIDECAR_LEDGER_URL": url,
            "SIDECAR_BACKENDS": "ledger",
            "SIDECAR_DIMENSIONS": "team=x-team",
        },
        backend_settings=known_backend_settings(),
    )
    since_ns = oldest_start_ns(gate_factory.limits(settings), time.time_ns())
    return LedgersPast(settings, since_ns, 0.0, {gate.slot: 1})


@pytest.mark.parametrize("seed", range(2))
async def test_after_kills_at_any_moment_the_counters_are_what_the_records_say(
    postgres_database: str, tmp_path: Path, seed: int
) -> None:
    chance = random.Random(seed)
    made = [Gate(tmp_path / f"edge-{n}", postgres_database, "total_tokens=100000/month") for n in range(3)]
    async with gates(*made):
        for _ in range(8):
            _, left = await served(made, chance, calls=2, most=200, takes=(0.0, 1.0))
            victim = chance.choice(made)
            await asyncio.sleep(chance.uniform(0.0, 0.05))
            await victim.kill()
            for call in left:  # those of the dead one are left open: records of which nobody knows what they took
                call.end(None if call.sidecar is victim else 0)
            await victim.start()
        for gate in made:
            gate.tell()
        limit = made[0].limits[0]
        said = settled(*made).settled(limit.key(WHO, made[0].now_ns()), made[0].now_ns())
        await until(partial(adds_up, made, said), lambda: said)


@pytest.mark.parametrize(
    "lost", [CLEARED, "DELETE FROM metering.limit_counters", DROPPED, "DROP SCHEMA metering CASCADE"]
)
async def test_tables_that_were_emptied_or_dropped_have_everything_again(
    postgres_database: str, tmp_path: Path, lost: str
) -> None:
    made = [Gate(tmp_path / f"edge-{n}", postgres_database, "calls=50/month") for n in range(2)]
    async with gates(*made):
        assert await used_up(made, 30) == 30
        for gate in made:
            gate.tell()
        await until(partial(adds_up, made, 30))
        await ask(postgres_database, lost)
        for gate in made:  # which nobody calls: it has nothing to ask of its own accord
            gate.leap(KEEP_S + 1.0)
        await until(partial(adds_up, made, 30))
        assert await used_up(made, 40) == 20


@pytest.mark.parametrize("gone", ["another", "the same name"])
async def test_what_only_the_ledger_has_is_counted_by_its_records(
    postgres_database: str, tmp_path: Path, gone: str
) -> None:
    tables = [
        {"name": "tokens", "unit": "total_tokens", "amount": 1000, "window": "month"},
        {"name": "teams", "dimensions.team": "*", "unit": "total_tokens", "amount": 5000, "window": "24h"},
    ]
    name = "edge-0" if gone == "another" else "edge-1"
    first = Gate(tmp_path / "old" / name, postgres_database, tables=tables, in_ledger=True)
    async with gates(first):
        for tokens in (100, 200, None):
            (await first.call(70)).end(tokens)
        await first.ship()
        unknown = settled(first).settled(first.limits[0].key(WHO, first.now_ns()), first.now_ns()) - 300
        assert unknown >= 70, "of a call of which nobody knows what it took: what was set aside"
    await ask(postgres_database, DROPPED)
    await ask(postgres_database, "UPDATE metering.instances SET seen = now() - interval '10 min'")
    second = Gate(tmp_path / "edge-1", postgres_database, tables=tables, in_ledger=True)
    second.past = ledgers_past(postgres_database, second.directory, second, tables)
    async with gates(second):

        async def counted() -> bool:
            rows = await second.rows()
            return {row.used for row in rows.values()} == {300 + unknown} and len(rows) == 2

        await until(counted)
        assert (await second.rows())["tokens"].by[name] == (300 + unknown, 0)
        call = await second.call(2000)
        assert call.exchange.gate is not None
        assert call.exchange.gate.reserved[second.limits[0].key(WHO, second.now_ns())] == 700 - unknown


@pytest.mark.parametrize("in_ledger", [True, False])
async def test_a_copy_and_its_original_never_publish_under_one_name(
    postgres_database: str, tmp_path: Path, in_ledger: bool
) -> None:
    limit = "calls=100/month"
    published = "SELECT settled FROM metering.limit_counters WHERE instance = 'edge'"
    other = Gate(tmp_path / "other", postgres_database, limit)
    first = Gate(tmp_path / "edge", postgres_database, limit, in_ledger=in_ledger)
    async with gates(other, first):
        assert await used_up([first], 10) == 10
        if in_ledger:
            await first.ship()
        shutil.copytree(first.directory, tmp_path / "copies" / "edge")
        copy = Gate(tmp_path / "copies" / "edge", postgres_database, limit, in_ledger=in_ledger)
        copy.lines, copy.slot = list(first.lines), first.slot
        assert await used_up([first], 20) == 20
        first.tell()
        await until(partial(adds_up, [other], 30))
        async with gates(copy):
            if in_ledger:
                await copy.ship()
            assert not (await first.call(who="somebody new")).let_in
            await until(partial(has_trouble, first))
            assert "another data directory counts its limits" in first.shared.notes[0]
            assert "spool adopt" in first.shared.notes[0]
            assert await used_up([copy], 5) == 5
            copy.tell()
            await until(partial(says, postgres_database, published, 15))
            assert has_trouble(first)
            # Somebody decides: the first is the one.
            Identity(first.directory, first.name).take_over()
            if in_ledger:
                await first.starts_to_ship()
            await first.ready()
            assert (await first.call()).let_in
            await until(partial(has_trouble, copy))
            await until(partial(says, postgres_database, published, 30))
            told = (await other.rows())["calls-per-month"].by
            assert sorted(used for used, _ in told.values()) == [15, 30], "what the copy had told stays"


async def says(url: str, statement: str, expected: object) -> bool:
    return bool(await ask(url, statement) == expected)


@pytest.mark.parametrize("in_ledger", [True, False])
async def test_a_new_directory_under_an_old_name_goes_on_where_the_old_one_ended(
    postgres_database: str, tmp_path: Path, in_ledger: bool
) -> None:
    limit = "calls=20/month"
    first = Gate(tmp_path / "old" / "edge", postgres_database, limit, in_ledger=in_ledger)
    async with gates(first):
        assert await used_up([first], 15) == 15
        if in_ledger:
            await first.ship()
        first.tell()
        await until(partial(adds_up, [first], 15))
    second = Gate(tmp_path / "edge", postgres_database, limit, in_ledger=in_ledger)
    try:
        await second.start(counted=False)
        if in_ledger:
            await until(partial(has_trouble, second))
            assert "another data directory" in second.shared.trouble
            Identity(second.directory, "edge").take_over()
            await second.ship()
        await second.ready()
        assert await used_up([second], 20) == 5
        await second.kill()
        await second.start()
        await until(partial(adds_up, [second], 20))
    finally:
        await second.kill()


# What is set otherwise


async def test_a_limit_that_is_changed_while_leases_are_out_holds_at_once_and_differences_are_told(
    postgres_database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = (Gate(tmp_path / f"edge-{n}", postgres_database, "calls=1000/month") for n in range(2))
    async with gates(one, two):
        held = [await one.call() for _ in range(30)]
        assert await used_up([two], 30) == 30
        await one.stop()
        less = Gate(one.directory, postgres_database, "calls=70/month")
        less.lines = one.lines
        async with gates(less):
            less.owner.told(less.tail, (0, one.gate.tell()[1]))  # what its processes still hold
            two.tell()
            await until(partial(leased, two, "edge-1", 0))
            assert await used_up([less], 40) == 10
            for call in held:
                call.sidecar = less
                call.end()
            less.tell()
            await until(partial(adds_up, [less, two], 70))
            assert await used_up([two], 5) == 5, "which goes by what it has"
            two.leap(KEEP_S + 1.0)
            told = "limit calls-per-month: edge-0 has 70 calls in month (UTC) of subscriber *, block; here it is 1000"
            await until(lambda: any(note.startswith(told) for note in two.shared.notes), lambda: two.shared.notes)
            assert len([text for text in caplog.messages if text.startswith(told)]) == 1
            assert await used_up([less], 3) == 0
        more = Gate(one.directory, postgres_database, "calls=1000/month")
        more.lines = less.lines
        async with gates(more):
            assert await used_up([more], 10) == 10
            two.leap(KEEP_S + 1.0)
            await until(lambda: not two.shared.notes)


async def leased(gate: Gate, name: str, amount: int) -> bool:
    return all(row.by.get(name, (0, 0))[1] == amount for row in (await gate.rows()).values())
