"""Days and months of a time zone, made of the daily sums of UTC and of a few hours.

A local day is for the most part one day of UTC. So each day of UTC is counted whole for the local one that its noon
lies in, and each hour of it that lies in another is taken from that and added to its own. In Berlin that is one hour
of 24, or two in summer; nowhere more than 12. What is not in the time asked for is taken away the same way.

An hour counts in the day that it begins in, also where a zone is half an hour off. Pure: no database is asked here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from sidecar.ledger.schema import DAY_S
from sidecar.model.call_group import HOUR_S

EPOCH: Final = date(1970, 1, 1)
# They stand in the statement, which SQLite reads up to a megabyte of: of Berlin some 18 years, elsewhere at least two.
HOURS_MAX: Final = 10_000
DAYS_MAX: Final = 7_000

Period = int | str  # a day since 1970, or a month as it is shown


@dataclass(slots=True)
class Split:
    """What is read, and for which period: a day or a month of the zone."""

    days: list[tuple[int, Period]] = field(default_factory=list)  # start of a day of UTC; all of it counts here
    # Start of an hour; where it is added, and what it is taken from. None: nothing.
    hours: list[tuple[int, Period | None, Period | None]] = field(default_factory=list)
    bounds: dict[Period, tuple[int, int]] = field(default_factory=dict)  # first hour of each, and the one behind it


def offsets(zone: ZoneInfo, begin: int, end: int) -> list[tuple[int, int]]:
    """The seconds that a zone is ahead of UTC from each hour on, between two times in Unix seconds."""

    def ahead(at: int) -> int:
        found = datetime.fromtimestamp(at, zone).utcoffset()
        return 0 if found is None else int(found.total_seconds())

    at, now = begin, ahead(begin)
    found = [(begin, now)]
    while at < end:
        later = min(at + DAY_S, end)
        if (new := ahead(later)) != now:
            change = next(hour for hour in range(at + HOUR_S, later + HOUR_S, HOUR_S) if ahead(hour) == new)
            found.append((change, new))
            now = new
        at = later
    return found


def split(zone: ZoneInfo, begin: int, end: int, *, months: bool) -> Split | None:
    """The time from one whole hour to another, in days of the zone, or in months; None: it is too long for this."""
    if end - begin > DAYS_MAX * DAY_S:
        return None
    period, found = _periods(zone, begin, end, months=months), Split()
    for day in range(begin // DAY_S * DAY_S, end, DAY_S):
        noon = period(day + DAY_S // 2)
        inside = range(max(day, begin), min(day + DAY_S, end), HOUR_S)
        own = {hour: period(hour) for hour in inside}
        for hour, at in own.items():
            first, past = found.bounds.get(at, (hour, hour))
            found.bounds[at] = min(first, hour), max(past, hour + HOUR_S)
        strays = [hour for hour in range(day, day + DAY_S, HOUR_S) if own.get(hour) != noon]
        if len(strays) < len(inside):
            found.days.append((day, noon))
            found.hours += [(hour, own.get(hour), noon) for hour in strays]
        else:
            found.hours += [(hour, at, None) for hour, at in own.items()]
    return found if len(found.hours) <= HOURS_MAX else None


def _periods(zone: ZoneInfo, begin: int, end: int, *, months: bool) -> Callable[[int], Period]:
    known = offsets(zone, begin - DAY_S, end + DAY_S)
    changes = [at for at, _ in known]
    names: dict[int, str] = {}

    def period(hour: int) -> Period:
        day = (hour + known[max(bisect_right(changes, hour) - 1, 0)][1]) // DAY_S
        if not months:
            return day
        if day not in names:
            names[day] = (EPOCH + timedelta(days=day)).isoformat()[:7]
        return names[day]

    return period
