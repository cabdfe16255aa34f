"""Run the proxy (also what happens without a command)."""

from __future__ import annotations

import argparse
from functools import partial

from sidecar.cli.shared import EXIT_USAGE, CommandError, add_data_dir, serving_settings


def add(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    settings = serving_settings(arguments)

    from sidecar.runtime import app
    from sidecar.runtime.disk import NoRoomError
    from sidecar.runtime.instance_lock import LockError, NotWritableError
    from sidecar.runtime.supervisor import StartError
    from sidecar.spool import SpoolError
    from sidecar.storage.sockets import SocketError

    try:
        return app.run(settings, partial(serving_settings, arguments))
    except NotWritableError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    except StartError as error:
        raise CommandError(str(error), error.code) from None
    except (NoRoomError, LockError, SocketError, SpoolError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"cannot start: {error}") from None
