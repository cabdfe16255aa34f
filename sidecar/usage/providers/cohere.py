"""Cohere, both versions: what is billed (`billed_units`), not what the model saw (`tokens`).

Reranking speaks this shape too; Jina, Voyage and Pinecone answer the same paths with a `usage` in OpenAI's manner.
"""

from __future__ import annotations

import re
from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader, Tree
from sidecar.usage.providers.fields import fill_tokens
from sidecar.usage.values import name, part, quantity

_UNITS = ("search_units", "classifications", "images")
_END: Tree = {"usage": True, "finish_reason": True, "error": True}


_KINDS = (
    *("message-start", "content-start", "content-delta", "content-end", "tool-plan-delta", "tool-call-start"),
    *("tool-call-delta", "tool-call-end", "citation-start", "citation-end", "message-end"),  # v2
    *("stream-start", "text-generation", "search-queries-generation", "search-results", "tool-calls-chunk"),
    *("tool-calls-generation", "citation-generation", "debug", "stream-end"),  # v1
)


class Cohere(Reader):
    wanted: ClassVar[Tree] = {
        "id": True,
        "response_id": True,
        "generation_id": True,
        "type": True,
        "event_type": True,
        "finish_reason": True,
        "model": True,
        "object": True,
        "usage": True,
        "meta": True,
        "delta": _END,
        "response": {"response_id": True, "generation_id": True, "finish_reason": True, "meta": True},
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b"message-end", b"stream-end")
    keep: ClassVar[tuple[bytes, ...] | None] = (b"message-", b"stream-", b"error")
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb"content-delta|text-generation")

    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b"_units", b"stream-")

    @classmethod
    def claims(cls, document: Document) -> bool:
        """Billed units, and the beginnings and ends of both kinds of stream."""
        usage = part(document.get("usage"))
        if "billed_units" in usage or "billed_units" in part(document.get("meta")):
            return True
        if document.get("type") in ("message-start", "message-end"):
            return type(document.get("delta")) is dict
        kind = document.get("event_type")
        return kind in ("stream-start", "stream-end") and (
            "generation_id" in document or type(document.get("response")) is dict
        )

    def recognises(self, document: Document, event: str) -> bool:
        return self.claims(document) or "event_type" in document or document.get("type") in ("content-delta", "debug")

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type") or document.get("event_type")
        if type(kind) is not str:
            kind = event
        self.seen = self.seen or kind in _KINDS
        if kind == "message-end":
            end = part(document.get("delta"))
            self.identify(document)
            self.finished(0, end.get("finish_reason"))
            self.fail(end.get("error"))
            self.report(end.get("usage"))
        elif kind == "stream-end":
            self.document(part(document.get("response")))
            self.finished(0, document.get("finish_reason"))
        else:
            self.identify(document)
            return False
        if document.get("finish_reason") in ("ERROR", "ERROR_TOXIC", "ERROR_LIMIT") or 0 not in self.finish_reasons:
            self.error = self.error or "error"
        self.final = True
        return True

    def done(self) -> bool:
        return self.final

    def document(self, document: Document) -> None:
        self.identify(document)
        self.response_id = name(document.get("response_id")) or name(document.get("generation_id")) or self.response_id
        self.finished(0, document.get("finish_reason"))
        meta = document.get("meta")
        if type(meta) is dict:
            self.provider = "cohere"
            counted = {key: meta[key] for key in ("billed_units", "tokens", "cached_tokens") if key in meta}
            self.report(counted)
        if "choices" not in document:  # with choices it is another API behind the same path
            self.report(document.get("usage"))
            self.seen = self.seen or "results" in document or "message" in document or "embeddings" in document

    def fill(self, usage: Usage, raw: Document) -> None:
        if "billed_units" not in raw and "tokens" not in raw:
            fill_tokens(self, usage, raw)
            if usage.output_tokens is None and usage.input_tokens is None:
                usage.input_tokens = usage.total_tokens  # of a reranker: nothing is generated
            return
        billed = part(raw.get("billed_units"))
        if "output_tokens" not in billed:
            self.operation = "embeddings" if "input_tokens" in billed else "rerank"
        usage.input_tokens = self.number(billed, "input_tokens")
        usage.output_tokens = self.number(billed, "output_tokens")
        usage.image_input_tokens = self.number(billed, "image_tokens")
        for unit in _UNITS:
            if (amount := quantity(billed.get(unit))) is not None:
                usage.units[unit] = amount
