"""The reading side of the ledger, for the `usage` command and whoever else wants sums.

Each question opens the file read-only and closes it again. A row says None where nothing was ever reported, and zero
only where zero was. Sums are exact: SQLite adds up whole numbers while it can, and where it cannot (see `schema`) the
rest of the answer is added up in Python.

Whole days (of UTC) are read from the daily sums, and only what is left of the time asked for from the hourly ones. Days
and months of another zone are made of daily sums too (`local_days`). Where no subscriber is asked for, the sums over
all of them are read instead, which are the same in a fraction of the rows.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, Final, Protocol
from zoneinfo import ZoneInfo

from sidecar.ledger.local_days import EPOCH, Period, Split, offsets, split
from sidecar.ledger.schema import DAY_S, SCHEMA, SUMS, LedgerError, add_exact_sums, read_cost
from sidecar.meters.buckets import UNIQUE_MAX
from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import EXACT, TOKENS, write_amount
from sidecar.model.call_group import HOUR_S
from sidecar.storage.sqlite import errors_told, open_db

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
STEPS_BETWEEN_LOOKS: Final = 200_000  # of SQLite's machine, at the clock: a few milliseconds
UNSURE_MAX: Final = 300  # groups of one answer that are asked for apart; with more of them all are read hour by hour
_COLUMNS: Final = ", ".join(COUNTED)
_MAY_LACK: Final = ("records", *TOKENS, "cost_usd")  # none of the first: there is no such group


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageRow:
    """What one group consumed. `group` has the values of `by`, in that order."""

    group: tuple[str | None, ...]
    records: int
    calls: int
    errors: int
    with_usage: int
    partial_usage: int
    without_usage: int
    unpriced: int  # calls that `cost_usd` lacks, because no cost is known of them
    request_bytes: int
    response_bytes: int
    input_tokens: int | None
    output_tokens: int | None
    total_tokens: int | None
    cache_read_input_tokens: int | None
    cache_write_input_tokens: int | None
    reasoning_output_tokens: int | None
    cost_usd: str | None  # an exact decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterRow:
    """One running value. `start` is None where usage is never reset."""

    subscriber: str | None
    group: str | None
    start: datetime | None
    value: str  # an exact decimal, with the multiplier
    capped: bool = False  # UNIQUE_COUNT: there are at least so many


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpricedModel:
    """A model that was called and whose calls were not priced."""

    provider: str | None
    model: str | None
    calls: int
    last: datetime  # start of the hour of the last of them


Group = tuple[str | None, ...]
# Of one group, in the order of `COUNTED`; the cost, which is the last, as a column keeps it (`schema.read_cost`).
Sums = tuple[Any, ...]


class TooLongError(Exception):
    """The question took longer than it may."""


class Ledger(Protocol):
    """Whoever answers questions about sums: the embedded ledger, or the one that many sidecars share. All of it
    blocks. Raises `StorageError` where it cannot be read."""

    def close(self) -> None: ...

    def version(self) -> tuple[int, int]:
        """Another one after each change, for as long as this reader lives."""
        ...

    def sums(
        self,
        by: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        where: Mapping[str, Sequence[str | None]] | None = None,
        *,
        zone: ZoneInfo | None = None,
        limit_s: float | None = None,
    ) -> Iterator[tuple[Group, Sums]]: ...

    def usage(
        self,
        by: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        where: Mapping[str, Sequence[str | None]] | None = None,
        *,
        zone: ZoneInfo | None = None,
        limit_s: float | None = None,
    ) -> list[UsageRow]: ...

    def unpriced(self, since: datetime | None = None) -> list[UnpricedModel]: ...

    def units(
        self, by: Sequence[str] = (), since: datetime | None = None, until: datetime | None = None
    ) -> dict[Group, dict[str, str]]: ...

    def meter(self, meter: Meter, since: datetime | None = None, until: datetime | None = None) -> list[MeterRow]: ...


class LedgerReader:
    """Answers questions about one `ledger.db`; may be used while it is written."""

    def __init__(self, path: Path, instance: str = "") -> None:
        """`instance`: who all of it is recorded by; none is asked for where it has no name yet."""
        self._path = path
        self._dialect = replace(SQLITE, instance=f"nullif('{instance.replace(chr(39), chr(39) * 2)}', '')")
        self._lock = Lock()
        self._watched: tuple[sqlite3.Connection, int] | None = None  # and the file's inode

    def close(self) -> None:
        """There is something to close after `version` only."""
        with self._lock:
            self._unwatch()

    def version(self) -> tuple[int, int]:
        """Another one after each change, for as long as this reader lives. Costs no reading of the file."""
        with self._lock, errors_told(self._path, SCHEMA):
            inode = self._path.stat().st_ino if self._path.exists() else 0
            if self._watched is not None and self._watched[1] != inode:
                self._unwatch()
            if self._watched is None:
                self._watched = open_db(self._path, schema=SCHEMA, read_only=True, lasting=True), inode
            return inode, int(self._watched[0].execute("PRAGMA data_version").fetchone()[0])

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._watched[0].close()
            self._watched = None

    def usage(
        self,
        by: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        where: Mapping[str, Sequence[str | None]] | None = None,
        *,
        zone: ZoneInfo | None = None,
        limit_s: float | None = None,
    ) -> list[UsageRow]:
        """Sums by the named groups, in their order. `since` counts from the hour it lies in.

        A name that is none of `GROUPS` is a dimension, `dimensions.feature` or one that the ledger has. `where`: of
        each name one of these values; None is where nothing is known. `zone`: of hours, days and months; an hour counts
        in the day that it begins in. Raises `LedgerError`, `TooLongError` where it takes longer than `limit_s`.
        """
        return list(self.usage_rows(by, since, until, where, zone=zone, limit_s=limit_s))

    def usage_rows(
        self,
        by: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        where: Mapping[str, Sequence[str | None]] | None = None,
        *,
        zone: ZoneInfo | None = None,
        limit_s: float | None = None,
    ) -> Iterator[UsageRow]:
        """The same one by one, for an answer that may not fit into memory."""
        for group, values in self.sums(by, since, until, where, zone=zone, limit_s=limit_s):
            yield row_of(group, values)

    def sums(
        self,
        by: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        where: Mapping[str, Sequence[str | None]] | None = None,
        *,
        zone: ZoneInfo | None = None,
        limit_s: float | None = None,
    ) -> Iterator[tuple[Group, Sums]]:
        """The same as they come, for who looks at many and keeps few; `row_of` makes a row of them."""
        begin, end = hours_of(since, until)
        with self._open(limit_s) as db:
            db.execute("BEGIN")  # all of the answer is of one moment
            for name in unsure([*by, *(where or ())]):
                if db.execute("SELECT 1 FROM series_dimensions WHERE name = ? LIMIT 1", (name,)).fetchone() is None:
                    raise unknown(name)
            parts = None
            over_all = "subscriber" not in {*by, *(where or ())} and _over_all(db, begin)
            if zone is not None:
                there = db.execute(EXTENT.format("")).fetchone()
                parts = parts_of(by, begin, end, zone, *there)
                begin, end = extent(begin, end, *there)
            question = Question(by, begin, end, where or {}, zone, self._dialect, over_all=over_all)
            # Each way gives the same groups in the same order. Where one cannot go on, the next begins behind it.
            given = 0
            if parts is not None:
                for row in self._of_parts(db, question, parts):
                    if row is None:
                        break
                    given += 1
                    yield row
                else:
                    return
            yield from _answers(db, question, given)

    def _of_parts(
        self, db: sqlite3.Connection, question: Question, parts: Split
    ) -> Iterator[tuple[Group, Sums] | None]:
        """By days or months of a zone; None, and nothing more, where it cannot be told this way."""
        labels, apart = question.labels(), 0
        try:
            for *values, in_doubt in db.execute(*question.of_parts(parts)):
                group, sums = tuple(values[: len(labels)]), tuple(values[len(labels) :])
                if float in map(type, sums):
                    break
                if in_doubt:
                    apart += 1
                    if apart > UNSURE_MAX:
                        break
                    alone = list(_answers(db, question.of_one(group, parts), 0))
                    if not alone:
                        continue
                    ((_, sums),) = alone
                yield labelled(group, labels), sums
            else:
                return
        except sqlite3.Error as error:
            if "integer overflow" not in str(error):
                raise
        yield None

    def unpriced(self, since: datetime | None = None) -> list[UnpricedModel]:
        """The models of calls that were not priced, those with the most first."""
        where, values = between(since, None)
        rows = self._ask(
            "SELECT series.provider, series.model, exact_sum(hourly.unpriced), max(hourly.hour) "
            "FROM hourly JOIN series ON series.id = hourly.series"
            f"{where}{' AND' if where else ' WHERE'} hourly.unpriced <> 0 GROUP BY 1, 2",
            values,
        )
        found = [
            UnpricedModel(provider=provider, model=model, calls=int(calls), last=datetime.fromtimestamp(hour, UTC))
            for provider, model, calls, hour in rows
        ]
        return sorted(found, key=most_first)

    def units(
        self, by: Sequence[str] = (), since: datetime | None = None, until: datetime | None = None
    ) -> dict[tuple[str | None, ...], dict[str, str]]:
        """Other units than tokens (audio seconds, searches, …): group -> unit -> exact amount."""
        question = Question(by, 0, None, {}, None, self._dialect)
        where, values = between(since, until)
        columns = [*question.groups, "hourly.unit", "decimal_sum(hourly.amount)"]
        places = ", ".join(str(number + 1) for number in range(len(by) + 1))
        rows = self._ask(
            f"SELECT {', '.join(columns)} FROM hourly_units AS hourly JOIN series ON series.id = hourly.series"
            f"{question.joins}{where} GROUP BY {places} ORDER BY {places}",
            [*question.join_values, *values],
        )
        labels = question.labels()
        found: dict[tuple[str | None, ...], dict[str, str]] = {}
        for *group, unit, amount in rows:
            found.setdefault(labelled(tuple(group), labels), {})[unit] = amount
        return found

    def meter(self, meter: Meter, since: datetime | None = None, until: datetime | None = None) -> list[MeterRow]:
        """The running values of one meter as it is defined now, by subscriber, group and bucket.

        A bucket counts when it begins within the time asked for, or holds its start.
        """
        rows = self._ask(
            "SELECT subscriber, grp, start, value FROM buckets "
            "WHERE meter = ? AND version = ? AND start >= ? AND start < ? ORDER BY subscriber, grp, start",
            bucket_values(meter, since, until),
        )
        return meter_rows(meter, rows)

    def _ask(self, question: str, values: Sequence[Any]) -> list[tuple[Any, ...]]:
        with self._open(None) as db:
            return db.execute(question, values).fetchall()

    @contextmanager
    def _open(self, limit_s: float | None) -> Iterator[sqlite3.Connection]:
        with closing(open_db(self._path, schema=SCHEMA, read_only=True)) as db, errors_told(self._path, SCHEMA):
            if limit_s is not None:
                ends_s = monotonic() + limit_s
                db.set_progress_handler(lambda: monotonic() > ends_s, STEPS_BETWEEN_LOOKS)
            add_exact_sums(db)
            try:
                yield db
            except sqlite3.OperationalError as error:
                if "interrupted" in str(error):
                    raise TooLongError from None
                raise


def _over_all(db: sqlite3.Connection, begin: int) -> bool:
    """Whether the sums over all subscribers have all from this hour on."""
    if db.execute("SELECT 1 FROM sqlite_schema WHERE name = 'all_since'").fetchone() is None:
        return False  # nobody has written since they are kept
    row = db.execute("SELECT hour FROM all_since").fetchone()
    return row is not None and begin >= row[0]


def _answers(db: sqlite3.Connection, question: Question, given: int) -> Iterator[tuple[Group, Sums]]:
    """All groups but those that were given already."""
    labels = question.labels()
    try:
        rows = iter(db.execute(question.sql(exact=False), question.values))
        for _ in range(given):
            next(rows)
        count = len(labels)
        for row in rows:
            sums = row[count:]
            if float in map(type, sums):
                break
            given += 1
            yield labelled(row[:count], labels), sums
        else:
            return
    except sqlite3.Error as error:
        if "integer overflow" not in str(error):
            raise
    rows = iter(db.execute(question.sql(exact=True), question.values))
    for _ in range(given):
        next(rows)
    for row in rows:
        *whole, cost = row[len(labels) :]
        exact = (*(None if value is None else int(value) for value in whole), cost)
        yield labelled(row[: len(labels)], labels), exact


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


def bucket_values(meter: Meter, since: datetime | None, until: datetime | None) -> tuple[Any, ...]:
    """What a question for a meter's buckets asks for: name, version, first start, and the start that is not in it."""
    first = 0 if since is None else meter.bucket(since)
    return meter.name, meter.version, first, FOREVER if until is None else seconds(until)


def meter_rows(meter: Meter, rows: Iterable[Sequence[Any]]) -> list[MeterRow]:
    """Of subscriber, group, start and value."""
    return [
        MeterRow(
            subscriber=subscriber,
            group=group,
            start=None if start == 0 else datetime.fromtimestamp(start, UTC),
            value=write_amount(EXACT.multiply(Decimal(value), meter.multiplier or Decimal(1))),
            capped=meter.kind is Kind.UNIQUE_COUNT and int(value) >= UNIQUE_MAX,
        )
        for subscriber, group, start, value in rows
        if value is not None
    ]


def most_first(one: UnpricedModel) -> tuple[int, str, str]:
    return -one.calls, one.provider or "", one.model or ""


def labelled(group: tuple[Any, ...], labels: Sequence[_Label | None]) -> Group:
    if labels.count(None) == len(labels):
        return group
    found = list(group)  # no generator: there may be a hundred thousand groups
    for place, label in enumerate(labels):
        if label is not None and found[place] is not None:
            found[place] = label(found[place])
    return tuple(found)


def row_of(group: Group, values: Sums) -> UsageRow:
    *sums, cost = values
    text = None if cost is None else write_amount(read_cost(cost) or Decimal(0))
    return UsageRow(group=group, cost_usd=text, **dict(zip(SUMS, sums, strict=True)))
