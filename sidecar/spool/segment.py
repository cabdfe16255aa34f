"""One segment of the spool: the bytes of its file, and the one scan by which all reading, recovery and repair is done.

A spool is a log, so it is written as one. `docs/spool-format.md` has the table of the bytes; in short:

    header, 128 bytes      magic, format, number of the segment, salt, instance, checksum
    frame, frame, frame …  one for each commit: head of 88 bytes, records, intents, lost, closes, origins, tail
    zeros                  room that was taken ahead; none where the segment is sealed

How that keeps its promises:

- **A commit is one frame**, so it is there whole or not at all: the checksum is over its numbers, its records and the
  intents it opens and closes. Records are lines of JSON and are passed on unparsed.
- **Written once, synced once.** `pwritev`, then `fdatasync`, on room that was taken before: the sync carries no new
  length. After a write or sync that failed, nothing is known of the end of the file (the kernel may have dropped the
  pages and call the next sync a success), so it is not written again; the commit is made anew in another segment. The
  one exception is a write refused for want of room, which put nothing into the page cache that could vanish later.
- **A segment can be read alone.** Its first frame restates all totals, every intent that is open and the origins.
  Each frame has the sums as of its commit, so one that cannot be read leaves a gap in the figures, and the gap says how
  many records it held.
- **A commit may stand in two segments**: where its sync failed and the frame had reached the disk all the same. A
  segment therefore counts only below the first commit number of the next one.
- **What is confirmed is marked** beside the segments, in the file `committed`, after each sync (`CommitMark`). Readers
  in other processes go no further than the mark or the last frame but one, because what is not synced may be gone after
  a power cut. The mark itself is never synced: it can be behind, and never ahead.
- **A torn end is no damage.** A frame that a power cut interrupted lacks sectors, and where a sector is missing there
  are zeros; records have no zero bytes. A frame that is all there and does not match its checksum is damage.
- **The magic cannot stand in a record** (its first byte is no UTF-8), so behind damage the scan goes on at the next
  one, and nothing that a client or an upstream sends is ever taken for a frame. The salt, drawn for each segment, keeps
  bytes of an older file in the same blocks from being taken for frames of this one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import struct
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import orjson

from sidecar.spool import files
from sidecar.spool.types import REMOVED, SOURCE_BYTES, SpoolDamaged, SpoolError, SpoolFailed, SpoolFull
from sidecar.storage.files import PRIVATE, Trouble, sync_directory, sync_file, trouble

FORMAT: Final = 1
MAGIC: Final = b"\x89MSPOOL\n"
FRAME_MAGIC: Final = b"\xffFRM"
FRAME_END: Final = b"END\xff"
BEGINS: Final = 1  # the first of its segment: its intents and origins are all there are
SALVAGED: Final = 2  # copied out of a damaged segment
SEALS: Final = 4  # the last of its segment: holds nothing but totals

_HEADER: Final = struct.Struct("<8sI4xQ8s64s28x")
_CRC: Final = struct.Struct("<I")
HEADER_BYTES: Final = _HEADER.size + _CRC.size
_HEAD: Final = struct.Struct("<4sII8sQQQQQIIIIIII")
_TAIL: Final = struct.Struct("<I4s")
_ORIGIN: Final = struct.Struct(f"<{SOURCE_BYTES}sQ")
HEAD_BYTES: Final = _HEAD.size
TAIL_BYTES: Final = _TAIL.size
_CHECKED_FROM: Final = 8  # the checksum is over all but the magic and itself
_MARK: Final = struct.Struct("<4sIQQQQ")
_MARK_MAGIC: Final = b"\xffCMT"

SECTOR_BYTES: Final = 512  # what a disk writes whole or not at all
_WINDOW_BYTES: Final = 256 << 10  # read at once; less at first, for who only looks what is new
_FIRST_WINDOW_BYTES: Final = 16 << 10


@dataclass(slots=True, frozen=True)
class Header:
    """What a segment says of itself."""

    number: int
    salt: bytes
    instance: str

    def encode(self) -> bytes:
        data = _HEADER.pack(MAGIC, FORMAT, self.number, self.salt, self.instance.encode("ascii"))
        return data + _CRC.pack(zlib.crc32(data))

    @classmethod
    def decode(cls, data: bytes, path: Path) -> Header:
        """Raises `SpoolDamaged`, or `SpoolError` for a newer format."""
        if len(data) < HEADER_BYTES or _CRC.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
            raise SpoolDamaged(f"{path} does not begin as a segment of a spool")
        magic, version, number, salt, instance = _HEADER.unpack_from(data)
        if magic != MAGIC:
            raise SpoolDamaged(f"{path} is not a segment of a spool")
        if version > FORMAT:
            raise SpoolError(
                f"{path} has format {version} and this version reads up to {FORMAT}: it was written by a newer release;"
                " run that release, or set SIDECAR_DATA_DIR to another directory"
            )
        return cls(number, salt, instance.rstrip(b"\0").decode("ascii", "replace"))


@dataclass(slots=True, kw_only=True)
class Group:
    """What one commit puts down, before it is bytes. Totals are cumulative, this commit included."""

    commit_number: int
    first_seq: int  # of its records; without any, the number that comes next
    committed_ns: int  # wall clock, Unix nanoseconds
    admitted: int
    recorded: int
    lines: Sequence[bytes] = ()
    intents: Sequence[bytes] = ()
    lost: Mapping[str, int] = field(default_factory=dict)
    closes: Iterable[str] = ()
    origins: Iterable[tuple[bytes, int]] = ()
    flags: int = 0

    @property
    def last_seq(self) -> int:
        return self.first_seq + len(self.lines) - 1

    def encode(self, salt: bytes) -> list[bytes]:
        """The frame, in three pieces: the records are copied once, and not again to be put behind their head."""
        records = b"\n".join([*self.lines, b""])
        intents = b"\n".join([*self.intents, b""]) if self.intents else b""
        lost = orjson.dumps(self.lost, option=orjson.OPT_SORT_KEYS) if self.lost else b""
        closes = "\n".join(self.closes).encode()
        origins = b"".join([_ORIGIN.pack(source, number) for source, number in self.origins])
        sizes = (len(records), len(intents), len(lost), len(closes))
        length = HEAD_BYTES + sum(sizes) + len(origins) + TAIL_BYTES
        numbers = (self.commit_number, self.first_seq, max(self.committed_ns, 0), self.admitted, self.recorded)
        counts = (self.flags, len(self.lines), *sizes, len(origins) // _ORIGIN.size)
        head = _HEAD.pack(FRAME_MAGIC, 0, length, salt, *numbers, *counts)
        rest = b"".join((intents, lost, closes, origins, _TAIL.pack(length, FRAME_END)))
        check = zlib.crc32(rest, zlib.crc32(records, zlib.crc32(head[_CHECKED_FROM:])))
        return [head[:4] + _CRC.pack(check) + head[_CHECKED_FROM:], records, rest]


@dataclass(slots=True)
class Frame:
    """A commit as it was read, its checksum held."""

    offset: int
    length: int
    salt: bytes
    commit_number: int
    first_seq: int
    committed_ns: int
    admitted: int
    recorded: int
    flags: int
    count: int
    sizes: tuple[int, ...]  # records, intents, lost and closes in bytes; origins in number
    data: bytes

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.count - 1

    @property
    def before(self) -> int:
        """How many were recorded before it."""
        return self.recorded - self.count

    @property
    def salvaged(self) -> bool:
        return bool(self.flags & SALVAGED)

    @property
    def lines(self) -> list[bytes]:
        return self.data[HEAD_BYTES : HEAD_BYTES + self.sizes[0]].split(b"\n")[:-1]

    @property
    def intents(self) -> list[bytes]:
        if not self.sizes[1]:
            return []
        start = HEAD_BYTES + self.sizes[0]
        return self.data[start : start + self.sizes[1]].split(b"\n")[:-1]

    @property
    def lost(self) -> dict[str, int]:
        if not self.sizes[2]:
            return {}
        start = HEAD_BYTES + sum(self.sizes[:2])
        text = self.data[start : start + self.sizes[2]]
        return {str(reason): int(count) for reason, count in orjson.loads(text).items()}

    @property
    def closes(self) -> list[str]:
        if not self.sizes[3]:
            return []
        start = HEAD_BYTES + sum(self.sizes[:3])
        text = self.data[start : start + self.sizes[3]]
        return text.decode().split("\n")

    @property
    def origins(self) -> list[tuple[bytes, int]]:
        if not self.sizes[4]:
            return []
        start = HEAD_BYTES + sum(self.sizes[:4])
        return [_ORIGIN.unpack_from(self.data, start + at * _ORIGIN.size) for at in range(self.sizes[4])]

    def group(self) -> Group:
        """The same commit, to be written again."""
        return Group(
            commit_number=self.commit_number,
            first_seq=self.first_seq,
            committed_ns=self.committed_ns,
            admitted=self.admitted,
            recorded=self.recorded,
            lines=self.lines,
            intents=self.intents,
            lost=self.lost,
            closes=self.closes,
            origins=self.origins,
            flags=self.flags,
        )


@dataclass(slots=True, frozen=True)
class Hole:
    """Bytes that are no frame. `torn`: the end of a write that was interrupted, and nobody was told of that commit."""

    offset: int
    end: int
    torn: bool


class _Window:
    """A part of a file, read ahead."""

    __slots__ = ("base", "data", "fd", "size", "step")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.step = _FIRST_WINDOW_BYTES
        self.refresh()

    def refresh(self) -> None:
        self.data, self.base, self.size = b"", 0, os.fstat(self.fd).st_size

    def cover(self, offset: int, size: int) -> int:
        """Where `offset` is in `data`, with `size` bytes from there on, or as many as the file has."""
        at = offset - self.base
        if at < 0 or at + size > len(self.data):
            self.data = os.pread(self.fd, min(max(size, self.step), max(self.size - offset, 0)), offset)
            self.step = min(self.step * 4, _WINDOW_BYTES)
            self.base, at = offset, 0
        return at


def read_frame(window: _Window, offset: int, salt: bytes | None) -> Frame | None:
    """The frame that begins there, if one does and its checksum holds. `salt` None: whatever it is."""
    at = window.cover(offset, HEAD_BYTES)
    data = window.data
    if len(data) - at < HEAD_BYTES:
        return None
    magic, check, length, own_salt, commit, first_seq, at_ns, admitted, recorded, flags, count, *sizes = (
        _HEAD.unpack_from(data, at)
    )
    if magic != FRAME_MAGIC or (salt is not None and own_salt != salt) or length > window.size - offset:
        return None
    if length != HEAD_BYTES + sum(sizes[:4]) + sizes[4] * _ORIGIN.size + TAIL_BYTES:
        return None
    at = window.cover(offset, length)
    raw = window.data[at : at + length]
    if len(raw) < length or zlib.crc32(memoryview(raw)[_CHECKED_FROM:]) != check:
        return None
    return Frame(
        offset, length, own_salt, commit, first_seq, at_ns, admitted, recorded, flags, count, tuple(sizes), raw
    )


def scan(
    fd: int, *, start: int = HEADER_BYTES, salt: bytes | None = None, seen: int = 0, enough: int | None = None
) -> Iterator[Frame | Hole]:
    """Every frame from `start` on, and every stretch that is none.

    `seen`: the commit before `start`. `enough`: beside a writer, the commit that is known to be there; once it was
    seen an end is an end, and the room that was taken ahead is not searched.
    """
    window = _Window(fd)
    at = start
    while True:
        frame = read_frame(window, at, salt)
        if frame is None:
            if enough is not None and seen >= enough:
                return
            following = _next_frame(window, at + 1, salt)
            window.refresh()  # a writer beside us may have finished it since: then what follows is no proof of damage
            frame = read_frame(window, at, salt)
            if frame is None and following is not None:
                yield Hole(at, following, torn=False)
                at = following
                continue
        if frame is None:
            if (hole := _tail_of(window, at)) is not None:
                yield hole
            return
        yield frame
        seen, salt = frame.commit_number, frame.salt
        at += frame.length


def _next_frame(window: _Window, start: int, salt: bytes | None) -> int | None:
    """Where the next frame begins whose checksum holds."""
    while start < window.size:
        at = window.cover(start, HEAD_BYTES)
        base, data = window.base, window.data
        if not data:
            return None
        found = data.find(FRAME_MAGIC, at)
        if found < 0:
            if base + len(data) >= window.size:
                return None
            start = base + max(len(data) - len(FRAME_MAGIC) + 1, at + 1)
            continue
        if read_frame(window, base + found, salt) is not None:
            return base + found
        start = base + found + 1
    return None


def _tail_of(window: _Window, start: int) -> Hole | None:
    """What follows the last frame, where it is more than zeros: torn, or a frame that was hit."""
    end = at = start
    while at < window.size:
        data = os.pread(window.fd, _WINDOW_BYTES, at)
        if not data:
            break
        if text := data.rstrip(b"\0"):
            end = at + len(text)
        at += len(data)
    if end == start:
        return None
    data = os.pread(window.fd, end - start, start)
    whole = len(data) >= HEAD_BYTES + TAIL_BYTES and data[-TAIL_BYTES:] == _TAIL.pack(len(data), FRAME_END)
    if whole and not _lacks_sectors(data, start):
        return Hole(start, end, torn=False)
    if FRAME_MAGIC.startswith(data[: len(FRAME_MAGIC)]):
        length = _HEAD.unpack_from(data)[2] if len(data) >= HEAD_BYTES else HEAD_BYTES
        if length > len(data):  # its end is not there
            return Hole(start, end, torn=True)
    return Hole(start, end, torn=_lacks_sectors(data, start))


def _lacks_sectors(data: bytes, start: int) -> bool:
    """Whether a sector is nothing but zeros, as far as it lies in `data`, which begins at `start`."""
    at = 0
    while at < len(data):
        stop = min((start + at) // SECTOR_BYTES * SECTOR_BYTES + SECTOR_BYTES - start, len(data))
        if data.count(0, at, stop) == stop - at:
            return True
        at = stop
    return False


class SegmentFile:
    """A segment open for reading. It stays readable when it is retired or replaced meanwhile."""

    def __init__(self, path: Path) -> None:
        """Raises `SpoolError` where it cannot be opened, or is of a newer format."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise files.translate(error, f"cannot read {path}") from error
        self.damaged: str | None = None  # why the header cannot be believed; frames tell for themselves
        self.header: Header | None = None
        try:
            self.header = Header.decode(os.pread(self._fd, HEADER_BYTES, 0), path)
        except SpoolDamaged as error:
            self.damaged = str(error)
        except OSError as error:
            os.close(self._fd)
            raise files.translate(error, f"cannot read {path}") from error
        except BaseException:
            os.close(self._fd)
            raise

    @property
    def inode(self) -> int:
        return os.fstat(self._fd).st_ino

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    @property
    def salt(self) -> bytes | None:
        return None if self.header is None else self.header.salt

    def frames(self, start: int = HEADER_BYTES, *, seen: int = 0, enough: int | None = None) -> Iterator[Frame | Hole]:
        """As `scan`. Without a header the first frame's salt is taken for the segment's."""
        try:
            yield from scan(self._fd, start=start, salt=self.salt, seen=seen, enough=enough)
        except OSError as error:
            raise files.translate(error, f"cannot read {self.path}") from error

    def seal(self) -> Frame | None:
        """The frame that closes it, where it is sealed: then the file ends with it."""
        window = _Window(self._fd)
        if window.size < HEADER_BYTES + HEAD_BYTES + TAIL_BYTES:
            return None
        try:
            length, mark = _TAIL.unpack(os.pread(self._fd, TAIL_BYTES, window.size - TAIL_BYTES))
            if mark != FRAME_END or length > window.size - HEADER_BYTES:
                return None
            frame = read_frame(window, window.size - length, self.salt)
        except (OSError, struct.error):
            return None
        return frame if frame is not None and frame.flags & SEALS else None

    def is_ahead(self) -> bool:
        """Whether nothing stands where the first frame goes: it was made ahead and is not used yet."""
        return not os.pread(self._fd, HEAD_BYTES, HEADER_BYTES).rstrip(b"\0")

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> SegmentFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Segment:
    """A segment open for writing: by the writer's thread until it is handed to maintenance, then by that."""

    def __init__(self, path: Path, number: int, fd: int, salt: bytes, *, end: int, allocate_bytes: int) -> None:
        self.path = path
        self.number = number
        self.end = end  # where the next frame goes
        self._closing: Group | None = None  # what seals it as of the last commit; None: not begun
        self.broken = False  # a write or sync failed: hands off
        self._fd = fd
        self._salt = salt
        self._allocate_bytes = allocate_bytes
        self._allocated = 0

    @classmethod
    def create(cls, path: Path, number: int, instance: str, *, allocate_bytes: int) -> Segment:
        """A new file with its header, both and its name on disk. Raises `SpoolFull` or `SpoolFailed`."""
        header = Header(number, os.urandom(8), instance)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE)
        except OSError as error:
            raise write_error(error, path) from error
        try:
            os.fchmod(fd, PRIVATE)
            segment = cls(path, number, fd, header.salt, end=HEADER_BYTES, allocate_bytes=allocate_bytes)
            segment._allocate(HEADER_BYTES)
            write_all(fd, [header.encode()], 0)
            sync_file(fd)
            sync_directory(path.parent)
        except OSError as error:
            os.close(fd)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise write_error(error, path) from error
        return segment

    @classmethod
    def reopen(cls, path: Path, number: int, salt: bytes, last: Frame) -> Segment:
        """One that an earlier life left unsealed, to be sealed behind `last`. Raises `SpoolError`."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise write_error(error, path) from error
        segment = cls(path, number, fd, salt, end=last.offset + last.length, allocate_bytes=0)
        segment._note(last.group())
        return segment

    @property
    def begun(self) -> bool:
        return self._closing is not None

    @property
    def commit_number(self) -> int:
        """The last commit in it; 0 where it is not begun."""
        return 0 if self._closing is None else self._closing.commit_number

    def append(self, group: Group, *, sync: bool = True) -> None:
        """One durable commit. Raises `SpoolFull` (tried again here, unless `broken`) or `SpoolFailed`."""
        parts = group.encode(self._salt)
        size = sum(map(len, parts))
        try:
            self._allocate(size)
            write_all(self._fd, parts, self.end)
        except OSError as error:
            self.broken = trouble(error, self.path) is not Trouble.FULL
            raise write_error(error, self.path) from error
        try:
            if sync:
                sync_data(self._fd)
        except OSError as error:
            self.broken = True
            raise write_error(error, self.path) from error
        self.end += size
        self._note(group)

    def _note(self, group: Group) -> None:
        """Keep what a seal says, and not the lines."""
        self._closing = Group(
            commit_number=group.commit_number,
            first_seq=group.last_seq + 1,
            committed_ns=group.committed_ns,
            admitted=group.admitted,
            recorded=group.recorded,
            lost=group.lost,
            flags=SEALS,
        )

    def seal(self) -> None:
        """Nothing more will come: say so, give the room behind it back, close. Raises `SpoolFull` or `SpoolFailed`."""
        assert self._closing is not None
        self._allocate_bytes = 0
        self.append(self._closing)
        try:
            os.ftruncate(self._fd, self.end)
            sync_file(self._fd)
        except OSError as error:
            self.broken = True
            raise write_error(error, self.path) from error
        leave_memory(self._fd)
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _allocate(self, size: int) -> None:
        """Have room for `size` more. By the thread that writes: where the C library imitates the call, it reads and
        writes back what is there, which must not happen beside a write."""
        if self.end + size <= self._allocated or not self._allocate_bytes:
            return
        start = max(self.end, self._allocated)
        step = max(self._allocate_bytes, self.end + size - start)
        if allocate(self._fd, start, step):
            self._allocated = start + step
        else:
            self._allocate_bytes = 0


def write_all(fd: int, parts: Sequence[bytes], offset: int) -> None:
    """All of it, or `OSError`."""
    done = os.pwritev(fd, parts, offset)
    if done == sum(map(len, parts)):
        return
    left = [memoryview(part) for part in parts]
    while True:
        offset += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if not left:
            return
        left[0] = left[0][done:]
        done = os.pwritev(fd, left, offset)


def sync_data(fd: int) -> None:
    """What was written, and the length if it changed, is on disk. Raises `OSError`."""
    if sys.platform == "darwin" or not hasattr(os, "fdatasync"):
        sync_file(fd)
    else:
        os.fdatasync(fd)


def leave_memory(fd: int) -> None:
    """Have the kernel take back the memory that a file's pages are cached in. What was delivered is not read again, and
    45 MB/s of it (30,000 calls a second) would push out what others on this machine have there; whoever is behind reads
    it from the disk, once."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # a hint: a file system that takes none is as good
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def allocate(fd: int, offset: int, size: int) -> bool:
    """Take room ahead. False where that is not possible: then a file grows as it is written, and each sync carries its
    new length: slower, and as safe. Raises `OSError` where there is no room."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(fd, offset, size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENODEV):
            return False
        raise
    return True


def write_error(error: OSError, path: Path) -> SpoolError:
    """Why a segment could not be written, and what to do."""
    match trouble(error, path):
        case Trouble.FULL:
            return SpoolFull(f"no room for {path}: free some disk space; records wait in memory until there is")
        case Trouble.READ_ONLY:
            return SpoolFailed(f"{path} cannot be written: its file system is read-only; mount it for writing")
        case Trouble.GONE:
            return SpoolFailed(f"{path} cannot be written: {REMOVED}")
        case Trouble.DENIED:
            why = os.strerror(error.errno or 0)
            return SpoolFailed(f"{path} cannot be written ({why}): check the directory's owner, mode and mount")
    return SpoolFailed(f"writing {path} failed: {error.strerror or error}")


class Confirmed(NamedTuple):
    """The last commit that a writer knows to be on disk."""

    segment: int
    commit_number: int
    last_seq: int
    recorded: int


class CommitMark:
    """The file `committed` of a slot: written after each sync, never synced itself, 40 bytes in one sector."""

    NAME: Final = "committed"

    def __init__(self, slot: Path) -> None:
        self._path = slot / self.NAME
        self._fd = -1

    def write(self, confirmed: Confirmed) -> None:
        """Never fails: without it readers see a commit when the next one is there."""
        body = _MARK.pack(_MARK_MAGIC, 0, *confirmed)[_CHECKED_FROM:]
        with contextlib.suppress(OSError):
            if self._fd < 0:
                self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
            os.pwrite(self._fd, _MARK_MAGIC + _CRC.pack(zlib.crc32(body)) + body, 0)

    def close(self) -> None:
        """The next `write` opens it anew: its directory may be another one by then."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @classmethod
    def read(cls, slot: Path) -> Confirmed | None:
        """None where there is none, or it cannot be believed."""
        for _ in range(3):  # a write beside us may be half seen
            try:
                data = (slot / cls.NAME).read_bytes()
                magic, check, *numbers = _MARK.unpack(data)
            except (OSError, struct.error):
                return None
            if magic == _MARK_MAGIC and check == zlib.crc32(data[_CHECKED_FROM:]):
                return Confirmed(*numbers)
        return None
