"""Checking bodies by a table of fields: what must be there, of which kind, how long.

Only the documented rules are in the vendors' tables. How a problem is worded and wrapped is the vendor's business, so
`problems` gives back pairs of field and sentence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from sidecar.dev.mock_backends.contract import Call

Problem = tuple[str, str]

_RFC3339: Final = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_DECIMAL: Final = re.compile(r"-?\d+(\.\d+)?")
_INT32_MAX: Final = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Field:
    """One field's rule; `says` completes "<field> …"."""

    is_right: Callable[[Any], bool]
    says: str
    required: bool = False


def text(*, required: bool = False, max_chars: int | None = None, empty: bool = True) -> Field:
    def is_right(value: Any) -> bool:
        return isinstance(value, str) and (max_chars is None or len(value) <= max_chars) and (empty or value != "")

    limit = "" if max_chars is None else f" of at most {max_chars} characters"
    return Field(is_right, f"must be a {'' if empty else 'non-empty '}string{limit}", required)


def one_of(*words: str, required: bool = False) -> Field:
    return Field(lambda value: value in words, f"must be one of {', '.join(words)}", required)


def integer(*, required: bool = False, limit: int | None = None) -> Field:
    return Field(
        lambda value: is_integer(value) and (limit is None or -limit - 1 <= value <= limit),
        "must be an integer",
        required,
    )


def int32(*, required: bool = False) -> Field:
    return integer(required=required, limit=_INT32_MAX)


def number(*, required: bool = False) -> Field:
    return Field(is_number, "must be a number", required)


def decimal_text(*, required: bool = False) -> Field:
    return Field(
        lambda value: isinstance(value, str) and _DECIMAL.fullmatch(value) is not None,
        "must be a decimal as text, without an exponent",
        required,
    )


def boolean(*, required: bool = False) -> Field:
    return Field(lambda value: isinstance(value, bool), "must be a boolean", required)


def mapping(*, required: bool = False) -> Field:
    return Field(lambda value: isinstance(value, dict), "must be an object", required)


def moment(*, required: bool = False) -> Field:
    return Field(lambda value: parse_time(value) is not None, "must be an ISO 8601 time with a zone", required)


def header_names(*, required: bool = False) -> Field:
    """A list of field names. Anything with a colon or a space carries a value, which has no business here."""
    return Field(
        lambda value: isinstance(value, list) and all(isinstance(n, str) and _TOKEN.fullmatch(n) for n in value),
        "must be a list of header names (names only)",
        required,
    )


def problems(body: Mapping[str, Any], fields: Mapping[str, Field], *, strict: bool = False) -> list[Problem]:
    """Every broken rule. `strict`: a field that the table does not know is one, too. Null stands for absent."""
    found: list[Problem] = []
    for name, rule in fields.items():
        value = body.get(name)
        if value is None:
            if rule.required:
                found.append((name, "is required"))
        elif not rule.is_right(value):
            found.append((name, rule.says))
    if strict:
        found.extend((name, "is not a known field") for name in body if name not in fields)
    return found


def sentence(found: list[Problem]) -> str:
    """All problems in one line."""
    return "; ".join(f"{name} {what}" for name, what in found)


def parse_json(call: Call) -> Any:
    """The body as JSON. Raises `ValueError` when it is none."""
    return orjson.loads(call.body)


def is_json(call: Call) -> bool:
    """Whether the content type is JSON, with or without parameters."""
    return media_type(call) == "application/json"


def media_type(call: Call) -> str:
    return call.header("Content-Type").partition(";")[0].strip().lower()


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def parse_time(value: Any) -> float | None:
    """An RFC 3339 time as Unix seconds; None when it is none. A time without a zone is none."""
    if not isinstance(value, str) or not _RFC3339.fullmatch(value):
        return None
    try:
        return datetime.fromisoformat(value.upper()).timestamp()
    except ValueError:
        return None


def rfc3339(at_s: float) -> str:
    """A moment as the vendors print it: UTC, milliseconds, `Z`."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
