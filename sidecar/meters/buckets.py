"""Running values: what a batch of records adds to each meter, by subscriber, group and bucket.

Every operation gives the same end whatever the order: sums add, the greatest wins, of two latest the one
with the greater (event time, record id), and unique values are a set. Sets hold hashes, and at most
`UNIQUE_MAX` of them: beyond that the count stays at the limit, whichever came first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from itertools import chain
from typing import Any, Final

from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import EXACT, Delta, Series, delta_of, deltas, grouped, merged, subscriber_of, write_amount
from sidecar.meters.properties import differs_in_group, value_of
from sidecar.model.call_group import SUMMED, CallGroup
from sidecar.model.record import Record

Groups = Iterable[tuple[tuple[int, Series], Sequence[Record]]]
"""What `hourly.grouped` makes: records by hour (Unix seconds of its start) and series."""

UNIQUE_MAX: Final = 10_000  # of one bucket: 160 kB on disk
SUMS: Final = frozenset({Kind.COUNT, Kind.SUM})
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_APART: Final = "apart"
_NOWHERE: Final = "nowhere"
_MICROSECOND: Final = timedelta(microseconds=1)
HASH_BYTES: Final = 8  # two of 10,000 values meet once in 3.7 * 10^11 buckets


@dataclass(frozen=True, slots=True)
class BucketKey:
    """What a running value is kept apart by."""

    meter: str
    version: str
    subscriber: str | None
    group: str | None
    start: int  # Unix seconds


@dataclass(slots=True)
class BucketDelta:
    """What is to be done to one running value."""

    key: BucketKey
    kind: Kind
    value: Decimal | None = None
    at_us: int = 0  # LATEST: event time in Unix microseconds
    record_id: str = ""  # LATEST: decides between equal times
    hashes: set[str] = field(default_factory=set)

    def add(self, value: int | str | Decimal, record: Record) -> None:
        """Take in what the meter measures of this record."""
        if self.kind is Kind.UNIQUE_COUNT:
            self.hashes.add(hash_of(str(value)))
            return
        number = Decimal(value)
        if self.kind is Kind.LATEST:
            at = ((record.started_at - _EPOCH) // _MICROSECOND, record.id)
            if self.value is None or at > (self.at_us, self.record_id):
                self.value, (self.at_us, self.record_id) = number, at
        elif self.kind is Kind.MAX:
            self.value = number if self.value is None else max(self.value, number)
        else:
            self.plus(number)

    def plus(self, number: Decimal) -> None:
        """Add to a sum or a count."""
        self.value = number if self.value is None else EXACT.add(self.value, number)

    def join(self, other: BucketDelta) -> None:
        """Add what another batch adds to the same running value."""
        if self.kind is Kind.UNIQUE_COUNT:
            self.hashes |= other.hashes
        elif other.value is None:
            return
        elif self.kind is Kind.LATEST:
            if self.value is None or (other.at_us, other.record_id) > (self.at_us, self.record_id):
                self.value, self.at_us, self.record_id = other.value, other.at_us, other.record_id
        elif self.kind is Kind.MAX:
            self.value = other.value if self.value is None else max(self.value, other.value)
        else:
            self.plus(other.value)

    def negative(self) -> BucketDelta:
        """What takes a sum back."""
        return BucketDelta(self.key, self.kind, None if self.value is None else -self.value)


def bucket_deltas(groups: Groups, meters: Sequence[Meter]) -> list[BucketDelta]:
    """The effects of grouped records on these meters, in order of first appearance."""
    found: dict[BucketKey, BucketDelta] = {}
    # A bucket never starts within an hour, so its start is worked out once for each meter and hour.
    known: list[tuple[Meter, str, dict[int, int]]] = [(meter, meter.version, {}) for meter in meters]
    for (hour, series), records in groups:
        for meter, version, starts in known:
            measured = meter.measured(records)
            if not measured:
                continue
            if hour not in starts:
                starts[hour] = meter.bucket(measured[0].started_at)
            start = starts[hour]
            if meter.kind in SUMS and meter.group_by is None:
                numbers = meter.numbers(measured)
                if numbers:
                    key = BucketKey(meter.name, version, series.subscriber, None, start)
                    _delta_at(found, key, meter).plus(_sum(numbers))
                continue
            for record in measured:
                value = meter.read(record)
                if value is not None:
                    key = BucketKey(meter.name, version, series.subscriber, meter.group(record), start)
                    _delta_at(found, key, meter).add(value, record)
    return list(found.values())


@dataclass(slots=True)
class BatchSums:
    """All that a batch of records adds: hour by hour, and to each meter's running values."""

    hourly: list[Delta]
    buckets: list[BucketDelta]


def batch_sums(records: Iterable[Record], meters: Sequence[Meter], call_groups: Sequence[CallGroup] = ()) -> BatchSums:
    """Raises `ArithmeticError` where a sum is not exact."""
    by_series = grouped(records)
    hourly = merged([*deltas(by_series), *map(delta_of, call_groups)]) if call_groups else deltas(by_series)
    buckets = {delta.key: delta for delta in bucket_deltas(by_series.items(), meters)}
    for group in call_groups:
        _add_group(buckets, group, meters)
    return BatchSums(hourly, list(buckets.values()))


def add_batches(batches: Sequence[BatchSums]) -> BatchSums:
    """Several batches as one: each running value is touched once, whatever is in them. Takes them over."""
    if len(batches) == 1:
        return batches[0]
    buckets: dict[BucketKey, BucketDelta] = {}
    for delta in chain.from_iterable(batch.buckets for batch in batches):
        found = buckets.setdefault(delta.key, delta)
        if found is not delta:
            found.join(delta)
    return BatchSums(merged(chain.from_iterable(batch.hourly for batch in batches)), list(buckets.values()))


def _add_group(found: dict[BucketKey, BucketDelta], group: CallGroup, meters: Sequence[Meter]) -> None:
    """What calls of one kind add. What a meter makes of all of them alike is asked once for the kind."""
    facts = group.kind.facts
    known = facts.get(BucketKey)
    if not isinstance(known, _Keys) or known.hour != group.hour or known.meters is not meters:
        keys = [_key_for(meter, group.kind.example, group.hour) for meter in meters]
        known = facts[BucketKey] = _Keys(meters, group.hour, keys)
    apart: list[Meter] = []
    for meter, key in zip(meters, known.keys, strict=True):
        if key is _APART:
            apart.append(meter)
        elif isinstance(key, BucketKey) and meter.expression is not None:
            numbers = meter.expression.values(_asked(meter.expression.names, group))
            if numbers:
                _delta_at(found, key, meter).plus(_sum(numbers))
        elif isinstance(key, BucketKey):
            total = group.calls if meter.kind is Kind.COUNT else group.sum_of(meter.field or "")
            if total is not None:
                _delta_at(found, key, meter).plus(Decimal(total))
    if apart:
        for delta in bucket_deltas(grouped(group.records()).items(), apart):
            there = found.setdefault(delta.key, delta)
            if there is not delta:
                there.join(delta)


@dataclass(slots=True, frozen=True, eq=False)
class _Keys:
    """Where each of these meters adds calls of a kind, in one hour."""

    meters: Sequence[Meter]
    hour: int
    keys: Sequence[BucketKey | str]


def _key_for(meter: Meter, example: Record, hour: int) -> BucketKey | str:
    """Where a meter adds calls like this one: its running value; `_APART` where each is to be asked, `_NOWHERE`."""
    asked = {each.key for each in meter.filters} | ({meter.group_by} if meter.group_by else set())
    if meter.kind not in SUMS or any(map(differs_in_group, asked)):
        return _APART
    if meter.expression is not None:
        if any(differs_in_group(name) and name not in SUMMED for name in meter.expression.names):
            return _APART
    elif meter.kind is Kind.SUM and meter.field not in SUMMED:
        return _APART
    if not meter.measured((example,)):
        return _NOWHERE
    start = meter.bucket(datetime.fromtimestamp(hour, UTC))
    return BucketKey(meter.name, meter.version, subscriber_of(example), meter.group(example), start)


def _asked(names: Sequence[str], group: CallGroup) -> Iterator[Mapping[str, Any]]:
    """What an expression reads of each of these calls: their numbers, beside what they have in common. Each is to be
    used before the next one is asked for."""
    values: dict[str, Any] = {}
    for name in names:
        if name not in SUMMED and (value := value_of(group.kind.example, name)) is not None:
            values[name] = float(value) if isinstance(value, Decimal) else value
    sent, received = "request_bytes" in names, "response_bytes" in names
    tokens = [name for name in names if name in SUMMED and not name.endswith("_bytes")]
    for request_bytes, response_bytes, usage in group.each():
        if sent:
            values["request_bytes"] = request_bytes
        if received:
            values["response_bytes"] = response_bytes
        for name in tokens:
            count = None if usage is None else usage.get(name)
            if type(count) is int:
                values[name] = count
            else:
                values.pop(name, None)
        yield values


def _delta_at(found: dict[BucketKey, BucketDelta], key: BucketKey, meter: Meter) -> BucketDelta:
    delta = found.get(key)
    if delta is None:
        delta = found[key] = BucketDelta(key, meter.kind)
    return delta


def _sum(numbers: Sequence[int | Decimal]) -> Decimal:
    """Exact: whole numbers as such, decimals in a context that would say so."""
    total = Decimal(sum([number for number in numbers if type(number) is int]))
    with localcontext(EXACT):
        return sum([number for number in numbers if type(number) is Decimal], total)


def amount(delta: BucketDelta, meter: Meter) -> Decimal:
    """What a delta alone amounts to, with the multiplier: for trying a meter on recorded calls."""
    value = Decimal(min(len(delta.hashes), UNIQUE_MAX)) if delta.kind is Kind.UNIQUE_COUNT else delta.value
    return EXACT.multiply(value or Decimal(0), meter.multiplier or Decimal(1))


def hash_of(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=HASH_BYTES).hexdigest()


def to_wire(batch: Sequence[BucketDelta]) -> list[dict[str, Any]]:
    """As JSON values."""
    rows = []
    for d in batch:
        row: dict[str, Any] = {
            "key": [d.key.meter, d.key.version, d.key.subscriber, d.key.group, d.key.start],
            "kind": str(d.kind),
        }
        if d.value is not None:
            row["value"] = write_amount(d.value)
        if d.kind is Kind.LATEST:
            row |= {"at_us": d.at_us, "record_id": d.record_id}
        if d.hashes:
            row["hashes"] = sorted(d.hashes)
        rows.append(row)
    return rows


def from_wire(rows: Sequence[Mapping[str, Any]]) -> list[BucketDelta]:
    """The other way round. Raises `ValueError`, `KeyError` or `TypeError` on what is no delta."""
    return [
        BucketDelta(
            key=BucketKey(*row["key"]),
            kind=Kind(row["kind"]),
            value=Decimal(row["value"]) if "value" in row else None,
            at_us=row.get("at_us", 0),
            record_id=row.get("record_id", ""),
            hashes=set(row.get("hashes", ())),
        )
        for row in rows
    ]
