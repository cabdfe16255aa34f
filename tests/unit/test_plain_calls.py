"""Plain calls as lines and sums: what the short way writes and adds up is what the careful way would."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.schema import faults
from support.usage_samples import Sample
from support.usage_samples import load as load_samples

from sidecar.backends import backend_settings
from sidecar.meters.buckets import BatchSums, BucketDelta, add_batches, batch_sums
from sidecar.meters.definition import DEFAULT_METERS, Meter, read_meters
from sidecar.model.call_group import CallGroup
from sidecar.model.exchange import Exchange, PlainExchange, RequestShape, ResponseShape, Subscriber
from sidecar.model.record import Record, encode, record_of
from sidecar.prices import price_book
from sidecar.runtime import factory
from sidecar.runtime.metrics import Gauges, Metrics
from sidecar.settings import load
from sidecar.spool.frames import PLAIN, decode_frame, encode_frame, plain_of

SAMPLES = {name: sample for name, sample in load_samples().items() if not sample.websocket}
SETTINGS = load({"SIDECAR_UPSTREAM_URL": "https://api.openai.com"}, backend_settings=backend_settings())
BOOK = price_book(SETTINGS)
PRICE = factory.pricing(SETTINGS, BOOK)
STARTED_NS = 1_795_000_000_123_456_789
METERS = (
    *DEFAULT_METERS,
    *read_meters(
        [
            {"name": "by_model", "aggregation": {"type": "SUM", "field": "total_tokens"},
             "filters": [{"key": "model", "values": ["gpt-5-mini"]}]},
            {"name": "bytes", "aggregation": {"type": "SUM", "field": "response_bytes"}},
            {"name": "models", "aggregation": {"type": "UNIQUE_COUNT", "field": "model"}},
            {"name": "cost", "aggregation": {"type": "SUM", "field": "cost_usd"}},
            {"name": "longest", "aggregation": {
                "type": "MAX", "field": "output_tokens", "group_by": "model", "bucket_size": "HOUR"}},
            {"name": "stopped", "aggregation": {"type": "COUNT"},
             "filters": [{"key": "finish_reason", "values": ["stop"]}]},
            {"name": "priced", "aggregation": {
                "type": "SUM", "expression": "double(input_tokens) * 0.1 + double(output_tokens) * 0.7"}},
            {"name": "size", "aggregation": {
                "type": "SUM", "expression": "dimension_team == '50%' ? request_bytes : -response_bytes"}},
            {"name": "cached", "aggregation": {"type": "SUM", "expression": "input_tokens - cache_read_input_tokens"}},
            {"name": "part", "aggregation": {"type": "SUM", "expression": "output_tokens / input_tokens"}},
            {"name": "time", "aggregation": {"type": "SUM", "expression": "duration_ms + double(input_tokens)"}},
            {"name": "top", "aggregation": {"type": "MAX", "expression": "input_tokens + output_tokens"}},
            {"name": "nothing", "aggregation": {"type": "COUNT"}, "filters": [{"key": "model", "values": ["x"]}]},
        ]
    ),
)  # fmt: skip


def shapes(sample: Sample, number: int = 1, **more: Any) -> tuple[RequestShape, ResponseShape]:
    request = RequestShape(
        number=number, method=sample.method, target=sample.path, fields=tuple(sample.request_headers), read=True,
        url=f"https://api.openai.com{sample.path}?100%", route=sample.path, request_headers=["Host", "100%"],
        user_agent='a "quoted" % agent', subscriber=Subscriber("acme", "header:x-tenant"), dimensions={"team": "50%"},
    )  # fmt: skip
    names = [name.decode() for name, _ in sample.response_headers]
    return replace(request, **more), ResponseShape(number=number, status=sample.status, response_headers=names)


def call(sample: Sample, request: RequestShape, response: ResponseShape, number: int, **more: Any) -> PlainExchange:
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *(b"%b: %b" % field for field in sample.response_headers)])
    found = PlainExchange(
        request, "192.0.2.7", None, len(sample.request_body), sample.request_body, f"{number:036x}",
        STARTED_NS + number * 1_000_003, 5, 1.25, 1.25, response, len(sample.body), head, sample.body,
    )  # fmt: skip
    return replace(found, **more)


def both(
    calls: Sequence[PlainExchange], *, numbers: bool = False
) -> tuple[list[bytes], list[Exchange], Sequence[CallGroup]]:
    """Line by line: what the short way writes (what it gives back is written as an exchange), and the exchanges."""
    settings = SETTINGS if not numbers else replace(SETTINGS, meters=({"aggregation": {"expression": "1"}},))
    reader = factory.plain_readers(settings, Metrics(), BOOK)("inst")
    entries = decode_frame(encode_frame(1, admitted=len(calls), ended=calls)).ended
    lines: list[bytes] = []
    exchanges: list[Exchange] = []
    for seq, (entry, plain) in enumerate(zip(entries, calls, strict=True), 1):
        assert entry[0] == PLAIN
        assert plain.response is not None
        exchange = reader.exchange(plain_of(entry, plain.shape, plain.response))
        PRICE(exchange)
        exchanges.append(exchange)
        line = reader.line(entry, plain.shape, plain.response, seq=seq)
        lines.append(encode(exchange, seq=seq, instance="inst") if line is None else line)
    return lines, exchanges, reader.take_groups()


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_line_is_what_the_careful_way_writes(name: str) -> None:
    sample = SAMPLES[name]
    calls = [call(sample, *shapes(sample), number) for number in range(3)]
    lines, exchanges, _ = both(calls)
    for seq, (line, exchange) in enumerate(zip(lines, exchanges, strict=True), 1):
        assert json.loads(line) == json.loads(encode(exchange, seq=seq, instance="inst"))
        assert faults(line) == []


def test_the_commonest_families_take_it() -> None:
    for name in ("openai_chat.json", "openai_responses.json", "anthropic_messages.json"):
        sample = SAMPLES[name]
        document = orjson.loads(sample.body)
        document["usage"].pop("server_tool_use", None)  # which is counted in units of its own
        if name.startswith("anthropic"):
            document["usage"].pop("output_tokens_details", None)
        sample = replace(sample, body=orjson.dumps(document))
        _, _, groups = both([call(sample, *shapes(sample), number) for number in range(3)])
        assert [group.calls for group in groups] == [3], name


def plainly(sums: BatchSums) -> tuple[dict[Any, Any], dict[Any, Any]]:
    hours = {
        (delta.hour, delta.series): (delta.counts, delta.tokens, delta.cost_usd, delta.units) for delta in sums.hourly
    }
    return hours, {delta.key: value_of(delta) for delta in sums.buckets}


def value_of(delta: BucketDelta) -> Any:
    return delta.value, delta.at_us, delta.record_id, sorted(delta.hashes)


def chat(model: str, entered: int, said: int, cached: int | None, reason: str) -> bytes:
    usage: dict[str, Any] = {"prompt_tokens": entered, "completion_tokens": said, "total_tokens": entered + said}
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": min(cached, entered)}
    choice = {"index": 0, "message": {"content": "hi"}, "finish_reason": reason}
    return orjson.dumps({"id": "c", "model": model, "choices": [choice], "usage": usage})


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["gpt-5-mini", "gpt-4o-2024-08-06", "nobody-knows-it"]),
        st.integers(0, 10**6), st.integers(0, 10**6), st.none() | st.integers(0, 10**6),
        st.sampled_from(["stop", "length"]), st.booleans(), st.sampled_from([0, 1, 3600]), st.booleans(),
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(made=CALLS, cut=st.integers(0, 12))
@settings(deadline=None)
@pytest.mark.parametrize(
    ("meters", "numbers"),
    [(DEFAULT_METERS, False), (METERS, False), (METERS, True)],
    ids=["default meters", "others", "others, numbers kept"],
)
def test_groups_add_up_to_what_their_records_do(
    meters: Sequence[Meter], numbers: bool, made: list[Any], cut: int
) -> None:
    sample = SAMPLES["openai_chat.json"]
    ours = [shapes(sample), shapes(sample, 2, subscriber=None, dimensions={})]
    calls = [
        replace(
            call(sample, ours[whose][0], ours[whose][1], number),
            response_body=body if known else b"{}",
            started_ns=STARTED_NS + later_s * 10**9,
        )
        for number, (*chat_of, whose, later_s, known) in enumerate(made)
        for body in [chat(*chat_of)]
    ]
    lines, exchanges, groups = both(calls, numbers=numbers)
    assert all(len(group.numbers) == (group.calls if numbers else 0) for group in groups)
    records = [
        record_of(exchange, seq=seq, instance="inst", line=line)
        for seq, (line, exchange) in enumerate(zip(lines, exchanges, strict=True), 1)
    ]
    grouped = {record.id for group in groups for record in group.records()}
    apart = [record for record in records if record.id not in grouped]
    expected = plainly(batch_sums(records, meters))
    assert plainly(batch_sums(apart, meters, groups)) == expected
    halves = [records[:cut], records[cut:]]
    assert plainly(add_batches([batch_sums(half, meters) for half in halves if half])) == expected

    one_by_one, together = Metrics(), Metrics()
    for exchange in exchanges:
        one_by_one.call_ended(exchange)
    for exchange in exchanges:
        if exchange.id not in grouped:
            together.call_ended(exchange)
    for group in groups:
        together.calls_ended(group)
    assert counted(together) == counted(one_by_one)


def counted(metrics: Metrics) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in metrics.exposition(Gauges()).decode().splitlines():
        if line.startswith("sidecar_") and "_created" not in line:
            name, _, value = line.rpartition(" ")
            found[name] = round(float(value), 9)
    return found


def test_a_text_that_cannot_be_stored_goes_the_careful_way() -> None:
    sample = SAMPLES["openai_chat.json"]
    request, response = shapes(sample, url="http://up/\udcff")
    lines, _, groups = both([call(sample, request, response, 1)])
    assert not groups
    assert Record.from_json(lines[0]).url == "http://up/?"
