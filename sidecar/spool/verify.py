"""The recount: what the rows themselves say, beside what the totals say.

Reads every chunk of a slot, checks every group against its checksum, its lines against their numbers, and the
cumulative totals of every row against the rows before it. Changes nothing and may run beside the writer.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from typing import Any

import orjson

from sidecar.spool import files
from sidecar.spool.groups import INTENT_COLUMNS, RECORD_COLUMNS, IntentGroup, RecordGroup
from sidecar.spool.reader import ChunkInfo, SpoolReader
from sidecar.spool.recovery import reading
from sidecar.spool.words import SpoolDamaged, SpoolError, SpoolTotals

# Enough to see what is wrong; a broken disk would fill the screen.
_PROBLEMS_MAX = 50


@dataclass(slots=True, frozen=True, kw_only=True)
class SlotReport:
    """One slot, recounted. It is in order when `problems` is empty."""

    instance: str
    chunks: int
    groups: int
    records: int  # rows recounted
    before: int  # recorded in chunks that retention took
    missing: int  # recorded once, no longer readable
    totals: SpoolTotals  # as stored with the last commit
    problems: tuple[str, ...]

    @property
    def in_order(self) -> bool:
        return not self.problems


@dataclass(slots=True)
class _Count:
    """Carried from row to row."""

    groups: int = 0
    records: int = 0
    missing: int = 0
    recorded: int = 0
    last_seq: int = 0


def verify(reader: SpoolReader) -> list[SlotReport]:
    """Recount every slot of a data directory."""
    return [verify_slot(reader, instance) for instance in reader.instances()]


def verify_slot(reader: SpoolReader, instance: str) -> SlotReport:
    """Recount one slot."""
    # Totals first: rows that are committed while we count may only add to them.
    totals = reader.totals(instance)
    chunks = reader.chunks(instance)
    problems: list[str] = []
    _, before = files.read_retired(files.slot_dir(reader.root, instance))
    count = _Count(recorded=before)
    for info in chunks:
        _count_chunk(info, instance, count, problems, totals.recorded)
    recounted = before + count.records + count.missing
    if recounted != totals.recorded:
        problems.append(f"the rows hold {recounted} records, the totals say {totals.recorded}")
    if not totals.holds:
        lost = sum(totals.lost.values())
        problems.append(
            f"admitted {totals.admitted} is not recorded {totals.recorded} + open {totals.open} + lost {lost}"
        )
    return SlotReport(
        instance=instance,
        chunks=len(chunks),
        groups=count.groups,
        records=count.records,
        before=before,
        missing=count.missing,
        totals=totals,
        problems=tuple(problems[:_PROBLEMS_MAX]),
    )


def _count_chunk(info: ChunkInfo, instance: str, count: _Count, problems: list[str], upto_recorded: int) -> None:
    name = info.path.name
    base = info.opening.base_recorded
    if base != count.recorded:
        problems.append(f"{name}: {base - count.recorded} records before it cannot be read")
        count.missing += max(base - count.recorded, 0)
    count.recorded = base
    try:
        with reading(info.path) as connection:
            _check_intents(connection, name, problems)
            rows = connection.execute(
                f"SELECT {RECORD_COLUMNS} FROM record_group WHERE first_seq < ? AND recorded <= ? ORDER BY first_seq",
                (info.bound_seq, upto_recorded),
            )
            for row in rows:
                _count_row(row, name, instance, count, problems)
    except (SpoolError, sqlite3.Error) as error:
        problems.append(f"{name}: {error}")


def _count_row(row: tuple[Any, ...], name: str, instance: str, count: _Count, problems: list[str]) -> None:
    try:
        group = RecordGroup.read(row)
    except (SpoolDamaged, ValueError) as error:
        problems.append(f"{name}: {error}")
        return
    if group.first_seq <= count.last_seq:
        problems.append(f"{name}: group {group.first_seq} repeats numbers up to {count.last_seq}")
    before = group.totals.recorded - group.count
    if before != count.recorded:
        count.missing += max(before - count.recorded, 0)
        problems.append(f"{name}: group {group.first_seq} follows {count.recorded} records and says {before}")
    count.groups += 1
    count.records += group.count
    count.recorded = group.totals.recorded
    count.last_seq = group.last_seq
    for seq, line in enumerate(group.body.split(b"\n"), group.first_seq):
        if not _is_record(line, seq, instance):
            problems.append(f"{name}: number {seq} is not the record it should be")


def _is_record(line: bytes, seq: int, instance: str) -> bool:
    try:
        row = orjson.loads(line)
        return bool(row["seq"] == seq and row["instance"] == instance and row["id"])
    except (ValueError, KeyError, TypeError):
        return False


def _check_intents(connection: sqlite3.Connection, name: str, problems: list[str]) -> None:
    for row in connection.execute(f"SELECT {INTENT_COLUMNS} FROM intent_group ORDER BY commit_number"):
        try:
            IntentGroup.read(row)
        except (SpoolDamaged, ValueError) as error:
            problems.append(f"{name}: {error}")
