"""What a client or an upstream can put into a record is bounded, to be seen as cut, and counted.

The traffic is not: every byte of it goes on.
"""

from __future__ import annotations

import json

import pytest
from support.rawhttp import Conversation, Hop, RawUpstream, answering, field_of, fields_of, on_both_loops, reply

from sidecar.model.exchange import (
    HEADER_NAME_CHARS_MAX,
    HEADER_NAMES_CHARS_MAX,
    URL_CHARS_MAX,
    USAGE_CHARS_MAX,
    USER_AGENT_CHARS_MAX,
)
from sidecar.model.record import encode
from sidecar.proxy.subscriber import DIMENSION_CHARS_MAX, Attributor
from sidecar.usage.readers import UsageTaps

LONG = b"a" * 8_000
RECORD_BYTES_MAX = 24_576  # with every field at its bound; the names of header fields make a third of it


@on_both_loops
async def test_what_a_client_chooses() -> None:
    seen: list[bytes] = []
    anomalies: list[str] = []
    attribute = Attributor(sources=[], dimensions={"d": "x-d"}, hash_key=b"k" * 32, anomaly=anomalies.append)
    fields = b"User-Agent: %b\r\nX-D: %b\r\nX-%b: 1\r\n" % (LONG, LONG, LONG)
    target = b"/%b?%b&b=2" % (LONG, b"&".join(b"n%d=v" % n for n in range(200)))
    async with RawUpstream(answering(reply(), seen=seen)) as upstream, Hop(upstream.url, attribute=attribute) as hop:
        await hop.call(b"GET %b HTTP/1.1\r\nHost: me\r\n%b\r\n" % (target, fields))
        exchange = await hop.recorder.ended()
    assert seen[0].startswith(b"GET %b HTTP/1.1\r\n" % target)
    assert fields in seen[0]
    for text, chars in (
        (exchange.url, URL_CHARS_MAX),
        (exchange.user_agent or "", USER_AGENT_CHARS_MAX),
        (exchange.dimensions["d"], DIMENSION_CHARS_MAX),
        (max(exchange.request_headers, key=len), HEADER_NAME_CHARS_MAX),
    ):
        assert len(text) == chars
        assert text.endswith("a…")
    assert set(hop.counts.limits) == {"url_chars", "user_agent_chars", "header_name_chars"}
    assert anomalies == ["dimension_cut"]


@on_both_loops
async def test_what_fits_is_kept_whole_and_not_counted() -> None:
    path = "/" + "p" * 1_000
    agent = "u" * USER_AGENT_CHARS_MAX
    name = "X" * HEADER_NAME_CHARS_MAX
    async with RawUpstream(answering(reply())) as upstream, Hop(upstream.url) as hop:
        await hop.call(f"GET {path} HTTP/1.1\r\nHost: me\r\nUser-Agent: {agent}\r\n{name}: 1\r\n\r\n".encode())
        exchange = await hop.recorder.ended()
    assert exchange.url.endswith(path)
    assert exchange.user_agent == agent
    assert name in exchange.request_headers
    assert hop.counts.limits == []


@on_both_loops
async def test_names_of_fields_are_bounded_together_on_both_sides() -> None:
    def fields(count: int, length: int) -> bytes:
        return b"".join(b"N%03d%b: 1\r\n" % (number, b"n" * (length - 4)) for number in range(count))

    seen: list[bytes] = []
    many = fields(100, 64)
    async with RawUpstream(answering(reply(fields=many), seen=seen)) as upstream, Hop(upstream.url) as hop:
        head, _ = await hop.call(b"GET /x HTTP/1.1\r\nHost: me\r\n" + many + b"\r\n")
        exchange = await hop.recorder.ended()
    assert many in seen[0]
    assert many in head
    for names in (exchange.request_headers, exchange.response_headers):
        assert names[-1] == "…"
        assert HEADER_NAMES_CHARS_MAX - 64 < sum(map(len, names)) <= HEADER_NAMES_CHARS_MAX + 1
        assert names[-2].startswith("N06")
    assert hop.counts.limits == ["header_names_chars"] * 2
    few = fields(100, 40)
    async with RawUpstream(answering(reply(fields=few))) as upstream, Hop(upstream.url) as hop:
        await hop.call(b"GET /x HTTP/1.1\r\nHost: me\r\n" + few + b"\r\n")
        exchange = await hop.recorder.ended()
    assert len(exchange.request_headers) == 101
    assert len(exchange.response_headers) == 101
    assert hop.counts.limits == []


@on_both_loops
async def test_what_an_upstream_chooses() -> None:
    body = json.dumps(
        {
            "id": "i" * 5_000,
            "object": "chat.completion",
            "model": "m" * 5_000,
            "service_tier": "t" * 5_000,
            "choices": [{"index": 0, "finish_reason": "f" * 5_000}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        }
    ).encode()
    fields = b"Content-Type: application/json\r\nX-%b: 1\r\nx-request-id: %b\r\n" % (LONG, LONG)
    call = b"POST /v1/chat/completions HTTP/1.1\r\nHost: me\r\nContent-Length: %d\r\n\r\n%b"
    asked = json.dumps({"model": "r" * 5_000}).encode()
    async with RawUpstream(answering(reply(body, fields=fields))) as upstream:
        async with Hop(upstream.url, taps=UsageTaps()) as hop:
            head, passed = await hop.call(call % (len(asked), asked))
            exchange = await hop.recorder.ended()
    assert passed == body
    assert fields in head
    usage = exchange.usage
    assert usage is not None
    assert usage.total_tokens == 3
    for text in (usage.model, usage.request_model, usage.response_id, usage.service_tier, *usage.finish_reasons):
        assert text is not None
        assert len(text) == USAGE_CHARS_MAX
        assert text.endswith("…")
    assert usage.upstream_request_id is not None
    assert usage.upstream_request_id.endswith("…")
    assert max(map(len, exchange.response_headers)) == HEADER_NAME_CHARS_MAX
    assert {"usage_chars", "header_name_chars"} <= set(hop.counts.limits)
    assert len(encode(exchange, seq=1, instance="i")) < RECORD_BYTES_MAX


@on_both_loops
async def test_a_model_in_the_path() -> None:
    model = b"m" * 3_000
    answer = json.dumps({"candidates": [], "usageMetadata": {"promptTokenCount": 1, "totalTokenCount": 1}}).encode()
    async with RawUpstream(answering(reply(answer))) as upstream, Hop(upstream.url, taps=UsageTaps()) as hop:
        await hop.call(
            b"POST /v1beta/models/%b:generateContent HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\n\r\n{}" % model
        )
        exchange = await hop.recorder.ended()
    assert exchange.usage is not None
    assert exchange.usage.request_model == "m" * (USAGE_CHARS_MAX - 1) + "…"
    assert hop.counts.limits.count("usage_chars") == 1


@pytest.mark.parametrize("cut", [False, True])
@on_both_loops
async def test_the_largest_record(cut: bool) -> None:
    """As many names as a head may have, each as long as it may be."""
    fields = b"".join(b"X-%b-%d: 1\r\n" % (b"n" * 400 if cut else b"n" * 100, n) for n in range(120))
    back = b"".join(b"Y-%b-%d: 1\r\n" % (b"n" * 400 if cut else b"n" * 100, n) for n in range(250))
    async with RawUpstream(answering(reply(fields=back))) as upstream, Hop(upstream.url) as hop:
        await hop.call(b"GET /%b HTTP/1.1\r\nHost: me\r\n%b\r\n" % (LONG, fields))
        exchange = await hop.recorder.ended()
    assert len(encode(exchange, seq=1, instance="i")) < RECORD_BYTES_MAX


@pytest.mark.parametrize("name", [b"X-Meter-Id", b"x-meter-id", b"X-METER-ID"])
@on_both_loops
async def test_the_meter_id_is_ours_alone_where_it_is_told(name: bytes) -> None:
    """The setting adds the field: one of the upstream's beside it, or in its trailers, could be taken for it."""
    theirs = b"%b: forged\r\n" % name

    async def script(conversation: Conversation) -> None:
        await conversation.head()
        await conversation.send(b"HTTP/1.1 103 Early Hints\r\n" + theirs + b"Link: </x>\r\n\r\n")
        await conversation.send(b"HTTP/1.1 200 OK\r\n" + theirs + b"A: 1\r\nTransfer-Encoding: chunked\r\n\r\n")
        await conversation.send(b"2\r\nok\r\n0\r\n" + theirs + b"B: 2\r\n\r\n")

    request = b"GET /x HTTP/1.1\r\nHost: me\r\nX-Meter-Id: mine\r\n\r\n"
    async with RawUpstream(script) as upstream, Hop(upstream.url, meter_id_header=True) as hop:
        client = await hop.client()
        await client.send(request)
        hints = await client.head()
        head, body = await client.message()
        exchange = await hop.recorder.ended()
    assert field_of(head, b"X-Meter-Id") == exchange.id.encode()
    assert field_of(hints, b"X-Meter-Id") is None
    assert b"forged" not in hints + head + body
    assert b"B: 2\r\n" in body
    assert field_of(head, b"A") == b"1"
    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:  # not told: nothing is taken out
        client = await hop.client()
        await client.send(request)
        hints = await client.head()
        head, body = await client.message()
    assert [value for key, value in fields_of(head) if key == name] == [b"forged"]
    assert theirs in hints
    assert theirs in body
