"""What a call costs: each way in which others got it wrong, and that sums are exact."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.exchange import Usage, UsageState
from sidecar.model.record import usage_to_dict
from sidecar.prices import PICO, PriceBook, Priced, amount_text
from sidecar.prices.book import KEPT_MAX
from sidecar.prices.facts import counts_of
from sidecar.prices.litellm import from_litellm
from sidecar.prices.rates import Rates, amount_of, pico
from sidecar.prices.table import Table, TableError, builtin, prices_at, read

NOW_S = datetime(2026, 11, 20, 12, 0, tzinfo=UTC).timestamp()
TABLE = builtin()


@pytest.fixture
def book() -> PriceBook:
    return PriceBook(TABLE)


def usage(provider: str | None, model: str | None, **more: Any) -> Usage:
    return Usage(**{"usage_state": UsageState.FINAL, "provider": provider, "model": model, **more})


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def total(priced: Priced) -> str | None:
    cost, amount = priced
    assert cost is not None
    assert cost["total"] == (None if amount is None else amount_text(amount))
    if amount is not None and cost["parts"]:
        assert sum(Fraction(part) for part in cost["parts"].values()) == Fraction(cost["total"])
    found: str | None = cost["total"]
    return found


def state(priced: Priced) -> tuple[str, str | None]:
    assert priced[0] is not None
    return priced[0]["state"], priced[0].get("reason")


def test_a_cost_as_the_record_has_it(book: PriceBook) -> None:
    call = usage("openai", "gpt-5-2025-08-07", input_tokens=1000, output_tokens=200, cache_read_input_tokens=300)
    assert book.cost(call, NOW_S) == (
        {
            "currency": "USD",
            "total": "0.0029125",
            "parts": {"input": "0.000875", "output": "0.002", "cache_read": "0.0000375"},
            "state": "exact",
            "source": TABLE.source,
            "model": "gpt-5",
        },
        2_912_500_000,
    )


def test_the_usage_of_a_stored_record_costs_the_same(book: PriceBook) -> None:
    call = usage("openai", "gpt-5", input_tokens=1000, output_tokens=200, units={"web_search_requests": 2})
    assert book.cost(usage_to_dict(call), NOW_S) == book.cost(call, NOW_S)
    with pytest.raises(ValueError, match="not a record's usage"):
        book.cost({"model": "gpt-5"}, NOW_S)


def test_a_call_of_no_model_has_no_cost(book: PriceBook) -> None:
    assert book.cost(None, NOW_S) == (None, None)


# What is not known


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (usage("openai", "gpt-5-mini-2099-01-01", input_tokens=1, output_tokens=1), "unknown_model"),
        (usage("ollama", "deepseek-chat", input_tokens=1, output_tokens=1), "unknown_provider"),
        (usage(None, "my-own-model", input_tokens=1, output_tokens=1), "unknown_provider"),
        (usage("openai", None, input_tokens=1, output_tokens=1), "no_model"),
        (usage("openai", "gpt-5", usage_state=UsageState.ABSENT), "no_usage"),
        (usage("openai", "gpt-5", units={"images": 2}), "nothing_counted"),
    ],
)
def test_unknown_is_null_and_never_zero(book: PriceBook, call: Usage, reason: str) -> None:
    cost, amount = book.cost(call, NOW_S)
    assert cost is not None
    assert (cost["total"], cost["parts"], cost["currency"], amount) == (None, None, None, None)
    assert state((cost, amount)) == ("unpriced", reason)


def test_without_a_table_everything_is_unpriced() -> None:
    assert state(PriceBook(None).cost(usage("openai", "gpt-5", input_tokens=1), NOW_S)) == ("unpriced", "no_table")


def test_a_model_that_is_free_costs_zero_and_says_so(book: PriceBook) -> None:
    priced = book.cost(usage("azure.ai.openai", "phi-4-reasoning:free", input_tokens=5, output_tokens=5), NOW_S)
    assert (total(priced), state(priced)) == ("0", ("exact", None))


def test_a_model_that_the_table_has_no_price_for_is_not_free(book: PriceBook) -> None:
    call = usage("cerebras", "qwen-3-coder-480b", input_tokens=5, output_tokens=5)
    assert state(book.cost(call, NOW_S)) == ("unpriced", "no_price")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("claude-sonnet-4-5", ("exact", None)),
        ("claude-sonnet-4-5-20250929", ("exact", None)),
        ("Claude-Sonnet-4-5", ("exact", None)),
        ("claude-sonnet-4-5-fancy", ("estimated", "near_match")),
        ("claude-sonnet-4-50", ("estimated", "near_match")),
    ],
)
def test_a_name_that_only_looks_like_a_known_one_is_an_estimate(
    book: PriceBook, name: str, expected: tuple[str, str | None]
) -> None:
    priced = book.cost(usage("anthropic", name, input_tokens=1_000_000, output_tokens=0), at("2026-01-01"))
    assert state(priced) == expected
    assert total(priced) == "6"  # a million is above the tier


@pytest.mark.parametrize(
    ("provider", "name", "near"),
    [
        ("anthropic", "claude-sonnet-4-20250514", False),
        ("anthropic", "claude-3-5-haiku-20241022", False),
        ("anthropic", "claude-opus-4-1-20250805", False),
        ("anthropic", "claude-opus-4-5-7", True),
        ("anthropic", "claude-opus-4-57", True),
        ("google", "gemini-2.5-pro-preview-05-06", False),
        ("google", "gemini-2.0-flash-001", False),
        ("google", "claude-sonnet-4-5@20250929", False),
        ("aws", "us.amazon.nova-pro-v1:0", False),
        ("aws", "amazon.nova-pro-v2:0", True),
        ("aws", "global.amazon.nova-pro-v1:0", True),
        ("aws", "my-amazon.nova-pro-v1:0", True),
        ("openai", "gpt-4o-2024-08-06", False),
        ("openai", "gpt-5.2-20251211", False),
    ],
)
def test_what_stands_around_a_name_may_make_another_model_of_it(provider: str, name: str, near: bool) -> None:
    found = TABLE.find(TABLE.providers[provider], name)
    assert found is not None
    assert found.near is near


def test_no_name_of_the_table_itself_is_near() -> None:
    for provider in TABLE.providers.values():
        for model in provider.models:
            found = TABLE.find(provider, model["id"])
            assert found is None or found.name != model["id"] or not found.near, model["id"]


def test_a_fine_tuned_model_has_its_own_price(book: PriceBook) -> None:
    call = usage("openai", "ft:gpt-4o-mini-2024-07-18:acme::abc", input_tokens=1_000_000, output_tokens=0)
    priced = book.cost(call, NOW_S)
    assert (total(priced), state(priced)) == ("0.3", ("exact", None))


def test_vendor_and_model_through_a_gateway_is_an_estimate_and_not_zero(book: PriceBook) -> None:
    call = usage(None, "anthropic/claude-sonnet-4-5", input_tokens=1000, output_tokens=0)
    assert (total(book.cost(call, NOW_S)), state(book.cost(call, NOW_S))) == ("0.003", ("estimated", "gateway"))
    bare = usage(None, "gpt-5", input_tokens=1000, output_tokens=0)
    assert state(book.cost(bare, NOW_S)) == ("estimated", "provider_guessed")
    # One that has prices of its own is asked for them.
    own = usage("openrouter", "anthropic/claude-sonnet-4.5", input_tokens=1000, output_tokens=0)
    assert state(book.cost(own, NOW_S)) == ("exact", None)


def test_the_host_that_was_asked_says_whose_price_it_is(book: PriceBook) -> None:
    call = usage(None, "gpt-5", input_tokens=1000, output_tokens=0)
    assert state(book.cost(call, NOW_S, host="api.openai.com")) == ("exact", None)


def test_the_model_of_the_request_is_second_best(book: PriceBook) -> None:
    call = usage("openai", "internal-7", request_model="gpt-5", input_tokens=1000, output_tokens=0)
    assert state(book.cost(call, NOW_S)) == ("estimated", "other_name")
    azure = usage(
        "azure.ai.openai", "gpt-5-2025-08-07", request_model="our-deployment", input_tokens=9, output_tokens=9
    )
    assert state(book.cost(azure, NOW_S)) == ("exact", None)


def test_what_is_only_a_lower_bound_is_an_estimate(book: PriceBook) -> None:
    for word in (UsageState.PARTIAL, UsageState.ESTIMATED):
        call = usage("openai", "gpt-5", usage_state=word, input_tokens=1000, output_tokens=1)
        assert state(book.cost(call, NOW_S)) == ("estimated", f"{word}_usage")


# Tokens are priced once


def test_an_output_whose_input_is_not_known_is_an_estimate(book: PriceBook) -> None:
    cost = book.cost(usage("openai", "gpt-5", output_tokens=10), NOW_S)
    assert (total(cost), state(cost)) == ("0.0001", ("estimated", "partial_usage"))
    nothing_said = book.cost(usage("gcp.gemini", "gemini-2.5-pro", input_tokens=10), NOW_S)  # Gemini leaves zeros out
    assert state(nothing_said) == ("exact", None)
    of_no_text = book.cost(usage("openai", "whisper-1", units={"audio_seconds": 10}), NOW_S)
    assert state(of_no_text) == ("exact", None)


def test_cached_tokens_cost_the_cache_s_price_and_not_the_input_s_too(book: PriceBook) -> None:
    call = usage("openai", "gpt-5", input_tokens=1_000_000, output_tokens=0, cache_read_input_tokens=1_000_000)
    assert total(book.cost(call, NOW_S)) == "0.125"


def test_reasoning_is_inside_the_output(book: PriceBook) -> None:
    call = usage("openai", "gpt-5", input_tokens=0, output_tokens=1_000_000, reasoning_output_tokens=900_000)
    assert total(book.cost(call, NOW_S)) == "10"


def test_cache_writes_are_split_off_the_input_and_not_added(book: PriceBook) -> None:
    call = usage(
        "anthropic", "claude-opus-5", input_tokens=1_000_000, output_tokens=0, cache_write_input_tokens=400_000
    )
    priced = book.cost(call, NOW_S)
    assert priced[0] is not None
    assert priced[0]["parts"] == {"input": "3", "cache_write": "2.5"}


def test_cache_writes_cost_by_their_life(book: PriceBook) -> None:
    call = usage(
        "anthropic",
        "claude-opus-5",
        input_tokens=1_000_000,
        output_tokens=0,
        cache_write_input_tokens=1_000_000,
        cache_write_5m_input_tokens=600_000,
        cache_write_1h_input_tokens=400_000,
    )
    priced = book.cost(call, NOW_S)
    assert priced[0] is not None
    assert priced[0]["parts"] == {"cache_write_5m": "3.75", "cache_write_1h": "4"}
    assert total(priced) == "7.75"


def test_an_hour_s_cache_write_without_its_own_price_is_an_estimate() -> None:
    table = read(
        b'[{"id":"p","api_pattern":"https://p","models":[{"id":"m","match":{"equals":"m"},'
        b'"prices":{"input_mtok":1,"output_mtok":2,"cache_write_mtok":1.25}}]}]',
        "t",
    )
    call = usage("p", "m", input_tokens=100, output_tokens=0, cache_write_input_tokens=9, cache_write_1h_input_tokens=9)
    assert state(PriceBook(table).cost(call, NOW_S)) == ("estimated", "cache_write_life")


def test_audio_that_was_cached_is_priced_once(book: PriceBook) -> None:
    """Read from the vendor's own object, where it is told; else it is an estimate."""
    model = "gpt-realtime"
    facts: dict[str, Any] = {
        "input_tokens": 1000,
        "output_tokens": 0,
        "audio_input_tokens": 600,
        "cache_read_input_tokens": 500,
    }
    raw = {"input_token_details": {"cached_tokens_details": {"audio_tokens": 400, "text_tokens": 100}}}
    told = usage("openai", model, **facts, raw_usage=raw)
    prices, _ = prices_at(TABLE.find(TABLE.providers["openai"], model).model, "2026-11-20", 0.0, {})  # type: ignore[union-attr]
    audio, cached_audio = prices["input_audio_tokens"][0], prices["cache_audio_read_tokens"][0]
    text, cached = prices["input_tokens"][0], prices["cache_read_tokens"][0]
    exact = 200 * audio + 400 * cached_audio + 300 * text + 100 * cached
    assert book.cost(told, NOW_S)[1] == exact
    assert state(book.cost(told, NOW_S)) == ("exact", None)
    assert state(book.cost(usage("openai", model, **facts), NOW_S)) == ("estimated", "counts_disagree")


def test_more_cached_than_there_was_input_is_an_estimate_and_never_negative(book: PriceBook) -> None:
    call = usage("openai", "gpt-5", input_tokens=10, output_tokens=0, cache_read_input_tokens=20)
    priced = book.cost(call, NOW_S)
    assert state(priced) == ("estimated", "counts_disagree")
    assert priced[1] == 20 * 125_000


def test_tools_have_their_price_and_what_has_none_is_said(book: PriceBook) -> None:
    call = usage("anthropic", "claude-opus-5", input_tokens=0, output_tokens=0, units={"web_search_requests": 3})
    assert total(book.cost(call, NOW_S)) == "0.03"
    none = usage("deepseek", "deepseek-chat", input_tokens=9, output_tokens=9, units={"web_search_requests": 3})
    assert state(book.cost(none, NOW_S)) == ("estimated", "unpriced_unit")


def test_seconds_of_audio_may_have_a_fraction(book: PriceBook) -> None:
    call = usage("groq", "whisper-large-v3", operation="transcription", units={"audio_seconds": 12.5})
    per_hour = Fraction(str(TABLE.find(TABLE.providers["groq"], "whisper-large-v3").model["prices"]["audio_hours"]))  # type: ignore[union-attr]
    assert book.cost(call, NOW_S)[1] == round(per_hour * PICO * Fraction("12.5") / 3600)
    least = replace(call, units={"audio_seconds": 2})
    assert book.cost(least, NOW_S)[1] == round(per_hour * PICO * 10 / 3600)  # billed as ten seconds


# Tiers


@pytest.mark.parametrize(("tokens", "dollars"), [(199_999, "0.24999875"), (200_000, "0.25"), (200_001, "0.5000025")])
def test_a_tier_holds_for_the_whole_request(book: PriceBook, tokens: int, dollars: str) -> None:
    call = usage("gcp.gemini", "gemini-2.5-pro", input_tokens=tokens, output_tokens=0)
    assert total(book.cost(call, NOW_S)) == dollars


def test_a_tier_is_chosen_by_all_input_and_is_the_cache_s_and_the_output_s_too(book: PriceBook) -> None:
    call = usage(
        "anthropic",
        "claude-sonnet-4-5",
        input_tokens=1_000_000,
        output_tokens=1000,
        cache_read_input_tokens=200_000,
        cache_write_input_tokens=300_000,
    )
    assert total(book.cost(call, NOW_S)) == "5.3925"


def test_each_record_has_its_own_tier_and_then_they_are_added_up(book: PriceBook) -> None:
    one = usage("gcp.gemini", "gemini-2.5-pro", input_tokens=150_000, output_tokens=0)
    both = usage("gcp.gemini", "gemini-2.5-pro", input_tokens=300_000, output_tokens=0)
    assert 2 * (book.cost(one, NOW_S)[1] or 0) == PICO * 3 // 8
    assert book.cost(both, NOW_S)[1] == PICO * 3 // 4


# Terms: batch, tiers of service, speed, region


@pytest.mark.parametrize(
    ("tier", "dollars", "expected"),
    [
        (None, "1.25", ("exact", None)),
        ("default", "1.25", ("exact", None)),
        ("flex", "0.625", ("exact", None)),
        ("priority", "2.5", ("exact", None)),
        ("Priority", "2.5", ("exact", None)),
        ("batch", "0.625", ("exact", None)),
        ("scale", "1.25", ("estimated", "tier")),
        ("auto", "1.25", ("estimated", "tier")),
    ],
)
def test_the_tier_that_served_the_call(
    book: PriceBook, tier: str | None, dollars: str, expected: tuple[str, str | None]
) -> None:
    call = usage("openai", "gpt-5", input_tokens=1_000_000, output_tokens=0, service_tier=tier)
    priced = book.cost(call, NOW_S)
    assert (total(priced), state(priced)) == (dollars, expected)


def test_a_batch_s_results_cost_what_a_batch_costs(book: PriceBook) -> None:
    call = usage("openai", "gpt-5", input_tokens=1_000_000, output_tokens=0)
    assert total(book.cost(call, NOW_S, batch=True)) == "0.625"
    assert total(book.cost(call, NOW_S)) == "1.25"
    other = usage("deepseek", "deepseek-chat", input_tokens=1000, output_tokens=0)
    assert state(book.cost(other, NOW_S, batch=True)) == ("estimated", "tier")


def test_speed_and_region_are_read_from_the_vendor_s_own_usage(book: PriceBook) -> None:
    fast = next(
        m
        for m in TABLE.providers["anthropic"].models
        if any(v["when"] == {"speed": "fast"} for v in m.get("price_variants", ()))
    )
    plain = usage("anthropic", fast["id"], input_tokens=1_000_000, output_tokens=0, raw_usage={"speed": "standard"})
    quick = replace(plain, raw_usage={"speed": "fast"})
    assert state(book.cost(plain, NOW_S)) == state(book.cost(quick, NOW_S)) == ("exact", None)
    assert (book.cost(quick, NOW_S)[1] or 0) > (book.cost(plain, NOW_S)[1] or 0)
    for geo, expected in (("us", ("estimated", "region")), ("global", ("exact", None)), (None, ("exact", None))):
        assert state(book.cost(replace(plain, raw_usage={"inference_geo": geo}), NOW_S)) == expected
    # A vendor that lies about the type of it changes nothing.
    assert book.cost(replace(plain, raw_usage={"speed": ["fast"]}), NOW_S) == book.cost(plain, NOW_S)


@pytest.mark.parametrize(
    ("asked", "dollars", "expected"),
    [
        ("anthropic.claude-sonnet-4-5-20250929-v1:0", "3.3", ("exact", None)),
        ("us.anthropic.claude-sonnet-4-5-20250929-v1:0", "3.3", ("exact", None)),
        ("global.anthropic.claude-sonnet-4-5-20250929-v1:0", "3", ("exact", None)),
        ("arn:aws:bedrock:us-east-1::inference-profile/global.anthropic.claude-sonnet-4-5-20250929-v1:0", "3",
         ("exact", None)),
        ("us-gov.anthropic.claude-sonnet-4-5-20250929-v1:0", "3.3", ("estimated", "region")),
    ],
)  # fmt: skip
def test_on_bedrock_the_address_says_the_region(
    book: PriceBook, asked: str, dollars: str, expected: tuple[str, str | None]
) -> None:
    call = usage("aws.bedrock", "claude-sonnet-4-5-20250929", request_model=asked, input_tokens=10**6, output_tokens=0)
    priced = book.cost(call, NOW_S)
    assert (total(priced), state(priced)) == (dollars, expected)


# Time


def test_a_price_is_that_of_the_day_of_the_call(book: PriceBook) -> None:
    call = usage("openai", "o3", input_tokens=1_000_000, output_tokens=0)
    assert total(book.cost(call, at("2025-06-01"))) == "10"
    assert total(book.cost(call, at("2026-06-01"))) == "2"
    assert total(book.cost(call, at("2025-06-01"))) == "10"


def test_and_that_of_the_hour(book: PriceBook) -> None:
    call = usage("deepseek", "deepseek-chat", input_tokens=1_000_000, output_tokens=0)
    by_minute = {"00:29": "0.135", "00:30": "0.27", "16:29": "0.27", "16:30": "0.135", "23:59": "0.135"}
    for minute, dollars in by_minute.items():
        assert total(book.cost(call, at(f"2026-11-20T{minute}:30"))) == dollars, minute


# What the provider says itself


def test_a_stated_cost_stands_beside_ours_and_goes_before_a_guess(book: PriceBook) -> None:
    known = usage("openai", "gpt-5", input_tokens=1000, output_tokens=0, cost_usd="0.0020")
    cost, amount = book.cost(known, NOW_S)
    assert cost is not None
    assert (cost["total"], cost["declared"], cost["state"], amount) == ("0.00125", "0.002", "exact", 1_250_000_000)
    unknown = usage("exa", None, cost_usd="0.005")
    cost, amount = book.cost(unknown, NOW_S)
    assert cost is not None
    assert (cost["total"], cost["declared"], cost["state"], amount) == ("0.005", "0.005", "declared", 5_000_000_000)
    first = PriceBook(TABLE, declared_first=True).cost(known, NOW_S)
    assert (total(first), state(first)) == ("0.002", ("declared", None))


@pytest.mark.parametrize("said", ["", "-1", "NaN", "1e400", "free"])
def test_a_stated_cost_that_is_none_is_no_cost(book: PriceBook, said: str) -> None:
    assert state(book.cost(usage("exa", None, cost_usd=said), NOW_S))[0] == "unpriced"


# Sums


counts = st.integers(0, 3_000_000)


@given(
    counts, counts, counts, counts, counts, st.sampled_from(["claude-sonnet-4-5", "claude-haiku-4-5", "claude-opus-5"])
)
def test_the_short_way_gives_what_the_long_way_does(a: int, b: int, c: int, d: int, e: int, model: str) -> None:
    call = usage(
        "anthropic",
        model,
        input_tokens=a + b + c + d,
        output_tokens=e,
        cache_read_input_tokens=b or None,
        cache_write_input_tokens=c + d,
        cache_write_5m_input_tokens=c,
        cache_write_1h_input_tokens=d,
    )
    book = PriceBook(TABLE)
    short = book.cost(call, NOW_S)
    entry = next(iter(book._kept.values()))
    assert book.cost(usage_to_dict(call), NOW_S) == short
    assert book._long(entry=entry, usage=call, started_s=NOW_S, record=None, side="provider") == short  # type: ignore[arg-type]


@given(
    st.integers(0, 3_000_000), st.integers(0, 3_000_000), st.integers(0, 300_000),
    st.sampled_from([None, 0, 5]), st.sampled_from([None, "default", "priority", "scale"]),
    st.sampled_from([NOW_S, NOW_S + 86_400, NOW_S - 86_400]), st.sampled_from([None, {"speed": "fast"}, {"x": 1}]),
    st.sampled_from([
        ("openai", "gpt-5"), ("anthropic", "claude-opus-5"), ("deepseek", "deepseek-chat"), ("openai", "none"),
        ("gcp.gemini", "gemini-2.5-pro"), ("anthropic", "claude-opus-5-fancy"),
    ]),
)  # fmt: skip
def test_a_pricer_writes_what_the_book_says(
    read: int,
    hit: int,
    written: int,
    kept: int | None,
    tier: str | None,
    started_s: float,
    raw: Any,
    who: tuple[str, str],
) -> None:
    facts: dict[str, Any] = {"input_tokens": read + hit + (kept or 0), "output_tokens": written}
    first = usage(*who, **facts)
    call = usage(
        *who, **facts, cache_read_input_tokens=hit, cache_write_input_tokens=kept, service_tier=tier, raw_usage=raw
    )
    book = PriceBook(TABLE)
    pricer = book.pricer(usage_to_dict(first))
    for each in (first, call, first):
        line, amount = pricer.json(usage_to_dict(each), started_s)
        assert (json.loads(line), amount) == book.cost(each, started_s)


COUNTED = ("input_tokens", "output_tokens", "total_tokens", "cache_read_input_tokens", "audio_input_tokens")


SIZES = st.tuples(st.integers(0, 3_000_000), st.integers(0, 3_000_000), st.integers(0, 9), st.booleans())


@given(
    st.lists(SIZES, min_size=1),
    st.sampled_from([COUNTED[:3], COUNTED[:4], COUNTED, (*COUNTED[:3], "cache_write_input_tokens")]),
    st.sampled_from([None, "priority"]),
    st.sampled_from([("openai", "gpt-5"), ("anthropic", "claude-opus-5"), ("deepseek", "deepseek-chat")]),
)
def test_a_pricer_that_is_told_the_counts_alone_says_the_same_or_nothing(
    calls: list[tuple[int, int, int, bool]], names: tuple[str, ...], tier: str | None, who: tuple[str, str]
) -> None:
    """In one pricer, one after the other, calls with other counts in their usage and of another day."""
    book, pricer = PriceBook(TABLE), None
    for entered, written, hit, odd in calls:
        told = names[: len(names) - odd]
        counts = (entered + hit, written, entered + hit + written, hit, 0)[: len(told)]
        members: dict[str, Any] = dict(zip(told, counts, strict=True))
        call = usage(*who, **members, service_tier=tier)
        pricer = pricer or book.pricer(usage_to_dict(call))
        at_s = NOW_S + 86_400 * odd
        for _ in range(2):
            short = pricer.of_counts(told, counts, at_s)
            assert short is None or (json.loads(short[0]), short[1]) == book.cost(call, at_s)
            pricer.json(usage_to_dict(call), at_s)  # which looks up what holds then


def test_most_calls_are_priced_by_their_counts_alone() -> None:
    call = usage("openai", "gpt-5", input_tokens=50, output_tokens=7, total_tokens=57, cache_read_input_tokens=9)
    book = PriceBook(TABLE)
    pricer = book.pricer(usage_to_dict(call))
    names, counts = COUNTED, (50, 7, 57, 9, 0)
    assert pricer.of_counts(names, counts, NOW_S) is None  # nobody has looked what holds on that day
    pricer.json(usage_to_dict(call), NOW_S)
    short = pricer.of_counts(names, counts, NOW_S)
    assert short is not None
    assert (json.loads(short[0]), short[1]) == book.cost(call, NOW_S)
    assert pricer.of_counts(names, (50, 7, 57, 9, 1), NOW_S) is None  # audio has a price of its own
    assert pricer.of_counts(names, counts, NOW_S + 400 * 86_400) is None


@given(st.dictionaries(st.sampled_from(["input_tokens", "output_tokens"]), counts, min_size=1))
def test_parts_add_up_to_a_total_that_is_rounded_once(said: dict[str, int]) -> None:
    odd = {name: (pico("0.08333333333333333", 1_000_000), ()) for name in ("input_tokens", "output_tokens")}
    found = Rates(odd).sum(said)
    exact = sum(Fraction(count) * odd[name][0] for name, count in said.items())
    assert found.total == round(exact)
    assert sum(found.parts.values()) == found.total
    assert all(abs(found.parts.get(n.removesuffix("_tokens"), 0) - c * odd[n][0]) <= 1 for n, c in said.items())


def test_a_day_of_a_million_records_adds_up(book: PriceBook) -> None:
    """A few thousand calls, each as often as it takes: the sum of the totals as text is the sum as fractions."""
    pick = random.Random(7)
    prices, _ = prices_at(TABLE.find(TABLE.providers["openai"], "gpt-5").model, "2026-11-20", 0.0, {})  # type: ignore[union-attr]
    fresh, out, cached = (prices[name][0] for name in ("input_tokens", "output_tokens", "cache_read_tokens"))
    exact, summed, as_text = Fraction(0), 0, Decimal(0)
    for _ in range(2_000):
        read, hit, written = pick.randrange(200_000), pick.randrange(100), pick.randrange(30_000)
        call = usage("openai", "gpt-5", input_tokens=read + hit, output_tokens=written, cache_read_input_tokens=hit)
        cost, amount = book.cost(call, NOW_S)
        assert cost is not None
        assert amount is not None
        exact += (read * fresh + hit * cached + written * out) * 500
        summed += amount * 500
        as_text += Decimal(cost["total"]) * 500
    assert summed == exact
    assert Fraction(as_text) * PICO == exact
    assert summed < 2**63  # and a 64-bit column holds it


def test_how_long_a_response_may_be_is_the_table_s_word_and_where_it_has_none_nobody_s(book: PriceBook) -> None:
    assert book.output_tokens_max("openai", "gpt-4o") == 128_000
    assert book.output_tokens_max("openai", "nobody-knows-it") is None
    assert book.output_tokens_max("nobody", "gpt-4o") is None
    assert book.input_tokens_max("openai", "gpt-4o") == 128_000
    assert book.input_tokens_max("openai", "nobody-knows-it") is None


def test_how_long_a_request_may_be_is_another_word_in_litellm_s_table() -> None:
    fields = {"litellm_provider": "openai", "input_cost_per_token": 1e-6, "max_input_tokens": 9, "max_output_tokens": 4}
    (row,) = from_litellm({"openai/m": fields}, [])
    (model,) = row["models"]
    assert (model["input_tokens_max"], model["output_tokens_max"]) == (9, 4)


def test_amounts_are_plain_text() -> None:
    assert [amount_text(each) for each in (0, 1, PICO // 2, PICO, 12_345 * PICO + 10)] == [
        "0",
        "0.000000000001",
        "0.5",
        "1",
        "12345.00000000001",
    ]


@given(st.integers(0, 10**25))
def test_the_text_of_an_amount_reads_back(amount: int) -> None:
    assert amount_of(amount_text(amount)) == amount
    assert Fraction(amount_text(amount)) * PICO == amount


# The table, and what is remembered


def test_the_table_is_small_and_is_checked() -> None:
    tracemalloc.start()
    table = builtin()
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 8 << 20
    assert sum(len(p.models) for p in table.providers.values()) > 2_000
    whole = (b'{"source":"x","sha256":"' + b"0" * 64 + b'","providers":[]}', b"<html>", b"[1]", b"{}", b'{"a":{}}')
    for data in whole:
        with pytest.raises(TableError, match="somewhere"):
            read(data, "somewhere")


def test_a_table_needs_no_network_and_none_of_the_library_that_it_is_from() -> None:
    program = """
import socket, sys
def refuse(*_, **__): raise AssertionError("a socket was opened")
socket.socket.connect = socket.getaddrinfo = refuse
from sidecar.prices import PriceBook, table_of
cost, _ = PriceBook(table_of("builtin")).cost(
    {"usage_state": "final", "provider": "openai", "model": "gpt-5", "input_tokens": 1000, "output_tokens": 0}, 1.8e9)
assert cost["total"] == "0.00125", cost
assert not {"pydantic", "httpx2", "httpx", "genai_prices"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"input_mtok":-1}', "is no amount"),
        ('{"input_mtok":"many"}', "is no amount"),
        ('{"input_mtok":true}', "is no exact amount"),
        ('{"no_such_price":1}', "is no price that is known"),
        ('{"input_mtok":{"base":1,"tiers":[{"start":-5,"price":1}]}}', "a tier that starts at -5"),
        ("[]", "has no price"),
    ],
)
def test_a_table_with_a_fault_is_refused_by_name(row: str, says: str) -> None:
    data = f'[{{"id":"p","api_pattern":"x","models":[{{"id":"m","match":{{"equals":"m"}},"prices":{row}}}]}}]'
    with pytest.raises(TableError, match=f"p m.*{says}"):
        read(data.encode(), "table")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "has no price of any model"),
        (b'{"providers":[]}', "has no price of any model"),
        (b'{"gpt-5":{"litellm_provider":"openai"}}', "has no price of any model"),
        (b"[1]", "a provider: expected an object, not '1'"),
        (b'[{"id":"p","models":[]}]', "p: 'api_pattern' is missing"),
        (b'[{"id":"p","api_pattern":"(","models":[]}]', "p: a pattern is wrong: missing \\)"),
        (b'{"gpt-5":{"litellm_provider":"openai","input_cost_per_token":NaN}}', "openai gpt-5: nan is no exact amount"),
        (b'{"gpt-5":{"litellm_provider":"openai","input_cost_per_token":"free"}}', "openai gpt-5: free is no amount"),
    ],
)
def test_a_file_that_is_no_table_is_refused_with_a_reason(data: bytes, says: str) -> None:
    with pytest.raises(TableError, match=f"(?s)somewhere: .*{says}"):
        read(data, "somewhere")


def test_amounts_of_litellm_s_file_may_be_texts() -> None:
    book = PriceBook(read(b'{"gpt-5":{"litellm_provider":"openai","input_cost_per_token":"1e-06"}}', "file"))
    assert total(book.cost(usage("openai", "gpt-5", input_tokens=1_000_000, output_tokens=0), NOW_S)) == "1"


def test_numbers_of_a_file_are_read_exactly() -> None:
    data = b'[{"id":"p","api_pattern":"x","models":[{"id":"m","match":{"equals":"m"},"prices":{"input_mtok":0.1}}]}]'
    assert read(data, "t").providers["p"].models[0]["prices"] == {"input_mtok": "0.1"}


LITELLM = b"""{
 "sample_spec": {"litellm_provider": "one of https://docs", "input_cost_per_token": 0},
 "gpt-5-mini": {"litellm_provider": "openai", "mode": "chat", "input_cost_per_token": 2.5e-07,
   "output_cost_per_token": 2e-06, "cache_read_input_token_cost": 2.5e-08, "input_cost_per_token_batches": 1.25e-07,
   "output_cost_per_token_batches": 1e-06, "input_cost_per_token_priority": 4.5e-07},
 "gemini/gemini-2.5-pro": {"litellm_provider": "gemini", "input_cost_per_token": 1.25e-06,
   "input_cost_per_token_above_200k_tokens": 2.5e-06, "output_cost_per_token": 1e-05,
   "output_cost_per_token_above_200k_tokens": 1.5e-05},
 "dall-e-3": {"litellm_provider": "openai", "input_cost_per_pixel": 1e-08}
}"""


def test_litellm_s_file_is_read_too() -> None:
    book = PriceBook(read(LITELLM, "file"))
    million = {"input_tokens": 1_000_000, "output_tokens": 0}
    call = usage("openai", "gpt-5-mini", **million)
    assert total(book.cost(call, NOW_S, host="api.openai.com")) == "0.25"
    assert total(book.cost(call, NOW_S, batch=True)) == "0.125"
    assert total(book.cost(replace(call, service_tier="priority"), NOW_S)) == "0.45"
    assert state(book.cost(replace(call, service_tier="flex"), NOW_S)) == ("estimated", "tier")
    assert total(book.cost(usage("gcp.gemini", "gemini-2.5-pro", **million), NOW_S)) == "2.5"
    assert state(book.cost(usage("openai", "dall-e-3", **million), NOW_S)) == ("unpriced", "unknown_model")
    assert book.source.startswith("litellm/file-")


@pytest.mark.parametrize(
    ("tier", "dollars"), [(None, "1.5225"), ("priority", "3.045"), ("flex", "0.76125"), ("batch", "0.76125")]
)
def test_service_tiers_of_litellm_s_file_have_their_own_prices_for_long_inputs(tier: str | None, dollars: str) -> None:
    """Figures of GPT-5.4 in https://github.com/BerriAI/litellm/blob/main/model_prices_and_context_window.json."""
    names = {"": 1.0, "_priority": 2.0, "_flex": 0.5, "_batches": 0.5}
    fields: dict[str, Any] = {"litellm_provider": "openai", "mode": "chat"}
    for word, factor in names.items():
        fields |= {
            f"input_cost_per_token{word}": 2.5e-06 * factor,
            f"input_cost_per_token_above_272k_tokens{word}": 5e-06 * factor,
            f"output_cost_per_token{word}": 1.5e-05 * factor,
            f"output_cost_per_token_above_272k_tokens{word}": 2.25e-05 * factor,
        }
    book = PriceBook(read(json.dumps({"gpt-5.4": fields}).encode(), "file"))
    call = usage("openai", "gpt-5.4", input_tokens=300_000, output_tokens=1_000, service_tier=tier)
    assert (total(book.cost(call, NOW_S)), state(book.cost(call, NOW_S))) == (dollars, ("exact", None))


def test_a_service_tier_of_litellm_s_file_may_differ_for_long_inputs_alone() -> None:
    fields = {
        "litellm_provider": "openai",
        "input_cost_per_token": "1e-06",
        "input_cost_per_token_above_200k_tokens": "2e-06",
        "input_cost_per_token_above_200k_tokens_priority": "4e-06",
    }
    book = PriceBook(read(json.dumps({"m": fields}).encode(), "file"))
    for tokens, dollars in ((200_000, "0.2"), (400_000, "1.6")):
        call = usage("openai", "m", input_tokens=tokens, output_tokens=0, service_tier="priority")
        assert total(book.cost(call, NOW_S)) == dollars


def test_what_is_remembered_is_bounded(book: PriceBook) -> None:
    for number in range(KEPT_MAX + 10):
        book.cost(usage("openai", f"model-{number}", input_tokens=1, output_tokens=1), NOW_S)
    assert len(book._kept) <= KEPT_MAX


def test_counts_that_are_none_are_left_out() -> None:
    rates = Rates({"input_tokens": (pico("1", 1_000_000), ())})
    found, unsure = counts_of(
        usage("openai", "gpt-5", input_tokens=-1, units={"audio_seconds": "x", "pages": 2}), rates
    )
    assert (found, unsure) == ({"input_document_pages": 2}, "unpriced_unit")


def test_every_table_knows_its_providers() -> None:
    assert isinstance(TABLE, Table)
    for ours, theirs in {"openai": "openai", "aws.bedrock": "aws", "x_ai": "x-ai", "voyage": "voyageai"}.items():
        found = TABLE.by_word(PriceBook.word(ours))
        assert found is not None
        assert found.id == theirs
