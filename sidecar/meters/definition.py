"""Meters: named definitions that turn records into a quantity, as Flexprice's meters API describes them.

    [[meters]]
    name = "big_answers"                        # [a-z][a-z0-9_]{0,62}: it goes into keys at the backends
    event_name = "api_request"                  # the backend's event; the backend's own rule when not set
    reset_usage = "BILLING_PERIOD"              # the calendar month, from `anchor_day`; or NEVER
    filters = [{ key = "model", values = ["gpt-5", "gpt-5-mini"] }]      # any of the values, all of the filters
    aggregation = { type = "SUM", field = "output_tokens", multiplier = "0.001", bucket_size = "DAY" }

A meter measures calls that the upstream answered, of any status, unless a filter says otherwise; the `api_calls` that
is there without definitions counts those below 400. The same definition gives the value sent to a backend and the
total in the ledger. Every fault of every definition is found at once and named. docs/meters.md has all the words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from difflib import get_close_matches
from enum import StrEnum
from typing import Any, Final

import orjson

from sidecar.meters.expression import Expression, ExpressionError, Failure, compile_expression
from sidecar.meters.hourly import EXACT, read_amount, write_amount
from sidecar.meters.properties import MONEY, TEXTS, Value, Vocabulary, answered, reader_of, text_of, value_of
from sidecar.model.record import Record

NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,62}")  # `<36 characters of id>:<name>` stays within Stripe's 100
EVENT_NAME: Final = re.compile(r"[!-~]([ -~]{0,98}[!-~])?")  # Stripe's limit is the lowest
FIELDS: Final = ("name", "event_name", "aggregation", "filters", "reset_usage", "anchor_day")
AGGREGATION_FIELDS: Final = ("type", "field", "expression", "multiplier", "bucket_size", "group_by")
METERS_MAX: Final = 100  # each costs 2 µs a record; no price list known to us has more
VALUES_MAX: Final = 1000
HOUR_S: Final = 3600


class Kind(StrEnum):
    """How a meter makes one value of many; `ABOUT` says each."""

    COUNT = "COUNT"
    SUM = "SUM"
    MAX = "MAX"
    UNIQUE_COUNT = "UNIQUE_COUNT"
    LATEST = "LATEST"


# What each works on, and what it adds up to; for docs/meters.md.
ABOUT: Final[Mapping[Kind, tuple[str, str]]] = {
    Kind.COUNT: ("nothing", "the calls that pass the filters"),
    Kind.SUM: ("`field` or `expression`", "the sum"),
    Kind.MAX: ("`field` or `expression`", "the greatest value; in each bucket and group, and their sum"),
    Kind.UNIQUE_COUNT: ("`field`", "how many different values there were, at most 10,000 in a period"),
    Kind.LATEST: ("`field` or `expression`", "the value of the latest call"),
}
BUCKETED: Final = frozenset({Kind.SUM, Kind.MAX})


class Bucket(StrEnum):
    """The spans of time whose greatest values or sums are kept apart."""

    HOUR = "HOUR"
    DAY = "DAY"
    MONTH = "MONTH"


class Reset(StrEnum):
    """When a running value begins anew."""

    BILLING_PERIOD = "BILLING_PERIOD"
    NEVER = "NEVER"


class MetersError(ValueError):
    """The definitions cannot be used. `problems` has every fault, each with the meter's name."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class Filter:
    """Records pass that have one of `values` under `key`."""

    key: str
    values: tuple[str, ...]

    def taken(self, records: Iterable[Record]) -> list[Record]:
        read = reader_of(self.key)
        return [record for record in records if text_of(read(record)) in self.values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """One definition, checked."""

    name: str
    kind: Kind
    event_name: str | None = None
    field: str | None = None
    expression: Expression | None = None
    multiplier: Decimal | None = None
    bucket_size: Bucket | None = None
    group_by: str | None = None
    filters: tuple[Filter, ...] = ()
    reset: Reset = Reset.BILLING_PERIOD
    anchor_day: int = 1

    def watched(self, failed: Callable[[], None]) -> Meter:
        """The same, which tells each time that its expression gives no number for a record that it measures."""
        if self.expression is None:
            return self
        return replace(self, expression=replace(self.expression, failed=failed))

    def measured(self, records: Iterable[Record]) -> list[Record]:
        """Those of them that this meter measures."""
        found = [record for record in records if answered(record)]
        for each in self.filters:
            found = each.taken(found)
        return found

    def value(self, record: Record) -> Value:
        """What this record adds, before the multiplier: a number, a text for UNIQUE_COUNT; None: nothing."""
        return self.read(record) if self.measured((record,)) else None

    def read(self, record: Record) -> int | str | Decimal | None:
        """The same of a record that is measured."""
        if self.kind is Kind.UNIQUE_COUNT:
            return text_of(value_of(record, self.field or ""))
        return next(iter(self.numbers((record,))), None)

    def numbers(self, records: Sequence[Record]) -> list[int | Decimal]:
        """What measured records add, before the multiplier, without those that have no number."""
        if self.kind is Kind.COUNT:
            return [1] * len(records)
        read = reader_of(self.field or "") if self.expression is None else self.expression.value
        return [value for value in map(read, records) if type(value) is int or type(value) is Decimal]

    def quantity(self, record: Record) -> int | Decimal | None:
        """What a backend that takes one number per event is told; None: no event, never a zero."""
        value = self.value(record)
        if isinstance(value, str) or value is None:
            return None
        return self.scaled(value)

    def failure(self, record: Record) -> str | None:
        """Why there is no value of a record that is measured and knows all that the expression reads; else None."""
        if self.expression is None or not self.measured((record,)):
            return None
        found = self.expression.result(record)
        return found.reason if isinstance(found, Failure) else None

    def scaled(self, value: int | Decimal) -> int | Decimal:
        """With the multiplier, exactly. Raises `ArithmeticError` beyond the digits of a sum."""
        return value if self.multiplier is None else EXACT.multiply(Decimal(value), self.multiplier)

    @property
    def is_money(self) -> bool:
        """Whether it sums up what calls cost, or what customers are charged."""
        return self.kind is Kind.SUM and self.field in MONEY

    def group(self, record: Record) -> str | None:
        return None if self.group_by is None else text_of(value_of(record, self.group_by))

    def bucket(self, at: datetime) -> int:
        """Start of the bucket that a time falls in, Unix seconds, UTC."""
        start = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
        if self.bucket_size is Bucket.HOUR:
            return int(start.timestamp())
        if self.bucket_size is Bucket.DAY:
            return int(start.replace(hour=0).timestamp())
        if self.bucket_size is Bucket.MONTH:
            return int(start.replace(hour=0, day=1).timestamp())
        return self.period(at)

    def period(self, at: datetime) -> int:
        """Start of the period that a time falls in: 0 where usage is never reset."""
        if self.reset is Reset.NEVER:
            return 0
        day = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        if day.day < self.anchor_day:
            day = day.replace(year=day.year - (day.month == 1), month=(day.month - 2) % 12 + 1, day=1)
        return int(day.replace(day=self.anchor_day).timestamp())

    @property
    def version(self) -> str:
        """Of what it measures: the ledger starts anew when a definition changes."""
        said = [
            self.kind,
            self.field,
            self.expression and self.expression.text,
            self.bucket_size,
            self.group_by,
            sorted((f.key, sorted(f.values)) for f in self.filters),
            self.reset,
            self.anchor_day,
        ]
        return hashlib.sha256(orjson.dumps(said)).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """The definition in the form that it is written in, for `meters list`."""
        aggregation: dict[str, Any] = {
            "type": str(self.kind),
            "field": self.field,
            "expression": None if self.expression is None else self.expression.text,
            "multiplier": None if self.multiplier is None else write_amount(self.multiplier),
            "bucket_size": None if self.bucket_size is None else str(self.bucket_size),
            "group_by": self.group_by,
        }
        return {
            "name": self.name,
            **({} if self.event_name is None else {"event_name": self.event_name}),
            "aggregation": {key: value for key, value in aggregation.items() if value is not None},
            "filters": [{"key": f.key, "values": list(f.values)} for f in self.filters],
            "reset_usage": str(self.reset),
            **({} if self.anchor_day == 1 else {"anchor_day": self.anchor_day}),
        }


DEFAULT_METERS: Final = (
    # What the upstream refused, or failed at, is nobody's to pay unless an operator says so.
    Meter(
        name="api_calls",
        kind=Kind.COUNT,
        filters=(Filter("kind", ("call",)), Filter("status_class", ("1xx", "2xx", "3xx"))),
    ),
    Meter(name="input_tokens", kind=Kind.SUM, field="input_tokens"),
    Meter(name="output_tokens", kind=Kind.SUM, field="output_tokens"),
)


def read_meters(tables: Sequence[Mapping[str, Any]], vocabulary: Vocabulary | None = None) -> tuple[Meter, ...]:
    """Definitions from TOML or JSON; none gives the three defaults. Raises `MetersError` with every fault.

    `vocabulary`: the properties that there are; without one, every name that could be of an own field is taken.
    """
    if not tables:
        return DEFAULT_METERS
    problems: list[str] = []
    meters: list[Meter] = []
    if len(tables) > METERS_MAX:
        problems.append(f"meters: {len(tables)} are defined, at most {METERS_MAX} are taken")
    for number, table in enumerate(tables, 1):
        reading = _Reading(table, number, vocabulary or Vocabulary())
        meter = reading.meter()
        problems += reading.problems
        if meter is not None:
            meters.append(meter)
    names = [meter.name for meter in meters]
    problems += [
        f"meter {name}: is defined {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1
    ]
    if problems:
        raise MetersError(problems)
    return tuple(meters)


class _Reading:
    """One table on its way to a meter. Keys are taken out, so that what remains is unknown."""

    def __init__(self, table: Mapping[str, Any], number: int, vocabulary: Vocabulary) -> None:
        self.left = dict(table)
        self.vocabulary = vocabulary
        name = table.get("name")
        self.label = f"meter {name}" if isinstance(name, str) and NAME.fullmatch(name) else f"meter number {number}"
        self.problems: list[str] = []

    def meter(self) -> Meter | None:
        name = self._text("name", NAME, "a name of lower-case letters, digits and _, at most 63, a letter first")
        event_name = self._text("event_name", EVENT_NAME, "printable ASCII of at most 100 characters", needed=False)
        reset = self._word("reset_usage", Reset, self.left, default=Reset.BILLING_PERIOD)
        anchor = self._anchor(reset)
        filters = self._filters()
        parts = self._aggregation()
        self._unknown(self.left, "", FIELDS)
        if self.problems or name is None or parts is None:
            return None
        return Meter(
            name=name,
            event_name=event_name,
            filters=filters,
            reset=reset or Reset.BILLING_PERIOD,
            anchor_day=anchor,
            **parts,
        )

    def _wrong(self, what: str) -> None:
        self.problems.append(f"{self.label}: {what}")

    def _no_property(self, name: object) -> str | None:
        """What is wrong with the name of a property."""
        if not isinstance(name, str):
            return "is no text"
        if self.vocabulary.knows(name):
            return None
        return f"no record has such a property{self.vocabulary.suggestion(name[:100])}"

    def _unknown(self, left: Mapping[str, Any], inside: str, known: Sequence[str]) -> None:
        for key in left:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f" ({', '.join(known)})"
            self._wrong(f"{inside}{key!r} is no field of a meter{hint}")

    def _text(self, key: str, form: re.Pattern[str], expected: str, *, needed: bool = True) -> str | None:
        value = self.left.pop(key, None)
        if value is None and not needed:
            return None
        if not isinstance(value, str) or not form.fullmatch(value):
            self._wrong(f"{key} {'is missing' if value is None else 'is wrong'}: expected {expected}")
            return None
        return value

    def _word(
        self, key: str, words: type[StrEnum], table: dict[str, Any], *, default: Any = None, inside: str = ""
    ) -> Any:
        value = table.pop(key, None)
        if value is None:
            return default
        if not isinstance(value, str) or value.upper() not in set(words):
            self._wrong(f"{inside}{key} is wrong: expected one of {', '.join(words)}")
            return default
        return words(value.upper())

    def _anchor(self, reset: Any) -> int:
        day = self.left.pop("anchor_day", 1)
        if not isinstance(day, int) or isinstance(day, bool) or not 1 <= day <= 28:
            self._wrong("anchor_day is wrong: expected a day that every month has, 1 to 28")
            return 1
        if day != 1 and reset is Reset.NEVER:
            self._wrong("anchor_day has no meaning where reset_usage is NEVER")
        return day

    def _filters(self) -> tuple[Filter, ...]:
        tables = self.left.pop("filters", [])
        if not isinstance(tables, list):
            self._wrong('filters is wrong: expected a list such as [{ key = "method", values = ["POST"] }]')
            return ()
        return tuple(f for f in map(self._filter, tables) if f is not None)

    def _filter(self, table: Any) -> Filter | None:
        if not isinstance(table, dict) or set(table) != {"key", "values"}:
            self._wrong('a filter is wrong: expected { key = "…", values = ["…"] }')
            return None
        key, values = table["key"], table["values"]
        if (problem := self._no_property(key)) is not None:
            self._wrong(f"filter key {key!r} is wrong: {problem}")
            return None
        if not isinstance(values, list) or not 1 <= len(values) <= VALUES_MAX:
            self._wrong(f"filter {key}: expected 1 to {VALUES_MAX} values")
            return None
        texts = [text_of(v) if isinstance(v, (str, int, bool)) else None for v in values]
        if None in texts:
            self._wrong(f"filter {key}: expected texts, whole numbers or true and false")
            return None
        return Filter(key, tuple(dict.fromkeys(t for t in texts if t is not None)))

    def _aggregation(self) -> dict[str, Any] | None:
        table = self.left.pop("aggregation", None)
        if not isinstance(table, dict):
            self._wrong('aggregation is missing: expected a table such as { type = "SUM", field = "input_tokens" }')
            return None
        left = dict(table)
        inside = "aggregation "
        kind = self._word("type", Kind, left, inside=inside)
        if kind is None and "type" not in table:
            self._wrong(f"aggregation type is missing: expected one of {', '.join(Kind)}")
        bucket = self._word("bucket_size", Bucket, left, inside=inside)
        field, expression = self._what(kind, left)
        group_by = left.pop("group_by", None)
        if group_by is not None and (problem := self._no_property(group_by)) is not None:
            self._wrong(f"aggregation group_by is wrong: {problem}")
        elif group_by is not None and (kind is not Kind.MAX or bucket is None):
            self._wrong("aggregation group_by is taken only with MAX and a bucket_size")
        if bucket is not None and kind is not None and kind not in BUCKETED:
            self._wrong("aggregation bucket_size is taken only with MAX and SUM")
        multiplier = self._multiplier(left)
        self._unknown(left, inside, AGGREGATION_FIELDS)
        return {
            "kind": kind,
            "field": field,
            "expression": expression,
            "multiplier": multiplier,
            "bucket_size": bucket,
            "group_by": group_by,
        }

    def _what(self, kind: Kind | None, left: dict[str, Any]) -> tuple[str | None, Expression | None]:
        field, text = left.pop("field", None), left.pop("expression", None)
        if kind is Kind.COUNT and (field is not None or text is not None):
            self._wrong("aggregation COUNT takes neither field nor expression")
            return None, None
        if kind is not None and kind is not Kind.COUNT and (field is None) == (text is None):
            self._wrong(f"aggregation {kind} needs a field or an expression, and not both")
            return None, None
        if field is not None and (problem := self._no_property(field)) is not None:
            self._wrong(f"aggregation field {field!r} is wrong: {problem}")
            return None, None
        if field in TEXTS and kind in (Kind.SUM, Kind.MAX, Kind.LATEST):
            self._wrong(f"aggregation field {field} is a text: {kind} needs a number")
        if text is None:
            return field, None
        if kind is Kind.UNIQUE_COUNT:
            self._wrong("aggregation UNIQUE_COUNT takes a field, no expression")
            return None, None
        return None, self._expression(text)

    def _expression(self, text: Any) -> Expression | None:
        if not isinstance(text, str) or not text.strip():
            self._wrong("aggregation expression is wrong: expected a text")
            return None
        try:
            return compile_expression(text, self.vocabulary)
        except ExpressionError as error:
            self._wrong(f"aggregation expression {error}")
            return None

    def _multiplier(self, left: dict[str, Any]) -> Decimal | None:
        stated = left.pop("multiplier", None)
        if stated is None:
            return None
        value = read_amount(stated) if not isinstance(stated, float) else None
        if value is None or value <= 0:
            self._wrong('aggregation multiplier is wrong: expected a decimal above 0 as a text, such as "1.5"')
            return None
        return value
