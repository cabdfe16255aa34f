"""What a pod's volume still holds for a backend when the pod is deleted: by docs/kubernetes.md, what a volume that goes
with its pod can lose."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import aiohttp
import pytest
from support.tiny import tiny_upstream
from support.whole import Whole, running_receiver

SECRET = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
CALLS = 200
PER_S = 100


@pytest.mark.parametrize("end", ["deleted", "killed", "deleted, backend down"])
async def test_a_volume_that_goes_with_its_pod_loses_what_is_pending(tmp_path: Path, end: str) -> None:
    async with tiny_upstream() as upstream, running_receiver() as (_, vendor):
        url = "http://127.0.0.1:9/webhook" if end.endswith("down") else f"{vendor}/webhook"
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="ledger,webhook",
            SIDECAR_WEBHOOK_URL=url,
            SIDECAR_WEBHOOK_SECRET=SECRET,
        )
        async with whole, aiohttp.ClientSession() as session:
            began_s = time.monotonic()
            for number in range(CALLS):
                async with session.post(whole.proxy_url + "/v1/things") as response:
                    assert response.status == 200
                await asyncio.sleep(max(0.0, began_s + (number + 1) / PER_S - time.monotonic()))
            if end == "killed":
                await whole.kill()
            else:
                assert await whole.stop() == 0
        code, out, _ = await whole.command("balance", "--format", "json")
        found = json.loads(out)
        here = found["backends"]["webhook"]
        print(f"{end}: {found['recorded']} recorded, {here['pending']} pending")
        assert found["recorded"] + found["open"] >= CALLS - 1
        if end == "deleted":
            assert (here["delivered"], here["pending"]) == (CALLS, 0)
        elif end == "killed":
            assert here["pending"] < CALLS / 2  # of the last moments, not of all
        else:
            assert (here["delivered"], here["pending"]) == (0, CALLS)
        assert code == 0
