"""The words of the spool: what is handed in, what is read out, what is counted, and what can go wrong.

No I/O here. A `Batch` is made on the event loop, filled for one loop turn and then belongs to the
writer thread until it is handed back committed; nothing in it is changed after `Spool.submit`
except `releases`, which only the loop touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

# For a directory that went while it was written. No word of a restart: what waits in memory would be lost with it.
REMOVED: Final = "its directory was removed or moved; put it back, and what waits in memory is written by itself"


SOURCE_BYTES: Final = 16
# Sources that a slot remembers, the most recently heard of: a serving process is one source, and those that ended long
# ago send nothing again.
ORIGINS_KEPT: Final = 256


class SpoolError(Exception):
    """The spool cannot do what was asked. The text says what to do about it."""


class SpoolFull(SpoolError):
    """There is no room on the disk. Nothing was written; the same write may be tried again."""


class SpoolFailed(SpoolError):
    """A write or a sync failed: that file must not be written again."""


class SpoolDamaged(SpoolError):
    """A file is not what was written: it has to be set aside and salvaged."""


class SpoolLocked(SpoolError):
    """Another running instance holds it."""

    def __init__(self, text: str, pid: int | None) -> None:
        super().__init__(text)
        self.pid = pid


class State(StrEnum):
    OK = "ok"
    DEGRADED = "degraded"  # a commit failed or is overdue: records wait in memory
    FULL = "full"  # no room on the disk: records wait in memory


@dataclass(slots=True, frozen=True)
class Health:
    """How writing goes, for `/readyz`. `reason` is a fixed text of ours, null while all is well."""

    state: State = State.OK
    reason: str | None = None


@dataclass(slots=True, frozen=True, kw_only=True)
class SpoolTotals:
    """The spool's half of the balance: `admitted = recorded + open + lost`. Counted apart, so it can fail."""

    admitted: int = 0
    recorded: int = 0
    open: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)  # by reason

    @property
    def holds(self) -> bool:
        return self.admitted == self.recorded + self.open + sum(self.lost.values())


@dataclass(slots=True, frozen=True)
class Snapshot:
    """Totals and the last committed number, both of one moment: what `/balance` compares with delivery."""

    totals: SpoolTotals
    last_seq: int


@dataclass(slots=True, frozen=True, kw_only=True)
class StoredGroup:
    """Records as committed together, numbers without a gap: line i has number `first_seq + i`.

    `missing` is not 0 where records were committed once and can no longer be read (a damaged
    file): such a group has no lines and stands for the numbers between its neighbours.
    """

    first_seq: int
    last_seq: int
    lines: tuple[bytes, ...]
    salvaged: bool = False  # read out of a damaged file: `delivery.db` may know nothing of it
    missing: int = 0
    committed_ns: int = 0  # wall clock of the commit, Unix nanoseconds


@dataclass(slots=True)
class Tally:
    """The intake's own count, kept on the event loop by whoever lets calls in.

    `unseen` counts calls that are open and of which no batch knows yet: a crash takes them without
    a trace, so a commit stores `admitted - unseen`.
    """

    admitted: int = 0
    open: int = 0  # in flight, or completed and waiting for the commit
    unseen: int = 0
    lost: Mapping[str, int] = field(default_factory=dict)  # replaced, never changed in place


@dataclass(slots=True)
class Batch:
    """What one loop turn hands to the writer. Lines have the numbers from `first_seq` on."""

    first_seq: int = 0
    lines: list[bytes] = field(default_factory=list)
    opens: list[tuple[str, bytes]] = field(default_factory=list)  # intents: id and line
    closes: list[str] = field(default_factory=list)  # ids whose intent these lines (or a loss) settle
    size_bytes: int = 0
    admitted: int = 0  # admitted - unseen, as of the hand-over
    lost: Mapping[str, int] = field(default_factory=dict)
    since_s: float = 0.0  # loop time of the oldest entry
    handed_s: float = 0.0  # and of the hand-over
    releases: list[Callable[[bool], None]] = field(default_factory=list)
    done: Callable[[Batch], None] | None = None  # called on the loop, once, after the commit
    # Whose work this is: (source, frame number) of what a serving process sent, committed with the lines. A source is
    # `SOURCE_BYTES` long and numbers its frames upwards; `Spool.origins` answers the greatest number of each.
    origins: list[tuple[bytes, int]] = field(default_factory=list)


@dataclass(slots=True, frozen=True, kw_only=True)
class Limits:
    """Sizes of the spool, in bytes unless named otherwise."""

    # Small enough that recovery reads one write-ahead log in well under a second and that retention
    # goes in small steps, large enough that a change of file is rare (one a second at full speed).
    chunk_bytes: int = 64 << 20
    chunk_age_s: float = 86_400.0  # a quiet spool changes files daily, so that retention can bite
    transaction_bytes: int = 4 << 20  # of lines in one commit: bounds the writer's copy
    group_bytes: int = 512 << 10  # of lines in one row: what a reader has to hold at least
    reserve_bytes: int = 32 << 20  # durability.md: room for delivery's verdicts on a full disk
    # Free beyond the reserve before records are written again; keeps a nearly full disk from flapping.
    recover_margin_bytes: int = 8 << 20
    retry_s_min: float = 0.05  # first wait after a failed commit; doubles
    retry_s_max: float = 1.0
    stop_s: float = 10.0  # how long closing waits for a disk that takes nothing
