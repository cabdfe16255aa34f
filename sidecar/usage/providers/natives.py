"""The vendors' own APIs, one class of data each (see `native`), and the few that need a line of code.

Where the places are from. Seen in public captures, threads or code that reads them: Workers AI (`result.usage`),
watsonx (its streams run their counts, state the input once and zeros after it, and say `not_finished` on the way),
Oracle OCI (plain and streamed), SGLang (`meta_info`), LM Studio (`stats`, and `chat.end`), Qianfan, the headers of
ElevenLabs and Deepgram. From a published package: Reka. Unverified, from memory of the vendors' pages: Reka's stream
(running counts), DashScope, Jina's reader, Deepgram's `metadata`, the order of Snowflake Cortex's events. A place that
is wrong is a line here, and costs a call without usage, which is counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.fields import fill_tokens
from sidecar.usage.formats.json_scanner import Tree
from sidecar.usage.providers.base import CHOICES_MAX, Document, Reader, escaped_key
from sidecar.usage.providers.native import HeaderUnits, Native
from sidecar.usage.providers.openai import ChatCompletions
from sidecar.usage.values import count, name, overlay, part


class WorkersAi(Native):
    """Cloudflare: plain answers in an envelope; events bare, padded with `p`, the last one with `usage`."""

    usage_at = ("result.usage", "usage")
    told_by = (("success", "result.usage.prompt_tokens"),)
    must = (b'"usage"',)

    @classmethod
    def claims(cls, document: Document) -> bool:
        if super().claims(document):
            return True
        bare = type(document.get("response")) is str and "done" not in document
        return bare and (type(document.get("p")) is str or "prompt_tokens" in part(document.get("usage")))


class Watsonx(Native):
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


class Cortex(ChatCompletions):
    """Snowflake: OpenAI's shape, with neither a finish reason nor an end mark; its usage is empty until it is told."""

    @classmethod
    def claims(cls, document: Document) -> bool:
        return False

    def report(self, raw: object) -> bool:
        told = super().report(raw)
        self.final = self.final or told
        return told


class Oci(Native):
    """Oracle: `chatResponse`; streamed, the usage is an event of its own behind the finish, where it was asked for."""

    usage_at = ("chatResponse.usage", "usage")
    names: ClassVar[Mapping[str, str]] = {
        "promptTokens": "prompt_tokens",
        "completionTokens": "completion_tokens",
        "totalTokens": "total_tokens",
        "promptTokensDetails": "prompt_tokens_details",
        "completionTokensDetails": "completion_tokens_details",
        "cachedTokens": "cached_tokens",
        "reasoningTokens": "reasoning_tokens",
        "acceptedPredictionTokens": "accepted_prediction_tokens",
        "rejectedPredictionTokens": "rejected_prediction_tokens",
    }
    model_at = ("modelId",)
    finish_at = ("chatResponse.choices[].finishReason", "chatResponse.finishReason", "finishReason")
    told_by = (("modelId", "chatResponse.apiFormat"), ("pad", "usage.promptTokens"))
    usage_is_last = True
    must = (b'"usage"', b"finishReason")

    def _ends(self, document: Document) -> None:
        """The finish comes before the usage, and is not the end of the counting."""
        final = self.final
        super()._ends(document)
        self.final = final


class DashScope(Native):
    """Alibaba's own API: the usage of each event is a running total."""

    usage_at = ("usage",)
    names: ClassVar[Mapping[str, str]] = {"image_tokens": "image_input_tokens", "audio_tokens": "audio_input_tokens"}
    id_at = ("request_id",)
    finish_at = ("output.choices[].finish_reason", "output.finish_reason")
    told_by = (
        ("request_id", "usage.input_tokens", "output.choices[].finish_reason"),
        ("request_id", "usage.input_tokens", "output.finish_reason"),
        ("request_id", "usage.total_tokens", "output.embeddings[].text_index"),
    )

    def fill(self, usage: Usage, raw: Document) -> None:
        super().fill(usage, raw)
        if usage.input_tokens is None and usage.output_tokens is None:
            usage.input_tokens = usage.total_tokens  # of embeddings and rerankers: nothing is generated


class DashScopeApps(Native):
    """An application may ask several models; each has its counts in a list."""

    numbers_at = ("usage.models[].input_tokens", "usage.models[].output_tokens")
    model_at = ("usage.models[].model_id",)
    id_at = ("request_id",)
    finish_at = ("output.finish_reason",)
    told_by = (("request_id", "usage.models[].input_tokens"),)


class Qianfan(Native):
    """Baidu's first API: OpenAI's names beside `result`; the last event has `is_end`."""

    usage_at = ("usage",)
    finish_at = ("finish_reason",)
    last_flag = "is_end"
    told_by = (("is_truncated", "usage.prompt_tokens"), ("sentence_id", "is_end"))

    def _ends(self, document: Document) -> None:
        super()._ends(document)
        if document.get("is_end") is False:
            self.final = False


class SGLang(Native):
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


class LmStudio(Native):
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


class Reka(Native):
    usage_at = ("usage",)
    finish_at = ("responses[].finish_reason",)
    told_by = (("responses[]", "usage.input_tokens"),)


class JinaReader(Native):
    """Pages as text, on any path: tokens without a side, of the page or of all pages of a search."""

    numbers_at = ("meta.usage.tokens", "data.usage.tokens")
    names: ClassVar[Mapping[str, str]] = {"tokens": "total_tokens"}
    told_by = (("code", "meta.usage.tokens"), ("code", "data.usage.tokens"))


class Deepgram(Native):
    """Sound by the second, of one channel: the price may be that of several."""

    numbers_at = ("metadata.duration",)
    names: ClassVar[Mapping[str, str]] = {"duration": "audio_seconds"}
    id_at = ("metadata.request_id",)
    told_by = (("metadata.request_id", "metadata.duration", "metadata.channels"),)


class AssistantRuns(Reader):
    """OpenAI's assistants, streamed: the usage of a run is in its last event; that of its steps is a part of it."""

    wanted: ClassVar[Tree] = {
        "id": True,
        "object": True,
        "model": True,
        "status": True,
        "usage": True,
        "error": True,
        "last_error": True,
        "incomplete_details": True,
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b"thread.run",)
    claim_signs: ClassVar[tuple[bytes, ...]] = (b'"thread.run"',)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb"thread\.message\.delta")

    _ENDS = ("completed", "incomplete", "failed", "cancelled", "expired")

    @classmethod
    def claims(cls, document: Document) -> bool:
        """The beginning of a stream; a finished run may be a stored one."""
        return document.get("object") == "thread.run" and document.get("status") in ("queued", "in_progress")

    def dull(self, block: bytes) -> bool:
        if b'"thread.run"' in block or b"thread.run." in block or b"error" in block:
            return False
        return 92 not in block or not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        if event == "error":
            self.seen = True
            self.fail(document.get("error") or document)
        if document.get("object") != "thread.run":
            return False
        self.document(document)
        self.final = document.get("status") in self._ENDS
        return self.final

    def done(self) -> bool:
        return True

    def document(self, document: Document) -> None:
        self.seen = self.seen or document.get("object") == "thread.run"
        self.identify(document)
        self.fail(document.get("last_error") or document.get("error"))
        status = name(document.get("status"))
        self.reason = None if status in self._ENDS else "a run: its usage is known only when it has ended"
        if status in self._ENDS:
            detail = name(part(document.get("incomplete_details")).get("reason"))
            self.finished(0, detail if status == "incomplete" and detail else status)
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)


class Fal(HeaderUnits):
    """Any path; what a unit is depends on the model."""

    units_in: ClassVar[Mapping[str, str]] = {"x-fal-billable-units": "billable_units"}


class ElevenLabs(HeaderUnits):
    units_in: ClassVar[Mapping[str, str]] = {"character-cost": "characters"}


class DeepgramSpeak(HeaderUnits):
    units_in: ClassVar[Mapping[str, str]] = {"dg-char-count": "characters"}
