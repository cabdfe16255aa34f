"""One line per call, oldest first, as long as the spool keeps it.

`ndjson` is the stored line byte for byte: what `webhook` and `file` deliver too.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import orjson

from sidecar.cli.output import shown
from sidecar.cli.shared import EXIT_OK, CommandError, add_data_dir, add_format, add_since, read_settings
from sidecar.spool import SpoolError, SpoolReader

POLL_S: Final = 0.2  # how soon a followed record shows
# A call's record is committed when it ends: one that began before `--since` may stand behind it, but not the
# other way round. A clock that was set back by less than this hides nothing.
CLOCK_SLACK: Final = timedelta(minutes=5)

# Fixed, because the lines of a stream are printed as they come: (title, width, to the right, value).
_Column = tuple[str, int, bool, Callable[[dict[str, Any]], Any]]
COLUMNS: Final[tuple[_Column, ...]] = (
    ("started", 23, False, lambda r: str(r["started_at"])[:23].replace("T", " ")),
    ("status", 6, True, lambda r: r["status"]),
    ("outcome", 14, False, lambda r: r["outcome"]),
    ("ms", 8, True, lambda r: r["duration_ms"]),
    ("subscriber", 20, False, lambda r: (r["subscriber"] or {}).get("id")),
    ("model", 26, False, lambda r: (r["usage"] or {}).get("model")),
    ("in", 8, True, lambda r: (r["usage"] or {}).get("input_tokens")),
    ("out", 8, True, lambda r: (r["usage"] or {}).get("output_tokens")),
    ("call", 60, False, lambda r: f"{r['method']} {r['route'] or r['url']}"),
)


def add(parser: argparse.ArgumentParser) -> None:
    add_since(parser)
    parser.add_argument("--follow", "-f", action="store_true", help="go on with each new one, until Ctrl-C")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the last N")
    add_data_dir(parser)
    add_format(parser, "table", "ndjson")


def run(arguments: argparse.Namespace) -> int:
    data_dir = read_settings(arguments).data_dir
    write = _write_lines if arguments.format == "ndjson" else _write_table()
    try:
        with SpoolReader(data_dir) as reader:
            if not reader.instances() and not arguments.follow:
                raise CommandError(f"there are no records in {data_dir}: is SIDECAR_DATA_DIR the right one?")
            # Asked before the first read, so that what comes in between is printed once and not skipped.
            places = {instance: reader.last_seq(instance) for instance in reader.instances()}
            for line in _past(reader, places, arguments.since, arguments.limit):
                write(line)
            if arguments.follow:
                _follow(reader, places, write)
    except SpoolError as error:
        raise CommandError(str(error)) from None
    return EXIT_OK


def _past(reader: SpoolReader, places: dict[str, int], since: datetime | None, limit: int | None) -> Iterator[bytes]:
    lines = _until(reader, places, since)
    return iter(deque(lines, maxlen=limit)) if limit is not None else lines


def _until(reader: SpoolReader, places: dict[str, int], since: datetime | None) -> Iterator[bytes]:
    since_ns = 0 if since is None else int((since - CLOCK_SLACK).timestamp() * 1e9)
    for line in reader.lines(since_ns=max(since_ns, 0)):
        record = orjson.loads(line)
        if record["seq"] > places.get(record["instance"], 0):
            continue  # came while we read: `follow` prints it
        if since is None or datetime.fromisoformat(record["started_at"]).astimezone(UTC) >= since:
            yield line


def _follow(reader: SpoolReader, places: dict[str, int], write: Callable[[bytes], None]) -> None:
    while True:
        sys.stdout.flush()
        time.sleep(POLL_S)
        for instance in reader.instances():
            for group in reader.read(instance, places.get(instance, 0)):
                for line in group.lines:
                    write(line)
                places[instance] = group.last_seq


def _write_lines(line: bytes) -> None:
    sys.stdout.buffer.write(line + b"\n")


def _write_table() -> Callable[[bytes], None]:
    head = "  ".join(title.rjust(width) if right else title.ljust(width) for title, width, right, _ in COLUMNS)
    printed = False

    def write(line: bytes) -> None:
        nonlocal printed
        if not printed:
            print(head.rstrip())
            printed = True
        record = orjson.loads(line)
        print("  ".join(_fit(shown(value(record)), width, right) for _, width, right, value in COLUMNS).rstrip())

    return write


def _fit(text: str, width: int, right: bool) -> str:
    clipped = text if len(text) <= width else text[: width - 1] + "…"
    return clipped.rjust(width) if right else clipped.ljust(width)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("expected a whole number, 1 or more")
    return int(text)
