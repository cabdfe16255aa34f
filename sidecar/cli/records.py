"""One line per call, oldest first, as long as the spool keeps it.

`ndjson` is the stored line byte for byte: what `webhook` and `file` deliver too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import orjson

from sidecar.cli.output import UNBOUND_CHARS, Format, amount, shown, terminal_chars, write_data
from sidecar.cli.shared import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    CommandError,
    add_data_dir,
    add_format,
    add_where,
    read_settings,
)
from sidecar.runtime.reports import calls
from sidecar.runtime.reports.formats import Names, written
from sidecar.runtime.reports.parameters import QueryError
from sidecar.spool import SpoolError, SpoolReader
from sidecar.storage.files import StorageError

if TYPE_CHECKING:
    from sidecar.ledger.postgres_queries import PostgresReader

POLL_S: Final = 0.2  # how soon a followed record shows
FOLLOWED: Final = 10  # what `--follow` begins with, as tail does
LIMIT_MAX: Final = 100_000_000  # more than a disk holds
BYTES_MAX: Final = 1 << 30  # kept in memory for `--limit`; without it records are printed as they are read

# Fixed, because the lines of a stream are printed as they come: (title, width, to the right, value). The last column
# takes what is left of the terminal.
_Column = tuple[str, int, bool, Callable[[dict[str, Any]], Any]]
SUBSCRIBER: Final = "subscriber"
COLUMNS: Final[tuple[_Column, ...]] = (
    ("started, UTC", 23, False, lambda r: str(r["started_at"])[:23].replace("T", " ")),
    ("status", 6, True, lambda r: r["status"]),
    ("outcome", 14, False, lambda r: r["outcome"]),
    ("ms", 8, True, lambda r: r["duration_ms"]),
    (SUBSCRIBER, 20, False, lambda r: None),  # its name, put in when it is printed
    ("model", 26, False, calls.FIELDS["model"]),
    ("in", 8, True, lambda r: (r["usage"] or {}).get("input_tokens")),
    ("out", 8, True, lambda r: (r["usage"] or {}).get("output_tokens")),
    ("call", 20, False, lambda r: f"{r['method']} {r['route'] or r['url']}"),
)
NARROW: Final[tuple[_Column, ...]] = (
    ("started, UTC", 14, False, lambda r: str(r["started_at"])[5:19].replace("T", " ")),
    ("status", 6, True, lambda r: r["status"]),
    ("ms", 7, True, lambda r: r["duration_ms"]),
    (SUBSCRIBER, 11, False, lambda r: None),
    ("model", 12, False, calls.FIELDS["model"]),
    ("tokens", 7, True, lambda r: (r["usage"] or {}).get("total_tokens")),
    ("call", 8, False, lambda r: _said(r) + f"{r['method']} {r['route'] or r['url']}"),
)
GAP: Final = "  "
CALL_CHARS_MAX: Final = 60


def _said(record: dict[str, Any]) -> str:
    """What went wrong, before anything else, where there is no room for a column of its own."""
    return "" if record["outcome"] == "complete" else f"{record['outcome']}: "


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--since", metavar="TIME", help="an age (90m, 24h, 7d), today, or a date and time (UTC)")
    parser.add_argument("--until", metavar="TIME", help="as --since, not included")
    add_where(parser)
    parser.add_argument("--follow", "-f", action="store_true", help=f"the last {FOLLOWED}, then each new one")
    parser.add_argument("--limit", metavar="N", help="only the last N")
    parser.add_argument("--id", metavar="ID", help="the one with this id")
    add_data_dir(parser)
    add_format(parser, "table", "json", "ndjson", "csv")


def run(arguments: argparse.Namespace) -> int:
    from sidecar.runtime import backend_factory

    settings = read_settings(arguments)
    data_dir, names, form = settings.data_dir, Names(settings.subscriber_names), Format(arguments.format)
    try:
        query = calls.records_query(
            now=datetime.now(UTC),
            dimensions=settings.attribution.dimensions,
            since=arguments.since,
            until=arguments.until,
            where=arguments.where,
            limit=arguments.limit,
            limit_max=LIMIT_MAX,
            record_id=arguments.id,
        )
        if arguments.follow and (form in (Format.JSON, Format.CSV) or query.id or query.until):
            raise CommandError("--follow goes with a table or ndjson, and without --id and --until", EXIT_USAGE)
        fleet = backend_factory.fleet_reader(settings)
        if fleet is not None and not arguments.follow:
            with closing(fleet):
                return _of_fleet(fleet, query, names, form)
        with SpoolReader(data_dir) as reader:
            if not reader.instances() and not arguments.follow:
                raise CommandError(f"there are no records in {data_dir}: is SIDECAR_DATA_DIR the right one?")
            # Asked before the first read, so that what comes in between is printed once and not skipped.
            places = {instance: reader.last_seq(instance) for instance in reader.instances()}
            if query.id is not None:
                return _one(reader, query.id, names, form)
            if arguments.follow and query.limit is None and query.since is None:
                query = replace(query, limit=FOLLOWED)
            missing: list[int] = []
            stopped = None
            if query.limit is None:
                lines: Iterable[bytes] = calls.calls_from(reader, query, names, places, missing=missing.append)
            else:
                last = calls.last_calls(reader, query, names, upto=places, bytes_max=BYTES_MAX)
                lines, stopped = last.lines, last.stopped
            write = _printed(lines if arguments.follow else _or_said(lines), names, form)
            if stopped is not None:
                print(f"note: {stopped}", file=sys.stderr)
            if missing:
                gone = amount(sum(missing), "record")
                print(f"note: {gone} beside these cannot be read any more: see `spool verify`", file=sys.stderr)
            if arguments.follow:
                _follow(reader, places, calls.filter_of(query, names), write)
    except QueryError as error:
        raise CommandError(error.typed(), EXIT_USAGE) from None
    except (SpoolError, StorageError) as error:
        raise CommandError(str(error)) from None
    return EXIT_OK


def _of_fleet(fleet: PostgresReader, query: calls.RecordsQuery, names: Names, form: Format) -> int:
    """Of all sidecars that share a ledger, also while none runs here."""
    found = calls.fleet_calls(fleet, query, names, bytes_max=BYTES_MAX)
    if query.id is not None and not found.lines:
        print(f"{query.id} is not in {fleet.where}: never recorded, or still on its way", file=sys.stderr)
        return EXIT_FAILED
    if query.id is not None and form is Format.TABLE:
        _write_whole(found.lines[0], names)
    else:
        _printed(_or_said(found.lines), names, form)
    if found.stopped is not None:
        print(f"note: {found.stopped}", file=sys.stderr)
    return EXIT_OK


def _write_whole(line: bytes, names: Names) -> None:
    """A table of one line says little: the whole record, one value a line. It is JSON still, where a character that
    might tell the terminal something is written by its number."""
    text = orjson.dumps(orjson.loads(calls.named(line, names)), option=orjson.OPT_INDENT_2).decode()
    print("\n".join("".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in one) for one in text.split("\n")))


def _one(reader: SpoolReader, record_id: str, names: Names, form: Format) -> int:
    lines = calls.call_by_id(reader, record_id).lines
    if not lines:
        print(f"{record_id} is not in the spool: never recorded here, or older than the retention", file=sys.stderr)
        return EXIT_FAILED
    if form is Format.TABLE:
        _write_whole(lines[0], names)
    else:
        _printed(lines, names, form)
    return EXIT_OK


def _or_said(lines: Iterable[bytes]) -> Iterator[bytes]:
    """The same; where there are none, that is said: an empty table looks like one that did not come."""
    none = True
    for line in lines:
        none = False
        yield line
    if none:
        print("no records in that time", file=sys.stderr)


def _printed(lines: Iterable[bytes], names: Names, form: Format) -> Callable[[bytes], None]:
    """Print them; what prints further ones."""
    if form is Format.JSON:
        write_data(_json(lines, names))
    elif form is Format.CSV:
        write_data(written(calls.flat(lines, names), tuple(calls.COLUMNS), form))
    write = _write_lines if form is Format.NDJSON else _write_table(names)
    for line in lines if form in (Format.TABLE, Format.NDJSON) else ():
        write(line)
    return write


def _json(lines: Iterable[bytes], names: Names) -> Iterator[bytes]:
    before = b"[\n"
    for line in lines:
        yield before + calls.named(line, names)
        before = b",\n"
    yield b"[]\n" if before.startswith(b"[") else b"\n]\n"


def _follow(
    reader: SpoolReader, places: dict[str, int], fits: Callable[[bytes], bool], write: Callable[[bytes], None]
) -> None:
    while True:
        sys.stdout.flush()
        time.sleep(POLL_S)
        for instance in reader.instances():
            for group in reader.read(instance, places.get(instance, 0)):
                for line in filter(fits, group.lines):
                    write(line)
                places[instance] = group.last_seq


def _write_lines(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")


def _write_table(names: Names) -> Callable[[bytes], None]:
    room = terminal_chars()
    columns = COLUMNS if room >= sum(width + len(GAP) for _, width, _, _ in COLUMNS) else NARROW
    taken = sum(width + len(GAP) for _, width, _, _ in columns[:-1])
    widths = [*(width for _, width, _, _ in columns[:-1]), max(min(room - taken, CALL_CHARS_MAX), columns[-1][1])]
    printed = False

    def line(cells: Iterable[str]) -> str:
        fitted = [
            _fit(cell, width, right, width_matters=room < UNBOUND_CHARS)
            for cell, width, (_, _, right, _) in zip(cells, widths, columns, strict=True)
        ]
        return GAP.join(fitted).rstrip()

    def write(stored: bytes) -> None:
        nonlocal printed
        if not printed:
            print(line(title for title, _, _, _ in columns))
            printed = True
        record = orjson.loads(stored)
        who = names.shown(calls.FIELDS["subscriber"](record))
        print(line(shown(who if title == SUBSCRIBER else value(record)) for title, _, _, value in columns))

    return write


def _fit(text: str, width: int, right: bool, *, width_matters: bool) -> str:
    clipped = text if len(text) <= width or not width_matters else text[: width - 1] + "…"
    return clipped.rjust(width) if right else clipped.ljust(width)
