"""Which records a data directory has, by their ids: so that one that comes twice from elsewhere is stored once.

An index beside the spool, `collected.db`. What must always hold: an id in it is a record that is in the spool, or was;
and a record in the spool is in it before it may be asked for. The index is behind the spool after a crash between the
two commits, never ahead: `places` says up to which number of each slot it goes, in the transaction that stores the ids,
and `catch_up` reads the rest out of the spool before anything is taken.

Ids are remembered for a time and forgotten by the time that they bear, in order: of what is older than `forgotten.ms`
nobody can tell whether it was there, so it is `TOO_OLD` and kept aside, neither taken nor lost. Where the file is new
and the spool is not, all that was committed before the spool's first record counts as forgotten.

What is kept aside lies in the same file, so that it is there before its sender is told that it may forget it.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.model.record_check import NotARecord, id_bytes, id_ms, id_of
from sidecar.spool.reader import SpoolReader
from sidecar.storage.files import StorageError
from sidecar.storage.sqlite import Schema, errors_told, open_db, transaction

NAME: Final = "collected.db"
ASKED: Final = 500  # ids in one question; SQLite takes 999 values at least
FORGET_ROWS: Final = 20_000  # in one transaction: some 20 ms
ASIDE_BYTES_MAX: Final = 256 << 20  # of what is kept aside; beyond that only the beginning of each is kept
ASIDE_HEAD_BYTES: Final = 1024
TOO_OLD: Final = "too_old"

_TABLES: Final = """
CREATE TABLE ids (
  id BLOB PRIMARY KEY -- 16 bytes, which begin with the time
) STRICT, WITHOUT ROWID;
CREATE TABLE places (
  instance TEXT PRIMARY KEY,
  seq INTEGER NOT NULL -- all records of that slot up to here are in `ids`, or forgotten
) STRICT;
CREATE TABLE passed (
  stream TEXT PRIMARY KEY, -- its name, and when it was made
  seq INTEGER NOT NULL -- the greatest number that was read there
) STRICT;
CREATE TABLE forgotten (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  ms INTEGER NOT NULL -- ids with an earlier time may have been forgotten
) STRICT;
CREATE TABLE aside (
  number INTEGER PRIMARY KEY,
  source TEXT NOT NULL UNIQUE, -- where it came from: the stream and its number there
  reason TEXT NOT NULL,
  detail TEXT NOT NULL,
  at_s REAL NOT NULL,
  size_bytes INTEGER NOT NULL,
  body BLOB NOT NULL -- whole, or its beginning
) STRICT;
"""
INDEX: Final = Schema(
    name="index of what was collected",
    version=1,
    tables=_TABLES,
    when_damaged="move it away: it is made anew from the spool, and what is older than the spool is kept aside",
)


@dataclass(frozen=True, slots=True)
class Aside:
    """What is kept for an operator instead of being taken."""

    source: str
    reason: str
    detail: str
    at_s: float
    body: bytes
    size_bytes: int = 0  # of the whole, where only the beginning is there

    @property
    def whole(self) -> bool:
        return len(self.body) >= self.size_bytes


class KnownIds:
    """The index, open for writing. Every call blocks; one at a time is let in."""

    def __init__(self, data_dir: Path, reader: SpoolReader) -> None:
        """Opens it and catches up with the spool. Raises `StorageError` and the spool's errors."""
        self.path = data_dir / NAME
        self._lock = threading.Lock()
        self._db = open_db(self.path, schema=INDEX)
        try:
            with self._using() as db:
                self._floor_ms = self._begin(db, reader)
                row = db.execute("SELECT count(*), coalesce(sum(length(body)), 0) FROM aside").fetchone()
                self.aside_count, self._aside_bytes = int(row[0]), int(row[1])
            self.catch_up(reader)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def catch_up(self, reader: SpoolReader) -> int:
        """Take in what the spool has beyond the index. How many."""
        count = 0
        for instance in reader.instances():
            with self._using() as db:
                row = db.execute("SELECT seq FROM places WHERE instance = ?", (instance,)).fetchone()
            after = 0 if row is None else int(row[0])
            for group in reader.groups(instance, after):
                ids = list(_ids_of(group.lines))
                self.remember(instance, group.last_seq, ids)
                count += len(ids)
        return count

    def known(self, ids: Sequence[str]) -> set[str]:
        """Which of these are there."""
        found: set[str] = set()
        with self._using() as db:
            for start in range(0, len(ids), ASKED):
                asked = {id_bytes(one): one for one in ids[start : start + ASKED]}
                marks = ",".join("?" * len(asked))
                rows = db.execute(f"SELECT id FROM ids WHERE id IN ({marks})", list(asked))
                found.update(asked[key] for (key,) in rows)
        return found

    def too_old(self, record_id: str) -> bool:
        """Whether nobody can tell any more if it was there."""
        return id_ms(record_id) < self._floor_ms

    def passed(self, stream: str) -> int:
        """The greatest number that was read in a stream; 0: none was."""
        with self._using() as db:
            row = db.execute("SELECT seq FROM passed WHERE stream = ?", (stream,)).fetchone()
        return 0 if row is None else int(row[0])

    def remember(
        self,
        instance: str,
        last_seq: int,
        ids: Iterable[str],
        aside: Sequence[Aside] = (),
        passed: tuple[str, int] | None = None,
    ) -> None:
        """These are in the spool, which is on disk up to this number; and this is kept aside. `passed`: a stream, and
        the greatest number that was read there."""
        with self._using() as db, transaction(db):
            db.executemany("INSERT OR IGNORE INTO ids VALUES (?)", ((id_bytes(one),) for one in ids))
            db.execute(
                "INSERT INTO places VALUES (?, ?) ON CONFLICT (instance) DO UPDATE SET seq = max(seq, excluded.seq)",
                (instance, last_seq),
            )
            if passed is not None:
                db.execute(
                    "INSERT INTO passed VALUES (?, ?) ON CONFLICT (stream) DO UPDATE SET seq = max(seq, excluded.seq)",
                    passed,
                )
            kept = [self._fitting(one) for one in aside]
            before = db.total_changes
            db.executemany(
                "INSERT OR IGNORE INTO aside (source, reason, detail, at_s, size_bytes, body)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                ((one.source, one.reason, one.detail, one.at_s, one.size_bytes, one.body) for one in kept),
            )
            new = db.total_changes - before
        self.aside_count += new
        self._aside_bytes += sum(len(one.body) for one in kept) if new else 0

    def _fitting(self, one: Aside) -> Aside:
        size = one.size_bytes or len(one.body)
        body = one.body if self._aside_bytes + size <= ASIDE_BYTES_MAX else one.body[:ASIDE_HEAD_BYTES]
        return Aside(one.source, one.reason, one.detail, one.at_s, body, size)

    def asides(self) -> list[tuple[int, Aside]]:
        """All that is kept aside, by the number under which it is."""
        with self._using() as db:
            return _asides(db)

    def taken_back(self, numbers: Iterable[int]) -> None:
        """These are not aside any more: what they hold was taken."""
        with self._using() as db, transaction(db):
            db.executemany("DELETE FROM aside WHERE number = ?", ((number,) for number in numbers))
            row = db.execute("SELECT count(*), coalesce(sum(length(body)), 0) FROM aside").fetchone()
        self.aside_count, self._aside_bytes = int(row[0]), int(row[1])

    def forget(self, before_s: float) -> int:
        """Forget ids of before this time (Unix seconds), a slice of them; how many there were."""
        before_ms = int(before_s * 1000)
        if before_ms <= 0:
            return 0
        bound = before_ms.to_bytes(6, "big") + bytes(10)
        with self._using() as db, transaction(db):
            row = db.execute(
                "SELECT max(id), count(*) FROM (SELECT id FROM ids WHERE id < ? ORDER BY id LIMIT ?)",
                (bound, FORGET_ROWS),
            ).fetchone()
            last, count = row
            if not count:
                return 0
            # Said before they go, and also of what is younger in the same millisecond.
            floor_ms = max(self._floor_ms, int.from_bytes(last[:6], "big") + 1)
            db.execute("UPDATE forgotten SET ms = ?", (floor_ms,))
            db.execute("DELETE FROM ids WHERE id <= ?", (last,))
        self._floor_ms = floor_ms
        return int(count)

    @contextlib.contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        with self._lock, errors_told(self.path, INDEX):
            yield self._db

    def _begin(self, db: sqlite3.Connection, reader: SpoolReader) -> int:
        """How far back it can tell; worked out once, when the file is new."""
        row = db.execute("SELECT ms FROM forgotten").fetchone()
        if row is None:
            firsts = [next(reader.groups(instance), None) for instance in reader.instances()]
            # What was removed from a slot was committed before its first record now, and ids are older than commits.
            gone = [group.committed_ns // 1_000_000 for group in firsts if group is not None and group.first_seq > 1]
            row = (max(gone, default=0),)
            with transaction(db):
                db.execute("INSERT INTO forgotten VALUES (1, ?)", row)
        return int(row[0])


def kept_aside(data_dir: Path) -> list[Aside]:
    """What is kept aside, for a command that only looks. Raises `StorageError`."""
    path = data_dir / NAME
    if not path.exists():
        return []
    with errors_told(path, INDEX), contextlib.closing(open_db(path, schema=INDEX, read_only=True)) as db:
        return [one for _, one in _asides(db)]


def _asides(db: sqlite3.Connection) -> list[tuple[int, Aside]]:
    rows = db.execute("SELECT number, source, reason, detail, at_s, body, size_bytes FROM aside ORDER BY number")
    return [(row[0], Aside(*row[1:])) for row in rows]


def _ids_of(lines: Iterable[bytes]) -> Iterator[str]:
    for line in lines:
        # A line of the spool that has no such id can come from nowhere else a second time.
        with contextlib.suppress(NotARecord):
            yield id_of(line)


__all__ = ["NAME", "TOO_OLD", "Aside", "KnownIds", "StorageError", "kept_aside"]
