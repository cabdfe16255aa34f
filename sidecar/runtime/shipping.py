"""`SIDECAR_DURABILITY=shipped`: which of what was told over the seam the centre has.

The centre is the backend that all sidecars share: the ledger in PostgreSQL where there is one, else JetStream. Frames
of those that serve go to the disk as ever and are let go of then, so a centre that is away costs no memory. What waits
for the centre are responses alone: a frame is *shipped* when delivery has settled every record of its commit there.

What must always hold: a frame is told as shipped only after it was told as stored, in the order of its source, and only
when none of its records is pending at the centre. One that the centre refused is parked, and is waited for no longer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Final

from sidecar.settings import Durability, Settings

LEDGER: Final = "ledger"
NATS: Final = "nats"
# Of what a life before this one had stored: which records a frame brought is not known any more, but they are among the
# last, and a record that has waited for days may stand in front of them.
LOOKED_BACK: Final = 10_000

Pairs = Sequence[tuple[bytes, int]]


def centre_of(settings: Settings) -> str | None:
    """The backend whose yes is waited for; None where none is to be, or there is none."""
    if settings.spool.durability is not Durability.SHIPPED:
        return None
    if settings.fleet.ledger_url is not None and LEDGER in settings.backends:
        return LEDGER
    return NATS if NATS in settings.backends else None


def faults(settings: Settings) -> list[str]:
    if settings.spool.durability is not Durability.SHIPPED or centre_of(settings) is not None:
        return []
    return ["SIDECAR_DURABILITY=shipped needs a centre: add nats to SIDECAR_BACKENDS, or set SIDECAR_LEDGER_URL"]


class Shipping:
    """What is on disk and not at the centre yet, of the slot that is written here. On the loop, and never waits."""

    def __init__(self, shipped: Callable[[bytes, int], None], *, waits: bool = True) -> None:
        """`shipped`: told of a source and the number up to which its frames are there. `waits`: False where there is no
        centre to wait for."""
        self._shipped = shipped
        self._waits = waits
        self._instance = ""
        self._waiting: deque[tuple[int, int, Pairs]] = deque()  # first and last number of a commit, and whose it is
        self._last_seq = 0
        self._settled: dict[str, tuple[int, Collection[int]]] = {}

    def begin(self, instance: str, last_seq: int) -> None:
        """The slot, and its last number before this life."""
        self._instance, self._last_seq = instance, last_seq

    def stored_before(self, sources: Pairs) -> None:
        """What a life before this one had on disk of these."""
        if sources:
            self._waiting.append((max(self._last_seq - LOOKED_BACK, 1), self._last_seq, sources))
            self._look()

    def stored(self, last_seq: int, sources: Pairs) -> None:
        """A commit up to this number, in order; it brought these frames."""
        first, self._last_seq = self._last_seq + 1, max(last_seq, self._last_seq)
        if sources:
            self._waiting.append((first, last_seq, sources))
            self._look()

    def settled(self, instance: str, upto_seq: int, pending: Collection[int]) -> None:
        """How the centre stands: numbers up to this one were given to it, and these of them are not settled."""
        self._settled[instance] = upto_seq, pending
        if instance == self._instance:
            self._look()

    def _look(self) -> None:
        upto, pending = self._settled.get(self._instance, (0, ()))
        while self._waiting:
            first, last, sources = self._waiting[0]
            if self._waits and (last > upto or any(first <= seq <= last for seq in pending)):
                return
            self._waiting.popleft()
            for source, number in sources:
                self._shipped(source, number)
