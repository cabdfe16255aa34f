"""What was found for calls of one kind, and the cost of a call by it, as the record has it.

An `Entry` is looked up by the book and kept. `plain_cost` sums a call of tokens alone by it, which nearly all are; what
it does not take is summed the long way by the book, which gives the same.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sidecar.prices.custom import USD
from sidecar.prices.facts import Terms, terms_of
from sidecar.prices.rates import PICO, ZEROS, Five, Plain, Rates, amount_text

Cost = dict[str, Any]
"""The record's `cost` (or `charge`): currency, total, parts, state, source, model; and where there is one, `reason`
(why it is estimated or unpriced) and `declared` (what the provider itself says, in USD)."""
Priced = tuple[Cost | None, int | None]
"""A cost and its total in pico-units of its currency; None: it is not known. Both are None where there is nothing to
be priced."""

EXACT: Final = "exact"
ESTIMATED: Final = "estimated"
DECLARED: Final = "declared"
UNPRICED: Final = "unpriced"

SECONDS_A_DAY: Final = 86_400


@dataclass(slots=True, frozen=True)
class Entry:
    """What was found for calls of one kind. `rates` None: no price. Holds from `since_s` until before `until_s`."""

    rates: Rates | None
    model: str | None = None
    source: str = ""
    currency: str = USD
    state: str = EXACT
    reason: str | None = None
    plain: Plain | None = None  # of the rates, where nothing else is to be added
    states_cost: bool = False  # the provider says what it charges, and it is the table's price that is taken
    apart: tuple[str, ...] = ()  # fields of a usage that the provider prices apart, and the rates do not
    since_s: float = 0.0
    until_s: float = 0.0
    by_hour: ByHour | None = None  # which entry holds instead, at a time of the day
    by_raw: Callable[[Terms], Entry] | None = None  # likewise, where the vendor's usage object tells of other terms

    looks_further: bool = False  # either of these two is there

    def for_call(self, raw_usage: Any, started_s: float) -> Entry:
        """The entry that holds for this call."""
        entry = self
        if entry.by_raw is not None and (terms := terms_of(raw_usage)) is not None:
            entry = entry.by_raw(terms)
        return entry if entry.by_hour is None else entry.by_hour.at(started_s % SECONDS_A_DAY)


class ByHour:
    """The entries of a model whose price depends on the time of day: one for each span between two changes."""

    __slots__ = ("_changes", "_made", "_make")

    def __init__(self, changes: list[int], make: Callable[[float], Entry]) -> None:
        self._changes, self._make = changes, make
        self._made: dict[int, Entry] = {}

    def at(self, second: float) -> Entry:
        span = bisect_right(self._changes, second)
        entry = self._made.get(span)
        if entry is None:
            entry = self._made[span] = self._make(second)
        return entry


def plain_cost(
    entry: Entry,
    plain: Plain,
    read: int | None,
    written: int | None,
    cached: int | None,
    kept: int | None,
    short: int | None,
    long: int | None,
) -> Priced | None:
    """The cost of a call of tokens alone, whose model has prices for input, output and caches alone: nearly all of
    them. None: it is not so plain after all (counts that disagree, amounts of a whole unit and more), and goes the
    long way, which gives the same."""
    if read is None or written is None:
        return None
    prices, tiers = plain
    for above, of_tier in tiers:
        if read > above:
            prices = of_tier
    of_cached = 0
    if cached and (price := prices[2]) is not None:
        read -= cached
        of_cached = cached * price
    of_written = written * prices[1]
    total = of_written + of_cached
    writes: dict[str, str] | None = None
    if kept or short or long:
        found = _plain_writes(prices, kept or 0, short, long)
        if found is None:
            return None
        writes, of_writes = found
        read -= kept or 0
        total += of_writes
    of_read = read * prices[0]
    total += of_read
    if read < 0 or not 0 < total < PICO:  # amounts below one are written with their zeros at hand
        return None
    parts = {}
    if of_read:
        parts["input"] = ZEROS[len(text := str(of_read))] + text.rstrip("0")
    if of_written:
        parts["output"] = ZEROS[len(text := str(of_written))] + text.rstrip("0")
    if of_cached:
        parts["cache_read"] = ZEROS[len(text := str(of_cached))] + text.rstrip("0")
    if writes:
        parts.update(writes)
    cost: Cost = {
        "currency": entry.currency,
        "total": ZEROS[len(text := str(total))] + text.rstrip("0"),
        "parts": parts,
        "state": entry.state,
        "source": entry.source,
        "model": entry.model,
    }
    if entry.reason is not None:
        cost["reason"] = entry.reason
    return cost, total


def _plain_writes(prices: Five, kept: int, short: int | None, long: int | None) -> tuple[dict[str, str], int] | None:
    """Cache writes by their life: their parts, and what they cost."""
    told = short is not None or long is not None
    short, long = short or 0, long or 0
    if prices[3] is None or (told and short + long != kept) or (long and prices[4] is None):
        return None
    of_short, of_long = (kept - long) * prices[3], long * (prices[4] or 0)
    parts = {}
    if of_short:
        parts["cache_write_5m" if short else "cache_write"] = amount_text(of_short)
    if of_long:
        parts["cache_write_1h"] = amount_text(of_long)
    return parts, of_short + of_long


def cost_of(
    entry: Entry, parts: Mapping[str, int], total: int, state: str, reason: str | None, declared: int | None
) -> Cost:
    """Amounts are in pico-units of the entry's currency, `declared` in those of USD."""
    cost: Cost = {
        "currency": entry.currency,
        "total": amount_text(total),
        "parts": {name: amount_text(part) for name, part in parts.items()},
        "state": state,
        "source": entry.source,
        "model": entry.model,
    }
    if reason is not None:
        cost["reason"] = reason
    if declared is not None:
        cost["declared"] = amount_text(declared)
    return cost


def null_cost(entry: Entry, reason: str) -> Cost:
    """Of a call whose price is not known."""
    return {
        "currency": None,
        "total": None,
        "parts": None,
        "state": UNPRICED,
        "source": entry.source,
        "model": entry.model,
        "reason": reason,
    }
