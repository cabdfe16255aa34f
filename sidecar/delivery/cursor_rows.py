"""Rows of cursors: how far a backend is in a spool, and where one begins that is new, or was left out for a while."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sidecar.delivery import request_rows
from sidecar.delivery.counters import Counters
from sidecar.delivery.database import Connection
from sidecar.delivery.rows import Cursor, Place, StateBusy
from sidecar.delivery.types import BEFORE, GAP, RETIRED, Term

Count = Callable[[str, int, int], int]
"""Of an instance's spool: how many records it has with `after < seq <= upto`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Back:
    """What was recorded while a backend was left out."""

    pending: int  # to be delivered now
    skipped: int  # passed over, as the setting says
    retired: int  # passed over, because retention has taken it


def cursors_of(conn: Connection, backend: str) -> list[Cursor]:
    rows = conn.execute(
        "SELECT id, backend, instance, seq, again_upto FROM cursor WHERE backend = ? ORDER BY instance",
        (backend,),
    ).fetchall()
    return [Cursor(id=r[0], backend=r[1], instance=r[2], seq=r[3], again_upto=r[4]) for r in rows]


def start_cursor(conn: Connection, backend: str, instance: str, again_upto: int = 0) -> Cursor:
    """A cursor at the beginning of a spool."""
    (id_,) = conn.execute(
        "INSERT INTO cursor(backend, instance, seq, again_upto) VALUES(?, ?, 0, ?) RETURNING id",
        (backend, instance, again_upto),
    ).fetchone()
    return Cursor(id=id_, backend=backend, instance=instance, seq=0, again_upto=again_upto)


def move(conn: Connection, cursor: int, from_seq: int, to_seq: int) -> None:
    moved = conn.execute("UPDATE cursor SET seq = ? WHERE id = ? AND seq = ?", (to_seq, cursor, from_seq)).rowcount
    if moved != 1:
        raise StateBusy(f"a cursor is not at {from_seq}, where its worker believes it to be")


def begin_backend(counters: Counters, name: str, places: Sequence[Place], *, first: bool) -> int:
    """Where a new backend begins: at the start of everything, or behind what is there. How many it passes over."""
    skipped = 0
    for place in places:
        if first:
            start_cursor(counters.conn, name, place.instance, again_upto=place.last_seq)
        else:
            skipped += _pass_spool(counters, start_cursor(counters.conn, name, place.instance), place, BEFORE)
    return skipped


def return_backend(counters: Counters, name: str, places: Sequence[Place], count: Count, *, skip: bool) -> Back:
    """A backend that was left out goes on where it stopped.

    What retention has taken meanwhile cannot be delivered: it comes first in its spool, and is passed over as well.
    """
    known = {cursor.instance: cursor for cursor in cursors_of(counters.conn, name)}
    pending = skipped = retired = 0
    for place in places:
        cursor = known.get(place.instance) or start_cursor(counters.conn, name, place.instance)
        missed = place.recorded - _counted(counters.conn, cursor.id)
        if skip or missed <= 0:
            skipped += _pass_spool(counters, cursor, place, GAP)
            continue
        there = min(count(place.instance, cursor.seq, place.last_seq), missed)
        pending += there
        if there < missed:
            # No cursor moves over them: the first record that is there is where its worker goes on reading.
            request_rows.skip_range(counters.conn, cursor.id, RETIRED, cursor.seq + 1, cursor.seq + 1, missed - there)
            counters.add(cursor.id, Term.SKIPPED, missed - there, RETIRED)
            retired += missed - there
    return Back(pending=pending, skipped=skipped, retired=retired)


def _pass_spool(counters: Counters, cursor: Cursor, place: Place, reason: str) -> int:
    """Move a cursor to the end of its spool, and count what it passes over."""
    missed = max(place.recorded - _counted(counters.conn, cursor.id), 0)
    if place.last_seq > cursor.seq:
        move(counters.conn, cursor.id, cursor.seq, place.last_seq)
    if missed:
        request_rows.skip_range(counters.conn, cursor.id, reason, cursor.seq + 1, place.last_seq, missed)
        counters.add(cursor.id, Term.SKIPPED, missed, reason)
    return missed


def _counted(conn: Connection, cursor: int) -> int:
    """How many records of a cursor's spool have a place already."""
    (n,) = conn.execute("SELECT coalesce(sum(n), 0) FROM counter WHERE cursor = ? AND folded = 0", (cursor,)).fetchone()
    return int(n)
