"""The reading side of the ledger, for the `usage` command and whoever else wants sums.

Each question opens the file read-only and closes it again. A row says None where nothing was ever reported, and zero
only where zero was. Sums are exact: SQLite adds up whole numbers while it can, and where it cannot (see `schema`) the
rest of the answer is added up in Python.

Whole days (of UTC) are read from the daily sums, and only what is left of the time asked for from the hourly ones.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, Final, Protocol, cast
from zoneinfo import ZoneInfo

from sidecar.ledger.schema import DAY_S, SCHEMA, SUMS, LedgerError, read_cost, stored
from sidecar.meters.buckets import UNIQUE_MAX
from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import EXACT, write_amount
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
_COLUMNS: Final = ", ".join(COUNTED)
_EPOCH: Final = date(1970, 1, 1)


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


class _Sum:
    """SQLite's aggregate, exact: nulls are left out, and nothing but nulls gives null."""

    def __init__(self) -> None:
        self.total: int | None = None

    def step(self, value: int | str | None) -> None:
        if value is not None:
            self.total = (self.total or 0) + int(value)

    def finalize(self) -> int | str | None:
        return None if self.total is None else stored(self.total)


class _DecimalSum:
    def __init__(self) -> None:
        self.total: Decimal | None = None

    def step(self, value: str | None) -> None:
        if value is not None:
            self.total = EXACT.add(self.total or Decimal(0), Decimal(value))

    def finalize(self) -> str | None:
        return None if self.total is None else write_amount(self.total)


class _CostSum(_DecimalSum):
    """Of what a column of costs keeps; in dollars."""

    def step(self, value: int | str | None) -> None:
        if value is not None:
            self.total = EXACT.add(self.total or Decimal(0), read_cost(value) or Decimal(0))


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
            for name in unsure([*by, *(where or ())]):
                if db.execute("SELECT 1 FROM series_dimensions WHERE name = ? LIMIT 1", (name,)).fetchone() is None:
                    raise unknown(name)
            if zone is not None:
                begin, end = extent(begin, end, *db.execute(EXTENT.format("")).fetchone())
            question = Question(by, begin, end, where or {}, zone, self._dialect)
            labels = question.labels()
            given = 0
            try:
                for row in db.execute(question.sql(exact=False), question.values):
                    if float in map(type, row[len(labels) :]):
                        break
                    given += 1
                    yield labelled(row[: len(labels)], labels), row[len(labels) :]
                else:
                    return
            except sqlite3.Error as error:
                if "integer overflow" not in str(error):
                    raise
            rows = iter(db.execute(question.sql(exact=True), question.values))
            for _ in range(given):  # the same groups in the same order
                next(rows)
            for row in rows:
                *sums, cost = row[len(labels) :]
                exact = (*(None if value is None else int(value) for value in sums), cost)
                yield labelled(row[: len(labels)], labels), exact

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
            db.create_aggregate("exact_sum", 1, cast(Any, _Sum))
            db.create_aggregate("decimal_sum", 1, cast(Any, _DecimalSum))
            db.create_aggregate("cost_sum", 1, cast(Any, _CostSum))
            try:
                yield db
            except sqlite3.OperationalError as error:
                if "interrupted" in str(error):
                    raise TooLongError from None
                raise


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
    ) -> None:
        """`begin`, `end`: whole hours, Unix seconds; the end is not included, None is none."""
        self._dialect = dialect
        self._by = tuple(by)
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
        source, source_values = self._source(begin, end)
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

    def _source(self, begin: int, end: int | None) -> tuple[str, list[int]]:
        """The rows of the time asked for, with `hour` as their time, and its values."""
        schema = self._dialect.schema
        hours = f"SELECT hour, series, {_COLUMNS} FROM {schema}hourly WHERE hour >= ? AND hour < ?"
        whole = -(-begin // DAY_S) * DAY_S
        last = FOREVER if end is None else end // DAY_S * DAY_S
        until = FOREVER if end is None else end
        # A day of another zone is made of hours; without one among the groups a zone says nothing but begin and end.
        local = self._zone is not None and not {"day", "month"}.isdisjoint(self._by)
        if "hour" in self._by or local or whole >= last:
            return hours, [begin, until]
        days = f"SELECT day AS hour, series, {_COLUMNS} FROM {schema}daily WHERE day >= ? AND day < ?"
        parts, values = [days], [whole, last]
        if begin < whole:
            parts.append(hours)
            values += [begin, whole]
        if last < until:
            parts.append(hours)
            values += [last, until]
        return " UNION ALL ".join(parts), values

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
            return (_EPOCH + timedelta(days=number)).isoformat()

        ways: dict[str, _Label] = {"hour": hour, "day": day}
        return [ways.get(name) for name in self._by]


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


def _offset(zone: ZoneInfo, begin: int, end: int | None) -> str:
    """The seconds that a zone is ahead of UTC at `hourly.hour`, as SQL."""

    def ahead(at: int) -> int:
        found = datetime.fromtimestamp(at, zone).utcoffset()
        return 0 if found is None else int(found.total_seconds())

    at, now = begin, ahead(begin)
    text, stop = "", begin if end is None else end
    while at < stop:
        later = min(at + DAY_S, stop)
        if (new := ahead(later)) != now:
            change = next(hour for hour in range(at + HOUR_S, later + HOUR_S, HOUR_S) if ahead(hour) == new)
            text += f" WHEN hourly.hour < {change} THEN {now}"
            now = new
        at = later
    return f"CASE{text} ELSE {now} END" if text else str(now)


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
    return tuple(
        value if label is None or value is None else label(value) for value, label in zip(group, labels, strict=True)
    )


def row_of(group: Group, values: Sums) -> UsageRow:
    *sums, cost = values
    text = None if cost is None else write_amount(read_cost(cost) or Decimal(0))
    return UsageRow(group=group, cost_usd=text, **dict(zip(SUMS, sums, strict=True)))
