"""The reading side of the shared ledger: the same questions and answers as the embedded one, over all who write to it;
and who they are, and their records one by one.

Each question is one transaction that only reads. A row says None where nothing was ever reported. Sums are `numeric`,
so they are exact whatever their size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, Final
from zoneinfo import ZoneInfo

import orjson

from sidecar.ledger.postgres_schema import NO_TIME, PART, STEPS, date_of, day_of, storable, uuid_of
from sidecar.ledger.queries import (
    MeterRow,
    TooLongError,
    UnpricedModel,
    UsageRow,
    bucket_values,
    meter_rows,
    most_first,
    row_of,
)
from sidecar.ledger.questions import (
    EXTENT,
    Dialect,
    Group,
    Question,
    Sums,
    between,
    extent,
    hours_of,
    labelled,
    unknown,
    unsure,
)
from sidecar.ledger.schema import stored_cost
from sidecar.meters.definition import Meter
from sidecar.meters.hourly import write_amount
from sidecar.storage.postgres import SCHEMA, Connection, Postgres, PostgresError, call

PAGE: Final = 500  # records read at a time
_TABLES: Final = f"{SCHEMA}."
POSTGRES: Final = Dialect(
    schema=_TABLES,
    month="to_char(to_timestamp({}) AT TIME ZONE 'UTC', 'YYYY-MM') COLLATE \"C\"",
    nulls_first=" NULLS FIRST",
)
_LATEST: Final = "ffffffff-ffff-ffff-ffff-ffffffffffff"


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRow:
    """One sidecar, as the shared ledger knows it."""

    instance: str
    seen: datetime  # its last write or report, by the database's clock
    age_s: float  # since then
    records: int  # that it wrote
    last_seq: int
    earlier: int  # that it delivered before to another ledger
    oldest_pending_s: float | None  # the age of what it has and the ledger lacks; None: nothing
    balance: Mapping[str, Any] | None  # its own, as it told last


class PostgresReader:
    """Answers questions about the shared ledger. Blocking; from any thread."""

    def __init__(self, url: str) -> None:
        self._db = Postgres(url, name="metering-sidecar reports")
        self._checked = False

    def __repr__(self) -> str:
        return f"<PostgresReader {self.where}>"

    @property
    def where(self) -> str:
        return self._db.where

    def close(self) -> None:
        call(self._db.close())

    def version(self) -> tuple[int, int]:
        """Another one after each change."""

        async def read(db: Connection) -> tuple[int, int]:
            row = await db.fetchrow(
                f"SELECT coalesce(sum(writes), 0)::bigint, count(*)::bigint FROM {SCHEMA}.instances"
            )
            return int(row[0]), int(row[1])

        found: tuple[int, int] = self._ask(read)
        return found

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
        """As `LedgerReader.usage`; `instance` is whoever recorded it."""
        rows = self.sums(by, since, until, where, zone=zone, limit_s=limit_s)
        return [row_of(group, values) for group, values in rows]

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
        begin, end = hours_of(since, until)
        stored = {
            name: [None if value is None else storable(value) for value in values]
            for name, values in (where or {}).items()
        }

        async def read(db: Connection) -> tuple[Question, list[Any]]:
            first, last = begin, end
            for name in unsure([*by, *stored]):
                asked = f"SELECT EXISTS (SELECT FROM {SCHEMA}.series_dimensions WHERE name = $1)"
                if not await db.fetchval(asked, name):
                    raise unknown(name)
            if zone is not None:
                first, last = extent(begin, end, *await db.fetchrow(EXTENT.format(_TABLES)))
            question = Question(by, first, last, stored, zone, POSTGRES)
            return question, await db.fetch(numbered(question.sql(exact=False)), *question.values)

        question, rows = self._ask(read, limit_s)
        labels = question.labels()
        for row in rows:
            values = tuple(row)
            *sums, cost = values[len(labels) :]
            exact = (*(None if value is None else int(value) for value in sums), _cost(cost))
            yield labelled(tuple(map(_plain, values[: len(labels)])), labels), exact

    def unpriced(self, since: datetime | None = None) -> list[UnpricedModel]:
        """The models of calls that were not priced, those with the most first."""
        where, values = between(since, None)

        async def read(db: Connection) -> list[Any]:
            return await db.fetch(
                numbered(
                    "SELECT series.provider, series.model, sum(hourly.unpriced), max(hourly.hour) "
                    f"FROM {_TABLES}hourly AS hourly JOIN {_TABLES}series AS series ON series.id = hourly.series"
                    f"{where}{' AND' if where else ' WHERE'} hourly.unpriced <> 0 GROUP BY 1, 2"
                ),
                *values,
            )

        found = [
            UnpricedModel(provider=row[0], model=row[1], calls=int(row[2]), last=datetime.fromtimestamp(row[3], UTC))
            for row in self._ask(read)
        ]
        return sorted(found, key=most_first)

    def units(
        self, by: Sequence[str] = (), since: datetime | None = None, until: datetime | None = None
    ) -> dict[Group, dict[str, str]]:
        """Other units than tokens: group -> unit -> exact amount."""
        question = Question(by, 0, None, {}, None, POSTGRES)
        where, values = between(since, until)
        columns = [*question.groups, "hourly.unit", "sum(hourly.amount)"]
        count = len(by) + 1
        places = ", ".join(str(place) for place in range(1, count + 1))
        order = ", ".join(f"{place}{POSTGRES.nulls_first}" for place in range(1, count + 1))
        asked = (
            f"SELECT {', '.join(columns)} FROM {_TABLES}hourly_units AS hourly "
            f"JOIN {_TABLES}series AS series ON series.id = hourly.series"
            f"{question.joins}{where} GROUP BY {places} ORDER BY {order}"
        )

        async def read(db: Connection) -> list[Any]:
            return await db.fetch(numbered(asked), *question.join_values, *values)

        labels = question.labels()
        found: dict[Group, dict[str, str]] = {}
        for row in self._ask(read):
            *group, unit, amount = row
            found.setdefault(labelled(tuple(map(_plain, group)), labels), {})[unit] = write_amount(amount)
        return found

    def meter(self, meter: Meter, since: datetime | None = None, until: datetime | None = None) -> list[MeterRow]:
        """The running values of one meter as it is defined now, over all instances."""

        async def read(db: Connection) -> list[Any]:
            return await db.fetch(
                f"SELECT subscriber, grp, start, value FROM {_TABLES}buckets "
                "WHERE meter = $1 AND version = $2 AND start >= $3 AND start < $4 "
                "ORDER BY subscriber NULLS FIRST, grp NULLS FIRST, start",
                *bucket_values(meter, since, until),
            )

        return meter_rows(meter, self._ask(read))

    def instances(self) -> list[InstanceRow]:
        """All that ever wrote here, by name."""

        async def read(db: Connection) -> list[Any]:
            return await db.fetch(
                "SELECT instance, seen, extract(epoch FROM clock_timestamp() - seen)::float8, records, last_seq, "
                "extract(epoch FROM clock_timestamp() - oldest_pending)::float8, balance::text, coalesce(earlier, 0) "
                f"FROM {_TABLES}instances ORDER BY instance"
            )

        return [
            InstanceRow(
                instance=row[0],
                seen=row[1],
                age_s=max(row[2], 0.0),
                records=int(row[3]),
                last_seq=int(row[4]),
                oldest_pending_s=None if row[5] is None else max(row[5], 0.0),
                balance=None if row[6] is None else orjson.loads(row[6]),
                earlier=int(row[7]),
            )
            for row in self._ask(read)
        ]

    def counted(self) -> dict[str, tuple[int, int]]:
        """Of each instance its records as they are there now, one by one, and how many of them are in the sums. Reads
        all of them: for who doubts the numbers."""

        async def read(db: Connection) -> list[Any]:
            return await db.fetch(
                f"SELECT instance, count(*), count(*) FILTER (WHERE counted) FROM {_TABLES}records GROUP BY 1"
            )

        return {row[0]: (int(row[1]), int(row[2])) for row in self._ask(read)}

    def record(self, record_id: str) -> tuple[str, bytes] | None:
        """The instance and the line of the record with this id."""
        key = uuid_of(record_id)

        async def read(db: Connection) -> Any:
            return await db.fetchrow(
                f"SELECT instance, line FROM {_TABLES}records WHERE day = $1 AND id = $2",
                date_of(day_of(key.bytes)),
                key,
            )

        row = self._ask(read)
        return None if row is None else (str(row[0]), bytes(row[1]))

    def records(
        self, since: datetime | None = None, until: datetime | None = None, *, backwards: bool = True
    ) -> Iterator[tuple[str, bytes]]:
        """Instance and line of all records by the time of their ids, the newest first, or last; page by page. `since`
        and `until` (not included) are of that time, which is when a call came in."""
        place: tuple[date, str] | None = None
        first = "" if since is None else _first_id(since)
        last = _LATEST if until is None else _first_id(until)
        begins = date_of(NO_TIME) if since is None else since.astimezone(UTC).date()
        ends = date.max if until is None else until.astimezone(UTC).date()
        sign, order = ("<", "DESC") if backwards else (">", "ASC")
        while True:
            asked = (
                f"SELECT instance, line, day, id::text FROM {_TABLES}records WHERE day BETWEEN $1 AND $2 "
                f"AND id >= $3 AND id < $4{f' AND (day, id) {sign} ($5, $6)' if place else ''} "
                f"ORDER BY day {order}, id {order} LIMIT {PAGE}"
            )
            values = [begins, ends, first or "00000000-0000-0000-0000-000000000000", last, *(place or ())]

            async def read(db: Connection, asked: str = asked, values: list[Any] = values) -> list[Any]:
                return await db.fetch(asked, *values)

            rows = self._ask(read)
            for row in rows:
                yield str(row[0]), bytes(row[1])
            if len(rows) < PAGE:
                return
            place = (rows[-1][2], rows[-1][3])

    def lines_of(self, instance: str, since: datetime, held: Mapping[str, int]) -> Iterator[bytes]:
        """Of the records that one instance wrote, since then by their ids: all but those that a spool has. `held`: by
        the spool's name, the number from which on it has them. Page by page."""
        place: tuple[date, str] | None = None
        begins, first = since.astimezone(UTC).date(), _first_id(since)
        while True:
            asked = (
                f"SELECT line, day, id::text FROM {_TABLES}records AS r WHERE day >= $1 AND id >= $2 AND instance = $3 "
                "AND NOT EXISTS (SELECT FROM unnest($4::text[], $5::bigint[]) AS h (spool, seq) "
                f"WHERE h.spool = r.spool AND r.seq >= h.seq){' AND (day, id) > ($6, $7)' if place else ''} "
                f"ORDER BY day, id LIMIT {PAGE}"
            )
            values = [begins, first, instance, list(held), list(held.values()), *(place or ())]

            async def read(db: Connection, asked: str = asked, values: list[Any] = values) -> list[Any]:
                return await db.fetch(asked, *values)

            rows = self._ask(read)
            yield from (bytes(row[0]) for row in rows)
            if len(rows) < PAGE:
                return
            place = (rows[-1][1], rows[-1][2])

    def _ask(self, read: Callable[[Connection], Any], limit_s: float | None = None) -> Any:
        """One transaction. `limit_s`: after that the server ends it, and `TooLongError` is raised."""

        async def ask() -> Any:
            db_ = self._db
            if not self._checked:
                await db_.require(PART, STEPS)
                self._checked = True
            async with db_.transaction(read_only=True) as db:
                if limit_s is not None:
                    # Of this transaction alone: whoever has the connection next is not concerned.
                    await db.execute(f"SET LOCAL statement_timeout = {max(int(limit_s * 1000), 1)}")
                return await read(db)

        try:
            return call(ask())
        except PostgresError as error:
            self._checked = False
            if limit_s is not None and getattr(error.__cause__, "sqlstate", None) == "57014":
                raise TooLongError from None
            raise


def numbered(sql: str) -> str:
    """With `$1`, `$2`, … in the place of `?`, of which there is none in a text."""
    parts = sql.split("?")
    places = itertools.chain((f"${number}" for number in range(1, len(parts))), [""])
    return "".join(part + place for part, place in zip(parts, places, strict=True))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, Decimal) else value


def _cost(value: Decimal | None) -> int | str | None:
    return None if value is None else stored_cost(value)


def _first_id(moment: datetime) -> str:
    """What no id of an earlier time is greater than."""
    text = f"{max(int(moment.timestamp() * 1000), 0):012x}"[-12:]
    return f"{text[:8]}-{text[8:]}-0000-0000-000000000000"
