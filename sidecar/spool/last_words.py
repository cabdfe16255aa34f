"""What a process could not write before it ended, in a small file of the slot: the records are gone, the count is not.

Where the disk takes no records until the end, the reserve is given up and this is written into its room. The next start
adds the loss to the balance (`lost{stopped}`), and so does whoever reads the slot before that. The arithmetic may be
done any number of times: what was lost is what was admitted and stands in no other term.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.spool import files

NAME: Final = "unwritten"
STOPPED: Final = "stopped"  # reason: in memory when the process ended, and on no disk


@dataclass(slots=True, frozen=True)
class Note:
    """`admitted` and `lost` as the process knew them at its end."""

    admitted: int
    lost: Mapping[str, int]


def write(slot: Path, note: Note) -> None:
    """Raises `OSError` where not even this can be written."""
    draft = slot / f"{NAME}.draft"
    with files.open_private(draft) as file:
        json.dump({"admitted": note.admitted, "lost": dict(note.lost)}, file)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(slot / NAME)
    files.sync_directory(slot)


def read(slot: Path) -> Note | None:
    try:
        row = json.loads((slot / NAME).read_bytes())
        return Note(int(row["admitted"]), {str(reason): int(count) for reason, count in row["lost"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def forget(slot: Path) -> None:
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
