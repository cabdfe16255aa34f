"""The words of delivery: what becomes of an event, where its record stands, why it is set aside, how a backend does;
and what delivery is given: a spool to read, a clock, somewhere to count, of each only the methods that it calls.

Nothing is decided here. The letters of `Fate`, the names of `Term` and the reasons are stored in `delivery.db` and
shown to operators, so they stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Protocol

from sidecar.model.delivery import Verdict

# Reasons of ours for parking; the others are the backend's own words.
UNKNOWN: Final = "unknown"  # may have been taken, and the backend would not recognise a repeat
WINDOW_ENDED: Final = "window_ended"  # may have been taken, and too long ago to be recognised
TOO_OLD: Final = "too_old"  # older than the backend takes
SALVAGED: Final = "salvaged"  # whether it was delivered before is not known any more
REMOVED: Final = "removed"  # its backend is no longer configured
PARTLY_TAKEN: Final = "partly_taken"  # some events of the request were taken, and a repeat would double them
UNREADABLE: Final = "unreadable"  # the stored line is no record
ENCODE_FAILED: Final = "encode_failed"  # the backend's encoder raised, or forgot the record
SUSPECT: Final = "suspect"  # blocked: everything is refused for one reason, which is more likely ours
MISSING: Final = "missing"  # skipped: recorded once, and no longer readable in a damaged spool
BEFORE: Final = "before"  # skipped: made before the backend was first configured
GAP: Final = "gap"  # skipped: made while the backend was left out, and not wanted
RETIRED: Final = "retired"  # skipped: made while the backend was left out, and gone with its chunk before it was back


@dataclass(frozen=True, slots=True)
class Now:
    """Both clocks, read at one moment."""

    wall_s: float
    mono_s: float


@dataclass(frozen=True, slots=True)
class Tries:
    """What has been tried. `risk_*`: start of the first attempt that may have been taken."""

    attempts: int = 0
    risk_wall_s: float | None = None
    risk_mono_s: float | None = None  # None with a wall time: that was another run
    expired: bool = False  # the clock stepped: how much of the window is left is not known, so nothing is
    forced: bool = False  # redriven by an operator who accepts doubles: the next attempt is free
    alone: int = 0  # attempts of this run that came to nothing although others had been taken since the one before
    failed_mono_s: float = math.inf  # when the last attempt of this run ended

    @property
    def risky(self) -> bool:
        return self.expired or self.risk_wall_s is not None


class Fate(StrEnum):
    """What has become of one wire event inside a request. The letters are what is stored."""

    DELIVERED = "d"
    DUPLICATE = "u"
    PARKED = "p"
    MOVED = "m"  # on to a request of its own: a part of a split, or a redrive
    OPEN = "o"  # never stored: the request stays as it is


@dataclass(frozen=True, slots=True)
class Parking:
    reason: str
    maybe_taken: bool = False  # a redrive may bill it twice: only with --resend-unknown


class Term(StrEnum):
    """The place of a record in the balance. `open`: sealed and not settled, a part of `pending`."""

    PARKED = "parked"
    OPEN = "open"
    DELIVERED = "delivered"
    DUPLICATE = "duplicate"
    SKIPPED = "skipped"


def worst(*, parked: int, pending: int, delivered: int, duplicate: int) -> Term:
    """A record counts once, by the worst of its events."""
    if parked:
        return Term.PARKED
    if pending:
        return Term.OPEN
    if delivered:
        return Term.DELIVERED
    if duplicate:
        return Term.DUPLICATE
    raise ValueError("a record without any event has no place in the balance")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStatus:
    """How one backend does, for `/readyz` and metrics."""

    backend: str
    state: str  # up, paused (it asked for it), down, blocked
    reason: str | None
    oldest_pending_s: float | None  # age of the oldest record that is not settled
    sealed: int  # requests stored and not settled
    under_way: int
    waiting_records: int  # sealed and due for another attempt later
    waiting_bytes: int
    paused_s: float = 0.0  # how much is left of the wait that it asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """Which waits of a backend an operator has ended."""

    was: str  # its state before: up, paused, down, blocked
    paused_s: float  # what was left of the wait that it asked for
    requests: int  # whose own waits were cut short

    @property
    def any(self) -> bool:
        return self.was != "up" or self.requests > 0


class StoredGroup(Protocol):
    """Records as committed together: line i has number `first_seq + i`. `missing`: numbers that cannot be read."""

    @property
    def first_seq(self) -> int: ...
    @property
    def last_seq(self) -> int: ...
    @property
    def lines(self) -> tuple[bytes, ...]: ...
    @property
    def salvaged(self) -> bool: ...
    @property
    def missing(self) -> int: ...


class Totals(Protocol):
    @property
    def recorded(self) -> int:
        """All records ever put in, those no longer there included."""
        ...


class SpoolReader(Protocol):
    """The spool of every instance, read only. All methods block."""

    def instances(self) -> list[str]: ...

    def read(self, instance: str, after_seq: int, *, bytes_max: int = 1 << 20) -> Sequence[StoredGroup]:
        """Whole groups in order, the first of which may begin before `after_seq`; nothing when there is no more."""
        ...

    def last_seq(self, instance: str) -> int: ...

    def totals(self, instance: str) -> Totals: ...

    def count(self, instance: str, after_seq: int, upto_seq: int) -> int:
        """Records with `after_seq < seq <= upto_seq`, as the balance counts `recorded`."""
        ...


class Clock(Protocol):
    def wall_s(self) -> float: ...
    def mono_s(self) -> float: ...


class Metrics(Protocol):
    def sealed(self, backend: str, events: int) -> None: ...
    def batch_settled(self, backend: str, verdicts: Sequence[Verdict], seconds: float) -> None: ...
    def parked(self, backend: str, reason: str, count: int) -> None: ...
    def skipped(self, backend: str, reason: str, count: int) -> None: ...
    def blocked(self, backend: str, reason: str | None) -> None: ...
