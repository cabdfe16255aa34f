"""How one backend has been answering, kept for its lane and told to the operator when it changes.

What must always hold: every request's verdicts are counted once, here, before they are judged; a backend that goes
down, blocks or comes back is said so once. What the pace is after an answer is decided in `pace`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sidecar.delivery.limits import Limits
from sidecar.delivery.pace import Pace, next_pace, suspect
from sidecar.delivery.ports import Metrics
from sidecar.delivery.words import Now
from sidecar.verdict import Backend, Verdict

_LOG = logging.getLogger(__name__)


class Pacing:
    """The pace of one backend."""

    def __init__(self, backend: Backend, metrics: Metrics, limits: Limits) -> None:
        self._backend, self._metrics, self._limits = backend, metrics, limits
        self._pace = Pace()

    @property
    def slow(self) -> bool:
        return self._pace.slow

    @property
    def blocked(self) -> str | None:
        return self._pace.blocked

    @property
    def failing(self) -> str | None:
        """While down: why the last request came to nothing."""
        return self._pace.reason if self._pace.slow else None

    @property
    def next_probe_s(self) -> float:
        """While slow: not asked before, by the monotonic clock."""
        return self._pace.not_before_s

    def allowed(self, now: Now, under_way: int) -> int:
        """How many more requests may start."""
        return self._pace.allowed(now, under_way, self._backend.abilities.concurrency)

    def hear(self, verdicts: Sequence[Verdict], started: Now, now: Now, roll: float) -> Sequence[Verdict]:
        """Count one request's verdicts. Returns those that are to be judged."""
        verdicts = suspect(self._pace, verdicts, self._limits)
        self._set(next_pace(self._pace, verdicts, now, roll, self._limits))
        self._metrics.batch_settled(self._backend.name, verdicts, now.mono_s - started.mono_s)
        return verdicts

    def _set(self, pace: Pace) -> None:
        before, self._pace = self._pace, pace
        if pace.blocked != before.blocked:
            self._metrics.blocked(self._backend.name, pace.blocked)
            if pace.blocked is not None:
                self._log(
                    logging.ERROR,
                    "a backend takes nothing until somebody acts; everything is kept for it",
                    reason=pace.blocked,
                    refusal=pace.refusal or None,
                )
        if pace.slow and not before.slow and pace.blocked is None:
            text = f"{self._backend.name} is down: {pace.reason}; it is asked again from time to time"
            self._log(logging.WARNING, text, reason=pace.reason)
        if before.slow and not pace.slow:
            self._log(logging.INFO, "a backend takes records again")

    def _log(self, level: int, text: str, **facts: object) -> None:
        _LOG.log(level, text, extra={"facts": {"backend": self._backend.name, **facts}})
