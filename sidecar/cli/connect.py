"""`check --connect`: can the upstream and the backends be reached from here, and do they know us?

For each address: the name is resolved, a connection is opened and, with https, the certificate verified. No request is
sent, so nothing is metered, billed or logged anywhere.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from sidecar.settings import Settings

LIMIT_S: Final = 10.0  # for name, connection and handshake of one address together
REACHED: Final = "reached"
FAILED: Final = "failed"


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one attempt."""

    what: str
    result: str  # one of the two words above
    detail: str

    @property
    def ok(self) -> bool:
        return self.result != FAILED


async def try_everything(settings: Settings) -> list[Tried]:
    """The upstream and each backend that is switched on, all at the same time."""
    attempts = [_try(name, _reach_backend(settings, name)) for name in settings.backends]
    if settings.upstream_url is not None:
        attempts.insert(0, _try("upstream", _reach_upstream(settings, settings.upstream_url)))
    return list(await asyncio.gather(*attempts))


async def _try(what: str, attempt: Awaitable[str]) -> Tried:
    try:
        async with asyncio.timeout(LIMIT_S):
            return Tried(what, REACHED, await attempt)
    except TimeoutError:
        return Tried(what, FAILED, f"no connection within {LIMIT_S:g} s")
    except ssl.SSLCertVerificationError as error:
        return Tried(what, FAILED, f"its certificate is not accepted: {error.verify_message}")
    except ssl.SSLError as error:
        return Tried(what, FAILED, f"the TLS handshake failed: {error.reason or error}")
    except OSError as error:
        # asyncio puts a text of its own where the system's would say more; names that are not found have theirs.
        number = error.errno or 0
        return Tried(what, FAILED, os.strerror(number) if number > 0 else error.strerror or str(error))


async def _reach_upstream(settings: Settings, url: str) -> str:
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").partition(":")[0]
        _, writer = await asyncio.open_unix_connection(path)
        await _close(writer)
        return f"unix:{path}"
    context = None
    if url.startswith("https://"):
        context = ssl.create_default_context(cafile=settings.upstream_ca_file)
        if settings.upstream_cert_file is not None:
            context.load_cert_chain(settings.upstream_cert_file, settings.upstream_key_file)
    return await _reach(url, context, settings.upstream_server_name)


async def _reach_backend(settings: Settings, name: str) -> str:
    """The address that is set, else the vendor's own (a backend's `address`)."""
    from sidecar.backends import BACKENDS, Context

    row, values = BACKENDS[name], settings.backend(name)
    if not any(setting.name == "url" for setting in row.settings):
        return "on this machine"
    url = values["url"]
    if url is None:
        made = row.make(values, Context(data_dir=settings.data_dir, subscribers=settings.subscribers))
        url = getattr(made, "address", None)
        await made.aclose()
    if url is None:
        raise OSError(f"it has no address: set SIDECAR_{name.upper()}_URL")
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
