"""Back-pressure: whoever is slow slows the other side down, and nothing piles up in between."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import pytest
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, on_both_loops, reply, until

SIZE = 48 * 2**20
HELD_MAX = 6 * 2**20  # kernel buffers grow to a few MiB each; ours stay below one
PIECE = b"x" * 2**16


async def _pour(conversation: Conversation, size: int, poured: list[int]) -> None:
    """Send as fast as the other side takes it, counting what it took."""
    conversation.writer.transport.set_write_buffer_limits(high=2**16)
    while poured[0] < size:
        conversation.writer.write(PIECE)
        poured[0] += len(PIECE)
        await conversation.writer.drain()


async def _stands_still(poured: list[int]) -> int:
    """Wait until no more is taken."""
    last = -1
    while last != poured[0]:
        last = poured[0]
        await asyncio.sleep(0.1)
    return last


@pytest.mark.parametrize("framing", [b"Content-Length: %d" % SIZE, b"Connection: close"])
@on_both_loops
async def test_a_slow_reader_slows_the_upstream_down(framing: bytes) -> None:
    poured = [0]

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        await _pour(conversation, SIZE, poured)

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client(receive_buffer=2**15)
        tracemalloc.start()
        try:
            await client.send(b"GET / HTTP/1.1\r\nHost: me\r\n\r\n")
            await until(lambda: poured[0] > 0)
            assert await _stands_still(poured) < SIZE // 2
            assert tracemalloc.get_traced_memory()[1] < HELD_MAX
            head = await client.head()
            got = len(client.seen)
            client.seen = b""
            while got < SIZE:
                async with asyncio.timeout(10):
                    piece = await client.reader.read(2**18)
                assert piece
                got += len(piece)
            assert tracemalloc.get_traced_memory()[1] < HELD_MAX
        finally:
            tracemalloc.stop()
        assert head.startswith(b"HTTP/1.1 200")
        exchange = await hop.recorder.ended()
        assert (exchange.response_bytes, exchange.outcome) == (SIZE, Outcome.COMPLETE)


@pytest.mark.parametrize("chunked", [False, True])
@on_both_loops
async def test_a_slow_upstream_slows_the_upload_down(chunked: bool) -> None:
    poured = [0]
    go = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        head = await conversation.head()
        await go.wait()
        if chunked:
            size = 0
            while count := int((await conversation.until(b"\r\n")).strip(), 16):
                size += len(await conversation.exactly(count + 2)) - 2
            await conversation.until(b"\r\n")
        else:
            size = len(await conversation.body_of(head))
        await conversation.send(reply(b"%d" % size))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        size = SIZE // 2
        if chunked:
            await client.send(b"POST / HTTP/1.1\r\nHost: me\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % size)
        else:
            await client.send(b"POST / HTTP/1.1\r\nHost: me\r\nContent-Length: %d\r\n\r\n" % size)
        upload = asyncio.ensure_future(_pour(client, size, poured))
        await until(lambda: poured[0] > 0)
        assert await _stands_still(poured) < size
        call: Any = next(iter(hop.proxy._hop.calls))  # type: ignore[union-attr]
        assert sum(map(len, call.body._payload._buffer)) < 2**20
        go.set()
        await upload
        if chunked:
            await client.send(b"\r\n0\r\n\r\n")
        assert (await client.message())[1] == b"%d" % size
        assert (await hop.recorder.ended()).request_bytes == size


@on_both_loops
async def test_a_client_that_stops_reading_is_cut_in_the_end() -> None:
    poured = [0]

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        await _pour(conversation, SIZE, poured)

    async with RawUpstream(script) as upstream, Hop(upstream.url, idle_timeout_s=0.2) as hop:
        client = await hop.client(receive_buffer=2**15)
        await client.send(b"GET / HTTP/1.1\r\nHost: me\r\n\r\n")
        exchange = await hop.recorder.ended()
        assert exchange.outcome is Outcome.CLIENT_LEFT
        assert hop.counts.limits == ["idle_timeout"]
        with pytest.raises(ConnectionResetError):
            while await client.reader.read(2**18):
                pass


@on_both_loops
async def test_writes_to_a_closed_connection_do_no_harm() -> None:
    """uvloop raises RuntimeError there, and inside a parser's callback that would kill the upstream's connection."""
    async with RawUpstream(_answer_when_told(go := asyncio.Event())) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"POST /model HTTP/1.1\r\nHost: me\r\nContent-Length: 1\r\n\r\nx")
        await until(lambda: upstream.connections == 1)
        await hop.recorder.let_in()
        server_side = next(iter(hop.proxy._clients.open))  # type: ignore[union-attr]
        call: Any = next(iter(hop.proxy._hop.calls))  # type: ignore[union-attr]
        await until(lambda: call.connection is not None)  # the upstream may see it before the hop does
        connection = call.connection
        assert connection is not None
        assert server_side.transport is not None
        server_side.transport.abort()
        server_side.send(b"nobody hears this")
        await until(lambda: hop.counts.connections == 0)
        server_side.send(b"nor this")
        go.set()
        await hop.recorder.ended()
        connection.write(b"nor this")


def _answer_when_told(go: asyncio.Event):  # type: ignore[no-untyped-def]
    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await go.wait()
        await conversation.send(reply(b"<usage>"))

    return script


def test_an_upstream_connection_is_falsy() -> None:
    """aiohttp's class has a length, so `if connection:` never fires; ours is always compared with None."""
    from sidecar.proxy.upstream import UpstreamConnection

    async def main() -> None:
        assert not UpstreamConnection(None, asyncio.get_running_loop())  # type: ignore[arg-type]

    asyncio.run(main())
