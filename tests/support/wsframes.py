"""WebSocket frames by hand, so that a test can send what no library would."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(
    payload: bytes, opcode: int = TEXT, *, mask: bytes | None = None, final: bool = True, reserved: int = 0
) -> bytes:
    size = len(payload)
    marked = 0x80 if mask is not None else 0
    head = bytes([(0x80 if final else 0) | reserved | opcode])
    if size < 126:
        head += bytes([marked | size])
    elif size < 65_536:
        head += bytes([marked | 126]) + size.to_bytes(2, "big")
    else:
        head += bytes([marked | 127]) + size.to_bytes(8, "big")
    if mask is None:
        return head + payload
    return head + mask + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def fragments(pieces: Iterable[bytes], *, mask: bytes | None = None, reserved: int = 0, between: bytes = b"") -> bytes:
    """One message in several frames, with `between` them."""
    pieces = list(pieces)
    return between.join(
        frame(
            piece,
            TEXT if number == 0 else 0,
            mask=mask,
            final=number == len(pieces) - 1,
            reserved=reserved if number == 0 else 0,
        )
        for number, piece in enumerate(pieces)
    )


class Packer:
    """The packing half of permessage-deflate."""

    def __init__(self, *, takeover: bool = True) -> None:
        self._takeover = takeover
        self._pack = zlib.compressobj(9, zlib.DEFLATED, -15)

    def __call__(self, message: bytes) -> bytes:
        packed = self._pack.compress(message) + self._pack.flush(zlib.Z_SYNC_FLUSH)
        if not self._takeover:
            self._pack = zlib.compressobj(9, zlib.DEFLATED, -15)
        return packed.removesuffix(b"\x00\x00\xff\xff")
