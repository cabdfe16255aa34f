"""The process that meters: records, their counts and their delivery, for all that serve.

It takes what they tell over the seam, writes it to the spool, delivers it, and answers the admin port and the control
socket. When it dies calls go on; the next one takes the spool up where it was, and what was not acknowledged is told
again.

Where a start finds no room on the disk it begins all the same with `SIDECAR_ON_SPOOL_FULL=pass`: what is told is
counted and kept, and recorded first once there is room.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from sidecar.delivery import StateError
from sidecar.delivery.wishes import Asked, outcomes, redriven, retried
from sidecar.gate.asking import Asking
from sidecar.gate.counters import Counters
from sidecar.gate.estimate import Outputs
from sidecar.gate.fleet import SharedCounters
from sidecar.gate.owner import Owner
from sidecar.ledger import LedgerError
from sidecar.model.balance import Balance
from sidecar.model.record_id import CHANCE_BYTES
from sidecar.prices import price_book
from sidecar.runtime import backend_factory, factory, gate_factory, times
from sidecar.runtime.admin import Readiness, application
from sidecar.runtime.admin.control import control
from sidecar.runtime.admin.guard import Crowd, Guard, open_port
from sidecar.runtime.admin.reports import Reports
from sidecar.runtime.billing import Billing, billing
from sidecar.runtime.directory_identity import As
from sidecar.runtime.disk import LOOK_S, NoRoomError, Room, can_begin, no_room, text_of
from sidecar.runtime.fleet import Fleet, most_behind
from sidecar.runtime.instance_lock import LockError, NotWritableError
from sidecar.runtime.lanes import Lookout, url_of
from sidecar.runtime.metrics import Gauges, Metrics
from sidecar.runtime.seam import TRIALS, Seam
from sidecar.runtime.seam_protocol import Told
from sidecar.runtime.shipping import Shipping, centre_of
from sidecar.runtime.wire import CANNOT_START, LOST, Wire
from sidecar.settings import Durability, OnSpoolFull, Settings
from sidecar.spool import (
    Snapshot,
    SpoolError,
    SpoolTotals,
    State,
    ground_warning,
    make_room,
)
from sidecar.spool.intake import Intake
from sidecar.storage.files import StorageError, Trouble, explain, said_by
from sidecar.storage.sockets import CONTROL, SocketError, listen_privately, remove

log = logging.getLogger("sidecar.metering")

# In a file of ours: SIDECAR_DATA_DIR is the setting that is wrong.
NOT_OURS: Final = frozenset({Trouble.NEWER, Trouble.OLDER, Trouble.FOREIGN})
START_FAULTS: Final = (LockError, SpoolError, StateError, LedgerError, OSError)
ORPHANED_S: Final = 10.0  # beyond SIDECAR_STOP_S, where nobody is left to say that all who serve have ended
ADMIN_STOP_S: Final = 1.0  # how long a scrape that is being answered may take at the end
STATES: Final = ("stopping", "full", "degraded", "ok")  # the worst of all is the state of the whole
LOAD_SLOW_S: Final = 1.0  # calls wait so long for a decision at most
LOAD_WAIT_S: Final = 5.0  # who looks at limits waits so long for what was used of them before this life
REST_S: Final = 35.0  # as long as a backend may take to answer, at the default of its time limit


@dataclass(slots=True, kw_only=True)
class Metering:
    """What the admin port and the control socket ask, before there is room for records and afterwards."""

    settings: Settings
    counted: Metrics
    intake: Intake
    gate: Owner | None = None
    asking: Asking | None = None
    limits_shared: SharedCounters | None = None  # with others, once what is in the spool is counted
    sharing: asyncio.Task[None] | None = None
    loading: asyncio.Task[None] | None = None  # of what was used of the limits before this life
    seam: Seam = field(init=False)
    admin_url: str = ""
    early: str = ""  # why nothing is recorded yet
    bills: Billing | None = None
    fleet: Fleet | None = None  # of those that share a ledger
    lookout: Lookout | None = None  # over the lanes of those that deliver together
    not_reloaded: str = ""  # why the settings that were read last are not in force
    stopping: bool = False  # from the wish to stop on, while calls are still taken too
    _last: Balance | None = None

    # How writing goes

    def told(self) -> Told:
        if self.bills is None or self.bills.spool is None:
            return Told(State.FULL.value if self.early else State.OK.value, self.early or None, bool(self.early))
        health = self.bills.spool.health()
        return Told(health.state.value, health.reason, suspended=False)

    def set_open(self, connections: int, drains: int) -> None:
        self.counted.set_open(connections=connections, drains=drains)

    # What the admin port asks

    async def balance(self) -> Balance:
        try:
            await self.seam.ask()
            found = await self._balance()
        except Exception:
            # The admin port outlives what it shows: at the very end it says what was last so.
            if not self.stopping or self._last is None:
                raise
            return self._last
        self._last = found
        return found

    async def _balance(self) -> Balance:
        unseen = self.seam.unseen
        if self.bills is None or self.bills.spool is None:
            tally = self.intake.tally
            return Balance(admitted=tally.admitted + unseen, open=tally.open + unseen, lost=dict(tally.lost))
        spool = self.bills.spool
        snapshot = spool.snapshot()
        totals = snapshot.totals
        totals = SpoolTotals(
            admitted=totals.admitted + unseen, recorded=totals.recorded, open=totals.open + unseen, lost=totals.lost
        )
        return await self.bills.balance({spool.instance: Snapshot(totals, snapshot.last_seq)})

    def fleet_balance(self) -> dict[str, object] | None:
        """Of all that share a ledger, as they told it last; None: there is none."""
        return None if self.fleet is None else self.fleet.whole.to_dict()

    async def lanes_balance(self) -> dict[str, Any] | None:
        """Of the records that all share, lane by lane, whoever delivers it; None: each delivers its own."""
        return None if self.lookout is None else (await self.lookout.seen()).to_dict()

    async def metrics(self) -> bytes:
        gauges = Gauges()
        try:
            gauges.balance = balance = await self.balance()
            if self.bills is not None:
                gauges.pending = {name: totals.pending for name, totals in balance.backends.items()}
                if self.bills.elected is not None:
                    gauges.pending |= await asyncio.to_thread(self.bills.elected.pending)
                gauges.parked = await asyncio.to_thread(self.bills.parked_now)
        except Exception as error:  # noqa: BLE001 - a disk that fails is when the others are looked at
            log.warning("the balance cannot be read; the metrics go without its figures: %s", said_by(error))
        gauges.degraded = self.last_readiness().state in ("degraded", "full")  # the balance has asked
        bills = self.bills
        if bills is not None:
            status = bills.status()
            if bills.elected is not None:
                gauges.lanes_held, gauges.lanes_resting = len(bills.elected.lanes), bills.elected.resting
                gauges.lanes_unheld = bills.elected.unheld
            gauges.copied = bills.copied is not None
            gauges.disk_free_bytes = bills.free_bytes
            gauges.disk_bytes = bills.disk_bytes
            gauges.disk_low_bytes = bills.settings.spool.disk_low_bytes
            gauges.chunks_set_aside = bills.set_aside
            gauges.spool_bytes = bills.spool_bytes
            gauges.ledger_bytes = bills.ledger_bytes
            gauges.oldest_pending_s = {s.backend: s.oldest_pending_s or 0.0 for s in status}
            gauges.retry_after_s = {s.backend: s.paused_s for s in status}
        if self.fleet is not None:
            members = most_behind(self.fleet.whole.members)
            gauges.instance_lag_s = {one.instance: one.lag_s for one in members}
            gauges.instance_silent_s = {one.instance: one.age_s for one in members}
        if self.asking is not None and self.gate is not None:
            down = {one.name: one.down for one in self.asking.status()}
            self.counted.set_gate(self.asking.questions, self.gate.unanswered, down)
        if (shared := self.limits_shared) is not None:
            self.counted.set_shared_limits(shared.failures, is_away=not shared.is_counted)
        return self.counted.exposition(gauges)

    async def limits(self) -> list[dict[str, Any]] | None:
        """Who is at what of which limit; None: what the records say is not counted yet."""
        if self.gate is None:
            return []
        if not self.gate.loaded and self.loading is not None:
            await asyncio.wait([self.loading], timeout=LOAD_WAIT_S)
        if not self.gate.loaded:
            return None
        await self.seam.ask()
        self.seam.store()
        if self.limits_shared is not None:
            return [gate_factory.shown(row) for row in await self.limits_shared.rows()]
        return [gate_factory.shown(row) for row in self.gate.rows()]

    async def times(self) -> list[dict[str, Any]]:
        """How long calls took, by day."""
        return times.report(self.counted.days)

    async def readiness(self) -> Readiness:
        """Ready to take calls; a backend that is down or blocked is said, and is no reason to send traffic away."""
        await self.seam.ask()
        return self.last_readiness()

    def last_readiness(self) -> Readiness:
        """The same, as those that serve said it last."""
        answers, serving = self.seam.answers, self.seam.serving
        told = self.told()
        found = {answer.state for answer in answers} | {told.state}
        state = next((s for s in STATES if s in found), "degraded")
        notes = list(dict.fromkeys(n for n in (told.reason, *(answer.reason for answer in answers)) if n))
        if missing := len(serving) - len(answers):
            notes.append(f"{missing} of {len(serving)} workers do not answer")
            if not answers and state == "ok":
                state = "degraded"
        if self.not_reloaded:
            notes.append(f"the settings were not reloaded, the old ones hold: {self.not_reloaded}")
        for one in () if self.asking is None else self.asking.status():
            notes += gate_factory.remarks_on(one, self.settings.gate.gate_on_failure)
        if self.limits_shared is not None:
            policy = self.settings.gate.gate_on_failure
            notes += [f"{note} (SIDECAR_GATE_ON_FAILURE={policy})" for note in self.limits_shared.notes]
        ready = not self.stopping and any(not answer.refusing for answer in answers)
        backends: list[dict[str, object]] = []
        if self.bills is not None:
            status = self.bills.status()
            if self.bills.copied is not None:
                notes.append(self.bills.copied.text)
            notes += [f"{s.backend} is {s.state}: {s.reason}" for s in status if s.state != "up"]
            if self.bills.elected is not None and self.bills.elected.trouble:
                notes.append(f"no lane is delivered from here: {self.bills.elected.trouble}")
            if self.bills.room is not Room.ENOUGH:
                notes.append(self.bills.room.value)
            backends = [
                {
                    "backend": s.backend,
                    "state": s.state,
                    "reason": s.reason,
                    "retry_after_s": round(s.paused_s, 1),
                    "oldest_pending_s": None if s.oldest_pending_s is None else round(s.oldest_pending_s, 1),
                }
                for s in status
            ]
        return Readiness(ready=ready, state="stopping" if self.stopping else state, notes=notes, backends=backends)

    async def leave_limits(self) -> None:
        """Give back what is leased of the fleet's limits."""
        if self.sharing is not None and self.limits_shared is not None:
            await _ended(self.sharing)
            await self.limits_shared.leave()

    async def stop(self) -> None:
        """We are leaving: not ready any more, for whatever reason."""
        self.stopping = True
        await self.balance()

    # What the control socket changes

    def _billing(self) -> Billing:
        if self.bills is None:
            raise LookupError(f"nothing is recorded or delivered yet: {self.early}")
        return self.bills

    async def redrive(
        self,
        *,
        backend: str | None,
        reason: str | None,
        ids: Sequence[str] | None,
        since_s: float | None,
        resend_unknown: bool,
    ) -> dict[str, Any]:
        """Offer parked events again; what became of each. Raises `LookupError` for a backend that nobody knows."""
        bills = self._billing()
        if backend is not None and backend not in self.settings.backends:
            known = {name for name, _ in await asyncio.to_thread(bills.parked_now)}
            if backend not in known:
                raise LookupError(self._no_backend(backend))
        choice = {
            "backend": backend,
            "reason": reason,
            "ids": ids,
            "since_s": since_s,
            "resend_unknown": resend_unknown,
        }
        asked = await bills.correct({"do": "redrive", **choice})
        return redriven(asked.answers) | _of_lanes(asked)

    async def retry(self, backend: str) -> dict[str, Any]:
        """End all waits of a backend. Raises `LookupError`, in words, for one that is not configured."""
        bills = self._billing()
        if backend not in self.settings.backends:
            raise LookupError(self._no_backend(backend))
        asked = await bills.correct({"do": "retry", "backend": backend})
        return retried(asked.answers) | _of_lanes(asked)

    def _no_backend(self, name: str) -> str:
        backends = ", ".join(self.settings.backends) or "none"
        return f"{name} is not one of the backends of this instance ({backends})"

    async def cancel(self, one: str, *, backend: str | None) -> dict[str, Any]:
        asked = await self._billing().correct({"do": "cancel", "one": one, "backend": backend})
        return {"outcomes": outcomes(asked.answers)} | _of_lanes(asked)

    async def complain(self, backend: str, named: Sequence[tuple[str, str]]) -> dict[str, Any]:
        asked = await self._billing().correct({"do": "complain", "backend": backend, "named": named})
        return {"outcomes": outcomes(asked.answers)} | _of_lanes(asked)

    async def adopt(self, how: str) -> dict[str, int] | None:
        """None where nothing was noticed, so that there is nothing to decide."""
        bills = self._billing()
        refused = bills.shared is not None and bills.shared.copied
        limits = self.limits_shared if bills.shared is None else None  # else the ledger's decision is theirs
        refused = refused or (limits is not None and limits.is_copied)
        if bills.copied is None and not refused:
            return None
        found = await bills.adopt(As(how))
        if limits is not None:
            await limits.adopt(copy=As(how) is As.COPY)
        return found


def _of_lanes(asked: Asked) -> dict[str, Any]:
    """Where a change is not done, if it is not done on all lanes."""
    return {"lanes": asked.said} if asked.said else {}


class Unable(Exception):
    """A start that found no room, or nothing that may be written."""

    def __init__(self, fault: BaseException, found: Trouble) -> None:
        super().__init__(str(fault))
        self.found = found


@asynccontextmanager
async def metering(settings: Settings, *, seam: socket.socket) -> AsyncIterator[Metering]:
    """Hear who serves. Nothing is recorded before `recording`, which is entered within."""
    counted = Metrics(backends=settings.backends, subscribers_max=settings.serve.metrics_subscribers)
    book = price_book(settings)
    async with AsyncExitStack() as stack:
        asking = gate_factory.asking(settings)
        if asking is not None:
            await stack.enter_async_context(asking)
        gate = gate_factory.owner(settings, asking)
        if gate is not None:
            stack.callback(gate.close)
        telling = counted if gate is None else gate_factory.Settling(counted, gate)
        intake = Intake(telling, factory.plain_readers(settings, counted, book), factory.pricing(settings, book))
        whole = Metering(settings=settings, counted=counted, intake=intake, gate=gate, asking=asking)
        whole.seam = Seam(whole.intake, whole.told, whole.set_open, gate, settings.data_dir / TRIALS)
        stack.push_async_callback(whole.seam.aclose)
        await whole.seam.listen(seam)
        yield whole


@asynccontextmanager
async def recording(
    whole: Metering, *, key: bytes, instance: str | None = None, goes_on: Collection[str] = ()
) -> AsyncIterator[Billing]:
    """Open everything, and record what has been told. The data directory's lock is held by somebody.

    Raises `Unable` where there is no room, else the parts' own errors.
    """
    settings = whole.settings
    opened = False
    try:
        if make_room(settings.data_dir):
            log.error("the disk is full: the reserve is let go, so that everything can be opened; make room")
        async with AsyncExitStack() as stack:
            centre = centre_of(settings)
            # Durability stays as it was at the start, and the backends may be others since: then none is waited for.
            ships = settings.spool.durability is Durability.SHIPPED
            shipping = Shipping(whole.seam.shipped, waits=centre is not None)
            parts = billing(
                settings,
                whole.counted,
                instance=instance,
                goes_on=goes_on,
                spooling=True,
                settled={} if centre is None else {centre: shipping.settled},
            )
            bills = await stack.enter_async_context(parts)
            # A key that was made up where it could not be kept is kept now.
            await asyncio.to_thread(factory.hash_key, settings, key)
            await open_control(stack, settings.data_dir / CONTROL, whole)
            opened = True
            assert bills.spool is not None
            whole.bills, whole.early = bills, ""
            last_seq = bills.spool.next_seq - 1
            if ships:
                shipping.begin(bills.spool.instance, last_seq)
                whole.intake.stored, whole.intake.stored_before = shipping.stored, shipping.stored_before
            whole.intake.begin(bills.spool)
            if whole.gate is not None:
                loading = whole.loading = asyncio.create_task(load_limits(whole, whole.gate, settings, bills, last_seq))
                stack.push_async_callback(whole.leave_limits)
                stack.push_async_callback(_ended, loading)
            whole.intake.handed = bills.hand_over
            if bills.shared is not None and (reader := backend_factory.fleet_reader(settings)) is not None:
                stack.callback(reader.close)
                whole.fleet = Fleet(bills.shared, reader)
                telling = asyncio.create_task(whole.fleet.keep(whole.balance, bills.oldest_pending_s))
                stack.callback(telling.cancel)
            keeping = asyncio.create_task(times.keep(whole.counted, settings.data_dir))
            stack.push_async_callback(_ended, keeping)
            whole.seam.recording()
            stack.push_async_callback(whole.seam.aclose)  # what was heard until the end is committed
            stack.push_async_callback(whole.stop)
            yield bills
    except (BaseExceptionGroup, *START_FAULTS) as error:
        # What a start raises passes the groups of the parts that are open already.
        fault = only_fault(error, START_FAULTS) if isinstance(error, BaseExceptionGroup) else error
        if opened or fault is None:
            raise
        found = no_room(settings.data_dir, fault)
        if found is not None:
            raise Unable(fault, found) from fault
        raise fault from None


async def _ended(task: asyncio.Task[None]) -> None:
    """Cancel it and wait for its last words."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def load_limits(whole: Metering, gate: Owner, settings: Settings, bills: Billing, last_seq: int) -> None:
    """Give the gate what the records say. `last_seq`: of the slot that is written here, the last that was there before
    this life: those behind it are settled as they come. Where limits are shared, they are shared from then on."""
    assert bills.spool is not None
    began_s = asyncio.get_running_loop().time()
    outputs = Outputs()
    try:
        found = await asyncio.to_thread(
            gate_factory.counted, settings, bills.reader, bills.spool.instance, last_seq, outputs
        )
    except Exception as error:  # noqa: BLE001 - an owner that is never loaded decides nothing, for ever
        log.error("what was used of the limits cannot be read, so they begin at nothing: %s", said_by(error))
        found = None
    if gate_factory.is_shared(settings):
        try:
            past = await asyncio.to_thread(gate_factory.ledgers_past, settings, bills.reader)
            whole.limits_shared = gate.fleet = gate_factory.fleet(settings, gate.counters, past)
        except Exception as error:  # noqa: BLE001 - likewise
            log.error("limits are not shared, SIDECAR_GATE_ON_FAILURE decides: %s", said_by(error))
    gate.load(found or Counters(()), outputs)
    if whole.limits_shared is not None:
        whole.sharing = asyncio.create_task(whole.limits_shared.run())
    took_s = asyncio.get_running_loop().time() - began_s
    if took_s > LOAD_SLOW_S:
        log.warning("reading what was used of the limits took %.1f s", took_s)


def only_fault(
    group: BaseExceptionGroup[BaseException], known: tuple[type[BaseException], ...]
) -> BaseException | None:
    """What went wrong at a start, out of the groups of the parts that were open already: an error that says itself what
    is to be done. None where anything else is among them."""
    faults = [only_fault(e, known) if isinstance(e, BaseExceptionGroup) else e for e in group.exceptions]
    return faults[0] if all(isinstance(fault, known) for fault in faults) else None


async def open_admin(stack: AsyncExitStack, settings: Settings, listener: socket.socket, whole: Metering) -> None:
    """Answer at the admin port; it is closed with the stack."""
    if (url := url_of(settings)) is not None:
        whole.lookout = Lookout(url)
        stack.push_async_callback(whole.lookout.aclose)
    guard = Guard.of(settings.serve.admin_listen, settings.serve.admin_token, settings.serve.admin_hosts)
    app = application(whole, guard, Reports(settings, whole.limits))
    await Crowd().serve(stack, web.AppRunner(app, access_log=None, shutdown_timeout=ADMIN_STOP_S), listener)
    if (open_to := open_port(settings)) is not None:
        log.warning(open_to)


async def open_control(stack: AsyncExitStack, path: Path, whole: Metering) -> None:
    """Let the instance's own user change something, over a socket in the data directory; closed with the stack.

    Where there can be none (a full disk, a mount that knows no sockets) calls are served all the same.
    """
    try:
        listener = listen_privately(path)
    except SocketError as error:
        log.warning("%s; commands that change something need the instance to be stopped", error)
        return
    stack.callback(_let_go, path)
    runner = web.AppRunner(control(whole), access_log=None, shutdown_timeout=ADMIN_STOP_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.SockSite(runner, listener).start()


def _let_go(path: Path) -> None:
    with suppress(OSError):
        remove(path)


# --- as a process --------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Start:
    """What the supervisor knows when it starts this process (again)."""

    sources: Mapping[bytes, int]  # who serves, and its worker's number; also those that died while nobody was here
    gone: Collection[bytes] = ()  # of these, the dead ones
    instance: str | None = None  # the slot that was written until now
    held: Trouble | None = None  # why the data directory's lock could not be taken yet


async def meter(
    settings: Settings,
    start: Start,
    *,
    key: bytes,
    seam: socket.socket,
    admin: socket.socket,
    wire_socket: socket.socket,
) -> int:
    """Meter until told to stop; the exit code."""
    threading.excepthook = _die_of_thread
    wire = await Wire.over(wire_socket)
    process = _Process(settings, start, key, wire)
    async with AsyncExitStack() as last:
        whole = await last.enter_async_context(metering(settings, seam=seam))
        for source, worker in start.sources.items():
            whole.seam.expect(source, worker)
        for source in start.gone:
            whole.seam.gone(source)
        code = await process.run(whole, last, admin)
    await wire.aclose()
    return code


def _die_of_thread(ended: threading.ExceptHookArgs) -> None:
    """A thread of ours (the one that writes records, say) has ended by a mistake of ours: without it nothing would go
    on, and nobody would know. The next process is told again."""
    name = "a thread" if ended.thread is None else ended.thread.name
    log.error("the thread %s has failed: this process ends, and the next one goes on", name, exc_info=ended.exc_value)
    os._exit(1)


class _Process:
    """One life of it: what it was started with, and what it is told."""

    def __init__(self, settings: Settings, start: Start, key: bytes, wire: Wire) -> None:
        self._settings = settings
        self._start = start
        self._key = key
        self._wire = wire
        self._stop = asyncio.Event()
        self._locked = asyncio.Event()
        if start.held is None:
            self._locked.set()

    async def run(self, whole: Metering, last: AsyncExitStack, admin: socket.socket) -> int:
        obeying = asyncio.create_task(self._obey(whole))
        last.callback(obeying.cancel)
        found = self._start.held
        serves_early = False
        while True:
            if found is not None and not serves_early:
                serves_early = True
                whole.early = text_of(self._settings.data_dir, found)
                log.error(
                    "served all the same, and records wait in memory: %s; recording begins by itself", whole.early
                )
                await open_admin(last, self._settings, admin, whole)
                self._wire.send(ready=True, instance=None)
            if found is not None and not await self._room():
                return self._lost(whole)
            try:
                async with recording(
                    whole, key=self._key, instance=self._start.instance, goes_on=self._goes_on()
                ) as bills:
                    if warning := ground_warning(self._settings.data_dir):
                        log.warning(warning)
                    if not serves_early:
                        await open_admin(last, self._settings, admin, whole)
                    spool = bills.spool
                    assert spool is not None
                    factory.calm_collector()
                    self._wire.send(ready=True, instance=spool.instance)
                    await self._stop.wait()
                return LOST if spool.unwritten else 0
            except Unable as unable:
                found = unable.found
                if self._settings.spool.on_spool_full is OnSpoolFull.REFUSE:
                    return await self._cannot(NoRoomError(f"cannot start: {text_of(self._settings.data_dir, found)}"))
                if serves_early:
                    log.warning("still no room to begin: %s", unable)
            except START_FAULTS as error:
                return await self._cannot(error)

    def _goes_on(self) -> set[str]:
        return {source[:CHANCE_BYTES].hex() for source in self._start.sources}

    async def _cannot(self, error: BaseException) -> int:
        """Why, for the supervisor to say; with the exit code of the command."""
        wrong = isinstance(error, NotWritableError | LedgerError) or (
            isinstance(error, StorageError) and error.trouble in NOT_OURS
        )
        known = isinstance(error, LockError | SpoolError | StateError | LedgerError | SocketError | NoRoomError)
        text = str(error) if known else f"cannot start: {error}"
        if isinstance(error, OSError) and not known:
            text = explain(error, f"cannot start: {error.filename or self._settings.data_dir} cannot be used")
        self._wire.send(cannot=text, code=2 if wrong else 1)
        return CANNOT_START

    async def _room(self) -> bool:
        """Wait until a start may work; False where we shall end instead."""
        while not self._stop.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._stop.wait()
            if self._stop.is_set():
                return False
            if self._locked.is_set() and await asyncio.to_thread(can_begin, self._settings.data_dir):
                return True
        return False

    def _lost(self, whole: Metering) -> int:
        """The end, and there was no room until then."""
        calls = whole.intake.tally.admitted
        if not calls:
            return 0
        log.error(
            "%d calls were served and their records are lost: there was no room for them until the end; "
            "not even their number could be kept: no balance will say so",
            calls,
            extra={"facts": {"calls": calls, "kept_in_balance": False}},
        )
        return LOST

    async def _hand_over(self, whole: Metering) -> None:
        """Calls are recorded on, until no backend has to be waited for; then the next process takes it all over."""
        if whole.bills is not None:
            whole.bills.rests = True
            await whole.bills.delivery.rest(REST_S)

    async def _obey(self, whole: Metering) -> None:
        while (told := await self._wire.receive()) is not None:
            match told:
                case {"came": source, "worker": worker}:
                    whole.seam.expect(bytes.fromhex(source), worker)
                case {"gone": source}:
                    whole.seam.gone(bytes.fromhex(source))
                case {"do": "stopping"}:
                    whole.stopping = True
                case {"do": "locked"}:
                    self._locked.set()
                case {"do": "stop"}:
                    self._stop.set()
                case {"do": "hand_over"}:
                    handing = asyncio.create_task(self._hand_over(whole))
                    handing.add_done_callback(lambda _: self._stop.set())
                case {"reloaded": [*problems]}:
                    whole.not_reloaded = "; ".join(map(str, problems))
        # The supervisor is gone: those that serve finish what is open, and are heard until then.
        whole.stopping = True
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.serve.stop_s + ORPHANED_S):
                await whole.seam.until_alone()
        self._stop.set()
