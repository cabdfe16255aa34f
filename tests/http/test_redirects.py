"""A redirect to the upstream's own address comes back through the proxy, and is metered there."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Any

import httpx
import pytest
from support.rawhttp import Conversation, Hop, RawUpstream, answering, field_of, fields_of, on_both_loops, reply


async def _slash(conversation: Conversation) -> None:
    """As FastAPI and Starlette do: an absolute URL out of `Host`."""
    while True:
        head, _ = await conversation.message()
        target, host = head.split(b" ")[1], field_of(head, b"Host")
        if target.endswith(b"/"):
            await conversation.send(reply(b"there"))
        else:
            place = b"Location: http://%b%b/\r\n" % (host or b"", target)
            await conversation.send(reply(b"", status=b"307 Temporary Redirect", fields=place))


@pytest.mark.parametrize(("base", "preserve"), [("", False), ("", True), ("/base", False)])
@pytest.mark.parametrize("forwarded", [{}, {"X-Forwarded-For": "192.0.2.1"}], ids=["direct", "behind"])
@on_both_loops
async def test_a_client_that_follows_comes_back(base: str, preserve: bool, forwarded: dict[str, str]) -> None:
    async with RawUpstream(_slash) as upstream, Hop(upstream.url + base, preserve_host=preserve) as hop:
        async with httpx.AsyncClient(follow_redirects=True, trust_env=False) as client:
            url = f"http://127.0.0.1:{hop.port}/v1/things"
            answer = await client.post(url, headers={"Authorization": "Bearer k", **forwarded}, json={})
        assert (answer.status_code, answer.text) == (200, "there")
        assert str(answer.url) == url + "/"
        assert answer.request.headers["Authorization"] == "Bearer k"
        await hop.recorder.ended(2)
        assert [record.status for record in hop.recorder.records] == [307, 200]
        assert hop.counts.redirects == ([] if preserve else ["rewritten"])


async def redirected(
    fields: bytes,
    request: bytes = b"GET /x HTTP/1.1\r\nHost: me\r\n\r\n",
    base: str = "",
    status: bytes = b"302 Found",
    **rules: Any,
) -> tuple[list[tuple[bytes, bytes]], list[str]]:
    """The fields that the client gets, and what was counted. `OWN` stands for the upstream's authority in both."""
    async with RawUpstream(answering(b"")) as upstream:
        own = b"127.0.0.1:%d" % upstream.port
        upstream._script = answering(reply(b"", status=status, fields=fields.replace(b"OWN", own)))
        async with Hop(upstream.url + base, **rules) as hop:
            head, _ = await hop.call(request)
            await hop.recorder.ended()
            return [(name, value.replace(own, b"OWN")) for name, value in fields_of(head)], hop.counts.redirects


@on_both_loops
async def test_each_field_that_points_and_no_other() -> None:
    fields = (
        b"Location: http://OWN/a\r\nContent-Location: //OWN/b\r\nRefresh: 1; url=http://OWN/c\r\n"
        b"Link: <http://OWN/d>\r\nX-Location: http://OWN/e\r\n"
    )
    got, counted = await redirected(fields)
    assert got == [
        (b"Location", b"http://me/a"),
        (b"Content-Location", b"//me/b"),
        (b"Refresh", b"1; url=http://me/c"),
        (b"Link", b"<http://OWN/d>"),
        (b"X-Location", b"http://OWN/e"),
        (b"Content-Length", b"0"),
    ]
    assert counted == ["rewritten", "rewritten"]
    got, counted = await redirected(b"Location: http://OWN/a\r\n", rewrite_redirects=False)
    assert got[0] == (b"Location", b"http://OWN/a")
    assert counted == ["off"]
    got, counted = await redirected(b"Location: http://other.example/a\r\n")
    assert got[0] == (b"Location", b"http://other.example/a")
    assert counted == []
    got, counted = await redirected(b"Connection: x-a\r\nX-A: 1\r\nLocation: http://OWN/a\r\n", status=b"201 Created")
    assert got[0] == (b"Location", b"http://me/a")
    assert counted == ["rewritten"]


@on_both_loops
async def test_behind_a_proxy() -> None:
    request = b"GET /x HTTP/1.1\r\nHost: in\r\nX-Forwarded-Proto: https\r\nX-Forwarded-Host: api.example\r\n\r\n"
    got, _ = await redirected(b"Location: http://OWN/a\r\n", request, trusted_proxies=(ip_network("127.0.0.0/8"),))
    assert got[0] == (b"Location", b"https://api.example/a")
    got, _ = await redirected(b"Location: http://OWN/a\r\n", request)
    assert got[0] == (b"Location", b"/a")
    got, _ = await redirected(b"Location: http://OWN/a\r\n", b"GET /x HTTP/1.0\r\n\r\n")
    assert got[0] == (b"Location", b"/a")
    got, _ = await redirected(b"Location: http://OWN/base/a\r\n", base="/base")
    assert got[0] == (b"Location", b"http://me/a")
