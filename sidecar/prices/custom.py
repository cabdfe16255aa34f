"""Prices of one's own: `[[prices]]` of the TOML file.

    [[prices]]
    provider = "openai"            # the record's word or the table's; "*": any
    model = "gpt-5*"               # * stands for any text
    input = "1.10"                 # amounts are text or whole numbers: a float is not what was written
    output = "8.80"
    cache_read = "0.11"
    from = 2026-01-01              # a day in UTC; until the next `from` of the same provider and model, or `until`
    per = 1_000_000
    currency = "USD"
    tiers = [{ above = 200_000, input = "2.20", output = "13.20" }]     # the whole request, by its input
    multipliers = { batch = "0.5", priority = "2" }
    minimum = "0.0001"             # a call costs at least
    for = "provider"               # what the provider takes (the record's `cost`); "customer": its `charge`

    [[prices]]
    for = "customer"
    provider = "*"
    model = "*"
    markup = "1.2"                 # without amounts: of the cost; for the provider: of the table's price

    [[prices]]
    for = "customer"
    meter = "api_calls"            # the price of a meter: `unit` for `per` (1) of it
    unit = "0.002"

Of several that match, the most specific holds. Every fault of every entry is found at once and named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from difflib import get_close_matches
from enum import StrEnum
from fractions import Fraction
from itertools import pairwise
from typing import Any, Final

from sidecar.meters.definition import Kind, Meter
from sidecar.prices.facts import PROVIDERS
from sidecar.prices.rates import FIVE, PICO, Price, pico
from sidecar.prices.table import amount

ENTRIES_MAX: Final = 1000  # each is looked at once for a model and a day; no price list known to us has more
TIERS_MAX: Final = 10
PER_MAX: Final = 10**12
CURRENCY: Final = re.compile(r"[A-Z]{3}")
USD: Final = "USD"
FROM_EVER: Final = "0000-00-00"
FOR_EVER: Final = "9999-99-99"

# What an entry may price by the token, and the unit that each price is for.
AMOUNTS: Final[Mapping[str, str]] = {
    "input": FIVE[0],
    "output": FIVE[1],
    "cache_read": FIVE[2],
    "cache_write_5m": FIVE[3],  # and those of which the life is not told
    "cache_write_1h": FIVE[4],
    "audio_input": "input_audio_tokens",
    "audio_output": "output_audio_tokens",
    "image_input": "input_image_tokens",
    "image_output": "output_image_tokens",
    "reasoning": "output_reasoning_tokens",
}
CONTEXTS: Final = ("batch", "flex", "priority", "fast")
_FOR_MODELS: Final = ("provider", "model", "tiers", "multipliers", "markup", "minimum", *AMOUNTS)
_COMMON: Final = ("for", "from", "until", "currency", "per")


class Side(StrEnum):
    PROVIDER = "provider"  # what the provider takes: `cost`
    CUSTOMER = "customer"  # what the customer pays: `charge`


class PricesError(ValueError):
    """The prices cannot be used. `problems` has every fault."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomPrice:
    """One entry, checked. Amounts are pico-units of the currency for one token (or one of the meter)."""

    side: Side
    provider: str | None = None  # lower case; None: of a meter
    model: str | None = None
    meter: Meter | None = None
    unit: Fraction = Fraction(0)
    start: str = FROM_EVER  # ISO dates, UTC: from this day on,
    until: str = FOR_EVER  # up to the day before this one
    currency: str = USD
    prices: Mapping[str, Price] = field(default_factory=dict)  # empty: `markup` of what else would hold
    markup: Fraction = Fraction(1)
    minimum: int = 0
    multipliers: Mapping[str, Fraction] = field(default_factory=dict)

    def holds(self, providers: Iterable[str], model: str, day: str) -> bool:
        return (
            self.start <= day < self.until
            and (self.provider in ("*", *providers))
            and _glob(self.model or "*").fullmatch(model) is not None
        )

    @property
    def rank(self) -> tuple[bool, int, bool, bool, str]:
        """The most specific is the greatest: a whole name, then the longest pattern, then a named provider, the
        record's word for it before the table's, which may stand for several."""
        model, provider = self.model or "*", self.provider or "*"
        return "*" not in model, len(model.replace("*", "")), provider != "*", provider in PROVIDERS, self.start

    @property
    def name(self) -> str:
        return f"meter {self.meter.name}" if self.meter is not None else f"{self.provider} {self.model}"


def read_prices(
    tables: Sequence[Mapping[str, Any]], meters: Sequence[Meter] | None, providers: Collection[str] | None = None
) -> tuple[CustomPrice, ...]:
    """Entries from TOML. Raises `PricesError` with every fault.

    `meters`: None: which there are cannot be told; prices of meters are left out then. `providers`: every word in lower
    case that a call's provider may have; None: any may.
    """
    problems: list[str] = []
    if len(tables) > ENTRIES_MAX:
        problems.append(f"prices: {len(tables)} are defined, at most {ENTRIES_MAX} are taken")
    found: list[CustomPrice] = []
    claimed: list[CustomPrice] = []  # with those in whose amounts something is wrong: they say what they are for
    known = None if meters is None else {meter.name: meter for meter in meters}
    for number, table in enumerate(tables[:ENTRIES_MAX], 1):
        reading = _Reading(table, number, known, providers)
        price = reading.price()
        problems += reading.problems
        if reading.is_told:
            claimed.append(price)
        if not reading.problems and (price.meter is not None or price.model is not None):
            found.append(price)
    problems += [*_overlapping(claimed), *_of_two_currencies(found)]
    if problems:
        raise PricesError(problems)
    return tuple(_ended(found))


def _overlapping(prices: Sequence[CustomPrice]) -> list[str]:
    """Days that two entries claim for the same."""
    problems: list[str] = []
    for same in _groups(prices):
        for one, other in pairwise(same):
            if one.start == other.start:
                when = "" if one.start == FROM_EVER else f" from {one.start}"
                problems.append(f"prices {one.name} for the {one.side}: stands there twice{when}")
            elif one.until != FOR_EVER and one.until > other.start:
                problems.append(
                    f"prices {one.name} for the {one.side}: the one until {one.until} and the one from {other.start} "
                    "overlap"
                )
    return problems


def _of_two_currencies(prices: Sequence[CustomPrice]) -> list[str]:
    """Sums of amounts that cannot be added up."""
    problems: list[str] = []
    added = {Side.PROVIDER: _stated(prices, Side.PROVIDER) | {USD}, Side.CUSTOMER: charged_in(prices)}
    for side, currencies in added.items():
        if any(p.side is side and p.meter is not None for p in prices) and len(currencies) > 1:
            problems.append(
                f"prices for the {side}: a meter's price is added to the model's, and these are in "
                f"{' and '.join(sorted(currencies))}: expected one currency"
            )
    return problems


def charged_in(prices: Sequence[CustomPrice]) -> set[str]:
    """The currencies of what customers are charged: as stated, and those of the costs that it is a multiple of."""
    found = _stated(prices, Side.CUSTOMER)
    if any(p.side is Side.CUSTOMER and not p.prices and p.meter is None for p in prices):
        found |= _stated(prices, Side.PROVIDER) | {USD}
    return found


def _stated(prices: Sequence[CustomPrice], side: Side) -> set[str]:
    return {p.currency for p in prices if p.side is side and (p.prices or p.meter is not None)}


def _ended(prices: Sequence[CustomPrice]) -> Iterable[CustomPrice]:
    """An entry without `until` holds until the next one of the same begins."""
    for same in _groups(prices):
        for one, other in zip(same, [*same[1:], None], strict=True):
            yield one if other is None or one.until != FOR_EVER else replace(one, until=other.start)


def _groups(prices: Sequence[CustomPrice]) -> list[list[CustomPrice]]:
    groups: dict[tuple[Side, str], list[CustomPrice]] = {}
    for price in prices:
        groups.setdefault((price.side, price.name), []).append(price)
    return [sorted(group, key=lambda price: price.start) for group in groups.values()]


class _Reading:
    """One table on its way to a price. Keys are taken out, so that what remains is unknown."""

    def __init__(
        self,
        table: Mapping[str, Any],
        number: int,
        meters: Mapping[str, Meter] | None,
        providers: Collection[str] | None,
    ) -> None:
        self.left = dict(table)
        self.meters = meters
        self.providers = providers
        self.is_told = False  # what it is for, and when
        self.problems: list[str] = []
        said = [table[key] for key in ("provider", "model", "meter") if isinstance(table.get(key), str)]
        self.label = f"prices number {number}" + (f" ({' '.join(said)})" if said else "")

    def price(self) -> CustomPrice:
        """Of no meaning where there are problems, but for what it is for where that `is_told`."""
        side = self.left.pop("for", Side.PROVIDER)
        if side not in set(Side):
            self._wrong(f"for is wrong: expected {' or '.join(Side)}")
            side = Side.PROVIDER
        common: dict[str, Any] = {"side": Side(side), **self._days()}
        of_meter = "meter" in self.left
        common |= {"meter": self._meter()} if of_meter else self._words()
        self.is_told = not self.problems and (not of_meter or common["meter"] is not None)
        made = self._of_meter() if of_meter else self._of_model(Side(side))
        known = (*_COMMON, *(("meter", "unit") if of_meter else _FOR_MODELS))
        for key in self.left:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else f" ({', '.join(known)})"
            self._wrong(f"{key!r} is no field of a {'meter' if of_meter else 'model'}'s price{hint}")
        return CustomPrice(**common, **made)

    def _wrong(self, what: str) -> None:
        self.problems.append(f"{self.label}: {what}")

    def _meter(self) -> Meter | None:
        name = self.left.pop("meter")
        if self.meters is None:
            return None
        meter = self.meters.get(name) if isinstance(name, str) else None
        if meter is None:
            self._wrong(f"there is no meter {name!r}; there are {', '.join(self.meters)}")
        elif meter.kind not in (Kind.COUNT, Kind.SUM):
            self._wrong(f"{name} is a {meter.kind}: only what COUNT and SUM add for one call has a price")
        return meter

    def _of_meter(self) -> dict[str, Any]:
        per = self._whole("per", 1)
        currency = self._currency()
        unit = self._amount("unit", self.left.pop("unit", None))
        return {"unit": pico(Fraction(unit or 0), per), "currency": currency}

    def _words(self) -> dict[str, Any]:
        provider = self._word("provider", 'expected the record\'s word for it, such as "openai", or "*" for any')
        if self.providers is not None and provider != "*" and provider not in self.providers:
            near = get_close_matches(provider, self.providers, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            self._wrong(f"provider {provider!r} is unknown here: no call would ever have this price{hint}")
        return {
            "provider": provider,
            "model": self._word("model", 'expected a name, in which * stands for any text; "*" for all'),
        }

    def _of_model(self, side: Side) -> dict[str, Any]:
        made: dict[str, Any] = {}
        per = self._whole("per", 1_000_000)
        base = {key: self._amount(key, self.left.pop(key)) for key in AMOUNTS if key in self.left}
        markup = self._amount("markup", self.left.pop("markup")) if "markup" in self.left else None
        minimum = self._amount("minimum", self.left.pop("minimum")) if "minimum" in self.left else None
        factor = Fraction(1 if markup is None else markup)
        if not base:
            if markup is None:
                self._wrong(f"has no price: expected one of {', '.join(AMOUNTS)}, or a markup")
            for key in ("currency", "tiers", "multipliers", "per"):
                if self.left.pop(key, None) is not None:
                    what = "the table's price" if side is Side.PROVIDER else "the cost"
                    self._wrong(f"{key} has no meaning where only a markup is given: it is {what} that is multiplied")
        elif "cache_write_1h" in base and "cache_write_5m" not in base:
            self._wrong("cache_write_5m is missing beside cache_write_1h")
        made["currency"] = self._currency()
        tiers = self._tiers(base)
        made["multipliers"] = self._multipliers()
        made["markup"] = factor
        made["minimum"] = round(Fraction(minimum or 0) * PICO)
        made["prices"] = {
            AMOUNTS[key]: (
                pico(Fraction(value), per) * factor,
                tuple((above, pico(Fraction(row[key]), per) * factor) for above, row in tiers if key in row),
            )
            for key, value in base.items()
            if value is not None
        }
        return made

    def _tiers(self, base: Mapping[str, Any]) -> list[tuple[int, dict[str, str]]]:
        tables = self.left.pop("tiers", [])
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            self._wrong('tiers is wrong: expected a list such as [{ above = 200_000, input = "2.20" }]')
            return []
        if len(tables) > TIERS_MAX:
            self._wrong(f"tiers: {len(tables)} are defined, at most {TIERS_MAX} are taken")
        found: dict[int, dict[str, str]] = {}
        for table in tables:
            left = dict(table)
            above = left.pop("above", None)
            if type(above) is not int or not 0 < above <= PER_MAX:
                self._wrong(f"tiers above is {'missing' if above is None else 'wrong'}: expected a number of tokens")
                continue
            if above in found:
                self._wrong(f"tiers: two begin above {above}")
            for key in left.keys() - base.keys():
                self._wrong(f"tiers {key!r} has no base price beside it")
            amounts = {key: self._amount(f"tiers {key}", value) for key, value in left.items() if key in base}
            found[above] = {key: value for key, value in amounts.items() if value is not None}
        return sorted(found.items())

    def _multipliers(self) -> dict[str, Fraction]:
        table = self.left.pop("multipliers", {})
        if not isinstance(table, dict):
            self._wrong('multipliers is wrong: expected a table such as { batch = "0.5" }')
            return {}
        for key in table.keys() - set(CONTEXTS):
            self._wrong(f"multipliers {key!r} is none of {', '.join(CONTEXTS)}")
        amounts = {key: self._amount(f"multipliers {key}", value) for key, value in table.items()}
        return {key: Fraction(value) for key, value in amounts.items() if value is not None}

    def _days(self) -> dict[str, str]:
        start, until = self._day("from", FROM_EVER), self._day("until", FOR_EVER)
        if start >= until:
            self._wrong(f"until {until} is not after from {start}")
        return {"start": start, "until": until}

    def _day(self, key: str, default: str) -> str:
        value = self.left.pop(key, None)
        if value is None:
            return default
        try:
            if isinstance(value, str):
                return date.fromisoformat(value).isoformat()
            if isinstance(value, date) and not isinstance(value, datetime):
                return value.isoformat()
        except ValueError:
            pass
        self._wrong(f"{key} is wrong: expected a day such as 2026-01-01; it begins and ends in UTC")
        return default

    def _currency(self) -> str:
        value = self.left.pop("currency", USD)
        if not isinstance(value, str) or not CURRENCY.fullmatch(value):
            self._wrong('currency is wrong: expected three capital letters, such as "USD"')
            return USD
        return value

    def _word(self, key: str, expected: str) -> str:
        value = self.left.pop(key, None)
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            self._wrong(f"{key} is {'missing' if value is None else 'wrong'}: {expected}")
            return "*"
        return value.strip().lower()

    def _whole(self, key: str, default: int) -> int:
        value = self.left.pop(key, default)
        if type(value) is not int or not 1 <= value <= PER_MAX:
            self._wrong(f"{key} is wrong: expected a whole number, 1 to {PER_MAX}")
            return default
        return value

    def _amount(self, key: str, value: Any) -> str | None:
        if value is None:
            self._wrong(f'{key} is missing: expected an amount such as "0.25"')
            return None
        if isinstance(value, float):
            self._wrong(f'{key} = {value!r} is a float, which is not what was written: put it in quotes, "{value!r}"')
            return None
        try:
            return amount(value)
        except ValueError as error:
            self._wrong(f"{key} is wrong: {error}")
            return None


def _glob(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, pattern.split("*"))), re.DOTALL)
