"""Letting parked events go again: which may, as which requests, under which key.

What must always hold: what was definitely refused is sealed anew with the key `<key>~n`, because a backend may
have kept its answer under the old one; ids of events stay as they are. What may have been taken goes
only when the operator accepts doubles, and then as the very same request wherever all of it is still parked.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TypeVar

from sidecar.delivery import sealing
from sidecar.delivery.owner import Owner
from sidecar.delivery.state.rows import NewRequest, Parked, Range, Redrive, Unskip
from sidecar.delivery.words import Tries
from sidecar.verdict import KEY_MISMATCH, Backend, Dedup

_T = TypeVar("_T")
_NO_BOUND = 1 << 30  # on requests in one step: it is one slice of records


async def steps(
    backend: Backend, cursor: int, rows: Sequence[Parked], owner: Owner, *, resend_unknown: bool
) -> list[Redrive]:
    """The transactions that let these events of one cursor go. Rows that may not go are in none of them."""
    made: list[Redrive] = []
    anew = [row for row in rows if resend_unknown or not row.maybe_taken]
    if resend_unknown:
        for whole in await _whole_requests(rows, owner):
            made.append(whole)
            gone = {row.id for row in whole.parked}
            anew = [row for row in anew if row.id not in gone]
    for group in _by_record(anew, owner.limits.encode_records):
        step = await _anew(backend, cursor, group, owner, forced=resend_unknown)
        if step is not None:
            made.append(step)
    return made


async def _whole_requests(rows: Sequence[Parked], owner: Owner) -> list[Redrive]:
    """Requests of which every event is parked as perhaps taken: they go as they went, bytes and key."""
    by_request: dict[int, list[Parked]] = {}
    for row in rows:
        # What was refused for its key would be refused so again: that goes anew, as the operator accepts doubles.
        if row.request is not None and row.maybe_taken and row.reason != KEY_MISMATCH:
            by_request.setdefault(row.request, []).append(row)
    made = []
    for request, parked in by_request.items():
        stored = await owner.in_state(lambda r=request: owner.state.stored(r))  # type: ignore[misc]
        if stored is None or {m.event_id for m in stored.members} != {row.event_id for row in parked}:
            continue
        history = (*parked[0].history, "redriven as it was")
        again = replace(stored, tries=Tries(forced=True), history=history, generation=parked[0].generation)
        made.append(Redrive(cursor=parked[0].cursor, parked=parked, requests=[again]))
    return made


def _by_record(rows: Sequence[Parked], most: int) -> list[list[Parked]]:
    """Slices of whole records: parked events of one record stay together."""
    groups: list[list[Parked]] = []
    seqs: set[int] = set()
    for row in sorted(rows, key=lambda row: (row.seq, row.id)):
        if not groups or (row.seq not in seqs and len(seqs) >= most):
            groups.append([])
            seqs = set()
        groups[-1].append(row)
        seqs.add(row.seq)
    return groups


async def _anew(backend: Backend, cursor: int, rows: Sequence[Parked], owner: Owner, *, forced: bool) -> Redrive | None:
    """Seal the records of parked events again, as the encoder sees them now."""
    lines = {row.seq: row.line for row in rows}
    made, lost = await sealing.again(backend, list(lines.items()), tries=Tries(forced=forced), due_s=0.0)
    by_event = {(row.seq, row.event_id): row for row in rows}
    whole = {row.seq for row in rows if row.request is None}  # parked before any event was made of them
    requests: list[NewRequest] = []
    for new in made:
        wanted = [m for m in new.members if m.seq in whole or (m.seq, m.event_id) in by_event]
        if not wanted or (len(wanted) < len(new.members) and not _harmless(backend, rows, owner, forced=forced)):
            continue
        sources = [row for row in rows if row.seq in {m.seq for m in new.members}]
        generation = 1 + max(row.generation for row in sources)
        sealed = replace(new.sealed, key=sealing.redriven_key(new.sealed.key, generation))
        history = (*max(sources, key=lambda row: row.generation).history, f"redriven as {sealed.key}")
        requests.append(replace(new, sealed=sealed, generation=generation, history=history))
    carried = {m.seq for new in requests for m in new.members}
    skipped = {parked.seq: reason for parked, reason in _skips(rows, lost)}
    going = [row for row in rows if row.seq in carried or row.seq in skipped]
    return Redrive(cursor=cursor, parked=going, requests=requests, skipped=skipped) if going else None


async def before(backend: Backend, since_s: float, owner: Owner) -> AsyncIterator[Unskip]:
    """Records made before the backend was first configured, from a time on and as far as the spool still has them."""
    state, reader, limits = owner.state, owner.reader, owner.limits
    for skipped in await owner.in_state(lambda: state.ranges(backend.name)):
        after = skipped.first_seq - 1
        while after < skipped.last_seq:
            read = functools.partial(reader.read, skipped.instance, after, bytes_max=limits.read_bytes)
            groups = [group for group in await asyncio.to_thread(read) if group.first_seq <= skipped.last_seq]
            if not groups:
                break
            items = [
                sealing.Item(seq, line)
                for group in groups
                for seq, line in enumerate(group.lines, group.first_seq)
                if after < seq <= skipped.last_seq
            ]
            after = groups[-1].last_seq
            for start in range(0, len(items), limits.encode_records):
                step = await _unskip(backend, skipped, items[start : start + limits.encode_records], since_s, owner)
                if step is not None:
                    yield step


async def _unskip(
    backend: Backend, skipped: Range, items: Sequence[sealing.Item], since_s: float, owner: Owner
) -> Unskip | None:
    low, high = items[0].seq - 1, items[-1].seq
    known = await owner.in_state(lambda: owner.state.known(skipped.cursor, low, high))
    old = sealing.older_than(since_s, [item.seq for item in items], [item.line for item in items])
    going = [item for item in items if item.seq not in known and item.seq not in old]
    if not going:
        return None
    now_s = owner.look()[0].wall_s
    plan = await sealing.plan(backend, going, room=_NO_BOUND, again_upto=0, now_s=now_s, limits=owner.limits)
    return Unskip(
        cursor=skipped.cursor, range=skipped.id, requests=plan.requests, skipped=plan.skipped, parked=plan.parked
    )


def _harmless(backend: Backend, rows: Sequence[Parked], owner: Owner, *, forced: bool) -> bool:
    """Whether events that were taken may go along once more, because the record is encoded whole."""
    abilities = backend.abilities
    if forced:
        return True
    if abilities.dedup is not Dedup.EVENT_ID:
        return False
    if abilities.dedup_window_s is None:
        return True
    oldest = min(row.at_s for row in rows)
    return owner.look()[0].wall_s - oldest < abilities.dedup_window_s - owner.limits.window_margin_s


def _skips(rows: Sequence[Parked], lost: dict[int, sealing.Lost]) -> list[tuple[Parked, str]]:
    """Records that the encoder now passes over; those that it still cannot encode stay parked."""
    return [(row, lost[row.seq].reason) for row in rows if row.seq in lost and lost[row.seq].skipped]
