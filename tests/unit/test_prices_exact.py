"""A cost is exact only where everything that was consumed has its price; else it is an estimate that says why."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from sidecar.meters.properties import PROVIDER_UNITS
from sidecar.model.exchange import Usage, UsageState
from sidecar.model.record import usage_to_dict
from sidecar.prices import PriceBook
from sidecar.prices.facts import BILLED
from sidecar.prices.table import builtin

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


@pytest.mark.parametrize("unit", sorted(BILLED))
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
