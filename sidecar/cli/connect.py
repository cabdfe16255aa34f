"""`check --connect`: can the upstream and the backends be reached from here, and do they know us?

For each address: the name is resolved, a connection is opened and, with https, the certificate verified. No request is
sent, so nothing is metered, billed or logged anywhere.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from sidecar.settings import Settings

LIMIT_S: Final = 10.0  # for name, connection and handshake of one address together


@dataclass(frozen=True, slots=True)
class Tried:
    """What became of one attempt."""

    what: str
    ok: bool
    detail: str


async def try_everything(settings: Settings) -> list[Tried]:
    """The upstream and each backend that is switched on, all at the same time."""
    attempts = [_try(name, _reach_backend(settings, name)) for name in settings.backends]
    if settings.upstream_url is not None:
        attempts.insert(0, _try("upstream", _reach_upstream(settings, settings.upstream_url)))
    return list(await asyncio.gather(*attempts))


async def _try(what: str, attempt: Awaitable[str]) -> Tried:
    try:
        async with asyncio.timeout(LIMIT_S):
            return Tried(what, True, await attempt)
    except TimeoutError:
        return Tried(what, False, f"no connection within {LIMIT_S:g} s")
    except ssl.SSLCertVerificationError as error:
        return Tried(what, False, f"its certificate is not accepted: {error.verify_message}")
    except ssl.SSLError as error:
        return Tried(what, False, f"the TLS handshake failed: {error.reason or error}")
    except OSError as error:
        return Tried(what, False, error.strerror or str(error))


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
    """A backend without an address of its own (ledger, file) is on this machine."""
    url = settings.backend(name).get("url")
    if url is None:
        from sidecar.backends import BACKENDS, Context

        made = BACKENDS[name].make(settings.backend(name), Context(data_dir=settings.data_dir))
        url = getattr(made, "url", None)
        await made.aclose()
    if not isinstance(url, str):
        return "on this machine"
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
