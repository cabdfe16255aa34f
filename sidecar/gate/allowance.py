"""What a process that serves was granted, and the decisions that it makes out of that by itself.

A call falls under a few limits; those and its scopes are looked up once for all calls that are alike (a `Plan`). Each
counter that it touches is a `Slot` that all plans share: what is left of its lease, and until when that is good. A
decision is one comparison a slot, and where one of them is not enough, the owner is asked.

What open calls hold is added up by counter when the owner asks, and once a second: that makes its sums true, also those
of a new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from sidecar.gate.counters import HELD_MAX, Need
from sidecar.gate.limits import MILLIONTHS, PICO, Action, Facts, Limit, limit_name
from sidecar.gate.windows import FOREVER_NS, Calendar
from sidecar.meters.definition import Kind, Meter

PLANS_MAX: Final = 8_192  # of a few hundred bytes: subscribers, models and routes in use
SLOTS_MAX: Final = 65_536

CALLS: Final = 0  # places in what a call needs
INPUT: Final = 1
OUTPUT: Final = 2
TOTAL: Final = 3
COST: Final = 4
NOTHING: Final = 5
_PLACES: Final = {
    "calls": CALLS, "concurrent": CALLS, "input_tokens": INPUT, "output_tokens": OUTPUT, "total_tokens": TOTAL,
    "cost_usd": COST,
}  # fmt: skip

Needs = tuple[int, int, int, int, int, int]
"""By place: one call, input tokens, output tokens, both, pico-USD, nothing."""

ONE_CALL: Final[Needs] = (1, 0, 0, 0, 0, 0)


class Granted(Protocol):
    """What the owner gives, as in `counters.Decision`."""

    @property
    def held(self) -> Mapping[str, int]: ...
    @property
    def more(self) -> Mapping[str, int]: ...
    @property
    def full(self) -> Sequence[str]: ...


class Measure(NamedTuple):
    """How much a call may need of a unit: what stands at a place of its needs, times a factor, and rounded up where a
    divisor makes it no whole number."""

    place: int
    factor: int
    divisor: int = 1

    def of(self, needs: Needs) -> int:
        return -(-needs[self.place] * self.factor // self.divisor)


def measure_of(unit: str, meter: Meter | None) -> Measure:
    """Of a unit as limits have it. A meter counts in millionths, and may weigh what it counts."""
    if meter is None:
        return Measure(_PLACES.get(unit, NOTHING), 1)
    factor = MILLIONTHS if meter.multiplier is None else int(MILLIONTHS * meter.multiplier) + 1
    place = _PLACES.get("calls" if meter.kind is Kind.COUNT else meter.field or "", NOTHING)
    return Measure(place, factor, PICO if place == COST else 1)


class Slot:
    """One counter, as far as this process may use it. `from_ns`, `until_ns`: its period."""

    __slots__ = (
        "_measure",
        "blocks",
        "divisor",
        "factor",
        "from_ns",
        "full",
        "key",
        "left",
        "limit",
        "place",
        "scope",
        "until_ns",
    )

    def __init__(self, limit: Limit, scope: str, *, dry_run: bool) -> None:
        self.limit = limit
        self.scope = scope
        self._measure = measure_of(limit.unit, limit.meter)
        self.place, self.factor, self.divisor = self._measure  # taken apart for the way of each call
        self.blocks = limit.action is Action.BLOCK and not dry_run
        self.key = ""
        self.left = 0
        self.from_ns = self.until_ns = 0
        self.full = False  # its period is used up

    def amount(self, needs: Needs) -> int:
        return self._measure.of(needs)

    @property
    def blocks_money(self) -> bool:
        return self.blocks and self.place == COST


@dataclass(slots=True, frozen=True)
class Plan:
    """The limits that calls of one kind fall under."""

    slots: tuple[Slot, ...]
    needs_body: bool
    needs_cost: bool
    units: Mapping[str, str] | None = None  # as in `Gate`

    def asked(self, needs: Needs) -> list[Need]:
        return [Need(slot.limit.name, slot.scope, min(slot.amount(needs), HELD_MAX)) for slot in self.slots]


class Allowances:
    """Of one process."""

    def __init__(self, limits: Sequence[Limit], *, dry_run: bool = False) -> None:
        self._limits = tuple(limits)
        self._dry_run = dry_run
        self._plans: dict[Facts, Plan] = {}
        self._slots: dict[tuple[str, str], Slot] = {}
        self._by_key: dict[str, Slot] = {}
        # What each open call holds, by counter. Each is known by its dictionary: no sum is kept on the way of a call.
        self._open: dict[int, Mapping[str, int]] = {}
        self._leased: set[Slot] = set()

    def renew(self, limits: Sequence[Limit], *, dry_run: bool) -> None:
        """Other limits from now on. What open calls hold is still told, unless it is in a unit that its limit has no
        more; no lease is used any more."""
        units = {limit.name: limit.unit for limit in limits}
        other = {limit.name for limit in self._limits if units.get(limit.name, limit.unit) != limit.unit}
        for known_by, held in list(self._open.items()) if other else ():
            self._open[known_by] = {key: amount for key, amount in held.items() if limit_name(key) not in other}
        self._limits, self._dry_run = tuple(limits), dry_run
        self._forget()

    def plan(self, facts: Facts) -> Plan:
        """The limits that such a call falls under, worked out once and remembered."""
        plan = self._plans.get(facts)
        if plan is None:
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            plan = self._plans[facts] = self._make(facts)
        return plan

    def _make(self, facts: Facts) -> Plan:
        slots = []
        for limit in self._limits:
            scope = limit.scope_of(facts)
            if scope is None:
                continue
            slot = self._slots.get((limit.name, scope))
            if slot is None:
                if len(self._slots) >= SLOTS_MAX:
                    self._forget()
                slot = self._slots[limit.name, scope] = Slot(limit, scope, dry_run=self._dry_run)
            slots.append(slot)
        return Plan(
            tuple(slots),
            any(slot.limit.needs_body for slot in slots),
            any(slot.limit.needs_cost for slot in slots),
            {slot.limit.name: slot.limit.unit for slot in slots if slot.limit.unit not in ("calls", "concurrent")}
            or None,
        )

    def _forget(self) -> None:
        """Begin anew. Who still has one of the plans finds no lease in it: the owner would not know of its use."""
        for slot in self._leased:
            slot.left = 0
        self._slots.clear()
        self._plans.clear()
        self._by_key.clear()
        self._leased.clear()

    def take(self, plan: Plan, needs: Needs, now_ns: int) -> dict[str, int] | None:
        """What the call holds, by counter; None: the owner has to be asked."""
        slots = plan.slots
        for slot in slots:
            # Also who needs nothing of a counter needs that there is something left.
            amount = needs[slot.place] * slot.factor
            if slot.divisor != 1:
                amount = -(-amount // slot.divisor)
            if slot.left < (amount or 1) or now_ns >= slot.until_ns:
                return None
        held = {}
        for slot in slots:
            amount = needs[slot.place] * slot.factor
            if slot.divisor != 1:
                amount = -(-amount // slot.divisor)
            held[slot.key] = amount
            slot.left -= amount
        self._open[id(held)] = held
        return held

    def used_up(self, plan: Plan, now_ns: int) -> Limit | None:
        """The limit of which the owner has said that it stays used up for now."""
        for slot in plan.slots:
            if slot.full and slot.blocks and slot.from_ns <= now_ns < slot.until_ns:
                return slot.limit
        return None

    def granted(self, plan: Plan, decision: Granted, at_ns: int) -> dict[str, int]:
        """The owner's answer for a call that asked at `at_ns`; what it holds. The rest is a lease."""
        more, full = decision.more, decision.full
        held = dict(decision.held)
        if held:
            self._open[id(held)] = held
        for slot in plan.slots:
            key = slot.limit.key(slot.scope, at_ns)
            if key != slot.key:
                self._turn(slot, key, at_ns)
            if key in full:
                slot.full, slot.left = True, 0
            elif (lease := more.get(key, 0)) > 0:
                slot.left = min(slot.left + lease, HELD_MAX)  # so that no call takes more of it
                self._leased.add(slot)
        return held

    def _turn(self, slot: Slot, key: str, at_ns: int) -> None:
        """Another period: what was left of the old one is nothing in the new one."""
        window = slot.limit.window
        self._by_key.pop(slot.key, None)
        slot.key, slot.left, slot.full = key, 0, False
        period = window.period(at_ns) if isinstance(window, Calendar) else None
        slot.from_ns, slot.until_ns = (0, FOREVER_NS) if period is None else (period.start_ns, period.end_ns)
        self._by_key[key] = slot

    def ended(self, held: Mapping[str, int]) -> None:
        """The record of the call that held this is on its way. `held`: as it was given."""
        self._open.pop(id(held), None)

    def cancelled(self, held: Mapping[str, int]) -> None:
        """Nothing was sent: another call may have it."""
        still = self._open.pop(id(held), None)
        if still is None:
            return
        for key, amount in still.items():
            slot = self._by_key.get(key)
            if slot is not None and not slot.full:
                slot.left = min(slot.left + amount, HELD_MAX)
                self._leased.add(slot)

    def give_up(self) -> dict[str, int]:
        """End all leases; what open calls hold, by counter."""
        for slot in self._leased:
            slot.left = 0
        self._leased.clear()
        sums: dict[str, int] = {}
        for held in self._open.values():
            for key, amount in held.items():
                sums[key] = sums.get(key, 0) + amount
        return sums

    @property
    def leases(self) -> bool:
        return bool(self._leased)
