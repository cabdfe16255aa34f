"""Which backends there are, and how far each one is in each instance's spool.

What must always hold: a backend has a place for every record of every spool from its first start on, so a new one's
cursor begins where the counters can account for all that lies before it. `move` belongs into the transaction that
stores what the records behind the cursor became.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

from sidecar.delivery.state.aside import skip_range
from sidecar.delivery.state.books import Books
from sidecar.delivery.state.rows import Cursor, Place, StateBusy
from sidecar.delivery.words import BEFORE, Term

_PARTED: Final = 2  # `backend.removed`: 1 while its remainder is being parked, 2 when that is done


def configure(books: Books, names: Sequence[str], places: Sequence[Place], now_s: float) -> list[str]:
    """Note which backends are configured now, and give new ones their cursors. Returns those to part with."""
    conn = books.conn
    known = dict(conn.execute("SELECT name, removed FROM backend").fetchall())
    served = conn.execute("SELECT EXISTS(SELECT 1 FROM meta WHERE name = 'served')").fetchone()[0]
    conn.execute("INSERT OR IGNORE INTO meta(name, value) VALUES('served', ?)", (now_s,))
    for name in names:
        if known.get(name, 1) != 0:
            _begin(books, name, places, first=not served)
    conn.executemany(
        "INSERT INTO backend(name, since_s) VALUES(?, ?)"
        " ON CONFLICT DO UPDATE SET since_s = iif(removed = 0, since_s, excluded.since_s), removed = 0",
        [(name, now_s) for name in names],
    )
    gone = [name for name, removed in known.items() if name not in names and removed != _PARTED]
    conn.executemany("UPDATE backend SET removed = 1 WHERE name = ?", [(name,) for name in gone])
    return gone


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


def _begin(books: Books, name: str, places: Sequence[Place], *, first: bool) -> None:
    """Where a backend that was not served before begins: at the start of everything, or behind what is there."""
    conn = books.conn
    known = {cursor.instance: cursor for cursor in of_backend(conn, name)}
    for place in places:
        if first:
            start(conn, name, place.instance, again_upto=place.last_seq)
            continue
        cursor = known.get(place.instance) or start(conn, name, place.instance)
        counted = _counted(conn, cursor.id)
        if place.last_seq > cursor.seq:
            move(conn, cursor.id, cursor.seq, place.last_seq)
        if place.recorded > counted:
            missed = place.recorded - counted
            skip_range(conn, cursor.id, BEFORE, cursor.seq + 1, place.last_seq, missed)
            books.add(cursor.id, Term.SKIPPED, missed, BEFORE)


def _counted(conn: sqlite3.Connection, cursor: int) -> int:
    """How many records of a cursor's spool have a place already."""
    (n,) = conn.execute("SELECT coalesce(sum(n), 0) FROM counter WHERE cursor = ? AND folded = 0", (cursor,)).fetchone()
    return int(n)
