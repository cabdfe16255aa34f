"""The scripted upstream is real enough: the vendors' own clients, unmodified and strict, read its answers whole."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import anthropic
import openai
import pytest
from support.scripted import running_llm

from sidecar.dev.mock_llm import (
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    RESPONSES,
    End,
    Script,
    ScriptedLLM,
    ScriptError,
)  # fmt: skip
from sidecar.dev.mock_llm.script import DELAY_S_MAX, PIECES_MAX, parse

MODEL = "gpt-5-mini"
CLAUDE = "claude-sonnet-4-6"
MESSAGE: Any = [{"role": "user", "content": "How is the sea?"}]
TEXT = Script().text()
ENCODINGS = ["identity", "gzip", "deflate"]


def openai_client(url: str, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        api_key="sk-any", base_url=f"{url}/v1", max_retries=0, _strict_response_validation=True, **options
    )


def anthropic_client(url: str) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(api_key="any", base_url=url, max_retries=0, _strict_response_validation=True)


def script(order: str) -> dict[str, str]:
    return {"X-Script": order}


# -- OpenAI's client


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_chat(encoding: str) -> None:
    async with running_llm() as (_, url), openai_client(url) as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=MESSAGE, extra_headers=script(f"encoding={encoding}")
        )
        assert answer.choices[0].message.content == TEXT
        assert answer.choices[0].finish_reason == "stop"
        assert answer.model == "gpt-5-mini-2025-08-07"
        usage = answer.usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (CHAT.input, CHAT.output)
        assert usage.total_tokens == CHAT.input + CHAT.output
        assert usage.prompt_tokens_details is not None
        assert usage.completion_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == CHAT.cache_read
        assert usage.completion_tokens_details.reasoning_tokens == CHAT.reasoning


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("wants_usage", [True, False])
async def test_chat_streamed_tells_its_usage_only_when_asked(encoding: str, wants_usage: bool) -> None:
    async with running_llm() as (_, url), openai_client(url) as client:
        options: Any = {"stream_options": {"include_usage": True}} if wants_usage else {}
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGE, stream=True, extra_headers=script(f"encoding={encoding}"), **options
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
        usages = [chunk.usage for chunk in chunks if chunk.usage]
        if not wants_usage:
            assert usages == []
            return
        assert chunks[-1].choices == []
        assert [(u.prompt_tokens, u.completion_tokens) for u in usages] == [(CHAT.input, CHAT.output)]


async def test_legacy_completions() -> None:
    async with running_llm() as (_, url), openai_client(url) as client:
        answer = await client.completions.create(model=MODEL, prompt="the sea")
        assert answer.choices[0].text == TEXT
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (COMPLETIONS.input, COMPLETIONS.output)
    # Not strict: the client's type for a legacy chunk wants a reason in each, and the service sends null.
    async with running_llm() as (_, url), openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client:
        stream = await client.completions.create(
            model=MODEL, prompt="the sea", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == TEXT
        assert chunks[-2].choices[0].finish_reason == "length"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == COMPLETIONS.output


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_responses(encoding: str) -> None:
    async with running_llm() as (_, url), openai_client(url) as client:
        headers = script(f"encoding={encoding}")
        answer = await client.responses.create(model=MODEL, input="the sea", extra_headers=headers)
        assert answer.output_text == TEXT
        assert answer.usage is not None
        assert (answer.usage.input_tokens, answer.usage.output_tokens) == (RESPONSES.input, RESPONSES.output)
        assert answer.usage.input_tokens_details.cached_tokens == RESPONSES.cache_read
        assert answer.usage.output_tokens_details.reasoning_tokens == RESPONSES.reasoning
        stream = await client.responses.create(model=MODEL, input="the sea", stream=True, extra_headers=headers)
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == TEXT
        last = events[-1]
        assert last.type == "response.completed"
        assert last.response.output_text == TEXT
        assert last.response.usage == answer.usage
        async with client.responses.stream(model=MODEL, input="the sea", extra_headers=headers) as helper:
            assert (await helper.get_final_response()).output_text == TEXT


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
@pytest.mark.parametrize(("given", "count"), [("the sea", 1), (["the sea", "the sky"], 2), ([1, 2, 3], 1)])
async def test_embeddings(encoding_format: Any, given: Any, count: int) -> None:
    # Not strict: the client asks for base64 by itself, decodes it by itself, and validates before it does.
    async with running_llm() as (_, url), openai.AsyncOpenAI(api_key="k", base_url=f"{url}/v1") as client:
        options = {} if encoding_format is None else {"encoding_format": encoding_format}
        answer = await client.embeddings.create(model="text-embedding-3-small", input=given, **options)
        assert [row.index for row in answer.data] == list(range(count))
        if encoding_format != "base64":
            assert answer.data[0].embedding == pytest.approx([0.0123, -0.0456, 0.0789])
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == EMBEDDINGS.input


async def test_openais_errors() -> None:
    async with running_llm() as (_, url), openai_client(url) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=MESSAGE, extra_headers=script("status=429, retry_after_s=3")
            )
        assert caught.value.response.headers["retry-after"] == "3"
        assert caught.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.InternalServerError):
            await client.responses.create(model=MODEL, input="x", extra_headers=script("status=500"))
        with pytest.raises(openai.BadRequestError, match="expected name=value"):
            await client.responses.create(model=MODEL, input="x", extra_headers=script("explode"))
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGE, stream=True, extra_headers=script("end=error, after=2")
        )
        texts = []
        with pytest.raises(openai.APIError, match="The server had an error"):
            async for chunk in stream:
                texts.append(chunk.choices[0].delta.content or "")
        assert "".join(texts) == Script(pieces=2).text()
        failing = await client.responses.create(
            model=MODEL, input="x", stream=True, extra_headers=script("end=error, after=2")
        )
        last = [event async for event in failing][-1]
        assert last.type == "response.failed"
        assert last.response.error is not None
        assert last.response.usage is None


# -- Anthropic's client


@pytest.mark.parametrize("encoding", ENCODINGS)
async def test_messages(encoding: str) -> None:
    async with running_llm() as (_, url), anthropic_client(url) as client:
        headers = script(f"encoding={encoding}")
        answer = await client.messages.create(model=CLAUDE, max_tokens=99, messages=MESSAGE, extra_headers=headers)
        [block] = answer.content
        assert block.type == "text"
        assert block.text == TEXT
        async with client.messages.stream(
            model=CLAUDE, max_tokens=99, messages=MESSAGE, extra_headers=headers
        ) as stream:
            assert "".join([piece async for piece in stream.text_stream]) == TEXT
            streamed = await stream.get_final_message()
        for usage in (answer.usage, streamed.usage):
            parts = (usage.input_tokens, usage.cache_read_input_tokens or 0, usage.cache_creation_input_tokens or 0)
            assert sum(parts) == MESSAGES.input
            assert parts[1:] == (MESSAGES.cache_read, MESSAGES.cache_write)
            assert usage.output_tokens == MESSAGES.output
            assert usage.output_tokens_details is not None
            assert usage.output_tokens_details.thinking_tokens == MESSAGES.reasoning
        counted = await client.messages.count_tokens(model=CLAUDE, messages=MESSAGE)
        assert counted.input_tokens == MESSAGES.input


async def test_anthropics_errors() -> None:
    async with running_llm() as (_, url), anthropic_client(url) as client:
        with pytest.raises(anthropic.RateLimitError):
            await client.messages.create(
                model=CLAUDE, max_tokens=9, messages=MESSAGE, extra_headers=script("status=429")
            )
        stream = await client.messages.create(
            model=CLAUDE, max_tokens=9, messages=MESSAGE, stream=True, extra_headers=script("end=error")
        )
        with pytest.raises(anthropic.APIStatusError, match="Overloaded"):
            _ = [event async for event in stream]


# -- what no client of a vendor shows


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_bad_calls_are_refused_in_the_vendors_shape(path: str) -> None:
    auth = {"Authorization": "Bearer k", "anthropic-version": "2023-06-01"}
    cases: list[tuple[dict[str, str], bytes, int]] = [
        (auth, b"{", 400),
        (auth, b"[]", 400),
        (auth, b"{}", 400),
        (auth, b'{"model": "m"}', 400),
        ({}, b'{"model": "m", "messages": []}', 401),
        (auth, b'{"model": "m", "messages": []}', 200),
    ]
    async with running_llm() as (llm, url), aiohttp.ClientSession(url) as session:
        for headers, body, status in cases:
            async with session.post(path, data=body, headers=headers) as answer:
                assert answer.status == status
                told = await answer.json()
            assert status == 200 or told["error"]["message"]
        assert len(llm.seen) == len(cases)
        assert llm.seen[-1].body == cases[-1][1]
        assert (b"Authorization", b"Bearer k") in llm.seen[-1].headers


async def test_a_cut_stream_breaks_the_connection() -> None:
    async with running_llm() as (_, url), aiohttp.ClientSession(url) as session:
        body = {"model": MODEL, "messages": [], "stream": True}
        headers = {"Authorization": "Bearer k", **script("pieces=9, end=cut, after=4")}
        async with session.post("/v1/chat/completions", json=body, headers=headers) as answer:
            received = b""
            with pytest.raises(aiohttp.ClientPayloadError):
                async for chunk in answer.content.iter_any():
                    received += chunk
        assert received.count(b'"delta":{"content"') == 4
        assert b"[DONE]" not in received


async def test_pieces_leave_one_by_one() -> None:
    """The first piece is here while the stream is still held up, also under gzip."""
    async with running_llm(Script(delay_s=30)) as (llm, url), aiohttp.ClientSession(url) as session:
        for encoding in ENCODINGS:
            body = {"model": CLAUDE, "messages": [], "stream": True}
            headers = {"x-api-key": "k", "anthropic-version": "2023-06-01", **script(f"encoding={encoding}")}
            async with asyncio.timeout(10), session.post("/v1/messages", json=body, headers=headers) as answer:
                assert answer.headers.get("Content-Encoding", "identity") == encoding
                first = await answer.content.readany()
                assert json.loads(first.split(b"data: ")[1])["type"] == "message_start"
        async with asyncio.timeout(10):
            await llm.aclose()


def test_orders() -> None:
    default = Script(pieces=5)
    assert parse("", default) == default
    order = "pieces=2,delay_ms=5, head_delay_ms=10 ,status=429,retry_after_s=1,encoding=gzip,end=cut,after=1"
    read = parse(order, default)
    assert (read.pieces, read.delay_s, read.head_delay_s, read.status) == (2, 0.005, 0.01, 429)
    assert (read.retry_after_s, read.encoding, read.end, read.after) == (1, "gzip", End.CUT, 1)
    assert read.texts() == [Script(pieces=1).text()]


@pytest.mark.parametrize(
    "order",
    [
        "pieces", "pieces=-1", "pieces=1.5", f"pieces={PIECES_MAX + 1}", "delay_ms=x", "delay_ms=nan",
        f"delay_ms={DELAY_S_MAX * 1000 + 1}", "end=never", "encoding=br", "model=x", "=", "pieces=²",
    ],
)  # fmt: skip
def test_orders_that_cannot_be_read(order: str) -> None:
    with pytest.raises(ScriptError, match="expected"):
        parse(order, Script())


async def test_closes_twice_and_frees_its_port() -> None:
    llm = ScriptedLLM()
    url = await llm.start()
    await llm.aclose()
    await llm.aclose()
    again = ScriptedLLM()
    assert await again.start(port=int(url.rpartition(":")[2])) == url
    await again.aclose()
