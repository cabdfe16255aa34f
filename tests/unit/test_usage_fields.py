"""A usage object means the same in every shape: wholes, parts, what a total hides, and what a call cost."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.exchange import Usage
from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.base import Document, Reader, build
from sidecar.usage.providers.gemini import Gemini, Interactions
from sidecar.usage.providers.openai import ChatCompletions, Embeddings, Media, Responses
from sidecar.usage.values import decimal_text, overlay

CHAT = ("prompt_tokens", "completion_tokens", "prompt_tokens_details", "completion_tokens_details")
TYPED = ("input_tokens", "output_tokens", "input_tokens_details", "output_tokens_details")
SHAPES: dict[str, tuple[type[Reader], tuple[str, str, str, str]]] = {
    "chat": (ChatCompletions, CHAT),
    "responses": (Responses, TYPED),
    "media": (Media, TYPED),
    "media in the other spelling": (Media, CHAT),
    "messages with OpenAI's names": (Messages, CHAT),
}


def read(reader: type[Reader], *reports: Document) -> Usage:
    """A plain answer's usage, or that of several reports of one answer."""
    odd: list[str] = []
    one = reader(odd.append)
    for report in reports:
        one.report(report)
    usage = build(one, streamed=False, ended=True)
    usage.provider = one.provider
    assert not odd
    return usage


def counts(usage: Usage) -> tuple[int | None, int | None, int | None]:
    return usage.input_tokens, usage.output_tokens, usage.total_tokens


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Callable[..., Usage]:
    """Reads a usage object, spelled as this shape spells it."""
    reader, (entered, said, in_details, out_details) = SHAPES[request.param]
    spelled = {"entered": entered, "said": said, "inside": in_details, "outside": out_details, "total": "total_tokens"}

    def of(**usage: Any) -> Usage:
        return read(reader, {spelled.get(key, key): value for key, value in usage.items()})

    return of


Shape = Callable[..., Usage]


# What a total hides (O2), and what is larger than its whole.


def test_what_the_total_holds_beyond_the_parts_is_output(shape: Shape) -> None:
    assert counts(shape(entered=21, said=199, total=631)) == (21, 610, 631)


def test_reasoning_that_the_total_counts_beside_the_output_is_added(shape: Shape) -> None:
    usage = shape(entered=32, said=9, total=135, outside={"reasoning_tokens": 94})
    assert (*counts(usage), usage.reasoning_output_tokens) == (32, 103, 135, 94)


def test_reasoning_that_the_total_counts_inside_stays_inside(shape: Shape) -> None:
    assert counts(shape(entered=32, said=103, total=135, outside={"reasoning_tokens": 94})) == (32, 103, 135)


@pytest.mark.parametrize("total", [{}, {"total": 36}, {"total": 355}])
def test_reasoning_larger_than_the_output_stands_outside_of_it(shape: Shape, total: dict[str, int]) -> None:
    for reasoning in ({"reasoning_tokens": 319}, {"outside": {"reasoning_tokens": 319}}):
        assert counts(shape(entered=33, said=3, **total, **reasoning)) == (33, 322, 355)


def test_a_total_smaller_than_the_parts_changes_nothing(shape: Shape) -> None:
    assert counts(shape(entered=50, said=20, total=60)) == (50, 20, 70)
    assert counts(shape(entered=50, said=20, total=0)) == (50, 20, 70)


@pytest.mark.parametrize(
    "beside",
    [
        {"connector_tokens": 300},
        {"inside": {"cached_tokens": 300}},
        {"inside": {"cached_tokens": 200, "cache_write_tokens": 100}},
        {"inside": {"audio_tokens": 300}},
        {"citation_tokens": 300},
    ],
)
def test_a_named_part_of_the_input_that_makes_up_the_rest_is_input(shape: Shape, beside: dict[str, Any]) -> None:
    assert counts(shape(entered=400, said=7, total=707, **beside)) == (700, 7, 707)
    hidden = shape(entered=400, said=7, total=727, outside={"reasoning_tokens": 20}, **beside)
    assert counts(hidden) == (700, 27, 727)


def test_sound_and_cached_tokens_larger_than_the_input_stand_beside_it(shape: Shape) -> None:
    assert counts(shape(entered=5, said=71, total=467, inside={"audio_tokens": 391})) == (396, 71, 467)
    assert counts(shape(entered=5, said=71, inside={"audio_tokens": 391})) == (396, 71, 467)
    assert counts(shape(entered=11, said=33, inside={"cached_tokens": 9216})) == (9227, 33, 9260)


def test_where_one_of_the_two_is_not_stated_the_total_tells_it(shape: Shape) -> None:
    assert counts(shape(entered=21, total=631)) == (21, 610, 631)
    assert counts(shape(said=30, total=80)) == (50, 30, 80)
    assert counts(shape(said=80, total=80)) == (None, 80, 80)
    assert counts(shape(entered=21, total=21)) == (21, None, 21)


def test_a_total_alone_is_a_total_and_says_nothing_of_the_parts(shape: Shape) -> None:
    usage = shape(total=249)
    assert (*counts(usage), usage.usage_state) == (None, None, 249, "final")


@pytest.mark.parametrize("bad", [-1, 1.5, "many", [3], True, 2**60])
def test_a_number_that_was_rejected_is_not_made_up_from_the_total(bad: object) -> None:
    seen: list[str] = []
    reader = ChatCompletions(seen.append)
    reader.report({"prompt_tokens": 5, "completion_tokens": bad, "total_tokens": 9})
    assert counts(build(reader, streamed=False, ended=True))[:2] == (5, None)
    assert seen == ["value_rejected"]


def test_nothing_is_generated_by_an_embedding_so_the_rest_is_input() -> None:
    assert counts(read(Embeddings, {"total_tokens": 83})) == (83, None, 83)
    assert counts(read(Embeddings, {"prompt_tokens": 80, "total_tokens": 83})) == (83, None, 83)
    assert counts(read(Embeddings, {"prompt_tokens": 26, "total_tokens": 26, "completion_tokens": 0})) == (26, 0, 26)


def test_messages_hide_nothing_either() -> None:
    used = {"input_tokens": 11, "cache_read_input_tokens": 100, "output_tokens": 5}
    assert counts(read(Messages, used | {"total_tokens": 200})) == (111, 89, 200)
    assert counts(read(Messages, used | {"total_tokens": 116})) == (111, 5, 116)
    assert counts(read(Messages, used | {"total_tokens": 16})) == (111, 5, 116), "a total without the cache: parts stay"


@pytest.mark.parametrize("said", [{"candidatesTokenCount": 199}, {}])
def test_thoughts_that_only_geminis_total_knows_of_are_output(said: dict[str, int]) -> None:
    assert counts(read(Gemini, {"promptTokenCount": 21, "totalTokenCount": 631, **said})) == (21, 610, 631)


def test_the_interactions_total_tells_what_was_left_out() -> None:
    used = {"total_input_tokens": 30, "total_output_tokens": 9, "total_thought_tokens": 40}
    assert counts(read(Interactions, used | {"total_tokens": 90})) == (30, 60, 90)
    assert counts(read(Interactions, used | {"total_tokens": 99, "total_tool_use_tokens": 20})) == (50, 49, 99)


# Parts, under all their names.


@pytest.mark.parametrize("name", ["cached_tokens", "cache_read_tokens", "cache_read_input_tokens"])
@pytest.mark.parametrize("nested", [True, False])
def test_what_the_cache_read_is_read_under_its_names(shape: Shape, name: str, nested: bool) -> None:
    usage = shape(entered=900, said=9, total=909, **({"inside": {name: 800}} if nested else {name: 800}))
    assert (*counts(usage), usage.cache_read_input_tokens) == (900, 9, 909, 800)


@pytest.mark.parametrize("name", ["prompt_cache_hit_tokens", "cached_input_tokens", "cached_prompt_tokens"])
def test_what_the_cache_read_has_names_beside_the_wholes(shape: Shape, name: str) -> None:
    assert shape(entered=900, said=9, **{name: 800}).cache_read_input_tokens == 800


@pytest.mark.parametrize(
    "name", ["cache_write_tokens", "cache_write_input_tokens", "cache_creation_tokens", "cache_creation_input_tokens"]
)
@pytest.mark.parametrize("nested", [True, False])
def test_what_the_cache_wrote_is_read_under_its_names(shape: Shape, name: str, nested: bool) -> None:
    usage = shape(entered=2071, said=37, total=2108, **({"inside": {name: 1893}} if nested else {name: 1893}))
    assert (*counts(usage), usage.cache_write_input_tokens) == (2071, 37, 2108, 1893)


@pytest.mark.parametrize("key", ["cache_creation", "cache_creation_token_details"])
def test_a_cache_write_by_how_long_it_is_kept_adds_up(shape: Shape, key: str) -> None:
    split = {"ephemeral_5m_input_tokens": 300, "ephemeral_1h_input_tokens": 200}
    for usage in (
        shape(entered=900, said=9, total=909, inside={key: split}),
        shape(entered=900, said=9, total=909, **{key: split}),
    ):
        found = usage.cache_write_input_tokens, usage.cache_write_5m_input_tokens, usage.cache_write_1h_input_tokens
        assert (*counts(usage), *found) == (900, 9, 909, 500, 300, 200)


@pytest.mark.parametrize("name", ["prompt_tokens", "prompt_token", "input_tokens", "input_token"])
def test_details_of_the_input_have_four_names(shape: Shape, name: str) -> None:
    details = {"cached_tokens": 1, "cache_write_tokens": 2, "text_tokens": 3, "audio_tokens": 4, "image_tokens": 5}
    usage = shape(entered=20, said=1, total=21, **{f"{name}_details": details})
    assert (usage.cache_read_input_tokens, usage.cache_write_input_tokens) == (1, 2)
    assert (usage.text_input_tokens, usage.audio_input_tokens, usage.image_input_tokens) == (3, 4, 5)


@pytest.mark.parametrize("name", ["completion_tokens", "completion_token", "output_tokens", "output_token"])
def test_details_of_the_output_have_four_names(shape: Shape, name: str) -> None:
    details = {"reasoning_tokens": 1, "text_tokens": 2, "audio_tokens": 3, "image_tokens": 4}
    usage = shape(entered=1, said=20, total=21, **{f"{name}_details": details})
    assert usage.reasoning_output_tokens == 1
    assert (usage.text_output_tokens, usage.audio_output_tokens, usage.image_output_tokens) == (2, 3, 4)


def test_however_few_members_there_are_each_is_looked_at(shape: Shape) -> None:
    assert shape(entered=3, said=4, reasoning_tokens=2).reasoning_output_tokens == 2
    assert shape(entered=3, said=4, prompt_audio_seconds=203).units == {"audio_seconds": 203}
    assert shape(cost=0.5).cost_usd == "0.5"
    usage = shape(entered=6211, said=187, total=6398, prompt_cache_hit_tokens=5888, prompt_cache_miss_tokens=323)
    assert (usage.cache_read_input_tokens, usage.provider) == (5888, "deepseek")


def test_a_copy_of_a_number_that_is_zero_or_null_takes_nothing_away(shape: Shape) -> None:
    usage = shape(entered=900, said=9, inside={"cached_tokens": 0}, cache_read_input_tokens=800)
    assert usage.cache_read_input_tokens == 800
    usage = shape(entered=900, said=9, inside={"cached_tokens": 800}, cached_tokens=None)
    assert usage.cache_read_input_tokens == 800


@pytest.mark.parametrize("reader", [ChatCompletions, Responses, Media])
def test_names_of_either_dialect_are_read_on_either_route(reader: type[Reader]) -> None:
    assert counts(read(reader, {"input_tokens": 52, "output_tokens": 6})) == (52, 6, 58)
    assert counts(read(reader, {"prompt_tokens": 52, "completion_tokens": 6})) == (52, 6, 58)
    both = {"prompt_tokens": 52, "completion_tokens": 6, "total_tokens": 58, "input_tokens": 0, "output_tokens": 0}
    assert counts(read(reader, both)) == (52, 6, 58)
    other = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "input_tokens": 52, "output_tokens": 6}
    assert counts(read(reader, other)) == (52, 6, 58)


@pytest.mark.parametrize(
    "used",
    [
        {"promptTokens": 52, "completionTokens": 6},
        {"inputTokens": 52, "outputTokens": 6, "totalTokens": 58},
        {"promptTokenCount": 52, "candidatesTokenCount": 6, "totalTokenCount": 58},
        {"prompt_token_count": 52, "generation_token_count": 6},
        {"prompt_eval_count": 52, "eval_count": 6},
        {"promptTokenCount": 52, "candidatesTokenCount": 2, "thoughtsTokenCount": 4, "totalTokenCount": 58},
        {"inputTokens": 2, "cacheReadInputTokens": 50, "outputTokens": 6},
    ],
)
@pytest.mark.parametrize("reader", [ChatCompletions, Responses, Media, Messages])
def test_the_names_of_other_families_are_better_than_none(reader: type[Reader], used: Document) -> None:
    assert counts(read(reader, used)) == (52, 6, 58)


def test_anthropics_own_object_on_another_route_keeps_its_meaning() -> None:
    used = {"input_tokens": 5000, "output_tokens": 33, "cache_read_input_tokens": 900}
    assert counts(read(ChatCompletions, used)) == (5900, 33, 5933)
    assert counts(read(ChatCompletions, used | {"total_tokens": 5033})) == (5000, 33, 5033), "the total decides"
    assert counts(read(ChatCompletions, used | {"total_tokens": 5933})) == (5900, 33, 5933)
    named = {"prompt_tokens": 5000, "completion_tokens": 33, "cache_read_input_tokens": 900}
    assert counts(read(ChatCompletions, named)) == (5000, 33, 5033), "OpenAI's input holds what the cache read"


def test_anthropics_cache_counts_stand_beside_the_input() -> None:
    used = {"input_tokens": 11, "output_tokens": 33, "cache_read_input_tokens": 9216}
    split = {"cache_creation": {"ephemeral_5m_input_tokens": 500, "ephemeral_1h_input_tokens": 12}}
    usage = read(Messages, used | {"cache_creation_input_tokens": 512} | split)
    assert (*counts(usage), usage.cache_write_5m_input_tokens) == (9739, 33, 9772, 500)
    assert counts(read(Messages, used | split)) == (9739, 33, 9772), "the split alone tells the sum"


# Zeros.


@pytest.mark.parametrize(
    ("first", "later", "merged"),
    [
        ({"a": 5}, {"a": 0}, {"a": 5}),
        ({"a": 5}, {"a": 0.0}, {"a": 5}),
        ({"a": "5"}, {"a": "0"}, {"a": "5"}),
        ({"a": 0}, {"a": 5}, {"a": 5}),
        ({"a": 5}, {"a": 3}, {"a": 3}),
        ({"a": 0.5}, {"a": 0}, {"a": 0.5}),
        ({"d": {"a": 5, "b": 1}}, {"d": {"a": 0, "b": 2}}, {"d": {"a": 5, "b": 2}}),
        ({"a": 5}, {"a": {}}, {"a": 5}),
        ({"a": 5}, {"a": []}, {"a": 5}),
        ({"l": [{"n": 5}]}, {"l": []}, {"l": [{"n": 5}]}),
        ({"l": [{"n": 5}]}, {"l": [{"n": 0}]}, {"l": [{"n": 5}]}),
        ({"l": [{"n": 5}]}, {"l": [{"n": 4}, {"n": 3}]}, {"l": [{"n": 4}, {"n": 3}]}),
        ({"a": 0}, {"a": 0}, {"a": 0}),
        ({"t": "flex"}, {"t": ""}, {"t": ""}),
    ],
)
def test_a_running_total_never_falls_to_zero(first: Document, later: Document, merged: Document) -> None:
    assert overlay(first, later) == merged


def test_zeros_erase_nothing_in_any_shape() -> None:
    chat = {
        "prompt_tokens": 71,
        "completion_tokens": 36,
        "total_tokens": 107,
        "cost": 0.5,
        "prompt_tokens_details": {"cached_tokens": 64},
    }
    zeros = {
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "total_tokens": 0,
        "cost": 0,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    usage = read(ChatCompletions, zeros, chat, zeros)
    assert (*counts(usage), usage.cache_read_input_tokens, usage.cost_usd) == (71, 36, 107, 64, "0.5")
    gemini = {
        "promptTokenCount": 85,
        "totalTokenCount": 134,
        "candidatesTokenCount": 49,
        "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 85}],
    }
    none = {"promptTokenCount": 0, "totalTokenCount": 0, "promptTokensDetails": []}
    usage = read(Gemini, gemini, none)
    assert (*counts(usage), usage.text_input_tokens) == (85, 49, 134, 85)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_the_last_count_above_zero_is_the_one(numbers: list[int]) -> None:
    usage = read(ChatCompletions, *({"prompt_tokens": number} for number in numbers))
    assert usage.input_tokens == next((number for number in reversed(numbers) if number), 0)


def test_a_modality_that_stands_there_twice_is_added_up() -> None:
    details = [{"modality": "TEXT", "tokenCount": 40}, {"modality": "TEXT", "tokenCount": 45}]
    for key in ("promptTokensDetails", "promptTokenDetails"):
        assert read(Gemini, {"promptTokenCount": 85, key: details}).text_input_tokens == 85
    spoken = [{"modality": "AUDIO", "tokenCount": 1}, {"modality": "AUDIO", "tokenCount": 2}]
    live = {"promptTokenCount": 1, "responseTokenCount": 3, "responseTokensDetails": spoken}
    assert read(Gemini, live).audio_output_tokens == 3


# What a call cost.


@pytest.mark.parametrize(
    ("stated", "cost", "provider"),
    [
        ({"cost": 9.17e-06}, "0.00000917", None),
        ({"cost": "0.0031"}, "0.0031", None),
        ({"cost": 0}, "0", None),
        ({"estimated_cost": 1.937e-05}, "0.00001937", None),
        ({"total_cost": 0.25}, "0.25", None),
        ({"cost_in_usd_ticks": 233017000}, "0.0233017", "x_ai"),
        ({"cost_in_usd_ticks": 1}, "0.0000000001", "x_ai"),
        ({"cost": {"request_cost": 0.005, "total_cost": 0.005092}}, "0.005092", "perplexity"),
        ({"cost": {"currency": "USD", "total_cost": 0.02}}, "0.02", "perplexity"),
        ({"cost": {"currency": "EUR", "total_cost": 0.02}}, None, "perplexity"),
        ({"cost": 0.000177, "is_byok": False, "cost_details": {"upstream_inference_cost": None}}, "0.000177",
         "openrouter"),
        ({"cost": 0.1, "is_byok": False, "cost_details": {"upstream_inference_cost": 0.1}}, "0.1", "openrouter"),
        ({"cost": 0.1, "is_byok": True, "cost_details": {"upstream_inference_cost": 0.2}}, "0.3", "openrouter"),
        ({"cost": None, "cost_details": {"upstream_inference_cost": 0.2}}, "0.2", None),
        ({"cost_details": {"total_cost": 0.7}}, "0.7", None),
        ({"cost": -1}, None, None),
        ({"cost": "dear"}, None, None),
        ({"cost": True}, None, None),
    ],
)  # fmt: skip
def test_a_stated_cost_is_read_in_every_shape(
    shape: Shape, stated: Document, cost: str | None, provider: str | None
) -> None:
    usage = shape(entered=311, said=41, total=352, **stated)
    assert (usage.cost_usd, usage.provider, *counts(usage)) == (cost, provider, 311, 41, 352)
    assert read(Messages, {"input_tokens": 3, "output_tokens": 4, **stated}).cost_usd == cost
    assert read(Embeddings, {"prompt_tokens": 3, "total_tokens": 3, **stated}).cost_usd == cost
    if cost is not None:
        assert read(Media, stated).usage_state == "final", "a picture has a price and no tokens"


def test_money_is_never_rounded() -> None:
    digits = "1234567890.12345678901234567890123456789"
    assert decimal_text(digits) == digits
    assert decimal_text("123456789012345678901234567890", exponent=-20) == "1234567890.1234567890123456789"
    assert decimal_text(10**40) is None
    fee, behind = "0.1000000000000000000000000001", "999999999999.9"
    usage = read(ChatCompletions, {"cost": fee, "is_byok": True, "cost_details": {"upstream_inference_cost": behind}})
    assert usage.cost_usd is not None
    assert usage.cost_usd == "1000000000000.0000000000000000000000000001"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([
    *CHAT, *TYPED, "total_tokens", "cached_tokens", "cache_creation", "cache_creation_input_tokens", "cost",
    "cost_in_usd_ticks", "cost_details", "is_byok", "reasoning_tokens", "prompt_audio_seconds", "type", "seconds",
    "cache_read_input_tokens", "audio_tokens", "upstream_inference_cost", "ephemeral_5m_input_tokens", "iterations",
])  # fmt: skip


@given(
    used=st.dictionaries(NAMES, ANY | st.dictionaries(NAMES, ANY, max_size=4), max_size=8),
    reader=st.sampled_from([ChatCompletions, Embeddings, Responses, Media, Messages]),
)
def test_whatever_stands_there_the_sum_is_right_and_nothing_is_raised(used: Document, reader: type[Reader]) -> None:
    one = reader(lambda kind: None)
    one.report(used)
    usage = build(one, streamed=False, ended=True)
    orjson.dumps(usage.cost_usd)
    if usage.input_tokens is not None and usage.output_tokens is not None:
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    if usage.cost_usd is not None:
        assert Decimal(usage.cost_usd) >= 0
