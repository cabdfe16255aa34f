"""Estimates (`SIDECAR_ESTIMATE`), for operators who would rather have a rough number than none.

Only where a model call's answer said nothing, never in place of a number, and always marked as what it is. Nothing is
tokenised: counting words of megabytes on the event loop has stopped other proxies. So: four bytes of the request for a
token of input; for the output one token a streamed event, or four bytes of a plain answer. Both come from
byte and line counts, so that where the answer was cut cannot matter.
"""

from __future__ import annotations

from sidecar.model.exchange import Usage, UsageState

BYTES_PER_TOKEN = 4  # English text in current vocabularies; code and other scripts have more tokens
LINES_PER_EVENT = 2  # a data line and a blank one; an event with a name has three
REASON = "estimated: four bytes a token, one token a streamed event"

_TEXT = ("chat", "text_completion", "generate_content")


def estimate(usage: Usage, request_bytes: int, answer_bytes: int, answer_lines: int) -> None:
    """Fill in what the answer did not say."""
    if usage.usage_state is not UsageState.ABSENT or usage.error is not None or usage.operation not in _TEXT:
        return
    usage.input_tokens = -(-request_bytes // BYTES_PER_TOKEN)
    usage.output_tokens = answer_lines // LINES_PER_EVENT if usage.streamed else -(-answer_bytes // BYTES_PER_TOKEN)
    usage.total_tokens = usage.input_tokens + usage.output_tokens
    usage.usage_state = UsageState.ESTIMATED
    usage.reason = REASON
