"""`spool cancel` and `spool complain`: a call that shall not be billed, and events that were not billed after all."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sidecar.cli.instance import change
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CommandError, add_data_dir
from sidecar.settings import Settings, SettingsError

LIMIT_S: Final = 600.0  # a backend is asked once for each event, and may be slow
REPORTS_BYTES_MAX: Final = 64 << 20  # of a file of reports; each is below 1 MiB
STDIN: Final = Path("-")


def add(kinds: Any) -> None:
    """The two kinds of `spool`."""
    cancel = _kind(kinds, "cancel", "take back what was delivered of one call, where its backends can", _cancel)
    cancel.add_argument("id", metavar="ID", help="of a record, or of one event of it")
    cancel.add_argument("--backend", metavar="NAME", help="only at this backend")

    text = "park delivered events that a backend reports as not billed"
    complain = _kind(kinds, "complain", text, _complain)
    complain.add_argument(
        "file", metavar="FILE", type=Path, help="Stripe's error reports, one or one a line; - for standard input"
    )


def run(arguments: argparse.Namespace, settings: Settings) -> int:
    code: int = arguments.mend_run(arguments, settings)
    return code


def _kind(kinds: Any, name: str, text: str, do: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    add_data_dir(parser)
    parser.set_defaults(mend_run=do)
    return parser


def _cancel(arguments: argparse.Namespace, settings: Settings) -> int:
    outcomes = _change("/cancel", {"id": arguments.id, "backend": arguments.backend}, settings)
    if not outcomes:
        where = f" at {arguments.backend}" if arguments.backend else ""
        print(f"nothing is known of {arguments.id}{where}: it was never delivered, or is older than the retention")
        return EXIT_FAILED
    for one in outcomes:
        print(f"{one['backend']}  {one['event_id']}  {one['text']}")
    return EXIT_OK if all(one["done"] for one in outcomes) else EXIT_FAILED


def _complain(arguments: argparse.Namespace, settings: Settings) -> int:
    from sidecar.backends.stripe.reports import ReportError, read_report
    from sidecar.runtime.admin.control import COMPLAINTS_MAX

    reports = []
    for number, document in enumerate(_documents(arguments.file), 1):
        try:
            reports.append(read_report(document))
        except ReportError as error:
            raise CommandError(f"{arguments.file}, report {number}: {error}", EXIT_USAGE) from None
    named = list(dict.fromkeys((one.event_id, one.code) for report in reports for one in report.complaints))
    outcomes: list[dict[str, Any]] = []
    for start in range(0, len(named), COMPLAINTS_MAX):
        request = {"backend": "stripe", "named": named[start : start + COMPLAINTS_MAX]}
        outcomes += _change("/complain", request, settings)
    for one in outcomes:
        print(f"{one['event_id']}  {one['text']}")
    bad = [one for one in outcomes if not one["done"]]
    unnamed = sum(report.unnamed for report in reports)
    print(f"{len(outcomes) - len(bad):,} of {len(named):,} named events are parked")
    if len(bad) < len(outcomes):
        print(
            "mend what is wrong, then: metering-sidecar spool redrive --backend stripe\n"
            "not before they are a day old: until then stripe takes them for repeats"
        )
    if unnamed:
        print(f"{unnamed:,} more events are counted and not named: compare the meter at stripe", file=sys.stderr)
    return EXIT_OK if not bad and not unnamed else EXIT_FAILED


def _change(path: str, request: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    """Through the running instance, or with the lock of its directory."""
    answer = change(settings.data_dir, path, request, limit_s=LIMIT_S)
    if answer is None:
        return _without_instance(path, request, settings)
    outcomes: list[dict[str, Any]] = answer["outcomes"]
    return outcomes


def _without_instance(path: str, request: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    from sidecar.delivery import StateError
    from sidecar.ledger import LedgerError
    from sidecar.runtime.backend_factory import faults, missing
    from sidecar.runtime.instance_lock import LockError
    from sidecar.spool import SpoolError

    if not (settings.data_dir / "delivery.db").exists():
        raise CommandError(f"nothing was ever delivered from {settings.data_dir}: is SIDECAR_DATA_DIR the right one?")
    problems = [f"{one} is not set" for name in settings.backends for one in missing(settings, name)]
    if problems := problems + faults(settings):
        raise SettingsError(problems)
    try:
        return asyncio.run(_in_books(path, request, settings))
    except (LockError, StateError, SpoolError, LedgerError) as error:
        raise CommandError(str(error)) from None


async def _in_books(path: str, request: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from sidecar.delivery import corrections
    from sidecar.runtime.offline import books

    async with books(settings) as opened:
        if path == "/cancel":
            outcomes = await corrections.cancel(request["id"], opened, opened.backends, backend=request["backend"])
        else:
            named = [corrections.Named(*one) for one in request["named"]]
            outcomes = await corrections.complain(request["backend"], named, opened, opened.backends)
        return [asdict(one) for one in outcomes]


def _documents(path: Path) -> Iterator[bytes]:
    """One document, or one a line where the whole is none."""
    import orjson

    try:
        if path == STDIN:
            whole = sys.stdin.buffer.read(REPORTS_BYTES_MAX + 1)
        else:
            with path.open("rb") as file:
                whole = file.read(REPORTS_BYTES_MAX + 1)
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}", EXIT_USAGE) from None
    if len(whole) > REPORTS_BYTES_MAX:
        raise CommandError(f"{path} has more than {REPORTS_BYTES_MAX >> 20} MiB: give the reports in parts", EXIT_USAGE)
    try:
        orjson.loads(whole)
    except orjson.JSONDecodeError:
        lines = [line for line in whole.splitlines() if line.strip()]
        yield from lines if len(lines) > 1 else [whole]
    else:
        yield whole
