"""Who pays is read from the message that the upstream gets, whatever a client writes beside it or however it spells it.

Each case goes over the wire: the upstream gets the client's bytes, and the record names whom the upstream means.
"""

from __future__ import annotations

import pytest
from support.rawhttp import Hop, RawUpstream, answering, fields_of, on_both_loops, reply

from sidecar.model.exchange import Exchange
from sidecar.model.grammar import Source
from sidecar.proxy.route import Routes
from sidecar.proxy.subscriber import Attributor

KEY = b"k" * 32
ACME = b"x-tenant: acme\r\n"
TRACE = b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"


def attributor(*sources: str, base: str = "", anomalies: list[str] | None = None, **dimensions: str) -> Attributor:
    return Attributor(
        sources=[Source.parse(source) for source in sources],
        dimensions=dimensions,
        hash_key=KEY,
        base=base,
        anomaly=([] if anomalies is None else anomalies).append,
    )


async def called(request: bytes, attribute: Attributor, *, base: str = "") -> tuple[Exchange, bytes]:
    """The record of one call, and what the upstream got of it."""
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream:
        routes = Routes(["/t/{tenant}/x", "/health"])
        async with Hop(upstream.url + base, attribute=attribute, route=routes.match) as hop:
            head, _ = await hop.call(request)
            assert head.startswith(b"HTTP/1.1 200 ")
            exchange = await hop.recorder.ended()
    return exchange, seen[0]


def payer(exchange: Exchange) -> str | None:
    return None if exchange.subscriber is None else exchange.subscriber.id


def get(target: bytes, fields: bytes = b"") -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: me\r\n%b\r\n" % (target, fields)


@pytest.mark.parametrize(
    ("target", "sent"),
    [
        (b"/t/acme/x", b"/t/acme/x"),
        (b"http://victim/t/acme/x", b"/t/acme/x"),
        (b"http://victim:80/t/acme/x", b"/t/acme/x"),
        (b"http://u:p@victim/t/acme/x", b"/t/acme/x"),
        (b"HTTP://victim/t/acme/x?y", b"/t/acme/x?y"),
        (b"/a/victim/../../t/acme/x", b"/a/victim/../../t/acme/x"),
        (b"/a/victim/%2e%2e/%2E./t/acme/x", b"/a/victim/%2e%2e/%2E./t/acme/x"),
        (b"/./t/acme/x", b"/./t/acme/x"),
        (b"//t/acme/x", b"//t/acme/x"),
        (b"/t//acme/x", b"/t//acme/x"),
        (b"/%74/%61cme/x", b"/%74/%61cme/x"),
        (b"/../t/acme/x", b"/../t/acme/x"),
    ],
)
@pytest.mark.parametrize("base", ["", "/api"])
@on_both_loops
async def test_the_path_names_whom_the_upstream_takes_it_for(target: bytes, sent: bytes, base: str) -> None:
    if base and target.startswith(b"/../"):
        target, sent = b"/../api/t/acme/x", b"/../api/t/acme/x"
    exchange, seen = await called(get(target), attributor("path:2", base=base), base=base)
    assert payer(exchange) == "acme"
    assert exchange.route == "/t/{tenant}/x"
    assert seen.startswith(b"GET %b%b HTTP/1.1\r\n" % (base.encode(), sent))  # as the client spelled it


@pytest.mark.parametrize(
    ("target", "expected", "anomalies"),
    [
        (b"/x?tenant=acme", "acme", []),
        (b"/x?%74enant=acme", "acme", []),
        (b"/x?ten%61nt=ac%6De", "acme", []),
        (b"http://victim?tenant=acme", "acme", []),
        (b"http://tenant=victim/x?tenant=acme", "acme", []),
        (b"/x#?tenant=victim", None, []),
        (b"/x?tenant=acme&tenant=acme", "acme", []),
        (b"/x?tenant=acme&%74enant=victim", None, ["query_repeated"]),
        (b"/x?tenant=victim&tenant=acme", None, ["query_repeated"]),
        (b"/x?tenant=&tenant=acme", None, ["query_repeated"]),
        (b"/x?TENANT=victim&tenant=acme", "acme", []),
        (b"/x?tenant=", None, []),
        (b"/tenant=victim", None, []),
    ],
)
@on_both_loops
async def test_a_query_name_in_any_spelling(target: bytes, expected: str | None, anomalies: list[str]) -> None:
    seen: list[str] = []
    exchange, _ = await called(get(target), attributor("query:tenant", anomalies=seen))
    assert (payer(exchange), seen) == (expected, anomalies)


@on_both_loops
async def test_an_ambiguous_query_leaves_it_to_the_next_source() -> None:
    request = get(b"/x?tenant=victim&tenant=acme", b"Authorization: Bearer k\r\n")
    exchange, _ = await called(request, attributor("query:tenant", "header:authorization"))
    assert exchange.subscriber is not None
    assert exchange.subscriber.source == "header:authorization"


@pytest.mark.parametrize(
    ("fields", "expected", "anomalies"),
    [
        (ACME, "acme", []),
        (b"x-tenant: victim\r\n" + ACME, "acme", ["header_repeated"]),
        (ACME + ACME, "acme", []),
        (b"x-tenant:\r\n" + ACME, "acme", ["header_repeated"]),
        (b"x-tenant: victim\r\nX-Tenant:\r\n", None, ["header_repeated"]),
        (b"x-tenant: acme, victim\r\n", "acme, victim", []),
        (b"Connection: x-tenant\r\nx-tenant: victim\r\n", None, []),
        (b"Connection: close, X-TENANT\r\nx-tenant: victim\r\n", None, []),
        (b"x-tenant: victim\r\nConnection: close\r\nConnection:\tx-tenant ,\r\n", None, []),
        (b"Connection: keep-alive, x-other\r\n" + ACME, "acme", []),
        (b"x_tenant: victim\r\n" + ACME, "acme", []),
    ],
)
@on_both_loops
async def test_a_header_counts_where_it_is_passed_on(fields: bytes, expected: str | None, anomalies: list[str]) -> None:
    seen: list[str] = []
    exchange, sent = await called(get(b"/x", fields), attributor("header:x-tenant", anomalies=seen))
    assert (payer(exchange), seen) == (expected, anomalies)
    passed = [value for name, value in fields_of(sent) if name.lower() == b"x-tenant"]
    assert (passed[-1].decode() or None if passed else None) == expected


@on_both_loops
async def test_nothing_is_recorded_of_a_field_that_connection_takes_out() -> None:
    """Who pays, dimensions, agent, trace, and whether the call may go twice: of none does the upstream know."""
    named = b"Connection: authorization, x-feature, user-agent, traceparent, idempotency-key, x-forwarded-for\r\n"
    fields = b"Authorization: Bearer k\r\nX-Feature: f\r\nUser-Agent: me/1\r\nIdempotency-Key: i\r\n" + TRACE
    attribute = attributor("header:authorization", "jwt:sub", feature="x-feature")
    exchange, sent = await called(get(b"/x", named + fields), attribute)
    assert (exchange.subscriber, exchange.dimensions) == (None, {})
    assert (exchange.user_agent, exchange.trace_id) == (None, None)
    assert b"k\r\n" not in sent
    exchange, _ = await called(get(b"/x", fields), attribute)
    assert payer(exchange)
    assert (exchange.dimensions, exchange.user_agent) == ({"feature": "f"}, "me/1")
    assert exchange.trace_id == "0af7651916cd43dd8448eb211c80319c"


@on_both_loops
async def test_a_dropped_idempotency_key_makes_no_call_go_twice() -> None:
    async def script(conversation) -> None:  # type: ignore[no-untyped-def]
        await conversation.message()
        await conversation.send(reply(b"first"))
        await conversation.message()
        conversation.reset()

    post = b"POST /x HTTP/1.1\r\nHost: me\r\n%bIdempotency-Key: k\r\nContent-Length: 2\r\n\r\nhi"
    async with RawUpstream(script) as upstream, Hop(upstream.url) as hop:
        assert (await hop.call(get(b"/x")))[1] == b"first"
        head, _ = await hop.call(post % b"Connection: idempotency-key\r\n")
        assert head.startswith(b"HTTP/1.1 502 ")
        assert hop.counts.retries == 0


@on_both_loops
async def test_the_host_of_an_absolute_target_stands_above_the_field() -> None:
    request = b"GET http://acme.example/x HTTP/1.1\r\nHost: victim.example\r\n\r\n"
    exchange, sent = await called(request, attributor("header:host"))
    assert payer(exchange) == "acme.example"
    assert b"X-Forwarded-Host: acme.example\r\n" in sent
    exchange, _ = await called(b"GET /x HTTP/1.1\r\nHost: acme.example\r\n\r\n", attributor("header:host"))
    assert payer(exchange) == "acme.example"


@pytest.mark.parametrize(
    ("value", "same"),
    [
        (b"Bearer REAL", True),
        (b"bearer REAL", True),
        (b"BEARER REAL", True),
        (b"Bearer\tREAL", True),
        (b"Bearer   REAL  ", True),
        (b"Bearer \t REAL", True),
        (b"Bearer\xa0REAL", True),
        (b"token REAL", True),
        (b"REAL", True),
        (b"Bearer OTHER", False),
        (b"BearerREAL", False),
    ],
)
@on_both_loops
async def test_one_key_is_one_subscriber(value: bytes, same: bool) -> None:
    attribute = attributor("header:authorization")
    exchange, _ = await called(get(b"/x", b"Authorization: %b\r\n" % value), attribute)
    real, _ = attribute([(b"Authorization", b"Bearer REAL")], "/", None)
    assert (exchange.subscriber == real) is same


@on_both_loops
async def test_a_made_up_credential_beside_the_real_one_changes_nothing_and_is_counted() -> None:
    seen: list[str] = []
    attribute = attributor("credential", anomalies=seen)
    real = b"Authorization: Bearer REAL\r\n"
    plain, _ = await called(get(b"/x", real), attribute)
    assert seen == []
    for made_up in (b"x-api-key: made-up\r\n", b"api-key: %b\r\n" % (b"z" * 300), b"x-goog-api-key: a\r\n"):
        for fields in (made_up + real, real + made_up):
            exchange, _ = await called(get(b"/x", fields), attribute)
            assert exchange.subscriber == plain.subscriber
    assert seen == ["credentials_conflict"] * 6
    same, _ = await called(get(b"/x", b"x-api-key: REAL\r\n" + real), attribute)
    assert same.subscriber == plain.subscriber
    assert len(seen) == 6  # twice the same is no conflict
