"""Delivery end to end (P7): the whole program with a full spool, to the receiver, which runs in a process of its own.

    make bench ARGS="--parts delivery"

A batch backend (`meter`, 100 records a request), one that takes a record a request (`revenium`), and three at once,
which read the spool by one tail. What is divided by is the CPU time of all the sidecar's processes, less what a start
without work costs: the receiver is a strict stand-in, and on a machine with two cores it may well be the slower of the
two, so records by the clock are told beside.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers as p

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
LIMIT_S = 600.0


@dataclass(frozen=True)
class Case:
    name: str
    backends: str
    records: int  # a second or two to ten of work


CASES = (
    Case("meter", "meter", 100_000),
    Case("revenium", "revenium", 20_000),
    Case("three at once", "meter,webhook,ledger", 100_000),
)


def measure(rounds: int, scale: float = 1.0) -> list[dict[str, Any]]:
    """Run each case so many times; prints a line for each, and answers the raw figures."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sidecar-bench-") as folder:
        receiver, url = _receiver()
        try:
            for number in range(rounds):
                for case in CASES:
                    room = Path(folder) / f"{case.name.replace(' ', '-')}-{number}"
                    room.mkdir()
                    rows.append(deliver(room, case, url, max(int(case.records * scale), 1)))
                    subprocess.run(["rm", "-r", room], check=True)
        finally:
            receiver.terminate()
            receiver.wait()
    print(f"\n{'delivery to':<24}{'records':>10}{'CPU µs each':>14}{'per CPU second':>16}{'per second':>12}")
    for case in CASES:
        mine = sorted((row for row in rows if row["case"] == case.name), key=lambda row: float(row["us"]))
        row = mine[len(mine) // 2]
        print(
            f"{case.backends:<24}{row['records']:>10,}{row['us']:>14,.1f}{row['records_per_cpu_s']:>16,.0f}"
            f"{row['records_per_s']:>12,.0f}"
        )
    return rows


def deliver(room: Path, case: Case, url: str, records: int) -> dict[str, Any]:
    """Once without work, which also makes the backends known: what came before them would not be theirs."""
    from support.filled import fill

    admin = p.free_port()
    env = {
        "SIDECAR_BACKENDS": case.backends,
        "SIDECAR_METER_URL": f"{url}/meter",
        "SIDECAR_WEBHOOK_URL": f"{url}/webhook",
        "SIDECAR_REVENIUM_URL": url,
        "SIDECAR_REVENIUM_API_KEY": "key-of-the-bench",
        "SIDECAR_DATA_DIR": str(room / "data"),
    }
    make: Callable[[Path, int], p.Peer] = p.sidecar("committed", admin=admin, env=env)
    peer = make(room, 9)
    start_s = peer.idle_cpu_s()
    peer.stop()
    asyncio.run(fill(room / "data", records))
    began = time.monotonic()
    peer = make(room, 9)
    try:
        wall_s = _drained(admin, case, records) - began
        cpu_s = peer.idle_cpu_s() - start_s
    finally:
        peer.stop()
    return {
        "case": case.name,
        "records": records,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "us": cpu_s / records * 1e6,
        "records_per_s": records / wall_s,
        "records_per_cpu_s": records / cpu_s,
    }


def _drained(admin: int, case: Case, records: int) -> float:
    """When each backend had all of them. Asked seldom: each question is work of its own."""
    end = time.monotonic() + LIMIT_S
    balance: dict[str, Any] = {}
    while time.monotonic() < end:
        with suppress(OSError):  # not listening yet
            with urllib.request.urlopen(f"http://127.0.0.1:{admin}/balance", timeout=10) as answer:
                balance = json.load(answer)
            if all(balance["backends"][name]["delivered"] == records for name in case.backends.split(",")):
                return time.monotonic()
        time.sleep(0.25)
    raise RuntimeError(f"{case.backends}: not delivered after {LIMIT_S:.0f} s: {balance}")


def _receiver() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "sidecar", "receiver", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    words = process.stderr.readline().split()
    return process, next(word for word in words if word.startswith("http://"))
