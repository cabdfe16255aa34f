"""Stored lines as groups of calls: they add up to what their records do, and what is no record is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adding_up import METERS, plainly
from support.backend_fixtures import T0_NS, odd_records, record, record_id, usage

from sidecar.meters.buckets import batch_sums
from sidecar.meters.definition import DEFAULT_METERS, Meter
from sidecar.model import call_lines
from sidecar.model.call_lines import CallLines
from sidecar.model.exchange import Outcome, Subscriber, UsageState
from sidecar.model.record import Record

HOUR_NS = 3_600_000_000_000
COUNT: st.SearchStrategy[Any] = st.sampled_from([None, 0, 1, 7, 10**6, 2**62, "7", True, 1.5])
USAGES = st.fixed_dictionaries(
    {},
    optional={
        "usage_state": st.sampled_from(list(UsageState)),
        "provider": st.sampled_from(["openai", None, "o" * 300]),
        "model": st.sampled_from(["gpt-5-mini", None, "other"]),
        "request_model": st.sampled_from(["gpt-5-mini", None]),
        "operation": st.sampled_from(["chat", "embeddings"]),
        "streamed": st.sampled_from([True, False, None]),
        "input_tokens": COUNT,
        "output_tokens": COUNT,
        "total_tokens": COUNT,
        "cache_read_input_tokens": COUNT,
        "reasoning_output_tokens": COUNT,
        "units": st.sampled_from([{}, {"audio_seconds": 1.25, "odd": "a lot"}]),
        "cost_usd": st.sampled_from([None, "0.000123", "a lot"]),
        "finish_reasons": st.sampled_from([[], ["stop"], ["length"]]),
        "service_tier": st.sampled_from([None, "flex"]),
    },
)
AMOUNT: st.SearchStrategy[Any] = st.sampled_from(
    [None, "0", "0.0031", "0.000000000001", "12", "1234567890.123456789012", "0.0000000000001", "1e-3", "-2", "a lot"]
)
COSTS = st.none() | st.fixed_dictionaries(
    {"currency": st.sampled_from(["USD", "USD", "EUR"]), "total": AMOUNT, "parts": st.just({})},
    optional={"reason": st.sampled_from(["no_table", "no_price", None])},
)
CALLS = st.fixed_dictionaries(
    {
        "started_ns": st.sampled_from([T0_NS, T0_NS + 1, T0_NS + HOUR_NS, T0_NS - HOUR_NS]),
        "usage": st.none() | USAGES.map(lambda changes: usage(**changes)),
        "cost": COSTS,
        "request_bytes": st.integers(0, 2**40),
        "response_bytes": st.integers(0, 9),
    },
    optional={
        "status": st.sampled_from([None, 200, 201, 401, 403, 429, 503]),
        "outcome": st.sampled_from(list(Outcome)),
        "method": st.sampled_from(["POST", "GET"]),
        "route": st.sampled_from([None, "/v1/chat", "/v1/other"]),
        "subscriber": st.sampled_from([None, Subscriber("acme", "jwt:sub"), Subscriber("b", "header:x-tenant")]),
        "dimensions": st.sampled_from(
            [{}, {"team": "50%"}, {"team": "x", "feature": "y"}, {"feature": "y", "team": "x"}]
        ),
        "upstream": st.sampled_from([None, "openai"]),
        "parent_id": st.sampled_from([None, record_id(1)]),
        "first_byte_ms": st.sampled_from([None, 0.0, 212.4]),
        "duration_ms": st.sampled_from([None, 1840.9]),
        "charge": st.sampled_from([None, {"currency": "USD", "total": "0.5"}]),
    },
)


def read(lines: Sequence[bytes], reading: CallLines, meters: Sequence[Meter]) -> Any:
    assert [reading.add(line) for line in lines] == [Record.from_json(line).id for line in lines]
    records, groups = reading.take()
    assert len(records) + sum(group.calls for group in groups) == len(lines)
    return plainly(batch_sums(records, meters, groups))


@given(made=st.lists(CALLS, min_size=1, max_size=12), cut=st.integers(0, 12))
@settings(deadline=None)
@pytest.mark.parametrize("meters", [DEFAULT_METERS, METERS], ids=["default meters", "others"])
def test_they_add_up_to_what_their_records_do(meters: Sequence[Meter], made: list[Any], cut: int) -> None:
    records = [record(number, id=record_id(number), **one) for number, one in enumerate(made)]
    reading = CallLines()
    for some in (records[:cut], records[cut:]):  # of the second half some kinds are known
        if some:
            assert read([one.json for one in some], reading, meters) == plainly(batch_sums(some, meters))


@pytest.mark.parametrize("meters", [DEFAULT_METERS, METERS], ids=["default meters", "others"])
def test_odd_records_add_up_as_well(meters: Sequence[Meter]) -> None:
    records = odd_records()
    assert read([one.json for one in records], CallLines(), meters) == plainly(batch_sums(records, meters))


def test_calls_that_differ_in_numbers_only_are_no_records() -> None:
    calls = [
        record(
            number,
            id=record_id(number),
            usage=usage(input_tokens=number, response_id=str(number)),
            cost={"currency": "USD", "total": f"0.00{number}", "parts": {}},
            duration_ms=float(number),
        )
        for number in range(1, 400)
    ]
    reading = CallLines()
    for one in calls:
        reading.add(one.json)
    records, groups = reading.take()
    assert not records
    assert [(group.calls, group.tokens["input_tokens"]) for group in groups] == [(399, sum(range(400)))]
    assert reading.take() == ([], [])


def test_no_more_kinds_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_lines, "KINDS_MAX", 3)
    calls = [record(number, id=record_id(number), route=f"/{number % 8}") for number in range(40)]
    reading = CallLines()
    for _ in range(2):
        assert read([one.json for one in calls], reading, METERS) == plainly(batch_sums(calls, METERS))
        assert len(reading._kinds) <= 3


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "made up"}, {"started_at": "yesterday"}, {"usage": {"usage_state": "made up"}}, {"usage": 7},
        {"request_headers": None}, {"subscriber": "acme"}, {"started_at": None},
    ],
)  # fmt: skip
def test_a_line_that_is_no_record_is_told_and_not_counted(changes: dict[str, Any]) -> None:
    row = orjson.loads(record(1).json) | changes
    reading = CallLines()
    assert reading.add(orjson.dumps(row)) is None
    assert reading.take() == ([], [])
    for line in (b"", b"no record", b"[]", b"7", b'{"id":"x"}'):
        assert reading.add(line) is None
    assert reading.take() == ([], [])


def test_times_that_are_not_in_utc_are_read_as_they_are() -> None:
    row = orjson.loads(record(1).json) | {"started_at": "2026-11-21T09:30:00.000001+02:00"}
    line = orjson.dumps(row)
    reading = CallLines()
    assert read([record(2).json, line], reading, METERS) == plainly(
        batch_sums([record(2), Record.from_json(line)], METERS)
    )
