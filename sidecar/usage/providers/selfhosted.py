"""The native routes of model servers: llama.cpp, text-generation-inference and text-embeddings-inference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.formats.json_scanner import Tree
from sidecar.usage.providers.base import Document, Reader, escaped_key
from sidecar.usage.providers.cohere import Cohere
from sidecar.usage.values import count, part


class LlamaCpp(Reader):
    """`/completion`: running counts on every event, `stop: true` on the last."""

    wanted: ClassVar[Tree] = {
        "model": True,
        "stop": True,
        "stop_type": True,
        "tokens_predicted": True,
        "tokens_evaluated": True,
        "timings": True,
        "error": True,
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b'"stop":true', b'"stop": true')
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"content"\s*:\s*"[^"]')

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "tokens_predicted" in document and "tokens_evaluated" in document

    def recognises(self, document: Document, event: str) -> bool:
        return "tokens_predicted" in document

    def message(self, document: Document, event: str) -> bool:
        self.document(document)
        self.final = document.get("stop") is True
        return self.final

    def document(self, document: Document) -> None:
        self.identify(document)
        if self.fail(document.get("error")):
            self.seen = True
        self.finished(0, document.get("stop_type"))
        found: Document = {key: document[key] for key in ("tokens_predicted", "tokens_evaluated") if key in document}
        timings = part(document.get("timings"))
        if found and "cache_n" in timings:
            found["timings"] = {"cache_n": timings["cache_n"]}
        self.report(found)

    def fill(self, usage: Usage, raw: Document) -> None:
        usage.input_tokens = self.number(raw, "tokens_evaluated")
        usage.output_tokens = self.number(raw, "tokens_predicted")
        usage.cache_read_input_tokens = self.number(part(raw.get("timings")), "cache_n")


class TextGeneration(Reader):
    """TGI `/generate` and `/generate_stream`: `details`, of the last event or of the answer; and headers."""

    wanted: ClassVar[Tree] = {
        "details": {"finish_reason": True, "generated_tokens": True, "input_length": True},
        "generated_text": True,
        "error": True,
        "error_type": True,
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b'"generated_tokens"',)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"token"')
    header_names: ClassVar[tuple[str, ...]] = ("x-prompt-tokens", "x-generated-tokens")

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "generated_text" in document and "generated_tokens" in part(document.get("details"))

    def recognises(self, document: Document, event: str) -> bool:
        return "generated_text" in document or "token" in document

    def dull(self, block: bytes) -> bool:
        if not self.seen or b'"generated_tokens"' in block or b'"error"' in block:
            return False
        return 92 not in block or not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        self.seen = self.seen or "token" in document
        self.document(document)
        return self.final

    def document(self, document: Document) -> None:
        self.seen = self.seen or "generated_text" in document
        if self.fail(document.get("error_type") or document.get("error")):
            self.seen = True
        details = part(document.get("details"))
        self.finished(0, details.get("finish_reason"))
        found = {key: details[key] for key in ("generated_tokens", "input_length") if key in details}
        self.final = self.report(found) or self.final

    def fill(self, usage: Usage, raw: Document) -> None:
        usage.input_tokens = self.number(raw, "input_length")
        usage.output_tokens = self.number(raw, "generated_tokens")
        if usage.input_tokens is None:
            usage.input_tokens = count(self.headers.get("x-prompt-tokens"))

    def fill_from_headers(self, usage: Usage) -> bool:
        usage.input_tokens = count(self.headers.get("x-prompt-tokens"))
        usage.output_tokens = count(self.headers.get("x-generated-tokens"))
        return usage.input_tokens is not None


class TextEmbeddings(Cohere):
    """TEI: bare arrays; the count is in a header. The paths are shared with rerankers that answer objects."""

    header_names: ClassVar[tuple[str, ...]] = ("x-compute-tokens",)

    @classmethod
    def claims(cls, document: Document) -> bool:
        return False

    def recognises(self, document: Document, event: str) -> bool:
        return Cohere.claims(document)

    def head(self, headers: Mapping[str, str]) -> None:
        super().head(headers)
        self.seen = "x-compute-tokens" in headers
        self.provider = "huggingface.tei" if self.seen else None

    def fill_from_headers(self, usage: Usage) -> bool:
        usage.input_tokens = count(self.headers.get("x-compute-tokens"))
        return usage.input_tokens is not None
