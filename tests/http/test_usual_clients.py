"""Clients as they come from PyPI write a head and then its body, and so do many servers: such calls take the short way,
and what is recorded of them is the same."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Callable

import aiohttp
import httpx
import openai
import pytest
import requests
from support.rawhttp import Conversation, Hop, RawUpstream, Script, until

from sidecar.model.exchange import Exchange, Outcome
from sidecar.usage.readers import UsageTaps

CALLS = 60  # in some a machine that is busy with other things may not be quick enough
PROMPT = "x" * 20_000
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1790000000, "model": "gpt-5-mini",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 43, "completion_tokens": 97, "total_tokens": 140},
    }
).encode()  # fmt: skip
BODY = {"model": "gpt-5-mini", "messages": [{"role": "user", "content": PROMPT}]}


def apart(kind: str) -> Script:
    """A server that sends the head of a response, and then its body."""
    body = gzip.compress(ANSWER) if kind == "gzip" else ANSWER
    fields = b"Content-Type: application/json\r\n" + (b"Content-Encoding: gzip\r\n" if kind == "gzip" else b"")
    if kind == "sized":
        fields += b"Content-Length: %d\r\n" % len(body)
    else:
        fields += b"Transfer-Encoding: chunked\r\n"
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)

    async def script(conversation: Conversation) -> None:
        while True:
            await conversation.message()
            await conversation.send(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n")
            await asyncio.sleep(0)
            await conversation.send(body)

    return script


def by_httpx(url: str) -> None:
    with httpx.Client() as client:
        for _ in range(CALLS):
            assert client.post(f"{url}/v1/chat/completions", json=BODY).content == ANSWER


def by_requests(url: str) -> None:
    with requests.Session() as session:
        for _ in range(CALLS):
            assert session.post(f"{url}/v1/chat/completions", json=BODY, timeout=30).content == ANSWER


def by_openai(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="sk-test", max_retries=0) as client:
        for _ in range(CALLS):
            said = client.chat.completions.create(model="gpt-5-mini", messages=[{"role": "user", "content": PROMPT}])
            assert said.choices[0].message.content == "hello"


def by_aiohttp(url: str) -> None:
    async def call() -> None:
        async with aiohttp.ClientSession() as session:
            for _ in range(CALLS):
                async with session.post(f"{url}/v1/chat/completions", json=BODY) as response:
                    assert await response.read() == ANSWER

    asyncio.run(call())


def facts(exchange: Exchange) -> tuple[object, ...]:
    usage = exchange.usage
    tokens = None if usage is None else (usage.input_tokens, usage.output_tokens, usage.request_model)
    return exchange.outcome, exchange.status, exchange.response_bytes, tokens


@pytest.mark.parametrize("kind", ["sized", "chunked", "gzip"])
@pytest.mark.parametrize("calls", [by_httpx, by_requests, by_openai, by_aiohttp])
async def test_calls_of_usual_clients_take_the_short_way(calls: Callable[[str], None], kind: str) -> None:
    async with RawUpstream(apart(kind)) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        await asyncio.to_thread(calls, f"http://127.0.0.1:{hop.port}")
        await until(lambda: len(hop.recorder.records) == CALLS)
        size = len(gzip.compress(ANSWER)) if kind == "gzip" else len(ANSWER)
        expected = (Outcome.COMPLETE, 200, size, (43, 97, "gpt-5-mini"))
        assert {facts(exchange) for exchange in hop.recorder.records} == {expected}
        assert hop.recorder.plain_calls > 0
