"""Routes: the label a call gets in records and metrics. A configured pattern, a known one, or none; never a raw path.

A raw path may hold ids and secrets and has no bound; a pattern is one of a fixed set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from sidecar.model.path_pattern import ANY_METHOD, Patterns

FOUND_MAX: Final = 1_024  # remembered look-ups: most APIs have few paths
PATH_CHARS_MAX: Final = 128  # of a remembered path: longer ones have ids in them


class Routes:
    """Configured patterns first, then those of the model APIs. Each is `/path/{place}` or `METHOD /path/{place}`."""

    __slots__ = ("_found", "_patterns")

    def __init__(self, configured: Sequence[str], known: Iterable[str] = ()) -> None:
        self._patterns = (Patterns(map(_entry, configured)), Patterns(map(_entry, known)))
        self._found: dict[tuple[str, str], str | None] = {}

    @property
    def remembered(self) -> int:
        return len(self._found)

    def match(self, method: str, path: str) -> str | None:
        """The pattern of this path; a query is not looked at."""
        key = (method, path)
        try:
            return self._found[key]
        except KeyError:
            route = self._look_up(method, path.partition("?")[0])
            if len(path) <= PATH_CHARS_MAX:
                if len(self._found) >= FOUND_MAX:
                    self._found.clear()
                self._found[key] = route
            return route

    def _look_up(self, method: str, path: str) -> str | None:
        for patterns in self._patterns:
            found = patterns.match(method, path)
            if found is not None:
                return found[0]
        return None


def _entry(text: str) -> tuple[str, str, str]:
    """(method, pattern, label): the label is the pattern alone, because a record has the method beside it."""
    method, space, pattern = text.strip().partition(" ")
    if not space:
        return ANY_METHOD, method, method
    pattern = pattern.strip()
    return method.upper(), pattern, pattern
