"""What a copied data directory may send, and what is left to the instance that it was copied from.

What must always hold: while nobody has decided, nothing goes to a backend that may have had it from elsewhere and would
not know it again. Who decides, and what is remembered of it, is the whole's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from sidecar.model.delivery import Abilities, Dedup

COPIED: Final = "copied"  # parked: pending when the directory was copied, and left to the original


def may_double(abilities: Abilities, *, copied_s: float, now_s: float, margin_s: float) -> bool:
    """Whether a delivery that another instance may have made since `copied_s` would count again.

    What was not sealed when the copy was made may have been cut into other requests there, so a request's key tells
    only where a request is one event.
    """
    if abilities.knows_records:
        return False
    if abilities.dedup is Dedup.NONE:
        return True
    window_s = abilities.dedup_window_s
    if window_s is not None and not 0 <= now_s - copied_s < window_s - margin_s:
        return True
    return abilities.dedup is Dedup.REQUEST_KEY and abilities.events_max != 1


def parked_text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "nothing"
