"""A backend that is down while calls go on, and a million records that wait: memory flat, nothing lost, all drained.

Twenty seconds in `make system`; `make soak` takes SOAK_S (ten minutes) and SOAK_RECORDS (a million) and prints the
figures that stand in docs/guarantees.md. No assertion is on a time: bounded are memory, files and what arrives.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from support.filled import fill
from support.mishaps import watching
from support.oracle import CHAT
from support.tiny import tiny_upstream
from support.whole import ROOT, Whole, children, environment

from sidecar.dev.mock_backends.faults import Do, Fault

SECONDS = float(os.environ.get("SOAK_S", "600"))
RECORDS = int(os.environ.get("SOAK_RECORDS", "1000000"))
CLIENTS = 12
CALLS_PER_S = 500
EMPTY_EVERY_S = 5.0  # a receiver: it takes some 10 MB a second, and keeps 2 GiB
GROWTH_MIB_MAX = 24  # of memory, between the first fifth and the end: what waits is on disk
PENDING_MIB_MAX = 150  # of memory with a million pending
MIB = 1 << 20


def size_bytes(root: Path, pattern: str = "**/*") -> int:
    return sum(path.stat().st_size for path in root.glob(pattern) if path.is_file())


def quantiles(seconds: list[float]) -> str:
    found = sorted(seconds)
    return ", ".join(f"p{q} {found[int(len(found) * q / 100)] * 1e3:.1f} ms" for q in (50, 99))


class Load:
    """A steady stream of calls; how long each took."""

    def __init__(self, whole: Whole) -> None:
        self._url = f"{whole.proxy_url}/v1/chat/completions"
        self.answered = 0
        self.took_s: list[float] = []

    async def run(self, seconds: float) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:
            end_s = time.monotonic() + seconds
            await asyncio.gather(*(self._client(session, end_s) for _ in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession, end_s: float) -> None:
        gap_s = CLIENTS / CALLS_PER_S
        while (began_s := time.monotonic()) < end_s:
            async with session.post(self._url, json=CHAT, headers={"x-tenant": "cus_one"}) as answer:
                await answer.read()
                assert answer.status == 200
            self.answered += 1
            took_s = time.monotonic() - began_s
            self.took_s.append(took_s)
            await asyncio.sleep(max(gap_s - took_s, 0))


async def soak(tmp_path: Path, seconds: float) -> None:
    """Two backends of which one is down from the beginning; it comes back at the end and gets everything."""
    async with tiny_upstream() as upstream, watching() as (receiver, url):
        receiver.faults.set(Fault(do=Do.STATUS, status=503, backend="meter"))
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="ledger,meter",
            SIDECAR_METER_URL=f"{url}/meter",
            SIDECAR_SUBSCRIBER="header:x-tenant",
        )
        async with whole:
            load, memory = Load(whole), [whole.memory_bytes()]
            running = asyncio.create_task(load.run(seconds))
            while not running.done():
                await asyncio.wait([running], timeout=seconds / 20)
                memory.append(whole.memory_bytes())
            await running
            balance = await whole.get("/balance")
            meter = balance["backends"]["meter"]
            assert meter["delivered"] == 0
            assert not any(meter["parked"].values()), meter
            receiver.faults.set()
            back_s = time.monotonic()
            balance = await whole.settled(limit_s=60 + 10 * seconds)
            drained_s = time.monotonic() - back_s
            assert await whole.stop() == 0, whole.log.read_text()
        print(
            f"{load.answered:,} calls in {seconds:.0f} s ({load.answered / seconds:.0f}/s) with a backend down,"
            f" {quantiles(load.took_s)}; drained {drained_s:.1f} s after it came back;"
            f" memory {', '.join(f'{m / MIB:.0f}' for m in memory[:: max(len(memory) // 7, 1)])} MiB"
        )
        assert balance["holds"], balance
        assert balance["recorded"] == load.answered
        assert balance["backends"]["meter"]["delivered"] == load.answered
        billed = Counter(row["correlationId"] for row in receiver.billed("meter"))
        assert len(billed) == load.answered
        assert max(billed.values()) == 1
        assert memory[-1] - memory[len(memory) // 5] < GROWTH_MIB_MAX * MIB, memory


@pytest.mark.timeout(180)
async def test_a_backend_that_is_down_for_20_s(tmp_path: Path) -> None:
    await soak(tmp_path, 20)


@pytest.mark.soak
@pytest.mark.timeout(3600 + 12 * int(SECONDS))
async def test_a_backend_that_is_down_for_long(tmp_path: Path) -> None:
    await soak(tmp_path, SECONDS)


# --- a million pending -----------------------------------------------------------------------------------


@asynccontextmanager
async def receiver_of_its_own() -> AsyncIterator[str]:
    """The stand-in backends in another process, so that they do not share our core with the one who waits."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "sidecar", "receiver", "--listen", "127.0.0.1:0"),
        cwd=ROOT,
        env=environment({}),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        line = (await process.stderr.readline()).decode()
        yield line.split(" on ")[1].split()[0]
    finally:
        process.kill()
        await process.wait()


async def order(url: str, *rules: dict[str, object]) -> None:
    async with aiohttp.ClientSession() as session, session.post(f"{url}/_faults", json=list(rules)) as answer:
        assert answer.status == 200


@asynccontextmanager
async def emptied(url: str) -> AsyncIterator[None]:
    """What the stand-ins took is let go of from time to time: they keep 2 GiB, and take nothing beyond that."""

    async def empty() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                await asyncio.sleep(EMPTY_EVERY_S)
                async with session.delete(f"{url}/_received") as answer:
                    assert answer.status < 300

    emptying = asyncio.create_task(empty())
    try:
        yield
    finally:
        emptying.cancel()
        await asyncio.wait([emptying])
        if not emptying.cancelled():
            emptying.result()


async def pending_of(whole: Whole, backend: str) -> int:
    return int((await whole.get("/balance"))["backends"][backend]["pending"])


@pytest.mark.soak
@pytest.mark.timeout(3600)
async def test_a_start_with_a_million_pending_and_three_backends_down(tmp_path: Path) -> None:
    async with tiny_upstream() as upstream, receiver_of_its_own() as url:
        await order(url, {"do": "status", "status": 503})
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="meter,webhook,flexprice",
            SIDECAR_METER_URL=f"{url}/meter",
            SIDECAR_WEBHOOK_URL=f"{url}/webhook",
            SIDECAR_FLEXPRICE_URL=url,
            SIDECAR_FLEXPRICE_API_KEY="key-of-the-tests",
            SIDECAR_RETENTION="0s",
        )
        await whole.start()
        assert await whole.stop() == 0
        await fill(whole.data_dir, RECORDS)
        spool_bytes = size_bytes(whole.data_dir / "spool")

        began_s = time.monotonic()
        await whole.start()
        ready_s = time.monotonic() - began_s
        try:
            memory = []
            for _ in range(20):
                await asyncio.sleep(0.5)
                memory.append(whole.memory_bytes())
            assert await pending_of(whole, "meter") == RECORDS
            state_bytes = size_bytes(whole.data_dir, "delivery.db*")
            print(
                f"{RECORDS:,} pending for three backends that are down: ready in {ready_s:.2f} s,"
                f" at most {max(memory) / MIB:.0f} MiB of memory; spool {spool_bytes / MIB:.0f} MiB,"
                f" delivery.db {state_bytes / MIB:.1f} MiB"
            )
            assert max(memory) < PENDING_MIB_MAX * MIB
            await order(url)
            back_s = time.monotonic()
            async with emptied(url):
                balance = await whole.settled(limit_s=1800)
            drained_s = time.monotonic() - back_s
            async with asyncio.timeout(300):  # retention looks once a minute
                while size_bytes(whole.data_dir / "spool") > 200 * MIB:
                    await asyncio.sleep(1)
            print(
                f"drained to three backends in {drained_s:.0f} s ({3 * RECORDS / drained_s:,.0f} records/s in all),"
                f" {whole.memory_bytes() / MIB:.0f} MiB of memory; after retention: spool"
                f" {size_bytes(whole.data_dir / 'spool') / MIB:.0f} MiB,"
                f" delivery.db {size_bytes(whole.data_dir, 'delivery.db*') / MIB:.1f} MiB"
            )
            assert balance["holds"], balance
            assert all(b["delivered"] == RECORDS for b in balance["backends"].values()), balance["backends"]
            assert await whole.stop() == 0
        finally:
            await whole.kill()


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("backend", "count"), [("webhook", RECORDS // 2), ("ledger", RECORDS // 2), ("revenium", RECORDS // 20)]
)
async def test_how_fast_it_delivers(tmp_path: Path, backend: str, count: int) -> None:
    """P7: records a second to a batch backend, requests a second where each record is one."""
    async with tiny_upstream() as upstream, receiver_of_its_own() as url:
        of_backend = {
            "webhook": {"SIDECAR_WEBHOOK_URL": f"{url}/webhook"},
            "revenium": {"SIDECAR_REVENIUM_URL": url, "SIDECAR_REVENIUM_API_KEY": "key-of-the-tests"},
            "ledger": {},
        }
        whole = Whole(tmp_path / "data", upstream, SIDECAR_BACKENDS=backend, **of_backend[backend])
        await whole.start()
        assert await whole.stop() == 0
        await fill(whole.data_dir, count)
        await whole.start()
        try:
            began_s, before = time.monotonic(), await pending_of(whole, backend)
            cpu_s = cpu_of(whole)
            while (left := await pending_of(whole, backend)) > count // 20:
                await asyncio.sleep(0.2)
            took_s, cpu_s = time.monotonic() - began_s, cpu_of(whole) - cpu_s
            print(
                f"{backend}: {(before - left) / took_s:,.0f} records/s,"
                f" {(before - left) / cpu_s:,.0f} a second of CPU of ours"
            )
            balance = await whole.settled(limit_s=300)
            assert balance["holds"], balance
            assert balance["backends"][backend]["delivered"] == count
            assert await whole.stop() == 0
        finally:
            await whole.kill()


def cpu_of(whole: Whole) -> float:
    """Seconds of all processes that live now."""
    assert whole.process is not None
    ticks = 0
    for pid in (whole.process.pid, *children(whole.process.pid)):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
