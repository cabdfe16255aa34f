"""A tiny model API with fixed answers, for tests that care about the records and not about the answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

USAGE = {"prompt_tokens": 43, "completion_tokens": 97, "total_tokens": 140}
ANSWER = {
    "id": "chatcmpl-tiny",
    "object": "chat.completion",
    "model": "gpt-5-mini-2025-08-07",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Salt."}, "finish_reason": "stop"}],
    "usage": USAGE,
}


def chunk(**changes: object) -> bytes:
    base = {"id": "chatcmpl-tiny", "object": "chat.completion.chunk", "model": "gpt-5-mini-2025-08-07"}
    return b"data: " + json.dumps(base | {"choices": [], "usage": None} | changes).encode() + b"\n\n"


@asynccontextmanager
async def tiny_upstream(*, events: int = 10, gap_s: float = 0.004) -> AsyncIterator[str]:
    """Yields its URL. A stream takes `events * gap_s` seconds, so that kills land inside of some."""

    async def chat(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        if not asked.get("stream"):
            return web.json_response(ANSWER)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        try:
            await stream(answer)
        except ConnectionError:
            pass  # the sidecar was killed
        return answer

    async def stream(answer: web.StreamResponse) -> None:
        for number in range(events):
            await answer.write(
                chunk(choices=[{"index": 0, "delta": {"content": f"w{number} "}, "finish_reason": None}])
            )
            await asyncio.sleep(gap_s)
        await answer.write(chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]))
        await answer.write(chunk(usage=USAGE))
        await answer.write(b"data: [DONE]\n\n")
        await answer.write_eof()

    async def things(_: web.Request) -> web.Response:
        return web.json_response({"made": True})

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_post("/v1/things", things)
    app.router.add_post("/v1/things/{call}", things)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()
