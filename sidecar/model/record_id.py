"""Record ids: 36 characters, ordered by time, made without asking the kernel.

The form is UUID version 7 (RFC 9562): 48 bits of Unix milliseconds, then a counter, then 48 bits
of chance drawn once a process. Two ids of one process never repeat and never go backwards, also
when the wall clock does: the time in an id is held at its highest value until the clock is past
it. Ids of two processes (or of one slot before and after a restart) differ in the drawn bits.
Time and chance come in as arguments; this file asks for neither.
"""

from __future__ import annotations

from typing import Final

ID_LENGTH: Final = 36
CHANCE_BYTES: Final = 6  # the last field of a UUID: 48 bits, so that the whole field is one constant text

# 26 bits fit between the time and the chance (12 in rand_a, 14 beside the variant). A wrap moves
# the time on by a millisecond, so the pair stays unique however long the clock stands still.
_LOW_FIRST: Final = 0x8000
_LOW_END: Final = 0xC000
_TURNS_MAX: Final = 1 << 12


class Ids:
    """Makes the ids of one process. Not thread-safe: it belongs to the event loop."""

    __slots__ = ("_head", "_low", "_middle", "_ms", "_tail", "_turns")

    def __init__(self, chance: bytes) -> None:
        if len(chance) != CHANCE_BYTES:
            raise ValueError(f"ids need {CHANCE_BYTES} bytes of chance, not {len(chance)}")
        self._tail = f"-{chance.hex()}"
        self._ms = -1
        self._head = ""
        # The counter: its lower 14 bits with the variant before them, and how often those have turned over.
        self._low = _LOW_FIRST - 1
        self._turns = 0
        self._middle = "-7000-"

    def next(self, now_ns: int) -> str:
        """The next id, for a call let in at `now_ns` (wall clock, Unix nanoseconds)."""
        ms = now_ns // 1_000_000
        low = self._low + 1
        if low == _LOW_END:
            low = _LOW_FIRST
            ms = self._turn_over(ms)
        self._low = low
        if ms > self._ms:
            self._ms = ms
            self._head = f"{ms >> 16 & 0xFFFF_FFFF:08x}-{ms & 0xFFFF:04x}"
        return f"{self._head}{self._middle}{low:x}{self._tail}"

    def _turn_over(self, ms: int) -> int:
        """The lower part of the counter begins anew; the millisecond that the next id has at least."""
        self._turns += 1
        if self._turns == _TURNS_MAX:
            self._turns = 0
            ms = max(ms, self._ms + 1)
        self._middle = f"-7{self._turns:03x}-"
        return ms
