"""Answers that speak of usage and that no reader knows are said, by route, seldom enough to be read.

The path itself is never said: it may hold ids and secrets. Who wants to know more looks at the records of the route.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

log = logging.getLogger("sidecar.usage")

SAY_EVERY_S: Final = 3_600.0  # of one route
ROUTES_MAX: Final = 256  # routes that are told apart: those configured and those known, and one for all others
OTHER: Final = "other"


class Unclaimed:
    """Called for each of them, with the method and the target of its request."""

    __slots__ = ("_clock_s", "_host", "_route", "_said", "_silent")

    def __init__(self, route: Callable[[str, str], str | None], host: str | None, clock_s: Callable[[], float]) -> None:
        self._route = route
        self._host = host
        self._clock_s = clock_s
        self._said: dict[str, float] = {}  # route -> when it was said last
        self._silent: dict[str, int] = {}  # route -> how many came since

    def __call__(self, method: str, target: str) -> None:
        route = self._route(method, target) or OTHER
        if route not in self._said and len(self._said) >= ROUTES_MAX:
            route = OTHER
        now, last = self._clock_s(), self._said.get(route)
        count = self._silent.pop(route, 0) + 1
        if last is not None and now - last < SAY_EVERY_S:
            self._silent[route] = count
            return
        self._said[route] = now
        log.warning(
            "an answer speaks of usage in a way that no reader knows, so nothing of it is counted: "
            "pin a reader (SIDECAR_PROVIDERS) or take its numbers as own fields (SIDECAR_ELEMENTS)",
            extra={"facts": {"kind": "answer_unclaimed", "route": route, "host": self._host, "calls": count}},
        )
