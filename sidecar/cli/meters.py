"""Show the meters, run them over recorded calls, and create them at a backend.

`test` counts what the spool still keeps, and nothing else is touched by it: a definition can be tried before anything
is billed by it. `provision` creates what is missing there and compares what is not; it changes nothing that is there.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sidecar.cli.output import Format, Progress, counted, render
from sidecar.cli.shared import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    CommandError,
    add_data_dir,
    add_format,
    add_since,
    read_settings,
)
from sidecar.meters.buckets import BucketDelta, Groups, bucket_deltas
from sidecar.meters.definition import Kind, Meter, MetersError, read_meters
from sidecar.meters.hourly import grouped, write_amount
from sidecar.model.record import Record
from sidecar.settings import Settings

if TYPE_CHECKING:
    from sidecar.backends.base import Provisioned
    from sidecar.model.delivery import Backend

_LIST: Final = ("name", "type", "of", "filters", "multiplier", "bucket_size", "group_by", "reset_usage")
_TEST: Final = ("meter", "subscriber", "group", "from", "value")
SLICE_RECORDS: Final = 1000  # read before they are added up: a megabyte or two


def add(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to do", metavar="KIND", required=True)
    shown = _kind(kinds, "list", "show the definitions", _list)
    add_format(shown, "table", "json")
    tried = _kind(kinds, "test", "run them over recorded calls", _test)
    tried.add_argument("names", nargs="*", metavar="NAME", help="of meters; none: all")
    add_since(tried)
    add_format(tried, "table", "json", "csv")
    made = _kind(kinds, "provision", "create them at a backend; what is there is compared, never changed", _make)
    made.add_argument("names", nargs="*", metavar="NAME", help="of meters; none: all")
    made.add_argument("--backend", required=True, metavar="NAME", help="one that has meters: flexprice, stripe")


def run(arguments: argparse.Namespace) -> int:
    code: int = arguments.meters_run(arguments, read_settings(arguments))
    return code


def meters_of(settings: Settings, names: Iterable[str] = ()) -> tuple[Meter, ...]:
    """The definitions, or those named; `CommandError` where one cannot be used or is not there."""
    try:
        meters = read_meters(settings.meters)
    except MetersError as error:
        raise CommandError("\n  ".join(["the meters cannot be used:", *error.problems]), EXIT_USAGE) from None
    by_name = {meter.name: meter for meter in meters}
    for name in names:
        if name not in by_name:
            raise CommandError(f"there is no meter {name!r}; there are {', '.join(by_name)}", EXIT_USAGE)
    return tuple(by_name[name] for name in dict.fromkeys(names)) or meters


def _kind(
    kinds: Any, name: str, text: str, do: Callable[[argparse.Namespace, Settings], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    add_data_dir(parser)
    parser.set_defaults(meters_run=do)
    return parser


def _list(arguments: argparse.Namespace, settings: Settings) -> int:
    meters = meters_of(settings)
    if arguments.format == Format.JSON:
        print(json.dumps([meter.to_dict() for meter in meters], indent=2))
        return EXIT_OK
    rows = []
    for meter in meters:
        definition = meter.to_dict()
        aggregation = definition["aggregation"]
        filters = " and ".join(f"{each.key} = {' or '.join(each.values)}" for each in meter.filters)
        of = aggregation.get("field") or aggregation.get("expression")
        rows.append({**definition, **aggregation, "of": of, "filters": filters or None})
    # What no meter has is left out.
    columns = [name for name in _LIST if name in ("name", "type", "of") or any(row.get(name) for row in rows)]
    print(render(rows, columns, Format.TABLE), end="")
    return EXIT_OK


def _test(arguments: argparse.Namespace, settings: Settings) -> int:
    meters = {meter.name: meter for meter in meters_of(settings, arguments.names)}
    deltas = bucket_deltas(_groups(_records(settings.data_dir, arguments.since)), tuple(meters.values()))
    rows = [
        {
            "meter": delta.key.meter,
            "subscriber": delta.key.subscriber,
            "group": delta.key.group,
            "from": _start(delta.key.start),
            "value": _value(delta, meters[delta.key.meter]),
        }
        for delta in sorted(deltas, key=_order)
    ]
    form = Format(arguments.format)
    if form is Format.TABLE and not rows:
        print("no recorded call is measured by them")
        return EXIT_OK
    print(render(rows, _TEST, form), end="")
    return EXIT_OK


def _make(arguments: argparse.Namespace, settings: Settings) -> int:
    from sidecar.backends import BACKENDS
    from sidecar.backends.base import Provisioned
    from sidecar.runtime import backend_factory

    meters, name = meters_of(settings, arguments.names), arguments.backend
    if name not in BACKENDS:
        raise CommandError(f"{name} is no backend; there are {', '.join(BACKENDS)}", EXIT_USAGE)
    if missing := backend_factory.missing(settings, name):
        raise CommandError(f"{', '.join(missing)} is not set: {name} is asked with it", EXIT_USAGE)
    # Which meters are sent is a choice of its own, and no reason not to create another.
    values = dict(settings.backend(name))
    values |= {s.name: s.default_value() for s in BACKENDS[name].settings if s.name == "meters"}
    try:
        alone = replace(settings, meters=(), backend_values={name: values})
        backend = backend_factory.backend(alone, name, backend_factory.NoLedger)
    except ValueError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    if not isinstance(backend, Provisioned):
        raise CommandError(f"{name} has no meters that could be created from here", EXIT_USAGE)
    return asyncio.run(_provision(backend, backend, meters))


async def _provision(backend: Backend, made_by: Provisioned, meters: Iterable[Meter]) -> int:
    try:
        done = [await made_by.provision(meter) for meter in meters]
    finally:
        await backend.aclose()
    for one in done:
        print(one.text, file=sys.stdout if one.fits else sys.stderr)
    return EXIT_OK if all(one.fits for one in done) else EXIT_FAILED


def _records(data_dir: Path, since: datetime | None) -> Iterator[Record]:
    from sidecar.cli.files import spool_of

    with spool_of(data_dir) as reader:
        lines = reader.lines(since_ns=0 if since is None else max(int(since.timestamp() * 1e9), 0))
        for line in counted(lines, Progress("records measured")):
            yield Record.from_json(line)


def _groups(records: Iterator[Record]) -> Groups:
    """Slice by slice: a spool does not fit into memory."""
    while part := list(islice(records, SLICE_RECORDS)):
        yield from grouped(part).items()


def _start(start: int) -> str | None:
    return datetime.fromtimestamp(start, UTC).isoformat(timespec="minutes") if start else None


def _value(delta: BucketDelta, meter: Meter) -> str | None:
    if delta.kind is Kind.UNIQUE_COUNT:
        return str(len(delta.hashes))
    return None if delta.value is None else write_amount(Decimal(meter.scaled(delta.value)))


def _order(delta: BucketDelta) -> tuple[str, str, str, int]:
    key = delta.key
    return key.meter, key.subscriber or "", key.group or "", key.start
