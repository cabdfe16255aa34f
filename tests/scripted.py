"""The stand-ins of the tests, started in the test's own loop: the billing receiver and the scripted LLM upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from sidecar.receiver import Receiver, Terms


@asynccontextmanager
async def running_receiver(
    *, store: Path | None = None, terms: Mapping[str, Terms] | None = None, port: int = 0, **options: Any
) -> AsyncIterator[tuple[Receiver, aiohttp.ClientSession]]:
    """A receiver that listens, and a client session with its address as the base."""
    receiver = Receiver(store=store, terms=terms, **options)
    url = await receiver.start(port=port)
    try:
        async with aiohttp.ClientSession(url) as session:
            yield receiver, session
    finally:
        await receiver.aclose()
