"""Routes: the label a call gets in records and metrics. A configured pattern, a known one, or none; never a raw path.

A raw path may hold ids and secrets and has no bound; a pattern is one of a fixed set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sidecar.patterns import ANY_METHOD, Patterns


class Routes:
    """Configured patterns first, then those of the model APIs. Each is `/path/{place}` or `METHOD /path/{place}`."""

    __slots__ = ("_patterns",)

    def __init__(self, configured: Sequence[str], known: Iterable[str] = ()) -> None:
        self._patterns = (Patterns(map(_entry, configured)), Patterns(map(_entry, known)))

    def match(self, method: str, path: str) -> str | None:
        """The pattern of this path; a query is not looked at."""
        path = path.partition("?")[0]
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
