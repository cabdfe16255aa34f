"""The record's form as a JSON Schema (draft 2020-12), made from the model: `python -m sidecar.model.record_schema`.

What a reader may rely on: every field that is required is there, a field is of its type, and further fields may come.
What is cut or could not be stored as it was is a text like any other (a cut one ends with `…`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

from sidecar.model.exchange import (
    USAGE_FIELDS,
    Outcome,
    Usage,
    UsageState,
)
from sidecar.model.record import RECORD_VERSION, USAGE_CORE, WHOLE

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
AMOUNT: Final = r"^-?[0-9]+(\.[0-9]+)?$"  # a decimal as text

# Every field with its schema and what it says; in the order of the line.
Field = tuple[dict[str, Any], str]


def _text(*, null: bool = True) -> dict[str, Any]:
    return {"type": ["string", "null"] if null else "string"}


def _count() -> dict[str, Any]:
    return {"type": "integer", "minimum": 0}


def _millis() -> dict[str, Any]:
    return {"type": ["number", "null"], "minimum": 0}


_AMOUNT: Final[dict[str, Any]] = {"type": ["string", "null"], "pattern": AMOUNT}
_MONEY: Final[dict[str, Any]] = {
    "type": ["object", "null"],
    "properties": {
        "currency": {"type": ["string", "null"], "pattern": "^[A-Z]{3}$"},
        "total": _AMOUNT,
        "parts": {"type": ["object", "null"], "additionalProperties": {"type": "string", "pattern": AMOUNT}},
        "state": {"enum": ["exact", "estimated", "declared", "unpriced"]},
        "source": _text(),
        "model": _text(),
        "reason": _text(null=False),
        "declared": _AMOUNT,
    },
    "required": ["currency", "total", "parts", "state", "source", "model"],
    "additionalProperties": True,
}
_SUBSCRIBER: Final[dict[str, Any]] = {
    "type": ["object", "null"],
    "properties": {"id": _text(null=False), "source": _text(null=False)},
    "required": ["id", "source"],
    "additionalProperties": True,
}
_AMOUNTS: Final[dict[str, Any]] = {
    "type": "object",
    "additionalProperties": {"type": ["integer", "string"], "pattern": f"^{WHOLE.pattern}$"},
}
_GATE: Final[dict[str, Any]] = {
    "type": "object",
    "properties": {
        "decision": {"enum": ["allowed", "denied", "shadow", "undecided"]},
        "limit": _text(),
        "source": _text(null=False),
        "age_s": {"type": "number", "minimum": 0},
        "reserved": _AMOUNTS,
        # Of what is reserved, by limit, but for those that count calls.
        "units": {"type": "object", "additionalProperties": _text(null=False)},
        "sent": {"const": False},  # only where nothing of the call went upstream
        "at_most": _AMOUNTS,  # only where the request ended before its time
    },
    "required": ["decision", "limit", "source", "age_s"],
    "additionalProperties": True,
}
_NAMES: Final[dict[str, Any]] = {"type": "array", "items": _text(null=False)}

USAGE_ABOUT: Final[Mapping[str, str]] = {
    "usage_state": "`final`: as the provider states it; `partial`: a lower bound, the end was not seen; `absent`: the "
    "response said nothing; `estimated`: by us",
    "provider": "`openai`, `anthropic`, …: OpenTelemetry's word where it has one",
    "operation": "`chat`, `embeddings`, `rerank`, …",
    "streamed": "whether the response came as a stream",
    "model": "that responded",
    "request_model": "that was asked for",
    "response_id": "the provider's id of the response",
    "upstream_request_id": "the provider's id of the call",
    "input_tokens": "all of them: cached ones are inside",
    "output_tokens": "all of them: reasoning is inside",
    "total_tokens": "both together",
    "units": "what is counted beside tokens, own fields among them; a decimal may be a text",
    "cost_usd": "a decimal, only where the provider states it",
    "finish_reasons": "the provider's own words",
    "service_tier": "as the provider states it",
    "time_to_first_token_ms": "milliseconds",
    "error": "the provider's error type, also under status 200",
    "reason": "why usage is absent or partial",
    "raw_usage": "the provider's own usage object, as it came",
}


def usage_about(name: str) -> str:
    """What a field of `usage` says."""
    side = "input" if "input" in name else "output"
    part = name.removesuffix("_tokens").removesuffix(f"_{side}").replace("_", " ")
    return USAGE_ABOUT.get(name) or f"of the {side}: {part}"


def _usage_schema() -> dict[str, Any]:
    hints = get_type_hints(Usage)
    properties = {name: _of(hints[name]) | {"description": usage_about(name)} for name in USAGE_FIELDS}
    properties["cost_usd"]["pattern"] = r"^[+-]?[0-9.eE+-]+$"
    return {
        "type": ["object", "null"],
        "properties": properties,
        "required": sorted(USAGE_CORE),
        "additionalProperties": True,
    }


def _of(hint: Any) -> dict[str, Any]:
    """The schema of a field of the model. A whole number that JSON readers would cut is written as text."""
    if hint is Any:
        return {}
    if isinstance(hint, type) and issubclass(hint, UsageState):
        return {"enum": [str(state) for state in UsageState]}
    if get_origin(hint) in (Union, UnionType):
        options = [option for option in get_args(hint) if option is not NoneType]
        names = {name for option in options for name in _names_of(option)}
        return {"type": sorted(names | ({"null"} if NoneType in get_args(hint) else set()))}
    if get_origin(hint) is list:
        return {"type": "array", "items": _of(get_args(hint)[0])}
    if get_origin(hint) is dict:
        return {"type": "object", "additionalProperties": _of(get_args(hint)[1])}
    return {"type": sorted(_names_of(hint))}


def _names_of(hint: type) -> list[str]:
    return {str: ["string"], bool: ["boolean"], int: ["integer", "string"], float: ["number"]}[hint]


FIELDS: Final[Mapping[str, Field]] = {
    "id": ({"type": "string", "minLength": 1, "maxLength": 36}, "of the call, for ever: ordered by time"),
    "seq": (_count(), "its number among the records of this instance, from 1, without gaps"),
    "instance": (_text(null=False), "the data directory whose record it is"),
    "version": ({"const": RECORD_VERSION}, "of this form; absent in records of before it had one"),
    "upstream": (_text(), "which of several upstreams; null or absent where there is one"),
    "parent_id": (_text(), "of a message of a WebSocket: the record of the connection; else null"),
    "started_at": ({"type": "string", "format": "date-time", "pattern": "Z$"}, "UTC, to the microsecond"),
    "first_byte_ms": (_millis(), "to the first byte of the upstream's response; null: there was none"),
    "duration_ms": (_millis(), "to the last byte; null: nobody saw the end"),
    "method": (_text(null=False), "GET, POST, …"),
    "url": (_text(null=False), "upstream's base and path; of a query the names, without values"),
    "route": (_text(), "the pattern of the path, where one is set or known"),
    "status": ({"type": ["integer", "null"], "minimum": 100, "maximum": 999}, "as the client was sent it; null: none"),
    "outcome": ({"enum": [str(outcome) for outcome in Outcome]}, "how the call ended, below"),
    "request_headers": (_NAMES, "names alone, in order, as they were spelled"),
    "response_headers": (_NAMES, "the same"),
    "request_bytes": (_count(), "of the body, as it went over the wire"),
    "response_bytes": (
        _count(),
        "the same; what comes in a later read than a stream's own end mark is passed on and not in it",
    ),
    "client_ip": (_text(), "of the connection, or as a trusted proxy states it"),
    "user_agent": (_text(), "the header"),
    "trace_id": (_text(), "of `traceparent`"),
    "subscriber": (_SUBSCRIBER, "who pays: `id`, and the `source` that said so; null: nobody is known"),
    "dimensions": ({"type": "object", "additionalProperties": {"type": "string"}}, "what the call is filed under"),
    "usage": (_usage_schema(), "what was consumed, below; null: no model call, and no own field"),
    "cost": (_MONEY, "what the call cost: [prices.md](prices.md); null: nothing was to be priced"),
    "charge": (_MONEY, "what its customer is charged; absent where no price says so"),
    "error": (_text(), "a fixed text of ours; null: nothing went wrong"),
    "gate": (_GATE, "what was decided before the call was sent on: [gate.md](gate.md); absent without limits"),
}
LEFT_OUT: Final = frozenset({"version", "upstream", "cost", "charge", "gate"})  # or of a release that had none
OUTCOMES: Final[Mapping[Outcome, str]] = {
    Outcome.COMPLETE: "the client was handed the whole response, or its end mark",
    Outcome.CLIENT_LEFT: "the client went away before",
    Outcome.UPSTREAM_BROKE: "the response began and was cut off, or was no HTTP",
    Outcome.UPSTREAM_TIMEOUT: "no response in time (504), or silence in the middle of one",
    Outcome.UNREACHABLE: "no connection to the upstream (502, or 504 where it timed out)",
    Outcome.DENIED: "by a limit, or by whom the gate asks; never sent on",
    Outcome.REFUSED: "by us: a request that cannot be forwarded",
    Outcome.STOPPED: "cut when the sidecar stopped, after its deadline",
    Outcome.UNKNOWN: "found open after a crash: nobody saw the end",
}


def schema() -> dict[str, Any]:
    """The whole."""
    return {
        "$schema": DIALECT,
        "title": "A record of metering-sidecar",
        "description": "One call. Further fields may come under the same version: leave alone what you do not know.",
        "type": "object",
        "properties": {name: kind | {"description": about} for name, (kind, about) in FIELDS.items()},
        "required": [name for name in FIELDS if name not in LEFT_OUT],
        "additionalProperties": True,
    }


def text() -> str:
    """As it stands in docs/record.schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    import sys

    sys.stdout.write(text())
