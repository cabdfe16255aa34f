"""The writing side of the ledger: one transaction for each batch of new records, and for each sealed delivery.

What must always hold: how far a batch goes, or the key of a delivery, is committed together with its effects, so that
it counts once however often it comes, and whenever the process dies. Faults of the file come back as
verdicts: nothing of a failed transaction counts, so it may always be tried again.

Sums over all subscribers (`schema`) are kept in the same transaction. Where a ledger has rows of before they were kept,
a thread makes them of these, a day at a time, the newest first; whoever writes goes in between.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from threading import Event, Lock, Thread
from time import time
from typing import Final

import orjson

from sidecar.ledger.schema import (
    DAY_S,
    DIMENSION_VALUES_MAX,
    OTHER_VALUE,
    SCHEMA,
    SUMS,
    LedgerError,
    add_exact_sums,
    read_cost,
    stored,
    stored_cost,
)
from sidecar.meters.buckets import UNIQUE_MAX, BatchSums, BucketDelta, BucketKey, add_batches
from sidecar.meters.buckets import from_wire as buckets_from_wire
from sidecar.meters.definition import Kind
from sidecar.meters.hourly import (
    COUNTS,
    EXACT,
    JSON_INT_MAX,
    TOKENS,
    Delta,
    Series,
    from_wire,
    series_wire,
    write_amount,
)
from sidecar.model.call_group import HOUR_S
from sidecar.model.delivery import Applied, Delivered, Duplicate, Refused, Verdict
from sidecar.storage.files import Trouble, trouble, verdict_for
from sidecar.storage.sqlite import open_db, transaction

log = logging.getLogger(__name__)

KEYS_KEPT_S: Final = 30 * 86_400  # the backend's window: delivery resends nothing that is older
PRUNE_EVERY_S: Final = 3600
DAMAGED: Final = "ledger_damaged"
SERIES_KEPT: Final = 10_000  # ids in memory, a cache only: 2 MB

CATCH_UP_PAUSE_S: Final = 0.1  # between two days, each of which takes about as long: others want the file too

_COLUMNS: Final = f"{', '.join(SUMS)}, cost_usd"
_Tables = tuple[tuple[int, str, str], ...]  # hours and days, each with what finds a row and what writes it


def _tables(kind: str) -> _Tables:
    return tuple(
        (
            seconds,
            f"SELECT {_COLUMNS} FROM {table} WHERE {unit} = ? AND series = ?",
            f"INSERT OR REPLACE INTO {table} ({unit}, series, {_COLUMNS}) VALUES ({', '.join('?' * (len(SUMS) + 3))})",
        )
        for table, unit, seconds in ((f"hourly{kind}", "hour", HOUR_S), (f"daily{kind}", "day", DAY_S))
    )


_EACH: Final = _tables("")
_ALL: Final = _tables("_all")
# Of hours that were summed before: each series has its own without a subscriber in `without`.
_WITHOUT: Final = "CREATE TEMP TABLE IF NOT EXISTS without (series INTEGER PRIMARY KEY, all_of_it INTEGER NOT NULL)"
_REALS: Final = f"SELECT 1 FROM {{}} WHERE 'real' IN ({', '.join(f'typeof({name})' for name in (*SUMS, 'cost_usd'))})"


def _summed(*, exact: bool) -> str:
    sums = ", ".join(f"{'exact_sum' if exact else 'sum'}({name})" for name in SUMS)
    return f"{sums}, {'kept_cost_sum' if exact else 'sum'}(cost_usd)"


class LedgerStore:
    """`ledger.db`, open for writing. Blocking; calls may come from any thread, one goes at a time."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time, resumed: bool = False) -> None:
        """Opens the file, or makes it. Raises `LedgerError`, but not where the file is damaged: calls do not wait for
        it, and their records are kept for it; every delivery is told what is wrong.

        `resumed`: whoever opens it goes on for one that died, while calls are served and their records wait in memory.
        These have to get to disk, so that nothing is raised then.
        """
        self._path = path
        self._clock = clock
        self._lock = Lock()
        self._series: dict[Series, int] = {}
        self._values: dict[str, set[str]] | None = None  # of each dimension; None: not read yet
        self._without: dict[Series, Series] = {}  # without its subscriber
        self._all_since: int | None = None  # None: not read yet
        self._pruned_s = 0.0
        self._db: sqlite3.Connection | None = None
        self._closing = Event()
        self._catching_up: Thread | None = None
        try:
            self._db = open_db(path, schema=SCHEMA)
        except LedgerError as error:
            # A full disk gets better: what is delivered meanwhile is told to come again.
            if not error.passes and not error.damaged and not resumed:
                raise
            log.error("the ledger takes nothing, calls are served and their records wait in the spool: %s", error)
        with suppress(sqlite3.Error):  # said by the first delivery
            if self._db is not None and _is_behind(self._db):
                self._catching_up = Thread(target=self._catch_up, name="ledger-all", daemon=True)
                self._catching_up.start()

    def __repr__(self) -> str:
        return f"<LedgerStore {self._path}>"

    def apply(self, key: str, body: bytes) -> Verdict:
        """Add the effects of one sealed delivery, unless its key is in already."""
        try:
            said = orjson.loads(body)
            effects = from_wire(said["hourly"])
            buckets = buckets_from_wire(said.get("buckets", ()))
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError):
            return Refused("not_a_ledger_delivery")
        with self._lock:
            try:
                return self._apply(self._open(), key, effects, buckets)
            except ArithmeticError:
                return Refused("sum_not_exact")
            except (OSError, sqlite3.Error, LedgerError) as error:
                self._drop()
                return _verdict_for(error, self._path)

    def applied(self, instance: str) -> Applied | Verdict | None:
        """The last batch of a spool that is in the sums; a verdict where that cannot be told just now."""
        with self._lock:
            try:
                row = (
                    self._open()
                    .execute("SELECT first_seq, last_seq, left_out FROM applied_upto WHERE instance = ?", (instance,))
                    .fetchone()
                )
            except (OSError, sqlite3.Error, LedgerError) as error:
                self._drop()
                return _verdict_for(error, self._path)
        return None if row is None else Applied(row[0], row[1], frozenset(orjson.loads(row[2])))

    def apply_sums(self, instance: str, batch: Applied, sums: Sequence[BatchSums]) -> Verdict:
        """Add what a batch amounts to, unless its numbers are in already."""
        with self._lock:
            try:
                return self._write(self._open(), _Upto(instance, batch), [add_batches(sums)])
            except ArithmeticError:
                return Refused("sum_not_exact")
            except (OSError, sqlite3.Error, LedgerError) as error:
                self._drop()
                return _verdict_for(error, self._path)

    def undo(self, key: str, body: bytes) -> tuple[Verdict, tuple[str, ...]]:
        """Add effects that take others back, unless that was done already; and the meters left as they are.

        A meter is left where this ledger never had its value, or has it under another definition as well: then the
        value may be in the other one.
        """
        said = orjson.loads(body)
        effects, buckets = from_wire(said["hourly"]), buckets_from_wire(said.get("buckets", ()))
        with self._lock:
            try:
                db = self._open()
                if not all(self._has_hour(db, delta) for delta in effects):
                    return Refused("not_in_ledger"), ()
                kept = [delta for delta in buckets if not _is_plain(db, delta)]
                going = [delta for delta in buckets if delta not in kept]
                return self._apply(db, key, effects, going), tuple(dict.fromkeys(delta.key.meter for delta in kept))
            except ArithmeticError:
                return Refused("sum_not_exact"), ()
            except (OSError, sqlite3.Error, LedgerError) as error:
                self._drop()
                return _verdict_for(error, self._path), ()

    def close(self) -> None:
        self._closing.set()
        if self._catching_up is not None:
            self._catching_up.join()
        with self._lock:
            self._drop()

    def _apply(self, db: sqlite3.Connection, key: str, effects: list[Delta], buckets: list[BucketDelta]) -> Verdict:
        return self._write(db, _Key(key, int(self._clock())), [BatchSums(effects, buckets)])

    def _write(self, db: sqlite3.Connection, mark: _Key | _Upto, sums: Sequence[BatchSums]) -> Verdict:
        """One transaction: the mark that says that these are in, and what they add."""
        now_s = self._clock()
        try:
            with transaction(db):
                if not mark.set(db):
                    return Duplicate()
                if self._all_since is None:
                    self._all_since = _since(db)
                for one in sums:
                    for delta in one.hourly:
                        self._add(db, delta, _EACH)
                        for unit, amount in delta.units.items():
                            self._add_unit(db, delta.hour, self._series_id(db, delta.series), unit, amount)
                    for delta in self._over_all(one.hourly, self._all_since):
                        self._add(db, delta, _ALL)
                    for bucket in one.buckets:
                        _put(db, bucket)
                if now_s - self._pruned_s >= PRUNE_EVERY_S:
                    db.execute("DELETE FROM applied WHERE at < ?", (int(now_s) - KEYS_KEPT_S,))
                    self._pruned_s = now_s
        except BaseException:
            self._forget()  # rows that were made in this transaction are gone again
            raise
        return Delivered()

    def _add(self, db: sqlite3.Connection, delta: Delta, tables: _Tables) -> None:
        series = self._series_id(db, delta.series)
        counts, tokens = delta.counts, delta.tokens
        more: list[int | None] = [counts[name] for name in COUNTS]
        more += [tokens.get(name) for name in TOKENS]
        cost = None if delta.cost_usd is None else stored_cost(delta.cost_usd)
        for seconds, find, write in tables:
            at = delta.hour // seconds * seconds
            old = db.execute(find, (at, series)).fetchone()
            if old is None:
                new = [value if value is None else stored(value) for value in more]
                db.execute(write, (at, series, *new, cost))
                continue
            new = [
                kept if value is None else stored(int(kept or 0) + value)
                for kept, value in zip(old, more, strict=False)  # the cost is behind them
            ]
            db.execute(write, (at, series, *new, _cost_with(old[-1], cost)))

    def _over_all(self, deltas: Sequence[Delta], since: int) -> Iterable[Delta]:
        """The same over all subscribers, from where on that is kept."""
        found: dict[tuple[int, Series], Delta] = {}
        for delta in deltas:
            if delta.hour < since:
                continue
            one = self._without.get(delta.series)
            if one is None:
                if len(self._without) >= SERIES_KEPT:
                    self._without.clear()
                one = self._without[delta.series] = replace(delta.series, subscriber=None)
            key = delta.hour, one
            if key not in found:
                found[key] = Delta(delta.hour, one)
            found[key].join(delta)
        return found.values()

    def _catch_up(self) -> None:
        """Sum up over all subscribers what was there before that was kept. Where that fails it is read the long way,
        until the next start."""
        more = True
        while more and not self._closing.wait(CATCH_UP_PAUSE_S):
            with self._lock:
                try:
                    db = self._open()
                    try:
                        more = self._catch_up_day(db, exact=False)
                    except _NotExact:
                        more = self._catch_up_day(db, exact=True)
                except (OSError, sqlite3.Error, LedgerError, ArithmeticError) as error:
                    self._drop()
                    log.warning("the ledger's sums over all subscribers were not made: %s", error)
                    return

    def _catch_up_day(self, db: sqlite3.Connection, *, exact: bool) -> bool:
        """The day before those that are done; whether there is another one."""
        add_exact_sums(db)
        db.execute(_WITHOUT)
        self._all_since = None
        try:
            with transaction(db):
                since = _since(db)
                last = db.execute("SELECT max(hour) FROM hourly WHERE hour < ?", (since,)).fetchone()[0]
                if last is None:
                    db.execute("UPDATE all_since SET hour = 0")
                    return False
                begin = last // DAY_S * DAY_S
                for series, one in _not_in_without(db, begin, since):
                    found = self._series_id(db, replace(one, subscriber=None))
                    db.execute("INSERT INTO without VALUES (?, ?)", (series, found))
                hours, day = (begin, since), (begin, begin + DAY_S)
                db.execute(
                    f"INSERT INTO hourly_all (hour, series, {_COLUMNS}) SELECT hour, all_of_it, {_summed(exact=exact)} "
                    "FROM hourly JOIN without USING (series) WHERE hour >= ? AND hour < ? GROUP BY 1, 2",
                    hours,
                )
                db.execute(
                    f"INSERT OR REPLACE INTO daily_all (day, series, {_COLUMNS}) SELECT hour / {DAY_S} * {DAY_S}, "
                    f"series, {_summed(exact=exact)} FROM hourly_all WHERE hour >= ? AND hour < ? GROUP BY 1, 2",
                    day,
                )
                for made, values in (("hourly_all", hours), ("daily_all", day)):
                    unit = "hour" if made == "hourly_all" else "day"
                    if db.execute(f"{_REALS.format(made)} AND {unit} >= ? AND {unit} < ?", values).fetchone():
                        raise _NotExact
                db.execute("UPDATE all_since SET hour = ?", (begin,))
        except BaseException as error:
            self._forget()  # series that were made in this transaction are gone again
            db.execute("DELETE FROM without")
            if not exact and "integer overflow" in str(error):
                raise _NotExact from None
            raise
        return True

    def _add_unit(self, db: sqlite3.Connection, hour: int, series: int, unit: str, amount: Decimal) -> None:
        where = (hour, series, unit)
        row = db.execute("SELECT amount FROM hourly_units WHERE hour = ? AND series = ? AND unit = ?", where).fetchone()
        total = EXACT.add(Decimal(row[0] if row else 0), amount)
        db.execute("INSERT OR REPLACE INTO hourly_units VALUES (?, ?, ?, ?)", (*where, write_amount(total)))

    def _has_hour(self, db: sqlite3.Connection, delta: Delta) -> bool:
        where = "SELECT 1 FROM hourly JOIN series ON series.id = hourly.series WHERE hour = ? AND key = ?"
        return db.execute(where, (delta.hour, _series_key(self._bounded(db, delta.series)))).fetchone() is not None

    def _series_id(self, db: sqlite3.Connection, series: Series) -> int:
        found = self._series.get(series)
        if found is None:
            one = self._bounded(db, series)
            key = _series_key(one)
            fresh = db.execute(
                "INSERT OR IGNORE INTO series (key, subscriber, model, provider, route, status_class) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                (key, one.subscriber, one.model, one.provider, one.route, one.status_class),
            ).rowcount
            found = int(db.execute("SELECT id FROM series WHERE key = ?", (key,)).fetchone()[0])
            if fresh == 1:
                for name, value in one.dimensions:
                    db.execute("INSERT INTO series_dimensions VALUES (?, ?, ?)", (found, name, value))
                    if self._values is not None:
                        self._values.setdefault(name, set()).add(value)
            if len(self._series) >= SERIES_KEPT:
                self._series.clear()
            self._series[series] = found
        return found

    def _bounded(self, db: sqlite3.Connection, one: Series) -> Series:
        """With each dimension's value as it is filed: beyond so many of a name they are one."""
        if not one.dimensions:
            return one
        if self._values is None:
            self._values = {}
            for name, value in db.execute("SELECT DISTINCT name, value FROM series_dimensions"):
                self._values.setdefault(name, set()).add(value)
        filed = []
        for name, value in one.dimensions:
            known = self._values.get(name) or set()
            full = value not in known and len(known) - (OTHER_VALUE in known) >= DIMENSION_VALUES_MAX
            filed.append((name, OTHER_VALUE if full else value))
        return replace(one, dimensions=tuple(filed))

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = open_db(self._path, schema=SCHEMA)
        return self._db

    def _forget(self) -> None:
        self._series.clear()
        self._values = None
        self._all_since = None

    def _drop(self) -> None:
        db, self._db = self._db, None
        self._forget()
        if db is not None:
            db.close()


class _NotExact(Exception):
    """SQLite could not add it up."""


def _cost_with(kept: int | str | None, more: int | str | None) -> int | str | None:
    """Two costs together, as columns keep them."""
    if kept is None or more is None:
        return kept if more is None else more
    if type(kept) is int and type(more) is int and abs(total := kept + more) <= JSON_INT_MAX:
        return total
    return stored_cost(EXACT.add(read_cost(kept) or Decimal(0), read_cost(more) or Decimal(0)))


def _since(db: sqlite3.Connection) -> int:
    """From which hour on sums over all subscribers are kept: behind all that was there without them."""
    row = db.execute("SELECT hour FROM all_since").fetchone()
    if row is not None:
        return int(row[0])
    last = db.execute("SELECT max(hour) FROM hourly").fetchone()[0]
    since = 0 if last is None else int(last) + HOUR_S
    db.execute("INSERT INTO all_since VALUES (?)", (since,))
    return since


def _is_behind(db: sqlite3.Connection) -> bool:
    row = db.execute("SELECT hour FROM all_since").fetchone()
    if row is not None:
        return int(row[0]) > 0
    return db.execute("SELECT 1 FROM hourly LIMIT 1").fetchone() is not None


def _not_in_without(db: sqlite3.Connection, begin: int, end: int) -> list[tuple[int, Series]]:
    """The series of these hours that are not in there yet."""
    rows = db.execute(
        "SELECT id, subscriber, model, provider, route, status_class FROM series WHERE id IN "
        "(SELECT series FROM hourly WHERE hour >= ? AND hour < ?) AND id NOT IN (SELECT series FROM without)",
        (begin, end),
    ).fetchall()
    named = "SELECT name, value FROM series_dimensions WHERE series = ? ORDER BY name"
    return [
        (number, Series(subscriber, model, provider, route, status, tuple(db.execute(named, (number,)))))
        for number, subscriber, model, provider, route, status in rows
    ]


@dataclass(frozen=True, slots=True)
class _Key:
    """A sealed delivery, known by its key."""

    key: str
    at: int  # Unix seconds

    def set(self, db: sqlite3.Connection) -> bool:
        """False: it is in already."""
        return db.execute("INSERT OR IGNORE INTO applied VALUES (?, ?)", (self.key, self.at)).rowcount == 1


@dataclass(frozen=True, slots=True)
class _Upto:
    """A batch of new records, known by the numbers that it goes to. Numbers only grow."""

    instance: str
    batch: Applied

    def set(self, db: sqlite3.Connection) -> bool:
        row = db.execute("SELECT last_seq FROM applied_upto WHERE instance = ?", (self.instance,)).fetchone()
        if row is not None and row[0] >= self.batch.first_seq:
            if row[0] >= self.batch.last_seq:
                return False
            raise sqlite3.IntegrityError(f"records up to {row[0]} of {self.instance} are in the sums already")
        left_out = orjson.dumps(sorted(self.batch.left_out)).decode()
        db.execute(
            "INSERT OR REPLACE INTO applied_upto VALUES (?, ?, ?, ?)",
            (self.instance, self.batch.first_seq, self.batch.last_seq, left_out),
        )
        return True


def _series_key(one: Series) -> str:
    return orjson.dumps(series_wire(one)).decode()


def _bucket_values(one: BucketKey) -> tuple[str | int | None, ...]:
    return one.meter, one.version, one.subscriber, one.group, one.start


def _bucket_key(one: BucketKey) -> str:
    return orjson.dumps(_bucket_values(one)).decode()


def _is_plain(db: sqlite3.Connection, delta: BucketDelta) -> bool:
    """The bucket is there, and its meter was never defined otherwise."""
    there = db.execute("SELECT 1 FROM buckets WHERE key = ?", (_bucket_key(delta.key),)).fetchone()
    versions = db.execute("SELECT count(DISTINCT version) FROM buckets WHERE meter = ?", (delta.key.meter,)).fetchone()
    return there is not None and versions[0] == 1


def _put(db: sqlite3.Connection, delta: BucketDelta) -> None:
    """Add to one running value; the same end in any order."""
    values, key = _bucket_values(delta.key), _bucket_key(delta.key)
    row = db.execute("SELECT id, value, at_us, record_id FROM buckets WHERE key = ?", (key,)).fetchone()
    if row is None:
        cursor = db.execute(
            "INSERT INTO buckets (key, meter, version, subscriber, grp, start, kind, value, at_us, record_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, NULL, 0, '')",
            (key, *values, str(delta.kind)),
        )
        row = (cursor.lastrowid, None, 0, "")
    number, value, at_us, record_id = row
    if delta.kind is Kind.UNIQUE_COUNT:
        value = str(_unite(db, number, int(value or 0), delta.hashes))
    elif delta.kind is Kind.LATEST:
        if value is None or (delta.at_us, delta.record_id) > (at_us, record_id):
            value, at_us, record_id = _text(delta.value), delta.at_us, delta.record_id
    elif delta.value is not None:
        old = Decimal(value) if value is not None else None
        if old is None:
            value = _text(delta.value)
        else:
            value = _text(max(old, delta.value) if delta.kind is Kind.MAX else EXACT.add(old, delta.value))
    db.execute("UPDATE buckets SET value = ?, at_us = ?, record_id = ? WHERE id = ?", (value, at_us, record_id, number))


def _unite(db: sqlite3.Connection, bucket: int, have: int, hashes: set[str]) -> int:
    for one in sorted(hashes):
        if have >= UNIQUE_MAX:
            break
        have += db.execute("INSERT OR IGNORE INTO uniques VALUES (?, ?)", (bucket, one)).rowcount
    return have


def _text(value: Decimal | None) -> str | None:
    return None if value is None else write_amount(value)


def _verdict_for(error: OSError | sqlite3.Error | LedgerError, path: Path) -> Verdict:
    found = error.trouble if isinstance(error, LedgerError) else trouble(error, path)
    versions = {Trouble.NEWER: "newer_version", Trouble.OLDER: "older_version"}
    unfit = versions.get(found, DAMAGED) if found else DAMAGED
    return verdict_for(found, damaged=DAMAGED, unfit=unfit)
