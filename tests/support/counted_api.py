"""An API that counts what reaches it, and how it is called: for tests of what may be called at all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp import web
from support.whole import Whole

LIMIT_S = 60.0


class Upstream:
    """An API that counts what reaches it, and says that each call took so many tokens."""

    def __init__(self) -> None:
        self.calls = 0
        self.gate = asyncio.Event()  # answers wait for it
        self.gate.set()
        self.input_tokens = 10
        self.output_tokens = 5
        self.status = 200
        self.open = 0
        self.open_max = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.calls += 1
        self.open += 1
        self.open_max = max(self.open_max, self.open)
        try:
            body = await request.read()
            await self.gate.wait()
        finally:
            self.open -= 1
        usage = {
            "prompt_tokens": self.input_tokens,
            "completion_tokens": self.output_tokens,
            "total_tokens": self.input_tokens + self.output_tokens,
        }
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        if body and json.loads(body).get("stream"):
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for chunk in ({"choices": [{"index": 0, "delta": {"content": "x"}}]}, {"choices": [], "usage": usage}):
                row = {"id": "1", "object": "chat.completion.chunk", "model": "gpt-5", **chunk}
                await response.write(b"data: " + json.dumps(row).encode() + b"\n\n")
            await response.write(b"data: [DONE]\n\n")
            return response
        row = {"id": "1", "object": "chat.completion", "model": "gpt-5", "choices": [], "usage": usage}
        return web.json_response(row)


@asynccontextmanager
async def upstream() -> AsyncIterator[tuple[Upstream, str]]:
    found = Upstream()
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{tail:.*}", found.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    try:
        yield found, f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        found.gate.set()
        await runner.cleanup()


async def call(session: aiohttp.ClientSession, whole: Whole, who: str = "acme", **body: Any) -> tuple[int, bytes]:
    url = whole.proxy_url + "/v1/chat/completions"
    given = {"model": "gpt-5", "messages": [{"role": "user", "content": "hello"}], **body}
    async with session.post(url, json=given, headers={"x-tenant": who}) as answer:
        return answer.status, await answer.read()


def client() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(LIMIT_S))
