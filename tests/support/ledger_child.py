"""Adds up a fixed spool in processes that die: one child for each line of JSON on standard input (`delivery_child`).

A child delivers to the embedded ledger, or where it is given a `url` to the shared one, redrives what was parked, and
answers with the balance; or it kills itself at the n-th statement sent to the ledger or to `delivery.db`.
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
from support.statements import before_statements

from sidecar.backends.ledger import LedgerBackend, SharedLedgerBackend
from sidecar.ledger import LedgerStore
from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_store import PostgresStore
from sidecar.meters.buckets import BatchSums
from sidecar.model.call_group import CallGroup
from sidecar.model.delivery import Encoded
from sidecar.model.record import Record

RECORDS = 60
PARKED = 17  # the number of the one that cannot be added at first


def refuse(first: bool, records: Sequence[Record]) -> None:
    """One record cannot be added until it is redriven."""
    if first and any(record.seq == PARKED for record in records):
        raise ArithmeticError("not exact")


class Child(LedgerBackend):
    first = True

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        refuse(self.first, records)
        return super().add_up(records, groups)


class SharedChild(SharedLedgerBackend):
    first = True

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        refuse(self.first, records)
        return super().add_up(records, groups)


def embedded(directory: Path, fuse: Fuse) -> Child:
    store = LedgerStore(directory / "ledger.db")
    assert store._db is not None
    store._db.set_trace_callback(lambda _: fuse("ledger"))
    backend: Child = made(Child, open_ledger=lambda: store)
    return backend


def shared(directory: Path, url: str, fuse: Fuse) -> SharedChild:
    store = PostgresStore(url, Identity(directory, "one"))
    before_statements(lambda _: fuse("ledger"))
    backend: SharedChild = made(SharedChild, open_shared_ledger=lambda: store)
    return backend


async def deliver(order: dict[str, Any]) -> dict[str, Any]:
    directory = Path(order["directory"])
    fuse = Fuse(order.get("kind", ""), order.get("at", 0))
    world = World(directory, limits=QUICK)
    if not world.path.exists():
        world.begin("ledger")
    world.spool.add(20, group=7)
    fused(fuse)
    url = order.get("url")
    backend = embedded(directory, fuse) if url is None else shared(directory, url, fuse)
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
