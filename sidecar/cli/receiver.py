"""Run the stand-in backends: they take what a vendor would take and refuse what it would refuse."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from sidecar.cli.shared import EXIT_OK, EXIT_USAGE, CommandError
from sidecar.settings import Unfit, types
from sidecar.storage.sockets import SocketError, listening


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--listen", default="127.0.0.1:9700", metavar="HOST:PORT", help="default: 127.0.0.1:9700")
    parser.add_argument("--store", metavar="FILE", type=Path, help="remember what was taken over a restart")


def run(arguments: argparse.Namespace) -> int:
    from sidecar.dev.mock_backends import StoreError, backends, serve

    try:
        address = types.address.parse(arguments.listen)
    except ValueError as error:
        why = str(error) if isinstance(error, Unfit) else f"expected {types.address.expected}"
        raise CommandError(f"--listen {arguments.listen}: {why}", EXIT_USAGE) from None
    if address.path is not None:
        raise CommandError("--listen: expected a host and a port; the receiver has no Unix socket", EXIT_USAGE)

    def ready(url: str) -> None:
        print(f"the receiver listens on {url} for {', '.join(backends())}", file=sys.stderr)
        print(f"what it took: curl {url}/_received", file=sys.stderr, flush=True)

    try:
        with listening(address, "--listen"):
            asyncio.run(serve(address.host, address.port, store=arguments.store, ready=ready))
    except (StoreError, SocketError) as error:
        raise CommandError(str(error)) from None
    return EXIT_OK
