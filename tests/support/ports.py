"""Ports for servers of tests, apart from those that the system gives out.

A server bound to port 0 gets one that the system gives to anybody. Where a test on another core has just stopped its
server there, its clients still try: their requests come to the new one, which counts a call that nobody here made.
"""

from __future__ import annotations

import contextlib
import errno
import random
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

# Below those that Linux gives out (`ip_local_port_range`, 32,768 and up), to outgoing connections too.
RESTARTED = range(10_000, 21_000)  # of servers that stop and start, so that somebody may call while they are away
BOUND = range(21_000, 32_000)
TRIES = 100


def free_port() -> int:
    """One that nobody listens on now. A server that is started again finds it free."""
    while True:
        port = random.choice(RESTARTED)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


async def bound(listen: Callable[[int], Awaitable[T]]) -> T:
    """What `listen` gives for a port that it could bind.

    Raises:
        OSError: it failed for another reason than that the port is taken, or every time.
    """
    for left in reversed(range(TRIES)):
        try:
            return await listen(random.choice(BOUND))
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not left:
                raise
    raise AssertionError("unreachable")
