"""PostgreSQL is away while calls go on at a steady pace: no call waits for it, memory is flat, and all arrives after.

Ten seconds in `make system`; `make soak` takes SOAK_AWAY_S (20) and prints its figures: response times before, while it
is away and after, memory at the start, after each and in the middle of the outage, and how long it took until all was
delivered. Nothing is asserted of a time: the longest response while the database is away is held against the longest
before.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from pathlib import Path

import aiohttp
import pytest
from support.mishaps import watching
from support.oracle import CHAT
from support.postgres_server import PostgresServer
from support.tiny import tiny_upstream
from support.whole import Whole

from sidecar.gate.shares import USED_S

SECONDS = float(os.environ.get("SOAK_AWAY_S", "20"))
CALLS_PER_S = 300
CLIENTS = 12
GROWTH_MIB_MAX = 24  # of memory, while the database is away: what waits is on disk
FLAT_MIB_MAX = 8  # in the second half of that
SETTLES_S = 20  # shorter, and what the first failures leave is still a part of it
SLOWER_MAX = 6.0  # at the 99th percentile: a commit that waited for the network would be a hundred times as slow
MIB = 1 << 20


class Steady:
    """Calls at a steady pace, and how long each took, by phase."""

    def __init__(self, whole: Whole) -> None:
        self._url = f"{whole.proxy_url}/v1/chat/completions"
        self.phase = "before"
        self.took_s: dict[str, list[float]] = {}
        self.answered = 0
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    async def run(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CLIENTS)) as session:
            await asyncio.gather(*(self._client(session, number) for number in range(CLIENTS)))

    async def _client(self, session: aiohttp.ClientSession, number: int) -> None:
        gap_s = CLIENTS / CALLS_PER_S
        await asyncio.sleep(gap_s * number / CLIENTS)
        while not self._stopping:
            phase, began_s = self.phase, time.monotonic()
            async with session.post(self._url, json=CHAT, headers={"x-tenant": f"cus_{number}"}) as answer:
                await answer.read()
                assert answer.status == 200
            self.answered += 1
            took_s = time.monotonic() - began_s
            self.took_s.setdefault(phase, []).append(took_s)
            await asyncio.sleep(max(gap_s - took_s, 0))

    def quantile(self, phase: str, q: float) -> float:
        found = sorted(self.took_s[phase])
        return found[int(len(found) * q)]


async def away(tmp_path: Path, server: PostgresServer, seconds: float) -> None:
    """As long before as away. The sidecar counts a limit with the others and delivers what is elected."""
    async with tiny_upstream() as upstream, watching() as (receiver, url):
        whole = Whole(
            tmp_path / "data",
            upstream,
            SIDECAR_BACKENDS="ledger,webhook",
            SIDECAR_WEBHOOK_URL=f"{url}/webhook",
            SIDECAR_LEDGER_URL=server.database(),
            SIDECAR_DELIVER="elected",
            SIDECAR_SUBSCRIBER="header:x-tenant",
            SIDECAR_LIMITS="calls=1000000/day",
        )
        async with whole:
            await whole.until_metric("sidecar_build_info{")
            load, memory = Steady(whole), [whole.memory_bytes()]
            running = asyncio.create_task(load.run())
            await asyncio.sleep(seconds)
            memory.append(whole.memory_bytes())
            load.phase = "away"
            await asyncio.to_thread(server.kill)
            for _ in range(2):
                await asyncio.sleep(seconds / 2)
                memory.append(whole.memory_bytes())
            load.phase = "after"
            await asyncio.to_thread(server.start)
            back_s = time.monotonic()
            await asyncio.sleep(USED_S / 2)
            load.stop()
            await running
            memory.append(whole.memory_bytes())
            async with asyncio.timeout(60 + 10 * seconds):
                while len(receiver.billed("webhook")) < load.answered:
                    await asyncio.sleep(0.1)
            drained_s = time.monotonic() - back_s
            balance = await whole.settled(limit_s=60)
            assert await whole.stop() == 0, whole.log.read_text()[-4000:]
    figures = "; ".join(
        f"{phase} p50 {load.quantile(phase, 0.5) * 1e3:.1f} p99 {load.quantile(phase, 0.99) * 1e3:.1f} ms"
        for phase in load.took_s
    )
    print(
        f"{load.answered:,} calls, the database away for {seconds:.0f} s: {figures}; all delivered {drained_s:.1f} s"
        f" after it came back; memory {', '.join(f'{m / MIB:.0f}' for m in memory)} MiB"
    )
    billed = Counter(row["id"] for row in receiver.billed("webhook"))
    assert (len(billed), max(billed.values())) == (load.answered, 1)
    assert balance["recorded"] == load.answered
    assert load.quantile("away", 0.99) < SLOWER_MAX * max(load.quantile("before", 0.99), 0.005), load.took_s
    assert memory[3] - memory[1] < GROWTH_MIB_MAX * MIB, memory
    assert seconds < SETTLES_S or memory[3] - memory[2] < FLAT_MIB_MAX * MIB, memory


@pytest.mark.timeout(300)
async def test_a_database_that_is_away_keeps_no_call_waiting(tmp_path: Path, killable_postgres: PostgresServer) -> None:
    await away(tmp_path, killable_postgres, 10)


@pytest.mark.soak
@pytest.mark.timeout(1200)
async def test_a_database_that_is_away_for_long(tmp_path: Path, killable_postgres: PostgresServer) -> None:
    await away(tmp_path, killable_postgres, SECONDS)
