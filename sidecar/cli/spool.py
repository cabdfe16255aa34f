"""Look into the queue, check it and mend it.

`status`, `verify`, `parked` and `export` only read, also beside a running instance. `redrive` and `retry` change what
will be delivered: they go through the running instance. `cancel` and `complain` (in `mend`) change what was: they go
through it too, and take the lock of the directory where there is none. Of the lanes that sidecars deliver together all
of them ask the database, and have a change made by who holds the lane.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import orjson

from sidecar.cli import mend, redrive
from sidecar.cli.balance import of_lanes, remarks_on
from sidecar.cli.output import Format, Progress, amount, counted, render, write_data
from sidecar.cli.shared import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_PART,
    EXIT_USAGE,
    CommandError,
    add_data_dir,
    add_format,
    add_since,
    read_settings,
)
from sidecar.runtime.reports import lists
from sidecar.runtime.reports.formats import Names, written
from sidecar.runtime.reports.parameters import QueryError
from sidecar.spool import SpoolReader
from sidecar.storage.files import sync_file

ADOPT_S: Final = 600.0  # a million pending records may have to be parked before the answer comes
_SPOOL: Final = ("instance", "recorded", "open", "lost", "last_seq", "chunks", "size_bytes")
_LANES: Final = (
    "lane", "delivered_by", "backend", "recorded",
    "delivered", "duplicate", "pending", "parked", "cancelled", "skipped",
)  # fmt: skip
_BACKENDS: Final = ("backend", "delivered", "duplicate", "pending", "parked", "skipped", "state", "retry_after_s")

# All of it but the names, which stand in the place of the subscribers' ids.
_PARKED: Final = tuple(name for name in lists.PARKED if name != "name")
_PARKED_HEADS: Final = {"parked_at": "parked at, UTC", "maybe_taken": "taken?", "attempts": "tries"}


def add(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(title="what to do", metavar="KIND", required=True)

    status = _kind(kinds, "status", "how much is stored, pending and parked", _status)
    add_format(status, "table", "json")

    status.epilog = "exit codes: 0, done; 3, the lanes that sidecars deliver together cannot be asked"

    verify = _kind(
        kinds, "verify", "read every record, count everything again; exit 1 when something does not add up", _verify
    )

    verify.epilog = (
        "exit codes: 0, everything adds up; 1, something does not; 3, it adds up as far as it could be counted: the "
        "lanes that sidecars deliver together cannot be asked"
    )

    parked = _kind(kinds, "parked", "what was refused, has expired or may have been taken", _parked)
    _add_choice(parked)
    add_format(parked, "table", "json", "csv", "ndjson")

    again = _kind(kinds, "redrive", "offer parked records again, and say what became of each", redrive.redrive)
    _add_choice(again)
    add_since(again)
    again.add_argument("ids", nargs="*", metavar="ID", help="of records or events; none: all that fit")
    again.add_argument(
        "--resend-unknown", action="store_true", help="also those that may have been taken, at the risk of doubles"
    )

    again.epilog = (
        "exit codes: 0, done; 1, an id or a reason is not parked, or nothing that was chosen could go; 2, it could not "
        "be asked, or there is no such backend; 3, it is not done on all lanes of the fleet, as is said"
    )

    text = "offer what waits for a backend now: end its Retry-After and every backoff"
    retry = _kind(kinds, "retry", text, redrive.retry)
    retry.add_argument("--backend", metavar="NAME", required=True, help="which one")
    retry.epilog = (
        "exit codes: 0, done; 1, nothing waits; 2, no instance is running, or there is no such backend; "
        "3, it is not done on all lanes of the fleet, as is said"
    )
    adopt = _kind(kinds, "adopt", "say what a data directory is that was copied or put back", _adopt)
    adopt.add_argument(
        "--as",
        dest="how",
        choices=("original", "copy"),
        required=True,
        help="original: the only one that goes on, which delivers what is pending; copy: that is left to another",
    )

    mend.add(kinds)

    export = _kind(kinds, "export", "write all records as NDJSON", _export)
    add_since(export)
    export.add_argument("--output", "-o", metavar="FILE", type=Path, help="a new file, instead of standard output")
    export.epilog = "exit codes: 0, done; 1, there are records that cannot be read any more, as is said"


def run(arguments: argparse.Namespace) -> int:
    settings = read_settings(arguments)
    if "mend_run" in arguments:
        return mend.run(arguments, settings)
    arguments.subscriber_names, arguments.settings = settings.subscriber_names, settings
    code: int = arguments.spool_run(arguments, settings.data_dir)
    return code


def _kind(kinds: Any, name: str, text: str, do: Callable[[argparse.Namespace, Path], int]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    add_data_dir(parser)
    parser.set_defaults(spool_run=do)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="only of this backend")
    parser.add_argument("--reason", metavar="WORD", help="only with this reason")


def _status(arguments: argparse.Namespace, data_dir: Path) -> int:
    from sidecar.cli.files import balance_of, spool_of
    from sidecar.spool.files import size_or_zero

    with spool_of(data_dir) as reader:
        instances = []
        for instance in reader.instances():
            totals, segments = reader.totals(instance), reader.segments(instance)
            instances.append(
                {
                    "instance": instance,
                    "recorded": totals.recorded,
                    "open": totals.open,
                    "lost": sum(totals.lost.values()),
                    "last_seq": reader.last_seq(instance),
                    "chunks": len(segments),
                    "size_bytes": sum(size_or_zero(segment.path) for segment in segments),
                }
            )
    now = _now(data_dir)
    backends = [
        {
            "backend": name,
            "delivered": totals.delivered,
            "duplicate": totals.duplicate,
            "pending": totals.pending,
            "parked": sum(totals.parked.values()),
            "skipped": sum(totals.skipped.values()),
            "state": now.get(name, {}).get("state"),
            "reason": now.get(name, {}).get("reason"),
            "retry_after_s": now.get(name, {}).get("retry_after_s") or None,
        }
        for name, totals in balance_of(data_dir).backends.items()
    ]
    lanes = of_lanes(arguments.settings)
    if arguments.format == Format.JSON:
        found = {"instances": instances, "backends": backends} | ({} if lanes is None else {"lanes": lanes})
        print(orjson.dumps(found, option=orjson.OPT_INDENT_2).decode())
    else:
        print(render(instances, _SPOOL, Format.TABLE))
        print(render(backends, _BACKENDS, Format.TABLE), end="")
        if lanes is not None and "lanes" in lanes:
            print()
            print(lanes_table(lanes), end="")
        for name, how in now.items():
            if how.get("reason"):
                print(f"{name} is {how.get('state')}: {how['reason']}")
    for note in () if lanes is None else remarks_on(lanes):
        print(f"note: {note}", file=sys.stderr)
    return EXIT_OK if lanes is None or not lanes["trouble"] else EXIT_PART


def lanes_table(lanes: dict[str, Any]) -> str:
    """A line for each lane and backend, and the sum of each backend."""
    from sidecar.delivery.corrections import CANCELLED

    rows = []
    for lane in (*lanes["lanes"], {**lanes["sum"], "lane": "all", "holder": None}):
        head = {"lane": str(lane["lane"]), "delivered_by": lane["holder"]}
        for name, terms in lane["backends"].items() or ((None, None),):
            row = {**head, "backend": name, "recorded": lane["recorded"]}
            if terms is not None:
                row |= {term: terms[term] for term in ("delivered", "duplicate", "pending")}
                row |= {"recorded": terms.get("recorded", lane["recorded"]), "parked": sum(terms["parked"].values())}
                cancelled = terms["skipped"].get(CANCELLED, 0)
                row |= {"cancelled": cancelled, "skipped": sum(terms["skipped"].values()) - cancelled}
            rows.append(row)
    return render(rows, _LANES, Format.TABLE, heads={"delivered_by": "delivered by"}, spare=("duplicate", "skipped"))


def _now(data_dir: Path) -> dict[str, dict[str, Any]]:
    """How each backend does, as the running instance says; nothing where none runs or none answers."""
    from sidecar.cli.instance import ask

    try:
        answer = ask(data_dir, "/readyz") or {}
    except CommandError:
        return {}  # what is on disk can be shown all the same
    rows: list[dict[str, Any]] = answer.get("backends") or []
    return {str(row.get("backend")): row for row in rows}


def _verify(arguments: argparse.Namespace, data_dir: Path) -> int:
    from sidecar.cli.files import DELIVERY, accounts_of, balance_of, spool_of
    from sidecar.delivery.database import SCHEMA
    from sidecar.delivery.lane_balance import verify_lanes
    from sidecar.delivery.rows import StateError
    from sidecar.ledger.lanes import LANES
    from sidecar.runtime.lanes import url_of
    from sidecar.spool.verify import verify
    from sidecar.storage.sqlite import check_pages

    with spool_of(data_dir) as reader, accounts_of(data_dir) as accounts:
        progress = Progress("records read", _recorded(reader, 0))
        reports = verify(reader, progress.at)
        progress.end()
        problems = [f"instance {report.instance}: {text}" for report in reports for text in report.problems]
        if accounts is not None:
            # What adds up may lie in the pages that are left: who delivers would not begin with such a file.
            check_pages(data_dir / DELIVERY, schema=SCHEMA)
            problems += accounts.verify() + accounts.ahead_of(reader)
    problems += balance_of(data_dir).problems
    trouble, lanes = None, 0
    if (url := url_of(arguments.settings)) is not None:
        try:
            problems += verify_lanes(url)
            lanes = LANES
        except StateError as error:
            trouble = str(error)
            print(f"note: the lanes cannot be counted: {trouble}", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    count = sum(report.records for report in reports)
    counted = f"{amount(count, 'record')} read" + (f", {lanes} lanes counted again" if lanes else "")
    fine = "everything adds up" if trouble is None else "what is here adds up"
    print(f"{counted}, " + (f"{amount(len(problems), 'problem')} found" if problems else fine))
    return EXIT_FAILED if problems else EXIT_PART if trouble else EXIT_OK


def _parked(arguments: argparse.Namespace, data_dir: Path) -> int:
    from sidecar.cli.files import spool_of
    from sidecar.delivery.rows import StateError
    from sidecar.runtime import backend_factory

    form, names = Format(arguments.format), Names(arguments.subscriber_names)
    query = lists.ParkedQuery(backend=arguments.backend, reason=arguments.reason)
    try:
        with backend_factory.accounts(arguments.settings) as accounts:
            if accounts:
                lists.check_backend(accounts, query, arguments.settings.backends)
            rows = list(lists.parked(accounts, query, names))
    except QueryError as error:
        raise CommandError(error.typed(), EXIT_USAGE) from None
    except StateError as error:
        raise CommandError(str(error)) from None
    if not rows:
        with spool_of(data_dir):  # else it is no data directory, and nothing can be said of it
            pass
    if form is Format.TABLE:
        if not rows:
            where = f" at {arguments.backend}" if arguments.backend else ""
            print(f"nothing is parked{where}{f' with the reason {arguments.reason!r}' if arguments.reason else ''}")
            return EXIT_OK
        rows = [row | {"subscriber": names.shown(row["subscriber"]), "parked_at": _plainly(row)} for row in rows]
        print(parked_table(rows), end="")
        return EXIT_OK
    columns = lists.PARKED if form is Format.CSV else lists.PARKED_WHOLE
    write_data(written(rows, columns, form, indent=2))
    return EXIT_OK


def parked_table(rows: Sequence[dict[str, Any]]) -> str:
    return render(
        rows, _PARKED, Format.TABLE, heads=_PARKED_HEADS, spare=("attempts", "maybe_taken"), whole=("parked_at",)
    )


def _plainly(row: dict[str, Any]) -> str:
    """A time whose column says that it is UTC."""
    return str(row["parked_at"])[:19].replace("T", " ")


def _adopt(arguments: argparse.Namespace, data_dir: Path) -> int:
    from sidecar.cli.instance import change

    answer = change(data_dir, "/adopt", {"as": arguments.how}, limit_s=ADOPT_S)
    if answer is None:
        answer = {"parked": _adopt_stopped(arguments.how, data_dir)}
    if arguments.how == "original":
        print("adopted as the original: what is pending is delivered as before")
    else:
        parked = ", ".join(f"{name} {count:,}" for name, count in answer["parked"].items() if count)
        print(f"adopted as a copy: what was pending is parked (copied): {parked or 'nothing was'}")
    return EXIT_OK


def _adopt_stopped(how: str, data_dir: Path) -> dict[str, int]:
    from sidecar.delivery import StateError
    from sidecar.runtime.directory_identity import As
    from sidecar.runtime.instance_lock import LockError
    from sidecar.runtime.offline import adopt
    from sidecar.spool import SpoolError

    if not (data_dir / "delivery.db").exists():
        raise CommandError(f"nothing was ever delivered from {data_dir}: is SIDECAR_DATA_DIR the right one?")
    try:
        return asyncio.run(adopt(data_dir, As(how)))
    except (LockError, StateError, SpoolError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{data_dir} cannot be written: {error.strerror}") from None


def _export(arguments: argparse.Namespace, data_dir: Path) -> int:
    from sidecar.cli.files import spool_of

    since_ns = 0 if arguments.since is None else max(int(arguments.since.timestamp() * 1e9), 0)
    missing: list[int] = []
    with spool_of(data_dir) as reader:
        lines = reader.lines(since_ns=since_ns, missing=missing.append)
        if arguments.output is None:
            # Into a pipe; between lines on the same terminal it would only be in the way.
            _write(lines if sys.stdout.isatty() else counted(lines, Progress("records written")), sys.stdout.buffer)
        else:
            progress = Progress("records written", _recorded(reader, since_ns))
            count = _write_new(arguments.output, counted(lines, progress))
            print(f"{amount(count, 'record')} written to {arguments.output}", file=sys.stderr)
    if missing:
        gone = amount(sum(missing), "record is", "records are")
        print(f"{gone} not among them and cannot be read any more: see `spool verify`", file=sys.stderr)
    return EXIT_FAILED if missing else EXIT_OK


def _write_new(path: Path, lines: Iterator[bytes]) -> int:
    """Into a file that is not there yet; of one that cannot be finished nothing is left, which would look like all."""
    try:
        with path.open("xb") as file:
            try:
                count = _write(lines, file)
                file.flush()
                sync_file(file.fileno())
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise CommandError(f"{path} is there already: an export replaces nothing", EXIT_USAGE) from None
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror}") from None
    return count


def _recorded(reader: SpoolReader, since_ns: int) -> int | None:
    """How many there are, where all of them are written."""
    return None if since_ns else sum(reader.totals(instance).recorded for instance in reader.instances())


def _write(lines: Iterator[bytes], file: BinaryIO) -> int:
    count = 0
    for line in lines:
        file.write(line + b"\n")
        count += 1
    return count
