"""Read records out of a JetStream stream, keep each once, and bill them from here.

What the backend `nats` of many sidecars sends comes into one ledger and to the billing backends that are named here.
`--provision` makes the stream as asked for where there is none, and compares one that is there; `--aside` shows what
was read and is no record; `--feed` publishes records that were exported out of a spool.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

from sidecar.cli.shared import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    CommandError,
    add_data_dir,
    known_backend_settings,
    overridden,
    read_settings,
)
from sidecar.runtime.reports.formats import stamp
from sidecar.settings import Settings, SettingsError, load

if TYPE_CHECKING:
    from sidecar.model.delivery import Backend, Sealed
    from sidecar.model.record import Record

FEED_TRIES: Final = 12  # half a minute: an election, a restart of a server
FEED_PAUSE_S: Final = 4.0
FEED_LINE_BYTES_MAX: Final = 1 << 20  # of what may be told as no record, which has a thirtieth of it at most
SHOWN_BYTES: Final = 65_536  # of what is no record


def add(parser: argparse.ArgumentParser) -> None:
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--provision", action="store_true", help="make the stream if it is not there, or compare; then end"
    )
    one.add_argument("--aside", action="store_true", help="print what is kept aside, as lines of JSON; then end")
    text = "send the records of this file (- for standard input), as `spool export` writes them, again; then end"
    one.add_argument("--feed", metavar="FILE", help=text)
    add_data_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.aside:
        return _aside(read_settings(arguments))
    try:
        settings = collecting_settings(arguments)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    if arguments.feed is not None:
        return _feed_file(settings, arguments.feed)
    if arguments.provision:
        return asyncio.run(provision(settings))
    from sidecar.runtime import collect

    try:
        return collect.run(settings)
    except collect.CollectError as error:
        raise CommandError(f"cannot start: {error}") from None


def collecting_settings(arguments: argparse.Namespace, environ: Mapping[str, str] = os.environ) -> Settings:
    """All that `collect` needs; of an upstream it needs nothing."""
    from sidecar.runtime import backend_factory, collect

    def judge(settings: Settings) -> list[str]:
        missing = [
            f"{name} is not set, and {backend} needs it"
            for backend in settings.backends
            for name in (backend_factory.missing(settings, backend) if backend != collect.NATS else ())
        ]
        return [*missing, *collect.faults(settings), *backend_factory.faults(settings, starting=True)]

    return load(overridden(arguments, environ), backend_settings=known_backend_settings(), serving=False, judge=judge)


async def provision(settings: Settings) -> int:
    """Make the stream where it is missing, compare it where it is there, change nothing; say what was done."""
    from sidecar.runtime.collect import connection_of
    from sidecar.storage.nats import NatsFault

    connection = connection_of(settings)
    stream = connection.wanted.stream
    try:
        made = await connection.provision()
        problems = await connection.weaknesses()
    except NatsFault as fault:
        print(fault, file=sys.stderr)
        return EXIT_FAILED
    finally:
        await connection.aclose()
    for problem in problems:
        print(problem)
    if not problems:
        print(f"stream {stream}: {'created' if made else 'it is there, and fits'}")
    return EXIT_FAILED if problems else EXIT_OK


def _feed_file(settings: Settings, name: str) -> int:
    if name == "-":
        return asyncio.run(feed(settings, sys.stdin.buffer))
    try:
        with Path(name).open("rb") as file:
            return asyncio.run(feed(settings, file))
    except OSError as error:
        raise CommandError(f"{name} cannot be read: {error.strerror}", EXIT_USAGE) from None


def _numbered(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file. `CommandError` where one is so long that it was never a file of records."""
    for number in itertools.count(1):
        line = file.readline(FEED_LINE_BYTES_MAX + 1)
        if not line:
            return
        if len(line) > FEED_LINE_BYTES_MAX:
            most = f"{FEED_LINE_BYTES_MAX >> 20} MiB"
            raise CommandError(
                f"line {number} has more than {most}: expected records, a line each, as `spool export` writes them",
                EXIT_USAGE,
            )
        yield number, line


async def feed(settings: Settings, file: IO[bytes]) -> int:
    """Publish each line that is a record, until the stream says that it has it; who collects knows repeats."""
    from sidecar.backends import Context
    from sidecar.backends.nats import NatsBackend
    from sidecar.model.record_check import NotARecord, read_foreign
    from sidecar.runtime.collect import stream_settings

    own = replace(stream_settings(settings), denied="send", refused="send", unsettled="send", partial="send")
    backend = NatsBackend(own, Context(data_dir=settings.data_dir), by_id=False)
    sent = wrong = 0
    lines = _numbered(file)
    try:
        while rows := list(itertools.islice(lines, own.batch)):
            records: dict[str, Record] = {}
            for number, line in rows:
                try:
                    record = read_foreign(line.rstrip(b"\r\n"))
                except NotARecord as error:
                    wrong += 1
                    print(f"line {number} is no record: {error}", file=sys.stderr)
                else:
                    records[record.id] = record
            for sealed in backend.encode(list(records.values())).sealed:
                await _until_taken(backend, sealed)
                sent += len(sealed.events)
    finally:
        await backend.aclose()
    print("1 record sent" if sent == 1 else f"{sent} records sent")
    return EXIT_FAILED if wrong else EXIT_OK


async def _until_taken(backend: Backend, sealed: Sealed) -> None:
    """Again and again while it may help. Raises `CommandError` with the reason where it does not."""
    from sidecar.model.delivery import Blocked, Delivered, Duplicate, Refused

    reason = ""
    for tries in range(FEED_TRIES):
        left = [v for v in await backend.send(sealed) if not isinstance(v, Delivered | Duplicate)]
        if not left:
            return
        reason = left[0].reason
        if any(isinstance(verdict, Blocked | Refused) for verdict in left):
            break
        await asyncio.sleep(min(0.1 * 2**tries, FEED_PAUSE_S))
    raise CommandError(
        f"the stream does not take them: {reason}; what was sent before is there, so feed the file again"
    )


def _aside(settings: Settings) -> int:
    from sidecar.spool.known_ids import StorageError, kept_aside

    try:
        found = kept_aside(settings.data_dir)
    except StorageError as error:
        raise CommandError(str(error)) from None
    for one in found:
        row = {
            "source": one.source,
            "reason": one.reason,
            "detail": one.detail,
            "at": stamp(datetime.fromtimestamp(one.at_s, UTC), "microseconds"),
            "bytes": one.size_bytes,
            "body": one.body[:SHOWN_BYTES].decode(errors="replace"),
        }
        print(json.dumps(row))
    return EXIT_OK
