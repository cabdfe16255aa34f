"""One request's body on its way to the upstream, and what is kept of the request while it may have to go again.

aiohttp's parser fills a reader with it; it is read without waiting, whenever there is something and the upstream takes
it. Where usage is asked for on the client's behalf (`SIDECAR_ASK_FOR_USAGE`: the one place where the hop changes a
message) the body is gathered before it leaves, because its length changes. That is done only with small plain JSON;
what nobody may change (a signed or digested body, one that waits for a 100) is passed on as ever.
"""

from __future__ import annotations

import logging
from typing import Final

from sidecar.proxy.aiohttp_compat import StreamReader
from sidecar.usage import RawHeaders, RequestTap
from sidecar.usage.include_usage import BODY_MAX_BYTES

log = logging.getLogger(__name__)

# Of these a request may go again although nobody says so.
IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE", "QUERY", "PROPFIND", "REPORT"})
COPY_PIECES_MAX: Final = 64  # of a request kept to go again: many small pieces cost more than they weigh

# With one of these in its head a body is to arrive as it was sent, or is not plain JSON of a known length.
_HANDS_OFF: Final = frozenset({
    b"content-encoding", b"transfer-encoding", b"expect", b"content-md5", b"digest", b"content-digest",
    b"repr-digest", b"signature", b"signature-input", b"x-amz-content-sha256", b"x-signature",
})  # fmt: skip


class RequestBody:
    """Take from it; `done` says when that was all."""

    __slots__ = (
        "_chunked", "_copy", "_copy_bytes", "_copy_bytes_max", "_gathered", "_payload", "blocked", "done", "reading",
        "size_bytes", "tap",
    )  # fmt: skip

    def __init__(self, payload: StreamReader, *, chunked: bool) -> None:
        self._payload = payload
        self._chunked = chunked
        self._gathered: list[bytes] = []  # read, and not passed on
        self._copy: list[bytes] | None = None  # of the request as it was sent
        self._copy_bytes = 0
        self._copy_bytes_max = 0
        self.tap: RequestTap | None = None
        self.done = False
        self.reading = False  # reading may wake the parser, which may ask for more to be read
        self.blocked = False  # the upstream does not read as fast as the body comes
        self.size_bytes = 0

    # -- towards the upstream --------------------------------------------------------------------

    def take(self) -> bytes:
        """What has come since the last time, framed for the upstream."""
        piece = self._read()
        if self._gathered:
            piece = b"".join(self._gathered) + piece
            self._gathered.clear()
        wire = piece
        if piece and self._chunked:
            wire = b"%x\r\n%b\r\n" % (len(piece), piece)
        if self.done and self._chunked:
            wire += b"0\r\n\r\n"
        if wire and self._copy is not None:
            self._keep(wire)
        return wire

    def gather(self) -> bytes | None:
        """The whole body, once it has come. The tap has not seen it yet."""
        self._gathered.append(self._read())
        if not self.done:
            return None
        whole = b"".join(self._gathered)
        self._gathered.clear()
        return whole

    def look_ahead(self) -> None:
        """Read what has come, and keep it for `take` or `gather`."""
        if piece := self._read():
            self._gathered.append(piece)

    @property
    def ahead(self) -> bytes:
        """What was read and not taken yet."""
        return b"".join(self._gathered)

    @property
    def came(self) -> bool:
        """Whether the parser has all of it, read or not."""
        return self._payload.is_eof()

    @property
    def holds(self) -> bool:
        """Whether something was read that nobody has taken yet."""
        return bool(self._gathered)

    def look(self) -> None:
        """Show the tap what has come of a body that went nowhere."""
        if not (self.size_bytes or self.done or self.reading) and self._payload.exception() is None:
            self._read()

    def _read(self) -> bytes:
        self.reading = True
        try:
            piece = self._payload.read_nowait()
        finally:
            self.reading = False
        if piece:
            self.size_bytes += len(piece)
            if self.tap is not None:
                self._show(piece)
        if self._payload.at_eof():
            self.done = True
        return piece

    def _show(self, piece: bytes) -> None:
        try:
            assert self.tap is not None
            self.tap.feed(piece)
        except Exception:
            log.exception("the request tap failed; the call goes on without it")
            self.tap = None

    # -- once more -------------------------------------------------------------------------------

    def keep(self, first: bytes, bytes_max: int) -> None:
        """From here on what is sent is kept, as long as it is small enough. `first` is sent already."""
        self._copy_bytes_max = bytes_max
        self._copy = []
        self._keep(first)

    def _keep(self, piece: bytes) -> None:
        copy = self._copy
        assert copy is not None
        self._copy_bytes += len(piece)
        if self._copy_bytes > self._copy_bytes_max or len(copy) >= COPY_PIECES_MAX:
            self._copy = None
        else:
            copy.append(piece)

    def forget(self) -> None:
        """A byte of the response has come: nothing goes again."""
        self._copy = None

    def again(self) -> bytes | None:
        """The request as far as it was sent, to be sent once more; None where that may not be."""
        copy, self._copy = self._copy, None
        return None if copy is None else b"".join(copy)


def may_change(method: str, fields: RawHeaders) -> bool:
    """Whether this head leaves room for another body than the client's."""
    if method != "POST":
        return False
    length = -1
    for name, value in fields:
        lower = name.lower()
        if lower in _HANDS_OFF or (lower == b"content-type" and b"json" not in value.lower()):
            return False
        if lower == b"content-length":
            if length >= 0 or not value.isdigit():
                return False
            length = int(value)
    return 0 < length <= BODY_MAX_BYTES


def head_of(fields: RawHeaders, size_bytes: int) -> RawHeaders:
    """The head of a body that was changed. The response has to come plain, or what is added could not be taken out."""
    own = {b"content-length": b"%d" % size_bytes, b"accept-encoding": b"identity"}
    return [(name, own.get(name.lower(), value)) for name, value in fields]
