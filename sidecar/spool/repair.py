"""What becomes of a damaged segment: a copy of what can be read of it takes its place, and it is kept as it was.

Recovery does this on opening, and the writer with a segment whose write or sync failed. The copy is made by the same
scan by which segments are read, so what readers passed over is what it lacks.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.spool import files
from sidecar.spool.segment import SALVAGED, SEALS, Hole, Segment, SegmentFile
from sidecar.storage.files import sync_directory, sync_file

_DRAFT: Final = ".draft"  # the copy of a damaged segment, while it is written


@dataclass(slots=True, frozen=True)
class Repaired:
    """What a damaged segment gave, and where it is kept as it was."""

    records: int
    set_aside: Path


def repair(root: Path, instance: str, path: Path, number: int, *, upto: int | None = None) -> Repaired:
    """Replace a segment by a sealed copy of its readable frames (up to the commit `upto`), and keep it as it was.

    The copy is complete on disk before it takes the name, and the damaged file has its second name before that, so a
    crash anywhere in between leaves the segment as it was or repaired. Where nothing is readable there is no copy.
    Raises `SpoolFull`, or `OSError` and `SpoolError` where the directory cannot be written.
    """
    draft = path.with_name(path.name + _DRAFT)
    draft.unlink(missing_ok=True)
    copy: Segment | None = None
    records, newest = 0, 0
    try:
        with SegmentFile(path) as damaged:
            for frame in damaged.frames():
                # A segment's numbers only grow: what is out of order was never its own.
                if isinstance(frame, Hole) or frame.flags & SEALS or frame.commit_number <= newest:
                    continue
                if upto is not None and frame.commit_number > upto:
                    break
                newest = frame.commit_number
                copy = copy or Segment.create(draft, number, instance, allocate_bytes=0)
                group = frame.group()
                group.flags |= SALVAGED
                copy.append(group, sync=False)
                records += frame.count
        if copy is not None:
            copy.seal()
    except BaseException:
        if copy is not None:
            copy.close()
        draft.unlink(missing_ok=True)
        raise
    kept = _keep(root, instance, path)
    if copy is None:
        path.unlink()
    else:
        draft.rename(path)
    sync_directory(path.parent)
    return Repaired(records, kept)


def _keep(root: Path, instance: str, path: Path) -> Path:
    """Give a damaged segment a second name where nobody writes. Returns the directory."""
    base = root / "set-aside"
    files.make_directory(base)
    target = base / f"{instance}-{path.stem}-{time.time_ns()}"
    target.mkdir(mode=0o700)
    try:
        os.link(path, target / path.name)
    except OSError:  # a file system without links
        shutil.copy2(path, target / path.name)
        fd = os.open(target / path.name, os.O_RDONLY)
        try:
            sync_file(fd)
        finally:
            os.close(fd)
    for directory in (target, base):
        sync_directory(directory)
    return target


def remove_drafts(slot: Path) -> None:
    """Copies that a crash left unfinished."""
    for path in slot.glob(f"*{_DRAFT}"):
        path.unlink(missing_ok=True)
