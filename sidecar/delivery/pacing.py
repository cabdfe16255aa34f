"""How one backend has been answering, kept for its lane and told to the operator when it changes.

What must always hold: every request's verdicts are counted once, here, before they are judged; a backend that goes
down, blocks or comes back is said so once. What the pace is after an answer is decided in `pace`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sidecar.delivery.circuit_breaker import Pace, ended, next_pace, suspect
from sidecar.delivery.limits import Limits
from sidecar.delivery.ports import Metrics
from sidecar.delivery.types import Now
from sidecar.model.delivery import Backend, Delivered, Duplicate, Verdict

_LOG = logging.getLogger(__name__)


class Pacing:
    """The pace of one backend."""

    def __init__(self, backend: Backend, metrics: Metrics, limits: Limits) -> None:
        self._backend, self._metrics, self._limits = backend, metrics, limits
        self._pace = Pace()
        self._ended_s = 0.0  # monotonic: an operator ended all waits

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
        """While slow or paused: not asked before, by the monotonic clock."""
        return max(self._pace.not_before_s, self._pace.paused_until_s)

    @property
    def early_s(self) -> float:
        """When a waiting request may go before its time, by the monotonic clock; 0: not needed."""
        return max(self._pace.probe_s, self._pace.paused_until_s) if self._pace.probe_s else 0.0

    def paused_s(self, now: Now) -> float:
        """How much is left of the wait that the backend asked for."""
        return self._pace.paused_s(now)

    def may_probe(self, now: Now, under_way: int) -> bool:
        return self._pace.may_probe(now, under_way)

    def end_waits(self, now: Now) -> None:
        """An operator says that the backend is ready. What was asked before that has no say any more."""
        self._ended_s = now.mono_s
        self._pace = ended(self._pace, now)

    def allowed(self, now: Now, under_way: int) -> int:
        """How many more requests may start."""
        return self._pace.allowed(now, under_way, self._backend.abilities.concurrency)

    def hear(self, verdicts: Sequence[Verdict], started: Now, now: Now, roll: float) -> Sequence[Verdict]:
        """Count one request's verdicts. Returns those that are to be judged."""
        verdicts = suspect(self._pace, verdicts, self._limits)
        if started.mono_s >= self._ended_s or any(isinstance(v, Delivered | Duplicate) for v in verdicts):
            self._set(next_pace(self._pace, verdicts, now, roll, self._limits), now)
        self._metrics.batch_settled(self._backend.name, verdicts, now.mono_s - started.mono_s)
        return verdicts

    def _set(self, pace: Pace, now: Now) -> None:
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
        asked = pace.paused_until_s > before.paused_until_s
        if asked and not before.slow:
            self._log(
                logging.WARNING,
                "a backend asks to be left alone for a while; what is made meanwhile waits",
                seconds=round(pace.paused_s(now)),
                end_it=f"metering-sidecar spool retry --backend {self._backend.name}",
            )
        elif pace.slow and not before.slow and pace.blocked is None:
            text = f"{self._backend.name} is down: {pace.reason}; it is asked again from time to time"
            self._log(logging.WARNING, text, reason=pace.reason)
        if before.slow and not pace.slow:
            self._log(logging.INFO, "a backend takes records again")

    def _log(self, level: int, text: str, **facts: object) -> None:
        _LOG.log(level, text, extra={"facts": {"backend": self._backend.name, **facts}})
