"""A sealed request as it stands in `delivery.db`: its row, its bytes, and the records that it was made of.

What must always hold: row and bytes are stored together, and what is read back is what was stored, byte for byte; a
repeat with other bytes or another key would not be recognised. When bytes may go is for those to say who settle.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

import orjson

from sidecar.delivery.state.rows import Member, NewRequest, Request, StateError
from sidecar.delivery.types import Tries
from sidecar.model.delivery import Event, Sealed


def insert(conn: sqlite3.Connection, cursor: int, new: NewRequest, now_s: float, *, under_way: bool = False) -> int:
    """Store a request; `under_way`: it is offered as soon as this is on disk. Returns its id."""
    seqs = [member.seq for member in new.members]
    sealed, tries = new.sealed, new.tries
    row = conn.execute(
        "INSERT INTO sealed(cursor, first_seq, last_seq, attempts, under_way, started_s, due_s, risk_s, expired,"
        " forced, generation, records, size_bytes, at_s, oldest_s, key, subject, version, history, members)"
        " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (
            cursor, min(seqs), max(seqs), tries.attempts + int(under_way), int(under_way), now_s, new.due_s,
            tries.risk_wall_s, int(tries.expired), int(tries.forced), new.generation, len(new.lines),
            _size_bytes(new), now_s, new.oldest_s, sealed.key, sealed.subject, sealed.version,
            write_history(new.history), _write_members(new.members),
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


def opened(id_: int, cursor: int, new: NewRequest) -> Request:
    """A request as it stands in the file right after it was stored."""
    return Request(
        id=id_,
        cursor=cursor,
        key=new.sealed.key,
        subject=new.sealed.subject,
        members=new.members,
        records=len(new.lines),
        size_bytes=_size_bytes(new),
        oldest_s=new.oldest_s,
        tries=new.tries,
        due_s=new.due_s,
        under_way=False,
        started_s=0.0,
        generation=new.generation,
        history=new.history,
        sealed=new.sealed,
    )


def begin(conn: sqlite3.Connection, ids: Sequence[int], now_s: float) -> None:
    """An attempt at each of these is about to start."""
    conn.executemany(
        "UPDATE sealed SET under_way = 1, attempts = attempts + 1, started_s = ? WHERE id = ?",
        [(now_s, request) for request in ids],
    )


def load(conn: sqlite3.Connection, request: int) -> Sealed:
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


def lines(conn: sqlite3.Connection, request: int) -> list[bytes]:
    """The records of a request, in the order in which its members first name them."""
    row = conn.execute("SELECT lines FROM payload WHERE request = ?", (request,)).fetchone()
    if row is None:
        raise _lost_bytes(request)
    return _split_lines(row[0])


def stored(conn: sqlite3.Connection, request: int) -> NewRequest | None:
    """A settled request as it was sealed, while its bytes are kept."""
    row = conn.execute(
        "SELECT members, oldest_s, generation, lines, attempts, risk_s, expired, started_s FROM sealed"
        " JOIN payload ON payload.request = sealed.id"
        " WHERE sealed.id = ?",
        (request,),
    ).fetchone()
    if row is None:
        return None
    return NewRequest(
        sealed=load(conn, request),
        members=read_members(row[0]),
        lines=tuple(_split_lines(row[3])),
        oldest_s=row[1],
        generation=row[2],
        # Whoever settled it may not have heard how its last attempt ended: then that one counts.
        tries=Tries(attempts=row[4], risk_wall_s=row[7] if row[4] and row[5] is None else row[5], expired=bool(row[6])),
    )


def drop_bytes(conn: sqlite3.Connection, request: int) -> None:
    """Nothing of a request is open or parked any more."""
    conn.execute("DELETE FROM payload WHERE request = ?", (request,))


def open_requests(conn: sqlite3.Connection, backend: str) -> list[Request]:
    """All sealed requests without a verdict, oldest first, without their bytes."""
    rows = conn.execute(
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


def read_members(blob: bytes) -> tuple[Member, ...]:
    return tuple(Member(row[0], row[1], row[-1]) for row in orjson.loads(blob))


def write_history(history: Sequence[str]) -> str:
    return orjson.dumps(tuple(history)).decode()


def _write_members(members: Sequence[Member]) -> bytes:
    """An event's id is left out where it is its record's."""
    return orjson.dumps(
        [[m.seq, m.record_id] if m.event_id == m.record_id else [m.seq, m.record_id, m.event_id] for m in members]
    )


def _split_lines(blob: bytes) -> list[bytes]:
    return blob.split(b"\n")


def _size_bytes(new: NewRequest) -> int:
    return len(new.sealed.body) + sum(map(len, new.lines))


def _lost_bytes(request: int) -> StateError:
    return StateError(f"request {request} has lost its bytes; run `metering-sidecar spool verify`")
