"""Delivery's own speed (P7): records a second from a spool in memory through sealing, sending and settling.

    PYTHONPATH=.:tests python tests/bench/delivery.py [records]

The backend answers at once, so what is measured is everything but the network: reading, encoding, every fsync. The
figures a core are by CPU time; a request over HTTP costs some 150 µs more.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.backend_trials import made
from support.delivery_fixtures import World
from support.fake_backend import FakeBackend

from sidecar.backends.base import EVERYTHING
from sidecar.backends.batching import seal_lines
from sidecar.backends.ledger import LedgerBackend
from sidecar.delivery import Limits
from sidecar.delivery.ledger_worker import SummedBatch
from sidecar.ledger import LedgerStore
from sidecar.model.delivery import Abilities, Atomicity, Backend, Dedup, Delivered, Encoded, Sealed, Verdict
from sidecar.model.record import Record

BATCHES = Abilities(events_max=100, atomicity=Atomicity.ALL_OR_NOTHING, dedup=Dedup.EVENT_ID)
KINDS = {
    "batches of 100": BATCHES,
    "one a request": Abilities(dedup=Dedup.REQUEST_KEY, concurrency=16),
    "one a request, no de-duplication": Abilities(dedup=Dedup.NONE, concurrency=16),
}
ROUNDS = 3


class Instant:
    """Takes everything at once."""

    def __init__(self, abilities: Abilities, name: str = "fake") -> None:
        self.abilities, self.name = abilities, name
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


class Lines(Instant):
    """The same with the encoding of `webhook` and `file`: the stored lines as they are."""

    def encode(self, records: Sequence[Record]) -> Encoded:
        return seal_lines(records, EVERYTHING, self.abilities)


async def several(records: int) -> None:
    """The CPU of three batch backends at once against that of one, in turns: one tail reads and parses for all."""
    spent: dict[int, list[float]] = {1: [], 3: []}
    for count in (1, 3) * ROUNDS:
        names = [f"fake{number}" for number in range(count)]
        spent[count].append(await _cpu_s(records, [Lines(BATCHES, name) for name in names]))
    one, three = (statistics.median(spent[count]) / records * 1e6 for count in (1, 3))
    print(f"three batch backends at once: {three:.1f} us of CPU a record, {three / one:.2f} x the {one:.1f} us of one")


async def ledger(records: int) -> None:
    """The embedded ledger with what it reads from the spool, and with sums that are handed over."""
    with tempfile.TemporaryDirectory() as directory:
        store = LedgerStore(Path(directory) / "ledger.db")
        spent_s = await _cpu_s(records, [made(LedgerBackend, open_ledger=lambda: store)])
        store.close()
    print(f"ledger, from the spool: {spent_s / records * 1e6:.1f} us of CPU a record")
    with tempfile.TemporaryDirectory() as directory:
        store = LedgerStore(Path(directory) / "ledger.db")
        handed_s = await _handed_s(records, made(LedgerBackend, open_ledger=lambda: store))
        print(f"ledger, sums handed over: {handed_s * 1e6:.1f} us of CPU a record")
        store.close()


async def _handed_s(records: int, backend: LedgerBackend) -> float:
    """CPU a record beside the making of the sums, which whoever has the records at hand does."""
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), limits=Limits())
        world.begin(backend.name)
        world.spool.add(records, group=200)
        groups, world.spool.groups["one"] = world.spool.groups["one"], []
        batches = [
            SummedBatch(
                instance="one",
                first_seq=group.first_seq,
                last_seq=group.last_seq,
                sums=backend.add_up([Record.from_json(line) for line in group.lines])[0],
            )
            for group in groups
        ]
        async with world.deliver(backend) as delivery:
            cpu_s = time.process_time()
            for start in range(0, len(batches), 32):
                world.spool.groups["one"] += groups[start : start + 32]
                for batch in batches[start : start + 32]:
                    assert delivery.apply(batch)
                await delivery.drain(600.0)
            cpu_s = time.process_time() - cpu_s
            assert delivery.totals(world.spool.upto())[backend.name].delivered == records
    return cpu_s / records


async def _cpu_s(records: int, backends: Sequence[Backend]) -> float:
    with tempfile.TemporaryDirectory() as directory:
        world = World(Path(directory), limits=Limits())
        world.begin(*(backend.name for backend in backends))
        world.spool.add(records, group=200)
        cpu_s = time.process_time()
        async with world.deliver(*backends) as delivery:
            await delivery.drain(600.0)
            cpu_s = time.process_time() - cpu_s
            for totals in delivery.totals(world.spool.upto()).values():
                assert totals.delivered == records
    return cpu_s


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
    asyncio.run(several(records // 2))
    asyncio.run(ledger(records // 2))


if __name__ == "__main__":
    main()
