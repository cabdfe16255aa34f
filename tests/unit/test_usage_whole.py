"""A call read whole, lean or not, gives what the taps give that read along: every recording, and what is made up."""

from __future__ import annotations

import gzip
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.usage_samples import CASES, Sample, coded, load, read_call, sliced, ways

from sidecar.model.exchange import Usage, UsageState
from sidecar.usage.formats.content_encoding import STEP_BYTES
from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.openai import ChatCompletions, Responses
from sidecar.usage.readers import Element, Pin, UsageTaps
from sidecar.usage.whole import Plan, prepare

SAMPLES = {f"sample {name}": sample for name, sample in load().items() if not sample.websocket}
SAMPLES |= {f"case {name}": sample for name, sample in load(CASES).items() if not sample.websocket}
LEAN_PATHS = {"/v1/chat/completions": "chat", "/v1/responses": "responses", "/v1/messages": "messages"}
JSON = (b"Content-Type", b"application/json")
SSE = (b"Content-Type", b"text/event-stream")
ID = (b"X-Request-Id", b"req_1")
ANTHROPIC = {
    "input_tokens": 9,
    "output_tokens": 7,
    "cache_creation_input_tokens": 5,
    "cache_read_input_tokens": 3,
    "cache_creation": {"ephemeral_5m_input_tokens": 4, "ephemeral_1h_input_tokens": 1},
    "service_tier": "standard",
}
LARGE_BYTES = 16_384  # recordings above this are played in fewer ways
PIECES_MAX = 500
OPENED_NS, TOKEN_NS = 1_000_000, 5_000_000


def taps_of(sample: Sample | None = None, **more: Any) -> tuple[UsageTaps, list[str]]:
    odd: list[str] = []
    base = sample.upstream_base if sample is not None else ""
    times = iter([OPENED_NS, *([TOKEN_NS] * 100)])
    clock = more.pop("clock_ns", lambda: next(times))
    return UsageTaps(upstream_base=base, anomaly=odd.append, clock_ns=clock, **more), odd


def along(
    sample: Sample,
    pieces: Sequence[bytes],
    *,
    whole: bool = True,
    skipping: bool = False,
    fed: list[bytes] | None = None,
    **more: Any,
) -> tuple[Usage | None, set[str], bool]:
    """By the taps; the anomalies; whether the first token was seen. `skipping`: what may be left out is."""
    taps, odd = taps_of(sample, **more)
    request = taps.request(sample.method, sample.path, sample.request_headers)
    if request is None:
        return None, set(odd), False
    request.feed(sample.request_body)
    response = taps.response(request, sample.status, sample.response_headers)
    if response is None:
        return None, set(odd), False
    for piece in pieces:
        skips = response.skips if skipping else None
        may = skips is not None and piece.endswith(skips.ends) and 0 < len(piece) <= skips.bytes_max
        if may and skips is not None and skips.nothing_in(piece):
            continue
        if fed is not None:
            fed.append(piece)
        response.feed(piece)
    usage = response.finish(whole)
    return usage, set(odd), usage is not None and usage.time_to_first_token_ms is not None


def plan_of(sample: Sample, **more: Any) -> tuple[Plan | None, list[str]]:
    taps, odd = taps_of(sample, clock_ns=lambda: TOKEN_NS, **more)
    headers = sample.response_headers
    return prepare(taps, sample.method, sample.path, sample.request_headers, sample.status, headers), odd


def whole_ways(sample: Sample, pieces: Sequence[bytes], *, whole: bool, timed: bool, **more: Any) -> dict[str, Any]:
    """Every way that leads through `whole`, and what each gave."""
    found: dict[str, Any] = {}
    noted = TOKEN_NS if timed else 0
    for way in ("lean, joined", "general, joined", "lean, pieces"):
        plan, odd = plan_of(sample, **more)
        if plan is None:
            found[way] = None, set()
            continue
        read = plan.read_generally if way.startswith("general") else plan.read
        body: bytes | Sequence[bytes] = pieces if way.endswith("pieces") else b"".join(pieces)
        usage = read(sample.request_body, body, whole=whole, opened_ns=OPENED_NS, first_token_ns=noted)
        found[way] = usage, set(odd)
        if whole and plan.nothing_in(b"".join(pieces)):
            found["not at all"] = None, set()
    return found


def check(sample: Sample, pieces: Sequence[bytes], *, whole: bool = True, **more: Any) -> None:
    expected, odd, timed = along(sample, pieces, whole=whole, **more)
    assert along(sample, pieces, whole=whole, skipping=True, **more) == (expected, odd, timed)
    for way, (usage, anomalies) in whole_ways(sample, pieces, whole=whole, timed=timed, **more).items():
        assert usage == expected, way
        assert anomalies == odd, way


@pytest.mark.parametrize("name", SAMPLES)
def test_every_recording_is_read_as_by_the_taps_however_it_is_cut(name: str) -> None:
    sample = SAMPLES[name]
    chosen = ways(sample.body)
    for way in ("whole", "lines", "13 bytes"):
        if len(chosen[way]) < PIECES_MAX:
            check(sample, chosen[way])


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if len(sample.body) < LARGE_BYTES])
def test_coded_bodies_too(name: str) -> None:
    sample = SAMPLES[name]
    coding = random.Random(name).choice(["gzip", "br", "zstd", "deflate"])
    headers = [*sample.response_headers, (b"Content-Encoding", coding.encode())]
    check(replace(sample, response_headers=headers), coded(sample.body.splitlines(keepends=True), coding))


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "deflate", "identity"])
def test_a_coded_document_is_read_the_lean_way(coding: str) -> None:
    sample = next(one for name, one in SAMPLES.items() if one.path == "/v1/chat/completions" and one.body[:1] == b"{")
    plan, _ = plan_of(sample)
    assert plan is not None
    expected = plan.row(sample.request_body, sample.body, plan.request_id)
    assert expected is not None
    headers = [*sample.response_headers, (b"Content-Encoding", coding.encode())]
    body = sample.body if coding == "identity" else b"".join(coded([sample.body], coding))
    plan, odd = plan_of(replace(sample, response_headers=headers))
    assert plan is not None
    assert plan.row(sample.request_body, body, plan.request_id) == expected
    for broken in (body[: len(body) // 2], b"x" + body, b"", sample.body[1:]):
        assert plan.row(sample.request_body, broken, plan.request_id) is None
    assert not odd


def test_a_coded_body_that_takes_more_than_a_step_is_left_to_the_general_way() -> None:
    sample = next(one for name, one in SAMPLES.items() if one.path == "/v1/chat/completions" and one.body[:1] == b"{")
    headers = [*sample.response_headers, (b"Content-Encoding", b"gzip")]
    plan, _ = plan_of(replace(sample, response_headers=headers))
    assert plan is not None
    large = sample.body[:-1] + b"," + b" " * 2 * STEP_BYTES + b'"x":1}'
    assert plan.row(sample.request_body, gzip.compress(large), plan.request_id) is None
    usage = plan.read(sample.request_body, gzip.compress(large))
    assert usage is not None
    assert usage.usage_state is UsageState.FINAL


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_cut_off_too(name: str) -> None:
    sample = SAMPLES[name]
    chance = random.Random(name)
    for place in {0, *(chance.randrange(len(sample.body) + 1) for _ in range(3))}:
        body = sample.body[:place]
        if len(body) < LARGE_BYTES:
            check(sample, sliced(body, 200), whole=bool(place % 2))


@pytest.mark.parametrize("more", [
    {"estimate": True},
    {"elements": [Element("rows", json=("usage", "prompt_tokens")), Element("ids", header="x-rows")]},
    {"pins": [Pin("/v1/{rest}", "groq")]},
    {"upstream_host": "api.openai.com"},
    {"body_fields": ("user",)},
], ids=lambda more: next(iter(more)))  # fmt: skip
def test_with_every_switch(more: dict[str, Any]) -> None:
    for sample in SAMPLES.values():
        if len(sample.body) < LARGE_BYTES:
            check(sample, [sample.body], **more)  # lines are estimated up to the piece with the end mark


def test_the_lean_ways_are_taken_for_the_commonest_recordings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the others would pass where nothing is ever read the lean way."""
    monkeypatch.setattr(Plan, "read_generally", _nothing)
    taken = set()
    for name, sample in SAMPLES.items():
        plan, _ = plan_of(sample)
        if plan is not None and plan.read(sample.request_body, sample.body) is not None:
            taken.add(name)
    for name in (
        "openai_chat.json",
        "openai_chat_stream.sse",
        "openai_responses.json",
        "openai_responses_stream.sse",
        "anthropic_messages_stream.sse",
    ):
        assert f"sample {name}" in taken
    plain = {"type": "message", "id": "m1", "model": "m", "stop_reason": "end_turn", "usage": ANTHROPIC}
    sample = _made("/v1/messages", orjson.dumps(plain), JSON)
    plan, _ = plan_of(sample)
    assert plan is not None
    assert plan.read(sample.request_body, sample.body) == along(sample, [sample.body])[0]


def _nothing(*args: object, **named: object) -> Usage | None:
    return None


def _made(
    path: str, body: bytes, kind: tuple[bytes, bytes], request: bytes = b'{"model":"asked","stream":true}'
) -> Sample:
    return Sample(
        name="made up",
        provider=None,
        method="POST",
        path=path,
        request_headers=[JSON],
        request_body=request,
        status=200,
        response_headers=[kind, ID],
        body=body,
        expected=None,
        records=None,
        websocket=False,
        null_or_zero=(),
    )


COUNT = st.one_of(
    st.integers(0, 500), st.integers(0, 3), st.none(), st.sampled_from([-1, True, 2.0, 1.5, "7", 2**53, [], {}])
)
DETAILS = st.one_of(
    st.none(),
    st.dictionaries(
        st.sampled_from([
            "cached_tokens", "audio_tokens", "text_tokens", "image_tokens", "reasoning_tokens", "cache_write_tokens",
            "accepted_prediction_tokens", "rejected_prediction_tokens", "other",
        ]),
        COUNT, max_size=4,
    ),
    st.just("text"),
)  # fmt: skip
USUAL = st.builds(lambda i, o: (i, o, i + o), st.integers(0, 400), st.integers(0, 400))


@st.composite
def usages(draw: st.DrawFn) -> Any:
    """A usage object of any of the families, mostly as documented, or nearly."""
    names = draw(st.sampled_from([("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens")]))
    entered, said, total = draw(st.one_of(USUAL, USUAL, st.tuples(COUNT, COUNT, COUNT)))
    raw: dict[str, Any] = {names[0]: entered, names[1]: said}
    if draw(st.booleans()):
        raw["total_tokens"] = total
    for name in ("prompt_tokens_details", "completion_tokens_details", "input_tokens_details", "output_tokens_details"):
        if draw(st.integers(0, 3)) == 0:
            raw[name] = draw(DETAILS)
    for name in ("cache_read_input_tokens", "cache_creation_input_tokens", "reasoning_tokens", "cost"):
        if draw(st.integers(0, 5)) == 0:
            raw[name] = draw(COUNT)
    if draw(st.integers(0, 5)) == 0:
        short, long = draw(COUNT), draw(COUNT)
        raw["cache_creation"] = {"ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": long}
        if type(short) is int and type(long) is int and draw(st.booleans()):
            raw["cache_creation_input_tokens"] = short + long
    if draw(st.integers(0, 5)) == 0:
        raw["service_tier"] = draw(st.sampled_from(["standard", "", 3, None]))
    if draw(st.integers(0, 8)) == 0:
        raw["server_tool_use"] = draw(st.sampled_from([None, {"web_search_requests": 2}, 4]))
    return draw(st.sampled_from([raw, raw, raw, raw, None, {}, 7]))


TOOLS = st.one_of(
    st.sampled_from([None, 4, {}, {"image_gen": {"total_tokens": 0}, "web_search": {"num_requests": 0}}]),
    st.builds(
        lambda searches, tokens: {"image_gen": {"output_tokens": tokens}, "web_search": {"num_requests": searches}},
        COUNT,
        COUNT,
    ),
)


@st.composite
def documents(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    path = draw(st.sampled_from([*LEAN_PATHS, "/other/responses", "/model/m/converse"]))
    document: dict[str, Any] = {"id": draw(st.sampled_from(["id-1", "", None, 4])), "model": "m"}
    family = draw(st.sampled_from(["chat", "responses", "messages"]))
    if family == "chat":
        document["object"] = "chat.completion"
        indexes = draw(st.lists(st.sampled_from([0, 1, 2, None, True]), max_size=3))
        reason = st.sampled_from(["stop", "length", None, ""])
        document["choices"] = [{"index": index, "finish_reason": draw(reason)} for index in indexes]
        if draw(st.integers(0, 9)) == 0:
            document["choices"] = draw(st.sampled_from([None, {}, [1], [{"usage": {"prompt_tokens": 1}}]]))
    elif family == "responses":
        document["object"] = draw(st.sampled_from(["response", "response", "response.compaction", "other"]))
        document["status"] = draw(st.sampled_from(["completed", "completed", "incomplete", "queued", "failed", None]))
        document["incomplete_details"] = draw(st.sampled_from([None, {"reason": "max_output_tokens"}, {}, 3]))
        document["background"] = draw(st.booleans())
        if draw(st.integers(0, 3)) == 0:
            document["tool_usage"] = draw(TOOLS)
    else:
        document["type"] = draw(st.sampled_from(["message", "message", "error"]))
        document["stop_reason"] = draw(st.sampled_from(["end_turn", None, ""]))
    if draw(st.integers(0, 9)):
        document["usage"] = draw(usages())
    document["service_tier"] = draw(st.sampled_from([None, "default", "", 5]))
    document["error"] = draw(st.sampled_from([None, None, None, None, {"type": "overloaded"}, "", "text"]))
    if draw(st.integers(0, 9)) == 0:
        document = {"response": document}
    return path, document


@settings(max_examples=200, deadline=None)
@given(made=documents(), request=st.sampled_from([
    b'{"model":"asked"}', b'{"messages":[],"model":"asked","n":2}', b"", b"{", b"[]", b'{"model":5}', b' {"model":"a"}',
    b'{"model":"a","model":"b"}', b"--x\r\n",
]), end=st.sampled_from([b"", b"\n", b" x", b"\n{}"]))  # fmt: skip
def test_plain_documents_of_any_kind(made: tuple[str, dict[str, Any]], request: bytes, end: bytes) -> None:
    path, document = made
    body = orjson.dumps(document) + end
    check(_made(path, body, JSON, request), [body])


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize("name", [name for name in SAMPLES if name.endswith(".ndjson")])
def test_lines_under_the_name_of_a_document_are_read_however_they_are_cut_and_ended(name: str, newline: bytes) -> None:
    sample = replace(SAMPLES[name], response_headers=[JSON])
    body = sample.body.replace(b"\n", newline)
    expected, *_ = along(SAMPLES[name], [sample.body])
    assert expected is not None
    assert expected.usage_state is UsageState.FINAL
    for size in (len(body), 7):
        found, *_ = along(sample, [body[at : at + size] for at in range(0, len(body), size)])
        assert found is not None
        assert found.usage_state is UsageState.FINAL
        assert (found.input_tokens, found.output_tokens) == (expected.input_tokens, expected.output_tokens)


@pytest.mark.parametrize("name", [name for name, sample in SAMPLES.items() if len(sample.body) < LARGE_BYTES])
def test_a_path_that_nobody_knows_may_hold_any_response(name: str) -> None:
    sample = replace(SAMPLES[name], method="POST", path="/orders/1")
    for fields in (sample.response_headers, [JSON], [JSON, ID], [(b"Content-Type", b"text/plain")]):
        check(replace(sample, response_headers=fields), [sample.body])


WORDS = st.sampled_from(
    ["id", "items", "usage", "tokens", "total_tokens", "token", "model", "choices", "object", "x", "usageMetadata",
     "meta", "billed_units", "metrics", "response", "data", "type", "input_tokens", "candidates"]
)  # fmt: skip
THINGS = st.recursive(
    st.one_of(st.none(), st.integers(0, 99), WORDS, st.text(max_size=5), st.sampled_from(['"usage":', "\\u0075sage"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(thing=THINGS, status=st.sampled_from([200, 201, 404, 500]), method=st.sampled_from(["POST", "PUT", "GET"]),
       escaped=st.booleans(), end=st.sampled_from([b"", b"\n", b"}", b" x"]))  # fmt: skip
def test_a_path_that_nobody_knows_and_documents_of_any_kind(
    thing: Any, status: int, method: str, escaped: bool, end: bytes
) -> None:
    body = orjson.dumps(thing) + end
    if escaped:
        body = body.replace(b'"us', b'"\\u0075s').replace(b"ok", b"\\u006fk")
    sample = _made("/orders/1", body, JSON)
    check(replace(sample, status=status, method=method), [body])


def test_an_api_that_is_no_model_s_is_known_by_a_look() -> None:
    for fields, body, nothing in (
        ([JSON], b'{"id":5,"items":[1,2],"name":"salt"}', True),
        ([JSON], b"[]", True),
        ([JSON], b"{", True),
        ([JSON], b'{"usage":{"a":5}}', False),
        ([JSON], b'{"prompt_tokens":5}', False),
        ([JSON], b"plain", False),
        ([JSON], b"", False),
        ([SSE], b"{}", False),
        ([JSON, (b"Content-Encoding", b"gzip")], b"{}", False),
    ):
        plan, _ = plan_of(replace(_made("/orders/1", body, JSON), status=201, response_headers=fields))
        assert plan is not None
        assert plan.nothing_in(body) == nothing, body


@st.composite
def streams(draw: st.DrawFn) -> tuple[str, bytes]:
    path = draw(st.sampled_from([*LEAN_PATHS]))
    family = draw(st.sampled_from([LEAN_PATHS[path], LEAN_PATHS[path], "chat", "responses", "messages"]))
    events: list[tuple[str, Any]] = []
    texts = draw(st.lists(st.sampled_from(["hi", 'a "usage": 1', "x\u00e9", "error", "[DONE]", "\n\n"]), max_size=12))
    if family == "chat":
        base = {"id": draw(st.sampled_from(["c1", ""])), "model": "m", "object": "chat.completion.chunk", "usage": None}
        for text in texts:
            events.append(("", {**base, "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}))
        if draw(st.booleans()):
            events.append(("", {**base, "id": "c1", "choices": [{"index": 0, "finish_reason": "stop"}]}))
        if draw(st.integers(0, 4)):
            events.append(("", {**base, "id": "c1", "choices": [], "usage": draw(usages())}))
        events.append(("", "[DONE]"))
    elif family == "responses":
        events.append(("response.created", {"response": {"id": "r1", "model": "m", "status": "in_progress"}}))
        events += [("response.output_text.delta", {"delta": text}) for text in texts]
        done = {"id": "r1", "status": "completed", "object": "response", "usage": draw(usages())}
        if draw(st.integers(0, 3)) == 0:
            done["tool_usage"] = draw(TOOLS)
        events.append((draw(st.sampled_from(["response.completed", "response.failed", "error"])), {"response": done}))
    else:
        events.append(
            ("message_start", {"message": {"id": "m1", "type": "message", "model": "m", "usage": draw(usages())}})
        )
        events.append(("ping", {}))
        events += [("content_block_delta", {"delta": {"text": text}}) for text in texts]
        events.append(("message_delta", {"delta": {"stop_reason": "end_turn"}, "usage": draw(usages())}))
        events.append(("message_stop", {}))
    if draw(st.integers(0, 4)) == 0:
        events.insert(draw(st.integers(0, len(events))), ("error", {"error": {"type": "overloaded_error"}}))
    newline = draw(st.sampled_from([b"\n", b"\n", b"\n", b"\r\n"]))
    out = []
    for event, document in events:
        data = b"[DONE]" if document == "[DONE]" else orjson.dumps({"type": event, **document} if event else document)
        named = b"event: " + event.encode() + newline if event and draw(st.booleans()) else b""
        out.append(named + b"data: " + data + newline + newline)
        if draw(st.integers(0, 9)) == 0:
            out.append(b": keep-alive" + newline + newline)
    return path, b"".join(out)


@settings(max_examples=200, deadline=None)
@given(made=streams(), data=st.data(), whole=st.booleans())
def test_streams_of_any_kind_cut_anywhere(made: tuple[str, bytes], data: st.DataObject, whole: bool) -> None:
    path, body = made
    borders = [at + 2 for at in range(len(body)) if body.startswith(b"\n\n", at)]
    anywhere = data.draw(st.lists(st.one_of(st.sampled_from(borders or [0]), st.integers(0, len(body))), max_size=40))
    cuts = sorted(anywhere)
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    check(_made(path, body, SSE), pieces, whole=whole)


def _chunk(text: str, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    return b"data: " + orjson.dumps({"id": "c1", "model": "m", "choices": [choice], "usage": None, **more}) + b"\n\n"


def test_of_a_stream_of_whole_events_only_the_first_and_the_last_ones_are_fed() -> None:
    counts = {"prompt_tokens": 3, "completion_tokens": 200, "total_tokens": 203}
    pieces = [_chunk(f"word {number}") for number in range(200)] + [
        _chunk("", choices=[], usage=counts),
        b"data: [DONE]\n\n",
    ]
    sample = _made("/v1/chat/completions", b"".join(pieces), SSE)
    fed: list[bytes] = []
    assert along(sample, pieces, skipping=True, fed=fed) == along(sample, pieces)
    assert fed == [pieces[0], *pieces[-2:]]


def test_a_plan_serves_calls_whose_values_differ() -> None:
    sample = SAMPLES["sample openai_chat.json"]
    plan, _ = plan_of(sample)
    assert plan is not None
    for number in ("a", "b"):
        usage = plan.read(sample.request_body, sample.body, fields={"x-request-id": number})
        assert usage is not None
        assert usage.upstream_request_id == number
        general = plan.read_generally(sample.request_body, sample.body, fields={"x-request-id": number})
        assert general == usage
    assert {"x-request-id", "request-id"} <= plan.per_call


def test_what_can_have_no_usage_has_no_plan() -> None:
    taps, _ = taps_of()
    assert prepare(taps, "GET", "/healthz", [], 200, [JSON]) is None
    assert prepare(taps, "POST", "/v1/chat/completions", [], 204, []) is None
    assert read_call(taps, "GET", "/healthz", [], b"", 200, [JSON], b"{}") is None


def test_a_fault_in_a_lean_way_falls_through_to_the_general_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(Plan, "_read_plain", broken)
    sample = SAMPLES["sample openai_chat.json"]
    plan, odd = plan_of(sample)
    assert plan is not None
    assert plan.lean in (ChatCompletions, Responses, Messages)
    usage = plan.read(sample.request_body, sample.body, opened_ns=OPENED_NS)
    assert usage == along(sample, [sample.body])[0]
    assert odd == []
