"""How commands print: a table for people, JSON and CSV for programs (`reports.formats`).

Numbers stand to the right with thousands apart, None is a dash (never a zero), and what does not fit the terminal is
made to: first the widest texts are shortened, then columns that may be spared are left out. A pipe or a file gets all,
unless `COLUMNS` says how wide it is.
"""

from __future__ import annotations

import codecs
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from io import TextIOWrapper
from time import monotonic
from typing import Any, Final, TextIO, TypeVar

from sidecar.runtime.reports.formats import Format, Row, visible, written

__all__ = [
    "Format", "Progress", "Row", "amount", "counted", "pairs", "plain_terminals", "render", "shown", "table",
    "write_data",
]  # fmt: skip

T = TypeVar("T")

NARROWEST_CHARS: Final = (12, 8, 5)  # what a column of texts keeps, tried one after the other
GAP: Final = "  "
WIDTH_CHARS: Final = 120  # of running text, where there is no terminal to ask
UNBOUND_CHARS: Final = 100_000  # of a table that no terminal shows: a pipe or a file has all of it
PROGRESS_S: Final = 0.2  # between two looks of a line that counts
# What stands for our own characters on a terminal that has none of them.
_PLAIN: Final = {"\N{BOX DRAWINGS LIGHT HORIZONTAL}": "-", "\N{EN DASH}": "-", "\N{HORIZONTAL ELLIPSIS}": "."}


def render(
    rows: Iterable[Row],
    columns: Sequence[str],
    form: Format,
    *,
    total: Row | None = None,
    heads: Mapping[str, str] | None = None,
    spare: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> str:
    """The rows in one form, with a line end. All but rows and columns is a table's only, see `table`."""
    if form is Format.TABLE:
        return table(list(rows), columns, total=total, heads=heads, spare=spare, whole=whole)
    return "".join(written(rows, columns, form, indent=2))


def table(
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    total: Row | None = None,
    heads: Mapping[str, str] | None = None,
    width: int | None = None,
    spare: Sequence[str] = (),
    whole: Sequence[str] = (),
) -> str:
    """Columns as wide as their content, as far as the terminal goes; a column of numbers stands to the right.

    `spare`: columns that may be left out where it is too narrow, the first one first; a line says so. `whole`: texts
    that are never shortened, such as times.
    """
    titles = {column: (heads or {}).get(column, column.replace("_", " ")) for column in columns}
    cells = [{column: shown(row.get(column)) for column in columns} for row in rows]
    foot = None if total is None else {column: shown(total.get(column), none="") for column in columns}
    right = {column: _is_numeric(row.get(column) for row in rows) for column in columns}
    lines = [titles, *cells, *([] if foot is None else [foot])]
    widths = {column: max(len(line[column]) for line in lines) for column in columns}
    room = width or terminal_chars()
    left_out, narrowed = _layout(widths, [n for n in columns if not right[n] and n not in whole], spare, room)
    rule = _line({name: "─" * chars for name, chars in narrowed.items()}, narrowed, right)
    text = [_line(titles, narrowed, right), rule, *(_line(line, narrowed, right) for line in cells)]
    if foot is not None:
        text += [rule, _line(foot, narrowed, right)]
    if left_out:
        names = ", ".join(titles[name] for name in left_out)
        text += textwrap.wrap(f"not shown for want of room: {names}; --format csv has all", max(room, 20))
    return "\n".join(text) + "\n"


def _layout(
    widths: Mapping[str, int], texts: Sequence[str], spare: Sequence[str], room: int
) -> tuple[list[str], dict[str, int]]:
    """The columns that are left out, and the widths of all others."""
    can_go = [name for name in spare if name in widths]
    # A column less is better than texts of which nothing can be read.
    for least in NARROWEST_CHARS:
        for count in range(len(can_go) + 1):
            kept = {name: chars for name, chars in widths.items() if name not in can_go[:count]}
            narrowed = _narrowed(kept, [name for name in texts if name in kept], room, least)
            if _total(narrowed) <= room:
                return can_go[:count], narrowed
    # It does not fit at all: then at least so that it can be read.
    return [], _narrowed(widths, texts, room, NARROWEST_CHARS[0])


def _narrowed(widths: Mapping[str, int], texts: Sequence[str], room: int, least: int) -> dict[str, int]:
    """The widest texts made as narrow as it takes, and none narrower than `least`."""
    found = dict(widths)
    while texts and (over := _total(found) - room) > 0:
        by_width = sorted(texts, key=lambda name: -found[name])
        widest = found[by_width[0]]
        if widest <= least:
            break
        alike = [name for name in by_width if found[name] == widest]
        following = max((found[name] for name in texts if found[name] < widest), default=0)
        step = min(widest - max(following, least), -(-over // len(alike)))
        for name in alike:
            found[name] -= min(step, max(_total(found) - room, 0))
    return found


def _total(widths: Mapping[str, int]) -> int:
    return sum(widths.values()) + len(GAP) * (len(widths) - 1)


def pairs(rows: Sequence[tuple[str, str]], *, width: int | None = None) -> str:
    """Names and what is to be said of them, in two columns; what is too long goes on below."""
    indent = max((len(name) for name, _ in rows), default=0) + len(GAP)
    chars = width or terminal_chars()
    room = max((WIDTH_CHARS if chars == UNBOUND_CHARS else chars) - indent, NARROWEST_CHARS[0])
    lines = []
    for name, text in rows:
        first, *more = textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        lines += [f"{name:<{indent}}{first}".rstrip(), *(" " * indent + line for line in more)]
    return "".join(line + "\n" for line in lines)


def amount(count: int, one: str, several: str | None = None) -> str:
    """A number of things, which are one or several: `1 event`, `1,200 events`."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def terminal_chars() -> int:
    """How much fits beside each other on what commands print to."""
    if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit():
        return shutil.get_terminal_size((WIDTH_CHARS, 24)).columns
    return UNBOUND_CHARS


def write_data(pieces: Iterable[str | bytes]) -> None:
    """What programs read: as UTF-8, whatever the terminal's own characters are."""
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.buffer.write(piece if isinstance(piece, bytes) else piece.encode("utf-8", "replace"))


def plain_terminals() -> None:
    """From now on a character that the terminal does not have is written as one that it has."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and codecs.lookup(stream.encoding).name != "utf-8":
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


class Progress:
    """A line on a terminal's stderr that says how far a long command is; nothing where it is no terminal."""

    def __init__(self, what: str, total: int | None = None, *, stream: TextIO | None = None) -> None:
        self._what, self._total = what, total
        self._out = stream or sys.stderr
        self._shown = self._out.isatty()
        self._told_s = monotonic()
        self._last = ""

    def at(self, count: int) -> None:
        if self._shown and (now_s := monotonic()) - self._told_s >= PROGRESS_S:
            self._told_s = now_s
            part = f" of {self._total:,} ({100 * count // self._total} %)" if self._total else ""
            self._last = f"{count:,}{part} {self._what}"[: _columns(self._out) - 1]  # a line that wraps stays behind
            self._out.write(f"\r{self._last}")
            self._out.flush()

    def end(self) -> None:
        """Take it away again."""
        if self._last:
            self._out.write("\r" + " " * len(self._last) + "\r")
            self._out.flush()


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or WIDTH_CHARS
    except (OSError, ValueError):
        return WIDTH_CHARS


def counted(items: Iterable[T], progress: Progress) -> Iterator[T]:
    """The items, and how many there were so far."""
    count = 0
    try:
        for item in items:
            yield item
            count += 1
            progress.at(count)
    finally:
        progress.end()


def _line(cells: Mapping[str, str], widths: Mapping[str, int], right: Mapping[str, bool]) -> str:
    fitted = [
        cells[name].rjust(width) if right[name] else _clip(cells[name], width).ljust(width)
        for name, width in widths.items()
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
