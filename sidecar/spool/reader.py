"""Reading the spool from outside: for delivery, the commands and `verify`, in this process or another.

Every connection is `mode=ro` and every transaction short, so reading never makes the writer wait and never keeps
a log from being put away. What must always hold
- Groups come oldest first, by number; each was checked against its checksum.
- A chunk counts only below the first number of the chunk after it.
- What was committed once and cannot be read any more is told (`missing`), never passed over in silence: the
  cumulative `recorded` in each row says how many should have come before it.
"""

from __future__ import annotations

import heapq
import sqlite3
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sidecar.spool import files, last_words, recovery
from sidecar.spool.chunk import NO_BOUND, meta, readable_rows, translate
from sidecar.spool.groups import RECORD_COLUMNS, Opening, RecordGroup, read_lost
from sidecar.spool.spans import Place, missing_between, runs, start_of
from sidecar.spool.words import SpoolDamaged, SpoolError, SpoolTotals, StoredGroup

# Connections kept for the next read: delivery stands in one chunk per instance and backend group at a time.
_CONNECTIONS_KEPT: Final = 8


@dataclass(slots=True, frozen=True)
class ChunkInfo:
    """Where a begun chunk stands in its row."""

    path: Path
    number: int
    opening: Opening
    bound_seq: int  # numbers from here on are the next chunk's


class SpoolReader:
    """All the slots of a data directory. May be shared between threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._openings: dict[Path, Opening] = {}
        self._kept: OrderedDict[Path, tuple[int, sqlite3.Connection]] = OrderedDict()

    def instances(self) -> list[str]:
        return files.instances(self.root)

    def read(self, instance: str, after_seq: int, *, bytes_max: int = 1 << 20) -> list[StoredGroup]:
        """Groups with numbers beyond `after_seq`, oldest first; at least one where there is one.

        A group that `after_seq` lies in comes without the lines already had.
        """
        with self._lock:
            found: list[StoredGroup] = []
            size = 0
            for group in self._groups(instance, after_seq):
                found.append(group)
                size += sum(map(len, group.lines))
                if size >= bytes_max:
                    break
            return found

    def groups(self, instance: str, after_seq: int = 0) -> Iterator[StoredGroup]:
        """All of them, in steps of `read`, so that no transaction stays open."""
        while found := self.read(instance, after_seq):
            yield from found
            after_seq = found[-1].last_seq

    def lines(self, *, since_ns: int = 0) -> Iterator[bytes]:
        """Every record of every slot, in the order of commits, from those committed at `since_ns` on."""
        ways = [self._dated(instance, since_ns) for instance in self.instances()]
        for _, _, group in heapq.merge(*ways, key=lambda item: item[:2]):
            yield from group.lines

    def last_seq(self, instance: str) -> int:
        """The greatest committed number; 0 when there is none."""
        with self._lock:
            for info in reversed(self._chunks(instance)):
                try:
                    with self._reading(info.path) as connection:
                        return recovery.last_seq(connection, info.opening)
                except SpoolDamaged:
                    continue  # mended by whoever opens the slot; until then what is before it counts
            return 0

    def count(self, instance: str, after_seq: int, upto_seq: int) -> int:
        """How many records with `after_seq < seq <= upto_seq` were recorded: rows, and what is missing."""
        if upto_seq <= after_seq:
            return 0
        total = 0
        with self._lock:
            at: Place | None = files.read_retired(files.slot_dir(self.root, instance))
            for info in self._chunks(instance):
                if info.bound_seq <= after_seq + 1:
                    at = None
                    continue
                if info.opening.first_seq > upto_seq:
                    break
                at = at or (info.opening.first_seq, info.opening.base_recorded)
                total += missing_between(at, info.opening.first_seq, info.opening.base_recorded, after_seq)
                at = (max(info.opening.first_seq, at[0]), max(info.opening.base_recorded, at[1]))
                with self._reading(info.path) as connection:
                    for run in runs(connection, after_seq, min(upto_seq, info.bound_seq - 1)):
                        total += missing_between(at, run.first_seq, run.before, after_seq) + run.missing + run.wanted
                        at = (run.last_seq + 1, max(at[1], run.recorded))
        return total

    def totals(self, instance: str) -> SpoolTotals:
        """As the last commit left them; `open` are the intents on disk without a completion."""
        note = last_words.read(files.slot_dir(self.root, instance))
        with self._lock:
            admitted = recorded = open_calls = 0
            lost = "{}"
            for info in reversed(self._chunks(instance)):
                try:
                    with self._reading(info.path) as connection:
                        _, admitted, recorded, lost = recovery.last_totals(connection)
                        open_calls = len(recovery.open_intents(connection))
                except SpoolDamaged:
                    continue
                break
        together, gone = last_words.add(
            note, admitted=admitted, recorded=recorded, open_calls=open_calls, lost=read_lost(lost)
        )
        return SpoolTotals(admitted=together, recorded=recorded, open=open_calls, lost=gone)

    def chunks(self, instance: str) -> list[ChunkInfo]:
        """The begun chunks of a slot, oldest first."""
        with self._lock:
            return self._chunks(instance)

    def close(self) -> None:
        with self._lock:
            for _, connection in self._kept.values():
                connection.close()
            self._kept.clear()

    def __enter__(self) -> SpoolReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SpoolReader: {self.root}>"

    def _dated(self, instance: str, since_ns: int) -> Iterator[tuple[int, int, StoredGroup]]:
        for group in self.groups(instance, self._before(instance, since_ns)):
            if group.committed_ns >= since_ns:
                yield group.committed_ns, group.first_seq, group

    def _before(self, instance: str, since_ns: int) -> int:
        """A number that everything committed at `since_ns` or later is beyond: older chunks need not be read."""
        before = 0
        for info in self.chunks(instance)[:-1] if since_ns else ():
            try:
                with self._lock, self._reading(info.path) as connection:
                    if recovery.newest_commit_ns(connection) >= since_ns:
                        break
            except SpoolError:
                break
            before = info.bound_seq - 1
        return before

    def _groups(self, instance: str, after_seq: int) -> Iterator[StoredGroup]:
        """Groups and holes beyond `after_seq`. `recorded` is carried from row to row and from chunk to chunk."""
        chunks = self._chunks(instance)
        at: Place | None = files.read_retired(files.slot_dir(self.root, instance))
        for info in chunks:
            if info.bound_seq <= after_seq + 1:
                at = None  # what is missing in chunks before is no longer asked for
                continue
            opening = info.opening
            if at is not None:
                yield from _hole(at, opening.first_seq, opening.base_recorded, after_seq)
            else:
                at = (0, 0)
            at = (max(opening.first_seq, at[0]), max(opening.base_recorded, at[1]))
            for group in self._chunk_groups(info, after_seq):
                yield from _hole(at, group.first_seq, group.totals.recorded - group.count, after_seq)
                at = (group.last_seq + 1, max(at[1], group.totals.recorded))
                if group.last_seq > after_seq:
                    yield _stored(group, after_seq)

    def _chunk_groups(self, info: ChunkInfo, after_seq: int) -> Iterator[RecordGroup]:
        """The readable groups of one chunk, from the one before `after_seq + 1` on."""
        with self._reading(info.path) as connection:
            try:
                start = start_of(connection, after_seq)
            except sqlite3.DatabaseError:
                start = 0
            rows = readable_rows(connection, "record_group", "first_seq", RECORD_COLUMNS, start, info.bound_seq)
            for row in rows:
                try:
                    yield RecordGroup.read(row)
                except (SpoolDamaged, ValueError):
                    continue  # the next row's `recorded` tells

    def _chunks(self, instance: str) -> list[ChunkInfo]:
        slot = files.slot_dir(self.root, instance)
        begun: list[tuple[Path, int, Opening]] = []
        for number in files.chunk_numbers(slot):
            path = files.chunk_path(slot, number)
            opening = self._opening(path)
            if opening is not None:
                begun.append((path, number, opening))
        found: list[ChunkInfo] = []
        bound = NO_BOUND
        for path, number, opening in reversed(begun):
            found.append(ChunkInfo(path, number, opening, bound))
            if opening.first_seq > 0:
                bound = min(bound, opening.first_seq)
        found.reverse()
        return found

    def _opening(self, path: Path) -> Opening | None:
        """Fixed once a chunk has begun, so asked only once; None for one made ahead."""
        known = self._openings.get(path)
        if known is not None:
            return known
        try:
            with self._reading(path) as connection:
                first_seq, base = meta(connection, "first_seq"), meta(connection, "base_recorded")
        except SpoolError:
            return None  # being made, just retired, or damaged: what follows tells what is missing
        if first_seq is None:
            return None
        opening = self._openings[path] = Opening(int(first_seq), int(base))
        return opening

    def _reading(self, path: Path) -> _Reading:
        return _Reading(self, path)

    def _connection(self, path: Path) -> sqlite3.Connection:
        """A kept connection while the name still means the same file, else a new one."""
        try:
            inode = path.stat().st_ino
        except OSError as error:
            self._openings.pop(path, None)
            self._forget(path)
            raise files.translate(error, f"cannot read {path}") from error
        kept = self._kept.get(path)
        if kept is not None and kept[0] == inode:
            self._kept.move_to_end(path)
            return kept[1]
        self._forget(path)
        connection = recovery.open_read_only(path)
        self._kept[path] = (inode, connection)
        while len(self._kept) > _CONNECTIONS_KEPT:
            self._kept.popitem(last=False)[1][1].close()
        return connection

    def _forget(self, path: Path) -> None:
        kept = self._kept.pop(path, None)
        if kept is not None:
            kept[1].close()


class _Reading:
    """A kept connection for a moment; `sqlite3` errors leave as the spool's."""

    __slots__ = ("_path", "_reader")

    def __init__(self, reader: SpoolReader, path: Path) -> None:
        self._reader = reader
        self._path = path

    def __enter__(self) -> sqlite3.Connection:
        return self._reader._connection(self._path)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, sqlite3.Error):
            self._reader._forget(self._path)
            raise translate(error, self._path) from error


def _stored(group: RecordGroup, after_seq: int) -> StoredGroup:
    lines = tuple(group.body.split(b"\n"))
    had = max(after_seq - group.first_seq + 1, 0)
    return StoredGroup(
        first_seq=group.first_seq + had,
        last_seq=group.last_seq,
        lines=lines[had:] if had else lines,
        salvaged=group.salvaged,
        committed_ns=group.totals.committed_ns,
    )


def _hole(at: Place, first_seq: int, recorded: int, after_seq: int) -> Iterator[StoredGroup]:
    """The records that should stand between `at` and `first_seq`, where there are any."""
    missing = missing_between(at, first_seq, recorded, after_seq)
    if missing:
        yield StoredGroup(first_seq=max(at[0], after_seq + 1), last_seq=first_seq - 1, lines=(), missing=missing)
