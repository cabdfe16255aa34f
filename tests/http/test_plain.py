"""A plain call, byte for byte: target, fields, body, framing, and the one record it leaves."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

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

from sidecar.model.exchange import UNREAD, UsageState

GET = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n"


@on_both_loops
async def test_a_call_and_its_record() -> None:
    seen: list[bytes] = []
    fields = b"X-ONE: 1\r\nx-two:  2\r\nContent-Length: 5\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
    answer = b"HTTP/1.1 201 Made It\r\n" + fields + b"\r\nhello"
    request = (
        b"POST /model/a?k=secret&flag HTTP/1.1\r\nHost: api.example\r\nx-Odd-CASE: v\r\nX-Tenant: acme\r\n"
        b"User-Agent: test/1\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
        b"Content-Length: 3\r\nX-Rep: 1\r\nX-Rep: 2\r\n\r\nabc"
    )
    async with RawUpstream(answering(answer, seen=seen)) as upstream, Hop(upstream.url) as hop:
        head, body = await hop.call(request)
        assert head + body == answer.replace(b"x-two:  2", b"x-two: 2")
        assert seen == [
            b"POST /model/a?k=secret&flag HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nx-Odd-CASE: v\r\nX-Tenant: acme\r\n"
            b"User-Agent: test/1\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
            b"Content-Length: 3\r\nX-Rep: 1\r\nX-Rep: 2\r\nX-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\n"
            b"X-Forwarded-Host: api.example\r\n\r\nabc" % upstream.port
        ]
        exchange = await hop.recorder.ended()
        assert exchange.url == f"{upstream.url}/model/a?k&flag"
        assert (exchange.method, exchange.route, exchange.status) == ("POST", "/model", 201)
        assert exchange.outcome is Outcome.COMPLETE
        assert (exchange.request_bytes, exchange.response_bytes) == (3, 5)
        assert exchange.request_headers == [
            "Host",
            "x-Odd-CASE",
            "X-Tenant",
            "User-Agent",
            "traceparent",
            "Content-Length",
            "X-Rep",
            "X-Rep",
        ]
        assert exchange.response_headers == ["X-ONE", "x-two", "Content-Length", "Set-Cookie", "Set-Cookie"]
        assert exchange.trace_id == "0af7651916cd43dd8448eb211c80319c"
        assert (exchange.user_agent, exchange.client_ip) == ("test/1", "127.0.0.1")
        assert exchange.subscriber is not None
        assert exchange.subscriber.id == "acme"
        assert exchange.first_byte_ms is not None
        assert exchange.duration_ms is not None
        assert 0 < exchange.first_byte_ms <= exchange.duration_ms
        assert exchange.error is None


@pytest.mark.parametrize(
    "target",
    [
        b"/a%2Fb//c/../d/./e", b"/?", b"/x?", b"/x?a=%C3%A9&&b==", b"/%e4%bd%a0", b"/a;b=c,d", b"//double", b"/a?b?c#d",
        b"/~!$&'()*+,;=:@", b"/" + b"a" * 8000,
    ],
)  # fmt: skip
@on_both_loops
async def test_the_target_is_passed_on_byte_for_byte(target: bytes) -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        await hop.call(b"GET " + target + b" HTTP/1.1\r\nHost: me\r\n\r\n")
        assert seen[0].startswith(b"GET " + target + b" HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        (b"GET http://evil.example:81/p?q HTTP/1.1", b"GET /base/p?q HTTP/1.1"),
        (b"GET HTTP://evil.example HTTP/1.1", b"GET /base/ HTTP/1.1"),
        (b"GET http://user:word@evil.example/ HTTP/1.1", b"GET /base/ HTTP/1.1"),
        (b"GET http://evil.example?q HTTP/1.1", b"GET /base/?q HTTP/1.1"),
        (b"OPTIONS * HTTP/1.1", b"OPTIONS * HTTP/1.1"),
        (b"GET / HTTP/1.1", b"GET /base/ HTTP/1.1"),
        (b"QUERY /x HTTP/1.1", b"QUERY /base/x HTTP/1.1"),
        (b"PROPFIND /x HTTP/1.1", b"PROPFIND /base/x HTTP/1.1"),
    ],
)
@on_both_loops
async def test_no_target_changes_the_upstream(line: bytes, sent: bytes) -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url + "/base/") as hop:
        await hop.call(line + b"\r\nHost: me\r\n\r\n")
        assert seen[0].split(b"\r\n")[0] == sent
        assert field_of(seen[0], b"Host") == b"127.0.0.1:%d" % upstream.port
        assert b"word" not in seen[0]


@on_both_loops
async def test_latin_1_in_values_and_reason() -> None:
    seen: list[bytes] = []
    answer = reply(status=b"200 T\xe9l\xe9phone", fields=b"X-Name: \xe9\xff\r\n")
    async with RawUpstream(answering(answer, seen=seen)) as upstream, Hop(upstream.url) as hop:
        head, _ = await hop.call(b"GET / HTTP/1.1\r\nHost: me\r\nX-V: \xe9\xff \xc3\xa9\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 T\xe9l\xe9phone\r\nX-Name: \xe9\xff\r\n")
        assert field_of(seen[0], b"X-V") == b"\xe9\xff \xc3\xa9"


@on_both_loops
async def test_a_compressed_body_stays_as_it_is_both_ways() -> None:
    seen: list[bytes] = []
    answer = reply(b"\x1f\x8bnot really", fields=b"Content-Encoding: gzip\r\n")
    async with RawUpstream(answering(answer, seen=seen)) as upstream, Hop(upstream.url) as hop:
        _, body = await hop.call(
            b"POST /x HTTP/1.1\r\nHost: me\r\nAccept-Encoding: br\r\nContent-Encoding: gzip\r\n"
            b"Content-Length: 4\r\n\r\n\x1f\x8b\x00\x01"
        )
        assert body == b"\x1f\x8bnot really"
        assert seen[0].endswith(b"\x1f\x8b\x00\x01")
        assert field_of(seen[0], b"Accept-Encoding") == b"br"


@on_both_loops
async def test_chunked_both_ways() -> None:
    seen: list[bytes] = []
    answer = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n"
        b"3;ext=1\r\nabc\r\n2\r\nde\r\n0\r\nX-Sum: 5\r\nX-Two: 2\r\n\r\n"
    )
    async with RawUpstream(answering(answer, seen=seen)) as upstream, Hop(upstream.url) as hop:
        head, raw = await hop.call(
            b"POST /x HTTP/1.1\r\nHost: me\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwxyz\r\n1\r\n!\r\n0\r\n\r\n"
        )
        assert b"Content-Length" not in head
        assert field_of(head, b"Transfer-Encoding") == b"chunked"
        assert dechunk(raw) == b"abcde"
        assert raw.endswith(b"\r\n0\r\nX-Sum: 5\r\nX-Two: 2\r\n\r\n")
        sent_head, _, sent = seen[0].partition(b"\r\n\r\n")
        assert b"Content-Length" not in sent_head
        assert dechunk(sent) == b"wxyz!"
        exchange = await hop.recorder.ended()
        assert (exchange.request_bytes, exchange.response_bytes) == (5, 5)


@on_both_loops
async def test_transfer_codings_beneath_chunked_are_passed_on() -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    async with RawUpstream(answering(answer)) as upstream, Hop(upstream.url) as hop:
        head, raw = await hop.call(GET)
        assert (head, dechunk(raw)) == (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", b"abc")


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 1234\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nX: no length\r\n\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (b"GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        (b"GET", b'HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\nETag: "x"\r\n\r\n'),
        (b"GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (b"GET", b"HTTP/1.1 200 \r\nContent-Length: 0\r\n\r\n"),
    ],
)
@on_both_loops
async def test_answers_without_a_body_keep_both_connections(method: bytes, answer: bytes) -> None:
    async def script(conversation: Conversation) -> None:
        while True:
            await conversation.head()
            await conversation.send(answer)

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        for _ in range(3):
            await client.send(method + b" / HTTP/1.1\r\nHost: me\r\n\r\n")
            assert await client.head() == answer
        assert await client.silent()
        assert upstream.connections == 1
        exchange = await hop.recorder.ended(3)
        assert exchange.response_bytes == 0


@on_both_loops
async def test_a_close_delimited_answer_ends_cleanly_in_chunks() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 200 OK\r\nX: 1\r\n\r\nfirst")
        await conversation.send(b"second")

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        for n in (1, 2):
            await client.send(GET)
            head, raw = await client.message()
            assert head == b"HTTP/1.1 200 OK\r\nX: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
            assert dechunk(raw) == b"firstsecond"
            assert (await hop.recorder.ended(n)).outcome is Outcome.COMPLETE
        assert upstream.connections == 2


@on_both_loops
async def test_http_1_0_clients() -> None:
    answers = [
        reply(b"sized"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nT: 1\r\n\r\n",
    ]

    async def script(conversation: Conversation) -> None:
        for answer in answers:
            assert b"Host: " in await conversation.head()
            await conversation.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + answer)

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        head, body = await client.message()
        assert body == b"sized"
        assert field_of(head, b"Connection") == b"keep-alive"
        await client.send(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        assert await client.rest() == b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc"


@on_both_loops
async def test_an_http_1_0_client_without_keep_alive_is_closed() -> None:
    async with RawUpstream(answering(reply(b"x"))) as upstream, Hop(upstream.url) as hop:
        answer = await hop.last(b"GET / HTTP/1.0\r\n\r\n")
        assert answer == b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"


@on_both_loops
async def test_connection_close_is_each_sides_own() -> None:
    async def script(conversation: Conversation) -> None:
        assert b"close" not in await conversation.head()
        await conversation.send(reply(b"x", fields=b"Connection: close\r\n"))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(GET)
        assert await client.message() == (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n", b"x")
        await client.send(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert await client.rest() == b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx"
        assert upstream.connections == 2


@on_both_loops
async def test_pipelined_requests_are_answered_in_order() -> None:
    async def script(conversation: Conversation) -> None:
        while True:
            head = await conversation.head()
            await conversation.send(reply(head.split(b" ")[1]))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        count = 80  # more than the parser reads ahead
        await client.send(b"".join(b"GET /%d HTTP/1.1\r\nHost: me\r\n\r\n" % n for n in range(count)))
        for n in range(count):
            assert (await client.message())[1] == b"/%d" % n
        assert upstream.connections == 1
        await hop.recorder.ended(count)


@on_both_loops
async def test_pipelined_behind_an_upload() -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        first = b"POST /1 HTTP/1.1\r\nHost: me\r\nContent-Length: 3\r\n\r\nabc"
        await client.send(first + b"GET /2 HTTP/1.1\r\nHost: me\r\n\r\n")
        await client.message()
        await client.message()
        assert [request.split(b" ")[1] for request in seen] == [b"/1", b"/2"]


@on_both_loops
async def test_100_continue_is_the_upstreams_to_say() -> None:
    async def script(conversation: Conversation) -> None:
        head = await conversation.head()
        assert field_of(head, b"Expect") == b"100-continue"
        assert await conversation.silent()
        await conversation.send(b"HTTP/1.1 100 Continue\r\nX-Hint: 1\r\n\r\n")
        assert await conversation.exactly(5) == b"abcde"
        await conversation.send(reply(b"done"))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"POST /x HTTP/1.1\r\nHost: me\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        assert await client.head() == b"HTTP/1.1 100 Continue\r\nX-Hint: 1\r\n\r\n"
        await client.send(b"abcde")
        assert (await client.message())[1] == b"done"
        assert (await hop.recorder.ended()).status == 200


@on_both_loops
async def test_an_upstream_that_refuses_the_expectation() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(reply(b"too big", status=b"413 Content Too Large"))
        with pytest.raises(EOFError):
            await conversation.exactly(1)

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"POST /x HTTP/1.1\r\nHost: me\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n")
        head, body = await client.message()
        assert head.startswith(b"HTTP/1.1 413 ")
        assert field_of(head, b"Connection") == b"close"
        assert body == b"too big"
        assert (await hop.recorder.ended()).outcome is Outcome.COMPLETE


@on_both_loops
async def test_early_hints_pass() -> None:
    hint = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    answer = hint + hint.replace(b"/a", b"/b") + reply(b"x")
    async with RawUpstream(answering(answer)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(GET)
        assert await client.exactly(len(answer)) == answer
        assert (await hop.recorder.ended()).response_headers == ["Content-Length"]


@on_both_loops
async def test_an_early_answer_is_read_although_the_upload_goes_on() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(reply(b"no", status=b"403 No"))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"POST /x HTTP/1.1\r\nHost: me\r\nContent-Length: 10000000\r\n\r\n" + b"a" * 1000)
        head, body = await client.message()
        assert (head[:12], body) == (b"HTTP/1.1 403", b"no")
        for _ in range(20):  # the rest is read and dropped: no reset takes the answer away
            await client.send(b"a" * 50_000)
        assert await client.rest() == b""
        exchange = await hop.recorder.ended()
        assert (exchange.status, exchange.outcome) == (403, Outcome.COMPLETE)


@on_both_loops
async def test_an_upload_starts_with_its_first_byte() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        assert await conversation.until(b"abc\r\n") == b"3\r\nabc\r\n"
        await conversation.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        assert await conversation.until(b"0\r\n\r\n") == b"2\r\nde\r\n0\r\n\r\n"
        await conversation.send(reply(b"done"))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"POST /x HTTP/1.1\r\nHost: me\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await client.head()
        await client.send(b"2\r\nde\r\n0\r\n\r\n")
        assert (await client.message())[1] == b"done"


@on_both_loops
async def test_a_chunk_leaves_when_it_comes() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for n in range(5):
            await conversation.send(b"5\r\ndata%d\r\n" % n)
            await conversation.until(b"next")  # said by the client over the upload
        await conversation.send(b"0\r\n\r\n")

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(b"POST /x HTTP/1.1\r\nHost: me\r\nContent-Length: 20\r\n\r\n")
        await client.head()
        for n in range(5):
            assert await client.until(b"data%d\r\n" % n) == b"5\r\ndata%d\r\n" % n
            await client.send(b"next")
        assert await client.rest() == b"0\r\n\r\n"
        assert (await hop.recorder.ended()).request_bytes == 20


@on_both_loops
async def test_bytes_on_an_idle_connection_close_it() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(reply(b"one"))
        await conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
        with pytest.raises((EOFError, ConnectionError)):
            await conversation.head()

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        for _ in range(3):
            assert (await hop.call(GET))[1] == b"one"
            await until(upstream.open[upstream.connections - 1].reader.at_eof)
        assert upstream.connections == 3


@on_both_loops
async def test_bytes_behind_an_answer_are_no_answer() -> None:
    answer = reply(b"one") + b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison"
    async with RawUpstream(answering(answer)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        for _ in range(3):
            await client.send(GET)
            assert (await client.message())[1] == b"one"
        assert upstream.connections == 3


@on_both_loops
async def test_the_last_bytes_wait_for_the_record() -> None:
    cases = {
        "small": reply(b"whole"),
        "head only": b"HTTP/1.1 204 No Content\r\n\r\n",
        "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    }
    for answer in cases.values():
        async with RawUpstream(answering(answer)) as upstream, Hop(upstream.url) as hop:
            hop.recorder.hold = True
            client = await hop.client()
            await client.send(GET)
            await hop.recorder.ended()
            assert await client.silent()
            hop.recorder.let_go()
            assert await client.exactly(len(answer)) == answer
            # The upstream's connection was given back before the record was safe.
            hop.recorder.hold = False
            await hop.call(GET)
            assert upstream.connections == 1


@on_both_loops
async def test_the_pieces_before_the_last_do_not_wait() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n12345")
        await conversation.until(b"x")
        await conversation.send(b"67890")

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(b"POST / HTTP/1.1\r\nHost: me\r\nContent-Length: 1\r\n\r\n")
        await client.until(b"12345")
        await client.send(b"x")
        await hop.recorder.ended()
        assert await client.silent()
        hop.recorder.let_go()
        assert await client.exactly(5) == b"67890"


@on_both_loops
async def test_an_end_mark_waits_and_the_terminal_chunk_follows_it() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await heard.wait()
        await conversation.send(b"7\r\n<usage>\r\n5\r\n<end>\r\n")
        await go.wait()
        await conversation.send(b"3\r\nend\r\n0\r\n\r\n")

    heard, go = asyncio.Event(), asyncio.Event()
    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(b"POST /model HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\n..")
        await client.until(b"hello\r\n")
        heard.set()
        exchange = await hop.recorder.ended()
        assert exchange.usage is not None
        assert exchange.usage.usage_state is UsageState.FINAL
        size = exchange.response_bytes
        assert await client.silent()
        hop.recorder.let_go()
        await client.until(b"<end>\r\n")
        go.set()
        assert await client.until(b"0\r\n\r\n") == b"3\r\nend\r\n0\r\n\r\n"
        assert exchange.response_bytes == size == 17  # what follows the mark is passed on, not recorded
        assert upstream.connections == 1


@on_both_loops
async def test_a_record_that_cannot_be_kept_cuts_the_answer() -> None:
    async with RawUpstream(answering(reply(b"whole"))) as upstream, Hop(upstream.url) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(GET)
        await hop.recorder.ended()
        hop.recorder.let_go(send=False)
        with pytest.raises(ConnectionResetError):
            await client.rest()


@on_both_loops
async def test_no_record_no_call() -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url) as hop:
        hop.recorder.full = True
        head, body = await hop.call(GET)
        assert head.startswith(b"HTTP/1.1 503 ")
        assert json.loads(body)["error"]["type"] == "metering_unavailable"
        assert seen == []
        assert hop.counts.limits == ["spool_full"]


@on_both_loops
async def test_the_meter_id_is_told_where_wanted() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, meter_id_header=True) as hop:
        head, _ = await hop.call(GET)
        assert field_of(head, b"X-Meter-Id") == hop.recorder.records[0].id.encode()


@pytest.mark.parametrize("asks", [False, True])
@on_both_loops
async def test_a_tap_that_raises_is_not_felt(asks: bool) -> None:
    class Bad:
        waiting = True

        @property
        def may_ask(self) -> bool:
            if asks:
                return True
            raise RuntimeError("tap")

        def request(self, *args: object) -> Bad:
            return self

        def response(self, *args: object) -> Bad:
            return self

        def feed(self, piece: bytes) -> bool:
            raise RuntimeError("tap")

        def finish(self, whole: bool) -> None:
            raise RuntimeError("tap")

        def with_usage_asked(self, body: bytes) -> bytes:
            raise RuntimeError("tap")

        def unanswered(self) -> None:
            raise RuntimeError("tap")

        def websocket(self, *args: object) -> None:
            raise RuntimeError("tap")

    async with RawUpstream(answering(reply(b"fine"))) as upstream, Hop(upstream.url) as hop:
        rest = hop.proxy._hop.rest  # type: ignore[union-attr]
        rest.reading = replace(rest.reading, taps=Bad())
        assert (await hop.call(b"POST /x HTTP/1.1\r\nHost: me\r\nContent-Length: 1\r\n\r\nx"))[1] == b"fine"
        usage = (await hop.recorder.ended()).usage
        assert usage is not None, "that would be a call that consumes nothing"
        assert usage.reason == UNREAD
