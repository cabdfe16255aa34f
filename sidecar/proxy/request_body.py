"""One request's body on its way to the upstream.

aiohttp's parser fills a reader with it; it is read without waiting, whenever there is something and
the upstream takes it. What was sent is kept for a while, should the one retry need it.
"""

from __future__ import annotations

import logging
from typing import Final

from sidecar.proxy.aiohttp_compat import StreamReader
from sidecar.usage import RequestTap

log = logging.getLogger(__name__)

KEPT_PIECES_MAX: Final = 64  # of an upload kept for a retry: many small pieces cost more than they weigh


class Upload:
    """Take from it; `done` says when that was all."""

    __slots__ = ("_chunked", "_payload", "_tap", "done", "reading", "size_bytes")

    def __init__(self, payload: StreamReader, *, chunked: bool, tap: RequestTap | None) -> None:
        self._payload = payload
        self._chunked = chunked
        self._tap = tap
        self.done = False
        self.reading = False  # reading may wake the parser, which may ask for more to be read
        self.size_bytes = 0

    def take(self) -> bytes:
        """What has come since the last time, framed for the upstream."""
        self.reading = True
        try:
            piece = self._payload.read_nowait()
        finally:
            self.reading = False
        wire = piece
        if piece:
            self.size_bytes += len(piece)
            if self._tap is not None:
                self._show(piece)
            if self._chunked:
                wire = b"%x\r\n%b\r\n" % (len(piece), piece)
        if self._payload.at_eof():
            self.done = True
            if self._chunked:
                wire += b"0\r\n\r\n"
        return wire

    def _show(self, piece: bytes) -> None:
        try:
            assert self._tap is not None
            self._tap.feed(piece)
        except Exception:
            log.exception("the request tap failed; the call goes on without it")
            self._tap = None


class Kept:
    """A request as it was sent, while a retry may need it and it is small enough."""

    __slots__ = ("_bytes_max", "_pieces", "_size")

    def __init__(self, first: bytes, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._size = len(first)
        self._pieces: list[bytes] | None = [first] if len(first) <= bytes_max else None

    def add(self, piece: bytes) -> None:
        """One more piece was sent."""
        pieces = self._pieces
        if pieces is None:
            return
        self._size += len(piece)
        if self._size > self._bytes_max or len(pieces) >= KEPT_PIECES_MAX:
            self._pieces = None
        else:
            pieces.append(piece)

    def whole(self) -> bytes | None:
        """All of it, or None where it grew too large."""
        return None if self._pieces is None else b"".join(self._pieces)
