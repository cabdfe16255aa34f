"""What an answer is made of: the token counts that every answer reports, its text, and what a call may order.

    X-Script: pieces=20, delay_ms=5, end=cut, after=3

orders a stream of 20 pieces of text, one every 5 ms, whose connection breaks after the third.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Final

PIECES_MAX: Final = 1_000_000
DELAY_S_MAX: Final = 600.0
STATUS_MAX: Final = 599
_WORDS: Final = ("The tide comes in, ", "the tide goes out, ", "and every wave is counted. ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Counts as the sidecar records them: inclusive totals and the parts within them."""

    input: int
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0
    reasoning: int = 0


CHAT: Final = Tokens(input=1571, output=389, cache_read=1024, cache_write=384, reasoning=256)
COMPLETIONS: Final = Tokens(input=6, output=16)
RESPONSES: Final = Tokens(input=2311, output=457, cache_read=2048, cache_write=128, reasoning=320)
EMBEDDINGS: Final = Tokens(input=219)
MESSAGES: Final = Tokens(input=20_637, output=611, cache_read=18_500, cache_write=2_100, reasoning=400)


class End(StrEnum):
    """How a streamed answer ends."""

    WHOLE = "whole"
    ERROR = "error"  # the vendor's own error event, then a clean end of the body
    CUT = "cut"  # the connection breaks


class Encoding(StrEnum):
    """How the body is coded."""

    IDENTITY = "identity"
    GZIP = "gzip"
    DEFLATE = "deflate"


class ScriptError(ValueError):
    """The order cannot be read; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One call's order. `after` counts pieces of text before `end` when that is not `whole`."""

    pieces: int = 3
    delay_s: float = 0.0  # before each piece
    head_delay_s: float = 0.0
    status: int = 200  # any other: the vendor's error body
    retry_after_s: int | None = None
    encoding: Encoding = Encoding.IDENTITY  # any other only if the caller accepts it
    end: End = End.WHOLE
    after: int = 1

    def texts(self) -> list[str]:
        """The pieces that a stream sends before it ends."""
        count = self.pieces if self.end is End.WHOLE else min(self.after, self.pieces)
        return [_WORDS[place % len(_WORDS)] for place in range(count)]

    def text(self) -> str:
        """The answer in one."""
        return "".join(_WORDS[place % len(_WORDS)] for place in range(self.pieces))


def parse(order: str, default: Script) -> Script:
    """Read `name=value, …` over the default. Raises `ScriptError`."""
    changes: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in order.split(","))):
        name, equals, value = part.partition("=")
        if not equals or name not in _READERS:
            raise ScriptError(f"{part!r}: expected name=value with a name of {', '.join(_READERS)}")
        field, read = _READERS[name]
        try:
            changes[field] = read(value)
        except ValueError as error:
            raise ScriptError(f"{part!r}: {error}") from None
    return replace(default, **changes)


def _number(most: float, scale: float = 1.0) -> Callable[[str], float]:
    def read(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number <= most:
            raise ValueError(f"expected a number from 0 to {most:g}")
        return number * scale

    return read


def _count(most: int) -> Callable[[str], int]:
    def read(value: str) -> int:
        if not value.isascii() or not value.isdigit() or int(value) > most:
            raise ValueError(f"expected a whole number from 0 to {most}")
        return int(value)

    return read


def _word(words: type[StrEnum]) -> Callable[[str], StrEnum]:
    def read(value: str) -> StrEnum:
        if value not in list(words):
            raise ValueError(f"expected one of {', '.join(words)}")
        return words(value)

    return read


_READERS: Final[Mapping[str, tuple[str, Callable[[str], Any]]]] = {
    "pieces": ("pieces", _count(PIECES_MAX)),
    "delay_ms": ("delay_s", _number(DELAY_S_MAX * 1000, 0.001)),
    "head_delay_ms": ("head_delay_s", _number(DELAY_S_MAX * 1000, 0.001)),
    "status": ("status", _count(STATUS_MAX)),
    "retry_after_s": ("retry_after_s", _count(int(DELAY_S_MAX))),
    "encoding": ("encoding", _word(Encoding)),
    "end": ("end", _word(End)),
    "after": ("after", _count(PIECES_MAX)),
}
