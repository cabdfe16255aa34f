"""`spool cancel` and `spool complain`: a call that shall not be billed, and events that were not billed after all."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sidecar.cli.instance import change
from sidecar.cli.output import amount
from sidecar.cli.redrive import left_over
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CommandError, add_data_dir
from sidecar.settings import Settings, SettingsError

LIMIT_S: Final = 600.0  # a backend is asked once for each event, and may be slow
REPORTS_BYTES_MAX: Final = 64 << 20  # of a file of reports; each is below 1 MiB
STDIN: Final = Path("-")
_FIELDS: Final = {"one": "id"}  # as the control socket calls it


def add(kinds: Any) -> None:
    """The two kinds of `spool`."""
    cancel = _kind(kinds, "cancel", "take back what was delivered of one call, where its backends can", _cancel)
    cancel.add_argument("ids", metavar="ID", nargs="*", help="of a record, or of one event of it")
    cancel.add_argument("--backend", metavar="NAME", help="only at this backend")
    cancel.add_argument("--reason", metavar="WORD", help="instead of IDs: all that is parked with this reason")

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
    """One after the other; what one of them cannot be is no reason to leave the others."""
    if bool(arguments.ids) == (arguments.reason is not None):
        raise CommandError("say what to cancel: IDs, or --reason for all that is parked with it", EXIT_USAGE)
    chosen = [(id_, arguments.backend) for id_ in dict.fromkeys(arguments.ids)]
    if arguments.reason is not None:
        chosen = _parked_with(arguments.reason, arguments.backend, settings)
    codes = [_cancel_one(id_, backend, settings) for id_, backend in chosen]
    return EXIT_FAILED if EXIT_FAILED in codes else max(codes)


def _parked_with(reason: str, backend: str | None, settings: Settings) -> list[tuple[str, str | None]]:
    """What is parked with a reason now, event by event: one that is cancelled is nothing to go on from."""
    from sidecar.delivery import StateError
    from sidecar.runtime.backend_factory import accounts
    from sidecar.runtime.reports.formats import NOBODY
    from sidecar.runtime.reports.lists import check_backend, parked, parked_query
    from sidecar.runtime.reports.parameters import QueryError, near

    chosen: list[tuple[str, str | None]] = []
    others: set[str] = set()
    try:
        with accounts(settings) as found:
            query = parked_query(backend=backend)
            check_backend(found, query, settings.backends)
            for row in parked(found, query, NOBODY):
                if row["reason"] == reason:
                    chosen.append((row["event_id"], row["backend"]))
                else:
                    others.add(row["reason"])
    except QueryError as error:
        raise CommandError(error.typed(), EXIT_USAGE) from None
    except StateError as error:
        raise CommandError(str(error)) from None
    if not chosen:
        known = sorted(others)
        where = "" if backend is None else f" at {backend}"
        raise CommandError(f"nothing is parked{where} with the reason {reason!r}{near(reason, known) if known else ''}")
    return chosen


def _cancel_one(id_: str, backend: str | None, settings: Settings) -> int:
    answer = _change({"do": "cancel", "one": id_, "backend": backend}, settings)
    outcomes = answer["outcomes"]
    for one in outcomes:
        print(f"{one['backend']}  {one['event_id']}  {one['text']}")
    left = left_over(answer)
    if not outcomes and not left:
        where = f" at {backend}" if backend else ""
        print(f"nothing is known of {id_}{where}: it was never delivered, or is older than the retention")
        return EXIT_FAILED
    return left if all(one["done"] for one in outcomes) else EXIT_FAILED


def _complain(arguments: argparse.Namespace, settings: Settings) -> int:
    from sidecar.backends.stripe.reports import ReportError, read_report
    from sidecar.runtime.admin.control import COMPLAINTS_MAX

    reports = []
    for number, document in enumerate(_documents(arguments.file), 1):
        try:
            reports.append(read_report(document))
        except ReportError as error:
            raise CommandError(f"{_named(arguments.file)}, report {number}: {error}", EXIT_USAGE) from None
    named = list(dict.fromkeys((one.event_id, one.code) for report in reports for one in report.complaints))
    outcomes: list[dict[str, Any]] = []
    left = EXIT_OK
    for start in range(0, len(named), COMPLAINTS_MAX):
        wish = {"do": "complain", "backend": "stripe", "named": named[start : start + COMPLAINTS_MAX]}
        answer = _change(wish, settings)
        left = left_over(answer) or left
        # Of a lane whose holder has not been asked it is not known that it does not remember an event.
        outcomes += [one for one in answer["outcomes"] if one["done"] or "lanes" not in answer]
    for one in outcomes:
        print(f"{one['event_id']}  {one['text']}")
    bad = [one for one in outcomes if not one["done"]]
    unnamed = sum(report.unnamed for report in reports)
    parked = len(outcomes) - len(bad)
    print(f"{parked:,} of {amount(len(named), 'named event')} {'is' if parked == 1 else 'are'} parked")
    if len(bad) < len(outcomes):
        print(
            "mend what is wrong, then: metering-sidecar spool redrive --backend stripe\n"
            "not before they are a day old: until then stripe takes them for repeats"
        )
    if unnamed:
        more = amount(unnamed, "more event is", "more events are")
        print(f"{more} counted and not named: compare the meter at stripe", file=sys.stderr)
    return left if not bad and not unnamed else EXIT_FAILED


def _change(wish: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Through the running instance; else with the lock of its directory and, on lanes of a fleet, by who holds them."""
    request = {_FIELDS.get(name, name): value for name, value in wish.items() if name != "do"}
    answer: dict[str, Any] | None = change(settings.data_dir, f"/{wish['do']}", request, limit_s=LIMIT_S)
    return _without_instance(wish, settings) if answer is None else answer


def _without_instance(wish: dict[str, Any], settings: Settings) -> dict[str, Any]:
    from sidecar.delivery import StateError
    from sidecar.delivery.wishes import Asked, outcomes
    from sidecar.ledger import LedgerError
    from sidecar.runtime.backend_factory import faults, missing
    from sidecar.runtime.instance_lock import LockError
    from sidecar.runtime.lanes import correct, url_of
    from sidecar.spool import SpoolError

    here, url = (settings.data_dir / "delivery.db").exists(), url_of(settings)
    if not here and url is None:
        raise CommandError(f"nothing was ever delivered from {settings.data_dir}: is SIDECAR_DATA_DIR the right one?")
    problems = [f"{one} is not set" for name in settings.backends for one in missing(settings, name)]
    if problems := problems + faults(settings):
        raise SettingsError(problems)
    try:
        answers = [asyncio.run(_in_books(wish, settings))] if here else []
    except (LockError, StateError, SpoolError, LedgerError) as error:
        raise CommandError(str(error)) from None
    asked = Asked()
    if url is not None:
        try:
            asked = correct(url, wish)
        except StateError as error:
            asked = Asked(errors=[str(error)])
    return {"outcomes": outcomes([*answers, *asked.answers])} | ({"lanes": asked.said} if asked.said else {})


async def _in_books(wish: dict[str, Any], settings: Settings) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from sidecar.delivery import corrections
    from sidecar.runtime.offline import books

    async with books(settings) as opened:
        if wish["do"] == "cancel":
            found = await corrections.cancel(wish["one"], opened, opened.backends, backend=wish["backend"])
        else:
            named = [corrections.Named(*one) for one in wish["named"]]
            found = await corrections.complain(wish["backend"], named, opened, opened.backends)
        return [asdict(one) for one in found]


def _named(path: Path) -> str:
    return "standard input" if path == STDIN else str(path)


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
        raise CommandError(f"{_named(path)} cannot be read: {error.strerror}", EXIT_USAGE) from None
    if len(whole) > REPORTS_BYTES_MAX:
        most = f"{REPORTS_BYTES_MAX >> 20} MiB"
        raise CommandError(f"{_named(path)} has more than {most}: give the reports in parts", EXIT_USAGE)
    try:
        orjson.loads(whole)
    except orjson.JSONDecodeError:
        lines = [line for line in whole.splitlines() if line.strip()]
        yield from lines if len(lines) > 1 else [whole]
    else:
        yield whole
