"""Reading what can be read out of a damaged chunk, into a new one under the same number.

The damaged file is never written. It is read through two scratch copies: one as SQLite recovers it, and one into which
the write-ahead log is applied page by page, past the frames that SQLite would stop at. Our own checksums tell good
groups from bad, and either copy may have some that the other has not: a torn page hides what its older image
holds. Then the file moves to `set-aside/` as it was. The new file is complete on disk before the old one moves,
and a crash between the two renames is mended by `finish_swaps`.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from sidecar.spool import files
from sidecar.spool.chunk import (
    APPLICATION_ID,
    FORMAT,
    INTENT_COLUMNS,
    NO_BOUND,
    PAGE_BYTES,
    RECORD_COLUMNS,
    Chunk,
    IntentGroup,
    Opening,
    RecordGroup,
    meta,
    readable_rows,
)
from sidecar.spool.words import SpoolDamaged

log = logging.getLogger("sidecar.spool")

_SWAP: Final = ".salvaged"  # a finished replacement, waiting to take its place
_WAL_HEADER: Final = struct.Struct(">8I")  # magic, format, page size, checkpoint, salt-1, salt-2, checksum x 2
_FRAME_HEADER: Final = struct.Struct(">6I")  # page, size after commit, salt-1, salt-2, checksum x 2
_WAL_MAGIC: Final = (0x377F_0682, 0x377F_0683)
_GROUPS_A_COMMIT: Final = 64  # of the copy: bounds memory at some 32 MiB


@dataclass(slots=True, frozen=True)
class Salvaged:
    """What a damaged chunk gave."""

    records: int
    set_aside: Path


def replace_chunk(root: Path, instance: str, path: Path, number: int, *, upto_seq: int | None = None) -> Salvaged:
    """Copy what is readable (and not beyond `upto_seq`) into a new file, set the old one aside, swap them."""
    scratch = path.with_name(path.name + ".scratch")
    draft = _Draft(path.with_name(path.name + ".draft"), number, instance, NO_BOUND if upto_seq is None else upto_seq)
    files.remove_chunk(draft.path)
    for make in (_copy_with_log_beside, _copy_with_log_applied):
        files.remove_chunk(scratch)
        try:
            make(path, scratch)
            draft.take_from(scratch)
        finally:
            files.remove_chunk(scratch)
    any_left = draft.seal()
    swap = path.with_name(path.name + _SWAP)
    if any_left:
        draft.path.rename(swap)
        files.sync_directory(path.parent)
    moved = files.set_aside(root, instance, path)
    if any_left:
        swap.rename(path)
        files.sync_directory(path.parent)
    log.error("a damaged chunk was set aside", extra={"set_aside": str(moved), "records_salvaged": draft.records})
    return Salvaged(draft.records, moved)


def finish_swaps(root: Path, instance: str, slot: Path) -> None:
    """After a crash inside `replace_chunk`: a finished copy takes its place, an unfinished one goes."""
    for name in sorted(os.listdir(slot)):
        path = slot / name
        if name.endswith((".scratch", ".draft")):
            files.remove_chunk(path)
        elif name.endswith(_SWAP):
            place = path.with_name(name.removesuffix(_SWAP))
            if place.exists():
                files.set_aside(root, instance, place)
            path.rename(place)
    files.sync_directory(slot)


def log_is_damaged(path: Path, accepted_frames: int) -> bool:
    """Whether the log of an unsealed chunk holds a commit mark beyond the last frame that SQLite accepts.

    SQLite takes that for the torn end of an interrupted transaction and opens clean, but a flipped bit in
    the middle looks the same and hides every commit behind it. Reading the rest without SQLite's checksums
    and with ours tells the two apart, and costs nothing when it was only torn. A log of which nothing is
    accepted is damaged in any case: the schema's frames were synced before the chunk was first used.
    """
    if accepted_frames == 0:
        return True
    return any(frame.commit_pages for frame in _frames(files.wal_path(path))[accepted_frames:])


def valid_frames(path: Path) -> int:
    """How many frames of the log SQLite accepts, from the index beside an open chunk (`mxFrame`)."""
    try:
        with path.with_name(path.name + "-shm").open("rb") as file:
            head = file.read(20)
    except OSError:
        return 0
    return int(struct.unpack_from("=I", head, 16)[0]) if len(head) == 20 else 0


@dataclass(slots=True, frozen=True)
class _Frame:
    page: int
    commit_pages: int  # the database's size after this commit; 0: no commit
    offset: int  # of the page's bytes


def _frames(wal: Path) -> list[_Frame]:
    """The frames of the log's current run, told by their salts alone; checksums are not looked at."""
    heads: list[tuple[int, int, tuple[int, int], int]] = []
    with wal.open("rb") as file:
        head = file.read(_WAL_HEADER.size).ljust(_WAL_HEADER.size, b"\0")
        magic, _, page_bytes, _, *salts, _, _ = _WAL_HEADER.unpack(head)
        if magic not in _WAL_MAGIC or page_bytes != PAGE_BYTES:
            page_bytes = PAGE_BYTES  # a damaged header: its other fields are no better
        offset = _WAL_HEADER.size
        while len(head := file.read(_FRAME_HEADER.size)) == _FRAME_HEADER.size:
            page, commit_pages, salt_1, salt_2, _, _ = _FRAME_HEADER.unpack(head)
            offset += _FRAME_HEADER.size
            heads.append((page, commit_pages, (salt_1, salt_2), offset))
            offset += page_bytes
            file.seek(offset)
    seen = Counter(salt for _, _, salt, _ in heads)
    # Frames from before the log was last reset may follow; the header says which are current, unless it is hit.
    current = (salts[0], salts[1])
    if current not in seen and heads:
        current = heads[0][2]
    return [_Frame(page, commit, at) if salt == current else _Frame(0, 0, at) for page, commit, salt, at in heads]


def _copy_with_log_beside(path: Path, scratch: Path) -> None:
    """For SQLite to recover in its own way."""
    shutil.copyfile(path, scratch)
    wal = files.wal_path(path)
    if wal.exists():
        shutil.copyfile(wal, files.wal_path(scratch))


def _copy_with_log_applied(path: Path, scratch: Path) -> None:
    """The chunk as it would be with every whole transaction of its log, in a file of its own."""
    shutil.copyfile(path, scratch)
    wal = files.wal_path(path)
    frames = _frames(wal) if wal.exists() else []
    last = max((index for index, frame in enumerate(frames) if frame.commit_pages), default=-1)
    with scratch.open("r+b") as target:
        if last >= 0:
            with wal.open("rb") as source:
                for frame in frames[: last + 1]:
                    if frame.page == 0 or frame.page > frames[last].commit_pages:
                        continue
                    source.seek(frame.offset)
                    target.seek((frame.page - 1) * PAGE_BYTES)
                    target.write(source.read(PAGE_BYTES))
        _mend_header(target)


def _mend_header(target: Any) -> None:
    """The fixed bytes of the header are known, so damage there need not cost anything."""
    target.seek(0)
    head = bytearray(target.read(100))
    if len(head) < 100:
        return
    head[0:16] = b"SQLite format 3\0"
    head[18:20] = b"\x01\x01"  # no log beside it: read as a plain file
    head[21:24] = b"\x40\x20\x20"  # fractions that the format fixes
    head[60:64] = FORMAT.to_bytes(4, "big")
    head[68:72] = APPLICATION_ID.to_bytes(4, "big")
    target.seek(0)
    target.write(head)


class _Draft:
    """The replacement, filled from one copy after the other."""

    def __init__(self, path: Path, number: int, instance: str, upto_seq: int) -> None:
        self.path = path
        self.records = 0
        self._number = number
        self._instance = instance
        self._upto_seq = upto_seq
        self._chunk: Chunk | None = None
        self._groups: set[int] = set()  # by first number
        self._intents: set[int] = set()  # by commit number

    def take_from(self, scratch: Path) -> None:
        """What this copy has and none before it had."""
        connection = sqlite3.connect(scratch, isolation_level=None)
        try:
            opening = _opening(connection)
            pending: list[RecordGroup] = []
            for group in _readable_groups(connection):
                if group.last_seq > self._upto_seq or group.first_seq in self._groups:
                    continue
                opening = opening or Opening(group.first_seq, group.totals.recorded - group.count)
                self._groups.add(group.first_seq)
                self.records += group.count
                pending.append(replace(group, salvaged=True))
                if len(pending) == _GROUPS_A_COMMIT:
                    self._write(pending, None, opening)
                    pending = []
            if pending:
                self._write(pending, None, opening)
            for intents in _readable_intents(connection):
                if intents.totals.commit_number not in self._intents:
                    self._intents.add(intents.totals.commit_number)
                    self._write([], intents, opening or Opening(0, intents.totals.recorded))
        finally:
            connection.close()

    def seal(self) -> bool:
        """Put the file away; False when nothing was readable and there is none."""
        if self._chunk is None:
            return False
        self._chunk.seal()
        return True

    def _write(self, groups: list[RecordGroup], intents: IntentGroup | None, opening: Opening | None) -> None:
        chunk = self._chunk
        if chunk is None:
            chunk = self._chunk = Chunk.create(self.path, self._number, self._instance)
        chunk.write(groups, intents, opening if chunk.opening is None else None)


def _opening(connection: sqlite3.Connection) -> Opening | None:
    try:
        first_seq, base = meta(connection, "first_seq"), meta(connection, "base_recorded")
        return None if first_seq is None or base is None else Opening(int(first_seq), int(base))
    except (sqlite3.Error, ValueError):
        return None


def _readable_groups(connection: sqlite3.Connection) -> Iterator[RecordGroup]:
    for row in readable_rows(connection, "record_group", "first_seq", RECORD_COLUMNS):
        try:
            yield RecordGroup.read(row)
        except (SpoolDamaged, ValueError):
            continue


def _readable_intents(connection: sqlite3.Connection) -> Iterator[IntentGroup]:
    for row in readable_rows(connection, "intent_group", "commit_number", INTENT_COLUMNS):
        try:
            yield IntentGroup.read(row)
        except (SpoolDamaged, ValueError):
            continue
