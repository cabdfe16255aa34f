"""Forgetting settled records without losing count of them.

Behind `cursor.folded_seq` no request is looked at any more: a record there is either in the folded counters
(it was settled for good) or has a row in `parts` (something of it is still open or parked).
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Final

from sidecar.delivery.state.accounts import Record, records_between
from sidecar.delivery.types import Fate, Term, worst

FOLD_RECORDS: Final = 2_000  # of one cursor in one transaction: a few milliseconds
_LIVE: Final = (Term.PARKED.value, Term.OPEN.value)


def fold(conn: sqlite3.Connection, instance: str, upto_seq: int) -> bool:
    """Forget what is settled of one instance up to a number, a slice of each cursor; whether more is left to do."""
    more = False
    for cursor, seq, folded in conn.execute(
        "SELECT id, seq, folded_seq FROM cursor WHERE instance = ?", (instance,)
    ).fetchall():
        high = min(upto_seq, seq, folded + FOLD_RECORDS)
        _fold_cursor(conn, cursor, folded, max(high, folded))
        more = more or high < min(upto_seq, seq)
    return more


def _fold_cursor(conn: sqlite3.Connection, cursor: int, low: int, high: int) -> None:
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
        " ON CONFLICT DO UPDATE SET n = n + excluded.n",
        [(cursor, term, reason, n) for (term, reason), n in gone.items()],
    )


def _keep(conn: sqlite3.Connection, cursor: int, seq: int, record: Record, reason: str) -> None:
    conn.execute(
        "INSERT OR REPLACE INTO parts(cursor, seq, pending, parked, delivered, duplicate, reason)"
        " VALUES(?, ?, ?, ?, ?, ?, ?)",
        (cursor, seq, record.pending, len(record.parked), record.delivered, record.duplicate, reason),
    )
