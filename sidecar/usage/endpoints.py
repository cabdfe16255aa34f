"""What the path of a call says: which row of the table, which model, whose answer, which own fields.

The upstream decides by what a path means, not by how it is spelled, and it sees its own base path in front of the
client's. So a path is looked up in its normal form behind that base. It is looked up once and remembered, within a
limit: most APIs have few paths, and those with ids in them are unknown to the table anyway.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar
from urllib.parse import unquote

from sidecar.model.grammar import Element
from sidecar.model.path_pattern import ANY_METHOD, Patterns
from sidecar.model.target import normal_path
from sidecar.usage.providers.base import Reader
from sidecar.usage.providers.table import Row, entries
from sidecar.usage.reader_choice import Claims
from sidecar.usage.response_headers import Heads, provider_of_host

T = TypeVar("T")

_NAMED_PLACE = re.compile(r"\{[^{}]*\}")
_ESCAPED = re.compile(r"%[0-9A-F]{2}")
_ODD = re.compile(r"[%;\\]")  # of a path whose meaning servers do not agree on

PINNED_ROW = "OpenAI chat completions, and all that speak it"
"""Whose reader is asked first behind a pinned path of a provider that no row names."""

PATHS_MAX = 1_024  # remembered look-ups
PATH_MAX_CHARS = 128  # of a remembered path: longer ones have ids in them


@dataclass(frozen=True, slots=True)
class Pin:
    """All calls of a path belong to this provider: its reader is asked first, and its name is recorded."""

    pattern: str
    provider: str

    @property
    def idle(self) -> bool:
        """Whether it can match nothing: paths are looked up in their normal form."""
        example = _NAMED_PLACE.sub("x", self.pattern.removeprefix("*"))
        return normal_path(example) != example or "%" in _ESCAPED.sub("", example)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is known of a call before its answer."""

    row: Row | None
    model: str | None  # where the path names it
    provider: str | None  # pinned, or known by the upstream's host
    elements: tuple[Element, ...]
    claimable: bool = False  # whether any reader may claim an answer that the row, if any, does not know
    path_decides: bool = False  # the path says which model answers, whatever the body says; a deployment's does not

    def asked(self, said: str | None) -> str | None:
        """The model that is asked for, where the body says `said`."""
        return (self.model or said) if self.path_decides else (said or self.model)


class Endpoints:
    """Finds the `Endpoint` of a call; None where no answer can hold anything to count."""

    __slots__ = (
        "_base", "_by_header", "_by_reader", "_elements", "_paths", "_pins", "_remembered", "_rows", "everybody",
        "heads", "host_provider",
    )  # fmt: skip

    def __init__(
        self,
        rows: Sequence[Row],
        pins: Sequence[Pin],
        elements: Sequence[Element],
        upstream_host: str | None,
        upstream_base: str = "",
    ) -> None:
        self._base = upstream_base.rstrip("/")
        self._rows = rows
        self.everybody = _claims(tuple(dict.fromkeys(row.reader for row in rows)))
        self._paths = Patterns(entries(tuple(rows)))
        self._pins = Patterns([(ANY_METHOD, pin.pattern, pin.provider) for pin in pins])
        self._elements = [(element, _pattern(element)) for element in elements]
        self.host_provider = provider_of_host(upstream_host)
        self._by_header = [row for row in rows if not row.paths and row.reader.header_names]
        self._by_reader = {row.reader: row for row in reversed(rows) if row.unmetered is None}
        self._remembered: dict[str, Endpoint | None] = {}
        names = [name for row in rows for name in row.reader.header_names]
        self.heads = Heads([*names, *(element.header for element in elements if element.header is not None)])

    @property
    def remembered(self) -> int:
        return len(self._remembered)

    def of(self, method: str, target: str) -> Endpoint | None:
        """How calls of this method to this target are read; remembered. None: no reader is for them."""
        key = f"{method} {target.partition('?')[0]}"
        try:
            return self._remembered[key]
        except KeyError:
            found = self._find(method, target)
            if len(key) <= PATH_MAX_CHARS:
                if len(self._remembered) >= PATHS_MAX:
                    self._remembered.clear()  # whoever spells paths in many ways must not fill it for good
                self._remembered[key] = found
            return found

    def provider_of(self, method: str, target: str) -> str | None:
        """Pinned, or known by the upstream's host."""
        pin = _first(self._pins, method, self.meant(target))
        return pin[0] if pin is not None else self.host_provider

    def row_by_header(self, fields: Mapping[str, str]) -> Row | None:
        """The row whose answers give themselves away by a header, on any path."""
        for row in self._by_header:
            if row.reader.header_names[0] in fields:
                return row
        return None

    def row_of(self, reader: Reader) -> Row | None:
        """The row that a reader of an unknown path stands for."""
        return self._by_reader.get(type(reader))

    def _find(self, method: str, target: str) -> Endpoint | None:
        paths = self.meant(target)
        pin = _first(self._pins, method, paths)
        provider = pin[0] if pin is not None else self.host_provider
        own = tuple(
            element for element, known in self._elements if known is None or _first(known, method, paths) is not None
        )
        found = _first(self._paths, method, paths)
        posted = method == "POST"
        if found is not None:
            row, parts = found
            if posted and row.unmetered is not None and any(map(_ODD.search, paths)):
                return Endpoint(None, None, provider, own, claimable=True)  # free only where that is beyond doubt
            if pin is not None and row.unmetered is None and row.provider not in (None, pin[0]):
                row = self._pinned(pin[0]) or row
            model = parts.get("model") or parts.get("deployment")
            claimable = posted or row.unmetered is None
            decides = bool(parts.get("model"))
            return Endpoint(row, unquote(model) if model else None, provider, own, claimable, decides)
        if posted:
            return Endpoint(self._pinned(pin[0]) if pin is not None else None, None, provider, own, claimable=True)
        return Endpoint(None, None, provider, own) if own and method != "HEAD" else None

    def _pinned(self, provider: str) -> Row | None:
        """The row whose reader a pin means: the provider's first one."""
        for row in self._rows:
            if row.provider == provider and row.unmetered is None:
                return row if row.paths else None  # without paths: known by a header of the answer
        return next(row for row in self._rows if row.api == PINNED_ROW)

    def meant(self, target: str) -> tuple[str, ...]:
        """The path as the upstream takes it, then as the client meant it: patterns are written for either."""
        path = normal_path(target)
        if not self._base or path == "*":
            return (path,)
        return (normal_path(target, self._base), path)


def _first(patterns: Patterns[T], method: str, paths: tuple[str, ...]) -> tuple[T, dict[str, str]] | None:
    for path in paths:
        if (found := patterns.match(method, path)) is not None:
            return found
    return None


@lru_cache(maxsize=8)
def _claims(readers: tuple[type[Reader], ...]) -> Claims:
    return Claims(readers)


def _pattern(element: Element) -> Patterns[bool] | None:
    return None if element.pattern is None else Patterns([(ANY_METHOD, element.pattern, True)])
