"""The admin port over a running whole: alive, ready, counted, balanced, and parked records offered again."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.tiny import tiny_upstream
from support.whole import Whole, running_receiver

CHAT = {"model": "gpt-5-mini", "messages": []}


async def call(whole: Whole, path: str = "/v1/chat/completions") -> int:
    async with aiohttp.ClientSession() as session, session.post(whole.proxy_url + path, json=CHAT) as answer:
        await answer.read()
        return answer.status


async def test_it_says_how_it_is(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream)
        async with whole:
            assert await call(whole) == 200
            balance = await whole.settled()
            assert balance["holds"] is True
            assert (balance["admitted"], balance["recorded"], balance["open"]) == (1, 1, 0)
            assert await whole.get("/healthz") == {"status": "alive"}
            assert (await whole.get("/readyz"))["status"] == "ok"
            async with aiohttp.ClientSession() as session, session.get(f"{whole.admin_url}/metrics") as answer:
                families = {f.name: f for f in text_string_to_metric_families(await answer.text())}
            assert [s.value for s in families["sidecar_admitted"].samples] == [1]
            assert [s.value for s in families["sidecar_balance_holds"].samples] == [1]
            tokens = {s.labels["kind"]: s.value for s in families["sidecar_tokens"].samples}
            assert tokens == {"input": 43, "output": 97}
            assert "sidecar_lost" in families
            assert await whole.stop() == 0


@pytest.mark.parametrize("what", ["metering:Metering.balance", "billing:Billing.parked_now"])
async def test_metrics_are_told_where_the_balance_cannot_be_read(what: str, tmp_path: Path) -> None:
    """A disk that fails is when somebody looks at them."""
    async with tiny_upstream() as upstream:
        whole = Whole(
            tmp_path / "data", upstream, FAILS_AT=f"sidecar.runtime.{what} 1", FAILS_MARK=str(tmp_path / "failed")
        )
        async with whole:
            assert await call(whole) == 200
            async with aiohttp.ClientSession() as session, session.get(f"{whole.admin_url}/metrics") as answer:
                assert answer.status == 200
                without = {f.name: f.samples for f in text_string_to_metric_families(await answer.text())}
            assert "sk-secret" not in whole.log.read_text()
            assert "the balance cannot be read" in whole.log.read_text()
            assert without["sidecar_disk_bytes"][0].value > 0
            assert not without["sidecar_parked_now"]
            await whole.settled()
            assert "\nsidecar_admitted_total 1.0\n" in await whole.text("/metrics")


async def test_what_cannot_be_answered_says_so_and_is_in_the_log(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        at = {"FAILS_AT": "sidecar.runtime.admin.reports:Reports._usage 1", "FAILS_MARK": str(tmp_path / "failed")}
        async with Whole(tmp_path / "data", upstream, **at) as whole:
            assert await call(whole) == 200
            await whole.settled()
            async with aiohttp.ClientSession() as session:
                async with session.get(f"{whole.admin_url}/usage") as answer:
                    assert (answer.status, await answer.json()) == (
                        500,
                        {"error": "a mistake of the sidecar's own: its log says where"},
                    )
                assert "could not be answered" in whole.log.read_text()
                assert "sk-secret" not in whole.log.read_text()
                segment = next((tmp_path / "data" / "spool").glob("*/*.seg"))
                segment.unlink()
                segment.mkdir()
                async with session.get(f"{whole.admin_url}/records") as answer:
                    assert answer.status == 503
                    assert f"cannot read {segment}" in (await answer.json())["error"]


async def test_a_refused_record_is_parked_visible_and_redriven(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream, running_receiver() as (receiver, url):
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="ledger,meter",
            SIDECAR_METER_URL=f"{url}/meter",
            SIDECAR_METER_BATCH="1",
        )
        async with whole:
            async with aiohttp.ClientSession() as session:
                await session.post(f"{url}/_faults", json={"do": "status", "status": 400})
                assert await call(whole) == 200
                balance = await whole.settled()
                assert sum(balance["backends"]["meter"]["parked"].values()) == 1, balance
                assert balance["backends"]["ledger"]["delivered"] == 1
                assert balance["holds"]
                code, out, _ = await whole.command("spool", "parked")
                assert code == 0
                assert "meter" in out
                await session.delete(f"{url}/_faults")
                assert (await whole.change("/redrive", data="backend=meter"))[0] == 415
                assert (await whole.change("/redrive", json={"everything": True}))[0] == 400
            code, out, err = await whole.command("spool", "redrive", "--backend", "meter")
            assert code == 0, err
            balance = await whole.settled()
            assert balance["backends"]["meter"]["delivered"] == 1, balance
            assert not sum(balance["backends"]["meter"]["parked"].values())
            assert balance["holds"]
            assert await whole.stop() == 0
        assert len(receiver.billed("meter")) == 1


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_second_instance_is_told_who_has_the_directory(tmp_path: Path, workers: str) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, SIDECAR_WORKERS=workers)
        async with whole:
            assert whole.process is not None
            code, _, err = await whole.command("serve", "--data-dir", str(tmp_path / "data"))
            assert code != 0
            assert f"process {whole.process.pid}" in err
            assert "SIDECAR_DATA_DIR" in err
            assert await call(whole) == 200  # and it goes on
            assert await whole.stop() == 0
