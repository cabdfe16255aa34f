"""Looking up names, each on a thread of its own.

The system's `getaddrinfo` cannot be ended, and takes a minute where no name server answers. An event loop gives it a
few threads for all names (uvloop two, the standard loop those of all other blocking work): two names that hang would
keep every other name from being found, and the process from ending. Who asks for a name waits for that name alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import Any


def with_own_threads(loop: asyncio.AbstractEventLoop) -> asyncio.AbstractEventLoop:
    """The loop, which looks names up so."""
    loop.getaddrinfo = partial(look_up, loop)  # type: ignore[method-assign]
    # uvloop's does not ask its own `getaddrinfo`.
    loop.create_connection = partial(_connect, loop, loop.create_connection)  # type: ignore[method-assign]
    return loop


async def _connect(
    loop: asyncio.AbstractEventLoop,
    connect: Callable[..., Awaitable[Any]],
    factory: Callable[[], asyncio.BaseProtocol],
    host: str | None = None,
    port: int | None = None,
    **more: Any,
) -> Any:
    """`loop.create_connection`, to one address after the other of a host."""
    if not host:
        return await connect(factory, host, port, **more)
    if more.get("ssl") and more.get("server_hostname") is None:
        more["server_hostname"] = host
    hints = {name: more[name] for name in ("family", "proto", "flags") if name in more}
    addresses = [address[0] for *_, address in await look_up(loop, host, port, type=socket.SOCK_STREAM, **hints)]
    for address in addresses[:-1]:
        with suppress(OSError):
            return await connect(factory, address, port, **more)
    return await connect(factory, addresses[-1], port, **more)


async def look_up(
    loop: asyncio.AbstractEventLoop,
    host: bytes | str | None,
    port: bytes | str | int | None,
    *,
    family: int = 0,
    type: int = 0,  # noqa: A002 - the loop's own names
    proto: int = 0,
    flags: int = 0,
) -> list[Any]:
    """`loop.getaddrinfo`. Raises `OSError`; how many run at once is the caller's to bound (aiohttp: one for a name)."""
    found: asyncio.Future[list[Any]] = loop.create_future()

    def settle(addresses: list[Any], error: Exception | None) -> None:
        if found.done():
            return  # nobody waits any more
        if error is None:
            found.set_result(addresses)
        else:
            found.set_exception(error)

    def ask() -> None:
        addresses: list[Any] = []
        fault: Exception | None = None
        try:
            addresses = socket.getaddrinfo(host, port, family, type, proto, flags)
        except Exception as error:  # noqa: BLE001 - told to who asked
            fault = error
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, addresses, fault)

    try:
        Thread(target=ask, name="name", daemon=True).start()  # daemon: it is not waited for at the end
    except RuntimeError:  # the system gives no thread
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
    return await found
