"""Sound and pictures: transcriptions, speech and images, plain and as events, by OpenAI and those who imitate it.

OpenAI's answers name no model; the request does, for sound as a form field. Text formats (`text`, `srt`, `vtt`) and
the sound itself carry no usage at all. Mistral ends with `transcription.done` (its package), vLLM streams chunks in the
manner of chat completions (seen in captures); both count `prompt_tokens`. Verbose answers of servers that state no
usage still say how long the sound was.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.fields import fill_tokens
from sidecar.usage.formats.json_scanner import Tree
from sidecar.usage.providers.base import Document, Reader, escaped_key
from sidecar.usage.values import part

_LAST = ("transcript.text.done", "speech.audio.done", "image_generation.completed", "image_edit.completed")
_EVENTS = ("transcript.", "transcription.", "speech.", "audio.", "image_")  # the beginnings of their names
_LAST_WITH_USAGE = (".done", ".completed")  # others' last events, where they state it

_OF_INTEREST = re.compile(rb'"(?:usage|finish_reason)"(?!:\s*+null)').search


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
    end_signs: ClassVar[tuple[bytes, ...]] = (b".done", b".completed", b"[DONE]")

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
            return kind.startswith(_EVENTS)
        plain = any(key in document for key in ("text", "data", "created", "task"))
        return (plain and "choices" not in document) or self.claims(document)

    def dull(self, block: bytes) -> bool:
        return not (
            b".done" in block
            or b".completed" in block
            or b'"error"' in block
            or b"[DONE]" in block
            or _OF_INTEREST(block) is not None
        ) and not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        if self.fail(document.get("error")):
            self.seen = True
        usage = document.get("usage")
        if kind in _LAST or (usage and kind.endswith(_LAST_WITH_USAGE)):
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
