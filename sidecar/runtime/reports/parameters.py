"""What is asked for, read from texts: the same words on the command line and in the query of an address.

Pure: the time comes in as an argument. What cannot be read raises `QueryError`, one line that says what would do.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sidecar.ledger import COUNTED, DIMENSION, GROUPS, TIMES

BY: Final = ("subscriber", "model")
TEXT_CHARS_MAX: Final = 1000  # of one parameter: a subscriber has at most 200, a list of names some hundred
QUOTED_CHARS: Final = 60  # of a text in a message
BY_MAX: Final = 8  # names to group by at once; more is a list of calls, which `records` is
WHERE_MAX: Final = 32  # conditions at once
TOP_MAX: Final = 10_000
EXPECTED: Final = "an age such as 90m, 24h, 7d, today, or a date: 2026-11-20, 2026-11-20T09:00"
# All that a clock shows lies between these; beyond them, times of other zones and ends of hours are none any more.
OLDEST: Final = datetime(1970, 1, 1, tzinfo=UTC)
NEWEST: Final = datetime(9999, 1, 1, tzinfo=UTC)

UPSTREAM: Final = "upstream"  # filed like a dimension; an own one of that name stands before it

_AGO: Final = re.compile(r"(\d+)\s*([smhdw])", re.ASCII)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
# What a column of an answer is called besides, so that a dimension of that name needs its long one.
_TAKEN: Final = frozenset({"name", "others", *GROUPS, *COUNTED})


class QueryError(ValueError):
    """It cannot be answered as it was asked. The text says what would do, in one line; it begins with what was asked,
    where it was one parameter: as it stands in an address, or as an option that was typed.

    Args:
        said: what is wrong, after the parameter.
        name: of the parameter.
        value: what it was given; None where that is of no use.
    """

    def __init__(self, said: str, name: str | None = None, value: str | None = None) -> None:
        super().__init__(said)
        self._said, self._name, self._value = said, name, value

    def __str__(self) -> str:
        given = "" if self._value is None else f"={quoted(self._value)}"
        return f"{self._name or ''}{given}{self._said}"

    def typed(self) -> str:
        """For who asked by a command."""
        if self._name is None:
            return self._said
        given = "" if self._value is None else f" {_plain(self._value)}"
        return f"--{self._name}{given}{self._said}"


@dataclass(frozen=True, slots=True)
class Values:
    """What a name may be asked for: anything else there never is."""

    pattern: re.Pattern[str]
    expected: str


_GROUPED: Final = {"status": Values(re.compile(r"[1-9]xx|none"), "a class (2xx, 4xx) or none")}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageQuery:
    """Sums of the ledger."""

    by: tuple[str, ...] = BY
    since: datetime | None = None
    until: datetime | None = None  # not included
    where: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)  # name -> one of these; None: not known
    sort: str | None = None  # None: by the groups themselves; of `top`, by cost, then tokens, then calls
    descending: bool = True
    top: int | None = None  # so many groups, and the rest as one
    zone: ZoneInfo | None = None  # of hours, days and months; None: UTC


def quoted(text: str) -> str:
    """A value that somebody sent, as an error says it: cut, and without a byte that moves a cursor."""
    return repr(text if len(text) <= QUOTED_CHARS else text[: QUOTED_CHARS - 1] + "…")


def _plain(text: str) -> str:
    """Without quotes where it is as short and plain as what people type."""
    return text if re.fullmatch(rf"[\w.,:=%+@/-]{{1,{QUOTED_CHARS}}}", text) else quoted(text)


def near(name: str, known: Collection[str]) -> str:
    """`; did you mean …?`, or else which there are."""
    return guess(name, known) or f": expected one of {', '.join(known)}"


def guess(name: str, known: Collection[str]) -> str:
    """`; did you mean …?`, or nothing."""
    close = [DIMENSION + name] if DIMENSION + name in known else get_close_matches(name, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""


def moment(text: str, now: datetime, zone: ZoneInfo | None = None, *, name: str | None = None) -> datetime:
    """A point in time: `90m`, `24h`, `7d` (ago), `today`, or a date and time of ISO 8601; in `zone` (None: UTC) unless
    it says another. A date beyond `OLDEST` or `NEWEST` is that. `name`: of the parameter that it is."""
    found = _AGO.fullmatch(text.strip())
    try:
        if found:
            return max(now - timedelta(seconds=int(found[1]) * _SECONDS[found[2]]), OLDEST)
        if text.strip() == "today":
            here = now.astimezone(zone or UTC)
            # Where a clock goes back over midnight, the first of both.
            return here.replace(hour=0, minute=0, second=0, microsecond=0, fold=0).astimezone(UTC)
        parsed = datetime.fromisoformat(text.strip())
        if not OLDEST.year < parsed.year < NEWEST.year:
            return OLDEST if parsed.year <= OLDEST.year else NEWEST
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=zone or UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        said = f" is no time: expected {EXPECTED}"
        raise (QueryError(quoted(text) + said) if name is None else QueryError(said, name, text)) from None


def time_zone(text: str) -> ZoneInfo | None:
    """By its IANA name; None: UTC."""
    if text.strip().upper() in ("UTC", "Z", "ETC/UTC"):
        return None
    try:
        return ZoneInfo(text.strip())
    except (ZoneInfoNotFoundError, ValueError, OSError):
        expected = "a name of the IANA database such as Europe/Berlin, or UTC"
        raise QueryError(f" is no time zone: expected {expected}", "timezone", text) from None


def whole(name: str, text: str, most: int) -> int:
    """The number, 1 to `most`. Raises `QueryError`, which says the parameter's `name`."""
    if not re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII) or not 1 <= int(text) <= most:
        raise QueryError(f": expected a whole number, 1 to {most:,}", name, text)
    return int(text)


def groups(text: str, dimensions: Collection[str]) -> tuple[str, ...]:
    """The names to sum by, in their order; none for one sum."""
    names = tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))
    if len(names) > BY_MAX:
        raise QueryError(f": {len(names)} names are too many: at most {BY_MAX}", "by")
    known = nameable(dimensions)
    for name in names:
        if not _is_known(name, dimensions):
            raise QueryError(near(name, known), "by", name)
    return names


def nameable(dimensions: Collection[str]) -> tuple[str, ...]:
    """All that `by` and `where` may name; of dimensions the shortest that is theirs alone."""
    return (*GROUPS, *(name if name not in _TAKEN else DIMENSION + name for name in dimensions))


def conditions(
    texts: Sequence[str], names: Mapping[str, Values | None], dimensions: Collection[str]
) -> dict[str, tuple[str | None, ...]]:
    """`NAME=VALUE`, several: of different names all have to hold, of one name one of its values. An empty value is
    where nothing is known, which is never so of a name with `Values`. `names`: with what there may be of each, where
    that is not anything."""
    if len(texts) > WHERE_MAX:
        raise QueryError(f": {len(texts)} conditions are too many: at most {WHERE_MAX}", "where")
    found: dict[str, tuple[str | None, ...]] = {}
    known = (*names, *(name if name not in _TAKEN else DIMENSION + name for name in dimensions))
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise QueryError(": expected NAME=VALUE, such as model=gpt-5-mini", "where", text)
        if name not in names and not _is_dimension(name, dimensions):
            raise QueryError(near(name, known), "where", name)
        possible = names.get(name)
        if possible is not None and not possible.pattern.fullmatch(value):
            raise QueryError(f": expected {possible.expected}", "where", text)
        found[name] = (*found.get(name, ()), value or None)
    return found


def dimension_of(name: str) -> str:
    """The dimension that a name which is nothing else means."""
    return name.removeprefix(DIMENSION)


def order(text: str) -> tuple[str, bool]:
    """What to sort by, and whether downwards: `cost_usd`, `-calls` (as many think it up), `+calls` (upwards)."""
    name = text.strip()
    descending = not name.startswith("+")
    name = _SHORT.get(name.lstrip("+-"), name.lstrip("+-"))
    if name not in COUNTED:
        raise QueryError(near(name, (*_SHORT, *COUNTED)), "sort", text)
    return name, descending


_SHORT: Final = {
    "cost": "cost_usd", "tokens": "total_tokens", "input": "input_tokens", "output": "output_tokens",
    "cached": "cache_read_input_tokens",
}  # fmt: skip


def usage_query(
    *,
    now: datetime,
    dimensions: Collection[str],
    by: str | None = None,
    since: str | None = None,
    until: str | None = None,
    where: Sequence[str] = (),
    sort: str | None = None,
    top: str | None = None,
    timezone: str | None = None,
) -> UsageQuery:
    """Sums, as they were asked for. Raises `QueryError`."""
    zone = None if timezone is None else time_zone(timezone)
    dimensions = (*dimensions, *(() if UPSTREAM in dimensions else (UPSTREAM,)))
    asked_sort, descending = (None, True) if sort is None else order(sort)
    begins, ends = between(since, until, now, zone)
    return UsageQuery(
        by=BY if by is None else groups(by, dimensions),
        since=begins,
        until=ends,
        where=conditions(where, {name: _GROUPED.get(name) for name in GROUPS if name not in TIMES}, dimensions),
        sort=asked_sort,
        descending=descending,
        top=None if top is None else whole("top", top, TOP_MAX),
        zone=zone,
    )


def between(
    since: str | None, until: str | None, now: datetime, zone: ZoneInfo | None
) -> tuple[datetime | None, datetime | None]:
    """Empty is not given: what a form of a page sends for a field that nobody filled in."""
    begins = moment(since, now, zone, name="since") if since else None
    ends = moment(until, now, zone, name="until") if until else None
    if begins is not None and ends is not None and ends <= begins:
        raise QueryError(f" is not behind {quoted(since or '')}", "until", until)
    return begins, ends


def _is_known(name: str, dimensions: Collection[str]) -> bool:
    return name in GROUPS or _is_dimension(name, dimensions)


def _is_dimension(name: str, dimensions: Collection[str]) -> bool:
    if name.startswith(DIMENSION):
        return name.removeprefix(DIMENSION) in dimensions
    return name in dimensions and name not in _TAKEN
