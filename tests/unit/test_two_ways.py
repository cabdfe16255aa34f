"""One conversation, sent both ways: with the short way open and without it the client hears the same bytes, the
upstream gets the same bytes, and the records say the same."""

from __future__ import annotations

import gzip
import time
from dataclasses import asdict
from ipaddress import ip_network
from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st
from support import usage_samples, ways
from support.conversation import Peer, Talk, conversation, get, ok, post, sent

from sidecar.model.exchange import Outcome
from sidecar.proxy import plain_call
from sidecar.proxy.client_connection import REST_WAIT_S, UNWAITED, Client
from sidecar.proxy.upstream import Upstream, UpstreamConnection
from sidecar.settings import Secret, SetHeader, UpstreamSettings
from sidecar.usage.readers import UsageTaps

Step = tuple[Any, ...]
CHAT = (
    b'{"id":"chatcmpl-1","object":"chat.completion","model":"gpt-5-mini","choices":[{"index":0,"finish_reason":"stop",'
    b'"message":{"role":"assistant","content":"hi"}}],"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}'
)
JSON = b"Content-Type: application/json\r\n"
EVENTS = (b'data: {"choices":[],"id":"x"}\n\n', b"data: [DONE]\n\n")
STREAM = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in EVENTS)
    + b"0\r\n\r\n"
)

# Of a chat's stream: its head, texts, texts that are looked at twice, usage, end marks, and what no stream should have.
CHUNK = (
    b'data: {"id":"c-1","object":"chat.completion.chunk","model":"gpt-5-mini","choices":[{"index":0,"delta":'
    b'{"content":"%b"},"finish_reason":null}]}\n\n'
)
USAGE = (
    b'data: {"id":"c-1","object":"chat.completion.chunk","model":"gpt-5-mini","choices":[],'
    b'"usage":{"prompt_tokens":7,"completion_tokens":2,"total_tokens":9}}\n\n'
)
TEXTS = [CHUNK % text for text in (b"", b"one", b"the \\u0075sage", b"x" * 5_000)]


def framed(piece: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def in_chunks(fields: bytes, *bodies: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % fields
    return head + b"".join(framed(body) for body in bodies if body) + b"0\r\n\r\n"


PARTS = [
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n",
    *map(framed, TEXTS),
    framed(TEXTS[1]) + framed(TEXTS[1]),
    framed(USAGE),
    framed(b"data: [DONE]\n\n"),
    b"0\r\n\r\n",
    framed(USAGE) + framed(b"data: [DONE]\n\n") + b"0\r\n\r\n",
    framed(TEXTS[1][:50]),
    framed(TEXTS[1][50:]),
    framed(b'data: {"error":{"message":"no","code":"overloaded"}}\n\n'),
    framed(b": ping\n\n"),
    b"0\r\nX-Trailer: 1\r\n\r\n",
    b"3;ext=1\r\nabc\r\n",
    b"nonsense\r\n",
    b"0\r\n\r\nmore",
]

REQUESTS = [
    get(),
    get(b"/a?x=1&key=2"),
    get(b"/b/%41/../c"),
    get(b"/a", b"X-Tenant: acme\r\n"),
    get(b"/a", b"X-Tenant: acme\r\nX-Tenant: other\r\n"),
    get(b"/a", b"Connection: close\r\n"),
    get(b"/a", b"Connection: keep-alive, X-Tenant\r\nX-Tenant: acme\r\n"),
    get(b"/a", b"Traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\r\n"),
    get(b"/a", b"Traceparent: nonsense\r\n"),
    get(b"/a", b"User-Agent: " + b"x" * 600 + b"\r\n"),
    get(b"/" + b"y" * 2100),
    get(b"/a", b"X-" + b"n" * 200 + b": 1\r\n"),
    get(b"/a").replace(b"HTTP/1.1", b"HTTP/1.0"),
    get(b"/a").replace(b"GET", b"HEAD"),
    get(b"/a").replace(b"GET", b"OPTIONS"),
    get(b"/a").replace(b"\r\n", b"\n"),
    b"GET /a HTTP/1.1\r\n\r\n",
    b"GET http://other.test/a HTTP/1.1\r\nHost: me\r\n\r\n",
    b"nonsense\r\n\r\n",
    post(b"hello"),
    post(b""),
    post(b"x" * 70_000),
    post(b"once", fields=b"Idempotency-Key: k\r\n"),
    post(b"hello").replace(b"POST", b"PUT"),
    post(b'{"model":"gpt-5-mini","messages":[]}', b"/v1/chat/completions", JSON),
    post(b'{"model":"gpt-5-mini","stream":true,"messages":[]}', b"/v1/chat/completions", JSON),
    post(b"hi", fields=b"Expect: 100-continue\r\n"),
    b"POST /a HTTP/1.1\r\nHost: me\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
    b"POST /a HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
    b"POST /a HTTP/1.1\r\nHost: me\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /a HTTP/1.1\r\nHost: me\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    get(b"/1") + get(b"/2"),
    post(b"hi") + get(b"/2"),
    get(b"/a") + b"GET /half",
    get(b"/up/a", b"Authorization: Bearer client\r\nX-Tenant: acme\r\nCookie: a=b\r\n"),
    get(b"/up?x=1"),
    get(b"/upper"),
    get(b"/up/here/b", b"authorization: mine\r\nUser-Agent: curl\r\n"),
    get(b"/a", b"Authorization: Bearer client\r\n").replace(b"Host: me", b"Host: Other.Internal:80"),
    post(b'{"model":"gpt-5-mini","messages":[]}', b"/up/v1/chat/completions", JSON + b"Authorization: k\r\n"),
    get(b"/a", b"Proxy-Connection: close\r\n"),
    get(b"/a").replace(b"Host: me", b"Host: me/you"),
    post(b"ends\r\n\r"),  # with the beginning of what ends a head
    b"\n" + get(b"/a"),
    b"\r\n" + get(b"/a"),
    get(b"/a", b"X-Forwarded-For: 198.51.100.7\r\nX-Forwarded-Proto: https\r\n"),
    get(b"/a", b"X-Forwarded-For: 198.51.100.8, 127.0.0.9\r\nX-Forwarded-Proto: https\r\n"),
    get(b"/a", b"X-Forwarded-For: unknown\r\nX-Forwarded-Host: api.test\r\nVia: 1.1 lb\r\n"),
    get(b"/a", b"Forwarded: for=198.51.100.7\r\nX-Forwarded-For: 1.2.3.4\r\nX-Forwarded-For: 5.6.7.8\r\n"),
    get(b"/a", b"Connection: X-Forwarded-For\r\nX-Forwarded-For: 1.2.3.4\r\n"),
]
BEHIND_ANOTHER = range(len(REQUESTS) - 5, len(REQUESTS))
RESPONSES = [
    ok(),
    ok(b""),
    ok(CHAT, JSON),
    ok(CHAT, JSON + b"x-request-id: req_1\r\nSet-Cookie: a=b\r\nDate: Sat, 28 Nov 2026 19:00:00 GMT\r\n"),
    ok(b"no", status=b"404 Not Found"),
    ok(b"no", JSON, status=b"500 Internal Server Error"),
    ok(b"ok", b"Connection: close\r\n"),
    ok(b"ok", b"Keep-Alive: timeout=1\r\n"),
    ok(b"ok", b"Keep-Alive: timeout=5, max=1\r\nConnection: keep-alive\r\n"),
    ok(b"ok", b"Connection: X-Own\r\nX-Own: 1\r\n"),
    ok(b"ok", b"Location: http://up.test/there\r\n", status=b"302 Found"),
    ok(b"ok", b"X-Odd:  two blanks\r\n"),
    ok(b"ok") + b"more",
    ok(b"z" * 70_000),
    STREAM,
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nuntil the end",
    b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 100 Continue\r\n\r\n" + ok(),
    b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n",
    ok(b"ok", b"Proxy-Connection: close\r\n"),
    ok(gzip.compress(CHAT), JSON + b"Content-Encoding: gzip\r\n"),
    in_chunks(JSON, CHAT),
    in_chunks(JSON, CHAT[:40], CHAT[40:]),
    in_chunks(JSON + b"Content-Encoding: gzip\r\n", gzip.compress(CHAT)),
    ok(b"not gzip at all", JSON + b"Content-Encoding: gzip\r\n"),
    ok(CHAT, JSON + b"Content-Encoding: rot13\r\n"),
    ok(CHAT + b"\n" + CHAT, JSON),
    ok(b"".join(EVENTS), JSON),
    ok(b"".join(EVENTS), b"Content-Type: text/event-stream\r\n"),
    ok(CHAT, b"Content-Type: application/problem+json\r\n", status=b"429 Too Many Requests"),
    ok(b'{"a":"' + b"x" * 70_000 + b'"}', JSON),
    in_chunks(JSON, b'{"a":"', *[b"x" * 20_000] * 4, b'"}'),
    in_chunks(JSON, b""),
    ok(b"5\r\nhello\r\n" * 3, JSON),
    ok(TEXTS[1] + USAGE + b"data: [DONE]\n\n", b"Content-Type: text/event-stream\r\n"),
    ok(TEXTS[0] + USAGE + b"data: [DONE]\n\n", b"Content-Type: text/event-stream\r\n"),
    ok(b"\n" + TEXTS[1] + USAGE, JSON),
    in_chunks(b"Content-Type: text/event-stream\r\n", TEXTS[1] + USAGE + b"data: [DONE]\n\n"),
    in_chunks(JSON, TEXTS[1], USAGE + b"data: [DONE]\n\n"),
    ok(b"ok", b"Keep-Alive: timeout=1\r\nKeep-Alive: timeout=60\r\n"),
]

CUTS = st.lists(st.integers(0, 400), max_size=2)
# Whether a connection to the upstream can be had.
CONNECTING: list[Step] = [("connects later",), ("connects",), ("refuses",), ("is silent",)]
STEPS = st.one_of(
    st.tuples(st.just("request"), st.integers(0, len(REQUESTS) - 1), CUTS),
    st.tuples(st.just("response"), st.integers(0, len(RESPONSES) - 1), CUTS),
    st.tuples(st.just("part"), st.integers(1, len(PARTS) - 1), CUTS),
    st.sampled_from(
        [
            ("leaves",), ("resets",), ("lost",), ("reset upstream",), ("holds",), ("commits", True), ("commits", False),
            ("passes", 1.0), ("passes", 1000.0), ("stops reading",), ("reads on",), ("new client",),
            ("last calls",), *CONNECTING,
        ]
    ),
)  # fmt: skip
# A call for which there is no connection yet.
NO_CONNECTION: st.SearchStrategy[list[Step]] = st.builds(
    lambda before, asked, between, after, response: [("lost",), before, asked, *between, after, response],
    st.sampled_from(CONNECTING),
    st.tuples(st.just("request"), st.sampled_from([0, 3, 7, 19, 24, 25]), CUTS),
    st.lists(
        st.one_of(
            st.sampled_from(
                [("leaves",), ("resets",), ("passes", 1.0), ("passes", 1000.0), ("last calls",), ("holds",)]
            ),
            st.tuples(st.just("request"), st.sampled_from([0, 24]), CUTS),
        ), max_size=2,
    ),
    st.sampled_from(CONNECTING),
    st.tuples(st.just("response"), st.sampled_from([0, 2, 3]), CUTS),
)  # fmt: skip
# As clients and servers of Python send them: the head, and then the body; of either or both.
BETWEEN: list[list[Step]] = [[], [("passes", 1.0)], [("holds",)]]
BEHIND: list[list[Step]] = [[], [("commits", True)]]
IN_PIECES: st.SearchStrategy[list[Step]] = st.builds(
    lambda asked, between, response, behind: [asked, *between, response, *behind],
    st.tuples(st.just("request"), st.sampled_from([19, 22, 24, 25]), CUTS),
    st.sampled_from(BETWEEN),
    st.tuples(st.just("response"), st.integers(0, len(RESPONSES) - 1), CUTS),
    st.sampled_from(BEHIND),
)
USUAL: st.SearchStrategy[list[Step]] = st.tuples(
    st.tuples(st.just("request"), st.sampled_from([0, 3, 7, 19, 24, *BEHIND_ANOTHER]), st.just([])),
    st.tuples(st.just("response"), st.sampled_from([0, 2, 3, 4, 5, 7]), st.just([])),
).map(list)
STREAMED: st.SearchStrategy[list[Step]] = st.tuples(
    st.sampled_from([[], [("holds",)]]),
    st.just([("request", 25, []), ("part", 0, []), ("part", 1, []), ("part", 2, [])]),
    st.lists(st.sampled_from([("part", place, []) for place in (1, 2, 2, 3, 4, 5, 6)]), max_size=4),
    st.lists(STEPS, max_size=2),
    st.sampled_from([[("part", 9, [])], [("part", 6, []), ("part", 7, []), ("part", 8, [])], [("part", 8, [])], []]),
    st.sampled_from([[], [("commits", True)], [("commits", False)], [("leaves",)]]),
).map(lambda parts: list(chain.from_iterable(parts)))
SCRIPTS = st.lists(
    st.one_of(STEPS.map(lambda step: [step]), USUAL, STREAMED, IN_PIECES, NO_CONNECTION), max_size=8
).map(lambda parts: list(chain.from_iterable(parts)))

SEVERAL = (
    UpstreamSettings(
        name="up", url="http://vendor.test/base", prefix="/up",
        set_headers=(SetHeader(name="authorization", value=Secret("Bearer ours")),),
        remove_headers=("x-tenant", "cookie"),
    ),
    UpstreamSettings(name="here", url="http://here.test", prefix="/up/here", remove_headers=("user-agent",)),
    UpstreamSettings(
        name="other", url="http://other.test", host="other.internal", timeout_s=5,
        set_headers=(SetHeader(name="x-key", value=Secret("k")),),
    ),
)  # fmt: skip

ANSWERED: Step = ("response", 0, [])
WARM: list[Step] = [("request", 0, []), ANSWERED]
THROUGH_ANOTHER: list[Step] = [
    step for place in (*BEHIND_ANOTHER, 45, 46) * 2 for step in [("request", place, []), ANSWERED]
]


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted({cut for cut in cuts if 0 < cut < len(data)}), len(data)]
    return [data[start:stop] for start, stop in pairwise(places)]


def play(talk: Talk, step: Step) -> None:
    what, client = step[0], talk.client
    upstream = talk.upstreams[-1] if talk.upstreams else None
    if what == "request" and not client.over:
        client.says(*pieces(REQUESTS[step[1]], step[2]))
    elif what == "response" and upstream is not None and not upstream.over:
        upstream.says(*pieces(RESPONSES[step[1]], step[2]))
    elif what == "part" and upstream is not None and not upstream.over:
        upstream.says(*pieces(PARTS[step[1]], step[2]))
    elif what == "asks" and not client.over:
        client.says(step[1])
    elif what == "says" and upstream is not None and not upstream.over:
        upstream.says(step[1])
    elif what in ("leaves", "resets") and not client.over:
        client.leaves() if what == "leaves" else client.resets()
    elif what in ("lost", "reset upstream") and upstream is not None and not upstream.over:
        upstream.leaves() if what == "lost" else upstream.resets()
    elif what == "holds":
        talk.holds()
    elif what == "commits":
        talk.commits(step[1])
    elif what == "passes":
        talk.passes(step[1])
    elif what == "last calls":
        talk.proxy.leave()
    elif what == "stops reading":
        client.stops_reading()
    elif what == "reads on":
        client.reads_on()
    elif what in ("connects", "connects later"):
        talk.connects(now=what == "connects")
    elif what == "refuses":
        talk.connects(error=ConnectionRefusedError(111, "refused"))
    elif what == "is silent":
        talk.connects(error=TimeoutError())
    elif what == "new client":
        talk.client = talk.new_client()


def seen(peer: Peer) -> tuple[Any, ...]:
    return peer.heard + peer.unread, peer.over, peer.closing, peer.was_reset, peer.held


def fact(exchange: Any) -> dict[str, Any]:
    facts = asdict(exchange)
    for name in ("started_ns", "started_mono_ns", "duration_ms", "first_byte_ms"):
        facts[name] = facts[name] is not None
    if facts["usage"] is not None:
        facts["usage"]["time_to_first_token_ms"] = facts["usage"]["time_to_first_token_ms"] is not None
    return facts


def check_flags(talk: Talk) -> None:
    """The flag by which a connection knows that nothing is in the way of a plain request says what a look at everything
    would."""
    for peer in talk.clients:
        client = peer.protocol
        assert isinstance(client, Client)
        if client.plainly and client.call is None and client.transport is not None:
            border = client._border
            assert client._begin_anew_if_clear()
            assert client._border == border == b""


def transcript(script: list[Step], *, short: bool, options: dict[str, Any]) -> tuple[list[Any], int]:
    ways.short_open = short
    try:
        with conversation(taps=UsageTaps(clock_ns=time.monotonic_ns), **options) as talk:
            for path in (b"/warm", b"/up/warm", b"/up/here/warm") if options.get("upstreams") else (b"/warm",):
                before = len(talk.upstreams)
                talk.client.says(get(path))
                if len(talk.upstreams) > before:  # else there is none for it
                    talk.upstreams[-1].says(ok())
                elif talk.client.over:
                    talk.client = talk.new_client()
            warmed = talk.recorder.plain_calls
            told: list[Any] = []
            for step in script:
                play(talk, step)
                check_flags(talk)
                told.append((step, [seen(peer) for peer in talk.clients], [seen(peer) for peer in talk.upstreams]))
            talk.connects()
            talk.finish()
            # Calls that end in one look at the deadlines do so in no order: the open ones are a set.
            told.append([fact(exchange) for exchange in sorted(talk.recorder.records, key=lambda one: one.id)])
            counts = asdict(talk.counts)
            told.append(
                {name: sorted(map(str, value)) if isinstance(value, list) else value for name, value in counts.items()}
            )
            plain = talk.recorder.plain_calls - warmed
    finally:
        ways.short_open = True
    return told, plain


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"forwarded": "x-forwarded", "via": "edge"},
        {"forwarded": "x-forwarded", "trusted_proxies": (ip_network("127.0.0.0/8"),)},
        {"forwarded": "forwarded", "trusted_proxies": (ip_network("127.0.0.0/8"),)},
        {"meter_id_header": True, "preserve_host": True},
        {"upstreams": SEVERAL},
        {"upstreams": SEVERAL, "upstream_url": None, "preserve_host": True},
    ],
    ids=["plain", "via", "behind", "behind rfc", "meter_id", "several", "no rest"],
)
@given(script=SCRIPTS)
@example(script=[("request", 0, []), ("response", 0, []), ("request", 24, []), ("response", 2, [])])
@example(script=[("request", 33, []), ("response", 0, []), ("request", 0, [])])
@example(script=[("request", 19, [40]), ("response", 0, []), ("request", 0, []), ("response", 0, [])])
@example(script=[("holds",), ("request", 0, []), ("response", 0, []), ("leaves",), ("commits", True)])
@example(script=[("holds",), ("request", 0, []), ("response", 0, []), ("commits", False)])
@example(script=[("request", 0, []), ("lost",), ("response", 0, [])])
@example(
    script=[("request", 0, []), ("request", 31, []), ("response", 0, []), ("response", 0, []), ("response", 0, [])]
)
@example(script=[("request", 33, []), ("response", 2, [])] * 4)
@example(script=[("request", 41, []), ("new client",), ("request", 41, []), ("response", 0, [])])
@example(script=[("request", 40, []), ("response", 0, []), ("request", 0, []), ("response", 25, [])])
@example(
    script=[
        ("request", place, []) if what else ("response", 3, []) for place in (34, 37, 38, 39) * 4 for what in (1, 0)
    ]
)
@example(script=THROUGH_ANOTHER)
@example(
    script=[("request", 24, []), ("new client",), ("request", 19, []), ("new client",), ("request", 0, []),
            ("passes", 1000.0)]
)  # fmt: skip
@example(script=[("request", 42, []), ("response", 0, []), ("request", 43, []), ("response", 0, [])])
@example(script=[("request", 42, []), ("response", 0, []), ("request", 44, [1]), ("response", 0, [])])
@example(script=[("request", 42, []), ("request", 44, []), ("response", 0, []), ("response", 0, [])])
@example(script=[("request", 0, []), ("stops reading",), ("response", 13, []), ("request", 0, []), ("reads on",)])
@example(script=[("holds",), ("request", 0, []), ("response", 0, []), ("last calls",), ("commits", True)])
@example(script=[("request", 0, []), ("last calls",), ("response", 0, []), ("request", 0, [])])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 1, []), ("part", 2, []), ("part", 9, [])] * 2)
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 2, []), ("leaves",)])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("stops reading",), ("part", 4, []),
                 *[("part", 4, [])] * 14, ("reads on",), ("part", 9, [])])  # fmt: skip
@example(script=[("holds",), ("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 9, []), ("leaves",)])
@example(script=[("holds",), ("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 9, []),
                 ("commits", False)])  # fmt: skip
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("passes", 1000.0)])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 2, [9]), ("part", 9, [])])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("lost",)])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 10, []), ("part", 6, [])])
@example(script=[("holds",), ("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 7, []), ("part", 8, []),
                 ("commits", True), ("request", 0, [])])  # fmt: skip
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 7, []), ("passes", 1000.0)])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 7, []), ("part", 14, [])])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("request", 0, []), ("part", 9, [])])
@example(script=[("request", 25, []), ("part", 0, []), ("part", 2, []), ("last calls",), ("part", 9, []),
                 ("request", 0, [])])  # fmt: skip
@example(script=[("lost",), ("connects later",), ("request", 0, []), ("connects",), ("response", 0, []), *WARM])
@example(script=[("lost",), ("connects later",), ("request", 24, []), ("leaves",), ("connects",), ("response", 2, [])])
@example(script=[("lost",), ("connects later",), ("request", 24, []), ("resets",), ("new client",), ("request", 0, [])])
@example(
    script=[("lost",), ("connects later",), ("request", 0, []), ("request", 24, []), ("connects",), ANSWERED, ANSWERED]
)
@example(script=[("lost",), ("connects later",), ("request", 24, []), ("refuses",), ("connects",), *WARM])
@example(script=[("lost",), ("refuses",), ("request", 24, []), ("connects",), *WARM])
@example(script=[("lost",), ("is silent",), ("request", 24, []), ("holds",), ("request", 24, []), ("commits", True)])
@example(script=[("lost",), ("connects later",), ("request", 0, []), ("passes", 1000.0), ("connects",), ANSWERED])
@example(script=[("lost",), ("connects later",), ("request", 0, []), ("last calls",), ("connects",), ANSWERED])
@example(script=[("holds",), ("lost",), ("refuses",), ("request", 24, []), ("leaves",), ("commits", True)])
# It goes once more, and there is no connection for that.
@example(script=[("refuses",), ("request", 22, []), ("lost",), ("request", 0, [])])
@example(script=[("connects later",), ("request", 23, []), ("reset upstream",), ("leaves",)])
@example(script=[("lost",), ("request", 25, []), ("part", 0, []), ("part", 2, []), ("part", 9, []), *WARM])
@example(script=[("request", 0, []), ("response", len(RESPONSES) - 1, []), ("request", 0, []), ANSWERED])
@settings(max_examples=40)
def test_both_ways_forward_and_record_the_same(options: dict[str, Any], script: list[Step]) -> None:
    short, plain = transcript(script, short=True, options=options)
    careful, none = transcript(script, short=False, options=options)
    assert none == 0
    event(f"calls on the short way: {min(plain, 3)}")
    for one, other in zip(short, careful, strict=True):
        assert one == other


# Streams of all families, at the paths of all: whose a stream is, it says itself.
SAMPLES = [sample for name, sample in usage_samples.load().items() if name.endswith(".sse")]
EVENT_STREAM = b"Content-Type: text/event-stream\r\n"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
BEFORE: list[bytes] = [b"", b": ping\n\n", PING, b"data: [DONE]\n\n", b"data: {}\n\n"]


def events_of(body: bytes) -> list[bytes]:
    """The first few and the last ones, which is where something is said."""
    events = [event + b"\n\n" for event in body.replace(b"\r\n", b"\n").split(b"\n\n") if event.strip()]
    return events if len(events) <= 12 else events[:6] + events[-6:]


def stream_of(sample: usage_samples.Sample, path: str, before: bytes, together: list[int], *, odd: bool) -> list[Step]:
    """A call that is answered by that stream; `together`: how many of its events come in a chunk, each in a read."""
    events = [event for event in (before, *events_of(sample.body)) if event]
    if odd:
        events.reverse()
    chunks, left = [], list(events)
    for count in together:
        chunks.append(b"".join(left[:count]))
        left = left[count:]
    asked = post(sample.request_body or b"{}", path.encode(), JSON)
    head = b"HTTP/1.1 200 OK\r\n%bTransfer-Encoding: chunked\r\n\r\n" % EVENT_STREAM
    said = [head, *(framed(chunk) for chunk in [*chunks, *left] if chunk), b"0\r\n\r\n"]
    return [("asks", asked), *(("says", piece) for piece in said)]


STREAMS: st.SearchStrategy[list[Step]] = st.builds(
    stream_of,
    st.sampled_from(SAMPLES),
    st.sampled_from(sorted({sample.path for sample in SAMPLES})),
    st.sampled_from(BEFORE),
    st.lists(st.integers(1, 3), max_size=12),
    odd=st.booleans(),
)


@given(
    streams=st.lists(STREAMS, min_size=1, max_size=2),
    held=st.booleans(),
    cut=st.integers(1, 30),
    end=st.sampled_from([("leaves",), ("lost",), ("commits", True), ("commits", False), ("passes", 1000.0)]),
)
@settings(max_examples=60)
def test_whose_stream_it_is_is_seen_both_ways(streams: list[list[Step]], held: bool, cut: int, end: Step) -> None:
    script: list[Step] = [("holds",)] if held else []
    script += [*chain.from_iterable(streams), *streams[-1][:cut], end]
    short, _ = transcript(script, short=True, options={})
    careful, _ = transcript(script, short=False, options={})
    for one, other in zip(short, careful, strict=True):
        assert one == other


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("path", "sample"),
    [
        ("/v1/messages", "openai_chat_stream.sse"),
        ("/v1/messages", "openai_responses_stream.sse"),
        ("/v1/chat/completions", "anthropic_messages_stream.sse"),
        ("/v1/chat/completions", "openai_responses_stream_failed.sse"),
        ("/v1/responses", "openai_chat_stream.sse"),
    ],
)
def test_the_end_mark_of_another_family_waits_for_the_record(path: str, sample: str, held: bool) -> None:
    """What came of a stream that is not of the path's own family was passed on whole before its record was on disk, and
    who left behind its end mark had left too early."""
    call = stream_of(usage_samples.load()[sample], path, b"", [], odd=False)[:-1]  # the last chunk is still to come
    with conversation(taps=UsageTaps(clock_ns=time.monotonic_ns)) as talk:
        for step in [*call, ("says", b"0\r\n\r\n")]:
            play(talk, step)
        before = len(talk.recorder.records)
        if held:
            talk.holds()
        talk.client.heard = b""
        for step in call:
            play(talk, step)
        assert (call[-1][1] in talk.client.heard) is not held
        if held:
            talk.commits()
        assert call[-1][1] in talk.client.heard
        talk.client.leaves()
        assert len(talk.recorder.records) == before + 1
        assert talk.recorder.records[-1].outcome is Outcome.COMPLETE


def test_the_usual_call_takes_the_short_way() -> None:
    _, plain = transcript([("request", 24, []), ("response", 2, [])] * 3, short=True, options={})
    assert plain == 3


def test_the_usual_stream_takes_the_short_way() -> None:
    steps: list[Step] = [("request", 25, []), ("part", 0, []), *[("part", 2, [])] * 4, ("part", 9, [])]
    _, plain = transcript(steps * 3, short=True, options={})
    assert plain == 3


HEAD_OF_CHAT = REQUESTS[24].index(b"\r\n\r\n") + 4
CHAT_RESPONSES = [2, 26, 27, 28, 29]


@pytest.mark.parametrize("response", CHAT_RESPONSES)
@pytest.mark.parametrize("held", [False, True])
def test_head_and_body_that_come_one_after_the_other_take_the_short_way(response: int, held: bool) -> None:
    head = RESPONSES[response].index(b"\r\n\r\n") + 4
    steps: list[Step] = [
        ("request", 24, [HEAD_OF_CHAT, HEAD_OF_CHAT + 3]),
        *([("holds",)] if held else []),
        ("response", response, [head]),
        ("commits", True),
    ]
    short, plain = transcript(steps * 3, short=True, options={})
    assert plain == 3
    careful, _ = transcript(steps * 3, short=False, options={})
    assert short == careful
    assert all(record["usage"]["total_tokens"] == 9 for record in short[-2][1:])


def test_calls_behind_another_proxy_take_the_short_way_and_are_their_clients() -> None:
    options = {"forwarded": "x-forwarded", "trusted_proxies": (ip_network("127.0.0.0/8"),)}
    steps: list[Step] = []
    for place in BEHIND_ANOTHER[:3]:
        steps += [("request", place, []), ("response", 0, [])]
    told, plain = transcript(steps * 2, short=True, options=options)
    assert plain == 6
    ips = [record["client_ip"] for record in told[-2][1:]]
    assert ips == ["198.51.100.7", "198.51.100.8", "127.0.0.1"] * 2


@pytest.mark.parametrize(
    ("framed_as", "cuts"), [("sized", []), ("sized", [80, 200]), ("chunked", []), ("chunked", [103])]
)
def test_a_compressed_document_that_unfolds_to_much_is_read_step_by_step(framed_as: str, cuts: list[int]) -> None:
    document = gzip.compress(CHAT[:-1] + b',"x":"' + b"x" * (4 << 20) + b'"}')
    fields = JSON + b"Content-Encoding: gzip\r\n"
    response = ok(document, fields) if framed_as == "sized" else in_chunks(fields, document)
    with conversation(taps=UsageTaps()) as talk:
        talk.warm()
        for _ in range(2):
            talk.client.says(REQUESTS[24])
            talk.upstream.says(*pieces(response, cuts))
            talk.client.hears(response)
            record = talk.recorded(Outcome.COMPLETE, status=200, request_bytes=36, response_bytes=len(document))
            assert record.usage is not None
            assert record.usage.total_tokens == 9
        assert talk.recorder.plain_calls == 0


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, br"])
def test_other_codings_go_the_careful_way(coding: str) -> None:
    response = ok(b"...", JSON + b"Content-Encoding: " + coding.encode() + b"\r\n")
    with conversation(taps=UsageTaps()) as talk:
        talk.warm()
        talk.client.says(REQUESTS[24])
        talk.upstream.says(response)
        talk.client.hears(response)
        assert talk.recorder.plain_calls == 0


def test_what_outgrows_what_is_kept_goes_on_with_care() -> None:
    for response in (36, 37):
        steps: list[Step] = [("request", 24, []), ("response", response, [400, 30_000, 69_000])]
        short, plain = transcript(steps * 2, short=True, options={})
        careful, _ = transcript(steps * 2, short=False, options={})
        assert (short, plain) == (careful, 0)


def test_a_client_that_stops_reading_in_the_middle_of_a_body_is_waited_for() -> None:
    body = b'{"a":"' + b"x" * 60_000 + b'"}'
    response = ok(body, JSON)
    for short in (True, False):
        ways.short_open = short
        try:
            with conversation(taps=UsageTaps()) as talk:
                talk.warm()
                talk.client.says(REQUESTS[24])
                talk.client.stops_reading()
                for at in range(0, len(response), 10_000):
                    talk.upstream.says(response[at : at + 10_000])
                talk.client.reads_on()
                talk.client.hears(response)
        finally:
            ways.short_open = True


def test_a_body_that_does_not_come_at_once_does_not_keep_its_head_back() -> None:
    request = post(b"hello")
    head, body = request[:-5], request[-5:]
    with conversation() as talk:
        talk.warm()
        talk.client.says(head)
        talk.upstream.hears_nothing()
        talk.passes(REST_WAIT_S)
        talk.upstream.hears(sent(head))
        talk.client.says(body)
        talk.upstream.hears(body)
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(Outcome.COMPLETE, status=200, request_bytes=5, response_bytes=2)
        for _ in range(UNWAITED):  # it has shown that its bodies come later
            talk.client.says(head)
            talk.upstream.hears(sent(head))
            talk.client.says(body)
            talk.upstream.hears(body)
            talk.upstream.says(ok())
            talk.recorded(Outcome.COMPLETE, status=200, request_bytes=5, response_bytes=2)
        assert talk.recorder.plain_calls == 0
        talk.client.says(head, body)
        talk.upstream.hears(sent(head) + body)
        talk.upstream.says(ok())
        assert talk.recorder.plain_calls == 1


@pytest.mark.parametrize("size", [5, 20_000, 60_000])
@pytest.mark.parametrize("cuts", [[], [60], [100], [60, 18_000], [10]])
def test_a_connection_whose_first_call_went_with_care_takes_the_short_way_behind_it(size: int, cuts: list[int]) -> None:
    """Where not all of it came at once: a connection is made while the rest comes."""
    request = post(b"x" * size)
    whole = len(pieces(request, cuts)) == 1
    with conversation() as talk:
        for _ in range(2):
            talk.client.says(*pieces(request, cuts))
            talk.upstream.hears(sent(request))
            talk.upstream.says(ok())
            talk.client.hears(ok())
        # A head in pieces is no plain one.
        assert talk.recorder.plain_calls == (2 if whole else 0 if cuts == [10] else 1)


@pytest.mark.parametrize("cut", [3, 60, 17_000, -4])
def test_the_beginning_of_the_next_request_behind_a_body_is_not_lost(cut: int) -> None:
    request = post(b"x" * 20_000)
    with conversation() as talk:
        talk.client.says(request[:cut], request[cut:] + get(b"/b")[:9])
        talk.upstream.hears(sent(request))
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.client.says(get(b"/b")[9:])
        talk.upstream.hears(sent(get(b"/b")))
        talk.upstream.says(ok())
        talk.client.hears(ok())
        assert talk.recorder.plain_calls == 0


@pytest.mark.parametrize("end", ["over", "leaves", "odd"])
def test_bodies_of_requests_are_kept_for_so_many_streams_and_no_more(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request = REQUESTS[25]
    body_bytes = len(request) - request.index(b"\r\n\r\n") - 4
    monkeypatch.setattr(plain_call, "STREAM_BODIES_BYTES_MAX", body_bytes)
    with conversation(taps=UsageTaps()) as talk:
        talk.warm()
        shared = talk.proxy._plain
        assert shared is not None
        for _ in range(2):
            talk.client.says(request)
            talk.upstream.says(PARTS[0], PARTS[2])
            assert shared.stream_body_bytes == body_bytes
            shared.stream_body_bytes += 1  # another's
            talk.client.heard = b""
            if end == "over":
                talk.upstream.says(PARTS[9])
            elif end == "odd":
                talk.upstream.says(PARTS[11], PARTS[9])
            else:
                talk.client.leaves()
                talk.client = talk.new_client()
            assert shared.stream_body_bytes == 1
            before = talk.recorder.plain_calls
            talk.client.says(request)
            if end != "leaves":
                talk.upstream.says(PARTS[0], PARTS[2], PARTS[9])
                assert talk.recorder.plain_calls == before  # no room
            else:
                talk.client.leaves()
                talk.client = talk.new_client()
                talk.client.says(get(b"/warm"))
                talk.upstream.says(ok())
            shared.stream_body_bytes -= 1
            assert shared.stream_body_bytes == 0


def test_pieces_of_a_body_do_not_put_off_its_head() -> None:
    request = post(b"hello")
    with conversation() as talk:
        talk.warm()
        talk.client.says(request[:-5])
        for at in range(-5, -1):
            talk.passes(REST_WAIT_S / 4)
            talk.client.says(request[at : at + 1])
        talk.upstream.hears(sent(request[:-1]))


def test_a_call_began_with_its_first_byte() -> None:
    request = post(b"hello")
    with conversation() as talk:
        talk.warm()
        before_ns = time.monotonic_ns()
        talk.client.says(request[:-5])
        said_ns = time.monotonic_ns()
        talk.client.says(request[-5:])
        talk.upstream.says(ok())
        record = talk.recorded(Outcome.COMPLETE, status=200, request_bytes=5, response_bytes=2)
        assert talk.recorder.plain_calls == 1
        assert before_ns <= record.started_mono_ns <= said_ns
        assert record.started_ns < time.time_ns() - (time.monotonic_ns() - said_ns)


@pytest.mark.parametrize("how", ["leaves", "resets"])
def test_who_leaves_while_its_body_is_waited_for_is_recorded(how: str) -> None:
    told = []
    for short in (True, False):
        ways.short_open = short
        try:
            with conversation() as talk:
                talk.warm()
                talk.client.says(post(b"hello")[:-2])
                getattr(talk.client, how)()
                talk.upstream.hears(sent(post(b"hello")[:-2]))
                assert talk.upstream.over
                told.append([fact(exchange) for exchange in talk.recorder.records])
        finally:
            ways.short_open = True
    assert told[0] == told[1]


def test_a_stop_does_not_lose_what_is_waited_for() -> None:
    request = post(b"hello")
    with conversation() as talk:
        talk.warm()
        talk.client.says(request[:-2])
        talk.stops()
        talk.upstream.hears(sent(request[:-2]))
        talk.client.says(request[-2:])
        talk.upstream.says(ok())
        assert talk.client.heard.endswith(b"ok")
        talk.recorded(Outcome.COMPLETE, status=200, request_bytes=5, response_bytes=2)


def test_the_head_of_a_response_does_not_wait_for_its_body() -> None:
    with conversation(taps=UsageTaps()) as talk:
        talk.warm()
        talk.client.says(REQUESTS[24])
        response = RESPONSES[2]
        talk.upstream.says(response[:-20])
        talk.client.hears(response[:-20])
        talk.upstream.says(response[-20:])
        talk.client.hears(response[-20:])
        assert talk.recorder.plain_calls == 1


def test_a_response_that_is_not_plain_is_handled_with_care() -> None:
    with conversation() as talk:
        talk.warm()
        talk.client.says(get(b"/a"))
        talk.upstream.hears(sent(get(b"/a")))
        talk.upstream.says(STREAM[:120], STREAM[120:])
        assert talk.client.heard == STREAM
        assert talk.recorder.plain_calls == 0


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    ("step", "options"), [("release", {}), ("keep", {}), ("_with_own_fields", {"meter_id_header": True})]
)
@pytest.mark.parametrize("parts", [[ok()], [PARTS[0], PARTS[2], PARTS[9]]], ids=["document", "stream"])
def test_a_fault_of_ours_at_the_end_of_a_plain_call_ends_it_once(
    parts: list[bytes], step: str, options: dict[str, Any], held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"release": UpstreamConnection, "keep": Upstream, "_with_own_fields": plain_call.PlainCall}[step]

    def raises(*_: object) -> None:
        raise RuntimeError("a fault of ours")

    with conversation(taps=UsageTaps(), **options) as talk:
        for _ in range(2):  # both heads are known then
            talk.client.says(REQUESTS[25])
            talk.upstream.says(*parts)
        before = len(talk.recorder.records)
        if held:
            talk.holds()
        monkeypatch.setattr(broken, step, raises)
        talk.client.says(REQUESTS[25])
        talk.upstream.says(*parts)
        monkeypatch.undo()
        if held:
            talk.commits()
        assert talk.proxy.open_calls == 0
        assert len(talk.recorder.records) == before + 1


@pytest.mark.parametrize("kind", [b"text/event-stream", b"application/json", b"text/plain", b"application/x-ndjson"])
@pytest.mark.parametrize("status", [b"200 OK", b"429 Too Many"])
def test_a_stream_that_comes_whole_with_its_length_is_timed_each_time(kind: bytes, status: bytes) -> None:
    body = TEXTS[1] + USAGE + b"data: [DONE]\n\n"
    if kind == b"application/x-ndjson":
        body = b'{"model":"m","message":{"content":"a"},"done":false}\n{"model":"m","done":true,"eval_count":2}\n'
    response = ok(body, b"Content-Type: " + kind + b"\r\n", status)
    request = post(b'{"model":"m","stream":true}', b"/api/chat" if b"nd" in kind else b"/v1/chat/completions", JSON)
    with conversation(taps=UsageTaps(clock_ns=time.monotonic_ns)) as talk:
        timed = []
        for _ in range(5):
            talk.client.says(request)
            talk.upstream.says(response)
            usage = talk.recorder.records[-1].usage
            timed.append(usage is not None and usage.time_to_first_token_ms is not None)
        assert timed == [status == b"200 OK"] * 5


@pytest.mark.parametrize(
    "pieces",
    [
        [TEXTS[1] + USAGE + b"data: [DONE]\n\n"],
        [TEXTS[1] + b"data: [DONE]\n\n"],
        [TEXTS[0], TEXTS[1] + b"data: [DONE]\n\n"],
        [TEXTS[1], b"id: 1\ndata: [DONE]\n\n"],
        [TEXTS[1], b'data: {"a":\ndata: 1}\n\n', b"data: [DONE]\n\n"],
        [TEXTS[1], b"data: not json\n\n", b"data: [DONE]\n\n"],
        [b"data: not json\n\n", TEXTS[1], b"data: [DONE]\n\n"],
        [b": hello\n\n", TEXTS[1], b"data: [DONE] \n\n"],
    ],
)
def test_nothing_that_is_sent_is_a_fault_of_ours(pieces: list[bytes], caplog: pytest.LogCaptureFixture) -> None:
    with conversation(taps=UsageTaps()) as talk:
        for _ in range(4):
            talk.client.says(REQUESTS[25])
            talk.upstream.says(PARTS[0], *map(framed, pieces), b"0\r\n\r\n")
            talk.upstream.says()
        assert len(talk.recorder.records) == 4
    assert not caplog.records
