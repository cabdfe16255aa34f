"""The reading side of the ledger, for the `usage` command and whoever else wants sums.

Each question opens the file read-only and closes it again. Sums are added up in Python, exactly: a row says
None where nothing was ever reported, and zero only where zero was.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from threading import Lock
from time import monotonic
from typing import Any, Final, cast

from sidecar.ledger.schema import SCHEMA, SUMS, LedgerError, stored
from sidecar.meters.buckets import UNIQUE_MAX
from sidecar.meters.definition import Kind, Meter
from sidecar.meters.hourly import EXACT, write_amount
from sidecar.storage.sqlite import errors_told, open_db

# What `--by` may name, and where it comes from.
GROUPS: Final = {
    "subscriber": "series.subscriber",
    "model": "series.model",
    "provider": "series.provider",
    "route": "series.route",
    "status": "series.status_class",
    "hour": "strftime('%Y-%m-%dT%H:00Z', hourly.hour, 'unixepoch')",
    "day": "strftime('%Y-%m-%d', hourly.hour, 'unixepoch')",
    "month": "strftime('%Y-%m', hourly.hour, 'unixepoch')",
}

# What is summed, by its column.
COUNTED: Final = (*SUMS, "cost_usd")
STEPS_BETWEEN_LOOKS: Final = 200_000  # of SQLite's machine, at the clock: a few milliseconds


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


class LedgerReader:
    """Answers questions about one `ledger.db`; may be used while it is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = Lock()
        self._watched: tuple[sqlite3.Connection, int] | None = None  # and the file's inode

    def close(self) -> None:
        """Only after `version` there is anything to close."""
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
        limit_s: float | None = None,
    ) -> list[UsageRow]:
        """Sums by the named groups, in their order. `since` counts from the hour it lies in.

        `where`: of each name one of these values; None is where nothing is known. Raises `LedgerError`, `TooLongError`
        where it takes longer than `limit_s`.
        """
        groups = _groups(by)
        where_sql, values = _between(since, until, where or {})
        columns = [*groups, *(f"exact_sum(hourly.{name})" for name in SUMS), "decimal_sum(hourly.cost_usd)"]
        places = ", ".join(str(number + 1) for number in range(len(groups)))
        order = f" GROUP BY {places} ORDER BY {places}" if groups else " HAVING count(*) > 0"
        tables = "hourly JOIN series ON series.id = hourly.series"
        rows = self._ask(f"SELECT {', '.join(columns)} FROM {tables}{where_sql}{order}", values, limit_s)
        return [_row(row, len(groups)) for row in rows]

    def unpriced(self, since: datetime | None = None) -> list[UnpricedModel]:
        """The models of calls that were not priced, those with the most first."""
        where, values = _between(since, None)
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
        return sorted(found, key=lambda one: (-one.calls, one.provider or "", one.model or ""))

    def units(
        self, by: Sequence[str] = (), since: datetime | None = None, until: datetime | None = None
    ) -> dict[tuple[str | None, ...], dict[str, str]]:
        """Other units than tokens (audio seconds, searches, …): group -> unit -> exact amount."""
        groups = _groups(by)
        where, values = _between(since, until)
        columns = [*groups, "hourly.unit", "decimal_sum(hourly.amount)"]
        places = ", ".join(str(number + 1) for number in range(len(groups) + 1))
        rows = self._ask(
            f"SELECT {', '.join(columns)} FROM hourly_units AS hourly JOIN series ON series.id = hourly.series"
            f"{where} GROUP BY {places} ORDER BY {places}",
            values,
        )
        found: dict[tuple[str | None, ...], dict[str, str]] = {}
        for *group, unit, amount in rows:
            found.setdefault(tuple(group), {})[unit] = amount
        return found

    def meter(self, meter: Meter, since: datetime | None = None, until: datetime | None = None) -> list[MeterRow]:
        """The running values of one meter as it is defined now, by subscriber, group and bucket.

        A bucket counts when it begins within the time asked for, or holds its start.
        """
        rows = self._ask(
            "SELECT subscriber, grp, start, value FROM buckets "
            "WHERE meter = ? AND version = ? AND start >= ? AND start < ? ORDER BY subscriber, grp, start",
            (
                meter.name,
                meter.version,
                0 if since is None else meter.bucket(since),
                2**62 if until is None else _seconds(until),
            ),
        )
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

    def _ask(self, question: str, values: Sequence[Any], limit_s: float | None = None) -> list[tuple[Any, ...]]:
        with closing(open_db(self._path, schema=SCHEMA, read_only=True)) as db, _told(self._path):
            if limit_s is not None:
                ends_s = monotonic() + limit_s
                db.set_progress_handler(lambda: monotonic() > ends_s, STEPS_BETWEEN_LOOKS)
            db.create_aggregate("exact_sum", 1, cast(Any, _Sum))
            db.create_aggregate("decimal_sum", 1, cast(Any, _DecimalSum))
            return db.execute(question, values).fetchall()


def _groups(by: Sequence[str]) -> list[str]:
    for name in by:
        if name not in GROUPS:
            raise LedgerError(f"usage cannot be grouped by {name!r}: expected {', '.join(GROUPS)}")
    return [GROUPS[name] for name in by]


def _between(
    since: datetime | None, until: datetime | None, where: Mapping[str, Sequence[str | None]] | None = None
) -> tuple[str, list[Any]]:
    parts: list[str] = []
    values: list[Any] = []
    if since is not None:
        parts.append("hourly.hour > ? - 3600")
        values.append(_seconds(since))
    if until is not None:
        parts.append("hourly.hour < ?")
        values.append(_seconds(until))
    for name, wanted in (where or {}).items():
        known = [value for value in wanted if value is not None]
        (column,) = _groups([name])
        either = [f"{column} IN ({', '.join('?' * len(known))})"] if known else []
        either += [f"{column} IS NULL"] if None in wanted else []
        parts.append(f"({' OR '.join(either)})")
        values += known
    return (f" WHERE {' AND '.join(parts)}" if parts else ""), values


@contextmanager
def _told(path: Path) -> Iterator[None]:
    with errors_told(path, SCHEMA):
        try:
            yield
        except sqlite3.OperationalError as error:
            if "interrupted" in str(error):
                raise TooLongError from None
            raise


def _seconds(moment: datetime) -> int:
    """A time without a zone is UTC, as all of the ledger's times are."""
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _row(row: tuple[Any, ...], groups: int) -> UsageRow:
    sums = {name: None if value is None else int(value) for name, value in zip(SUMS, row[groups:-1], strict=True)}
    return UsageRow(group=tuple(row[:groups]), cost_usd=row[-1], **sums)  # type: ignore[arg-type]
