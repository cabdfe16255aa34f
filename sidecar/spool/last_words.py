"""What a process could not write before it ended, in a small file of the slot: the records are gone, the count is not.

Where the disk takes no records until the end, this is written over blanks that have stood there since the start: the
room that the reserve leaves may be taken by somebody else at once, a block that is ours already cannot. The next start
adds the loss to the balance (`lost{stopped}`), and so does whoever reads the slot before that. The arithmetic may be
done any number of times: what was lost is what was admitted and stands in no other term.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.storage.files import PRIVATE, sync_directory

NAME: Final = "unwritten"
SIZE: Final = 4096  # a block: no more is needed, and no file system keeps less
STOPPED: Final = "stopped"  # reason: in memory when the process ended, and on no disk


@dataclass(slots=True, frozen=True)
class Note:
    """`admitted` and `lost` as the process knew them at its end."""

    admitted: int
    lost: Mapping[str, int]


def write(slot: Path, note: Note) -> None:
    """Raises `OSError` where not even this can be written."""
    text = json.dumps({"admitted": note.admitted, "lost": dict(note.lost)})
    _put(slot, text.encode("ascii"))


def keep_room(slot: Path) -> None:
    """Have blanks there instead of a note, so that a note needs no room. Without room now, that is tried at the end."""
    path = slot / NAME
    with contextlib.suppress(OSError):
        if not path.exists() or path.stat().st_size != SIZE or path.read_bytes().strip():
            _put(slot, b"")


def _put(slot: Path, text: bytes) -> None:
    """In place: a new file, and a rename, would need room in the directory too. A note is shorter than a sector."""
    fd = os.open(slot / NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, PRIVATE)
    try:
        os.fchmod(fd, PRIVATE)
        os.pwrite(fd, text.ljust(SIZE), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    sync_directory(slot)


def read(slot: Path) -> Note | None:
    """None where there is none, or it cannot be believed."""
    try:
        row = json.loads((slot / NAME).read_bytes())
        return Note(int(row["admitted"]), {str(reason): int(count) for reason, count in row["lost"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def forget(slot: Path) -> None:
    """What it says is on record now."""
    (slot / NAME).unlink(missing_ok=True)


def add(
    note: Note | None, *, admitted: int, recorded: int, open_calls: int, lost: Mapping[str, int]
) -> tuple[int, dict[str, int]]:
    """`admitted` and `lost` with what the note adds to what the last commit said."""
    if note is None or note.admitted <= admitted:
        return admitted, dict(lost)
    together = {reason: max(lost.get(reason, 0), note.lost.get(reason, 0)) for reason in {*lost, *note.lost}}
    gone = note.admitted - recorded - open_calls - sum(together.values())
    if gone > 0:
        together[STOPPED] = together.get(STOPPED, 0) + gone
    return note.admitted, together
