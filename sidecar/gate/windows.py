"""Which period a moment belongs to, and when that ends.

A calendar window has a name for each of its periods ("2026-11", "2026-11-28T09+0100"), and that name is a part of the
counter's key: a new period is another counter, so nothing is ever set back. A sliding window is counted in 60 parts, in
whole numbers; the oldest part, of which only some still lies in the window, counts whole, so that nothing is let
through that a finer count would have stopped.

Times are Unix nanoseconds.
"""

from __future__ import annotations

from calendar import monthrange
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final, NamedTuple

SECOND_NS: Final = 1_000_000_000
FOREVER_NS: Final = 1 << 63
PARTS: Final = 60  # of a sliding window
CALENDAR: Final = ("minute", "hour", "day", "week", "month", "year", "total")
_SHORT_S: Final = {"minute": 60, "hour": 3600}
LONGEST_S: Final = 366 * 86_400  # of a sliding window
LONGEST_PERIOD_S: Final[Mapping[str, float]] = {
    "minute": 60.0,
    "hour": 3600.0,
    "day": 25 * 3600.0,  # the clock is set back an hour in one
    "week": 169 * 3600.0,
    "month": 745 * 3600.0,
    "year": float(LONGEST_S),
    "total": float("inf"),
}


def moment(at_ns: int | None) -> str | None:
    """A moment for people and programs, in whole seconds of UTC that end in Z; None where there is none."""
    if at_ns is None:
        return None
    return datetime.fromtimestamp(at_ns // SECOND_NS, UTC).isoformat().replace("+00:00", "Z")


class Period(NamedTuple):
    """One period of a calendar. `id`: how counters and records name it. Times are Unix nanoseconds."""

    id: str
    start_ns: int
    end_ns: int  # the first moment of the next one


@dataclass(slots=True)
class Calendar:
    """Periods of a calendar in one time zone.

    `anchor_day`: on which a month begins; in a shorter month its last day takes that place.
    """

    unit: str
    zone: tzinfo
    anchor_day: int = 1
    _known: Period = field(default=Period("", 0, 0), repr=False, compare=False)

    def period(self, at_ns: int) -> Period:
        known = self._known
        if not known.start_ns <= at_ns < known.end_ns:
            known = self._known = self._find(at_ns)
        return known

    def named(self, name: str, near_ns: int) -> Period | None:
        """The period that is called so, whenever it is: a clock found it that may be days off this one. `near_ns`: most
        likely it is then, or beside it. None: this calendar has none of that name."""
        now = self.period(near_ns)
        if now.id == name:
            return now
        for beside_ns in (now.end_ns, now.start_ns - 1):
            if (beside := self._find(beside_ns)).id == name:
                return beside
        try:
            found = self._find(self._begins_ns(name))
        except (ValueError, OverflowError):
            return None
        return found if found.id == name else None

    def _begins_ns(self, name: str) -> int:
        """By a period's name. Raises `ValueError`."""
        if self.unit in _SHORT_S:
            return int(datetime.fromisoformat(name).timestamp()) * SECOND_NS
        if self.unit == "week":
            year, _, week = name.partition("-W")
            return self._midnight_ns(date.fromisocalendar(int(year), int(week), 1))
        missing = "-01-01" if self.unit == "year" else "-01" if self.unit == "month" and self.anchor_day == 1 else ""
        return self._midnight_ns(date.fromisoformat(name + missing))

    def _find(self, at_ns: int) -> Period:
        if self.unit == "total":
            return Period("total", 0, FOREVER_NS)
        at = datetime.fromtimestamp(at_ns // SECOND_NS, self.zone)
        length_s = _SHORT_S.get(self.unit)
        if length_s is not None:
            # By the zone's own minutes and hours, some of which are half an hour off; where the clock is set back an
            # hour comes twice, and the offset in the name keeps the two apart.
            into_s = at.second + (at.minute * 60 if self.unit == "hour" else 0)
            start_s = at_ns // SECOND_NS - into_s
            name = at.strftime("%Y-%m-%dT%H%z" if self.unit == "hour" else "%Y-%m-%dT%H:%M%z")
            return Period(name, start_s * SECOND_NS, (start_s + length_s) * SECOND_NS)
        first, following, name = self._days(at.date())
        return Period(name, self._midnight_ns(first), self._midnight_ns(following))

    def _days(self, day: date) -> tuple[date, date, str]:
        """The first day of the period, that of the next one, and the period's name."""
        if self.unit == "day":
            return day, day + timedelta(days=1), day.isoformat()
        if self.unit == "week":
            first = day - timedelta(days=day.weekday())
            year, week, _ = first.isocalendar()
            return first, first + timedelta(days=7), f"{year}-W{week:02}"
        if self.unit == "year":
            return date(day.year, 1, 1), date(day.year + 1, 1, 1), str(day.year)
        first = self._anchored(day.year, day.month)
        if day < first:
            first = self._anchored(day.year - (day.month == 1), (day.month - 2) % 12 + 1)
        following = self._anchored(first.year + (first.month == 12), first.month % 12 + 1)
        return first, following, first.strftime("%Y-%m") if self.anchor_day == 1 else first.isoformat()

    def _anchored(self, year: int, month: int) -> date:
        return date(year, month, min(self.anchor_day, monthrange(year, month)[1]))

    def _midnight_ns(self, day: date) -> int:
        return int(datetime(day.year, day.month, day.day, tzinfo=self.zone).timestamp()) * SECOND_NS


@dataclass(slots=True, frozen=True)
class Sliding:
    """The last so many seconds."""

    seconds: int

    def part(self, at_ns: int) -> int:
        """The number of the part that a moment lies in."""
        return at_ns * PARTS // (self.seconds * SECOND_NS)

    def start_ns(self, at_ns: int) -> int:
        """Of the oldest part that counts."""
        return (self.part(at_ns) - PARTS) * self.seconds * SECOND_NS // PARTS

    def total(self, parts: Mapping[int, int], at_ns: int) -> int:
        """What counts of these amounts by part. The oldest one counts whole, and so do some that lie ahead: a clock
        that was set back must not give anything away (`set_back`)."""
        oldest = self.part(at_ns) - PARTS
        return sum(amount for part, amount in parts.items() if part >= oldest)

    def set_back(self, parts: dict[int, int], now_ns: int) -> bool:
        """Have what lies ahead of now count as of now, so that it leaves the window when that has passed, however far
        the clock was ahead. Whether anything did."""
        now = self.part(now_ns)
        ahead = [part for part in parts if part > now]
        for part in ahead:
            parts[now] = parts.get(now, 0) + parts.pop(part)
        return bool(ahead)

    def less_at_ns(self, parts: Mapping[int, int], at_ns: int) -> int:
        """When the oldest amount that counts leaves the window; `at_ns` where there is none."""
        oldest = self.part(at_ns) - PARTS
        counting = [part for part, amount in parts.items() if part >= oldest and amount]
        if not counting:
            return at_ns
        return ((min(counting) + PARTS + 1) * self.seconds * SECOND_NS + PARTS - 1) // PARTS


Window = Calendar | Sliding
