"""Ollama's own API: JSON lines, streamed unless told otherwise; the line with `done: true` has the counts."""

from __future__ import annotations

import re
from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader, Tree, escaped_key

_COUNTS = ("prompt_eval_count", "prompt_eval_cached_count", "eval_count")


class Ollama(Reader):
    wanted: ClassVar[Tree] = {
        "model": True,
        "done": True,
        "done_reason": True,
        "error": True,
        **dict.fromkeys(_COUNTS, True),
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b'"done":true', b'"done": true')
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"(?:content|response|thinking)"\s*:\s*"[^"]')

    claim_signs: ClassVar[tuple[bytes, ...]] = (b"eval_count",)

    @classmethod
    def claims(cls, document: Document) -> bool:
        return document.get("done") is not False and ("eval_count" in document or "prompt_eval_count" in document)

    def recognises(self, document: Document, event: str) -> bool:
        return "done" in document or self.claims(document)

    def can_skip(self, block: bytes) -> bool:
        if self.model is None or b'"error"' in block:
            return False
        lines = block.count(b"\n") or 1
        return block.count(b'"done":false') == lines and not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        self.document(document)
        return document.get("done") is True

    def document(self, document: Document) -> None:
        self.identify(document)
        self.seen = self.seen or "done" in document or "embeddings" in document or "model" in document
        if self.fail(document.get("error")):
            self.seen = True
        self.finished(0, document.get("done_reason"))
        self.final = self.final or document.get("done") is True
        self.report({key: document[key] for key in _COUNTS if key in document})

    def fill(self, usage: Usage, raw: Document) -> None:
        usage.input_tokens = self.number(raw, "prompt_eval_count")
        usage.output_tokens = self.number(raw, "eval_count")
        usage.cache_read_input_tokens = self.number(raw, "prompt_eval_cached_count")
        if usage.input_tokens is None and usage.output_tokens is not None:
            usage.reason = "the input was not counted (older servers leave it out for a cached prompt)"
