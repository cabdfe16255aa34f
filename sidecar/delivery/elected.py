"""Delivery for a fleet: a `Delivery` for each lane that this sidecar holds, over the records that all have in common.

A lane is to its `Delivery` what a spool is elsewhere: numbers without holes, of which more come. What must always hold:
- A `Delivery` runs only while the lane is held; one whose lane was lost is cut off at once, and commits nothing if it
  does not notice (`lane_database`).
- No request begins once a lease may be about to run out, whatever the renewing is waiting for (`_is_late`).
- No lane waits for another: one that ends does so beside all else, however long what it stores hangs.
Nothing here is waited for by a call.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self

import orjson

from sidecar.delivery.context import SystemClock
from sidecar.delivery.lane_balance import sidecar_of
from sidecar.delivery.lane_database import Held, LaneDatabase, make_lanes, spool_of
from sidecar.delivery.leases import RENEW_S, Leases
from sidecar.delivery.limits import Limits
from sidecar.delivery.rows import StateError
from sidecar.delivery.service import Delivery
from sidecar.delivery.store import DeliveryStore
from sidecar.delivery.types import BackendStatus, Metrics
from sidecar.delivery.wishes import Asked, Wish, answer, ask, asked_of, grant, has_changed
from sidecar.ledger import postgres_schema
from sidecar.ledger.lanes import LANES
from sidecar.model.delivery import Backend
from sidecar.spool.types import SpoolError, SpoolTotals, StoredGroup
from sidecar.storage.files import said_by
from sidecar.storage.postgres import Postgres, PostgresError, call

log = logging.getLogger(__name__)

LOOK_S: Final = 0.5  # how soon records of other sidecars are seen
LATE_S: Final = 2 * RENEW_S  # without a renewal for so long nothing more is begun: the lease has four seconds to go
ANSWER_S: Final = RENEW_S  # a statement about leases is waited for no longer: by then the next round is due
REST_S: Final = 35.0  # for what is under way when a lane is given back
STOP_REST_S: Final = 4.0  # the same at a stop: leases have four seconds to go at least, and nobody renews them
STOP_END_S: Final = 2.0  # and then for what is being stored; where the database hangs, the connection is given up
TROUBLE_S: Final = 1.0  # after a round that failed
RECORDS: Final = 1000  # read at once
FORGET_S: Final = 60.0
LOGGED_CHARS_MAX: Final = 300  # of what was asked, in a line of the log
THREADS: Final = 4 * LANES  # that block for a database that hangs: what a lane opens, reads and closes, and all others
# Each lane reads and remembers for itself, and a sidecar that is alone holds all of them: what they keep of lines,
# parsed as well, is some 16 MiB together.
OF_A_LANE: Final = Limits(read_bytes=(2 << 20) // LANES, tail_bytes=(4 << 20) // LANES)
CONNECTIONS: Final = 4  # of all lanes of a process: their steps, and what is asked meanwhile


def make_room_for_lanes() -> None:
    """Let as many threads of the event loop block as lanes may need at once. By itself it has some six on two cores:
    lanes whose database hangs would have them all, and whatever else is done in threads would wait for that."""
    threads = ThreadPoolExecutor(THREADS, thread_name_prefix="blocking")
    asyncio.get_running_loop().set_default_executor(threads)


class LaneReader:
    """The records of one lane, as `SpoolReader` has those of a spool. Everything blocks."""

    def __init__(self, database: Postgres, lane: int) -> None:
        self._database, self._lane = database, lane
        self.name = spool_of(lane)

    def instances(self) -> list[str]:
        return [self.name]

    def read(self, instance: str, after_seq: int, *, bytes_max: int = 1 << 20) -> Sequence[StoredGroup]:
        del instance
        rows = self._ask(
            "SELECT lane_seq, line FROM metering.records WHERE lane = $1 AND lane_seq > $2 ORDER BY lane_seq LIMIT $3",
            self._lane,
            after_seq,
            RECORDS,
        )
        groups: list[StoredGroup] = []
        size, begin = 0, 0
        for index, (seq, line) in enumerate(rows):
            size += len(line)
            ends = index + 1 == len(rows) or rows[index + 1][0] != seq + 1 or size >= bytes_max
            if ends:
                lines = tuple(bytes(row[1]) for row in rows[begin : index + 1])
                groups.append(StoredGroup(first_seq=rows[begin][0], last_seq=seq, lines=lines))
                begin = index + 1
            if size >= bytes_max:
                break
        return groups

    def last_seq(self, instance: str) -> int:
        del instance
        [(last,)] = self._ask("SELECT last_seq FROM metering.lanes WHERE lane = $1", self._lane)
        return int(last)

    def totals(self, instance: str) -> SpoolTotals:
        last = self.last_seq(instance)
        return SpoolTotals(admitted=last, recorded=last)

    def count(self, instance: str, after_seq: int, upto_seq: int) -> int:
        """Numbers have no holes, but the oldest go with their day."""
        del instance
        [(first,)] = self._ask(
            "SELECT min(lane_seq) FROM metering.records WHERE lane = $1 AND lane_seq > $2", self._lane, after_seq
        )
        return 0 if first is None else max(0, upto_seq - int(first) + 1)

    def last_before(self, moment: datetime) -> int:
        """The last number of a day that had ended then."""
        [(last,)] = self._ask(
            "SELECT max(lane_seq) FROM metering.records WHERE lane = $1 AND day < $2", self._lane, moment.date()
        )
        return int(last or 0)

    def _ask(self, question: str, *values: Any) -> list[Any]:
        try:
            return call(self._fetch(question, values))
        except PostgresError as error:
            raise SpoolError(str(error)) from error

    async def _fetch(self, question: str, values: Sequence[Any]) -> list[Any]:
        async with self._database.transaction(read_only=True) as db:
            return await db.fetch(question, *values)


def _clock_s() -> float:
    """What leases are measured by here: the time that a machine was suspended counts as well, where that is known."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()


@dataclass(slots=True, eq=False)
class _Led:
    """A lane that is worked on."""

    held: Held
    task: asyncio.Task[None] | None = None
    delivery: Delivery | None = None  # None until it has begun
    last_seq: int = -1
    leaving: bool = False  # it is given back as soon as what is under way has ended
    over: bool = False  # the work is being ended


@dataclass(slots=True)
class Elected:
    """The lanes of one sidecar: takes them, works on them, gives them back."""

    url: str
    me: str
    names: Sequence[str]  # the backends
    make: Callable[[], list[Backend]]  # of each lane its own
    metrics: Metrics
    retention_s: float
    skip_gaps: bool = False
    trouble: str = ""  # why no lane is held or taken, in a line
    _leases: Leases = field(init=False)
    _leasing: Postgres = field(init=False)
    _shared: Postgres = field(init=False)
    _led: dict[int, _Led] = field(default_factory=dict)
    _renewed_s: float = -math.inf  # `_clock_s`
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _prepared: bool = False
    _ending: defaultdict[int, set[asyncio.Task[None]]] = field(default_factory=lambda: defaultdict(set))
    _giving: set[asyncio.Task[None]] = field(default_factory=set)
    _granting: dict[int, asyncio.Task[None]] = field(default_factory=dict)  # by the wish's id

    def __post_init__(self) -> None:
        self._leasing = Postgres(self.url, name="metering-sidecar leases", command_timeout_s=ANSWER_S)
        self._shared = Postgres(self.url, name="metering-sidecar lanes", connections=CONNECTIONS)
        self._leases = Leases(self._leasing, self.me)

    async def prepare(self) -> None:
        """The tables of the ledger and of all lanes (`make_lanes`)."""
        await self._leasing.migrate(postgres_schema.PART, postgres_schema.STEPS)
        await make_lanes(self._leasing, self.names)
        self._prepared = True

    async def __aenter__(self) -> Self:
        """Waits for nothing: the tables are made, or seen to be there, beside the calls."""
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        """Let what is under way end, and give all lanes back: whoever is alive has them at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        # Less than what the leases have still to go.
        rest_s = 0.0 if self._is_late() else STOP_REST_S
        await asyncio.gather(*(self._end(led, rest_s, STOP_END_S) for led in list(self._led.values())))
        giving = list(self._giving)
        for one in giving:
            one.cancel()
        await asyncio.gather(*giving, return_exceptions=True)
        try:
            if self._prepared:  # else it never held one
                await self._leases.leave()
        except PostgresError as error:
            log.warning("lanes could not be given back, others have them in some seconds: %s", error)
        await self._leasing.close()
        await asyncio.to_thread(lambda: call(self._shared.close()))  # what hangs fails with it
        if ending := [task for tasks in self._ending.values() for task in tasks]:
            await asyncio.wait(ending)

    # --- looking in -------------------------------------------------------------------------------

    @property
    def lanes(self) -> list[int]:
        """Held and worked on."""
        return sorted(lane for lane, led in self._led.items() if led.delivery is not None)

    @property
    def resting(self) -> int:
        """How many lanes are held, and not worked on: they were taken just now, or cannot be."""
        return sum(led.delivery is None for led in self._led.values())

    @property
    def unheld(self) -> int | None:
        """How many lanes nobody holds, as far as is known here; None: they cannot be looked at."""
        return None if self._is_late() else self._leases.unheld

    def deliveries(self) -> dict[int, Delivery]:
        return {lane: led.delivery for lane, led in sorted(self._led.items()) if led.delivery is not None}

    def status(self) -> list[BackendStatus]:
        """How each backend does, on the lane where it does worst."""
        worst: dict[str, BackendStatus] = {}
        for status in (status for delivery in self.deliveries().values() for status in delivery.status()):
            known = worst.get(status.backend)
            worst[status.backend] = status if known is None else _worse(known, status)
        return list(worst.values())

    def parked_now(self) -> dict[tuple[str, str], int]:
        """Records parked by backend and reason, of the lanes that are held here. Blocks. A lane that is lost just now
        is another's to count."""
        found: Counter[tuple[str, str]] = Counter()
        for delivery in self.deliveries().values():
            with contextlib.suppress(StateError):
                found.update(delivery.parked_now())
        return dict(found)

    def pending(self) -> dict[str, int]:
        """Records that a backend has not settled, of the lanes that are held here. Blocks."""
        found: Counter[str] = Counter()
        for lane, delivery in self.deliveries().items():
            with contextlib.suppress(StateError, SpoolError):
                name = spool_of(lane)
                totals = delivery.totals({name: delivery.reader.last_seq(name)})
                found.update({backend: one.pending for backend, one in totals.items()})
        return dict(found)

    def wake(self) -> None:
        """Records of ours are in the database."""
        for delivery in self.deliveries().values():
            delivery.wake()

    async def ask(self, wish: Wish) -> Asked:
        """Have something done on every lane, by whoever holds it."""
        try:
            return await ask(self._leasing, {**wish, "by": sidecar_of(self.me)})
        except PostgresError as error:
            return Asked(errors=[f"the lanes cannot be asked: {error}"])

    # --- inside -----------------------------------------------------------------------------------

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        next_round = 0.0
        while True:
            try:
                if not self._prepared:
                    await self.prepare()
                if loop.time() >= next_round:
                    next_round = loop.time() + RENEW_S
                    begun_s = _clock_s()
                    held = await self._leases.renew()
                    self._renewed_s = begun_s  # the leases run from before the answer came
                    self._follow(held)
                    self._follow(await self._leases.take())
                    await self._give_back()
                await self._look()
                self._say("")
                await asyncio.sleep(LOOK_S)
            except PostgresError as error:
                self._say(str(error))
                await asyncio.sleep(TROUBLE_S)
            except Exception as error:
                # A mistake of ours: nothing may be held that nobody renews, and the next round may do better.
                log.exception("a round of the lanes failed")
                self._say(f"a mistake of ours ({type(error).__name__}), see the log")
                self._follow({})
                await asyncio.sleep(TROUBLE_S)

    async def _give_back(self) -> None:
        """Let others have their share, in a while: what is under way ends first, and the lease is renewed meanwhile."""

        async def give(led: _Led) -> None:
            try:
                await self._end(led, REST_S)
                await self._leases.release(led.held)
            except PostgresError as error:
                facts = {"lane": led.held.lane}
                log.warning("a lane could not be given back yet: %s", error, extra={"facts": facts})

        for lane in await self._leases.surplus():
            led = self._led.get(lane)
            if led is not None and not led.leaving:
                led.leaving = True
                task = asyncio.create_task(give(led))
                self._giving.add(task)
                task.add_done_callback(self._giving.discard)

    def _is_late(self) -> bool:
        return _clock_s() - self._renewed_s > LATE_S

    async def _watch(self) -> None:
        """Cut off what nobody has renewed, also while the renewing waits for a database that hangs."""
        while True:
            await asyncio.sleep(LOOK_S)
            if self._is_late():
                self._follow({})

    def _follow(self, held: Mapping[int, Held]) -> None:
        """Work on what is held, and on nothing else."""
        for lane, led in list(self._led.items()):
            if held.get(lane) != led.held:
                del self._led[lane]
                self._cut(led)
        for lane, one in held.items():
            if lane not in self._led:
                led = self._led[lane] = _Led(one)
                led.task = asyncio.create_task(self._lead(led, frozenset(self._ending[lane])))

    def _cut(self, led: _Led) -> None:
        """End the work on a lane, and wait for nothing: no request is under way in a moment. What is being stored ends
        by itself, in as long as a database that hangs takes, and the epoch decides about it."""
        task, ending = led.task, self._ending[led.held.lane]
        if led.over or task is None:
            return
        led.over = True
        ending.add(task)
        task.add_done_callback(ending.discard)
        task.cancel()

    async def _end(self, led: _Led, rest_s: float, end_s: float | None = None) -> None:
        """Stop working on a lane. `rest_s`: what is under way may end within this time. `end_s`: what is being stored
        is waited for no longer."""
        if rest_s and led.delivery is not None and not led.over:
            await led.delivery.rest(rest_s)
        self._cut(led)
        if led.task is not None:
            await asyncio.wait({led.task}, timeout=end_s)
        if self._led.get(led.held.lane) is led:  # not before: a round meanwhile would begin anew on what is given back
            del self._led[led.held.lane]

    async def _lead(self, led: _Led, before: Collection[asyncio.Task[None]]) -> None:
        """Work on a lane until somebody ends it. What fails is begun anew, from what is stored. `before`: what worked
        on it under an earlier lease and is not quite over."""
        if before:
            await asyncio.wait(before)
        while not led.over:  # what fails while it is ended would hide the end
            try:
                await self._work(led)
            except (StateError, SpoolError, PostgresError, ExceptionGroup) as error:
                facts = {"lane": led.held.lane}
                log.error("a lane rests and is begun anew: %s", _reason(error), extra={"facts": facts})
            except Exception:  # nobody waits for this task: it would be a lane that is held and not worked on
                log.exception("a lane rests and is begun anew", extra={"facts": {"lane": led.held.lane}})
            await asyncio.sleep(TROUBLE_S)

    async def _work(self, led: _Led) -> None:
        """Deliver, for as long as the lane is held."""
        lane = led.held.lane
        async with contextlib.AsyncExitStack() as stack:
            store = await asyncio.to_thread(lambda: DeliveryStore(LaneDatabase(self._shared, led.held)))
            stack.push_async_callback(asyncio.to_thread, store.close)
            backends = self.make()
            for backend in backends:
                stack.push_async_callback(backend.aclose)
            delivery = Delivery(
                reader=LaneReader(self._shared, lane),
                store=store,
                backends=backends,
                metrics=self.metrics,
                clock=SystemClock(),
                limits=OF_A_LANE,
                skip_gaps=self.skip_gaps,
                may_send=lambda: not (led.over or self._is_late()),
            )
            await stack.enter_async_context(delivery)
            led.delivery = delivery
            stack.callback(setattr, led, "delivery", None)
            offering = asyncio.create_task(delivery.offer_mapped())  # the mapping may be another one by now
            stack.callback(offering.cancel)
            delivery.wake()
            while True:
                await asyncio.sleep(FORGET_S)
                upto = await asyncio.to_thread(self._forgotten, delivery, lane)
                if upto:
                    await delivery.forget({spool_of(lane): upto})

    def _forgotten(self, delivery: Delivery, lane: int) -> int:
        """The number up to which nothing is remembered any more: delivered, and older than retention. Blocks."""
        before = datetime.now(UTC) - timedelta(seconds=self.retention_s)
        done = delivery.retired_upto().get(spool_of(lane), 0)
        return min(done, LaneReader(self._shared, lane).last_before(before))

    async def _look(self) -> None:
        """Wake the lanes that have grown, and find what is wished of them."""
        if not self._led:
            return
        async with self._leasing.transaction(read_only=True) as db:
            lanes = list(self._led)
            grown = await db.fetch("SELECT lane, last_seq FROM metering.lanes WHERE lane = ANY($1)", lanes)
            wished = await asked_of(db, lanes)
        for lane, last_seq in grown:
            led = self._led.get(lane)
            if led is not None and led.delivery is not None and led.last_seq != last_seq:
                led.last_seq = last_seq
                led.delivery.wake()
        for id_, lane, wish in wished:
            led = self._led.get(lane)
            if led is not None and led.delivery is not None and id_ not in self._granting:
                task = self._granting[id_] = asyncio.create_task(self._grant(id_, lane, led.delivery, wish))
                task.add_done_callback(lambda _, id_=id_: self._granting.pop(id_, None))  # type: ignore[misc]

    async def _grant(self, id_: int, lane: int, delivery: Delivery, text: str) -> None:
        if self._is_late():
            return  # it is found again, by whoever holds the lane then
        wish: Wish = {}
        try:
            wish = orjson.loads(text)
            told = await grant(wish, delivery, delivery.backends)
        except (LookupError, TypeError, ValueError, StateError, SpoolError) as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        facts = {"lane": lane, "by": wish.get("by"), "asked": text[:LOGGED_CHARS_MAX]}
        if isinstance(told, dict) and "error" in told:
            log.warning("what was asked of a lane could not be done: %s", told["error"], extra={"facts": facts})
        elif has_changed(told):
            log.info("%s", wish.get("do"), extra={"facts": facts})
        try:
            async with self._leasing.transaction() as db:
                await answer(db, id_, told)
        except PostgresError as error:
            log.warning("what came of a change that was asked for could not be told: %s", error)

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self.trouble:
            log.error("nothing is delivered while the database is away: %s", trouble)
        elif self.trouble and not trouble:
            log.info("lanes are delivered again")
        self.trouble = trouble


def _worse(one: BackendStatus, other: BackendStatus) -> BackendStatus:
    """Both lanes' as one."""
    order = ("up", "paused", "down", "blocked")
    first = max(one, other, key=lambda status: order.index(status.state))
    ages = [age for age in (one.oldest_pending_s, other.oldest_pending_s) if age is not None]
    return replace(
        first,
        oldest_pending_s=max(ages, default=None),
        sealed=one.sealed + other.sealed,
        under_way=one.under_way + other.under_way,
        waiting_records=one.waiting_records + other.waiting_records,
        waiting_bytes=one.waiting_bytes + other.waiting_bytes,
        paused_s=max(one.paused_s, other.paused_s),
    )


def _reason(error: BaseException) -> str:
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return said_by(error)
