"""An operator beside a running sidecar: a backend that asks to be left alone, one that is left out for a deploy, a
redrive that cannot all go."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
from support.tiny import tiny_upstream
from support.whole import Whole, running_receiver

from sidecar.dev.mock_backends.faults import Do, Fault


async def call(whole: Whole, times: int = 1) -> None:
    async with aiohttp.ClientSession() as session:
        for _ in range(times):
            async with session.post(f"{whole.proxy_url}/v1/things", headers={"x-api-key": "one"}) as answer:
                await answer.read()


async def ready_when(whole: Whole, state: str) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            ready: dict[str, Any] = await whole.get("/readyz")
            if {row["backend"]: row["state"] for row in ready["backends"]}["webhook"] == state:
                return ready
            await asyncio.sleep(0.05)


async def test_a_day_of_retry_after_is_capped_shown_and_ended(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream, running_receiver() as (receiver, url):
        receiver.faults.set(Fault(do=Do.STATUS, status=503, retry_after_s=86_400, backend="webhook"))
        whole = Whole(tmp_path / "data", upstream, SIDECAR_BACKENDS="webhook", SIDECAR_WEBHOOK_URL=f"{url}/webhook")
        async with whole:
            await call(whole, 3)
            ready = await ready_when(whole, "paused")
            assert 880 < ready["backends"][0]["retry_after_s"] <= 900
            assert "webhook is paused" in ready["notes"][0]
            assert "spool retry --backend webhook" in ready["notes"][0]
            assert 'sidecar_retry_after_seconds{backend="webhook"} 8' in await whole.text("/metrics")
            code, out, _ = await whole.command("spool", "status", "--format", "json")
            assert code == 0
            (row,) = json.loads(out)["backends"]
            assert (row["state"], row["retry_after_s"] > 800) == ("paused", True)
            assert "webhook is paused" in (await whole.command("spool", "status"))[1]
            receiver.faults.set()
            code, out, err = await whole.command("spool", "retry", "--backend", "nobody")
            assert (code, out) == (2, "")
            assert "nobody is not one of the backends of this instance (webhook)" in err
            code, out, err = await whole.command("spool", "retry", "--backend", "webhook")
            assert code == 0, err
            assert "webhook was paused for" in out
            assert (await whole.settled())["backends"]["webhook"]["delivered"] == 3
            assert await whole.command("spool", "retry", "--backend", "webhook") == (
                1,
                "nothing waits at webhook\n",
                "",
            )
            assert 'sidecar_retry_after_seconds{backend="webhook"} 0.0' in await whole.text("/metrics")
            assert await whole.stop() == 0
        code, _, err = await whole.command("spool", "retry", "--backend", "webhook")
        assert code == 2
        assert "no instance is running" in err


async def test_what_was_recorded_while_a_backend_was_left_out_is_delivered(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream, running_receiver() as (receiver, url):
        receiver.faults.set(Fault(do=Do.STATUS, status=503, backend="webhook"))
        whole = Whole(
            tmp_path / "data", upstream, SIDECAR_BACKENDS="ledger,webhook", SIDECAR_WEBHOOK_URL=f"{url}/webhook"
        )
        await whole.start()
        await call(whole, 3)
        assert await whole.stop() == 0
        whole.env["SIDECAR_BACKENDS"] = "ledger"
        await whole.start()
        await call(whole, 4)
        await whole.settled()
        async with asyncio.timeout(20):
            while 'sidecar_parked_now{backend="webhook",reason="removed"} 3' not in await whole.text("/metrics"):
                await asyncio.sleep(0.05)
        assert await whole.stop() == 0
        receiver.faults.set()
        whole.env["SIDECAR_BACKENDS"] = "ledger,webhook"
        async with whole:
            async with asyncio.timeout(20):
                while (await whole.get("/balance"))["backends"]["webhook"]["delivered"] < 7:
                    await asyncio.sleep(0.05)
            balance = await whole.settled()
            assert balance["holds"]
            assert (await whole.command("spool", "verify"))[0] == 0
            assert "what was recorded meanwhile is delivered" in whole.log.read_text()
            assert await whole.stop() == 0
        ids = [body["id"] for body in receiver.billed("webhook")]
        assert (len(ids), len(set(ids))) == (7, 7)


async def test_a_redrive_says_why_what_stays_and_what_it_does_not_know(tmp_path: Path) -> None:
    config = tmp_path / "sidecar.toml"
    config.write_text("")
    async with tiny_upstream() as upstream, running_receiver() as (_, url):
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="lago",
            SIDECAR_LAGO_URL=url,
            SIDECAR_LAGO_API_KEY="k",
            SIDECAR_LAGO_METERS="api_calls",
            SIDECAR_CONFIG=str(config),
        )
        async with whole:
            await call(whole, 2)
            assert (await whole.settled())["backends"]["lago"]["parked"] == {"no_customer": 2}
            code, out, _ = await whole.command("spool", "redrive")
            said = "0 offered, 2 still parked: no_customer (name them under [subscribers.ID])"
            assert (code, out.splitlines()[0]) == (1, said)
            code, _, err = await whole.command("spool", "redrive", "nonsense")
            assert code == 1
            assert "nonsense  not found among what is parked" in err
            code, _, err = await whole.command("spool", "redrive", "--backend", "lgao")
            assert code == 2
            assert "lgao is not one of the backends" in err
            code, out, err = await whole.command("spool", "redrive", "--reason", "no_custmer")
            assert (code, out) == (1, "")
            assert "nothing is parked with the reason 'no_custmer'" in err
            code, out, _ = await whole.command("spool", "parked")
            (row, *_) = json.loads((await whole.command("spool", "parked", "--format", "json"))[1])
            assert row["subscriber"].startswith("key_")
            assert row["subscriber"][:24] in out
            log = whole.log.read_text()
            assert log.count("records are parked") == 1
            assert await whole.stop() == 0
        # The key of the hashes is lost: what is mapped matches nobody, and that is said.
        config.write_text(f'[subscribers.{row["subscriber"]}]\nlago = "sub_1"\n')
        (whole.data_dir / "hash.key").unlink()
        async with whole:
            assert "1 of [subscribers] are hashes of another key and match nobody" in whole.log.read_text()
            async with asyncio.timeout(20):  # what is parked for want of a customer goes by itself once there is one
                while (await whole.settled())["backends"]["lago"]["delivered"] < 2:
                    await asyncio.sleep(0.02)
            assert await whole.stop() == 0
