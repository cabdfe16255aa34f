"""Answers that speak of usage and that no reader knows are said, by route, seldom enough to be read.

The path itself is never said: it may hold ids and secrets. Who wants to know more looks at the records of the route.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from sidecar.model.seldom import Seldom

log = logging.getLogger("sidecar.usage")

SAY_EVERY_S: Final = 3_600.0  # of one route
OTHER: Final = "other"


class Unclaimed:
    """Called for each of them, with the method and the target of its request."""

    __slots__ = ("_clock_s", "_host", "_route", "_seldom")

    def __init__(self, route: Callable[[str, str], str | None], host: str | None, clock_s: Callable[[], float]) -> None:
        """`route`: the pattern of a method and a target, of a fixed set. `host`: the upstream's."""
        self._route = route
        self._host = host
        self._clock_s = clock_s
        self._seldom = Seldom(SAY_EVERY_S)

    def __call__(self, method: str, target: str) -> None:
        route = self._route(method, target) or OTHER
        if (count := self._seldom.due(route, self._clock_s())) is not None:
            log.warning(
                "an answer speaks of usage in a way that no reader knows, so nothing of it is counted: "
                "pin a reader (SIDECAR_PROVIDERS) or take its numbers as own fields (SIDECAR_ELEMENTS)",
                extra={"facts": {"kind": "answer_unclaimed", "route": route, "host": self._host, "calls": count}},
            )
