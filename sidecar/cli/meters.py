"""Show the meters, run them over recorded calls, and create them at a backend.

`properties` prints the words that a definition may use. `test` counts what the spool still keeps, and nothing else is
touched by it: a definition can be tried before anything is billed by it. With `--backend` it says of each call what
that backend would be sent and what it would refuse; nothing is sent. `provision` creates what is missing there and
compares what is not; it changes nothing that is there.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import unquote_plus

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
from sidecar.meters.properties import (
    FIXED,
    PROVIDER_UNITS,
    Vocabulary,
    about,
    dimension_name,
    type_of,
    unit_name,
)
from sidecar.model.delivery import AddsUp, Event, Sealed
from sidecar.model.record import Record
from sidecar.runtime.reports.formats import stamp
from sidecar.runtime.reports.parameters import near
from sidecar.settings import Settings
from sidecar.settings.schema import Setting

if TYPE_CHECKING:
    from sidecar.backends.base import Provisioned
    from sidecar.model.delivery import Backend

_LIST: Final = ("name", "type", "of", "filters", "multiplier", "bucket_size", "group_by", "reset_usage")
_TEST: Final = ("meter", "subscriber", "group", "from", "value")
_PROPERTIES: Final = ("name", "type", "about")
_TRIAL: Final = ("started", "subscriber", "customer", "event", "result", "what")
_TRIAL_ALL: Final = (
    "record", "started", "subscriber", "customer", "event", "result", "reason", "detail", "path", "content_type",
    "body",
)  # fmt: skip
SHOWN_RECORDS: Final = 50
# In the place of an address or key that is not set, the first that it may be: nothing is sent.
STAND_INS: Final = ("http://not-asked.invalid", "nats://not-asked.invalid")
SLICE_RECORDS: Final = 1000  # read before they are added up: a megabyte or two


def add(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to do", metavar="KIND", required=True)
    shown = _kind(kinds, "list", "show the definitions", _list)
    add_format(shown, "table", "json")
    words = _kind(kinds, "properties", "show what a definition may name: the properties of a record", _properties)
    add_format(words, "table", "json", "csv")
    tried = _kind(kinds, "test", "run them over recorded calls", _test)
    tried.add_argument("names", nargs="*", metavar="NAME", help="of meters; none: all")
    tried.add_argument("--backend", metavar="NAME", help="say what it would be sent of each call, and send nothing")
    tried.add_argument(
        "--limit",
        type=_count,
        default=SHOWN_RECORDS,
        metavar="N",
        help=f"with --backend: show the last N calls (default: {SHOWN_RECORDS}); all are counted",
    )
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
    vocabulary = Vocabulary.of(settings.attribution.dimensions, (each.name for each in settings.usage.elements))
    try:
        meters = read_meters(settings.meters, vocabulary)
    except MetersError as error:
        raise CommandError("\n  ".join(["the meters cannot be used:", *error.problems]), EXIT_USAGE) from None
    by_name = {meter.name: meter for meter in meters}
    for name in names:
        if name not in by_name:
            raise CommandError(f"there is no meter {name!r}; the meters are: {', '.join(by_name)}", EXIT_USAGE)
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
    print(render(rows, columns, Format.TABLE, whole=("of", "filters")), end="")
    if not settings.meters:
        print(
            "no meters are defined, so these are in force: api_calls counts what was answered below 400, the others "
            "what was consumed in any case; see docs/meters.md",
            file=sys.stderr,
        )
    return EXIT_OK


def _properties(arguments: argparse.Namespace, settings: Settings) -> int:
    rows = [{"name": name, "type": type_of(name), "about": about(name)} for name in FIXED]
    for name in settings.attribution.dimensions:
        header = settings.attribution.dimensions[name]
        rows.append({"name": dimension_name(name), "type": "text", "about": f"own: the header {header}"})
    own = {each.name for each in settings.usage.elements}
    for element in settings.usage.elements:
        where = f"the header {element.header}" if element.header else f"the member {'.'.join(element.json)}"
        rows.append({"name": unit_name(element.name), "type": "decimal", "about": f"own: {where}"})
    for name, meaning in PROVIDER_UNITS.items():
        if name not in own:
            rows.append({"name": unit_name(name), "type": "decimal", "about": meaning})
    print(render(rows, _PROPERTIES, Format(arguments.format)), end="")
    return EXIT_OK


def _test(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.backend is not None:
        return _trial(arguments, settings)
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
    print(render(rows, _TEST, form, spare=("group",), whole=("from", "value")), end="")
    return EXIT_OK


def _trial(arguments: argparse.Namespace, settings: Settings) -> int:
    """What a backend would be sent of each recorded call."""
    from sidecar.backends.base import label_id

    meters_of(settings)  # says what is wrong with them
    backend = _backend(settings, arguments.backend, only=arguments.names)
    customers = {ours: theirs[backend.name] for ours, theirs in settings.subscribers.items() if backend.name in theirs}
    adds_up = meters_of(settings) if isinstance(backend, AddsUp) else ()
    shown: deque[list[dict[str, Any]]] = deque(maxlen=arguments.limit)
    counts: Counter[tuple[str, str]] = Counter()
    oldest_s = None if backend.abilities.age_max_s is None else time.time() - backend.abilities.age_max_s
    for record in _records(settings.data_dir, arguments.since):
        rows = list(_outcomes(record, backend, adds_up, oldest_s))
        counts.update((row["result"], row["reason"] or "") for row in rows)
        counts["records", ""] += 1
        common = {
            "record": record.id,
            "started": stamp(record.started_at),
            "subscriber": None if record.subscriber is None else record.subscriber.id,
        }
        for row in rows:
            customer = None if row["reason"] == "no_customer" else label_id(record, customers)
            row.update(common, customer=customer)
        shown.append(rows)
    lines = [row for rows in shown for row in rows]
    form = Format(arguments.format)
    columns = _TRIAL if form is Format.TABLE else _TRIAL_ALL
    print(render(lines, columns, form, spare=("started", "customer"), whole=("started", "result")), end="")
    if form is Format.TABLE:
        print(_said(backend.name, counts))
    return EXIT_FAILED if any(result in (REFUSED, PARKED) for result, _ in counts) else EXIT_OK


SENT: Final = "sent"
REFUSED: Final = "refused"  # this event; the record's others go
PARKED: Final = "parked"
SKIPPED: Final = "skipped"


def _outcomes(
    record: Record, backend: Backend, adds_up: Sequence[Meter], oldest_s: float | None
) -> Iterator[dict[str, Any]]:
    """One row for each event of a record, made as delivery makes it."""
    from sidecar.backends.base import failures

    encoded = backend.encode([record])
    for sealed in encoded.sealed:
        body, old = _text_of(sealed), oldest_s is not None and record.started_s < oldest_s
        for event in sealed.events:
            yield {
                "event": _event_name(event, record),
                "result": PARKED if old else SENT,
                "reason": "too_old" if old else None,
                "detail": None,
                "path": sealed.path or None,
                "content_type": sealed.content_type,
                "body": body,
                "what": "too_old" if old else body,
            }
    withheld = {**encoded.withheld, **failures(record, adds_up)}
    for event, why in withheld.items():
        what = f"{why.reason} ({why.detail})" if why.detail else why.reason
        yield {
            "event": _event_name(event, record),
            "result": REFUSED,
            "reason": why.reason,
            "detail": why.detail,
            "what": what,
        }
    for result, reasons in ((PARKED, encoded.parked), (SKIPPED, encoded.skipped)):
        for reason in reasons.values():
            yield {"event": "record", "result": result, "reason": reason, "detail": None, "what": reason}


def _event_name(event: Event, record: Record) -> str:
    """Of a meter's event the meter, else that it is the record's."""
    return event.event_id.removeprefix(f"{record.id}:") if event.event_id != record.id else "record"


def _text_of(sealed: Sealed) -> str:
    text = sealed.body.decode("utf-8", "replace").rstrip("\n")
    return unquote_plus(text) if sealed.content_type.startswith("application/x-www-form-urlencoded") else text


def _said(name: str, counts: Counter[tuple[str, str]]) -> str:
    """How many of what, in one line."""
    records = counts.pop(("records", ""), 0)
    parts = []
    for result in (SENT, REFUSED, PARKED, SKIPPED):
        reasons = {reason: count for (kind, reason), count in counts.items() if kind == result}
        if reasons:
            why = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()) if reason)
            parts.append(f"{sum(reasons.values())} {result}{f' ({why})' if why else ''}")
    return f"of {records} recorded calls {name} would get: {', '.join(parts) or 'nothing'}; nothing was sent"


def _stand_in(one: Setting) -> object:
    for text in STAND_INS:
        with contextlib.suppress(ValueError):
            return one.value(one.kind.parse(text))
    raise CommandError(f"{one.name} has to be set for this", EXIT_USAGE)


def _backend(settings: Settings, name: str, only: Sequence[str] = ()) -> Backend:
    """A backend that nothing is sent to: what it needs for sending need not be set."""
    from sidecar.backends import BACKENDS
    from sidecar.runtime import backend_factory

    _known(name)
    values = dict(settings.backend(name))
    for one in BACKENDS[name].settings:
        if one.required and values.get(one.name) is None:
            values[one.name] = _stand_in(one)
    if only:
        if "meters" not in values:
            raise CommandError(f"{name} is given whole records: leave the names of meters out", EXIT_USAGE)
        meters_of(settings, only)
        values["meters"] = (
            {n: i for n, i in values["meters"].items() if n in only}
            if isinstance(values["meters"], Mapping)
            else tuple(only)
        )
    try:
        return backend_factory.backend(replace(settings, backend_values={name: values}), name, backend_factory.NoLedger)
    except ValueError as error:
        raise CommandError(str(error), EXIT_USAGE) from None


def _known(name: str) -> None:
    from sidecar.backends import BACKENDS

    if name not in BACKENDS:
        raise CommandError(f"--backend {name} is no backend{near(name, BACKENDS)}", EXIT_USAGE)


def _make(arguments: argparse.Namespace, settings: Settings) -> int:
    from sidecar.backends import BACKENDS
    from sidecar.backends.base import Provisioned
    from sidecar.runtime import backend_factory

    meters, name = meters_of(settings, arguments.names), arguments.backend
    _known(name)
    # Before a key is asked for, which would be for nothing.
    if not issubclass(cast("type", BACKENDS[name].kind), Provisioned):
        makes = ", ".join(n for n, row in BACKENDS.items() if issubclass(cast("type", row.kind), Provisioned))
        raise CommandError(f"{name} has no meters that could be created from here; {makes} have", EXIT_USAGE)
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
    return asyncio.run(_provision(backend, cast("Provisioned", backend), meters))


async def _provision(backend: Backend, made_by: Provisioned, meters: Iterable[Meter]) -> int:
    try:
        done = [await made_by.provision(meter) for meter in meters]
    finally:
        await backend.aclose()
    for one in done:
        print(one.text, file=sys.stdout if one.fits else sys.stderr)
    return EXIT_OK if all(one.fits for one in done) else EXIT_FAILED


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


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
    return stamp(datetime.fromtimestamp(start, UTC), "minutes") if start else None


def _value(delta: BucketDelta, meter: Meter) -> str | None:
    if delta.kind is Kind.UNIQUE_COUNT:
        return str(len(delta.hashes))
    return None if delta.value is None else write_amount(Decimal(meter.scaled(delta.value)))


def _order(delta: BucketDelta) -> tuple[str, str, str, int]:
    key = delta.key
    return key.meter, key.subscriber or "", key.group or "", key.start
