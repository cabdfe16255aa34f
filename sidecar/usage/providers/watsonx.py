"""IBM watsonx: generation, embeddings and rerank under names of its own; its chat is OpenAI's shape.

Seen in public captures: streams run their counts, state the input once and zeros after it, and say `not_finished` on
the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sidecar.usage.providers.base import Document, Tree
from sidecar.usage.providers.declared import DeclaredReader
from sidecar.usage.providers.openai import ChatCompletions
from sidecar.usage.values import name


class Watsonx(DeclaredReader):
    """IBM's `text/generation`, embeddings and rerank; its chat is OpenAI's."""

    numbers_at = ("results[].input_token_count", "results[].generated_token_count", "input_token_count")
    names: ClassVar[Mapping[str, str]] = {"input_token_count": "input_tokens", "generated_token_count": "output_tokens"}
    model_at = ("model_id",)
    finish_at = ("results[].stop_reason",)
    told_by = (("model_id", "results[].generated_token_count"), ("model_id", "input_token_count"))


class WatsonxChat(ChatCompletions):
    """OpenAI's shape without its `object`, and the model under another name as well."""

    wanted: ClassVar[Tree] = {**ChatCompletions.wanted, "model_id": True, "created_at": True}

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "model_id" in document and type(document.get("choices")) is list and "created_at" in document

    def message(self, document: Document, event: str) -> bool:
        self.model = self.model or name(document.get("model_id"))
        return super().message(document, event)

    def document(self, document: Document) -> None:
        super().document(document)
        self.model = self.model or name(document.get("model_id"))
