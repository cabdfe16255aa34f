"""The stand-ins of the tests, started in the test's own loop: the billing receiver and the scripted LLM upstream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from sidecar.dev.mock_backends import Receiver, Terms
from sidecar.dev.mock_llm import Script, ScriptedLLM


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


@asynccontextmanager
async def running_llm(default: Script | None = None) -> AsyncIterator[tuple[ScriptedLLM, str]]:
    """A scripted upstream that listens, and its address. OpenAI's clients want `/v1` behind it."""
    llm = ScriptedLLM(default)
    url = await llm.start()
    try:
        yield llm, url
    finally:
        await llm.aclose()
