"""Reading along with a WebSocket: frames of both sides become messages, and messages of the provider become usage.

What is read is a copy; the tunnel passes the bytes on whatever is found here. So a frame that breaks the protocol, a
coding that nobody agreed on or a message that unpacks to too much ends the reading of that side, never the tunnel.
Memory is bounded by one message, and of a larger one only what is wanted is kept; time by what came, because frames
and unpacking have allowances that grow with it.

Most messages are small, whole and say nothing of interest: where it is told by which signs the others are known, the
reader passes those from head to head without taking them out. What the provider says with such a sign counts, and is
never passed over: of many at once a step's worth is given out, and the rest waits (`behind`). What the client says only
names a model: of more than its length allows, the rest is left unread.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Sequence

from sidecar.model.exchange import Usage
from sidecar.usage import RawHeaders
from sidecar.usage.formats.json_scanner import Members
from sidecar.usage.providers.base import Document, Tree
from sidecar.usage.providers.realtime import Session

MESSAGE_MAX_BYTES = 262_144  # of a message kept whole; a larger one (a response with a picture) is skimmed as it passes
UNPACKED_MAX_BYTES = 4_194_304  # that may come of one piece at once: 10 ms of unpacking
UNPACKED_RATIO = 64  # and for each byte that comes, on and on; JSON unpacks to 5 to 20, silent sound in base64 to 60
STEP_MESSAGES = 128  # given out at once; each may become a record

# Frames are rationed in units of a tenth of a microsecond, what it takes to pass over one. Plain text costs a call
# thirteen of them a KiB on its way; real messages have 60 bytes and more.
UNITS_FREE = 8_192  # of one side, before their number must be in proportion to their length
UNIT_BYTES = 32  # that earn one
UNITS_A_PIECE = 32  # earned by each piece, which costs more than they do
UNITS_A_MESSAGE = 2  # of a message that is taken out: as much as the smallest that report usage earn
UNITS_A_FRAGMENT = 24  # of a frame that is no whole message: real ones have a KiB and more
LOOKS_FREE = 512  # messages of a client that are unmasked to see what they say
LOOK_BYTES = 1_024  # that earn one
LOOKS_A_PIECE = 20  # earned by each piece
LOOKS_A_MESSAGE = 16  # of one that has to be parsed
SPEAKING_BYTES = 32  # of the smallest message that can name a model
UNMASKED_BYTES = 4_096  # of one that is unmasked to be looked through; in a larger one the masked sign is looked for

# How it works (RFC 6455, RFC 7692). `MessageReader._read` is a loop over frames; between two calls it knows what is
# left of the present frame (`_left`), whether it belongs to a message (`_data`), and the message so far (`_parts`, or
# `_skimmed` once it is too large). A head that is cut waits in `_head`. Three ways to take a frame:
#   - `_plain_ones`: whole, unmasked, uncompressed messages of a server are walked from head to head, and only those
#     that hold a sign are taken out; the signs' next places are searched once for all of them (`_next`);
#   - `_masked_ones`: the same for a client's, each XORed with its own mask: a short one is unmasked, in a long one the
#     sign is searched for in all four rotations of its mask (`_look`);
#   - `_open_frame`, `_take`, `_end_message`: everything else, frame by frame: fragments, cut frames, compression.
# Control frames may stand between the fragments of a message and change nothing in it; a close ends the reading.
# With permessage-deflate the window goes on from message to message unless that was negotiated away, so every message
# must be unpacked, wanted or not (`Inflater`). XOR is done on whole messages as large integers, not byte by byte.

_DATA = (0x81, 0x82)  # text and bytes whole in one frame, nothing reserved
_BEATS = (0x89, 0x8A)  # ping and pong

_EMPTY_BLOCK = b"\x00\x00\xff\xff"  # what a sender leaves off at a message's end
_DEFLATE = "permessage-deflate"


class BrokenFrames(Exception):
    """The reading of one side is over."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


class Inflater:
    """The unpacking half of permessage-deflate."""

    __slots__ = ("_allowance", "_takeover", "_unpack")

    def __init__(self, *, takeover: bool) -> None:
        self._takeover = takeover
        self._unpack = zlib.decompressobj(-15)
        self._allowance = UNPACKED_MAX_BYTES

    def feed(self, piece: bytes) -> bytes:
        """Raises `BrokenFrames`."""
        allowance = min(UNPACKED_MAX_BYTES, self._allowance + UNPACKED_RATIO * len(piece))
        try:
            unpacked = self._unpack.decompress(piece, allowance + 1)
        except zlib.error:
            raise BrokenFrames("websocket_coding") from None
        self._allowance = allowance - len(unpacked)
        if self._allowance < 0 or self._unpack.unconsumed_tail:
            raise BrokenFrames("websocket_too_dense")
        if self._unpack.unused_data:
            raise BrokenFrames("websocket_coding")
        return unpacked

    def end(self) -> bytes:
        """The rest of a message. Raises `BrokenFrames`."""
        rest = b"" if self._unpack.eof else self.feed(_EMPTY_BLOCK)
        if not self._takeover or self._unpack.eof:
            self._unpack = zlib.decompressobj(-15)
        return rest


class MessageReader:
    """One side's frames, cut anywhere. `feed` gives the messages that ended in what it was fed."""

    __slots__ = (
        "_anomaly", "_busy", "_data", "_final", "_head", "_in_message", "_inflater", "_left", "_looks", "_mask",
        "_masked", "_packed", "_parts", "_places", "_signs", "_size", "_skimmed", "_units", "behind", "over",
    )  # fmt: skip

    def __init__(
        self,
        *,
        masked: bool,
        inflater: Inflater | None,
        anomaly: Callable[[str], None],
        places: Tree | None = None,
        signs: Sequence[bytes] | None = None,
    ) -> None:
        """`places`: what is wanted of a message that is too large to keep. `signs`: bytes without one of which a
        message is not wanted; None: every message is given out."""
        self._signs = signs
        self._places = places or {}
        self._masked = masked
        self._inflater = inflater
        self._anomaly = anomaly
        self._head = b""  # of a frame whose head is cut
        self._left = 0  # of a frame's payload
        self._data = False  # the frame is a message's, and not a control frame
        self._final = False
        self._units = UNITS_FREE
        self._looks = LOOKS_FREE
        self._busy = False  # messages of the client were left unread, and that was said
        self._mask = b""
        self._in_message = False
        self._packed = False
        self._parts: list[bytes] = []
        self._size = 0
        self._skimmed: Members | None = None  # a message that is too large to keep
        self.behind = False  # a step's worth was given out: feed nothing to get the next
        self.over = False  # nothing more is read

    def feed(self, data: bytes) -> list[bytes | Document]:
        found: list[bytes | Document] = []
        if self.over:
            return found
        try:
            self._read(data, found)
        except BrokenFrames as why:
            self._anomaly(why.kind)
            self._close()
        return found

    def _read(self, data: bytes, found: list[bytes | Document]) -> None:
        if not self.behind:  # else what it earned is still to be spent
            self._units = min(UNITS_FREE, self._units + UNITS_A_PIECE)
        self._units += len(data) // UNIT_BYTES
        self._looks = min(LOOKS_FREE, self._looks + LOOKS_A_PIECE) + len(data) // LOOK_BYTES
        self.behind = False
        if self._head:
            data = self._head + data
            self._head = b""
        pos, end = 0, len(data)
        whole = self._signs is not None and (self._masked or self._inflater is None)
        while pos < end:
            if not self._left:
                if whole and not self._in_message:
                    pos = self._masked_ones(data, pos, found) if self._masked else self._plain_ones(data, pos, found)
                    if pos == end:
                        return
                if len(found) >= STEP_MESSAGES and not self._masked:
                    self.behind = True
                    self._head = data[pos:]
                    return
                after = self._open_frame(data, pos, end)
                if after < 0:
                    self._head = data[pos:]
                    return
                self._units -= UNITS_A_MESSAGE if self._final and data[pos] & 0x0F else UNITS_A_FRAGMENT
                if self._units < 0:
                    raise BrokenFrames("websocket_too_busy")
                pos = after
            stop = min(end, pos + self._left)
            if self._data:
                self._take(data, pos, stop)
            self._left -= stop - pos
            pos = stop
            if self.over:
                return
            if not self._left and self._data and self._final:
                self._end_message(found)

    def _plain_ones(self, data: bytes, pos: int, found: list[bytes | Document]) -> int:
        """Pass over messages that are whole and unmasked, and give out those with a sign; where that ends."""
        end, units = len(data), self._units
        signs = dict.fromkeys(self._signs or (), -1)
        sign = _next(data, pos, signs)
        while pos + 2 <= end and len(found) < STEP_MESSAGES:
            first, size = data[pos], data[pos + 1]
            after = pos + 2 + size
            if size >= 126:
                if size != 126 or pos + 4 > end:
                    break
                size = data[pos + 2] << 8 | data[pos + 3]
                after = pos + 4 + size
            if after > end or (first not in _DATA and (first not in _BEATS or size > 125)):
                break
            units -= 1
            if sign < after:
                if first in _DATA:
                    units -= UNITS_A_MESSAGE - 1
                    found.append(data[after - size : after])
                sign = _next(data, after, signs)
            if units < 0:
                raise BrokenFrames("websocket_too_busy")
            pos = after
        self._units = units
        return pos

    def _masked_ones(self, data: bytes, pos: int, found: list[bytes | Document]) -> int:
        """The same for a client's, each of which has a mask of its own."""
        end, units = len(data), self._units
        speaking = SPEAKING_BYTES if self._signs else sys.maxsize
        while pos + 6 <= end:
            first, size = data[pos], data[pos + 1] - 0x80
            after = pos + 6 + size
            if size >= 126:
                if size != 126 or pos + 8 > end:
                    break
                size = data[pos + 2] << 8 | data[pos + 3]
                after = pos + 8 + size
            if size < 0 or after > end:
                break
            if first not in _DATA and (first not in _BEATS or size > 125):
                break
            units -= 1
            if units < 0:
                raise BrokenFrames("websocket_too_busy")
            if size >= speaking and first in _DATA and (self._looks > 0 or not self._busy):
                self._look(data, after - size, after, found)
            pos = after
        self._units = units
        return pos

    def _look(self, data: bytes, pos: int, stop: int, found: list[bytes | Document]) -> None:
        """Give a client's message out if it has a sign."""
        if self._looks <= 0:
            if not self._busy:
                self._busy = True
                self._anomaly("websocket_too_busy")
            return
        self._looks -= 1
        signs, mask = self._signs or (), data[pos - 4 : pos]
        if stop - pos > UNMASKED_BYTES:
            key = mask * (max(map(len, signs)) // 4 + 2)
            if all(data.find(_xor(sign, key[at:]), pos, stop) < 0 for sign in signs for at in range(4)):
                return
        message = _xor(data[pos:stop], mask * ((stop - pos) // 4 + 1))
        if any(sign in message for sign in signs):
            self._looks -= LOOKS_A_MESSAGE
            found.append(message)

    def _open_frame(self, data: bytes, pos: int, end: int) -> int:
        """Read a frame's head; the place behind it, or -1 where it is cut."""
        if end - pos < 2:
            return -1
        first, second = data[pos], data[pos + 1]
        size = second & 0x7F
        at = pos + 2
        wide = 2 if size == 126 else 8 if size == 127 else 0
        after = at + wide + (4 if self._masked else 0)
        if bool(second & 0x80) is not self._masked:
            raise BrokenFrames("websocket_frame")
        if after > end:
            return -1
        if wide:
            size = int.from_bytes(data[at : at + wide], "big")
            at += wide
        if self._masked:
            self._mask = data[at : at + 4]
        self._left = size
        self._final = first & 0x80 != 0
        self._sort(first & 0x0F, first & 0x70, size)
        return after

    def _sort(self, opcode: int, reserved: int, size: int) -> None:
        """What a frame is to the message."""
        if opcode >= 8:
            if opcode > 10 or not self._final or size > 125 or reserved:
                raise BrokenFrames("websocket_frame")
            self._data = False
            if opcode == 8:
                self._close()  # the goodbye: no message comes behind it
            return
        self._data = True
        continues = opcode == 0
        packed = reserved == 0x40 and not continues and self._inflater is not None
        if opcode > 2 or continues is not self._in_message or (reserved and not packed) or size >= 1 << 63:
            raise BrokenFrames("websocket_frame")
        if not continues:
            self._in_message = True
            self._packed = packed
        if not self._packed and self._size + size > MESSAGE_MAX_BYTES:
            self._skim()

    def _take(self, data: bytes, pos: int, stop: int) -> None:
        """A piece of a message's payload."""
        piece = data[pos:stop]
        if self._masked:
            piece = self._unmask(piece)
        if self._packed:
            assert self._inflater is not None
            piece = self._inflater.feed(piece)
        self._keep(piece)

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._skimmed is None and self._size > MESSAGE_MAX_BYTES:
            self._skim()
        if self._skimmed is not None:
            self._skimmed.feed(piece)
        elif piece:
            self._parts.append(piece)

    def _end_message(self, found: list[bytes | Document]) -> None:
        if self._packed:
            assert self._inflater is not None
            self._keep(self._inflater.end())
        parts, skimmed = self._parts, self._skimmed
        if skimmed is None:
            message = parts[0] if len(parts) == 1 else b"".join(parts)
            if self._signs is None or any(sign in message for sign in self._signs):
                found.append(message)
        elif skimmed.document:
            if skimmed.oversized:
                self._anomaly("value_oversized")
            found.append(skimmed.document)
        self._parts = []
        self._size = 0
        self._in_message = False
        self._skimmed = None

    def _skim(self) -> None:
        if self._skimmed is None:
            self._skimmed = Members(self._places)
            for piece in self._parts:
                self._skimmed.feed(piece)
            self._parts = []

    def _unmask(self, piece: bytes) -> bytes:
        size, mask = len(piece), self._mask
        self._mask = mask[size % 4 :] + mask[: size % 4]
        return _xor(piece, mask * (size // 4 + 1))

    def _close(self) -> None:
        self.over = True
        self.behind = False
        self._parts = []
        self._skimmed = self._inflater = None


def _next(data: bytes, pos: int, signs: dict[bytes, int]) -> int:
    """Where the next of the signs is, from `pos` on; `signs` has where each was found last."""
    nearest = len(data)
    for sign, at in signs.items():
        if at < pos:
            at = data.find(sign, pos)
            signs[sign] = at = at if at >= 0 else len(data)
        nearest = min(nearest, at)
    return nearest


def _xor(data: bytes, key: bytes) -> bytes:
    size = len(data)
    return (int.from_bytes(data, "little") ^ int.from_bytes(key[:size], "little")).to_bytes(size, "little")


class SessionTap:
    """Implements `sidecar.usage.SocketTap`."""

    __slots__ = ("_anomaly", "_client", "_server", "_session")

    def __init__(
        self, session: Session, client: MessageReader, server: MessageReader, anomaly: Callable[[str], None]
    ) -> None:
        self._session = session
        self._client = client
        self._server = server
        self._anomaly = anomaly

    @classmethod
    def over(cls, session: Session, headers: RawHeaders, anomaly: Callable[[str], None]) -> SessionTap | None:
        """The tap of a connection that was switched with this head; None where it cannot be read."""
        agreed = extensions(headers)
        if agreed is None:
            anomaly("websocket_extension")
            return None
        return cls(
            session,
            MessageReader(
                masked=True,
                inflater=_inflater(agreed, "client_no_context_takeover"),
                anomaly=anomaly,
                places=session.client_places,
                signs=session.client_signs,
            ),
            MessageReader(
                masked=False,
                inflater=_inflater(agreed, "server_no_context_takeover"),
                anomaly=anomaly,
                places=session.server_places,
                signs=session.server_signs,
            ),
            anomaly,
        )

    @property
    def behind(self) -> bool:
        """Whether messages of the server still wait: `from_server(b"")` works off another step of them."""
        return self._server.behind

    def from_client(self, data: bytes) -> None:
        try:
            for message in self._client.feed(data):
                self._session.client(message)
        except Exception:  # noqa: BLE001 - a fault in a reader must never become a fault of the call
            self._anomaly("reader_failed")

    def from_server(self, data: bytes) -> Sequence[Usage]:
        found: list[Usage] = []
        try:
            for message in self._server.feed(data):
                usage = self._session.server(message)
                if usage is not None:
                    found.append(usage)
        except Exception:  # noqa: BLE001 - see above
            self._anomaly("reader_failed")
        return found


def is_websocket(headers: RawHeaders) -> bool:
    """Whether a 101 with this head switched to WebSocket."""
    return any(name.lower() == b"upgrade" and value.strip().lower() == b"websocket" for name, value in headers)


def extensions(headers: RawHeaders) -> frozenset[str] | None:
    """The parameters of permessage-deflate, which is among them where it was agreed on; None where something
    else was: its frames mean what only the two sides know."""
    agreed: list[str] = []
    for name, value in headers:
        if name.lower() == b"sec-websocket-extensions":
            agreed += (text for text in value.decode("latin-1").split(",") if text.strip())
    if not agreed:
        return frozenset()
    parameters = [text.partition("=")[0].strip().lower() for text in agreed[0].split(";")]
    return frozenset(parameters) if len(agreed) == 1 and parameters[0] == _DEFLATE else None


def _inflater(agreed: frozenset[str], no_takeover: str) -> Inflater | None:
    return Inflater(takeover=no_takeover not in agreed) if agreed else None
