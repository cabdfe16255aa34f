"""Show what a model costs, and what another table of prices would change.

`show` says by which entry a model is priced, at any date, with the prices of one's own that go before it; `diff` lists
what a file, genai-prices' data (v2) or LiteLLM's, has otherwise than the table in force, before it is set.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from sidecar.cli.output import Format, amount, render
from sidecar.cli.shared import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    CommandError,
    add_data_dir,
    add_format,
    moment,
    read_settings,
)
from sidecar.prices import PriceBook, PricesError, Side, Table, TableError, price_book, table_of
from sidecar.prices.compare import decimal_text, differences, money
from sidecar.prices.rates import UNITS, Price
from sidecar.prices.table import Found, Model, load, prices_at
from sidecar.runtime.reports.formats import visible
from sidecar.settings import Settings

_SHOWN: Final = ("provider", "model", "unit", "price", "per", "above", "terms", "match", "source")
_DIFF: Final = ("provider", "model", "unit", "now", "then")
STANDARD: Final = "standard"


def add(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to do", metavar="KIND", required=True)
    shown = _kind(kinds, "show", "show the prices of a model", _show)
    shown.add_argument("model", metavar="MODEL", help="as a request or a response has it; vendor/model too")
    shown.add_argument("--provider", metavar="NAME", help="only of this one; else of all who have the model")
    shown.add_argument("--at", metavar="DATE", type=moment, help="a date and time (UTC), or an age; now if not said")
    add_format(shown, "table", "json", "csv")
    compared = _kind(kinds, "diff", "what a file of prices has otherwise than the table in force", _diff)
    compared.add_argument("file", metavar="FILE", help="genai-prices' data (v2) or LiteLLM's")
    add_format(compared, "table", "json", "csv")


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.prices_run(arguments, read_settings(arguments))
    return code


def _kind(
    kinds: Any, name: str, text: str, do: Callable[[argparse.Namespace, Settings], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    add_data_dir(parser)
    parser.set_defaults(prices_run=do)
    return parser


def _show(arguments: argparse.Namespace, settings: Settings) -> int:
    try:
        book = price_book(settings)
    except PricesError as error:
        raise CommandError("\n  ".join(["the prices cannot be used:", *error.problems]), EXIT_USAGE) from None
    at = arguments.at or datetime.now(UTC)
    if arguments.provider is not None and not _known(book, arguments.provider):
        raise CommandError(f"{visible(arguments.provider)} is no provider that has a price", EXIT_USAGE)
    rows = [*_own_rows(book, arguments, at), *_table_rows(book, arguments, at)]
    if not any("price" in row for row in rows):  # a multiple of nothing is none
        model = visible(arguments.model)
        print(f"no price for {model}: its calls are unpriced; [[prices]] in the TOML file can give it one")
        return EXIT_FAILED
    print(render(rows, _SHOWN, Format(arguments.format), spare=("source", "match"), whole=("unit", "price")), end="")
    return EXIT_OK


def _known(book: PriceBook, provider: str) -> bool:
    return any(p.provider in (provider.lower(), "*") for p in book.own) or (
        book.table is not None and book.table.by_word(book.word(provider)) is not None
    )


def _own_rows(book: PriceBook, arguments: argparse.Namespace, at: datetime) -> Iterator[dict[str, Any]]:
    name, day = arguments.model.lower(), at.date().isoformat()
    for own in book.own:
        asked = arguments.provider and arguments.provider.lower()
        words = (own.provider or "*",) if asked is None else (asked, book.word(asked))
        if own.meter is not None or not own.holds(words, name, day):
            continue
        head = {"provider": own.provider, "model": own.model, "match": "own", "terms": _side(own.side)}
        if not own.prices:
            of = "the table's price" if own.side is Side.PROVIDER else "the cost"
            yield head | {"unit": f"times {decimal_text(own.markup)} of {of}", "source": "[[prices]]"}
        source = {"source": f"[[prices]] {own.currency}"}
        yield from (head | row | source for row in _rows(own.prices))
        for terms, factor in own.multipliers.items() if own.side is Side.PROVIDER else ():
            prices = {
                unit: (base * factor, tuple((above, price * factor) for above, price in tiers))
                for unit, (base, tiers) in own.prices.items()
            }
            yield from (head | row | source | {"terms": terms} for row in _rows(prices))
        if own.minimum:
            yield head | {"unit": "minimum", "price": money(Fraction(own.minimum), 1), "per": 1} | source


def _side(side: Side) -> str:
    return STANDARD if side is Side.PROVIDER else "customer"


def _table_rows(book: PriceBook, arguments: argparse.Namespace, at: datetime) -> Iterator[dict[str, Any]]:
    table = book.table
    if table is None:
        return
    second = (at - at.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()
    for found, match in _found(book, table, arguments.model, arguments.provider):
        standard, _ = prices_at(found.model, at.date().isoformat(), second, {})
        head = {"provider": found.provider, "model": found.name, "match": match, "source": table.source}
        yield from (head | row | {"terms": STANDARD} for row in _rows(standard))
        for terms in () if found.borrowed else _terms(found.model):
            prices, unspoken = prices_at(found.model, at.date().isoformat(), second, terms)
            if unspoken:
                continue  # not in force at that time
            other = {unit: price for unit, price in prices.items() if price != standard.get(unit)}
            said = " ".join(f"{key}={value}" for key, value in terms.items())
            yield from (head | row | {"terms": said} for row in _rows(other))


def _found(book: PriceBook, table: Table, name: str, provider: str | None) -> Iterator[tuple[Found, str]]:
    asked = None if provider is None else table.by_word(book.word(provider))
    if provider is not None and asked is None:
        return
    for each in table.providers.values() if asked is None else [asked]:
        found = table.find(each, name)
        if found is not None and (asked is not None or not (found.near or found.borrowed)):
            yield found, "near" if found.near else "exact"
    vendor, slash, rest = name.partition("/")
    if slash and asked is None and (maker := table.by_word(vendor)) is not None:
        found = table.find(maker, rest)
        if found is not None:
            yield found, "gateway"


def _terms(model: Model) -> Iterable[Mapping[str, str]]:
    return {tuple(row["when"].items()): row["when"] for row in model.get("price_variants") or ()}.values()


def _rows(prices: Mapping[str, Price]) -> Iterator[dict[str, Any]]:
    for unit, (base, tiers) in prices.items():
        per = UNITS[unit].per
        for above, price in ((None, base), *tiers):
            yield {"unit": UNITS[unit].part, "price": money(price, per), "per": per, "above": above}


def _diff(arguments: argparse.Namespace, settings: Settings) -> int:
    try:
        now, then = table_of(settings.prices.prices, settings.price_file), load(Path(arguments.file))
    except TableError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    day = datetime.now(UTC).date().isoformat()
    rows = [
        {"provider": each.provider, "model": each.model, "unit": each.unit, "now": each.before, "then": each.after}
        for each in differences(now, then, day)
    ]
    form = Format(arguments.format)
    if form is Format.TABLE:
        if rows:
            print(render(rows, _DIFF, form, whole=("now", "then")), end="")
        before = "no table" if now is None else now.source
        print(f"{amount(len(rows), 'price differs', 'prices differ')} between {before} (now) and {then.source} (then)")
    else:
        print(render(rows, _DIFF, form, whole=("now", "then")), end="")
    return EXIT_OK
