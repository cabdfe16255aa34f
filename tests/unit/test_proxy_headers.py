"""The rewriting of heads, case by case, and one answer cut in every way."""

from __future__ import annotations

from ipaddress import ip_network
from itertools import combinations, pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.model.http_url import UpstreamAddress
from sidecar.proxy.headers import (
    ADDRESSES_KEPT_MAX,
    CHAIN_KEPT_BYTES_MAX,
    NAMES_KEPT_MAX,
    HeaderRules,
    Peer,
    RequestHead,
    trace_id,
)
from sidecar.proxy.local_responses import BAD_REQUEST
from sidecar.proxy.response_parser import HEAD_BYTES_MAX, UpstreamResponse
from sidecar.settings import ProxySettings

Fields = list[tuple[bytes, bytes]]


def made(**settings: Any) -> HeaderRules:
    rules = ProxySettings(**{"upstream_url": "http://up.example/base/", **settings})
    return HeaderRules(rules, UpstreamAddress.parse(rules.upstream_url or ""))


def lines(
    fields: Fields,
    peer: Peer | None = None,
    *,
    http10: bool = False,
    authority: str | None = None,
    upgrade: bool = False,
    **settings: Any,
) -> list[bytes]:
    rules = made(**{"forwarded": "none", **settings})
    head = rules.request(
        fields, peer or rules.peer("192.0.2.1", tls=False), http10=http10, authority=authority, upgrade=upgrade
    )
    assert isinstance(head, RequestHead)
    assert head.lines.endswith(b"\r\n\r\n")
    return head.lines[:-4].split(b"\r\n")


HOST = (b"Host", b"me")
UP = b"Host: up.example"


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ([HOST], [UP]),
        ([(b"hOsT", b"me"), (b"X", b"1")], [b"hOsT: up.example", b"X: 1"]),
        ([(b"X", b"1")], [b"X: 1", UP]),
        ([HOST, (b"A", b""), (b"a", b" "), (b"A", b"3")], [UP, b"A: ", b"a:  ", b"A: 3"]),
        ([HOST, (b"Connection", b"close")], [UP]),
        ([HOST, (b"Connection", b"Keep-Alive"), (b"Keep-Alive", b"timeout=5")], [UP]),
        ([HOST, (b"Proxy-Connection", b"keep-alive")], [UP]),
        ([HOST, (b"X-Drop", b"1"), (b"Connection", b"close, x-drop"), (b"x-DROP", b"2"), (b"X-Keep", b"3")],
         [UP, b"X-Keep: 3"]),
        ([HOST, (b"Connection", b"A"), (b"Connection", b"B"), (b"a", b"1"), (b"b", b"2")], [UP]),
        ([HOST, (b"Content-Length", b"3"), (b"Connection", b"Content-Length, Host, Transfer-Encoding")],
         [UP, b"Content-Length: 3"]),
        ([HOST, (b"TE", b"gzip, trailers;q=0.5")], [UP, b"TE: trailers"]),
        ([HOST, (b"TE", b"gzip")], [UP]),
        ([HOST, (b"Upgrade", b"h2c"), (b"HTTP2-Settings", b"x"), (b"Connection", b"Upgrade, HTTP2-Settings")], [UP]),
        ([HOST, (b"Transfer-Encoding", b"Chunked")], [UP, b"Transfer-Encoding: chunked"]),
        ([HOST, (b"Expect", b"100-continue"), (b"Trailer", b"X")], [UP, b"Expect: 100-continue", b"Trailer: X"]),
        ([HOST, (b"Proxy-Authorization", b"x"), (b"Cookie", b"a=b")], [UP, b"Proxy-Authorization: x", b"Cookie: a=b"]),
        ([HOST, (b"X-Forwarded-For", b"1.1.1.1"), (b"Forwarded", b"for=x"), (b"Via", b"1.1 a")],
         [UP, b"X-Forwarded-For: 1.1.1.1", b"Forwarded: for=x", b"Via: 1.1 a"]),
    ],
)  # fmt: skip
def test_request_fields(fields: Fields, sent: list[bytes]) -> None:
    assert lines(fields) == sent


def test_a_wanted_switch_is_passed_on() -> None:
    fields = [HOST, (b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"websocket")]
    assert lines(fields, upgrade=True) == [UP, b"Upgrade: websocket", b"Connection: Upgrade"]


def test_the_host_may_be_kept() -> None:
    assert lines([HOST], preserve_host=True) == [b"Host: me"]
    assert lines([HOST], preserve_host=True, authority="abs.example:81") == [b"Host: abs.example:81"]
    assert lines([], preserve_host=True, http10=True) == [UP]


@pytest.mark.parametrize(
    ("mode", "fields", "trusted", "added"),
    [
        ("x-forwarded", [], False,
         [b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: me"]),
        ("x-forwarded", [(b"x-forwarded-for", b"9.9.9.9"), (b"X-Forwarded-For", b"8.8.8.8")], False,
         [b"X-Forwarded-For: 9.9.9.9, 8.8.8.8, 192.0.2.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: me"]),
        ("x-forwarded", [(b"X-Forwarded-Proto", b"gopher"), (b"X-Forwarded-Host", b"evil")], False,
         [b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: me"]),
        ("x-forwarded", [(b"X-Forwarded-Proto", b"http"), (b"X-Forwarded-Host", b"site")], True,
         [b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: http", b"X-Forwarded-Host: site"]),
        ("forwarded", [], False, [b'Forwarded: for=192.0.2.1;proto=https;host="me"']),
        ("forwarded", [(b"forwarded", b"for=a"), (b"X-Forwarded-For", b"b")], False,
         [b"X-Forwarded-For: b", b'Forwarded: for=a, for=192.0.2.1;proto=https;host="me"']),
        ("none", [], False, []),
    ],
)  # fmt: skip
def test_who_the_client_is(mode: str, fields: Fields, trusted: bool, added: list[bytes]) -> None:
    networks = (ip_network("192.0.2.0/24"),) if trusted else ()
    peer = made(forwarded=mode, trusted_proxies=networks).peer("192.0.2.1", tls=True)
    assert lines([HOST, *fields], peer, forwarded=mode, trusted_proxies=networks) == [UP, *added]


def test_ipv6_and_unix_peers() -> None:
    rules = made(forwarded="forwarded")
    assert rules.peer("::ffff:10.0.0.1", tls=False).ip == "10.0.0.1"
    assert rules.peer("fe80::1%eth0", tls=False).ip == "fe80::1"
    peer = rules.peer("2001:db8::1", tls=False)
    assert lines([HOST], peer, forwarded="forwarded")[1] == b'Forwarded: for="[2001:db8::1]";proto=http;host="me"'
    unix = rules.peer(None, tls=False)
    assert lines([HOST], unix, forwarded="forwarded")[1] == b'Forwarded: for=unknown;proto=http;host="me"'
    assert lines([HOST], made().peer(None, tls=False), forwarded="x-forwarded")[1:] == [
        b"X-Forwarded-Proto: http",
        b"X-Forwarded-Host: me",
    ]


def test_via() -> None:
    assert lines([HOST, (b"Via", b"1.1 a"), (b"via", b"1.0 b")], via="me", http10=True) == [
        UP,
        b"Via: 1.1 a, 1.0 b, 1.0 me",
    ]


@pytest.mark.parametrize(
    ("peer", "chain", "found"),
    [
        ("203.0.113.9", b"1.1.1.1", "203.0.113.9"),  # not trusted: what it says is not read
        ("10.0.0.1", None, "10.0.0.1"),
        ("10.0.0.1", b"1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", b"6.6.6.6, 1.1.1.1, 10.0.0.2", "1.1.1.1"),
        ("10.0.0.1", b"10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", b"6.6.6.6, unknown, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", b"", "10.0.0.1"),
        ("10.0.0.1", b"1.1.1.1:4711", "1.1.1.1"),
        ("10.0.0.1", b'"[2001:db8::5]:443"', "2001:db8::5"),
        ("10.0.0.1", b"::ffff:1.2.3.4", "1.2.3.4"),
        ("2001:db8:ffff::1", b"1.1.1.1", "1.1.1.1"),
        (None, b"1.1.1.1", "1.1.1.1"),
        (None, None, None),
        ("10.0.0.1", b"6.6.6.6, " * 100 + b"1.1.1.1", "1.1.1.1"),
    ],
)
def test_the_client_behind_trusted_proxies(peer: str | None, chain: bytes | None, found: str | None) -> None:
    rules = made(trusted_proxies=(ip_network("10.0.0.0/8"), ip_network("2001:db8:ffff::/48")))
    for _ in range(2):  # also as it is remembered
        assert rules.client_ip(rules.peer(peer, tls=False), chain) == found


def test_few_and_short_chains_are_remembered() -> None:
    rules = made(trusted_proxies=(ip_network("10.0.0.0/8"),))
    peer = rules.peer("10.0.0.1", tls=False)
    for number in range(ADDRESSES_KEPT_MAX + 9):
        chain = b"198.51.%d.%d" % divmod(number, 256)
        assert rules.client_ip(peer, chain) == chain.decode()
        assert rules.client_ip(peer, b"6.6.6.6, " * 40 + chain) == chain.decode()
    assert len(rules._client_ips) == 9
    assert all(len(chain) <= CHAIN_KEPT_BYTES_MAX for _, chain in rules._client_ips)


@pytest.mark.parametrize(
    ("target", "url", "path"),
    [
        ("/v1/x", "http://up.example/base/v1/x", "/v1/x"),
        ("/x?key=secret&alt=sse&flag&=v&", "http://up.example/base/x?key&alt=sse&flag", "/x"),
        ("/x?", "http://up.example/base/x", "/x"),
        ("/x?a=1#frag=secret", "http://up.example/base/x?a", "/x"),
        ("/a%2Fb//c?%61lt=v", "http://up.example/base/a%2Fb//c?%61lt", "/a%2Fb/c"),
        ("/%76%31//./x", "http://up.example/base/%76%31//./x", "/v1/x"),
        ("/v1/y/../x", "http://up.example/base/v1/y/../x", "/v1/x"),
        ("/../base/x", "http://up.example/base/../base/x", "/x"),
        ("http://u:p@h/x?q=1", "http://up.example/base/x?q", "/x"),
        ("http://h", "http://up.example/base/", "/"),
        ("*", "http://up.example/base/*", "*"),
    ],
)
def test_the_recorded_url(target: str, url: str, path: str) -> None:
    assert made(query_values=frozenset({"alt"})).record_url(target) == (url, path)


def test_a_public_url_stands_for_the_upstream() -> None:
    assert made(public_url="https://api.example/").record_url("/x")[0] == "https://api.example/x"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "0af7651916cd43dd8448eb211c80319c"),
        (b"cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more", "0af7651916cd43dd8448eb211c80319c"),
        (b"00-00000000000000000000000000000000-b7ad6b7169203331-01", None),
        (b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", None),
        (b"secret", None),
        (b"", None),
        (None, None),
    ],
)
def test_trace_ids(value: bytes | None, found: str | None) -> None:
    assert trace_id(value) == found


def test_spellings_are_remembered_within_bounds() -> None:
    rules = made()
    peer = rules.peer("192.0.2.1", tls=False)
    for n in range(NAMES_KEPT_MAX * 2):
        rules.request([(b"X-%d" % n, b"1")], peer)
    rules.request([(b"X" * 1000, b"1")], peer)
    assert len(rules.request_kinds) <= NAMES_KEPT_MAX


@pytest.mark.parametrize(
    ("url", "host", "port", "authority", "base"),
    [
        ("http://a.example", "a.example", 80, b"a.example", b""),
        ("https://a.example:443/v1/", "a.example", 443, b"a.example", b"/v1"),
        ("http://a.example:8080", "a.example", 8080, b"a.example:8080", b""),
        ("http://[::1]:81/x", "::1", 81, b"[::1]:81", b"/x"),
        ("http://xn--bcher-kva.example", "xn--bcher-kva.example", 80, b"xn--bcher-kva.example", b""),
    ],
)
def test_upstream_addresses(url: str, host: str, port: int, authority: bytes, base: bytes) -> None:
    address = UpstreamAddress.parse(url)
    assert (address.host, address.port, address.authority, address.base) == (host, port, authority, base)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "example.com",
        "ftp://x",
        "http://",
        "http://u:secret@h",
        "http://h?q=1",
        "http://h:99999",
        "http://h:0",
        "http://bücher.example",
        "http://h/a b",
        "unix:rel",
        "unix:/s:base",
        "unix:/s:/b?q=1",
        "unix:/s:/bücher",
    ],
)
def test_upstream_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match=r".") as raised:
        UpstreamAddress.parse(url)
    assert "secret" not in str(raised.value)


def test_our_answers_are_whole() -> None:
    whole = BAD_REQUEST.encode(close=True)
    head, _, body = whole.partition(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(body) in head + b"\r\n"
    assert BAD_REQUEST.encode(close=False, head_only=True).endswith(b"\r\n\r\n")


# -- an answer, cut anywhere ---------------------------------------------------------------------

ANSWERS = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nX-A: b\r\n\r\nhello world",
    (
        b"HTTP/1.1 103 Hint\r\nLink: <a>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n6;x=y\r\n world\r\n0\r\nSum: 1\r\nEnd: 2\r\n\r\n"
    ),
    b"HTTP/1.1 404 \r\nContent-Length: 0\r\nX:\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nConnection: x-hop\r\nX-Hop: 1\r\n\r\n",
    # What curl and nginx read as well: LF alone, blanks behind a chunk's size, one length said twice.
    b"HTTP/1.1 200 OK\nContent-Length: 2\nX: y\n\nok",
    b"HTTP/1.1 200 OK\r\nA: 1\nContent-Length: 2\r\n\nok",
    b"HTTP/1.1 103 H\nLink: <a>\n\nHTTP/1.1 200 OK\nTransfer-Encoding: chunked\n\n2\r\nok\r\n0\r\nSum: 1\nEnd: 2\n\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2   \r\nok\r\n1\t\r\n!\r\n1 ;x=y\r\n?\r\n0   \r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX: y\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-length: 2 ,2,\t2\r\n\r\nok",
    b"HTTP/1.1 200 OK\nContent-Length: 2, 2\nContent-Length: 2\n\nok",
    b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5, 5\r\n\r\n",
    b"\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n\r\nHTTP/1.1 103 H\n\nHTTP/1.1 200 OK\r\nContent-Length: 0, 0\r\n\r\n",
]


def read(pieces: list[bytes]) -> tuple[Any, ...]:
    answer = UpstreamResponse(made(), lambda answer: b"X-Ours: 1\r\n", head_only=False, http10=False, upgrade=False)
    out = b""
    for piece in pieces:
        answer.feed(piece)
        out += b"".join(answer.out)
        answer.out.clear()
    if b"chunked" in out:  # chunk borders are not kept; content and trailers are
        head, _, raw = out.rpartition(b"chunked\r\nX-Ours: 1\r\n\r\n")
        body, trailers, rest = b"", b"", raw
        while True:
            line, _, rest = rest.partition(b"\r\n")
            if not int(line, 16):
                trailers = rest
                break
            body, rest = body + rest[: int(line, 16)], rest[int(line, 16) + 2 :]
        out = head + body + trailers
    facts = (answer.status, answer.done, answer.broken, answer.extra, answer.reusable)
    return out, *facts, answer.body_bytes, answer.names


@given(st.sampled_from(ANSWERS), st.lists(st.integers(1, 180), max_size=6))
def test_where_an_answer_is_cut_does_not_matter(answer: bytes, cuts: list[int]) -> None:
    edges = sorted({0, len(answer), *(cut for cut in cuts if cut < len(answer))})
    pieces = [answer[start:end] for start, end in pairwise(edges)]
    whole = read([answer])
    assert read(pieces) == whole
    assert whole[2:6] == (True, None, False, True)


@pytest.mark.parametrize("size", [b"16", b"016", b"2\r\nok\r\n16"], ids=["first", "zero", "second"])
def test_content_that_looks_like_chunks_is_none_wherever_it_is_cut(size: bytes) -> None:
    """A read may end in the middle of a size, and the next one begin with what would be another."""
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%b\r\nabcdef\r\nghijklmnopqrst\r\n0\r\n\r\n" % size
    whole = read([answer])
    assert whole[2:4] == (True, None)
    start = answer.index(b"\r\n\r\n") + 4
    for first, second in combinations(range(start, len(answer)), 2):
        assert read([answer[:first], answer[first:second], answer[second:]]) == whole


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_an_answer_byte_by_byte(answer: bytes) -> None:
    assert read([answer[n : n + 1] for n in range(len(answer))]) == read([answer])


@pytest.mark.parametrize(
    ("answer", "head"),
    [
        (ANSWERS[4], b"Content-Length: 2\r\nX: y\r\n"),
        (ANSWERS[8], b"Content-Length: 2\r\nX: y\r\n"),
        (ANSWERS[9], b"Content-length: 2\r\n"),
        (ANSWERS[10], b"Content-Length: 2\r\n"),
        (ANSWERS[11], b"Content-Length: 0\r\n"),
        (ANSWERS[12], b"Content-Length: 5\r\n"),
    ],
)
def test_what_was_read_leniently_is_passed_on_strictly(answer: bytes, head: bytes) -> None:
    status, _, _ = answer.partition(b"\n")
    out, *_ = read([answer])
    assert out.startswith(status.rstrip(b"\r") + b"\r\n" + head + b"X-Ours: 1\r\n\r\n")


BOTH = "both a length and a transfer coding"


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        (b"Content-Length: 2\r\nContent-Length: 3\r\n\r\nok", "more than one length"),
        (b"Content-Length: 2, 3\r\n\r\nok", "more than one length"),
        (b"Content-Length: 2, 02\r\n\r\nok", "more than one length"),
        (b"Content-Length: 2,\r\n\r\nok", "more than one length"),
        (b"Content-Length: +2\r\n\r\nok", "more than one length"),
        (b"Content-Length: 2 2\r\n\r\nok", "more than one length"),
        (b"Content-Length: \r\n\r\nok", "more than one length"),
        (b"Content-Length: 2\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok", BOTH),
        (b"Content-Length: 2, 2\r\nTransfer-Encoding: chunked\r\n\r\nok", BOTH),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2, 2\r\n\r\nok", BOTH),
        (b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\nok", BOTH),
        (b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", BOTH),
        (b"Content-Length: 2, 2\r\n" + b"X: y\r\n" * 300 + b"\r\nok", "too many fields"),
        (b"Transfer-Encoding: identity\r\n\r\nok", "the framing of the answer"),
        (b"X-Foo(1): b\r\n\r\n", "invalid header token"),
        (b"X-F\xf6: b\r\n\r\n", "invalid header token"),
        (b"Garbage\r\n\r\n", "invalid header token"),
        (b"X : b\r\n\r\n", "invalid header token"),
        (b"A: b\n c\r\n\r\n", "whitespace after header value"),
        (b"A: b\rC: d\r\n\r\n", "LF after header value"),
        (b"Transfer-Encoding: chunked\r\n\r\n2\nok\n0\n\n", "after chunk size"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(fields: bytes, why: str) -> None:
    for data in ([b"HTTP/1.1 200 OK\r\n" + fields], [b"HTTP/1.1 200 OK\r\n", *(bytes([b]) for b in fields)]):
        answer = UpstreamResponse(made(), lambda answer: b"", head_only=False, http10=False, upgrade=False)
        for piece in data:
            answer.feed(piece)
            if answer.broken:
                break
        assert why in (answer.broken or "")


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        (b"HTTP/1.1 099 Odd", False), (b"HTTP/1.1 000 Odd", False), (b"HTTP/1.1 99 Odd", False),
        (b"HTTP/1.1 1000 Odd", False), (b"HTTP/1.1  200 OK", False), (b"HTTP/1.2 200 OK", False),
        (b"HTTP/1.1 200 O\x00K", False), (b"HTTP/1.1 200 O\x1bK", False), (b"HTTP/1.1 103 O\x00K", False),
        (b"HTTP/1.1 200", True), (b"HTTP/1.1 200 K\xe9\tn", True), (b"HTTP/1.1 999 Denied", True),
        (b"HTTP/1.1 599 X", True),
    ],
)  # fmt: skip
def test_status_lines(line: bytes, passes: bool) -> None:
    answer = UpstreamResponse(made(), lambda answer: b"", head_only=False, http10=False, upgrade=False)
    answer.feed(line + b"\r\nContent-Length: 0\r\n\r\n")
    assert (answer.done, answer.broken is None) == (passes, passes)
    if not passes:
        assert answer.out == []


@pytest.mark.parametrize("head_only", [False, True], ids=["get", "head"])
@pytest.mark.parametrize(
    "interim",
    [
        b"HTTP/1.1 103 H\r\nConnection: close\r\n\r\n", b"HTTP/1.0 103 H\r\n\r\n",
        b"HTTP/1.1 103 H\r\nConnection: close\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 103 H\nConnection: close\nTransfer-Encoding: chunked\n\n",
    ],
    ids=["close", "1.0", "sized", "chunked"],
)  # fmt: skip
def test_an_interim_answer_is_no_last_one_and_has_no_body(interim: bytes, head_only: bool) -> None:
    final = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n" + (b"" if head_only else b"ok")
    for count in (1, 3):
        data = interim * count + final
        for size in (1, 7, len(data)):
            answer = UpstreamResponse(made(), lambda answer: b"", head_only=head_only, http10=False, upgrade=False)
            for at in range(0, len(data), size):
                answer.feed(data[at : at + size])
            assert b"".join(answer.out) == b"HTTP/1.1 103 H\r\n\r\n" * count + final
            assert (answer.done, answer.broken, answer.extra) == (True, None, False)
            assert not answer.reusable  # somebody said that it ends


@pytest.mark.parametrize(
    ("status", "kept"), [(b"426 Upgrade Required", True), (b"200 OK", False), (b"400 Bad Request", False)]
)
def test_a_426_says_which_protocol_is_wanted(status: bytes, kept: bool) -> None:
    fields = b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    out, *_ = read([b"HTTP/1.1 %b\r\n%bContent-Length: 2\r\n\r\nno" % (status, fields)])
    assert out == b"HTTP/1.1 %b\r\n%bContent-Length: 2\r\nX-Ours: 1\r\n\r\nno" % (status, fields if kept else b"")


def test_trailers_say_nothing_of_framing_or_the_connection() -> None:
    said = (
        b"Transfer-Encoding: gzip\r\nConnection: close\r\nX: y\r\nKeep-Alive: timeout=1\r\nUpgrade: h2c\r\n"
        b"Content-Length: 7\r\nEnd: 1\r\n"
    )
    answer = CHUNKED + b"0\r\n" + said + b"\r\n"
    for size in (len(answer), 1):
        out, _, done, broken, extra, *_ = read([answer[at : at + size] for at in range(0, len(answer), size)])
        assert out.endswith(b"okX: y\r\nEnd: 1\r\n\r\n")
        assert (done, broken, extra) == (True, None, False)


TOO_MUCH_BESIDE = "too much of the answer is no body: trailers, or what stands beside the sizes of chunks"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n"


@pytest.mark.parametrize("mute", [False, True], ids=["read", "drained"])
@pytest.mark.parametrize(
    ("first", "again", "why"),
    [
        (CHUNKED + b"0\r\n", b"X: %b\r\n" % (b"v" * 1000), "too many fields"),
        (CHUNKED + b"0\r\n", b"a:\r\n", "too many fields"),
        (CHUNKED + b"0\r\nX: ", b"v" * 1000, TOO_MUCH_BESIDE),
        (CHUNKED + b"0\r\n", b"n" * 1000, TOO_MUCH_BESIDE),
        (CHUNKED + b"0\r\nX: y\r\n", b"N: %b\r\n" % (b"v" * 9000), TOO_MUCH_BESIDE),
        (CHUNKED + b"2;x=", b"e" * 1000, TOO_MUCH_BESIDE),
        (b"HTTP/1.1 200 OK\r\nX: ", b"v" * 1000, "the head of the answer is too large"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\nX: ", b"v" * 1000, "the head of the answer is too large"),
        (b"", b"HTTP/1.1 103 Hint\r\nLink: <a>\r\n\r\n", "too many interim answers"),
        (b"", b"HTTP/1.1 103 Hint\r\nLink: %b\r\n\r\n" % (b"v" * 20_000), "the head of the answer is too large"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"\r\n", "the head of the answer is too large"),
    ],
)  # fmt: skip
def test_whatever_an_upstream_sends_without_end_is_bounded(first: bytes, again: bytes, why: str, mute: bool) -> None:
    answer = UpstreamResponse(made(), lambda answer: b"", head_only=False, http10=False, upgrade=False, mute=mute)
    answer.feed(first)
    fed = kept = 0
    while answer.broken is None and fed < 2 * HEAD_BYTES_MAX:
        answer.feed(again * (1 + 1000 // len(again)))
        fed += len(again) * (1 + 1000 // len(again))
        kept += sum(map(len, answer.out))
        answer.out.clear()
    assert why in (answer.broken or "")
    assert fed <= HEAD_BYTES_MAX + 25_000
    assert kept <= HEAD_BYTES_MAX + 25_000
    answer.feed(again)
    assert answer.extra


def test_trailers_and_extensions_within_the_bounds_pass() -> None:
    trailers = b"".join(b"X-%d: %b\r\n" % (n, b"v" * 900) for n in range(256))
    out, _, done, broken, *_ = read([CHUNKED, b"2;x=" + b"e" * 200_000, b"\r\nok\r\n", b"0\r\n", trailers, b"\r\n"])
    assert (done, broken) == (True, None)
    assert trailers in out


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=4))
def test_no_bytes_make_an_answer_raise(noise: bytes, cuts: list[int]) -> None:
    for start in (b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"):
        data = start + noise
        edges = sorted({0, len(data), *(min(cut, len(data)) for cut in cuts)})
        answer = UpstreamResponse(made(), lambda answer: b"", head_only=False, http10=False, upgrade=False)
        for first, last in pairwise(edges):
            answer.feed(data[first:last])
            if answer.broken:
                break
        answer.eof(True)
        assert answer.done or answer.broken


def test_bytes_behind_the_end_are_seen() -> None:
    for data in (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nab", b"HTTP/1.1 204 x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"):
        for cut in range(len(data) - 1, len(data)):
            answer = UpstreamResponse(made(), lambda answer: b"", head_only=False, http10=False, upgrade=False)
            answer.feed(data[:cut])
            answer.feed(data[cut:])
            assert answer.done
            assert answer.extra
