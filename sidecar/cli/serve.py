"""Run the proxy (also what happens without a command)."""

from __future__ import annotations

import argparse
import os

from sidecar.cli.shared import CommandError, add_data_dir, known_backend_settings, overridden
from sidecar.settings import load


def add(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = load(overridden(arguments, os.environ), backend_settings=known_backend_settings())

    from sidecar import app
    from sidecar.lock import LockError

    try:
        return app.run(settings)
    except LockError as error:
        raise CommandError(str(error)) from None
