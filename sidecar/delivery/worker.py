"""One backend's worker, turn by turn: settle what came back, send what is due, seal what is new, rest.

What must always hold: a request is sent only after the transaction that stored it, or that stored the beginning of this
attempt, is on disk; its verdict is forgotten only after it is on disk there; each attempt ends in one verdict for each
event, whatever the backend does. Workers share nothing but the file, its thread and the tail, so one that is stuck
holds no other up; inside a worker a stuck request waits in a set of its own while fresh ones go by.

Three things stand beside the loop: `Feed` has what is new, `RequestQueue` the sealed requests that wait, and
`CircuitBreaker` says how many may be sent. What a verdict means is decided in `retry_policy` and `settlement`, what is
stored of it in one transaction a turn by the store. What is left here is the order of things, the room there is, and
the waiting: for a wake-up, for a time, for a file that cannot be used.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from sidecar.delivery import encoding, redrive, removed_backend, settlement
from sidecar.delivery.circuit_breaker import CircuitBreaker
from sidecar.delivery.context import Context
from sidecar.delivery.ledger_worker import LedgerWorker, SummedBatch
from sidecar.delivery.queue import RequestQueue
from sidecar.delivery.redrive import Became, Redriven
from sidecar.delivery.removed_backend import COPIED
from sidecar.delivery.retry_policy import backoff_s
from sidecar.delivery.rows import Cursor, NewRequest, Parked, Redrive, Request, Sealing, Settlement, StateError, Turn
from sidecar.delivery.settlement import Reply
from sidecar.delivery.tail import Feed, Item, Source, Tail
from sidecar.delivery.types import MISSING, BackendStatus, Ended, Now
from sidecar.model.delivery import AddsUp, Backend, Blocked, Dedup, Delivered, Duplicate, Sealed, Unknown, Verdict
from sidecar.spool.types import SpoolError

_LOG = logging.getLogger(__name__)

TROUBLE_RETRY_S = 1.0  # how soon a file that failed is opened again
MAY_SEND_S = 0.1  # how soon one that may not be sent just now is looked at again
TROUBLE = (StateError, SpoolError, OSError)  # a file that cannot be read or written: it is waited for
EAGER_S = 0.001  # between two looks where responses wait for the backend: what comes during one goes with the next

Settled = Callable[[str, int, Collection[int]], None]
"""Told how a spool stands at a backend: its instance, the number up to which records have their place, and the numbers
among those of which something is still to be settled."""


@dataclass(frozen=True, slots=True)
class Planned:
    """Records of one spool that are about to get their place."""

    source: Source
    plan: encoding.Plan
    at_once: set[int] = field(default_factory=set)  # which requests are sent as soon as they are stored

    def sealing(self) -> Sealing:
        source, plan = self.source, self.plan
        return Sealing(
            cursor=source.cursor,
            from_seq=source.seq,
            to_seq=plan.upto_seq,
            requests=plan.requests,
            at_once=self.at_once,
            skipped=plan.skipped,
            parked=plan.parked,
            holes=plan.holes,
            applied=plan.applied,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What decides how many requests may be sealed now."""

    free: int  # requests that may start
    busy: int  # requests under way, or about to be
    queued: int  # sealed ones that only wait for a slot
    full: bool  # so much waits for another attempt that nothing may be added
    slow: bool  # one probe at a time
    want_fresh: bool  # which shall be a new record's
    dedup: Dedup

    def requests(self, window: int) -> int:
        """At most `window` wait for a slot or are under way."""
        if self.full:
            return 0
        if self.slow:
            return 1 if self.want_fresh and self.free else 0
        if self.dedup is Dedup.NONE:
            # What is sealed and not answered is unknown after a crash: no more than is under way.
            return max(self.free - self.queued, 0)
        return max(window - self.queued - self.busy, 0)


class Worker:
    """Runs one backend. `wake` when records were committed; `status` at any time."""

    def __init__(self, backend: Backend, context: Context, tail: Tail, settled: Settled | None = None) -> None:
        """`settled`: who waits for this backend; then nothing waits for company here."""
        self.backend = backend
        self._context, self._limits, self._store = context, context.limits, context.store
        self._told = settled
        if settled is not None:
            self._limits = replace(self._limits, linger_s=EAGER_S, gather_s=EAGER_S, sums_linger_s=EAGER_S)
        self._breaker = CircuitBreaker(backend, context.metrics, context.limits)
        batches = backend.abilities.events_max > 1
        gap_s = self._limits.linger_s if batches else self._limits.gather_s
        self._feed = Feed(tail, self._start_cursor, gap_s=gap_s)
        self._queue = self._empty_queue()
        self._sums = LedgerWorker(backend, backend, context) if isinstance(backend, AddsUp) else None
        self._sums_tries = 0  # batches in a row that could not be added
        self._sums_wait_s = 0.0  # monotonic: none is tried before
        self._terms = settlement.Terms(backend, context.limits, self._lines)
        self._under_way: dict[int, Request] = {}
        self._replies: list[Reply] = []
        self._in_hand: list[Reply] = []  # taken from there, and not stored yet
        self._sends = asyncio.TaskGroup()
        self._trouble: str | None = None  # why nothing can be read or stored
        self._mistake: Exception | None = None  # of ours, in an attempt
        self._mistakes = 0  # in a row
        self._wakeup = asyncio.Event()
        self._rests_until_s = math.inf  # monotonic
        self.idle = asyncio.Event()  # nothing can be done before something happens
        self.draining = False
        self.resting = False  # nothing new is begun, because somebody else goes on with it
        self._per_record = 1.0  # requests that a record gives
        self._fresh_next = self._want_fresh = False
        self._next_sweep_s = 0.0
        self._expired = False
        self._leaving: tuple[Mapping[str, int], asyncio.Future[int]] | None = None
        self._left = 0  # records that were parked because of it

    def __repr__(self) -> str:
        return (
            f"<Worker {self.backend.name}: {self._queue.queued} ready, {len(self._under_way)} under way,"
            f" {self._queue.later} waiting, {self.status().state}>"
        )

    @property
    def is_down(self) -> bool:
        """Whether the backend is asked from time to time only, or not before a time that it said."""
        return self._breaker.slow or self._breaker.paused_s(self._now()) > 0

    def wake(self) -> None:
        """Records were committed. Where this worker would not look at them before it wakes by itself, it is left alone:
        commits are many, and a turn costs what a hundred records do."""
        self._feed.wake()
        self.idle.clear()
        look_s = self._look_s()
        if self.draining or look_s is None or look_s < self._rests_until_s:
            self._wakeup.set()

    def clock_stepped(self) -> None:
        """The wall clock jumped: what may have been taken is not recognised for sure any more."""
        self._expired = True
        self._ring()

    def status(self) -> BackendStatus:
        now = self._now()
        requests = list(self._open())
        oldest = min((request.oldest_s for request in requests), default=None)
        breaker, full = self._breaker, self._queue.full
        paused_s, held = breaker.paused_s(now), self._context.held(self.backend)
        reason = held or breaker.blocked or self._trouble or breaker.failing
        if reason is None and full:
            reason = "retry_set_full"
        if held is not None or breaker.blocked is not None:
            state = "blocked"
        elif paused_s and self._trouble is None:
            state = "paused"
            command = f"metering-sidecar spool retry --backend {self.backend.name}"
            reason = f"it asked to be left alone, {paused_s:.0f} s are left (`{command}` ends it)"
        else:
            state = "down" if breaker.slow or full or self._trouble else "up"
        return BackendStatus(
            backend=self.backend.name,
            state=state,
            reason=reason,
            oldest_pending_s=None if oldest is None else max(now.wall_s - oldest, 0.0),
            sealed=len(requests),
            under_way=len(self._under_way),
            waiting_records=self._queue.later_records,
            waiting_bytes=self._queue.later_bytes,
            paused_s=paused_s,
        )

    async def run(self, cursors: Sequence[Cursor], requests: Sequence[Request]) -> None:
        """Go on where the last run stopped: what is sealed comes first, byte for byte.

        A file that cannot be read or written stops this worker until it can. A mistake of ours is taken like that too:
        it would come again after a new start of the process, which would then do nothing for the other backends either.
        """
        begun = False
        async with self._sends:
            try:
                self._believe(cursors, requests)
            except Exception as error:  # noqa: BLE001 - see above
                await self._start_over(error)
            while True:
                try:
                    if not begun:
                        await self._begin()
                        begun = True
                    if self._mistake is not None:
                        mistake, self._mistake = self._mistake, None
                        raise mistake
                    if self._leaving is not None:
                        await self._leave()
                    if not await self._turn():
                        await self._rest()
                    self._trouble, self._mistakes = None, 0
                except Exception as error:  # noqa: BLE001 - see above
                    await self._start_over(error)

    async def _begin(self) -> None:
        self._tell_settled()
        # How long the last run meant to wait says nothing of the backend now: the first replies tell.
        self._queue.hurry(self._now(), held_too=True)
        if self._sums is not None and (blocked := await self._sums.look()) is not None:
            # Said before the first record comes, which may be long.
            self._breaker.hear([blocked], self._now(), self._now(), self._context.roll())

    def _believe(self, cursors: Sequence[Cursor], requests: Sequence[Request]) -> None:
        """Take what is on disk for true. What this run still knows of attempts is not forgotten."""
        now = self._now()
        self._feed.begin(cursors)
        if self._sums is not None:
            self._sums.begin()
        self._queue = self._empty_queue()
        known = {reply.request.id: reply for reply in (*self._in_hand, *self._replies)}
        self._in_hand, self._replies = [], []
        for request in self._under_way.values():
            self._queue.call(request.subject)
        for request in requests:
            if request.id in self._under_way:
                continue
            if not request.under_way:
                wait_s = min(max(request.due_s - now.wall_s, 0.0), self._limits.backoff_cap_s)
                self._queue.put_later(request, now.mono_s + wait_s)
            elif request.id in known:
                self._replies.append(replace(known[request.id], request=request))
            else:
                self._replies.append(_interrupted(request, now))

    async def _open_again(self) -> None:
        """A new connection, and all that it finds of this backend."""
        name, store = self.backend.name, self._store
        await store.run(store.reopen)
        cursors = await store.run(store.cursors, name)
        self._believe(cursors, await store.run(store.open_requests, name))

    async def _start_over(self, error: Exception) -> None:
        """Nothing that was not confirmed is believed: wait, open the file again, and read what it says."""
        while True:
            self._say_trouble(error)
            await asyncio.sleep(TROUBLE_RETRY_S)
            try:
                await self._open_again()
            except Exception as again:  # noqa: BLE001 - as in `run`
                error = again
            else:
                return

    def _say_trouble(self, error: Exception) -> None:
        if not isinstance(error, TROUBLE):
            self._mistakes += 1
            if self._mistakes > 1:  # perhaps of these: their outcome is unknown then, as after a death
                self._in_hand, self._replies = [], []
            self._trouble = f"a mistake of ours ({type(error).__name__}), see the log"
            _LOG.error(
                "delivery waits: a mistake of ours", exc_info=error, extra={"facts": {"backend": self.backend.name}}
            )
        elif self._trouble != str(error):
            self._trouble = str(error)
            self._error(f"delivery waits: {error}")

    async def leave(self, ends: Mapping[str, int]) -> int:
        """Park what is pending of these spools, as soon as nothing is under way. Returns how many records."""
        self._leaving, self._left = (ends, asyncio.get_running_loop().create_future()), 0
        self._ring()
        return await self._leaving[1]

    async def _leave(self) -> None:
        assert self._leaving is not None
        if self._under_way or self._replies:
            return
        ends, told = self._leaving
        name, context = self.backend.name, self._context
        # What fails half-way is tried again, and goes on behind what was parked before.
        await removed_backend.leave(name, self._store, context.reader, context.clock.wall_s, ends, self._left_behind)
        await self._open_again()
        self._leaving = None
        told.set_result(self._left)
        self._ring()

    def _left_behind(self, records: int) -> None:
        self._left += records
        self._context.metrics.parked(self.backend.name, COPIED, records)

    @property
    def _held(self) -> bool:
        """Whether nothing may be sealed or offered; what comes back is settled all the same."""
        return self.resting or self._leaving is not None or self._context.held(self.backend) is not None

    # --- one turn ---------------------------------------------------------------------------------

    async def _turn(self) -> bool:
        """Settle what came back, send what is due, seal what is new. Returns whether anything was done."""
        now = self._now()
        if self._expired:
            self._expire()
        self._in_hand, self._replies = self._replies, []
        settled = [await self._judge(reply, now) for reply in self._in_hand]
        begin: list[Request] = []
        planned: Planned | None = None
        if not self._held:
            settled += await self._sweep(now)
            begin = await self._choose(now, settled)
            planned = await (self._plan if self._sums is None else self._add_up)(now, len(begin))
        if settled or begin or planned:
            await self._commit(settled, begin, planned)
            self._in_hand = []
            self._tell_settled()
            return True
        return bool(self._replies)

    async def _commit(self, settled: list[Settlement], begin: list[Request], planned: Planned | None) -> None:
        """One transaction: what was said, what is sent again, what is sealed. Then the requests go out."""
        now = self._now()
        turn = Turn(
            now_s=now.wall_s,
            settled=settled,
            begin=[request.id for request in begin],
            load=[request.id for request in begin if request.sealed is None],
            sealing=None if planned is None else planned.sealing(),
        )
        done = await self._store.patiently(self.backend.name, self._store.commit, turn)
        for one, children in zip(settled, done.children, strict=True):
            self._settled(one, children, now)
        for request in begin:
            request.sealed = done.loaded.get(request.id, request.sealed)
            self._send(request, now)
        if planned is not None:
            self._sealed(planned, done.sealed, now)

    def _tell_settled(self) -> None:
        """Say where the backend stands, to who waits for it."""
        if self._told is None:
            return
        # The backend's yes is enough: that it is stored here too is for us, and nobody waits for that.
        there = {r.request.id for r in (*self._replies, *self._in_hand) if _all_taken(r.verdicts)}
        pending: dict[int, set[int]] = {}
        for request in self._open():
            if request.id in there:
                continue
            pending.setdefault(request.cursor, set()).update(member.seq for member in request.members)
        for source in self._feed.sources:
            self._told(source.instance, source.seq, pending.get(source.cursor, ()))

    def _settled(self, one: Settlement, children: Sequence[int], now: Now) -> None:
        request, decision = one.request, one.decision
        if decision.open:
            request.tries, request.history, request.due_s = decision.tries, one.history, one.due_s
            request.under_way, request.held = False, decision.held
            self._queue.put_later(request, now.mono_s + decision.wait_s)
            return
        self._put_later(request.cursor, children, one.children, now.mono_s + decision.wait_s)
        parked = [(request.members[index].seq, parking.reason) for index, parking in decision.parked.items()]
        self._context.parked_by(self.backend.name, parked)

    # --- what an operator corrects ----------------------------------------------------------------

    async def redrive(self, rows: Sequence[Parked], told: Redriven, *, resend_unknown: bool) -> None:
        """Let parked events of this backend go again, as far as the set of what waits has room; says what became."""
        for cursor, mine in _by_cursor(rows).items():
            for step in await redrive.steps(self.backend, cursor, mine, self._context, resend_unknown=resend_unknown):
                full = self._queue.full and step.redrive is not None and bool(step.redrive.requests)
                if step.redrive is not None and not full:
                    await self._let_go(step.redrive)
                for one in step.outcomes:
                    told.add(replace(one, became=Became.NO_ROOM) if full else one)
        self._ring()

    async def take_back(self, rows: Sequence[Parked], told: Redriven) -> None:
        """Let go what was parked while this backend was left out; waits for room."""
        for cursor, mine in _by_cursor(rows).items():
            for step in await redrive.back(self.backend, cursor, mine, self._context):
                while self._queue.full:  # noqa: ASYNC110 - rare, and nothing else needs to be told of room
                    await asyncio.sleep(TROUBLE_RETRY_S)
                if step.redrive is not None:
                    await self._let_go(step.redrive)
                    self._ring()
                for one in step.outcomes:
                    told.add(one)

    async def _let_go(self, step: Redrive) -> None:
        now, store = self._now(), self._store
        ids = await store.patiently(self.backend.name, store.redrive, step, now.wall_s)
        self._put_later(step.cursor, ids, step.requests, now.mono_s)
        self._context.parked_by(self.backend.name, [(one.seq, one.reason) for one in step.again])

    def end_waits(self) -> Ended:
        """Offer what waits now, because somebody knows that the backend is ready."""
        now, status = self._now(), self.status()
        count = self._queue.hurry(now, held_too=True)
        self._breaker.end_waits(now)
        self._sums_wait_s = 0.0
        self._ring()
        return Ended(was=status.state, paused_s=status.paused_s, requests=count)

    async def redrive_before(self, since_s: float) -> int:
        """Let records go that were made before this backend was first configured, from a time on. Returns how many."""
        count, store = 0, self._store
        async for step in redrive.before(self.backend, since_s, self._context):
            if self._queue.full:
                break
            now = self._now()
            ids = await store.patiently(self.backend.name, store.unskip, step, now.wall_s)
            self._put_later(step.cursor, ids, step.requests, now.mono_s)
            count += step.records
        self._ring()
        return count

    def _put_later(self, cursor: int, ids: Sequence[int], requests: Sequence[NewRequest], due_s: float) -> None:
        """Requests that were stored without being sent: parts of one that was split, and what goes again."""
        for id_, request in zip(ids, requests, strict=True):
            self._queue.put_later(Request.opened(id_, cursor, request), due_s)

    # --- verdicts ---------------------------------------------------------------------------------

    async def _judge(self, reply: Reply, now: Now) -> Settlement:
        if not (reply.interrupted or reply.counted):
            reply.verdicts = self._hear(reply.verdicts, reply.started, now)
            reply.counted = True
        return await settlement.settle(self._terms, reply, now, self._context.roll(), self._breaker.taken_s)

    def _hear(self, verdicts: Sequence[Verdict], started: Now, now: Now) -> Sequence[Verdict]:
        """What the breaker makes of them. Where that ends a time of being down, what waits for it goes now."""
        was_slow = self._breaker.slow
        heard = self._breaker.hear(verdicts, started, now, self._context.roll())
        if was_slow and not self._breaker.slow:
            self._queue.hurry(self._now())
        return heard

    async def _sweep(self, now: Now) -> list[Settlement]:
        """From time to time: what waited too long, although nothing is sent."""
        if now.mono_s < self._next_sweep_s:
            return []
        self._next_sweep_s = now.mono_s + self._limits.sweep_s
        overdue = await settlement.sweep(self._terms, list(self._queue), now)
        if overdue:
            self._queue.drop({one.request.id for one in overdue})
        return overdue

    def _expire(self) -> None:
        self._expired = False
        for request in self._open():
            request.stepped = request.under_way
            if request.tries.risky:
                request.tries = replace(request.tries, expired=True)
        self._next_sweep_s = 0.0

    # --- sending ----------------------------------------------------------------------------------

    async def _choose(self, now: Now, settled: list[Settlement]) -> list[Request]:
        """Which requests to offer now: those due again first, then those never offered; oldest first. What is found to
        have waited too long is not offered, and is added to `settled`."""
        allowed = self._breaker.allowed(now, len(self._under_way))
        fresh_first = False
        if self._breaker.slow and allowed:
            fresh_first, self._fresh_next = self._fresh_next, not self._fresh_next
            self._want_fresh = fresh_first and not self._queue.fresh
        early = self._breaker.may_probe(now, len(self._under_way))
        chosen: list[Request] = []
        while len(chosen) < allowed and not self._want_fresh:
            request = self._queue.take(now, fresh_first=fresh_first, early=early and not chosen)
            if request is None:
                break
            overdue = await settlement.overdue(self._terms, request, now)
            if overdue is not None:
                settled.append(overdue)
                self._queue.called(request.subject)
                continue
            chosen.append(request)
        return chosen

    def _send(self, request: Request, now: Now) -> None:
        """Begin an attempt; that it begins is on disk."""
        request.tries = replace(request.tries, attempts=request.tries.attempts + 1)
        request.under_way, request.stepped = True, False
        request.started_s = now.wall_s
        self._under_way[request.id] = request
        self._sends.create_task(self._offer(request, now))

    async def _offer(self, request: Request, started: Now) -> None:
        try:
            await self._attempt(request, started)
        except Exception as error:  # noqa: BLE001 - the worker starts over with what is on disk: an attempt has begun
            self._under_way.pop(request.id, None)
            self._mistake = error
            self.idle.clear()
            self._wakeup.set()

    async def _attempt(self, request: Request, started: Now) -> None:
        assert request.sealed is not None
        sealed, attempt = request.sealed, request.tries.attempts
        sealed = sealed if attempt == sealed.attempt else replace(sealed, attempt=attempt)
        while not self._context.may_send():  # noqa: ASYNC110 - it may in a moment, or this task is ended; rare
            await asyncio.sleep(MAY_SEND_S)
        verdicts = await self._ask(sealed)
        del self._under_way[request.id]
        self._replies.append(Reply(request, verdicts, started))
        self._tell_settled()
        self._queue.called(request.subject)
        self._ring()

    async def _ask(self, sealed: Sealed) -> Sequence[Verdict]:
        """Whatever the backend does comes back as one verdict for each event."""
        count = len(sealed.events)
        try:
            async with asyncio.timeout(self._limits.send_limit_s):
                verdicts = await self.backend.send(sealed)
        except TimeoutError:
            return [Unknown("no_answer")] * count
        except Exception as error:  # noqa: BLE001 - a surprise in one backend is one unknown outcome
            self._error("a backend raised; the outcome is taken for unknown", error=type(error).__name__)
            return [Unknown(f"raised_{type(error).__name__}")] * count
        if len(verdicts) != count:
            self._error("a backend gave another number of verdicts than there are events")
            return [Unknown("verdicts_missing")] * count
        return verdicts

    # --- sealing ----------------------------------------------------------------------------------

    async def _plan(self, now: Now, begun: int) -> Planned | None:
        """Decide on the next records of one spool, as far as the window has room."""
        want_fresh, self._want_fresh = self._want_fresh, False
        busy = len(self._under_way) + begun
        free = self._breaker.allowed(now, busy)
        room = self._room(free, busy, want_fresh)
        if room <= 0:
            return None
        wanted = self._wanted(room)
        source = await self._feed.next(wanted, now.mono_s, hurry=self.draining)
        if source is None:
            return None
        items = list(itertools.islice(source.items, wanted))
        plan = await encoding.plan(
            self.backend, items, room=room, again_upto=source.again_upto, now_s=now.wall_s, limits=self._limits
        )
        planned = Planned(source, plan)
        free -= self._queue.queued
        for index, new in enumerate(plan.requests):
            if len(planned.at_once) < free and new.due_s <= now.wall_s and self._queue.call(new.sealed.subject):
                planned.at_once.add(index)
        return planned

    async def _add_up(self, now: Now, begun: int) -> Planned | None:
        """The same where the backend keeps sums: they are in, and what is left is to store that here."""
        assert self._sums is not None
        self._want_fresh = False
        if not self._breaker.allowed(now, len(self._under_way) + begun):
            return None
        if not self._breaker.slow and now.mono_s < self._sums_wait_s:
            return None
        source = self._sums.handed(self._feed, now.mono_s, hurry=self.draining)
        items: list[Item] = []
        if source is not None:
            source.next_read_s = source.soon_s = now.mono_s + self._limits.sums_linger_s
        else:
            source = await self._feed.next(self._sums.wanted, now.mono_s, hurry=self.draining)
            if source is None:
                return None
            items = list(itertools.islice(source.items, self._sums.wanted))
        added = await self._sums.add(source, items, now.wall_s)
        verdicts = added.verdicts
        if verdicts:
            verdicts = self._hear(verdicts, now, self._now())
        if added.plan is None or (verdicts and isinstance(verdicts[0], Blocked)):
            self._sums_tries += bool(verdicts)
            wait_s = backoff_s(self._sums_tries, self._context.roll(), self._limits) if verdicts else 0.0
            self._sums_wait_s = now.mono_s + wait_s
            return None
        self._sums_tries, self._sums_wait_s = 0, 0.0
        return Planned(source, added.plan)

    def apply(self, batch: SummedBatch) -> bool:
        """Records were committed, and their sums are at hand; they are added from now on, after a `wake`."""
        return self._sums is not None and self._sums.apply(batch)

    def _sealed(self, planned: Planned, ids: Sequence[int], now: Now) -> None:
        """It is stored: go on behind it, count it, and send what has a slot."""
        plan = planned.plan
        planned.source.move(plan.upto_seq)
        self._count(plan)
        for index, (id_, new) in enumerate(zip(ids, plan.requests, strict=True)):
            request = Request.opened(id_, planned.source.cursor, new)
            if index in planned.at_once:
                self._send(request, now)
            elif new.due_s > now.wall_s:
                self._queue.put_ahead(request, now)
            else:
                self._queue.fresh.append(request)

    def _count(self, plan: encoding.Plan) -> None:
        """What was sealed, skipped, parked and lost."""
        metrics, name = self._context.metrics, self.backend.name
        events = sum(len(request.members) for request in plan.requests)
        events += sum(run.records for run in plan.applied if not run.duplicate)
        if events:
            metrics.sealed(name, events)
        for reason, seqs in plan.skipped.items():
            metrics.skipped(name, reason, len(seqs))
        missing = sum(hole.records for hole in plan.holes)
        if missing:
            metrics.skipped(name, MISSING, missing)
            self._error("records were lost with a damaged spool file", records=missing)
        self._context.parked_by(name, [(parked.seq, parked.reason) for parked in plan.parked])
        if plan.requests and plan.taken:
            # Learned from the last ones: how many requests a record gives (one for each meter, say).
            self._per_record = max(len(plan.requests) / plan.taken, 0.01)

    def _wanted(self, room: int) -> int:
        """How many records to take for so many requests: a slice of the event loop at most."""
        most = self._limits.encode_records
        if self.backend.abilities.events_max > 1:
            return most
        return max(1, min(most, int(room / self._per_record)))

    def _room(self, free: int, busy: int, want_fresh: bool) -> int:
        """How many requests may be sealed now."""
        room = Room(
            free=free,
            busy=busy,
            queued=self._queue.queued,
            full=self._queue.full,
            slow=self._breaker.slow,
            want_fresh=want_fresh,
            dedup=self.backend.abilities.dedup,
        )
        return room.requests(self._limits.window_requests)

    # --- waiting ----------------------------------------------------------------------------------

    async def _rest(self) -> None:
        """Wait for a wake-up, or for the next thing that is due."""
        if self._quiet():
            self.idle.set()
        now = self._now()
        self._rests_until_s = self._due_s(now)
        try:
            async with asyncio.timeout(max(self._rests_until_s - now.mono_s, 0.0)):
                await self._wakeup.wait()
        except TimeoutError:
            pass
        self._rests_until_s = math.inf  # whoever is at work looks again before it rests
        self._wakeup.clear()

    def _due_s(self, now: Now) -> float:
        """The monotonic time of the next look."""
        if self._held:
            return now.mono_s + self._limits.sweep_s  # a wake-up comes when somebody has decided
        times = [self._next_sweep_s]
        busy = len(self._under_way)
        if not busy and self._breaker.early_s and self._queue.can_go_early(now):
            times.append(self._breaker.early_s)
        if self._breaker.slow or self._breaker.paused_s(now):
            times.append(self._next_probe_s(now) if not busy else self._next_sweep_s)
        elif self._queue.next_due_s is not None and busy < self.backend.abilities.concurrency:
            times.append(self._queue.next_due_s)
        look_s = self._look_s()
        if look_s is not None and not self._waits_for_room():
            times.append(look_s)
        return max(min(times), now.mono_s)

    def _look_s(self) -> float | None:
        """When new records are looked for; None: there are none. After a batch that could not be added, not before the
        next try of it, which while the backend is slow is its next probe."""
        look_s = self._feed.next_look_s
        if self._sums is None:
            return look_s
        next_try_s = self._breaker.next_probe_s if self._breaker.slow else self._sums_wait_s
        if self._feed.waiting:
            return next_try_s
        return None if look_s is None else max(look_s, next_try_s)

    def _next_probe_s(self, now: Now) -> float:
        """While slow or paused: when there may be something to probe with, and it may go."""
        times = [self._next_sweep_s]
        if self._queue.queued:
            times.append(now.mono_s)
        if self._queue.next_due_s is not None:
            times.append(self._queue.next_due_s)
        if self._feed.unread:
            times.append(self._feed.next_look_s or now.mono_s)
        return max(min(times), self._breaker.next_probe_s)

    def _waits_for_room(self) -> bool:
        """Whether records could not be sealed even if there were some: something else has to happen first."""
        busy = len(self._under_way)
        free = self._breaker.allowed(self._now(), busy)
        return self.is_down or self._room(free, busy, want_fresh=False) == 0

    def _quiet(self) -> bool:
        """Whether nothing is under way and nothing more could be started now."""
        if self._under_way or self._replies or self._wakeup.is_set():
            return False
        if self._breaker.slow or self._queue.full or self._held or self._breaker.paused_s(self._now()):
            return True
        if self._sums is not None and self._sums_wait_s > self._now().mono_s:
            return True
        return not (self._queue.queued or self._feed.unread)

    def _empty_queue(self) -> RequestQueue:
        return RequestQueue(self._limits, one_per_subject=self.backend.abilities.one_per_subject)

    def _open(self) -> Iterator[Request]:
        yield from self._under_way.values()
        yield from (reply.request for reply in self._replies)
        yield from self._queue

    async def _lines(self, request: int) -> list[bytes]:
        return await self._store.patiently(self.backend.name, self._store.lines, request)

    async def _start_cursor(self, instance: str) -> Cursor:
        return await self._store.patiently(self.backend.name, self._store.start_cursor, self.backend.name, instance)

    def _now(self) -> Now:
        return self._context.now()

    def _ring(self) -> None:
        self.idle.clear()
        self._wakeup.set()

    def _error(self, text: str, **facts: object) -> None:
        _LOG.error(text, extra={"facts": {"backend": self.backend.name, **facts}})


def _all_taken(verdicts: Sequence[Verdict]) -> bool:
    return all(isinstance(verdict, Delivered | Duplicate) for verdict in verdicts)


def _interrupted(request: Request, now: Now) -> Reply:
    """The last run ended during this attempt: it may have been taken, at its start at the earliest."""
    if request.tries.risk_wall_s is None:
        request.tries = replace(request.tries, risk_wall_s=request.started_s)
    return Reply(request, [Unknown("interrupted")] * len(request.members), now, interrupted=True)


def _by_cursor(rows: Sequence[Parked]) -> dict[int, list[Parked]]:
    found: dict[int, list[Parked]] = {}
    for row in rows:
        found.setdefault(row.cursor, []).append(row)
    return found
