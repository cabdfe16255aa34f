"""Recorded answers with the usage that must be read from them, for every test that plays them."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import brotli
from backports import zstd

from sidecar.model.exchange import USAGE_FIELDS, Usage
from sidecar.usage import RawHeaders
from sidecar.usage.providers.base import Reader
from sidecar.usage.providers.table import ROWS
from sidecar.usage.readers import Pin, UsageTaps
from sidecar.usage.whole import prepare

DATA = Path(__file__).parent.parent / "data"
SAMPLES = DATA / "samples"
CASES = DATA / "cases" / "usage"
READERS: tuple[type[Reader], ...] = tuple(dict.fromkeys(row.reader for row in ROWS))


def _no_anomaly(kind: str) -> None:
    raise AssertionError(f"anomaly {kind} in a well-formed answer")


_TAPS = UsageTaps(anomaly=_no_anomaly)


@dataclass(frozen=True)
class Sample:
    name: str
    provider: str | None
    method: str
    path: str
    request_headers: list[tuple[bytes, bytes]]
    request_body: bytes
    status: int
    response_headers: list[tuple[bytes, bytes]]
    body: bytes
    expected: dict[str, Any] | None
    records: list[dict[str, Any]] | None
    websocket: bool
    null_or_zero: tuple[str, ...]
    upstream_base: str = ""  # the path of the upstream's URL
    client_messages: tuple[bytes, ...] = ()  # of a WebSocket


def _request(body: Any) -> tuple[list[tuple[bytes, bytes]], bytes]:
    if body is None:
        return [], b""
    if "multipart" not in body:
        return [(b"Content-Type", b"application/json")], json.dumps(body).encode()
    parts = []
    for key, value in body["multipart"].items():
        extra = '; filename="a.wav"\r\nContent-Type: audio/wav' if key == "file" else ""
        parts.append(f'--frontier\r\nContent-Disposition: form-data; name="{key}"{extra}\r\n\r\n{value}\r\n')
    parts.append("--frontier--\r\n")
    return [(b"Content-Type", b"multipart/form-data; boundary=frontier")], "".join(parts).encode()


def load(folder: Path = SAMPLES) -> dict[str, Sample]:
    samples = {}
    for name, entry in json.loads((folder / "expected.json").read_text()).items():
        headers, body = _request(entry.get("request_body"))
        answer_headers = [(b"Date", b"Sat, 21 Nov 2026 09:00:00 GMT")]
        if entry["content_type"]:
            answer_headers.append((b"Content-Type", entry["content_type"].encode()))
        answer_headers += [(key.encode(), value.encode()) for key, value in entry.get("response_headers", {}).items()]
        samples[name] = Sample(
            name=name,
            provider=entry["provider"],
            method=entry["method"],
            path=entry["path"],
            request_headers=headers,
            request_body=body,
            status=entry["status"],
            response_headers=answer_headers,
            body=(folder / name).read_bytes(),
            expected=entry.get("expected"),
            records=entry.get("records"),
            websocket=entry["transport"] == "websocket",
            null_or_zero=tuple(entry.get("null_or_zero", ())),
            upstream_base=entry.get("upstream_base", ""),
            client_messages=tuple(json.dumps(message).encode() for message in entry.get("client_messages", ())),
        )
    return samples


def play(
    sample: Sample,
    pieces: Iterable[bytes],
    *,
    more_headers: Iterable[tuple[bytes, bytes]] = (),
    whole: bool = True,
    taps: UsageTaps | None = None,
) -> tuple[Usage | None, list[int]]:
    """The usage, and the numbers of the pieces for which `feed` said that the stream's end mark ended."""
    taps = taps or _TAPS
    request = taps.request(sample.method, sample.path, sample.request_headers)
    assert request is not None, "no tap for the request"
    request.feed(sample.request_body)
    response = taps.response(request, sample.status, [*sample.response_headers, *more_headers])
    assert response is not None, "no tap for the answer"
    marks = [number for number, piece in enumerate(pieces) if response.feed(piece)]
    return response.finish(whole), marks


def pinned(sample: Sample) -> UsageTaps:
    assert sample.provider is not None
    return UsageTaps(pins=[Pin(sample.path.partition("?")[0], sample.provider)], anomaly=_no_anomaly)


def differences(usage: Usage, expected: dict[str, Any], null_or_zero: Iterable[str] = ()) -> dict[str, tuple[Any, Any]]:
    """Fields that are not as expected: (expected, got). Only listed keys are compared."""
    wrong: dict[str, tuple[Any, Any]] = {}
    for key, value in expected.items():
        if key in ("batch_usage", "kind"):
            continue
        got = getattr(usage, key)
        if key == "error":
            right = (got is not None) is value
        elif key == "cost_usd":
            right = got is not None and Decimal(got) == Decimal(str(value))
        elif key == "units":
            right = {unit: float(amount) for unit, amount in got.items()} == value
        elif key in null_or_zero:
            right = not got
        else:
            right = got == value
        if not right:
            wrong[key] = (value, got)
    return wrong


def wrong_in(usage: Usage | None, sample: Sample) -> object:
    """What is not as the sample has it; where nothing is expected, whatever was counted."""
    if sample.expected is not None:
        return differences(usage, sample.expected, sample.null_or_zero) if usage is not None else "nothing was read"
    if usage is None:
        return None
    counted = [field for field in USAGE_FIELDS if field.endswith("_tokens") and getattr(usage, field)]
    return counted or usage.units or usage.cost_usd


def ways(body: bytes, large: int = 65_536) -> dict[str, list[bytes]]:
    """The body cut in five ways; what is large is cut into some thousand pieces where others are into single bytes."""
    step = 1 if len(body) < large else 61
    chance = random.Random(len(body))
    most = max(2, min(4096, len(body) // 8))
    places = sorted(chance.randrange(len(body) + 1) for _ in range(chance.randrange(1, most)))
    return {
        "whole": [body],
        "byte by byte": sliced(body, step),
        "random pieces": [body[a:b] for a, b in zip([0, *places], [*places, len(body)], strict=True)],
        "lines": body.splitlines(keepends=True),
        "13 bytes": sliced(body, 13 if len(body) < large else 1013),
    }


def sliced(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


def coded(pieces: Iterable[bytes], coding: str) -> list[bytes]:
    """Each piece flushed on its own, as servers do that stream."""
    if coding == "br":
        pack: Any = brotli.Compressor()
        return [*(pack.process(piece) + pack.flush() for piece in pieces), pack.finish()]
    if coding == "zstd":
        pack = zstd.ZstdCompressor()
        return [*(pack.compress(piece, mode=pack.FLUSH_BLOCK) for piece in pieces), pack.flush()]
    pack = zlib.compressobj(wbits=31 if coding == "gzip" else 15)
    return [*(pack.compress(piece) + pack.flush(zlib.Z_SYNC_FLUSH) for piece in pieces), pack.flush()]


def read_call(
    taps: UsageTaps,
    method: str,
    target: str,
    request_headers: RawHeaders,
    request_body: bytes,
    status: int,
    response_headers: RawHeaders,
    response: bytes | Sequence[bytes],
    *,
    whole: bool = True,
) -> Usage | None:
    """The usage of one call that is over: `prepare` and `Plan.read` for a shape that will not come again."""
    plan = prepare(taps, method, target, request_headers, status, response_headers)
    return None if plan is None else plan.read(request_body, response, whole=whole)
