"""A few members of an arbitrarily large JSON document, found exactly, in constant memory and at the speed of C.

`usage` may stand behind sixty megabytes of embeddings, and the same word may stand in the model's own text. So depth
is tracked: only members named in a tree of wanted places are kept, everything else is skipped. Skipping works on whole
pieces with a handful of `bytes` methods and one regular expression, never byte by byte: a float array costs about one
nanosecond a byte. What is kept comes out as an ordinary, but pruned, document, so that readers need not know which of
the two they were given.

Nothing is validated: garbage gives an odd or empty document, never an exception and never more work than its length.
"""

from __future__ import annotations

import re
from typing import Any

from sidecar.usage.values import lenient_loads

Tree = dict[str, Any]
"""Wanted places: `{"id": True, "choices": [{"finish_reason": True}], "response": {"usage": True}}`."""

VALUE_MAX_BYTES = 65_536  # one captured value; the largest known usage object is about 2 KiB
KEPT_MAX_BYTES = 262_144  # all captured values of one document together
ELEMENTS_MAX = 1_024  # elements kept of one wanted array (choices, candidates, predictions)
KEY_MAX_BYTES = 256  # longer names are none of ours
BULK_BYTES = 16_384  # the stretch that is skipped in one go; a larger one makes the last, detailed stretch dearer
PAIRS_MAX = 8  # nesting that the bulk skip resolves by replacing; what is deeper is counted one by one

_RUN = re.compile(rb'[^"{}\[\]]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"{}\[\]]*+)*+', re.DOTALL)
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_BLANK = re.compile(rb"[ \t\r\n]*+")
_SCALAR_END = re.compile(rb"[,}\]\s]")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_SAME_BRACKETS = bytes.maketrans(b"[]", b"{}")


class Skipper:
    """Runs over strings and containers that may be cut anywhere; knows only depth and quotes."""

    __slots__ = ("depth", "escaped", "in_string")

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.escaped = False

    def string(self, data: bytes, pos: int) -> int:
        """Go on inside a string; the place after its closing quote, or -1 when it goes on after this piece."""
        end = len(data)
        if self.escaped and pos < end:
            pos += 1
            self.escaped = False
        quote = data.find(b'"', pos)
        if quote >= 0 and (quote == pos or data[quote - 1] != 0x5C):
            self.in_string = False
            return quote + 1
        if quote >= 0:
            rest = _STRING_REST.match(data, pos)
            quote = rest.end() if rest is not None else end
            if quote < end and data[quote] == 0x22:
                self.in_string = False
                return quote + 1
        backslashes = end - max(pos, len(data.rstrip(b"\\")))
        self.escaped = backslashes % 2 == 1
        return -1

    def container(self, data: bytes, pos: int) -> int:
        """Go on inside a container; the place after its closing bracket, or -1 when it goes on after this piece."""
        end = len(data)
        while pos < end:
            if self.in_string:
                pos = self.string(data, pos)
                if pos < 0:
                    return -1
                continue
            if end - pos >= 1024 and self._bulk(data[pos : pos + BULK_BYTES]):
                pos += BULK_BYTES
                continue
            stop = min(end, pos + BULK_BYTES)
            while pos < stop and not self.in_string:
                run = _RUN.match(data, pos)
                pos = run.end() if run is not None else pos
                if pos >= end:
                    return -1
                byte = data[pos]
                pos += 1
                if byte == 0x22:
                    self.in_string = True
                elif byte in b"{[":
                    self.depth += 1
                else:
                    self.depth -= 1
                    if self.depth <= 0:
                        return pos
        return -1

    def _bulk(self, data: bytes) -> bool:
        """Skip a stretch in which the container surely does not end; False, and nothing done, where it may."""
        plain = data
        if b"\\" in plain:
            plain = plain.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
        parts = plain.split(b'"')
        brackets = b"".join(parts[::2]).translate(_SAME_BRACKETS, _NOT_BRACKETS)
        for _ in range(PAIRS_MAX):
            fewer = brackets.replace(b"{}", b"")
            if len(fewer) == len(brackets):
                break
            brackets = fewer
        down = len(brackets) - len(brackets.lstrip(b"}"))
        up = len(brackets) - down
        if b"}" in brackets[down:]:
            down, up = _lowest(brackets)
        if down >= self.depth:
            return False
        self.depth += up - down
        if len(parts) % 2 == 0:
            self.in_string = True
            self.escaped = plain.endswith(b"\\")
        return True


def _lowest(brackets: bytes) -> tuple[int, int]:
    level = lowest = 0
    for byte in brackets:
        if byte == 0x7B:
            level += 1
        else:
            level -= 1
            lowest = min(lowest, level)
    return -lowest, level - lowest


_START, _KEY, _IN_KEY, _COLON, _VALUE, _SCALAR, _STRING, _CONTAINER, _AFTER, _DONE = range(10)


class Members:
    """Feed a document piece by piece; `document` then holds what was wanted of it."""

    __slots__ = (
        "_base",
        "_captured",
        "_from",
        "_kept",
        "_key",
        "_levels",
        "_skip",
        "_state",
        "_want",
        "document",
        "done",
        "oversized",
        "span",
    )

    def __init__(self, wanted: Tree) -> None:
        self.document: dict[str, Any] = {}
        self.done = False  # the document's own end was seen
        self.oversized = False  # a wanted value was too large and was dropped
        self.span = (0, 0)  # where the last captured value stood, counted from the document's first byte
        self._levels: list[tuple[bool, Any, Any]] = []  # (is an object, tree, what was found in it)
        self._want: Any = wanted
        self._state = _START
        self._skip = Skipper()
        self._captured: bytearray | None = None
        self._key = bytearray()
        self._kept = 0
        self._base = 0
        self._from = 0

    def feed(self, data: bytes) -> None:
        pos, end = 0, len(data)
        while 0 <= pos < end and self._state != _DONE:
            state = self._state
            if state == _CONTAINER:
                pos = self._run_over(data, pos, self._skip.container(data, pos))
            elif state == _STRING:
                pos = self._run_over(data, pos, self._skip.string(data, pos))
            elif state == _SCALAR:
                stop = _SCALAR_END.search(data, pos)
                pos = self._run_over(data, pos, stop.start() if stop is not None else -1)
            elif state == _IN_KEY:
                pos = self._in_key(data, pos)
            else:
                blank = _BLANK.match(data, pos)
                pos = blank.end() if blank is not None else pos
                if pos < end:
                    pos = self._token(data, pos)
        self._base += end

    def _token(self, data: bytes, pos: int) -> int:
        byte, state = data[pos], self._state
        if state == _VALUE:
            return self._value(data, pos)
        if state == _START:
            if byte == 0x7B:
                self._open(True, self._want, self.document)
            elif byte not in b"\xef\xbb\xbf":  # a byte order mark is no value; what is no object is none of ours
                self._state = _DONE
        elif state == _KEY:
            if byte == 0x22:
                self._key.clear()
                self._skip.in_string = True
                self._state = _IN_KEY
            elif byte == 0x7D:
                self._close()
            elif byte != 0x2C:
                self._state = _DONE
        elif state == _COLON:
            self._state = _VALUE if byte == 0x3A else _DONE
        elif byte == 0x2C:
            self._state = _KEY if self._levels[-1][0] else _VALUE
            if self._state == _VALUE:
                self._want = self._levels[-1][1]
        elif byte in b"}]":
            self._close()
        else:
            self._state = _DONE
        return pos + 1

    def _in_key(self, data: bytes, pos: int) -> int:
        after = self._skip.string(data, pos)
        if len(self._key) <= KEY_MAX_BYTES:
            self._key += data[pos : after - 1 if after >= 0 else None][: KEY_MAX_BYTES + 1]
        if after >= 0:
            self._state = _COLON
            tree = self._levels[-1][1]
            self._want = tree.get(_text(bytes(self._key))) if len(self._key) <= KEY_MAX_BYTES else None
        return after

    def _value(self, data: bytes, pos: int) -> int:
        byte, want = data[pos], self._want
        if byte == 0x5D and not self._levels[-1][0]:  # an empty array, or a comma before its end
            self._close()
            return pos + 1
        if byte == 0x7B and type(want) is dict:
            self._open(True, want, {})
            return pos + 1
        if byte == 0x5B and type(want) is list:
            self._open(False, want[0], [])
            return pos + 1
        self._captured = bytearray() if want is True and self._kept < KEPT_MAX_BYTES else None
        self._from = self._base + pos
        skip = self._skip
        skip.in_string = skip.escaped = False
        if byte in b"{[":
            self._state = _CONTAINER
            skip.depth = 1
        elif byte == 0x22:
            self._state = _STRING
            skip.in_string = True
        elif byte in b",:}]":
            self._state = _DONE
            return pos + 1
        else:
            self._state = _SCALAR
            return pos
        if self._captured is not None:
            self._captured.append(byte)
        return pos + 1

    def _run_over(self, data: bytes, pos: int, after: int) -> int:
        if self._captured is not None:
            self._captured += data[pos : after if after >= 0 else None]
            if len(self._captured) > VALUE_MAX_BYTES:
                self._captured = None
                self.oversized = True
        if after >= 0:
            self._state = _AFTER
            if self._captured is not None:
                self.span = (self._from, self._base + after)
                self._kept += len(self._captured)
                self._keep(lenient_loads(bytes(self._captured)))
                self._captured = None
        return after

    def _keep(self, value: Any) -> None:
        is_object, _, found = self._levels[-1]
        if is_object:
            found[_text(bytes(self._key))] = value
        elif len(found) < ELEMENTS_MAX:
            found.append(value)
        else:
            self.oversized = True

    def _open(self, is_object: bool, tree: Any, found: Any) -> None:
        if self._levels:
            self._keep(found)
        self._levels.append((is_object, tree, found))
        self._want = tree
        self._state = _KEY if is_object else _VALUE

    def _close(self) -> None:
        self._levels.pop()
        self._state = _AFTER if self._levels else _DONE
        self.done = not self._levels


def _text(raw: bytes) -> str:
    if b"\\" in raw:
        value = lenient_loads(b'"' + raw + b'"')
        return value if type(value) is str else ""
    return raw.decode("utf-8", "replace")


def pruned(data: bytes, wanted: Tree) -> dict[str, Any]:
    """The wanted members of a document that the strict parser refused."""
    members = Members(wanted)
    members.feed(data)
    return members.document
