"""Requests that offer another protocol, whether that is passed on or not, with a body or without: conversations, as in
`test_call_conversations`."""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.conversation import AGREED, closing, conversation, get, ok, post, post_head, sent
from support.rawhttp import dechunk

from sidecar.model.exchange import Outcome

pytestmark = pytest.mark.usefixtures("both_ways")

COMPLETE, CLIENT_LEFT, BROKE = Outcome.COMPLETE, Outcome.CLIENT_LEFT, Outcome.UPSTREAM_BROKE
WEBSOCKET = get(b"/ws", b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
WEBSOCKET_SENT = b"GET /ws HTTP/1.1\r\nHost: up.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


# -- protocol switches ---------------------------------------------------------------------------


def test_a_tunnel() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET)
        talk.upstream.hears(WEBSOCKET_SENT)
        talk.upstream.says(AGREED + b"\x00up")
        talk.client.hears(AGREED + b"\x00up")
        talk.client.says(b"GET / HTTP/1.1\r\n\r\n")
        talk.upstream.hears(b"GET / HTTP/1.1\r\n\r\n")
        talk.nothing_recorded()
        talk.client.leaves()
        talk.recorded(COMPLETE, status=101, request_bytes=18, response_bytes=3)
        talk.upstream.is_closed()


def test_what_is_sent_ahead_of_a_101_is_the_tunnels() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET + b"ahead", b"later")
        talk.upstream.hears(WEBSOCKET_SENT)
        talk.upstream.says(AGREED)
        talk.upstream.hears(b"aheadlater")
        talk.upstream.leaves()
        talk.client.hears(AGREED)
        talk.client.is_closed()
        talk.recorded(COMPLETE, status=101, request_bytes=10)


def test_behind_a_declined_switch_comes_http() -> None:
    declined = ok(b"no", status=b"426 Upgrade Required")
    with conversation() as talk:
        talk.client.says(WEBSOCKET + get(b"/next"))
        talk.upstream.hears(WEBSOCKET_SENT)
        talk.upstream.says(declined)
        talk.client.hears(declined)
        talk.recorded(COMPLETE, status=426, response_bytes=2)
        talk.upstream.hears(sent(get(b"/next")))
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)


def test_the_upstream_resets_a_tunnel() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET)
        talk.upstream.says(AGREED + b"x")
        talk.upstream.resets()
        talk.client.is_closed()
        talk.recorded(BROKE, status=101, response_bytes=1)


def test_the_client_resets_a_tunnel() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET)
        talk.upstream.says(AGREED)
        talk.client.resets()
        talk.recorded(CLIENT_LEFT, status=101)


def test_a_silent_tunnel_is_cut() -> None:
    with conversation(idle_timeout_s=20) as talk:
        talk.client.says(WEBSOCKET)
        talk.upstream.says(AGREED)
        talk.passes(15)
        talk.client.says(b"ping")
        talk.passes(15)
        talk.client.is_open()
        talk.passes(6)
        talk.client.is_cut()
        error = "the tunnel was silent for too long"
        talk.recorded(Outcome.UPSTREAM_TIMEOUT, status=101, request_bytes=4, error=error)


def test_a_tunnel_at_the_end_of_the_stop() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET)
        talk.upstream.says(AGREED)
        talk.stops(5)
        talk.client.says(b"still")
        talk.upstream.hears(WEBSOCKET_SENT + b"still")
        talk.passes(6)
        talk.client.is_cut()
        error = "cut at the end of the graceful stop"
        talk.recorded(Outcome.STOPPED, status=101, request_bytes=5, error=error)


def test_a_tunnel_slows_both_sides_down() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET)
        talk.upstream.says(AGREED)
        talk.client.stops_reading()
        talk.upstream.says(b"u" * 1_000_000)
        assert talk.upstream.held
        talk.upstream.stops_reading()
        talk.client.says(b"c" * 1_000_000)
        assert talk.client.held
        talk.client.reads_on()
        talk.upstream.reads_on()
        assert talk.client.heard.count(b"u") == 1_000_000
        assert talk.upstream.heard == WEBSOCKET_SENT + b"c" * 1_000_000
        talk.client.leaves()
        talk.recorded(COMPLETE, status=101, request_bytes=1_000_000, response_bytes=1_000_000)


def test_the_end_of_a_tunnel_waits_for_its_record() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET)
        talk.upstream.says(AGREED)
        talk.holds()
        talk.upstream.leaves()
        talk.recorded(COMPLETE, status=101)
        talk.client.is_open()
        talk.commits()
        talk.client.is_closed()


def test_the_client_leaves_while_a_switch_is_not_decided() -> None:
    with conversation() as talk:
        talk.client.says(WEBSOCKET)
        talk.client.leaves()
        talk.upstream.is_dropped()
        talk.recorded(CLIENT_LEFT, status=None)


# -- another protocol is offered, with a body or without -----------------------------------------

H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
TCP = b"Connection: Upgrade\r\nUpgrade: tcp\r\n"
TCP_SENT = b"Upgrade: tcp\r\nConnection: Upgrade\r\n"
TCP_AGREED = AGREED.replace(b"websocket", b"tcp")


def cuts(data: bytes, *at: int) -> list[bytes]:
    edges = [0, *at, len(data)]
    return [data[start:end] for start, end in pairwise(edges) if start < end]


@pytest.mark.parametrize("name", [b"Upgrade", b"upgrade", b"UPGRADE"])
def test_an_offer_of_http_2_is_a_request_like_any_other(name: bytes) -> None:
    offer = H2C.replace(b"Upgrade: h2c", name + b": h2c")
    with conversation() as talk:
        for _ in range(3):
            talk.client.says(get(b"/a", offer))
            talk.upstream.hears(sent(get()))
            assert not talk.client.held
            talk.upstream.says(ok())
            talk.client.hears(ok())
            talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_open()
        assert len(talk.upstreams) == 1


def test_pipelined_offers_of_http_2_are_all_answered() -> None:
    with conversation() as talk:
        talk.client.says(b"".join(get(b"/%d" % number, H2C) for number in range(50)))
        for number in range(50):
            talk.upstream.hears(sent(get(b"/%d" % number)))
            talk.upstream.says(ok())
            talk.client.hears(ok())
            talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_open()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("value", [b"h2c", b"foo/2, h2c", b"websocket", b"TLS/1.3", b"tcp"])
def test_an_upload_that_offers_another_protocol_cut_anywhere(value: bytes, chunked: bool) -> None:
    """Its body is nothing but a body, wherever the reads end, and what is behind it is the next request."""
    body = b"GET /evil HTTP/1.1\r\nHost: me\r\n\r\n"
    fields = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % value
    if chunked:
        head = post_head(b"/up", fields + b"Transfer-Encoding: chunked\r\n")
        wire = head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        head = post_head(b"/up", fields + b"Content-Length: %d\r\n" % len(body))
        wire = head + body
    whole = wire + get(b"/next")
    for at in range(len(head) - 12, len(whole) - 1):
        with conversation() as talk:
            talk.client.says(*cuts(whole, at))
            came = talk.upstream.heard.partition(b"\r\n\r\n")[2]
            assert (dechunk(came) if chunked else came) == body
            assert b"/next" not in talk.upstream.heard
            talk.upstream.heard = b""
            talk.upstream.says(ok())
            if talk.client.closing or talk.client.half_closed:  # never wrong, but this is not meant to happen
                raise AssertionError(f"the connection ended: cut at {at}")
            talk.client.hears(ok())
            talk.recorded(COMPLETE, status=200, request_bytes=len(body), response_bytes=2)
            talk.upstream.hears(sent(get(b"/next")))
            talk.upstream.says(ok())
            talk.client.hears(ok())
            talk.recorded(COMPLETE, status=200, response_bytes=2)


@pytest.mark.parametrize("size", [5, 300_000])
def test_a_switch_with_a_body_goes_on_behind_it(size: int) -> None:
    body = b"b" * size
    request = post(body, b"/exec", TCP)
    with conversation() as talk:
        for piece in cuts(request + b"\r\n\r\nahead", len(request) - 2):
            talk.client.says(piece)
        talk.upstream.hears(
            b"POST /exec HTTP/1.1\r\nHost: up.test\r\n" + TCP_SENT + b"Content-Length: %d\r\n\r\n" % size + body
        )
        talk.upstream.says(TCP_AGREED)
        talk.client.hears(TCP_AGREED)
        talk.upstream.hears(b"\r\n\r\nahead")
        talk.client.says(b"more")
        talk.upstream.hears(b"more")
        talk.client.leaves()
        talk.recorded(COMPLETE, status=101, request_bytes=size + 13)


def test_an_early_agreement_waits_for_the_body() -> None:
    with conversation() as talk:
        talk.client.says(post_head(b"/exec", TCP + b"Content-Length: 10\r\n") + b"01234")
        talk.upstream.heard = b""
        talk.upstream.says(TCP_AGREED)
        talk.client.hears_nothing()
        talk.client.says(b"56789ahead")
        talk.upstream.hears(b"56789ahead")
        talk.client.hears(TCP_AGREED)
        talk.client.leaves()
        talk.recorded(COMPLETE, status=101, request_bytes=15)


def test_a_declined_switch_with_a_body() -> None:
    with conversation() as talk:
        talk.client.says(post(b"body", b"/exec", TCP) + get(b"/next"))
        talk.upstream.heard = b""
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=4, response_bytes=2)
        talk.upstream.hears(sent(get(b"/next")))
        talk.upstream.says(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_open()


def test_a_response_before_the_body_of_an_offer_is_whole() -> None:
    with conversation() as talk:
        talk.client.says(post_head(b"/exec", TCP + b"Content-Length: 60\r\n"))
        talk.upstream.heard = b""
        talk.upstream.says(ok(status=b"401 Unauthorized"))
        talk.client.says(get(b"/evil"))
        talk.upstream.hears_nothing()
        assert len(talk.upstreams) == 1
        talk.recorded(COMPLETE, status=401, response_bytes=2)
        talk.client.is_closed()


def test_an_offer_in_an_odd_spelling_is_never_taken_for_another_thing() -> None:
    """What the parser may have lost behind it is not guessed at: the connection ends behind the response."""
    offer = b"Connection: uPGRaDE\r\nuPGRaDE: tcp\r\n"
    with conversation() as talk:
        talk.client.says(get(b"/a", offer) + get(b"/next"))
        talk.upstream.hears(sent(get()))
        talk.upstream.says(ok())
        talk.client.hears(closing(ok()))
        talk.client.is_closed()
        talk.recorded(COMPLETE, status=200, response_bytes=2)
