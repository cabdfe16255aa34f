"""Limits as an operator writes them, and which of them a call falls under.

    [[limits]]
    name = "acme-monthly"
    subscriber = "acme"          # "*": each on its own; "": all together
    unit = "cost_usd"            # calls input_tokens output_tokens total_tokens cost_usd concurrent meter:NAME
    amount = "500"
    window = "month"             # minute hour day week month year total; or sliding: "90s", "24h"
    timezone = "UTC"
    anchor_day = 1               # of a month
    action = "block"             # block warn shadow

The scopes `subscriber`, `key`, `model`, `route`, `provider` and `dimensions.NAME` may stand together: all of them have
to fit. Without any, a limit holds for each subscriber. `SIDECAR_LIMITS` is the short form of those:
`calls=600/minute,cost_usd=50/month,concurrent=20`.

Amounts are whole numbers in here: tokens and calls as they are, money in pico-USD, meters in millionths. Every fault of
every definition is found at once and named.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from decimal import Decimal
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sidecar.gate.windows import CALENDAR, LONGEST_PERIOD_S, LONGEST_S, Calendar, Sliding, Window
from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import UNAUTHENTICATED
from sidecar.model.exchange import Exchange, Outcome, UsageState
from sidecar.model.record import record_of

NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,62}")  # it stands in a header, and before a `|` in keys
LIMITS_MAX: Final = 100  # each that fits costs a call 0.3 µs
PLAIN_UNITS: Final = ("calls", "input_tokens", "output_tokens", "total_tokens", "cost_usd", "concurrent")
METER: Final = "meter:"
SCOPES: Final = ("subscriber", "key", "model", "route", "provider")
DIMENSION: Final = "dimensions."
FIELDS: Final = ("name", "unit", "amount", "window", "timezone", "anchor_day", "action", *SCOPES)
EACH: Final = "*"
HASHED: Final = re.compile(r"key_[0-9a-f]{32}")  # what stands for a credential
PICO: Final = 10**12
MILLIONTHS: Final = 10**6
AMOUNT: Final = re.compile(r"\d{1,24}(\.\d{1,24})?", re.ASCII)
_SLIDING: Final = re.compile(r"(\d{1,8})([smhd])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHORT: Final = re.compile(r"([a-z_]+(?::[a-z0-9_]+)?)=([^/\s]*)(?:/(\w+))?", re.ASCII)
# Who leaves out by what it would be counted is counted all the same, under a name for all of those.
NOT_SAID: Final = "(none)"
SHOWN_CHARS: Final = 40  # of a wrong value
VALUE_CHARS_MAX: Final = 512  # of a scope's value: it is kept for each counter, and in each call's record
_DIGEST_CHARS: Final = 32
RATE_S_MAX: Final = 120  # a window of at most this is waited for; what is longer is used up until it ends


class Action(StrEnum):
    """What becomes of a call that is over a limit: it is denied, passes and is said in the log, or passes and its
    record says what would have been."""

    BLOCK = "block"
    WARN = "warn"
    SHADOW = "shadow"


class LimitsError(ValueError):
    """The definitions cannot be used. `problems` has every fault, each with the limit's name."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a limit's scopes ask of a call."""

    subscriber: str | None = None
    key: str | None = None
    model: str | None = None
    route: str | None = None
    provider: str | None = None
    dimensions: tuple[tuple[str, str], ...] = ()

    def value(self, scope: str) -> str | None:
        if scope.startswith(DIMENSION):
            return dict(self.dimensions).get(scope.removeprefix(DIMENSION))
        found: str | None = getattr(self, scope)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One definition, checked. `scopes`: (name, fixed value or `*`) each."""

    name: str
    unit: str
    amount: int
    window: Window
    scopes: tuple[tuple[str, str], ...] = (("subscriber", EACH),)
    action: Action = Action.BLOCK
    meter: Meter | None = None
    window_text: str = "total"
    idle_zone: str | None = None  # a time zone that was given and changes nothing

    @property
    def scale(self) -> int:
        """How many of the counted whole numbers make one of the unit."""
        return PICO if self.unit == "cost_usd" else MILLIONTHS if self.meter is not None else 1

    @property
    def sliding(self) -> Sliding | None:
        return self.window if isinstance(self.window, Sliding) else None

    @property
    def is_rate(self) -> bool:
        """Whether who is denied may come back soon; else it is used up until the window ends."""
        if not self.amount:
            return False  # it never has anything left
        if self.unit == "concurrent":
            return True
        if isinstance(self.window, Sliding):
            return self.window.seconds <= RATE_S_MAX
        return self.window.unit == "minute"

    @property
    def needs_body(self) -> bool:
        """Whether a decision asks what only the request's body says."""
        return self.needs_estimate or any(scope == "model" for scope, _ in self.scopes)

    @property
    def needs_estimate(self) -> bool:
        if self.meter is not None:
            return self.meter.kind is not Kind.COUNT
        return self.unit not in ("calls", "concurrent")

    @property
    def needs_cost(self) -> bool:
        """Whether what a call will cost is set aside for it."""
        return self.unit == "cost_usd" or _sums_cost(self.meter)

    @property
    def is_of_key(self) -> bool:
        return any(scope == "key" for scope, _ in self.scopes)

    @property
    def in_hours(self) -> bool:
        """Whether sums by hour, subscriber, provider and route tell what was used of it. They have the model that
        responded, and a limit the one that was asked for: `gpt-5` is `gpt-5-2025-08-07` there."""
        return self.meter is None and not self.not_in_hours

    @property
    def not_in_hours(self) -> list[str]:
        """Of its scopes those that sums by hour do not know."""
        return [scope for scope, _ in self.scopes if scope in ("key", "model") or scope.startswith(DIMENSION)]

    @property
    def reaches_back_s(self) -> float:
        """How long ago something may have been used that counts now."""
        if self.unit == "concurrent":
            return 0.0
        return float(self.window.seconds) if isinstance(self.window, Sliding) else LONGEST_PERIOD_S[self.window.unit]

    def scope_of(self, facts: Facts) -> str | None:
        """Which of this limit's counters such a call falls under; None: under none."""
        values = []
        for scope, wanted in self.scopes:
            value = facts.value(scope)
            if not value:
                if scope == "subscriber":
                    value = UNAUTHENTICATED
                elif scope.startswith(DIMENSION) and wanted == EACH:
                    value = NOT_SAID
                else:
                    return None
            value = bounded(value)
            if wanted != EACH and bounded(wanted) != value:
                return None
            values.append(value)
        # Clients choose some of these values: no comma in one may make another counter of two.
        return values[0] if len(values) == 1 else ",".join(map(_part, values))

    def values_of(self, scope: str) -> dict[str, str] | None:
        """By its name, what each part of a counter's scope stands for; None: it is not a scope of this limit."""
        names = [name for name, _ in self.scopes]
        values = [scope] if len(names) == 1 else list(map(_with_commas, scope.split(","))) if scope else []
        return dict(zip(names, values, strict=True)) if len(names) == len(values) else None

    def key(self, scope: str, at_ns: int) -> str:
        """The counter's. A calendar period is a part of it; a sliding window has one counter for ever."""
        window = self.window
        return f"{self.name}|{scope}|{window.period(at_ns).id if isinstance(window, Calendar) else ''}"

    def counts_in(self, scope: str, period: str, at_ns: int) -> bool:
        """Whether a counter of this name can be this limit's; else it is one of what stood under the name before. Most
        likely it is of that moment, but a call may have been let in by another clock than the one it is recorded by."""
        if len(self.scopes) == 1:  # nearly all: this is asked for each call and limit
            wanted = self.scopes[0][1]
            if wanted != EACH and bounded(wanted) != scope:
                return False
        else:
            parts = scope.split(",") if scope else []
            if len(parts) != len(self.scopes):
                return False
            for part, (_, wanted) in zip(parts, self.scopes, strict=True):
                if wanted != EACH and _part(bounded(wanted)) != part:
                    return False
        window = self.window
        if not isinstance(window, Calendar):
            return not period
        return window.named(period, at_ns) is not None

    def text(self, amount: int) -> str:
        """An amount in the unit's own terms."""
        return f"{(Decimal(amount) / self.scale).normalize():f}" if self.scale != 1 else str(amount)


def limit_name(key: str) -> str:
    """Of a counter's key, `limit|scope|period`."""
    return key.partition("|")[0]


def bounded(value: str) -> str:
    """A scope's value as counters have it. Of a long one the beginning, and what tells it from others that begin so."""
    if len(value) <= VALUE_CHARS_MAX:
        return value
    digest = hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGEST_CHARS]
    return f"{value[: VALUE_CHARS_MAX - _DIGEST_CHARS - 1]}…{digest}"


def _part(value: str) -> str:
    """Of a scope of several values."""
    return bounded(_without_commas(value))


def _without_commas(value: str) -> str:
    return value.replace("%", "%25").replace(",", "%2C") if "," in value or "%" in value else value


def _with_commas(value: str) -> str:
    return value.replace("%2C", ",").replace("%25", "%")


# --- what a finished call adds -------------------------------------------------------------------------

Price = Callable[[str | None, str | None, int, int, int], int | None]
"""(provider, model, input tokens, output tokens, Unix nanoseconds) -> pico-USD; None where nobody knows."""

UNKNOWN: Final = ("reserve", "observed", "zero")
_GIVEN_BACK: Final = frozenset({Outcome.DENIED, Outcome.REFUSED, Outcome.UNREACHABLE})
_KNOWN: Final = frozenset({UsageState.FINAL, UsageState.ESTIMATED})


@dataclass(frozen=True, slots=True)
class Charge:
    """What a call adds to one counter, and what of it was reserved."""

    limit: Limit
    key: str
    scope: str
    amount: int
    reserved: int


class Charging:
    """What finished calls add to the counters of these limits. The same for a call that has just ended and for its
    record, read again: counters are derived from records, and nothing else is kept."""

    def __init__(self, limits: Sequence[Limit], price: Price | None = None, unknown: str = "reserve") -> None:
        self.limits = tuple(limits)
        self._price = price
        self._unknown = unknown

    def charges(self, call: Exchange, key: str | None = None) -> list[Charge]:
        """`key`: the credential's hash, where it is not who pays.

        What was reserved under is what is charged. A limit that was not asked (it is new or another one by now, or the
        owner was not there, or the model became known by the response alone) is charged by what the record says.
        """
        back = _used_nothing(call)
        held = {} if call.gate is None else call.gate.reserved
        units = (None if call.gate is None else call.gate.units) or {}
        at_most = (None if call.gate is None else call.gate.at_most) or held
        by_name = {limit_name(counter): (counter, reserved) for counter, reserved in held.items()}
        facts: Facts | None = None
        found = []
        for limit in self.limits:
            scope: str | None = None
            counter, reserved = by_name.get(limit.name, ("", 0))
            if counter:
                scope, _, period = counter.partition("|")[2].rpartition("|")
                is_of_unit = units.get(limit.name, limit.unit) == limit.unit  # records of before do not say it
                if not is_of_unit or not limit.counts_in(scope, period, call.started_ns):
                    scope, reserved = None, 0
            if scope is None:
                if back or limit.unit == "concurrent":
                    continue
                facts = facts or facts_of(call, key)
                scope = limit.scope_of(facts)
                if scope is None:
                    continue
                counter = limit.key(scope, call.started_ns)
            most = min(at_most.get(counter, reserved), reserved)
            amount = 0 if back else self._amount(limit.unit, limit.meter, call, most)
            if amount or reserved:
                found.append(Charge(limit, counter, scope, amount, reserved))
        return found

    def used(self, unit: str, meter: Meter | None, call: Exchange, reserved: int) -> int:
        """What a call used of a unit. `reserved`: what was set aside for it, where that stays unknown."""
        return 0 if _used_nothing(call) else self._amount(unit, meter, call, reserved)

    def _amount(self, unit: str, meter: Meter | None, call: Exchange, reserved: int) -> int:
        if unit == "concurrent":
            return 0
        if unit == "calls":
            return 0 if call.parent_id is not None else 1
        if call.outcome is Outcome.UNKNOWN:
            return reserved if self._unknown == "reserve" else 0
        seen = self._used(unit, call) if meter is None else self._metered(meter, call)
        usage = call.usage
        if usage is None or usage.usage_state in _KNOWN:
            # A price that nobody knows is no price of nothing.
            return reserved if seen is None and self._unknown == "reserve" else seen or 0
        if self._unknown == "reserve":
            return max(reserved, seen or 0)
        return (seen or 0) if self._unknown == "observed" else 0

    def _used(self, unit: str, call: Exchange) -> int | None:
        usage = call.usage
        if usage is None:
            return 0
        if unit == "input_tokens":
            return usage.input_tokens or 0
        if unit == "output_tokens":
            return usage.output_tokens or 0
        if unit == "total_tokens":
            if usage.total_tokens is not None:
                return usage.total_tokens
            return (usage.input_tokens or 0) + (usage.output_tokens or 0)
        priced = None if call.cost is None or call.cost.get("currency") != "USD" else call.cost.get("total")
        if isinstance(priced, str) and AMOUNT.fullmatch(priced):
            return _rounded_up(Decimal(priced) * PICO)
        if usage.cost_usd is not None and AMOUNT.fullmatch(usage.cost_usd):
            return _rounded_up(Decimal(usage.cost_usd) * PICO)
        if self._price is None:
            return None
        model = usage.model or usage.request_model
        return self._price(usage.provider, model, usage.input_tokens or 0, usage.output_tokens or 0, call.started_ns)

    @staticmethod
    def _metered(meter: Meter, call: Exchange) -> int | None:
        record = record_of(call, seq=0, instance="", line=b"")
        quantity = meter.quantity(record)
        if quantity is None and call.usage is not None and _sums_cost(meter) and meter.measured((record,)):
            return None
        return 0 if quantity is None or quantity < 0 else _rounded_up(Decimal(quantity) * MILLIONTHS)


def _sums_cost(meter: Meter | None) -> bool:
    return meter is not None and meter.kind is Kind.SUM and meter.field == "cost_usd"


def _used_nothing(call: Exchange) -> bool:
    """It was turned away, or failed before anything was consumed."""
    if call.outcome in _GIVEN_BACK or (call.gate is not None and not call.gate.sent):
        return True
    status, usage = call.status, call.usage
    silent = usage is None or usage.usage_state is UsageState.ABSENT
    return status is not None and status >= 400 and silent


def facts_of(call: Exchange, key: str | None = None) -> Facts:
    """What a call's record says of it."""
    subscriber, usage = call.subscriber, call.usage
    by = None if subscriber is None else subscriber.id
    return Facts(
        subscriber=by,
        key=key or (by if by is not None and by.startswith("key_") else None),
        model=None if usage is None else usage.request_model or usage.model,
        route=call.route,
        provider=None if usage is None else usage.provider,
        dimensions=tuple(call.dimensions.items()),
    )


def _rounded_up(amount: Decimal) -> int:
    whole = int(amount)
    return whole + (amount > whole)


# --- reading -------------------------------------------------------------------------------------------


def read_limits(
    tables: Sequence[Mapping[str, Any]],
    short: Sequence[str] = (),
    *,
    meters: Collection[Meter] | None = (),
    dimensions: Collection[str] = (),
    providers: Collection[str] = (),
    routes: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    hashed: bool = False,
) -> tuple[Limit, ...]:
    """Definitions from TOML, and those of `SIDECAR_LIMITS`. Raises `LimitsError` with every fault.

    `meters`, `dimensions`, `providers`, `routes`: what there is; a limit that names another can never be reached.
    `meters`: None: what there is cannot be told, and no limit is said to name another.
    `names`: by id, what subscribers that are configured are called. `hashed`: each is the hash of a credential.
    """
    problems: list[str] = []
    limits: list[Limit] = []
    known = None if meters is None else {meter.name: meter for meter in meters}
    there = _There(dimensions, {"provider": providers, "route": routes}, names or {}, hashed)
    count = len(tables) + len(short)
    if count > LIMITS_MAX:
        problems.append(f"limits: {count} are defined, at most {LIMITS_MAX} are taken")
    rows = [(f"limit number {number}", table) for number, table in enumerate(tables, 1)]
    for text in short:
        found = _SHORT.fullmatch(text)
        if found is None:
            problems.append(
                f"SIDECAR_LIMITS: {_shown(text)} is wrong: expected unit=amount/window, such as calls=600/minute"
            )
            continue
        unit, amount, window = found[1], found[2], found[3] or "total"
        rows.append(
            (
                f"SIDECAR_LIMITS: {_cut(text)}",
                {
                    "name": unit if unit == "concurrent" else f"{unit.replace(':', '-')}-per-{window}",
                    "unit": unit,
                    "amount": amount,
                    "window": window,
                },
            )
        )
    for label, table in rows:
        reading = _Reading(table, label, known, there)
        limit = reading.limit()
        problems += reading.problems
        if limit is not None:
            limits.append(limit)
    # Also of those in which something else is wrong: who mends that should not be told of the next fault then.
    called = [name for _, table in rows if isinstance(name := table.get("name"), str)]
    problems += [
        f"limit {name}: is defined {called.count(name)} times" for name in sorted(set(called)) if called.count(name) > 1
    ]
    if problems:
        raise LimitsError(problems)
    return tuple(limits)


def remarks(limits: Sequence[Limit], *, priced: bool = True, kept_s: float | None = None) -> list[str]:
    """What is no fault and still worth knowing. `kept_s`: for how long records are kept, where after a start nothing
    but them and sums by hour says what was used."""
    found = []
    for limit in limits:
        if not limit.amount:
            what = "every call is denied" if limit.action is Action.BLOCK else "every call is over it"
            found.append(f"limit {limit.name}: its amount is 0: {what}")
        if limit.needs_cost and not priced:
            found.append(f"limit {limit.name}: only costs that providers state are counted: there are no prices")
        if limit.meter is not None and limit.meter.kind is Kind.SUM and limit.meter.field not in PLAIN_UNITS:
            found.append(f"limit {limit.name}: what a call adds is known at its end only: nothing is reserved for it")
        if kept_s is not None and not limit.in_hours and limit.reaches_back_s > kept_s:
            what = f"a {limit.unit}" if limit.meter is not None else limit.not_in_hours[0]
            found.append(
                f"limit {limit.name}: the ledger's sums by hour do not know it by {what}: after a start it has what "
                "the records in the spool say (SIDECAR_RETENTION), and nothing of before"
            )
        if limit.idle_zone is not None:
            found.append(f"limit {limit.name}: timezone {limit.idle_zone} changes nothing: its window has no calendar")
    return found


class _There(NamedTuple):
    """What limits can be of."""

    dimensions: Collection[str]
    values: Mapping[str, Collection[str]]  # by scope
    names: Mapping[str, str]
    hashed: bool


class _Reading:
    """One table on its way to a limit. Keys are taken out, so that what remains is unknown."""

    def __init__(
        self,
        table: Mapping[str, Any],
        label: str,
        meters: Mapping[str, Meter] | None,
        there: _There,
    ) -> None:
        self.left = dict(table)
        name = table.get("name")
        named = isinstance(name, str) and NAME.fullmatch(name) and not label.startswith("SIDECAR_")
        self.label = f"limit {name}" if named else label
        self.problems: list[str] = []
        self._meters = meters
        self._there = there

    def limit(self) -> Limit | None:
        name = self.left.pop("name", None)
        if not isinstance(name, str) or not NAME.fullmatch(name):
            said = "is missing" if name is None else "is wrong"
            self._wrong(f"name {said}: expected letters, digits and _ - . : (at most 63)")
            name = ""
        unit, meter = self._unit()
        amount = self._amount(unit, meter)
        window_text, window = self._window(unit)
        scopes = self._scopes()
        action = self.left.pop("action", "block")
        if not isinstance(action, str) or action not in set(Action):
            self._wrong(f"action is wrong: expected one of {', '.join(Action)}")
        for key in self.left:
            near = get_close_matches(key, FIELDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"expected {', '.join(FIELDS)}, {DIMENSION}NAME"
            self._wrong(f"{_shown(key)} is no field of a limit; {hint}")
        if self.problems or window is None:
            return None
        return Limit(
            name=name,
            unit=unit,
            amount=amount,
            window=window,
            scopes=scopes,
            action=Action(action),
            meter=meter,
            window_text=window_text,
            idle_zone=self._idle_zone(window),
        )

    def _wrong(self, what: str) -> None:
        self.problems.append(f"{self.label}: {what}")

    def _unit(self) -> tuple[str, Meter | None]:
        unit = self.left.pop("unit", None)
        if isinstance(unit, str) and unit.startswith(METER):
            if self._meters is None:
                return unit, None
            meter = self._meters.get(unit.removeprefix(METER))
            if meter is None:
                names = ", ".join(self._meters) or "none"
                self._wrong(
                    f"unit {_cut(unit)}: there is no such meter, so nothing would ever reach it (there are {names})"
                )
            elif meter.kind not in (Kind.COUNT, Kind.SUM):
                self._wrong(f"unit {unit}: a meter of kind {meter.kind} does not add up: expected COUNT or SUM")
            return unit, meter
        if not isinstance(unit, str) or unit not in PLAIN_UNITS:
            said = "is missing" if unit is None else f"{_shown(unit)} is unknown"
            self._wrong(f"unit {said}: expected one of {', '.join(PLAIN_UNITS)}, or meter:NAME")
            return "calls", None
        return unit, None

    def _amount(self, unit: str, meter: Meter | None) -> int:
        amount = self.left.pop("amount", None)
        if isinstance(amount, float) and math.isfinite(amount):
            self._wrong(f'amount is a float, which is never exact: write it as a text: "{amount!r}"')
            return 0
        text = str(amount) if isinstance(amount, int) and not isinstance(amount, bool) else amount
        if not isinstance(text, str) or not AMOUNT.fullmatch(text.strip()):
            said = "is missing" if amount is None else "is negative" if str(amount).startswith("-") else "is wrong"
            given = "" if amount is None else f", not {_shown(str(amount))}"
            self._wrong(
                f'amount {said}: expected a number of at least 0, as a text where it is no whole one: "0.5"{given}'
            )
            return 0
        exact = Decimal(text.strip()) * (PICO if unit == "cost_usd" else MILLIONTHS if meter is not None else 1)
        if exact != int(exact):
            finest = "10^-12" if unit == "cost_usd" else "10^-6" if meter is not None else "whole numbers"
            self._wrong(f"amount is finer than {unit} is counted ({finest})")
        return int(exact)

    def _window(self, unit: str) -> tuple[str, Window | None]:
        text = self.left.pop("window", None)
        zone, anchor = self._zone(), self._anchor(text)
        if unit == "concurrent":
            if text not in (None, "total"):
                self._wrong("window has no meaning where the unit is concurrent: leave it out")
            return "", Calendar("total", zone)
        if isinstance(text, str) and text in CALENDAR:
            return text, Calendar(text, zone, anchor)
        found = _SLIDING.fullmatch(text) if isinstance(text, str) else None
        seconds = 0 if found is None else int(found[1]) * _SECONDS[found[2]]
        if not 1 <= seconds <= LONGEST_S:
            said = "is missing" if text is None else f"{_shown(text)} is unknown"
            self._wrong(f"window {said}: expected one of {', '.join(CALENDAR)}, or a time up to 366d such as 90s, 24h")
            return "", None
        return str(text), Sliding(seconds)

    def _zone(self) -> tzinfo:
        self.zone = name = self.left.pop("timezone", "UTC")
        try:
            return ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
            self._wrong(f"timezone {_shown(name)} is unknown: expected a name such as UTC or Europe/Berlin")
            return ZoneInfo("UTC")

    def _idle_zone(self, window: Window) -> str | None:
        """The time zone that was given and changes nothing. UTC stands in examples: nobody expects much of it."""
        named = isinstance(self.zone, str) and self.zone.upper() not in ("UTC", "ETC/UTC")
        return self.zone if named and (isinstance(window, Sliding) or window.unit == "total") else None

    def _anchor(self, window: object) -> int:
        day = self.left.pop("anchor_day", 1)
        if not isinstance(day, int) or isinstance(day, bool) or not 1 <= day <= 31:
            self._wrong("anchor_day is wrong: expected a day of a month, 1 to 31")
            return 1
        if day != 1 and window != "month":
            self._wrong("anchor_day has a meaning only where the window is a month")
        return day

    def _scopes(self) -> tuple[tuple[str, str], ...]:
        names = [name for name in self.left if name in SCOPES or name.startswith(DIMENSION)]
        found = {name: self.left.pop(name) for name in names}
        table = self.left.pop("dimensions", {})
        if isinstance(table, dict):
            found |= {DIMENSION + str(name): value for name, value in table.items()}
        else:
            self._wrong('dimensions is wrong: expected dimensions.NAME = "value"')
        for name, value in found.items():
            if (why := self._unreachable(name, value)) is not None:
                self._wrong(why)
        if not found:
            return (("subscriber", EACH),)
        return tuple((name, value) for name, value in found.items() if value)

    def _unreachable(self, name: str, value: Any) -> str | None:
        """Why no call is ever of this scope; None: one may be. Of what may be a key nothing is said."""
        there = self._there
        if not isinstance(value, str) or not (value or name == "subscriber"):
            return f'{name} is wrong: expected a text, or "*" for each on its own'
        if name.startswith(DIMENSION) and name.removeprefix(DIMENSION) not in there.dimensions:
            have = ", ".join(there.dimensions) or "none"
            return f"{name}: no call is filed under it (SIDECAR_DIMENSIONS has {have})"
        if value in ("", EACH):
            return None
        if EACH in value or value != value.strip():
            return f'{name} {_shown(value)} is no pattern: expected one whole name, or "*" for each on its own'
        if there.values.get(name) and value not in there.values[name]:
            near = get_close_matches(value, there.values[name], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            return f"{name} {_shown(value)} is unknown here: no call would ever reach this limit{hint}"
        if name not in ("subscriber", "key") or HASHED.fullmatch(value) or value == UNAUTHENTICATED:
            return None
        called = [id_ for id_, known in there.names.items() if known == value]
        if name == "subscriber" and called and value not in there.names:
            return f"subscriber {value!r} is what {called[0]} is called: expected the id"
        if name == "key" or (there.hashed and value not in there.names):
            return (
                f"{name} is no id that a call can have: expected key_ and 32 hex digits, as "
                "`metering-sidecar subscriber` prints it for a key"
            )
        return None


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else text[: SHOWN_CHARS - 1] + "…"


def _shown(value: object) -> str:
    """A wrong value, as much of it as is needed to find it."""
    return repr(_cut(value)) if isinstance(value, str) else _cut(repr(value))


def oldest_start_ns(limits: Sequence[Limit], now_ns: int) -> int:
    """The earliest moment that still counts for any of them."""
    starts = [now_ns]
    for limit in limits:
        if limit.unit == "concurrent":
            continue
        window = limit.window
        if isinstance(window, Sliding):
            starts.append(window.start_ns(now_ns))
        else:
            starts.append(window.period(now_ns).start_ns)
    return max(min(starts), 0)
