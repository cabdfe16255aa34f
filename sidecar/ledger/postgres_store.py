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
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from threading import Lock
from time import monotonic, time
from typing import Any, Final

import orjson

from sidecar.ledger.identity import Identity
from sidecar.ledger.lanes import LANES
from sidecar.ledger.postgres_schema import (
    COLUMNS,
    PART,
    STEPS,
    Line,
    Reported,
    copied,
    date_of,
    day_at,
    day_of,
    partition_of,
    storable,
    uuid_of,
)
from sidecar.ledger.schema import DIMENSION_VALUES_MAX, OTHER_VALUE
from sidecar.meters.buckets import UNIQUE_MAX, BatchSums, BucketDelta, BucketKey, add_batches
from sidecar.meters.definition import Kind
from sidecar.meters.hourly import Delta, Series, series_wire, write_int
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Refused, Retry, Verdict
from sidecar.storage.postgres import SCHEMA, Connection, Fault, Postgres, PostgresError, call, read_only

log = logging.getLogger(__name__)

CLOSE_S: Final = 1.0  # for a write under way, which has some seconds more then to end by itself
AHEAD_DAYS: Final = 2  # partitions that are there before their day begins
AHEAD_EVERY_S: Final = 3600.0
SERIES_KEPT: Final = 10_000  # ids in memory: 2 MB
BUCKETS_KEPT: Final = 10_000  # rows in memory, but for what changes: 5 MB
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
    Fault.ENCODING: "wrong_encoding",
    Fault.DRIVER: "no_driver",
    Fault.FAILED: "failed",
}
_THERE: Final = "23505"  # SQLSTATE unique_violation
_BAD_DATA: Final = "22"  # the class of SQLSTATE for values that cannot be stored: trying again changes nothing

_BEGIN: Final = f"SELECT * FROM {SCHEMA}.begin_batch($1, $2, $3, $4)"
_ADD_SUMS: Final = f"SELECT * FROM {SCHEMA}.add_sums($1, $2, $3)"
_IDENTIFY: Final = f"""
UPDATE {SCHEMA}.instances SET seen = now(), last_seq = greatest(last_seq, $3)
WHERE instance = $1 AND nonce = $2 RETURNING instance"""
_LOCK_LANES: Final = f"""
SELECT lane FROM {SCHEMA}.lanes WHERE lane = ANY($1::smallint[]) ORDER BY lane FOR UPDATE"""
_STAGING: Final = "staged"
# What a batch is copied into where some of it is there; gone with the transaction, so no session is needed for it.
_STAGE: Final = f"""
CREATE TEMPORARY TABLE {_STAGING} (
  day date, id uuid, instance text, spool text, seq bigint, lane smallint, lane_seq bigint, subscriber text,
  counted boolean, line bytea
) ON COMMIT DROP"""
# Numbers those that are not there, in the order of their spool, puts them in, and says which they are.
_INSERT_SOME: Final = f"""
WITH new AS (
  SELECT day, id, row_number() OVER (PARTITION BY lane ORDER BY spool, seq) AS number FROM {_STAGING} AS staged
  WHERE NOT EXISTS (SELECT FROM {SCHEMA}.records AS there WHERE there.day = staged.day AND there.id = staged.id)
)
INSERT INTO {SCHEMA}.records (instance, lane_seq, day, id, spool, seq, lane, subscriber, counted, line)
SELECT staged.instance, lanes.last_seq + new.number, day, id, spool, seq, lane, subscriber, counted, line
FROM new JOIN {_STAGING} AS staged USING (day, id) JOIN {SCHEMA}.lanes AS lanes USING (lane)
ON CONFLICT (day, id) DO NOTHING RETURNING uuid_send(id), lane, lane_seq"""
_MOVE_LANES: Final = f"""
UPDATE {SCHEMA}.lanes AS lanes SET last_seq = lanes.last_seq + t.records
FROM unnest($1::smallint[], $2::bigint[]) AS t (lane, records) WHERE lanes.lane = t.lane
RETURNING lanes.lane, lanes.last_seq"""
# Of records that are there, and were kept out of the sums until now, those that are in from now on.
_COUNT_AFTER_ALL: Final = f"""
UPDATE {SCHEMA}.records AS records SET counted = true
FROM (SELECT day, id FROM {_STAGING} WHERE counted ORDER BY day, id) AS t
WHERE records.day = t.day AND records.id = t.id AND NOT records.counted AND records.cancelled_at IS NULL
RETURNING uuid_send(records.id)"""
_NOTE_WRITE: Final = f"UPDATE {SCHEMA}.instances SET records = records + $2, writes = writes + 1 WHERE instance = $1"
_ADD_UNIQUES: Final = f"""
WITH put AS (
  INSERT INTO {SCHEMA}.uniques (bucket, hash)
  SELECT bucket, hash FROM unnest($1::bigint[], $2::text[]) AS t (bucket, hash) ORDER BY bucket, hash COLLATE "C"
  ON CONFLICT DO NOTHING RETURNING bucket
)
UPDATE {SCHEMA}.buckets AS buckets SET value = least(coalesce(buckets.value, 0) + new.count, {UNIQUE_MAX})
FROM (SELECT bucket, count(*) AS count FROM put GROUP BY bucket) AS new WHERE buckets.id = new.bucket"""

Again = Callable[[Sequence[bytes]], BatchSums]
Known = dict[tuple[str, Series], int]  # the numbers of series, by instance


class CopiedError(PostgresError):
    """The ledger knows another directory by our name."""


class _SomeThere(Exception):
    """Some of a batch's records are in the ledger already."""


class PostgresStore:
    """The shared ledger, open for writing by one sidecar. Blocking; calls may come from any thread, one goes at a time.

    Nothing is asked of the database before the first call, so a sidecar starts without it.
    """

    def __init__(
        self, url: str, identity: Identity, before_any: Callable[[Postgres], Awaitable[None]] | None = None
    ) -> None:
        """`before_any`: what the database needs beside our tables before the first record may be written."""
        self._before_any = before_any
        self._db = Postgres(url, name=f"metering-sidecar {identity.name}".strip(), connections=1)
        self._identity = identity
        self._lock = Lock()
        self._claimed = self._copied_now = False
        self._days: set[int] = set()  # whose partitions are there
        self._ahead_s: float | None = None  # monotonic: when that was last seen to
        self._series: Known = {}
        self._buckets: dict[BucketKey, dict[str, Any]] = {}
        self._said: str | None = None  # the last fault that was logged

    def __repr__(self) -> str:
        return f"<PostgresStore {self._db.where}>"

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
            db_ = self._db
            async with db_.transaction(read_only=True) as db:
                standby, shut, there = await db.fetchrow(
                    "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only')::boolean, "
                    f"to_regclass('{SCHEMA}.instances') IS NOT NULL"
                )
            if standby:
                raise PostgresError(f"{db_.where} is a standby, which takes no records: name the primary", Fault.FAILED)
            if shut:
                raise read_only(db_.where)
            try:
                await db_.require(PART, STEPS)
            except PostgresError as error:
                if there or error.fault is not Fault.MISSING:  # the first to start makes them
                    raise

        with self._lock:
            try:
                call(ask())
            except PostgresError as error:
                return str(error)
        return None

    @property
    def where(self) -> str:
        """Host, port and database."""
        return self._db.where

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
        # Who hangs in a write until its time limit must not hold up the end: it fails with its connection, and what it
        # wrote is known again.
        free = self._lock.acquire(timeout=CLOSE_S)
        try:
            call(self._db.close())
        finally:
            if free:
                self._lock.release()

    def _verdict(self, do: Callable[[], Any]) -> Verdict:
        with self._lock:
            try:
                verdict: Verdict = call(do())
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
            log.info("the shared ledger takes records again", extra={"facts": {"ledger": self._db.where}})
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
        if not lines:
            await self._ready(())
            async with self._db.transaction() as db:
                await self._identify(db, 0)
            return Duplicate()
        days, ids, seqs, lanes, *_ = zip(*lines, strict=True)
        await self._ready(set(days))
        if len(set(ids)) < len(lines):  # an id that stands twice is one
            return await self._write(list({line.id: line for line in lines}.values()), None, again)
        known: Known = {}
        try:
            verdict = await self._write_new(lines, max(seqs), Counter(lanes), sums, again, known)
        except _SomeThere:
            verdict = await self._write_some(lines, max(seqs), again, known)
        self._keep(known)
        return verdict

    async def _write_new(
        self,
        lines: Sequence[Line],
        greatest: int,
        lanes: Mapping[int, int],
        sums: Sequence[BatchSums] | None,
        again: Again,
        known: Known,
    ) -> Verdict:
        """Nearly always all of them are new: they are copied into their table at once. That some are there stops it."""
        name = self._identity.name
        wanted = [{"lane": lane, "n": number} for lane, number in lanes.items()]
        async with self._db.transaction() as db:
            last = dict(await db.fetch(_BEGIN, name, self._identity.nonce, greatest, _json(wanted)))
            if not last:
                raise self._copied()
            try:
                await _copy(db, "records", lines, name, last, SCHEMA)
            except Exception as error:
                if getattr(error, "sqlstate", None) != _THERE:
                    raise
                raise _SomeThere from None
            counted = [line.line for line in lines if line.counted]
            if counted:
                await self._add(db, add_batches(list(sums or [again(counted)])), name, known)
        return Delivered()

    async def _write_some(self, lines: Sequence[Line], greatest: int, again: Again, known: Known) -> Verdict:
        """The same where some are there already."""
        name = self._identity.name
        async with self._db.transaction() as db:
            await self._identify(db, greatest)
            await db.fetch(_LOCK_LANES, sorted({line.lane for line in lines}))
            await db.execute(_STAGE)
            await _copy(db, _STAGING, lines, name, dict.fromkeys(range(LANES), 0))
            fresh = await self._insert_some(db)
            flipped = {row[0] for row in await db.fetch(_COUNT_AFTER_ALL)}
            counted = [line.line for line in lines if line.counted and (line.id in fresh or line.id in flipped)]
            if counted:
                await self._add(db, again(counted), name, known)
            if fresh or counted:
                await db.execute(_NOTE_WRITE, name, len(fresh))
        return Delivered() if fresh or counted else Duplicate()

    async def _take_back(self, record_id: str, sums: BatchSums) -> tuple[Verdict, tuple[str, ...]]:
        await self._ready(())
        name = self._identity.name
        key = uuid_of(record_id)
        known: Known = {}
        async with self._db.transaction() as db:
            await self._identify(db, 0)
            row = await db.fetchrow(
                f"SELECT instance, counted, cancelled_at IS NOT NULL FROM {SCHEMA}.records "
                "WHERE day = $1 AND id = $2 FOR UPDATE",
                date_of(day_of(key.bytes)),
                key,
            )
            if row is None or not row[1]:
                return (Duplicate() if row is not None and row[2] else Refused("not_in_ledger")), ()
            await db.execute(
                f"UPDATE {SCHEMA}.records SET counted = false, cancelled_at = now() WHERE day = $1 AND id = $2",
                date_of(day_of(key.bytes)),
                key,
            )
            kept = [delta for delta in sums.buckets if not await _is_plain(db, delta)]
            going = [delta for delta in sums.buckets if delta not in kept]
            await self._add(db, BatchSums(sums.hourly, going), str(row[0]), known)
            await db.execute(_NOTE_WRITE, name, 0)
        self._keep(known)
        return Delivered(), tuple(dict.fromkeys(delta.key.meter for delta in kept))

    async def _report(self, told: Reported) -> Verdict:
        await self._ready(())
        async with self._db.transaction() as db:
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

    async def _ready(self, days: Iterable[int]) -> None:
        """Tables, our claim, and partitions: what the first batch finds done, and all others believe."""
        if not self._claimed:
            await self._db.migrate(PART, STEPS)
            if self._before_any is not None:
                await self._before_any(self._db)
            await self._claim()
            self._claimed = True
        wanted = set(days)
        now_s = monotonic()
        if self._ahead_s is None or now_s >= self._ahead_s + AHEAD_EVERY_S:
            today = day_at(time())
            wanted.update(range(today, today + AHEAD_DAYS + 1))
            self._ahead_s = now_s
        if missing := wanted - self._days:
            await self._make_partitions([date_of(day) for day in sorted(missing)])
            self._days |= missing

    async def _make_partitions(self, days: Sequence[date]) -> None:
        async with self._db.transaction() as db:
            names = [f"{SCHEMA}.records_{day:%Y%m%d}" for day in days]
            rows = await db.fetch("SELECT to_regclass(name) IS NOT NULL FROM unnest($1::text[]) AS t (name)", names)
        missing = [day for day, row in zip(days, rows, strict=True) if not row[0]]
        if missing:
            async with self._db.transaction() as db:
                await db.execute("SELECT pg_advisory_xact_lock($1)", _PARTITION_LOCK)
                for day in missing:
                    # Asked of the catalog itself: what a connection remembers of a name may be of before the lock.
                    there = await db.fetchval(
                        "SELECT EXISTS (SELECT FROM pg_tables WHERE schemaname = $1 AND tablename = $2)",
                        SCHEMA,
                        f"records_{day:%Y%m%d}",
                    )
                    if not there:
                        for statement in partition_of(day):
                            await db.execute(statement)

    async def _claim(self) -> None:
        """Put this start's nonce in the place of the one that this directory had there."""
        identity = self._identity
        name = identity.ensure()
        async with self._db.transaction() as db:
            # Made first, so that of two that begin at once one waits for the other.
            made = await db.fetchval(
                f"INSERT INTO {SCHEMA}.instances (instance, nonce) VALUES ($1, $2) "
                "ON CONFLICT (instance) DO NOTHING RETURNING instance",
                name,
                identity.nonce,
            )
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
            f"another data directory writes to {self._db.where} as {name}, so this one or that one is a copy: "
            "`metering-sidecar spool adopt --as original` here, or `--as copy` with another SIDECAR_INSTANCE if one is "
            "set",
            Fault.FOREIGN,
        )

    async def _insert_some(self, db: Connection) -> set[bytes]:
        """Put in what is staged and not there; which these are."""
        rows = await db.fetch(_INSERT_SOME)
        counts, tops = Counter(row[1] for row in rows), dict[int, int]()
        for _, lane, number in rows:
            tops[lane] = max(number, tops.get(lane, 0))
        moved = await db.fetch(_MOVE_LANES, list(counts), list(counts.values()))
        if any(tops[lane] != last for lane, last in moved):
            # Somebody put one of them into another lane at this moment: again, and it is seen.
            raise PostgresError(f"{self._db.where}: a record came twice at once", Fault.BUSY)
        return {row[0] for row in rows}

    # Sums

    async def _add(self, db: Connection, sums: BatchSums, instance: str, known: Known) -> None:
        series = await self._series_of(db, sums.hourly, instance, known)
        hours: list[Any] = []
        units: list[Any] = []
        for delta, number in zip(sums.hourly, series, strict=True):
            counts = {name: count for name, count in delta.counts.items() if count}
            hours.append({**counts, **delta.tokens, "hour": delta.hour, "series": number})
            if delta.cost_usd is not None:
                hours[-1]["cost_usd"] = str(delta.cost_usd)
            for unit, amount in delta.units.items():
                row = {"hour": delta.hour, "series": number, "unit": storable(unit), "amount": str(amount)}
                units.append(row)
        running = [self._bucket(delta) for delta in sums.buckets]
        rows = await db.fetch(_ADD_SUMS, _json(hours), _json(units), _json(running))
        if rows:
            hashes = {row["key"]: delta.hashes for row, delta in zip(running, sums.buckets, strict=True)}
            uniques = [(number, one) for key, number in rows for one in hashes[_hex(key)]]
            if uniques:
                await db.execute(_ADD_UNIQUES, *map(list, zip(*uniques, strict=True)))

    def _bucket(self, delta: BucketDelta) -> dict[str, Any]:
        """A running value and what is to be added to it, as a row."""
        fixed = self._buckets.get(delta.key)
        if fixed is None:
            if len(self._buckets) >= BUCKETS_KEPT:
                self._buckets.clear()
            fixed = self._buckets[delta.key] = _fixed(delta)
        if delta.value is None or delta.kind is Kind.UNIQUE_COUNT:
            return fixed
        if delta.kind is not Kind.LATEST:
            return {**fixed, "value": str(delta.value)}
        return {**fixed, "value": str(delta.value), "at_us": delta.at_us, "record_id": storable(delta.record_id)}

    async def _series_of(self, db: Connection, deltas: Sequence[Delta], instance: str, known: Known) -> list[int]:
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


async def _copy(
    db: Connection, table: str, lines: Sequence[Line], name: str, last: dict[int, int], schema: str | None = None
) -> None:
    rows = copied(lines, name, last)
    await db.copy_to_table(table, source=rows, columns=COLUMNS, format="binary", schema_name=schema)


def _json(rows: Sequence[Mapping[str, Any]]) -> str | None:
    if not rows:
        return None
    try:
        return orjson.dumps(rows).decode()
    except TypeError:  # a number beyond 64 bits, which is the same as a text
        return orjson.dumps([{name: _number(value) for name, value in row.items()} for row in rows]).decode()


def _number(value: Any) -> Any:
    return write_int(value) if isinstance(value, int) else value


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
            names,
            OTHER_VALUE,
        )
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
        _bucket_key(delta),
        storable(delta.key.meter),
    )
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


def _fixed(delta: BucketDelta) -> dict[str, Any]:
    """What a running value is kept by."""
    key = delta.key
    return {
        "key": _hex(_bucket_key(delta)),
        "meter": storable(key.meter),
        "version": key.version,
        "subscriber": _text(key.subscriber),
        **({} if key.group is None else {"grp": storable(key.group)}),
        "start": key.start,
        "kind": str(delta.kind),
    }


def _hex(key: bytes) -> str:
    """As the server reads and writes it."""
    return f"\\x{key.hex()}"


def _digest(value: object) -> bytes:
    """Of any length, where an index takes 2,700 bytes."""
    return hashlib.blake2b(orjson.dumps(value), digest_size=16).digest()
