"""OpenAI's sound and pictures: transcriptions, speech and images, plain and as events.

The answers name no model; the request does, for sound as a form field. Text formats (`text`, `srt`, `vtt`) and
the sound itself carry no usage at all.
"""

from __future__ import annotations

from typing import ClassVar

from sidecar.exchange import Usage
from sidecar.usage.fields import fill_tokens
from sidecar.usage.members import Tree
from sidecar.usage.reader import Document, Reader, escaped_key

_LAST = ("transcript.text.done", "speech.audio.done", "image_generation.completed", "image_edit.completed")


class Media(Reader):
    wanted: ClassVar[Tree] = {"type": True, "usage": True, "error": True, "created": True, "task": True, "model": True}
    end_signs: ClassVar[tuple[bytes, ...]] = (b".done", b".completed")

    def dull(self, block: bytes) -> bool:
        return not (
            b".done" in block or b".completed" in block or b'"error"' in block or b"[DONE]" in block
        ) and not escaped_key(block)

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        if self.fail(document.get("error")):
            self.seen = True
        if kind not in _LAST:
            return False
        self.seen = self.final = True
        self.report(document.get("usage"))
        return True

    def done(self) -> bool:
        return True

    def document(self, document: Document) -> None:
        self.seen = self.seen or any(key in document for key in ("text", "data", "created", "task"))
        self.identify(document)
        if self.fail(document.get("error")):
            self.seen = True
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)
