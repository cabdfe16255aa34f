"""Mistral beside its OpenAI surface: pages of OCR, and conversations with agents (its package's types).

Pages that were annotated have a price of their own, and are said in `pages_processed_annotation`
(https://github.com/BerriAI/litellm, its costs of OCR).
"""

from __future__ import annotations

from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import DONE, Document, Reader, Tree
from sidecar.usage.providers.fields import fill_tokens
from sidecar.usage.values import name, part


class MistralOcr(Reader):
    wanted: ClassVar[Tree] = {"model": True, "usage_info": True, "error": True}

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "pages_processed" in part(document.get("usage_info"))

    def document(self, document: Document) -> None:
        self.identify(document)
        self.report(document.get("usage_info"))

    def fill(self, usage: Usage, raw: Document) -> None:
        if (pages := self.number(raw, "pages_processed")) is not None:
            usage.units["pages"] = pages
        if annotated := self.number(raw, "pages_processed_annotation"):
            usage.units["annotated_pages"] = annotated


class MistralConversations(Reader):
    wanted: ClassVar[Tree] = {"conversation_id": True, "type": True, "usage": True, "error": True}
    end_signs: ClassVar[tuple[bytes, ...]] = (b"conversation.response.done", DONE)
    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b"conversation")
    keep: ClassVar[tuple[bytes, ...] | None] = (b"conversation.response", b'"error"', DONE)

    @classmethod
    def claims(cls, document: Document) -> bool:
        kind = document.get("type")
        if type(kind) is str and kind.startswith("conversation.response."):
            return "conversation_id" in document or "usage" in document
        return "conversation_id" in document and bool(part(document.get("usage")))

    def recognises(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        return "conversation_id" in document or (type(kind) is str and kind.startswith("conversation."))

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        kind = kind if type(kind) is str else event
        self.seen = True
        self.response_id = name(document.get("conversation_id")) or self.response_id
        if kind == "conversation.response.error":
            self.fail({"code": document.get("code")})
        if kind != "conversation.response.done":
            return False
        self.final = True
        self.report(part(document.get("usage")))
        return True

    def document(self, document: Document) -> None:
        self.seen = "conversation_id" in document or "outputs" in document
        self.response_id = name(document.get("conversation_id")) or self.response_id
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)
