"""Who is at what of which limit, and until when.

Asks the running instance, which knows what open calls hold; adds up the records where none is running.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any, Final

from sidecar.cli.instance import ask
from sidecar.cli.output import Format, render
from sidecar.cli.shared import EXIT_OK, EXIT_USAGE, CommandError, add_data_dir, add_format, read_settings
from sidecar.settings import Settings

COLUMNS: Final = ("limit", "scope", "used", "reserved", "amount", "percent", "unit", "window", "until", "action")
HEADS: Final = {"percent": "%", "scope": "of"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", metavar="NAME", help="of this limit alone")
    parser.add_argument("--over", metavar="PERCENT", type=float, help="only who has used so much of it, or more")
    add_data_dir(parser)
    add_format(parser, "table", "json")


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    found = ask(settings.data_dir, "/limits")
    rows = _of_files(settings) if found is None else found["limits"]
    if arguments.limit is not None:
        rows = [row for row in rows if row["limit"] == arguments.limit]
    if arguments.over is not None:
        rows = [row for row in rows if row["percent"] is None or row["percent"] >= arguments.over]
    if arguments.format == Format.JSON:
        print(json.dumps({"limits": list(rows)}, indent=2))
    elif not rows:
        print("no limit has been touched by a call in its window")
    else:
        print(report(rows), end="")
    return EXIT_OK


def report(rows: Sequence[dict[str, Any]]) -> str:
    """As a table; also what `demo --limits` shows."""
    flat = [row | {"scope": ", ".join(f"{name} {value}" for name, value in row["scope"].items())} for row in rows]
    # Nearly all limits block: a column that says so in each row says nothing.
    shown = [name for name in COLUMNS if name != "action" or any(row["action"] != "block" for row in rows)]
    return render(flat, shown, Format.TABLE, heads=HEADS)


def _of_files(settings: Settings) -> list[dict[str, Any]]:
    from sidecar.gate.limits import LimitsError
    from sidecar.runtime import gate_factory
    from sidecar.spool import SpoolReader

    try:
        with SpoolReader(settings.data_dir) as reader:
            counters = gate_factory.counted(settings, reader, "", 0)
    except LimitsError as error:
        raise CommandError("\n".join(error.problems), EXIT_USAGE) from None
    if counters is None:
        raise CommandError("no limit is defined: see SIDECAR_LIMITS and [[limits]]")
    return [gate_factory.shown(row) for row in counters.rows(time.time_ns())]
