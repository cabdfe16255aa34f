"""However a call ends, it ends once, with an outcome, and a cut never looks like an end."""

from __future__ import annotations

import asyncio
import json
import select
import socket
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.ports import free_port
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, Script, answering, on_both_loops, reply, until

from sidecar.model.exchange import Exchange, UsageState
from sidecar.proxy.response_parser import UpstreamResponse
from sidecar.proxy.upstream import UpstreamConnection
from sidecar.settings import OnDisconnect, Route

GET = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n"
GET10 = b"GET /x HTTP/1.0\r\n\r\n"
POST = b"POST /model HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\nhi"
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def error_type(body: bytes) -> str:
    return str(json.loads(body)["error"]["type"])


@on_both_loops
async def test_nobody_listens() -> None:
    async with Hop(f"http://127.0.0.1:{free_port()}") as hop:
        client = await hop.client()
        for n in (1, 2):  # the connection is kept: nothing is wrong with the client
            await client.send(GET)
            head, body = await client.message()
            assert (head[:12], error_type(body)) == (b"HTTP/1.1 502", "upstream_unreachable")
            exchange = await hop.recorder.ended(n)
            assert (exchange.outcome, exchange.status) == (Outcome.UNREACHABLE, 502)
            assert exchange.first_byte_ms is None


@on_both_loops
async def test_no_such_host() -> None:
    async with Hop("http://no-such-host.invalid") as hop:
        head, _ = await hop.call(GET)
        assert head[:12] == b"HTTP/1.1 502"
        assert (await hop.recorder.ended()).outcome is Outcome.UNREACHABLE


@on_both_loops
async def test_a_connection_that_is_not_accepted_in_time() -> None:
    with socket.socket() as full:  # a listener whose queue is full lets further connections hang
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        async with Hop(f"http://127.0.0.1:{full.getsockname()[1]}", upstream_connect_timeout_s=0.2) as hop:
            head, body = await hop.call(GET)
            assert (head[:12], error_type(body)) == (b"HTTP/1.1 504", "upstream_connect_timeout")
            assert (await hop.recorder.ended()).outcome is Outcome.UNREACHABLE
        for filler in fillers:
            filler.close()


async def _silence(conversation: Conversation) -> None:
    await conversation.head()
    await asyncio.Event().wait()


@on_both_loops
async def test_no_answer_in_time() -> None:
    async with RawUpstream(_silence) as upstream, Hop(upstream.url, upstream_timeout_s=0.1) as hop:
        head, body = await hop.call(GET)
        assert (head[:12], error_type(body)) == (b"HTTP/1.1 504", "upstream_timeout")
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.UPSTREAM_TIMEOUT, 504)
        assert hop.counts.limits == ["response_timeout"]
        await until(partial(_over, upstream.open[0].reader))


GARBAGE = [
    b"hello\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 099 Low\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 100 Continue\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 99 Low\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 300 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000,
    b"HTTP/1.1 103 Hint\r\n\r\n" * 40,
    b"",
]


@pytest.mark.parametrize("answer", GARBAGE, ids=range(len(GARBAGE)))
@on_both_loops
async def test_an_answer_that_is_none(answer: bytes) -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(answer)

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(GET)
        head, body = await client.message()
        while head.startswith(b"HTTP/1.1 10"):
            head, body = await client.message()
        assert (head[:12], error_type(body)) == (b"HTTP/1.1 502", "upstream_broke")
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.UPSTREAM_BROKE, 502)
        assert exchange.error


SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\npartial"
CHUNKED = STREAM + b"7\r\npartial\r\n"
UNSIZED = b"HTTP/1.1 200 OK\r\n\r\npartial"


@pytest.mark.parametrize(
    ("request_", "answer", "rude"),
    [
        (GET, SIZED, False), (GET, SIZED, True), (GET, CHUNKED, False), (GET, CHUNKED, True), (GET, UNSIZED, True),
        (GET10, SIZED, False), (GET10, CHUNKED, False), (GET10, CHUNKED, True), (GET10, UNSIZED, True),
    ],
)  # fmt: skip
@on_both_loops
async def test_a_cut_body_reaches_the_client_cut(request_: bytes, answer: bytes, rude: bool) -> None:
    go = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(answer)
        await go.wait()
        if rude:
            conversation.reset()

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(request_)
        head = await client.head()
        await client.until(b"partial")
        go.set()
        framed = b"Content-Length" in head or b"Transfer-Encoding" in head
        if framed:
            rest = await client.rest()
            assert b"0\r\n\r\n" not in rest
        else:
            with pytest.raises(ConnectionResetError):
                await client.rest()
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.UPSTREAM_BROKE, 200)
        assert exchange.response_bytes == 7


TOO_LARGE = b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig"
UPLOAD = b"POST /x HTTP/1.1\r\nHost: me\r\n"
SWITCH = b"GET /x HTTP/1.1\r\nHost: me\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
SWITCHED = b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
@pytest.mark.parametrize(
    ("request_", "piece", "first", "last", "heard"),
    [
        (UPLOAD + b"Content-Length: 9\r\n\r\n", b"abc", b"", TOO_LARGE, TOO_LARGE[-3:]),
        (UPLOAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", b"", TOO_LARGE, TOO_LARGE[-3:]),
        (UPLOAD + b"Content-Length: 9\r\n\r\n", b"abc", TOO_LARGE[:-3], TOO_LARGE[-3:], TOO_LARGE[-3:]),
        (SWITCH, b"abc", SWITCHED, b"bye" * 1000, b"bye" * 1000),
    ],
    ids=["sized", "chunked", "in its body", "tunnel"],
)
@on_both_loops
async def test_what_an_upstream_said_before_it_broke_is_heard(
    request_: bytes,
    piece: bytes,
    first: bytes,
    last: bytes,
    heard: bytes,
    family: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It refuses an upload and closes with some of that unread, which resets the connection, while more is about to be
    written: the write fails before the refusal was read."""
    loop = asyncio.get_running_loop()
    with socket.socket(family) as listener:
        listener.bind(str(tmp_path / "up") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        name = listener.getsockname()
        async with Hop(f"unix:{name}" if family == socket.AF_UNIX else f"http://127.0.0.1:{name[1]}") as hop:
            client = await hop.client()
            await client.send(request_)
            upstream, _ = await loop.sock_accept(listener)
            said = b""
            while b"\r\n\r\n" not in said:
                said += await loop.sock_recv(upstream, 65_536)
            if first:
                await loop.sock_sendall(upstream, first)
                await client.until(b"\r\n\r\n")
            await client.send(piece)  # nobody reads it
            await until(lambda: bool(select.select([upstream], [], [], 0)[0]))
            write = UpstreamConnection.write

            def write_too_late(connection: UpstreamConnection, data: bytes) -> None:
                upstream.send(last)
                upstream.close()
                monkeypatch.undo()
                write(connection, data)

            monkeypatch.setattr(UpstreamConnection, "write", write_too_late)
            await client.send(piece)
            await client.until(heard)
            exchange = await hop.recorder.ended()
            if heard == b"big":
                assert (exchange.outcome, exchange.status) == (Outcome.COMPLETE, 413)
            assert exchange.response_bytes == len(heard)


@on_both_loops
async def test_silence_in_a_body_is_cut() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(CHUNKED)
        await asyncio.Event().wait()

    async with RawUpstream(script) as upstream, Hop(upstream.url, idle_timeout_s=0.1) as hop:
        client = await hop.client()
        await client.send(GET)
        await client.until(b"partial\r\n")
        with pytest.raises(ConnectionResetError):
            await client.rest()
        assert (await hop.recorder.ended()).outcome is Outcome.UPSTREAM_TIMEOUT
        assert hop.counts.limits == ["idle_timeout"]


@on_both_loops
async def test_an_upload_that_stalls() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url, idle_timeout_s=0.1) as hop:
        answer = await hop.last(b"POST / HTTP/1.1\r\nHost: me\r\nContent-Length: 10\r\n\r\nabc")
        assert answer.startswith(b"HTTP/1.1 408 ")
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status, exchange.request_bytes) == (Outcome.REFUSED, 408, 3)


@on_both_loops
async def test_silence_one_way_is_no_silence() -> None:
    """An answer that flows while its upload pauses, and the other way round: either keeps the call open."""
    answering_now = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(STREAM)
        for _ in range(12):
            await conversation.send(b"1\r\nx\r\n")
            await asyncio.sleep(0.05)
        answering_now.set()
        await conversation.exactly(12)
        await conversation.send(b"0\r\n\r\n")

    async with RawUpstream(script) as upstream, Hop(upstream.url, idle_timeout_s=0.25) as hop:
        client = await hop.client()
        await client.send(b"POST / HTTP/1.1\r\nHost: me\r\nContent-Length: 12\r\n\r\n")
        await answering_now.wait()
        for _ in range(12):
            await client.send(b"y")
            await asyncio.sleep(0.05)
        await client.until(b"0\r\n\r\n")
        assert (await hop.recorder.ended()).outcome is Outcome.COMPLETE


# -- the one retry -------------------------------------------------------------------------------


def _dies_when_used_again(seen: list[bytes]) -> Script:
    async def script(conversation: Conversation) -> None:
        head, body = await conversation.message()
        seen.append(head + body)
        await conversation.send(reply(b"first"))
        head, body = await conversation.message()
        seen.append(head + body)
        conversation.reset()

    return script


@pytest.mark.parametrize(
    ("request_", "retried"),
    [
        (GET, True),
        (b"PUT /x HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\nhi", True),
        (b"POST /x HTTP/1.1\r\nHost: me\r\nIdempotency-Key: k\r\nContent-Length: 2\r\n\r\nhi", True),
        (b"POST /x HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\nhi", False),
        (b"PATCH /x HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\nhi", False),
        (b"PUT /x HTTP/1.1\r\nHost: me\r\nContent-Length: 70000\r\n\r\n" + b"a" * 70_000, False),
    ],
)
@on_both_loops
async def test_a_pooled_connection_that_dies(request_: bytes, retried: bool) -> None:
    seen: list[bytes] = []
    async with RawUpstream(_dies_when_used_again(seen)) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(GET))[1] == b"first"
        head, body = await hop.call(request_)
        exchange = await hop.recorder.ended(2)
        if retried:
            assert body == b"first"
            assert (len(seen), hop.counts.retries, exchange.outcome) == (3, 1, Outcome.COMPLETE)
            assert seen[1] == seen[2]
            assert upstream.connections == 2
        else:
            assert (head[:12], error_type(body)) == (b"HTTP/1.1 502", "upstream_broke")
            assert (hop.counts.retries, exchange.outcome) == (0, Outcome.UPSTREAM_BROKE)
            assert len(seen) == 2  # a POST body is never sent twice
            assert upstream.connections == 1


@on_both_loops
async def test_a_new_connection_that_dies_is_not_retried() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        head, _ = await hop.call(GET)
        assert head[:12] == b"HTTP/1.1 502"
        assert (upstream.connections, hop.counts.retries) == (1, 0)


@on_both_loops
async def test_the_retry_does_not_take_another_dead_connection() -> None:
    """All pooled connections may have died together; the one retry must not be spent on the next of them."""
    gate = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await gate.wait()
        await conversation.send(reply(b"first"))
        await conversation.head()
        conversation.reset()

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        clients = [await hop.client() for _ in range(4)]
        for client in clients:
            await client.send(GET)
        await until(lambda: upstream.connections == 4)
        gate.set()
        for client in clients:
            await client.message()
        assert (await hop.call(GET))[1] == b"first"
        assert (upstream.connections, hop.counts.retries) == (5, 1)


# -- the client leaves ---------------------------------------------------------------------------


def _streams(go: asyncio.Event, *pieces: bytes) -> Script:
    """A head and `<first>`, then, told to, the rest."""

    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(STREAM + b"7\r\n<first>\r\n")
        await go.wait()
        for piece in pieces:
            await conversation.send(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.sleep(0)
        await conversation.send(b"0\r\n\r\n")
        with pytest.raises((EOFError, ConnectionError)):
            await conversation.head()

    return script


def _sends(piece: bytes) -> Script:
    """A head and one piece, and then nothing: the proxy is expected to leave."""

    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await conversation.send(STREAM + b"%x\r\n%b\r\n" % (len(piece), piece))
        with pytest.raises((EOFError, ConnectionError)):
            await conversation.head()

    return script


async def _left(hop: Hop, mark: bytes, request: bytes = POST) -> Exchange:
    """Leave as soon as `mark` has come; what is recorded of that."""
    client = await hop.client()
    await client.send(request)
    await client.until(mark)
    await client.close()
    return await hop.recorder.ended()


@pytest.mark.parametrize("rude", [False, True])
@on_both_loops
async def test_left_mid_stream_the_upstream_is_read_to_the_usage(rude: bool) -> None:
    go = asyncio.Event()
    async with RawUpstream(_streams(go, b"more", b"<usage>", b"tail")) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(POST)
        await client.until(b"<first>")
        if rude:
            client.reset()
        else:
            await client.close()
        await until(lambda: hop.counts.drains == 1)
        assert hop.recorder.records == []
        go.set()
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.CLIENT_LEFT, 200)
        assert exchange.usage is not None
        assert exchange.usage.usage_state is UsageState.FINAL


@on_both_loops
async def test_left_before_the_head_the_upstream_is_read_to_the_usage() -> None:
    go = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        await conversation.message()
        await go.wait()
        await conversation.send(STREAM + b"7\r\n<usage>\r\n0\r\n\r\n")

    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(POST)
        await until(lambda: upstream.connections == 1)
        await client.close()
        await until(lambda: hop.counts.drains == 1)
        go.set()
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.CLIENT_LEFT, None)
        assert exchange.usage is not None
        assert exchange.usage.usage_state is UsageState.FINAL


@pytest.mark.parametrize(
    ("path", "rules"),
    [
        (b"/model", {"on_disconnect": "stop"}),
        (b"/model", {"routes": (Route(pattern="/model", on_disconnect=OnDisconnect.STOP),)}),
        (b"/plain", {}),
        (b"/model", {"drains": 0}),
    ],
)
@on_both_loops
async def test_left_and_stopped(path: bytes, rules: dict[str, Any]) -> None:
    async with RawUpstream(_streams(asyncio.Event())) as upstream, Hop(upstream.url, **rules) as hop:
        exchange = await _left(hop, b"<first>", POST.replace(b"/model", path))
        assert (exchange.outcome, exchange.status, exchange.response_bytes) == (Outcome.CLIENT_LEFT, 200, 7)
        assert exchange.usage is None or exchange.usage.usage_state is UsageState.PARTIAL
        await until(partial(_over, upstream.open[0].reader))
        assert hop.counts.limits == (["drains"] if "drains" in rules else [])


@on_both_loops
async def test_left_after_the_usage_there_is_nothing_to_read_on_for() -> None:
    async with RawUpstream(_sends(b"<usage>")) as upstream, Hop(upstream.url) as hop:
        exchange = await _left(hop, b"<usage>")
        assert exchange.outcome is Outcome.CLIENT_LEFT
        assert exchange.usage is not None
        assert exchange.usage.usage_state is UsageState.FINAL


@on_both_loops
async def test_left_after_the_end_mark_is_complete() -> None:
    async with RawUpstream(_sends(b"<usage><end>")) as upstream, Hop(upstream.url) as hop:
        assert (await _left(hop, b"<end>")).outcome is Outcome.COMPLETE
        await until(partial(_over, upstream.open[0].reader))


@on_both_loops
async def test_a_drain_has_an_end() -> None:
    async with (
        RawUpstream(_streams(asyncio.Event())) as upstream,
        Hop(upstream.url, disconnect_drain_s=0.1) as hop,
    ):
        assert (await _left(hop, b"<first>")).outcome is Outcome.CLIENT_LEFT
        assert hop.counts.limits == ["disconnect_drain"]


def _over(reader: asyncio.StreamReader) -> bool:
    return reader.at_eof() or reader.exception() is not None


@on_both_loops
async def test_an_upload_cut_short_is_stopped() -> None:
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        for framing in (b"Content-Length: 10", b"Transfer-Encoding: chunked"):
            client = await hop.client()
            await client.send(b"POST /model HTTP/1.1\r\nHost: me\r\n" + framing + b"\r\n\r\n3\r\nabc\r\n")
            count = len(hop.recorder.records) + 1
            await until(lambda: upstream.connections == len(hop.recorder.records) + 1)
            await client.close()
            exchange = await hop.recorder.ended(count)
            assert (exchange.outcome, exchange.status) == (Outcome.CLIENT_LEFT, None)
            await until(partial(_over, upstream.open[count - 1].reader))


@on_both_loops
async def test_left_while_connecting() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
        async with Hop(f"http://127.0.0.1:{full.getsockname()[1]}") as hop:
            client = await hop.client()
            await client.send(GET)
            await hop.recorder.let_in()
            await client.close()
            exchange = await hop.recorder.ended()
            assert (exchange.outcome, exchange.status) == (Outcome.CLIENT_LEFT, None)
        for filler in fillers:
            filler.close()


@on_both_loops
async def test_left_while_the_record_is_written() -> None:
    async with RawUpstream(answering(reply(b"whole"))) as upstream, Hop(upstream.url) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(GET)
        await hop.recorder.ended()
        client.reset()
        await until(lambda: hop.counts.connections == 0)
        hop.recorder.let_go()
        assert hop.recorder.records[0].outcome is Outcome.COMPLETE


@pytest.mark.usefixtures("with_care")
@on_both_loops
async def test_an_error_after_the_first_byte_adds_nothing_to_the_stream(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """aiohttp would write a whole 500 into it."""
    go = asyncio.Event()
    async with RawUpstream(_streams(go, b"more")) as upstream, Hop(upstream.url) as hop:
        client = await hop.client()
        await client.send(GET)
        await client.until(b"<first>\r\n")

        def broken(self: UpstreamResponse, data: bytes) -> None:
            raise RuntimeError("a fault of ours")

        monkeypatch.setattr(UpstreamResponse, "feed", broken)
        go.set()
        with pytest.raises((ConnectionResetError, EOFError)):
            await client.until(b"HTTP/1.1")
        assert client.seen == b""
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.status) == (Outcome.UPSTREAM_BROKE, 200)
        assert "a fault of ours" in caplog.text

        await hop.call(GET)  # before the first byte there is room for an answer
        assert (await hop.recorder.ended(2)).status == 500


@pytest.mark.usefixtures("with_care")
@on_both_loops
async def test_a_fault_before_a_call_is_let_in(caplog: pytest.LogCaptureFixture) -> None:
    def attribute(*args: object) -> tuple[None, dict[str, str]]:
        raise RuntimeError("a fault of ours")

    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        rest = hop.proxy._hop.rest  # type: ignore[union-attr]
        rest.reading = replace(rest.reading, attribute=attribute)
        head, _ = await hop.call(GET)
        assert head[:12] == b"HTTP/1.1 500"
        assert hop.recorder.admitted == []
        assert "a fault of ours" in caplog.text
