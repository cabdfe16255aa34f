"""OpenAI's responses shape: `input_tokens`/`output_tokens`, and streams of typed events.

In a stream the usage is inside `.response` of the one terminal event; every other event is waved through by its bytes.
"""

from __future__ import annotations

import re
from typing import ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.fields import fill_tokens
from sidecar.usage.formats.json_scanner import Tree
from sidecar.usage.providers.base import Document, Reader, escaped_key
from sidecar.usage.values import name, part

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
}


class Responses(Reader):
    wanted: ClassVar[Tree] = {**_RESPONSE, "type": True, "code": True, "response": _RESPONSE}
    end_signs: ClassVar[tuple[bytes, ...]] = tuple(kind.encode() for kind in _ENDS)
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb'"response\.[a-z_.]+\.delta"')

    claim_signs: ClassVar[tuple[bytes, ...]] = (b"sage", b'"response"', b'"response.')

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

    def dull(self, block: bytes) -> bool:
        if self.response_id is None or b'"error"' in block or b"event: error" in block:
            return False
        if any(sign in block for sign in self.end_signs):
            return False
        return 92 not in block or not escaped_key(block)

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
                self.reason = "a background response: its usage is known only when it is fetched"
        elif status is not None:
            self.reason = None
            detail = name(part(document.get("incomplete_details")).get("reason"))
            self.finished(0, detail if status == "incomplete" and detail else status)
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_tokens(self, usage, raw)
