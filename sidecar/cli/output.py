"""How commands print: a table for people, JSON and CSV for programs. One row is one mapping, whatever the form.

Numbers stand to the right with thousands apart, None is a dash (never a zero), and the last column gives way
where the terminal is too narrow.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

NARROWEST_CHARS: Final = 12  # what the last column keeps, however narrow the terminal
GAP: Final = "  "
_FORMULA: Final = frozenset(("=", "+", "-", "@"))  # how a spreadsheet's formula begins


class Format(StrEnum):
    TABLE = "table"
    JSON = "json"
    CSV = "csv"
    NDJSON = "ndjson"


Row = Mapping[str, Any]


def render(
    rows: Iterable[Row],
    columns: Sequence[str],
    form: Format,
    *,
    total: Row | None = None,
    heads: Mapping[str, str] | None = None,
) -> str:
    """The rows in one form, with a line end. `total` and other `heads` than the names are a table's only."""
    rows = list(rows)
    if form is Format.JSON:
        return json.dumps([_pick(row, columns) for row in rows], indent=2, default=str) + "\n"
    if form is Format.NDJSON:
        return "".join(json.dumps(_pick(row, columns), default=str) + "\n" for row in rows)
    if form is Format.CSV:
        return _csv(rows, columns)
    return table(rows, columns, total=total, heads=heads)


def table(
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    total: Row | None = None,
    heads: Mapping[str, str] | None = None,
    width: int | None = None,
) -> str:
    """Columns as wide as their content; a column of numbers stands to the right."""
    titles = [(heads or {}).get(column, column.replace("_", " ")) for column in columns]
    cells = [[shown(row.get(column)) for column in columns] for row in rows]
    foot = [] if total is None else [[shown(total.get(column), none="") for column in columns]]
    right = [_is_numeric(row.get(column) for row in rows) for column in columns]
    widths = [max(len(line[i]) for line in [titles, *cells, *foot]) for i in range(len(columns))]
    space = (width or shutil.get_terminal_size((120, 24)).columns) - sum(widths[:-1]) - len(GAP) * (len(columns) - 1)
    if not right[-1]:
        widths[-1] = min(widths[-1], max(space, NARROWEST_CHARS))
    lines = [_line(titles, widths, right), _line(["─" * w for w in widths], widths, right)]
    lines += [_line(line, widths, right) for line in cells]
    if foot:
        lines += [_line(["─" * w for w in widths], widths, right), _line(foot[0], widths, right)]
    return "\n".join(lines) + "\n"


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and what is to be said of them, in two columns."""
    width = max((len(name) for name, _ in rows), default=0)
    return "".join(f"{name:<{width}}{GAP}{text}".rstrip() + "\n" for name, text in rows)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    fitted = [
        cell.rjust(width) if to_right else _clip(cell, width).ljust(width)
        for cell, width, to_right in zip(cells, widths, right, strict=True)
    ]
    return GAP.join(fitted).rstrip()


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def shown(value: Any, none: str = "–") -> str:
    """One value as a person reads it."""
    if value is None:
        return none
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return _visible(str(value))


def _visible(text: str) -> str:
    """What came over the wire must not move the cursor or forge a line."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _is_numeric(values: Iterable[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(v, (int, float, Decimal)) and not isinstance(v, bool) for v in known)


def _pick(row: Row, columns: Sequence[str]) -> dict[str, Any]:
    return {column: row.get(column) for column in columns}


def _csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\r\n")  # RFC 4180
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if row.get(c) is None else _defused(row[c]) for c in columns])
    return file.getvalue()


def _defused(value: Any) -> Any:
    """A client's text that a spreadsheet would run as a formula is kept from being one, and a control character from
    being read as such; a line end is data, in quotes. What is no plain value is written as its text."""
    if isinstance(value, (int, float, Decimal)):
        return value
    text = "\n".join(map(_visible, str(value).split("\n")))
    return f"'{text}" if text.lstrip()[:1] in _FORMULA else text
