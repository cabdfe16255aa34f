"""OpenAI's shapes (chat completions, embeddings, responses, sound, pictures, assistants), and all that speak them.

Azure, Mistral, Groq, DeepSeek, xAI, Moonshot, OpenRouter, Perplexity, Together, Fireworks, vLLM, SGLang, llama.cpp,
Ollama and TGI answer in this shape and differ in where in a stream the usage stands: on a chunk of its own, on the
last content chunk, on every chunk as a running total, inside `choices[0]` or inside `x_groq`. All of these are
known places; the last report wins (M1 to M3). What the numbers of a usage object mean is settled in `fields`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import DONE, Document, Reader, Tree
from sidecar.usage.providers.fallback import NOT_FINISHED
from sidecar.usage.providers.fields import fill_tokens, google_tier
from sidecar.usage.values import count, name, part

# One search instead of many: a member of interest that is not null.
_OF_INTEREST = re.compile(rb'"(?:usage"(?!:\s*+null)|finish_reason"(?!:\s*+null)|error")')


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
    end_signs: ClassVar[tuple[bytes, ...]] = (DONE,)
    keep: ClassVar[tuple[bytes, ...] | None] = (DONE, b"event: error")
    keep_pattern: ClassVar[re.Pattern[bytes] | None] = _OF_INTEREST
    skip_after: ClassVar[tuple[str, ...]] = ("response_id", "model")
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(
        rb'"(?:content|reasoning|reasoning_content|text|arguments|refusal)"\s*:\s*"[^"]'
    )

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
        if len(self.finish_reasons) >= self.choices:  # running totals are final only when all of them have ended
            self.final = True

    def _groq(self, groq: Document) -> None:
        self.provider = "groq"
        self.fail(groq.get("error"))
        self.report(groq.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)
        if "extra_properties" in raw:  # of Google's models behind this surface
            google = part(part(raw["extra_properties"]).get("google"))
            usage.service_tier = google_tier(google.get("traffic_type")) or usage.service_tier


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


# Responses: `input_tokens`/`output_tokens`, and streams of typed events. The usage of a stream is inside `.response` of
# the one terminal event; every other event is skipped by its bytes.

TERMINAL = ("response.completed", "response.incomplete", "response.failed")

# A stream is one answer, so other servers' words for its end are taken as well: realtime's, and that of an answer that
# was cancelled (unverified). A socket holds many answers, and whoever sends both words there must not count twice.
_ENDS = (*TERMINAL, "response.done", "response.cancelled")

_RESPONSE: Tree = {
    "id": True,
    "object": True,
    "model": True,
    "status": True,
    "background": True,
    "service_tier": True,
    "incomplete_details": True,
    "error": True,
    "usage": True,
    "tool_usage": True,
}


_NO_TOOLS: Mapping[str, int] = {}


def tools_used(document: Document) -> dict[str, int]:
    """What a response's own tools consumed beside its tokens, as units; those that were not used are left out.

    `tool_usage.web_search.num_requests`, and the tokens of the model that made pictures for this one in
    `tool_usage.image_gen`: seen in captures of 2026 (https://github.com/router-for-me/CLIProxyAPI reads them so).
    """
    tools = document.get("tool_usage")
    if type(tools) is not dict:
        return {}
    units: dict[str, int] = {}
    if searches := count(part(tools.get("web_search")).get("num_requests")):
        units["web_search_requests"] = searches
    pictures = part(tools.get("image_gen"))
    both = sum(count(pictures.get(key)) or 0 for key in ("input_tokens", "output_tokens"))
    if tokens := max(both, count(pictures.get("total_tokens")) or 0):
        units["image_tool_tokens"] = tokens
    return units


class Responses(Reader):
    wanted: ClassVar[Tree] = {**_RESPONSE, "type": True, "code": True, "response": _RESPONSE}
    end_signs: ClassVar[tuple[bytes, ...]] = (*(kind.encode() for kind in _ENDS), DONE)
    keep: ClassVar[tuple[bytes, ...] | None] = (b'"error"', b"event: error", *end_signs)
    skip_after: ClassVar[tuple[str, ...]] = ("response_id",)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"response\.[a-z_.]+\.delta"')

    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b'"response"', b'"response.')

    tools: Mapping[str, int] = _NO_TOOLS

    @classmethod
    def claims(cls, document: Document) -> bool:
        if document.get("object") in ("response", "response.compaction"):
            return "usage" in document
        kind = document.get("type")
        if type(kind) is not str or not kind.startswith("response."):
            return False
        inner = part(document.get("response"))
        return inner.get("object") == "response" or (kind in TERMINAL and bool(part(inner.get("usage"))))

    def recognises(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        return kind.startswith("response.") or document.get("object") in ("response", "response.compaction")

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        response = document.get("response")
        if kind == "error" or (kind == "" and "error" in document):
            self.seen = True
            error = document.get("error")
            self.fail(error or {"type": document.get("code"), "code": document.get("code")})
        elif type(response) is dict and kind.startswith("response."):
            self.document(response)
            self.final = kind in _ENDS
        return kind in _ENDS

    def document(self, document: Document) -> None:
        if document.get("object") in ("response", "response.compaction") or "usage" in document:
            self.seen = True
        self.identify(document)
        if tier := name(document.get("service_tier")):
            self.service_tier = tier
        if self.fail(document.get("error")):
            self.seen = True
        status = name(document.get("status"))
        if status in ("queued", "in_progress"):
            if document.get("background") is True:
                self.reason = NOT_FINISHED
        elif status is not None:
            self.reason = None
            detail = name(part(document.get("incomplete_details")).get("reason"))
            self.finished(0, detail if status == "incomplete" and detail else status)
        self.report(document.get("usage"))
        if "tool_usage" in document:
            self.tools = tools_used(document) or self.tools

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)
        usage.units.update(self.tools)


# Sound and pictures: transcriptions, speech and images, plain and as events, by OpenAI and those who imitate it.
#
# OpenAI's responses name no model; the request does, for sound as a form field. Text formats (`text`, `srt`, `vtt`) and
# the sound itself carry no usage at all. Mistral ends with `transcription.done` (its package), vLLM streams chunks in
# the manner of chat completions (seen in captures); both count `prompt_tokens`. Verbose responses of servers that state
# no usage still say how long the sound was.

_MEDIA_ENDS = ("transcript.text.done", "speech.audio.done", "image_generation.completed", "image_edit.completed")
_MEDIA_EVENTS = ("transcript.", "transcription.", "speech.", "audio.", "image_")  # the beginnings of their names
_ENDINGS = (".done", ".completed")  # others' last events, where they state it

_MEDIA_OF_INTEREST = re.compile(rb'"(?:usage|finish_reason)"(?!:\s*+null)')


class Media(Reader):
    wanted: ClassVar[Tree] = {
        "id": True,
        "type": True,
        "object": True,
        "usage": True,
        "error": True,
        "created": True,
        "task": True,
        "duration": True,
        "model": True,
        "choices": [{"index": True, "finish_reason": True}],
        "data": [{}],  # that it is there
    }
    end_signs: ClassVar[tuple[bytes, ...]] = (b".done", b".completed", DONE)
    keep: ClassVar[tuple[bytes, ...] | None] = (b".done", b".completed", b'"error"', DONE)
    keep_pattern: ClassVar[re.Pattern[bytes] | None] = _MEDIA_OF_INTEREST

    @classmethod
    def claims(cls, document: Document) -> bool:
        """A transcription: its last event, its chunks, or the two members that no other usage has."""
        usage = part(document.get("usage"))
        if document.get("type") in ("transcription.done", "transcript.text.done"):
            return bool(usage)
        if "choices" in document:
            return document.get("object") == "transcription.chunk"
        return usage.get("type") in ("tokens", "duration") or "prompt_audio_seconds" in usage

    def recognises(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        if kind:
            return kind.startswith(_MEDIA_EVENTS)
        plain = any(key in document for key in ("text", "data", "created", "task"))
        return (plain and "choices" not in document) or self.claims(document)

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        if self.fail(document.get("error")):
            self.seen = True
        usage = document.get("usage")
        if kind in _MEDIA_ENDS or (usage and kind.endswith(_ENDINGS)):
            self.identify(document)
            self.report(usage)
            self.seen = self.final = True
            return True
        if type(choices := document.get("choices")) is list:
            self._chunk(document, choices)
        return False

    def _chunk(self, document: Document, choices: list[Any]) -> None:
        self.seen = True
        self.identify(document)
        for choice in choices:
            self.finished(part(choice).get("index"), part(choice).get("finish_reason"))
        if self.report(document.get("usage")) and (not choices or self.finish_reasons):
            self.final = True

    def done(self) -> bool:
        self.final = self.final or self.raw is not None
        return True

    def document(self, document: Document) -> None:
        self.seen = self.seen or any(key in document for key in ("text", "data", "created", "task"))
        self.identify(document)
        if self.fail(document.get("error")):
            self.seen = True
        if not self.report(document.get("usage")) and "duration" in document and "task" in document:
            self.report({"type": "duration", "seconds": document["duration"]})

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)


class Speech(Media):
    """Text made into sound."""

    @classmethod
    def claims(cls, document: Document) -> bool:
        return document.get("type") == "speech.audio.done" and bool(document.get("usage"))


class Images(Media):
    """Pictures: a list of data without a name, and what it cost."""

    @classmethod
    def claims(cls, document: Document) -> bool:
        usage = part(document.get("usage"))
        if document.get("type") in ("image_generation.completed", "image_edit.completed"):
            return bool(usage)
        if "created" not in document or type(document.get("data", [])) is not list or "object" in document:
            return False
        return any(key in usage for key in ("output_tokens", "generated_images", "cost_in_usd_ticks"))


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
    end_signs: ClassVar[tuple[bytes, ...]] = (b"thread.run", DONE)
    claim_signs: ClassVar[tuple[bytes, ...]] = (b'"thread.run"',)
    keep: ClassVar[tuple[bytes, ...] | None] = (b'"thread.run"', b"thread.run.", b"error", DONE)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb"thread\.message\.delta")

    _ENDS = ("completed", "incomplete", "failed", "cancelled", "expired")

    @classmethod
    def claims(cls, document: Document) -> bool:
        """The beginning of a stream; a finished run may be a stored one."""
        return document.get("object") == "thread.run" and document.get("status") in ("queued", "in_progress")

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
