"""From records to requests: what is offered to a backend's encoder, and what comes of its answer.

What must always hold: every record offered ends in exactly one place (sealed, skipped or parked), whatever the
encoder does, and the same records give the same requests. Works in slices, because the event loop is
shared with other work. Storing is left to the worker.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sidecar.delivery.limits import Limits
from sidecar.delivery.rows import Hole, Member, NewParked, NewRequest, Run
from sidecar.delivery.tail import Item
from sidecar.delivery.types import ENCODE_FAILED, SALVAGED, TOO_OLD, UNREADABLE, Tries
from sidecar.model.delivery import Backend, Dedup, Encoded, Sealed
from sidecar.model.record import Record

_LOG = logging.getLogger(__name__)
KEY_CHARS_MAX = 100  # verdict.Sealed.key: what every backend takes


@dataclass(slots=True, kw_only=True)
class Plan:
    """What becomes of the first `taken` items."""

    taken: int = 0
    upto_seq: int = 0
    requests: list[NewRequest] = field(default_factory=list)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    parked: list[NewParked] = field(default_factory=list)
    holes: list[Hole] = field(default_factory=list)
    applied: list[Run] = field(default_factory=list)  # in the sums of a backend that adds up


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a record gives no request."""

    reason: str
    skipped: bool = False  # there is nothing to bill, as opposed to: it cannot be encoded
    detail: str = ""


@dataclass(slots=True)
class LostEvents:
    """What gives no request when records are encoded again: whole records, and single events of others."""

    records: dict[int, Lost] = field(default_factory=dict)
    events: dict[tuple[int, str], Lost] = field(default_factory=dict)

    def why(self, seq: int, event_id: str) -> Lost | None:
        return self.records.get(seq) or self.events.get((seq, event_id))


async def plan(
    backend: Backend, items: Sequence[Item], *, room: int, again_upto: int, now_s: float, limits: Limits
) -> Plan:
    """Decide for as many items as give at most `room` requests, but for one record at least."""
    made = Plan()
    reads: dict[str, Item] = {}
    ages = backend.abilities.age_max_s is not None
    for count, item in enumerate(items, 1):
        if count % limits.parse_records == 0:
            await asyncio.sleep(0)
        if item.hole is not None:
            made.taken, made.upto_seq = count, item.seq
            made.holes.append(item.hole)
            continue
        record = item.record
        if record is not None and record.id in reads:
            break  # an id that stands twice (never ours) waits for a request of its own
        made.taken, made.upto_seq = count, item.seq
        if record is None:
            made.parked.append(NewParked(seq=item.seq, record_id=f"seq:{item.seq}", reason=UNREADABLE, line=item.line))
            continue
        if (ages or item.seq <= again_upto) and (kept := _kept_back(backend, item, record, again_upto, now_s, limits)):
            made.parked.append(kept)
        else:
            reads[record.id] = item
    await asyncio.sleep(0)
    chosen = list(reads.values())
    encoded, failed = encode(backend, chosen)
    while len(encoded.sealed) > room and len(chosen) > 1:
        # The encoder is pure, so a shorter row of records may be asked for instead.
        chosen = chosen[: max(1, len(chosen) * room // len(encoded.sealed))]
        encoded, failed = encode(backend, chosen)
    if len(chosen) < len(reads):
        _cut_short(made, items, list(reads.values())[len(chosen)].seq)
    _place(made, backend, chosen, encoded, failed, now_s)
    return made


async def again(
    backend: Backend, lines: Sequence[tuple[int, bytes]], *, tries: Tries, due_s: float
) -> tuple[list[NewRequest], LostEvents]:
    """Requests of exactly these records, and the reason for each record, or event of one, that is in none."""
    reads = []
    lost = LostEvents()
    for seq, line in lines:
        item = Item(seq, line)
        if item.record is None:
            lost.records[seq] = Lost(UNREADABLE)
        else:
            reads.append(item)
    await asyncio.sleep(0)
    encoded, failed = encode(backend, reads)
    made = Plan()
    _place(made, backend, reads, encoded, failed, 0.0)
    for parked in made.parked:
        if parked.event_id:
            lost.events[(parked.seq, parked.event_id)] = Lost(parked.reason, detail=parked.detail)
        else:
            lost.records[parked.seq] = Lost(parked.reason)
    for reason, seqs in made.skipped.items():
        lost.records.update(dict.fromkeys(seqs, Lost(reason, skipped=True)))
    return [replace(new, tries=tries, due_s=due_s) for new in made.requests], lost


def older_than(limit_s: float, seqs: Sequence[int], lines: Sequence[bytes]) -> set[int]:
    """The numbers of those records whose event time is before a limit."""
    items = [Item(seq, line) for seq, line in zip(seqs, lines, strict=True)]
    return {item.seq for item in items if item.record is not None and item.record.started_s < limit_s}


def child_key(parent: str, index: int) -> str:
    """`<parent>.<index>`; a parent too long for that is replaced by its digest."""
    key = f"{parent}.{index}"
    return key if len(key) <= KEY_CHARS_MAX else f"h-{hashlib.sha256(parent.encode()).hexdigest()[:40]}.{index}"


def redriven_key(key: str, generation: int) -> str:
    again_key = f"{key}~{generation}"
    if len(again_key) <= KEY_CHARS_MAX:
        return again_key
    return f"h-{hashlib.sha256(key.encode()).hexdigest()[:40]}~{generation}"


def encode(backend: Backend, reads: Sequence[Item]) -> tuple[Encoded, set[str]]:
    """Ask the encoder, in rows of records so short that no batch begins or ends inside a record.

    A part of a refused batch is encoded again from whole records: a record with events on both sides of a
    border would then be sent twice.
    """
    encoded, failed = _ask(backend, reads)
    shortest = max(1, backend.abilities.events_max // _most_events(encoded))
    for most in (shortest, 1):
        if not _cuts_a_record(encoded):
            break
        encoded, failed = _in_rows(backend, reads, most)
    return encoded, failed


def _cuts_a_record(encoded: Encoded) -> bool:
    """Whether a record has events in two requests, one of which has other records too."""
    owners = [{event.record_id for event in sealed.events} for sealed in encoded.sealed]
    if all(len(ids) == 1 for ids in owners):
        return False
    return len(set().union(*owners)) < sum(map(len, owners))


def _most_events(encoded: Encoded) -> int:
    counts = Counter(event.record_id for sealed in encoded.sealed for event in sealed.events)
    return max(counts.values(), default=1)


def _in_rows(backend: Backend, reads: Sequence[Item], most: int) -> tuple[Encoded, set[str]]:
    whole, failed = Encoded(), set()
    for start in range(0, len(reads), most):
        one, bad = _ask(backend, reads[start : start + most])
        whole.sealed += one.sealed
        whole.skipped.update(one.skipped)
        whole.parked.update(one.parked)
        whole.withheld.update(one.withheld)
        failed |= bad
    return whole, failed


def _ask(backend: Backend, reads: Sequence[Item]) -> tuple[Encoded, set[str]]:
    """One call of the encoder; where it raises, ask for each record alone and name those that it raises for."""
    if not reads:
        return Encoded(), set()
    try:
        encoded = backend.encode([item.known for item in reads])
        named = {e.record_id for sealed in encoded.sealed for e in sealed.events}
        named.update(event.record_id for event in encoded.withheld)
        if named <= {item.known.id for item in reads}:
            return encoded, set()
        raise LookupError("events of records that were not offered")
    except Exception as error:  # noqa: BLE001 - one record must not stop the others
        _LOG.error(  # an exception's text may repeat what was being encoded
            "a backend's encoder raised",
            extra={"facts": {"backend": backend.name, "error": type(error).__name__, "records": len(reads)}},
        )
    if len(reads) == 1:
        return Encoded(), {reads[0].known.id}
    return _in_rows(backend, reads, 1)


def _kept_back(
    backend: Backend, item: Item, record: Record, again_upto: int, now_s: float, limits: Limits
) -> NewParked | None:
    """What no encoder needs to see: too old for the backend, or perhaps delivered before."""
    abilities, started_s = backend.abilities, record.started_s
    reason, maybe = "", False
    if abilities.age_max_s is not None and started_s < now_s - abilities.age_max_s:
        reason = TOO_OLD
    if item.seq <= again_upto:
        window_s = abilities.dedup_window_s
        known = window_s is None or now_s - started_s < window_s - limits.window_margin_s
        if abilities.dedup is not Dedup.EVENT_ID or not known:
            reason, maybe = SALVAGED, True
    if not reason:
        return None
    return NewParked(seq=item.seq, record_id=record.id, reason=reason, line=item.line, maybe_taken=maybe)


def _cut_short(made: Plan, items: Sequence[Item], first_left: int) -> None:
    """Take only what stands before a record that did not fit."""
    made.taken = next(i for i, item in enumerate(items) if item.seq == first_left)
    made.upto_seq = items[made.taken - 1].seq
    made.parked = [parked for parked in made.parked if parked.seq < first_left]
    made.holes = [hole for hole in made.holes if hole.last_seq < first_left]


def _place(
    made: Plan, backend: Backend, reads: Sequence[Item], encoded: Encoded, failed: set[str], now_s: float
) -> None:
    by_id = {item.known.id: item for item in reads}
    placed: set[str] = set()
    for sealed in encoded.sealed:
        if not sealed.events:
            continue
        made.requests.append(_request(backend, sealed, by_id, now_s))
        placed.update(event.record_id for event in sealed.events)
    for event, why in encoded.withheld.items():
        item = by_id[event.record_id]
        made.parked.append(
            NewParked(
                seq=item.seq,
                record_id=event.record_id,
                event_id=event.event_id,
                reason=why.reason,
                line=item.line,
                history=(f"not sent: {why.detail or why.reason}",),
                detail=why.detail,
            )
        )
        placed.add(event.record_id)
    if len(placed) == len(reads):
        return
    for item in reads:
        record, seq = item.known, item.seq
        if record.id in placed:
            continue
        if record.id in encoded.skipped and record.id not in encoded.parked:
            made.skipped.setdefault(encoded.skipped[record.id], []).append(seq)
            continue
        reason = encoded.parked.get(record.id, ENCODE_FAILED)
        if reason == ENCODE_FAILED and record.id not in failed:
            _LOG.error(
                "a backend's encoder forgot a record; it is parked",
                extra={"facts": {"backend": backend.name, "record": record.id}},
            )
        made.parked.append(NewParked(seq=seq, record_id=record.id, reason=reason, line=item.line))


def _request(backend: Backend, sealed: Sealed, by_id: dict[str, Item], now_s: float) -> NewRequest:
    events = sealed.events
    items = {event.record_id: by_id[event.record_id] for event in events}
    starts = [item.known.started_s for item in items.values()]
    future_s = backend.abilities.future_max_s
    # Only where the clock was put back: a backend that refuses the future is asked when it is the present.
    due_s = 0.0 if future_s is None or max(starts) <= now_s + future_s else max(starts) - future_s
    return NewRequest(
        sealed=sealed,
        members=tuple([Member(items[event.record_id].seq, event.record_id, event.event_id) for event in events]),
        lines=tuple([item.line for item in items.values()]),
        oldest_s=min(starts),
        due_s=due_s,
    )
