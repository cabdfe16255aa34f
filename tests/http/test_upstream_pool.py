"""Idle connections to the upstream: how long they are kept, when they are not taken, and what may be sent again."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, answering, on_both_loops, reply, until

from sidecar.proxy.upstream import TCP_KEEPALIVE_S, Upstream, keep_alive_hint

GET = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n"
POST = b"POST /x HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\nhi"
MUCH = 32 << 20  # more than the system buffers


@pytest.mark.parametrize(
    ("field", "seconds", "calls"),
    [
        (b"timeout=5", 4.0, None),
        (b"timeout=5, max=100", 4.0, 100),
        (b"max=1,timeout = 1", 0.0, 1),
        (b"timeout=0", 0.0, None),
        (b'Timeout="30"', 29.0, None),
        (b"timeout=75;max=3", 74.0, 3),
        (b"timeout=60,timeout=5", 4.0, None),
        (b"", None, None),
        (b"timeout", None, None),
        (b"timeout=", None, None),
        (b"timeout=-1", None, None),
        (b"timeout=soon, max=x", None, None),
        (b"xtimeout=1, maximum=2", None, None),
        (b"timeout=" + b"9" * 5_000, None, None),
    ],
)
def test_hints(field: bytes, seconds: float | None, calls: int | None) -> None:
    assert keep_alive_hint(field) == (seconds, calls)


def pool_of(hop: Hop) -> Upstream:
    assert hop.proxy._hop is not None
    upstream = hop.proxy._hop.rest.upstream
    assert upstream is not None
    return upstream


@pytest.mark.parametrize(
    ("fields", "connections"),
    [
        (b"", 1),
        (b"Keep-Alive: timeout=60\r\n", 1),
        (b"Connection: keep-alive\r\nKeep-Alive: timeout=60, max=1000\r\n", 1),
        (b"Keep-Alive: timeout=1\r\n", 4),
        (b"Keep-Alive: timeout=60\r\nKeep-Alive: timeout=1\r\n", 4),
        (b"Keep-Alive: max=0\r\n", 4),
        (b"Keep-Alive: timeout=60, max=2\r\n", 2),
    ],
)
@on_both_loops
async def test_what_the_upstream_says_of_its_connections_is_kept_to(fields: bytes, connections: int) -> None:
    async with RawUpstream(answering(reply(fields=fields))) as upstream, Hop(upstream.url) as hop:
        for _ in range(4):
            head, body = await hop.call(GET)
            assert body == b"ok"
            assert b"Keep-Alive" not in head
        assert upstream.connections == connections


@on_both_loops
async def test_a_limit_that_counts_down_is_reached_once() -> None:
    """Apache says how many are left, Node how many there are: neither is counted twice."""

    async def script(conversation: Conversation) -> None:
        for left in range(5, -1, -1):
            await conversation.message()
            await conversation.send(reply(fields=b"Keep-Alive: timeout=60, max=%d\r\n" % left))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        for _ in range(10):
            assert (await hop.call(POST))[1] == b"ok"
        assert upstream.connections == 2


@pytest.mark.parametrize("rules", [{"upstream_keepalive_s": 0.0}, {"upstream_connection_age_s": 0.0}])
@on_both_loops
async def test_zero_keeps_none(rules: dict[str, Any]) -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, **rules) as hop:
        for _ in range(3):
            assert (await hop.call(GET))[1] == b"ok"
        assert upstream.connections == 3
        assert pool_of(hop).idle == 0


@on_both_loops
async def test_an_idle_connection_is_closed_and_one_overdue_is_not_taken() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, upstream_keepalive_s=0.1) as hop:
        await hop.call(GET)
        await until(lambda: upstream.open[0].reader.at_eof() or upstream.open[0].reader.exception() is not None)
        assert pool_of(hop).idle == 0
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        await hop.call(GET)
        (connection,) = pool_of(hop)._idle
        connection.use_until = asyncio.get_running_loop().time()  # and the sweep has not come by
        assert pool_of(hop).take() is None
        assert not connection.is_connected()


@on_both_loops
async def test_a_connection_in_steady_use_grows_old() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, upstream_connection_age_s=0.2) as hop:
        client = await hop.client()

        async def calls() -> None:
            while upstream.connections < 3:
                await client.send(GET)
                assert (await client.message())[1] == b"ok"

        async with asyncio.timeout(10):
            await calls()
        assert hop.counts.retries == 0


def _file_number(hop: Hop) -> int:
    (connection,) = pool_of(hop)._idle
    assert connection.transport is not None
    return int(connection.transport.get_extra_info("socket").fileno())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("how", ["end", "bytes", "reset"])
@on_both_loops
async def test_what_the_loop_has_not_seen_yet_is_seen_when_it_is_taken(how: str, tls: bool, tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
    async with (
        RawUpstream(answering(reply()), tls=context) as upstream,
        Hop(upstream.url, upstream_ca_file=str(tmp_path / "ca.pem")) as hop,
    ):
        for _ in range(2):
            assert (await hop.call(GET))[1] == b"ok"
        assert upstream.connections == 1
        theirs = upstream.open[0].writer.get_extra_info("socket")
        same = socket.socket(fileno=os.dup(theirs.fileno()))
        with same:
            if how == "bytes":
                os.write(same.fileno(), b"HTTP/1.1 200 OK\r\n\r\n")
            else:
                same.shutdown(socket.SHUT_WR if how == "end" else socket.SHUT_RDWR)
            # In the same turn of the loop: nobody has been told.
            (connection,) = pool_of(hop)._idle
            assert connection.is_connected()
            assert pool_of(hop).take() is None
        assert not connection.is_connected()
        assert (await hop.call(POST))[1] == b"ok"
        assert (upstream.connections, hop.counts.retries) == (2, 0)


@on_both_loops
async def test_tcp_keepalive_is_on(tmp_path: Path) -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        await hop.call(GET)
        with socket.socket(fileno=os.dup(_file_number(hop))) as same:
            assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
                if hasattr(socket, option):
                    assert same.getsockopt(socket.IPPROTO_TCP, getattr(socket, option)) == TCP_KEEPALIVE_S
    path = str(tmp_path / "up.sock")
    async with RawUpstream(answering(reply()), path=path) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(GET))[1] == b"ok"


@on_both_loops
async def test_who_is_finished_and_reads_nothing_is_cut_off() -> None:
    async def script(conversation: Conversation) -> None:
        if not reads:
            conversation.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.Event().wait()
        got.append(len(await conversation.rest()))

    got: list[int] = []
    async with RawUpstream(script) as server:
        for reads in (True, False):
            upstream = Upstream(
                loop=asyncio.get_running_loop(),
                host="127.0.0.1",
                port=server.port,
                socket_path=None,
                tls=None,
                server_name=None,
                connect_timeout_s=5,
                keepalive_s=1,
                age_s=1,
            )
            connection = await upstream.connect()
            transport = connection.transport
            assert transport is not None
            connection.write(bytes(MUCH))
            assert transport.get_write_buffer_size() > 0
            connection.finish(60 if reads else 0.05)
            await until(lambda: transport.get_write_buffer_size() == 0)  # noqa: B023
            await upstream.aclose()
        await until(lambda: bool(got))
        assert got == [MUCH]


# -- what may be sent again ----------------------------------------------------------------------

PUT_HEAD = b"PUT /x HTTP/1.1\r\nHost: me\r\nContent-Length: 5\r\n"


@on_both_loops
async def test_a_put_that_waits_for_its_100_is_sent_again() -> None:
    bodies: list[bytes] = []

    async def script(conversation: Conversation) -> None:
        if upstream.connections == 1:
            await conversation.message()
            await conversation.send(reply(b"first"))
            await conversation.head()
            conversation.reset()  # none of the body has come
            return
        await conversation.head()
        await conversation.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        bodies.append(await conversation.exactly(5))
        await conversation.send(reply(b"second"))

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(GET))[1] == b"first"
        client = await hop.client()
        await client.send(PUT_HEAD + b"Expect: 100-continue\r\n\r\n")
        assert (await client.head()).startswith(b"HTTP/1.1 100 ")
        await client.send(b"12345")
        assert (await client.message())[1] == b"second"
        assert bodies == [b"12345"]
        exchange = await hop.recorder.ended(2)
        assert (exchange.outcome, exchange.request_bytes, hop.counts.retries) == (Outcome.COMPLETE, 5, 1)


@pytest.mark.parametrize("chunked", [False, True], ids=["sized", "chunked"])
@on_both_loops
async def test_what_was_sent_of_a_body_is_sent_again_and_the_rest_after_it(chunked: bool) -> None:
    seen: list[bytes] = []
    died = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        if upstream.connections == 1:
            await conversation.message()
            await conversation.send(reply(b"first"))
            await conversation.until(b"123")
            conversation.reset()
            died.set()
            return
        seen.append((await conversation.message())[1])
        await conversation.send(reply(b"second"))

    frame = b"Transfer-Encoding: chunked\r\n" if chunked else b"Content-Length: 5\r\n"
    pieces = (b"3\r\n123\r\n", b"2\r\n45\r\n0\r\n\r\n") if chunked else (b"123", b"45")
    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(GET))[1] == b"first"
        client = await hop.client()
        await client.send(b"PUT /x HTTP/1.1\r\nHost: me\r\n" + frame + b"\r\n" + pieces[0])
        await died.wait()
        await until(lambda: hop.counts.retries == 1)
        await client.send(pieces[1])
        assert (await client.message())[1] == b"second"
        assert seen == [b"".join(pieces)]
        exchange = await hop.recorder.ended(2)
        assert (exchange.outcome, exchange.request_bytes) == (Outcome.COMPLETE, 5)


@on_both_loops
async def test_a_post_that_waits_for_its_100_is_not_sent_again() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(reply(b"first"))
        await conversation.head()
        conversation.reset()

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(GET))[1] == b"first"
        head = await hop.last(PUT_HEAD.replace(b"PUT", b"POST") + b"Expect: 100-continue\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 502 ")
        assert (upstream.connections, hop.counts.retries) == (1, 0)


@on_both_loops
async def test_a_second_death_is_the_last() -> None:
    async def script(conversation: Conversation) -> None:
        if upstream.connections == 1:
            await conversation.message()
            await conversation.send(reply(b"first"))
        await conversation.head()
        conversation.reset()

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(GET))[1] == b"first"
        head = await hop.last(PUT_HEAD + b"Expect: 100-continue\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 502 ")
        assert (upstream.connections, hop.counts.retries) == (2, 1)


@pytest.mark.usefixtures("both_ways")
@on_both_loops
async def test_for_a_client_that_has_left_nothing_is_sent_again() -> None:
    died = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        for _ in range(2):
            await conversation.message()
            asked.append(upstream.connections)
            if len(asked) == 2:
                await died.wait()
                conversation.reset()
                return
            await conversation.send(reply(b"first"))

    asked: list[int] = []
    request = POST.replace(b"/x", b"/model").replace(b"Host", b"Idempotency-Key: k\r\nHost")
    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(request))[1] == b"first"
        client = await hop.client()
        await client.send(request)
        await until(lambda: len(asked) == 2)
        await client.close()
        await until(lambda: hop.counts.drains == 1)
        died.set()
        await until(lambda: len(hop.recorder.records) == 2)
        last = hop.recorder.records[1]
        assert (last.outcome, last.status, asked) == (Outcome.CLIENT_LEFT, None, [1, 1])
        assert hop.counts.retries == 0
