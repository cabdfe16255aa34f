"""What was said of a request: it stays open, or each of its events gets its last place.

What must always hold: a request is settled once; its fates, the parked rows, the requests that carry parts of it on
and the counters change together. What the verdicts mean was decided before, in `retry`.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from typing import Final

from sidecar.delivery.state import requests
from sidecar.delivery.state.aside import park
from sidecar.delivery.state.books import Books, Shift
from sidecar.delivery.state.rows import Settlement, StateBusy
from sidecar.delivery.types import Fate, Term

TAKEN: Final = {Fate.DELIVERED: Term.DELIVERED, Fate.DUPLICATE: Term.DUPLICATE}


def settle(books: Books, one: Settlement, now_s: float) -> list[int]:
    """Store one attempt's end. Returns the ids of the requests that carry parts of it on."""
    if one.decision.open:
        _keep_open(books.conn, one)
        return []
    conn, request, decision = books.conn, one.request, one.decision
    _still_open(
        conn.execute(
            "UPDATE sealed SET settled = 1, under_way = 0, fates = ?, history = ? WHERE id = ? AND settled = 0",
            ("".join(decision.fates), requests.write_history(one.history if decision.parked else ()), request.id),
        )
    )
    if decision.parked:
        _park(conn, one, now_s)
    else:
        requests.drop_bytes(conn, request.id)
    children = [requests.insert(conn, request.cursor, child, now_s) for child in one.children]
    _count(books, one)
    return children


def _keep_open(conn: sqlite3.Connection, one: Settlement) -> None:
    tries = one.decision.tries
    _still_open(
        conn.execute(
            "UPDATE sealed SET under_way = 0, due_s = ?, risk_s = ?, expired = ?, forced = ?,"
            " history = ? WHERE id = ? AND settled = 0",
            (
                one.due_s, tries.risk_wall_s, int(tries.expired), int(tries.forced),
                requests.write_history(one.history), one.request.id,
            ),
        )
    )  # fmt: skip


def _still_open(done: sqlite3.Cursor) -> None:
    if done.rowcount != 1:
        raise StateBusy("a request was settled before; its lane has to load again")


def _park(conn: sqlite3.Connection, one: Settlement, now_s: float) -> None:
    request = one.request
    kept = requests.lines(conn, request.id)
    lines = dict(zip(dict.fromkeys(m.seq for m in request.members), kept, strict=True))
    for index, parking in one.decision.parked.items():
        member = request.members[index]
        park(
            conn, request.cursor, member, parking, lines[member.seq], now_s,
            key=request.key, generation=request.generation, request=request.id, history=one.history,
        )  # fmt: skip


def _count(books: Books, one: Settlement) -> None:
    request, decision = one.request, one.decision
    members = request.members
    going = Counter(m.seq for child in one.children for m in child.members)
    simple = len(members) == request.records and all(n == 1 for n in going.values())
    if simple and not books.has_parts(request.cursor, [m.seq for m in members]):
        # One event a record: each goes straight to its new place.
        books.add(request.cursor, Term.OPEN, -sum(fate is not Fate.MOVED for fate in decision.fates))
        for fate, count in Counter(decision.fates).items():
            if fate in TAKEN:
                books.add(request.cursor, TAKEN[fate], count)
        for parking in decision.parked.values():
            books.add(request.cursor, Term.PARKED, 1, parking.reason)
        return
    by_seq: dict[int, Counter[Fate]] = {}
    for member, fate in zip(members, decision.fates, strict=True):
        by_seq.setdefault(member.seq, Counter())[fate] += 1
    for seq, fates in by_seq.items():
        shift = Shift(
            pending=going[seq] - fates.total(),
            parked=fates[Fate.PARKED],
            delivered=fates[Fate.DELIVERED],
            duplicate=fates[Fate.DUPLICATE],
        )
        books.shift(request.cursor, seq, shift, was=Term.OPEN)
