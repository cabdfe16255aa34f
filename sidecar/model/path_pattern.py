"""Path patterns: which known shape a request path has.

The settings check them, routes ask them (for a label that is never a raw path) and usage does (for the reader of a
response). A lookup costs two dictionary look-ups for a path that nobody knows, because most calls through a proxy may
be just that.

A pattern is a path in which `{name}` stands for one non-empty piece without a slash (`/v1/files/{id}/content`,
`/v1/models/{model}:generateContent`); a leading `*` stands for any prefix (`*/chat/completions`). A trailing slash
of the path is not part of it. What is matched is the path in its normal form (`target`): escapes of reserved
characters stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Generic, TypeVar

from sidecar.model.grammar import Unfit

T = TypeVar("T")

ANY_METHOD = "*"

_PLACE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


class Patterns(Generic[T]):
    """A fixed set of (method, pattern, value), the first match wins; literal patterns come before all others."""

    __slots__ = ("_by_tail", "_literal")

    def __init__(self, entries: Iterable[tuple[str, str, T]]) -> None:
        self._literal: dict[str, dict[str, T]] = {}  # path -> method -> value
        self._by_tail: dict[str, list[tuple[str, re.Pattern[str], T]]] = {}
        for method, pattern, value in entries:
            check_pattern(pattern)
            if "{" not in pattern and not pattern.startswith("*"):
                self._literal.setdefault(pattern, {}).setdefault(method, value)
            else:
                self._by_tail.setdefault(_tail(pattern), []).append((method, _compile(pattern), value))

    def match(self, method: str, path: str) -> tuple[T, dict[str, str]] | None:
        """The value and what stood in its places."""
        by_tail = self._by_tail
        by_method = self._literal.get(path)
        if by_method is not None:
            for wanted in (method, ANY_METHOD):
                if wanted in by_method:
                    return by_method[wanted], {}
        elif not by_tail and not self._literal:
            return None
        if path.endswith("/") and len(path) > 1:
            return self.match(method, path.rstrip("/") or "/")
        head, _, last = path.rpartition("/")
        ended = by_tail.get(last.rpartition(":")[2])
        within = by_tail.get(head.rpartition("/")[2] + "/")
        if ended is None and within is None:  # as for nearly all that come here
            return None
        for wanted, regex, value in (*(ended or ()), *(within or ())):
            if wanted in (method, ANY_METHOD) and (hit := regex.fullmatch(path)) is not None:
                return value, hit.groupdict()
        return None


def check_pattern(pattern: str) -> str:
    """The pattern itself. Raises `Unfit` where it is none."""
    if (problem := _problem(pattern)) is not None:
        raise Unfit(f"{pattern!r} is no path pattern: {problem}")
    return pattern


def _problem(pattern: str) -> str | None:
    fixed = _PLACE.sub("", pattern.removeprefix("*"))
    if not fixed.startswith("/") or not pattern.isprintable() or any(c in fixed for c in "*? {}"):
        return "expected one such as /v1/things/{id} or */chat/completions"
    if len(set(_PLACE.findall(pattern))) != len(_PLACE.findall(pattern)):
        return "expected each {name} once"
    if len(pattern) > 1 and pattern.endswith("/"):
        return "expected no slash at the end"
    if "{" in _tail(pattern):
        return "expected a literal as its last piece or the one before"
    return None


def _tail(pattern: str) -> str:
    """The literal by which a path is looked up: its last piece (or verb), else the one before it with a slash."""
    head, _, last = pattern.rpartition("/")
    verb = last.rpartition(":")[2]
    if "{" not in verb:
        return verb
    return head.rpartition("/")[2] + "/"


def _compile(pattern: str) -> re.Pattern[str]:
    prefix, rest = (r"(?:/.*)?", pattern[1:]) if pattern.startswith("*") else ("", pattern)
    parts = _PLACE.split(rest)
    regex = "".join(f"(?P<{part}>[^/]+)" if index % 2 else re.escape(part) for index, part in enumerate(parts))
    return re.compile(prefix + regex)
