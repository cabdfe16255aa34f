"""The half that bills: delivery over every slot, retention, and what both look like together.

One process does this, the only one or the supervisor. It reads what was committed and never writes a spool
that is in use.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from sidecar.delivery import Delivery, DeliveryStore, StateError, SystemClock
from sidecar.model.balance import Balance
from sidecar.model.delivery import Backend
from sidecar.runtime import backend_factory, directory_identity
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Settings
from sidecar.spool import Snapshot, SpoolError, SpoolReader, adopt_orphans, count_set_aside, disk_room
from sidecar.spool.retention import retire_segments

log = logging.getLogger("sidecar.billing")

LEDGER: Final = "ledger"
DRAIN_S: Final = 5.0  # the last delivery pass: what a reachable backend takes in this time leaves before we do
LOOK_EVERY_S: Final = 5.0  # a disk of 200 MB/s loses 1 GiB, the default mark, in that time
RETIRE_EVERY_S: Final = 60.0  # how often delivered chunks are looked at; retention is counted in days


class Room(StrEnum):
    """How the disk does; the text is what an operator is told."""

    ENOUGH = "the disk has room"
    LOW = "the disk is filling up: make room, or lower SIDECAR_RETENTION"
    SHORT = "the disk is nearly full: delivered records are let go before SIDECAR_RETENTION is over; make room"


def room_left(free_bytes: int, mark_bytes: int) -> Room:
    """The first two of three steps; the third, a full disk, is the spool's own."""
    if free_bytes >= mark_bytes:
        return Room.ENOUGH
    return Room.LOW if free_bytes >= mark_bytes // 2 else Room.SHORT


@dataclass(slots=True, kw_only=True)
class Billing:
    """Delivery at work, and the balance over all slots."""

    settings: Settings
    state: DeliveryStore
    reader: SpoolReader
    delivery: Delivery
    backends: Mapping[str, Backend]
    copied: directory_identity.Noticed | None = None  # the directory is a copy, and nobody has decided yet
    room: Room = Room.ENOUGH
    free_bytes: int = 0
    disk_bytes: int = 0
    set_aside: int = 0  # damaged chunks that were copied and are kept
    ledger_bytes: int = 0  # grows with each distinct pair of subscriber and what it consumed, and is never retired

    def remembered(self) -> dict[str, int]:
        """Of each slot, the greatest number that any backend was handed: a spool that has less has lost some."""
        greatest: dict[str, int] = {}
        for name in self.settings.backends:
            for cursor in self.state.cursors(name):
                greatest[cursor.instance] = max(cursor.seq, greatest.get(cursor.instance, 0))
        return greatest

    async def balance(self, snapshots: Mapping[str, Snapshot]) -> Balance:
        """All terms of one moment. `snapshots`: the slots that are being written; the others are read from disk."""
        return await asyncio.to_thread(self._balance, dict(snapshots))

    def _balance(self, snapshots: dict[str, Snapshot]) -> Balance:
        for instance in self.reader.instances():
            if instance not in snapshots:
                snapshots[instance] = Snapshot(self.reader.totals(instance), self.reader.last_seq(instance))
        return Balance.over(
            (snapshot.totals for snapshot in snapshots.values()),
            self.delivery.totals({name: snapshot.last_seq for name, snapshot in snapshots.items()}),
            () if self.copied is None else (self.copied.text,),
        )

    async def adopt(self, how: directory_identity.As) -> dict[str, int]:
        """The operator has decided what this directory is; how many records were left to another, by backend."""
        noticed = self.copied
        if noticed is None:
            return {}
        counts = await self.delivery.adopt(noticed.ends if how is directory_identity.As.COPY else None)
        if how is directory_identity.As.ORIGINAL:
            await asyncio.to_thread(directory_identity.thaw, self.settings.data_dir, noticed.ends)
            await asyncio.to_thread(adopt_orphans, self.settings.data_dir)
            self.delivery.wake()
        self.copied = None
        await self.remember_place()
        log.warning("the data directory is adopted", extra={"facts": {"as": how.value, "parked": counts}})
        return counts

    async def remember_place(self) -> None:
        """Keep how far delivery has come: a `delivery.db` that is put back later is behind that."""
        try:
            await asyncio.to_thread(remember_place, self.settings, self.state, self.copied)
        except (OSError, StateError) as error:
            log.warning("how far delivery has come could not be kept beside it: %s", error)

    async def keep_retiring(self) -> None:
        """Look at the disk and let go of what is delivered and old, for ever. Also soon after a start: one that is
        restarted often must not keep everything."""
        waited_s = RETIRE_EVERY_S
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            waited_s += LOOK_EVERY_S
            try:
                await self.look_at_disk()
                if self.room is Room.SHORT or waited_s >= RETIRE_EVERY_S:
                    waited_s = 0.0
                    await self.remember_place()
                    await self.retire()
            except (OSError, SpoolError) as error:
                log.warning("delivered chunks could not be removed: %s", error)

    async def look_at_disk(self) -> None:
        """See how much room is left; say so once when it becomes less or more."""
        root = self.settings.data_dir
        self.free_bytes, self.disk_bytes, self.set_aside, self.ledger_bytes = await asyncio.to_thread(
            lambda: (*disk_room(root), count_set_aside(root), _size(root / backend_factory.LEDGER))
        )
        room = room_left(self.free_bytes, self.settings.disk_low_bytes)
        if room is not self.room:
            self.room = room
            facts = {"free_bytes": self.free_bytes, "disk_low_bytes": self.settings.disk_low_bytes}
            if room is Room.ENOUGH:
                log.info("the disk has room again", extra={"facts": facts})
            else:
                log.error(room.value, extra={"facts": facts})

    async def retire(self) -> None:
        """Remove chunks that every backend is done with, as far as retention allows, and what is remembered of them."""
        gone = await asyncio.to_thread(self._retire_chunks)
        if gone:
            await self.delivery.forget(gone)

    def _retire_chunks(self) -> dict[str, int]:
        """The number up to which each slot has nothing any more, where something went."""
        settings = self.settings
        keep_s = 0.0 if self.room is Room.SHORT else settings.retention
        gone: dict[str, int] = {}
        for instance, upto in self.delivery.retired_upto().items():
            if retire_segments(settings.data_dir, instance, upto + 1, keep_s, settings.retention_bytes) and (
                left := self.reader.segments(instance)
            ):
                gone[instance] = left[0].first_seq - 1
        return gone


def remember_place(settings: Settings, state: DeliveryStore, copied: directory_identity.Noticed | None) -> None:
    directory_identity.store(settings.data_dir, state.all_cursors(), copied)


def look_at_place(settings: Settings, state: DeliveryStore) -> directory_identity.Noticed | None:
    """Whether the directory is what was left here; what was found, now or before, is kept until somebody decides.

    Before any spool is written: those of a copy are frozen first.
    """
    data_dir = settings.data_dir
    memory = directory_identity.load(data_dir)
    noticed = None if memory is None else memory.noticed
    why, whole = directory_identity.suspicion(data_dir, memory, state.all_cursors(), made_anew=state.created)
    if why:
        ends = directory_identity.ends_of(data_dir)
        found = directory_identity.notice(data_dir, why, whole=whole, since_s=state.last_clock(), ends=ends)
        noticed = found if noticed is None else directory_identity.merged(noticed, found)
    if noticed is not None:
        log.error(noticed.text)
    remember_place(settings, state, noticed)
    return noticed


@asynccontextmanager
async def billing(settings: Settings, metrics: Metrics) -> AsyncIterator[Billing]:
    """Start delivering. Leaving makes one last pass, bounded by `DRAIN_S`. Raises the parts' own errors."""
    async with AsyncExitStack() as stack:
        state = await asyncio.to_thread(DeliveryStore.open, settings.data_dir / "delivery.db")
        stack.callback(state.close)
        copied = await asyncio.to_thread(look_at_place, settings, state)
        told = functools.partial(metrics.lost, "stopped")
        for instance in await asyncio.to_thread(adopt_orphans, settings.data_dir, stopped=told):
            log.info("adopted a spool that was left behind", extra={"facts": {"instance": instance}})
        reader = stack.enter_context(SpoolReader(settings.data_dir))
        backends = backend_factory.backends(settings)
        for backend in backends:
            stack.push_async_callback(backend.aclose)
        delivery = Delivery(
            reader=reader,
            store=state,
            backends=backends,
            metrics=metrics,
            clock=SystemClock(),
            chance=random.Random(),  # noqa: S311 - jitter, no secret
            skip_gaps=settings.backend_gaps == "skip",
            copied_s=None if copied is None else copied.since_s,
            copied_text="" if copied is None else copied.text,
            # A ledger that was copied together with `delivery.db` is of the same moment: they agree.
            safe=(LEDGER,) if copied is None or copied.whole else (),
        )
        await stack.enter_async_context(delivery)
        stack.push_async_callback(delivery.drain, DRAIN_S)
        by_name = {backend.name: backend for backend in backends}
        bills = Billing(
            settings=settings, state=state, reader=reader, delivery=delivery, backends=by_name, copied=copied
        )
        stack.push_async_callback(bills.remember_place)
        await bills.look_at_disk()
        retiring = asyncio.create_task(bills.keep_retiring())
        stack.callback(retiring.cancel)
        yield bills


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # no ledger is kept here, or it cannot be looked at; its own errors say that
