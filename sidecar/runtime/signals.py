"""The operator's wish to stop, as an event of the loop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Iterator
from typing import Final

STOPPERS: Final = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stop_event() -> Iterator[asyncio.Event]:
    """Set by the first SIGINT or SIGTERM within the block. Outside the main thread nothing sets it."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    caught = []
    try:
        for number in STOPPERS:
            with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, stop.set)
                caught.append(number)
        yield stop
    finally:
        for number in caught:
            loop.remove_signal_handler(number)
