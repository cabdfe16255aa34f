"""Delivery's books with no delivery at work: what a command that changes them uses while no instance runs.

It holds the data directory's lock, so no instance can start meanwhile, and it sends nothing by itself: what is pending
stays so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from sidecar import billers
from sidecar.delivery import DeliveryState, SystemClock
from sidecar.delivery.ports import read_clock
from sidecar.delivery.state.accounts import Accounts, Found
from sidecar.delivery.state.rows import Parked
from sidecar.delivery.words import Now
from sidecar.lock import DataLock
from sidecar.metrics import Metrics
from sidecar.settings import Settings
from sidecar.spool import SpoolReader
from sidecar.verdict import Backend

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class Books:
    """What `delivery.mending` needs. `backends`: those configured, by name."""

    reader: SpoolReader
    state: DeliveryState
    accounts: Accounts
    metrics: Metrics
    backends: dict[str, Backend]

    async def in_state(self, work: Callable[[], _T]) -> _T:
        return work()  # nobody else waits for this loop

    def look(self) -> tuple[Now, bool]:
        return read_clock(SystemClock()), False

    def find(self, one: str) -> list[Found]:
        return self.accounts.find(one)

    def parked(self, *, backend: str | None, ids: Sequence[str] | None, after: int, limit: int) -> list[Parked]:
        return self.accounts.parked(backend=backend, ids=ids, after=after, limit=limit)


@asynccontextmanager
async def books(settings: Settings) -> AsyncIterator[Books]:
    """Open them. Raises the parts' own errors, `LockError` where an instance runs after all."""
    async with AsyncExitStack() as stack:
        stack.enter_context(DataLock.take(settings.data_dir))
        state = DeliveryState.open(settings.data_dir / "delivery.db")
        stack.callback(state.close)
        accounts = Accounts(state.path)
        stack.callback(accounts.close)
        reader = stack.enter_context(SpoolReader(settings.data_dir))
        made = {name: billers.backend(settings, name) for name in settings.backends}
        for backend in made.values():
            stack.push_async_callback(backend.aclose)
        yield Books(
            reader=reader, state=state, accounts=accounts, metrics=Metrics(backends=settings.backends), backends=made
        )
