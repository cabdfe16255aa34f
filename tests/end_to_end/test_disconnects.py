"""The client leaves: at each moment of a stream, under each policy, for each family of streams, plain and coded.

What may still be metered, and how sure it is: with `drain` the upstream is read on while its usage is still to come;
with `stop` a family that reports as it goes leaves a lower bound, and one that reports at the end leaves nothing.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from dataclasses import dataclass
from typing import Any

import pytest
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, until

from sidecar.model.exchange import Usage
from sidecar.usage.readers import Pin, UsageTaps

Numbers = tuple[int | None, int | None]  # input and output tokens
MOMENTS = [
    "before the head", "before the first byte", "mid-stream", "before the usage", "behind the usage", "at the end",
]  # fmt: skip
ASK = b"POST %b HTTP/1.1\r\nHost: me\r\nContent-Length: %d\r\n\r\n%b"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n%b\r\n"


def event(data: Any, name: str = "") -> bytes:
    line = f"event: {name}\n" if name else ""
    return f"{line}data: {json.dumps(data)}\n\n".encode()


@dataclass(frozen=True)
class Family:
    """A stream in four parts: first content, last content, usage, end mark."""

    path: str
    asked: dict[str, Any]
    parts: tuple[bytes, bytes, bytes, bytes]
    seen: tuple[Numbers, Numbers, Numbers]  # what is known behind each of the first three
    usage_ends: bool = False  # the event with the usage is the end mark

    @property
    def final(self) -> Numbers:
        return self.seen[2]


def chat_chunk(**changes: Any) -> bytes:
    return event({"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": []} | changes)


def delta(text: str | None, reason: str | None = None) -> list[dict[str, Any]]:
    return [{"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}]


def gemini_chunk(output: int, reason: str | None = None) -> bytes:
    candidate = {"content": {"parts": [{"text": "sea"}], "role": "model"}, "index": 0}
    usage = {"promptTokenCount": 7, "candidatesTokenCount": output, "totalTokenCount": 7 + output}
    finish = {"finishReason": reason} if reason else {}
    return event({"candidates": [candidate | finish], "usageMetadata": usage, "modelVersion": "m", "responseId": "g"})


def anthropic_event(kind: str, **data: Any) -> bytes:
    return event({"type": kind} | data, kind)


NOTHING: Numbers = (None, None)
CHAT = Family(
    "/v1/chat/completions",
    {"model": "m", "stream": True, "stream_options": {"include_usage": True}},
    (
        chat_chunk(choices=delta("Salt")),
        chat_chunk(choices=delta(None, "stop")),
        chat_chunk(usage={"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}),
        b"data: [DONE]\n\n",
    ),
    (NOTHING, NOTHING, (11, 5)),
)
RESPONSES = Family(
    "/v1/responses",
    {"model": "m", "stream": True},
    (
        event(
            {"type": "response.created", "response": {"object": "response", "id": "r", "model": "m"}},
            "response.created",
        )
        + event({"type": "response.output_text.delta", "delta": "Salt"}, "response.output_text.delta"),
        event({"type": "response.output_text.done", "text": "Salt"}, "response.output_text.done"),
        event(
            {
                "type": "response.completed",
                "response": {
                    "id": "r",
                    "model": "m",
                    "status": "completed",
                    "usage": {"input_tokens": 13, "output_tokens": 4, "total_tokens": 17},
                },
            },
            "response.completed",
        ),
        b": bye\n\n",
    ),
    (NOTHING, NOTHING, (13, 4)),
    usage_ends=True,
)
ANTHROPIC = Family(
    "/v1/messages",
    {"model": "m", "stream": True, "max_tokens": 9},
    (
        anthropic_event(
            "message_start",
            message={"id": "a", "type": "message", "model": "m", "usage": {"input_tokens": 20, "output_tokens": 1}},
        )
        + anthropic_event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Salt"}),
        anthropic_event("content_block_stop", index=0),
        anthropic_event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 8}),
        anthropic_event("message_stop"),
    ),
    ((20, 1), (20, 1), (20, 8)),
)
GEMINI = Family(
    "/v1beta/models/m:streamGenerateContent?alt=sse",
    {"contents": []},
    (gemini_chunk(2), gemini_chunk(6), gemini_chunk(9, "STOP"), b"\n"),
    ((7, 2), (7, 6), (7, 9)),
)
FAMILIES = {"chat": CHAT, "responses": RESPONSES, "anthropic": ANTHROPIC, "gemini": GEMINI}


def coded(parts: tuple[bytes, ...], coding: str) -> list[bytes]:
    """The parts as they go over the wire, each of them readable when it has come."""
    if coding == "plain":
        return list(parts)
    pack = zlib.compressobj(wbits=31)
    wire = [pack.compress(part) + pack.flush(zlib.Z_SYNC_FLUSH) for part in parts]
    wire[-1] += pack.flush()
    return wire


class Upstream:
    """Sends up to the moment, waits, and goes on if it is let to."""

    def __init__(self, wire: list[bytes], coding: str, moment: str) -> None:
        self.wire = wire
        self.coding = coding
        self.moment = MOMENTS.index(moment)
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.read_on = False  # it could send to the end

    async def __call__(self, conversation: Conversation) -> None:
        await conversation.message()
        self.asked.set()
        head = HEAD % (b"Content-Encoding: gzip\r\n" if self.coding == "gzip" else b"")
        steps = [head, *(b"%x\r\n%b\r\n" % (len(part), part) for part in self.wire), b"0\r\n\r\n"]
        for step in steps[: self.moment]:
            await conversation.send(step)
        await self.go_on.wait()
        for step in steps[self.moment :]:
            await conversation.send(step)
        self.read_on = await conversation.silent(0.02)


async def leave(family: Family, coding: str, policy: str, moment: str, taps: UsageTaps) -> tuple[Hop, Upstream]:
    """Call, read up to the moment, leave, and wait until that is over."""
    wire = coded(family.parts, coding)
    upstream = Upstream(wire, coding, moment)
    async with RawUpstream(upstream) as server, Hop(server.url, taps=taps, on_disconnect=policy) as hop:
        client = await hop.client()
        body = json.dumps(family.asked).encode()
        await client.send(ASK % (family.path.encode(), len(body), body))
        await upstream.asked.wait()
        if upstream.moment >= 1:
            await client.head()
        for part in wire[: max(0, upstream.moment - 1)]:
            await client.until(part)
        await client.close()
        await until(lambda: bool(hop.recorder.records) or hop.counts.drains == 1)
        upstream.go_on.set()
        await hop.recorder.ended()
        if upstream.moment < MOMENTS.index("behind the usage") and policy == "drain":
            await until(lambda: upstream.read_on)
    return hop, upstream


def known(usage: Usage) -> Numbers:
    return usage.input_tokens, usage.output_tokens


@pytest.mark.parametrize("coding", ["plain", "gzip"])
@pytest.mark.parametrize("policy", ["drain", "stop"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("name", FAMILIES)
async def test_what_is_left_to_meter(name: str, moment: str, policy: str, coding: str) -> None:
    family = FAMILIES[name]
    anomalies: list[str] = []
    hop, upstream = await leave(family, coding, policy, moment, UsageTaps(anomaly=anomalies.append))
    assert len(hop.recorder.records) == 1, hop.recorder.records
    (exchange,) = hop.recorder.records
    usage = exchange.usage
    place = MOMENTS.index(moment)

    ended = moment == "at the end" or (moment == "behind the usage" and family.usage_ends)
    if name == "gemini":
        ended = False  # only the end of the body ends it, and that was not sent
    assert exchange.outcome is (Outcome.COMPLETE if ended else Outcome.CLIENT_LEFT)
    assert exchange.status == (None if place == 0 else 200)
    assert usage is not None
    assert usage.request_model == "m"
    if policy == "drain" or place >= MOMENTS.index("behind the usage"):
        assert (usage.usage_state, known(usage)) == ("final", family.final)
    else:
        seen = NOTHING if place < 2 else family.seen[place - 2]
        assert known(usage) == seen
        assert usage.usage_state == ("absent" if seen == NOTHING else "partial")
        assert usage.reason
        assert not upstream.read_on
    assert not anomalies


async def test_nothing_is_read_on_for_usage_that_nobody_asked_for() -> None:
    asked = {key: value for key, value in CHAT.asked.items() if key != "stream_options"}
    family = Family(CHAT.path, asked, CHAT.parts, CHAT.seen)
    taps = UsageTaps(pins=[Pin(CHAT.path, "openai")])
    hop, _ = await leave(family, "plain", "stop", "mid-stream", taps)
    (exchange,) = hop.recorder.records
    assert exchange.usage is not None
    assert exchange.usage.usage_state == "absent"


@pytest.mark.parametrize("name", FAMILIES)
async def test_an_upstream_that_breaks_leaves_what_it_said(name: str) -> None:
    family = FAMILIES[name]

    async def script(conversation: Conversation) -> None:
        await conversation.message()
        part = family.parts[0]
        await conversation.send(HEAD % b"" + b"%x\r\n%b\r\n" % (len(part), part))
        conversation.reset()

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        body = json.dumps(family.asked).encode()
        await client.send(ASK % (family.path.encode(), len(body), body))
        exchange = await hop.recorder.ended()
    assert exchange.outcome is Outcome.UPSTREAM_BROKE
    assert exchange.usage is not None
    assert known(exchange.usage) in (family.seen[0], NOTHING)  # a reset may overtake what was sent before it


@pytest.mark.parametrize("how", ["unreachable", "silent", "no http"])
async def test_no_answer_is_a_model_call_without_numbers(how: str) -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(b"no http at all\r\n\r\n" if how == "no http" else b"")
        await conversation.rest()

    rules: dict[str, Any] = {"upstream_timeout_s": 0.05} if how == "silent" else {}
    async with RawUpstream(script) as upstream:
        url = "http://127.0.0.1:1" if how == "unreachable" else upstream.url
        async with Hop(url, taps=UsageTaps(), **rules) as hop:
            for path, body in (("/v1/messages", b'{"model":"m"}'), ("/other", b'{"model":"m"}')):
                head, _ = await hop.call(ASK % (path.encode(), len(body), body))
                assert head.split()[1] in (b"502", b"504")
            model, other = hop.recorder.records
    assert other.usage is None
    assert model.usage is not None
    assert (model.usage.usage_state, model.usage.request_model, known(model.usage)) == ("absent", "m", NOTHING)
    assert model.usage.provider == "anthropic"
    assert model.request_bytes == other.request_bytes == 13


@pytest.mark.parametrize("cut", [5, 60])
@pytest.mark.parametrize("kind", ["stream", "plain"])
async def test_an_answer_cut_before_it_said_anything_is_a_model_call_all_the_same(kind: str, cut: int) -> None:
    content_type = b"text/event-stream" if kind == "stream" else b"application/json"
    body = CHAT.parts[0] if kind == "stream" else CHAT.parts[2].removeprefix(b"data: ").strip()

    async def script(conversation: Conversation) -> None:
        await conversation.message()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: 999\r\n\r\n" % content_type
        await conversation.send(head + body[:cut])

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        await client.send(ASK % (CHAT.path.encode(), 13, b'{"model":"m"}'))
        exchange = await hop.recorder.ended()
    assert exchange.outcome is Outcome.UPSTREAM_BROKE
    assert exchange.usage is not None
    assert (exchange.usage.usage_state, exchange.usage.request_model, known(exchange.usage)) == ("absent", "m", NOTHING)


async def test_what_an_answer_said_before_it_broke_is_kept_though_the_client_gets_a_502() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.message()
        part = ANTHROPIC.parts[0]
        await conversation.send(HEAD % b"" + b"%x\r\n%b\r\nno chunk\r\n" % (len(part), part))
        await conversation.rest()

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        head, _ = await hop.call(ASK % (ANTHROPIC.path.encode(), 13, b'{"model":"m"}'))
        exchange = await hop.recorder.ended()
    assert head.startswith(b"HTTP/1.1 502 ")
    assert exchange.usage is not None
    assert (exchange.usage.usage_state, known(exchange.usage)) == ("partial", (20, 1))
