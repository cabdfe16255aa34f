"""Hourly sums: the effects that a batch of records has on the ledger.

A batch becomes a list of deltas, one for each hour and series (subscriber, model, provider, route, status
class, dimensions), written as JSON. Applying the same deltas in any order gives the same sums, and every number is
exact: whole numbers of any size, money as decimals written as text.

Null is kept apart from zero: a token sum stays null until a record reports that kind of token, and how many
records had usage, had a lower bound, or had none, is counted beside the sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow
from operator import attrgetter
from typing import Any, Final

import orjson

from sidecar.model.call_group import HOUR_S, CallGroup
from sidecar.model.exchange import Outcome, Usage, UsageState
from sidecar.model.record import Record

NAME_CHARS_MAX: Final = 256  # of a series name: ids are at most 200, a model name comes from the wire
DIGITS_MAX: Final = 60  # of a money sum: 10^12 calls of 10^18 with 24 places fit
AMOUNT_CHARS_MAX: Final = 40  # of one amount as stated; what is longer is no amount
NO_TABLE: Final = "no_table"  # a cost's reason where no prices are set at all
UNAUTHENTICATED: Final = "unauthenticated"
JSON_INT_MAX: Final = 2**63 - 1  # beyond it a number travels as text

EXACT: Final = Context(prec=DIGITS_MAX, traps=[Inexact, InvalidOperation, Overflow])

TOKENS: Final = (
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "cache_read_input_tokens",
    "cache_write_input_tokens",
    "reasoning_output_tokens",
)
_TOKENS: Final = tuple((name, attrgetter(name)) for name in TOKENS)
COUNTS: Final = (
    "records",  # everything, also messages of WebSockets
    "calls",  # without those messages
    "errors",  # status 400 and above, or an ending that is the upstream's or our fault
    "with_usage",  # final, partial or estimated
    "partial_usage",  # of these, a lower bound
    "without_usage",  # model calls whose answer said nothing
    "unpriced",  # something was to be priced, and no cost is known: the sum of costs lacks them
    "request_bytes",
    "response_bytes",
)
UPSTREAM: Final = "upstream"  # what is filed as a dimension, where there are several
_FAULTS: Final = frozenset(
    {Outcome.UPSTREAM_BROKE, Outcome.UPSTREAM_TIMEOUT, Outcome.UNREACHABLE, Outcome.STOPPED, Outcome.UNKNOWN}
)
_AMOUNT: Final = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,2})?")


@dataclass(frozen=True, slots=True)
class Series:
    """What hourly sums are kept apart by. None: not known."""

    subscriber: str | None
    model: str | None
    provider: str | None
    route: str | None
    status_class: str
    dimensions: tuple[tuple[str, str], ...] = ()  # those that the call has, by name


@dataclass(slots=True)
class Delta:
    """What is to be added to one series in one hour."""

    hour: int  # Unix seconds of its start
    series: Series
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    tokens: dict[str, int] = field(default_factory=dict)  # only kinds that were reported
    cost_usd: Decimal | None = None
    units: dict[str, Decimal] = field(default_factory=dict)

    def join(self, other: Delta) -> None:
        """Add another one of the same hour and series."""
        for name, count in other.counts.items():
            self.counts[name] += count
        for name, count in other.tokens.items():
            self.tokens[name] = self.tokens.get(name, 0) + count
        if other.cost_usd is not None:
            self.cost_usd = other.cost_usd if self.cost_usd is None else EXACT.add(self.cost_usd, other.cost_usd)
        for name, amount in other.units.items():
            self.units[name] = EXACT.add(self.units.get(name, Decimal(0)), amount)

    def negative(self) -> Delta:
        """What takes this back."""
        return Delta(
            hour=self.hour,
            series=self.series,
            counts={name: -count for name, count in self.counts.items()},
            tokens={name: -count for name, count in self.tokens.items()},
            cost_usd=None if self.cost_usd is None else -self.cost_usd,
            units={name: -amount for name, amount in self.units.items()},
        )


def grouped(records: Iterable[Record]) -> dict[tuple[int, Series], list[Record]]:
    """Records by hour and series, both in order of first appearance: everything is added up group by group, since a
    batch has a hundred records and few groups."""
    found: dict[tuple[int, Series], list[Record]] = {}
    known: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        usage, subscriber = record.usage, record.subscriber
        # What `hour_of` and `series_of` look at, as it is: they are asked once for each distinct row of it.
        raw = (
            record.started_s // HOUR_S,
            record.status,
            record.route,
            record.outcome,
            None if subscriber is None else subscriber.id,
            None if usage is None else (usage.model, usage.request_model, usage.provider),
            tuple(record.dimensions.items()) if record.dimensions else None,
            record.upstream,
        )
        group = known.get(raw)
        if group is None:
            group = known[raw] = found.setdefault((hour_of(record), series_of(record)), [])
        group.append(record)
    return found


def deltas(groups: Mapping[tuple[int, Series], Sequence[Record]]) -> list[Delta]:
    """The effects of these records, by hour and series."""
    return [_delta(hour, series, records) for (hour, series), records in groups.items()]


def _delta(hour: int, series: Series, records: Sequence[Record]) -> Delta:
    usages = [record.usage for record in records if record.usage is not None]
    states = [usage.usage_state for usage in usages]
    without = states.count(UsageState.ABSENT)
    delta = Delta(
        hour,
        series,
        counts={
            "records": len(records),
            "calls": [record.parent_id for record in records].count(None),
            "errors": sum([(record.status or 0) >= 400 or record.outcome in _FAULTS for record in records]),
            "with_usage": len(usages) - without,
            "partial_usage": states.count(UsageState.PARTIAL),
            "without_usage": without,
            "unpriced": 0,
            "request_bytes": sum([record.request_bytes for record in records]),
            "response_bytes": sum([record.response_bytes for record in records]),
        },
    )
    for name, get in _TOKENS:
        reported = [count for count in map(get, usages) if type(count) is int]
        if reported:
            delta.tokens[name] = sum(reported)
    for record in records:
        cost = usd_of(record)
        if cost is not None:
            delta.cost_usd = cost if delta.cost_usd is None else EXACT.add(delta.cost_usd, cost)
        elif _is_unpriced(record):
            delta.counts["unpriced"] += 1
    for usage in usages:
        if usage.units:
            _add_units(delta.units, usage.units)
    return delta


def usd_of(record: Record) -> Decimal | None:
    """What a call cost in US dollars; None where that is not known, or priced in another currency."""
    cost = record.cost
    if cost is not None:
        return read_amount(cost.get("total")) if cost.get("currency") == "USD" else None
    # Of a record that nobody priced: what its provider states.
    return None if record.usage is None or record.usage.cost_usd is None else read_amount(record.usage.cost_usd)


def _is_unpriced(record: Record) -> bool:
    return record.cost is not None and record.cost.get("total") is None and _may_be_unpriced(record)


def _may_be_unpriced(record: Record) -> bool:
    """A call that was refused cost nothing that could be known, and where prices are switched off none is missing."""
    return (record.status or 0) < 400 and (record.cost or {}).get("reason") != NO_TABLE and may_have_price(record.usage)


def may_have_price(usage: Usage | None) -> bool:
    """Whether a price could be known by what was called: an API that is none of models names neither, and its own
    counts lack no price until one is set."""
    return usage is None or (usage.provider or usage.model or usage.request_model) is not None


def delta_of(group: CallGroup) -> Delta:
    """The effect of calls that differ in numbers only."""
    facts, calls = group.kind.facts, group.calls
    series = facts.get(Series)
    if not isinstance(series, Series):
        series = facts[Series] = series_of(group.kind.example)
    record = group.kind.example
    state = None if record.usage is None else record.usage.usage_state
    without = calls if state is UsageState.ABSENT else 0
    return Delta(
        group.hour,
        series,
        counts={
            "records": calls,
            "calls": calls if record.parent_id is None else 0,
            "errors": calls if (record.status or 0) >= 400 or record.outcome in _FAULTS else 0,
            "with_usage": 0 if state is None else calls - without,
            "partial_usage": calls if state is UsageState.PARTIAL else 0,
            "without_usage": without,
            "unpriced": group.unpriced if group.unpriced and _may_be_unpriced(record) else 0,
            "request_bytes": group.request_bytes,
            "response_bytes": group.response_bytes,
        },
        tokens={name: group.tokens[name] for name in TOKENS if name in group.tokens},
        cost_usd=Decimal(group.cost_pico).scaleb(-12, EXACT) if group.priced else None,
    )


def merged(all_deltas: Iterable[Delta]) -> list[Delta]:
    """One for each hour and series. Takes them over."""
    found: dict[tuple[int, Series], Delta] = {}
    for delta in all_deltas:
        there = found.setdefault((delta.hour, delta.series), delta)
        if there is not delta:
            there.join(delta)
    return list(found.values())


def _add_units(sums: dict[str, Decimal], units: Mapping[str, object]) -> None:
    for name, stated in units.items():
        amount = read_amount(stated)
        if amount is not None:
            key = _name(name) or "other"
            sums[key] = EXACT.add(sums.get(key, Decimal(0)), amount)


def hour_of(record: Record) -> int:
    """The start of the hour that the call began in, Unix seconds."""
    return int(record.started_s // HOUR_S) * HOUR_S


def series_of(record: Record) -> Series:
    """What a record is summed under."""
    usage = record.usage
    return Series(
        subscriber=subscriber_of(record),
        model=None if usage is None else _name(usage.model or usage.request_model),
        provider=None if usage is None else _name(usage.provider),
        route=_name(record.route),
        status_class="none" if record.status is None else f"{record.status // 100}xx",
        dimensions=_filed(record),
    )


def _filed(record: Record) -> tuple[tuple[str, str], ...]:
    """What a record is filed under: its dimensions, and which of several upstreams it was for, unless one of its own is
    called so."""
    found = record.dimensions
    if record.upstream is not None:
        found = {UPSTREAM: record.upstream, **found}
    return tuple(sorted((name, value[:NAME_CHARS_MAX]) for name, value in found.items() if value))


def subscriber_of(record: Record) -> str | None:
    """A credential that the upstream turned down is nobody's: else random keys would grow the ledger."""
    if record.subscriber is None:
        return None
    if record.status in (401, 403) and record.outcome is not Outcome.DENIED:
        return UNAUTHENTICATED
    return _name(record.subscriber.id)


def _name(text: str | None) -> str | None:
    return text[:NAME_CHARS_MAX] if text else None


def read_amount(stated: object) -> Decimal | None:
    """An exact decimal from what a provider stated, or None: an odd amount must not stop a ledger."""
    if isinstance(stated, bool) or not isinstance(stated, (int, float, str, Decimal)):
        return None
    text = repr(stated) if isinstance(stated, float) else str(stated)
    if len(text) > AMOUNT_CHARS_MAX or not _AMOUNT.fullmatch(text):
        return None
    amount = Decimal(text)
    places = amount.as_tuple().exponent
    # Within 18 digits before and 24 behind the point, so that sums stay exact within DIGITS_MAX.
    if not isinstance(places, int) or places < -24 or amount.adjusted() > 18:
        return None
    return amount


def write_amount(amount: Decimal) -> str:
    """A decimal as plain text: no exponent, no trailing zeros."""
    text = format(amount, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def to_wire(batch: Sequence[Delta]) -> list[dict[str, Any]]:
    """Deltas as JSON values."""
    return [
        {
            "hour": d.hour,
            "series": series_wire(d.series),
            "counts": {name: write_int(value) for name, value in d.counts.items() if value},
            "tokens": {name: write_int(value) for name, value in d.tokens.items()},
            **({} if d.cost_usd is None else {"cost_usd": write_amount(d.cost_usd)}),
            **({"units": {n: write_amount(v) for n, v in sorted(d.units.items())}} if d.units else {}),
        }
        for d in batch
    ]


def series_wire(one: Series) -> list[Any]:
    """As a JSON value; the dimensions stand behind the rest, where there are any."""
    fixed = [one.subscriber, one.model, one.provider, one.route, one.status_class]
    return [*fixed, dict(one.dimensions)] if one.dimensions else fixed


def _series_from(wire: Sequence[Any]) -> Series:
    subscriber, model, provider, route, status_class, *rest = wire
    found: dict[str, str] = rest[0] if rest else {}
    return Series(subscriber, model, provider, route, status_class, tuple(sorted(found.items())))


def from_wire(rows: Sequence[Mapping[str, Any]]) -> list[Delta]:
    """The other way round. Raises `ValueError`, `KeyError` or `TypeError` on what is no delta."""
    return [
        Delta(
            hour=row["hour"],
            series=_series_from(row["series"]),
            counts={name: int(row["counts"].get(name, 0)) for name in COUNTS},
            tokens={name: int(value) for name, value in row["tokens"].items() if name in TOKENS},
            cost_usd=Decimal(row["cost_usd"]) if "cost_usd" in row else None,
            units={name: Decimal(value) for name, value in row.get("units", {}).items()},
        )
        for row in rows
    ]


def write_int(value: int) -> int | str:
    """As JSON keeps it exactly: a text where readers would round the number."""
    return value if -JSON_INT_MAX <= value <= JSON_INT_MAX else str(value)


def body_of(batch: Sequence[Delta], buckets: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """One sealed delivery to the ledger."""
    body: dict[str, Any] = {"hourly": to_wire(batch)}
    if buckets:
        body["buckets"] = list(buckets)
    return orjson.dumps(body)
