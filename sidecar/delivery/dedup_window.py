"""Whether a backend would still recognise a repeat, by clocks that may be set while nobody looks.

What must always hold: of the two clocks the one that ran further counts, and after a step of the wall clock none of
the window is left: a repeat that is not recognised is billed twice, one that is not sent is parked and can be
redriven. Reading the clocks is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

from sidecar.delivery.limits import Limits
from sidecar.delivery.types import Now, Tries
from sidecar.model.delivery import Abilities, Dedup


def window_left_s(tries: Tries, abilities: Abilities, now: Now, limits: Limits) -> float | None:
    """How long a repeat is still recognised; None: without end. Runs on the larger of both clocks."""
    if not tries.risky or abilities.resend_unknown:
        return None
    if abilities.dedup is Dedup.NONE:
        return None  # an answered 5xx is tried again; a lost answer never gets here
    if abilities.dedup_window_s is None:
        return None
    if tries.expired or tries.risk_wall_s is None:
        return 0.0
    gone_s = now.wall_s - tries.risk_wall_s
    if gone_s < -limits.clock_step_s:
        return 0.0
    if tries.risk_mono_s is not None:
        gone_s = max(gone_s, now.mono_s - tries.risk_mono_s)
    return max(abilities.dedup_window_s - limits.window_margin_s - gone_s, 0.0)


def may_resend(tries: Tries, abilities: Abilities, now: Now, limits: Limits) -> bool:
    left_s = window_left_s(tries, abilities, now, limits)
    return tries.forced or left_s is None or left_s > 0


@dataclass(frozen=True, slots=True)
class ClockWatch:
    """Finds a step of the wall clock by comparing it with the monotonic one, look by look."""

    last: Now

    def look(self, now: Now, limits: Limits) -> tuple[ClockWatch, bool]:
        drift_s = (now.wall_s - self.last.wall_s) - (now.mono_s - self.last.mono_s)
        return ClockWatch(now), abs(drift_s) > limits.clock_step_s
