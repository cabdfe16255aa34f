"""`ledger`: the embedded usage store, as a backend like any other.

New records come in batches, known by their numbers: what they add up to and how far they go is committed together, so
nothing is kept a record. What is offered again after it was parked comes as a sealed request, whose bytes are the
effects of its records: the store adds them together with the request's key, so a repeat is recognised. The store is
handed in: this file knows how effects are made, `sidecar.ledger` how they are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from sidecar.backends.base import Context, RecordSettings
from sidecar.backends.batching import batch_key, event_key
from sidecar.meters.buckets import SUMS, BatchSums, batch_sums, bucket_deltas, to_wire
from sidecar.meters.hourly import body_of, deltas, grouped
from sidecar.model.call_group import CallGroup
from sidecar.model.delivery import (
    Abilities,
    Applied,
    Atomicity,
    Dedup,
    Encoded,
    Event,
    Refused,
    Sealed,
    Undone,
    Verdict,
)
from sidecar.model.record import Record

BATCH_MAX: Final = 1000  # one transaction: 20 ms of work at most, and one fsync for it
DEDUP_WINDOW_S: Final = 30 * 86_400.0  # how long the store keeps keys (`sidecar.ledger.store.KEYS_KEPT_S`)


class LedgerBackend:
    """Adds what records amount to into the embedded store."""

    name = "ledger"
    settings_type = RecordSettings
    abilities = Abilities(
        events_max=BATCH_MAX,
        atomicity=Atomicity.ALL_OR_NOTHING,
        dedup=Dedup.REQUEST_KEY,
        dedup_window_s=DEDUP_WINDOW_S,
        concurrency=1,
        knows_duplicates=True,
        bills=False,
    )

    def __init__(self, settings: RecordSettings, context: Context) -> None:
        if context.open_ledger is None:
            raise ValueError("the ledger backend needs a store: pass open_ledger in the context")
        self._policy = settings.policy
        self._meters = context.definitions()
        self._store = context.open_ledger()

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        wanted = [r for r in records if self._policy.place(r, encoded)]
        for start in range(0, len(wanted), BATCH_MAX):
            batch = wanted[start : start + BATCH_MAX]
            events = tuple(Event(r.id, r.id) for r in batch)
            groups = grouped(batch)
            body = body_of(deltas(groups), to_wire(bucket_deltas(groups.items(), self._meters)))
            encoded.sealed.append(Sealed(key=batch_key(events), events=events, body=body))
        return encoded

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        """What records and groups amount to, without those that the policy keeps out."""
        left = Encoded()
        wanted = [r for r in records if self._policy.place(r, left)]
        taken = []
        for group in groups:
            if self._policy.place(group.kind.example, Encoded()):
                taken.append(group)
            else:
                wanted += [r for r in group.records() if self._policy.place(r, left)]
        return batch_sums(wanted, self._meters, taken), left

    def applied(self, instance: str) -> Applied | Verdict | None:
        return self._store.applied(instance)

    def apply_sums(self, instance: str, batch: Applied, sums: Sequence[object]) -> Verdict:
        return self._store.apply_sums(instance, batch, [one for one in sums if isinstance(one, BatchSums)])

    async def send(self, sealed: Sealed) -> list[Verdict]:
        verdict = await asyncio.to_thread(self._store.apply, sealed.key, sealed.body)
        return [verdict] * len(sealed.events)

    async def cancel(self, event: Event, record: Record | None) -> Undone:
        """Take one record out of the sums again: hours, COUNT and SUM. What others were before, nobody knows."""
        if record is None:
            return Undone(Refused("record_gone"))
        groups = grouped([record])
        hours, buckets = deltas(groups), bucket_deltas(groups.items(), self._meters)
        undoable = [bucket for bucket in buckets if bucket.kind in SUMS]  # the others hang on all that went in
        left = [f"the meter {b.key.meter} ({b.kind}) keeps it" for b in buckets if b.kind not in SUMS]
        body = body_of([hour.negative() for hour in hours], to_wire([bucket.negative() for bucket in undoable]))
        verdict, kept = await asyncio.to_thread(self._store.undo, event_key(f"{event.event_id}~undone"), body)
        left += [f"the meter {name} keeps it: it was defined otherwise at the time, or never had it" for name in kept]
        return Undone(verdict, tuple(left))

    async def aclose(self) -> None:
        await asyncio.to_thread(self._store.close)
