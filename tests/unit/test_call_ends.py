"""How a call ends whose client leaves before its end, and one whose record is not on disk yet: conversations, as in
`test_call_conversations`."""

from __future__ import annotations

import pytest
from support.conversation import (
    BAD_GATEWAY,
    CHUNKED,
    RESET,
    SIZED_10,
    UNTIL_CLOSE,
    conversation,
    get,
    ok,
    post_head,
    sent,
    size,
)

from sidecar.model.exchange import Outcome, UsageState

pytestmark = pytest.mark.usefixtures("both_ways")

COMPLETE, CLIENT_LEFT, BROKE = Outcome.COMPLETE, Outcome.CLIENT_LEFT, Outcome.UPSTREAM_BROKE
MODEL = b"/model"


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
