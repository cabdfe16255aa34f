"""The whole: as processes, which is how it runs, or in one event loop, for a demonstration and for tests.

Read the start-up lists backwards for the drain: calls end, what they left is recorded and delivered, the admin port is
the last to close, and the data directory is let go of.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

from sidecar.runtime import factory
from sidecar.runtime import logging as logs
from sidecar.runtime.instance_lock import DataLock
from sidecar.runtime.metering import Metering, metering, open_admin, recording
from sidecar.runtime.seam_protocol import listen_at_seam
from sidecar.runtime.serving import serving
from sidecar.runtime.supervisor import Supervisor, bind
from sidecar.settings import Settings
from sidecar.spool.frames import SOURCE_BYTES
from sidecar.storage.sockets import listening


def run(settings: Settings, read: Callable[[], Settings] | None = None) -> int:
    """Serve with these settings; the exit code. `read`: reads them anew, for SIGHUP; it raises what is wrong with them.
    Raises the parts' own errors from starting."""
    logs.set_up(settings.serve.log_level.value.upper(), settings.serve.log_format, role="supervisor")
    return Supervisor(settings, read).run()


@dataclass(slots=True, kw_only=True)
class Running:
    """Everything in this loop."""

    metering: Metering
    proxy_url: str
    admin_url: str


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Running]:
    """Serve and meter in this loop, with the seam between them as ever. Raises the parts' own errors."""
    # `last` closes after `stack`: the admin port answers while calls end and the last deliveries go out.
    async with AsyncExitStack() as last, AsyncExitStack() as stack:
        taking = partial(DataLock.take, settings.data_dir, wait_s=settings.serve.stop_s)
        lock = last.enter_context(await asyncio.to_thread(taking))
        seam, address = listen_at_seam(settings.data_dir, held=True)
        with listening(settings.serve.listen, "SIDECAR_LISTEN"):
            [listeners], proxy_url = bind(settings.serve.listen, 1, tls=settings.proxy.tls_cert_file is not None)
        with listening(settings.serve.admin_listen, "SIDECAR_ADMIN_LISTEN"):
            [[admin]], admin_url = bind(settings.serve.admin_listen, 1, first=True)
        factory.raise_file_limit(settings)
        key = factory.kept_hash_key(settings) or factory.new_hash_key()
        source = os.urandom(SOURCE_BYTES)
        whole = await last.enter_async_context(metering(settings, seam=seam))
        await open_admin(last, settings, admin, whole)
        whole.seam.expect(source, 0)
        await stack.enter_async_context(recording(whole, key=key))
        calls = await stack.enter_async_context(serving(settings, key=key, address=address, source=source))
        for listener in listeners:
            await calls.proxy.listen(sock=listener)
        lock.announce(admin=admin_url, proxy=proxy_url)
        yield Running(metering=whole, proxy_url=proxy_url, admin_url=admin_url)
