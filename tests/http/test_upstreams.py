"""Several upstreams behind one port, over real sockets and TLS: who gets which call with which key, what comes back,
what is recorded, and how each one's faults are told."""

from __future__ import annotations

import datetime
import logging
import socket
import ssl
from pathlib import Path
from typing import Any

import pytest
import trustme
from support.rawhttp import Hop, Outcome, RawUpstream, answering, field_of, on_both_loops, reply

from sidecar.settings import Route, UpstreamSettings
from sidecar.settings.upstreams import from_tables


def several(*tables: dict[str, Any]) -> tuple[UpstreamSettings, ...]:
    found, problems = from_tables(tables)
    assert problems == []
    return found


def get(path: bytes, fields: bytes = b"") -> bytes:
    return b"GET %b HTTP/1.1\r\nHost: me\r\nX-Tenant: acme\r\n%b\r\n" % (path, fields)


@on_both_loops
async def test_two_vendors_on_one_port_each_with_its_own_key(tmp_path: Path) -> None:
    keys = {name: tmp_path / name for name in ("openai", "anthropic")}
    keys["openai"].write_text("sk-openai\n")
    keys["anthropic"].write_text("sk-ant\n")
    seen: dict[str, list[bytes]] = {"openai": [], "anthropic": [], "rest": []}
    authority = trustme.CA()
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    async with (
        RawUpstream(answering(reply(b"gpt"), seen=seen["openai"]), tls=context) as openai,
        RawUpstream(answering(reply(b"claude"), seen=seen["anthropic"])) as anthropic,
        RawUpstream(answering(reply(b"rest"), seen=seen["rest"])) as rest,
    ):
        named = several(
            {
                "name": "openai",
                "prefix": "/openai",
                "url": openai.url + "/base",
                "ca_file": str(ca),
                "set_headers": {"authorization": f"Bearer file:{keys['openai']}"},
                "remove_headers": ["x-tenant"],
            },
            {
                "name": "anthropic",
                "prefix": "/anthropic",
                "url": anthropic.url,
                "set_headers": {"x-api-key": f"file:{keys['anthropic']}"},
            },
        )
        async with Hop(rest.url, upstreams=named) as hop:
            client = await hop.client()
            calls = [
                (b"/openai/v1/x?q=1", b"gpt"),
                (b"/anthropic/v1/y", b"claude"),
                (b"/v1/z", b"rest"),
                (b"/openaix", b"rest"),
            ] * 4
            for path, body in calls:
                await client.send(get(path, b"authorization: Bearer client\r\n"))
                assert (await client.message())[1] == body
            assert (openai.connections, anthropic.connections, rest.connections) == (1, 1, 1)
            assert hop.recorder.plain_calls >= 6
            for request in seen["openai"]:
                assert request.startswith(b"GET /base/v1/x?q=1 HTTP/1.1\r\n")
                assert request.lower().count(b"authorization:") == 1
                assert field_of(request, b"authorization") == b"Bearer sk-openai"
                assert b"acme" not in request
                assert field_of(request, b"host") == openai.url.removeprefix("https://").encode()
            for request in seen["anthropic"]:
                assert field_of(request, b"x-api-key") == b"sk-ant"
                assert field_of(request, b"authorization") == b"Bearer client"
                assert request.startswith(b"GET /v1/y HTTP/1.1\r\n")
            assert all(b"sk-" not in request for request in seen["rest"])
            # Read again: the next call has the new key, and one that is gone leaves the old.
            keys["openai"].write_text("sk-new")
            keys["anthropic"].unlink()
            problems = hop.proxy.reload_secrets()
            assert len(problems) == 1
            assert "sk-" not in problems[0]
            for path in (b"/openai/v1/x?q=1", b"/anthropic/v1/y"):
                await client.send(get(path, b"authorization: Bearer client\r\n"))
                await client.message()
            assert field_of(seen["openai"][-1], b"authorization") == b"Bearer sk-new"
            assert field_of(seen["anthropic"][-1], b"x-api-key") == b"sk-ant"
        records = hop.recorder.records
        assert [one.upstream for one in records[:4]] == ["openai", "anthropic", "default", "default"]
        assert records[0].url == openai.url + "/base/v1/x?q"
        assert {one.subscriber.id for one in records if one.subscriber is not None} == {"acme"}
        assert all(one.subscriber is not None for one in records)
        assert records[0].request_headers == ["Host", "X-Tenant", "authorization"]
        assert "sk-" not in repr(records)


@on_both_loops
async def test_what_matches_none_is_refused_by_us_and_recorded() -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(), seen=seen)) as upstream:
        named = several({"name": "a", "prefix": "/a", "url": upstream.url})
        async with Hop(None, upstreams=named) as hop:
            for _ in range(3):
                answer = await hop.last(get(b"/b?key=1"))
                assert answer.startswith(b"HTTP/1.1 404 Not Found\r\n")
                assert b"no upstream is set for this path or host" in answer
            assert (await hop.call(get(b"/a/b")))[0].startswith(b"HTTP/1.1 200")
        refused = hop.recorder.records[0]
        assert (refused.outcome, refused.status, refused.upstream) == (Outcome.REFUSED, 404, None)
        assert refused.url == "/b?key"
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        (b"%b/base/v1/x", b"http://me/up/v1/x"),
        (b"/base/v1/x", b"/up/v1/x"),
        (b"/elsewhere", b"/elsewhere"),
        (b"x", b"x"),
        (b"https://vendor.test/v1", b"https://vendor.test/v1"),
    ],
)
@on_both_loops
async def test_redirects_lead_back_through_the_prefix_and_cookies_stay(location: bytes, expected: bytes) -> None:
    fields: list[bytes] = []

    async def script(conversation: Any) -> None:
        await conversation.head()
        await conversation.send(reply(b"", b"302 Found", fields[0]))

    async with RawUpstream(script) as upstream:
        url = upstream.url.encode()
        fields.append(b"Location: %b\r\nSet-Cookie: a=b; Path=/v1\r\n" % (location.replace(b"%b", url)))
        named = several({"name": "up", "prefix": "/up", "url": upstream.url + "/base"})
        async with Hop(None, upstreams=named) as hop:
            head, _ = await hop.call(get(b"/up/v1/y"))
            assert field_of(head, b"location") == expected
            assert field_of(head, b"set-cookie") == b"a=b; Path=/v1"


@on_both_loops
async def test_a_host_chooses_an_upstream_and_a_route_has_its_own_time() -> None:
    async def silent(conversation: Any) -> None:
        while True:
            await conversation.message()

    seen: list[bytes] = []
    async with RawUpstream(silent) as slow, RawUpstream(answering(reply(b"there"), seen=seen)) as quick:
        named = several(
            {"name": "slow", "prefix": "/slow", "url": slow.url, "timeout_s": 0.1},
            {"name": "quick", "host": "quick.internal", "url": quick.url},
        )
        routes = (Route(pattern="/soon", timeout_s=0.1),)
        async with Hop(slow.url, upstreams=named, routes=routes) as hop:
            request = get(b"/slow/x").replace(b"Host: me", b"Host: Quick.Internal:99")
            assert (await hop.call(request))[1] == b"there"
            assert seen[0].startswith(b"GET /slow/x ")
            assert (await hop.call(get(b"/slow/x")))[0].startswith(b"HTTP/1.1 504")
            assert (await hop.call(get(b"/soon")))[0].startswith(b"HTTP/1.1 504")
        assert [one.upstream for one in hop.recorder.records] == ["quick", "slow", "default"]


@on_both_loops
async def test_a_route_that_is_not_recorded_is_served_and_counted() -> None:
    seen: list[bytes] = []
    async with RawUpstream(answering(reply(b"well"), seen=seen)) as upstream:
        routes = (Route(pattern="/healthz", record=False),)
        async with Hop(upstream.url, routes=routes, meter_id_header=True) as hop:
            client = await hop.client()
            for path in (b"/healthz", b"/x") * 5:
                await client.send(get(path))
                head, body = await client.message()
                assert body == b"well"
                assert (b"X-Meter-Id" in head) is (path == b"/x")
            assert (await hop.call(get(b"/healthz").replace(b"GET", b"HEAD"), head_only=True))[0][
                :12
            ] == b"HTTP/1.1 200"
        assert hop.counts.not_recorded_routes == ["/healthz"] * 6
        assert [one.route for one in hop.recorder.records] == ["/x"] * 5


def expired_server(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    past = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    authority.issue_cert("localhost", not_before=past, not_after=past + datetime.timedelta(days=1)).configure_cert(
        context
    )
    return context


@on_both_loops
async def test_each_upstreams_faults_are_told_by_its_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    authority = trustme.CA()
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    free = socket.socket()
    free.bind(("127.0.0.1", 0))  # taken, and nobody listens

    async def cut(conversation: Any) -> None:
        await conversation.head()
        conversation.writer.transport.abort()

    async def odd(conversation: Any) -> None:
        await conversation.head()
        await conversation.send(b"SSH-2.0-OpenSSH_9\r\n\r\n")

    async with (
        RawUpstream(cut) as cutting,
        RawUpstream(odd) as speaking,
        RawUpstream(odd, tls=expired_server(authority)) as expired,
    ):
        urls = {
            "refused": f"http://127.0.0.1:{free.getsockname()[1]}",
            "dns": "http://nowhere.invalid",
            "reset": cutting.url,
            "not_http": speaking.url,
            "tls": expired.url,
        }
        named = several(
            *(
                {"name": f"the-{why}", "prefix": f"/{why}", "url": url} | ({"ca_file": str(ca)} if why == "tls" else {})
                for why, url in urls.items()
            )
        )
        with caplog.at_level(logging.WARNING, "sidecar"):
            async with Hop(None, upstreams=named) as hop:
                for why in urls:
                    for _ in range(2):
                        head, _ = await hop.call(get(b"/%b/x" % why.encode()))
                        assert head.startswith(b"HTTP/1.1 502")
    free.close()
    assert list(zip(hop.counts.failures, hop.counts.failed_upstreams, strict=True)) == [
        (why, f"the-{why}") for why in urls for _ in range(2)
    ]
    for place, why in enumerate(urls):
        record = hop.recorder.records[2 * place]
        assert record.upstream == f"the-{why}"
        assert record.error is not None
        assert record.error.endswith(f"({why})")
    told = [record for record in caplog.records if "gives no response" in record.getMessage()]
    assert [record.getMessage().split(" gives")[0] for record in told] == [f"the upstream the-{why}" for why in urls]
    assert any("certificate has expired" in record.getMessage() for record in told)
