"""How answers are written for programs: JSON, one object a line, and CSV. One row is one mapping, whatever the form."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

import orjson

CSV_ROWS: Final = 100  # in one piece
_FORMULA: Final = frozenset("=+-@＝＋－＠")  # how a spreadsheet's formula begins; the wide ones in Japanese


def stamp(at: datetime, timespec: str = "seconds") -> str:
    """A time of UTC as records have theirs, ending in Z."""
    return at.isoformat(timespec=timespec).replace("+00:00", "Z")


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    NDJSON = "ndjson"


MEDIA_TYPES: Final[Mapping[Format, str]] = {
    Format.JSON: "application/json",
    Format.CSV: "text/csv; charset=utf-8",
    Format.NDJSON: "application/x-ndjson",
}
Row = Mapping[str, Any]


def written(rows: Iterable[Row], columns: Sequence[str], form: Format, *, indent: int | None = None) -> Iterator[str]:
    """The rows in pieces, in any form but a table. `indent` is JSON's."""
    if form is Format.JSON:
        yield from _json(rows, columns, indent)
    elif form is Format.NDJSON:
        for row in rows:
            yield json.dumps(_pick(row, columns), default=str) + "\n"
    else:
        yield from _csv(rows, columns)


def _json(rows: Iterable[Row], columns: Sequence[str], indent: int | None) -> Iterator[str]:
    """As `json.dumps` writes the list of them, without having all of it at once."""
    end = "" if indent is None else "\n"
    margin = "" if indent is None else " " * indent
    before = "[" + end
    for row in rows:
        one = _pick(row, columns)
        text = _compact(one) if indent is None else json.dumps(one, indent=indent, default=str)
        yield before + margin + text.replace("\n", "\n" + margin)
        before = "," + (end or " ")
    yield "[]\n" if before.startswith("[") else end + "]\n"


def _compact(row: dict[str, Any]) -> str:
    try:
        return orjson.dumps(row, default=str).decode()
    except TypeError:  # a sum beyond 64 bits, half of a surrogate pair
        return json.dumps(row, default=str)


def _pick(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    return {column: row.get(column) for column in columns}


def _csv(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[str]:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")  # RFC 4180
    writer.writerow(columns)
    for number, row in enumerate(rows, 1):
        writer.writerow([_cell(row.get(column)) for column in columns])
        if number % CSV_ROWS == 0:
            yield file.getvalue()
            file.seek(0)
            file.truncate()
    yield file.getvalue()


def _cell(value: Any) -> Any:
    """Nearly all are one of these, and there may be two million."""
    if value is None:
        return ""
    if type(value) is int or (type(value) is str and value[:1].isalnum() and value.isprintable()):
        return value
    return _defused(value)


def _defused(value: Any) -> Any:
    """A client's text that a spreadsheet would run as a formula is kept from being one, and a control character from
    being read as such; a line end is data, in quotes. What is no plain value is written as its text."""
    if isinstance(value, (int, float, Decimal)):
        return value
    text = "\n".join(map(visible, str(value).split("\n")))
    return f"'{text}" if text.lstrip()[:1] in _FORMULA else text


def visible(text: str) -> str:
    """What came over the wire must not move the cursor or forge a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class Names:
    """What subscribers are called: `[subscribers.ID] name`."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        count = Counter(self._names.values())
        self._shared = {name for name, times in count.items() if times > 1}

    def __bool__(self) -> bool:
        return bool(self._names)

    def of(self, subscriber: str | None) -> str | None:
        return None if subscriber is None else self._names.get(subscriber)

    def shown(self, subscriber: str | None) -> str | None:
        """As a table has it: the name, with the id behind it where others are called so too."""
        name = self.of(subscriber)
        if name is None:
            return subscriber
        return f"{name} ({subscriber})" if name in self._shared else name

    def ids(self, asked: str) -> tuple[str, ...]:
        """The subscribers that somebody means by this text: the id itself, and all that are called so."""
        return (asked, *(id_ for id_, name in self._names.items() if name == asked and id_ != asked))


NOBODY: Final = Names({})
