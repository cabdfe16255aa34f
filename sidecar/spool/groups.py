"""A group: what one row of a chunk holds, its totals and its checksum.

Records that were committed together, or intents; every row also carries the cumulative totals as of its commit, so that
the newest row says where everything stands and a gap in the figures tells what is missing.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from sidecar.spool.words import SpoolDamaged

RECORD_COLUMNS: Final = (
    "first_seq, last_seq, count, commit_number, committed_ns, salvaged, admitted, recorded, lost, closes, crc32, body"
)
INTENT_COLUMNS: Final = "commit_number, count, committed_ns, admitted, recorded, lost, closes, crc32, body"
RECORD_COLUMN_COUNT: Final = RECORD_COLUMNS.count(",") + 1
INTENT_COLUMN_COUNT: Final = INTENT_COLUMNS.count(",") + 1


@dataclass(slots=True, frozen=True, kw_only=True)
class Totals:
    """Cumulative, as of one commit; `lost` is JSON by reason, `closes` the ids joined by line ends."""

    commit_number: int
    committed_ns: int
    admitted: int
    recorded: int
    lost: str
    closes: str = ""


@dataclass(slots=True, frozen=True)
class RecordGroup:
    """Records with consecutive numbers, as one row."""

    first_seq: int
    count: int
    body: bytes  # lines joined by line ends
    totals: Totals
    salvaged: bool = False

    @property
    def last_seq(self) -> int:
        return self.first_seq + self.count - 1

    def row(self) -> tuple[Any, ...]:
        t = self.totals
        head = (self.first_seq, self.last_seq, self.count, t.commit_number, t.committed_ns, int(self.salvaged),
                t.admitted, t.recorded, t.lost, t.closes)  # fmt: skip
        return (*head, checksum(head, self.body), self.body)

    @classmethod
    def read(cls, row: tuple[Any, ...]) -> RecordGroup:
        """A stored row, checked. Raises `SpoolDamaged`."""
        _check(row)
        first_seq, last_seq, count, number, at_ns, salvaged, admitted, recorded, lost, closes, _, body = row
        if last_seq - first_seq + 1 != count or body.count(b"\n") + 1 != count:
            raise SpoolDamaged(f"group {first_seq} holds other than {count} records")
        totals = Totals(commit_number=number, committed_ns=at_ns, admitted=admitted, recorded=recorded, lost=lost,
                        closes=closes)  # fmt: skip
        return cls(first_seq, count, body, totals, bool(salvaged))


@dataclass(slots=True, frozen=True)
class IntentGroup:
    """Calls found open together; empty where a commit carries totals alone."""

    lines: tuple[bytes, ...]
    totals: Totals

    def row(self) -> tuple[Any, ...]:
        t, body = self.totals, b"\n".join(self.lines)
        head = (t.commit_number, len(self.lines), t.committed_ns, t.admitted, t.recorded, t.lost, t.closes)
        return (*head, checksum(head, body), body)

    @classmethod
    def read(cls, row: tuple[Any, ...]) -> IntentGroup:
        """A stored row, checked. Raises `SpoolDamaged`."""
        _check(row)
        number, count, at_ns, admitted, recorded, lost, closes, _, body = row
        lines = tuple(body.split(b"\n")) if body else ()
        if len(lines) != count:
            raise SpoolDamaged(f"intent group {number} holds other than {count} intents")
        totals = Totals(commit_number=number, committed_ns=at_ns, admitted=admitted, recorded=recorded, lost=lost,
                        closes=closes)  # fmt: skip
        return cls(lines, totals)


@dataclass(slots=True, frozen=True)
class Opening:
    """What a chunk's first commit says of the ones before it."""

    first_seq: int  # numbers below it are not in this chunk; 0 where a salvaged file no longer tells
    base_recorded: int  # records committed before it


def checksum(head: tuple[Any, ...], body: bytes) -> int:
    """Over the row's numbers as well as its bytes: a flipped count is as bad as a flipped byte."""
    return zlib.crc32(body, zlib.crc32("|".join(map(str, head)).encode()))


def _check(row: tuple[Any, ...]) -> None:
    body = row[-1]
    if not isinstance(body, bytes) or row[-2] != checksum(row[:-2], body):
        raise SpoolDamaged(f"group {row[0]} does not match its checksum")


def lost_json(lost: Mapping[str, int]) -> str:
    return orjson.dumps(lost, option=orjson.OPT_SORT_KEYS).decode() if lost else "{}"


def read_lost(text: str) -> dict[str, int]:
    return {str(reason): int(count) for reason, count in orjson.loads(text).items()}
