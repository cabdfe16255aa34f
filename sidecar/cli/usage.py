"""What was consumed, summed by subscriber, model, route, hour and more.

Asks the ledger (`SIDECAR_BACKENDS` has `ledger` by default); works while the sidecar runs and while it does not.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from decimal import Decimal
from typing import Any, Final

from sidecar.cli.instance import counter
from sidecar.cli.meters import meters_of
from sidecar.cli.output import Format, render
from sidecar.cli.shared import (
    EXIT_OK,
    EXIT_USAGE,
    CommandError,
    add_data_dir,
    add_format,
    add_since,
    moment,
    read_settings,
)
from sidecar.ledger import LedgerError, LedgerReader, UsageRow
from sidecar.meters.hourly import write_amount
from sidecar.settings import Settings

BY: Final = "subscriber,model"
# A table has what fits a screen; JSON and CSV have everything.
SHOWN: Final = (
    "calls", "errors", "input_tokens", "cache_read_input_tokens", "output_tokens", "total_tokens", "cost_usd",
    "unpriced",
)  # fmt: skip
HEADS: Final = {
    "input_tokens": "input", "cache_read_input_tokens": "cached", "output_tokens": "output", "total_tokens": "tokens",
    "cost_usd": "cost USD",
}  # fmt: skip
METER: Final = ("subscriber", "group", "from", "value", "note")
UNCLAIMED: Final = 'sidecar_usage_anomalies_total{kind="answer_unclaimed"}'
UNCLAIMED_LIMIT_S: Final = 2.0  # a sum needs no running sidecar, and waits for none
ALWAYS: Final = ("calls", "input_tokens", "output_tokens", "total_tokens")


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--by", default=BY, metavar="NAME,…",
        help=f"subscriber, model, provider, route, status, hour, day, month (default: {BY}; '' for one sum)",
    )  # fmt: skip
    parser.add_argument("--meter", metavar="NAME", help="the running values of one meter instead")
    add_since(parser)
    parser.add_argument("--until", metavar="TIME", type=moment, help="as --since, not included")
    add_data_dir(parser)
    add_format(parser, "table", "json", "csv")


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    path = settings.data_dir / "ledger.db"
    by = tuple(name.strip() for name in arguments.by.split(",") if name.strip())
    if not path.exists():
        raise CommandError(
            f"there is no ledger at {path}: either nothing was delivered to it yet, or SIDECAR_DATA_DIR is another one"
        )
    try:
        if arguments.meter is not None:
            print(_of_meter(LedgerReader(path), settings, arguments), end="")
            return EXIT_OK
        rows = LedgerReader(path).usage(by, arguments.since, arguments.until)
    except LedgerError as error:
        raise CommandError(str(error), EXIT_USAGE if "cannot be grouped" in str(error) else 1) from None
    print(report(rows, by, Format(arguments.format)), end="")
    if arguments.format == Format.TABLE:
        for line in filter(None, (_unpriced(rows), _unclaimed(settings))):
            print(line)
    return EXIT_OK


def _unpriced(rows: Sequence[UsageRow]) -> str | None:
    """What the sum of costs lacks."""
    calls = sum(row.unpriced for row in rows)
    if calls <= 0:
        return None
    said = "1 call is" if calls == 1 else f"{calls} calls are"
    return f"note: {said} not in the cost, because theirs is not known; check names the models without a price"


def _unclaimed(settings: Settings) -> str | None:
    """What the running sidecar saw and could not count: sums alone would not show that something is missing."""
    try:
        count = counter(settings.data_dir, UNCLAIMED, limit_s=UNCLAIMED_LIMIT_S)
    except CommandError:
        return None
    if not count:
        return None
    said = "1 answer speaks" if count == 1 else f"{count} answers speak"
    return f"note: since this sidecar started {said} of usage in a way that no reader knows; nothing of it is counted"


def _of_meter(ledger: LedgerReader, settings: Settings, arguments: argparse.Namespace) -> str:
    (meter,) = meters_of(settings, [arguments.meter])
    rows = [
        {
            "subscriber": row.subscriber,
            "group": row.group,
            "from": None if row.start is None else row.start.isoformat(timespec="minutes"),
            "value": row.value,
            "note": "at least so many" if row.capped else None,
        }
        for row in ledger.meter(meter, arguments.since, arguments.until)
    ]
    form = Format(arguments.format)
    if form is Format.TABLE and not rows:
        return "no usage in that time\n"
    # A column in which nothing is said is left out of the table.
    bare = form is Format.TABLE
    columns = [name for name in METER if not bare or name in ("from", "value") or any(row[name] for row in rows)]
    return render(rows, columns, form)


def report(rows: Sequence[UsageRow], by: Sequence[str], form: Format) -> str:
    """The rows as the command prints them; also what `demo` shows."""
    flat = [dict(zip(by, row.group, strict=True)) | _values(row) for row in rows]
    if form is not Format.TABLE:
        values = list(_values(rows[0])) if rows else []
        return render(flat, [*by, *values], form)
    if not rows:
        return "no usage in that time\n"
    # A column that nothing was ever reported for is left out of the table, unless it is one that all expect.
    shown = [name for name in SHOWN if name in ALWAYS or any(row[name] for row in flat)]
    total = {by[0]: "total"} | _total(flat, shown) if by and len(rows) > 1 else None
    return render(flat, [*by, *shown], form, total=total, heads=HEADS)


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
