"""What a disk's error means, in one place, and how our files are made: for their owner alone.

SQLite hides the operating system's word: a full disk is `SQLITE_FULL` when a page is written, but "disk I/O error" when
the shared memory beside a log cannot grow and "unable to open database file" when there is no inode left for it. So
where its code leaves the reason open, the directory itself is asked: a small file is made there and taken away again.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
from enum import StrEnum
from pathlib import Path
from typing import Final

PROBE_BYTES: Final = 64 << 10  # the shared memory of a log is 32 KiB
DATABASE_FILES: Final = 4  # a database, its log, its shared memory, and one that is made ahead
START_BYTES: Final = 1 << 20  # what opening everything takes, with some to spare
START_FILES: Final = 16  # logs, shared memories and first files of spool, delivery and ledger
PRIVATE: Final = 0o600
_BESIDE: Final = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a file; it gives them the file's own mode
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM})
_GONE: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ESTALE})
# What SQLite says of a write that may have many reasons. A failed sync is none of these: whatever the reason, that file
# is not to be written again.
_OPEN_CODES: Final = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM})
_SYNCS: Final = frozenset({sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_IOERR_DIR_FSYNC})
_ROTTEN: Final = frozenset({sqlite3.SQLITE_IOERR_SHORT_READ})
_count = itertools.count()


class Trouble(StrEnum):
    """What is wrong with a file or its disk."""

    FULL = "no room on the disk"  # blocks, inodes or quota
    READ_ONLY = "the file system is read-only"
    DENIED = "not permitted"
    GONE = "not there any more"
    DAMAGED = "damaged"
    NOT_DATABASE = "not an SQLite file"
    BUSY = "in use by another process"
    FAILED = "the disk fails"


def trouble(error: OSError | sqlite3.Error, path: Path) -> Trouble:
    """The reason behind an error of the operating system or of SQLite on the file at `path`."""
    if isinstance(error, OSError):
        return _of_errno(error.errno)
    extended = getattr(error, "sqlite_errorcode", None) or 0
    code = extended & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return Trouble.FULL
    if code == sqlite3.SQLITE_CORRUPT or (code == 0 and "UTF-8" in str(error)):
        return Trouble.DAMAGED
    if code == sqlite3.SQLITE_NOTADB:
        return Trouble.NOT_DATABASE
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return Trouble.BUSY
    if extended in _SYNCS or extended in _ROTTEN:
        return Trouble.FAILED
    if code in _OPEN_CODES or code == sqlite3.SQLITE_IOERR:
        found = _of_errno(probe(path.parent, files=DATABASE_FILES))
        if found is not Trouble.FAILED:
            return found
        return Trouble.DENIED if code in _OPEN_CODES else Trouble.FAILED
    return Trouble.FAILED


def _of_errno(number: int | None) -> Trouble:
    if number in _NO_ROOM:
        return Trouble.FULL
    if number == errno.EROFS:
        return Trouble.READ_ONLY
    if number in _DENIED:
        return Trouble.DENIED
    return Trouble.GONE if number in _GONE else Trouble.FAILED


def probe(directory: Path, *, size_bytes: int = PROBE_BYTES, files: int = 1) -> int | None:
    """Why so much could not be written into so many new files there: an errno, or None where it could."""
    made: list[Path] = []
    try:
        for _ in range(files):
            path = directory / f".probe-{os.getpid()}-{next(_count)}"
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
            made.append(path)
            try:
                left = size_bytes // files
                while left > 0:
                    left -= os.write(fd, bytes(min(left, 1 << 16)))
            finally:
                os.close(fd)
    except OSError as error:
        return error.errno or errno.EIO
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.unlink()
    return None


def make_private(path: Path) -> None:
    """Have a file there that is its owner's alone, whatever the umask; one that others may read is narrowed.

    For a database, before SQLite opens it. An existing file is not opened: closing it would let go of every lock that
    this process has on it. One that is another user's stays as it is. Raises `OSError`.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
    except FileExistsError:
        for one in (path, *(path.with_name(path.name + suffix) for suffix in _BESIDE)):
            narrow(one)
        return
    try:
        os.fchmod(fd, PRIVATE)
    finally:
        os.close(fd)


def narrow(path: Path) -> None:
    """Take from others what they may do with one of our files."""
    with contextlib.suppress(OSError):
        stat = path.stat()
        if stat.st_mode & 0o077 and stat.st_uid == os.geteuid():
            path.chmod(PRIVATE)
