"""`file`: the records as lines of JSON in a file of the operator's, each exactly once.

A batch is appended and synced, then its key and the file's new length are committed to a small SQLite file
in the data directory. After a crash between the two, what lies beyond the committed length is cut off
before anything else is written; after a crash behind the second, the key says `duplicate`. So a batch is in
the file once or not at all, and a line is never half there for longer than the sidecar is down.

What must always hold: the file is written by one process (the one that delivers), and nobody else appends
to it. It may be moved away at any time: a file that is not the one last written is continued from its end.
Past its size it is renamed with the time in its name; deleting old ones is the operator's business.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import sqlite3
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from time import time
from typing import Any, Final

from sidecar.backends.base import EVERYTHING, Context, Policy, policy_of, policy_settings
from sidecar.backends.batches import seal_lines
from sidecar.record import Record
from sidecar.settings import Setting, kinds
from sidecar.verdict import (
    Abilities,
    Atomicity,
    Blocked,
    Dedup,
    Delivered,
    Duplicate,
    Encoded,
    Retry,
    Sealed,
    Verdict,
)

BATCH_MAX: Final = 1000
BODY_BYTES_MAX: Final = 8 * 1024 * 1024  # one write and sync stays short on a slow disk
ROTATE_BYTES_DEFAULT: Final = 128 * 1024 * 1024
KEYS_KEPT: Final = 10_000  # delivery holds at most 64 sealed requests open, and resends no others
MODE: Final = 0o640  # records name subscribers and addresses
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR})
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS applied (
  seq INTEGER PRIMARY KEY, -- in order of writing, so that the oldest can go
  key TEXT NOT NULL UNIQUE
) STRICT;
CREATE TABLE IF NOT EXISTS written (
  one INTEGER PRIMARY KEY CHECK (one = 1),
  device INTEGER NOT NULL,
  inode INTEGER NOT NULL,
  size_bytes INTEGER NOT NULL -- behind the last batch that counts
) STRICT;
"""

SETTINGS: Final = (
    Setting("path", kinds.path, help="the file; `records.ndjson` in the data directory when not set"),
    Setting("rotate_bytes", kinds.size(4096), str(ROTATE_BYTES_DEFAULT), "size at which the file is renamed"),
    *policy_settings(EVERYTHING),
)


class FileBackend:
    """Appends records to one file."""

    name = "file"

    def __init__(
        self,
        *,
        path: Path,
        data_dir: Path,
        rotate_bytes: int = ROTATE_BYTES_DEFAULT,
        policy: Policy = EVERYTHING,
        clock: Callable[[], float] = time,
    ) -> None:
        self.abilities = Abilities(
            events_max=BATCH_MAX,
            bytes_max=BODY_BYTES_MAX,
            atomicity=Atomicity.ALL_OR_NOTHING,
            dedup=Dedup.REQUEST_KEY,
            concurrency=1,
            knows_duplicates=True,
            bills=False,
        )
        self._policy = policy
        self._file = AppendOnce(path=path, memory=data_dir / "file.db", rotate_bytes=rotate_bytes, clock=clock)

    @classmethod
    def from_settings(cls, values: Mapping[str, Any], context: Context) -> FileBackend:
        return cls(
            path=values["path"] or context.data_dir / "records.ndjson",
            data_dir=context.data_dir,
            rotate_bytes=values["rotate_bytes"],
            policy=policy_of(values),
        )

    def encode(self, records: Sequence[Record]) -> Encoded:
        return seal_lines(records, self._policy, self.abilities)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        try:
            new = await asyncio.to_thread(self._file.append, sealed.key, sealed.body)
        except (OSError, sqlite3.Error) as error:
            return [_verdict_for(error)] * len(sealed.events)
        return [Delivered() if new else Duplicate()] * len(sealed.events)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._file.close)


def _verdict_for(error: Exception) -> Verdict:
    """Nothing of a failed append counts, so that it may always be tried again."""
    number = error.errno if isinstance(error, OSError) else None
    if number in _FULL:
        return Retry("disk_full")
    if number in _DENIED:
        return Blocked("not_writable")
    return Retry("write_failed")


@dataclass(slots=True)
class _Open:
    """The file as it is now. `size_bytes`: behind the last batch that counts."""

    descriptor: int
    device: int
    inode: int
    size_bytes: int


class AppendOnce:
    """A file to which each key's bytes are appended once. Blocking; one call at a time."""

    def __init__(self, *, path: Path, memory: Path, rotate_bytes: int, clock: Callable[[], float] = time) -> None:
        self._path = path
        self._memory_path = memory
        self._rotate_bytes = rotate_bytes
        self._clock = clock
        self._lock = Lock()
        self._memory: sqlite3.Connection | None = None
        self._open: _Open | None = None

    def append(self, key: str, data: bytes) -> bool:
        """Add `data` and make it last; False when `key` is in already. Raises `OSError`, `sqlite3.Error`."""
        with self._lock:
            memory = self._remembered()
            if memory.execute("SELECT 1 FROM applied WHERE key = ?", (key,)).fetchone():
                return False
            try:
                current = self._current(len(data))
                _write(current.descriptor, data, current.size_bytes)
                current.size_bytes += len(data)
                self._remember(memory, key, current)
            except (OSError, sqlite3.Error):
                # Pages of a failed sync may be gone and a failed commit may not be: what is on disk is looked
                # up again, and the tail cut, before the next byte.
                self._forget()
                raise
            return True

    def close(self) -> None:
        with self._lock:
            self._forget()

    def _remembered(self) -> sqlite3.Connection:
        if self._memory is None:
            memory = sqlite3.connect(self._memory_path, isolation_level=None, check_same_thread=False)
            try:
                memory.execute("PRAGMA journal_mode = WAL")
                memory.execute("PRAGMA synchronous = FULL")
                memory.execute("PRAGMA fullfsync = ON")
                memory.executescript(_SCHEMA)
            except sqlite3.Error:
                memory.close()
                raise
            self._memory = memory
        return self._memory

    def _remember(self, memory: sqlite3.Connection, key: str | None, current: _Open) -> None:
        memory.execute("BEGIN IMMEDIATE")
        try:
            memory.execute(
                "INSERT OR REPLACE INTO written VALUES (1, ?, ?, ?)",
                (current.device, current.inode, current.size_bytes),
            )
            if key is not None:
                memory.execute("INSERT INTO applied (key) VALUES (?)", (key,))
                memory.execute("DELETE FROM applied WHERE seq <= (SELECT max(seq) FROM applied) - ?", (KEYS_KEPT,))
            memory.execute("COMMIT")
        except sqlite3.Error:
            if memory.in_transaction:
                memory.execute("ROLLBACK")
            raise

    def _current(self, more_bytes: int) -> _Open:
        """The file to write to: the open one unless it was moved away or would grow past its size."""
        current = self._open
        if current is not None and not _is_at(current, self._path):
            self._let_go()
            current = None
        if current is None:
            current = self._take_up()
        if current.size_bytes and current.size_bytes + more_bytes > self._rotate_bytes:
            self._let_go()
            self._path.rename(self._free_name())
            _sync_directory(self._path.parent)
            current = self._take_up()
        return current

    def _take_up(self) -> _Open:
        """Open the file, cut what no commit vouches for, and remember it before anything is written to it."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
        try:
            _sync_directory(self._path.parent)
            stat = os.fstat(descriptor)
            current = _Open(descriptor, stat.st_dev, stat.st_ino, stat.st_size)
            memory = self._remembered()
            row = memory.execute("SELECT device, inode, size_bytes FROM written").fetchone()
            if row is not None and row[:2] == (current.device, current.inode) and row[2] <= stat.st_size:
                current.size_bytes = row[2]
                os.ftruncate(descriptor, row[2])
            else:  # not written by us, or emptied by somebody: all of it stays
                current.size_bytes = _end_line(descriptor, stat.st_size)
                self._remember(memory, None, current)
        except BaseException:
            os.close(descriptor)
            raise
        self._open = current
        return current

    def _free_name(self) -> Path:
        stamp = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y%m%dT%H%M%SZ")
        for number in range(1, 1_000_000):
            name = self._path.with_name(f"{self._path.stem}.{stamp}-{number}{self._path.suffix}")
            if not name.exists():
                return name
        raise OSError(errno.EEXIST, "no free name for the rotated file")

    def _let_go(self) -> None:
        if self._open is not None:
            os.close(self._open.descriptor)
            self._open = None

    def _forget(self) -> None:
        self._let_go()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    _sync(descriptor)


def _end_line(descriptor: int, size_bytes: int) -> int:
    """Where the next line may begin: behind a line end."""
    if size_bytes and os.pread(descriptor, 1, size_bytes - 1) != b"\n":
        size_bytes += os.pwrite(descriptor, b"\n", size_bytes)
    return size_bytes


def _is_at(current: _Open, path: Path) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    return (stat.st_dev, stat.st_ino) == (current.device, current.inode) and stat.st_size == current.size_bytes


def _sync(descriptor: int) -> None:
    if sys.platform == "darwin":  # a plain fsync leaves the data in the drive's cache
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
