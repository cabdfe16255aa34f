"""The writing side of the shared ledger: each batch is one transaction, with its records, their lanes and their sums.

What must always hold: a record is in the sums when its row says so (`counted`), and a row is there once for an id,
whoever sends it however often. So nothing has to be remembered of what was sent: a batch that comes again, cut
otherwise, or from a copy of a data directory finds its records there and adds nothing.

All who write take the locks of a transaction in one order, so that none waits in a circle: their own row of
`instances`, lanes, records, names of dimensions, series, hours, days, units, buckets, unique values; within a table by
its key. With its lanes locked a writer sees all that was committed in them: numbers of a lane have no holes.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, timedelta
from decimal import Decimal
from threading import Lock
from time import monotonic, time
from typing import Any, Final

import orjson

from sidecar.ledger.identity import Identity
from sidecar.ledger.postgres_schema import (
    PART,
    STEPS,
    Blocking,
    Line,
    Reported,
    day_at,
    day_of,
    partition_of,
    storable,
    uuid_of,
)
from sidecar.ledger.schema import DAY_S, DIMENSION_VALUES_MAX, OTHER_VALUE, SUMS
from sidecar.meters.buckets import UNIQUE_MAX, BatchSums, BucketDelta, add_batches
from sidecar.meters.definition import Kind
from sidecar.meters.hourly import COUNTS, TOKENS, Delta, Series, series_wire
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Refused, Retry, Verdict
from sidecar.storage.postgres import SCHEMA, Connection, Fault, Postgres, PostgresError

log = logging.getLogger(__name__)

AHEAD_DAYS: Final = 2  # partitions that are there before their day begins
AHEAD_EVERY_S: Final = 3600.0
SERIES_KEPT: Final = 10_000  # ids in memory: 2 MB
COPIED: Final = "copied_directory"  # somebody else writes under our name
_PARTITION_LOCK: Final = 0x7061_7274_6974_696F  # any numbers, as long as they differ from each other's
_DIMENSION_LOCK: Final = 0x6469_6D65_6E73_696F

# What a fault is called in a verdict; its text is logged. Those that pass are tried again, others wait for somebody.
_REASONS: Final[Mapping[Fault, str]] = {
    Fault.UNREACHABLE: "unreachable",
    Fault.TLS: "no_tls",
    Fault.REFUSED: "wrong_password",
    Fault.MISSING: "no_database",
    Fault.DENIED: "not_permitted",
    Fault.READ_ONLY: "read_only",
    Fault.BUSY: "busy",
    Fault.FULL: "disk_full",
    Fault.LOST: "connection_lost",
    Fault.NEWER: "newer_version",
    Fault.FOREIGN: "other_program",
    Fault.DRIVER: "no_driver",
    Fault.FAILED: "failed",
}
_THERE: Final = "23505"  # SQLSTATE unique_violation
_BAD_DATA: Final = "22"  # the class of SQLSTATE for values that cannot be stored: trying again changes nothing

_IDENTIFY: Final = f"""
UPDATE {SCHEMA}.instances SET seen = now(), last_seq = greatest(last_seq, $3)
WHERE instance = $1 AND nonce = $2 RETURNING instance"""
_LOCK_LANES: Final = f"""
SELECT lane, last_seq FROM {SCHEMA}.lanes WHERE lane = ANY($1::smallint[]) ORDER BY lane FOR UPDATE"""
_KEPT: Final = ("instance", "lane_seq", *Line._fields)
_STAGING: Final = "staged"
# What a batch is copied into where some of it is there; gone with the transaction, so no session is needed for it.
_STAGE: Final = f"""
CREATE TEMPORARY TABLE {_STAGING} (
  day date, id uuid, spool text, seq bigint, lane smallint, subscriber text, counted boolean, line bytea
) ON COMMIT DROP"""
# Numbers those that are not there, in the order of their spool, puts them in, and says which they are.
_INSERT_SOME: Final = f"""
WITH new AS (
  SELECT day, id, row_number() OVER (PARTITION BY lane ORDER BY spool, seq) AS number FROM {_STAGING} AS staged
  WHERE NOT EXISTS (SELECT FROM {SCHEMA}.records AS there WHERE there.day = staged.day AND there.id = staged.id)
)
INSERT INTO {SCHEMA}.records (instance, lane_seq, day, id, spool, seq, lane, subscriber, counted, line)
SELECT $1, lanes.last_seq + new.number, day, id, spool, seq, lane, subscriber, counted, line
FROM new JOIN {_STAGING} AS staged USING (day, id) JOIN {SCHEMA}.lanes AS lanes USING (lane)
ON CONFLICT (day, id) DO NOTHING RETURNING id::text, lane, lane_seq"""
_MOVE_LANES: Final = f"""
UPDATE {SCHEMA}.lanes AS lanes SET last_seq = lanes.last_seq + t.records
FROM unnest($1::smallint[], $2::bigint[]) AS t (lane, records) WHERE lanes.lane = t.lane
RETURNING lanes.lane, lanes.last_seq"""
_COUNT_AFTER_ALL: Final = f"""
UPDATE {SCHEMA}.records AS records SET counted = true
FROM (SELECT day, id FROM unnest($1::date[], $2::uuid[]) AS t (day, id) ORDER BY 1, 2) AS t
WHERE records.day = t.day AND records.id = t.id AND NOT records.counted AND records.cancelled_at IS NULL
RETURNING records.id::text"""
_NOTE_WRITE: Final = f"UPDATE {SCHEMA}.instances SET records = records + $2, writes = writes + 1 WHERE instance = $1"


def _more(name: str) -> str:
    """A sum that is null until something was reported."""
    return (
        f"{name} = CASE WHEN excluded.{name} IS NULL THEN old.{name} ELSE coalesce(old.{name}, 0) + excluded.{name} END"
    )


_VALUES: Final = (*SUMS, "cost_usd")


def _add_sums(table: str, unit: str, seconds: int) -> str:
    arrays = ", ".join(f"${place}::numeric[]" for place in range(3, 3 + len(_VALUES)))
    names = ", ".join(_VALUES)
    return (
        f"INSERT INTO {SCHEMA}.{table} AS old ({unit}, series, {names}) "
        f"SELECT at / {seconds} * {seconds}, series, {', '.join(f'sum({name})' for name in _VALUES)} "
        f"FROM unnest($1::bigint[], $2::bigint[], {arrays}) AS t (at, series, {names}) GROUP BY 1, 2 ORDER BY 1, 2 "
        f"ON CONFLICT ({unit}, series) DO UPDATE SET {', '.join(map(_more, _VALUES))}"
    )


_ADD_HOURS: Final = _add_sums("hourly", "hour", 3600)
_ADD_DAYS: Final = _add_sums("daily", "day", DAY_S)
_ADD_UNITS: Final = f"""
INSERT INTO {SCHEMA}.hourly_units AS old (hour, series, unit, amount)
SELECT hour, series, unit, sum(amount)
FROM unnest($1::bigint[], $2::bigint[], $3::text[], $4::numeric[]) AS t (hour, series, unit, amount)
GROUP BY hour, series, unit ORDER BY hour, series, unit
ON CONFLICT (hour, series, unit) DO UPDATE SET amount = old.amount + excluded.amount"""
_LATER: Final = (
    "excluded.kind = 'LATEST' AND excluded.value IS NOT NULL AND (old.value IS NULL"
    " OR (excluded.at_us, excluded.record_id) > (old.at_us, old.record_id))"
)
_ADD_BUCKETS: Final = f"""
INSERT INTO {SCHEMA}.buckets AS old (key, meter, version, subscriber, grp, start, kind, value, at_us, record_id)
SELECT * FROM unnest($1::bytea[], $2::text[], $3::text[], $4::text[], $5::text[], $6::bigint[], $7::text[],
  $8::numeric[], $9::bigint[], $10::text[]) AS t (key, meter, version, subscriber, grp, start, kind, value, at, record)
ORDER BY key
ON CONFLICT (key) DO UPDATE SET
  value = CASE
    WHEN excluded.kind = 'LATEST' THEN CASE WHEN {_LATER} THEN excluded.value ELSE old.value END
    WHEN excluded.kind = 'MAX' THEN greatest(old.value, excluded.value)
    WHEN excluded.value IS NULL THEN old.value
    ELSE coalesce(old.value, 0) + excluded.value END,
  at_us = CASE WHEN {_LATER} THEN excluded.at_us ELSE old.at_us END,
  record_id = CASE WHEN {_LATER} THEN excluded.record_id ELSE old.record_id END
RETURNING key, id, value"""
_ADD_UNIQUES: Final = f"""
WITH put AS (
  INSERT INTO {SCHEMA}.uniques (bucket, hash)
  SELECT bucket, hash FROM unnest($1::bigint[], $2::text[]) AS t (bucket, hash) ORDER BY bucket, hash COLLATE "C"
  ON CONFLICT DO NOTHING RETURNING bucket
)
UPDATE {SCHEMA}.buckets AS buckets SET value = least(coalesce(buckets.value, 0) + new.count, {UNIQUE_MAX})
FROM (SELECT bucket, count(*) AS count FROM put GROUP BY bucket) AS new WHERE buckets.id = new.bucket"""

Again = Callable[[Sequence[bytes]], BatchSums]


class CopiedError(PostgresError):
    """The ledger knows another directory by our name."""


class PostgresStore:
    """The shared ledger, open for writing by one sidecar. Blocking; calls may come from any thread, one goes at a time.

    Nothing is asked of the database before the first call, so a sidecar starts without it.
    """

    def __init__(
        self, url: str, identity: Identity, before_any: Callable[[Postgres], Awaitable[None]] | None = None
    ) -> None:
        """`before_any`: what the database needs beside our tables before the first record may be written."""
        self._before_any = before_any
        self._blocking = Blocking(url, name=f"metering-sidecar {identity.name}".strip())
        self._identity = identity
        self._lock = Lock()
        self._claimed = self._copied_now = False
        self._days: set[date] = set()  # whose partitions are there
        self._ahead_s: float | None = None  # monotonic: when that was last seen to
        self._series: dict[tuple[str, Series], int] = {}
        self._said: str | None = None  # the last fault that was logged

    def __repr__(self) -> str:
        return f"<PostgresStore {self._blocking.db.where}>"

    # What it is asked, each a verdict

    def write(self, lines: Sequence[Line], sums: Sequence[BatchSums] | None, again: Again) -> Verdict:
        """Put records in that are not there, and what they amount to. `sums`: of all that are counted, where that is
        known; `again` works it out for some of them. Delivered: some were new; Duplicate: none."""
        return self._verdict(lambda: self._write(lines, sums, again))

    def take_back(self, record_id: str, sums: BatchSums) -> tuple[Verdict, tuple[str, ...]]:
        """Take a record out of the sums, once; `sums`: what takes it back. And the meters that keep it, because they
        were defined otherwise at the time, or never had it."""
        kept: list[str] = []

        async def undo() -> Verdict:
            verdict, left = await self._take_back(record_id, sums)
            kept.extend(left)
            return verdict

        return self._verdict(undo), tuple(kept)

    def report(self, told: Reported) -> Verdict:
        """Say how we stand, also where nothing is written."""
        return self._verdict(lambda: self._report(told))

    def look(self) -> str | None:
        """What keeps it from being used, in a line; changes nothing."""

        async def ask() -> None:
            db_ = self._blocking.db
            async with db_.transaction(read_only=True) as db:
                standby, there = await db.fetchrow(
                    f"SELECT pg_is_in_recovery(), to_regclass('{SCHEMA}.instances') IS NOT NULL"
                )
            if standby:
                raise PostgresError(f"{db_.where} is a standby, which takes no records: name the primary", Fault.FAILED)
            if there:
                await db_.require(PART, STEPS)

        with self._lock:
            try:
                self._blocking.run(ask())
            except PostgresError as error:
                return str(error)
        return None

    @property
    def where(self) -> str:
        """Host, port and database."""
        return self._blocking.db.where

    @property
    def copied(self) -> bool:
        """Whether the last write was refused because another directory goes by our name."""
        return self._copied_now

    def adopt(self, *, copy: bool) -> None:
        """Somebody has decided what this directory is: the original, or a copy that is to be another one. Raises
        `OSError`."""
        with self._lock:
            (self._identity.become_new if copy else self._identity.take_over)()
            self._copied_now = False
            self._forget()

    def close(self) -> None:
        with self._lock:
            self._blocking.close()

    def _verdict(self, do: Callable[[], Any]) -> Verdict:
        with self._lock:
            try:
                verdict: Verdict = self._blocking.run(do())
            except ArithmeticError:
                return Refused("sum_not_exact")
            except PostgresError as error:
                self._forget()
                self._copied_now = isinstance(error, CopiedError)
                self._say(error)
                return verdict_of(error)
            except OSError as error:  # of the file that the nonce is in
                return Retry(f"instance_file_{type(error).__name__}")
        self._copied_now = False
        if self._said is not None:
            log.info("the shared ledger takes records again", extra={"facts": {"ledger": self._blocking.db.where}})
            self._said = None
        return verdict

    def _say(self, error: PostgresError) -> None:
        if str(error) != self._said:
            self._said = str(error)
            (log.warning if error.passes else log.error)(
                "the shared ledger takes nothing, records wait in the spool: %s", error
            )

    def _forget(self) -> None:
        """Nothing is believed of a database that failed: it may be another one by the next time."""
        self._claimed, self._ahead_s = False, None
        self._days.clear()
        self._series.clear()

    # Transactions

    async def _write(self, lines: Sequence[Line], sums: Sequence[BatchSums] | None, again: Again) -> Verdict:
        await self._ready(line.day for line in lines)
        name, db_ = self._identity.name, self._blocking.db
        known: dict[tuple[str, Series], int] = {}
        rows = {line.id: line for line in lines}  # an id that stands twice is one
        if len(rows) < len(lines):
            sums = None
        lines = list(rows.values())
        async with db_.transaction() as db:
            await self._identify(db, max((line.seq for line in lines), default=0))
            fresh, all_new = await self._insert(db, name, lines)
            wanted = [line for line in lines if line.counted]
            if not all_new:
                flipped = await self._count_after_all(db, [line for line in wanted if line.id not in fresh])
                wanted = [line for line in wanted if line.id in fresh or line.id in flipped]
                sums = None
            if sums is None and wanted:
                sums = [again([line.line for line in wanted])]
            if sums and wanted:
                await self._add(db, add_batches(list(sums)), name, known)
            new = len(lines) if all_new else len(fresh)
            if new or wanted:
                await db.execute(_NOTE_WRITE, name, new)
        self._keep(known)
        return Delivered() if new or wanted else Duplicate()

    async def _take_back(self, record_id: str, sums: BatchSums) -> tuple[Verdict, tuple[str, ...]]:
        await self._ready(())
        name = self._identity.name
        key = uuid_of(record_id)
        known: dict[tuple[str, Series], int] = {}
        async with self._blocking.db.transaction() as db:
            await self._identify(db, 0)
            row = await db.fetchrow(
                f"SELECT instance, counted, cancelled_at IS NOT NULL FROM {SCHEMA}.records "
                "WHERE day = $1 AND id = $2 FOR UPDATE",
                day_of(key), key,
            )  # fmt: skip
            if row is None or not row[1]:
                return (Duplicate() if row is not None and row[2] else Refused("not_in_ledger")), ()
            await db.execute(
                f"UPDATE {SCHEMA}.records SET counted = false, cancelled_at = now() WHERE day = $1 AND id = $2",
                day_of(key), key,
            )  # fmt: skip
            kept = [delta for delta in sums.buckets if not await _is_plain(db, delta)]
            going = [delta for delta in sums.buckets if delta not in kept]
            await self._add(db, BatchSums(sums.hourly, going), str(row[0]), known)
            await db.execute(_NOTE_WRITE, name, 0)
        self._keep(known)
        return Delivered(), tuple(dict.fromkeys(delta.key.meter for delta in kept))

    async def _report(self, told: Reported) -> Verdict:
        await self._ready(())
        async with self._blocking.db.transaction() as db:
            await self._identify(db, 0)
            await db.execute(
                f"UPDATE {SCHEMA}.instances SET oldest_pending = to_timestamp($2::float8), "
                "earlier = coalesce(earlier, greatest($4 - records, 0)), "
                "balance = coalesce($3::text::jsonb, balance), "
                "balance_at = CASE WHEN $3::text IS NULL THEN balance_at ELSE now() END WHERE instance = $1",
                self._identity.name,
                told.oldest_pending_s,
                None if told.balance is None else orjson.dumps(told.balance).decode(),
                told.delivered,
            )
        return Delivered()

    async def _ready(self, days: Iterable[date]) -> None:
        """Tables, our claim, and partitions: what the first batch finds done, and all others believe."""
        if not self._claimed:
            await self._blocking.db.migrate(PART, STEPS)
            if self._before_any is not None:
                await self._before_any(self._blocking.db)
            await self._claim()
            self._claimed = True
        wanted = set(days)
        now_s = monotonic()
        if self._ahead_s is None or now_s >= self._ahead_s + AHEAD_EVERY_S:
            today = day_at(time())
            wanted |= {today + timedelta(days=ahead) for ahead in range(AHEAD_DAYS + 1)}
            self._ahead_s = now_s
        if missing := wanted - self._days:
            await self._make_partitions(sorted(missing))

    async def _make_partitions(self, days: Sequence[date]) -> None:
        async with self._blocking.db.transaction() as db:
            names = [f"{SCHEMA}.records_{day:%Y%m%d}" for day in days]
            rows = await db.fetch("SELECT to_regclass(name) IS NOT NULL FROM unnest($1::text[]) AS t (name)", names)
        missing = [day for day, row in zip(days, rows, strict=True) if not row[0]]
        if missing:
            async with self._blocking.db.transaction() as db:
                await db.execute("SELECT pg_advisory_xact_lock($1)", _PARTITION_LOCK)
                for day in missing:
                    # Asked of the catalog itself: what a connection remembers of a name may be of before the lock.
                    there = await db.fetchval(
                        "SELECT EXISTS (SELECT FROM pg_tables WHERE schemaname = $1 AND tablename = $2)",
                        SCHEMA, f"records_{day:%Y%m%d}",
                    )  # fmt: skip
                    if not there:
                        for statement in partition_of(day):
                            await db.execute(statement)
        self._days.update(days)

    async def _claim(self) -> None:
        """Put this start's nonce in the place of the one that this directory had there."""
        identity = self._identity
        name = identity.ensure()
        async with self._blocking.db.transaction() as db:
            # Made first, so that of two that begin at once one waits for the other.
            made = await db.fetchval(
                f"INSERT INTO {SCHEMA}.instances (instance, nonce) VALUES ($1, $2) "
                "ON CONFLICT (instance) DO NOTHING RETURNING instance",
                name, identity.nonce,
            )  # fmt: skip
            if made is None:
                there = await db.fetchval(f"SELECT nonce FROM {SCHEMA}.instances WHERE instance = $1 FOR UPDATE", name)
                if there != identity.nonce and not identity.is_known(str(there)):
                    raise self._copied()
            identity.begin()
            await db.execute(
                f"UPDATE {SCHEMA}.instances SET nonce = $2, seen = now() WHERE instance = $1", name, identity.nonce
            )
        identity.confirm()

    async def _identify(self, db: Connection, last_seq: int) -> None:
        if await db.fetchval(_IDENTIFY, self._identity.name, self._identity.nonce, last_seq) is None:
            raise self._copied()

    def _copied(self) -> CopiedError:
        name = self._identity.name
        return CopiedError(
            f"another data directory writes to {self._blocking.db.where} as {name}, so this one or that one is a copy: "
            "`metering-sidecar spool adopt --as original` here, or `--as copy` with another SIDECAR_INSTANCE if one is "
            "set",
            Fault.FOREIGN,
        )

    async def _insert(self, db: Connection, name: str, lines: Sequence[Line]) -> tuple[set[str], bool]:
        """Put in those that are not there; which these are, and whether it is all of them: then nothing else is said.

        Nearly always it is all of them, so they are copied into their table at once; that some are there stops it.
        """
        if not lines:
            return set(), True
        counts = Counter(line.lane for line in lines)
        lanes = await db.fetch(_LOCK_LANES, sorted(counts))
        await db.execute("SAVEPOINT all_new")
        try:
            rows = _numbered(lines, name, {row[0]: row[1] for row in lanes})
            await db.copy_records_to_table("records", records=rows, columns=_KEPT, schema_name=SCHEMA)
        except Exception as error:
            if getattr(error, "sqlstate", None) != _THERE:
                raise
        else:
            await db.fetch(_MOVE_LANES, list(counts), list(counts.values()))
            return set(), True
        await db.execute("ROLLBACK TO SAVEPOINT all_new")
        return await self._insert_some(db, name, lines), False

    async def _insert_some(self, db: Connection, name: str, lines: Sequence[Line]) -> set[str]:
        """The same where some are there already: which are new."""
        await db.execute(_STAGE)
        await db.copy_records_to_table(_STAGING, records=lines, columns=Line._fields)
        rows = await db.fetch(_INSERT_SOME, name)
        counts, tops = Counter(row[1] for row in rows), dict[int, int]()
        for _, lane, number in rows:
            tops[lane] = max(number, tops.get(lane, 0))
        moved = await db.fetch(_MOVE_LANES, list(counts), list(counts.values()))
        if any(tops[lane] != last for lane, last in moved):
            # Somebody put one of them into another lane at this moment: again, and it is seen.
            raise PostgresError(f"{self._blocking.db.where}: a record came twice at once", Fault.BUSY)
        return {row[0] for row in rows}

    async def _count_after_all(self, db: Connection, lines: Sequence[Line]) -> set[str]:
        """Of records that are there, and were kept out of the sums until now, those that are in from now on."""
        if not lines:
            return set()
        rows = await db.fetch(_COUNT_AFTER_ALL, [line.day for line in lines], [line.id for line in lines])
        return {row[0] for row in rows}

    # Sums

    async def _add(self, db: Connection, sums: BatchSums, instance: str, known: dict[tuple[str, Series], int]) -> None:
        if sums.hourly:
            series = await self._series_of(db, sums.hourly, instance, known)
            columns = [[_sum_of(delta, name) for delta in sums.hourly] for name in _VALUES]
            hours = [delta.hour for delta in sums.hourly]
            await db.execute(_ADD_HOURS, hours, series, *columns)
            await db.execute(_ADD_DAYS, hours, series, *columns)
            units = [
                (delta.hour, number, storable(unit), amount)
                for delta, number in zip(sums.hourly, series, strict=True)
                for unit, amount in delta.units.items()
            ]
            if units:
                await db.execute(_ADD_UNITS, *map(list, zip(*units, strict=True)))
        if sums.buckets:
            await self._add_buckets(db, sums.buckets)

    async def _series_of(
        self, db: Connection, deltas: Sequence[Delta], instance: str, known: dict[tuple[str, Series], int]
    ) -> list[int]:
        """The number of each one's series, made where it is new."""
        asked = list(dict.fromkeys(delta.series for delta in deltas))
        new = [one for one in asked if (instance, one) not in self._series]
        if new:
            filed = await _bounded(db, [_storable_series(one) for one in new])
            keys = [_series_key(instance, one) for one in filed]
            rows = dict(zip(keys, filed, strict=True))
            ids = {
                bytes(row[0]): int(row[1])
                for row in await db.fetch(
                    f"SELECT key, id FROM {SCHEMA}.series WHERE key = ANY($1::bytea[])", list(rows)
                )
            }
            if missing := sorted(key for key in rows if key not in ids):
                ids |= await _make_series(db, instance, [(key, rows[key]) for key in missing])
            known.update({(instance, one): ids[key] for one, key in zip(new, keys, strict=True)})
        return [known.get((instance, delta.series)) or self._series[instance, delta.series] for delta in deltas]

    def _keep(self, known: Mapping[tuple[str, Series], int]) -> None:
        """What was committed may be believed from now on."""
        if len(self._series) + len(known) > SERIES_KEPT:
            self._series.clear()
        self._series.update(known)

    async def _add_buckets(self, db: Connection, deltas: Sequence[BucketDelta]) -> None:
        by_key = {_bucket_key(delta): delta for delta in deltas}
        pairs = sorted(by_key.items())
        rows = await db.fetch(
            _ADD_BUCKETS,
            [key for key, _ in pairs],
            [storable(delta.key.meter) for _, delta in pairs],
            [delta.key.version for _, delta in pairs],
            [_text(delta.key.subscriber) for _, delta in pairs],
            [_text(delta.key.group) for _, delta in pairs],
            [delta.key.start for _, delta in pairs],
            [str(delta.kind) for _, delta in pairs],
            [None if delta.kind is Kind.UNIQUE_COUNT else delta.value for _, delta in pairs],
            [delta.at_us if delta.value is not None else 0 for _, delta in pairs],
            [delta.record_id if delta.value is not None else "" for _, delta in pairs],
        )
        uniques = [
            (int(number), one)
            for key, number, value in rows
            if by_key[bytes(key)].kind is Kind.UNIQUE_COUNT and (value or 0) < UNIQUE_MAX
            for one in by_key[bytes(key)].hashes
        ]
        if uniques:
            await db.execute(_ADD_UNIQUES, *map(list, zip(*uniques, strict=True)))


def _numbered(lines: Sequence[Line], name: str, last: dict[int, int]) -> Iterator[tuple[Any, ...]]:
    """Rows with the number that each gets in its lane; `last`: of each lane the last that is given. Takes it over."""
    for line in lines:
        number = last[line.lane] = last[line.lane] + 1
        yield (name, number, *line)


def verdict_of(error: PostgresError) -> Verdict:
    """What becomes of a batch. To write it again changes nothing, so a commit that was not answered is tried again."""
    if isinstance(error, CopiedError):
        return Blocked(COPIED)
    reason = _REASONS[error.fault]
    if error.passes:
        return Retry(reason)
    if error.fault is Fault.FAILED:
        state = str(getattr(error.__cause__, "sqlstate", None) or "")
        return Refused("not_storable") if state.startswith(_BAD_DATA) else Retry(reason)
    return Blocked(reason)


def _sum_of(delta: Delta, name: str) -> int | Decimal | None:
    if name in delta.counts:
        return delta.counts[name]
    return delta.cost_usd if name == "cost_usd" else delta.tokens.get(name)


assert (*COUNTS, *TOKENS) == SUMS


async def _bounded(db: Connection, series: Sequence[Series]) -> list[Series]:
    """With each dimension's value as it is filed: beyond so many of a name they are one."""
    wanted = sorted({pair for one in series for pair in one.dimensions})
    if not wanted:
        return list(series)
    names, values = [name for name, _ in wanted], [value for _, value in wanted]
    ask = (
        f"SELECT name, value FROM {SCHEMA}.dimension_values "
        "JOIN unnest($1::text[], $2::text[]) AS t (name, value) USING (name, value)"
    )
    there = {(row[0], row[1]) for row in await db.fetch(ask, names, values)}
    if any(pair not in there for pair in wanted):
        await db.execute("SELECT pg_advisory_xact_lock($1)", _DIMENSION_LOCK)
        there = {(row[0], row[1]) for row in await db.fetch(ask, names, values)}
        counted = await db.fetch(
            f"SELECT name, count(*) FROM {SCHEMA}.dimension_values WHERE name = ANY($1::text[]) AND value <> $2 "
            "GROUP BY name",
            names, OTHER_VALUE,
        )  # fmt: skip
        counts = {row[0]: int(row[1]) for row in counted}
        # In the order in which they came: the first ones have the room.
        for name, value in dict.fromkeys(pair for one in series for pair in one.dimensions):
            if (name, value) in there or counts.get(name, 0) >= DIMENSION_VALUES_MAX:
                continue
            await db.execute(f"INSERT INTO {SCHEMA}.dimension_values VALUES ($1, $2)", name, value)
            there.add((name, value))
            counts[name] = counts.get(name, 0) + (value != OTHER_VALUE)
    return [
        replace(
            one,
            dimensions=tuple(
                (name, value if (name, value) in there else OTHER_VALUE) for name, value in one.dimensions
            ),
        )
        for one in series
    ]


async def _make_series(db: Connection, instance: str, rows: Sequence[tuple[bytes, Series]]) -> dict[bytes, int]:
    """The numbers of these, sorted by key; another writer may have made some meanwhile."""
    made = await db.fetch(
        f"INSERT INTO {SCHEMA}.series (key, instance, subscriber, model, provider, route, status_class) "
        "SELECT key, $7, subscriber, model, provider, route, status FROM unnest($1::bytea[], $2::text[], $3::text[], "
        "$4::text[], $5::text[], $6::text[]) AS t (key, subscriber, model, provider, route, status) ORDER BY key "
        "ON CONFLICT (key) DO NOTHING RETURNING key, id",
        [key for key, _ in rows],
        [one.subscriber for _, one in rows],
        [one.model for _, one in rows],
        [one.provider for _, one in rows],
        [one.route for _, one in rows],
        [one.status_class for _, one in rows],
        storable(instance),
    )
    ids = {bytes(row[0]): int(row[1]) for row in made}
    dimensions = [(ids[key], name, value) for key, one in rows if key in ids for name, value in one.dimensions]
    if dimensions:
        await db.execute(
            f"INSERT INTO {SCHEMA}.series_dimensions SELECT * FROM unnest($1::bigint[], $2::text[], $3::text[])",
            *map(list, zip(*dimensions, strict=True)),
        )
    if others := [key for key, _ in rows if key not in ids]:
        found = await db.fetch(f"SELECT key, id FROM {SCHEMA}.series WHERE key = ANY($1::bytea[])", others)
        ids |= {bytes(row[0]): int(row[1]) for row in found}
    return ids


async def _is_plain(db: Connection, delta: BucketDelta) -> bool:
    """The bucket is there, and its meter was never defined otherwise."""
    row = await db.fetchrow(
        f"SELECT EXISTS (SELECT FROM {SCHEMA}.buckets WHERE key = $1), "
        f"(SELECT count(DISTINCT version) FROM {SCHEMA}.buckets WHERE meter = $2)",
        _bucket_key(delta), storable(delta.key.meter),
    )  # fmt: skip
    return bool(row[0]) and int(row[1]) == 1


def _storable_series(one: Series) -> Series:
    return Series(
        _text(one.subscriber),
        _text(one.model),
        _text(one.provider),
        _text(one.route),
        storable(one.status_class),
        tuple((storable(name), storable(value)) for name, value in one.dimensions),
    )


def _text(text: str | None) -> str | None:
    return None if text is None else storable(text)


def _series_key(instance: str, one: Series) -> bytes:
    return _digest([instance, series_wire(one)])


def _bucket_key(delta: BucketDelta) -> bytes:
    key = delta.key
    return _digest([storable(key.meter), key.version, _text(key.subscriber), _text(key.group), key.start])


def _digest(value: object) -> bytes:
    """Of any length, where an index takes 2,700 bytes."""
    return hashlib.blake2b(orjson.dumps(value), digest_size=16).digest()
