"""Amazon's event stream (`application/vnd.amazon.eventstream`): binary frames with two checksums each.

A frame is: total length, length of the headers, CRC-32 of these eight bytes; headers; payload; CRC-32 of everything
before. All numbers are big-endian. A wrong checksum or an impossible length ends the reading: after it no
frame border can be trusted. Frames whose names say that they hold only text are passed over without being unpacked; of
them the checksum that protects the border is looked at, and the other is not.

The heads of a stream are the same few again and again, so what is known of one is kept. Frames are rationed: of more
than their length allows, the last ones of each piece are read, as those of other streams are (see `framing`).
"""

from __future__ import annotations

import struct
import zlib
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from sidecar.usage.formats.content_encoding import Unreadable

PRELUDE_BYTES = 12
HEADERS_MAX_BYTES = 131_072  # botocore's limit
PAYLOAD_MAX_BYTES = 25_165_824  # botocore's limit, 24 MiB
KEPT_MAX_BYTES = 262_144  # of a frame that is read; a larger one is passed over, its checksum still checked

# Units of a tenth of a microsecond, as in `websocket`; the smallest frames of a real stream have 120 bytes.
UNITS_FREE = 1_024  # before the number of frames must be in proportion to their length
UNIT_BYTES = 64  # that earn one
UNITS_A_PIECE = 32  # earned by each piece, which costs more than they do
UNITS_A_HEAD = 16  # of a frame whose head did not come before
READS_FREE = 256  # frames that are unpacked
READ_BYTES = 1_536  # that earn one
READS_A_PIECE = 4  # earned by each piece
LAST_FRAMES = 8  # of each piece, which are looked at all the same
KNOWN_MAX = 64  # preludes, and heads, that are kept
KNOWN_HEAD_BYTES = 512  # of a head that is kept; real ones have 60 to 120
HEADERS_MAX = 64  # of a frame that are looked at; real ones have three or four

_PRELUDE = struct.Struct("!III")
_SIZES = {0: 0, 1: 0, 2: 1, 3: 2, 4: 4, 5: 8, 8: 8, 9: 16}  # value bytes by header type; 6 and 7 state theirs


# How it works. `feed` walks from frame to frame in what it has, and keeps the frame that is cut (`_rest`). For each:
#   1. the prelude (12 bytes) is looked up among those seen before, or checked by its own checksum;
#   2. a frame above KEPT_MAX_BYTES is passed over as it comes (`_skip`, `_crc`), with its checksum added up on the way;
#   3. a head known to be of no interest (`_skipped`) is passed over; its payload's checksum is not looked at;
#   4. else the whole frame's checksum is verified, the head unpacked (or looked up), and the payload handed over.
# Two rations: `_units` for every frame (spent: the reading ends, borders cannot be walked on for free), `_reads` for
# those unpacked (spent: of each piece only its last frames are, `late`).


class FrameReader(Protocol):
    """What a reader of frames offers beside `Reader`."""

    def can_skip_frame(self, head: bytes) -> bool:
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

    __slots__ = (
        "_crc",
        "_heads",
        "_preludes",
        "_reader",
        "_reads",
        "_rest",
        "_skip",
        "_skipped",
        "_units",
        "busy",
        "ended",
        "streamed",
    )  # fmt: skip

    def __init__(self, reader: FrameReader) -> None:
        self._reader = reader
        self._rest = b""
        self._skip = 0  # bytes still to pass of a frame too large to keep
        self._crc = 0
        self._units = UNITS_FREE
        self._reads = READS_FREE
        self._preludes: dict[bytes, tuple[int, int]] = {}
        self._skipped: set[bytes] = set()
        self._heads: dict[bytes, dict[str, str]] = {}
        self.streamed = True
        self.ended = self.busy = False

    def feed(self, piece: bytes) -> bool:
        self._units = min(UNITS_FREE, self._units + UNITS_A_PIECE) + len(piece) // UNIT_BYTES
        self._reads = min(READS_FREE, self._reads + READS_A_PIECE) + len(piece) // READ_BYTES
        if self._skip:
            piece = self._pass_over(piece)
        data = self._rest + piece if self._rest and not self._skip else piece
        pos, end = 0, len(data)
        late: deque[int] = deque(maxlen=LAST_FRAMES)  # where they begin
        preludes, skipped, units, spent = self._preludes, self._skipped, self._units, self._reads <= 0
        last = b""  # the head that was skipped last: frames of one kind follow each other
        while not self._skip and end - pos >= PRELUDE_BYTES:
            known = preludes.get(data[pos : pos + PRELUDE_BYTES])
            total, head_size = known if known is not None else self._check(data, pos)
            if total > KEPT_MAX_BYTES:
                if late and self._read_late(data, late):
                    return True
                self._skip, self._crc, self._rest = total, 0, b""
                data, pos = self._pass_over(data[pos:]), 0
                end = len(data)
                continue
            after = pos + total
            if after > end:
                break
            units -= 1
            if units < 0:
                self.busy = True
                raise Unreadable("stream_too_busy", "the answer has more frames than its length allows")
            if spent:
                late.append(pos)
                alike = data[pos : pos + PRELUDE_BYTES + head_size]  # those that begin so are as long
                while units > 0 and after + total <= end and data.startswith(alike, after):
                    late.append(after)
                    after += total
                    units -= 1
            elif not (last and head_size == len(last) and data.startswith(last, pos + PRELUDE_BYTES)):
                head = data[pos + PRELUDE_BYTES : pos + PRELUDE_BYTES + head_size]
                if head in skipped:
                    last = head
                else:
                    self._units = units
                    if self._read(data, pos, head_size, after):
                        return True
                    units, spent = self._units, self._reads <= 0
            else:
                # Those behind it that begin alike are as long, and of a kind that nobody reads: they are passed by.
                alike = data[pos : pos + PRELUDE_BYTES + head_size]
                while units > 0 and after + total <= end and data.startswith(alike, after):
                    after += total
                    units -= 1
            pos = after
        self._units = units
        if not self._skip:
            self._rest = data[pos:]
        return bool(late) and self._read_late(data, late)

    def _read(self, data: bytes, pos: int, head_size: int, after: int) -> bool:
        head = data[pos + PRELUDE_BYTES : pos + PRELUDE_BYTES + head_size]
        if zlib.crc32(data[pos : after - 4]) != int.from_bytes(data[after - 4 : after], "big"):
            raise Unreadable("frame_damaged", "a frame's checksum is wrong")
        if self._reader.can_skip_frame(head):
            if len(self._skipped) < KNOWN_MAX and head_size <= KNOWN_HEAD_BYTES:
                self._skipped.add(head)
            else:
                self._reads -= 1  # each is another one: that is no real stream
            return False
        self._reads -= 1
        return self._reader.frame(self._headers(head), data[pos + PRELUDE_BYTES + head_size : after - 4])

    def _read_late(self, data: bytes, late: deque[int]) -> bool:
        """The stream is beyond its ration: the last frames of what came."""
        self.busy = True
        while late:
            pos = late.popleft()
            total, head_size, _ = _PRELUDE.unpack_from(data, pos)
            if data[pos + PRELUDE_BYTES : pos + PRELUDE_BYTES + head_size] in self._skipped:
                continue
            if self._read(data, pos, head_size, pos + total):
                return True
        return False

    def _check(self, data: bytes, pos: int) -> tuple[int, int]:
        total, head_size, crc = _PRELUDE.unpack_from(data, pos)
        if zlib.crc32(data[pos : pos + 8]) != crc:
            raise Unreadable("frame_damaged", "a frame's checksum is wrong")
        if head_size > HEADERS_MAX_BYTES or not head_size + 16 <= total <= head_size + PAYLOAD_MAX_BYTES + 16:
            raise Unreadable("frame_damaged", "a frame's length is impossible")
        if len(self._preludes) < KNOWN_MAX:
            self._preludes[data[pos : pos + PRELUDE_BYTES]] = (total, head_size)
        return total, head_size

    def _headers(self, head: bytes) -> dict[str, str]:
        found = self._heads.get(head)
        if found is None:
            self._units -= UNITS_A_HEAD
            self._reads -= 1
            found = _headers(head)
            if len(self._heads) < KNOWN_MAX and len(head) <= KNOWN_HEAD_BYTES:
                self._heads[head] = found
        return found

    def finish(self, whole: bool = True) -> None:
        self._rest = b""

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
            self._rest = b""
        return piece[len(taken) :]


def _headers(head: bytes) -> dict[str, str]:
    """The headers that hold text, of the first ones; others are passed over."""
    found: dict[str, str] = {}
    pos = 0
    for _ in range(HEADERS_MAX):
        if pos >= len(head):
            break
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
