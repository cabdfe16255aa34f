"""Large coded answers: read to their end, a step a turn, whoever leaves meanwhile."""

from __future__ import annotations

import asyncio
import gzip

import pytest
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, on_both_loops, until

from sidecar.usage.readers import UsageTaps
from sidecar.usage.response_reader import ResponseReader

ASK = b"POST /v1/embeddings HTTP/1.1\r\nHost: me\r\nContent-Length: 13\r\n\r\n" + b'{"model":"m"}'
USAGE = b'"usage":{"prompt_tokens":8,"total_tokens":8}}'
LARGE = gzip.compress(b'{"object":"list","data":"' + b"x" * (30 << 20) + b'",' + USAGE)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def backlogs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether anything was left to be decoded at once, at each end of a reading."""
    found: list[bool] = []
    finish = ResponseReader.finish

    def note(tap: ResponseReader, whole: bool) -> object:
        found.append(tap.behind)
        return finish(tap, whole)

    monkeypatch.setattr(ResponseReader, "finish", note)
    return found


async def script(conversation: Conversation) -> None:
    while True:
        await conversation.message()
        await conversation.send(HEAD % len(LARGE) + LARGE)


@on_both_loops
async def test_the_usage_at_the_end_is_found_and_the_loop_goes_on(backlogs: list[bool]) -> None:
    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        client = await hop.client()
        for number in (1, 2):
            await client.send(ASK)
            before = turns
            head, body = await client.message()
            assert head == HEAD % len(LARGE)
            assert body == LARGE
            assert turns - before > 20
            exchange = await hop.recorder.ended(number)
            assert exchange.outcome is Outcome.COMPLETE
            assert exchange.usage is not None
            assert (exchange.usage.usage_state, exchange.usage.input_tokens) == ("final", 8)
        counting.cancel()
        assert upstream.connections == 1
    assert backlogs == [False, False]


@pytest.mark.parametrize("sent", [0, 1000, len(LARGE) - 1])
@on_both_loops
async def test_the_client_leaves_and_the_usage_is_found_all_the_same(sent: int, backlogs: list[bool]) -> None:
    go_on = asyncio.Event()

    async def halting(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(HEAD % len(LARGE) + LARGE[:sent])
        await go_on.wait()
        await conversation.send(LARGE[sent:])

    async with RawUpstream(halting) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        await client.send(ASK)
        await client.head()
        await client.close()
        await until(lambda: hop.counts.drains == 1)
        go_on.set()
        exchange = await hop.recorder.ended()
        assert exchange.outcome is Outcome.CLIENT_LEFT
        assert exchange.usage is not None
        assert exchange.usage.input_tokens == 8
    assert backlogs == [False]


@on_both_loops
async def test_the_client_leaves_while_the_reader_catches_up(backlogs: list[bool]) -> None:
    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        await client.send(ASK)
        await client.until(LARGE[:1000])
        client.reset()
        exchange = await hop.recorder.ended()
        assert exchange.outcome in (Outcome.CLIENT_LEFT, Outcome.COMPLETE)
        assert exchange.usage is not None
        assert exchange.usage.input_tokens == 8
    assert backlogs == [False]
