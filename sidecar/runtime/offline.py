"""Delivery's books with no delivery at work: what a command that changes them uses while no instance runs.

It holds the data directory's lock, so no instance can start meanwhile, and it sends nothing by itself: what is pending
stays so.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.delivery import DeliveryStore, SystemClock, read_clock, removed_backend
from sidecar.delivery.queries import DeliveryQueries, Found
from sidecar.delivery.rows import Parked
from sidecar.delivery.types import Now
from sidecar.ledger import identity
from sidecar.model.delivery import Backend
from sidecar.runtime import backend_factory, directory_identity
from sidecar.runtime.backend_factory import LEDGER_NAME
from sidecar.runtime.instance_lock import DataLock
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Settings
from sidecar.spool import SpoolReader


@dataclass(slots=True, kw_only=True)
class Books:
    """What `delivery.corrections` needs. `backends`: those configured, by name."""

    reader: SpoolReader
    store: DeliveryStore
    queries: DeliveryQueries
    metrics: Metrics
    backends: dict[str, Backend]

    def now(self) -> Now:
        return read_clock(SystemClock())

    def find(self, one: str) -> list[Found]:
        return self.queries.find(one, self.reader)

    def parked(self, *, backend: str | None, ids: Sequence[str] | None, after: int, limit: int) -> list[Parked]:
        return self.queries.parked(backend=backend, ids=ids, after=after, limit=limit)


SAID: Final = "somebody said so"  # that it is a copy, where nothing in it could tell


async def adopt(data_dir: Path, how: directory_identity.As) -> dict[str, int]:
    """Decide what a data directory is while no instance runs on it, also where nothing was noticed: after a snapshot of
    a whole volume was put back, nothing in it can tell. How many records are left to another instance, by backend.
    """
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(DataLock.take(data_dir))
        state = DeliveryStore.open(data_dir / "delivery.db")
        stack.callback(state.close)
        reader = stack.enter_context(SpoolReader(data_dir))
        noticed = directory_identity.noticed_in(data_dir)
        # What was recorded here since it was noticed is nobody else's: that is no part of what was copied.
        ends = directory_identity.ends_of(data_dir) if noticed is None else noticed.ends
        if how is directory_identity.As.COPY:
            if noticed is None:
                noticed = directory_identity.notice(data_dir, SAID, whole=True, since_s=state.last_clock(), ends=ends)
                # Kept before anything is parked: cut short here, it is a copy still, and nothing of it is delivered.
                directory_identity.store(data_dir, state.all_cursors(), noticed)
            for name in state.served():
                if not (noticed.whole and name == LEDGER_NAME):
                    steps: list[int] = []
                    await removed_backend.leave(name, state, reader, time.time, ends, steps.append)
                    counts[name] = sum(steps)
        else:
            directory_identity.thaw(data_dir, ends)
        directory_identity.store(data_dir, state.all_cursors(), None)
        if (data_dir / identity.NAME).exists():  # it has written to a ledger that many share
            known = identity.Identity(data_dir)
            (known.become_new if how is directory_identity.As.COPY else known.take_over)()
    return counts


@asynccontextmanager
async def books(settings: Settings) -> AsyncIterator[Books]:
    """Open them. Raises the parts' own errors, `LockError` where an instance runs after all."""
    async with AsyncExitStack() as stack:
        stack.enter_context(DataLock.take(settings.data_dir))
        state = DeliveryStore.open(settings.data_dir / "delivery.db")
        stack.callback(state.close)
        queries = state.queries()
        stack.callback(queries.close)
        reader = stack.enter_context(SpoolReader(settings.data_dir))
        made = {name: backend_factory.backend(settings, name) for name in settings.backends}
        for backend in made.values():
            stack.push_async_callback(backend.aclose)
        yield Books(
            reader=reader, store=state, queries=queries, metrics=Metrics(backends=settings.backends), backends=made
        )
