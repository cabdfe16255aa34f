"""The OpenAI shape: chat completions, legacy completions and embeddings, and everybody who speaks it.

Azure, Mistral, Groq, DeepSeek, xAI, Moonshot, OpenRouter, Perplexity, Together, Fireworks, vLLM, SGLang, llama.cpp,
Ollama and TGI answer in this shape and differ in where in a stream the usage stands: on a chunk of its own, on the
last content chunk, on every chunk as a running total, inside `choices[0]` or inside `x_groq`. All of these are
known places; the last report wins (M1 to M3). What the numbers of a usage object mean is settled in `fields`.
"""

from __future__ import annotations

import re
from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.fields import fill_tokens
from sidecar.usage.formats.json_scanner import Tree
from sidecar.usage.providers.base import Document, Reader, escaped_key
from sidecar.usage.values import count, name, part

# One search instead of many: a member of interest that is not null.
_OF_INTEREST = re.compile(rb'"(?:usage"(?!:\s*+null)|finish_reason"(?!:\s*+null)|error")').search
_DONE = re.compile(rb"\[DONE\]").search


class ChatCompletions(Reader):
    wanted: ClassVar[Tree] = {
        "id": True,
        "object": True,
        "model": True,
        "service_tier": True,
        "usage": True,
        "error": True,
        "code": True,
        "choices": [{"index": True, "finish_reason": True, "usage": True}],
        "x_groq": {"usage": True, "error": True},
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b"[DONE]",)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(
        rb'"(?:content|reasoning|reasoning_content|text|arguments|refusal)"\s*:\s*"[^"]'
    )

    _choices: int = 1  # set from the request's `n`

    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b'"choices"')

    @classmethod
    def claims(cls, document: Document) -> bool:
        if type(document.get("choices")) is not list:
            return False
        if document.get("object") in ("chat.completion", "chat.completion.chunk", "text_completion"):
            return True
        return count(part(document.get("usage")).get("prompt_tokens")) is not None  # some leave `object` out

    def recognises(self, document: Document, event: str) -> bool:
        return type(document.get("choices")) is list

    def expect(self, choices: int) -> None:
        """How many parallel answers were asked for: running totals are final only when all of them have ended."""
        self._choices = choices

    def dull(self, block: bytes) -> bool:
        if self.response_id is None or self.model is None:
            return False
        if _OF_INTEREST(block) is not None or _DONE(block) is not None or b"event: error" in block:
            return False
        return 92 not in block or not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        self._take(document, stream=True)
        if event == "error" and self.error is None:
            self.fail(document)
            self.seen = True
        return False

    def done(self) -> bool:
        self.final = True
        return True

    def document(self, document: Document) -> None:
        self._take(document, stream=False)

    def _take(self, document: Document, *, stream: bool) -> None:
        self.identify(document)
        if tier := name(document.get("service_tier")):
            self.service_tier = tier
        if (error := document.get("error")) is not None and self.fail(error):
            self.seen = True
        choices = document.get("choices")
        if type(choices) is list:
            self.seen = True
            for choice in choices:
                if type(choice) is dict:
                    self.finished(choice.get("index"), choice.get("finish_reason"))
                    if "usage" in choice and self.report(choice["usage"]):
                        self.provider = "moonshot_ai"
        if stream and (groq := document.get("x_groq")) is not None:
            self._groq(part(groq))
        if (usage := document.get("usage")) is not None:
            if self.report(usage) and not choices and type(choices) is list:
                self.final = True
        elif choices is None and self.response_id is None and type(document.get("code")) is str:
            self.seen = self.fail({"code": document["code"]})  # DashScope's errors: a code and a message, no more
        if len(self.finish_reasons) >= self._choices:
            self.final = True

    def _groq(self, groq: Document) -> None:
        self.provider = "groq"
        self.fail(groq.get("error"))
        self.report(groq.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)


class Embeddings(ChatCompletions):
    """Embeddings and reranking: one count in, none out. Voyage and Jina state the total only."""

    wanted: ClassVar[Tree] = {"id": True, "object": True, "model": True, "usage": True, "error": True}
    end_signs: ClassVar[tuple[bytes, ...]] = ()

    @classmethod
    def claims(cls, document: Document) -> bool:
        """`object: list` is everywhere; one of embeddings that cost tokens is not."""
        usage = part(document.get("usage"))
        if document.get("object") != "list" or not ("prompt_tokens" in usage or "total_tokens" in usage):
            return False
        if "data" not in document:  # skimmed
            return "choices" not in document
        data = document["data"]
        first = data[0] if type(data) is list and data else data
        return part(first).get("object") == "embedding"

    def recognises(self, document: Document, event: str) -> bool:
        return self.claims(document)

    def document(self, document: Document) -> None:
        super().document(document)
        if document.get("object") == "list" or type(document.get("data")) is list:
            self.seen = True

    def fill(self, usage: Usage, raw: Document) -> None:
        """Nothing is generated, so whatever the total holds beyond the stated input is input."""
        super().fill(usage, raw)
        total = self.number(raw, "total_tokens")
        if total is not None and "completion_tokens" not in raw and "output_tokens" not in raw:
            usage.input_tokens, usage.output_tokens = max(total, usage.input_tokens or 0), None
