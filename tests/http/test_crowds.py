"""More than there is room for: descriptors, requests sent ahead, unwanted uploads; and both families of addresses."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import tracemalloc

import pytest
from support.rawhttp import Conversation, Hop, RawUpstream, answering, on_both_loops, reply, until

from sidecar.proxy.server import FILES_BESIDE_MIN, files_needed, within_files
from sidecar.settings import ProxySettings

GET = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n"
HELD_MAX = 4 * 2**20


def test_connections_follow_the_limit_of_descriptors() -> None:
    rules = ProxySettings(upstream_url="http://up.test", connections=10_240, drains=100)
    assert within_files(files_needed(rules), rules) is rules
    for files in (100, 256, 1_024, 4_096, 20_000):
        cut = within_files(files, rules)
        assert 1 <= cut.connections < rules.connections
        assert 2 * cut.connections + cut.drains + min(FILES_BESIDE_MIN, files // 2) <= files
    assert within_files(16_384, rules).connections > 7_000


@on_both_loops
async def test_a_crowd_is_refused_and_those_inside_are_served() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, connections=20) as hop:
        clients = [await hop.client() for _ in range(120)]
        await until(lambda: hop.counts.connections >= 20)
        inside = []
        for client in clients:
            with contextlib.suppress(ConnectionError):
                await client.send(GET)
            with contextlib.suppress(ConnectionError, EOFError):
                head, _ = await client.message()
                assert head[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 503")
                if head[:12] == b"HTTP/1.1 200":
                    inside.append(client)
        assert len(inside) == 20
        for client in inside:
            await client.send(GET)
            assert (await client.message())[1] == b"ok"
        assert set(hop.counts.limits) == {"connections"}


@pytest.mark.parametrize("size", [2, 40_000, 200_000])
@on_both_loops
async def test_requests_sent_ahead_stay_outside(size: int) -> None:
    """Of a client that reads nothing: neither what it sends nor what it is sent piles up, and others are served."""
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(b"x" * size), seen=seen)) as upstream, Hop(upstream.url) as hop:
        client = await hop.client(receive_buffer=2**15)
        tracemalloc.start()
        try:
            client.writer.transport.set_write_buffer_limits(high=2**16)
            sent, standing = 0, 0
            while sent < 40_000 and standing < 5:
                client.writer.write(GET * 1_000)
                sent += 1_000
                try:
                    async with asyncio.timeout(0.2):
                        await client.writer.drain()
                    standing = 0
                except TimeoutError:
                    standing += 1
            other = await hop.client()
            await other.send(GET)
            assert len((await other.message())[1]) == size
            # The test's own ends are in it: the upstream's list, and what it was kept from writing.
            assert tracemalloc.get_traced_memory()[1] < HELD_MAX + size * 4 + len(GET) * 2_000 * 8
        finally:
            tracemalloc.stop()
        if size > 2:
            assert len(seen) < 12_000_000 // size + 8  # the kernel's buffers, and one response


@on_both_loops
async def test_an_upload_that_is_refused_early_may_go_on_for_a_while() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(reply(b"big", status=b"413 Too Large", fields=b"Connection: close\r\n"))

    async with RawUpstream(script) as upstream, Hop(upstream.url, linger_s=0.4, linger_total_s=30) as hop:
        client = await hop.client()
        await client.send(b"POST /up HTTP/1.1\r\nHost: me\r\nContent-Length: 1000000000\r\n\r\n")
        for _ in range(10):  # three times as long as it may be silent
            await asyncio.sleep(0.1)
            await client.send(b"x" * 65_536)
        assert (await client.message())[1] == b"big"


@on_both_loops
async def test_every_address_is_of_both_families() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 here")
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        bound = await hop.proxy.listen(host="::", port=0)
        for host in ("127.0.0.1", "::1"):
            reader, writer = await asyncio.open_connection(host, int(bound[1]))
            client = Conversation(reader, writer)
            await client.send(GET)
            assert (await client.message())[1] == b"ok"
            await client.close()
        assert [exchange.client_ip for exchange in hop.recorder.records] == ["127.0.0.1", "::1"]
