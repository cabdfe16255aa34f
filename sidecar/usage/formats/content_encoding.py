"""Undoing content codings on a copy of the bytes, a bounded step at a time.

The client gets the coded bytes as they came; only the reader of usage needs the plain ones. One call of `feed` makes
at most a step's worth of output, whatever came in: what is left over waits, still compressed, and is worked off with
the next pieces (or with empty ones). So a bomb costs a call what any piece costs, and it ends the reading, never
the call, once its size or its backlog passes a limit.

`gzip` may have several members, be flushed anywhere and lack its trailer; `deflate` comes with and without zlib's
wrapper; codings may be stacked (`gzip, br` is undone from the right).
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import brotli

if sys.version_info >= (3, 14):  # pragma: no cover
    from compression import zstd
else:
    from backports import zstd

PART_BYTES = 65_536  # output handed on at a time; what aiohttp reads from a socket at most
STEP_BYTES = 524_288  # output made for one piece, however small: about half a millisecond of inflating
STEP_RATIO = 32  # … and for a large one; JSON seldom shrinks by more than 20
STEP_MAX_BYTES = 3_145_728  # … and for the largest: 10 ms with reading it, whatever it holds
WINDOW_BYTES = 16_384  # of what waits that is looked at at a time: each member copies what is left of it
MEMBERS_A_READ = 16  # after which it is looked whether the step is over
MEMBER_BYTES = 8_192  # output that a member costs as much as, however empty it is
BACKLOG_MAX_BYTES = 1_048_576  # compressed bytes that wait: the side buffer of a call
DECODED_MAX_BYTES = 4_294_967_296  # of one body: nothing larger has been seen as JSON
RATIO_MAX = 200  # decoded : coded, looked at only beyond the next limit
RATIO_FREE_BYTES = 67_108_864  # a highly regular body (one float repeated) of this size is still believed: 0.1 s in all
CODINGS_MAX = 3  # stacked in one header; more is an attack on whoever unstacks them
ZSTD_WINDOW_LOG_MAX = 23  # 8 MiB, RFC 9659


class Unreadable(Exception):
    """The copy cannot be read any further. `kind` names the anomaly, the text is the usage's reason."""

    def __init__(self, kind: str, reason: str | None) -> None:
        super().__init__(kind)
        self.kind = kind
        self.reason = reason


class _Stage(Protocol):
    waiting: bytes
    members: int
    """Begun since it was last looked."""

    @property
    def paused(self) -> bool:
        """Whether it stopped between members and not for want of input."""
        ...

    @property
    def amid(self) -> bool:
        """Whether something has begun in it that has not ended."""
        ...

    def read(self, room: int) -> bytes:
        """Up to about `room` bytes of output; empty when it needs input."""
        ...


class _Zlib:
    """gzip and deflate, with as many members as come."""

    __slots__ = ("_inflate", "_new", "_once", "_over", "_window", "members", "paused", "waiting")

    def __init__(self, wbits: int, *, once: bool) -> None:
        self._new: Callable[[], Any] = lambda: zlib.decompressobj(wbits)
        self._inflate: Any = None
        self._once = once
        self._over = False  # the only member ended: what comes behind it is none of ours
        self._window = b""
        self.members = 0
        self.paused = False
        self.waiting = b""

    @property
    def amid(self) -> bool:
        return self._inflate is not None

    def read(self, room: int) -> bytes:
        self.paused = False
        for _ in range(MEMBERS_A_READ):
            if self._over:
                self._window = self.waiting = b""
            if not self._window:
                self._window, self.waiting = self.waiting[:WINDOW_BYTES], self.waiting[WINDOW_BYTES:]
                if not self._window:
                    return b""
            if self._inflate is None:
                self._window = self._window.lstrip(b"\0")  # members may be padded with zeros
                if not self._window:
                    continue
                self._inflate = self._new()
                self.members += 1
            out: bytes = self._inflate.decompress(self._window, room)
            if not self._inflate.eof:
                self._window = self._inflate.unconsumed_tail
            else:
                self._window = self._inflate.unused_data
                self._inflate = None
                self._over = self._once
            if out:
                return out
        self.paused = True
        return b""


class _Deflate:
    """`deflate`: zlib's wrapper by the standard, raw from some servers; the first two bytes tell."""

    __slots__ = ("_stage", "waiting")

    members = 0

    def __init__(self) -> None:
        self._stage: _Zlib | None = None
        self.waiting = b""

    @property
    def paused(self) -> bool:
        return self._stage is not None and self._stage.paused

    @property
    def amid(self) -> bool:
        return bool(self.waiting) if self._stage is None else self._stage.amid

    def read(self, room: int) -> bytes:
        if self._stage is None:
            if len(self.waiting) < 2:
                return b""
            wrapped = self.waiting[0] & 0x0F == 8 and int.from_bytes(self.waiting[:2], "big") % 31 == 0
            self._stage = _Zlib(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS, once=True)
        self._stage.waiting, self.waiting = self.waiting, b""
        out = self._stage.read(room)
        self.waiting, self._stage.waiting = self._stage.waiting, b""
        return out


class _Brotli:
    """It takes in more than it gives out, and says that it takes more while it still holds some back."""

    __slots__ = ("_begun", "_decoder", "_held", "waiting")

    members = 0
    paused = False

    def __init__(self) -> None:
        self._decoder = brotli.Decompressor()
        self._begun = False
        self._held = False  # the last output may not have been all of it
        self.waiting = b""

    @property
    def amid(self) -> bool:
        return self._begun and not self._decoder.is_finished()

    def read(self, room: int) -> bytes:
        decoder = self._decoder
        if decoder.is_finished():
            self.waiting = b""
            return b""
        data = b""
        if decoder.can_accept_more_data() and self.waiting:
            data, self.waiting, self._begun = self.waiting, b"", True
        elif not self._held:
            return b""
        out: bytes = decoder.process(data, output_buffer_limit=room)
        self._held = bool(out) or not decoder.can_accept_more_data()
        return out


class _Zstd:
    __slots__ = ("_decoder", "_window", "members", "paused", "waiting")

    def __init__(self) -> None:
        self._decoder: Any = None
        self._window = b""
        self.members = 0
        self.paused = False
        self.waiting = b""

    @property
    def amid(self) -> bool:
        return self._decoder is not None

    def read(self, room: int) -> bytes:
        self.paused = False
        for _ in range(MEMBERS_A_READ):
            needs_input = self._decoder is None or self._decoder.needs_input
            if needs_input and not self._window:
                self._window, self.waiting = self.waiting[:WINDOW_BYTES], self.waiting[WINDOW_BYTES:]
                if not self._window:
                    return b""
            if self._decoder is None:
                self._decoder = zstd.ZstdDecompressor(
                    options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX}
                )
                self.members += 1
            data, self._window = self._window, b""
            out: bytes = self._decoder.decompress(data, room)
            if self._decoder.eof:
                self._window = self._decoder.unused_data
                self._decoder = None
            if out:
                return out
        self.paused = True
        return b""


_STAGES: dict[str, Callable[[], _Stage]] = {
    "gzip": lambda: _Zlib(zlib.MAX_WBITS | 16, once=False),
    "x-gzip": lambda: _Zlib(zlib.MAX_WBITS | 16, once=False),
    "deflate": _Deflate,
    "br": _Brotli,
    "zstd": _Zstd,
}


def decoder(header: str, backlog_max_bytes: int = BACKLOG_MAX_BYTES) -> Codings | None:
    """The decoder for a `Content-Encoding` value; None where there is nothing to undo. Raises Unreadable."""
    names = [name for name in (part.strip().lower() for part in header.split(",")) if name not in ("", "identity")]
    if not names:
        return None
    if len(names) > CODINGS_MAX or any(name not in _STAGES for name in names):
        raise Unreadable("coding_unknown", "the content coding is not one that can be read")
    return Codings([_STAGES[name]() for name in reversed(names)], backlog_max_bytes)


def is_one_step(body: bytes) -> bool:
    """Whether a gzip body that has come whole says itself (in its last four bytes, RFC 1952) that it takes one."""
    return int.from_bytes(body[-4:], "little") <= STEP_BYTES


def decoded(header: str, body: bytes) -> bytes:
    """A body that has come whole, where that takes one step. Raises Unreadable, also where there would be more."""
    if header == "gzip":  # the commonest, with the one member that it has
        inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
        try:
            plain = inflate.decompress(body, STEP_BYTES)
        except zlib.error:
            raise Unreadable("decoding_failed", "the content coding could not be undone") from None
        if inflate.eof and not inflate.unused_data:
            return plain
    codings = decoder(header)
    if codings is None:
        return body
    plain = b"".join(codings.feed(body))
    if codings.behind:
        raise Unreadable("decoded_too_large", "the decoded answer takes more than one step")
    return plain


class Codings:
    """A stack of codings being undone."""

    __slots__ = ("_backlog_max_bytes", "_coded", "_decoded", "_more", "_stages")

    def __init__(self, stages: Sequence[_Stage], backlog_max_bytes: int) -> None:
        self._backlog_max_bytes = backlog_max_bytes
        self._stages = stages
        self._coded = 0
        self._decoded = 0
        self._more = False  # the last step ended with its budget, not with its input

    @property
    def behind(self) -> bool:
        """Whether fed bytes still wait to be decoded: feed empty pieces to work them off."""
        return self._more

    @property
    def amid(self) -> bool:
        """Whether what was fed ends before a coding does."""
        return any(stage.amid for stage in self._stages)

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """Plain parts, one step's worth at most. Raises Unreadable."""
        first = self._stages[0]
        self._coded += len(piece)
        first.waiting = first.waiting + piece if first.waiting else piece
        try:
            yield from self._step(min(STEP_MAX_BYTES, max(STEP_BYTES, STEP_RATIO * len(piece))))
        except (zlib.error, brotli.error, zstd.ZstdError, EOFError, MemoryError):
            raise Unreadable("decoding_failed", "the content coding could not be undone") from None
        if len(first.waiting) > self._backlog_max_bytes:
            raise Unreadable("decoded_too_large", "the decoded answer grows too fast")

    def _step(self, budget: int) -> Iterator[bytes]:
        stages = self._stages
        last = len(stages) - 1
        self._more = False
        while budget > 0:
            for index in range(last, -1, -1):
                stage = stages[index]
                out = stage.read(PART_BYTES)
                if stage.members:
                    budget -= stage.members * MEMBER_BYTES
                    stage.members = 0
                if out or stage.paused:
                    break
            else:
                return
            if not out:
                continue
            budget -= len(out)
            self._decoded += len(out)
            self._check()
            if index == last:
                yield out
            else:
                stages[index + 1].waiting += out
        self._more = True

    def _check(self) -> None:
        if self._decoded > DECODED_MAX_BYTES or (
            self._decoded > RATIO_FREE_BYTES and self._decoded > RATIO_MAX * self._coded
        ):
            raise Unreadable("decoded_too_large", "the decoded answer is too large for what was sent")
