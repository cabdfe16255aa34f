"""One backend's way: its cursors, its window of sealed requests, its retries, its pace.

What must always hold: a request is offered only after the transaction that stored it, or that stored the
beginning of this attempt, is on disk; its verdict is forgotten here only after it is on disk there. Lanes
share nothing but the file and its thread, so one that is stuck holds no other up; inside a lane a
stuck request waits in a set of its own while fresh ones go by.

Everything that decides is in `retry`, `window` and `pace`; this file reads the spool, waits, sends and stores. One task
runs a lane turn by turn; each attempt under way is a task of its own that only leaves its result here.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from sidecar.delivery import redriving, sealing
from sidecar.delivery.offering import ask
from sidecar.delivery.owner import Owner
from sidecar.delivery.pace import Pace, next_pace, suspect
from sidecar.delivery.retry import Attempt, judge
from sidecar.delivery.settling import Settling
from sidecar.delivery.sources import Source, Sources
from sidecar.delivery.state import StateError, StateFull
from sidecar.delivery.state.requests import opened
from sidecar.delivery.state.rows import Cursor, Parked, Request, Sealing, Settlement
from sidecar.delivery.waiting import Waiting
from sidecar.delivery.window import window_left_s
from sidecar.delivery.words import MISSING, Now
from sidecar.spool.words import SpoolError
from sidecar.verdict import Backend, Dedup, Unknown, Verdict

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

FULL_RETRY_S = 1.0  # how often a full disk is asked again whether a verdict fits
TROUBLE_RETRY_S = 1.0  # how soon a file that failed is opened again
SWEEP_SLICE = 200  # requests looked at before the event loop is let go


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneStatus:
    """How one backend does, for `/readyz` and metrics."""

    backend: str
    state: str  # up, down, blocked
    reason: str | None
    oldest_pending_s: float | None  # age of the oldest record that is not settled
    sealed: int  # requests stored and not settled
    under_way: int
    waiting_records: int  # sealed and due for another attempt later
    waiting_bytes: int


@dataclass(slots=True)
class _Result:
    request: Request
    verdicts: Sequence[Verdict]
    started: Now
    interrupted: bool = False
    counted: bool = False  # judged before, by a turn that could not be stored


@dataclass(frozen=True, slots=True)
class _Planned:
    """Records that are about to be sealed."""

    source: Source
    plan: sealing.Plan
    step: Sealing


class Lane:
    """Runs one backend. `wake` when records were committed; `status` at any time."""

    def __init__(self, backend: Backend, owner: Owner) -> None:
        self.backend = backend
        self._owner, self._limits = owner, owner.limits
        self._pace = Pace()
        self._sources = self._new_sources()
        self._waiting = Waiting(one_per_subject=backend.abilities.one_per_subject)
        self._settling = Settling(backend, owner.limits, self._lines)
        self._under_way: dict[int, Request] = {}
        self._results: list[_Result] = []
        self._in_hand: list[_Result] = []  # taken from there, and not stored yet
        self._trouble: str | None = None  # why nothing can be read or stored
        self._bell = asyncio.Event()
        self.idle = asyncio.Event()  # nothing can be done before something happens
        self.draining = False
        self._fresh_next = self._want_fresh = False
        self._next_sweep_s = 0.0
        self._per_record = 1.0  # requests that a record gives
        self._expired = False

    def __repr__(self) -> str:
        return (
            f"<Lane {self.backend.name}: {self._waiting.queued} ready, {len(self._under_way)} under way,"
            f" {self._waiting.later} waiting, {self.status().state}>"
        )

    def wake(self) -> None:
        """Records were committed, or something changed that this lane should look at."""
        self._sources.wake()
        self._ring()

    def clock_stepped(self) -> None:
        """The wall clock jumped: what may have been taken is not recognised for sure any more."""
        self._expired = True
        self._ring()

    def status(self) -> LaneStatus:
        now, _ = self._owner.look()
        requests = list(self._open())
        oldest = min((request.oldest_s for request in requests), default=None)
        pace = self._pace
        full = self._set_is_full()
        reason = pace.blocked or self._trouble
        if reason is None and full:
            reason = "retry_set_full"
        return LaneStatus(
            backend=self.backend.name,
            state="blocked" if pace.blocked is not None else "down" if pace.slow or full or self._trouble else "up",
            reason=reason,
            oldest_pending_s=None if oldest is None else max(now.wall_s - oldest, 0.0),
            sealed=len(requests),
            under_way=len(self._under_way),
            waiting_records=self._waiting.later_records,
            waiting_bytes=self._waiting.later_bytes,
        )

    async def run(self, cursors: Sequence[Cursor], requests: Sequence[Request]) -> None:
        """Go on where the last run stopped: what is sealed comes first, byte for byte.

        A file that cannot be read or written stops this lane until it can; anything else that goes wrong is a
        mistake of ours and ends it.
        """
        self._take_up(cursors, requests)
        while True:
            try:
                if not await self._turn():
                    await self._rest()
                self._trouble = None
            except (StateError, SpoolError, OSError) as error:
                await self._start_over(error)

    def _take_up(self, cursors: Sequence[Cursor], requests: Sequence[Request]) -> None:
        """Believe what is on disk. What this run still knows of attempts under way is not forgotten."""
        results = {result.request.id: result for result in (*self._in_hand, *self._results)}
        self._in_hand, self._results = [], []
        self._sources = self._new_sources()
        self._waiting = Waiting(one_per_subject=self.backend.abilities.one_per_subject)
        for cursor in cursors:
            self._sources.add(cursor)
        for request in self._under_way.values():
            self._waiting.call(request.subject)
        now = self._now()
        for request in requests:
            if request.id in self._under_way:
                continue
            if request.under_way and request.id in results:
                self._results.append(replace(results[request.id], request=request))
            elif request.under_way:
                self._interrupted(request, now)
            else:
                wait_s = min(max(request.due_s - now.wall_s, 0.0), self._limits.backoff_cap_s)
                self._waiting.put_later(request, now.mono_s + wait_s)

    async def _start_over(self, error: Exception) -> None:
        """Nothing that was not confirmed is believed: wait, open the file again, and read what it says."""
        state, name = self._owner.state, self.backend.name
        while True:
            if self._trouble != str(error):
                self._trouble = str(error)
                self._log(logging.ERROR, f"delivery waits: {error}")
            await asyncio.sleep(TROUBLE_RETRY_S)
            try:
                await self._owner.in_state(state.reopen)
                cursors = await self._owner.in_state(lambda: state.cursors(name))
                requests = await self._owner.in_state(lambda: state.open_requests(name))
            except StateError as again:
                error = again
            else:
                self._take_up(cursors, requests)
                return

    # --- one turn ---------------------------------------------------------------------------------

    async def _turn(self) -> bool:
        """Settle what came back, offer what is due, seal what is new. Returns whether anything was done."""
        now = self._now()
        if self._expired:
            self._expire()
        results, self._results = self._results, []
        self._in_hand = results
        settlements = [await self._judge(result, now) for result in results]
        if now.mono_s >= self._next_sweep_s:
            self._next_sweep_s = now.mono_s + self._limits.sweep_s
            settlements += await self._sweep(now)
        begin = await self._choose(now, settlements)
        planned = await self._plan(now, len(begin))
        if not (settlements or begin or planned):
            return bool(self._results)
        await self._store(settlements, begin, planned)
        self._in_hand = []
        return True

    async def _store(self, settlements: list[Settlement], begin: list[Request], planned: _Planned | None) -> None:
        """One transaction: what was said, what is offered again, what is sealed. Then the offers go out."""
        state, now = self._owner.state, self._now()
        ids = [request.id for request in begin]
        load = [request.id for request in begin if request.sealed is None]
        sealing_step = None if planned is None else planned.step
        turned = await self._blocking(lambda: state.turn(settlements, ids, load, now.wall_s, sealing_step))
        for settlement, children in zip(settlements, turned.children, strict=True):
            self._settled(settlement, children, now)
        for request in begin:
            request.sealed = turned.loaded.get(request.id, request.sealed)
            request.tries = replace(request.tries, attempts=request.tries.attempts + 1)
            self._send(request, now)
        if planned is not None:
            self._sealed(planned, turned.sealed, now)

    def _settled(self, settlement: Settlement, children: Sequence[int], now: Now) -> None:
        request, decision = settlement.request, settlement.decision
        if decision.open:
            request.tries, request.history, request.due_s = decision.tries, settlement.history, settlement.due_s
            request.under_way, request.held = False, decision.held
            self._waiting.put_later(request, now.mono_s + decision.wait_s)
            return
        for id_, child in zip(children, settlement.children, strict=True):
            self._waiting.put_later(opened(id_, request.cursor, child), now.mono_s + decision.wait_s)
        reasons: dict[str, set[int]] = {}
        for index, parking in decision.parked.items():
            reasons.setdefault(parking.reason, set()).add(request.members[index].seq)
        for reason, seqs in reasons.items():
            self._owner.metrics.parked(self.backend.name, reason, len(seqs))

    # --- redrive ----------------------------------------------------------------------------------

    async def redrive(self, rows: Sequence[Parked], *, resend_unknown: bool) -> int:
        """Let parked events of this backend go again, as far as the set of what waits has room. Returns how many."""
        count = 0
        for cursor in dict.fromkeys(row.cursor for row in rows):
            mine = [row for row in rows if row.cursor == cursor]
            for step in await redriving.steps(self.backend, cursor, mine, self._owner, resend_unknown=resend_unknown):
                if self._set_is_full():
                    break
                now = self._now()
                ids = await self._blocking(lambda s=step, n=now: self._owner.state.redrive(s, n.wall_s))  # type: ignore[misc]
                for id_, request in zip(ids, step.requests, strict=True):
                    self._waiting.put_later(opened(id_, cursor, request), now.mono_s)
                count += len(step.parked)
        self._ring()
        return count

    async def redrive_before(self, since_s: float) -> int:
        """Let records go that were made before this backend was first configured, from a time on. Returns how many."""
        count = 0
        async for step in redriving.before(self.backend, since_s, self._owner):
            if self._set_is_full():
                break
            now = self._now()
            ids = await self._blocking(lambda s=step, n=now: self._owner.state.unskip(s, n.wall_s))  # type: ignore[misc]
            for id_, request in zip(ids, step.requests, strict=True):
                self._waiting.put_later(opened(id_, step.cursor, request), now.mono_s)
            count += step.records
        self._ring()
        return count

    # --- verdicts ---------------------------------------------------------------------------------

    async def _judge(self, result: _Result, now: Now) -> Settlement:
        request, limits = result.request, self._limits
        verdicts: Sequence[Verdict] = result.verdicts
        if not (result.interrupted or result.counted):
            result.verdicts = verdicts = suspect(self._pace, verdicts, limits)
            result.counted = True
            self._set_pace(next_pace(self._pace, verdicts, now, self._roll(), limits))
            self._owner.metrics.batch_settled(self.backend.name, verdicts, now.mono_s - result.started.mono_s)
        attempt = Attempt(
            verdicts=verdicts,
            records=[member.seq for member in request.members],
            started=result.started,
            ended=now,
            roll=self._roll(),
            stepped=request.stepped,
        )
        decision = judge(attempt, request.tries, self.backend.abilities, limits)
        if result.interrupted:
            decision = replace(decision, wait_s=0.0)
        return await self._settling.settle(request, decision, verdicts, now)

    async def _sweep(self, now: Now) -> list[Settlement]:
        """Look at everything that waits: windows and ages run on while nothing is offered."""
        settlements = []
        for count, request in enumerate(list(self._waiting), 1):
            if count % SWEEP_SLICE == 0:
                await asyncio.sleep(0)
            left_s = window_left_s(request.tries, self.backend.abilities, now, self._limits)
            if left_s is not None and 0 < left_s < self._limits.window_warning_s and not request.warned:
                request.warned = True
                self._log(
                    logging.WARNING,
                    "requests that may have been taken will be parked when the backend stops recognising them",
                    request=request.key,
                    left_s=round(left_s),
                )
            settlement = await self._settling.overdue(request, now)
            if settlement is not None:
                settlements.append(settlement)
        if settlements:
            self._waiting.drop({settlement.request.id for settlement in settlements})
        return settlements

    def _interrupted(self, request: Request, now: Now) -> None:
        """The last run ended during this attempt: it may have been taken, at its start at the earliest."""
        tries = request.tries
        if tries.risk_wall_s is None:
            request.tries = replace(tries, risk_wall_s=request.started_s)
        verdicts = [Unknown("interrupted")] * len(request.members)
        self._results.append(_Result(request, verdicts, now, interrupted=True))

    def _expire(self) -> None:
        self._expired = False
        for request in self._open():
            request.stepped = request.under_way
            if request.tries.risky:
                request.tries = replace(request.tries, expired=True)
        self._next_sweep_s = 0.0

    def _set_pace(self, pace: Pace) -> None:
        before, self._pace = self._pace, pace
        if pace.blocked != before.blocked:
            self._owner.metrics.blocked(self.backend.name, pace.blocked)
            if pace.blocked is not None:
                self._log(
                    logging.ERROR,
                    "a backend takes nothing until somebody acts; everything is kept for it",
                    reason=pace.blocked,
                    refusal=pace.refusal or None,
                )
        if pace.slow and not before.slow and pace.blocked is None:
            self._log(logging.WARNING, "a backend is down; it is asked again from time to time")
        if before.slow and not pace.slow:
            self._log(logging.INFO, "a backend takes records again")
            self._waiting.hurry(self._now().mono_s)

    # --- sending ----------------------------------------------------------------------------------

    async def _choose(self, now: Now, settlements: list[Settlement]) -> list[Request]:
        """Which requests to offer now: those due again first, then those never offered; oldest first."""
        allowed = self._pace.allowed(now, len(self._under_way), self.backend.abilities.concurrency)
        fresh_first = False
        if self._pace.slow and allowed:
            fresh_first, self._fresh_next = self._fresh_next, not self._fresh_next
            self._want_fresh = fresh_first and not self._waiting.fresh
        chosen: list[Request] = []
        while len(chosen) < allowed and not self._want_fresh:
            request = self._waiting.take(now.mono_s, fresh_first=fresh_first)
            if request is None:
                break
            overdue = await self._settling.overdue(request, now)
            if overdue is not None:
                settlements.append(overdue)
                self._waiting.called(request.subject)
                continue
            chosen.append(request)
        return chosen

    def _set_is_full(self) -> bool:
        limits = self._limits
        return self._waiting.later_records >= limits.retry_records or self._waiting.later_bytes >= limits.retry_bytes

    def _send(self, request: Request, now: Now) -> None:
        request.under_way, request.stepped = True, False
        request.started_s = now.wall_s
        self._under_way[request.id] = request
        self._owner.spawn(self._offer(request, now))

    async def _offer(self, request: Request, started: Now) -> None:
        assert request.sealed is not None
        sealed, attempt = request.sealed, request.tries.attempts
        sealed = sealed if attempt == sealed.attempt else replace(sealed, attempt=attempt)
        verdicts = await ask(self.backend, sealed, self._limits)
        self._under_way.pop(request.id, None)
        self._waiting.called(request.subject)
        self._results.append(_Result(request, verdicts, started))
        self._ring()

    # --- sealing ----------------------------------------------------------------------------------

    async def _plan(self, now: Now, begun: int) -> _Planned | None:
        """Decide on the next records of one spool, as far as the window has room."""
        want_fresh, self._want_fresh = self._want_fresh, False
        busy = len(self._under_way) + begun
        free = self._pace.allowed(now, busy, self.backend.abilities.concurrency)
        room = self._room(free, busy, want_fresh)
        if room <= 0:
            return None
        source = await self._sources.next(self._wanted(room), now.mono_s, hurry=self.draining)
        if source is None:
            return None
        items = list(itertools.islice(source.items, self._wanted(room)))
        plan = await sealing.plan(
            self.backend, items, room=room, again_upto=source.again_upto, now_s=now.wall_s, limits=self._limits
        )
        free -= self._waiting.queued
        at_once: set[int] = set()
        for index, new in enumerate(plan.requests):
            if len(at_once) < free and new.due_s <= now.wall_s and self._waiting.call(new.sealed.subject):
                at_once.add(index)
        step = Sealing(
            cursor=source.cursor,
            from_seq=source.seq,
            to_seq=plan.upto_seq,
            requests=plan.requests,
            at_once=at_once,
            skipped=plan.skipped,
            parked=plan.parked,
            holes=plan.holes,
        )
        return _Planned(source, plan, step)

    def _sealed(self, planned: _Planned, ids: Sequence[int], now: Now) -> None:
        planned.source.move(planned.plan.taken, planned.plan.upto_seq)
        for index, (id_, new) in enumerate(zip(ids, planned.plan.requests, strict=True)):
            request = opened(id_, planned.step.cursor, new)
            if index in planned.step.at_once:
                request.tries = replace(request.tries, attempts=request.tries.attempts + 1)
                self._send(request, now)
            elif new.due_s > now.wall_s:
                self._waiting.put_later(request, now.mono_s + new.due_s - now.wall_s)
            else:
                self._waiting.fresh.append(request)
        self._count_sealed(planned.plan)

    def _count_sealed(self, plan: sealing.Plan) -> None:
        metrics, name = self._owner.metrics, self.backend.name
        events = sum(len(request.members) for request in plan.requests)
        if events:
            metrics.sealed(name, events)
        for reason, seqs in plan.skipped.items():
            metrics.skipped(name, reason, len(seqs))
        missing = sum(hole.records for hole in plan.holes)
        if missing:
            metrics.skipped(name, MISSING, missing)
            self._log(logging.ERROR, "records were lost with a damaged spool file", records=missing)
        for reason, count in Counter(parked.reason for parked in plan.parked).items():
            metrics.parked(name, reason, count)
        if plan.requests and plan.taken:
            # Learned from the last ones: how many requests a record gives (one for each meter, say).
            self._per_record = max(len(plan.requests) / plan.taken, 0.01)

    def _room(self, free: int, busy: int, want_fresh: bool) -> int:
        """How many requests may be sealed now."""
        if self._set_is_full():
            return 0
        if self._pace.slow:
            return 1 if want_fresh and free else 0
        if self.backend.abilities.dedup is Dedup.NONE:
            # What is sealed and not answered is unknown after a crash: no more than is under way.
            return max(free - self._waiting.queued, 0)
        return max(self._limits.window_requests - self._waiting.queued - busy, 0)

    def _wanted(self, room: int) -> int:
        """How many records to take for so many requests: a slice of the event loop at most."""
        most = self._limits.encode_records
        if self.backend.abilities.events_max > 1:
            return most
        return max(1, min(most, int(room / self._per_record)))

    def _new_sources(self) -> Sources:
        limits = self._limits
        gap_s = limits.linger_s if self.backend.abilities.events_max > 1 else limits.gather_s
        return Sources(self._owner.reader, self._start_cursor, read_bytes=limits.read_bytes, gap_s=gap_s)

    async def _lines(self, request: int) -> list[bytes]:
        state = self._owner.state
        return await self._blocking(lambda: state.lines(request))

    async def _start_cursor(self, instance: str) -> Cursor:
        state, name = self._owner.state, self.backend.name
        return await self._blocking(lambda: state.start_cursor(name, instance))

    # --- waiting ----------------------------------------------------------------------------------

    async def _rest(self) -> None:
        """Wait for the bell, or for the next thing that is due."""
        if self._quiet():
            self.idle.set()
        now = self._now()
        try:
            async with asyncio.timeout(max(self._due_s(now) - now.mono_s, 0.0)):
                await self._bell.wait()
        except TimeoutError:
            pass
        self._bell.clear()

    def _due_s(self, now: Now) -> float:
        """The monotonic time of the next look."""
        times = [self._next_sweep_s]
        if self._pace.slow:
            times.append(max(self._pace.not_before_s, now.mono_s) if not self._under_way else self._next_sweep_s)
        elif self._waiting.next_due_s is not None and len(self._under_way) < self.backend.abilities.concurrency:
            times.append(self._waiting.next_due_s)
        look_s = self._sources.next_look_s
        if look_s is not None and not self._waits_for_room():
            times.append(look_s)
        return min(times)

    def _waits_for_room(self) -> bool:
        """Whether records could not be sealed even if there were some: something else has to happen first."""
        now, busy = self._now(), len(self._under_way)
        free = self._pace.allowed(now, busy, self.backend.abilities.concurrency)
        return self._pace.slow or self._room(free, busy, want_fresh=False) == 0

    def _quiet(self) -> bool:
        """Whether nothing is under way and nothing more could be started now."""
        if self._under_way or self._results or self._bell.is_set():
            return False
        if self._pace.slow or self._set_is_full():
            return True
        return not (self._waiting.queued or self._sources.unread)

    def _open(self) -> Iterator[Request]:
        yield from self._under_way.values()
        yield from (result.request for result in self._results)
        yield from self._waiting

    async def _blocking(self, work: Callable[[], _T]) -> _T:
        """Do something with `delivery.db`. A full disk is waited for: nothing goes on until the step is stored."""
        told = False
        while True:
            try:
                return await self._owner.in_state(work)
            except StateFull as error:
                if not told:
                    self._log(logging.ERROR, str(error))
                told = True
                await asyncio.sleep(FULL_RETRY_S)

    def _now(self) -> Now:
        now, stepped = self._owner.look()
        if stepped:
            self._expired = True
        return now

    def _roll(self) -> float:
        return self._owner.chance.random()

    def _ring(self) -> None:
        self.idle.clear()
        self._bell.set()

    def _log(self, level: int, text: str, **facts: object) -> None:
        _LOG.log(level, text, extra={"facts": {"backend": self.backend.name, **facts}})
