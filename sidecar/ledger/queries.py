"""The reading side of the ledger, for the `usage` command and whoever else wants sums.

Each question opens the file read-only and closes it again. A row says None where nothing was ever reported, and zero
only where zero was. Sums are exact: SQLite adds up whole numbers while it can, and where it cannot (see `schema`) the
rest of the answer is added up in Python.

How a question becomes SQL is in `questions`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, Final, Protocol
from zoneinfo import ZoneInfo

from sidecar.ledger.local_days import Split
from sidecar.ledger.questions import (
    EXTENT,
    FOREVER,
    SQLITE,
    Group,
    Question,
    Sums,
    between,
    extent,
    hours_of,
    labelled,
    parts_of,
    seconds,
    unknown,
    unsure,
)
from sidecar.ledger.schema import SCHEMA, SUMS, add_exact_sums, read_cost
from sidecar.meters.buckets import UNIQUE_MAX
from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import EXACT, write_amount
from sidecar.storage.sqlite import errors_told, open_db

STEPS_BETWEEN_LOOKS: Final = 200_000  # of SQLite's machine, at the clock: a few milliseconds
UNSURE_MAX: Final = 300  # groups of one answer that are asked for apart; with more of them all are read hour by hour


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


def row_of(group: Group, values: Sums) -> UsageRow:
    """A row of what `sums` gives."""
    *sums, cost = values
    text = None if cost is None else write_amount(read_cost(cost) or Decimal(0))
    return UsageRow(group=group, cost_usd=text, **dict(zip(SUMS, sums, strict=True)))
