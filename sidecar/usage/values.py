"""What counts as a number, a name or an error in a provider's answer (rules V1 to V4, M2, M4 of docs/usage-formats.md).

Every function here takes whatever JSON held and never raises for it. "Not reported" is None and is never zero.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import orjson

from sidecar.model.exchange import USAGE_CHARS_MAX, cut

COUNT_MAX = 2**53 - 1  # the largest integer that every JSON reader holds exactly
NAME_MAX_CHARS = USAGE_CHARS_MAX
TOLERANT_MAX_BYTES = 65_536  # what the slow, forgiving parser may be given: 0.5 ms at most
RAW_USAGE_MAX_BYTES = 32_768  # of one record's raw_usage; the largest known one (per-iteration) is about 2 KiB

_DETAIL_DEPTH_MAX = 4  # of a usage object's lists; the deepest known (iterations with their cache's split) has 3

_DIGITS = re.compile(r"[0-9]{1,16}")
_LONE_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_ERROR_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]{1,79}")


def count(value: object) -> int | None:
    """A count of something, 0 to 2^53-1, also as a whole float or as ASCII digits; None where it is none."""
    if type(value) is int:  # not isinstance: True is an int
        return value if 0 <= value <= COUNT_MAX else None
    if type(value) is float:
        return int(value) if value.is_integer() and 0 <= value <= COUNT_MAX else None
    if type(value) is str and _DIGITS.fullmatch(value):
        number = int(value)
        return number if number <= COUNT_MAX else None
    return None


def quantity(value: object) -> int | float | None:
    """A measured amount (seconds, credits): a count, or a finite float that is not negative."""
    whole = count(value)
    if whole is not None:
        return whole
    if type(value) is float and math.isfinite(value) and 0 <= value <= COUNT_MAX:
        return value
    if type(value) is str and len(value) <= 32:
        try:
            number = float(value)
        except ValueError:
            return None
        return number if value.isascii() and math.isfinite(number) and 0 <= number <= COUNT_MAX else None
    return None


def decimal_text(value: object, exponent: int = 0) -> str | None:
    """An amount of money as decimal text, times ten to `exponent`; never through binary arithmetic."""
    if type(value) not in (int, float, str) or (type(value) is str and len(value) > 40):
        return None
    try:
        number = Decimal(repr(value) if type(value) is float else str(value))
    except (ArithmeticError, ValueError):
        return None
    sign, digits, place = number.as_tuple()
    if exponent and isinstance(place, int):
        number = Decimal((sign, digits, place + exponent))  # `scaleb` would round to 28 digits
    if not number.is_finite() or number < 0 or number.adjusted() > 12 or number.adjusted() < -30:
        return "0" if number.is_finite() and number == 0 else None
    return plain_decimal(number)


def plain_decimal(number: Decimal) -> str:
    """Without an exponent and without zeros at the end."""
    text = format(number, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def name(value: object) -> str | None:
    """A model, an id, a reason: non-empty text of sane length, else None (an empty one never replaces a known one)."""
    if type(value) is str and value:
        return value if len(value) <= NAME_MAX_CHARS else cut(value, NAME_MAX_CHARS)
    return None


def error_word(error: object) -> str:
    """The vendor's error type as one word. Messages may quote a prompt or a key, so they are never used."""
    if isinstance(error, Mapping):
        for key in ("type", "code", "status", "__type"):
            value = error.get(key)
            if type(value) is str and _ERROR_WORD.fullmatch(value):
                return value
            if key == "code" and type(value) is int and 100 <= value <= 599:
                return f"http_{value}"
        inner = error.get("error")
        if isinstance(inner, Mapping) and inner is not error:
            return error_word({key: value for key, value in inner.items() if key != "error"})
    elif type(error) is str and _ERROR_WORD.fullmatch(error) and "_" in error:
        return error
    return "error"


def overlay(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, field by field: absent and null keep what was known (M2); running totals replace (M1).

    A total that was positive does not fall to zero: gateways end a stream with zeros that they never filled in.
    """
    if old is None:
        return new
    merged = dict(old)
    for key, value in new.items():
        known = old.get(key)
        if known is None:
            merged[key] = value
        elif value is None:
            continue
        elif type(value) is dict and type(known) is dict:
            merged[key] = overlay(known, value)
        elif type(value) is list and type(known) is list:
            merged[key] = value if _some(value) or not _some(known) else known
        else:
            amount = quantity(known)
            if amount is not None and not (quantity(value) or (amount == 0 and quantity(value) is not None)):
                continue  # a zero, or a broken number, which is "not reported": neither takes anything away
            merged[key] = value
    return merged


def _some(value: object, depth: int = 0) -> bool:
    """Whether there is a number above zero in it: lists of details can be all zeros as well."""
    if isinstance(value, list | dict):
        inner = value if isinstance(value, list) else value.values()
        return depth < _DETAIL_DEPTH_MAX and any(_some(item, depth + 1) for item in inner)
    return bool(quantity(value))


def part(value: object) -> dict[str, Any]:
    """A nested object, or an empty one where there is none: saves every caller the same question."""
    return value if type(value) is dict else {}


def tolerant_loads(data: bytes) -> Any:
    """JSON with NaN, endless integers, lone surrogates or broken UTF-8, as values that a record can hold.

    Raises ValueError when it is no JSON all the same.
    """
    if len(data) > TOLERANT_MAX_BYTES:
        raise ValueError("too large for the forgiving parser")
    text = _LONE_SURROGATE.sub(rb"\\ufffd", data).decode("utf-8", "replace").removeprefix("\ufeff")
    try:
        return json.loads(text, parse_constant=str, parse_int=_short_int, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def lenient_loads(data: bytes) -> Any:
    """Small JSON from anywhere, or None."""
    try:
        return orjson.loads(data)
    except ValueError:
        try:
            return tolerant_loads(data)
        except ValueError:
            return None


def keepable(raw: dict[str, Any]) -> bool:
    """Whether a usage object is small and flat enough to be written into a record: 0.3 µs to be sure."""
    try:
        return len(orjson.dumps(raw)) <= RAW_USAGE_MAX_BYTES
    except (TypeError, ValueError, RecursionError):
        return False


def _short_int(text: str) -> int | str:
    return int(text) if len(text) <= 18 else text[:40]  # orjson writes 64 bits and no more


def _finite(text: str) -> float | str:
    number = float(text)
    return number if math.isfinite(number) else text[:40]
