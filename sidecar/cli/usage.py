"""What was consumed, summed by subscriber, model, route, hour and more.

Asks the ledger (`SIDECAR_BACKENDS` has `ledger` by default); works while the sidecar runs and while it does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final

from sidecar.cli.instance import counter
from sidecar.cli.meters import meters_of
from sidecar.cli.output import Format, amount, render, write_data
from sidecar.cli.shared import (
    EXIT_OK,
    EXIT_USAGE,
    CommandError,
    add_data_dir,
    add_format,
    add_where,
    read_settings,
)
from sidecar.ledger import TIMES, UsageRow
from sidecar.ledger.queries import Ledger
from sidecar.meters.hourly import write_amount
from sidecar.runtime.reports.formats import NOBODY, Names, stamp, written
from sidecar.runtime.reports.parameters import BY, QueryError, UsageQuery, usage_query
from sidecar.runtime.reports.usage import usage
from sidecar.settings import Settings
from sidecar.storage.files import StorageError

# A table has what fits a screen; JSON and CSV have everything.
SHOWN: Final = (
    "calls", "errors", "without_usage", "input_tokens", "cache_read_input_tokens", "output_tokens", "total_tokens",
    "cost_usd", "unpriced",
)  # fmt: skip
BYTES: Final = ("request_bytes", "response_bytes")  # of an API that states no usage: what else there is
OF_SUMS: Final = ("by", "where", "sort", "top", "timezone")  # running values are kept as their meter says
TOKENS: Final = ("input_tokens", "output_tokens", "total_tokens")  # where there is any usage, all expect them
# Left out of a table that is too wide, the first one first.
SPARE: Final = ("cache_read_input_tokens", "input_tokens", "output_tokens", "errors", "total_tokens")
HEADS: Final = {
    "without_usage": "no usage", "request_bytes": "bytes in", "response_bytes": "bytes out",
    "input_tokens": "input", "cache_read_input_tokens": "cached", "output_tokens": "output", "total_tokens": "tokens",
    "cost_usd": "cost USD",
}  # fmt: skip
METER: Final = ("subscriber", "name", "group", "from", "value", "note")
UNCLAIMED: Final = 'sidecar_usage_anomalies_total{kind="answer_unclaimed"}'
UNCLAIMED_LIMIT_S: Final = 2.0  # a sum needs no running sidecar, and waits for none


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by",
        metavar="NAME,…",
        help="subscriber, model, provider, route, status, upstream, instance, hour, day, month, or a dimension "
        f"(default: {','.join(BY)}; '' for one sum)",
    )
    parser.add_argument("--meter", metavar="NAME", help="the running values of one meter instead")
    parser.add_argument("--since", metavar="TIME", help="an age (90m, 24h, 7d), today, or a date and time (UTC)")
    parser.add_argument("--until", metavar="TIME", help="as --since, not included")
    add_where(parser)
    parser.add_argument("--sort", metavar="COLUMN", help="by cost, tokens, calls, …, the greatest first; +calls: last")
    parser.add_argument("--top", metavar="N", help="only the N largest, and the others as one row")
    parser.add_argument("--timezone", metavar="ZONE", help="of hours, days and months: Europe/Berlin (default: UTC)")
    add_data_dir(parser)
    add_format(parser, "table", "json", "csv", "ndjson")


def run(arguments: argparse.Namespace) -> int:
    from sidecar.runtime import backend_factory

    settings = read_settings(arguments)
    names = Names(settings.subscriber_names)
    given = [f"--{name}" for name in OF_SUMS if getattr(arguments, name) not in (None, [])]
    if arguments.meter is not None and given:
        said = "a meter's running values are kept by subscriber, group and bucket alone"
        raise CommandError(f"{' and '.join(given)} cannot be asked with --meter: {said}", EXIT_USAGE)
    try:
        query = usage_query(
            now=datetime.now(UTC),
            dimensions=settings.attribution.dimensions,
            by=arguments.by,
            since=arguments.since,
            until=arguments.until,
            where=arguments.where,
            sort=arguments.sort,
            top=arguments.top,
            timezone=arguments.timezone,
        )
        if not backend_factory.has_ledger(settings):
            raise CommandError(
                f"there is no ledger at {settings.data_dir / backend_factory.LEDGER}: either nothing was delivered to "
                "it yet, or SIDECAR_DATA_DIR is another one"
            )
        with closing(backend_factory.open_reader(settings)) as ledger:
            if arguments.meter is not None:
                print(_of_meter(ledger, settings, arguments.meter, query, Format(arguments.format), names), end="")
                return EXIT_OK
            found = usage(ledger, query, names)
    except QueryError as error:
        raise CommandError(error.typed(), EXIT_USAGE) from None
    except StorageError as error:
        raise CommandError(str(error)) from None
    form = Format(arguments.format)
    if form is Format.TABLE:
        print(report(found.rows, found.by, form, names=names, others=found.others), end="")
        for line in filter(None, (_unpriced(found.rows), _unclaimed(settings))):
            print(line)
    else:
        write_data(written(found.flat(names), found.columns(), form, indent=2))
    return EXIT_OK


def _unpriced(rows: Sequence[UsageRow]) -> str | None:
    """What the sum of costs lacks."""
    calls = sum(row.unpriced for row in rows)
    if calls <= 0:
        return None
    said = amount(calls, "call is", "calls are")
    whose = "its price is" if calls == 1 else "their prices are"
    return f"note: {said} not in the cost, because {whose} not known; `metering-sidecar check` names the models"


def _unclaimed(settings: Settings) -> str | None:
    """What the running sidecar saw and could not count: sums alone would not show that something is missing."""
    try:
        count = counter(settings.data_dir, UNCLAIMED, limit_s=UNCLAIMED_LIMIT_S)
    except CommandError:
        return None
    if not count:
        return None
    said = amount(count, "response speaks", "responses speak")
    return f"note: since this sidecar started {said} of usage in a way that no reader knows; nothing of it is counted"


def _of_meter(ledger: Ledger, settings: Settings, name: str, query: UsageQuery, form: Format, names: Names) -> str:
    (meter,) = meters_of(settings, [name])
    rows = [
        {
            "subscriber": names.shown(row.subscriber) if form is Format.TABLE else row.subscriber,
            "name": names.of(row.subscriber),
            "group": row.group,
            "from": None if row.start is None else stamp(row.start, "minutes"),
            "value": row.value,
            "note": "at least so many" if row.capped else None,
        }
        for row in ledger.meter(meter, query.since, query.until)
    ]
    if form is Format.TABLE and not rows:
        return "no usage in that time\n"
    # A column in which nothing is said is left out of the table.
    bare = form is Format.TABLE
    columns = [
        name
        for name in METER
        if not bare or name in ("from", "value") or (name != "name" and any(row[name] for row in rows))
    ]
    return render(rows, columns, form, whole=("from", "value"))


def report(
    rows: Sequence[UsageRow],
    by: Sequence[str],
    form: Format,
    *,
    names: Names = NOBODY,
    others: Sequence[int | None] = (),
) -> str:
    """The rows as the command prints them as a table; also what `demo` shows."""
    if not rows:
        return "no usage in that time\n"
    flat = [dict(zip(by, row.group, strict=True)) | _values(row) for row in rows]
    for row in flat if "subscriber" in by else ():
        row["subscriber"] = names.shown(row["subscriber"])
    named = next((name for name in by if name not in TIMES), None)
    for row, count in zip(flat, others, strict=bool(others)):
        if count is not None and named is not None:
            row[named] = "1 other" if count == 1 else f"{count:,} others"
    # A column that nothing was ever reported for is left out of the table, unless it is one that all expect.
    metered = any(row[name] is not None for row in flat for name in TOKENS)
    always = ("calls", *(TOKENS if metered else BYTES))
    shown = [name for name in (*SHOWN, *BYTES) if name in always or (name in SHOWN and any(row[name] for row in flat))]
    total = {by[0]: "total"} | _total(flat, shown) if by and len(rows) > 1 else None
    return render(flat, [*by, *shown], form, total=total, heads=HEADS, spare=SPARE, whole=TIMES)


def _values(row: UsageRow) -> dict[str, Any]:
    values = asdict(row)
    del values["group"]
    return values


def _total(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Sums of what is known; a column in which nothing is known stays empty."""
    total: dict[str, Any] = {}
    for name in columns:
        known = [row[name] for row in rows if row[name] is not None]
        if name == "cost_usd":
            total[name] = write_amount(sum((Decimal(value) for value in known), Decimal(0))) if known else None
        else:
            total[name] = sum(known) if known else None
    return total
