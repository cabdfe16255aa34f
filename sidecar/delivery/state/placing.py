"""The first place of a record: sealed into requests, skipped, parked, or known to be lost.

What must always hold: the cursor moves in the same transaction, and no further than over records that have their place.
Records that were skipped unseen, before their backend was configured, may get one later, as if they were new.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Collection

from sidecar.delivery.state import cursors, requests
from sidecar.delivery.state.aside import park, skip, skip_range
from sidecar.delivery.state.books import Books
from sidecar.delivery.state.rows import Member, Range, Sealing, StateBusy, Unskip
from sidecar.delivery.types import BEFORE, GAP, MISSING, Parking, Term


def seal(books: Books, sealing: Sealing, now_s: float) -> list[int]:
    """Store requests with bytes, key and members, and move the cursor over their records. Returns their ids."""
    cursor = sealing.cursor
    cursors.move(books.conn, cursor, sealing.from_seq, sealing.to_seq)
    ids = _place(books, cursor, sealing, now_s, sealing.at_once)
    for hole in sealing.holes:
        skip_range(books.conn, cursor, MISSING, hole.first_seq, hole.last_seq, hole.records)
        books.add(cursor, Term.SKIPPED, hole.records, MISSING)
    return ids


def ranges(conn: sqlite3.Connection, backend: str) -> list[Range]:
    """What was skipped for a backend without being looked at."""
    rows = conn.execute(
        "SELECT skipped.id, cursor, instance, first_seq, last_seq, n, reason FROM skipped"
        " JOIN cursor ON cursor.id = skipped.cursor"
        " WHERE backend = ? AND reason IN (?, ?) AND seqs IS NULL AND n > 0 ORDER BY skipped.id",
        (backend, BEFORE, GAP),
    ).fetchall()
    return [Range(*row) for row in rows]


def unskip(books: Books, step: Unskip, now_s: float) -> list[int]:
    """Let records out of such a range, as if they were sealed for the first time."""
    left = books.conn.execute(
        "UPDATE skipped SET n = n - ? WHERE id = ? AND n >= ?", (step.records, step.range, step.records)
    ).rowcount
    if left != 1:
        raise StateBusy("fewer records are skipped than were to be let go; run it again")
    books.add(step.cursor, Term.SKIPPED, -step.records, step.reason)
    return _place(books, step.cursor, step, now_s)


def _place(books: Books, cursor: int, step: Sealing | Unskip, now_s: float, at_once: Collection[int] = ()) -> list[int]:
    """Give records that had no place of their own the one that was decided for them."""
    conn = books.conn
    ids = [
        requests.insert(conn, cursor, new, now_s, under_way=index in at_once) for index, new in enumerate(step.requests)
    ]
    pending = Counter(m.seq for new in step.requests for m in new.members)
    parked_of: dict[int, list[str]] = {}
    for parked in step.parked:
        member = Member(parked.seq, parked.record_id, parked.event_id or parked.record_id)
        park(
            conn, cursor, member, Parking(parked.reason, parked.maybe_taken), parked.line, now_s, history=parked.history
        )
        parked_of.setdefault(parked.seq, []).append(parked.reason)
    for seq in pending.keys() | parked_of.keys():
        books.enter(cursor, seq, pending[seq], parked_of.get(seq, ()))
    for reason, seqs in step.skipped.items():
        skip(conn, cursor, reason, seqs)
        books.add(cursor, Term.SKIPPED, len(seqs), reason)
    return ids
