"""What is recorded is billed: the spool that is written, delivery at work, and the balance over all slots.

It is opened before calls are let in, and closed when everything is committed and had one more chance to leave.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import secrets
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from sidecar.backends.ledger import SharedLedgerBackend
from sidecar.delivery import Delivery, DeliveryStore, StateError, SystemClock
from sidecar.delivery.context import Copied
from sidecar.delivery.elected import Elected, make_room_for_lanes
from sidecar.delivery.ledger_worker import SummedBatch
from sidecar.delivery.types import BackendStatus
from sidecar.delivery.wishes import Asked, Wish, grant
from sidecar.delivery.worker import Settled
from sidecar.ledger.identity import Identity
from sidecar.model.balance import Balance
from sidecar.model.call_group import CallGroup
from sidecar.model.delivery import AddsUp, Backend
from sidecar.model.record import Record
from sidecar.model.record_id import CHANCE_BYTES
from sidecar.runtime import backend_factory, directory_identity
from sidecar.runtime.backend_factory import LEDGER_NAME
from sidecar.runtime.disk import Room, room_left, size_of
from sidecar.runtime.metrics import Metrics
from sidecar.settings import Settings
from sidecar.spool import (
    Snapshot,
    Spool,
    SpoolError,
    SpoolReader,
    adopt_orphans,
    count_set_aside,
    disk_room,
)
from sidecar.spool.files import spool_dir
from sidecar.spool.intake import Ended
from sidecar.spool.retention import retire_segments
from sidecar.spool.types import Batch, StoredGroup

log = logging.getLogger("sidecar.metering")

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
    _unmarked: str | None = None  # why `remember_place` could not, and it was said
    _sent: Sequence[str] = field(init=False)  # backends that keep no sums, by name
    ledger_bytes: int = 0  # grows with each distinct pair of subscriber and what it consumed, and is never retired

    def __post_init__(self) -> None:
        self._sent = [name for name, backend in self.backends.items() if not isinstance(backend, AddsUp)]

    def status(self) -> list[BackendStatus]:
        """How each backend does."""
        return self.delivery.status() + ([] if self.elected is None else self.elected.status())

    def parked_now(self) -> dict[tuple[str, str], int]:
        """Records parked by backend and reason: our own, and those of the lanes that are held here. Blocks."""
        return self.delivery.parked_now() | ({} if self.elected is None else self.elected.parked_now())

    async def correct(self, wish: Wish) -> Asked:
        """Do what an operator wants, here and on all lanes; what came of it in each place."""
        told = []
        if wish["do"] != "retry" or wish["backend"] in self.delivery.backends:
            told.append(await grant(wish, self.delivery, self.delivery.backends))
        if self.elected is not None and (wish["do"] != "retry" or not told):
            asked = await self.elected.ask(wish)
            return replace(asked, answers=[*told, *asked.answers])
        return Asked(answers=told)

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
        """There was a commit. Where all that are up keep sums alone, delivery hears of many together: what it does then
        costs the same whatever is in them."""
        if self.waited_for or self._wants_each():
            self.hand_on()
        elif self._handing is None:
            self._handing = asyncio.get_running_loop().call_later(HAND_ON_S, self.hand_on)

    def _wants_each(self) -> bool:
        """Whether there is a backend that is sent record by record, and is up."""
        return any(not self.delivery.is_down(name) for name in self._sent)

    def hand_on(self) -> None:
        """Give delivery all that was committed."""
        if self._handing is not None:
            self._handing.cancel()
            self._handing = None
        committed, self._committed = self._committed, []
        for instance, done, ended in committed:
            group = StoredGroup(first_seq=done.first_seq, last_seq=done.last_seq, lines=tuple(done.lines))
            if self._sent:
                self.delivery.offer(instance, group, ended.records(instance))
            else:
                self.delivery.note(instance, done.last_seq)
        if self.sums:
            for instance, first_seq, ended, lines in _runs(committed):
                records, groups = ended.records(instance), ended.groups()
                last_seq = first_seq + len(lines) - 1
                batch = SummedBatch(instance=instance, first_seq=first_seq, last_seq=last_seq, sums=None)
                for backend in self.sums:
                    whole = replace(batch, stored=lines) if backend.keeps_lines else batch
                    self._add_up(backend, whole, records, groups)
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
            why = getattr(error, "strerror", None) or str(error)
            if why != self._unmarked:
                log.warning("the mark by which an older delivery.db is noticed cannot be written: %s", why)
            self._unmarked = why
        else:
            self._unmarked = None

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
            except (OSError, SpoolError, StateError) as error:
                log.warning("delivered chunks could not be removed: %s", error)
            except Exception:  # without it the disk fills
                log.exception("delivered chunks could not be removed")

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


def _in_doubt(settings: Settings, copied: directory_identity.Noticed) -> Copied:
    """What delivery keeps back until somebody has decided. A ledger that was copied together with `delivery.db` is of
    the same moment: they agree. A shared one knows each record again, so what a copy sends it does no harm."""
    safe = (LEDGER_NAME,) if copied.whole or settings.fleet.ledger_url is not None else ()
    return Copied(copied.since_s, copied.text, frozenset(safe))


async def _open_spool(
    settings: Settings, metrics: Metrics, state: DeliveryStore, instance: str | None, goes_on: Collection[str]
) -> Spool:
    """The slot that is written here, with what the last run left in it. Arguments as of `billing`."""
    opening = functools.partial(
        Spool.open,
        settings.data_dir,
        instance=instance,
        metrics=metrics,
        remembered_seq=lambda name: remembered(settings, state).get(name, 0),
        goes_on=lambda id_: id_[-2 * CHANCE_BYTES :] in goes_on,
    )
    spool = await asyncio.to_thread(opening)
    if spool.stopped:
        metrics.lost("stopped", spool.stopped)
    return spool


async def _adopt_orphans(settings: Settings, metrics: Metrics) -> None:
    """Take over the slots that nobody writes any more."""
    told = functools.partial(metrics.lost, "stopped")
    for name in await asyncio.to_thread(adopt_orphans, settings.data_dir, stopped=told):
        log.info("adopted a spool that was left behind", extra={"facts": {"instance": name}})


def _elected(settings: Settings, metrics: Metrics) -> Elected | None:
    """Delivery of what is in the ledger that all share, where it is for whoever is elected."""
    url, names = settings.fleet.ledger_url, backend_factory.elected(settings)
    if url is None or not names:
        return None
    return Elected(
        url=url.reveal(),
        me=f"{Identity(settings.data_dir, settings.fleet.instance).name or 'new'}/{secrets.token_hex(4)}",
        names=names,
        make=lambda: backend_factory.of_a_lane(settings, names),
        metrics=metrics,
        retention_s=settings.spool.retention,
        skip_gaps=settings.backend_gaps == "skip",
    )


async def _open_backends(
    stack: AsyncExitStack, settings: Settings, metrics: Metrics, *, resumed: bool
) -> tuple[list[Backend], Elected | None]:
    """Those that this instance delivers to, and who delivers what all share; both are closed with `stack`."""
    own = backend_factory.own(settings)
    backends = backend_factory.backends(settings, own, metrics.value_not_computed, resumed=resumed)
    elected = _elected(settings, metrics)
    if elected is not None:
        make_room_for_lanes()
        await stack.enter_async_context(elected)
    for backend in backends:
        stack.push_async_callback(backend.aclose)
    return backends, elected


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
            spool = await _open_spool(settings, metrics, state, instance, goes_on)
            unopened.callback(spool.close)
        await _adopt_orphans(settings, metrics)
        reader = stack.enter_context(SpoolReader(settings.data_dir))
        backends, elected = await _open_backends(stack, settings, metrics, resumed=instance is not None)
        delivery = Delivery(
            reader=reader,
            store=state,
            backends=backends,
            metrics=metrics,
            clock=SystemClock(),
            chance=random.Random(),  # noqa: S311 - jitter, no secret
            skip_gaps=settings.backend_gaps == "skip",
            copied=None if copied is None else _in_doubt(settings, copied),
            settled=settled,
        )
        await stack.enter_async_context(delivery)
        bills = Billing(
            settings=settings,
            state=state,
            reader=reader,
            delivery=delivery,
            backends={backend.name: backend for backend in backends},
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
        for work in (bills.keep_retiring(), backend_factory.examine(backends)):
            stack.callback(asyncio.create_task(work).cancel)
        if spool is not None:
            await stack.enter_async_context(spool)
            spool.on_committed(bills.committed)
            unopened.pop_all()
            delivery.wake()  # what was settled or salvaged while it opened
            if copied is None:
                offering = asyncio.create_task(delivery.offer_mapped())  # the mapping may be another one by now
                stack.callback(offering.cancel)
        yield bills
