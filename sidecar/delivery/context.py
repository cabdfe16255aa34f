"""What the parts of delivery share: the files, the clock, chance, the numbers to keep to, and somewhere to count."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Final

from sidecar.delivery.dedup_window import ClockWatch
from sidecar.delivery.limits import Limits
from sidecar.delivery.parking_log import ParkingLog, Told
from sidecar.delivery.queries import DeliveryQueries
from sidecar.delivery.removed_backend import may_double
from sidecar.delivery.store import DeliveryStore
from sidecar.delivery.types import Clock, Metrics, Now, SpoolReader
from sidecar.model.delivery import Backend

_LOG: Final = logging.getLogger(__name__)


class SystemClock:
    """The machine's own two clocks."""

    def wall_s(self) -> float:
        return time.time()

    def mono_s(self) -> float:
        return time.monotonic()


def read_clock(clock: Clock) -> Now:
    return Now(clock.wall_s(), clock.mono_s())


@dataclass(frozen=True, slots=True)
class Copied:
    """The data directory was copied, about then, and nobody has decided yet what it is."""

    since_s: float  # wall clock
    text: str  # for the operator
    safe: frozenset[str] = frozenset()  # backends whose own file was copied together with ours


@dataclass(slots=True, kw_only=True)
class Context:
    """One for all workers. Nothing here decides; `now` notices a step of the wall clock and says so."""

    reader: SpoolReader
    store: DeliveryStore
    queries: DeliveryQueries
    metrics: Metrics
    clock: Clock
    limits: Limits
    chance: random.Random
    copied: Copied | None = None
    stepped: Callable[[], None] = lambda: None  # the wall clock was set
    may_send: Callable[[], bool] = lambda: True  # what is delivered is still ours to deliver
    _watch: ClockWatch = field(init=False)
    _parking_log: ParkingLog = field(default_factory=ParkingLog)

    def __post_init__(self) -> None:
        self._watch = ClockWatch(read_clock(self.clock))

    def now(self) -> Now:
        """Both clocks."""
        now = read_clock(self.clock)
        self._watch, stepped = self._watch.look(now, self.limits)
        if stepped:
            _LOG.warning("the wall clock was set; what may have been taken is not sent again")
            self.stepped()
        return now

    def roll(self) -> float:
        return self.chance.random()

    def held(self, backend: Backend) -> str | None:
        """Why a backend is sent nothing just now, although it could be."""
        copied = self.copied
        if copied is None or backend.name in copied.safe:
            return None
        now_s, margin_s = self.clock.wall_s(), self.limits.window_margin_s
        unsure = may_double(backend.abilities, copied_s=copied.since_s, now_s=now_s, margin_s=margin_s)
        return copied.text if unsure else None

    def parked(self, backend: str, reason: str, records: int) -> None:
        """Count what was parked, and say so from time to time."""
        self.metrics.parked(backend, reason, records)
        told = self._parking_log.parked(backend, reason, records, self.now().mono_s)
        if told is not None:
            _tell(told)

    def parked_by(self, backend: str, parked: Collection[tuple[int, str]]) -> None:
        """The same of records, each with its number and its reason; one that stands twice counts once."""
        seqs: dict[str, set[int]] = {}
        for seq, reason in parked:
            seqs.setdefault(reason, set()).add(seq)
        for reason, records in seqs.items():
            self.parked(backend, reason, len(records))

    def tell_parked(self) -> None:
        """Say what was parked and not said for an hour."""
        for told in self._parking_log.due(self.now().mono_s):
            _tell(told)


def _tell(told: Told) -> None:
    facts = {"backend": told.backend, "reason": told.reason, "records": told.records}
    text = "records are parked: see `metering-sidecar spool parked`"
    _LOG.warning(text if told.first else "more records were parked since this was last said", extra={"facts": facts})
