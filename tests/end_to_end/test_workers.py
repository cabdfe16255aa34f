"""Several workers: they share the port, one that dies is replaced without a loss, and the sums are sums."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import signal
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.oracle import SETTINGS, Oracle, judge
from support.tiny import tiny_upstream
from support.whole import Whole, children, is_running, suspend

from sidecar.runtime.seam import ASK_S

ROOT = Path(__file__).parent.parent.parent


async def metric(whole: Whole, name: str) -> float:
    async with aiohttp.ClientSession() as session, session.get(f"{whole.admin_url}/metrics") as answer:
        families = text_string_to_metric_families(await answer.text())
        return sum(s.value for family in families for s in family.samples if s.name == name)


@pytest.mark.timeout(120)
async def test_workers_share_the_port_and_a_dead_one_is_replaced(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, SIDECAR_WORKERS="2", **SETTINGS)
        async with whole:
            assert whole.process is not None
            assert {role: len(pids) for role, pids in whole.children().items()} == {"meter": 1, "serve": 2}
            oracle = Oracle(lambda: whole.proxy_url, seed=7, clients=8)
            load = asyncio.create_task(oracle.run())
            for _ in range(3):
                owed = len(oracle.owed)
                async with asyncio.timeout(30):
                    while len(oracle.owed) < owed + 40:
                        await asyncio.sleep(0.01)
                os.kill(whole.children()["serve"][0], signal.SIGKILL)
                async with asyncio.timeout(30):
                    while len(whole.children()["serve"]) < 2:
                        await asyncio.sleep(0.01)
            oracle.stop()
            await load
            balance = await whole.settled()
            records = await whole.records()
            ended = await metric(whole, "sidecar_calls_total")
            assert await metric(whole, "sidecar_recorded_total") == len(records)
            code, out, err = await whole.command("balance")
            assert code == 0, out + err
            assert await whole.stop() == 0, whole.log.read_text()
    assert whole.log.read_text().count("was killed by SIGKILL: it is started again") == 3

    judge(oracle.owed, records)
    assert balance["holds"], balance
    assert balance["backends"]["ledger"]["delivered"] == len(records)
    # One process writes for all of them; who served a call stands at the end of its id, and each had calls.
    assert len(Counter(record["instance"] for record in records)) == 1
    assert len(Counter(record["id"][-12:] for record in records)) > 2
    assert 0 < ended <= len(records)


@pytest.mark.timeout(120)
async def test_a_killed_supervisor_leaves_no_worker_behind_and_no_record(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, SIDECAR_WORKERS="2", **SETTINGS)
        await whole.start()
        assert whole.process is not None
        workers = children(whole.process.pid)
        oracle = Oracle(lambda: whole.proxy_url, seed=8)
        load = asyncio.create_task(oracle.run())
        async with asyncio.timeout(30):
            while len(oracle.owed) < 60:
                await asyncio.sleep(0.01)
        await whole.kill_supervisor()
        await whole.start()  # at once: it waits for the workers of the old one
        assert not any(is_running(pid) for pid in workers)
        async with asyncio.timeout(30):
            while len(oracle.owed) < 120:
                await asyncio.sleep(0.01)
        oracle.stop()
        await load
        balance = await whole.settled()
        records = await whole.records()
        assert await whole.stop() == 0, whole.log.read_text()
        # With one worker, what several left is read all the same.
        alone = Whole(tmp_path / "data", upstream, **SETTINGS)
        async with alone:
            assert (await alone.settled())["recorded"] == len(records)
            assert await alone.stop() == 0

    judge(oracle.owed, records)
    assert balance["holds"], balance


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="another process's limits can be set on Linux alone")
@pytest.mark.timeout(120)
@pytest.mark.parametrize("role", ["meter", "serve"])
async def test_a_system_that_gives_no_process_is_asked_again_and_no_call_is_lost(tmp_path: Path, role: str) -> None:
    async with tiny_upstream() as upstream:
        async with Whole(tmp_path / "data", upstream, SIDECAR_WORKERS="2", **SETTINGS) as whole:
            assert whole.process is not None
            oracle = Oracle(lambda: whole.proxy_url, seed=9)
            load = asyncio.create_task(oracle.run())
            pid = whole.process.pid
            limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))  # it has more: there is none for another
            os.kill(whole.children()[role][0], signal.SIGKILL)
            async with asyncio.timeout(30):
                while whole.log.read_text().count("cannot be started, which is tried again") < 3:
                    await asyncio.sleep(0.01)
            owed = len(oracle.owed)
            async with asyncio.timeout(30):
                while len(oracle.owed) < owed + 20:
                    await asyncio.sleep(0.01)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
            async with asyncio.timeout(30):
                while {name: len(pids) for name, pids in whole.children().items()} != {"meter": 1, "serve": 2}:
                    await asyncio.sleep(0.01)
            oracle.stop()
            await load
            balance = await whole.settled()
            records = await whole.records()
            assert await whole.stop() == 0, whole.log.read_text()
    judge(oracle.owed, records)
    assert balance["holds"], balance


@pytest.mark.skipif(sys.platform != "linux", reason="what children a process has is told by Linux")
async def test_the_supervisor_leaves_no_orphan_of_others_in_the_systems_table(tmp_path: Path) -> None:
    """As the first process of a container gets them; here one that was there before it."""
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream)
        whole.before = ("sh", "-c", 'sleep 0.1 & exec "$@"', "sh")
        async with whole:
            async with asyncio.timeout(30):
                while set(whole.children()) != {"meter", "serve"}:
                    await asyncio.sleep(0.01)
            assert await whole.stop() == 0


async def test_workers_use_the_directory_that_the_command_line_names(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "not-this-one", upstream, SIDECAR_WORKERS="2", **SETTINGS)
        whole.data_dir = tmp_path / "this-one"
        whole.arguments = ("--data-dir", str(whole.data_dir))
        async with whole:
            assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["this-one"]
            assert len(list((whole.data_dir / "spool").iterdir())) == 1
            assert await whole.stop() == 0


@pytest.mark.timeout(120)
async def test_a_damaged_ledger_blocks_itself_and_not_who_goes_on_for_a_dead_metering_process(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    ledger = data_dir / "ledger.db"
    async with tiny_upstream() as upstream, aiohttp.ClientSession() as session:
        async with Whole(data_dir, upstream) as whole:

            async def calls(count: int) -> None:
                for _ in range(count):
                    async with session.post(f"{whole.proxy_url}/v1/things", json={}) as response:
                        assert response.status == 200
                        await response.read()

            await calls(2)
            await whole.settled()
            ledger.write_bytes(b"damaged " * 4096)
            for name in ("ledger.db-wal", "ledger.db-shm"):
                (data_dir / name).unlink()
            (metering,) = whole.children()["meter"]
            os.kill(metering, signal.SIGKILL)
            await calls(3)
            await whole.until_metric('sidecar_blocked{backend="ledger"}')
            assert "ledger is blocked: ledger_damaged" in (await whole.get("/readyz"))["notes"]
            assert len(await whole.records()) == 5

            ledger.rename(tmp_path / "ledger.damaged")
            balance = await whole.settled(limit_s=60)
            assert balance["holds"], balance
            assert balance["backends"]["ledger"]["delivered"] == 5
            assert await whole.stop() == 0, whole.log.read_text()


@pytest.mark.timeout(120)
async def test_a_damaged_ledger_is_no_reason_not_to_serve(tmp_path: Path) -> None:
    """A fresh start: calls go through, it is said wherever somebody looks before one comes, and nothing is lost."""
    data_dir = tmp_path / "data"
    ledger = data_dir / "ledger.db"
    async with tiny_upstream() as upstream, aiohttp.ClientSession() as session:
        async with Whole(data_dir, upstream) as whole:
            async with session.post(f"{whole.proxy_url}/v1/things", json={}) as response:
                await response.read()
            await whole.settled()
        for kept in data_dir.glob("ledger.db*"):
            kept.unlink()
        ledger.write_bytes(b"damaged " * 4096)
        async with Whole(data_dir, upstream) as whole:
            await whole.until_metric('sidecar_blocked{backend="ledger"}')
            assert "ledger is blocked: ledger_damaged" in (await whole.get("/readyz"))["notes"]
            assert f"{ledger} is damaged (file is not a database)" in whole.log.read_text()
            for _ in range(3):
                async with session.post(f"{whole.proxy_url}/v1/things", json={}) as response:
                    assert response.status == 200
                    await response.read()
            code, _, err = await whole.command("check")
            assert (code, f"{ledger} is damaged" in err, "move it away to begin a new one" in err) == (2, True, True)
            code, _, err = await whole.command("usage")
            assert (code, f"{ledger} is damaged" in err) == (1, True)
            async with session.get(f"{whole.admin_url}/usage") as answer:
                assert answer.status == 503
                assert f"{ledger} is damaged" in (await answer.json())["error"]
            ledger.rename(tmp_path / "ledger.damaged")
            balance = await whole.settled(limit_s=60)
            assert balance["holds"], balance
            assert balance["backends"]["ledger"]["delivered"] == 4
            assert await whole.stop() == 0, whole.log.read_text()
        assert ledger.read_bytes().startswith(b"SQLite format 3")


@pytest.mark.timeout(120)
async def test_a_worker_that_hangs_sends_no_traffic_away_from_the_other(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream:
        whole = Whole(tmp_path / "data", upstream, SIDECAR_WORKERS="2", **SETTINGS)
        async with whole:
            hanging = whole.children()["serve"][0]
            suspend(hanging)
            try:
                async with aiohttp.ClientSession() as session, session.get(f"{whole.admin_url}/readyz") as answer:
                    assert answer.status == 200
                    assert "1 of 2 workers do not answer" in await answer.text()
                assert await metric(whole, "sidecar_spool_degraded") == 0
            finally:
                os.kill(hanging, signal.SIGCONT)
            assert await whole.stop() == 0, whole.log.read_text()


def test_readiness_is_known_before_a_probe_gives_up() -> None:
    """Kubernetes gives it a second where a manifest says nothing else."""
    assert ASK_S < 1.0
    for path in (ROOT / "config").rglob("*.y*ml"):
        for probe in re.findall(r"readinessProbe:\n(?: +.*\n){2}", path.read_text()):
            assert "timeoutSeconds: 3" in probe, path
