"""Reading the spool from outside: for delivery, the commands and `verify`, in this process or another.

Nothing is locked and the writer never waits. What must always hold
- Groups come oldest first, by number, and only those whose commit is on disk: the last frame of a segment that is
  being written counts once it is marked as confirmed, or another frame stands behind it.
- A segment counts only below the first commit of the one after it.
- What was committed once and cannot be read any more is told (`missing`), never passed over in silence: the
  cumulative `recorded` in each frame says how many should have come before it.

What was found out about a segment is remembered by its number and inode: where it begins, and a place every 256 KiB
from which to read on.
"""

from __future__ import annotations

import heapq
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from sidecar.spool import files, last_words
from sidecar.spool.segment import BEGINS, HEADER_BYTES, CommitMark, Frame, SegmentFile
from sidecar.spool.types import SpoolError, SpoolTotals, StoredGroup, intent_id

NO_BOUND: Final = (1 << 63) - 1  # beyond every number
# Files kept open for the next read: delivery stands in one segment per instance at a time.
_FILES_KEPT: Final = 8
_PLACES_EVERY: Final = 256 << 10  # bytes


class Place(NamedTuple):
    """A frame from which to read on."""

    first_seq: int
    offset: int
    seen: int  # the commit before it


_START: Final = Place(0, HEADER_BYTES, 0)


@dataclass(slots=True, frozen=True)
class SegmentInfo:
    """Where a begun segment stands in its row."""

    path: Path
    number: int
    first_seq: int  # numbers below it are not in this segment
    base_recorded: int  # records committed before it
    bound_seq: int  # numbers from here on are the next segment's
    bound_commit: int  # and so are commits from here on
    newest: bool  # may still be written


@dataclass(slots=True)
class _Known:
    """What was found out about one file."""

    inode: int
    first: tuple[int, int, int] | None = None  # number, recorded before, commit; None: not begun
    sealed: bool = False
    places: list[Place] = field(default_factory=list)
    tail: Place | None = None  # the last frame that counts, of those that were seen
    folded: Place = _START  # up to here `open` is true
    open: set[str] = field(default_factory=set)


class SpoolReader:
    """All the slots of a data directory. May be shared between threads."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._known: dict[Path, _Known] = {}
        self._files: OrderedDict[tuple[Path, int], SegmentFile] = OrderedDict()

    def instances(self) -> list[str]:
        with self._reading():
            return files.instances(self.root)

    def read(self, instance: str, after_seq: int, *, bytes_max: int = 1 << 20) -> list[StoredGroup]:
        """Groups with numbers beyond `after_seq`, oldest first; at least one where there is one.

        A group that `after_seq` lies in comes without the lines already had.
        """
        with self._reading():
            found: list[StoredGroup] = []
            size = 0
            for group in self._groups(instance, after_seq):
                found.append(group)
                size += sum(map(len, group.lines))
                if size >= bytes_max:
                    break
            return found

    def groups(self, instance: str, after_seq: int = 0) -> Iterator[StoredGroup]:
        """All of them, in steps of `read`."""
        while found := self.read(instance, after_seq):
            yield from found
            after_seq = found[-1].last_seq

    def lines(self, *, since_ns: int = 0, missing: Callable[[int], object] = lambda count: None) -> Iterator[bytes]:
        """Every record of every slot, in the order of commits, from those committed at `since_ns` on. `missing`: told
        how many cannot be read any more, where all are asked for."""
        ways = [self._dated(instance, since_ns) for instance in self.instances()]
        for _, _, group in heapq.merge(*ways, key=lambda item: item[:2]):
            if group.missing:
                missing(group.missing)
            yield from group.lines

    def last_seq(self, instance: str) -> int:
        """The greatest committed number; 0 when there is none."""
        with self._reading():
            last = self._last(instance)
            return 0 if last is None else last[1].last_seq

    def count(self, instance: str, after_seq: int, upto_seq: int) -> int:
        """How many records with `after_seq < seq <= upto_seq` were recorded: those here, and what is missing."""
        if upto_seq <= after_seq:
            return 0
        with self._reading():
            segments = self._segments(instance)
            upto = self._recorded_upto(instance, segments, upto_seq)
            return max(upto - self._recorded_upto(instance, segments, after_seq), 0)

    def totals(self, instance: str) -> SpoolTotals:
        """As the last commit left them; `open` are the intents on disk without a completion."""
        with self._reading():
            note = last_words.read(files.slot_dir(self.root, instance))
            last = self._last(instance)
            if last is None:
                admitted, recorded, open_calls, lost = 0, 0, 0, dict[str, int]()
            else:
                info, frame = last
                admitted, recorded, lost = frame.admitted, frame.recorded, frame.lost
                open_calls = self._open_calls(info, frame.commit_number)
        together, gone = last_words.add(note, admitted=admitted, recorded=recorded, open_calls=open_calls, lost=lost)
        return SpoolTotals(admitted=together, recorded=recorded, open=open_calls, lost=gone)

    def segments(self, instance: str) -> list[SegmentInfo]:
        """The begun segments of a slot, oldest first."""
        with self._reading():
            return self._segments(instance)

    def close(self) -> None:
        with self._lock:
            for file in self._files.values():
                file.close()
            self._files.clear()

    def __enter__(self) -> SpoolReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SpoolReader: {self.root}>"

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One look. What the system says of a file or a directory is a `SpoolError`, in words."""
        with self._lock:
            try:
                yield
            except OSError as error:
                raise files.translate(error, f"cannot read {error.filename or self.root}") from error

    def _dated(self, instance: str, since_ns: int) -> Iterator[tuple[int, int, StoredGroup]]:
        for group in self.groups(instance, self._before(instance, since_ns)):
            if group.committed_ns >= since_ns:
                yield group.committed_ns, group.first_seq, group

    def _before(self, instance: str, since_ns: int) -> int:
        """A number that everything committed at `since_ns` or later is beyond: older segments need not be read."""
        before = 0
        for info in self.segments(instance)[:-1] if since_ns else ():
            if (newest_ns := newest_commit_ns(info.path)) is None or newest_ns >= since_ns:
                break
            before = info.bound_seq - 1
        return before

    # Groups

    def _groups(self, instance: str, after_seq: int) -> Iterator[StoredGroup]:
        """Groups and holes beyond `after_seq`. `recorded` is carried from frame to frame and over segments."""
        segments = self._segments(instance)
        at: tuple[int, int] | None = files.read_retired(files.slot_dir(self.root, instance))
        for info in segments:
            if info.bound_seq <= after_seq + 1:
                at = None  # what is missing in segments before is no longer asked for
                continue
            if at is not None:
                yield from _hole(at, info.first_seq, info.base_recorded, after_seq)
            else:
                at = (0, 0)
            at = (max(info.first_seq, at[0]), max(info.base_recorded, at[1]))
            for frame in self._frames(info, after_seq):
                yield from _hole(at, frame.first_seq, frame.before, after_seq)
                at = (frame.last_seq + 1, max(at[1], frame.recorded))
                if frame.count and frame.last_seq > after_seq:
                    yield _stored(frame, after_seq)

    def _recorded_upto(self, instance: str, segments: list[SegmentInfo], seq: int) -> int:
        """How many records with numbers up to `seq` were recorded; those that retention took count as one lump."""
        at = files.read_retired(files.slot_dir(self.root, instance))
        if seq < at[0]:
            return at[1]
        for info in segments:
            if info.first_seq > seq:
                return info.base_recorded - missing_between(at, info.first_seq, info.base_recorded, seq)
            at = (info.first_seq, info.base_recorded)
            if info.bound_seq <= seq:
                continue
            for frame in self._frames(info, seq):
                if frame.first_seq > seq:
                    return frame.before - missing_between(at, frame.first_seq, frame.before, seq)
                if frame.last_seq >= seq:
                    return frame.before + seq - frame.first_seq + 1
                at = (frame.last_seq + 1, max(at[1], frame.recorded))
        return at[1]

    def _open_calls(self, info: SegmentInfo, upto_commit: int) -> int:
        """Intents of the newest segment that nothing has closed; those open at its beginning stand in its first."""
        known = self._known[info.path]
        for frame in self._from(info, known, known.folded):
            if frame.commit_number > upto_commit:
                break
            if frame.commit_number <= known.folded.seen:
                continue
            if frame.flags & BEGINS:
                known.open.clear()
            for line in frame.intents:
                try:
                    known.open.add(intent_id(line))
                except ValueError:
                    continue  # told by `verify`
            known.open.difference_update(frame.closes)
            known.folded = Place(0, frame.offset, frame.commit_number)
        return len(known.open)

    # Frames

    def _last(self, instance: str) -> tuple[SegmentInfo, Frame] | None:
        """The last commit that counts, and its segment."""
        for info in reversed(self._segments(instance)):
            known = self._known[info.path]
            found = None
            if known.sealed and info.bound_commit == NO_BOUND:
                found = self._file(info.path, known).seal()
            if found is None:
                for frame in self._from(info, known, known.tail or _START):
                    found = frame
            if found is not None:
                return info, found
        return None

    def _frames(self, info: SegmentInfo, after_seq: int) -> Iterator[Frame]:
        """The frames of one segment that count, from the one that holds `after_seq` or one before it on."""
        known = self._known[info.path]
        start = _START
        at = bisect_right(known.places, after_seq + 1, key=lambda place: place.first_seq)
        if at:
            start = known.places[at - 1]
        if known.tail is not None and start.first_seq < known.tail.first_seq <= after_seq + 1:
            start = known.tail
        yield from self._from(info, known, start)

    def _from(self, info: SegmentInfo, known: _Known, start: Place) -> Iterator[Frame]:
        try:
            file = self._file(info.path, known)
        except FileNotFoundError:
            return  # retired just now
        if info.newest and not known.sealed:
            known.sealed = file.seal() is not None
        confirmed = NO_BOUND
        if info.newest and not known.sealed:
            # Before the frames: what is confirmed later may be seen or not, what is seen is confirmed.
            mark = CommitMark.read(info.path.parent)
            confirmed = -1 if mark is None else mark.commit_number
        seen = start.seen
        waiting: tuple[Frame, int] | None = None
        for item in file.frames(start.offset, seen=seen, enough=confirmed if 0 <= confirmed < NO_BOUND else None):
            if not isinstance(item, Frame) or item.commit_number < seen:
                continue
            if item.commit_number >= info.bound_commit:
                return
            if waiting is not None:
                yield self._remember(known, *waiting)
                waiting = None
            if item.commit_number <= confirmed:
                yield self._remember(known, item, seen)
            else:
                waiting = item, seen
            seen = item.commit_number

    def _remember(self, known: _Known, frame: Frame, seen: int) -> Frame:
        """Where it stands. Only of one that counts: who began at another would find nothing there that does, and what
        stands before it would not be counted for as long as the disk takes to sync it."""
        place = Place(frame.first_seq, frame.offset, seen)
        if not known.places or frame.offset >= known.places[-1].offset + _PLACES_EVERY:
            known.places.append(place)
        if known.tail is None or frame.offset > known.tail.offset:
            known.tail = place
        return frame

    # Files

    def _segments(self, instance: str) -> list[SegmentInfo]:
        slot = files.slot_dir(self.root, instance)
        inodes = files.segment_inodes(slot)
        paths = {files.segment_path(slot, number): number for number in inodes}
        for path in [path for path in self._known if path.parent == slot and path not in paths]:
            self._forget(path)
        begun: list[tuple[Path, int, tuple[int, int, int]]] = []
        for path, number in paths.items():
            known = self._known.get(path)
            if known is None or known.inode != inodes[number]:
                self._forget(path)
                known = self._known[path] = _Known(inodes[number])
            if known.first is None:
                self._begin(path, known, newest=number == max(inodes))
            if known.first is not None:
                begun.append((path, number, known.first))
        found: list[SegmentInfo] = []
        bound_seq = bound_commit = NO_BOUND
        for path, number, (first_seq, base, commit) in reversed(begun):
            found.append(SegmentInfo(path, number, first_seq, base, bound_seq, bound_commit, not found))
            bound_seq, bound_commit = min(bound_seq, first_seq), min(bound_commit, commit)
        found.reverse()
        return found

    def _begin(self, path: Path, known: _Known, *, newest: bool) -> None:
        """Find out where a segment begins. Fixed once it has begun, so asked only once."""
        try:
            file = self._file(path, known)
        except FileNotFoundError:
            return
        if newest and file.is_ahead():
            return
        known.sealed = file.seal() is not None
        for item in file.frames():
            if isinstance(item, Frame):
                known.first = (item.first_seq, item.before, item.commit_number)
                return

    def _file(self, path: Path, known: _Known) -> SegmentFile:
        """Raises `FileNotFoundError` where the name is gone or means another file by now."""
        key = (path, known.inode)
        file = self._files.get(key)
        if file is None:
            try:
                file = SegmentFile(path)
            except SpoolError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    raise FileNotFoundError(path) from None
                raise
            if file.inode != known.inode:
                file.close()
                raise FileNotFoundError(path)
            self._files[key] = file
            while len(self._files) > _FILES_KEPT:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(key)
        return file

    def _forget(self, path: Path) -> None:
        known = self._known.pop(path, None)
        if known is not None and (file := self._files.pop((path, known.inode), None)) is not None:
            file.close()


def newest_commit_ns(path: Path) -> int | None:
    """When the last commit of a sealed segment was; None where it is not sealed or cannot be read."""
    try:
        with SegmentFile(path) as file:
            seal = file.seal()
    except SpoolError:
        return None
    return None if seal is None else seal.committed_ns


def missing_between(at: tuple[int, int], first_seq: int, recorded: int, after_seq: int) -> int:
    """How many records beyond `after_seq` should stand between `at` and `first_seq`, with `recorded` before it.

    `at`: the next number, and how many were recorded before it.
    """
    # Of a hole that `after_seq` lies in, what was read before the damage came is not missing. Numbers are given one
    # after the other, so those of the missing end there, also where a million are left out behind them.
    missing = recorded - at[1]
    last_seq = min(at[0] + missing, first_seq) - 1
    return max(min(missing, last_seq - after_seq), 0)


def _stored(frame: Frame, after_seq: int) -> StoredGroup:
    had = max(after_seq - frame.first_seq + 1, 0)
    return StoredGroup(
        first_seq=frame.first_seq + had,
        last_seq=frame.last_seq,
        lines=tuple(frame.lines[had:]),
        salvaged=frame.salvaged,
        committed_ns=frame.committed_ns,
    )


def _hole(at: tuple[int, int], first_seq: int, recorded: int, after_seq: int) -> Iterator[StoredGroup]:
    """The records that should stand between `at` and `first_seq`, where there are any."""
    missing = missing_between(at, first_seq, recorded, after_seq)
    if missing:
        yield StoredGroup(first_seq=max(at[0], after_seq + 1), last_seq=first_seq - 1, lines=(), missing=missing)
