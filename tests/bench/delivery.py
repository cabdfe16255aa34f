"""Delivery's own speed (P7): records a second from a spool in memory through sealing, sending and settling.

    PYTHONPATH=.:tests python tests/bench/delivery.py [records]

The backend answers at once, so what is measured is everything but the network: reading, encoding, every fsync. The
figures a core are by CPU time; a request over HTTP costs some 150 µs more.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.delivery_fixtures import World
from support.fake_backend import FakeBackend

from sidecar.delivery import Limits
from sidecar.model.delivery import Abilities, Atomicity, Dedup, Delivered, Encoded, Sealed, Verdict
from sidecar.model.record import Record

KINDS = {
    "batches of 100": Abilities(events_max=100, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID),
    "one a request": Abilities(dedup=Dedup.REQUEST_KEY, concurrency=16),
    "one a request, no de-duplication": Abilities(dedup=Dedup.NONE, concurrency=16),
}


class Instant:
    """Takes everything at once."""

    name = "fake"

    def __init__(self, abilities: Abilities) -> None:
        self.abilities = abilities
        self._encoder = FakeBackend(abilities)

    def encode(self, records: Sequence[Record]) -> Encoded:
        return self._encoder.encode(records)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        await asyncio.sleep(0)
        return [Delivered()] * len(sealed.events)

    async def aclose(self) -> None:
        pass


async def measure(name: str, abilities: Abilities, records: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), limits=Limits())
        world.begin("fake")
        world.spool.add(records, group=200)
        gaps: list[float] = []
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        async with world.deliver(Instant(abilities)) as delivery:
            beating = asyncio.create_task(beat(gaps))
            await delivery.drain(600.0)
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            beating.cancel()
            assert delivery.totals(world.spool.upto())["fake"].delivered == records
    gaps.sort()
    print(
        f"{name}: {records / wall_s:,.0f} records/s, {records / cpu_s:,.0f} for each second of CPU;"
        f" the loop was held up to {gaps[int(len(gaps) * 0.99)] * 1e3:.1f} ms (p99)"
    )


async def beat(gaps: list[float]) -> None:
    """How late a timer of a millisecond is: what the proxy beside would feel."""
    while True:
        start = time.perf_counter()
        await asyncio.sleep(0.001)
        gaps.append(time.perf_counter() - start - 0.001)


def main() -> None:
    records = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    for name, abilities in KINDS.items():
        count = records if abilities.events_max > 1 else records // 5
        asyncio.run(measure(name, abilities, count))


if __name__ == "__main__":
    main()
