"""A last place that is changed after all: parked events go on, delivered ones are taken back or complained of.

What must always hold: an event leaves its old place and takes the new one in one transaction, and only if it is
still where it was seen; a record that loses all its events counts as skipped, with the reason why.
"""

from __future__ import annotations

from collections import Counter

from sidecar.delivery.state import requests
from sidecar.delivery.state.aside import park, release, skip
from sidecar.delivery.state.books import Books, Shift
from sidecar.delivery.state.rows import Amendment, Member, Redrive
from sidecar.delivery.state.verdicts import TAKEN
from sidecar.delivery.types import Fate, Parking, Term


def redrive(books: Books, step: Redrive, now_s: float) -> list[int]:
    """Mark parked events as moved and store the requests that carry them. Returns the ids of these."""
    ids = [requests.insert(books.conn, step.cursor, new, now_s) for new in step.requests]
    going = Counter(m.seq for new in step.requests for m in new.members)
    leaving: dict[int, list[str]] = {}
    for parked in step.parked:
        leaving.setdefault(parked.seq, []).append(parked.reason)
        release(books.conn, parked)
    for one in step.again:
        member = Member(one.seq, one.record_id, one.event_id or one.record_id)
        park(
            books.conn, step.cursor, member, Parking(one.reason, one.maybe_taken), one.line, now_s,
            generation=one.generation, history=one.history,
        )  # fmt: skip
    staying = Counter(one.seq for one in step.again)
    for seq, reasons in leaving.items():
        reason = step.skipped.get(seq, "")
        shift = Shift(parked=staying[seq] - len(reasons), pending=going[seq])
        term = books.shift(step.cursor, seq, shift, was=Term.PARKED, reason=min(reasons), skip=reason)
        if term is Term.SKIPPED:
            _pass_over(books, step.cursor, seq, reason)
    return ids


def amend(books: Books, one: Amendment, now_s: float) -> bool:
    """Let a delivered event be so no more. False: it has moved meanwhile, or too little is remembered of it."""
    conn, seq = books.conn, one.member.seq
    row = conn.execute(
        "SELECT cursor, folded_seq, key, generation, fates, members FROM sealed"
        " JOIN cursor ON cursor.id = sealed.cursor WHERE sealed.id = ? AND settled = 1",
        (one.request,),
    ).fetchone()
    if row is None or seq <= row[1]:
        return False
    cursor, _, key, generation, fates, blob = row
    index = requests.read_members(blob).index(one.member)
    was = TAKEN.get(Fate(fates[index]))
    if was is None:
        return False
    fate = Fate.MOVED if one.parking is None else Fate.PARKED
    changed = fates[:index] + fate.value + fates[index + 1 :]
    conn.execute("UPDATE sealed SET fates = ? WHERE id = ?", (changed, one.request))
    if one.parking is not None:
        park(
            conn, cursor, one.member, one.parking, one.line, now_s,
            key=key, generation=generation, request=one.request, history=(one.note,),
        )  # fmt: skip
    shift = Shift(
        parked=int(one.parking is not None),
        delivered=-int(was is Term.DELIVERED),
        duplicate=-int(was is Term.DUPLICATE),
    )
    if books.shift(cursor, seq, shift, was=was, skip=one.skip) is Term.SKIPPED:
        _pass_over(books, cursor, seq, one.skip)
    return True


def _pass_over(books: Books, cursor: int, seq: int, reason: str) -> None:
    """A record that had events has none any more. Behind the border of `fold` only sums are kept."""
    (folded,) = books.conn.execute("SELECT folded_seq FROM cursor WHERE id = ?", (cursor,)).fetchone()
    if seq <= folded:
        books.fold(cursor, Term.SKIPPED, reason)
    else:
        skip(books.conn, cursor, reason, [seq])
