"""How much one backend may be offered, by how it has been answering: all, one probe at a time, or nothing.

What must always hold: a slowed backend is always probed again, however long it takes; only an answer that reads what
was sent ends a slow time; a wait that the backend asked for (`Retry-After`) holds for all that it is offered; and a
long row of one refusal blocks before it parks everything. Time and chance come in as arguments: what the pace is after
an answer is decided by pure functions. Waiting and asking are left to the worker.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidecar.delivery.limits import Limits
from sidecar.delivery.retry_policy import asked_pause_s, whole_refusal
from sidecar.delivery.types import SUSPECT, Metrics, Now
from sidecar.model.delivery import Backend, Blocked, Delivered, Duplicate, Refused, Retry, Unknown, Verdict

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a backend has been answering, and how many requests it may be offered.

    Up: as many as it has slots. Down (nothing taken for a while) or blocked (an operator must act): one
    at a time, after a wait, old and fresh ones in turn, so that no stuck record can hide a recovery. Paused: none.
    """

    failures: int = 0  # requests in a row that came to nothing
    reason: str | None = None  # why the last of them did
    refusals: int = 0  # requests in a row refused whole, for `refusal`
    refusal: str = ""
    blocked: str | None = None
    probes: int = 0  # in a row, since the first failure or while blocked
    since_s: float | None = None  # monotonic: the first failure of the row
    probe_s: float = 0.0  # monotonic: when a waiting request may be taken before its time, to see; 0: no need
    not_before_s: float = 0.0  # monotonic: the next probe of a slow backend
    paused_until_s: float = 0.0  # monotonic: the backend asked to be left alone until then

    @property
    def slow(self) -> bool:
        return self.blocked is not None or self.not_before_s > 0

    def paused_s(self, now: Now) -> float:
        """How much is left of the wait that the backend asked for."""
        return max(self.paused_until_s - now.mono_s, 0.0)

    def allowed(self, now: Now, under_way: int, slots: int) -> int:
        """How many more requests may start."""
        if self.paused_s(now):
            return 0
        if not self.slow:
            return max(slots - under_way, 0)
        return 1 if under_way == 0 and now.mono_s >= self.not_before_s else 0

    def may_probe(self, now: Now, under_way: int) -> bool:
        """Whether one request may go before its own wait is over: how long it waits tells nothing of the backend."""
        return self.probe_s > 0 and under_way == 0 and now.mono_s >= max(self.probe_s, self.paused_until_s)


def suspect(pace: Pace, verdicts: Sequence[Verdict], limits: Limits) -> Sequence[Verdict]:
    """Turn one more refusal in a long row of the same into a block: a wrong setting must not park a million."""
    reason = whole_refusal(verdicts)
    if reason is not None and reason == pace.refusal and pace.refusals + 1 >= limits.suspect_after:
        return [Blocked(SUSPECT)] * len(verdicts)
    return verdicts


def failure_of(verdicts: Sequence[Verdict]) -> str | None:
    """Why a request came to nothing, in the word of its first event that was neither taken nor refused."""
    return next((v.reason for v in verdicts if isinstance(v, Retry | Unknown | Blocked)), None)


def next_pace(pace: Pace, verdicts: Sequence[Verdict], now: Now, roll: float, limits: Limits) -> Pace:
    """The pace after one request's verdicts (those that `suspect` left)."""
    pause_s = asked_pause_s(verdicts, limits)
    paused_until_s = max(pace.paused_until_s, now.mono_s + pause_s) if pause_s else pace.paused_until_s
    if any(isinstance(v, Delivered | Duplicate) for v in verdicts):
        return Pace(paused_until_s=paused_until_s)  # a late answer does not take back what another one asked for
    blocked = next((v.reason for v in verdicts if isinstance(v, Blocked)), None)
    if pace.slow and now.mono_s < pace.not_before_s:
        # A late answer from before the pace was slowed: no probe.
        return replace(pace, paused_until_s=paused_until_s)
    if blocked is not None:
        top_s = min(limits.blocked_cap_s, limits.blocked_base_s * 2.0 ** min(pace.probes, 20))
        probe_s = now.mono_s + top_s * (0.5 + roll / 2)
        return replace(pace, blocked=blocked, probes=pace.probes + 1, probe_s=probe_s, not_before_s=probe_s)
    refusal = whole_refusal(verdicts)
    if refusal is not None:
        # An answer that reads what was sent: whatever blocked or broke the backend before is over.
        refusals = pace.refusals + 1 if refusal == pace.refusal else 1
        return Pace(refusals=refusals, refusal=refusal, paused_until_s=paused_until_s)
    if any(isinstance(v, Refused) for v in verdicts):
        return Pace(paused_until_s=paused_until_s)
    failures, since_s = pace.failures + 1, now.mono_s if pace.since_s is None else pace.since_s
    probe_s = now.mono_s + _probe_wait_s(pace, now.mono_s - since_s, limits) * (0.5 + roll / 2)
    slow = pace.slow or failures >= limits.down_after
    if pause_s:
        # It asked to be left alone: afterwards one request sees whether it is ready, before all of them go.
        probe_s, slow = paused_until_s, True
    return replace(
        pace,
        failures=failures,
        reason=failure_of(verdicts),
        probes=pace.probes + 1,
        since_s=since_s,
        probe_s=probe_s,
        not_before_s=probe_s if slow else 0.0,
        paused_until_s=paused_until_s,
    )


def ended(pace: Pace, now: Now) -> Pace:
    """The same with no wait left: an operator knows that the backend is ready."""
    at_s = min(pace.not_before_s, now.mono_s)
    return replace(pace, paused_until_s=0.0, probe_s=min(pace.probe_s, now.mono_s), not_before_s=at_s)


def _probe_wait_s(pace: Pace, down_s: float, limits: Limits) -> float:
    """The longest wait before the next look: short at first, and never so long that a recovery goes unnoticed."""
    if pace.blocked is not None:
        cap_s = limits.blocked_cap_s
    elif down_s < limits.probe_soon_for_s:
        cap_s = min(limits.probe_soon_s, limits.down_cap_s)
    else:
        cap_s = limits.down_cap_s
    return min(cap_s, limits.backoff_base_s * 2.0 ** min(pace.probes, 20))


class CircuitBreaker:
    """The pace of one backend, kept for its worker and told to the operator when it changes.

    What must always hold: every request's verdicts are counted once, here, before they are judged; a backend that goes
    down, blocks or comes back is said so once.
    """

    def __init__(self, backend: Backend, metrics: Metrics, limits: Limits) -> None:
        self._backend, self._metrics, self._limits = backend, metrics, limits
        self._pace = Pace()
        self._ended_s = 0.0  # monotonic: an operator ended all waits
        self.taken_s = -math.inf  # monotonic: when the backend last took something

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
        taken = any(isinstance(v, Delivered | Duplicate) for v in verdicts)
        if taken:
            self.taken_s = now.mono_s
        if taken or started.mono_s >= self._ended_s:
            self._set(next_pace(self._pace, verdicts, now, roll, self._limits), now)
        self._metrics.batch_settled(self._backend.name, verdicts, now.mono_s - started.mono_s)
        return verdicts

    def _set(self, pace: Pace, now: Now) -> None:
        before, self._pace = self._pace, pace
        if pace.blocked != before.blocked:
            self._metrics.blocked(self._backend.name, pace.blocked)
            if pace.blocked is not None:
                name = self._backend.name
                refusal = {"refusal": pace.refusal} if pace.refusal else {}
                self._log(
                    logging.ERROR,
                    f"{name} takes nothing until somebody acts, everything is kept for it: {pace.blocked}",
                    reason=pace.blocked,
                    look="metering-sidecar check --connect",
                    **refusal,
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
