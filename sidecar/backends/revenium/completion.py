"""What Revenium's completion call wants of a model call: the vendor's own counts, and its closed words.

Records hold inclusive totals. Revenium's packages send the numbers as the vendor's wire has them, and prices
are set on those, so they are rebuilt here: Anthropic and Bedrock count input without what the cache read or
wrote, Google counts output without thoughts. Nothing else needs this, so it is not in the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sidecar.model.exchange import Outcome, Usage, UsageState
from sidecar.model.record import Record

_WITHOUT_CACHE: Final = ("anthropic", "aws.bedrock")
_GOOGLE: Final = "gcp."
_OTHERS_NAMES: Final = {"prompt_tokens", "input_tokens"}  # of models on Vertex that answer in their maker's shape

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
    if provider in _WITHOUT_CACHE:
        plain = read - (usage.cache_read_input_tokens or 0) - (usage.cache_write_input_tokens or 0)
        plain = max(plain, 0)
        return plain, written, plain + written
    total = usage.total_tokens if type(usage.total_tokens) is int else read + written
    said = usage.raw_usage if isinstance(usage.raw_usage, dict) else {}
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
