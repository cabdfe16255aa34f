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
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

from sidecar.gate.claim import DERIVED, FILE, Claim
from sidecar.gate.counters import Counter, Counters, Row
from sidecar.gate.limits import Limit
from sidecar.gate.shares import LEASE_S, USED_S, Share, ahead_of, granted, shift_of
from sidecar.gate.windows import FOREVER_NS, PARTS, SECOND_NS, Calendar
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
    f"""
CREATE TABLE {SCHEMA}.limit_instances (
  instance text COLLATE "C" PRIMARY KEY,
  nonce text NOT NULL, -- of the last start of its data directory: everything is published with it
  since timestamptz, -- until then another directory went by the name
  seen timestamptz NOT NULL DEFAULT now(),
  limits jsonb NOT NULL DEFAULT '{{}}' -- as it has them, by name
) WITH (fillfactor = 50);
""",
)
_TABLES: Final = ("limit_counters", "limit_leases", "limit_instances")
ROUND_S: Final = 1.0
RENEW_S: Final = 2.0
QUESTION_S: Final = 2.0  # for one transaction; who waits for it waits for a second at most
BATCH: Final = 200  # counters in one transaction
BEGIN_S: Final = 1.0  # of a start, calls wait for the database; later the setting decides at once
KEEP_S: Final = 60.0  # between two looks at whether the tables still have what we told, and what others tell of theirs
SEEN_S: Final = 3 * KEEP_S  # somebody who was not heard of for so long is not compared with
SWEEP_S: Final = 3600.0
ANEW_S: Final = 0.1
DIFFERENCES_MAX: Final = 5  # said of others' limits
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
WHERE EXISTS (SELECT FROM {SCHEMA}.limit_instances WHERE instance = $1 AND nonce = $7 FOR SHARE)
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
SELECT c.name, c.instance, sum({_COUNTS}), coalesce(sum(
  (SELECT l.amount FROM {SCHEMA}.limit_leases AS l
   WHERE l.key = c.key AND l.instance = c.instance AND l.expires > clock_timestamp())), 0)
FROM {SCHEMA}.limit_counters AS c JOIN unnest($1::text[], $2::text[], $3::int[]) AS t (lim, unit, seconds)
  ON split_part(c.name, '|', 1) = t.lim AND c.key LIKE '%|' || t.unit || '|' || t.seconds || 's'
WHERE c.ends > clock_timestamp() GROUP BY c.name, c.instance"""
_SEEN: Final = f"""
UPDATE {SCHEMA}.limit_instances SET seen = now(), limits = $3::text::jsonb WHERE instance = $1 AND nonce = $2
RETURNING instance"""
_OTHERS: Final = f"""
SELECT instance, limits::text FROM {SCHEMA}.limit_instances
WHERE instance <> $1 AND seen > now() - make_interval(secs => $3) AND limits <> $2::text::jsonb ORDER BY 1"""
_TOLD: Final = f"""
SELECT count(*), coalesce(sum(settled), 0) FROM {SCHEMA}.limit_counters
WHERE instance = $1 AND ends > to_timestamp($2)"""
# Of whom the ledger has records and these tables nothing, though nobody who runs would leave it so.
_SILENT: Final = f"""
SELECT instance FROM {SCHEMA}.instances AS i WHERE records > 0 AND seen < now() - make_interval(secs => $1)
AND NOT EXISTS (SELECT FROM {SCHEMA}.limit_instances AS l WHERE l.instance = i.instance) ORDER BY 1"""
_DERIVED: Final = f"""
INSERT INTO {SCHEMA}.limit_instances (instance, nonce, seen) VALUES ($1, $2, '-infinity')
ON CONFLICT (instance) DO NOTHING RETURNING instance"""
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


class _Told(NamedTuple):
    """A row of `limit_counters`. `ends`: Unix seconds, by the database's clock."""

    key: str
    name: str
    settled: int
    parts: Mapping[int, int]
    ends: float


def _told(counter: Counter, settled: int, parts: Mapping[int, int], now_s: float = 0.0) -> _Told:
    """`now_s`: by the database's clock; 0: the last part says what is now."""
    seconds = _seconds(counter.limit)
    if seconds:  # as long as a part of it can count, and an hour for clocks that are off
        if not now_s:
            settled, now_s = sum(parts.values()), max(parts, default=0) * seconds / PARTS
        ends = now_s + 2 * seconds + 3600
    else:
        ends = math.inf if counter.end_ns >= FOREVER_NS else counter.end_ns / SECOND_NS
    return _Told(stored_key(counter), storable(counter.key), settled, parts, ends)


class _AnewError(Exception):
    """What the tables had of us is gone, or another's."""


class Past(Protocol):
    """What the shared ledger has of calls that no spool here has any more."""

    forgets: bool  # the spool does not reach back as far as the windows do

    async def of_here(self, name: str, *, lost: bool, since_s: float | None) -> Counters | None:
        """`lost`: what was published is gone as well, so that the ledger has to tell all of it. `since_s`: what is from
        before is another directory's, and published."""

    async def of(self, name: str) -> Counters | None:
        """All of another sidecar."""


class SharedCounters:
    """Of one sidecar. `run` is to be started, once what its records say is in `counters`."""

    def __init__(
        self,
        database: Postgres,
        claim: Claim,
        counters: Counters,
        *,
        clock_s: Callable[[], float],
        wall_ns: Callable[[], int],
        past: Past | None = None,
    ) -> None:
        """`claim`: who this is in the database. `clock_s`: as in `Share`. `past`: None: nobody can tell."""
        self._db, self._claim, self._counters, self._past = database, claim, counters, past
        self._clock_s, self._wall_ns = clock_s, wall_ns
        self._waiting: dict[Counter, list[Callable[[bool], None]]] = {}
        self._soon: set[Counter] = set()
        self._wake = asyncio.Event()
        self._begun = False  # the tables are there, and what was there of ours is known
        self._started_s = clock_s()
        self._asked_past = past is None
        self._lost = self._derives = False  # what was published, of us and of whoever is no more
        self._offset_ns: int | None = None  # of the database's clock
        self._round_s = self._kept_s = self._sweep_s = 0.0
        self._differences: list[str] = []
        self._said: set[str] = set()  # in this outage
        self._said_of_others: set[str] = set()
        self._undecided = 0  # questions in this outage
        self._away_s = 0.0
        self.trouble = ""
        self.failures = 0  # questions without an answer, ever

    # -- for the owner ---------------------------------------------------------------------------

    def ask(self, lacking: Sequence[tuple[Counter, int]], then: Callable[[bool], None]) -> bool:
        """Lease so much more of each, and call `then` once it was tried: with False where the database did not answer.
        False at once: it does not answer now, and `then` is not called."""
        if self.trouble or (not self._begun and self._clock_s() - self._started_s > BEGIN_S):
            self._undecided += 1
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
    def is_copied(self) -> bool:
        """Whether another data directory counts by our name."""
        return self._claim.is_lost

    async def adopt(self, *, copy: bool) -> None:
        """Of a directory that writes to no ledger: as `Claim.adopt`."""
        await self._claim.adopt(copy=copy)

    @property
    def notes(self) -> list[str]:
        """For `/readyz`."""
        found = []
        if self.trouble:
            found.append(f"the shared limits cannot be counted: {self.trouble}")
        offset_ns = self._offset_ns or 0
        if abs(offset_ns) > CLOCK_OFF_S * SECOND_NS:
            way = "behind" if offset_ns > 0 else "ahead of"
            found.append(
                f"the clock here is {abs(offset_ns) // SECOND_NS} s {way} the database's, by which shared limits go"
            )
        return found + self._differences

    # -- the task --------------------------------------------------------------------------------

    async def run(self) -> None:
        """For ever."""
        while True:
            try:
                if not self._begun:
                    await self._begin()
                await self._round()
                if self.trouble:
                    log.warning(
                        "the shared limits are counted again",
                        extra={
                            "facts": {
                                "away_s": round(self._clock_s() - self._away_s),
                                "undecided": self._undecided,
                            }
                        },
                    )
                    self.trouble = ""
                    self._said.clear()
                self._undecided = 0
            except _AnewError:
                self._begun = False
                await asyncio.sleep(ANEW_S)
                continue
            except (PostgresError, TimeoutError) as error:
                self._failed(str(error) or f"{self._db.where} does not answer")
                await asyncio.sleep(ROUND_S)
                continue
            except Exception as error:  # whatever it is, calls do not wait for it, and it is said
                if type(error).__name__ not in self._said:
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
            with suppress(PostgresError, TimeoutError, _AnewError):
                await self._round()
        await self._db.close()

    def _failed(self, reason: str) -> None:
        """Said once in an outage, whatever it is called from one second to the next."""
        if reason not in self._said:
            log.warning("the shared limits cannot be counted, SIDECAR_GATE_ON_FAILURE decides: %s", reason)
            self._said.add(reason)
        if not self.trouble:
            self._away_s = self._clock_s()
        self.trouble = reason
        self.failures += 1
        self._begun = False  # it may be another database by the next time, or one that was put back
        self._soon.clear()
        waiting, self._waiting = self._waiting, {}
        for counter in waiting:
            assert counter.share is not None
            counter.share.demand = 0
        told = [one for ones in waiting.values() for one in ones]
        self._undecided += len(told)
        for one in told:
            one(False)

    async def _begin(self) -> None:
        """Also after every fault: then all is published anew."""
        async with asyncio.timeout(4 * QUESTION_S):
            await self._db.migrate(PART, STEPS)
            await self._make_again()
            try:
                taken = await self._claim.take(self._db)
            except OSError as error:
                raise PostgresError(f"the file {FILE} of the data directory: {error.strerror}", Fault.FAILED) from error
            async with self._db.transaction() as db:
                await self._compare_clocks(db)
                rows = await db.fetch(
                    f"SELECT name, settled, key FROM {SCHEMA}.limit_counters WHERE instance = $1"
                    " AND ends > clock_timestamp()",
                    self._claim.name,
                )
        self._lost = self._lost or (taken.made and not rows)
        self._derives = self._derives or taken.made
        if self._past is not None:
            try:
                await self._ask_past(self._past, rows, taken.since_s)
            except PostgresError:
                raise
            except StorageError as error:
                raise PostgresError(
                    f"what the ledger has of earlier calls cannot be read: {error}", Fault.FAILED
                ) from error
        for name, _, _ in rows:
            self._counters.by_key(name, self._wall_ns())  # known from now on, and published with the others
        self._tell_all()
        self._begun = True

    def _tell_all(self) -> None:
        for counter in self._counters.all():
            if counter.share is not None:
                counter.share.dirty, counter.share.stored = True, None

    async def _make_again(self) -> None:
        """Tables that somebody has dropped: what they had is published again by whoever has it."""
        async with self._db.transaction() as db:
            there = "SELECT bool_and(to_regclass(name) IS NOT NULL) FROM unnest($1::text[]) AS t (name)"
            if await db.fetchval(there, [f"{SCHEMA}.{name}" for name in _TABLES]):
                return
            await db.execute("SELECT pg_advisory_xact_lock($1::int, 0)", _LOCKS)
            for step in STEPS:
                for what in ("TABLE", "INDEX"):
                    step = step.replace(f"CREATE {what}", f"CREATE {what} IF NOT EXISTS")
                await db.execute(step)
        log.warning("tables of the shared limits were gone, and are made again")

    async def _ask_past(self, past: Past, rows: Sequence[Any], since_s: float | None) -> None:
        """What the ledger knows of calls that nobody publishes: in a life once of our own, and of those who are no
        more wherever we find nothing of ourselves."""
        if not self._asked_past:
            found = None
            if past.forgets or self._lost:
                found = await past.of_here(self._claim.name, lost=self._lost, since_s=since_s)
            self._asked_past = True
            if found is not None:
                self._counters.absorb(found)
                self._counters.set_back(self._wall_ns())
            if past.forgets and not self._lost:
                self._keep_floors(rows)
        if not self._derives:
            return
        async with self._db.transaction() as db:
            if not await db.fetchval("SELECT to_regclass($1) IS NOT NULL", f"{SCHEMA}.instances"):
                silent = []
            else:
                silent = [str(row[0]) for row in await db.fetch(_SILENT, KEEP_S)]
        for name in silent:
            found = await past.of(name)
            if found is not None:
                found.set_back(self._wall_ns())
            async with self._db.transaction() as db:
                if await db.fetchval(_DERIVED, name, DERIVED) and found is not None:
                    await self._write(db, name, DERIVED, [_told(c, c.settled, c.parts) for c in found.all()])
        self._derives = False

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
                    told_all = await self._put(steps)
            except BaseException:
                for step in steps:
                    step.share.dirty = True
                    self._waiting.setdefault(step.counter, []).extend(step.waiting)
                raise
            for step, told in zip(steps, told_all, strict=True):
                share = step.share
                share.stored = (told.settled, told.ends)
                share.others_settled, share.others_leased, share.room = (
                    step.settled_others,
                    step.leased_others,
                    step.room,
                )
                share.answered(step.published, step.lease, before_s + USED_S, step.counter.out)
            for one in [one for step in steps for one in step.waiting]:
                one(True)
        now_s = self._clock_s()
        if not self._kept_s or now_s - self._kept_s > KEEP_S:
            await self._keep()
            self._kept_s = now_s
        if now_s - self._sweep_s > SWEEP_S:
            self._sweep_s = now_s
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
            shift = shift_of(self._offset_ns or 0, sliding.seconds * SECOND_NS // PARTS)
            parts = {part + shift: amount for part, amount in counter.parts.items()}
        ahead = 0
        if share.blocks and counter.limit.unit != "concurrent":
            spare = keep - counter.out
            ahead = max(ahead_of(share.rate, counter.limit.amount) - spare, 0)
        return _Step(
            counter,
            share,
            stored_key(counter),
            share.unpublished,
            keep,
            demand if share.blocks else 0,
            ahead,
            self._waiting.pop(counter, ()),
            parts,
            sum(parts.values()) if sliding is not None else counter.settled,
        )

    async def _put(self, steps: Sequence[_Step]) -> list[_Told]:
        me = self._claim.name
        keys = [step.key for step in steps]
        async with self._db.transaction() as db:
            await db.execute(_LOCK, keys, _LOCKS)
            told = [_told(step.counter, step.settled, step.parts, self._now_s()) for step in steps]
            if await self._write(db, me, self._claim.nonce, told) < len(told):
                raise _AnewError
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
                )
            if nothing := [step.key for step in steps if not step.lease and step.share.told]:
                await db.execute(_GIVE_BACK, me, nothing)
        return told

    async def _compare_clocks(self, db: Connection) -> None:
        """What was found before holds as long as this answer allows it, which may have been long under way."""
        before_ns = self._wall_ns()
        now_ns = round(float(await db.fetchval(_CLOCK)) * SECOND_NS)
        after_ns = self._wall_ns()
        told_ns = self._offset_ns
        known = now_ns - (before_ns + after_ns) // 2 if told_ns is None else told_ns
        self._offset_ns = min(max(known, now_ns - max(before_ns, after_ns)), now_ns - min(before_ns, after_ns))
        if told_ns is not None and abs(self._offset_ns - told_ns) > CLOCK_OFF_S * SECOND_NS:
            # One of the two was set: the parts of sliding windows have other numbers there from now on.
            for counter in self._counters.all():
                if counter.share is not None and counter.limit.sliding is not None:
                    counter.share.dirty = True
        self._counters.shift_ns = self._offset_ns

    def _now_s(self) -> float:
        """By the database's clock."""
        return (self._wall_ns() + (self._offset_ns or 0)) / SECOND_NS

    @staticmethod
    async def _write(db: Connection, instance: str, nonce: str, told: Sequence[_Told]) -> int:
        """How many rows that makes; 0: another directory has the name."""
        said = await db.execute(
            _PUBLISH,
            instance,
            [one.key for one in told],
            [one.name for one in told],
            [str(one.settled) for one in told],
            [json.dumps(one.parts) for one in told],
            [None if one.ends == math.inf else one.ends for one in told],
            nonce,
        )
        return int(said.rpartition(" ")[2])

    async def _keep(self) -> None:
        """That we are here and by which limits, and whether the tables still have what we published: somebody may have
        emptied them, or put an older state back, without anything failing."""
        mine = json.dumps({name: described(limit) for name, limit in self._counters.limits.items()}, sort_keys=True)
        horizon_s = self._now_s() + KEEP_S
        async with asyncio.timeout(QUESTION_S), self._db.transaction() as db:
            if await db.fetchval(_SEEN, self._claim.name, self._claim.nonce, mine) is None:
                raise _AnewError
            others = await db.fetch(_OTHERS, self._claim.name, mine, SEEN_S)
            count, total = await db.fetchrow(_TOLD, self._claim.name, horizon_s)
        stored = [c.share.stored for c in self._counters.all() if c.share is not None and c.share.stored is not None]
        kept = [settled for settled, ends_s in stored if ends_s > horizon_s]
        if count < len(kept) or total < sum(kept):
            log.warning("the tables of the shared limits have lost what was told: all of it is told again")
            self._tell_all()
            self._round_s = 0.0
        self._differences = differences(json.loads(mine), {str(name): json.loads(text) for name, text in others})
        for text in self._differences:
            if text not in self._said_of_others:
                self._said_of_others.add(text)
                log.warning("%s", text)
        self._said_of_others &= set(self._differences)

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
                    return await fleet_rows(self._db, self._claim.name, self._counters)
            except (PostgresError, TimeoutError) as error:
                log.info("the fleet's limits could not be read: %s", error)
        return self._counters.rows(self._wall_ns())


async def fleet_rows(database: Postgres, instance: str, counters: Counters) -> list[Row]:
    """Where each counter of these limits stands in the whole fleet, by the database's clock. `instance`: who asks.
    Raises `PostgresError`."""
    limits = list(counters.limits.values())
    async with database.transaction(read_only=True) as db:
        at_ns = round(float(await db.fetchval(_CLOCK)) * SECOND_NS)
        found = await db.fetch(
            _ALL,
            [limit.name for limit in limits],
            [limit.unit for limit in limits],
            [_seconds(limit) for limit in limits],
        )
    shares: dict[str, dict[str, tuple[int, int]]] = {}
    for name, sidecar, settled, leased in found:
        if settled or leased:
            shares.setdefault(str(name), {})[str(sidecar)] = (int(settled), int(leased))
    rows: dict[str, list[Row]] = {limit.name: [] for limit in limits}
    for name, by in shares.items():
        limit_name, _, rest = name.partition("|")
        scope = rest.rpartition("|")[0]
        limit = counters.limits[limit_name]
        until_ns = counters.end_ns(limit, name, scope, at_ns)
        if until_ns is None:
            continue
        until = None if until_ns >= FOREVER_NS else until_ns
        used, leased = (sum(share[place] for share in by.values()) for place in (0, 1))
        ordered = dict(sorted(by.items(), key=lambda one: (-one[1][0] - one[1][1], one[0])))
        rows[limit_name].append(Row(limit, scope, used, leased, until, by.get(instance, (0, 0)), ordered))
    return [row for name in rows for row in sorted(rows[name], key=lambda r: (-r.used - r.reserved, r.scope))]


def described(limit: Limit) -> str:
    """A limit in a line, for whoever has another under its name."""
    of = ", ".join(f"{name} {value}" for name, value in limit.scopes) or "everybody"
    window = f" in {limit.window_text}" if limit.window_text else ""
    if isinstance(limit.window, Calendar) and limit.window_text not in ("", "total"):
        anchored = f", day {limit.window.anchor_day}" if limit.window.anchor_day != 1 else ""
        window += f" ({limit.window.zone}{anchored})"
    return f"{limit.text(limit.amount)} {limit.unit}{window} of {of}, {limit.action.value}"


def differences(mine: Mapping[str, str], others: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What sidecars that share limits have otherwise than we do: each goes by its own."""
    found = []
    for name, theirs in others.items():
        for limit in sorted({*mine, *theirs}):
            here, there = mine.get(limit, "no such limit"), theirs.get(limit, "no such limit")
            if here != there:
                found.append(f"limit {limit}: {name} has {there}; here it is {here}")
    if len(found) > DIFFERENCES_MAX:
        found[DIFFERENCES_MAX:] = [f"and {len(found) - DIFFERENCES_MAX} more limits that other sidecars have otherwise"]
    return found
