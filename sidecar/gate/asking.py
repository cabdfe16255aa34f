"""Asks the sources and remembers what they said, so that no call waits for a vendor whose answer is at hand.

`decide` is a look-up. Only who has never been asked for, or not for longer than an answer is believed, makes its
first call wait, for one question that all calls of the same subscriber share. While calls come, an answer is renewed
before it ends; a denied subscriber is asked for by a timer of its own, because it stops calling; a list of rules is
polled. Where a question gets no answer, no further call waits for the next: the operator's `SIDECAR_GATE_ON_FAILURE`
decides at once, and the question is put again in the background, ever more seldom. A source that failed several times
in a row is *down*: nobody waits for it, and one question at a time finds out whether it is back.

Everything here runs in one event loop. What only decides stands in `sidecar.gate.answers`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, time
from typing import Final, Self

from sidecar.gate import answers
from sidecar.gate.answers import NOBODY_ASKED, Ages, Decision, Entry, Freshness, OnFailure, Standing
from sidecar.gate.remembered import read, recalled, written
from sidecar.gate.sources.base import Caller, NoAnswer, Source
from sidecar.settings import AskedSettings
from sidecar.storage.files import write_file

log = logging.getLogger(__name__)

ASKS_AT_ONCE: Final = 16  # questions on the wire to one source
WAITING_MAX: Final = 1000  # questions to one source that are under way or wait their turn; beyond it none is begun
DOWN_AFTER: Final = 3  # failures in a row, of whatever subjects
OPEN_MAX: Final = 200_000  # calls whose estimate is held by their id, of all processes: each may have 20,000
PROBE_S: Final = 1.0  # between two questions to a source that is down, doubled with each,
PROBE_S_MAX: Final = 30.0  # up to this
SAVE_S: Final = 10.0  # between two writings of what was said: so much of it a kill loses
EVICTION_LOOKS: Final = 16  # of the least used entries, for one that nothing holds


Used = Callable[[str, int], int]
"""How much a call did use of a unit, given how much of it was held back; money in pico-USD, meters in millionths."""


@dataclass(slots=True)
class Hold:
    """What a call that was let through holds back, until it is settled or released; once, whatever happens."""

    parts: list[tuple[Entry, str, int]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceStatus:
    """How a source stands, for `/readyz` and metrics."""

    name: str
    down: bool
    reason: str  # of the last failure; empty while it answers
    failures: int  # in a row
    subjects: int  # that are remembered
    under_way: int  # questions
    unread: int  # rules that nobody here understands


@dataclass(slots=True)
class _Asked:
    """One source, and all that is known from it."""

    source: Source
    turn: asyncio.Semaphore
    entries: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    flights: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict)
    failures: int = 0
    reason: str = ""
    probe_s: float = 0.0

    @property
    def down(self) -> bool:
        return self.failures >= DOWN_AFTER


class Asking:
    """The sources of one process. Open it as a context; `questions` is for metrics: by (source, `answered` or why not).

    `on_failure`: `open`, `closed` or `last`. `memory`: the file in which `last` finds after a restart what was said.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        settings: AskedSettings,
        *,
        on_failure: str = OnFailure.OPEN,
        ages: Ages | None = None,
        memory: Path | None = None,
        mono: Callable[[], float] = monotonic,
        wall: Callable[[], float] = time,
    ) -> None:
        self.questions: Counter[tuple[str, ...]] = Counter()
        self._ages = ages or Ages.of(settings, on_failure)
        self._timeout_s = settings.gate_timeout
        self._subjects_max = settings.gate_subscribers
        self._mono, self._wall = mono, wall
        self._asked = [_Asked(source, asyncio.Semaphore(ASKS_AT_ONCE)) for source in sources]
        self._open: dict[str, Hold] = {}
        self._waits: set[asyncio.Task[None]] = set()
        self.not_held = 0
        self._closed = False
        self._memory = memory
        self._said = 0  # answers
        self._saver: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        if self._memory is not None and self._ages.on_failure is OnFailure.LAST:
            await self._recall(self._memory)
            self._saver = asyncio.get_running_loop().create_task(self._save_by_time(self._memory))
        elif self._memory is not None:
            with suppress(OSError):
                self._memory.unlink(missing_ok=True)  # of when `last` was set: nobody reads it any more
        for asked in self._asked:
            if asked.source.polled_s is not None and (entry := self._entry(asked, Caller(subscriber=None))) is not None:
                self._on_time(asked, entry)  # soon, where what is remembered is too new to be asked for at once
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closed = True
        tasks = [*self._waits, *(task for asked in self._asked for task in asked.flights.values())]
        for asked in self._asked:
            for timer in asked.timers.values():
                timer.cancel()
            asked.timers.clear()
        for task in tasks:
            task.cancel()
        if self._saver is not None:
            self._saver.cancel()
            tasks.append(self._saver)
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._saver is not None and self._memory is not None:
            await self._save(self._memory)
        for asked in self._asked:
            await asked.source.aclose()

    # -- over a restart

    async def _recall(self, path: Path) -> None:
        """What was said in a life before this one: for where nobody answers now, never in the place of a question."""
        try:
            found = read(await asyncio.to_thread(path.read_bytes))
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("what the gate was told before this start cannot be read: %s", error.strerror)
            return
        now_s, wall_s = self._mono(), self._wall()
        for asked in self._asked:
            for one in found.get(asked.source.name, ())[-self._subjects_max :]:
                age_s = wall_s - one.answered_s
                answer = recalled(one.said) or asked.source.recalled(one.said)
                if answer is not None and 0 <= age_s <= self._ages.last_s:
                    entry = asked.entries[one.subject] = Entry(one.subject, answer)
                    entry.answered_s = entry.believed_s = now_s - age_s
                    if answer.until_s is not None:
                        entry.until_s = now_s + (answer.until_s - wall_s)

    async def _save_by_time(self, path: Path) -> None:
        saved = 0
        while True:
            await asyncio.sleep(SAVE_S)
            if saved != self._said:
                saved = self._said
                await self._save(path)

    async def _save(self, path: Path) -> None:
        known = [(asked.source, asked.entries.values()) for asked in self._asked]
        data = written(known, now_s=self._mono(), wall_s=self._wall())
        try:
            await asyncio.to_thread(write_file, path, data)
        except OSError as error:
            log.warning("what the gate was told cannot be kept for a restart: %s", error.strerror)

    # -- on the way of a call

    def decide(self, caller: Caller, *, final: bool = False) -> Decision | None:
        """Whether a call may be made, by what is at hand; None: somebody must be asked first (`wait`).

        `final`: nobody is waited for, so it is never None."""
        chosen, must_ask = NOBODY_ASKED, False
        for asked in self._asked:
            found = self._of_one(asked, caller, final=final)
            if found is None:
                must_ask = True
            elif not found.allowed:
                chosen = found
                break
            else:
                chosen = found if chosen is NOBODY_ASKED else _stalest(chosen, found)
        # The others were asked in the same turn: one that says no meanwhile need not be waited for.
        return None if must_ask and chosen.allowed else chosen

    async def wait(self, caller: Caller) -> None:
        """For one question to each source that has to be asked, no longer than the time limit."""
        flights = {flight for asked in self._asked if (flight := self._missing(asked, caller)) is not None}
        if flights:
            await asyncio.wait(flights, timeout=self._timeout_s)

    def when_answered(self, caller: Caller, then: Callable[[], None]) -> None:
        """Call `then` once nobody has to be waited for any more (`wait`); never where this is closed before."""

        async def waited() -> None:
            await self.wait(caller)
            if not self._closed:
                then()

        task = asyncio.get_running_loop().create_task(waited())
        self._waits.add(task)
        task.add_done_callback(self._waits.discard)

    def reserve(self, caller: Caller, estimate: Mapping[str, int]) -> Hold:
        """Hold back what a call that was let through may use, by unit: money in pico-USD, meters in millionths."""
        hold, wall_s = Hold(), self._wall()
        for asked in self._asked:
            entry = self._known(asked, caller)
            if entry is not None and asked.source.unit is not None:
                amount = answers.reservation(entry, asked.source, caller, estimate, wall_s)
                entry.reserved += amount
                entry.holds += 1
                hold.parts.append((entry, asked.source.unit, amount))
        return hold

    def settle(self, hold: Hold, used: Used) -> None:
        """What the call did use in the place of what it held back. A second time does nothing."""
        now_s = self._mono()
        parts, hold.parts = hold.parts, []
        for entry, unit, amount in parts:
            entry.reserved -= amount
            entry.holds -= 1
            entry.since.add(max(used(unit, amount), 0), now_s)

    def release(self, hold: Hold) -> None:
        """The call used nothing."""
        self.settle(hold, lambda unit, held: 0)

    def charge(self, caller: Caller, used: Used) -> None:
        """What a call used that held nothing back here, because it was let through before this process began."""
        now_s = self._mono()
        for asked in self._asked:
            entry = self._known(asked, caller)
            if entry is not None and asked.source.unit is not None:
                entry.since.add(max(used(asked.source.unit, 0), 0), now_s)

    # The same by the id of a call.

    def began(self, call_id: str, caller: Caller, estimate: Mapping[str, int]) -> None:
        """A call was let through: hold back its estimate until `ended`. Beyond a bound nothing is held, and counted."""
        if call_id in self._open:
            return
        if len(self._open) >= OPEN_MAX:
            if not self.not_held:
                log.warning("more than %d calls are open: what the others may need is not held back", OPEN_MAX)
            self.not_held += 1
            return
        self._open[call_id] = self.reserve(caller, estimate)

    def ended(self, call_id: str, caller: Caller, used: Used) -> None:
        """What it did use. A call that held nothing is charged all the same."""
        hold = self._open.pop(call_id, None)
        if hold is None:
            self.charge(caller, used)
        else:
            self.settle(hold, used)

    def died(self, is_of: Callable[[str], bool]) -> int:
        """A process is no more: what its calls (by their ids) held is free. How many those were."""
        gone = [call_id for call_id in self._open if is_of(call_id)]
        for call_id in gone:
            self.release(self._open.pop(call_id))
        return len(gone)

    def status(self) -> list[SourceStatus]:
        return [
            SourceStatus(
                name=asked.source.name,
                down=asked.down,
                reason=asked.reason,
                failures=asked.failures,
                subjects=len(asked.entries),
                under_way=len(asked.flights),
                unread=sum(getattr(entry.answer, "unread", 0) for entry in asked.entries.values())
                if asked.source.polled_s is not None
                else 0,
            )
            for asked in self._asked
        ]

    # -- one source

    def _of_one(self, asked: _Asked, caller: Caller, *, final: bool) -> Decision | None:
        subject = asked.source.subject(caller)
        if subject is None:
            return answers.without(asked.source, self._ages, "no_customer")
        entry = self._entry_of(asked, subject)
        if entry is None:
            return answers.without(asked.source, self._ages, "too_many_subscribers")
        now_s = self._mono()
        entry.used_s = now_s
        stands = answers.standing(entry, now_s)
        if stands is Standing.FRESH:
            return self._by_answer(asked, entry, caller, now_s)
        may_wait = stands is Standing.ABSENT and not final and (not asked.down or subject in asked.flights)
        if may_wait and self._ask(asked, entry) is not None:
            return None
        decision = answers.decide(entry, asked.source, caller, self._ages, now_s=now_s, wall_s=self._wall())
        self._ask(asked, entry)
        if decision.reason == answers.NOT_ASKED:
            return answers.without(asked.source, self._ages, self._why_not(asked, entry))
        return decision

    def _by_answer(self, asked: _Asked, entry: Entry, caller: Caller, now_s: float) -> Decision:
        """By an answer that is believed, and have it renewed in time."""
        source = asked.source
        decision = answers.by_answer(entry, source, caller, Freshness.FRESH, now_s=now_s, wall_s=self._wall())
        if source.polled_s is not None:
            return decision
        if not decision.allowed and not entry.denied:
            answers.deny(entry, self._ages)
            self._plan(asked, entry)
        if now_s >= entry.due_s:
            self._ask(asked, entry)
        return decision

    def _why_not(self, asked: _Asked, entry: Entry) -> str:
        if asked.down:
            return asked.reason
        return "timeout" if entry.subject in asked.flights else "too_many_questions"

    def _missing(self, asked: _Asked, caller: Caller) -> asyncio.Task[None] | None:
        entry = self._known(asked, caller)
        if entry is None or answers.standing(entry, self._mono()) is not Standing.ABSENT:
            return None
        return asked.flights.get(entry.subject)

    def _known(self, asked: _Asked, caller: Caller) -> Entry | None:
        subject = asked.source.subject(caller)
        return None if subject is None else asked.entries.get(subject)

    def _entry(self, asked: _Asked, caller: Caller) -> Entry | None:
        subject = asked.source.subject(caller)
        return None if subject is None else self._entry_of(asked, subject)

    def _entry_of(self, asked: _Asked, subject: str) -> Entry | None:
        """The entry of a subject, made where there is none; None where all that are remembered are in use."""
        entry = asked.entries.get(subject)
        if entry is not None:
            asked.entries.move_to_end(subject)
            return entry
        if len(asked.entries) >= self._subjects_max and not _evict(asked):
            return None
        entry = asked.entries[subject] = Entry(subject)
        return entry

    # -- questions

    def _ask(self, asked: _Asked, entry: Entry) -> asyncio.Task[None] | None:
        """The question that is under way for an entry, begun where it may be; None where it may not."""
        flight = asked.flights.get(entry.subject)
        if flight is not None or self._closed:
            return flight
        now_s = self._mono()
        if now_s < answers.may_ask_s(entry) or len(asked.flights) >= WAITING_MAX:
            return None
        if asked.down:
            if asked.flights or now_s < asked.probe_s:
                return None
            asked.probe_s = now_s + min(PROBE_S * 2.0 ** min(asked.failures - DOWN_AFTER, 10), PROBE_S_MAX)
        flight = asyncio.get_running_loop().create_task(self._question(asked, entry))
        asked.flights[entry.subject] = flight
        return flight

    async def _question(self, asked: _Asked, entry: Entry) -> None:
        source = asked.source
        try:
            async with asked.turn:
                asked_s = self._mono()
                try:
                    async with asyncio.timeout(self._timeout_s):
                        found = await source.ask(entry.subject)
                except TimeoutError:
                    found = NoAnswer("timeout")
                except Exception:  # a source that breaks must not take the gate along
                    log.exception("the gate's source %s failed to ask", source.name)
                    found = NoAnswer("fault")
            now_s = self._mono()
            if isinstance(found, NoAnswer):
                answers.miss(entry, found, now_s)
                self._failed(asked, found.reason, now_s)
            else:
                answers.take(entry, source, found, self._ages, asked_s=asked_s, now_s=now_s, wall_s=self._wall())
                self._answered(asked)
        finally:
            asked.flights.pop(entry.subject, None)
        self._plan(asked, entry)

    def _answered(self, asked: _Asked) -> None:
        self.questions[asked.source.name, "answered"] += 1
        self._said += 1
        if asked.down:
            log.warning("%s answers the gate again", asked.source.name)
        asked.failures, asked.reason = 0, ""

    def _failed(self, asked: _Asked, reason: str, now_s: float) -> None:
        self.questions[asked.source.name, reason] += 1
        asked.failures += 1
        asked.reason = reason
        if asked.failures == DOWN_AFTER:
            asked.probe_s = now_s + PROBE_S
            log.warning(
                "%s does not answer the gate (%s): calls go by SIDECAR_GATE_ON_FAILURE=%s",
                asked.source.name,
                reason,
                self._ages.on_failure,
            )

    def _plan(self, asked: _Asked, entry: Entry) -> None:
        """Set the timer of who is asked for without a call."""
        if (timer := asked.timers.pop(entry.subject, None)) is not None:
            timer.cancel()
        if self._closed or asked.entries.get(entry.subject) is not entry:
            return
        now_s = self._mono()
        at_s = answers.own_time_s(entry, asked.source, now_s)
        if at_s is not None:
            loop = asyncio.get_running_loop()
            asked.timers[entry.subject] = loop.call_later(max(at_s - now_s, 0.0), self._on_time, asked, entry)

    def _on_time(self, asked: _Asked, entry: Entry) -> None:
        asked.timers.pop(entry.subject, None)
        if self._ask(asked, entry) is None and not self._closed:
            wait_s = max(asked.probe_s - self._mono(), PROBE_S) if asked.down else PROBE_S
            loop = asyncio.get_running_loop()
            asked.timers[entry.subject] = loop.call_later(wait_s, self._on_time, asked, entry)


def _stalest(one: Decision, other: Decision) -> Decision:
    """Of two yeses the one that rests on less; with the first rule that would have said no."""
    order = (Freshness.NONE, Freshness.LAST, Freshness.FRESH)
    chosen = min(one, other, key=lambda each: order.index(each.freshness))
    return chosen._replace(shadow=one.shadow or other.shadow)


def _evict(asked: _Asked) -> bool:
    """Forget one of the longest unused that no call holds anything of and no question is about."""
    for number, (subject, entry) in enumerate(asked.entries.items()):
        if number >= EVICTION_LOOKS:
            return False
        if not entry.holds and subject not in asked.flights:
            del asked.entries[subject]
            if (timer := asked.timers.pop(subject, None)) is not None:
                timer.cancel()
            return True
    return False
