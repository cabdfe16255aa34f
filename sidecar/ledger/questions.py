"""A question for the ledger's sums, as SQL: for the embedded ledger and for the one that many sidecars share.

Whole days (of UTC) are read from the daily sums, and only what is left of the time asked for from the hourly ones. Days
and months of another zone are made of daily sums too (`local_days`). Where no subscriber is asked for, the sums over
all of them are read instead, which are the same in a fraction of the rows. What is asked with it, and what becomes of
the rows, is up to the readers (`queries`, `postgres_queries`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import Any, Final
from zoneinfo import ZoneInfo

from sidecar.ledger.local_days import EPOCH, Period, Split, offsets, split
from sidecar.ledger.schema import DAY_S, SUMS, LedgerError
from sidecar.meters.hourly import TOKENS
from sidecar.model.call_group import HOUR_S

# What `by` and `where` may name beside dimensions, and where it comes from; times are worked out of the hour.
GROUPS: Final = {
    "subscriber": "series.subscriber",
    "model": "series.model",
    "provider": "series.provider",
    "route": "series.route",
    "status": "series.status_class",
    "instance": "series.instance",  # who recorded it
    "hour": None,
    "day": None,
    "month": None,
}
TIMES: Final = ("hour", "day", "month")
DIMENSION: Final = "dimensions."  # before the name of one
# What is summed, by its column.
COUNTED: Final = (*SUMS, "cost_usd")
_COLUMNS: Final = ", ".join(COUNTED)
_MAY_LACK: Final = ("records", *TOKENS, "cost_usd")  # none of the first: there is no such group

Group = tuple[str | None, ...]
# Of one group, in the order of `COUNTED`; the cost, which is the last, as a column keeps it (`schema.read_cost`).
Sums = tuple[Any, ...]

_Label = Callable[[Any], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a database has its own words for."""

    schema: str  # before the name of a table
    month: str  # of a time in Unix seconds, `{}`
    nulls_first: str  # behind each place that is ordered by
    instance: str | None = None  # as SQL, where a series does not have it

    def group(self, name: str) -> str:
        return self.instance if name == "instance" and self.instance is not None else str(GROUPS[name])


class Question:
    """One question for sums as SQL, with `?` for its values."""

    def __init__(
        self,
        by: Sequence[str],
        begin: int,
        end: int | None,
        where: Mapping[str, Sequence[str | None]],
        zone: ZoneInfo | None,
        dialect: Dialect,
        *,
        hours: Sequence[int] | None = None,
        over_all: bool = False,
    ) -> None:
        """`begin`, `end`: whole hours, Unix seconds; the end is not included, None is none. `hours`: the same time hour
        by hour, where few series are asked for, so that their rows are looked up and no others are read. `over_all`:
        of all subscribers together, none of whom is asked for."""
        self._over_all = over_all
        kind = "_all" if over_all else ""
        self._hourly, self._daily = f"{dialect.schema}hourly{kind}", f"{dialect.schema}daily{kind}"
        self._dialect = dialect
        self._by = tuple(by)
        self._where = where
        self._zone = zone
        self.groups: list[str] = []
        self.joins = ""
        self.join_values: list[Any] = []
        shifted = "hourly.hour" if zone is None else f"(hourly.hour + {_offset(zone, begin, end)})"
        for place, name in enumerate(by):
            if name == "hour":
                self.groups.append("hourly.hour")
            elif name == "day":
                self.groups.append(f"{shifted} / {DAY_S}")
            elif name == "month":
                self.groups.append(dialect.month.format(shifted))
            elif name in GROUPS:
                self.groups.append(dialect.group(name))
            else:
                its = f"d{place}"
                self.joins += (
                    f" LEFT JOIN {dialect.schema}series_dimensions AS {its}"
                    f" ON {its}.series = series.id AND {its}.name = ?"
                )
                self.join_values.append(dimension_of(name))
                self.groups.append(f"{its}.value")
        self._filter, filter_values = _filter(where, dialect)
        self._filter_values = filter_values
        source, source_values = self._source(begin, end) if hours is None else (self._hours(hours), [])
        self._source_sql = source
        # In the order in which the statement has them: what is joined stands behind what is read.
        self.values = [*source_values, *filter_values, *self.join_values]

    def sql(self, *, exact: bool) -> str:
        """`exact`: whole numbers of any size, at the speed of Python."""
        names = ", ".join(self.groups)
        tail = _grouped(len(self.groups), self._dialect) if self.groups else " HAVING count(*) > 0"
        sums = ", ".join(f"{'exact_sum' if exact else 'sum'}(hourly.{name})" for name in SUMS)
        sums += f", {'cost_sum' if exact else 'sum'}(hourly.cost_usd)"
        read = f"(SELECT * FROM ({self._source_sql}) AS source{self._filter}) AS hourly"
        # Hour by hour or series by series first, where the groups are made of one of them alone: there are few of them,
        # and what they are called is worked out once for each.
        times = [name in TIMES for name in self._by]
        first = "hour" if times and all(times) else "series" if not any(times) else None
        if first is not None and not exact:
            added = ", ".join(f"sum({name}) AS {name}" for name in COUNTED)
            rows = f"SELECT {first}, {added} FROM ({self._source_sql}) AS source{self._filter} GROUP BY {first}"
            read = f"({rows}) AS hourly"
        named = any(name not in TIMES for name in self._by)
        joined = (
            f" JOIN {self._dialect.schema}series AS series ON series.id = hourly.series{self.joins}" if named else ""
        )
        return f"SELECT {names + ', ' if names else ''}{sums} FROM {read}{joined}{tail}"

    def _hours(self, hours: Sequence[int]) -> str:
        chosen = ", ".join(map(str, hours))
        return f"SELECT hour, series, {_COLUMNS} FROM {self._hourly} WHERE hour IN ({chosen})"

    def _source(self, begin: int, end: int | None) -> tuple[str, list[int]]:
        """The rows of the time asked for, with `hour` as their time, and its values."""
        hours = f"SELECT hour, series, {_COLUMNS} FROM {self._hourly} WHERE hour >= ? AND hour < ?"
        whole = -(-begin // DAY_S) * DAY_S
        last = FOREVER if end is None else end // DAY_S * DAY_S
        until = FOREVER if end is None else end
        # A day of another zone is made of hours; without one among the groups a zone says nothing but begin and end.
        local = self._zone is not None and not {"day", "month"}.isdisjoint(self._by)
        if "hour" in self._by or local or whole >= last:
            return hours, [begin, until]
        days = f"SELECT day AS hour, series, {_COLUMNS} FROM {self._daily} WHERE day >= ? AND day < ?"
        parts, values = [days], [whole, last]
        if begin < whole:
            parts.append(hours)
            values += [begin, whole]
        if last < until:
            parts.append(hours)
            values += [last, until]
        return " UNION ALL ".join(parts), values

    def of_parts(self, parts: Split) -> tuple[str, list[Any]]:
        """The same as `sql`, made of days of UTC and of hours; the last column is whether it is in doubt what there is.

        What is taken away leaves zero, where there was zero or nothing: then nothing else may have been there.
        """
        time = next(place for place, name in enumerate(self._by) if name in TIMES)
        others = [each for place, each in enumerate(self.groups) if place != time]
        names = [f"g{place}" for place in range(len(others))]
        keys = "".join(f", {each} AS {name}" for each, name in zip(others, names, strict=True))
        places = ", ".join(str(place + 1) for place in range(1 + len(others)))
        joined = f" JOIN series ON series.id = source.series{self.joins}" if others else ""
        sums = ", ".join(f"sum(source.{name}) AS {name}" for name in COUNTED)

        def read(table: str, unit: str, chosen: str) -> str:
            rows = (
                f"(SELECT * FROM {table} AS source{self._filter}) AS source" if self._filter else f"{table} AS source"
            )
            return (
                f"SELECT source.{unit} AS {unit}{keys}, {sums} FROM {rows}{joined} "
                f"WHERE source.{unit} IN (SELECT {unit} FROM {chosen}) GROUP BY {places}"
            )

        own = "".join(f", {name}" for name in names)
        less = ", ".join(f"-{name}" for name in COUNTED)
        doubt = " OR ".join(
            f"(sum({name}) = 0 AND max(part = 2 AND {name} IS NOT NULL) AND NOT max(part = 1 AND {name} IS NOT NULL))"
            for name in _MAY_LACK
        )
        shown = ["at" if place == time else names[place - (place > time)] for place in range(len(self._by))]
        statement = (
            f"WITH chosen_days(day, at) AS ({_values(parts.days, 2)}), "
            f"chosen_hours(hour, own, noon) AS ({_values(parts.hours, 3)}), "
            f"whole AS ({read(self._daily, 'day', 'chosen_days')}), "
            f"stray AS MATERIALIZED ({read(self._hourly, 'hour', 'chosen_hours')}), "
            f"parts AS (SELECT 0 AS part, at{own}, {_COLUMNS} FROM whole JOIN chosen_days USING (day)"
            f" UNION ALL SELECT 1, own{own}, {_COLUMNS} FROM stray JOIN chosen_hours USING (hour) WHERE own IS NOT NULL"
            f" UNION ALL SELECT 2, noon{own}, {less} FROM stray JOIN chosen_hours USING (hour) WHERE noon IS NOT NULL) "
            f"SELECT {', '.join(shown)}, {', '.join(f'sum({name})' for name in COUNTED)}, {doubt} FROM parts"
            f"{_grouped(len(shown), self._dialect)}"
        )
        return statement, [*self._filter_values, *self.join_values] * 2

    def of_one(self, group: tuple[Any, ...], parts: Split) -> Question:
        """The same question for one group of it alone."""
        time = next(place for place, name in enumerate(self._by) if name in TIMES)
        others = {name: (group[place],) for place, name in enumerate(self._by) if place != time}
        begin, end = parts.bounds[group[time]]
        hours = range(begin, end, HOUR_S)
        where = {**self._where, **others}
        return Question((), begin, end, where, None, self._dialect, hours=hours, over_all=self._over_all)

    def labels(self) -> list[_Label | None]:
        """What makes a text of each group; None: it is one."""
        zone = self._zone

        @cache
        def hour(at: int) -> str:
            if zone is None:
                return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:00Z")
            return datetime.fromtimestamp(at, zone).isoformat(timespec="minutes")

        @cache
        def day(number: int) -> str:
            return (EPOCH + timedelta(days=number)).isoformat()

        ways: dict[str, _Label] = {"hour": hour, "day": day}
        return [ways.get(name) for name in self._by]


def _values(rows: Sequence[tuple[Period | None, ...]], count: int) -> str:
    """Whole numbers and months as SQL; a row of them at least, which finds nothing."""
    texts = (", ".join("NULL" if one is None else repr(one) for one in row) for row in rows or [(None,) * count])
    return f"VALUES {', '.join(f'({text})' for text in texts)}"


FOREVER: Final = 2**62
SQLITE: Final = Dialect(schema="", month="strftime('%Y-%m', {}, 'unixepoch')", nulls_first="")


def dimension_of(name: str) -> str:
    """The dimension that a name which is none of `GROUPS` means."""
    return name.removeprefix(DIMENSION)


def unsure(names: Sequence[str]) -> list[str]:
    """Those that are dimensions, if the ledger has such."""
    return [name for name in names if name not in GROUPS and not name.startswith(DIMENSION)]


def unknown(name: str) -> LedgerError:
    return LedgerError(f"usage cannot be grouped by {name!r}: expected {', '.join(GROUPS)}")


def _grouped(count: int, dialect: Dialect) -> str:
    places = [str(place + 1) for place in range(count)]
    return f" GROUP BY {', '.join(places)} ORDER BY {', '.join(place + dialect.nulls_first for place in places)}"


def _filter(where: Mapping[str, Sequence[str | None]], dialect: Dialect) -> tuple[str, list[Any]]:
    """The condition on the series, and its values."""
    parts: list[str] = []
    values: list[Any] = []
    for name, wanted in where.items():
        known = [value for value in wanted if value is not None]
        marks = ", ".join("?" * len(known))
        either: list[str] = []
        if name in GROUPS:
            if GROUPS[name] is None:
                raise LedgerError(f"usage cannot be filtered by {name!r}: it is a time; say since and until")
            column = dialect.group(name)
            either += [f"{column} IN ({marks})"] if known else []
            either += [f"{column} IS NULL"] if None in wanted else []
            values += known
        else:
            its = (
                f"SELECT 1 FROM {dialect.schema}series_dimensions AS its WHERE its.series = series.id AND its.name = ?"
            )
            if known:
                either.append(f"EXISTS ({its} AND its.value IN ({marks}))")
                values += [dimension_of(name), *known]
            if None in wanted:
                either.append(f"NOT EXISTS ({its})")
                values.append(dimension_of(name))
        parts.append(f"({' OR '.join(either)})")
    series = f"SELECT series.id FROM {dialect.schema}series AS series WHERE {' AND '.join(parts)}"
    return (f" WHERE source.series IN ({series})" if parts else ""), values


EXTENT: Final = "SELECT (SELECT min(hour) FROM {0}hourly), (SELECT max(hour) FROM {0}hourly)"  # each by the index


def hours_of(since: datetime | None, until: datetime | None) -> tuple[int, int | None]:
    """The whole hours that a time asked for lies in, Unix seconds."""
    begin = 0 if since is None else seconds(since) // HOUR_S * HOUR_S
    return begin, None if until is None else -(-seconds(until) // HOUR_S) * HOUR_S


def extent(begin: int, end: int | None, first: int | None, last: int | None) -> tuple[int, int | None]:
    """The time asked for, cut to what is there: a zone's offset has to be known in all of it."""
    if first is None or last is None:
        return begin, end
    return max(begin, first), min(end if end is not None else FOREVER, last + HOUR_S)


def parts_of(
    by: Sequence[str], begin: int, end: int | None, zone: ZoneInfo, first: int | None, last: int | None
) -> Split | None:
    """How days or months of a zone are made of what is there; None: hour by hour."""
    times = [name for name in by if name in TIMES]
    if first is None or last is None or times not in (["day"], ["month"]):
        return None
    # Nothing is to be taken from a day that begins before all that is there, or ends behind it.
    begin = first // DAY_S * DAY_S if begin <= first else begin
    behind = -(-(last + HOUR_S) // DAY_S) * DAY_S
    end = behind if end is None or end > last else end
    return split(zone, begin, end, months=times == ["month"]) if begin < end else None


def _offset(zone: ZoneInfo, begin: int, end: int | None) -> str:
    """The seconds that a zone is ahead of UTC at `hourly.hour`, as SQL."""
    known = offsets(zone, begin, begin if end is None else end)
    text = "".join(f" WHEN hourly.hour < {at} THEN {before}" for (_, before), (at, _) in pairwise(known))
    return f"CASE{text} ELSE {known[-1][1]} END" if text else str(known[-1][1])


def between(since: datetime | None, until: datetime | None) -> tuple[str, list[int]]:
    """The condition on `hourly`, and its values; the hour that `since` lies in counts."""
    parts, values = [], []
    if since is not None:
        parts.append("hourly.hour > ? - 3600")
        values.append(seconds(since))
    if until is not None:
        parts.append("hourly.hour < ?")
        values.append(seconds(until))
    return (f" WHERE {' AND '.join(parts)}" if parts else ""), values


def seconds(moment: datetime) -> int:
    """A time without a zone is UTC, as all of the ledger's times are."""
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def labelled(group: tuple[Any, ...], labels: Sequence[_Label | None]) -> Group:
    """A group as the caller gets it: its times are texts."""
    if labels.count(None) == len(labels):
        return group
    found = list(group)  # no generator: there may be a hundred thousand groups
    for place, label in enumerate(labels):
        if label is not None and found[place] is not None:
            found[place] = label(found[place])
    return tuple(found)
