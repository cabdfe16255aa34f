"""Who the processes that serve ask: the one that holds the counters, in the process that meters.

It answers a question in one step over all limits of the call. Where it would deny because others hold leases, it asks
those first what they really hold (`tell`), and decides again when they have said it: so a limit is used to its last
call and never beyond.

It begins with nothing. `load` gives it what the records say, those that serve tell what their open calls hold, and
until both is there questions wait. A record that arrives meanwhile is settled at once: what is loaded is added to it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, NamedTuple, Protocol

from sidecar.gate.counters import DENIED, Counter, Counters, Need, Row
from sidecar.gate.estimate import Outputs
from sidecar.gate.limits import PICO, Charge, Charging, Facts
from sidecar.model.exchange import Exchange
from sidecar.model.record import Record

log = logging.getLogger("sidecar.gate")

RECALL_S: Final = 0.25  # a process that has not told by then is taken for holding all that it was granted
ROUNDS_MAX: Final = 2  # of asking the others for one question
SWEEP_S: Final = 60.0


class Process(Protocol):
    """A process that serves, as far as it is spoken to."""

    def answer(self, payload: tuple[Any, ...]) -> None: ...
    def please_tell(self) -> None: ...


class Handle(Protocol):
    def cancel(self) -> None: ...


@dataclass(slots=True)
class _Question:
    process: str
    number: int
    at_ns: int
    model: str | None
    needs: list[Need]
    rounds: int = 0


@dataclass(slots=True)
class _Known:
    """A process that is connected."""

    speaks: Process
    answers: int = 0  # the number of the last one
    granted: deque[tuple[int, dict[str, int]]] = field(default_factory=deque)  # since it last told


class Owner:
    def __init__(
        self,
        charging: Charging,
        *,
        dry_run: bool,
        clock_ns: Callable[[], int],
        call_later: Callable[[float, Callable[[], None]], Handle],
    ) -> None:
        self._charging = charging
        self._clock_ns = clock_ns
        self._call_later = call_later
        self.counters = Counters(charging.limits, dry_run=dry_run, reached=_say)
        self._outputs = Outputs()
        self._known: dict[str, _Known] = {}
        self._waiting: list[_Question] = []
        self._untold: set[str] = set()  # who was asked to tell and has not yet
        self._timer: Handle | None = None
        self._loaded = False
        self._sweeper: Handle | None = call_later(SWEEP_S, self._sweep)

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
        self._waiting = [question for question in self._waiting if question.process != process]
        self._heard(process)

    def died(self, process: str, left_open: Iterable[bytes]) -> None:
        """It is no more. `left_open`: the lines of its calls that become records with outcome `unknown`."""
        self._known.pop(process, None)
        for line in left_open:
            try:
                self.settle(exchange_of(Record.from_json(line)))
            except ValueError:
                log.exception("a call that was left open could not be counted")
        self.counters.gone(process)
        self._heard(process)

    # -- what they say ---------------------------------------------------------------------------

    def ask(self, process: str, payload: Sequence[Any]) -> None:
        number, at_ns, model, needs = payload
        question = _Question(process, number, at_ns, model, [Need(*need) for need in needs])
        if not self._loaded or self._untold:
            self._waiting.append(question)
        else:
            self._decide(question)

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
        self.counters.holding(process, sums, self._clock_ns())
        self._heard(process)

    def settle(self, call: Exchange) -> None:
        """A call has ended, and its record is about to be written."""
        usage = call.usage
        if usage is not None and usage.output_tokens is not None:
            model = usage.request_model or usage.model
            if model is not None:
                self._outputs.seen(model, usage.output_tokens)
        charges = self._charging.charges(call)
        if charges:
            self.counters.settle(process_of(call.id), charges, call.started_ns)

    def load(self, found: Counters) -> None:
        """What the records say that were there before this life. From here on questions are answered."""
        self.counters.absorb(found)
        self._loaded = True
        self._recall(list(self._known))
        self._go_on()

    @property
    def loaded(self) -> bool:
        return self._loaded

    def rows(self) -> list[Row]:
        return self.counters.rows(self._clock_ns())

    # -- deciding --------------------------------------------------------------------------------

    def _decide(self, question: _Question) -> None:
        known = self._known.get(question.process)
        if known is None:
            return
        try:
            decision = self.counters.decide(question.process, question.needs, question.at_ns)
        except KeyError:  # of a limit that this life does not know: it will hear of the new ones when it starts anew
            log.error("a process that serves asks for a limit that is not defined")
            return
        if decision.decision == DENIED and decision.leased_to and question.rounds < ROUNDS_MAX:
            question.rounds += 1
            self._waiting.append(question)
            self._recall(decision.leased_to)
            if not self._untold:
                self._go_on()
            return
        known.answers += 1
        granted = dict(decision.held)
        for key, amount in decision.more.items():
            granted[key] = granted.get(key, 0) + amount
        if granted:
            known.granted.append((known.answers, granted))
        known.speaks.answer((
            known.answers, question.number, self._outputs.usual(question.model), decision.decision, decision.limit,
            dict(decision.held), dict(decision.more), list(decision.full), decision.retry_after_s,
        ))  # fmt: skip

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
        for question in waiting:
            self._decide(question)

    def _sweep(self) -> None:
        self.counters.sweep(self._clock_ns())
        self._sweeper = self._call_later(SWEEP_S, self._sweep)


def process_of(call_id: str) -> str:
    """Who gave this id: what it ends with (`model.record_id`)."""
    return call_id[-12:]


def count_records(lines: Iterable[bytes], charging: Charging, wanted: Callable[[Record], bool]) -> Counters:
    """The counters as these records leave them. Lines that are no records are passed over: what is damaged is told by
    whoever delivers it."""
    counters = Counters(charging.limits)
    for line in lines:
        try:
            record = Record.from_json(line)
        except ValueError:
            continue
        if wanted(record):
            call = exchange_of(record)
            counters.settle("", charging.charges(call), call.started_ns)
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
    """The counters as these hours leave them, for records that are there no more. Of keys, dimensions and meters the
    hours say nothing; of calls whose usage stayed unknown they have what was seen."""
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
        "limit": limit.name, "scope": counter.scope, "percent": percent, "amount": limit.text(limit.amount),
        "unit": limit.unit,
    }  # fmt: skip
    log.warning("a limit is %s", "used up" if percent >= 100 else f"at {percent} %", extra={"facts": facts})
