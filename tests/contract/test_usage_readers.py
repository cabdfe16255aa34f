"""Every usage reader against the same recordings: right when whole, and the same wherever the bytes are cut."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import brotli
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from support.usage_samples import Sample, differences, load, pinned, play

from sidecar.model.exchange import Usage
from sidecar.usage.providers.table import BODY_END
from sidecar.usage.readers import UsageTaps

SAMPLES = load()
READ = [sample for sample in SAMPLES.values() if sample.records is None]
EVERY_BYTE_MAX = 4096
# Streams that were broken off before their end mark.
NO_MARK = {"anthropic_stream_error.sse", "bedrock_converse_stream_exception.bin"}


def _gzip(data: bytes, size: int = 97) -> bytes:
    """Flushed every few bytes, as servers do that stream."""
    return _flushed(zlib.compressobj(wbits=31), data, size)


def _zlib(data: bytes, size: int = 97) -> bytes:
    return _flushed(zlib.compressobj(wbits=15), data, size)


def _raw(data: bytes, size: int = 97) -> bytes:
    return _flushed(zlib.compressobj(wbits=-15), data, size)


def _members(data: bytes) -> bytes:
    half = len(data) // 2
    return _gzip(data[:half]) + _gzip(data[half:]) + b"\0\0\0\0"


def _no_trailer(data: bytes) -> bytes:
    return _gzip(data)[:-8]


def _flushed(compressor: zlib._Compress, data: bytes, size: int) -> bytes:
    parts = []
    for start in range(0, len(data), size):
        parts.append(compressor.compress(data[start : start + size]))
        parts.append(compressor.flush(zlib.Z_SYNC_FLUSH))
    return b"".join(parts) + compressor.flush()


CODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", _gzip),
    "gzip of several members": ("x-gzip", _members),
    "gzip without its trailer": ("gzip", _no_trailer),
    "deflate": ("deflate", _zlib),
    "raw deflate": ("deflate", _raw),
    "br": ("br", brotli.compress),
    "zstd": ("zstd", zstd.compress),
    "zstd of two frames": ("ZSTD", lambda data: zstd.compress(data[:50]) + zstd.compress(data[50:])),
    "stacked": ("gzip, br", lambda data: brotli.compress(_gzip(data))),
    "none": ("identity", lambda data: data),
}


def _marked(sample: Sample) -> bool:
    """Whether its stream has an end mark of its own, as the table says of its path; others end with their body."""
    endpoint = UsageTaps().endpoints.of(sample.method, sample.path)
    row = endpoint.row if endpoint is not None else None
    return sample.name not in NO_MARK and (row is None or row.end_mark not in ("", BODY_END))


def by_name(samples: list[Sample]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sample", [pytest.param(sample, id=sample.name) for sample in samples])


def whole(sample: Sample) -> Usage:
    usage, _ = play(sample, [sample.body])
    assert usage is not None
    return usage


@by_name(READ)
def test_what_is_read_is_what_was_used(sample: Sample) -> None:
    usage = whole(sample)
    wrong = differences(usage, sample.expected or {}, sample.null_or_zero)
    assert not wrong
    if usage.input_tokens is not None and usage.output_tokens is not None:
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@by_name(READ)
def test_a_pinned_provider_is_the_one_recorded(sample: Sample) -> None:
    usage, _ = play(sample, [sample.body], taps=pinned(sample))
    assert usage is not None
    assert usage.provider == sample.provider
    assert replace(usage, provider=None) == replace(whole(sample), provider=None)


@by_name(READ)
def test_where_it_is_cut_cannot_matter(sample: Sample) -> None:
    expected = whole(sample)
    _, marks = play(sample, [sample.body])
    body = sample.body
    places: Sequence[int] = range(1, len(body))
    if len(body) >= EVERY_BYTE_MAX:
        places = sorted(random.Random(len(body)).sample(places, 200))
    for place in places:
        usage, cut_marks = play(sample, [body[:place], body[place:]])
        assert usage == expected, place
        assert len(cut_marks) == len(marks), place


@by_name(READ)
def test_byte_by_byte(sample: Sample) -> None:
    usage, marks = play(sample, [sample.body[i : i + 1] for i in range(len(sample.body))])
    assert usage == whole(sample)
    assert len(marks) <= 1


@by_name([s for s in READ if s.name.endswith((".sse", ".bin", ".ndjson")) and _marked(s)])
def test_the_end_mark_is_seen_with_its_last_meaningful_byte(sample: Sample) -> None:
    """Whoever reads by lines may act before the blank line; nothing after the mark may be waited for."""
    _, marks = play(sample, [sample.body[i : i + 1] for i in range(len(sample.body))])
    assert len(marks) == 1
    tail = sample.body[marks[0] + 1 :]
    assert sample.name.endswith(".bin") or tail.strip() in (b"", b"data: [DONE]")


@pytest.mark.parametrize("coding", CODINGS)
@by_name(READ)
def test_coded_copies_are_decoded(sample: Sample, coding: str) -> None:
    header, encode = CODINGS[coding]
    body = encode(sample.body)
    headers = [(b"content-encoding", header.encode())]
    expected = whole(sample)
    usage, _ = play(sample, [body], more_headers=headers)
    assert usage == expected
    usage, _ = play(sample, [body[i : i + 7] for i in range(0, len(body), 7)], more_headers=headers)
    assert usage == expected


@by_name([s for s in READ if s.name.endswith(".sse")])
@pytest.mark.parametrize("newline", [b"\r\n", b"\r"])
def test_other_line_ends_and_a_byte_order_mark(sample: Sample, newline: bytes) -> None:
    body = b"\xef\xbb\xbf" + sample.body.replace(b"\n", newline)
    expected = whole(sample)
    for size in (1, 2, 3, 11, len(body)):
        usage, _ = play(sample, [body[i : i + size] for i in range(0, len(body), size)])
        assert usage == expected, size


@by_name([s for s in READ if s.name.endswith((".sse", ".ndjson"))])
def test_the_last_blank_line_may_be_missing(sample: Sample) -> None:
    body = sample.body.rstrip().removesuffix(b"data: [DONE]").rstrip()
    usage, _ = play(sample, [body])
    expected = whole(sample)
    assert usage == expected


@by_name([s for s in READ if s.name.endswith((".sse", ".ndjson", ".json"))])
def test_a_wrong_content_type_does_not_mislead(sample: Sample) -> None:
    for content_type in (b"application/json", b"text/plain; charset=utf-8", None):
        headers = [header for header in sample.response_headers if header[0] != b"Content-Type"]
        if content_type is not None:
            headers.append((b"content-type", content_type))
        usage, _ = play(replace(sample, response_headers=headers), [sample.body])
        assert usage == whole(sample), content_type


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_cut_into_any_pieces(data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from(READ))
    coding = data.draw(st.sampled_from(sorted(CODINGS)))
    header, encode = CODINGS[coding]
    body = encode(sample.body)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    usage, _ = play(sample, pieces, more_headers=[(b"Content-Encoding", header.encode())])
    assert usage == whole(sample)


def _cut_streams() -> Iterator[tuple[Sample, int]]:
    for sample in READ:
        if not sample.name.endswith(".json"):
            for share in (0.2, 0.5, 0.8):
                yield sample, int(len(sample.body) * share)


def test_a_stream_that_is_cut_off_never_says_more_than_the_whole_one() -> None:
    for sample, place in _cut_streams():
        usage, _ = play(sample, [sample.body[:place]], whole=False)
        full = whole(sample)
        if usage is None:
            continue
        for field in ("input_tokens", "output_tokens", "total_tokens"):
            assert (getattr(usage, field) or 0) <= (getattr(full, field) or 0), (sample.name, place, field)
        if usage.usage_state == "final":
            assert usage.output_tokens == full.output_tokens, (sample.name, place)
