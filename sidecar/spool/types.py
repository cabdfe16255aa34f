"""What is handed to the spool, read out of it and counted, what can go wrong, and how an open call is noted.

No I/O here. A `Batch` is made on the event loop, filled for one loop turn and then belongs to the
writer thread until it is handed back committed; nothing in it is changed after `Spool.submit`
except `releases`, which only the loop touches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

import orjson

from sidecar.model.exchange import Exchange, Outcome
from sidecar.model.record import encode

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
    """A file is not what was written: what can be read of it is copied, and it is set aside."""


class SpoolLocked(SpoolError):
    """Another running instance holds it."""

    def __init__(self, text: str, pid: int | None) -> None:
        super().__init__(text)
        self.pid = pid


class State(StrEnum):
    """How writing goes."""

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
    done: Callable[[Batch], None] | None = None  # called on the loop, once, after the commit
    # Whose work this is: (source, frame number) of what a serving process sent, committed with the lines. A source is
    # `SOURCE_BYTES` long and numbers its frames upwards; `Spool.origins` answers the greatest number of each.
    origins: list[tuple[bytes, int]] = field(default_factory=list)

    @property
    def last_seq(self) -> int:
        """Of its lines, where it has any."""
        return self.first_seq + len(self.lines) - 1


@dataclass(slots=True, frozen=True, kw_only=True)
class Limits:
    """Sizes of the spool, in bytes unless named otherwise."""

    # Small enough that recovery scans one in well under a second and that retention goes in small steps, large enough
    # that a change of file is rare (one a second at full speed).
    segment_bytes: int = 64 << 20
    segment_age_s: float = 86_400.0  # a quiet spool changes files daily, so that retention can bite
    # What a segment is lengthened by before it is written: syncs then carry no new length, and a quiet spool takes no
    # more than this.
    allocate_bytes: int = 1 << 20
    # Of lines and intents in one commit, which is one frame: what a reader has to hold at least. One batch that is
    # larger is one commit all the same.
    transaction_bytes: int = 1 << 20
    reserve_bytes: int = 32 << 20  # room for delivery's verdicts on a full disk
    # Free beyond the reserve before records are written again; keeps a nearly full disk from flapping.
    recover_margin_bytes: int = 8 << 20
    retry_s_min: float = 0.05  # first wait after a failed commit; doubles
    retry_s_max: float = 1.0
    stop_s: float = 10.0  # how long closing waits for a disk that takes nothing


# An intent is what was known of a call that is still open: its record as it would be if nothing more were heard of it.
# Settled after a crash it is a record with outcome `unknown` under the admitted id: no status, no usage, no duration,
# because nobody saw how it ended.

_UNSEEN: Final[dict[str, Any]] = {
    "first_byte_ms": None,
    "duration_ms": None,
    "status": None,
    "outcome": Outcome.UNKNOWN,
    "response_headers": [],
    "request_bytes": 0,
    "response_bytes": 0,
    "usage": None,
    "error": None,
}


def encode_intent(exchange: Exchange, *, instance: str) -> bytes:
    """The intent's line: compact JSON, no line end. It has no number yet."""
    return encode(exchange, seq=0, instance=instance)


def intent_id(line: bytes) -> str:
    """Whose intent this is. Raises `ValueError` when the line is none."""
    try:
        return str(orjson.loads(line)["id"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not an intent: {type(error).__name__} on {error}") from None


def settle(line: bytes, *, seq: int, instance: str) -> bytes:
    """The record of a call that was found open."""
    row: dict[str, Any] = orjson.loads(line)
    return orjson.dumps(row | _UNSEEN | {"seq": seq, "instance": instance})
