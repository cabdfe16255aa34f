"""What a call cost (`cost`), and what the customer pays for it (`charge`).

`price_book(settings)` reads the tables once and gives a `PriceBook`, which does no I/O afterwards; new prices are a new
book. See docs/prices.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from sidecar.meters.definition import Meter, MetersError, read_meters
from sidecar.prices.book import PriceBook
from sidecar.prices.compare import Difference, differences
from sidecar.prices.custom import USD, CustomPrice, PricesError, Side, charged_in, read_prices
from sidecar.prices.entry import Cost, Priced
from sidecar.prices.facts import PROVIDERS
from sidecar.prices.rates import PICO, amount_text
from sidecar.prices.table import Table, TableError, builtin, load
from sidecar.settings import Settings

__all__ = [
    "PICO",
    "USD",
    "Cost",
    "CustomPrice",
    "Difference",
    "PriceBook",
    "Priced",
    "PricesError",
    "Side",
    "Table",
    "TableError",
    "amount_text",
    "differences",
    "faults",
    "notes",
    "price_book",
    "table_of",
]

BUILTIN: Final = "builtin"
NONE: Final = "none"


def table_of(name: str, given: bytes | OSError | None = None) -> Table | None:
    """The table that `SIDECAR_PRICES` names. Raises `TableError`. `given`: as for `load`."""
    word = name.strip()
    if word.lower() == NONE:
        return None
    return builtin() if word.lower() == BUILTIN else load(Path(word), given)


def price_book(settings: Settings) -> PriceBook:
    """The prices as set. Raises `PricesError` with every fault of the file and of every `[[prices]]`."""
    table, own, problems = _read(settings)
    if problems:
        raise PricesError(problems)
    return PriceBook(table, own, declared_first=settings.prices.cost == "declared")


def faults(settings: Settings, providers: Collection[str] | None = None) -> list[str]:
    """What is wrong with the prices, for `check` and the start. `providers`: every one that a record can name; None: a
    price may be of any."""
    return _read(settings, providers)[2]


def notes(settings: Settings) -> list[str]:
    """What is no fault of the prices and still worth knowing."""
    currencies = charged_in(_read(settings)[1])
    if len(currencies) < 2:
        return []
    return [f"charges are in {' and '.join(sorted(currencies))}: a meter of charge adds them up as they are"]


def _read(
    settings: Settings, providers: Collection[str] | None = None
) -> tuple[Table | None, Sequence[CustomPrice], list[str]]:
    problems: list[str] = []
    table: Table | None = None
    own: Sequence[CustomPrice] = ()
    try:
        table = table_of(settings.prices.prices, settings.price_file)
    except TableError as error:
        problems.append(f"SIDECAR_PRICES={error}")
        providers = None  # it may have more of them
    meters: Sequence[Meter] | None = None
    try:
        meters = read_meters(settings.meters)
    except MetersError:
        pass  # said by the meters; which of them have a price cannot be judged
    words: Collection[str] | None = None
    if providers is not None:
        words = {
            word.lower() for word in (*providers, *PROVIDERS.values(), *(() if table is None else table.providers))
        }
    try:
        own = read_prices(settings.price_tables, meters, words)
    except PricesError as error:
        problems += error.problems
    return table, own, problems
