"""Which backends there are, and how far each one is in each instance's spool.

What must always hold: a backend has a place for every record of every spool from its first start on, so a new one's
cursor begins where the counters can account for all that lies before it. `move` belongs into the transaction that
stores what the records behind the cursor became.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from sidecar.delivery.state.aside import skip_range
from sidecar.delivery.state.books import Books
from sidecar.delivery.state.rows import Cursor, Place, StateBusy
from sidecar.delivery.types import BEFORE, GAP, RETIRED, Term

_PARTED: Final = 2  # `backend.removed`: 1 while its remainder is being parked, 2 when that is done


Count = Callable[[str, int, int], int]
"""Of an instance's spool: how many records it has with `after < seq <= upto`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """What was recorded while a backend was left out."""

    pending: int  # to be delivered now
    skipped: int  # passed over, as the setting says
    retired: int  # passed over, because retention has taken it


@dataclass(slots=True)
class Configured:
    """What a start has found. Counts of records by backend, where there are any."""

    gone: list[str] = field(default_factory=list)  # configured no more: to part with
    before: dict[str, int] = field(default_factory=dict)  # skipped: made before it was first configured
    back: dict[str, Back] = field(default_factory=dict)  # configured again


def configure(
    books: Books, names: Sequence[str], places: Sequence[Place], now_s: float, *, count: Count, skip_gaps: bool
) -> Configured:
    """Note which backends are configured now, and give new ones their cursors."""
    conn, found = books.conn, Configured()
    known = dict(conn.execute("SELECT name, removed FROM backend").fetchall())
    served = conn.execute("SELECT EXISTS(SELECT 1 FROM meta WHERE name = 'served')").fetchone()[0]
    conn.execute("INSERT OR IGNORE INTO meta(name, value) VALUES('served', ?)", (now_s,))
    for name in names:
        if name not in known:
            found.before[name] = _begin(books, name, places, first=not served)
        elif known[name] != 0:
            found.back[name] = _return(books, name, places, count, skip=skip_gaps)
    conn.executemany(
        "INSERT INTO backend(name, since_s) VALUES(?, ?)"
        " ON CONFLICT DO UPDATE SET since_s = iif(removed = 0, since_s, excluded.since_s), removed = 0",
        [(name, now_s) for name in names],
    )
    found.gone = [name for name, removed in known.items() if name not in names and removed != _PARTED]
    conn.executemany("UPDATE backend SET removed = 1 WHERE name = ?", [(name,) for name in found.gone])
    return found


def part(conn: sqlite3.Connection, name: str) -> None:
    """A removed backend's remainder is parked: there is nothing left to do for it."""
    conn.execute("UPDATE backend SET removed = ? WHERE name = ? AND removed = 1", (_PARTED, name))


def of_backend(conn: sqlite3.Connection, backend: str) -> list[Cursor]:
    rows = conn.execute(
        "SELECT id, backend, instance, seq, again_upto FROM cursor WHERE backend = ? ORDER BY instance",
        (backend,),
    ).fetchall()
    return [Cursor(id=r[0], backend=r[1], instance=r[2], seq=r[3], again_upto=r[4]) for r in rows]


def start(conn: sqlite3.Connection, backend: str, instance: str, again_upto: int = 0) -> Cursor:
    """A cursor at the beginning of a spool."""
    (id_,) = conn.execute(
        "INSERT INTO cursor(backend, instance, seq, again_upto) VALUES(?, ?, 0, ?) RETURNING id",
        (backend, instance, again_upto),
    ).fetchone()
    return Cursor(id=id_, backend=backend, instance=instance, seq=0, again_upto=again_upto)


def move(conn: sqlite3.Connection, cursor: int, from_seq: int, to_seq: int) -> None:
    moved = conn.execute("UPDATE cursor SET seq = ? WHERE id = ? AND seq = ?", (to_seq, cursor, from_seq)).rowcount
    if moved != 1:
        raise StateBusy(f"a cursor is not at {from_seq}, where its lane believes it to be")


def _begin(books: Books, name: str, places: Sequence[Place], *, first: bool) -> int:
    """Where a new backend begins: at the start of everything, or behind what is there. How many it passes over."""
    skipped = 0
    for place in places:
        if first:
            start(books.conn, name, place.instance, again_upto=place.last_seq)
        else:
            skipped += _pass(books, start(books.conn, name, place.instance), place, BEFORE)
    return skipped


def _return(books: Books, name: str, places: Sequence[Place], count: Count, *, skip: bool) -> Back:
    """A backend that was left out goes on where it stopped.

    What retention has taken meanwhile cannot be delivered: it comes first in its spool, and is passed over as well.
    """
    known = {cursor.instance: cursor for cursor in of_backend(books.conn, name)}
    pending = skipped = retired = 0
    for place in places:
        cursor = known.get(place.instance) or start(books.conn, name, place.instance)
        missed = place.recorded - _counted(books.conn, cursor.id)
        if skip or missed <= 0:
            skipped += _pass(books, cursor, place, GAP)
            continue
        there = min(count(place.instance, cursor.seq, place.last_seq), missed)
        pending += there
        if there < missed:
            # No cursor moves over them: the first record that is there is where its lane goes on reading.
            skip_range(books.conn, cursor.id, RETIRED, cursor.seq + 1, cursor.seq + 1, missed - there)
            books.add(cursor.id, Term.SKIPPED, missed - there, RETIRED)
            retired += missed - there
    return Back(pending=pending, skipped=skipped, retired=retired)


def _pass(books: Books, cursor: Cursor, place: Place, reason: str) -> int:
    """Move a cursor to the end of its spool, and count what it passes over."""
    missed = max(place.recorded - _counted(books.conn, cursor.id), 0)
    if place.last_seq > cursor.seq:
        move(books.conn, cursor.id, cursor.seq, place.last_seq)
    if missed:
        skip_range(books.conn, cursor.id, reason, cursor.seq + 1, place.last_seq, missed)
        books.add(cursor.id, Term.SKIPPED, missed, reason)
    return missed


def _counted(conn: sqlite3.Connection, cursor: int) -> int:
    """How many records of a cursor's spool have a place already."""
    (n,) = conn.execute("SELECT coalesce(sum(n), 0) FROM counter WHERE cursor = ? AND folded = 0", (cursor,)).fetchone()
    return int(n)
