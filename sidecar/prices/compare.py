"""What two tables of prices have otherwise: before a file is set, and when another one takes its place.

The standard prices of a day are compared, model by model; terms of service (batch, priority, …) follow them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from sidecar.prices.rates import PICO, UNITS
from sidecar.prices.table import Table, prices_at

DIGITS_MAX: Final = 40  # behind the point; the longest price has 18


@dataclass(frozen=True, slots=True)
class Difference:
    """One price that is another one: `before`, `after` as text for the unit's usual number; None: there is none."""

    provider: str
    model: str
    unit: str
    before: str | None
    after: str | None


def differences(now: Table | None, then: Table | None, day: str) -> Iterator[Difference]:
    """All of a day (ISO 8601, UTC), in the order of providers and models."""
    ours, theirs = _standard(now, day), _standard(then, day)
    for key in sorted(ours.keys() | theirs.keys()):
        before, after = ours.get(key, {}), theirs.get(key, {})
        for unit in sorted(before.keys() | after.keys()):
            if before.get(unit) != after.get(unit):
                yield Difference(*key, unit, before.get(unit), after.get(unit))


def _standard(table: Table | None, day: str) -> dict[tuple[str, str], dict[str, str]]:
    """Each model's prices as text, tiers behind their base."""
    made: dict[tuple[str, str], dict[str, str]] = {}
    for provider in () if table is None else table.providers.values():
        for model in provider.models:
            prices, _ = prices_at(model, day, 0.0, {})
            made[provider.id, str(model["id"])] = {
                UNITS[name].part: " ".join(
                    [money(base, UNITS[name].per), *(f"{money(p, UNITS[name].per)}>{above}" for above, p in tiers)]
                )
                for name, (base, tiers) in prices.items()
            }
    return made


def money(price: Fraction, per: int) -> str:
    """A price in pico-units for one, as the amount for `per`."""
    return decimal_text(price * per / PICO)


def decimal_text(amount: Fraction) -> str:
    """A fraction that is a decimal, as one: every price was written as such."""
    digits = 0
    while amount.denominator != 1 and digits < DIGITS_MAX:
        amount, digits = amount * 10, digits + 1
    text = str(round(amount)).rjust(digits + 1, "0")
    return f"{text[:-digits]}.{text[-digits:]}" if digits else text
