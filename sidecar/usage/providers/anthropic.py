"""Anthropic messages, plain and streamed; also through Bedrock, Vertex and the servers that imitate them.

The wire's `input_tokens` leaves both cache counts out; ours holds them (O1). In a stream `message_start` gives the
input and a placeholder for the output, each `message_delta` replaces what it names. A server tool may let the input
grow on the way, so the last one wins. How long what is written is kept only `message_start` says: where the total has
grown since, what is kept for an hour is a lower bound. Compaction (beta) is billed beside the top-level counts and
added to them.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader, Tree
from sidecar.usage.providers.fields import fill_parts, fill_tokens, settle_parts, settle_total
from sidecar.usage.values import count, name, part

_MESSAGE: Tree = {
    "id": True,
    "type": True,
    "role": True,
    "model": True,
    "stop_reason": True,
    "usage": True,
    "error": True,
}
_UNITS = ("web_search_requests", "web_fetch_requests", "code_execution_requests")
_OPENAIS = frozenset(("prompt_tokens", "completion_tokens"))
_COUNTS = (
    ("input_tokens", "input_tokens"),
    ("output_tokens", "output_tokens"),
    ("cache_read_input_tokens", "cache_read_input_tokens"),
    ("cache_write_input_tokens", "cache_creation_input_tokens"),
)


class Messages(Reader):
    wanted: ClassVar[Tree] = {**_MESSAGE, "message": _MESSAGE, "delta": {"stop_reason": True}}
    end_signs: ClassVar[tuple[bytes, ...]] = (b"message_stop",)
    keep: ClassVar[tuple[bytes, ...] | None] = (b"message_", b'"error"', b"event: error")
    first_token: ClassVar[re.Pattern[bytes] | None] = re.compile(rb"content_block_delta")

    @classmethod
    def claims(cls, document: Document) -> bool:
        kind = document.get("type")
        message = document.get("message") if kind == "message_start" else document if kind == "message" else None
        return "input_tokens" in part(part(message).get("usage"))

    def recognises(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        return kind in ("message", "message_start", "message_delta", "message_stop", "error")

    def message(self, document: Document, event: str) -> bool:
        kind = document.get("type")
        if type(kind) is not str:
            kind = event
        if kind == "message_start":
            self.document(part(document.get("message")))
        elif kind == "message_delta":
            self.seen = True
            self.report(document.get("usage"))
            if self.finished(0, part(document.get("delta")).get("stop_reason")):
                self.final = True
        elif kind == "message_stop":
            self.seen = self.final = True
            return True
        elif kind == "error":
            self.seen = True
            self.fail(document.get("error") or "error")
        return False

    def done(self) -> bool:
        return False

    def document(self, document: Document) -> None:
        if document.get("type") in ("message", "error"):
            self.seen = True
        self.identify(document)
        self.fail(document.get("error"))
        self.finished(0, document.get("stop_reason"))
        self.report(document.get("usage"))

    def fill(self, usage: Usage, raw: Document) -> None:
        fill_anthropic(self, usage, raw)


def fill_anthropic(reader: Reader, usage: Usage, raw: Document) -> None:
    own = count(raw.get("input_tokens")) or count(raw.get("output_tokens"))
    if not own and (not _OPENAIS.isdisjoint(raw) or not ("input_tokens" in raw or "output_tokens" in raw)):
        fill_tokens(reader, usage, raw)  # an imitator that kept OpenAI's (or others') names, and with them the meaning
        return
    counts = {ours: number for ours, theirs in _COUNTS if (number := reader.number(raw, theirs)) is not None}
    iterations = raw.get("iterations")
    if type(iterations) is list:
        _iterate(reader, usage, counts, iterations)
    for field, amount in counts.items():
        setattr(usage, field, amount)
    fill_parts(reader, usage, raw)
    if "cache_creation" in raw and "cache_write_input_tokens" not in counts:
        counts["cache_write_input_tokens"] = usage.cache_write_input_tokens or 0
    if usage.input_tokens is not None:  # O1: what the cache read and wrote stands beside the input
        usage.input_tokens += counts.get("cache_read_input_tokens", 0) + counts.get("cache_write_input_tokens", 0)
    write = usage.cache_write_input_tokens
    split = (usage.cache_write_5m_input_tokens or 0) + (usage.cache_write_1h_input_tokens or 0)
    if write is not None and split != write:  # the split of an earlier report than the total's
        usage.cache_write_5m_input_tokens = None
        if split > write:
            usage.cache_write_1h_input_tokens = None  # else a lower bound: what has come since may be kept as long
    settle_parts(usage)
    settle_total(usage, raw)
    if type(tools := raw.get("server_tool_use")) is dict:
        for unit in _UNITS:
            if (used := reader.number(tools, unit)) is not None:
                usage.units[unit] = used
    if tier := name(raw.get("service_tier")):
        usage.service_tier = tier


def _iterate(reader: Reader, usage: Usage, counts: dict[str, int], iterations: list[Any]) -> None:
    """Entries of type `message` are what the counts at the top consist of. A compaction stands beside these and is
    added; so does what another model was asked on the way (an advisor), which has that model's price: it is a unit."""
    advice: dict[str, int] = {}
    for entry in map(part, iterations):
        kind = entry.get("type")
        if kind == "compaction":
            _add(reader, counts, entry)
        elif kind != "message" and type(kind) is str:
            _add(reader, advice, entry)
    if tokens := sum(advice.values()):
        usage.units["advisor_tokens"] = tokens


def _add(reader: Reader, counts: dict[str, int], entry: Document) -> None:
    for ours, theirs in _COUNTS:
        more = reader.number(entry, theirs)
        if more is not None:
            counts[ours] = counts.get(ours, 0) + more
