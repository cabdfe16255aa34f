"""The owner of the workers: opens them in order, watches the clock, and lets an operator look in and correct.

What must always hold: every configured backend has a worker of its own, which goes on whatever happens, so that one
backend holds up no other; what a removed backend had still to get is parked. The file is opened by the caller and
belongs to this object while it runs.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, ParamSpec, Self

from sidecar.delivery.context import Context, Copied, SystemClock
from sidecar.delivery.ledger_worker import SummedBatch
from sidecar.delivery.limits import Limits
from sidecar.delivery.queries import PAGE, Found, totals_of, whereabouts
from sidecar.delivery.redrive import EACH_MAX, Became, OneOutcome, Redriven
from sidecar.delivery.removed_backend import RETRY_S, SLICE, part_with
from sidecar.delivery.rows import Parked, Place, StateError
from sidecar.delivery.store import Configured, DeliveryStore
from sidecar.delivery.tail import Tail
from sidecar.delivery.types import (
    BEFORE,
    GAP,
    REMOVED,
    RETIRED,
    BackendStatus,
    Clock,
    Ended,
    Metrics,
    Now,
    SpoolReader,
    StoredGroup,
)
from sidecar.delivery.worker import Settled, Worker
from sidecar.model.balance import BackendTotals
from sidecar.model.delivery import NO_CUSTOMER, Backend
from sidecar.model.record import Record
from sidecar.spool.types import SpoolError

_LOG: Final = logging.getLogger(__name__)
_P = ParamSpec("_P")


class Delivery:
    """Delivers what is in the spool to every backend. Open it before calls are let in."""

    def __init__(
        self,
        *,
        reader: SpoolReader,
        store: DeliveryStore,
        backends: Sequence[Backend],
        metrics: Metrics,
        clock: Clock | None = None,
        chance: random.Random | None = None,
        limits: Limits | None = None,
        skip_gaps: bool = False,
        copied: Copied | None = None,
        settled: Mapping[str, Settled] | None = None,
        may_send: Callable[[], bool] = lambda: True,
    ) -> None:
        """`skip_gaps`: a backend that was left out does not get what was recorded meanwhile.

        `copied`: the files were copied, and nobody has decided yet what they are (`adopt`).
        `settled`: for a backend that somebody waits for, who is told how it stands.
        `may_send`: asked before each request, where what is delivered is ours for a time only.
        """
        self._skip_gaps = skip_gaps
        self.reader, self.store, self.metrics = reader, store, metrics
        self._queries = store.queries()
        self._context = Context(
            reader=reader,
            store=store,
            queries=self._queries,
            metrics=metrics,
            clock=clock or SystemClock(),
            limits=limits or Limits(),
            chance=chance or random.Random(),  # noqa: S311 - jitter, no secret
            copied=copied,
            stepped=self._clock_stepped,
            may_send=may_send,
        )
        self.tail = Tail(reader, self._context.limits)
        self.backends = {backend.name: backend for backend in backends}
        waited = settled or {}
        self._workers = {
            backend.name: Worker(backend, self._context, self.tail, waited.get(backend.name)) for backend in backends
        }
        self._group = asyncio.TaskGroup()
        self._running = False
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Delivery: {', '.join(map(repr, self._workers.values())) or 'no backends'}>"

    # --- running ----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Find where every backend is, settle with the removed ones, start the workers."""
        store, context = self.store, self._context
        try:
            await self._check_clock()
            places = await asyncio.to_thread(self._places)
            names, now_s = list(self._workers), self.now().wall_s
            found = await store.run(
                store.configure, names, places, now_s, count=self.reader.count, skip_gaps=self._skip_gaps
            )
            self._say(found)
            starts = [
                (await store.run(store.cursors, name), await store.run(store.open_requests, name)) for name in names
            ]
        except BaseException:
            self._queries.close()
            raise
        await self._group.__aenter__()
        self._running = True
        for worker, (cursors, requests) in zip(self._workers.values(), starts, strict=True):
            self._start(worker.run(cursors, requests))
        self._start(self._tick())
        for worker in self._workers.values() if not self._skip_gaps else ():
            self._start(_once(self._take_back, worker))
        ends = {place.instance: place.last_seq for place in places}
        for name in sorted(found.gone):
            self._start(_once(part_with, name, store, self.reader, context.clock.wall_s, ends))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop at once: what is under way is unknown and is found so by the next start. `drain` comes before."""
        for task in self._tasks:
            task.cancel()
        try:
            await self._group.__aexit__(kind, error, trace)
        finally:
            await self.store.run(int)  # what was being stored is
            await asyncio.to_thread(self._queries.close)

    def is_down(self, backend: str) -> bool:
        """Whether it is asked from time to time only, and nothing is to be had by hearing of a record at once."""
        return self._workers[backend].is_down

    def wake(self) -> None:
        """Records were committed."""
        self.tail.wake()
        for worker in self._workers.values():
            worker.wake()

    def offer(self, instance: str, group: StoredGroup, records: Sequence[Record] = ()) -> None:
        """The writer is in this process: what it has just committed need not be read again. Call it before `wake`."""
        self.tail.offer(instance, group, records)

    def note(self, instance: str, last_seq: int) -> None:
        """The same without the records: what they add up to is handed over (`apply`), and nobody wants them apart."""
        self.tail.note(instance, last_seq)

    def apply(self, batch: SummedBatch) -> bool:
        """What committed records add up to is at hand: backends that keep sums need not read them. Call it before
        `wake`. False: nobody wants it, which costs nothing but the reading."""
        taken = [worker.apply(batch) for worker in self._workers.values()]
        return any(taken)

    async def drain(self, timeout_s: float) -> None:
        """One last pass: deliver what can be delivered in this time, without waiting for batches to fill."""
        for worker in self._workers.values():
            worker.draining = True
        self.wake()
        try:
            async with asyncio.timeout(timeout_s):
                for worker in self._workers.values():
                    await worker.idle.wait()
        except TimeoutError:
            _LOG.warning("stopping with deliveries undone; the next start goes on with them", extra={"facts": {}})
        finally:
            for worker in self._workers.values():
                worker.draining = False

    async def rest(self, timeout_s: float) -> None:
        """Begin nothing any more, and let what is under way end: the next start goes on at once with all the rest, and
        of nothing it does not know what became."""
        for worker in self._workers.values():
            worker.resting = True
            worker.wake()
        try:
            async with asyncio.timeout(timeout_s):
                for worker in self._workers.values():
                    await worker.idle.wait()
        except TimeoutError:
            _LOG.warning("a request is cut short that a backend has not answered", extra={"facts": {}})

    # --- looking in -------------------------------------------------------------------------------

    def status(self) -> list[BackendStatus]:
        """How each backend does."""
        return [worker.status() for worker in self._workers.values()]

    def totals(self, upto: Mapping[str, int]) -> dict[str, BackendTotals]:
        """Each backend's side of the balance, counted up to these numbers. Blocks."""
        sums = self._queries.sums(list(self._workers), upto)
        return {name: totals_of(one, self.reader.count) for name, one in sums.items()}

    def verify(self) -> list[str]:
        """Recount everything from rows; every difference in words. Blocks."""
        return self._queries.verify() + self._queries.ahead_of(self.reader)

    def retired_upto(self) -> dict[str, int]:
        """For each instance the number up to which no backend needs its spool any more. Blocks."""
        upto = {instance: self.reader.last_seq(instance) for instance in self.reader.instances()}
        for name in self._workers:
            known = self._queries.cursors(name)
            upto = {instance: min(seq, known.get(instance, 0)) for instance, seq in upto.items()}
        return upto

    def parked(
        self,
        *,
        backend: str | None = None,
        reason: str | None = None,
        ids: Sequence[str] | None = None,
        since_s: float | None = None,
        after: int = 0,
        limit: int = PAGE,
    ) -> list[Parked]:
        """A page of parked events with reason, body and history, in the order of their parking. Blocks."""
        return self._queries.parked(backend=backend, reason=reason, ids=ids, since_s=since_s, after=after, limit=limit)

    def parked_now(self) -> dict[tuple[str, str], int]:
        """Records parked by backend and reason, those of backends that are left out included. Blocks."""
        return self._queries.parked_now()

    def find(self, one: str) -> list[Found]:
        """Where an event or record with this id went, as long as it is remembered (`forget`). Blocks."""
        return self._queries.find(one, self.reader)

    # --- correcting -------------------------------------------------------------------------------

    async def redrive(self, **choice: Any) -> int:
        """Offer parked events again (`offer_again`); returns how many go."""
        return (await self.offer_again(**choice)).offered

    async def offer_again(
        self,
        *,
        backend: str | None = None,
        reason: str | None = None,
        ids: Sequence[str] | None = None,
        since_s: float | None = None,
        resend_unknown: bool = False,
    ) -> Redriven:
        """Offer parked events again, and say what became of each. What may have been taken goes only with
        `resend_unknown`.

        With `since_s`: what was parked since, and records made since that were skipped because their backend was
        not configured then. Stops where a backend's retry set is full; what is left goes with the next call.
        """
        told = Redriven()
        if since_s is not None and ids is None and reason in (None, BEFORE, GAP):
            for name, worker in self._workers.items():
                if backend in (None, name):
                    told.unskipped += await worker.redrive_before(since_s)
        wanted = None if ids is None else list(dict.fromkeys(ids))
        for start in range(0, 1 if wanted is None else len(wanted), PAGE):
            some = None if wanted is None else wanted[start : start + PAGE]
            await self._redrive_some(told, backend, reason, some, since_s, resend_unknown=resend_unknown)
        missing = [one for one in wanted or () if one not in told.seen]
        told.not_found = [
            (one, await asyncio.to_thread(self._whereabouts, one) if index < EACH_MAX else "")
            for index, one in enumerate(missing)
        ]
        return told

    async def offer_mapped(self) -> Redriven:
        """Offer again what is parked because nobody was known to pay for it, and is no more: for a start, and for
        whenever customers were mapped. What nobody is known to pay for still is not touched. Stops as `offer_again`
        does."""
        told, after = Redriven(), 0
        last = await asyncio.to_thread(self._queries.last_parked)
        while True:
            read = await asyncio.to_thread(self.parked, reason=NO_CUSTOMER, after=after)
            page = [row for row in read if row.id <= last]
            for name in dict.fromkeys(row.backend for row in page):
                worker = self._workers.get(name)
                if worker is None:
                    continue
                rows = [row for row in page if row.backend == name and _is_mapped(worker.backend, row)]
                if rows:
                    await worker.redrive(rows, told, resend_unknown=False)
            if len(page) < PAGE:
                break
            after = page[-1].id
            await asyncio.sleep(0)
        if told.offered:
            _LOG.info("%d records that nobody was known to pay for have a customer now and go again", told.offered)
        return told

    async def _redrive_some(
        self,
        told: Redriven,
        backend: str | None,
        reason: str | None,
        ids: Sequence[str] | None,
        since_s: float | None,
        *,
        resend_unknown: bool,
    ) -> None:
        # What is parked again for another reason stands behind `last`, and is not looked at twice.
        last, after = await asyncio.to_thread(self._queries.last_parked), 0
        while True:
            read = await asyncio.to_thread(
                self.parked, backend=backend, reason=reason, ids=ids, since_s=since_s, after=after
            )
            page = [row for row in read if row.id <= last]
            for row in page if ids is not None else ():
                told.seen.update((row.record_id, row.event_id))
            for name in dict.fromkeys(row.backend for row in page):
                rows = [row for row in page if row.backend == name]
                if name in self._workers:
                    await self._workers[name].redrive(rows, told, resend_unknown=resend_unknown)
                    continue
                for row in rows:
                    told.add(
                        OneOutcome(
                            backend=name,
                            event_id=row.event_id,
                            record_id=row.record_id,
                            became=Became.NOT_CONFIGURED,
                            reason=row.reason,
                        )
                    )
            if len(page) < PAGE:
                return
            after = page[-1].id

    def _whereabouts(self, one: str) -> str:
        """What is known of an id that is not among the parked events that were chosen. Blocks."""
        return whereabouts(self, one)

    def end_waits(self, backend: str) -> Ended:
        """Offer a backend what waits for it now. Raises `KeyError` for one that is not configured."""
        return self._workers[backend].end_waits()

    async def adopt(self, leave: Mapping[str, int] | None) -> dict[str, int]:
        """The operator has decided. `leave`: spools whose pending records are another's; how many were parked."""
        counts: dict[str, int] = {}
        if leave is not None:
            safe = frozenset() if self._context.copied is None else self._context.copied.safe
            for name, worker in self._workers.items():
                if name not in safe:
                    counts[name] = await worker.leave(leave)
        self._context.copied = None
        self.wake()
        return counts

    async def forget(self, upto: Mapping[str, int]) -> None:
        """Let go of what is remembered of settled records up to these numbers: their chunks are gone."""
        for instance, seq in upto.items():
            more = True
            while more:
                more = await self.store.run(self.store.fold, instance, seq)

    def now(self) -> Now:
        """Both clocks."""
        return self._context.now()

    # --- inside -----------------------------------------------------------------------------------

    def _clock_stepped(self) -> None:
        for worker in self._workers.values():
            worker.clock_stepped()
        if self._running:
            self._start(_once(self._expire))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _expire(self) -> None:
        """For a crash before the workers store it themselves."""
        try:
            await self.store.run(self.store.expire_risks)
        except StateError as error:
            _LOG.error("a step of the clock could not be stored: %s", error)

    async def _check_clock(self) -> None:
        """A wall clock that went back while we were away makes every window's age a guess."""
        now_s = self._context.clock.wall_s()
        before = await self.store.run(self.store.saw_clock, now_s)
        if before is not None and now_s < before:
            expired = await self.store.run(self.store.expire_risks)
            _LOG.warning(
                "the wall clock is behind where the last run left it; what may have been taken is not sent again",
                extra={"facts": {"seconds": round(before - now_s, 1), "requests": expired}},
            )

    async def _tick(self) -> None:
        """Keep the wall clock's reading, so that a start can tell whether it went back."""
        while True:
            await asyncio.sleep(self._context.limits.sweep_s)
            try:
                now = self.now()
                self._context.tell_parked()
                await self.store.run(self.store.saw_clock, now.wall_s)
            except StateError:
                pass  # the workers tell
            except Exception:  # noqa: BLE001 - the next look may do better
                _LOG.exception("the wall clock's reading is not kept this time")

    async def _take_back(self, worker: Worker) -> None:
        """Let go what was parked because a backend was left out: it is configured again. Runs once after every start,
        so that one that was cut short is finished; what may have been taken and would not be recognised stays."""
        name, told, after = worker.backend.name, Redriven(), 0
        while True:
            try:
                page = await asyncio.to_thread(self.parked, backend=name, reason=REMOVED, after=after, limit=SLICE)
                if page:
                    await worker.take_back(page, told)
            except (StateError, SpoolError, OSError) as error:
                _LOG.error("what a backend had still to get when it was left out cannot be taken up yet: %s", error)
                await asyncio.sleep(RETRY_S)
                after = 0
                continue
            if len(page) < SLICE:
                break
            after = page[-1].id
        if told.offered:
            _LOG.warning(
                "a backend is configured again; what was parked when it was left out is pending again",
                extra={"facts": {"backend": name, "events": told.offered}},
            )

    def _say(self, found: Configured) -> None:
        """What this start passes over is in the log and in a metric; so is what it brings back."""
        for name, skipped in found.before.items():
            if skipped:
                self.metrics.skipped(name, BEFORE, skipped)
                _LOG.info(
                    "a backend is new: it begins with what is recorded from now on",
                    extra={"facts": {"backend": name, "skipped": skipped}},
                )
        for name, back in found.back.items():
            facts = {"backend": name, "pending": back.pending, "skipped": back.skipped, "retired": back.retired}
            for reason, records in ((GAP, back.skipped), (RETIRED, back.retired)):
                if records:
                    self.metrics.skipped(name, reason, records)
            if back.skipped or back.retired:
                _LOG.warning(
                    "a backend was left out for a while; not everything that was recorded meanwhile is delivered to it",
                    extra={"facts": facts | {"bring_it": f"spool redrive --backend {name} --since TIME"}},
                )
            else:
                text = "a backend was left out for a while; what was recorded meanwhile is delivered to it"
                _LOG.warning(text, extra={"facts": facts})

    def _places(self) -> list[Place]:
        """Where each spool ends, and how many records were ever put in it: both of one moment."""
        found = []
        for instance in self.reader.instances():
            while True:
                last = self.reader.last_seq(instance)
                recorded = self.reader.totals(instance).recorded
                if self.reader.last_seq(instance) == last:
                    break
            found.append(Place(instance, last, recorded))
        return found


async def _once(work: Callable[_P, Coroutine[Any, Any, None]], *args: _P.args, **kwargs: _P.kwargs) -> None:
    """What is done at a start, or when the clock was set. A mistake of ours in it stops no backend: it is told, and the
    next start does it."""
    try:
        await work(*args, **kwargs)
    except Exception:  # noqa: BLE001 - it is told
        _LOG.exception("something beside delivery was not done; the next start does it")


def _is_mapped(backend: Backend, row: Parked) -> bool:
    """Whether the backend's encoder knows now who pays for the record of a parked event."""
    try:
        record = Record.from_json(row.line)
        return backend.encode([record]).parked.get(record.id) != NO_CUSTOMER
    except ValueError:
        return False  # a line that is damaged: what is to be done with it is said where it is redriven by name
