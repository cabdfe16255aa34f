"""Hourly sums: the effects that a batch of records has on the ledger.

A batch becomes a list of deltas, one for each hour and series (subscriber, model, provider, route, status
class), written as JSON. Applying the same deltas in any order gives the same sums, and every number is
exact: whole numbers of any size, money as decimals written as text.

Null is kept apart from zero: a token sum stays null until a record reports that kind of token, and how many
records had usage, had a lower bound, or had none, is counted beside the sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow
from typing import Any, Final

import orjson

from sidecar.exchange import Outcome, Usage
from sidecar.record import Record

HOUR_S: Final = 3600
NAME_CHARS_MAX: Final = 256  # of a series name: ids are at most 200, a model name comes from the wire
DIGITS_MAX: Final = 60  # of a money sum: 10^12 calls of 10^18 with 24 places fit
AMOUNT_CHARS_MAX: Final = 40  # of one amount as stated; what is longer is no amount
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
COUNTS: Final = (
    "records",  # everything, also messages of WebSockets
    "calls",  # without those messages
    "errors",  # status 400 and above, or an ending that is the upstream's or our fault
    "with_usage",  # final, partial or estimated
    "partial_usage",  # of these, a lower bound
    "without_usage",  # model calls whose answer said nothing
    "request_bytes",
    "response_bytes",
)
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


@dataclass(slots=True)
class Delta:
    """What is to be added to one series in one hour."""

    hour: int  # Unix seconds of its start
    series: Series
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    tokens: dict[str, int] = field(default_factory=dict)  # only kinds that were reported
    cost_usd: Decimal | None = None
    units: dict[str, Decimal] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        counts = self.counts
        counts["records"] += 1
        counts["calls"] += record.parent_id is None
        counts["errors"] += (record.status or 0) >= 400 or record.outcome in _FAULTS
        counts["request_bytes"] += record.request_bytes
        counts["response_bytes"] += record.response_bytes
        if record.usage is not None:
            self._add_usage(record.usage)

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

    def _add_usage(self, usage: Usage) -> None:
        absent = usage.usage_state == "absent"
        self.counts["without_usage"] += absent
        self.counts["with_usage"] += not absent
        self.counts["partial_usage"] += usage.usage_state == "partial"
        for name in TOKENS:
            value = getattr(usage, name)
            if type(value) is int:
                self.tokens[name] = self.tokens.get(name, 0) + value
        cost = read_amount(usage.cost_usd)
        if cost is not None:
            self.cost_usd = cost if self.cost_usd is None else EXACT.add(self.cost_usd, cost)
        for name, stated in usage.units.items():
            amount = read_amount(stated)
            if amount is not None:
                key = _name(name) or "other"
                self.units[key] = EXACT.add(self.units.get(key, Decimal(0)), amount)


def deltas(records: Iterable[Record]) -> list[Delta]:
    """The effects of these records, by hour and series, in order of first appearance."""
    found: dict[tuple[int, Series], Delta] = {}
    for record in records:
        key = (hour_of(record), series_of(record))
        delta = found.get(key)
        if delta is None:
            delta = found[key] = Delta(*key)
        delta.add(record)
    return list(found.values())


def hour_of(record: Record) -> int:
    return int(record.started_at.timestamp()) // HOUR_S * HOUR_S


def series_of(record: Record) -> Series:
    usage = record.usage
    return Series(
        subscriber=subscriber_of(record),
        model=None if usage is None else _name(usage.model or usage.request_model),
        provider=None if usage is None else _name(usage.provider),
        route=_name(record.route),
        status_class="none" if record.status is None else f"{record.status // 100}xx",
    )


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
            "series": [d.series.subscriber, d.series.model, d.series.provider, d.series.route, d.series.status_class],
            "counts": {name: write_int(value) for name, value in d.counts.items() if value},
            "tokens": {name: write_int(value) for name, value in d.tokens.items()},
            **({} if d.cost_usd is None else {"cost_usd": write_amount(d.cost_usd)}),
            **({"units": {n: write_amount(v) for n, v in sorted(d.units.items())}} if d.units else {}),
        }
        for d in batch
    ]


def from_wire(rows: Sequence[Mapping[str, Any]]) -> list[Delta]:
    """The other way round. Raises `ValueError`, `KeyError` or `TypeError` on what is no delta."""
    return [
        Delta(
            hour=row["hour"],
            series=Series(*row["series"]),
            counts={name: int(row["counts"].get(name, 0)) for name in COUNTS},
            tokens={name: int(value) for name, value in row["tokens"].items() if name in TOKENS},
            cost_usd=Decimal(row["cost_usd"]) if "cost_usd" in row else None,
            units={name: Decimal(value) for name, value in row.get("units", {}).items()},
        )
        for row in rows
    ]


def write_int(value: int) -> int | str:
    return value if -JSON_INT_MAX <= value <= JSON_INT_MAX else str(value)


def body_of(batch: Sequence[Delta], buckets: Sequence[Mapping[str, Any]] = ()) -> bytes:
    """One sealed delivery to the ledger."""
    body: dict[str, Any] = {"hourly": to_wire(batch)}
    if buckets:
        body["buckets"] = list(buckets)
    return orjson.dumps(body)
