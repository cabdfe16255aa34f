"""What those outside said last, over a restart. Pure: bytes of a file that the caller keeps.

Only `SIDECAR_GATE_ON_FAILURE=last` needs it: a vendor that is away while the sidecar is started again, or its metering
process dies, must not let in whom it had denied. An answer that comes back is never believed as such: it is asked for
anew, and holds only where nobody answers, as long as it would have without the restart. Of what is left, what was used
and set aside by then is taken off; what was used between the last writing and the end is not.

A file that is damaged, or of a version that is not known, is as good as none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import orjson

from sidecar.gate.answers import Entry, left_of
from sidecar.gate.sources.base import Answer, Source

VERSION: Final = 1
_WHOLE: Final = re.compile(r"-?\d{1,60}", re.ASCII)
_FIELDS: Final = {
    "allowed": (bool,),
    "reason": (str,),
    "remaining": (str, type(None)),  # a whole number, which may have more digits than JSON's
    "unit": (str, type(None)),
    "at_s": (int, float, type(None)),
    "until_s": (int, float, type(None)),
    "limit": (str, type(None)),
    "message": (str, type(None)),
    "shadow": (str, type(None)),
}
assert _FIELDS.keys() == {field.name for field in fields(Answer)}


@dataclass(frozen=True, slots=True)
class Remembered:
    """What one subject was told. `answered_s`: Unix seconds. `said`: as `kept` or `Source.kept` made it."""

    subject: str
    answered_s: float
    said: Any


def written(known: Iterable[tuple[Source, Iterable[Entry]]], *, now_s: float, wall_s: float) -> bytes:
    """The file. `now_s`: of the clock that entries go by; `wall_s`: the same moment, Unix seconds."""
    sources: dict[str, list[list[Any]]] = {}
    for source, entries in known:
        rows = sources[source.name] = []
        for entry in entries:
            if entry.answer is None:
                continue
            answer = entry.answer
            if isinstance(answer, Answer):
                said: Any = kept(answer, left_of(entry, answer, source.unit))
            else:
                said = source.kept(answer)
            rows.append([entry.subject, wall_s - (now_s - entry.answered_s), said])
    return orjson.dumps({"version": VERSION, "sources": sources})


def read(data: bytes) -> dict[str, list[Remembered]]:
    """By source; nothing where the file is none of ours."""
    try:
        document = orjson.loads(data)
        if document["version"] != VERSION:
            return {}
        return {
            name: [Remembered(str(subject), float(answered_s), said) for subject, answered_s, said in rows]
            for name, rows in document["sources"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def kept(answer: Answer, left: int | None) -> dict[str, Any]:
    """An answer as JSON has it. `left`: what remains of it now, where that is counted."""
    if left is not None:
        answer = replace(answer, remaining=max(left, 0))
    found = asdict(answer)
    if answer.remaining is not None:
        found["remaining"] = str(answer.remaining)
    return {name: value for name, value in found.items() if value is not None}


def recalled(said: Any) -> Answer | None:
    """The same back; None: it is none."""
    if not isinstance(said, Mapping) or not isinstance(said.get("allowed"), bool) or said.keys() - _FIELDS.keys():
        return None
    if any(not isinstance(value, _FIELDS[name]) for name, value in said.items()):
        return None
    remaining = said.get("remaining")
    if remaining is None:
        return Answer(**said)
    return Answer(**{**said, "remaining": int(remaining)}) if _WHOLE.fullmatch(remaining) else None
