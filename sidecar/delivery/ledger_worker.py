"""New records of a backend that adds up (`model.delivery.AddsUp`, the ledger): whole batches, and nothing a record.

A batch is added in one transaction there, which also notes its numbers; then one here moves the cursor over them. What
must always hold: the backend's note is never behind the cursor of what it was given, and at most one batch ahead of it.
After a death at any moment the note tells which records are in the sums already: they are counted, as duplicates, and
not added again. What the last batch left out (kept back by policy, or no record at all) is noted with it.

Batches are made from the spool, or handed over by whoever has the records at hand (`apply`): the sums are then ready,
and nothing is read or parsed at all. Correctness never depends on that: what is not handed over, or comes out of order,
or could not be added, is read from the spool.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from sidecar.delivery import encoding
from sidecar.delivery.context import Context
from sidecar.delivery.rows import NewParked, Run
from sidecar.delivery.tail import Feed, Item, Source
from sidecar.delivery.types import UNREADABLE
from sidecar.model.call_group import CallGroup
from sidecar.model.call_lines import CallLines
from sidecar.model.delivery import AddsUp, Applied, Backend, Blocked, Delivered, Duplicate, Encoded, Refused, Verdict
from sidecar.model.record import Record

NOT_EXACT = "sum_not_exact"
TRIES_WHOLE = 3  # a ledger that fails so often in a row is away: nothing but a small batch is kept in memory for it
_NO_BOUND = 1 << 30  # on requests: what was left out of a batch is few


@dataclass(frozen=True, slots=True, kw_only=True)
class SummedBatch:
    """Records of one spool that were committed, by their numbers, and what they add up to."""

    instance: str
    first_seq: int
    last_seq: int  # every number between them is a record that can be read
    sums: object  # what `AddsUp.add_up` made of them
    left: Encoded = field(default_factory=Encoded)  # and what it kept out, by record id
    lines: Mapping[str, tuple[int, bytes]] = field(default_factory=dict)  # of these: number and stored line
    stored: Sequence[bytes] = ()  # every line of it, in order, where the backend keeps them

    @property
    def size_bytes(self) -> int:
        return sum(map(len, self.stored))

    @property
    def records(self) -> int:
        return self.last_seq - self.first_seq + 1


@dataclass(frozen=True, slots=True)
class Added:
    """What became of an attempt. `plan`: what is to be stored; None where nothing is, and `verdicts` say why."""

    verdicts: Sequence[Verdict]
    plan: encoding.Plan | None = None


@dataclass(slots=True)
class _Summed:
    """Records that follow each other, and what they add up to. `sums`: None where that cannot be kept exact."""

    items: list[Item] = field(default_factory=list)
    by_id: dict[str, Item] = field(default_factory=dict)
    unreadable: list[Item] = field(default_factory=list)
    left: Encoded = field(default_factory=Encoded)
    sums: list[object] | None = None


class LedgerWorker:
    """Adds up new records for one backend. Its `Worker` says when, and stores what comes of it."""

    def __init__(self, backend: Backend, sums: AddsUp, context: Context) -> None:
        self._backend, self._sums, self._context = backend, sums, context
        limits = context.limits
        # Where each batch is a transaction on the network, large ones are many times as fast a record.
        self._full = limits.lines_read_records if sums.keeps_lines else limits.sum_records
        self._most = self._full
        self._failed = 0  # in a row
        self._notes: dict[str, Applied | None] = {}  # what the backend has noted, by instance
        self._handed: dict[str, deque[SummedBatch]] = {}
        self._handed_bytes: dict[str, int] = {}  # of their lines
        self._lines = CallLines()
        self._ahead: _Summed | None = None  # what comes next, added up while the batch before it was written

    def apply(self, batch: SummedBatch) -> bool:
        """Take a batch whose records are committed and whose sums are made. False: it is not wanted, and is read
        from the spool in its time."""
        if self._failed >= TRIES_WHOLE:
            return False  # it takes nothing, and what comes meanwhile is on disk
        waiting = self._handed.setdefault(batch.instance, deque())
        if waiting and waiting[-1].last_seq + 1 != batch.first_seq:
            self._drop(batch.instance)  # something between them was not handed over
        size_bytes = self._handed_bytes.get(batch.instance, 0) + batch.size_bytes
        if len(waiting) >= self._context.limits.sums_kept or size_bytes > self._context.limits.sums_bytes:
            return False
        waiting.append(batch)
        self._handed_bytes[batch.instance] = size_bytes
        return True

    def _drop(self, instance: str) -> None:
        self._handed.get(instance, deque()).clear()
        self._handed_bytes.pop(instance, None)

    def _next(self, instance: str) -> SummedBatch:
        batch = self._handed[instance].popleft()
        self._handed_bytes[instance] -= batch.size_bytes
        return batch

    def begin(self) -> None:
        """Believe what is on disk: here, and in the backend's own file."""
        self._notes.clear()
        self._handed.clear()
        self._handed_bytes.clear()
        self._ahead = None

    async def look(self) -> Verdict | None:
        """What keeps the backend from taking anything, as far as it can tell before something comes; None: nothing."""
        found = await asyncio.to_thread(self._sums.applied, "")  # of no spool
        return found if isinstance(found, Blocked) else None

    @property
    def wanted(self) -> int:
        """How many records to read: for the next batch, and those that are added up while it is written."""
        return 2 * self._most if self._sums.keeps_lines else self._most

    def handed(self, feed: Feed, now_s: float, *, hurry: bool) -> Source | None:
        """A spool of which sums were handed over that go on from its cursor. `now_s`: monotonic; what comes meanwhile
        is added together, unless in a hurry, or there is a whole batch of it."""
        for instance, waiting in self._handed.items():
            source = feed.source(instance)
            if source is None:
                continue
            while waiting and waiting[0].first_seq <= source.seq:
                self._next(instance)  # read from the spool meanwhile, all of it or a part
            if not waiting or waiting[0].first_seq != source.seq + 1:
                continue
            if hurry or now_s >= source.next_read_s or waiting[-1].last_seq - source.seq >= self._handed_most:
                return source
        return None

    async def add(self, source: Source, items: Sequence[Item], now_s: float) -> Added:
        """Add up the next records of a spool; none: the sums that were `handed` over. `now_s`: wall clock."""
        note = self._notes.get(source.instance)
        if source.instance not in self._notes:
            found = await asyncio.to_thread(self._sums.applied, source.instance)
            if found is not None and not isinstance(found, Applied):
                return Added([found] * max(len(items), 1))
            note = self._notes[source.instance] = found
        if note is not None and note.last_seq > source.seq and not items:
            self._drop(source.instance)  # it goes on from here, and not from there: read instead
            return Added(())
        if note is not None and items and items[0].seq <= note.last_seq:
            return await self._catch_up(note, items, now_s)
        if not items:
            return await self._add_handed(source.instance, self._take_handed(source.instance))
        if note is None and items[0].seq <= source.again_upto and not self._sums.keeps_lines:
            # Whether these were added before is not known any more: the rule for that is the same for all backends.
            known = [item for item in items if item.seq <= source.again_upto]
            return Added((), await self._plan(known, source.again_upto, now_s))
        return await self._add_items(source.instance, items)

    async def _catch_up(self, note: Applied, items: Sequence[Item], now_s: float) -> Added:
        """The run before died between the two transactions, or this file is older than the backend's."""
        plan = encoding.Plan()
        left: list[Item] = []
        there: list[int] = []
        for item in items:
            if item.seq > note.last_seq:
                break
            plan.taken, plan.upto_seq = plan.taken + 1, item.seq
            if item.hole is not None:
                plan.holes.append(item.hole)
            elif item.seq in note.left_out or (item.seq < note.first_seq and self._kept_out(item)):
                left.append(item)
            else:
                there.append(item.seq)
        plan.applied = _runs(there, duplicate=True)
        if left:
            again = await self._plan(left, 0, now_s)
            plan.requests, plan.skipped, plan.parked = again.requests, again.skipped, again.parked
        return Added((), plan)

    def _kept_out(self, item: Item) -> bool:
        """Whether the sums are without it, as the policy is now: what was left out long ago is not noted any more."""
        record = item.record
        if record is None:
            return True
        try:
            _, left = self._sums.add_up([record])
        except ArithmeticError:
            return True
        return record.id in left.skipped or record.id in left.parked

    async def _plan(self, items: Sequence[Item], again_upto: int, now_s: float) -> encoding.Plan:
        limits = self._context.limits
        return await encoding.plan(
            self._backend, items, room=_NO_BOUND, again_upto=again_upto, now_s=now_s, limits=limits
        )

    @property
    def _handed_most(self) -> int:
        """How many records are added at once whose sums are made."""
        limits = self._context.limits
        return limits.lines_records if self._sums.keeps_lines else limits.sums_records

    def _take_handed(self, instance: str) -> list[SummedBatch]:
        taken: list[SummedBatch] = []
        waiting, records = self._handed[instance], 0
        while waiting and (not taken or records + waiting[0].records <= self._handed_most):
            taken.append(self._next(instance))
            records += taken[-1].records
        return taken

    async def _add_handed(self, instance: str, batches: Sequence[SummedBatch]) -> Added:
        plan = encoding.Plan(upto_seq=batches[-1].last_seq)
        for batch in batches:
            for record_id, reason in batch.left.skipped.items():
                plan.skipped.setdefault(reason, []).append(batch.lines[record_id][0])
            for record_id, reason in batch.left.parked.items():
                seq, line = batch.lines[record_id]
                plan.parked.append(NewParked(seq=seq, record_id=record_id, reason=reason, line=line))
        out, first = _out(plan), batches[0].first_seq
        if out:
            plan.applied = _runs([seq for seq in range(first, plan.upto_seq + 1) if seq not in out])
        else:
            plan.applied = [Run(first, plan.upto_seq)]
        lines = [line for batch in batches for line in enumerate(batch.stored, batch.first_seq)]
        return await self._write(instance, plan, first, out, [batch.sums for batch in batches], lines)

    async def _add_items(self, instance: str, items: Sequence[Item]) -> Added:
        """As many of these as are tried at once; a hole stands alone, so that what is added has no gap of its own."""
        if items[0].hole is not None:
            return Added((), encoding.Plan(taken=1, upto_seq=items[0].seq, holes=[items[0].hole]))
        summed, self._ahead = self._ahead, None
        now = items[: self._most]
        if summed is None or summed.items[0] is not now[0] or len(summed.items) != len(now):
            summed = await self._sum(now)
        items, ahead = summed.items, items[len(summed.items) :]
        plan = encoding.Plan(taken=len(items), upto_seq=items[-1].seq)
        plan.parked = [_parked(item, f"seq:{item.seq}", UNREADABLE) for item in summed.unreadable]
        if not summed.by_id:
            return Added((), plan)  # nothing to add, so nothing to note
        if summed.sums is None:
            return await self._search(instance, items, Refused(NOT_EXACT))
        for record_id, reason in summed.left.skipped.items():
            plan.skipped.setdefault(reason, []).append(summed.by_id[record_id].seq)
        plan.parked += [_parked(summed.by_id[one], one, reason) for one, reason in summed.left.parked.items()]
        out = _out(plan)
        plan.applied = _runs([item.seq for item in items if item.seq not in out])
        lines = [(item.seq, item.line) for item in summed.by_id.values()] if self._sums.keeps_lines else []
        added = await self._write(instance, plan, items[0].seq, out, summed.sums, lines, ahead=ahead)
        if added.plan is None and isinstance(added.verdicts[0], Refused):
            return await self._search(instance, items, added.verdicts[0])
        return added

    async def _sum(self, items: Sequence[Item]) -> _Summed:
        """What the first of these add up to, up to a hole; each slice lets others have their turn."""
        summed = _Summed()
        self._lines.take()  # of one that was cut short
        for count, item in enumerate(items, 1):
            if count % self._context.limits.sum_lines == 0:
                await _let_others()
            if item.hole is not None:
                break
            record_id = self._lines.add(item.line)
            if record_id is None:
                summed.unreadable.append(item)
            elif record_id in summed.by_id:
                return await self._sum(summed.items)  # an id that stands twice (never ours) waits for its own batch
            else:
                summed.by_id[record_id] = item
            summed.items.append(item)
        records, groups = self._lines.take()
        sums: list[object] = []
        most = self._context.limits.sum_groups
        try:
            for start in range(0, max(len(records), len(groups)), most):
                await _let_others()
                sums.append(self._add_up(summed, records[start : start + most], groups[start : start + most]))
        except ArithmeticError:
            return summed
        summed.sums = sums
        return summed

    def _add_up(self, summed: _Summed, records: Sequence[Record], groups: Sequence[CallGroup]) -> object:
        some, left = self._sums.add_up(records, groups)
        summed.left.skipped.update(left.skipped)
        summed.left.parked.update(left.parked)
        return some

    async def _search(self, instance: str, items: Sequence[Item], verdict: Refused) -> Added:
        """One of them cannot be added: half of them are tried alone, until it stands alone and is parked."""
        if len(items) > 1:
            self._most = len(items) // 2
            return await self._add_items(instance, items[: self._most])
        self._most = self._full
        record = items[0].record
        plan = encoding.Plan(taken=1, upto_seq=items[0].seq)
        plan.parked.append(_parked(items[0], "" if record is None else record.id, verdict.reason))
        return Added([verdict], plan)

    async def _write(
        self,
        instance: str,
        plan: encoding.Plan,
        first_seq: int,
        out: frozenset[int],
        sums: Sequence[object],
        lines: Sequence[tuple[int, bytes]],
        *,
        ahead: Sequence[Item] = (),
    ) -> Added:
        """Add what the batch of this plan amounts to, there; `plan` is what is to be stored here when that is done.
        `ahead`: what is added up meanwhile, since it comes next."""
        batch = Applied(first_seq, plan.upto_seq, out)
        writing = asyncio.ensure_future(asyncio.to_thread(self._sums.apply_sums, instance, batch, sums, lines))
        try:
            if ahead and ahead[0].hole is None:
                self._ahead = await self._sum(ahead[: self._full])
        except asyncio.CancelledError:
            writing.cancel()
            raise
        verdict = await writing
        verdicts = [verdict] * max(sum(run.records for run in plan.applied), 1)
        if not isinstance(verdict, (Delivered, Duplicate)):
            self.begin()  # whatever is believed of that file may be wrong
            self._failed += 1
            if self._failed >= TRIES_WHOLE:
                # The same ones are tried until it takes them, for hours perhaps: few are held parsed meanwhile.
                self._most = min(self._most, self._context.limits.sum_records)
            return Added(verdicts)
        self._failed = 0
        if self._sums.keeps_lines:
            if isinstance(verdict, Duplicate):
                plan.applied = [replace(run, duplicate=True) for run in plan.applied]
        else:
            self._notes[instance] = batch
        self._most = min(self._most * 2, self._full)
        return Added(verdicts, plan)


async def _let_others() -> None:
    """Let others have their turn, threads too: the one that writes a batch gets the interpreter's lock soon only where
    this one waits for something, which `sleep(0)` does not. Else it would begin when the next batch is added up."""
    await asyncio.get_running_loop().run_in_executor(None, _nothing)


def _nothing() -> None:
    pass


def _parked(item: Item, record_id: str, reason: str) -> NewParked:
    return NewParked(seq=item.seq, record_id=record_id, reason=reason, line=item.line)


def _out(plan: encoding.Plan) -> frozenset[int]:
    """What is not in the sums of this plan's batch."""
    return frozenset([one.seq for one in plan.parked] + [seq for seqs in plan.skipped.values() for seq in seqs])


def _runs(seqs: Sequence[int], *, duplicate: bool = False) -> list[Run]:
    """Rising numbers as runs without a gap."""
    if not seqs or seqs[-1] - seqs[0] + 1 == len(seqs):
        return [Run(seqs[0], seqs[-1], duplicate)] if seqs else []
    runs: list[Run] = []
    first = last = seqs[0]
    for seq in seqs[1:]:
        if seq != last + 1:
            runs.append(Run(first, last, duplicate))
            first = seq
        last = seq
    return [*runs, Run(first, last, duplicate)]
