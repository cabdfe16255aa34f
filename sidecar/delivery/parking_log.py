"""When parking is said in the log: at once for the first of a backend and a reason, then hourly with the count.

What must always hold: nothing that was parked stays unsaid for longer than `EVERY_S` and a sweep, and a million that
are parked for one reason do not make a million lines. Pure: the clock comes in as an argument, the lines go out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

EVERY_S: Final = 3600.0  # an hour: often enough for a person, rare enough for a log
KINDS_MAX: Final = 1000  # backends and reasons told apart; a vendor's codes are reasons, and it may make them up


@dataclass(frozen=True, slots=True)
class Told:
    """One line: how many records of a backend were parked for a reason since the last line on it."""

    backend: str
    reason: str
    records: int
    first: bool  # of this backend and reason, in this run


@dataclass(slots=True)
class _Kind:
    last_s: float
    untold: int = 0


@dataclass(slots=True)
class ParkingLog:
    """Counts what is parked, and says what is to be told."""

    _kinds: dict[tuple[str, str], _Kind] = field(default_factory=dict)

    def parked(self, backend: str, reason: str, records: int, now_s: float) -> Told | None:
        """Some were parked just now (by the monotonic clock)."""
        if (backend, reason) not in self._kinds and len(self._kinds) >= KINDS_MAX:
            reason = "other"
        kind = self._kinds.get((backend, reason))
        if kind is None:
            self._kinds[(backend, reason)] = _Kind(now_s)
            return Told(backend, reason, records, first=True)
        kind.untold += records
        return self._tell(backend, reason, kind, now_s)

    def due(self, now_s: float) -> list[Told]:
        """What was not told yet and is an hour old."""
        told = [self._tell(*key, kind, now_s) for key, kind in self._kinds.items()]
        return [one for one in told if one is not None]

    def _tell(self, backend: str, reason: str, kind: _Kind, now_s: float) -> Told | None:
        if not kind.untold or now_s - kind.last_s < EVERY_S:
            return None
        told = Told(backend, reason, kind.untold, first=False)
        kind.last_s, kind.untold = now_s, 0
        return told
