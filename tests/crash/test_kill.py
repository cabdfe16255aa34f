"""SIGKILL at random moments under load: what a client received complete is recorded once and delivered once."""

import asyncio
import os
import random
from collections import Counter

import pytest
from oracle import SETTINGS, Oracle, judge
from tiny import tiny_upstream
from whole import Whole, running_receiver

KILLS = int(os.environ.get("CRASH_KILLS", "20"))
SEED = int(os.environ.get("CRASH_SEED", "20261121"))


@pytest.mark.timeout(240)
async def test_a_killed_sidecar_loses_none_and_doubles_none(tmp_path):
    chance = random.Random(SEED)
    async with tiny_upstream() as upstream, running_receiver() as (receiver, url):
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="ledger,webhook",
            SIDECAR_WEBHOOK_URL=f"{url}/webhook",
            **SETTINGS,
        )
        await whole.start()
        oracle = Oracle(lambda: whole.proxy_url, seed=SEED)
        load = asyncio.create_task(oracle.run())
        try:
            for _ in range(KILLS):
                owed = len(oracle.owed)
                async with asyncio.timeout(30):
                    while len(oracle.owed) < owed + chance.randrange(1, 60):
                        await asyncio.sleep(chance.random() * 0.01)
                await whole.kill()
                await whole.start()
        finally:
            oracle.stop()
            await load
        balance = await whole.settled()
        records = await whole.records()
        assert await whole.stop() == 0, whole.log.read_text()
        taken = Counter(record["id"] for record in receiver.billed("webhook"))

    judge(oracle.owed, records)
    assert len(oracle.owed) > KILLS
    assert balance["holds"], balance
    assert not balance["lost"] or not any(balance["lost"].values()), balance
    assert balance["recorded"] == len(records)
    assert balance["backends"]["ledger"]["delivered"] + balance["backends"]["ledger"]["duplicate"] == len(records)
    assert taken == Counter(record["id"] for record in records)
    for row in records:  # what was open at a kill is visible as such, and never more than the clients had open
        assert row["outcome"] in ("complete", "unknown", "client_left", "upstream_broke", "stopped"), row
