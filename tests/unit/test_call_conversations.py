"""One call in every phase, and what may happen to it there: what client and upstream get, and what is recorded.

Each test is a conversation over transports in memory (`support.conversation`), told from the first byte to the record.
How a call ends whose client leaves, or whose record is late, is in `test_call_ends`, protocol switches are in
`test_call_switches`, and what belongs to the client's connection is in `test_client_conversations`.
"""

from __future__ import annotations

import pytest
from support.conversation import (
    AGREED,
    BAD_GATEWAY,
    CHUNKED,
    CLOSE,
    RESET,
    SIZED_10,
    TOO_SLOW,
    UNTIL_CLOSE,
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
from sidecar.proxy.plain_call import PlainCall
from sidecar.proxy.upstream import UnreachableError

pytestmark = pytest.mark.usefixtures("both_ways")

COMPLETE, CLIENT_LEFT, BROKE = Outcome.COMPLETE, Outcome.CLIENT_LEFT, Outcome.UPSTREAM_BROKE
UPLOAD_10 = post_head(fields=b"Content-Length: 10\r\n")
UPLOAD_CHUNKS = post_head(fields=b"Transfer-Encoding: chunked\r\n")
UNREACHABLE = own(b"502 Bad Gateway", b"upstream_unreachable", b"no connection to the upstream", b"")
NO_ANSWER = own(b"504 Gateway Timeout", b"upstream_timeout", b"the upstream did not answer in time", b"")
SLOW_CONNECT = own(
    b"504 Gateway Timeout", b"upstream_connect_timeout", b"the upstream accepted no connection in time", b""
)
OWN_FAULT = own(b"500 Internal Server Error", b"proxy_fault", b"the proxy failed to handle this call", b"")
REFUSED = "no connection to the upstream (refused)"
SILENT = "the upstream did not answer in time"
NOT_HTTP = "the answer is not valid HTTP/1.1: expected HTTP/, RTSP/ or ICE/ (not_http)"
BAD_SIZE = "the answer is not valid HTTP/1.1: invalid character in chunk size"
BAD_CHUNK = own(b"400 Bad Request", b"bad_chunk", b"the request's chunked body is malformed")


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


# -- a fault of ours -----------------------------------------------------------------------------


def test_a_fault_of_ours_before_the_head(caplog: pytest.LogCaptureFixture) -> None:
    with conversation() as talk:
        talk.client.says(get())
        short = isinstance(talk.call, PlainCall)
        talk.break_the_parser()
        talk.upstream.says(ok())
        if short:  # it goes on with care
            talk.client.hears(ok())
            talk.recorded(COMPLETE, status=200, response_bytes=2)
        else:
            error = "the proxy failed to handle this call"
            talk.client.hears(OWN_FAULT)
            talk.recorded(BROKE, status=500, response_bytes=size(OWN_FAULT), error=error)
        talk.client.is_open()


def test_a_fault_of_ours_in_a_body() -> None:
    with conversation() as talk:
        talk.client.says(get())
        talk.upstream.says(SIZED_10 + b"01")
        talk.break_the_parser()
        talk.upstream.says(b"23")
        talk.client.is_closed()
        talk.recorded(BROKE, status=200, response_bytes=2, error="the proxy failed to handle this call")
