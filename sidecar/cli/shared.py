"""What several commands need: the settings, times as people write them, and how a command says that it cannot."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final

from sidecar.settings import BackendSettings, Settings, load

EXIT_OK: Final = 0
EXIT_FAILED: Final = 1  # it ran, and the answer is no: the balance does not hold, a file is damaged, a backend refuses
EXIT_USAGE: Final = 2  # it could not run as asked: arguments or settings
INTERRUPTED: Final = 130  # as shells have it for Ctrl-C

_AGO: Final = re.compile(r"(\d+)\s*([smhdw])")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


class CommandError(Exception):
    """The command cannot do what was asked. Its text says what to do; it is printed without a traceback."""

    def __init__(self, text: str, code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.code = code


def known_backend_settings() -> BackendSettings:
    from sidecar.backends import backend_settings

    return backend_settings()


def serving_settings(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """All that `serve` needs, with what only the parts can judge: meters, prices, limits, backends, the ledger's
    file, certificates."""
    from sidecar import prices
    from sidecar.runtime import backend_factory, certificates, gate_factory

    def judge(settings: Settings) -> list[str]:
        own = [*prices.faults(settings), *gate_factory.faults(settings)]
        return [*backend_factory.faults(settings), *own, *certificates.faults(settings.proxy)]

    return load(overridden(arguments, environ), backend_settings=known_backend_settings(), judge=judge)


def read_settings(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """For a command that only reads the data directory: nothing else has to be set. `--data-dir` wins."""
    return load(overridden(arguments, environ), backend_settings=known_backend_settings(), serving=False)


def overridden(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Mapping[str, str]:
    """The environment with what the command line says on top."""
    data_dir = getattr(arguments, "data_dir", None)
    return environ if data_dir is None else {**environ, "SIDECAR_DATA_DIR": data_dir}


def moment(text: str, now: datetime | None = None) -> datetime:
    """A point in time: `90m`, `24h`, `7d` (ago), `today`, or a date and time of ISO 8601; UTC unless it says other."""
    now = now or datetime.now(UTC)
    found = _AGO.fullmatch(text.strip())
    try:
        if found:
            return now - timedelta(seconds=int(found[1]) * _SECONDS[found[2]])
        if text == "today":
            return now.replace(hour=0, minute=0, second=0, microsecond=0)
        parsed = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: expected an age such as 90m, 24h, 7d, or a date: 2026-11-20, 2026-11-20T09:00"
        ) from None
    return parsed.astimezone(UTC) if parsed.tzinfo else parsed.replace(tzinfo=UTC)


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data-dir", metavar="PATH", help="instead of SIDECAR_DATA_DIR")


def add_format(parser: argparse.ArgumentParser, *forms: str) -> None:
    parser.add_argument("--format", choices=forms, default=forms[0], help=f"how to print (default: {forms[0]})")


def add_since(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--since", metavar="TIME", type=moment, help="an age (90m, 24h, 7d), today, or a date and time (UTC)"
    )
