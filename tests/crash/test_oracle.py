"""Under every fault that can be made here: what a client received complete is recorded once and delivered once.

The judge knows three things that do not come from the sidecar: the responses that the clients received complete, the
requests that each backend saw, and what each backend took. After every act there is a quiet phase, and then all of it
must fit together. `make crash` plays 1,000 rounds; CRASH_SEED plays the same faults again.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from support.mishaps import POISONED, Watching, draw_faults, kill_one, revenium_id
from support.oracle import SETTINGS, Oracle, call_of, judge
from support.tiny import tiny_upstream
from support.whole import Whole, children

ROUNDS = int(os.environ.get("CRASH_ROUNDS", "16"))
SEED = int(os.environ.get("CRASH_SEED", "20261121"))
ACT_ROUNDS = 25  # between two quiet phases
QUIET_S = 90.0  # retries that were pushed back during the faults may have half a minute to go
# On a machine that is busy with other things what was killed takes more than a second to start: longer than a promise
# is kept by itself, which is not what is judged here.
COMMIT_WAIT_S = "30"
SLOTS = 16  # requests to Revenium at once: what one kill may leave unknown
# What one process serves and what two workers serve are judged apart, each with other backends: with Revenium's v1,
# which recognises no repeat, and with its v2, which answers one with either of two 409s.
CASTS = {
    "one process": ["ledger", "webhook", "meter", "stripe", "revenium"],
    "two workers": ["ledger", "webhook", "meter", "flexprice", "revenium"],
}
MODES = {"one process": "meter", "two workers": "completions"}
TENANTS = ("cus_one", "cus_two", "cus_three")  # Stripe takes them as they are


@dataclass
class Play:
    """One data directory through all its rounds."""

    whole: Whole
    receiver: Watching
    oracle: Oracle
    backends: list[str]
    chance: random.Random
    diary: Counter[str] = field(default_factory=Counter)
    kills: int = 0

    @property
    def workers(self) -> bool:
        return "SIDECAR_WORKERS" in self.whole.env

    def may_park(self, backend: str) -> bool:
        """Whether a lost answer may be parked as unknown there: nothing would recognise a repeat."""
        return backend == "revenium" and self.whole.env["SIDECAR_REVENIUM_MODE"] == "meter"

    async def act(self, rounds: int) -> None:
        load = asyncio.create_task(self.oracle.run())
        try:
            for _ in range(rounds):
                await self.round()
        finally:
            self.oracle.stop()
            await load
            self.receiver.disturb()

    async def round(self) -> None:
        """Some faults at the backends, some calls, and mostly a death."""
        chance = self.chance
        faults = draw_faults(chance, self.backends[1:])
        self.receiver.disturb(*faults)
        self.diary.update(f"{fault.do}" if fault.do != "status" else f"status {fault.status}" for fault in faults)
        if chance.random() < 0.25:
            backend = chance.choice([name for name in self.backends if name in POISONED])
            self.receiver.poison_one(backend)
            self.diary["poison"] += 1
        await self.more_calls(chance.randrange(1, 30))
        death = chance.choice(("kill", "worker", "kill", "none") if self.workers else ("kill", "kill", "none"))
        self.diary[death] += 1
        if death == "kill":
            self.kills += 1
            await self.whole.kill()
            await self.whole.start()
        elif death == "worker":
            assert self.whole.process is not None
            kill_one(children(self.whole.process.pid), chance)

    async def more_calls(self, count: int) -> None:
        owed = len(self.oracle.owed)
        async with asyncio.timeout(30):
            while len(self.oracle.owed) < owed + count:
                await asyncio.sleep(0.005)

    async def fresh_call(self) -> None:
        """After all of it a call flows, and is owed like the others."""
        call = f"fresh-{self.kills}-{self.oracle.sent}"
        async with aiohttp.ClientSession() as session:
            headers = {"x-call": call, "x-tenant": TENANTS[0]}
            async with session.post(f"{self.whole.proxy_url}/v1/things", json={}, headers=headers) as answer:
                assert answer.status == 200
                await answer.read()
        self.oracle.owed[call] = "thing"


@pytest.mark.timeout(120 + 20 * ROUNDS)
@pytest.mark.parametrize("cast", list(CASTS))
async def test_every_obligation_is_recorded_once_and_delivered_once(tmp_path: Path, cast: str) -> None:
    backends, first = CASTS[cast], cast == "one process"
    receiver = Watching()
    url = await receiver.start()
    try:
        async with tiny_upstream() as upstream:
            whole = Whole(
                tmp_path / "data",
                upstream,
                **SETTINGS,
                **settings(backends, url),
                SIDECAR_REVENIUM_MODE=MODES[cast],
                SIDECAR_COMMIT_WAIT_S=COMMIT_WAIT_S,
                **({} if first else {"SIDECAR_WORKERS": "2"}),
            )
            chance = random.Random(SEED + (not first))
            async with whole:
                oracle = Oracle(lambda: whole.proxy_url, seed=SEED, clients=5, tenants=TENANTS, pause_s=0.01)
                play = Play(whole, receiver, oracle, backends, chance)
                left = (ROUNDS + first) // 2
                while left > 0:
                    await play.act(min(left, ACT_ROUNDS))
                    left -= ACT_ROUNDS
                    await play.fresh_call()
                    await judge_all(play)
                assert await whole.stop() == 0, whole.log.read_text()[-4000:]
    finally:
        await receiver.aclose()
    print(f"{cast}: {len(oracle.owed)} owed of {oracle.sent} sent, {dict(play.diary)}")
    print(f"requests {dict(receiver.requests)}, sent again {dict(receiver.repeats)}")
    assert sum(receiver.repeats.values()) > 0, "no fault made anything go twice: the test tests nothing"


def settings(backends: list[str], url: str) -> dict[str, str]:
    return {
        "SIDECAR_BACKENDS": ",".join(backends),
        "SIDECAR_WEBHOOK_URL": f"{url}/webhook",
        "SIDECAR_WEBHOOK_BATCH": "20",
        "SIDECAR_METER_URL": f"{url}/meter",
        "SIDECAR_METER_BATCH": "20",
        "SIDECAR_REVENIUM_URL": url,
        "SIDECAR_REVENIUM_API_KEY": "key-of-the-tests",
        **(
            {
                "SIDECAR_STRIPE_URL": url,
                "SIDECAR_STRIPE_API_KEY": "sk_test_receiver",
                "SIDECAR_STRIPE_METERS": "api_calls",
            }
            if "stripe" in backends
            else {"SIDECAR_FLEXPRICE_URL": url, "SIDECAR_FLEXPRICE_API_KEY": "key-of-the-tests"}
        ),
    }


# --- the judge ---------------------------------------------------------------------------------------


async def judge_all(play: Play) -> None:
    whole, receiver = play.whole, play.receiver
    balance = await whole.settled(limit_s=QUIET_S)
    records = await whole.records()
    parked = await parked_events(whole)
    judge(play.oracle.owed, records)
    assert balance["holds"], balance
    assert not any(balance["lost"].values()), balance
    assert balance["recorded"] == len(records)
    code, out, err = await whole.command("spool", "verify")
    assert code == 0, out + err

    different = [name for name, digests in receiver.digests.items() if len(digests) > 1]
    assert not different, f"sent again with other bytes: {different[:5]}"
    assert "stripe" not in receiver.keyed, "Stripe answers a repeated key with its stored 500, for ever"
    ids = {record["id"] for record in records}
    for name in play.backends[1:]:
        judge_backend(play, name, records, parked.get(name, {}), ids)
    await judge_ledger(whole, records)


async def parked_events(whole: Whole) -> dict[str, dict[str, dict[str, Any]]]:
    code, out, err = await whole.command("spool", "parked", "--format", "ndjson")
    assert code == 0, err
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in map(json.loads, out.splitlines()):
        assert row["record_id"] not in found.setdefault(row["backend"], {}), "parked twice"
        found[row["backend"]][row["record_id"]] = row
    return found


def judge_backend(
    play: Play, name: str, records: list[dict[str, Any]], parked: dict[str, dict[str, Any]], ids: set[str]
) -> None:
    taken = Counter(record_of(name, body) for body in play.receiver.billed(name))
    twice = [one for one, count in taken.items() if count > 1]
    assert not twice, f"{name} billed {len(twice)} twice: {twice[:5]}"
    assert taken.keys() <= ids, f"{name} was sent ids that no record has: {list(taken.keys() - ids)[:5]}"
    assert parked.keys() <= ids
    poisoned = {one for where, one in play.receiver.poison if where == name}
    unknown = {one for one, row in parked.items() if row["reason"] == "unknown"}
    assert poisoned <= parked.keys(), f"{name} has not parked what was refused: {poisoned - parked.keys()}"
    for record in records:
        one, owed = record["id"], call_of(record) in play.oracle.owed
        if one in unknown:
            assert play.may_park(name), f"{name} de-duplicates, so nothing needs to be parked as unknown: {parked[one]}"
            assert parked[one]["maybe_taken"]
        elif one in poisoned:
            assert taken[one] == 0
            assert not parked[one]["maybe_taken"], parked[one]
        elif owed:
            assert taken[one] == 1, f"{name} never got {one}, {parked.get(one)}"
            assert one not in parked, parked[one]
    if name == "revenium":
        # Only what a kill or a cut left without an answer; a kill can leave no more than was under way.
        assert len(unknown) <= play.kills * SLOTS + play.receiver.maybe["revenium"]


def record_of(backend: str, body: dict[str, Any]) -> str:
    match backend:
        case "webhook":
            return str(body["id"])
        case "stripe":
            return str(body["identifier"]).removesuffix(":api_calls")
        case "flexprice":
            return str(body["event_id"])
        case "revenium":
            return revenium_id(body)
    return str(body["correlationId"])


async def judge_ledger(whole: Whole, records: list[dict[str, Any]]) -> None:
    """The embedded ledger says what the records add up to, by subscriber."""
    code, out, err = await whole.command("usage", "--by", "subscriber", "--since", "2d", "--format", "json")
    assert code == 0, err
    calls: Counter[str | None] = Counter()
    tokens: Counter[str | None] = Counter()
    for record in records:
        who = None if record["subscriber"] is None else record["subscriber"]["id"]
        calls[who] += 1
        tokens[who] += (record["usage"] or {}).get("total_tokens") or 0
    rows = json.loads(out)
    assert {row["subscriber"]: row["calls"] for row in rows} == dict(calls)
    assert {row["subscriber"]: row["total_tokens"] or 0 for row in rows} == dict(tokens)
