"""Our evaluator against the library whose data the table is made from: the same entry, and the same sum to the last
pico-USD, for every model, random usages, times and tiers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Context, Decimal
from pathlib import Path
from typing import Any, Final

import pytest

from sidecar.prices import convert
from sidecar.prices.rates import UNITS, Rates, amount_text
from sidecar.prices.table import TABLE_FILE, Table, builtin, prices_at

genai = pytest.importorskip("genai_prices", reason="genai-prices is not installed: `make test` installs it")

from genai_prices.data import providers as PROVIDERS  # noqa: E402
from genai_prices.data_units import unit_data  # noqa: E402

WIDE: Final = Context(prec=60, rounding=ROUND_HALF_EVEN)
EDGES: Final = (0, 1, 31_999, 32_000, 32_001, 128_000, 128_001, 199_999, 200_000, 200_001, 272_000, 272_001, 1_000_000)
CONTEXTS: Final[tuple[dict[str, str], ...]] = (
    {},
    {"processing": "batch"},
    {"service_tier": "flex"},
    {"service_tier": "priority"},
    {"service_tier": "default"},
    {"service_tier": "fast", "processing": "batch"},
    {"speed": "fast"},
    {"service_tier": "no such tier"},
)


@pytest.fixture(scope="module")
def table() -> Table:
    return builtin()


def test_the_table_of_the_wheel_is_what_the_package_has() -> None:
    installed = convert.table()
    shipped = builtin()
    if not installed.startswith(b'{"source":"' + shipped.source.encode()):
        pytest.skip(f"another edition is installed than {shipped.source}: `make prices` takes it over")
    assert installed == (Path(convert.__file__).parent / TABLE_FILE).read_bytes()


def test_the_units_are_the_package_s() -> None:
    theirs = {
        name: (row["price_key"], row["per"], frozenset(row["dimensions"].items())) for name, row in unit_data.items()
    }
    assert {unit.name: (unit.price_key, unit.per, unit.dimensions) for unit in UNITS.values()} == theirs


def usage(pick: random.Random, prices: set[str]) -> dict[str, int]:
    """Counts that do not contradict each other, over what this model has a price for."""
    size = pick.choice((10, 3_000, 150_000, 1_200_000))
    counts: dict[str, int] = {}
    for name in sorted(prices, key=lambda each: -len(UNITS[each].dimensions)):
        if name == "requests":
            continue
        # A whole is at least the sum of its parts, each counted once.
        inside = sum(own for part, own in list(counts.items()) if UNITS[name].holds(UNITS[part]))
        counts[name] = pick.choice((0, pick.randrange(size)))
        if inside:
            counts[name] += sum(leaf(counts, part) for part in counts if UNITS[name].holds(UNITS[part]))
    if "input_tokens" in counts and pick.random() < 0.3:
        counts["input_tokens"] = max(counts["input_tokens"], pick.choice(EDGES))
    return counts


def leaf(counts: dict[str, int], name: str) -> int:
    """What is counted in this unit and in none of its parts."""
    return counts[name] - sum(leaf(counts, part) for part in counts if UNITS[name].holds(UNITS[part]))


def moments(pick: random.Random) -> Iterator[datetime]:
    while True:
        yield datetime(2025, 1, 1, tzinfo=UTC) + timedelta(seconds=pick.randrange(int(2.2 * 365 * 86_400)))


def compare(table: Table, rounds: int, seed: int) -> int:
    compared = 0
    for provider in PROVIDERS:
        for model in provider.models:
            pick = random.Random(f"{seed} {provider.id} {model.id}")
            entry = next(m for m in table.providers[provider.id].models if m["id"] == model.id)
            when = moments(pick)
            for _ in range(rounds):
                at, context = next(when), pick.choice(CONTEXTS)
                compared += one(table, provider, model, entry, at, context, pick)
    return compared


def one(table: Table, provider: Any, model: Any, entry: Any, at: datetime, context: Any, pick: random.Random) -> int:
    second = (at - at.replace(hour=0, minute=0, second=0, microsecond=0)).total_seconds()
    prices, _ = prices_at(entry, at.date().isoformat(), second, context)
    counts = usage(pick, set(prices))
    theirs = model.calc_price(
        genai.Usage(**counts), provider, genai_request_timestamp=at, price_context=dict(context)
    ).total_price
    ours = Rates(prices, seconds_least=entry.get("seconds_least", 0)).sum(counts)
    assert Decimal(amount_text(ours.total)) == WIDE.quantize(theirs, Decimal("1e-12")), (
        entry["id"],
        at,
        context,
        counts,
    )
    assert sum(ours.parts.values()) == ours.total
    assert not ours.odd, (entry["id"], counts)
    return 1


def test_every_model_costs_what_the_package_says(table: Table) -> None:
    """Two usages for each of all models; `make fuzz` does fifty."""
    assert compare(table, 2, random.SystemRandom().randrange(1 << 30)) > 4_000


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fuzz_fifty_usages_of_every_model(table: Table) -> None:
    assert compare(table, 50, 1) > 100_000


def test_names_find_the_same_entry(table: Table) -> None:
    """Every name in the data, in several spellings, and some of nobody."""
    from genai_prices.data_snapshot import get_snapshot

    snapshot = get_snapshot()
    tried = 0
    for provider in PROVIDERS:
        ours = table.providers[provider.id]
        for model in (*provider.models, None):
            base = "no-such-model-1" if model is None else model.id
            for name in (base, base.upper(), f"{base}-20251211", f"x{base}", f"{base}-fancy", f"ft:{base}:acme::abc"):
                theirs = provider.find_model(name, all_providers=snapshot.providers)
                found = table.find(ours, name)
                assert (None if theirs is None else theirs.id) == (None if found is None else found.name), name
                tried += 1
    assert tried > 10_000
