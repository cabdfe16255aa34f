"""Letting parked events go again: which may, as which requests, under which key.

What must always hold: what was definitely refused is sealed anew with the key `<key>~n`, because a backend may
have kept its answer under the old one; ids of events stay as they are. What may have been taken goes
only when the operator accepts doubles, and then as the very same request wherever all of it is still parked.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final

from sidecar.delivery import encoding
from sidecar.delivery.context import Context
from sidecar.delivery.rows import NewParked, NewRequest, Parked, Range, Redrive, Unskip
from sidecar.delivery.tail import Item
from sidecar.delivery.types import Tries
from sidecar.model.delivery import KEY_MISMATCH, Backend, Dedup

_NO_BOUND: Final = 1 << 30  # on requests in one step: it is one slice of records
EACH_MAX: Final = 20  # events told one by one; of more, the counts tell


class Became(StrEnum):
    """Programs read these words."""

    OFFERED = "offered"
    SKIPPED = "skipped"  # it encodes to nothing now: passed over
    STILL_PARKED = "still_parked"
    MAYBE_TAKEN = "maybe_taken"  # goes only with --resend-unknown
    SIBLINGS_TAKEN = "siblings_taken"  # could only go with events of its record that the backend has
    NO_ROOM = "no_room"  # so much waits for another attempt already: run it again later
    NOT_CONFIGURED = "not_configured"  # its backend is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class OneOutcome:
    backend: str
    event_id: str
    record_id: str
    became: Became
    reason: str = ""  # the one that it is parked for now, or was
    detail: str = ""


@dataclass(slots=True)
class Redriven:
    """All of one redrive."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # what became of it, and the reason
    each: list[OneOutcome] = field(default_factory=list)  # the first of them
    unskipped: int = 0  # records made before their backend was configured, or while it was left out
    not_found: list[tuple[str, str]] = field(default_factory=list)  # ids that are not parked, and what is known of them
    seen: set[str] = field(default_factory=set)  # ids that were asked for and are parked

    def add(self, one: OneOutcome) -> None:
        reason = "" if one.became in (Became.OFFERED, Became.SKIPPED) else one.reason
        self.counts[(one.became.value, reason)] += 1
        if len(self.each) < EACH_MAX:
            self.each.append(one)

    @property
    def offered(self) -> int:
        """Events and records that go again."""
        return self.counts[(Became.OFFERED.value, "")] + self.counts[(Became.SKIPPED.value, "")] + self.unskipped

    def to_dict(self) -> dict[str, Any]:
        """For the command."""
        return {
            "redriven": self.offered,
            "unskipped": self.unskipped,
            "counts": [
                {"became": became, "reason": reason, "events": n} for (became, reason), n in self.counts.items()
            ],
            "each": [
                {
                    "backend": one.backend,
                    "event_id": one.event_id,
                    "record_id": one.record_id,
                    "became": one.became.value,
                    "reason": one.reason,
                    "detail": one.detail,
                }
                for one in self.each
            ],
            "not_found": [{"id": id_, "known": known} for id_, known in self.not_found],
        }


@dataclass(slots=True)
class Step:
    """One transaction, and what becomes of the events that it is about. No `redrive`: they stay as they are."""

    redrive: Redrive | None
    outcomes: list[OneOutcome] = field(default_factory=list)


async def steps(
    backend: Backend, cursor: int, rows: Sequence[Parked], context: Context, *, resend_unknown: bool
) -> list[Step]:
    """What lets these events of one cursor go, or says why they do not."""
    made: list[Step] = []
    anew = [row for row in rows if resend_unknown or not row.maybe_taken]
    if not resend_unknown:
        made.append(Step(None, [_outcome(row, Became.MAYBE_TAKEN) for row in rows if row.maybe_taken]))
    else:
        for whole in await _whole_requests(rows, context):
            made.append(Step(whole, [_outcome(row, Became.OFFERED) for row in whole.parked]))
            gone = {row.id for row in whole.parked}
            anew = [row for row in anew if row.id not in gone]
    made += [
        await _anew(backend, cursor, group, context, forced=resend_unknown)
        for group in _by_record(anew, context.limits.encode_records)
    ]
    return made


async def back(backend: Backend, cursor: int, rows: Sequence[Parked], context: Context) -> list[Step]:
    """What lets go again what was parked because its backend was left out, now that it is back.

    It was pending then, and is so again: a request that was sealed goes on as it was, with its bytes, its key and the
    window that has run since. What may have been taken stays parked where a repeat would not be recognised.
    """
    by_request: dict[int, list[Parked]] = {}
    for row in rows:
        if row.request is not None:
            by_request.setdefault(row.request, []).append(row)
    made: list[Step] = []
    gone: set[int] = set()
    bare = backend.abilities.dedup is Dedup.NONE and not backend.abilities.resend_unknown
    for request, parked in by_request.items():
        maybe = any(row.maybe_taken for row in parked)
        stored = await context.store.run(context.store.stored, request)
        if (maybe and bare) or stored is None or {m.event_id for m in stored.members} != {p.event_id for p in parked}:
            continue
        tries = stored.tries if maybe else replace(stored.tries, risk_wall_s=None)
        history = (*parked[0].history, "its backend is back")
        again = replace(stored, tries=tries, history=history, generation=parked[0].generation)
        made.append(Step(Redrive(cursor, parked, [again]), [_outcome(row, Became.OFFERED) for row in parked]))
        gone.update(row.id for row in parked)
    left = [row for row in rows if row.id not in gone and not row.maybe_taken]
    made += [
        await _anew(backend, cursor, group, context, forced=False)
        for group in _by_record(left, context.limits.encode_records)
    ]
    return made


async def _whole_requests(rows: Sequence[Parked], context: Context) -> list[Redrive]:
    """Requests of which every event is parked as perhaps taken: they go as they went, bytes and key."""
    by_request: dict[int, list[Parked]] = {}
    for row in rows:
        # What was refused for its key would be refused so again: that goes anew, as the operator accepts doubles.
        if row.request is not None and row.maybe_taken and row.reason != KEY_MISMATCH:
            by_request.setdefault(row.request, []).append(row)
    made = []
    for request, parked in by_request.items():
        stored = await context.store.run(context.store.stored, request)
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


async def _anew(backend: Backend, cursor: int, rows: Sequence[Parked], context: Context, *, forced: bool) -> Step:
    """Seal the records of parked events again, as the encoder sees them now."""
    lines = {row.seq: row.line for row in rows}
    made, lost = await encoding.again(backend, list(lines.items()), tries=Tries(forced=forced), due_s=0.0)
    by_event = {(row.seq, row.event_id): row for row in rows}
    whole = {row.seq for row in rows if _is_whole(row)}
    requests: list[NewRequest] = []
    refrained: set[tuple[int, str]] = set()
    for new in made:
        wanted = [m for m in new.members if m.seq in whole or (m.seq, m.event_id) in by_event]
        if not wanted:
            continue
        if len(wanted) < len(new.members) and not _harmless(backend, rows, context, forced=forced):
            refrained.update((m.seq, m.event_id) for m in wanted)
            continue
        sources = [row for row in rows if row.seq in {m.seq for m in new.members}]
        generation = 1 + max(row.generation for row in sources)
        sealed = replace(new.sealed, key=encoding.redriven_key(new.sealed.key, generation))
        history = (*max(sources, key=lambda row: row.generation).history, f"redriven as {sealed.key}")
        requests.append(replace(new, sealed=sealed, generation=generation, history=history))
    carried = {(m.seq, m.event_id) for new in requests for m in new.members}
    step = _Sorting(cursor, requests, carried, refrained, lost)
    for row in rows:
        step.sort(row)
    return step.done()


class _Sorting:
    """Puts each parked event where it belongs: on its way, passed over, parked for another reason, or left alone."""

    def __init__(
        self,
        cursor: int,
        requests: list[NewRequest],
        carried: set[tuple[int, str]],
        refrained: set[tuple[int, str]],
        lost: encoding.LostEvents,
    ) -> None:
        self._cursor, self._requests, self._carried, self._lost = cursor, requests, carried, lost
        self._carried_seqs = {seq for seq, _ in carried}
        self._refrained_seqs = {seq for seq, _ in refrained}
        self._going: list[Parked] = []
        self._again: list[NewParked] = []
        self._skipped: dict[int, str] = {}
        self._outcomes: list[OneOutcome] = []

    def sort(self, row: Parked) -> None:
        why = self._lost.why(row.seq, row.event_id)
        if _is_whole(row) and why is None:
            self._divide(row)
        elif (row.seq, row.event_id) in self._carried:
            self._going.append(row)
            self._outcomes.append(_outcome(row, Became.OFFERED))
        elif why is not None and why.skipped:
            self._going.append(row)
            self._skipped[row.seq] = why.reason
            self._outcomes.append(_outcome(row, Became.SKIPPED))
        elif why is not None:
            self._keep(row, row.event_id, why, moved=why.reason != row.reason)
        elif row.seq in self._refrained_seqs:
            self._outcomes.append(_outcome(row, Became.SIBLINGS_TAKEN))
        else:
            detail = "nothing is sent for it any more: `metering-sidecar spool cancel` passes it over"
            self._outcomes.append(_outcome(row, Became.STILL_PARKED, detail=detail))

    def done(self) -> Step:
        if not self._going:
            return Step(None, self._outcomes)
        redrive = Redrive(self._cursor, self._going, self._requests, skipped=self._skipped, again=self._again)
        return Step(redrive, self._outcomes)

    def _divide(self, row: Parked) -> None:
        """A record of which no event was made before: some of its events may go now, and others not."""
        events = [(event, why) for (seq, event), why in self._lost.events.items() if seq == row.seq]
        if row.seq not in self._carried_seqs and not events:
            became = Became.SIBLINGS_TAKEN if row.seq in self._refrained_seqs else Became.STILL_PARKED
            self._outcomes.append(_outcome(row, became))
            return
        self._going.append(row)
        for seq, event in sorted(self._carried):
            if seq == row.seq:
                self._outcomes.append(_outcome(replace(row, event_id=event), Became.OFFERED))
        for event, why in events:
            self._keep(row, event, why, moved=True, release=False)

    def _keep(self, row: Parked, event: str, why: encoding.Lost, *, moved: bool, release: bool = True) -> None:
        """Parked still; `moved`: for another reason than before."""
        told = replace(row, event_id=event, reason=why.reason)
        self._outcomes.append(_outcome(told, Became.STILL_PARKED, detail=why.detail))
        if not moved:
            return
        if release:
            self._going.append(row)
        self._again.append(
            NewParked(
                seq=row.seq,
                record_id=row.record_id,
                event_id=event,
                reason=why.reason,
                line=row.line,
                maybe_taken=row.maybe_taken,
                generation=row.generation,
                history=(*row.history, f"redriven, not sent: {why.detail or why.reason}"),
            )
        )


def _is_whole(row: Parked) -> bool:
    """Parked before any event was made of its record."""
    return row.request is None and row.event_id == row.record_id


def _outcome(row: Parked, became: Became, *, detail: str = "") -> OneOutcome:
    return OneOutcome(
        backend=row.backend,
        event_id=row.event_id,
        record_id=row.record_id,
        became=became,
        reason=row.reason,
        detail=detail,
    )


async def before(backend: Backend, since_s: float, context: Context) -> AsyncIterator[Unskip]:
    """Records skipped unseen (made before the backend was first configured, or while it was left out), from a time on
    and as far as the spool still has them."""
    store, reader, limits = context.store, context.reader, context.limits
    for skipped in await store.run(store.ranges, backend.name):
        after = skipped.first_seq - 1
        while after < skipped.last_seq:
            read = await asyncio.to_thread(reader.read, skipped.instance, after, bytes_max=limits.read_bytes)
            groups = [group for group in read if group.first_seq <= skipped.last_seq]
            if not groups:
                break
            items = [
                Item(seq, line)
                for group in groups
                for seq, line in enumerate(group.lines, group.first_seq)
                if after < seq <= skipped.last_seq
            ]
            after = groups[-1].last_seq
            for start in range(0, len(items), limits.encode_records):
                step = await _unskip(backend, skipped, items[start : start + limits.encode_records], since_s, context)
                if step is not None:
                    yield step


async def _unskip(
    backend: Backend, skipped: Range, items: Sequence[Item], since_s: float, context: Context
) -> Unskip | None:
    low, high = items[0].seq - 1, items[-1].seq
    known = await context.store.run(context.store.known, skipped.cursor, low, high)
    old = encoding.older_than(since_s, [item.seq for item in items], [item.line for item in items])
    going = [item for item in items if item.seq not in known and item.seq not in old]
    if not going:
        return None
    now_s = context.now().wall_s
    plan = await encoding.plan(backend, going, room=_NO_BOUND, again_upto=0, now_s=now_s, limits=context.limits)
    return Unskip(
        cursor=skipped.cursor,
        range=skipped.id,
        reason=skipped.reason,
        requests=plan.requests,
        skipped=plan.skipped,
        parked=plan.parked,
    )


def _harmless(backend: Backend, rows: Sequence[Parked], context: Context, *, forced: bool) -> bool:
    """Whether events that were taken may go along once more, because the record is encoded whole."""
    abilities = backend.abilities
    if forced:
        return True
    if abilities.dedup is not Dedup.EVENT_ID:
        return False
    if abilities.dedup_window_s is None:
        return True
    oldest = min(row.at_s for row in rows)
    return context.now().wall_s - oldest < abilities.dedup_window_s - context.limits.window_margin_s
