"""Who is at what of which limit, and until when.

Asks the running instance, which knows what open calls hold; adds up the records where none is running. Limits that
sidecars share are those of all of them, with this one's part beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final

from sidecar.cli.instance import ask
from sidecar.cli.output import Format, render, write_data
from sidecar.cli.shared import EXIT_OK, EXIT_USAGE, CommandError, add_data_dir, add_format, read_settings
from sidecar.runtime.reports.formats import NOBODY, Names, written
from sidecar.runtime.reports.lists import LIMITS, LIMITS_BY_INSTANCE, limits, limits_flat, limits_query
from sidecar.runtime.reports.parameters import QueryError
from sidecar.settings import Settings

COLUMNS: Final = ("limit", "scope", "used", "reserved", "amount", "percent", "unit", "window", "until", "action")
UNDEFINED: Final = "no limit is defined: see SIDECAR_LIMITS and [[limits]]"
HEADS: Final = {"percent": "%", "scope": "of", "until": "until, UTC"}


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", metavar="NAME", help="of this limit alone")
    parser.add_argument("--over", metavar="PERCENT", help="only who has used so much of it, or more")
    parser.add_argument("--by", metavar="instance", help="what each of the sidecars that share it used and has leased")
    add_data_dir(parser)
    add_format(parser, "table", "json", "csv", "ndjson")


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    form, names = Format(arguments.format), Names(settings.subscriber_names)
    try:
        query = limits_query(limit=arguments.limit, over=arguments.over, by=arguments.by)
    except QueryError as error:
        raise CommandError(error.typed(), EXIT_USAGE) from None
    found = ask(settings.data_dir, "/limits", token=settings.serve.admin_token)
    standing = _of_files(settings) if found is None else found["limits"]
    rows = limits(standing, query, names)
    if not rows:
        _say_what_is_not_there(query.limit, _names(settings), standing, to_a_person=form is Format.TABLE)
    if form is Format.JSON:
        print(json.dumps({"limits": rows}, indent=2))
    elif form is not Format.TABLE:
        write_data(written(limits_flat(rows), LIMITS_BY_INSTANCE if query.by_instance else LIMITS, form))
    elif not rows:
        print("no limit has been touched by a call in its window")
    else:
        print(report(rows, names), end="")
    return EXIT_OK


def report(rows: Sequence[dict[str, Any]], names: Names = NOBODY) -> str:
    """As a table; also what `demo --limits` shows."""
    flat = [
        row
        | {name: Decimal(row[name]) for name in ("used", "reserved", "amount")}
        | {"scope": ", ".join(_scope(row["scope"], names)), "until": row["until"] and _plainly(row["until"])}
        for row in rows
    ]
    # Nearly all limits block: a column that says so in each row says nothing.
    shown = [name for name in COLUMNS if name != "action" or any(row["action"] != "block" for row in rows)]
    parts = {"here": "used", "leased here": "leased"} if any("here" in row for row in rows) else {}
    for row in flat:
        row.update({name: Decimal(row["here"][of]) for name, of in parts.items() if "here" in row})
    after = shown.index("reserved") + 1
    shown[after:after] = parts
    if any(row.get("instance") is not None for row in rows):
        shown.insert(shown.index("scope") + 1, "instance")
    spare = ("leased here", "reserved", "window", "action")
    return render(flat, shown, Format.TABLE, heads=HEADS, spare=spare, whole=("until",))


def _say_what_is_not_there(
    asked: str | None, defined: list[str] | None, standing: Sequence[dict[str, Any]], *, to_a_person: bool
) -> None:
    """A limit that nobody defined looks like one that nobody touched. `CommandError` where it is that; that there is
    none at all is no error to a program, which gets an empty list."""
    if defined is None:
        return
    known = dict.fromkeys((*defined, *(row["limit"] for row in standing)))
    if not known and (to_a_person or asked is not None):
        raise CommandError(UNDEFINED)
    if asked is not None and asked not in known:
        raise CommandError(f"no limit is called {asked}; the limits are: {', '.join(known)}", EXIT_USAGE)


def _names(settings: Settings) -> list[str] | None:
    """Of the limits that are defined where this command runs; None where that cannot be told."""
    from sidecar.gate.limits import LimitsError
    from sidecar.meters.definition import MetersError
    from sidecar.runtime import gate_factory

    try:
        return [limit.name for limit in gate_factory.limits(settings)]
    except (LimitsError, MetersError):
        return None


def _plainly(until: str) -> str:
    """A time whose column says that it is UTC, without the seconds of a whole minute."""
    return until[:19].replace("T", " ").removesuffix(":00")


def _scope(scope: dict[str, str], names: Names) -> list[str]:
    return [f"{name} {names.shown(value) if name == 'subscriber' else value}" for name, value in scope.items()]


def _of_files(settings: Settings) -> list[dict[str, Any]]:
    from sidecar.gate.limits import LimitsError
    from sidecar.runtime import gate_factory
    from sidecar.spool import SpoolReader
    from sidecar.storage.files import StorageError

    try:
        shared = gate_factory.fleet_now(settings)
        if shared is not None:
            return [gate_factory.shown(row) for row in shared]
        with SpoolReader(settings.data_dir) as reader:
            counters = gate_factory.counted(settings, reader, "", 0)
    except LimitsError as error:
        raise CommandError("\n".join(error.problems), EXIT_USAGE) from None
    except StorageError as error:
        raise CommandError(f"the limits are shared, and {error}") from None
    if counters is None:
        raise CommandError(UNDEFINED)
    return [gate_factory.shown(row) for row in counters.rows(time.time_ns())]
