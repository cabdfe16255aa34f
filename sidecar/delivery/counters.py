"""The running count of records by term, kept in the same transaction as what it counts.

A record with one event needs no row of its own: its place follows from its request. One with several has a row in
`parts` and counts once, by its worst event. `queries` counts the same again from rows alone; the two must agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from sidecar.delivery.database import Connection
from sidecar.delivery.types import Term, worst

Key = tuple[int, int, str, str]  # cursor, folded, term, reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """How the events of one record change places."""

    pending: int = 0
    parked: int = 0
    delivered: int = 0
    duplicate: int = 0


@dataclass(slots=True)
class Counters:
    """The changes of one transaction; `close` writes them."""

    conn: Connection
    changes: Counter[Key] = field(default_factory=Counter)
    any_parts: bool | None = None  # whether `parts` has a row at all; None: not looked at yet

    def add(self, cursor: int, term: Term, count: int, reason: str = "") -> None:
        if count:
            self.changes[(cursor, 0, term.value, reason)] += count

    def fold(self, cursor: int, term: Term, reason: str) -> None:
        """A record that keeps no row of its own: it is counted among the folded ones."""
        self.changes[(cursor, 1, term.value, reason)] += 1

    def enter(self, cursor: int, seq: int, events: int, parked: Sequence[str] = ()) -> None:
        """A record is sealed into so many events; others of it, or all, are parked for these reasons."""
        term, reason = (Term.PARKED, min(parked)) if parked else (Term.OPEN, "")
        self.add(cursor, term, 1, reason)
        if events + len(parked) > 1:
            self._store(cursor, seq, (events, len(parked), 0, 0), reason)

    def has_parts(self, cursor: int, seqs: Collection[int]) -> bool:
        """Whether a record around these has a row of its own. Where no record has several events, none has."""
        if self.any_parts is None:
            (some,) = self.conn.execute("SELECT EXISTS(SELECT 1 FROM parts)").fetchone()
            self.any_parts = some == 1
        if not self.any_parts:
            return False
        (some,) = self.conn.execute(
            "SELECT EXISTS(SELECT 1 FROM parts WHERE cursor = ? AND seq BETWEEN ? AND ?)",
            (cursor, min(seqs), max(seqs)),
        ).fetchone()
        return bool(some)

    def shift(self, cursor: int, seq: int, shift: Shift, *, was: Term, reason: str = "", skip: str = "") -> Term:
        """Move events of one record. `was` is the place of its only event, where it has no row.

        `reason` is the old one for a record that was parked, `skip` the one for a record that
        loses all its events. Rows of `parked` must be in place already.
        """
        row = self.conn.execute(
            "SELECT pending, parked, delivered, duplicate, reason FROM parts WHERE cursor = ? AND seq = ?",
            (cursor, seq),
        ).fetchone()
        if row is None:
            counts = (
                int(was is Term.OPEN),
                int(was is Term.PARKED),
                int(was is Term.DELIVERED),
                int(was is Term.DUPLICATE),
            )
            old = (was, reason if was is Term.PARKED else "")
        else:
            counts = row[:4]
            term = _term(counts)
            old = (term, row[4] if term is Term.PARKED else "")
        after = (
            counts[0] + shift.pending,
            counts[1] + shift.parked,
            counts[2] + shift.delivered,
            counts[3] + shift.duplicate,
        )
        if min(after) < 0:
            raise ValueError(f"record {seq} would have {after} events by place: delivery.db contradicts itself")
        new = self._place(cursor, seq, after, skip)
        if row is not None or sum(after) > 1:
            self._store(cursor, seq, after, new[1])
        self.add(cursor, old[0], -1, old[1])
        self.add(cursor, new[0], 1, new[1])
        return new[0]

    def close(self) -> None:
        self.conn.executemany(
            "INSERT INTO counter(cursor, folded, term, reason, n) VALUES(?, ?, ?, ?, ?)"
            " ON CONFLICT(cursor, folded, term, reason) DO UPDATE SET n = counter.n + excluded.n",
            [(*key, n) for key, n in self.changes.items() if n],
        )

    def _place(self, cursor: int, seq: int, counts: tuple[int, int, int, int], skip: str) -> tuple[Term, str]:
        if not any(counts):
            return Term.SKIPPED, skip
        term = _term(counts)
        if term is not Term.PARKED:
            return term, ""
        (lowest,) = self.conn.execute(
            "SELECT min(reason) FROM parked WHERE cursor = ? AND seq = ?", (cursor, seq)
        ).fetchone()
        return term, lowest or ""

    def _store(self, cursor: int, seq: int, counts: tuple[int, int, int, int], reason: str) -> None:
        if not any(counts):
            self.conn.execute("DELETE FROM parts WHERE cursor = ? AND seq = ?", (cursor, seq))
            return
        self.any_parts = True
        self.conn.execute(
            "INSERT INTO parts(cursor, seq, pending, parked, delivered, duplicate, reason) VALUES(?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT(cursor, seq) DO UPDATE SET pending = excluded.pending, parked = excluded.parked,"
            " delivered = excluded.delivered, duplicate = excluded.duplicate, reason = excluded.reason",
            (cursor, seq, *counts, reason),
        )


def _term(counts: tuple[int, int, int, int]) -> Term:
    return worst(pending=counts[0], parked=counts[1], delivered=counts[2], duplicate=counts[3])
