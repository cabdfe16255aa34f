"""What a record can be asked for by name: in filters, as the value of a meter, in expressions, on the wire.

One flat table, so that a filter written for the ledger means the same at a backend whose own filters see
first-level properties only. A dimension `team` is `dimension_team`, a unit `audio_seconds` is
`unit_audio_seconds`; characters that no identifier has become `_`. What a record does not know is None.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from functools import partial
from typing import Any, Final

from sidecar.meters.hourly import TOKENS, read_amount, subscriber_of, usd_of
from sidecar.model.call_group import APART, SUMMED
from sidecar.model.exchange import Outcome
from sidecar.model.record import Record

Value = str | int | Decimal | bool | None
DIMENSION: Final = "dimension_"
UNIT: Final = "unit_"

_NEVER_ANSWERED: Final = frozenset({Outcome.DENIED, Outcome.REFUSED, Outcome.UNREACHABLE, Outcome.UNKNOWN})
_MORE_TOKENS: Final = (
    "cache_write_5m_input_tokens",
    "cache_write_1h_input_tokens",
    "tool_use_input_tokens",
    "text_input_tokens",
    "image_input_tokens",
    "audio_input_tokens",
    "text_output_tokens",
    "image_output_tokens",
    "audio_output_tokens",
    "accepted_prediction_tokens",
    "rejected_prediction_tokens",
)


def answered(record: Record) -> bool:
    """Whether the upstream began an answer, of any status: the calls that a meter measures at all.

    A message of a WebSocket is one half of an answer by itself and has no first byte of its own.
    """
    if record.outcome in _NEVER_ANSWERED:
        return False
    return record.first_byte_ms is not None or record.parent_id is not None


def _of_usage(name: str) -> Callable[[Record], Value]:
    def get(record: Record) -> Value:
        if record.usage is None:
            return None
        value: Value = getattr(record.usage, name)
        return value

    return get


def _tokens(name: str) -> Callable[[Record], Value]:
    def get(record: Record) -> Value:
        value = None if record.usage is None else getattr(record.usage, name)
        return value if type(value) is int else None

    return get


def _millis(value: float | None) -> Value:
    return None if value is None else read_amount(value)


def _status_class(record: Record) -> Value:
    return None if record.status is None else f"{record.status // 100}xx"


def _finish_reason(record: Record) -> Value:
    return record.usage.finish_reasons[0] if record.usage is not None and record.usage.finish_reasons else None


TEXTS: Final[Mapping[str, Callable[[Record], Value]]] = {
    "kind": lambda r: "call" if r.parent_id is None else "message",
    "subscriber": subscriber_of,
    "method": lambda r: r.method,
    "route": lambda r: r.route,
    "status_class": _status_class,
    "outcome": lambda r: str(r.outcome),
    "provider": _of_usage("provider"),
    "operation": _of_usage("operation"),
    "model": _of_usage("model"),
    "request_model": _of_usage("request_model"),
    "service_tier": _of_usage("service_tier"),
    "finish_reason": _finish_reason,
    "usage_state": lambda r: None if r.usage is None else str(r.usage.usage_state),
}
WHOLE: Final[Mapping[str, Callable[[Record], Value]]] = {
    "status": lambda r: r.status,
    "request_bytes": lambda r: r.request_bytes,
    "response_bytes": lambda r: r.response_bytes,
    **{name: _tokens(name) for name in (*TOKENS, *_MORE_TOKENS)},
}
DECIMAL: Final[Mapping[str, Callable[[Record], Value]]] = {
    "duration_ms": lambda r: _millis(r.duration_ms),
    "first_byte_ms": lambda r: _millis(r.first_byte_ms),
    "cost_usd": usd_of,
    "charge": lambda r: None if r.charge is None else read_amount(r.charge.get("total")),
}
# What providers count beside tokens, as `usage.units` has it (`sidecar.usage.providers`).
PROVIDER_UNITS: Final[Mapping[str, str]] = {
    "advisor_tokens": "tokens of another model that Anthropic's asked on the way",
    "annotated_pages": "pages that were read and annotated",
    "audio_seconds": "seconds of audio",
    "billable_characters": "characters that Google bills",
    "billable_units": "fal's units",
    "characters": "characters of speech",
    "citation_tokens": "tokens of what Perplexity cites",
    "classifications": "Cohere's classifications",
    "code_execution_requests": "runs of code that a model asked for",
    "image_tool_tokens": "tokens of the tool that makes pictures for a model",
    "images": "images that were made, or read",
    "pages": "pages that were read",
    "predict_seconds": "seconds that a prediction ran",
    "search_queries": "queries to a search engine",
    "search_units": "units of a reranking",
    "web_fetch_requests": "pages that a model fetched",
    "web_search_requests": "searches that a model made",
}
# Amounts of money, exact to the last digit: a sum of them is an invoice.
MONEY: Final = frozenset({"cost_usd", "charge"})
FLAGS: Final[Mapping[str, Callable[[Record], Value]]] = {"streamed": _of_usage("streamed")}
FIXED: Final[Mapping[str, Callable[[Record], Value]]] = {**TEXTS, **WHOLE, **DECIMAL, **FLAGS}


ABOUT: Final[Mapping[str, str]] = {
    "kind": "`call`, or `message` for one of a WebSocket",
    "subscriber": "who pays; `unauthenticated` where the upstream turned the credential down",
    "method": "GET, POST, …",
    "route": "the pattern of the path, where one is set or known",
    "status_class": "`2xx`, `3xx`, `4xx`, `5xx`",
    "outcome": "how the call ended: `complete`, `client_left`, `upstream_broke`, … (docs/record.md)",
    "provider": "of a model call: `openai`, `anthropic`, …",
    "operation": "`chat`, `embeddings`, `rerank`, …",
    "model": "that responded",
    "request_model": "that was asked for",
    "service_tier": "as the provider states it",
    "finish_reason": "the first one",
    "usage_state": "`final`, `partial`, `estimated`, `absent`",
    "status": "as the client was sent it",
    "request_bytes": "of the request's body",
    "response_bytes": "of the response's body",
    "input_tokens": "all of them: cached ones are inside",
    "output_tokens": "all of them: reasoning is inside",
    "total_tokens": "both together",
    "cache_read_input_tokens": "of the input: read from a cache",
    "cache_write_input_tokens": "of the input: written to a cache",
    "reasoning_output_tokens": "of the output: reasoning",
    "duration_ms": "from the request to the last byte, milliseconds",
    "first_byte_ms": "to the response's first byte",
    "cost_usd": "what the call cost, in US dollars: exact (docs/prices.md)",
    "charge": "what its customer is charged, in the currency of that price",
    "streamed": "whether the response came as a stream",
}


def type_of(name: str) -> str:
    """What a property is: `text`, `whole`, `decimal` or `flag`."""
    if name in TEXTS or name.startswith(DIMENSION):
        return "text"
    if name in FLAGS:
        return "flag"
    return "whole" if name in WHOLE else "decimal"


def about(name: str) -> str:
    """What a property says of a call, in a few words."""
    if name in ABOUT:
        return ABOUT[name]
    side = "input" if "input" in name else "output"
    return f"of the {side}: {name.removesuffix(f'_{side}_tokens').removesuffix('_tokens').replace('_', ' ')}"


def dimension_name(name: str) -> str:
    """The property of a dimension."""
    return _identifier(DIMENSION, name)


def unit_name(name: str) -> str:
    """The property of a unit or of an own field."""
    return _identifier(UNIT, name)


# What providers call these things, and people after them.
_OTHERS_SAY: Final[Mapping[str, str]] = {
    "prompt_tokens": "input_tokens",
    "completion_tokens": "output_tokens",
    "tokens": "total_tokens",
    "customer": "subscriber",
    "path": "route",
    "url": "route",
    "cost": "cost_usd",
    "latency": "duration_ms",
    "latency_ms": "duration_ms",
}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The properties that there are with these settings: `dimensions` and `units` are the names of own ones, as they
    are set. None: not known, so every name that could be one is taken for one."""

    dimensions: frozenset[str] | None = None
    units: frozenset[str] | None = None

    @classmethod
    def of(cls, dimensions: Iterable[str], elements: Iterable[str]) -> Vocabulary:
        return cls(frozenset(dimensions), frozenset(elements) | PROVIDER_UNITS.keys())

    def names(self) -> list[str]:
        """All of them that are known, the own ones last."""
        own = [_identifier(DIMENSION, name) for name in sorted(self.dimensions or ())]
        return [*FIXED, *own, *(_identifier(UNIT, name) for name in sorted(self.units or ()))]

    def knows(self, name: str) -> bool:
        if name in FIXED:
            return True
        if not is_property(name):
            return False
        prefix, own = (DIMENSION, self.dimensions) if name.startswith(DIMENSION) else (UNIT, self.units)
        return own is None or any(_identifier(prefix, each) == name for each in own)

    def suggestion(self, name: str) -> str:
        """`; did you mean …?` for a name that is none, or where to find them all."""
        rest = re.sub(r"[^A-Za-z0-9_]", "_", name).strip("_")
        for word in ("usage_", "units_", "dimensions_", "unit_", "dimension_"):
            rest = rest.removeprefix(word)
        known = self.names()
        # Of the own fields the plain name is what people know: they wrote it.
        by_rest: dict[str, str] = {}
        for each in known:
            by_rest.setdefault(each.removeprefix(UNIT).removeprefix(DIMENSION).lower(), each)
        close = get_close_matches(name, known, n=2, cutoff=0.75)
        rest = _OTHERS_SAY.get(rest.lower(), rest)
        near = [by_rest[rest.lower()]] if rest.lower() in by_rest else []
        if not near:
            near = [by_rest[each] for each in get_close_matches(rest.lower(), by_rest, n=2, cutoff=0.75)] or close
        listed = "`metering-sidecar meters properties` lists them"
        if name.startswith((UNIT, DIMENSION)) and not near:
            where = "[elements]" if name.startswith(UNIT) else "[dimensions]"
            return f"; {where} names the own ones, and {listed}"
        return f"; did you mean {' or '.join(near)}?" if near else f"; {listed}"


def is_property(name: str) -> bool:
    """Whether a definition may use this name."""
    return name in FIXED or re.fullmatch(rf"({DIMENSION}|{UNIT})[A-Za-z0-9_]{{1,64}}", name) is not None


def differs_in_group(name: str) -> bool:
    """Whether calls of one group (`model.call_group`) may differ in this property."""
    return name in SUMMED or name in APART or name.startswith(UNIT)


def value_of(record: Record, name: str) -> Value:
    """One property, or None where the record does not know it."""
    getter = FIXED.get(name)
    return _named(record, name) if getter is None else getter(record)


def reader_of(name: str) -> Callable[[Record], Value]:
    """The same for many records: what reads this one property."""
    return FIXED.get(name) or partial(_named, name=name)


def _named(record: Record, name: str) -> Value:
    """A dimension or a unit."""
    if name.startswith(DIMENSION):
        return next((v for n, v in record.dimensions.items() if _identifier(DIMENSION, n) == name), None)
    if name.startswith(UNIT) and record.usage is not None:
        return next((read_amount(v) for n, v in record.usage.units.items() if _identifier(UNIT, n) == name), None)
    return None


def text_of(value: Value) -> str | None:
    """A value as filters, groups and unique counts compare it."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int) else format(value.normalize(), "f")


def properties(record: Record) -> dict[str, Value]:
    """Every property that the record knows, in a fixed order."""
    found = {name: get(record) for name, get in FIXED.items()}
    found |= {_identifier(DIMENSION, name): value for name, value in sorted(record.dimensions.items())}
    if record.usage is not None:
        found |= {_identifier(UNIT, n): read_amount(v) for n, v in sorted(record.usage.units.items())}
    return {name: value for name, value in found.items() if value is not None}


def as_json(values: Mapping[str, Value], *, money: Callable[[Decimal], object]) -> dict[str, Any]:
    """The same as JSON values: numbers stay numbers, since backends sum no texts. `money` writes the amounts of money,
    of which a float could lose digits."""
    return {
        name: value if not isinstance(value, Decimal) else money(value) if name in MONEY else _number(value)
        for name, value in values.items()
    }


def _number(value: Decimal) -> int | float:
    return int(value) if value == value.to_integral_value() and abs(value) < 2**63 else float(value)


def _identifier(prefix: str, name: str) -> str:
    return prefix + re.sub(r"[^A-Za-z0-9_]", "_", name)[:64]
