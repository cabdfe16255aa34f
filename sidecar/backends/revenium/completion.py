"""What Revenium's completion call wants of a model call: the vendor's own counts, and its closed words.

Records hold inclusive totals. Revenium's packages send the numbers as the vendor's wire has them, and prices
are set on those, so they are rebuilt here: Anthropic and Bedrock count input without what the cache read or
wrote, Google counts output without thoughts. Whose manner it is, the names in the vendor's own object say: Claude
answers in Anthropic's on Vertex and through OpenRouter, and Anthropic itself in OpenAI's where it is asked so.
Nothing else needs this, so it is not in the record.

Costs, where they are sent, take the place of Revenium's own calculation. They are in US dollars, and each is rounded to
ten decimals by itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Final

from sidecar.backends.base import json_number, rounded
from sidecar.meters.hourly import EXACT, read_amount, usd_of
from sidecar.model.exchange import Outcome, Usage, UsageState
from sidecar.model.record import Record
from sidecar.usage.providers.fields import anthropic_names

_WITHOUT_CACHE: Final = ("anthropic", "aws.bedrock")
_OPENAIS_NAMES: Final = {"prompt_tokens", "input_tokens_details"}  # the cache is inside of these
_GOOGLE: Final = "gcp."
_OTHERS_NAMES: Final = {"prompt_tokens", "input_tokens"}  # of models on Vertex that answer in their maker's shape

COST_PLACES: Final = 10
# Which field a part of a cost goes into. What is priced by the call, the search or the second is in none.
_PARTS: Final = (
    ("inputTokenCost", re.compile(r"input(_text|_audio|_image|_video)?(_tool)?")),
    ("outputTokenCost", re.compile(r"output(_text|_audio|_image|_video)?(_reasoning|_citation)?")),
    ("cacheCreationTokenCost", re.compile(r"cache(_text|_audio|_image|_video)?_write(_5m|_1h)?")),
    ("cacheReadTokenCost", re.compile(r"cache(_text|_audio|_image|_video)?_read")),
)

_STOP_REASONS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("stop", "tool_calls", "function_call", "end_turn", "tool_use", "pause_turn", "completed"), "END"),
    **dict.fromkeys(("stop_sequence",), "END_SEQUENCE"),
    **dict.fromkeys(
        ("length", "max_tokens", "model_context_window_exceeded", "max_output_tokens", "incomplete"), "TOKEN_LIMIT"
    ),
    **dict.fromkeys(
        (
            "content_filter", "content_filtered", "guardrail_intervened", "refusal", "safety", "recitation",
            "blocklist", "prohibited_content", "spii", "malformed_function_call", "error", "failed",
        ),
        "ERROR",
    ),
    **dict.fromkeys(("cancelled", "canceled", "abort", "aborted"), "CANCELLED"),
}  # fmt: skip
_OPERATIONS: Final[Mapping[str, str]] = {
    "chat": "CHAT",
    "text_completion": "GENERATE",
    "generate_content": "GENERATE",
    "embeddings": "EMBED",
    "rerank": "RERANK",
    "moderation": "MODERATION",
}


def counts(usage: Usage) -> tuple[int, int, int] | None:
    """Input, output and total as the vendor counts them; None where input or output is not known."""
    read, written = usage.input_tokens, usage.output_tokens
    if type(read) is not int or type(written) is not int:
        return None
    provider = usage.provider or ""
    said = usage.raw_usage if isinstance(usage.raw_usage, dict) else {}
    if not _OPENAIS_NAMES & said.keys() and (provider in _WITHOUT_CACHE or anthropic_names(said)):
        plain = read - (usage.cache_read_input_tokens or 0) - (usage.cache_write_input_tokens or 0)
        plain = max(plain, 0)
        return plain, written, plain + written
    total = usage.total_tokens if type(usage.total_tokens) is int else read + written
    if provider.startswith(_GOOGLE) and not _OTHERS_NAMES & said.keys():
        return (
            _said(said, "promptTokenCount", read),
            _said(said, "candidatesTokenCount", max(written - (usage.reasoning_output_tokens or 0), 0)),
            _said(said, "totalTokenCount", total),
        )
    return read, written, total


def _said(raw: Mapping[str, Any], name: str, otherwise: int) -> int:
    value = raw.get(name)
    return value if type(value) is int and value >= 0 else otherwise


def costs(record: Record) -> dict[str, Any]:
    """The cost fields of a completion; nothing where the cost is not known, or is not in US dollars.

    Without parts (the provider said what the call cost, and no more) there is the total alone: the rest is not zero, it
    is not known.
    """
    total = usd_of(record)
    if total is None:
        return {}
    known: dict[str, Decimal] = {"totalCost": total}
    parts = (record.cost or {}).get("parts")
    if parts or (record.cost is not None and not total):
        known |= dict.fromkeys([field for field, _ in _PARTS], Decimal(0))
    for part, stated in (parts or {}).items():
        amount = read_amount(stated)
        field = next((field for field, names in _PARTS if names.fullmatch(part)), None)
        if field is not None and amount is not None:
            known[field] = EXACT.add(known[field], amount)
    return {field: json_number(rounded(amount, COST_PLACES)) for field, amount in known.items()}


def stop_reason(record: Record) -> str:
    """How the answer ended first, then why the model stopped; a word nobody knows is an end."""
    if record.outcome is Outcome.UPSTREAM_TIMEOUT:
        return "TIMEOUT"
    if record.outcome is Outcome.UPSTREAM_BROKE or (record.status or 0) >= 400:
        return "ERROR"
    usage = record.usage
    if record.outcome in (Outcome.CLIENT_LEFT, Outcome.STOPPED) and (
        usage is None or usage.usage_state is not UsageState.FINAL
    ):
        return "CANCELLED"
    if usage is None or not usage.finish_reasons:
        return "END"
    return _STOP_REASONS.get(usage.finish_reasons[0].lower(), "END")


def operation(usage: Usage) -> str:
    return _OPERATIONS.get(usage.operation or "", "OTHER")
