"""Limits that many sidecars share: each publishes what its records say, and leases ahead of its calls what is left.

`metering.limit_counters` has a row for each counter and sidecar: what *its* records amount to, always the whole of it
and never a difference. So a step that may have happened is simply done again, a sidecar that starts anew writes what
its records say over what was there, and nothing in there can drift from them. `metering.limit_leases` has what each may
use beyond that, until a moment by the database's clock. Who grants to itself holds the counter's lock for the
transaction, so that settled + leases <= amount holds of all that is granted.

One task asks, for all counters that need something in one transaction: calls that wait go first, the others every
`ROUND_S`. A call never waits for it while the lease suffices.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from sidecar.gate.counters import Counter, Counters, Row
from sidecar.gate.limits import Limit
from sidecar.gate.shares import LEASE_S, USED_S, Share, ahead_of, granted, shift_of
from sidecar.gate.windows import FOREVER_NS, PARTS, SECOND_NS
from sidecar.storage.files import StorageError
from sidecar.storage.postgres import SCHEMA, Connection, Fault, Postgres, PostgresError

log = logging.getLogger("sidecar.gate")

PART: Final = "limits"  # of the migrations
STEPS: Final = (
    f"""
CREATE TABLE {SCHEMA}.limit_counters (
  key text COLLATE "C" NOT NULL, -- the counter's, with its unit and, of a sliding window, its length
  instance text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL, -- the counter's key, as a sidecar knows it
  settled numeric NOT NULL, -- by the records of this instance; all of it, also of a sliding window
  parts jsonb NOT NULL, -- of a sliding window: by the number of the part, by the database's clock
  ends timestamptz NOT NULL, -- nobody asks for it after that
  PRIMARY KEY (key, instance)
) WITH (fillfactor = 50);
CREATE INDEX limit_counters_of_instance ON {SCHEMA}.limit_counters (instance);
CREATE TABLE {SCHEMA}.limit_leases (
  key text COLLATE "C" NOT NULL,
  instance text COLLATE "C" NOT NULL,
  amount numeric NOT NULL, -- that it may use beyond what it has settled
  expires timestamptz NOT NULL,
  PRIMARY KEY (key, instance)
) WITH (fillfactor = 50);
""",
)
ROUND_S: Final = 1.0
RENEW_S: Final = 2.0
QUESTION_S: Final = 2.0  # for one transaction; who waits for it waits for a second at most
BATCH: Final = 200  # counters in one transaction
SWEEP_S: Final = 3600.0
CLOCK_OFF_S: Final = 5.0  # said from here on
KEY_CHARS_MAX: Final = 500
_LOCKS: Final = 0x6C696D69  # the first of the two numbers of our advisory locks: of transactions, not of sessions

# Locks in one order, and in a statement of their own: what is read after it is what others have committed.
_LOCK: Final = """
SELECT pg_advisory_xact_lock($2::int, number) FROM (
  SELECT DISTINCT hashtext(key) AS number FROM unnest($1::text[]) AS t (key) ORDER BY 1 OFFSET 0
) AS numbers"""
_PUBLISH: Final = f"""
INSERT INTO {SCHEMA}.limit_counters (key, instance, name, settled, parts, ends)
SELECT key, $1, name, settled::numeric, parts::jsonb, coalesce(to_timestamp(ends), 'infinity')
FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::float8[]) AS t (key, name, settled, parts, ends)
ON CONFLICT (key, instance) DO UPDATE SET settled = excluded.settled, parts = excluded.parts, ends = excluded.ends"""
# What counts of a row now: of a sliding window of so many seconds from its oldest part on; 0: a calendar's period.
_COUNTS: Final = f"""
CASE WHEN seconds = 0 THEN c.settled ELSE (
  SELECT coalesce(sum(part.value::numeric), 0) FROM jsonb_each_text(c.parts) AS part
  WHERE part.key::bigint >= floor(extract(epoch FROM clock_timestamp()) * {PARTS} / seconds) - {PARTS}
) END"""
_LOOK: Final = f"""
SELECT t.key,
  coalesce((SELECT sum({_COUNTS}) FROM {SCHEMA}.limit_counters AS c WHERE c.key = t.key), 0),
  coalesce((SELECT sum({_COUNTS}) FROM {SCHEMA}.limit_counters AS c
            WHERE c.key = t.key AND c.instance <> $1), 0),
  coalesce((SELECT sum(l.amount) FROM {SCHEMA}.limit_leases AS l
            WHERE l.key = t.key AND l.instance <> $1 AND l.expires > clock_timestamp()), 0)
FROM unnest($2::text[], $3::int[]) AS t (key, seconds)"""
_LEASE: Final = f"""
INSERT INTO {SCHEMA}.limit_leases (key, instance, amount, expires)
SELECT key, $1, amount::numeric, clock_timestamp() + make_interval(secs => $4)
FROM unnest($2::text[], $3::text[]) AS t (key, amount)
ON CONFLICT (key, instance) DO UPDATE SET amount = excluded.amount, expires = excluded.expires"""
_GIVE_BACK: Final = f"DELETE FROM {SCHEMA}.limit_leases WHERE instance = $1 AND key = ANY($2::text[])"
_ALL: Final = f"""
SELECT name, sum(settled), sum(leased), coalesce(sum(settled) FILTER (WHERE mine), 0),
  coalesce(sum(leased) FILTER (WHERE mine), 0)
FROM (
  SELECT c.name, c.instance = $1 AS mine, {_COUNTS} AS settled,
    coalesce((SELECT l.amount FROM {SCHEMA}.limit_leases AS l
              WHERE l.key = c.key AND l.instance = c.instance AND l.expires > clock_timestamp()), 0) AS leased
  FROM {SCHEMA}.limit_counters AS c JOIN unnest($2::text[], $3::text[], $4::int[]) AS t (lim, unit, seconds)
    ON split_part(c.name, '|', 1) = t.lim AND c.key LIKE '%|' || t.unit || '|' || t.seconds || 's'
  WHERE c.ends > clock_timestamp()
) AS rows GROUP BY name"""
_CLOCK: Final = "SELECT extract(epoch FROM clock_timestamp())::float8"


def _is_due(counter: Counter, now_s: float) -> bool:
    """It has changed, or its lease is to be renewed: in time for another chance or two."""
    share = counter.share
    if share is None:
        return False
    asked_s = share.until_s - USED_S
    return share.dirty or ((share.told or counter.out > 0) and now_s - asked_s >= RENEW_S)


def stored_key(counter: Counter) -> str:
    """The counter's key in the database. What sidecars define otherwise under one name does not mix: the unit and the
    length of a sliding window are a part of it. A customer's id may be any text, and as long as a header."""
    limit = counter.limit
    tail = f"|{limit.unit}|{_seconds(limit)}s"
    name = storable(counter.key)
    if name != counter.key or len(name) > KEY_CHARS_MAX:
        name = f"{limit.name}|{hashlib.sha256(counter.key.encode('utf-8', 'surrogatepass')).hexdigest()}"
    return name + tail


def storable(text: str) -> str:
    """Without what PostgreSQL keeps in no text."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")


def _seconds(limit: Limit) -> int:
    return 0 if limit.sliding is None else limit.sliding.seconds


@dataclass(slots=True)
class _Step:
    """What is asked of one counter, as it was when it was asked."""

    counter: Counter
    share: Share
    key: str
    published: int
    keep: int
    demand: int
    ahead: int
    waiting: Sequence[Callable[[bool], None]]
    parts: Mapping[int, int]
    settled: int
    settled_others: int = 0
    leased_others: int = 0
    room: int = 0
    lease: int = 0


class SharedCounters:
    """Of one sidecar. `run` is to be started, once what its records say is in `counters`."""

    def __init__(
        self,
        database: Postgres,
        instance: str,
        counters: Counters,
        *,
        clock_s: Callable[[], float],
        wall_ns: Callable[[], int],
        earlier: Callable[[], Awaitable[Counters | None]] | None = None,
        floors: bool = False,
    ) -> None:
        """`instance`: who this is in the database. `clock_s`: as in `Share`. `earlier`: what the records say that only
        the shared ledger has. `floors`: where that is not told by the ledger, what was published is kept."""
        self._db, self._instance, self._counters = database, instance, counters
        self._clock_s, self._wall_ns = clock_s, wall_ns
        self._earlier, self._floors = earlier, floors
        self._waiting: dict[Counter, list[Callable[[bool], None]]] = {}
        self._soon: set[Counter] = set()
        self._wake = asyncio.Event()
        self._begun = False  # the tables are there, and what was there of ours is known
        self._offset_ns = 0  # of the database's clock
        self._round_s = self._sweep_s = 0.0
        self.trouble = ""
        self.failures = 0  # questions without an answer, ever

    # -- for the owner ---------------------------------------------------------------------------

    def ask(self, lacking: Sequence[tuple[Counter, int]], then: Callable[[bool], None]) -> bool:
        """Lease so much more of each, and call `then` once it was tried: with False where the database did not answer.
        False at once: it does not answer now, and `then` is not called."""
        if self.trouble:
            return False
        left = len(lacking)
        fine = True

        def one(answered: bool) -> None:
            nonlocal left, fine
            left -= 1
            fine = fine and answered
            if not left:
                then(fine)

        for counter, amount in lacking:
            assert counter.share is not None
            counter.share.demand += amount
            self._waiting.setdefault(counter, []).append(one)
        self._wake.set()
        return True

    def soon(self, low: Sequence[Counter]) -> None:
        """Lease more of these before they run out."""
        self._soon.update(low)
        self._wake.set()

    @property
    def is_counted(self) -> bool:
        """Whether the database answers."""
        return self._begun and not self.trouble

    @property
    def notes(self) -> list[str]:
        """For `/readyz`."""
        found = []
        if self.trouble:
            found.append(f"the shared limits cannot be counted: {self.trouble}")
        if abs(self._offset_ns) > CLOCK_OFF_S * SECOND_NS:
            way = "behind" if self._offset_ns > 0 else "ahead of"
            found.append(
                f"the clock here is {abs(self._offset_ns) // SECOND_NS} s {way} the database's: "
                "limits of a calendar's window begin and end by it"
            )
        return found

    # -- the task --------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                async with asyncio.timeout(None if self._begun else 4 * QUESTION_S):
                    if not self._begun:
                        await self._begin()
                await self._round()
                if self.trouble:
                    log.warning("the shared limits are counted again")
                    self.trouble = ""
            except (PostgresError, TimeoutError) as error:
                self._failed(str(error) or f"{self._db.where} does not answer")
                await asyncio.sleep(ROUND_S)
                continue
            except Exception as error:  # whatever it is, calls do not wait for it, and it is said
                log.exception("the shared limits could not be counted")
                self._failed(type(error).__name__)
                await asyncio.sleep(ROUND_S)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(max(self._round_s + ROUND_S - self._clock_s(), 0.0)):
                    await self._wake.wait()

    async def leave(self) -> None:
        """Publish what there is, and give all leases back."""
        if self.is_counted:
            for counter in self._counters.all():
                if counter.share is not None:
                    counter.share.room = counter.share.peak = 0  # so that nothing is kept that is not in use
                    counter.share.rate = counter.share.taken = 0
            self._round_s = 0.0
            with suppress(PostgresError, TimeoutError):
                await self._round()
        await self._db.close()

    def _failed(self, reason: str) -> None:
        if reason != self.trouble:
            log.warning("the shared limits cannot be counted, SIDECAR_GATE_ON_FAILURE decides: %s", reason)
        self.trouble = reason
        self.failures += 1
        self._begun = False  # it may be another database by the next time, or one that was put back
        self._soon.clear()
        waiting, self._waiting = self._waiting, {}
        for counter in waiting:
            assert counter.share is not None
            counter.share.demand = 0
        for one in [one for ones in waiting.values() for one in ones]:
            one(False)

    async def _begin(self) -> None:
        """Also after every fault: then all is published anew."""
        await self._db.migrate(PART, STEPS)
        async with self._db.transaction() as db:
            await self._compare_clocks(db)
            rows = await db.fetch(
                f"SELECT name, settled, key FROM {SCHEMA}.limit_counters WHERE instance = $1"
                " AND ends > clock_timestamp()",
                self._instance,
            )  # fmt: skip
        if self._earlier is not None:
            try:
                found = await self._earlier()
            except PostgresError:
                raise
            except StorageError as error:
                raise PostgresError(
                    f"what the ledger has of earlier calls cannot be read: {error}", Fault.FAILED
                ) from error
            self._earlier = None
            if found is not None:
                self._counters.absorb(found)
            if self._floors:
                self._keep_floors(rows)
        for name, _, _ in rows:
            self._counters.by_key(name, self._wall_ns())  # known from now on, and published with the others
        for counter in self._counters.all():
            if counter.share is not None:
                counter.share.dirty = True
        self._begun = True

    def _keep_floors(self, rows: Iterable[Sequence[Any]]) -> None:
        """Of limits of which the ledger says nothing (keys, dimensions, meters), what was published before the spool
        forgot its records is all that is left."""
        for name, settled, key in rows:
            counter = self._counters.by_key(name, self._wall_ns())
            if counter is None or stored_key(counter) != key or counter.limit.in_hours or counter.limit.sliding:
                continue
            counter.settled = max(counter.settled, int(settled))

    async def _round(self) -> None:
        self._wake.clear()
        while steps := self._steps():
            before_s = self._clock_s()
            try:
                async with asyncio.timeout(QUESTION_S):
                    await self._put(steps)
            except BaseException:
                for step in steps:
                    step.share.dirty = True
                    self._waiting.setdefault(step.counter, []).extend(step.waiting)
                raise
            for step in steps:
                share = step.share
                share.others_settled, share.others_leased, share.room = (
                    step.settled_others, step.leased_others, step.room,
                )  # fmt: skip
                share.answered(step.published, step.lease, before_s + USED_S, step.counter.out)
            for one in [one for step in steps for one in step.waiting]:
                one(True)
        if self._clock_s() - self._sweep_s > SWEEP_S:
            self._sweep_s = self._clock_s()
            await self._sweep()

    def _steps(self) -> list[_Step]:
        """Who is asked for next: those that calls wait for, those that run low, and each round all that have changed
        or hold something."""
        now_s = self._clock_s()
        found = list(dict.fromkeys([*self._waiting, *self._soon]))[:BATCH]
        if now_s - self._round_s >= ROUND_S:
            due = [counter for counter in self._counters.all() if _is_due(counter, now_s)]
            found = list(dict.fromkeys([*found, *due]))
            if len(found) <= BATCH:
                self._round_s = now_s
        return [self._step(counter, now_s) for counter in found[:BATCH]]

    def _step(self, counter: Counter, now_s: float) -> _Step:
        share, sliding = counter.share, counter.limit.sliding
        assert share is not None
        self._soon.discard(counter)
        keep = share.cut(counter.out, now_s, places=counter.limit.unit == "concurrent")
        demand, share.demand = share.demand, 0
        share.dirty = False
        parts: dict[int, int] = {}
        if sliding is not None:
            shift = shift_of(self._offset_ns, sliding.seconds * SECOND_NS // PARTS)
            parts = {part + shift: amount for part, amount in counter.parts.items()}
        ahead = 0
        if share.blocks and counter.limit.unit != "concurrent":
            spare = keep - counter.out
            ahead = max(ahead_of(share.rate, counter.limit.amount) - spare, 0)
        return _Step(
            counter, share, stored_key(counter), share.unpublished, keep, demand if share.blocks else 0, ahead,
            self._waiting.pop(counter, ()), parts, sum(parts.values()) if sliding is not None else counter.settled,
        )  # fmt: skip

    async def _put(self, steps: Sequence[_Step]) -> None:
        me = self._instance
        keys = [step.key for step in steps]
        async with self._db.transaction() as db:
            await db.execute(_LOCK, keys, _LOCKS)
            await self._publish(db, steps)
            rows = await db.fetch(_LOOK, me, keys, [_seconds(step.counter.limit) for step in steps])
            by_key = {str(row[0]): row for row in rows}
            for step in steps:
                _, settled, others, leased = by_key[step.key]
                step.settled_others, step.leased_others = int(others), int(leased)
                step.room = step.counter.limit.amount - int(settled) - int(leased)
                step.lease = granted(keep=step.keep, demand=step.demand, ahead=step.ahead, room=step.room)
            await self._compare_clocks(db)
            holding = [step for step in steps if step.lease]
            if holding:
                await db.execute(
                    _LEASE, me, [step.key for step in holding], [str(step.lease) for step in holding], LEASE_S
                )  # fmt: skip
            if nothing := [step.key for step in steps if not step.lease and step.share.told]:
                await db.execute(_GIVE_BACK, me, nothing)

    async def _compare_clocks(self, db: Connection) -> None:
        before_ns = self._wall_ns()
        now_s = float(await db.fetchval(_CLOCK))
        self._offset_ns = round(now_s * SECOND_NS) - (before_ns + self._wall_ns()) // 2

    async def _publish(self, db: Connection, steps: Sequence[_Step]) -> None:
        ends: list[float | None] = []
        for step in steps:
            counter, seconds = step.counter, _seconds(step.counter.limit)
            if seconds:  # as long as a part of it can count, and an hour for clocks that are off
                ends.append((self._wall_ns() + self._offset_ns) / SECOND_NS + 2 * seconds + 3600)
            else:
                ends.append(None if counter.end_ns >= FOREVER_NS else counter.end_ns / SECOND_NS)
        await db.execute(
            _PUBLISH, self._instance, [step.key for step in steps], [storable(step.counter.key) for step in steps],
            [str(step.settled) for step in steps], [json.dumps(step.parts) for step in steps], ends,
        )  # fmt: skip

    async def _sweep(self) -> None:
        """What nobody asks for any more."""
        async with asyncio.timeout(QUESTION_S), self._db.transaction() as db:
            await db.execute(f"DELETE FROM {SCHEMA}.limit_counters WHERE ends < now() - interval '1 day'")
            await db.execute(f"DELETE FROM {SCHEMA}.limit_leases WHERE expires < now() - interval '1 hour'")

    async def rows(self) -> list[Row]:
        """All counters of the fleet; where the database does not answer, what is known here."""
        if self.is_counted:
            try:
                async with asyncio.timeout(QUESTION_S):
                    return await fleet_rows(self._db, self._instance, self._counters, self._wall_ns())
            except (PostgresError, TimeoutError) as error:
                log.info("the fleet's limits could not be read: %s", error)
        return self._counters.rows(self._wall_ns())


async def fleet_rows(database: Postgres, instance: str, counters: Counters, at_ns: int) -> list[Row]:
    """Where each counter of these limits stands in the whole fleet. Raises `PostgresError`."""
    limits = list(counters.limits.values())
    async with database.transaction(read_only=True) as db:
        found = await db.fetch(
            _ALL, instance, [limit.name for limit in limits], [limit.unit for limit in limits],
            [_seconds(limit) for limit in limits],
        )  # fmt: skip
    rows: dict[str, list[Row]] = {limit.name: [] for limit in limits}
    for name, settled, leased, mine, held in found:
        limit_name, _, rest = str(name).partition("|")
        scope = rest.rpartition("|")[0]
        limit = counters.limits[limit_name]
        until_ns = counters.end_ns(limit, str(name), scope, at_ns)
        if not (settled or leased) or until_ns is None:
            continue
        until = None if until_ns >= FOREVER_NS else until_ns
        rows[limit_name].append(Row(limit, scope, int(settled), int(leased), until, (int(mine), int(held))))
    return [row for name in rows for row in sorted(rows[name], key=lambda r: (-r.used - r.reserved, r.scope))]
