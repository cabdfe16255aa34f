"""Who the processes that serve ask: the one that holds the counters, in the process that meters.

It answers a question in one step over all limits of the call. Where it would deny because others hold leases, it asks
those first what they really hold (`tell`), and decides again when they have said it: so a limit is used to its last
call and never beyond.

Where others are asked too, each call is asked for here, and they are asked first: what they say and what the
limits say is decided in one step, without an `await` in between. Nothing is leased then, and what a call holds of a
vendor's answer is known by the call's id until its record is there.

Where sidecars share their limits, a call is let in out of what this one holds a lease of, and where that does not
suffice the question waits until more is leased (`Fleet`). What cannot be leased is left undecided, and
`SIDECAR_GATE_ON_FAILURE` decides where the call is.

It begins with nothing. `load` gives it what the records say, those that serve tell what their open calls hold, and
until both is there questions wait. A record that arrives meanwhile is settled at once: what is loaded is added to it.
"""

from __future__ import annotations

import logging
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, NamedTuple, Protocol

from sidecar.gate import answers
from sidecar.gate.answers import NOBODY_ASKED, Freshness
from sidecar.gate.counters import (
    ALLOWED,
    DENIED,
    SHADOW,
    SWEEP_S,
    UNDECIDED,
    Counter,
    Counters,
    Decision,
    Need,
    Row,
)
from sidecar.gate.estimate import Outputs
from sidecar.gate.limits import PICO, Charge, Charging, Facts
from sidecar.gate.protocol import LIMITS, ON_FAILURE, Question, Ruling, Spoken, Used
from sidecar.gate.sources.base import Caller
from sidecar.gate.windows import moment
from sidecar.meters.definition import Meter
from sidecar.model.exchange import Exchange
from sidecar.model.record import Record

log = logging.getLogger("sidecar.gate")

RECALL_S: Final = 0.25  # a process that has not told by then is taken for holding all that it was granted
ROUNDS_MAX: Final = 2  # of asking the others for one question
LIMIT_CHARS_MAX: Final = 120  # of what a vendor calls a limit: it gets into records


class Process(Protocol):
    """A process that serves, as far as it is spoken to."""

    def answer(self, payload: tuple[Any, ...]) -> None: ...
    def please_tell(self) -> None: ...


class Handle(Protocol):
    def cancel(self) -> None: ...


class Others(Protocol):
    """Those outside, as `sidecar.gate.asking.Asking` is."""

    def decide(self, caller: Caller, *, final: bool = False) -> answers.Decision | None: ...
    def when_answered(self, caller: Caller, then: Callable[[], None]) -> None: ...
    def began(self, call_id: str, caller: Caller, estimate: Mapping[str, int]) -> None: ...
    def ended(self, call_id: str, caller: Caller, used: Callable[[str, int], int]) -> None: ...
    def died(self, is_of: Callable[[str], bool]) -> int: ...


class Fleet(Protocol):
    """What leases from all that share these limits, as `sidecar.gate.fleet.SharedCounters` does."""

    def ask(self, lacking: Sequence[tuple[Counter, int]], then: Callable[[bool], None]) -> bool: ...
    def soon(self, low: Sequence[Counter]) -> None: ...


@dataclass(slots=True, eq=False)
class _Asked:
    """A question of a process. `caller`: None: only limits are asked. `void`: its call has ended meanwhile, or it is
    asked anew."""

    process: str
    question: Question
    caller: Caller | None
    rounds: int = 0
    waited: bool = False  # for those outside
    leased: bool = False  # it was tried to lease what it needs
    void: bool = False


@dataclass(slots=True)
class _Known:
    """A process that is connected."""

    speaks: Process
    answers: int = 0  # the number of the last one
    granted: deque[tuple[int, dict[str, int]]] = field(default_factory=deque)  # since it last told


class Owner:
    """Decides what the processes that serve cannot decide alone, and holds the counters, in the metering process."""

    def __init__(
        self,
        charging: Charging,
        *,
        dry_run: bool,
        clock_ns: Callable[[], int],
        call_later: Callable[[float, Callable[[], None]], Handle],
        others: Others | None = None,
        units: Mapping[str, Meter | None] | None = None,
        shared: Callable[[], float] | None = None,
    ) -> None:
        """`others`: who else is asked. `units`: in which they count down, each with its meter. `shared`: limits are
        shared with other sidecars (by `fleet`, once there is one); the clock of their leases, in seconds."""
        self._charging = charging
        self._dry_run = dry_run
        self._clock_ns = clock_ns
        self._call_later = call_later
        self._others = others
        self._units = units or {}
        self.counters = Counters(charging.limits, dry_run=dry_run, leases=others is None, reached=_say, shared=shared)
        self._is_shared = shared is not None
        self.fleet: Fleet | None = None
        self._leasing: set[_Asked] = set()
        self.unanswered: Tally[tuple[str, ...]] = Tally()
        """Decisions without an answer that is believed, by (source, decision, why; `last`: by an old one)."""
        self._outputs = Outputs()
        self._known: dict[str, _Known] = {}
        self._waiting: list[_Asked] = []
        self._outside: dict[str, _Asked] = {}  # by call: what is not decided yet where others are asked
        self._untold: set[str] = set()  # who was asked to tell and has not yet
        self._timer: Handle | None = None
        self._loaded = False
        self._latest_ns = 0  # that the clock has said
        self._sweeper: Handle | None = call_later(SWEEP_S, self._sweep)

    def _now_ns(self) -> int:
        """What the clock says. Where it was set back the counters are told."""
        now_ns = self._clock_ns()
        if now_ns < self._latest_ns:
            self.counters.set_back(now_ns)
        self._latest_ns = now_ns
        return now_ns

    def close(self) -> None:
        for timer in (self._timer, self._sweeper):
            if timer is not None:
                timer.cancel()
        self._timer = self._sweeper = None

    # -- who there is ----------------------------------------------------------------------------

    def came(self, process: str, speaks: Process) -> None:
        """It is connected, for the first time or again."""
        self._known[process] = _Known(speaks)
        if self._loaded:
            self._recall([process])

    def left(self, process: str) -> None:
        """Its connection is gone. What it holds it holds, until it tells, or has died."""
        self._known.pop(process, None)
        self._waiting = [asked for asked in self._waiting if asked.process != process]
        for asked in self._leasing:
            asked.void = asked.void or asked.process == process
        for call_id, asked in list(self._outside.items()):
            if asked.process == process:  # it asks anew when it is here again
                asked.void = True
                del self._outside[call_id]
        self._heard(process)

    def died(self, process: str, left_open: Iterable[bytes]) -> None:
        """It is no more. `left_open`: the lines of its calls that become records with outcome `unknown`."""
        self._known.pop(process, None)
        try:
            for line in left_open:
                try:
                    self.settle(exchange_of(Record.from_json(line)))
                except Exception as error:  # noqa: BLE001 - one odd record must not stop the others
                    log.error("a call that was left open could not be counted: %s", type(error).__name__)
        finally:
            self.counters.gone(process)
        if self._others is not None:
            self._others.died(lambda call_id: process_of(call_id) == process)
        self._heard(process)

    # -- what they say ---------------------------------------------------------------------------

    def ask(self, process: str, payload: Sequence[Any]) -> None:
        """A process asks for a call; what is found out is sent to it, at once or later. `payload`: a `Question`, as it
        came."""
        question = Question.read(payload)
        asker, caller = question.asker, None
        if asker is not None and self._others is not None:
            caller = Caller(
                subscriber=asker.subscriber,
                model=question.model,
                provider=asker.provider,
                dimensions=dict(asker.dimensions),
            )
        asked = _Asked(process, question, caller)
        if asker is not None and caller is not None:
            self._outside[asker.id] = asked
        self._next(asked)

    def _next(self, asked: _Asked) -> None:
        if not self._loaded or self._untold:
            self._waiting.append(asked)
        else:
            self._decide(asked)

    def told(self, process: str, payload: Sequence[Any]) -> None:
        """What its open calls hold, as of the last answer that it had heard: what was granted since comes on top."""
        seen, sums = payload
        known = self._known.get(process)
        if known is None:
            return
        sums = dict(sums)
        while known.granted and known.granted[0][0] <= seen:
            known.granted.popleft()
        for _, granted in known.granted:
            for key, amount in granted.items():
                sums[key] = sums.get(key, 0) + amount
        self.counters.holding(process, sums, self._now_ns())
        self._heard(process)

    def settle(self, call: Exchange) -> None:
        """A call has ended, and its record is about to be written."""
        self._outputs.ended(call)
        charges = self._charging.charges(call)
        if charges:
            self.counters.settle(process_of(call.id), charges, call.started_ns, self._now_ns())
        if self._others is not None:
            self._settle_outside(self._others, call)

    def _settle_outside(self, others: Others, call: Exchange) -> None:
        asked = self._outside.pop(call.id, None)
        if asked is not None:
            asked.void = True  # its client left, or it was decided without us: it must not hold anything from here on
        usage = call.usage
        caller = Caller(
            subscriber=None if call.subscriber is None else call.subscriber.id,
            model=None if usage is None else usage.request_model or usage.model,
            provider=None if usage is None else usage.provider,
            dimensions=call.dimensions,
        )
        others.ended(call.id, caller, lambda unit, held: self._charging.used(unit, self._units.get(unit), call, held))

    def load(self, found: Counters, outputs: Outputs | None = None) -> None:
        """What the records say that were there before this life. From here on questions are answered."""
        self.counters.absorb(found)
        self.counters.set_back(self._now_ns())
        self.counters.sweep(self._now_ns())  # for what the clock says, should it be ahead by the first minute's end
        if outputs is not None:
            outputs.follow(self._outputs)
            self._outputs = outputs
        self._loaded = True
        self._recall(list(self._known))
        self._go_on()

    @property
    def loaded(self) -> bool:
        return self._loaded

    def rows(self) -> list[Row]:
        return self.counters.rows(self._now_ns())

    # -- deciding --------------------------------------------------------------------------------

    def _decide(self, asked: _Asked) -> None:
        known = self._known.get(asked.process)
        if known is None or asked.void:
            return
        said = self._said(asked)
        if said is None:
            return
        question = asked.question
        decision = Decision(ALLOWED)
        self._now_ns()
        if said.allowed or self._dry_run:
            # While new settings come into force it may ask for limits that are no more.
            needs = [need for need in question.needs if need.limit in self.counters.limits]
            if self._is_shared and self._lease(known, asked, needs):
                return
            decision = self.counters.decide(asked.process, needs, question.at_ns)
            if decision.decision == DENIED and decision.leased_to and asked.rounds < ROUNDS_MAX:
                asked.rounds += 1
                self._waiting.append(asked)
                self._recall(decision.leased_to)
                if not self._untold:
                    self._go_on()
                return
            if self.fleet is not None and (low := self.counters.low(needs, question.at_ns)):
                self.fleet.soon(low)
        self._answer(known, asked, said, decision)

    def _lease(self, known: _Known, asked: _Asked, needs: Sequence[Need]) -> bool:
        """Whether the question has to wait for a lease, or stays undecided since there can be none."""
        lacking = () if asked.leased else self.counters.lacking(needs, asked.question.at_ns)
        if not lacking:
            return False
        asked.leased = True
        self._leasing.add(asked)

        def then(answered: bool) -> None:
            self._leasing.discard(asked)
            if answered:
                self._next(asked)
            elif (now_known := self._known.get(asked.process)) is not None and not asked.void:
                self._undecided(now_known, asked)

        if self.fleet is None or not self.fleet.ask(lacking, then):
            self._leasing.discard(asked)
            self._undecided(known, asked)
        return True

    def _undecided(self, known: _Known, asked: _Asked) -> None:
        question = asked.question
        if question.asker is not None:
            self._outside.pop(question.asker.id, None)
        known.answers += 1
        known.speaks.answer(
            Ruling(
                known.answers,
                question.number,
                self._outputs.usual(question.model),
                UNDECIDED,
                shift_ns=self.counters.shift_ns,
            ).plain()
        )

    def _said(self, asked: _Asked) -> answers.Decision | None:
        """What those outside say; None: they are being asked, and it goes on from there."""
        caller, others = asked.caller, self._others
        if caller is None or others is None:
            return NOBODY_ASKED
        # A dry run must not cost anybody time.
        said = others.decide(caller, final=asked.waited or self._dry_run)
        if said is None:
            asked.waited = True
            others.when_answered(caller, lambda: self._next(asked))
        return said

    def _answer(self, known: _Known, asked: _Asked, said: answers.Decision, decision: Decision) -> None:
        question, asker = asked.question, asked.question.asker
        word, limit, source, age_s = together(said, decision, dry_run=self._dry_run)
        if asker is not None and asked.caller is not None and self._others is not None:
            self._outside.pop(asker.id, None)
            if said.freshness is not Freshness.FRESH:
                why = said.reason if said.freshness is Freshness.NONE else said.freshness.value
                self.unanswered[said.source, word, why] += 1
            if word != DENIED:
                self._others.began(asker.id, asked.caller, asker.amounts)
        known.answers += 1
        granted = dict(decision.held)
        for key, amount in decision.more.items():
            granted[key] = granted.get(key, 0) + amount
        if granted:
            known.granted.append((known.answers, granted))
        spoken = amounts = None
        if word == DENIED and source == LIMITS:
            amounts = self._used(limit, question)
        elif word == DENIED:
            why = f" ({said.reason})" if said.reason else ""
            spoken = Spoken(*answers.told(said), f"denied by {said.source}{why}")
        known.speaks.answer(
            Ruling(
                known.answers,
                question.number,
                self._outputs.usual(question.model),
                word,
                limit,
                source,
                age_s,
                decision.held,
                decision.more,
                decision.full,
                decision.retry_after_s,
                spoken,
                amounts,
                self.counters.shift_ns,
            ).plain()
        )

    def _used(self, limit: str | None, question: Question) -> Used | None:
        row = self.counters.row(limit or "", question.needs, question.at_ns)  # of a limit that denies, so it is there
        if row is None:
            return None
        text = row.limit.text
        return Used(text(row.used + row.reserved), text(row.limit.amount), row.limit.unit, moment(row.until_ns))

    def _recall(self, processes: Iterable[str]) -> None:
        for process in processes:
            known = self._known.get(process)
            if known is not None and process not in self._untold:
                self._untold.add(process)
                known.speaks.please_tell()
        if self._untold and self._timer is None:
            self._timer = self._call_later(RECALL_S, self._waited)

    def _waited(self) -> None:
        self._timer = None
        self._untold.clear()
        self._go_on()

    def _heard(self, process: str) -> None:
        self._untold.discard(process)
        self._go_on()

    def _go_on(self) -> None:
        if self._untold or not self._loaded:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        waiting, self._waiting = self._waiting, []
        for asked in waiting:
            self._decide(asked)

    def _sweep(self) -> None:
        self._sweeper = self._call_later(SWEEP_S, self._sweep)  # first: a fault below must not be the last look
        self.counters.sweep(self._now_ns())


def together(said: answers.Decision, decision: Decision, *, dry_run: bool) -> tuple[str, str | None, str, float]:
    """What holds of what those outside say and what the limits say: the decision, the limit that denies or would, who
    said so, and how old that is. `decision` is of no weight where those outside deny."""
    source = ON_FAILURE if said.freshness is Freshness.NONE else said.source
    age_s = round(said.age_s or 0.0, 1)
    if not said.allowed and not dry_run:
        return DENIED, (said.limit or said.source)[:LIMIT_CHARS_MAX], source, age_s
    if decision.decision != ALLOWED:
        return decision.decision, decision.limit, LIMITS, 0.0
    if said is NOBODY_ASKED:
        return ALLOWED, None, LIMITS, 0.0
    would = said.shadow if said.allowed else said.limit or said.source
    if would is not None:
        return SHADOW, would[:LIMIT_CHARS_MAX], source, age_s
    return ALLOWED, None, source, age_s


def process_of(call_id: str) -> str:
    """Who gave this id: what it ends with (`model.record_id`)."""
    return call_id[-12:]


def count_records(
    lines: Iterable[bytes], charging: Charging, wanted: Callable[[Record], bool], outputs: Outputs | None = None
) -> Counters:
    """The counters as these records leave them. Lines that are no records are passed over: what is damaged is told by
    whoever delivers it. One in which something is odd is left out alone, and said. `outputs`: told what responses
    had."""
    counters = Counters(charging.limits)
    odd: Tally[str] = Tally()
    for line in lines:
        try:
            record = Record.from_json(line)
        except ValueError:
            continue
        try:
            if wanted(record):
                call = exchange_of(record)
                counters.settle("", charging.charges(call), call.started_ns)
                if outputs is not None:
                    outputs.ended(call)
        except Exception as error:  # noqa: BLE001 - likewise
            odd[type(error).__name__] += 1
    if odd:
        log.error(
            "records that could not be counted are left out of what was used of the limits",
            extra={"facts": {"records": odd.total(), "why": ", ".join(odd)}},
        )
    return counters


class Hour(NamedTuple):
    """What calls of one kind consumed in one hour, as the ledger has it. `refused`: their status was 400 or above."""

    start_ns: int
    facts: Facts
    calls: int
    with_usage: int
    refused: bool
    input_tokens: int
    output_tokens: int
    total_tokens: int
    cost_usd: Decimal


def count_hours(hours: Iterable[Hour], charging: Charging) -> Counters:
    """The counters as these hours leave them, for records that are there no more. Of keys, models, dimensions and
    meters the hours say nothing; of calls whose usage stayed unknown they have what was seen."""
    counters = Counters(charging.limits)
    for hour in hours:
        # One of 400 or above without usage consumed nothing.
        calls = min(hour.calls, hour.with_usage) if hour.refused else hour.calls
        amounts = {
            "calls": calls,
            "input_tokens": hour.input_tokens,
            "output_tokens": hour.output_tokens,
            "total_tokens": hour.total_tokens,
            "cost_usd": int(hour.cost_usd * PICO),
        }
        charges = []
        for limit in charging.limits:
            scope = limit.scope_of(hour.facts) if limit.in_hours else None
            if scope is not None and (amount := amounts.get(limit.unit, 0)):
                charges.append(Charge(limit, limit.key(scope, hour.start_ns), scope, amount, 0))
        counters.settle("", charges, hour.start_ns)
    return counters


def exchange_of(record: Record) -> Exchange:
    """The call as its record tells it, as far as it is counted by that."""
    return Exchange(
        id=record.id,
        parent_id=record.parent_id,
        started_ns=round(record.started_s * 1e6) * 1000,
        first_byte_ms=record.first_byte_ms,
        duration_ms=record.duration_ms,
        method=record.method,
        url=record.url,
        route=record.route,
        status=record.status,
        outcome=record.outcome,
        request_bytes=record.request_bytes,
        response_bytes=record.response_bytes,
        subscriber=record.subscriber,
        dimensions=record.dimensions,
        usage=record.usage,
        cost=record.cost,
        gate=record.gate,
    )


def _say(counter: Counter, percent: int) -> None:
    limit = counter.limit
    facts: Mapping[str, object] = {
        "limit": limit.name,
        "scope": counter.scope,
        "percent": percent,
        "amount": limit.text(limit.amount),
        "unit": limit.unit,
    }
    log.warning("a limit is %s", "used up" if percent >= 100 else f"at {percent} %", extra={"facts": facts})
