"""Reading what can be read out of a damaged chunk, into a new one under the same number.

The damaged file is never written: it is read through a scratch copy into which the write-ahead log is applied page
by page, past frames that SQLite would stop at (our own checksums tell good groups from bad), and then moved
to `set-aside/` as it was. The new file is complete on disk before the old one moves, and a crash between the
two renames is mended by `finish_swaps`.
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
    PAGE_BYTES,
    RECORD_COLUMNS,
    Chunk,
    IntentGroup,
    Opening,
    RecordGroup,
    meta,
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
    draft = path.with_name(path.name + ".draft")
    for leftover in (scratch, draft):
        files.remove_chunk(leftover)
    try:
        _copy_with_log(path, scratch)
        records, any_left = _copy_groups(scratch, draft, number, instance, upto_seq)
    finally:
        files.remove_chunk(scratch)
    swap = path.with_name(path.name + _SWAP)
    if any_left:
        draft.rename(swap)
        files.sync_directory(path.parent)
    moved = files.set_aside(root, instance, path)
    if any_left:
        swap.rename(path)
        files.sync_directory(path.parent)
    log.error("a damaged chunk was set aside", extra={"set_aside": str(moved), "records_salvaged": records})
    return Salvaged(records, moved)


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


def _copy_with_log(path: Path, scratch: Path) -> None:
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


def _copy_groups(scratch: Path, draft: Path, number: int, instance: str, upto_seq: int | None) -> tuple[int, bool]:
    connection = sqlite3.connect(f"{scratch.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
    copy: Chunk | None = None
    records = 0
    try:
        opening = _opening(connection)
        bound = upto_seq if upto_seq is not None else (1 << 63) - 1
        pending: list[RecordGroup] = []
        for group in _readable_groups(connection):
            if group.last_seq > bound:
                continue
            opening = opening or Opening(group.first_seq, group.totals.recorded - group.count)
            pending.append(replace(group, salvaged=True))
            records += group.count
            if len(pending) == _GROUPS_A_COMMIT:
                copy = _write(copy, draft, number, instance, pending, None, opening)
                pending = []
        if pending:
            copy = _write(copy, draft, number, instance, pending, None, opening)
        for intents in _readable_intents(connection):
            opening = opening or Opening(0, intents.totals.recorded)
            copy = _write(copy, draft, number, instance, [], intents, opening)
    finally:
        connection.close()
    if copy is None:
        return 0, False
    copy.seal()
    return records, True


def _write(copy: Chunk | None, draft: Path, number: int, instance: str, groups: list[RecordGroup],
           intents: IntentGroup | None, opening: Opening | None) -> Chunk:  # fmt: skip
    chunk = copy or Chunk.create(draft, number, instance)
    chunk.write(groups, intents, opening if copy is None else None)
    return chunk


def _opening(connection: sqlite3.Connection) -> Opening | None:
    try:
        first_seq, base = meta(connection, "first_seq"), meta(connection, "base_recorded")
        return None if first_seq is None or base is None else Opening(int(first_seq), int(base))
    except (sqlite3.Error, ValueError):
        return None


def _readable_groups(connection: sqlite3.Connection) -> Iterator[RecordGroup]:
    for row in _readable_rows(connection, "record_group", "first_seq", RECORD_COLUMNS):
        try:
            yield RecordGroup.read(row)
        except (SpoolDamaged, ValueError):
            continue


def _readable_intents(connection: sqlite3.Connection) -> Iterator[IntentGroup]:
    for row in _readable_rows(connection, "intent_group", "commit_number", INTENT_COLUMNS):
        try:
            yield IntentGroup.read(row)
        except (SpoolDamaged, ValueError):
            continue


def _readable_rows(connection: sqlite3.Connection, table: str, key: str, columns: str) -> Iterator[tuple[Any, ...]]:
    """Rows in order; from a broken page on, what can be reached from the other end."""
    last_key = -1
    try:
        for row in connection.execute(f"SELECT {columns} FROM {table} ORDER BY {key}"):
            last_key = row[0]
            yield row
        return
    except sqlite3.Error:
        pass
    keys: list[int] = []
    try:  # keys first, so that the tail need not be held in memory to be turned round
        tail = f"SELECT {key} FROM {table} WHERE {key} > ? ORDER BY {key} DESC"
        for (found,) in connection.execute(tail, (last_key,)):
            keys.append(found)
    except sqlite3.Error:
        pass
    for found in reversed(keys):
        try:
            row = connection.execute(f"SELECT {columns} FROM {table} WHERE {key} = ?", (found,)).fetchone()
        except sqlite3.Error:
            continue
        if row is not None:
            yield row
