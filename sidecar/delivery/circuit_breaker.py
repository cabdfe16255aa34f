"""How much one backend may be offered, by how it has been answering: all, one probe at a time, or nothing.

What must always hold: a slowed backend is always probed again, however long it takes; only an answer that reads what
was sent ends a slow time; a wait that the backend asked for (`Retry-After`) holds for all that it is offered; and a
long row of one refusal blocks before it parks everything. Time and chance come in as arguments. Waiting and asking are
left to `lane`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidecar.delivery.limits import Limits
from sidecar.delivery.retry_policy import asked_pause_s, whole_refusal
from sidecar.delivery.types import SUSPECT, Now
from sidecar.model.delivery import Blocked, Delivered, Duplicate, Refused, Retry, Unknown, Verdict


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
