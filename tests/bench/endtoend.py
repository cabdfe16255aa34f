"""Delivery end to end (P7): from a prepared spool over HTTP to the receiver, which runs in a process of its own.

    make bench ARGS="--parts delivery"

A batch backend (`meter`, 100 records a request) and one that takes a record a request (`revenium`). What is divided by
is the CPU time of the delivering process, threads included: the receiver is a strict stand-in, and on a machine with
two cores it may well be the slower of the two, so records by the clock are told beside.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
GROUP = 200  # records in a commit: what a busy proxy gathers
CASES = {"meter": 100_000, "revenium": 20_000}  # backend -> records; a second or two to ten of work each
GOALS = {"meter": 20_000, "revenium": 3_000}


def measure(rounds: int, scale: float = 1.0) -> list[dict[str, Any]]:
    """Run each case so many times; prints a line for each, and answers the raw figures."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sidecar-bench-") as folder:
        receiver, url = _receiver()
        try:
            for number in range(rounds):
                for backend, records in CASES.items():
                    room = Path(folder) / f"{backend}-{number}"
                    said = _child("deliver", room, backend, url, str(int(records * scale)))
                    subprocess.run(["rm", "-r", room], check=True)
                    rows.append(json.loads(said))
        finally:
            receiver.terminate()
            receiver.wait()
    print(f"\n{'delivery to':<12}{'records':>10}{'per CPU second':>16}{'per second':>12}{'goal':>9}")
    for backend in CASES:
        mine = sorted((row for row in rows if row["backend"] == backend), key=lambda row: row["records_per_cpu_s"])
        row = mine[len(mine) // 2]
        print(
            f"{backend:<12}{row['records']:>10,}{row['records_per_cpu_s']:>16,.0f}{row['records_per_s']:>12,.0f}"
            f"{GOALS[backend]:>9,}"
        )
    return rows


def _receiver() -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "sidecar", "receiver", "--listen", "127.0.0.1:0"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    words = process.stderr.readline().split()
    return process, next(word for word in words if word.startswith("http://"))


def _child(*arguments: str | Path) -> str:
    """A fresh process, so that nothing of an earlier case is in its figures."""
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "no_proxy": "127.0.0.1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


async def deliver(room: Path, name: str, url: str, records: int) -> dict[str, Any]:
    from sidecar.backends import backend_settings
    from sidecar.delivery import Delivery, DeliveryStore
    from sidecar.runtime import backend_factory
    from sidecar.runtime.metrics import Metrics
    from sidecar.settings import load
    from sidecar.spool import SpoolReader

    settings = load(
        {
            "SIDECAR_UPSTREAM_URL": "http://127.0.0.1:9", "SIDECAR_DATA_DIR": str(room), "SIDECAR_BACKENDS": name,
            "SIDECAR_METER_URL": f"{url}/meter", "SIDECAR_REVENIUM_URL": url, "SIDECAR_REVENIUM_API_KEY": "k",
        },
        backend_settings=backend_settings(),
    )  # fmt: skip
    state = DeliveryStore.open(room / "delivery.db")
    state.configure([name], [], time.time())  # as if it had been there first: else all may have been delivered before
    await prepare(room, records)
    backend = backend_factory.backend(settings, name)
    with SpoolReader(room) as reader:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        async with Delivery(reader=reader, store=state, backends=[backend], metrics=Metrics(backends=[name])) as work:
            await work.drain(600.0)
            wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
            upto = {instance: reader.last_seq(instance) for instance in reader.instances()}
            totals = work.totals(upto)[name]
    await backend.aclose()
    state.close()
    if totals.delivered != records:
        raise SystemExit(f"{name}: {totals} is not {records} delivered")
    return {
        "backend": name, "records": records, "wall_s": wall_s, "cpu_s": cpu_s,
        "records_per_s": records / wall_s, "records_per_cpu_s": records / cpu_s,
    }  # fmt: skip


async def prepare(room: Path, records: int) -> None:
    """A spool with so many calls of a model in it."""
    from support.backend_fixtures import record, record_id

    from sidecar.spool import Batch, Spool

    line = record(1).json
    old = record_id(1).encode()
    batches = records // GROUP
    left = batches
    done = asyncio.Event()

    def settled(_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            done.set()

    async with Spool.open(room, instance="bench") as spool:
        for number in range(batches):
            first = number * GROUP + 1
            lines = [line.replace(old, record_id(seq).encode()) for seq in range(first, first + GROUP)]
            size = sum(map(len, lines))
            spool.submit(Batch(first_seq=first, lines=lines, size_bytes=size, admitted=first + GROUP - 1, done=settled))
            await asyncio.sleep(0)
        await done.wait()


def main() -> None:
    import uvloop

    _, what, room, name, url, records = sys.argv
    assert what == "deliver"
    path, count = Path(room), int(records) // GROUP * GROUP
    path.mkdir(parents=True)
    print(json.dumps(uvloop.run(deliver(path, name, url, count))))


if __name__ == "__main__":
    main()
