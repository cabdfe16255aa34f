"""What became of parked events that were to be offered again: for an operator, by event where there are few.

Plain data. A redrive seals at once, so what can be known before a vendor answers is known when it returns: an event
is stored as (a part of) a request that goes out, or it stays parked and here is why.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

EACH_MAX: Final = 20  # events told one by one; of more, the counts tell


class Became(StrEnum):
    """Programs read these words."""

    OFFERED = "offered"
    SKIPPED = "skipped"  # it encodes to nothing now: passed over
    STILL_PARKED = "still_parked"
    MAYBE_TAKEN = "maybe_taken"  # goes only with --resend-unknown
    SIBLINGS_TAKEN = "siblings_taken"  # could only go with events of its record that the backend has
    NO_ROOM = "no_room"  # so much waits for another attempt already: run it again later
    NOT_CONFIGURED = "not_configured"  # its backend is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOutcome:
    backend: str
    event_id: str
    record_id: str
    became: Became
    reason: str = ""  # the one that it is parked for now, or was
    detail: str = ""


@dataclass(slots=True)
class Redriven:
    """All of one redrive."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # what became of it, and the reason
    each: list[OneOutcome] = field(default_factory=list)  # the first of them
    unskipped: int = 0  # records made before their backend was configured, or while it was left out
    not_found: list[tuple[str, str]] = field(default_factory=list)  # ids that are not parked, and what is known of them
    seen: set[str] = field(default_factory=set)  # ids that were asked for and are parked

    def add(self, one: OneOutcome) -> None:
        reason = "" if one.became in (Became.OFFERED, Became.SKIPPED) else one.reason
        self.counts[(one.became.value, reason)] += 1
        if len(self.each) < EACH_MAX:
            self.each.append(one)

    @property
    def offered(self) -> int:
        """Events and records that go again."""
        return self.counts[(Became.OFFERED.value, "")] + self.counts[(Became.SKIPPED.value, "")] + self.unskipped

    def to_dict(self) -> dict[str, Any]:
        """For the command."""
        return {
            "redriven": self.offered,
            "unskipped": self.unskipped,
            "counts": [
                {"became": became, "reason": reason, "events": n} for (became, reason), n in self.counts.items()
            ],
            "each": [
                {
                    "backend": one.backend, "event_id": one.event_id, "record_id": one.record_id,
                    "became": one.became.value, "reason": one.reason, "detail": one.detail,
                }
                for one in self.each
            ],
            "not_found": [{"id": id_, "known": known} for id_, known in self.not_found],
        }  # fmt: skip
