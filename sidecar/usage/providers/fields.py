"""The members of a usage object under all the names that vendors give them, and how they become our fields.

The rules O1 to O5 and V3 are those of docs/usage-formats.md.

One helper for every family that states tokens in OpenAI's manner (chat, completions, responses, embeddings, sound,
pictures, realtime, and the native APIs whose members are renamed to it), so that a cost, a cache write or a detail that
one vendor states is read in every shape. Names are data: a name that is wrong costs a line of a table.

Where the names are from: OpenAI's, Anthropic's, Mistral's, Groq's and Perplexity's packages; LiteLLM's `Usage` for the
`cache_creation_*` ones; public captures for DashScope (`prompt_tokens_details.cache_creation_input_tokens`), Writer
(`prompt_token_details`), xAI (`cost_in_usd_ticks`), DeepInfra (`estimated_cost`). Unverified, from memory of vendors'
pages: `rerank_units` (Pinecone), `generated_images` (Ark), `image_count` (DashScope), `cached_input_tokens`,
`cached_prompt_tokens`, and the spellings of a cost beside these, `cost` and `cost.total_cost`.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, localcontext
from itertools import combinations
from typing import Any

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import Document, Reader
from sidecar.usage.values import COUNT_MAX, count, decimal_text, name, part, plain_decimal, quantity

_READ, _WRITE = "cache_read_input_tokens", "cache_write_input_tokens"

# The two wholes, the more telling name first.
_INPUT = ("prompt_tokens", "input_tokens")
_OUTPUT = ("completion_tokens", "output_tokens")
_PLAIN = frozenset((*_INPUT, *_OUTPUT, "total_tokens"))

_ELSEWHERE = {  # where none of these stands there: the names of families with a reader of their own, by gateways
    "promptTokens": "prompt_tokens",
    "completionTokens": "completion_tokens",
    "inputTokens": "input_tokens",
    "outputTokens": "output_tokens",
    "totalTokens": "total_tokens",
    "promptTokenCount": "prompt_tokens",
    "candidatesTokenCount": "completion_tokens",
    "totalTokenCount": "total_tokens",
    "prompt_token_count": "prompt_tokens",
    "candidates_token_count": "completion_tokens",
    "total_token_count": "total_tokens",
    "input_token_count": "input_tokens",
    "output_token_count": "output_tokens",
    "generation_token_count": "completion_tokens",
    "generated_token_count": "completion_tokens",
    "prompt_eval_count": "prompt_tokens",
    "eval_count": "completion_tokens",
    "cacheReadInputTokens": "cache_read_input_tokens",
    "cacheWriteInputTokens": "cache_creation_input_tokens",
    "cachedContentTokenCount": "cached_tokens",
    "thoughtsTokenCount": "reasoning_tokens",
}

_CACHE = {
    "cached_tokens": _READ,
    "cache_read_tokens": _READ,
    "cache_read_input_tokens": _READ,
    "cache_write_tokens": _WRITE,
    "cache_write_input_tokens": _WRITE,
    "cache_creation_tokens": _WRITE,
    "cache_creation_input_tokens": _WRITE,
}
INPUT_DETAILS = {
    **_CACHE,
    "audio_tokens": "audio_input_tokens",
    "text_tokens": "text_input_tokens",
    "image_tokens": "image_input_tokens",
}
OUTPUT_DETAILS = {
    "reasoning_tokens": "reasoning_output_tokens",
    "thinking_tokens": "reasoning_output_tokens",
    "audio_tokens": "audio_output_tokens",
    "accepted_prediction_tokens": "accepted_prediction_tokens",
    "rejected_prediction_tokens": "rejected_prediction_tokens",
    "text_tokens": "text_output_tokens",
    "image_tokens": "image_output_tokens",
}
_DETAILS: Mapping[str, Mapping[str, str]] = {
    "prompt_tokens_details": INPUT_DETAILS,
    "prompt_token_details": INPUT_DETAILS,
    "input_tokens_details": INPUT_DETAILS,
    "input_token_details": INPUT_DETAILS,
    "completion_tokens_details": OUTPUT_DETAILS,
    "completion_token_details": OUTPUT_DETAILS,
    "output_tokens_details": OUTPUT_DETAILS,
    "output_token_details": OUTPUT_DETAILS,
}
_BESIDE = {  # parts that stand beside the wholes
    **_CACHE,
    "prompt_cache_hit_tokens": _READ,  # O4: a part of the prompt
    "cached_input_tokens": _READ,
    "cached_prompt_tokens": _READ,
    "reasoning_tokens": "reasoning_output_tokens",
    "reasoning_output_tokens": "reasoning_output_tokens",
    "thinking_tokens": "reasoning_output_tokens",
    "connector_tokens": "tool_use_input_tokens",  # Mistral's agents
    "tool_use_input_tokens": "tool_use_input_tokens",
    "text_input_tokens": "text_input_tokens",
    "image_input_tokens": "image_input_tokens",
    "audio_input_tokens": "audio_input_tokens",
}
_SPLITS = ("cache_creation", "cache_creation_token_details")  # of a cache write, by how long it is kept
_LASTING = {
    "ephemeral_5m_input_tokens": "cache_write_5m_input_tokens",
    "ephemeral_1h_input_tokens": "cache_write_1h_input_tokens",
}
_UNITS = {
    "num_search_queries": "search_queries",
    "citation_tokens": "citation_tokens",
    "prompt_audio_seconds": "audio_seconds",
    "audio_seconds": "audio_seconds",
    "seconds": "audio_seconds",  # OpenAI's and vLLM's `type: duration`
    "rerank_units": "search_units",
    "generated_images": "images",
    "image_count": "images",
    "characters": "characters",
}
_GIVES_AWAY = {  # a member that only one provider has
    "prompt_cache_hit_tokens": "deepseek",
    "is_byok": "openrouter",
    "cost_in_usd_ticks": "x_ai",
    "rerank_units": "pinecone",
}
_COSTS: tuple[tuple[str, int], ...] = (  # name, power of ten
    ("cost_in_usd_ticks", -10),
    ("cost", 0),
    ("total_cost", 0),
    ("cost_usd", 0),
    ("total_cost_usd", 0),
    ("estimated_cost", 0),
)
_COST_TOTALS = ("total_cost", "total", "total_cost_usd", "usd")  # where a cost is an object
_DOLLARS = (None, "USD", "usd")
_NO_FIELD = ("citation_tokens",)  # Perplexity: read by the model, billed, and of neither whole: a unit
_MONEY = frozenset((*(name for name, _ in _COSTS), "cost_details"))


def fill_tokens(reader: Reader, usage: Usage, raw: Document) -> None:
    """A usage object in OpenAI's manner; both of its dialects, mixed or not."""
    usage.input_tokens = _first(reader, raw, _INPUT)
    usage.output_tokens = _first(reader, raw, _OUTPUT)
    if _PLAIN.isdisjoint(raw) and not _ELSEWHERE.keys().isdisjoint(raw):
        fill_tokens(reader, usage, {_ELSEWHERE.get(key, key): value for key, value in raw.items()})
        return
    if len(raw) > 3 or not raw.keys() <= _PLAIN:
        fill_parts(reader, usage, raw)
        if anthropic_names(raw) and usage.input_tokens is not None:
            usage.input_tokens += (usage.cache_read_input_tokens or 0) + (usage.cache_write_input_tokens or 0)
        settle_parts(usage)
    settle_total(usage, raw)


def fill_parts(reader: Reader, usage: Usage, raw: Document) -> None:
    """All that stands beside the two wholes: details, cache counts, units, the cost. One look at each member."""
    beside = costs = False
    for key, value in raw.items():
        if key in _PLAIN or value is None:
            continue
        if (fields := _DETAILS.get(key)) is not None:
            if type(value) is dict:
                _take(reader, usage, value, fields)
        elif key in _BESIDE or key in _SPLITS:
            beside = True
        elif (unit := _UNITS.get(key)) is not None:
            if (amount := quantity(value)) is not None:
                usage.units[unit] = amount
        elif key in _MONEY:
            costs = True
        if (provider := _GIVES_AWAY.get(key)) is not None:
            reader.provider = reader.provider or provider
    if beside:
        _take(reader, usage, raw, _BESIDE)
    if costs:
        usage.cost_usd = stated_cost(raw)
        if type(raw.get("cost")) is dict:
            reader.provider = reader.provider or "perplexity"
    kept = usage.cache_write_5m_input_tokens, usage.cache_write_1h_input_tokens
    if usage.cache_write_input_tokens is None and kept != (None, None):
        usage.cache_write_input_tokens = sum(amount or 0 for amount in kept)  # stated only by how long it is kept


def google_tier(traffic: object) -> str | None:
    """The service tier of Google's `TrafficType` (https://github.com/googleapis/python-genai): `ON_DEMAND_PRIORITY` is
    what others call priority, `PROVISIONED_THROUGHPUT` a tier of its own."""
    word = name(traffic)
    return None if word is None else word.removeprefix("ON_DEMAND_").lower()


def stated_cost(raw: Document) -> str | None:
    """What the call cost, where the provider says it, exactly.

    With a key of the customer's own (`is_byok`) OpenRouter's `cost` is its fee alone, and what the provider behind it
    charges stands beside it: the call costs both.
    """
    details = part(raw.get("cost_details"))
    behind = decimal_text(details.get("upstream_inference_cost"))
    for key, exponent in _COSTS:
        value = raw.get(key)
        if type(value) is dict:
            value = _total_of(value)
        if (cost := decimal_text(value, exponent)) is not None:
            return _sum(cost, behind) if raw.get("is_byok") is True and behind is not None else cost
    return decimal_text(_total_of(details)) or behind


def settle_parts(usage: Usage) -> None:
    """A part that is larger than its whole cannot be inside of it: it stands beside it, and is added."""
    said, reasoning = usage.output_tokens, usage.reasoning_output_tokens
    if said is not None and reasoning is not None and reasoning > said:
        usage.output_tokens = said + reasoning
    entered = usage.input_tokens
    if entered is None:
        return
    cached = (usage.cache_read_input_tokens or 0) + (usage.cache_write_input_tokens or 0)
    for outside in (cached, usage.audio_input_tokens or 0, usage.image_input_tokens or 0):
        if outside > entered:
            usage.input_tokens = entered = entered + outside


def settle_total(usage: Usage, raw: Document) -> None:
    """O2: a stated total that is larger than input and output tells what was left out of them; a smaller one, nothing.

    Named parts that add up to the difference stand beside their whole; a rest that no part of the input
    explains is output that was hidden. Where only one of the two is stated, the other one is the rest.
    """
    total = count(raw.get("total_tokens"))
    if total is None:
        return
    entered, said = usage.input_tokens, usage.output_tokens
    rest = total - (entered or 0) - (said or 0)
    if rest == 0 and entered is not None:
        return
    if entered is None and said is None:
        usage.total_tokens = total
    elif entered is None:
        usage.input_tokens = rest if rest > 0 and not _stated(raw, _INPUT) else None
        usage.total_tokens = max(total, said or 0)
    elif rest > 0 and (said is not None or not _stated(raw, _OUTPUT)):
        beside = _of_input(usage, raw, rest) if said is not None else 0
        usage.input_tokens = entered + beside
        usage.output_tokens = (said or 0) + rest - beside


def _stated(raw: Document, names: tuple[str, ...]) -> bool:
    """Whether something stands there: a number that was rejected is not made up from the others (V3)."""
    return any(raw.get(name) is not None for name in names)


def _of_input(usage: Usage, raw: Document, rest: int) -> int:
    """How much of the rest is input: named parts of it that, with the reasoning or without, add up to the rest."""
    reasoning = usage.reasoning_output_tokens or 0
    if rest == reasoning:
        return 0
    parts = [
        usage.tool_use_input_tokens or 0,
        (usage.cache_read_input_tokens or 0) + (usage.cache_write_input_tokens or 0),
        usage.audio_input_tokens or 0,
        *(count(raw.get(key)) or 0 for key in _NO_FIELD),
    ]
    parts = [amount for amount in parts if 0 < amount <= rest]
    for size in range(1, len(parts) + 1):
        for some in combinations(parts, size):
            if sum(some) in (rest, rest - reasoning):
                return sum(some)
    return 0


def anthropic_names(raw: Document) -> bool:
    """Anthropic's own usage object on another family's route: there the cache counts stand beside the input (O1).

    Where a total is stated, that decides.
    """
    named = "cache_read_input_tokens" in raw or "cache_creation_input_tokens" in raw
    return named and not ("prompt_tokens" in raw or "total_tokens" in raw or "input_tokens_details" in raw)


def _first(reader: Reader, raw: Document, names: tuple[str, str]) -> int | None:
    """The first that is stated and not zero: gateways write zeros under the names that they do not use."""
    found = reader.number(raw, names[0])
    return found or (other if (other := reader.number(raw, names[1])) is not None else found)


def _take(reader: Reader, usage: Usage, raw: Document, fields: Mapping[str, str]) -> None:
    """Parts of one object; a number that is known already is not replaced by its copy, nor by a zero."""
    for key, value in raw.items():
        field = fields.get(key)
        if field is None:
            if key in _SPLITS and fields is not _LASTING and type(value) is dict:
                _take(reader, usage, value, _LASTING)
        elif value is not None and not getattr(usage, field):
            number = value if type(value) is int and 0 <= value <= COUNT_MAX else reader.number(raw, key)
            if number is not None:
                setattr(usage, field, number)


def _total_of(cost: Document) -> Any:
    if cost.get("currency") not in _DOLLARS:
        return None
    return next((cost[key] for key in _COST_TOTALS if cost.get(key) is not None), None)


def _sum(one: str, other: str) -> str:
    with localcontext() as context:
        context.prec = 100  # two numbers of at most 13 digits before the point and some 70 behind it
        return plain_decimal(Decimal(one) + Decimal(other))
