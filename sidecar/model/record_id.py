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
_COUNTER_WRAP: Final = 1 << 26


class Ids:
    """Makes the ids of one process. Not thread-safe: it belongs to the event loop."""

    __slots__ = ("_counter", "_head", "_ms", "_tail")

    def __init__(self, chance: bytes) -> None:
        if len(chance) != CHANCE_BYTES:
            raise ValueError(f"ids need {CHANCE_BYTES} bytes of chance, not {len(chance)}")
        self._tail = chance.hex()
        self._counter = -1
        self._ms = -1
        self._head = ""

    def next(self, now_ns: int) -> str:
        """The next id, for a call let in at `now_ns` (wall clock, Unix nanoseconds)."""
        counter = self._counter + 1
        ms = now_ns // 1_000_000
        if counter == _COUNTER_WRAP:
            counter = 0
            ms = max(ms, self._ms + 1)
        self._counter = counter
        if ms > self._ms:
            self._ms = ms
            text = f"{ms & 0xFFFF_FFFF_FFFF:012x}"
            self._head = f"{text[:8]}-{text[8:]}-7"
        return f"{self._head}{counter >> 14:03x}-{0x8000 | (counter & 0x3FFF):04x}-{self._tail}"
