"""What of newly read settings may come into force while calls go on, and what waits for a restart.

Sockets, processes, the data directory, durability and the shape of what is forwarded stay as they were at the start.
Everything that says who is billed, by what, for how much and where to is taken over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Final

from sidecar.settings.schema import PREFIX, SECTIONS, Settings

TAKEN: Final = frozenset(
    {
        "usage", "prices", "asked", "gate", "subscribers", "subscriber_names", "meters", "price_tables", "limits",
        "price_file", "gate_public_key",
        "backends", "backend_gaps", "backend_values", "effective",
    }
)  # fmt: skip
"""Members of `Settings` that are taken over whole."""
TAKEN_OF: Final[Mapping[str, frozenset[str]]] = {
    "proxy": frozenset({"routes", "on_disconnect", "upstreams"}),
    "serve": frozenset({"log_level"}),
}
"""Members of sections of which the others wait."""


def renewed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """The settings that hold from now on, and the names of those that differ and wait for a restart."""
    taken: dict[str, Any] = {}
    waiting: list[str] = []
    for member in fields(old):
        name = member.name
        before, after = getattr(old, name), getattr(new, name)
        if name in TAKEN:
            taken[name] = after
        elif name in SECTIONS:
            some = TAKEN_OF.get(name, frozenset())
            taken[name] = replace(before, **{each: getattr(after, each) for each in some})
            waiting += [_variable(each) for each in _differing(before, after) if each not in some]
        elif before != after:
            waiting.append(_variable(name))
    return replace(old, **taken), waiting


def _differing(before: Any, after: Any) -> Sequence[str]:
    return [each.name for each in fields(before) if getattr(before, each.name) != getattr(after, each.name)]


def _variable(name: str) -> str:
    return PREFIX + name.upper()
