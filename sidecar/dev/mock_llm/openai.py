"""Answers in OpenAI's shapes: chat completions, legacy completions, responses, embeddings, models.

Each maker gives the whole answer as one object, or the stream as its events in order; when they are sent, and how a
stream ends early, is the server's affair.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from typing import Any, Final

from sidecar.dev.mock_llm.script import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, End, Script

CREATED: Final = 1_790_000_000
_VECTOR: Final = (0.0123, -0.0456, 0.0789)
_CHAT_USAGE: Final = {
    "prompt_tokens": CHAT.input,
    "completion_tokens": CHAT.output,
    "total_tokens": CHAT.input + CHAT.output,
    "prompt_tokens_details": {
        "cached_tokens": CHAT.cache_read, "cache_write_tokens": CHAT.cache_write, "audio_tokens": 0,
    },
    "completion_tokens_details": {
        "reasoning_tokens": CHAT.reasoning, "audio_tokens": 0,
        "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0,
    },
}  # fmt: skip
_COMPLETIONS_USAGE: Final = {
    "prompt_tokens": COMPLETIONS.input,
    "completion_tokens": COMPLETIONS.output,
    "total_tokens": COMPLETIONS.input + COMPLETIONS.output,
}
_RESPONSES_USAGE: Final = {
    "input_tokens": RESPONSES.input,
    "input_tokens_details": {"cached_tokens": RESPONSES.cache_read, "cache_write_tokens": RESPONSES.cache_write},
    "output_tokens": RESPONSES.output,
    "output_tokens_details": {"reasoning_tokens": RESPONSES.reasoning},
    "total_tokens": RESPONSES.input + RESPONSES.output,
}
_EMBEDDINGS_USAGE: Final = {"prompt_tokens": EMBEDDINGS.input, "total_tokens": EMBEDDINGS.input}
_FAILURE: Final = "The server had an error while processing your request."

Data = dict[str, Any] | str
"""One event's data: an object, or the word `[DONE]`."""


def error(status: int, message: str) -> dict[str, Any]:
    kind, code = {
        400: ("invalid_request_error", None),
        401: ("invalid_request_error", "invalid_api_key"),
        404: ("invalid_request_error", "model_not_found"),
        429: ("requests", "rate_limit_exceeded"),
    }.get(status, ("server_error", None))
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def chat(request: Mapping[str, Any], script: Script, number: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": script.text(), "refusal": None, "annotations": []}
    return {
        "id": f"chatcmpl-{number:06d}",
        "object": "chat.completion",
        "created": CREATED,
        "model": _dated(request["model"]),
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": _CHAT_USAGE,
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
    }


def chat_stream(request: Mapping[str, Any], script: Script, number: int) -> Iterator[Data]:
    """Usage comes only when asked for; then every other chunk has it as null."""
    wants_usage = _wants_usage(request)

    def chunk(choices: list[dict[str, Any]], usage: Mapping[str, Any] | None = None) -> dict[str, Any]:
        event = {
            "id": f"chatcmpl-{number:06d}",
            "object": "chat.completion.chunk",
            "created": CREATED,
            "model": _dated(request["model"]),
            "choices": choices,
            "service_tier": "default",
            "system_fingerprint": "fp_scripted",
        }
        return {**event, "usage": usage} if wants_usage else event

    def choice(delta: dict[str, Any], finish_reason: str | None = None) -> list[dict[str, Any]]:
        return [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]

    yield chunk(choice({"role": "assistant", "content": "", "refusal": None}))
    for piece in script.texts():
        yield chunk(choice({"content": piece}))
    if script.end is End.CUT:
        return
    if script.end is End.ERROR:
        yield error(500, _FAILURE)
        return
    yield chunk(choice({}, "stop"))
    if wants_usage:
        yield chunk([], _CHAT_USAGE)
    yield "[DONE]"


def completion(request: Mapping[str, Any], script: Script, number: int) -> dict[str, Any]:
    choice = {"text": script.text(), "index": 0, "logprobs": None, "finish_reason": "length"}
    return {**_completion(request, number), "choices": [choice], "usage": _COMPLETIONS_USAGE}


def completion_stream(request: Mapping[str, Any], script: Script, number: int) -> Iterator[Data]:
    """Here the whole object and the chunk bear the same name, and the last piece of text has the reason."""
    usage = {"usage": None} if _wants_usage(request) else {}
    texts = script.texts()
    for place, piece in enumerate(texts, start=1):
        reason = "length" if place == len(texts) and script.end is End.WHOLE else None
        choice = {"text": piece, "index": 0, "logprobs": None, "finish_reason": reason}
        yield {**_completion(request, number), "choices": [choice], **usage}
    if script.end is End.CUT:
        return
    if script.end is End.ERROR:
        yield error(500, _FAILURE)
        return
    if usage:
        yield {**_completion(request, number), "choices": [], "usage": _COMPLETIONS_USAGE}
    yield "[DONE]"


def response(request: Mapping[str, Any], script: Script, number: int) -> dict[str, Any]:
    item = _message(number, "completed", [_part(script.text())])
    return _response(request, number, "completed", [item], _RESPONSES_USAGE)


def response_stream(request: Mapping[str, Any], script: Script, number: int) -> Iterator[Data]:
    """Typed events, numbered; the usage is in the last one, and there is no `[DONE]`."""
    sequence = iter(range(10 * len(script.texts()) + 100))

    def event(kind: str, **fields: Any) -> dict[str, Any]:
        return {"type": kind, "sequence_number": next(sequence), **fields}

    place = {"item_id": f"msg_{number:06d}", "output_index": 0, "content_index": 0}
    opened = _response(request, number, "in_progress", [], None)
    yield event("response.created", response=opened)
    yield event("response.in_progress", response=opened)
    yield event("response.output_item.added", output_index=0, item=_message(number, "in_progress", []))
    yield event("response.content_part.added", **place, part=_part(""))
    for piece in script.texts():
        yield event("response.output_text.delta", **place, delta=piece, logprobs=[])
    if script.end is End.CUT:
        return
    if script.end is End.ERROR:
        failed = _response(request, number, "failed", [], None)
        yield event("response.failed", response={**failed, "error": {"code": "server_error", "message": _FAILURE}})
        return
    item = _message(number, "completed", [_part(script.text())])
    yield event("response.output_text.done", **place, text=script.text(), logprobs=[])
    yield event("response.content_part.done", **place, part=_part(script.text()))
    yield event("response.output_item.done", output_index=0, item=item)
    yield event("response.completed", response=_response(request, number, "completed", [item], _RESPONSES_USAGE))


def embeddings(request: Mapping[str, Any], script: Script, number: int) -> dict[str, Any]:
    """One vector for each input, as numbers or, as the vendor's client asks for it, as base64."""
    given = request["input"]
    count = len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    vector: Any = list(_VECTOR)
    if request.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{len(_VECTOR)}f", *_VECTOR)).decode()
    data = [{"object": "embedding", "index": place, "embedding": vector} for place in range(count)]
    return {"object": "list", "data": data, "model": request["model"], "usage": _EMBEDDINGS_USAGE}


def models() -> dict[str, Any]:
    rows = [{"id": name, "object": "model", "created": CREATED, "owned_by": "scripted"} for name in ("gpt-5-mini",)]
    return {"object": "list", "data": rows}


def _wants_usage(request: Mapping[str, Any]) -> bool:
    options = request.get("stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _dated(model: str) -> str:
    """The vendor answers with the dated name of the model that was asked for."""
    return f"{model}-2025-08-07"


def _completion(request: Mapping[str, Any], number: int) -> dict[str, Any]:
    return {"id": f"cmpl-{number:06d}", "object": "text_completion", "created": CREATED, "model": request["model"]}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _message(number: int, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "id": f"msg_{number:06d}",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def _response(
    request: Mapping[str, Any], number: int, status: str, output: list[dict[str, Any]], usage: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "id": f"resp_{number:06d}",
        "object": "response",
        "created_at": CREATED,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "max_output_tokens": None,
        "model": _dated(request["model"]),
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": "low", "summary": None},
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "usage": usage,
        "user": None,
        "metadata": {},
    }
