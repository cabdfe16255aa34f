"""Requests that are sent one behind the other: how their bytes are cut into reads changes nothing, and none is lost for
what is malformed behind it."""

from __future__ import annotations

import re
from itertools import accumulate, pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.conversation import Talk, conversation, get, ok, post, post_head

from sidecar.model.exchange import Outcome
from sidecar.proxy.aiohttp_compat import PIPELINE_MAX
from sidecar.proxy.borders import HEAD_END, LAST_CHUNK, PIECE_BYTES, border, end_across
from sidecar.proxy.client_connection import WAITING_MAX, Client

LAST = b"Connection: close\r\n"
CHUNKED = post_head(fields=b"Transfer-Encoding: chunked\r\n")
GOOD = [
    get(b"/a"),
    get(b"/b", b"X-Text: " + b"y" * 300 + b"\r\n"),
    post(b"c" * 20),
    post(b"d" * 3_000),
    post(b"e\r\n\r\nGET /not-a-request HTTP/1.1\r\n\r\n"),
    post(b"f" * (PIECE_BYTES + 1_000)),
    post(b""),
]
BAD = [
    b"",
    b"\x16\x03\x01\x00",
    b"BREW /pot HTTP/1.1\r\nHost: m\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"POST /b HTTP/1.1\r\nHost: m\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
    b"GET / HTTP/1.1\r\nHost: m\r\nbad name: x\r\n\r\n",
    b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: m\r\n\r\n",
]

Seen = tuple[bytes, list[tuple[bytes, bytes]], list[tuple[str, Outcome, int | None, int]]]


def said(pieces: list[bytes]) -> Seen:
    """What the upstream got, the responses (status, body), and the records."""
    with conversation() as talk:
        for piece in pieces:
            if not talk.client.over:
                talk.client.says(piece)
        answer_all(talk)
        heard = b"".join(peer.heard for peer in talk.upstreams)
        responses = re.findall(rb"HTTP/1\.1 (\d\d\d) [^\r]*\r\n.*?\r\n\r\n(ok\d+)?", talk.client.heard, re.DOTALL)
        records = [(one.method, one.outcome, one.status, one.request_bytes) for one in talk.recorder.records]
    return heard, responses, records


def answer_all(talk: Talk) -> None:
    for number in range(200):
        if not talk.hop.calls:
            return
        talk.upstream.says(ok(b"ok%d" % number))
    raise AssertionError("a call does not end")


def cut(data: bytes, places: list[int]) -> list[bytes]:
    borders = [0, *sorted({place % len(data) for place in places} - {0}), len(data)]
    return [data[start:stop] for start, stop in pairwise(borders)]


@given(
    good=st.lists(st.sampled_from(GOOD), min_size=1, max_size=6),
    bad=st.sampled_from(BAD),
    places=st.lists(st.integers(0, 60_000), max_size=4),
)
@example(good=[get(b"/a")], bad=BAD[1], places=[])
@example(good=[post(b"d" * 3_000)], bad=BAD[2], places=[2_900])
@example(good=[get(b"/a"), post(b"d" * 3_000), get(b"/c")], bad=BAD[1], places=[2_000])
@example(good=[post(b"d" * 3_000), get(b"/c")], bad=BAD[3], places=[2_000])
@example(good=[get(b"/a")] * 6, bad=BAD[4], places=[30, 70, 150])
@settings(max_examples=150)
def test_no_request_is_lost_for_what_stands_behind_it(good: list[bytes], bad: bytes, places: list[int]) -> None:
    one_by_one = said([*good, bad] if bad else good)
    data = b"".join(good) + bad
    assert said(cut(data, places)) == one_by_one
    assert len(one_by_one[2]) == len(good)
    assert [body for _, body in one_by_one[1]][: len(good)] == [b"ok%d" % number for number in range(len(good))]


@pytest.mark.parametrize("count", [PIPELINE_MAX - 1, PIPELINE_MAX, PIPELINE_MAX + 8, 3 * PIPELINE_MAX])
@pytest.mark.parametrize("size", [40, PIECE_BYTES // 20])
@pytest.mark.parametrize("bad", BAD)
def test_many_requests_in_one_read_are_all_served(count: int, size: int, bad: bytes) -> None:
    request = get(b"/" + b"x" * (size - 40))
    heard, responses, records = said([request * count + bad])
    assert heard.count(b"GET /") == count
    assert [body for _, body in responses][:count] == [b"ok%d" % number for number in range(count)]
    assert len(records) == count


@pytest.mark.parametrize("tail", [get(b"/b"), *BAD[1:]])
@pytest.mark.parametrize(
    "last", [get(b"/a", LAST), get(b"/a").replace(b"HTTP/1.1", b"HTTP/1.0"), post(b"x" * 100, fields=LAST)]
)
def test_what_stands_behind_the_last_request_of_a_connection_is_ignored(last: bytes, tail: bytes) -> None:
    """RFC 9112, 9.6."""
    for place in [0, *accumulate([20, 40, 60, 30, 20])]:
        _, responses, records = said(cut(last + tail, [place]))
        assert [body for _, body in responses] == [b"ok0"]
        assert len(records) == 1


@pytest.mark.parametrize("bad", BAD[1:])
@pytest.mark.parametrize("places", [[], [-6], [-5], [-20]])
def test_a_chunked_body_is_whole_whatever_stands_behind_it(bad: bytes, places: list[int]) -> None:
    whole = CHUNKED + b"3\r\nabc\r\n0\r\n\r\n"
    heard, responses, records = said(cut(whole + bad, [len(whole) + place for place in places]))
    assert heard.endswith(b"3\r\nabc\r\n0\r\n\r\n")
    assert responses[0] == (b"200", b"ok0")
    assert [record[3] for record in records] == [3]


@pytest.mark.parametrize("bad", BAD[1:])
@pytest.mark.parametrize("more", [1, 3])
def test_what_comes_while_nothing_is_read_neither_loses_nor_repeats_a_request(bad: bytes, more: int) -> None:
    """As a TLS layer gives what it had decrypted."""
    for count in range(WAITING_MAX - 1, WAITING_MAX + 3):
        with conversation() as talk:
            talk.client.says(get(b"/first")[:9])
            talk.client.says(get(b"/first")[9:] + get(b"/a") * count)
            assert isinstance(talk.client.protocol, Client)
            talk.client.protocol.data_received(get(b"/b") * more + bad)  # whether it reads or not
            answer_all(talk)
            heard = b"".join(peer.heard for peer in talk.upstreams)
            counts = [heard.count(b"GET " + target) for target in (b"/first", b"/a ", b"/b ")]
            assert counts == [1, count, more], count
            assert len(talk.recorder.records) == sum(counts)


@pytest.mark.parametrize("mark", [HEAD_END, LAST_CHUNK[2:]])
@pytest.mark.parametrize("step", [1, 2, 3, 100])
def test_a_mark_is_found_wherever_a_read_ends_in_it(mark: bytes, step: int) -> None:
    """Reads of `step` bytes up to the cut, and all the rest behind it."""
    sent = b"abc" + mark + b"de"
    start = sent.index(mark)
    for cut in range(1, len(sent)):
        before = b""
        for at in range(0, cut, step):
            before = border(before, sent[at : min(at + step, cut)])
        expected = start + len(mark) - cut if start < cut < start + len(mark) else -1
        assert end_across(mark, before, sent[cut:], 0) == expected
