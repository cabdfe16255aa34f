"""Asking for usage on behalf of a client that did not (`SIDECAR_ASK_FOR_USAGE`), and hiding the answer from it.

Two pure pieces. `with_usage_asked` gives the request body with `stream_options.include_usage` added and every other
byte as it was; `UsageChunkFilter` takes the one extra chunk out of the answer again, because a chunk with `choices: []`
breaks code that reads `choices[0]`. Only for OpenAI-shaped streams: other providers report anyway.
"""

from __future__ import annotations

import re

import orjson

from sidecar.usage.formats.json_scanner import Members
from sidecar.usage.providers.base import Document, Reader
from sidecar.usage.providers.openai import ChatCompletions
from sidecar.usage.providers.table import REPORTING
from sidecar.usage.values import part

BODY_MAX_BYTES = 1_048_576  # rewritten whole; a larger request is left as it is
HELD_MAX_BYTES = 65_536  # of an event that is held until it is known; the extra chunk has about 400 bytes

_REPORTING = REPORTING | {"mistral_ai", "groq", "openrouter", "cohere", "perplexity"}
"""They report unasked, and some refuse what they do not know."""

_ASKED_PATHS = ("/chat/completions", "/completions")
_UNASKED_PATHS = ("/fim/completions", "/agents/completions")  # Mistral's

_OPEN = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\n]*+\{")
_ASK = b'{"include_usage":true}'
_EVENT_END = re.compile(rb"(?>\r\n|\r|\n)(?>\r\n|\r|\n)")


def may_ask(reader: type[Reader], provider: str | None, target: str) -> bool:
    """Whether calls of this place are OpenAI-shaped and state a stream's usage only when asked to."""
    path = target.partition("?")[0].rstrip("/")
    return (
        issubclass(reader, ChatCompletions)
        and provider not in _REPORTING
        and path.endswith(_ASKED_PATHS)
        and not path.endswith(_UNASKED_PATHS)
    )


def with_usage_asked(body: bytes) -> bytes | None:
    """The body that asks for usage; None where it is to stay as it is.

    That is: no JSON object, not streamed, already asked for, or refused in so many words (`include_usage: false`).
    """
    if len(body) > BODY_MAX_BYTES or b'"stream"' not in body:
        return None
    members = Members({"stream": True, "stream_options": True})
    members.feed(body)
    if members.busy or members.document.get("stream") is not True:
        return None
    document = _object(body)
    if document.get("stream") is not True:
        return None
    options = document.get("stream_options")
    if "stream_options" not in document:
        opened = _OPEN.match(body)
        if opened is None:
            return None
        return b"".join((body[: opened.end()], b'"stream_options":', _ASK, b",", body[opened.end() :]))
    if (type(options) is not dict and options is not None) or "include_usage" in part(options):
        return None
    members = Members({"stream_options": True})
    members.feed(body)
    start, end = members.span
    if members.busy or end <= start:
        return None
    if not options:
        return b"".join((body[:start], _ASK, body[end:]))
    return b"".join((body[: start + 1], b'"include_usage":true,', body[start + 1 :]))


def _object(body: bytes) -> Document:
    """The whole body; an empty object where it is none."""
    try:
        document = orjson.loads(body)
    except ValueError:
        return {}
    return document if type(document) is dict else {}


class UsageChunkFilter:
    """Feed the answer's bytes (not content-coded); what comes back is the answer without the extra chunk.

    Bytes are held only while they may belong to that chunk: an event that has shown anything else passes at once.
    """

    __slots__ = ("_held", "_passing", "removed")

    def __init__(self) -> None:
        self._held = b""
        self._passing = False  # inside an event that is known to be another
        self.removed = 0

    def feed(self, piece: bytes) -> bytes:
        out: list[bytes] = []
        data = self._held + piece if self._held else piece
        self._held = b""
        pos = 0
        while pos < len(data):
            end = _EVENT_END.search(data, pos)
            if end is None or (end.end() == len(data) and data.endswith(b"\r") and not self._passing):
                self._rest(data[pos:], out)
                break
            event = data[pos : end.end()]
            if self._passing or not _is_extra(event):
                out.append(event)
            else:
                self.removed += 1
            self._passing = False
            pos = end.end()
        return b"".join(out)

    def finish(self) -> bytes:
        """The bytes still held, unless they are the extra chunk without its last line end."""
        held, self._held = self._held, b""
        if held and _is_extra(held):
            self.removed += 1
            return b""
        return held

    def _rest(self, start: bytes, out: list[bytes]) -> None:
        if self._passing or len(start) > HELD_MAX_BYTES:
            # The line ends of the border are looked for again, so the last three bytes decide with the next piece.
            self._passing = True
            keep = len(start) - len(start.rstrip(b"\r\n"))
            out.append(start[: len(start) - keep])
            self._held = start[len(start) - keep :]
        else:
            self._held = start


def _is_extra(event: bytes) -> bool:
    """`choices: []` and a usage object: the chunk that only comes when it is asked for."""
    if b'"usage"' not in event or b'"choices"' not in event:
        return False
    lines = event.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    data = b"\n".join(line[5:] for line in lines if line.startswith(b"data:"))
    try:
        document = orjson.loads(data)
    except ValueError:
        return False
    return (
        type(document) is dict
        and document.get("choices") == []
        and bool(part(document.get("usage")))
        and "error" not in document
    )
