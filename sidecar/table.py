"""Rows as aligned text, for commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

GAP: Final = "  "
NOTHING: Final = "–"  # null is not zero, and neither is it an empty field


def table(head: Sequence[str], rows: Sequence[Sequence[str | int | None]]) -> str:
    """Columns as wide as their widest field; numbers to the right, with thin groups of three."""
    fields = [[_field(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *fields, strict=True)]
    is_number = [any(isinstance(v, int) for v in column) for column in zip(*rows, strict=True)] or [False] * len(head)

    def line(values: Sequence[str]) -> str:
        parts = (
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, is_number, strict=True)
        )
        return GAP.join(parts).rstrip()

    return "\n".join([line(head), line(["─" * width for width in widths]), *map(line, fields)])


def _field(value: str | int | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else value
