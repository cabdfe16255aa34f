"""OpenAI's responses shape: `input_tokens`/`output_tokens`, and streams of typed events.

The same counts are spoken by audio, images, batches and realtime, which is why `fill_responses` stands alone. In a
stream the usage is inside `.response` of the one terminal event; every other event is waved through by its bytes.
"""

from __future__ import annotations

import re
from typing import ClassVar

from sidecar.exchange import Usage
from sidecar.usage.members import Tree
from sidecar.usage.reader import Document, Reader, escaped_key
from sidecar.usage.values import name, part, quantity

TERMINAL = ("response.completed", "response.incomplete", "response.failed")

_RESPONSE: Tree = {
    "id": True,
    "object": True,
    "model": True,
    "status": True,
    "background": True,
    "service_tier": True,
    "incomplete_details": True,
    "error": True,
    "usage": True,
}


class Responses(Reader):
    wanted: ClassVar[Tree] = {**_RESPONSE, "type": True, "code": True, "response": _RESPONSE}
    end_signs: ClassVar[tuple[bytes, ...]] = tuple(kind.encode() for kind in TERMINAL)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"response\.[a-z_.]+\.delta"')

    @classmethod
    def claims(cls, document: Document) -> bool:
        if document.get("object") in ("response", "response.compaction"):
            return "usage" in document and "output" in document
        kind = document.get("type")
        return kind == "response.created" and part(document.get("response")).get("object") == "response"

    def dull(self, block: bytes) -> bool:
        if self.response_id is None or b'"error"' in block or b"event: error" in block:
            return False
        if b"response.completed" in block or b"response.incomplete" in block or b"response.failed" in block:
            return False
        return 92 not in block or not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        response = document.get("response")
        if kind == "error" or (kind == "" and "error" in document):
            self.seen = True
            error = document.get("error")
            self.fail(error or {"type": document.get("code"), "code": document.get("code")})
        elif type(response) is dict and kind.startswith("response."):
            self.document(response)
            self.final = kind in TERMINAL
        return kind in TERMINAL

    def document(self, document: Document) -> None:
        if document.get("object") in ("response", "response.compaction") or "usage" in document:
            self.seen = True
        self.identify(document)
        if tier := name(document.get("service_tier")):
            self.service_tier = tier
        if self.fail(document.get("error")):
            self.seen = True
        status = name(document.get("status"))
        if status in ("queued", "in_progress"):
            if document.get("background") is True:
                self.reason = "a background response: its usage is known only when it is fetched"
        elif status is not None:
            self.reason = None
            detail = name(part(document.get("incomplete_details")).get("reason"))
            self.finished(0, detail if status == "incomplete" and detail else status)
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_responses(self, usage, raw)


def fill_responses(reader: Reader, usage: Usage, raw: Document) -> None:
    """`input_tokens` and its kin; details are spelled `input_tokens_details` or `input_token_details`."""
    number = reader.number
    if raw.get("type") == "duration":
        if (seconds := quantity(raw.get("seconds"))) is not None:
            usage.units["audio_seconds"] = seconds
        return
    usage.input_tokens = number(raw, "input_tokens")
    usage.output_tokens = number(raw, "output_tokens")
    details = raw.get("input_tokens_details") or raw.get("input_token_details")
    if type(details) is dict:
        usage.cache_read_input_tokens = number(details, "cached_tokens")
        usage.cache_write_input_tokens = number(details, "cache_write_tokens")
        if usage.cache_read_input_tokens is None:  # Perplexity's responses surface
            usage.cache_read_input_tokens = number(details, "cache_read_input_tokens")
        if usage.cache_write_input_tokens is None:
            usage.cache_write_input_tokens = number(details, "cache_creation_input_tokens")
        usage.text_input_tokens = number(details, "text_tokens")
        usage.image_input_tokens = number(details, "image_tokens")
        usage.audio_input_tokens = number(details, "audio_tokens")
    details = raw.get("output_tokens_details") or raw.get("output_token_details")
    if type(details) is dict:
        usage.reasoning_output_tokens = number(details, "reasoning_tokens")
        usage.text_output_tokens = number(details, "text_tokens")
        usage.image_output_tokens = number(details, "image_tokens")
        usage.audio_output_tokens = number(details, "audio_tokens")
