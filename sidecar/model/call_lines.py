"""Stored lines back into groups of calls: what a backlog adds up to, without a record each.

A line is parsed once, and what sums and meters ask of it goes into columns (`Gathering`): a fifth of what making a
record of it and asking that costs. What is in any way unusual becomes a record.
"""

from __future__ import annotations

import re
from datetime import datetime
from itertools import compress
from operator import itemgetter
from typing import Any, Final

import orjson

from sidecar.model.call_group import TOKEN_FIELDS, CallGroup, CallKind, Gathering, groups_of
from sidecar.model.record import Record

KINDS_MAX: Final = 2_000  # remembered, each with a record: 10 MB

_call: Final = itemgetter(
    "id", "started_at", "request_bytes", "response_bytes", "subscriber", "dimensions", "usage", "cost",
    "first_byte_ms", "parent_id", "status", "outcome", "method", "route",
)  # fmt: skip
_of_usage: Final = itemgetter("usage_state", "provider", "operation", "streamed", "model", "request_model")
_TOKENS: Final = frozenset(TOKEN_FIELDS)
# An amount of money of which nothing is behind the twelfth place; how `sidecar.prices` writes all of them.
_AMOUNT: Final = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,12}))?")
_PLACES: Final = 12
_HOUR_CHARS: Final = len("2026-11-29T09")
_SHAPES_MAX: Final = 1_000  # of usage objects: there are some ten


class _OddError(Exception):
    """To be looked at as a record."""


class CallLines:
    """What lines hold. `add` them, then `take` what they are."""

    def __init__(self) -> None:
        self._kinds: dict[tuple[object, ...], CallKind] = {}
        self._shapes: dict[tuple[str, ...], tuple[tuple[str, ...], Any]] = {}
        self._tallied: dict[tuple[object, ...], Gathering] = {}
        self._records: list[Record] = []

    def add(self, line: bytes) -> str | None:
        """The record's id; None: the line is no record, and is not counted."""
        try:
            return self._tally(line, orjson.loads(line))
        except (_OddError, KeyError, TypeError, AttributeError, ValueError):
            pass
        try:
            record = Record.from_json(line)
        except ValueError:
            return None
        self._records.append(record)
        return record.id

    def take(self) -> tuple[list[Record], list[CallGroup]]:
        """All that was added since the last time: what is to be looked at one by one, and all others."""
        tallied, records = self._tallied, self._records
        self._tallied, self._records = {}, []
        return records, groups_of(tallied.values())

    # One way, and long: each step that were a function of its own would cost each line what calling it does.
    def _tally(self, line: bytes, row: dict[str, Any]) -> str:
        (
            id_,
            started_at,
            request_bytes,
            response_bytes,
            subscriber,
            dimensions,
            usage,
            cost,
            first_byte_ms,
            parent_id,
            status,
            outcome,
            method,
            route,
        ) = _call(row)
        pico, reason = None, None
        if cost is not None:
            total = cost["total"]
            if total is None:
                reason = cost.get("reason") or ""
            elif cost["currency"] == "USD":
                amount = _AMOUNT.fullmatch(total)
                if amount is None:
                    raise _OddError
                whole, places = amount.groups("")
                pico = int(whole + places.ljust(_PLACES, "0"))
        asked = counts = None
        names: tuple[str, ...] = ()
        if usage is not None:
            if usage.get("units") or (cost is None and usage.get("cost_usd") is not None):
                raise _OddError
            asked = _of_usage(usage)
            shape = tuple(usage)
            found = self._shapes.get(shape)
            if found is None:
                found = self._learn(shape)
            names, get = found
            counts = get(usage)
        if started_at[-1] != "Z" or type(id_) is not str:
            raise _OddError
        hour_text = started_at[:_HOUR_CHARS]
        key = (
            hour_text,
            status,
            outcome,
            method,
            route,
            None if subscriber is None else subscriber["id"],
            tuple(dimensions.items()) if dimensions else None,
            row.get("upstream"),
            asked,
            first_byte_ms is None,
            parent_id is None,
            reason,
        )
        there = self._tallied.get(key)
        if there is None:
            there = self._begin(key, line, hour_text)
        there.lines.append(line)
        there.sizes.append((request_bytes, response_bytes))
        if counts is not None:
            there.counts[names].append(counts)
        if pico is not None:
            there.picos.append(pico)
        elif reason is not None:
            there.unpriced += 1
        return id_

    def _begin(self, key: tuple[object, ...], line: bytes, hour_text: str) -> Gathering:
        """The first call of its kind in this hour since the last `take`. Raises `ValueError` where it is no record."""
        kind = self._kinds.get(key[1:])
        if kind is None:
            if len(self._kinds) >= KINDS_MAX:
                self._kinds.clear()
            kind = CallKind(line)
            _ = kind.example
            self._kinds[key[1:]] = kind
        hour = int(datetime.fromisoformat(f"{hour_text}:00Z").timestamp())
        tallied = self._tallied[key] = Gathering(kind, hour)
        return tallied

    def _learn(self, shape: tuple[str, ...]) -> tuple[tuple[str, ...], Any]:
        """Which members of usage objects with these ones are counts of tokens, and what reads them."""
        names = tuple(compress(shape, map(_TOKENS.__contains__, shape)))
        if len(names) < 2:  # `itemgetter` gives no tuple then
            raise _OddError
        if len(self._shapes) >= _SHAPES_MAX:
            self._shapes.clear()
        found = self._shapes[shape] = names, itemgetter(*names)
        return found
