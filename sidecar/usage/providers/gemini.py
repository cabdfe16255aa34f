"""Gemini and Vertex: `usageMetadata`, repeated with running totals on every chunk; and the interactions API.

The candidates leave the thoughts out, mostly: the stated total tells (O3). Zero fields are left out by the wire's
encoding, so a missing candidates count beside a total that equals the input is a true zero. Server-sent events have no
end mark here and end with the body; the JSON array ends with its bracket.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import DONE, Document, Reader, Tree, fill_modalities
from sidecar.usage.providers.fields import google_tier
from sidecar.usage.values import count, name, part

_ANSWER: Tree = {
    "responseId": True,
    "modelVersion": True,
    "usageMetadata": True,
    "error": True,
    "promptFeedback": {"blockReason": True},
    "candidates": [{"index": True, "finishReason": True, "groundingMetadata": {"webSearchQueries": True}}],
    "embedding": {"statistics": True},
    "predictions": [{"embeddings": {"statistics": True}}],
    "metadata": {"billableCharacterCount": True},
}


class Gemini(Reader):
    wanted: ClassVar[Tree] = {**_ANSWER, "response": _ANSWER}
    keep: ClassVar[tuple[bytes, ...] | None] = (
        *(b'"usageMetadata"', b'"finishReason"', b'"error"', b'"blockReason"', b'"webSearchQueries"'),
    )
    skip_after: ClassVar[tuple[str, ...]] = ("model",)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"parts"')
    arrays_stream: ClassVar[bool] = True

    def __init__(self, anomaly: Callable[[str], None]) -> None:
        super().__init__(anomaly)
        self._characters: object = None
        self._searches = 0

    @classmethod
    def claims(cls, document: Document) -> bool:
        usage = part(document.get("usageMetadata"))
        if "promptTokenCount" not in usage and "totalTokenCount" not in usage:
            return False
        known = ("candidates", "modelVersion", "responseId", "embedding", "embeddings")
        return len(usage) > 1 or any(key in document for key in known)

    def recognises(self, document: Document, event: str) -> bool:
        return "candidates" in document or "usageMetadata" in document or "promptFeedback" in document

    def message(self, document: Document, event: str) -> bool:
        self.document(document)
        return False

    def done(self) -> bool:
        return False

    def document(self, document: Document) -> None:
        if "candidates" not in document and type(inner := document.get("response")) is dict:
            document = inner  # Cloud Code's envelope
        self.identify(document, "responseId", "modelVersion")
        if self.fail(document.get("error")):
            self.seen = True
        candidates = document.get("candidates")
        if type(candidates) is list:
            self.seen = True
            searches = 0
            for candidate in candidates:
                if type(candidate) is not dict:
                    continue
                if self.finished(candidate.get("index"), candidate.get("finishReason")):
                    self.final = True
                if "groundingMetadata" in candidate:
                    queries = part(candidate["groundingMetadata"]).get("webSearchQueries")
                    searches += len(queries) if type(queries) is list else 0
            self._searches = max(self._searches, searches)  # repeated, or longer, on the way
        if self.finished(0, part(document.get("promptFeedback")).get("blockReason")):
            self.seen = self.final = True
        usage = document.get("usageMetadata")
        self.report(usage)
        if not usage:
            self._embeddings(document)

    def _embeddings(self, document: Document) -> None:
        """Vertex states the tokens of embeddings one by one, and the characters it bills in one sum."""
        predictions = document.get("predictions")
        found = [part(part(p).get("embeddings")) for p in predictions] if type(predictions) is list else []
        found.append(part(document.get("embedding")))
        counts = [count(part(entry.get("statistics")).get("token_count")) for entry in found if entry]
        if counts and None not in counts:
            self.report({"promptTokenCount": sum(number for number in counts if number is not None)})
        self._characters = part(document.get("metadata")).get("billableCharacterCount")

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_gemini(self, usage, raw)
        if self._searches:
            usage.units["web_search_requests"] = self._searches
        characters = count(self._characters)
        if characters is not None:
            usage.units["billable_characters"] = characters


class CloudCode(Gemini):
    """Behind the paths of Cloud Code, as coding agents ask it: the same answer inside `response` (seen in captures)."""

    @classmethod
    def claims(cls, document: Document) -> bool:
        return Gemini.claims(part(document.get("response")))


class Vertex(Gemini):
    """The same shape behind Vertex's paths; an answer of an unknown path is taken for Gemini's own."""

    @classmethod
    def claims(cls, document: Document) -> bool:
        return False


def fill_gemini(reader: Reader, usage: Usage, raw: Document) -> None:
    number = reader.number
    prompt = number(raw, "promptTokenCount")
    tools = number(raw, "toolUsePromptTokenCount")
    thoughts = number(raw, "thoughtsTokenCount")
    live = "responseTokenCount" in raw
    said_at = "responseTokenCount" if live else "candidatesTokenCount"
    said = number(raw, said_at)
    total = count(raw.get("totalTokenCount"))
    if prompt is None and tools is None and total is not None and said is not None:
        prompt = max(0, total - said - (thoughts or 0))  # a zero that the wire leaves out, or a part of the total
    entered = None if prompt is None and tools is None else (prompt or 0) + (tools or 0)
    if said is not None and thoughts and total != (entered or 0) + said:
        said += thoughts
    elif said is None and thoughts is not None:
        said = thoughts
    elif said is None and entered is not None and total == entered:
        said = 0 if "candidatesTokensDetails" not in raw else None
    rejected = said is None and raw.get(said_at) is not None
    if entered is not None and total is not None and total > entered + (said or 0) and not rejected:
        said = total - entered  # O2: thoughts that only the total knows of
    usage.input_tokens = entered
    usage.output_tokens = said
    usage.tool_use_input_tokens = tools
    usage.reasoning_output_tokens = thoughts
    usage.cache_read_input_tokens = number(raw, "cachedContentTokenCount")
    usage.service_tier = name(raw.get("serviceTier")) or google_tier(raw.get("trafficType")) or usage.service_tier
    sides = (("input", "prompt"), ("output", "response" if live else "candidates"))
    for direction, side in sides:  # embeddings leave out an s
        fill_modalities(usage, direction, raw.get(f"{side}TokensDetails") or raw.get(f"{side}TokenDetails"))


class Interactions(Reader):
    """`POST …/interactions`: `usage` with `total_*` names; copies on the way, the last one counts."""

    wanted: ClassVar[Tree] = {
        "id": True,
        "model": True,
        "object": True,
        "status": True,
        "usage": True,
        "error": True,
        "event_type": True,
        "service_tier": True,
        "interaction": {"id": True, "model": True, "status": True, "usage": True, "service_tier": True, "error": True},
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b"interaction.completed", DONE)
    keep: ClassVar[tuple[bytes, ...] | None] = (b"interaction", b'"usage"', b'"error"', DONE)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb"step\.delta")
    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b"interaction")

    @classmethod
    def claims(cls, document: Document) -> bool:
        kind = document.get("event_type")
        if type(kind) is str and kind.startswith("interaction."):
            return type(document.get("interaction")) is dict
        return "total_input_tokens" in part(document.get("usage"))

    def recognises(self, document: Document, event: str) -> bool:
        return self.claims(document) or "interaction" in document or document.get("object") == "interaction"

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("event_type")
        if type(kind) is not str:
            kind = event
        if type(whole := document.get("interaction")) is dict:
            self.document(whole)
        elif kind == "error":
            self.fail(document.get("error") or "error")
        if kind in ("step.stop", "interaction.status_update"):
            self.report(document.get("usage"))
        if kind == "interaction.completed":
            self.seen = self.final = True
            return True
        return False

    def document(self, document: Document) -> None:
        self.seen = True
        self.identify(document)
        if tier := name(document.get("service_tier")):
            self.service_tier = tier
        self.fail(document.get("error"))
        if document.get("status") not in (None, "in_progress"):
            self.finished(0, document.get("status"))
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        number = self.number
        entered = number(raw, "total_input_tokens")
        tools = number(raw, "total_tool_use_tokens")
        said = number(raw, "total_output_tokens")
        thoughts = number(raw, "total_thought_tokens")
        total = count(raw.get("total_tokens"))
        if said is not None and thoughts and total != (entered or 0) + (tools or 0) + said:
            said += thoughts
        rest = 0 if total is None or entered is None else total - entered - (said or 0)
        if entered is not None and tools and rest >= tools:
            entered += tools
            rest -= tools
        if rest > 0 and (said is not None or raw.get("total_output_tokens") is None):
            said = (said or 0) + rest  # O2
        usage.input_tokens = entered
        usage.output_tokens = said
        usage.tool_use_input_tokens = tools
        usage.reasoning_output_tokens = thoughts
        usage.cache_read_input_tokens = number(raw, "total_cached_tokens")
        tools_used = raw.get("grounding_tool_count")
        searches = 0
        for entry in map(part, tools_used if type(tools_used) is list else ()):
            searches += count(entry.get("count")) or 0 if entry.get("type") == "google_search" else 0
        if searches:
            usage.units["web_search_requests"] = searches
        fill_modalities(usage, "input", raw.get("input_tokens_by_modality"), amount="tokens")
        fill_modalities(usage, "output", raw.get("output_tokens_by_modality"), amount="tokens")
