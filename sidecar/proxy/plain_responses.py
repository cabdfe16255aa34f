"""Heads of plain responses (`plain_head`): how their bodies are framed and what is forwarded of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from sidecar.proxy.plain_head import (
    FIELDS_MAX,
    HEAD_BYTES_MAX,
    VOLATILE,
    Facts,
    Fields,
    Heads,
    Meaning,
    Shape,
    fields_of_lines,
)

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) [ -~]*")
_BODILESS: Final = frozenset({204, 304})
# Never plain: what they ask for is the careful way's to judge.
_CAREFUL: Final = frozenset(
    {b"upgrade", b"trailer", b"te", b"proxy-connection", b"location", b"content-location", b"refresh"}
)

DescribeResponse = Callable[[int, Fields], "tuple[Facts, bytes] | None"]
"""(status, fields) -> (what the head means, the fields' lines that the careful way would forward)."""


class PlainResponses(Heads[Facts]):
    """Responses of a kind that was seen before. Only values that say how a body is read make another shape. One whose
    end is the connection's is not plain."""

    def __init__(
        self, *, describe: DescribeResponse[Facts], dropped: frozenset[bytes] = frozenset(), sights: int = 1
    ) -> None:
        """`dropped`: names (lower case) that are ours to send: a response that has one is not plain."""
        matters = frozenset({b"content-type", b"content-encoding", b"transfer-encoding", b"connection"})
        super().__init__(
            first=_STATUS_LINE,
            careful=_CAREFUL | dropped,
            by_value=False,
            matters=matters,
            sights=sights,
            head_bytes_max=HEAD_BYTES_MAX,
            fields_max=FIELDS_MAX,
        )
        self._describe = describe

    def _learn_ending(
        self, shape: Shape[Facts], lines: list[bytes], peer: object, wire: bytes | None = None
    ) -> bytes | None:
        raise AssertionError("a response is the same for all peers")

    def _learn_first(self, line: bytes) -> int | None:
        match = _STATUS_LINE.fullmatch(line)
        return None if match is None or int(match[1]) in _BODILESS else self._keep_first(line, None)

    def _learn_shape(self, key: tuple[int, ...], lines: list[bytes], peer: object) -> Shape[Facts] | None:
        meant = self._meant(key)
        if meant[Meaning.LENGTH] + meant[Meaning.CHUNKED] != 1:  # two framings, or up to the end of the connection
            return self._remember(key, None)
        if meant[Meaning.KEEP_ALIVE] > 1:  # the least of what they say counts
            return self._remember(key, None)
        described = self._describe(int(lines[0][9:12]), fields_of_lines(lines[1:]))
        if described is None:
            return self._remember(key, None)
        shape = self._shape(key, lines, described[0], *self._rewriting(key, lines))
        own = shape.own(lines)[len(lines[0]) + 2 :]
        if not described[1].startswith(own):
            return self._remember(key, None)
        shape.endings[peer] = described[1][len(own) :] + b"\r\n"
        return self._remember(key, shape)

    def _meaning(self, low: bytes) -> tuple[int, bool]:
        if low == b"content-length":
            return Meaning.LENGTH, True
        if low == b"transfer-encoding":
            return Meaning.CHUNKED, False
        if low == b"content-encoding":
            return Meaning.CODED, False
        if low == b"connection":
            return Meaning.DROP, False
        if low == b"keep-alive":
            return Meaning.KEEP_ALIVE, True
        return Meaning.PASS, low in VOLATILE or low in (b"date", b"set-cookie")

    def _host(self, name: bytes, value: bytes) -> bytes:
        raise AssertionError("a response has no Host")
