"""The recount: what the frames themselves say, beside what the totals say.

Reads every segment of a slot, every frame against its checksum, its lines against their numbers, and the cumulative
totals of each against those before it. Changes nothing and may run beside the writer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import orjson

from sidecar.spool import files
from sidecar.spool.reader import SegmentInfo, SpoolReader
from sidecar.spool.segment import CommitMark, Frame, Hole, SegmentFile
from sidecar.spool.types import SpoolError, SpoolTotals, intent_id

# Enough to see what is wrong; a broken disk would fill the screen.
_PROBLEMS_MAX = 50


@dataclass(slots=True, frozen=True, kw_only=True)
class SlotReport:
    """One slot, recounted. It is in order when `problems` is empty."""

    instance: str
    segments: int
    groups: int
    records: int  # recounted
    before: int  # recorded in segments that retention took
    missing: int  # recorded once, no longer readable
    totals: SpoolTotals  # as stored with the last commit
    problems: tuple[str, ...]


@dataclass(slots=True)
class _Count:
    """Carried from frame to frame."""

    groups: int = 0
    records: int = 0
    missing: int = 0
    recorded: int = 0
    last_seq: int = 0
    commit_number: int = 0


def verify(reader: SpoolReader, told: Callable[[int], None] = lambda records: None) -> list[SlotReport]:
    """Recount every slot of a data directory. `told`: how many records were read so far."""
    reports: list[SlotReport] = []
    for instance in reader.instances():
        before = sum(report.records for report in reports)
        reports.append(verify_slot(reader, instance, partial(_told, told, before)))
    return reports


def _told(told: Callable[[int], None], before: int, records: int) -> None:
    told(before + records)


def verify_slot(reader: SpoolReader, instance: str, told: Callable[[int], None] = lambda records: None) -> SlotReport:
    """Recount one slot."""
    # The mark first, then totals: what is committed while we count may only add to them.
    mark = CommitMark.read(files.slot_dir(reader.root, instance))
    totals = reader.totals(instance)
    segments = reader.segments(instance)
    problems: list[str] = []
    _, before = files.read_retired(files.slot_dir(reader.root, instance))
    count = _Count(recorded=before)
    for info in segments:
        _count_segment(info, instance, count, problems, totals.recorded, told)
    recounted = before + count.records + count.missing
    if recounted != totals.recorded:
        problems.append(f"the segments hold {recounted} records, the totals say {totals.recorded}")
    if mark is not None and mark.recorded > totals.recorded:
        gone = mark.recorded - totals.recorded
        problems.append(f"the segments end at {totals.recorded} records, and {gone} more were on disk")
    if not totals.holds:
        lost = sum(totals.lost.values())
        problems.append(
            f"admitted {totals.admitted} is not recorded {totals.recorded} + open {totals.open} + lost {lost}"
        )
    return SlotReport(
        instance=instance,
        segments=len(segments),
        groups=count.groups,
        records=count.records,
        before=before,
        missing=count.missing,
        totals=totals,
        problems=tuple(problems[:_PROBLEMS_MAX]),
    )


def _count_segment(
    info: SegmentInfo,
    instance: str,
    count: _Count,
    problems: list[str],
    upto_recorded: int,
    told: Callable[[int], None],
) -> None:
    name = info.path.name
    base = info.base_recorded
    if base != count.recorded:
        problems.append(f"{name}: {base - count.recorded} records before it cannot be read")
        count.missing += max(base - count.recorded, 0)
    count.recorded = base
    count.commit_number = 0
    try:
        with SegmentFile(info.path) as file:
            if file.damaged is not None:
                problems.append(f"{name}: {file.damaged}")
            sealed = file.seal() is not None
            for item in file.frames():
                if isinstance(item, Hole):
                    # At the end of a segment that is being written it is the next commit.
                    if sealed or not info.newest or not item.torn:
                        problems.append(f"{name}: bytes {item.offset} to {item.end} are no record")
                elif item.commit_number >= info.bound_commit or item.recorded > upto_recorded:
                    break
                else:
                    _count_frame(item, name, instance, count, problems)
                    told(count.records)
    except SpoolError as error:
        problems.append(f"{name}: {error}")


def _count_frame(frame: Frame, name: str, instance: str, count: _Count, problems: list[str]) -> None:
    if frame.count and frame.first_seq <= count.last_seq:
        problems.append(f"{name}: group {frame.first_seq} repeats numbers up to {count.last_seq}")
    if frame.commit_number > count.commit_number + 1 > 1:
        problems.append(f"{name}: commits {count.commit_number + 1} to {frame.commit_number - 1} cannot be read")
    count.commit_number = frame.commit_number
    if frame.before != count.recorded:
        count.missing += max(frame.before - count.recorded, 0)
        problems.append(f"{name}: group {frame.first_seq} follows {count.recorded} records and says {frame.before}")
    lines = frame.lines
    if len(lines) != frame.count:
        problems.append(f"{name}: group {frame.first_seq} holds {len(lines)} records and says {frame.count}")
    count.groups += bool(lines)
    count.records += len(lines)
    count.recorded = frame.recorded
    count.last_seq = max(frame.last_seq, count.last_seq)
    for seq, line in enumerate(lines, frame.first_seq):
        if not _is_record(line, seq, instance):
            problems.append(f"{name}: number {seq} is not the record it should be")
    for line in frame.intents:
        try:
            intent_id(line)
        except ValueError as error:
            problems.append(f"{name}: commit {frame.commit_number}: {error}")


def _is_record(line: bytes, seq: int, instance: str) -> bool:
    try:
        row = orjson.loads(line)
        return bool(row["seq"] == seq and row["instance"] == instance and row["id"])
    except (ValueError, KeyError, TypeError):
        return False
