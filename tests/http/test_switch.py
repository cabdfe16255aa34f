"""Protocol switches: WebSocket and others go through as bytes, and nothing behind a declined one is lost silently."""

from __future__ import annotations

import asyncio
import os

import pytest
import websockets
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
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.typing import Subprotocol

ASK = b"GET /ws HTTP/1.1\r\nHost: me\r\nConnection: keep-alive, Upgrade\r\nUpgrade: %b\r\n\r\n"
CHAT_1, CHAT_2 = Subprotocol("chat.v1"), Subprotocol("chat.v2")
NO_HTTP = b"HTTP/1.1 200 no http any more\r\n\r\n"
AGREE = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: %b\r\nConnection: Upgrade\r\nX-P: 1\r\n\r\n"


@pytest.mark.parametrize("protocol", [b"websocket", b"spdy/9"])
@on_both_loops
async def test_a_tunnel_passes_bytes(protocol: bytes) -> None:
    async def script(conversation: Conversation) -> None:
        head = await conversation.head()
        assert field_of(head, b"Upgrade") == protocol
        assert field_of(head, b"Connection") == b"Upgrade"
        await conversation.send(AGREE % protocol + b"\x00first")  # in one piece with the 101
        assert await conversation.exactly(6) == b"\xffhello"
        await conversation.send(NO_HTTP)
        assert await conversation.exactly(200_000) == b"z" * 200_000
        await conversation.send(b"last words")

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(ASK % protocol)
        assert await client.head() == AGREE % protocol
        assert await client.exactly(6) == b"\x00first"
        await client.send(b"\xffhello")
        assert await client.until(b"\r\n\r\n") == NO_HTTP
        assert hop.recorder.records == []
        await client.send(b"z" * 200_000)
        assert await client.rest() == b"last words"
        exchange = await hop.recorder.ended()
        assert (exchange.status, exchange.outcome) == (101, Outcome.COMPLETE)
        assert (exchange.request_bytes, exchange.response_bytes) == (200_006, 16 + len(NO_HTTP))


@on_both_loops
async def test_before_a_stop_a_switch_is_passed_on_as_ever() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"websocket")
        assert await conversation.exactly(5) == b"hello"
        await conversation.send(b"last words")

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        hop.proxy.leave()
        client = await hop.client()
        await client.send(ASK % b"websocket")
        assert await client.head() == AGREE % b"websocket"
        await client.send(b"hello")
        assert await client.rest() == b"last words"


@on_both_loops
async def test_bytes_sent_ahead_of_the_101_are_not_lost() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        assert await conversation.silent()  # they are nobody's until the upstream agrees
        await conversation.send(AGREE % b"websocket")
        assert await conversation.exactly(10) == b"aheadlater"

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(ASK % b"websocket" + b"ahead")
        await client.send(b"later")
        await client.head()
        assert await client.rest() == b""


@on_both_loops
async def test_behind_a_declined_websocket_comes_http() -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(b"no", status=b"426 No"), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(ASK % b"websocket" + b"GET /next HTTP/1.1\r\nHost: me\r\n\r\n")
        assert (await client.message())[0].startswith(b"HTTP/1.1 426 No")
        assert (await client.message())[0].startswith(b"HTTP/1.1 426 No")
        await client.send(b"GET /third HTTP/1.1\r\nHost: me\r\n\r\n")
        await client.message()
        assert [request.split(b" ")[1] for request in seen] == [b"/ws", b"/next", b"/third"]


@pytest.mark.parametrize("behind", [b"", b"GET /next HTTP/1.1\r\nHost: me\r\n\r\n"])
@pytest.mark.parametrize("protocol", [b"h2c", b"spdy/9"])
@on_both_loops
async def test_behind_another_declined_switch_comes_http_too(protocol: bytes, behind: bytes) -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(b"plain"), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(ASK % protocol + behind)
        for _ in range(2 if behind else 1):
            head, body = await client.message()
            assert body == b"plain"
            assert field_of(head, b"Connection") is None
        await client.send(b"GET /third HTTP/1.1\r\nHost: me\r\n\r\n")
        await client.message()
        assert [request.split(b" ")[1] for request in seen] == [b"/ws", *([b"/next"] if behind else []), b"/third"]
        # HTTP/2 would hide its calls from the record
        assert field_of(seen[0], b"Upgrade") == (None if protocol == b"h2c" else protocol)


OFFERS = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


@pytest.mark.parametrize(
    ("method", "protocol"),
    [(b"POST", b"h2c"), (b"PUT", b"websocket"), (b"PATCH", b"TLS/1.3"), (b"POST", b"foo/2, h2c")],
)
@pytest.mark.parametrize("coding", ["sized", "chunked", "expect"])
@pytest.mark.parametrize("size", [10, 70_000, 1_000_000])
@on_both_loops
async def test_an_upload_that_offers_another_protocol(method: bytes, protocol: bytes, coding: str, size: int) -> None:
    """As Java's client and `curl --http2` send it: all of it arrives, and the connection serves on."""
    seen: list[bytes] = []

    async def script(conversation: Conversation) -> None:
        while True:
            head = await conversation.head()
            if field_of(head, b"Expect") is not None:
                await conversation.send(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await conversation.body_of(head)
            seen.append(dechunk(body) if field_of(head, b"Transfer-Encoding") else body)
            await conversation.send(reply(b"got %d" % len(seen[-1])))

    body = b"GET / HTTP/1.1\r\n\r\n" * (size // 18 + 1)
    body = body[:size]
    fields = OFFERS % protocol
    if coding == "chunked":
        fields += b"Transfer-Encoding: chunked\r\n"
        wire = b"%x\r\n%b\r\n0\r\n\r\n" % (size, body)
    else:
        fields += b"Content-Length: %d\r\n" % size
        wire = body
    if coding == "expect":
        fields += b"Expect: 100-continue\r\n"
    head = b"%b /up HTTP/1.1\r\nHost: me\r\n%b\r\n" % (method, fields)
    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(head)
        if coding == "expect":
            assert (await client.head()).startswith(b"HTTP/1.1 100 ")
        await asyncio.sleep(0.01)  # the body in a read of its own
        await client.send(wire)
        assert (await client.message())[1] == b"got %d" % size
        await client.send(head + wire) if coding != "expect" else await client.send(head)
        if coding == "expect":
            await client.head()
            await client.send(wire)
        assert (await client.message())[1] == b"got %d" % size
        assert seen == [body, body]
        exchange = await hop.recorder.ended(2)
        assert (exchange.status, exchange.request_bytes) == (200, size)


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("chunked", [False, True])
@on_both_loops
async def test_a_tunnel_behind_a_body(pieces: int, chunked: bool) -> None:
    """Docker's `exec` asks for `tcp` in a POST with a JSON body."""
    body = b'{"Detach": false}'

    async def script(conversation: Conversation) -> None:
        head = await conversation.head()
        assert field_of(head, b"Upgrade") == b"tcp"
        came = await conversation.body_of(head)
        assert (dechunk(came) if chunked else came) == body
        await conversation.send(AGREE % b"tcp" + b"welcome")
        assert await conversation.exactly(5) == b"ls\r\n\n"
        await conversation.send(b"bye")

    fields = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: %d\r\n" % len(body)
    wire = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    head = b"POST /exec HTTP/1.1\r\nHost: me\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n" + fields + b"\r\n"
    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        if pieces == 1:
            await client.send(head + wire)
        elif pieces == 2:
            await client.send(head)
            await asyncio.sleep(0.01)
            await client.send(wire)
        else:
            await client.send(head + wire[:3])
            await asyncio.sleep(0.01)
            await client.send(wire[3:])
        await client.head()
        assert await client.exactly(7) == b"welcome"
        await client.send(b"ls\r\n\n")
        assert await client.rest() == b"bye"
        exchange = await hop.recorder.ended()
        assert (exchange.status, exchange.request_bytes, exchange.response_bytes) == (101, len(body) + 5, 10)


@on_both_loops
async def test_a_tunnel_ends_with_either_side() -> None:
    async def script(conversation: Conversation) -> None:
        head = await conversation.head()
        await conversation.send(AGREE % b"websocket")
        if b"/rude" in head:
            await conversation.until(b"x")
            conversation.reset()
        else:
            assert await conversation.rest() == (b"" if b"/left" in head else b"bye")

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(ASK % b"websocket")
        await client.head()
        await client.send(b"bye")
        await client.close()
        assert (await hop.recorder.ended()).outcome is Outcome.COMPLETE

        client = await hop.client()
        await client.send((ASK % b"websocket").replace(b"/ws", b"/rude"))
        await client.head()
        await client.send(b"x")
        await client.rest()
        assert (await hop.recorder.ended(2)).outcome is Outcome.UPSTREAM_BROKE

        client = await hop.client()
        await client.send((ASK % b"websocket").replace(b"/ws", b"/left"))
        await client.head()
        client.reset()
        assert (await hop.recorder.ended(3)).outcome is Outcome.CLIENT_LEFT


@on_both_loops
async def test_a_silent_tunnel_is_cut() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"websocket")
        await asyncio.Event().wait()

    async with RawUpstream(script) as upstream, Hop(upstream.url, idle_timeout_s=0.1) as hop:
        client = await hop.client()
        await client.send(ASK % b"websocket")
        await client.head()
        with pytest.raises(ConnectionResetError):
            await client.rest()
        assert (await hop.recorder.ended()).outcome is Outcome.UPSTREAM_TIMEOUT


@on_both_loops
async def test_an_http_1_0_client_cannot_switch() -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send((ASK % b"websocket").replace(b"HTTP/1.1", b"HTTP/1.0"))
        await client.message()
        assert field_of(seen[0], b"Upgrade") is None


@on_both_loops
async def test_websocket_with_real_peers() -> None:
    """Text, binary, fragments, ping, sub-protocol, close code, and messages of 16 MiB."""

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            if message == "close":
                await connection.close(4321, "as asked")
                return
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, subprotocols=[CHAT_2], max_size=2**25, compression=None) as server:
        port = server.sockets[0].getsockname()[1]
        async with Hop(f"http://127.0.0.1:{port}") as hop:
            async with connect(
                f"ws://127.0.0.1:{hop.port}/ws",
                subprotocols=[CHAT_1, CHAT_2],
                max_size=2**25,
                compression=None,
            ) as client:
                assert client.subprotocol == "chat.v2"
                await client.send("text é")
                assert await client.recv() == "text é"
                await client.send([b"frag", b"ments"])
                assert await client.recv() == b"fragments"
                await (await client.ping(b"ping"))
                big = os.urandom(2**24)
                await client.send(big)
                assert await client.recv() == big
                await client.send("close")
                with pytest.raises(websockets.ConnectionClosedError):
                    await client.recv()
                assert (client.close_code, client.close_reason) == (4321, "as asked")
            exchange = await hop.recorder.ended()
            assert (exchange.status, exchange.outcome) == (101, Outcome.COMPLETE)
            assert exchange.request_bytes > 2**24
            await until(lambda: hop.counts.connections == 0)
