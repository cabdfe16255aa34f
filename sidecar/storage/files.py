"""Files that must outlive a crash: how they are made, written, synced and locked, and what a disk's errors mean.

SQLite hides the operating system's word: a full disk is `SQLITE_FULL` when a page is written, but "disk I/O error" when
the shared memory beside a log cannot grow and "unable to open database file" when there is no inode left for it. So
where its code leaves the reason open, the directory itself is asked: a small file is made there and taken away again.

Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import sqlite3
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO, Final

from sidecar.model.delivery import Blocked, Retry, Verdict

PROBE_BYTES: Final = 64 << 10  # the shared memory of a log is 32 KiB
DATABASE_FILES: Final = 4  # a database, its log, its shared memory, and one that is made ahead
START_BYTES: Final = 1 << 20  # what opening everything takes, with some to spare
START_FILES: Final = 16  # logs, shared memories and first files of spool, delivery and ledger
PRIVATE: Final = 0o600
PRIVATE_DIRECTORY: Final = 0o700
_HELD: Final = frozenset({errno.EWOULDBLOCK, errno.EACCES})  # flock: somebody else has the lock
_NO_DIRECTORY_SYNC: Final = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM})
_BESIDE: Final = ("-wal", "-shm", "-journal")  # what SQLite keeps beside a file; it gives them the file's own mode
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FEW_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE})
_DENIED: Final = frozenset({errno.EACCES, errno.EPERM, errno.EISDIR})
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
    NEWER = "written by a newer version"
    OLDER = "written by an older version"
    FOREIGN = "another program's"
    FAILED = "the disk fails"


class StorageError(Exception):
    """A file cannot be used. The text says why and what to do; `trouble` is the reason, where it is one of the file."""

    def __init__(self, text: str, trouble: Trouble | None = None) -> None:
        super().__init__(text)
        self.trouble = trouble

    @property
    def passes(self) -> bool:
        """Whether it may pass without anybody doing anything: what was tried may be tried again."""
        return self.trouble in (Trouble.FULL, Trouble.BUSY)

    @property
    def damaged(self) -> bool:
        """Whether what is in the file cannot be read."""
        return self.trouble in (Trouble.DAMAGED, Trouble.NOT_DATABASE)


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
        # SQLite takes a directory in the place of a file for a disk that fails.
        found = Trouble.DENIED if path.is_dir() else _of_errno(probe(path.parent, files=DATABASE_FILES))
        if found is not Trouble.FAILED:
            return found
        return Trouble.DENIED if code in _OPEN_CODES else Trouble.FAILED
    return Trouble.FAILED


def verdict_for(found: Trouble | None, *, damaged: str, unfit: str) -> Verdict:
    """What a backend that keeps a file here says of a fault in it. Nothing of what failed counts, so it may be tried
    again. `damaged` and `unfit`: the reason to block where it is broken, and where another version or program made it.
    """
    match found:
        case Trouble.FULL:
            return Retry("disk_full")
        case Trouble.BUSY:
            return Retry("busy")
        case Trouble.DAMAGED | Trouble.NOT_DATABASE:
            return Blocked(damaged)
        case Trouble.NEWER | Trouble.OLDER | Trouble.FOREIGN:
            return Blocked(unfit)
        case Trouble.DENIED | Trouble.READ_ONLY | Trouble.GONE:
            return Blocked("not_writable")
    return Retry("write_failed")


def said_by(error: BaseException) -> str:
    """What an error says, where that is never of a call: the system's, SQLite's and our own. Of any other its class, as
    what it says may quote what it was given, a body or a credential."""
    ours = type(error).__module__.partition(".")[0] == __name__.partition(".")[0]
    said = str(error) if ours or isinstance(error, OSError | sqlite3.Error | ImportError) else ""
    return said or type(error).__name__


def explain(error: OSError | sqlite3.Error, what: str, path: Path | None = None) -> str:
    """An error in one line that says what to do; `what` is its beginning: "/data/lock cannot be opened".

    `path`: the file in question, where SQLite's word alone may not tell the reason.
    """
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    user = f"by user {os.geteuid()}"
    if isinstance(error, OSError) and error.errno in FEW_FILES:
        return f"{what}: {said}; raise `ulimit -n`"
    match trouble(error, path or Path()):
        case Trouble.FULL:
            return f"{what}: no room is left on the disk; free some, or set SIDECAR_DATA_DIR to another disk"
        case Trouble.READ_ONLY:
            return f"{what}: its file system is read-only; mount it for writing, or set SIDECAR_DATA_DIR to another one"
        case Trouble.DENIED if (path is not None and path.is_dir()) or isinstance(error, IsADirectoryError):
            name = "a file" if path is None else path.name
            return f"{what} {user}: there is a directory in the place of {name}; move it away, or set SIDECAR_DATA_DIR"
        case Trouble.DENIED:
            return (
                f"{what} {user} ({said}): give that user the data directory and what is in it, "
                "or set SIDECAR_DATA_DIR to one it may write"
            )
        case Trouble.GONE if isinstance(error, NotADirectoryError):
            return f"{what} {user}: there is a file where a directory is needed; move it away, or set SIDECAR_DATA_DIR"
        case Trouble.GONE:
            return (
                f"{what} {user}: its directory is not there ({said}); put it back, "
                "or set SIDECAR_DATA_DIR to one it may write"
            )
    return f"{what} ({said}): look at its disk, and leave the file where it is"


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


def make_directory(path: Path) -> None:
    """Make it and what leads to it, for the owner alone, and sync each new name: a power cut may not take the directory
    with what was written into it. Raises `OSError`."""
    missing = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    for directory in reversed(missing):
        directory.mkdir(mode=PRIVATE_DIRECTORY, exist_ok=True)
        directory.chmod(PRIVATE_DIRECTORY)  # whatever the umask took from us
        sync_directory(directory.parent)


def sync_file(fd: int) -> None:
    """Make what was written outlive a power cut. Raises `OSError`; the pages of a failed sync may be gone."""
    if sys.platform == "darwin":  # a plain fsync leaves the data in the drive's cache
        try:
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):  # a file system without it
                raise
    os.fsync(fd)


def sync_directory(path: Path) -> None:
    """Make the names in it outlive a power cut. Where directories cannot be synced there is nothing to do.

    Raises `OSError` where the disk fails.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(fd)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A private draft that takes the place of `path`, whole and synced, when the block ends well; else nothing changes.

    One writer at a time: the draft has one name. Raises `OSError`.
    """
    draft = path.with_name(f"{path.name}.draft")
    try:
        with _begun(draft) as file:
            yield file
            file.flush()
            sync_file(file.fileno())
        draft.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Replace a whole file durably: after a crash there is the old one or the new one. Raises `OSError`."""
    with replacing(path) as file:
        file.write(data)


def write_once(path: Path, data: bytes) -> bool:
    """Make a file durably unless it is there; False then. Of several processes that try at once one succeeds, and none
    ever sees half of it. Raises `OSError`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _begun(draft) as file:
            file.write(data)
            file.flush()
            sync_file(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    sync_directory(path.parent)
    return True


def _begun(path: Path) -> IO[bytes]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE)
    os.fchmod(fd, PRIVATE)  # one that was left behind keeps its mode otherwise
    return os.fdopen(fd, "wb")


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the kernel's advisory lock on an open file, without waiting; False where another process has it.

    It is held until every copy of the descriptor is closed, so a crash lets go of it. Raises `OSError` where the file
    system has no locks.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True
