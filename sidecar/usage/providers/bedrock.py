"""AWS Bedrock: Converse and InvokeModel, plain and in binary frames.

Converse counts leave both cache counts out, like Anthropic's (O1). InvokeModel hands on the model's own body, so the
shape is the model family's; beside it stand headers, and in a stream the metrics of the last chunk. These say the same
once more and are asked only where the body says nothing (M3). The model is only in the path.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.base import Document, Reader, Tree, known
from sidecar.usage.providers.fields import fill_tokens, settle_total
from sidecar.usage.values import count, error_word, lenient_loads, name, overlay, part

_METRICS = "amazon-bedrock-invocationMetrics"
_HEADERS = "x-amzn-bedrock-"
_TTL = {"5m": "cache_write_5m_input_tokens", "1h": "cache_write_1h_input_tokens"}
_ADDED = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheWriteInputTokens")
_DULL_CHUNK = b'{"bytes":"eyJ0eXBlIjoiY29udGVudF9ibG9ja19kZWx0YSI'  # {"type":"content_block_delta"


class _Frames(Reader):
    """What both kinds of stream share: exceptions and errors come as frames of their own."""

    def frame(self, headers: Mapping[str, str], payload: bytes) -> bool:
        self.seen = True
        kind = headers.get(":message-type", "event")
        if kind == "event":
            return self.take(headers.get(":event-type", ""), payload)
        word = headers.get(":exception-type") or headers.get(":error-code") or ""
        self.error = error_word({"type": word})
        return False

    def take(self, event: str, payload: bytes) -> bool:
        raise NotImplementedError


class Converse(_Frames):
    wanted: ClassVar[Tree] = {
        "usage": True,
        "stopReason": True,
        "serviceTier": True,
        "output": {"message": {"role": True}},
        "metrics": True,
        "trace": {"promptRouter": True},
    }
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb"contentBlockDelta")

    frame_events: ClassVar[tuple[str, ...]] = (
        *("messageStart", "contentBlockStart", "contentBlockDelta", "contentBlockStop", "messageStop", "metadata"),
    )
    skip_frames: ClassVar[tuple[bytes, ...]] = (b"contentBlock",)

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "inputTokens" in part(document.get("usage")) and "stopReason" in document

    def take(self, event: str, payload: bytes) -> bool:
        if event == "messageStop":
            self.finished(0, part(lenient_loads(payload)).get("stopReason"))
        elif event == "metadata":
            self.document(part(lenient_loads(payload)))
            self.final = True
            return True
        return False

    def document(self, document: Document) -> None:
        self.seen = self.seen or "output" in document or "usage" in document
        self.finished(0, document.get("stopReason"))
        self.service_tier = name(part(document.get("serviceTier")).get("type")) or self.service_tier
        router = part(part(document.get("trace")).get("promptRouter"))
        self.model = name(router.get("invokedModelId")) or self.model
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_converse(self, usage, raw)


class Agents(Converse):
    """`InvokeAgent`: usage stands in the traces alone, where they were asked for; one for each call of a model.

    Whatever kind of trace it is (orchestration, routing, before, after), the counts are in the metadata of its model
    invocation: `{"trace": {"orchestrationTrace": {"modelInvocationOutput": {"metadata": {"usage": …}}}}}` (seen
    in public code that reads it). Those of a collaborator come as traces of its own. They are added up. The
    answer is the `chunk` behind them; there is no other end mark.
    """

    wanted: ClassVar[Tree] = {}
    frame_events: ClassVar[tuple[str, ...]] = ("trace", "returnControl")  # `chunk` is `InvokeModel`'s as well
    skip_frames: ClassVar[tuple[bytes, ...]] = ()
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"bytes"')

    @classmethod
    def claims(cls, document: Document) -> bool:
        return False

    def take(self, event: str, payload: bytes) -> bool:
        if event == "trace":
            self._trace(part(part(lenient_loads(payload)).get("trace")))
        elif event in ("chunk", "returnControl"):
            self.final = True
        return False

    def document(self, document: Document) -> None:
        """What comes in no frames is no agent's answer: the paths are other APIs' as well."""

    def _trace(self, trace: Document) -> None:
        for kind in trace.values():
            output = part(part(kind).get("modelInvocationOutput"))
            used = part(part(output.get("metadata")).get("usage"))
            for key in _ADDED:
                if (amount := self.number(used, key)) is not None:
                    self.raw = self.raw or {}
                    self.raw[key] = self.raw.get(key, 0) + amount


def fill_converse(reader: Reader, usage: Usage, raw: Document) -> None:
    number = reader.number
    read = number(raw, "cacheReadInputTokens")
    if read is None:
        read = number(raw, "cacheReadInputTokenCount")
    write = number(raw, "cacheWriteInputTokens")
    if write is None:
        write = number(raw, "cacheWriteInputTokenCount")
    plain = number(raw, "inputTokens")
    usage.input_tokens = None if plain is None else plain + (read or 0) + (write or 0)
    usage.output_tokens = number(raw, "outputTokens")
    usage.cache_read_input_tokens = read
    usage.cache_write_input_tokens = write
    details = raw.get("cacheDetails")
    for entry in details if type(details) is list else ():
        field = _TTL.get(str(part(entry).get("ttl")))
        if field is not None and (amount := number(entry, "inputTokens")) is not None:
            setattr(usage, field, (getattr(usage, field) or 0) + amount)
    settle_total(usage, {"total_tokens": raw.get("totalTokens")})


class Invoke(_Frames):
    """The model's own body: Anthropic's, Amazon's, Meta's, or one in OpenAI's shape."""

    wanted: ClassVar[Tree] = {
        **Messages.wanted,
        "usage": True,
        "stopReason": True,
        "output": {"message": {"role": True}},
        "inputTextTokenCount": True,
        "results": [{"tokenCount": True, "completionReason": True}],
        "prompt_token_count": True,
        "generation_token_count": True,
        "choices": [{"index": True, "finish_reason": True}],
    }
    header_names: ClassVar[tuple[str, ...]] = tuple(
        f"{_HEADERS}{name}-token-count" for name in ("input", "output", "cache-read-input", "cache-write-input")
    )
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"bytes"')

    frame_events: ClassVar[tuple[str, ...]] = ("chunk",)

    @classmethod
    def claims(cls, document: Document) -> bool:
        return "inputTextTokenCount" in document or (
            "prompt_token_count" in document and "generation_token_count" in document
        )

    def recognises(self, document: Document, event: str) -> bool:
        """The body is the model's own, and whatever is known of it is read here."""
        known = ("usage", "inputTextTokenCount", "prompt_token_count", "generation_token_count", "choices")
        return any(key in document for key in known) or document.get("type") in ("message", "error")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._anthropic = Messages(self.anomaly)
        self._metrics: Document | None = None

    def head(self, headers: Mapping[str, str]) -> None:
        super().head(headers)
        self.seen = any(name in headers for name in self.header_names)

    def take(self, event: str, payload: bytes) -> bool:
        if event != "chunk" or payload.startswith(_DULL_CHUNK):
            return False
        inner = self._inner(payload)
        if not inner:
            return False
        metrics = inner.get(_METRICS)
        if type(inner.get("type")) is str:
            self._anthropic.message(inner, "")
            self._adopt()
        else:
            self.document(inner)
        if type(metrics) is dict:
            self._metrics = metrics
            self.final = True
            return True
        return False

    def _inner(self, payload: bytes) -> Document:
        coded = part(lenient_loads(payload)).get("bytes")
        if type(coded) is not str:
            return {}
        try:
            return part(lenient_loads(b64decode(coded, validate=True)))
        except (binascii.Error, ValueError):
            self.anomaly("message_unreadable")
            return {}

    def _adopt(self) -> None:
        """What the inner reader knows is what this one knows."""
        inner = self._anthropic
        self.model, self.response_id, self.error = inner.model, inner.response_id, inner.error or self.error
        self.finish_reasons, self.service_tier = inner.finish_reasons, inner.service_tier
        self.raw, self.final = inner.raw, self.final or inner.final

    def document(self, document: Document) -> None:
        self.seen = True
        if document.get("type") in ("message", "error"):
            self._anthropic.document(document)
            self._adopt()
            return
        self.identify(document)
        self.finished(0, document.get("stopReason") or document.get("stop_reason"))
        choices = document.get("choices")
        for choice in choices if type(choices) is list else ():
            self.finished(part(choice).get("index"), part(choice).get("finish_reason"))
        nova = part(document.get("metadata")).get("usage")
        flat: Document = {
            key: document[key]
            for key in ("inputTextTokenCount", "prompt_token_count", "generation_token_count")
            if key in document
        }
        if "results" in document and flat:
            results = document["results"] if type(document["results"]) is list else []
            counts = [count(part(result).get("tokenCount")) for result in results]
            flat["tokenCount"] = sum(number or 0 for number in counts) if counts and None not in counts else None
            self.finished(0, part(results[0]).get("completionReason") if results else None)
        self.report(document.get("usage")) or self.report(nova) or self.report(flat)

    def fill(self, usage: Usage, raw: Document) -> None:
        if "input_tokens" in raw:
            self._anthropic.fill(usage, raw)
        elif "inputTokens" in raw:
            fill_converse(self, usage, raw)
        elif "prompt_tokens" in raw:
            fill_tokens(self, usage, raw)
        elif "inputTextTokenCount" in raw:
            usage.input_tokens = self.number(raw, "inputTextTokenCount")
            usage.output_tokens = self.number(raw, "tokenCount")
        else:
            usage.input_tokens = self.number(raw, "prompt_token_count")
            usage.output_tokens = self.number(raw, "generation_token_count")

    def fill_from_headers(self, usage: Usage) -> bool:
        """The stream's last metrics, then the headers: all of them leave the cache counts out."""
        raw = self._metrics
        if raw is None:
            names = zip(
                ("inputTokenCount", "outputTokenCount", "cacheReadInputTokenCount", "cacheWriteInputTokenCount"),
                self.header_names,
                strict=True,
            )
            raw = {ours: self.headers[theirs] for ours, theirs in names if theirs in self.headers}
        if not raw:
            return False
        spelled = {"inputTokenCount": "inputTokens", "outputTokenCount": "outputTokens"}
        fill_converse(self, usage, {spelled.get(key, key): value for key, value in raw.items()})
        usage.raw_usage = overlay(None, raw)
        return known(usage)
