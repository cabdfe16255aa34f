"""`SIDECAR_ASK_FOR_USAGE`: a stream that would not have said what it used says it; the client sees no difference."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from support.rawhttp import (
    Conversation,
    Hop,
    Outcome,
    RawUpstream,
    answering,
    dechunk,
    field_of,
    on_both_loops,
    reply,
    until,
)
from support.scripted import running_llm
from support.whole import Whole

from sidecar.usage.include_usage import BODY_MAX_BYTES
from sidecar.usage.readers import Pin, UsageTaps

PATH = "/v1/chat/completions"
STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n%bTransfer-Encoding: chunked\r\n\r\n"
CONTENT = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{"content":"Salt"},"finish_reason":null}]}\n\n'
LAST = b'data: {"id":"c","model":"m","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}'
EXTRA = b'data: {"id":"c","model":"m","choices":[],"usage":%b}\n\n' % USAGE
END = b"data: [DONE]\n\n"


def chunk(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def taps(*pins: Pin, kinds: list[str] | None = None) -> UsageTaps:
    return UsageTaps(ask_for_usage=True, pins=pins, anomaly=(kinds if kinds is not None else []).append)


def request(body: Any, fields: bytes = b"", path: str = PATH, method: bytes = b"POST") -> bytes:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"%b %b HTTP/1.1\r\nHost: me\r\n%bContent-Length: %d\r\n\r\n" % (method, path.encode(), fields, len(raw))
    return head + raw


class Streaming:
    """Answers with the extra chunk if it was asked for, cut into chunks of `size`."""

    def __init__(self, size: int = 10_000, fields: bytes = b"") -> None:
        self.size = size
        self.fields = fields
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []

    async def __call__(self, conversation: Conversation) -> None:
        while True:
            head, body = await conversation.message()
            self.heads.append(head)
            self.bodies.append(body)
            extra = EXTRA if b"include_usage" in body else b""
            answer = CONTENT + LAST + extra + END
            pieces = [answer[start : start + self.size] for start in range(0, len(answer), self.size)]
            await conversation.send(STREAM % self.fields)
            for piece in pieces:
                await conversation.send(chunk(piece))
                await asyncio.sleep(0)
            await conversation.send(b"0\r\n\r\n")


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
@on_both_loops
async def test_usage_is_asked_for_and_the_client_sees_no_difference(size: int) -> None:
    script = Streaming(size)
    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=taps()) as hop:
        client = await hop.client()
        asked = request({"model": "m", "stream": True, "messages": []}, b"accept-encoding: gzip, br\r\nX-Any: 1\r\n")
        for piece in (asked[:50], asked[50:-20], asked[-20:-3], asked[-3:]):  # it may come in pieces
            await client.send(piece)
            await asyncio.sleep(0.002)
        head, raw = await client.message()
        assert head.startswith(b"HTTP/1.1 200 OK")
        assert dechunk(raw) == CONTENT + LAST + END
        (sent,) = script.bodies
        own = asked.partition(b"\r\n\r\n")[2]
        assert json.loads(sent) == json.loads(own) | {"stream_options": {"include_usage": True}}
        assert field_of(script.heads[0], b"Content-Length") == str(len(sent)).encode()
        assert b"\r\naccept-encoding: identity\r\nX-Any: 1\r\n" in script.heads[0]
        exchange = await hop.recorder.ended()
        assert exchange.usage is not None
        assert (exchange.usage.usage_state, exchange.usage.total_tokens) == ("final", 7)
        assert exchange.request_bytes == len(own)
        assert exchange.request_headers == ["Host", "accept-encoding", "X-Any", "Content-Length"]
        # The connections go on.
        await client.send(request({"model": "m", "stream": True}))
        await client.message()
        assert upstream.connections == 1


@pytest.mark.parametrize(
    ("body", "fields", "path"),
    [
        ({"model": "m"}, b"", PATH),
        ({"stream": False}, b"", PATH),
        ({"stream": True, "stream_options": {"include_usage": False}}, b"", PATH),
        ({"stream": True, "stream_options": {"include_usage": True}}, b"", PATH),
        (b'{"stream": true, no json', b"", PATH),
        (b'["stream"]', b"", PATH),
        ({"stream": True}, b"Content-Encoding: gzip\r\n", PATH),
        ({"stream": True}, b"Content-Digest: sha-256=:x:\r\n", PATH),
        ({"stream": True}, b"Content-Type: text/plain\r\n", PATH),
        ({"stream": True}, b"", "/v1/messages"),
        ({"stream": True}, b"", "/v1/responses"),
        ({"stream": True}, b"", "/v1/fim/completions"),
        ({"stream": True}, b"", "/elsewhere"),
        ({"stream": True}, b"", "/pinned/v1/chat/completions"),
        ({"stream": True, "pad": "x" * BODY_MAX_BYTES}, b"", PATH),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_these_are_left_as_they_are(body: Any, fields: bytes, path: str) -> None:
    seen: list[bytes] = []
    pin = Pin("/pinned/v1/chat/completions", "groq")
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url, taps=taps(pin)) as hop:
        asked = request(body, fields + b"Accept-Encoding: gzip\r\n", path)
        await hop.call(asked)
        (sent,) = seen
        assert sent.partition(b"\r\n\r\n")[2] == asked.partition(b"\r\n\r\n")[2]
        assert field_of(sent.partition(b"\r\n\r\n")[0] + b"\r\n", b"Accept-Encoding") == b"gzip"


async def test_off_by_default() -> None:
    script = Streaming()
    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        _, raw = await hop.call(request({"stream": True}))
        assert dechunk(raw) == CONTENT + LAST + END
        assert script.bodies == [b'{"stream": true}']


async def test_the_chunk_stays_for_a_client_that_asked() -> None:
    script = Streaming()
    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=taps()) as hop:
        _, raw = await hop.call(request({"stream": True, "stream_options": {"include_usage": True}}))
        assert dechunk(raw) == CONTENT + LAST + EXTRA + END


async def test_a_coded_answer_is_passed_on_whole_and_counted() -> None:
    kinds: list[str] = []
    script = Streaming(fields=b"Content-Encoding: gzip\r\n")  # against what it was told
    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=taps(kinds=kinds)) as hop:
        _, raw = await hop.call(request({"stream": True}))
        assert dechunk(raw) == CONTENT + LAST + EXTRA + END
    assert "usage_chunk_left" in kinds


@pytest.mark.parametrize("answer", [reply(b'{"error":{}}', b"400 Bad Request"), reply(CONTENT + EXTRA)])
async def test_other_answers_pass(answer: bytes) -> None:
    async with RawUpstream(answering(answer)) as upstream, Hop(upstream.url, taps=taps()) as hop:
        _, body = await hop.call(request({"stream": True}))
        assert body == answer.partition(b"\r\n\r\n")[2]


async def test_an_answer_that_ends_without_its_last_line_end() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + CONTENT + LAST[:-1])

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=taps()) as hop:
        _, raw = await hop.call(request({"stream": True}))
        assert dechunk(raw) == CONTENT + LAST[:-1]


@on_both_loops
async def test_a_client_that_leaves_while_its_body_is_gathered() -> None:
    async with RawUpstream(Streaming()) as upstream, Hop(upstream.url, taps=taps()) as hop:
        client = await hop.client()
        await client.send(request({"stream": True})[:-4])
        await hop.recorder.let_in()
        await client.close()
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.CLIENT_LEFT, None)
        assert upstream.connections == 0


async def test_a_body_that_does_not_come_is_refused() -> None:
    async with RawUpstream(Streaming()) as upstream, Hop(upstream.url, taps=taps(), idle_timeout_s=0.05) as hop:
        client = await hop.client()
        await client.send(request({"stream": True})[:-4])
        assert (await client.head()).startswith(b"HTTP/1.1 408 ")
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, upstream.connections) == (Outcome.REFUSED, 0)


async def test_an_upstream_that_is_not_there() -> None:
    async with Hop("http://127.0.0.1:1", taps=taps()) as hop:
        head, _ = await hop.call(request({"stream": True, "model": "m"}))
        assert head.startswith(b"HTTP/1.1 502 ")
        exchange = await hop.recorder.ended()
        assert exchange.usage is not None
        assert exchange.usage.request_model == "m"


@on_both_loops
async def test_the_usage_is_waited_for_when_the_client_leaves() -> None:
    """Nobody but us asked, and we did: so it is worth reading on."""
    go_on = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(STREAM % b"" + chunk(CONTENT))
        await go_on.wait()
        await conversation.send(chunk(LAST) + chunk(EXTRA) + chunk(END) + b"0\r\n\r\n")

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=taps(Pin(PATH, "openai"))) as hop:
        client = await hop.client()
        await client.send(request({"stream": True}))
        await client.until(CONTENT)
        await client.close()
        await until(lambda: hop.counts.drains == 1)
        go_on.set()
        exchange = await hop.recorder.ended()
        assert exchange.usage is not None
        assert exchange.usage.total_tokens == 7


async def test_the_whole_with_the_official_client_and_the_count_of_calls_without_usage(tmp_path: Path) -> None:
    async def chunks(url: str) -> list[Any]:
        async with openai.AsyncOpenAI(api_key="sk", base_url=f"{url}/v1", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="gpt-5-mini", messages=[{"role": "user", "content": "sea"}], stream=True
            )
            return [chunk.model_dump(exclude={"id", "created"}) async for chunk in stream]

    async with running_llm() as (_, upstream):
        direct = await chunks(upstream)
        found = {}
        for switch in ("off", "on"):
            whole = Whole(tmp_path / switch, upstream, SIDECAR_ASK_FOR_USAGE=switch)
            async with whole:
                assert await chunks(whole.proxy_url) == direct
                await whole.settled()
                found[switch] = (await whole.records())[0]["usage"]
                metrics = await whole.text("/metrics")
                assert await whole.stop() == 0
            absent = [line for line in metrics.splitlines() if 'state="absent"' in line]
            assert bool(absent) is (switch == "off")
            assert all('model="gpt-5-mini' in line for line in absent)
    assert found["off"]["usage_state"] == "absent"
    assert found["on"]["usage_state"] == "final"
    assert found["on"]["total_tokens"] > 0
