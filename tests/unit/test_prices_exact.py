"""A cost is exact only where everything that was consumed has its price; else it is an estimate that says why."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.usage_samples import read_call

from sidecar.meters.properties import PROVIDER_UNITS
from sidecar.model.exchange import Usage, UsageState
from sidecar.model.record import usage_to_dict
from sidecar.prices import PriceBook
from sidecar.prices.custom import read_prices
from sidecar.prices.facts import BILLED, CITED
from sidecar.prices.table import builtin
from sidecar.usage.readers import UsageTaps

NOW_S = datetime(2026, 11, 20, 12, 0, tzinfo=UTC).timestamp()
BOOK = PriceBook(builtin())

State = tuple[str, str | None]
FREE = {"web_fetch_requests"}  # https://platform.claude.com/docs/en/agents-and-tools/tool-use/web-fetch-tool

EXACT: State = ("exact", None)


def usage(provider: str, model: str, **more: Any) -> Usage:
    counts = {"input_tokens": 1000, "output_tokens": 100}
    return Usage(**{"usage_state": UsageState.FINAL, "provider": provider, "model": model, **counts, **more})


def priced(call: Usage, host: str | None = None) -> tuple[str | None, State]:
    """The total and how certain it is; the same of the record's row, and where lines are written."""
    cost, _ = BOOK.cost(call, NOW_S, host=host)
    assert cost is not None
    row = usage_to_dict(call)
    assert BOOK.cost(row, NOW_S, host=host)[0] == cost
    assert orjson.loads(BOOK.pricer(row, host=host).json(row, NOW_S)[0]) == cost
    return cost["total"], (cost["state"], cost.get("reason"))


def answered(
    path: str, response: bytes | dict[str, Any], *, host: str, asked: dict[str, Any] | None = None, method: str = "POST"
) -> Usage:
    """What is read of a response, by the taps and by who reads many at once."""
    taps = UsageTaps(upstream_host=host)
    streamed = isinstance(response, bytes)
    body = response if isinstance(response, bytes) else orjson.dumps(response)
    head = [(b"content-type", b"text/event-stream" if streamed else b"application/json")]
    sent = orjson.dumps(asked or {}) if method == "POST" else b""
    request = taps.request(method, path, [(b"content-type", b"application/json")])
    assert request is not None
    request.feed(sent)
    response_tap = taps.response(request, 200, head)
    assert response_tap is not None
    response_tap.feed(body)
    found = response_tap.finish(True)
    assert found is not None
    assert read_call(taps, method, path, [], sent, 200, head, body) == found
    return found


@pytest.mark.parametrize("unit", sorted(set(BILLED) - {CITED}))
def test_a_unit_that_is_billed_and_has_no_price_makes_an_estimate(unit: str) -> None:
    assert priced(usage("deepseek", "deepseek-chat", units={unit: 1}))[1] == ("estimated", "unpriced_unit")
    assert priced(usage("deepseek", "deepseek-chat", units={unit: 0}))[1] == EXACT


def test_of_every_unit_that_a_provider_reports_it_is_known_whether_it_is_billed() -> None:
    assert set(PROVIDER_UNITS) - set(BILLED) == FREE


def test_pages_that_were_annotated_have_their_own_price() -> None:
    call = usage("mistral_ai", "mistral-ocr-2512", input_tokens=None, output_tokens=None, units={"pages": 3})
    assert priced(call) == ("0.006", EXACT)
    call.units["annotated_pages"] = 2
    assert priced(call) == ("0.008", EXACT)


@pytest.mark.parametrize("unit", [*FREE, "my_own_field"])
def test_a_unit_that_is_free_changes_no_price(unit: str) -> None:
    assert priced(usage("anthropic", "claude-sonnet-4-5", units={unit: 5}))[1] == EXACT


@pytest.mark.parametrize("field", ["audio_input_tokens", "audio_output_tokens", "image_output_tokens"])
@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4o-audio-preview"),
        ("openai", "gpt-4o-mini-audio-preview"),
        ("openai", "gpt-5"),
        ("openrouter", "openai/gpt-audio"),
    ],
)
def test_tokens_that_the_provider_prices_apart_do_not_silently_cost_what_text_does(
    provider: str, model: str, field: str
) -> None:
    assert priced(usage(provider, model, **{field: 80}))[1] == ("estimated", "unpriced_unit")
    assert priced(usage(provider, model, **{field: 0}))[1] == EXACT


@pytest.mark.parametrize(
    ("provider", "model", "more"),
    [
        ("openai", "gpt-audio", {"audio_input_tokens": 80, "audio_output_tokens": 90}),  # have a price
        ("openai", "gpt-4o", {"image_input_tokens": 80}),  # cost what text does
        ("gcp.gemini", "gemini-3-pro-preview", {"audio_input_tokens": 80}),
        ("gcp.gemini", "gemini-2.5-flash-tts", {"audio_output_tokens": 100}),
        ("openai", "gpt-4o-mini-tts", {"audio_output_tokens": 100, "operation": "speech"}),
        ("openai", "gpt-image-1", {"image_output_tokens": 100, "operation": "image_generation"}),
    ],
)
def test_tokens_whose_price_is_known_cost_exactly_that(provider: str, model: str, more: dict[str, Any]) -> None:
    assert priced(usage(provider, model, **more))[1] == EXACT


# Anthropic


def message(written: int, split: dict[str, int] | None, grown: int | None) -> bytes:
    """A stream whose first event says how long what is written is kept, and whose last one the total alone."""
    first = {"input_tokens": 10, "output_tokens": 1, "cache_creation_input_tokens": written}
    if split is not None:
        first["cache_creation"] = split  # type: ignore[assignment]
    last = {"output_tokens": 510} | ({} if grown is None else {"cache_creation_input_tokens": grown})
    model = "claude-sonnet-4-5-20250929"
    events = (
        {"type": "message_start", "message": {"id": "m", "type": "message", "model": model, "usage": first}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": last},
        {"type": "message_stop"},
    )
    return b"".join(b"event: %b\ndata: %b\n\n" % (str(e["type"]).encode(), orjson.dumps(e)) for e in events)


@pytest.mark.parametrize(
    ("written", "short", "long", "grown", "dollars", "expected"),
    [
        (1000, 0, 1000, None, "0.01368", EXACT),  # 10 at 3, 510 at 15, 1,000 at 6 dollars a million
        (1000, 0, 1000, 3000, "0.02118", ("estimated", "cache_write_life")),  # 2,000 more at 3.75
        (0, 0, 0, 3000, "0.01893", ("estimated", "cache_write_life")),
        (1000, 400, 600, 1000, "0.01278", EXACT),
    ],
)
def test_cache_writes_whose_life_is_not_told_make_an_estimate(
    written: int, short: int, long: int, grown: int | None, dollars: str, expected: State
) -> None:
    split = {"ephemeral_5m_input_tokens": short, "ephemeral_1h_input_tokens": long}
    found = answered("/v1/messages", message(written, split, grown), host="api.anthropic.com")
    assert found.cache_write_input_tokens == (grown or written)
    assert found.cache_write_1h_input_tokens == long
    assert priced(found) == (dollars, expected)


def test_cache_writes_without_any_word_of_their_life_are_of_five_minutes() -> None:
    found = answered("/v1/messages", message(1000, None, None), host="api.anthropic.com")
    assert priced(found) == ("0.01143", EXACT)


# Tools


def response(*, searches: int = 0, pictures: int = 0, model: str = "gpt-5.4") -> dict[str, Any]:
    tokens = {"input_tokens": 0, "output_tokens": pictures, "total_tokens": pictures}
    return {
        "id": "resp_1",
        "object": "response",
        "status": "completed",
        "model": model,
        "usage": {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110},
        "tool_usage": {"image_gen": tokens, "web_search": {"num_requests": searches}},
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("searches", "pictures", "units", "dollars", "expected"),
    [
        (0, 0, {}, "0.0004", EXACT),
        (3, 0, {"web_search_requests": 3}, "0.0304", EXACT),  # 10 dollars for a thousand
        (0, 4160, {"image_tool_tokens": 4160}, "0.0004", ("estimated", "unpriced_unit")),
    ],
)
def test_what_the_tools_of_a_response_used_is_counted(
    searches: int, pictures: int, units: dict[str, int], dollars: str, expected: State, *, streamed: bool
) -> None:
    said = response(searches=searches, pictures=pictures)
    events = b"data: %b\n\n" % orjson.dumps({"type": "response.completed", "response": said})
    asked = {"model": "gpt-5.4"}
    found = answered("/v1/responses", events if streamed else said, host="api.openai.com", asked=asked)
    assert (found.units, priced(found)) == (units, (dollars, expected))


def grounded(model: str, *queries: str) -> dict[str, Any]:
    return {
        "candidates": [{"index": 0, "finishReason": "STOP", "groundingMetadata": {"webSearchQueries": list(queries)}}],
        "usageMetadata": {"promptTokenCount": 100, "candidatesTokenCount": 10, "totalTokenCount": 110},
        "modelVersion": model,
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("model", "queries", "dollars", "expected"),
    [
        ("gemini-3-pro-preview", ("a", "b"), "0.02832", EXACT),  # 14 dollars for a thousand searches
        ("gemini-3-pro-preview", (), "0.00032", EXACT),
        ("gemini-2.5-flash", ("a", "b"), "0.035055", EXACT),  # 35 for a thousand prompts, however many they search
        ("gemini-2.0-flash-lite", ("a",), "0.0000105", ("estimated", "unpriced_unit")),
    ],
)
def test_searches_that_ground_an_answer_of_gemini_are_counted(
    model: str, queries: tuple[str, ...], dollars: str, expected: State, *, streamed: bool
) -> None:
    said = grounded(model, *queries)
    first = {"candidates": [{"content": {"parts": [{"text": "x"}]}}], "modelVersion": model}
    early = {"candidates": [said["candidates"][0] | {"finishReason": None}]}
    events = b"".join(b"data: %b\n\n" % orjson.dumps(each) for each in (first, early, said))
    path = f"/v1beta/models/{model}:" + ("streamGenerateContent?alt=sse" if streamed else "generateContent")
    found = answered(path, events if streamed else said, host="generativelanguage.googleapis.com")
    assert found.units == ({"web_search_requests": len(queries)} if queries else {})
    assert priced(found) == (dollars, expected)


def test_searches_of_an_interaction_are_counted() -> None:
    counts = {"total_input_tokens": 100, "total_output_tokens": 10, "total_tokens": 110}
    searches = {"grounding_tool_count": [{"type": "google_search", "count": 2}, {"type": "google_maps", "count": 1}]}
    said = {"id": "i", "model": "gemini-3-pro-preview", "status": "completed", "usage": counts | searches}
    found = answered("/v1beta/interactions", said, host="generativelanguage.googleapis.com")
    assert found.units == {"web_search_requests": 2}
    assert priced(found) == ("0.02832", EXACT)


# Terms


@pytest.mark.parametrize(
    ("traffic", "tier", "expected"),
    [
        ("ON_DEMAND", "on_demand", EXACT),
        ("ON_DEMAND_PRIORITY", "priority", ("estimated", "tier")),
        ("ON_DEMAND_FLEX", "flex", ("estimated", "tier")),
        ("PROVISIONED_THROUGHPUT", "provisioned_throughput", ("estimated", "tier")),
        (None, None, EXACT),
        (7, None, EXACT),
    ],
)
def test_the_traffic_of_vertex_is_a_tier_of_service(traffic: object, tier: str | None, expected: State) -> None:
    said = grounded("gemini-2.5-flash")
    said["usageMetadata"]["trafficType"] = traffic
    path = "/v1/projects/p/locations/global/publishers/google/models/gemini-2.5-flash:generateContent"
    found = answered(path, said, host="aiplatform.googleapis.com")
    assert (found.service_tier, priced(found)[1]) == (tier, expected)
    chat = {
        "id": "c",
        "object": "chat.completion",
        "model": "gemini-2.5-flash",
        "choices": [{"index": 0, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 100,
            "completion_tokens": 10,
            "total_tokens": 110,
            "extra_properties": {"google": {"traffic_type": traffic}},
        },
    }
    path = "/v1/projects/p/locations/global/endpoints/openapi/chat/completions"
    found = answered(path, chat, host="aiplatform.googleapis.com")
    assert (found.service_tier, priced(found)[1]) == (tier, expected)


def test_a_tier_of_vertex_costs_what_the_table_says() -> None:
    model = "gemini-3.8-flash-tts"
    said = grounded(model)
    path = f"/v1/projects/p/locations/global/publishers/google/models/{model}:generateContent"
    standard = priced(answered(path, said, host="aiplatform.googleapis.com"))
    said["usageMetadata"]["trafficType"] = "ON_DEMAND_PRIORITY"
    dearer = priced(answered(path, said, host="aiplatform.googleapis.com"))
    assert standard[1] == dearer[1] == EXACT
    assert float(dearer[0] or 0) > float(standard[0] or 0)


IN_A_REGION: State = ("estimated", "region")


@pytest.mark.parametrize(
    ("provider", "model", "host", "expected"),
    [
        ("openai", "gpt-5.4", "api.openai.com", EXACT),
        ("openai", "gpt-5.4", "eu.api.openai.com", IN_A_REGION),
        ("openai", "gpt-5.4-2026-03-05", "us.api.openai.com", IN_A_REGION),
        ("openai", "gpt-5-2025-08-07", "eu.api.openai.com", EXACT),
        ("openai", "gpt-4o", "eu.api.openai.com", EXACT),
        ("gcp.vertex_ai", "claude-sonnet-4-5@20250929", "aiplatform.googleapis.com", EXACT),
        ("gcp.vertex_ai", "claude-sonnet-4-5@20250929", "us-east5-aiplatform.googleapis.com", IN_A_REGION),
        ("gcp.vertex_ai", "claude-sonnet-4-5@20250929", "aiplatform.eu.rep.googleapis.com", IN_A_REGION),
        ("gcp.vertex_ai", "claude-opus-4-1@20250805", "us-east5-aiplatform.googleapis.com", EXACT),
        ("gcp.vertex_ai", "gemini-2.5-flash", "us-east5-aiplatform.googleapis.com", EXACT),
    ],
)
def test_a_region_with_a_surcharge_makes_an_estimate(provider: str, model: str, host: str, expected: State) -> None:
    assert priced(usage(provider, model), host)[1] == expected


def test_on_bedrock_the_path_sets_the_price_and_not_a_member_of_the_body() -> None:
    said = {"output": {}, "stopReason": "end_turn", "usage": {"inputTokens": 100, "outputTokens": 10}}
    path, host = "/model/anthropic.claude-opus-4-1-20250805-v1%3A0/converse", "bedrock-runtime.us-east-1.amazonaws.com"
    found = answered(path, said, host=host, asked={"model": "amazon.nova-micro-v1:0"})
    assert priced(found, host)[0] == priced(answered(path, said, host=host), host)[0]
    assert priced(found, host)[0] is not None


def test_what_an_advisor_of_another_model_consumed_is_not_left_out_silently() -> None:
    said = orjson.loads((Path(__file__).parents[1] / "data/samples/anthropic_messages_advisor.json").read_bytes())
    found = answered("/v1/messages", said, host="api.anthropic.com")
    assert (found.total_tokens, found.units) == (1995, {"advisor_tokens": 2410})
    assert priced(found)[1] == ("estimated", "unpriced_unit")
    said["usage"]["iterations"] = [each for each in said["usage"]["iterations"] if each["type"] == "message"]
    found = answered("/v1/messages", said, host="api.anthropic.com")
    assert (found.units, priced(found)[1]) == ({}, EXACT)


# What the provider declares


def sonar(model: str, cost: dict[str, float] | None, **more: Any) -> Usage:
    """Figures of https://docs.perplexity.ai/getting-started/pricing."""
    used = {"prompt_tokens": 33, "completion_tokens": 7163, "total_tokens": 7196, **more}
    said = {
        "id": "c",
        "object": "chat.completion",
        "model": model,
        "choices": [{"index": 0, "finish_reason": "stop"}],
        "usage": used | ({} if cost is None else {"cost": cost}),
    }
    return answered("/chat/completions", said, host="api.perplexity.ai", asked={"model": model})


@pytest.mark.parametrize(
    ("stated", "expected"), [(0.409, EXACT), (0.409393, EXACT), (0.45, ("estimated", "declared_differs"))]
)
def test_deep_research_costs_its_citations_too(stated: float, expected: State) -> None:
    more = {"citation_tokens": 20016, "num_search_queries": 18, "reasoning_tokens": 73997}
    found = sonar("sonar-deep-research", {"total_cost": stated}, **more)
    assert found.units == {"citation_tokens": 20016, "search_queries": 18}
    assert priced(found) == ("0.409393", expected)


def test_citations_that_are_in_the_input_are_not_added_to_it() -> None:
    found = sonar("sonar-deep-research", None, citation_tokens=1000, total_tokens=8196)
    assert found.input_tokens == 1033
    assert priced(found) == ("0.05937", EXACT)


def test_citations_of_other_models_are_free() -> None:
    assert priced(sonar("sonar", None, citation_tokens=1000, search_context_size="high"))[1] == EXACT


@pytest.mark.parametrize(
    ("size", "fee", "dollars", "expected"),
    [
        ("low", 0.006, "0.113544", EXACT),
        ("high", 0.014, "0.121544", EXACT),
        ("low", None, "0.121544", ("estimated", "tier")),  # the table has the largest search's alone
        ("high", None, "0.121544", EXACT),
    ],
)
def test_the_fee_of_a_request_is_the_declared_one(size: str, fee: float | None, dollars: str, expected: State) -> None:
    cost = None if fee is None else {"request_cost": fee, "total_cost": 0.107544 + fee}
    assert priced(sonar("sonar-pro", cost, search_context_size=size)) == (dollars, expected)


def test_a_stated_cost_that_differs_leaves_a_price_of_ones_own_exact() -> None:
    table = {"provider": "openrouter", "model": "*", "input": "1", "output": "1"}
    book = PriceBook(builtin(), read_prices([table], []))
    call = usage("openrouter", "openai/gpt-5", cost_usd="0.5")
    assert priced(call)[1] == ("estimated", "declared_differs")
    cost, _ = book.cost(call, NOW_S)
    assert cost is not None
    assert cost["state"] == "exact"
