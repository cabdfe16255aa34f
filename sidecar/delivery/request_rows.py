"""Rows of requests, of what is parked of them, and of what is not sent: each function a few statements inside a step.

A request is sealed once, with its members and bytes; the bytes stay for as long as something of it is open or parked.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Final

import orjson

from sidecar.delivery.database import Connection
from sidecar.delivery.rows import Member, NewRequest, Parked, StateBusy, StateError
from sidecar.delivery.types import Fate, Parking
from sidecar.model.delivery import Event, Sealed

_INSERTED_MAX: Final = 100  # in one statement
_PLACES: Final = f"({', '.join('?' * 20)})"


def insert(
    conn: Connection, cursor: int, requests: Sequence[NewRequest], now_s: float, under_way: Collection[int] = ()
) -> list[int]:
    """Store requests; `under_way`: which of them are offered as soon as this is on disk. Returns their ids."""
    ids: list[int] = []
    for start in range(0, len(requests), _INSERTED_MAX):
        some = requests[start : start + _INSERTED_MAX]
        rows = [_row(cursor, new, now_s, under_way=start + index in under_way) for index, new in enumerate(some)]
        found = conn.execute(
            "INSERT INTO sealed(cursor, first_seq, last_seq, attempts, under_way, started_s, due_s, risk_s, expired,"
            " forced, generation, records, size_bytes, at_s, oldest_s, key, subject, version, history, members)"
            f" VALUES{', '.join([_PLACES] * len(rows))} RETURNING id",
            [value for row in rows for value in row],
        ).fetchall()
        made = sorted(int(row[0]) for row in found)  # they grow, in the order of the rows
        conn.executemany(
            "INSERT INTO payload(request, path, content_type, headers, body, lines) VALUES(?, ?, ?, ?, ?, ?)",
            [
                (
                    id_,
                    new.sealed.path,
                    new.sealed.content_type,
                    orjson.dumps(new.sealed.headers).decode(),
                    new.sealed.body,
                    _write_lines(new),
                )
                for id_, new in zip(made, some, strict=True)
            ],
        )
        ids += made
    return ids


def _row(cursor: int, new: NewRequest, now_s: float, *, under_way: bool) -> tuple[Any, ...]:
    seqs = [member.seq for member in new.members]
    sealed, tries = new.sealed, new.tries
    return (
        cursor,
        min(seqs),
        max(seqs),
        tries.attempts + int(under_way),
        int(under_way),
        now_s,
        new.due_s,
        tries.risk_wall_s,
        int(tries.expired),
        int(tries.forced),
        new.generation,
        len(new.lines),
        new.size_bytes,
        now_s,
        new.oldest_s,
        sealed.key,
        sealed.subject,
        sealed.version,
        write_history(new.history),
        _write_members(new.members),
    )


def load(conn: Connection, request: int) -> Sealed:
    """What is offered to the backend."""
    row = conn.execute(
        "SELECT key, subject, version, attempts, members, path, content_type, headers, body FROM sealed"
        " JOIN payload ON payload.request = sealed.id WHERE sealed.id = ?",
        (request,),
    ).fetchone()
    if row is None:
        raise _lost_bytes(request)
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


def lines(conn: Connection, request: int) -> list[bytes]:
    """The records of a request, in the order in which its members first name them."""
    row = conn.execute("SELECT lines, body FROM payload WHERE request = ?", (request,)).fetchone()
    if row is None:
        raise _lost_bytes(request)
    return read_lines(row[0], row[1])


def drop_bytes(conn: Connection, request: int) -> None:
    """Nothing of a request is open or parked any more."""
    conn.execute("DELETE FROM payload WHERE request = ?", (request,))


def read_members(blob: bytes) -> tuple[Member, ...]:
    return tuple(Member(row[0], row[1], row[-1]) for row in orjson.loads(blob))


def write_history(history: Sequence[str]) -> str:
    return orjson.dumps(tuple(history)).decode()


def _write_members(members: Sequence[Member]) -> bytes:
    """An event's id is left out where it is its record's."""
    return orjson.dumps(
        [[m.seq, m.record_id] if m.event_id == m.record_id else [m.seq, m.record_id, m.event_id] for m in members]
    )


def _write_lines(new: NewRequest) -> bytes:
    """The records of a request; nothing where its body is these lines, each with its end: half the bytes to write."""
    lines = b"\n".join(new.lines)
    body = new.sealed.body
    return b"" if len(body) == len(lines) + 1 and body[-1:] == b"\n" and body.startswith(lines) else lines


def read_lines(lines: bytes, body: bytes) -> list[bytes]:
    return (lines or body[:-1]).split(b"\n")


def _lost_bytes(request: int) -> StateError:
    return StateError(f"request {request} has lost its bytes; run `metering-sidecar spool verify`")


def park(
    conn: Connection,
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
            cursor,
            member.seq,
            member.record_id,
            member.event_id,
            parking.reason,
            int(parking.maybe_taken),
            now_s,
            key,
            generation,
            request,
            line,
            write_history(history),
        ),
    )


def release(conn: Connection, parked: Parked) -> None:
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


def skip(conn: Connection, cursor: int, reason: str, seqs: Sequence[int]) -> None:
    """Records that were looked at and give nothing to bill."""
    conn.execute(
        "INSERT INTO skipped(cursor, reason, first_seq, last_seq, n, seqs) VALUES(?, ?, ?, ?, ?, ?)",
        (cursor, reason, min(seqs), max(seqs), len(seqs), orjson.dumps(list(seqs))),
    )


def skip_range(conn: Connection, cursor: int, reason: str, first_seq: int, last_seq: int, count: int) -> None:
    """Records that are not looked at one by one."""
    conn.execute(
        "INSERT INTO skipped(cursor, reason, first_seq, last_seq, n) VALUES(?, ?, ?, ?, ?)",
        (cursor, reason, first_seq, last_seq, count),
    )
