"""Sums over rows, and what is missing between them.

Each row says how many records had been recorded with it, so a row that can no longer be read leaves a gap in these
figures, and the gap says how many records it held.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from sidecar.spool.chunk import readable_rows

Place = tuple[int, int]
"""The next number, and how many records were recorded before it."""


def missing_between(at: Place, first_seq: int, recorded: int, after_seq: int) -> int:
    """How many records beyond `after_seq` should stand between `at` and `first_seq`, with `recorded` before it."""
    # Of a hole that `after_seq` lies in, what was read before the damage came is not missing.
    return max(min(recorded - at[1], first_seq - 1 - after_seq), 0)


def start_of(connection: sqlite3.Connection, after_seq: int) -> int:
    """The first number of the group that holds `after_seq`, or the last before it."""
    row = connection.execute(
        "SELECT first_seq FROM record_group WHERE first_seq <= ? ORDER BY first_seq DESC LIMIT 1", (after_seq,)
    ).fetchone()
    return int(row[0]) if row else 0


@dataclass(slots=True, frozen=True)
class Run:
    """What rows that follow each other add up to."""

    first_seq: int
    last_seq: int
    before: int  # recorded before the first
    recorded: int  # recorded with the last
    rows: int
    wanted: int  # of the rows, those inside the range that was asked for

    @property
    def missing(self) -> int:
        return max(self.recorded - self.before - self.rows, 0)


def runs(connection: sqlite3.Connection, after_seq: int, upto_seq: int) -> list[Run]:
    """The rows of one chunk inside a range: summed by SQLite, or one by one where a page is broken."""
    first_seq = after_seq + 1
    try:
        start = start_of(connection, after_seq)
        inside = "FROM record_group WHERE first_seq >= :start AND first_seq <= :upto AND last_seq >= :first"
        given = {"start": start, "first": first_seq, "upto": upto_seq}
        row = connection.execute(
            "SELECT min(first_seq), max(last_seq), min(recorded - count), max(recorded), sum(count),"
            f" sum(min(last_seq, :upto) - max(first_seq, :first) + 1) {inside}",
            given,
        ).fetchone()
        return [] if row[0] is None else [Run(*row)]
    except sqlite3.DatabaseError:
        columns = "first_seq, last_seq, recorded - count, recorded, count"
        rows = readable_rows(connection, "record_group", "first_seq", columns, 0, upto_seq + 1)
        return [
            Run(first, last, before, recorded, count, min(last, upto_seq) - max(first, first_seq) + 1)
            for first, last, before, recorded, count in rows
            if last > after_seq
        ]
