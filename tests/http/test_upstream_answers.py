"""What an upstream may send: odd answers that clients read are passed on in good form, endless ones have an end."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, answering, field_of, on_both_loops, until

from sidecar.proxy.response_parser import HEAD_BYTES_MAX

GET = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n"
POST = b"POST /model HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"HTTP/1.1 200 OK\nContent-Length: 2\nX: y\n\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\nok", b"ok"),
        (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", b""),
        (CHUNKED + b"3   \r\nay!\r\n0   \r\n\r\n", b"2\r\nok\r\n3\r\nay!\r\n0\r\n\r\n"),
    ],
    ids=["lf", "twice", "list", "204", "padded"],
)
@on_both_loops
async def test_what_clients_read_is_passed_on_in_good_form(answer: bytes, body: bytes) -> None:
    async with RawUpstream(answering(answer)) as upstream, Hop(upstream.url) as hop:
        for _ in range(2):
            head, got = await hop.call(GET)
            assert head.startswith(answer[:12])
            assert got == body
            assert b"\n" not in head.replace(b"\r\n", b"")
            if b"Content-Length" in answer:
                assert field_of(head, b"Content-Length") == b"%d" % len(body)
        assert upstream.connections == 1  # such an upstream's connections are as good as others
        assert (await hop.recorder.ended(2)).outcome is Outcome.COMPLETE


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nX-Foo(1): b\r\nContent-Length: 2\r\n\r\nok", "invalid header token"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", "more than one length"),
        (b"HTTP/1.1 099 Odd\r\nContent-Length: 2\r\n\r\nok", "the status is not one of HTTP's"),
    ],
    ids=["name", "lengths", "099"],
)
@on_both_loops
async def test_what_they_differ_about_is_refused_by_name(answer: bytes, why: str) -> None:
    async with RawUpstream(answering(answer)) as upstream, Hop(upstream.url) as hop:
        head, body = await hop.call(GET)
        assert head.startswith(b"HTTP/1.1 502 ")
        assert json.loads(body)["error"]["message"] == "the upstream gave no valid response"
        exchange = await hop.recorder.ended()
        assert why in (exchange.error or "")
        assert (exchange.error or "").endswith(" (not_http)")


@pytest.mark.parametrize(
    ("first", "again"),
    [(b"0\r\n", b"X: v\r\n"), (b"0\r\nX: ", b"v" * 999), (b"2;x=", b"e" * 999)],
    ids=["fields", "one field", "extension"],
)
@pytest.mark.parametrize("stays", [True, False], ids=["read", "drained"])
@on_both_loops
async def test_what_comes_behind_the_head_has_an_end(first: bytes, again: bytes, stays: bool) -> None:
    sent = 0
    go = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        nonlocal sent
        await conversation.message()
        await conversation.send(CHUNKED)
        await go.wait()
        await conversation.send(first)
        while True:  # until it is cut
            await conversation.send(again * 64)
            sent += len(again) * 64

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(POST)
        await client.until(b"2\r\nok\r\n")
        if not stays:
            client.reset()
            await until(lambda: hop.counts.drains == 1)
        go.set()
        if stays:
            assert b"0\r\n\r\n" not in await client.rest()  # a cut, not an end
        exchange = await hop.recorder.ended()
        assert exchange.outcome is (Outcome.UPSTREAM_BROKE if stays else Outcome.CLIENT_LEFT)
        if stays:
            error = exchange.error or ""
            assert "of the answer" in error
            assert "trailers" in error
        await until(lambda: upstream.open[0].writer.is_closing())
    assert sent < HEAD_BYTES_MAX + 20_000_000  # what sockets buffer, not what is kept
