"""The short way's heads: whatever they accept is what the careful parsers and rewriting make of it, byte for byte."""

from __future__ import annotations

import asyncio
import re
import timeit
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

import httptools
import pytest
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sidecar.model.http_url import UpstreamAddress
from sidecar.proxy import plain_head
from sidecar.proxy.headers import HeaderRules, Peer
from sidecar.proxy.plain_head import (
    CHUNKED,
    LINES_MAX,
    RECENT_MAX,
    SHAPES_MAX,
    VALUES_MAX,
    Aimed,
    PlainMessage,
)
from sidecar.proxy.plain_requests import PlainRequests
from sidecar.proxy.plain_responses import PlainResponses
from sidecar.settings import ProxySettings

Fields = list[tuple[bytes, bytes]]
UPSTREAM = "http://api.example.com:8080/base"


def rules_for(**changes: Any) -> HeaderRules:
    return HeaderRules(ProxySettings(upstream_url=UPSTREAM, **changes), UpstreamAddress.parse(UPSTREAM))


class Careful:
    """Both descriptions, as the careful way makes them."""

    def __init__(self, rules: HeaderRules) -> None:
        self.rules = rules
        self.asked = 0

    def request(self, method: str, target: str, fields: Fields, peer: object) -> tuple[dict[str, Any], bytes] | None:
        self.asked += 1
        assert isinstance(peer, Peer)
        line, authority = self.rules.request_line(method, target)
        head = self.rules.request(fields, peer, authority=authority)
        return {"names": head.names, "agent": head.user_agent, "method": method, "target": target}, line + head.lines

    def response(self, status: int, fields: Fields) -> tuple[dict[str, Any], bytes] | None:
        from sidecar.proxy.headers import ResponseHead

        self.asked += 1
        head = ResponseHead(self.rules, fields, status=status)
        return {"names": head.names, "status": status}, b"".join(head.parts)


class _Flow:
    _reading_paused = False

    def pause_reading(self) -> None: ...
    def resume_reading(self, *_: object, **__: object) -> None: ...


@pytest.fixture(autouse=True, scope="module")
def forms_at_once() -> Iterator[None]:
    before, plain_head.FORM_AFTER = plain_head.FORM_AFTER, 1
    yield
    plain_head.FORM_AFTER = before


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def parsed(loop: asyncio.AbstractEventLoop, data: bytes) -> Any:
    """What the careful parser makes of a request; None where it refuses."""
    parser = HttpRequestParser(
        _Flow(),  # type: ignore[arg-type]
        loop,
        1 << 17,
        max_line_size=1 << 15,
        max_field_size=1 << 15,
        auto_decompress=False,
    )
    try:
        messages, upgraded, _ = parser.feed_data(data)
    except HttpProcessingError:
        return None
    return messages[0][0] if messages and not upgraded else None


def reader(
    rules: HeaderRules, matters: frozenset[bytes] = frozenset(), *, aims: bool = False
) -> tuple[PlainRequests[dict[str, Any]], Careful]:
    careful = Careful(rules)
    address = UpstreamAddress.parse(UPSTREAM)
    requests: PlainRequests[dict[str, Any]] = PlainRequests(
        describe=careful.request,
        authority=None if rules.preserve_host else rules.authority,
        base=address.base,
        matters=matters,
        forward=rules.forward,
        joined=rules.joined,
        aim=(lambda method, target: (method, aimed_at(rules, method, target))) if aims else None,
    )
    return requests, careful


def aimed_at(rules: HeaderRules, method: str, target: str) -> Aimed:
    return Aimed(rules.request_line(method, target)[0].rstrip(), target, target)


PEER = rules_for().peer("192.0.2.7", tls=False)
HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost:8080\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer sk-test\r\nUser-Agent: test/1\r\nTraceparent: 00-%032x-00f067aa0ba902b7-01\r\n"
    b"Idempotency-Key: %d\r\nContent-Length: %d"
)

NAMES = st.sampled_from(
    [
        b"Host", b"host", b"Content-Length", b"content-length", b"Content-Type", b"Authorization", b"X-Api-Key",
        b"User-Agent", b"Accept", b"Connection", b"Keep-Alive", b"Traceparent", b"Idempotency-Key", b"Cookie",
        b"Transfer-Encoding", b"Upgrade", b"Expect", b"TE", b"X-Forwarded-For", b"Via", b"X-Custom", b"X Custom", b"",
        b"Proxy-Connection", b"x_y", b"X-\xe4", b"Trailer", b"X-Forwarded-Host", b"Content-Encoding",
        b"X-Forwarded-Proto", b"Forwarded",
    ]
)  # fmt: skip
VALUES = st.sampled_from(
    [
        b"a", b"", b" ", b"a b", b" a", b"a ", b"5", b"0", b"05", b"+5", b"5, 5", b"keep-alive", b"close", b"Close",
        b"keep-alive, X-Custom", b"chunked", b"100-continue", b"h2c", b"example.org", b"a\tb", b"\xc3\xa4", b"a\rb",
        b"a\x00b", b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", b"a\nb", b"trailers", b"99999999999",
    ]
)  # fmt: skip
LINE = st.tuples(NAMES, st.sampled_from([b": ", b":", b" : ", b":\t", b":  "]), VALUES).map(b"".join)
FIRST = st.sampled_from(
    [
        b"GET / HTTP/1.1", b"POST /v1/x?a=b HTTP/1.1", b"GET /a#b HTTP/1.1", b"GET http://h/x HTTP/1.1",
        b"GET / HTTP/1.0", b"get / HTTP/1.1", b"GET  / HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT h:1 HTTP/1.1",
        b"DELETE /%20 HTTP/1.1", b"GET /\xc3\xa4 HTTP/1.1", b"GET / HTTP/1.1 ", b"BREW / HTTP/1.1",
        b"GET /\"x HTTP/1.1",
    ]
)  # fmt: skip
HEADS = st.builds(
    lambda first, lines, host: b"\r\n".join([first, *([b"Host: example.org"] if host else []), *lines]),
    FIRST, st.lists(LINE, max_size=6), st.booleans(),
)  # fmt: skip


def whole(head: bytes) -> bytes:
    """A message with this head, and as long a body as it says (of many lengths the first)."""
    found = re.search(rb"(?i)\r\ncontent-length: *([0-9]{1,5})", head)
    return head + b"\r\n\r\n" + b"x" * (int(found[1]) if found else 0)


def read(requests: PlainRequests[dict[str, Any]], head: bytes, peer: Peer = PEER) -> PlainMessage[dict[str, Any]]:
    plain = requests.read(whole(head), peer)
    assert plain is not None
    return plain


def forwarded(rules: HeaderRules, message: Any, peer: Peer) -> bytes:
    line, authority = rules.request_line(message.method, message.path)
    return line + rules.request(message.raw_headers, peer, authority=authority).lines


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"preserve_host": True},
        {"forwarded": "forwarded", "via": "edge"},
        {"forwarded": "none"},
        {"trusted_proxies": (ip_network("192.0.2.0/24"),), "via": "edge"},
    ],
    ids=["plain", "preserve_host", "forwarded", "none", "trusted"],
)
@given(heads=st.lists(HEADS, min_size=1, max_size=4))
@example(heads=[b"GET / HTTP/1.1\r\nHost: h\r\nUser-Agent: a\r\nUser-Agent: a"])
@example(heads=[b"GET / HTTP/1.1\r\nHost: h\r\nX-Custom: a\r\nx-custom: b"])
@example(heads=[b"GET / HTTP/1.1\r\nX-Forwarded-For: a\r\nX-Forwarded-Proto: https\r\nHost: h\r\nX-Forwarded-Host: b"])
@example(heads=[b"GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: a", b"GET / HTTP/1.1\r\nHost: h\r\nX-Forwarded-For: b"])
@settings(deadline=None)
def test_what_is_plain_is_what_the_careful_way_makes_of_it(
    loop: asyncio.AbstractEventLoop, changes: dict[str, Any], heads: list[bytes]
) -> None:
    rules = rules_for(**changes)
    requests, _ = reader(rules)
    peer = rules.peer("192.0.2.7", tls=True)
    for head in [*heads, *heads]:  # the second time from memory
        plain = requests.read(whole(head), peer)
        if plain is None:
            continue
        shape, wire, own, body, left, _, trace, _ = plain
        assert left == 0
        message = parsed(loop, whole(head))
        assert message is not None, head
        assert own + b"\r\n\r\n" + body == whole(head)
        assert wire == forwarded(rules, message, peer) + body
        assert not message.chunked
        assert not message.upgrade
        assert not message.should_close
        lengths = [value for name, value in message.raw_headers if name.lower() == b"content-length"]
        assert len(body) == (int(lengths[0]) if lengths else 0)
        traces = [value for name, value in message.raw_headers if name.lower() == b"traceparent"]
        assert ([trace] if trace else []) == [value for value in traces if value]
        expected = rules.request(message.raw_headers, peer).names
        assert shape.facts["names"] == expected
        assert shape.facts["method"] == message.method
        assert shape.facts["target"] == message.path


def test_the_usual_head_is_plain_and_described_once() -> None:
    requests, careful = reader(rules_for())
    shapes = {read(requests, HEAD % (i + 1, i, i))[0].number for i in range(50)}
    assert len(shapes) == 1
    assert careful.asked == 1


@pytest.mark.parametrize("mode", ["x-forwarded", "none", "forwarded"])
def test_requests_behind_another_proxy_are_plain_whoever_they_are_for(mode: str) -> None:
    rules = rules_for(forwarded=mode, trusted_proxies=(ip_network("192.0.2.7/32"),))
    requests, careful = reader(rules)
    peers = [rules.peer("192.0.2.7", tls=False), rules.peer("192.0.2.8", tls=False)]
    chains = [b"198.51.100.%d, 203.0.113.%d" % (i, i % 7) for i in range(1, 200)]
    for chain in chains:
        for peer in peers:
            fields = b"\r\nX-Forwarded-For: %b\r\nX-Forwarded-Proto: https\r\nX-Real-IP: %b" % (chain, chain)
            _, wire, *_ = read(requests, HEAD % (1, 1, 1) + fields, peer)
            assert peer.ip is not None
            said = chain + b", " + peer.ip.encode() if mode == "x-forwarded" else chain
            assert wire.count(b"\r\nX-Forwarded-For: " + said + b"\r\n") == 1
    assert careful.asked <= 3  # the shape, and how it ends for each peer
    peer = peers[0]
    shape = read(
        requests, HEAD % (1, 1, 1) + b"\r\nX-Forwarded-For: a\r\nX-Forwarded-Proto: https\r\nX-Real-IP: a", peer
    )[0]
    for chain in chains:
        head = HEAD % (1, 1, 1) + b"\r\nX-Forwarded-For: %b\r\nX-Forwarded-Proto: https\r\nX-Real-IP: %b" % (
            chain,
            chain,
        )
        found = by_form(requests, shape, whole(head), peer)
        assert found == requests.read(whole(head), peer)
        assert found[7] == chain


def test_a_value_that_matters_makes_another_shape_and_one_that_does_not_matter_none() -> None:
    requests, _ = reader(rules_for(), matters=frozenset({b"x-tenant", b"x-request-id"}))
    base = b"GET / HTTP/1.1\r\nHost: h\r\n"
    assert read(requests, base + b"X-Tenant: a")[0] is not read(requests, base + b"X-Tenant: b")[0]
    assert read(requests, base + b"X-Request-Id: a")[0] is not read(requests, base + b"X-Request-Id: b")[0]
    for i in range(VALUES_MAX + 2):
        read(requests, base + b"X-Free: %d" % i)
        read(requests, base + b"X-Tenant: %d" % i)
    assert read(requests, base + b"X-Free: y")[0] is read(requests, base + b"X-Free: z")[0]
    assert read(requests, base + b"X-Tenant: y")[0] is not read(requests, base + b"X-Tenant: z")[0]


def test_each_peer_has_its_own_ending() -> None:
    rules = rules_for()
    requests, _ = reader(rules)
    one, other = rules.peer("192.0.2.1", tls=False), rules.peer("192.0.2.2", tls=True)
    head = HEAD % (1, 2, 3)
    assert b"X-Forwarded-For: 192.0.2.1\r\n" in read(requests, head, one)[1]
    assert b"X-Forwarded-For: 192.0.2.2\r\nX-Forwarded-Proto: https\r\n" in read(requests, head, other)[1]
    assert read(requests, head, one)[0] is read(requests, head, other)[0]


def test_what_is_remembered_is_bounded() -> None:
    requests, _ = reader(rules_for(), matters=frozenset({b"x-tenant"}))
    for i in range(2 * LINES_MAX):
        head = b"GET /%d HTTP/1.1\r\nHost: h\r\nX-Tenant: %d\r\nX-%d: 1" % (i, i, i % 5000)
        read(requests, head)
    assert len(requests._lines) <= LINES_MAX
    assert len(requests._firsts) <= LINES_MAX
    assert len(requests._shapes) <= SHAPES_MAX


def test_a_head_that_would_be_rewritten_otherwise_is_never_plain() -> None:
    rules = rules_for()
    careful = Careful(rules)

    def other(method: str, target: str, fields: Fields, peer: object) -> tuple[dict[str, Any], bytes] | None:
        found = careful.request(method, target, fields, peer)
        assert found is not None
        return found[0], found[1].replace(b"Accept", b"accept")

    requests: PlainRequests[dict[str, Any]] = PlainRequests(
        describe=other, authority=rules.authority, base=b"/base", matters=frozenset()
    )
    head = b"GET / HTTP/1.1\r\nHost: h\r\nAccept: x"
    assert requests.read(whole(head), PEER) is None
    assert requests.read(whole(head), PEER) is None
    assert careful.asked == 1


STATUS = st.sampled_from(
    [
        b"HTTP/1.1 200 OK", b"HTTP/1.1 200", b"HTTP/1.1 200 ", b"HTTP/1.1 404 Not Found", b"HTTP/1.1 204 No Content",
        b"HTTP/1.1 304 Not Modified", b"HTTP/1.0 200 OK", b"HTTP/1.1 100 Continue", b"HTTP/1.1 101 Switching",
        b"HTTP/1.1 099 Odd", b"HTTP/1.1  200 OK", b"HTTP/1.1 599 x", b"HTTP/1.1 600 x", b"HTTP/1.1 500 \xe4",
    ]
)  # fmt: skip
RESPONSES = st.builds(
    lambda first, lines: b"\r\n".join([first, *lines]),
    STATUS,
    st.lists(LINE | st.sampled_from([b"Content-Length: 5", b"Transfer-Encoding: chunked"]), max_size=6),
)


class Heard:
    def __init__(self) -> None:
        self.fields: Fields = []
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name, value))

    def on_headers_complete(self) -> None:
        self.complete = True


@given(heads=st.lists(RESPONSES, min_size=1, max_size=4), via=st.sampled_from([None, "edge"]))
@settings(deadline=None)
def test_a_plain_response_is_what_the_careful_way_makes_of_it(heads: list[bytes], via: str | None) -> None:
    from sidecar.proxy.headers import ResponseHead

    rules = rules_for(via=via)
    responses: PlainResponses[dict[str, Any]] = PlainResponses(describe=Careful(rules).response)
    for head in [*heads, *heads]:
        plain = responses.read(whole(head))
        if plain is None:
            continue
        shape, wire, own, body, left, *_ = plain
        heard = Heard()
        parser = httptools.HttpResponseParser(heard)
        parser.feed_data(head + b"\r\n\r\n")
        assert heard.complete
        status = parser.get_status_code()
        expected = ResponseHead(rules, heard.fields, status=status)
        assert own + b"\r\n\r\n" + body == whole(head)
        assert wire == head.partition(b"\r\n")[0] + b"\r\n" + b"".join(expected.parts) + b"\r\n" + body
        assert shape.facts == {"names": expected.names, "status": status}
        if expected.chunked:
            assert (left, expected.length) == (CHUNKED, None)
        else:
            assert (left, len(body)) == (0, expected.length)
        assert shape.close == expected.close
        assert parser.should_keep_alive() is not shape.close


RESPONSE = (
    b"HTTP/1.1 200 OK\r\nServer: x\r\nDate: Sat, 28 Nov 2026 19:00:%02d GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: keep-alive\r\nKeep-Alive: timeout=%d\r\nX-Request-Id: %032x"
)


def test_the_usual_response_is_plain_and_described_once() -> None:
    careful = Careful(rules_for())
    responses: PlainResponses[dict[str, Any]] = PlainResponses(describe=careful.response)
    for i in range(50):
        plain = responses.read(whole(RESPONSE % (i, i, i, i)))
        assert plain is not None
        shape, wire, _, body, left, _, _, keep_alive = plain
        assert (left, keep_alive) == (0, b"timeout=%d" % i)
        assert (len(body), shape.close) == (i, False)
        assert b"Keep-Alive" not in wire
        assert wire.endswith(b"X-Request-Id: %032x\r\n\r\n" % i + body)
    assert careful.asked == 1


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 5",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
        b"HTTP/1.1 200 OK",
        b"HTTP/1.1 302 Found\r\nLocation: http://api.example.com:8080/base/x\r\nContent-Length: 0",
        b"HTTP/1.1 200 OK\nContent-Length: 5",
    ],
)
def test_a_response_whose_framing_must_be_judged_is_not_plain(head: bytes) -> None:
    responses: PlainResponses[dict[str, Any]] = PlainResponses(describe=Careful(rules_for()).response)
    assert responses.read(whole(head)) is None
    assert responses.read(head + b"\r\n\r\n") is None


def test_a_body_that_is_longer_than_the_head_says_is_not_plain_and_a_shorter_one_is_to_come() -> None:
    requests, _ = reader(rules_for())
    head = HEAD % (1, 2, 3)
    read(requests, head)
    for data in (head, head + b"\r\n", head + b"\r\n\r\nabcd"):
        assert requests.read(data, PEER) is None
    for body, left in ((b"", 3), (b"ab", 1), (b"abc", 0)):
        plain = requests.read(head + b"\r\n\r\n" + body, PEER)
        assert plain is not None
        assert (plain[3], plain[4]) == (body, left)


@pytest.mark.parametrize("value", [b"", b" a", b"a ", b"a\tb", b"a\x00", b"a\rb", b"a\nb", b"\xe4", b"a\x7f"])
@pytest.mark.parametrize("name", [b"Traceparent", b"Idempotency-Key", b"X-Free", b"Accept"])
def test_each_line_is_checked_however_its_name_is_known(name: bytes, value: bytes) -> None:
    requests, _ = reader(rules_for())
    base = b"GET / HTTP/1.1\r\nHost: h\r\n"
    for i in range(VALUES_MAX + 2):
        read(requests, base + b"X-Free: %d" % i)
    for kept in (b"Traceparent: 1", b"Idempotency-Key: 1", b"Accept: 1"):
        read(requests, base + kept)
    plain = requests.read(base + name + b": " + value + b"\r\n\r\n", PEER)
    assert (plain is not None) == (value == b"" and name == b"Accept")


def test_heads_over_their_limits_are_not_plain() -> None:
    careful = Careful(rules_for())
    requests: PlainRequests[dict[str, Any]] = PlainRequests(
        describe=careful.request,
        authority=careful.rules.authority,
        base=UpstreamAddress.parse(UPSTREAM).base,
        matters=frozenset(),
        head_bytes_max=200,
        fields_max=3,
    )
    head = b"GET / HTTP/1.1\r\nHost: h\r\nA: 1\r\nB: 1"
    read(requests, head)
    before = len(requests._lines)
    assert requests.read(head + b"\r\nC: 1\r\nD: 1\r\n\r\n", PEER) is None
    assert len(requests._lines) == before  # nothing was learned of it
    long = b"GET / HTTP/1.1\r\nHost: h\r\nCookie: "
    longest = requests.read(long + b"x" * (200 - len(long)) + b"\r\n\r\n", PEER)
    assert longest is not None
    assert longest[0].form is not None
    for like in (None, longest[0]):
        assert requests.read(long + b"x" * (201 - len(long)) + b"\r\n\r\n", PEER, like) is None


def test_lengths_that_come_again_are_remembered_and_bounded() -> None:
    requests, careful = reader(rules_for())
    for i in range(3 * RECENT_MAX):
        read(requests, HEAD % (1, 2, i % (2 * RECENT_MAX)))
        assert len(requests._recent) <= RECENT_MAX
    assert len(requests._lines) <= 2 * RECENT_MAX
    assert careful.asked == 1


# What may be put anywhere into a head, in the place of as many bytes as the number says.
EDITS = st.lists(
    st.tuples(
        st.integers(0, 300), st.integers(0, 3), st.sampled_from(
            [
                b"", b"\r\n", b"\r", b"\n", b" ", b"\t", b"\x00", b"%", b"%b", b"%.0b", b": ", b"x", b"\xe4", b"7",
                b"0", b"99999999999", b"\r\n\r\n", b"\r\nCookie: a", b"\r\nContent-Length: 2", b"\x7f", b"()", b"\\",
            ]
        ),
    ), min_size=1, max_size=3,
)  # fmt: skip
FORMED = st.sampled_from(
    [
        HEAD % (1, 1, 5), HEAD % (7, 7, 0) + b"\r\nVia: a%b\r\nCookie: a; b", b"GET /a%20b?c=%b HTTP/1.1\r\nHost: h",
        b"GET / HTTP/1.1\r\nCookie: a\r\nKeep-Alive: 5\r\nHost: h\r\nIf-None-Match: a b\r\nConnection: keep-alive",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nX-Real-IP: 1\r\nHost: h\r\nAccept: (.*)[a]\\%s",
        b"POST / HTTP/1.1\r\nHost: h\r\nX-Request-Id: a\r\nContent-Length: 4\r\nConnection: keep-alive",
        HEAD % (2, 2, 3) + b"\r\nX-Forwarded-For: 198.51.100.7, 203.0.113.9\r\nX-Forwarded-Proto: https",
        b"GET / HTTP/1.1\r\nX-Forwarded-For: 198.51.100.7\r\nX-Forwarded-Host: a.example\r\nHost: h\r\nVia: 1.1 b",
    ]
)  # fmt: skip


def edited(head: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for at, width, text in edits:
        at = min(at, len(head))
        head = head[:at] + text + head[at + width :]
    return head


def by_form(heads: Any, shape: Any, data: bytes, peer: Peer | None) -> Any:
    """What is read by the form alone; None where it is looked up."""
    return None if shape.form is None else heads._by_form(shape, shape.form, data, peer)


def read_alike(
    heads: Any, head: bytes, others: list[bytes], edits: list[tuple[int, int, bytes]], cut: int, peer: Peer | None
) -> None:
    """Hold what the form of a head reads against the look-up: of that head, of others, of either with `edits`, and of
    all these with `cut` bytes less or more."""
    first = heads.read(whole(head), peer)
    if first is None:
        return
    shape = first[0]
    assert shape.form is not None
    assert by_form(heads, shape, whole(head), peer) == first
    changed = [head, edited(head, edits), *others, *(edited(other, edits) for other in others)]
    for data in [
        *map(whole, changed),
        *(whole(one)[:-cut] for one in changed),
        *(whole(one) + b"x" * cut for one in changed),
    ]:
        found = by_form(heads, shape, data, peer)
        assert found is None or found == heads.read(data, peer)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"forwarded": "none"},
        {"forwarded": "forwarded", "trusted_proxies": (ip_network("192.0.2.0/24"),)},
        {"trusted_proxies": (ip_network("192.0.2.0/24"),), "preserve_host": True},
    ],
    ids=["plain", "none", "forwarded", "trusted"],
)
@pytest.mark.parametrize("aims", [True, False], ids=["targets", "no targets"])
@given(
    head=st.one_of(FORMED, HEADS),
    others=st.lists(st.one_of(FORMED, HEADS), max_size=2),
    edits=EDITS,
    cut=st.integers(0, 9),
)
@settings(deadline=None)
def test_what_a_form_reads_is_what_it_is_when_it_is_looked_up(
    changes: dict[str, Any], aims: bool, head: bytes, others: list[bytes], edits: list[tuple[int, int, bytes]], cut: int
) -> None:
    rules = rules_for(**changes)
    peer = rules.peer("192.0.2.7", tls=True)
    requests, _ = reader(rules, aims=aims)
    read_alike(requests, head, others, edits, cut, peer)


RESPONDED = st.sampled_from(
    [
        RESPONSE % (1, 5, 1, 1), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nDate: a b\r\nSet-Cookie: a=%b",
        b"HTTP/1.1 200 100%\r\nKeep-Alive: timeout=5, max=7\r\nConnection: keep-alive\r\nContent-Length: 2",
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\nServer: a\r\nVia: 1.1 b",
    ]
)  # fmt: skip


@given(head=st.one_of(RESPONDED, RESPONSES), others=st.lists(RESPONDED, max_size=2), edits=EDITS, cut=st.integers(0, 9))
@settings(deadline=None)
def test_what_a_form_reads_of_a_response_is_what_it_is_when_it_is_looked_up(
    head: bytes, others: list[bytes], edits: list[tuple[int, int, bytes]], cut: int
) -> None:
    responses: PlainResponses[dict[str, Any]] = PlainResponses(describe=Careful(rules_for()).response)
    read_alike(responses, head, others, edits, cut, None)


def test_a_form_reads_what_differs_in_a_trace_a_length_an_id_or_a_target() -> None:
    requests, careful = reader(rules_for(), aims=True)
    shape = read(requests, HEAD % (0, 0, 0))[0]
    for i in range(1, 50):
        head = HEAD % (i, i, i)
        found = by_form(requests, shape, whole(head), PEER)
        assert found == requests.read(whole(head), PEER)
        assert found[6].startswith(b"00-%032x" % i)
    elsewhere = b"POST /another HTTP/1.1" + (HEAD % (1, 1, 1)).partition(b" HTTP/1.1")[2]
    found = by_form(requests, shape, whole(elsewhere), PEER)  # a target that is seen for the first time
    assert found[5].url == "/another"
    assert found == requests.read(whole(elsewhere), PEER)
    otherwise = elsewhere.replace(b"POST", b"PUT")
    other_kind = read(requests, otherwise)
    assert by_form(requests, shape, whole(otherwise), PEER) is None  # one that more hangs on than its target
    assert requests.read(whole(otherwise), PEER, shape) == other_kind
    for length in (b"0000000001", b"+1", b"1 "):
        data = (HEAD % (1, 1, 1)).replace(b"Content-Length: 1", b"Content-Length: " + length) + b"\r\n\r\nx"
        assert requests.read(data, PEER, shape) is None
    assert careful.asked == 2
    responses: PlainResponses[dict[str, Any]] = PlainResponses(describe=Careful(rules_for()).response)
    answered = responses.read(whole(RESPONSE % (0, 0, 0, 0)))
    assert answered is not None
    for i in range(1, 50):
        data = whole(RESPONSE % (i, i, i, i))
        found = by_form(responses, answered[0], data, None)
        assert found == responses.read(data)
        assert found[7] == b"timeout=%d" % i


def test_a_form_ends_with_what_its_heads_knew() -> None:
    requests, _ = reader(rules_for(), aims=True)
    head = HEAD % (1, 1, 1)
    shape = read(requests, head)[0]
    others, _ = reader(rules_for(via="edge"), aims=True)
    theirs = read(others, head)
    assert by_form(others, shape, whole(head), PEER) is None  # settings may be others
    assert others.read(whole(head), PEER, shape) == theirs
    requests.forget()
    assert by_form(requests, shape, whole(head), PEER) is None  # it may have been said anew whose target that is
    assert requests.read(whole(head), PEER, shape) == requests.read(whole(head), PEER)
    assert by_form(others, theirs[0], whole(head), rules_for().peer("192.0.2.9", tls=False)) is None  # one that is new


def test_forms_are_let_go_with_what_they_were_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that are idle keep what they said last."""
    requests, _ = reader(rules_for(), matters=frozenset({b"x-tenant"}), aims=True)
    head = b"GET / HTTP/1.1\r\nHost: h\r\nX-Tenant: %d"
    shapes = [read(requests, head % number)[0] for number in range(SHAPES_MAX)]
    assert all(shape.form is not None for shape in shapes)
    last = read(requests, head % SHAPES_MAX)[0]
    assert all(shape.form is None for shape in shapes)
    assert last.form is not None
    requests.forget()
    assert [one.form for one in (last, read(requests, head % 1)[0])].count(None) == 1
    monkeypatch.setattr(plain_head, "FORM_BYTES_MAX", 50)
    assert read(requests, head % 2 + b"\r\nAuthorization: " + b"x" * 99)[0].form is None


def test_a_form_takes_no_longer_over_what_somebody_made_up() -> None:
    requests, _ = reader(rules_for())
    base = b"GET / HTTP/1.1\r\nHost: h\r\nCookie: a b\r\nVia: a b"
    shape = read(requests, base)[0]
    assert shape.form is not None
    spent = []
    for size in (450, 7_200):
        said = b" a" * (size // 2)
        data = b"GET / HTTP/1.1\r\nHost: h\r\nCookie: a%b\r\nVia: a%b \r\n\r\n" % (said, said)
        spent.append(min(timeit.repeat(lambda data=data: by_form(requests, shape, data, PEER), number=5, repeat=9)))  # type: ignore[misc]
        assert by_form(requests, shape, data, PEER) is None
    assert spent[1] < 80 * spent[0]  # 16 where it grows with the length, 256 with its square
