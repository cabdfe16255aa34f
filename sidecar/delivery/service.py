"""The owner of the lanes: opens them in order, watches the clock, and lets an operator look in and mend.

What must always hold: every configured backend has a lane of its own; a lane that dies takes the owner down with
it instead of leaving a sidecar that no longer bills; what a removed backend had still to get is parked. The
state file is opened by the caller and belongs to this object while it runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

from sidecar.delivery.copied import may_double
from sidecar.delivery.dedup_window import ClockWatch
from sidecar.delivery.limits import Limits
from sidecar.delivery.outcomes import EACH_MAX, Became, OneOutcome, Redriven
from sidecar.delivery.ports import Clock, Metrics, SpoolReader, SystemClock, read_clock
from sidecar.delivery.removed_backend import part_with, take_back
from sidecar.delivery.state import DeliveryState, StateError
from sidecar.delivery.state.accounts import PAGE, Accounts, Found, totals_of
from sidecar.delivery.state.cursors import Configured
from sidecar.delivery.state.rows import Parked, Place
from sidecar.delivery.telling import ParkingLog, Told
from sidecar.delivery.types import BEFORE, GAP, RETIRED, Ended, LaneStatus, Now
from sidecar.delivery.worker import Lane
from sidecar.model.balance import BackendTotals
from sidecar.model.delivery import Backend

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class Delivery:
    """Delivers what is in the spool to every backend. Open it before calls are let in."""

    def __init__(
        self,
        *,
        reader: SpoolReader,
        state: DeliveryState,
        backends: Sequence[Backend],
        metrics: Metrics,
        clock: Clock | None = None,
        chance: random.Random | None = None,
        limits: Limits | None = None,
        skip_gaps: bool = False,
        copied_s: float | None = None,
        copied_text: str = "",
        safe: Collection[str] = (),
    ) -> None:
        """`skip_gaps`: a backend that was left out does not get what was recorded meanwhile.

        `copied_s`: the files were copied, about then, and nobody has decided yet what they are (`adopt`).
        `safe`: backends whose own books were copied together with ours.
        """
        self._skip_gaps = skip_gaps
        self._parking_log = ParkingLog()
        self.reader, self.state, self.metrics = reader, state, metrics
        self.limits = limits or Limits()
        self.chance = chance or random.Random()  # noqa: S311 - jitter, no secret
        self._clock = clock or SystemClock()
        self._copied_s, self._copied_text, self._safe = copied_s, copied_text, frozenset(safe)
        self._watch = ClockWatch(read_clock(self._clock))
        self._lanes = {backend.name: Lane(backend, self) for backend in backends}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="delivery-state")
        self._accounts = Accounts(state.path)
        self._group = asyncio.TaskGroup()
        self._running = False
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Delivery: {', '.join(map(repr, self._lanes.values())) or 'no backends'}>"

    # --- running ----------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        """Find where every backend is, settle with the removed ones, start the lanes."""
        try:
            await self._check_clock()
            places = await asyncio.to_thread(self._places)
            names, now = list(self._lanes), self.look()[0]
            configure = functools.partial(
                self.state.configure, names, places, now.wall_s, count=self.reader.count, skip_gaps=self._skip_gaps
            )
            found = await self.in_state(configure)
            self._say(found)
            starts = [
                await self.in_state(lambda n=name: (self.state.cursors(n), self.state.open_requests(n)))  # type: ignore[misc]
                for name in names
            ]
        except BaseException:
            self._executor.shutdown()
            self._accounts.close()
            raise
        await self._group.__aenter__()
        self._running = True
        for lane, (cursors, requests) in zip(self._lanes.values(), starts, strict=True):
            self._start(lane.run(cursors, requests))
        self._start(self._tick())
        for name, lane in self._lanes.items() if not self._skip_gaps else ():
            self._start(take_back(name, lane, self))
        for name in sorted(found.gone):
            self._start(part_with(name, self, {place.instance: place.last_seq for place in places}))
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
            await asyncio.to_thread(self._executor.shutdown)
            await asyncio.to_thread(self._accounts.close)

    def wake(self) -> None:
        """Records were committed."""
        for lane in self._lanes.values():
            lane.wake()

    async def drain(self, timeout_s: float) -> None:
        """One last pass: deliver what can be delivered in this time, without waiting for batches to fill."""
        for lane in self._lanes.values():
            lane.draining = True
            lane.wake()
        try:
            async with asyncio.timeout(timeout_s):
                for lane in self._lanes.values():
                    await lane.idle.wait()
        except TimeoutError:
            _LOG.warning("stopping with deliveries undone; the next start goes on with them", extra={"facts": {}})
        finally:
            for lane in self._lanes.values():
                lane.draining = False

    # --- looking in -------------------------------------------------------------------------------

    def status(self) -> list[LaneStatus]:
        """How each backend does."""
        return [lane.status() for lane in self._lanes.values()]

    def totals(self, upto: Mapping[str, int]) -> dict[str, BackendTotals]:
        """Each backend's side of the balance, counted up to these numbers. Blocks."""
        sums = self._accounts.sums(list(self._lanes), upto)
        return {name: totals_of(one, self.reader.count) for name, one in sums.items()}

    def verify(self) -> list[str]:
        """Recount everything from rows; every difference in words. Blocks."""
        return self._accounts.verify() + self._accounts.ahead_of(self.reader)

    def retired_upto(self) -> dict[str, int]:
        """For each instance the number up to which no backend needs its spool any more. Blocks."""
        upto = {instance: self.reader.last_seq(instance) for instance in self.reader.instances()}
        for name in self._lanes:
            known = self._accounts.cursors(name)
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
        return self._accounts.parked(backend=backend, reason=reason, ids=ids, since_s=since_s, after=after, limit=limit)

    def parked_now(self) -> dict[tuple[str, str], int]:
        """Records parked by backend and reason, those of backends that are left out included. Blocks."""
        return self._accounts.parked_now()

    def find(self, one: str) -> list[Found]:
        """Where an event or record with this id went, as long as it is remembered (`forget`). Blocks."""
        return self._accounts.find(one)

    # --- mending ----------------------------------------------------------------------------------

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
            for name, lane in self._lanes.items():
                if backend in (None, name):
                    told.unskipped += await lane.redrive_before(since_s)
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
        last, after = await asyncio.to_thread(self._accounts.last_parked), 0
        while True:
            look = functools.partial(self.parked, backend=backend, reason=reason, ids=ids, since_s=since_s, after=after)
            read = await asyncio.to_thread(look)
            page = [row for row in read if row.id <= last]
            for row in page if ids is not None else ():
                told.seen.update((row.record_id, row.event_id))
            for name in dict.fromkeys(row.backend for row in page):
                rows = [row for row in page if row.backend == name]
                if name in self._lanes:
                    await self._lanes[name].redrive(rows, told, resend_unknown=resend_unknown)
                    continue
                for row in rows:
                    told.add(
                        OneOutcome(
                            backend=name, event_id=row.event_id, record_id=row.record_id,
                            became=Became.NOT_CONFIGURED, reason=row.reason,
                        )
                    )  # fmt: skip
            if len(page) < PAGE:
                return
            after = page[-1].id

    def _whereabouts(self, one: str) -> str:
        """What is known of an id that is not among the parked events that were chosen. Blocks."""
        parked = self.parked(ids=[one], limit=1)
        if parked:
            return f"parked at {parked[0].backend} as {parked[0].reason}, so not among those chosen"
        found = [each for each in self.find(one) if each.fate != "moved"]
        return f"{'pending' if found[-1].fate == 'open' else found[-1].fate} at {found[-1].backend}" if found else ""

    def end_waits(self, backend: str) -> Ended:
        """Offer a backend what waits for it now. Raises `KeyError` for one that is not configured."""
        return self._lanes[backend].end_waits()

    async def adopt(self, leave: Mapping[str, int] | None) -> dict[str, int]:
        """The operator has decided. `leave`: spools whose pending records are another's; how many were parked."""
        counts: dict[str, int] = {}
        if leave is not None:
            for name, lane in self._lanes.items():
                if name not in self._safe:
                    counts[name] = await lane.leave(leave)
        self._copied_s = None
        for lane in self._lanes.values():
            lane.wake()
        return counts

    async def forget(self, upto: Mapping[str, int]) -> None:
        """Let go of what is remembered of settled records up to these numbers: their chunks are gone."""
        for instance, seq in upto.items():
            more = True
            while more:
                more = await self.in_state(functools.partial(self.state.fold, instance, seq))

    # --- for the lanes ----------------------------------------------------------------------------

    async def in_state(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._start(work)

    def parked_some(self, backend: str, reason: str, records: int) -> None:
        self.metrics.parked(backend, reason, records)
        told = self._parking_log.parked(backend, reason, records, self.look()[0].mono_s)
        if told is not None:
            _tell(told)

    def held(self, backend: Backend) -> str | None:
        if self._copied_s is None or backend.name in self._safe:
            return None
        now_s, margin_s = self._clock.wall_s(), self.limits.window_margin_s
        unsure = may_double(backend.abilities, copied_s=self._copied_s, now_s=now_s, margin_s=margin_s)
        return self._copied_text if unsure else None

    def look(self) -> tuple[Now, bool]:
        now = read_clock(self._clock)
        self._watch, stepped = self._watch.look(now, self.limits)
        if stepped:
            _LOG.warning("the wall clock was set; what may have been taken is not sent again")
            for lane in self._lanes.values():
                lane.clock_stepped()
            if self._running:
                self._start(self._expire())
        return now, stepped

    # --- inside -----------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._group.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _expire(self) -> None:
        """For a crash before the lanes store it themselves."""
        try:
            await self.in_state(self.state.expire_risks)
        except StateError as error:
            _LOG.error("a step of the clock could not be stored: %s", error)

    async def _check_clock(self) -> None:
        """A wall clock that went back while we were away makes every window's age a guess."""
        now = read_clock(self._clock)
        before = await self.in_state(lambda: self.state.saw_clock(now.wall_s))
        if before is not None and now.wall_s < before:
            expired = await self.in_state(self.state.expire_risks)
            _LOG.warning(
                "the wall clock is behind where the last run left it; what may have been taken is not sent again",
                extra={"facts": {"seconds": round(before - now.wall_s, 1), "requests": expired}},
            )

    async def _tick(self) -> None:
        """Keep the wall clock's reading, so that a start can tell whether it went back."""
        while True:
            await asyncio.sleep(self.limits.sweep_s)
            now, _ = self.look()
            for told in self._parking_log.due(now.mono_s):
                _tell(told)
            with contextlib.suppress(StateError):  # the lanes tell
                await self.in_state(functools.partial(self.state.saw_clock, now.wall_s))

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


def _tell(told: Told) -> None:
    facts = {"backend": told.backend, "reason": told.reason, "records": told.records}
    text = "records are parked: see `metering-sidecar spool parked`"
    _LOG.warning(text if told.first else "more records were parked since this was last said", extra={"facts": facts})
