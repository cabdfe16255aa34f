"""What delivery must remember: how far each backend is, what is sealed, what was said of it, what is parked.

What must always hold: a cursor moves only in the transaction that stores what the records behind it
became; nothing may be sent that is not stored here with bytes, key and members; verdicts, counters and
parked rows change in one transaction. Written by delivery only, through one connection; all methods block and
may be called from any one thread at a time (a lock sees to it). What to do next is decided elsewhere.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import orjson

from sidecar.delivery.state.accounts import records_between
from sidecar.delivery.state.books import Books, Shift
from sidecar.delivery.state.folding import FOLD_RECORDS, fold_cursor
from sidecar.delivery.state.rows import (
    Amendment,
    Cursor,
    Member,
    NewParked,
    NewRequest,
    Parked,
    Place,
    Range,
    Redrive,
    Request,
    Sealing,
    Settlement,
    StateBusy,
    StateError,
    StateFull,
    Unskip,
)
from sidecar.delivery.state.schema import open_writer, told, transaction
from sidecar.delivery.words import BEFORE, MISSING, Fate, Parking, Term, Tries
from sidecar.verdict import Event, Sealed

__all__ = ["DeliveryState", "StateBusy", "StateError", "StateFull", "Turned"]

_PARTED: Final = 2  # `backend.removed`: 1 while its remainder is being parked, 2 when that is done
_FINAL: Final = {Fate.DELIVERED: Term.DELIVERED, Fate.DUPLICATE: Term.DUPLICATE, Fate.PARKED: Term.PARKED}


@dataclass(slots=True)
class Turned:
    """What one turn stored: ids of children by settlement and of new requests; the bytes of those due again."""

    children: list[list[int]] = field(default_factory=list)
    sealed: list[int] = field(default_factory=list)
    loaded: dict[int, Sealed] = field(default_factory=dict)


class DeliveryState:
    """`delivery.db`, open for writing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._conn, self.created = open_writer(path)
        with told(path):
            self._has_parts = self._one("SELECT EXISTS(SELECT 1 FROM parts)") == 1

    @classmethod
    def open(cls, path: Path) -> DeliveryState:
        return cls(path)

    def close(self) -> None:
        with self._lock, told(self.path):
            self._conn.close()

    def reopen(self) -> None:
        """A new connection after a failed write: what the old one believed is forgotten."""
        with self._lock:
            self._conn.close()
            self._conn, _ = open_writer(self.path)

    # --- backends and cursors ---------------------------------------------------------------------

    def configure(self, names: Sequence[str], places: Sequence[Place], now_s: float) -> list[str]:
        """Note which backends are configured now, and give new ones their cursors. Returns those to part with.

        In a file that has served before, a new backend begins behind the records that are there.
        In an empty one (the first start, or its predecessor is lost) it begins with them all, and what is there
        already counts as perhaps delivered.
        """
        with self._step() as conn:
            known = dict(conn.execute("SELECT name, removed FROM backend").fetchall())
            served = conn.execute("SELECT EXISTS(SELECT 1 FROM meta WHERE name = 'served')").fetchone()[0]
            conn.execute("INSERT OR IGNORE INTO meta(name, value) VALUES('served', ?)", (now_s,))
            for name in names:
                if known.get(name, 1) != 0:
                    self._begin(conn, name, places, first=not served)
            conn.executemany(
                "INSERT INTO backend(name, since_s) VALUES(?, ?)"
                " ON CONFLICT DO UPDATE SET since_s = iif(removed = 0, since_s, excluded.since_s), removed = 0",
                [(name, now_s) for name in names],
            )
            gone = [name for name, removed in known.items() if name not in names and removed != _PARTED]
            conn.executemany("UPDATE backend SET removed = 1 WHERE name = ?", [(name,) for name in gone])
        return gone

    def _begin(self, conn: sqlite3.Connection, name: str, places: Sequence[Place], *, first: bool) -> None:
        books = Books(conn)
        cursors = {c[0]: c[1:] for c in conn.execute("SELECT instance, id, seq FROM cursor WHERE backend = ?", (name,))}
        for place in places:
            if first:
                self._new_cursor(conn, name, place.instance, again_upto=place.last_seq)
                continue
            known = cursors.get(place.instance)
            cursor, seq = known or (self._new_cursor(conn, name, place.instance), 0)
            counted = _counted(conn, cursor)
            if place.last_seq > seq:
                self._move_cursor(conn, cursor, seq, place.last_seq)
            if place.recorded > counted:
                self._insert_range(conn, cursor, BEFORE, seq + 1, place.last_seq, place.recorded - counted)
                books.add(cursor, Term.SKIPPED, place.recorded - counted, BEFORE)
        books.close()

    def parted(self, name: str) -> None:
        """A removed backend's remainder is parked: there is nothing left to do for it."""
        with self._step() as conn:
            conn.execute("UPDATE backend SET removed = ? WHERE name = ? AND removed = 1", (_PARTED, name))

    def cursors(self, backend: str) -> list[Cursor]:
        with self._lock, told(self.path):
            rows = self._conn.execute(
                "SELECT id, backend, instance, seq, again_upto FROM cursor WHERE backend = ? ORDER BY instance",
                (backend,),
            ).fetchall()
        return [Cursor(id=r[0], backend=r[1], instance=r[2], seq=r[3], again_upto=r[4]) for r in rows]

    def start_cursor(self, backend: str, instance: str) -> Cursor:
        """A cursor at the beginning of an instance's spool: one that appeared while this backend was configured."""
        with self._step() as conn:
            cursor = self._new_cursor(conn, backend, instance)
        return Cursor(id=cursor, backend=backend, instance=instance, seq=0, again_upto=0)

    def _new_cursor(self, conn: sqlite3.Connection, backend: str, instance: str, again_upto: int = 0) -> int:
        row = conn.execute(
            "INSERT INTO cursor(backend, instance, seq, again_upto) VALUES(?, ?, 0, ?) RETURNING id",
            (backend, instance, again_upto),
        ).fetchone()
        return int(row[0])

    # --- clock ------------------------------------------------------------------------------------

    def saw_clock(self, wall_s: float) -> float | None:
        """Keep the wall clock's latest reading; returns the one before."""
        with self._step() as conn:
            row = conn.execute("SELECT value FROM meta WHERE name = 'wall_s'").fetchone()
            conn.execute(
                "INSERT INTO meta(name, value) VALUES('wall_s', ?) ON CONFLICT DO UPDATE SET value = excluded.value",
                (wall_s,),
            )
        return None if row is None else float(row[0])

    def expire_risks(self) -> int:
        """The clock stepped: no open request that may have been taken is recognised for sure any more."""
        with self._step() as conn:
            return conn.execute(
                "UPDATE sealed SET expired = 1"
                " WHERE settled = 0 AND expired = 0 AND (risk_s IS NOT NULL OR under_way = 1)"
            ).rowcount

    # --- the way of a record ----------------------------------------------------------------------

    def seal(self, sealing: Sealing, now_s: float) -> list[int]:
        """Store requests with bytes, key and members, and move the cursor over their records: one transaction."""
        with self._step() as conn:
            return self._seal(conn, sealing, now_s)

    def turn(
        self,
        settlements: Sequence[Settlement],
        begin: Sequence[int],
        load: Sequence[int],
        now_s: float,
        sealing: Sealing | None = None,
    ) -> Turned:
        """Store what was said of requests, that others are offered now, and new ones: one transaction."""
        turned = Turned()
        with self._step() as conn:
            books = Books(conn)
            for one in settlements:
                if one.decision.open:
                    self._keep_open(conn, one)
                    turned.children.append([])
                else:
                    turned.children.append(self._settle(conn, books, one, now_s))
            books.close()
            conn.executemany(
                "UPDATE sealed SET under_way = 1, attempts = attempts + 1, started_s = ? WHERE id = ?",
                [(now_s, request) for request in begin],
            )
            turned.loaded = {request: self._load(conn, request) for request in load}
            if sealing is not None:
                turned.sealed = self._seal(conn, sealing, now_s)
        return turned

    def open_requests(self, backend: str) -> list[Request]:
        """All sealed requests without a verdict, oldest first, without their bytes."""
        with self._lock, told(self.path):
            rows = self._conn.execute(
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
                members=read_members(row[4]),
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
        with self._lock, told(self.path):
            row = self._conn.execute("SELECT lines FROM payload WHERE request = ?", (request,)).fetchone()
        if row is None:
            raise StateError(f"{self.path}: request {request} has lost its bytes; run `metering-sidecar spool verify`")
        return split_lines(row[0])

    def stored(self, request: int) -> NewRequest | None:
        """A settled request as it was sealed, while its bytes are kept."""
        with self._lock, told(self.path):
            row = self._conn.execute(
                "SELECT members, oldest_s, generation, lines FROM sealed JOIN payload ON payload.request = sealed.id"
                " WHERE sealed.id = ?",
                (request,),
            ).fetchone()
            if row is None:
                return None
            sealed = self._load(self._conn, request)
        return NewRequest(
            sealed=sealed,
            members=read_members(row[0]),
            lines=tuple(split_lines(row[3])),
            oldest_s=row[1],
            generation=row[2],
        )

    def redrive(self, step: Redrive, now_s: float) -> list[int]:
        """Let parked events go on: one transaction marks them moved and stores the requests that carry them."""
        with self._step() as conn:
            books = Books(conn)
            ids = [self._insert(conn, step.cursor, new, now_s) for new in step.requests]
            going = Counter(m.seq for new in step.requests for m in new.members)
            leaving: dict[int, list[str]] = {}
            for parked in step.parked:
                leaving.setdefault(parked.seq, []).append(parked.reason)
                self._release(conn, parked)
            for seq, reasons in leaving.items():
                skip = step.skipped.get(seq, "")
                shift = Shift(parked=-len(reasons), pending=going[seq])
                term = books.shift(step.cursor, seq, shift, was=Term.PARKED, reason=min(reasons), skip=skip)
                if term is Term.SKIPPED:
                    self._pass_over(conn, books, step.cursor, seq, skip)
            self._has_parts = True
            books.close()
        return ids

    def amend(self, one: Amendment, now_s: float) -> bool:
        """Let a delivered event be so no more. False: it has moved meanwhile, or too little is remembered of it."""
        with self._step() as conn:
            row = conn.execute(
                "SELECT cursor, folded_seq, key, generation, fates, members FROM sealed"
                " JOIN cursor ON cursor.id = sealed.cursor WHERE sealed.id = ? AND settled = 1",
                (one.request,),
            ).fetchone()
            if row is None or one.member.seq <= row[1]:
                return False
            cursor, _, key, generation, fates, blob = row
            index = read_members(blob).index(one.member)
            was = _FINAL.get(Fate(fates[index]))
            if was not in (Term.DELIVERED, Term.DUPLICATE):
                return False
            fate = Fate.MOVED if one.parking is None else Fate.PARKED
            changed = fates[:index] + fate.value + fates[index + 1 :]
            conn.execute("UPDATE sealed SET fates = ? WHERE id = ?", (changed, one.request))
            if one.parking is not None:
                self._insert_parked_row(
                    conn, cursor, one.member, one.parking, one.line, now_s,
                    key=key, generation=generation, request=one.request, history=(one.note,),
                )  # fmt: skip
            shift = Shift(
                parked=int(one.parking is not None),
                delivered=-int(was is Term.DELIVERED),
                duplicate=-int(was is Term.DUPLICATE),
            )
            books = Books(conn)
            if books.shift(cursor, one.member.seq, shift, was=was, skip=one.skip) is Term.SKIPPED:
                self._pass_over(conn, books, cursor, one.member.seq, one.skip)
            books.close()
        return True

    def ranges(self, backend: str, reason: str = BEFORE) -> list[Range]:
        """What was skipped for a backend without being looked at."""
        with self._lock, told(self.path):
            rows = self._conn.execute(
                "SELECT skipped.id, cursor, instance, first_seq, last_seq, n FROM skipped"
                " JOIN cursor ON cursor.id = skipped.cursor"
                " WHERE backend = ? AND reason = ? AND seqs IS NULL AND n > 0 ORDER BY skipped.id",
                (backend, reason),
            ).fetchall()
        return [Range(*row) for row in rows]

    def known(self, cursor: int, after: int, upto: int) -> set[int]:
        """Which of these numbers have a place of their own already."""
        with self._lock, told(self.path):
            return set(records_between(self._conn, cursor, after, upto))

    def unskip(self, step: Unskip, now_s: float) -> list[int]:
        """Let records out of a range that was skipped: one transaction, as if they were sealed for the first time."""
        with self._step() as conn:
            left = conn.execute(
                "UPDATE skipped SET n = n - ? WHERE id = ? AND n >= ?", (step.records, step.range, step.records)
            ).rowcount
            if left != 1:
                raise StateBusy(f"{self.path}: fewer records are skipped than were to be let go; run it again")
            books = Books(conn)
            books.add(step.cursor, Term.SKIPPED, -step.records, BEFORE)
            ids = self._place(conn, books, step.cursor, step, now_s)
            books.close()
        return ids

    def fold(self, instance: str, upto_seq: int) -> bool:
        """Forget settled requests of one instance up to a number, a slice a call; False when nothing is left to do.

        Their records go on counting: their places are added to the folded counters, and what is still open or
        parked of them keeps a row in `parts`.
        """
        more = False
        with self._step() as conn:
            for cursor, seq, folded in conn.execute(
                "SELECT id, seq, folded_seq FROM cursor WHERE instance = ?", (instance,)
            ).fetchall():
                high = min(upto_seq, seq, folded + FOLD_RECORDS)
                fold_cursor(conn, cursor, folded, max(high, folded))
                more = more or high < min(upto_seq, seq)
            self._has_parts = True
        return more

    # --- inside a transaction ---------------------------------------------------------------------

    def _seal(self, conn: sqlite3.Connection, sealing: Sealing, now_s: float) -> list[int]:
        cursor = sealing.cursor
        self._move_cursor(conn, cursor, sealing.from_seq, sealing.to_seq)
        books = Books(conn)
        ids = self._place(conn, books, cursor, sealing, now_s, sealing.at_once)
        for hole in sealing.holes:
            self._insert_range(conn, cursor, MISSING, hole.first_seq, hole.last_seq, hole.records)
            books.add(cursor, Term.SKIPPED, hole.records, MISSING)
        books.close()
        return ids

    def _place(
        self,
        conn: sqlite3.Connection,
        books: Books,
        cursor: int,
        step: Sealing | Unskip,
        now_s: float,
        at_once: Collection[int] = (),
    ) -> list[int]:
        """Give records that had no place of their own the one that was decided for them."""
        ids = [
            self._insert(conn, cursor, new, now_s, under_way=index in at_once)
            for index, new in enumerate(step.requests)
        ]
        for seq, count in Counter(m.seq for new in step.requests for m in new.members).items():
            books.enter(cursor, seq, count)
            self._has_parts = self._has_parts or count > 1
        for reason, seqs in step.skipped.items():
            self._insert_skipped(conn, cursor, reason, seqs)
            books.add(cursor, Term.SKIPPED, len(seqs), reason)
        for parked in step.parked:
            self._insert_parked(conn, cursor, parked, now_s)
            books.add(cursor, Term.PARKED, 1, parked.reason)
        return ids

    def _move_cursor(self, conn: sqlite3.Connection, cursor: int, from_seq: int, to_seq: int) -> None:
        moved = conn.execute("UPDATE cursor SET seq = ? WHERE id = ? AND seq = ?", (to_seq, cursor, from_seq)).rowcount
        if moved != 1:
            raise StateBusy(f"{self.path}: a cursor is not at {from_seq}, where its lane believes it to be")

    def _insert(
        self, conn: sqlite3.Connection, cursor: int, new: NewRequest, now_s: float, *, under_way: bool = False
    ) -> int:
        seqs = [member.seq for member in new.members]
        sealed, tries = new.sealed, new.tries
        row = conn.execute(
            "INSERT INTO sealed(cursor, first_seq, last_seq, attempts, under_way, started_s, due_s, risk_s, expired,"
            " forced, generation, records, size_bytes, at_s, oldest_s, key, subject, version, history, members)"
            " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
            (
                cursor, min(seqs), max(seqs), tries.attempts + int(under_way), int(under_way), now_s, new.due_s,
                tries.risk_wall_s, int(tries.expired), int(tries.forced), new.generation, len(new.lines),
                request_size(new), now_s, new.oldest_s, sealed.key, sealed.subject, sealed.version,
                _dump(new.history), write_members(new.members),
            ),
        ).fetchone()  # fmt: skip
        conn.execute(
            "INSERT INTO payload(request, path, content_type, headers, body, lines) VALUES(?, ?, ?, ?, ?, ?)",
            (
                row[0], sealed.path, sealed.content_type, orjson.dumps(sealed.headers).decode(), sealed.body,
                b"\n".join(new.lines),
            ),
        )  # fmt: skip
        return int(row[0])

    def _load(self, conn: sqlite3.Connection, request: int) -> Sealed:
        row = conn.execute(
            "SELECT key, subject, version, attempts, members, path, content_type, headers, body FROM sealed"
            " JOIN payload ON payload.request = sealed.id WHERE sealed.id = ?",
            (request,),
        ).fetchone()
        if row is None:
            raise StateError(f"{self.path}: request {request} has lost its bytes; run `metering-sidecar spool verify`")
        return Sealed(
            key=row[0],
            subject=row[1],
            version=row[2],
            attempt=row[3],
            events=tuple(Event(m.record_id, m.event_id) for m in read_members(row[4])),
            path=row[5],
            content_type=row[6],
            headers=tuple((name, value) for name, value in orjson.loads(row[7])),
            body=row[8],
        )

    def _keep_open(self, conn: sqlite3.Connection, one: Settlement) -> None:
        tries = one.decision.tries
        self._still_open(
            conn.execute(
                "UPDATE sealed SET under_way = 0, due_s = ?, risk_s = ?, expired = ?, forced = ?,"
                " history = ? WHERE id = ? AND settled = 0",
                (
                    one.due_s, tries.risk_wall_s, int(tries.expired), int(tries.forced),
                    _dump(one.history), one.request.id,
                ),
            )
        )  # fmt: skip

    def _still_open(self, done: sqlite3.Cursor) -> None:
        if done.rowcount != 1:
            raise StateBusy(f"{self.path}: a request was settled before; its lane has to load again")

    def _settle(self, conn: sqlite3.Connection, books: Books, one: Settlement, now_s: float) -> list[int]:
        request, decision = one.request, one.decision
        self._still_open(
            conn.execute(
                "UPDATE sealed SET settled = 1, under_way = 0, fates = ?, history = ? WHERE id = ? AND settled = 0",
                ("".join(decision.fates), _dump(one.history if decision.parked else ()), request.id),
            )
        )
        if decision.parked:
            self._park(conn, one, now_s)
        else:
            conn.execute("DELETE FROM payload WHERE request = ?", (request.id,))
        children = [self._insert(conn, request.cursor, child, now_s) for child in one.children]
        self._count(conn, books, one)
        return children

    def _park(self, conn: sqlite3.Connection, one: Settlement, now_s: float) -> None:
        request = one.request
        (blob,) = conn.execute("SELECT lines FROM payload WHERE request = ?", (request.id,)).fetchone()
        lines = dict(zip(dict.fromkeys(m.seq for m in request.members), split_lines(blob), strict=True))
        for index, parking in one.decision.parked.items():
            member = request.members[index]
            self._insert_parked_row(
                conn, request.cursor, member, parking, lines[member.seq], now_s,
                key=request.key, generation=request.generation, request=request.id,
                history=one.history,
            )  # fmt: skip

    def _count(self, conn: sqlite3.Connection, books: Books, one: Settlement) -> None:
        request, decision = one.request, one.decision
        members = request.members
        going = Counter(m.seq for child in one.children for m in child.members)
        simple = len(members) == request.records and all(n == 1 for n in going.values())
        if simple and not (self._has_parts and self._parts_among(conn, request)):
            # One event a record: each goes straight to its new place.
            books.add(request.cursor, Term.OPEN, -sum(fate is not Fate.MOVED for fate in decision.fates))
            for fate, count in Counter(decision.fates).items():
                if fate in (Fate.DELIVERED, Fate.DUPLICATE):
                    books.add(request.cursor, _FINAL[fate], count)
            for parking in decision.parked.values():
                books.add(request.cursor, Term.PARKED, 1, parking.reason)
            return
        self._has_parts = True
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
            books.shift(request.cursor, seq, shift, was=Term.OPEN)

    def _parts_among(self, conn: sqlite3.Connection, request: Request) -> bool:
        seqs = [m.seq for m in request.members]
        row = conn.execute(
            "SELECT EXISTS(SELECT 1 FROM parts WHERE cursor = ? AND seq BETWEEN ? AND ?)",
            (request.cursor, min(seqs), max(seqs)),
        ).fetchone()
        return bool(row[0])

    def _insert_parked(self, conn: sqlite3.Connection, cursor: int, new: NewParked, now_s: float) -> None:
        member = Member(new.seq, new.record_id, new.record_id)
        self._insert_parked_row(
            conn, cursor, member, Parking(new.reason, new.maybe_taken), new.line, now_s,
            key="", generation=0, request=None, history=(),
        )  # fmt: skip

    def _insert_parked_row(
        self,
        conn: sqlite3.Connection,
        cursor: int,
        member: Member,
        parking: Parking,
        line: bytes,
        now_s: float,
        *,
        key: str,
        generation: int,
        request: int | None,
        history: tuple[str, ...],
    ) -> None:
        conn.execute(
            "INSERT INTO parked(cursor, seq, record_id, event_id, reason, maybe_taken, at_s, key, generation, request,"
            " line, history) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                cursor, member.seq, member.record_id, member.event_id, parking.reason, int(parking.maybe_taken), now_s,
                key, generation, request, line, _dump(history),
            ),
        )  # fmt: skip

    def _release(self, conn: sqlite3.Connection, parked: Parked) -> None:
        """Take a parked row away: its event goes on elsewhere. The old request remembers that it moved."""
        if conn.execute("DELETE FROM parked WHERE id = ?", (parked.id,)).rowcount != 1:
            raise StateBusy(f"{self.path}: parked event {parked.id} was redriven before")
        if parked.request is None:
            return
        row = conn.execute("SELECT members, fates FROM sealed WHERE id = ?", (parked.request,)).fetchone()
        if row is not None:
            fates = list(row[1])
            for index, member in enumerate(read_members(row[0])):
                if member.event_id == parked.event_id:
                    fates[index] = Fate.MOVED.value
            conn.execute("UPDATE sealed SET fates = ? WHERE id = ?", ("".join(fates), parked.request))
        left = conn.execute("SELECT EXISTS(SELECT 1 FROM parked WHERE request = ?)", (parked.request,)).fetchone()
        if not left[0]:
            conn.execute("DELETE FROM payload WHERE request = ?", (parked.request,))

    def _pass_over(self, conn: sqlite3.Connection, books: Books, cursor: int, seq: int, reason: str) -> None:
        """A record that had events has none any more. Behind the border of `fold` only sums are kept."""
        (folded,) = conn.execute("SELECT folded_seq FROM cursor WHERE id = ?", (cursor,)).fetchone()
        if seq <= folded:
            books.fold(cursor, Term.SKIPPED, reason)
        else:
            self._insert_skipped(conn, cursor, reason, [seq])

    def _insert_skipped(self, conn: sqlite3.Connection, cursor: int, reason: str, seqs: Sequence[int]) -> None:
        conn.execute(
            "INSERT INTO skipped(cursor, reason, first_seq, last_seq, n, seqs) VALUES(?, ?, ?, ?, ?, ?)",
            (cursor, reason, min(seqs), max(seqs), len(seqs), orjson.dumps(list(seqs))),
        )

    def _insert_range(
        self, conn: sqlite3.Connection, cursor: int, reason: str, first_seq: int, last_seq: int, count: int
    ) -> None:
        """Records that are not looked at one by one."""
        conn.execute(
            "INSERT INTO skipped(cursor, reason, first_seq, last_seq, n) VALUES(?, ?, ?, ?, ?)",
            (cursor, reason, first_seq, last_seq, count),
        )

    @contextmanager
    def _step(self) -> Iterator[sqlite3.Connection]:
        """One transaction; the hooks that decide nothing (counting, listing) use connections of their own."""
        with self._lock, told(self.path), transaction(self._conn):
            yield self._conn

    def _one(self, statement: str, *values: Any) -> Any:
        row = self._conn.execute(statement, values).fetchone()
        return None if row is None else row[0]


def write_members(members: Sequence[Member]) -> bytes:
    """An event's id is left out where it is its record's."""
    return orjson.dumps(
        [[m.seq, m.record_id] if m.event_id == m.record_id else [m.seq, m.record_id, m.event_id] for m in members]
    )


def read_members(blob: bytes) -> tuple[Member, ...]:
    return tuple(Member(row[0], row[1], row[-1]) for row in orjson.loads(blob))


def split_lines(blob: bytes) -> list[bytes]:
    return blob.split(b"\n")


def request_size(new: NewRequest) -> int:
    return len(new.sealed.body) + sum(map(len, new.lines))


def _dump(history: Sequence[str]) -> str:
    return orjson.dumps(tuple(history)).decode()


def _counted(conn: sqlite3.Connection, cursor: int) -> int:
    """How many records of a cursor's spool have a place already."""
    (n,) = conn.execute("SELECT coalesce(sum(n), 0) FROM counter WHERE cursor = ? AND folded = 0", (cursor,)).fetchone()
    return int(n)
