"""Content codings undone in bounded steps."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable

import brotli
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.usage.formats.content_encoding import (
    BACKLOG_MAX_BYTES,
    PART_BYTES,
    STEP_BYTES,
    STEP_RATIO,
    Codings,
    Unreadable,
    decoder,
)


def gz(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, wbits=31)
    return compressor.compress(data) + compressor.flush()


ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gz,
    "deflate": zlib.compress,
    "br": brotli.compress,
    "zstd": zstd.compress,
}


def undo(coding: Codings, data: bytes, size: int) -> bytes:
    out = [part for start in range(0, len(data), size) for part in coding.feed(data[start : start + size])]
    while coding.behind:
        out += coding.feed(b"")
    return b"".join(out)


def made(header: str) -> Codings:
    coding = decoder(header)
    assert coding is not None
    return coding


@settings(deadline=None, max_examples=60)
@given(
    data=st.binary(max_size=5000),
    names=st.lists(st.sampled_from(sorted(ENCODERS)), min_size=1, max_size=3),
    size=st.integers(1, 400),
)
def test_what_was_coded_comes_back(data: bytes, names: list[str], size: int) -> None:
    coded = data
    for name in names:
        coded = ENCODERS[name](coded)
    assert undo(made(", ".join(names)), coded, size) == data


@settings(deadline=None, max_examples=100)
@given(
    data=st.binary(max_size=600), header=st.sampled_from(["gzip", "deflate", "br", "zstd", "gzip, br", "zstd, gzip"])
)
def test_garbage_is_unreadable_or_nothing(data: bytes, header: str) -> None:
    kind = "decoding_failed"
    try:
        undo(made(header), data, 50)
    except Unreadable as broken:
        kind = broken.kind
    assert kind == "decoding_failed"


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_body_of_which_only_the_start_came_is_no_work_left(name: str) -> None:
    for size in range(1, 12):
        coding = made(name)
        assert b"".join(coding.feed(ENCODERS[name](b"some text")[:size])) in b"some text"
        assert not coding.behind


@pytest.mark.parametrize("header", ["", "identity", " , identity"])
def test_nothing_to_undo(header: str) -> None:
    assert decoder(header) is None


@pytest.mark.parametrize("header", ["compress", "gzip, aws-chunked", "gzip, gzip, gzip, gzip", "x" * 3000])
def test_an_unknown_coding_is_said_to_be_unknown(header: str) -> None:
    with pytest.raises(Unreadable) as caught:
        decoder(header)
    assert caught.value.kind == "coding_unknown"


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_one_piece_makes_no_more_than_a_step(name: str) -> None:
    """A bomb costs what any piece costs; what is left waits, still small."""
    coded = ENCODERS[name](bytes(40_000_000))
    coding = made(name)
    made_bytes = []
    for part in coding.feed(coded[:60_000]):
        assert len(part) <= 2 * PART_BYTES
        made_bytes.append(len(part))
    assert sum(made_bytes) <= max(STEP_BYTES, STEP_RATIO * 60_000) + 2 * PART_BYTES


def test_the_end_of_a_highly_regular_body_is_reached_step_by_step() -> None:
    """Nine megabytes behind nine kilobytes: the end is found, a step at a time."""
    coding = made("gzip")
    coded = gz(b" " * 9_000_000 + b"end")
    assert len(coded) < 20_000
    steps, last = 0, b""
    for part in coding.feed(coded):
        last = part
    while coding.behind:
        steps += 1
        size = 0
        for part in coding.feed(b""):
            last, size = part, size + len(part)
        assert size <= STEP_BYTES + PART_BYTES
    assert last.endswith(b"end")
    assert steps > 3


def test_a_bomb_ends_the_reading_when_its_backlog_is_full() -> None:
    # Nine megabytes that would become nine gigabytes.
    block = gz(bytes(50_000_000))
    coding = made("gzip")
    fed = made_bytes = 0
    with pytest.raises(Unreadable) as caught:
        while fed < 9_000_000:
            for part in coding.feed(block):
                made_bytes += len(part)
            fed += len(block)
    assert caught.value.kind == "decoded_too_large"
    assert made_bytes < 200_000_000
    assert fed < 2 * BACKLOG_MAX_BYTES + len(block)


def test_a_bomb_within_a_bomb_is_stopped_at_its_first_stage() -> None:
    coded = gz(gz(bytes(200_000_000)))
    coding = made("gzip, gzip")
    size = sum(len(part) for part in coding.feed(coded))
    assert size <= STEP_BYTES + PART_BYTES


def test_zstd_windows_are_bounded() -> None:
    wide = zstd.compress(
        bytes(1000), options={zstd.CompressionParameter.window_log: 27, zstd.CompressionParameter.content_size_flag: 0}
    )
    stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    wide = stream.compress(b"x" * 100) + stream.flush()
    with pytest.raises(Unreadable):
        undo(made("zstd"), wide, 1000)


@pytest.mark.parametrize(
    ("size", "step"),
    [*itertools.product((70_000, 100_000, 300_000), (0, 61, 1013, 65_536)), (2_000_000, 0), (2_000_000, 65_536)],
)
def test_brotli_that_was_flushed_often_gives_all_of_it_in_one_piece(size: int, step: int) -> None:
    """Its decoder holds output back while it says that it takes more input."""
    body = (b'{"text":"' + b"i" * size + b'","usage":1}') * 2
    pack = brotli.Compressor()
    pieces = [body[start : start + step] for start in range(0, len(body), step)] if step else [body]
    coded = b"".join(pack.process(piece) + pack.flush() for piece in pieces) + pack.finish()
    undone = decoder("br")
    assert undone is not None
    out = b"".join(undone.feed(coded))
    while undone.behind:
        out += b"".join(undone.feed(b""))
    assert out == body
