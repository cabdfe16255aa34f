"""What a proxy adds to a call at a steady thousand a second (goal P4), and whether a backend that is down is felt (P8).

`h2load` sends at a fixed rate and writes how long each request took; what is added is the difference from the
same load without a proxy, in the same round.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CALLS_PER_S = 1000
CONNECTIONS = 20


def load(port: int, body: Path, folder: Path, *, seconds: int) -> list[float]:
    """Each call's milliseconds. Raises `FileNotFoundError` without `h2load`."""
    binary = shutil.which("h2load")
    if binary is None:
        raise FileNotFoundError("h2load (Debian: nghttp2-client)")
    log = folder / "h2load.log"
    log.unlink(missing_ok=True)
    command = [
        *(binary, "--h1", f"-n{CALLS_PER_S * seconds}", f"-c{CONNECTIONS}", f"--rps={CALLS_PER_S // CONNECTIONS}"),
        *("-r1", "--rate-period=1ms"),  # begin one after the other: else all call at once, for ever
        *("-d", str(body), "-H", "Content-Type: application/json", "-H", "Authorization: Bearer sk-bench"),
        *("--log-file", str(log), f"http://127.0.0.1:{port}/v1/chat/completions"),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split("\t") for line in log.read_text().splitlines()]
    if len(rows) != CALLS_PER_S * seconds or any(status != "200" for _, status, _ in rows):
        raise RuntimeError(said)
    return [int(microseconds) / 1e3 for _, _, microseconds in rows]


def quantile(values: Sequence[float], share: float) -> float:
    found = sorted(values)
    return found[min(int(len(found) * share), len(found) - 1)]
