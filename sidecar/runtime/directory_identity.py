"""What ties a data directory to its place, so that a copy of it, or an older one put back, is noticed.

A directory that is consistent in itself says nothing of what was delivered since it was copied. So the file `place`
remembers the inodes of a few files, its own among them, and how far delivery had come: a copy has other inodes, and a
`delivery.db` that was put back alone is behind. A move inside a file system, a restart, another mount change neither.
What cannot be noticed from inside: a whole volume set back to a snapshot (the inodes are the same, and all of it is
older). There the operator says so: `metering-sidecar spool adopt`.

Once noticed it stays so until the operator decides, over restarts. Meanwhile the spools that were in the copy are not
written: new records go into one of their own, because another instance may go on numbering in those.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from sidecar.spool import NO_BOUND, SpoolError, SpoolReader, files
from sidecar.storage.files import PRIVATE, replacing, sync_directory

NAME: Final = "place"
WATCHED: Final = ("lock", "delivery.db")  # made once and never made anew, unless somebody takes them away
TEXT: Final = (
    "this data directory was copied or put back ({why}): what may have been delivered from elsewhere since then waits;"
    " decide with `metering-sidecar spool adopt --as original` or `--as copy`"
)
# There an inode's number is made up anew with each mount.
_NO_INODES: Final = ("fuse", "9p", "cifs", "smb3", "vfat", "exfat", "msdos", "ntfs")


class As(StrEnum):
    """What the operator says it is."""

    ORIGINAL = "original"  # the only one that goes on: what is pending is delivered as before
    COPY = "copy"  # another goes on: what is pending is left to it


@dataclass(slots=True, frozen=True)
class Noticed:
    """That it is a copy, until somebody decides. `since_s`: when delivery last ran on what was copied."""

    why: str
    since_s: float
    whole: bool  # all of it is of one moment; else `delivery.db` alone is older
    ends: Mapping[str, int]  # the spools that were in it, and their last numbers

    @property
    def text(self) -> str:
        return TEXT.format(why=self.why)


@dataclass(slots=True, frozen=True)
class Memory:
    """What the file holds."""

    inodes: Mapping[str, int] = field(default_factory=dict)
    cursors: Mapping[str, int] = field(default_factory=dict)  # "backend instance": how far delivery had come
    noticed: Noticed | None = None


def load(data_dir: Path) -> Memory | None:
    """None where there is none: a new directory, or one of an older version."""
    try:
        row = json.loads((data_dir / NAME).read_bytes())
        noticed = None if row["noticed"] is None else Noticed(**row["noticed"])
        return Memory(dict(row["inodes"]), dict(row["cursors"]), noticed)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        return Memory()  # torn or tampered with: nothing to compare with, and none of it is believed


def noticed_in(data_dir: Path) -> Noticed | None:
    memory = load(data_dir)
    return None if memory is None else memory.noticed


def store(data_dir: Path, cursors: Mapping[str, int], noticed: Noticed | None) -> None:
    """Remember where it stands now. Raises `OSError`."""
    with replacing(data_dir / NAME) as file:
        own = os.fstat(file.fileno()).st_ino  # which the rename keeps
        inodes = {NAME: own} | {name: inode for name in WATCHED if (inode := _inode(data_dir / name))}
        file.write(json.dumps(asdict(Memory(inodes, dict(cursors), noticed))).encode("ascii"))


def suspicion(
    data_dir: Path, memory: Memory | None, cursors: Mapping[str, int], *, made_anew: bool
) -> tuple[str, bool]:
    """Why this is not what was left here, and whether all of it is of one moment; "" where it is.

    `made_anew`: `delivery.db` was not there, so what may have been delivered is parked by the rule for that.
    """
    if memory is None or not memory.inodes:
        return "", True
    if not files.file_system(data_dir).startswith(_NO_INODES):
        names = [NAME, *WATCHED[:-1]] if made_anew else [NAME, *WATCHED]
        other = [name for name in names if name in memory.inodes and _inode(data_dir / name) != memory.inodes[name]]
        if other == ["delivery.db"]:
            return "delivery.db is another file than it was", False
        if other:
            return "its files are others than they were", True
    if not made_anew:
        behind = [name for name, seq in memory.cursors.items() if cursors.get(name, 0) < seq]
        if behind:
            return f"delivery.db is older than it was: {behind[0].replace(' ', ', instance ')}", False
    return "", True


def ends_of(data_dir: Path) -> dict[str, int]:
    """The spools that are there and their last numbers; beyond every number, where a file cannot be read."""
    with SpoolReader(data_dir) as reader:
        ends = {}
        for instance in reader.instances():
            try:
                ends[instance] = reader.last_seq(instance)
            except SpoolError:
                ends[instance] = NO_BOUND
        return ends


def freeze(data_dir: Path, instances: Mapping[str, int]) -> None:
    """Let nobody write these spools. Raises `OSError`."""
    for instance in instances:
        (files.slot_dir(data_dir, instance) / files.FROZEN).touch(mode=PRIVATE)
        sync_directory(files.slot_dir(data_dir, instance))


def thaw(data_dir: Path, instances: Mapping[str, int]) -> None:
    """These slots may be written again."""
    for instance in instances:
        with contextlib.suppress(FileNotFoundError):
            (files.slot_dir(data_dir, instance) / files.FROZEN).unlink()


def notice(data_dir: Path, why: str, *, whole: bool, since_s: float | None, ends: Mapping[str, int]) -> Noticed:
    """Freeze what is there. The memory of it is `store`d by the caller."""
    freeze(data_dir, ends)
    return Noticed(why, time.time() if since_s is None else since_s, whole, dict(ends))


def merged(old: Noticed, new: Noticed) -> Noticed:
    """A copy of what had been noticed as a copy before: the earlier time counts, and all spools."""
    ends = {**new.ends, **old.ends}
    return replace(new, since_s=min(old.since_s, new.since_s), whole=old.whole and new.whole, ends=ends)


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except OSError:
        return 0
