"""`metering-sidecar collect`: what the backend `nats` of others has sent becomes a spool of our own, and is billed.

One process, one event loop: the reader of the stream (`collector`), the spool that it writes, and ordinary delivery,
ledger, admin port and control socket behind it (`metering.billing`). Read the start-up list backwards for the stop: the
batch in hand is stored and acknowledged, one last pass of delivery, the spool closes. Where the shared ledger is all
that records are for, there is no spool: each batch is one transaction there, and many may collect.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from sidecar.backends.nats import NatsSettings
from sidecar.model.balance import Balance
from sidecar.model.delivery import AddsUp
from sidecar.runtime import backend_factory, factory
from sidecar.runtime import logging as logs
from sidecar.runtime.admin import Readiness
from sidecar.runtime.backend_factory import LEDGER_NAME
from sidecar.runtime.billing import Billing, billing
from sidecar.runtime.collector import FORGET_EVERY_S, LedgerSink, SpoolSink, StreamReader
from sidecar.runtime.disk import Room
from sidecar.runtime.instance_lock import DataLock
from sidecar.runtime.metering import START_FAULTS as PARTS_FAULTS
from sidecar.runtime.metering import Metering, only_fault, open_admin, open_control
from sidecar.runtime.metrics import Metrics
from sidecar.runtime.signals import stop_event
from sidecar.runtime.supervisor import bind
from sidecar.settings import Settings
from sidecar.spool import SpoolReader, ground_warning
from sidecar.spool.intake import Intake
from sidecar.spool.known_ids import KnownIds
from sidecar.storage.files import StorageError
from sidecar.storage.nats import NatsConnection
from sidecar.storage.sockets import CONTROL, SocketError, listening

log = logging.getLogger("sidecar.collect")

NATS: Final = "nats"
START_FAULTS: Final = (*PARTS_FAULTS, StorageError, SocketError, ValueError)


class CollectError(Exception):
    """It cannot start. The text says what to do."""


def faults(settings: Settings) -> list[str]:
    """What keeps these settings from being used for collecting, beside what `backend_factory.faults` says."""
    found = [f"{name} is not set: it says where the stream is" for name in backend_factory.missing(settings, NATS)]
    if NATS in settings.backends:
        found.append(
            "SIDECAR_BACKENDS has nats: what is read from the stream would go back into it; name the ledger and the "
            "billing backends alone"
        )
    if not found:
        try:
            stream_settings(settings).login  # noqa: B018 - it raises
        except ValueError as error:
            found.append(str(error))
    return found


def into_shared_ledger(settings: Settings) -> bool:
    """Whether batches go into the shared ledger as they are read: nothing else is to be done with them here. Else they
    go into a spool, and from there to all backends."""
    return settings.fleet.ledger_url is not None and settings.backends == (LEDGER_NAME,)


def stream_settings(settings: Settings) -> NatsSettings:
    return NatsSettings(**settings.backend(NATS))


def connection_of(settings: Settings) -> NatsConnection:
    """Raises `ValueError` for settings that do not go together."""
    own = stream_settings(settings)
    return NatsConnection(login=own.login, wanted=own.wanted, timeout_s=own.timeout, reads=True)


@dataclass(slots=True, kw_only=True)
class Collecting(Metering):
    """What the admin port and the control socket ask: as where calls are taken, without anybody who takes them."""

    reader: StreamReader | None = None
    ids: KnownIds | None = None

    async def balance(self) -> Balance:
        if self.bills is None or self.bills.spool is None:
            return Balance()
        spool = self.bills.spool
        return await self.bills.balance({spool.instance: spool.snapshot()})

    async def metrics(self) -> bytes:
        reader = self.reader
        if reader is not None:
            aside = 0 if self.ids is None else self.ids.aside_count
            self.counted.collecting(reader.consumer, reading=not reader.fault, pending=reader.pending, aside=aside)
        return await Metering.metrics(self)

    async def readiness(self) -> Readiness:
        return self.last_readiness()

    def last_readiness(self) -> Readiness:
        """Ready while the stream is read and the disk takes records; a backend that is down is said, and no reason."""
        told, bills, reader = self.told(), self.bills, self.reader
        notes = [one for one in (told.reason,) if one]
        fault, weak = ("starting", "") if reader is None else (reader.fault, reader.connection.weak)
        if fault:
            notes.append(f"the stream is not read: {fault}")
        elif weak:
            notes.append(f"what is in the stream is read, but {weak}")
        if self.ids is not None and self.ids.aside_count:
            notes.append(f"{self.ids.aside_count} messages are kept aside: `metering-sidecar collect --aside`")
        backends: list[dict[str, object]] = []
        if bills is not None:
            status = bills.delivery.status()
            if bills.copied is not None:
                notes.append(bills.copied.text)
            notes += [f"{s.backend} is {s.state}: {s.reason}" for s in status if s.state != "up"]
            if bills.room is not Room.ENOUGH:
                notes.append(bills.room.value)
            backends = [{"backend": s.backend, "state": s.state, "reason": s.reason} for s in status]
        state = "degraded" if (fault or weak) and told.state == "ok" else told.state
        return Readiness(
            ready=not self.stopping and not fault,
            state="stopping" if self.stopping else state,
            notes=notes,
            backends=backends,
        )

    async def limits(self) -> list[dict[str, Any]]:
        return []


@asynccontextmanager
async def collecting(settings: Settings, lock: DataLock | None = None) -> AsyncIterator[Collecting]:
    """Everything but the reading itself, which `Collecting.reader` does. Raises the parts' own errors."""
    counted = Metrics(backends=settings.backends)
    async with AsyncExitStack() as last:
        with listening(settings.serve.admin_listen, "SIDECAR_ADMIN_LISTEN"):
            [[admin]], admin_url = bind(settings.serve.admin_listen, 1, first=True)
        last.callback(admin.close)
        whole = Collecting(settings=settings, counted=counted, intake=Intake(counted), admin_url=admin_url)
        await open_admin(last, settings, admin, whole)
        connection = connection_of(settings)
        if into_shared_ledger(settings):
            spools = last.enter_context(SpoolReader(settings.data_dir))
            whole.ids = await asyncio.to_thread(KnownIds, settings.data_dir, spools)
            last.callback(whole.ids.close)
            ledger = backend_factory.backend(settings, LEDGER_NAME)
            last.push_async_callback(ledger.aclose)
            assert isinstance(ledger, AddsUp)
            last.push_async_callback(connection.aclose)
            whole.reader = StreamReader(
                connection=connection,
                consumer=settings.collect.collect_consumer,
                owner="",
                sink=LedgerSink(ledger, whole.ids),
                counts=counted,
            )
            if lock is not None:
                lock.announce(admin=admin_url)
            yield whole
            return
        bills = await last.enter_async_context(billing(settings, counted, spooling=True))
        whole.bills = bills
        assert bills.spool is not None
        await open_control(last, settings.data_dir / CONTROL, whole)
        whole.ids = await asyncio.to_thread(KnownIds, settings.data_dir, bills.reader)
        last.callback(whole.ids.close)
        sink = SpoolSink(bills.spool, bills.reader, whole.ids)
        if taken := await sink.take_back():
            log.info("what lay aside was taken after all", extra={"facts": {"records": taken}})
        last.push_async_callback(connection.aclose)
        whole.reader = StreamReader(
            connection=connection,
            consumer=settings.collect.collect_consumer,
            owner=bills.spool.instance,
            sink=sink,
            counts=counted,
        )
        forgetting = asyncio.create_task(_keep_forgetting(whole.ids, settings.collect.collect_remember))
        last.callback(forgetting.cancel)
        if lock is not None:
            lock.announce(admin=admin_url)
        yield whole


async def collect(settings: Settings) -> int:
    """Until SIGTERM or SIGINT; the exit code. Raises `CollectError` where it cannot start."""
    started = False
    try:
        with stop_event() as stop:
            taking = partial(DataLock.take, settings.data_dir, wait_s=settings.serve.stop_s)
            with await asyncio.to_thread(taking) as lock:
                async with collecting(settings, lock) as whole:
                    started = True
                    if warning := ground_warning(settings.data_dir):
                        log.warning(warning)
                    await _read(whole, stop, settings.serve.stop_s)
                    return 1 if _unwritten(whole.bills) else 0
    except (BaseExceptionGroup, *START_FAULTS) as error:
        fault = only_fault(error, START_FAULTS) if isinstance(error, BaseExceptionGroup) else error
        if started or fault is None:
            raise
        raise CollectError(str(fault)) from fault


async def _read(whole: Collecting, stop: asyncio.Event, stop_s: float) -> None:
    """Until the stop; then the batch in hand, for as long as open calls would have."""
    assert whole.reader is not None
    reading = asyncio.create_task(whole.reader.run(stop))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((reading, stopping), return_when=asyncio.FIRST_COMPLETED)
        whole.stopping = True
        if not reading.done():
            await asyncio.wait((reading,), timeout=stop_s)
        if reading.done():
            reading.result()  # what it raises is a mistake of ours, and ends the process
        else:
            log.error("the batch in hand could not be stored until the end: it is read again by the next start")
    finally:
        stopping.cancel()
        reading.cancel()
        await asyncio.wait((reading, stopping))


def _unwritten(bills: Billing | None) -> bool:
    return bills is not None and bills.spool is not None and bills.spool.unwritten > 0


async def _keep_forgetting(ids: KnownIds, remember_s: float) -> None:
    """Slice by slice, so that nobody waits for it."""
    while True:
        try:
            if not await asyncio.to_thread(ids.forget, time.time() - remember_s):
                await asyncio.sleep(FORGET_EVERY_S)
        except StorageError as error:
            log.warning("old ids could not be forgotten yet: %s", error)
            await asyncio.sleep(FORGET_EVERY_S)
        await asyncio.sleep(0.05)


def run(settings: Settings) -> int:
    """Collect with these settings, as a process."""
    logs.set_up(settings.serve.log_level.value.upper(), settings.serve.log_format, role="collect")
    # Who asks a sidecar to read its settings anew may ask this one, which would end of it.
    signal.signal(signal.SIGHUP, lambda *_: log.warning("settings are read at a start alone: restart to change them"))
    with asyncio.Runner(loop_factory=factory.loop_factory()) as runner:
        return runner.run(collect(settings))
