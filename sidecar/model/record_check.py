"""Whether a line from elsewhere is a record: the schema of docs/record.schema.json, made into a function once.

Our own lines are never checked. One that came over a network may be anybody's, and what adds up or bills reads numbers
and texts without looking twice; so a line that is not of the form is told before it gets there. The function is made
from the schema, so the two cannot differ; `tests/unit/test_record_check.py` holds it against another implementation.
All of it is pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from sidecar.model.exchange import USAGE_FIELDS
from sidecar.model.record import RECORD_VERSION, Record
from sidecar.model.record_id import ID_LENGTH
from sidecar.model.record_schema import schema

# A record with everything that clients and upstreams choose at its bound has less than 24 KiB.
LINE_BYTES_MAX: Final = 32_768

NO_RECORD: Final = "no_record"
TOO_LARGE: Final = "too_large"
OTHER_VERSION: Final = "other_version"

Check = Callable[[Any], str | None]
"""Where a value is not as it should be: the path to it; None where it is."""

_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_INT_MAX: Final = 2**63 - 1
_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "string": (str,), "integer": (int,), "number": (float, int), "boolean": (bool,), "object": (dict,),
    "array": (list,), "null": (type(None),),
}  # fmt: skip


class NotARecord(ValueError):
    """`reason`: one of the words above; the text says where, and repeats nothing of the line."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def read_foreign(line: bytes) -> Record:
    """A record out of a line that anybody may have written. Raises `NotARecord`."""
    if len(line) > LINE_BYTES_MAX:
        raise NotARecord(TOO_LARGE, f"{len(line)} bytes, and a record has {LINE_BYTES_MAX} at most")
    if b"\n" in line or b"\r" in line:
        raise NotARecord(NO_RECORD, "more than one line")
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise NotARecord(NO_RECORD, "no JSON") from None
    if not isinstance(row, dict):
        raise NotARecord(NO_RECORD, "no object")
    if row.get("version", RECORD_VERSION) != RECORD_VERSION:
        raise NotARecord(OTHER_VERSION, f"not of version {RECORD_VERSION}: update whoever reads it")
    if (where := _record(row)) is not None:
        raise NotARecord(NO_RECORD, f"{where} is not as docs/record.md has it")
    if not _ID.fullmatch(row["id"]):
        raise NotARecord(NO_RECORD, "id is none of a sidecar's")
    usage = row["usage"] or {}
    if any(type(usage.get(name)) is str for name in _NUMBERS):
        # The schema lets a number be a text where JSON readers would cut it. No call consumes 2^63 of anything, and
        # what adds up wants numbers.
        raise NotARecord(NO_RECORD, "usage is not as docs/record.md has it")
    try:
        return Record.from_json(line)
    except (ValueError, OverflowError) as error:  # a date that is none, or one that no clock shows
        raise NotARecord(NO_RECORD, type(error).__name__) from None


def id_of(line: bytes) -> str:
    """The id of a line that we have stored. Raises `NotARecord` where it has none of a sidecar's form."""
    try:
        found = orjson.loads(line)["id"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        found = None
    if not isinstance(found, str) or not _ID.fullmatch(found):
        raise NotARecord(NO_RECORD, "id is none of a sidecar's")
    return found


def id_ms(record_id: str) -> int:
    """The time in an id, Unix milliseconds."""
    return int(record_id[:8] + record_id[9:13], 16)


def id_bytes(record_id: str) -> bytes:
    """An id in 16 bytes, in the order of the texts."""
    if len(record_id) != ID_LENGTH:
        raise ValueError("no id")
    return bytes.fromhex(record_id.replace("-", ""))


# --- from a schema to a function --------------------------------------------------------------------------


def compiled(wanted: Mapping[str, Any]) -> Check:
    """The part of JSON Schema that ours uses. Raises `KeyError` for a word that it does not know."""
    checks: list[Check] = []
    rest = dict(wanted)
    for note in ("description", "title", "$schema", "format"):
        rest.pop(note, None)
    if (types := rest.pop("type", None)) is not None:
        checks.append(_typed([types] if isinstance(types, str) else types))
    if "enum" in rest:
        words = frozenset(rest.pop("enum"))
        checks.append(lambda value: None if type(value) is str and value in words else "")
    if "const" in rest:
        const = rest.pop("const")
        checks.append(lambda value: None if type(value) is type(const) and value == const else "")
    if "pattern" in rest:
        checks.append(_matching(re.compile(rest.pop("pattern"))))
    least, most = rest.pop("minimum", None), rest.pop("maximum", None)
    if least is not None or most is not None:
        checks.append(_between(least, most))
    shortest, longest = rest.pop("minLength", 0), rest.pop("maxLength", None)
    if shortest or longest is not None:
        checks.append(
            lambda value: (
                None
                if type(value) is not str or (shortest <= len(value) and (longest is None or len(value) <= longest))
                else ""
            )
        )
    if "items" in rest:
        checks.append(_items(compiled(rest.pop("items"))))
    names = {name: compiled(part) for name, part in rest.pop("properties", {}).items()}
    others = rest.pop("additionalProperties", True)
    required = tuple(rest.pop("required", ()))
    if names or required or isinstance(others, dict):
        checks.append(_members(names, required, compiled(others) if isinstance(others, dict) else None))
    if rest:
        raise KeyError(min(rest))
    return _all(checks)


def _all(checks: list[Check]) -> Check:
    if len(checks) == 1:
        return checks[0]

    def check(value: Any) -> str | None:
        for one in checks:
            if (where := one(value)) is not None:
                return where
        return None

    return check


def _typed(names: list[str]) -> Check:
    kinds = frozenset(kind for name in names for kind in _TYPES[name])
    if int not in kinds:
        return lambda value: None if type(value) in kinds else ""
    # What is stored further on has 64 bits.
    return lambda value: None if type(value) in kinds and (type(value) is not int or value <= _INT_MAX) else ""


def _matching(pattern: re.Pattern[str]) -> Check:
    return lambda value: None if type(value) is not str or pattern.search(value) else ""


def _between(least: float | None, most: float | None) -> Check:
    def check(value: Any) -> str | None:
        if type(value) not in (int, float):
            return None
        return None if (least is None or value >= least) and (most is None or value <= most) else ""

    return check


def _items(item: Check) -> Check:
    def check(value: Any) -> str | None:
        if type(value) is list:
            for one in value:
                if item(one) is not None:
                    return "[]"
        return None

    return check


def _members(names: Mapping[str, Check], required: tuple[str, ...], others: Check | None) -> Check:
    """A name of the schema is told; one of the line's own never is."""

    def check(value: Any) -> str | None:
        if type(value) is not dict:
            return None
        for name in required:
            if name not in value:
                return name
        for name, member in value.items():
            known = names.get(name)
            if known is not None:
                if (where := known(member)) is not None:
                    return f"{name}.{where}" if where else name
            elif others is not None and others(member) is not None:
                return "*"
        return None

    return check


_record: Final = compiled(schema())
_NUMBERS: Final = tuple(name for name in USAGE_FIELDS if name.endswith("_tokens"))
