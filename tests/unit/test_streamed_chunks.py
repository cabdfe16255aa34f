"""A stream cut anywhere by its connection: the client's body, the usage and the sizes are those that the general parser
gives, whichever way its chunks take."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ways
from support.conversation import Talk, conversation
from support.usage_samples import Sample, load

from sidecar.model.exchange import Outcome
from sidecar.proxy import response_parser
from sidecar.proxy.plain_call import PlainCall
from sidecar.proxy.response_parser import CHUNK_BYTES_MAX, chunk_of_read
from sidecar.usage.formats.likeness import alike, looked_at
from sidecar.usage.providers.anthropic import Messages
from sidecar.usage.providers.base import Reader
from sidecar.usage.providers.openai import ChatCompletions
from sidecar.usage.providers.table import ROWS
from sidecar.usage.readers import UsageTaps

SAMPLES = load()
STREAMS = {
    name: SAMPLES[name]
    for name in (
        "openai_chat_stream.sse", "anthropic_messages_stream.sse", "gemini_stream.sse", "ollama_chat.ndjson",
        "cohere_v2_chat_stream.sse", "bedrock_converse_stream.bin",
    )
}  # fmt: skip
LONG = b"".join(
    b'data: {"id":"c-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,'
    b'"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % word
    for word in (
        b"one", b"two", b"\\u0075sage", b"tool \\\"usage\\\"", b"five", b"error", b"seven", b"x" * 300, b"nine",
    )
)  # fmt: skip
USAGE = (
    b'data: {"id":"c-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
    b'"usage":{"prompt_tokens":5,"completion_tokens":9,"total_tokens":14}}\n\ndata: [DONE]\n\n'
)
CHAT = replace(SAMPLES["openai_chat_stream.sse"], body=LONG + USAGE)


def events(body: bytes) -> list[bytes]:
    """Where a server would send."""
    return re.findall(rb"(?s).*?(?:\n\n|\Z)", body)[:-1] if b"\n\n" in body else body.splitlines(keepends=True)


def chunked(pieces: list[bytes], size: str = "%x") -> bytes:
    return b"".join((size % len(piece)).encode() + b"\r\n" + piece + b"\r\n" for piece in pieces if piece)


def unchunked(wire: bytes) -> bytes:
    """The body, of chunks that are well formed to the last byte."""
    body, at = b"", 0
    while True:
        size = re.compile(rb"([0-9A-Fa-f]+)\r\n").match(wire, at)
        assert size is not None, wire[at : at + 20]
        start = size.end()
        end = start + int(size[1], 16)
        assert wire[end : end + 2] == b"\r\n"
        body, at = body + wire[start:end], end + 2
        if end == start:
            assert at == len(wire)
            return body


def taps() -> UsageTaps:
    return UsageTaps(anomaly=lambda kind: None)


def request_of(sample: Sample) -> bytes:
    fields = b"".join(b"%b: %b\r\n" % field for field in sample.request_headers)
    head = b"%b %b HTTP/1.1\r\nHost: up.test\r\n" % (sample.method.encode(), sample.path.encode())
    return head + fields + b"Content-Length: %d\r\n\r\n" % len(sample.request_body) + sample.request_body


def head_of(sample: Sample) -> bytes:
    fields = b"".join(b"%b: %b\r\n" % field for field in sample.response_headers)
    return b"HTTP/1.1 %d OK\r\n" % sample.status + fields + b"Transfer-Encoding: chunked\r\n\r\n"


def call(talk: Talk, sample: Sample, reads: list[bytes]) -> tuple[bytes, Any, int, Outcome | None]:
    """One call over the conversation's connections: the body that the client got, and what its record says."""
    talk.client.heard = b""
    talk.client.says(request_of(sample))
    talk.upstream.says(head_of(sample), *reads)
    body = talk.client.heard.partition(b"\r\n\r\n")[2]
    record = talk.recorder.records[-1]
    usage = record.usage
    if usage is not None:
        usage = replace(usage, time_to_first_token_ms=None)  # a time
    return unchunked(body), usage, record.response_bytes, record.outcome


def same(talk: Talk, sample: Sample, reads: list[bytes]) -> tuple[bytes, Any, int, Outcome | None]:
    """What a call gives, which is what it gives on the careful way, and there with every byte read by the general
    parser. The reads are the same: the size on record is what had come when the end mark was seen."""
    careful = CAREFUL[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(response_parser, "whole_chunks", lambda data: [])
        expected = call(careful, sample, reads)
    assert call(careful, sample, reads) == expected
    found = call(talk, sample, reads)
    assert found == expected
    assert found[0] == sample.body
    return found


CAREFUL: list[Talk] = []
"""A conversation in which no call takes the short way."""


@pytest.fixture(scope="module")
def talk() -> Iterator[Talk]:
    """A conversation in which calls may take the short way, and its counterpart."""
    ways.short_open = False
    try:
        with conversation(taps=taps()) as careful:
            ways.short_open = True
            CAREFUL.append(careful)
            with conversation(taps=taps()) as talk:
                yield talk
    finally:
        CAREFUL.clear()
        ways.short_open = True


def cuts(wire: bytes, *at: int) -> list[bytes]:
    places = [0, *sorted(set(at)), len(wire)]
    return [wire[one:other] for one, other in pairwise(places) if one < other]


@pytest.mark.parametrize("name", STREAMS)
def test_a_chunk_a_read_as_most_streams_come(name: str, talk: Talk) -> None:
    sample = STREAMS[name]
    pieces = events(sample.body)
    for size in ("%x", "%X", "%06x"):
        same(talk, sample, [*(chunked([piece], size) for piece in pieces), b"0\r\n\r\n"])


@pytest.mark.parametrize("name", STREAMS)
def test_cut_at_random(name: str, talk: Talk) -> None:
    sample = STREAMS[name]
    chance = random.Random(name)
    wire = chunked(events(sample.body)) + b"0\r\n\r\n"
    for _ in range(40):
        same(talk, sample, cuts(wire, *(chance.randrange(len(wire)) for _ in range(chance.choice((1, 2, 9, 40))))))


def test_cut_anywhere_behind_chunks_that_passed(talk: Talk) -> None:
    pieces = events(CHAT.body)
    first, rest = [chunked([piece]) for piece in pieces[:3]], chunked(pieces[3:]) + b"0\r\n\r\n"
    near = [place + by for place in (m.start() for m in re.finditer(rb"\r\n", rest)) for by in range(-4, 5)]
    for at in sorted({*near, *range(1, len(rest), 7)}):
        if 0 < at < len(rest):
            assert same(talk, CHAT, [*first, rest[:at], rest[at:]])[1].total_tokens == 14
    assert same(talk, CHAT, [*first, *(rest[at : at + 1] for at in range(len(rest)))])[1].total_tokens == 14


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_chunks_and_reads_of_any_size(talk: Talk, data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from([CHAT, *STREAMS.values()]))
    body = sample.body
    borders = data.draw(st.lists(st.integers(1, len(body)), max_size=12))
    pieces = cuts(body, *borders) if data.draw(st.booleans()) else events(body)
    wire = chunked(pieces, data.draw(st.sampled_from(["%x", "%X", "%04x"]))) + b"0\r\n\r\n"
    reads = cuts(wire, *data.draw(st.lists(st.integers(1, len(wire) - 1), max_size=12)))
    same(talk, sample, reads)


@pytest.mark.parametrize("odd", [
    b"3;x=y\r\nabc\r\n", b"3 \r\nabc\r\n", b"03\r\nabc\r\n", b"3\r\nabc\n", b"3\nabc\r\n", b"4\r\nabc\r\n",
    b"2\r\nabc\r\n", b"3\r\nabcd\r\n", b"3\r\nabc\r\r\n", b"+3\r\nabc\r\n", b"0\r\nX: y\r\n\r\n", b"0\r\n\r\n",
])  # fmt: skip
def test_what_is_no_plain_chunk_is_the_parsers_to_judge(odd: bytes) -> None:
    """Also behind chunks that passed, and wherever it is cut."""
    pieces = [chunked([piece]) for piece in events(LONG)]
    tail = odd + pieces[-1] + b"0\r\n\r\n"

    def heard(*reads: bytes) -> tuple[bytes, Any, Any]:
        with conversation(taps=taps()) as talk:
            talk.client.says(request_of(CHAT))
            talk.upstream.says(head_of(CHAT), *pieces, *reads)
            record = talk.recorder.records[-1]
            wire = talk.client.heard.partition(b"\r\n\r\n")[2]
            joined = b"".join(piece for _, piece in re.findall(rb"(?s)([0-9a-f]+)\r\n(.*?)\r\n(?=[0-9a-f]|\Z)", wire))
            return joined, record.outcome, record.error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(response_parser, "whole_chunks", lambda data: [])
        expected = heard(tail)
    for at in range(len(odd) + 2):
        assert heard(*cuts(tail, at)) == expected


WORDS = st.sampled_from(
    ["", "a", " whale", "error", "usage", "[DONE]", "event: error", "message_stop", "response.completed", "\\n", "null",
     '\\"', "\\u0075sage", '\\"usage\\":{', "}}", "12", "\u00e4", "finish_reason", "x" * 40]
)  # fmt: skip
VALUES = st.lists(WORDS, max_size=3).map("".join)
# A stream calls itself the same in each: readers overlook that once they know it, and see it where they look.
CHAT_EVENT = 'data: {"id":"chatcmpl-s02","object":"chat.completion.chunk","model":"gpt-5-mini-2025-08-07",%s}\n\n'
DELTA = '"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]'
SHAPES = {
    "openai_chat_stream.sse": [
        CHAT_EVENT % (DELTA + ',"usage":null,"obfuscation":"%s"'),
        CHAT_EVENT % (DELTA + ',"created":1,"seen":"%s"'),
        CHAT_EVENT % '"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":"%s"}]',
        CHAT_EVENT % '"choices":[{"index":0,"delta":{"content":"%s"}}],"usage":{"prompt_tokens":%d}',
        CHAT_EVENT % '"choices":[{"index":0,"delta":{"content":"%s"}}],"sent": %d',
        CHAT_EVENT % '"choices":[{"index":%d,"delta":{"%s":"text"}}]',
    ],
    "anthropic_messages_stream.sse": [
        'data: {"type":"content_block_delta","index":%d,"delta":{"type":"text_delta","text":"%s"}}\n\n',
        'event: %t\ndata: {"index":0,"delta":{"type":"text_delta","text":"text"}}\n\n',
        'data: {"type":"%t","index":0,"delta":{"text":"text"}}\n\n',
    ],
    "openai_responses_stream.sse": [
        'data: {"type":"response.output_text.delta","sequence_number":%d,"delta":"%s"}\n\n',
        'data: {"type":"response.%t","sequence_number":%d,"delta":"text"}\n\n',
    ],
}
TYPES = st.sampled_from(
    ["ping", "x_delta", "in_progress", "error", "message_stop", "message_delta", "failed", "completed"]
)

KINDS: dict[str, st.SearchStrategy[Any]] = {"s": VALUES, "d": st.integers(0, 10**6), "t": TYPES}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_events_that_differ_in_any_value(talk: Talk, data: st.DataObject) -> None:
    """Whatever stands in a string or a number of an event, and in which: those that are alike are told apart from those
    that are not."""
    name = data.draw(st.sampled_from(list(SHAPES)))
    sample = SAMPLES[name]
    pieces = events(sample.body)
    at = data.draw(st.integers(1, len(pieces) - 1))
    made: list[bytes] = []
    for shape in data.draw(st.lists(st.sampled_from(SHAPES[name]), min_size=1, max_size=2)):
        for _ in range(data.draw(st.integers(3, 6))):
            values = [data.draw(KINDS[kind]) for kind in re.findall("%([sdt])", shape)]
            made.append((shape.replace("%t", "%s") % tuple(values)).encode())
    pieces[at:at] = made
    changed = replace(sample, body=b"".join(pieces))
    chunks = [*(chunked([piece]) for piece in pieces[:-1]), chunked(pieces[-1:]) + b"0\r\n\r\n"]
    same(talk, changed, chunks)
    together = data.draw(st.integers(2, 4))
    same(talk, changed, [b"".join(chunks[at : at + together]) for at in range(0, len(chunks), together)])
    places = data.draw(st.lists(st.integers(1, sum(map(len, chunks)) - 1), max_size=3))
    same(talk, changed, [*chunks[: at + 3], *cuts(b"".join(chunks[at + 3 :]), *places)])


def test_events_are_alike_where_they_differ_in_what_nobody_looks_at() -> None:
    known = looked_at(ChatCompletions)

    def event(text: bytes, *, sent: int = 1, reason: bytes = b"null", index: int = 0) -> bytes:
        values = sent, index, text, reason
        return b'data: {"sent":%d,"choices":[{"index":%d,"delta":{"content":"%b"},"finish_reason":%b}]}\n\n' % values

    found = alike(event(b"one"), event(b"two"), known)
    assert found is not None
    start, rest = found
    assert start == event(b"two")[: -len(b'two"},"finish_reason":null}]}\n\n')]
    for text in (b"", b"three", b'\\"', b"\\n\\u00e4", "ä".encode(), b"[DONE]", b"message_stop"):
        assert rest(chunked([event(text)]), 4 + len(start))
    for text in (b'"', b"\n", b"\r", b"\\", b'","usage":{"', b"a\n\ndata: [DONE]\n\n"):
        assert not rest(chunked([event(text)]), 4 + len(start))
    for other in (event(b"two", reason=b'"stop"'), event(b"two")[:-1], event(b"two") * 2, event(b"two", index=1)):
        assert not rest(chunked([other]), 4 + len(start)) or not chunked([other]).startswith(start, 4)
    found = alike(event(b"one"), event(b"two", sent=22), known)
    assert found is not None
    assert found[0] == b'data: {"sent":'
    assert found[1](chunked([event(b"three", sent=4)]), 4 + len(found[0]))
    assert not found[1](chunked([event(b"three", index=4)]), 4 + len(found[0]))
    for one, other in (
        (event(b"one"), event(b"one")),
        (event(b"one"), event(b"one", index=1)),
        (event(b"one", reason=b'"a"'), event(b"two", reason=b'"b"')),
        (event(b"one"), event(b'one","two":"three')),
        (event(b"one"), event(b"\\n")),
        (b'data: "one"\n\n', b'data: "two"\n\n'),
        (b"one", b"two"),
    ):
        assert alike(one, other, known) is None
    assert looked_at(Messages) >= {b"type", b"delta", b"usage"}


@pytest.mark.usefixtures("with_care")
def test_what_passes_is_counted_and_keeps_the_call_alive(talk: Talk) -> None:
    """Chunks that nobody reads move the deadline as others do, and once the client has left nothing passes."""
    with conversation(taps=taps(), idle_timeout_s=30) as talk:
        pieces = [chunked([piece]) for piece in events(LONG)]
        talk.client.says(request_of(CHAT))
        talk.upstream.says(head_of(CHAT), *pieces[:3])
        for _ in range(5):
            talk.passes(20)
            assert talk.call._passing is not None
            talk.upstream.says(pieces[1])
        talk.client.stops_reading()
        talk.upstream.says(pieces[7], pieces[7], pieces[1])
        talk.client.reads_on()
        talk.upstream.says(chunked([USAGE]), b"0\r\n\r\n")
        body = b"".join(events(LONG)[:3]) + events(LONG)[1] * 5 + events(LONG)[7] * 2 + events(LONG)[1] + USAGE
        assert unchunked(talk.client.heard.partition(b"\r\n\r\n")[2]) == body
        talk.recorded(Outcome.COMPLETE, status=200, request_bytes=len(CHAT.request_body), response_bytes=len(body))


def test_a_silent_stream_ends_although_chunks_passed() -> None:
    with conversation(taps=taps(), idle_timeout_s=30) as talk:
        talk.client.says(request_of(CHAT))
        talk.upstream.says(head_of(CHAT), *(chunked([piece]) for piece in events(LONG)[:4]))
        talk.passes(29)
        talk.client.is_open()
        talk.passes(3)
        talk.client.is_cut()


def test_a_reader_that_fails_in_its_search_hurts_no_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Reader, block: bytes) -> bool:
        raise RecursionError

    with conversation(taps=taps()) as talk:
        pieces = [chunked([piece]) for piece in events(LONG)]
        talk.client.says(request_of(CHAT))
        talk.upstream.says(head_of(CHAT), *pieces[:2])
        monkeypatch.setattr(Reader, "nothing_in", fails)
        talk.upstream.says(*pieces[2:], b"0\r\n\r\n")
        assert unchunked(talk.client.heard.partition(b"\r\n\r\n")[2]) == LONG
        talk.recorded(Outcome.COMPLETE, status=200, request_bytes=len(CHAT.request_body), response_bytes=len(LONG))


def test_a_read_as_long_as_a_chunk_is_one_only_if_it_begins_so(talk: Talk) -> None:
    text = events(LONG)[0]
    two = [text[:-9] + b'w"}}]}\n\n', b"data: 1\n\n"]
    one = chunked([text.replace(b"one", b"one" + b"w" * (len(chunked(two)) - len(chunked([text]))))])
    assert len(one) == len(chunked(two))
    pieces = [chunked([text]), one, one, chunked(two), one]
    body = b"".join(unchunked(piece + b"0\r\n\r\n") for piece in pieces)
    found = same(talk, replace(CHAT, body=body), [*pieces, b"0\r\n\r\n"])
    assert found[2] == len(body)
    for line in (b"+", b"0x", b" "):
        with conversation(taps=taps()) as other:
            other.client.says(request_of(CHAT))
            other.upstream.says(head_of(CHAT), *pieces[:3], line + one[len(line) :])
            other.client.is_closed()
            assert not other.client.heard.endswith(b"0\r\n\r\n")
            assert line + one[len(line) :] not in other.client.heard
            assert other.recorder.records[-1].outcome is Outcome.UPSTREAM_BROKE


@pytest.mark.usefixtures("with_care")
def test_the_client_leaves_while_chunks_pass() -> None:
    with conversation(taps=taps(), on_disconnect="drain") as talk:
        talk.client.says(request_of(CHAT))
        pieces = [chunked([piece]) for piece in events(LONG)]
        talk.upstream.says(head_of(CHAT), *pieces[:2])
        assert talk.call._passing is not None
        talk.client.leaves()
        talk.upstream.says(*pieces[:2], chunked([USAGE]), b"0\r\n\r\n")
        record = talk.recorder.records[-1]
        assert record.outcome is Outcome.CLIENT_LEFT
        assert record.usage is not None
        assert record.usage.total_tokens == 14


def test_known_reads_are_chunks_and_bounded(talk: Talk) -> None:
    for size in (1, 15, 16, 255, 256, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 1):
        body = b'data: "' + b"x" * (size - 9) + b'"\n'
        call(talk, replace(CHAT, body=body), [chunked([b"x" * size]), b"0\r\n\r\n"])
        line = b"%x\r\n" % size
        known = chunk_of_read(len(line) + size + 2)
        assert known == ((line, size, len(line)) if size <= CHUNK_BYTES_MAX else None)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_events_with_other_line_ends(end: bytes, talk: Talk) -> None:
    sample = replace(CHAT, body=CHAT.body.replace(b"\n\n", end))
    pieces = [piece + end for piece in sample.body.split(end)[:-1]]
    assert same(talk, sample, [*(chunked([piece]) for piece in pieces), b"0\r\n\r\n"])[1].total_tokens == 14
    several = [chunked(pieces[at : at + 3]) for at in range(0, len(pieces), 3)]
    assert same(talk, sample, [*several, b"0\r\n\r\n"])[1].total_tokens == 14


def test_what_most_chunks_are_passes_unread(talk: Talk) -> None:
    """With either line end, and of lines too: else the short way would be there for nothing."""
    lines = [b'{"model":"m","message":{"role":"assistant","content":"x%d"},"done":false}\n' % at for at in range(6)]
    streams = [
        (CHAT, events(LONG)[:2] * 3),
        (CHAT, [piece.replace(b"\n\n", b"\r\n\r\n") for piece in events(LONG)[:2] * 3]),
        (STREAMS["ollama_chat.ndjson"], lines),
    ]
    for sample, pieces in streams:
        for one in (talk, CAREFUL[0]):
            one.client.says(request_of(sample))
            one.upstream.says(head_of(sample), *(chunked([piece]) for piece in pieces[:4]))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(response_parser.UpstreamResponse, "feed", None)  # not called any more
                patch.setattr(PlainCall, "_stream_on", None)
                one.upstream.says(*(chunked([piece]) for piece in pieces[4:]))
            one.upstream.says(b"0\r\n\r\n")


def test_a_stream_takes_the_short_way_to_its_end(talk: Talk) -> None:
    """Whatever came with the head, one chunk a read or several, with the last one or before it."""
    pieces = [chunked([piece]) for piece in events(LONG)]
    end = chunked([USAGE]) + b"0\r\n\r\n"
    head = head_of(CHAT)
    call(talk, CHAT, [*pieces, end])
    for reads in (
        [head, *pieces, end],
        [head + pieces[0], *pieces[1:], end],
        [head + b"".join(pieces) + end],
        [head, b"".join(pieces[:3]), b"".join(pieces[3:]) + end],
        [head, *pieces, chunked([USAGE[:-14]]), chunked([USAGE[-14:]]) + b"0\r\n\r\n"],
    ):
        before = talk.recorder.plain_calls
        talk.client.heard = b""
        talk.client.says(request_of(CHAT))
        talk.upstream.says(*reads)
        assert talk.recorder.plain_calls == before + 1
        assert talk.client.heard == b"".join(reads)
        record = talk.recorder.records[-1]
        assert (record.status, record.outcome) == (200, Outcome.COMPLETE)
        assert record.response_bytes == len(CHAT.body)
        assert record.usage is not None
        assert (record.usage.usage_state, record.usage.total_tokens) == ("final", 14)


def test_the_first_token_is_timed_from_the_request_whichever_way_its_call_takes() -> None:
    """By a clock that is far ahead of the one by which calls begin."""
    ahead_ns = 10**15
    reads = [chunked([piece]) for piece in events(CHAT.body)]
    for cut in (False, True):
        with conversation(taps=UsageTaps(clock_ns=lambda: time.monotonic_ns() + ahead_ns)) as talk:
            for _ in range(2):
                talk.client.says(request_of(CHAT))
                talk.upstream.says(head_of(CHAT), reads[0])
                if cut:
                    talk.upstream.says(reads[1][:9], reads[1][9:])
                talk.upstream.says(*reads[1 + cut : -1], reads[-1] + b"0\r\n\r\n")
            usage = talk.recorder.records[-1].usage
            assert usage is not None
            assert usage.time_to_first_token_ms is not None
            assert 0 < usage.time_to_first_token_ms - ahead_ns / 1e6 < 60_000
            assert talk.recorder.plain_calls == (0 if cut else 2)


def test_every_reader_that_skips_has_something_to_keep() -> None:
    for row in ROWS:
        assert row.reader.keep is None or row.reader.keep
