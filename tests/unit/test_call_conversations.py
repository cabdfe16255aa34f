"""One call in every phase, and what may happen to it there: what client and upstream get, and what is recorded.

Each test is a conversation over transports in memory (`support.conversation`), told from the first byte to the record.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from support.conversation import Talk, conversation, get, ok, own, post, post_head, sent
from support.rawhttp import dechunk

from sidecar.model.exchange import Outcome, UsageState
from sidecar.proxy.upstream import UnreachableError

pytestmark = pytest.mark.usefixtures("both_ways")

COMPLETE, CLIENT_LEFT, BROKE = Outcome.COMPLETE, Outcome.CLIENT_LEFT, Outcome.UPSTREAM_BROKE
MODEL = b"/model"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\n"
SIZED_10 = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
CLOSE = b"Connection: close\r\n"
UPLOAD_10 = post_head(fields=b"Content-Length: 10\r\n")
UPLOAD_CHUNKS = post_head(fields=b"Transfer-Encoding: chunked\r\n")
WEBSOCKET = get(b"/ws", b"Connection: Upgrade\r\nUpgrade: websocket\r\n")
WEBSOCKET_SENT = b"GET /ws HTTP/1.1\r\nHost: up.test\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
AGREED = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
BAD_GATEWAY = own(b"502 Bad Gateway", b"upstream_broke", b"the upstream gave no valid response", b"")
UNREACHABLE = own(b"502 Bad Gateway", b"upstream_unreachable", b"no connection to the upstream", b"")
NO_ANSWER = own(b"504 Gateway Timeout", b"upstream_timeout", b"the upstream did not answer in time", b"")
TOO_SLOW = own(b"408 Request Timeout", b"request_timeout", b"the request did not arrive in time")
BAD_REQUEST = own(b"400 Bad Request", b"bad_request", b"the request is not valid HTTP/1.1")
AMBIGUOUS = own(b"400 Bad Request", b"ambiguous_framing", b"the request's framing can be read in more than one way")
SLOW_CONNECT = own(
    b"504 Gateway Timeout", b"upstream_connect_timeout", b"the upstream accepted no connection in time", b""
)
OWN_FAULT = own(b"500 Internal Server Error", b"proxy_fault", b"the proxy failed to handle this call", b"")
REFUSED = "no connection to the upstream (refused)"
SILENT = "the upstream did not answer in time"
RESET = "the connection ended before the answer (reset)"
NOT_HTTP = "the answer is not valid HTTP/1.1: expected HTTP/, RTSP/ or ICE/ (not_http)"
BAD_SIZE = "the answer is not valid HTTP/1.1: invalid character in chunk size"
BAD_CHUNK = own(b"400 Bad Request", b"bad_chunk", b"the request's chunked body is malformed")
TOO_MANY = own(b"503 Service Unavailable", b"too_many_calls", b"too many calls are open")
NOT_RECORDED = own(b"503 Service Unavailable", b"metering_unavailable", b"no call can be recorded right now")


def size(response: bytes) -> int:
    """Of its body."""
    return len(response.partition(b"\r\n\r\n")[2])


def closing(response: bytes) -> bytes:
    """The response as it is passed on where the connection ends behind it."""
    head, _, body = response.partition(b"\r\n\r\n")
    return head + b"\r\n" + CLOSE + b"\r\n" + body


# -- whole calls ---------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.hears(sent(get()))
        talk.upstream.says(ok(b"hello"))
        talk.client.hears(ok(b"hello"))
        talk.recorded(COMPLETE, status=200, response_bytes=5)
        talk.client.is_open()
        talk.upstream.is_open()


def test_two_calls_on_one_connection_each_way() -> None:
    with conversation() as talk:
        talk.warm()
        talk.client.says(get(b"/b"))
        talk.upstream.hears(sent(get(b"/b")))
        talk.upstream.says(ok(b"b"))
        talk.client.hears(ok(b"b"))
        talk.recorded(COMPLETE, status=200, response_bytes=1)
        assert len(talk.upstreams) == 1


def test_a_call_that_comes_byte_by_byte() -> None:
    request, response = post(b"body"), ok(b"hello")
    with conversation() as talk:
        talk.client.says(*(request[at : at + 1] for at in range(len(request))))
        talk.upstream.hears(sent(request))
        talk.upstream.says(*(response[at : at + 1] for at in range(len(response))))
        talk.client.hears(response)
        talk.recorded(COMPLETE, status=200, request_bytes=4, response_bytes=5)


def test_a_sized_upload_in_pieces() -> None:
    with conversation() as talk:
        talk.client.says(UPLOAD_10)
        talk.upstream.hears(sent(UPLOAD_10))
        talk.client.says(b"01234", b"56789")
        talk.upstream.hears(b"0123456789")
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=10, response_bytes=2)
        talk.client.is_open()


def test_a_chunked_upload() -> None:
    with conversation() as talk:
        talk.client.says(UPLOAD_CHUNKS)
        talk.upstream.hears(sent(UPLOAD_CHUNKS))
        talk.client.says(b"5\r\n01234\r\n")
        talk.upstream.hears(b"5\r\n01234\r\n")
        talk.client.says(b"1\r\n5\r\n", b"0\r\n\r\n")
        talk.upstream.hears(b"1\r\n5\r\n0\r\n\r\n")
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=6, response_bytes=2)


def test_a_chunked_response() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(CHUNKED)
        talk.client.hears(CHUNKED)
        talk.upstream.says(b"3\r\nabc\r\n")
        talk.client.hears(b"3\r\nabc\r\n")
        talk.nothing_recorded()
        talk.upstream.says(b"0\r\n\r\n")
        talk.client.hears(b"0\r\n\r\n")
        talk.recorded(COMPLETE, status=200, response_bytes=3)
        talk.client.is_open()


def test_a_response_until_close_gets_chunks() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(UNTIL_CLOSE + b"abc")
        talk.client.hears(CHUNKED + b"3\r\nabc\r\n")
        talk.upstream.leaves()
        talk.client.hears(b"0\r\n\r\n")
        talk.recorded(COMPLETE, status=200, response_bytes=3)
        talk.client.is_open()


def test_a_response_until_close_for_http_1_0_ends_by_closing() -> None:
    with conversation() as talk:
        talk.client.says(b"GET /a HTTP/1.0\r\nHost: me\r\n\r\n")
        talk.upstream.hears(sent(get()))
        talk.upstream.says(UNTIL_CLOSE + b"abc")
        talk.upstream.leaves()
        talk.client.hears(b"HTTP/1.1 200 OK\r\n" + CLOSE + b"\r\nabc")
        talk.recorded(COMPLETE, status=200, response_bytes=3)
        talk.client.is_closed()


def test_interim_responses_are_passed_on() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(interim)
        talk.client.hears(interim)
        talk.upstream.says(interim + ok())
        talk.client.hears(interim + ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)


def test_a_100_is_the_upstreams_to_say() -> None:
    head = post_head(fields=b"Expect: 100-continue\r\nContent-Length: 3\r\n")
    with conversation() as talk:
        talk.client.says(head)
        talk.upstream.hears(sent(head))
        talk.client.hears_nothing()
        talk.upstream.says(b"HTTP/1.1 100 Continue\r\n\r\n")
        talk.client.hears(b"HTTP/1.1 100 Continue\r\n\r\n")
        talk.client.says(b"abc")
        talk.upstream.hears(b"abc")
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=3, response_bytes=2)


def test_a_response_to_head_has_no_body() -> None:
    with conversation() as talk:
        talk.client.says(get().replace(b"GET", b"HEAD"))
        talk.upstream.says(SIZED_10)
        talk.client.hears(SIZED_10)
        talk.recorded(COMPLETE, status=200)
        talk.client.is_open()
        talk.upstream.is_open()


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_a_status_without_a_body(status: bytes) -> None:
    head = b"HTTP/1.1 %b\r\nETag: x\r\n\r\n" % status
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(head)
        talk.client.hears(head)
        talk.recorded(COMPLETE, status=int(status[:3]))
        talk.client.is_open()


def test_the_upstream_does_not_keep_its_connection() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(ok(fields=CLOSE))
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_open()
        talk.upstream.is_dropped()


def test_bytes_behind_a_response_are_nobodys() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(ok() + ok(b"stray"))
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.upstream.is_dropped()


def test_bytes_on_an_idle_connection_close_it() -> None:
    with conversation() as talk:
        talk.warm()
        talk.upstream.says(ok(b"stray"))
        talk.upstream.is_dropped()
        talk.client.says(get())
        assert len(talk.upstreams) == 2
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)


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


# -- no connection, and no answer ----------------------------------------------------------------


def test_the_upstream_cannot_be_reached() -> None:
    with conversation() as talk:
        talk.connector.error = UnreachableError("refused", "connection refused")
        talk.client.says(get())
        talk.client.hears(UNREACHABLE)
        talk.recorded(
            Outcome.UNREACHABLE,
            status=502,
            response_bytes=size(UNREACHABLE),
            error=REFUSED,
        )
        talk.client.is_open()


def test_the_upstream_accepts_no_connection_in_time() -> None:
    with conversation() as talk:
        talk.connector.error = TimeoutError()
        talk.client.says(get())
        talk.client.hears(SLOW_CONNECT)
        error = "the upstream accepted no connection in time (timeout)"
        talk.recorded(Outcome.UNREACHABLE, status=504, response_bytes=size(SLOW_CONNECT), error=error)


def test_the_client_leaves_while_a_connection_is_made() -> None:
    with conversation() as talk:
        talk.connector.open.clear()
        talk.client.says(get())
        talk.client.leaves()
        talk.recorded(CLIENT_LEFT, status=None)
        talk.connector.open.set()
        talk.turn()
        assert talk.upstreams == []


def test_stopped_while_a_connection_is_made() -> None:
    with conversation() as talk:
        talk.connector.open.clear()
        talk.client.says(get())
        talk.stops(5)
        talk.passes(6)
        talk.client.is_cut()
        talk.recorded(Outcome.STOPPED, status=None, error="cut at the end of the graceful stop")


def test_no_response_in_time() -> None:
    with conversation(upstream_timeout_s=60) as talk:
        talk.client.says(get())
        talk.passes(59)
        talk.nothing_recorded()
        talk.passes(2)
        talk.client.hears(NO_ANSWER)
        talk.recorded(
            Outcome.UPSTREAM_TIMEOUT,
            status=504,
            response_bytes=size(NO_ANSWER),
            error=SILENT,
        )
        talk.client.is_open()
        talk.upstream.is_dropped()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200"])
def test_the_upstream_breaks_before_a_head(said: bytes) -> None:
    with conversation() as talk:
        talk.client.says(get())
        if said:
            talk.upstream.says(said)
        talk.upstream.resets()
        talk.client.hears(BAD_GATEWAY)
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=RESET)
        talk.client.is_open()


def test_the_upstream_speaks_no_http() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(b"SSH-2.0-OpenSSH\r\n")
        talk.client.hears(BAD_GATEWAY)
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=NOT_HTTP)
        talk.upstream.is_dropped()


def test_a_switch_that_nobody_asked_for_is_no_response() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(AGREED)
        talk.client.hears(BAD_GATEWAY)
        error = "a protocol switch that nobody asked for (not_http)"
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=error)


# -- once more -----------------------------------------------------------------------------------


def test_a_dead_pooled_connection_is_tried_once_more() -> None:
    with conversation() as talk:
        talk.warm()
        talk.client.says(get(b"/b"))
        talk.upstream.hears(sent(get(b"/b")))
        talk.upstream.leaves()
        assert len(talk.upstreams) == 2
        talk.upstream.hears(sent(get(b"/b")))
        talk.upstream.says(ok(b"b"))
        talk.client.hears(ok(b"b"))
        talk.recorded(COMPLETE, status=200, response_bytes=1)
        assert talk.counts.retries == 1


def test_a_put_goes_again_with_its_body() -> None:
    put = post(b"body", b"/b").replace(b"POST", b"PUT")
    with conversation() as talk:
        talk.warm()
        talk.client.says(put)
        talk.upstream.hears(sent(put))
        talk.upstream.resets()
        talk.upstream.hears(sent(put))
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=4, response_bytes=2)


def test_a_second_death_is_the_end() -> None:
    with conversation() as talk:
        talk.warm()
        talk.client.says(get(b"/b"))
        talk.upstream.leaves()
        talk.upstream.leaves()
        assert len(talk.upstreams) == 2
        talk.client.hears(BAD_GATEWAY)
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=RESET)


def test_a_post_goes_once() -> None:
    with conversation() as talk:
        talk.warm()
        talk.client.says(post(b"body"))
        talk.upstream.leaves()
        assert len(talk.upstreams) == 1
        talk.client.hears(BAD_GATEWAY)
        error = RESET
        talk.recorded(BROKE, status=502, request_bytes=4, response_bytes=size(BAD_GATEWAY), error=error)


def test_nothing_goes_again_after_a_byte_of_the_response() -> None:
    with conversation() as talk:
        talk.warm()
        talk.client.says(get(b"/b"))
        talk.upstream.says(b"H")
        talk.upstream.leaves()
        assert len(talk.upstreams) == 1
        talk.client.hears(BAD_GATEWAY)
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=RESET)


def test_a_new_connection_that_dies_is_not_tried_again() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.leaves()
        assert len(talk.upstreams) == 1
        talk.client.hears(BAD_GATEWAY)
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=RESET)


# -- the upload ----------------------------------------------------------------------------------


def test_an_upload_that_stalls() -> None:
    with conversation(idle_timeout_s=20) as talk:
        talk.client.says(UPLOAD_10 + b"01")
        talk.passes(21)
        talk.client.hears(TOO_SLOW)
        error = "the request did not arrive in time"
        talk.recorded(Outcome.REFUSED, status=408, request_bytes=2, response_bytes=size(TOO_SLOW), error=error)
        talk.client.is_closed()
        talk.upstream.is_dropped()


def test_an_upload_that_goes_on_is_not_cut() -> None:
    with conversation(idle_timeout_s=20) as talk:
        talk.client.says(UPLOAD_10)
        for digit in b"0123456789":
            talk.passes(15)
            talk.client.says(b"%c" % digit)
        talk.upstream.hears(sent(UPLOAD_10) + b"0123456789")
        talk.upstream.says(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=10, response_bytes=2)


def test_a_bad_chunk() -> None:
    with conversation() as talk:
        talk.client.says(UPLOAD_CHUNKS + b"1\r\na\r\n", b"zz\r\n")
        talk.upstream.hears(sent(UPLOAD_CHUNKS) + b"1\r\na\r\n")
        talk.upstream.is_dropped()
        talk.client.hears(BAD_CHUNK)
        error = "the request's chunked body is malformed"
        talk.recorded(Outcome.REFUSED, status=400, request_bytes=1, response_bytes=size(BAD_CHUNK), error=error)
        talk.client.is_closed()


def test_a_bad_chunk_when_the_response_has_begun() -> None:
    with conversation() as talk:
        talk.client.says(UPLOAD_CHUNKS)
        talk.upstream.says(SIZED_10 + b"01")
        talk.client.says(b"zz\r\n")
        talk.client.is_cut()
        error = "the request's chunked body is malformed"
        talk.recorded(Outcome.REFUSED, status=200, response_bytes=2, error=error)


def test_the_upstream_does_not_take_the_upload() -> None:
    """What it does not take stays with the client."""
    with conversation() as talk:
        talk.client.says(post_head(fields=b"Content-Length: 3000000\r\n"))
        talk.upstream.stops_reading()
        for _ in range(30):
            talk.client.says(b"x" * 100_000)
        assert talk.client.held
        assert len(talk.upstream.unread) < 500_000
        assert talk.client.waiting_bytes > 1_900_000
        talk.upstream.reads_on()
        assert talk.upstream.heard.count(b"x") == 3_000_000
        talk.upstream.says(ok())
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, request_bytes=3_000_000, response_bytes=2)


def test_a_response_before_the_upload_is_whole() -> None:
    """It ends the connection: what is still to come of the upload is read and dropped for a while."""
    refused = ok(b"big", status=b"413 Too Large")
    with conversation() as talk:
        talk.client.says(UPLOAD_10 + b"01")
        talk.upstream.says(refused)
        talk.client.hears(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n" + CLOSE + b"\r\nbig")
        talk.recorded(COMPLETE, status=413, request_bytes=2, response_bytes=3)
        assert talk.client.half_closed
        talk.upstream.is_dropped()
        talk.client.says(b"23456789")
        assert not talk.client.waiting_bytes
        talk.client.leaves()


def test_the_response_begins_while_the_upload_goes_on() -> None:
    with conversation() as talk:
        talk.client.says(UPLOAD_CHUNKS)
        talk.upstream.says(CHUNKED + b"1\r\na\r\n")
        talk.client.hears(CHUNKED[:-2] + CLOSE + b"\r\n1\r\na\r\n")
        talk.client.says(b"1\r\nb\r\n")
        talk.upstream.hears(sent(UPLOAD_CHUNKS) + b"1\r\nb\r\n")
        talk.client.says(b"0\r\n\r\n")
        talk.upstream.hears(b"0\r\n\r\n")
        talk.upstream.says(b"0\r\n\r\n")
        talk.client.hears(b"0\r\n\r\n")
        talk.recorded(COMPLETE, status=200, request_bytes=1, response_bytes=1)
        talk.client.is_closed()
        talk.upstream.is_open()


def test_the_client_leaves_in_its_upload() -> None:
    with conversation() as talk:
        talk.client.says(UPLOAD_10 + b"01")
        talk.client.leaves()
        talk.upstream.hears(sent(UPLOAD_10) + b"01")
        talk.upstream.is_dropped()
        talk.recorded(CLIENT_LEFT, status=None, request_bytes=2)


def test_a_request_behind_a_chunked_one_with_trailers_is_not_taken() -> None:
    with conversation() as talk:
        talk.client.says(UPLOAD_CHUNKS + b"0\r\nA: 1\r\n\r\n" + get(b"/b"))
        talk.upstream.hears(sent(UPLOAD_CHUNKS) + b"0\r\n\r\n")
        talk.upstream.says(ok())
        talk.client.hears(closing(ok()))
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.client.is_closed()


# -- the response's body -------------------------------------------------------------------------


@pytest.mark.parametrize("head", [SIZED_10, CHUNKED + b"2\r\n"])
def test_the_upstream_breaks_in_a_body(head: bytes) -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(head + b"01")
        talk.upstream.resets()
        talk.client.hears(head + b"01" + (b"\r\n" if head is not SIZED_10 else b""))
        talk.client.is_closed()  # the framing shows that it is not whole
        talk.recorded(BROKE, status=200, response_bytes=2, error="the answer was cut off")


def test_the_upstream_breaks_in_a_body_until_close() -> None:
    with conversation() as talk:
        talk.client.says(b"GET /a HTTP/1.0\r\nHost: me\r\n\r\n")
        talk.upstream.says(UNTIL_CLOSE + b"abc")
        talk.upstream.resets()
        talk.client.is_cut()  # a clean end would look like a whole answer
        talk.recorded(BROKE, status=200, response_bytes=3, error="the answer was cut off")


def test_a_bad_chunk_in_a_response() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(CHUNKED + b"1\r\na\r\n", b"zz\r\n")
        talk.client.is_closed()
        talk.recorded(BROKE, status=200, response_bytes=1, error=BAD_SIZE)


def test_a_head_and_a_bad_chunk_in_one_piece_is_no_response() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(CHUNKED + b"zz\r\n")
        talk.client.hears(BAD_GATEWAY)
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=f"{BAD_SIZE} (not_http)")


def test_the_upstream_falls_silent_in_a_body() -> None:
    with conversation(idle_timeout_s=20) as talk:
        talk.client.says(get())
        talk.upstream.says(SIZED_10 + b"01")
        talk.passes(21)
        talk.client.is_cut()
        talk.recorded(Outcome.UPSTREAM_TIMEOUT, status=200, response_bytes=2, error="the upstream fell silent")


def test_the_client_stops_reading() -> None:
    with conversation(idle_timeout_s=20) as talk:
        talk.client.says(get())
        talk.client.stops_reading()
        talk.upstream.says(b"HTTP/1.1 200 OK\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 1_000_000)
        assert talk.upstream.held
        assert talk.upstream.waiting_bytes > 400_000
        talk.passes(21)
        talk.client.is_cut()
        exchange = talk.recorder.records[-1]
        talk.recorded(
            CLIENT_LEFT, status=200, response_bytes=exchange.response_bytes, error="the client stopped reading"
        )
        assert exchange.response_bytes < 600_000


def test_the_client_reads_on() -> None:
    with conversation(idle_timeout_s=20) as talk:
        talk.client.says(get())
        talk.client.stops_reading()
        talk.upstream.says(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000)
        talk.passes(15)
        talk.client.reads_on()
        talk.turn()
        assert talk.client.heard.count(b"x") == 1_000_000
        talk.recorded(COMPLETE, status=200, response_bytes=1_000_000)
        talk.client.is_open()


def test_stopped_in_a_body() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(SIZED_10 + b"01")
        talk.stops(5)
        talk.upstream.says(b"23")
        talk.client.hears(SIZED_10 + b"0123")
        talk.passes(6)
        talk.client.is_cut()
        talk.recorded(Outcome.STOPPED, status=200, response_bytes=4, error="cut at the end of the graceful stop")


def test_a_call_may_end_while_stopping() -> None:
    with conversation() as talk:
        talk.client.says(get())
        idle = talk.new_client()
        talk.stops(5)
        idle.is_closed()
        talk.upstream.says(ok())
        talk.client.hears(closing(ok()))
        talk.client.is_closed()
        talk.recorded(COMPLETE, status=200, response_bytes=2)


# -- the client leaves, and the answer is read on or not -----------------------------------------


def test_a_client_that_leaves_a_plain_call() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.client.leaves()
        talk.upstream.is_dropped()
        talk.recorded(CLIENT_LEFT, status=None)


def test_a_client_that_leaves_in_a_body() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(SIZED_10 + b"01")
        talk.client.resets()
        talk.upstream.is_dropped()
        talk.recorded(CLIENT_LEFT, status=200, response_bytes=2)


def test_a_model_call_is_read_on_before_its_head() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.client.leaves()
        talk.upstream.is_open()
        talk.nothing_recorded()
        talk.upstream.says(ok(b"<usage>"))
        exchange = talk.recorded(CLIENT_LEFT, status=None, response_bytes=7)
        assert exchange.usage is not None
        assert exchange.usage.usage_state is UsageState.FINAL
        talk.upstream.is_open()  # it is whole: the connection serves on


def test_a_model_call_is_read_on_in_its_body() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(CHUNKED + b"1\r\na\r\n")
        talk.client.leaves()
        talk.upstream.says(b"1\r\nb\r\n")
        talk.nothing_recorded()
        talk.upstream.says(b"c\r\n<usage><end>\r\n")
        talk.recorded(CLIENT_LEFT, status=200, response_bytes=14)
        talk.upstream.is_dropped()  # nothing of worth was still to come


def test_reading_on_ends_in_time() -> None:
    with conversation(disconnect_drain_s=30) as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(CHUNKED + b"1\r\na\r\n")
        talk.client.leaves()
        talk.passes(31)
        talk.recorded(CLIENT_LEFT, status=200, response_bytes=1)
        talk.upstream.is_dropped()
        assert talk.counts.limits == ["disconnect_drain"]


def test_the_upstream_breaks_while_it_is_read_on() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(SIZED_10 + b"01")
        talk.client.leaves()
        talk.upstream.resets()
        talk.recorded(CLIENT_LEFT, status=200, response_bytes=2, error="the answer was cut off")


def test_stopped_while_it_is_read_on() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(SIZED_10 + b"01")
        talk.client.leaves()
        talk.stops(5)
        talk.nothing_recorded()
        talk.passes(6)
        talk.recorded(CLIENT_LEFT, status=200, response_bytes=2)


def test_with_stop_nothing_is_read_on() -> None:
    with conversation(on_disconnect="stop") as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(SIZED_10 + b"01")
        talk.client.leaves()
        talk.upstream.is_dropped()
        talk.recorded(CLIENT_LEFT, status=200, response_bytes=2)


def test_without_a_free_slot_nothing_is_read_on() -> None:
    with conversation(drains=0) as talk:
        talk.client.says(get(MODEL))
        talk.client.leaves()
        talk.upstream.is_dropped()
        error = "the client left, and all drain slots were taken"
        talk.recorded(CLIENT_LEFT, status=None, error=error)
        assert talk.counts.limits == ["drains"]


def test_an_upload_is_not_read_on() -> None:
    with conversation() as talk:
        talk.client.says(post_head(MODEL, b"Content-Length: 10\r\n") + b"01")
        talk.client.leaves()
        talk.upstream.is_dropped()
        talk.recorded(CLIENT_LEFT, status=None, request_bytes=2)


def test_what_is_written_to_a_client_that_left_goes_nowhere() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(CHUNKED)
        talk.client.hears(CHUNKED)
        talk.client.leaves()
        talk.upstream.says(b"7\r\n<usage>\r\n", b"0\r\n\r\n")
        talk.client.hears_nothing()
        talk.recorded(CLIENT_LEFT, status=200, response_bytes=7)


# -- the end waits for the record ----------------------------------------------------------------


def test_the_end_waits_for_the_disk() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.says(CHUNKED + b"1\r\na\r\n")
        talk.client.hears(CHUNKED + b"1\r\na\r\n")
        talk.upstream.says(b"1\r\nb\r\n0\r\n\r\n")
        talk.client.hears_nothing()
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.commits()
        talk.client.hears(b"1\r\nb\r\n0\r\n\r\n")
        talk.client.is_open()


def test_the_upstream_connection_is_given_back_before_the_disk() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.says(ok())
        other = talk.new_client()
        other.says(get(b"/b"))
        assert len(talk.upstreams) == 1
        talk.upstream.says(ok(b"b"))
        talk.client.hears_nothing()
        talk.commits()
        talk.client.hears(ok())
        other.hears(ok(b"b"))


def test_a_record_that_will_not_be_written_cuts_the_response() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.says(ok())
        talk.commits(send=False)
        talk.client.hears_nothing()
        talk.client.is_cut()
        talk.recorded(COMPLETE, status=200, response_bytes=2)


def test_the_client_leaves_before_the_disk_has_it() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.says(ok())
        talk.client.leaves()
        talk.recorded(COMPLETE, status=200, response_bytes=2)
        talk.commits()
        talk.client.hears_nothing()


def test_an_end_mark_is_held_with_what_follows_it() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get(MODEL))
        talk.upstream.says(CHUNKED + b"7\r\n<usage>\r\n")
        talk.client.hears(CHUNKED + b"7\r\n<usage>\r\n")
        talk.upstream.says(b"5\r\n<end>\r\n")
        talk.client.hears_nothing()
        talk.recorded(COMPLETE, status=200, response_bytes=12)
        assert talk.upstream.held  # what follows waits outside
        talk.upstream.says(b"0\r\n\r\n")
        talk.client.hears_nothing()
        talk.commits()
        talk.client.hears(b"5\r\n<end>\r\n0\r\n\r\n")
        talk.client.is_open()
        talk.upstream.is_open()


def test_the_rest_behind_an_end_mark_that_is_on_record() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(CHUNKED + b"5\r\n<end>\r\n")
        talk.client.hears(CHUNKED + b"5\r\n<end>\r\n")
        talk.recorded(COMPLETE, status=200, response_bytes=5)
        talk.upstream.says(b"1\r\nx\r\n")
        talk.client.hears(b"1\r\nx\r\n")
        talk.upstream.says(b"0\r\n\r\n")
        talk.client.hears(b"0\r\n\r\n")
        talk.client.is_open()


def test_the_client_leaves_behind_an_end_mark() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(CHUNKED + b"5\r\n<end>\r\n")
        talk.client.leaves()
        talk.upstream.is_dropped()
        talk.recorded(COMPLETE, status=200, response_bytes=5)


def test_the_upstream_breaks_behind_an_end_mark() -> None:
    with conversation() as talk:
        talk.client.says(get(MODEL))
        talk.upstream.says(CHUNKED + b"5\r\n<end>\r\n")
        talk.upstream.resets()
        talk.client.is_closed()
        talk.recorded(COMPLETE, status=200, response_bytes=5)


def test_stopped_while_the_end_is_held() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.says(ok())
        talk.stops(5)
        talk.passes(6)
        talk.client.hears_nothing()
        talk.client.is_cut()
        talk.recorded(COMPLETE, status=200, response_bytes=2)


def test_an_answer_of_ours_waits_for_its_record_too() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.resets()
        talk.client.hears_nothing()
        talk.recorded(BROKE, status=502, response_bytes=size(BAD_GATEWAY), error=RESET)
        talk.commits()
        talk.client.hears(BAD_GATEWAY)
        talk.client.is_open()


def test_the_next_pipelined_call_waits_for_the_disk() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get(b"/1") + get(b"/2"))
        talk.upstream.hears(sent(get(b"/1")))
        talk.upstream.says(ok())
        talk.upstream.hears_nothing()
        talk.commits()
        talk.upstream.hears(sent(get(b"/2")))
        talk.upstream.says(ok())
        talk.commits()
        talk.client.hears(ok() + ok())


def test_a_late_commit_after_the_end_of_the_response_is_waited_for() -> None:
    """No timeout of the traffic ends the wait for the disk."""
    with conversation(idle_timeout_s=20, upstream_timeout_s=20) as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.says(ok())
        talk.passes(300)
        talk.client.hears_nothing()
        talk.commits()
        talk.client.hears(ok())
        talk.recorded(COMPLETE, status=200, response_bytes=2)


def test_the_end_of_a_body_until_close_waits_for_the_disk() -> None:
    with conversation() as talk:
        talk.holds()
        talk.client.says(get())
        talk.upstream.says(UNTIL_CLOSE + b"abc")
        talk.upstream.leaves()
        talk.client.hears(CHUNKED + b"3\r\nabc\r\n")
        talk.recorded(COMPLETE, status=200, response_bytes=3)
        talk.commits()
        talk.client.hears(b"0\r\n\r\n")


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


# -- a fault of ours -----------------------------------------------------------------------------


def test_a_fault_of_ours_before_the_head(caplog: pytest.LogCaptureFixture) -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.break_the_parser()
        talk.upstream.says(ok())
        talk.client.hears(OWN_FAULT)
        talk.recorded(BROKE, status=500, response_bytes=size(OWN_FAULT), error="the proxy failed to handle this call")
        talk.client.is_open()


def test_a_fault_of_ours_in_a_body() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(SIZED_10 + b"01")
        talk.break_the_parser()
        talk.upstream.says(b"23")
        talk.client.is_closed()
        talk.recorded(BROKE, status=200, response_bytes=2, error="the proxy failed to handle this call")


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


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("pieces", "body"),
    [
        ([CHUNKED, b"3\r\nabc\r\n", b"0\r\n\r\n"], b"abc"),
        ([CHUNKED, b"3\r\nabc\r\n2\r\nde\r\n", b"1\r\nf\r\n", b"0\r\n\r\n"], b"abcdef"),
        ([CHUNKED + b"3\r\nab", b"c\r\n", b"2\r\nde\r\n", b"0\r\n\r\n"], b"abcde"),
        ([CHUNKED, b"3\r\nabc\r", b"\n2\r\nde\r\n", b"2\r\nfg\r\n0\r\n\r\n"], b"abcdefg"),
        ([CHUNKED, b"0\r\n\r\n"], b""),
    ],
)
def test_whole_chunks_reach_the_client_as_they_came(pieces: list[bytes], body: bytes) -> None:
    with conversation() as talk:
        talk.client.says(get(b"/a"))
        talk.upstream.hears(sent(get(b"/a")))
        talk.upstream.says(*pieces)
        said = talk.client.heard
        assert said.startswith(CHUNKED)
        assert said.endswith(b"0\r\n\r\n")
        talk.recorded(Outcome.COMPLETE, status=200, response_bytes=len(body))


@pytest.mark.parametrize("size", [b"0x3", b"+3", b" 3", b"3_0", b"-3", b"3;x=\n", b"", b"g"])
def test_a_chunk_size_that_is_none_breaks_the_response_wherever_it_comes(size: bytes) -> None:
    for before in ([], [b"3\r\nabc\r\n"]):
        with conversation() as talk:
            talk.client.says(get(b"/a"))
            talk.upstream.says(CHUNKED, *before, size + b"\r\nabc\r\n")
            talk.client.is_closed()  # without an end mark
            assert not talk.client.heard.endswith(b"0\r\n\r\n")
            assert talk.recorder.records[-1].outcome is Outcome.UPSTREAM_BROKE


def test_what_comes_behind_the_last_chunk_is_nobodys() -> None:
    with conversation() as talk:
        talk.client.says(get(b"/a"))
        talk.upstream.says(CHUNKED, b"3\r\nabc\r\n", b"0\r\n\r\n3\r\nabc\r\n")
        assert talk.client.heard == CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"
        talk.upstream.is_dropped()
