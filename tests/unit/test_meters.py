"""Meters: what a definition may say, what it measures, and that order does not matter."""

from __future__ import annotations

import random
from collections import defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.backend_fixtures import T0_NS, odd_records, record, usage

from sidecar.ledger import LedgerReader, LedgerStore
from sidecar.meters.buckets import UNIQUE_MAX, amount, bucket_deltas, from_wire, to_wire
from sidecar.meters.definition import DEFAULT_METERS, Kind, Meter, MetersError, Reset, read_meters
from sidecar.meters.expression import ExpressionError, compile_expression
from sidecar.meters.hourly import EXACT, body_of, grouped, write_amount
from sidecar.meters.properties import FIXED, as_json, is_property, properties, value_of
from sidecar.model.exchange import Outcome, Subscriber, UsageState
from sidecar.model.record import Record

HOUR_NS = 3600 * 10**9


def meter(kind: str = "SUM", field: str | None = "output_tokens", **changes: Any) -> Meter:
    aggregation = {"type": kind, **({} if field is None else {"field": field}), **changes.pop("aggregation", {})}
    (found,) = read_meters([{"name": "m", "aggregation": aggregation, **changes}])
    return found


# Definitions


def totals_of(reader: LedgerReader, found: Meter) -> dict[str | None, str]:
    """What the meter bills each subscriber: the sum over groups and buckets, of LATEST the last one's."""
    totals: dict[str | None, Decimal] = {}
    last: dict[str | None, datetime] = {}
    for row in reader.meter(found):
        value, start = Decimal(row.value), row.start or datetime.fromtimestamp(0, UTC)
        if found.kind is not Kind.LATEST:
            totals[row.subscriber] = EXACT.add(totals.get(row.subscriber, Decimal(0)), value)
        elif row.subscriber not in last or start >= last[row.subscriber]:
            totals[row.subscriber], last[row.subscriber] = value, start
    return {subscriber: write_amount(value) for subscriber, value in totals.items()}


def test_no_definitions_give_the_three_defaults() -> None:
    assert read_meters([]) == DEFAULT_METERS
    assert [(m.name, str(m.kind), m.field) for m in DEFAULT_METERS] == [
        ("api_calls", "COUNT", None),
        ("input_tokens", "SUM", "input_tokens"),
        ("output_tokens", "SUM", "output_tokens"),
    ]


def test_a_definition_reads_back_as_it_was_written() -> None:
    table = {
        "name": "peak",
        "event_name": "api_request",
        "aggregation": {
            "type": "MAX",
            "field": "response_bytes",
            "multiplier": "0.001",
            "bucket_size": "DAY",
            "group_by": "model",
        },
        "filters": [{"key": "method", "values": ["GET", "POST"]}, {"key": "dimension_team", "values": ["a"]}],
        "reset_usage": "BILLING_PERIOD",
        "anchor_day": 15,
    }
    (found,) = read_meters([table])
    assert found.to_dict() == table
    assert read_meters([found.to_dict()]) == (found,)
    assert read_meters([{"name": "m", "aggregation": {"type": "count"}}])[0].kind is Kind.COUNT


SUM = {"type": "SUM", "field": "input_tokens"}


@pytest.mark.parametrize(
    ("table", "word"),
    [
        ({}, "name is missing"),
        ({"name": "Big", "aggregation": SUM}, "name is wrong"),
        ({"name": "a" * 64, "aggregation": SUM}, "name is wrong"),
        ({"name": "m"}, "aggregation is missing"),
        ({"name": "m", "aggregation": {}}, "type is missing: expected one of COUNT"),
        ({"name": "m", "aggregation": {"type": "AVG", "field": "status"}}, "type is wrong"),
        ({"name": "m", "aggregation": {"type": "SUM"}}, "needs a field or an expression"),
        ({"name": "m", "aggregation": {**SUM, "expression": "1"}}, "and not both"),
        ({"name": "m", "aggregation": {"type": "COUNT", "field": "status"}}, "takes neither"),
        ({"name": "m", "aggregation": {"type": "SUM", "field": "tokens"}}, "'tokens' is wrong"),
        ({"name": "m", "aggregation": {"type": "SUM", "field": "model"}}, "is a text"),
        ({"name": "m", "aggregation": {"type": "UNIQUE_COUNT", "expression": "status"}}, "takes a field"),
        ({"name": "m", "aggregation": {**SUM, "multiplier": 1.5}}, "as a text"),
        ({"name": "m", "aggregation": {**SUM, "multiplier": "0"}}, "above 0"),
        ({"name": "m", "aggregation": {**SUM, "multiplier": "-1"}}, "above 0"),
        ({"name": "m", "aggregation": {**SUM, "multiplier": "1e999999"}}, "above 0"),
        ({"name": "m", "aggregation": {**SUM, "bucket_size": "WEEK"}}, "one of HOUR, DAY, MONTH"),
        ({"name": "m", "aggregation": {"type": "COUNT", "bucket_size": "DAY"}}, "only with MAX and SUM"),
        ({"name": "m", "aggregation": {**SUM, "group_by": "model"}}, "only with MAX"),
        ({"name": "m", "aggregation": {"type": "MAX", "field": "status", "group_by": "x"}}, "group_by is wrong"),
        ({"name": "m", "aggregation": {**SUM, "fields": "x"}}, "'fields' is no field of a meter; did you mean field?"),
        ({"name": "m", "aggregation": SUM, "filter": []}, "'filter' is no field of a meter; did you mean filters?"),
        ({"name": "m", "aggregation": SUM, "window": "day"}, "(name, event_name, aggregation, filters, reset_usage"),
        ({"name": "m", "aggregation": SUM, "filters": {}}, "expected a list"),
        ({"name": "m", "aggregation": SUM, "filters": [{"key": "x", "values": ["a"]}]}, "filter key 'x'"),
        ({"name": "m", "aggregation": SUM, "filters": [{"key": "model", "values": []}]}, "expected 1 to 1000 values"),
        ({"name": "m", "aggregation": SUM, "filters": [{"key": "model", "values": [1.5]}]}, "expected texts"),
        ({"name": "m", "aggregation": SUM, "filters": ["model=x"]}, "a filter is wrong"),
        ({"name": "m", "aggregation": SUM, "reset_usage": "DAILY"}, "one of BILLING_PERIOD, NEVER"),
        ({"name": "m", "aggregation": SUM, "anchor_day": 31}, "1 to 28"),
        ({"name": "m", "aggregation": SUM, "anchor_day": 2, "reset_usage": "NEVER"}, "no meaning"),
        ({"name": "m", "aggregation": SUM, "event_name": "x" * 101}, "event_name is wrong"),
        ({"name": 7, "aggregation": SUM}, "meter number 1: name is wrong"),
    ],
)
def test_each_fault_is_named(table: dict[str, Any], word: str) -> None:
    with pytest.raises(MetersError) as caught:
        read_meters([table])
    assert any(word in problem for problem in caught.value.problems), caught.value.problems


def test_all_faults_of_all_meters_come_at_once() -> None:
    with pytest.raises(MetersError) as caught:
        read_meters([{"name": "a", "aggregation": SUM}, {"name": "a", "aggregation": SUM, "x": 1}, {}])
    assert len(caught.value.problems) >= 3
    with pytest.raises(MetersError, match="meter a: is defined 2 times"):
        read_meters([{"name": "a", "aggregation": SUM}] * 2)
    with pytest.raises(MetersError, match="at most 100"):
        read_meters([{"name": f"m{n}", "aggregation": SUM} for n in range(101)])


json_like: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)


@given(
    st.fixed_dictionaries(
        {},
        optional=dict.fromkeys(
            ("name", "event_name", "aggregation", "filters", "reset_usage", "anchor_day"), json_like
        ),
    ),
    st.dictionaries(st.sampled_from(["type", "field", "multiplier", "bucket_size", "group_by"]), json_like),
)
def test_any_table_gives_a_meter_or_named_faults(table: dict[str, Any], aggregation: dict[str, Any]) -> None:
    for each in (table, {**table, "name": "m", "aggregation": aggregation}):
        try:
            read_meters([each])
        except MetersError as error:
            unnamed = [problem for problem in error.problems if not problem.startswith("meter ")]
            if unnamed:
                pytest.fail(str(unnamed))


# Values


def test_count_counts_what_the_upstream_answered() -> None:
    calls = DEFAULT_METERS[0]
    assert calls.quantity(record(1)) == 1
    for good in (101, 200, 204, 304, 399):
        assert calls.quantity(record(1, status=good, usage=None)) == 1
    for bad in (400, 404, 429, 500, 503, None):
        assert calls.quantity(record(1, status=bad, usage=None)) is None, "below 400 only"
        assert DEFAULT_METERS[1].quantity(record(1, status=bad)) == 43, "what was consumed counts in any case"
    assert meter("COUNT", None).quantity(record(1, status=500, usage=None)) == 1, "of any status without a filter"
    assert calls.quantity(record(1, outcome=Outcome.CLIENT_LEFT)) == 1
    for outcome in (Outcome.DENIED, Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNKNOWN):
        assert calls.quantity(record(1, outcome=outcome)) is None
    assert calls.quantity(record(1, first_byte_ms=None, outcome=Outcome.UPSTREAM_TIMEOUT, status=504)) is None
    message = record(2, parent_id="p", first_byte_ms=None)
    assert calls.quantity(message) is None, "a message of a WebSocket is no call"
    assert DEFAULT_METERS[1].quantity(message) == 43, "but its tokens count"


def test_what_is_not_reported_is_no_event_and_never_zero() -> None:
    tokens = DEFAULT_METERS[1]
    assert tokens.quantity(record(1, usage=None)) is None
    assert tokens.quantity(record(1, usage=usage(input_tokens=None))) is None
    assert tokens.quantity(record(1, usage=usage(usage_state=UsageState.ABSENT, input_tokens=None))) is None
    assert tokens.quantity(record(1, usage=usage(input_tokens=0))) == 0


def test_filters_are_or_inside_and_and_between() -> None:
    found = meter(
        filters=[
            {"key": "model", "values": ["a", "b"]},
            {"key": "status", "values": [200, "201"]},
            {"key": "streamed", "values": [True]},
            {"key": "dimension_my_team", "values": ["x"]},
        ]
    )
    good = record(1, usage=usage(model="b"), dimensions={"my-team": "x"})
    assert found.quantity(good) == 97
    assert found.quantity(record(1, usage=usage(model="c"), dimensions={"my-team": "x"})) is None
    assert found.quantity(record(1, usage=usage(model="b"), dimensions={"my-team": "x"}, status=500)) is None
    assert found.quantity(record(1, usage=usage(model="b"))) is None, "an unknown property passes no filter"


def test_the_multiplier_is_exact() -> None:
    found = meter(aggregation={"multiplier": "0.0000015"})
    assert found.quantity(record(1)) == Decimal("0.0001455")


@pytest.mark.parametrize(
    ("changes", "at", "start"),
    [
        ({}, "2026-11-21T09:30:00Z", "2026-11-01T00:00:00Z"),
        ({"anchor_day": 15}, "2026-11-21T09:30:00Z", "2026-11-15T00:00:00Z"),
        ({"anchor_day": 15}, "2026-11-15T00:00:00Z", "2026-11-15T00:00:00Z"),
        ({"anchor_day": 15}, "2026-11-14T23:59:59Z", "2026-10-15T00:00:00Z"),
        ({"anchor_day": 28}, "2026-01-02T00:00:00Z", "2025-12-28T00:00:00Z"),
        ({"anchor_day": 28}, "2026-03-27T00:00:00Z", "2026-02-28T00:00:00Z"),
        ({}, "2026-11-01T01:00:00+02:00", "2026-10-01T00:00:00Z"),
        ({"reset_usage": "NEVER"}, "2026-11-21T09:30:00Z", "1970-01-01T00:00:00Z"),
        ({"aggregation": {"bucket_size": "HOUR"}}, "2026-11-21T09:59:59.999999Z", "2026-11-21T09:00:00Z"),
        ({"aggregation": {"bucket_size": "DAY"}}, "2026-11-21T09:59:59Z", "2026-11-21T00:00:00Z"),
        ({"aggregation": {"bucket_size": "MONTH"}}, "2026-12-31T23:59:59Z", "2026-12-01T00:00:00Z"),
    ],
)
def test_buckets_begin_where_they_should(changes: dict[str, Any], at: str, start: str) -> None:
    found = meter(**changes).bucket(datetime.fromisoformat(at))
    assert datetime.fromtimestamp(found, UTC) == datetime.fromisoformat(start)


def test_a_changed_definition_is_another_version_and_its_look_is_not() -> None:
    base = meter()
    assert meter().version == base.version
    assert meter(event_name="other").version == base.version
    assert meter(aggregation={"multiplier": "2"}).version == base.version, "applied when read"
    for other in (
        meter("MAX"),
        meter(field="input_tokens"),
        meter(reset_usage="NEVER"),
        meter(anchor_day=2),
        meter(filters=[{"key": "model", "values": ["a"]}]),
        meter(aggregation={"bucket_size": "DAY"}),
    ):
        assert other.version != base.version


# Properties


def test_every_property_of_any_record_is_a_known_name_and_json() -> None:
    for each in odd_records():
        found = properties(each)
        assert all(is_property(name) for name in found)
        assert all(value_of(each, name) == value for name, value in found.items() if name in FIXED)
        assert None not in found.values()
        orjson.dumps(as_json(found, money=str))
    assert as_json(properties(record(1)), money=str)["input_tokens"] == 43
    assert value_of(record(1, usage=usage(units={"audio-seconds": 1.5})), "unit_audio_seconds") == Decimal("1.5")


# Expressions


def test_expressions() -> None:
    call = record(1, dimensions={"team": "a"}, usage=usage(units={"audio_seconds": 0.5}, cost_usd="0.25"))
    for text, value in (
        ("input_tokens * 2 + output_tokens", 183),
        ("double(input_tokens) * 1.5", Decimal("64.5")),
        ("model.startsWith('gpt') ? input_tokens : 0", 43),
        ("status in [200, 201] ? 1 : 0", 1),
        ("streamed ? 1 : 2", 1),
        ("unit_audio_seconds * 2.0", 1),
        ("cost_usd * 2.0", Decimal("0.5")),
        ("dimension_team == 'a' ? 3 : 4", 3),
        ("[input_tokens, output_tokens].map(x, x * 2).size()", 2),
    ):
        assert compile_expression(text).value(call) == value, text
    assert compile_expression("input_tokens + 1").value(record(1, usage=None)) is None
    assert compile_expression("output_tokens / input_tokens").value(record(1, usage=usage(input_tokens=0))) is None
    assert compile_expression("input_tokens * input_tokens").value(record(1, usage=usage(input_tokens=2**62))) is None
    assert meter(field=None, aggregation={"expression": "input_tokens + output_tokens"}).quantity(call) == 140


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("input_tokens +", "cannot be read near line 1"),
        ("tokens + 1", "reads tokens, which no record has"),
        ("input_tokens * 1.5", "does not mix"),
        ("model", "gives no number"),
        ("input_tokens > 5", "gives no number"),
        ("1 + " * 300 + "1", "longer than 1000"),
        ("[x].map(y, y).size()", "reads x"),
        ("'a'", "gives no number"),
    ],
)
def test_a_faulty_expression_is_a_fault_of_the_configuration(text: str, word: str) -> None:
    with pytest.raises(ExpressionError, match=word.replace("+", r"\+")):
        compile_expression(text)
    with pytest.raises(MetersError, match="meter m: aggregation expression"):
        meter(field=None, aggregation={"expression": text})


# Running values


KINDS = {
    "count": meter("COUNT", None),
    "sum": meter("SUM", "output_tokens", aggregation={"bucket_size": "HOUR", "multiplier": "0.1"}),
    "max": meter("MAX", "output_tokens", aggregation={"bucket_size": "DAY", "group_by": "model"}),
    "unique": meter("UNIQUE_COUNT", "model", reset_usage="NEVER"),
    "latest": meter("LATEST", "duration_ms"),
}


def plainly(found: Meter, given_records: list[Record]) -> dict[str | None, Fraction]:
    """The same totals, worked out the slow and obvious way."""
    groups: dict[Any, list[Record]] = defaultdict(list)
    for each in given_records:
        if found.value(each) is not None:
            who = each.subscriber.id if each.subscriber else None
            groups[who, found.group(each), found.bucket(each.started_at)].append(each)
    totals: dict[str | None, Fraction] = defaultdict(Fraction)
    for (who, _, _), members in sorted(groups.items(), key=lambda item: item[0][2]):
        values = [found.value(each) for each in members]
        if found.kind is Kind.UNIQUE_COUNT:
            amount = Fraction(len(set(values)))
        elif found.kind is Kind.MAX:
            amount = max(Fraction(v) for v in values if v is not None)
        elif found.kind is Kind.LATEST:
            amount = Fraction(found.value(max(members, key=lambda r: (r.started_at, r.id))) or 0)
        else:
            amount = sum((Fraction(v) for v in values if v is not None), Fraction())
        amount *= Fraction(found.multiplier or 1)
        totals[who] = amount if found.kind is Kind.LATEST else totals[who] + amount
    return dict(totals)


calls = st.builds(
    lambda number, hours, who, model, tokens, duration: record(
        number, started_ns=T0_NS + hours * HOUR_NS, subscriber=Subscriber(who, "jwt:sub"),
        usage=usage(model=model, output_tokens=tokens), duration_ms=duration,
    ),
    st.integers(1, 10**6), st.integers(-1000, 1000), st.sampled_from(["a", "b"]), st.sampled_from(["x", "y", "z"]),
    st.none() | st.integers(0, 2**60), st.floats(0, 1e6, allow_nan=False),
)  # fmt: skip


@settings(max_examples=40)
@given(st.lists(calls, min_size=1, max_size=25, unique_by=lambda r: r.id), st.randoms(use_true_random=False))
def test_meters_under_any_order_and_repeats_equal_a_plain_recomputation(
    tmp_path_factory: pytest.TempPathFactory, given_records: list[Record], chance: random.Random
) -> None:
    parts: list[list[Record]] = [[], [], []]
    for each in given_records:
        chance.choice(parts).append(each)
    for part in parts:
        chance.shuffle(part)
    sends = [
        (str(number), body_of([], to_wire(bucket_deltas(grouped(part).items(), [*KINDS.values()]))))
        for number, part in enumerate(parts)
    ] * 2
    chance.shuffle(sends)
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    store = LedgerStore(path)
    reader = LedgerReader(path)
    for key, body in sends:
        store.apply(key, body)
    reader._ask = lambda question, values: store._open().execute(question, values).fetchall()  # type: ignore[method-assign]
    for found in KINDS.values():
        totals = totals_of(reader, found)
        assert {who: Fraction(value) for who, value in totals.items()} == plainly(found, given_records)
    store.close()


def test_a_meter_can_be_tried_on_records_without_a_ledger() -> None:
    given_records = [record(n, usage=usage(model=f"m{n % 3}")) for n in range(1, 8)]
    amounts = {
        name: [amount(delta, found) for delta in bucket_deltas(grouped(given_records).items(), [found])]
        for name, found in KINDS.items()
    }
    assert amounts["count"] == [7]
    assert amounts["sum"] == [Decimal("67.9")]
    assert amounts["max"] == [97, 97, 97]
    assert amounts["unique"] == [3]


def test_deltas_survive_the_wire() -> None:
    batch = bucket_deltas(grouped(odd_records()).items(), [*KINDS.values(), *DEFAULT_METERS])
    assert batch
    assert from_wire(orjson.loads(orjson.dumps(to_wire(batch)))) == batch


def test_the_ledger_answers_for_the_definition_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    store = LedgerStore(path)
    given_records = [record(n, started_ns=T0_NS + n * 6 * HOUR_NS) for n in range(4)]
    old, new = meter(), meter(aggregation={"bucket_size": "DAY"})
    store.apply("a", body_of([], to_wire(bucket_deltas(grouped(given_records).items(), [old]))))
    reader = LedgerReader(path)
    assert [(r.subscriber, r.value) for r in reader.meter(old)] == [("acme", "388")]
    assert reader.meter(new) == []
    store.apply("b", body_of([], to_wire(bucket_deltas(grouped(given_records).items(), [new]))))
    rows = reader.meter(new)
    assert [(str(r.start), r.value) for r in rows] == [
        ("2026-11-21 00:00:00+00:00", "291"),
        ("2026-11-22 00:00:00+00:00", "97"),
    ]
    since = datetime(2026, 11, 22, 5, tzinfo=UTC)
    assert [r.value for r in reader.meter(new, since=since)] == ["97"]
    assert [r.value for r in reader.meter(new, until=since)] == ["291", "97"]
    assert totals_of(reader, new) == {"acme": "388"}
    store.close()


def test_a_set_of_unique_values_is_capped_and_says_so(tmp_path: Path) -> None:
    found = meter("UNIQUE_COUNT", "user_agent" if is_property("user_agent") else "model", reset_usage="NEVER")
    store = LedgerStore(tmp_path / "ledger.db")
    for start in range(0, UNIQUE_MAX + 500, 2000):
        batch = [record(1, usage=usage(model=f"m{n}")) for n in range(start, min(start + 2000, UNIQUE_MAX + 500))]
        store.apply(str(start), body_of([], to_wire(bucket_deltas(grouped(batch).items(), [found]))))
    (row,) = LedgerReader(tmp_path / "ledger.db").meter(found)
    assert (row.value, row.capped, row.start) == (str(UNIQUE_MAX), True, None)
    assert found.reset is Reset.NEVER
    store.close()
