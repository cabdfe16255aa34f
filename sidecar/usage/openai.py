"""The OpenAI shape: chat completions, legacy completions and embeddings, and everybody who speaks it.

Azure, Mistral, Groq, DeepSeek, xAI, Moonshot, OpenRouter, Perplexity, Together, Fireworks, vLLM, SGLang, llama.cpp,
Ollama and TGI answer in this shape and differ in where in a stream the usage stands: on a chunk of its own, on the
last content chunk, on every chunk as a running total, inside `choices[0]` or inside `x_groq`. All of these are
known places; the last report wins (M1 to M3). Whether the input is inside the total and the reasoning inside
the output is settled by the stated total (O2).
"""

from __future__ import annotations

import re
from typing import ClassVar

from sidecar.exchange import Usage
from sidecar.usage.members import Tree
from sidecar.usage.reader import Document, Reader, escaped_key
from sidecar.usage.values import count, decimal_text, name, part, quantity

# One search instead of many: a member of interest that is not null.
_OF_INTEREST = re.compile(rb'"(?:usage"(?!:\s*+null)|finish_reason"(?!:\s*+null)|error")').search
_DONE = re.compile(rb"\[DONE\]").search


_INPUT_DETAILS = {
    "cached_tokens": "cache_read_input_tokens",
    "cache_write_tokens": "cache_write_input_tokens",
    "audio_tokens": "audio_input_tokens",
    "text_tokens": "text_input_tokens",
    "image_tokens": "image_input_tokens",
}
_OUTPUT_DETAILS = {
    "reasoning_tokens": "reasoning_output_tokens",
    "audio_tokens": "audio_output_tokens",
    "accepted_prediction_tokens": "accepted_prediction_tokens",
    "rejected_prediction_tokens": "rejected_prediction_tokens",
    "text_tokens": "text_output_tokens",
    "image_tokens": "image_output_tokens",
}


class ChatCompletions(Reader):
    wanted: ClassVar[Tree] = {
        "id": True,
        "object": True,
        "model": True,
        "service_tier": True,
        "usage": True,
        "error": True,
        "choices": [{"index": True, "finish_reason": True, "usage": True}],
        "x_groq": {"usage": True, "error": True},
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b"[DONE]",)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(
        rb'"(?:content|reasoning|reasoning_content|text|arguments|refusal)"\s*:\s*"[^"]'
    )

    _choices: int = 1  # set from the request's `n`

    @classmethod
    def claims(cls, document: Document) -> bool:
        kind = document.get("object")
        return (
            kind in ("chat.completion", "chat.completion.chunk", "text_completion")
            and type(document.get("choices")) is list
        )

    def expect(self, choices: int) -> None:
        """How many parallel answers were asked for: running totals are final only when all of them have ended."""
        self._choices = choices

    def dull(self, block: bytes) -> bool:
        if self.response_id is None or self.model is None:
            return False
        if _OF_INTEREST(block) is not None or _DONE(block) is not None:
            return False
        return 92 not in block or not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        self._take(document, stream=True)
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
            self.report(usage)
            if not choices and type(usage) is dict and type(choices) is list:
                self.final = True
        if len(self.finish_reasons) >= self._choices:
            self.final = True

    def _groq(self, groq: Document) -> None:
        self.provider = "groq"
        self.fail(groq.get("error"))
        self.report(groq.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_chat(self, usage, raw)


class Embeddings(ChatCompletions):
    """Embeddings and reranking: one count in, none out. Voyage and Jina state the total only."""

    wanted: ClassVar[Tree] = {"id": True, "object": True, "model": True, "usage": True, "error": True}
    end_signs: ClassVar[tuple[bytes, ...]] = ()

    @classmethod
    def claims(cls, document: Document) -> bool:
        return False  # `object: list` is everywhere

    def document(self, document: Document) -> None:
        super().document(document)
        if document.get("object") == "list" or type(document.get("data")) is list:
            self.seen = True

    def fill(self, usage: Usage, raw: Document) -> None:
        super().fill(usage, raw)
        if usage.input_tokens is None:
            usage.input_tokens = self.number(raw, "total_tokens")


def fill_chat(reader: Reader, usage: Usage, raw: Document) -> None:
    """`prompt_tokens` and its kin."""
    usage.input_tokens = reader.number(raw, "prompt_tokens")
    usage.output_tokens = reader.number(raw, "completion_tokens")
    if type(details := raw.get("prompt_tokens_details")) is dict:
        reader.numbers(usage, details, _INPUT_DETAILS)
    if type(details := raw.get("completion_tokens_details")) is dict:
        reader.numbers(usage, details, _OUTPUT_DETAILS)
    if usage.cache_read_input_tokens is None and "cached_tokens" in raw:
        usage.cache_read_input_tokens = reader.number(raw, "cached_tokens")  # Moonshot
    if len(raw) > 5:
        _vendor_fields(reader, usage, raw)
    prompt, completion, reasoning = usage.input_tokens, usage.output_tokens, usage.reasoning_output_tokens
    if (
        reasoning
        and prompt is not None
        and completion is not None
        and count(raw.get("total_tokens")) == prompt + completion + reasoning
    ):
        usage.output_tokens = completion + reasoning  # O2: only where the stated total says that it was left out (xAI)


def _vendor_fields(reader: Reader, usage: Usage, raw: Document) -> None:
    if "prompt_cache_hit_tokens" in raw:
        reader.provider = reader.provider or "deepseek"
        if usage.cache_read_input_tokens is None:  # O4: a part of the prompt
            usage.cache_read_input_tokens = reader.number(raw, "prompt_cache_hit_tokens")
    if usage.reasoning_output_tokens is None:
        usage.reasoning_output_tokens = reader.number(raw, "reasoning_tokens")  # Perplexity
    if "cost_in_usd_ticks" in raw:
        reader.provider = reader.provider or "x_ai"
        usage.cost_usd = decimal_text(raw["cost_in_usd_ticks"], exponent=-10)
    elif (cost := raw.get("cost")) is not None:
        if type(cost) is dict:
            reader.provider = reader.provider or "perplexity"
            cost = cost.get("total_cost")
        usage.cost_usd = decimal_text(cost)
    if "is_byok" in raw:
        reader.provider = reader.provider or "openrouter"
    for unit, key in (("search_queries", "num_search_queries"), ("audio_seconds", "prompt_audio_seconds")):
        if (amount := quantity(raw.get(key))) is not None:
            usage.units[unit] = amount
