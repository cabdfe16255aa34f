"""How the disk of the data directory does: how much room is left, and whether a start can write there at all."""

from __future__ import annotations

import sqlite3
from enum import StrEnum
from pathlib import Path
from typing import Final

from sidecar.runtime.instance_lock import NAME as LOCK
from sidecar.runtime.instance_lock import InUseError, NewerError
from sidecar.spool import Limits, SpoolFull
from sidecar.storage.files import START_BYTES, START_FILES, Trouble, probe, trouble
from sidecar.storage.sockets import SocketError

LOOK_S: Final = 1.0  # how often it is looked whether there is room to begin


class NoRoomError(Exception):
    """A start that needs room on the disk, or a file system that may be written. The text says what to do."""


class Room(StrEnum):
    """How the disk does; the text is what an operator is told."""

    ENOUGH = "the disk has room"
    LOW = "the disk is filling up: make room, or lower SIDECAR_RETENTION"
    SHORT = "the disk is nearly full: delivered records are let go before SIDECAR_RETENTION is over; make room"


def room_left(free_bytes: int, mark_bytes: int) -> Room:
    """The first two of three steps; the third, a full disk, is the spool's own."""
    if free_bytes >= mark_bytes:
        return Room.ENOUGH
    return Room.LOW if free_bytes >= mark_bytes // 2 else Room.SHORT


def no_room(data_dir: Path, fault: BaseException) -> Trouble | None:
    """Whether a start failed because nothing can be written there: `FULL`, or `READ_ONLY` where it could be before.

    A new directory on a file system that is read-only is a mistake in the settings, which the fault itself tells.
    """
    if isinstance(fault, (InUseError, NewerError, SocketError)):
        return None
    found = _trouble(data_dir)
    if found is Trouble.FULL or (found is Trouble.READ_ONLY and (data_dir / LOCK).exists()):
        return found
    while fault.__cause__ is not None:
        fault = fault.__cause__
    wants = isinstance(fault, OSError | sqlite3.Error) and trouble(fault, data_dir / LOCK) is Trouble.FULL
    return Trouble.FULL if wants or isinstance(fault, SpoolFull) else None


def can_begin(data_dir: Path) -> bool:
    """Whether everything that a start opens could be made now."""
    return _trouble(data_dir) is None


def text_of(data_dir: Path, found: Trouble) -> str:
    if found is Trouble.READ_ONLY:
        return f"nothing can be written into {data_dir}: its file system is read-only; mount it for writing"
    limits = Limits()
    needed = (START_BYTES + limits.reserve_bytes + limits.recover_margin_bytes) >> 20
    return f"no room is left on the disk of {data_dir}, not even to begin: free at least {needed} MiB there"


def _trouble(data_dir: Path) -> Trouble | None:
    where = data_dir
    while not where.exists() and where != where.parent:
        where = where.parent
    number = probe(where, size_bytes=START_BYTES, files=START_FILES)
    return None if number is None else trouble(OSError(number, ""), where)


def size_of(path: Path) -> int:
    """0 where there is none, or where it cannot be looked at: its own errors say that."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
