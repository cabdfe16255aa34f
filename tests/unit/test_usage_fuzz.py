"""No exception leaves a reader, whatever the bytes are; and what comes out can always be written into a record.

Ten seconds in `make test`, ten minutes in `make fuzz` (`FUZZ_SECONDS`). Bytes are drawn from scratch and from the
recordings, changed in the ways that wires change them.
"""

from __future__ import annotations

import os
import random
import time
import traceback
import zlib
from collections.abc import Callable

import orjson
import pytest
from support.usage_samples import CASES, READERS, Sample, load
from support.usage_samples import SAMPLES as FOLDER

from sidecar.model.exchange import Usage
from sidecar.usage.providers.base import build
from sidecar.usage.readers import UsageTaps
from sidecar.usage.values import COUNT_MAX, lenient_loads

SECONDS = float(os.environ.get("FUZZ_SECONDS", "12"))
SEED = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
SAMPLES = [sample for folder in (FOLDER, CASES) for sample in load(folder).values() if not sample.websocket]
SMALL = [sample.body for sample in SAMPLES if len(sample.body) < 8192]
BODIES = [sample.body for sample in SAMPLES]
ODD = [
    b"null", b"true", b"-1", b"1.5", b"1e999", b"NaN", b"9" * 30, b'"12"', b"[]", b"{}", b'"\\ud800"', b'""', b"[" * 50,
    b"{" * 50, b'{"a":' * 300, b"\xff\xfe", b"\x00", b"\r", b"\n\n", b"\r\n\r\n", b"data: ", b"event: error\n",
    b"data: [DONE]\n\n", b'"usage"', b'"error"', b'"type"', b'"choices":[]', b'"usage":{"prompt_tokens":', b"\\u0075",
    b'"\\u0075sage"', b"\xef\xbb\xbf", b": ping\n", b",", b"]", b"}", b'"',
]  # fmt: skip
CODINGS: list[tuple[bytes, Callable[[bytes], bytes]]] = [
    (b"", lambda data: data),
    (b"gzip", lambda data: zlib.compress(data, wbits=31)),
    (b"deflate", zlib.compress),
    (b"br", lambda data: data),
    (b"zstd", lambda data: data),
    (b"gzip, gzip", lambda data: zlib.compress(zlib.compress(data, wbits=31), wbits=31)),
]


def mutated(chance: random.Random, body: bytes) -> bytes:
    data = bytearray(body)
    for _ in range(chance.randrange(1, 6)):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(6)
        if kind == 0 and data:
            data[place % len(data)] = chance.randrange(256)
        elif kind == 1:
            data[place:place] = chance.choice(ODD)
        elif kind == 2:
            del data[place : place + chance.randrange(1, 40)]
        elif kind == 3:
            other = chance.choice(BODIES)
            start = chance.randrange(len(other))
            data[place:place] = other[start : start + chance.randrange(1, 200)]
        elif kind == 4:
            del data[place:]
        else:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            if digits:
                at = chance.choice(digits)
                data[at : at + 1] = chance.choice(ODD)
    return bytes(data)


def one_round(chance: random.Random, taps: UsageTaps, sample: Sample) -> Usage | None:
    body = mutated(chance, chance.choice(BODIES) if chance.random() < 0.3 else sample.body)
    header, encode = chance.choice(CODINGS)
    coded = encode(body)
    if chance.random() < 0.1:
        coded = mutated(chance, coded)
    headers = [
        (name, mutated(chance, value) if chance.random() < 0.1 else value) for name, value in sample.response_headers
    ]
    if header:
        headers.append((b"Content-Encoding", header))
    request = taps.request(sample.method, sample.path, sample.request_headers)
    assert request is not None
    asked = mutated(chance, sample.request_body) if chance.random() < 0.5 else sample.request_body
    for start in range(0, len(asked), 37):
        request.feed(asked[start : start + 37])
    status = chance.choice([200, 200, 200, 200, 206, 400, 429, 500])
    response = taps.response(request, status, headers)
    if response is None:
        return None
    size = chance.choice([1, 2, 7, 100, 4096])
    marks = sum(response.feed(coded[start : start + size]) for start in range(0, len(coded), size))
    assert marks <= 1
    assert isinstance(response.waiting, bool)
    usage = response.finish(chance.random() < 0.8)
    assert response.feed(b"more") is False
    if status >= 400 and usage is not None:
        assert usage.usage_state == "absent"
        assert usage.error
    return usage


def believable(usage: Usage, *, reason: bool = True) -> None:
    written = orjson.dumps(usage)
    assert len(written) < 200_000
    counts = {name: getattr(usage, name) for name in Usage.__slots__ if name.endswith("_tokens")}
    for name, value in counts.items():
        assert value is None or (type(value) is int and 0 <= value <= 8 * COUNT_MAX), name
    if usage.usage_state == "absent":
        assert not any(counts.values())
        assert usage.reason or not reason
    elif usage.input_tokens is not None and usage.output_tokens is not None:
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens


@pytest.mark.timeout(SECONDS + 60)
def test_no_bytes_can_hurt() -> None:
    chance = random.Random(SEED)
    failed: list[str] = []

    def anomaly(kind: str) -> None:
        if kind in ("reader_failed", "tap_failed"):
            failed.append(f"{kind}: {traceback.format_exc()}")

    kinds = [
        UsageTaps(anomaly=anomaly),
        UsageTaps(anomaly=anomaly, clock_ns=time.monotonic_ns),
        UsageTaps(anomaly=anomaly, estimate=True, upstream_host="api.openai.com"),
    ]
    until = time.monotonic() + SECONDS
    rounds = read = 0
    while time.monotonic() < until or rounds < 200:
        usage = one_round(chance, chance.choice(kinds), chance.choice(SAMPLES))
        rounds += 1
        if usage is not None:
            believable(usage)
            read += 1
        assert not failed, f"round {rounds} of FUZZ_SEED={SEED}: {failed}"
    assert read > rounds // 4, "most of what is played should still look like something"
    assert FOLDER.is_dir()


def documents(chance: random.Random) -> list[dict[str, object]]:
    """Of a recording that was changed: the whole of it, or each of its events."""
    body = mutated(chance, chance.choice(SMALL))
    pieces = (body, *body.splitlines())
    found = (lenient_loads(piece.removeprefix(b"data:").strip()) for piece in pieces)
    return [document for document in found if type(document) is dict]


@pytest.mark.timeout(SECONDS + 60)
def test_no_document_can_hurt_any_reader_wherever_it_comes_from() -> None:
    """Answers are handed from reader to reader, so each of them meets everybody's."""
    chance = random.Random(SEED + 1)
    until = time.monotonic() + SECONDS / 4
    rounds = 0
    while time.monotonic() < until or rounds < 2 * len(READERS):
        kind = READERS[rounds % len(READERS)]
        reader = kind(lambda word: None)
        reader.head({name: chance.choice(("7", "", "x", "1e9")) for name in kind.header_names})
        rounds += 1
        try:
            for document in documents(chance):
                assert type(kind.claims(document)) is bool
                if chance.random() < 0.3:
                    reader.document(document)
                else:
                    reader.message(document, chance.choice(("", "error", "result", "message_start")))
            believable(build(reader, streamed=chance.random() < 0.5, ended=True), reason=False)
        except Exception as error:
            raise AssertionError(f"round {rounds} of FUZZ_SEED={SEED}: {kind.__name__}") from error
