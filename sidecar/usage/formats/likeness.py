"""Events of a stream that are the one before with another text.

What most chunks of a stream cost is the search for what a reader could be interested in. But nearly all events of one
stream are the same bytes, up to a few values that no reader looks at: the text itself, a running number, padding. Two
events in which nothing was found show which bytes these are, and every further event that differs there only, and in
strings and numbers only, has the same members with the same values for all that is ever looked at. It need not be
searched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final

PIECE_BYTES_MAX: Final = 1_024  # of events that are compared; a pattern takes time to be made
TRIES: Final = 6  # pairs of events of one stream that are compared
PATTERNS_MAX: Final = 8  # remembered for each reader: servers that imitate a vendor differ in the order of members
READERS_MAX: Final = 256

# What a reader overlooks once its answer is known (see `Reader.skip_after`).
_IDS: Final = frozenset({b"id", b"model"})
_TEXT: Final = rb'[^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+'  # of a string, up to its closing quote
_DIGITS: Final = rb"[0-9]++"
_NUMBER: Final = re.compile(rb"( *: *)[0-9]+(?=[ ,}\]])")

Match = Callable[..., object]  # (bytes, where it begins, where it ends: the end of the bytes if not said)


class Likeness:
    """What the events of one stream have in common, as far as it is known: from a place on they begin with `start`,
    which has `size` bytes, and what `rest` finds behind it is all the rest of the chunk."""

    __slots__ = ("_before", "_fixed", "end", "rest", "size", "start", "tries")

    def __init__(self, fixed: frozenset[bytes] | None) -> None:
        """`fixed`: names of members that are looked at; None: nobody knows which, and nothing is compared."""
        self._fixed = frozenset[bytes]() if fixed is None else fixed
        self._before = b""
        self.tries = 0 if fixed is None else TRIES
        self.start = b"\0"
        self.size = 0  # 0: nothing is known yet
        self.rest: Match = _never
        self.end = b""  # how their chunks end

    def other(self, chunk: bytes, at: int) -> bool:
        """A chunk in which nothing was found, and that was not alike. `at`: where it begins behind its size. True."""
        self.tries -= 1
        piece, before = chunk[at:-2], self._before
        self._before = piece if self.tries else b""
        found = alike(before, piece, self._fixed) if before else None
        if found is not None:
            self.start, self.rest = found
            self.size = len(self.start)
            self.end = chunk[-4:]
        return True


def _never(chunk: bytes, at: int, end: int = 0) -> object:
    return None


def alike(one: bytes, other: bytes, fixed: frozenset[bytes]) -> tuple[bytes, Match] | None:
    """(how both begin, what finds the rest, in a chunk, of one like them); None: they do not differ in values of
    members alone, or in that of one of `fixed`. Both are what messages of JSON are sent as."""
    if b"\\" in one or b"\\" in other or max(len(one), len(other)) > PIECE_BYTES_MAX:
        return None
    was, now = one.split(b'"'), other.split(b'"')  # every second one stands in quotes
    if len(was) != len(now):
        return None
    first = next((at for at, (a, b) in enumerate(zip(was, now, strict=True)) if a != b), 0)
    start = b'"'.join(now[:first]) + b'"'
    if first % 2:
        if not _is_value(now, first) or now[first - 2] in fixed:
            return None
    else:
        number = _NUMBER.match(now[first])
        if first == 0 or number is None or now[first - 1] in fixed:
            return None
        start += number[1]
    known = _rests(fixed)
    for rest in known:
        if rest(other + b"\r\n", len(start)):
            return start, rest
    pattern = _pattern(was, now, first, fixed)
    if pattern is None or len(known) >= PATTERNS_MAX:
        return None
    found = re.compile(pattern + rb"\r\n").fullmatch
    known.append(found)
    return start, found


def _is_value(tokens: list[bytes], at: int) -> bool:
    """Whether that string is the value of a member, whose name is the string before it."""
    return at > 2 and tokens[at - 1].strip(b" ") == b":"


def _pattern(was: list[bytes], now: list[bytes], first: int, fixed: frozenset[bytes]) -> bytes | None:
    """Of all behind the beginning; None: they differ in more than may be another one."""
    rest: list[bytes] = []
    for at in range(first, len(now)):
        a, b = was[at], now[at]
        if at > first:
            rest.append(b'"')
        if at % 2:
            if _is_value(now, at) and now[at - 2] not in fixed:
                rest.append(_TEXT)
                continue
        elif at and now[at - 1] not in fixed:
            mine, theirs = _NUMBER.match(a), _NUMBER.match(b)
            if mine is not None and theirs is not None:
                a, b = a[mine.end() :], b[theirs.end() :]
                rest.append((b"" if at == first else re.escape(theirs[1])) + _DIGITS)
        if a != b:
            return None
        rest.append(re.escape(b))
    return b"".join(rest)


@lru_cache(maxsize=READERS_MAX)
def _rests(fixed: frozenset[bytes]) -> list[Match]:
    """What was found behind the beginnings of streams of one kind, to be added to."""
    return []


def looked_at(reader: type[Any]) -> frozenset[bytes]:
    """The names of all members that a reader of this class looks at, in a stream whose answer is known."""
    return _looked_at(reader)  # type: ignore[arg-type]  # a class can be hashed


@lru_cache(maxsize=READERS_MAX)
def _looked_at(reader: Any) -> frozenset[bytes]:
    found: set[bytes] = set()
    trees: list[Any] = [reader.wanted]
    for tree in trees:
        if isinstance(tree, list):
            trees += tree
        elif isinstance(tree, dict):
            found.update(name.encode() for name in tree)
            trees += tree.values()
    return frozenset(found - _IDS)
