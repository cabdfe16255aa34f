"""What belongs to a client's connection and not to a call: keep-alive, pipelining, what is no call, and how it is
closed. Conversations, as in `test_call_conversations`."""

from __future__ import annotations

import pytest
from support.conversation import (
    CLOSE,
    SIZED_10,
    TOO_SLOW,
    Talk,
    closing,
    conversation,
    get,
    ok,
    own,
    post,
    post_head,
    sent,
    size,
)

from sidecar.model.exchange import Outcome

pytestmark = pytest.mark.usefixtures("both_ways")

COMPLETE, CLIENT_LEFT, BROKE = Outcome.COMPLETE, Outcome.CLIENT_LEFT, Outcome.UPSTREAM_BROKE
BAD_REQUEST = own(b"400 Bad Request", b"bad_request", b"the request is not valid HTTP/1.1")
AMBIGUOUS = own(b"400 Bad Request", b"ambiguous_framing", b"the request's framing can be read in more than one way")
TOO_MANY = own(b"503 Service Unavailable", b"too_many_calls", b"too many calls are open")
NOT_RECORDED = own(b"503 Service Unavailable", b"metering_unavailable", b"no call can be recorded right now")


# -- the client's connection ---------------------------------------------------------------------


def test_the_client_asks_to_close() -> None:
    with conversation() as talk:
        talk.client.says(get(fields=CLOSE))
        talk.upstream.hears(sent(get()))
        talk.upstream.says(ok())
        talk.client.hears(closing(ok()))
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_closed()
        talk.upstream.is_open()


def test_http_1_0_may_keep_its_connection() -> None:
    with conversation() as talk:
        talk.client.says(b"GET /a HTTP/1.0\r\nHost: me\r\nConnection: keep-alive\r\n\r\n")
        talk.upstream.says(ok())
        talk.client.hears(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok")
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_open()


def test_pipelined_calls_are_answered_in_order_and_one_at_a_time() -> None:
    with conversation() as talk:
        talk.client.says(get(b"/1") + get(b"/2") + post(b"three", b"/3"))
        for request, size in ((get(b"/1"), 0), (get(b"/2"), 0), (post(b"three", b"/3"), 5)):
            talk.upstream.hears(sent(request))
            talk.upstream.says(ok())
            talk.client.hears(ok())
            talk.recorded(COMPLETE, status=200, request_bytes=size, response_bytes=2)
        assert len(talk.upstreams) == 1
        talk.client.is_open()


def test_many_pipelined_calls_are_all_answered() -> None:
    with conversation() as talk:
        talk.client.says(b"".join(get(b"/%d" % number) for number in range(100)))
        for number in range(100):
            talk.upstream.hears(sent(get(b"/%d" % number)))
            talk.upstream.says(ok())
            talk.client.hears(ok())
            talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_open()


def test_a_request_behind_a_close_is_not_taken() -> None:
    with conversation() as talk:
        talk.client.says(get(b"/1", CLOSE), get(b"/2"))
        talk.upstream.hears(sent(get(b"/1")))
        talk.upstream.says(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_closed()
        talk.upstream.hears_nothing()


def test_an_idle_connection_is_closed_in_the_end() -> None:
    with conversation(keepalive_timeout_s=75) as talk:
        talk.warm()
        talk.passes(74)
        talk.client.is_open()
        talk.passes(2)
        talk.client.is_closed()


def test_a_head_that_does_not_end() -> None:
    with conversation(head_timeout_s=30) as talk:
        talk.client.says(b"GET / HTTP/1.1\r\nX")
        talk.passes(31)
        talk.client.hears(TOO_SLOW)
        talk.client.is_closed()
        talk.nothing_recorded()


def test_a_connection_that_says_nothing_is_closed() -> None:
    with conversation(head_timeout_s=30) as talk:
        talk.passes(31)
        talk.client.hears_nothing()
        talk.client.is_closed()


def test_a_malformed_request() -> None:
    with conversation() as talk:
        talk.client.says(b"GET / HTTP/1.1\r\nHost : me\r\n\r\n")
        talk.client.hears(BAD_REQUEST)
        talk.client.is_closed()
        talk.nothing_recorded()


def test_a_malformed_request_waits_for_the_call_before_it() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.client.says(b"GET / HTTP/1.1\r\nHost : me\r\n\r\n")
        talk.client.hears_nothing()
        talk.upstream.says(ok())
        talk.client.hears(closing(ok()))  # its head says already that nothing follows
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_closed()


def test_a_malformed_request_behind_a_response_that_has_begun() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(SIZED_10)
        talk.client.says(b"GET / HTTP/1.1\r\nHost : me\r\n\r\n")
        talk.upstream.says(b"0123456789")
        talk.client.hears(SIZED_10 + b"0123456789" + BAD_REQUEST)
        talk.recorded(COMPLETE, status=200, response_bytes=10)
        talk.client.is_closed()


def test_a_request_that_can_be_read_in_two_ways_is_a_refused_call() -> None:
    with conversation() as talk:
        talk.client.says(post_head(fields=b"Transfer-Encoding: gzip, chunked\r\n") + b"0\r\n\r\n")
        talk.client.hears(AMBIGUOUS)
        error = "the request's framing can be read in more than one way"
        talk.recorded(Outcome.REFUSED, status=400, response_bytes=size(AMBIGUOUS), error=error)
        talk.client.is_closed()


def test_one_connection_too_many() -> None:
    with conversation(connections=1) as talk:
        second = talk.new_client()
        second.hears(TOO_MANY)
        second.is_closed()
        talk.warm()
        assert talk.counts.limits == ["connections"]


def test_one_call_too_many() -> None:
    with conversation(calls_max=1) as talk:
        talk.client.says(get())
        second = talk.new_client()
        second.says(get())
        second.hears(TOO_MANY)
        second.is_closed()
        talk.upstream.says(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        assert talk.counts.limits == ["calls"]


def test_a_call_that_cannot_be_recorded_is_not_let_in() -> None:
    with conversation() as talk:
        talk.recorder.full = True
        talk.client.says(get())
        talk.client.hears(NOT_RECORDED)
        talk.client.is_closed()
        talk.nothing_recorded()
        assert talk.upstreams == []


# -- pipelining ----------------------------------------------------------------------------------


def test_no_next_call_for_a_client_that_does_not_read() -> None:
    with conversation() as talk:
        talk.client.stops_reading()
        talk.client.says(b"".join(get(b"/%d" % number) for number in range(100)))
        big = ok(b"x" * 200_000)
        talk.upstream.says(big)
        talk.recorded(COMPLETE, status=200, response_bytes=200_000)
        talk.upstream.hears(sent(get(b"/0")))  # and no other
        assert talk.client.held
        talk.client.reads_on()
        talk.upstream.hears(sent(get(b"/1")))


def test_what_a_client_pipelines_stays_outside() -> None:
    """One read, and the socket is left alone until that is worked off."""
    flood = b"".join(get(b"/%d" % number) for number in range(50_000))
    with conversation() as talk:
        talk.client.says(flood)
        assert talk.client.waiting_bytes > len(flood) - 3 * 262_144
        for number in range(2_000):
            talk.upstream.hears(sent(get(b"/%d" % number)))
            talk.upstream.says_ahead(ok())
            while not talk.upstream.heard:
                talk.turn()
        client = talk.client.protocol
        assert len(client._queue) <= 32  # type: ignore[attr-defined]
        assert len(client._unread) <= 262_144  # type: ignore[attr-defined]
        assert talk.client.waiting_bytes > len(flood) - 3 * 262_144
        talk.client.resets()


def test_a_client_that_reads_nothing_is_cut_in_the_end() -> None:
    with conversation(idle_timeout_s=20, keepalive_timeout_s=75) as talk:
        talk.client.stops_reading()
        talk.client.says(get(b"/1") + get(b"/2"))
        talk.upstream.says(ok(b"x" * 200_000))
        talk.recorded(COMPLETE, status=200, response_bytes=200_000)
        talk.passes(21)
        talk.client.is_cut()
        talk.upstream.hears(sent(get(b"/1")))
        talk.nothing_recorded()


def test_the_body_of_a_pipelined_request_is_no_head() -> None:
    """It may be large, and come while the call before it is still open."""
    with conversation() as talk:
        talk.client.says(get(b"/1"))
        talk.client.says(post_head(b"/2", b"Content-Length: 90000\r\n"))
        talk.client.says(b"x" * 90_000)
        talk.upstream.hears(sent(get(b"/1")))
        talk.passes(40)
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        assert talk.upstream.heard.count(b"x") == 90_000
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=90_000, response_bytes=2)


# -- an upload that nobody wants -----------------------------------------------------------------


def refused_upload(talk: Talk) -> None:
    talk.client.says(post_head(fields=b"Content-Length: 1000000000\r\n"))
    talk.upstream.says(ok(b"big", status=b"413 Too Large"))
    assert talk.client.half_closed
    talk.recorded(COMPLETE, status=413, response_bytes=3)


def test_an_unwanted_upload_is_read_on_while_it_comes() -> None:
    with conversation(linger_s=5, linger_total_s=30) as talk:
        refused_upload(talk)
        for _ in range(6):
            talk.passes(4)
            talk.client.says(b"x" * 100_000)
            assert not talk.client.over
        talk.client.leaves()


def test_but_not_in_silence_and_not_for_ever() -> None:
    with conversation(linger_s=5, linger_total_s=30) as talk:
        refused_upload(talk)
        talk.passes(6)
        talk.client.is_dropped()
    with conversation(linger_s=5, linger_total_s=30) as talk:
        refused_upload(talk)
        for _ in range(7):
            talk.passes(4)
            talk.client.says(b"x")
        assert not talk.client.over
        talk.passes(4)
        talk.client.is_dropped()


def test_and_not_without_end() -> None:
    with conversation(linger_bytes_max=1_000_000) as talk:
        refused_upload(talk)
        talk.client.says(b"x" * 900_000)
        assert not talk.client.over
        talk.client.says(b"x" * 200_000)
        talk.client.is_dropped()


def test_a_slow_reader_of_an_early_response_may_read_it_to_its_end() -> None:
    with conversation(linger_s=5) as talk:
        talk.client.says(post_head(fields=b"Content-Length: 1000000000\r\n"))
        talk.client.stops_reading()
        talk.upstream.says(ok(b"b" * 150_000, status=b"413 Too Large"))
        talk.client.reads(50_000)
        talk.passes(6)
        assert not talk.client.over
        talk.client.reads(50_000)
        talk.passes(6)
        assert not talk.client.over
        talk.passes(6)
        talk.client.is_dropped()
