"""`ledger`: the usage store, embedded or shared by many sidecars, as a backend like any other.

New records come in batches, known by their numbers: what they add up to and how far they go is committed together, so
nothing is kept a record. What is offered again after it was parked comes as a sealed request, whose bytes are the
effects of its records: the store adds them together with the request's key, so a repeat is recognised. The store is
handed in: this file knows how effects are made, `sidecar.ledger` how they are kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from sidecar.backends.base import Context, Policy, RecordSettings
from sidecar.backends.batching import batch_key, event_key
from sidecar.ledger.postgres_schema import Reported, line_of
from sidecar.meters.buckets import SUMS, BatchSums, batch_sums, bucket_deltas, to_wire
from sidecar.meters.definition import Meter
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

BODY_BYTES_MAX: Final = 4 << 20  # of a request with whole records: it waits in `delivery.db`
BATCH_MAX: Final = 1000  # one transaction: 20 ms of work at most, and one fsync for it
DEDUP_WINDOW_S: Final = 30 * 86_400.0  # how long the store keeps keys (`sidecar.ledger.store.KEYS_KEPT_S`)


class RecordSums:
    """What records amount to, by the policy and the meters of one backend. Pure."""

    def __init__(self, policy: Policy, meters: Sequence[Meter]) -> None:
        self._policy, self._meters = policy, meters

    def wanted(self, records: Sequence[Record], encoded: Encoded) -> list[Record]:
        return [r for r in records if self._policy.place(r, encoded)]

    def effects(self, records: Sequence[Record]) -> BatchSums:
        """Of all these, whatever the policy says."""
        groups = grouped(records)
        return BatchSums(deltas(groups), bucket_deltas(groups.items(), self._meters))

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        """What records and groups amount to, without those that the policy keeps out."""
        left = Encoded()
        wanted = self.wanted(records, left)
        taken = []
        for group in groups:
            if self._policy.place(group.kind.example, Encoded()):
                taken.append(group)
            else:
                wanted += self.wanted(group.records(), left)
        return batch_sums(wanted, self._meters, taken), left

    def negative(self, record: Record) -> tuple[BatchSums, list[str]]:
        """What takes a record out again (hours, COUNT and SUM), and in words what cannot be: what others were before,
        nobody knows."""
        sums = self.effects([record])
        undoable = [bucket for bucket in sums.buckets if bucket.kind in SUMS]  # the others hang on all that went in
        left = [f"the meter {b.key.meter} ({b.kind}) keeps it" for b in sums.buckets if b.kind not in SUMS]
        hours = [hour.negative() for hour in sums.hourly]
        return BatchSums(hours, [bucket.negative() for bucket in undoable]), left


class LedgerBackend:
    """Adds what records amount to into the embedded store."""

    name = "ledger"
    keeps_lines = False
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
        self._sums = RecordSums(settings.policy, context.definitions())
        self._store = context.open_ledger()

    def encode(self, records: Sequence[Record]) -> Encoded:
        encoded = Encoded()
        wanted = self._sums.wanted(records, encoded)
        for start in range(0, len(wanted), BATCH_MAX):
            batch = wanted[start : start + BATCH_MAX]
            events = tuple(Event(r.id, r.id) for r in batch)
            sums = self._sums.effects(batch)
            body = body_of(sums.hourly, to_wire(sums.buckets))
            encoded.sealed.append(Sealed(key=batch_key(events), events=events, body=body))
        return encoded

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        return self._sums.add_up(records, groups)

    def applied(self, instance: str) -> Applied | Verdict | None:
        return self._store.applied(instance)

    def apply_sums(
        self, instance: str, batch: Applied, sums: Sequence[object], lines: Sequence[tuple[int, bytes]] = ()
    ) -> Verdict:
        return self._store.apply_sums(instance, batch, [one for one in sums if isinstance(one, BatchSums)])

    async def send(self, sealed: Sealed) -> list[Verdict]:
        verdict = await asyncio.to_thread(self._store.apply, sealed.key, sealed.body)
        return [verdict] * len(sealed.events)

    async def cancel(self, event: Event, record: Record | None) -> Undone:
        """Take one record out of the sums again: hours, COUNT and SUM. What others were before, nobody knows."""
        if record is None:
            return Undone(Refused("record_gone"))
        sums, left = self._sums.negative(record)
        body = body_of(sums.hourly, to_wire(sums.buckets))
        verdict, kept = await asyncio.to_thread(self._store.undo, event_key(f"{event.event_id}~undone"), body)
        return Undone(verdict, (*left, *map(_kept, kept)))

    async def aclose(self) -> None:
        await asyncio.to_thread(self._store.close)


class SharedLedgerBackend:
    """Puts records, and what they amount to, into the ledger that many sidecars share.

    It knows each record again by its id, so nothing is noted of what was sent, and whatever is not known to be there is
    sent again.
    """

    name = "ledger"
    keeps_lines = True
    settings_type = RecordSettings
    abilities = Abilities(
        events_max=BATCH_MAX,
        atomicity=Atomicity.ALL_OR_NOTHING,
        dedup=Dedup.EVENT_ID,
        concurrency=1,
        knows_duplicates=True,
        knows_records=True,
        bills=False,
    )

    def __init__(self, settings: RecordSettings, context: Context) -> None:
        if context.open_shared_ledger is None:
            raise ValueError("the shared ledger needs a store: pass open_shared_ledger in the context")
        self._sums = RecordSums(settings.policy, context.definitions())
        self._store = context.open_shared_ledger()

    def encode(self, records: Sequence[Record]) -> Encoded:
        """Requests whose bytes are the records' lines."""
        encoded = Encoded()
        batch: list[Record] = []
        size = 0
        for record in self._sums.wanted(records, encoded):
            if batch and (len(batch) == BATCH_MAX or size + len(record.json) > BODY_BYTES_MAX):
                encoded.sealed.append(_sealed(batch))
                batch, size = [], 0
            batch.append(record)
            size += len(record.json)
        if batch:
            encoded.sealed.append(_sealed(batch))
        return encoded

    def add_up(self, records: Sequence[Record], groups: Sequence[CallGroup] = ()) -> tuple[BatchSums, Encoded]:
        return self._sums.add_up(records, groups)

    def applied(self, instance: str) -> Applied | Verdict | None:
        return None

    def apply_sums(
        self, instance: str, batch: Applied, sums: Sequence[object], lines: Sequence[tuple[int, bytes]] = ()
    ) -> Verdict:
        found = (line_of(line, counted=seq not in batch.left_out) for seq, line in lines)
        whole = [one for one in sums if isinstance(one, BatchSums)]
        return self._store.write([line for line in found if line is not None], whole, self._again)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        verdict = await asyncio.to_thread(self._send, sealed.body)
        return [verdict] * len(sealed.events)

    def _send(self, body: bytes) -> Verdict:
        lines = [line_of(line) for line in body.split(b"\n")]
        if None in lines:  # sealed for the embedded ledger, before there was a shared one
            return Refused("not_a_ledger_delivery")
        return self._store.write([line for line in lines if line is not None], None, self._again)

    def _again(self, lines: Sequence[bytes]) -> BatchSums:
        return self._sums.effects([Record.from_json(line) for line in lines])

    async def cancel(self, event: Event, record: Record | None) -> Undone:
        """Take one record out of the sums again; its row stays, and says so."""
        if record is None:
            return Undone(Refused("record_gone"))
        sums, left = self._sums.negative(record)
        verdict, kept = await asyncio.to_thread(self._store.take_back, record.id, sums)
        return Undone(verdict, (*left, *map(_kept, kept)))

    @property
    def where(self) -> str:
        """Host, port and database."""
        return self._store.where

    async def examine(self) -> list[str]:
        """What keeps the database from being used."""
        problem = await asyncio.to_thread(self._store.look)
        return [] if problem is None else [problem]

    @property
    def copied(self) -> bool:
        """Whether another data directory was found to write under our name."""
        return self._store.copied

    async def adopt(self, *, copy: bool) -> None:
        """Somebody has decided: it is the original, or a copy that becomes another one. Raises `OSError`."""
        await asyncio.to_thread(lambda: self._store.adopt(copy=copy))

    async def report(self, told: Reported) -> Verdict:
        """Say how this sidecar stands."""
        return await asyncio.to_thread(self._store.report, told)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._store.close)


def _sealed(batch: Sequence[Record]) -> Sealed:
    events = tuple(Event(r.id, r.id) for r in batch)
    return Sealed(key=batch_key(events), events=events, body=b"\n".join(r.json for r in batch))


def _kept(meter: str) -> str:
    return f"the meter {meter} keeps it: it was defined otherwise at the time, or never had it"
