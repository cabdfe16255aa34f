"""What delivery is given: a spool to read, a clock, somewhere to count. Only the methods that it calls."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

from sidecar.delivery.types import Now
from sidecar.model.delivery import Verdict


class StoredGroup(Protocol):
    """Records as committed together: line i has number `first_seq + i`. `missing`: numbers that cannot be read."""

    @property
    def first_seq(self) -> int: ...
    @property
    def last_seq(self) -> int: ...
    @property
    def lines(self) -> tuple[bytes, ...]: ...
    @property
    def salvaged(self) -> bool: ...
    @property
    def missing(self) -> int: ...


class Totals(Protocol):
    @property
    def recorded(self) -> int:
        """All records ever put in, those no longer there included."""
        ...


class SpoolReader(Protocol):
    """The spool of every instance, read only. All methods block."""

    def instances(self) -> list[str]: ...

    def read(self, instance: str, after_seq: int, *, bytes_max: int = 1 << 20) -> Sequence[StoredGroup]:
        """Whole groups in order, the first of which may begin before `after_seq`; nothing when there is no more."""
        ...

    def last_seq(self, instance: str) -> int: ...

    def totals(self, instance: str) -> Totals: ...

    def count(self, instance: str, after_seq: int, upto_seq: int) -> int:
        """Records with `after_seq < seq <= upto_seq`, as the balance counts `recorded`."""
        ...


class Clock(Protocol):
    def wall_s(self) -> float: ...
    def mono_s(self) -> float: ...


class Metrics(Protocol):
    def sealed(self, backend: str, events: int) -> None: ...
    def batch_settled(self, backend: str, verdicts: Sequence[Verdict], seconds: float) -> None: ...
    def parked(self, backend: str, reason: str, count: int) -> None: ...
    def skipped(self, backend: str, reason: str, count: int) -> None: ...
    def blocked(self, backend: str, reason: str | None) -> None: ...


class SystemClock:
    """The machine's own two clocks."""

    def wall_s(self) -> float:
        return time.time()

    def mono_s(self) -> float:
        return time.monotonic()


def read_clock(clock: Clock) -> Now:
    return Now(clock.wall_s(), clock.mono_s())
