"""Stored answers counted once: background responses and batches show their usage nowhere else.

Off by default (a stored answer read again was counted when it was made). Where it is on, an id counts the first time
it is seen with usage, be it as the call's own answer or fetched later. The memory is one process's and bounded: after
a restart, or behind another worker, an id may count again; whoever bills must de-duplicate on the response id too.
"""

from __future__ import annotations

from collections import OrderedDict

from sidecar.model.exchange import Usage, UsageState

IDS_MAX = 65_536  # remembered response ids, about 8 MiB

SEEN = "counted before: this response id was seen with usage"


class CountedIds:
    """Remembers which response ids have been counted."""

    __slots__ = ("_ids", "_max")

    def __init__(self, ids_max: int = IDS_MAX) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()
        self._max = ids_max

    def first(self, usage: Usage) -> bool:
        """Whether this usage counts: it has an id that was not seen before. Remembers it."""
        if usage.response_id is None or usage.usage_state is not UsageState.FINAL:
            return False
        if usage.response_id in self._ids:
            self._ids.move_to_end(usage.response_id)
            return False
        self._ids[usage.response_id] = None
        if len(self._ids) > self._max:
            self._ids.popitem(last=False)
        return True
