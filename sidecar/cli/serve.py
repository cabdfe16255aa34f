"""Run the proxy (also what happens without a command)."""

from __future__ import annotations

import argparse

from sidecar.cli.shared import WRONG, CommandError, add_data_dir, serving_settings


def add(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = serving_settings(arguments)

    from sidecar import app
    from sidecar.delivery.state import StateError
    from sidecar.early import NoRoomError
    from sidecar.ledger import LedgerError
    from sidecar.lock import LockError, NotWritableError
    from sidecar.sockets import SocketError
    from sidecar.spool import SpoolError
    from sidecar.supervisor import WorkerError

    try:
        return app.run(settings)
    except NotWritableError as error:
        raise CommandError(str(error), WRONG) from None
    except (NoRoomError, LockError, SpoolError, StateError, SocketError, WorkerError) as error:
        raise CommandError(str(error)) from None
    except LedgerError as error:
        raise CommandError(str(error), WRONG) from None
    except OSError as error:
        raise CommandError(f"cannot start: {error}") from None
