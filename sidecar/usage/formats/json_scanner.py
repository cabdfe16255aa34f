"""A few members of an arbitrarily large JSON document, found exactly, in constant memory and at the speed of C.

`usage` may stand behind sixty megabytes of embeddings, and the same word may stand in the model's own text. So depth
is tracked: only members named in a tree of wanted places are kept, everything else is skipped. Skipping works on whole
pieces with a handful of `bytes` methods and one regular expression, never byte by byte: a float array costs about one
nanosecond a byte. What is kept comes out as an ordinary, but pruned, document, so that readers need not know which of
the two they were given.

What stands in wanted places costs a step each, and steps are rationed by the length of the document: one that has more
of them than any real one (small members without end, the same name again and again) is read on from behind: of its end
`Tail` keeps the last members. That costs a copy, whatever the bytes are.

Nothing is validated: garbage gives an odd or empty document, never an exception and never more work than its length.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

import orjson

from sidecar.usage.formats.json_tail import Tail
from sidecar.usage.providers.base import Tree
from sidecar.usage.values import lenient_loads

VALUE_MAX_BYTES = 65_536  # one captured value; the largest known usage object is about 2 KiB
KEPT_MAX_BYTES = 262_144  # all captured values of one document together
ELEMENTS_MAX = 1_024  # elements kept of one wanted array (choices, candidates, predictions)
KEY_MAX_BYTES = 256  # longer names are none of ours
BULK_BYTES = 16_384  # the stretch that is skipped in one go; a larger one makes the last, detailed stretch dearer
WALKED_BYTES = 128  # of a container that are looked through one by one before it is skipped in bulk: most are small
PAIRS_MAX = 8  # nesting that the bulk skip resolves by replacing; what is deeper is counted one by one

# A step is about a microsecond. Plain text costs a call 1.3 ms a megabyte on its way; what is allowed below is as much
# again, so that a body costs at most three times its length in text. Real documents stay far below.
STEPS_FREE = 1_024  # a hundred choices, or as many members of other names
STEPS_EARNED = 1_536  # by a megabyte (2^20) that passes
STEPS_A_PIECE = 4  # earned by each piece, however small: it costs the way through the proxy more than that
STRUCTURE_A_STEP = 110  # quotes and brackets that the bulk skip takes away in one step
SPLITS_A_STEP = 24  # quotes around brackets in text, or deep brackets: dearer
UNLIMITED = sys.maxsize
SMALL_BYTES = 512  # of a wanted object with no other inside, which is parsed at once
COPIED_A_STEP = 2_048  # of a string with escapes
ESCAPES_A_STEP = 256  # … that holds more of them than letters

_RUN = re.compile(rb'[^"{}\[\]]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"[^"{}\[\]]*+)*+', re.DOTALL)
_STRING_REST = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_MEMBER = re.compile(rb'[ \t\r\n]*+"([^"\\]{0,256}+)"[ \t\r\n]*+:[ \t\r\n]*+')
_SMALL = re.compile(rb'\{[^"{}\[\]]*+(?:"[^"\\]*+"[^"{}\[\]]*+)*+\}')
_BLANK = re.compile(rb"[ \t\r\n]*+")
_SCALAR_END = re.compile(rb"[,}\]\s]")
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_SAME_BRACKETS = bytes.maketrans(b"[]", b"{}")


# How it works. Two machines, one inside the other.
#
# `Members` is a state machine over the members of wanted containers only: _START -> _KEY (before a name) -> _IN_KEY (a
# name cut by the end of a piece) -> _COLON -> _VALUE -> one of _SCALAR, _STRING, _CONTAINER -> _AFTER -> _KEY or, at
# the outermost bracket, _DONE. `_levels` is the stack of containers that are open and wanted. A value is either opened
# (its tree has places below it: another level), captured (its tree is True: the bytes are collected, then parsed), or
# run over. Any state may be left at the end of a piece and taken up with the next one, which is why no position is ever
# kept: only the state, the stack and what was captured so far.
#
# `Skipper` runs over what is not wanted, and knows only the depth of brackets and whether it is inside a string. Small
# containers are walked with one regular expression from bracket to bracket. Large ones are skipped a stretch of
# BULK_BYTES at a time (`_bulk`), without looking at a byte in Python:
#   1. escaped backslashes and quotes are blanked out, so that each quote left opens or closes a string;
#   2. `translate` removes all but quotes and brackets, and makes [] into {}, for kinds do not matter to depth;
#   3. quotes next to each other are strings without brackets and go; what stands between the others is text and goes;
#   4. pairs `{}` are removed until none is left, so `}}}{{` remains: how far the stretch goes down, and up again.
# If it goes down as far as the container's own depth, the container may end in it: then nothing was done, and the
# stretch is walked in detail. A string open at the end of a stretch is carried over (`in_string`, `escaped`).
#
# Rations: each step of `Members`, and what `Skipper` finds dense, is paid from `_steps`, which grow with the bytes that
# pass. Whoever has none left reads on from behind (`hurry`, `json_tail`), but only where nothing half read is lost.


class Skipper:
    """Runs over strings and containers that may be cut anywhere; knows only depth and quotes."""

    __slots__ = ("depth", "escaped", "in_string", "limit", "steps")

    def __init__(self) -> None:
        self.depth = 0
        self.in_string = False
        self.escaped = False
        self.steps = 0  # what skipping took beyond its length
        self.limit = UNLIMITED  # of steps, at which `container` gives up

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
            near = _STRING_REST.match(data, pos, pos + WALKED_BYTES)
            pos = near.end() if near is not None else pos
            if pos < end and data[pos] == 0x22:
                self.in_string = False
                return pos + 1
            return self._escapes(data, pos)
        backslashes = end - max(pos, len(data.rstrip(b"\\")))
        self.escaped = backslashes % 2 == 1
        return -1

    def _escapes(self, data: bytes, pos: int) -> int:
        """Go on inside a string that has escaped quotes: a stretch at a time, with the pairs blanked out."""
        end = len(data)
        while pos < end:
            stretch = data[pos : pos + BULK_BYTES]
            plain = stretch.replace(b"\\\\", b"  ")
            self.steps += len(plain) // (COPIED_A_STEP if _is_text(stretch) else ESCAPES_A_STEP)
            quote = plain.replace(b'\\"', b"  ").find(b'"')
            if quote >= 0:
                self.in_string = False
                return pos + quote + 1
            pos += len(stretch)
            if plain.endswith(b"\\"):
                pos += 1  # what it escapes stands in the next stretch
        self.escaped = pos > end
        return -1

    def container(self, data: bytes, pos: int) -> int:
        """Go on inside a container; the place after its closing bracket, or -1 when it goes on after this piece."""
        end = len(data)
        walk = pos + WALKED_BYTES
        while pos < end:
            if self.in_string:
                pos = self.string(data, pos)
                if pos < 0:
                    return -1
                continue
            if self.steps > self.limit:
                return -1
            if pos >= walk:
                if end - pos >= 1024 and self._bulk(data[pos : pos + BULK_BYTES]):
                    pos += BULK_BYTES
                    continue
                walk = min(end, pos + BULK_BYTES)
            stop = min(end, walk)
            while pos < stop and not self.in_string:
                run = _RUN.match(data, pos, stop)
                pos = run.end() if run is not None else pos
                self.steps += 1
                if pos >= stop:
                    break
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
        brackets = plain.translate(_SAME_BRACKETS, _NOT_STRUCTURE)
        self.steps += len(brackets) // STRUCTURE_A_STEP
        opened = brackets.count(b'"') % 2 == 1
        brackets = brackets.replace(b'""', b"")  # two quotes with nothing between them change nothing around them
        if b'"' in brackets:
            parts = brackets.split(b'"')
            self.steps += len(parts) // SPLITS_A_STEP
            brackets = b"".join(parts[::2])
        for _ in range(PAIRS_MAX):
            fewer = brackets.replace(b"{}", b"")
            if len(fewer) == len(brackets):
                break
            brackets = fewer
        down = len(brackets) - len(brackets.lstrip(b"}"))
        up = len(brackets) - down
        if b"}" in brackets[down:]:
            self.steps += len(brackets) // SPLITS_A_STEP
            down, up = _lowest(brackets)
        if down >= self.depth:
            return False
        self.depth += up - down
        if opened:
            self.in_string = True
            self.escaped = plain.endswith(b"\\")
        return True


def _is_text(stretch: bytes) -> bool:
    return 2 * len(stretch.translate(None, b'"\\')) >= len(stretch)


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
        "_base", "_captured", "_done", "_found", "_from", "_kept", "_key", "_levels", "_resolved", "_skip", "_state",
        "_steps", "_tail", "_want", "_wanted", "oversized", "span",
    )  # fmt: skip

    def __init__(self, wanted: Tree, steps: int = STEPS_FREE) -> None:
        self.oversized = False  # a wanted value was too large and was dropped
        self.span = (0, 0)  # where the last captured value stood, counted from the document's first byte
        self._wanted = wanted
        self._found: dict[str, Any] = {}
        self._done = False
        self._levels: list[tuple[bool, Any, Any]] = []  # (is an object, tree, what was found in it)
        self._want: Any = wanted
        self._state = _START
        self._skip = Skipper()
        self._captured: bytearray | None = None
        self._key = bytearray()
        self._kept = 0
        self._base = 0
        self._from = 0
        self._steps = steps
        self._tail: Tail | None = None
        self._resolved = False

    @property
    def document(self) -> dict[str, Any]:
        """What was wanted and has come. Of a document that was too busy this takes its end for granted: see `cut`."""
        if self._tail is not None and not self._resolved:
            self._resolve(self._tail)
        return self._found

    @property
    def done(self) -> bool:
        """The document's own end was seen; of one that was too busy only after `document` was asked for."""
        return self._done

    @property
    def busy(self) -> bool:
        """The middle of the document was not read: it took more steps than its length allows."""
        return self._tail is not None

    def cut(self) -> None:
        """The document came without its end, so nothing can be told from behind."""
        if self._tail is not None:
            self._resolved = True

    def hurry(self, prefix: bytes = b"") -> None:
        """Read no more than the end, from here on. `prefix`: what stands before each line from here on."""
        if self._tail is None and self._state != _DONE:
            between = self._levels and self._state in (_KEY, _VALUE)
            self._tail = Tail(b"," if between else b"")
            self._captured = None
        if self._tail is not None:
            self._tail.prefix = prefix

    def feed(self, data: bytes) -> None:
        if self._tail is not None:
            self._tail.feed(data)
            self._resolved = self._done = False
            return
        pos, end = 0, len(data)
        skip = self._skip
        self._steps += STEPS_A_PIECE + ((end * STEPS_EARNED) >> 20)
        while 0 <= pos < end and self._state != _DONE:
            state, start = self._state, pos
            if state != _AFTER:
                self._steps -= 1
            if state == _CONTAINER:
                skip.limit = self._steps if self._captured is None else UNLIMITED
                pos = self._run_over(data, pos, skip.container(data, pos))
            elif state == _STRING:
                pos = self._run_over(data, pos, skip.string(data, pos))
            elif state == _SCALAR:
                stop = _SCALAR_END.search(data, pos)
                pos = self._run_over(data, pos, stop.start() if stop is not None else -1)
            elif state == _IN_KEY:
                pos = self._in_key(data, pos)
            else:
                if state == _KEY and (member := _MEMBER.match(data, pos)) is not None and member.end() < end:
                    pos = member.end()
                    self._key[:] = member[1]
                    self._want = self._levels[-1][1].get(member[1].decode("utf-8", "replace"))
                    self._state = _VALUE
                elif data[pos] in b" \t\r\n":
                    blank = _BLANK.match(data, pos)
                    pos = blank.end() if blank is not None else pos
                if pos < end:
                    pos = self._token(data, pos)
            if self._steps < skip.steps and self._may_hurry():
                self.hurry()
                self.feed(data[pos if pos >= 0 else start :])
                return
        self._base += end

    def _may_hurry(self) -> bool:
        """Only between members, or inside of what is not wanted: what is half read would be lost."""
        state = self._state
        if self._captured is not None or state in (_START, _COLON, _SCALAR, _DONE):
            return False
        if state == _IN_KEY:
            return len(self._key) > KEY_MAX_BYTES
        return state != _VALUE or not self._levels[-1][0]

    def _resolve(self, tail: Tail) -> None:
        self._resolved = True
        names: list[str | None] = [None]
        for _, _, found in self._levels[1:]:
            names.append(self._name_of(found, len(names)))
        value = tail.value(names)
        if type(value) is dict:
            self._done = True
            _overlay(self._found, self._wanted, value, names[1:])

    def _name_of(self, found: Any, depth: int) -> str | None:
        """Under which name a container that is open stands in the one around it; None for an element."""
        is_object, _, around = self._levels[depth - 1]
        return next((key for key, value in around.items() if value is found), None) if is_object else None

    def _token(self, data: bytes, pos: int) -> int:
        byte, state = data[pos], self._state
        if state == _VALUE:
            return self._value(data, pos)
        if state == _START:
            if byte == 0x7B:
                self._open(True, self._want, self._found)
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
            small = _SMALL.match(data, pos, pos + SMALL_BYTES)
            if small is not None and (inner := _parsed(small[0])) is not None:
                self._keep(_only(inner, want))
                self._state = _AFTER
                return small.end()
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
        self._done = not self._levels


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        value: dict[str, Any] = orjson.loads(data)
    except ValueError:
        return None
    return value


def _only(flat: dict[str, Any], tree: Tree) -> dict[str, Any]:
    """The wanted members of an object that has nothing but scalars."""
    return {key: value for key, value in flat.items() if tree.get(key) is True}


def _overlay(found: dict[str, Any], wanted: Tree, end: dict[str, Any], names: Sequence[str | None]) -> None:
    """What the end of a document says, over what its beginning said. `names` lead to what was open in between: there
    the two are parts of one; everywhere else a later member replaces an earlier one."""
    for key, want in wanted.items():
        if key not in end:
            continue
        value, open_ = end[key], bool(names) and names[0] == key
        if want is True:
            found[key] = value
        elif type(want) is dict and type(value) is dict:
            inner = found.get(key) if open_ else None
            found[key] = inner = inner if type(inner) is dict else {}
            _overlay(inner, want, value, names[1:] if open_ else ())
        elif type(want) is list and type(value) is list:
            known = found.get(key) if open_ else None
            found[key] = known = known if type(known) is list else []
            if len(value) > ELEMENTS_MAX:
                value = value[-ELEMENTS_MAX:]
            first = open_ and len(names) > 1
            for element in value:
                inner = known[-1] if first and known and type(known[-1]) is dict else {}
                if type(element) is dict and type(want[0]) is dict:
                    _overlay(inner, want[0], element, names[2:] if first else ())
                if not first or not known:
                    known.append(inner if type(element) is dict else element)
                first = False
            del known[: max(0, len(known) - ELEMENTS_MAX)]


def _text(raw: bytes) -> str:
    if b"\\" in raw:
        value = lenient_loads(b'"' + raw + b'"')
        return value if type(value) is str else ""
    return raw.decode("utf-8", "replace")


def pruned(data: bytes, wanted: Tree, steps: int = STEPS_FREE) -> dict[str, Any]:
    """The wanted members of a document that the strict parser refused."""
    members = Members(wanted, steps)
    members.feed(data)
    return members.document
