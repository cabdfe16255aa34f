"""Calls that differ in numbers only, counted together: what a batch of plain calls adds up to, without a record each.

The records of such calls say the same of everything but what `SUMMED` and `APART` name. So whoever adds up asks one of
them (`CallKind.example`) and takes the sums of all; who needs them one by one (`CallGroup.records`) reads their lines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any, Final, TypeVar

import orjson

from sidecar.model.exchange import USAGE_FIELDS
from sidecar.model.record import Record

HOUR_S: Final = 3600
_INTEGERS: Final = {int}
_T = TypeVar("_T")
_sizes, _times, _picos, _lines, _numbers = map(attrgetter, ("sizes", "times", "picos", "lines", "numbers"))
TOKEN_FIELDS: Final = tuple(name for name in USAGE_FIELDS if name.endswith("_tokens"))
# Properties of a record that are summed up in a group.
SUMMED: Final = frozenset({"request_bytes", "response_bytes", *TOKEN_FIELDS})
# And those that are others for each call, beside its times, ids and costs.
APART: Final = frozenset({"url", "finish_reason", "service_tier", "duration_ms", "first_byte_ms", "cost_usd", "charge"})
# Why a cost is not known: no price is. Of other reasons (nothing was counted, say) a price would change nothing.
NO_PRICE: Final = frozenset({"unknown_model", "unknown_provider", "no_price"})


@dataclass(slots=True, eq=False)
class CallKind:
    """What such calls have in common. `facts`: whatever somebody worked out of it, by a name of his own."""

    line: bytes = b""  # of one of them
    facts: dict[object, object] = field(default_factory=dict)
    gathering: Gathering | None = None  # that is being filled
    _example: Record | None = None

    @property
    def example(self) -> Record:
        if self._example is None:
            self._example = Record.from_json(self.line)
        return self._example


@dataclass(slots=True, eq=False)
class CallGroup:
    """Calls of one kind that began in one hour, in the order of their numbers."""

    kind: CallKind
    hour: int  # Unix seconds of its start
    lines: list[bytes] = field(default_factory=list)
    durations_ms: list[float] = field(default_factory=list)
    first_bytes_ms: list[float] = field(default_factory=list)
    request_bytes: int = 0
    response_bytes: int = 0
    tokens: dict[str, int] = field(default_factory=dict)  # sums, of those that were reported
    cost_pico: int = 0  # of those that are priced, in US dollars times 10^12
    priced: int = 0
    unpriced: int = 0  # of which no cost is known although there was something to be priced
    # Of each call, where a meter asks for them one by one: sizes of both bodies, and the record's usage object.
    numbers: list[tuple[int, int, Mapping[str, Any] | None]] = field(default_factory=list)
    without_price: int = 0  # of the unpriced, those for one of `NO_PRICE`

    @property
    def calls(self) -> int:
        return len(self.lines)

    def sum_of(self, name: str) -> int | None:
        """Of one of `SUMMED`; None: no call reported it."""
        if name == "request_bytes":
            return self.request_bytes
        return self.response_bytes if name == "response_bytes" else self.tokens.get(name)

    def each(self) -> Sequence[tuple[int, int, Mapping[str, Any] | None]]:
        """The numbers of each call: those kept, or read from the lines, which costs 5 µs a call."""
        if len(self.numbers) == len(self.lines):
            return self.numbers
        rows = [orjson.loads(line) for line in self.lines]
        return [(row["request_bytes"], row["response_bytes"], row["usage"]) for row in rows]

    def records(self) -> Sequence[Record]:
        """One by one. Costs what reading each line does."""
        return [Record.from_json(line) for line in self.lines]


@dataclass(slots=True, eq=False)
class Gathering:
    """Calls of one kind that began in one hour, as they come. They are kept in columns, and summed in C by `groups_of`:
    adding them up one by one was a sixth of what a call's line cost, and a group for each commit a tenth of that."""

    kind: CallKind
    hour: int  # Unix seconds of its start
    lines: list[bytes] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)  # of each: bytes of both bodies
    times: list[tuple[float, float]] = field(default_factory=list)  # duration and first byte, in ms, where wanted
    counts: defaultdict[tuple[str, ...], list[tuple[Any, ...]]] = field(default_factory=lambda: defaultdict(list))
    picos: list[int] = field(default_factory=list)  # costs of those that are priced, in US dollars times 10^12
    unpriced: int = 0
    without_price: int = 0
    numbers: list[tuple[int, int, Mapping[str, Any] | None]] = field(default_factory=list)
    """`counts`: for all calls that have the same of `TOKEN_FIELDS`, in one order: their counts, of which what is no
    integer (null, where none was reported) is in no sum."""


def groups_of(gathered: Iterable[Gathering]) -> list[CallGroup]:
    """All of these, in their order; those of one kind and hour together. They may be asked again."""
    alike: dict[tuple[CallKind, int], list[Gathering]] = {}
    for one in gathered:
        alike.setdefault((one.kind, one.hour), []).append(one)
    return [_group(parts) for parts in alike.values()]


def _group(parts: Sequence[Gathering]) -> CallGroup:
    def column(of: Callable[[Gathering], Iterable[_T]]) -> list[_T]:
        return list(chain.from_iterable(map(of, parts)))

    request_bytes, response_bytes = map(sum, zip(*column(_sizes), strict=True))
    times = column(_times)
    durations_ms, first_bytes_ms = map(list, zip(*times, strict=True)) if times else ([], [])
    counts: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for part in parts:
        for names, rows in part.counts.items():
            counts.setdefault(names, []).extend(rows)
    tokens: dict[str, int] = {}
    for names, rows in counts.items():
        for name, told in zip(names, zip(*rows, strict=True), strict=True):
            reported = told if set(map(type, told)) == _INTEGERS else [count for count in told if type(count) is int]
            if reported:
                tokens[name] = tokens.get(name, 0) + sum(reported)
    picos = column(_picos)
    return CallGroup(
        parts[0].kind,
        parts[0].hour,
        column(_lines),
        durations_ms,
        first_bytes_ms,
        request_bytes,
        response_bytes,
        tokens,
        sum(picos),
        len(picos),
        sum(part.unpriced for part in parts),
        column(_numbers),
        sum(part.without_price for part in parts),
    )
