"""How much one backend may be offered, by how it has been answering: all, one probe at a time, or a block.

What must always hold: a slowed backend is always probed again, however long it takes; only an answer that reads what
was sent ends a slow time; and a long row of one refusal blocks before it parks everything. Time and chance come in
as arguments. Waiting and asking are left to `lane`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sidecar.delivery.limits import Limits
from sidecar.delivery.retry import asked_wait_s, whole_refusal
from sidecar.delivery.words import SUSPECT, Now
from sidecar.verdict import Blocked, Delivered, Duplicate, Refused, Retry, Unknown, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """How a backend has been answering, and how many requests it may be offered.

    Up: as many as it has slots. Down (nothing taken for a while) or blocked (an operator must act): one
    at a time, after a wait, old and fresh ones in turn, so that no stuck record can hide a recovery.
    """

    failures: int = 0  # requests in a row that came to nothing
    reason: str | None = None  # why the last of them did
    refusals: int = 0  # requests in a row refused whole, for `refusal`
    refusal: str = ""
    blocked: str | None = None
    probes: int = 0  # in a row, while down or blocked
    not_before_s: float = 0.0  # monotonic: the next probe

    @property
    def slow(self) -> bool:
        return self.blocked is not None or self.not_before_s > 0

    def allowed(self, now: Now, under_way: int, slots: int) -> int:
        """How many more requests may start."""
        if not self.slow:
            return max(slots - under_way, 0)
        return 1 if under_way == 0 and now.mono_s >= self.not_before_s else 0


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
    if any(isinstance(v, Delivered | Duplicate) for v in verdicts):
        return Pace()
    blocked = next((v.reason for v in verdicts if isinstance(v, Blocked)), None)
    if pace.slow and now.mono_s < pace.not_before_s:
        return pace  # a late answer from before the pace was slowed: no probe
    if blocked is not None:
        top_s = min(limits.blocked_cap_s, limits.blocked_base_s * 2.0 ** min(pace.probes, 20))
        return replace(
            pace,
            blocked=blocked,
            probes=pace.probes + 1,
            not_before_s=now.mono_s + top_s * (0.5 + roll / 2),
        )
    refusal = whole_refusal(verdicts)
    if refusal is not None:
        # An answer that reads what was sent: whatever blocked or broke the backend before is over.
        refusals = pace.refusals + 1 if refusal == pace.refusal else 1
        return Pace(refusals=refusals, refusal=refusal)
    if any(isinstance(v, Refused) for v in verdicts):
        return Pace()
    failures, reason = pace.failures + 1, failure_of(verdicts)
    if pace.blocked is None and failures < limits.down_after:
        return replace(pace, failures=failures, reason=reason)
    cap_s = limits.blocked_cap_s if pace.blocked is not None else limits.down_cap_s
    wait_s = min(cap_s, limits.backoff_base_s * 2.0 ** min(pace.probes, 20)) * (0.5 + roll / 2)
    after_s = min(asked_wait_s(verdicts) or 0.0, limits.retry_after_cap_s)
    pace = replace(pace, failures=failures, reason=reason)
    return replace(pace, probes=pace.probes + 1, not_before_s=now.mono_s + max(wait_s, after_s))
