"""Cutting a stream into messages: server-sent events and JSON lines.

Where the pieces are cut cannot matter. A framing keeps at most one unfinished message, up to a limit; what is larger is
read on by `Members`, which keeps only what the reader wants. Messages that a byte search shows to hold nothing
of interest are not even taken apart: a piece of whole events of text costs two or three searches.

`feed` answers True for the piece in which the stream's end mark ends. The mark counts from its last meaningful byte
(the `]` of `[DONE]`, the closing brace of the terminal event), because a client that reads by lines acts before
the blank line arrives.
"""

from __future__ import annotations

from typing import Protocol

import orjson

from sidecar.usage import Skips
from sidecar.usage.formats.json_scanner import STEPS_EARNED, STEPS_FREE, Members, pruned
from sidecar.usage.formats.likeness import looked_at
from sidecar.usage.providers.base import Document, Reader, Tree

MESSAGE_MAX_BYTES = 65_536  # one unfinished message kept whole; larger ones are images and whole responses
SKIPPED_BYTES_MAX = 4_096  # of a piece that is searched at once; larger ones are split first
EVENT_NAME_MAX_BYTES = 128

# Messages are rationed in steps as members are: see there. A stream that is beyond its ration has the last messages of
# each piece read. One that comes message by message loses nothing by that; one that comes all at once, its middle.
LAST_MESSAGES = 8
PARSED_STEPS = 8  # of parsing a message and taking what it says
UNSETTLED_STEPS = 24  # … while it is shown to every reader, because nobody knows yet whose answer it is
UNREADABLE_STEPS = 48  # of a message that the strict parser refuses
SEARCHED_A_STEP = 256  # bytes that the search for what is of interest passes in a step
BATCH = 64  # messages split off a piece at a time
HURRIED_STEPS = 64  # for the members of a large message beyond the ration
HURRIED_BYTES = 4_096  # larger ones are skimmed then
LINES_FREE = 1_024  # of one event; real ones have one or a few
LINE_BYTES = 1_024  # … and one more for so many bytes

_BOM = b"\xef\xbb\xbf"
_DONE = b"[DONE]"
_CLOSERS = b"}]"


# How it works. `Messages` holds the rest of an unfinished message (`_rest`) and nothing else of what passed. A piece
# is
#   - skipped unseen, if it begins and ends at a separator and the reader has no interest in it (`feed`: most of them);
#   - else joined to the rest and cut at its last separator: what stands before it is whole messages (`_messages`), what
#     stands behind it is the new rest;
#   - given to a `_Long` once a rest has outgrown MESSAGE_MAX_BYTES: that message is skimmed as it passes.
# A rest that may be the end mark is tried before its separator comes (`_early`), at ever larger sizes, so that a
# message that comes byte by byte is not parsed at each byte. Line ends are made LF first; a CR at the end of a piece
# may be half of a CRLF, so the LF that may follow is swallowed with the next piece (`_skip_lf`).
#
# After the end mark everything is thrown away (`_over`): what comes behind it counts nowhere, however it is cut.
# `finish` reads what is left as if it were whole, but restores `final`: a cut message proves nothing.


class Framing(Protocol):
    @property
    def streamed(self) -> bool: ...

    @property
    def ended(self) -> bool:
        """Whether a plain document was seen to its end."""
        ...

    @property
    def busy(self) -> bool:
        """Whether something was left unread, because reading it would have taken more than its length allows."""
        ...

    def feed(self, piece: bytes) -> bool: ...

    def finish(self, whole: bool = True) -> None:
        """No more bytes: read what is left as if it were complete. `whole`: the answer was not cut off."""
        ...


class Parsing:
    __slots__ = ("_cut", "_reader", "busy", "ended", "streamed")

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._cut = False  # the bytes are over, so an unreadable message is no surprise
        self.streamed = True
        self.ended = self.busy = False

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
            return pruned(data, self._reader.wanted)
        if self.busy and len(data) > HURRIED_BYTES:
            return pruned(data, self._reader.wanted, HURRIED_STEPS)
        try:
            document = orjson.loads(data)
        except ValueError:
            document = self._unreadable(data)
            if not document and not self._cut and self._reader.counts_anomalies:
                self._reader.anomaly("message_unreadable")
        return document if type(document) is dict else None

    def _unreadable(self, data: bytes) -> Document:
        return pruned(data, self._reader.wanted)


class Messages(Parsing):
    """What server-sent events and JSON lines have in common: messages that end with a separator."""

    __slots__ = ("_long", "_rest", "_skip_lf", "_started", "_steps", "_strict", "_tried")

    separator = b"\n"
    ends: tuple[bytes, ...] = (b"\n",)  # the separator as it may come

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._rest = bytearray()
        self._long: _Long | None = None
        self._skip_lf = False
        self._started = False
        self._steps = STEPS_FREE
        self._strict = False  # what the strict parser refuses is let go
        self._tried = 0  # size of an unfinished message that was not yet one

    @property
    def skips(self) -> Skips | None:
        """Pieces that begin and end at a separator; None where the next one does not begin at one."""
        if self._started and not self._rest and not self._skip_lf and self._long is None:
            reader = self._reader
            lean = type(reader).can_skip is Reader.can_skip and reader.may_skip
            if lean:
                return Skips(self.ends, SKIPPED_BYTES_MAX, reader.nothing_in, True, looked_at(type(reader)))
            return Skips(self.ends, SKIPPED_BYTES_MAX, reader.can_skip, False)
        return None

    def feed(self, piece: bytes) -> bool:
        if (
            self._started
            and not self._rest
            and not self._skip_lf
            and self._long is None
            and piece.endswith(self.ends)
            and len(piece) <= SKIPPED_BYTES_MAX
            and self._reader.can_skip(piece)
        ):
            return False
        return self._feed(piece)

    def finish(self, whole: bool = True) -> None:
        """The last message may lack its separator. If it lacks its end, it proves nothing to be final."""
        self._cut = True
        final = self._reader.final
        if self._long is not None:
            if not whole:
                self._long.members.cut()
            if self._long.members.document and not self._long.delivered:
                self._deliver(self._long.members.document, self._long.event)
            if not self._long.members.done:
                self._reader.final = final
            self._long = None
        elif self._rest.strip():
            rest = bytes(self._rest)
            self._messages(rest)
            if not complete(self._data(rest)[0]):
                self._reader.final = final
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
        rest, signs = self._rest, self._reader.end_signs
        if len(rest) < self._tried:
            self._tried = 0
        elif len(rest) <= self._tried + self._tried // 8:
            return False  # a message that comes byte by byte is not tried at each of them
        last = rest[-1] if rest[-1] != 0x0A else rest[-2] if len(rest) > 1 else 0
        if last not in _CLOSERS or not any(sign in rest for sign in signs):
            return False
        data, event = self._data(bytes(rest))
        if data.strip() == _DONE:
            return self._reader.done()
        try:
            document = orjson.loads(data)
        except ValueError:
            self._tried = len(rest)
            return False
        return type(document) is dict and self._deliver(document, event)

    def _messages(self, block: bytes) -> bool:
        self._steps += (len(block) * STEPS_EARNED) >> 20
        if self._steps > 0:
            self._steps -= len(block) // SEARCHED_A_STEP
            if self._reader.can_skip(block):
                return False
        while block:
            if self._steps < 0:
                return self._last(block)
            *messages, block = block.split(self.separator, BATCH)
            if len(messages) < BATCH:
                messages.append(block)
                block = b""
            self._steps -= len(messages) // 4
            for message in messages:
                if self._message(message):
                    return True
        return False

    def _unreadable(self, data: bytes) -> Document:
        self._steps -= UNREADABLE_STEPS if self._reader.decided else 4 * UNREADABLE_STEPS
        return {} if self._strict else super()._unreadable(data)

    def _last(self, block: bytes) -> bool:
        """The stream is beyond its ration: the last messages of what came."""
        messages = block.rsplit(self.separator, LAST_MESSAGES)
        if len(messages) > LAST_MESSAGES and not self.busy and messages[0]:
            self.busy = True
            if self._reader.counts_anomalies:
                self._reader.anomaly("stream_too_busy")
        messages = [message for message in messages[-LAST_MESSAGES:] if message]
        for left, message in enumerate(messages, 1 - len(messages)):
            self._strict = left < 0
            if self._message(message):
                return True
        return False

    def _message(self, message: bytes) -> bool:
        """Read one message; True when it is the stream's end mark."""
        if not message or message.isspace():
            return False
        self._steps -= 1
        data, event = self._data(message)
        if not data:
            return False
        reader = self._reader
        if data.startswith(_DONE) or data.strip() == _DONE:
            return reader.done()
        if reader.can_skip(message):
            return False
        self._steps -= (PARSED_STEPS if reader.decided else UNSETTLED_STEPS) + len(data) // SEARCHED_A_STEP
        document = self._parse(data)
        return document is not None and self._deliver(document, event)

    def _feed_long(self, piece: bytes) -> bool:
        long = self._long
        if long is None:
            return False
        after = long.feed(piece)
        if after is None and not long.members.done:
            return False
        if long.members.document and not long.delivered:
            long.delivered = True
            ended = self._deliver(long.members.document, long.event)
            self.busy = self.busy or long.members.busy
            if self._reader.counts_anomalies:
                if long.members.oversized:
                    self._reader.anomaly("value_oversized")
                if long.members.busy:
                    self._reader.anomaly("document_too_busy")
            if ended:
                return self._over()
        if after is None:
            return False
        self._long = None
        return self._feed(piece[after:]) if after < len(piece) else False

    def _data(self, message: bytes) -> tuple[bytes, str]:
        """The JSON of a message, and its name."""
        raise NotImplementedError

    def _new_long(self) -> _Long:
        raise NotImplementedError


class ServerSentEvents(Messages):
    __slots__ = ()

    separator = b"\n\n"
    ends = (b"\n\n", b"\r\n\r\n")

    def _data(self, message: bytes) -> tuple[bytes, str]:
        if message.startswith(b"data:") and b"\n" not in message:
            return message[5:].removeprefix(b" "), ""
        lines: list[bytes] = []
        event = ""
        if message.count(b"\n") > BATCH:  # too many to look at each: after the first ones all are taken for data
            *first, rest = message.split(b"\n", BATCH)
            message = b"\n".join(first)
            rest = (b"\n" + rest).replace(b"\ndata: ", b"\n").replace(b"\ndata:", b"\n")
        else:
            rest = b""
        for line in message.split(b"\n"):
            if line.startswith(b"data:"):
                lines.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                event = line[6 : 6 + EVENT_NAME_MAX_BYTES].strip().decode("utf-8", "replace")
        if lines:
            return b"\n".join(lines) + rest, event
        bare = message.strip()
        if bare.startswith((b"{", b"[{")):  # Gemini's errors come without any field name
            return (bare.strip(b"[]") if bare.startswith(b"[") else bare), event
        return b"", event

    def _new_long(self) -> _Long:
        return _LongEvent(self._reader.wanted)


class JsonLines(Messages):
    __slots__ = ()

    def _data(self, message: bytes) -> tuple[bytes, str]:
        data = message.strip()
        return data.removeprefix(b"data:"), ""

    def _new_long(self) -> _Long:
        return _Long(self._reader.wanted)


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
    __slots__ = ("_begin", "_hurried", "_in_data", "_in_line", "_lines")

    def __init__(self, wanted: Tree) -> None:
        super().__init__(wanted)
        self._begin = b""  # of a line whose field is not known yet
        self._in_line = False
        self._in_data = False
        self._hurried = False
        self._lines = LINES_FREE

    def feed(self, data: bytes) -> int | None:
        if self._hurried:
            return self._hurry(data)
        self._lines += len(data) // LINE_BYTES
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
            self._lines -= 1
            pos = newline + 1
            if self._lines < 0:
                self._hurried = True
                self._begin = b"\n"
                self.members.hurry(b"data:")
                self.members.feed(b"\n")
                after = self._hurry(data[pos:])
                return None if after is None else pos + after
        return None

    def _hurry(self, data: bytes) -> int | None:
        """Too many lines to look at each: whatever the event still holds is kept with their beginnings."""
        if data[:1] == b"\n" and self._begin == b"\n":
            return 1
        end = data.find(b"\n\n")
        self._begin = data[-1:] or self._begin
        self.members.feed(data if end < 0 else data[:end])
        return None if end < 0 else end + 2


def complete(data: bytes) -> bool:
    """Whether a message is all there: JSON to its end, or the mark that is none."""
    try:
        orjson.loads(data)
    except ValueError:
        return data.strip() == _DONE
    return True
