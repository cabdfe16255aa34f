"""Letting go of old records: whole chunks, delivered ones only, by age and by size.

Rows are never deleted one by one (that costs as much as writing them and frees nothing). The newest chunk always
stays, because the totals of the slot stand in it.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Final

from sidecar.spool import files
from sidecar.spool.reader import SpoolReader
from sidecar.spool.recovery import newest_commit_ns, reading
from sidecar.spool.words import SpoolError

_NEVER_NS: Final = 1 << 62


def retire_chunks(root: Path, instance: str, before_seq: int, retention_s: float, retention_bytes: int) -> int:
    """Unlink chunks whose records all have numbers below `before_seq` and that are too old or too many.

    `retention_bytes` is for all chunks of the slot together. Answers how many went. Safe beside the
    writer: only sealed chunks go, and those it never touches again.
    """
    with SpoolReader(root) as reader:
        infos = reader.chunks(instance)
    total = sum(_size(info.path) for info in infos)
    oldest_ns = time.time_ns() - int(retention_s * 1e9)
    slot = files.slot_dir(root, instance)
    gone = 0
    for info, following in pairwise(infos):
        if info.bound_seq > before_seq or files.size_or_zero(files.wal_path(info.path)):
            break  # oldest first, and never a hole in between
        if total <= retention_bytes and _newest_ns(info.path) >= oldest_ns:
            break
        size = _size(info.path)
        try:
            files.write_retired(slot, following.opening.first_seq, following.opening.base_recorded)
        except OSError as error:
            raise files.translate(error, f"cannot note in {slot} what is retired") from error
        files.remove_chunk(info.path)
        total -= size
        gone += 1
    return gone


def _size(path: Path) -> int:
    return files.size_or_zero(path) + files.size_or_zero(files.wal_path(path))


def _newest_ns(path: Path) -> int:
    """When the last commit of a chunk was. What cannot be read does not age: only size takes it."""
    try:
        with reading(path) as connection:
            return newest_commit_ns(connection) or _NEVER_NS
    except SpoolError:
        return _NEVER_NS
