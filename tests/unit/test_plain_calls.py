"""Plain calls as lines and sums: what the short way writes and adds up is what the careful way would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adding_up import METERS, plainly
from support.schema import faults
from support.usage_samples import Sample
from support.usage_samples import load as load_samples

from sidecar.backends import backend_settings
from sidecar.meters.buckets import add_batches, batch_sums
from sidecar.meters.definition import DEFAULT_METERS, Meter
from sidecar.meters.hourly import _is_unpriced
from sidecar.model.call_group import CallGroup, Gathering, groups_of
from sidecar.model.exchange import (
    UNREAD,
    Exchange,
    PlainExchange,
    RequestShape,
    ResponseShape,
    Subscriber,
    Usage,
    UsageState,
)
from sidecar.model.record import Record, encode, encode_exactly, record_of
from sidecar.prices import PriceBook, price_book
from sidecar.runtime import factory
from sidecar.runtime.metrics import Gauges, Metrics
from sidecar.settings import load
from sidecar.spool import intake as intake_module
from sidecar.spool.frames import PLAIN, decode_frame, encode_frame, plain_of
from sidecar.spool.intake import Intake, Source
from sidecar.spool.types import Batch, Tally
from sidecar.usage.plain_calls import _id_at, _own, _own_id, _Reading
from sidecar.usage.response_headers import request_id
from sidecar.usage.values import COUNT_MAX, NAME_MAX_CHARS
from sidecar.usage.whole import Plan, _usual_names

SAMPLES = {name: sample for name, sample in load_samples().items() if not sample.websocket}
SETTINGS = load({"SIDECAR_UPSTREAM_URL": "https://api.openai.com"}, backend_settings=backend_settings())
BOOK = price_book(SETTINGS)
PRICE = factory.pricing(SETTINGS, BOOK)
STARTED_NS = 1_795_000_000_123_456_789


def shapes(sample: Sample, number: int = 1, **more: Any) -> tuple[RequestShape, ResponseShape]:
    request = RequestShape(
        number=number,
        method=sample.method,
        target=sample.path,
        fields=tuple(sample.request_headers),
        read=True,
        url=f"https://api.openai.com{sample.path}?100%",
        route=sample.path,
        request_headers=["Host", "100%"],
        user_agent='a "quoted" % agent',
        subscriber=Subscriber("acme", "header:x-tenant"),
        dimensions={"team": "50%"},
    )
    names = [name.decode() for name, _ in sample.response_headers]
    return replace(request, **more), ResponseShape(number=number, status=sample.status, response_headers=names)


def call(sample: Sample, request: RequestShape, response: ResponseShape, number: int, **more: Any) -> PlainExchange:
    head = b"\r\n".join([b"HTTP/1.1 200 OK", *(b"%b: %b" % field for field in sample.response_headers)])
    found = PlainExchange(
        request,
        "192.0.2.7",
        None,
        len(sample.request_body),
        sample.request_body,
        f"{number:036x}",
        STARTED_NS + number * 1_000_003,
        5,
        1.25,
        1.25,
        response,
        len(sample.body),
        head,
        sample.body,
    )
    return replace(found, **more)


def both(
    calls: Sequence[PlainExchange], *, numbers: bool = False
) -> tuple[list[bytes], list[Exchange], Sequence[Gathering]]:
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
        shapes_of = {plain.shape.number: plain.shape}, {plain.response.number: plain.response}
        reader.lines([entry], 0, *shapes_of, seq=seq, lines=lines)
        if len(lines) < seq:
            lines.append(encode(exchange, seq=seq, instance="inst"))
    return lines, exchanges, reader.take_gathered()


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_line_is_what_the_careful_way_writes(name: str) -> None:
    sample = SAMPLES[name]
    ours = shapes(sample)
    calls = [call(sample, *ours, number) for number in range(3)]
    calls += [call(sample, *ours, number, url=f'https://api.openai.com/"{number}"?100%') for number in (3, 4)]
    lines, exchanges, _ = both(calls)
    assert [orjson.loads(line)["url"] for line in lines] == [*[ours[0].url] * 3, *[one.url for one in calls[3:]]]
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
        _, _, gathered = both([call(sample, *shapes(sample), number) for number in range(3)])
        assert [group.calls for group in groups_of(gathered)] == [3], name


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
    lines, exchanges, gathered = both(calls, numbers=numbers)
    groups = groups_of(gathered)
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
    for one in gathered:
        together.calls_ended(one)
    assert counted(together) == counted(one_by_one)


@pytest.mark.parametrize("region", ["us", "x" * 60_000, "[" * 300 + "]" * 300], ids=["usual", "long", "deep"])
def test_whatever_a_usage_object_holds_the_call_is_recorded_and_its_record_small(region: str) -> None:
    value = region.encode() if region.startswith("[") else b'"%b"' % region.encode()
    usage = b'{"input_tokens":5,"output_tokens":6,"inference_geo":%b}' % value
    body = b'{"type":"message","id":"m","model":"claude-opus-4-1","usage":%b}' % usage
    sample = replace(SAMPLES["anthropic_messages.json"], body=body)
    (line,), (exchange,), _ = both([call(sample, *shapes(sample), 1)])
    assert json.loads(line) == json.loads(encode(exchange, seq=1, instance="inst"))
    found = json.loads(line)["usage"]
    assert (found["input_tokens"], found["output_tokens"]) == (5, 6)
    assert len(line) < 2_000


UNPRICED: dict[str, tuple[int, bytes, bytes, bool]] = {
    "no price": (200, b'{"model":"nobody-knows-it"}', b'"model":"nobody-knows-it",', True),
    "no model": (200, b"{}", b"", False),
    "failed": (404, b'{"model":"nobody-knows-it"}', b'"error":{"type":"not_found"},', False),
    "nothing consumed": (200, b'{"model":"nobody-knows-it"}', b'"error":{"type":"not_found"},', False),
}


@pytest.mark.parametrize("name", list(UNPRICED))
def test_calls_are_counted_as_without_a_price_where_one_is_missing(name: str) -> None:
    """Whichever way it took. A call that failed, or whose model nobody said, tells of no price that is missing."""
    status, asked, members, unpriced = UNPRICED[name]
    sample = replace(SAMPLES["openai_chat.json"], status=status)
    body = b'{"id":"c",%b"choices":[{"index":0,"finish_reason":"stop"}],"usage":%b}' % (members, BRIEF)
    if b"error" in members:
        body = b"{%b}" % members.rstrip(b",")
    calls = [replace(call(sample, *shapes(sample), n), request_body=asked, response_body=body) for n in range(3)]
    _, exchanges, gathered = both(calls)
    assert all(exchange.cost is not None and exchange.cost["total"] is None for exchange in exchanges)
    one_by_one, together = Metrics(), Metrics()
    for exchange in exchanges:
        one_by_one.call_ended(exchange)
    for one in gathered:
        together.calls_ended(one)
    label = 'sidecar_unpriced_calls_total{model="nobody-knows-it",provider="openai"}'
    found = {key: count for key, count in counted(one_by_one).items() if "unpriced" in key and count}
    assert found == ({label: 3} if unpriced else {})
    if gathered:
        assert counted(together) == counted(one_by_one)


STREAMS = ("openai_chat_stream.sse", "openai_responses_stream.sse", "anthropic_messages_stream.sse")


def usages_in(value: Any) -> Iterator[dict[str, Any]]:
    """The usage objects of an event, wherever they are."""
    if isinstance(value, dict):
        if isinstance(value.get("usage"), dict):
            yield value["usage"]
        for member in value.values():
            yield from usages_in(member)


@st.composite
def streams(draw: st.DrawFn, name: str) -> bytes:
    """A sample's events, with other counts (which may contradict each other), other texts, members left out or put
    in, or events left out."""
    messages = SAMPLES[name].body.split(b"\n\n")[:-1]
    changes = draw(st.lists(st.sampled_from(["counts", "odd", "model", "extra", "event", "error"]), max_size=3))
    if "event" in changes:
        del messages[draw(st.integers(0, len(messages) - 1))]
    made: list[bytes] = []
    for message in messages:
        head, data, rest = message.rpartition(b"data: ")
        if rest != b"[DONE]":
            document = orjson.loads(rest)
            for usage in usages_in(document):
                for member in list(usage):
                    if type(usage[member]) is int and "counts" in changes:
                        usage[member] = draw(COUNT)
                    if "odd" in changes and draw(st.integers(0, 9)) == 0:
                        usage[member] = draw(ODD)
                if "extra" in changes:
                    usage[draw(st.sampled_from(["cost", "num_search_queries", "server_tool_use"]))] = draw(NUMBER)
            if "model" in changes and "model" in document:
                document["model"] = draw(TEXT)
            if "error" in changes and draw(st.integers(0, 9)) == 0:
                document["error"] = {"type": "overloaded_error", "message": "later"}
            rest = json.dumps(document).encode()
        made.append(head + data + rest)
    return b"\n\n".join(made) + b"\n\n"


@pytest.mark.parametrize("name", STREAMS)
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_streams_are_lines_and_sums_like_others(name: str, data: st.DataObject) -> None:
    """Whatever becomes a line is what the careful way writes, and the sums, and the metrics with their first bytes."""
    sample = SAMPLES[name]
    ours = shapes(sample)
    calls = [
        replace(
            call(sample, *ours, number),
            response_body=body,
            started_mono_ns=10**9,
            first_byte_ms=1.5,
            duration_ms=80.25,
            first_token_ns=data.draw(st.sampled_from([0, 10**9 + 1, 10**9 + 2_750_000])),
        )
        for number, body in enumerate(data.draw(st.lists(streams(name), min_size=1, max_size=4)))
    ]
    lines, exchanges, gathered = both(calls)
    groups = groups_of(gathered)
    for seq, (line, exchange) in enumerate(zip(lines, exchanges, strict=True), 1):
        assert json.loads(line) == json.loads(encode(exchange, seq=seq, instance="inst"))
        assert faults(line) == []
    records = [
        record_of(exchange, seq=seq, instance="inst", line=line)
        for seq, (line, exchange) in enumerate(zip(lines, exchanges, strict=True), 1)
    ]
    grouped = {record.id for group in groups for record in group.records()}
    apart = [record for record in records if record.id not in grouped]
    assert plainly(batch_sums(apart, METERS, groups)) == plainly(batch_sums(records, METERS))
    one_by_one, together = Metrics(), Metrics()
    for exchange in exchanges:
        one_by_one.call_ended(exchange)
        if exchange.id not in grouped:
            together.call_ended(exchange)
    for one in gathered:
        together.calls_ended(one)
    assert counted(together) == pytest.approx(counted(one_by_one), rel=1e-12)


@pytest.mark.parametrize("name", STREAMS)
def test_usual_streams_are_added_up_together(name: str) -> None:
    sample = SAMPLES[name]
    calls = [
        replace(call(sample, *shapes(sample), number), first_byte_ms=1.5, duration_ms=80.25, first_token_ns=7)
        for number in range(3)
    ]
    groups = groups_of(both(calls)[2])
    assert [group.calls for group in groups] == [3]
    assert (groups[0].first_bytes_ms, groups[0].durations_ms) == ([1.5] * 3, [80.25] * 3)


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
    lines, _, gathered = both([call(sample, request, response, 1)])
    assert not gathered
    assert Record.from_json(lines[0]).url == "http://up/?"


# What is asked of all members at once: values at the edges of it, among usual ones

COUNT = st.integers(0, 40)
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [0, 1, -1, COUNT_MAX, COUNT_MAX + 1, 2**63, 2**64, 10**30, True, False, 1.0, 0.5, -0.0, "7", "", None, [], {}, [1]]
)
NUMBER = st.one_of(COUNT, COUNT, COUNT, COUNT, ODD)
TEXT: st.SearchStrategy[Any] = st.sampled_from(
    ["gpt-5-mini", "gpt-5-mini", "stop", "", None, 0, True, "m" * NAME_MAX_CHARS, "\u20ac", ["x"], {}]
)
MISSING = object()


def details(*names: str) -> st.SearchStrategy[Any]:
    """Of the members of a usage object: usual ones, in any order, and other things in their place."""
    known = st.dictionaries(st.sampled_from(names), st.one_of(st.just(0), st.just(0), COUNT), max_size=4)
    odd = st.dictionaries(st.sampled_from([*names, "made_up", "cost"]), NUMBER, max_size=4)
    return st.one_of(known, known, known, odd, st.just(MISSING), ODD)


@st.composite
def openai_usages(draw: st.DrawFn, chat: bool) -> Any:
    entered, said, into, out = (
        ("prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details")
        if chat
        else ("input_tokens", "output_tokens", "input_tokens_details", "output_tokens_details")
    )
    counts: list[Any] = [draw(NUMBER), draw(NUMBER)]
    adds_up = all(type(count) in (int, float) for count in counts) and draw(st.integers(0, 5))
    members = {
        entered: counts[0],
        said: counts[1],
        "total_tokens": sum(counts) if adds_up else draw(NUMBER),
        into: draw(details("cached_tokens", "audio_tokens", "cache_read_tokens", "cache_write_tokens", "text_tokens")),
        out: draw(details("reasoning_tokens", "audio_tokens", "thinking_tokens", "accepted_prediction_tokens")),
        "extra": draw(st.sampled_from([MISSING] * 6 + [0, None, {"a": 1}])),
        "cost": draw(st.sampled_from([MISSING] * 6 + [0, 0.5, "1e-3"])),
    }
    order = draw(st.permutations(list(members))) if draw(st.booleans()) else list(members)
    left_out = draw(st.sampled_from([None] * 6 + [entered, said, "total_tokens"]))
    return {name: members[name] for name in order if members[name] is not MISSING and name != left_out}


def mostly(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * (3 * len(others)) + [*others])


@st.composite
def openai_calls(draw: st.DrawFn, chat: bool) -> tuple[bytes, bytes]:
    """Bodies of a request and its response."""
    usage = draw(st.one_of([openai_usages(chat)] * 9 + [ODD]))
    document: dict[str, Any] = {
        "id": draw(st.one_of(st.just("id-1"), st.just("id-2"), TEXT)),
        "object": draw(mostly("chat.completion" if chat else "response", None)),
        "model": draw(st.one_of(st.just("gpt-5-mini"), st.just("gpt-4o"), TEXT)),
        "usage": usage,
        "service_tier": draw(st.one_of(st.sampled_from([MISSING, "default", "flex"]), TEXT)),
        "error": draw(mostly(MISSING, None, {}, {"type": "server_error"})),
    }
    if chat:
        choice = {"index": 0, "finish_reason": draw(st.one_of(st.just("stop"), TEXT)), "message": {"content": "hi"}}
        other = {"index": 1, "finish_reason": "length"}
        choices: Any = [choice]
        odd = draw(mostly("none", "index", "usage", "two", "no", "object", "absent"))
        if odd == "index":
            choice["index"] = draw(st.sampled_from([1, True, False, 0.0, None, "0"]))
        elif odd == "usage":
            choice["usage"] = usage
        elif odd != "none":
            choices = {"two": [choice, other], "no": [], "object": {"a": choice}, "absent": MISSING}[odd]
        document["choices"] = choices
    else:
        document["status"] = draw(mostly("completed", "incomplete", "failed", None, ""))
        document["incomplete_details"] = draw(mostly(None, {"reason": "max_output_tokens"}, []))
    document = {name: value for name, value in document.items() if value is not MISSING}
    asked = draw(
        mostly(b'{"model":"gpt-5-mini","n":1}', b"", b"{}", b"[]", b'{"model":null}', b'{"model":["x"]}', b"{,")
    )
    return asked, json.dumps(document).encode()  # which writes integers of any size


def long_way(plan: Plan, *args: Any) -> None:
    """In the place of `Plan.usual`: no call is usual."""


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "responses"])
@given(data=st.data())
@settings(deadline=None, max_examples=100)
def test_the_shortest_way_writes_and_counts_what_the_longer_one_does(chat: bool, data: st.DataObject) -> None:
    """Several calls of one pair of shapes, whose usage objects have other members each time, in another order."""
    sample = SAMPLES["openai_chat.json" if chat else "openai_responses.json"]
    ours = shapes(sample)
    made = data.draw(st.lists(openai_calls(chat), min_size=1, max_size=6))
    made += data.draw(st.sampled_from([[], made]))  # the same once more: whatever was remembered is used
    calls = [
        replace(call(sample, *ours, number), request_body=asked, response_body=body)
        for number, (asked, body) in enumerate(made)
    ]
    lines, exchanges, gathered = both(calls, numbers=True)
    groups = groups_of(gathered)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "usual", long_way)
        expected_lines, _, expected = both(calls, numbers=True)
    assert lines == expected_lines  # byte for byte
    for seq, (line, exchange) in enumerate(zip(lines, exchanges, strict=True), 1):
        assert json.loads(line) == json.loads(encode(exchange, seq=seq, instance="inst"))
    assert [facts(group) for group in groups] == [facts(group) for group in groups_of(expected)]
    for group in groups:  # sums of columns are the sums of what the lines say
        rows = [json.loads(line)["usage"] for line in group.lines]
        names = {name for row in rows for name in row if name.endswith("_tokens")}
        assert group.tokens == {name: sum(row.get(name) or 0 for row in rows) for name in names}


def facts(group: CallGroup) -> tuple[Any, ...]:
    return (
        group.hour,
        group.lines,
        group.durations_ms,
        group.first_bytes_ms,
        group.request_bytes,
        group.response_bytes,
        group.tokens,
        group.cost_pico,
        group.priced,
        group.unpriced,
        group.numbers,
    )


USUAL = (
    b'{"id":"c-%d","object":"chat.completion","created":1790000000,"model":"gpt-5-mini","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"hi"},"finish_reason":"stop"}],"usage":%b%b}'
)
DETAILED = (
    b'{"prompt_tokens":43,"completion_tokens":97,"total_tokens":140,"prompt_tokens_details":{"cached_tokens":8,'
    b'"audio_tokens":0,"cache_write_tokens":0},"completion_tokens_details":{"reasoning_tokens":64,"audio_tokens":0}}'
)
BRIEF = b'{"total_tokens":9,"completion_tokens":2,"prompt_tokens":7}'


def test_the_usual_chat_takes_the_shortest_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "_read_plain", None)  # whoever goes there is no line
    sample = SAMPLES["openai_chat.json"]
    ours = shapes(sample)
    bodies = [
        USUAL % (number, DETAILED if number % 2 else BRIEF, b"" if number % 3 else b',"service_tier":"default"')
        for number in range(12)
    ]
    calls = [
        replace(call(sample, *ours, number), request_body=b'{"model":"gpt-5-mini"}', response_body=body)
        for number, body in enumerate(bodies)
    ]
    reader = factory.plain_readers(SETTINGS, Metrics(), BOOK)("inst")
    entries = decode_frame(encode_frame(1, admitted=len(calls), ended=calls)).ended
    lines: list[bytes] = []
    reader.lines(entries, 0, {ours[0].number: ours[0]}, {ours[1].number: ours[1]}, seq=1, lines=lines)
    assert len(lines) == 12
    (group,) = groups_of(reader.take_gathered())
    assert group.calls == group.priced == 12
    assert group.tokens == {
        "input_tokens": 300,
        "output_tokens": 594,
        "total_tokens": 894,
        "cache_read_input_tokens": 48,
        "audio_input_tokens": 0,
        "cache_write_input_tokens": 0,
        "reasoning_output_tokens": 384,
        "audio_output_tokens": 0,
    }


ELEMENTS = {"SIDECAR_UPSTREAM_URL": "https://api.openai.com", "SIDECAR_ELEMENTS": "rows=json:usage.prompt_tokens"}
ELSEWHERE: dict[str, dict[str, Any]] = {
    **{f"on {path}": {"path": path} for path in sorted({sample.path for sample in SAMPLES.values()})},
    **{f"on {path}": {"path": path} for path in ("/nobody/knows/it", "/v1/moderations", "/v1/files")},
    **{f"with {status}": {"status": status} for status in (202, 400, 404, 429, 500)},
    "as lines": {"response_headers": [(b"Content-Type", b"application/x-ndjson")]},
    "as events": {"response_headers": [(b"Content-Type", b"text/event-stream")]},
    "without a type": {"response_headers": []},
    "with an own field": {},
}


@pytest.mark.parametrize("where", list(ELSEWHERE))
@pytest.mark.parametrize("name", ["openai_chat.json", "openai_responses.json"])
def test_a_usual_body_where_its_family_is_not_asked_is_read_as_there(
    name: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path, the status, the type and own fields say how a body is read, however well it is known elsewhere."""
    if where == "with an own field":
        own = load(ELEMENTS, backend_settings=backend_settings())
        monkeypatch.setitem(globals(), "SETTINGS", own)
    sample = replace(SAMPLES[name], **ELSEWHERE[where])
    calls = [call(sample, *shapes(sample), number) for number in range(3)]
    lines, exchanges, _ = both(calls)
    for seq, (line, exchange) in enumerate(zip(lines, exchanges, strict=True), 1):
        assert json.loads(line) == json.loads(encode(exchange, seq=seq, instance="inst"))


def test_names_that_somebody_made_up_are_not_remembered() -> None:
    _usual_names.cache_clear()
    for number in range(10):
        with pytest.raises(KeyError):
            _usual_names((f"made_up_{number}",), ())
    with pytest.raises(ValueError, match="said twice"):
        _usual_names(("cached_tokens", "cache_read_tokens"), ())
    assert _usual_names.cache_info().currsize == 0


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [b"X-Request-Id: a"],
        [b"X-Request-Id: "],
        [b"X-Request-Id: a", b"x-request-id: b"],
        [b"x-request-id: a", b"Request-Id: b", b"apim-request-id: c"],
        [b"x-request-id: a", b"Request-Id: b", b"request-id: c"],
        [b"X-Request-Id: " + b"a" * 2_000],
        [b"X-Request-Id: \xc3\xa4"],
    ],
)
def test_the_vendors_id_is_read_at_once_as_from_all_fields(ids: list[bytes]) -> None:
    """Of the next response too, whose ids are others."""
    head = b"\r\n".join([b"HTTP/1.1 200 OK", b"Content-Type: application/json", *ids])
    own = tuple((at, line.partition(b":")[0].decode().lower()) for at, line in enumerate(ids, 2))
    reading = _Reading(None, None, own, _id_at(own))
    for one in (head, head.replace(b": a", b": another")):
        assert _own_id(reading, one) == request_id(_own(reading, one))
    assert bool(reading.id_at) is (len(ids) == 1 or len({name for _, name in own}) == 3)


class Disk:
    """A spool that keeps what it is handed."""

    instance, next_seq = "inst", 7

    def __init__(self) -> None:
        self.open_intents: dict[str, bytes] = {}
        self.tally, self.batches = Tally(), list[Batch]()

    def origins(self) -> dict[bytes, int]:
        return {}

    def submit(self, batch: Batch) -> None:
        self.batches.append(batch)


@pytest.mark.parametrize("start", range(5))
def test_calls_of_all_kinds_in_one_frame_are_recorded_in_their_order(start: int) -> None:
    """Usual ones are read many at a time; one that is unusual, careful or unreadable is met anywhere among them."""
    sample = SAMPLES["openai_chat.json"]
    ours = shapes(sample)
    several = orjson.dumps(orjson.loads(sample.body) | {"choices": [{"index": 0}, {"index": 1}]})
    makers: list[Callable[[int], Exchange | PlainExchange]] = [
        lambda number: call(sample, *ours, number),
        lambda number: call(sample, *ours, number),
        lambda number: replace(call(sample, *ours, number), response_body=several),
        lambda number: replace(call(sample, *ours, number).exchange(), id=f"{number:036x}"),
        lambda number: call(sample, *ours, number, request_bytes="many"),  # nobody can write that
    ]
    calls = [makers[(start + number) % 5](number) for number in range(20)]
    disk, metrics = Disk(), Metrics()
    intake = Intake(metrics, factory.plain_readers(SETTINGS, metrics, BOOK), PRICE)
    intake.begin(disk)
    source = Source(bytes(16), lambda number: None)
    intake.came(source)
    intake.take(source, encode_frame(1, admitted=20, ended=calls))
    intake.store()
    (batch,) = disk.batches
    records = [Record.from_json(line) for line in batch.lines]
    readable = [number for number in range(20) if (start + number) % 5 != 4]
    assert [record.id for record in records] == [f"{number:036x}" for number in readable]
    assert [record.seq for record in records] == list(range(7, 7 + 16))
    assert disk.tally.lost == {"unreadable": 4}
    priced = [record.cost is not None for record in records]
    assert priced == [(start + number) % 5 != 3 for number in readable]  # that one was made without a usage


@pytest.mark.parametrize(
    "fault",
    [
        "sidecar.usage.plain_calls.prepare",
        "sidecar.usage.whole.Plan.usual",
        "sidecar.usage.whole.Plan.usual_row",
        "sidecar.usage.whole.Plan.row",
        "sidecar.prices.book.Pricer.of_counts",
        "sidecar.prices.book.PriceBook.pricer",
    ],
)
def test_a_fault_in_the_reading_of_usage_takes_no_call_with_it(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one raises in a frame is raised for each of its calls, the quick way and the careful one."""
    sample = SAMPLES["openai_chat.json"]
    ours = shapes(sample)
    disk, metrics = Disk(), Metrics()

    def broken(*_: object, **__: object) -> None:
        raise ValueError("sk-secret")

    monkeypatch.setattr(fault, broken)
    if fault.endswith(".row"):
        monkeypatch.setattr(Plan, "usual", lambda *_: None)
    intake = Intake(metrics, factory.plain_readers(SETTINGS, metrics, BOOK), PRICE)
    intake.begin(disk)
    source = Source(bytes(16), lambda number: None)
    intake.came(source)
    intake.take(source, encode_frame(1, admitted=3, ended=[call(sample, *ours, number) for number in range(3)]))
    intake.store()
    (batch,) = disk.batches
    assert [Record.from_json(line).id for line in batch.lines] == [f"{number:036x}" for number in range(3)]
    assert not disk.tally.lost


@pytest.mark.parametrize("fault", ["cost", "charge"])
def test_a_fault_in_the_pricing_leaves_a_cost_that_is_known_to_be_missing(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("sk-secret")

    own = ({"for": "customer", "provider": "*", "model": "*", "markup": "2"},) if fault == "charge" else ()
    settings = replace(SETTINGS, price_tables=own)
    book = price_book(settings)
    monkeypatch.setattr(PriceBook, fault, broken)
    monkeypatch.setattr(PriceBook, "pricer", broken)
    sample = SAMPLES["openai_chat.json"]
    disk, metrics = Disk(), Metrics()
    intake = Intake(metrics, factory.plain_readers(settings, metrics, book), factory.pricing(settings, book))
    intake.begin(disk)
    source = Source(bytes(16), lambda number: None)
    intake.came(source)
    intake.take(source, encode_frame(1, admitted=1, ended=[call(sample, *shapes(sample), 1)]))
    intake.store()
    (record,) = [Record.from_json(line) for line in disk.batches[0].lines]
    asked = {"cost": record.cost, "charge": record.charge}
    assert record.cost is not None
    assert (record.cost["total"] is None) is (fault == "cost")
    found = asked[fault]
    assert found is not None
    assert (found["state"], found["total"], found["reason"]) == ("unpriced", None, "fault")
    assert _is_unpriced(record) is (fault == "cost")  # for the ledger, whose sum lacks it


@pytest.mark.parametrize("plain", [True, False])
def test_a_call_that_cannot_be_written_with_its_usage_is_recorded_without(
    plain: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is not one of no usage: limits would charge nothing for it."""
    real = encode_exactly

    def only_without(exchange: Exchange, **more: Any) -> tuple[bytes, bool]:
        if exchange.usage is not None and exchange.usage.input_tokens is not None:
            raise ValueError("sk-secret")
        return real(exchange, **more)

    monkeypatch.setattr(intake_module, "encode_exactly", only_without)
    monkeypatch.setattr("sidecar.model.record.LineTemplate.line", only_without)
    sample = SAMPLES["openai_chat.json"]
    one: Exchange | PlainExchange = call(sample, *shapes(sample), 1)
    if not plain:
        assert isinstance(one, PlainExchange)
        one = replace(one.exchange(), id=one.id, usage=Usage(usage_state=UsageState.FINAL, input_tokens=3))
    disk, metrics = Disk(), Metrics()
    intake = Intake(metrics, factory.plain_readers(SETTINGS, metrics, BOOK), PRICE)
    intake.begin(disk)
    source = Source(bytes(16), lambda number: None)
    intake.came(source)
    intake.take(source, encode_frame(1, admitted=1, ended=[one]))
    intake.store()
    (record,) = [Record.from_json(line) for line in disk.batches[0].lines]
    assert record.usage is not None
    assert (record.usage.usage_state, record.usage.reason) == (UsageState.ABSENT, UNREAD)
    assert not disk.tally.lost
    assert "cannot be recorded as it was told: ValueError" in caplog.text
