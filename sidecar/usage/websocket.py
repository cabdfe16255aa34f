"""Reading along with a WebSocket: frames of both sides become messages, and messages of the provider become usage.

What is read is a copy; the tunnel passes the bytes on whatever is found here. So a frame that breaks the protocol, a
coding that nobody agreed on or a message that unpacks to too much ends the reading of that side, never the tunnel.
Memory is bounded by one message, and of a larger one only what is wanted is kept; time by what came, because unpacking
has an allowance that grows with it.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from sidecar.exchange import Usage
from sidecar.usage import RawHeaders
from sidecar.usage.members import Members, Tree
from sidecar.usage.reader import Document
from sidecar.usage.sockets import Session

MESSAGE_MAX_BYTES = 262_144  # of a message kept whole; a larger one (a response with a picture) is skimmed as it passes
UNPACKED_MAX_BYTES = 4_194_304  # that may come of one piece at once: 10 ms of unpacking
UNPACKED_RATIO = 64  # and for each byte that comes, on and on; JSON unpacks to 5 to 20, silent sound in base64 to 60
FRAMES_FREE = 1_024  # of one side, before their number must be in proportion to their length
FRAME_BYTES = 64  # that pay for one; the smallest messages of a model have about as many
FRAMES_A_PIECE = 16  # paid for by each piece, which costs more than they do
HEAD_MAX_BYTES = 14  # of a frame: two bytes, a length of eight, a mask of four

_EMPTY_BLOCK = b"\x00\x00\xff\xff"  # what a sender leaves off at a message's end
_DEFLATE = "permessage-deflate"


class Unreadable(Exception):
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
        """Raises `Unreadable`."""
        allowance = min(UNPACKED_MAX_BYTES, self._allowance + UNPACKED_RATIO * len(piece))
        try:
            unpacked = self._unpack.decompress(piece, allowance + 1)
        except zlib.error:
            raise Unreadable("websocket_coding") from None
        self._allowance = allowance - len(unpacked)
        if self._allowance < 0 or self._unpack.unconsumed_tail:
            raise Unreadable("websocket_too_dense")
        if self._unpack.unused_data:
            raise Unreadable("websocket_coding")
        return unpacked

    def end(self) -> bytes:
        """The rest of a message. Raises `Unreadable`."""
        rest = b"" if self._unpack.eof else self.feed(_EMPTY_BLOCK)
        if not self._takeover or self._unpack.eof:
            self._unpack = zlib.decompressobj(-15)
        return rest


class MessageReader:
    """One side's frames, cut anywhere. `feed` gives the messages that ended in what it was fed."""

    __slots__ = (
        "_anomaly", "_data", "_final", "_frames", "_head", "_in_message", "_inflater", "_left", "_mask", "_masked",
        "_packed", "_parts", "_places", "_size", "_skimmed", "over",
    )  # fmt: skip

    def __init__(
        self, *, masked: bool, inflater: Inflater | None, anomaly: Callable[[str], None], places: Tree | None = None
    ) -> None:
        """`places`: what is wanted of a message that is too large to keep."""
        self._places = places or {}
        self._masked = masked
        self._inflater = inflater
        self._anomaly = anomaly
        self._head = b""  # of a frame whose head is cut
        self._left = 0  # of a frame's payload
        self._data = False  # the frame is a message's, and not a control frame
        self._final = False
        self._frames = FRAMES_FREE
        self._mask = b""
        self._in_message = False
        self._packed = False
        self._parts: list[bytes] = []
        self._size = 0
        self._skimmed: Members | None = None  # a message that is too large to keep
        self.over = False  # nothing more is read

    def feed(self, data: bytes) -> list[bytes | Document]:
        found: list[bytes | Document] = []
        if self.over:
            return found
        try:
            self._read(data, found)
        except Unreadable as why:
            self._anomaly(why.kind)
            self._close()
        return found

    def _read(self, data: bytes, found: list[bytes | Document]) -> None:
        if self._head:
            data = self._head + data
            self._head = b""
        pos, end = 0, len(data)
        self._frames = min(FRAMES_FREE, self._frames + FRAMES_A_PIECE) + end // FRAME_BYTES
        while pos < end:
            if not self._left:
                self._frames -= 1
                if self._frames < 0:
                    raise Unreadable("websocket_too_busy")
                after = self._open_frame(data, pos, end)
                if after < 0:
                    self._head = data[pos:]
                    return
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
            raise Unreadable("websocket_frame")
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
                raise Unreadable("websocket_frame")
            self._data = False
            if opcode == 8:
                self._close()  # the goodbye: no message comes behind it
            return
        self._data = True
        continues = opcode == 0
        packed = reserved == 0x40 and not continues and self._inflater is not None
        if opcode > 2 or continues is not self._in_message or (reserved and not packed) or size >= 1 << 63:
            raise Unreadable("websocket_frame")
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
            found.append(parts[0] if len(parts) == 1 else b"".join(parts))
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
        key = (mask * (size // 4 + 1))[:size]
        self._mask = mask[size % 4 :] + mask[: size % 4]
        return (int.from_bytes(piece, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")

    def _close(self) -> None:
        self.over = True
        self._parts = []
        self._skimmed = self._inflater = None


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
            ),
            MessageReader(
                masked=False,
                inflater=_inflater(agreed, "server_no_context_takeover"),
                anomaly=anomaly,
                places=session.server_places,
            ),
            anomaly,
        )

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
