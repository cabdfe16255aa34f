"""Adds up a fixed spool in processes that die: one child for each line of JSON on standard input (`delivery_child`).

A child delivers to the embedded ledger, redrives what was parked, and answers with the balance; or it kills itself at
the n-th statement sent to `ledger.db` or to `delivery.db`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.backend_trials import made
from support.delivery_child import Fuse, fused, serve
from support.delivery_fixtures import QUICK, World, until

from sidecar.backends.ledger import LedgerBackend
from sidecar.ledger import LedgerStore
from sidecar.meters.buckets import BatchSums
from sidecar.model.call_group import CallGroup
from sidecar.model.delivery import Encoded
from sidecar.model.record import Record

RECORDS = 60
PARKED = 17  # the number of the one that cannot be added at first


class Child(LedgerBackend):
    """One record cannot be added until it is redriven."""

    first = True

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        if self.first and any(record.seq == PARKED for record in records):
            raise ArithmeticError("not exact")
        return super().add_up(records, groups)


async def deliver(order: dict[str, Any]) -> dict[str, Any]:
    directory = Path(order["directory"])
    fuse = Fuse(order.get("kind", ""), order.get("at", 0))
    world = World(directory, limits=QUICK)
    if not world.path.exists():
        world.begin("ledger")
    world.spool.add(20, group=7)
    fused(fuse)
    store = LedgerStore(directory / "ledger.db")
    assert store._db is not None
    store._db.set_trace_callback(lambda _: fuse("ledger"))
    backend: Child = made(Child, open_ledger=lambda: store)
    async with world.deliver(backend) as delivery:
        for _ in range(5):  # what is there at a start, and what comes later
            delivery.wake()
            await until(lambda: delivery.totals(world.spool.upto())["ledger"].pending == 0)
            if world.spool.last_seq("one") < RECORDS:
                world.spool.add(10, group=5)
        backend.first = False
        await delivery.redrive()
        await until(lambda: delivery.totals(world.spool.upto())["ledger"].pending == 0)
        await delivery.forget({"one": RECORDS // 2})
        totals = world.balance(delivery)["ledger"]
        return {"delivered": totals.delivered, "duplicate": totals.duplicate, "parked": dict(totals.parked)}


if __name__ == "__main__":
    assert os.name == "posix"
    serve(deliver, sys.stdin.buffer, sys.stdout.buffer)
