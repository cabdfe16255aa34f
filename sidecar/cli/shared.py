"""What several commands need: the settings, times as people write them, and how a command says that it cannot."""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Final

from sidecar.runtime.reports import parameters
from sidecar.settings import BackendSettings, Settings, load

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1  # it ran, and the answer is no: the balance does not hold, a file is damaged, a backend refuses
EXIT_USAGE: Final = 2  # it could not run as asked: arguments or settings
EXIT_PART: Final = 3  # only a part could be told or done: the rest needs the database, or a sidecar that runs
INTERRUPTED: Final = 130  # as shells have it for Ctrl-C


class CommandError(Exception):
    """The command cannot do what was asked. Its text says what to do; it is printed without a traceback."""

    def __init__(self, text: str, code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.code = code


def known_backend_settings() -> BackendSettings:
    from sidecar.backends import backend_settings

    return backend_settings()


def serving_settings(
    arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ, *, starting: bool = False
) -> Settings:
    """All that `serve` needs, with what only the parts can judge. `starting`: only what is a reason not to serve."""
    from sidecar.runtime.faults import faults

    judge = partial(faults, starting=starting)
    return load(overridden(arguments, environ), backend_settings=known_backend_settings(), judge=judge)


def read_settings(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """For a command that only reads the data directory: nothing else has to be set. `--data-dir` wins."""
    return load(overridden(arguments, environ), backend_settings=known_backend_settings(), serving=False)


def overridden(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment with what the command line says on top."""
    data_dir = getattr(arguments, "data_dir", None)
    return environ if data_dir is None else {**environ, "SIDECAR_DATA_DIR": data_dir}


def moment(text: str, now: datetime | None = None) -> datetime:
    """A point in time, as `reports.parameters.moment` reads it, for argparse."""
    try:
        return parameters.moment(text, now or datetime.now(UTC))
    except parameters.QueryError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def address(text: str) -> str | None:
    """The URL that a text is or may stand for, where it is an address and not a word or a file: a name with a port or
    with dots gets the scheme with which it is mostly spoken to."""
    if "://" in text or text.startswith("unix:"):
        return text
    host = re.match(r"\[[\da-fA-F:.]+\]|[a-zA-Z\d][\w.-]*", text, re.ASCII)
    if host is None or not (re.search(r":\d", text) or host[0].count(".") > 1 or host[0] == "localhost"):
        return None
    return f"{'http' if _is_loopback(host[0].strip('[]')) else 'https'}://{text}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="PATH", help="instead of SIDECAR_DATA_DIR")


def add_format(parser: argparse.ArgumentParser, *forms: str) -> None:
    parser.add_argument("--format", choices=forms, default=forms[0], help=f"how to print (default: {forms[0]})")


def add_since(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since", metavar="TIME", type=moment, help="an age (90m, 24h, 7d), today, or a date and time (UTC)"
    )


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="only of these: model=gpt-5-mini; several: all of them, of one name any (NAME= for what is not known)",
    )
