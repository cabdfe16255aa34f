"""The equation that says whether every call is accounted for.

    admitted = recorded + open + lost{reason}
    recorded = delivered + duplicate + parked{reason} + pending + skipped{reason}      (for each backend)

Pure data and arithmetic. The terms come from separate places (admitted and lost from the recorder,
recorded from the writer's rows, the rest from delivery's), which is what makes the equation able to fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


class SpoolTerms(Protocol):
    """What one spool says of the calls that went into it."""

    @property
    def admitted(self) -> int: ...
    @property
    def recorded(self) -> int: ...
    @property
    def open(self) -> int: ...
    @property
    def lost(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendTotals:
    """What has become of the recorded calls at one backend."""

    delivered: int = 0
    duplicate: int = 0
    pending: int = 0
    parked: Mapping[str, int] = field(default_factory=dict)
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.delivered + self.duplicate + self.pending + sum(self.parked.values()) + sum(self.skipped.values())

    def problem(self, name: str, recorded: int) -> str | None:
        """What is wrong where so many were recorded and this is not their sum, in words; `name`: of the backend."""
        if self.total == recorded:
            return None
        return (
            f"{name}: recorded {recorded} is not {self.total}, the sum of delivered {self.delivered}, "
            f"duplicate {self.duplicate}, parked {sum(self.parked.values())}, pending {self.pending} "
            f"and skipped {sum(self.skipped.values())}"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "delivered": self.delivered,
            "duplicate": self.duplicate,
            "parked": dict(self.parked),
            "pending": self.pending,
            "skipped": dict(self.skipped),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """One look at all terms. `problems` is empty when it holds."""

    admitted: int = 0
    recorded: int = 0
    open: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)
    backends: Mapping[str, BackendTotals] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what an operator has to know of it and has to decide

    @classmethod
    def over(
        cls, spools: Iterable[SpoolTerms], backends: Mapping[str, BackendTotals], notes: tuple[str, ...] = ()
    ) -> Balance:
        """Over all spools of a data directory; `backends`: what has become of their records at each."""
        terms = list(spools)
        return cls(
            admitted=sum(term.admitted for term in terms),
            recorded=sum(term.recorded for term in terms),
            open=sum(term.open for term in terms),
            lost=add_counts(term.lost for term in terms),
            backends=backends,
            notes=notes,
        )

    @property
    def problems(self) -> list[str]:
        """Each sum that does not come out, in words that can be acted on."""
        found = []
        lost = sum(self.lost.values())
        if self.admitted != self.recorded + self.open + lost:
            found.append(
                f"admitted {self.admitted} is not recorded {self.recorded} + open {self.open} + lost {lost}: "
                "run `metering-sidecar spool verify`"
            )
        problems = (totals.problem(name, self.recorded) for name, totals in self.backends.items())
        found += [problem for problem in problems if problem is not None]
        return found

    @property
    def holds(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """The form of `/balance` and of `balance --format json`."""
        return {
            "admitted": self.admitted,
            "recorded": self.recorded,
            "open": self.open,
            "lost": dict(self.lost),
            "backends": {name: totals.to_dict() for name, totals in self.backends.items()},
            "holds": self.holds,
        }


def add_counts(rows: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of several counts by reason."""
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row)
    return dict(total)


def add_totals(rows: Iterable[BackendTotals]) -> BackendTotals:
    """The sum of what has become of records in several places."""
    known = list(rows)
    return BackendTotals(
        delivered=sum(one.delivered for one in known),
        duplicate=sum(one.duplicate for one in known),
        pending=sum(one.pending for one in known),
        parked=add_counts(one.parked for one in known),
        skipped=add_counts(one.skipped for one in known),
    )
