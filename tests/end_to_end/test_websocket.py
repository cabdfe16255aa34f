"""Model answers over WebSocket: the tunnel's bytes stay as they are, and each message with usage is a record."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from support.rawhttp import Conversation, Hop, Outcome, RawUpstream, on_both_loops, until
from support.usage_samples import Sample, differences, load
from support.whole import Whole
from support.wsframes import Packer, fragments, frame
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from sidecar.model.exchange import Exchange
from sidecar.usage.readers import UsageTaps

SAMPLES = load()
REALTIME, LIVE = SAMPLES["openai_realtime.ws.jsonl"], SAMPLES["gemini_live.ws.jsonl"]
MASK = b"\x01\x02\x03\x04"
ASK = (
    b"GET %b HTTP/1.1\r\nHost: me\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nX-Tenant: acme\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
AGREE = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n%b\r\n"
DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"
DONE = (
    b'{"type":"response.done","response":{"id":"resp_%d","status":"completed",'
    b'"usage":{"input_tokens":%d,"output_tokens":1,"total_tokens":%d}}}'
)


def done(number: int) -> bytes:
    return frame(DONE % (number, number, number + 1))


def judge(sample: Sample, records: list[Exchange]) -> None:
    """The children, in order, and the parent behind them."""
    *children, parent = records
    assert sample.records is not None
    assert len(children) == len(sample.records)
    for child, expected in zip(children, sample.records, strict=True):
        assert child.usage is not None
        assert not differences(child.usage, expected)
        assert child.parent_id == parent.id
        assert child.subscriber == parent.subscriber
        assert child.url == parent.url
        assert (child.outcome, child.status, child.response_bytes) == (Outcome.COMPLETE, None, 0)
    assert parent.usage is None
    assert parent.parent_id is None
    assert parent.status == 101


@pytest.mark.parametrize("sample", [REALTIME, LIVE], ids=lambda sample: sample.provider)
@pytest.mark.parametrize("way", ["one piece", "cut anywhere", "fragments", "packed"])
@on_both_loops
async def test_the_samples_through_the_tunnel(sample: Sample, way: str) -> None:
    lines = sample.body.splitlines()
    pack = Packer()
    if way == "packed":
        wire = b"".join(frame(pack(line), reserved=0x40) for line in lines)
    elif way == "fragments":
        wire = b"".join(fragments([line[:7], line[7:90], line[90:]], between=frame(b"", 9)) for line in lines)
    else:
        wire = b"".join(frame(line) for line in lines)
    sent = frame(b'{"setup":{"model":"models/m"}}', mask=MASK)
    agree = AGREE % (DEFLATE if way == "packed" else b"")

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        step = 997 if way == "cut anywhere" else len(wire)
        await conversation.send(agree + (wire[:100] if way == "cut anywhere" else b""))
        assert await conversation.exactly(len(sent)) == sent
        for start in range(100 if way == "cut anywhere" else 0, len(wire), step):
            await conversation.send(wire[start : start + step])
            await asyncio.sleep(0)

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        await client.send(ASK % sample.path.encode())
        assert await client.head() == agree
        await client.send(sent)
        assert await client.rest() == wire
        assert sample.records is not None
        await hop.recorder.ended(len(sample.records) + 1)
        judge(sample, hop.recorder.records)


@on_both_loops
async def test_the_message_waits_for_its_record_and_what_follows_for_its_turn() -> None:
    go = asyncio.Event()

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"" + frame(b"hello"))
        await go.wait()
        await conversation.send(done(1) + done(2))
        assert await conversation.exactly(3) == b"\x81\x80M"  # the other way goes on
        await conversation.send(frame(b"behind"))

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(ASK % b"/v1/realtime")
        await client.head()
        assert await client.exactly(7) == frame(b"hello")
        go.set()
        await until(lambda: len(hop.recorder.held) == 2)
        await client.send(b"\x81\x80M")
        assert await client.silent()
        hop.recorder.held.pop(0)(True)
        assert await client.silent()
        hop.recorder.let_go()
        assert await client.exactly(len(done(1) + done(2) + frame(b"behind"))) == done(1) + done(2) + frame(b"behind")
        await until(lambda: bool(hop.recorder.held))
        hop.recorder.let_go()
        assert await client.rest() == b""
        assert [r.outcome for r in hop.recorder.records] == [Outcome.COMPLETE] * 3


@on_both_loops
async def test_the_upstreams_end_waits_behind_the_message() -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"" + done(1))

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(ASK % b"/v1/realtime")
        await client.head()
        await until(lambda: bool(hop.recorder.held))
        assert await client.silent()
        hop.recorder.let_go()
        await until(lambda: bool(hop.recorder.held))
        hop.recorder.let_go()
        assert await client.rest() == done(1)
        assert len(hop.recorder.records) == 2


@pytest.mark.parametrize("when", ["before", "while it waits"])
@on_both_loops
async def test_without_a_record_the_message_is_not_passed_on(when: str) -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"")
        await conversation.exactly(1)
        await conversation.send(done(1))
        await conversation.until(b"never")

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        await client.send(ASK % b"/v1/realtime")
        await client.head()
        if when == "before":
            hop.recorder.full = True
        else:
            hop.recorder.hold = True
        await client.send(b"!")
        if when != "before":
            await until(lambda: bool(hop.recorder.held))
            hop.recorder.let_go(False)
        with pytest.raises(ConnectionError):
            await client.rest()
        await until(lambda: hop.recorder.records[-1].parent_id is None if hop.recorder.records else False)
        assert hop.recorder.records[-1].outcome is Outcome.STOPPED
        assert hop.counts.limits == ["spool_full"]


@pytest.mark.parametrize("rude", [False, True])
@on_both_loops
async def test_the_client_leaves_while_the_message_waits(rude: bool) -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"" + done(1))
        await conversation.rest()

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        hop.recorder.hold = True
        client = await hop.client()
        await client.send(ASK % b"/v1/realtime")
        await client.head()
        await until(lambda: bool(hop.recorder.held))
        if rude:
            client.reset()
        else:
            await client.close()
        await until(lambda: len(hop.recorder.records) == 2)
        hop.recorder.let_go()
        assert hop.recorder.records[0].usage is not None


@pytest.mark.parametrize("junk", [b"\x81\x05no!", b"\xf7\x00", b"\x81\x7f" + b"\xff" * 12])
@on_both_loops
async def test_what_is_no_websocket_passes_all_the_same(junk: bytes) -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"" + junk + done(1))
        assert await conversation.exactly(4) == b"\xff\xff\xff\xff"

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        await client.send(ASK % b"/v1/realtime")
        await client.head()
        await client.send(b"\xff\xff\xff\xff")
        assert await client.rest() == junk + done(1)
        exchange = await hop.recorder.ended()
        assert (exchange.outcome, exchange.usage) == (Outcome.COMPLETE, None)


@pytest.mark.parametrize("compression", ["deflate", None])
async def test_the_websockets_library_on_both_sides(compression: str | None) -> None:
    lines = REALTIME.body.decode().splitlines()

    async def answer(socket: ServerConnection) -> None:
        async for message in socket:
            assert isinstance(message, str)
            for line in lines:
                await socket.send(line)
            await socket.send(iter((lines[-1][:10], lines[-1][10:])))  # in fragments
            await socket.close()

    async with (
        serve(answer, "127.0.0.1", 0, compression=compression) as server,
        Hop(f"http://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}", taps=UsageTaps()) as hop,
    ):
        url = f"ws://127.0.0.1:{hop.port}{REALTIME.path}"
        async with connect(url, compression=compression, proxy=None) as client:
            await client.send(json.dumps({"type": "session.update", "session": {"model": "gpt-realtime-mini"}}))
            received = [message async for message in client]
        assert received == [*lines, lines[-1]]
        await until(lambda: bool(hop.recorder.records) and hop.recorder.records[-1].parent_id is None)
    assert REALTIME.records is not None
    children = hop.recorder.records[:-1]
    assert len(children) >= len(REALTIME.records)
    for child, expected in zip(children, REALTIME.records, strict=False):
        assert child.usage is not None
        assert not differences(child.usage, {key: value for key, value in expected.items() if key != "request_model"})


async def test_a_kill_right_after_the_message_leaves_its_record(tmp_path: Path) -> None:
    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"")
        number = 0
        while True:
            await conversation.exactly(1)
            number += 1
            await conversation.send(done(number))

    async with RawUpstream(script) as upstream:
        whole = Whole(tmp_path / "data", upstream.url)
        async with whole:
            host, _, port = whole.proxy_url.removeprefix("http://").partition(":")
            client = Conversation(*await asyncio.open_connection(host, int(port)))
            await client.send(ASK % b"/v1/realtime?model=gpt-realtime")
            await client.head()
            for number in range(1, 6):
                await client.send(b"!")
                assert await client.exactly(len(done(number))) == done(number)
            await whole.kill()
            client.drop()
            await whole.start()
            balance = await whole.settled()
            records = await whole.records()
            _, usage, _ = await whole.command("usage", "--format", "csv")
            assert await whole.stop() == 0, whole.log.read_text()
    assert balance["holds"], balance
    children = [record for record in records if record["parent_id"] is not None]
    assert [child["usage"]["response_id"] for child in children] == [f"resp_{n}" for n in range(1, 6)]
    assert len({child["parent_id"] for child in children}) == 1
    # The tunnel itself was open: it is settled as unknown where it was old enough to have left its intent.
    for parent in (record for record in records if record["parent_id"] is None):
        assert (parent["id"], parent["outcome"]) == (children[0]["parent_id"], "unknown")
        assert parent["usage"] is None
    assert ",15," in usage  # the sum of 1 to 5


@pytest.mark.parametrize("client_leaves", [False, True])
@on_both_loops
async def test_many_that_count_at_once_are_all_recorded_before_they_leave(client_leaves: bool) -> None:
    """A step of them is read in a turn of the loop; neither the end of the socket nor the client's loses the rest."""
    wire = b"".join(map(done, range(1, 901)))

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(AGREE % b"" + wire)
        if client_leaves:
            await conversation.rest()

    async with RawUpstream(script) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        client = await hop.client()
        await client.send(ASK % b"/v1/realtime")
        await client.head()
        if client_leaves:
            await client.exactly(len(wire))
            client.reset()
        else:
            assert await client.rest() == wire
        await until(lambda: len(hop.recorder.records) == 901)
        counted = [record.usage.input_tokens for record in hop.recorder.records if record.usage is not None]
        assert counted == list(range(1, 901))
