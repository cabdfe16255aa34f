"""Cutting a stream into messages: server-sent events and JSON lines.

Where the pieces are cut cannot matter. A framing keeps at most one unfinished message, up to a limit; what is larger is
read on by `Members`, which keeps only what the reader wants. Messages that a byte search shows to be dull are
not even taken apart: a piece of whole, dull events costs two or three searches.

`feed` answers True for the piece in which the stream's end mark ends. The mark counts from its last meaningful byte
(the `]` of `[DONE]`, the closing brace of the terminal event), because a client that reads by lines acts before
the blank line arrives.
"""

from __future__ import annotations

from typing import Protocol

import orjson

from sidecar.usage.members import Members, Tree, pruned
from sidecar.usage.reader import Document, Reader

MESSAGE_MAX_BYTES = 65_536  # one unfinished message kept whole; larger ones are images and whole responses
EVENT_NAME_MAX_BYTES = 128

_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_CLOSERS = b"}]"


class Framing(Protocol):
    @property
    def streamed(self) -> bool: ...

    @property
    def ended(self) -> bool:
        """Whether a plain document was seen to its end."""
        ...

    def feed(self, piece: bytes) -> bool: ...

    def finish(self) -> None:
        """No more bytes: read what is left as if it were complete."""
        ...


class Parsing:
    __slots__ = ("_cut", "_reader", "ended", "streamed")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._cut = False  # the bytes are over, so an unreadable message is no surprise
        self.streamed = True
        self.ended = False

    def _deliver(self, document: Document, event: str) -> bool:
        """Hand a message over; once it is known whose answer it is, that reader is asked directly."""
        reader = self._reader
        ended = reader.message(document, event)
        if reader.settled is not None:
            self._reader = reader.settled
        return ended

    def _parse(self, data: bytes) -> Document | None:
        """One JSON object, or None. What the strict parser refuses is skimmed for what is wanted."""
        if len(data) > MESSAGE_MAX_BYTES:
            return pruned(data, self._reader.places())
        try:
            document = orjson.loads(data)
        except ValueError:
            document = pruned(data, self._reader.places())
            if not document and not self._cut and self._reader.concerned:
                self._reader.anomaly("message_unreadable")
        return document if type(document) is dict else None


class _Messages(Parsing):
    """What server-sent events and JSON lines have in common: messages that end with a separator."""

    __slots__ = ("_long", "_rest", "_skip_lf", "_started")

    separator = b"\n"

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._rest = bytearray()
        self._long: _Long | None = None
        self._skip_lf = False
        self._started = False

    def feed(self, piece: bytes) -> bool:
        if (
            self._started
            and not self._rest
            and not self._skip_lf
            and self._long is None
            and piece.endswith(self.separator)
            and self._reader.dull(piece)
        ):
            return False
        return self._feed(piece)

    def finish(self) -> None:
        """The last message may lack its separator. If it lacks its end, it proves nothing to be final."""
        self._cut = True
        proven = self._reader.proven()
        if self._long is not None:
            if self._long.members.document and not self._long.delivered:
                self._deliver(self._long.members.document, self._long.event)
            if not self._long.members.done:
                self._reader.restore(proven)
            self._long = None
        elif self._rest.strip():
            rest = bytes(self._rest)
            self._messages(rest)
            if not complete(self._data(rest)[0]):
                self._reader.restore(proven)
        self._rest.clear()

    def _feed(self, piece: bytes) -> bool:
        if b"\r" in piece or self._skip_lf:
            piece = self._only_lf(piece)
        rest = self._rest
        if not self._started:
            rest += piece
            if len(rest) < 3 and _BOM.startswith(bytes(rest)):
                return False
            self._started = True
            piece = bytes(rest).removeprefix(_BOM)
            rest.clear()
        if self._long is not None:
            return self._feed_long(piece)
        searched = max(0, len(rest) - 1)
        rest += piece
        end = rest.rfind(self.separator, searched)
        if end >= 0:
            end += len(self.separator)
            block = bytes(rest[:end])
            del rest[:end]
            if self._messages(block):
                return self._over()
        if not rest:
            return False
        if len(rest) > MESSAGE_MAX_BYTES:
            self._long = self._new_long()
            start = bytes(rest)
            rest.clear()
            return self._feed_long(start)
        return self._early() and self._over()

    def _over(self) -> bool:
        """The end mark has passed: what stands behind it in the same piece is not read, as later pieces are not."""
        self._rest.clear()
        self._long = None
        return True

    def _only_lf(self, piece: bytes) -> bytes:
        """Line ends are LF, CRLF or CR, and a CRLF may be cut; a bare CR never stands inside JSON."""
        if self._skip_lf and piece:
            piece = piece.removeprefix(b"\n")
            self._skip_lf = False
        if piece.endswith(b"\r"):
            self._skip_lf = True
        return piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _early(self) -> bool:
        """The end mark may be complete although its separator is still to come."""
        rest, signs = self._rest, self._reader.signs()
        last = rest[-1] if rest[-1] != 0x0A else rest[-2] if len(rest) > 1 else 0
        if last not in _CLOSERS or not any(sign in rest for sign in signs):
            return False
        data, event = self._data(bytes(rest))
        if data.strip() == _DONE:
            return self._reader.done()
        try:
            document = orjson.loads(data)
        except ValueError:
            return False
        return type(document) is dict and self._deliver(document, event)

    def _messages(self, block: bytes) -> bool:
        if self._reader.dull(block):
            return False
        ended = False
        for message in block.split(self.separator):
            reader = self._reader
            if not message or message.isspace():
                continue
            data, event = self._data(message)
            if not data:
                continue
            if data.startswith(_DONE) or data.strip() == _DONE:
                ended = reader.done() or ended
            elif not reader.dull(message):
                document = self._parse(data)
                if document is not None:
                    ended = self._deliver(document, event) or ended
            if ended:
                return True
        return False

    def _feed_long(self, piece: bytes) -> bool:
        long = self._long
        if long is None:
            return False
        after = long.feed(piece)
        if after is None and not long.members.done:
            return False
        if long.members.document and not long.delivered:
            long.delivered = True
            if self._deliver(long.members.document, long.event):
                return self._over()
            if long.members.oversized and self._reader.concerned:
                self._reader.anomaly("value_oversized")
        if after is None:
            return False
        self._long = None
        return self._feed(piece[after:]) if after < len(piece) else False

    def _data(self, message: bytes) -> tuple[bytes, str]:
        """The JSON of a message, and its name."""
        raise NotImplementedError

    def _new_long(self) -> _Long:
        raise NotImplementedError


class ServerSentEvents(_Messages):
    __slots__ = ()

    separator = b"\n\n"

    def _data(self, message: bytes) -> tuple[bytes, str]:
        if message.startswith(b"data:") and b"\n" not in message:
            return message[5:].removeprefix(b" "), ""
        lines: list[bytes] = []
        event = ""
        for line in message.split(b"\n"):
            if line.startswith(b"data:"):
                lines.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                event = line[6 : 6 + EVENT_NAME_MAX_BYTES].strip().decode("utf-8", "replace")
        if lines:
            return b"\n".join(lines), event
        bare = message.strip()
        if bare.startswith((b"{", b"[{")):  # Gemini's errors come without any field name
            return (bare.strip(b"[]") if bare.startswith(b"[") else bare), event
        return b"", event

    def _new_long(self) -> _Long:
        return _LongEvent(self._reader.places())


class JsonLines(_Messages):
    __slots__ = ()

    def _data(self, message: bytes) -> tuple[bytes, str]:
        data = message.strip()
        return data.removeprefix(b"data:"), ""

    def _new_long(self) -> _Long:
        return _Long(self._reader.places())


class _Long:
    """A message too large to keep, skimmed while it passes. `feed` answers where in the piece it ended."""

    __slots__ = ("delivered", "event", "members")

    def __init__(self, wanted: Tree) -> None:
        self.members = Members(wanted)
        self.event = ""
        self.delivered = False

    def feed(self, data: bytes) -> int | None:
        newline = data.find(b"\n")
        self.members.feed(data if newline < 0 else data[:newline])
        return None if newline < 0 else newline + 1


class _LongEvent(_Long):
    __slots__ = ("_begin", "_in_data", "_in_line")

    def __init__(self, wanted: Tree) -> None:
        super().__init__(wanted)
        self._begin = b""  # of a line whose field is not known yet
        self._in_line = False
        self._in_data = False

    def feed(self, data: bytes) -> int | None:
        pos = 0
        while pos < len(data):
            newline = data.find(b"\n", pos)
            segment = data[pos : newline if newline >= 0 else None]
            if not self._in_line:
                segment = self._begin + segment
                if newline < 0 and len(segment) < 6:
                    self._begin = segment
                    return None
                self._begin = b""
                if not segment:
                    return newline + 1
                self._in_line = True
                self._in_data = segment.startswith(b"data:")
                if self._in_data:
                    segment = segment[5:]
                elif segment.startswith(b"event:"):
                    self.event = segment[6 : 6 + EVENT_NAME_MAX_BYTES].strip().decode("utf-8", "replace")
            if self._in_data:
                self.members.feed(segment)
            if newline < 0:
                return None
            if self._in_data:
                self.members.feed(b"\n")
            self._in_line = False
            pos = newline + 1
        return None


def complete(data: bytes) -> bool:
    """Whether a message is all there: JSON to its end, or the mark that is none."""
    try:
        orjson.loads(data)
    except ValueError:
        return data.strip() == _DONE
    return True
