"""Replacing a damaged chunk by what can be read of it, under the same number.

The damaged file is never written: its rows are read page by page (`leaves`), those that match their checksums go
into a new file, and then it moves to `set-aside/` as it was. The new file is complete on disk before the old one
moves, and a crash between the two renames is mended by `finish_swaps`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final

from sidecar.spool import files
from sidecar.spool.chunk import NO_BOUND, PAGE_BYTES, Chunk
from sidecar.spool.groups import INTENT_COLUMN_COUNT, RECORD_COLUMN_COUNT, IntentGroup, Opening, RecordGroup
from sidecar.spool.leaves import Frame, Leaves, frames, has_rows, read_salts
from sidecar.spool.words import SpoolDamaged

log = logging.getLogger("sidecar.spool")

_SWAP: Final = ".salvaged"  # a finished replacement, waiting to take its place
_DRAFT: Final = ".draft"  # one that is being written
_GROUPS_A_COMMIT: Final = 64  # of the copy: bounds memory at some 32 MiB


@dataclass(slots=True, frozen=True)
class Salvaged:
    """What a damaged chunk gave."""

    records: int
    set_aside: Path


def replace_chunk(root: Path, instance: str, path: Path, number: int, *, upto_seq: int | None = None) -> Salvaged:
    """Copy what is readable (and not beyond `upto_seq`) into a new file, set the old one aside, swap them."""
    draft = _Draft(path.with_name(path.name + _DRAFT), number, instance, NO_BOUND if upto_seq is None else upto_seq)
    files.remove_chunk(draft.path)
    leaves = Leaves(path, files.wal_path(path))
    try:
        draft.fill(leaves)
    finally:
        leaves.close()
    any_left = draft.seal()
    swap = path.with_name(path.name + _SWAP)
    if any_left:
        draft.path.rename(swap)
        files.sync_directory(path.parent)
    moved = files.set_aside(root, instance, path)
    if any_left:
        swap.rename(path)
        files.sync_directory(path.parent)
    log.error(
        "a damaged chunk was set aside", extra={"facts": {"set_aside": str(moved), "records_salvaged": draft.records}}
    )
    return Salvaged(draft.records, moved)


def finish_swaps(root: Path, instance: str, slot: Path) -> None:
    """After a crash inside `replace_chunk`: a finished copy takes its place, an unfinished one goes."""
    for name in sorted(os.listdir(slot)):
        path = slot / name
        if name.endswith(_DRAFT):
            files.remove_chunk(path)
        elif name.endswith(_SWAP):
            place = path.with_name(name.removesuffix(_SWAP))
            if place.exists():
                files.set_aside(root, instance, place)
            path.rename(place)
    files.sync_directory(slot)


def log_is_damaged(path: Path, visible_commits: int) -> bool:
    """Whether the log of an unsealed chunk holds more commits than SQLite shows after its recovery.

    SQLite takes that for the torn end of an interrupted transaction and opens clean, but a flipped bit in
    the middle looks the same and hides every commit behind it. Reading the rest without SQLite's checksums
    and with ours tells the two apart, and costs nothing when it was only torn. Where a chunk's first commit was
    cut short there is no mark of it, and the log's own head is whole (it is synced before the first frame).
    """
    wal = files.wal_path(path)
    with wal.open("rb") as file:
        if read_salts(file) is None:
            return True
        current = [frame for frame in frames(wal) if frame.current]
        commits = sum(1 for frame in current if frame.commit_pages)
        return commits - _begins_with_schema(file, current) > visible_commits


def _begins_with_schema(wal: BinaryIO, current: list[Frame]) -> bool:
    """Whether the first transaction is the one that made the tables: it brought no row.

    Mostly it is not, because the log is begun anew for the first records; it is when a reader stood in the way.
    """
    for frame in current:
        wal.seek(frame.offset)
        image = wal.read(PAGE_BYTES)
        if frame.page > 1 and has_rows(image):
            return False
        if frame.commit_pages:
            return True
    return False


class _Draft:
    """The replacement."""

    def __init__(self, path: Path, number: int, instance: str, upto_seq: int) -> None:
        self.path = path
        self.records = 0
        self._number = number
        self._instance = instance
        self._upto_seq = upto_seq
        self._chunk: Chunk | None = None
        self._taken: set[tuple[int, int]] = set()  # number of columns and key of each row
        self._begins: list[tuple[int, int]] = []  # first number and recorded before it, of each group

    def fill(self, leaves: Leaves) -> None:
        """Take every row that matches its checksum, once."""
        groups: list[RecordGroup] = []
        for row in leaves.rows(self._wanted):
            try:
                if len(row) == RECORD_COLUMN_COUNT:
                    group = RecordGroup.read(row)
                    if group.last_seq <= self._upto_seq:
                        groups.append(replace(group, salvaged=True))
                        self._begins.append((group.first_seq, group.totals.recorded - group.count))
                        self.records += group.count
                else:
                    self._write([], IntentGroup.read(row))
            except (SpoolDamaged, ValueError, TypeError):
                continue
            self._taken.add((len(row), row[0]))
            if len(groups) == _GROUPS_A_COMMIT:
                self._write(groups, None)
                groups = []
        if groups:
            self._write(groups, None)
        if self._chunk is not None:
            opening = self._opening(leaves.pairs())
            if opening is None:
                self._drop(self._chunk)
            else:
                self._chunk.write([], None, opening)

    def seal(self) -> bool:
        """Put the file away; False when nothing was readable and there is none."""
        if self._chunk is None:
            return False
        self._chunk.seal()
        return True

    def _wanted(self, columns: int, key: int) -> bool:
        return columns in (RECORD_COLUMN_COUNT, INTENT_COLUMN_COUNT) and (columns, key) not in self._taken

    def _drop(self, chunk: Chunk) -> None:
        """Intents and no word of where the file begins: its first transaction was cut short, and the file before this
        one still has them. Guessing the beginning would count everything anew from there."""
        chunk.close()
        files.remove_chunk(self.path)
        self._chunk = None

    def _opening(self, pairs: Iterable[tuple[Any, ...]]) -> Opening | None:
        """What the file said of its beginning, where that agrees with the groups; else what the first group says."""
        first_seq, recorded = min(self._begins, default=(NO_BOUND, NO_BOUND))
        found: dict[str, int] = {}
        for pair in pairs:
            if len(pair) == 2 and pair[0] in ("first_seq", "base_recorded") and isinstance(pair[1], int):
                found.setdefault(pair[0], pair[1])
        if len(found) == 2:
            opening = Opening(found["first_seq"], found["base_recorded"])
            if 0 < opening.first_seq <= first_seq and 0 <= opening.base_recorded <= recorded:
                return opening
        return Opening(first_seq, recorded) if self._begins else None

    def _write(self, groups: list[RecordGroup], intents: IntentGroup | None) -> None:
        if self._chunk is None:
            self._chunk = Chunk.create(self.path, self._number, self._instance)
        self._chunk.write(groups, intents, None)
