"""What one call cost, from the facts of its record: a table, prices of one's own, and a memory of what was looked up.

Always holds: an unknown price is null and never zero; what is not certain says so (`estimated`, with a reason); a sum
is exact in pico-units of its currency. Nothing here reads a clock, a file or the environment, so a book is replaced by
making another one.

A price is looked up once for each (provider, model, tier, …, day). With it at hand, a call of a model that is priced by
tokens of input, output and caches alone is summed in a few lines (`plain_cost`); everything else goes the long way
(`_long`), which gives the same for those too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from fractions import Fraction
from operator import itemgetter
from typing import Any, Final

import orjson

from sidecar.model.exchange import Usage, UsageState
from sidecar.model.record import Record
from sidecar.prices.custom import USD, CustomPrice, Side
from sidecar.prices.entry import (
    DECLARED,
    ESTIMATED,
    EXACT,
    SECONDS_A_DAY,
    UNPRICED,
    ByHour,
    Cost,
    Entry,
    Priced,
    cost_of,
    null_cost,
    plain_cost,
)
from sidecar.prices.facts import (
    PROVIDERS,
    STATES_COSTS,
    apart_of,
    context_of,
    costs_more,
    counts_of,
    declared_of,
    differs,
    names_of,
    request_fee,
    stands_in,
    terms_of,
    usage_of,
    wrong_fee,
)
from sidecar.prices.rates import PICO, REQUESTS, Plain, Price, Rates, added_up, amount_of, amount_text
from sidecar.prices.table import Found, Provider, Table, hours_of, prices_at

# Every `reason`: a closed list, fit for a label.
ESTIMATES: Final = (
    "near_match", "other_name", "gateway", "provider_guessed", "tier", "region", "cache_write_life", "unpriced_unit",
    "partial_usage", "estimated_usage", "counts_disagree", "meter",
    "declared_differs",
)  # fmt: skip
UNKNOWNS: Final = (
    "unknown_model", "unknown_provider", "no_price", "no_model", "no_table", "no_usage", "nothing_counted", "fault",
)  # fmt: skip

KEPT_MAX: Final = 4096  # looked-up prices; a client that invents models empties the memory, it does not fill it
_EPOCH: Final = date(1970, 1, 1).toordinal()

AWS: Final = "aws"
FREE: Final = ":free"  # how gateways call a model that costs nothing; another one without prices has none that is known
SAYS_IN_USAGE: Final = frozenset({"anthropic"})  # whose usage object tells of terms that have another price
# Members of a usage object that cost something of their own where they are more than nothing.
_BESIDE: Final = (
    "units", "cache_write_input_tokens", "cache_write_5m_input_tokens", "cache_write_1h_input_tokens",
)  # fmt: skip
_CACHED: Final = "cache_read_input_tokens"
TERMS_MAX: Final = 16  # kinds of them that are kept for one model


class PriceBook:
    """Prices calls. `charges`: whether there are prices for the customer; `needs_record`: whether any meter is priced,
    so that `cost` and `charge` want the record as well."""

    def __init__(
        self, table: Table | None, custom: Sequence[CustomPrice] = (), *, declared_first: bool = False
    ) -> None:
        self.table = table
        self.declared_first = declared_first
        self.own = tuple(sorted(custom, key=_rank, reverse=True))  # the most specific first
        self.source = "custom" if table is None else table.source
        self._custom = {side: [p for p in self.own if p.side is side and p.meter is None] for side in Side}
        self._meters = {side: tuple(p for p in custom if p.side is side and p.meter is not None) for side in Side}
        self.charges = any(p.side is Side.CUSTOMER for p in custom)
        self.needs_record = any(self._meters.values())
        self._kept: dict[Any, Entry] = {}
        self._kept_charges: dict[Any, tuple[Entry | None, CustomPrice | None]] = {}

    def __repr__(self) -> str:
        return f"<PriceBook: {self.table!r}, {len(self.own)} of one's own, {len(self._kept)} looked up>"

    @staticmethod
    def word(provider: str) -> str:
        """The table's word for a provider of a record."""
        return PROVIDERS.get(provider.lower(), provider)

    # The call

    def cost(
        self,
        usage: Usage | Mapping[str, Any] | None,
        started_s: float,
        *,
        host: str | None = None,
        batch: bool = False,
        record: Record | None = None,
    ) -> Priced:
        """What the provider takes for a call that began at `started_s` (Unix seconds).

        `usage`: of the record, or its `usage` object as JSON has it; None: no model was called. `host`: of the upstream
        that was asked. `batch`: it is a result of a batch. `record`: where a meter has a price. The dict is the
        caller's own, ready for JSON.
        """
        if usage is None:
            return self._of_meters(Side.PROVIDER, record, started_s)
        if not isinstance(usage, Usage):
            return self._of_row(usage, started_s, host, batch, record)
        key = (usage.provider, usage.model, usage.request_model, usage.service_tier, host, batch)
        entry = self._kept.get(key)
        if entry is None or not entry.since_s <= started_s < entry.until_s:
            entry = self._kept[key] = self._look_up(usage, started_s, host, batch)
        if entry.looks_further:
            entry = entry.for_call(usage.raw_usage, started_s)
        if (
            entry.plain is not None
            and usage.usage_state is UsageState.FINAL
            and not usage.units
            and usage.cost_usd is None
            and not any(map(usage.__getattribute__, entry.apart))
            and (
                cost := plain_cost(
                    entry,
                    entry.plain,
                    usage.input_tokens,
                    usage.output_tokens,
                    usage.cache_read_input_tokens,
                    usage.cache_write_input_tokens,
                    usage.cache_write_5m_input_tokens,
                    usage.cache_write_1h_input_tokens,
                )
            )
            is not None
        ):
            return cost
        return self._long(Side.PROVIDER, entry, usage, started_s, record)

    def _of_row(
        self, row: Mapping[str, Any], started_s: float, host: str | None, batch: bool, record: Record | None
    ) -> Priced:
        """`cost` of a usage object as JSON has it. No `Usage` is made of one that is plain."""
        get = row.get
        entry = self.entry_of(row, started_s, host, batch)
        if entry.looks_further:
            entry = entry.for_call(get("raw_usage"), started_s)
        if (
            entry.plain is not None
            and get("usage_state") == "final"
            and not get("units")
            and get("cost_usd") is None
            and not any(map(get, entry.apart))
            and (
                cost := plain_cost(
                    entry,
                    entry.plain,
                    get("input_tokens"),
                    get("output_tokens"),
                    get("cache_read_input_tokens"),
                    get("cache_write_input_tokens"),
                    get("cache_write_5m_input_tokens"),
                    get("cache_write_1h_input_tokens"),
                )
            )
            is not None
        ):
            return cost
        return self._long(Side.PROVIDER, entry, usage_of(row), started_s, record)

    def charge(
        self,
        usage: Usage | Mapping[str, Any] | None,
        started_s: float,
        cost: Priced,
        *,
        host: str | None = None,
        batch: bool = False,
        record: Record | None = None,
    ) -> Priced:
        """What the customer pays for the same call, whose cost is `cost`. (None, None) where no price is for it."""
        if not self.charges:
            return None, None
        if usage is None:
            return self._of_meters(Side.CUSTOMER, record, started_s)
        if not isinstance(usage, Usage):
            usage = usage_of(usage)
        day = started_s // SECONDS_A_DAY
        terms = terms_of(usage.raw_usage)
        key = (usage.provider, usage.model, usage.request_model, usage.service_tier, host, batch, day, terms)
        kept = self._kept_charges.get(key)
        if kept is None:
            kept = self._customer_entry(
                usage, started_s, host, context_of(usage.service_tier, batch, terms and terms[0])
            )
            if len(self._kept_charges) >= KEPT_MAX:
                self._kept_charges.clear()
            self._kept_charges[key] = kept
        entry, price = kept
        if price is None:
            return self._of_meters(Side.CUSTOMER, record, started_s)
        if entry is None:
            return self._marked_up(price, cost, record, started_s)
        return self._long(Side.CUSTOMER, entry, usage, started_s, record)

    def of_record(self, record: Record, *, host: str | None = None, batch: bool = False) -> tuple[Priced, Priced]:
        """Cost and charge of a record that is at hand, for who reads records back."""
        cost = self.cost(record.usage, record.started_s, host=host, batch=batch, record=record)
        return cost, self.charge(record.usage, record.started_s, cost, host=host, batch=batch, record=record)

    def unknown(self) -> Cost:
        """The cost of a call that could not be priced: whoever adds up costs must know that one is missing."""
        return null_cost(Entry(None, source=self.source), "fault")

    def output_tokens_max(self, provider: str | None, model: str, *, host: str | None = None) -> int | None:
        """How long a response of this model may be at most, where the table says so; None: nobody knows."""
        return self._most("output_tokens_max", provider, model, host)

    def input_tokens_max(self, provider: str | None, model: str, *, host: str | None = None) -> int | None:
        """The same of a request."""
        return self._most("input_tokens_max", provider, model, host)

    def _most(self, which: str, provider: str | None, model: str, host: str | None) -> int | None:
        found, _ = self._model(self._provider(provider, host)[0], provider, (model,))
        return None if found is None else found.model.get(which) or found.model.get("context_window")

    def pricer(self, row: Mapping[str, Any], *, host: str | None = None, batch: bool = False) -> Pricer:
        """For many calls of one kind, whose provider and models are those of this usage object."""
        return Pricer(self, row, host, batch)

    def entry_of(self, row: Mapping[str, Any], started_s: float, host: str | None, batch: bool) -> Entry:
        """What holds for calls of this kind on the day of `started_s`; kept."""
        get = row.get
        key = (get("provider"), get("model"), get("request_model"), get("service_tier"), host, batch)
        entry = self._kept.get(key)
        if entry is None or not entry.since_s <= started_s < entry.until_s:
            entry = self._kept[key] = self._look_up(usage_of(row), started_s, host, batch)
        return entry

    # Looking up

    def _look_up(self, usage: Usage, started_s: float, host: str | None, batch: bool) -> Entry:
        """What holds on this day for calls of this kind."""
        if len(self._kept) >= KEPT_MAX:
            self._kept.clear()
        provider, words = self._provider(usage.provider, host)
        names = names_of(usage, AWS in words)
        day = _day(started_s)
        since_s = started_s // SECONDS_A_DAY * SECONDS_A_DAY
        until_s = since_s + SECONDS_A_DAY
        own = self._of_ones_own(Side.PROVIDER, words, names, day)
        tier = usage.service_tier
        if own is not None and own.prices:
            made = _own_entry(own, context_of(tier, batch, None), plainly=not self._meters[Side.PROVIDER])
            return replace(
                made,
                since_s=since_s,
                until_s=until_s,
                by_raw=lambda terms: _own_entry(own, context_of(tier, batch, terms[0])),
                looks_further=True,
            )
        found, unsure = self._model(provider, usage.provider, names)
        if found is None:
            model = names[0] if names else None
            return Entry(None, model, self.source, USD, UNPRICED, unsure, since_s=since_s, until_s=until_s)
        if unsure is None and costs_more(names, host):
            unsure = "region"

        def served(speed: str | None, reason: str | None) -> Entry:
            context = context_of(tier, batch, speed)

            def at(second: float) -> Entry:
                return self._table_entry(found, day, second, context, reason, own)

            changes = hours_of(found.model)
            return Entry(None, by_hour=ByHour(changes, at)) if changes else at(0.0)

        kept: dict[tuple[str | None, bool], Entry] = {}

        def by_raw(terms: tuple[str | None, bool]) -> Entry:
            if terms not in kept:
                if len(kept) >= TERMS_MAX:
                    kept.clear()
                kept[terms] = served(terms[0], unsure or ("region" if terms[1] else None))
            return kept[terms]

        made = served(None, unsure)
        looks = by_raw if found.provider in SAYS_IN_USAGE else None
        further = looks is not None or made.by_hour is not None
        return replace(made, since_s=since_s, until_s=until_s, by_raw=looks, looks_further=further)

    def _table_entry(
        self,
        found: Found,
        day: str,
        second: float,
        context: Mapping[str, str],
        reason: str | None,
        own: CustomPrice | None,
    ) -> Entry:
        asked = {} if found.borrowed else context  # another provider's tiers are not this one's
        prices, unspoken = prices_at(found.model, day, second, asked)
        if unspoken or (found.borrowed and context):
            reason = reason or "tier"
        if not prices and not found.name.endswith(FREE):
            return Entry(None, found.name, self.source, USD, UNPRICED, "no_price")
        minimum, source = 0, self.source
        if own is not None:
            prices = {unit: _times(price, own.markup) for unit, price in prices.items()}
            minimum, source = own.minimum, f"custom+{source}"
        rates = Rates(prices, minimum=minimum, seconds_least=found.model.get("seconds_least", 0))
        state = EXACT if reason is None else ESTIMATED
        plain = None if self._meters[Side.PROVIDER] else rates.plain
        apart = apart_of(found.provider, rates) if rates.priced else ()
        states = own is None and found.provider in STATES_COSTS
        return Entry(rates, found.name, source, USD, state, reason, plain, states, apart)

    def _provider(self, word: str | None, host: str | None) -> tuple[Provider | None, frozenset[str]]:
        """The table's provider, by the address that was called, else by the record's word; and every word for it."""
        found = None
        if self.table is not None:
            if host:
                found = self.table.by_address(f"https://{host}/")
            if found is None and word:
                found = self.table.by_word(PROVIDERS.get(word, word))
        words = {w for w in (word and word.lower(), PROVIDERS.get(word or ""), found and found.id) if w}
        return found, frozenset(words)

    def _model(
        self, provider: Provider | None, word: str | None, names: Sequence[str]
    ) -> tuple[Found | None, str | None]:
        """The entry, and why it is not certain (or why there is none)."""
        table = self.table
        if table is None:
            return None, "no_table"
        if not names:
            return None, "no_model"
        if provider is not None:
            for place, name in enumerate(names):
                if (found := table.find(provider, name)) is not None:
                    other = place > 0 and not _same_model(names[0], found)
                    return found, "near_match" if found.near else "other_name" if other else None
        elif word is not None:
            return None, "unknown_provider"  # one that the table does not have: a model's maker is not who serves it
        for name in names:  # `vendor/model`, as gateways have it
            vendor, slash, rest = name.partition("/")
            maker = table.by_word(vendor) if slash and rest else None
            if maker is not None and (found := table.find(maker, rest)) is not None:
                return found, "gateway"
        if provider is None:
            for name in names:
                maker = table.by_model(name)
                if maker is not None and (found := table.find(maker, name)) is not None:
                    return found, "provider_guessed"
        return None, "unknown_model" if provider is not None else "unknown_provider"

    def _of_ones_own(self, side: Side, words: Iterable[str], names: Sequence[str], day: str) -> CustomPrice | None:
        for price in self._custom[side]:  # the most specific first
            if any(price.holds(words, name, day) for name in names or ("",)):
                return price
        return None

    def _customer_entry(
        self, usage: Usage, started_s: float, host: str | None, context: Mapping[str, str]
    ) -> tuple[Entry | None, CustomPrice | None]:
        _, words = self._provider(usage.provider, host)
        own = self._of_ones_own(Side.CUSTOMER, words, names_of(usage, AWS in words), _day(started_s))
        if own is None or not own.prices:
            return None, own
        return _own_entry(own, context), own

    # The long way

    def _long(self, side: Side, entry: Entry, usage: Usage, started_s: float, record: Record | None) -> Priced:
        declared = declared_of(usage.cost_usd) if side is Side.PROVIDER else None
        if entry.rates is None:
            return self._unpriced(entry.model, entry.source, entry.reason or "unknown_model", declared)
        if usage.usage_state is UsageState.ABSENT:
            return self._unpriced(entry.model, entry.source, "no_usage", declared)
        counts, unsure = counts_of(usage, entry.rates)
        summed = entry.rates.sum(counts)
        if not summed.counted and entry.rates.priced:
            return self._unpriced(entry.model, entry.source, "nothing_counted", declared)
        if unsure is None and stands_in(usage, entry.apart):
            unsure = "unpriced_unit"
        reason = entry.reason or unsure or ("counts_disagree" if summed.odd else None)
        parts, total = summed.parts, summed.total
        if entry.states_cost and REQUESTS in parts:
            if (fee := request_fee(usage.raw_usage)) is not None:
                total += fee - parts.pop(REQUESTS)
                parts |= {REQUESTS: fee} if fee else {}
            elif wrong_fee(usage.raw_usage):
                reason = reason or "tier"
        if counts.get("cache_write_5m_tokens", 0) > 0 and "cache_write" in parts:
            parts = {"cache_write_5m" if name == "cache_write" else name: part for name, part in parts.items()}
        for price in self._meters[side]:
            part, known = _of_meter(price, record, started_s)
            if part:
                parts[price.name.replace(" ", ":")] = part
                total += part
            reason = reason or (None if known else "meter")
        if reason is None and entry.states_cost and side is Side.PROVIDER and differs(total, usage.cost_usd):
            reason = "declared_differs"
        state = EXACT if reason is None else ESTIMATED
        if declared is not None and self.declared_first:
            return self._of_declared(entry, declared)
        return cost_of(entry, parts, total, state, reason, declared), total

    def _of_declared(self, entry: Entry, declared: int) -> Priced:
        cost: Cost = {
            "currency": USD,
            "total": amount_text(declared),
            "parts": {},
            "state": DECLARED,
            "source": "provider",
            "model": entry.model,
            "declared": amount_text(declared),
        }
        return cost, declared

    def _unpriced(self, model: str | None, source: str, reason: str, declared: int | None) -> Priced:
        entry = Entry(None, model, source, USD, UNPRICED, reason)
        return (null_cost(entry, reason), None) if declared is None else self._of_declared(entry, declared)

    def _marked_up(self, price: CustomPrice, cost: Priced, record: Record | None, started_s: float) -> Priced:
        """The charge that is a multiple of the cost."""
        of_cost, total = cost
        if of_cost is None:
            return self._of_meters(Side.CUSTOMER, record, started_s)
        entry = Entry(None, of_cost["model"], "custom", of_cost["currency"] or USD, of_cost["state"], None)
        if total is None:
            return null_cost(entry, of_cost.get("reason", "unknown_model")), None
        factor, scale = price.markup.as_integer_ratio()
        shares = [(name, amount_of(text) * factor) for name, text in (of_cost["parts"] or {}).items()]
        parts, done = added_up(shares or [("cost", total * factor)], scale)
        if done < price.minimum:
            parts["minimum"], done = price.minimum - done, price.minimum
        reason = of_cost.get("reason")
        for each in self._meters[Side.CUSTOMER]:
            part, known = _of_meter(each, record, started_s)
            if part:
                parts[each.name.replace(" ", ":")] = part
                done += part
            reason = reason or (None if known else "meter")
        state = of_cost["state"] if reason is None or of_cost["state"] != EXACT else ESTIMATED
        return cost_of(entry, parts, done, state, reason, None), done

    def _of_meters(self, side: Side, record: Record | None, started_s: float) -> Priced:
        """What a call costs by meters alone. (None, None) where none measures it."""
        parts: dict[str, int] = {}
        total, currency, unknown = 0, None, False
        for price in self._meters[side]:
            part, known = _of_meter(price, record, started_s)
            unknown = unknown or not known
            if part is not None:
                parts[price.name.replace(" ", ":")] = part
                currency = price.currency
                total += part
        if currency is None:
            return None, None
        entry = Entry(None, None, "custom", currency, EXACT, None)
        return cost_of(entry, parts, total, ESTIMATED if unknown else EXACT, "meter" if unknown else None, None), total


class Pricer:
    """The costs of calls that have provider, models, host and batch in common, as JSON: for where lines are written.

    Gives what `PriceBook.cost` gives. Where a call has other terms than the first (a service tier, another day), that
    is looked up anew or asked of the book.
    """

    __slots__ = (
        "_apart", "_batch", "_beside", "_book", "_by_raw", "_cached_at", "_entry", "_form", "_host", "_names", "_plain",
        "_tier",
    )  # fmt: skip

    def __init__(self, book: PriceBook, row: Mapping[str, Any], host: str | None, batch: bool) -> None:
        self._book, self._host, self._batch = book, host, batch
        self._tier = row.get("service_tier")
        self._entry = Entry(None)  # of no day
        self._plain: Plain | None = None
        self._beside: tuple[str, ...] = _BESIDE
        self._by_raw = False
        self._form = b""
        self._names: tuple[str, ...] = ()  # of which the next two tell
        self._cached_at = 0  # where the count of what was read from a cache is; 0: nowhere
        self._apart: Callable[[Sequence[int]], Iterable[int]] | None = None  # takes out the counts of `_beside`

    def of_counts(
        self, names: tuple[str, ...], counts: tuple[int, ...], started_s: float
    ) -> tuple[bytes, int | None] | None:
        """As `json`, for a call whose usage is final, has the tier that this was made with, and holds nothing but these
        counts, of which the first two are the tokens read and written. None: `json` is to be asked."""
        entry, plain = self._entry, self._plain
        if plain is None or self._by_raw or not entry.since_s <= started_s < entry.until_s:
            return None
        if names is not self._names:
            self._place(names)
        cached = counts[self._cached_at] if self._cached_at else 0
        if self._apart is not None and any(self._apart(counts)):
            return None
        return self._of_plain(plain, counts[0], counts[1], cached)

    def _place(self, names: tuple[str, ...]) -> None:
        self._cached_at = names.index(_CACHED) if _CACHED in names else 0
        places = [names.index(name) for name in self._beside if name in names]
        self._apart = itemgetter(places[0], *places) if places else None  # a tuple, also of one
        self._names = names

    def json(self, row: Mapping[str, Any], started_s: float) -> tuple[bytes, int | None]:
        """The `cost` of a call with this usage object, and its total in pico-units; None: it is not known."""
        if not self._entry.since_s <= started_s < self._entry.until_s:
            self._renew(row, started_s)
        get = row.get
        plain = self._plain
        if (
            plain is None
            or (read := get("input_tokens")) is None
            or (written := get("output_tokens")) is None
            or get("usage_state") != "final"
            or get("service_tier") != self._tier
            or "cost_usd" in row
            or any(map(get, self._beside))
            or (self._by_raw and terms_of(get("raw_usage")) is not None)
        ):
            return self._by_book(row, started_s)
        return self._of_plain(plain, read, written, get(_CACHED) or 0) or self._by_book(row, started_s)

    def _of_plain(self, plain: Plain, read: int, written: int, cached: int) -> tuple[bytes, int] | None:
        """None: this form has no place for it."""
        prices, tiers = plain
        for above, of_tier in tiers:
            if read > above:
                prices = of_tier
        total = of_written = written * prices[1]
        behind = b""
        if cached and (price := prices[2]) is not None:
            read -= cached
            if of_cached := cached * price:
                total += of_cached
                if of_cached >= PICO:
                    return None
                behind = b',"cache_read":"0.%b"' % (b"%012d" % of_cached).rstrip(b"0")
        total += (of_read := read * prices[0])
        if of_read <= 0 or of_written <= 0 or total >= PICO:
            return None
        cost = self._form % (
            (b"%012d" % total).rstrip(b"0"),  # as `amount_text`: less than one, so twelve decimals
            (b"%012d" % of_read).rstrip(b"0"),
            (b"%012d" % of_written).rstrip(b"0"),
            behind,
        )
        return cost, total

    def _by_book(self, row: Mapping[str, Any], started_s: float) -> tuple[bytes, int | None]:
        cost, total = self._book.cost(row, started_s, host=self._host, batch=self._batch)
        return orjson.dumps(cost), total

    def _renew(self, row: Mapping[str, Any], started_s: float) -> None:
        self._entry = entry = self._book.entry_of(row, started_s, self._host, self._batch)
        self._tier = row.get("service_tier")
        self._plain = entry.plain if entry.by_hour is None else None
        self._beside = (*_BESIDE, *entry.apart)
        self._names = ()
        self._by_raw = entry.by_raw is not None
        facts = {"state": entry.state, "source": entry.source, "model": entry.model}
        facts |= {} if entry.reason is None else {"reason": entry.reason}
        self._form = b'{"currency":"%b","total":"0.%%b","parts":{"input":"0.%%b","output":"0.%%b"%%b},%b' % (
            entry.currency.replace("%", "%%").encode(),
            orjson.dumps(facts)[1:].replace(b"%", b"%%"),
        )


def _day(started_s: float) -> str:
    return date.fromordinal(_EPOCH + int(started_s // SECONDS_A_DAY)).isoformat()


def _rank(price: CustomPrice) -> tuple[bool, int, bool, bool, str]:
    return price.rank


def _same_model(name: str, found: Found) -> bool:
    """Whether another name for it is known to mean this entry: a deployment's name says nothing."""
    return found.name.lower().endswith(name)


def _own_entry(own: CustomPrice, context: Mapping[str, str], plainly: bool = False) -> Entry:
    """The entry of a price of one's own that states amounts."""
    factor = Fraction(1)
    reason: str | None = None
    for word in context.values():
        if word in own.multipliers:
            factor *= own.multipliers[word]
        else:
            reason = "tier"
    prices = {unit: _times(price, factor) for unit, price in own.prices.items()}
    state = EXACT if reason is None else ESTIMATED
    rates = Rates(prices, minimum=own.minimum)
    return Entry(rates, own.model, "custom", own.currency, state, reason, rates.plain if plainly else None)


def _times(price: Price, factor: Fraction) -> Price:
    base, tiers = price
    return base * factor, tuple((above, amount * factor) for above, amount in tiers)


def _of_meter(price: CustomPrice, record: Record | None, started_s: float) -> tuple[int | None, bool]:
    """What a meter's price comes to for this call, and whether that is known. None: it is not measured."""
    if not price.start <= _day(started_s) < price.until or price.meter is None:
        return None, True
    if record is None:
        return None, False
    quantity = price.meter.quantity(record)
    return (None, True) if quantity is None else (round(Fraction(quantity) * price.unit), True)
