"""`file`: the records as lines of JSON in a file of the operator's, each exactly once.

A batch is appended and synced, then its key and the file's new length are committed to a small SQLite file
in the data directory. After a crash behind the second, the key says `duplicate`. After a crash between the two, and
where the data directory is an older copy, the file is longer than remembered: what stands there is never cut off. The
lines that are ours are recognised by the ids of their records and not written again, one of ours that was cut short is
completed or written over, and whatever is not ours stays where it is: we go on behind it.

What must always hold: the file is written by one process. The file itself is locked for that, so the lock goes with it
when it is renamed; a second process is told who has it, is blocked, and tries again. The file may be moved away at any
time: one that is not the one last written is continued from its end. Past its size it is renamed with the time in its
name; deleting old ones is the operator's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import glob
import logging
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from time import time
from typing import Final

import orjson

from sidecar.backends.base import Context, RecordSettings
from sidecar.backends.batching import seal_lines
from sidecar.model.delivery import (
    Abilities,
    Atomicity,
    Blocked,
    Dedup,
    Delivered,
    Duplicate,
    Encoded,
    Sealed,
    Verdict,
)
from sidecar.model.record import Record
from sidecar.settings import setting, types
from sidecar.storage.files import StorageError, sync_directory, sync_file, trouble, try_lock, verdict_for
from sidecar.storage.sqlite import Schema, error_of, open_db, transaction

BATCH_MAX: Final = 1000
BODY_BYTES_MAX: Final = 8 * 1024 * 1024  # one write and sync stays short on a slow disk
ROTATE_BYTES_DEFAULT: Final = 128 * 1024 * 1024
KEYS_KEPT: Final = 10_000  # delivery holds at most 64 sealed requests open, and resends no others
MODE: Final = 0o600  # records name subscribers and addresses; a file that is there keeps the mode it was given
READ_BYTES: Final = 1 << 20  # of what is longer than remembered, at a time
LINE_BYTES_MAX: Final = 4 << 20  # a longer line is none of ours: it is passed over
_OURS: Final = re.compile(rb'\{"id":"[0-9a-f-]{36}","seq":')  # how every line of ours begins
# `IF NOT EXISTS`: the first files had these tables and no number of their format yet.
_TABLES: Final = """
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
CREATE TABLE IF NOT EXISTS beyond (
  record_id TEXT PRIMARY KEY -- stands in the file behind what was remembered of it: not to be written again
) STRICT, WITHOUT ROWID;
"""
# Nothing is lost with a damaged one: what is in the file is recognised by the ids of its records.
INDEX: Final = Schema(
    name="index of what was written",
    version=1,
    tables=_TABLES,
    when_damaged="move it away, the lines in the file are then looked through",
)

log = logging.getLogger("sidecar.backends.file")


@dataclass(frozen=True, kw_only=True)
class FileSettings(RecordSettings):
    path: Path | None = setting(types.path, None, "the file; `records.ndjson` in the data directory when not set")
    rotate_bytes: int = setting(types.size(4096), str(ROTATE_BYTES_DEFAULT), "size at which the file is renamed")


class FileBackend:
    """Appends records to one file."""

    name = "file"
    settings_type = FileSettings
    abilities = Abilities(
        events_max=BATCH_MAX,
        bytes_max=BODY_BYTES_MAX,
        atomicity=Atomicity.ALL_OR_NOTHING,
        dedup=Dedup.REQUEST_KEY,
        concurrency=1,
        knows_duplicates=True,
        knows_records=True,
        bills=False,
    )

    def __init__(self, settings: FileSettings, context: Context, *, clock: Callable[[], float] = time) -> None:
        self._policy = settings.policy
        self._file = AppendOnce(
            path=settings.path or context.data_dir / "records.ndjson",
            index_path=context.data_dir / "file.db",
            rotate_bytes=settings.rotate_bytes,
            clock=clock,
        )

    def encode(self, records: Sequence[Record]) -> Encoded:
        return seal_lines(records, self._policy, self.abilities)

    async def send(self, sealed: Sealed) -> list[Verdict]:
        try:
            new = await asyncio.to_thread(self._file.append, sealed.key, sealed.body)
        except LockedFileError as error:
            return [Blocked(str(error))] * len(sealed.events)
        except (OSError, StorageError) as error:
            return [_verdict_for(error, self._file)] * len(sealed.events)
        return [Delivered() if new else Duplicate()] * len(sealed.events)

    async def reach(self) -> tuple[bool, str]:
        """Whether the file can be appended to, as far as modes tell; where it is, or what to do."""
        return await asyncio.to_thread(_reach, self._file.path)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._file.close)


def _reach(path: Path) -> tuple[bool, str]:
    folder, user = path.absolute().parent, os.geteuid()
    if not folder.is_dir():
        return False, f"there is no directory {folder}: make it, or set SIDECAR_FILE_PATH"
    if path.exists() and not path.is_file():
        return False, f"{path} is no file: set SIDECAR_FILE_PATH"
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.R_OK | os.W_OK)):
        return False, f"{path} cannot be written by user {user}: give it the file and its directory"
    return True, str(path)


class LockedFileError(Exception):
    """Another process writes the file. The text says which."""


def _verdict_for(error: OSError | StorageError, file: AppendOnce) -> Verdict:
    if isinstance(error, StorageError):
        found = error.trouble
    else:
        found = trouble(error, file.path)
    return verdict_for(found, damaged=f"{file.index_path} is damaged: {INDEX.when_damaged}", unfit=str(error))


@dataclass(slots=True)
class _Open:
    """The file as it is now, locked. `size_bytes`: behind its last whole line; `begun`: what follows there."""

    descriptor: int
    device: int
    inode: int
    size_bytes: int
    begun: bytes = b""


class AppendOnce:
    """A file to which each key's bytes are appended once. Blocking; one call at a time."""

    def __init__(self, *, path: Path, index_path: Path, rotate_bytes: int, clock: Callable[[], float] = time) -> None:
        self.path = path
        self.index_path = index_path
        self._rotate_bytes = rotate_bytes
        self._clock = clock
        self._lock = Lock()
        self._index: sqlite3.Connection | None = None
        self._open: _Open | None = None

    def append(self, key: str, data: bytes) -> bool:
        """Add those lines of `data` that are not there yet and make them last; False when `key` is in already.

        Raises `OSError`, `StorageError`, `LockedFileError`.
        """
        with self._lock:
            try:
                return self._append(self._opened_index(), key, data)
            except (OSError, StorageError, sqlite3.Error) as error:
                # Pages of a failed sync may be gone and a failed commit may not be: what is on disk is looked
                # through again before the next byte.
                self._forget()
                if isinstance(error, sqlite3.Error):
                    raise error_of(error, self.index_path, INDEX) from error
                raise

    def _append(self, index: sqlite3.Connection, key: str, data: bytes) -> bool:
        if index.execute("SELECT 1 FROM applied WHERE key = ?", (key,)).fetchone():
            return False
        current = self._current(len(data))
        there = _known_of(index, data)
        left = _without(data, there)
        if left:
            _write(current, left)
        self._remember(index, key, current, there=there)
        return True

    def close(self) -> None:
        with self._lock:
            self._forget()

    def _opened_index(self) -> sqlite3.Connection:
        if self._index is None:
            self._index = open_db(self.index_path, schema=INDEX)
        return self._index

    def _remember(
        self,
        index: sqlite3.Connection,
        key: str | None,
        current: _Open,
        *,
        there: Iterable[str] = (),
        beyond: Iterable[str] = (),
    ) -> None:
        """One transaction: how long the file is, the key, and which ids beyond its old length are met or found."""
        with transaction(index):
            index.execute(
                "INSERT OR REPLACE INTO written VALUES (1, ?, ?, ?)",
                (current.device, current.inode, current.size_bytes),
            )
            index.executemany("INSERT OR IGNORE INTO beyond VALUES (?)", ((one,) for one in beyond))
            index.executemany("DELETE FROM beyond WHERE record_id = ?", ((one,) for one in there))
            if key is not None:
                index.execute("INSERT INTO applied (key) VALUES (?)", (key,))
                index.execute("DELETE FROM applied WHERE seq <= (SELECT max(seq) FROM applied) - ?", (KEYS_KEPT,))

    def _current(self, more_bytes: int) -> _Open:
        """The file to write to: the open one unless it was moved away or would grow past its size."""
        current = self._open
        if current is not None and not _is_at(current, self.path):
            self._close_file()
            current = None
        if current is None:
            current = self._take_up()
        if current.size_bytes and current.size_bytes + more_bytes > self._rotate_bytes:
            _end_line(current)  # what was cut short there cannot be completed in another file
            self.path.rename(self._free_name())
            self._close_file()
            sync_directory(self.path.parent)
            current = self._take_up()
        return current

    def _take_up(self) -> _Open:
        """Open the file, lock it, and learn what is in it beyond what is remembered, before anything is written."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
        try:
            self._take_lock(descriptor)
            sync_directory(self.path.parent)
            stat = os.fstat(descriptor)
            current = _Open(descriptor, stat.st_dev, stat.st_ino, stat.st_size)
            index = self._opened_index()
            row = index.execute("SELECT device, inode, size_bytes FROM written").fetchone()
            # A device's number may be another after a restart of the machine; an inode stays what it is.
            same = row is not None and row[1] == current.inode
            if not same or row[2] != stat.st_size:
                self._learn(current, stat.st_size, row, same=same)
        except BaseException:
            os.close(descriptor)
            raise
        self._open = current
        return current

    def _learn(self, current: _Open, size_bytes: int, row: tuple[int, int, int] | None, *, same: bool) -> None:
        """Which of our records stand where nothing is remembered, and where the last whole line ends."""
        found: set[str] = set()
        start = 0
        if row is not None and same and row[2] <= size_bytes:
            start = row[2]
        elif row is not None and not same:
            self._look_through_rotated(row[1], row[2], found)
        current.size_bytes = _look_through(current.descriptor, start, size_bytes, found)
        current.begun = os.pread(current.descriptor, LINE_BYTES_MAX, current.size_bytes)
        if start and size_bytes > start:
            log.warning(
                "the file is longer than remembered: after a crash, with an older copy of the data directory, or by"
                " somebody else; nothing is cut off, and no record of ours that is there is written again",
                extra={"facts": {"path": str(self.path), "bytes": size_bytes - start, "records": len(found)}},
            )
        assert self._index is not None
        self._remember(self._index, None, current, beyond=found)

    def _take_lock(self, descriptor: int) -> None:
        if try_lock(descriptor):
            return
        pid = _locker(os.fstat(descriptor).st_ino)
        who = "another process" if pid is None else f"another sidecar (pid {pid})"
        raise LockedFileError(f"{self.path} is written by {who}: give each a SIDECAR_FILE_PATH of its own, or stop one")

    def _look_through_rotated(self, inode: int, size_bytes: int, found: set[str]) -> None:
        """The same for files that were rotated since: from the one that is remembered on, if it is among them."""
        pattern = f"{glob.escape(self.path.stem)}.*{glob.escape(self.path.suffix)}"
        rotated = [(path.stat(), path) for path in self.path.parent.glob(pattern) if path != self.path]
        known = next((stat for stat, _ in rotated if stat.st_ino == inode), None)
        if known is None:
            return  # moved away by the operator, or on another disk: what is in the file now is looked through
        for stat, path in rotated:
            if stat.st_mtime_ns < known.st_mtime_ns:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                start = size_bytes if stat.st_ino == inode and size_bytes <= stat.st_size else 0
                _look_through(descriptor, start, stat.st_size, found)
            finally:
                os.close(descriptor)

    def _free_name(self) -> Path:
        stamp = datetime.fromtimestamp(self._clock(), UTC).strftime("%Y%m%dT%H%M%SZ")
        for number in range(1, 1_000_000):
            name = self.path.with_name(f"{self.path.stem}.{stamp}-{number}{self.path.suffix}")
            if not name.exists():
                return name
        raise OSError(errno.EEXIST, "no free name for the rotated file")

    def _close_file(self) -> None:
        if self._open is not None:
            os.close(self._open.descriptor)
            self._open = None

    def _forget(self) -> None:
        self._close_file()
        if self._index is not None:
            self._index.close()
            self._index = None


def _write(current: _Open, data: bytes) -> None:
    """Append and sync. A line of ours that was cut short is completed by the same, and written over by another."""
    if not (data.startswith(current.begun) or (_OURS.match(current.begun) and len(data) >= len(current.begun))):
        _end_line(current)
    view = memoryview(data)
    offset = current.size_bytes
    while view:
        written = os.pwrite(current.descriptor, view, offset)
        view, offset = view[written:], offset + written
    sync_file(current.descriptor)
    current.size_bytes, current.begun = offset, b""


def _end_line(current: _Open) -> None:
    """Let what is no line of ours stand alone: the next line begins behind a line end."""
    begun, current.begun = current.begun, b""
    if begun.strip(b"\0"):
        end = current.size_bytes + len(begun)
        os.pwrite(current.descriptor, b"\n", end)
        current.size_bytes = end + 1
    elif begun:  # zeros are what a power cut leaves of bytes that were never written: they are nobody's
        os.ftruncate(current.descriptor, current.size_bytes)


def _is_at(current: _Open, path: Path) -> bool:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return False
    size_bytes = current.size_bytes + len(current.begun)
    return (stat.st_dev, stat.st_ino, stat.st_size) == (current.device, current.inode, size_bytes)


def _look_through(descriptor: int, start: int, end: int, found: set[str]) -> int:
    """Collect the ids of our records in whole lines from `start` on; where the last whole line ends."""
    whole, offset, line = start, start, b""
    while offset < end and (chunk := os.pread(descriptor, READ_BYTES, offset)):
        offset += len(chunk)
        *lines, rest = (line + chunk).split(b"\n")
        found.update(record_id for one in lines if (record_id := _id_in(one)) is not None)
        if lines:
            whole = offset - len(rest)
        line = rest if len(rest) <= LINE_BYTES_MAX else b""
    return whole if end - whole < LINE_BYTES_MAX else end


def _id_in(line: bytes) -> str | None:
    """The id of the record on a line, where it is one of ours."""
    if _OURS.match(line) is None:
        return None
    try:
        return str(orjson.loads(line)["id"])
    except ValueError:
        return None


def _known_of(index: sqlite3.Connection, data: bytes) -> frozenset[str]:
    """Which of these lines are in the file already."""
    if index.execute("SELECT 1 FROM beyond LIMIT 1").fetchone() is None:
        return frozenset()
    ids = [one for line in data.split(b"\n") if (one := _id_in(line)) is not None]
    ask = "SELECT 1 FROM beyond WHERE record_id = ?"
    return frozenset(one for one in ids if index.execute(ask, (one,)).fetchone() is not None)


def _without(data: bytes, there: frozenset[str]) -> bytes:
    if not there:
        return data
    return b"".join(line + b"\n" for line in data.split(b"\n")[:-1] if _id_in(line) not in there)


def _locker(inode: int) -> int | None:
    """The process that has locked a file, where the kernel tells (Linux, in the same namespace)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for row in Path("/proc/locks").read_text().splitlines():
            fields = row.split()
            if fields[1] == "FLOCK" and fields[5].endswith(f":{inode}") and int(fields[4]) > 0:
                return int(fields[4])
    return None
