"""What is ambiguous, malformed or too large never reaches the upstream, and no answer echoes it."""

from __future__ import annotations

import json
import logging

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

H = b"Host: me\r\n"
SECRET = b"sk-very-secret"

MALFORMED = {
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
    "http/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    "http/1.2": (b"GET / HTTP/1.2\r\n" + H + b"\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\nX: 1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "length and chunks": (
        b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks and length": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "length list": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 3, 3\r\n\r\nabc", 400),
    "signed length": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: +3\r\n\r\nabc", 400),
    "hex length": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 0x3\r\n\r\nabc", 400),
    "huge length": (b"POST / HTTP/1.1\r\n" + H + b"Content-Length: 99999999999999999999999\r\n\r\nabc", 400),
    "unknown coding": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", 400),
    "identity": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: identity\r\n\r\n", 400),
    "chunked twice": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "bare lf": (b"GET / HTTP/1.1\n" + H + b"\r\n", 400),
    "bare lf in fields": (b"GET / HTTP/1.1\r\nHost: me\nX: 1\r\n\r\n", 400),
    "bare cr": (b"GET / HTTP/1.1\r\n" + H + b"X: a\rb\r\n\r\n", 400),
    "nul": (b"GET / HTTP/1.1\r\n" + H + b"X: a\x00b\r\n\r\n", 400),
    "control": (b"GET / HTTP/1.1\r\n" + H + b"X: a\x01b\r\n\r\n", 400),
    "space before colon": (b"GET / HTTP/1.1\r\n" + H + b"X : 1\r\n\r\n", 400),
    "space in name": (b"GET / HTTP/1.1\r\n" + H + b"X y: 1\r\n\r\n", 400),
    "obs-fold": (b"GET / HTTP/1.1\r\n" + H + b"X: 1\r\n 2\r\n\r\n", 400),
    "raw utf-8 target": ("GET /é HTTP/1.1\r\n".encode() + H + b"\r\n", 400),
    "unknown method": (b"BREW /pot HTTP/1.1\r\n" + H + b"\r\n", 501),
    "long target": (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n" + H + b"\r\n", 414),
    "long field": (b"GET / HTTP/1.1\r\n" + H + b"X: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    "many fields": (b"GET / HTTP/1.1\r\n" + H + b"X: 1\r\n" * 200 + b"\r\n", 431),
    "large head": (b"GET / HTTP/1.1\r\n" + H + (b"X: " + b"a" * 1000 + b"\r\n") * 80 + b"\r\n", 431),
    "bad chunk size": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", 400),
    "negative chunk": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n-3\r\nabc\r\n0\r\n\r\n", 400),
    "chunk overflow": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n" + b"F" * 20 + b"\r\n", 400),
    "chunk without cr": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", 400),
    "chunk too long": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
@on_both_loops
async def test_malformed_requests(name: str, caplog: pytest.LogCaptureFixture) -> None:
    request, status = MALFORMED[name]
    request = request.replace(b"\r\nHost:", b"\r\nAuthorization: " + SECRET + b"\r\nHost:", 1)
    seen: list[bytes] = []
    caplog.set_level(logging.DEBUG)
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        answer = await hop.last(request)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        head, _, body = answer.partition(b"\r\n\r\n")
        assert json.loads(body)["error"]["type"]
        assert field_of(head + b"\r\n\r\n", b"Connection") == b"close"
        assert SECRET not in answer
        assert SECRET.decode() not in caplog.text
        assert b"aaaa" not in answer
        assert seen == []
        assert upstream.connections == 0
        assert len(hop.counts.rejected) == 1


REFUSED = {
    "gzip, chunked": (b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "gzip and chunked": (
        b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks in http/1.0": (b"POST / HTTP/1.0\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "http/2.0": (b"GET / HTTP/2.0\r\n" + H + b"\r\n", 400),
    "http/0.9": (b"GET / HTTP/0.9\r\n" + H + b"\r\n", 400),
    "blank in host": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "path in host": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "user in host": (b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", 400),
    "connect": (b"CONNECT me:443 HTTP/1.1\r\n" + H + b"\r\n", 501),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@on_both_loops
async def test_what_the_parser_lets_through_is_refused_and_recorded(name: str) -> None:
    request, status = REFUSED[name]
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        answer = await hop.last(request)
        assert answer.startswith(b"HTTP/1.1 %d " % status), answer
        assert upstream.connections == 0
        if name != "gzip and chunked":  # aiohttp refuses the repeated field by itself
            exchange = await hop.recorder.ended()
            assert (exchange.outcome, exchange.status) == (Outcome.REFUSED, status)


@on_both_loops
async def test_garbage_behind_a_request_is_answered_after_it() -> None:
    async with RawUpstream(answering(reply(b"fine"))) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"GET / HTTP/1.1\r\n" + H + b"\r\n")
        assert (await client.message())[1] == b"fine"
        await client.send(b"\x00\x01\x02 / HTTP/1.1\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 400 ")


@on_both_loops
async def test_a_bad_chunk_late_in_a_body_cuts_the_upload() -> None:
    """aiohttp's parser raises, and never tells the one who reads the body."""
    came: list[bool] = []
    cut: list[bool] = []

    async def script(conversation: Conversation) -> None:
        head = await conversation.head()
        assert await conversation.until(b"abc\r\n")
        came.append(True)
        if b"/answered" in head:
            await conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nearly")
        with pytest.raises((EOFError, ConnectionError)):
            await conversation.until(b"0\r\n\r\n")
        cut.append(True)

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"POST / HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await until(lambda: came == [True])
        await hop.recorder.let_in()
        await client.send(b"zz" + SECRET + b"\r\n")
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert SECRET not in answer
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.REFUSED, 400)
        await until(lambda: cut == [True])

        client = await hop.client()  # the same with an answer already on its way: it is cut
        await client.send(b"POST /answered HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await client.until(b"early")
        await client.send(b"zz\r\n")
        with pytest.raises(ConnectionResetError):
            await client.rest()
        await until(lambda: len(cut) == 2)
        assert (await hop.recorder.ended(2)).outcome is Outcome.REFUSED


CHUNKED = b"POST /chunked HTTP/1.1\r\n" + H + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"
NEXT = b"GET /next HTTP/1.1\r\n" + H + b"\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [CHUNKED + b"0\r\nAuthorization: stolen\r\n\r\n", NEXT],
        [CHUNKED + b"0\r\nAuthorization: stolen\r\n\r\n" + NEXT],
        [CHUNKED, b"0\r\nAuthorization: stolen\r\n\r\n" + NEXT],
        [CHUNKED + b"0\r\nAuthorization: stolen\r\n", b"\r\n", NEXT],
        [CHUNKED + b"0\r\nAuthorization: stolen\r\n", b"\r\n" + NEXT],
        [CHUNKED + b"0\r\nX: ", b"0\r\n\r\n", NEXT],
        [CHUNKED + b"0;x=y\r\nAuthorization: stolen\r\n\r\n", NEXT],
        [CHUNKED + b"0\r\nAuthorization: stolen\r\n\r\nPOST /n HTTP/1.1\r\n" + H
         + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
    ],
)  # fmt: skip
@on_both_loops
async def test_trailers_of_a_request_reach_nobody(pieces: list[bytes]) -> None:
    """aiohttp's parser makes the last trailer of one request the first field of the next one."""
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        for piece in pieces:
            await client.send(piece)
            await hop.recorder.let_in()
        answer = await client.rest()
        assert answer.count(b"HTTP/1.1 200 OK") == 1
        assert b"Connection: close\r\n" in answer
        assert len(seen) == 1
        assert b"stolen" not in seen[0]
        assert dechunk(seen[0].partition(b"\r\n\r\n")[2]) == b"abc"
        assert len(hop.recorder.admitted) == 1


@pytest.mark.parametrize(
    "pieces",
    [
        [CHUNKED + b"0\r\n\r\n", NEXT],
        [CHUNKED, b"0\r\n\r\n", NEXT],
        [CHUNKED, b"0\r", b"\n\r", b"\n", NEXT],
    ],
)
@on_both_loops
async def test_a_chunked_request_without_trailers_keeps_the_connection(pieces: list[bytes]) -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        for piece in pieces[:-1]:
            await client.send(piece)
            await hop.recorder.let_in()
            await client.silent(0.01)
        head, _ = await client.message()
        assert b"Connection" not in head
        await client.send(pieces[-1])
        await client.message()
        assert len(seen) == 2


@on_both_loops
async def test_every_way_to_cut_a_head_into_pieces_is_the_same() -> None:
    request = b"POST /x?y HTTP/1.1\r\nHost: me\r\nA: b\r\nContent-Length: 2\r\n\r\nok"
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        for cut in range(1, len(request), 3):
            await client.send(request[:cut])
            await client.silent(0.001)
            await client.send(request[cut:])
            await client.message()
        assert len(set(seen)) == 1
