"""One backend's way, turn by turn: settle what came back, offer what is due, seal what is new, rest.

What must always hold: a request is offered only after the transaction that stored it, or that stored the
beginning of this attempt, is on disk; its verdict is forgotten only after it is on disk there. Lanes
share nothing but the file and its thread, so one that is stuck holds no other up; inside a lane a
stuck request waits in a set of its own while fresh ones go by.

Each part of the way is an object that the lane asks: `Supply` for new records, `Waiting` for sealed requests,
`Offering` for attempts, `Pacing` for how many there may be, `Settling` for what is stored of them, `Storing` to store
it. What is left here is the order of things, the room there is, and the waiting: for the bell, for a time, for a
file that cannot be used.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from sidecar.delivery import redrive, removed_backend
from sidecar.delivery.copied import COPIED
from sidecar.delivery.offering import Answer, Offering
from sidecar.delivery.outcomes import Became, Redriven
from sidecar.delivery.owner import Owner
from sidecar.delivery.pacing import Pacing
from sidecar.delivery.queue import Waiting
from sidecar.delivery.settling import Settling
from sidecar.delivery.state import StateError
from sidecar.delivery.state.requests import opened
from sidecar.delivery.state.rows import Cursor, NewParked, NewRequest, Parked, Redrive, Request, Settlement
from sidecar.delivery.storing import Storing
from sidecar.delivery.supply import Planned, Supply
from sidecar.delivery.types import Ended, LaneStatus, Now
from sidecar.model.delivery import Backend, Dedup
from sidecar.spool.types import SpoolError

_LOG = logging.getLogger(__name__)

TROUBLE_RETRY_S = 1.0  # how soon a file that failed is opened again


class Lane:
    """Runs one backend. `wake` when records were committed; `status` at any time."""

    def __init__(self, backend: Backend, owner: Owner) -> None:
        self.backend = backend
        self._owner, self._limits = owner, owner.limits
        self._pacing = Pacing(backend, owner.metrics, owner.limits)
        self._storing = Storing(backend.name, owner)
        self._supply = Supply(backend, owner, self._storing.start_cursor)
        self._waiting = self._nothing_waits()
        self._offering = Offering(backend, owner, self._answered)
        self._settling = Settling(backend, owner.limits, self._storing.lines)
        self._trouble: str | None = None  # why nothing can be read or stored
        self._bell = asyncio.Event()
        self.idle = asyncio.Event()  # nothing can be done before something happens
        self.draining = False
        self._fresh_next = self._want_fresh = False
        self._next_sweep_s = 0.0
        self._expired = False
        self._leaving: tuple[Mapping[str, int], asyncio.Future[int]] | None = None

    def __repr__(self) -> str:
        return (
            f"<Lane {self.backend.name}: {self._waiting.queued} ready, {len(self._offering.under_way)} under way,"
            f" {self._waiting.later} waiting, {self.status().state}>"
        )

    def wake(self) -> None:
        """Records were committed, or something changed that this lane should look at."""
        self._supply.wake()
        self._ring()

    def clock_stepped(self) -> None:
        """The wall clock jumped: what may have been taken is not recognised for sure any more."""
        self._expired = True
        self._ring()

    def status(self) -> LaneStatus:
        now, _ = self._owner.look()
        requests = list(self._open())
        oldest = min((request.oldest_s for request in requests), default=None)
        pacing, full = self._pacing, self._waiting.full
        paused_s, held = pacing.paused_s(now), self._owner.held(self.backend)
        reason = held or pacing.blocked or self._trouble or pacing.failing
        if reason is None and full:
            reason = "retry_set_full"
        if held is not None or pacing.blocked is not None:
            state = "blocked"
        elif paused_s and self._trouble is None:
            state = "paused"
            command = f"metering-sidecar spool retry --backend {self.backend.name}"
            reason = f"it asked to be left alone, {paused_s:.0f} s are left (`{command}` ends it)"
        else:
            state = "down" if pacing.slow or full or self._trouble else "up"
        return LaneStatus(
            backend=self.backend.name,
            state=state,
            reason=reason,
            oldest_pending_s=None if oldest is None else max(now.wall_s - oldest, 0.0),
            sealed=len(requests),
            under_way=len(self._offering.under_way),
            waiting_records=self._waiting.later_records,
            waiting_bytes=self._waiting.later_bytes,
            paused_s=paused_s,
        )

    async def run(self, cursors: Sequence[Cursor], requests: Sequence[Request]) -> None:
        """Go on where the last run stopped: what is sealed comes first, byte for byte.

        A file that cannot be read or written stops this lane until it can; anything else that goes wrong is a
        mistake of ours and ends it.
        """
        self._take_up(cursors, requests)
        # How long the last run meant to wait says nothing of the backend now: the first answers tell.
        self._waiting.hurry(self._now(), held_too=True)
        while True:
            try:
                if self._leaving is not None:
                    await self._leave()
                if not await self._turn():
                    await self._rest()
                self._trouble = None
            except (StateError, SpoolError, OSError) as error:
                await self._start_over(error)

    def _take_up(self, cursors: Sequence[Cursor], requests: Sequence[Request]) -> None:
        """Believe what is on disk. What this run still knows of attempts under way is not forgotten."""
        now = self._now()
        self._supply.take_up(cursors)
        self._waiting = self._nothing_waits()
        for request in self._offering.under_way:
            self._waiting.call(request.subject)
        for request in self._offering.take_up(requests, now):
            wait_s = min(max(request.due_s - now.wall_s, 0.0), self._limits.backoff_cap_s)
            self._waiting.put_later(request, now.mono_s + wait_s)

    async def _start_over(self, error: Exception) -> None:
        """Nothing that was not confirmed is believed: wait, open the file again, and read what it says."""
        while True:
            if self._trouble != str(error):
                self._trouble = str(error)
                self._error(f"delivery waits: {error}")
            await asyncio.sleep(TROUBLE_RETRY_S)
            try:
                cursors, requests = await self._storing.open_again()
            except StateError as again:
                error = again
            else:
                self._take_up(cursors, requests)
                return

    async def leave(self, ends: Mapping[str, int]) -> int:
        """Park what is pending of these spools, as soon as nothing is under way. Returns how many records."""
        self._leaving = ends, asyncio.get_running_loop().create_future()
        self._ring()
        return await self._leaving[1]

    async def _leave(self) -> None:
        assert self._leaving is not None
        if self._offering.under_way or self._offering.has_answers:
            return
        ends, told = self._leaving
        count = await removed_backend.leave(self.backend.name, self._owner, ends)
        if count:
            self._owner.metrics.parked(self.backend.name, COPIED, count)
        self._take_up(*await self._storing.open_again())
        self._leaving = None
        told.set_result(count)
        self._ring()

    @property
    def _held(self) -> bool:
        """Whether nothing may be sealed or offered; what comes back is settled all the same."""
        return self._leaving is not None or self._owner.held(self.backend) is not None

    # --- one turn ---------------------------------------------------------------------------------

    async def _turn(self) -> bool:
        """Settle what came back, offer what is due, seal what is new. Returns whether anything was done."""
        now = self._now()
        if self._expired:
            self._expire()
        settlements = [await self._judge(answer, now) for answer in self._offering.take()]
        held = self._held
        if not held and now.mono_s >= self._next_sweep_s:
            self._next_sweep_s = now.mono_s + self._limits.sweep_s
            overdue = await self._settling.sweep(list(self._waiting), now)
            if overdue:
                self._waiting.drop({settlement.request.id for settlement in overdue})
            settlements += overdue
        begin = [] if held else await self._choose(now, settlements)
        planned = None if held else await self._plan(now, len(begin))
        if not (settlements or begin or planned):
            return self._offering.has_answers
        await self._store(settlements, begin, planned)
        self._offering.stored()
        return True

    async def _store(self, settlements: list[Settlement], begin: list[Request], planned: Planned | None) -> None:
        """One transaction: what was said, what is offered again, what is sealed. Then the offers go out."""
        now = self._now()
        step = None if planned is None else planned.step()
        turned = await self._storing.turn(settlements, begin, step, now.wall_s)
        for settlement, children in zip(settlements, turned.children, strict=True):
            self._settled(settlement, children, now)
        for request in begin:
            request.sealed = turned.loaded.get(request.id, request.sealed)
            self._offer(request, now)
        if planned is not None:
            self._sealed(planned, turned.sealed, now)

    def _settled(self, settlement: Settlement, children: Sequence[int], now: Now) -> None:
        request, decision = settlement.request, settlement.decision
        if decision.open:
            request.tries, request.history, request.due_s = decision.tries, settlement.history, settlement.due_s
            request.under_way, request.held = False, decision.held
            self._waiting.put_later(request, now.mono_s + decision.wait_s)
            return
        self._put_later(request.cursor, children, settlement.children, now.mono_s + decision.wait_s)
        reasons: dict[str, set[int]] = {}
        for index, parking in decision.parked.items():
            reasons.setdefault(parking.reason, set()).add(request.members[index].seq)
        for reason, seqs in reasons.items():
            self._owner.parked_some(self.backend.name, reason, len(seqs))

    # --- what an operator mends ---------------------------------------------------------------------------

    async def redrive(self, rows: Sequence[Parked], told: Redriven, *, resend_unknown: bool) -> None:
        """Let parked events of this backend go again, as far as the set of what waits has room; says what became."""
        for cursor in dict.fromkeys(row.cursor for row in rows):
            mine = [row for row in rows if row.cursor == cursor]
            for step in await redrive.steps(self.backend, cursor, mine, self._owner, resend_unknown=resend_unknown):
                full = self._waiting.full and step.redrive is not None and bool(step.redrive.requests)
                if step.redrive is not None and not full:
                    await self._let_go(step.redrive)
                for one in step.outcomes:
                    told.add(replace(one, became=Became.NO_ROOM) if full else one)
        self._ring()

    async def take_back(self, rows: Sequence[Parked]) -> int:
        """Let go what was parked while this backend was left out; waits for room. Returns how many events went."""
        count = 0
        for cursor in dict.fromkeys(row.cursor for row in rows):
            mine = [row for row in rows if row.cursor == cursor]
            for step in await redrive.back(self.backend, cursor, mine, self._owner):
                while self._waiting.full:  # noqa: ASYNC110 - rare, and nothing else needs to be told of room
                    await asyncio.sleep(TROUBLE_RETRY_S)
                if step.redrive is not None:
                    await self._let_go(step.redrive)
                    self._ring()
                count += sum(one.became is Became.OFFERED for one in step.outcomes)
        return count

    async def _let_go(self, step: Redrive) -> None:
        now = self._now()
        ids = await self._storing.redrive(step, now.wall_s)
        self._put_later(step.cursor, ids, step.requests, now.mono_s)
        for reason, seqs in _by_reason(step.again).items():
            self._owner.parked_some(self.backend.name, reason, len(seqs))

    def end_waits(self) -> Ended:
        """Offer what waits now, because somebody knows that the backend is ready."""
        now, status = self._now(), self.status()
        count = self._waiting.hurry(now, held_too=True)
        self._pacing.end_waits(now)
        self._ring()
        return Ended(was=status.state, paused_s=status.paused_s, requests=count)

    async def redrive_before(self, since_s: float) -> int:
        """Let records go that were made before this backend was first configured, from a time on. Returns how many."""
        count = 0
        async for step in redrive.before(self.backend, since_s, self._owner):
            if self._waiting.full:
                break
            now = self._now()
            ids = await self._storing.unskip(step, now.wall_s)
            self._put_later(step.cursor, ids, step.requests, now.mono_s)
            count += step.records
        self._ring()
        return count

    def _put_later(self, cursor: int, ids: Sequence[int], requests: Sequence[NewRequest], due_s: float) -> None:
        """Requests that were stored without being offered: parts of one that was split, and what goes again."""
        for id_, request in zip(ids, requests, strict=True):
            self._waiting.put_later(opened(id_, cursor, request), due_s)

    # --- verdicts ---------------------------------------------------------------------------------

    async def _judge(self, answer: Answer, now: Now) -> Settlement:
        if not (answer.interrupted or answer.counted):
            was_slow = self._pacing.slow
            answer.verdicts = self._pacing.hear(answer.verdicts, answer.started, now, self._roll())
            answer.counted = True
            if was_slow and not self._pacing.slow:
                self._waiting.hurry(self._now())
        return await self._settling.settle(answer, now, self._roll())

    def _expire(self) -> None:
        self._expired = False
        for request in self._open():
            request.stepped = request.under_way
            if request.tries.risky:
                request.tries = replace(request.tries, expired=True)
        self._next_sweep_s = 0.0

    # --- sending ----------------------------------------------------------------------------------

    async def _choose(self, now: Now, settlements: list[Settlement]) -> list[Request]:
        """Which requests to offer now: those due again first, then those never offered; oldest first."""
        allowed = self._pacing.allowed(now, len(self._offering.under_way))
        fresh_first = False
        if self._pacing.slow and allowed:
            fresh_first, self._fresh_next = self._fresh_next, not self._fresh_next
            self._want_fresh = fresh_first and not self._waiting.fresh
        early = self._pacing.may_probe(now, len(self._offering.under_way))
        chosen: list[Request] = []
        while len(chosen) < allowed and not self._want_fresh:
            request = self._waiting.take(now, fresh_first=fresh_first, early=early and not chosen)
            if request is None:
                break
            overdue = await self._settling.overdue(request, now)
            if overdue is not None:
                settlements.append(overdue)
                self._waiting.called(request.subject)
                continue
            chosen.append(request)
        return chosen

    def _offer(self, request: Request, now: Now) -> None:
        request.tries = replace(request.tries, attempts=request.tries.attempts + 1)
        self._offering.offer(request, now)

    def _answered(self, request: Request) -> None:
        self._waiting.called(request.subject)
        self._ring()

    # --- sealing ----------------------------------------------------------------------------------

    async def _plan(self, now: Now, begun: int) -> Planned | None:
        """Decide on the next records of one spool, as far as the window has room."""
        want_fresh, self._want_fresh = self._want_fresh, False
        busy = len(self._offering.under_way) + begun
        free = self._pacing.allowed(now, busy)
        room = self._room(free, busy, want_fresh)
        planned = await self._supply.plan(room, now, hurry=self.draining) if room > 0 else None
        if planned is None:
            return None
        free -= self._waiting.queued
        for index, new in enumerate(planned.plan.requests):
            if len(planned.at_once) < free and new.due_s <= now.wall_s and self._waiting.call(new.sealed.subject):
                planned.at_once.add(index)
        return planned

    def _sealed(self, planned: Planned, ids: Sequence[int], now: Now) -> None:
        self._supply.placed(planned)
        for index, (id_, new) in enumerate(zip(ids, planned.plan.requests, strict=True)):
            request = opened(id_, planned.source.cursor, new)
            if index in planned.at_once:
                self._offer(request, now)
            elif new.due_s > now.wall_s:
                self._waiting.put_later(request, now.mono_s + new.due_s - now.wall_s)
            else:
                self._waiting.fresh.append(request)

    def _room(self, free: int, busy: int, want_fresh: bool) -> int:
        """How many requests may be sealed now."""
        if self._waiting.full:
            return 0
        if self._pacing.slow:
            return 1 if want_fresh and free else 0
        if self.backend.abilities.dedup is Dedup.NONE:
            # What is sealed and not answered is unknown after a crash: no more than is under way.
            return max(free - self._waiting.queued, 0)
        return max(self._limits.window_requests - self._waiting.queued - busy, 0)

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
        if self._held:
            return now.mono_s + self._limits.sweep_s  # the bell tells when somebody has decided
        times = [self._next_sweep_s]
        busy = len(self._offering.under_way)
        if not busy and self._pacing.early_s and self._waiting.can_go_early(now):
            times.append(self._pacing.early_s)
        if self._pacing.slow or self._pacing.paused_s(now):
            times.append(self._next_probe_s(now) if not busy else self._next_sweep_s)
        elif self._waiting.next_due_s is not None and busy < self.backend.abilities.concurrency:
            times.append(self._waiting.next_due_s)
        look_s = self._supply.next_look_s
        if look_s is not None and not self._waits_for_room():
            times.append(look_s)
        return max(min(times), now.mono_s)

    def _next_probe_s(self, now: Now) -> float:
        """While slow or paused: when there may be something to probe with, and it may go."""
        times = [self._next_sweep_s]
        if self._waiting.queued:
            times.append(now.mono_s)
        if self._waiting.next_due_s is not None:
            times.append(self._waiting.next_due_s)
        if self._supply.unread:
            times.append(self._supply.next_look_s or now.mono_s)
        return max(min(times), self._pacing.next_probe_s)

    def _waits_for_room(self) -> bool:
        """Whether records could not be sealed even if there were some: something else has to happen first."""
        busy = len(self._offering.under_way)
        free = self._pacing.allowed(self._now(), busy)
        slow = self._pacing.slow or self._pacing.paused_s(self._now()) > 0
        return slow or self._room(free, busy, want_fresh=False) == 0

    def _quiet(self) -> bool:
        """Whether nothing is under way and nothing more could be started now."""
        if self._offering.under_way or self._offering.has_answers or self._bell.is_set():
            return False
        if self._pacing.slow or self._waiting.full or self._held or self._pacing.paused_s(self._now()):
            return True
        return not (self._waiting.queued or self._supply.unread)

    def _nothing_waits(self) -> Waiting:
        return Waiting(self._limits, one_per_subject=self.backend.abilities.one_per_subject)

    def _open(self) -> Iterator[Request]:
        yield from self._offering
        yield from self._waiting

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

    def _error(self, text: str) -> None:
        _LOG.error(text, extra={"facts": {"backend": self.backend.name}})


def _by_reason(parked: Sequence[NewParked]) -> dict[str, set[int]]:
    """The records that were parked, by the reason."""
    reasons: dict[str, set[int]] = {}
    for one in parked:
        reasons.setdefault(one.reason, set()).add(one.seq)
    return reasons
