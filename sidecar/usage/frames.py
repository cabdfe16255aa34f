"""Amazon's event stream (`application/vnd.amazon.eventstream`): binary frames with two checksums each.

A frame is: total length, length of the headers, CRC-32 of these eight bytes; headers; payload; CRC-32 of everything
before. All numbers are big-endian. A wrong checksum or an impossible length ends the reading: after it no
frame border can be trusted. Frames whose names say that they hold only text are passed over without being unpacked.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from typing import Protocol

from sidecar.usage.codings import Unreadable

PRELUDE_BYTES = 12
HEADERS_MAX_BYTES = 131_072  # botocore's limit
PAYLOAD_MAX_BYTES = 25_165_824  # botocore's limit, 24 MiB
KEPT_MAX_BYTES = 262_144  # of a frame that is read; a larger one is passed over, its checksum still checked

FRAMES_FREE = 1_024  # before their number must be in proportion to their length
FRAME_BYTES = 64  # that pay for one; the smallest of a real stream have twice that
FRAMES_A_PIECE = 16  # paid for by each piece, which costs more than they do

_PRELUDE = struct.Struct("!III")
_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}  # value bytes by header type; 6 and 7 state theirs


class FrameReader(Protocol):
    """What a reader of frames offers beside `Reader`."""

    def dull_frame(self, head: bytes) -> bool:
        """Whether a frame with these header bytes can hold nothing of interest."""
        ...

    def frame(self, headers: Mapping[str, str], payload: bytes) -> bool:
        """Take one frame; True when it is the stream's end mark."""
        ...


def begins(start: bytes) -> bool | None:
    """Whether these are the first bytes of a frame, whatever their type says; None while too few of them are there."""
    if len(start) < PRELUDE_BYTES:
        return None if start[:1] in (b"\x00", b"\x01") else False
    total, _, crc = _PRELUDE.unpack_from(start)
    return bool(total >= PRELUDE_BYTES + 4 and zlib.crc32(start[:8]) == crc)


class EventStream:
    """Implements `framing.Framing` for binary frames."""

    __slots__ = ("_crc", "_left", "_reader", "_rest", "_skip", "busy", "ended", "streamed")

    def __init__(self, reader: FrameReader) -> None:
        self._reader = reader
        self._rest = bytearray()
        self._skip = 0  # bytes still to pass of a frame too large to keep
        self._crc = 0
        self._left = FRAMES_FREE
        self.streamed = True
        self.ended = self.busy = False

    def feed(self, piece: bytes) -> bool:
        if self._skip:
            piece = self._pass_over(piece)
        rest = self._rest
        rest += piece
        self._left = min(FRAMES_FREE, self._left + FRAMES_A_PIECE) + len(piece) // FRAME_BYTES
        while not self._skip and len(rest) >= PRELUDE_BYTES:
            total, head_size = _check(rest)
            if total > KEPT_MAX_BYTES:
                self._skip, self._crc = total, 0
                start = bytes(rest)
                rest.clear()
                rest += self._pass_over(start)
                continue
            if len(rest) < total:
                return False
            self._left -= 1
            if self._left < 0:
                self.busy = True
                raise Unreadable("stream_too_busy", "the answer has more frames than its length allows")
            frame = bytes(rest[:total])
            del rest[:total]
            if zlib.crc32(frame[:-4]) != int.from_bytes(frame[-4:], "big"):
                raise Unreadable("frame_damaged", "a frame's checksum is wrong")
            head = frame[PRELUDE_BYTES : PRELUDE_BYTES + head_size]
            if self._reader.dull_frame(head):
                continue
            payload = frame[PRELUDE_BYTES + head_size : -4]
            if self._reader.frame(_headers(head), payload):
                return True
        return False

    def finish(self, whole: bool = True) -> None:
        self._rest.clear()

    def _pass_over(self, piece: bytes) -> bytes:
        """Skip what belongs to the large frame; the rest of the piece. Its last four bytes are its checksum."""
        taken = piece[: self._skip]
        before = max(0, min(len(taken), self._skip - 4))
        self._crc = zlib.crc32(taken[:before], self._crc)
        self._rest += taken[before:]
        self._skip -= len(taken)
        if self._skip == 0:
            if self._crc != int.from_bytes(self._rest, "big"):
                raise Unreadable("frame_damaged", "a frame's checksum is wrong")
            self._rest.clear()
        return piece[len(taken) :]


def _check(rest: bytearray) -> tuple[int, int]:
    total, head_size, crc = _PRELUDE.unpack_from(rest)
    if zlib.crc32(rest[:8]) != crc:
        raise Unreadable("frame_damaged", "a frame's checksum is wrong")
    if head_size > HEADERS_MAX_BYTES or not head_size + 16 <= total <= head_size + PAYLOAD_MAX_BYTES + 16:
        raise Unreadable("frame_damaged", "a frame's length is impossible")
    return total, head_size


def _headers(head: bytes) -> dict[str, str]:
    """The headers that hold text; others are passed over."""
    found: dict[str, str] = {}
    pos = 0
    while pos < len(head):
        name_end = pos + 1 + head[pos]
        name = head[pos + 1 : name_end].decode("utf-8", "replace")
        kind = head[name_end] if name_end < len(head) else -1
        pos = name_end + 1
        if kind in (6, 7):
            size = int.from_bytes(head[pos : pos + 2], "big")
            if name in found:
                raise Unreadable("frame_damaged", "a frame repeats a header")
            found[name] = head[pos + 2 : pos + 2 + size].decode("utf-8", "replace") if kind == 7 else ""
            pos += 2 + size
        elif kind in _SIZES:
            pos += _SIZES[kind]
        else:
            raise Unreadable("frame_damaged", "a frame's headers are damaged")
    return found
