"""Answers in Anthropic's shapes: messages, plain and streamed, and the free token estimate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from sidecar.dev.mock_llm.script import MESSAGES, End, Script

_WRITTEN_1H: Final = 600  # of the tokens written to the cache, those kept for an hour
_USAGE: Final = {
    "input_tokens": MESSAGES.input - MESSAGES.cache_read - MESSAGES.cache_write,  # on this wire without the cache's
    "cache_creation_input_tokens": MESSAGES.cache_write,
    "cache_read_input_tokens": MESSAGES.cache_read,
    "cache_creation": {
        "ephemeral_5m_input_tokens": MESSAGES.cache_write - _WRITTEN_1H,
        "ephemeral_1h_input_tokens": _WRITTEN_1H,
    },
    "output_tokens": MESSAGES.output,
    "output_tokens_details": {"thinking_tokens": MESSAGES.reasoning},
    "server_tool_use": None,
    "service_tier": "standard",
}
# In a stream the counts run on: the first event has what is known then, the last overwrites it.
_FIRST_USAGE: Final = {**_USAGE, "output_tokens": 2, "output_tokens_details": None}
_LAST_USAGE: Final = {
    name: _USAGE[name]
    for name in (
        "input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens", "output_tokens",
        "output_tokens_details", "server_tool_use",
    )
}  # fmt: skip


def error(status: int, message: str, number: int) -> dict[str, Any]:
    kind = {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        529: "overloaded_error",
    }.get(status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": f"req_{number:06d}"}


def message(request: Mapping[str, Any], script: Script, number: int) -> dict[str, Any]:
    return {
        **_message(request, number, _USAGE),
        "content": [{"type": "text", "text": script.text(), "citations": None}],
        "stop_reason": "end_turn",
    }


def message_stream(request: Mapping[str, Any], script: Script, number: int) -> Iterator[dict[str, Any]]:
    yield {"type": "message_start", "message": _message(request, number, _FIRST_USAGE)}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": "", "citations": None}}
    yield {"type": "ping"}
    for piece in script.texts():
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
    if script.end is End.CUT:
        return
    if script.end is End.ERROR:
        yield error(529, "Overloaded", number)
        return
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": _LAST_USAGE}
    yield {"type": "message_stop"}


def count_tokens(request: Mapping[str, Any], script: Script, number: int) -> dict[str, Any]:
    return {"input_tokens": MESSAGES.input}


def _message(request: Mapping[str, Any], number: int, usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": f"msg_{number:06d}",
        "type": "message",
        "role": "assistant",
        "model": request["model"],
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": usage,
    }
