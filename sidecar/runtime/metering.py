"""The process that meters: records, their counts and their delivery, for all that serve.

It takes what they tell over the seam, writes it to the spool, delivers it, and answers the admin port and the control
socket. When it dies calls go on; the next one takes the spool up where it was, and what was not acknowledged is told
again.

Where a start finds no room on the disk it begins all the same with `SIDECAR_ON_SPOOL_FULL=pass`: what is told is
counted and kept, and recorded first once there is room.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import secrets
import socket
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from aiohttp import web

from sidecar.backends.ledger import SharedLedgerBackend
from sidecar.delivery import Delivery, DeliveryStore, StateError, SystemClock
from sidecar.delivery.elected import Elected
from sidecar.delivery.ledger_worker import SummedBatch
from sidecar.delivery.types import BackendStatus
from sidecar.delivery.wishes import Wish, grant, outcomes, redriven, retried
from sidecar.delivery.worker import Settled
from sidecar.gate.asking import Asking
from sidecar.gate.counters import Counters
from sidecar.gate.estimate import Outputs
from sidecar.gate.fleet import SharedCounters
from sidecar.gate.owner import Owner
from sidecar.ledger import LedgerError
from sidecar.ledger.identity import Identity
from sidecar.model.balance import Balance
from sidecar.model.call_group import CallGroup
from sidecar.model.delivery import AddsUp, Backend
from sidecar.model.record import Record
from sidecar.model.record_id import CHANCE_BYTES
from sidecar.prices import price_book
from sidecar.runtime import backend_factory, directory_identity, factory, gate_factory, times
from sidecar.runtime.admin import Readiness, application
from sidecar.runtime.admin.control import control
from sidecar.runtime.admin.guard import Guard, open_port
from sidecar.runtime.admin.reports import Reports
from sidecar.runtime.backend_factory import LEDGER_NAME
from sidecar.runtime.directory_identity import As
from sidecar.runtime.disk import LOOK_S, NoRoomError, Room, can_begin, no_room, room_left, size_of, text_of
from sidecar.runtime.fleet import Fleet, most_behind
from sidecar.runtime.instance_lock import LockError, NotWritableError
from sidecar.runtime.ipc import CANNOT_START, LOST, Seam, Told, Wire
from sidecar.runtime.metrics import Gauges, Metrics
from sidecar.runtime.shipping import Shipping, centre_of
from sidecar.settings import Durability, OnSpoolFull, Settings
from sidecar.spool import (
    Snapshot,
    Spool,
    SpoolError,
    SpoolReader,
    SpoolTotals,
    State,
    adopt_orphans,
    count_set_aside,
    disk_room,
    ground_warning,
    make_room,
)
from sidecar.spool.files import spool_dir
from sidecar.spool.intake import Ended, Intake
from sidecar.spool.retention import retire_segments
from sidecar.spool.types import Batch, StoredGroup
from sidecar.storage.files import StorageError, Trouble
from sidecar.storage.sockets import CONTROL, SocketError, listen_privately, remove

log = logging.getLogger("sidecar.metering")

START_FAULTS: Final = (LockError, SpoolError, StateError, LedgerError, OSError)
ORPHANED_S: Final = 10.0  # beyond SIDECAR_STOP_S, where nobody is left to say that all who serve have ended
ADMIN_STOP_S: Final = 1.0  # how long a scrape that is being answered may take at the end
STATES: Final = ("stopping", "full", "degraded", "ok")  # the worst of all is the state of the whole
LOAD_SLOW_S: Final = 1.0  # calls wait so long for a decision at most
REST_S: Final = 35.0  # as long as a backend may take to answer, at the default of its time limit
DRAIN_S: Final = 5.0  # the last delivery pass: what a reachable backend takes in this time leaves before we do
LOOK_EVERY_S: Final = 5.0  # a disk of 200 MB/s loses 1 GiB, the default mark, in that time
HAND_ON_S: Final = 0.25  # of the half second that sums gather before they are stored
RETIRE_EVERY_S: Final = 60.0  # how often delivered chunks are looked at; retention is counted in days


@dataclass(slots=True, kw_only=True)
class Billing:
    """Delivery at work, and the balance over all slots."""

    settings: Settings
    state: DeliveryStore
    reader: SpoolReader
    delivery: Delivery
    backends: Mapping[str, Backend]
    copied: directory_identity.Noticed | None = None  # the directory is a copy, and nobody has decided yet
    spool: Spool | None = None  # the slot that is written here
    elected: Elected | None = None  # what is delivered of the records that all sidecars share
    rests: bool = False  # another process is about to go on with it
    sums: Sequence[AddsUp] = ()  # of the backends: those that keep sums
    waited_for: bool = False  # responses wait for a backend: nothing gathers on its way there
    room: Room = Room.ENOUGH
    free_bytes: int = 0
    disk_bytes: int = 0
    set_aside: int = 0  # damaged chunks that were copied and are kept
    spool_bytes: int = 0  # of all slots, as `SIDECAR_RETENTION_BYTES` counts
    _committed: list[tuple[str, Batch, Ended]] = field(default_factory=list)  # that delivery has not been given
    _handing: asyncio.TimerHandle | None = None
    ledger_bytes: int = 0  # grows with each distinct pair of subscriber and what it consumed, and is never retired

    def status(self) -> list[BackendStatus]:
        """How each backend does."""
        return self.delivery.status() + ([] if self.elected is None else self.elected.status())

    def parked_now(self) -> dict[tuple[str, str], int]:
        """Records parked by backend and reason: our own, and those of the lanes that are held here. Blocks."""
        return self.delivery.parked_now() | ({} if self.elected is None else self.elected.parked_now())

    async def correct(self, wish: Wish) -> list[Any]:
        """Do what an operator wants, here and on all lanes; what came of it in each place. Raises `LookupError`."""
        told = []
        if wish["do"] != "retry" or wish["backend"] in self.delivery.backends:
            told.append(await grant(wish, self.delivery, self.delivery.backends))
        if self.elected is not None and (wish["do"] != "retry" or not told):
            told += await self.elected.ask(wish)
        return told

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
        noticed, shared = self.copied, self.shared
        if shared is not None:
            await shared.adopt(copy=how is directory_identity.As.COPY)
            self.delivery.end_waits(shared.name)
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

    @property
    def shared(self) -> SharedLedgerBackend | None:
        """The ledger that many sidecars share, where there is one."""
        found = self.backends.get(LEDGER_NAME)
        return found if isinstance(found, SharedLedgerBackend) else None

    def oldest_pending_s(self) -> float | None:
        """When the oldest record was committed that the ledger has not been given, Unix seconds. Blocks."""
        oldest: list[float] = []
        for cursor in self.state.cursors(LEDGER_NAME):
            groups = self.reader.read(cursor.instance, cursor.seq, bytes_max=1)
            oldest += [group.committed_ns / 1e9 for group in groups[:1] if group.last_seq > cursor.seq]
        return min(oldest, default=None)

    def hand_over(self, instance: str, batch: Batch, ended: Ended) -> None:
        """What is on disk now goes to delivery as it is in memory, in a moment: nothing is read back."""
        self._committed.append((instance, batch, ended))

    def committed(self) -> None:
        """There was a commit. Where backends keep sums alone, delivery hears of many together: what it does then costs
        the same whatever is in them."""
        if len(self.sums) < len(self.backends) or self.waited_for:
            self.hand_on()
        elif self._handing is None:
            self._handing = asyncio.get_running_loop().call_later(HAND_ON_S, self.hand_on)

    def hand_on(self) -> None:
        """Give delivery all that was committed."""
        if self._handing is not None:
            self._handing.cancel()
            self._handing = None
        committed, self._committed = self._committed, []
        for instance, done, ended in committed:
            group = StoredGroup(first_seq=done.first_seq, last_seq=done.last_seq, lines=tuple(done.lines))
            if len(self.sums) < len(self.backends):
                self.delivery.offer(instance, group, ended.records(instance))
            else:
                self.delivery.note(instance, done.last_seq)
        if self.sums:
            for instance, first_seq, ended, lines in _runs(committed):
                records = ended.records(instance)
                last_seq = first_seq + len(lines) - 1
                batch = SummedBatch(instance=instance, first_seq=first_seq, last_seq=last_seq, sums=None)
                for backend in self.sums:
                    whole = replace(batch, stored=lines) if backend.keeps_lines else batch
                    self._add_up(backend, whole, records, ended.groups)
        self.delivery.wake()

    def _add_up(
        self, backend: AddsUp, batch: SummedBatch, records: Sequence[Record], groups: Sequence[CallGroup]
    ) -> None:
        try:
            sums, left = backend.add_up(records, groups)
        except ArithmeticError:
            return  # found one by one, when they are read
        out = left.skipped.keys() | left.parked.keys()
        lines: dict[str, tuple[int, bytes]] = {}
        if out:
            apart = [record for group in groups for record in group.records()]
            lines = {record.id: (record.seq, record.json) for record in (*records, *apart) if record.id in out}
        self.delivery.apply(replace(batch, sums=sums, left=left, lines=lines))

    async def last_pass(self) -> None:
        """Deliver what can be delivered in a moment, unless somebody else goes on with it at once."""
        if not self.rests:
            await self.delivery.drain(DRAIN_S)

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
            lambda: (*disk_room(root), count_set_aside(root), size_of(root / backend_factory.LEDGER))
        )
        self.spool_bytes = await asyncio.to_thread(lambda: sum(map(size_of, spool_dir(root).glob("*/*.seg"))))
        room = room_left(self.free_bytes, self.settings.spool.disk_low_bytes)
        if room is not self.room:
            self.room = room
            facts = {"free_bytes": self.free_bytes, "disk_low_bytes": self.settings.spool.disk_low_bytes}
            if room is Room.ENOUGH:
                log.info("the disk has room again", extra={"facts": facts})
            else:
                log.error(room.value, extra={"facts": facts})

    async def retire(self) -> None:
        """Remove chunks that every backend is done with, as far as retention allows, and what is remembered of them."""
        gone = await asyncio.to_thread(self._retire_segments)
        if gone:
            await self.delivery.forget(gone)

    def _retire_segments(self) -> dict[str, int]:
        """The number up to which each slot has nothing any more, where something went."""
        settings = self.settings
        keep_s = 0.0 if self.room is Room.SHORT else settings.spool.retention
        gone: dict[str, int] = {}
        for instance, upto in self.delivery.retired_upto().items():
            if retire_segments(settings.data_dir, instance, upto + 1, keep_s, settings.spool.retention_bytes) and (
                left := self.reader.segments(instance)
            ):
                gone[instance] = left[0].first_seq - 1
        return gone


def _runs(committed: Sequence[tuple[str, Batch, Ended]]) -> list[tuple[str, int, Ended, list[bytes]]]:
    """Commits that follow each other and of which all is at hand, as one: instance, first number, what they hold, and
    its lines."""
    runs: list[tuple[str, int, Ended, list[bytes]]] = []
    for instance, batch, ended in committed:
        if ended.calls != len(batch.lines):
            continue  # settled by us: it is read from the spool
        if runs and runs[-1][0] == instance and runs[-1][1] + len(runs[-1][3]) == batch.first_seq:
            _, _, whole, lines = runs[-1]
            whole.join(ended)
            lines += batch.lines
        else:
            runs.append((instance, batch.first_seq, ended, list(batch.lines)))
    return runs


def remembered(settings: Settings, state: DeliveryStore) -> dict[str, int]:
    """Of each slot, the greatest number that any backend was handed: a spool that has less has lost some."""
    greatest: dict[str, int] = {}
    for name in settings.backends:
        for cursor in state.cursors(name):
            greatest[cursor.instance] = max(cursor.seq, greatest.get(cursor.instance, 0))
    return greatest


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
async def billing(
    settings: Settings,
    metrics: Metrics,
    *,
    instance: str | None = None,
    goes_on: Collection[str] = (),
    spooling: bool = False,
    settled: Mapping[str, Settled] | None = None,
) -> AsyncIterator[Billing]:
    """Open the spool, where `spooling`, and start delivering. Leaving commits what was handed over and makes one last
    pass, bounded by `DRAIN_S`. Raises the parts' own errors.

    `instance`: the slot to take, where it is known. `goes_on`: how the ids of calls end that go on in a living process.
    `settled`: for a backend that responses wait for, who is told how it stands.
    """
    async with AsyncExitStack() as stack:
        state = await asyncio.to_thread(DeliveryStore.open, settings.data_dir / "delivery.db")
        stack.callback(state.close)
        copied = await asyncio.to_thread(look_at_place, settings, state)
        spool: Spool | None = None
        unopened = stack.enter_context(ExitStack())
        if spooling:  # before anything is adopted: what is ours and goes on is nobody's to settle
            opening = functools.partial(
                Spool.open,
                settings.data_dir,
                instance=instance,
                metrics=metrics,
                remembered_seq=lambda name: remembered(settings, state).get(name, 0),
                goes_on=lambda id_: id_[-2 * CHANCE_BYTES :] in goes_on,
            )
            spool = await asyncio.to_thread(opening)
            unopened.callback(spool.close)
            if spool.stopped:
                metrics.lost("stopped", spool.stopped)
        told = functools.partial(metrics.lost, "stopped")
        for name in await asyncio.to_thread(adopt_orphans, settings.data_dir, stopped=told):
            log.info("adopted a spool that was left behind", extra={"facts": {"instance": name}})
        reader = stack.enter_context(SpoolReader(settings.data_dir))
        backends = backend_factory.backends(settings, backend_factory.own(settings), metrics.value_not_computed)
        elected: Elected | None = None
        if (url := settings.fleet.ledger_url) is not None and (names := backend_factory.elected(settings)):
            # Before any record of ours is in the ledger: whose lane has none then is told all that comes.
            elected = await stack.enter_async_context(
                Elected(
                    url=url.reveal(),
                    me=f"{Identity(settings.data_dir, settings.fleet.instance).name or 'new'}/{secrets.token_hex(4)}",
                    names=names,
                    make=lambda: backend_factory.of_a_lane(settings, names),
                    metrics=metrics,
                    retention_s=settings.spool.retention,
                    skip_gaps=settings.backend_gaps == "skip",
                )
            )
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
            # A shared one knows each record again, so what a copy sends it does no harm.
            safe=(LEDGER_NAME,) if copied is None or copied.whole or settings.fleet.ledger_url is not None else (),
            settled=settled,
        )
        await stack.enter_async_context(delivery)
        by_name = {backend.name: backend for backend in backends}
        bills = Billing(
            settings=settings,
            state=state,
            reader=reader,
            delivery=delivery,
            backends=by_name,
            copied=copied,
            spool=spool,
            elected=elected,
            sums=[backend for backend in backends if isinstance(backend, AddsUp)],
            waited_for=bool(settled),
        )
        stack.push_async_callback(bills.last_pass)
        stack.callback(bills.hand_on)
        stack.push_async_callback(bills.remember_place)
        await bills.look_at_disk()
        retiring = asyncio.create_task(bills.keep_retiring())
        stack.callback(retiring.cancel)
        examining = asyncio.create_task(backend_factory.examine(backends))
        stack.callback(examining.cancel)
        if spool is not None:
            await stack.enter_async_context(spool)
            spool.on_committed(bills.committed)
            unopened.pop_all()
            delivery.wake()  # what was settled or salvaged while it opened
            if copied is None:
                offering = asyncio.create_task(delivery.offer_mapped())  # the mapping may be another one by now
                stack.callback(offering.cancel)
        yield bills


# --- the whole -----------------------------------------------------------------------------------------


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
    seam: Seam = field(init=False)
    admin_url: str = ""
    early: str = ""  # why nothing is recorded yet
    bills: Billing | None = None
    fleet: Fleet | None = None  # of those that share a ledger
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

    async def metrics(self) -> bytes:
        balance = await self.balance()
        degraded = (await self.readiness()).state in ("degraded", "full")
        gauges = Gauges(
            admitted=balance.admitted,
            recorded=balance.recorded,
            open=balance.open,
            holds=balance.holds,
            degraded=degraded,
        )
        bills = self.bills
        if bills is not None:
            status = bills.status()
            gauges.pending = {name: totals.pending for name, totals in balance.backends.items()}
            if bills.elected is not None:
                gauges.pending |= await asyncio.to_thread(bills.elected.pending)
            gauges.parked = await asyncio.to_thread(bills.parked_now)
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

    async def limits(self) -> list[dict[str, Any]]:
        """Who is at what of which limit."""
        if self.gate is None:
            return []
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
        answers = await self.seam.ask()
        serving = self.seam.serving
        told = self.told()
        found = {answer.state for answer in answers} | {told.state}
        state = next((s for s in STATES if s in found), "degraded")
        notes = list(dict.fromkeys(n for n in (told.reason, *(answer.reason for answer in answers)) if n))
        if missing := len(serving) - len(answers):
            notes.append(f"{missing} of {len(serving)} workers do not answer")
            if not answers:
                state = "degraded" if state == "ok" else state
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
            "backend": backend, "reason": reason, "ids": ids, "since_s": since_s, "resend_unknown": resend_unknown,
        }  # fmt: skip
        return redriven(await bills.correct({"do": "redrive", **choice}))

    async def retry(self, backend: str) -> dict[str, Any]:
        """End all waits of a backend. Raises `LookupError`, in words, for one that is not configured."""
        bills = self._billing()
        if backend not in self.settings.backends:
            raise LookupError(self._no_backend(backend))
        return retried(await bills.correct({"do": "retry", "backend": backend}))

    def _no_backend(self, name: str) -> str:
        backends = ", ".join(self.settings.backends) or "none"
        return f"{name} is not one of the backends of this instance ({backends})"

    async def cancel(self, one: str, *, backend: str | None) -> list[dict[str, Any]]:
        return outcomes(await self._billing().correct({"do": "cancel", "one": one, "backend": backend}))

    async def complain(self, backend: str, named: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
        return outcomes(await self._billing().correct({"do": "complain", "backend": backend, "named": named}))

    async def adopt(self, how: str) -> dict[str, int] | None:
        """None where nothing was noticed, so that there is nothing to decide."""
        bills = self._billing()
        refused = bills.shared is not None and bills.shared.copied
        return None if bills.copied is None and not refused else await bills.adopt(As(how))


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
        whole.seam = Seam(whole.intake, whole.told, whole.set_open, gate)
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
                loading = asyncio.create_task(load_limits(whole, whole.gate, settings, bills, last_seq))
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
    except (OSError, SpoolError, StorageError, ValueError) as error:
        log.error("what was used of the limits cannot be read, so they begin at nothing: %s", error)
        found = None
    if gate_factory.is_shared(settings):
        try:
            missing = await asyncio.to_thread(gate_factory.missing_hours, settings, bills.reader)
            whole.limits_shared = gate.fleet = gate_factory.fleet(settings, gate.counters, missing)
        except (OSError, SpoolError, ValueError) as error:
            log.error("limits are not shared, SIDECAR_GATE_ON_FAILURE decides: %s", error)
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
    guard = Guard.of(settings.serve.admin_listen, settings.serve.admin_token, settings.serve.admin_hosts)
    app = application(whole, guard, Reports(settings, whole.limits))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=ADMIN_STOP_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    await web.SockSite(runner, listener).start()
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
    settings: Settings, start: Start, *, key: bytes, seam: socket.socket, admin: socket.socket,
    wire_socket: socket.socket,
) -> int:  # fmt: skip
    """Meter until told to stop; the exit code."""
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
        wrong = isinstance(error, NotWritableError | LedgerError)
        known = isinstance(error, LockError | SpoolError | StateError | LedgerError | SocketError | NoRoomError)
        self._wire.send(cannot=str(error) if known else f"cannot start: {error}", code=2 if wrong else 1)
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
            "not even their number could be kept: no balance will say so", calls,
            extra={"facts": {"calls": calls, "kept_in_balance": False}},
        )  # fmt: skip
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
