"""Bodies made to be dear to read, through the real proxy: they cost their length, and others are served meanwhile."""

from __future__ import annotations

import asyncio
import time

import pytest
from rawhttp import Conversation, Hop, RawUpstream, on_both_loops

from sidecar.usage.taps import UsageTaps

SIZE = 2_000_000
USAGE = b'"usage":{"prompt_tokens":5,"completion_tokens":7}}'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
ASK = b"POST /v1/chat/completions HTTP/1.1\r\nHost: me\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


def body_of(unit: bytes, start: bytes = b"", end: bytes = b"") -> bytes:
    return b'{"model":"m","choices":[],' + start + unit * (SIZE // len(unit)) + end + b"," + USAGE


PLAIN = body_of(b"The quick brown fox. ", b'"x":"', b'"')
BUSY = {
    "members": body_of(b'"x":{"a":1},', end=b'"y":1'),
    "usage": body_of(b'"usage":{"a":1},', end=b'"y":1'),
    "skipped": body_of(b'{"a":1},', b'"x":[', b"1]"),
}


@pytest.mark.parametrize("shape", BUSY)
@on_both_loops
async def test_others_are_answered_while_a_busy_body_passes(shape: str) -> None:
    sizes: dict[int, bytes] = {len(BUSY[shape]): BUSY[shape], len(PLAIN): PLAIN}

    async def script(conversation: Conversation) -> None:
        while True:
            _, body = await conversation.message()
            answer = sizes.get(len(body), b"{}")
            await conversation.send(HEAD % len(answer) + answer)

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps(body_fields=("user",))) as hop:
        answered = 0

        async def go_on() -> None:
            nonlocal answered
            other = await hop.client()
            while True:
                await other.send(ASK % 2 + b"{}")
                await other.message()
                answered += 1

        others = asyncio.create_task(go_on())
        client = await hop.client()

        async def cost(body: bytes) -> float:
            """Processor time of the cheapest of three calls, with those that others were answered meanwhile."""
            best = float("inf")
            for _ in range(3):
                before, since = answered, time.process_time()
                await client.send(ASK % len(body) + body)
                _, got = await client.message()
                best = min(best, time.process_time() - since)
                assert got == body
                assert answered > before
            return best

        plain = await cost(PLAIN)
        assert await cost(BUSY[shape]) <= 3 * plain
        others.cancel()
    found = [exchange.usage for exchange in hop.recorder.records if exchange.response_bytes > SIZE // 2]
    assert [(usage.input_tokens, usage.output_tokens) for usage in found if usage is not None] == [(5, 7)] * 6
