"""See it work: scripted model APIs, the sidecar and a usage table. No account, no key."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING

from sidecar.cli.output import Format, pairs, table
from sidecar.cli.shared import EXIT_USAGE, CommandError, known_backend_settings
from sidecar.settings import load

if TYPE_CHECKING:
    from sidecar.dev import demo


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keep", action="store_true", help="stay up afterwards, to look around")
    parser.add_argument("--backend", metavar="NAME", help="deliver to the stand-in of NAME as well as to the ledger")
    parser.add_argument("--mode", metavar="NAME", help="which of the interfaces of revenium or stripe")
    parser.add_argument("--limits", action="store_true", help="instead: customers run into their limits")


def printing() -> demo.Printing:
    """Tables as the commands draw them."""
    from sidecar.cli.usage import report
    from sidecar.dev.demo import Printing

    return Printing(usage=lambda rows, by: report(rows, by, Format.TABLE), table=table, pairs=pairs)


def run(arguments: argparse.Namespace) -> int:
    from sidecar.cli.limits import report
    from sidecar.dev import demo, demo_limits
    from sidecar.runtime import app, logging

    # What the demo has to say stands in its table; its clients hang up on purpose.
    logging.set_up("ERROR")

    def start(environ: Mapping[str, str]) -> AbstractAsyncContextManager[demo.Running]:
        return app.running(load(environ, backend_settings=known_backend_settings()))

    if arguments.limits and (arguments.keep or arguments.backend is not None or arguments.mode is not None):
        raise CommandError("--limits shows limits alone: leave out --keep, --backend and --mode", EXIT_USAGE)
    try:
        if arguments.limits:
            return asyncio.run(demo_limits.run(start, printing(), report))
        return asyncio.run(
            demo.run(start, printing(), keep=arguments.keep, backend=arguments.backend, mode=arguments.mode)
        )
    except demo.DemoError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
