"""Answers of JSON: one document, or an array (or lines) of them that their content type does not give away.

A small document is kept and parsed once, at the end; a large one is skimmed by `Members` while it passes, so that sixty
megabytes cost no parse and next to no memory.
"""

from __future__ import annotations

from typing import Any

import orjson

from sidecar.usage.formats.event_stream import (
    LAST_MESSAGES,
    MESSAGE_MAX_BYTES,
    PARSED_STEPS,
    UNREADABLE_STEPS,
    UNSETTLED_STEPS,
    JsonLines,
    Parsing,
    complete,
)
from sidecar.usage.formats.json_scanner import STEPS_EARNED, STEPS_FREE, Members, Skipper
from sidecar.usage.formats.json_tail import Tail
from sidecar.usage.providers.base import Document, Reader

DOCUMENT_MAX_BYTES = 65_536  # a plain answer parsed whole: 0.2 ms at most; larger ones are skimmed


class LinesOrDocument:
    """JSON that may be one object a line although its type does not say so: the second line decides."""

    __slots__ = ("_after", "_framing", "_reader", "_start")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._start = bytearray()
        self._after = -1  # where the second line begins
        self._framing: JsonLines | OneDocument | None = None

    @property
    def streamed(self) -> bool:
        return isinstance(self._framing, JsonLines)

    @property
    def ended(self) -> bool:
        return self._framing is not None and self._framing.ended

    @property
    def busy(self) -> bool:
        return self._framing is not None and self._framing.busy

    def feed(self, piece: bytes) -> bool:
        if self._framing is not None:
            return self._framing.feed(piece)
        start = self._start
        newline = piece.find(b"\n") if self._after < 0 else -1
        if newline >= 0:
            self._after = len(start) + newline + 1
        start += piece
        if newline >= 0 and not complete(bytes(start[: self._after])):
            self._framing = OneDocument(self._reader)
        elif self._after >= 0 and start[self._after :].strip():
            self._framing = JsonLines(self._reader)
        elif len(start) > MESSAGE_MAX_BYTES:
            self._framing = OneDocument(self._reader)
        else:
            return False
        self._start = bytearray()
        return self._framing.feed(bytes(start))

    def finish(self, whole: bool = True) -> None:
        if self._framing is None:
            self._framing = OneDocument(self._reader)
            self._framing.feed(bytes(self._start))
        self._framing.finish(whole)


class OneDocument(Parsing):
    """A plain answer: kept whole while it is small, skimmed once it is not."""

    __slots__ = ("_members", "_pieces", "_size")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.streamed = self.ended = self.busy = False
        self._pieces: list[bytes] = []
        self._size = 0
        self._members: Members | None = None

    def feed(self, piece: bytes) -> bool:
        if self._members is not None:
            self._members.feed(piece)
            return False
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > DOCUMENT_MAX_BYTES or len(self._pieces) > 1024:
            self._compact()
        return False

    def finish(self, whole: bool = True) -> None:
        if self._members is not None:
            if not whole:
                self._members.cut()
            self.busy = self._members.busy
            self.ended = _read_skimmed(self._reader, self._members)
            self._members = None
            return
        pieces, self._pieces = self._pieces, []
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        if body:
            self.ended = read_whole(self._reader, body)

    def _compact(self) -> None:
        body = b"".join(self._pieces)
        self._pieces = [body]
        if len(body) > DOCUMENT_MAX_BYTES:
            self._members = Members(self._reader.wanted)
            self._members.feed(body)
            self._pieces = []


def read_whole(reader: Reader, body: bytes) -> bool:
    """Read a small answer that is all there is; whether it is complete."""
    if not reader.worth_parsing(body):
        return False
    try:
        document = orjson.loads(body)
    except ValueError:
        members = Members(reader.wanted)
        members.feed(body)
        return _read_skimmed(reader, members)
    if type(document) is dict:
        reader.document(document)
    return True


def _read_skimmed(reader: Reader, members: Members) -> bool:
    if members.document:
        reader.document(members.document)
    if members.busy and reader.counts_anomalies:
        reader.anomaly("document_too_busy")
    if members.oversized and reader.counts_anomalies:
        reader.anomaly("value_oversized")
    return members.done


class Elements(Parsing):
    """One JSON array: a stream of its elements (Gemini without `alt=sse`), or the answers to several prompts.

    An array of anything but objects (bare embeddings) has nothing to say and is passed over. Elements are rationed as
    messages are (see `framing`): of an array that has more, the last ones are read.
    """

    __slots__ = ("_element", "_long", "_passing", "_skip", "_started", "_steps", "_tail")

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._started = False
        self._passing = False
        self._skip = Skipper()
        self._element = bytearray()
        self._long: Members | None = None
        self._steps = STEPS_FREE
        self._tail: Tail | None = None

    def feed(self, piece: bytes) -> bool:
        if self._tail is not None:
            self._tail.feed(piece)
            return False
        pos, end = 0, len(piece)
        self._steps += (end * STEPS_EARNED) >> 20
        while pos < end and not self._passing:
            if self._steps < self._skip.steps:
                self._hurry(piece[pos:])
                return False
            if self._skip.depth:
                self._skip.limit = self._steps
                after = self._skip.container(piece, pos)
                if after < 0 and self._steps < self._skip.steps:
                    continue
                self._keep(piece[pos : after if after >= 0 else None])
                if after < 0:
                    return False
                self._steps -= (PARSED_STEPS if self._reader.decided else UNSETTLED_STEPS) + ((after - pos) >> 7)
                self._element_ended()
                pos = after
                continue
            self._steps -= 1
            byte = piece[pos]
            pos += 1
            if byte == 0x7B and self._started:
                self._skip.depth = 1
                self._element += b"{"
            elif byte == 0x5B and not self._started:
                self._started = True
            elif byte == 0x5D:
                self.ended = self._passing = True
                return self._reader.arrays_stream
            elif byte not in b" \t\r\n,\xef\xbb\xbf":
                self._passing = self.ended = True
        return False

    def finish(self, whole: bool = True) -> None:
        self.streamed = self._reader.arrays_stream
        self._element.clear()
        self._long = None
        value = self._tail.value(()) if self._tail is not None and whole else None
        self._tail = None
        if value is not None:
            self.ended = True
            for document in value[-LAST_MESSAGES:] if type(value) is list else [value]:
                if type(document) is dict:
                    self._deliver(document, "")

    def _unreadable(self, data: bytes) -> Document:
        self._steps -= UNREADABLE_STEPS
        return super()._unreadable(data)

    def _hurry(self, rest: bytes) -> None:
        """Read no more than the end, from here on."""
        self.busy = True
        if self._reader.counts_anomalies:
            self._reader.anomaly("stream_too_busy")
        self._element.clear()
        self._long = None
        self._tail = Tail()
        self._tail.feed(rest)

    def _keep(self, data: bytes) -> None:
        if self._long is not None:
            self._long.feed(data)
            return
        self._element += data
        if len(self._element) > MESSAGE_MAX_BYTES:
            self._long = Members(self._reader.wanted)
            self._long.feed(bytes(self._element))
            self._element.clear()

    def _element_ended(self) -> None:
        document: Any
        if self._long is not None:
            document = self._long.document
            self._long = None
        else:
            document = self._parse(bytes(self._element))
            self._element.clear()
        if document:
            self._deliver(document, "")
