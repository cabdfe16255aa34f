"""What the hop asks before it sends a call on, in a process that serves.

A decision is made at once where the allowance of this process is enough (`at_once`), else the owner is asked
(`ask`), and its answer comes back as a `Verdict`. Who cannot be asked within `ANSWER_S` decides nothing:
`SIDECAR_GATE_ON_FAILURE` does.

Nothing of a request is kept here but by what it is counted: names, and how much it may take.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from sidecar.gate.allowance import COST, INPUT, ONE_CALL, OUTPUT, TOTAL, Allowances, Measure, Needs, Plan
from sidecar.gate.counters import ALLOWED, DENIED, UNDECIDED
from sidecar.gate.denials import Amounts
from sidecar.gate.estimate import (
    INPUT_TOKENS_MAX,
    INPUT_TOKENS_SURE,
    NOTHING_ASKED,
    OUTPUT_TOKENS_DEFAULT,
    OUTPUT_TOKENS_MAX,
    Asked,
    read_request,
    tokens_of,
)
from sidecar.gate.limits import Facts, Limit, Price, bounded, limit_name
from sidecar.gate.protocol import LIMITS, ON_FAILURE, Asker, Question, Ruling
from sidecar.gate.windows import SECOND_NS, Sliding
from sidecar.model.exchange import Gate, RawHeaders, Subscriber

log = logging.getLogger("sidecar.gate")

ANSWER_S: Final = 1.0  # a metering process that was killed is there again within half of it, mostly
LAST_S: Final = 60.0  # how old an answer may be that `last` goes by
LASTS_MAX: Final = 4_096
MODELS_MAX: Final = 256  # remembered for one kind of call
USUAL_MAX: Final = 4_096  # models whose usual output is known here


class Response(Protocol):
    """What a denied client is told, whole."""

    @property
    def status(self) -> int: ...
    @property
    def headers(self) -> Sequence[tuple[str, str]]: ...
    @property
    def body(self) -> bytes: ...
    def encode(
        self, *, close: bool, keep_alive_10: bool = False, head_only: bool = False, fields: bytes = b""
    ) -> bytes: ...


class Deny(Protocol):
    """Makes the response for a call of this method and target."""

    @property
    def shows_amounts(self) -> bool:
        """Whether it says how much is used, which the owner alone knows."""
        ...

    def __call__(
        self,
        method: str,
        target: str,
        *,
        limit: str,
        kind: str,
        retry_after_s: float | None,
        message: str | None,
        amounts: Amounts | None = None,
    ) -> Response: ...


@dataclass(frozen=True, slots=True)
class Outside:
    """Who is asked beside the limits, as far as a process that serves has to know: the owner asks them.

    `measures`: by unit, of those in which they count down. `by_model`: what they say may depend on
    the model. `answer_s`: how long the owner may take for it.
    """

    names: tuple[str, ...]
    measures: Mapping[str, Measure]
    by_model: bool
    answer_s: float

    @property
    def needs_estimate(self) -> bool:
        return any(measure.place in (INPUT, OUTPUT, TOTAL, COST) for measure in self.measures.values())

    @property
    def needs_cost(self) -> bool:
        return any(measure.place == COST for measure in self.measures.values())


@dataclass(frozen=True, slots=True)
class Models:
    """What is known of models. `price`: None: nobody asks. Of (provider, model), `ceiling`: how many tokens a response
    may have; `context`: how many a request; None where nobody knows."""

    price: Price | None
    ceiling: Callable[[str | None, str], int | None]
    context: Callable[[str | None, str], int | None] = lambda provider, model: None


@dataclass(frozen=True, slots=True)
class Meant:
    """What a target says of the model that is asked. `provider`: as the call's record will name it."""

    provider: str | None = None
    model: str | None = None
    consumes: bool = True  # whether such a call may use tokens at all
    provider_assumed: bool = False  # nothing tells it: what a model costs is better told by the model's name


@dataclass(frozen=True, slots=True)
class ByUpstream:
    """What depends on whose API is called: how it is told a credential, what its models cost and may give, and how its
    errors look. As in `Policy`."""

    key_of: Callable[[RawHeaders], str | None]
    models: Models | None
    deny: Deny


@dataclass(slots=True)
class Prepared:
    """What is known of a call by its head. `plan`: of the limits that it falls under by that."""

    method: str
    target: str
    facts: Facts
    consumes: bool
    reads_body: bool
    plan: Plan
    upstream: str | None = None
    fields: RawHeaders = ()  # of the head, by which a body is read that is no plain JSON
    priced_as: str | None = None  # the provider by whose prices it will be priced; None: nobody knows
    weighed: Weighed = field(init=False)  # where no body has to be read
    kinds: dict[str | None, tuple[Facts, Plan]] = field(default_factory=dict)  # by the model that the body names

    def __post_init__(self) -> None:
        self.weighed = Weighed(self, self.facts, self.plan, ONE_CALL)


# Not frozen, because some of these are made for each call, and a frozen one takes seven times as long to make.


@dataclass(slots=True)
class Weighed:
    """A call, and how much of what it may need. `facts`: with what its body says."""

    prepared: Prepared
    facts: Facts
    plan: Plan
    needs: Needs
    unpriced: bool = False  # what it will cost is not known, and such calls are denied where a limit is of money


@dataclass(slots=True)
class Verdict:
    """`denial`: None: the call may go."""

    gate: Gate
    denial: Response | None = None
    error: str = ""


Then = Callable[[Verdict], None]


class Handle(Protocol):
    def cancel(self) -> None: ...


@dataclass(slots=True)
class _Pending:
    weighed: Weighed
    call_id: str
    at_ns: int
    then: Then
    timer: Handle


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What is to be decided, and by what. `meant`: of (method, target, name of the upstream). `key_of`: the hash of the
    credential in a head, which stands in one of the fields `reads` (lower case). `body_says_who`: who pays may stand in
    a body, in one of `members`. `deny_unpriced`: a limit of money lets no call go whose price is not known.
    `upstreams`: by name, those for which something else holds than what stands here."""

    limits: Sequence[Limit]
    meant: Callable[[str, str, str | None], Meant]
    key_of: Callable[[RawHeaders], str | None]
    deny: Deny
    reads: frozenset[bytes] = frozenset()
    models: Models | None = None
    on_failure: str = "open"
    dry_run: bool = False
    body_says_who: bool = False
    members: tuple[str, ...] = ()
    outside: Outside | None = None
    deny_unpriced: bool = False
    upstreams: Mapping[str, ByUpstream] = field(default_factory=dict)


class Admission:
    """Of one process that serves."""

    def __init__(
        self,
        policy: Policy,
        *,
        clock_ns: Callable[[], int],
        call_later: Callable[[float, Callable[[], None]], Handle],
    ) -> None:
        """`send` has to be set before the first `ask`: it is given a question as plain values."""
        self._allowances = Allowances(policy.limits, dry_run=policy.dry_run)
        self._clock_ns = clock_ns
        self._call_later = call_later
        self._usual: dict[str, int] = {}
        self._pending: dict[int, _Pending] = {}
        self._asked = 0
        self._seen = 0  # the number of the owner's last answer
        self._told = 0
        self._shift_ns = 0  # of the clock that calendars go by, as the owner said last
        self._lasts: dict[Facts, tuple[str, str | None, int]] = {}
        self.send: Callable[[tuple[Any, ...]], None] = _nobody
        self._use(policy)

    def _use(self, policy: Policy) -> None:
        limits, outside = policy.limits, policy.outside
        self._limits = {limit.name: limit for limit in limits}
        scopes = {scope for limit in limits for scope, _ in limit.scopes}
        self.by_key = "key" in scopes
        self.reads = policy.reads if self.by_key else frozenset()
        self._outside = outside
        self._by_model = "model" in scopes or (outside is not None and outside.by_model)
        self._body_says_who = policy.body_says_who and ("subscriber" in scopes or outside is not None)
        self._members = policy.members
        self._needs_estimate = outside is not None and outside.needs_estimate
        self._needs_cost = outside is not None and outside.needs_cost
        self._answer_s = ANSWER_S if outside is None else ANSWER_S + outside.answer_s
        self._meant = policy.meant
        self._rest = ByUpstream(policy.key_of, policy.models, policy.deny)
        self._upstreams = policy.upstreams
        self._ceilings: dict[tuple[str | None, str | None, str], int] = {}
        self._contexts: dict[tuple[str | None, str | None, str], int] = {}
        self._shows_amounts = policy.deny.shows_amounts
        self._on_failure = policy.on_failure
        self._deny_unpriced = policy.deny_unpriced

    def renew(self, policy: Policy) -> None:
        """Decide by this from now on. What open calls hold they hold, and what was asked is still answered; what was
        prepared before must not be used any more."""
        self._allowances.renew(policy.limits, dry_run=policy.dry_run)
        self._lasts.clear()
        self._told = -1  # what is held is told anew: the owner may have other units by now
        self._use(policy)

    def _of(self, upstream: str | None) -> ByUpstream:
        return self._rest if upstream is None else self._upstreams.get(upstream, self._rest)

    # -- what the hop asks -----------------------------------------------------------------------

    def prepare(
        self,
        method: str,
        target: str,
        fields: RawHeaders,
        *,
        subscriber: Subscriber | None,
        dimensions: Mapping[str, str],
        route: str | None,
        upstream: str | None = None,
    ) -> Prepared:
        """What the head says; the same for all calls with the same of it."""
        meant = self._meant(method, target, upstream)
        facts = Facts(
            subscriber=None if subscriber is None else subscriber.id,
            key=(self._of(upstream).key_of(fields) or "unauthenticated") if self.by_key else None,
            model=None if meant.model is None else bounded(meant.model),
            route=route,
            provider=meant.provider,
            dimensions=tuple(dimensions.items()),
        )
        plan = self._allowances.plan(facts)
        posted = method not in ("GET", "HEAD", "OPTIONS", "DELETE")
        asks_model = self._by_model and meant.consumes and meant.model is None
        needs_body = plan.needs_body or self._needs_estimate
        reads_body = posted and ((meant.consumes and needs_body) or asks_model or self._body_says_who)
        priced_as = None if meant.provider_assumed else meant.provider
        consumes = meant.consumes and posted
        return Prepared(method, target, facts, consumes, reads_body, plan, upstream, fields, priced_as)

    def weigh(
        self,
        prepared: Prepared,
        body: bytes = b"",
        length: int | None = None,
        who: Callable[[Callable[[str], str | None]], Subscriber | None] | None = None,
    ) -> Weighed:
        """How much the call may need. `body`: as much of it as has come; `length`: of all of it, where that is known.
        `who`: asks a look-up of the body's members who pays."""
        if not prepared.reads_body:
            return prepared.weighed
        asked = NOTHING_ASKED
        if body or length:
            asked = read_request(body, length, fields=prepared.fields, members=self._members)
        model = prepared.facts.model or asked.model
        if who is not None and self._body_says_who:
            subscriber = who(lambda name: _member(asked, name))
            facts = replace(prepared.facts, model=model, subscriber=None if subscriber is None else subscriber.id)
            plan = self._allowances.plan(facts)
        else:
            facts, plan = prepared.kinds.get(model) or self._kind(prepared, model)
        if not prepared.consumes:
            return Weighed(prepared, facts, plan, ONE_CALL)
        needs, unpriced = self._needs(prepared, plan, model, asked)
        return Weighed(prepared, facts, plan, needs, unpriced)

    def _kind(self, prepared: Prepared, model: str | None) -> tuple[Facts, Plan]:
        if len(prepared.kinds) >= MODELS_MAX:
            prepared.kinds.clear()
        facts = replace(prepared.facts, model=model)
        kind = prepared.kinds[model] = (facts, self._allowances.plan(facts))
        return kind

    def _needs(self, prepared: Prepared, plan: Plan, model: str | None, asked: Asked) -> tuple[Needs, bool]:
        output, provider, upstream = asked.output_tokens, prepared.priced_as, prepared.upstream
        models = self._of(upstream).models
        if output is None:
            output = self._usual.get(model or "", OUTPUT_TOKENS_DEFAULT)
        elif model is not None and models is not None:
            key = (upstream, provider, model)
            most = self._ceilings.get(key)
            if most is None:
                if len(self._ceilings) >= USUAL_MAX:
                    self._ceilings.clear()
                most = self._ceilings[key] = models.ceiling(provider, model) or OUTPUT_TOKENS_MAX
            if output > most * asked.choices:
                output = most * asked.choices
        entered = asked.input_tokens
        if entered > INPUT_TOKENS_SURE:
            entered = min(entered, self._context(upstream, provider, model, models))
        cost: int | None = None
        if plan.needs_cost or self._needs_cost:
            cost = self._cost(models, provider, model, entered, output)
        unpriced = cost is None and plan.needs_cost and self._deny_unpriced
        return (1, entered, output, entered + output, cost or 0, 0), unpriced

    def _context(self, upstream: str | None, provider: str | None, model: str | None, models: Models | None) -> int:
        """How many tokens a request can have."""
        if model is None or models is None:
            return INPUT_TOKENS_MAX
        key = (upstream, provider, model)
        most = self._contexts.get(key)
        if most is None:
            if len(self._contexts) >= USUAL_MAX:
                self._contexts.clear()
            most = self._contexts[key] = models.context(provider, model) or INPUT_TOKENS_MAX
        return most

    def _cost(
        self, models: Models | None, provider: str | None, model: str | None, entered: int, output: int
    ) -> int | None:
        if models is None or models.price is None:
            return None
        return models.price(provider, model, entered, output, self._clock_ns())

    def unfinished(self, weighed: Weighed, gate: Gate, sent_bytes: int) -> Gate:
        """What was decided of a call of whose body only so much came: it takes no more than that can cost, whatever
        length its head claimed."""
        needs, prepared = weighed.needs, weighed.prepared
        entered = min(needs[INPUT], tokens_of(sent_bytes))
        if entered == needs[INPUT] or not gate.reserved:
            return gate
        output, cost = needs[OUTPUT], needs[COST]
        if cost:
            models, model = self._of(prepared.upstream).models, weighed.facts.model
            now = self._cost(models, prepared.priced_as, model, entered, output)
            cost = cost if now is None else min(now, cost)
        less = (1, entered, output, entered + output, cost, 0)
        slots = {slot.limit.name: slot for slot in weighed.plan.slots}
        at_most = {}
        for key, reserved in gate.reserved.items():
            slot = slots.get(limit_name(key))
            if slot is not None and (amount := slot.amount(less)) < reserved:
                at_most[key] = amount
        return replace(gate, at_most=at_most or None)

    def of_message(self, weighed: Weighed, gate: Gate) -> Gate | None:
        """What a message of a socket is counted by beside what its record says; None: that is enough. `gate`: of the
        socket."""
        counters = self._unsaid(weighed)
        return replace(gate, reserved=counters, at_most=None, units=None) if counters else None

    def _unsaid(self, weighed: Weighed) -> dict[str, int]:
        """Of a call of which nothing was set aside: counters that its record would not lead to, since it has no key."""
        if not self.by_key:
            return {}
        now_ns = self._clock_ns() + self._shift_ns
        slots = self._allowances.plan(weighed.facts).slots
        return {slot.limit.key(slot.scope, now_ns): 0 for slot in slots if slot.limit.is_of_key}

    def at_once(self, weighed: Weighed) -> Verdict | None:
        """The decision, where this process can make it alone; None: `ask`."""
        plan, now_ns = weighed.plan, self._clock_ns() + self._shift_ns
        if weighed.unpriced and (money := next((s.limit for s in plan.slots if s.blocks_money), None)) is not None:
            why = f"The limit {money.name} counts money, and what this model costs is not known."
            response = self._response(weighed, money.name, "quota", None, why)
            return Verdict(Gate(DENIED, money.name), response, f"denied by the limit {money.name}: no price")
        if self._outside is None:
            held = self._allowances.take(plan, weighed.needs, now_ns)
            if held is not None:
                return Verdict(Gate(ALLOWED, None, LIMITS, 0.0, held, units=plan.units))
        limit = None if self._shows_amounts else self._allowances.used_up(plan, now_ns)
        if limit is not None:
            return self._denied(weighed, Gate(DENIED, limit.name), limit, None)
        return None

    def meant(self, method: str, target: str, upstream: str | None) -> Meant:
        """All that `prepare` reads of a target, but for how a denial looks."""
        return self._meant(method, target, upstream)

    def quickly(self, prepared: Prepared, body: bytes) -> Gate | None:
        """The same for a call that is whole, where it may go; None: anything else."""
        if self._outside is not None:
            return None
        weighed = self.weigh(prepared, body, len(body)) if prepared.reads_body else prepared.weighed
        if weighed.unpriced:
            return None
        held = self._allowances.take(weighed.plan, weighed.needs, self._clock_ns() + self._shift_ns)
        return None if held is None else Gate(ALLOWED, None, LIMITS, 0.0, held, units=weighed.plan.units)

    def ask(self, weighed: Weighed, call_id: str, then: Then) -> None:
        """Ask the owner; `then` is called once, later."""
        self._asked += 1
        number, at_ns = self._asked, self._clock_ns()
        timer = self._call_later(self._answer_s, lambda: self._unanswered(number))
        self._pending[number] = _Pending(weighed, call_id, at_ns, then, timer)
        self.send(self._question(number))

    def cancelled(self, gate: Gate) -> None:
        """Nothing of the call was sent on: what it held is free."""
        self._allowances.cancelled(gate.reserved)

    def ended(self, gate: Gate) -> None:
        """The call's record is on its way to the owner."""
        self._allowances.ended(gate.reserved)

    # -- what the owner says ---------------------------------------------------------------------

    def _question(self, number: int) -> tuple[Any, ...]:
        pending = self._pending[number]
        weighed, outside, asker = pending.weighed, self._outside, None
        facts, needs = weighed.facts, weighed.needs
        if outside is not None:
            amounts = {unit: measure.of(needs) for unit, measure in outside.measures.items()}
            asker = Asker(pending.call_id, facts.subscriber, facts.provider, facts.dimensions, amounts)
        return Question(number, pending.at_ns, facts.model, weighed.plan.asked(needs), asker).plain()

    def questions(self) -> list[tuple[Any, ...]]:
        """What is not answered yet, for an owner that has just come."""
        self._seen = self._told = 0
        return [self._question(number) for number in self._pending]

    def answered(self, payload: Sequence[Any]) -> None:
        """The owner's answer, a `Ruling`."""
        ruling = Ruling.read(payload)
        self._seen = ruling.order
        self._shift_ns = ruling.shift_ns
        pending = self._pending.pop(ruling.number, None)
        if pending is None:
            return  # decided without it; what it granted ends with the next `tell`
        pending.timer.cancel()
        try:
            verdict = self._ruled(pending, ruling)
            if verdict is not None:
                pending.then(verdict)
                return
        except Exception:
            log.exception("what is said of whether a call may be made cannot be used; SIDECAR_GATE_ON_FAILURE decides")
        self._pending[ruling.number] = pending
        self._unanswered(ruling.number)

    def _ruled(self, pending: _Pending, ruling: Ruling) -> Verdict | None:
        """None: limits are shared, and who has them cannot be asked."""
        if ruling.decision == UNDECIDED:
            return None
        weighed = pending.weighed
        facts = weighed.facts
        if facts.model is not None and ruling.usual is not None:
            if len(self._usual) >= USUAL_MAX:
                self._usual.clear()
            self._usual[facts.model] = ruling.usual
        held = self._allowances.granted(weighed.plan, ruling, pending.at_ns + ruling.shift_ns)
        if self._on_failure == "last":
            if len(self._lasts) >= LASTS_MAX:
                self._lasts.clear()
            self._lasts[facts] = (ruling.decision, ruling.limit, pending.at_ns)
        units = weighed.plan.units
        gate = Gate(ruling.decision, ruling.limit, ruling.source, ruling.age_s, held, units=units)
        if ruling.decision != DENIED:
            return Verdict(gate)
        if ruling.spoken is not None:
            spoken = ruling.spoken
            response = self._response(weighed, spoken.limit, spoken.kind, spoken.retry_after_s, spoken.message)
            return Verdict(gate, response, spoken.error)
        amounts = None if ruling.amounts is None else Amounts(*ruling.amounts)
        limit = self._limits.get(ruling.limit or "")
        if limit is None:  # it was defined when this was asked
            response = self._response(weighed, ruling.limit or LIMITS, "rate", ruling.retry_after_s or 1.0, None)
            return Verdict(gate, response, f"denied by the limit {ruling.limit}")
        return self._denied(weighed, gate, limit, ruling.retry_after_s, amounts)

    def tell(self) -> tuple[int, dict[str, int]]:
        """The last answer that was heard, and what open calls hold. All leases end."""
        self._told = self._seen
        return self._seen, self._allowances.give_up()

    @property
    def has_to_tell(self) -> bool:
        """Whether the owner counts something as given that this process does not use."""
        return self._allowances.leases or self._told != self._seen

    def _unanswered(self, number: int) -> None:
        pending = self._pending.pop(number, None)
        if pending is None:
            return
        weighed = pending.weighed
        decision, name, age_s = ALLOWED, None, 0.0
        if self._on_failure == "closed":
            decision = DENIED
        elif self._on_failure == "last":
            decision, name, at_ns = self._lasts.get(weighed.facts, (ALLOWED, None, 0))
            age_s = round((pending.at_ns - at_ns) / SECOND_NS, 1) if at_ns else 0.0
            if not 0.0 <= age_s <= LAST_S:  # the clock may have been set back since
                decision, name, age_s = ALLOWED, None, 0.0
        if decision != DENIED:
            pending.then(Verdict(Gate(ALLOWED, None, ON_FAILURE, age_s, self._unsaid(weighed))))
            return
        if name is None:
            slots, outside = weighed.plan.slots, self._outside
            name = slots[0].limit.name if slots else LIMITS if outside is None else outside.names[0]
        gate = Gate(DENIED, name, ON_FAILURE, age_s)
        response = self._response(weighed, name, "rate", 1.0, "the limits cannot be looked up right now")
        pending.then(Verdict(gate, response, "denied: the owner of the limits does not answer"))

    def undecided(self, method: str, target: str, upstream: str | None) -> Verdict:
        """What holds for a call where a fault of ours keeps it from being decided: as where the owner does not answer,
        but that the last decision is not known."""
        if self._on_failure != "closed":
            return Verdict(Gate(ALLOWED, None, ON_FAILURE, 0.0))
        why = "the limits cannot be looked up right now"
        response = self._of(upstream).deny(
            method, target, limit=LIMITS, kind="rate", retry_after_s=1.0, message=why, amounts=None
        )
        return Verdict(Gate(DENIED, LIMITS, ON_FAILURE, 0.0), response, "denied: the limits cannot be decided")

    def _denied(
        self, weighed: Weighed, gate: Gate, limit: Limit, retry_after_s: float | None, amounts: Amounts | None = None
    ) -> Verdict:
        kind = "rate" if limit.is_rate else "quota"
        if limit.is_rate and retry_after_s is None:
            retry_after_s = max(limit_wait_s(limit, self._clock_ns() + self._shift_ns), 0.0)
        response = self._response(weighed, limit.name, kind, retry_after_s, None, amounts)
        return Verdict(gate, response, f"denied by the limit {limit.name}")

    def _response(
        self,
        weighed: Weighed,
        limit: str,
        kind: str,
        retry_after_s: float | None,
        message: str | None,
        amounts: Amounts | None = None,
    ) -> Response:
        prepared = weighed.prepared
        return self._of(prepared.upstream).deny(
            prepared.method,
            prepared.target,
            limit=limit,
            kind=kind,
            retry_after_s=retry_after_s,
            message=message,
            amounts=amounts,
        )


def limit_wait_s(limit: Limit, now_ns: int) -> float:
    """Until a rate that is used up may be asked for again."""
    window = limit.window
    if isinstance(window, Sliding) or limit.unit == "concurrent":
        return 1.0
    return (window.period(now_ns).end_ns - now_ns) / SECOND_NS


def _member(asked: Asked, name: str) -> str | None:
    value = asked.members.get(name)
    return str(value) if type(value) in (str, int) and value != "" else None


def _nobody(question: tuple[Any, ...]) -> None:
    """There is nobody to ask: it stays unanswered."""
