"""Delivery's books with no delivery at work: what a command that changes them uses while no instance runs.

It holds the data directory's lock, so no instance can start meanwhile, and it sends nothing by itself: what is pending
stays so.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from sidecar.delivery import DeliveryState, SystemClock, removed_backend
from sidecar.delivery.ports import read_clock
from sidecar.delivery.state.accounts import Accounts, Found
from sidecar.delivery.state.rows import Parked
from sidecar.delivery.types import Now
from sidecar.model.delivery import Backend
from sidecar.runtime import backend_factory, billing, directory_identity
from sidecar.runtime.instance_lock import DataLock
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Settings
from sidecar.spool import SpoolReader

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


@dataclass(slots=True)
class _Parking:
    """What parking alone needs (`delivery.removed`)."""

    reader: SpoolReader
    state: DeliveryState

    async def in_state(self, work: Callable[[], _T]) -> _T:
        return work()

    def look(self) -> tuple[Now, bool]:
        return read_clock(SystemClock()), False


SAID: Final = "somebody said so"  # that it is a copy, where nothing in it could tell


async def adopt(data_dir: Path, how: directory_identity.As) -> dict[str, int]:
    """Decide what a data directory is while no instance runs on it, also where nothing was noticed: after a snapshot of
    a whole volume was put back, nothing in it can tell. How many records are left to another instance, by backend.
    """
    counts: dict[str, int] = {}
    with ExitStack() as stack:
        stack.enter_context(DataLock.take(data_dir))
        state = DeliveryState.open(data_dir / "delivery.db")
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
                if not (noticed.whole and name == billing.LEDGER):
                    counts[name] = await removed_backend.leave(name, _Parking(reader, state), ends)
        else:
            directory_identity.thaw(data_dir, ends)
        directory_identity.store(data_dir, state.all_cursors(), None)
    return counts


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
        made = {name: backend_factory.backend(settings, name) for name in settings.backends}
        for backend in made.values():
            stack.push_async_callback(backend.aclose)
        yield Books(
            reader=reader, state=state, accounts=accounts, metrics=Metrics(backends=settings.backends), backends=made
        )
