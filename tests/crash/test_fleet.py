"""Three sidecars and one PostgreSQL under deaths: each call is recorded once, counted once, billed once by somebody.

The judge knows what the clients received complete, what each backend took, and what the database holds. SIGKILL strikes
sidecars (whichever holds lanes just then), the database, or both; a sidecar is stopped for a while as a machine that
hangs is. `make crash` plays 200 rounds; CRASH_SEED plays the same faults again.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from support.mishaps import Watching, draw_faults
from support.oracle import SETTINGS, Oracle, call_of, judge
from support.postgres_server import PostgresServer
from support.tiny import tiny_upstream
from support.whole import Whole

ROUNDS = min(int(os.environ.get("CRASH_ROUNDS", "4")), 200)
SEED = int(os.environ.get("CRASH_SEED", "20261129"))
SIDECARS = 3
# Nothing may stand still for longer: leases of the dead run out, and retries that were pushed back may have half a
# minute to go.
STILL_S = 120.0
# A lane sends Stripe one event at a time, some thirty a second: what is made meanwhile has to stay below that, or half
# an hour of rounds leaves an hour of deliveries.
PAUSE_FEW_S, PAUSE_MANY_S, MANY_ROUNDS = 0.02, 0.25, 20
TENANTS = ("cus_one", "cus_two", "cus_three")
BACKENDS = ["webhook", "meter", "stripe"]
PAUSE_S = 12.0  # beyond a lease: others take over meanwhile


class Fleet:
    def __init__(
        self, wholes: list[Whole], server: PostgresServer, receiver: Watching, chance: random.Random, database: str
    ) -> None:
        self.wholes, self.server, self.receiver, self.chance, self.database = wholes, server, receiver, chance, database
        self.diary: Counter[str] = Counter()

    async def records(self) -> list[dict[str, Any]]:
        """All that the database has."""
        out = await asyncio.to_thread(
            self.server.sql, "SELECT convert_from(line, 'UTF8') FROM metering.records", self.database.rpartition("/")[2]
        )
        return [json.loads(line) for line in out.splitlines()]

    async def round(self) -> None:
        """Some faults at the backends, a moment of load, and a death."""
        faults = draw_faults(self.chance, BACKENDS)
        self.receiver.disturb(*faults)
        await asyncio.sleep(self.chance.uniform(0.2, 1.5))
        death = self.chance.choice(("sidecar", "sidecar", "database", "both", "restart", "pause"))
        self.diary[death] += 1
        one = self.chance.choice(self.wholes)
        if death in ("database", "both"):
            await asyncio.to_thread(self.server.kill)
        if death in ("sidecar", "both"):
            await one.kill()
        if death == "restart":
            assert await one.stop() == 0, one.log.read_text()[-4000:]
        if death == "pause":
            await self.pause(one)
        if death in ("database", "both"):
            await asyncio.sleep(self.chance.uniform(0.0, 2.0))
            await asyncio.to_thread(self.server.start)
        if death in ("sidecar", "both", "restart"):
            await one.start()

    async def pause(self, one: Whole) -> None:
        """The metering process hangs for longer than its leases last, and goes on with what it had in hand."""
        pids = one.children()["meter"]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(PAUSE_S)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


@pytest.mark.timeout(180 + 30 * ROUNDS)
async def test_each_call_of_a_fleet_is_recorded_counted_and_billed_once(
    tmp_path: Path, killable_postgres: PostgresServer
) -> None:
    receiver = Watching()
    url = await receiver.start()
    database = killable_postgres.database()
    try:
        async with tiny_upstream() as upstream:
            wholes = [
                Whole(
                    tmp_path / f"data-{n}",
                    upstream,
                    **SETTINGS,
                    SIDECAR_INSTANCE=f"sidecar-{n}",
                    SIDECAR_LEDGER_URL=database,
                    SIDECAR_DELIVER="elected",
                    SIDECAR_HASH_KEY="a-key-that-all-sidecars-share",
                    **settings(url),
                )
                for n in range(SIDECARS)
            ]
            pause_s = PAUSE_FEW_S if ROUNDS <= MANY_ROUNDS else PAUSE_MANY_S
            fleet = Fleet(wholes, killable_postgres, receiver, random.Random(SEED), database)
            oracles = [
                Oracle(functools.partial(proxy_of, whole), seed=SEED + n, clients=2, tenants=TENANTS, pause_s=pause_s)
                for n, whole in enumerate(wholes)
            ]
            for whole in wholes:
                await whole.start()
            try:
                load = [asyncio.create_task(oracle.run()) for oracle in oracles]
                try:
                    for _ in range(ROUNDS):
                        await fleet.round()
                finally:
                    for oracle in oracles:
                        oracle.stop()
                    await asyncio.gather(*load)
                    receiver.disturb()
                await judge_all(fleet, oracles)
                for whole in wholes:
                    assert await whole.stop() == 0, whole.log.read_text()[-4000:]
            finally:
                for whole in wholes:
                    await whole.kill()
    finally:
        await receiver.aclose()
    print(f"{sum(len(oracle.owed) for oracle in oracles)} owed, {dict(fleet.diary)}")
    print(f"requests {dict(receiver.requests)}, sent again {dict(receiver.repeats)}")


def proxy_of(whole: Whole) -> str:
    return whole.proxy_url


def settings(url: str) -> dict[str, str]:
    return {
        "SIDECAR_BACKENDS": ",".join(["ledger", *BACKENDS]),
        "SIDECAR_WEBHOOK_URL": f"{url}/webhook",
        "SIDECAR_WEBHOOK_BATCH": "20",
        "SIDECAR_METER_URL": f"{url}/meter",
        "SIDECAR_METER_BATCH": "20",
        "SIDECAR_STRIPE_URL": url,
        "SIDECAR_STRIPE_API_KEY": "sk_test_receiver",
        "SIDECAR_STRIPE_METERS": "api_calls",
    }


async def judge_all(fleet: Fleet, oracles: list[Oracle]) -> None:
    owed = {call: kind for oracle in oracles for call, kind in oracle.owed.items()}
    records = await settled(fleet, owed)
    judge(owed, records)
    billable = {record["id"] for record in records if call_of(record) in owed}
    for name in BACKENDS:
        taken = Counter(record_of(name, body) for body in fleet.receiver.billed(name))
        twice = [one for one, count in taken.items() if count > 1]
        assert not twice, f"{name} billed {len(twice)} twice: {twice[:5]}"
        assert billable <= taken.keys(), f"{name} never got {sorted(billable - taken.keys())[:5]}"
        assert taken.keys() <= {record["id"] for record in records}
    different = [name for name, digests in fleet.receiver.digests.items() if len(digests) > 1]
    assert not different, f"sent again with other bytes: {different[:5]}"
    calls = Counter(None if record["subscriber"] is None else record["subscriber"]["id"] for record in records)
    for whole in fleet.wholes:
        code, out, err = await whole.command("usage", "--by", "subscriber", "--since", "2d", "--format", "json")
        assert code == 0, err
        assert {row["subscriber"]: row["calls"] for row in json.loads(out)} == dict(calls)


async def settled(fleet: Fleet, owed: dict[str, str]) -> list[dict[str, Any]]:
    """The records of the fleet, once each of them has reached each backend, as far as these say; waited for as long as
    there is something that arrives."""
    clock = asyncio.get_running_loop().time
    most, ends_s = -1, clock() + STILL_S
    while True:
        began_s = clock()
        records = await fleet.records()
        ids = {record["id"] for record in records if call_of(record) in owed}
        missing, arrived = {"records": len(owed) - len(ids)}, len(records)
        for name in BACKENDS:
            taken = {record_of(name, body) for body in fleet.receiver.billed(name)}
            missing[name] = len(ids - taken)
            arrived += len(taken)
        if not any(missing.values()):
            return records
        if arrived > most:
            most, ends_s = arrived, clock() + STILL_S
        if clock() > ends_s:
            found = {call_of(record) for record in records}
            logs = "\n".join(whole.log.read_text()[-3000:] for whole in fleet.wholes)
            without = sorted(owed.keys() - found)[:5]
            raise AssertionError(f"nothing came for {STILL_S:.0f} s, still missing: {missing}, {without}\n{logs}")
        await asyncio.sleep(max(0.5, clock() - began_s))  # half of the time at most goes into looking


def record_of(backend: str, body: dict[str, Any]) -> str:
    match backend:
        case "webhook":
            return str(body["id"])
        case "stripe":
            return str(body["identifier"]).removesuffix(":api_calls")
    return str(body["correlationId"])
