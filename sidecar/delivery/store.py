"""The state of delivery: how far each backend is, what is sealed, what was said of it, what is parked.

What must always hold: a cursor moves only in the transaction that stores what the records behind it became; nothing may
be sent that is not stored here with bytes, key and members; verdicts, counters and parked rows change together.

Written through one connection, one public method a transaction. The methods block, and may be called from any one
thread at a time; `run` calls one in the store's own thread, so that the event loop never waits for a disk, and
`patiently` waits until a full one has room again. What to do next is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import orjson

from sidecar.delivery import cursor_rows, request_rows
from sidecar.delivery.counters import Counters, Shift
from sidecar.delivery.cursor_rows import Back, Count
from sidecar.delivery.database import Connection, Database, DatabaseFile
from sidecar.delivery.queries import DeliveryQueries, Record, records_between, runs_between
from sidecar.delivery.rows import (
    Amendment,
    Committed,
    Cursor,
    Member,
    NewRequest,
    Place,
    Range,
    Redrive,
    Request,
    Run,
    Sealing,
    Settlement,
    StateBusy,
    StateError,
    StateFull,
    Turn,
    Unskip,
)
from sidecar.delivery.types import BEFORE, GAP, MISSING, Fate, Parking, Term, Tries, worst

_LOG = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

FULL_RETRY_S = 1.0  # how often a full disk is asked again whether a step fits
FOLD_RECORDS: Final = 2_000  # of one cursor forgotten in one transaction: a few milliseconds
TAKEN: Final = {Fate.DELIVERED: Term.DELIVERED, Fate.DUPLICATE: Term.DUPLICATE}
_LIVE: Final = (Term.PARKED.value, Term.OPEN.value)
_PARTED: Final = 2  # `backend.removed`: 1 while its remainder is being parked, 2 when that is done


@dataclass(slots=True)
class Configured:
    """What a start has found. Counts of records by backend, where there are any."""

    gone: list[str] = field(default_factory=list)  # configured no more: to part with
    before: dict[str, int] = field(default_factory=dict)  # skipped: made before it was first configured
    back: dict[str, Back] = field(default_factory=dict)  # configured again


class DeliveryStore:
    """The state of delivery, open for writing, with a thread of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.created = database.created
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="delivery-store")

    @classmethod
    def open(cls, path: Path) -> DeliveryStore:
        """The one in this file."""
        return cls(DatabaseFile(path))

    @property
    def where(self) -> str:
        """Which one it is, in messages."""
        return self._database.where

    def queries(self) -> DeliveryQueries:
        """For counting and listing, beside its writer."""
        return DeliveryQueries(self._database.reader())

    def close(self) -> None:
        self._executor.shutdown()
        self._database.close()

    def reopen(self) -> None:
        """A new connection after a failed write: what the old one believed is forgotten."""
        self._database.reopen()

    async def run(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Do blocking work in the thread that this file belongs to."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, lambda: work(*args, **kwargs))

    async def patiently(self, backend: str, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """The same, again and again while there is no room on the disk: no verdict is lost to a full one."""
        said = False
        while True:
            try:
                return await self.run(work, *args, **kwargs)
            except StateFull as error:
                if not said:
                    _LOG.error(str(error), extra={"facts": {"backend": backend}})
                said = True
                await asyncio.sleep(FULL_RETRY_S)

    # --- backends and cursors ---------------------------------------------------------------------

    def configure(
        self,
        names: Sequence[str],
        places: Sequence[Place],
        now_s: float,
        *,
        count: Count = lambda instance, after, upto: upto - after,
        skip_gaps: bool = False,
    ) -> Configured:
        """Note which backends are configured now, and give new ones their cursors.

        In a file that has served before, a new backend begins behind the records that are there.
        In an empty one (the first start, or its predecessor is lost) it begins with them all, and what is there
        already counts as perhaps delivered. One that was left out for a while goes on where it stopped, unless
        gaps are to be skipped. `count` asks a spool how many records it still has between two numbers.
        """
        with self._step() as counters:
            conn, found = counters.conn, Configured()
            known = dict(conn.execute("SELECT name, removed FROM backend").fetchall())
            served = conn.execute("SELECT EXISTS(SELECT 1 FROM meta WHERE name = 'served')").fetchone()[0]
            conn.execute("INSERT INTO meta(name, value) VALUES('served', ?) ON CONFLICT DO NOTHING", (now_s,))
            for name in names:
                if name not in known:
                    found.before[name] = cursor_rows.begin_backend(counters, name, places, first=not served)
                elif known[name] != 0:
                    found.back[name] = cursor_rows.return_backend(counters, name, places, count, skip=skip_gaps)
            conn.executemany(
                "INSERT INTO backend(name, since_s) VALUES(?, ?)"
                " ON CONFLICT(name) DO UPDATE SET since_s ="
                " CASE WHEN backend.removed = 0 THEN backend.since_s ELSE excluded.since_s END, removed = 0",
                [(name, now_s) for name in names],
            )
            found.gone = [name for name, removed in known.items() if name not in names and removed != _PARTED]
            conn.executemany("UPDATE backend SET removed = 1 WHERE name = ?", [(name,) for name in found.gone])
        return found

    def parted(self, name: str) -> None:
        """A removed backend's remainder is parked: there is nothing left to do for it."""
        with self._step() as counters:
            counters.conn.execute("UPDATE backend SET removed = ? WHERE name = ? AND removed = 1", (_PARTED, name))

    def served(self) -> list[str]:
        """The backends that this file works for."""
        with self._held() as conn:
            return [name for (name,) in conn.execute("SELECT name FROM backend WHERE removed = 0 ORDER BY name")]

    def cursors(self, backend: str) -> list[Cursor]:
        with self._held() as conn:
            return cursor_rows.cursors_of(conn, backend)

    def all_cursors(self) -> dict[str, int]:
        """How far each backend is in each spool, by "backend instance"."""
        with self._held() as conn:
            rows = conn.execute("SELECT backend, instance, seq FROM cursor").fetchall()
        return {f"{backend} {instance}": int(seq) for backend, instance, seq in rows}

    def start_cursor(self, backend: str, instance: str) -> Cursor:
        """A cursor at the beginning of an instance's spool: one that appeared while this backend was configured."""
        with self._step() as counters:
            return cursor_rows.start_cursor(counters.conn, backend, instance)

    # --- clock ------------------------------------------------------------------------------------

    def saw_clock(self, wall_s: float) -> float | None:
        """Keep the wall clock's latest reading; returns the one before."""
        with self._step() as counters:
            row = counters.conn.execute("SELECT value FROM meta WHERE name = 'wall_s'").fetchone()
            counters.conn.execute(
                "INSERT INTO meta(name, value) VALUES('wall_s', ?)"
                " ON CONFLICT(name) DO UPDATE SET value = excluded.value",
                (wall_s,),
            )
        return None if row is None else float(row[0])

    def last_clock(self) -> float | None:
        """The wall clock when delivery last looked at it."""
        with self._held() as conn:
            row = conn.execute("SELECT value FROM meta WHERE name = 'wall_s'").fetchone()
        return None if row is None else float(row[0])

    def expire_risks(self) -> int:
        """The clock stepped: no open request that may have been taken is recognised for sure any more."""
        with self._step() as counters:
            return counters.conn.execute(
                "UPDATE sealed SET expired = 1"
                " WHERE settled = 0 AND expired = 0 AND (risk_s IS NOT NULL OR under_way = 1)"
            ).rowcount

    # --- the way of a record ----------------------------------------------------------------------

    def commit(self, turn: Turn) -> Committed:
        """Store what was said of requests, that others are offered now, and new ones."""
        with self._step() as counters:
            conn = counters.conn
            _check(counters, turn)
            children = [_settle(counters, one, turn.now_s) for one in turn.settled]
            conn.executemany(
                "UPDATE sealed SET under_way = 1, attempts = attempts + 1, started_s = ? WHERE id = ?",
                [(turn.now_s, request) for request in turn.begin],
            )
            loaded = {request: request_rows.load(conn, request) for request in turn.load}
            sealed = [] if turn.sealing is None else _seal(counters, turn.sealing, turn.now_s)
        return Committed(children, sealed, loaded)

    def open_requests(self, backend: str) -> list[Request]:
        """All sealed requests without a verdict, oldest first, without their bytes."""
        with self._held() as conn:
            rows = conn.execute(
                "SELECT sealed.id, cursor, key, subject, members, records, size_bytes, oldest_s, attempts, risk_s,"
                " expired, forced, due_s, under_way, started_s, generation, history FROM sealed"
                " JOIN cursor ON cursor.id = sealed.cursor WHERE settled = 0 AND backend = ? ORDER BY sealed.id",
                (backend,),
            ).fetchall()
        return [
            Request(
                id=row[0],
                cursor=row[1],
                key=row[2],
                subject=row[3],
                members=request_rows.read_members(row[4]),
                records=row[5],
                size_bytes=row[6],
                oldest_s=row[7],
                tries=Tries(attempts=row[8], risk_wall_s=row[9], expired=bool(row[10]), forced=bool(row[11])),
                due_s=row[12],
                under_way=bool(row[13]),
                started_s=row[14],
                generation=row[15],
                history=tuple(orjson.loads(row[16])),
            )
            for row in rows
        ]

    def lines(self, request: int) -> list[bytes]:
        """The records of a request, in the order in which its members first name them."""
        with self._held() as conn:
            return request_rows.lines(conn, request)

    def stored(self, request: int) -> NewRequest | None:
        """A settled request as it was sealed, while its bytes are kept."""
        with self._held() as conn:
            row = conn.execute(
                "SELECT members, oldest_s, generation, lines, attempts, risk_s, expired, started_s FROM sealed"
                " JOIN payload ON payload.request = sealed.id WHERE sealed.id = ?",
                (request,),
            ).fetchone()
            if row is None:
                return None
            # Whoever settled it may not have heard how its last attempt ended: then that one counts.
            risk_s = row[7] if row[4] and row[5] is None else row[5]
            sealed = request_rows.load(conn, request)
            return NewRequest(
                sealed=sealed,
                members=request_rows.read_members(row[0]),
                lines=tuple(request_rows.read_lines(row[3], sealed.body)),
                oldest_s=row[1],
                generation=row[2],
                tries=Tries(attempts=row[4], risk_wall_s=risk_s, expired=bool(row[6])),
            )

    def fold(self, instance: str, upto_seq: int) -> bool:
        """Forget settled requests of one instance up to a number, a slice a call; False when nothing is left to do.

        Behind `cursor.folded_seq` no request is looked at any more: a record there is either in the folded counters
        (it was settled for good) or has a row in `parts` (something of it is still open or parked).
        """
        more = False
        with self._step() as counters:
            for cursor, seq, folded in counters.conn.execute(
                "SELECT id, seq, folded_seq FROM cursor WHERE instance = ?", (instance,)
            ).fetchall():
                high = min(upto_seq, seq, folded + FOLD_RECORDS)
                _fold_cursor(counters.conn, cursor, folded, max(high, folded))
                more = more or high < min(upto_seq, seq)
        return more

    # --- what an operator corrects ----------------------------------------------------------------

    def redrive(self, step: Redrive, now_s: float) -> list[int]:
        """Mark parked events as moved and store the requests that carry them. Returns the ids of these."""
        with self._step() as counters:
            conn = counters.conn
            ids = request_rows.insert(conn, step.cursor, step.requests, now_s)
            going = Counter(m.seq for new in step.requests for m in new.members)
            leaving: dict[int, list[str]] = {}
            for parked in step.parked:
                leaving.setdefault(parked.seq, []).append(parked.reason)
                request_rows.release(conn, parked)
            for one in step.again:
                member = Member(one.seq, one.record_id, one.event_id or one.record_id)
                parking = Parking(one.reason, one.maybe_taken)
                generation, history = one.generation, one.history
                request_rows.park(
                    conn, step.cursor, member, parking, one.line, now_s, generation=generation, history=history
                )
            staying = Counter(one.seq for one in step.again)
            for seq, reasons in leaving.items():
                reason = step.skipped.get(seq, "")
                shift = Shift(parked=staying[seq] - len(reasons), pending=going[seq])
                term = counters.shift(step.cursor, seq, shift, was=Term.PARKED, reason=min(reasons), skip=reason)
                if term is Term.SKIPPED:
                    _pass_over(counters, step.cursor, seq, reason)
        return ids

    def amend(self, one: Amendment, now_s: float) -> bool:
        """Let a delivered event be so no more. False: it has moved meanwhile, or too little is remembered of it."""
        with self._step() as counters:
            return _amend(counters, one, now_s) if one.request else _amend_applied(counters, one, now_s)

    def ranges(self, backend: str) -> list[Range]:
        """What was skipped for a backend without being looked at."""
        with self._held() as conn:
            rows = conn.execute(
                "SELECT skipped.id, cursor, instance, first_seq, last_seq, n, reason FROM skipped"
                " JOIN cursor ON cursor.id = skipped.cursor"
                " WHERE backend = ? AND reason IN (?, ?) AND seqs IS NULL AND n > 0 ORDER BY skipped.id",
                (backend, BEFORE, GAP),
            ).fetchall()
        return [Range(*row) for row in rows]

    def known(self, cursor: int, after: int, upto: int) -> set[int]:
        """Which of these numbers have a place of their own already."""
        with self._held() as conn:
            found = set(records_between(conn, cursor, after, upto))
            for run in runs_between(conn, cursor, after, upto):
                found.update(range(run.first_seq, run.last_seq + 1))
            return found

    def unskip(self, step: Unskip, now_s: float) -> list[int]:
        """Let records out of a range that was skipped: as if they were sealed for the first time."""
        with self._step() as counters:
            left = counters.conn.execute(
                "UPDATE skipped SET n = n - ? WHERE id = ? AND n >= ?", (step.records, step.range, step.records)
            ).rowcount
            if left != 1:
                raise StateBusy("fewer records are skipped than were to be let go; run it again")
            counters.add(step.cursor, Term.SKIPPED, -step.records, step.reason)
            return _place(counters, step.cursor, step, now_s)

    # --- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _held(self) -> Iterator[Connection]:
        """The connection, for one thread at a time. What cannot be done is told with the name of what it is in."""
        with self._database.looking() as conn, self._named():
            yield conn

    @contextmanager
    def _step(self) -> Iterator[Counters]:
        """One transaction, with its counters. Counting and listing have connections of their own (`queries`)."""
        with self._database.writing() as conn, self._named():
            counters = Counters(conn)
            yield counters
            counters.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except StateError as error:
            raise type(error)(f"{self.where}: {error}") from error


# --- the way of a record ----------------------------------------------------------------------------


def _check(counters: Counters, turn: Turn) -> None:
    """That all is as its worker believes: asked at once and first, so that nothing that is stored then is asked back
    for. Nobody else writes meanwhile."""
    ids, sealing = [one.request.id for one in turn.settled], turn.sealing
    still_open, some_parts, seq = counters.conn.execute(
        f"SELECT (SELECT count(*) FROM sealed WHERE settled = 0 AND id IN ({', '.join('?' * len(ids)) or 'NULL'})),"
        " EXISTS(SELECT 1 FROM parts), (SELECT seq FROM cursor WHERE id = ?)",
        [*ids, 0 if sealing is None else sealing.cursor],
    ).fetchone()
    counters.any_parts = bool(some_parts)
    if still_open != len(ids):
        raise StateBusy("a request was settled before; its worker has to load again")
    if sealing is not None and seq != sealing.from_seq:
        raise StateBusy(f"a cursor is not at {sealing.from_seq}, where its worker believes it to be")


def _seal(counters: Counters, sealing: Sealing, now_s: float) -> list[int]:
    """Store requests with bytes, key and members, and move the cursor over their records. Returns their ids."""
    cursor = sealing.cursor
    counters.conn.execute("UPDATE cursor SET seq = ? WHERE id = ?", (sealing.to_seq, cursor))
    ids = _place(counters, cursor, sealing, now_s, sealing.at_once)
    for hole in sealing.holes:
        request_rows.skip_range(counters.conn, cursor, MISSING, hole.first_seq, hole.last_seq, hole.records)
        counters.add(cursor, Term.SKIPPED, hole.records, MISSING)
    for run in sealing.applied:
        _apply(counters, cursor, run)
    return ids


def _apply(counters: Counters, cursor: int, run: Run) -> None:
    """Records that are in the sums: the run before them grows, where they follow it."""
    done = counters.conn.execute(
        "UPDATE applied SET last_seq = ? WHERE cursor = ? AND last_seq = ? AND duplicate = ? AND first_seq ="
        " (SELECT max(first_seq) FROM applied WHERE cursor = ?)",
        (run.last_seq, cursor, run.first_seq - 1, int(run.duplicate), cursor),
    )
    if done.rowcount == 0:
        counters.conn.execute(
            "INSERT INTO applied(cursor, first_seq, last_seq, duplicate) VALUES(?, ?, ?, ?)",
            (cursor, run.first_seq, run.last_seq, int(run.duplicate)),
        )
    counters.add(cursor, Term.DUPLICATE if run.duplicate else Term.DELIVERED, run.records)


def _take_out(conn: Connection, cursor: int, seq: int) -> Run | None:
    """Let a record be in the sums no more: the run that held it is cut in two. None: none holds it."""
    row = conn.execute(
        "DELETE FROM applied WHERE cursor = ? AND first_seq <= ? AND last_seq >= ?"
        " RETURNING first_seq, last_seq, duplicate",
        (cursor, seq, seq),
    ).fetchone()
    if row is None:
        return None
    run = Run(row[0], row[1], bool(row[2]))
    conn.executemany(
        "INSERT INTO applied(cursor, first_seq, last_seq, duplicate) VALUES(?, ?, ?, ?)",
        [
            (cursor, first, last, row[2])
            for first, last in ((run.first_seq, seq - 1), (seq + 1, run.last_seq))
            if first <= last
        ],
    )
    return run


def _place(
    counters: Counters, cursor: int, step: Sealing | Unskip, now_s: float, at_once: Collection[int] = ()
) -> list[int]:
    """Give records that had no place of their own the one that was decided for them."""
    conn = counters.conn
    ids = request_rows.insert(conn, cursor, step.requests, now_s, at_once)
    pending = Counter(m.seq for new in step.requests for m in new.members)
    parked_of: dict[int, list[str]] = {}
    for parked in step.parked:
        member = Member(parked.seq, parked.record_id, parked.event_id or parked.record_id)
        request_rows.park(
            conn, cursor, member, Parking(parked.reason, parked.maybe_taken), parked.line, now_s, history=parked.history
        )
        parked_of.setdefault(parked.seq, []).append(parked.reason)
    if not parked_of and max(pending.values(), default=1) == 1:
        counters.add(cursor, Term.OPEN, len(pending))  # one event a record, as nearly always
    else:
        for seq in pending.keys() | parked_of.keys():
            counters.enter(cursor, seq, pending[seq], parked_of.get(seq, ()))
    for reason, seqs in step.skipped.items():
        request_rows.skip(conn, cursor, reason, seqs)
        counters.add(cursor, Term.SKIPPED, len(seqs), reason)
    return ids


def _settle(counters: Counters, one: Settlement, now_s: float) -> list[int]:
    """Store one attempt's end. Returns the ids of the requests that carry parts of it on."""
    if one.decision.open:
        _keep_open(counters.conn, one)
        return []
    conn, request, decision = counters.conn, one.request, one.decision
    conn.execute(
        "UPDATE sealed SET settled = 1, under_way = 0, fates = ?, history = ? WHERE id = ? AND settled = 0",
        ("".join(decision.fates), request_rows.write_history(one.history if decision.parked else ()), request.id),
    )
    if decision.parked:
        _park_events(conn, one, now_s)
    else:
        request_rows.drop_bytes(conn, request.id)
    children = request_rows.insert(conn, request.cursor, one.children, now_s)
    _count_settled(counters, one)
    return children


def _keep_open(conn: Connection, one: Settlement) -> None:
    tries = one.decision.tries
    conn.execute(
        "UPDATE sealed SET under_way = 0, due_s = ?, risk_s = ?, expired = ?, forced = ?,"
        " history = ? WHERE id = ? AND settled = 0",
        (
            one.due_s,
            tries.risk_wall_s,
            int(tries.expired),
            int(tries.forced),
            request_rows.write_history(one.history),
            one.request.id,
        ),
    )


def _park_events(conn: Connection, one: Settlement, now_s: float) -> None:
    request = one.request
    kept = request_rows.lines(conn, request.id)
    lines = dict(zip(dict.fromkeys(m.seq for m in request.members), kept, strict=True))
    for index, parking in one.decision.parked.items():
        member = request.members[index]
        request_rows.park(
            conn,
            request.cursor,
            member,
            parking,
            lines[member.seq],
            now_s,
            key=request.key,
            generation=request.generation,
            request=request.id,
            history=one.history,
        )


def _count_settled(counters: Counters, one: Settlement) -> None:
    request, decision = one.request, one.decision
    members = request.members
    going = Counter(m.seq for child in one.children for m in child.members)
    simple = len(members) == request.records and all(n == 1 for n in going.values())
    if simple and not counters.has_parts(request.cursor, [m.seq for m in members]):
        # One event a record: each goes straight to its new place.
        counters.add(request.cursor, Term.OPEN, -sum(fate is not Fate.MOVED for fate in decision.fates))
        for fate, count in Counter(decision.fates).items():
            if fate in TAKEN:
                counters.add(request.cursor, TAKEN[fate], count)
        for parking in decision.parked.values():
            counters.add(request.cursor, Term.PARKED, 1, parking.reason)
        return
    by_seq: dict[int, Counter[Fate]] = {}
    for member, fate in zip(members, decision.fates, strict=True):
        by_seq.setdefault(member.seq, Counter())[fate] += 1
    for seq, fates in by_seq.items():
        shift = Shift(
            pending=going[seq] - fates.total(),
            parked=fates[Fate.PARKED],
            delivered=fates[Fate.DELIVERED],
            duplicate=fates[Fate.DUPLICATE],
        )
        counters.shift(request.cursor, seq, shift, was=Term.OPEN)


# --- what is changed or forgotten --------------------------------------------------------------------


def _amend_applied(counters: Counters, one: Amendment, now_s: float) -> bool:
    """The same of a record that is in the sums of a backend that adds up."""
    conn, cursor, seq = counters.conn, one.cursor, one.member.seq
    (folded,) = conn.execute("SELECT folded_seq FROM cursor WHERE id = ?", (cursor,)).fetchone()
    run = None if seq <= folded else _take_out(conn, cursor, seq)
    if run is None:
        return False
    if one.parking is not None:
        request_rows.park(conn, cursor, one.member, one.parking, one.line, now_s, history=(one.note,))
    shift = Shift(parked=int(one.parking is not None), delivered=-int(not run.duplicate), duplicate=-int(run.duplicate))
    was = Term.DUPLICATE if run.duplicate else Term.DELIVERED
    if counters.shift(cursor, seq, shift, was=was, skip=one.skip) is Term.SKIPPED:
        _pass_over(counters, cursor, seq, one.skip)
    return True


def _amend(counters: Counters, one: Amendment, now_s: float) -> bool:
    """Let a delivered event be so no more. False: it has moved meanwhile, or too little is remembered of it."""
    conn, seq = counters.conn, one.member.seq
    row = conn.execute(
        "SELECT cursor, folded_seq, key, generation, fates, members FROM sealed"
        " JOIN cursor ON cursor.id = sealed.cursor WHERE sealed.id = ? AND settled = 1",
        (one.request,),
    ).fetchone()
    if row is None or seq <= row[1]:
        return False
    cursor, _, key, generation, fates, blob = row
    index = request_rows.read_members(blob).index(one.member)
    was = TAKEN.get(Fate(fates[index]))
    if was is None:
        return False
    fate = Fate.MOVED if one.parking is None else Fate.PARKED
    changed = fates[:index] + fate.value + fates[index + 1 :]
    conn.execute("UPDATE sealed SET fates = ? WHERE id = ?", (changed, one.request))
    if one.parking is not None:
        request_rows.park(
            conn,
            cursor,
            one.member,
            one.parking,
            one.line,
            now_s,
            key=key,
            generation=generation,
            request=one.request,
            history=(one.note,),
        )
    shift = Shift(
        parked=int(one.parking is not None),
        delivered=-int(was is Term.DELIVERED),
        duplicate=-int(was is Term.DUPLICATE),
    )
    if counters.shift(cursor, seq, shift, was=was, skip=one.skip) is Term.SKIPPED:
        _pass_over(counters, cursor, seq, one.skip)
    return True


def _pass_over(counters: Counters, cursor: int, seq: int, reason: str) -> None:
    """A record that had events has none any more. Behind the border of `fold` only sums are kept."""
    (folded,) = counters.conn.execute("SELECT folded_seq FROM cursor WHERE id = ?", (cursor,)).fetchone()
    if seq <= folded:
        counters.fold(cursor, Term.SKIPPED, reason)
    else:
        request_rows.skip(counters.conn, cursor, reason, [seq])


def _fold_cursor(conn: Connection, cursor: int, low: int, high: int) -> None:
    """Move the border from `low` to `high`, and drop what has become settled behind it."""
    gone: Counter[tuple[str, str]] = Counter()
    for seq, record in records_between(conn, cursor, low, high).items():
        place = record.place
        if place is None:
            continue
        if place[0] in _LIVE:
            _keep(conn, cursor, seq, record, place[1])
        else:
            gone[place] += 1
            conn.execute("DELETE FROM parts WHERE cursor = ? AND seq = ?", (cursor, seq))
    conn.execute("UPDATE cursor SET folded_seq = ? WHERE id = ?", (high, cursor))
    for reason, n in conn.execute(
        "SELECT reason, n FROM skipped WHERE cursor = ? AND last_seq <= ? AND last_seq > ? AND seqs IS NULL",
        (cursor, high, low),
    ):
        gone[(Term.SKIPPED.value, reason)] += n
    conn.execute("DELETE FROM skipped WHERE cursor = ? AND last_seq <= ?", (cursor, high))
    for run in runs_between(conn, cursor, low, high):
        gone[(Term.DUPLICATE.value if run.duplicate else Term.DELIVERED.value, "")] += run.records
    conn.execute("DELETE FROM applied WHERE cursor = ? AND last_seq <= ?", (cursor, high))
    conn.execute("UPDATE applied SET first_seq = ? WHERE cursor = ? AND first_seq <= ?", (high + 1, cursor, high))
    for delivered, duplicate in conn.execute(
        "DELETE FROM parts WHERE cursor = ? AND seq <= ? AND pending = 0 AND parked = 0 RETURNING delivered, duplicate",
        (cursor, high),
    ).fetchall():
        gone[(worst(parked=0, pending=0, delivered=delivered, duplicate=duplicate).value, "")] += 1
    # A request that something parked came from stays: a redrive may need its members.
    conn.execute(
        "DELETE FROM sealed WHERE cursor = ? AND last_seq <= ? AND settled = 1 AND instr(fates, ?) = 0",
        (cursor, high, Fate.PARKED.value),
    )
    conn.executemany(
        "INSERT INTO counter(cursor, folded, term, reason, n) VALUES(?, 1, ?, ?, ?)"
        " ON CONFLICT(cursor, folded, term, reason) DO UPDATE SET n = counter.n + excluded.n",
        [(cursor, term, reason, n) for (term, reason), n in gone.items()],
    )


def _keep(conn: Connection, cursor: int, seq: int, record: Record, reason: str) -> None:
    conn.execute(
        "INSERT INTO parts(cursor, seq, pending, parked, delivered, duplicate, reason) VALUES(?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT(cursor, seq) DO UPDATE SET pending = excluded.pending, parked = excluded.parked,"
        " delivered = excluded.delivered, duplicate = excluded.duplicate, reason = excluded.reason",
        (cursor, seq, record.pending, len(record.parked), record.delivered, record.duplicate, reason),
    )
