"""Print the effective settings, secrets hidden, and every problem at once.

`--connect` also tries each upstream and each backend: name, TCP, TLS and one harmless request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import stat
import sys
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import sidecar
from sidecar.cli.output import Format, render, table
from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, EXIT_USAGE, add_data_dir, add_format, serving_settings
from sidecar.settings import Effective, Settings, SettingsError
from sidecar.storage.files import StorageError

if TYPE_CHECKING:
    from sidecar.cli.connect import Tried

UNPRICED_DAYS: Final = 30
UNPRICED_SHOWN: Final = 10  # by their calls; clients can invent names of models
WIDE_CHARS: Final = 10_000  # more than any detail has


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--connect", action="store_true", help="also try the upstreams and the backends")
    parser.add_argument("--all", action="store_true", help="also settings that stand at their default")
    add_data_dir(parser)
    add_format(parser, "table", "json")
    parser.epilog = (
        "exit codes: 0, the sidecar would start; 1, with --connect: something cannot be reached, or is not set up as "
        "the sidecar is; 2, it would not start"
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        settings = serving_settings(arguments)
    except SettingsError as error:
        _print(arguments, error.effective, (), ())
        print(error, file=sys.stderr)
        return EXIT_USAGE
    results: Sequence[Tried] = ()
    if arguments.connect:
        from sidecar.cli.connect import try_everything
        from sidecar.runtime.names import with_own_threads

        # A name that hangs would be waited for at the end.
        with asyncio.Runner(loop_factory=lambda: with_own_threads(asyncio.new_event_loop())) as runner:
            results = runner.run(try_everything(settings))
    _print(arguments, settings.effective, notes(settings), results)
    if found := hindrances(settings):
        print("\n  ".join(["the sidecar would not start:", *found]), file=sys.stderr)
        return EXIT_USAGE
    return EXIT_OK if all(result.ok for result in results) else EXIT_FAILED


def hindrances(settings: Settings) -> list[str]:
    """What would keep it from starting, though the settings are right. Changes nothing."""
    from sidecar.delivery.database import SCHEMA
    from sidecar.storage.sqlite import problem_of

    found = []
    there = _nearest(settings.data_dir)
    if not there.is_dir():
        found.append(f"SIDECAR_DATA_DIR={settings.data_dir}: {there} is no directory")
    elif (damage := problem_of(settings.data_dir / "delivery.db", schema=SCHEMA)) is not None:
        found.append(str(damage))
    for name, address in (("LISTEN", settings.serve.listen), ("ADMIN_LISTEN", settings.serve.admin_listen)):
        if address.path is not None and not Path(address.path).absolute().parent.is_dir():
            found.append(f"SIDECAR_{name}={address}: there is no directory {Path(address.path).absolute().parent}")
    return found


def notes(settings: Settings) -> list[str]:
    """What is no fault of the settings and still worth knowing before the first call."""
    from sidecar import prices
    from sidecar.runtime import gate_factory
    from sidecar.runtime.admin.guard import open_port
    from sidecar.runtime.factory import idle_names
    from sidecar.spool.files import ground_warning

    found = [] if (warning := open_port(settings)) is None else [warning]
    there = _nearest(settings.data_dir)
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        found.append(f"the data directory {settings.data_dir} cannot be written by user {os.geteuid()}")
    if settings.data_dir.is_dir() and (others := open_to_others(settings.data_dir)) is not None:
        found.append(others)
    if (warning := ground_warning(there)) is not None:
        found.append(warning)
    found += prices.notes(settings)
    found += unpriced_models(settings)
    found += [f"{setting}: {what}" for setting, what in idle_names(settings)]
    found += gate_factory.notes(settings)
    return found


def unpriced_models(settings: Settings) -> list[str]:
    """Models that were called of late, that were not priced, and that would not be priced now either."""
    from sidecar.model.exchange import Usage, UsageState
    from sidecar.prices import PricesError, price_book
    from sidecar.runtime import backend_factory
    from sidecar.runtime.factory import priced_hosts

    now = datetime.now(UTC)
    try:
        if not backend_factory.has_ledger(settings):
            return []
        book = price_book(settings)
        with closing(backend_factory.open_reader(settings)) as ledger:
            seen = ledger.unpriced(now - timedelta(days=UNPRICED_DAYS))
    except (StorageError, OSError, PricesError):
        return []  # whoever needs the ledger says what is wrong with it, and the settings what with the prices
    hosts = set(priced_hosts(settings).values())
    found = []
    for one in seen:
        call = Usage(
            usage_state=UsageState.FINAL,
            provider=one.provider,
            model=one.model,
            input_tokens=1,
            output_tokens=1,
            total_tokens=2,
        )
        if one.model is not None and all(book.cost(call, now.timestamp(), host=host)[1] is None for host in hosts):
            found.append(one)
    lines = [
        f"no price is known for {one.model} of {one.provider or 'an unknown provider'}: {_calls(one.calls)} of the "
        f"last {UNPRICED_DAYS} days without a cost, the last of {one.last:%Y-%m-%d}; [[prices]] can give it one"
        for one in found[:UNPRICED_SHOWN]
    ]
    left = found[UNPRICED_SHOWN:]
    if left:
        lines.append(f"and {len(left)} more models without a price, with {_calls(sum(one.calls for one in left))}")
    return lines


def _calls(count: int) -> str:
    return "1 call" if count == 1 else f"{count} calls"


def open_to_others(path: Path) -> str | None:
    """What others may do with a data directory that is there. Our files in it are 0600 all the same."""
    mode = stat.S_IMODE(path.stat().st_mode)
    may = [word for bit, word in ((0o055, "look into"), (0o022, "change")) if mode & bit]
    if not may:
        return None
    return (
        f"the data directory {path} has mode {mode:04o}: others than user {path.stat().st_uid} may {' and '.join(may)} "
        f"it; chmod 700 {path} unless they are to (the files in it are 0600)"
    )


def versions() -> str:
    """What a report of a fault should begin with."""
    import aiohttp

    return " · ".join(
        (
            f"metering-sidecar {sidecar.__version__}",
            f"Python {platform.python_version()}",
            f"aiohttp {aiohttp.__version__}",
            f"SQLite {sqlite3.sqlite_version}",
            f"{platform.system()} {platform.machine()}",
        )
    )


def _print(
    arguments: argparse.Namespace, lines: Sequence[Effective], remarks: Sequence[str], results: Sequence[Tried]
) -> None:
    settings = [{"setting": line.variable, "value": line.value, "from": line.origin} for line in lines]
    tried = [{"what": r.what, "result": r.result, "detail": r.detail} for r in results]
    if arguments.format == Format.JSON:
        report = {"version": versions(), "settings": settings, "notes": list(remarks), "connect": tried}
        print(json.dumps(report, indent=2))
        return
    if tried:
        # What was found comes before what was given. What is to be done about it stands at the end of a detail: no
        # terminal is too narrow for that.
        print(table(tried, ("what", "result", "detail"), width=WIDE_CHARS))
    shown = settings if arguments.all else [row for row in settings if row["from"] != "default"]
    print(render(shown, ("setting", "value", "from"), Format.TABLE), end="")
    if len(shown) < len(settings):
        print(f"{len(settings) - len(shown)} more stand at their default: check --all shows them")
    for remark in remarks:
        print(f"note: {remark}")
    print(f"\n{versions()}")


def _nearest(path: Path) -> Path:
    """The path itself, or what of it is there already."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
