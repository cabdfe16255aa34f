"""The facts of a record in the table's words: what was counted, under which terms it was served, and by which names
its model may be looked up.

A vendor's own usage object is asked for what the record's vocabulary has no word for: what of the cached tokens was
audio, the speed, the region. Nothing in it is trusted to have the type that it should.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Final

from sidecar.model.exchange import Usage, UsageState
from sidecar.prices.rates import PICO, Count, Rates

Terms = tuple[str | None, bool]
"""Of a vendor's usage object: a speed that is not the standard one, and whether the region costs more."""

ROUNDING: Final = PICO // 10**9  # less than that others may differ, who calculate with floats
# Who states what a call cost and means what is charged, by the table's word; a gateway's statement is a calculation.
STATES_COSTS: Final = frozenset({"perplexity", "openrouter", "x-ai"})
_DIGITS_MAX: Final = 15  # before the point, of what others state: more is no amount
# What providers call the tier that costs the standard price.
STANDARD_TIERS: Final = frozenset(
    {"", "default", "standard", "standard_only", "on_demand", "on-demand", "service_tier_unspecified", "unspecified"}
)
STANDARD_SPEEDS: Final = frozenset({"", "standard"})
_OPENAI_REGION: Final = re.compile(r"[a-z]+\.api\.openai\.com", re.IGNORECASE)
_VERTEX_REGION: Final = re.compile(
    r"(?!global-)(?:[a-z0-9-]+-aiplatform|aiplatform\.[a-z]+\.rep)\.googleapis\.com", re.IGNORECASE
)
_GPT: Final = re.compile(r"(?:ft:)?gpt-(\d+)(?:[.-](\d{1,2})(?!\d))?")
_CLAUDE: Final = re.compile(r"claude-[a-z]+-(\d{1,2})(?!\d)(?:[.-](\d{1,2})(?!\d))?")
ELSEWHERE: Final = frozenset({"", "global", "not_available"})  # `inference_geo` without a surcharge

# Ours (OpenTelemetry's gen_ai.provider.name where it has one) to the table's.
PROVIDERS: Final[Mapping[str, str]] = {
    "azure.ai.openai": "azure",
    "azure.ai.inference": "azure",
    "aws.bedrock": "aws",
    "gcp.gemini": "google",
    "gcp.gen_ai": "google",
    "gcp.vertex_ai": "google",
    "mistral_ai": "mistral",
    "moonshot_ai": "moonshotai",
    "x_ai": "x-ai",
    "voyage": "voyageai",
    "cloudflare.workers_ai": "cloudflare",
}

WHOLES: Final = ("input_tokens", "output_tokens")
_COUNTS: Final = {
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "cache_read_input_tokens": "cache_read_tokens",
    "cache_write_input_tokens": "cache_write_tokens",
    "cache_write_5m_input_tokens": "cache_write_5m_tokens",
    "cache_write_1h_input_tokens": "cache_write_1h_tokens",
    "tool_use_input_tokens": "input_tool_tokens",
    "reasoning_output_tokens": "output_reasoning_tokens",
    "text_input_tokens": "input_text_tokens",
    "image_input_tokens": "input_image_tokens",
    "audio_input_tokens": "input_audio_tokens",
    "text_output_tokens": "output_text_tokens",
    "image_output_tokens": "output_image_tokens",
    "audio_output_tokens": "output_audio_tokens",
}
CITED: Final = "citation_tokens"  # beside the output; only Perplexity's deep research bills them
# The record's `units` that cost something, and what the table may have a price of theirs for (nothing: no table has
# one, which is said); seconds are of the input but for speech. Any other unit is free, or one's own.
BILLED: Final[Mapping[str, tuple[str, ...]]] = {
    "audio_seconds": ("audio_seconds", "input_audio_seconds"),
    "search_units": ("rerank_searches",),
    "search_queries": ("web_searches",),
    "web_search_requests": ("web_searches",),
    "code_execution_requests": ("code_executions",),
    CITED: ("output_citation_tokens",),
    "pages": ("input_document_pages",),
    "annotated_pages": ("input_annotated_document_pages",),
    "characters": ("input_characters",),
    "billable_characters": ("input_characters",),
    "advisor_tokens": (),
    "images": (),
    "image_tool_tokens": (),
    "classifications": (),
    "predict_seconds": (),
    "billable_units": (),
}
# Tokens that a provider has a price of its own for, whatever the model: where the table has none for them, that of
# text stands in. Not in it are tokens that cost what text does, as images do that a chat model of OpenAI's reads.
_SOUND: Final = ("audio_input_tokens", "audio_output_tokens")
_APART: Final[Mapping[str, tuple[str, ...]]] = {
    "openai": (*_SOUND, "image_output_tokens"),
    "azure": (*_SOUND, "image_output_tokens"),
    "openrouter": (*_SOUND, "image_output_tokens"),
    "google": ("image_output_tokens",),
}
# What is made by nothing else than that: there the price of the output is its price.
_ALL_OF_IT: Final = {"speech": "audio_output_tokens", "image_generation": "image_output_tokens"}
_SEARCHES: Final = ("web_searches",)
# Whose searches Google bills by the prompt that made any; later models' by the search
# (https://ai.google.dev/gemini-api/docs/pricing, "Grounding with Google Search").
_BY_PROMPT: Final = re.compile(r"gemini-[12]\b.*")
_CACHED_DETAILS: Final = ("input_token_details", "input_tokens_details", "prompt_tokens_details")
_CACHED_BY_MODALITY: Final = {m: f"cache_{m}_read_tokens" for m in ("text", "audio", "image", "video")}
_USAGE_NAMES: Final = frozenset(f.name for f in fields(Usage))


def context_of(tier: str | None, batch: bool, speed: str | None) -> dict[str, str]:
    """Under which terms the provider served a call, in the table's words; what costs the standard price is left out."""
    context: dict[str, str] = {}
    word = (tier or "").lower()
    if batch or word == "batch":
        context["processing"] = "batch"
    elif word not in STANDARD_TIERS:
        context["service_tier"] = word
    if speed and speed.lower() not in STANDARD_SPEEDS:
        context["speed"] = speed.lower()
    return context


def terms_of(raw: Any) -> Terms | None:
    """Of the vendor's usage object: the speed a call was served at, and whether its region costs more; None where it
    says nothing of either."""
    if type(raw) is not dict:
        return None
    speed, geo = raw.get("speed"), raw.get("inference_geo")
    fast = isinstance(speed, str) and speed.lower() not in STANDARD_SPEEDS
    dear = isinstance(geo, str) and geo.lower() not in ELSEWHERE
    return (str(speed) if fast else None, dear) if fast or dear else None


def costs_more(names: Iterable[str], host: str | None) -> bool:
    """Whether the region that is asked may have another price than the table's.

    So have AWS's government regions. OpenAI's endpoints of a region have a surcharge for models since gpt-5.4
    (https://platform.openai.com/docs/pricing, "Regional processing"), Vertex's have one for Claude since 4.5, where the
    address without a region is the global one (https://platform.claude.com/docs/en/about-claude/pricing).
    """
    host = host or ""
    if ".us-gov-" in host:
        return True
    of_openai, of_vertex = _OPENAI_REGION.fullmatch(host), _VERTEX_REGION.fullmatch(host)
    for name in names:
        if name.startswith("us-gov."):
            return True
        if of_openai and (found := _GPT.match(name)) and _version(found) >= (5, 4):
            return True
        if of_vertex and (found := _CLAUDE.match(name)) and _version(found) >= (4, 5):
            return True
    return False


def _version(found: re.Match[str]) -> tuple[int, int]:
    return int(found[1]), int(found[2] or 0)


def names_of(usage: Usage, aws: bool = False) -> list[str]:
    """What the model may be looked up by, the best first, in lower case.

    The response's word for it is the model that answered. On Bedrock the request's goes before it: only there is the
    region (`us.anthropic.…`), and the price is the region's.
    """
    said = (usage.request_model, usage.model) if aws else (usage.model, usage.request_model)
    return list(dict.fromkeys(_bare(name.lower()) for name in said if name))


def _bare(name: str) -> str:
    """Without the path that Google (`publishers/google/models/…`) and AWS (ARNs) put before it."""
    if name.startswith("arn:"):
        return name.rpartition("/")[2]
    before, found, after = name.rpartition("models/")
    return after if found and (not before or before.endswith("/")) and after else name


def counts_of(usage: Usage, rates: Rates) -> tuple[dict[str, Count], str | None]:
    """The counts of a record in the table's units, and why their sum would not be certain."""
    counts: dict[str, Count] = {}
    for name, unit in _COUNTS.items():
        if type(value := getattr(usage, name)) is int and value >= 0:
            counts[unit] = value
    life_is_told = _lives(counts, rates)
    unsure: str | None = None
    if usage.usage_state in (UsageState.PARTIAL, UsageState.ESTIMATED):
        unsure = f"{usage.usage_state}_usage"
    elif "input_tokens" not in counts and counts.get("output_tokens") and "input_tokens" in rates.priced:
        unsure = "partial_usage"  # there is none without; an output of nothing is left out by some
    elif not life_is_told:
        unsure = "cache_write_life"
    priced = rates.priced  # nothing at all: the model is free
    if priced and any(counts.get(whole) and whole not in priced for whole in WHOLES):  # not free: it is not known
        unsure = unsure or "unpriced_unit"
    if usage.units and not _take_units(usage, counts, priced):
        unsure = unsure or "unpriced_unit"
    if counts.get("cache_read_tokens") and not rates.priced.isdisjoint(_CACHED_BY_MODALITY.values()):
        for word, tokens in _cached_details(usage.raw_usage):
            if (cached := _CACHED_BY_MODALITY.get(word)) is not None:
                counts[cached] = counts.get(cached, 0) + tokens
    return counts, unsure


def _lives(counts: dict[str, Count], rates: Rates) -> bool:
    """Whether all that was written to a cache has the price of the time for which it is kept; what the lives add up to
    is written at least."""
    said = [counts[unit] for unit in ("cache_write_5m_tokens", "cache_write_1h_tokens") if unit in counts]
    written, told = counts.get("cache_write_tokens", 0), sum(said)
    if told > written:
        counts["cache_write_tokens"] = written = told
    if "cache_write_tokens" not in rates.priced:
        return True
    if "cache_write_1h_tokens" not in rates.priced:
        return not counts.get("cache_write_1h_tokens")  # billed like those of five minutes they would be too cheap
    return not said or told == written


def apart_of(provider: str, rates: Rates) -> tuple[str, ...]:
    """The fields of a usage whose tokens this provider prices apart, and these rates do not."""
    return tuple(name for name in _APART.get(provider, ()) if _COUNTS[name] not in rates.priced)


def stands_in(usage: Usage, apart: Iterable[str]) -> bool:
    """Whether the price of text stands in for that of other tokens: `apart`, as `apart_of` gives them."""
    return any(getattr(usage, name) and _ALL_OF_IT.get(usage.operation or "") != name for name in apart)


def _take_units(usage: Usage, counts: dict[str, Count], priced: frozenset[str]) -> bool:
    """Add the units of a record to the counts. Whether all that is billed of them has a price."""
    all_priced = True
    for name, amount in (usage.units or {}).items():
        units, count = BILLED.get(name), _count(amount)
        if count is None or units is None:
            continue
        if name == CITED:
            if priced.isdisjoint(units) or _in_input(usage):
                continue
            counts["output_tokens"] = counts.get("output_tokens", 0) + count
        if name == "audio_seconds" and usage.operation == "speech":
            units = ("audio_seconds", "output_audio_seconds")
        if units == _SEARCHES and count and _bills_prompts(usage):
            count = 1
        counts |= dict.fromkeys(units, count)
        if count and priced and priced.isdisjoint(units):
            all_priced = False
    return all_priced


def _in_input(usage: Usage) -> bool:
    """Whether the stated total had the citations inside, so that they are in the input already (O2)."""
    raw = usage.raw_usage
    said = raw.get("prompt_tokens") if type(raw) is dict else None
    return said != usage.input_tokens


def request_fee(raw: Any) -> int | None:
    """Of Perplexity's usage object: what it takes for the request itself, in pico-USD; it depends on the search."""
    cost = raw.get("cost") if type(raw) is dict else None
    return declared_of(cost.get("request_cost")) if type(cost) is dict else None


def wrong_fee(raw: Any) -> bool:
    """Whether a request cost another fee than the table's, which is that of the largest search."""
    size = raw.get("search_context_size") if type(raw) is dict else None
    return size is not None and size != "high" and request_fee(raw) is None


def differs(ours: int, text: object) -> bool:
    """Whether a stated cost is another one than ours, beyond the rounding of its last digit."""
    number = None if text is None else _decimal(str(text))
    if number is None:
        return False
    exponent = number.as_tuple().exponent
    last = Fraction(10) ** exponent * PICO if isinstance(exponent, int) else 0
    return abs(Fraction(number) * PICO - ours) >= max(last, ROUNDING)


def _bills_prompts(usage: Usage) -> bool:
    return (usage.provider or "").startswith("gcp.") and any(map(_BY_PROMPT.fullmatch, names_of(usage)))


def _cached_details(raw: Any) -> Iterator[tuple[str, int]]:
    """What of the cached tokens was audio, images and so on: only the vendor's own object tells it."""
    if type(raw) is not dict:
        return
    for key in _CACHED_DETAILS:  # OpenAI
        inner = raw[key].get("cached_tokens_details") if type(raw.get(key)) is dict else None
        for name, value in inner.items() if type(inner) is dict else ():
            if type(value) is int and value >= 0:
                yield str(name).removesuffix("_tokens"), value
    rows = raw.get("cacheTokensDetails")  # Gemini
    for row in rows if type(rows) is list else ():
        if type(row) is dict and type(value := row.get("tokenCount")) is int and value >= 0:
            yield str(row.get("modality")).lower(), value


def _count(value: object) -> Count | None:
    """A quantity as it was stated: seconds may have a fraction."""
    if type(value) is int:
        return value if value >= 0 else None
    if isinstance(value, (float, str, Decimal)):
        number = _decimal(str(value))
        return None if number is None else Fraction(number)
    return None


def _decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() and number >= 0 and number.adjusted() < _DIGITS_MAX else None


def declared_of(text: object) -> int | None:
    """The provider's own cost in pico-USD; None where it states none that can be read."""
    number = None if text is None else _decimal(str(text))
    return None if number is None else round(Fraction(number) * PICO)


def usage_of(row: Mapping[str, Any]) -> Usage:
    """The `usage` object of a record's JSON. Raises `ValueError` where it is none."""
    try:
        known = {name: row[name] for name in _USAGE_NAMES & row.keys()}
        return Usage(**{**known, "usage_state": UsageState(row["usage_state"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a record's usage: {type(error).__name__}: {error}") from None
