"""The certificates of both sides: what a client is shown, how an upstream is verified, and what it is shown.

A process that is started again finds what the others have, also where a file is broken by then: the supervisor keeps
what it found to be good (`keep`) before it starts one, and again when the settings were reloaded.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, NamedTuple

from sidecar.settings import ProxySettings, UpstreamSettings

log = logging.getLogger("sidecar.proxy")


class Files(NamedTuple):
    """Whose certificates they are, and where they stand; `ca`: by which the upstream is verified."""

    for_listener: bool
    ca: Path | None
    cert: Path | None
    key: Path | None


def of_listener(settings: ProxySettings) -> Files | None:
    """None: it takes no TLS."""
    cert = settings.tls_cert_file
    return None if cert is None else Files(True, None, cert, settings.tls_key_file)


def of_upstream(settings: ProxySettings) -> Files:
    return Files(False, settings.upstream_ca_file, settings.upstream_cert_file, settings.upstream_key_file)


def of_named(one: UpstreamSettings) -> Files:
    return Files(False, one.ca_file, one.cert_file, one.key_file)


_kept: Final[dict[Files, ssl.SSLContext]] = {}


def keep(wanted: Iterable[Files]) -> None:
    """Keep them as they are now, for processes that are forked from here on; what cannot be read stays as it was."""
    for files in wanted:
        if files.ca is None and files.cert is None:
            continue
        try:
            _kept[files] = read(files)
        except (OSError, ValueError):  # told by whoever wants to use it
            continue


def read_or_kept(files: Files) -> ssl.SSLContext:
    """What they say now, or said when they were kept where they cannot be read any more. Raises what `load_chain` does
    where they were not."""
    try:
        return read(files)
    except (OSError, ValueError) as error:
        found = _kept.get(files)
        if found is None:
            raise
        log.error("a certificate cannot be read, the one that was read last is used: %s", why_unreadable(error))
        return found


def read(files: Files) -> ssl.SSLContext:
    """What they say now. Raises what `load_chain` does. ALPN is set because a server may otherwise pick HTTP/2."""
    if files.for_listener:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    else:
        context = ssl.create_default_context(cafile=files.ca)
    context.set_alpn_protocols(["http/1.1"])
    if files.cert is not None:
        load_chain(context, files.cert, files.key)
    return context


def load_chain(context: ssl.SSLContext, cert_file: Path, key_file: Path | None) -> None:
    """A certificate and its key. Raises `OSError` (an `ssl.SSLError` is one) or, for a key that needs a password,
    `ValueError`: nobody is there to be asked, though OpenSSL would ask the terminal and wait."""

    def ask() -> str:
        raise ValueError("the key is encrypted: expected one that needs no password")

    context.load_cert_chain(cert_file, key_file, password=ask)


def show(context: ssl.SSLContext, shown: Callable[[], ssl.SSLContext]) -> None:
    """Have a listener that was opened with `context` show the certificate of another one, asked for at each handshake.
    To load a chain into a context that is in use is no way: where it fails half-way, the certificate is the new one and
    the key the old one's, and no handshake works until the next reload."""

    def choose(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        connection.context = shown()

    context.sni_callback = choose  # also called where a client names nobody


def why_unreadable(error: Exception) -> str:
    """What is wrong with a certificate, for a person."""
    if isinstance(error, ssl.SSLError):
        return (error.reason or "not PEM").replace("_", " ").lower()
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
