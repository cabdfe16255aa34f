"""Calls are served before there is room for a data directory: with `pass` metering is no reason for the API to be down.

Nothing is written here and no lock is held, so two of these hurt nothing but themselves; what needs a file waits. The
records wait in memory, in the numbers of a slot that is not made yet, and go into it first when the whole opens. Beyond
`SIDECAR_SPOOL_MEMORY_BYTES` they are counted as lost, and the count goes on record with the rest.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from sidecar.model.balance import Balance
from sidecar.proxy import Proxy
from sidecar.runtime import factory
from sidecar.runtime.admin import Instance, Readiness
from sidecar.runtime.instance_lock import NAME as LOCK
from sidecar.runtime.instance_lock import InUseError, NewerError
from sidecar.runtime.intake import listen
from sidecar.runtime.metrics import Gauges, Metrics
from sidecar.settings import Settings
from sidecar.spool import Batch, Health, Limits, Snapshot, Spool, SpoolFull, SpoolTotals, State, Tally
from sidecar.spool.files import new_instance
from sidecar.spool.recorder import SpoolRecorder
from sidecar.storage.files import START_BYTES, START_FILES, Trouble, probe, trouble
from sidecar.storage.sockets import SocketError

log = logging.getLogger("sidecar.early")

LOOK_S: Final = 1.0  # how often it is looked whether there is room


class NoRoomError(Exception):
    """A start that needs room on the disk, or a file system that may be written. The text says what to do."""


def no_room(data_dir: Path, fault: BaseException) -> Trouble | None:
    """Whether a start failed because nothing can be written there: `FULL`, or `READ_ONLY` where it could be before.

    A new directory on a file system that is read-only is a mistake in the settings, which the fault itself tells.
    """
    if isinstance(fault, (InUseError, NewerError, SocketError)):
        return None
    found = _trouble(data_dir)
    if found is Trouble.FULL or (found is Trouble.READ_ONLY and (data_dir / LOCK).exists()):
        return found
    while fault.__cause__ is not None:
        fault = fault.__cause__
    wants = isinstance(fault, OSError | sqlite3.Error) and trouble(fault, data_dir / LOCK) is Trouble.FULL
    return Trouble.FULL if wants or isinstance(fault, SpoolFull) else None


def can_begin(data_dir: Path) -> bool:
    """Whether everything that a start opens could be made now."""
    return _trouble(data_dir) is None


def text_of(data_dir: Path, found: Trouble) -> str:
    if found is Trouble.READ_ONLY:
        return f"nothing can be written into {data_dir}: its file system is read-only; mount it for writing"
    limits = Limits()
    needed = (START_BYTES + limits.reserve_bytes + limits.recover_margin_bytes) >> 20
    return f"no room is left on the disk of {data_dir}, not even to begin: free at least {needed} MiB there"


def _trouble(data_dir: Path) -> Trouble | None:
    where = data_dir
    while not where.exists() and where != where.parent:
        where = where.parent
    number = probe(where, size_bytes=START_BYTES, files=START_FILES)
    return None if number is None else trouble(OSError(number, ""), where)


class LateSpool:
    """What the intake knows of its spool before there is one: numbers of a slot of its own, and no disk."""

    def __init__(self, reason: str) -> None:
        self.instance = new_instance()
        self.next_seq = 1
        self.tally = Tally()
        self._reason = reason
        self._waiting: list[Batch] = []
        self._spool: Spool | None = None

    def submit(self, batch: Batch) -> None:
        if self._spool is None:
            self._waiting.append(batch)
        else:
            self._spool.submit(batch)

    def snapshot(self) -> Snapshot:
        tally = self.tally
        return Snapshot(SpoolTotals(admitted=tally.admitted, open=tally.open, lost=dict(tally.lost)), 0)

    def health(self) -> Health:
        return Health(State.FULL, self._reason) if self._spool is None else self._spool.health()

    def become(self, spool: Spool) -> None:
        """There is one now, new and empty: what waits goes into it first."""
        spool.tally = self.tally
        self._spool = spool
        waiting, self._waiting = self._waiting, []
        for batch in waiting:
            spool.submit(batch)


@dataclass(slots=True, kw_only=True)
class Early:
    """An intake that serves, and what it still lacks. `take` makes it a part of the whole."""

    settings: Settings
    spool: LateSpool
    recorder: SpoolRecorder
    proxy: Proxy
    counted: Metrics
    key: bytes  # of the subscribers' hashes; kept as soon as it can be
    url: str = ""
    taken: bool = False
    whole: Instance | None = None  # who answers at the admin port, once there is a whole
    admin: AsyncExitStack = field(default_factory=AsyncExitStack)
    admin_url: str = ""

    async def room(self, stop: asyncio.Event) -> bool:
        """Wait until a start may work; False where we shall end instead."""
        while not stop.is_set():
            try:
                async with asyncio.timeout(LOOK_S):
                    await stop.wait()
            except TimeoutError:
                if await asyncio.to_thread(can_begin, self.settings.data_dir):
                    return True
        return False

    @property
    def instance(self) -> str:
        return self.spool.instance

    def take(self, spool: Spool) -> tuple[SpoolRecorder, Proxy]:
        """What the whole owns, and closes, from now on."""
        self.taken = True
        self.spool.become(spool)
        return self.recorder, self.proxy

    @property
    def waiting(self) -> int:
        """Calls that no disk knows of."""
        return self.spool.tally.admitted

    # What the admin port asks

    async def balance(self) -> Balance:
        if self.whole is not None:
            return await self.whole.balance()
        totals = self.spool.snapshot().totals
        return Balance(admitted=totals.admitted, open=totals.open, lost=totals.lost)

    async def metrics(self) -> bytes:
        if self.whole is not None:
            return await self.whole.metrics()
        totals = self.spool.snapshot().totals
        gauges = Gauges(admitted=totals.admitted, open=totals.open, holds=totals.holds, degraded=True)
        return self.counted.exposition(gauges)

    async def readiness(self) -> Readiness:
        if self.whole is not None:
            return await self.whole.readiness()
        health = self.recorder.health()
        return Readiness(ready=True, state=health.state.value, notes=(health.reason,) if health.reason else ())


@asynccontextmanager
async def serving_early(settings: Settings, found: Trouble) -> AsyncIterator[Early]:
    """Let calls in. What was not taken by a whole until the end is lost, and said."""
    reason = text_of(settings.data_dir, found)
    log.error("served all the same, and records wait in memory: %s; recording begins by itself", reason)
    factory.raise_file_limit(settings)
    key = factory.kept_hash_key(settings) or factory.new_hash_key()
    metrics = Metrics(backends=settings.backends)
    spool = LateSpool(reason)
    recorder = factory.recorder(settings, spool, metrics)
    recorder.suspend(reason)
    proxy = factory.proxy(settings, recorder, metrics, key)
    early = Early(settings=settings, spool=spool, recorder=recorder, proxy=proxy, counted=metrics, key=key)
    try:
        await proxy.start()
        early.url = await listen(proxy, settings.listen, tls=settings.tls_cert_file is not None)
        factory.calm_collector()
        yield early
    finally:
        await _end(early)


async def _end(early: Early) -> None:
    await early.admin.aclose()
    if early.taken:
        return
    await early.proxy.stop(early.settings.stop_s)
    await early.proxy.aclose()
    if early.waiting:
        log.error(
            "%d calls were served and their records are lost: there was no room for them until the end; "
            "not even their number could be kept: no balance will say so",
            early.waiting,
            extra={"facts": {"calls": early.waiting, "kept_in_balance": False}},
        )
