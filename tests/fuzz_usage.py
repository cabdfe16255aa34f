"""Coverage-guided fuzzing of every usage reader and decoder: `make fuzz` runs it where `atheris` installs.

    python tests/fuzz_usage.py -max_total_time=60

The first bytes of an input choose the recording whose head is used, the coding and how the body is cut; the rest is the
body. What must hold is what `test_usage_fuzz` asserts: nothing is raised, and what comes out is believable.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

import atheris

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

with atheris.instrument_imports(include=["sidecar.usage"]):
    from sidecar.usage.readers import UsageTaps

from unit.test_usage_fuzz import SAMPLES, believable  # noqa: E402

CODINGS = (b"", b"", b"", b"gzip", b"deflate", b"br", b"zstd", b"gzip, br")
SIZES = (1, 3, 17, 256, 4096)


def failed(kind: str) -> None:
    if kind in ("reader_failed", "tap_failed"):
        raise RuntimeError(f"{kind}: {traceback.format_exc()}")


TAPS = UsageTaps(anomaly=failed)


def one(data: bytes) -> None:
    """One input."""
    if len(data) < 4:
        return
    sample, body = SAMPLES[data[0] % len(SAMPLES)], data[3:]
    headers = list(sample.response_headers)
    if coding := CODINGS[data[1] % len(CODINGS)]:
        headers.append((b"Content-Encoding", coding))
    request = TAPS.request(sample.method, sample.path, sample.request_headers)
    assert request is not None
    request.feed(body if data[2] & 0x80 else sample.request_body)
    response = TAPS.response(request, 200, headers)
    if response is None:
        return
    size = SIZES[data[2] % len(SIZES)]
    assert sum(response.feed(body[start : start + size]) for start in range(0, len(body), size)) <= 1
    usage = response.finish(bool(data[2] & 0x40))
    if usage is not None:
        believable(usage)


def main() -> None:
    seeds = ROOT / ".fuzz-seeds"
    seeds.mkdir(exist_ok=True)
    for number, sample in enumerate(SAMPLES):
        (seeds / f"{number:03}").write_bytes(bytes([number, 0, 0x44]) + sample.body)
    atheris.Setup([*sys.argv, str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
