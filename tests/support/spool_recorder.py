"""A recorder and the intake of its frames in one process: what a writer's tests need."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from sidecar.settings import SpoolSettings
from sidecar.spool.frames import SOURCE_BYTES
from sidecar.spool.intake import Intake, IntakeMetrics, IntakeSpool, Reading, Source
from sidecar.spool.recorder import Recorder
from sidecar.spool.types import Health


class SpoolRecorderMetrics(IntakeMetrics, Protocol):
    def lost(self, reason: str, count: int) -> None: ...
    def released_uncommitted(self, count: int) -> None: ...


class WholeSpool(IntakeSpool, Protocol):
    def health(self) -> Health: ...


class SpoolRecorder(Recorder):
    """Over an open spool."""

    def __init__(
        self,
        spool: WholeSpool,
        metrics: SpoolRecorderMetrics,
        reading: Callable[[str], Reading] | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
        **given: Any,
    ) -> None:
        """`reading`: as `Intake` takes it. `given`: of `SpoolSettings`."""
        link = _Direct(spool, metrics, self.acknowledged, reading)
        super().__init__(link, link, SpoolSettings(**given), source=link.source.id, clock_ns=clock_ns)


class _Direct:
    """Both ends of a link without one. Counts at once, so that nothing is left to be sent."""

    def __init__(
        self,
        spool: WholeSpool,
        metrics: SpoolRecorderMetrics,
        acknowledged: Callable[[int], None],
        reading: Callable[[str], Reading] | None,
    ) -> None:
        self.lost = metrics.lost
        self.released_uncommitted = metrics.released_uncommitted
        self.health = spool.health
        self.source = Source(os.urandom(SOURCE_BYTES), acknowledged)
        self._intake = Intake(metrics, reading)
        self._intake.begin(spool)
        self._intake.came(self.source)

    def send(self, number: int, data: bytes) -> None:
        self._intake.take(self.source, data)
        self._intake.store()

    def begin_anew(self) -> None:
        raise AssertionError("all of them can be sent")

    def take(self) -> Sequence[tuple[str, str, float]]:
        return ()
