"""Letting go of old records: whole segments, delivered ones only, by age and by size.

Nothing is taken out of a segment (that costs as much as writing it). The newest always stays, because the totals of the
slot stand in it.
"""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

from sidecar.spool import files
from sidecar.spool.reader import SpoolReader, newest_commit_ns
from sidecar.storage.files import sync_directory


def retire_segments(root: Path, instance: str, before_seq: int, retention_s: float, retention_bytes: int) -> int:
    """Unlink segments whose records all have numbers below `before_seq` and that are too old or too many.

    `retention_bytes` is for all segments of the slot together. Answers how many went. Safe beside the writer, because
    only sealed segments go and those it never touches again, and beside readers: one that has the file open reads on.
    """
    with SpoolReader(root) as reader:
        infos = reader.segments(instance)
    total = sum(files.size_or_zero(info.path) for info in infos)
    oldest_ns = time.time_ns() - int(retention_s * 1e9)
    slot = files.slot_dir(root, instance)
    gone = 0
    for info, following in pairwise(infos):
        newest_ns = newest_commit_ns(info.path)
        if info.bound_seq > before_seq or newest_ns is None:
            break  # oldest first, and never a hole in between
        if total <= retention_bytes and newest_ns >= oldest_ns:
            break
        size = files.size_or_zero(info.path)
        try:
            files.write_retired(slot, following.first_seq, following.base_recorded)
            info.path.unlink()
            sync_directory(slot)
        except OSError as error:
            raise files.translate(error, f"cannot retire {info.path}") from error
        total -= size
        gone += 1
    return gone
