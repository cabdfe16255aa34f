"""The native routes of model servers: llama.cpp, TGI, TEI, SGLang and LM Studio (Ollama has a file of its own)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import CHOICES_MAX, DONE, Document, Reader, Tree
from sidecar.usage.providers.cohere import Cohere
from sidecar.usage.providers.declared import DeclaredReader
from sidecar.usage.values import count, name, overlay, part


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
    end_signs: ClassVar[tuple[bytes, ...]] = (b'"stop":true', b'"stop": true', DONE)
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
    end_signs: ClassVar[tuple[bytes, ...]] = (b'"generated_tokens"', DONE)
    keep: ClassVar[tuple[bytes, ...] | None] = (b'"generated_tokens"', b'"error"', DONE)
    skip_after: ClassVar[tuple[str, ...]] = ("seen",)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"token"')
    header_names: ClassVar[tuple[str, ...]] = ("x-prompt-tokens", "x-generated-tokens")

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "generated_text" in document and "generated_tokens" in part(document.get("details"))

    def recognises(self, document: Document, event: str) -> bool:
        return "generated_text" in document or "token" in document

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

    NAME: ClassVar[str] = "huggingface.tei"
    header_names: ClassVar[tuple[str, ...]] = ("x-compute-tokens",)

    @classmethod
    def claims(cls, document: Document) -> bool:
        return False

    def recognises(self, document: Document, event: str) -> bool:
        return Cohere.claims(document)

    def head(self, headers: Mapping[str, str]) -> None:
        super().head(headers)
        self.seen = "x-compute-tokens" in headers
        self.provider = self.NAME if self.seen else None

    def fill_from_headers(self, usage: Usage) -> bool:
        usage.input_tokens = count(self.headers.get("x-compute-tokens"))
        return usage.input_tokens is not None


class SGLang(DeclaredReader):
    """`/generate`: `meta_info`, running totals in a stream; a batch is a list, or events of several ids, each counted.

    With several samples of one prompt (`n`) each of them states the prompt: that is not to be seen in an answer.
    """

    numbers_at = (
        "meta_info.prompt_tokens",
        "meta_info.completion_tokens",
        "meta_info.cached_tokens",
        "meta_info.reasoning_tokens",
    )
    id_at = ("meta_info.id", "index")
    finish_at = ("meta_info.finish_reason",)
    told_by = (("meta_info.prompt_tokens", "meta_info.completion_tokens"),)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._parts: dict[object, tuple[int, Document]] = {}  # id -> its place, its counts
        self._sums: dict[str, int] = {}
        self._going_on = 0
        self._unnamed = 0  # elements of a list that had no id, and have ended

    def document(self, document: Document) -> None:
        meta = part(document.get("meta_info"))
        keys = (path.rpartition(".")[2] for path in self.numbers_at)
        counts = {key: meta[key] for key in keys if key in meta}
        if not counts:
            self._fails(document)
            return
        key: object = name(meta.get("id")) or (count(document.get("index")), self._unnamed)
        if key not in self._parts and len(self._parts) >= CHOICES_MAX:
            self.anomaly("batch_answers_dropped")
            return
        place, before = self._parts.get(key, (len(self._parts), {}))
        after = overlay(before, counts)
        self._going_on += key not in self._parts
        self._parts[key] = (place, after)
        for field, value in after.items():
            self._sums[field] = self._sums.get(field, 0) + (count(value) or 0) - (count(before.get(field)) or 0)
        self.raw = after if len(self._parts) == 1 else dict(self._sums)
        self.seen = True
        self.response_id = self.response_id or name(meta.get("id"))
        reason = meta.get("finish_reason")
        if place not in self.finish_reasons and self.finished(place, part(reason).get("type", reason)):
            self._going_on -= 1
            self._unnamed += type(key) is tuple
        self.final = self._going_on == 0


class LmStudio(DeclaredReader):
    """LM Studio's own chat: `stats`; streamed, in the result of the last event."""

    usage_at = ("stats", "result.stats")
    names: ClassVar[Mapping[str, str]] = {"total_output_tokens": "output_tokens"}
    model_at = ("model_instance_id", "result.model_instance_id")
    id_at = ("response_id", "result.response_id")
    last_events = ("chat.end",)
    told_by = (
        ("model_instance_id", "stats.input_tokens"),
        ("result.model_instance_id", "result.stats.input_tokens"),
    )
    must = (b"chat.end", b"chat.start")

    @classmethod
    def claims(cls, document: Document) -> bool:
        return super().claims(document) or (document.get("type") == "chat.start" and "model_instance_id" in document)
