"""How commands print: a table for people, JSON and CSV for programs (`reports.formats`).

Numbers stand to the right with thousands apart, None is a dash (never a zero), and the last column gives way
where the terminal is too narrow.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Final

from sidecar.runtime.reports.formats import Format, Row, visible, written

__all__ = ["Format", "Row", "pairs", "render", "shown", "table"]

NARROWEST_CHARS: Final = 12  # what the last column keeps, however narrow the terminal
GAP: Final = "  "


def render(
    rows: Iterable[Row],
    columns: Sequence[str],
    form: Format,
    *,
    total: Row | None = None,
    heads: Mapping[str, str] | None = None,
) -> str:
    """The rows in one form, with a line end. `total` and other `heads` than the names are a table's only."""
    if form is Format.TABLE:
        return table(list(rows), columns, total=total, heads=heads)
    return "".join(written(rows, columns, form, indent=2))


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
    return visible(str(value))


def _is_numeric(values: Iterable[Any]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(isinstance(v, (int, float, Decimal)) and not isinstance(v, bool) for v in known)
