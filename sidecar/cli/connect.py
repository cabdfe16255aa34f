"""`check --connect`: can the upstreams and the backends be reached from here, and do they know us?

For each address: the name is resolved, a connection is opened and, with https, the certificate verified. A backend
that can say whether it is set up as we are (`examine`) is asked then, with look-ups that bill nothing: each thing that
is wrong is a row of its own. An upstream is sent no request.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from sidecar.backends.base import Examined, Reached
from sidecar.backends.http import fault_of
from sidecar.backends.ledger import SharedLedgerBackend
from sidecar.proxy.tls import Files, read
from sidecar.runtime import backend_factory
from sidecar.settings import Settings

LIMIT_S: Final = 10.0  # for name, connection and handshake of one address together
EXAMINE_LIMIT_S: Final = 60.0  # for all look-ups at one backend: one for each meter
REACHED: Final = "reached"
FAILED: Final = "failed"
WRONG: Final = "wrong"  # it answers, and would not bill what we send


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one attempt."""

    what: str
    result: str  # one of the three words above
    detail: str

    @property
    def ok(self) -> bool:
        return self.result == REACHED


async def try_everything(settings: Settings) -> list[Tried]:
    """Each upstream and each backend that is switched on, all at the same time."""
    proxy = settings.proxy
    attempts = []
    if proxy.upstream_url is not None:
        attempts.append(
            _upstream(
                "upstream",
                proxy.upstream_url,
                proxy.upstream_ca_file,
                proxy.upstream_cert_file,
                proxy.upstream_key_file,
                proxy.upstream_server_name,
            )
        )
    attempts += [
        _upstream(f"upstream {one.name}", one.url, one.ca_file, one.cert_file, one.key_file, one.server_name)
        for one in proxy.upstreams
    ]
    attempts += [_backend(settings, name) for name in settings.backends]
    return [tried for each in await asyncio.gather(*attempts) for tried in each]


async def _upstream(
    what: str, url: str, ca_file: Path | None, cert_file: Path | None, key_file: Path | None, server_name: str | None
) -> list[Tried]:
    return [await _try(what, _reach_upstream(url, ca_file, cert_file, key_file, server_name))]


async def _backend(settings: Settings, name: str) -> list[Tried]:
    """Whether it can be reached; and where it can, everything that it finds wrong."""
    if name == backend_factory.LEDGER_NAME:
        if settings.fleet.ledger_url is not None:
            return await _shared_ledger(settings)
        return [Tried(name, REACHED, "on this machine")]
    made = backend_factory.backend(settings, name)
    try:
        if isinstance(made, Reached):
            reached = await _reached(name, made)
        else:
            url = settings.backend(name)["url"] or getattr(made, "address", None)
            reached = await _try(name, _reach_backend(name, url))
        problems = await _examined(name, made) if reached.ok and isinstance(made, Examined) else []
    finally:
        await made.aclose()
    return [reached, *(Tried(name, WRONG, problem) for problem in problems)]


async def _reached(name: str, backend: Reached) -> Tried:
    try:
        async with asyncio.timeout(LIMIT_S):
            ok, detail = await backend.reach()
    except TimeoutError:
        return Tried(name, FAILED, f"no connection within {LIMIT_S:g} s")
    return Tried(name, REACHED if ok else FAILED, detail)


async def _shared_ledger(settings: Settings) -> list[Tried]:
    """Whether it would take records; nothing is written."""
    made = backend_factory.backend(settings, backend_factory.LEDGER_NAME)
    assert isinstance(made, SharedLedgerBackend)
    try:
        problems = await _examined(made.name, made)
        return [Tried(made.name, FAILED, problem) for problem in problems] or [Tried(made.name, REACHED, made.where)]
    finally:
        await made.aclose()


async def _examined(name: str, backend: Examined) -> list[str]:
    try:
        async with asyncio.timeout(EXAMINE_LIMIT_S):
            return await backend.examine()
    except TimeoutError:
        return [f"{name} did not answer all questions within {EXAMINE_LIMIT_S:g} s: try again"]


async def _try(what: str, attempt: Awaitable[str]) -> Tried:
    try:
        async with asyncio.timeout(LIMIT_S):
            return Tried(what, REACHED, await attempt)
    except NoAddress as error:
        return Tried(what, FAILED, str(error))
    except OSError as error:
        return Tried(what, FAILED, f"{fault_of(error)}: {_words(error)}")  # the word that delivery has for it as well


class NoAddress(Exception):
    """There is nothing to connect to; the text says what to set."""


def _words(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no connection within {LIMIT_S:g} s"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"the TLS handshake failed: {error.reason or error}"
    # asyncio puts a text of its own where the system's would say more; names that are not found have theirs.
    number = error.errno or 0
    if number > 0:
        return os.strerror(number)
    return error.strerror or str(error) or "it closed the connection"


async def _reach_upstream(
    url: str, ca_file: Path | None, cert_file: Path | None, key_file: Path | None, server_name: str | None
) -> str:
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").partition(":")[0]
        _, writer = await asyncio.open_unix_connection(path)
        await _close(writer)
        return f"unix:{path}"
    context = None
    if url.startswith("https://"):
        context = read(Files(False, ca_file, cert_file, key_file))
    return await _reach(url, context, server_name)


async def _reach_backend(name: str, url: str | None) -> str:
    """The address that is set, else the vendor's own (a backend's `address`)."""
    if url is None:
        raise NoAddress(f"it has no address: set SIDECAR_{name.upper()}_URL")
    return await _reach(url, ssl.create_default_context() if url.startswith("https://") else None, None)


async def _reach(url: str, context: ssl.SSLContext | None, server_name: str | None) -> str:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    host = parts.hostname or ""
    _, writer = await asyncio.open_connection(
        host, port, ssl=context, server_hostname=(server_name or host) if context is not None else None
    )
    peer = writer.get_extra_info("peername") or ("?",)
    tls = writer.get_extra_info("ssl_object")
    await _close(writer)
    return f"{host}:{port} at {peer[0]}" + (f", {tls.version()}" if tls is not None else "")


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()  # nothing was sent: there is nothing to wait for
