"""What arrived at a stand-in, as a person wants to see it: one event in full, and all of it added up by customer.

Each vendor of the receiver knows where its contract has customers and amounts (`Vendor.consumed`). What is added up
here comes from the bytes that were received, so it can be held against what the upstream reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.contract import Consumed
from sidecar.dev.mock_backends.vendors import VENDORS

CALLS: Final = "api_calls"
INPUT: Final = "input_tokens"
OUTPUT: Final = "output_tokens"
COLUMNS: Final = ("customer", CALLS, INPUT, OUTPUT)
VALUE_CHARS_MAX: Final = 96


@dataclass(slots=True)
class Arrived:
    """All that one backend's stand-in took, added up."""

    sums: dict[str, dict[str, int]] = field(default_factory=dict)  # customer -> name -> sum
    is_mapped: bool = True
    own_counts: bool = False

    def rows(self) -> list[dict[str, Any]]:
        """For a table with `COLUMNS`."""
        return [{"customer": customer, **self.sums[customer]} for customer in sorted(self.sums)]


def first_fields(body: object) -> list[tuple[str, str]]:
    """The first event of one body: its fields and their values, cut where they are long."""
    one = body[0] if isinstance(body, list) and body else body
    return [(name, _clipped(value)) for name, value in one.items()] if isinstance(one, dict) else []


def added_up(backend: str, rows: Iterable[tuple[str, object]]) -> Arrived:
    """From the paths and bodies of what was taken in the place of this backend."""
    found = Arrived()
    for path, body in rows:
        for one in body if isinstance(body, list) else [body]:
            if isinstance(one, dict) and (consumed := _consumed(backend, path, one)) is not None:
                found.is_mapped = consumed.is_mapped
                found.own_counts = found.own_counts or consumed.own_counts
                for name, value in _amounts(consumed):
                    sums = found.sums.setdefault(str(consumed.customer), {})
                    sums[name] = sums.get(name, 0) + value
    return found


def _consumed(backend: str, path: str, body: Mapping[str, Any]) -> Consumed | None:
    readings = (row.vendor.consumed(path, body) for row in VENDORS if row.backend == backend)
    return next((one for one in readings if one is not None), None)


def _amounts(consumed: Consumed) -> list[tuple[str, int]]:
    named = [(name.replace("-", "_"), value) for name, value in consumed.amounts.items()]
    return [
        (name, int(value))
        for name, value in named
        if name in COLUMNS and isinstance(value, (int, str)) and str(value).isdigit()
    ]


def _clipped(value: object) -> str:
    text = orjson.dumps(value).decode()
    return text if len(text) <= VALUE_CHARS_MAX else f"{text[:VALUE_CHARS_MAX]}…"
