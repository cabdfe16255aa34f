"""Asking for usage on behalf of a client, and taking the extra chunk out again."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.usage_samples import load

from sidecar.usage.include_usage import BODY_MAX_BYTES, UsageChunkFilter, with_usage_asked

SAMPLES = load()
ASKED = {"include_usage": True}


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (b'{"model":"m","stream":true}', ASKED),
        (b' \n{ "stream" : true , "model" : "m" }\n', ASKED),
        (b'{"stream":true,"stream_options":null}', ASKED),
        (b'{"stream":true,"stream_options":{ }}', ASKED),
        (b'{"stream_options": {"x": [1]}, "stream": true}', {"include_usage": True, "x": [1]}),
        (b'\xef\xbb\xbf{"stream":true}', ASKED),
    ],
)
def test_the_body_asks_and_is_otherwise_as_it_was(body: bytes, options: dict[str, Any]) -> None:
    changed = with_usage_asked(body)
    if body.startswith(b"\xef"):
        assert changed is None, "no client sends a byte order mark, and no strict parser takes it"
        return
    assert changed is not None
    before, after = orjson.loads(body), orjson.loads(changed)
    assert after.pop("stream_options") == options
    before.pop("stream_options", None)
    assert after == before
    assert with_usage_asked(changed) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"stream":false}',
        b'{"stream":"true"}',
        b'{"model":"m"}',
        b'{"stream":true,"stream_options":{"include_usage":true}}',
        b'{"stream":true,"stream_options":{"include_usage":false}}',
        b'{"stream":true,"stream_options":"yes"}',
        b'{"stream":true,"p":"' + b"x" * BODY_MAX_BYTES + b'"}',
    ],
)
def test_a_body_is_left_alone_where_there_is_nothing_to_ask(body: bytes) -> None:
    assert with_usage_asked(body) is None


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=4))
def test_every_other_member_survives(document: dict[str, Any]) -> None:
    document = {**document, "stream": True}
    document.pop("stream_options", None)
    body = orjson.dumps(document) if all(-(2**53) < v < 2**53 for v in document.values() if isinstance(v, int)) else b""
    changed = with_usage_asked(body)
    if changed is None:
        assert not body
        return
    assert body[1:] in changed
    assert orjson.loads(changed) == {**document, "stream_options": ASKED}


def filtered(body: bytes, cuts: list[int]) -> bytes:
    places = sorted(cut % (len(body) + 1) for cut in cuts)
    hide = UsageChunkFilter()
    out = [hide.feed(body[a:b]) for a, b in zip([0, *places], [*places, len(body)], strict=True)]
    return b"".join(out) + hide.finish()


def without_extra(body: bytes) -> bytes:
    events = body.split(b"\n\n")
    return b"\n\n".join(e for e in events if not (b'"choices":[]' in e and b'"usage":{' in e))


@pytest.mark.parametrize("name", ["openai_chat_stream.sse", "azure_chat_stream.sse", "vllm_stream_continuous.sse"])
@given(cuts=st.lists(st.integers(0, 5000), max_size=10), newline=st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_the_extra_chunk_alone_is_taken_out(name: str, cuts: list[int], newline: bytes) -> None:
    body = SAMPLES[name].body
    expected = without_extra(body)
    assert len(expected) < len(body)
    assert filtered(body.replace(b"\n", newline), cuts) == expected.replace(b"\n", newline)


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=6))
def test_other_bytes_pass_unchanged(body: bytes, cuts: list[int]) -> None:
    assert filtered(body, cuts) == body


@pytest.mark.parametrize(
    "name", sorted(n for n in SAMPLES if n.startswith(("mistral", "groq", "deepseek", "perplexity")))
)
def test_streams_without_an_extra_chunk_pass_unchanged(name: str) -> None:
    assert filtered(SAMPLES[name].body, [100, 333, 500]) == SAMPLES[name].body


def test_a_large_event_is_not_held() -> None:
    hide = UsageChunkFilter()
    event = b'data: {"choices":[{"delta":{"content":"' + b"x" * 200_000
    assert len(hide.feed(event)) > 190_000
    end = b'"}}]}\n\ndata: [DONE]\n\n'
    assert hide.feed(end) + hide.finish() == end
