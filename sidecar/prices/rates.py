"""From counts to money: what is counted (units), the prices in force for one call (rates), and the sum.

All arithmetic is in whole numbers of pico-USD (10⁻¹² of the currency's unit: exact for every price that is stated to
six decimals a million tokens, and 64 bits hold 9.2 million USD). Where a price has more digits than that, the call's
sum is rounded once, half to even, and its parts add up to it. No float is ever made.

Counts overlap: cached audio is inside audio and inside cache reads, and both are inside the input. Each token is priced
once, by the most specific unit that has a price; what a unit's parts do not take stays with the unit. A tier holds for
the whole request: the input with all that is cached in it decides, and the price of every token follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import lcm
from typing import Final

PICO: Final = 10**12
DECIMALS: Final = 12
ZEROS: Final = ["0." + "0" * (DECIMALS - digits) for digits in range(DECIMALS + 1)]  # before that many digits
Count = int | Fraction
Price = tuple[Fraction, tuple[tuple[int, Fraction], ...]]
"""Of one unit, in pico-USD: the base, and `(above, price)` of the tiers in rising order."""

INPUT: Final = "input_tokens"
REQUESTS: Final = "requests"


@dataclass(frozen=True, slots=True)
class Unit:
    """Something that is counted. A unit whose dimensions contain another's is a part of that other one."""

    name: str
    price_key: str  # the table's name for its price
    per: int  # how many of them that price is for
    dimensions: frozenset[tuple[str, str]]

    def holds(self, other: Unit) -> bool:
        return self.dimensions < other.dimensions

    @property
    def part(self) -> str:
        """Its name among the parts of a cost."""
        return self.name.removesuffix("_tokens")


def _token_units() -> Iterator[Unit]:
    for modality in ("", "text", "audio", "image", "video"):
        infix = f"{modality}_" if modality else ""
        for direction in ("input", "output"):
            base = {"family": "tokens", "direction": direction} | ({"modality": modality} if modality else {})
            kinds: dict[str, dict[str, str]] = {f"{direction}_{infix}tokens": {}}
            if direction == "input":
                kinds[f"cache_{infix}read_tokens"] = {"token_type": "cache_read"}
                kinds[f"cache_{infix}write_tokens"] = {"token_type": "cache_write"}
                for life in ("5m", "1h"):
                    kinds[f"cache_{infix}write_{life}_tokens"] = {"token_type": "cache_write", "cache_ttl": life}
                kinds[f"input_{infix}tool_tokens"] = {"token_type": "tool"}
            else:
                kinds[f"output_{infix}reasoning_tokens"] = {"token_type": "reasoning"}
                kinds[f"output_{infix}citation_tokens"] = {"token_type": "citation"}
            for name, more in kinds.items():
                price_key = name.removesuffix("_tokens") + "_mtok"
                yield Unit(name, price_key, 1_000_000, frozenset({**base, **more}.items()))


def _unit(name: str, price_key: str, per: int, **dimensions: str) -> Unit:
    return Unit(name, price_key, per, frozenset(dimensions.items()))


_OTHERS: Final = (
    _unit("input_characters", "input_mchars", 1_000_000, family="characters", direction="input"),
    _unit(
        "input_text_messages", "input_text_messages_kcount", 1000, family="messages", direction="input", modality="text"
    ),
    _unit("audio_seconds", "audio_hours", 3600, family="durations", modality="audio"),
    _unit(
        "input_audio_seconds", "input_audio_hours", 3600, family="durations", direction="input", modality="audio"
    ),
    _unit(
        "output_audio_seconds", "output_audio_hours", 3600, family="durations", direction="output", modality="audio"
    ),
    _unit("input_pixels", "input_gpixels", 10**9, family="pixels", direction="input"),
    _unit("input_document_pages", "input_document_kpages", 1000, family="document_pages", direction="input"),
    _unit(
        "input_annotated_document_pages", "input_annotated_document_kpages", 1000,
        family="document_pages", direction="input", page_type="annotated",
    ),
    _unit("rerank_searches", "rerank_searches_kcount", 1000, family="rerank"),
    _unit("web_searches", "web_searches_kcount", 1000, family="tool_calls", tool_type="web_search"),
    _unit("social_searches", "social_searches_kcount", 1000, family="tool_calls", tool_type="social_search"),
    _unit("storage_searches", "storage_searches_kcount", 1000, family="tool_calls", tool_type="storage_search"),
    _unit("code_executions", "code_executions_kcount", 1000, family="tool_calls", tool_type="code_execution"),
    _unit(REQUESTS, "requests_kcount", 1000, family="requests"),
)  # fmt: skip

UNITS: Final[Mapping[str, Unit]] = {unit.name: unit for unit in (*_token_units(), *_OTHERS)}
BY_PRICE_KEY: Final[Mapping[str, Unit]] = {unit.price_key: unit for unit in UNITS.values()}

# The five that nearly all calls are priced by: without any other the sum is written out (`Rates.plain`).
FIVE: Final = (INPUT, "output_tokens", "cache_read_tokens", "cache_write_tokens", "cache_write_1h_tokens")
Five = tuple[int, int, int | None, int | None, int | None]
Plain = tuple[Five, tuple[tuple[int, Five], ...]]
"""The base, and `(above, prices)` of the tiers in rising order."""


def pico(amount: Fraction | str, per: int = 1) -> Fraction:
    """An amount of money for `per` of something, as pico-USD for one of it."""
    return Fraction(amount) * PICO / per


@dataclass(frozen=True, slots=True)
class Sum:
    """What a call comes to. `odd`: the counts contradict each other, or one is missing; it is the nearest reading."""

    parts: dict[str, int]  # pico-USD, without those that cost nothing
    total: int
    odd: bool
    counted: bool  # whether anything was reported that has a price


@dataclass(slots=True)
class _Row:
    unit: Unit
    base: int
    tiers: tuple[tuple[int, int], ...]
    inside: tuple[int, ...]  # rows of its parts; they stand before it
    joins: tuple[tuple[str, str], ...]  # pairs of units whose overlap it is

    def price(self, input_tokens: Count) -> int:
        found = self.base
        for above, price in self.tiers:
            if input_tokens > above:
                found = price
        return found


class Rates:
    """The prices that are in force for one call. `minimum` is what a call costs at least, in pico-USD."""

    __slots__ = ("_clashes", "_rows", "_scale", "minimum", "plain", "priced", "seconds_least")

    def __init__(self, prices: Mapping[str, Price], *, minimum: int = 0, seconds_least: int = 0) -> None:
        scales = [f.denominator for base, tiers in prices.values() for f in (base, *(p for _, p in tiers))]
        self._scale = scale = lcm(*scales) if scales else 1
        units = sorted((UNITS[name] for name in prices), key=lambda unit: (-len(unit.dimensions), unit.name))
        self._rows: list[_Row] = []
        for unit in units:
            base, tiers = prices[unit.name]
            self._rows.append(
                _Row(
                    unit,
                    int(base * scale),
                    tuple((above, int(price * scale)) for above, price in tiers),
                    tuple(i for i, row in enumerate(self._rows) if unit.holds(row.unit)),
                    tuple((a.name, b.name) for a, b in combinations(units, 2) if _overlap(a, b) == unit.dimensions),
                )
            )
        priced = {unit.dimensions for unit in units}
        # Two that overlap where the overlap has no price of its own: what is in both would be taken off twice.
        self._clashes = tuple(
            (a.name, b.name)
            for a, b in combinations(units, 2)
            if (both := _overlap(a, b)) is not None and both not in priced
        )
        self.priced = frozenset(prices)
        self.minimum = minimum
        self.seconds_least = seconds_least  # audio is billed as at least so long
        self.plain = self._plain()

    def _plain(self) -> Plain | None:
        """The base and the tiers of a model that is priced by the five alone, in whole pico-USD; else None.

        Prices of units that are no tokens do not matter: calls that report any are summed the long way.
        """
        tokens = {row.unit.name: row for row in self._rows if row.unit.price_key.endswith("_mtok")}
        if self._scale != 1 or self.minimum or REQUESTS in self.priced or not tokens.keys() <= set(FIVE):
            return None
        if INPUT not in tokens or "output_tokens" not in tokens:
            return None

        def at(input_tokens: int) -> Five:
            read, output, cached, written, long = (
                tokens[name].price(input_tokens) if name in tokens else None for name in FIVE
            )
            assert read is not None
            assert output is not None
            return read, output, cached, written, long

        starts = sorted({above for row in tokens.values() for above, _ in row.tiers})
        return at(0), tuple((above, at(above + 1)) for above in starts)

    def sum(self, counts: Mapping[str, Count]) -> Sum:
        """What these counts come to. A unit that is left out was not reported; `requests` is always one."""
        odd = any(counts.get(a) and counts.get(b) for a, b in self._clashes)
        counted = False
        left: list[Count] = []
        parts: list[tuple[str, Count]] = []
        input_tokens = counts.get(INPUT, 0)
        for row in self._rows:
            name = row.unit.name
            count = 1 if name == REQUESTS else counts.get(name)
            if count is None:
                count = sum((left[i] for i in row.inside), start=0)
                odd = odd or count > 0 or any(counts.get(a) and counts.get(b) for a, b in row.joins)
            else:
                counted = True
                if row.unit.dimensions >= {("family", "durations")} and 0 < count < self.seconds_least:
                    count = self.seconds_least
            own = count - sum(left[i] for i in row.inside)
            if own < 0:  # more cached than there was input, say: never less than nothing
                odd, own = True, 0
            left.append(own)
            if own and (price := row.price(input_tokens)):
                parts.append((row.unit.part, own * price))
        return self._rounded(parts[::-1], odd, counted)

    def _rounded(self, parts: list[tuple[str, Count]], odd: bool, counted: bool) -> Sum:
        found, done = added_up(parts, self._scale)
        if done < self.minimum:
            found["minimum"] = self.minimum - done
            done = self.minimum
        return Sum(found, done, odd, counted)


def added_up(parts: Iterable[tuple[str, Count]], scale: int) -> tuple[dict[str, int], int]:
    """Amounts in the `scale`-th part of a pico-USD, as whole ones: each part is what the running sum grows by, so that
    they add up to the total, which is rounded once. Those that are nothing are left out."""
    found: dict[str, int] = {}
    running: Count = 0
    done = 0
    for name, amount in parts:
        running += amount
        if isinstance(running, int):
            now, rest = divmod(running, scale)
            if 2 * rest > scale or (2 * rest == scale and now % 2):  # half to even
                now += 1
        else:
            now = round(running / scale)
        if now != done:
            found[name] = now - done
            done = now
    return found, done


def _overlap(a: Unit, b: Unit) -> frozenset[tuple[str, str]] | None:
    """The dimensions of what is counted by both; None where nothing is, or where one holds the other."""
    if a.holds(b) or b.holds(a):
        return None
    ours, theirs = dict(a.dimensions), dict(b.dimensions)
    if any(theirs.get(key, value) != value for key, value in ours.items()):
        return None
    return a.dimensions | b.dimensions if ours.keys() & theirs.keys() else None


def amount_of(text: str) -> int:
    """The same back: pico-USD of a text that `amount_text` made."""
    whole, _, rest = text.partition(".")
    return int(whole) * PICO + int(rest.ljust(DECIMALS, "0") or 0)


def amount_text(amount: int) -> str:
    """Pico-USD as a decimal text, without zeros at the end."""
    if 0 < amount < PICO:  # nearly all: a third of what formatting costs
        return ZEROS[len(text := str(amount))] + text.rstrip("0")
    whole, rest = divmod(amount, PICO)
    return f"{whole}.{rest:012d}".rstrip("0") if rest else str(whole)
