"""One transaction, worked out before the disk is asked: which rows the waiting batches become."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sidecar.spool.groups import IntentGroup, RecordGroup, Totals, lost_json
from sidecar.spool.words import Batch


@dataclass(slots=True)
class Position:
    """Where the writer stands: what is on disk, cumulative."""

    instance: str
    chunk_number: int = 0  # the highest in use
    commit_number: int = 0
    last_seq: int = 0
    admitted: int = 0
    recorded: int = 0
    lost: str = "{}"
    open_intents: dict[str, bytes] | None = None


@dataclass(slots=True, frozen=True)
class Plan:
    """The rows, and where the writer stands once they are on disk."""

    groups: tuple[RecordGroup, ...]
    opened: Mapping[str, bytes]
    closed: frozenset[str]
    totals: Totals
    records: int
    size_bytes: int
    first_seq: int
    last_seq: int

    def intents(self, open_intents: Mapping[str, bytes], *, restate: bool) -> IntentGroup | None:
        """The row beside the records, if there has to be one. `restate`: the chunk begins with it."""
        if restate:  # all that is open stands there, so that recovery needs no other chunk
            still_open = {**open_intents, **self.opened}
            return IntentGroup(tuple(line for id_, line in still_open.items() if id_ not in self.closed), self.totals)
        if self.opened or not self.groups:
            return IntentGroup(tuple(self.opened.values()), self.totals)
        return None


def make_plan(at: Position, batches: list[Batch], group_bytes: int, now_ns: int) -> Plan:
    """Lines into groups, intents opened and closed, totals as they will be; nothing of `at` is changed."""
    last = batches[-1]
    opened = {id_: line for batch in batches for id_, line in batch.opens}
    closed = frozenset(id_ for batch in batches for id_ in batch.closes)
    if opened and closed:  # opened and closed inside one transaction: nobody need ever know
        both = closed & opened.keys()
        opened = {id_: line for id_, line in opened.items() if id_ not in both}
        closed = closed - both
    totals = Totals(
        commit_number=at.commit_number + 1,
        committed_ns=now_ns,
        admitted=last.admitted,
        recorded=at.recorded,
        lost=lost_json(last.lost),
        closes="\n".join(closed),
    )
    groups: list[RecordGroup] = []
    recorded = at.recorded
    size = 0
    for first_seq, lines in _runs(batches, group_bytes):
        recorded += len(lines)
        body = b"\n".join(lines)
        size += len(body)
        groups.append(RecordGroup(first_seq, len(lines), body, replace(totals, recorded=recorded)))
    if len(groups) > 1:  # what is closed stands once, with the last
        groups[:-1] = [replace(g, totals=replace(g.totals, closes="")) for g in groups[:-1]]
    totals = replace(totals, recorded=recorded, closes="" if groups else totals.closes)
    return Plan(
        groups=tuple(groups),
        opened=opened,
        closed=closed,
        totals=totals,
        records=recorded - at.recorded,
        size_bytes=size,
        first_seq=groups[0].first_seq if groups else at.last_seq + 1,
        last_seq=groups[-1].last_seq if groups else at.last_seq,
    )


def _runs(batches: list[Batch], limit_bytes: int) -> Iterable[tuple[int, list[bytes]]]:
    """Lines with consecutive numbers, cut at `limit_bytes`: each becomes one row."""
    lines: list[bytes] = []
    first_seq = size = 0
    for batch in batches:
        if not batch.lines:
            continue
        if lines and (first_seq + len(lines) != batch.first_seq or size >= limit_bytes):
            yield first_seq, lines
            lines, size = [], 0
        if not lines:
            first_seq = batch.first_seq
        if batch.size_bytes <= limit_bytes:
            lines.extend(batch.lines)
            size += batch.size_bytes
            continue
        for line in batch.lines:  # more in one loop turn than a row should hold
            if lines and size + len(line) > limit_bytes:
                yield first_seq, lines
                first_seq, lines, size = first_seq + len(lines), [], 0
            lines.append(line)
            size += len(line)
    if lines:
        yield first_seq, lines
