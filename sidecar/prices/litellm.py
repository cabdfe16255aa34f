"""LiteLLM's price file, read into the form of our table.

It is one flat object: the name of a model, often behind that of who serves it, and fields such as
`cache_read_input_token_cost_above_200k_tokens_priority` with an amount for one token. Tiers and contexts are in the
fields' names. What has no unit of ours (sizes of images, minutes of a session) is left out, and a model that has only
such prices with it: it is then unpriced, which is said, where a guess would not be.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any, Final

# The words of LiteLLM for who serves a model, where they are not the table's.
PROVIDERS: Final = {
    "text-completion-openai": "openai",
    "azure_text": "azure",
    "azure_ai": "azure",
    "bedrock": "aws",
    "bedrock_converse": "aws",
    "gemini": "google",
    "vertex_ai": "google",
    "cohere_chat": "cohere",
    "codestral": "mistral",
    "text-completion-codestral": "mistral",
    "xai": "x-ai",
    "together_ai": "together",
    "fireworks_ai": "fireworks",
    "fireworks_ai-embedding-models": "fireworks",
    "voyage": "voyageai",
    "moonshot": "moonshotai",
}
NOBODY: Final = "(?!)"  # matches no address

_TOKENS: Final = 1_000_000
_FIELDS: Final[Mapping[str, tuple[str, int]]] = {
    "input_cost_per_token": ("input_mtok", _TOKENS),
    "output_cost_per_token": ("output_mtok", _TOKENS),
    "cache_read_input_token_cost": ("cache_read_mtok", _TOKENS),
    "cache_creation_input_token_cost": ("cache_write_mtok", _TOKENS),
    "cache_creation_input_token_cost_above_1hr": ("cache_write_1h_mtok", _TOKENS),
    "input_cost_per_audio_token": ("input_audio_mtok", _TOKENS),
    "output_cost_per_audio_token": ("output_audio_mtok", _TOKENS),
    "cache_read_input_audio_token_cost": ("cache_audio_read_mtok", _TOKENS),
    "input_cost_per_image_token": ("input_image_mtok", _TOKENS),
    "output_cost_per_image_token": ("output_image_mtok", _TOKENS),
    "output_cost_per_reasoning_token": ("output_reasoning_mtok", _TOKENS),
    "input_cost_per_query": ("rerank_searches_kcount", 1000),
    "ocr_cost_per_page": ("input_document_kpages", 1000),
    "input_cost_per_second": ("audio_hours", 3600),
}
_CONTEXTS: Final[Mapping[str, Mapping[str, str]]] = {
    "batches": {"processing": "batch"},
    "priority": {"service_tier": "priority"},
    "flex": {"service_tier": "flex"},
}
_FIELD: Final = re.compile(
    rf"({'|'.join(sorted(_FIELDS, key=len, reverse=True))})(?:_above_(\d+)k_tokens)?(?:_({'|'.join(_CONTEXTS)}))?"
)


def from_litellm(document: Mapping[str, Any], known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The providers of this file. `known`: rows of another table, from which addresses are taken. Amounts are not
    checked here."""
    by_id = {row["id"]: row for row in known}
    models: dict[str, dict[str, dict[str, Any]]] = {}
    for key, fields in document.items():
        if key == "sample_spec" or not isinstance(fields, Mapping):
            continue
        word = str(fields.get("litellm_provider") or "")
        prices = _prices(fields)
        if not word or prices is None:
            continue
        family = word.split("-", 1)[0] if word.startswith("vertex_ai-") else word
        provider = PROVIDERS.get(family, family)
        name = key.removeprefix(f"{family}/").removeprefix(f"{provider}/").removeprefix("bedrock/")
        own = models.setdefault(provider, {})
        if name not in own or name == key:  # a plain name goes before one behind a prefix
            said = {"input_tokens_max": "max_input_tokens", "output_tokens_max": "max_output_tokens"}
            ceilings = {ours: fields[theirs] for ours, theirs in said.items() if type(fields.get(theirs)) is int}
            own[name] = {"id": name, "match": {"equals": name}, **prices, **ceilings}
    rows = []
    for provider, own in sorted(models.items()):
        base = by_id.get(provider, {"api_pattern": NOBODY, "provider_match": {"equals": provider}})
        kept = {k: v for k, v in base.items() if k != "models"}
        rows.append({**kept, "id": provider, "models": [own[name] for name in sorted(own)]})
    return rows


def _times(value: Any, per: int) -> Any:
    """What is no amount is left as it is, so that whoever checks amounts names it: a price that was left out would be
    one of nothing."""
    if isinstance(value, str):
        try:
            value = Decimal(value)
        except InvalidOperation:
            return value
    return value * per if isinstance(value, (int, Decimal)) and not isinstance(value, bool) else value


def _prices(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    standard: dict[str, Any] = {}
    variants: dict[str, dict[str, Any]] = {}
    tiers: list[tuple[int, str, str | None, Any]] = []  # above, of which price, of which service tier, how much
    for field in sorted(fields):
        value = fields[field]
        found = _FIELD.fullmatch(field)
        if found is None or value is None:
            continue
        price_key, per = _FIELDS[found[1]]
        if price_key == "audio_hours" and fields.get("mode") != "audio_transcription":
            continue
        amount = _times(value, per)
        prices = variants.setdefault(found[3], {}) if found[3] else standard
        if found[2] is None:
            prices[price_key] = amount
        else:
            tiers.append((int(found[2]) * 1000, price_key, found[3], amount))
    if not standard:
        return None
    bases = dict(standard)
    for start, price_key, word, amount in tiers:  # now that all bases are known, whose names may stand behind theirs
        prices = variants[word] if word else standard
        base = prices.get(price_key, bases.get(price_key))  # below its tier a service tier may cost what others do
        if base is None:
            continue
        if not isinstance(base, Mapping):
            base = prices[price_key] = {"base": base, "tiers": []}
        base["tiers"].append({"start": start, "price": amount})
    return {
        "prices": standard,
        "price_variants": [{"when": _CONTEXTS[word], "prices": prices} for word, prices in sorted(variants.items())],
    }
