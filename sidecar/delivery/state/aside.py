"""Rows of what is not sent: parked events, each with its record, and skipped records, which are numbers alone.

What must always hold: a parked event keeps all that it takes to send it again, because the spool may be gone by then.
These are rows only: how they count is said to `Books` by whoever puts them here or takes them away.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import orjson

from sidecar.delivery.state.requests import drop_bytes, read_members, write_history
from sidecar.delivery.state.rows import Member, Parked, StateBusy
from sidecar.delivery.types import Fate, Parking


def park(
    conn: sqlite3.Connection,
    cursor: int,
    member: Member,
    parking: Parking,
    line: bytes,
    now_s: float,
    *,
    key: str = "",
    generation: int = 0,
    request: int | None = None,
    history: tuple[str, ...] = (),
) -> None:
    """Set an event aside. Without a request: its record never became one."""
    conn.execute(
        "INSERT INTO parked(cursor, seq, record_id, event_id, reason, maybe_taken, at_s, key, generation, request,"
        " line, history) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            cursor, member.seq, member.record_id, member.event_id, parking.reason, int(parking.maybe_taken), now_s,
            key, generation, request, line, write_history(history),
        ),
    )  # fmt: skip


def release(conn: sqlite3.Connection, parked: Parked) -> None:
    """Take a parked row away: its event goes on elsewhere. The old request remembers that it moved."""
    if conn.execute("DELETE FROM parked WHERE id = ?", (parked.id,)).rowcount != 1:
        raise StateBusy(f"parked event {parked.id} was redriven before")
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
        drop_bytes(conn, parked.request)


def skip(conn: sqlite3.Connection, cursor: int, reason: str, seqs: Sequence[int]) -> None:
    """Records that were looked at and give nothing to bill."""
    conn.execute(
        "INSERT INTO skipped(cursor, reason, first_seq, last_seq, n, seqs) VALUES(?, ?, ?, ?, ?, ?)",
        (cursor, reason, min(seqs), max(seqs), len(seqs), orjson.dumps(list(seqs))),
    )


def skip_range(conn: sqlite3.Connection, cursor: int, reason: str, first_seq: int, last_seq: int, count: int) -> None:
    """Records that are not looked at one by one."""
    conn.execute(
        "INSERT INTO skipped(cursor, reason, first_seq, last_seq, n) VALUES(?, ?, ?, ?, ?)",
        (cursor, reason, first_seq, last_seq, count),
    )
