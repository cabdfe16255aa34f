"""Run the proxy (also what happens without a command)."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

from sidecar.cli.shared import EXIT_USAGE, CommandError, add_data_dir, address, serving_settings
from sidecar.settings import LogFormat, Settings, SettingsError
from sidecar.settings.loader import without_secrets

UPSTREAM: Final = "SIDECAR_UPSTREAM_URL"
FORMAT: Final = "SIDECAR_LOG_FORMAT"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", metavar="URL", help=f"the API behind, as {UPSTREAM}")
    parser.add_argument("--listen", metavar="HOST:PORT", help="where clients call, instead of SIDECAR_LISTEN")
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    # A wish for new settings ends no start: they are read now, and from then on the supervisor listens.
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        return _run(arguments)
    finally:
        signal.signal(signal.SIGHUP, before)


def _run(arguments: argparse.Namespace) -> int:
    form = _form_said(os.environ.get(FORMAT, ""))
    try:
        read = partial(serving_settings, arguments, environ(arguments, os.environ), starting=True)
        settings = read()
        form = settings.serve.log_format
        return _serve(settings, read)
    except SettingsError as error:
        said = [line.value for line in error.effective if line.variable == FORMAT]
        _complain(str(error), _form_said(*said) or form, problems=list(error.problems))
        return EXIT_USAGE
    except CommandError as error:
        _complain(str(error), form)
        return error.code


def environ(arguments: argparse.Namespace, given: Mapping[str, str]) -> Mapping[str, str]:
    """The environment with what the command line says on top. `CommandError` where the two name different APIs: calls
    that go to the wrong one are billed for what they were not."""
    said = dict(given)
    url: str | None = arguments.url
    if url is not None:
        if "://" not in url and not url.startswith("unix:"):
            meant = without_secrets(address(url) or f"https://{url}")
            raise CommandError(f"{meant.partition('://')[2]!r} is no URL; did you mean {meant}?", EXIT_USAGE)
        there = given.get(UPSTREAM, "")
        if there and there.strip().rstrip("/") != url.rstrip("/"):
            raise CommandError(
                f"serve was told {without_secrets(url)}, and {UPSTREAM} is {without_secrets(there)}: leave the address "
                "out, or unset the variable",
                EXIT_USAGE,
            )
        said[UPSTREAM] = url
    if arguments.listen is not None:
        said["SIDECAR_LISTEN"] = arguments.listen
    return said


def _serve(settings: Settings, read: Callable[[], Settings]) -> int:
    from sidecar.runtime import app
    from sidecar.runtime.disk import NoRoomError
    from sidecar.runtime.instance_lock import LockError, NotWritableError
    from sidecar.runtime.supervisor import StartError
    from sidecar.spool import SpoolError
    from sidecar.storage.sockets import SocketError

    try:
        return app.run(settings, read)
    except NotWritableError as error:
        raise CommandError(str(error), EXIT_USAGE) from None
    except StartError as error:
        raise CommandError(str(error), error.code) from None
    except (NoRoomError, LockError, SocketError, SpoolError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        few = error.errno in (errno.EMFILE, errno.ENFILE)
        raise CommandError(f"cannot start: {error}" + ("; raise `ulimit -n`" if few else "")) from None


def _complain(text: str, form: LogFormat | None, *, problems: list[str] | None = None) -> None:
    """Why it did not start: the last line of its log, in the log's own format. Text is for a person, who reads the list
    of problems as a list."""
    from sidecar.runtime import logging as logs

    if logs.chosen(form) is LogFormat.TEXT:
        print(text, file=sys.stderr)
        return
    logs.set_up("INFO", LogFormat.JSON, role="supervisor")
    facts = {} if problems is None else {"problems": problems}
    logging.getLogger("sidecar.start").error("%s", text.partition(":\n")[0], extra={"facts": facts})


def _form_said(*texts: str) -> LogFormat | None:
    """What a text says, if it says a format: a wrong one is told among the problems."""
    return next((form for form in LogFormat for text in texts if text.strip().lower() == form), None)
