"""Have the running instance read anew: subscribers, meters, prices, limits, routes, certificates, secrets."""

from __future__ import annotations

import argparse
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from sidecar.cli.shared import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CommandError, add_data_dir, read_settings
from sidecar.settings import SettingsError
from sidecar.settings.loader import read_toml

WAIT_S: Final = 60.0  # for requests to backends that are under way, and for the start of who goes on with them
POLL_S: Final = 0.05


def add(parser: argparse.ArgumentParser) -> None:
    add_data_dir(parser)
    parser.epilog = (
        "exit codes: 0, reloaded; 1, something is wrong with the settings, and the old ones hold, or it was not heard "
        "what became of it; 2, no instance is running, or it could not be asked"
    )


def _data_dir(arguments: argparse.Namespace) -> Path:
    """Also where the settings are wrong, which is the instance's to say, if the place can be read beside them."""
    try:
        return read_settings(arguments).data_dir
    except SettingsError:
        named = arguments.data_dir or os.environ.get("SIDECAR_DATA_DIR") or _named_in_file()
        if not named:
            raise
        return Path(named)


def _named_in_file() -> str | None:
    """`data_dir` of a file that is TOML, whatever else is wrong in it."""
    try:
        value = read_toml(os.environ.get("SIDECAR_CONFIG", "")).get("data_dir")
    except (OSError, ValueError, RuntimeError):
        return None
    return value if isinstance(value, str) else None


def run(arguments: argparse.Namespace) -> int:
    from sidecar.runtime.instance_lock import running

    try:
        data_dir = _data_dir(arguments)
    except SettingsError as error:
        # Where the instance runs stood in the file that cannot be read: it was not asked, and nothing has changed.
        return _not_reloaded(error.problems)
    note = running(data_dir)
    if note is None or note.pid is None:
        raise CommandError(f"no instance runs on {data_dir}: its settings are read when it starts", EXIT_USAGE)
    before = 0 if note.reload is None else note.reload.number
    try:
        os.kill(note.pid, signal.SIGHUP)
    except ProcessLookupError:
        text = f"process {note.pid} is not to be seen from here: send it SIGHUP where it runs"
        raise CommandError(text, EXIT_USAGE) from None
    except PermissionError:
        raise CommandError(f"process {note.pid} is another user's: run this as that user", EXIT_USAGE) from None
    until_s = time.monotonic() + WAIT_S
    while time.monotonic() < until_s:
        now = running(data_dir)
        if now is None or now.pid != note.pid:
            raise CommandError(f"process {note.pid} has ended: its log says why")
        if now.reload is not None and now.reload.number > before:
            if now.reload.problems:
                return _not_reloaded(now.reload.problems)
            print("reloaded")
            if now.reload.waiting:
                print(f"these settings wait for a restart: {', '.join(now.reload.waiting)}")
            return EXIT_OK
        time.sleep(POLL_S)
    raise CommandError(f"process {note.pid} has not said within {WAIT_S:.0f} s what became of it: see its log")


def _not_reloaded(problems: Sequence[str]) -> int:
    print("\n  ".join(["not reloaded, the old settings hold:", *problems]))
    return EXIT_FAILED
