"""The id under which the calls of a key are counted.

Reads the key (or whatever else says who pays) on standard input and prints its id under the settings in effect: what
`usage` and `records` show, and what `[subscribers.ID]` names. The key itself is never printed.
"""

from __future__ import annotations

import argparse
import sys
from getpass import getpass
from typing import Final
from urllib.parse import quote

from sidecar.cli.shared import EXIT_OK, EXIT_USAGE, CommandError, add_data_dir, read_settings
from sidecar.model.exchange import Subscriber
from sidecar.model.grammar import Source, SourceKind, Unfit
from sidecar.settings import Settings

KEY_BYTES_MAX: Final = 65_536  # more is no header of a request


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", metavar="SOURCE", help="which of SIDECAR_SUBSCRIBER's it is of (else the first)")
    add_data_dir(parser)
    parser.epilog = "metering-sidecar subscriber < key-file; without a redirection it is asked for, and not shown"


def run(arguments: argparse.Namespace) -> int:
    from sidecar.runtime.factory import kept_hash_key

    settings = read_settings(arguments)
    source = _source(settings, arguments.source)
    try:
        key = kept_hash_key(settings)
    except OSError as error:
        raise CommandError(str(error)) from None
    if key is None:
        raise CommandError(
            f"there is no hash key in {settings.data_dir} yet, it is made at the first start: set SIDECAR_DATA_DIR to "
            "the sidecar's directory, or SIDECAR_HASH_KEY",
            EXIT_USAGE,
        )
    found = identified(source, _text(), key)
    if found is None:
        raise CommandError(f"this says nobody who pays by {source}", EXIT_USAGE)
    print(found.id)
    return EXIT_OK


def identified(source: Source, text: bytes, key: bytes) -> Subscriber | None:
    """Who pays for a call that says this text in this place."""
    from sidecar.proxy.subscriber import Attributor

    attributor = Attributor(sources=[source], dimensions={}, hash_key=key)
    if source.kind is SourceKind.BODY:
        return attributor.by_body(None, lambda _: text.decode("utf-8", "replace"))
    headers: list[tuple[bytes, bytes]] = []
    target = "/"
    value = quote(text.decode("utf-8", "replace"), safe="")
    if source.kind is SourceKind.QUERY:
        target = f"/?{quote(source.name, safe='')}={value}"
    elif source.kind is SourceKind.PATH:
        target = "/x" * (int(source.name) - 1) + f"/{value}"
    else:
        name = source.name if source.kind is SourceKind.HEADER else "authorization"
        headers = [(name.encode("latin-1", "replace"), text)]
    found, _ = attributor(headers, target, None)
    return found


def _source(settings: Settings, asked: str | None) -> Source:
    known = settings.attribution.subscriber
    if asked is None:
        if len(known) > 1:
            print(f"by {known[0]}; --source names another of {', '.join(known)}", file=sys.stderr)
        return Source.parse(known[0])
    try:
        source = Source.parse(asked)
    except Unfit as error:
        raise CommandError(f"--source: {error}", EXIT_USAGE) from None
    if str(source) not in known:
        raise CommandError(f"--source: {source} is not in SIDECAR_SUBSCRIBER ({', '.join(known)})", EXIT_USAGE)
    return source


def _text() -> bytes:
    """One line, without its end. It may be a secret: it goes into no message."""
    if sys.stdin.isatty():
        text = getpass("key: ").encode("utf-8", "surrogateescape")
    else:
        text = sys.stdin.buffer.read(KEY_BYTES_MAX + 1)
    text = text.strip()
    if not text:
        raise CommandError("standard input is empty: expected a key, one line", EXIT_USAGE)
    if len(text) > KEY_BYTES_MAX or b"\n" in text:
        raise CommandError(f"standard input: expected one key, one line of at most {KEY_BYTES_MAX:,} bytes", EXIT_USAGE)
    return text
