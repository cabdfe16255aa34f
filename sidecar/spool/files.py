"""The spool's place on the disk: directories, locks, the reserve, and the ground they stand on.

Layout under the data directory (`root`):

    spool/<instance>/lock, 00000001.seg, 00000002.seg, …   one slot per writer
    spool/<instance>/committed                             the last commit that is on disk (`segment.CommitMark`)
    spool/<instance>/retired                               where the oldest segment that retention left begins
    spool/<instance>/unwritten                             what could not be written at the end (`last_words`)
    reserve                                                room kept free for delivery's verdicts
    set-aside/<instance>-<segment>-<time>/                 damaged files, whole; nothing here is ever deleted
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final, TextIO

from sidecar.spool.types import REMOVED, SpoolError, SpoolFailed, SpoolFull, SpoolLocked
from sidecar.storage import files as storage_files
from sidecar.storage.files import FEW_FILES, PRIVATE, START_BYTES, START_FILES, Trouble, narrow, probe, trouble

_SEGMENT_NAME: Final = re.compile(r"(\d{8,})\.seg")
_OLD_NAME: Final = re.compile(r"\d{8,}\.db")  # SQLite files, of releases before there were segments
_INSTANCE_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
# On these a sync promises nothing that outlives the host (tmpfs, overlay in memory) or locks are not to be trusted.
_SHAKY_GROUND: Final = {
    "tmpfs": "it is memory and is gone after a restart",
    "ramfs": "it is memory and is gone after a restart",
    "overlay": "it is a container's own layer and is gone with the container",
    "aufs": "it is a container's own layer and is gone with the container",
    "nfs": "locks and syncs over a network are not to be trusted",
    "nfs4": "locks and syncs over a network are not to be trusted",
    "cifs": "locks and syncs over a network are not to be trusted",
    "smb3": "locks and syncs over a network are not to be trusted",
    "9p": "locks and syncs over a network are not to be trusted",
}


def spool_dir(root: Path) -> Path:
    return root / "spool"


def slot_dir(root: Path, instance: str) -> Path:
    return spool_dir(root) / instance


FROZEN: Final = "copied"  # in a slot that another instance may go on numbering in: not to be written here


def is_frozen(root: Path, instance: str) -> bool:
    """Whether another instance may go on numbering in this slot, so that nobody writes it here."""
    return (slot_dir(root, instance) / FROZEN).exists()


def instances(root: Path) -> list[str]:
    """The slots there are, in the order of their names."""
    try:
        with os.scandir(spool_dir(root)) as entries:
            return sorted(e.name for e in entries if e.is_dir() and _INSTANCE_NAME.fullmatch(e.name))
    except (FileNotFoundError, NotADirectoryError):  # the latter where the data directory is a file
        return []


def new_instance() -> str:
    """A short name for a new slot: stays with it for good, so it need only be unlike its neighbours'."""
    return secrets.token_hex(4)


def check_instance(instance: str) -> str:
    """The same, where it can name a slot. Raises `SpoolError`."""
    if not _INSTANCE_NAME.fullmatch(instance):
        raise SpoolError(f"{instance!r} cannot name a spool: 1 to 64 of a-z 0-9 . _ -, the first a letter or digit")
    return instance


def segment_path(slot: Path, number: int) -> Path:
    return slot / f"{number:08d}.seg"


def segment_inodes(slot: Path) -> dict[int, int]:
    """The segment files of a slot, oldest first, and their inodes: a repaired one has another.

    Raises `SpoolError` for a slot that an older release wrote.
    """
    try:
        with os.scandir(slot) as entries:
            there = {entry.name: entry.inode() for entry in entries}
    except FileNotFoundError:
        return {}
    if old := next((name for name in sorted(there) if _OLD_NAME.fullmatch(name)), None):
        raise SpoolError(
            f"{slot / old} is of an older release, which kept records in SQLite files, and is not read here: let that"
            " release deliver what is in it and move the data directory away, or set SIDECAR_DATA_DIR to another"
        )
    found = {int(match[1]): inode for name, inode in there.items() if (match := _SEGMENT_NAME.fullmatch(name))}
    return dict(sorted(found.items()))


def segment_numbers(slot: Path) -> list[int]:
    """Oldest first. Raises `SpoolError` for a slot that an older release wrote."""
    return list(segment_inodes(slot))


def size_or_zero(path: Path) -> int:
    """In bytes; 0 where it cannot be told."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def write_retired(slot: Path, first_seq: int, recorded: int) -> None:
    """Say what the oldest segment that retention leaves begins with: what is missing after it was not retired."""
    draft = slot / "retired.draft"
    with open_private(draft) as file:
        json.dump({"first_seq": first_seq, "recorded": recorded}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(slot / "retired")
    storage_files.sync_directory(slot)


def open_private(path: Path) -> TextIO:
    """A new text file, or one begun anew, that is its owner's alone whatever the umask."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE)
    os.fchmod(fd, PRIVATE)
    return os.fdopen(fd, "w", encoding="ascii")


def read_retired(slot: Path) -> tuple[int, int]:
    """The first number that was not retired, and how many records were."""
    try:
        row = json.loads((slot / "retired").read_bytes())
        return int(row["first_seq"]), int(row["recorded"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1, 0


def count_set_aside(root: Path) -> int:
    """How many damaged segments are kept there, until somebody has looked at them and moved them away."""
    try:
        return sum(1 for _ in (root / "set-aside").iterdir())
    except FileNotFoundError:
        return 0


def make_directory(path: Path) -> None:
    """Make it and what leads to it, readable by the owner alone, and sync each new name. Raises `SpoolError`."""
    try:
        storage_files.make_directory(path)
    except NotADirectoryError as error:
        raise SpoolError(
            f"{error.filename} is a file where a directory is needed: move it away, or set SIDECAR_DATA_DIR"
        ) from error
    except OSError as error:
        raise translate(error, f"cannot make the directory {path}") from error


def translate(error: OSError, what: str) -> SpoolError:
    """Say an operating system's error in words that tell what to do."""
    match trouble(error, Path()):
        case Trouble.FULL:
            return SpoolFull(f"{what}: no room is left on the disk; free some, writing goes on by itself")
        case Trouble.READ_ONLY:
            return SpoolError(f"{what}: its file system is read-only; mount it for writing, or set SIDECAR_DATA_DIR")
        case Trouble.GONE:
            return SpoolFailed(f"{what}: {REMOVED}")
        case Trouble.DENIED:
            return SpoolError(
                f"{what}: not writable for user {os.geteuid()} ({os.strerror(error.errno or 0)});"
                " give that user the directory, or set SIDECAR_DATA_DIR to one it may write"
            )
    more = "; raise `ulimit -n`" if error.errno in FEW_FILES else ""
    return SpoolError(f"{what}: {error.strerror or error}{more}")


class FileLock:
    """An advisory lock on a file, held as long as the process lives: the kernel lets go of it after a crash."""

    def __init__(self, path: Path) -> None:
        """Take it at once. Raises `SpoolLocked`, naming the holder, when another process has it."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            narrow(path)
        except OSError as error:
            raise translate(error, f"cannot open the lock {path}") from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            pid = holder(path)
            os.close(self._fd)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise translate(error, f"cannot lock {path}") from error
            who = "another process" if pid is None else f"process {pid}"
            raise SpoolLocked(
                f"{path.parent} is in use by {who}: stop it, or set SIDECAR_DATA_DIR to another directory", pid
            ) from None
        self._say_who()

    def _say_who(self) -> None:
        """A full disk must not keep the service from starting, so this may fail."""
        try:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, json.dumps({"pid": os.getpid()}).encode() + b"\n", 0)
        except OSError:
            pass

    @property
    def held(self) -> bool:
        return self._fd >= 0

    def release(self) -> None:
        """Let go. The file stays: unlinking it would let two processes lock two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def holder(path: Path) -> int | None:
    """The process that wrote its number into a lock, if it did."""
    try:
        pid = json.loads(path.read_bytes())["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if isinstance(pid, int) else None


class Reserve:
    """A preallocated file that is given up when the disk is full, so that verdicts can still be stored.

    Several writers may share one: whoever meets the full disk gives it up, whoever first finds room makes it again.
    """

    def __init__(self, root: Path, size_bytes: int, margin_bytes: int) -> None:
        self.path = root / "reserve"
        self._root = str(root)  # asked for its room before each commit
        self._size_bytes = size_bytes
        self._margin_bytes = margin_bytes
        self._spares = root / "reserve.files"
        self._failed: OSError | None = None  # why it could not be made, where it was not for want of room

    @property
    def present(self) -> bool:
        return self._size_bytes == 0 or size_or_zero(self.path) >= self._size_bytes

    def give_up(self) -> None:
        with contextlib.suppress(OSError):  # a read-only disk keeps it
            self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            shutil.rmtree(self._spares)

    def missing(self) -> SpoolError:
        """Why it could not be made."""
        if self._failed is not None and not isinstance(
            said := translate(self._failed, f"{self.path} cannot be made"), SpoolFull
        ):
            return SpoolFailed(str(said))
        needed = (self._size_bytes + self._margin_bytes) >> 20
        return SpoolFull(f"{self.path} cannot be made: free at least {needed} MiB on its disk")

    def restore(self) -> bool:
        """Make it again where there is room for it and for records beside it. False: there is not."""
        self._failed = None
        draft = self.path.with_name("reserve.draft")  # another name: a reserve that is half there must not count as one
        if self.present:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            return self.room() >= self._margin_bytes
        if self.room() < self._size_bytes + self._margin_bytes:
            return False
        try:
            fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                # The margin too, for as long as it takes to ask: under a quota the free space above says nothing.
                _allocate(fd, self._size_bytes + self._margin_bytes)
                os.ftruncate(fd, self._size_bytes)
            finally:
                os.close(fd)
            self._spares.mkdir(mode=0o700, exist_ok=True)
            for number in range(START_FILES):  # a disk may run out of files before it runs out of bytes
                (self._spares / f"{number:02d}").touch(mode=PRIVATE)
            draft.rename(self.path)
        except OSError as error:
            self._failed = error
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            return False
        return True

    def room(self) -> int:
        """Free bytes where it is."""
        try:
            stat = os.statvfs(self._root)
        except OSError as error:
            self._failed = error  # a directory that has just gone is not one without room
            return 0
        blocks = stat.f_bfree if os.geteuid() == 0 else stat.f_bavail
        return blocks * stat.f_frsize


def make_room(root: Path) -> bool:
    """Let the reserve go where there is no room to open what a start opens. Whether that had to be.

    A stop in good order leaves no logs behind, so a start has to make them: without this a disk that filled up
    meanwhile would keep the service down.
    """
    reserve = root / "reserve"
    number = probe(root, size_bytes=START_BYTES, files=START_FILES)
    if number is None or trouble(OSError(number, ""), root) is not Trouble.FULL or not reserve.exists():
        return False
    Reserve(root, 0, 0).give_up()
    return True


def _allocate(fd: int, size_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size_bytes)
        return
    block = bytes(1 << 20)  # macOS: no such call; written zeros take the room as well
    for offset in range(0, size_bytes, len(block)):
        os.pwrite(fd, block[: size_bytes - offset], offset)


def disk_room(path: Path) -> tuple[int, int]:
    """Room left for us where `path` is, and the size of that disk."""
    usage = shutil.disk_usage(path)
    return usage.free, usage.total


def ground_warning(path: Path) -> str | None:
    """What is wrong with the file system under `path`, or None where nothing is known to be."""
    kind = file_system(path)
    why = _SHAKY_GROUND.get(kind) or ("it is served by a program" if kind.startswith("fuse") else None)
    if why is None:
        return None
    return (
        f"{path} is on {kind}: {why}, so records there may be lost; "
        "set SIDECAR_DATA_DIR to a directory on a local disk or a volume"
    )


def file_system(path: Path) -> str:
    """Linux's name for the file system that holds `path`; empty elsewhere."""
    best, kind = "", ""
    resolved = str(path.resolve())
    for point, name in _mounts():
        inside = resolved == point or resolved.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):  # a later mount on the same point hides the earlier one
            best, kind = point, name
    return kind


def _mounts() -> Iterator[tuple[str, str]]:
    try:
        text = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    for row in text.splitlines():
        left, _, right = row.partition(" - ")
        fields = left.split(" ")
        if len(fields) > 4 and right:
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4])
            yield point, right.split(" ", 1)[0]
