"""The tables of `ledger.db`, and how its numbers are kept exact.

Sums are kept in columns without a type of their own (`ANY` in a strict table): a whole number that fits 64
bits as an integer, a larger one and every decimal as text. SQLite itself never adds them up, because its
`sum` turns text into floats and overflows integers; Python does, on both ways. Only the delivering process writes.
A cost is a whole number of `PICO` parts of a dollar where it is one and fits, which all but odd ones do. So reading may
let SQLite add up whole numbers after all, which is ten times as fast: it says itself when it could not (a float, or an
error), and what it says then is thrown away.

What is summed by hours is summed by days (of UTC) beside it, in the same transaction: a month is read in a
twenty-fourth of the rows. Both are summed once more over all subscribers, who are nearly all of what series are many
for: who asks about models, routes or days reads a few rows an hour, in any time zone. `all_since` says from which hour
on these are whole; a ledger of before they were kept, or one that somebody put rows into, is caught up with, the newest
day first, and is read the long way until then.
"""

from __future__ import annotations

import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, cast

from sidecar.meters.hourly import COUNTS, EXACT, JSON_INT_MAX, TOKENS, write_amount
from sidecar.storage.files import StorageError
from sidecar.storage.sqlite import Schema, problem_of

SUMS: Final = (*COUNTS, *TOKENS)
PICO: Final = 12  # places of a cost that is kept as a whole number
DAY_S: Final = 86_400
# Of one dimension: what a client sends in a header must not grow the ledger without end.
DIMENSION_VALUES_MAX: Final = 1000
OTHER_VALUE: Final = "(other)"  # what further values are filed under

_SUM_COLUMNS: Final = f"""{", ".join(f"{name} ANY" for name in SUMS)},
  cost_usd ANY, -- an integer: in picodollars; a text: an exact decimal, in dollars"""
# Over all subscribers: rows of series without one.
_ALL_TABLES: Final = f"""CREATE TABLE hourly_all (
  hour INTEGER NOT NULL,
  series INTEGER NOT NULL REFERENCES series (id),
  {_SUM_COLUMNS}
  PRIMARY KEY (hour, series)
) STRICT, WITHOUT ROWID;
CREATE TABLE daily_all (
  day INTEGER NOT NULL,
  series INTEGER NOT NULL REFERENCES series (id),
  {_SUM_COLUMNS}
  PRIMARY KEY (day, series)
) STRICT, WITHOUT ROWID;
CREATE TABLE all_since (hour INTEGER NOT NULL) STRICT; -- one row at most: from this hour on both are whole
"""
_TABLES: Final = f"""
CREATE TABLE applied (
  key TEXT PRIMARY KEY, -- of a sealed delivery: made from record ids, so it is unique over all spools
  at INTEGER NOT NULL -- Unix seconds
) STRICT, WITHOUT ROWID;
CREATE INDEX applied_at ON applied (at);
-- Of each spool the last batch that is in the sums, written in the transaction that adds it.
CREATE TABLE applied_upto (
  instance TEXT PRIMARY KEY,
  first_seq INTEGER NOT NULL,
  last_seq INTEGER NOT NULL,
  left_out TEXT NOT NULL -- numbers between them that were kept out of the sums, as a JSON array
) STRICT, WITHOUT ROWID;
CREATE TABLE series (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL UNIQUE, -- all of it as a JSON array: unlike NULLs in an index, two nulls are the same
  subscriber TEXT,
  model TEXT,
  provider TEXT,
  route TEXT,
  status_class TEXT NOT NULL
) STRICT;
CREATE TABLE series_dimensions (
  series INTEGER NOT NULL REFERENCES series (id),
  name TEXT NOT NULL,
  value TEXT NOT NULL, -- of each name at most `DIMENSION_VALUES_MAX`; others are `OTHER_VALUE`
  PRIMARY KEY (series, name)
) STRICT, WITHOUT ROWID;
CREATE TABLE hourly (
  hour INTEGER NOT NULL, -- Unix seconds of its start, UTC
  series INTEGER NOT NULL REFERENCES series (id),
  {_SUM_COLUMNS}
  PRIMARY KEY (hour, series)
) STRICT, WITHOUT ROWID;
CREATE TABLE daily (
  day INTEGER NOT NULL, -- Unix seconds of its start, UTC
  series INTEGER NOT NULL REFERENCES series (id),
  {_SUM_COLUMNS}
  PRIMARY KEY (day, series)
) STRICT, WITHOUT ROWID;
{_ALL_TABLES}CREATE TABLE hourly_units (
  hour INTEGER NOT NULL,
  series INTEGER NOT NULL REFERENCES series (id),
  unit TEXT NOT NULL,
  amount TEXT NOT NULL,
  PRIMARY KEY (hour, series, unit)
) STRICT, WITHOUT ROWID;
CREATE TABLE buckets (
  id INTEGER PRIMARY KEY,
  key TEXT NOT NULL UNIQUE, -- the five as a JSON array
  meter TEXT NOT NULL,
  version TEXT NOT NULL, -- of the definition: a changed meter starts anew
  subscriber TEXT,
  grp TEXT,
  start INTEGER NOT NULL, -- Unix seconds, UTC
  kind TEXT NOT NULL,
  value TEXT, -- COUNT, SUM, MAX, LATEST: an exact decimal; UNIQUE_COUNT: how many
  at_us INTEGER NOT NULL, -- LATEST: of which record
  record_id TEXT NOT NULL
) STRICT;
CREATE INDEX buckets_of_meter ON buckets (meter, version, start);
CREATE TABLE uniques (
  bucket INTEGER NOT NULL REFERENCES buckets (id),
  hash TEXT NOT NULL,
  PRIMARY KEY (bucket, hash)
) STRICT, WITHOUT ROWID;
"""


class LedgerError(StorageError):
    """The ledger cannot be used; the text says what to do."""


# Only of one that is damaged it is said that it may be moved away: the sums of all others are whole.
SCHEMA: Final = Schema(
    name="ledger",
    version=5,
    tables=_TABLES,
    when_empty="the ledger is made with the first delivery to it",
    when_damaged="put its copy back, or move it away to begin a new one",
    when_full="free some, delivery goes on by itself",
    error=LedgerError,
    upgrades={4: _ALL_TABLES},
)


def ledger_problem(path: Path) -> StorageError | None:
    """Why a ledger that is there cannot be used, or None. Only looks, also beside the one who writes it."""
    return problem_of(path, schema=SCHEMA)


def stored(value: int) -> int | str:
    """A whole number as a column keeps it."""
    return value if -JSON_INT_MAX <= value <= JSON_INT_MAX else str(value)


def stored_cost(amount: Decimal) -> int | str:
    """An amount of dollars as a column keeps it: one amount is always written in one way. A text has a point, also
    where it is whole: SQLite takes one without for an integer, and adds it up as if it were picodollars."""
    scaled = amount.scaleb(PICO, EXACT)
    if abs(scaled) <= JSON_INT_MAX and scaled == scaled.to_integral_value():
        return int(scaled)
    text = write_amount(amount)
    return text if "." in text else f"{text}.0"


def read_cost(value: int | str | None) -> Decimal | None:
    """The other way round."""
    if value is None:
        return None
    return Decimal(value).scaleb(-PICO, EXACT) if isinstance(value, int) else Decimal(value)


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


class _KeptCostSum(_CostSum):
    """The same as a column keeps it."""

    def finalize(self) -> Any:
        return None if self.total is None else stored_cost(self.total)


def add_exact_sums(db: sqlite3.Connection) -> None:
    """What SQLite cannot add up exactly: `exact_sum` of whole numbers, `decimal_sum` and `cost_sum` of amounts;
    `kept_cost_sum` for what is stored again."""
    db.create_aggregate("exact_sum", 1, cast(Any, _Sum))
    db.create_aggregate("decimal_sum", 1, cast(Any, _DecimalSum))
    db.create_aggregate("cost_sum", 1, cast(Any, _CostSum))
    db.create_aggregate("kept_cost_sum", 1, cast(Any, _KeptCostSum))
