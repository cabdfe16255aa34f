"""Batch result files: one answer a line, in any order, and the same file may be fetched again.

By default nothing is counted in them. Whoever wants each line counted once asks for `answers`, and de-duplicates on the
response id, for which this reader has no memory. Lines are handed out as they come; a file may have fifty thousand.
"""

from __future__ import annotations

from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.formats.json_scanner import Tree
from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.base import Document, Reader, build, escaped_key
from sidecar.usage.providers.openai import ChatCompletions, Embeddings
from sidecar.usage.providers.openai_responses import Responses
from sidecar.usage.values import part

WAITING_MAX = 1_024  # answers that nobody has fetched yet; more are counted as dropped


class BatchFile(Reader):
    """`take()` gives the answers read since the last call."""

    wanted: ClassVar[Tree] = {
        "custom_id": True,
        "result": {"type": True, "message": Messages.wanted, "error": True},
        "response": {"status_code": True, "request_id": True, "body": {**ChatCompletions.wanted, **Responses.wanted}},
    }

    counts_each: ClassVar[bool] = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._answers: list[Usage] = []

    def dull(self, block: bytes) -> bool:
        return b'"usage"' not in block and (92 not in block or not escaped_key(block))

    def message(self, document: Document, event: str) -> bool:
        self.document(document)
        return False

    def document(self, document: Document) -> None:
        result, response = part(document.get("result")), part(document.get("response"))
        if result.get("type") == "succeeded":
            self._answer(Messages(self.anomaly), part(result.get("message")), "anthropic", "chat")
        elif response.get("status_code") == 200:
            body = part(response.get("body"))
            reader = _reader_of(body, self)
            if reader is not None:
                self._answer(reader, body, "openai", "embeddings" if isinstance(reader, Embeddings) else "chat")

    def take(self) -> list[Usage]:
        answers, self._answers = self._answers, []
        return answers

    def _answer(self, reader: Reader, body: Document, provider: str, operation: str) -> None:
        reader.document(body)
        if reader.raw is None:
            return
        if len(self._answers) >= WAITING_MAX:
            self.anomaly("batch_answers_dropped")
            return
        usage = build(reader, streamed=False, ended=True)
        usage.provider, usage.operation = provider, operation
        self._answers.append(usage)


def _reader_of(body: Document, batch: BatchFile) -> Reader | None:
    for candidate in (ChatCompletions, Responses):
        if candidate.claims(body):
            return candidate(batch.anomaly)
    return Embeddings(batch.anomaly) if body.get("object") == "list" else None
