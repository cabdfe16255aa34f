"""Recorded answers with the usage that must be read from them, for every test that plays them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from sidecar.exchange import Usage
from sidecar.usage.taps import Pin, UsageTaps

SAMPLES = Path(__file__).parent / "data" / "samples"


def _no_anomaly(kind: str) -> None:
    raise AssertionError(f"anomaly {kind} in a well-formed answer")


_TAPS = UsageTaps(anomaly=_no_anomaly)


@dataclass(frozen=True)
class Sample:
    name: str
    provider: str
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


def load() -> dict[str, Sample]:
    samples = {}
    for name, entry in json.loads((SAMPLES / "expected.json").read_text()).items():
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
            body=(SAMPLES / name).read_bytes(),
            expected=entry.get("expected"),
            records=entry.get("records"),
            websocket=entry["transport"] == "websocket",
            null_or_zero=tuple(entry.get("null_or_zero", ())),
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
            right = got is not None and Decimal(got) == Decimal(repr(value))
        elif key == "units":
            right = {unit: float(amount) for unit, amount in got.items()} == value
        elif key in null_or_zero:
            right = not got
        else:
            right = got == value
        if not right:
            wrong[key] = (value, got)
    return wrong
