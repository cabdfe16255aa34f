"""The end of a JSON document whose middle was not read: its last members, found from behind.

Of a whole document the end is known: depth zero, outside of every string. So the parity of the quotes and the balance
of the brackets can be counted from behind, and what stands after any comma is JSON again once the containers that it
closes are opened before it. Keeping the last bytes costs a copy, whatever they are; they are parsed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sidecar.usage.values import lenient_loads

KEPT_BYTES = 61_440  # of the end; what real answers say behind their content is about 10 KiB
WINDOW_BYTES = 16_384  # looked into at least
WINDOW_SHARE = 64  # … and a 64th of what passed, so that looking costs less than passing did
RETRY_SHARE = 16  # where that is nested too deeply for a parser: a 16th of it
DEPTH_MAX = 512  # containers opened before the first comma of the window; parsers stop at about a thousand

_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_BLANKS = b" \t\r\n"


class Tail:
    """Feed what passes; `value` is the document as far as its end tells."""

    __slots__ = ("_kept", "passed", "prefix")

    def __init__(self, start: bytes = b"") -> None:
        """`start`: a comma where the next thing is a whole member."""
        self._kept = bytearray(start)
        self.prefix = b""  # what stands before each line and is none of the document
        self.passed = len(start)

    def feed(self, data: bytes) -> None:
        self.passed += len(data)
        if len(data) >= KEPT_BYTES:
            self._kept[:] = data[-KEPT_BYTES:]
            return
        self._kept += data
        if len(self._kept) > 4 * KEPT_BYTES:
            del self._kept[:-KEPT_BYTES]

    def value(self, names: Sequence[str | None]) -> Any:
        """The document without its beginning, None where its end cannot be told. `names`: by depth, the member that
        was open when the reading stopped (None: an element); deeper or otherwise opened ones have no name."""
        size = min(KEPT_BYTES, max(WINDOW_BYTES, self.passed // WINDOW_SHARE))
        for window in (size, size // RETRY_SHARE):
            text = bytes(self._kept[-window:])
            if window < self.passed:  # a quote or a backslash at the cut may be escaped, or not
                text = text[1:].lstrip(b"\\")[1:] if text[1:2] == b"\\" else text[1:]
            if self.prefix:
                text = text.replace(b"\n" + self.prefix + b" ", b"\n").replace(b"\n" + self.prefix, b"\n")
            found = _behind_a_comma(text.rstrip(_BLANKS), names)
            if found is not None:
                return found
        return None


def _behind_a_comma(text: bytes, names: Sequence[str | None]) -> Any:
    plain = text.replace(b"\\\\", b"  ").replace(b'\\"', b"  ") if b"\\" in text else text
    parts = plain.split(b'"')
    at = 0
    for number, part in enumerate(parts):
        comma = part.find(b",") if (len(parts) - number) % 2 else -1
        if comma >= 0:
            at += comma + 1
            outside = part[comma + 1 :] + b"".join(parts[number + 2 :: 2])
            opened = _opened(outside.translate(None, _NOT_BRACKETS), names)
            return None if opened is None else lenient_loads(opened + text[at:])
        at += len(part) + 1
    return None


def _opened(brackets: bytes, names: Sequence[str | None]) -> bytes | None:
    """What opens the containers that are only closed here, the outermost first."""
    for _ in range(8):
        brackets = brackets.replace(b"{}", b"").replace(b"[]", b"")
    waiting = 0
    closers = bytearray()
    for byte in brackets:
        if byte in b"[{":
            waiting += 1
        elif waiting:
            waiting -= 1
        else:
            closers.append(byte)
    if waiting or not closers or len(closers) > DEPTH_MAX:
        return None
    closers.reverse()
    opened: list[bytes] = []
    known = True
    for depth, byte in enumerate(closers):
        if depth and closers[depth - 1] == 0x7D:
            name = names[depth] if known and depth < len(names) else None
            known = name is not None
            opened.append(b'"%b":' % (name or "").encode())
        elif depth:
            known = known and depth < len(names) and names[depth] is None
        opened.append(b"{" if byte == 0x7D else b"[")
    return b"".join(opened)
